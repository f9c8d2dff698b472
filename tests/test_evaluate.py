"""The Evaluator's numbers against exact ones, and the statistics that every table rests on.

The world of these tests can be listed: 7 responses of at most two tokens to each of three prompts,
and policies whose probabilities are multiples of 1/8 or 1/16. A list that holds each response as
often as its probability asks for makes every mean over samples an exact expectation.
"""

import itertools
import json
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig, collate, logp_seq
from reward import LogRatio, best_of_n_kl
from utils import evaluate
from utils.cli import InputError
from utils.evaluate import (SAMPLES, Evaluator, calibration, distinct, grouped,
                            human_agreement, inspect_rewards, mean_ci, over_seeds, parse_methods,
                            pick_samples, rank_correlation, ranks, read_responses, row_name,
                            sample_responses, student_t, summarise, wilson_interval, win_rate)

# ---- a world that can be listed -----------------------------------------------------------------

PAD, EOS, A, B, MARK = range(5)
LETTERS = {A: "a", B: "b", MARK: "~"}
TEXTS = ["", "a", "aa", "ab", "b", "ba", "bb"]
# Sixteenths of each response, in the order of TEXTS.
SFT = dict(zip(TEXTS, (4, 4, 2, 2, 2, 1, 1)))
POLICY = dict(zip(TEXTS, (2, 2, 2, 2, 4, 2, 2)))
DEMO = dict(zip(TEXTS, (2, 6, 1, 1, 3, 2, 1)))


def encode(text):
    """Two letters are cut there, before EOS, as the longest responses are."""
    return ([{"a": A, "b": B, "~": MARK}[letter] for letter in text] + [EOS])[:2]


class Policy:
    """A policy with given probabilities, in sixteenths, the same for every prompt."""
    device = "cpu"

    def __init__(self, law):
        self.law = law

    def listed(self, total):
        """Each response as often as its probability of `total` samples asks for."""
        assert all(share * total % 16 == 0 for share in self.law.values())
        return [encode(text) for text, share in self.law.items()
                for _ in range(share * total // 16)]


def text_of(ids):
    return "".join(LETTERS.get(i, "") for i in ids)


def golden(prompt, text):
    """Points: of each prompt another scale, so that prompts and samples vary differently."""
    return (1 + 3 * len(prompt)) * text.count("a") - text.count("b") + len(prompt)


def world_of(**more):
    prompts = ["a", "aa", "bab"]
    tokenizer = SimpleNamespace(encode=lambda text: [A if c == "a" else B for c in text], eos=EOS)
    fields = {"tokenizer": tokenizer, "text": text_of, "max_response": 2, "test_prompts": prompts,
              "pair": lambda x, y: (tokenizer.encode(x), encode(y)), "unmark": None,
              "test_demos": [[text for text, k in DEMO.items() for _ in range(k)] for _ in prompts],
              "golden": golden, "golden_ids": None,
              "points": lambda x, y: golden(text_of(x), text_of(y)),
              "demo_logp": lambda x, y: math.log(DEMO[y] / 16),
              "human_pairs": [], "demos": [("a", "a~"), ("b", "b~")]}
    return SimpleNamespace(**{**fields, **more})


@pytest.fixture
def listed(monkeypatch):
    """`generate` lists a Policy's responses and `logp_seq` looks their probability up."""
    def generate(policy, prompts, n, max_new_tokens, generator, label):
        return [policy.listed(n) for _ in prompts]

    def logp(policy, batch):
        rows = zip(batch.tokens.tolist(), batch.prompt_lengths.tolist(), batch.lengths.tolist())
        return torch.tensor([math.log(policy.law[text_of(row[m:n])] / 16) for row, m, n in rows])
    monkeypatch.setattr(evaluate, "generate", generate)
    monkeypatch.setattr(evaluate, "logp_seq", logp)


def evaluator_of(world, comparison=None):
    """The candidates are all of pi_SFT; the comparison are samples that it might have given."""
    run = SimpleNamespace(seed=3, generator=lambda stage: stage)
    shown = comparison or ["", "a", "a", "aa", "b", "b", "ba", "bb"]
    return Evaluator(
        world, Policy(SFT), sample_responses(world, Policy(SFT), 16, None),
        read_responses(world, [[encode(y) for y in shown] for _ in world.test_prompts]), run)


def kl(p, q):
    """KL(p || q) of two laws in sixteenths, nats."""
    return sum(p[y] / 16 * math.log(p[y] / q[y]) for y in TEXTS)


def entropy(p):
    return -sum(p[y] / 16 * math.log(p[y] / 16) for y in TEXTS)


def mean_golden(law):
    """Per prompt, the exact expectation of golden."""
    return [sum(law[y] / 16 * golden(x, y) for y in TEXTS) for x in world_of().test_prompts]


def wins(law, other):
    """P(golden of law > golden of the texts `other`), ties half: the mean over prompts."""
    return np.mean([sum(law[y] / 16 * ((golden(x, y) > golden(x, z)) + (golden(x, y) ==
                                                                       golden(x, z)) / 2)
                        for y in TEXTS for z in other) / len(other)
                    for x in world_of().test_prompts])


# ---- rows of the table --------------------------------------------------------------------------

def test_a_policy_s_row_is_exact(listed):
    """Each of KL, reverse KL, forward KL and entropy has its sign and its two sides; each win rate
    its opponent."""
    evaluator = evaluator_of(world_of())
    evaluator.add_policy("po init-sft 0.3", Policy(POLICY))
    [row] = evaluator.rows
    assert row["name"] == "policy optimisation, init-sft 0.3" and row["seed"] == 3
    assert row["kl"] == pytest.approx(kl(POLICY, SFT), abs=1e-6)
    assert row["reverse_kl"] == pytest.approx(kl(POLICY, DEMO), abs=1e-6)
    assert row["forward_kl"] == pytest.approx(kl(DEMO, POLICY), abs=1e-6)
    assert row["entropy"] == pytest.approx(entropy(POLICY), abs=1e-6)
    assert row["golden"] == pytest.approx(np.mean(mean_golden(POLICY)))
    assert row["win_vs_sft"] == pytest.approx(wins(POLICY, evaluator.comparison.texts[0]))
    assert row["win_vs_demo"] == pytest.approx(wins(POLICY, evaluator.demo.texts[0]))
    assert row["length"] == (2 * 1 + 14 * 2) / 16
    assert row["distinct"] == 7 / 8 and row["proxy"] is None
    values = [row[key] for key in ("kl", "reverse_kl", "forward_kl", "win_vs_sft", "win_vs_demo")]
    assert len({round(value, 3) for value in values}) == 5      # none could stand for another


def test_the_interval_of_golden_is_over_prompts(listed):
    """Samples of one prompt are alike; over all samples the interval would be far too short."""
    evaluator = evaluator_of(world_of())
    evaluator.add_policy("spin", Policy(POLICY))
    per_prompt = mean_golden(POLICY)
    sd = np.std(per_prompt, ddof=1)
    assert evaluator.rows[0]["golden_ci95"] == pytest.approx(4.3027 * sd / math.sqrt(3))


def test_the_proxy_of_a_policy_is_its_own_reward(listed):
    """Mean over its own samples; the reward is called with batches, so it may be any function."""
    def reward(batch):
        return batch.lengths.double() - batch.prompt_lengths
    reward.device = "cpu"
    evaluator = evaluator_of(world_of())
    evaluator.add_policy("po length 1", Policy(POLICY), reward)
    assert evaluator.rows[0]["proxy"] == evaluator.rows[0]["length"] == 30 / 16


def test_the_reference_rows_are_exact(listed):
    evaluator = evaluator_of(world_of())
    evaluator.add_reference_rows()
    sft, demo = evaluator.rows
    assert (sft["name"], demo["name"]) == ("pi_SFT", "demonstrations")
    assert sft["kl"] == 0 and demo["forward_kl"] == 0 and demo["kl"] is None
    assert sft["reverse_kl"] == pytest.approx(kl(SFT, DEMO), abs=1e-6)
    assert sft["forward_kl"] == pytest.approx(kl(DEMO, SFT), abs=1e-6)
    assert sft["entropy"] == pytest.approx(entropy(SFT), abs=1e-6)
    assert demo["reverse_kl"] == 0 and demo["entropy"] == pytest.approx(entropy(DEMO))
    assert demo["golden"] == pytest.approx(np.mean(mean_golden(DEMO)))
    assert demo["win_vs_demo"] == pytest.approx(0.5)    # against itself, ties half
    assert sft["win_vs_sft"] != pytest.approx(0.5)      # but the comparison is not the candidates
    assert sft["distinct"] == 2 / 8     # the first 8 of the list are four times "" and "a"


def test_best_of_n_s_row_is_the_mean_of_its_picks(listed):
    """Proxy and golden of the picks, not of the best of all; the formula's KL moves the density of
    pi_SFT to a bound of the selector's: up in the reverse KL, down in the entropy."""
    evaluator, n = evaluator_of(world_of()), 4
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 16))
    groups = scores.reshape(3, 4, n)
    picks = groups.argmax(axis=2) + n * np.arange(4)
    evaluator.add_best_of_n("init-sft", picks, scores, n)
    [row] = evaluator.rows
    texts = [[text for text, k in SFT.items() for _ in range(k)]] * 3
    picked = [[(x, texts[p][j], scores[p, j]) for j in picks[p]]
              for p, x in enumerate(evaluator.world.test_prompts)]
    flat = [item for part in picked for item in part]
    formula = math.log(n) - (n - 1) / n
    logp = np.mean([math.log(SFT[y] / 16) for _, y, _ in flat])
    assert row["name"] == "best of 4, init-sft"
    assert row["proxy"] == pytest.approx(groups.max(axis=2).mean())
    assert row["proxy"] < scores.max(axis=1).mean()
    assert row["golden"] == pytest.approx(np.mean([golden(x, y) for x, y, _ in flat]))
    half = 4.3027 * np.std([np.mean([golden(x, y) for x, y, _ in part]) for part in picked],
                           ddof=1) / math.sqrt(3)
    assert row["golden_ci95"] == pytest.approx(half)
    assert row["kl"] == pytest.approx(formula)
    assert row["entropy"] == pytest.approx(-logp - formula, abs=1e-6)
    assert row["reverse_kl"] == pytest.approx(
        logp + formula - np.mean([math.log(DEMO[y] / 16) for _, y, _ in flat]), abs=1e-6)
    assert row["forward_kl"] is None and row["distinct"] is None
    rate = np.mean([(golden(x, y) > golden(x, z)) + (golden(x, y) == golden(x, z)) / 2
                    for x, y, _ in flat for z in evaluator.comparison.texts[0]])
    assert row["win_vs_sft"] == pytest.approx(rate)


def test_the_controls_are_exact(listed):
    """Each selector's scores (P, N): log pi_SFT(y|x), this by token with EOS as one of them, the
    number of tokens, a coin of its own for each candidate, and golden where it is known."""
    scores = evaluator_of(world_of()).controls(random.Random(0))
    texts = [text for text, k in SFT.items() for _ in range(k)]
    logp = np.array([math.log(SFT[y] / 16) for y in texts])
    length = np.array([len(encode(y)) for y in texts])
    assert list(scores) == ["likelihood", "likelihood per token", "length", "random", "golden"]
    for name, row in (("likelihood", logp), ("likelihood per token", logp / length),
                      ("length", length)):
        assert scores[name].shape == (3, 16) and set(length) == {1, 2}
        assert np.abs(scores[name] - row).max() < 1e-6, name
    rng = random.Random(0)
    assert scores["random"].tolist() == [[rng.random() for _ in texts] for _ in range(3)]
    assert scores["golden"].tolist() == [[golden(x, y) for y in texts]
                                         for x in world_of().test_prompts]
    unknown = evaluator_of(world_of(golden=None, demo_logp=None)).controls(random.Random(0))
    assert list(unknown) == list(scores)[:-1]


def test_a_random_selector_is_pi_sft(listed):
    """It does not look at (x, y): the formula's KL would be that of a selector by a reward."""
    evaluator = evaluator_of(world_of())
    scores, everything = np.zeros((3, 16)), np.tile(np.arange(16), (3, 1))
    evaluator.add_best_of_n("random", everything, scores, 16)
    evaluator.add_curve("random", scores)
    [row] = evaluator.rows
    assert row["kl"] == 0 and row["entropy"] == pytest.approx(entropy(SFT), abs=1e-6)
    assert row["reverse_kl"] == pytest.approx(kl(SFT, DEMO), abs=1e-6)
    assert [point["kl"] for point in evaluator.curve] == [0.0] * 5


def test_the_curve_of_best_of_n_is_the_mean_over_all_subsets(listed):
    """Against every subset of n of the 16 candidates, for n = 1, 2, 4, 8, 16."""
    evaluator = evaluator_of(world_of())
    rng = np.random.default_rng(1)
    scores = rng.permuted(np.tile(np.arange(16.0), (3, 1)), axis=1)
    evaluator.add_curve("init-sft", scores)
    assert [point["n"] for point in evaluator.curve] == [1, 2, 4, 8, 16]
    for point in evaluator.curve:
        n = point["n"]
        best = [[max(subset, key=lambda j: scores[p, j])
                 for subset in itertools.combinations(range(16), n)] for p in range(3)]
        for key, values in (("golden", evaluator.candidates.golden), ("proxy", scores)):
            assert point[key] == pytest.approx(
                np.mean([values[p, j] for p in range(3) for j in best[p]]))
        assert point["kl"] == pytest.approx(best_of_n_kl(n))
        assert (point["seed"], point["reward_model"]) == (3, "init-sft")


def test_where_nobody_knows_the_truth_its_columns_are_empty(listed):
    """People's own data: what pi and pi_SFT alone define is still there."""
    evaluator = evaluator_of(world_of(golden=None, demo_logp=None))
    evaluator.add_reference_rows()
    evaluator.add_policy("init", Policy(POLICY))
    picks = np.zeros((3, 1), int)
    evaluator.add_best_of_n("init-sft", picks, np.ones((3, 16)), 16)
    evaluator.add_curve("init-sft", np.ones((3, 16)))
    unknown = ("golden", "golden_ci95", "win_vs_sft", "win_vs_demo", "reverse_kl", "forward_kl")
    assert [row["name"] for row in evaluator.rows] == ["pi_SFT", "demonstrations", "pi_0",
                                                       "best of 16, init-sft"]
    assert all(row[key] is None for row in evaluator.rows for key in unknown)
    assert evaluator.rows[2]["kl"] == pytest.approx(kl(POLICY, SFT), abs=1e-6)
    assert evaluator.curve[0]["golden"] is None
    assert evaluator.measure([([A], [A, EOS]), ([B], [B])]) == {"length": 1.5}
    assert summarise(evaluator.rows, 16)["methods"] == {}


def test_marks_are_taken_off_before_the_forward_kl(listed):
    """No policy can write one: with them the forward KL would be infinite."""
    plain = world_of()
    marked = [[f"~{y}" if len(y) < 2 else y for y in row] for row in plain.test_demos]
    world = world_of(unmark=lambda y: y.replace("~", ""), test_demos=marked,
                     demo_logp=lambda x, y: math.log(DEMO[y.replace("~", "")] / 16))
    evaluator = evaluator_of(world)
    evaluator.add_policy("spin", Policy(POLICY))
    assert evaluator.rows[0]["forward_kl"] == pytest.approx(kl(DEMO, POLICY), abs=1e-6)
    assert "~" in evaluator.demo.texts[0] and "~" not in evaluator.unmarked.texts[0]


def test_measure_reads_samples_to_training_prompts():
    """They answer other prompts than the held-out ones: the pairs themselves say which."""
    measured = Evaluator.measure(SimpleNamespace(world=world_of()),
                                 [([A, A], [A, A]), ([B], [B, EOS]), ([A], [EOS])])
    assert measured == {"golden": pytest.approx((golden("aa", "aa") + golden("b", "b")
                                                 + golden("a", "")) / 3),
                        "length": pytest.approx(5 / 3)}


def test_distinct_is_of_eight_responses_to_a_prompt():
    """Of more, repeats would become likelier without the policy being another one."""
    assert distinct([["a", "b", "a", "c"]]) == 0.75
    assert distinct([["a"] * 8 + ["b"] * 8, list("abcdefgh") + ["a"] * 8]) == (1 / 8 + 1) / 2


def test_methods_are_read_from_their_flag_and_named_in_the_table():
    """One method a name: a number written in two ways must not be two rows of the table."""
    assert parse_methods(" spin,po  init-sft .30, spin,") == ["spin", "po init-sft 0.3"]
    assert parse_methods("none") == [] and parse_methods("all") == list(evaluate.METHODS)
    assert parse_methods(", ".join(evaluate.METHODS)) == list(evaluate.METHODS)
    assert [row_name(method) for method in ("init", *evaluate.METHODS)] == [
        "pi_0", "policy optimisation, init-sft 0.3", "closed form, log-ratio 0.3",
        "closed form, floored 0.3", "adversarial, reverse_kl", "adversarial, forward_kl",
        "adversarial-exact, reverse_kl", "adversarial-exact, forward_kl", "temperature, 0.5",
        "spin", "irft", "dpo"]


@pytest.mark.parametrize("text, message", [
    ("sarsa", "unknown 'sarsa'; known: po, closed-form, adversarial, "),
    ("po init-sft", "'po init-sft' must have the form: po init-sft|init-demo|"),
    ("spin 3", "'spin 3' must have the form: spin"),
    ("po golden 0.3", "'po golden 0.3' must have the form: po init-sft|"),
    ("closed-form init-sft 1", "'closed-form init-sft 1' must have the form: closed-form log-"),
    ("adversarial kl", "'adversarial kl' must have the form: adversarial reverse_kl|forward_kl|"),
    *((f"spin, po init-sft {beta}", f"BETA must be a number above 0 and below inf, not {beta}")
      for beta in ("0", "-1", "nan", "inf", "some")),
    ("temperature 1", "T must be a number above 0 and below 1, not 1")])
def test_methods_that_do_not_exist_are_refused(text, message):
    with pytest.raises(InputError, match=re.escape(f"--methods: {message}")):
        parse_methods(text)


def test_a_transformer_is_evaluated_by_its_own_samples():
    """With nothing replaced: the samples are those of the method's own random stream, and the row
    is made of the transformer's log-probabilities of them."""
    world = world_of(demo_logp=lambda x, y: -1.0)

    def gpt(seed):
        torch.manual_seed(seed)
        config = GPTConfig(4, n_positions=8, n_embd=16, n_layer=1, n_head=2, eos_token_id=EOS,
                           suppress_tokens=(PAD,))
        policy = GPT(config).double()
        torch.nn.init.normal_(policy.wte.weight, std=0.3)
        return policy
    sft, policy = gpt(0), gpt(1)
    run = SimpleNamespace(seed=0, generator=lambda stage: torch.Generator().manual_seed(
        random.Random(stage).getrandbits(62)))
    candidates, comparison = (sample_responses(world, sft, n, run.generator(stage))
                              for n, stage in ((16, "candidates samples"), (SAMPLES, "rivals")))
    evaluator = Evaluator(world, sft, candidates, comparison, run)
    evaluator.add_reference_rows()
    evaluator.add_policy("init", policy)
    responses = evaluator.responses["pi_0"]
    again = sample_responses(world, policy, SAMPLES, run.generator("init samples"))
    assert responses.texts == again.texts and np.shape(responses.texts) == (3, SAMPLES)
    assert evaluator.rows[0]["kl"] == 0
    evaluator.add_policy("sft", sft)
    assert evaluator.rows[-1]["kl"] == pytest.approx(0, abs=1e-12)

    def exact(model):       # without batches
        return np.array([logp_seq(model, collate([pair])).item() for pair in responses.pairs])
    with torch.no_grad():
        assert evaluator.rows[2]["kl"] == pytest.approx((exact(policy) - exact(sft)).mean(),
                                                        abs=1e-6)
        assert evaluator.rows[2]["entropy"] == pytest.approx(-exact(policy).mean(), abs=1e-6)
        assert evaluator.rows[2]["reverse_kl"] == pytest.approx(exact(policy).mean() + 1, abs=1e-6)


# ---- what the reward models learned -------------------------------------------------------------

def reward_of(value):
    """A reward from value(prompt text, response text)."""
    def reward(batch):
        rows = zip(batch.tokens.tolist(), batch.prompt_lengths.tolist(), batch.lengths.tolist())
        return torch.tensor([float(value(text_of(row[:m]), text_of(row[m:n])))
                             for row, m, n in rows])
    reward.device = "cpu"
    return reward


def pair(x, y):
    return world_of().pair(x, y)


def test_reward_models_are_described_by_what_they_score():
    """One that counts b: wrong about golden, which counts a; marks are worth 3 points to it."""
    world = world_of(unmark=lambda y: y.replace("~", ""))
    candidates = read_responses(world, [[encode(y) for y in TEXTS]] * 3)
    reward = reward_of(lambda x, y: y.count("b") - 0.5 + 3 * y.count("~"))
    scores = np.array([[y.count("b") - 0.5 for y in TEXTS]] * 3)
    held_out = [(pair("a", "b"), pair("a", "a"))] * 3 + [(pair("a", "a"), pair("a", "b"))]
    [record] = inspect_rewards(world, 3, {"init-sft": reward}, {"init-sft": ([], held_out)},
                               {"init-sft": scores}, candidates)
    assert (record["seed"], record["reward_model"]) == (3, "init-sft")
    assert record["accuracy"] == 0.75
    d = 1 / (1 + math.exp(-0.5))
    assert record["calibration_error"] == pytest.approx(abs(0.75 - d), abs=1e-6)
    by_hand = np.mean([np.corrcoef(ranks(row), ranks([golden(x, y) for y in TEXTS]))[0, 1]
                       for x, row in zip(world.test_prompts, scores)])
    assert record["corr_golden"] == pytest.approx(by_hand) and record["corr_golden"] < -0.5
    length = np.corrcoef(ranks(scores[0]), ranks([len(encode(y)) for y in TEXTS]))[0, 1]
    assert record["corr_length"] == pytest.approx(length) and length > 0.2
    assert record["marks_worth"] == pytest.approx(3 / scores.std())
    assert record["human_agreement"] is None and record["human_pairs"] == 0


def test_bradley_terry_rewards_are_compared_in_pairs():
    """Their logits have no zero: a constant of each prompt must move neither number."""
    held_out = [(pair("a", "aa"), pair("a", "b")), (pair("aa", "a"), pair("aa", "aa"))]
    numbers = [evaluate.held_out_quality(reward_of(lambda x, y: y.count("a") + c * len(x)),
                                         held_out, "preference") for c in (0, 100)]
    assert numbers[0]["accuracy"] == 0.5 and numbers[0] == pytest.approx(numbers[1])
    nothing = evaluate.held_out_quality(reward_of(len), [], "init-sft")
    assert all(math.isnan(value) for value in nothing.values())


def test_what_marks_are_worth_to_a_log_ratio_is_not_asked():
    """To it they are -inf, as no policy can write them."""
    torch.manual_seed(0)
    policy = GPT(GPTConfig(5, n_positions=8, n_embd=16, n_layer=1, n_head=2,
                           suppress_tokens=(PAD, MARK)))
    world = world_of(unmark=lambda y: y.replace("~", ""), golden=None)
    candidates = read_responses(world, [[encode(y) for y in TEXTS]] * 3)
    [record] = inspect_rewards(world, 0, {"log-ratio": LogRatio(policy, policy)},
                               {"log-ratio": ([], [])}, {"log-ratio": np.ones((3, 7))},
                               candidates)
    assert record["marks_worth"] is None and record["corr_golden"] is None
    assert math.isnan(record["corr_length"])        # scores that do not vary go with nothing


def test_the_calibration_error_of_a_perfect_discriminator():
    """The docstring's numbers: two Normals, whose exact logit is known, 900 items, and then 450
    positives that are 200 texts repeated. A failure means that noise is taken for a fault of the
    reward model, or the other way round."""
    rng, once, repeated = np.random.default_rng(0), [], []
    for _ in range(400):
        negatives, positives = rng.normal(-0.6, 1, 450), rng.normal(0.6, 1, 450)
        labels = np.repeat([1.0, 0.0], 450)
        for errors, texts in ((once, positives), (repeated, np.resize(positives[:200], 450))):
            errors.append(calibration(1.2 * np.concatenate([texts, negatives]), labels))
    assert 0.025 < np.mean(once) < 0.035
    assert 1.2 < np.mean(repeated) / np.mean(once) < 1.4


# ---- people's preferences -----------------------------------------------------------------------

def test_agreement_with_people_and_its_interval():
    """Two of 5 pairs as people have them and a tie: 2.5 / 5, with Wilson's interval; that of 5 of 5
    ends at 1 and is not empty. A failure means an opinion of chance that is taken for people's."""
    pairs = [("a", "aa", "b"), ("a", "a", ""), ("a", "b", ""), ("a", "", "a"), ("a", "b", "a")]
    reward = reward_of(lambda x, y: y.count("a"))
    share, low, high = human_agreement(reward, world_of(human_pairs=pairs))
    half = 1.96 / 2 / math.sqrt(5 + 1.96 ** 2)      # Wilson's half-width at a share of a half
    assert (share, low, high) == (0.5, pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    share, low, high = human_agreement(reward, world_of(human_pairs=pairs[:1] * 5))
    assert (share, low, high) == (1, pytest.approx(5 / (5 + 1.96 ** 2)), pytest.approx(1))


@pytest.mark.parametrize("n", [1, 2, 14, 60, 460])
def test_wilson_s_interval_solves_its_equation(n):
    """Its ends are the p whose own standard error puts the share 1.96 away. It never leaves [0, 1],
    holds the share, and is another one's mirror image. A failure means that 14 of 14 pairs are
    reported with an interval that no share can be in."""
    for wins in (0, 0.5, 1, n / 2, n - 0.5, n):
        share = wins / n
        low, high = wilson_interval(share, n)
        assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1 and low < high
        for p in (low, high):
            assert (share - p) ** 2 == pytest.approx(1.96 ** 2 * p * (1 - p) / n, abs=1e-12)
        assert wilson_interval(1 - share, n) == pytest.approx((1 - high, 1 - low))


def test_wilson_s_interval_by_hand():
    """10 of 14, whose interval's middle is 0.668 and not 0.714; and 14 of 14. A failure means an
    interval around the raw share, which ended above 1 where all agree."""
    assert wilson_interval(10 / 14, 14) == pytest.approx((0.454, 0.883), abs=1e-3)
    assert wilson_interval(1.0, 14) == pytest.approx((14 / (14 + 1.96 ** 2), 1))


# ---- over seeds ---------------------------------------------------------------------------------

def rows_of_seeds(table, seeds=2):
    return [{"seed": seed, "name": name, "golden": values[seed], "golden_ci95": 0.5}
            for seed in range(seeds) for name, values in table.items()]


def test_the_summary_is_over_seeds():
    """A share is each seed's own, and their mean is over seeds."""
    rows = rows_of_seeds({"pi_SFT": (1, 2), "demonstrations": (3, 3),
                          "best of 4, init-sft": (2, 3.5), "best of 4, golden": (5, 6)})
    summary = summarise(rows, 4)
    assert summary["n"] == 4 and summary["seeds"] == [0, 1]
    method = summary["methods"]["best of 4, init-sft"]
    assert method["golden"] == (2.75, pytest.approx(12.7062 * 0.75))
    assert method["share_of_golden_gain"] == (
        pytest.approx((0.25 + 0.375) / 2), pytest.approx(12.7062 * 0.0625))
    assert summary["methods"]["pi_SFT"]["share_of_golden_gain"][0] == 0
    assert summary["methods"]["best of 4, golden"]["share_of_golden_gain"][0] == 1
    some = summarise(rows + [{"seed": 0, "name": "dpo", "golden": 1.0}], 4)
    assert "dpo" not in some["methods"]         # only one seed has it


def test_one_seed_has_its_own_interval_and_several_have_student_s():
    rows = rows_of_seeds({"spin": (1.0, 3.0)})
    assert over_seeds(rows, "golden") == (
        2.0, pytest.approx(2 - 12.7062), pytest.approx(2 + 12.7062))
    assert over_seeds(rows[:1], "golden") == (1.0, 0.5, 1.5)
    assert over_seeds([{"golden": None}], "golden") == (None, None, None)
    mean, *ends = over_seeds([{"golden": 1.0, "golden_ci95": None}], "golden")
    assert mean == 1 and all(map(math.isnan, ends))     # one prompt has no interval
    assert {name: len(mine) for name, mine in grouped(rows, "name").items()} == {"spin": 2}


def test_agreement_over_seeds_stays_a_share():
    """One seed has Wilson's interval, which is not around the mean; several have Student's t, cut
    where a share ends. A failure means that more than all pairs are agreed on."""
    records = [{"human_agreement": share, "human_low": 0.45, "human_high": 0.88}
               for share in (0.7, 0.9)]
    assert over_seeds(records[:1], "human_agreement") == (0.7, 0.45, 0.88)
    assert over_seeds(records, "human_agreement") == (pytest.approx(0.8), 0.0, 1.0)
    close = [{"human_agreement": share} for share in (0.5, 0.51, 0.52)]
    half = 4.3027 * 0.01 / math.sqrt(3)
    assert over_seeds(close, "human_agreement") == (
        pytest.approx(0.51), pytest.approx(0.51 - half), pytest.approx(0.51 + half))


def test_samples_side_by_side_are_those_of_each_writer(listed, monkeypatch):
    """The pick is the argmax of the first n; candidates and their scores are there to be read, for
    the first prompts only; a demonstration has its marks."""
    monkeypatch.setattr(evaluate, "BROWSED", 2)
    world = world_of(unmark=lambda y: y.replace("~", ""))
    evaluator = evaluator_of(world)
    world.test_demos = [["a~"] for _ in world.test_prompts]
    evaluator.add_policy("init", Policy(POLICY))
    init = evaluator.responses["pi_0"]
    scores = {"init-sft": np.tile(np.arange(16.0) % 7, (3, 1)), "random": np.ones((3, 16))}
    scores["random"][0, 0] = math.nan
    samples = pick_samples(evaluator, scores, 4)
    assert [sample["prompt"] for sample in samples] == world.test_prompts
    writers = samples[1]["writers"]
    assert list(writers) == ["pi_0", "pi_SFT", "best of 4, init-sft", "demonstration"]
    assert writers["best of 4, init-sft"] == {"text": evaluator.candidates.texts[1][3],
                                              "golden": evaluator.candidates.golden[1][3],
                                              "proxy": 3.0}
    assert writers["demonstration"]["text"] == "a~"
    assert ["candidates" in sample for sample in samples] == [True, True, False]
    assert samples[0]["candidates"]["text"] == evaluator.candidates.texts[0]
    assert samples[0]["candidates"]["scores"]["random"][:2] == [None, 1.0]
    assert writers["pi_0"] == {"text": init.texts[1][0], "golden": init.golden[1][0],
                               "proxy": None}
    evaluator.add_policy("po init-sft 0.3", Policy(POLICY | {"b": 2, "bb": 4}))
    evaluator.add_policy("po floored 0.3", Policy(POLICY))
    writers = pick_samples(evaluator, scores, 4)[0]["writers"]
    assert "policy optimisation, init-sft 0.3" in writers and len(writers) == 5
    json.dumps(samples, allow_nan=False)


# ---- statistics ---------------------------------------------------------------------------------

def student_t_by_integration(df):
    """With x = sqrt(df) tan(u) the density is proportional to cos(u)^(df-1): smooth and bounded."""
    nodes, weights = np.polynomial.legendre.leggauss(300)
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(math.pi) / 2

    def above_zero(t):
        end = math.atan(t / math.sqrt(df))
        u = end * (nodes + 1) / 2
        return end / 2 * (weights * np.exp(constant + (df - 1) * np.log(np.cos(u)))).sum()
    low, high = 1.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above_zero(middle) < 0.475 else (low, middle)
    return low


@pytest.mark.parametrize("df", [*range(1, 32), 45, 59, 61, 99, 199, 10 ** 4])
def test_student_t_is_the_integral_s_quantile(df):
    """A wrong entry of the table would widen or narrow every interval of the project."""
    assert student_t(df) == pytest.approx(student_t_by_integration(df), abs=3e-4)


def test_student_t_and_mean_ci():
    """df = 1 and 2 have closed forms: tan(0.475 pi) and 0.95 sqrt(2 / (1 - 0.95^2))."""
    assert student_t(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-5)
    assert student_t(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95 ** 2)), rel=1e-4)
    assert student_t(10 ** 6) == pytest.approx(1.95996, rel=1e-4)
    mean, half = mean_ci([1.0, 3.0])
    assert mean == 2 and half == pytest.approx(student_t(1))
    assert math.isnan(mean_ci([1.0])[1])


def test_win_rate_counts_ties_half_and_is_antisymmetric():
    a, b = np.array([[1.0, 2.0, 2.0]]), np.array([[0.0, 2.0]])
    np.testing.assert_allclose(win_rate(a, b), [[0.5, 0.75, 0.75]])
    assert win_rate(a, b).mean() + win_rate(b, a).mean() == pytest.approx(1)


def test_ranks_and_correlations():
    np.testing.assert_allclose(ranks([[3.0, 1.0, 3.0]]), [[1.5, 0.0, 1.5]])
    a = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    b = np.array([[1.0, 10.0, 100.0], [5.0, 4.0, 3.0]])
    assert rank_correlation(a[:1], b[:1]) == pytest.approx(1)
    assert rank_correlation(a[1:], b[1:]) == pytest.approx(-1)
    assert rank_correlation(a, b) == pytest.approx(0)
    b[1] = 5                            # where one side does not vary there is nothing to see
    assert rank_correlation(a, b) == pytest.approx(1)
    assert math.isnan(rank_correlation(a[1:], b[1:]))


def test_calibration():
    """A discriminator that says 0.8 and is right 80% of the time has no error; one at 0.99 has."""
    labels = np.r_[np.ones(80), np.zeros(20)]
    assert calibration(np.full(100, math.log(4)), labels) == pytest.approx(0, abs=1e-9)
    assert calibration(np.full(100, 5.0), labels) == pytest.approx(1 / (1 + math.exp(-5)) - 0.8)
