"""How good is a policy or a selector? Golden reward, win rates and KLs on held-out prompts.

No method that learns from demonstrations alone sees any of this. Only `preference` and DPO get
labels made from golden, unless the data has people's. Rows of results.json are made here.

Shapes: P held-out prompts, M responses to each, N of them candidates of best-of-N, G groups of n
candidates. Golden reward is in points per response; proxy rewards, entropies and KLs are in nats
per response.

    golden        E_pi[golden reward], with a 95% interval over prompts
    proxy         E_pi[the reward that the method maximised]
    win_vs_sft    P(golden reward above that of another sample of pi_SFT), ties half; win_vs_demo
                  the same against a demonstration
    kl            E_pi[log pi - log pi_SFT]: how far the policy has moved
    reverse_kl    E_pi[log pi - log d_beta]: high if it writes what the demonstrator would not
    forward_kl    E_beta[log d_beta - log pi]: high if it would not write what the demonstrator does
    entropy       E_pi[-log pi]
    distinct      share of different responses among SAMPLES to one prompt
"""

import math
from dataclasses import dataclass

import numpy as np

from divergences import DIVERGENCES
from model import generate, logp_seq
from reward import REWARD_MODELS, LogRatio, best_of_n_kl, best_of_n_weights, score
from utils.cli import plural, require

SAMPLES = 8         # responses of each policy to each held-out prompt
BROWSED = 40        # held-out prompts whose candidates can all be read in the report


# ---- responses ----------------------------------------------------------------------------------

@dataclass
class Responses:
    """The responses of one writer to the held-out prompts."""
    texts: list             # [prompt][response]
    pairs: list             # flat (prompt ids, response ids), a prompt's responses together
    lengths: np.ndarray     # (P, M) tokens, EOS included
    golden: np.ndarray      # (P, M) points; None where nobody knows
    demo_logp: np.ndarray   # (P, M) log d_beta(y|x), marks aside; None where nobody knows


def read_responses(world, rows):
    """The Responses of response ids rows[prompt][response], with what the world knows of them."""
    ids = [world.tokenizer.encode(x) for x in world.test_prompts]
    texts = [[world.text(y) for y in row] for row in rows]

    def table(function, prompts=world.test_prompts, rows=texts):
        if function is None:
            return None
        return np.array([[function(x, y) for y in row] for x, row in zip(prompts, rows)])
    # A model in golden's place reads the ids as they were sampled.
    golden = table(world.golden_ids, ids, rows) if world.golden_ids else table(world.golden)
    return Responses(texts, [(x, y) for x, row in zip(ids, rows) for y in row],
                     np.array([[len(y) for y in row] for row in rows], float),
                     golden, table(world.demo_logp))


def sample_responses(world, policy, n, generator, label=None):
    """The Responses of a policy: n samples to each held-out prompt."""
    ids = [world.tokenizer.encode(x) for x in world.test_prompts]
    return read_responses(world, generate(policy, ids, n, max_new_tokens=world.max_response,
                                          generator=generator, label=label))


# ---- methods and their names --------------------------------------------------------------------

METHODS = ("po init-sft 0.3", "closed-form log-ratio 0.3", "closed-form floored 0.3",
           "adversarial reverse_kl", "adversarial forward_kl", "adversarial-exact reverse_kl",
           "adversarial-exact forward_kl", "temperature 0.5", "spin", "irft",
           "dpo")                                                       # --methods all
# The words that follow a method's family: one of these names, or a number below its bound.
BOUNDS = {"BETA": math.inf, "T": 1.0}
FORMS = {"po": ("|".join(REWARD_MODELS), "BETA"), "closed-form": ("log-ratio|floored", "BETA"),
         "adversarial": ("|".join(DIVERGENCES),), "adversarial-exact": ("|".join(DIVERGENCES),),
         "temperature": ("T",), "spin": (), "irft": (), "dpo": ()}
FAMILIES = {"init": "pi_0", "po": "policy optimisation", "closed-form": "closed form"}


def parse_methods(text):
    """The list of a --methods flag: "spin, po init-sft .3" -> ["spin", "po init-sft 0.3"].

    "all" is METHODS, "none" is empty. A method so written names its row and its random stream.
    Raises InputError.
    """
    methods = []
    for part in {"all": ",".join(METHODS), "none": ""}.get(text, text).split(","):
        if not part.strip():
            continue
        family, *words = part.split()
        require(family in FORMS, f"--methods: unknown {family!r}; known: {', '.join(FORMS)}")
        form = FORMS[family]
        fits = len(words) == len(form) and all(
            kind in BOUNDS or word in kind.split("|") for kind, word in zip(form, words))
        require(fits, f"--methods: {part.strip()!r} must have the form: "
                + " ".join([family, *form]))
        if form and form[-1] in BOUNDS:     # a number comes last
            try:
                value = float(words[-1])
            except ValueError:
                value = math.nan
            require(0 < value < BOUNDS[form[-1]], f"--methods: {form[-1]} must be a number above 0 "
                    f"and below {BOUNDS[form[-1]]:g}, not {words[-1]}")
            words[-1] = f"{value:g}"
        methods.append(" ".join([family, *words]))
    return list(dict.fromkeys(methods))     # each once


def row_name(method):
    """The table's name of a method: "po init-sft 0.3" -> "policy optimisation, init-sft 0.3"."""
    family, _, rest = method.partition(" ")
    family = FAMILIES.get(family, family)
    return f"{family}, {rest}" if rest else family


# ---- one seed's rows of the table ---------------------------------------------------------------

class Evaluator:
    """One seed's evaluation: `rows` collects what each method achieves on the held-out prompts,
    `curve` best-of-n for every n, and `responses` what each policy answered, by its row's name.

    candidates   Responses of pi_SFT, (P, N), that best-of-N picks from
    comparison   SAMPLES further ones, to be compared with. They are never picked from: a candidate
                 would else be compared with itself.
    run          the seed's Run: its seed and its random generators
    """

    def __init__(self, world, sft, candidates, comparison, run):
        self.world, self.sft, self.run = world, sft, run
        self.candidates, self.comparison = candidates, comparison
        self.rows, self.curve, self.responses = [], [], {}
        self.demo = self.unmarked = self._demonstrations(world.test_demos)
        if world.unmark:
            self.unmarked = self._demonstrations([[world.unmark(y) for y in row]
                                                  for row in world.test_demos])
        self.sft_logp = self._logp(sft, candidates)

    def _demonstrations(self, rows):
        """Demonstrations are encoded and cut like a policy's responses: a method is compared with
        what it could have written."""
        return read_responses(self.world, [[self.world.pair(x, y)[1] for y in row]
                                           for x, row in zip(self.world.test_prompts, rows)])

    def _logp(self, policy, responses):
        """log pi(y|x) of each response, (P, M)."""
        return log_likelihood(policy, responses.pairs).reshape(responses.lengths.shape)

    def _forward_kl(self, policy):
        """E_beta[log d_beta - log pi] over the held-out demonstrations, without their marks: no
        policy can write a mark, so that with them every forward KL would be infinite."""
        if self.unmarked.demo_logp is None:
            return None
        return float((self.unmarked.demo_logp - self._logp(policy, self.unmarked)).mean())

    def _add_row(self, name, responses, picks=None, logp=None, proxy=None, **columns):
        """One row: means over prompts, and over the picked responses of each (all if None).

        picks (P, G): columns of the responses. logp, proxy (P, M): the policy's log-density and
        the reward that it maximised, where they are known.
        """
        def picked(values):
            return values if picks is None else np.take_along_axis(values, picks, axis=1)

        def mean(values):
            return None if values is None else float(picked(values).mean())
        row = dict.fromkeys(("golden", "golden_ci95", "proxy", "win_vs_sft", "win_vs_demo", "kl",
                             "reverse_kl", "forward_kl", "entropy", "length", "distinct"))
        row = {"seed": self.run.seed, "name": name, **row, "proxy": mean(proxy),
               "length": mean(responses.lengths)}
        if responses.golden is not None:
            # Responses to one prompt resemble each other: the independent draws are the prompts.
            row["golden"], row["golden_ci95"] = mean_ci(picked(responses.golden).mean(axis=1))
            row["win_vs_sft"] = mean(win_rate(responses.golden, self.comparison.golden))
            row["win_vs_demo"] = mean(win_rate(responses.golden, self.demo.golden))
        if logp is not None:
            row["entropy"] = -mean(logp)
            if responses.demo_logp is not None:
                row["reverse_kl"] = mean(logp - responses.demo_logp)
        if picks is None:
            row["distinct"] = distinct(responses.texts)
        self.rows.append({**row, **columns})

    def add_reference_rows(self):
        """The rows of pi_SFT and of the demonstrations, which everything else is compared with."""
        self._add_row("pi_SFT", self.candidates, logp=self.sft_logp, kl=0.0,
                      forward_kl=self._forward_kl(self.sft))
        self._add_row("demonstrations", self.demo, logp=self.demo.demo_logp,
                      forward_kl=None if self.demo.demo_logp is None else 0.0)

    def add_policy(self, method, policy, reward=None):
        """The row of a policy, from SAMPLES fresh samples to each held-out prompt.

        method: as in --methods, or "init"; it also names the stream of random numbers.
        reward: the proxy that the policy was optimised for, if any.
        """
        responses = sample_responses(self.world, policy, SAMPLES,
                                     self.run.generator(f"{method} samples"), method)
        logp, proxy = self._logp(policy, responses), None
        if reward is not None:
            proxy = score(reward, responses.pairs).reshape(logp.shape)
        self._add_row(row_name(method), responses, logp=logp, proxy=proxy,
                      kl=float((logp - self._logp(self.sft, responses)).mean()),
                      forward_kl=self._forward_kl(policy))
        self.responses[row_name(method)] = responses

    def add_best_of_n(self, name, picks, scores, n):
        """The row of best-of-n: picks (P, G) are the columns of the candidates with the highest
        of each n scores, scores (P, N).

        The selector's density pi is not known response by response, but E[log pi - log pi_SFT] is
        at most best_of_n_kl(n). Hence its reverse KL, an upper bound, and its entropy, a lower one.
        Its forward KL would need its density at the demonstrations.
        """
        kl = selector_kl(name, n)
        self._add_row(f"best of {n}, {name}", self.candidates, picks, self.sft_logp + kl, scores,
                      kl=kl)

    def controls(self, rng):
        """{name: scores (P, N)} of selectors that train no reward. Two follow what pi_SFT finds
        likely: sharpening in a reward's place. Two ignore quality, one uses the golden reward.

        rng: random.Random, for the selector that tosses coins.
        """
        coins = np.array([rng.random() for _ in self.candidates.pairs])
        scores = {"likelihood": self.sft_logp,
                  "likelihood per token": self.sft_logp / self.candidates.lengths,
                  "length": self.candidates.lengths,
                  "random": coins.reshape(self.sft_logp.shape)}
        if self.candidates.golden is not None:
            scores["golden"] = self.candidates.golden
        return scores

    def add_curve(self, name, scores):
        """Points of `curve`: best-of-n by scores (P, N) for n = 1, 2, 4, ... N.

        Instead of one pick for each group, each is a mean over all subsets of n candidates (see
        reward.best_of_n_weights).
        """
        for n in (2 ** k for k in range(scores.shape[1].bit_length())):
            weights = best_of_n_weights(scores, n)
            golden = self.candidates.golden
            self.curve.append({
                "seed": self.run.seed, "reward_model": name, "n": n,
                "golden": None if golden is None else float((weights * golden).sum(1).mean()),
                "proxy": float((weights * scores).sum(1).mean()),
                "kl": selector_kl(name, n)})

    def measure(self, pairs):
        """Mean golden reward, where it is known, and mean length of samples to training prompts:
        the curve of policy optimisation, which the policy itself does not see."""
        record = {}
        if self.world.golden:
            record["golden"] = float(np.mean([self.world.points(x, y) for x, y in pairs]))
        return {**record, "length": float(np.mean([len(y) for _, y in pairs]))}


def log_likelihood(policy, pairs):
    """log pi(y|x) of pairs (prompt ids, response ids), nats per sequence, numpy (len(pairs),)."""
    def log_probability(batch):     # in a reward's place: `score` computes it batch by batch
        return logp_seq(policy, batch)
    log_probability.device = policy.device
    return score(log_probability, pairs)


def selector_kl(name, n):
    """KL(best-of-n || pi_SFT) of a selector, nats, at most."""
    # A selector that tosses coins leaves pi_SFT as it is, whatever n may be.
    return 0.0 if name == "random" else best_of_n_kl(n)


def distinct(texts):
    """Share of different responses among the first SAMPLES to a prompt: the mean over prompts."""
    rows = [row[:SAMPLES] for row in texts]
    return float(np.mean([len(set(row)) / len(row) for row in rows]))


# ---- people's preferences -----------------------------------------------------------------------

def golden_from_model(gold_model, world):
    """(golden, golden_ids, note): a reward model trained on world.gold_pairs, in golden's place.

    golden(prompt, response) is in log-odds of being preferred, up to a constant of each prompt;
    golden_ids is the same of token ids. The note says how often the model agrees with people on
    held-out pairs: golden is no truth here.
    """
    agreement, low, high = human_agreement(gold_model, world)

    def golden_ids(prompt, response):
        # A response is scored alone: in a batch, others would change the last digits of its score.
        return float(score(gold_model, [(prompt, response)])[0])

    def golden(prompt, response):
        return golden_ids(*world.pair(prompt, response))
    return golden, golden_ids, (
        f"reward model trained on {plural(len(world.gold_pairs), 'pairs')} that no learner sees "
        f"(agreement with people on {plural(len(world.human_pairs), 'held-out pairs')}: "
        f"{agreement:.3f}, 95% interval {low:.3f} to {high:.3f})")


def human_agreement(reward, world):
    """(share of the held-out pairs of which the reward prefers the chosen answer, ties half; low
    and high, the ends of its 95% interval). The interval takes pairs as independent."""
    chosen = score(reward, [world.pair(x, better) for x, better, _ in world.human_pairs])
    rejected = score(reward, [world.pair(x, worse) for x, _, worse in world.human_pairs])
    share = float(((chosen > rejected) + (chosen == rejected) / 2).mean())
    return share, *wilson_interval(share, len(chosen))


# ---- what the reward models learned -------------------------------------------------------------

def inspect_rewards(world, seed, rewards, data, scores, candidates):
    """What each reward model has learned: one record for each of rewards {name: reward}.

    data     {name: (training, held-out) pairs (better, worse)}: accuracy and calibration on what
             was held out
    scores   {name: (P, N)} of the candidates: rank correlation, within a prompt, with the golden
             reward and with length
    marks_worth is what the demonstrator's marks add to a score, in standard deviations of the
    candidates' scores; human_agreement how often it agrees with people on held-out pairs.
    """
    records = []
    for name, reward in rewards.items():
        _, held_out = data[name]
        record = {"seed": seed, "reward_model": name,
                  **held_out_quality(reward, held_out, name), "corr_golden": None,
                  "corr_length": rank_correlation(scores[name], candidates.lengths),
                  "marks_worth": None, "human_agreement": None, "human_low": None,
                  "human_high": None, "human_pairs": len(world.human_pairs)}
        if candidates.golden is not None:
            record["corr_golden"] = rank_correlation(scores[name], candidates.golden)
        spread = float(scores[name].std())
        # No policy can write a mark: to a log-ratio it is -inf.
        if world.unmark and spread and not isinstance(reward, LogRatio):
            demos = world.demos[:500]
            marked = score(reward, [world.pair(x, y) for x, y in demos])
            plain = score(reward, [world.pair(x, world.unmark(y)) for x, y in demos])
            record["marks_worth"] = float((marked - plain).mean()) / spread
        if world.human_pairs:
            agreement = human_agreement(reward, world)
            record.update(zip(("human_agreement", "human_low", "human_high"), agreement))
        records.append(record)
    return records


def held_out_quality(reward, items, name):
    """Accuracy and calibration error on held-out (better, worse) pairs; nan without any.

    A discriminator's logits are compared with their labels one by one. Bradley-Terry rewards are
    defined up to a constant, so that only their differences can be, in both orders. The same items
    picked the weights (train.fit), so that both numbers are a little too good.
    """
    if not items:
        return {"accuracy": math.nan, "calibration_error": math.nan}
    better, worse = (score(reward, list(side)) for side in zip(*items))
    if name == "preference":
        better, worse = better - worse, worse - better
    logits, labels = np.concatenate([better, worse]), np.repeat([1.0, 0.0], len(better))
    return {"accuracy": float(((logits > 0) == (labels > 0)).mean()),
            "calibration_error": calibration(logits, labels)}


# ---- over seeds ---------------------------------------------------------------------------------

def grouped(records, key):
    """{value of the key: its records, one a seed}, in the order of the first ones."""
    groups = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    return groups


def over_seeds(records, column):
    """(mean over seeds of a column; low and high, the ends of its 95% interval), three times None
    where it is empty. One seed has an interval of its own over prompts or pairs, or nan."""
    values = [record[column] for record in records if record[column] is not None]
    if not values:
        return None, None, None
    mean, half = mean_ci(values)
    if len(records) == 1 and column == "golden":
        half = records[0]["golden_ci95"]
        half = math.nan if half is None else half       # of a single prompt: read from a file
    if column == "human_agreement":
        if len(records) == 1:
            return mean, records[0]["human_low"], records[0]["human_high"]
        return mean, max(0.0, mean - half), min(1.0, mean + half)       # Student's t knows no bound
    return mean, mean - half, mean + half


def summarise(rows, n):
    """Means over seeds with Student's t intervals: each method's golden reward, and its place on a
    scale from 0, pi_SFT, to 1, the best of n by golden. No methods where nobody knows golden."""
    golden = {(row["seed"], row["name"]): row["golden"] for row in rows}
    seeds = sorted({seed for seed, _ in golden})
    summary = {"n": n, "seeds": seeds, "methods": {}}
    if None in golden.values():
        return summary
    for name in dict.fromkeys(name for _, name in golden):
        # A method that only some of the seeds have cannot be compared with the others.
        if not all((seed, name) in golden for seed in seeds):
            continue
        shares = []
        for seed in seeds:
            sft, best = golden[seed, "pi_SFT"], golden[seed, f"best of {n}, golden"]
            shares.append((golden[seed, name] - sft) / (best - sft) if best > sft else math.nan)
        summary["methods"][name] = {"golden": mean_ci([golden[seed, name] for seed in seeds]),
                                    "share_of_golden_gain": mean_ci(shares)}
    return summary


def pick_samples(evaluator, scores, n):
    """Per held-out prompt, side by side: samples of policies, the pick of n by the first of
    scores {name: (P, N)} and a demonstration, each with its golden reward. For the first BROWSED
    prompts all candidates, with every selector's scores.
    """
    world, candidates = evaluator.world, evaluator.candidates
    name, proxy = next(iter(scores.items()))
    optimised = [row for row in evaluator.responses if row.startswith(FAMILIES["po"])][:1]

    def sample(responses, i, j, proxy=None):
        return {"text": responses.texts[i][j],
                "golden": None if responses.golden is None else float(responses.golden[i][j]),
                "proxy": None if proxy is None else float(proxy[i][j])}

    samples = []
    for i, prompt in enumerate(world.test_prompts):
        best = int(proxy[i][:n].argmax())
        writers = {"pi_0": sample(evaluator.responses["pi_0"], i, 0),
                   "pi_SFT": sample(candidates, i, 0, proxy),
                   f"best of {n}, {name}": sample(candidates, i, best, proxy),
                   **{row: sample(evaluator.responses[row], i, 0) for row in optimised},
                   "demonstration": sample(evaluator.demo, i, 0)}
        if world.unmark:        # with its marks, which the policy's tokenizer does not know
            writers["demonstration"]["text"] = world.test_demos[i][0]
        samples.append({"prompt": prompt, "writers": writers})
        if i < BROWSED:
            samples[i]["candidates"] = {
                "text": candidates.texts[i],
                "scores": {key: [float(f"{v:.7g}") if v == v else None for v in values[i]]
                           for key, values in scores.items()}}
    return samples


# ---- statistics ---------------------------------------------------------------------------------

# The 97.5% quantiles of Student's t by degrees of freedom: a 95% interval is mean +- t sd/sqrt(n).
STUDENT_T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646,
             8: 2.3060, 9: 2.2622, 10: 2.2281, 12: 2.1788, 15: 2.1314, 20: 2.0860, 30: 2.0423,
             60: 2.0003, math.inf: 1.9600}


def student_t(df):
    """The 97.5% quantile of Student's t with df degrees of freedom (1, 2, ...), within 0.0003.

    Between the table's entries the quantile is nearly a straight line in 1/df.
    """
    points = sorted((1 / k, t) for k, t in STUDENT_T.items())
    return float(np.interp(1 / df, *zip(*points)))


def mean_ci(values):
    """(mean, half-width of its 95% interval by Student's t); of one value the latter is nan."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    standard_error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()), student_t(len(values) - 1) * standard_error


def wilson_interval(share, n):
    """(low, high): the 95% interval of a share of n, which stays between 0 and 1.

    It holds the p with |share - p| <= z sqrt(p (1 - p) / n), z = 1.96. Its centre is the share of
    n + z^2 trials of which z^2 / 2 more are successes, so that 14 of 14 is no certainty. Source:
    Wilson 1927; compared with others in Brown, Cai and DasGupta, Statistical Science 16, 2001.
    """
    z = STUDENT_T[math.inf]
    centre = (n * share + z ** 2 / 2) / (n + z ** 2)
    half = z * math.sqrt(n * share * (1 - share) + z ** 2 / 4) / (n + z ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def ranks(values):
    """Ranks along the last axis, ties sharing their mean rank."""
    values = np.asarray(values)
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return below + (equal - 1) / 2


def rank_correlation(a, b):
    """Spearman's correlation within each prompt, (P, N) against (P, N): the mean over the prompts
    where both sides vary; nan if there are none."""
    a, b = (ranks(side) for side in (a, b))
    values = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b) if np.ptp(x) > 0 and np.ptp(y) > 0]
    return float(np.mean(values)) if values else math.nan


def calibration(logits, labels, bins=10):
    """Expected calibration error of sigmoid(logit): mean over bins of |mean label - mean D|.

    A perfect D has a positive one by chance: some 0.03 with 900 independent items, over a quarter
    more where the 450 positives are 200 texts repeated, as with the demonstrations of Init-Demo.
    """
    d = 1 / (1 + np.exp(-np.clip(logits, -50, 50)))
    which = np.minimum((d * bins).astype(int), bins - 1)
    gaps = [abs((labels[which == b] - d[which == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / len(d))


def win_rate(golden, other):
    """P(a sample of `other` has less golden reward), ties half: (P, N) against (P, M) -> (P, N)."""
    more = (golden[:, :, None] > other[:, None, :]).mean(2)
    return more + (golden[:, :, None] == other[:, None, :]).mean(2) / 2
