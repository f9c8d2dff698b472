"""The token MDP from samples alone: SFT by likelihood, the other divergences by adversaries.

token_mdp.py minimises every divergence exactly. Here the memoryless learner sees only
demonstrations and its own roll-outs: a discriminator is trained to tell the two apart, its logit h
stands in for log beta - log pi, and the policy follows the policy gradient of r(h). The exact
divergences, which the learner never sees, are tracked along the way, and each run is compared with
the exact optimum that it ends next to.

    python -m toy_envs.token_samples

Two ways to estimate the policy gradient E_pi[r(h) grad log pi]:
    on-policy       from the policy's roll-outs. A covering divergence then starves: its reward e^h
                    lives on sequences that the policy hardly ever writes, hence hardly ever sees.
    demonstrations  from roll-outs and demonstrations half and half, each sequence weighted with
                    pi / ((beta + pi) / 2) = 2 (1 - D): the discriminator knows this too. Then
                    r e^-h is what must stay bounded, not r.

What came out, over five seeds, in the divergence's unit above the exact optimum: reverse KL,
Jensen-Shannon, total variation and squared Hellinger within 0.015, by either discriminator; forward
KL with demonstrations within 0.005; SFT within 0.001.
    Forward KL and Pearson fail on-policy in every seed, even with the exact log-ratio: the policy
    gives up a style before its reward has been sampled often enough, and never sees it again.
    Pearson with demonstrations ends within 0.05 with the exact log-ratio, 0.1 to 0.4 (of 46) by the
    neural logit, 2 to 50 by the tabular: its reward squares e^h, and with it every error of h.
    Neyman ends within 0.03 by the neural logit, 0.04 by the tabular; 0.5 with the exact log-ratio,
    whose rewards down to -e^13 for what nobody writes leave the optimiser little step for the rest.

Shapes: R runs side by side, B samples of one run, T letters in a sequence, A letters, one context,
N = A^T sequences. Divergences are per sequence, in nats for the KLs.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import embedding
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

from divergences import (DIVERGENCES, FORWARD_KL, PEARSON_CHI2, discriminator_loss, f_divergence,
                         policy_surrogate)
from toy_envs import token_mdp
from toy_envs.token_mdp import (
    all_sequences, demonstrator_log_prob, demonstrator_of, policy_log_prob, sequence_index,
    sequence_log_prob, sft_optimum, solve_all)
from utils.cli import make_folder, parse_settings, require, run_script, setting
from utils.plots import COLORS, pyplot, write_world


@dataclass
class Settings(token_mdp.Settings):
    """Imitate a demonstrator from samples under every divergence, and compare with the truth."""
    demos: int = setting(20000, "demonstrations")
    rounds: int = setting(300, "rounds of discriminator and policy in adversarial training")
    batch: int = setting(640, "samples of each policy per round")
    seed: int = setting(0, "seed of every sample and every network", 0, 2 ** 32)
    out: str = setting("out/token_samples", "folder for results.json and the figures")


# ---- the world: samples -------------------------------------------------------------------------

def draw_letters(p, generator):
    """One letter for each distribution p (..., A), by where a uniform number falls: (...)."""
    uniform = torch.rand(p.shape[:-1] + (1,), generator=generator)
    return (uniform > p.cumsum(-1)[..., :-1]).sum(-1)


def sample_demonstrations(demo, count, generator):
    """Sequences (count, T) written by the demonstrator: a style each, then letter by letter."""
    style = torch.multinomial(demo.weights, count, replacement=True, generator=generator)
    return draw_letters(demo.step[style], generator)


def sample_policy(log_pi, count, generator):
    """Sequences (R, count, T) rolled out from memoryless policies log_pi (R, T, 1, A)."""
    step = log_pi.detach().exp().movedim(1, 0)                               # (T, R, 1, A)
    return draw_letters(step.expand(-1, -1, count, -1), generator).movedim(0, -1)


# ---- the method: SFT ----------------------------------------------------------------------------

def descend(optimizer, loss):
    """One step down the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def fit_sft(demos, letters, steps=300, rate=0.1):
    """SFT by gradient descent on the negative log-likelihood of demos (B, T): logits (1, T, 1, A).

    A memoryless likelihood asks of the demonstrations only how often each letter is at each step.
    """
    frequency = torch.eye(letters)[demos].mean(0)[:, None]                   # (T, 1, A)
    logits = torch.zeros(1, *frequency.shape, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=rate)
    for _ in range(steps):
        descend(optimizer, -(frequency * logits.log_softmax(-1)).sum())
    return logits.detach()


# ---- the method: discriminators -----------------------------------------------------------------

def tabular_discriminator(rows, length, letters, generator):
    """One logit per sequence: parameters and a function (R, B, T) sequences -> (R, B) logits."""
    table = torch.zeros(rows, letters ** length, requires_grad=True)
    return [table], lambda y: table.gather(1, sequence_index(y, letters).expand(rows, -1))


def neural_discriminator(rows, length, letters, generator, width=64):
    """A network of one hidden layer over the letters, one per row; as tabular_discriminator."""
    def weights(*shape):
        return (torch.randn(shape, generator=generator) / shape[-2] ** 0.5).requires_grad_()

    first, second = weights(rows, length * letters, width), weights(rows, width, 1)
    bias, one_hot = torch.zeros(rows, 1, width, requires_grad=True), torch.eye(letters)

    def logit(y):
        letters_seen = embedding(y, one_hot).flatten(2)                      # (R or 1, B, T * A)
        return (torch.relu(letters_seen @ first + bias) @ second).squeeze(-1)
    return [first, bias, second], logit


# How to make one, and the rate of its Adam.
DISCRIMINATORS = {"tabular": (tabular_discriminator, 0.1), "neural": (neural_discriminator, 0.01)}
# The study of accuracy: samples of each side, and how long a discriminator trains on them: longer
# than in the adversarial loop, since here the samples stand still.
SIZES = (1000, 10_000, 100_000, 1_000_000)
RATE_AND_STEPS = {"tabular": (0.3, 1000), "neural": (0.04, 400)}


@dataclass
class Accuracy:
    """How well trained logits know the log-ratio, one run for each number of samples."""
    h: torch.Tensor             # (R, N) logits
    exact: torch.Tensor         # (N,) log beta - log pi
    weights: torch.Tensor       # (N,) (beta + pi) / 2, by which the next two count a sequence
    correlation: list           # (R,)
    error: list                 # (R,) root mean square, in nats


def discriminator_accuracy(demo, log_pi, sizes, kind, generator):
    """Train discriminators on `size` demonstrations and as many samples of log_pi (1, T, 1, A),
    one run per size, and compare their logits with the exact log-ratio: an Accuracy."""
    (make, _), (rate, steps) = DISCRIMINATORS[kind], RATE_AND_STEPS[kind]
    log_beta = demonstrator_log_prob(demo)
    logp = sequence_log_prob(log_pi)[0]
    every = all_sequences(demo.length, demo.letters)[None]                   # (1, N, T)

    def frequencies(log_prob, size):                                         # (N,)
        draws = torch.multinomial(log_prob.exp(), size, replacement=True, generator=generator)
        return draws.bincount(minlength=len(log_prob)) / size
    # A loss over all N sequences, weighted with how often each was drawn, is the samples' loss.
    demo_weights, policy_weights = (
        torch.stack([frequencies(log_prob, size) for size in sizes]).float()
        for log_prob in (log_beta, logp))                                    # (R, N) each
    parameters, logit = make(len(sizes), demo.length, demo.letters, generator)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in tqdm(range(steps), desc=f"{kind} accuracy", disable=None, leave=False):
        h = logit(every)
        descend(optimizer, discriminator_loss(h, h, demo_weights, policy_weights).sum())
        schedule.step()
    h, exact, weights = h.detach().double(), log_beta - logp, (log_beta.exp() + logp.exp()) / 2
    covariance = torch.cov(torch.cat([h, exact[None]]), aweights=weights)    # (R + 1, R + 1)
    spread = covariance.diagonal().sqrt()
    return Accuracy(h, exact, weights,
                    (covariance[:-1, -1] / (spread[:-1] * spread[-1])).tolist(),
                    (weights * (h - exact) ** 2).sum(-1).sqrt().tolist())


# ---- the method: the adversarial loop -----------------------------------------------------------

# The runs of one experiment: each divergence on-policy; those for which missing the demonstrator
# costs infinitely much also with demonstrations.
RUNS = ([(divergence, "on-policy") for divergence in DIVERGENCES.values()]
        + [(FORWARD_KL, "demonstrations"), (PEARSON_CHI2, "demonstrations")])


def policy_loss(runs, h, logp, batch):
    """The sum over runs of minus the surrogate, from (R, 2 batch) sequences: first the policy's
    roll-outs, then demonstrations. h: the discriminator's logits; logp: log pi(y), with gradient.

    The baseline is the weighted mean reward; it shrinks the gradient by 1/batch, which is nothing,
    and takes most of its variance.
    """
    total = 0.0
    for row, (divergence, source) in enumerate(runs):
        weights = torch.sigmoid(-h[row])                     # 1 - D, for a draw from the mixture
        if source == "on-policy":
            weights = (torch.arange(2 * batch) < batch).to(h.dtype)
        weights = weights / weights.sum()                    # E_mixture[2 (1 - D)] is 1
        baseline = (weights * divergence.reward(h[row])).sum()
        total = total - policy_surrogate(divergence, h[row], logp[row], weights, baseline)
    return total


def train_adversarially(demo, demos, logits, kind, s, generator, runs=RUNS):
    """Imitate demos (B, T) in every run side by side, from the policy logits (1, T, 1, A).

    Each round: roll out every policy; two steps of its discriminator on fresh demonstrations and
    those roll-outs; one policy-gradient step. Both rates fall linearly to zero.
    kind: a key of DISCRIMINATORS, or "exact", a control that no learner has: h is the exact
    log-ratio, and what then still goes wrong is the policy gradient's own noise.
    Returns the last log pi (R, T, 1, A), and a stack of those before every tenth round.
    """
    def resample():     # demonstrations, with replacement, as (1, batch, T) for every run
        return demos[torch.randint(len(demos), (s.batch,), generator=generator)][None]

    log_beta, track = demonstrator_log_prob(demo).float(), []
    logits = logits.repeat(len(runs), 1, 1, 1).requires_grad_()
    # A short memory of the gradient's size: chi2 rewards start a millionfold larger than they end.
    optimizers = [torch.optim.Adam([logits], lr=0.05, betas=(0.9, 0.95))]
    if kind != "exact":
        make, rate = DISCRIMINATORS[kind]
        parameters, logit = make(len(runs), demo.length, demo.letters, generator)
        optimizers.append(torch.optim.Adam(parameters, lr=rate))
    schedules = [LinearLR(optimizer, 1.0, 0.0, s.rounds) for optimizer in optimizers]
    for step in tqdm(range(s.rounds), desc=kind, disable=None, leave=False):
        log_pi = logits.log_softmax(-1)
        if step % 10 == 0:
            track.append(log_pi.detach())
        own = sample_policy(log_pi, s.batch, generator)
        for optimizer in 2 * optimizers[1:]:
            descend(optimizer, discriminator_loss(logit(resample()), logit(own)).sum())
        both = torch.cat([own, resample().expand(len(runs), -1, -1)], dim=1)
        logp = policy_log_prob(log_pi, both)
        with torch.no_grad():
            h = (log_beta[sequence_index(both, demo.letters)] - logp if kind == "exact"
                 else logit(both))
        descend(optimizers[0], policy_loss(runs, h, logp, s.batch))
        for schedule in schedules:
            schedule.step()
    return logits.detach().log_softmax(-1), torch.stack(track)


# ---- the experiment -----------------------------------------------------------------------------

def nearest_optimum(logp, optima, values):
    """D_f of the exact optimum that writes most like logp (N,), by total variation.

    optima: (R, N) log-probabilities, values: (R,) their D_f. Returns a float.
    """
    return values[(optima.exp() - logp.exp()).abs().sum(-1).argmin()].item()


def imitate(demo, demos, s, generator):
    """SFT and every adversarial run on the same demonstrations, against their exact optima.

    Returns {(kind, divergence, source): a row of numbers}, and of the adversarial runs also
    {the same: D_f before every tenth round}.
    """
    log_beta, rows, tracks = demonstrator_log_prob(demo), {}, {}
    exact = solve_all(demo, s.starts, s.seed, memories=(0,))

    def add_row(kind, divergence, source, log_pi):                           # (T, 1, A)
        logp = sequence_log_prob(log_pi[None].double())[0]
        value = f_divergence(divergence, log_beta, logp).item()
        optima, values, _ = exact[0, divergence.name]
        optimum = nearest_optimum(logp, sequence_log_prob(optima), values)
        rows[kind, divergence.name, source] = {
            "method": source, "divergence": divergence.name, "logit": kind, "value": value,
            "optimum": optimum, "gap": value - optimum}

    sft = fit_sft(demos, demo.letters)
    add_row("none", FORWARD_KL, "SFT", sft[0].double().log_softmax(-1))
    for kind in ("exact", *DISCRIMINATORS):
        log_pi, track = train_adversarially(demo, demos, sft, kind, s, generator)
        for i, (divergence, source) in enumerate(RUNS):
            add_row(kind, divergence, source, log_pi[i])
            tracks[kind, divergence.name, source] = f_divergence(
                divergence, log_beta, sequence_log_prob(track[:, i].double()))
    return rows, tracks


# ---- tables and figures -------------------------------------------------------------------------

def print_tables(rows, accuracy):
    """How far above its optimum each run ends, and how well the logits know the log-ratio."""
    print("how far above the exact optimum next to it each method ends, in the divergence's\nunit,"
          " by what the policy follows: the exact log-ratio (a control) or a logit\n")
    print(f"{'minimised':<20}{'gradient from':<16}{'optimum':>10}{'exact':>11}{'tabular':>11}"
          f"{'neural':>11}")
    for divergence, source in RUNS:
        cells = [rows[kind, divergence.name, source] for kind in ("exact", *DISCRIMINATORS)]
        print(f"{divergence.label:<20}{source:<16}{cells[-1]['optimum']:>10.5g}"
              + "".join(f"{cell['gap']:>11.2g}" for cell in cells))
    sft = rows["none", "forward_kl", "SFT"]
    print(f"{'forward KL':<20}{'SFT':<16}{sft['optimum']:>10.5g}{sft['gap']:>11.2g}")
    print("\nlogit against exact log-ratio, SFT's policy: correlation (rms error, nats)\n")
    print(f"{'samples of each':<17}" + "".join(f"{size:>15,}" for size in SIZES))
    for kind, of in accuracy.items():
        print(f"{kind:<17}" + "".join(f"{correlation:>7.4f} ({error:5.2f})"
                                      for correlation, error in zip(of.correlation, of.error)))


def draw_training(rows, tracks):
    """The distance from the exact optimum along training, one panel per source of h."""
    figure, panels = pyplot().subplots(1, 3, figsize=(11, 3.8), sharey=True)
    for axes, kind, title in zip(panels, ("exact", *DISCRIMINATORS), (
            "exact log-ratio (control)", "tabular discriminator", "neural discriminator")):
        for divergence, source in RUNS:
            run = kind, divergence.name, source
            above = (tracks[run] - rows[run]["optimum"]).clamp(min=1e-5)
            label, style = divergence.label, "-"
            if source == "demonstrations":
                label, style = f"{label} + demonstrations", "--"
            axes.plot(range(0, 10 * len(above), 10), above, color=COLORS[divergence.name],
                      linestyle=style, label=label)
        axes.axhline(0.02, color="#999999", linewidth=0.8, label="0.02")
        axes.set(title=title, xlabel="round", yscale="log", ylim=(1e-4, 1e5))
    panels[0].set_ylabel("D_f above the exact optimum")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def draw_accuracy(accuracy):
    """Left: the neural logit against the truth at the most samples. Right: error by samples."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(8.5, 3.6))
    neural = accuracy["neural"]
    ends = [neural.exact.min(), neural.exact.max()]
    left.plot(ends, ends, color="#999999", linewidth=0.8)
    left.scatter(neural.exact, neural.h[-1], s=2 + 300 * neural.weights, alpha=0.5, linewidth=0,
                 color=COLORS["init-sft"])
    left.set(title=f"neural logit, {SIZES[-1]:,} samples of each", ylabel="logit, nats",
             xlabel="exact log beta - log pi, nats (area: probability)")
    for kind, color in zip(DISCRIMINATORS, ("init-demo", "init-sft")):
        right.plot(SIZES, accuracy[kind].error, "o-", color=COLORS[color], label=kind)
    right.set(title="error of the logit", xlabel="samples of each", xscale="log", yscale="log",
              ylabel="rms error, nats")
    right.legend()
    return figure


def main(s):
    """Imitate by every method, print the tables, write results and figures."""
    require(min(s.demos, s.rounds, s.batch) >= 1,
            "--demos, --rounds and --batch must be at least 1")
    demo = demonstrator_of(s)
    out = make_folder(s.out)
    generator = torch.Generator().manual_seed(s.seed)
    demos = sample_demonstrations(demo, s.demos, generator)
    rows, tracks = imitate(demo, demos, s, generator)
    policy = sft_optimum(demo, memory=0).log()[None]
    accuracy = {kind: discriminator_accuracy(demo, policy, SIZES, kind, generator)
                for kind in DISCRIMINATORS}
    print_tables(rows, accuracy)
    write_world(out, s, {"methods": list(rows.values()), "accuracy": {
        kind: {"samples": SIZES, "correlation": of.correlation, "error": of.error}
        for kind, of in accuracy.items()}}, {"token_samples": draw_training(rows, tracks),
                                             "token_discriminator": draw_accuracy(accuracy)})


if __name__ == "__main__":
    torch.set_num_threads(1)    # The tensors are small: a second thread costs more than it gives.
    run_script(lambda: main(parse_settings(Settings)))
