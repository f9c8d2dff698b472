"""Worlds of text: what a learner is given, and the truth beside it that only the evaluation reads.

A world is either a built-in task (text_tasks.py), whose golden reward is known, or one's own files
(files.py).
"""

import importlib.util
import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from model import InputError, bpe_tokenizer, encode_pair, sample_responses, word_tokenizer
from utils.checkpoints import load_tokenizer
from utils.data import read_examples, read_prompts, read_texts
from utils.cli import counted
from toy_envs.text_tasks import MAX_WORDS, TextTask

MIN_JUDGE_PAIRS = 100   # of fewer no judge is worth the name


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
    parse: object = None        # (prompt, response) -> clauses (kind, ...) that golden adds up
    values: object = None       # prompt -> {kind of clause: points}; both None where nobody knows
    preferences: list = field(default_factory=list)     # (prompt, chosen, rejected), for training
    human_pairs: list = field(default_factory=list)     # the same, held out
    judge_pairs: list = field(default_factory=list)     # the same, for a judge: no learner's
    gold: str = ""              # what golden is, where it is such a judge
    notes: list = field(default_factory=list)           # what was left out and why

    def pair(self, prompt, response):
        return encode_pair(self.tokenizer, prompt, response, self.max_prompt, self.max_response)

    def sample(self, policy, ids, n, generator, label=None):
        """n responses of a policy to each prompt, ids[prompt]: [prompt][response] ids."""
        return sample_responses(policy, ids, n, self.max_response, self.tokenizer.eos, generator,
                                label=label)

    def density(self, batch):
        """log d_beta(y|x) of a Batch's rows, (B,), by the text that they say."""
        rows = zip(batch.tokens.tolist(), batch.prompt_lengths.tolist(), batch.lengths.tolist())
        return torch.tensor([self.demo_logp(self.text(row[:m]), self.text(row[m:n]))
                             for row, m, n in rows], device=batch.tokens.device)

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
        golden=task.golden, demo_logp=task.demo_logp, unmark=task.unmark, parse=task.parse,
        values=task.values)


def split_by_prompt(examples, s, rng):
    """(held out, the judge's, to learn from): a prompt goes to one of them with all its answers,
    of which a judge takes only the pairs. Raises InputError if there is no second prompt."""
    by_prompt = {}
    for e in examples:
        by_prompt.setdefault(e.prompt, []).append(e)
    if len(by_prompt) < 2:
        raise InputError(f"{s.demos}: one prompt is too few to hold one out")
    asked = rng.sample(list(by_prompt), len(by_prompt))
    n_held = max(1, len(asked) // 5)
    paired = [x for x in asked[n_held:] if any(e.rejected for e in by_prompt[x])]
    judged = paired[:len(paired) // 2] if s.gold == "pairs" else []
    held = [e for x in asked[:n_held] for e in by_prompt[x]]
    judge = [e for x in judged for e in by_prompt[x] if e.rejected]
    taken = {*judged}
    rest = [x for x in asked[n_held:] if x not in taken]
    learn = [e for x in rest for e in by_prompt[x]][:s.n_demos]
    return held, judge, learn


def apart_once_cut(held, judge, learn, more_prompts, cut):
    """(test, judge, demos, the same uncut, prompts to learn from), prompts cut: those that
    differed may be the same then, and stay with the first of the three that has them."""
    test, judge = ([replace(e, prompt=cut(e.prompt)) for e in part] for part in (held, judge))
    unseen = {e.prompt for e in test}
    judge = [e for e in judge if e.prompt not in unseen]
    unseen |= {e.prompt for e in judge}
    whole = [e for e in learn if cut(e.prompt) not in unseen]
    demos = [replace(e, prompt=cut(e.prompt)) for e in whole]
    prompts = [e.prompt for e in demos] + [x for x in map(cut, more_prompts) if x not in unseen]
    return test, judge, demos, whole, prompts


def file_world(s, seed):
    """One's own data: demonstrations from a file, split by seed into training and held out.

    --gold pairs: half of the training prompts that have pairs are a judge's, and no learner's.
    """
    if s.init and s.corpus:
        raise InputError("--init is pi_0: there is nothing to pretrain on --corpus")
    examples, left_out = read_examples(s.demos)
    corpus = read_texts(s.corpus) if s.corpus else None
    more_prompts = read_prompts(s.prompts) if s.prompts else []
    golden = load_golden(s.gold) if s.gold not in (None, "pairs") else None
    rng = random.Random(seed)
    held, judge, learn = split_by_prompt(examples, s, rng)
    taken = {e.prompt for e in held + judge}
    n_judged = len({e.prompt for e in judge})
    more_prompts = [x for x in more_prompts if x not in taken]
    # without the rejected answers: they would tell pi_0 what people dislike
    texts = corpus or [e.prompt + e.response for e in learn]
    tokenizer = load_tokenizer(s.init) if s.init else bpe_tokenizer(texts, s.vocab_size)

    def cut(prompt):
        return tokenizer.tail(prompt, s.max_prompt)

    n_cut = sum(cut(x) != x for x in [e.prompt for e in learn + held + judge] + more_prompts)
    test, judge, demos, whole, prompts = apart_once_cut(held, judge, learn, more_prompts, cut)
    if s.gold == "pairs" and len(judge) < MIN_JUDGE_PAIRS:
        raise InputError(f"--gold pairs: {s.demos} leaves {len(judge)} pairs of chosen and rejected"
                         f" answers for the judge; it takes {MIN_JUDGE_PAIRS}")
    corpus = corpus or [e.prompt + e.response for e in whole]
    if not demos:
        raise InputError(f"{s.demos}: cut to {s.max_prompt} tokens, every prompt to train on is "
                         "also a held-out one; raise --max-prompt")
    if golden:
        for e in demos:     # a judge that fails is refused here, before a file is written
            golden(e.prompt, e.response)
    n_long = sum(len(tokenizer.encode(e.response)) >= s.max_response for e in demos)
    answers = {e.prompt: e.response for e in reversed(test)}      # the first one of each prompt
    test_prompts = list(answers)[:s.n_prompts]
    pairs = [[(e.prompt, e.response, e.rejected) for e in part if e.rejected]
             for part in (demos, test, judge)]
    if judge and not pairs[1]:
        raise InputError(f"--gold pairs: no held-out prompt of {s.demos} has a pair, to measure the"
                         " judge by")
    return World(
        tokenizer=tokenizer, max_prompt=s.max_prompt, max_response=s.max_response, corpus=corpus,
        demos=[(e.prompt, e.response) for e in demos], train_prompts=prompts,
        test_prompts=test_prompts, test_demos=[[answers[x]] for x in test_prompts], golden=golden,
        preferences=pairs[0], human_pairs=pairs[1], judge_pairs=pairs[2],
        notes=[note for count, note in (
            (left_out, f"{counted(left_out, 'records')} left out: an empty turn, or two answers to "
                       "different prompts"),
            (n_cut, f"{counted(n_cut, 'prompts')} longer than {s.max_prompt} tokens cut to the "
                    "end"),
            (n_long, f"{n_long} of {len(demos)} demonstrations cut to {s.max_response} tokens: "
                     "they have no end"),
            (len(learn) - len(demos), f"{counted(len(learn) - len(demos), 'demonstrations')} left "
                                      "out: cut, a held-out prompt"),
            (len(judge), f"{n_judged} prompts with {len(judge)} pairs are the judge's, no "
                         "learner's"),
            (len(demos) < 100, f"only {counted(len(demos), 'demonstrations')}: the numbers will "
                               "mean little"),
            (not (s.corpus or s.init), "no --corpus: pi_0 is pretrained on the demonstrations"),
            (s.corpus and len(corpus) == 1, f"{s.corpus} is one document (an empty line would part "
                                            "two): pi_0 will learn little"),
        ) if count])


def load_golden(spec):
    """The user's golden reward "FILE.py:FUNCTION", checked at every call. Raises InputError."""
    file, _, name = spec.rpartition(":")
    if not file or not Path(file).is_file():
        raise InputError(f"--gold {spec}: no such file; write FILE.py:FUNCTION, or pairs")
    try:
        module_spec = importlib.util.spec_from_file_location("gold", file)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        function = getattr(module, name, None)
    except Exception as error:      # whatever the user's file raises is the user's to read
        raise InputError(f"--gold {spec}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise InputError(f"--gold {spec}: {file} has no function {name!r}")

    def golden(prompt, response):
        try:
            value = float(function(prompt.strip(), response.strip()))
        except Exception as error:
            raise InputError(f"--gold {spec} raised {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise InputError(f"--gold {spec} returned {value} for the prompt {prompt.strip()!r}")
        return value
    return golden
