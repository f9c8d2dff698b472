"""One small run of everything, number by number as it was when frozen_run.json was written.

A failure means that what afd.py computes has changed. If that was not meant, a random stream, a
source, a learning rate or a formula is wrong. If it was meant, docs/LOG.md should say why, and this
writes the numbers anew:

    python -m tests.test_frozen_run

The run is in double precision. In single precision another CPU or another number of threads rounds
differently by 1e-7. A sample flips where that decides between two words, and from there on the runs
part: with two threads instead of one, 3 of the 28 rows differed, by up to a quarter. In double
precision a flip is some 1e8 times as rare. There no number differed, neither between one and two
threads nor with ATEN_CPU_CAPABILITY=default, which is torch without the CPU's wide instructions.
"""

import json
import math
import tempfile
from pathlib import Path

import torch

import afd
from toy_envs.text_tasks import text_world
from utils.checkpoints import Run
from utils.cli import parse_settings

FROZEN = Path(__file__).with_name("frozen_run.json")
PARTS = ("rows", "best_of_n", "reward_models")
TOLERANCE = 1e-5        # relative, and absolute for numbers below 1
FLAGS = ["--n-corpus", "600", "--n-demos", "200", "--n-samples", "200", "--n-prompts", "12",
         "--n-candidates", "16", "--policy-steps", "3", "--heterogeneity", "0.5", "--n-embd", "32",
         "--n-layer", "1", "--methods",
         "po init-sft 0.3, po floored 0.3, closed-form log-ratio 0.3, closed-form floored 0.3, "
         "adversarial reverse_kl, adversarial forward_kl, adversarial-exact reverse_kl, "
         "adversarial-exact forward_kl, spin, irft, dpo"]


def run_everything(folder, threads=1):
    """The parts of the run's results that are compared: no figures, no report, no seconds."""
    s = parse_settings(afd.Settings, FLAGS)
    afd.check(s)
    world, before = text_world(s, s.seed), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(threads)
    try:
        results = afd.run(s, world, Run(folder, s.seed, torch.device("cpu"), world.tokenizer))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(before)
    return {part: results[part] for part in PARTS}


def same(now, frozen):
    if isinstance(frozen, float) and isinstance(now, float):
        return math.isclose(now, frozen, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return now == frozen


def test_the_run_is_as_it_was(tmp_path):
    frozen, now = json.loads(FROZEN.read_text()), run_everything(tmp_path)
    for part in PARTS:
        for record, expected in zip(now[part], frozen[part], strict=True):
            changed = [f"{name}: {record.get(name)}, not {value}"
                       for name, value in expected.items() if not same(record.get(name), value)]
            assert not changed, (part, expected)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        results = run_everything(folder)
    lines = {part: ",\n".join(map(json.dumps, results[part])) for part in PARTS}
    FROZEN.write_text("{" + ",\n".join(f'"{p}": [\n{text}]' for p, text in lines.items()) + "}\n")
    print(FROZEN)
