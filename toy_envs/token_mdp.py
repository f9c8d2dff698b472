"""Mass-covering against mode-seeking, exactly: a token MDP whose every sequence can be listed.

The demonstrator mixes K styles, each a sharp pattern (aaaaaa, abcabc, ...) with rare slips of a
letter. The learner's memory is limited: it sees the time step and the last `memory` letters. SFT
(forward KL) then averages the styles letter by letter and mostly writes sequences that nobody
wrote; reverse KL writes one style well. Here every divergence is minimised exactly; in
token_samples.py the same learners see samples only.

    python -m toy_envs.token_mdp

Shapes: K styles, T letters in a sequence, A letters in the alphabet, N = A^T sequences,
M = A^memory contexts (the last `memory` letters; before the first, all count as a), R rows (starts
or runs) side by side, B sequences of one row. Sequences and contexts are listed in dictionary
order: the index of one is its letters read as a base-A number.
Log-probabilities and KLs are in nats per sequence.
"""

import itertools
from collections import Counter
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from divergences import DIVERGENCES, f_divergence
from toy_envs.gaussian import solve
from utils.cli import InputError, make_folder, parse_settings, require, run_script, setting
from utils.plots import COLORS, pyplot, write_world

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAX_SEQUENCES = 4 ** 8      # a solve holds some forty numbers per sequence
MEMORIES = {0: "memoryless", 1: "one letter"}


@dataclass
class Settings:
    """Minimise seven divergences exactly, over learners of limited memory."""
    patterns: str = setting("aaaaaa,abcabc,dcdcdc", "the styles' patterns, of one length")
    weights: str = setting("0.5,0.3,0.2", "how often the demonstrator uses each style")
    slip: float = setting(0.02, "probability that a style writes another letter than its pattern's")
    letters: int = setting(4, "size of the alphabet")
    starts: int = setting(2, "random starts of each exact solution, besides one per set of styles")
    seed: int = setting(0, "seed of the random starts", 0, 2 ** 32)
    out: str = setting("out/token_mdp", "folder for results.json and the figures")


# ---- the world: the MDP and its demonstrator ----------------------------------------------------

@dataclass(frozen=True)
class Demonstrator:
    """beta(y) = sum_k weights[k] prod_t step[k, t, y_t]: a mixture of styles, each with slips."""
    patterns: torch.Tensor      # (K, T) letters as integers
    weights: torch.Tensor       # (K,)
    step: torch.Tensor          # (K, T, A) the style's probability of each letter at step t
    length: int                 # T
    letters: int                # A


def make_demonstrator(patterns, weights, slip, letters):
    """The demonstrator of these patterns (strings); InputError for arguments that define none."""
    require(2 <= letters <= len(LETTERS), f"letters must be from 2 to {len(LETTERS)}")
    require(len({len(pattern) for pattern in patterns}) == 1 and patterns[0],
            f"patterns need one common length of at least 1, got {list(patterns)}")
    require(set("".join(patterns)) <= set(LETTERS[:letters]),
            f"patterns use letters that are not in {LETTERS[:letters]}")
    require(len(weights) == len(patterns) and min(weights) > 0 and abs(sum(weights) - 1) < 1e-9,
            f"need one weight > 0 per pattern, summing to one; got {list(weights)}")
    require(0 <= slip < 1, f"slip must be at least 0 and below 1, got {slip}")
    index = torch.tensor([[LETTERS.index(c) for c in pattern] for pattern in patterns])
    meant = torch.nn.functional.one_hot(index, letters).double()
    step = meant * (1 - slip) + (1 - meant) * slip / (letters - 1)
    return Demonstrator(index, torch.tensor(weights, dtype=torch.float64), step, len(patterns[0]),
                        letters)


def demonstrator_of(s):
    """The demonstrator that the settings' comma-separated patterns and weights describe."""
    try:
        weights = [float(w) for w in s.weights.split(",")]
    except ValueError:
        raise InputError(f"--weights must be numbers with commas, got {s.weights}") from None
    require(s.slip > 0, "--slip must be positive: the reverse KL to a demonstrator that never "
                        "slips is infinite")
    require(s.starts >= 1, f"--starts must be at least 1, got {s.starts}")
    demo = make_demonstrator(s.patterns.split(","), weights, s.slip, s.letters)
    check_enumerable(demo.length, demo.letters)
    return demo


def check_enumerable(length, letters):
    """Refuse, before memory is touched, an MDP with more sequences than can be listed."""
    require(1 <= length and letters ** length <= MAX_SEQUENCES,
            f"{letters} letters and {length} steps make {letters}^{length} sequences; from 1 step "
            f"to {MAX_SEQUENCES} sequences can be listed")


def all_sequences(length, letters):
    """Every sequence, in dictionary order: (N, T) integers."""
    check_enumerable(length, letters)
    return torch.cartesian_prod(*[torch.arange(letters)] * length).view(-1, length)


def sequence_index(sequences, letters):
    """The dictionary-order index (...) of sequences (..., T)."""
    powers = letters ** torch.arange(sequences.shape[-1]).flip(0)
    return (sequences * powers).sum(-1)


def sequence_log_prob(log_pi):
    """log pi(y) of every sequence, by extending every prefix with every letter.

    log_pi: (R, T, M, A), log pi(a | t, context). Returns (R, N).
    """
    rows, length, contexts, letters = log_pi.shape
    check_enumerable(length, letters)
    logp = log_pi.new_zeros(rows, 1)
    for t, step in enumerate(log_pi.unbind(1)):                              # (R, M, A)
        size = min(letters ** t, contexts)
        # Prefixes are in dictionary order, so that those that end alike are `size` apart.
        logp = (logp.view(rows, -1, size, 1) + step[:, None, :size]).view(rows, -1)
    return logp


def policy_log_prob(log_pi, sequences):
    """log pi(y) of given sequences, also where T is too large to list all: log_pi (R, T, M, A),
    sequences (R or 1, B, T). Returns (R, B)."""
    rows, _, contexts, letters = log_pi.shape
    row, context, logp = torch.arange(rows)[:, None], torch.zeros_like(sequences[..., 0]), 0.0
    for t, letter in enumerate(sequences.unbind(-1)):
        logp = logp + log_pi[row, t, context, letter]
        context = (context * letters + letter) % contexts
    return logp


def demonstrator_log_prob(demo):
    """log beta(y) of every sequence: (N,)."""
    styles = sequence_log_prob(demo.step.log()[:, :, None])
    return torch.logsumexp(styles + demo.weights.log()[:, None], dim=0)


# ---- the method: dynamic programming, for any T -------------------------------------------------

def occupancies(pi):
    """rho[r, t, c, a] = P(step t is written from context c, letter a), by one pass forwards.

    pi: (R, T, M, A) probabilities. No sequences are listed; each step sums to 1. The same shape.
    """
    rows, _, contexts, letters = pi.shape
    state = torch.eye(contexts, dtype=pi.dtype)[:1].expand(rows, -1)         # (R, M)
    rho = []
    for step in pi.unbind(1):
        rho.append(state[:, :, None] * step)                                 # (R, M, A)
        # To forget the oldest letter is to sum over it; it is the context's leading digit.
        state = rho[-1].reshape(rows, letters, contexts).sum(1)
    return torch.stack(rho, dim=1)


def demonstrator_occupancies(demo, memory):
    """The demonstrator's occupancies of a learner's contexts: (T, M, A). A style needs none."""
    step = demo.step[:, :, None].expand(-1, -1, demo.letters ** memory, -1)
    return torch.einsum("k,ktma->tma", demo.weights, occupancies(step))


def sft_optimum(demo, memory):
    """The policy of least forward KL, in closed form: pi = rho_beta(t, c, a) / rho_beta(t, c).

    A context that the demonstrator never visits gets the uniform distribution. (T, M, A).
    """
    rho = demonstrator_occupancies(demo, memory)
    visits = rho.sum(-1, keepdim=True)
    return torch.where(visits > 0, rho / visits, 1 / demo.letters)


def nobody_wrote(pi, demo):
    """Mass on sequences that are no style's pattern, for any T: pi (T, M, A). Returns a float."""
    # Two styles may share a pattern, which counts once.
    return 1 - policy_log_prob(pi.log()[None], demo.patterns.unique(dim=0)[None]).exp().sum().item()


# ---- the method: exact solutions, by listing every sequence -------------------------------------

def policy_from_roots(z):
    """log pi (R, T, M, A) from parameters z of that shape: pi = z^2 / sum z^2 in each context.

    In z = sqrt(pi) the Fisher metric is Euclidean, so that steps in z are natural-gradient steps:
    logits would be flat wherever a letter is rare, and saturate after one large step.
    """
    square = z.square()
    return square.log() - square.sum(-1, keepdim=True).log()


def starting_points(demo, memory, count, generator):
    """log pi (R, T, M, A): `count` random policies, and the SFT optimum of every set of styles.

    A mode-seeking optimum writes some of the styles; these starts look at each choice of them.
    """
    shape = count, demo.length, demo.letters ** memory, demo.letters
    noise = torch.rand(shape, generator=generator, dtype=torch.float64)
    starts = [noise.log().neg()]                        # normalised: uniform on each simplex
    for chosen in itertools.product([True, False], repeat=len(demo.patterns)):
        if any(chosen):
            weights = demo.weights * torch.tensor(chosen)
            some = replace(demo, weights=weights / weights.sum())
            # No letter starts at probability zero: z^2 is flat there, and would never leave it.
            starts.append(sft_optimum(some, memory)[None] + 1e-3)
    pi = torch.cat(starts)
    return (pi / pi.sum(-1, keepdim=True)).log()


def solve_exactly(demo, divergence, start):
    """Minimise D_f(beta || pi) over all policies of one memory, from log pi (R, T, M, A) each.

    Returns log pi (R, T, M, A), D_f (R,) and gradient norms (R,), the least D_f first. With full
    memory nothing is left to solve: pi = beta, at which every divergence is zero.
    """
    def policy(z):
        return policy_from_roots(z.view(-1, *start.shape[1:]))

    z, value, gradient_norm = solve(
        divergence, demonstrator_log_prob(demo), lambda z: sequence_log_prob(policy(z)),
        (start / 2).exp().flatten(1), deltas=(0.1, 0.01))
    order = value.argsort()
    return policy(z)[order], value[order], gradient_norm[order]


# ---- the experiment -----------------------------------------------------------------------------

def solve_all(demo, starts, seed, memories=tuple(MEMORIES)):
    """{(memory, divergence name): (log pi (R, T, M, A), D_f (R,), gradient norms (R,))}."""
    generator = torch.Generator().manual_seed(seed)
    start = {memory: starting_points(demo, memory, starts, generator) for memory in memories}
    return {(memory, name): solve_exactly(demo, DIVERGENCES[name], start[memory])
            for memory, name in tqdm([*itertools.product(memories, DIVERGENCES)],
                                     desc="exact solutions", disable=None, leave=False)}


def styles_found(demo, log_pi, share=0.1):
    """{"1+3": starts, ...}: which styles, counted from 1, each start ends up writing: those whose
    pattern gets at least `share` of its probability under the demonstrator."""
    mass = policy_log_prob(log_pi, demo.patterns[None]).exp()                # (R, K)
    in_beta = demonstrator_log_prob(demo)[sequence_index(demo.patterns, demo.letters)].exp()
    found = Counter()
    for row in (mass >= share * in_beta).tolist():
        found["+".join(str(k) for k, yes in enumerate(row, 1) if yes) or "none"] += 1
    return dict(found)


def describe(demo, logp, samples=1000):
    """What a policy writes. logp (N,) -> dict:

    styles     mass on each style's pattern
    precision  mass on sequences that some style means to write
    recall     the styles, by weight, met at least once in `samples` samples, in expectation
    entropy    nats per sequence
    """
    style = logp[sequence_index(demo.patterns, demo.letters)].exp()
    meant = logp[sequence_index(demo.patterns.unique(dim=0), demo.letters)].exp().sum()
    met = 1 - (samples * torch.log1p(-style.clamp(max=1 - 1e-12))).exp()
    return {"styles": style.tolist(), "precision": meant.item(),
            "recall": (demo.weights * met).sum().item(),
            "entropy": torch.special.entr(logp.exp()).sum().item()}


def summarise(demo, solutions):
    """The results as plain numbers: for each learner and divergence, the best optimum and how the
    starts spread, and D of every divergence at that optimum (the cross table)."""
    log_beta, rows = demonstrator_log_prob(demo), []
    for (memory, name), (log_pi, value, gradient_norm) in solutions.items():
        logp = sequence_log_prob(log_pi[:1])[0]
        rows.append({"memory": memory, "minimised": name, "value": value[0].item(),
                     "gradient_norm": gradient_norm[0].item(),
                     "found": styles_found(demo, log_pi), **describe(demo, logp),
                     "cross": {other: f_divergence(d, log_beta, logp).item()
                               for other, d in DIVERGENCES.items()}})
    return rows


def horizon_curve(lengths, memory):
    """[(T, share of what SFT writes that nobody wrote, its closed form), ...] without slips.

    memory 0: aaa... against bbb..., which differ at every step: 2 of 2^T mixtures were written.
    memory 1: aaa... against abcabc..., which meet in an a at every third step and part again.
    """
    curve = []
    for length in lengths:
        other = "b" * length if memory == 0 else ("abc" * length)[:length]
        demo = make_demonstrator(["a" * length, other], [0.5, 0.5], 0.0, 3)
        crossings = max(length - 1 if memory == 0 else (length - 2) // 3, 0)
        curve.append((length, nobody_wrote(sft_optimum(demo, memory), demo),
                      1 - 2.0 ** -crossings))
    return curve


# ---- tables and figures -------------------------------------------------------------------------

SHORT = ("rev.KL", "fwd.KL", "J-S", "TV", "Pearson", "Neyman", "Helling.")   # as in DIVERGENCES


def print_tables(s, demo, rows, curves):
    """For each learner: what every solution writes, then every divergence of every solution."""
    own = {"value": 0.0, "found": {}, **describe(demo, demonstrator_log_prob(demo))}
    print("styles: " + ", ".join(f"{k} {name}" for k, name in enumerate(s.patterns.split(","), 1))
          + "\nfound: the styles that a start ends up writing, and how many starts do\n"
          "A learner of full memory can be the demonstrator: every divergence is 0 there.")
    for memory, learner in MEMORIES.items():
        solved = [(DIVERGENCES[r["minimised"]].label, r) for r in rows if r["memory"] == memory]
        print(f"\n{'learner: ' + learner:<20}{'D_f':>7}{'precision':>11}{'recall':>8}{'entropy':>9}"
              "  found")
        for label, row in [("demonstrator", own), *solved]:
            found = " ".join(f"{styles}:{n}" for styles, n in row["found"].items())
            print(f"{label:<20}{row['value']:>7.3f}{row['precision']:>11.3f}"
                  f"{row['recall']:>8.3f}{row['entropy']:>9.3f}  {found}".rstrip())
        print(f"\nevery divergence of every solution ({learner}):")
        print(f"{'minimised':<17}" + "".join(f"{name:>9}" for name in SHORT))
        for label, row in solved:
            print(f"{label:<17}" + "".join(f"{value:>9.3g}" for value in row["cross"].values()))
    print("\nwhat SFT writes that nobody wrote (two styles, by dynamic programming):")
    print(f"{'T':<34}" + "".join(f"{length:>7}" for length, *_ in curves[0][1::4]))
    for memory, styles in ((0, "aaa... and bbb..."), (1, "aaa... and abcabc...")):
        print(f"{MEMORIES[memory] + ', ' + styles:<34}"
              + "".join(f"{share:>7.3f}" for _, share, _ in curves[memory][1::4]))


def typical_sequences(logp, count):
    """`count` sequence indices in proportion to their probabilities, likeliest first, no chance
    involved: one at the middle of each of `count` equal slices of the cumulative distribution.
    Sequences that differ by rounding errors alone are in dictionary order."""
    order = logp.round(decimals=4).argsort(descending=True, stable=True)
    slices = (torch.arange(count, dtype=logp.dtype) + 0.5) / count
    return order[torch.searchsorted(logp[order].exp().cumsum(0), slices).clamp(max=len(logp) - 1)]


def draw_page(axes, demo, logp, title, count=20):
    """What a policy writes, a sequence per line; lines that are no style's pattern are faded."""
    written = typical_sequences(logp, count)
    letters = all_sequences(demo.length, demo.letters)[written]              # (count, T)
    meant = torch.isin(written, sequence_index(demo.patterns, demo.letters))
    axes.imshow(letters, cmap="tab10", vmin=0, vmax=9, aspect="auto",
                alpha=torch.where(meant, 0.9, 0.25)[:, None].expand(letters.shape).numpy())
    for line, row in enumerate(letters.tolist()):
        for t, letter in enumerate(row):
            axes.text(t, line, LETTERS[letter], ha="center", va="center", fontsize=6,
                      color="white" if meant[line] else "black", in_layout=False)
    of = describe(demo, logp)
    axes.set_title(f"{title}\nprecision {of['precision']:.2f}\nrecall {of['recall']:.2f}",
                   fontsize=8)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def draw_pages(demo, solutions):
    """A page for the demonstrator and for every learner's best policy under every divergence."""
    figure, grid = pyplot().subplots(len(MEMORIES), 8, figsize=(11, 6.2))
    for line, (memory, learner) in zip(grid, MEMORIES.items()):
        draw_page(line[0], demo, demonstrator_log_prob(demo),
                  "demonstrator and\nfull-memory learner")
        line[0].set_ylabel(f"learner: {learner}", fontsize=10)
        for axes, (name, divergence) in zip(line[1:], DIVERGENCES.items()):
            logp = sequence_log_prob(solutions[memory, name][0][:1])[0]
            draw_page(axes, demo, logp, divergence.label + "\n")
    figure.suptitle("what each learner writes, by the divergence minimised "
                    "(faded: sequences that no style means to write)", fontsize=10)
    return figure


def draw_horizon(curves):
    """What SFT writes that nobody wrote, against T: measured points over their closed forms."""
    figure, axes = pyplot().subplots(figsize=(5.5, 3.4))
    for memory, label, color, how in (
            (0, "memoryless, aaa… and bbb…: $1-2^{1-T}$", "forward_kl", "default"),
            (1, r"one letter, aaa… and abcabc…: $1-2^{-\lfloor (T-2)/3 \rfloor}$", "pearson_chi2",
             "steps-post")):
        length, measured, closed = zip(*curves[memory])
        axes.plot(length, closed, color=COLORS[color], drawstyle=how)
        axes.plot(length, measured, "o", color=COLORS[color], markersize=4, label=label)
    axes.set(title="what SFT writes that nobody wrote", xlabel="length of the sequence, T",
             ylabel="share of what it writes", ylim=(-0.03, 1.03))
    axes.legend(fontsize=8, loc="lower right")
    return figure


def main(s):
    """Solve for every learner and divergence, print the tables, write results and figures."""
    demo = demonstrator_of(s)
    out = make_folder(s.out)
    solutions = solve_all(demo, s.starts, s.seed)
    rows = summarise(demo, solutions)
    curves = {memory: horizon_curve(range(1, 25), memory) for memory in MEMORIES}
    print_tables(s, demo, rows, curves)
    write_world(out, s, {"demonstrator": describe(demo, demonstrator_log_prob(demo)),
                         "solutions": rows, "nobody_wrote": curves},
                {"token_mdp": draw_pages(demo, solutions),
                 "token_mdp_horizon": draw_horizon(curves)})


if __name__ == "__main__":
    torch.set_num_threads(1)    # The tensors are small: a second thread costs more than it gives.
    run_script(lambda: main(parse_settings(Settings)))
