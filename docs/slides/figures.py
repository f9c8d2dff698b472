"""The deck's figures, drawn for a room: large type, few lines, each named where it ends.

`python docs/slides/make.py` draws them all, from docs/results.json and from toy worlds in closed
form; nothing is trained for them. Lines differ in their dashes and markers as well as in colour.
"""

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from divergences import REVERSE_KL                                                  # noqa: E402
from results import mean                                                            # noqa: E402
from toy_envs import heterogeneity, token_mdp                                       # noqa: E402
from utils.evaluate import grouped                                                  # noqa: E402
from utils.plots import COLORS, pyplot                                              # noqa: E402

INK = "#111111"
LINES = {       # reward model: label, line and marker
    "init-sft": ("Init-SFT", "o-"), "init-demo": ("Init-Demo", "s--"),
    "sft-demo": ("SFT-Demo", "v:"),
    "golden": ("knows golden", "-"),
    "likelihood per token": ("likelihood\nper token", "^-.")}


def subplots(*shape, **settings):
    """pyplot's, in the house's style, with type that the last row can read."""
    plt = pyplot()
    plt.rcParams.update({"font.size": 17, "axes.titlesize": 18, "lines.linewidth": 3,
                         "lines.markersize": 9, "axes.labelcolor": INK, "text.color": INK,
                         # The same picture gives the same file: no date, no random names.
                         "svg.hashsalt": "nanoAfD"})
    return plt.subplots(*shape, figsize=settings.pop("figsize", (11, 4.5)), **settings)


def name_line(axis, x, y, label, up=0):
    """A line's name beside its last point, `up` points higher: names shall not overlap."""
    axis.annotate(label, (x[-1], y[-1]), xytext=(10, up), textcoords="offset points", va="center",
                  linespacing=0.95, annotation_clip=False)


# ---- toy worlds ---------------------------------------------------------------------------------

def draw_horizon():
    """Share of what SFT writes that nobody wrote, against the sequences' length."""
    figure, axis = subplots(figsize=(11, 4.8))
    for memory, label, style, color, up in (
            (0, "no memory:\naaa… and bbb…", "o-", "forward_kl", 14),
            (1, "one letter of memory:\naaa… and abcabc…", "s--", "reverse_kl", -26)):
        x, y, _ = zip(*token_mdp.horizon_curve(range(1, 17), memory))
        axis.plot(x, y, style, color=COLORS[color])
        name_line(axis, x, y, label, up)
    axis.set(xlabel="length of the sequence", ylabel="share that nobody wrote", ylim=(-0.03, 1.08),
             xticks=(1, 2, 4, 6, 8, 10, 12, 14, 16))
    return figure


def draw_letters(count=10):
    """What the demonstrator and two memoryless learners write: a sequence a line, in proportion."""
    demo = token_mdp.demonstrator_of(token_mdp.Settings())
    start = token_mdp.starting_points(demo, 0, 1, torch.Generator().manual_seed(0))
    seeking = token_mdp.solve_exactly(demo, REVERSE_KL, start)[0][:1]
    covering = token_mdp.sft_optimum(demo, 0)[None].log()
    figure, axes = subplots(1, 3, figsize=(11, 4.8))
    for axis, title, logp in zip(
            axes, ("demonstrator", "forward KL: SFT", "reverse KL"),
            (token_mdp.demonstrator_log_prob(demo), token_mdp.sequence_log_prob(covering)[0],
             token_mdp.sequence_log_prob(seeking)[0])):
        token_mdp.draw_page(axis, demo, logp, title, count)
        for text in axis.texts:
            text.set_fontsize(19)
            text.set_weight("bold" if text.get_color() == "white" else "normal")
        of = token_mdp.describe(demo, logp)
        axis.set_title(f"{title}\nprecision {of['precision']:.2f}, recall {of['recall']:.2f}",
                       fontsize=19)
    return figure


def draw_plane(n=16):
    """The plane of heterogeneity: three writers, and where best-of-n by each reward model goes."""
    s = heterogeneity.Settings()
    means = heterogeneity.cloud_means(s.quality, s.offset, 0.0)
    figure, axis = subplots(figsize=(11, 5))
    for name, label, (x, y) in (("init", "pi_0", (-1.1, -0.6)), ("sft", "pi_SFT", (1.2, -0.75)),
                                ("demo", "demonstrator", (1.7, 2.35))):
        for radius in (1, 2):
            axis.add_patch(pyplot().Circle(means[name], radius, alpha=0.15, lw=0,
                                           color=COLORS[name]))
        axis.plot(*means[name], "o", color=INK)
        axis.text(x, y, label, size=20, style="italic")
    for reward, (negative, positive, label) in heterogeneity.REWARDS.items():
        shift = heterogeneity.best_of_n_shift(means[positive] - means[negative], n)
        end = means["sft"] + shift
        axis.annotate("", end, means["sft"], arrowprops={
            "arrowstyle": "-|>", "mutation_scale": 26, "color": COLORS[reward], "lw": 4,
            "shrinkA": 0, "shrinkB": 0, "linestyle": LINES[reward][1][1:]})
        side, align = (-12, "right") if reward == "sft-demo" else (10, "left")
        axis.annotate(f"{label}: {shift[0]:+.2f}", end, xytext=(side, 0), size=21, weight="bold",
                      textcoords="offset points", ha=align, va="center")
    axis.set(aspect="equal", xlim=(-2.1, 5.6), ylim=(-1.1, 3.1), xticks=range(-2, 4),
             yticks=range(-1, 4), xlabel="quality: all that golden counts",
             ylabel="the writer's mark")
    return figure


# ---- runs ---------------------------------------------------------------------------------------

def over_n(data, group, name, column, least=1):
    """KL, N and the mean of a column over seeds along best-of-N by one reward model."""
    points = [p for p in data["best_of_n"]
              if p["group"] == group and p["reward_model"] == name and p["n"] >= least]
    by_n = grouped(sorted(points, key=lambda p: p["n"]), "n")
    return [[np.mean([p[key] for p in seeds]) for seeds in by_n.values()]
            for key in ("kl", "n", column)]


def draw_best_of_n(data, group, hidden):
    """Three reward models with marks: the truth, which the first version hides, and the promise."""
    # Both versions have the panels in the same place, so that nothing moves when it is uncovered.
    figure, (left, right) = subplots(1, 2, figsize=(11, 4.6), layout="none", gridspec_kw={
        "left": 0.05, "right": 0.88, "bottom": 0.15, "top": 0.9, "wspace": 0.42})
    for name in ("init-sft", "init-demo", "sft-demo"):
        label, style = LINES[name]
        if not hidden:
            _, n, golden = over_n(data, group, name, "golden")
            left.plot(n, golden, style, color=COLORS[name])
            name_line(left, n, golden, label)
        _, n, proxy = over_n(data, group, name, "proxy")
        rise = np.array(proxy) - proxy[0]
        right.plot(n, rise, style, color=COLORS[name])
        name_line(right, n, rise, label)
    if hidden:
        left.text(0.5, 0.5, "?", transform=left.transAxes, size=120, ha="center", va="center")
        left.set_yticks([])
    else:
        demo = mean(data, group, "demonstrations")
        left.axhline(demo, color=INK, linewidth=1.5, linestyle=(0, (1, 2)))
        left.annotate("demonstrations", (6, demo), xytext=(0, 6), textcoords="offset points")
    for axis, title in ((left, "the truth: golden reward, points"),
                        (right, "what each promises, nats above N = 1")):
        axis.set(xscale="log", xticks=n, xticklabels=[str(int(k)) for k in n], xlim=(0.9, 36),
                 xlabel="N of best-of-N")
        axis.set_title(title, loc="left")
        axis.minorticks_off()
    return figure


def draw_frontier(data):
    """Golden reward at equal KL from pi_SFT: best-of-N by three scores, and temperatures."""
    figure, axes = subplots(1, 2, figsize=(11, 4.9))
    # Where the names would overlap they move up or down, by so many points.
    for axis, group, title, ups in (
            (axes[0], "good-helpful-h0", "good base",
             {"golden": 27, "likelihood per token": 0, "init-sft": -17, "temperature": -18}),
            (axes[1], "idle-helpful-h0", "idle base", {"temperature": 14})):
        for name in ("golden", "init-sft", "likelihood per token"):
            kl, _, golden = over_n(data, group, name, "golden")
            label, style = LINES[name]
            axis.plot(kl, golden, style, color=COLORS[name], markersize=7)
            name_line(axis, kl, golden, label, ups.get(name, 0))
        points = [(mean(data, group, f"temperature, {t}", "kl"),
                   mean(data, group, f"temperature, {t}")) for t in (0.7, 0.5, 0.3)]
        kl, golden = zip((0, mean(data, group, "pi_SFT")), *points)
        axis.plot(kl, golden, "D:", color=INK, markersize=7)
        name_line(axis, kl, golden, "temperature", ups["temperature"])
        demo = mean(data, group, "demonstrations")
        axis.axhline(demo, color=INK, linewidth=1.5, linestyle=(0, (1, 2)))
        # Both panels span as many points, so that a slope means the same in both.
        axis.set(xlabel="KL from pi_SFT, nats", title=title, xlim=(-0.05, 2.6),
                 ylim=(demo - 1, demo + 1.9))
    axes[0].set_ylabel("golden reward, points")
    axes[0].annotate("demonstrations", (1.1, mean(data, "good-helpful-h0", "demonstrations")),
                     xytext=(0, 6), textcoords="offset points")
    return figure


def draw_all(data, folder):
    """Every figure of the deck as an SVG in the folder. data: the content of docs/results.json."""
    marked = "good-helpful-h1"
    for name, figure in {
            "horizon": draw_horizon(), "letters": draw_letters(), "plane": draw_plane(),
            "best_of_n_hidden": draw_best_of_n(data, marked, hidden=True),
            "best_of_n": draw_best_of_n(data, marked, hidden=False),
            "frontier": draw_frontier(data)}.items():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
