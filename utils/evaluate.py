"""The truth beside every number: what the golden reward and the demonstrator's density say of a
writer. No method that learns from demonstrations alone sees either; `preference` and DPO get labels
made from golden, unless the data has people's. Rows of results.json are made here.

Shapes: P held-out prompts, M responses to each. Golden reward in points per response; proxy
rewards, entropy and KLs in nats per sequence.

    kl_from_sft   E_pi[log pi - log pi_SFT]: how far the writer has moved
    entropy       E_pi[-log pi]
    distinct      share of different responses among 8 to one prompt
    reverse_kl    E_pi[log pi - log d_beta]: high if it writes what the demonstrator would not
    forward_kl    E_beta[log d_beta - log pi]: high if it would not write what the demonstrator does

Of a best-of-n selector the density is not known sample by sample, but E[log pi - log pi_SFT] is:
reward.best_of_n_kl. Hence its entropy, a lower bound, and its reverse KL, an upper one.
Its forward KL would need the density at demonstrations, and its distinct share fresh candidates.
"""

import math
import time
from dataclasses import dataclass

import numpy as np

import train
from model import logp_seq
from reward import (LogRatio, RewardModel, best_of_n_kl, best_of_n_weights, calibration, mean_ci,
                    rank_correlation, score, win_rate)
from utils.checkpoints import save_reward

SAMPLES = 8         # responses of each policy to each held-out prompt
BROWSED = 40        # held-out prompts whose candidates are all kept, to be looked at


@dataclass
class Responses:
    """What one writer wrote to the held-out prompts."""
    texts: list             # [prompt][response]
    pairs: list             # flat (prompt ids, response ids), a prompt's responses together
    lengths: np.ndarray     # (P, M) tokens, EOS included
    gold: np.ndarray        # (P, M) points, or None where nobody knows
    density: np.ndarray     # (P, M) log d_beta(y|x), marks aside; or None where nobody knows


def read(world, rows):
    """The Responses of response ids, rows[prompt][response]."""
    ids = [world.tokenizer.encode(x) for x in world.test_prompts]
    texts = [[world.text(y) for y in row] for row in rows]

    def every(function):
        return function and np.array([[function(x, y) for y in row]
                                      for x, row in zip(world.test_prompts, texts)])
    return Responses(texts, [(x, y) for x, row in zip(ids, rows) for y in row],
                     np.array([[len(y) for y in row] for row in rows], float),
                     every(world.golden), every(world.demo_logp))


class Truth:
    """One seed's judge: `rows` collects what each method achieves on the held-out prompts.

    run: its bookkeeping; each writer's samples are a stage of it, with randomness of their own.
    """

    def __init__(self, world, task, init, sft, n_candidates, run):
        self.world, self.run, self.sft, self.rows = world, run, sft, []
        self.source = {"task": task, "seed": run.seed}

        def demonstrations(strip):      # cut and read as the policy's responses are
            return read(world, [[world.pair(x, strip(y))[1] for y in row]
                                for x, row in zip(world.test_prompts, world.test_demos)])
        self.demo = demonstrations(str)
        self.unmarked = demonstrations(world.unmark) if world.unmark else self.demo
        self.candidates = self.write(
            sft, n_candidates, "candidates", f"5 best-of-N: {n_candidates} candidates to each "
                                             f"held-out prompt, of {len(world.test_prompts)}")
        self.rival = self.write(sft, SAMPLES, "rivals")     # not to pick from
        self.sft_logp = self.logp(sft, self.candidates.pairs, n_candidates).reshape(
            self.candidates.lengths.shape)
        self.init = self.add_policy("init", init)
        self.add_row("sft", self.candidates, logp=self.sft_logp, kl_from_sft=0.0,
                     forward_kl=self.forward_kl(sft))
        self.add_row("demo", self.demo, logp=self.demo.density,
                     forward_kl=None if self.demo.density is None else 0.0)

    def write(self, policy, n, label, says=None):
        """Responses of a policy: n samples to each held-out prompt."""
        ids = [self.world.tokenizer.encode(x) for x in self.world.test_prompts]
        own = f"{label} samples"        # a stage and randomness of their own
        return read(self.world, self.run.stage(
            label if says else own, says,
            lambda: self.world.sample(policy, ids, n, self.run.generator(own), label)))

    def logp(self, policy, pairs, n=1):
        """log pi(y|x) of each pair, of which n in a row have the same prompt."""
        return score(lambda batch: logp_seq(policy, batch), pairs, self.run.device, n=n)

    def forward_kl(self, policy, every=1):
        """E_beta[log d_beta - log pi] over held-out demonstrations without their marks, one in
        `every` of them; None where the demonstrator's density is unknown."""
        if self.unmarked.density is None:
            return None
        logp = self.logp(policy, self.unmarked.pairs[::every])
        return float((self.unmarked.density.ravel()[::every] - logp).mean())

    def watch(self, policy, pairs):
        """What the truth says of a policy in training and of a batch of its samples, which answer
        training prompts: means of whatever the world knows."""
        start = time.perf_counter()
        texts = [(self.world.text(x), self.world.text(y)) for x, y in pairs]
        record = {"length": sum(len(y) for _, y in pairs) / len(pairs)}
        for name, function in (("golden", self.world.golden), ("demo_logp", self.world.demo_logp)):
            if function:
                record[name] = sum(function(*text) for text in texts) / len(texts)
        if self.world.demo_logp:
            record["forward_kl"] = self.forward_kl(policy, every=16)
        self.run.watching += time.perf_counter() - start
        return record

    def add_row(self, method, responses, weights=None, logp=None, **columns):
        """One row: means over prompts of the responses under `weights` (P, M), equal if None.

        logp (P, M): the writer's own log-density, where it is known.
        """
        if weights is None:
            weights = np.full(responses.lengths.shape, 1 / responses.lengths.shape[1])

        def mean(values):
            return None if values is None else float((weights * values).sum(1).mean())
        row = {**self.source, "method": method, "reward_model": None, "n": 1, "beta": None,
               **dict.fromkeys(("gold_mean", "gold_ci95", "win_vs_sft", "win_vs_demo",
                                "proxy_mean", "kl_from_sft"))}
        if responses.gold is not None:
            row["gold_mean"], row["gold_ci95"] = mean_ci((weights * responses.gold).sum(1))
            row["win_vs_sft"] = mean(win_rate(responses.gold, self.rival.gold))
            row["win_vs_demo"] = mean(win_rate(responses.gold, self.demo.gold))
        known = logp is not None and responses.density is not None
        self.rows.append({
            **row, "length_mean": mean(responses.lengths),
            "entropy": None if logp is None else -mean(logp),
            "distinct": None if method == "bon" else distinct(responses.texts),
            "forward_kl": None, "reverse_kl": mean(logp - responses.density) if known else None,
            "seconds": None, **columns})

    def add_policy(self, method, policy, reward=None, seconds=None, **columns):
        """A row of a policy from fresh samples; reward: the proxy it was optimised for, if any."""
        label = " ".join([method, *(str(value) for value in columns.values())])
        responses = self.write(policy, SAMPLES, label)
        logp = self.logp(policy, responses.pairs, SAMPLES)
        proxy = None
        if reward is not None:
            proxy = float(score(reward, responses.pairs, self.run.device, n=SAMPLES).mean())
        self.add_row(method, responses, logp=logp.reshape(responses.lengths.shape),
                     proxy_mean=proxy,
                     kl_from_sft=float(
                         (logp - self.logp(self.sft, responses.pairs, SAMPLES)).mean()),
                     forward_kl=self.forward_kl(policy), seconds=seconds, **columns)
        return responses

    def add_best_of_n(self, name, values):
        """Rows of best-of-n by scores (P, N) of the candidates, n = 1, 2, 4, ... N."""
        for n in (2 ** k for k in range(values.shape[1].bit_length())):
            weights = best_of_n_weights(values, n)
            kl = 0.0 if name == "random" else best_of_n_kl(n)
            self.add_row("bon", self.candidates, weights, self.sft_logp + kl, reward_model=name,
                         n=n, proxy_mean=float((weights * values).sum(1).mean()), kl_from_sft=kl)


def distinct(texts):
    """Share of different responses among the first 8 to a prompt: the mean over prompts."""
    return float(np.mean([len(set(row[:SAMPLES])) / len(row[:SAMPLES]) for row in texts]))


# ---- a judge in golden's place -------------------------------------------------------------------

def train_judge(world, run, init, schedule):
    """Set world.golden to a Bradley-Terry model trained on world.judge_pairs, which no learner saw,
    and world.gold to what it is, with its agreement with people on the held-out prompts' pairs.

    r(x, y) is the log-odds of being preferred, up to a constant of each prompt. The checkpoint goes
    to the seed's folder, as `judge`.
    """
    rng = run.rng("judge")
    items, held = train.split([(world.pair(x, chosen), world.pair(x, rejected))
                               for x, chosen, rejected in world.judge_pairs], 0.05, rng)
    judge, history = run.trained(
        "judge", f"1 judge: trained on {len(items):,} pairs that no learner sees",
        RewardModel(init), lambda: train.train_reward(
            init, items, held, train.preference_step, schedule, rng, label="judge",
            snapshot=run.snapshot("judge")))
    run.log("judge", history)
    save_reward(run.out / f"seed{run.seed}" / "judge", judge, world.tokenizer)
    agreement, ci = human_agreement(judge, world, run.device)
    world.gold = (f"judge trained on a disjoint half of the pairs ({len(world.judge_pairs):,} "
                  f"pairs, held-out agreement {agreement:.3f} +- {ci:.3f})")

    def golden(prompt, response):       # alone: in a batch the last digits would be its company's
        return float(score(judge, [world.pair(prompt, response)], run.device)[0])
    world.golden = golden


def judge_note(gold):
    """What a reader has to know of golden numbers where golden is a judge, gold its description."""
    return (f"Golden is no truth here but a {gold}, in log-odds of being preferred instead of "
            "points. It starts from pi_0, as the rewards do that it judges: what pi_0 cannot tell "
            "apart, all of them may miss.")


def human_agreement(reward, world, device):
    """(share of the held-out pairs of which the reward prefers the chosen answer, ties half; its
    95% half-width by Agresti and Coull: with two successes and two failures added, so that 14 of 14
    is no certainty). Source: The American Statistician 52, 1998."""
    chosen, rejected = (score(reward, [world.pair(p[0], p[k]) for p in world.human_pairs], device)
                        for k in (1, 2))
    agreed = (chosen > rejected) + (chosen == rejected) / 2
    n = len(agreed) + 4
    share = (agreed.sum() + 2) / n
    return float(agreed.mean()), 1.96 * math.sqrt(share * (1 - share) / n)


# ---- what the reward models learned --------------------------------------------------------------

def inspect_rewards(world, seed, rewards, scores, candidates, device):
    """What each reward model has learned: one record a model.

    accuracy and calibration on its own held-out pairs; rank correlation within a prompt with the
    golden reward and with length; what the demonstrator's marks are worth to it, in standard
    deviations of its scores; how often it agrees with people on held-out pairs.
    """
    records = []
    for name, (reward, held) in rewards.items():
        mine = scores[name]
        record = {"seed": seed, "reward_model": name,
                  **held_out_quality(reward, held, name, device),
                  "corr_golden": (None if candidates.gold is None
                                  else rank_correlation(mine, candidates.gold)),
                  "corr_length": rank_correlation(mine, candidates.lengths),
                  "marks_worth": None, "human_agreement": None, "human_ci95": None,
                  "human_pairs": len(world.human_pairs)}
        if world.unmark and not isinstance(reward, LogRatio):    # to which they are -inf
            marked, plain = (score(reward, [world.pair(x, strip(y)) for x, y in world.demos[:500]],
                                   device) for strip in (str, world.unmark))
            spread = float(mine.std())
            record["marks_worth"] = float((marked - plain).mean()) / spread if spread else None
        if world.human_pairs:
            record["human_agreement"], record["human_ci95"] = human_agreement(reward, world, device)
        records.append(record)
    return records


def held_out_quality(reward, items, name, device):
    """Accuracy and calibration error on held-out (better, worse) pairs; nan without any.

    A discriminator's logits are judged against their labels one by one; Bradley-Terry rewards are
    defined up to a constant, so their differences are, in both orders.
    """
    better, worse = (score(reward, [item[k] for item in items], device) for k in (0, 1))
    if not items:
        return {"accuracy": math.nan, "calibration_error": math.nan}
    if name == "preference":
        better, worse = better - worse, worse - better
    logits, labels = np.concatenate([better, worse]), np.repeat([1.0, 0.0], len(better))
    return {"accuracy": float(((logits > 0) == (labels > 0)).mean()),
            "calibration_error": calibration(logits, labels)}


# ---- what is said at the end ---------------------------------------------------------------------

COMPARISONS = (("init-sft", "sft"), ("init-sft", "demo"), ("init-sft", "init-demo"),
               ("init-demo", "sft-demo"), ("log-ratio", "init-sft"), ("floored", "log-ratio"),
               ("floored", "init-sft"))


WRITERS = {"init": "pi_0", "sft": "pi_SFT", "demo": "demonstrations"}   # that no reward chose


def name_of(row):
    """A row's name in tables: a selector's is its reward model's, a policy's says how it came."""
    if row["method"] == "bon":
        return row["reward_model"]
    parts = [row["method"], row["reward_model"], row["beta"] and f"{row['beta']:g}"]
    return " ".join(part for part in parts if part)


def summarise(rows, n):
    """Means over seeds with Student's t intervals, best-of-n throughout: the golden reward of each
    method, its share of the golden selector's gain over SFT, and paired differences. None where
    nobody knows the golden reward.
    """
    gold = {(r["seed"], name_of(r)): r["gold_mean"] for r in rows
            if r["n"] == (n if r["method"] == "bon" else 1)}
    if None in gold.values():
        return None
    seeds, names = sorted({seed for seed, _ in gold}), list(dict.fromkeys(name for _, name in gold))

    def share(seed, name):
        sft, best = gold[seed, "sft"], gold[seed, "golden"]
        return (gold[seed, name] - sft) / (best - sft) if best > sft else math.nan

    names = [name for name in names if all((k, name) in gold for k in seeds)]
    methods = {name: {"gold": mean_ci([gold[k, name] for k in seeds]),
                      "share_of_golden_gain": mean_ci([share(k, name) for k in seeds])}
               for name in names}
    differences = []
    for a, b in COMPARISONS:
        if a in names and b in names:
            mean, ci = mean_ci([gold[k, a] - gold[k, b] for k in seeds])
            differences.append({"a": a, "b": b, "mean": mean, "ci95": ci})
    return {"n": n, "seeds": seeds, "methods": methods, "differences": differences}


def pick_samples(truth, scores, n, optimised):
    """Per held-out prompt, side by side: a sample of pi_0, one of pi_SFT, the pick of n by the
    first reward model, a sample of the optimised policy if there is one, a demonstration; each with
    its golden reward. For the first BROWSED of them all candidates, with every selector's scores.
    """
    name, proxy = next(iter(scores.items()))

    def said(responses, i, j, proxy=None):
        return {"text": responses.texts[i][j],
                "golden": None if responses.gold is None else float(responses.gold[i][j]),
                "proxy": None if proxy is None else float(proxy[i][j])}

    samples = []
    for i, prompt in enumerate(truth.world.test_prompts):
        side = {"pi_0": said(truth.init, i, 0), "pi_SFT": said(truth.candidates, i, 0, proxy),
                f"{n}, {name}": said(truth.candidates, i, int(proxy[i][:n].argmax()), proxy)}
        if optimised:
            side["optimised"] = said(optimised, i, 0)
        side["demonstration"] = said(truth.demo, i, 0)
        if truth.world.unmark:      # with its marks, which the policy's tokenizer does not know
            side["demonstration"]["text"] = truth.world.test_demos[i][0]
        samples.append({"prompt": prompt, "writers": side})
        if i < BROWSED:
            samples[i]["candidates"] = {
                "text": truth.candidates.texts[i],
                "scores": {key: [float(f"{v:.7g}") if v == v else None for v in values[i]]
                           for key, values in scores.items()}}
    return samples
