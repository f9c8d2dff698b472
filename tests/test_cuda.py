"""utils/cuda.py on a CPU: what a GPU is given to compute is what model.py computes.

What this cannot show is what only a GPU has: its kernels, its rounding, its memory, its speed. That
is tests/on_gpu.py's.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as m
from model import GPT, GPTConfig, collate, generate, logp_seq
from reward import TokenExtrapolation
from utils import cli, cuda


def tiny(seed=0, **shape):
    """A float64 model with every parameter off its default: weights, biases and norms."""
    torch.manual_seed(seed)
    shape = {"n_embd": 8, "n_layer": 2, "n_head": 2, "eos_token_id": 1, "suppress_tokens": (0,),
             **shape}
    model = GPT(GPTConfig(7, 48, **shape)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- the padded vocabulary ----------------------------------------------------------------------

PAIRS = [([1, 2], [3, 4, 5, 6]), ([3], [2]), ([6, 5, 4], [1, 1, 6])]


def test_a_padded_vocabulary_has_equal_logits_and_gradients(monkeypatch):
    """A failure means that a GPU trains another model: the columns of zeros must be gone again
    before a softmax sees them, and give the weights no gradient."""
    model, linear, columns = tiny(), torch.nn.functional.linear, []

    def compute():
        logits = model(collate(PAIRS).tokens)
        loss = logp_seq(model, collate(PAIRS)).sum()
        return [logits, *torch.autograd.grad(loss, model.parameters())]

    def note(hidden, weight, bias):
        columns.append(len(weight))
        return linear(hidden, weight, bias)
    plain = compute()
    monkeypatch.setitem(cuda.COLUMNS, "cpu", 64)
    monkeypatch.setattr(cuda.F, "linear", note)
    for a, b in zip(plain, compute()):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    assert columns.count(64) == 2       # else nothing was padded


@pytest.mark.parametrize("static", [False, True])
def test_no_padded_id_is_drawn(static, monkeypatch):
    """A failure means that the policy writes a token that no tokenizer knows. Zeros would be far
    from rare: they are 57 of 64 logits."""
    monkeypatch.setitem(cuda.COLUMNS, "cpu", 64)
    monkeypatch.setattr(m, "STATIC", {"cpu"} if static else set())
    ys, = generate(tiny(eos_token_id=None), [[2, 3]], 200, max_new_tokens=20, generator=seeded(0))
    assert {token for y in ys for token in y} == {1, 2, 3, 4, 5, 6}


# ---- sampling with static shapes ----------------------------------------------------------------

PROMPTS = [[2, 3, 4, 5, 6], [6], [1, 1, 2]]


class Recorder(TorchDispatchMode):
    """Notes every operator that is called, with its tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


def record(step, device):
    """A CUDA graph on a CPU: the operators of one call of step, to be called again on the same
    tensors, results in the same memory. Python's own part is not run again. What recording has
    changed is put back, since a real graph is recorded without running."""
    kept = [cell.cell_contents for cell in step.__closure__]
    kept = [x for x in tree_leaves([vars(c) if hasattr(c, "slot") else c for c in sum(
        (x if isinstance(x, list) else [x] for x in kept), [])]) if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in kept]
    with Recorder() as recorder:
        step()
    for x, value in zip(kept, before):
        x.copy_(value)

    def replay():
        for function, args, kwargs, result in recorder.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)      # of a view or in place: onto itself
    return replay


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("n, eos, temperature", [(1, 1, 1.0), (4, 1, 0.5), (3, None, 1.0),
                                                 (8, 0, 1.0)])
def test_static_shapes_draw_the_same_tokens(n, eos, temperature, recorded, monkeypatch):
    """Token for token, for rows of several lengths and for policies of one model and of two, also
    where all tokens but the first two are replayed. A failure means that a GPU samples another
    policy: from slots still empty, at another position, or from a number that was not renewed."""
    suppress = {} if eos else {"suppress_tokens": ()}
    policy = tiny(eos_token_id=eos, **suppress)
    for policy in (policy, TokenExtrapolation(policy, tiny(1, **suppress), 0.5, 0.1).double()):
        plain = generate(policy, PROMPTS, n, temperature, 40, seeded(5))
        with monkeypatch.context() as patch:
            patch.setattr(m, "STATIC", {"cpu"})
            if recorded:
                patch.setattr(cuda, "record", record)
            new_empty = torch.Tensor.new_empty      # memory that nobody has written may hold nan
            patch.setattr(torch.Tensor, "new_empty",
                          lambda x, *shape: new_empty(x, *shape).fill_(math.nan))
            static = generate(policy, PROMPTS, n, temperature, 40, seeded(5))
        assert static == plain
        lengths = {len(y) for ys in plain for y in ys}
        assert lengths == {40} if eos is None else min(lengths) < max(lengths)


def test_static_sampling_ends_when_all_have_ended(monkeypatch):
    """Asked at every sixteenth token. A failure means that a GPU goes on to the last token that
    there may be, or that a row is cut which had not ended."""
    model, steps = tiny(), []
    monkeypatch.setattr(m, "STATIC", {"cpu"})
    monkeypatch.setattr(model, "hidden", lambda *args, hidden=model.hidden: (
        steps.append(1), hidden(*args))[1])
    ys = generate(model, PROMPTS, max_new_tokens=43, generator=seeded(5))
    longest = max(len(y) for row in ys for y in row)
    assert all(y[-1] == 1 for row in ys for y in row)
    assert 16 < longest <= 32 and len(steps) == 1 + 32      # the prompts once, then two sixteens


# ---- TF32 and memory ----------------------------------------------------------------------------

def test_tf32_is_for_cuda_alone(monkeypatch):
    """A failure means that a GPU computes float32 products eight times as slowly as it could, or
    that those of a CPU are rounded."""
    assert torch.get_float32_matmul_precision() == "highest"
    try:
        assert cli.choose_device("cpu").type == "cpu"
        assert torch.get_float32_matmul_precision() == "highest"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "zeros", lambda n, device: SimpleNamespace(
            device=torch.device(device)))
        assert cli.choose_device("auto").type == "cuda"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_caches_take_an_eighth_of_a_card(monkeypatch):
    """In floats of four bytes. A failure means that sampling fills a card, or idles on it."""
    card = SimpleNamespace(total_memory=80 * 2 ** 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert cuda.cache_floats(torch.device("cuda"), 5) == 10 * 2 ** 30 / 4
    assert cuda.cache_floats(torch.device("cpu"), 5) == 5
