"""Reward models: what they learn, what they must not depend on, and best-of-N's weights."""

import itertools
import random

import numpy as np
import pytest
import torch

from divergences import discriminator_loss
from model import GPT, GPTConfig, collate
from reward import LogRatio, RewardModel, best_of_n_weights, score
from train import TrainConfig, pair_up, train_reward

both_heads = pytest.mark.parametrize("head", ["sum", "last"])


def tiny(seed=0, vocab=8):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab, n_positions=12, n_embd=16, n_layer=1, n_head=2, eos_token_id=1,
                         pad_token_id=0))


def random_head(head, seed=0):
    reward = RewardModel(tiny(seed), head)
    torch.nn.init.normal_(reward.score.weight)
    torch.nn.init.normal_(reward.score.bias)
    return reward


def random_pairs(n, rng, low=2, high=8):
    def draw(length):
        return [rng.randrange(low, high) for _ in range(length)]
    return [(draw(1), draw(rng.randint(1, 6))) for _ in range(n)]


@both_heads
def test_untrained_reward_is_zero(head):
    """Otherwise a discriminator would start with an opinion, most likely on length."""
    pairs = random_pairs(20, random.Random(0))
    assert np.all(score(RewardModel(tiny(), head), pairs) == 0)


@both_heads
def test_padding_order_and_batch_size_change_no_reward(head):
    """Otherwise a candidate's reward would depend on which others it was scored with."""
    pairs, reward = random_pairs(30, random.Random(1)), random_head(head)
    alone = np.array([score(reward, [pair])[0] for pair in pairs])
    shuffled = random.Random(2).sample(range(30), 30)
    np.testing.assert_allclose(score(reward, pairs, batch_size=7), alone, atol=1e-5)
    np.testing.assert_allclose(score(reward, [pairs[i] for i in shuffled])[np.argsort(shuffled)],
                               alone, atol=1e-5)
    np.testing.assert_allclose(reward(collate(pairs[:5], pad=3)).detach(), alone[:5], atol=1e-5)
    assert alone.std() > 0.5


def test_the_summed_head_reads_the_state_before_the_token():
    """r(x, y) = sum_t e(y_t) . (A h(s_t) + c), by hand. A head that read the state after the token
    would see the action itself: its reward would be no sum over actions, and no log-ratio."""
    reward = random_head("sum").double()
    prompt, response = [2, 3], [4, 5, 6]
    got = reward.token_rewards(collate([(prompt, response), ([2], [7] * 5)]))[0]
    expected, ids = [0.0, 0.0], prompt + response          # the prompt earns nothing
    for t in range(len(prompt), len(ids)):
        state = reward.trunk.hidden(torch.tensor([ids[:t]]))[0, -1]
        action = reward.trunk.wte.weight[ids[t]]
        expected.append((action @ (reward.score.weight @ state + reward.score.bias)).item())
    assert got.tolist() == pytest.approx([*expected, 0.0]) and min(map(abs, expected[2:])) > 0.1


def test_the_last_head_reads_the_state_after_the_last_token():
    """w . h + b, given in the batch's last column. A failure means the common reward head reads
    padding, or gives its reward before the response has ended."""
    reward = random_head("last").double()
    got = reward.token_rewards(collate([([2, 3], [4, 5]), ([2], [7] * 5)]))[0]
    state = reward.trunk.hidden(torch.tensor([[2, 3, 4, 5]]))[0, -1]
    expected = (reward.score.weight @ state + reward.score.bias).item()
    assert got.tolist() == pytest.approx([0] * 5 + [expected]) and abs(expected) > 0.1


@both_heads
def test_a_reward_model_is_where_its_policy_is(head):
    """On a GPU a head that stayed behind would stop the run at its first reward."""
    reward = RewardModel(tiny().to("meta"), head)
    assert {t.device.type for t in reward.state_dict().values()} == {"meta"}
    assert reward.device.type == "meta" == LogRatio(reward.trunk, reward.trunk).device.type


@both_heads
def test_the_trunk_is_a_copy(head):
    """A failure means that training a reward model moves pi_0, from which all start."""
    policy = tiny()
    reward = RewardModel(policy, head)
    for p in reward.parameters():
        torch.nn.init.zeros_(p)
    assert policy.wte.weight.abs().min() > 0


@both_heads
def test_learns_an_obvious_difference(head):
    """Positives hold token 5, negatives never do: a head that misses that reads the wrong state."""
    rng = random.Random(3)
    negatives = random_pairs(400, rng, 2, 5)
    positives = [(x, [*y[:-1], 5]) for x, y in random_pairs(400, rng, 2, 5)]
    reward, _ = train_reward(RewardModel(tiny(), head), *pair_up(positives, negatives, rng),
                             discriminator_loss, TrainConfig(lr=3e-3, epochs=2), rng)
    better, worse = score(reward, positives), score(reward, negatives)
    assert (better > 0).mean() > 0.98 and (worse < 0).mean() > 0.98


@both_heads
def test_identical_sources_leave_a_discriminator_at_chance(head):
    """Held-out loss picks the weights: on one source, accuracy on fresh samples is one half.

    400 fresh pairs, standard error 1.8%; the margin is four of them.
    """
    rng = random.Random(4)
    items = pair_up(random_pairs(300, rng), random_pairs(300, rng), rng)
    reward, _ = train_reward(RewardModel(tiny(), head), *items, discriminator_loss,
                             TrainConfig(lr=3e-3, epochs=3), rng)
    fresh = score(reward, random_pairs(800, rng))
    labels = np.arange(800) % 2 == 0
    assert abs(((fresh > 0) == labels).mean() - 0.5) < 0.072


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
