"""Make the pages' numbers and figures: every run over five seeds, two at a time, resumable.

    make results                      run what is missing, then collect
    python docs/results.py collect    only collect what is there
    python docs/results.py pages      only the pages and figures, from docs/results.json

A run is one `python afd.py` of one seed into out/results/NAME. One whose results.json is there is
not done again, so this may be stopped and started, and runs may come in any order. pi_0 does not
depend on the demonstrator: one run of each task and seed pretrains it, the others start from it.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))       # this script lives in docs/

from model import write_json                                            # noqa: E402
from reward import mean_ci                                              # noqa: E402
from utils.plots import (draw_best_of_n, draw_frontier, draw_heterogeneity,   # noqa: E402
                              pyplot)
from utils.evaluate import WRITERS, name_of, summarise                  # noqa: E402

RUNS = Path("out") / "results"
COLLECTED = ROOT / "docs" / "results.json"
BENCH = ROOT / "docs" / "bench.json"    # what `python tests/bench.py` wrote
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")      # hold tables between markers
SEEDS, MORE_SEEDS = range(5), range(5, 10)
LEVELS = ("0", "0.25", "0.5", "0.75", "1")
SMALL = "--n-embd 16 --n-layer 1"       # a policy short of capacity

# Settings whose policies are optimised too; elsewhere best-of-N, from 16 candidates, is enough.
POLICIES = {
    ("helpful", "0"): "--methods all --optimise floored,init-sft,init-demo,preference,log-ratio "
                      "--betas 0.3,0.1,1,3",
    ("harmless", "0"): "--methods all --optimise floored,init-sft",
    ("helpful", "1"): "--methods po,closed-form --optimise floored,init-sft",
}
SELECT = "--methods none --n-candidates 16"
# pi_0 and as little else as afd.py does.
PI_0 = ("--methods none --rewards log-ratio --n-demos 2 --n-samples 2 --n-prompts 1 "
        "--n-candidates 1")
FEW = {"100": "80", "300": "27", "1000": "8"}       # demonstrations: epochs, for as many steps
NOISE = ("0.1", "0.2", "0.4")


def settings():
    """{name of a setting: (task, flags)}, the more important ones first."""
    found = {f"{task}-h{level}": (task, f"--task {task} --heterogeneity {level} {flags}")
             for (task, level), flags in POLICIES.items()}
    for task, level in ((task, level) for level in LEVELS for task in ("helpful", "harmless")):
        found.setdefault(f"{task}-h{level}",
                         (task, f"--task {task} --heterogeneity {level} {SELECT}"))
    for level in ("0", "1"):
        found[f"last-h{level}"] = "helpful", f"--head last --heterogeneity {level} {SELECT}"
    found["more-h1"] = "helpful", f"--heterogeneity 1 {SELECT}"     # five further seeds
    found["small"] = "small", (f"{SMALL} --methods adversarial,adversarial-exact --rewards "
                               "log-ratio --n-candidates 2")
    for n, epochs in FEW.items():
        found[f"demos{n}"] = "helpful", (f"--n-demos {n} --n-preferences {n} --sft-epochs {epochs} "
                                         "--methods po --rewards init-sft,preference,floored "
                                         "--n-candidates 16")
    for noise in NOISE:
        found[f"noise{noise}"] = "helpful", (f"--label-noise {noise} --methods po,dpo --rewards "
                                             "preference --optimise preference --n-candidates 16")
    return found


def all_runs():
    """{name: (flags, the name of the run that pretrains its pi_0, or None)}."""
    runs = {}
    for setting, (task, flags) in settings().items():
        for seed in MORE_SEEDS if setting == "more-h1" else SEEDS:
            base = f"pi0-{task}-s{seed}"
            size = SMALL if task == "small" else f"--task {task}"
            runs[base] = f"{size} --seed {seed} {PI_0}", None
            runs[f"{setting}-s{seed}"] = f"{flags} --seed {seed}", base
    return runs


def run(name, flags, base):
    """One run on one thread; what it prints goes to its log. Returns whether it ended well."""
    out = RUNS / name
    seed = name.rpartition("s")[2]
    init = ["--init", str(RUNS / base / f"seed{seed}" / "init")] if base else []
    if base and not (ROOT / RUNS / base / "results.json").exists():
        return False
    (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
    command = ["afd.py", *flags.split(), *init, "--out", str(out), "--overwrite"]
    done = ROOT / out / "results.json"
    mine = f"python afd.py {flags} "
    if done.exists() and json.loads(done.read_text())["command"].startswith(mine):
        return True
    start = time.perf_counter()
    with open(ROOT / RUNS / f"{name}.log", "w") as log:
        ended = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log,
                               stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    said = "done" if ended == 0 else f"failed with status {ended}, see its log"
    print(f"{name}: {said}, {time.perf_counter() - start:.0f} s", flush=True)
    return ended == 0


# ---- collecting ---------------------------------------------------------------------------------

def short(value):
    """Numbers to five digits: enough for every table, and a file of modest size."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.5g}")
    return value


def collect():
    """One record of all runs: rows, what the reward models learned and curves of the policies, each
    with the group (setting), task, heterogeneity and seed of its run; command and seconds of each.
    """
    data = {"runs": {}, "rows": [], "reward_models": [], "curves": []}
    for name in (name for name, (_, base) in all_runs().items() if base):
        path = ROOT / RUNS / name / "results.json"
        setting = name.rpartition("-s")[0]
        seeds = MORE_SEEDS if setting == "more-h1" else SEEDS
        if not all((ROOT / RUNS / f"{setting}-s{k}" / "results.json").exists() for k in seeds):
            print(f"{name}: left out until all seeds of {setting} are there")
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        config = results["config"]
        key = {"group": setting, "task": config["task"],
               "heterogeneity": config["heterogeneity"], "seed": config["seed"]}
        data["runs"][name] = {"command": results["command"], "versions": results["versions"],
                              "seconds": next(iter(results["seconds"].values()))}
        ns = {1, 16} if config["methods"] == [] else {2 ** k for k in range(7)}
        data["rows"] += [{**key, **{k: short(v) for k, v in row.items()}}
                         for row in results["rows"] if row["n"] in ns]
        data["reward_models"] += [{**key, **{k: short(v) for k, v in record.items()}}
                                  for record in results["reward_models"]]
        for label, history in next(iter(results["curves"].values())).items():
            for start in range(0, len(history), 10):        # means over ten steps
                stretch = history[start:start + 10]
                data["curves"].append({**key, "name": label, **{
                    k: short(sum(r[k] for r in stretch) / len(stretch)) for k in stretch[0]}})
    if not data["runs"]:
        sys.exit(f"error: no setting's seeds are all in {RUNS}; {COLLECTED} is left as it was")
    write_json(COLLECTED, data, indent=None)
    return data


def values(data, group, name, column="gold_mean", n=16):
    """{seed: value} of one column of one writer; best-of-n at this n."""
    return {r["seed"]: r[column] for r in data["rows"] if r["group"] == group
            and name_of(r) == name and r["n"] == (n if r["method"] == "bon" else 1)
            and r[column] is not None}


def differences(data, groups, a, b, n=16, m=16):
    """Golden reward of a (best-of-n) minus that of b (best-of-m), paired over all seeds of the
    groups."""
    pairs = [(values(data, group, a, n=n), values(data, group, b, n=m)) for group in groups]
    return cell(x[k] - y[k] for x, y in pairs for k in sorted(x.keys() & y.keys()))


def shares(data, group):
    """{name: (mean, half-width)} of the share of the golden selector's gain at n = 16, over seeds;
    nothing where the setting has not been run."""
    rows = [r for r in data["rows"] if r["group"] == group]
    methods = summarise(rows, 16)["methods"]
    return {name: method["share_of_golden_gain"] for name, method in methods.items()}


def cell(numbers, form="{:.2f}"):
    """mean ± 95% half-width over seeds, or a dash."""
    numbers = list(numbers)
    if not numbers:
        return "–"
    mean, half = mean_ci(numbers)
    return form.format(mean) + ("" if math.isnan(half) else " ± " + form.format(half))


def percent(share):
    return "–" if share is None else " ± ".join(f"{100 * x:.0f}%" for x in share)


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- the tables of the pages --------------------------------------------------------------------

SELECTORS = ("init-sft", "init-demo", "sft-demo", "preference", "log-ratio", "floored", "length",
             "random")
DIFFERENCES = (("init-sft", "sft"), ("init-sft", "demo"), ("init-sft", "init-demo"),
               ("init-demo", "sft-demo"), ("log-ratio", "init-sft"), ("floored", "init-sft"),
               ("floored", "golden"))
# Goals of policy optimisation and of the comparison with the neighbours; n is best-of-N's.
GOALS = (("init-sft", 16, "spin", 1), ("init-sft", 16, "irft", 1),
         ("init-sft", 16, "adversarial reverse_kl", 1), ("init-sft", 16, "dpo", 1),
         ("po init-sft 0.3", 1, "init-sft", 16), ("po init-sft 0.3", 1, "init-sft", 64),
         ("po floored 0.3", 1, "init-sft", 64), ("closed-form floored 0.3", 1, "init-sft", 64),
         ("closed-form floored 0.3", 1, "po floored 0.3", 1))
# The README's own table: what each way to write earns, in every world.
MAIN = ("init", "sft", "demo", *SELECTORS[:6], "golden", "po init-sft 0.3", "po floored 0.3",
        "closed-form log-ratio 0.3", "closed-form floored 0.3", "adversarial reverse_kl", "spin",
        "irft", "dpo")
WORLDS = {f"{task}, h = {h}": f"{task}-h{h}" for task in ("helpful", "harmless") for h in "01"}
COLUMNS = (("golden", "gold_mean", "{:.2f}"), ("win/SFT", "win_vs_sft", "{:.2f}"),
           ("win/demo", "win_vs_demo", "{:.2f}"), ("KL", "kl_from_sft", "{:.1f}"),
           ("entropy", "entropy", "{:.1f}"), ("distinct", "distinct", "{:.2f}"),
           ("rev. KL", "reverse_kl", "{:.1f}"), ("fwd. KL", "forward_kl", "{:.1f}"),
           ("seconds", "seconds", "{:.0f}"))


def methods_table(data, group):
    """Every writer of one setting: best-of-16 and, of the reward models, best-of-64 too."""
    names = list(dict.fromkeys(name_of(r) for r in data["rows"] if r["group"] == group
                               and r["beta"] in (None, 0.1, 0.3, 1)))   # all: in the figure
    rows = []
    for name in names:
        bon = any(r["method"] == "bon" for r in data["rows"]
                  if r["group"] == group and name_of(r) == name)
        for n in ((16, 64) if bon and name not in ("length", "random") else (16,)):
            label = f"best of {n}, {name}" if bon else WRITERS.get(name, name)
            cells = [values(data, group, name, column, n).values() for _, column, _ in COLUMNS]
            rows.append([label, cell(cells[0]), *(
                form.format(sum(c) / len(c)) if c else "–"
                for c, (_, _, form) in zip(cells[1:], COLUMNS[1:]))])
    return markdown(["writer", *(title for title, _, _ in COLUMNS)], rows)


def main_table(data):
    """Golden reward of the writers of MAIN in every world, and their KL in the first one."""
    picked = {r["reward_model"] for r in data["rows"] if r["method"] == "bon"}
    kl = {name: values(data, "helpful-h0", name, "kl_from_sft").values() for name in MAIN}
    return markdown(["golden reward, points", *WORLDS, "KL, nats"], [
        [f"best of 16, {name}" if name in picked else WRITERS.get(name, name),
         *(cell(values(data, group, name).values()) for group in WORLDS.values()),
         f"{sum(kl[name]) / len(kl[name]):.1f}" if kl[name] else "–"] for name in MAIN])


def seek_table(data):
    """What a policy that can, and one that cannot, write all that the demonstrator does gives up
    for the divergence that is minimised."""
    forms = {"gold_mean": "{:.2f}", "reverse_kl": "{:.1f}", "forward_kl": "{:.1f}",
             "entropy": "{:.1f}"}
    names = ["sft", *(f"{method} {name}" for method in ("adversarial", "adversarial-exact")
                      for name in ("forward_kl", "reverse_kl"))]
    return markdown(["policy", "golden", "rev. KL", "fwd. KL", "entropy"], [
        [f"{size}, {WRITERS.get(name, name)}", *(
            cell(values(data, group, name, column).values(), form)
            for column, form in forms.items())]
        for size, group in (("large", "helpful-h0"), ("small", "small")) for name in names])


def speed_table():
    """Our tokens per second, and how many times as long the others take: of bench.py's cases."""
    cases, says = {}, {
        "train": "training step {0}, {2}–{3} + {4}–{5}", "sample": "sampling {0} × {1}, {2} + {3}",
        "score": "scoring {0} × {1}, {2} + {3}–{4}"}
    for r in json.loads(BENCH.read_text(encoding="utf-8"))["records"]:
        what = re.sub(r"\b(\d+)–\1\b", r"\1", says[r["part"]].format(*r["shape"].split(",")))
        simple = r["name"] not in ("ours", "transformers")
        cases.setdefault((r["size"], what), {})["simple" if simple else r["name"]] = r

    def against(r):
        return "–" if r is None else f"{r['ratio']:.2f}" + (
            f" (aim {r['goal']:g})" if r["goal"] else "")
    return markdown(["model", "case", "tokens/s", "simple version", "transformers"], [
        [size, what, f"{rs['ours']['tokens_per_second']:,.0f}", against(rs.get("simple")),
         against(rs.get("transformers"))] for (size, what), rs in cases.items()])


def tables(data):
    """{marker: table} for the pages."""
    heads = {"sum, h = 0": "helpful-h0", "sum, h = 1": "helpful-h1", "last, h = 0": "last-h0",
             "last, h = 1": "last-h1"}
    few = {**{n: f"demos{n}" for n in FEW}, "4000": "helpful-h0"}
    noises = {"0": "helpful-h0", **{noise: f"noise{noise}" for noise in NOISE}}
    learners = ("sft", "init-sft", "po init-sft 0.3", "floored", "preference")
    made = {
        "MAIN": main_table(data),
        "SHARES": markdown(["selector", *heads], [
            [name, *(percent(shares(data, group).get(name)) for group in heads.values())]
            for name in SELECTORS]),
        "TEN": markdown(["difference at h = 1, ten seeds", "points"], [
            [f"{a} − {b}", differences(data, ["helpful-h1", "more-h1"], a, b)]
            for a, b in DIFFERENCES[:4]]),
        "DIFFS": markdown(["difference, points", *list(heads)[:2]], [
            [f"{a} − {b}", *(differences(data, [group], a, b)
                             for group in ("helpful-h0", "helpful-h1"))]
            for a, b in DIFFERENCES]),
        "GOALS": markdown(["difference, points", "helpful, h = 0", "harmless, h = 0"], [
            [" − ".join(f"best of {n}, {name}" if n > 1 else name for name, n in ((a, n), (b, m))),
             *(differences(data, [group], a, b, n, m) for group in ("helpful-h0", "harmless-h0"))]
            for a, n, b, m in GOALS]),
        "HELPFUL": methods_table(data, "helpful-h0"),
        "HARMLESS": methods_table(data, "harmless-h0"),
        "HELPFUL1": methods_table(data, "helpful-h1"),
        **{f"HETEROGENEITY {task}": markdown(["selector", *(f"h = {h}" for h in LEVELS)], [
            [name, *(percent(shares(data, f"{task}-h{h}").get(name)) for h in LEVELS)]
            for name in SELECTORS[:6]]) for task in ("helpful", "harmless")},
        "DEMOS": markdown(["golden reward", *few], [
            [name, *(cell(values(data, group, name).values()) for group in few.values())]
            for name in learners]),
        "NOISE": markdown(["golden reward", *(f"{float(noise):.0%}" for noise in noises)], [
            [name, *(cell(values(data, group, name).values()) for group in noises.values())]
            for name in ("preference", "po preference 0.3", "dpo")]),
        "SEEK": seek_table(data),
        "SPEED": speed_table(),
    }
    there = {row["group"] for row in data["rows"]}
    missing = {"DEMOS": set(few.values()) - there, "NOISE": set(noises.values()) - there,
               "SEEK": {"small"} - there, "TEN": {"more-h1"} - there}
    return {name: table for name, table in made.items() if not missing.get(name)}


def quoted(data, recipe):
    """The number of a sentence: "share GROUP: NAME", of the golden selector's gain at N = 16, or
    "golden GROUP[, GROUP]: NAME[ less NAME]"; "NAME of 64" is best-of-64."""
    kind, groups, names = re.fullmatch(r"(share|golden) (.+?): (.+)", recipe).groups()
    if kind == "share":
        return percent(shares(data, groups)[names])
    (a, n), *other = [(name.removesuffix(" of 64"), 64 if name.endswith(" of 64") else 16)
                      for name in names.split(" less ")]
    if not other:
        return cell(values(data, groups, a, n=n).values())
    [(b, m)] = other
    return differences(data, groups.split(", "), a, b, n, m)


def fill(text, made, data):
    """A page with each table between its markers <!-- NAME --> and <!-- end -->, and each number of
    its sentences that a comment <!-- = RECIPE --> follows."""
    for name, table in made.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)",
                      lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.S)
    return re.sub(r"[-\d.%]+ ± [\d.%]+(<!-- = (.+?) -->)",
                  lambda found: quoted(data, found[2]) + found[1], text)


def figures(data, folder):
    plt = pyplot()
    for group in ("helpful-h0", "helpful-h1"):
        rows = [r for r in data["rows"] if r["group"] == group]
        draw_best_of_n(plt, rows, folder / f"best_of_n_h{group[-1]}.png")
        curves = [c for c in data["curves"] if c["group"] == group and c["name"][:3] == "po "]
        draw_frontier(plt, rows, curves, folder / f"frontier_h{group[-1]}.png")
    draw_heterogeneity(plt, {(task, name, float(h)): share
                             for task in ("helpful", "harmless") for h in LEVELS
                             for name, share in shares(data, f"{task}-h{h}").items()
                             if name in SELECTORS[:6]}, folder / "heterogeneity_sweep.png")


def main():
    runs, words = all_runs(), sys.argv[1:]
    if words in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    if words not in ([], ["collect"], ["pages"]):
        sys.exit("error: " + " ".join(words) + ": say collect, pages or nothing")
    if not words:
        for first in (True, False):         # those that pretrain pi_0 come first
            with ThreadPoolExecutor(2) as pool:
                mine = [(name, *rest) for name, rest in runs.items() if (rest[1] is None) == first]
                done = list(pool.map(lambda args: run(*args), mine))
            if not all(done):
                sys.exit("some runs failed; `make results` tries them again")
    data = json.loads(COLLECTED.read_text(encoding="utf-8")) if words == ["pages"] else collect()
    made = tables(data)
    for page in PAGES:
        text = fill(page.read_text(encoding="utf-8"), made, data)
        page.write_text(text, encoding="utf-8")
    figures(data, ROOT / "docs" / "figures")
    print(f"{COLLECTED}: the tables of {', '.join(map(str, PAGES))} and docs/figures are of it")


if __name__ == "__main__":
    main()
