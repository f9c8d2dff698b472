"""The flags helper: what --help promises is what the dataclass holds."""

import re
from dataclasses import dataclass, fields

import pytest

import afd
import train
from model import InputError
from train import parse_settings, run_script, setting


@dataclass
class Settings:
    """A test script."""
    rate: float = setting(0.5, "step size")
    name: str = setting("a", "which one", choices=["a", "b"])
    fast: bool = setting(False, "hurry")
    file: str = setting(None, "a file")


def test_fields_become_flags():
    got = parse_settings(Settings, ["--rate", "2", "--fast", "--file", "x"])
    assert got == Settings(rate=2.0, name="a", fast=True, file="x")


@pytest.mark.parametrize("argv", [["--nope"], ["--rate", "high"], ["--name", "c"], ["--fas"]])
def test_bad_flags_are_one_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: parse_settings(Settings, argv))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1


def test_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


def test_a_stage_s_help_is_its_own():
    """A flag that a stage's help names and the stage never reads would be believed; one that it
    reads and that is not named would not be found."""
    def flags(stage):
        return {f.name for f in fields(train.flags_of(stage))}
    schedule = {f.name for f in fields(train.Schedule)}
    files = {"init", "out", "overwrite", "seed", "device"}
    assert flags("data") == {"init", "max_prompt", "max_response", "vocab_size"}
    assert flags("sample") == files | {"prompts", "per_prompt", "max_response"}
    trains = schedule | files | {"resume"}
    assert flags("sft") == trains | {"demos", "max_response"}
    assert flags("reward") == trains | {"positives", "negatives", "head", "max_response"}
    assert flags("pretrain") == trains | {"corpus", "n_positions", "n_embd", "n_layer", "n_head",
                                          "vocab_size"}
    assert flags(None) == {f.name for f in fields(train.Settings)}


@pytest.mark.parametrize("stage", [*train.STAGES, None])
def test_help_has_the_stage_s_examples_in_80_columns(stage, capsys):
    with pytest.raises(SystemExit):
        train.main([stage, "--help"] if stage else ["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(train.__doc__.splitlines()[0])      # the examples say the usage
    examples = re.findall(r"^    .*train\.py (\w+)", shown, re.M)
    assert set(examples) == ({stage} if stage else set(train.STAGES))
    assert max(map(len, shown.splitlines())) <= 80
    assert max(map(len, afd.Settings.__doc__.splitlines())) <= 80


@pytest.mark.parametrize("argv, says", [
    (["data"], "data needs a file: python train.py data FILE"),
    (["data", "--max-prompt", "9"], "data needs a file"),
    ([], "name a stage first: data, pretrain"), (["cook"], "name a stage first"),
    (["sft", "--nope"], "unrecognized arguments: --nope"), (["sft"], "sft needs --demos")])
def test_what_is_missing_is_said(argv, says):
    with pytest.raises(InputError, match=says):
        train.main(argv)
