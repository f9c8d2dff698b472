"""People's files in, a World out: what the learners are given, and the truth beside it.

A file of demonstrations holds JSON, one record a line or one array of records. It may be gzip. The
keys of a record tell its form; those that TRL, ShareGPT, Alpaca and HH-RLHF use are known:

    prompt, response | completion       also instruction [+ input], output; question, answer
    messages | conversations            chat turns: [{"role": ..., "content": ...}, ...] or
                                        [{"from": ..., "value": ...}, ...]
    [prompt,] chosen, rejected          a better and a worse answer: HH-RLHF's dialogue strings,
                                        chat turns, what follows the prompt, or texts that have
                                        their beginning in common, which is then the prompt

Chat turns become text in the way of HH-RLHF, so that one tokenizer and one convention serve all:
system turns are plain paragraphs, then "\\n\\nHuman: ...\\n\\nAssistant: ...". The last turn of the
assistant is the demonstration, all before it is the prompt, and what a human says after it is left
out. Where prompt and answer meet says utils.tokenizer.meet, for all forms alike.

A record without a field, or with a field of another kind, is an error. A record that holds no
answer of the assistant to learn from is left out, and counted: see Unusable.
"""

import gzip
import json
import math
import os
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
from utils.cli import InputError, plural, refuse_pointer, require
from utils.tokenizer import EOS, LONG_WORD, TURN, Tokenizer, bpe_tokenizer, meet

VOCAB_SIZE = 2048       # kinds of tokens of the byte-level BPE that is trained on one's own texts
MIN_GOLD_PAIRS = 100    # A gold model trained on fewer pairs would hardly agree with people.
FEW_PROMPTS = 50        # Held-out prompts below which means say little.
HUMAN = "\n\nHuman:"    # In HH-RLHF's dialogue strings: between two of them and TURN the turns.
OPENING = {"system": "\n\n", "user": HUMAN + " ", "assistant": TURN + " "}
ROLES = {**{role: role for role in OPENING}, "developer": "system", "human": "user",
         "gpt": "assistant", "model": "assistant"}
ASKED, ANSWERED = ("prompt", "instruction", "question"), ("completion", "response", "output",
                                                         "answer")
CHATS, LABELS = ("messages", "conversations"), ("label", "kto_tag")
# Ends of a text in other people's tokenizers: in an answer they are only text.
ENDS = re.compile(r"</s>|<\|(endoftext|im_end|eot_id|end)\|>|<end_of_turn>")
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
    refuse_pointer(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for raw in file:
                # Some editors put a byte order mark before the first line; files that are joined
                # then have it before others. It is no text.
                lines.append(raw.decode("utf-8").lstrip("\ufeff").rstrip("\r\n"))
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

class Unusable(Exception):
    """The record has no answer that is certain to be the assistant's and good: it is left out."""


def text_field(record, key, may_be_empty=False):
    """record[key], a string that is not empty."""
    value = record.get(key)
    require(isinstance(value, str), f"the field {key!r} is missing or not a string")
    require(value.strip() or may_be_empty, f"the field {key!r} is empty")
    require(not SURROGATE.search(value), f"half a surrogate pair in the field {key!r}")
    return value


def first_key(record, keys):
    """The first of the keys that the record has, or None."""
    return next((key for key in keys if key in record), None)


def form_of(record):
    """The name of a record's form: its keys. Raises InputError for a record of no form."""
    asked, chat = first_key(record, ASKED), first_key(record, CHATS)
    if "chosen" in record or "rejected" in record:
        form = "/".join(([asked] if asked else []) + ["chosen", "rejected"])
        return form + " messages" if isinstance(record.get("chosen"), list) else form
    if chat:
        return chat
    require(asked or "text" not in record,
            "a text without a prompt is for --corpus, no demonstration")
    answered = first_key(record, ANSWERED)
    require(asked or answered, "neither prompt, messages, nor chosen and rejected in it")
    return f"{asked or 'prompt'}/{answered or 'response'}"


def read_turns(record, key, role=None):
    """[(role, text)] of the chat turns record[key]; with a role, a string is one turn of it."""
    value = record.get(key)
    if role and isinstance(value, str):
        return [(role, text_field(record, key))]
    value = [value] if isinstance(value, dict) else value
    require(value and isinstance(value, list), f"the field {key!r} is missing or no list of "
                                               "messages")
    require(all(isinstance(turn, dict) for turn in value),
            f"a message in {key!r} is not a JSON object")
    turns = []
    for turn in value:
        name = text_field(turn, "from" if "from" in turn else "role")
        if turn.get("tool_calls") or turn.get("function_call") or name.lower() not in ROLES:
            raise Unusable("a tool's turn, or one of an unknown role")
        content = "value" if "value" in turn else "content"
        if isinstance(turn.get(content), list):         # content in parts
            if not all(isinstance(part, dict) and "text" in part for part in turn[content]):
                raise Unusable("a turn that is no text")
            turn = {content: "".join(text_field(part, "text", True) for part in turn[content])}
        turns.append((ROLES[name.lower()], text_field(turn, content, may_be_empty=True)))
    return turns


def split_turns(turns):
    """(prompt ending with "Assistant:", response) of chat turns up to the last assistant's one."""
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    if not last:
        raise Unusable("no turn of the assistant after another's")
    return meet("".join(OPENING[role] + text for role, text in turns[:last]) + TURN,
                turns[last][1])


def split_dialogue(text):
    """The same of a dialogue string in HH-RLHF's way. What the human says last is no answer."""
    prompt, turn, response = text.rpartition(TURN)
    require(prompt.strip(), "a dialogue needs a prompt and '\\n\\nAssistant:'")
    return prompt + turn, response.partition(HUMAN)[0]


def read_answer(record, key, certain=False):
    """(prompt, response): the answer record[key] to record["prompt"], or with its prompt inside.

    certain: an answer that begins with the prompt's text repeats it. Otherwise three words of the
    prompt are taken for a repetition, and fewer for no answer that can be read with certainty.
    """
    if isinstance(record.get(key), (list, dict)) or isinstance(record.get("prompt"), list):
        asked = read_turns(record, "prompt", "user") if "prompt" in record else []
        turns = read_turns(record, key, "assistant")
        # The turns may hold the prompt already. It must not be asked twice.
        theirs = {(role, text.strip()) for role, text in turns}
        if turns[0][0] == "assistant" or not {(r, text.strip()) for r, text in asked} <= theirs:
            turns = asked + turns
        return split_turns(turns)
    if "prompt" not in record and key in ("chosen", "rejected"):
        return split_dialogue(text_field(record, key))
    prompt, answer = text_field(record, "prompt"), text_field(record, key)
    asked, said = prompt.strip(), answer.lstrip()
    if said.startswith("Human:") and TURN in said:      # the whole dialogue
        question = asked.removeprefix("Human:").removesuffix("Assistant:").strip()
        if question not in said:
            raise Unusable("a dialogue about another prompt")
        return split_dialogue(answer)
    rest = said.removeprefix(asked)
    if rest != said and not (asked[-1].isalnum() and rest[:1].isalnum()):
        if not (certain or len(asked.split()) > 2):
            raise Unusable("an answer that may repeat its prompt")
        answer = rest
    if HUMAN in answer and TURN not in prompt:
        raise Unusable("a human's turn in the answer")
    return meet(prompt, answer.partition(HUMAN)[0])


def read_pair(record):
    """(prompt, chosen, rejected) of a record that has both answers."""
    texts = [record.get(key) for key in ("chosen", "rejected")]
    strings = all(isinstance(text, str) for text in texts)
    if strings and "prompt" not in record and not all(TURN in text for text in texts):
        chosen, rejected = (text_field(record, key) for key in ("chosen", "rejected"))
        common = os.path.commonprefix(texts)
        end = max(common.rfind(" "), common.rfind("\n") + 1)        # where a word begins
        if chosen == rejected or not common[:end].strip():
            raise Unusable("chosen and rejected do not part after a prompt")
        return common[:end], chosen[end:], rejected[end:]
    repeated = strings and all(text.lstrip().startswith(str(record.get("prompt")).strip())
                               for text in texts)
    (prompt, chosen), (other, rejected) = (read_answer(record, key, repeated)
                                           for key in ("chosen", "rejected"))
    if prompt.strip() != other.strip():
        raise Unusable("the two dialogues part before the last turn")
    return max(prompt, other, key=len), chosen, rejected        # the seam that fits both


def read_record(record):
    """The Example of a record. Raises Unusable, saying why the record is left out."""
    if any(str(record.get(key)).lower() in ("false", "0", "0.0", "-1.0") for key in LABELS):
        raise Unusable("an answer labelled false")
    asked, chat, rejected = first_key(record, ASKED), first_key(record, CHATS), None
    if asked not in ("prompt", None):
        more = record.get("input") or record.get("context")
        text = text_field(record, asked)
        record = {**record, "prompt": f"{text}\n{more}" if isinstance(more, str) else text}
        if record.get("history"):
            raise Unusable("turns before its instruction")
    if "chosen" in record or "rejected" in record:
        if not asked and chat and isinstance(record.get("chosen"), (str, dict)):
            record = {**record, "prompt": record[chat]}
        prompt, response, rejected = read_pair(record)
        rejected = None if rejected == response else rejected
    elif chat:
        prompt, response = split_turns(read_turns(record, chat))
    else:
        prompt, response = read_answer(record, first_key(record, ANSWERED) or "response")
    if not response.strip() or (rejected is not None and not rejected.strip()):
        raise Unusable("an empty last turn")
    return Example(prompt, response, rejected)


# ---- whole files --------------------------------------------------------------------------------

def read_examples(path):
    """(examples, Counter of their forms, Counter of reasons to leave one out) of a file of
    demonstrations. Raises InputError."""
    forms, left_out = Counter(), Counter()

    def read(record):
        form, example = form_of(record), None
        try:
            example = read_record(record)
            if "chosen" in form and not example.rejected:
                form += ", two equal answers: no pair"
        except Unusable as error:
            left_out[str(error)] += 1
        forms[form] += 1
        return example
    examples = [example for example in read_json(path, read) if example]
    require(examples, f"{path}: no usable example in it"
            + "".join(f"; {n:,} with {why}" for why, n in left_out.items()))
    return examples, forms, left_out


def read_texts(path):
    """Documents of a corpus: JSON with "text", or plain text by paragraph. Raises InputError."""
    if JSON_NAME.search(Path(path).name):
        return read_json(path, lambda record: text_field(record, "text"))
    groups = groupby(read_lines(path), key=lambda line: bool(line.strip()))
    return ["\n".join(lines) for is_paragraph, lines in groups if is_paragraph]


def read_prompts(path, continued=False):
    """Further prompts: JSON in any form of demonstrations, with or without their answers, or plain
    text by line. continued: answers go on in the prompt's line. Raises InputError."""
    def stand_in(prompt):       # for the answer that is to be written: it tells where they meet
        return " x" if continued and not str(prompt).endswith(" ") else "x"

    def read(record):
        record = {key: value for key, value in record.items() if key not in LABELS}
        chat = first_key(record, CHATS)
        try:
            if form_of(record) == chat:
                turns = read_turns(record, chat)
                turns += [("assistant", "x")] if turns[-1][0] != "assistant" else []
                return split_turns(turns)[0]
            if not {"chosen", "rejected", *ANSWERED} & set(record):
                record["response"] = stand_in(record[first_key(record, ASKED)])
            return read_record(record).prompt
        except Unusable:
            return None
    if JSON_NAME.search(Path(path).name):
        prompts = read_json(path, read)
    else:
        prompts = [meet(line, stand_in(line))[0] for line in read_lines(path) if line.strip()]
    require(any(prompts), f"{path}: no usable prompt in it")
    return [prompt for prompt in prompts if prompt]


# ---- the world that a run takes place in --------------------------------------------------------

@dataclass
class World:
    """What the learner is given, and the truth that only the evaluation reads."""
    tokenizer: Tokenizer
    max_prompt: int             # tokens
    max_response: int           # tokens, EOS included
    corpus: list                # texts of the base language; none: pi_0 reads the demonstrations
    demos: list                 # training demonstrations: (prompt, response) texts
    train_prompts: list         # prompts to sample from while learning
    test_prompts: list          # held-out prompts
    test_demos: list            # per held-out prompt, the demonstrator's responses to it
    golden: object = None       # (prompt, response) -> points, or None where nobody knows
    golden_ids: object = None   # (prompt ids, response ids) -> points, where golden is a model
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

    def points(self, prompt, response):
        """Golden reward of a sample, both as ids. A model of it gets the very ids: text that is
        encoded again may become other ones."""
        if self.golden_ids:
            return self.golden_ids(prompt, response)
        return self.golden(self.text(prompt), self.text(response))

    def demo_density(self, batch):
        """log d_beta(y|x) of a Batch's rows by their text, (B,) in nats per sequence."""
        rows = zip(batch.tokens.tolist(), batch.prompt_lengths.tolist(), batch.lengths.tolist())
        return torch.tensor([self.demo_logp(self.text(row[:m]), self.text(row[m:n]))
                             for row, m, n in rows], device=batch.tokens.device)

    def preference_pairs(self, samples, label_noise, rng):
        """[(preferred, other)]: the pairs that people compared, if there are any, or else of two
        samples to one prompt the one with more golden reward first. A share label_noise is swapped.

        samples: (prompt ids, response ids); samples 2 i and 2 i + 1 answer the same prompt.
        """
        items = [(self.pair(x, chosen), self.pair(x, rejected))
                 for x, chosen, rejected in self.preferences]
        if self.golden and not items:
            for a, b in zip(samples[0::2], samples[1::2]):
                golden_a, golden_b = (self.points(*sample) for sample in (a, b))
                if golden_a != golden_b:        # Equally good samples teach no preference.
                    items.append((a, b) if golden_a > golden_b else (b, a))
        return [item[::-1] if rng.random() < label_noise else item for item in items]


def split_by_prompt(examples, s, rng):
    """(held out, for the gold model, to learn from): a prompt goes to one of the three with all
    its answers. Raises InputError where there is only one prompt."""
    by_prompt = {}
    for example in examples:        # However its prompt ends, it asks the same.
        by_prompt.setdefault(example.prompt.strip(), []).append(example)
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
    # Whether answers go on in the prompt's line: a prompt alone does not tell.
    continued = sum(e.response[:1] == " " and not e.prompt.endswith(TURN)
                    for e in examples) > len(examples) / 2
    more_prompts = read_prompts(s.prompts, continued) if s.prompts else []
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
    taken = {x.strip() for x in answers}
    gold = [e for e in gold if cut[e.prompt].strip() not in taken]
    taken |= {cut[e.prompt].strip() for e in gold}
    demos = [e for e in training if cut[e.prompt].strip() not in taken]
    more_prompts = [cut[x] for x in more_prompts if cut[x].strip() not in taken]
    test_prompts = list(answers)[:s.n_prompts]
    same = {e for e in demos + held_out + gold if same_once_cut(e, tokenizer, s.max_response)}
    preferences, human_pairs, gold_pairs = (
        [(cut[e.prompt], e.response, e.rejected) for e in part if e.rejected and e not in same]
        for part in (demos, held_out, gold))
    world = World(
        tokenizer=tokenizer, max_prompt=s.max_prompt, max_response=s.max_response,
        corpus=corpus or [],
        demos=[(cut[e.prompt], e.response) for e in demos],
        train_prompts=[cut[e.prompt] for e in demos] + more_prompts,
        test_prompts=test_prompts, test_demos=[[answers[x]] for x in test_prompts],
        golden=golden, preferences=preferences, human_pairs=human_pairs, gold_pairs=gold_pairs)
    check_world(world, s)
    world.notes = make_notes(world, s, [
        *((n, "records", f"left out: {why}") for why, n in left_out.items()),
        (sum(cut[x] != x for x in cut), "prompts",
         f"longer than {s.max_prompt} tokens cut to the end"),
        (len(training) - len(demos), "demonstrations", "left out: cut, a held-out prompt"),
        (len(same), "pairs", f"of answers that are the same, cut to {s.max_response} tokens: no "
                             "pairs"),
        (0 if s.init else long_words(texts), "words",
         f"of {LONG_WORD:,} characters and more, cut there by the tokenizer")])
    return world


def same_once_cut(example, tokenizer, n):
    """Whether there is a rejected answer whose first n tokens are those of the response."""
    one, other = example.response, example.rejected
    # A token is a byte at least: texts that part before are other tokens, and need no encoding.
    return bool(other) and one.encode()[:n] == other.encode()[:n] and (
        tokenizer.encode(one)[:n] == tokenizer.encode(other)[:n])


def long_words(texts):
    """How many words the training of a BPE cuts, see utils.tokenizer.bpe_tokenizer."""
    return sum(len(re.findall(rf"\S{{{LONG_WORD},}}", text)) for text in texts)


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


def make_notes(world, s, notes):
    """What users should know of the world made of their files: a line each, where it applies.

    notes: what is known already, as (number, of what, what became of it).
    """
    n_long = sum(len(world.tokenizer.encode(y)) >= s.max_response for _, y in world.demos)
    notes = [*notes, (n_long, "demonstrations", f"cut to {s.max_response} tokens, without an end"),
             (count_ends((y for _, y in world.demos), world.tokenizer), "demonstrations", SPELLED)]
    lines = [f"{plural(n, things)} {what}" for n, things, what in notes if n]
    n_held_out = len(world.test_prompts)
    warning = few_prompts(n_held_out, s)
    return lines + ([f"{plural(n_held_out, 'prompts')} held out{warning}"] if warning else [])


SPELLED = "with an end of text spelled out: it is learned as text, so take it out"


def count_ends(answers, tokenizer):
    """How many answers spell out a token that ends a text, the tokenizer's or another's."""
    eos = tokenizer.backend.id_to_token(tokenizer.eos)
    return sum(bool(eos in y or ENDS.search(y)) for y in answers)


def few_prompts(n, s):
    """The warning where n held-out prompts are few, and no fewer were asked for."""
    few = n < min(FEW_PROMPTS, s.n_prompts)
    return f": few, below {FEW_PROMPTS} means say little" if few else ""


def load_golden(spec):
    """The user's golden reward "FILE.py:FUNCTION", checked at every call. Raises InputError."""
    file, _, name = spec.rpartition(":")
    require(not Path(spec).is_file(), f"--gold {spec}: which function of it? Write {spec}:FUNCTION")
    require(Path(file).is_file(), f"--gold {spec}: no such file; write FILE.py:FUNCTION, or pairs")
    try:
        function = runpy.run_path(file).get(name)
    except Exception as error:      # Whatever the user's file raises is the user's to read.
        raise InputError(f"--gold {spec}: {type(error).__name__}: {error}") from error
    require(callable(function), f"--gold {spec}: {file} has no function {name!r}")

    def golden(prompt, response):
        # The space is where prompt and answer meet; an indentation is the answer's own.
        answer = response[1:] if re.match(r" \S", response) else response
        try:
            value = float(function(prompt.strip(), answer))
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
    n_prompts = len({e.prompt.strip() for e in examples})
    n_held_out = min(max(1, n_prompts // 5), s.n_prompts)
    notes = [(sum(same_once_cut(e, tokenizer, s.max_response) for e in examples),
              f"pairs of answers that are the same, cut to {s.max_response} tokens: no pairs"),
             (count_ends((e.response for e in examples), tokenizer), "answers " + SPELLED),
             (0 if s.init else long_words(texts), f"words of {LONG_WORD:,} characters and more")]
    lines = [f"{path}: {plural(forms.total(), 'records')}, {len(examples):,} of use",
             *(f"{n:>9,}  {form}" for form, n in forms.items()),
             *(f"{n:>9,}  left out: {why}" for why, n in left_out.items()),
             *(f"{n:>9,}  {what}" for n, what in notes if n),
             f"{n_prompts:>9,}  distinct prompts",
             f"{n_held_out:>9,}  held out" + few_prompts(n_held_out, s),
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
    lines.append("a document of --corpus should look like these two in one, prompt and answer")
    if s.corpus:
        documents = read_texts(s.corpus)
        lines.append(f"{s.corpus}: {plural(len(documents), 'documents')}, the first "
                     f"{documents[0][:200]!r}")
    if s.prompts:
        lines.append(f"{s.prompts}: {plural(len(read_prompts(s.prompts)), 'prompts')}")
    return "\n".join(lines)
