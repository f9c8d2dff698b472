"""tokenizer.py: what goes in comes out again, special tokens are only text, cuts are where they
belong. Against transformers' AutoTokenizer it stands in test_checkpoints.py.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings, strategies as st

from utils.cli import InputError
from utils.tokenizer import (EOS, LONG_WORD, PAD, TURN, UNK, Tokenizer, bpe_tokenizer, meet,
                             word_tokenizer)

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["the cat sat on the mat .", "a dog ran at the cat .", "señor — 日本 ☼"]
BPE = bpe_tokenizer(TEXTS, 300)
WORDS = word_tokenizer(["the", "cat", "sat", "."])


def test_word_tokenizer_round_trip_and_unknown_words():
    """A failure means that the toy tasks' words change on their way through the policy."""
    assert WORDS.encode("the cat sat .") == [3, 4, 5, 6]
    assert WORDS.decode([3, 4, 5, 6]) == "the cat sat ."
    assert WORDS.encode("the dog sat ☼") == [3, WORDS.unk, 5, WORDS.unk]
    assert len(WORDS) == 7 and WORDS.backend.id_to_token(WORDS.unk) == UNK
    assert WORDS.decode([3, WORDS.eos, WORDS.pad]) == "the"
    assert set(WORDS.suppress) == {WORDS.pad, WORDS.unk}


@pytest.mark.parametrize("tokenizer", [WORDS, BPE], ids=["words", "bpe"])
def test_pad_is_not_eos(tokenizer):
    """A failure means that stopping and padding are one token, so that masks by id seem to work."""
    assert tokenizer.pad != tokenizer.eos
    assert tokenizer.backend.id_to_token(tokenizer.eos) == EOS
    assert tokenizer.backend.id_to_token(tokenizer.pad) == PAD
    assert tokenizer.pad in tokenizer.suppress and tokenizer.eos not in tokenizer.suppress


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(st.text().filter(lambda text: EOS not in text and PAD not in text))
@example(" two  spaces\n\tand a tab ")
@example("é 日本 🦆 \x00")
def test_bpe_round_trip(text):
    """A failure means that there are texts which the policy cannot read or write."""
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert not {BPE.eos, BPE.pad} & {*ids} and BPE.unk is None
    assert all(0 <= i < len(BPE) for i in ids)


@pytest.mark.parametrize("text", [f"the {EOS} cat", f"the{PAD} cat"])
def test_a_special_token_spelled_out_is_text(text):
    """A failure means that a document which quotes the special tokens, such as a page on language
    models, ends responses in their middle, and that decoding drops what stood there."""
    assert BPE.decode(BPE.encode(text)) == text
    assert not {BPE.eos, BPE.pad} & {*BPE.encode(text)}


def test_a_tokenizer_needs_eos():
    """A failure means that a policy is made that can never stop."""
    backend = bpe_tokenizer(TEXTS, 300).backend
    plain = type(backend)(type(backend.model)())
    with pytest.raises(InputError, match="endoftext"):
        Tokenizer(plain)


def test_encode_pair():
    """A failure means that a finished response has no EOS, a cut one has, or a prompt that does
    not fit loses its end."""
    def pair(response, max_prompt=2, max_response=3):
        return WORDS.encode_pair("the cat", response, max_prompt, max_response)

    assert pair("sat .") == ([3, 4], [5, 6, WORDS.eos])
    assert pair("sat . the") == ([3, 4], [5, 6, 3])
    assert pair("sat . the cat") == ([3, 4], [5, 6, 3])
    assert pair("") == ([3, 4], [WORDS.eos])
    assert pair("sat", max_prompt=1) == ([4], [5, WORDS.eos])


MEETINGS = [        # prompt and answer in, and where they are parted
    ("why?", "because", "why?\n", "because"), ("why?\n", "because", "why?\n", "because"),
    ("why?", "\nbecause", "why?\n", "because"), ("why?", "\n\nso", "why?\n", "\nso"),
    ("the lid is", " red", "the lid is", " red"), ("A: ", "red", "A:", " red"),
    ("A: ", " red", "A: ", " red"), ("f():\n    ", "return", "f():\n    ", "return"),
    ("write f", "    return", "write f\n", "    return"), ("f", "\treturn", "f\n", "\treturn"),
    ("why?" + TURN, "so", "why?" + TURN, " so"), ("why?" + TURN, " so", "why?" + TURN, " so"),
    ("why?" + TURN + " ", "so", "why?" + TURN, " so"), ("why?" + TURN, "", "why?" + TURN, ""),
    ("", "text", "", "text"), ("why?\r\n", "so \n", "why?\r\n", "so \n")]


@pytest.mark.parametrize("prompt, answer, before, after", MEETINGS)
def test_where_prompt_and_answer_meet(prompt, answer, before, after):
    """A failure means that white space is lost or made up at the seam, or that a pair which has
    been joined once is joined in another way when it is encoded."""
    assert meet(prompt, answer) == meet(before, after) == (before, after)
    assert "".join(meet(prompt, answer)).split() == (prompt + " " + answer).split()
    ids = BPE.encode(before), [*BPE.encode(after), BPE.eos]
    assert BPE.encode_pair(prompt, answer, 99, 99) == ids


@pytest.mark.parametrize("prompt", ["why?", "why?\n", "A: ", "why?" + TURN, "why?" + TURN + " "])
def test_what_is_sampled_from_is_what_is_scored(prompt):
    """A failure means that a policy is asked in another way than it was trained to be."""
    assert BPE.encode_prompt(prompt) == BPE.encode_pair(prompt, "because", 99, 99)[0]


def test_long_words_do_not_stop_the_training_of_a_tokenizer():
    """A failure means that one line of base64 takes minutes: training took the square of a word's
    length. Eight times the letters may take sixteen times as long, not sixty-four."""
    def seconds(n):
        start = time.process_time()
        tok = bpe_tokenizer(["".join(chr(97 + i * i % 23 + i % 3) for i in range(n))], 400)
        assert tok.decode(tok.encode("ab " * n)) == "ab " * n
        return time.process_time() - start
    assert seconds(160 * LONG_WORD) < 16 * max(seconds(20 * LONG_WORD), 0.05)
    ids = [i for i, _ in BPE.backend.pre_tokenizer.pre_tokenize_str("x" * (2 * LONG_WORD + 1))]
    assert [len(word) for word in ids] == [LONG_WORD, LONG_WORD, 1]


@given(st.text(max_size=30), st.integers(1, 12))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_truncate_left_gives_an_end_that_fits(text, n):
    """A failure means that a cut prompt does not fit, is no end of the prompt, or that more of it
    than a character and a token would have fitted."""
    end = BPE.truncate_left(text, n)
    assert text.endswith(end) and len(BPE.encode(end)) <= n
    assert end == text or len(BPE.encode(text[-len(end) - 3:])) >= min(n, 3)
    assert BPE.truncate_left(end, n) == end


def test_encode_documents_covers_all_tokens():
    """A failure means that pretraining skips text, or never sees that documents end. Only a last
    piece of one token may be missing: nothing can be predicted in it."""
    for text in ["the cat sat .", "the cat sat", "the", "", "the cat . the cat . sat"]:
        whole = [*WORDS.encode(text), WORDS.eos]
        pieces = WORDS.encode_documents([text], 4)
        assert all(prompt == [] and 1 < len(ids) <= 4 for prompt, ids in pieces)
        joined = [i for _, ids in pieces for i in ids]
        assert joined == (whole[:-1] if len(whole) % 4 == 1 else whole)
    both = WORDS.encode_documents(["the cat", "sat ."], 4)
    assert [ids for _, ids in both] == [[3, 4, WORDS.eos], [5, 6, WORDS.eos]]


@pytest.mark.parametrize("tokenizer", [WORDS, BPE], ids=["words", "bpe"])
def test_a_tokenizer_comes_back_from_its_folder(tokenizer, tmp_path):
    """A failure means that what a run wrote is read with other ids. No model lies beside it."""
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    again = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert again.backend.get_vocab() == tokenizer.backend.get_vocab()
    assert (again.eos, again.pad, again.unk) == (tokenizer.eos, tokenizer.pad, tokenizer.unk)
    for text in [*TEXTS, "", f"the {EOS} cat", "zebra"]:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_a_tokenizer_needs_no_model():
    """A failure means that who only tokenizes text waits for a model's modules to load."""
    code = "import sys, utils.tokenizer; print('model' in sys.modules)"
    got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert got.stdout == "False\n", got.stderr
