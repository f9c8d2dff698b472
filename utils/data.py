"""People's files in, examples out: every accepted form, and one clear line for whatever is amiss.

JSON, one record a line or one array of them, plain or gzip. The form is known by a record's keys:

    prompt, response | completion   a newline is set between the two
    messages                        chat turns: [{"role": ..., "content": ...}, ...]
    [prompt,] chosen, rejected      a better and a worse answer: HH-RLHF's dialogue strings, chat
                                    turns, or what follows the prompt
    text                            a document, for pretraining

Chat turns become text as HH-RLHF's, so that one tokenizer and one convention serve all: system
turns as plain paragraphs, then "\\n\\nHuman: ...\\n\\nAssistant: ...". The last assistant turn is
the demonstration, all before it the prompt. A prompt may be a string or turns, wherever it stands.

An empty field is an error. People do leave dialogue turns empty, or compare dialogues that part
before the last turn: such records teach nothing here and are left out and counted.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import numpy as np

from model import InputError, bpe_tokenizer, collate, encode_pair
from utils.checkpoints import load_pretrained
from utils.cli import counted

TURN = "\n\nAssistant:"     # HH-RLHF's dialogue strings: the response follows the last one
ROLES = {"system": "\n\n", "user": "\n\nHuman: ", "assistant": TURN + " "}


@dataclass(frozen=True)
class Example:
    """A demonstration: what was asked, what was answered, and a worse answer where one is known."""
    prompt: str
    response: str
    rejected: str | None = None


# ---- lines and JSON -----------------------------------------------------------------------------

def read_lines(path):
    """(line number, text) of each line that is not blank; plain or gzip, UTF-8.

    Raises InputError naming file and line for what is missing, empty, damaged or not text.
    """
    path, number, found = Path(path), 0, False
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    found = True
                    yield number, text
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: not UTF-8 text ({error.reason})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{number + 1}: not gzip, or damaged ({error})") from error
    except (OSError, ValueError) as error:      # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from error
    if not found:
        raise InputError(f"{path}: the file is empty")


def unique_keys(pairs):
    """The dict of a JSON object's pairs; a key that stands there twice is a ValueError."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return record


# numbers are never read, so that a huge one may become infinite: Python's int has a limit
DECODER = json.JSONDecoder(parse_int=float, object_pairs_hook=unique_keys)


def decode(parse, where, *text):
    """parse(*text), a method of DECODER. Raises InputError starting with `where` (file:line)."""
    try:
        return parse(*text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({getattr(error, 'msg', error)})") from error


def array_items(path, text):
    """(its first line's number, value) of each element of the JSON array in text, a whole file's.

    Raises InputError.
    """
    blank, end, counted, line, mark = re.compile(r"\s*"), text.index("["), 0, 1, "["
    while text.startswith(mark, end):
        start = blank.match(text, end + 1).end()
        line, counted = line + text.count("\n", counted, start), start
        if mark == "[" and text.startswith("]", start):
            end = start
            break
        value, end = decode(DECODER.raw_decode, f"{path}:{line}", text, start)
        yield line, value
        end, mark = blank.match(text, end).end(), ","
    if text[end:].rstrip() != "]":
        line += text.count("\n", counted, end)
        raise InputError(f"{path}:{line}: not JSON (an array goes on with ',' or ends with ']')")


def read_json_lines(path):
    """(line number, dict) of each record: JSON lines, or one JSON array. Raises InputError."""
    lines = read_lines(path)
    first, text = next(lines)
    if text.lstrip().startswith("["):
        at = {first: text, **dict(lines)}
        items = array_items(path, "\n".join(at.get(i, "") for i in range(1, max(at) + 1)))
    else:
        items = ((number, decode(DECODER.decode, f"{path}:{number}", text))
                 for number, text in chain([(first, text)], lines))
    for number, record in items:
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: not a JSON object")
        yield number, record


# ---- one record ---------------------------------------------------------------------------------

def text_field(record, key, where, may_be_empty=False):
    """record[key] as a non-empty string. Raises InputError starting with `where` (file:line)."""
    value = record.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: the field {key!r} is missing or not a string")
    if not (value.strip() or may_be_empty):
        raise InputError(f"{where}: the field {key!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair in the field {key!r}") from error
    return value


def as_prompt(text):
    """A prompt's text up to where the response begins: "...Assistant:", or a line of its own."""
    text = text.rstrip()
    return text if text.endswith(TURN) else text + "\n"


def split_dialogue(text, where):
    """(prompt ending with "Assistant:", response) of an HH-RLHF dialogue string."""
    prompt, turn, response = text.rpartition(TURN)
    if not turn or not prompt.strip():
        raise InputError(f"{where}: a dialogue needs a prompt and '\\n\\nAssistant:'")
    return prompt + turn, response


def read_turns(record, key, where, role=None):
    """[(role, text)] of the chat turns record[key]; with a role, a string is one turn of it."""
    value = record.get(key)
    if role and isinstance(value, str):
        return [(role, text_field(record, key, where).strip())]
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: the field {key!r} is missing or no list of messages")
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise InputError(f"{where}: a message in {key!r} is not a JSON object")
        name = text_field(turn, "role", where)
        if name not in ROLES:
            raise InputError(f"{where}: the role {name[:20]!r} is none of {', '.join(ROLES)}")
        turns.append((name, text_field(turn, "content", where, may_be_empty=True).strip()))
    return turns


def split_turns(turns, where):
    """(prompt ending with "Assistant:", response) of chat turns up to the last assistant's one."""
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    if not last:
        raise InputError(f"{where}: the messages need a turn and then one of the assistant")
    return "".join(ROLES[role] + text for role, text in turns[:last]) + TURN, " " + turns[last][1]


def read_answer(record, key, where):
    """(prompt, response): the answer record[key] to record["prompt"], or with its prompt inside."""
    if isinstance(record.get(key), list) or isinstance(record.get("prompt"), list):
        asked = read_turns(record, "prompt", where, "user") if "prompt" in record else []
        turns = read_turns(record, key, where, "assistant")
        if turns[0][0] == "assistant" or not set(asked) <= set(turns):
            turns = asked + turns       # else they hold the prompt already
        return split_turns(turns, where)
    if "prompt" not in record and key in ("chosen", "rejected"):
        return split_dialogue(text_field(record, key, where), where)
    prompt, response = (text_field(record, k, where) for k in ("prompt", key))
    prompt = as_prompt(prompt)
    return prompt, " " * prompt.endswith(TURN) + response.strip()


def read_record(record, where):
    """(its form, Example, why it is to be left out or None) of one record. Raises InputError."""
    rejected = None
    if "chosen" in record or "rejected" in record:
        turns = " messages" * isinstance(record.get("chosen"), list)
        form = "prompt/" * ("prompt" in record) + "chosen/rejected" + turns
        prompt, response = read_answer(record, "chosen", where)
        other, rejected = read_answer(record, "rejected", where)
        if prompt != other:
            return form, None, "the two dialogues part before the last turn"
    elif "messages" in record:
        form = "messages"
        prompt, response = split_turns(read_turns(record, "messages", where), where)
    elif "text" in record and "prompt" not in record:
        form, prompt, response = "text", "", text_field(record, "text", where)
    elif {"prompt", "response", "completion"} & set(record):
        key = "completion" if "completion" in record else "response"
        form = f"prompt/{key}"
        prompt, response = read_answer(record, key, where)
    else:
        raise InputError(f"{where}: neither prompt, messages, chosen and rejected, nor text in it")
    empty = not response.strip() or (rejected is not None and not rejected.strip())
    return form, Example(prompt, response, rejected), "an empty last turn" if empty else None


# ---- whole files --------------------------------------------------------------------------------

def read_records(path):
    """(examples, Counter of forms, Counter of reasons to leave one out) of a file of JSON records.

    A text is an example with an empty prompt. Raises InputError.
    """
    examples, forms, left_out = [], Counter(), Counter()
    for number, record in read_json_lines(path):
        form, example, reason = read_record(record, f"{path}:{number}")
        forms[form] += 1
        if 0 < forms["text"] < forms.total():
            raise InputError(f"{path}:{number}: texts and demonstrations in one file")
        if reason:
            left_out[reason] += 1
        else:
            examples.append(example)
    if not examples:
        raise InputError(f"{path}: no usable example in it"
                         + "".join(f"; {n:,} with {why}" for why, n in left_out.items()))
    return examples, forms, left_out


def read_examples(path):
    """(examples, number of records left out) of a file of demonstrations. Raises InputError."""
    examples, forms, left_out = read_records(path)
    if "text" in forms:
        raise InputError(f"{path}: texts without a prompt are a corpus, not demonstrations")
    return examples, left_out.total()


def read_pairs(path, tokenizer, n_positions, max_response):
    """Token pairs of a file of examples; a prompt that does not fit keeps its end, with a note."""
    (examples, left_out), max_prompt = read_examples(path), n_positions - max_response
    if max_prompt < 1:
        raise InputError(f"--max-response {max_response} leaves no prompt in {n_positions} tokens")
    cut = sum(len(tokenizer.encode(e.prompt)) > max_prompt for e in examples)
    if left_out or cut:
        print(f"{path}: {left_out} unusable left out, {cut} prompts cut to their last "
              f"{max_prompt} tokens")
    return [encode_pair(tokenizer, e.prompt, e.response, max_prompt, max_response)
            for e in examples]


def read_texts(path):
    """Documents of a corpus: JSON with "text" (.json, .jsonl), or plain text by paragraph."""
    if ".json" in Path(path).name:
        return [text_field(record, "text", f"{path}:{n}") for n, record in read_json_lines(path)]
    paragraphs, last = [], None
    for number, text in read_lines(path):
        if last is not None and number == last + 1:
            paragraphs[-1] += "\n" + text
        else:
            paragraphs.append(text)
        last = number
    return paragraphs


def read_prompts(path):
    """Further prompts: JSON with "prompt", or plain text with one prompt a line."""
    if ".json" in Path(path).name:
        texts = [text_field(record, "prompt", f"{path}:{n}") for n, record in read_json_lines(path)]
    else:
        texts = [text for _, text in read_lines(path)]
    return [as_prompt(text) for text in texts]


# ---- what was understood ------------------------------------------------------------------------

def describe(path, s):
    """The text of `train.py data`: what a file holds, its lengths in tokens, what would be cut, and
    the first example with its loss mask.

    s: max_prompt, max_response; init, a checkpoint's folder, or vocab_size for a BPE of this file.
    Raises InputError.
    """
    if ".json" in Path(path).name:
        examples, forms, left_out = read_records(path)
    else:
        examples, left_out = [Example("", text) for text in read_texts(path)], {}
        forms = Counter({"plain text": len(examples)})
    max_prompt, max_response = s.max_prompt, s.max_response
    if s.init:
        model, tokenizer, _ = load_pretrained(s.init)
        max_prompt = min(max_prompt, model.config.n_positions - max_response)
    else:
        tokenizer = bpe_tokenizer([e.prompt + e.response for e in examples], s.vocab_size)
    if min(max_prompt, max_response) < 1:
        raise InputError(f"no room for {max_prompt} tokens of prompt, {max_response} of response")
    prompt, response = examples[0].prompt, examples[0].response
    cut = (f"prompts to their last {max_prompt} tokens, answers to their first {max_response}, "
           "which then have no EOS")
    if not prompt:
        max_response += max_prompt
        cut = f"into pieces of at most {max_response} tokens"
    return "\n".join([
        f"{path}: {counted(forms.total(), 'records')}, {len(examples):,} of use",
        *(f"{n:>9,}  {form}" for form, n in forms.items()),
        *(f"{n:>9,}  left out: {why}" for why, n in left_out.items()),
        f"lengths in tokens ({len(tokenizer):,} kinds, {s.init or 'a BPE of it'}), with EOS:",
        *length_table(tokenizer, examples, max_prompt, max_response), f"cut: {cut}",
        "the first example as the learner sees it, what bears loss marked:",
        *show_pair(tokenizer, encode_pair(tokenizer, prompt, response, max_prompt, max_response))])


def length_table(tokenizer, examples, max_prompt, max_response):
    """Lines of text: quantiles of the parts' lengths in tokens, and how many exceed the limits."""
    yield "                min   median      90%      99%      max      cut"
    for part, limit in (("prompt", max_prompt), ("response", max_response),
                        ("rejected", max_response)):
        lengths = [len(tokenizer.encode(getattr(e, part))) + (part != "prompt")
                   for e in examples if getattr(e, part)]
        if lengths:
            quantiles = np.quantile(lengths, [0, 0.5, 0.9, 0.99, 1], method="nearest")
            row = [*map(int, quantiles), sum(n > limit for n in lengths)]
            yield f"{part:>10} " + "".join(f"{n:>9,}" for n in row)


def show_pair(tokenizer, pair):
    """Lines of text of a pair; "loss |" stands before each that bears loss, by the losses' mask."""
    batch, lines = collate([pair]), []
    tokens = [(token, bears and token not in tokenizer.suppress)
              for token, bears in zip(batch.tokens[0].tolist(), batch.response_mask()[0].tolist())]
    for (loss, is_eos), group in groupby(tokens, lambda item: (item[1], item[0] == tokenizer.eos)):
        text = tokenizer.backend.decode([token for token, _ in group], skip_special_tokens=False)
        text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
        lines += [("  loss | " if loss else "       | ") + line + "  (EOS)" * is_eos
                  for line in text.split("\n")]
    if tokens[-1][0] != tokenizer.eos:
        lines.append("       | (cut here: no EOS)")
    return lines
