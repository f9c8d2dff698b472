"""People's files in, a World out: what the learners are given, and the truth beside it.

A file of demonstrations holds JSON, one record a line or one array of records. It may be gzip. The
keys of a record tell its form:

    prompt, response | completion   a newline is set between the two
    messages                        chat turns: [{"role": ..., "content": ...}, ...]
    [prompt,] chosen, rejected      a better and a worse answer: HH-RLHF's dialogue strings, chat
                                    turns, or what follows the prompt

Chat turns become text in the way of HH-RLHF, so that one tokenizer and one convention serve all:
system turns are plain paragraphs, then "\\n\\nHuman: ...\\n\\nAssistant: ...". The last turn of the
assistant is the demonstration, and all before it is the prompt.

An empty field is an error. But people do leave dialogue turns empty, or compare two dialogues that
differ before the last turn. Such records teach nothing here: they are left out, and counted.
"""

import gzip
import json
import math
import random
import re
import runpy
import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median_low

import torch

from model import collate
from utils.cli import InputError, plural, require
from utils.tokenizer import Tokenizer, bpe_tokenizer

VOCAB_SIZE = 2048       # kinds of tokens of the byte-level BPE that is trained on one's own texts
MIN_GOLD_PAIRS = 100    # A gold model trained on fewer pairs would hardly agree with people.
TURN = "\n\nAssistant:"     # In HH-RLHF's dialogue strings the response follows the last one.
ROLES = {"system": "\n\n", "user": "\n\nHuman: ", "assistant": TURN + " "}
BLANK = re.compile(r"\s*")
# A record ends with its line, or in an array with a comma or with the array's own end.
AFTER_LINE, AFTER_ITEM = re.compile(r"\s*(\n|\Z)"), re.compile(r"\s*(,(?=\s*\S)|\]\s*\Z)")
JSON_NAME = re.compile(r"\.(nd)?json")      # Of .json, .jsonl and .ndjson, gzip or not.
SURROGATE = re.compile("[\ud800-\udfff]")       # Half of a character: it cannot be written.


@dataclass(frozen=True)
class Example:
    """A demonstration: what was asked, what was answered, and a worse answer where one is known."""
    prompt: str
    response: str
    rejected: str | None = None


# ---- lines and JSON -----------------------------------------------------------------------------

def read_lines(path):
    """The lines of a text file; UTF-8, plain or gzip.

    Raises InputError naming file and line for what is missing, empty, damaged or not text.
    """
    path, lines = Path(path), []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for raw in file:
                # Some editors put a byte order mark before the first line: it is no text.
                lines.append(raw.decode("utf-8" if lines else "utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{len(lines) + 1}: not UTF-8 text ({error.reason})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{len(lines) + 1}: not gzip, or damaged ({error})") from error
    except (OSError, ValueError) as error:      # A path with a null character is a ValueError.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from error
    require(any(map(str.strip, lines)), f"{path}: the file is empty")
    return lines


def unique_keys(pairs):
    """The dict of a JSON object's pairs; a key that stands there twice is an InputError."""
    record = dict(pairs)
    require(len(record) == len(pairs), "a key stands twice in one object")
    return record


# No number is used here, so a huge one may become infinite: Python limits the digits of an int.
DECODER = json.JSONDecoder(parse_int=float, object_pairs_hook=unique_keys)


def read_json(path, read):
    """[read(record)] of the records, dicts, of a file of JSON lines or of one JSON array.

    Raises InputError starting with file and line, also for what `read` refuses.
    """
    text, results = "\n".join(read_lines(path)), []
    is_array = text.lstrip().startswith("[")
    position = text.index("[") + 1 if is_array else 0
    if is_array and text[position:].strip() == "]":
        return []
    # json.loads would give an array's records at once: no error could name the line of a record.
    while True:
        start = BLANK.match(text, position).end()
        try:
            record, end = DECODER.raw_decode(text, start)
            after = (AFTER_ITEM if is_array else AFTER_LINE).match(text, end)
            fits_line = "\n" not in text[start:end]
            if not after:           # The comma may be missing some lines further down.
                start = BLANK.match(text, end).end()
            require(after and (is_array or fits_line),
                    "not JSON (a record ends with its line, or in an array with ',' or ']')")
            require(isinstance(record, dict), "not a JSON object")
            results.append(read(record))
        except (ValueError, RecursionError) as error:
            reason = f"not JSON ({getattr(error, 'msg', error)})"
            if isinstance(error, InputError):
                reason = error
            line = text.count("\n", 0, start) + 1
            raise InputError(f"{path}:{line}: {reason}") from error
        position = after.end()
        if position == len(text):
            return results


# ---- one record ---------------------------------------------------------------------------------
# These functions raise InputError; read_json puts file and line before its message.

def text_field(record, key, may_be_empty=False):
    """record[key], a string that is not empty."""
    value = record.get(key)
    require(isinstance(value, str), f"the field {key!r} is missing or not a string")
    require(value.strip() or may_be_empty, f"the field {key!r} is empty")
    require(not SURROGATE.search(value), f"half a surrogate pair in the field {key!r}")
    return value


def as_prompt(text):
    """A prompt's text up to where the response begins: "...Assistant:", or a line of its own."""
    text = text.rstrip()
    return text if text.endswith(TURN) else text + "\n"


def read_turns(record, key, role=None):
    """[(role, text)] of the chat turns record[key]; with a role, a string is one turn of it."""
    value = record.get(key)
    if role and isinstance(value, str):
        return [(role, text_field(record, key).strip())]
    require(value and isinstance(value, list), f"the field {key!r} is missing or no list of "
                                               "messages")
    turns = []
    for turn in value:
        require(isinstance(turn, dict), f"a message in {key!r} is not a JSON object")
        name = text_field(turn, "role")
        require(name in ROLES, f"the role {name[:20]!r} is none of {', '.join(ROLES)}")
        turns.append((name, text_field(turn, "content", may_be_empty=True).strip()))
    return turns


def split_turns(turns):
    """(prompt ending with "Assistant:", response) of chat turns up to the last assistant's one."""
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    require(last, "the messages need a turn and then one of the assistant")
    return "".join(ROLES[role] + text for role, text in turns[:last]) + TURN, " " + turns[last][1]


def read_answer(record, key):
    """(prompt, response): the answer record[key] to record["prompt"], or with its prompt inside."""
    if isinstance(record.get(key), list) or isinstance(record.get("prompt"), list):
        asked = read_turns(record, "prompt", "user") if "prompt" in record else []
        turns = read_turns(record, key, "assistant")
        # The turns may hold the prompt already. It must not be asked twice.
        if turns[0][0] == "assistant" or not set(asked) <= set(turns):
            turns = asked + turns
        return split_turns(turns)
    if "prompt" not in record and key in ("chosen", "rejected"):
        prompt, turn, response = text_field(record, key).rpartition(TURN)
        require(prompt.strip(), "a dialogue needs a prompt and '\\n\\nAssistant:'")
        return prompt + turn, response
    prompt = as_prompt(text_field(record, "prompt"))
    response = text_field(record, key).strip()
    return prompt, " " + response if prompt.endswith(TURN) else response


def read_record(record):
    """(its form, Example, why it is to be left out or None) of one record."""
    rejected = None
    if "chosen" in record or "rejected" in record:
        form = "prompt/chosen/rejected" if "prompt" in record else "chosen/rejected"
        if isinstance(record.get("chosen"), list):
            form += " messages"
        prompt, response = read_answer(record, "chosen")
        other_prompt, rejected = read_answer(record, "rejected")
        if prompt != other_prompt:
            return form, None, "the two dialogues part before the last turn"
    elif "messages" in record:
        form = "messages"
        prompt, response = split_turns(read_turns(record, "messages"))
    elif "text" in record and "prompt" not in record:
        raise InputError("a text without a prompt is for --corpus, no demonstration")
    elif {"prompt", "response", "completion"} & set(record):
        key = "completion" if "completion" in record else "response"
        form = f"prompt/{key}"
        prompt, response = read_answer(record, key)
    else:
        raise InputError("neither prompt, messages, nor chosen and rejected in it")
    empty = not response.strip() or (rejected is not None and not rejected.strip())
    return form, Example(prompt, response, rejected), "an empty last turn" if empty else None


# ---- whole files --------------------------------------------------------------------------------

def read_examples(path):
    """(examples, Counter of their forms, Counter of reasons to leave one out) of a file of
    demonstrations. Raises InputError."""
    examples, forms, left_out = [], Counter(), Counter()
    for form, example, reason in read_json(path, read_record):
        forms[form] += 1
        if reason:
            left_out[reason] += 1
        else:
            examples.append(example)
    require(examples, f"{path}: no usable example in it"
            + "".join(f"; {n:,} with {why}" for why, n in left_out.items()))
    return examples, forms, left_out


def read_texts(path):
    """Documents of a corpus: JSON with "text", or plain text by paragraph. Raises InputError."""
    if JSON_NAME.search(Path(path).name):
        return read_json(path, lambda record: text_field(record, "text"))
    groups = groupby(read_lines(path), key=lambda line: bool(line.strip()))
    return ["\n".join(lines) for is_paragraph, lines in groups if is_paragraph]


def read_prompts(path):
    """Further prompts: JSON with "prompt", or plain text by line. Raises InputError."""
    if JSON_NAME.search(Path(path).name):
        return read_json(path, lambda record: as_prompt(text_field(record, "prompt")))
    return [as_prompt(line) for line in read_lines(path) if line.strip()]


# ---- the world that a run takes place in --------------------------------------------------------

@dataclass
class World:
    """What the learner is given, and the truth that only the evaluation reads."""
    tokenizer: Tokenizer
    max_prompt: int             # tokens
    max_response: int           # tokens, EOS included
    corpus: list                # texts of the base language
    demos: list                 # training demonstrations: (prompt, response) texts
    train_prompts: list         # prompts to sample from while learning
    test_prompts: list          # held-out prompts
    test_demos: list            # per held-out prompt, the demonstrator's responses to it
    golden: object = None       # (prompt, response) -> points, or None where nobody knows
    golden_note: str = ""       # what golden is, where it is a gold model trained on people's pairs
    demo_logp: object = None    # (prompt, response) -> log d_beta(y|x), marks aside, or None
    unmark: object = None       # response -> response without the demonstrator's marks
    parse: object = None        # (prompt, response) -> clauses (kind, ...) that golden adds up
    values: object = None       # prompt -> {kind of clause: points}; both None where nobody knows
    preferences: list = field(default_factory=list)     # (prompt, chosen, rejected), for training
    human_pairs: list = field(default_factory=list)     # the same, held out
    gold_pairs: list = field(default_factory=list)      # the same, for the gold model alone
    notes: list = field(default_factory=list)           # what was left out and why

    def pair(self, prompt, response):
        """(prompt ids, response ids + EOS), cut to max_prompt and max_response tokens."""
        return self.tokenizer.encode_pair(prompt, response, self.max_prompt, self.max_response)

    def text(self, ids):
        """The text of token ids, without EOS."""
        return self.tokenizer.decode(ids)

    def demo_density(self, batch):
        """log d_beta(y|x) of a Batch's rows by their text, (B,) in nats per sequence."""
        rows = zip(batch.tokens.tolist(), batch.prompt_lengths.tolist(), batch.lengths.tolist())
        return torch.tensor([self.demo_logp(self.text(row[:m]), self.text(row[m:n]))
                             for row, m, n in rows], device=batch.tokens.device)

    def preference_pairs(self, prompts, samples, label_noise, rng):
        """[(preferred, other)]: the pairs that people compared, if there are any, or else of two
        samples to one prompt the one with more golden reward first. A share label_noise is swapped.

        samples: (prompt ids, response ids); samples 2 i and 2 i + 1 answer the text prompts[i].
        """
        items = [(self.pair(x, chosen), self.pair(x, rejected))
                 for x, chosen, rejected in self.preferences]
        if self.golden and not items:
            for prompt, a, b in zip(prompts, samples[0::2], samples[1::2]):
                golden_a, golden_b = (self.golden(prompt, self.text(y)) for _, y in (a, b))
                if golden_a != golden_b:        # Equally good samples teach no preference.
                    items.append((a, b) if golden_a > golden_b else (b, a))
        return [item[::-1] if rng.random() < label_noise else item for item in items]


def split_by_prompt(examples, s, rng):
    """(held out, for the gold model, to learn from): a prompt goes to one of the three with all
    its answers. Raises InputError where there is only one prompt."""
    by_prompt = {}
    for example in examples:
        by_prompt.setdefault(example.prompt, []).append(example)
    require(len(by_prompt) > 1, f"{s.demos}: one prompt is too few to hold one out")
    prompts = rng.sample(list(by_prompt), len(by_prompt))
    n_held_out = max(1, len(prompts) // 5)
    held_out, rest = prompts[:n_held_out], prompts[n_held_out:]
    paired = [x for x in rest if any(e.rejected for e in by_prompt[x])]
    gold = dict.fromkeys(paired[:len(paired) // 2] if s.gold == "pairs" else [])
    training = [x for x in rest if x not in gold]
    held_out, gold, training = ([e for x in part for e in by_prompt[x]]
                                for part in (held_out, gold, training))
    return held_out, gold, training[:s.n_demos]


def file_world(s, seed):
    """One's own data: demonstrations from a file, split by seed into training and held out.

    --gold pairs: half of the training prompts that have pairs are the gold model's, and no
    learner sees them. Raises InputError for files and settings that make no world.
    """
    require(not (s.init and s.corpus), "--init is pi_0: there is nothing to pretrain on --corpus")
    examples, _, left_out = read_examples(s.demos)
    corpus = read_texts(s.corpus) if s.corpus else None
    more_prompts = read_prompts(s.prompts) if s.prompts else []
    golden = load_golden(s.gold) if s.gold not in (None, "pairs") else None
    held_out, gold, training = split_by_prompt(examples, s, random.Random(seed))
    # The rejected answers stay out of it: they would tell pi_0 what people dislike.
    texts = corpus or [e.prompt + e.response for e in training]
    tokenizer = Tokenizer.from_pretrained(s.init) if s.init else bpe_tokenizer(texts, VOCAB_SIZE)

    # Prompts that differ may be the same once they are cut. Such a prompt stays with the part that
    # comes first: otherwise the evaluation would ask what was trained on.
    prompts = {e.prompt for e in training + held_out + gold} | {*more_prompts}
    cut = {x: tokenizer.truncate_left(x, s.max_prompt) for x in prompts}
    answers = {cut[e.prompt]: e.response for e in reversed(held_out)}   # the first of each prompt
    gold = [e for e in gold if cut[e.prompt] not in answers]
    taken = {*answers, *(cut[e.prompt] for e in gold)}
    demos = [e for e in training if cut[e.prompt] not in taken]
    more_prompts = [cut[x] for x in more_prompts if cut[x] not in taken]
    test_prompts = list(answers)[:s.n_prompts]
    preferences, human_pairs, gold_pairs = (
        [(cut[e.prompt], e.response, e.rejected) for e in part if e.rejected]
        for part in (demos, held_out, gold))
    world = World(
        tokenizer=tokenizer, max_prompt=s.max_prompt, max_response=s.max_response,
        corpus=corpus or [e.prompt + e.response for e in demos],
        demos=[(cut[e.prompt], e.response) for e in demos],
        train_prompts=[cut[e.prompt] for e in demos] + more_prompts,
        test_prompts=test_prompts, test_demos=[[answers[x]] for x in test_prompts],
        golden=golden, preferences=preferences, human_pairs=human_pairs, gold_pairs=gold_pairs)
    check_world(world, s)
    world.notes = make_notes(world, s, left_out.total(), sum(cut[x] != x for x in cut),
                             len(training) - len(demos))
    return world


def check_world(world, s):
    """Raises InputError for a world that a run would come to nothing in."""
    if s.gold == "pairs":
        require(len(world.gold_pairs) >= MIN_GOLD_PAIRS,
                f"--gold pairs: {s.demos} leaves {len(world.gold_pairs)} pairs of chosen and "
                f"rejected answers for the gold model; it takes {MIN_GOLD_PAIRS}")
        require(world.human_pairs, f"--gold pairs: no held-out prompt of {s.demos} has a pair, to "
                                   "measure the gold model by")
    require(world.demos, f"{s.demos}: cut to {s.max_prompt} tokens, every prompt to train on is "
                         "also a held-out one; raise --max-prompt")
    if world.golden:
        for x, y in world.demos:        # The user's function may fail for some of them.
            world.golden(x, y)


def make_notes(world, s, n_left_out, n_cut, n_dropped):
    """What users should know of the world made of their files: a line each, where it applies."""
    n_long = sum(len(world.tokenizer.encode(y)) >= s.max_response for _, y in world.demos)
    notes = [
        (n_left_out, "records", "left out: an empty turn, or two answers to different prompts"),
        (n_cut, "prompts", f"longer than {s.max_prompt} tokens cut to the end"),
        (n_long, "demonstrations", f"cut to {s.max_response} tokens, without an end"),
        (n_dropped, "demonstrations", "left out: cut, a held-out prompt")]
    return [f"{plural(n, things)} {what}" for n, things, what in notes if n]


def load_golden(spec):
    """The user's golden reward "FILE.py:FUNCTION", checked at every call. Raises InputError."""
    file, _, name = spec.rpartition(":")
    require(Path(file).is_file(), f"--gold {spec}: no such file; write FILE.py:FUNCTION, or pairs")
    try:
        function = runpy.run_path(file).get(name)
    except Exception as error:      # Whatever the user's file raises is the user's to read.
        raise InputError(f"--gold {spec}: {type(error).__name__}: {error}") from error
    require(callable(function), f"--gold {spec}: {file} has no function {name!r}")

    def golden(prompt, response):
        try:
            value = float(function(prompt.strip(), response.strip()))
        except Exception as error:
            raise InputError(f"--gold {spec} raised {type(error).__name__}: {error}") from error
        require(math.isfinite(value),
                f"--gold {spec} returned {value} for the prompt {prompt.strip()!r}")
        return value
    return golden


# ---- what was understood ------------------------------------------------------------------------

def describe(path, s):
    """What `python afd.py --demos FILE --dry-run` prints: what the file holds, its lengths in
    tokens, what would be cut, and where the first example bears loss. Raises InputError."""
    examples, forms, left_out = read_examples(path)
    texts = [e.prompt + e.response for e in examples]
    tokenizer = Tokenizer.from_pretrained(s.init) if s.init else bpe_tokenizer(texts, VOCAB_SIZE)
    lines = [f"{path}: {plural(forms.total(), 'records')}, {len(examples):,} of use",
             *(f"{n:>9,}  {form}" for form, n in forms.items()),
             *(f"{n:>9,}  left out: {why}" for why, n in left_out.items()),
             f"in tokens ({len(tokenizer):,} kinds, {s.init or 'a BPE of it'}), with EOS:"]
    limits = {"prompt": s.max_prompt, "response": s.max_response, "rejected": s.max_response}
    for part, limit in limits.items():
        eos = 0 if part == "prompt" else 1
        texts = [getattr(e, part) for e in examples]
        lengths = [len(tokenizer.encode(text)) + eos for text in texts if text]
        if lengths:
            lines.append(f"{part:>9}  median {median_low(lengths):,}, longest {max(lengths):,}, "
                         f"cut to {limit:,}: {sum(n > limit for n in lengths):,}")
    # The first example is shown as the learner sees it: cut, and by the losses' own mask.
    batch = collate([tokenizer.encode_pair(examples[0].prompt, examples[0].response,
                                           s.max_prompt, s.max_response)])
    for name, mask in (("no loss", ~batch.response_mask()), ("loss", batch.response_mask())):
        text = tokenizer.backend.decode(batch.tokens[mask].tolist(), skip_special_tokens=False)
        lines.append(f"{name:>9}  {text!r}")
    return "\n".join(lines)
