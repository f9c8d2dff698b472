"""What each method's optimum is, on a token MDP small enough to list all its responses.

A policy is a tiny GPT over three letters and EOS, with at most three new tokens: 40 responses to
each of two prompts. Every log-probability is exact, in float64, and so are optima and expectations,
unless a test says that it samples.
"""

import copy
import itertools
import json
import math
import random
import types

import numpy as np
import pytest
import torch

import afd
import train
from divergences import (discriminator_loss, get_divergence, kl, leave_one_out,
                         policy_gradient_loss)
from model import GPT, GPTConfig, collate, logp_seq, logp_token, sample_responses
from reward import (Adversary, LogRatio, RewardModel, TokenExtrapolation, at_last_token,
                    best_of_n_kl, best_of_n_weights, bradley_terry_loss, implicit_reward, score)
from test_model import all_responses, chi_square, chi_square_bound
from train import Schedule

PAD, EOS, LETTERS, LONGEST = 0, 1, (2, 3, 4), 3
PROMPTS = ([2], [4, 3])
RESPONSES = list(all_responses([EOS, *LETTERS], LONGEST, EOS))
PAIRS = [(x, y) for x in PROMPTS for y in RESPONSES]
BATCH = collate(PAIRS)
SHAPE = len(PROMPTS), len(RESPONSES)


def tiny(seed, std=0.35):
    """A GPT off its starting weights, so that no distribution is near uniform; it never pads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT(GPTConfig(5, n_positions=8, n_embd=16, n_layer=1, n_head=2,
                              suppress_tokens=(PAD,))).double()
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator,
                                           dtype=torch.float64)
    return model


SFT, INIT = tiny(1), tiny(2)


def listed(policy):
    """log pi(y|x) of every response to every prompt, (prompts, responses)."""
    return logp_seq(policy, BATCH).view(SHAPE)


def tilted(reference, rewards, beta):
    """log of pi_ref e^(r/beta) / Z, the optimum of E_pi[r] - beta KL(pi || pi_ref)."""
    return (listed(reference).detach() + rewards.view(SHAPE) / beta).log_softmax(-1)


class Table:
    """An arbitrary reward of whole responses, all of it at the last token."""

    def __init__(self, seed, scale=1.0, constant=None):
        values = scale * torch.randn(len(PAIRS), generator=torch.Generator().manual_seed(seed),
                                     dtype=torch.float64)
        if constant is not None:
            values = torch.full_like(values, constant)
        self.values = {(*x, -1, *y): v for (x, y), v in zip(PAIRS, values.tolist())}

    def __call__(self, batch):
        keys = [(*row[:p], -1, *row[p:n]) for row, p, n in zip(
            batch.tokens.tolist(), batch.prompt_lengths.tolist(), batch.lengths.tolist())]
        return torch.tensor([self.values[key] for key in keys], dtype=torch.float64)

    def token_rewards(self, batch):
        return at_last_token(self(batch), batch)


def drawing(k, seed=0):
    """draw(policy): k samples of each prompt, by the sampler that the learner uses."""
    generator = torch.Generator().manual_seed(seed)

    def draw(policy):
        written = sample_responses(policy, list(PROMPTS), k, LONGEST, EOS, generator)
        return [(x, y) for x, ys in zip(PROMPTS, written) for y in ys]
    return draw


def test_the_enumeration_is_complete():
    """A failure means that every exact number below is of another distribution. The policies also
    have to differ, or nothing below would be put to a test."""
    assert len(RESPONSES) == len(set(map(tuple, RESPONSES))) == 40
    with torch.no_grad():
        sft, init = listed(SFT), listed(INIT)
    torch.testing.assert_close(sft.exp().sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(init.exp().sum(1), torch.ones(2, dtype=torch.float64))
    uniform = torch.full_like(sft, -math.log(40))
    assert kl(sft, init).min() > 0.3 and kl(sft, uniform).min() > 0.3
    assert kl(sft[0], sft[1]) > 0.1         # the prompt matters


# ---- policy optimisation ------------------------------------------------------------------------

REWARDS = {"dense": LogRatio(SFT, INIT), "last": Table(0)}


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("ppo_clip", [0.0, 0.2])
def test_policy_optimisation_lands_on_the_tilted_policy(name, ppo_clip):
    """By sampling, within 0.01 nats of pi_SFT e^(r/beta) / Z: wrong signs, a KL to the wrong policy
    or rewards on the wrong token all end elsewhere."""
    beta, reward, k = 1.0, REWARDS[name], 256
    with torch.no_grad():
        target = tilted(SFT, reward(BATCH), beta)
        assert kl(target, listed(SFT)).min() > 0.1      # there is some way to go
    policy, history = train.optimise_policy(
        SFT, reward, drawing(k), 40 if ppo_clip else 120,
        Schedule(lr=1e-2, weight_decay=0.0), beta, k, ppo_clip, dense=name == "dense")
    with torch.no_grad():
        print(kl(listed(policy), target), kl(target, listed(SFT)), history[0], history[-1])
        assert kl(listed(policy), target).max() < 0.01
