"""Exercise 6 (lesson 6): Init-SFT's optimum without training, with a floor that makes it sturdy.

    r(x,y) = sum_t [ log pi_SFT(y_t|s_t) - log max( pi_0(y_t|s_t), floor * max_a pi_0(a|s_t) ) ]

logp_sft, logp_init (B, T, V): log-probabilities of all tokens that might stand at t. tokens (B, T):
the one that does. mask (B, T): True at the response's tokens. floor in (0, 1], a float.
Return r (B,), nats per sequence.
20 minutes, 2 points, medium.  Check it:  python docs/lessons/check.py 6
"""
import math

import torch


def log_ratio_reward(logp_sft, logp_init, tokens, mask, floor):
    # about 4 lines; a.maximum(b) takes the larger, entry by entry; math.log(floor)
    return None
