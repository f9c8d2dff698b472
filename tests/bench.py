"""How fast it is: ours beside plain and transformers' code on the same inputs, in one run.

    python tests/bench.py                              every part
    python tests/bench.py --parts train,sample --size toy

    train    a training step: `plain` is nanoGPT's (logits at every position, AdamW as torch has it)
    sample   `recompute` encodes the whole sequence anew for each token; `transformers` has a cache
    score    rewards of prompts' candidates; `trunk` is a bare forward pass of the same tokens
    scaling  time and memory against N, prompts and tokens: bench.png
    afd      `python afd.py`, stage by stage

The implementations take turns; a ratio is another's time over ours, the median over the rounds.
The models are random, nothing ends a response: all write the same number of tokens. Memory is the
peak of a process of its own less what it held before the model was made; on CUDA, the allocator's.
"""

import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))       # this script lives in tests/

import train                                                                # noqa: E402
from model import (GPT, GPTConfig, InputError, collate,       # noqa: E402
                   sample_responses, write_json)
from reward import RewardModel, score                                       # noqa: E402
from utils.batches import item_length, length_batches                    # noqa: E402
from utils.plots import pyplot, save_figure                            # noqa: E402
from utils.cli import (choose_device, make_folder, parse_settings,       # noqa: E402
                           run_script, setting)


@dataclass
class Settings:
    """Throughput and memory beside a plain implementation and transformers, on the same inputs."""
    parts: str = setting("train,sample,score,scaling,afd", "which parts, with commas")
    size: str = setting("toy,gpt2", "model sizes for train, sample and score, with commas")
    repeats: int = setting(7, "rounds at the toy size; GPT-2 on a CPU gets 3 at most")
    device: str = setting("auto", "auto, cpu or cuda")
    memory: bool = setting(True, "measure peak memory too: one more process for each number")
    out: str = setting("out/bench", "folder for bench.json and bench.png")


# The models; {shape of a case: the project's aims for its ratios on two CPU cores}, by part:
#   train   items a step, steps, shortest and longest prompt, shortest and longest response
#   sample  prompts, candidates of each, prompt length, new tokens
#   score   prompts, candidates of each, prompt length, shortest and longest response
SIZES = {
    "toy": (GPTConfig(512, 64, 96, 3, 4), {
        "train": {(16, 32, 8, 16, 12, 28): {"plain": 1.1, "transformers": 1.5}},
        "sample": {(1, 1, 8, 56): {}, (128, 1, 8, 56): {"recompute": 12.0, "transformers": 3.0},
                   (1024, 1, 8, 56): {}, (1, 1, 48, 16): {}, (128, 1, 48, 16): {},
                   (8, 16, 48, 16): {}},
        "score": {(64, 16, 8, 8, 48): {"trunk": 1.0}, (64, 16, 40, 8, 24): {"trunk": 1.0}}}),
    "gpt2": (GPTConfig(50257, 256, 768, 12, 12), {
        "train": {(8, 1, 0, 0, 256, 256): {"plain": 1.0, "transformers": 1.0}},
        "sample": {(1, 1, 32, 64): {}, (4, 1, 32, 64): {"transformers": 1.3},
                   (4, 1, 192, 64): {}, (1, 8, 192, 32): {}},
        "score": {(2, 4, 192, 16, 64): {"trunk": 1.0}}}),
}
TRANSFORMERS = next((d.version for d in metadata.distributions(name="transformers")), None)
# Dense bf16 peaks in FLOP/s by card name, the first that fits; from NVIDIA's data sheets (those of
# H100, H200 and L4 print twice as much, with sparsity).
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
         "NVIDIA L4": 121e12}


ROW = ("{part:7}{size:5}{shape:17}{name:13}{seconds:>9.4f}{min:>9.4f}{max:>9.4f}"
       "{tokens_per_second:>18,.0f}{ratio:>7.2f}{goal:>6.1f}{peak_mb:>9.0f}{mfu:>6.1%}")


# ---- the implementations: (tokens of a call, its FLOPs or nan, {name: how to make a function}) ---

def hugging_face(config, device, head="AutoModelForCausalLM"):
    """transformers' GPT-2 of the same size, without dropout and without an end of text."""
    import transformers
    transformers.logging.set_verbosity_error()
    theirs = transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.n_positions, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)
    return getattr(transformers, head).from_config(theirs, attn_implementation="sdpa").to(device)


def random_ids(rng, config, shortest, longest):
    return [rng.randrange(config.vocab_size) for _ in range(rng.randint(shortest, longest))]


def inputs(model, items):
    """(token ids, labels: -100 where no loss is)."""
    batch = collate([pair for (pair,) in items], train.device_of(model))
    return batch.tokens, batch.tokens.masked_fill(~batch.response_mask(), -100)


def plain_loss(model, items):
    tokens, labels = inputs(model, items)
    logits = model(tokens)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def transformers_loss(model, items):
    tokens, labels = inputs(model, items)       # padding on the right needs no attention mask
    return model(tokens, labels=labels, use_cache=False).loss


def plain_loop(model, loss_fn, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for items in batches:
        loss_fn(model, items).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train_case(config, device, batch_size, steps, *ranges):
    """A short run of `fit` against the same batches in a plain loop; each makes its optimiser."""
    rng = random.Random(0)
    items = [((random_ids(rng, config, *ranges[:2]), random_ids(rng, config, *ranges[2:])),)
             for _ in range(steps * batch_size)]
    batches = length_batches(items, batch_size, random.Random(0))
    ours = train.nll_loss, train.Schedule(batch_size=batch_size), random.Random(0)
    make = {"ours": lambda: partial(train.fit, GPT(config).to(device), items, *ours),
            "plain": lambda: partial(plain_loop, GPT(config).to(device), plain_loss, batches),
            "transformers": lambda: partial(plain_loop, hugging_face(config, device),
                                            transformers_loss, batches)}
    # (6 N + 12 L D T) T for T tokens, N the parameters but for the positions (arXiv:2204.02311, B)
    lengths, D, L = [item_length(item) for item in items], config.n_embd, config.n_layer
    N = config.vocab_size * D + L * (12 * D * D + 13 * D) + 2 * D
    return sum(lengths), sum((6 * N + 12 * L * D * T) * T for T in lengths), make


@torch.inference_mode()
def recompute(model, prompts, new):
    """nanoGPT's sampler: the whole sequence again for each token, logits at its end alone."""
    for _ in range(new):
        logits = model.logits(model.hidden(prompts)[:, -1])
        prompts = torch.cat([prompts, torch.multinomial(logits.softmax(-1), 1)], 1)
    return prompts


def sample_case(config, device, P, n, T, new):
    rng = random.Random(0)
    prompts = torch.tensor([random_ids(rng, config, T, T) for _ in range(P)], device=device)

    def theirs():
        from transformers import GenerationConfig
        how = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                               max_new_tokens=new, num_return_sequences=n, pad_token_id=0)
        return partial(hugging_face(config, device).generate, prompts, generation_config=how,
                       attention_mask=torch.ones_like(prompts))
    make = {"ours": lambda: partial(GPT(config).to(device).generate, prompts, new, n=n),
            "recompute": lambda: partial(recompute, GPT(config).to(device),
                                         prompts.repeat_interleave(n, 0), new),
            "transformers": theirs}
    if config.n_embd > 96 or P * n > 128:       # it would take minutes, to show nothing new
        del make["recompute"]
    return P * n * new, math.nan, make


@torch.inference_mode()
def forward_pass(trunk, pairs, device):
    """The batches that `score` makes, by length and 256 at a time, through a bare trunk."""
    pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    for i in range(0, len(pairs), 256):
        trunk(collate(pairs[i:i + 256], device).tokens)


def score_case(config, device, P, n, T, *response):
    rng = random.Random(0)
    prompts = [random_ids(rng, config, T, T) for _ in range(P)]
    pairs = [(prompt, random_ids(rng, config, *response)) for prompt in prompts for _ in range(n)]
    make = {"ours": lambda: partial(score, RewardModel(GPT(config).to(device)), pairs, device, n=n),
            "trunk": lambda: partial(forward_pass, GPT(config).to(device).hidden, pairs, device),
            "transformers": lambda: partial(forward_pass, hugging_face(config, device, "AutoModel"),
                                            pairs, device)}
    return sum(len(x) + len(y) for x, y in pairs), math.nan, make


def best_case(config, device, P, n, rows):
    """The best reward of n candidates for each of P prompts, `rows` of a prompt's at a time."""
    rng = random.Random(0)
    prompts = [random_ids(rng, config, 8, 8) for _ in range(P)]

    def run(reward, best=-math.inf):
        for start in range(0, n, rows):
            ys = sample_responses(reward.trunk, prompts, min(rows, n - start), 32, None, None)
            pairs = [(prompts[i], y) for i in range(P) for y in ys[i]]
            best = np.maximum(best, score(reward, pairs, device).reshape(P, -1).max(1))
        return best
    return P * n * 32, math.nan, {"ours": lambda: partial(run, RewardModel(GPT(config).to(device)))}


CASES = {"train": train_case, "sample": sample_case, "score": score_case, "best": best_case}


# ---- measuring ----------------------------------------------------------------------------------

def take_turns(functions, repeats, device):
    """{name: seconds of each round}: A B C, A B C, ... after a round to warm up."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: took[1:] for name, took in times.items()}


def peak_rss():
    """The process's largest resident memory so far, MB."""
    status = Path("/proc/self/status")      # Linux's ru_maxrss starts at the parent's
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20     # macOS: bytes
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2 ** 10


def peak_of(part, size, shape, name, device):
    """What one call adds to the peak memory, its model included, MB; in a process of its own."""
    if TRANSFORMERS:    # code is no one's memory: all import all of it before
        from transformers import GenerationConfig, GPT2LMHeadModel      # noqa: F401
    held = peak_rss()
    CASES[part](SIZES[size][0], device, *shape)[2][name]()()
    cuda = device.type == "cuda"
    return torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else peak_rss() - held


def peak_apart(*case):
    """peak_of a case in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_of, *case).result()


def measure(part, size, shape, goals, repeats, device, memory, peak_flops):
    """Compare the implementations of one case: a record of each."""
    tokens, flops, make = CASES[part](SIZES[size][0], device, *shape)
    names = [name for name in make if name != "transformers" or TRANSFORMERS]
    peaks = {name: peak_apart(part, size, shape, name, device)
             for name in names if memory and goals}
    times, records = take_turns({name: make[name]() for name in names}, repeats, device), []
    for name, took in times.items():
        median = statistics.median(took)
        ratio = statistics.median(t / own for t, own in zip(took, times["ours"]))
        records.append({
            "part": part, "size": size, "shape": ",".join(map(str, shape)), "name": name,
            "seconds": median, "min": min(took), "max": max(took), "tokens": tokens,
            "tokens_per_second": tokens / median, "ratio": ratio,
            "goal": goals.get(name, math.nan), "peak_mb": peaks.get(name, math.nan),
            "mfu": flops / median / peak_flops})
        print(ROW.format(**records[-1]), flush=True)
    return records


# ---- how the cost grows, and a whole run --------------------------------------------------------

def scaling(repeats, device):
    """{x axis: {line: {x: seconds, or MB}}} at the toy size (with 256 positions for the tokens)."""
    config, powers = SIZES["toy"][0], [2 ** i for i in range(13)]
    model = GPT(replace(config, n_positions=256)).to(device)
    start = torch.zeros(16, 8, dtype=torch.long, device=device)

    def best(*shape):
        return best_case(config, device, *shape)[2]["ours"]()
    jobs = {"N, of one prompt": {"256 at a time": {n: best(1, n, 256) for n in powers[:11]}},
            "prompts": {"best of 16": {P: best(P, 16, 16) for P in powers[:8]}},
            "new tokens, 16 rows": {
                "cache": {t: partial(model.generate, start, t) for t in powers[3:8]},
                "recompute": {t: partial(recompute, model, start, t) for t in powers[3:8]}}}
    curves = {x: {line: {n: statistics.median(took) for n, took
                         in take_turns(points, repeats, device).items()}
                  for line, points in lines.items()} for x, lines in jobs.items()}
    curves["N, of one prompt (memory)"] = {
        line: {n: peak_apart("best", "toy", (1, n, rows or n), "ours", device) for n in powers[8:]}
        for line, rows in (("256 at a time", 256), ("at once", 0))}
    return curves


def draw_scaling(curves, path):
    """One log-log panel for each x axis; slopes in the legends."""
    figure, axes = pyplot().subplots(1, len(curves), figsize=(13, 3.2))
    for axis, (x, lines) in zip(axes, curves.items()):
        for line, points in lines.items():
            upper = np.log(sorted(points.items())[len(points) // 2:])   # half of them; 1 is linear
            axis.plot(*zip(*points.items()), "o-", markersize=3,
                      label=f"{line}: slope {np.polyfit(*upper.T, 1)[0]:.2f}")
        axis.set(xlabel=x, ylabel="peak, MB" if "memory" in x else "seconds", yscale="log")
        axis.set_xscale("log", base=2)
        axis.yaxis.set_minor_formatter("")
        axis.legend()
    figure.suptitle("Slope 1: the cost grows linearly (slopes of the upper half); candidates taken "
                    "256 at a time keep the memory flat", fontsize=10)
    return save_figure(figure, path)


def afd_seconds(device):
    """Seconds of each stage of `python afd.py`, and of all of it by the clock."""
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        subprocess.run([sys.executable, "afd.py", "--out", out, "--device", str(device)], cwd=ROOT,
                       stdout=subprocess.DEVNULL, check=True)
        wall = time.perf_counter() - start
        stages, = json.loads((Path(out) / "results.json").read_text())["seconds"].values()
    return {**stages, "all": wall}


def machine(device):
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return {"device": str(device), "cpu": cpu[1] if cpu else platform.processor(), "card": card,
            "peak_flops": next((PEAKS[name] for name in PEAKS if name in card), math.nan),
            "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "dtype": "float32",
            "torch": torch.__version__, "transformers": TRANSFORMERS}


def main(argv=None):
    s = parse_settings(Settings, argv)
    parts, sizes = s.parts.split(","), s.size.split(",")
    known = {"train", "sample", "score", "scaling", "afd"}
    if not {*parts} <= known or not {*sizes} <= {*SIZES} or s.repeats < 1:
        raise InputError("--parts, --size or --repeats: not among what --help names")
    device, out = choose_device(s.device), make_folder(s.out)
    results = {"config": asdict(s), "machine": machine(device), "records": []}
    print(results["machine"])
    head = re.sub(r"(\d)[,.][^}]*", r"\1", ROW)
    print(head.format(**{name: name for name in re.findall(r"{(\w+)", ROW)}))
    for size, part in ((size, part) for size in sizes for part in SIZES[size][1] if part in parts):
        repeats = min(s.repeats, 3) if size == "gpt2" and device.type == "cpu" else s.repeats
        for shape, goals in SIZES[size][1][part].items():
            results["records"] += measure(part, size, shape, goals, repeats, device, s.memory,
                                          results["machine"]["peak_flops"])
            write_json(out / "bench.json", results)
    if "scaling" in parts:
        results["scaling"] = scaling(min(s.repeats, 3), device)
        write_json(out / "bench.json", results)     # before the picture, which needs matplotlib
        print(f"scaling {draw_scaling(results['scaling'], out / 'bench.png')}")
    if "afd" in parts:
        results["afd"] = afd_seconds(device)
        for stage, took in results["afd"].items():
            print(f"afd     {stage:20}{took:>8.2f} s")
    write_json(out / "bench.json", results)
    print(out / "bench.json")


if __name__ == "__main__":
    run_script(main)
