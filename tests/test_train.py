"""The loops: what bears loss, what is kept, when to stop; checkpoints from the command line."""

import copy
import json
import math
import random

import pytest
import torch

import train
from utils.checkpoints import load_pretrained
from divergences import forward_kl
from model import GPT, GPTConfig, InputError, collate, logp_seq, logp_token
from utils.batches import item_length
from train import Schedule, fit, learning_rate, length_batches, nll_loss, split


def tiny(seed=0, vocab=8, **more):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab, n_positions=12, n_embd=16, n_layer=1, n_head=2, **more))


def test_only_writable_response_tokens_bear_loss():
    """By hand: prompt, padding and tokens that the policy cannot write must not count."""
    model = tiny(suppress_tokens=(1,))
    items = [(([2, 3], [4, 1, 5]),), (([2], [6]),)]
    logp = logp_token(model, collate([pair for (pair,) in items]))
    by_hand = -(logp[0, 2] + logp[0, 4] + logp[1, 1]) / 3
    torch.testing.assert_close(nll_loss(model, items), by_hand)
    nll_loss(model, items).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_sft_gradient_is_the_forward_kl_gradient():
    """C1 on all 3^2 responses: the SFT loss weighted by the demonstrator has the KL's gradient."""
    model = tiny(vocab=3).double()
    pairs = [([0], [a, b]) for a in range(3) for b in range(3)]
    beta = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    beta /= beta.sum()
    logp = logp_seq(model, collate(pairs))
    kl = torch.autograd.grad(forward_kl(beta.log(), logp), model.parameters(), retain_graph=True,
                             allow_unused=True)
    # mean over tokens = sum over the two tokens / 2, one item at a time
    sft = sum(w * nll_loss(model, [(pair,)]) * 2 for w, pair in zip(beta, pairs))
    sft = torch.autograd.grad(sft, model.parameters(), allow_unused=True)
    for a, b in zip(kl, sft):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_batches_hold_every_item_once_and_little_padding():
    items = [(([0], [1] * (i % 9 + 1)),) for i in range(101)]
    batches = length_batches(items, 8, random.Random(0))
    assert sorted(map(id, items)) == sorted(id(i) for batch in batches for i in batch)
    spread = [max(map(item_length, b)) - min(map(item_length, b)) for b in batches]
    assert sum(spread) / len(spread) <= 2
    assert length_batches(items, 8, random.Random(0)) == batches
    assert length_batches(items, 8, random.Random(1)) != batches


def test_learning_rate_warms_up_and_decays():
    schedule = Schedule(lr=1.0, warmup=0.1)
    rates = [learning_rate(schedule, t, 100) for t in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (t + 1) for t in range(10)])
    assert max(rates) == pytest.approx(1) and rates[-1] == pytest.approx(0.01, abs=2e-3)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_keeps_the_weights_that_were_best_on_held_out_data():
    """Trained on one answer, judged on another: the last weights are the worst."""
    model, rng = tiny(), random.Random(0)
    learn, held = [(([2], [3, 3]),)] * 64, [(([2], [4, 4]),)] * 8
    history = fit(model, learn, nll_loss, Schedule(lr=3e-3, epochs=4, batch_size=8), rng, "t", held)
    looks = [record["held_out"] for record in history if "held_out" in record]
    assert looks[0] < looks[-1]
    objective = train.Objective(model, nll_loss, train.targets, Schedule())
    assert objective.mean(held, 8) == pytest.approx(min(looks), abs=1e-5)
    assert all(p.grad is None for p in model.parameters())      # else kept as long as the model


def test_a_loss_that_is_not_finite_stops_and_names_the_step():
    model, calls = tiny(), []

    def loss_fn(model, items):
        calls.append(1)
        return nll_loss(model, items) * (math.nan if len(calls) == 3 else 1)
    with pytest.raises(InputError, match="at step 2"):
        fit(model, [(([2], [3]),)] * 64, loss_fn, Schedule(batch_size=8), random.Random(0))


def test_no_data_is_said():
    with pytest.raises(InputError, match="no data"):
        fit(tiny(), [], nll_loss, Schedule(), random.Random(0))


def test_split_loses_nothing():
    learn, held = split(list(range(50)), 0.1, random.Random(0))
    assert len(held) == 5 and sorted(learn + held) == list(range(50))
    assert split([1], 0.1, random.Random(0)) == ([1], [])


def test_no_held_out_text_was_trained_on():
    """Cycled before the split, the shorter source would stand on both sides of it."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    learn, held = train.pair_up(letters, list(range(200)), random.Random(0))
    assert len(learn) == 190 and len(held) == 10
    for side in (0, 1):
        assert not {item[side] for item in learn} & {item[side] for item in held}
    assert train.pair_up([], [1, 2], random.Random(0)) == ([], [])


def test_devices():
    assert train.choose_device("cpu").type == "cpu"
    for name in ("tpu", "cuda" if not torch.cuda.is_available() else "nope"):
        with pytest.raises(InputError, match="no device"):
            train.choose_device(name)


def test_stage_by_stage_from_files(tmp_path, capsys):
    """pretrain -> sft -> reward through the command line: each reads what the one before wrote."""
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"the cat number {i} sat" for i in range(40)))
    rows = [{"prompt": f"cat {i}?", "response": f"it sat {i}"} for i in range(20)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "n.jsonl").write_text("".join(json.dumps({**row, "response": "no"}) + "\n"
                                              for row in rows))
    size = ["--n-positions", "32", "--n-embd", "16", "--n-layer", "1", "--vocab-size", "300"]
    p = {name: str(tmp_path / name) for name in ("pi0", "sft", "rm", "d.jsonl", "n.jsonl")}
    train.main(["pretrain", "--corpus", str(tmp_path / "corpus.txt"), "--out", p["pi0"], *size])
    common = ["--init", p["pi0"], "--max-response", "12"]
    train.main(["sft", "--demos", p["d.jsonl"], "--out", p["sft"], *common])
    train.main(["reward", "--positives", p["d.jsonl"], "--negatives", p["n.jsonl"],
                "--out", p["rm"], *common])
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()] == ["pretrain", "sft", "reward"]
    for name in ("pi0", "sft", "rm"):
        model, tokenizer, _ = load_pretrained(p[name])
        assert model.config.n_positions == 32 and tokenizer.decode(tokenizer.encode("sat")) == "sat"
    with pytest.raises(InputError, match="another run"):
        train.main(["sft", "--demos", p["d.jsonl"], "--out", p["sft"], *common])
    for argv in (["sft", "--out", "x"], ["fly"], []):
        with pytest.raises(InputError):
            train.main(argv)


def test_a_step_is_clipped_and_vectors_do_not_decay():
    """Otherwise one odd batch undoes a run, and biases and norms are pulled to zero."""
    model, schedule = tiny(), Schedule(lr=1.0, clip=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    train.take_step(torch.optim.SGD(model.parameters()), 1.0, schedule, 0, 1, "test")
    moved = [(a - b).pow(2).sum() for a, b in zip(before, model.parameters())]
    torch.testing.assert_close(sum(moved).sqrt(), torch.tensor(0.5))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = train.make_optimizer(model, Schedule(lr=1.0, weight_decay=0.1))
    train.take_step(optimizer, 1.0, schedule, 0, 1, "test")        # of no gradient: decay alone
    for p, b in zip(model.parameters(), before):
        torch.testing.assert_close(p, b * 0.9 if p.dim() >= 2 else b, rtol=1e-6, atol=0)


def test_the_optimizer_s_two_tensors_are_the_parameters():
    """Ten steps as torch takes them with each parameter by itself, forward and back; a copy of the
    model, or its weights read from elsewhere, are still its own."""
    model, plan = tiny().double(), Schedule(lr=1e-2, clip=0.1)
    plain = copy.deepcopy(model)
    flat = train.make_optimizer(model, plan)
    single = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    batch = [(([2, 3], [4, 5, 6]),), (([1], [7, 0]),)]
    for step in range(10):
        for m in (model, plain):
            train.nll_loss(m, batch).backward()
        train.take_step(flat, 1.0, plan, step, 10, "test")
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        single.param_groups[0]["lr"] = train.learning_rate(plan, step, 10)
        single.step()
        single.zero_grad()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    other = copy.deepcopy(model)
    model.load_state_dict(plain.state_dict())
    assert sum(len(group["params"][0]) for group in flat.param_groups) == sum(
        p.numel() for p in model.parameters())
    assert torch.equal(flat.param_groups[0]["params"][0][:model.wte.weight.numel()],
                       plain.wte.weight.flatten())
    assert not torch.equal(other.wte.weight, model.wte.weight)


def test_a_reward_model_is_the_best_one_on_all_held_out_items():
    """Labels by chance: it overfits, and the weights kept must be from before that."""
    rng = random.Random(0)
    items = [(([0], [rng.randrange(8) for _ in range(4)]), ([0], [rng.randrange(8)] * 3))[::sign]
             for sign in (1, -1) * 20]
    model, history = train.train_reward(tiny(), items[8:], items[:8], train.discriminator_step,
                                        Schedule(lr=3e-2, epochs=20, batch_size=8), rng)
    looks = [record["held_out"] for record in history if "held_out" in record]
    assert len(looks) == 8 and min(looks) < looks[-1] - 0.1
    assert train.discriminator_step(model, items[:8]).item() == pytest.approx(min(looks), abs=1e-5)
