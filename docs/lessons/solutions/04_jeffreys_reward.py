"""Exercise 4: f is the sum of the two KLs' f, and so is r: h of the one, e^h of the other."""
import torch


def jeffreys_reward(h):
    return h + torch.exp(h)
