"""--gold pairs: a judge of people's pairs stands for golden, and no learner sees its half."""

import dataclasses
import json
import re

import pytest
import torch

import afd
from model import GPT, GPTConfig, InputError, encode_pair
from reward import score
from utils.checkpoints import load_reward
from utils.report import write_report
from utils.cli import Run
from utils.evaluate import judge_note, train_judge
from utils.worlds import file_world
from train import Schedule

TINY = ["--gold", "pairs", "--vocab-size", "300", "--max-prompt", "24", "--max-response", "12",
        "--n-samples", "40", "--n-prompts", "5", "--n-candidates", "4", "--n-embd", "16",
        "--n-layer", "1", "--n-head", "2", "--device", "cpu", "--methods", "po", "--rewards",
        "preference", "--policy-steps", "2", "--pretrain-epochs", "1"]
NAME = r"judge trained on a disjoint half of the pairs \(([\d,]+) pairs, held-out agreement " \
       r"([01]\.\d{3}) \+- (\d\.\d{3})\)"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors are slow on several threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(n=260, each=1):
    """n prompts with `each` pairs: whoever prefers "yes" to "no" agrees with all of them."""
    return [{"prompt": f"ask {i}", "chosen": f"yes {i} {j}", "rejected": f"no {i} {j}"}
            for i in range(n) for j in range(each)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def world_of(path, rows, seed=0, **more):
    return file_world(afd.Settings(**{"demos": str(write(path, rows)), "gold": "pairs",
                                      "vocab_size": 300, **more}), seed)


# ---- whose half it is ---------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_no_learner_has_a_prompt_or_a_text_of_the_judge(tmp_path, seed):
    """Else the rewards are judged by what they were trained on. Of 200 prompts, 150 have pairs, two
    each, and 40 are held out; the judge has half of the other prompts with pairs, all of each."""
    rows = rows_of(150, 2) + [{"prompt": f"ask {i}", "response": f"so {i} {j}"}
                              for i in range(140, 200) for j in range(2)]
    write(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in rows])
    world, plain = (world_of(tmp_path / "d.jsonl", rows, seed, gold=gold,
                             prompts=str(tmp_path / "p.jsonl")) for gold in ("pairs", None))
    judged = {x for x, _, _ in world.judge_pairs}
    paired = {x for x, _, _ in plain.preferences}
    assert len(judged) == len(paired) // 2 and judged < paired
    assert len(world.judge_pairs) == 2 * len(judged)        # with all their pairs
    learner = [*world.demos, *world.preferences, *world.human_pairs]
    assert not judged & {*world.train_prompts, *world.test_prompts, *(row[0] for row in learner)}
    answers = {y for _, *pair in world.judge_pairs for y in pair}
    said = {y for _, *ys in learner for y in ys} | {y for ys in world.test_demos for y in ys}
    assert not answers & said
    assert not any(x in text or y in text for text in world.corpus
                   for x, *pair in world.judge_pairs for y in pair)
    assert judged | {x for x, _, _ in world.preferences} == paired      # and nothing else is gone
    assert (world.test_prompts, world.human_pairs) == (plain.test_prompts, plain.human_pairs)
    assert not plain.judge_pairs and len(judged) > 50
    note = f"{len(judged)} prompts with {len(world.judge_pairs)} pairs are the judge's"
    assert any(note in said for said in world.notes)


def test_what_the_judge_reads_moves_nothing_else(tmp_path):
    """The answers of its half are other ones: everything that a learner gets, the tokenizer too, is
    the same, and yet a run on the one file is not resumed on the other."""
    world = world_of(tmp_path / "d.jsonl", rows_of())
    judged = {x.strip() for x, _, _ in world.judge_pairs}
    rows = [{**row, "chosen": "zebra", "rejected": "quartz"} if row["prompt"] in judged else row
            for row in rows_of()]
    other = world_of(tmp_path / "e.jsonl", rows)
    assert {pair[1:] for pair in other.judge_pairs} == {("zebra", "quartz")}
    for field in dataclasses.fields(world):
        if field.name not in ("judge_pairs", "tokenizer"):
            assert getattr(world, field.name) == getattr(other, field.name), field.name
    assert world.tokenizer.backend.to_str() == other.tokenizer.backend.to_str()
    argv = ["--demos", str(tmp_path / "d.jsonl"), *TINY, "--out", str(tmp_path / "o"), "--resume"]
    (tmp_path / "o").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(afd, "run_seeds", lambda *_: None)
        afd.main(argv)
        afd.main(argv)
        write(tmp_path / "d.jsonl", rows)
        with pytest.raises(InputError, match="another data"):
            afd.main(argv)


def test_prompts_that_are_the_same_once_cut_are_one_side_s(tmp_path):
    """Prompts that differ only in what is cut off: the held-out side has them, then the judge."""
    rows = [{**row, "prompt": f"{i // 200} " + "long " * 20 + f"is number {i % 200}"}
            for i, row in enumerate(rows_of(600))]
    world = world_of(tmp_path / "d.jsonl", rows, max_prompt=8)
    judged = {x for x, _, _ in world.judge_pairs}
    held = {*world.test_prompts, *(pair[0] for pair in world.human_pairs)}
    learned = {*world.train_prompts, *(row[0] for row in [*world.demos, *world.preferences])}
    assert all(len(world.tokenizer.encode(x)) <= 8 for x in judged)
    assert held and judged and learned
    assert not held & judged and not judged & learned and not held & learned


# ---- what is refused ----------------------------------------------------------------------------

def test_too_few_pairs_are_refused_before_anything_is_written(tmp_path):
    """Demonstrations without pairs, 99 pairs for the judge, none to measure it by; and 100 will do.
    With one pair a prompt, a fifth held out and half of the rest, 248 prompts leave 99."""
    def refused(rows):
        path = write(tmp_path / "d.jsonl", rows)
        with pytest.raises(InputError) as error:
            afd.main(["--demos", str(path), *TINY, "--out", str(tmp_path / "fresh")])
        assert "\n" not in str(error.value) and not (tmp_path / "fresh").exists()
        return str(error.value)
    plain = [{"prompt": f"{i}?", "response": "so"} for i in range(300)]
    assert re.search(r"--gold pairs: \S+ leaves 0 pairs .* it takes 100", refused(plain))
    assert "leaves 99 pairs" in refused(rows_of(248))
    assert len(world_of(tmp_path / "d.jsonl", rows_of(250)).judge_pairs) == 100
    two = [{**row, "prompt": f"ask {i % 2}"} for i, row in enumerate(rows_of(200))]
    assert "no held-out prompt" in refused(next(        # both prompts with pairs are to train on
        rows for rows in (plain[:k] + two + plain[k:40] for k in range(40))
        if not world_of(tmp_path / "e.jsonl", rows, gold=None).human_pairs))
    with pytest.raises(InputError, match="go with --demos"):
        afd.main(["--gold", "pairs", "--out", str(tmp_path / "fresh")])


# ---- what it learns, and what it is called ------------------------------------------------------

def test_it_learns_an_obvious_preference_and_says_how_well(tmp_path):
    """It prefers what people chose, for answers of its own prompts and of those held out; the
    agreement in its name is that on the held-out pairs, of which 1 in 5 is labelled the other way.
    """
    world = world_of(tmp_path / "d.jsonl", rows_of(300))
    flipped = [(x, b, a) if i % 5 == 0 else (x, a, b)
               for i, (x, a, b) in enumerate(world.human_pairs)]
    world.human_pairs = flipped
    torch.manual_seed(0)
    init = GPT(GPTConfig(len(world.tokenizer), world.max_prompt + world.max_response, 16, 1, 2))
    run = Run(tmp_path, 0, torch.device("cpu"))
    train_judge(world, run, init, Schedule(1e-2, epochs=3))
    assert all(world.golden(x, a) > world.golden(x, b) for x, a, b in world.judge_pairs)
    right = [world.golden(x, a) > world.golden(x, b) for x, a, b in flipped]
    n, agreement, half = re.fullmatch(NAME, world.gold).groups()
    assert int(n) == len(world.judge_pairs) == 120
    assert float(agreement) == pytest.approx(sum(right) / len(right)) == 0.8
    share = (48 + 2) / (60 + 4)     # two successes, two failures more
    assert float(half) == pytest.approx(1.96 * (share * (1 - share) / 64) ** 0.5, abs=1e-3)
    assert {json.loads(line)["stage"] for line in (tmp_path / "metrics.jsonl").open()} == {"judge"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("judge")
    path = write(out / "d.jsonl", rows_of())
    argv = ["--demos", str(path), *TINY, "--seeds", "2"]
    return argv, out / "a", afd.main([*argv, "--out", str(out / "a")])


def test_numbers_name_their_judge(run):
    """In results.json and in the report (below: in the table that is printed), each seed's own;
    else a trained judge's opinion would pass for the truth."""
    _, out, results = run
    written = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert re.fullmatch(f"{NAME}; {NAME}", written["gold"])
    assert written["gold"].count("(104 pairs") == 2
    assert "judge" in written["seconds"]["0"] and "preference" in written["summary"]["methods"]
    assert all(r["gold_mean"] is not None for r in written["rows"])
    page = (out / "report.html").read_text()
    assert judge_note(written["gold"]) in page and "starts from pi_0" in page
    samples = json.loads((out / "seed0" / "samples.json").read_text())
    write_report(out, {**results, "gold": ""}, samples, world_of(out / "d.jsonl", rows_of()))
    assert "judge trained" not in (out / "report.html").read_text()


def test_golden_is_the_score_of_the_kept_judge(run):
    """Of every candidate: else the checkpoint is of something else than the numbers are."""
    judge, tokenizer = load_reward(run[1] / "seed1" / "judge")
    samples = json.loads((run[1] / "seed1" / "samples.json").read_text())
    assert len(samples) == 5
    for sample in samples:
        candidates = sample["candidates"]
        pairs = [encode_pair(tokenizer, sample["prompt"], y, 24, 12) for y in candidates["text"]]
        assert candidates["scores"]["golden"] == pytest.approx(score(judge, pairs), abs=1e-5)


@pytest.mark.parametrize("stop", ["fine_tune", "write_report"])
def test_stopped_after_the_judge_a_run_resumes_to_the_same_results(run, tmp_path, stop, capsys):
    """Also its name and the summary, where a finished seed is only read again."""
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

    def untimed(rows):
        return [{**row, "seconds": None} for row in rows]
    assert again["gold"] == results["gold"] and again["summary"] == results["summary"]
    assert untimed(again["rows"]) == untimed(results["rows"])
    assert repr(again["reward_models"]) == repr(results["reward_models"])       # with a nan
    said = " ".join(capsys.readouterr().out.split())
    assert judge_note(again["gold"]) in said and "golden reward in log-odds" in said
