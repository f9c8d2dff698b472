"""The loops of train.py: what bears loss, how a batch is cut up, what a step does, when to stop."""

import copy
import functools
import math
import random

import pytest
import torch

import train
from divergences import bradley_terry_loss, discriminator_loss, forward_kl
from model import GPT, GPTConfig, collate, logp_seq, logp_token
from reward import LogRatio, RewardModel
from train import (PolicyConfig, TrainConfig, fine_tune, fit, item_length, learning_rate,
                   mean_loss, micro_batches, optimise_policy, pair_up, random_batches, split,
                   train_reward)


def tiny(seed=0, vocab=9, **more):
    """In double precision: what differs beyond rounding is then plain to see."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab, n_positions=16, n_embd=16, n_layer=1, n_head=2, **more)).double()


def tiny_reward():
    """Off its start, where it is zero for all."""
    reward = RewardModel(tiny(suppress_tokens=(0, 1))).double()
    with torch.no_grad():
        for p in reward.parameters():
            p += 0.3 * torch.randn_like(p)
    return reward


def make_items(n, pairs, seed=0):
    """Items of very different lengths, some with tokens that bear no loss, some without a prompt;
    each has a token 2 that bears some."""
    rng = random.Random(seed)

    def pair():
        return (rng.choices(range(9), k=rng.randint(0, 3)),
                [*rng.choices(range(9), k=rng.randint(0, 9)), 2, 3])
    return [tuple(pair() for _ in range(pairs)) for _ in range(n)]


def one_step(items, micro_tokens=8192, **more):
    """All items in one batch, and a single step that follows their gradient."""
    return TrainConfig(epochs=1, batch_size=len(items), micro_tokens=micro_tokens, **more)


def nll(policy, items):
    """fit's loss for pairs by maximum likelihood, written plainly."""
    logp = logp_token(policy, collate([pair for (pair,) in items]))
    return -logp.sum(), int(collate([pair for (pair,) in items]).response_mask().sum())


@pytest.fixture
def gradients(monkeypatch):
    """The gradient of every step, as one vector in the order of model.parameters()."""
    seen, take_step = [], train.take_step

    def record(model, *rest):
        seen.append(flat(p.grad for p in model.parameters()))
        return take_step(model, *rest)
    monkeypatch.setattr(train, "take_step", record)
    return seen


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


# ---- what bears loss ----------------------------------------------------------------------------

def test_only_writable_response_tokens_bear_loss(gradients):
    """By hand: a failure means that prompt, padding or tokens that the policy cannot write count,
    or that the latter's -inf reaches the gradient."""
    model, pairs = tiny(suppress_tokens=(1,)), [([2, 3], [4, 1, 5]), ([2], [6])]
    _, history = fine_tune(model, pairs, [], one_step(pairs), random.Random(0))
    logp = logp_token(model, collate(pairs))
    by_hand = -(logp[0, 2] + logp[0, 4] + logp[1, 1]) / 3
    assert history[0]["loss"] == pytest.approx(by_hand.item())
    expected = flat(torch.autograd.grad(by_hand, model.parameters()))
    torch.testing.assert_close(gradients[0], expected)
    assert history[0]["grad_norm"] == pytest.approx(expected.norm().item())


def test_sft_s_gradient_is_the_forward_kl_s(gradients):
    """On all 9 responses of two tokens: weighted by the demonstrator, SFT's gradient is that of
    KL(beta || pi). A failure means that SFT does not imitate who wrote the demonstrations."""
    model = tiny(vocab=3)
    pairs = [([0], [a, b]) for a in range(3) for b in range(3)]
    beta = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    beta /= beta.sum()
    logp = logp_seq(model, collate(pairs))
    expected = flat(torch.autograd.grad(forward_kl(beta.log(), logp), model.parameters()))
    for pair in pairs:
        fine_tune(model, [pair], [], one_step([pair]), random.Random(0))
    # A step follows the mean over its two tokens; the sequence's gradient is twice that.
    sft = sum(2 * weight * slope for weight, slope in zip(beta, gradients))
    torch.testing.assert_close(sft, expected, rtol=1e-9, atol=1e-12)


def test_the_policy_that_is_fine_tuned_is_a_copy():
    """A failure means that pi_0 becomes pi_SFT while it is trained: the ratio of both is one."""
    model, pairs = tiny(), [pair for (pair,) in make_items(8, 1)]
    before = flat(model.parameters())
    policy, _ = fine_tune(model, pairs, [], one_step(pairs), random.Random(0))
    assert torch.equal(flat(model.parameters()), before)
    assert (flat(policy.parameters()) - before).abs().max() > 1e-4


# ---- micro-batches ------------------------------------------------------------------------------

def test_micro_batches_have_every_item_within_their_budget():
    """In order, each part within its tokens, padding included, unless it is one long item; and no
    two parts that would have fitted together. A failure means that memory runs out, or that the
    device idles."""
    for pairs in (1, 2):
        items = make_items(50, pairs)
        for tokens in (0, 1, 20, 47, 200, 10 ** 6):
            parts = micro_batches(items, tokens)
            assert [item for part in parts for item in part] == items
            sizes = [len(part) * pairs * max(map(item_length, part)) for part in parts]
            assert all(size <= tokens or len(part) == 1 for part, size in zip(parts, sizes))
            for a, b in zip(parts, parts[1:]):
                longest = max(map(item_length, [*a, b[0]]))
                assert (len(a) + 1) * pairs * longest > tokens


@pytest.mark.parametrize("micro_tokens", [1, 30, 100, 10 ** 6])
def test_accumulation_gives_sft_the_gradient_of_the_whole_batch(micro_tokens, gradients):
    """Sums over parts of unequal lengths are divided once, by all tokens of the batch. A failure
    means that a token counts more where its part is short: a mean of means."""
    model, items = tiny(suppress_tokens=(0, 1)), make_items(23, 1)
    pairs = [pair for (pair,) in items]
    batch = collate(pairs)
    logp = logp_token(model, batch)[batch.response_mask() & (batch.tokens > 1)]
    expected = flat(torch.autograd.grad(-logp.mean(), model.parameters()))
    _, history = fine_tune(model, pairs, [], one_step(pairs, micro_tokens), random.Random(0))
    torch.testing.assert_close(gradients[0], expected, rtol=1e-9, atol=1e-12)
    assert history[0]["loss"] == pytest.approx(-logp.mean().item(), rel=1e-12)
    assert history[0]["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-9)


@pytest.mark.parametrize("micro_tokens", [1, 60, 10 ** 6])
@pytest.mark.parametrize("loss", [discriminator_loss, bradley_terry_loss])
def test_accumulation_gives_pairs_the_gradient_of_the_whole_batch(loss, micro_tokens, gradients):
    """The same for reward models: a pair counts one, and its better member comes first."""
    reward, items = tiny_reward(), make_items(23, 2)
    better, worse = (reward(collate([item[i] for item in items])) for i in (0, 1))
    value = loss(better, worse)
    expected = flat(torch.autograd.grad(value, reward.parameters()))
    _, history = train_reward(reward, items, [], loss, one_step(items, micro_tokens),
                              random.Random(0))
    torch.testing.assert_close(gradients[0], expected, rtol=1e-9, atol=1e-12)
    assert history[0]["loss"] == pytest.approx(value.item(), rel=1e-12)


def test_fit_by_micro_batches_is_fit():
    """Weights, losses and the held-out losses that pick the weights. A failure means that the
    memory of a machine decides what is learned on it."""
    items = make_items(40, 1)

    def run(tokens):
        config = TrainConfig(lr=1e-2, epochs=2, batch_size=8, micro_tokens=tokens)
        model = tiny()
        history = fit(model, items[8:], nll, config, random.Random(0), items[:8])
        return [v for record in history for v in record.values()], flat(model.parameters())
    losses, weights = run(10 ** 6)
    for tokens in (1, 40):
        again = run(tokens)
        assert again[0] == pytest.approx(losses, rel=1e-9)
        torch.testing.assert_close(again[1], weights, rtol=1e-7, atol=1e-9)


def test_an_item_without_a_target_changes_nothing(gradients):
    """All its tokens are ones that the policy cannot write. By itself in its micro-batch, a mean
    over nothing would be nan and end the run."""
    model, pairs = tiny(suppress_tokens=(0, 1)), [([2], [3, 4]), ([4], [0, 1])]
    for micro_tokens in (1, 10 ** 6):
        fine_tune(model, pairs, pairs, one_step(pairs, micro_tokens), random.Random(0))
        fine_tune(model, pairs[:1], [], one_step(pairs[:1]), random.Random(0))
        torch.testing.assert_close(*gradients[-2:])


def test_the_held_out_loss_is_a_mean_over_tokens():
    """As the training loss is. Weighted by items or by batches, short answers would choose the
    weights."""
    items, model = make_items(23, 1), tiny()
    total, count = nll(model, items)
    for batch_size, tokens in ((5, 10 ** 6), (5, 30), (40, 10 ** 6)):
        config = TrainConfig(batch_size=batch_size, micro_tokens=tokens)
        assert mean_loss(model, items, nll, config) == pytest.approx(total.item() / count)


# ---- the loop -----------------------------------------------------------------------------------

def test_fit_takes_the_steps_of_torch_s_own_loop():
    """AdamW, its betas, the clip and the rate, step by step, against torch's plain functions. A
    failure means that a run is trained in another way than its settings tell."""
    config = TrainConfig(lr=1e-2, epochs=5, batch_size=4, clip=0.1)
    model, items = tiny(), make_items(8, 1)
    plain, rng, batches = copy.deepcopy(model), random.Random(0), []
    single = torch.optim.AdamW(plain.parameters(), betas=(0.9, config.beta2), weight_decay=0.0)
    norms = []
    for step in range(10):
        batches = batches or random_batches(items, 4, rng)
        loss, count = nll(plain, batches.pop())
        single.zero_grad()
        (loss / count).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1).item())
        single.param_groups[0]["lr"] = learning_rate(config, step, 10)
        single.step()
    history = fit(model, items, nll, config, random.Random(0))
    assert [record["step"] for record in history] == list(range(10))
    assert [record["grad_norm"] for record in history] == pytest.approx(norms) and min(norms) > 0.1
    torch.testing.assert_close(flat(model.parameters()), flat(plain.parameters()), rtol=1e-9,
                               atol=1e-9)
    assert all(p.grad is None for p in model.parameters())      # else kept as long as the model


def test_a_step_is_clipped():
    """A failure means that one odd batch undoes a run. Its norm is told as it was before."""
    model = tiny()
    before = flat(model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    norm = train.take_step(model, torch.optim.SGD(model.parameters()), 1.0,
                           TrainConfig(lr=1.0, clip=0.5), 0, 1, "a stage")
    assert norm == pytest.approx(100 * math.sqrt(len(before)))
    assert (flat(model.parameters()) - before).norm().item() == pytest.approx(0.5, rel=1e-5)


def test_learning_rate_warms_up_and_decays():
    """A failure means a first step at rate zero or at full rate, or an end that still jumps."""
    config = TrainConfig(lr=1.0, warmup=0.1)
    rates = [learning_rate(config, t, 100) for t in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (t + 1) for t in range(10)])
    assert rates[10] == pytest.approx(1) and rates[55] == pytest.approx(0.505)
    assert rates[99] == pytest.approx(0.01, abs=1e-3) and min(rates[10:]) > 0.01
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    assert learning_rate(config, 0, 1) == 1         # a single step is at the full rate


def test_an_epoch_holds_every_item_once():
    """A failure means that some data is never seen, or some twice."""
    items, seen = make_items(12, 1), []

    def loss_fn(model, part):
        seen.extend(part)
        return nll(model, part)
    fit(tiny(), items, loss_fn, TrainConfig(epochs=2, batch_size=4), random.Random(0))
    for epoch in (seen[:12], seen[12:]):
        assert sorted(map(id, epoch)) == sorted(map(id, items))
    assert seen[:12] != seen[12:]
    for epochs, batch_size, steps in ((0.5, 4, 2), (1, 5, 3), (1e-9, 4, 1)):
        config = TrainConfig(epochs=epochs, batch_size=batch_size)
        assert len(fit(tiny(), items, nll, config, random.Random(0))) == steps


def test_batches_hold_every_item_once_at_random():
    """A failure means that some items are learned twice, or that a batch's items are alike."""
    items = [(([0], [1] * (i % 9 + 1)),) for i in range(101)]
    batches = random_batches(items, 8, random.Random(0))
    assert sorted(map(id, items)) == sorted(id(i) for batch in batches for i in batch)
    assert [len(batch) for batch in batches] == [8] * 12 + [5]
    assert random_batches(items, 8, random.Random(0)) == batches
    assert random_batches(items, 8, random.Random(1)) != batches


def test_maximum_likelihood_learns_the_demonstrator_and_its_lengths():
    """SFT on the exact demonstrator of a world that can be listed: P(k) of k letters and an end.
    Batches of similar length end near P(k) / length instead, 0.06 nats away and by far too short:
    the commonest silent bias of this field."""
    lengths = {1: 0.3, 5: 0.4, 11: 0.3}
    pairs = [([2], [3] * k + [1]) for k, p in lengths.items() for _ in range(round(1000 * p))]
    torch.manual_seed(0)
    policy = GPT(GPTConfig(4, n_positions=14, n_embd=16, n_layer=1, n_head=2))
    config = TrainConfig(lr=1e-2, epochs=12, batch_size=20)
    learned, _ = fine_tune(policy, pairs, [], config, random.Random(0))
    target = torch.tensor(list(lengths.values()))
    with torch.no_grad():
        logp = logp_seq(learned, collate([([2], [3] * k + [1]) for k in lengths]))
    wrong = target / (torch.tensor(list(lengths)) + 1)
    assert forward_kl(target.log(), (wrong / wrong.sum()).log()) > 0.2
    assert forward_kl(target.log(), logp) < 0.01
    torch.testing.assert_close(logp.exp(), target, rtol=0, atol=0.04)


def test_early_stopping_keeps_the_weights_that_were_best():
    """Labels by chance: the reward model overfits, and its weights must be from before that. A
    failure means that a model is judged by its overfit, on part of the held-out items, or at its
    first look."""
    rng = random.Random(5)
    items = [(([0], [rng.randrange(8) for _ in range(4)]), ([0], [rng.randrange(8)] * 3))[::sign]
             for sign in (1, -1) * 20]
    reward, history = train_reward(
        RewardModel(tiny()).double(), items[8:], items[:8], discriminator_loss,
        TrainConfig(lr=3e-2, epochs=20, batch_size=8), rng)
    steps = [record["step"] for record in history if "held_out" in record]
    assert steps == [9, 19, 29, 39, 49, 59, 69, 79] and len(history) == 80
    losses = [history[step]["held_out"] for step in steps]
    assert min(losses) == losses[1] < min(losses[0], *losses[2:]) - 0.1     # in the middle
    r = [reward(collate([item[i] for item in items[:8]])) for i in (0, 1)]
    assert discriminator_loss(*r).item() == pytest.approx(min(losses))


def test_without_data_there_is_no_training():
    """A failure means a stage that returns its start as if it had been trained."""
    for run in (lambda: fit(tiny(), [], nll, TrainConfig(), random.Random(0), label="some stage"),
                lambda: fine_tune(tiny(), [], [], TrainConfig(), random.Random(0), "some stage"),
                lambda: train.fit_pairs(tiny(), [], 0.1, TrainConfig(), random.Random(0),
                                        "some stage")):
        with pytest.raises(ValueError, match="some stage: no data"):
            run()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_names_the_step(what):
    """Before a weight has changed. A failure means that a run goes on with nan for weights, that
    nobody knows since when, or that the last good ones are lost."""
    model, calls, last = tiny(), [], []

    def loss_fn(model, items):
        calls.append(1)
        loss, count = nll(model, items)
        last[:] = [flat(model.parameters())]
        if len(calls) == 3:     # the root's slope at zero is infinite, the loss is not
            loss = loss * math.nan if what == "loss" else loss + (loss - loss.detach()).sqrt()
        return loss, count
    with pytest.raises(FloatingPointError, match="some stage.*at step 2"):
        fit(model, [(([2], [3]),)] * 64, loss_fn, TrainConfig(batch_size=8), random.Random(0),
            label="some stage")
    assert len(calls) == 3 and torch.equal(flat(model.parameters()), *last)


def test_a_policy_that_diverges_stops_and_names_the_step():
    """The same in policy optimisation, where it is the reward that goes wrong: nobody samples from
    weights that are nan."""
    weights = []

    class Reward:
        calls = 0

        def token_rewards(self, batch):
            self.calls += 1
            return torch.full(batch.tokens.shape, math.inf if self.calls == 2 else 1.0)
    def draw(policy):
        weights.append(policy)
        return [([2], [3]), ([2], [4])]
    with pytest.raises(FloatingPointError, match="some stage.*at step 1"):
        optimise_policy(tiny(), Reward(), draw, PolicyConfig(samples=2, steps=3), 0.1, "some stage")
    assert flat(weights[-1].parameters()).isfinite().all() and len(weights) == 2


# ---- data ---------------------------------------------------------------------------------------

def test_a_split_shares_nothing_and_loses_nothing():
    """A failure means held-out items that were trained on, or a stage left without any."""
    for n, held in ((1, 0), (2, 1), (10, 1), (100, 5)):
        a, b = split(list(range(n)), random.Random(0))
        assert sorted(a + b) == list(range(n)) and len(b) == held
    assert split(list(range(100)), random.Random(0))[1] != list(range(95, 100))     # shuffled


@pytest.mark.parametrize("n, m", [(40, 100), (100, 40), (60, 60)])
def test_pairing_up_holds_out_before_the_shorter_source_comes_again(n, m):
    """A failure means that a held-out text was trained on: early stopping would then pick the
    weights that know it by heart. Every text is used, positives first."""
    items, held_out = pair_up([f"+{i}" for i in range(n)], [f"-{i}" for i in range(m)],
                              random.Random(0))
    for side, total, sign in ((0, n, "+"), (1, m, "-")):
        mine, held = {item[side] for item in items}, {item[side] for item in held_out}
        assert not mine & held and {text[0] for text in mine | held} == {sign}
        assert len(mine) + len(held) == total and len(held) == total // 20
    assert len(items) == max(n, m) - max(n, m) // 20
    assert pair_up([], ["-"], random.Random(0)) == ([], [])


# ---- optimising the policy ----------------------------------------------------------------------

def test_what_policy_optimisation_tells_of_its_samples():
    """By hand at the first step, for fixed samples: proxy, KL, entropy and the gradient. A failure
    means a curve of another quantity than its name: an entropy below zero, for example."""
    sft, init = tiny(), tiny(1)
    pairs = [([3], [2, 5]), ([3], [4, 2]), ([2, 4], [6]), ([2, 4], [7, 7, 2])]
    policy, history = optimise_policy(sft, LogRatio(sft, init), lambda policy: pairs,
                                      PolicyConfig(lr=1e-2, samples=2, steps=2), 0.3)
    batch = collate(pairs)
    logp, logp_init = logp_token(sft, batch), logp_token(init, batch)
    ratio = (logp - logp_init).detach()
    returns = ratio.flip(1).cumsum(1).flip(1)       # log pi - log pi_SFT is zero at the start
    other = returns[[1, 0, 3, 2]]                   # with two samples the other is the baseline
    loss = -((returns - other) * logp * batch.response_mask()).sum() / 4
    slope = flat(torch.autograd.grad(loss, sft.parameters()))
    assert set(history[0]) == {"step", "loss", "grad_norm", "proxy", "kl", "entropy"}
    assert history[0] == pytest.approx({
        "step": 0, "loss": loss.item(), "grad_norm": slope.norm().item(), "kl": 0.0,
        "proxy": ratio.sum(1).mean().item(), "entropy": -logp.sum(1).mean().item()})
    assert history[0]["entropy"] > 0 and len(history) == 2
    moved = (logp_token(policy, batch) - logp).sum(1)       # towards what is above its baseline
    better = (returns - other).sum(1) > 0
    assert (moved[better] > 0).any() and history[1]["kl"] != 0


# ---- bfloat16 and the compiler, with the CPU in CUDA's place -------------------------------------

def fast(config, **more):
    return TrainConfig(**{**vars(config), "fast": True, **more})


def train_on(items, config, dtype=torch.float64):
    """(the model, its history): fine-tuned on items of one pair, a reward model on items of two."""
    if len(items[0]) == 1:
        return fine_tune(tiny(suppress_tokens=(0, 1)).to(dtype), [pair for (pair,) in items], [],
                         config, random.Random(0))
    return train_reward(tiny_reward().to(dtype), items, [], discriminator_loss, config,
                        random.Random(0))


@pytest.mark.parametrize("pairs", [1, 2])
def test_fast_is_autocast_of_the_same_loss(pairs, gradients, monkeypatch):
    """Loss and gradient to bfloat16's eight bits of those in float32, and yet not they; gradients
    and weights stay in float32, in which small steps add up. A failure means that --fast trains
    something else, or nothing fast."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    items = make_items(20, pairs)
    config = one_step(items)
    (_, exact), (model, low) = (train_on(items, plan, torch.float32)
                                for plan in (config, fast(config)))
    assert low[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.01)
    assert low[0]["loss"] != exact[0]["loss"]
    assert 0 < (gradients[1] - gradients[0]).norm() < 0.03 * gradients[0].norm()
    assert {gradients[1].dtype, *(p.dtype for p in model.state_dict().values())} == {torch.float32}


def test_policy_optimisation_in_bfloat16():
    """Near the steps in float32. log pi_SFT is computed as log pi is: in two precisions, a policy
    that has not moved would seem to have, and the KL would push it."""
    sft, init = tiny(2).float(), tiny(1).float()
    pairs = [(x, [4 + i, 2]) for x in ([3], [6]) for i in range(4)]

    def run(fast):
        return optimise_policy(sft, LogRatio(sft, init), lambda policy: pairs,
                               PolicyConfig(lr=1e-2, steps=3, fast=fast), 0.5)
    (exact, history), (low, records) = run(False), run(True)
    assert records[0]["kl"] == 0 and records[0]["entropy"] != history[0]["entropy"]
    for a, b in zip(history, records):
        assert b == pytest.approx(a, rel=0.05, abs=0.1)
    step = (flat(exact.parameters()) - flat(sft.parameters())).norm()
    difference = flat(low.parameters()) - flat(exact.parameters())
    assert 0 < difference.norm() < 0.3 * step and difference.dtype == torch.float32


@pytest.mark.parametrize("pairs", [1, 2])
def test_what_is_compiled_computes_the_same(pairs, gradients, monkeypatch):
    """torch.compile's own tracing and gradients, without its C++ and without bfloat16: batches of
    several shapes share a trace. One graph holds the blocks; for a policy another one holds the
    logits with their log-probabilities, which a break into Python would split. A failure means that
    the compiled model is another one, or that a part of it is not compiled."""
    graphs = []

    def backend(module, inputs):
        graphs.append(" ".join(str(node.target) for node in module.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(train, "autocast", lambda model, config: torch.autocast("cpu",
                                                                                enabled=False))
    torch._dynamo.reset()       # else a graph of an earlier test might serve
    items, config = make_items(28, pairs), TrainConfig(batch_size=9)
    for plan in (config, fast(config)):
        train_on(items, plan)
    assert len(gradients) == 8
    for a, b in zip(gradients[:4], gradients[4:]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    heads = [graph for graph in graphs if "scaled_dot_product" not in graph]
    assert all(word in graph for graph in heads for word in ("linear", "log_softmax", "gather"))
    assert bool(heads) == (pairs == 1) and len(heads) < len(graphs)


def test_the_compiler_is_for_training_alone(monkeypatch):
    """Compiled once and used at each step; gone afterwards. A model that kept it would hand its own
    compiled weights to its copies."""
    calls = []

    def compile(function, dynamic):
        calls.append("compiled")
        return lambda *args: calls.append(function.__name__) or function(*args)
    monkeypatch.setattr(torch, "compile", compile)
    items, config = make_items(8, 2), fast(TrainConfig(batch_size=4))
    reward, _ = train_on(items, config)
    assert calls == ["compiled"] * 2 + ["hidden"] * 2
    calls.clear()
    policy, _ = train_on([(better,) for better, _ in items], config)
    assert calls == ["compiled"] * 2 + ["hidden", "logp"] * 2
    for model in (reward.trunk, policy, copy.deepcopy(policy)):
        assert not {"hidden", "logp"} & {*vars(model)}
