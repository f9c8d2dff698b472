"""bench.py compares like with like: the same losses and tokens from every implementation."""

import json

import pytest
import torch

import bench
from model import GPT, GPTConfig, InputError
from train import nll_loss

TINY = GPTConfig(20, 16, 8, 1, 2)
SHAPES = {"train": {(4, 2, 1, 3, 2, 5): {"plain": 1.0}}, "sample": {(2, 3, 4, 5): {}},
          "score": {(2, 3, 4, 2, 6): {}}}


def test_plain_loss_is_ours_and_samplers_write_the_same_number_of_tokens():
    """Else a ratio would compare different work."""
    torch.manual_seed(0)
    model = GPT(TINY)
    items = [(([1, 2], [3, 4, 5]),), (([6], [7, 8, 9, 10, 11]),)]
    torch.testing.assert_close(bench.plain_loss(model, items), nll_loss(model, items))
    theirs = bench.hugging_face(TINY, "cpu")
    assert theirs.num_parameters() == sum(p.numel() for p in model.parameters())
    tokens, _, make = bench.sample_case(TINY, torch.device("cpu"), 2, 3, 4, 5)
    assert tokens == make["ours"]()()[0].numel() == 2 * 3 * 5
    assert make["recompute"]()().shape == make["transformers"]()().shape == (6, 4 + 5)


def test_flops_of_a_step():
    """(6 N + 12 L D T) T with N counted from the model: a wrong N makes the utilisation wrong."""
    model = GPT(TINY)
    N = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    tokens, flops, _ = bench.train_case(TINY, "cpu", 2, 1, 3, 3, 4, 4)
    assert tokens == 2 * 7 and flops == 2 * (6 * N + 12 * 8 * 7) * 7


def test_main_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SIZES", {"toy": (TINY, SHAPES)})
    bench.main(["--parts", "train,sample,score", "--size", "toy", "--repeats", "2", "--no-memory",
                "--device", "cpu", "--out", str(tmp_path)])
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


def test_turns_and_best_of_n():
    """A B A B, the warm-up left out; best-of-N in pieces looks at N candidates of each prompt."""
    order = []
    times = bench.take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2,
                             torch.device("cpu"))
    assert order == list("ababab") and [len(t) for t in times.values()] == [2, 2]
    config = GPTConfig(20, 64, 8, 1, 2)
    best = bench.best_case(config, torch.device("cpu"), 3, 5, 2)[2]["ours"]()()
    assert best.shape == (3,)
