"""Make the README's numbers and figures: every run over five seeds, two at a time, resumable.

    make results                      run what is missing, then collect
    python docs/results.py collect    only collect what is there

A run is one `python afd.py` of one seed into out/results/NAME. One whose results.json is there is
not done again, so this may be stopped and started, and runs may come in any order. pi_0 does not
depend on the demonstrator: one run of each task and seed pretrains it, the others start from it.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RUNS = Path("out") / "results"
SEEDS, LEVELS = range(5), ("0", "0.25", "0.5", "0.75", "1")

# Settings whose policies are optimised too; elsewhere best-of-N, from 16 candidates, is enough.
POLICIES = {
    ("helpful", "0"): "--methods all --optimise floored,init-sft,init-demo,sft-demo,preference,"
                      "log-ratio --betas 0.3,1",
    ("harmless", "0"): "--methods all --optimise floored,init-sft,preference",
    ("helpful", "1"): "--methods po,closed-form --optimise floored,init-sft,init-demo",
}
FEW = {"100": "80", "300": "27", "1000": "8"}       # demonstrations: epochs, for as many steps
NOISE = ("0.2", "0.4")


def all_runs():
    """{name: (flags, the name of the run that pretrains its pi_0, or None)}, in a good order."""
    runs = {}
    for seed in SEEDS:
        for task in ("helpful", "harmless"):
            base = f"{task}-h0.5-s{seed}"
            for level in sorted(LEVELS, key=lambda level: level != "0.5"):
                flags = POLICIES.get((task, level), "--methods none --n-candidates 16")
                runs[f"{task}-h{level}-s{seed}"] = (
                    f"--task {task} --heterogeneity {level} --seed {seed} {flags}",
                    None if level == "0.5" else base)
        base = f"helpful-h0.5-s{seed}"
        for level in ("0", "1"):
            runs[f"last-h{level}-s{seed}"] = (
                f"--head last --heterogeneity {level} --seed {seed} --methods none "
                "--n-candidates 16", base)
        for n, epochs in FEW.items():
            runs[f"demos{n}-s{seed}"] = (
                f"--n-demos {n} --n-preferences {n} --sft-epochs {epochs} --seed {seed} --methods "
                "po,dpo --rewards init-sft,preference,floored --optimise init-sft,preference,floored"
                " --n-candidates 16", base)
        for noise in NOISE:
            runs[f"noise{noise}-s{seed}"] = (
                f"--label-noise {noise} --seed {seed} --methods po,dpo --rewards preference "
                "--optimise preference --n-candidates 16", base)
    return runs


def run(name, flags, base):
    """One run on one thread; what it prints goes to its log. Returns whether it ended well."""
    out = RUNS / name
    if (ROOT / out / "results.json").exists():
        return True
    seed = name.rpartition("s")[2]
    init = ["--init", str(RUNS / base / f"seed{seed}" / "init")] if base else []
    if base and not (ROOT / RUNS / base / "results.json").exists():
        return False
    (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "afd.py", *flags.split(), *init, "--out", str(out), "--overwrite"]
    with open(ROOT / RUNS / f"{name}.log", "w") as log:
        ended = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    print(f"{name}: {'done' if ended == 0 else f'failed with status {ended}, see its log'}",
          flush=True)
    return ended == 0


def main():
    runs = all_runs()
    if sys.argv[1:] != ["collect"]:
        for first in (True, False):         # those that pretrain pi_0 come first
            with ThreadPoolExecutor(2) as pool:
                mine = [(name, *rest) for name, rest in runs.items() if (rest[1] is None) == first]
                done = list(pool.map(lambda args: run(*args), mine))
            if not all(done):
                sys.exit("some runs failed; `make results` tries them again")


if __name__ == "__main__":
    main()
