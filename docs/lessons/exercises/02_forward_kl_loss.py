"""Exercise 2 (lesson 2): the SFT loss, which is the forward KL up to a constant.

    loss = -mean over responses of  sum_t log pi(y_t | s_t),   t over the response's tokens

logits (B, T, V): those at position t predict the token at t + 1. tokens (B, T) ids. mask (B, T):
True where the token at t is an action. Return a tensor without dimensions, in nats per sequence.
20 minutes, 2 points, medium.  Check it:  python docs/lessons/check.py 2
"""
import torch


def forward_kl_loss(logits, tokens, mask):
    # about 3 lines: log_softmax, gather(-1, index) to pick the chosen tokens, the masked sum
    return None
