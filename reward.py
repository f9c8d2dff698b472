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
    floored     -                -            the same, but no gain from what pi_0 finds implausible

Every reward is called with a batch and gives (B,), in nats per sequence for all but `preference`,
whose unit is the log-odds of being preferred; `token_rewards` gives its terms, (B, T), zero outside
the response but for what is given at the end. Source: arXiv:2405.15624, section 4.
"""

import copy
import functools
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from divergences import discriminator_loss
from model import GPT, collate, logp_seq, logp_writable, states
from utils.batches import micro_batches

HEADS = ("sum", "last")
REWARD_MODELS = ("init-sft", "init-demo", "sft-demo", "preference", "log-ratio", "floored")
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
        self.score = nn.Linear(D, D if head == "sum" else 1, device=policy.wte.weight.device)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def token_rewards(self, batch):
        """r(s_t, y_t) at each token, (B, T), nats; head "last" gives it at the end."""
        hidden = states(self.trunk, batch)
        if self.head == "last":
            rows = torch.arange(len(batch.lengths), device=hidden.device)
            return at_the_end(self.score(hidden[rows, batch.lengths - 1]).squeeze(-1), batch)
        wanted = self.score(hidden[:, :-1])                                 # (B, T-1, D)
        rewards = (wanted * self.trunk.wte(batch.tokens[:, 1:])).sum(-1)
        return F.pad(rewards, (1, 0)) * batch.response_mask()

    def forward(self, batch):
        """r(x, y), (B,): the discriminator's logit, in nats per sequence."""
        return self.token_rewards(batch).sum(1)


def at_the_end(rewards, batch):
    """(B, T): the rewards (B,) of whole responses, given in the last column.

    That is the horizon, where all responses of the batch have ended: a response that ended earlier
    waits there, so that at every token a prompt's other responses are all compared with, and a
    reward that is the same for all moves nothing.
    """
    return F.pad(rewards[:, None], (batch.tokens.shape[1] - 1, 0))


class LogRatio(nn.Module):
    """The closed form h*(x,y) = sum_t log pi_SFT(y_t|s_t) - log pi_0(y_t|s_t), nats per sequence.

    floor = 0 is the ratio itself. It is noise where both probabilities are tiny: at a word that
    neither policy would write, hence best-of-N picks such words. With a floor of alpha > 0 the
    denominator is max(pi_0(a|s), alpha max_a' pi_0(a'|s)): an implausible word earns no more than
    pi_SFT grants it. 0.1 is the usual share; cf. the plausibility constraint of contrastive
    decoding, arXiv:2210.15097, which draws the line by the stronger model instead.
    """

    def __init__(self, sft, init, floor=0.0):
        super().__init__()
        self.sft, self.init, self.floor = sft, init, floor
        self.config, self.wte = sft.config, sft.wte

    def log_ratio(self, hidden_sft, hidden_init):
        """(log pi_SFT, log pi_SFT - log max(pi_0, floor)) of every next token, (..., V) each."""
        sft = self.sft.logits(hidden_sft).log_softmax(-1)
        init = self.init.logits(hidden_init).log_softmax(-1)
        if self.floor:
            init = init.maximum(init.amax(-1, keepdim=True) + math.log(self.floor))
        return sft, (sft - init).masked_fill(sft.isneginf(), -math.inf)

    def token_rewards(self, batch):
        """The term of each token, (B, T); -inf at a token that neither policy can write."""
        mask = batch.response_mask()
        hidden = (states(policy, batch)[:, :-1][mask[:, 1:]]
                  for policy in (self.sft, self.init))
        ratio = self.log_ratio(*hidden)[1].gather(1, batch.tokens[mask][:, None]).squeeze(1)
        return ratio.new_zeros(mask.shape).masked_scatter(mask, ratio)

    def forward(self, batch):
        return self.token_rewards(batch).sum(1)


class TokenExtrapolation(LogRatio):
    """A policy in closed form: pi(a|s) = pi_SFT(a|s) e^(h*(s,a)/beta) / Z(s), sampled as GPT is.

    Without a floor it is pi_SFT^(1 + 1/beta) pi_0^(-1/beta), normalised at every token. That is not
    the optimum over sequences, pi*(y|x) = pi_SFT(y|x) e^(h*(x,y)/beta) / Z(x), whose conditionals
    look ahead: pi*(a|s) = pi_SFT(a|s) e^(h*(s,a)/beta) V(s,a)/V(s), with the soft value V(s) =
    E_SFT[e^(h* still to come / beta) | s]. The two differ by log pi(y|x) = log pi*(y|x) + log Z(x)
    - sum_t log Z(s_t): they agree where that sum is the same for all y, e.g. at the last step.
    """
    generate, _prefill = GPT.generate, GPT._prefill

    def __init__(self, sft, init, beta, floor=0.0):
        super().__init__(sft, init, floor)
        self.beta = beta
        self.h = [*sft.h, *init.h]      # one cache a layer

    def hidden(self, idx, positions=None, caches=None, mask=None):
        """Both policies' hidden states side by side, (B, T, 2D)."""
        n = len(self.sft.h)
        return torch.cat([self.sft.hidden(idx, positions, caches and caches[:n], mask),
                          self.init.hidden(idx, positions, caches and caches[n:], mask)], -1)

    def logits(self, hidden):
        sft, ratio = self.log_ratio(*hidden.chunk(2, -1))
        return sft + ratio / self.beta


class Adversary:
    """r(h) of a discriminator that is trained along with the policy: online adversarial imitation.

    D = sigmoid(h) tells demonstrations from the policy's samples; r(h) = f*(f'(e^h)) is the reward
    whose policy gradient, h held constant, is that of -D_f(beta || pi): see divergences.py.

    judge            the discriminator, a RewardModel
    micro_tokens     tokens that go through it at a time, padding included; 0: all
    smoothing        one-sided label smoothing: a demonstration's label is 1 - smoothing, which
                     bounds h* above by log(1/smoothing - 1)
    clip             largest absolute reward: e^h of one sample must not be the whole gradient
    keep_old         half of the negatives are of all policies so far, so that the judge does not
                     forget what was already unlearned; h* is then against that mixture
    """

    def __init__(self, judge, demos, divergence, rng, smoothing=0.0, clip=10.0, keep_old=True,
                 lr=3e-3, micro_tokens=0):
        self.micro_tokens = micro_tokens
        self.judge, self.demos, self.divergence, self.rng = judge, demos, divergence, rng
        self.smoothing, self.clip, self.keep_old, self.old = smoothing, clip, keep_old, []
        self.optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, betas=(0.9, 0.99),
                                           weight_decay=0.0)

    def learn(self, own, policy):
        """One step of the discriminator: as many demonstrations as samples, pairs (x, y)."""
        demos, negatives = self.rng.choices(self.demos, k=len(own)), own
        if self.keep_old:
            self.old += own
            negatives = own[::2] + self.rng.choices(self.old, k=len(own) - len(own[::2]))
        self.optimizer.zero_grad()
        for part in micro_batches(list(zip(demos, negatives)), self.micro_tokens):
            h = self.judge(collate([pair for side in zip(*part) for pair in side],
                                   next(self.judge.parameters()).device))
            h_demo, h_policy = h[:len(part)], h[len(part):]
            loss = discriminator_loss(h_demo, h_policy) + self.smoothing * h_demo.mean()
            (loss * (len(part) / len(own))).backward()
        self.optimizer.step()

    def state_dict(self):
        """What it goes on from, for a snapshot."""
        return {"judge": self.judge.state_dict(), "optimizer": self.optimizer.state_dict(),
                "old": self.old, "rng": self.rng.getstate()}

    def load_state_dict(self, state):
        self.judge.load_state_dict(state["judge"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.old = state["old"]
        self.rng.setstate(state["rng"])

    def token_rewards(self, batch):
        """r(h), given at the end, since it is no sum over tokens: (B, T)."""
        reward = self.divergence.reward(self.judge(batch))
        return at_the_end(reward.clamp(-self.clip, self.clip), batch)

    def __call__(self, batch):
        return self.token_rewards(batch).sum(1)


class ExactAdversary(Adversary):
    """The same with a perfect judge, h = log d_beta(y|x) - log pi(y|x): what is left of adversarial
    imitation when the discriminator's errors are taken away (r(h) is clipped as there, and is seen
    on the policy's own samples alone). density(batch) -> log d_beta, (B,).
    """

    def __init__(self, density, divergence, clip=10.0):
        self.density, self.divergence, self.clip = density, divergence, clip

    def learn(self, own, policy):
        self.policy = policy        # the one that wrote `own`; its weights move, h moves along

    def state_dict(self):
        return {}       # the policy is the loop's

    def load_state_dict(self, state):
        pass

    def judge(self, batch):
        return self.density(batch) - logp_seq(self.policy, batch)


def bradley_terry_loss(reward_preferred, reward_other):
    """-E[log sigmoid(r+ - r-)]: nats; log 2 at chance. Source: Bradley and Terry 1952."""
    return F.softplus(reward_other - reward_preferred).mean()


def implicit_reward(policy, reference, batch, beta):
    """beta (log pi - log pi_ref)(y|x), (B,): the reward that pi would be the optimum of.

    Bradley-Terry on it is DPO (preferred against dispreferred, arXiv:2305.18290) and SPIN
    (demonstrations against the reference's own samples, arXiv:2401.01335). Tokens that no policy
    can write are states, not actions: they count nothing.
    """
    with torch.no_grad():
        logp_ref = logp_writable(reference, batch)
    return beta * (logp_writable(policy, batch) - logp_ref).sum(1)


@torch.inference_mode()
def score(reward, pairs, device="cpu", batch_size=64, n=1):
    """Rewards of (prompt ids, response ids) pairs, numpy (len(pairs),), in the pairs' own order.

    n: the pairs come in runs of n with the same prompt; where prompts are longer than responses, a
    prompt is encoded once for up to 16 of them (see model.states). ValueError if they do not.
    """
    run = math.gcd(n, 16, batch_size)
    if len(pairs) % n:
        raise ValueError(f"{len(pairs)} pairs do not come in runs of {n}")
    if sum(len(x) for x, _ in pairs) <= sum(len(y) for _, y in pairs):
        run = 1
    # runs of responses of similar length, then batches of similar runs: little padding
    order = [i for start in range(0, len(pairs), n)
             for i in sorted(range(start, start + n), key=lambda i: len(pairs[i][1]))]
    runs = sorted((order[i:i + run] for i in range(0, len(order), run)),
                  key=lambda run: len(pairs[run[-1]][0]) + len(pairs[run[-1]][1]))
    order = [i for run in runs for i in run]
    scores = np.empty(len(pairs))
    for start in range(0, len(order), batch_size):
        chunk = order[start:start + batch_size]
        batch = collate([pairs[i] for i in chunk], device, n=run)
        scores[chunk] = reward(batch).float().cpu().numpy()
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
    """Spearman's correlation within each prompt, (P, N) against (P, N): the mean over the prompts
    where both sides vary; nan if there are none."""
    values = correlation(ranks(a), ranks(b))
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


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
    """log n - (n - 1)/n nats: KL(best-of-n || pi_SFT) of scores with a density; else an upper
    bound, close where no score has much probability.

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
    density = np.exp(log_density + constant)
    cumulative = 0.5 + (np.cumsum(density) - (density[0] + density) / 2) * (x[1] - x[0])
    return float(x[np.searchsorted(cumulative, 0.975)])


def mean_ci(values):
    """(mean, half-width of its 95% interval by Student's t); of one value the latter is nan."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    standard_error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()), student_t(len(values) - 1) * standard_error
