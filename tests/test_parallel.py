"""Micro-batches and several processes: however a batch is cut up, its loss and gradient stay."""

import copy
import dataclasses
import functools
import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import afd
import train
from divergences import get_divergence
from model import GPT, GPTConfig, InputError, collate
from reward import Adversary, LogRatio, RewardModel
from utils.batches import Forward, Objective, item_length, micro_batches
from train import Schedule, discriminator_step, fit, nll_loss, preference_step, targets

ROOT = Path(__file__).resolve().parent.parent


def tiny(seed=0):
    """In double precision: what differs beyond rounding is then plain to see."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(9, n_positions=16, n_embd=16, n_layer=1, n_head=2,
                         suppress_tokens=(0, 1))).double()


def make_items(n, pairs, seed=0):
    """Items of very different lengths, some with tokens that bear no loss, some without a prompt;
    the last one bears none at all."""
    rng = random.Random(seed)

    def pair():
        return (rng.choices(range(9), k=rng.randint(0, 3)),
                [*rng.choices(range(9), k=rng.randint(0, 9)), 2, 3])
    return [tuple(pair() for _ in range(pairs)) for _ in range(n)] + [(([4], [0, 1]),) * pairs]


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ---- micro-batches ------------------------------------------------------------------------------

def test_micro_batches_keep_to_their_budget_and_every_item():
    """In order, each part within its tokens, padding included, unless it is one long item; and no
    two parts that would have fitted together. Otherwise the memory is not what was asked for."""
    for pairs in (1, 2):
        items = make_items(50, pairs)
        for tokens in (1, 20, 47, 200, 10 ** 6):
            parts = micro_batches(items, tokens)
            assert [item for part in parts for item in part] == items
            sizes = [len(part) * pairs * max(map(item_length, part)) for part in parts]
            assert all(size <= tokens or len(part) == 1 for part, size in zip(parts, sizes))
            for a, b in zip(parts, parts[1:]):
                longest = max(map(item_length, [*a, b[0]]))
                assert (len(a) + 1) * pairs * longest > tokens
        assert micro_batches(items, 0) == [items]


@pytest.mark.parametrize("loss_fn, weigh, pairs", [
    (nll_loss, targets, 1), (discriminator_step, lambda model, items: len(items), 2),
    (preference_step, lambda model, items: len(items), 2)])
def test_accumulated_gradients_are_the_whole_batch_s(loss_fn, weigh, pairs):
    """Value and gradient, for micro-batches of any size and with the items shared among processes
    (their parts one after the other): a part's tokens must count as in the batch, not its mean."""
    model = tiny() if pairs == 1 else RewardModel(tiny()).double()
    for p in model.parameters():        # a reward model starts at zero, where all is alike
        p.data += 0.3 * torch.randn_like(p)
    batch = make_items(23, pairs)[:-1]
    loss_fn(model, batch).backward()
    expected, value = gradient(model), loss_fn(model, batch).item()
    for tokens in (0, 1, 30, 100):
        for count in (1, 2, 5, 30):     # 30: more processes than items
            model.zero_grad()
            objective, total = Objective(model, loss_fn, weigh, Schedule(micro_tokens=tokens)), 0.0
            for rank in range(count):
                for part, share in objective.parts(batch, rank, count):
                    loss = objective.forward(part) * share
                    loss.backward()
                    total += loss.item()
            assert total == pytest.approx(value, rel=1e-12)
            torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-12)
    model.zero_grad()
    assert objective.accumulate(batch) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(gradient(model), expected, rtol=1e-9, atol=1e-12)


def test_targets_are_what_the_loss_is_a_mean_over():
    """The count in plain Python and the mask in tensors agree, item by item."""
    model = tiny()
    for item in make_items(40, 1):
        batch = collate([pair for (pair,) in [item]])
        mask = batch.response_mask() & model.suppress.isfinite()[batch.tokens]
        assert targets(model, [item]) == mask.sum()
    assert targets(model, make_items(0, 1)) == 0


def test_fit_by_micro_batches_is_fit():
    """Weights, losses and the held-out losses that pick the weights; a batch cut into one part is
    exactly the batch."""
    items = make_items(40, 1)

    def run(tokens):
        model = tiny()
        plan = Schedule(lr=1e-2, epochs=2, batch_size=8, micro_tokens=tokens)
        history = fit(model, items[8:], nll_loss, plan, random.Random(0), "t", items[:8],
                      weigh=targets)
        return [r[k] for r in history for k in r], model.wte.weight.detach()
    losses, weights = run(0)
    assert run(10 ** 6)[0] == losses
    for tokens in (1, 40):
        again = run(tokens)
        assert again[0] == pytest.approx(losses, rel=1e-6)
        torch.testing.assert_close(again[1], weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ppo_clip", [0.0, 0.2])
def test_policy_optimisation_by_micro_batches(ppo_clip):
    """A prompt's samples stay together, as its baseline needs them: the policy and what is said of
    it are those of the whole batch."""
    sft, rng = tiny(), random.Random(0)
    reward = LogRatio(tiny(1), sft)
    written = [(x, [rng.randint(2, 8) for _ in range(rng.randint(1, 9))])
               for x in ([3], [2, 4, 5], [6]) for _ in range(4)]

    def run(tokens):
        plan = Schedule(lr=1e-2, micro_tokens=tokens)
        policy, history = train.optimise_policy(sft, reward, lambda policy: written, 3, plan, 0.5,
                                                4, ppo_clip)
        return policy.wte.weight.detach(), [r[k] for r in history for k in r]
    weights, said = run(0)
    for tokens in (1, 80):
        again = run(tokens)
        assert again[1] == pytest.approx(said, rel=1e-6, abs=1e-9)
        torch.testing.assert_close(again[0], weights, rtol=1e-5, atol=1e-6)
    assert (weights - sft.wte.weight).abs().max() > 0.01


def test_the_adversary_by_micro_batches():
    """Its steps are those of the whole batch, smoothing included: demonstrations and samples must
    not part ways when the batch is cut."""
    items = make_items(40, 2)[:-1]
    demos, own = [a for a, _ in items], [b for _, b in items[:16]]

    def run(tokens):
        adversary = Adversary(RewardModel(tiny()).double(), demos, get_divergence("reverse_kl"),
                              random.Random(0), smoothing=0.2, lr=1e-2, micro_tokens=tokens)
        for _ in range(4):
            adversary.learn(list(own), None)
        return torch.cat([p.detach().flatten() for p in adversary.judge.parameters()])
    whole = run(0)
    assert torch.equal(run(10 ** 6), whole)
    for tokens in (1, 60):
        torch.testing.assert_close(run(tokens), whole, rtol=1e-4, atol=1e-6)


def test_the_held_out_loss_is_a_mean_over_tokens():
    """As the training loss is: weighted by items, short answers would choose the weights."""
    items, model = make_items(23, 1)[:-1], tiny()
    for batch_size, tokens in ((5, 0), (5, 30), (40, 0)):
        objective = Objective(model, nll_loss, targets, Schedule(micro_tokens=tokens))
        assert objective.mean(items, batch_size) == pytest.approx(nll_loss(model, items).item())


def test_items_without_a_target_are_left_out():
    """A batch of nothing but such items would have no loss: nan."""
    nothing = make_items(0, 1)
    plan = Schedule(batch_size=1)
    with pytest.raises(InputError, match="no data"):
        fit(tiny(), nothing * 3, nll_loss, plan, random.Random(0), weigh=targets)
    items = [(([2], [3, 4]),)]
    history = fit(tiny(), nothing * 3 + items, nll_loss, plan, random.Random(0), "t", nothing * 2,
                  weigh=targets)
    assert len(history) == 1 and math.isfinite(history[0]["loss"]) and "held_out" not in history[0]


# ---- bf16, compile ------------------------------------------------------------------------------

def test_bf16_and_compile_need_cuda(tmp_path):
    for flag in ("--bf16", "--compile"):
        for main, argv in ((afd.main, []), (train.main, ["pretrain", "--corpus", "x"])):
            with pytest.raises(InputError, match=f"{flag} needs CUDA"):
                main([*argv, flag, "--device", "cpu", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def moved(pairs):
    """A float32 model off its start, at which a reward model is zero everywhere."""
    model = tiny().float() if pairs == 1 else RewardModel(tiny()).float()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("loss_fn, pairs", [(nll_loss, 1), (discriminator_step, 2)])
def test_bf16_is_autocast_of_the_same_loss(loss_fn, pairs):
    """Loss and gradient to bfloat16's eight bits of those in float32, and yet not they; gradients,
    weights and the optimizer's state stay in float32, in which small steps add up."""
    model, items = moved(pairs), make_items(20, pairs)[:-1]
    full = Forward(model, loss_fn)(items)
    full.backward()
    exact = gradient(model)
    model.zero_grad()
    low = Forward(model, loss_fn, bf16=True)(items)
    low.backward()
    assert low.item() == pytest.approx(full.item(), rel=0.01) and low.item() != full.item()
    assert 0 < (gradient(model) - exact).norm() < 0.03 * exact.norm()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    model = moved(pairs)
    plan = Schedule(lr=1e-3, batch_size=8)
    losses = [[record["loss"] for record in fit(copy.deepcopy(model), items, loss_fn, plan,
                                                random.Random(0))]
              for plan in (plan, dataclasses.replace(plan, bf16=True))]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    fit(model, items, loss_fn, dataclasses.replace(plan, bf16=True), random.Random(0))
    assert {p.dtype for p in model.state_dict().values()} == {torch.float32}


def test_policy_optimisation_in_bf16():
    """Near the steps in float32. log pi_SFT is computed as log pi is: in two precisions, a policy
    that has not moved would seem to have, and the KL would push it."""
    sft, rng = moved(1), random.Random(0)
    written = [(x, [rng.randint(2, 8) for _ in range(5)]) for x in ([3], [6]) for _ in range(4)]

    def run(bf16):
        return train.optimise_policy(sft, LogRatio(moved(1), tiny(1).float()), lambda _: written, 3,
                                     Schedule(lr=1e-2, bf16=bf16), 0.5, 4)
    (exact, history), (low, said) = run(False), run(True)
    assert said[0]["kl_from_sft"] == 0 and said[0]["entropy"] != history[0]["entropy"]
    for a, b in zip(history, said):
        assert b == pytest.approx(a, rel=0.05, abs=0.1)
    step = (exact.wte.weight - sft.wte.weight).norm()
    assert 0 < (low.wte.weight - exact.wte.weight).norm() < 0.3 * step
    assert low.wte.weight.dtype == torch.float32


def test_what_is_compiled_computes_the_same(monkeypatch):
    """torch.compile's own tracing and gradients, without its C++: for batches of several shapes,
    which have to share one trace, and for models that share their code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for loss_fn, pairs in ((nll_loss, 1), (discriminator_step, 2)):
        model = moved(pairs)
        fast, plain = Forward(model, loss_fn, compile=True), Forward(model, loss_fn)
        for n in (5, 9, 14):
            items, values = make_items(n, pairs, n)[:-1], []
            for forward in (plain, fast):
                model.zero_grad()
                loss = forward(items)
                loss.backward()
                values.append((loss.item(), gradient(model)))
            assert values[0][0] == pytest.approx(values[1][0], rel=1e-5)
            torch.testing.assert_close(values[0][1], values[1][1], rtol=1e-4, atol=1e-6)


def test_everything_of_a_reward_model_is_where_its_policy_is():
    """On a GPU a head that stayed behind would stop the run at its first reward."""
    for head in ("sum", "last"):
        reward = RewardModel(tiny().to("meta"), head)
        assert {t.device.type for t in reward.state_dict().values()} == {"meta"}


def test_compiling_is_for_training_alone(monkeypatch):
    """Compiled once; used where gradients are; gone afterwards, also if the loss fails: a model
    that kept it would hand its own compiled weights to its copies."""
    calls = []

    def compile(function, dynamic):
        calls.append("compiled")
        return lambda *args: calls.append("used") or function(*args)
    monkeypatch.setattr(torch, "compile", compile)
    items = make_items(10, 1)[:-1]
    for model, loss_fn in ((tiny(), nll_loss), (RewardModel(tiny()).double(),
                                                lambda model, items: model(collate(items)).mean())):
        calls.clear()
        items = items if loss_fn is nll_loss else [pair for (pair,) in items]
        forward = Forward(model, loss_fn, compile=True)
        for _ in range(2):
            forward(items).backward()
        with torch.no_grad():
            forward(items)
        assert calls == ["compiled", "used", "used"]
        with pytest.raises(TypeError):
            forward(None)
        trunk = getattr(model, "trunk", model)
        assert "hidden" not in vars(trunk) and "hidden" not in vars(copy.deepcopy(trunk))


# ---- processes ----------------------------------------------------------------------------------

STAGES = """
import json, os, sys, torch, train
from utils.batches import from_first, processes
with processes(torch.device("cpu")):
    for argv in json.loads(sys.argv[1]):
        train.main(argv)
        from_first(None)        # the next stage reads what the first process has written
sys.stdout.flush()
os._exit(0)     # torch's threads have once in ten runs aborted Python's own way out
"""


def test_a_refused_folder_is_said_by_the_first_process_alone(tmp_path):
    """Two processes on one folder that another run holds: one line in all, status 2 for both, and
    nobody waits for the other."""
    (tmp_path / "c.txt").write_text("one\n\ntwo")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "train.json").write_text("{}")
    argv = ["pretrain", "--corpus", "c.txt", "--out", "o", "--device", "cpu"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = [subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={
            **os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
            "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    said = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [2, 2], said
    assert said[0][1].startswith("error: o holds another run") and said[0][1].count("\n") == 1
    assert said[0][0] == "" and said[1] == ("", "")


def test_two_processes_give_what_one_gives(tmp_path):
    """torchrun on the CPU: pretraining, SFT and a reward model have the losses and weights of one
    process with the same batches, to rounding; samples are the very same. Batches of five do not
    share out evenly, and one of the epoch's batches holds a single item."""
    (tmp_path / "c.txt").write_text("\n\n".join(f"cat {i} sat" + " and ran" * (i % 5)
                                                for i in range(31)))
    rows = [{"prompt": f"cat {i}?", "response": f"it sat {i}" + " and ran" * (i % 5)}
            for i in range(70)]
    for name, mine in (("d", rows[:22]), ("n", rows)):      # 70 prompts are three chunks to share
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    common = ["--batch-size", "5", "--device", "cpu", "--n-positions", "48", "--n-embd", "16",
              "--n-layer", "1", "--vocab-size", "300", "--max-response", "16"]
    stages = [["pretrain", "--corpus", "c.txt", "--out", "{}/pi0"],
              ["sft", "--demos", "d.jsonl", "--init", "{}/pi0", "--out", "{}/sft",
               "--micro-tokens", "60"],
              ["sample", "--prompts", "n.jsonl", "--init", "{}/sft", "--out", "{}/s.jsonl",
               "--per-prompt", "2"],
              ["reward", "--positives", "d.jsonl", "--negatives", "{}/s.jsonl", "--init", "{}/pi0",
               "--out", "{}/reward"]]
    (tmp_path / "stages.py").write_text(STAGES)
    said = {}
    for name, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone",
                                              "--nproc_per_node=2"])):
        argvs = [[word.format(name) for word in [*stage, *common]] for stage in stages]
        got = subprocess.run([sys.executable, *start, "stages.py", json.dumps(argvs)],
                             cwd=tmp_path, capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT),
                                  "OMP_NUM_THREADS": "1"})
        assert got.returncode == 0, got.stderr
        said[name] = got.stdout.replace("two", "one")
    assert said["one"] == said["two"]       # only one of the processes speaks
    for stage in ("pi0", "sft", "reward"):
        one, two = (json.loads((tmp_path / name / stage / "train.json").read_text())["history"]
                    for name in ("one", "two"))
        assert len(one) == len(two) > 3
        for a, b in zip(one, two):
            assert a == pytest.approx(b, rel=1e-5)
        for path in (tmp_path / "one" / stage).glob("*.bin"):
            a, b = (torch.load(tmp_path / name / stage / path.name) for name in ("one", "two"))
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-4)
    assert (tmp_path / "one" / "s.jsonl").read_text() == (tmp_path / "two" / "s.jsonl").read_text()
