"""Worlds of text: what a learner is given, and the truth beside it that only the evaluation reads.

A world is either a built-in task (text_tasks.py), whose golden reward is known, or one's own files:
JSON lines, plain or gzip, checked line by line; what is wrong is said with file and line.
"""

import gzip
import importlib.util
import json
import math
import random
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import load_tokenizer
from model import InputError, bpe_tokenizer, encode_pair, sample_responses, word_tokenizer
from toy_envs.text_tasks import MAX_WORDS, TextTask


# ---- reading data -------------------------------------------------------------------------------

TURN = "\n\nAssistant:"     # HH-RLHF's dialogue strings: the response follows the last one


@dataclass(frozen=True)
class Example:
    """A demonstration: what was asked, what was answered, and a worse answer where one is known."""
    prompt: str
    response: str
    rejected: str | None = None


def read_lines(path):
    """(line number, text) of each line that is not blank; plain or gzip, UTF-8.

    Raises InputError naming file and line for what is missing, empty or not text.
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
    except EOFError as error:
        raise InputError(f"{path}:{number + 1}: the gzip file ends too early") from error
    except (OSError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from error
    if not found:
        raise InputError(f"{path}: the file is empty")


def read_json_lines(path):
    """(line number, dict) of each line of a JSON-lines file. Raises InputError."""
    for number, text in read_lines(path):
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: not a JSON object")
        yield number, record


def text_field(record, key, where):
    """record[key] as a non-empty string. Raises InputError starting with `where` (file:line)."""
    value = record.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: the field {key!r} is missing or not a string")
    if not value.strip():
        raise InputError(f"{where}: the field {key!r} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{where}: the field {key!r} holds half a surrogate pair: no text")
    return value


def split_dialogue(text, where):
    """(prompt ending with "Assistant:", response) of an HH-RLHF dialogue string."""
    prompt, turn, response = text.rpartition(TURN)
    if not turn or not prompt.strip():
        raise InputError(f"{where}: a dialogue needs a prompt and '\\n\\nAssistant:'")
    return prompt + turn, response


def read_examples(path):
    """(examples, number of pairs left out) from JSON lines of either form:

    {"prompt": ..., "response": ...}   a newline is set between the two
    {"chosen": ..., "rejected": ...}   HH-RLHF dialogues; the chosen one is the demonstration

    People do leave dialogue turns empty, or compare dialogues that part before the last turn: such
    pairs teach nothing here: left out and counted. Raises InputError for anything else amiss.
    """
    examples, left_out = [], 0
    for number, record in read_json_lines(path):
        where = f"{path}:{number}"
        if "chosen" in record or "rejected" in record:
            prompt, response = split_dialogue(text_field(record, "chosen", where), where)
            other, rejected = split_dialogue(text_field(record, "rejected", where), where)
            if prompt == other and response.strip() and rejected.strip():
                examples.append(Example(prompt, response, rejected))
            else:
                left_out += 1
        else:
            prompt, response = (text_field(record, key, where) for key in ("prompt", "response"))
            examples.append(Example(prompt.rstrip() + "\n", response.strip()))
    if not examples:
        raise InputError(f"{path}: no usable example in it")
    return examples, left_out


def read_texts(path):
    """Documents of a corpus: JSON lines with "text" (.json, .jsonl), or plain text by paragraph."""
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
    """Further prompts: JSON lines with "prompt", or plain text with one prompt a line."""
    if ".json" in Path(path).name:
        texts = [text_field(record, "prompt", f"{path}:{n}") for n, record in read_json_lines(path)]
    else:
        texts = [text for _, text in read_lines(path)]
    return [text if text.endswith(TURN) else text.rstrip() + "\n" for text in texts]


# ---- worlds --------------------------------------------------------------------------------------

@dataclass
class World:
    """What the learner is given, and the truth that only the evaluation reads."""
    tokenizer: object
    max_prompt: int             # tokens
    max_response: int           # tokens, EOS included
    corpus: list                # texts of the base language
    demos: list                 # training demonstrations: (prompt, response) texts
    train_prompts: list         # prompts to sample from while learning
    test_prompts: list          # held-out prompts
    test_demos: list            # per held-out prompt, the demonstrator's responses to it
    golden: object = None       # (prompt, response) -> points, or None where nobody knows
    demo_logp: object = None    # (prompt, response) -> log d_beta(y|x), marks aside, or None
    unmark: object = None       # response -> response without the demonstrator's marks
    preferences: list = field(default_factory=list)     # (prompt, chosen, rejected), for training
    human_pairs: list = field(default_factory=list)     # the same, held out
    notes: list = field(default_factory=list)           # what was left out and why

    def pair(self, prompt, response):
        return encode_pair(self.tokenizer, prompt, response, self.max_prompt, self.max_response)

    def sample(self, policy, ids, n, generator, label=None):
        """n responses of a policy to each prompt, ids[prompt]: [prompt][response] ids."""
        return sample_responses(policy, ids, n, self.max_response, self.tokenizer.eos, generator,
                                label=label)

    def text(self, ids):
        return self.tokenizer.decode(ids)


def text_world(s, seed):
    """A built-in task: corpus, demonstrations and held-out prompts drawn by seed."""
    try:
        task = TextTask(s.task, s.heterogeneity)
    except ValueError as error:
        raise InputError(str(error)) from error
    rng = random.Random(seed)
    prompts = rng.sample(sorted(task.prompts), len(task.prompts))
    n_test = min(s.n_prompts, len(prompts) // 5)
    test, learn = prompts[:n_test], prompts[len(prompts) // 5:]
    return World(
        tokenizer=word_tokenizer(task.vocabulary),
        max_prompt=64 - MAX_WORDS, max_response=MAX_WORDS,
        corpus=[f"{x} {task.sample(x, rng)}" for x in rng.choices(learn, k=s.n_corpus)],
        demos=[(x, task.demonstrate(x, rng)) for x in rng.choices(learn, k=s.n_demos)],
        train_prompts=learn, test_prompts=test,
        test_demos=[[task.demonstrate(x, rng) for _ in range(8)] for x in test],
        golden=task.golden, demo_logp=task.demo_logp, unmark=task.unmark)


def file_world(s, seed):
    """One's own data: demonstrations from a file, split by seed into training and held out."""
    if s.init and s.corpus:
        raise InputError("--init is pi_0: there is nothing to pretrain on --corpus")
    examples, left_out = read_examples(s.demos)
    corpus = read_texts(s.corpus) if s.corpus else None
    more_prompts = read_prompts(s.prompts) if s.prompts else []
    golden = load_golden(s.gold) if s.gold else None
    rng = random.Random(seed)
    by_prompt = {}
    for e in examples:
        by_prompt.setdefault(e.prompt, []).append(e)
    if len(by_prompt) < 2:
        raise InputError(f"{s.demos}: one prompt is too few to hold one out")
    asked = rng.sample(list(by_prompt), len(by_prompt))
    n_held = max(1, len(asked) // 5)        # a prompt is held out with all its answers
    held = [e for x in asked[:n_held] for e in by_prompt[x]]
    learn = [e for x in asked[n_held:] for e in by_prompt[x]][:s.n_demos]
    more_prompts = [x for x in more_prompts if x not in asked[:n_held]]
    if corpus is None:      # without the rejected answers: they would tell pi_0 what people dislike
        corpus = [e.prompt + e.response for e in learn]
    tokenizer = load_tokenizer(s.init) if s.init else bpe_tokenizer(corpus, s.vocab_size)

    def fits(prompt):
        return len(tokenizer.encode(prompt)) <= s.max_prompt

    demos = [e for e in learn if fits(e.prompt)]
    test = [e for e in held if fits(e.prompt)]
    prompts = [e.prompt for e in demos] + [x for x in more_prompts if fits(x)]
    if not demos or not test:
        raise InputError(f"{s.demos}: no prompt of at most {s.max_prompt} tokens is left to "
                         f"{'train on' if not demos else 'evaluate on'}; raise --max-prompt")
    if golden:
        for e in learn:     # a judge that fails is refused here, before a file is written
            golden(e.prompt, e.response)
    answers = {e.prompt: e.response for e in reversed(test)}      # the first one of each prompt
    test_prompts = list(answers)[:s.n_prompts]
    skipped = len(learn) + len(held) + len(more_prompts) - len(prompts) - len(test)
    pairs = [[(e.prompt, e.response, e.rejected) for e in part if e.rejected]
             for part in (demos, test)]
    unseen = [] if s.corpus or s.init else ["no --corpus: pi_0 is pretrained on the demonstrations"]
    return World(
        tokenizer=tokenizer, max_prompt=s.max_prompt, max_response=s.max_response, corpus=corpus,
        demos=[(e.prompt, e.response) for e in demos], train_prompts=prompts,
        test_prompts=test_prompts, test_demos=[[answers[x]] for x in test_prompts], golden=golden,
        preferences=pairs[0], human_pairs=pairs[1],
        notes=[f"{left_out} pairs without a common prompt or with an empty turn left out",
               f"{skipped} prompts longer than {s.max_prompt} tokens skipped",
               *unseen])


def load_golden(spec):
    """The user's golden reward "FILE.py:FUNCTION", checked at every call. Raises InputError."""
    file, _, name = spec.rpartition(":")
    if not file or not Path(file).is_file():
        raise InputError(f"--gold {spec}: no such file; write FILE.py:FUNCTION")
    try:
        module_spec = importlib.util.spec_from_file_location("gold", file)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:      # whatever the user's file raises is the user's to read
        raise InputError(f"--gold {spec}: {type(error).__name__}: {error}") from error

    def golden(prompt, response):
        try:
            value = float(function(prompt.strip(), response.strip()))
        except Exception as error:
            raise InputError(f"--gold {spec} raised {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise InputError(f"--gold {spec} returned {value} for the prompt {prompt.strip()!r}")
        return value
    return golden
