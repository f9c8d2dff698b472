"""Thirty steps each of SFT, a reward model and policy optimisation, against the curves of before.

Unit tests look at one formula each. Here the defaults are what is tested: Adam's betas, the clip,
the warm-up, the order of the batches, the random streams. Whoever changes one of them on purpose
renews the curves, and the commit shows by how much they moved:

    python tests/test_golden_curves.py          writes tests/golden_curves.json

All is computed in float64, so that rounding, which differs from one machine to the next and with
the number of threads, stays far below the tolerance: 1e-12 where 1e-6 is allowed.
"""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # for the command above; pytest knows the way

from divergences import discriminator_loss                                      # noqa: E402
from model import GPT, GPTConfig, generate                                      # noqa: E402
from reward import LogRatio, RewardModel                                        # noqa: E402
from train import PolicyConfig, TrainConfig, fine_tune, optimise_policy, train_reward  # noqa: E402

EOS, LETTERS, STEPS = 1, range(2, 10), 30
EACH, MEAN = 1e-6, 1e-7     # largest difference of a number, and of a column's mean: its drift


def tiny(seed):
    torch.manual_seed(seed)
    return GPT(GPTConfig(10, n_positions=16, n_embd=16, n_layer=2, n_head=2, suppress_tokens=(0,),
                         eos_token_id=EOS)).double()


def alphabets(n, rng):
    """n pairs: a letter, and the letters after it in their order, now and then with an error."""
    def response(letter):
        return [rng.choice(LETTERS) if rng.random() < 0.1 else a for a in LETTERS if a > letter]
    prompts = [rng.choice(LETTERS[:5]) for _ in range(n)]
    return [([letter], [*response(letter), EOS]) for letter in prompts]


def curves():
    """{stage: {column: its value at each step}}."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng, init, other = random.Random(0), tiny(0), tiny(1)
    config = TrainConfig(lr=1e-2, batch_size=8, micro_tokens=48)
    pairs = alphabets(STEPS * config.batch_size, rng)
    _, sft = fine_tune(init, pairs, [], config, random.Random(1))
    shuffled = [(x, rng.sample(y[:-1], len(y) - 1) + [EOS]) for x, y in pairs]
    _, reward = train_reward(RewardModel(init).double(), list(zip(pairs, shuffled)), [],
                             discriminator_loss, config, random.Random(2))
    generator = torch.Generator().manual_seed(0)

    def draw(policy):
        prompts = [[letter] for letter in LETTERS]
        written = generate(policy, prompts, 4, max_new_tokens=8, generator=generator)
        return [(x, y) for x, ys in zip(prompts, written) for y in ys]
    _, policy = optimise_policy(init, LogRatio(other, init), draw,
                                PolicyConfig(lr=3e-3, steps=STEPS), 0.3)
    torch.set_num_threads(threads)
    columns = ("loss", "grad_norm")
    return {"sft": {column: [record[column] for record in sft] for column in columns},
            "reward": {column: [record[column] for record in reward] for column in columns},
            "policy": {column: [record[column] for record in policy]
                       for column in (*columns, "proxy", "kl", "entropy")}}


@pytest.fixture(scope="module")
def now():
    return curves()


@pytest.mark.parametrize("stage", ["sft", "reward", "policy"])
def test_training_curves_are_those_of_before(now, stage):
    """A failure means that training has changed: a default, a random stream, an order, or a
    formula that no other test looks at. The mean difference shows a drift to one side, which is
    a change, where rounding goes to both."""
    golden = json.loads((HERE / "golden_curves.json").read_text())[stage]
    assert set(now[stage]) == set(golden)
    for column, expected in golden.items():
        got = now[stage][column]
        assert len(got) == len(expected) == STEPS
        residuals = [a - b for a, b in zip(got, expected)]
        worst = max(range(STEPS), key=lambda step: abs(residuals[step]))
        assert abs(residuals[worst]) < EACH, f"{column} at step {worst}: {residuals[worst]:+.2e}"
        assert abs(sum(residuals) / STEPS) < MEAN, f"{column} drifts"


def test_the_golden_curves_can_see():
    """They have to learn something, and to be clipped at some steps and not at others: else a
    changed learning rate or clip would leave them as they are."""
    golden = json.loads((HERE / "golden_curves.json").read_text())
    for stage in golden.values():
        assert min(stage["grad_norm"]) < 1 < max(stage["grad_norm"])
    assert golden["sft"]["loss"][-1] < 0.6 * golden["sft"]["loss"][0]
    assert golden["reward"]["loss"][-1] < 0.6 * golden["reward"]["loss"][0]
    assert golden["policy"]["proxy"][-1] > golden["policy"]["proxy"][0] + 0.5


if __name__ == "__main__":
    rounded = {stage: {column: [round(value, 9) for value in values]
                       for column, values in columns.items()}
               for stage, columns in curves().items()}
    text = json.dumps(rounded).replace("], ", "],\n  ").replace("}, ", "},\n ")
    (HERE / "golden_curves.json").write_text(text + "\n")
