"""Exercise 12: how r depends on pi is already counted in r = u f' - f: hold it constant."""
import torch


def policy_loss(log_beta, logits):
    logp = logits.log_softmax(-1)
    reward = torch.exp(log_beta - logp).detach()
    return -(logp.exp().detach() * reward * logp).sum()
