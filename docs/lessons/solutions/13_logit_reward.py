"""Exercise 13: each reward holds the next state's V, and after the last token there is none."""
import torch.nn.functional as F


def logit_reward(logits, tokens, mask):
    V = logits.logsumexp(-1)
    V_next = F.pad(V[:, 1:] * mask[:, 1:], (0, 1))
    f = logits.gather(-1, tokens[..., None]).squeeze(-1)
    return (f - V_next) * mask
