"""What only a GPU can show, in one command of less than eight minutes:

    python tests/on_gpu.py                          on one H100 or H200
    python tests/on_gpu.py --device cpu --quick     the script itself, tiny, on a CPU

Is everything computed rightly there, how fast is it, and do whole runs work? Each step runs in a
worker process. One that fails, hangs or breaks the GPU's state costs a new worker and no other
step, and on_gpu.json is written after each. It needs no network, and no package but those of
requirements.txt, without matplotlib too; without transformers its parts are left out.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

import bench        # it makes the repository's modules importable
import gpu_checks
from bench import GPTConfig, cli, cuda, setting

import afd
import model

GPT2 = GPTConfig(50257, 1024, 768, 12, 12)
SMALL = ("--n-corpus 48 --n-demos 24 --n-samples 16 --n-prompts 2 --n-candidates 2 "
         "--policy-steps 1 --n-embd 16 --n-layer 1").split()


@dataclass
class Settings:
    """Correctness, speed and whole runs on one GPU: on_gpu.json."""
    out: str = setting("out/on_gpu", "folder for on_gpu.json and the runs")
    device: str = setting("auto", "auto, cuda or cpu")
    quick: bool = setting(False, "tiny sizes: a test of this script, not of a GPU")
    budget: float = setting(460.0, "seconds for all steps: what would not fit is left out", 1)


def prepare(s):
    """A worker's beginning. A CPU takes a GPU's place: the same lines run there."""
    global DEVICE, SHAPE
    os.environ["HF_HUB_OFFLINE"] = "1"
    DEVICE, SHAPE = cli.choose_device(s.device), gpu_checks.TINY if s.quick else GPT2
    if DEVICE.type == "cpu":
        cuda.COLUMNS["cpu"] = 64
        model.STATIC.add("cpu")
        torch.compile = partial(torch.compile, backend="eager")     # needs no C++


# ---- the card, and whether it computes the same --------------------------------------------------

def card(s):
    n = 256 if s.quick else 8192
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    took = bench.take_turns({"": lambda: [a @ a for _ in range(8)]}, 5, DEVICE)[""]
    ask = ["nvidia-smi", "--format=csv", "--query-gpu=name,driver_version,memory.total,power.limit"]
    return {**bench.describe_machine(DEVICE), "cuda": torch.version.cuda, "python": sys.version,
            "bf16_tflops": 8 * 2 * n ** 3 / min(took) / 1e12, "nvidia_smi": subprocess.run(
                ask, capture_output=True, text=True).stdout if shutil.which(ask[0]) else ""}


def agrees(s, what):
    return getattr(gpu_checks, what)(DEVICE, SHAPE)


def methods(s):
    """Every method of one tiny seed; the same run resumed after all its stages."""
    s = replace(s, budget=s.budget / 2)
    first = run(s, "methods", *SMALL, "--methods", "all")
    (Path(s.out) / "methods" / "seed0" / "results.json").unlink()
    again = run(s, "methods", *SMALL, "--methods", "all", "--resume")
    return {**first, **gpu_checks.check(resumed=(first["golden"] != again["golden"], 0))}


# ---- how fast; whole runs ------------------------------------------------------------------------

def ladder(s, rung):
    return bench.ladder(SHAPE, DEVICE, rung, *((2, 16, 6) if s.quick else (16, 1024, 14)))


def speed(s, part, *shape):
    return bench.beside(SHAPE, DEVICE, part, shape)


def run(s, name, *flags):
    """`python afd.py` in a process of its own: seconds, by stage, and each row's golden reward."""
    folder, start = Path(s.out).resolve() / name, time.perf_counter()
    if "--resume" not in flags:
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "afd.py", "--device", s.device, "--out", folder, *flags]
    done = subprocess.run(command, cwd=Path(afd.__file__).parent, timeout=s.budget, text=True,
                          capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result = json.loads((folder / "seed0" / "results.json").read_text())
    return {"wall": time.perf_counter() - start, "stages": result["seconds"],
            "golden": {row["name"]: row["golden"] for row in result["rows"]}}


def demos(s, *flags):
    """A GPT-2-shaped pi_0 on people's files: here the built-in language's texts."""
    sizes = dict(n_corpus=60, n_demos=30) if s.quick else dict(n_corpus=3000, n_demos=1000)
    world = afd.text_world(afd.Settings(**sizes), 0)
    for name, records in (("corpus", [{"text": text} for text in world.corpus]),
                          ("demos", [{"prompt": x, "response": y} for x, y in world.demos])):
        file = Path(s.out).resolve() / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, records)))
        flags += f"--{name}", str(file)
    return run(s, "demos", *flags)


def plan(s):
    """(name, seconds on an H100 at most, function, its arguments) of each step, in order."""
    sizes = ((4, 1, 8, 16), (2, 4, 8, 4, 16)) if s.quick else (
        (128, 1, 32, 256), (16, 8, 192, 16, 64))
    like_gpt2 = [*SMALL, "--methods", "none"] if s.quick else (
        "--n-embd 768 --n-layer 12 --n-samples 400 --n-prompts 40 --methods none --fast".split())
    return [("card", 20, card), ("logits", 20, agrees, "logits"),
            ("sampling", 15, agrees, "sampling"), ("training", 40, agrees, "training"),
            ("methods", 60, methods),
            *((f"step, {rung}", 15 + 45 * (i in (3, 4)), ladder, rung)
              for i, rung in enumerate(bench.RUNGS)),
            ("sample", 40, speed, "sample", *sizes[0]), ("score", 20, speed, "score", *sizes[1]),
            ("demo", 40, run, "demo", *(like_gpt2 if s.quick else ())),
            ("demos", 90, demos, *like_gpt2)]


def perform(steps, s):
    """Do each step in a worker, for twice its seconds at most; write on_gpu.json after each."""
    file, start, pool = cli.make_folder(s.out) / "on_gpu.json", time.perf_counter(), None
    results = {"config": asdict(s), "steps": {}}
    for name, most, function, *args in steps:
        began = time.perf_counter()
        left = s.budget - (began - start)
        try:
            if left < (0 if s.quick else most):
                raise TimeoutError(f"left out: {most} s, and {left:.0f} s of the budget are left")
            pool = pool or multiprocessing.get_context("spawn").Pool(1)
            limit = left if s.quick else min(left, 2 * most)
            pool.apply_async(prepare, (s,)).get(limit)
            limit -= time.perf_counter() - began
            # A program that a step starts has to end before its worker is stopped.
            step = pool.apply_async(function, (replace(s, budget=0.9 * limit), *args))
            record = step.get(limit)
        except Exception as error:      # whatever it was, the next step is to have its turn
            record = {"error": "".join(traceback.format_exception(error))[-3000:]}
            if pool:
                pool.terminate()
            pool = None
        results["steps"][name] = {**record, "took": time.perf_counter() - began}
        cli.write_json(file, results)
        print(f"{name}: {json.dumps(results['steps'][name])[:300]}", flush=True)
    if pool:
        pool.terminate()
    print(file)
    return results


def main(argv=None):
    s = cli.parse_settings(Settings, argv)
    return perform(plan(s), s)


if __name__ == "__main__":
    cli.run_script(main)
