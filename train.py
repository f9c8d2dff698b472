"""Text in, checkpoints out: reading data, batches, the training loops; usable stage by stage.

    python train.py pretrain --corpus FILE --out DIR                    pi_0
    python train.py sft      --demos FILE --init DIR --out DIR          pi_SFT
    python train.py reward   --positives FILE --negatives FILE --init DIR --out DIR

A pair is (prompt ids, response ids): the response ends with EOS if it is finished. Pretraining reads
a document as a response to the empty prompt. Only response tokens that the policy can write bear
loss. Losses are in nats per token, discriminator losses in nats per sample.
"""

import argparse
import copy
import dataclasses
import gzip
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from model import (GPT, GPTConfig, InputError, bpe_tokenizer, collate, load_pretrained, logp_token,
                   save_pretrained)
from reward import HEADS, RewardModel, bradley_terry_loss, discriminator_loss


# ---- settings and flags -------------------------------------------------------------------------

def setting(default, help, choices=None):
    """One field of a settings dataclass: its default, its line of documentation, its choices."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def add_flags(parser, Settings):
    """Give parser one flag per field of the dataclass: `batch_size: int` becomes `--batch-size`.

    A bool field becomes a pair of switches, --name and --no-name; the help is the field's own line.
    """
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        help = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            help += f" (default: {field.default})"
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": str if field.default is None else type(field.default),
                    "choices": field.metadata["choices"]}
        parser.add_argument(name, default=field.default, help=help, **kind)


def parse_settings(Settings, argv=None):
    """Read the command line into the dataclass `Settings`; its docstring is the help's text."""
    parser = _OneLineParser(description=Settings.__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, Settings)
    return Settings(**vars(parser.parse_args(argv)))


def run_script(main):
    """Call main(); on bad input print one line and exit with status 2, on Ctrl-C with 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


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
    except (OSError, gzip.zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error.strerror if isinstance(error, OSError) and error.strerror else error})") from error
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
    pairs teach nothing here and are left out and counted. Raises InputError for anything else amiss.
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
    """Documents of a corpus: JSON lines with "text" (.json, .jsonl) or plain text, one a paragraph."""
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


# ---- tokens and batches -------------------------------------------------------------------------

def encode_pair(tokenizer, prompt, response, max_prompt, max_response):
    """(prompt ids, response ids + EOS), or None for a prompt longer than max_prompt.

    A response longer than max_response is cut there and then has no EOS: it is not finished.
    """
    prompt, response = tokenizer.encode(prompt), tokenizer.encode(response) + [tokenizer.eos]
    return None if len(prompt) > max_prompt else (prompt, response[:max_response])


def encode_documents(tokenizer, texts, n_positions):
    """Documents as responses to the empty prompt, cut into pieces of at most n_positions tokens."""
    pieces = []
    for ids in (encoding.ids for encoding in tokenizer.backend.encode_batch(texts)):
        ids = [*ids, tokenizer.eos]
        pieces += [([], ids[i:i + n_positions]) for i in range(0, len(ids), n_positions)]
    return [piece for piece in pieces if len(piece[1]) > 1]     # nothing to predict in one token


def item_length(item):
    return max(len(prompt) + len(response) for prompt, response in item)


def length_batches(items, batch_size, rng):
    """Shuffled batches whose items, tuples of pairs, are of similar length: little padding.

    Items are sorted within stretches of 16 batches, so that batches differ from epoch to epoch.
    """
    order, batches = rng.sample(range(len(items)), len(items)), []
    for start in range(0, len(order), 16 * batch_size):
        stretch = sorted(order[start:start + 16 * batch_size], key=lambda i: item_length(items[i]))
        batches += [[items[i] for i in stretch[j:j + batch_size]]
                    for j in range(0, len(stretch), batch_size)]
    rng.shuffle(batches)
    return batches


# ---- the loop -----------------------------------------------------------------------------------

@dataclass
class Schedule:
    """How one stage is trained: AdamW, linear warm-up, cosine to a tenth, gradient clipping."""
    lr: float = setting(1e-3, "peak learning rate")
    epochs: float = setting(1.0, "passes over the data")
    batch_size: int = setting(64, "items per step")
    warmup: float = setting(0.1, "share of the steps spent warming up")
    weight_decay: float = setting(0.1, "decoupled weight decay, on matrices only")
    clip: float = setting(1.0, "largest gradient norm")
    evaluations: int = setting(8, "looks at the held-out data; the best one is kept")


def learning_rate(schedule, step, steps):
    """Linear warm-up to schedule.lr, then half a cosine down to a tenth of it."""
    warmup = max(1, int(schedule.warmup * steps))
    if step < warmup:
        return schedule.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return schedule.lr * (0.01 + 0.495 * (1 + math.cos(math.pi * progress)))


def fit(model, items, loss_fn, schedule, rng, label="fit", held_out=None):
    """Minimise loss_fn(model, list of items); with held-out items, keep the best weights seen there.

    Returns the history, a list of {step, loss[, held_out]}. Raises InputError at a loss that is not
    finite, naming the step; the model is then not to be used.
    """
    if not items:
        raise InputError(f"{label}: no data to train on")
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": schedule.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=schedule.lr, betas=(0.9, 0.95), fused=True)
    steps = max(1, math.ceil(schedule.epochs * len(items) / schedule.batch_size))
    looks = {math.ceil(steps * (i + 1) / schedule.evaluations) - 1 for i in range(schedule.evaluations)}
    history, best, best_state, queue = [], math.inf, None, []
    bar = tqdm(range(steps), desc=label, unit="step", disable=None, leave=False)
    for step in bar:
        queue = queue or length_batches(items, schedule.batch_size, rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, steps)
        loss = loss_fn(model, queue.pop())
        if not math.isfinite(loss.item()):
            raise InputError(f"{label}: the loss is {loss.item()} at step {step}; a lower learning "
                             "rate may help")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append({"step": step, "loss": loss.item()})
        if held_out and step in looks:
            history[-1]["held_out"] = now = mean_loss(model, held_out, loss_fn, schedule.batch_size)
            if now < best:
                best, best_state = now, copy.deepcopy(model.state_dict())
            bar.set_postfix(held_out=f"{now:.3f}")
    if best_state is not None:
        model.load_state_dict(best_state)
    return history


@torch.inference_mode()
def mean_loss(model, items, loss_fn, batch_size):
    """loss_fn over all items, each item counting alike."""
    items = sorted(items, key=item_length)
    chunks = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
    return sum(loss_fn(model, chunk).item() * len(chunk) for chunk in chunks) / len(items)


# ---- the stages ---------------------------------------------------------------------------------

def device_of(model):
    return next(model.parameters()).device


def nll_loss(model, items):
    """-mean over response tokens of log pi(y_t|s_t), nats per token: the forward-KL loss (SFT).

    Tokens that the policy cannot write are states, not targets: they bear no loss.
    """
    batch = collate([pair for (pair,) in items], device_of(model))
    writable = batch.response_mask() & model.suppress.isfinite()[batch.tokens]
    return -logp_token(model, batch)[writable].mean()


def discriminator_step(model, items):
    """The discriminator's loss on items (positive, negative)."""
    rewards = model(collate([pair for item in items for pair in item], device_of(model)))
    return discriminator_loss(rewards[0::2], rewards[1::2])


def preference_step(model, items):
    """The Bradley-Terry loss on items (preferred, dispreferred)."""
    rewards = model(collate([pair for item in items for pair in item], device_of(model)))
    return bradley_terry_loss(rewards[0::2], rewards[1::2])


def split(items, share, rng):
    """(the larger part, a share held out), at least one item in each where there are two."""
    items = rng.sample(items, len(items))
    n = max(1, round(share * len(items))) if len(items) > 1 else 0
    return items[n:], items[:n]
