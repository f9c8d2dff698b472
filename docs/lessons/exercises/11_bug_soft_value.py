"""Exercise 11 (lessons 5 and 7): a silent bug. Find it and fix it.

soft_value is to be the largest E_pi[r(y)] - kl_coef KL(pi || pi_SFT) that any policy reaches in a
token MDP, which is kl_coef log sum_y pi_SFT(y) e^(r(y)/kl_coef). Instead of listing all y it goes
backwards through the tree of prefixes. Symptom: the value is too low. If kl_coef is large, it is
even lower than what pi_SFT itself gets.

logp, reward: lists over t = 0 .. T-1 of (A^t, A) tensors, log pi_SFT and r of each next letter
after each prefix, in dictionary order. Return the value at the start, (1,).
25 minutes, 3 points, hard.  Check it:  python docs/lessons/check.py 11
"""
import torch


def soft_value(logp, reward, kl_coef):
    V = torch.zeros_like(reward[-1])               # nothing to come after the last letter
    for step_logp, step_reward in zip(reversed(logp), reversed(reward)):
        Q = step_reward + V                        # (A^t, A)
        best = (Q + kl_coef * step_logp).amax(-1)  # (A^t,)
        V = best.view(-1, Q.shape[-1]) if len(best) > 1 else best
    return V
