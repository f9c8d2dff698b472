"""Check the exercises: `python docs/lessons/check.py` lists them all, `... check.py 3` checks one.

It says in words what is wrong. A checker runs the student's function in float64 on a small case
whose answer is known: by enumeration, by autograd, or from the project's own function. It also
knows what the usual mistakes would give: where the answer is exactly one of those, it says which.
With a number the exit status is 0 if that exercise is solved and 1 if not. The students' code is
run as it is, so graders should run this program in a sandbox.
"""

import argparse
import contextlib
import inspect
import itertools
import json
import math
import re
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

try:
    import torch
    from torch.nn.functional import pad, softplus
except ImportError:
    sys.exit("PyTorch is missing here: `source .venv/bin/activate` first (`make demo` makes it)")

HERE = Path(__file__).resolve().parent
EXERCISES, PROJECT = HERE / "exercises", HERE.parent.parent
sys.path.insert(0, str(PROJECT))        # the project's modules

import divergences                                                      # noqa: E402
from model import Batch                                                 # noqa: E402
from reward import LogRatio, best_of_n_weights                          # noqa: E402
from toy_envs import gridworld, shaping, token_mdp                        # noqa: E402
from train import random_batches                                        # noqa: E402
from utils.cli import InputError, plural, require, run_script           # noqa: E402


class Hint(Exception):
    """What is wrong with an answer, in words for its author."""


class WrongNumber(Hint):
    """A wrong answer that is no known mistake: `check` shows the inputs beside it."""


# ---- running what a student wrote ----------------------------------------------------------------

def load(path, name):
    """The function `name` of an exercise file, made safe to call: see `ask`. Raises Hint."""
    namespace = {"__name__": path.stem}
    guarded(lambda: exec(compile(path.read_bytes(), path, "exec"), namespace), path, "The file")
    if not callable(namespace.get(name)):
        raise Hint(f"The file defines no function {name}; it must keep that name.")

    def ask(*arguments, shape):
        """Call the function with copies of the arguments; its tensor, in this shape, or a Hint."""
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        names = guarded(lambda: inspect.signature(namespace[name]).parameters, path, name)
        ask.inputs = dict(zip(names, arguments))
        got = guarded(lambda: namespace[name](*copies), path, name)
        if got is None:
            raise Hint(f"{name} returns None: not filled in yet, or `return` is missing.")
        if not isinstance(got, torch.Tensor):
            raise Hint(f"{name} returns a {type(got).__name__}, not a torch tensor.")
        if tuple(got.shape) != shape:
            raise Hint(f"{name} returns the shape {tuple(got.shape)}; it should be {shape}.")
        return got
    return ask


def guarded(run, path, who):
    """run(), its exceptions made Hints that name the student's own line."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == str(path)]
        where = f" in line {lines[-1]}" if lines else ""
        raise Hint(f"{who} stopped{where} with {type(error).__name__}: "
                   f"{str(error).partition(chr(10))[0]}") from error


def same(a, b):
    return torch.allclose(a.double(), b.double().expand_as(a), rtol=1e-6, atol=1e-9)


def compare(what, got, right, mistakes=()):
    """Nothing if got is right; else the Hint of the mistake (hint, value) that gives just this."""
    if same(got, right):
        return
    for hint, wrong in mistakes:
        if same(got, wrong):
            raise Hint(hint)
    got, right = got.detach().double(), right.detach().double()
    wrong = ~torch.isclose(got, right, rtol=1e-6, atol=1e-9)        # a nan is close to nothing
    place = wrong.nonzero()[0].tolist()                             # [] without dimensions
    text = f"{what} is {got[tuple(place)]:.4g}{f' at {place}' if place else ''}"
    if not got.isfinite().all():
        raise WrongNumber(f"{text}: not finite. Where is the log of something not > 0?")
    raise WrongNumber(f"{text}; right is {right[tuple(place)]:.4g}. No usual mistake gives this.")


def listed(name, x):
    """"name = numbers" of an input; of a large one its first row, of a list its first entry."""
    while isinstance(x, list) or isinstance(x, torch.Tensor) and x.dim() > 1 and x.numel() > 24:
        name, x = f"{name}[0]", x[0]
    if isinstance(x, torch.Tensor):
        x = x.detach()
        x = (x.double().numpy().round(3) if x.is_floating_point() else x.int()).tolist()
    return f"{name} = {x}"


def gradient(value, leaf):
    """d value / d leaf, kept for more; a Hint where there is none."""
    if not value.requires_grad:
        raise Hint("The value carries no gradient: .detach(), no_grad or numpy cuts it off.")
    try:
        return torch.autograd.grad(value, leaf, retain_graph=True)[0]
    except RuntimeError as error:
        raise Hint(f"No gradient can be taken: {error}") from error


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- the exercises: (hint, what that mistake would give) -----------------------------------------

def check_response_mask(ask):
    tokens = torch.tensor([[5, 6, 4, 0, 0, 0, 0], [4, 5, 7, 0, 8, 0, 0], [6, 4, 5, 7, 5, 6, 4]])
    prompt, lengths = torch.tensor([2, 2, 3]), torch.tensor([4, 6, 7])
    got = ask(tokens, prompt, lengths, shape=(3, 7))
    if got.dtype != torch.bool:
        raise Hint(f"A mask is a tensor of bool; yours is {got.dtype}.")
    t, first, end = torch.arange(7), prompt[:, None], lengths[:, None]
    right = Batch(tokens, prompt, lengths).response_mask()
    compare("The mask", got, right, (
        ("Off by one: the response's first token is missing.", (t > first) & (t < end)),
        ("Off by one: the prompt's last token is in it.", (t >= first - 1) & (t < end)),
        ("Off by one: it marks where actions are predicted.", (t >= first - 1) & (t < end - 1)),
        ("EOS is missing: to end is an action too.", (t >= first) & (t < end - 1)),
        ("Off by one at the end: a padding token is in it.", (t >= first) & (t <= end)),
        ("Padding is in it.", t >= first),
        ("The prompt is in it: it is given, not an action.", t < end),
        ("lengths counts the prompt too: the response ends at lengths, not prompt + lengths.",
         (t >= first) & (t < first + end)),
        ("It goes by the id, which EOS may share: use lengths.", (t >= first) & (tokens != 0)),
        ("It goes by the id, which EOS may share, and the prompt is in it: use both lengths.",
         tokens != 0)))


def check_forward_kl_loss(ask):
    # all of {a, b}^3; the demonstrations stand in exact proportion to beta, so that the loss is
    # KL(beta || pi) + H(beta) by enumeration; column 0 is a prompt, column 4 padding
    counts = torch.tensor([4, 0, 1, 1, 0, 0, 0, 2])
    y = token_mdp.all_sequences(3, 2).repeat_interleave(counts, 0)              # (8, 3)
    beta, table = counts.double() / 8, randn(3, 4, 2).requires_grad_()  # a row for every prefix
    rows = [table[t, token_mdp.sequence_index(y[:, :t], 2)] for t in range(3)]
    logits = torch.cat([torch.stack(rows, 1), randn(8, 2, 2, seed=1)], 1)
    tokens, mask = pad(y, (1, 1)), pad(torch.ones_like(y), (1, 1)).bool()
    log_pi = token_mdp.sequence_log_prob(table.log_softmax(-1)[None])[0]
    right = divergences.forward_kl(beta.log(), log_pi) + torch.special.entr(beta).sum()

    def loss(logp, tokens=tokens[:, 1:], mask=mask[:, 1:]):
        return -(logp.gather(-1, tokens[..., None]).squeeze(-1) * mask).sum(1).mean()
    unshifted, logp = logits.log_softmax(-1), logits[:, :-1].log_softmax(-1)
    got = ask(logits, tokens, mask, shape=())
    compare("The loss", got, right, (
        ("The sign is wrong: likely responses must have a *small* loss.", -right),
        ("Off by one: logits[:, t] predict tokens[:, t + 1].", loss(unshifted, tokens, mask)),
        ("Off by one: mask[:, 1:] goes with tokens[:, 1:].", loss(logp, mask=mask[:, :-1])),
        ("A mean over tokens: the forward KL of responses is a *sum* over t.", right / 3),
        ("A sum over responses where a mean belongs: it grows with the batch.", right * 8),
        ("The mask is not used: padding is in the loss.", loss(logp, mask=torch.ones(8, 4))),
        ("log_softmax is missing: these are logits.", loss(logits[:, :-1])),
        ("The log is missing: these are probabilities.", loss(logp.exp()))))
    compare("The gradient", gradient(got, table), gradient(right, table))


def check_discriminator_loss(ask):
    h_demo, h_policy = randn(3).requires_grad_(), randn(5, seed=1)
    got, right = ask(h_demo, h_policy, shape=()), divergences.discriminator_loss(h_demo, h_policy)
    demo, policy = softplus(-h_demo).mean(), softplus(h_policy).mean()
    compare("The loss", got, right, (
        ("The labels are swapped: D is high at demonstrations, or the reward leads away from them.",
         divergences.discriminator_loss(h_policy, h_demo)),
        ("Sums where means belong: take the mean of each source.", 3 * demo + 5 * policy),
        ("Half of it: add the two means, do not average them.", (demo + policy) / 2),
        ("One mean over both: the best logit is off by log(N/M).", (3 * demo + 5 * policy) / 8),
        ("The sign is wrong: this is the log-likelihood, the loss is minus that.", -right),
        ("The logs are missing.", -h_demo.sigmoid().mean() - (-h_policy).sigmoid().mean()),
        ("Both have label 1: samples need log(1 - D).", demo + softplus(-h_policy).mean()),
        ("The policy's half is missing: D = 1 everywhere would be best.", demo)))
    compare("The gradient", gradient(got, h_demo), gradient(right, h_demo))
    large = torch.tensor([800.0, -800.0], dtype=torch.float64)
    if not same(ask(large, large, shape=()), divergences.discriminator_loss(large, large)):
        raise Hint("Right for small logits, wrong at |h| = 800, where a sigmoid is rounded to 0 "
                   "and its log is -inf: use F.logsigmoid(h), which is -F.softplus(-h).")


def check_jeffreys_reward(ask):
    log_beta, log_pi = randn(6).log_softmax(-1), randn(6, seed=1).log_softmax(-1)
    h, pi = log_beta - log_pi, log_pi.exp().requires_grad_()
    got, u = ask(h, shape=(6,)).double(), log_beta.exp() / pi
    right = -gradient((pi * (u - 1) * u.log()).sum(), pi)       # -d/dpi of pi f(beta/pi)
    f, u = (u.detach() - 1) * h, u.detach()
    compare("The reward, less its first entry,", got - got[0], right - right[0], [
        (hint, wrong - wrong[0]) for hint, wrong in (
            ("The sign is wrong: this leads away from the demonstrator.", -right),
            ("This is -f(u), FAIRL's mistake (a caution in divergences.py).", -f),
            ("This is f(u); the reward is r = u f'(u) - f(u).", f),
            ("This is f'(u) = T*, the witness; the reward is f* of it.", h - 1 / u),
            ("A sign slipped: one term of r has the wrong sign. Take u f'(u) - f(u) again.", u - h),
            ("A sign slipped: one term of r has the wrong sign. Take u f'(u) - f(u) again.", h - u),
            ("A sign slipped: r is u f'(u) *minus* f(u).", u * h + u + f),
            ("A sign slipped in the exponent: u = e^h, not e^(-h).", h + 1 / u),
            ("This is the reverse KL's reward: f is the sum of two rows of the table.", h),
            ("This is the forward KL's reward: f is the sum of two rows of the table.", u))])


def check_soft_value_iteration(ask):
    P, reward, tau = randn(3, 2, 3).softmax(-1), randn(3, 2, seed=1), 0.5
    got = ask(P, reward, 4, tau, shape=(4, 3))
    right = gridworld.soft_value_iteration(P, reward, 4, tau)[0]

    def plan(value, P=P):
        V, values = torch.zeros(3, dtype=torch.float64), []
        for _ in range(4):
            V = value(reward + P @ V)
            values.append(V)
        return torch.stack(values[::-1])
    compare("V", got, right, (
        ("The order is wrong: V[0] is the start, with all of the time to come.", right.flip(0)),
        ("A hard maximum: the soft one is tau logsumexp(Q / tau).", plan(lambda Q: Q.amax(-1))),
        ("The temperature is not used.", plan(lambda Q: Q.logsumexp(-1))),
        ("tau is missing in front of the logsumexp.", plan(lambda Q: (Q / tau).logsumexp(-1))),
        ("The entropy is missing: this is E[Q] under the soft policy.",
         plan(lambda Q: ((Q / tau).softmax(-1) * Q).sum(-1))),
        ("P is summed over the wrong state: P[s,a,s'] V[s'] sums over s'.",
         plan(lambda Q: tau * (Q / tau).logsumexp(-1), P.transpose(0, 2)))))


def check_log_ratio_reward(ask):
    sft, init = randn(3, 4, 5).log_softmax(-1), (3 * randn(3, 4, 5, seed=1)).log_softmax(-1)
    tokens, floor = init.argmin(-1), 0.3    # where pi_0 finds the word implausible the floor works
    tokens[:, 2] = init[:, 2].argmax(-1)
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    got = ask(sft, init, tokens, mask, floor, shape=(3,))
    policy = SimpleNamespace(logits=lambda hidden: hidden, config=None, wte=None)

    def reward(ratio, mask=mask):
        return (ratio.gather(-1, tokens[..., None]).squeeze(-1) * mask).sum(1)
    ratio, top = LogRatio(policy, policy, floor).logp_and_ratio(sft, init)[1], init.amax(-1, True)
    line, right = top + math.log(floor), reward(ratio)
    compare("The reward", got, right, (
        ("The sign is wrong: reward what pi_SFT writes more often than pi_0.", -right),
        ("A mean over tokens: the optimum of Init-SFT is their sum.", right / mask.sum(1)),
        ("The mask is not used: prompt and padding earn.", reward(ratio, torch.ones_like(mask))),
        ("The floor is not used: this is the plain log-ratio.", reward(sft - init)),
        ("The floor is absolute: it is a share of pi_0's likeliest token.",
         reward(sft - init.clamp(min=math.log(floor)))),
        ("A floor lifts pi_0: maximum, not minimum.", reward(sft - init.minimum(line))),
        ("floor belongs into a log: its log is added.", reward(sft - init.maximum(top + floor)))))


def check_best_of_n(ask):
    scores, gold, n = randn(4, 6), randn(4, 6, seed=1), 3
    got, row = ask(scores, gold, n, shape=()), torch.arange(4)
    picks = [gold[row, torch.tensor(s)[scores[:, list(s)].argmax(1)]]
             for s in itertools.combinations(range(6), n)]
    right, by_score = torch.stack(picks).mean(), gold.gather(1, scores.argsort(1))

    def mean(values, k=n - 1):
        weights = torch.tensor([math.comb(r, k) / math.comb(6, n) for r in range(6)]).double()
        return (values * weights).sum(1).mean()
    compare("The mean golden reward", got, right, (
        ("It picks by gold: the selector sees scores only.", mean(gold.sort(1).values)),
        ("This is the mean *score* of the picks; gold counts.", mean(scores.sort(1).values)),
        ("This is the best of all N, whatever n is.", by_score[:, -1].mean()),
        ("The first n only: noisy. Use every subset.", gold[row, scores[:, :n].argmax(1)].mean()),
        ("Sorted the wrong way: the worst of n.", mean(gold.gather(1, (-scores).argsort(1)))),
        ("Weights by place meet gold in its old order: sort it.", mean(gold)),
        ("Off by one: n - 1 others come from the r below.", mean(by_score, n)),
        ("A sum over prompts where a mean belongs.", 4 * right)))


def check_leave_one_out(ask):
    rewards = randn(3, 4)
    got, right = ask(rewards, shape=(3, 4)), divergences.leave_one_out(rewards)
    centred, std = rewards - rewards.mean(1, True), rewards.std(1, keepdim=True)
    compare("The advantage", got, right, (
        ("The baseline holds the sample itself: the gradient shrinks to (K - 1)/K.", centred),
        ("Off by one: the others are K - 1.", rewards - (rewards.sum(1, True) - rewards) / 4),
        ("This is the baseline; the advantage is the reward less that.", rewards - right),
        ("The sign is wrong: a reward above the others' is an advantage.", -right),
        ("A mean over prompts: a prompt's samples lie along dim 1.", rewards - rewards.mean(0)),
        ("One baseline for all: easy prompts would look good.", rewards - rewards.mean()),
        ("Divided by a standard deviation, as in GRPO: not here.", centred / std)))


def check_forward_kl(ask):
    log_beta, log_pi = randn(5).log_softmax(-1), randn(5, seed=1).log_softmax(-1)
    right = divergences.forward_kl(log_beta, log_pi)
    compare("The KL", ask(log_beta, log_pi, shape=()), right, (
        ("The arguments are swapped: F.kl_div(input, target) is KL(target || input), so this is "
         "the reverse KL, KL(pi || beta).", divergences.reverse_kl(log_beta, log_pi)),
        ("A mean over outcomes: a KL is a sum, an expectation already. 'batchmean' and 'mean' "
         "divide by N.", right / 5),
        ("Two mistakes: 'batchmean' divides by N, a KL is a sum; and the arguments are swapped.",
         divergences.reverse_kl(log_beta, log_pi) / 5)))


def check_sft_loss(ask):
    tokens = torch.tensor([[5, 6, 7, 1, 1, 1], [4, 5, 7, 6, 8, 1], [6, 4, 5, 7, 5, 6]])
    prompt, lengths, logp = torch.tensor([1, 2, 3]), torch.tensor([4, 6, 6]), -randn(3, 6).abs()
    mask, t = Batch(tokens, prompt, lengths).response_mask(), torch.arange(6)

    def loss(mask):
        return -(logp * mask).sum() / mask.sum()
    compare("The loss", ask(logp, tokens, prompt, lengths, 1, shape=()), loss(mask), (
        ("The EOS that ends a response is not in the loss: the mask goes by its id and takes it "
         "for padding. Go by the lengths.", loss((t >= prompt[:, None]) & (tokens != 1))),
        ("Now padding is in the loss: after the end nothing is an action.",
         loss(t >= prompt[:, None])),
        ("EOS is left out: lengths count it.", loss(mask & (t < lengths[:, None] - 1))),
        ("A sum over t: asked for is a mean over actions.", -(logp * mask).sum(1).mean())))


def check_soft_value(ask):
    kl_coef, tables = 0.7, (randn(3, 4, 2).log_softmax(-1), randn(3, 4, 2, seed=9))
    logp, reward = ([table[t, :2 ** t] for t in range(3)] for table in tables)
    got = ask(logp, reward, kl_coef, shape=(1,))
    y_logp, y_reward = (token_mdp.sequence_log_prob(table[None])[0]
                        for table in tables)                # (8,): sums along each sequence
    compare("The value", got, kl_coef * (y_logp + y_reward / kl_coef).logsumexp(0, True), (
        ("A hard maximum: the value of one response. The best policy mixes: V = kl_coef log sum_a "
         "pi_SFT(a|s) e^(Q/kl_coef).", (y_reward + kl_coef * y_logp).amax()),
        ("The KL to pi_SFT costs nothing here.", y_reward.amax()),
        ("A mean where log-sum-exp belongs: pi_SFT's own reward.", (y_logp.exp() * y_reward).sum()),
        ("pi_SFT is missing: reward plus entropy.", kl_coef * (y_reward / kl_coef).logsumexp(0))))


def check_policy_loss(ask):
    log_beta, logits = randn(5).log_softmax(-1), randn(5, seed=1).requires_grad_()
    got = gradient(ask(log_beta, logits, shape=()), logits)
    logp = logits.log_softmax(-1)
    right = gradient(divergences.forward_kl(log_beta, logp), logits)
    undetached = gradient(-(logp.exp().detach() * (log_beta - logp).exp() * logp).sum(), logits)
    compare("The gradient", got, right, (
        ("The reward is not detached: its own slope adds E_pi[log pi grad r].", undetached),
        ("The sign is wrong: the loss is minus E_pi[r log pi].", -right)))


def check_logit_reward(ask):
    tokens = torch.tensor([[0, 1, 2, 3, 0], [3, 2, 1, 0, 2], [1, 1, 0, 2, 3]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]).bool()
    logits = 2 * randn(3, 5, 4)
    got = ask(logits, tokens, mask, shape=(3, 5))
    V, f = logits.logsumexp(-1), logits.gather(-1, tokens[..., None]).squeeze(-1)
    after, value = pad(V[:, 1:], (0, 1)), pad(V[:, 1:] * mask[:, 1:], (0, 1))
    right = torch.zeros(3, 5, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        goes_on = t < 4 and mask[b, t + 1]
        right[b, t] = f[b, t] - (V[b, t + 1] if goes_on else 0)
    compare("The reward", got, right, (
        ("This is log pi(a|s): take V of the *next* state off, not of this one.", (f - V) * mask),
        ("V(s') has the wrong sign.", (f + value) * mask),
        ("The sign is wrong: a likely token has a high logit.", -right),
        ("V must be 0 after the response's last token: nothing comes after it.",
         (f - after) * mask),
        ("The last V is wrapped round: after the last column there is no next state.",
         (f - V.roll(-1, 1)) * mask),
        ("The mask is not used: prompt and padding earn.", f - value),
        ("This is the logit alone: V(s') is missing.", f * mask),
        ("V(s) is counted twice: f is log pi + V(s) already.", (f + V - value) * mask),
        ("V(s) is missing: log pi(a|s) - V(s') is not f(s,a) - V(s').", (f - V - value) * mask),
        ("A hard maximum: V is the logsumexp of the logits.",
         (f - pad(logits.amax(-1)[:, 1:] * mask[:, 1:], (0, 1))) * mask)))


def check_batches(ask):
    lengths = torch.tensor([4] * 96 + [8] * 96 + [16] * 128)[randn(320).argsort()]
    generator = torch.Generator().manual_seed(0)
    epochs = [ask(lengths, 32, generator, shape=(10, 32)).long() for _ in range(50)]
    if any((rows.flatten().sort().values != torch.arange(320)).any() for rows in epochs):
        raise Hint("Each text must be in one batch of an epoch, once.")
    if all(torch.equal(rows, epochs[0]) for rows in epochs):
        raise Hint("All epochs are the same: draw with the generator.")
    # A policy that knows all but how long to write: the mean of its batch losses is
    # -sum_i log P(length_i) / tokens of i's batch, least at P(n) = the weight of length n.
    weight = torch.zeros(320, dtype=torch.float64)
    for rows in epochs:
        weight[rows] += 1 / lengths[rows].sum(1, keepdim=True)
    P = torch.stack([weight[lengths == n].sum() for n in (4, 8, 16)]) / weight.sum()
    # at random a text's own length is 1 of 32 in the mean: that bias is below 0.01
    if (P - torch.tensor([0.3, 0.3, 0.4])).abs().max() > 0.02:
        raise Hint("A policy trained on such batches ends at P(4, 8, 16 tokens) = "
                   + ", ".join(f"{p:.2f}" for p in P.tolist()) + "; the texts have 0.30, 0.30, "
                   "0.40. A text weighs 1 / (tokens of its batch), so its length must not decide "
                   "which texts stand beside it.")


# the checker of each exercise, and where the project itself does what the exercise asks for
CHECKERS = {
    1: (check_response_mask, Batch.response_mask),
    2: (check_forward_kl_loss, divergences.sft_loss),
    3: (check_discriminator_loss, divergences.discriminator_loss),
    4: (check_jeffreys_reward, divergences.Divergence),
    5: (check_soft_value_iteration, gridworld.soft_value_iteration),
    6: (check_log_ratio_reward, LogRatio.logp_and_ratio),
    7: (check_best_of_n, best_of_n_weights),
    8: (check_leave_one_out, divergences.leave_one_out),
    9: (check_forward_kl, divergences.forward_kl),
    10: (check_sft_loss, Batch.response_mask),
    11: (check_soft_value, gridworld.soft_value_iteration),
    12: (check_policy_loss, divergences.policy_surrogate),
    13: (check_logit_reward, shaping.logit_rewards),
    14: (check_batches, random_batches)}


def file_of(number, folder):
    return next(folder.glob(f"{number:02d}_*.py"), None)


def function_of(number):
    """The name of the function that an exercise asks for."""
    return CHECKERS[number][0].__name__.removeprefix("check_")


def effort(number):
    """(minutes, points, difficulty) of an exercise, from its docstring."""
    text = file_of(number, EXERCISES).read_text(encoding="utf-8")
    minutes, points, difficulty = re.search(r"(\d+) minutes, (\d) points?, (\w+)\.", text).groups()
    return int(minutes), int(points), difficulty


def check(number, folder=EXERCISES):
    """(state, message): "solved", "not started" or "not right yet", and what there is to say."""
    checker, own = CHECKERS[number]
    path = file_of(number, folder)
    try:
        if path is None:
            raise Hint(f"There is no file {number:02d}_*.py in {folder}.")
        ask = load(path, function_of(number))
        checker(ask)
    except Hint as hint:
        message = str(hint)
        if isinstance(hint, WrongNumber):
            message = "\n  ".join([message, *(listed(*item) for item in ask.inputs.items())])
        begun = path is not None and "returns None" not in message
        return "not right yet" if begun else "not started", message
    file = Path(inspect.getsourcefile(own)).resolve().relative_to(PROJECT).as_posix()
    return "solved", (f"solved. The project's own: {own.__qualname__} in {file}, "
                      f"line {inspect.getsourcelines(own)[1]}")


def parse(argv):
    """The command line. Raises InputError."""
    parser = argparse.ArgumentParser(prog="check.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = ", ".join(map(str, CHECKERS))
    parser.add_argument("number", nargs="?", help=f"one of {numbers}; without it all are listed")
    parser.add_argument("--folder", type=Path, default=EXERCISES,
                        help="where your files are, under their names here (default: exercises/)")
    parser.add_argument("--json", action="store_true", help="for graders: a line of JSON for each "
                        "exercise; what the students' code prints goes to stderr")

    def refuse(message):
        raise InputError(f"{message} (--help says what there is)")
    parser.error = refuse
    args = parser.parse_args(argv)
    require(args.number is None or args.number in numbers.split(", "),
            f"there is no exercise {args.number}; give one of {numbers}, or nothing for all")
    return args


def main(argv):
    args = parse(argv)
    require(args.folder.is_dir(), f"{args.folder}: there is no such folder")
    numbers = [int(args.number)] if args.number else list(CHECKERS)
    earned = possible = 0
    for number in numbers:
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            state, message = check(number, args.folder)
        minutes, points, difficulty = effort(number)
        earned, possible = earned + points * (state == "solved"), possible + points
        if args.json:
            print(json.dumps({"number": number, "state": state, "message": message,
                              "points": points * (state == "solved"), "of": points}))
        elif args.number:
            print(f"exercise {number}: {message}")
        else:
            print(f"{number:>2}  {function_of(number):<22}{plural(points, 'points'):<10}"
                  f"{minutes:>2} minutes  {difficulty:<8}{state}")
    if not args.json and not args.number:
        print(f"{earned} of {possible} points")
    if args.number:
        sys.exit(state != "solved")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
