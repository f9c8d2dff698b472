"""Reward models: what they learn, what they must not depend on, and best-of-N's statistics."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from divergences import discriminator_loss
from model import GPT, GPTConfig, collate, logp_seq
from reward import (LogRatio, RewardModel, best_of_n_kl, best_of_n_weights, bradley_terry_loss,
                    calibration, correlation, mean_ci, rank_correlation, ranks, score, student_t,
                    win_rate)
from train import Schedule, discriminator_step, fit, pair_up, preference_step, train_reward


def tiny(seed=0, vocab=8):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab, n_positions=12, n_embd=16, n_layer=1, n_head=2))


def random_pairs(n, rng, low=2, high=8):
    def draw(length):
        return [rng.randrange(low, high) for _ in range(length)]
    return [(draw(1), draw(rng.randint(1, 6))) for _ in range(n)]


@pytest.mark.parametrize("head", ["sum", "last"])
def test_untrained_reward_is_zero(head):
    """Otherwise a discriminator would start with an opinion, most likely on length."""
    pairs = random_pairs(20, random.Random(0))
    assert np.all(score(RewardModel(tiny(), head), pairs) == 0)


@pytest.mark.parametrize("head", ["sum", "last"])
def test_padding_order_and_batch_size_change_no_reward(head):
    """Otherwise a candidate's reward would depend on which others it was scored with."""
    pairs, model = random_pairs(30, random.Random(1)), RewardModel(tiny(), head)
    torch.nn.init.normal_(model.score.weight)
    alone = np.array([score(model, [pair])[0] for pair in pairs])
    shuffled = random.Random(2).sample(range(30), 30)
    np.testing.assert_allclose(score(model, pairs, batch_size=7), alone, atol=1e-5)
    np.testing.assert_allclose(score(model, [pairs[i] for i in shuffled])[np.argsort(shuffled)],
                               alone, atol=1e-5)
    batch = collate(pairs[:5], pad=3)
    np.testing.assert_allclose(model(batch).detach(), alone[:5], atol=1e-5)


def test_token_rewards_read_the_state_before_and_the_action():
    """r(s_t, y_t): a later token must not change it, the token itself and an earlier one must."""
    model = RewardModel(tiny(), "sum")
    torch.nn.init.normal_(model.score.weight)
    base = model.token_rewards(collate([([2, 3], [4, 5, 6])]))[0]
    later = model.token_rewards(collate([([2, 3], [4, 5, 7])]))[0]
    earlier = model.token_rewards(collate([([3, 3], [4, 5, 6])]))[0]
    assert torch.equal(base[:2], torch.zeros(2))            # the prompt earns nothing
    torch.testing.assert_close(base[2:4], later[2:4])
    assert abs(base[4] - later[4]) > 1e-3 and (base[2:] - earlier[2:]).abs().min() > 1e-4


@pytest.mark.parametrize("head", ["sum", "last"])
def test_learns_an_obvious_difference(head):
    """Positives hold token 5, negatives never do: a head that misses that reads the wrong state."""
    rng = random.Random(3)
    negatives = random_pairs(400, rng, 2, 5)
    positives = [(x, [*y[:-1], 5]) for x, y in random_pairs(400, rng, 2, 5)]
    model, _ = train_reward(tiny(), *pair_up(positives, negatives, rng), discriminator_step,
                            Schedule(lr=3e-3, epochs=2, batch_size=16), rng, head)
    better, worse = score(model, positives), score(model, negatives)
    assert (better > 0).mean() > 0.98 and (worse < 0).mean() > 0.98


@pytest.mark.parametrize("head", ["sum", "last"])
def test_identical_sources_leave_a_discriminator_at_chance(head):
    """Held-out loss picks the weights: on one source, accuracy on fresh samples is one half.

    400 fresh pairs, standard error 1.8%; the margin is four of them.
    """
    rng = random.Random(4)
    items = pair_up(random_pairs(300, rng), random_pairs(300, rng), rng)
    model, _ = train_reward(tiny(), *items, discriminator_step,
                            Schedule(lr=3e-3, epochs=3, batch_size=16), rng, head)
    fresh = score(model, random_pairs(800, rng))
    labels = np.arange(800) % 2 == 0
    assert abs(((fresh > 0) == labels).mean() - 0.5) < 0.072


def test_log_ratio_is_the_discriminators_optimum():
    """On all 4^3 responses of two tiny policies: training with the exact densities as weights ends
    at log pi_SFT - log pi_0. A flipped sign or swapped policies would end at its negative.
    """
    init, sft = tiny(5, vocab=4), tiny(6, vocab=4)
    for model in (init, sft):
        torch.nn.init.normal_(model.wte.weight, std=0.3)
    batch = collate([([0], list(y)) for y in itertools.product(range(4), repeat=3)])
    with torch.no_grad():
        target = LogRatio(sft, init)(batch)
        w_sft, w_init = logp_seq(sft, batch).exp(), logp_seq(init, batch).exp()
    assert abs(w_sft.sum() - 1) < 1e-5 and abs(w_init.sum() - 1) < 1e-5
    logit = torch.zeros(64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logit], max_iter=300, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-9, tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = discriminator_loss(logit, logit, w_sft, w_init)
        loss.backward()
        return loss
    optimizer.step(closure)
    likely = torch.minimum(w_sft, w_init) > 1e-3
    assert likely.sum() > 10 and (logit.detach() - target)[likely].abs().max() < 0.02


def test_bradley_terry():
    """Value at chance, direction, and invariance to a shift of both rewards."""
    a, b = torch.randn(50), torch.randn(50)
    assert bradley_terry_loss(a, a).item() == pytest.approx(math.log(2))
    assert bradley_terry_loss(a + 3, a) < bradley_terry_loss(a, a) < bradley_terry_loss(a - 3, a)
    torch.testing.assert_close(bradley_terry_loss(a + 7, b + 7), bradley_terry_loss(a, b))
    rng = random.Random(7)
    items = [((x, [5]), (x, [6])) for x, _ in random_pairs(200, rng)]
    model = RewardModel(tiny(), "sum")
    fit(model, items, preference_step, Schedule(lr=3e-3, epochs=2, batch_size=16), rng)
    assert (score(model, [i[0] for i in items]) > score(model, [i[1] for i in items])).all()


def test_best_of_n_weights_average_over_all_subsets():
    """Against brute force over every subset of size n: any other weighting is biased."""
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for n in (1, 2, 4, 6):
        weights = best_of_n_weights(scores, n)
        np.testing.assert_allclose(weights.sum(1), 1)
        brute = [np.mean([v[max(subset, key=lambda i: s[i])]
                          for subset in itertools.combinations(range(6), n)])
                 for s, v in zip(scores, values)]
        np.testing.assert_allclose((weights * values).sum(1), brute)
    np.testing.assert_allclose(best_of_n_weights(np.ones((1, 3)), 3), [[0, 0, 1]])  # the later one


def test_best_of_n_kl_is_exact_on_an_enumerable_policy():
    """KL(best-of-N || pi) of m equally likely outcomes ranked by reward: no ties as m grows."""
    m, n = 20000, 16
    law = (np.arange(1, m + 1) / m) ** n - (np.arange(m) / m) ** n      # F(r)^N - F(r-)^N
    assert (law * np.log(law * m)).sum() == pytest.approx(best_of_n_kl(n), abs=1e-3)
    assert best_of_n_kl(1) == 0


def test_win_rate_counts_ties_half_and_is_antisymmetric():
    a, b = np.array([[1.0, 2.0, 2.0]]), np.array([[0.0, 2.0]])
    np.testing.assert_allclose(win_rate(a, b), [[0.5, 0.75, 0.75]])
    assert win_rate(a, b).mean() + win_rate(b, a).mean() == pytest.approx(1)


def test_student_t_and_mean_ci():
    """df = 1 and 2 have closed forms: tan(0.475 pi) and 0.95 sqrt(2 / (1 - 0.95^2))."""
    assert student_t(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-2)
    assert student_t(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95 ** 2)), rel=1e-3)
    assert student_t(10 ** 6) == pytest.approx(1.95996, rel=1e-3)
    mean, half = mean_ci([1.0, 3.0])
    assert mean == 2 and half == pytest.approx(student_t(1))
    assert math.isnan(mean_ci([1.0])[1])


def test_ranks_and_correlations():
    np.testing.assert_allclose(ranks([[3.0, 1.0, 3.0]]), [[1.5, 0.0, 1.5]])
    a = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    b = np.array([[1.0, 10.0, 100.0], [5.0, 4.0, 3.0]])
    np.testing.assert_allclose(correlation(ranks(a), ranks(b)), [1, -1])
    assert rank_correlation(a, b) == pytest.approx(0)
    assert np.isnan(correlation(np.ones(3), np.arange(3.0)))


def test_calibration():
    """A discriminator that says 0.8 and is right 80% of the time has no error; one at 0.99 has."""
    labels = np.r_[np.ones(80), np.zeros(20)]
    assert calibration(np.full(100, math.log(4)), labels) == pytest.approx(0, abs=1e-9)
    assert calibration(np.full(100, 5.0), labels) == pytest.approx(1 / (1 + math.exp(-5)) - 0.8)


@pytest.mark.parametrize("kind", ["sum", "last", "ratio", "floored", "policy"])
def test_prompts_encoded_once_change_no_reward(kind):
    """Candidates of one long prompt share its encoding; what each earns is as if it stood alone."""
    rng, policy = random.Random(3), tiny()
    prompts = [[rng.randrange(2, 8) for _ in range(length)] for length in (5, 7, 6)]
    pairs = [(x, [rng.randrange(2, 8) for _ in range(rng.randint(0, 5))])
             for x in prompts for _ in range(6)]
    if kind in ("sum", "last"):
        reward = RewardModel(policy, kind)
        torch.nn.init.normal_(reward.score.weight)
    elif kind == "policy":
        def reward(batch):
            return logp_seq(policy, batch)
    else:
        reward = LogRatio(policy, tiny(1), 0.1 if kind == "floored" else 0.0)
    runs, states = [], GPT._prefill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "_prefill", lambda *a: runs.append(len(a[1])) or states(*a))
        together = score(reward, pairs, batch_size=8, n=6)
    assert sum(runs) % 9 == 0 and runs, "each run of two has its prompt encoded once"
    alone = score(reward, pairs, batch_size=1)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(score(reward, pairs, batch_size=5, n=6), alone, atol=1e-5)
    with pytest.raises(ValueError, match="18 pairs do not come in runs of 4"):
        score(reward, pairs, n=4)
    pairs += [([], y) for _, y in pairs[:6]]        # an empty prompt has no encoding to share
    np.testing.assert_allclose(score(reward, pairs, n=6), score(reward, pairs), atol=1e-5)
