"""Make the pages' tables and figures from runs of afd.py over five seeds, two runs at a time.

    make results                      run what is missing, then collect
    python docs/results.py collect    only collect what is there
    python docs/results.py pages      only the tables and figures, from docs/results.json
    python docs/results.py check      are tables and sentences those of docs/results.json?

A group of the tables is one `python afd.py` over five seeds, in out/results/GROUP. One that was
stopped goes on where it was. In the pages a comment above a table says what each column holds, and
the first cell of a line says of which method: all other cells are made here. Sentences are written
by hand. So that none outlives its numbers, `check` looks each `mean ± half-width` of a sentence up
in the tables.
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))       # this script lives in docs/

from utils.cli import write_json                                        # noqa: E402
from utils.evaluate import grouped, mean_ci, row_name                   # noqa: E402
from utils.plots import COLORS, TRUTH, draw_best_of_n, pyplot, save_figure      # noqa: E402

RUNS = ROOT / "out" / "results"
COLLECTED = ROOT / "docs" / "results.json"
BENCH = ROOT / "docs" / "bench.json"            # what `python tests/bench.py` wrote
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")      # hold tables between markers

# ---- the runs -----------------------------------------------------------------------------------

SEEDS = range(5)
LEVELS = ("0", "0.5", "1")                      # of heterogeneity
SCHEDULES = ((1e-3, 1), (1e-3, 2), (1e-3, 4), (3e-3, 4))    # of sweeps.py: pi_SFT's rate, epochs
ALPHAS = (0, 0.001, 0.01, 0.1, 0.3, 1)          # its floors under pi_0
NOISE = (0, 0.1, 0.2, 0.4)                      # and its shares of labels swapped
SELECT = "--methods none --n-candidates 16"     # best-of-N alone
SHARPENED = ("temperature 0.3, temperature 0.5, temperature 0.7, closed-form log-ratio 0.3, "
             "closed-form floored 0.3")
OPTIMISED = "po init-sft 0.3, po floored 0.3"
ONLINE = ("adversarial forward_kl, adversarial reverse_kl, adversarial-exact forward_kl, "
          "adversarial-exact reverse_kl")
METHODS = {         # of a group, beyond SHARPENED
    "good-helpful-h0": f"{OPTIMISED}, po init-demo 0.3, po preference 0.3, po log-ratio 0.3, "
                       "closed-form log-ratio 1, closed-form log-ratio 3, closed-form floored 1, "
                       f"closed-form floored 3, {ONLINE}, spin, irft, dpo",
    "good-harmless-h0": f"{OPTIMISED}, spin, irft, dpo",
    "idle-helpful-h0": OPTIMISED}


def groups():
    """{group: the flags of its runs, but for --seed, --init and --out}. A group's name begins with
    its base and task where these tell it apart; the first groups train the pi_0 of the others."""
    found = {}
    for h, base, task in product("01", ("good", "idle"), ("helpful", "harmless")):
        methods = ", ".join(filter(None, [SHARPENED, METHODS.get(f"{base}-{task}-h{h}")]))
        found[f"{base}-{task}-h{h}"] = (f"--base {base} --task {task} --heterogeneity {h} "
                                        f"--n-candidates 32 --methods '{methods}'")
    found |= {f"good-{task}-h0.5": f"--task {task} --heterogeneity 0.5 {SELECT}"
              for task in ("helpful", "harmless")}
    found |= {f"last-h{h}": f"--head last --heterogeneity {h} {SELECT}" for h in "01"}
    # A policy that is short of capacity: it needs a pi_0 of its own.
    found["small"] = f"--n-embd 16 --n-layer 1 --methods '{ONLINE}' --n-candidates 2"
    return found


def teacher(group):
    """The group whose runs train the pi_0 that a group starts from; itself, if it trains its own.

    pi_0 depends on base, task and seed alone: it never sees a demonstration.
    """
    base = re.match("(good|idle)-(helpful|harmless)", group)
    return group if group == "small" else f"{base[0] if base else 'good-helpful'}-h0"


def run(group, seed):
    """One run on one thread; what it prints goes to its log. Returns whether it ended well."""
    out, source = RUNS / f"{group}-s{seed}", teacher(group)
    words = [*shlex.split(groups()[group]), "--seed", str(seed)]
    if source != group:
        init = RUNS / f"{source}-s{seed}" / f"seed{seed}" / "init"
        words += ["--init", os.path.relpath(init, ROOT)]
    words += ["--out", os.path.relpath(out, ROOT), "--resume"]
    if (out / "config.json").exists():
        before = json.loads((out / "config.json").read_text(encoding="utf-8"))["command"]
        if before.replace("'", "") != " ".join(["python afd.py", *words]):
            shutil.rmtree(out)          # a run of other settings
    return start_one(out, ["afd.py", *words])


def start_one(out, words):
    """Run a script of this project on one thread, with its prints in out.log."""
    start = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "w") as log:
        status = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=log,
                                stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    outcome = f"failed with status {status}, see {log.name}" if status else "done"
    print(f"{out.name}: {outcome}, {time.perf_counter() - start:.0f} s", flush=True)
    return status == 0


def sweep(group, seed):
    """The sweeps that go on from a run, unless they are there already."""
    file = RUNS / "sweeps" / f"{group}-s{seed}"
    if Path(f"{file}.json").exists():
        return True
    return start_one(file, ["docs/sweeps.py", group, str(seed)])


def run_all():
    """All runs and sweeps, two at a time: first those that others take their models from."""
    base = [group for group in groups() if teacher(group) == group]
    marked = [group for group in groups() if re.match("(good|idle).*-h1", group)]
    rest = [group for group in groups() if group not in base + marked]
    swept = [group for group in base + marked if group != "small"]
    phases = ([(run, base)], [(run, marked)], [(sweep, swept), (run, rest)])
    with ThreadPoolExecutor(2) as pool:
        for phase in phases:
            jobs = [(job, group, seed) for job, names in phase for group in names
                    for seed in SEEDS]
            if not all(list(pool.map(lambda j: j[0](*j[1:]), jobs))):
                sys.exit("some runs failed; `make results` tries them again")


# ---- collecting ---------------------------------------------------------------------------------

def collect():
    """Write docs/results.json: rows, curves and reward models of all groups, each record with its
    group, and the rows of the sweeps. A group is left out until all of its seeds are there."""
    data = {"runs": {}, "rows": [], "best_of_n": [], "reward_models": [], "curves": []}
    for group in groups():
        files = [RUNS / f"{group}-s{seed}" / "results.json" for seed in SEEDS]
        swept = [RUNS / "sweeps" / f"{group}-s{seed}.json" for seed in SEEDS]
        if not all(file.exists() for file in files):
            print(f"{group} is left out: not all of its seeds are there")
            continue
        for seed, file in zip(SEEDS, files):
            results = json.loads(file.read_text(encoding="utf-8"))
            run = data["runs"].setdefault(group, {key: results[key]
                                                  for key in ("command", "versions")})
            run.setdefault("seconds", {})[seed] = round(sum(results["seconds"][str(seed)].values()))
            for kind in ("rows", "best_of_n", "reward_models"):
                data[kind] += [{"group": group, **short(record)} for record in results[kind]]
            for method, history in results["curves"][str(seed)].items():
                if history and "proxy" in history[0]:       # a policy that was optimised
                    head = {"group": group, "seed": seed, "name": row_name(method)}
                    data["curves"] += [{**head, **point} for point in thinned(history)]
        if all(file.exists() for file in swept):
            data["rows"] += [short(row) for file in swept
                             for row in json.loads(file.read_text(encoding="utf-8"))]
    if not data["runs"]:
        sys.exit(f"error: {RUNS} has no group with all seeds; {COLLECTED} is left as it was")
    write_json(COLLECTED, data, indent=None)


def short(record):
    """A record with numbers of five digits: enough for every table, and a file of modest size."""
    return {key: float(f"{v:.5g}") if isinstance(v, float) and math.isfinite(v) else v
            for key, v in record.items()}


def thinned(history, steps=10):
    """Means over ten steps each of what a curve needs."""
    keys = ("step", "proxy", "kl", "entropy", "golden", "length")
    parts = [history[i:i + steps] for i in range(0, len(history), steps)]
    return [short({key: sum(r[key] for r in part) / len(part) for key in keys}) for part in parts]


# ---- tables -------------------------------------------------------------------------------------

FORMS = {"share": "{:.0%}", "held_out": "{:.4f}",       # of a column; all else has two digits
         **dict.fromkeys(("kl", "reverse_kl", "entropy"), "{:.1f}")}
NUMBER = r"-?[\d.]+%? ± [\d.]*\d%?"


def values(data, group, name, column="golden"):
    """{seed: value} of one column of the row `name`. Best-of-n that is no row is on the curve.
    Column "share" is the part of the golden selector's gain over pi_SFT, at n = 16."""
    if column == "share":
        x, sft, best = (values(data, group, n) for n in (name, "pi_SFT", "best of 16, golden"))
        return {seed: (x[seed] - sft[seed]) / (best[seed] - sft[seed]) for seed in x}
    found = [r for r in data["rows"] if r["group"] == group and r["name"] == name]
    if not found:
        found = [p for p in data["best_of_n"] if p["group"] == group
                 and f"best of {p['n']}, {p['reward_model']}" == name]
    return {r["seed"]: r[column] for r in found if r.get(column) is not None}


def difference(data, groups, a, b, column="golden"):
    """A list: a's column less b's, paired by seed, in all seeds of "GROUP" or "GROUP+GROUP"."""
    pairs = [(values(data, g, a, column), values(data, g, b, column)) for g in groups.split("+")]
    return [x[seed] - y[seed] for x, y in pairs for seed in x if seed in y]


def cell(data, line, key):
    """A table's cell, or a dash. line: "NAME", or "NAME − NAME" for a difference; key: "GROUP
    COLUMN" for the mean over seeds, "GROUP COLUMN ±" for its 95% half-width as well."""
    group, column, *interval = key.split()
    if " − " in line:
        numbers = difference(data, group, *line.split(" − "), column)
    else:
        numbers = list(values(data, group, line, column).values())
    if not numbers:
        return "–"
    form = FORMS.get(column, "{:.2f}")
    return " ± ".join(form.format(x) for x in mean_ci(numbers)[:1 + len(interval)])


def fill(text, data):
    """A page with all cells of its tables made anew. A table's comment is <!-- cells: KEY, ... -->,
    see cell(), or <!-- speed -->."""
    def made(found):
        head, rule, *lines = found[2].splitlines()
        names = [line.split("|")[1].strip() for line in lines]
        cells = [[name, *(cell(data, name, key) for key in found[1].split(", "))] for name in names]
        return f"<!-- cells: {found[1]} -->\n{markdown(cells, head, rule)}"
    text = re.sub(r"<!-- cells: (.+) -->\n((?:\|.*\n)+)", made, text)
    return re.sub(r"(<!-- speed -->\n.*\n.*\n)(?:\|.*\n)+",
                  lambda found: found[1] + markdown(speed()), text)


def markdown(rows, *head):
    lines = [*head, *("| " + " | ".join(row) + " |" for row in rows)]
    return "".join(f"{line}\n" for line in lines)


def speed():
    """Rows of our tokens per second, and how many times as long the others take, from bench.py."""
    cases, forms = {}, {
        "train": "training step {0}, {2}–{3} + {4}–{5}", "sample": "sampling {0} × {1}, {2} + {3}",
        "score": "scoring {0} × {1}, {2} + {3}–{4}"}
    for r in json.loads(BENCH.read_text(encoding="utf-8"))["records"]:
        case = re.sub(r"\b(\d+)–\1\b", r"\1", forms[r["part"]].format(*r["shape"].split(",")))
        name = r["name"] if r["name"] in ("ours", "transformers") else "simple version"
        goal = f" (aim {r['goal']:g})" if r["goal"] else ""
        cases.setdefault((r["size"], case), {})[name] = (
            f"{r['tokens_per_second']:,.0f}" if name == "ours" else f"{r['ratio']:.2f}{goal}")
    return [[*case, *(found.get(name, "–") for name in ("ours", "simple version", "transformers"))]
            for case, found in cases.items()]


def outdated(texts, data):
    """What is wrong in the pages, {name: text}: lines of tables that would be made otherwise or
    hold nothing, and numbers of a sentence that no table holds (without its sign too: "below by
    0.43 ± 0.28")."""
    known = re.findall(NUMBER, "".join(re.findall(r"^\|.*", "\n".join(texts.values()), re.M)))
    known = {*known, *(number.removeprefix("-") for number in known)}
    wrong = []
    for name, text in texts.items():
        made = fill(text, data)
        wrong += [f"{name}: {line}" for line in made.splitlines() if line not in text.splitlines()]
        wrong += [f"{name}: {line}" for line in re.findall(r"^\|[^|]*\|[ –|]*$", made, re.M)]
        prose = re.sub(r"^\|.*", "", text, flags=re.M)
        wrong += [f"{name}: {x}" for x in re.findall(NUMBER, prose) if x not in known]
    return wrong


# ---- figures ------------------------------------------------------------------------------------

STYLES = {"init-sft": "o-", "init-demo": "s--", "sft-demo": "v:", "floored": "D-", "golden": "-",
          "log-ratio": "x--", "likelihood per token": "^-."}
COMPARED = ("floored", "likelihood per token", "init-sft", "init-demo", "sft-demo")


def mean(data, group, name, column="golden"):
    """The mean over seeds of a column of a row."""
    return np.mean([*values(data, group, name, column).values()])


def means(records, place, column):
    """Means over seeds: x (place) and y (column) of the points of a line, by "place" in order."""
    by_place = grouped(sorted(records, key=lambda r: r[place]), place).values()
    return [[np.mean([r[key] for r in seeds]) for seeds in by_place] for key in ("kl", column)]


def draw_frontier(data, worlds, path):
    """Golden reward against KL from pi_SFT, nats, means over seeds: best-of-N beside policies.

    worlds: {group: title}, a row each.
    """
    figure, axes = pyplot().subplots(len(worlds), 2, figsize=(10, 3.6 * len(worlds)), sharex=True,
                                     sharey="row", squeeze=False)
    for (group, title), (left, right) in zip(worlds.items(), axes):
        rows, points, curves = ([r for r in data[kind] if r["group"] == group]
                                for kind in ("rows", "best_of_n", "curves"))
        for name in ("golden", "floored", "likelihood per token", "init-sft", "log-ratio"):
            mine = [p for p in points if p["reward_model"] == name and p["n"] > 1]
            left.plot(*means(mine, "n", "golden"), STYLES[name], color=COLORS[name],
                      markersize=4, label=name)
        for label, form, style, color in (
                ("temperature", "temperature, ", "^-.", COLORS["likelihood per token"]),
                ("closed form, floored", "closed form, floored", "*", COLORS["floored"])):
            mine = [r for r in rows if r["name"].startswith(form)]
            right.plot(*means(mine, "name", "golden"), style, color=color, label=label,
                       markersize=10 if style == "*" else 5)
        for name in ("floored", "init-sft"):
            end = f"policy optimisation, {name} 0.3"
            # Along the steps samples are of training prompts; the end is of held-out prompts.
            right.plot(*means([c for c in curves if c["name"] == end], "step", "golden"),
                       "-", color=COLORS[name], label=f"optimised, {name}")
            right.plot(*means([r for r in rows if r["name"] == end], "name", "golden"), "X",
                       color=COLORS[name], markersize=8)
        demo = mean(data, group, "demonstrations")
        for axis, family in ((left, "best-of-N"), (right, "policies, one sample each")):
            axis.axhline(demo, color="#555555", linewidth=1, linestyle=":", label="demonstrations")
            axis.set(xscale="log", xlim=(0.1, 8), title=f"{title}: {family}",
                     xticks=(0.1, 0.3, 1, 3), xticklabels=("0.1", "0.3", "1", "3"))
            axis.minorticks_off()
        left.set_ylabel(TRUTH)
    for axis in axes[-1]:
        axis.set_xlabel("KL from pi_SFT, nats")
    for axis, place, panels in zip(axes[0], ("upper", "lower"), ("left", "right")):
        figure.legend(*axis.get_legend_handles_labels(), loc=f"outside right {place}",
                      title=f"{panels} panels")
    return save_figure(figure, path)


def draw_heterogeneity(data, path):
    """Share of the golden selector's gain against heterogeneity, one panel a task."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
    for axis, task in zip(axes, ("helpful", "harmless")):
        for name in COMPARED:
            mine = [values(data, f"good-{task}-h{h}", f"best of 16, {name}", "share")
                    for h in LEVELS]
            draw_shares(axis, name, [float(h) for h in LEVELS], mine)
        axis.set(title=task, xlabel="h: chance of a mark in a clause",
                 xticks=[float(h) for h in LEVELS])
    axes[0].set_ylabel("golden gain of best of 16 over pi_SFT,\n% of the golden selector's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return save_figure(figure, path)


def draw_shares(axis, name, x, shares):
    """A line of shares, percent, with 95% intervals over seeds; shares: {seed: share} for each x."""
    mean, half = 100 * np.array([mean_ci([*share.values()]) for share in shares]).T
    axis.errorbar(x, mean, half, fmt=STYLES[name], markersize=4, capsize=2, color=COLORS[name],
                  label=name)
    axis.axhline(0, color="black", linewidth=0.8)


def draw_quality(data, path):
    """Share of the golden selector's gain against how well pi_SFT is trained, marks apart."""
    parts = {"helpful": ("helpful", ""), "harmless, benign prompts": ("harmless", "-benign"),
             "harmless, harmful prompts": ("harmless", "-harmful")}
    figure, axes = pyplot().subplots(2, 3, figsize=(11, 6.4), sharex="col", sharey="row")
    for row, h in zip(axes, "01"):
        for axis, (title, (task, part)) in zip(row, parts.items()):
            groups = [f"good-{task}-h{h}-sft-{lr:g}x{epochs:g}" for lr, epochs in SCHEDULES]
            places = {group: mean(data, group, "pi_SFT", "forward_kl")
                      for group in groups if values(data, group, "pi_SFT")}
            groups = sorted(places, key=places.get)
            for name in COMPARED:
                draw_shares(axis, name, [places[group] for group in groups],
                            [values(data, group + part, f"best of 16, {name}", "share")
                             for group in groups])
            axis.set(title=f"{title}, h = {h}")
    for axis in axes[0]:
        axis.invert_xaxis()         # of both rows, which share it
    for axis in axes[1]:
        axis.set_xlabel("forward KL of pi_SFT, nats (better to the right)")
    for axis in axes[:, 0]:
        axis.set_ylabel("golden gain of best of 16,\n% of the golden selector's")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return save_figure(figure, path)


def draw_floors(data, path):
    """Golden reward of best of 16 and of the closed form against the floor under pi_0."""
    worlds = {f"{base}-{task}-h0": (f"{base} base, {task}", color, style)
              for base, style in (("good", "o-"), ("idle", "s--"))
              for task, color in (("helpful", COLORS["init-sft"]), ("harmless", COLORS["sft-demo"]))}
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 3.8))
    for axis, form in zip(axes, ("best of 16, floor", "closed form, floor")):
        for group, (label, color, style) in worlds.items():
            columns = [[*values(data, f"{group}-floors", f"{form} {alpha:g}").values()]
                       for alpha in ALPHAS]
            mean, half = np.array([mean_ci(column) for column in columns]).T
            axis.errorbar(range(len(ALPHAS)), mean, half, fmt=style, markersize=4, capsize=2,
                          color=color, label=label)
        axis.set(xticks=range(len(ALPHAS)), xlabel="floor alpha",
                 xticklabels=("0\nlog-ratio", *map(str, ALPHAS[1:-1]), "1\nsharpening"))
    axes[0].set(title="best of 16 by the floored log-ratio", ylabel=TRUTH)
    axes[1].set(title="closed form, beta 0.3")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return save_figure(figure, path)


def figures(data, folder):
    for group in ("good-helpful-h0", "good-helpful-h1", "idle-helpful-h0"):
        curve = [p for p in data["best_of_n"] if p["group"] == group]
        demo = mean(data, group, "demonstrations")
        base, _, h = group.split("-")
        draw_best_of_n(curve, demo, folder / f"best_of_n_{'idle' if base == 'idle' else h}.png")
    draw_frontier(data, {"good-helpful-h0": "good base", "idle-helpful-h0": "idle base"},
                  folder / "frontier.png")
    draw_heterogeneity(data, folder / "heterogeneity_sweep.png")
    draw_quality(data, folder / "sft_quality.png")
    draw_floors(data, folder / "floors.png")


# ---- main ---------------------------------------------------------------------------------------

def main():
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    if words not in ([], ["collect"], ["pages"], ["check"]):
        sys.exit("error: " + " ".join(words) + ": say collect, pages, check or nothing")
    if not words:
        run_all()
    if words in ([], ["collect"]):
        collect()
    data = json.loads(COLLECTED.read_text(encoding="utf-8"))
    if words != ["check"]:
        for page in PAGES:
            page.write_text(fill(page.read_text(encoding="utf-8"), data), encoding="utf-8")
        figures(data, ROOT / "docs" / "figures")
    wrong = outdated({page.name: page.read_text(encoding="utf-8") for page in PAGES}, data)
    if wrong:
        sys.exit("\n".join(["error: these are not of docs/results.json:", *wrong]))
    print("the pages are those of docs/results.json")


if __name__ == "__main__":
    main()
