"""Exercise 7: sorted by score, the candidate at place r has r others below it."""
from math import comb

import torch


def best_of_n(scores, gold, n):
    N = scores.shape[1]
    weights = torch.tensor([comb(r, n - 1) / comb(N, n) for r in range(N)], dtype=gold.dtype)
    by_score = gold.gather(1, scores.argsort(1))
    return (by_score * weights).sum(1).mean()
