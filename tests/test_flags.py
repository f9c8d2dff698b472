"""The command line: what --help promises is what the dataclass holds, and errors are one line."""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import afd
from utils.cli import (InputError, choose_device, in_threads, make_folder, parse_settings, plural,
                       run_script, setting, write_aside, write_json)


@dataclass
class Settings:
    """A test script."""
    rate: float = setting(0.5, "step size, 1% at least", 0.01, 3)
    n_best: int = setting(4, "how many", 1)
    name: str = setting("a", "which one", choices=["a", "b"])
    fast: bool = setting(False, "hurry")
    file: str = setting(None, "a file")


def test_fields_become_flags():
    """A failure means that a flag is read as another type, or not at all."""
    got = parse_settings(Settings, ["--rate", "2", "--fast", "--file", "x", "--n-best", "7"])
    assert got == Settings(rate=2.0, n_best=7, name="a", fast=True, file="x")
    assert parse_settings(Settings, []) == Settings()


@pytest.mark.parametrize("argv, message", [
    (["--nope"], "unrecognized arguments: --nope"), (["--fas"], "unrecognized"),
    (["--rate", "high"], "--rate: invalid float"), (["--name", "c"], "--name: invalid choice"),
    (["--rate", "0"], r"--rate must lie in [0.01, 3], not 0.0"), (["--rate", "nan"], "not nan"),
    (["--n-best", "0"], "--n-best must lie in [1, inf], not 0"), (["--fast", "3"], "unrecognized")])
def test_bad_flags_are_one_line_and_status_2(argv, message, capsys):
    """A failure means that a typo starts a run of an hour, or ends in a traceback."""
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: parse_settings(Settings, argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("error, status, line", [
    (InputError("no such task"), 2, "error: no such task\n"),
    (FloatingPointError("sft: nan at step 3"), 2, "error: sft: nan at step 3\n"),
    (FileNotFoundError(2, "No such file", "x.jsonl"), 2, "error: x.jsonl: No such file\n"),
    (OSError(28, "No space left on device"), 2, "error: output: No space left on device\n"),
    (KeyboardInterrupt(), 130, "stopped\n")])
def test_what_a_user_can_put_right_is_one_line(error, status, line, capsys):
    """A failure means that a traceback is shown for a mistake that is not ours."""
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == status and capsys.readouterr().err == line


def test_a_narrow_console_does_not_end_a_run():
    """Windows' cp1252 knows no mark of the demonstrator. A failure means that a run ends in a
    traceback after its training; or that a sample's control characters move the cursor."""
    code = ("from utils.cli import run_script, InputError, printable\n"
            "def main():\n    print('a \u2726 \u00b1', printable('b\\x1b[2J\\u202e \u2726'))\n"
            "    raise InputError('bad\\x1b \u2726')\nrun_script(main)")
    got = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parent.parent,
                         capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert got.stdout == rb"a ? " + b"\xb1" + rb" b\x1b[2J\u202e ?" + os.linesep.encode()
    assert got.stderr == rb"error: bad\x1b ?" + os.linesep.encode() and got.returncode == 2


@pytest.mark.parametrize("script", ["afd", "toy_envs.gaussian", "toy_envs.gridworld",
                                    "toy_envs.heterogeneity", "toy_envs.token_mdp",
                                    "toy_envs.token_samples", "toy_envs.shaping",
                                    "toy_envs.expertise", "toy_envs.observation"])
@pytest.mark.parametrize("seed", ["-1", str(2 ** 64), "x"])
def test_a_seed_that_is_none_is_refused(script, seed):
    """To Python's generator -1 is the seed 1. A failure means that two seeds are one."""
    with pytest.raises(InputError, match="--seed"):
        parse_settings(importlib.import_module(script).Settings, ["--seed", seed])


def test_a_name_that_is_not_utf_8_is_said_to_be_so():
    """Python has it, but no file of the run can hold it: the disk was blamed for that."""
    with pytest.raises(InputError, match=r"--file 'caf\\udce9': not UTF-8") as error:
        parse_settings(Settings, ["--file", b"caf\xe9".decode(errors="surrogateescape")])
    str(error.value).encode()


def test_a_mistake_of_ours_shows_its_traceback():
    """A ValueError is no InputError. A failure means that bugs are hidden as bad input."""
    def main():
        raise ValueError("no data to train on")
    with pytest.raises(ValueError, match="no data"):
        run_script(main)
    assert issubclass(InputError, ValueError)


def test_help_is_the_documentation(capsys):
    """Each field's flag, its line and its default; afd.py's examples fit 80 columns. A failure
    means a flag that nobody finds."""
    with pytest.raises(SystemExit):
        parse_settings(Settings, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("A test script.") and "--rate RATE step size, 1% at least" in shown
    assert "(default: 0.5)" in shown and "--n-best" in shown and "--no-fast" not in shown
    with pytest.raises(SystemExit):
        afd.main(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(afd.Settings):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert max(map(len, afd.Settings.__doc__.splitlines())) <= 80


def test_fast_needs_cuda_and_says_so_before_it_writes(tmp_path):
    """A failure means that --fast is ignored, or that its refusal leaves a folder behind."""
    with pytest.raises(InputError, match="--fast needs CUDA"):
        afd.main(["--fast", "--device", "cpu", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_devices():
    """A failure means that a device which is not there is found out in the middle of a run."""
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("tpu", "cpu:x", "xpu"):
        with pytest.raises(InputError, match="no device '" + name):
            choose_device(name)


def test_in_threads_keeps_the_order_and_gives_the_cores_back():
    """A failure means that one reward model's scores are printed under another's name, or that
    what comes after runs on one core."""
    cores = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            jobs = list(range(7))
            assert in_threads(lambda job: job ** 2, jobs, torch.device("cpu")) == [
                job ** 2 for job in jobs]
            with pytest.raises(ZeroDivisionError):
                in_threads(lambda job: 1 / job, jobs, torch.device("cpu"))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(cores)


def test_plural():
    assert [plural(n, "texts") for n in (0, 1, 2000)] == ["0 texts", "1 text", "2,000 texts"]


# ---- files --------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, raised", [(KeyboardInterrupt(), KeyboardInterrupt),
                                           (OSError(28, "No space left on device"), InputError)])
def test_an_interrupted_write_leaves_the_old_file(error, raised, tmp_path):
    """A failure means that stopping a run at the wrong moment loses the checkpoint before it."""
    path = tmp_path / "file"
    path.write_text("old")

    def fail(part):
        part.write_text("half")
        raise error
    with pytest.raises(raised):
        write_aside(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    write_aside(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new"


def test_json_has_null_for_what_does_not_exist(tmp_path):
    """A failure means a results.json that other programs cannot read: NaN is no JSON."""
    write_json(tmp_path / "x.json", {"a": [math.nan, 1.5], "b": "é"})
    assert "NaN" not in (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": "é"}
    assert make_folder(tmp_path / "a" / "b").is_dir()
    with pytest.raises(InputError, match="x.json: cannot be written"):
        make_folder(tmp_path / "x.json")
