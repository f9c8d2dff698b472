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

LEVELS = ("0", "0.25", "0.5", "0.75", "1")      # of heterogeneity
FEW = {"100": "80", "300": "27", "1000": "8"}   # demonstrations: epochs, for as many steps
NOISE = ("0.1", "0.2", "0.4")                   # shares of labels swapped
SELECT = "--methods none --n-candidates 16"     # best-of-N alone
ONLINE = ("adversarial forward_kl, adversarial reverse_kl, adversarial-exact forward_kl, "
          "adversarial-exact reverse_kl")
SHARPENED = ("temperature 0.3, temperature 0.5, temperature 0.7, closed-form log-ratio 0.3, "
             "closed-form floored 0.3")
BASIC = "po floored 0.3, po init-sft 0.3, closed-form log-ratio 0.3, closed-form floored 0.3"
POLICIES = {        # groups in which policies are trained too; no other takes as long
    "helpful-h0": f"{BASIC}, po floored 0.1, po floored 1, po floored 3, po init-demo 0.3, "
                  "po preference 0.3, po log-ratio 0.3, closed-form log-ratio 0.1, "
                  "closed-form floored 0.1, closed-form log-ratio 1, closed-form floored 1, "
                  f"closed-form log-ratio 3, closed-form floored 3, {ONLINE}, spin, irft, dpo",
    "harmless-h0": f"{BASIC}, {ONLINE}, spin, irft, dpo",
    "helpful-h1": BASIC}


def groups():
    """{group: the flags of its run, but for --seeds and --out}."""
    found = {group: f"--methods '{methods}'" for group, methods in POLICIES.items()}
    for task in ("helpful", "harmless"):
        for h in LEVELS:
            rest = found.get(f"{task}-h{h}", SELECT)
            found[f"{task}-h{h}"] = f"--task {task} --heterogeneity {h} {rest}"
    found |= {f"last-h{h}": f"--head last --heterogeneity {h} {SELECT}" for h in "01"}
    found["more-h1"] = f"--seed 5 --heterogeneity 1 {SELECT}"       # five further seeds
    # A policy that is short of capacity.
    found["small"] = f"--n-embd 16 --n-layer 1 --methods '{ONLINE}' --n-candidates 2"
    found |= {f"demos{n}": f"--n-demos {n} --sft-epochs {epochs} --n-candidates 16 "
              "--methods 'po init-sft 0.3'" for n, epochs in FEW.items()}
    found |= {f"noise{share}": f"--label-noise {share} --n-candidates 16 "
              "--methods 'po preference 0.3, dpo'" for share in NOISE}
    # The mended loss, its controls, and a base whose mode is not good: README's main table.
    mended = [*product(["good"], ["helpful", "harmless"], (0, 1)), ("idle", "helpful", 0)]
    for base, task, h in mended:
        optimised = "po init-sft 0.3, po floored 0.3, " if (base, h) == ("good", 0) else ""
        found[f"{base}-{task}-h{h}"] = (
            f"--task {task} --base {base} --heterogeneity {h} --n-candidates 32 "
            f"--methods '{optimised}{SHARPENED}'")
    return found


def run(group):
    """One run on one thread; what it prints goes to its log. Returns whether it ended well."""
    out, start = RUNS / group, time.perf_counter()
    words = [*shlex.split(groups()[group]), "--seeds", "5", "--out", os.path.relpath(out, ROOT),
             "--resume"]
    if (out / "config.json").exists():
        before = json.loads((out / "config.json").read_text(encoding="utf-8"))["command"]
        if before.replace("'", "") != " ".join(["python afd.py", *words]):
            shutil.rmtree(out)          # a run of other settings
    RUNS.mkdir(parents=True, exist_ok=True)
    with open(RUNS / f"{group}.log", "w") as log:
        status = subprocess.run([sys.executable, "afd.py", *words], cwd=ROOT, stdout=log,
                                stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    outcome = f"failed with status {status}, see {log.name}" if status else "done"
    print(f"{group}: {outcome}, {time.perf_counter() - start:.0f} s", flush=True)
    return status == 0


# ---- collecting ---------------------------------------------------------------------------------

def collect():
    """Write docs/results.json: rows, curves and reward models of all groups, each record with its
    group. A group is left out until all of its seeds are there."""
    data = {"runs": {}, "rows": [], "best_of_n": [], "reward_models": [], "curves": []}
    for group in groups():
        path = RUNS / group / "results.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
        if len({row["seed"] for row in results["rows"]}) < 5:
            print(f"{group} is left out: not all of its seeds are there")
            continue
        data["runs"][group] = {key: results[key] for key in ("command", "versions", "seconds")}
        for kind in ("rows", "best_of_n", "reward_models"):
            data[kind] += [{"group": group, **short(record)} for record in results[kind]]
        for seed, curves in results["curves"].items():
            for method, history in curves.items():
                if history and "proxy" in history[0]:       # a policy that was optimised
                    head = {"group": group, "seed": int(seed), "name": row_name(method)}
                    data["curves"] += [{**head, **point} for point in thinned(history)]
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

NATS = ("kl", "reverse_kl", "forward_kl", "entropy")
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
    form = "{:.0%}" if column == "share" else "{:.1f}" if column in NATS else "{:.2f}"
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

def draw_frontier(data, group, path):
    """Golden (left) and proxy reward (right) against KL from pi_SFT, nats, means over seeds."""
    mine = {kind: [r for r in data[kind] if r["group"] == group]
            for kind in ("rows", "best_of_n", "curves")}
    names = dict.fromkeys(point["reward_model"] for point in mine["best_of_n"])
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4.2))
    for axis, column in zip(axes, ("golden", "proxy")):
        for name in names:
            if name in ("random", "length") or (name, column) == ("golden", "proxy"):
                continue
            for style, label, place, records in series(mine, name):
                by_place = grouped(sorted(records, key=lambda r: r[place]), place).values()
                x, y = ([np.mean([r[key] for r in seeds]) for seeds in by_place]
                        for key in ("kl", column))
                if x:
                    axis.plot(x, y, style, color=COLORS[name], label=label,
                              markersize=3 if style == "o-" else 7)
        axis.set(xscale="log", xlabel="KL from pi_SFT, nats", xlim=(0.1, None))
    demo = np.mean([*values(data, group, "demonstrations").values()])
    axes[0].axhline(demo, color="#555555", linewidth=1, linestyle=":", label="demonstrations")
    axes[0].set(title=TRUTH, ylim=(-1.5, None))
    axes[1].set(title="proxy reward, nats", yscale="symlog")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return save_figure(figure, path)


def series(mine, name):
    """One reward model's series: (style, label, key that tells their points apart, records)."""
    optimised, closed = f"policy optimisation, {name} ", f"closed form, {name} "
    return (    # At n = 1 the KL is 0, which a log axis lacks.
        ("o-", f"best-of-N, {name}", "n",
         [p for p in mine["best_of_n"] if p["reward_model"] == name and p["n"] > 1]),
        # Along the steps samples are of training prompts; all else is of held-out prompts.
        ("--", f"optimised, {name}", "step",
         [c for c in mine["curves"] if c["name"] == optimised + "0.3"]),
        ("x", None, "name", [r for r in mine["rows"] if r["name"].startswith(optimised)]),
        ("*", f"closed form, {name}", "name",
         [r for r in mine["rows"] if r["name"].startswith(closed)]))


def draw_heterogeneity(data, path):
    """Share of the golden selector's gain against heterogeneity, one panel a task."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
    for axis, task in zip(axes, ("helpful", "harmless")):
        for name in ("init-sft", "init-demo", "sft-demo", "preference", "log-ratio", "floored"):
            shares = [values(data, f"{task}-h{h}", f"best of 16, {name}", "share") for h in LEVELS]
            mean, half = 100 * np.array([mean_ci([*share.values()]) for share in shares]).T
            axis.errorbar([float(h) for h in LEVELS], mean, half, marker="o", markersize=3,
                          capsize=2, color=COLORS[name], label=name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=task, xlabel="heterogeneity: chance of a mark in a demonstrator's clause")
    axes[0].set_ylabel("golden gain of best-of-16 over pi_SFT,\n% of the golden selector's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return save_figure(figure, path)


def figures(data, folder):
    for group in ("helpful-h0", "helpful-h1"):
        curve = [p for p in data["best_of_n"] if p["group"] == group]
        demo = np.mean([*values(data, group, "demonstrations").values()])
        draw_best_of_n(curve, demo, folder / f"best_of_n_h{group[-1]}.png")
        draw_frontier(data, group, folder / f"frontier_h{group[-1]}.png")
    draw_heterogeneity(data, folder / "heterogeneity_sweep.png")


# ---- main ---------------------------------------------------------------------------------------

def main():
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    if words not in ([], ["collect"], ["pages"], ["check"]):
        sys.exit("error: " + " ".join(words) + ": say collect, pages, check or nothing")
    if not words:
        with ThreadPoolExecutor(2) as pool:
            if not all(list(pool.map(run, groups()))):
                sys.exit("some runs failed; `make results` tries them again")
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
