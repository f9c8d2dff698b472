"""The whole line, small: what a run writes, that it repeats, which sources each stage is given, and
every bad input that it refuses."""

import copy
import inspect
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import afd
from divergences import DIVERGENCES, bradley_terry_loss, discriminator_loss
from model import GPT
from reward import HEADS, REWARD_MODELS, RewardModel, best_of_n_kl
from toy_envs.text_tasks import MARKS, TextTask, text_world
from utils.checkpoints import Run
from utils.cli import InputError
from utils.evaluate import METHODS, row_name
from utils.tokenizer import Tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:Mean of empty slice"),
              pytest.mark.usefixtures("one_thread")]
ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--n-corpus", "300", "--n-demos", "60", "--n-samples", "60", "--n-prompts", "6",
         "--n-candidates", "4", "--n-embd", "16", "--n-layer", "1", "--device", "cpu"]
TRAINED = [*(f"po {model} 1" for model in REWARD_MODELS), "po init-sft 0.3",
           *(f"{family} {name}" for family in ("adversarial", "adversarial-exact")
             for name in ("reverse_kl", "forward_kl", "jensen_shannon"))]
METHODS_RUN = [*TRAINED, *(f"closed-form {ratio} {beta}" for ratio in ("log-ratio", "floored")
                           for beta in ("1", "0.3")), "temperature 0.25", "spin", "irft",
               "dpo"]
EVERYTHING = ["--heterogeneity", "0.5", "--methods", ",".join(METHODS_RUN), "--policy-steps", "2"]
SELECTORS = [*REWARD_MODELS, "likelihood", "likelihood per token", "length", "random", "golden"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    return out, afd.main([*SMALL, *EVERYTHING, "--seeds", "2", "--out", str(out)])


def rows_of(results, seed):
    return {row["name"]: row for row in results["rows"] if row["seed"] == seed}


# ---- what a run writes --------------------------------------------------------------------------

def test_a_run_writes_what_it_promises(run):
    out, results = run
    written = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert written["rows"] == results["rows"] and list(written["rows"][0]) == [
        "seed", "name", "golden", "golden_ci95", "proxy", "win_vs_sft", "win_vs_demo", "kl",
        "reverse_kl", "forward_kl", "entropy", "length", "distinct"]
    assert written["settings"]["heterogeneity"] == 0.5 and "torch" in written["versions"]
    assert shlex.split(written["command"]) == ["python", "afd.py", *SMALL, *EVERYTHING, "--seeds",
                                               "2", "--out", str(out)]
    stages = {"1 pi_0", "2 pi_SFT", "3 samples", "4 rewards", "5 best-of-N"}
    assert stages | {f"6 {method}" for method in TRAINED} <= set(written["seconds"]["0"])
    points = [(p["seed"], p["reward_model"], p["n"]) for p in written["best_of_n"]]
    assert sorted(points) == sorted((seed, name, n) for seed in (0, 1) for name in SELECTORS
                                    for n in (1, 2, 4))
    learned = [(r["seed"], r["reward_model"]) for r in written["reward_models"]]
    assert learned == [(seed, name) for seed in (0, 1) for name in REWARD_MODELS]
    for name in ("best_of_n.png", "reward_models.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 2
    assert not list(out.rglob("*.part"))


def test_every_stage_leaves_a_checkpoint_and_its_history(run):
    """A failure means that a stage cannot be resumed, or that nobody can see how it was trained."""
    folder = run[0] / "seed1"
    policies = ["init", "sft", "self-play-0", "self-play-1", "self-play-2", "dpo",
                *(method.replace(" ", "-") for method in TRAINED)]
    rewards = ["init-sft", "init-demo", "sft-demo", "preference"]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*policies, *rewards}
    for name in policies:
        GPT.from_pretrained(folder / name)
    for name in rewards:
        assert RewardModel.from_pretrained(folder / name).head == "sum"
    for name in (*policies, *rewards):
        assert len(Tokenizer.from_pretrained(folder / name)) > 100
        history = [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
        assert [record["step"] for record in history] == list(range(len(history))) != []
        assert all(math.isfinite(record["loss"]) for record in history)


def test_saved_samples_are_those_of_the_table(run):
    """Or the report would show other picks than the ones that the table's numbers are of."""
    samples = json.loads((run[0] / "seed0" / "results.json").read_text())["samples"]
    task = TextTask("helpful")
    assert len(samples) == 6
    for sample in samples:
        candidates, writers = sample["candidates"], sample["writers"]
        assert set(candidates["scores"]) == {*SELECTORS}
        best = int(np.argmax(candidates["scores"]["init-sft"]))
        assert writers["best of 4, init-sft"]["text"] == candidates["text"][best]
        for text, golden in [*zip(candidates["text"], candidates["scores"]["golden"]),
                             *((w["text"], w["golden"]) for w in writers.values())]:
            assert task.golden(sample["prompt"], text) == golden
    picked = np.mean([max(s["candidates"]["scores"]["golden"]) for s in samples])
    assert rows_of(run[1], 0)["best of 4, golden"]["golden"] == pytest.approx(picked)
    marked = " ".join(sample["writers"]["demonstration"]["text"] for sample in samples)
    assert set(marked.split()) & set(MARKS)         # as written, not as the policy reads it


def test_rows_hold_together(run):
    """N = 1 is SFT itself whatever selects; the golden selector is best; its proxy is golden; the
    curve at N is the table's best of N, because all N candidates are one group."""
    for seed in (0, 1):
        rows = rows_of(run[1], seed)
        assert len(rows) == sum(row["seed"] == seed for row in run[1]["rows"])
        sft, best = rows["pi_SFT"], rows["best of 4, golden"]
        assert sft["win_vs_sft"] == pytest.approx(0.5, abs=0.15) and sft["kl"] == 0
        assert best["proxy"] == pytest.approx(best["golden"])
        points = {(p["reward_model"], p["n"]): p for p in run[1]["best_of_n"] if p["seed"] == seed}
        for name in SELECTORS:
            row = rows[f"best of 4, {name}"]
            assert best["golden"] >= row["golden"] - 1e-9
            assert points[name, 1]["golden"] == pytest.approx(sft["golden"])
            assert points[name, 1]["kl"] == 0
            # Of equally long responses the curve takes the last, the table the first.
            for column in ("proxy", "kl") if name == "length" else ("golden", "proxy", "kl"):
                assert points[name, 4][column] == pytest.approx(row[column])
            assert row["kl"] == (0 if name == "random" else best_of_n_kl(4))


def test_every_method_is_measured(run):
    """One row a method; a missing or infinite number means that a method died in silence. Here the
    demonstrations hold marks that no policy can write (log-probability -inf)."""
    for seed in (0, 1):
        rows = rows_of(run[1], seed)
        assert list(rows) == ["pi_0", "pi_SFT", "demonstrations",
                              *(f"best of 4, {name}" for name in SELECTORS),
                              *map(row_name, METHODS_RUN)]
        for method in METHODS_RUN:
            row, family = rows[row_name(method)], method.split()[0]
            known = {"golden", "golden_ci95", "kl", "reverse_kl", "forward_kl", "entropy",
                     "length", "distinct", "win_vs_sft", "win_vs_demo"}
            for column in known:
                assert math.isfinite(row[column]), (method, column)
            # An adversary's reward moves with the policy: rows would not be of one scale.
            if family in ("po", "closed-form"):
                assert math.isfinite(row["proxy"]), method
            else:
                assert row["proxy"] is None, method
            assert row["kl"] > -1 and 0 < row["distinct"] <= 1
    assert set(run[1]["curves"]["0"]) == {*TRAINED}
    for method in TRAINED:
        curve = run[1]["curves"]["0"][method]
        known = {"step", "proxy", "kl", "entropy", "length", "golden", "loss", "grad_norm"}
        assert len(curve) == 2 and all(known <= set(step) for step in curve)
        assert all(math.isfinite(value) for step in curve for value in step.values())
        assert abs(curve[0]["kl"]) < 1e-3       # the first samples are pi_SFT's own


def test_means_over_seeds_are_those_of_the_rows(run):
    summary, (a, b) = run[1]["summary"], (rows_of(run[1], seed) for seed in (0, 1))
    assert summary["n"] == 4 and summary["seeds"] == [0, 1] and set(summary["methods"]) == {*a}
    for name, method in summary["methods"].items():
        assert method["golden"][0] == pytest.approx((a[name]["golden"] + b[name]["golden"]) / 2)
    shares = {name: m["share_of_golden_gain"][0] for name, m in summary["methods"].items()}
    assert shares["best of 4, golden"] == pytest.approx(1) and shares["pi_SFT"] == 0


# ---- the same seed, the same numbers ------------------------------------------------------------

def test_the_same_seed_gives_the_same_results(run, tmp_path):
    """A difference here means an unseeded draw somewhere: no number could be reproduced."""
    again = afd.main([*SMALL, *EVERYTHING, "--seed", "1", "--out", str(tmp_path / "b")])
    for part in ("rows", "best_of_n", "reward_models"):
        assert again[part] == [r for r in run[1][part] if r["seed"] == 1], part
    assert again["curves"]["1"] == run[1]["curves"]["1"]


def test_a_stage_s_randomness_is_its_own(run, tmp_path):
    """--init with the checkpoint that the run itself wrote, and but three methods: the rows they
    share are the same, IRFT's with and without SPIN, whose round it goes on from. Else leaving a
    stage out would change all later ones, and no two runs compare."""
    argv = [*SMALL, "--heterogeneity", "0.5", "--seed", "1", "--policy-steps", "2",
            "--init", str(run[0] / "seed1" / "init"), "--methods", "irft, dpo, po init-sft 0.3"]
    again = afd.main([*argv, "--out", str(tmp_path / "b")])
    assert "1 pi_0" not in again["seconds"]["1"]
    left = [row_name(method) for method in METHODS_RUN
            if method not in ("irft", "dpo", "po init-sft 0.3")]
    rows = [row for name, row in rows_of(run[1], 1).items() if name not in left]
    assert sorted(again["rows"], key=json.dumps) == sorted(rows, key=json.dumps)
    for part in ("best_of_n", "reward_models"):
        assert again[part] == [r for r in run[1][part] if r["seed"] == 1], part


# ---- who is given what --------------------------------------------------------------------------

LOOPS = ("fine_tune", "train_reward", "optimise_policy", "fit_pairs")
# What `story` replaces, as it is: a second story must not wrap the wrappers of the first.
REAL = SimpleNamespace(**{name: getattr(afd.train, name) for name in LOOPS}, generate=afd.generate,
                       Evaluator=afd.Evaluator, sample_responses=afd.sample_responses)


def note_training(monkeypatch, seen):
    """seen.given: {label: what each call of a training loop is given, with its result}. The loops
    do not train, but change the weights, so that no two models are the same."""
    def noting(function):
        signature = inspect.signature(function)

        def loop(*args):
            bound = signature.bind(*args)
            bound.apply_defaults()
            given = SimpleNamespace(**bound.arguments, result=copy.deepcopy(args[0]))
            with torch.no_grad():
                for p in given.result.parameters():
                    p += 0.01
            seen.given.setdefault(given.label, []).append(given)
            return given.result, []
        return loop
    for name in LOOPS:
        monkeypatch.setattr(afd.train, name, noting(getattr(REAL, name)))


def note_sampling(monkeypatch, seen):
    """seen.writers: {label: [(policy, the pairs that it wrote)]}; seen.sampled: the policies that
    wrote to held-out prompts; seen.measured: {method: (policy, reward)}; seen.reference: of KLs."""
    def generate(policy, prompts, n=1, **how):
        responses = REAL.generate(policy, prompts, n, **how)
        pairs = [(x, y) for x, ys in zip(prompts, responses) for y in ys]
        seen.writers.setdefault(how["label"], []).append((policy, pairs))
        return responses

    def sample_responses(world, policy, *rest):
        seen.sampled.append(policy)
        return REAL.sample_responses(world, policy, *rest)

    class Evaluator(REAL.Evaluator):
        def __init__(self, world, sft, *rest):
            seen.reference = sft
            super().__init__(world, sft, *rest)

        def add_policy(self, method, policy, reward=None):
            seen.measured[method] = policy, reward
            return super().add_policy(method, policy, reward)
    for replacement in (generate, sample_responses, Evaluator):
        monkeypatch.setattr(afd, replacement.__name__, replacement)


@pytest.fixture
def story(monkeypatch, tmp_path_factory):
    """tell(flags): afd.run, noting who is given what. Nothing is trained."""
    def tell(*flags):
        seen = SimpleNamespace(given={}, writers={}, sampled=[], measured={})
        note_training(monkeypatch, seen)
        note_sampling(monkeypatch, seen)
        s = afd.parse_settings(afd.Settings, [*SMALL, *flags])
        afd.check(s)
        seen.world = text_world(s, s.seed)
        stages = Run(tmp_path_factory.mktemp("story"), s.seed, torch.device("cpu"),
                     seen.world.tokenizer)
        afd.run(s, seen.world, stages, afd.load_init(s.init, seen.world) if s.init else None)
        seen.demos = [seen.world.pair(x, y) for x, y in seen.world.demos]
        seen.sft = seen.given["sft"][0].result
        seen.init = seen.given["sft"][0].policy
        if "pretrain" in seen.given:
            assert seen.init is seen.given["pretrain"][0].result
        return seen
    return tell


def sources(given):
    """The two sides of a reward model's items, trained on and held out, as sorted lists of tuples:
    samples come as lists, because they were written to a JSON file and read."""
    return [sorted(map(tuple, side)) for side in zip(*given.items, *given.held_out)]


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_sources_cannot_be_swapped(story):
    """Each discriminator gets its own positives and negatives, each side written by whom it should.
    A failure means that a reward model is trained on other texts than its name says."""
    seen = story("--heterogeneity", "0.5", "--methods", "none")
    (writer_init, y_init), = seen.writers["y ~ pi_0"]
    (writer_sft, y_sft), = seen.writers["y ~ pi_SFT"]
    assert writer_init is seen.init and writer_sft is seen.sft
    assert not {*map(str, y_init)} & {*map(str, y_sft)}     # else a swap might be overlooked
    for name, loss in {"init-sft": discriminator_loss, "init-demo": discriminator_loss,
                       "sft-demo": discriminator_loss, "preference": bradley_terry_loss}.items():
        given, = seen.given[name]
        assert given.loss is loss and same_weights(given.reward.trunk, seen.init), name
    init_sft, = seen.given["init-sft"]
    assert sources(init_sft) == [sorted(y_sft), sorted(y_init)]
    assert all(better[0] == worse[0] for better, worse in init_sft.items)       # the same prompt
    for name, negatives in (("init-demo", y_init), ("sft-demo", y_sft)):
        better, worse = sources(seen.given[name][0])
        assert {*map(str, better)} == {*map(str, seen.demos)}, name
        assert {*map(str, worse)} == {*map(str, negatives)}, name
    (preference,), written = seen.given["preference"], {*map(str, y_sft)}
    for better, worse in preference.items + preference.held_out:
        assert better[0] == worse[0] and {*map(str, map(tuple, (better, worse)))} <= written
        golden = [seen.world.golden(*map(seen.world.text, pair)) for pair in (better, worse)]
        assert golden[0] > golden[1]


def test_pretraining_and_sft_are_given_their_texts(story):
    """pi_SFT starts at pi_0 and sees demonstrations alone; what is held out is not trained on."""
    seen = story("--methods", "none")
    pretrain, sft = seen.given["pretrain"][0], seen.given["sft"][0]
    assert len(pretrain.pairs) == 300 and not pretrain.held_out
    assert not any(prompt for prompt, _ in pretrain.pairs)
    assert sft.policy is pretrain.result
    assert sorted(sft.pairs + sft.held_out) == sorted(seen.demos) and len(sft.held_out) == 3
    # Candidates and what they are compared with are of pi_SFT; KLs are to pi_SFT.
    assert seen.reference is seen.sft and all(policy is seen.sft for policy in seen.sampled)
    assert len(seen.sampled) == 2 and seen.measured["init"][0] is seen.init


def test_policies_are_given_their_rewards_and_references(story):
    """A failure means that a row of the table is of another method than its name says."""
    seen = story("--methods", ",".join([*METHODS, "temperature 0.25"]))
    for name, floor in (("log-ratio", 0.0), ("floored", 0.1)):
        policy, reward = seen.measured[f"closed-form {name} 0.3"]
        for ratio in (policy, reward):
            assert (ratio.sft, ratio.init, ratio.floor) == (seen.sft, seen.init, floor)
        assert policy.kl_coef == 0.3
    for T in (0.25, 0.5):       # 1/T = 1 + 1/beta, with no pi_0
        policy, reward = seen.measured[f"temperature {T}"]
        assert policy.sft is seen.sft and policy.floor == 1 and reward is None
        assert 1 + 1 / policy.kl_coef == pytest.approx(1 / T)
    po, = seen.given["po init-sft 0.3"]
    assert po.sft is seen.sft and po.reward is seen.given["init-sft"][0].result
    assert po.kl_coef == 0.3 and po.config.steps == 100
    assert seen.measured["po init-sft 0.3"] == (po.result, po.reward)
    for divergence in ("reverse_kl", "forward_kl"):
        learned, = seen.given[f"adversarial {divergence}"]
        exact, = seen.given[f"adversarial-exact {divergence}"]
        for given in (learned, exact):
            assert given.sft is seen.sft and given.kl_coef == 0
            assert given.reward.divergence is DIVERGENCES[divergence]
        assert learned.reward.demos == seen.demos
        assert same_weights(learned.reward.discriminator.trunk, seen.init)
        assert exact.reward.demo_density == seen.world.demo_density
        for method, given in ((f"adversarial {divergence}", learned),
                              (f"adversarial-exact {divergence}", exact)):
            assert seen.measured[method] == (given.result, None)
    dpo, = seen.given["dpo"]
    assert dpo.reference is seen.sft and sorted(dpo.items) == sorted(
        seen.given["preference"][0].items + seen.given["preference"][0].held_out)


@pytest.mark.parametrize("method, rounds", [("spin", 1), ("irft", 3)])
def test_self_play_is_against_the_last_round(method, rounds, story):
    """Demonstrations against what the reference itself wrote to their prompts; IRFT's next round
    starts from what the one before it became."""
    seen = story("--heterogeneity", "1", "--methods", method)
    given, written, reference = seen.given[method], seen.writers[method], seen.sft
    assert len(given) == len(written) == rounds
    for one, (writer, own) in zip(given, written):
        assert one.reference is writer is reference
        assert [better for better, _ in one.items] == seen.demos
        assert [worse for _, worse in one.items] == own
        reference = one.result
    assert seen.measured[method] == (reference, None)


def test_spin_is_the_first_round_of_irft(story):
    """Asked for both, IRFT goes on from SPIN's round instead of training it again. A failure means
    that one of two equal stages has other samples or another order, or that time is lost."""
    seen = story("--methods", "spin, irft")
    assert (len(seen.given["spin"]), len(seen.given["irft"])) == (1, 2)
    first, (second, third) = seen.given["spin"][0], seen.given["irft"]
    assert same_weights(second.reference, first.result) and third.reference is second.result
    assert seen.measured["spin"][0] is first.result
    assert seen.measured["irft"][0] is third.result
    writers = [writer for writer, _ in seen.writers["irft"]]
    assert writers[0] is second.reference and writers[1] is third.reference


@pytest.mark.parametrize("width, share", [(16, 1), (64, 1), (128, 1 / 2)])
def test_a_wider_policy_learns_at_a_lower_rate(width, share, story, tmp_path):
    """Rates of width 64 would wreck GPT-2's weights at its 768. The width is the checkpoint's where
    pi_0 is one."""
    methods = ("--methods", "po floored 0.3, adversarial reverse_kl, adversarial-exact reverse_kl,"
                            "spin, dpo")
    rates = {"sft": 3e-3, "init-sft": 3e-3, "preference": 3e-3, "po floored 0.3": 3e-3,
             "adversarial reverse_kl": 3e-4, "adversarial-exact reverse_kl": 3e-3, "spin": 3e-4,
             "dpo": 3e-4}
    seen = story(*methods, "--n-embd", str(width))
    assert seen.given["pretrain"][0].config.lr == pytest.approx(1.2e-2 * share)
    seen.world.tokenizer.save_pretrained(tmp_path / "init")
    seen.init.save_pretrained(tmp_path / "init")
    for story_of in (seen, story(*methods, "--init", str(tmp_path / "init"))):
        for label, lr in rates.items():
            assert story_of.given[label][0].config.lr == pytest.approx(lr * share), label
        adversary = story_of.given["adversarial reverse_kl"][0].reward
        assert adversary.optimizer.param_groups[0]["lr"] == pytest.approx(3e-3 * share)


# ---- the flags' corners -------------------------------------------------------------------------

def test_labels_alone(run, tmp_path):
    """Half of the labels swapped: DPO and policy optimisation still run; what needs no labels does
    not change."""
    init = str(run[0] / "seed0" / "init")
    results = afd.main([*SMALL, "--heterogeneity", "0.5", "--init", init, "--policy-steps", "1",
                        "--methods", "dpo, po preference 1", "--label-noise", "0.5",
                        "--out", str(tmp_path / "b")])
    assert list(rows_of(results, 0))[-2:] == ["dpo", "policy optimisation, preference 1"]
    was, now = ({r["reward_model"]: r for r in part["reward_models"] if r["seed"] == 0}
                for part in (run[1], results))
    assert [name for name in REWARD_MODELS if was[name] != now[name]] == ["preference"]


@pytest.mark.parametrize("head", HEADS)
def test_the_head_is_the_one_that_was_asked_for(head, story):
    seen = story("--head", head, "--methods", "adversarial reverse_kl")
    adversary = seen.given["adversarial reverse_kl"][0].reward
    for reward in (seen.given["init-sft"][0].reward, adversary.discriminator):
        assert reward.head == head


def test_self_play_on_marked_demonstrations_has_finite_losses(run, tmp_path):
    """At heterogeneity 1 every demonstration holds <|unk|>, which no policy can write: a log-ratio
    of -inf - -inf there would make every weight nan."""
    init = str(run[0] / "seed0" / "init")
    results = afd.main([*SMALL, "--heterogeneity", "1", "--init", init, "--methods", "spin,dpo",
                        "--out", str(tmp_path / "b")])
    history = [json.loads(line) for line in (tmp_path / "b/seed0/self-play-0/metrics.jsonl").open()]
    losses = [r[key] for r in history for key in ("loss", "held_out") if key in r]
    assert len(losses) > 4 and all(math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)      # it starts at its reference
    spin = rows_of(results, 0)["spin"]
    assert math.isfinite(spin["kl"]) and math.isfinite(spin["reverse_kl"])


@pytest.mark.parametrize("flags", ["--n-candidates 1", "--n-prompts 1", "--n-demos 1",
                                   "--n-candidates 1 --n-prompts 1 --n-demos 1 --n-samples 1 "
                                   "--n-corpus 1"])
def test_one_of_a_kind(flags, tmp_path):
    """One candidate, one prompt, one demonstration, one of everything: a run has all its rows, each
    number finite or, where it does not exist, empty; with one candidate no selector selects."""
    results = afd.main([
        *SMALL, "--policy-steps", "1", *flags.split(), "--out", str(tmp_path / "a"),
        "--methods", "po init-sft 0.3, adversarial reverse_kl, irft"])
    json.loads((tmp_path / "a" / "results.json").read_text(), parse_constant=pytest.fail)
    rows = rows_of(results, 0)
    n = 1 if "candidates" in flags else 4
    assert {"pi_0", "pi_SFT", "demonstrations", f"best of {n}, init-sft", "irft",
            "policy optimisation, init-sft 0.3", "adversarial, reverse_kl"} <= set(rows)
    for row in rows.values():
        assert all(math.isfinite(row[k]) for k in ("golden", "win_vs_sft", "length"))
    if n == 1:
        picked = {(row["golden"], row["kl"]) for name, row in rows.items() if "best of" in name}
        assert picked == {(rows["pi_SFT"]["golden"], 0.0)}


def test_one_s_own_data(tmp_path, capsys, monkeypatch):
    """Dialogues in, agreement with the human choice out; golden empty where nobody knows it."""
    monkeypatch.setattr("utils.data.VOCAB_SIZE", 300)
    rows = [{"chosen": f"\n\nHuman: ask {i}\n\nAssistant: yes {i}",
             "rejected": f"\n\nHuman: ask {i}\n\nAssistant: no"} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "p.txt").write_text("more?\n" + "long " * 300)
    argv = [*SMALL, "--demos", str(tmp_path / "d.jsonl"), "--prompts", str(tmp_path / "p.txt"),
            "--max-prompt", "40", "--max-response", "8", "--policy-steps", "2", "--methods", "all"]
    results = afd.main([*argv, "--out", str(tmp_path / "o")])
    shown = capsys.readouterr().out
    assert "1 prompt longer than 40 tokens cut to the end" in shown
    assert shown.count("left out: these data have no labels or no density") == 2
    names = [row["name"] for row in results["rows"]]
    # Nobody knows the demonstrator's density, so that there is no perfect discriminator.
    assert names[-len(METHODS) + 2:] == [row_name(m) for m in METHODS if "exact" not in m]
    assert all(r["golden"] is r["reverse_kl"] is r["forward_kl"] is None for r in results["rows"])
    assert "best of 4, golden" not in names and results["summary"]["methods"] == {}
    for record in results["reward_models"]:
        low, share, high = (record[f"human_{key}"] for key in ("low", "agreement", "high"))
        assert 0 <= low <= share <= high <= 1 and low < high and record["human_pairs"] == 12
    json.loads((tmp_path / "o" / "results.json").read_text(), parse_constant=pytest.fail)
    (tmp_path / "g.py").write_text("def g(x, y):\n    return len(y)\n")
    results = afd.main([*argv, "--gold", f"{tmp_path}/g.py:g", "--out", str(tmp_path / "o2")])
    assert all(r["golden"] is not None for r in results["rows"])


# ---- what is refused ----------------------------------------------------------------------------

BAD = [["--heterogeneity", "1.5"], ["--heterogeneity", "nan"], ["--task", "useless"], ["--nope"],
       ["--seeds", "0"], ["--n-candidates", "3"], ["--n-embd", "18"], ["--n-embd", "322"],
       ["--base", "busy"], ["--methods", "temperature 1"],
       ["--sft-epochs", "nan"], ["--device", "cpu:x"], ["--gold", "x.py:f"], ["--dry-run"],
       ["--demos", "gone.jsonl"], ["--device", "tpu"],
       ["--demos", "one.jsonl"], ["--demos", "long.jsonl", "--max-prompt", "1"],
       ["--demos", "ok.jsonl", "--gold", "gone.py:f"],
       ["--demos", "ok.jsonl", "--gold", "bad.py:f"],
       ["--demos", "ok.jsonl", "--corpus", "gone.txt"],
       ["--methods", "nope"], ["--methods", "po,nope"], ["--methods", "po golden 1"],
       ["--methods", "closed-form init-sft 1"], ["--methods", "adversarial nope"],
       ["--methods", "po init-sft 0"], ["--methods", "po init-sft x"],
       ["--methods", "po init-sft"], ["--methods", "po init-sft -1"],
       ["--methods", "po init-sft nan"], ["--label-noise", "2"], ["--label-noise", "nan"],
       ["--policy-steps", "0"], ["--head", "nope"], ["--init", "gone"]]
if not torch.cuda.is_available():
    BAD += [["--device", "cuda"], ["--fast"]]


@pytest.mark.parametrize("argv", BAD, ids=lambda argv: " ".join(argv))
def test_bad_input_is_refused_before_anything_is_written(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"a fairly long prompt, the {i}th", "response": "y"}) + "\n"
            for i in range(20)]
    for name, count in (("one", 1), ("long", 20), ("ok", 20)):
        (tmp_path / f"{name}.jsonl").write_text("".join(rows[:count]))
    (tmp_path / "bad.py").write_text("def f(x, y):\n    return None\n")
    with pytest.raises(InputError) as error:
        afd.main([*argv, "--out", "fresh"])
    assert "\n" not in str(error.value) and not (tmp_path / "fresh").exists()


def test_a_folder_with_another_run_is_refused(run):
    with pytest.raises(InputError, match="another run"):
        afd.main([*SMALL, "--out", str(run[0])])
    assert (run[0] / "results.json").exists()


def test_from_the_shell_bad_input_is_one_line_and_status_2(tmp_path):
    got = subprocess.run([sys.executable, str(ROOT / "afd.py"), "--task", "useless"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert got.returncode == 2 and got.stdout == ""
    assert got.stderr.startswith("error: ") and got.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_pi_0_does_not_read_what_pi_sft_holds_out(tmp_path, monkeypatch):
    """Without --corpus pi_0 reads the demonstrations. If it read the held-out ones too, the loss on
    them would rise with the first step of SFT, and early stopping would keep pi_SFT at pi_0."""
    demos, read = tmp_path / "demos.jsonl", {}
    demos.write_text("".join(json.dumps({"prompt": f"ask {i}", "response": f"say {i} {i}"}) + "\n"
                             for i in range(60)))

    original = afd.train.fine_tune

    def record(policy, pairs, held_out, config, rng, label="sft"):
        read[label] = [[*x, *y] for x, y in pairs], [[*x, *y] for x, y in held_out]
        return original(policy, pairs, held_out, config, rng, label)
    monkeypatch.setattr(afd.train, "fine_tune", record)
    afd.main(["--demos", str(demos), "--n-samples", "4", "--n-candidates", "1", "--methods", "none",
              "--out", str(tmp_path / "out")])
    texts, (learned, held_out) = read["pretrain"][0], read["sft"]
    assert held_out and sorted(texts) == sorted(learned)
    assert not any(text in texts for text in held_out)
