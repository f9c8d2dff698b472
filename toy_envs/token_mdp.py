"""Mass-covering against mode-seeking, exactly: a token MDP whose every sequence can be listed.

The demonstrator mixes K styles, each a sharp pattern (aaaaaa, abcabc, ...) with rare slips of a
letter. The learner's memory is limited: it sees the time step and the last `memory` letters. SFT
(forward KL) then averages the styles letter by letter and mostly writes sequences that nobody
wrote; reverse KL writes one style well. First each divergence is minimised exactly, then from
samples alone: SFT by likelihood, the others by discriminator and policy gradient.

    python -m toy_envs.token_mdp

Shapes: K styles, T letters in a sequence, A letters in the alphabet, N = A^T sequences, C contexts
(t, last min(t, memory) letters), R rows (starts or runs) side by side, B samples of one row. All
sequences are listed in dictionary order: the index of one is its letters read as a base-A number.
Log-probabilities and KLs are in nats per sequence.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from divergences import DIVERGENCES, discriminator_loss, f_divergence, kl, policy_surrogate
from model import InputError
from toy_envs.figures import COLORS, pyplot, save_figure
from toy_envs.gaussian import solve
from train import parse_settings, run_script, setting

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAX_SEQUENCES = 4 ** 8      # a solve keeps some forty numbers per sequence and start
MEMORIES = {0: "memoryless", 1: "one letter"}


@dataclass
class Settings:
    """Minimise seven divergences over learners of limited memory, exactly and from samples."""
    patterns: str = setting("aaaaaa,abcabc,dcdcdc", "the styles' patterns, of one length")
    weights: str = setting("0.5,0.3,0.2", "how often the demonstrator uses each style")
    slip: float = setting(0.02, "probability that a style writes another letter than its pattern's")
    letters: int = setting(4, "size of the alphabet")
    starts: int = setting(12, "starting points of each exact solution")
    demos: int = setting(20000, "demonstrations in the sampled versions")
    rounds: int = setting(500, "rounds of discriminator and policy in adversarial training")
    batch: int = setting(1024, "samples of each policy per round")
    seed: int = setting(0, "seed of starts and samples")
    out: str = setting("out/token_mdp", "folder for results.json and the figures")


# ---- the MDP and its demonstrator ---------------------------------------------------------------

@dataclass(frozen=True)
class Demonstrator:
    """beta(y) = sum_k weights[k] prod_t step[k, t, y_t]: a mixture of styles, each with slips."""
    patterns: torch.Tensor      # (K, T) letters as integers
    weights: torch.Tensor       # (K,)
    step: torch.Tensor          # (K, T, A) the style's probability of each letter at step t

    @property
    def length(self):
        return self.patterns.shape[1]

    @property
    def letters(self):
        return self.step.shape[2]


def make_demonstrator(patterns, weights, slip, letters):
    """The demonstrator of these patterns (strings); InputError for arguments that define none."""
    lengths = {len(pattern) for pattern in patterns}
    if len(lengths) != 1 or 0 in lengths:
        raise InputError(f"patterns need one common length of at least 1, got {list(patterns)}")
    if not 2 <= letters <= len(LETTERS):
        raise InputError(f"letters must be from 2 to {len(LETTERS)}, got {letters}")
    foreign = set("".join(patterns)) - set(LETTERS[:letters])
    if foreign:
        raise InputError(f"patterns use {sorted(foreign)}, not among the letters "
                         f"{LETTERS[:letters]}")
    if len(weights) != len(patterns) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-9:
        raise InputError(f"need one weight >= 0 per pattern, summing to one; got {list(weights)}")
    if not 0 <= slip < 1:
        raise InputError(f"slip must be at least 0 and below 1, got {slip}")
    index = torch.tensor([[LETTERS.index(c) for c in pattern] for pattern in patterns])
    chosen = torch.nn.functional.one_hot(index, letters).double()
    step = chosen * (1 - slip) + (1 - chosen) * slip / (letters - 1)
    return Demonstrator(index, torch.tensor(weights, dtype=torch.float64), step)


def check_enumerable(length, letters):
    """Refuse, before memory is touched, an MDP with more sequences than can be listed."""
    if length < 1:
        raise InputError(f"a sequence needs at least 1 letter, got {length}")
    if letters ** length > MAX_SEQUENCES:
        raise InputError(f"{letters} letters and {length} steps make {letters ** length} "
                         f"sequences; the limit for listing them all is {MAX_SEQUENCES}")


def contexts_at(t, letters, memory):
    """How many contexts a learner of this memory tells apart at step t."""
    return letters ** min(t, memory)


def sequence_log_prob(log_pi, length, memory):
    """log pi(y) of every sequence, by extending every prefix with every letter.

    log_pi: (R, C, A), log pi(a | t, last letters), contexts of step 0 first. Returns (R, N).
    """
    rows, _, letters = log_pi.shape
    check_enumerable(length, letters)
    logp, first = log_pi.new_zeros(rows, 1), 0
    for t in range(length):
        size = contexts_at(t, letters, memory)
        table = log_pi[:, None, first:first + size]           # (R, 1, size, A)
        # prefixes in dictionary order: those that share their last letters are `size` apart
        logp = (logp.view(rows, -1, size, 1) + table).view(rows, -1)
        first += size
    return logp


def demonstrator_log_prob(demo):
    """log beta(y) of every sequence: (N,)."""
    styles = sequence_log_prob(demo.step.log(), demo.length, memory=0)
    return torch.logsumexp(styles + demo.weights.log()[:, None], dim=0)


def all_sequences(length, letters):
    """Every sequence, in dictionary order: (N, T) integers."""
    check_enumerable(length, letters)
    return torch.cartesian_prod(*[torch.arange(letters)] * length).view(-1, length)


def sequence_index(sequences, letters):
    """The dictionary-order index (...) of sequences (..., T)."""
    powers = letters ** torch.arange(sequences.shape[-1]).flip(0)
    return (sequences * powers).sum(-1)


def context_index(sequences, letters, memory):
    """The row of log_pi (R, C, A) that each step of the sequences (..., T) is written from."""
    context, first, rows = torch.zeros_like(sequences[..., 0]), 0, []
    for t in range(sequences.shape[-1]):
        rows.append(first + context)
        first += contexts_at(t, letters, memory)
        context = (context * letters + sequences[..., t]) % contexts_at(t + 1, letters, memory)
    return torch.stack(rows, dim=-1)


def policy_log_prob(log_pi, sequences, memory):
    """log pi(y) of given sequences, also where T is too large to list all: log_pi (R, C, A),
    sequences (R or 1, B, T). Returns (R, B)."""
    letters = log_pi.shape[-1]
    cell = context_index(sequences, letters, memory) * letters + sequences   # (R or 1, B, T)
    cell = cell.expand(len(log_pi), -1, -1)
    return log_pi.flatten(1).gather(1, cell.flatten(1)).view(cell.shape).sum(-1)


# ---- dynamic programming, for any T -------------------------------------------------------------

def occupancies(pi, length, memory):
    """rho[r, c, a] = P(step t is written from context c, letter a), c = (t, last letters).

    pi: (R, C, A) probabilities. One forward pass over the contexts, no sequences listed; it sums
    to T for each row. Returns (R, C, A).
    """
    rows, _, letters = pi.shape
    state, first, rho = pi.new_ones(rows, 1), 0, []
    for t in range(length):
        size = contexts_at(t, letters, memory)
        rho.append(state[:, :, None] * pi[:, first:first + size])            # (R, size, A)
        # forgetting the oldest letter sums over it: it is the leading digit of the context
        state = rho[-1].reshape(rows, -1, contexts_at(t + 1, letters, memory)).sum(1)
        first += size
    return torch.cat(rho, dim=1)


def demonstrator_occupancies(demo, memory):
    """The demonstrator's occupancies of a learner's contexts: (C, A). A style needs no memory."""
    sizes = [contexts_at(t, demo.letters, memory) for t in range(demo.length)]
    step = demo.step.repeat_interleave(torch.tensor(sizes), dim=1)           # (K, C, A)
    return (demo.weights[:, None, None] * occupancies(step, demo.length, memory)).sum(0)


def sft_optimum(demo, memory):
    """The policy of least forward KL, in closed form: pi = rho_beta(c, a) / rho_beta(c), (C, A).

    A context that the demonstrator never visits gets the uniform distribution.
    """
    rho = demonstrator_occupancies(demo, memory)
    visits = rho.sum(-1, keepdim=True)
    return torch.where(visits > 0, rho / visits, 1 / demo.letters)


def nobody_wrote(pi, demo, memory):
    """Mass on sequences that are no style's pattern, for any T: pi (C, A). Returns a float."""
    written = policy_log_prob(pi.log()[None], demo.patterns.unique(dim=0)[None], memory).exp()
    return 1 - written.sum().item()


# ---- exact solutions ----------------------------------------------------------------------------

def policy_from_roots(z, letters):
    """log pi (R, C, A) from parameters z (R, C*A): pi = z^2 / sum z^2 in each context.

    In z = sqrt(pi) the Fisher metric is Euclidean, so that steps in z are natural-gradient steps:
    logits would be flat wherever a letter is rare, and saturate after one large step.
    """
    square = z.view(len(z), -1, letters).square()
    return square.log() - square.sum(-1, keepdim=True).log()


def solve_exactly(demo, memory, divergence, starts, generator):
    """Minimise D_f(beta || pi) over all policies of this memory, from random starts.

    Returns log pi (R, C, A), D_f (R,), and gradient norms (R,), with the best row first.
    """
    contexts = sum(contexts_at(t, demo.letters, memory) for t in range(demo.length))
    shape = starts, contexts * demo.letters
    z = -torch.rand(shape, generator=generator, dtype=torch.float64).log()
    z = z.view(starts, contexts, -1)
    z = (z / z.sum(-1, keepdim=True)).sqrt().view(shape)      # uniform on each context's simplex
    z, value, gradient_norm = solve(
        divergence, demonstrator_log_prob(demo),
        lambda z: sequence_log_prob(policy_from_roots(z, demo.letters), demo.length, memory),
        z, deltas=(0.1, 0.01))
    order = value.argsort()
    return policy_from_roots(z, demo.letters)[order], value[order], gradient_norm[order]


def describe(demo, logp, samples=1000):
    """What a policy writes. logp (N,) -> dict:

    styles     mass on each style's pattern
    precision  their sum: mass on sequences that some style means to write
    recall     the styles, by weight, met at least once in `samples` samples, in expectation
    entropy    nats per sequence
    """
    style = logp[sequence_index(demo.patterns, demo.letters)].exp()
    met = 1 - (samples * torch.log1p(-style.clamp(max=1 - 1e-12))).exp()
    return {"styles": style.tolist(), "precision": style.sum().item(),
            "recall": (demo.weights * met).sum().item(), "entropy": -kl(logp, 0 * logp).item()}


# ---- from samples alone -------------------------------------------------------------------------

def sample_demonstrations(demo, count, generator):
    """Sequences (count, T) written by the demonstrator: a style each, then letter by letter."""
    style = torch.multinomial(demo.weights, count, replacement=True, generator=generator)
    step = demo.step[style].view(-1, demo.letters)                           # (count * T, A)
    return torch.multinomial(step, 1, generator=generator).view(count, demo.length)


def sample_policy(log_pi, count, length, memory, generator):
    """Sequences (R, count, T) rolled out letter by letter from log_pi (R, C, A)."""
    rows, _, letters = log_pi.shape
    pi, context, first = log_pi.detach().exp(), torch.zeros(rows, count, dtype=torch.long), 0
    letters_of = []
    for t in range(length):
        here = pi.gather(1, (first + context)[:, :, None].expand(-1, -1, letters))
        letter = torch.multinomial(here.view(-1, letters), 1, generator=generator)
        letters_of.append(letter.view(rows, count))
        first += contexts_at(t, letters, memory)
        context = (context * letters + letters_of[-1]) % contexts_at(t + 1, letters, memory)
    return torch.stack(letters_of, dim=-1)


def fit_sft(demos, letters, memory, steps=300, rate=0.1):
    """SFT by gradient descent on the negative log-likelihood of demos (B, T): logits (1, C, A)."""
    length = demos.shape[1]
    contexts = sum(contexts_at(t, letters, memory) for t in range(length))
    logits = torch.zeros(1, contexts, letters, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=rate)
    for _ in range(steps):
        loss = -policy_log_prob(logits.log_softmax(-1), demos[None], memory).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach()


def tabular_discriminator(rows, length, letters, generator):
    """One logit per sequence: parameters and a function (R, B, T) sequences -> (R, B) logits."""
    table = torch.zeros(rows, letters ** length, requires_grad=True)
    return [table], lambda y: table.gather(1, sequence_index(y, letters).expand(rows, -1))


def neural_discriminator(rows, length, letters, generator, width=64):
    """A network of one hidden layer over the letters, one per row; as tabular_discriminator."""
    def weights(*shape):
        return (torch.randn(shape, generator=generator) / shape[-2] ** 0.5).requires_grad_()

    first, second = weights(rows, length * letters, width), weights(rows, width, 1)
    bias = torch.zeros(rows, 1, width, requires_grad=True)

    def logits(y):
        one_hot = torch.nn.functional.one_hot(y, letters).flatten(2).float().expand(rows, -1, -1)
        return (torch.relu(one_hot @ first + bias) @ second).squeeze(-1)
    return [first, bias, second], logits


DISCRIMINATORS = {"tabular": (tabular_discriminator, 0.1), "neural": (neural_discriminator, 0.003)}


def train_adversarially(demo, demos, logits, kind, config, generator, memory=0, watch=None):
    """Imitate demos (B, T) under every divergence side by side, one row each, from one policy.

    Each round: roll out every policy, two steps of its discriminator on fresh demonstrations and
    those samples, one policy-gradient step on r(h). Both rates fall linearly to zero. watch(round,
    log_pi) sees the policies before each round. Returns the last log pi (R, C, A).
    """
    make, rate = DISCRIMINATORS[kind]
    logits = logits.repeat(len(DIVERGENCES), 1, 1).requires_grad_()
    parameters, logit = make(len(DIVERGENCES), demo.length, demo.letters, generator)
    judge = torch.optim.Adam(parameters, lr=rate)
    writer = torch.optim.Adam([logits], lr=0.05)
    fall = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.rounds)
            for optimizer in (judge, writer)]
    for step in tqdm(range(config.rounds), desc=kind, disable=None, leave=False):
        if watch:
            watch(step, logits.detach().log_softmax(-1))
        log_pi = logits.log_softmax(-1)
        own = sample_policy(log_pi, config.batch, demo.length, memory, generator)
        for _ in range(2):
            pick = torch.randint(len(demos), (config.batch,), generator=generator)
            judge.zero_grad()
            discriminator_loss(logit(demos[pick][None]), logit(own)).sum().backward()
            judge.step()
        with torch.no_grad():
            h = logit(own)
        logp = policy_log_prob(log_pi, own, memory)
        gain = [policy_surrogate(d, h[i], logp[i], baseline=d.reward(h[i]).mean())
                for i, d in enumerate(DIVERGENCES.values())]
        writer.zero_grad()
        (-torch.stack(gain).sum()).backward()
        writer.step()
        for schedule in fall:
            schedule.step()
    return logits.detach().log_softmax(-1)
