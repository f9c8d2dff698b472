"""Exercise 12 (lesson 4): a silent bug. Find it and fix it.

The gradient of policy_loss is to be that of KL(beta || pi): the policy gradient of the forward
KL's reward r = e^h, over all N outcomes. Symptom: it trains without a complaint and comes to rest,
but at a policy that is flatter than the demonstrator, though it could be the demonstrator.

log_beta (N,): the demonstrator's log-probabilities; logits (N,): the policy's, with gradient.
15 minutes, 2 points, medium.  Check it:  python docs/lessons/check.py 12
"""
import torch


def policy_loss(log_beta, logits):
    logp = logits.log_softmax(-1)
    reward = torch.exp(log_beta - logp)            # e^h, with h = log beta - log pi
    return -(logp.exp().detach() * reward * logp).sum()
