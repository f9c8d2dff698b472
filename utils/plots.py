"""Figures in one style: a name has the same colour in every picture of the project.

The palette is Okabe and Ito's, which the colour-blind can tell apart and which stays legible in
grey. matplotlib is an extra: it is imported when the first figure is drawn, not before. So is what
only a run of afd.py needs, because small worlds draw figures too.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from utils.cli import write_aside, write_json

COLORS = {
    # reward models
    "init-sft": "#0072B2", "init-demo": "#E69F00", "sft-demo": "#D55E00",
    "preference": "#009E73", "log-ratio": "#56B4E9", "floored": "#882255",
    # controls and policies
    "golden": "#000000", "length": "#CC79A7", "random": "#999999",
    "likelihood": "#8C6D31", "likelihood per token": "#B5A642",
    "init": "#999999", "sft": "#0072B2", "demo": "#E69F00",
    # divergences
    "reverse_kl": "#D55E00", "forward_kl": "#0072B2", "jensen_shannon": "#009E73",
    "total_variation": "#CC79A7", "pearson_chi2": "#56B4E9", "neyman_chi2": "#E69F00",
    "squared_hellinger": "#000000",
}
CONTROLS = ("likelihood", "likelihood per token", "length", "random", "golden")   # dashed lines
TRUTH = "golden reward (the truth), points"


def pyplot():
    """matplotlib.pyplot with the project's style and a file-only backend.

    Raises ImportError, with the command that mends it, where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "figure.dpi": 130, "savefig.dpi": 130, "font.size": 9, "axes.titlesize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "legend.frameon": False, "figure.constrained_layout.use": True,
    })
    return plt


def save_figure(figure, path):
    """Write the figure and close it; returns its path. Raises InputError where it can't be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda part: figure.savefig(part, format=path.suffix[1:]))
    pyplot().close(figure)
    return path


def write_world(out, settings, results, figures):
    """A toy world's results.json, its settings first, and {name: figure} as name.png: in out."""
    write_json(out / "results.json", {"settings": asdict(settings), **results})
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    print(f"\nwritten to {out}: results.json, " + ", ".join(f"{name}.png" for name in figures))


# ---- a run of afd.py ----------------------------------------------------------------------------

def draw_run(out, results):
    """Draw best_of_n.png and reward_models.png of a run's results into out; returns their paths."""
    from utils.evaluate import over_seeds
    title = TRUTH
    if results["golden"]:
        title = "golden reward (a trained model's), log-odds"
    elif results["settings"]["demos"]:
        title = "golden reward (by --gold), points"
    demo, *_ = over_seeds([row for row in results["rows"] if row["name"] == "demonstrations"],
                          "golden")
    paths = [draw_best_of_n(results["best_of_n"], demo, Path(out) / "best_of_n.png", title),
             draw_reward_models(results["reward_models"], Path(out) / "reward_models.png")]
    return [path for path in paths if path]


def draw_best_of_n(curve, demo, path, title=TRUTH):
    """Golden reward against N beside the proxy's own view of it, one line a selector.

    curve: results["best_of_n"]. demo: golden reward of the demonstrations; None where nobody knows
    golden, and then that panel is left out.
    """
    from utils.evaluate import grouped
    panels = [("proxy", "rise of the proxy reward, nats")]
    if demo is not None:
        panels.insert(0, ("golden", title))
    figure, axes = pyplot().subplots(1, len(panels), figsize=(1 + 4 * len(panels), 3.8),
                                     squeeze=False)
    for name, points in grouped(curve, "reward_model").items():
        for axis, (column, _) in zip(axes[0], panels):
            # Golden's proxy is golden itself; length and chance have none in nats.
            if column == "golden" or name not in CONTROLS:
                draw_line(axis, name, points, column)
    if demo is not None:
        axes[0, 0].axhline(demo, color="#555555", linewidth=1, linestyle=":",
                           label="demonstrations")
    ns = sorted({point["n"] for point in curve})
    for axis, (_, title) in zip(axes[0], panels):
        axis.set(xscale="log", xlabel="N of best-of-N", title=title, xticks=ns,
                 xticklabels=[str(n) for n in ns])
        axis.minorticks_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return save_figure(figure, path)


def draw_line(axis, name, points, column):
    """One selector's column against n: mean over seeds, with its 95% band from two seeds on."""
    from utils.evaluate import grouped, mean_ci
    by_n = grouped(sorted(points, key=lambda point: (point["n"], point["seed"])), "n")
    values = np.array([[point[column] for point in group] for group in by_n.values()], float).T
    if np.isnan(values).any():          # e.g. a log-ratio that is -inf - (-inf): no line to draw
        return
    if column == "proxy":               # each proxy has a scale of its own: its rise from n = 1
        values = values - values[:, :1]
    mean = values.mean(axis=0)
    axis.plot(list(by_n), mean, marker="o", markersize=3, color=COLORS[name], label=name,
              linestyle="--" if name in CONTROLS else "-")
    if len(values) > 1:
        half = np.array([mean_ci(column)[1] for column in values.T])
        axis.fill_between(list(by_n), mean - half, mean + half, color=COLORS[name], alpha=0.15,
                          linewidth=0)


def draw_reward_models(records, path):
    """What each reward model learned: a panel for each of these of which anything is known."""
    from utils.evaluate import grouped, over_seeds
    panels = [(column, title) for column, title in (
        ("corr_golden", "rank correlation with golden"),
        ("corr_length", "rank correlation with length"),
        ("marks_worth", "worth of the marks, sd of scores"),
        ("human_agreement", "agreement with people on pairs"))
        if any(record[column] for record in records)]
    if not panels:      # own data with neither golden nor pairs may leave nothing to show
        return None
    figure, axes = pyplot().subplots(1, len(panels), figsize=(3 * len(panels), 2.6), sharey=True,
                                     squeeze=False)
    models = grouped(records[::-1], "reward_model")     # bars are drawn from the bottom up
    for axis, (column, title) in zip(axes[0], panels):
        chance = 0.5 if column == "human_agreement" else 0
        for i, (name, mine) in enumerate(models.items()):
            mean, low, high = over_seeds(mine, column)
            if mean is None:
                axis.text(chance, i, " not defined", va="center", fontsize=7, color="#555555")
            else:
                # rounding may put the end of an interval on the wrong side of its mean
                error = np.maximum([[mean - low], [high - mean]], 0)
                axis.barh(i, mean - chance, left=chance, color=COLORS[name],
                          xerr=None if np.isnan(error).any() else error)
        axis.axvline(chance, color="black", linewidth=0.8)
        axis.set(title=title, yticks=range(len(models)), yticklabels=list(models))
    return save_figure(figure, path)
