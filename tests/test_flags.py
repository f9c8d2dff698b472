"""The flags helper: what --help promises is what the dataclass holds."""

from dataclasses import dataclass

import pytest

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
