"""Exercise 8 (lesson 8): the baseline that costs no value network.

The K samples of a prompt are each other's baseline: the advantage of sample i is its reward less
the mean reward of the *other* K - 1 samples of its prompt.

rewards (P, K): K samples of each of P prompts. Return the advantages (P, K).
10 minutes, 1 point, easy.  Check it:  python docs/lessons/check.py 8
"""
import torch


def leave_one_out(rewards):
    # one to three lines, without a loop over samples
    return None
