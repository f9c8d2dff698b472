"""Reading one's own data: every accepted form, and one clear line for whatever is amiss."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import InputError
from toy_envs.worlds import (load_golden, read_examples, read_lines, read_prompts, read_texts,
                             split_dialogue)

GOOD = {"prompt": "why?", "response": "because"}
CHOSEN = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
          "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no"}


def write(path, *records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def test_prompt_and_response(tmp_path):
    (example,), left_out = read_examples(write(tmp_path / "a.jsonl", GOOD, "\n", ""))
    assert (example.prompt, example.response, example.rejected) == ("why?\n", "because", None)
    assert left_out == 0


def test_dialogues_are_split_at_the_last_turn(tmp_path):
    """Otherwise the reward model would be trained on what the human said."""
    empty = {**CHOSEN, "chosen": CHOSEN["chosen"][:-4]}
    parted = {**CHOSEN, "rejected": "\n\nHuman: other\n\nAssistant: no"}
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in (CHOSEN, empty, parted))
                                   .encode()))
    (example,), left_out = read_examples(path)
    assert example.prompt.endswith("\n\nHuman: c\n\nAssistant:")
    assert (example.response, example.rejected, left_out) == (" yes", " no", 2)


def test_texts_and_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert read_texts(tmp_path / "a.txt") == ["one\ntwo", "three"]
    assert read_texts(write(tmp_path / "a.jsonl", {"text": "x"})) == ["x"]
    assert read_prompts(tmp_path / "a.txt") == ["one\n", "two\n", "three\n"]
    assert read_prompts(write(tmp_path / "p.jsonl", {"prompt": "x\n\nAssistant:"})) == [
        "x\n\nAssistant:"]


@pytest.mark.parametrize("bad, message", [
    ("not json\n", ":2: not JSON"), ("[1]\n", ":2: not a JSON object"),
    ({"prompt": "x"}, ":2: the field 'response' is missing"),
    ({"prompt": "x", "response": 3}, ":2: the field 'response' is missing or not a string"),
    ({"prompt": " ", "response": "y"}, ":2: the field 'prompt' is empty"),
    ({"prompt": "x", "response": ""}, ":2: the field 'response' is empty"),
    ({"chosen": "x"}, ":2: a dialogue needs"),
    ({**CHOSEN, "rejected": 1}, ":2: the field 'rejected'"),
])
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = write(tmp_path / "d.jsonl", GOOD, bad)
    with pytest.raises(InputError) as error:
        read_examples(path)
    assert f"{path}{message}" in str(error.value) and "\n" not in str(error.value)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "x", "response": "y"}\n"caf\xe9"\n')
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain text")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b"x" * 10000)[:-9])
    for name, message in (("gone.jsonl", "cannot be read"), ("empty.jsonl", "the file is empty"),
                          ("latin.jsonl", ":2: not UTF-8"), ("no.jsonl.gz", "cannot be read"),
                          ("torn.jsonl.gz", ":1: the gzip file ends too early"),
                          ("", "cannot be read")):
        with pytest.raises(InputError) as error:
            read_examples(tmp_path / name)
        assert message in str(error.value) and "\n" not in str(error.value)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_lines_or_one_error(tmp_path, data):
    (tmp_path / "x.jsonl").write_bytes(data)
    try:
        assert all(text.strip() for _, text in read_lines(tmp_path / "x.jsonl"))
        read_examples(tmp_path / "x.jsonl")
    except InputError as error:
        assert "\n" not in str(error)


def test_a_dialogue_needs_a_prompt():
    for text in ("\n\nAssistant: hello", "hello"):
        with pytest.raises(InputError):
            split_dialogue(text, "here")


def test_golden_functions(tmp_path):
    """A user's function that is not there, raises or returns no finite number is one line."""
    path = tmp_path / "g.py"
    path.write_text("def good(x, y):\n    return len(y)\n"
                    "def bad(x, y):\n    return float('nan')\n"
                    "def ugly(x, y):\n    return 1 / 0\n"
                    "def text(x, y):\n    return 'much'\n")
    assert load_golden(f"{path}:good")("x\n", " abc ") == 3
    for name, message in (("bad", "returned nan"), ("ugly", "ZeroDivisionError"),
                          ("text", "ValueError")):
        with pytest.raises(InputError, match=message):
            load_golden(f"{path}:{name}")("x", "y")
    for spec in (f"{path}:none", f"{tmp_path}/gone.py:f", "nothing"):
        with pytest.raises(InputError):
            load_golden(spec)
    path.write_text("def broken(:\n")
    with pytest.raises(InputError, match="SyntaxError"):
        load_golden(f"{path}:broken")
