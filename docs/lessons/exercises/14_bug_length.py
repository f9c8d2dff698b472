"""Exercise 14 (lesson 2): a silent bug. Find it and fix it.

batches is to cut an epoch of training texts into batches, in a random order. The SFT loss is the
mean over all tokens of a batch, and texts of similar length stand together to save padding.
Symptom: the loss falls, the held-out loss falls, and the trained policy writes too short.

lengths (N,): tokens of each text; size: texts of a batch, which divides N; generator: a
torch.Generator to draw with. Return (N / size, size), the numbers of the texts in each batch.
20 minutes, 2 points, medium.  Check it:  python docs/lessons/check.py 14
"""
import torch


def batches(lengths, size, generator):
    rows = lengths.argsort().view(-1, size)
    return rows[torch.randperm(len(rows), generator=generator)]
