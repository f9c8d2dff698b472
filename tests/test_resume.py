"""A run may stop at any moment: what it resumes to is what it would have become, bit for bit."""

import dataclasses
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import afd
import train
from divergences import get_divergence
from model import GPT, GPTConfig, InputError, bpe_tokenizer, sample_responses, write_json
from reward import Adversary, RewardModel
from utils import cli as runs
from utils.checkpoints import save_pretrained
from utils.cli import claimed, keep, kept, provenance, run_script
from train import Schedule, fit, nll_loss

pytestmark = pytest.mark.filterwarnings("ignore:Mean of empty slice")
ROOT = Path(__file__).resolve().parent.parent
TINY = ["--n-corpus", "120", "--n-demos", "30", "--n-samples", "24", "--n-prompts", "3",
        "--n-candidates", "2", "--n-embd", "16", "--n-layer", "1", "--n-head", "2", "--device",
        "cpu", "--methods", "po,adversarial,adversarial-exact,irft,dpo", "--policy-steps", "2",
        "--divergences", "reverse_kl", "--rounds", "2", "--n-preferences", "10", "--seeds", "2"]
# a snapshot after every step, so that what is stopped is stopped within a training loop too
EVERY_STEP = ("import sys, afd; from utils import cli as runs; runs.SNAPSHOT_SECONDS = -1; "
              "runs.run_script(lambda: afd.main(sys.argv[1:]))")


def untimed(results):
    """results.json without what is the machine's or the command line's."""
    if isinstance(results, dict):
        return {key: untimed(value) for key, value in results.items()
                if key not in ("seconds", "command", "out", "resume", "overwrite")}
    return [untimed(item) for item in results] if isinstance(results, list) else results


def assert_same_run(a, b):
    """The results, every weight, every sample and every line of the metrics."""
    for name in ("results.json", "config.json"):
        assert untimed(json.loads((a / name).read_text())) == untimed(
            json.loads((b / name).read_text()))
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    for path in [*a.rglob("*.bin"), *a.rglob("reward_head.pt"), *a.rglob("samples.json")]:
        other = b / path.relative_to(a)
        if path.suffix == ".json":
            assert path.read_text() == other.read_text()
        else:
            assert_same_state(torch.load(path), torch.load(other))


def assert_same_state(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Here and in child processes: tiny tensors are slow on several threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and how long its work took."""
    out = tmp_path_factory.mktemp("whole") / "a"
    start = time.monotonic()
    afd.main([*TINY, "--out", str(out)])
    return out, time.monotonic() - start


# ---- stopped and resumed ------------------------------------------------------------------------

def test_killed_at_random_moments_a_run_resumes_to_the_same_results(whole, tmp_path):
    """kill -9, spread over the run's time. A difference means that some state was not kept: an
    optimiser's, the order of the data, a random generator's, the weights that were best so far."""
    reference, seconds = whole
    rng, out, kills = random.Random(0), tmp_path / "b", 0
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EVERY_STEP, *TINY, "--out", str(out), "--resume"]
    for _ in range(3):
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
        child.stdout.readline()             # "seed 0": what is imported and read is not the run
        time.sleep(rng.uniform(0.05, 0.5) * seconds)
        child.kill()
        child.communicate()
        kills += child.returncode == -9
    assert kills >= 2       # else the machine was too fast for this test, which then shows nothing
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert_same_run(reference, out)
    assert {p.name for p in out.rglob("stages/*")} == {"seed.pt"} and not list(out.rglob("*.part"))


def test_stopped_at_any_write_a_run_resumes_to_the_same_results(whole, tmp_path, monkeypatch):
    """Stopped again and again, each time some writes further on: just before one, or just after."""
    class Stop(BaseException):
        pass

    rng, stops, out, left = random.Random(1), 0, tmp_path / "b", [0]

    def stopping(path, value, of):
        left[0] -= 1
        if left[0] == 0 and rng.random() < 0.5:
            raise Stop
        keep(path, value, of)
        if left[0] <= 0:
            raise Stop
    monkeypatch.setattr(runs, "keep", stopping)
    monkeypatch.setattr(runs, "SNAPSHOT_SECONDS", -1)
    while True:
        left[0] = rng.randint(1, 8)
        try:
            afd.main([*TINY, "--out", str(out), "--resume"])
            break
        except Stop:
            stops += 1
    assert stops > 10
    assert_same_run(whole[0], out)


def test_a_stage_of_train_resumes(tmp_path, monkeypatch):
    """train.py on its own: stopped in the loop and before its checkpoint is written, --resume ends
    with the weights of an uninterrupted run, and once finished it does nothing."""
    class Stop(BaseException):
        pass

    (tmp_path / "c.txt").write_text("\n\n".join(f"the cat number {i} sat" for i in range(40)))
    argv = ["pretrain", "--corpus", str(tmp_path / "c.txt"), "--n-embd", "16", "--n-layer", "1",
            "--vocab-size", "300", "--device", "cpu", "--batch-size", "4", "--out"]
    train.main([*argv, str(tmp_path / "a")])
    monkeypatch.setattr(runs, "SNAPSHOT_SECONDS", -1)
    kept_before = []

    def stopping(path, value, of):
        keep(path, value, of)
        kept_before.append(path)
        if len(kept_before) in (2, 5):
            raise Stop

    def full(*_):
        raise InputError("the disk is full")
    monkeypatch.setattr(runs, "keep", stopping)
    for _ in range(2):
        with pytest.raises(Stop):
            train.main([*argv, str(tmp_path / "b"), "--resume"])
    save = train.save_pretrained
    monkeypatch.setattr(train, "save_pretrained", full)
    with pytest.raises(InputError, match="full"):
        train.main([*argv, str(tmp_path / "b"), "--resume"])
    monkeypatch.setattr(train, "save_pretrained", save)
    steps = len(kept_before)
    train.main([*argv, str(tmp_path / "b"), "--resume"])
    assert steps == 10 == len(kept_before)      # ten steps in all, none of them done twice
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert_same_state(a, b)
    histories = [json.loads((tmp_path / k / "train.json").read_text())["history"] for k in "ab"]
    assert histories[0] == histories[1] and not (tmp_path / "b" / "stages").exists()
    monkeypatch.setattr(train, "fine_tune", None)
    train.main([*argv, str(tmp_path / "b"), "--resume"])
    with pytest.raises(InputError, match="another lr"):
        train.main([*argv, str(tmp_path / "b"), "--resume", "--lr", "1"])
    (tmp_path / "c.txt").write_text("another text")
    with pytest.raises(InputError, match="another data"):
        train.main([*argv, str(tmp_path / "b"), "--resume"])


def test_a_finished_run_is_not_done_again(whole, monkeypatch):
    before = (whole[0] / "results.json").read_text()
    monkeypatch.setattr(afd, "run_seed", None)
    afd.main([*TINY, "--out", str(whole[0]), "--resume"])
    assert (whole[0] / "results.json").read_text() == before


def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig(8, n_positions=12, n_embd=16, n_layer=1, n_head=2))


ITEMS = [(([2], [3 + i % 5] * (1 + i % 7)),) for i in range(40)]
PLAN = Schedule(lr=1e-2, epochs=2.5, batch_size=8)


def resumed(run, folder, stops):
    """(stop, what run(snapshot) returns when run(snapshot, stop) was interrupted) of each stop."""
    for stop_at in stops:
        snapshot = folder / str(stop_at)
        with pytest.raises(KeyboardInterrupt):
            run(snapshot, stop_at)
        yield stop_at, run(snapshot)


def test_fit_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """At every step of two and a half epochs: weights, history and the generator are the same."""
    monkeypatch.setattr(runs, "SNAPSHOT_SECONDS", -1)

    def run(snapshot, stop_at=math.inf):
        model, rng, calls = tiny(), random.Random(3), []

        def loss_fn(model, items):
            calls.append(len(items))
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return nll_loss(model, items)
        history = fit(model, ITEMS[8:], loss_fn, PLAN, rng, "t", ITEMS[:8], snapshot)
        return model.state_dict(), history, rng.random(), len(calls)
    state, history, draw, calls = run(None)
    assert calls > len(history) == 10
    for _, again in resumed(run, tmp_path, range(2, calls + 1)):
        assert_same_state(again[0], state)
        assert again[1:3] == (history, draw) and again[3] < calls


def test_policy_optimisation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Before and after each of its draws, with a judge that learns along: the policy, the history,
    the judge, what it remembers of old policies, and what both generators would draw next."""
    monkeypatch.setattr(runs, "SNAPSHOT_SECONDS", -1)
    sft, plan = tiny(), Schedule(lr=1e-2)

    def run(snapshot, stop_at=math.inf):
        rng, generator, calls = random.Random(3), torch.Generator().manual_seed(4), []
        judge = Adversary(RewardModel(sft), [([2], [3, 4, 1]), ([3], [5, 1])],
                          get_divergence("reverse_kl"), random.Random(5), smoothing=0.1)

        def tick():
            calls.append(1)
            if len(calls) == stop_at:
                raise KeyboardInterrupt

        def draw(policy):
            tick()
            prompts = [[rng.randint(2, 7)] for _ in range(3)]
            written = sample_responses(policy, prompts, 2, 5, 1, generator)
            return [(x, y) for x, ys in zip(prompts, written) for y in ys]

        def watch(policy, pairs):
            tick()
            return {"length": sum(len(y) for _, y in pairs)}
        policy, history = train.optimise_policy(
            sft, judge, draw, 4, plan, 0.1, 2, 0.2, False, "t", watch, snapshot,
            {"rng": rng, "generator": generator})
        drawn = rng.random(), torch.rand(1, generator=generator).item()
        return {"policy": policy.state_dict(), "judge": judge.judge.state_dict()}, (
            history, drawn, judge.old, judge.rng.random()), len(calls)
    state, rest, calls = run(None)
    assert calls == 8 and len(rest[2]) == 24
    for stop_at, again in resumed(run, tmp_path, range(3, calls + 1)):
        assert_same_state(again[0], state)
        assert again[1] == rest and again[2] == calls - 2 * ((stop_at - 1) // 2)


def test_a_torn_or_foreign_file_is_named_and_the_one_before_it_used(tmp_path, capsys):
    """Cut short anywhere, with one bit turned, empty, of something else, or no such file at all."""
    path = tmp_path / "state"
    keep(path, {"step": 1}, "mine")
    keep(path, {"step": 2, "w": torch.zeros(1000)}, "mine")
    good = path.read_bytes()
    assert kept(path, "mine")["step"] == 2 and capsys.readouterr().err == ""
    turned = bytearray(good)
    turned[good.index(bytes(1000)) + 500] ^= 4
    for bad in (b"", b"PK", good[:100], good[:len(good) // 2], good[:-1], bytes(turned), b"x" * 99):
        path.write_bytes(bad)
        assert kept(path, "mine") == {"step": 1}
        assert capsys.readouterr().err == f"{path}: torn or of another run, not used\n"
    keep(path, 3, "theirs")         # what was torn is now the previous one
    assert kept(path, "mine") is None
    assert capsys.readouterr().err.count("not used") == 2
    assert kept(tmp_path / "none", "mine") is None


def test_other_data_or_another_plan_do_not_go_on_with_a_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SNAPSHOT_SECONDS", -1)
    path = tmp_path / "s"
    fit(tiny(), ITEMS, nll_loss, PLAN, random.Random(0), snapshot=path)
    for items, plan, seed in ((ITEMS[::-1], PLAN, 0), (ITEMS, PLAN, 1),
                              (ITEMS, dataclasses.replace(PLAN, lr=1e-3), 0)):
        expected, model = tiny(), tiny()
        fit(expected, items, nll_loss, plan, random.Random(seed))
        fit(model, items, nll_loss, plan, random.Random(seed), snapshot=path)
        assert_same_state(model.state_dict(), expected.state_dict())


# ---- the smallest runs, and the worst -----------------------------------------------------------

@pytest.mark.parametrize("flags", ["--n-candidates 1", "--n-prompts 1", "--n-demos 1",
                                   "--n-candidates 1 --n-prompts 1 --n-demos 1 --n-samples 1 "
                                   "--n-corpus 1"])
def test_one_of_a_kind(flags, tmp_path):
    """One candidate, one prompt, one demonstration, one of everything: a run has all its rows, each
    number finite or, where it does not exist, empty; with one candidate no selector selects."""
    results = afd.main([*TINY, "--seeds", "1", *flags.split(), "--out", str(tmp_path / "a")])
    json.loads((tmp_path / "a" / "results.json").read_text(), parse_constant=pytest.fail)
    rows = {(r["method"], r["reward_model"], r["n"]): r for r in results["rows"]}
    assert {"init", "sft", "demo", "bon", "po", "adversarial", "irft"} <= {m for m, *_ in rows}
    for row in rows.values():
        assert all(math.isfinite(row[k]) for k in ("gold_mean", "win_vs_sft", "length_mean"))
    if "candidates" in flags:
        picked = {(r["gold_mean"], r["kl_from_sft"]) for r in rows.values() if r["method"] == "bon"}
        assert picked == {(rows["sft", None, 1]["gold_mean"], 0.0)}


@pytest.mark.parametrize("worth", [math.nan, math.inf, 1e200])
def test_a_loss_that_explodes_names_the_stage_and_the_step(worth, capsys):
    """Not finite itself, or finite with a gradient that is not: one line, before the weights take
    any harm."""
    model = tiny().double()
    before = {name: p.clone() for name, p in model.state_dict().items()}

    def loss_fn(model, items):
        return nll_loss(model, items) * worth       # 1e200: the gradient's norm overflows
    code, error = said(lambda: fit(model, ITEMS, loss_fn, PLAN, random.Random(0), "sft"), capsys)
    assert code == 2 and error.count("\n") == 1 and "sft" in error and "at step 0" in error
    assert_same_state(before, dict(model.state_dict()))


def test_a_vocabulary_larger_than_the_model_s_is_refused(whole, tmp_path):
    """Its ids would read beyond the embedding."""
    folder = tmp_path / "c"
    shutil.copytree(whole[0] / "seed0" / "init", folder)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    config["vocab_size"] -= 1
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:-1].clone()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="the tokenizer has"):
        afd.main([*TINY, "--init", str(folder), "--out", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


# ---- what cannot be done is one line ------------------------------------------------------------

HEAD = provenance("python x.py", afd.Settings(), "cpu", ["a text"])


def test_a_folder_with_a_run_is_refused_resumed_or_overwritten(tmp_path):
    """Overwriting forgets what the other run remembered: its stages must not count as ours."""
    def claim(head=HEAD, **how):
        with claimed(tmp_path / "new", "config.json", head, **how) as got:
            return got
    claim(resume=True)                                      # nothing there: a run starts
    stage = tmp_path / "new" / "seed0" / "stages" / "sft.pt"
    keep(stage, 1, "sft")
    with pytest.raises(InputError, match="another run"):
        claim()
    other = {**HEAD, "command": "other", "config": {**HEAD["config"], "n_demos": 7, "out": "x"}}
    with pytest.raises(InputError, match="another n_demos: it was 4000, now 7"):
        claim(other, resume=True)
    for name, value in (("device", "cuda"), ("processes", 2), ("contents", {"data": 5})):
        with pytest.raises(InputError, match=f"another {'data' if name == 'contents' else name}"):
            claim({**HEAD, name: value}, resume=True)
    assert claim({**HEAD, "command": "other"}, resume=True) == HEAD and stage.exists()
    claim(other, overwrite=True)
    assert not stage.exists()
    (tmp_path / "new" / "config.json").write_text("{")
    with pytest.raises(InputError, match="not a run's settings"):
        claim(resume=True)


def test_overwriting_leaves_no_seed_of_the_other_run(tmp_path):
    """A checkpoint that nobody trained in this run would pass for one of it. What no run made
    stays, and what --init reads is not deleted under it, but refused."""
    out = tmp_path / "seed7"
    for name in ("seed0/stages", "seed0/sft", "seed12/stages", "seed1", "seeds/stages", "mine"):
        (out / name).mkdir(parents=True)
    write_json(out / "config.json", HEAD)

    def claim(init=None):
        head = {**HEAD, "config": {**HEAD["config"], "init": init}}
        with claimed(out, "config.json", head, overwrite=True):
            return sorted(path.name for path in out.iterdir() if path.is_dir())
    with pytest.raises(InputError, match="would delete --init"):
        claim(str(out / "mine" / ".." / "seed0" / "sft"))
    assert (out / "seed0" / "stages").is_dir() and (out / "seed12").is_dir()
    (out / "stages").mkdir()
    assert claim(str(out)) == claim() == ["mine", "seed1", "seeds"]


def test_other_contents_under_the_same_names_are_not_resumed(tmp_path, monkeypatch):
    """Of --init (weights, tokenizer), of --gold, of the answers that people liked less: else half
    of the numbers would be of what is no longer there."""
    demos, gold, init = tmp_path / "d.jsonl", tmp_path / "g.py", tmp_path / "init"
    demos.write_text("".join(json.dumps(
        {"prompt": f"ask {i}", "chosen": f"yes {i}", "rejected": f"no {i}"}) + "\n"
        for i in range(9)))
    gold.write_text("def f(x, y): return 1.0")
    tokenizer = bpe_tokenizer(["ask yes no"], 300)
    save_pretrained(init, GPT(GPTConfig(len(tokenizer), 64, 16, 1, 2)), tokenizer)
    argv = ["--demos", str(demos), "--gold", f"{gold}:f", "--init", str(init), "--max-prompt", "9",
            "--max-response", "9", "--device", "cpu", "--resume", "--out", str(tmp_path / "afd")]
    stage = ["sft", "--demos", str(demos), "--init", str(init), "--max-response", "9", "--resume",
             "--device", "cpu", "--out", str(tmp_path / "sft")]
    monkeypatch.setattr(afd, "run_seeds", lambda *_: None)
    monkeypatch.setattr(train, "fine_tune", lambda model, *_: (model, [{"loss": 0.0}]))

    def resumed(main, argv, changed=None):
        if changed is None:
            return main(argv)
        with pytest.raises(InputError, match=f"another {changed}: it was") as error:
            main(argv)
        assert "\n" not in str(error.value)
    for main, flags in ((afd.main, argv), (train.main, stage)):
        resumed(main, flags)
        resumed(main, flags)
    for path, old, new, what in ((gold, b"1.0", b"2.0", "content of --gold"),
                                 (demos, b"no 3", b"no 7", "data"),
                                 (init / "tokenizer.json", b"}", b"} ", "content of --init"),
                                 (init / "model.safetensors", b"\0", b"\1", "content of --init")):
        before = path.read_bytes()
        path.write_bytes(before[::-1].replace(old[::-1], new[::-1], 1)[::-1])   # the last one
        resumed(afd.main, argv, what)
        if path.parent == init:
            resumed(train.main, stage, what)
        path.write_bytes(before)
        resumed(afd.main, argv)


def test_two_runs_on_one_folder(tmp_path):
    """Whatever the second one asks for: both would write the same files."""
    out = str(tmp_path / "a")
    with claimed(out, "config.json", HEAD):
        for how in ("--overwrite", "--resume"):
            with pytest.raises(InputError, match="another run is writing"):
                afd.main([*TINY, "--out", out, how])
        assert json.loads((tmp_path / "a" / "config.json").read_text()) == HEAD
    with claimed(out, "config.json", HEAD, resume=True):
        pass


def said(main, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    return stop.value.code, capsys.readouterr().err


def test_what_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", "/proc/none"):
        code, error = said(lambda: afd.main([*TINY, "--out", str(out)]), capsys)
        assert code == 2 and error.count("\n") == 1 and str(out) in error

    def full():
        with open("/dev/full", "w") as file:
            file.write("x")
    code, error = said(full, capsys)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1

    def stop():
        raise KeyboardInterrupt
    assert said(stop, capsys) == (130, "stopped\n")


def test_a_reader_that_leaves_ends_it_quietly():
    """As `| head -1`: what is said to nobody is noticed at the end, when the buffer is written."""
    code = "from utils.cli import run_script; run_script(lambda: print('x'))"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": ""})
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 141)


def limited(size):
    """Files of this process may not grow beyond size bytes: to a writer, the disk is full."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def test_a_full_disk_loses_nothing_that_was_whole(tmp_path):
    path = tmp_path / "f.json"
    write_json(path, [1])
    keep(tmp_path / "s", 1, "mine")
    try:
        limited(4096)
        with pytest.raises(InputError, match="cannot be written"):
            write_json(path, ["x" * 9000])
        with pytest.raises(InputError, match="cannot be written"):
            keep(tmp_path / "s", torch.zeros(9000), "mine")
    finally:
        limited(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert json.loads(path.read_text()) == [1] and kept(tmp_path / "s", "mine") == 1
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))


def test_a_run_on_a_full_disk_says_so_and_resumes(whole, tmp_path, capsys):
    """From the shell's side: one line, status 2; with room again it ends as if nothing had been."""
    out = tmp_path / "b"
    try:
        limited(20_000)
        code, error = said(lambda: afd.main([*TINY, "--out", str(out)]), capsys)
    finally:
        limited(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    afd.main([*TINY, "--out", str(out), "--resume"])
    assert_same_run(whole[0], out)
