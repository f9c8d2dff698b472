"""Every line of a run on a device that is not the CPU, without one: tensors that say they live
elsewhere, compute on the CPU, and refuse to meet the CPU's own tensors, as a GPU's do.

What this cannot show is what only a GPU has: its kernels, its rounding, its memory, its speed.
"""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import afd
import model
from utils import cuda

AWAY = torch.device("meta")     # a device of every build of torch; nothing real is on it here
MAY_CROSS = {"copy_", "_to_copy"}


class Away(torch.Tensor):
    """A tensor that says it is on AWAY; its numbers are those of `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=AWAY)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def tolist(self):
        return self.inner.tolist()

    def __reduce_ex__(self, protocol):      # torch.save
        return self.inner.__reduce_ex__(protocol)


class Factories(TorchDispatchMode):
    """Makes torch.zeros(..., device=AWAY) and the like give an Away."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """Run one operator on the inner tensors; what it gives is on the device that it should be on.
    Raises RuntimeError where tensors of both devices meet; a number (no dimension) may be on any.
    """
    name, leaves = function._schema.name.split("::")[1], tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    away = [t for t in tensors if isinstance(t, Away)]
    if away and name not in MAY_CROSS and any(
            t.dim() and not isinstance(t, Away) for t in tensors):
        raise RuntimeError(f"{name}: tensors of two devices")
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]

    def inner(x):
        return x.inner if isinstance(x, Away) else "cpu" if isinstance(x, torch.device) else x
    result = function(*tree_map(inner, args), **tree_map(inner, kwargs))
    there = devices[0] == AWAY if devices else bool(away)
    if name == "copy_":
        there = isinstance(args[0], Away)
    given = {id(t.inner): t for t in away}      # an operator in place gives back what it was given

    def outer(x):
        if not isinstance(x, torch.Tensor) or not there:
            return x
        return given[id(x)] if id(x) in given else Away(x)
    return tree_map(outer, result)


@pytest.fixture
def elsewhere(monkeypatch):
    """AWAY is the device of whatever runs."""
    real = {name: getattr(torch, name) for name in ("Generator", "autocast", "tensor", "load")}

    class Generator:        # torch asks for a class
        def __new__(cls, device="cpu"):
            return real["Generator"]("cpu")

    def tensor(*args, device=None, **kwargs):
        return real["tensor"](*args, **kwargs).to(device or "cpu")
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", lambda kind, *a, **k: real["autocast"]("cpu", *a, **k))
    monkeypatch.setattr(torch, "load", lambda f, map_location=None, **k: real["load"](
        f, map_location="cpu", **k))
    for module in ("torch.optim.adam", "torch.optim.optimizer"):    # fused AdamW
        monkeypatch.setattr(importlib.import_module(module), "_get_fused_kernels_supported_devices",
                            lambda: ["meta"], raising=False)
    monkeypatch.setattr(afd, "choose_device", lambda name: AWAY)
    with Factories():
        yield


def test_the_other_device_is_another(elsewhere):
    """Else the tests below could not fail."""
    x = torch.zeros(3, device=AWAY)
    assert x.device == AWAY and (x + 1).sum().item() == 3 and x.cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.zeros(3)


@pytest.mark.parametrize("head", ["sum", "last"])
def test_afd_runs_elsewhere(head, elsewhere, tmp_path, monkeypatch):
    """All reward models and all methods; resumed, it reads back what it saved. One run samples with
    static shapes and pads its vocabulary, as on CUDA, the other does neither, as on MPS. A failure
    means a tensor that stayed behind on the CPU: the run would stop there on a GPU."""
    if head == "sum":
        monkeypatch.setitem(cuda.COLUMNS, "meta", 64)
        monkeypatch.setattr(model, "STATIC", {"meta"})
    flags = ("--n-corpus 48 --n-demos 24 --n-samples 16 --n-prompts 2 --n-candidates 2 "
             "--policy-steps 1 --n-embd 16 --n-layer 1 --methods").split()
    flags += ["all" if head == "sum" else "po init-sft 0.3", "--head", head, "--out", str(tmp_path)]
    rows = afd.main(flags)["rows"]
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names)) and {"pi_0", "pi_SFT", "best of 2, init-sft"} < {*names}
    assert head == "last" or {"spin", "irft", "dpo", "adversarial, reverse_kl"} < {*names}
    (tmp_path / "seed0" / "results.json").unlink()      # so that each stage is read back by itself
    assert afd.main([*flags, "--resume"])["rows"] == rows
