"""Exercise 9 (lesson 2): a silent bug. Find it and fix it.

forward_kl is to be KL(beta || pi), the demonstrator's KL from the policy, in nats. It runs, it is
never negative, it is zero at pi = beta, and a policy trained on it improves. Symptom: of the
demonstrator's three styles the policy ends up writing one.

log_beta, log_pi (N,): log-probabilities of the same N outcomes.
10 minutes, 1 point, easy.  Check it:  python docs/lessons/check.py 9
"""
import torch.nn.functional as F


def forward_kl(log_beta, log_pi):
    return F.kl_div(log_beta, log_pi, reduction="sum", log_target=True)
