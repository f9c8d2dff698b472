"""People's files in, a World out: every accepted form, what is held out and what is cut, and one
clear line for whatever is amiss."""

import dataclasses
import gzip
import json
import random
import re
import time
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils import data
from utils.cli import InputError
from utils.data import (describe, file_world, load_golden, read_examples, read_lines, read_prompts,
                        read_texts)
from utils.tokenizer import LONG_WORD, bpe_tokenizer, meet

GOOD = {"prompt": "why?", "response": "because"}
CHOSEN = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
          "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no"}
ANY = settings(deadline=None, max_examples=100, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture])


def turns(*texts, system=None):
    """Chat turns, the user's first, as people's files hold them."""
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * (system is not None) + chat


def write(path, *records):
    """A file of these records as JSON lines; a string is written as it is."""
    text = "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records)
    path.write_bytes(text.encode())     # as it is: no newline is translated
    return path


# ---- the forms ----------------------------------------------------------------------------------

DIALOGUE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
LAST = [{"role": "assistant", "content": "yes"}]
FORMS = [
    (GOOD, "prompt/response", "why?\n", "because", None),
    ({"prompt": "why?", "completion": "because"}, "prompt/completion", "why?\n", "because", None),
    ({"prompt": DIALOGUE, "response": "yes"}, "prompt/response", DIALOGUE, " yes", None),
    ({"messages": turns("a", "b", "c", "yes")}, "messages", DIALOGUE, " yes", None),
    ({"messages": turns("a", "b", "c", "yes", "thanks")}, "messages", DIALOGUE, " yes", None),
    ({"messages": turns("a", "b", "c", "yes", system="Be kind.")}, "messages",
     "\n\nBe kind." + DIALOGUE, " yes", None),
    ({"messages": turns("a", "x\n\nAssistant: y")}, "messages", "\n\nHuman: a\n\nAssistant:",
     " x\n\nAssistant: y", None),       # what a turn says does not end it
    ({"prompt": turns("a", "b", "c"), "completion": LAST}, "prompt/completion", DIALOGUE, " yes",
     None),
    ({"prompt": turns("a", "b", "c"), "response": "yes"}, "prompt/response", DIALOGUE, " yes",
     None),
    (CHOSEN, "chosen/rejected", DIALOGUE, " yes", " no"),
    ({"prompt": "why?", "chosen": "yes", "rejected": "no"}, "prompt/chosen/rejected", "why?\n",
     "yes", "no"),
    ({"chosen": turns("a", "b", "c", "yes"), "rejected": turns("a", "b", "c", "no")},
     "chosen/rejected messages", DIALOGUE, " yes", " no"),
    ({"prompt": "c", "chosen": LAST, "rejected": turns("c", "no")},
     "prompt/chosen/rejected messages", "\n\nHuman: c\n\nAssistant:", " yes", " no"),
    ({"prompt": turns("a", "b", "c"), "chosen": LAST, "rejected": turns("a", "b", "c", "no")},
     "prompt/chosen/rejected messages", DIALOGUE, " yes", " no"),
    ({"prompt": turns(system="Be kind."), "chosen": turns("a", "yes"),
      "rejected": turns("a", "no")},
     "prompt/chosen/rejected messages", "\n\nBe kind.\n\nHuman: a\n\nAssistant:", " yes", " no"),
    ({"prompt": "c", "completion": turns("c", "b", "c", "yes")[1:]}, "prompt/completion",
     DIALOGUE.replace("Human: a", "Human: c"), " yes", None),     # it begins with an answer
    # the forms of other programs
    ({"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "a"},
                        {"from": "gpt", "value": "yes"}]}, "conversations",
     "\n\nBe kind.\n\nHuman: a\n\nAssistant:", " yes", None),
    ({"conversations": [{"from": "human", "value": "a"}],
      "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}},
     "chosen/rejected", "\n\nHuman: a\n\nAssistant:", " yes", " no"),
    ({"instruction": "why?", "input": "", "output": "so"}, "instruction/output", "why?\n", "so",
     None),
    ({"instruction": "why?", "input": "a b", "output": "so"}, "instruction/output",
     "why?\na b\n", "so", None),
    ({"instruction": "why?", "context": "a b", "response": "so"}, "instruction/response",
     "why?\na b\n", "so", None),
    ({"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
     "instruction/chosen/rejected", "a\nb\n", "c", "d"),
    ({"question": "why?", "answer": "so"}, "question/answer", "why?\n", "so", None),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
                                                {"type": "text", "text": " b"}]},
                   {"role": "assistant", "content": [{"type": "text", "text": "so"}]}]},
     "messages", "\n\nHuman: a b\n\nAssistant:", " so", None),
    # a prompt that only the two answers tell
    ({"chosen": "The lid is blue.", "rejected": "The lid is black."}, "chosen/rejected",
     "The lid is", " blue.", " black."),
    ({"chosen": "why?\nyes", "rejected": "why?\nyesterday"}, "chosen/rejected", "why?\n", "yes",
     "yesterday"),
    # what the human says last
    ({"chosen": DIALOGUE + " yes\n\nHuman: thanks", "rejected": DIALOGUE + " no\n\nHuman: oh"},
     "chosen/rejected", DIALOGUE, " yes", " no"),
    ({"prompt": DIALOGUE, "completion": " yes\n\nHuman: thanks\n\nAssistant: ok"},
     "prompt/completion", DIALOGUE, " yes", None),
    # the prompt inside its answer
    ({"prompt": DIALOGUE, "chosen": DIALOGUE + " yes", "rejected": DIALOGUE + " no"},
     "prompt/chosen/rejected", DIALOGUE, " yes", " no"),
    ({"prompt": "c", "chosen": DIALOGUE + " yes", "rejected": DIALOGUE + " no"},
     "prompt/chosen/rejected", DIALOGUE, " yes", " no"),
    ({"prompt": "why now?", "chosen": "why now?\nso", "rejected": "why now?\nno"},
     "prompt/chosen/rejected", "why now?\n", "so", "no"),
    ({"prompt": "the lid is", "completion": "the lid is red"}, "prompt/completion", "the lid is",
     " red", None),
    ({"prompt": "is tea hot", "completion": "is tea hotter"}, "prompt/completion", "is tea hot\n",
     "is tea hotter", None),            # another word
    # white space at the seam: see test_tokenizer.py
    ({"prompt": "the lid is", "completion": " red \n"}, "prompt/completion", "the lid is",
     " red \n", None),
    ({"prompt": "write f", "response": "    return\n"}, "prompt/response", "write f\n",
     "    return\n", None),
    ({"messages": turns("write f", "    return")}, "messages",
     "\n\nHuman: write f\n\nAssistant:", "    return", None),
    ({"prompt": "why", "chosen": " so", "rejected": "no"}, "prompt/chosen/rejected", "why\n",
     " so", "no"),
    ({"prompt": "why?", "completion": "so", "label": True}, "prompt/completion", "why?\n", "so",
     None),
]


@pytest.mark.parametrize("record, form, prompt, response, rejected", FORMS)
def test_every_form_gives_its_example(tmp_path, record, form, prompt, response, rejected):
    """A failure means that what a person said is learned as an answer, or an answer as a prompt."""
    (example,), forms, left_out = read_examples(write(tmp_path / "a.jsonl", record))
    assert (example.prompt, example.response, example.rejected) == (prompt, response, rejected)
    assert forms == {form: 1} and not left_out


def test_lines_an_array_and_gzip_say_the_same(tmp_path):
    """Blank lines, CRLF and a byte order mark change nothing either."""
    records = [GOOD, CHOSEN, {"messages": turns("é ☼", "ja")}]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    expected = read_examples(write(tmp_path / "a.jsonl", lines))
    assert len(expected[0]) == 3 and expected[1].total() == 3
    for text in (lines.replace("\n", "\n\n \n"), lines.replace("\n", "\r\n"), "\ufeff" + lines,
                 "\ufeff" + lines.replace("\n", "\n\ufeff"), json.dumps(records),
                 "\ufeff\n" + json.dumps(records, indent=2) + "\n"):
        for name, data in (("b.json", text.encode()), ("b.json.gz", gzip.compress(text.encode()))):
            (tmp_path / name).write_bytes(data)
            assert read_examples(tmp_path / name) == expected


TOOL = [*turns("a"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "8"}, {"role": "assistant", "content": "yes"}]
LEFT_OUT = [
    ({"messages": TOOL}, "a tool's turn"), ({"messages": TOOL[:1] + TOOL[2:]}, "a tool's turn"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"},
                        {"from": "gpt", "value": "c"}]}, "a tool's turn, or one of an unknown"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, *LAST]},
     "a turn that is no text"),
    ({"messages": turns("only the user")}, "no turn of the assistant"),
    ({"messages": LAST}, "no turn of the assistant"),
    ({"prompt": "why?", "completion": "go away", "label": False}, "an answer labelled false"),
    ({"messages": turns("a", "go away"), "kto_tag": False}, "an answer labelled false"),
    ({"prompt": "why?", "completion": "go away", "label": 0}, "an answer labelled false"),
    ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "turns before its instruction"),
    ({"prompt": "why", "completion": "why not"}, "an answer that may repeat its prompt"),
    ({"prompt": "why", "completion": "so\n\nHuman: oh"}, "a human's turn in the answer"),
    ({"prompt": "who?", "completion": DIALOGUE + " b"}, "a dialogue about another prompt"),
    ({"chosen": "one", "rejected": "other"}, "chosen and rejected do not part after a prompt"),
    ({"chosen": "one two", "rejected": "one two"}, "chosen and rejected do not part after"),
    ({"chosen": DIALOGUE + " yes\n\nHuman: c\n\nAssistant: d", "rejected": DIALOGUE + " no"},
     "the two dialogues part before the last turn")]


@pytest.mark.parametrize("record, why", LEFT_OUT)
def test_what_is_no_certain_answer_is_left_out_and_counted(tmp_path, record, why):
    """One such row does not refuse a file, and is not learned: a tool's words, the human's, an
    answer that people call bad. Alone it is refused, with its reason."""
    examples, forms, left_out = read_examples(write(tmp_path / "a.jsonl", GOOD, record))
    assert [e.response for e in examples] == ["because"] and forms.total() == 2
    assert left_out.total() == 1 and next(iter(left_out)).startswith(why)
    with pytest.raises(InputError, match="no usable example in it; 1 with " + why):
        read_examples(write(tmp_path / "b.jsonl", record))


@pytest.mark.parametrize("record, form, prompt, response, rejected", FORMS)
def test_every_form_serves_as_prompts(tmp_path, record, form, prompt, response, rejected):
    """With its answers or without them, which are nothing that a policy is asked."""
    chat = record.get("messages") or record.get("conversations") or [{}]
    if chat[-1].get("role") == "user":          # which is to be answered now
        prompt += f"{response}\n\nHuman: {chat[-1]['content']}\n\nAssistant:"
    assert read_prompts(write(tmp_path / "a.jsonl", record)) == [prompt]
    if form in ("messages", "conversations") and chat[-1].get("role") != "user":
        bare = {form: chat[:-1]}
    elif form in ("prompt/response", "instruction/output", "question/answer"):
        bare = {key: value for key, value in record.items() if key != form.split("/")[1]}
    else:
        return
    assert read_prompts(write(tmp_path / "b.jsonl", bare)) == [prompt]


def test_prompts_alone_end_as_those_of_the_demonstrations(tmp_path):
    """A failure means that a policy which learned to go on in a sentence is asked on a new line."""
    for ending, answer in ((" is", " red."), (" is: ", "red."), ("?", "red.")):
        rows = [{"prompt": f"thing {i}{ending}", "completion": answer} for i in range(20)]
        write(tmp_path / "p.jsonl", {"prompt": "new" + ending})
        (tmp_path / "p.txt").write_text("new" + ending + "\n")
        for name in ("p.jsonl", "p.txt"):
            world = world_of(tmp_path / "d.jsonl", *rows, prompts=str(tmp_path / name),
                             max_prompt=30)
            assert world.train_prompts[-1] == meet("new" + ending, answer)[0]
            assert world.demos[0][0].endswith(world.train_prompts[-1][3:])


def test_equal_answers_are_no_pair(tmp_path):
    """Equal as they are or once they are cut: nobody prefers one of them, and a reward would agree
    with people on half of them. As demonstrations they stay."""
    rows = [{"prompt": f"ask {i}", "chosen": f"{i} long answer, good", "rejected": rejected}
            for i in range(10) for rejected in (f"{i} long answer, good", f"{i} long answer, bad")]
    world = world_of(tmp_path / "d.jsonl", *rows)               # cut to 8 tokens, bytes here
    assert len(world.demos) == 16 and not world.preferences and not world.human_pairs
    assert "10 pairs of answers that are the same, cut to 8 tokens: no pairs" in world.notes
    world = world_of(tmp_path / "d.jsonl", *rows, max_response=99)
    assert len(world.preferences) == 8 and len(world.human_pairs) == 2
    said = described(tmp_path / "d.jsonl", 258, max_response=8)
    assert "10  prompt/chosen/rejected, two equal answers: no pair\n" in said
    assert "10  pairs of answers that are the same, cut to 8 tokens" in said


def test_an_end_spelled_out_and_few_prompts_get_a_note(tmp_path):
    """A policy would learn to write "<|endoftext|>" in letters, and then go on; below 50 held-out
    prompts means say little."""
    rows = [{"prompt": f"ask {i}", "response": f"so {i}" + end}
            for i, end in enumerate(["<|endoftext|>", "</s>", *[""] * 28])]
    path = tmp_path / "d.jsonl"
    seen = [set(world_of(path, *rows, seed=seed, n_prompts=200).notes) for seed in range(3)]
    assert any(re.match("[12] demonstrations? with an end of text spelled", note)
               for notes in seen for note in notes)
    assert all("6 prompts held out: few, below 50 means say little" in notes for notes in seen)
    said = described(path)
    assert "2  answers with an end of text spelled out" in said
    assert "30  distinct prompts\n        6  held out: few, below 50 means say little" in said
    many = write(path, *({"prompt": f"ask {i}", "response": "so"} for i in range(250)))
    assert "   50  held out\n" in described(many)


def test_long_words_get_a_note(tmp_path):
    rows = [{"prompt": f"ask {i}", "response": "x" * LONG_WORD} for i in range(5)]
    note = f"words of {LONG_WORD:,} characters and more"
    assert f"4 {note}, cut there by the tokenizer" in world_of(tmp_path / "d.jsonl", *rows).notes
    assert f"5  {note}" in described(tmp_path / "d.jsonl")


def test_a_corpus_and_prompts_are_described_too(tmp_path):
    """Whoever brings text for pi_0 sees what a document looks like beside a demonstration."""
    path = write(tmp_path / "d.jsonl", GOOD, {**GOOD, "prompt": "who?"})
    corpus = write(tmp_path / "c.ndjson", {"text": "who?\nnobody"}, {"text": "x"})
    said = described(path, corpus=str(corpus), prompts=str(path))
    assert "a document of --corpus should look like these two in one" in said
    assert f"{corpus}: 2 documents, the first 'who?\\nnobody'\n{path}: 2 prompts" in said


def test_dialogues_that_teach_nothing_are_left_out(tmp_path):
    """An empty last turn, or dialogues that part before it: otherwise the reward model would be
    trained on what the human said."""
    empty = {**CHOSEN, "chosen": CHOSEN["chosen"][:-4]}
    no_worse = {**CHOSEN, "rejected": CHOSEN["rejected"][:-3] + " "}
    parted = {**CHOSEN, "rejected": "\n\nHuman: other\n\nAssistant: no"}
    path = write(tmp_path / "a.jsonl", CHOSEN, empty, no_worse, parted,
                 {"messages": turns("a", " ")})
    examples, forms, left_out = read_examples(path)
    assert len(examples) == 1 and forms == {"chosen/rejected": 4, "messages": 1}
    assert left_out == {"an empty last turn": 3, "the two dialogues part before the last turn": 1}
    with pytest.raises(InputError, match="no usable example in it; 1 with an empty last turn"):
        read_examples(write(tmp_path / "b.jsonl", empty))


def test_texts_and_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert read_texts(tmp_path / "a.txt") == ["one\ntwo", "three"]
    assert read_texts(write(tmp_path / "a.json", '[{"text": "x"},\n{"text": "y"}]')) == ["x", "y"]
    assert read_prompts(tmp_path / "a.txt") == ["one\n", "two\n", "three\n"]
    for name in ("p.jsonl", "p.ndjson"):
        assert read_prompts(write(tmp_path / name, {"prompt": DIALOGUE})) == [DIALOGUE]
    for name in ("t.json", "t.ndjson.gz"):
        text = json.dumps({"text": "x"}).encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        assert read_texts(tmp_path / name) == ["x"]


# ---- what is amiss ------------------------------------------------------------------------------

BAD = [
    ("not json\n", "not JSON"), ("[1]\n", "not a JSON object"), ("3\n", "not a JSON object"),
    ("null\n", "not a JSON object"), ('"x"\n', "not a JSON object"), ("{}\n", "neither prompt"),
    ('{"prompt": "x", "response": "y"} {}\n', "not JSON (a record ends with its line, "),
    ({"prompt": "x"}, "the field 'response' is missing"),
    ({"response": "x"}, "the field 'prompt' is missing"),
    ({"prompt": "x", "response": 3}, "the field 'response' is missing or not a string"),
    ({"prompt": " ", "response": "y"}, "the field 'prompt' is empty"),
    ({"prompt": "x", "response": ""}, "the field 'response' is empty"),
    ({"chosen": "x"}, "a dialogue needs"), ({"chosen": "\n\nAssistant: x"}, "a dialogue needs"),
    ({"messages": [{"content": "x"}]}, "the field 'role' is missing"),
    ({"conversations": [{"from": "human"}]}, "the field 'content' is missing"),
    ({"instruction": None, "output": "x"}, "the field 'instruction' is missing"),
    ({**CHOSEN, "rejected": 1}, "the field 'rejected'"),
    ({"prompt": "x", "chosen": "y"}, "the field 'rejected' is missing"),
    ({"prompt": turns("x"), "chosen": LAST}, "the field 'rejected' is missing"),
    ({"prompt": None, "chosen": LAST, "rejected": LAST}, "the field 'prompt' is missing"),
    ({"messages": "x"}, "the field 'messages' is missing or no list"),
    ({"messages": []}, "the field 'messages' is missing or no list"),
    ({"messages": ["x"]}, "a message in 'messages' is not a JSON object"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "the field 'role'"),
    ({"messages": [{"role": "user", "content": None}]}, "the field 'content'"),
    ({"text": "x"}, "a text without a prompt is for --corpus"),
    ('{"prompt": "x", "response": "\\ud83d"}\n', "half a surrogate pair"),
    ('{"prompt": "x", "response": NaN}\n', "the field 'response' is missing or not a string"),
    ('{"prompt": "x", "response": 1' + "0" * 9999 + "}\n", "'response' is missing or not a string"),
    ('{"prompt": "x", "response": "y", "response": "z"}\n', "a key stands twice"),
    ('{"prompt": "x", "response": ' + "[" * 100_000 + "\n", "not JSON (maximum recursion"),
]


@pytest.mark.parametrize("bad, message", BAD, ids=range(len(BAD)))
def test_a_bad_record_is_named(tmp_path, bad, message):
    """By file and line, in JSON lines and in an array with elements over several lines alike."""
    lines = write(tmp_path / "d.jsonl", GOOD, "\r\n", bad)
    array = write(tmp_path / "d.json", "[" + json.dumps(GOOD) + "\n,\n",
                  bad if isinstance(bad, str) else json.dumps(bad, indent=1), "\n, 1]")
    for path in (lines, array):
        with pytest.raises(InputError) as error:
            read_examples(path)
        said = str(error.value)
        assert said.startswith(f"{path}:3: ") and "\n" not in said and len(said) < 300
        assert message in said or path == array and "not JSON" in said


def test_what_is_not_read_does_not_matter(tmp_path):
    """Huge numbers, NaN and nulls in other fields are nothing that a demonstration is made of."""
    path = write(tmp_path / "a.jsonl", json.dumps(GOOD)[:-1] + ', "id": 1' + "0" * 9999
                 + ', "score": NaN, "x": -Infinity, "y": 1e999, "z": null}\n')
    assert read_examples(path)[0][0].response == "because"


@pytest.mark.parametrize("text, line", [
    ("[", 1), ("[1\n", 1), ('[{"text": "x"}\n\n{}]', 3), ('[{"text": "x"}]\n,', 1),
    ('[{"text": "x"},', 1), ('[{"text": "x"},\n]', 2), ('\n[{"text":\n"x"}\n,\n{"text"\n}]', 5),
    ('{"text":\n"x"}\n{"text": "y"}', 1), ('{"text": "x"}\n\n{"text": "y"\n}', 3),
    ('{"text": "x"},\n{"text": "y"}', 1), ('{"text": "x"}\n[{"text": "y"}]', 2)])
def test_a_broken_array_or_line_is_named(tmp_path, text, line):
    with pytest.raises(InputError, match=rf"a\.json:{line}: not (JSON|a JSON object)"):
        read_texts(write(tmp_path / "a.json", text))


def test_bad_files_are_named(tmp_path):
    good, page = json.dumps(GOOD).encode(), b"x" * 10000
    torn, crc = gzip.compress(page)[:-9], bytearray(gzip.compress(good * 99))
    crc[-5] ^= 1
    for name, data, message in (
            ("empty.jsonl", b"", "the file is empty"), ("blank.jsonl", b"\n \n", "file is empty"),
            ("none.json", b"[]", "no usable example"), ("bom.jsonl", b"\xef\xbb\xbf", "is empty"),
            ("latin.jsonl", good + b'\n"caf\xe9"\n', ":2: not UTF-8"),
            ("utf16.jsonl", good.decode().encode("utf-16"), ":1: not UTF-8"),
            ("no.jsonl.gz", b"plain text", ":1: not gzip"), ("torn.jsonl.gz", torn, ":1: not gzip"),
            ("bit.jsonl.gz", gzip.compress(page)[:12] + b"\xff" * 9, ":1: not gzip"),
            ("crc.jsonl.gz", bytes(crc), ":1: not gzip"), ("null.jsonl.gz", b"", "file is empty"),
            ("x.jsonl", good + b"\n" + good[:-4], ":2: not JSON"), ("gone", None, "cannot be read"),
            ("", None, "cannot be read"),
            ("lfs.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
             "a git-lfs pointer"),
            ("lfs.gz", b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer")):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError) as error:
            read_examples(tmp_path / name)
        assert message in str(error.value) and "\n" not in str(error.value)


def outcome(path):
    """Examples that are text, or one line naming file and line (or the file as a whole)."""
    try:
        examples, _, left_out = read_examples(path)
    except InputError as error:
        whole = "the file is empty|no usable example.*|a git-lfs pointer.*"
        assert re.fullmatch(rf"{re.escape(str(path))}:( ({whole})|\d+: .+)", str(error))
        return
    assert examples and left_out.total() >= 0
    for e in examples:
        assert e.prompt.strip() and e.response.strip()
        assert e.rejected is None or e.rejected.strip()
        assert meet(e.prompt, e.response) == (e.prompt, e.response)        # joined once for all
        assert (e.prompt + e.response).encode()


@given(st.binary(max_size=200))
@ANY
def test_any_bytes_give_examples_or_one_line(tmp_path, data):
    for name in ("x.jsonl", "x.jsonl.gz"):
        (tmp_path / name).write_bytes(data)
        outcome(tmp_path / name)
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(data))
    outcome(tmp_path / "y.jsonl.gz")
    try:
        assert any(line.strip() for line in read_lines(tmp_path / "x.jsonl"))
    except InputError:
        pass


STRINGS = st.text(max_size=9) | st.sampled_from(["user", "assistant", "system", "a", DIALOGUE,
                                                 DIALOGUE + " x", "\ud800", "\n\nAssistant:"])
TURN = st.fixed_dictionaries({}, optional={"role": STRINGS, "content": STRINGS})
CHAT = st.lists(st.sampled_from(turns("a", "b", "", "", system="s")) | TURN, max_size=4)
VALUES = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | STRINGS | CHAT,
                      lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(STRINGS, inner, max_size=3), max_leaves=6)
KEYS = ["prompt", "response", "completion", "messages", "chosen", "rejected", "text", "label",
        "instruction", "input", "conversations"]
RECORDS = st.dictionaries(st.sampled_from(KEYS), STRINGS | CHAT | VALUES, max_size=4)


@given(st.lists(RECORDS | VALUES, min_size=1, max_size=3), st.booleans(),
       st.integers(0, 400), st.sampled_from(["", "\x00", '"', "}", "\n", "[", "\\ud8", "é"]))
@ANY
def test_any_json_gives_examples_or_one_line(tmp_path, records, array, at, slip):
    """Records of every form and of none, and one slip of the pen in the file."""
    text = json.dumps(records, indent=1) if array else "\n".join(map(json.dumps, records))
    path = write(tmp_path / "x.json", text)
    outcome(path)
    outcome(write(path, text[:at] + slip + text[at + 1:]))


def test_ten_thousand_malformed_records_cost_seconds_at_most(tmp_path):
    """Also where only the last one stops the reader, in lines and in one array of 10,000 lines."""
    nested = '{"prompt": ' + "[" * 900 + "]" * 900 + "}"
    empty = json.dumps({"messages": turns("why? " * 50, "")})
    start = time.process_time()
    for malformed in ("{", nested, empty, json.dumps(GOOD)):
        many = [malformed] * 10_000
        outcome(write(tmp_path / "a.jsonl", "\n".join([*many, "{"])))
        outcome(write(tmp_path / "a.json", "[" + ",\n".join([*many, "{"])))
        outcome(write(tmp_path / "b.jsonl", " " * 1_000_000 + "[" * 1_000_000))
    assert time.process_time() - start < 10


# ---- what was understood ------------------------------------------------------------------------

def described(path, vocab_size=300, **more):
    """What --dry-run prints of a file."""
    s = SimpleNamespace(**{**dict(init=None, corpus=None, prompts=None, n_prompts=200,
                                  max_prompt=192, max_response=64), **more})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "VOCAB_SIZE", vocab_size)
        return describe(path, s)


def test_a_dry_run_says_what_was_understood(tmp_path):
    """Counts, lengths and cuts by hand: with no merge to learn a byte is a token."""
    empty = {**CHOSEN, "chosen": CHOSEN["chosen"][:-4]}
    rows = [{"prompt": "why\x1b?", "response": "é[1]"}, {"prompt": "x" * 20, "response": "y" * 8},
            CHOSEN, empty]
    said = described(write(tmp_path / "a.jsonl", *rows), 258, max_prompt=21, max_response=8)
    assert f"{tmp_path}/a.jsonl: 4 records, 3 of use" in said
    assert re.findall(r"^ +(\d+)  (\w.*)$", said, re.M) == [
        ("2", "prompt/response"), ("2", "chosen/rejected"), ("1", "left out: an empty last turn"),
        ("3", "distinct prompts"), ("1", "held out: few, below 50 means say little")]
    table = r"^ +(\w+)  median (\d+), longest (\d+), cut to (\d+): (\d)$"
    assert re.findall(table, said, re.M) == [
        ("prompt", "21", "46", "21", "1"), ("response", "6", "9", "8", "1"),
        ("rejected", "4", "4", "8", "0")]
    corpus = "\na document of --corpus should look like these two in one, prompt and answer"
    assert said.endswith("  no loss  'why\\x1b?\\n'\n     loss  'é[1]<|endoftext|>'" + corpus)
    said = described(write(tmp_path / "b.jsonl", rows[1]), 258, max_prompt=21, max_response=8)
    assert said.endswith(f"     loss  '{'y' * 8}'" + corpus)        # cut here: no EOS


def test_a_dry_run_with_a_checkpoint_and_of_bad_files(tmp_path):
    """--init brings its tokenizer. What a run would refuse is refused here too."""
    bpe_tokenizer(["because"], 261).save_pretrained(tmp_path / "pi0")
    path = write(tmp_path / "d.jsonl", GOOD)
    said = described(path, init=str(tmp_path / "pi0"))
    assert f"(261 kinds, {tmp_path}/pi0), with EOS" in said
    (tmp_path / "c.txt").write_text("one two\n\nthree")
    for bad, more in ((path, {"init": "gone"}), (tmp_path / "gone", {}), (tmp_path / "c.txt", {})):
        with pytest.raises(InputError):
            described(bad, **more)


# ---- worlds -------------------------------------------------------------------------------------

def world_of(path, *rows, seed=0, vocab_size=258, **more):
    """The world of a file with these records, with a budget of 12 tokens a prompt."""
    s = SimpleNamespace(**{**dict(
        demos=str(write(path, *rows)), corpus=None, prompts=None, gold=None, init=None,
        n_demos=4000, n_prompts=9, max_prompt=12, max_response=8), **more})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "VOCAB_SIZE", vocab_size)
        return file_world(s, seed)


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


def test_a_pair_is_cut_to_the_budget(tmp_path):
    """The question comes last, and without it nothing is asked. A cut answer has no end."""
    world = world_of(tmp_path / "d.jsonl", GOOD, {**GOOD, "prompt": "who?"})
    prompt, response = world.pair("x" * 99 + " why?\n", "y" * 99)
    assert prompt == world.tokenizer.encode("xxxxxx why?\n")
    assert response == world.tokenizer.encode("yyyyyyyy")
    assert world.pair("why?", "yes")[1] == [*world.tokenizer.encode("yes"), world.tokenizer.eos]
    assert world.text(prompt) == "xxxxxx why?\n"


def test_a_batch_has_the_demonstrator_s_density_by_its_texts(tmp_path):
    """A failure means that padding, EOS or the prompt is read as a part of the response."""
    world = world_of(tmp_path / "d.jsonl", GOOD, {**GOOD, "prompt": "who?"})
    world.demo_logp = lambda prompt, response: -len(prompt) - 10 * len(response)
    (letter,) = world.tokenizer.encode("x")
    batch = data.collate([world.pair("a\n", "bcd"), world.pair("ab\n", "c")], pad=letter)
    assert world.demo_density(batch).tolist() == [-32, -13]


@pytest.mark.parametrize("gold", [None, "pairs"])
def test_prompts_that_are_the_same_once_cut_stay_on_one_side(tmp_path, gold):
    """Prompts that differ only in what is cut off: the held-out side has them, then the gold model.
    Otherwise the evaluation asks what was trained on."""
    rows = [{**row, "prompt": f"{i // 200} " + "long " * 20 + f"is number {i % 200}"}
            for i, row in enumerate(paired_rows(600))]
    world = world_of(tmp_path / "d.jsonl", *rows, gold=gold, vocab_size=300, max_prompt=8)
    theirs = {x for x, _, _ in world.gold_pairs}
    held = {*world.test_prompts, *(pair[0] for pair in world.human_pairs)}
    learned = {*world.train_prompts, *(row[0] for row in [*world.demos, *world.preferences])}
    assert held and learned and bool(theirs) == bool(gold)
    assert all(len(world.tokenizer.encode(x)) <= 8 for x in theirs)
    assert not held & theirs and not theirs & learned and not held & learned
    assert any("left out: cut, a held-out prompt" in note for note in world.notes)
    with pytest.raises(InputError, match="every prompt to train on is also a held-out one|0 pairs"):
        world_of(tmp_path / "e.jsonl", *rows, gold=gold, max_prompt=1)


def test_held_out_prompts_are_held_out_with_all_their_answers(tmp_path):
    """Otherwise own data would be evaluated on prompts whose answers were trained on."""
    rows = [{"prompt": f"ask {i}", "response": f"say {i} {j}"} for i in range(20) for j in range(5)]
    (tmp_path / "p.txt").write_text("".join(f"ask {i}\n" for i in range(20)))
    world = world_of(tmp_path / "d.jsonl", *rows, prompts=str(tmp_path / "p.txt"))
    assert len(world.test_prompts) == len(set(world.test_prompts)) == 4 == len(world.test_demos)
    assert not set(world.test_prompts) & set(world.train_prompts)
    assert not set(world.test_prompts) & {x for x, _ in world.demos}
    assert all(re.fullmatch(r"say \d+ 0", y) for (y,) in world.test_demos)    # the first answer


@pytest.mark.parametrize("gold", [None, "pairs"])
def test_answers_of_others_change_nothing_that_is_learned(tmp_path, gold):
    """Held-out answers, or those of the gold model's half, are other ones. Corpus, tokenizer and
    all else are the same: otherwise a learner has seen after all what is not its own."""
    world = world_of(tmp_path / "d.jsonl", *paired_rows(), gold=gold, vocab_size=300)
    theirs = {x.strip() for x in ([x for x, _, _ in world.gold_pairs] or
                                  {*world.test_prompts, *(x for x, _, _ in world.human_pairs)})}
    rows = [{**row, "chosen": "zebra", "rejected": "quartz"} if row["prompt"] in theirs else row
            for row in paired_rows()]
    other = world_of(tmp_path / "e.jsonl", *rows, gold=gold, vocab_size=300)
    own = ("gold_pairs",) if gold else ("test_demos", "human_pairs")
    assert {pair[1:] for pair in getattr(other, own[-1])} == {("zebra", "quartz")}
    for field in dataclasses.fields(world):
        if field.name not in (*own, "tokenizer"):
            assert getattr(world, field.name) == getattr(other, field.name), field.name
    assert world.tokenizer.backend.to_str() == other.tokenizer.backend.to_str()


def test_preference_pairs_are_people_s_or_golden_s(tmp_path):
    """A failure means that a label is not that of the two answers. Ties have none."""
    samples = [([0], list(y.encode())) for y in ("b", "ab", "a", "a", "aaa", "")]
    world = world_of(tmp_path / "d.jsonl", *paired_rows(20))
    world.text = lambda ids: bytes(ids).decode()
    of_people = world.preference_pairs(samples, 0.0, random.Random(0))
    assert of_people == [(world.pair(x, a), world.pair(x, b)) for x, a, b in world.preferences]
    world.preferences, world.golden = [], lambda prompt, response: len(response)
    assert world.preference_pairs(samples, 0.0, random.Random(0)) == [
        (samples[1], samples[0]), (samples[4], samples[5])]
    world.golden = None
    assert world.preference_pairs(samples, 0.0, random.Random(0)) == []


def test_label_noise_swaps_its_share(tmp_path):
    """2,000 pairs of a golden reward that is the response's length: a share of 0.3 is reversed
    (standard error 1%, margin four of them), and 0 and 1 reverse none and all."""
    world = world_of(tmp_path / "d.jsonl", GOOD, {**GOOD, "prompt": "who?"})
    world.golden, world.text = (lambda prompt, response: len(response)), str
    samples = [([0], [0] * k) for _ in range(2000) for k in (1, 2)]

    def swapped(noise):
        items = world.preference_pairs(samples, noise, random.Random(0))
        assert len(items) == 2000
        return sum(len(better[1]) < len(worse[1]) for better, worse in items) / len(items)
    assert swapped(0.0) == 0 and swapped(1.0) == 1 and abs(swapped(0.3) - 0.3) < 0.041


def test_no_more_is_taken_than_was_asked_for(tmp_path):
    """Demonstrations and held-out prompts have their limits; of two prompts one is held out."""
    rows = [{"prompt": f"ask {i}", "response": f"say {i}"} for i in range(50)]
    world = world_of(tmp_path / "d.jsonl", *rows, n_demos=7, n_prompts=3)
    assert (len(world.demos), len(world.test_prompts), len(world.test_demos)) == (7, 3, 3)
    assert world.train_prompts == [x for x, _ in world.demos] and world.corpus == []
    world = world_of(tmp_path / "d.jsonl", *rows[:2])
    assert (len(world.demos), len(world.test_prompts)) == (1, 1)


def test_what_makes_no_world_is_refused(tmp_path):
    """One prompt cannot be held out, and an init needs no corpus."""
    rows = [{"prompt": "why?", "response": f"{i}"} for i in range(9)]
    with pytest.raises(InputError, match="one prompt is too few"):
        world_of(tmp_path / "d.jsonl", *rows)
    (tmp_path / "c.txt").write_text("one two")
    with pytest.raises(InputError, match="there is nothing to pretrain on --corpus"):
        world_of(tmp_path / "d.jsonl", GOOD, init="gpt2", corpus=str(tmp_path / "c.txt"))


def test_golden_functions(tmp_path):
    """A user's function that is not there, raises or returns no finite number is one line."""
    path = tmp_path / "g.py"
    path.write_text("import math\ndef helper(y):\n    return math.fabs(len(y))\n"
                    "def good(x, y):\n    return helper(y)\n"
                    "def bad(x, y):\n    return float('nan')\n"
                    "def ugly(x, y):\n    return 1 / 0\n"
                    "def text(x, y):\n    return 'much'\n")
    assert load_golden(f"{path}:good")("x\n", " abc") == 3
    assert load_golden(f"{path}:good")("x\n", "  abc\n") == 6      # indentation is the answer's own
    with pytest.raises(InputError, match=f"which function of it. Write {path}:FUNCTION"):
        load_golden(str(path))
    for name, message in (("bad", "returned nan"), ("ugly", "ZeroDivisionError"),
                          ("text", "ValueError")):
        with pytest.raises(InputError, match=message):
            load_golden(f"{path}:{name}")("x", "y")
        with pytest.raises(InputError, match=message):      # before anything is trained
            world_of(tmp_path / "d.jsonl", GOOD, {**GOOD, "prompt": "who?"}, gold=f"{path}:{name}")
    for spec in (f"{path}:none", f"{tmp_path}/gone.py:f", "nothing"):
        with pytest.raises(InputError):
            load_golden(spec)
    path.write_text("def broken(:\n")
    with pytest.raises(InputError, match="SyntaxError"):
        load_golden(f"{path}:broken")


# ---- --gold pairs: whose half it is -------------------------------------------------------------

def paired_rows(n=260, each=1):
    """n prompts with `each` pairs: whoever prefers "yes" to "no" agrees with all of them."""
    return [{"prompt": f"ask {i}", "chosen": f"yes {i} {j}", "rejected": f"no {i} {j}"}
            for i in range(n) for j in range(each)]


@pytest.mark.parametrize("seed", range(3))
def test_no_learner_has_a_prompt_or_a_text_of_the_gold_model(tmp_path, seed):
    """Else the rewards are compared with what they were trained on. Of 200 prompts, 150 have pairs,
    two each, and 40 are held out; the gold model has half of the others with pairs, all of each."""
    rows = paired_rows(150, 2) + [{"prompt": f"ask {i}", "response": f"so {i} {j}"}
                                  for i in range(140, 200) for j in range(2)]
    write(tmp_path / "p.jsonl", *({"prompt": row["prompt"]} for row in rows))
    world, plain = (world_of(tmp_path / "d.jsonl", *rows, seed=seed, gold=gold,
                             prompts=str(tmp_path / "p.jsonl")) for gold in ("pairs", None))
    theirs = {x for x, _, _ in world.gold_pairs}
    paired = {x for x, _, _ in plain.preferences}
    assert len(theirs) == len(paired) // 2 and theirs < paired
    assert len(world.gold_pairs) == 2 * len(theirs)         # with all their pairs
    learner = [*world.demos, *world.preferences, *world.human_pairs]
    assert not theirs & {*world.train_prompts, *world.test_prompts, *(row[0] for row in learner)}
    answers = {y for _, *pair in world.gold_pairs for y in pair}
    learned = {y for _, *ys in learner for y in ys} | {y for ys in world.test_demos for y in ys}
    assert not answers & learned
    read = [text for demo in world.demos for text in demo]      # by pi_0 too, without --corpus
    assert not any(x in text or y in text for text in read
                   for x, *pair in world.gold_pairs for y in pair)
    assert theirs | {x for x, _, _ in world.preferences} == paired      # and nothing else is gone
    assert (world.test_prompts, world.human_pairs) == (plain.test_prompts, plain.human_pairs)
    assert not plain.gold_pairs and len(theirs) > 50


def test_too_few_pairs_are_refused(tmp_path):
    """Demonstrations without pairs, 99 pairs for the gold model, none to measure it by; and 100
    will do. With one pair a prompt, a fifth held out and half of the rest, 248 prompts leave 99."""
    def refused(rows):
        with pytest.raises(InputError) as error:
            world_of(tmp_path / "d.jsonl", *rows, gold="pairs")
        assert "\n" not in str(error.value)
        return str(error.value)
    plain = [{"prompt": f"{i}?", "response": "so"} for i in range(300)]
    assert re.search(r"--gold pairs: \S+ leaves 0 pairs .* it takes 100", refused(plain))
    assert "leaves 99 pairs" in refused(paired_rows(248))
    enough = world_of(tmp_path / "d.jsonl", *paired_rows(250), gold="pairs")
    assert len(enough.gold_pairs) == 100
    two = [{**row, "prompt": f"ask {i % 2}"} for i, row in enumerate(paired_rows(200))]
    assert "no held-out prompt" in refused(next(        # both prompts with pairs are to train on
        rows for rows in (plain[:k] + two + plain[k:40] for k in range(40))
        if not world_of(tmp_path / "e.jsonl", *rows).human_pairs))
