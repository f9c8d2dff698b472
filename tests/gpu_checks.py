"""Does a GPU compute the same? Each check returns {name: {value, bound, ok}}: a difference, and the
most that it may be. tests/on_gpu.py calls them.

shape: the GPTConfig of a large model, for the logits; the other checks need a small one.
"""

import random
import tempfile
from unittest import mock

import torch

import bench        # it makes the repository's modules importable
from bench import GPT, GPTConfig, collate, cuda, generate, train

import model

TINY = GPTConfig(101, 64, 32, 1, 2)


def check(**values):
    """{name: {value, bound, ok}} of name=(value, the most that it may be)."""
    return {name: {"value": float(value), "bound": bound, "ok": bool(value <= bound)}
            for name, (value, bound) in values.items()}


@torch.no_grad()
def logits(device, shape):
    """The largest difference from the CPU's and transformers' float32. Of TF32 and bfloat16 the
    root mean square, as a share of the logits' own."""
    torch.manual_seed(0)
    policy, ids = GPT(shape), torch.randint(shape.vocab_size, (2, 64))
    expected = policy(ids)
    policy.to(device)

    def off(precision="highest", columns=1, low=False, compute=policy):
        torch.set_float32_matmul_precision(precision)
        with mock.patch.dict(cuda.COLUMNS, {device.type: columns}):
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                return compute(ids.to(device)).float().cpu() - expected
    bounds = {"cpu": (off().abs().max(), 1e-4), "padded": (off(columns=64).abs().max(), 1e-4),
              "tf32": (off("high").std() / expected.std(), 0.01),
              "bfloat16": (off(low=True).std() / expected.std(), 0.03)}
    if bench.TRANSFORMERS:
        from transformers import AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as folder:
            policy.save_pretrained(folder)
            theirs = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
        difference = off(compute=lambda x: theirs(x).logits)
        bounds["transformers"] = difference.abs().max(), 1e-4
    return check(**bounds)


@torch.inference_mode()
def sampling(device, shape):
    """Cached against scored log-probabilities, static against growing shapes, frequencies against
    probabilities."""
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    policy, prompts, cached = GPT(TINY).to(device), [[5], [7, 8, 9], [3] * 20] * 8, []

    def draw():
        generator = torch.Generator(device).manual_seed(0)
        return sum(generate(policy, prompts, 4, max_new_tokens=40, generator=generator), [])

    def note(logits, uniform, sample=model.sample_logits):
        drawn = sample(logits, uniform)
        cached.append(logits.log_softmax(-1).gather(1, drawn[:, None]))
        return drawn
    static = draw()
    with mock.patch.object(model, "STATIC", ()), mock.patch.object(model, "sample_logits", note):
        growing = draw()
    batch = collate([(prompts[i // 4], y) for i, y in enumerate(growing)], device)
    scored = model.logp_at(policy, batch, batch.response_mask()).view(len(growing), -1)
    # How often each response of three of eight tokens comes, and how often it should.
    policy, n, words = GPT(GPTConfig(8, 8, 16, 1, 2)).to(device), 2 ** 15, torch.arange(8)
    words = torch.cartesian_prod(words, words, words).tolist()
    expected = n * model.logp_seq(policy, collate([([2], y) for y in words], device)).exp().cpu()
    ys = torch.tensor(generate(policy, [[2]], n, max_new_tokens=3)[0])
    seen = torch.bincount(ys @ torch.tensor([64, 8, 1]), minlength=512)
    chi_square = ((seen - expected) ** 2 / expected).sum()
    return check(cached_less_scored=((torch.cat(cached, 1) - scored).abs().max(), 1e-4),
                 # Rounding may put a few of the uniforms on the other side of a bound.
                 rows_unlike_growing=(sum(map(list.__ne__, static, growing)) / len(static), 0.05),
                 chi_square=(chi_square, 511 + 3.5 * 1022 ** 0.5))      # mean, 3.5 deviations


def training(device, shape):
    """A batch in parts against a whole one; compiled against not; bfloat16 against float32: the
    largest relative difference of any step's loss."""
    rng = random.Random(0)
    items = [(([], bench.random_ids(rng, TINY, 8, 48)),) for _ in range(128)]

    def losses(key="loss", items=items, **config):
        torch.manual_seed(0)
        history = train.fit(GPT(TINY).to(device), items, bench.our_loss,
                            train.TrainConfig(**config), random.Random(0))
        return torch.tensor([record[key] for record in history])

    def apart(a, b, bound):
        return (a / b - 1).abs().max(), bound
    torch.set_float32_matmul_precision("highest")
    exact, compiled = losses(), losses(fast=True)
    with bench.no_compiler:
        low = losses(fast=True)
    return check(compiled=apart(compiled, low, 0.01), bfloat16=apart(low, exact, 0.01), **{
        f"parts_{key}": apart(losses(key, micro_tokens=100), losses(key), 1e-3)
        for key in ("loss", "grad_norm")})
