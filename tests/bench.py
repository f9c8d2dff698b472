"""How fast it is: ours beside plain and transformers' code on the same inputs, in one run.

    python tests/bench.py                              every part, about 20 minutes on two cores
    python tests/bench.py --parts train,sample --size toy

    train    a training step: `plain` is nanoGPT's (logits at every position, AdamW as torch has it)
    sample   `recompute` encodes the whole sequence anew for each token; `transformers` has a cache
    score    rewards of a prompt's candidates; `trunk` is a bare forward pass of the same tokens
    scaling  time and memory against N, prompts and tokens: bench.png
    afd      `python afd.py`, stage by stage

The implementations take turns; a ratio is another's time over ours, the median over the rounds.
The models are random, so no response ends early: all write the same number of tokens. Memory is
the peak of a process of its own, less what it held before the model was made; on CUDA that of the
allocator. The dtype is float32 everywhere.
"""

import importlib.util
import json
import multiprocessing
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))       # this script lives in tests/

import train                                                                    # noqa: E402
from model import GPT, GPTConfig, InputError, collate, write_json               # noqa: E402
from reward import RewardModel, score                                           # noqa: E402
from train import setting                                                       # noqa: E402

PARTS = ("train", "sample", "score", "scaling", "afd")
# The project's aims: another's time over ours, on two CPU cores. (part, size, case, other)
GOALS = {("train", "toy", "step", "plain"): 1.1, ("train", "toy", "step", "transformers"): 1.5,
         ("train", "gpt2", "step", "plain"): 1.0, ("train", "gpt2", "step", "transformers"): 1.0,
         ("sample", "toy", "128x1, 8+56", "recompute"): 12.0,
         ("sample", "toy", "128x1, 8+56", "transformers"): 3.0,
         ("sample", "gpt2", "4x1, 32+64", "transformers"): 1.3}
GOALS |= {("score", size, case, "trunk"): 1.0
          for size, case in (("toy", "64x16, 8+8-48"), ("gpt2", "2x4, 192+16-64"))}


@dataclass
class Settings:
    """Throughput and memory beside a plain implementation and transformers, on the same inputs."""
    parts: str = setting(",".join(PARTS), "which parts, with commas")
    size: str = setting("toy,gpt2", "model sizes for train, sample and score, with commas")
    repeats: int = setting(7, "rounds at the toy size; GPT-2 on a CPU gets 3 at most")
    device: str = setting("auto", "auto, cpu or cuda")
    memory: bool = setting(True, "measure peak memory too: one more process for each number")
    out: str = setting("out/bench", "folder for bench.json and bench.png")


@dataclass
class Size:
    """A model and its inputs. sample: (prompts, candidates each, prompt length, new tokens)."""
    config: GPTConfig
    batch_size: int
    steps: int                  # training steps in one timing
    prompt: tuple               # training pairs: shortest and longest prompt, then response
    response: tuple
    sample: tuple
    score: tuple                # prompts, candidates each, prompt length, shortest, longest


SIZES = {
    "toy": Size(GPTConfig(512, 64, 96, 3, 4), 16, 32, (8, 16), (12, 28),
                ((1, 1, 8, 56), (128, 1, 8, 56), (1024, 1, 8, 56), (1, 1, 48, 16),
                 (128, 1, 48, 16), (8, 16, 48, 16)), (64, 16, 8, 8, 48)),
    "gpt2": Size(GPTConfig(50257, 256, 768, 12, 12), 8, 1, (0, 0), (256, 256),
                 ((1, 1, 32, 64), (4, 1, 32, 64), (4, 1, 192, 64), (1, 8, 192, 32)),
                 (2, 4, 192, 16, 64)),
}


@dataclass
class Case:
    """What is measured: make[name]() builds an implementation, a function of no arguments."""
    part: str
    size: str
    name: str
    tokens: int                 # of one call, for the throughput
    make: dict
    memory: bool = True
    flops: float = 0.0          # of one call: the model's, not the implementation's


# ---- the implementations ------------------------------------------------------------------------

def gpt(config, device):
    torch.manual_seed(0)
    return GPT(config).to(device)


def hugging_face(config, device, head="AutoModelForCausalLM"):
    """transformers' GPT-2 of the same size, without dropout and without an end of text."""
    import transformers
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    theirs = transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.n_positions, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return getattr(transformers, head).from_config(theirs, attn_implementation="sdpa").to(device)


def random_pairs(rng, count, vocab_size, prompt, response):
    """Pairs of random ids, their lengths uniform in the ranges (shortest, longest)."""
    def ids(lengths):
        return [rng.randrange(vocab_size) for _ in range(rng.randint(*lengths))]
    return [(ids(prompt), ids(response)) for _ in range(count)]


def labels_of(batch):
    return batch.tokens.masked_fill(~batch.response_mask(), -100)


def plain_loss(model, batch):
    logits = model(batch.tokens)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels_of(batch)[:, 1:].flatten(),
                           ignore_index=-100)


def transformers_loss(model, batch):
    return model(batch.tokens, labels=labels_of(batch), use_cache=False).loss


def plain_steps(model, loss_fn, batches, device):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for items in batches:
        loss = loss_fn(model, collate([pair for (pair,) in items], device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train_cases(name, size, device):
    """A whole short run of `fit` against the same batches in a plain loop, new optimisers each."""
    config, rng = size.config, random.Random(0)
    items = [(pair,) for pair in random_pairs(rng, size.steps * size.batch_size, config.vocab_size,
                                              size.prompt, size.response)]
    batches = train.length_batches(items, size.batch_size, random.Random(0))

    def ours():
        model, schedule = gpt(config, device), train.Schedule(batch_size=size.batch_size)
        return lambda: train.fit(model, items, train.nll_loss, schedule, random.Random(0))

    def loop(model, loss_fn):
        return lambda: plain_steps(model, loss_fn, batches, device)
    make = {"ours": ours, "plain": lambda: loop(gpt(config, device), plain_loss),
            "transformers": lambda: loop(hugging_face(config, device), transformers_loss)}
    lengths = [train.item_length(item) for item in items]
    return [Case("train", name, "step", sum(lengths), make,
                 flops=sum(step_flops(config, T) for T in lengths))]


def step_flops(config, T):
    """FLOPs of a training step on a sequence of T tokens: (6 N + 12 L D T) T, N the parameters
    but for the positions. Source: arXiv:2204.02311, appendix B."""
    D, L = config.n_embd, config.n_layer
    N = config.vocab_size * D + L * (12 * D * D + 13 * D) + 2 * D
    return (6 * N + 12 * L * D * T) * T


@torch.inference_mode()
def recompute(model, prompts, new):
    """The sampler without a cache: the whole sequence again for every token (nanoGPT's)."""
    idx = prompts
    for _ in range(new):
        logits = model.logits(model.hidden(idx)[:, -1])
        idx = torch.cat([idx, torch.multinomial(logits.softmax(-1), 1)], 1)
    return idx


def sample_case(name, config, device, shape):
    B, n, T, new = shape
    prompts = torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
    prompts = prompts.to(device)

    def ours():
        model = gpt(config, device)
        return lambda: model.generate(prompts, new, n=n)[0]

    def plain():
        model, repeated = gpt(config, device), prompts.repeat_interleave(n, 0)
        return lambda: recompute(model, repeated, new)[:, T:]

    def theirs():
        from transformers import GenerationConfig
        model = hugging_face(config, device)
        how = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                               max_new_tokens=new, num_return_sequences=n, pad_token_id=0)
        return lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts),
                                      generation_config=how)[:, T:]
    make = {"ours": ours, "recompute": plain, "transformers": theirs}
    if name == "gpt2" or B * n > 128:       # minutes, and nothing new learned
        del make["recompute"]
    return Case("sample", name, f"{B}x{n}, {T}+{new}", B * n * new, make, memory=B * n in (4, 128))


def sample_cases(name, size, device):
    return [sample_case(name, size.config, device, shape) for shape in size.sample]


# ---- measuring ----------------------------------------------------------------------------------

def available(case):
    """The implementations that can run here."""
    there = importlib.util.find_spec("transformers") is not None
    return [name for name in case.make if there or name != "transformers"]


def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(functions, repeats, device):
    """{name: seconds of each round}: A B C, A B C, ... after one round to warm up."""
    times = {name: [] for name in functions}
    for round in range(repeats + 1):
        for name, function in functions.items():
            took = seconds(function, device)
            if round > 0:
                times[name].append(took)
    return times


def cases_of(part, size, device):
    make = {"train": train_cases, "sample": sample_cases}[part]
    return make(size, SIZES[size], device)


def peak_rss():
    """The process's largest resident memory so far, MB."""
    status = Path("/proc/self/status")
    if status.exists():     # Linux: ru_maxrss there starts from the parent's, across fork and exec
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2 ** 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def probe(part, size, index, name, device):
    """Peak memory in MB of one call of one implementation; run in a process of its own."""
    device = torch.device(device)
    if name == "transformers":
        import transformers     # noqa: F401   counts as held before
    held = peak_rss()
    cases_of(part, size, device)[index].make[name]()()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    return peak_rss() - held


def apart(function, *args):
    """function(*args) in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def measure(part, size, repeats, device, memory):
    """Records of a part at one size, a row for each case and implementation."""
    records = []
    for index, case in enumerate(cases_of(part, size, device)):
        names = available(case)
        peaks = {name: apart(probe, part, size, index, name, str(device))
                 for name in names if memory and case.memory}
        times = take_turns({name: case.make[name]() for name in names}, repeats, device)
        for name in names:
            median = statistics.median(times[name])
            ratio = statistics.median(t / own for t, own in zip(times[name], times["ours"]))
            records.append({
                "part": part, "size": size, "case": case.name, "name": name, "seconds": median,
                "min": min(times[name]), "max": max(times[name]), "rounds": len(times[name]),
                "tokens": case.tokens, "tokens_per_second": case.tokens / median, "ratio": ratio,
                "goal": GOALS.get((part, size, case.name, name)), "peak_mb": peaks.get(name),
                "mfu": utilisation(case.flops / median, device)})
            print_record(records[-1])
    return records


HEAD = (f"{'':7}{'':6}{'':17}{'':13}{'median s':>10}{'min':>9}{'max':>9}{'tokens/s':>11}{'ratio':>7}"
        f"{'goal':>6}{'peak MB':>9}{'MFU':>6}")


def print_record(r):
    def shown(key, form):
        return "-" if r[key] is None else format(r[key], form)
    print(f"{r['part']:7}{r['size']:6}{r['case']:17}{r['name']:13}{r['seconds']:>10.4f}"
          f"{r['min']:>9.4f}{r['max']:>9.4f}{r['tokens_per_second']:>11,.0f}{r['ratio']:>7.2f}"
          f"{shown('goal', '.1f'):>6}{shown('peak_mb', '.0f'):>9}{shown('mfu', '.1%'):>6}",
          flush=True)


# Dense bf16 peaks in FLOP/s by card name, the first that fits; from NVIDIA's data sheets (those of
# H100, H200 and L4 give twice as much, with sparsity). float32 cannot reach them.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
         "NVIDIA L4": 121e12}


def utilisation(flops_per_second, device):
    """Model FLOPs utilisation: the share of the card's peak; None on a CPU or an unknown card."""
    if device.type != "cuda" or not flops_per_second:
        return None
    card = torch.cuda.get_device_name()
    return next((flops_per_second / peak for name, peak in PEAKS.items() if name in card), None)


def machine(device):
    """What the numbers depend on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    there = importlib.util.find_spec("transformers") is not None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "device": str(device), "dtype": "float32",
            "card": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "transformers": __import__("transformers").__version__ if there else None}


def main(argv=None):
    s = train.parse_settings(Settings, argv)
    parts, sizes = s.parts.split(","), s.size.split(",")
    for given, known in ((parts, PARTS), (sizes, SIZES)):
        if not {*given} <= {*known}:
            raise InputError(f"{','.join(given)}: choose from {','.join(known)}")
    if s.repeats < 1:
        raise InputError("--repeats must be positive")
    device, out = train.choose_device(s.device), Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {"config": asdict(s), "machine": machine(device), "records": []}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items() if value))
    print(HEAD)
    for size in sizes:
        repeats = min(s.repeats, 3) if size == "gpt2" and device.type == "cpu" else s.repeats
        for part in (p for p in parts if p in ("train", "sample", "score")):
            results["records"] += measure(part, size, repeats, device, s.memory)
            write_json(out / "bench.json", results)
    print(out / "bench.json")


if __name__ == "__main__":
    train.run_script(main)
