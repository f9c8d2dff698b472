"""Reward models: what a discriminator separates decides what it learns to reward.

Shapes: B batch, T time (tokens), D width.

A discriminator D = sigmoid(h) is trained on positives (label 1) against negatives (label 0); at its
optimum the logit is h* = log d_positives - log d_negatives, and the logit is the reward.

                positives        negatives
    init-sft    y ~ pi_SFT       y ~ pi_0     the method: h* = log pi_SFT - log pi_0
    init-demo   demonstrations   y ~ pi_0     it can tell who wrote, not how well
    sft-demo    demonstrations   y ~ pi_SFT   who wrote is nearly all that is left
    preference  preferred        dispreferred  Bradley-Terry: needs labels the others do not get
    log-ratio   -                -            the optimum of init-sft in closed form, no training

Every reward is a function batch -> (B,), in nats per sequence for all but `preference`, whose unit
is the log-odds of being preferred. Source: arXiv:2405.15624, section 4.
"""

import copy
import functools
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import collate, logp_seq

HEADS = ("sum", "last")
REWARD_MODELS = ("init-sft", "init-demo", "sft-demo", "preference", "log-ratio")
CONTROLS = ("golden", "length", "random")     # selectors that know the truth, or nothing


class RewardModel(nn.Module):
    """A transformer trunk, started from pi_0, with a scalar reward at every response token.

    head "sum":  r(x,y) = sum_t e(y_t) . (A h(s_t) + c), with h(s_t) the hidden state before y_t and
                 e(y_t) the token's embedding: a reward of state and action, read out as logits are.
                 The optimum, sum_t log pi_SFT(y_t|s_t) - log pi_0(y_t|s_t), has this form but for
                 the difference of the two log-normalisers of each state
    head "last": r(x,y) = w . h + b after the last response token: the common reward head
    Both start at r = 0, where D = 1/2.
    """

    def __init__(self, policy, head="sum"):
        super().__init__()
        self.trunk, self.head = copy.deepcopy(policy), head
        D = policy.config.n_embd
        self.score = nn.Linear(D, D if head == "sum" else 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def token_rewards(self, batch):
        """r(s_t, y_t) at each token, (B, T), nats; zero outside the response. For head "sum"."""
        states = self.score(self.trunk.hidden(batch.tokens)[:, :-1])        # (B, T-1, D)
        rewards = (states * self.trunk.wte(batch.tokens[:, 1:])).sum(-1)
        return F.pad(rewards, (1, 0)) * batch.response_mask()

    def forward(self, batch):
        """r(x, y), (B,): the discriminator's logit, in nats per sequence."""
        if self.head == "sum":
            return self.token_rewards(batch).sum(1)
        rows = torch.arange(len(batch.lengths), device=batch.lengths.device)
        return self.score(self.trunk.hidden(batch.tokens)[rows, batch.lengths - 1]).squeeze(-1)


def log_ratio(sft, init):
    """The closed form h*(x,y) = log pi_SFT(y|x) - log pi_0(y|x), nats per sequence."""
    return lambda batch: logp_seq(sft, batch) - logp_seq(init, batch)


def bradley_terry_loss(reward_preferred, reward_other):
    """-E[log sigmoid(r+ - r-)]: nats; log 2 at chance. Source: Bradley and Terry 1952."""
    return F.softplus(reward_other - reward_preferred).mean()


@torch.inference_mode()
def score(reward, pairs, device="cpu", batch_size=256):
    """Rewards of (prompt ids, response ids) pairs, numpy (len(pairs),), in the pairs' own order."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    scores = np.empty(len(pairs))
    for start in range(0, len(order), batch_size):
        chunk = order[start:start + batch_size]
        scores[chunk] = reward(collate([pairs[i] for i in chunk], device)).float().cpu().numpy()
    return scores


# ---- how good a reward model is -----------------------------------------------------------------

def ranks(values):
    """Ranks along the last axis, ties sharing their mean rank."""
    values = np.asarray(values)
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return below + (equal - 1) / 2


def correlation(a, b):
    """Pearson correlation along the last axis; nan where either side does not vary."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    norm = np.sqrt((a ** 2).sum(-1) * (b ** 2).sum(-1))
    return np.divide((a * b).sum(-1), norm, out=np.full(norm.shape, np.nan), where=norm > 1e-12)


def rank_correlation(a, b):
    """Spearman's correlation within each prompt, (P, N) against (P, N): the mean over prompts."""
    return float(np.nanmean(correlation(ranks(a), ranks(b))))


def calibration(logits, labels, bins=10):
    """Expected calibration error of sigmoid(logit): mean over bins of |mean label - mean D|."""
    d = 1 / (1 + np.exp(-np.clip(logits, -50, 50)))
    which = np.minimum((d * bins).astype(int), bins - 1)
    gaps = [abs((labels[which == b] - d[which == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / len(d))


# ---- best-of-N and intervals --------------------------------------------------------------------

def best_of_n_weights(scores, n):
    """(P, N): chance that each candidate is the best of n drawn without replacement from its N.

    With r candidates scored below it, C(r, n-1) / C(N, n): the mean over all subsets of size n,
    which is the unbiased estimate of best-of-n with the least variance. Ties go to the later one.
    """
    N = scores.shape[1]
    below = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
    return np.array([math.comb(r, n - 1) / math.comb(N, n) for r in range(N)])[below]


def best_of_n_kl(n):
    """log n - (n - 1)/n nats: KL(best-of-n || pi_SFT) for a reward without ties, else a bound.

    The reward has to be a function of (x, y): a selector that tosses coins leaves pi_SFT as it is.
    """
    return math.log(n) - (n - 1) / n


def win_rate(golden, other):
    """P(a sample of `other` has less golden reward), ties half: (P, N) against (P, M) -> (P, N)."""
    more = (golden[:, :, None] > other[:, None, :]).mean(2)
    return more + (golden[:, :, None] == other[:, None, :]).mean(2) / 2


@functools.cache
def student_t(df):
    """The 97.5% quantile of Student's t with df degrees of freedom, by integrating its density."""
    x = np.linspace(0, 200, 2_000_001)
    log_density = -(df + 1) / 2 * np.log1p(x ** 2 / df)
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    cumulative = 0.5 + np.cumsum(np.exp(log_density + constant)) * (x[1] - x[0])
    return float(x[np.searchsorted(cumulative, 0.975)])


def mean_ci(values):
    """(mean, half-width of its 95% interval by Student's t); of one value the latter is nan."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    standard_error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()), student_t(len(values) - 1) * standard_error
