"""Worlds from one's own files: what is held out, what is cut, and the user's golden reward."""

import json
from types import SimpleNamespace

import pytest

from model import InputError
from utils.worlds import file_world, load_golden


def world_of(path, *rows, **more):
    """The world of a file with these records, with a budget of 12 tokens a prompt."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file_world(SimpleNamespace(**{**dict(
        demos=str(path), corpus=None, prompts=None, gold=None, init=None, n_demos=99, n_prompts=9,
        vocab_size=258, max_prompt=12, max_response=8), **more}), 0)


def test_long_prompts_are_cut_wherever_they_go(tmp_path):
    """A prompt that outgrows the budget would stop the run at the first sample of it."""
    (tmp_path / "p.txt").write_text("more " * 9 + "\n")
    rows = [{"prompt": f"{'é' * (3 * i)} number {i}", "response": "yes"} for i in range(10)]
    world = world_of(tmp_path / "d.jsonl", *rows, prompts=str(tmp_path / "p.txt"))
    prompts = [*world.train_prompts, *world.test_prompts, *(x for x, _ in world.demos)]
    assert all(len(world.tokenizer.encode(x)) <= 12 for x in prompts) and len(prompts) == 19
    assert all(x.endswith(f"number {i}\n") for i, x in enumerate(sorted(
        {x for x in prompts if "number" in x}, key=lambda x: x[-3:])))
    assert "10 prompts longer than 12 tokens cut to the end" in world.notes
    assert world.pair("x" * 99 + " why?\n", "y")[0] == world.tokenizer.encode("xxxxxx why?\n")


def test_prompts_that_are_the_same_once_cut_stay_on_one_side(tmp_path):
    """Otherwise the evaluation asks what was trained on."""
    rows = [{"prompt": f"{i:04} is the number" * (i % 2) + f"is the number {i // 2}",
             "response": f"yes {i}"} for i in range(40)]
    world = world_of(tmp_path / "d.jsonl", *rows)
    assert not set(world.train_prompts) & set(world.test_prompts)
    assert not {x for x, _ in world.demos} & set(world.test_prompts)
    assert any("cut, a held-out prompt" in note for note in world.notes)
    with pytest.raises(InputError, match="every prompt to train on is also a held-out one"):
        world_of(tmp_path / "e.jsonl", *rows, max_prompt=1)


def test_one_prompt_cannot_be_held_out(tmp_path):
    rows = [{"prompt": "why?", "response": f"{i}"} for i in range(9)]
    with pytest.raises(InputError, match="one prompt is too few"):
        world_of(tmp_path / "d.jsonl", *rows)


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
