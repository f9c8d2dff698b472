"""Exercise 4 (lesson 4): the reward of an f-divergence that the table does not have.

Jeffreys' divergence has f(u) = (u - 1) log u,  u = beta(y) / pi(y) = e^h. Work out

    r = u f'(u) - f(u) = f*(f'(u))     and write it as a function of h, up to a constant.

h (N,) log-ratios, of either sign. Return r (N,). What does the result remind you of?
20 minutes, 2 points, medium.  Check it:  python docs/lessons/check.py 4
"""
import torch


def jeffreys_reward(h):
    # one line, after a few on paper
    return None
