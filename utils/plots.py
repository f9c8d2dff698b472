"""Figures and tables in one style: a name has the same colour in every picture of the project.

The palette is Okabe and Ito's, which the colour-blind can tell apart and which stays legible in
grey. matplotlib is an extra: it is imported when the first figure is drawn, not before.
"""

import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np

from model import write_json
from reward import CONTROLS, REWARD_MODELS, mean_ci
from utils.evaluate import WRITERS, judge_note, name_of

COLORS = {
    # reward models
    "init-sft": "#0072B2", "init-demo": "#E69F00", "sft-demo": "#D55E00",
    "preference": "#009E73", "log-ratio": "#56B4E9", "floored": "#882255",
    # controls and policies
    "golden": "#000000", "length": "#CC79A7", "random": "#999999",
    "init": "#999999", "sft": "#0072B2", "demo": "#E69F00",
    # divergences
    "reverse_kl": "#D55E00", "forward_kl": "#0072B2", "jensen_shannon": "#009E73",
    "total_variation": "#CC79A7", "pearson_chi2": "#56B4E9", "neyman_chi2": "#E69F00",
    "squared_hellinger": "#000000",
}
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
    """Write the figure beside its place and rename it, so that no half picture is ever seen."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    figure.savefig(aside, format=path.suffix[1:])
    aside.replace(path)
    pyplot().close(figure)
    return path


def write_world(out, settings, results, figures):
    """A toy world's results.json, its settings first, and {name: figure} as name.png: in out."""
    write_json(out / "results.json", {"settings": asdict(settings), **results})
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    print(f"\nwritten to {out}: results.json, " + ", ".join(f"{name}.png" for name in figures))


# ---- a run of afd.py: tables and figures --------------------------------------------------------

def number(value, form="{:.2f}"):
    return "-" if value is None or value != value else form.format(value)


def over_seeds(records, key):
    """Mean of one column over seeds, or None where the column is empty."""
    values = [r[key] for r in records if r[key] is not None]
    return float(np.mean(values)) if values else None


def interval(records, key, within):
    """95% half-width: over seeds, or from one seed its own over prompts or pairs."""
    if len(records) == 1:
        return records[0][within]
    values = [r[key] for r in records if r[key] is not None]
    return mean_ci(values)[1] if values else None


def by_writer(rows, n):
    """{(method, name): its rows, one a seed}, in the table's order; best-of-N at N = n."""
    found = {}
    for row in rows:
        if row["n"] == (n if row["method"] == "bon" else 1):
            found.setdefault((row["method"], name_of(row)), []).append(row)
    return found


def by_model(records):
    """{reward model: its records, one a seed}, in the table's order."""
    found = {}
    for record in records:
        found.setdefault(record["reward_model"], []).append(record)
    return found


def agreement(records):
    """(mean, 95% half-width) of how often a reward model agrees with people on held-out pairs."""
    return (over_seeds(records, "human_agreement"),
            interval(records, "human_agreement", "human_ci95"))


def print_table(rows, n, summary=None, gold=None):
    """The final table, means over seeds: golden reward beside every proxy; then, of what
    truth.summarise found, whether it worked. gold: of what judge."""
    over = "seeds" if len({r["seed"] for r in rows}) > 1 else "prompts"
    if gold:
        print("\n" + textwrap.fill(judge_note(gold), 78, break_long_words=False))
    unit = "log-odds" if gold else "points"
    print(f"\ngolden reward in {unit} +- 95% over {over}; bon: best-of-N at N = {n}; in nats:\n"
          "KL(pi|SFT), rev KL(pi|demonstrator), fwd KL(demonstrator|pi), H entropy")
    columns = (("proxy_mean", "proxy", "6.1f"), ("win_vs_sft", "w/SFT", "6.2f"),
               ("win_vs_demo", "w/demo", "7.2f"), ("kl_from_sft", "KL", "6.1f"),
               ("reverse_kl", "rev", "5.0f"), ("forward_kl", "fwd", "6.1f"),
               ("entropy", "H", "6.1f"), ("length_mean", "len", "4.0f"))
    print(f"{'':24}{'golden':>11}" + "".join(f"{title:>{form[0]}}" for _, title, form in columns))
    for (method, name), mine in by_writer(rows, n).items():
        label = WRITERS.get(method, f"  {'bon ' if method == 'bon' else ''}{name}")
        label = label.replace("closed-form", "closed")[:23]
        gold = number(over_seeds(mine, "gold_mean"))
        half = number(interval(mine, "gold_mean", "gold_ci95"))
        cells = [(over_seeds(mine, key), form) for key, _, form in columns]
        print(f"{label:24}{gold:>5}+-{half:>4}" + "".join(
            f"{number(value, '{:.' + form[2:] + '}'):>{form[0]}}" for value, form in cells))
    methods = summary["methods"] if summary else {}
    first = next((name for name in REWARD_MODELS if name in methods), None)
    if first and "demo" in methods:
        gold = {name: method["gold"][0] for name, method in methods.items()}
        share = methods[first]["share_of_golden_gain"][0]
        print(f"\nbest of {n} by {first}: {gold[first] - gold['sft']:+.2f} {unit} over pi_SFT, "
              f"{gold[first] - gold['demo']:+.2f} over the demonstrations,\n{share:.0%} of what a "
              "selector that knows golden gains over pi_SFT")


def print_reward_models(records):
    """What each reward model learned, means over seeds."""
    print("\nwhat the reward models learned: accuracy and calibration error on held-out pairs; rank"
          "\ncorrelation with golden reward and length; worth of the marks in sd of scores")
    people = any(r["human_pairs"] for r in records)
    print(f"{'':18}{'accuracy':>9}{'calib.':>8}{'golden':>8}{'length':>8}{'marks':>8}"
          + (f"{'agrees with people':>20}" if people else ""))
    for name, mine in by_model(records).items():
        columns = [(number(over_seeds(mine, key)), width)
                   for key, width in (("accuracy", 9), ("calibration_error", 8), ("corr_golden", 8),
                                      ("corr_length", 8), ("marks_worth", 8))]
        if people:
            mean, half = (number(value, "{:.3f}") for value in agreement(mine))
            columns.append((f"{mean} +- {half}", 20))
        print(f"  {name:16}" + "".join(f"{text:>{width}}" for text, width in columns))


def print_samples(samples, count=3):
    print("\nsamples side by side: golden / the first reward model's score")
    for sample in samples[:count]:
        prompt = sample["prompt"].strip()
        print("\n" + textwrap.fill(repr(prompt if len(prompt) < 200 else "..." + prompt[-200:]), 78,
                                   initial_indent="  ", subsequent_indent="    "))
        for name, said in sample["writers"].items():
            golden, proxy = (number(said[key], "{:+.1f}") for key in ("golden", "proxy"))
            head = f"    {name:14}{golden:>5} / {proxy:>5}  "
            print(textwrap.fill(" ".join(said["text"].split()), 78, initial_indent=head,
                                subsequent_indent=" " * len(head)) or head.rstrip())
    print()


def by_seed(rows, model, key):
    """Values of one selector's rows, (seeds, N's), and its N's."""
    mine = [r for r in rows if r["reward_model"] == model]
    seeds, ns = sorted({r["seed"] for r in mine}), sorted({r["n"] for r in mine})
    table = {(r["seed"], r["n"]): r[key] for r in mine}
    return np.array([[table[k, n] for n in ns] for k in seeds], float), ns


def draw_run(rows, records, out, gold=None):
    """best_of_n.png and reward_models.png of one run; returns their paths. gold: of what judge."""
    plt = pyplot()
    title = ("golden reward (a trained judge's), log-odds" if gold else
             "golden reward (by --gold), points" if rows[0]["task"] == "file" else TRUTH)
    paths = [draw_best_of_n(plt, rows, Path(out) / "best_of_n.png", title)]
    return paths + ([draw_reward_models(plt, records, out)] if records else [])


def draw_best_of_n(plt, rows, path, golden=TRUTH):
    """Golden reward against N, where it is known, beside the proxy's own view of it, one line a
    selector."""
    demo = over_seeds([r for r in rows if r["method"] == "demo"], "gold_mean")
    panels = [("gold_mean", golden)] if demo is not None else []
    panels.append(("proxy_mean", "rise of the proxy reward, nats"))
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 4 * len(panels), 3.8), squeeze=False)
    rows = [r for r in rows if r["method"] == "bon"]
    models = list(dict.fromkeys(r["reward_model"] for r in rows))
    for model in models:
        style = {"color": COLORS[model], "label": model,
                 "linestyle": "--" if model in CONTROLS else "-"}
        for axis, (key, _) in zip(axes[0], panels):
            values, ns = by_seed(rows, model, key)
            if np.isnan(values).any() or (key == "proxy_mean" and model in CONTROLS):
                continue
            values = values - values[:, :1] if key == "proxy_mean" else values
            axis.plot(ns, values.mean(0), marker="o", markersize=3, **style)
            if len(values) > 1:
                half = [mean_ci(column)[1] for column in values.T]
                axis.fill_between(ns, values.mean(0) - half, values.mean(0) + half,
                                  color=style["color"], alpha=0.15, linewidth=0)
    if demo is not None:
        axes[0, 0].axhline(demo, color="#555555", linewidth=1, linestyle=":",
                           label="demonstrations")
    for axis, (_, title) in zip(axes[0], panels):
        axis.set(xscale="log", xlabel="N of best-of-N", title=title, xticks=ns,
                 xticklabels=[str(n) for n in ns])
        axis.minorticks_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return save_figure(figure, path)


def draw_reward_models(plt, records, out):
    """What each reward model learned: a panel for each of these of which there is any."""
    panels = [(key, title) for key, title in (
        ("corr_golden", "rank correlation with golden"),
        ("corr_length", "rank correlation with length"),
        ("marks_worth", "worth of the marks, sd of scores"),
        ("human_agreement", "agreement with people on pairs")) if any(r[key] for r in records)]
    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 2.6), sharey=True)
    models = list(by_model(records).items())[::-1]
    for axis, (key, title) in zip(np.atleast_1d(axes), panels):
        chance = 0.5 if key == "human_agreement" else 0
        for i, (model, mine) in enumerate(models):
            values = [r[key] for r in mine if r[key] is not None]
            if values:
                mean, half = agreement(mine) if chance else mean_ci(values)
                axis.barh(i, mean - chance, left=chance, color=COLORS[model],
                          xerr=None if np.isnan(half) else half)
            else:
                axis.text(chance, i, " not defined", va="center", fontsize=7, color="#555555")
        axis.axvline(chance, color="black", linewidth=0.8)
        axis.set(title=title, yticks=range(len(models)),
                 yticklabels=[model for model, _ in models])
    return save_figure(figure, Path(out) / "reward_models.png")


# ---- docs/results.py: five seeds of every setting ------------------------------------------------

def mean_curve(points):
    """Means over seeds of [(seed, place, x, y)], by place: two arrays."""
    places = sorted({place for _, place, _, _ in points})
    by = [[(x, y) for _, p, x, y in points if p == place] for place in places]
    return np.array([np.mean(column, axis=0) for column in by]).T


def draw_frontier(plt, rows, curves, path):
    """Golden (left) and proxy reward (right) against KL from pi_SFT, nats: best-of-N for N = 2 to
    64 (at N = 1 the KL is 0, which a log axis lacks), policy optimisation along its steps (samples
    on training prompts) with crosses at its end (held-out prompts, as all else), and the closed
    form; means over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    for axis, gold, proxy in ((axes[0], "gold_mean", "golden"), (axes[1], "proxy_mean", "proxy")):
        for name in dict.fromkeys(r["reward_model"] for r in rows if r["method"] == "bon"):
            color = COLORS[name]
            if name in ("random", "length") or (name == "golden" and axis is axes[1]):
                continue
            points = [(r["seed"], r["n"], r["kl_from_sft"], r[gold]) for r in rows
                      if r["method"] == "bon" and r["reward_model"] == name and r["n"] > 1]
            axis.plot(*mean_curve(points), "o-", markersize=3, color=color,
                      label=f"best-of-N, {name}")
            points = [(c["seed"], c["step"], c["kl_from_sft"], c[proxy]) for c in curves
                      if c["name"] == f"po {name} 0.3"]
            if points:
                axis.plot(*mean_curve(points), "--", color=color, label=f"optimised, {name}")
            for method, marker, label in (("po", "x", None), ("closed-form", "*", "closed form")):
                points = [(r["seed"], r["beta"], r["kl_from_sft"], r[gold]) for r in rows
                          if r["method"] == method and r["reward_model"] == name]
                if points:
                    axis.plot(*mean_curve(points), marker, markersize=7, color=color,
                              label=label and f"{label}, {name}")
        axis.set(xscale="log", xlabel="KL from pi_SFT, nats", xlim=(0.1, None))
    demo = over_seeds([r for r in rows if r["method"] == "demo"], "gold_mean")
    axes[0].axhline(demo, color="#555555", linewidth=1, linestyle=":", label="demonstrations")
    axes[0].set(title=TRUTH, ylim=(-1.5, None))
    axes[1].set(title="proxy reward, nats", yscale="symlog")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return save_figure(figure, path)


def draw_heterogeneity(plt, shares, path):
    """Share of the golden selector's gain against heterogeneity, one panel a task, from
    {(task, reward model, h): (mean, half-width)}."""
    tasks = list(dict.fromkeys(task for task, _, _ in shares))
    figure, axes = plt.subplots(1, len(tasks), figsize=(9.5, 3.8), sharey=True)
    for axis, task in zip(axes, tasks):
        for name in dict.fromkeys(name for _, name, _ in shares):
            points = [(h, *share) for (t, n, h), share in shares.items() if (t, n) == (task, name)]
            if points:
                h, mean, half = np.array(points).T
                axis.errorbar(h, 100 * mean, 100 * np.nan_to_num(half), marker="o", markersize=3,
                              capsize=2, color=COLORS[name], label=name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=task, xlabel="heterogeneity: chance of a mark in a demonstrator's clause")
    axes[0].set_ylabel("golden gain of best-of-16 over pi_SFT,\n% of the golden selector's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return save_figure(figure, path)
