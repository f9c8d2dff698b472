"""Exercise 1 (lesson 1): which tokens of a padded batch are actions?

An action is a token that the policy wrote: the response, its EOS included. The prompt is part of
the first state; padding stands outside the episode, whatever its id (here it has the EOS's).

tokens (B, T) ids, padded on the right; prompt_lengths (B,); lengths (B,) of prompt and response.
Return mask (B, T) bool, True where token t is an action.
10 minutes, 1 point, easy.  Check it:  python docs/lessons/check.py 1
"""
import torch


def response_mask(tokens, prompt_lengths, lengths):
    t = torch.arange(tokens.shape[1])      # (T,); lengths[:, None] is (B, 1): the two broadcast
    return None                            # your code: one or two lines
