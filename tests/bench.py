"""How fast it is: ours beside plain and transformers' code on the same inputs, in one run.

    python tests/bench.py                              every part
    python tests/bench.py --parts train,sample --size toy

    train    a training step: `plain` is nanoGPT's (logits at every position, AdamW as torch has it)
    sample   `recompute` encodes the whole sequence anew for each token; `transformers` has a cache
    score    rewards of candidates; `trunk` is a bare forward pass of the same tokens

The implementations take turns; a ratio is another's time over ours, the median over the rounds.
The models are random, nothing ends a response: all write the same number of tokens. Memory is the
peak of a process of its own less what it held before the model was made; on CUDA, the allocator's.
"""

import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # this script lives in tests/

import train                                                                # noqa: E402
from divergences import sft_loss                                            # noqa: E402
from model import GPT, GPTConfig, collate, generate, logp_at                # noqa: E402
from reward import RewardModel, score                                       # noqa: E402
from utils import cli, cuda                                                 # noqa: E402
from utils.cli import setting                                               # noqa: E402

TRANSFORMERS = next((d.version for d in metadata.distributions(name="transformers")), None)


@dataclass
class Settings:
    """Throughput and memory beside a plain implementation and transformers, on the same inputs."""
    parts: str = setting("train,sample,score", "which parts, with commas")
    size: str = setting("toy,gpt2", "model sizes, with commas")
    repeats: int = setting(7, "rounds at the toy size; GPT-2 on a CPU gets 3 at most", 1)
    device: str = setting("auto", "auto, cpu or cuda")
    no_memory: bool = setting(False, "leave out the peaks: each takes a process of its own")
    out: str = setting("out/bench", "folder for bench.json")


# The models; {shape of a case: the project's aims for its ratios on two CPU cores}, by part:
#   train   items a step, steps, shortest and longest prompt, shortest and longest response
#   sample  prompts, candidates of each, prompt length, new tokens
#   score   prompts, candidates of each, prompt length, shortest and longest response
SIZES = {
    "toy": (GPTConfig(512, 64, 96, 3, 4), {
        "train": {(16, 32, 8, 16, 12, 28): {"plain": 1.1, "transformers": 1.5}},
        "sample": {(1, 1, 8, 56): {}, (128, 1, 8, 56): {"recompute": 12.0, "transformers": 3.0},
                   (1024, 1, 8, 56): {}, (8, 16, 48, 16): {}},
        "score": {(64, 16, 8, 8, 48): {}}}),
    "gpt2": (GPTConfig(50257, 256, 768, 12, 12), {
        "train": {(8, 1, 0, 0, 256, 256): {"plain": 1.0, "transformers": 1.0}},
        "sample": {(1, 1, 32, 64): {}, (4, 1, 32, 64): {"transformers": 1.3}, (4, 1, 192, 64): {}},
        "score": {(2, 4, 192, 16, 64): {}}}),
}


# ---- the implementations: (tokens of a call, {name: how to make a function}) --------------------

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


def our_loss(policy, items):
    """What fine_tune minimises, without its look for tokens that cannot be written."""
    batch = collate([pair for (pair,) in items], policy.device)
    logp = logp_at(policy, batch, batch.response_mask())
    return sft_loss(logp) * len(logp), len(logp)


def plain_loss(model, items):
    """The same mean, over response tokens, from the logits at every position."""
    batch = collate([pair for (pair,) in items], next(model.parameters()).device)
    labels = batch.tokens.masked_fill(~batch.response_mask(), -100)
    if not isinstance(model, GPT):      # padding on the right needs no attention mask
        return model(batch.tokens, labels=labels, use_cache=False).loss
    logits = model(batch.tokens)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def plain_loop(model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for items in batches:
        plain_loss(model, items).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train_case(config, device, batch_size, steps, *ranges):
    """A short run of `fit` against the same batches in a plain loop; each makes its optimiser."""
    rng = random.Random(0)
    items = [((random_ids(rng, config, *ranges[:2]), random_ids(rng, config, *ranges[2:])),)
             for _ in range(steps * batch_size)]
    batches = train.random_batches(items, batch_size, random.Random(0))
    ours = our_loss, train.TrainConfig(batch_size=batch_size), random.Random(0)
    return sum(map(train.item_length, items)), {
        "ours": lambda: partial(train.fit, GPT(config).to(device), items, *ours),
        "plain": lambda: partial(plain_loop, GPT(config).to(device), batches),
        "transformers": lambda: partial(plain_loop, hugging_face(config, device), batches)}


@torch.inference_mode()
def recompute(model, prompts, new):
    """nanoGPT's sampler: the whole sequence again for each token, logits at its end alone."""
    for _ in range(new):
        logits = model.logits(model.hidden(prompts)[:, -1])
        prompts = torch.cat([prompts, torch.multinomial(logits.softmax(-1), 1)], 1)
    return prompts


def sample_case(config, device, P, n, T, new):
    rng = random.Random(0)
    ids = [random_ids(rng, config, T, T) for _ in range(P)]
    prompts = torch.tensor(ids, device=device)

    def theirs():
        from transformers import GenerationConfig
        how = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                               max_new_tokens=new, num_return_sequences=n, pad_token_id=0)
        return partial(hugging_face(config, device).generate, prompts, generation_config=how,
                       attention_mask=torch.ones_like(prompts))
    make = {"ours": lambda: partial(generate, GPT(config).to(device), ids, n, max_new_tokens=new),
            "recompute": lambda: partial(recompute, GPT(config).to(device),
                                         prompts.repeat_interleave(n, 0), new),
            "transformers": theirs}
    if config.n_embd > 96 or P * n > 128:       # it would take minutes, to show nothing new
        del make["recompute"]
    return P * n * new, make


@torch.inference_mode()
def forward_pass(trunk, pairs, device):
    """The batches that `score` makes, by length and 64 at a time, through a bare trunk."""
    pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    for i in range(0, len(pairs), 64):
        trunk(collate(pairs[i:i + 64], device).tokens)


def score_case(config, device, P, n, T, *response):
    rng = random.Random(0)
    prompts = [random_ids(rng, config, T, T) for _ in range(P)]
    pairs = [(prompt, random_ids(rng, config, *response)) for prompt in prompts for _ in range(n)]
    return sum(len(x) + len(y) for x, y in pairs), {
        "ours": lambda: partial(score, RewardModel(GPT(config).to(device)), pairs),
        "trunk": lambda: partial(forward_pass, GPT(config).to(device).hidden, pairs, device),
        "transformers": lambda: partial(forward_pass, hugging_face(config, device, "AutoModel"),
                                        pairs, device)}


# ---- the ladder of a GPU's training step (tests/on_gpu.py) ---------------------------------------

RUNGS = ("float32", "TF32", "bfloat16", "compiled", "padded vocabulary", "fused AdamW")
PEAKS = {"H100": 989e12, "H200": 989e12}    # dense bfloat16 FLOP/s of the SXM cards, by data sheet
no_compiler = mock.patch("torch.compile", lambda function, dynamic: function)


def ladder(config, device, rung, B, T, steps):
    """Steps of `fit` with B texts of T tokens, as fast as this rung and those before it make them.

    Returns seconds a step without the first four, which compile and warm up; tokens/s; the losses;
    and MFU, the share of the card's FLOP/s that 6 N + 12 L D T a token take (arXiv:2204.02311, N
    weights without positions, L layers, width D), nan for a card that is not in PEAKS.
    """
    on = {name: i <= RUNGS.index(rung) for i, name in enumerate(RUNGS)}
    rng, clock, take_step = random.Random(0), [], train.take_step
    items = [(([], random_ids(rng, config, T, T)),) for _ in range(B * steps)]
    torch.manual_seed(0)
    policy = GPT(config).to(device)

    def timed(*args):       # a step reads its gradient's norm: it waits for the GPU by itself
        norm = take_step(*args)
        clock.append(time.perf_counter())
        return norm

    def plain_adamw(model, s):
        return torch.optim.AdamW(model.parameters(), s.lr, (0.9, s.beta2), weight_decay=0.0)
    torch.set_float32_matmul_precision("high" if on["TF32"] else "highest")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(train, "take_step", timed))
        stack.enter_context(mock.patch.dict(
            cuda.COLUMNS, {device.type: 64 if on["padded vocabulary"] else 1}))
        if not on["compiled"]:
            stack.enter_context(no_compiler)
        if not on["fused AdamW"]:
            stack.enter_context(mock.patch.object(train, "make_optimizer", plain_adamw))
        history, peak = peak_mb(device, train.fit, policy, items, our_loss, train.TrainConfig(
            batch_size=B, micro_tokens=B * T, fast=on["bfloat16"]), random.Random(0))
    times = [b - a for a, b in zip(clock[3:], clock[4:])]
    weights = sum(p.numel() for p in policy.parameters()) - policy.wpe.weight.numel()
    flops = B * T * (6 * weights + 12 * config.n_layer * config.n_embd * T)
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    promised = next((peak for name, peak in PEAKS.items() if name in card), math.nan)
    seconds = statistics.median(times)
    return {"seconds": seconds, "min": min(times), "max": max(times), "peak_mb": peak,
            "mfu": flops / seconds / promised, "tokens_per_second": B * T / seconds,
            "loss": [record["loss"] for record in history]}


def beside(config, device, part, shape):
    """Ours and transformers', and of sampling also ours with shapes that grow: take_turns with
    float32 as TF32, and the peak of memory beyond all the models."""
    torch.set_float32_matmul_precision("high")
    tokens, make = CASES[part](config, device, *shape)
    calls = {name: make[name]() for name in make
             if name != "recompute" and (TRANSFORMERS or name != "transformers")}
    if part == "sample":
        calls["growing"] = mock.patch("model.STATIC", ())(calls["ours"])
    peaks = {name: peak_mb(device, call)[1] for name, call in calls.items()}
    times = take_turns(calls, 3, device)
    return {name: {"seconds": statistics.median(took), "min": min(took), "max": max(took),
                   "ratio": statistics.median(took) / statistics.median(times["ours"]),
                   "tokens_per_second": tokens / statistics.median(took), "peak_mb": peaks[name]}
            for name, took in times.items()}


CASES = {"train": train_case, "sample": sample_case, "score": score_case}


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
    """The process's largest resident memory so far, MB; nan but on Linux, whose ru_maxrss would
    start at the parent's."""
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return int(peak[1]) / 2 ** 10 if peak else math.nan


def peak_of(part, size, shape, name, device):
    """What one call adds to the peak memory, its model included, MB; in a process of its own."""
    if TRANSFORMERS:    # code is no one's memory: all import all of it before
        from transformers import GenerationConfig, GPT2LMHeadModel      # noqa: F401
    held = peak_rss()
    CASES[part](SIZES[size][0], device, *shape)[1][name]()()
    cuda = device.type == "cuda"
    return torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else peak_rss() - held


def peak_mb(device, function, *args):
    """(what the call returns, what it adds to a GPU's memory at its peak, MB; nan on a CPU)."""
    if device.type != "cuda":
        return function(*args), math.nan
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    result = function(*args)
    return result, (torch.cuda.max_memory_allocated() - held) / 2 ** 20


def measure(part, size, shape, s, device):
    """Compare the implementations of one case: a record of each."""
    config, cases = SIZES[size]
    repeats = min(s.repeats, 3) if size == "gpt2" and device.type == "cpu" else s.repeats
    tokens, make = CASES[part](config, device, *shape)
    names, peaks = [name for name in make if name != "transformers" or TRANSFORMERS], {}
    for name in [] if s.no_memory else names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[name] = pool.submit(peak_of, part, size, shape, name, device).result()
    times, records = take_turns({name: make[name]() for name in names}, repeats, device), []
    for name, took in times.items():
        median = statistics.median(took)
        ratio = statistics.median(t / own for t, own in zip(took, times["ours"]))
        records.append({
            "part": part, "size": size, "shape": ",".join(map(str, shape)), "name": name,
            "seconds": median, "min": min(took), "max": max(took), "tokens": tokens,
            "tokens_per_second": tokens / median, "ratio": ratio,
            "goal": cases[part][shape].get(name), "peak_mb": peaks.get(name, math.nan)})
        print(f"{part:7}{size:5}{records[-1]['shape']:17}{name:13}{median:>9.4f}{min(took):>9.4f}"
              f"{max(took):>9.4f}{tokens / median:>10,.0f}{ratio:>7.2f}"
              f"{records[-1]['peak_mb']:>9.0f}", flush=True)
    return records


def describe_machine(device):
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {"device": str(device), "cpu": cpu[1] if cpu else platform.processor(),
            "card": torch.cuda.get_device_name() if device.type == "cuda" else "",
            "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "dtype": "float32",
            "torch": torch.__version__, "transformers": TRANSFORMERS}


def main(argv=None):
    s = cli.parse_settings(Settings, argv)
    parts, sizes = s.parts.split(","), s.size.split(",")
    cli.require({*parts} <= {*CASES}, f"--parts: {s.parts} is not among {', '.join(CASES)}")
    cli.require({*sizes} <= {*SIZES}, f"--size: {s.size} is not among {', '.join(SIZES)}")
    device = cli.choose_device(s.device)
    file = cli.make_folder(s.out) / "bench.json"
    results = {"config": asdict(s), "machine": describe_machine(device), "records": []}
    print(results["machine"])
    print(f"{'part':7}{'size':5}{'shape':17}{'name':13}{'seconds':>9}{'min':>9}{'max':>9}"
          f"{'tokens/s':>10}{'ratio':>7}{'peak MB':>9}")
    for size in sizes:
        for part, cases in SIZES[size][1].items():
            for shape in cases if part in parts else ():
                results["records"] += measure(part, size, shape, s, device)
                cli.write_json(file, results)
    print(file)


if __name__ == "__main__":
    cli.run_script(main)
