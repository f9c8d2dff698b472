"""Which negatives, which positives: why Init-SFT, in one picture of the plane.

A response is a point z = (quality, mark): how good it is, which the golden reward reads off, and
who wrote it, which golden ignores. Three writers are Gaussian clouds, of unit spread:

    pi_0 ~ N((0, 0), I)    pi_SFT ~ N((1, leak m), I)    demonstrator ~ N((q, m), I)

The demonstrator writes better than pi_SFT (q > 1) and bears a mark of its own, m away, of which the
policy can learn to produce the share `leak`: by default none.

The optimal logit between two clouds is linear, w.z + b with w = mu_1 - mu_0 (Fisher's discriminant;
mu_1 the positives). Best-of-N by w.z then moves pi_SFT's mean along w:

    Init-SFT  (1, leak m)      Init-Demo  (q, m)      SFT-Demo  (q - 1, (1 - leak) m)

Each goes equally far; what counts is how much of the way is quality. pi_SFT shows no mark that it
cannot produce, so Init-SFT does not look for it. Init-Demo does, by m against q, and SFT-Demo by m
against the little quality that is left between pi_SFT and the demonstrator. Init-SFT's advantage
ends where SFT does learn the mark: at leak = 1/q all three directions are the same, and beyond it
their order is reversed (at leak = 1 SFT-Demo's (q - 1, 0) is quality alone).
Left out here: many dimensions and few samples, where noise in w also favours the wider contrast.

Run `python -m toy_envs.heterogeneity`. Shapes: B any leading batch (seeds, cases), K samples,
N candidates; a point's coordinates (quality, mark) come last. float64 throughout.
Reward models: arXiv:2405.15624; the plane is ours.
"""

import math
from dataclasses import dataclass

import torch

from utils.cli import make_folder, parse_settings, require, run_script, setting
from utils.evaluate import mean_ci
from utils.plots import COLORS, pyplot, write_world

REWARDS = {     # name: negatives (label 0), positives (label 1), the figure's label
    "init-sft": ("init", "sft", "Init-SFT"),
    "init-demo": ("init", "demo", "Init-Demo"),
    "sft-demo": ("sft", "demo", "SFT-Demo"),
}
OFFSETS = torch.linspace(0, 3, 7, dtype=torch.float64)
LEAKS = torch.linspace(0, 1, 6, dtype=torch.float64)
MAX_ENTRIES = 20_000_000  # of the largest array; a run holds about four of its size


@dataclass
class Settings:
    """Directions of Init-SFT, Init-Demo and SFT-Demo, and what best-of-N gains by each."""
    seed: int = setting(0, "seed of all samples", 0, 2 ** 32)
    seeds: int = setting(20, "independent runs (the intervals are over these)")
    samples: int = setting(2000, "training samples from each cloud")
    prompts: int = setting(500, "best-of-N selections that a mean is taken over, per run")
    n: int = setting(16, "candidates in best-of-N")
    quality: float = setting(1.5, "the demonstrator's mean quality; pi_0 has 0, pi_SFT 1")
    offset: float = setting(2.0, "the demonstrator's mark in the picture and in the sweep of leaks")
    out: str = setting("out/heterogeneity", "folder for heterogeneity.png and results.json")


# ---- the world, and closed forms ----------------------------------------------------------------

def cloud_means(quality, offset, leak):
    """The three means (B, 2), by name; offset and leak broadcast to B."""
    offset, leak = torch.broadcast_tensors(torch.as_tensor(offset), torch.as_tensor(leak))
    zero = torch.zeros_like(offset, dtype=torch.float64)
    return {"init": torch.stack([zero, zero], -1),
            "sft": torch.stack([zero + 1, leak * offset], -1),
            "demo": torch.stack([zero + quality, zero + offset], -1)}


def expected_maximum(n):
    """E[max of n standard normals] = integral of x n phi(x) Phi(x)^(n-1), by the trapezoid rule."""
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    log_density = math.log(n) - x ** 2 / 2 - math.log(2 * math.pi) / 2
    log_density = log_density + (n - 1) * torch.special.log_ndtr(x)
    return torch.trapezoid(x * log_density.exp(), x).item()


def best_of_n_shift(w, n):
    """E[z of the best of n by w.z] - E[z] = E[max of n] w / |w|, for z ~ N(., I): w (B, 2) -> same.

    The score w.z is normal, so its best is E[max] of its own spread |w| up; across w, z is free.
    """
    return expected_maximum(n) * w / w.norm(dim=-1, keepdim=True)


# ---- the method, from samples -------------------------------------------------------------------

def logistic_regression(negatives, positives, width=10.0, iterations=20):
    """Weights (B, 3) of the discriminator's logit on (1, quality, mark), by Newton's method.

    Minimises the mean of softplus(-logit) over positives and of softplus(logit) over negatives,
    (B, K, 2) each, summed over K. A normal prior of the given width on each weight keeps them
    finite should the samples be separable, and is outweighed where thousands of them overlap.
    """
    z = torch.cat([negatives, positives], -2)
    X = torch.cat([torch.ones_like(z[..., :1]), z], -1)                      # (B, 2K, 3)
    label = (torch.arange(X.shape[-2]) >= negatives.shape[-2]).double()
    ridge = torch.eye(3, dtype=X.dtype) / width ** 2
    w = torch.zeros(*X.shape[:-2], 3, dtype=X.dtype)
    for _ in range(iterations):
        p = torch.sigmoid((X @ w[..., None])[..., 0])
        gradient = ((p - label)[..., None] * X).sum(-2) + w @ ridge
        hessian = X.mT @ ((p * (1 - p))[..., None] * X) + ridge
        w = w - torch.linalg.solve(hessian, gradient[..., None])[..., 0]
    return w


def best_of_n(candidates, w):
    """Of each N candidates (B, K, N, 2) the one of the highest w.z, w (B, 2): (B, K, 2)."""
    best = (candidates @ w[..., None, :, None])[..., 0].argmax(-1)           # (B, K)
    return candidates.take_along_dim(best[..., None, None], dim=-2)[..., 0, :]


# ---- the experiment -----------------------------------------------------------------------------

def check(s):
    """Raises InputError where a setting makes no sense or would ask for too much memory."""
    require(s.seeds >= 2, f"--seeds {s.seeds}: an interval needs at least 2")
    require(s.samples >= 10, f"--samples {s.samples}: a discriminator needs at least 10")
    require(min(s.prompts, s.n) >= 1, "--prompts and --n must be at least 1")
    require(0 < s.quality <= 10 and s.quality != 1, f"--quality {s.quality}: above 0, at most 10, "
            "and not 1 (SFT-Demo would have nothing to tell apart without a mark)")
    require(abs(s.offset) <= 10, f"--offset {s.offset}: between -10 and 10 spreads")
    # Logistic regression holds (1, quality, mark) of every sample of two clouds.
    entries = 3 * s.seeds * len(OFFSETS) * max(s.prompts * s.n, 2 * s.samples)
    require(entries <= MAX_ENTRIES, "--seeds, --samples, --prompts and --n together ask for arrays "
                                    f"of {entries:,} entries; the limit is {MAX_ENTRIES:,}")


def sweep(s, offset, leak):
    """Best-of-N by all three rewards over cases (offset and leak broadcast), trained and exact.

    Returns {reward: {"golden", "mark": means of the chosen (seeds, cases); "exact": golden by the
    closed form (cases)}}. All sweeps draw the same noise, so that cases compare in pairs.
    """
    generator = torch.Generator().manual_seed(s.seed)
    means = cloud_means(s.quality, offset, leak)

    def draw_from(name, *shape):
        noise = torch.randn(s.seeds, 1, *shape, 2, generator=generator, dtype=torch.float64)
        return means[name].reshape(-1, *[1] * len(shape), 2) + noise

    samples = {name: draw_from(name, s.samples) for name in means}
    candidates = draw_from("sft", s.prompts, s.n)
    results = {}
    for reward, (negative, positive, _) in REWARDS.items():
        # The bias adds the same to every candidate's score, and so changes no choice.
        w = logistic_regression(samples[negative], samples[positive])[..., 1:]
        golden, mark = best_of_n(candidates, w).mean(-2).unbind(-1)
        exact = means["sft"] + best_of_n_shift(means[positive] - means[negative], s.n)
        results[reward] = {"golden": golden, "mark": mark, "exact": exact[:, 0]}
    return results


def summarise(results):
    """A sweep as lists, [means, half-widths of their 95% intervals] where it was trained."""
    def intervals(values):                                                   # (seeds, cases)
        return [list(row) for row in zip(*(mean_ci(of_case) for of_case in values.T))]
    return {reward: {"exact": of["exact"].tolist(), "golden": intervals(of["golden"]),
                     "mark": intervals(of["mark"])} for reward, of in results.items()}


# ---- tables and figure --------------------------------------------------------------------------

def print_tables(s, tables):
    """Golden reward of best-of-N by reward model (rows) and case (columns), exact and trained."""
    print(f"mean quality of best-of-{s.n}: exact, trained, and the 95% half-width of trained\n"
          f"(pi_SFT has 1, the demonstrator {s.quality:g}, best-of-{s.n} by golden itself "
          f"{1 + expected_maximum(s.n):.2f})")
    for title, cases, results in tables:
        print("\n" + f"{title:16}" + "".join(f"{case:7.1f}" for case in cases))
        for reward, (_, _, label) in REWARDS.items():
            mean, half = results[reward]["golden"]
            for name, row in ((label, results[reward]["exact"]), ("  trained", mean),
                              ("  ±", half)):
                print(f"{name:16}" + "".join(f"{value:7.2f}" for value in row))


def draw_plane(ax, s):
    """The clouds, as discs of one and two spreads, and from pi_SFT the way that best-of-N takes by
    each reward."""
    means, generator = cloud_means(s.quality, s.offset, 0.0), torch.Generator().manual_seed(s.seed)
    for name, label, place in (("init", r"$\pi_0$", (-1.7, -1.3)),
                               ("sft", r"$\pi_{SFT}$", (0.5, -1.6)),
                               ("demo", "demonstrator", (-1.2, 1.7))):
        for radius in (1, 2):
            ax.add_patch(pyplot().Circle(means[name], radius, alpha=0.13, lw=0, color=COLORS[name]))
        ax.plot(*means[name], "o", color=COLORS[name], ms=6)
        ax.text(*(means[name] + torch.tensor(place)), label, color=COLORS[name], weight="bold",
                size=13)
    for reward, (negative, positive, label) in REWARDS.items():
        w, color = means[positive] - means[negative], COLORS[reward]
        candidates = means["sft"] + torch.randn(120, s.n, 2, generator=generator,
                                                dtype=torch.float64)
        ax.plot(*best_of_n(candidates, w).T, ".", color=color, ms=3, alpha=0.6)
        end = means["sft"] + best_of_n_shift(w, s.n)
        ax.annotate("", end, means["sft"], arrowprops={
            "arrowstyle": "-|>", "mutation_scale": 18, "color": color, "lw": 3,
            "shrinkA": 0, "shrinkB": 0})
        side, align = (-8, "right") if reward == "sft-demo" else (8, "left")
        ax.annotate(f"{label}: {end[0]:.2f}", end, xytext=(side, 4), size=11, ha=align,
                    textcoords="offset points", color=color, weight="bold",
                    bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1})
    ax.set(aspect="equal", xlabel="quality (all that golden counts)", ylabel="the writer's mark",
           xlim=(-2.2, 5.2), title=f"the best of {s.n} samples of $\\pi_{{SFT}}$, by reward model\n"
           "(dots: chosen; arrow and number: their mean, its quality)")


def draw(s, by_offset, by_leak):
    """The figure: the plane, and golden quality against the mark's offset and against the leak."""
    figure, axes = pyplot().subplot_mosaic(
        [["plane", "above"], ["plane", "below"]], figsize=(10, 5.4), width_ratios=(1.15, 1))
    draw_plane(axes["plane"], s)
    above, below = axes["above"], axes["below"]
    for ax, cases, results in ((above, OFFSETS, by_offset), (below, LEAKS, by_leak)):
        for reward, (_, _, label) in REWARDS.items():
            ax.plot(cases, results[reward]["exact"], color=COLORS[reward], label=label)
            ax.errorbar(cases, *results[reward]["golden"], color=COLORS[reward], fmt="o", ms=4)
        for height, name, label in ((s.quality, "demo", "demonstrator's mean"),
                                    (1, "sft", r"$\pi_{SFT}$'s mean")):
            ax.axhline(height, color=COLORS[name], lw=1, alpha=0.5)
            if ax is above:
                ax.annotate(label, (0, height), xytext=(0, 2), textcoords="offset points", size=8,
                            color=COLORS[name])
        ax.set_ylabel(f"quality of best-of-{s.n}")
    below.legend()
    above.set(xlabel="offset of the demonstrator's mark (lines: exact, points: trained)",
              title="a foreign demonstrator misleads all but Init-SFT")
    below.set(xlabel=f"share of the mark that $\\pi_{{SFT}}$ learns (offset {s.offset:g})",
              title="... unless SFT learns the mark as well")
    return figure


def main(s):
    """Run the two sweeps, print the tables, write heterogeneity.png and results.json."""
    check(s)
    out = make_folder(s.out)
    sweeps = {"by_offset": summarise(sweep(s, OFFSETS, 0.0)),
              "by_leak": summarise(sweep(s, s.offset, LEAKS))}
    print_tables(s, zip(("mark's offset", "mark learned"), (OFFSETS, LEAKS), sweeps.values()))
    print(f"\n± is a 95% interval over {s.seeds} runs")
    results = {"offsets": OFFSETS.tolist(), "leaks": LEAKS.tolist(), **sweeps}
    write_world(out, s, results, {"heterogeneity": draw(s, **sweeps)})


if __name__ == "__main__":
    torch.set_num_threads(1)    # The tensors are small: a second thread costs more than it gives.
    run_script(lambda: main(parse_settings(Settings)))
