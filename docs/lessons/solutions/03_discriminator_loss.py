"""Exercise 3: -log D = softplus(-h) and -log(1 - D) = softplus(h)."""
import torch.nn.functional as F


def discriminator_loss(h_demo, h_policy):
    return F.softplus(-h_demo).mean() + F.softplus(h_policy).mean()
