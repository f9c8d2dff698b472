"""Reading people's files: every accepted form, and one clear line for whatever is amiss."""

import gzip
import json
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from model import InputError, bpe_tokenizer
from utils.data import (read_examples, read_lines, read_pairs, read_prompts, read_records,
                            read_texts, show_pair, split_dialogue)

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
    ({"text": "a tale"}, "text", "", "a tale", None),
]


@pytest.mark.parametrize("record, form, prompt, response, rejected", FORMS)
def test_every_form_gives_its_example(tmp_path, record, form, prompt, response, rejected):
    """A failure means that what a person said is learned as an answer, or an answer as a prompt."""
    (example,), forms, left_out = read_records(write(tmp_path / "a.jsonl", record))
    assert (example.prompt, example.response, example.rejected) == (prompt, response, rejected)
    assert forms == {form: 1} and not left_out


def test_lines_an_array_and_gzip_say_the_same(tmp_path):
    """Blank lines, CRLF and a byte order mark change nothing either."""
    records = [GOOD, CHOSEN, {"messages": turns("é ☼", "ja")}]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    expected = read_examples(write(tmp_path / "a.jsonl", lines))
    assert len(expected[0]) == 3
    for text in (lines.replace("\n", "\n\n \n"), lines.replace("\n", "\r\n"), "\ufeff" + lines,
                 json.dumps(records), "\ufeff\n" + json.dumps(records, indent=2) + "\n"):
        for name, data in (("b.json", text.encode()), ("b.json.gz", gzip.compress(text.encode()))):
            (tmp_path / name).write_bytes(data)
            assert read_examples(tmp_path / name) == expected


def test_dialogues_that_teach_nothing_are_left_out(tmp_path):
    """An empty last turn, or dialogues that part before it: otherwise the reward model would be
    trained on what the human said."""
    empty = {**CHOSEN, "chosen": CHOSEN["chosen"][:-4]}
    no_worse = {**CHOSEN, "rejected": CHOSEN["rejected"][:-3] + " "}
    parted = {**CHOSEN, "rejected": "\n\nHuman: other\n\nAssistant: no"}
    path = write(tmp_path / "a.jsonl", CHOSEN, empty, no_worse, parted,
                 {"messages": turns("a", " ")})
    examples, forms, left_out = read_records(path)
    assert len(examples) == 1 and forms == {"chosen/rejected": 4, "messages": 1}
    assert left_out == {"an empty last turn": 3, "the two dialogues part before the last turn": 1}
    assert read_examples(path)[1] == 4
    with pytest.raises(InputError, match="no usable example in it; 1 with an empty last turn"):
        read_examples(write(tmp_path / "b.jsonl", empty))


def test_texts_and_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert read_texts(tmp_path / "a.txt") == ["one\ntwo", "three"]
    assert read_texts(write(tmp_path / "a.json", '[{"text": "x"},\n{"text": "y"}]')) == ["x", "y"]
    assert read_prompts(tmp_path / "a.txt") == ["one\n", "two\n", "three\n"]
    assert read_prompts(write(tmp_path / "p.jsonl", {"prompt": DIALOGUE})) == [DIALOGUE]
    with pytest.raises(InputError, match="a corpus, not demonstrations"):
        read_examples(write(tmp_path / "t.jsonl", {"text": "x"}))


# ---- what is amiss ------------------------------------------------------------------------------

BAD = [
    ("not json\n", "not JSON"), ("[1]\n", "not a JSON object"), ("3\n", "not a JSON object"),
    ("null\n", "not a JSON object"), ('"x"\n', "not a JSON object"), ("{}\n", "neither prompt"),
    ('{"prompt": "x", "response": "y"} {}\n', "not JSON (Extra data)"),
    ({"prompt": "x"}, "the field 'response' is missing"),
    ({"response": "x"}, "the field 'prompt' is missing"),
    ({"prompt": "x", "response": 3}, "the field 'response' is missing or not a string"),
    ({"prompt": " ", "response": "y"}, "the field 'prompt' is empty"),
    ({"prompt": "x", "response": ""}, "the field 'response' is empty"),
    ({"chosen": "x"}, "a dialogue needs"),
    ({**CHOSEN, "rejected": 1}, "the field 'rejected'"),
    ({"prompt": "x", "chosen": "y"}, "the field 'rejected' is missing"),
    ({"prompt": turns("x"), "chosen": LAST}, "the field 'rejected' is missing"),
    ({"prompt": None, "chosen": LAST, "rejected": LAST}, "the field 'prompt' is missing"),
    ({"messages": "x"}, "the field 'messages' is missing or no list"),
    ({"messages": []}, "the field 'messages' is missing or no list"),
    ({"messages": ["x"]}, "a message in 'messages' is not a JSON object"),
    ({"messages": turns("only the user")}, "the messages need"),
    ({"messages": LAST}, "the messages need"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "the role 'tool' is none of system, user"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "the field 'role'"),
    ({"messages": [{"role": "user", "content": None}]}, "the field 'content'"),
    ({"text": "x"}, "texts and demonstrations in one file"),
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


@pytest.mark.parametrize("text, line", [("[", 1), ("[1\n", 1), ('[{"text": "x"}\n\n{}]', 3),
                                        ('[{"text": "x"}]\n,', 1), ('[{"text": "x"},\n]', 2),
                                        ('\n[{"text":\n"x"}\n,\n{"text"\n}]', 5)])
def test_a_broken_array_is_named(tmp_path, text, line):
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
            ("", None, "cannot be read")):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError) as error:
            read_examples(tmp_path / name)
        assert message in str(error.value) and "\n" not in str(error.value)


def outcome(path):
    """Examples that are text, or one line naming file and line (or the file as a whole)."""
    try:
        examples, left_out = read_examples(path)
    except InputError as error:
        whole = "the file is empty|no usable example.*|texts without a prompt .*"
        assert re.fullmatch(rf"{re.escape(str(path))}:( ({whole})|\d+: .+)", str(error))
        return
    assert examples and left_out >= 0
    for e in examples:
        assert e.prompt.strip() and e.response.strip()
        assert e.rejected is None or e.rejected.strip()
        assert e.prompt.endswith(("\n", "\n\nAssistant:")) and (e.prompt + e.response).encode()


@given(st.binary(max_size=200))
@ANY
def test_any_bytes_give_examples_or_one_line(tmp_path, data):
    for name in ("x.jsonl", "x.jsonl.gz"):
        (tmp_path / name).write_bytes(data)
        outcome(tmp_path / name)
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(data))
    outcome(tmp_path / "y.jsonl.gz")
    try:
        assert all(text.strip() for _, text in read_lines(tmp_path / "x.jsonl"))
    except InputError:
        pass


STRINGS = st.text(max_size=9) | st.sampled_from(["user", "assistant", "system", "a", DIALOGUE,
                                                 DIALOGUE + " x", "\ud800", "\n\nAssistant:"])
TURN = st.fixed_dictionaries({}, optional={"role": STRINGS, "content": STRINGS})
CHAT = st.lists(st.sampled_from(turns("a", "b", "", "", system="s")) | TURN, max_size=4)
VALUES = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | STRINGS | CHAT,
                      lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(STRINGS, inner, max_size=3), max_leaves=6)
KEYS = ["prompt", "response", "completion", "messages", "chosen", "rejected", "text"]
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


def test_a_dialogue_needs_a_prompt():
    for text in ("\n\nAssistant: hello", "hello"):
        with pytest.raises(InputError):
            split_dialogue(text, "here")


# ---- into tokens, and `train.py data` -----------------------------------------------------------

def data(path, *flags):
    train.main(["data", str(path), "--vocab-size", "300", *flags])


def test_a_long_prompt_keeps_its_end(tmp_path, capsys):
    """Also one that fills the context: the question comes last, and without it nothing is asked."""
    tokenizer = bpe_tokenizer(["some words"], 300)
    rows = [{"prompt": "x" * n + " why?", "response": "y" * 9} for n in (0, 30, 1000)]
    path = write(tmp_path / "a.jsonl", *rows)
    pairs = read_pairs(path, tokenizer, n_positions=16, max_response=10)
    assert [tokenizer.decode(prompt) for prompt, _ in pairs] == [" why?\n"] * 3
    assert [len(prompt) + len(response) for prompt, response in pairs] == [16, 16, 16]
    assert all(response[-1] == tokenizer.eos for _, response in pairs)
    assert "0 unusable left out, 2 prompts cut to their last 6 tokens" in capsys.readouterr().out
    with pytest.raises(InputError, match="leaves no prompt"):
        read_pairs(path, tokenizer, n_positions=16, max_response=16)


def test_data_says_what_was_understood(tmp_path, capsys):
    """Counts, lengths and cuts by hand: with no merge to learn a byte is a token."""
    empty = {**CHOSEN, "chosen": CHOSEN["chosen"][:-4]}
    rows = [{"prompt": "why\x1b?", "response": "é[1]"}, {"prompt": "x" * 20, "response": "y" * 8},
            CHOSEN, empty]
    data(write(tmp_path / "a.jsonl", *rows), "--vocab-size", "258", "--max-prompt", "21",
         "--max-response", "8")
    said = capsys.readouterr().out
    assert f"{tmp_path}/a.jsonl: 4 records, 3 of use" in said
    assert re.findall(r"^ +(\d+)  (\w.*)$", said, re.M) == [
        ("2", "prompt/response"), ("2", "chosen/rejected"), ("1", "left out: an empty last turn")]
    table = {line.split()[0]: line.split()[1:] for line in said.splitlines() if "99%" not in line
             and line.split()[0] in ("prompt", "response", "rejected")}
    assert table == {"prompt": ["6", "21", "46", "46", "46", "1"],
                     "response": ["5", "6", "9", "9", "9", "1"],
                     "rejected": ["4", "4", "4", "4", "4", "0"]}
    assert said.endswith("       | why\\x1b?\n       | \n  loss | é[1]\n"
                         "  loss | <|endoftext|>  (EOS)\n")


def test_the_mask_shown_is_the_mask_learned_from():
    """Prompt and unwritable tokens bear no loss, a response and its EOS do; a cut one has none."""
    tokenizer = bpe_tokenizer(["x"], 258)
    pair = tokenizer.encode("a\nb"), [*tokenizer.encode("c\n<|endoftext|>"), tokenizer.pad,
                                      tokenizer.eos]
    assert show_pair(tokenizer, pair) == [
        "       | a", "       | b", "  loss | c", "  loss | <|endoftext|>", "       | <|pad|>",
        "  loss | <|endoftext|>  (EOS)"]
    assert show_pair(tokenizer, (pair[0], pair[1][:1])) == [
        "       | a", "       | b", "  loss | c", "       | (cut here: no EOS)"]


def test_data_of_texts_and_of_a_checkpoint(tmp_path, capsys):
    """--init brings its tokenizer, and its positions bound the prompt as they do in sft."""
    (tmp_path / "c.txt").write_text("one two\n\nthree")
    data(tmp_path / "c.txt")
    said = capsys.readouterr().out
    assert "2  plain text" in said and "       | one\n  loss |  two\n  loss | <|endof" in said
    train.main(["pretrain", "--corpus", str(tmp_path / "c.txt"), "--n-positions", "32", "--n-embd",
                "16", "--n-layer", "1", "--vocab-size", "270", "--out", str(tmp_path / "pi0")])
    path = write(tmp_path / "d.jsonl", GOOD)
    data(path, "--init", str(tmp_path / "pi0"), "--max-response", "20")
    assert "last 12 tokens, answers to their first 20" in capsys.readouterr().out
    for flags in (["--max-response", "32", "--init", str(tmp_path / "pi0")], ["--max-prompt", "0"],
                  ["--vocab-size", "3"], ["--init", "gone"]):
        with pytest.raises(InputError):
            data(path, *flags)
    for argv in (["data"], ["data", "--init", "x"]):
        with pytest.raises(InputError, match="data FILE"):
            train.main(argv)


def test_one_demonstration_is_enough_to_train(tmp_path, capsys):
    (tmp_path / "c.txt").write_text("one two\n\nthree")
    size = ["--n-positions", "32", "--n-embd", "16", "--n-layer", "1", "--vocab-size", "270"]
    train.main(["pretrain", "--corpus", str(tmp_path / "c.txt"), *size, "--out",
                str(tmp_path / "pi0")])
    train.main(["sft", "--demos", str(write(tmp_path / "d.jsonl", GOOD)), "--max-response", "16",
                "--init", str(tmp_path / "pi0"), "--out", str(tmp_path / "sft")])
    assert "sft: loss" in capsys.readouterr().out
