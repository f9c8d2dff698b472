"""Exercise 4: f is the sum of the two KLs' f, hence so is r: h of the reverse, e^h of the forward."""
import torch


def jeffreys_reward(h):
    return h + torch.exp(h)
