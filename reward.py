"""Reward models: what a discriminator separates decides what it learns to reward.

A discriminator D = sigmoid(h) is trained on positives (label 1) against negatives (label 0). At its
optimum the logit is h* = log d_positives - log d_negatives, the log-ratio of the two sources'
densities, and the logit is the reward.

                positives        negatives
    init-sft    y ~ pi_SFT       y ~ pi_0     the method: h* = log pi_SFT - log pi_0
    init-demo   demonstrations   y ~ pi_0     it can also tell who wrote
    sft-demo    demonstrations   y ~ pi_SFT   what pi_SFT has not learned yet, and who wrote
    preference  preferred        dispreferred  Bradley-Terry: needs labels the others do not get
    log-ratio   -                -            the optimum of init-sft in closed form, no training
    floored     -                -            the same, with a floor under pi_0: see LogRatio

Every reward is called with a batch and gives (B,), in nats per sequence for all of these but
`preference`, whose unit is the log-odds of being preferred; `token_rewards` gives the terms (B, T).
Shapes: B batch, T time (tokens), D width, P prompts, N candidates of each.
Source: arXiv:2405.15624, section 4.
"""

import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from divergences import discriminator_loss
from model import GPT, collate, logp_seq

HEADS = ("sum", "last")
REWARD_MODELS = ("init-sft", "init-demo", "sft-demo", "preference", "log-ratio", "floored")


class RewardModel(nn.Module):
    """A transformer trunk, started from pi_0, with a scalar reward for every response.

    head "sum":  r(x,y) = sum_t e(y_t) . (A h(s_t) + c), with h(s_t) the hidden state before y_t and
                 e(y_t) the token's embedding: a reward of state and action, read out as logits are.
                 The optimum of Init-SFT, sum_t log pi_SFT(y_t|s_t) - log pi_0(y_t|s_t), is a sum
                 over tokens too: e_SFT(y_t) . h_SFT(s_t) - e_0(y_t) . h_0(s_t) less the difference
                 of two log-normalisers. One state and one embedding can only come near that.
    head "last": r(x,y) = w . h + b after the last response token: the common reward head.
    """

    def __init__(self, policy, head="sum"):
        super().__init__()
        self.trunk, self.head = copy.deepcopy(policy), head
        D = policy.config.n_embd
        self.score = nn.Linear(D, D if head == "sum" else 1, device=policy.device)
        # At r = 0 the discriminator says 1/2. It must not begin by liking long texts, for example.
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    @property
    def device(self):
        return self.trunk.device

    def token_rewards(self, batch):
        """r(s_t, y_t) at each token, (B, T), nats; head "last" gives it all at the end."""
        hidden = self.trunk.hidden(batch.tokens)
        if self.head == "last":
            rows = torch.arange(len(batch.lengths), device=hidden.device)
            return at_the_end(self.score(hidden[rows, batch.lengths - 1]).squeeze(-1), batch)
        # The state before token t is at t - 1. A head that read the state at t would see the
        # action itself, and the reward would no longer be one of state and action.
        wanted = self.score(hidden[:, :-1])                                 # (B, T-1, D)
        rewards = (wanted * self.trunk.wte(batch.tokens[:, 1:])).sum(-1)    # (B, T-1)
        return F.pad(rewards, (1, 0)) * batch.response_mask()

    def forward(self, batch):
        """r(x, y), (B,): the discriminator's logit; of `preference` a Bradley-Terry reward."""
        return self.token_rewards(batch).sum(1)

    def save_pretrained(self, folder):
        """Write the trunk as a checkpoint of GPT-2's format and reward_head.pt beside it."""
        self.trunk.save_pretrained(folder)
        # A slice of a larger tensor would be saved as all of it: hence the clones.
        weights = {name: weight.detach().clone() for name, weight in self.score.named_parameters()}
        part = Path(folder) / ".reward_head.pt.part"
        torch.save({"head": self.head, "score": weights}, part)
        part.replace(Path(folder) / "reward_head.pt")       # the file is whole or not there

    @classmethod
    def from_pretrained(cls, folder):
        """The reward model that save_pretrained wrote. Raises ValueError for other folders."""
        try:        # only data is read, never code
            state = torch.load(Path(folder) / "reward_head.pt", "cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{folder}: no reward model in it ({type(error).__name__})") from error
        reward = cls(GPT.from_pretrained(folder, trunk=True), state["head"])
        reward.score.load_state_dict(state["score"])
        return reward


def at_the_end(rewards, batch):
    """(B, T): the rewards (B,) of whole responses, given in the last column.

    That is the horizon, where all responses of the batch have ended. So the responses to a prompt
    have their rewards in the same column, the leave-one-out baseline can compare them at every
    token, and a reward that is the same for all moves nothing.
    """
    return F.pad(rewards[:, None], (batch.tokens.shape[1] - 1, 0))


# ---- the closed form: no training ---------------------------------------------------------------

class LogRatio(nn.Module):
    """The closed form h*(x,y) = sum_t log pi_SFT(y_t|s_t) - log pi_0(y_t|s_t), nats per sequence.

    floor = 0 is the ratio itself. Where both probabilities are tiny it is noise, and best-of-N
    picks just such words. With a floor of alpha > 0 the denominator is
    max(pi_0(a|s), alpha max_a' pi_0(a'|s)): a word that pi_0 finds implausible earns less. 0.1 is
    the usual share of the plausibility constraint of contrastive decoding (arXiv:2210.15097), where
    the stronger model draws the line. At alpha = 1 the denominator is the same for all words, and
    what is left is log pi_SFT up to a term of the state: the floor leads from ratio to likelihood.
    """

    def __init__(self, sft, init, floor=0.0):
        super().__init__()
        self.sft, self.init, self.floor = sft, init, floor

    @property
    def device(self):
        return self.sft.device

    def logp_and_ratio(self, hidden_sft, hidden_init):
        """(log pi_SFT, log pi_SFT - log max(pi_0, floor)) of every next token, (..., V) each."""
        sft = self.sft.logits(hidden_sft).log_softmax(-1)
        init = self.init.logits(hidden_init).log_softmax(-1)
        if self.floor:
            init = init.maximum(init.amax(-1, keepdim=True) + math.log(self.floor))
        # A token that nobody can write has -inf in both; -inf - -inf would be nan.
        return sft, (sft - init).masked_fill(sft.isneginf(), -math.inf)

    def token_rewards(self, batch):
        """The term of each token, (B, T); -inf at a token that neither policy can write."""
        mask = batch.response_mask()
        # The vocabulary's logits are computed at response tokens only.
        hidden_sft, hidden_init = (policy.hidden(batch.tokens)[:, :-1][mask[:, 1:]]
                                   for policy in (self.sft, self.init))
        ratio = self.logp_and_ratio(hidden_sft, hidden_init)[1]
        ratio = ratio.gather(1, batch.tokens[mask][:, None]).squeeze(1)
        return ratio.new_zeros(mask.shape).masked_scatter(mask, ratio)

    def forward(self, batch):
        """h*(x, y), (B,), nats per sequence."""
        return self.token_rewards(batch).sum(1)


class TokenExtrapolation(LogRatio):
    """A policy in closed form: pi(a|s) = pi_SFT(a|s) e^(h*(s,a)/beta) / Z(s), sampled as GPT is.

    Without a floor it is pi_SFT^(1 + 1/beta) pi_0^(-1/beta), normalised at every token; with a
    floor of 1 it is pi_SFT^(1 + 1/beta): a temperature below 1. Neither is the optimum over whole
    sequences, pi*(y|x) = pi_SFT(y|x) e^(h*(x,y)/beta) / Z(x), which looks ahead at each token. The
    two differ by log pi(y|x) = log pi*(y|x) + log Z(x) - sum_t log Z(s_t).
    beta is kl_coef in the code. Of LogRatio it uses logp_and_ratio alone.
    """

    def __init__(self, sft, init, kl_coef, floor=0.0):
        super().__init__(sft, init, floor)
        self.kl_coef, self.config = kl_coef, sft.config
        self.h = [*sft.h, *init.h]      # both policies' layers: the sampler makes a cache for each

    def hidden(self, idx, positions=None, caches=None, mask=None):
        """Both policies' hidden states side by side, (B, T, 2D)."""
        n = len(self.sft.h)
        caches_sft, caches_init = (caches[:n], caches[n:]) if caches else (None, None)
        return torch.cat([self.sft.hidden(idx, positions, caches_sft, mask),
                          self.init.hidden(idx, positions, caches_init, mask)], -1)

    def logits(self, hidden):
        """log pi_SFT + h* / beta, (..., V): the softmax of the policy divides by Z(s)."""
        sft, ratio = self.logp_and_ratio(*hidden.chunk(2, -1))
        return sft + ratio / self.kl_coef

    logp = GPT.logp


# ---- online adversarial imitation ---------------------------------------------------------------

REWARD_CLIP = 10.0      # largest |r|: e^h of a single sample must not be the whole gradient


class Adversary:
    """r(h) of a discriminator that is trained along with the policy: online adversarial imitation.

    D = sigmoid(h) tells demonstrations from the policy's samples; r(h) = f*(f'(e^h)) is the reward
    whose policy gradient, h held constant, is that of -D_f(beta || pi), where |r| is not clipped:
    see divergences.py. Half of the negatives are of all policies so far, so that the discriminator
    does not forget what was already unlearned; h* is then against that mixture, and the policy
    comes to rest at beta only as its old samples are left behind. Source: GAIL, arXiv:1606.03476.
    """

    def __init__(self, discriminator, demos, divergence, rng, lr=3e-3):
        self.discriminator, self.demos, self.divergence = discriminator, demos, divergence
        self.rng, self.old = rng, []
        self.optimizer = torch.optim.AdamW(discriminator.parameters(), lr, (0.9, 0.99),
                                           weight_decay=0.0)

    @property
    def device(self):
        return self.discriminator.device

    def update(self, samples, policy):
        """One step of the discriminator: as many demonstrations as samples, pairs (x, y)."""
        demos = self.rng.choices(self.demos, k=len(samples))
        self.old += samples
        negatives = samples[::2]        # half are fresh; they are what the policy writes now
        negatives = negatives + self.rng.choices(self.old, k=len(samples) - len(negatives))
        h = self.discriminator(collate(demos + negatives, self.device))
        # A single step: a discriminator trained to its end would be certain of everything, and a
        # saturated logit tells the policy nothing about where to go.
        self.optimizer.zero_grad()
        discriminator_loss(h[:len(demos)], h[len(demos):]).backward()
        self.optimizer.step()

    def token_rewards(self, batch):
        """r(h), given at the end because it is no sum over tokens: (B, T)."""
        reward = self.divergence.reward(self.discriminator(batch))
        return at_the_end(reward.clamp(-REWARD_CLIP, REWARD_CLIP), batch)

    def __call__(self, batch):
        return self.token_rewards(batch).sum(1)


class ExactAdversary(Adversary):
    """The same with a perfect discriminator, h = log d_beta(y|x) - log pi(y|x): what is left of
    adversarial imitation when the discriminator's errors are taken away.

    demo_density: batch -> log d_beta, (B,), nats per sequence.
    """

    def __init__(self, demo_density, divergence, policy):
        self.demo_density, self.divergence, self.policy = demo_density, divergence, policy

    @property
    def device(self):
        return self.policy.device

    def update(self, samples, policy):
        self.policy = policy        # the one that wrote the samples; its weights move, h with them

    def discriminator(self, batch):
        return self.demo_density(batch) - logp_seq(self.policy, batch)


# ---- scores and best-of-N -----------------------------------------------------------------------

@torch.inference_mode()
def score(reward, pairs, batch_size=64):
    """r(x, y) of pairs (prompt ids, response ids), numpy (len(pairs),), in the pairs' own order."""
    # Pairs of similar length go together, so that little is computed for padding. No mean is taken
    # within a batch, so the order cannot change a score.
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    scores = np.empty(len(pairs))
    for start in range(0, len(order), batch_size):
        chunk = order[start:start + batch_size]
        batch = collate([pairs[i] for i in chunk], reward.device)
        scores[chunk] = reward(batch).float().cpu().numpy()
    return scores


def best_of_n_weights(scores, n):
    """(P, N): chance that each candidate is the best of n drawn without replacement from its N.

    The chance is C(r, n-1) / C(N, n) with r candidates scored below it. That is a mean over all
    subsets of size n: an unbiased estimate of best-of-n, for scores without ties the one with the
    least variance. Of equal scores the later candidate counts as the higher.
    """
    N = scores.shape[1]
    # Sorting twice gives each candidate's rank: the number of candidates scored below it.
    below = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
    return np.array([math.comb(r, n - 1) / math.comb(N, n) for r in range(N)])[below]


def best_of_n_kl(n):
    """KL(best-of-n || pi_SFT) = log n - (n - 1)/n nats where scores have a density; otherwise an
    upper bound, close where no score has much probability.

    The reward has to be a function of (x, y): a selector that tosses coins leaves pi_SFT as it is.
    """
    return math.log(n) - (n - 1) / n
