"""A run may be killed at any moment: it goes on to the results that it would have had."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import afd
from model import GPT, GPTConfig
from reward import RewardModel
from utils.checkpoints import Run, claim_folder, provenance
from utils.cli import InputError, run_script, write_json
from utils.tokenizer import word_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:Mean of empty slice"),
              pytest.mark.usefixtures("one_thread")]
ROOT = Path(__file__).resolve().parent.parent
TINY = ["--n-corpus", "40", "--n-demos", "20", "--n-samples", "8", "--n-prompts", "2",
        "--n-candidates", "2", "--policy-steps", "1", "--n-embd", "16", "--n-layer", "1",
        "--device", "cpu", "--methods", "po init-sft 0.3,adversarial reverse_kl,irft,dpo"]
WORDS = word_tokenizer(["the", "cat", "sat", "."])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "a"
    afd.main([*TINY, "--out", str(out)])
    return out


# ---- killed and resumed -------------------------------------------------------------------------

def test_a_killed_run_resumes_to_the_same_results(uninterrupted, tmp_path):
    """kill -9 as soon as one more stage is finished, so within the one that follows it. A
    difference means that a stage draws from another's random stream, or that what was loaded is not
    what was saved."""
    out, env = tmp_path / "b", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "afd.py", *TINY, "--out", str(out), "--resume"]
    stages = len(list(uninterrupted.rglob("metrics.jsonl")))
    assert stages >= 7              # pi_0, pi_SFT, four reward models, policies
    for finished in (1, 2, stages - 1):
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=env)
        while child.poll() is None and len(list(out.rglob("metrics.jsonl"))) < finished:
            time.sleep(0.005)
        child.kill()
        assert child.wait() == -signal.SIGKILL, finished        # else it had ended by itself
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    a, b = (json.loads((run / "results.json").read_text()) for run in (uninterrupted, out))
    for part in ("rows", "best_of_n", "reward_models", "curves", "summary"):
        assert a[part] == b[part], part
    for pattern in ("model.safetensors", "metrics.jsonl"):
        for path in uninterrupted.rglob(pattern):
            assert path.read_bytes() == (out / path.relative_to(uninterrupted)).read_bytes()


def test_a_finished_run_trains_nothing_again(uninterrupted, monkeypatch):
    before = json.loads((uninterrupted / "results.json").read_text())["rows"]
    monkeypatch.setattr(afd.train, "fit", lambda *_, **__: pytest.fail("trained again"))
    afd.main([*TINY, "--out", str(uninterrupted), "--resume"])
    assert json.loads((uninterrupted / "results.json").read_text())["rows"] == before


def tiny(Model=GPT, seed=0):
    torch.manual_seed(seed)
    policy = GPT(GPTConfig(len(WORDS), n_positions=12, n_embd=8, n_layer=1, n_head=2,
                           suppress_tokens=WORDS.suppress, eos_token_id=WORDS.eos,
                           pad_token_id=WORDS.pad))
    return policy if Model is GPT else RewardModel(policy, "last")


@pytest.mark.parametrize("Model", [GPT, RewardModel])
def test_a_stage_is_loaded_once_its_history_is_there(Model, tmp_path):
    """A failure means that half a stage counts as finished, or that a finished one is changed."""
    run, model = Run(tmp_path, 3, torch.device("cpu"), WORDS), tiny(Model)
    history = [{"step": 0, "loss": 1 / 3}, {"step": 1, "loss": 0.1}]
    assert run.load("po init 0.3", Model) is None
    assert run.save("po init 0.3", model, history) is model
    loaded = Run(tmp_path, 3, torch.device("cpu"), WORDS).load("po init 0.3", Model)
    for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert getattr(loaded, "trunk", loaded).config == getattr(model, "trunk", model).config
    assert run.history("po init 0.3") == history
    (tmp_path / "seed3" / "po-init-0.3" / "metrics.jsonl").unlink()
    assert run.load("po init 0.3", Model) is None and run.history("po init 0.3") == []


def test_json_comes_back_as_it_was_given_on(tmp_path):
    """A failure means that a resumed run goes on with other values than the run before it."""
    run = Run(tmp_path, 0, torch.device("cpu"), WORDS)
    assert run.load_json("y ~ pi_0") is None
    given_on = run.save_json("y ~ pi_0", [([1, 2], [0.1 + 0.2, float("nan")])])
    assert given_on == run.load_json("y ~ pi_0") == [[[1, 2], [0.1 + 0.2, None]]]


def test_a_stage_draws_from_a_stream_of_its_own(tmp_path):
    """A failure means that what a stage draws depends on which stages ran before it."""
    def draws(seed, stage):
        run = Run(tmp_path, seed, torch.device("cpu"), WORDS)
        return run.rng(stage).random(), torch.rand(1, generator=run.generator(stage)).item()
    assert draws(0, "sft") == draws(0, "sft")
    for part in range(2):
        assert len({draws(*of)[part] for of in ((0, "sft"), (1, "sft"), (0, "sft "))}) == 3
    assert draws(0, "sft")[0] == random.Random("0 sft").random()


# ---- what is refused ----------------------------------------------------------------------------

HEAD = provenance("afd.py", [], afd.Settings(), "cpu", SimpleNamespace(corpus=["a text"]))


def test_a_folder_with_a_run_is_refused_or_resumed(tmp_path, capsys):
    """A failure means that two runs' stages are mixed up in one folder."""
    out = tmp_path / "new"
    assert claim_folder(str(out), HEAD, resume=True) == out
    assert capsys.readouterr().out == f"nothing to resume in {out}: a new run\n"
    with pytest.raises(InputError, match="holds another run"):
        claim_folder(out, HEAD, resume=False)
    moved = {**HEAD["settings"], "out": "x", "resume": True}
    assert claim_folder(out, {**HEAD, "command": "other", "settings": moved}, resume=True) == out
    assert json.loads((out / "config.json").read_text()) == json.loads(json.dumps(HEAD))
    was = HEAD["settings"]["n_demos"]
    for head, message in (
            ({"settings": {**HEAD["settings"], "n_demos": 7}}, f"n_demos: it was {was}, now 7"),
            ({"versions": {**HEAD["versions"], "torch": "1"}}, "torch: it was "),
            ({"device": "cuda"}, "device: it was cpu, now cuda"),
            ({"threads": 99}, "threads: it was "), ({"data": 5}, "data: it was ")):
        with pytest.raises(InputError, match=f"cannot be resumed with another {message}"):
            claim_folder(out, {**HEAD, **head}, resume=True)
    for damage in ("{", "[]", "{}"):
        (out / "config.json").write_text(damage)
        with pytest.raises(InputError, match="not a run's settings"):
            claim_folder(out, HEAD, resume=True)
    (out / "config.json").unlink()
    claim_folder(out, HEAD, resume=False)               # nothing else was in it
    (out / "seed0").mkdir()
    (out / "config.json").unlink()
    with pytest.raises(InputError, match="holds another run"):      # of whatever settings
        claim_folder(out, HEAD, resume=False)


def test_other_data_under_the_same_names_are_not_resumed():
    one, other = (provenance("afd.py", [], afd.Settings(), "cpu", SimpleNamespace(corpus=[text]))
                  for text in ("a text", "another"))
    assert {name for name in one if one[name] != other[name]} == {"data"}


def test_afd_refuses_a_folder_with_another_run(uninterrupted):
    """From the command line's side; nothing in the folder changes."""
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    with pytest.raises(InputError, match="holds another run"):
        afd.main([*TINY, "--out", str(uninterrupted)])
    with pytest.raises(InputError, match="another n_prompts: it was 2, now 3"):
        afd.main([*TINY, "--out", str(uninterrupted), "--resume", "--n-prompts", "3"])
    assert before.keys() == {*uninterrupted.rglob("*")}
    assert all(path.is_dir() or path.stat().st_mtime_ns == t for path, t in before.items())


# ---- what cannot be written is one line ---------------------------------------------------------

def test_what_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", "/proc/none"):
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: afd.main([*TINY, "--out", str(out)]))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and str(out) in error


def test_a_reader_that_leaves_ends_it_quietly():
    """As `| head -1`: that nobody reads is noticed at the end, when the buffer is written."""
    code = "from utils.cli import run_script; run_script(lambda: print('x'))"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": ""})
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 141)


def test_a_full_disk_loses_nothing_that_was_there(tmp_path):
    """Files of this process may not grow beyond a size: to a writer, the disk is full. A model that
    cannot be written is one line, and its stage is not finished."""
    path, run = tmp_path / "f.json", Run(tmp_path, 0, torch.device("cpu"), WORDS)
    write_json(path, [1])
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(InputError, match="cannot be written"):
            write_json(path, ["x" * 9000])
        with pytest.raises(InputError, match="model.safetensors: cannot be written"):
            run.save("sft", tiny(), [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert json.loads(path.read_text()) == [1] and not list(tmp_path.rglob(".*.part"))
    assert run.load("sft", GPT) is None
    run.save("sft", tiny(), [])
    assert torch.equal(run.load("sft", GPT).wte.weight, tiny().wte.weight)
