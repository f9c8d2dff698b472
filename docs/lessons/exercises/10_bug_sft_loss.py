"""Exercise 10 (lessons 1 and 8): a silent bug. Find it and fix it.

sft_loss is to be the mean of -log pi(y_t|s_t) over all actions of the batch, nats per token. GPT-2
has no padding token, so this batch is padded with EOS, as is often done. Symptom: the loss falls as
it should, but the trained policy never ends a response.

logp (B, T): log pi of each token; tokens (B, T) ids; prompt_lengths (B,); lengths (B,) of prompt
and response, EOS included (a response that was cut has none).
10 minutes, 1 point, easy.  Check it:  python docs/lessons/check.py 10
"""
import torch


def sft_loss(logp, tokens, prompt_lengths, lengths, eos):
    t = torch.arange(tokens.shape[1])
    mask = (t >= prompt_lengths[:, None]) & (tokens != eos)
    return -(logp * mask).sum() / mask.sum()
