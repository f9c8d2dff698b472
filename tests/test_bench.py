"""bench.py compares like with like: the same losses and tokens from every implementation."""

import json

import pytest
import torch

import bench
from model import GPT, GPTConfig
from utils.cli import InputError

TINY = GPTConfig(20, 16, 8, 1, 2)
CPU = torch.device("cpu")
SHAPES = {"train": {(4, 2, 1, 3, 2, 5): {"plain": 1.0}}, "sample": {(2, 3, 4, 5): {}},
          "score": {(2, 3, 4, 2, 6): {}}}


@pytest.fixture(scope="module", autouse=True)
def needs_transformers():
    pytest.importorskip("transformers")


def test_plain_loss_is_ours_and_samplers_write_the_same_number_of_tokens():
    """Else a ratio would compare different work."""
    torch.manual_seed(0)
    model = GPT(TINY)
    items = [(([1, 2], [3, 4, 5]),), (([6], [7, 8, 9, 10, 11]),)]
    total, count = bench.our_loss(model, items)
    torch.testing.assert_close(bench.plain_loss(model, items), total / count)
    theirs = bench.hugging_face(TINY, "cpu")
    assert theirs.num_parameters() == sum(p.numel() for p in model.parameters())
    tokens, make = bench.sample_case(TINY, CPU, 2, 3, 4, 5)
    assert tokens == sum(len(y) for ys in make["ours"]()() for y in ys) == 2 * 3 * 5
    assert make["recompute"]()().shape == make["transformers"]()().shape == (6, 4 + 5)


def test_all_train_on_the_same_batches(monkeypatch):
    """Each step of `fit` takes a batch that the plain loops take, too: as much padding."""
    seen = {"our_loss": [], "plain_loss": []}
    for name in seen:
        def note(model, items, name=name, loss=getattr(bench, name)):
            seen[name].append(items)
            return loss(model, items)
        monkeypatch.setattr(bench, name, note)
    _, make = bench.train_case(TINY, CPU, 4, 2, 1, 3, 2, 5)
    make["ours"]()()
    make["plain"]()()
    assert len(seen["our_loss"]) == 2
    assert sorted(seen["our_loss"]) == sorted(seen["plain_loss"])


def test_main_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SIZES", {"toy": (TINY, SHAPES)})
    bench.main(["--size", "toy", "--repeats", "2", "--no-memory", "--device", "cpu",
                "--out", str(tmp_path)])
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    assert {(r["part"], r["name"]) for r in records} == {
        ("train", "ours"), ("train", "plain"), ("train", "transformers"), ("sample", "ours"),
        ("sample", "recompute"), ("sample", "transformers"), ("score", "ours"),
        ("score", "trunk"), ("score", "transformers")}
    for r in records:
        assert 0 < r["min"] <= r["seconds"] <= r["max"]
        assert r["tokens_per_second"] == pytest.approx(r["tokens"] / r["seconds"])
        assert r["ratio"] == 1 or r["name"] != "ours"
    assert len(capsys.readouterr().out.splitlines()) == len(records) + 3


@pytest.mark.parametrize("flags", [["--parts", "training"], ["--size", "huge"], ["--repeats", "0"]])
def test_bad_flags(flags, tmp_path):
    with pytest.raises(InputError):
        bench.main([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_implementations_take_turns():
    """A B A B, the round to warm up left out: else one of them would meet the colder machine."""
    order = []
    times = bench.take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2,
                             CPU)
    assert order == list("ababab") and [len(t) for t in times.values()] == [2, 2]


def test_mfu_counts_a_step_s_products_by_hand(monkeypatch):
    """6 N + 12 L D T a token, at a card of 1e9 FLOP/s. A failure means that a share of a card is
    reported which no other program's can be compared with."""
    monkeypatch.setattr(bench, "PEAKS", {"": 1e9})
    rung = bench.ladder(TINY, CPU, "float32", 2, 8, 6)
    block = 2 * 16 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    flops = 2 * 8 * (6 * (20 * 8 + block + 16) + 12 * 1 * 8 * 8)
    assert rung["mfu"] * rung["seconds"] * 1e9 == pytest.approx(flops)
    assert len(rung["loss"]) == 6 and rung["tokens_per_second"] == 16 / rung["seconds"]
