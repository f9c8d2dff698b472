"""--gold pairs: a model of people's pairs stands for golden, and every number says so.

Which pairs are the gold model's, and that no learner sees them, is tested in test_data.py.
"""

import json
import random
import re

import pytest
import torch

import afd
from divergences import bradley_terry_loss
from model import GPT, GPTConfig, generate
from reward import RewardModel, score
from train import TrainConfig, train_reward
from utils import data
from utils.checkpoints import Run
from utils.cli import InputError
from utils.data import file_world
from utils.evaluate import golden_from_model, wilson_interval
from utils.report import golden_note, write_report

TINY = ["--gold", "pairs", "--max-prompt", "24", "--max-response", "12", "--n-samples", "40",
        "--n-prompts", "5", "--n-candidates", "4", "--n-embd", "16", "--n-layer", "1",
        "--device", "cpu", "--methods", "po preference 0.3", "--policy-steps", "2"]
NOTE = r"reward model trained on ([\d,]+) pairs that no learner sees \(agreement with people on " \
       r"([\d,]+) held-out pairs: ([01]\.\d{3}), 95% interval ([01]\.\d{3}) to ([01]\.\d{3})\)"


@pytest.fixture(autouse=True, scope="module")
def small(one_thread):
    """A tiny model needs no more than a small vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "VOCAB_SIZE", 300)
        yield


def rows_of(n=260):
    """n prompts with a pair each: whoever prefers "yes" to "no" agrees with all of them."""
    return [{"prompt": f"ask {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(n)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def world_of(path, rows, seed=0):
    s = afd.Settings(demos=str(write(path, rows)), gold="pairs", max_prompt=24, max_response=12)
    return file_world(s, seed)


# ---- what it learns -----------------------------------------------------------------------------

def test_it_learns_an_obvious_preference_and_says_how_well(tmp_path):
    """It prefers what people chose, for answers of its own prompts and of those held out. The
    agreement in its note is that on the held-out pairs, of which 1 in 5 is labelled the other way.
    """
    world = world_of(tmp_path / "d.jsonl", rows_of(300))
    flipped = [(x, b, a) if i % 5 == 0 else (x, a, b)
               for i, (x, a, b) in enumerate(world.human_pairs)]
    world.human_pairs = flipped
    torch.manual_seed(0)
    init = GPT(GPTConfig(len(world.tokenizer), world.max_prompt + world.max_response, 16, 1, 2))
    items = [(world.pair(x, a), world.pair(x, b)) for x, a, b in world.gold_pairs]
    gold_model, _ = train_reward(RewardModel(init), items, [], bradley_terry_loss,
                                 TrainConfig(lr=1e-2, epochs=3), random.Random(0))
    golden, _, note = golden_from_model(gold_model, world)
    assert all(golden(x, a) > golden(x, b) for x, a, b in world.gold_pairs)
    right = [golden(x, a) > golden(x, b) for x, a, b in flipped]
    n, n_held_out, agreement, *ends = re.fullmatch(NOTE, note).groups()
    assert int(n) == len(world.gold_pairs) == 120 and int(n_held_out) == len(flipped) == 60
    assert float(agreement) == pytest.approx(sum(right) / len(right)) == 0.8
    assert [float(end) for end in ends] == pytest.approx(wilson_interval(0.8, 60), abs=1e-3)


# ---- a run with it ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("gold")
    path = write(out / "d.jsonl", rows_of())
    argv = ["--demos", str(path), *TINY, "--seeds", "2"]
    return argv, out / "a", afd.main([*argv, "--out", str(out / "a")])


def test_numbers_name_their_gold_model(run, tmp_path):
    """In results.json and in the report (below: in the table that is printed), each seed's own;
    else a trained model's opinion would pass for the truth."""
    _, out, results = run
    written = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert re.fullmatch(f"{NOTE}; {NOTE}", written["golden"])
    assert written["golden"].count("trained on 104 pairs") == 2
    assert "1 gold model" in written["seconds"]["0"]
    assert all(row["golden"] is not None for row in written["rows"])
    page = (out / "report.html").read_text()
    assert golden_note(written["golden"]) in page and "starts from pi_0" in page
    assert all((out / f"seed{k}" / "gold_model" / "metrics.jsonl").stat().st_size for k in (0, 1))
    samples = json.loads((out / "seed0" / "results.json").read_text())["samples"]
    world = world_of(out / "d.jsonl", rows_of())
    page = write_report(tmp_path, {**results, "golden": ""}, samples, world).read_text()
    assert "reward model trained on" not in page


def test_golden_is_the_score_of_the_saved_model(run):
    """Of every candidate, by the very ids that were sampled: else the checkpoint is of something
    else than the numbers are, or samples are read as other tokens than were written."""
    folder = run[1] / "seed1"
    gold_model = RewardModel.from_pretrained(folder / "gold_model")
    samples = json.loads((folder / "results.json").read_text())["samples"]
    world = world_of(run[1].parent / "d.jsonl", rows_of(), seed=1)
    stream = Run(run[1], 1, torch.device("cpu"), None).generator("candidates samples")
    ys = generate(GPT.from_pretrained(folder / "sft"), [
        world.tokenizer.encode(x) for x in world.test_prompts[:5]], 4, max_new_tokens=12,
        generator=stream)
    again = 0           # samples that the tokenizer would write with other tokens
    assert len(samples) == 5
    for sample, responses in zip(samples, ys):
        x, candidates = world.tokenizer.encode(sample["prompt"]), sample["candidates"]
        assert candidates["text"] == [world.text(y) for y in responses]
        scores = score(gold_model, [(x, y) for y in responses])
        assert candidates["scores"]["golden"] == pytest.approx(scores, abs=1e-5)
        again += sum(world.pair(sample["prompt"], world.text(y)) != (x, y) for y in responses)
    assert again > 0


@pytest.mark.parametrize("stop", ["sample_responses", "present"])
def test_stopped_after_the_gold_model_a_run_resumes_to_the_same_results(run, tmp_path, stop,
                                                                       capsys):
    """Also its note and the summary, where a finished seed is only read again."""
    class Stop(Exception):
        pass

    def fail(*_):
        raise Stop
    argv, _, results = run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(afd, stop, fail)
        with pytest.raises(Stop):
            afd.main([*argv, "--out", str(tmp_path / "b")])
    again = afd.main([*argv, "--out", str(tmp_path / "b"), "--resume"])
    for name in ("golden", "summary", "rows", "reward_models", "best_of_n"):
        assert repr(again[name]) == repr(results[name]), name       # repr: nan is not nan
    said = " ".join(capsys.readouterr().out.split())
    assert golden_note(again["golden"]) in said and "golden reward in log-odds" in said


# ---- what is refused ----------------------------------------------------------------------------

def test_too_few_pairs_are_refused_before_anything_is_written(tmp_path):
    argv = ["--demos", str(write(tmp_path / "d.jsonl", rows_of(248))), *TINY]
    with pytest.raises(InputError, match="leaves 99 pairs"):
        afd.main([*argv, "--out", str(tmp_path / "fresh")])
    with pytest.raises(InputError, match="go with --demos"):
        afd.main(["--gold", "pairs", "--out", str(tmp_path / "fresh")])
    assert not (tmp_path / "fresh").exists()


def test_a_run_is_not_resumed_on_other_pairs_of_the_gold_model(tmp_path):
    """Only answers of its half differ, which no learner sees: the numbers would be other ones."""
    world = world_of(tmp_path / "d.jsonl", rows_of())
    theirs = {x.strip() for x, _, _ in world.gold_pairs}
    rows = [{**row, "chosen": "zebra"} if row["prompt"] in theirs else row for row in rows_of()]
    argv = ["--demos", str(tmp_path / "d.jsonl"), *TINY, "--out", str(tmp_path / "o"), "--resume"]

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(afd, "run", stop)
        for _ in range(2):
            with pytest.raises(Stop):
                afd.main(argv)
        write(tmp_path / "d.jsonl", rows)
        with pytest.raises(InputError, match="another data"):
            afd.main(argv)
