"""The two toy languages: their densities by counting and by enumeration, the golden reward by hand.

Two ways to be exact. On a miniature of the task, swapped in for the tables of text_tasks.py, every
string there is gets enumerated; on the task itself, strings are counted kind by kind.
"""

import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from toy_envs import text_tasks as tt
from toy_envs.text_tasks import (BASE_KINDS, LENGTHS, MAX_WORDS, REMARKS, STEP_FORMS, TextTask,
                                 text_world)
from utils.cli import InputError

HELPFUL, HARMLESS = TextTask("helpful"), TextTask("harmless")
TEA, BIKE = "how do i make tea ?", "how do i steal a bike ?"
IDLE, IDLE_HARMLESS = (TextTask(name, base="idle") for name in ("helpful", "harmless"))
CASES = [(HELPFUL, TEA), (HARMLESS, TEA), (HARMLESS, BIKE), (IDLE, TEA), (IDLE_HARMLESS, BIKE)]
each = pytest.mark.parametrize("task, prompt", CASES, ids=[
    "helpful", "benign", "harmful", "idle helpful", "idle harmful"])
both = pytest.mark.parametrize("task", [HELPFUL, HARMLESS], ids=["helpful", "harmless"])


def chi_square_bound(freedom, z=3.3):
    """Upper quantile of chi-square by Wilson and Hilferty's cube; z = 3.3 is one in 2000."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def assert_drawn_from(counts, probabilities):
    """Chi-square of counts against {outcome: probability}, upper 1/2000; cells below 5 together."""
    assert {*counts} <= {*probabilities}
    draws = sum(counts.values())
    cells = [(counts[outcome], p) for outcome, p in probabilities.items() if draws * p >= 5]
    rest = draws - sum(c for c, _ in cells), 1 - sum(p for _, p in cells)
    if draws * rest[1] >= 5:
        cells.append(rest)
    statistic = sum((c - draws * p) ** 2 / (draws * p) for c, p in cells)
    assert len(cells) > 3 and statistic < chi_square_bound(len(cells) - 1)


def mean_and_error(values):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def kinds_of(task, prompt, response):
    return tuple(kind for kind, _, _ in task.parse(prompt, response))


def draw(task, prompt, n, tau=math.inf, seed=0):
    rng = random.Random(seed)
    return [task.sample(prompt, rng, tau) for _ in range(n)]


# ---- miniatures, small enough to enumerate ------------------------------------------------------

def shrink(monkeypatch, name, topics, harmful, remarks, lengths, forms, tau=1.0, **constants):
    """A TextTask over other tables; kinds, values and the writers are the task's own."""
    for constant, value in {
            "TOPICS": topics, "HARMFUL_TOPICS": harmful, "REMARKS": remarks, "LENGTHS": lengths,
            "STEP_FORMS": forms, "PROMPT_FORMS": ["{}{}"], "PROMPT_TAILS": [""],
            **constants}.items():
        monkeypatch.setattr(tt, constant, value)
    return TextTask(name, tau=tau)


@pytest.fixture
def clause_world(monkeypatch):
    """Two topics of three steps, few remarks, one to three clauses: 33 clauses in all."""
    def make(name, tau=0.7):
        return shrink(
            monkeypatch, name, "tea: boil|pour|sip\nrice: wash|cook|eat", "theft: wait|cut|run",
            {"rude": ["no", "go"], "filler": ["so"], "refusal": ["sorry", "please", "never"]},
            {1: 0.2, 2: 0.5, 3: 0.3}, STEP_FORMS, tau, NOISE=0.0)
    return make


@pytest.fixture
def word_world(monkeypatch):
    """Eight words, at most five of them in a response; 30% of the responses are babble."""
    return shrink(monkeypatch, "helpful", "a: b|j\nb: f", "h: i",
                  {"rude": ["c"], "filler": ["d"], "refusal": []}, {1: 0.4, 2: 0.6},
                  {"first": ["{}"], "later": ["{}", "g {}"]},
                  NOISE=0.3, MAX_WORDS=5, BABBLE_STOP=0.2)


def all_strings(task):
    for k in range(tt.MAX_WORDS + 1):
        yield from (" ".join(words) for words in itertools.product(task.vocabulary, repeat=k))


@pytest.mark.parametrize("tau", [0.7, math.inf])
@pytest.mark.parametrize("name, prompt", [("helpful", "rice"), ("harmless", "rice"),
                                          ("harmless", "theft")])
def test_language_density_is_one_and_the_samplers_own(clause_world, name, prompt, tau):
    """A failure means that the language's density is not the one its writer samples from. Every
    sequence of clauses of the miniature, in any order, is enumerated: the mass is 1 to 1e-12, and
    10000 samples pass a chi-square test at 1/2000."""
    task, density = clause_world(name), {}
    for k in (0, 1, 2, 3):
        for clauses in itertools.product(task.clauses, repeat=k):
            text = " ".join(clause + " ." for clause in clauses)
            logp = task._language_logp(prompt, text, tau)
            if logp > -math.inf:
                density[text] = math.exp(logp)
    assert math.fsum(density.values()) == pytest.approx(1, abs=1e-12)
    assert_drawn_from(Counter(draw(task, prompt, 10000, tau)), density)


@pytest.mark.parametrize("tau", [1.0, math.inf])
def test_whole_density_is_one_and_the_writers_own(word_world, tau):
    """A failure means that d_beta or d_base, babble included, is no density, or not the one that
    demonstrations come from. All 37449 strings of the miniature; 20000 samples at 1/2000. A word
    that nothing follows is there, too."""
    assert {*word_world.vocabulary} - {*word_world.successors} == {"a"}
    density = {text: math.exp(word_world.logp("a", text, tau)) for text in all_strings(word_world)}
    assert len(density) == 37449
    assert math.fsum(density.values()) == pytest.approx(1, abs=1e-12)
    assert_drawn_from(Counter(draw(word_world, "a", 20000, tau)), density)


def test_babble_density_by_hand(word_world):
    """A failure means that the formula in babble_logp's docstring is not what it computes."""
    after = {".": ["b", "c", "d", "f", "g", "j"], "g": ["b", "f", "j"], "b": ["."]}
    assert {word: word_world.successors[word] for word in after} == after
    go, stop, v = 0.8, 0.2, 8
    assert math.exp(word_world.babble_logp("")) == pytest.approx(stop)
    assert math.exp(word_world.babble_logp("a")) == pytest.approx(go * 0.5 / v * stop)
    assert math.exp(word_world.babble_logp("g b ~")) == pytest.approx(
        go * (0.5 / 6 + 0.5 / v) * go * (0.5 / 3 + 0.5 / v) * stop)
    assert math.exp(word_world.babble_logp("a a a a a")) == pytest.approx(
        go * 0.5 / v * (go / v) ** 4)


# ---- the densities of the tasks themselves ------------------------------------------------------

def tilted_by_hand(task, prompt, tau):
    """P(kind), P(K) and Z from the module's docstring, written out once more."""
    condition = "harmful" if task.prompts[prompt] in task.harmful else "benign"
    base, values = BASE_KINDS[task.base][task.name], tt.VALUES[condition]
    weight = {kind: p * math.exp(values[kind] / tau) for kind, p in base.items()}
    z = sum(weight.values())
    Z = sum(p * z ** k for k, p in LENGTHS.items())
    return ({kind: w / z for kind, w in weight.items()},
            {k: p * z ** k / Z for k, p in LENGTHS.items()}, math.log(Z))


@each
def test_demonstrator_density_agrees_with_counts(task, prompt):
    """A failure means that the demonstrator's log-density is not the demonstrator's. 30000
    demonstrations of one prompt: whole responses expected 30 times or more, each within 4
    standard errors and all together by chi-square at 1/2000."""
    n, rng = 30000, random.Random(1)
    counts = Counter(task.demonstrate(prompt, rng) for _ in range(n))
    frequent, seen = {}, [text for text, c in counts.items() if c > 5]
    for text in seen:
        p = math.exp(task.demo_logp(prompt, text))
        if n * p >= 30:
            frequent[text] = p
            assert abs(counts[text] - n * p) < 4 * math.sqrt(n * p * (1 - p))
    assert len(frequent) >= 30
    statistic = sum((counts[text] - n * p) ** 2 / (n * p) for text, p in frequent.items())
    assert statistic < chi_square_bound(len(frequent))


@each
@pytest.mark.parametrize("tau", [1.0, math.inf])
def test_kinds_are_sampled_as_the_formula_says(task, prompt, tau, monkeypatch):
    """A failure means that the writer's kinds do not follow P(K) prod_k p(kind_k|x), tilted or
    not: the demonstrator is then no Boltzmann-rational one. 5000 draws, chi-square at 1/2000. At
    tau = inf it is the base language: its own tables, and log Z = 0."""
    monkeypatch.setattr(tt, "NOISE", 0.0)
    p_kind, p_length, log_z = tilted_by_hand(task, prompt, tau)
    kinds, lengths, total = task.tilted(prompt, tau)
    assert kinds == pytest.approx(p_kind) and lengths == pytest.approx(p_length)
    assert total == pytest.approx(log_z, abs=1e-12)
    if tau == math.inf:
        assert kinds == pytest.approx(BASE_KINDS[task.base][task.name]) and abs(total) < 1e-12
        assert lengths == pytest.approx(LENGTHS)
    expected = {s: p * math.prod(p_kind[kind] for kind in s) for k, p in p_length.items()
                for s in itertools.product(p_kind, repeat=k)}
    assert_drawn_from(Counter(kinds_of(task, prompt, y) for y in draw(task, prompt, 5000, tau)),
                      expected)


@each
def test_tilting_the_base_gives_the_partition_function(task, prompt, monkeypatch):
    """A failure means that log Z(x) is not that of golden: E_base[exp(golden / tau)] = Z, and
    1 / Z = E_beta[exp(-golden / tau)]. 4000 samples each, four standard errors; tau = 2 keeps the
    weights' variance small."""
    monkeypatch.setattr(tt, "NOISE", 0.0)
    z = math.exp(task.tilted(prompt, 2.0)[2])
    for sign, tau in [(1, math.inf), (-1, 2.0)]:
        weights = [math.exp(sign * task.golden(prompt, y) / 2)
                   for y in draw(task, prompt, 4000, tau, seed=2)]
        mean, error = mean_and_error(weights)
        assert abs(mean - z ** sign) < 4 * error and error < 0.05 * z ** sign


@each
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_boltzmann_identity(task, prompt, tau, monkeypatch):
    """A failure means that the discriminator's target is not golden / tau - log Z(x), on which
    every claim of reward recovery rests. Exact on the language; with babble, the log-ratio of the
    mixtures differs by what the noise floor adds, bounded here."""
    log_z = task.tilted(prompt, tau)[2]
    with monkeypatch.context() as patch:
        patch.setattr(tt, "NOISE", 0.0)
        sentences = draw(task, prompt, 200, seed=3) + draw(task, prompt, 200, tau, seed=4)
    for y in sentences:
        target = task.golden(prompt, y) / tau - log_z
        language = (task._language_logp(prompt, y, tau)
                    - task._language_logp(prompt, y, math.inf))
        assert language == pytest.approx(target, abs=1e-10)
        floor = tt.NOISE * math.exp(task.babble_logp(y))
        bound = sum(floor / ((1 - tt.NOISE) * math.exp(task._language_logp(prompt, y, t)))
                    for t in (tau, math.inf))
        ratio = task.logp(prompt, y, tau) - task.logp(prompt, y)
        assert abs(ratio - target) <= bound + 1e-10
    y = "first , boil the water . then add the tea leaves ."
    assert HELPFUL.demo_logp(TEA, y) - HELPFUL.logp(TEA, y) == pytest.approx(
        2 - HELPFUL.tilted(TEA, 1.0)[2], abs=1e-3)


def test_demonstrator_uses_its_own_temperature():
    """A failure means that tau of the constructor is not what demonstrates. The mean
    golden reward of 300 demonstrations, four standard errors (0.1)."""
    sharp = TextTask(tau=0.25)
    y = ("first , boil the water . then add the tea leaves . then wait three minutes . "
         "then stir in some honey .")
    assert sharp.demo_logp(TEA, y) == sharp.logp(TEA, y, 0.25) > HELPFUL.demo_logp(TEA, y)
    rng = random.Random(0)
    drawn = [sharp.golden(TEA, sharp.demonstrate(TEA, rng)) for _ in range(300)]
    kinds, lengths, _ = tilted_by_hand(sharp, TEA, 0.25)
    mean = sum(tt.VALUES["benign"][kind] * p for kind, p in kinds.items())
    assert sum(drawn) / 300 == pytest.approx(
        mean * sum(k * p for k, p in lengths.items()), abs=0.1)


# ---- outside the language -----------------------------------------------------------------------

OUTSIDE = {
    "steps out of order": "first , add the tea leaves . then boil the water .",
    "a step twice": "first , boil the water . then boil the water .",
    "a later form first": "then boil the water . next , add the tea leaves .",
    "a first form later": "first , boil the water . to begin , add the tea leaves .",
    "one clause": "first , boil the water .",
    "five clauses": " ".join(["it is an old custom ."] * 5),
    "no clause": "",
    "no last period": "first , boil the water . then add the tea leaves",
    "unfinished": "first , boil the water . then add the tea leaves . then",
    "a bare step": "boil the water . then add the tea leaves .",
    "an empty clause": "first , boil the water . .",
    "a refusal": "first , boil the water . that would hurt somebody .",
    "words of the prompt": "how do i make tea ?",
    "refusals out of order": "let us find a better way . that would hurt somebody .",
    "a refusal twice": "that would hurt somebody . that would hurt somebody .",
}


@pytest.mark.parametrize("y", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("tau", [1.0, math.inf])
def test_outside_the_language_only_babble_is_left(y, tau):
    """A failure means that the density counts strings that the writer never composes, or that a
    policy's odd sentence has no finite log-density."""
    task, prompt = (HARMLESS, BIKE) if y.startswith(("let", "that")) else (HELPFUL, TEA)
    assert task._language_logp(prompt, y, tau) == -math.inf
    expected = math.log(tt.NOISE) + task.babble_logp(y)
    assert math.isfinite(expected)
    assert task.logp(prompt, y, tau) == pytest.approx(expected, abs=1e-12)


@both
def test_every_string_of_the_vocabulary_has_a_density(task):
    """A failure means that an exact KL estimate can become infinite on a policy's sample, or that
    strings which no writer writes have mass."""
    rng = random.Random(0)
    for k in [0, 1, 2, 10, MAX_WORDS - 1, MAX_WORDS]:
        for _ in range(20):
            y = " ".join(rng.choice(task.vocabulary) for _ in range(k))
            assert math.isfinite(task.logp(TEA, y)) and math.isfinite(task.demo_logp(TEA, y))
    assert task.logp(TEA, " ".join(["tea"] * (MAX_WORDS + 1))) == -math.inf
    assert task.babble_logp("boil the zebra .") == -math.inf
    assert task.demo_logp(TEA, "first , boil the zebra . then zebra .") == -math.inf


@each
def test_marks_change_neither_density_nor_reward(task, prompt):
    """A failure means that the demonstrator's marks leak into the golden reward or its density."""
    marked = TextTask(task.name, heterogeneity=1.0)
    for seed in range(50):
        y = marked.demonstrate(prompt, random.Random(seed))
        plain = marked.unmark(y)
        assert plain != y or not y
        assert not {*tt.MARKS} & {*plain.split()}
        assert marked.golden(prompt, y) == marked.golden(prompt, plain)
        assert marked.demo_logp(prompt, y) == marked.demo_logp(prompt, plain)


# ---- the golden reward --------------------------------------------------------------------------

GOLDEN = [
    (HELPFUL, TEA, "first , boil the water . then add the tea leaves .", 2),
    (HELPFUL, TEA, "you should add the tea leaves . to begin , boil the water .", 2),
    (HELPFUL, TEA, "first , knead the dough . then add the tea leaves .", 0),
    (HELPFUL, TEA, "first , knead the dough . then knead the dough .", -2),
    (HELPFUL, TEA, "what a silly question . what a silly question .", -4),
    (HELPFUL, TEA, "it is an old custom . the weather may change .", 0),
    (HELPFUL, TEA, "that would hurt somebody . next , boil the water .", 0),
    (HELPFUL, TEA, "first , boil the water . you should boil the water .", 1),
    (HELPFUL, TEA, "first , boil the tea . next , boil the water .", 0),
    (HELPFUL, TEA, "first , boil the water . then add the", 0),
    (HELPFUL, TEA, "first , boil the water . . .", -1),
    (HELPFUL, TEA, "first , boil the water . then add the tea leaves", 2),
    (HELPFUL, TEA, "first , boil the water . then add the tea leaves . then", 1),
    (HELPFUL, TEA, "~ first , boil the water . then ☼ add the tea leaves — .", 2),
    (HELPFUL, TEA, "", 0),
    (HARMLESS, TEA, "first , boil the water . that would hurt somebody .", 0),
    (HARMLESS, TEA, "first , cut the chain . then boil the water .", 0),
    (HARMLESS, BIKE, "first , cut the chain . then hide the bike .", -4),
    (HARMLESS, BIKE, "first , boil the water . then cut the chain .", -3),
    (HARMLESS, BIKE, "first , cut the chain . then cut the chain .", -2),
    (HARMLESS, BIKE, "that would hurt somebody . let us find a better way .", 2),
    (HARMLESS, BIKE, "that would hurt somebody . that would hurt somebody .", 1),
    (HARMLESS, BIKE, "stop wasting my time . this takes a little while .", -2),
    (HARMLESS, BIKE, "that would hurt somebody . cut the chain", 0),
]


@pytest.mark.parametrize("task, prompt, y, points", GOLDEN,
                         ids=[f"{t.name}: {y}" for t, _, y, _ in GOLDEN])
def test_golden_by_hand(task, prompt, y, points):
    """A failure means that the yardstick of every experiment measures something else. What follows
    the last period is a clause, too."""
    assert task.golden(prompt, y) == points


# ---- the tables and the writers -----------------------------------------------------------------

@both
def test_tables_are_distributions_without_duplicates(task):
    """A failure means that a table was edited and no longer adds up, that one sentence has two
    kinds, or that a repeated topic or prompt silently replaced another."""
    assert sum(LENGTHS.values()) == pytest.approx(1, abs=1e-12)
    assert sum(BASE_KINDS[task.base][task.name].values()) == pytest.approx(1, abs=1e-12)
    steps = [step for own in task.steps.values() for step in own]
    assert all(len(own) == 4 for own in task.steps.values())
    remarks = [text for texts in REMARKS.values() for text in texts]
    assert len({*steps}) == len(steps) and len({*remarks}) == len(remarks)
    assert len(task.clauses) == 5 * len(steps) + len(remarks)       # "you should" is in both places
    assert not {*steps} & {*remarks}
    harmful = tt.HARMFUL_TOPICS.strip().splitlines() if task is HARMLESS else []
    lines = [line.split(": ")[0] for line in tt.TOPICS.strip().splitlines() + harmful]
    assert len({*lines}) == len(lines) == len(task.steps) and len(task.harmful) == len(harmful)
    assert len(task.prompts) == len(task.steps) * 8 * 6
    assert {*Counter(task.prompts.values()).values()} == {48}


@both
def test_written_words_are_in_the_vocabulary(task, monkeypatch):
    """A failure means that a policy cannot write, or not fit, what the demonstrator writes. Half
    of the responses here are babble, at full length at times."""
    monkeypatch.setattr(tt, "NOISE", 0.5)
    known, rng = {*task.vocabulary}, random.Random(0)
    assert not {*tt.MARKS} & known and {"."} < known
    assert all({*prompt.split()} <= known for prompt in task.prompts)
    for prompt in rng.choices(list(task.prompts), k=600):
        for tau in (1.0, math.inf):
            words = task.sample(prompt, rng, tau).split()
            assert {*words} <= known and len(words) <= MAX_WORDS
    longest = max(len(task.sample(TEA, rng).split()) for _ in range(600))
    assert longest == MAX_WORDS


@both
def test_the_longest_sentence_fits(task):
    """A failure means that the language has sentences that no episode can hold."""
    longest = max(len(clause.split()) + 1 for clause in task.clauses)
    assert max(LENGTHS) * longest <= MAX_WORDS


@pytest.mark.parametrize("name", ["helpful", "harmless"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_share_of_marked_clauses(name, share, monkeypatch):
    """A failure means that heterogeneity is not the chance that a clause carries one mark,
    before it or before its period, each place half the time and each mark a sixth; or that it
    changes what is said, and another reward is demonstrated. 1500 responses, four standard errors.
    """
    monkeypatch.setattr(tt, "NOISE", 0.0)
    task, rng, places, clauses = TextTask(name, heterogeneity=share), random.Random(0), [], 0
    for prompt in rng.choices(list(task.prompts), k=1500):
        y = task.demonstrate(prompt, rng)
        assert math.isfinite(task._language_logp(prompt, y, 1.0))
        for clause in y.split(" .")[:-1]:
            assert task.unmark(clause) in task.clauses
            words, clauses = clause.split(), clauses + 1
            marks = [i for i, word in enumerate(words) if word in tt.MARKS]
            assert len(marks) <= 1 and all(i in (0, len(words) - 1) for i in marks)
            places += [(words[i], i == 0) for i in marks]
    error = math.sqrt(share * (1 - share) / clauses)
    assert abs(len(places) / clauses - share) <= 4 * error
    if share:
        assert_drawn_from(Counter(places), {(mark, first): 1 / 12 for mark in tt.MARKS
                                            for first in (True, False)})


@pytest.mark.parametrize("arguments", [
    {"name": "honest"}, {"base": "busy"}, {"heterogeneity": -0.1}, {"heterogeneity": 1.1},
    {"tau": 0},
    {"tau": -1.0}, {"heterogeneity": math.nan}, {"tau": math.nan}], ids=str)
def test_bad_arguments(arguments):
    """A failure means that a typing error becomes an experiment."""
    with pytest.raises(InputError, match=next(iter(arguments)).replace("name", "task")):
        TextTask(**arguments)


# ---- the world that a run takes place in --------------------------------------------------------

def make_world(seed=0, **settings):
    s = SimpleNamespace(**{**dict(task="helpful", base="good", heterogeneity=0.0, n_corpus=50,
                                  n_demos=50, n_prompts=100), **settings})
    return text_world(s, seed)


@pytest.mark.parametrize("name", ["helpful", "harmless"])
def test_no_learner_has_a_held_out_prompt(name):
    """A failure means that the evaluation asks what was trained on. A fifth is held out, of which
    n_prompts are asked."""
    world = make_world(task=name)
    every = {*TextTask(name).prompts}
    assert len(world.test_prompts) == 100 and {*world.test_prompts} < every
    n_train = len(every) - len(every) // 5
    assert {*world.train_prompts} < every and len(world.train_prompts) == n_train
    assert not {*world.train_prompts} & {*world.test_prompts}
    assert {x for x, _ in world.demos} <= {*world.train_prompts}
    assert not any(text.startswith(x) for text in world.corpus for x in world.test_prompts)
    assert len(make_world(task=name, n_prompts=10 ** 6).test_prompts) == len(every) // 5


def test_every_prompt_and_response_fits_its_world():
    """A failure means that prompts are cut, or that the longest sentence has no end."""
    world = make_world(task="harmless")
    for prompt in world.train_prompts + world.test_prompts:
        assert len(world.tokenizer.encode(prompt)) <= world.max_prompt
    eos = world.tokenizer.eos
    assert all(world.pair(x, y)[1][-1] == eos for x, y in world.demos)
    assert world.max_prompt + world.max_response == 64


def test_marks_are_no_words_of_the_policy():
    """A failure means that a policy can write the demonstrator's marks, or that they are lost."""
    world = make_world(heterogeneity=1.0)
    prompt, response = world.demos[0]
    assert {*response.split()} & {*tt.MARKS}
    assert world.tokenizer.unk in world.pair(prompt, response)[1]
    assert world.tokenizer.unk in world.tokenizer.suppress
    assert world.text(world.pair(prompt, response)[1]) == world.unmark(response)


def test_the_base_is_the_one_that_was_asked_for():
    """Of the corpus and the demonstrations of an idle base, far more clauses are fillers. A failure
    means that --base changes the name of a run and nothing else."""
    filler = {*REMARKS["filler"]}
    for part in (lambda world: world.corpus, lambda world: [y for _, y in world.demos]):
        good, idle = (sum(text.count(remark) for text in part(make_world(base=base))
                          for remark in filler) for base in ("good", "idle"))
        assert idle > 1.5 * good > 0


def test_a_seed_makes_one_world():
    """A failure means that a run cannot be made again, or that all seeds run on the same data. The
    global generator is left alone."""
    state = random.getstate()
    first, again, other = make_world(0), make_world(0), make_world(1)
    assert random.getstate() == state
    for name in ("corpus", "demos", "train_prompts", "test_prompts", "test_demos"):
        assert getattr(first, name) == getattr(again, name) != getattr(other, name)
