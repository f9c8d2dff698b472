"""Exercise 13 (lesson 9): a reward for each token, read off a language model's logits.

    r(s_t, y_t) = f(s_t, y_t) - V(s_(t+1))      = log pi(y_t|s_t) + V(s_t) - V(s_(t+1))

f are the logits and V(s) = log sum_a e^f(s,a). After the last token of a response V is 0. Whatever
is added to all logits of a state goes into V and leaves the policy as it is: a potential.

logits (B, T, V): f at the state in which tokens[:, t] was chosen. tokens (B, T). mask (B, T): True
at the response's tokens, which stand in one piece. Return r (B, T), nats per token, 0 outside of
the mask. (Published as EndoRM, arXiv:2506.23235.)
15 minutes, 2 points, medium.  Check it:  python docs/lessons/check.py 13
"""
import torch
import torch.nn.functional as F


def logit_reward(logits, tokens, mask):
    # about 4 lines; F.pad(x, (0, 1)) puts a column of zeros behind the last one
    return None
