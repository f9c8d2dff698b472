"""Exercise 3 (lesson 3): the discriminator's loss, whose best logit is the reward.

    loss = -E_demonstrator[log D] - E_policy[log(1 - D)],   D = sigmoid(h)

h_demo (N,) logits at demonstrations, label 1; h_policy (M,) logits at the policy's samples, label
0; N and M may differ. Return a tensor without dimensions. It must stay finite at |h| = 800.
15 minutes, 1 point, easy.  Check it:  python docs/lessons/check.py 3
"""
import torch
import torch.nn.functional as F


def discriminator_loss(h_demo, h_policy):
    # about 3 lines; note that 1 - sigmoid(h) = sigmoid(-h)
    return None
