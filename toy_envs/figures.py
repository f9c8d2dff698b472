"""Figures and tables in one style: the same name has the same colour in every picture of the project.

The palette is Okabe and Ito's, which the colour-blind can tell apart and which stays legible in
grey. matplotlib is an extra: it is imported when the first figure is drawn, not before.
"""

from pathlib import Path

import numpy as np

from reward import mean_ci

COLORS = {
    # reward models
    "init-sft": "#0072B2", "init-demo": "#E69F00", "sft-demo": "#D55E00",
    "preference": "#009E73", "log-ratio": "#56B4E9",
    # controls and policies
    "golden": "#000000", "length": "#CC79A7", "random": "#999999",
    "init": "#999999", "sft": "#0072B2", "demo": "#E69F00",
    # divergences
    "reverse_kl": "#D55E00", "forward_kl": "#0072B2", "jensen_shannon": "#009E73",
    "total_variation": "#CC79A7", "pearson_chi2": "#56B4E9", "neyman_chi2": "#E69F00",
    "squared_hellinger": "#000000",
}


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


# ---- a run of afd.py: tables and figures --------------------------------------------------------

def number(value, form="{:.2f}"):
    return "-" if value is None or value != value else form.format(value)


def print_table(rows, records, n):
    """The final table, means over seeds: every golden number beside its proxy."""
    seeds = len({r["seed"] for r in rows})
    over = "over seeds" if seeds > 1 else "over prompts"
    print(f"\nbest-of-N at N = {n}; golden reward in points, +- 95% interval {over}; KL in nats")
    print(f"{'':24}{'golden':>14}{'proxy':>9}{'win/SFT':>9}{'win/demo':>9}{'KL':>7}{'length':>8}")
    keys = list(dict.fromkeys((r["method"], r["reward_model"]) for r in rows))
    for method, model in keys:
        mine = [r for r in rows if (r["method"], r["reward_model"]) == (method, model)
                and r["n"] == (n if method == "bon" else 1)]
        mean = {k: np.mean([r[k] for r in mine]) if mine[0][k] is not None else None
                for k in ("gold_mean", "proxy_mean", "win_vs_sft", "win_vs_demo", "kl_from_sft",
                          "length_mean")}
        ci = mine[0]["gold_ci95"] if seeds == 1 else (
            mean_ci([r["gold_mean"] for r in mine])[1] if mean["gold_mean"] is not None else None)
        label = {"init": "pi_0", "sft": "pi_SFT", "demo": "demonstrations"}.get(method, f"  {model}")
        if (method, model) == keys[3]:
            print("best of N by")
        print(f"{label:24}{number(mean['gold_mean']):>7} +-{number(ci):>5}"
              f"{number(mean['proxy_mean']):>9}{number(mean['win_vs_sft']):>9}"
              f"{number(mean['win_vs_demo']):>9}{number(mean['kl_from_sft']):>7}"
              f"{number(mean['length_mean'], '{:.1f}'):>8}")
    print("\nwhat each reward model learned (rank correlation within a prompt; marks in sd of scores)")
    print(f"{'':24}{'accuracy':>9}{'calib.':>8}{'golden':>8}{'length':>8}{'marks':>7}{'people agree':>16}")
    for name in dict.fromkeys(r["reward_model"] for r in records):
        mine = [r for r in records if r["reward_model"] == name]
        mean = {k: np.mean([r[k] for r in mine]) if mine[0][k] is not None else None
                for k in ("accuracy", "calibration_error", "corr_golden", "corr_length", "marks_worth",
                          "human_agreement")}
        people = "-"
        if mean["human_agreement"] is not None:
            ci = mine[0]["human_ci95"] if seeds == 1 else mean_ci([r["human_agreement"] for r in mine])[1]
            people = f"{mean['human_agreement']:.3f} +- {ci:.3f}"
        print(f"  {name:22}{number(mean['accuracy']):>9}{number(mean['calibration_error']):>8}"
              f"{number(mean['corr_golden']):>8}{number(mean['corr_length']):>8}"
              f"{number(mean['marks_worth']):>7}{people:>16}")


def print_samples(samples, count=3):
    print("\nsamples side by side (golden / init-sft's proxy)")
    for sample in samples[:count]:
        prompt = sample["prompt"].strip()
        print(f"\n  {prompt if len(prompt) < 200 else '...' + prompt[-200:]!r}")
        for name, said in list(sample.items())[1:]:
            numbers = f"{number(said['golden'], '{:+.1f}')} / {number(said['proxy'], '{:+.1f}')}"
            print(f"    {name:14}{numbers:>14}  {said['text'].strip()}")


def by_seed(rows, model, key):
    """Values of one selector's rows, (seeds, N's), and its N's."""
    mine = [r for r in rows if r["reward_model"] == model]
    seeds, ns = sorted({r["seed"] for r in mine}), sorted({r["n"] for r in mine})
    table = {(r["seed"], r["n"]): r[key] for r in mine}
    return np.array([[table[k, n] for n in ns] for k in seeds], float), ns


def draw_run(rows, records, out, n):
    """best_of_n.png and reward_models.png of one run; returns their paths."""
    plt = pyplot()
    paths = [draw_best_of_n(plt, rows, out)]
    if records[0]["corr_golden"] is not None:
        paths.append(draw_reward_models(plt, records, out))
    return paths


def draw_best_of_n(plt, rows, out):
    """Golden reward against N beside the proxy's own view of it, one line a selector."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    models = list(dict.fromkeys(r["reward_model"] for r in rows if r["reward_model"]))
    levels = {r["method"]: [q["gold_mean"] for q in rows if q["method"] == r["method"]] for r in rows}
    for model in models:
        style = {"color": COLORS[model], "label": model,
                 "linestyle": "--" if model in ("golden", "length", "random") else "-"}
        gold, ns = by_seed(rows, model, "gold_mean")
        proxy, _ = by_seed(rows, model, "proxy_mean")
        for axis, values in ((axes[0], gold), (axes[1], proxy - proxy[:, :1])):
            if np.isnan(values).any() or (axis is axes[1] and model in ("golden", "length", "random")):
                continue
            axis.plot(ns, values.mean(0), marker="o", markersize=3, **style)
            if len(values) > 1:
                half = [mean_ci(column)[1] for column in values.T]
                axis.fill_between(ns, values.mean(0) - half, values.mean(0) + half,
                                  color=style["color"], alpha=0.15, linewidth=0)
    if levels["demo"][0] is not None:
        axes[0].axhline(np.mean(levels["demo"]), color="#555555", linewidth=1, linestyle=":")
        axes[0].text(1, np.mean(levels["demo"]), " demonstrations' mean", va="bottom", fontsize=8,
                     color="#555555")
    for axis, title in zip(axes, ("golden reward (the truth), points",
                                  "rise of the proxy reward, nats")):
        axis.set(xscale="log", xlabel="N of best-of-N", title=title, xticks=ns,
                 xticklabels=[str(n) for n in ns])
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels() if axes[0].lines else
                  axes[1].get_legend_handles_labels(), loc="outside right center")
    return save_figure(figure, Path(out) / "best_of_n.png")


def draw_reward_models(plt, records, out):
    """What each reward model learned: correlations with golden reward and length, worth of marks."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True)
    models = list(dict.fromkeys(r["reward_model"] for r in records))[::-1]
    for axis, (key, title) in zip(axes, (("corr_golden", "rank correlation with golden"),
                                         ("corr_length", "rank correlation with length"),
                                         ("marks_worth", "worth of the marks, sd of scores"))):
        for i, model in enumerate(models):
            values = [r[key] for r in records if r["reward_model"] == model and r[key] is not None]
            if values:
                mean, half = mean_ci(values)
                axis.barh(i, mean, color=COLORS[model], xerr=None if np.isnan(half) else half)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=title, yticks=range(len(models)), yticklabels=models)
    return save_figure(figure, Path(out) / "reward_models.png")
