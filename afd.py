"""Alignment from Demonstrations, read top to bottom: `python afd.py` runs the whole story.

    1  pi_0      a small transformer is pretrained on text of mixed quality
    2  pi_SFT    supervised fine-tuning on demonstrations minimises the forward KL to who wrote them
    3  samples   the token MDP's dynamics are known, so both policies may write: y ~ pi_0, pi_SFT
    4  rewards   a discriminator's logit is a reward; what it separates decides what it rewards
    5  best-of-N extrapolates over a reward: of N samples of pi_SFT keep what it scores highest
    6  truth     beside every proxy the golden reward, which only `preference` saw, as labels

Source: Sun and van der Schaar, "Inverse-RLignment", arXiv:2405.15624. Differs from the paper: the
reward head is summed over tokens (--head last is the common one), policies are small and the golden
reward is known.

Shapes: P prompts, N candidates per prompt. Golden reward in points; proxy rewards and KL in nats.
"""

import copy
import json
import math
import platform
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import tokenizers
import torch

import train
from model import (GPT, GPTConfig, InputError, encode_documents, save_pretrained, sample_responses,
                   write_json)
from reward import (HEADS, RewardModel, best_of_n_kl, best_of_n_weights, calibration, log_ratio,
                    mean_ci, rank_correlation, score, win_rate)
from toy_envs.figures import draw_run, print_reward_models, print_samples, print_table
from toy_envs.worlds import file_world, text_world
from train import Schedule, setting


@dataclass
class Settings:
    """Align a language model from demonstrations alone, with the golden truth beside every number.

    python afd.py                                  the helpful task, one seed
    python afd.py --task harmless --seeds 5        means and 95% intervals over five seeds
    python afd.py --heterogeneity 1 --head last    another writer; the common reward head
    python afd.py --demos FILE --gold F.py:fn      your own demonstrations and golden reward
    """
    task: str = setting("helpful", "built-in text task", choices=["helpful", "harmless"])
    heterogeneity: float = setting(0.0, "chance in [0, 1] that a demonstrator's clause carries a "
                                        "mark that the policy cannot write")
    seed: int = setting(0, "first random seed")
    seeds: int = setting(1, "how many seeds to run; from two on, intervals are over seeds")
    head: str = setting("sum", "reward head: summed over response tokens, or at the last one",
                        choices=list(HEADS))
    out: str = setting("out/afd", "folder for config, metrics, results, checkpoints and figures")
    overwrite: bool = setting(False, "replace the run that --out holds")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    demos: str = setting(None, "JSON lines (or .gz) with prompt and response, or chosen and "
                               "rejected dialogues: your own data instead of a built-in task")
    corpus: str = setting(None, "with --demos: text that pi_0 is pretrained on, plain or JSON "
                                "lines with 'text' (without it: all text of the training part)")
    prompts: str = setting(None, "with --demos: further prompts to sample from, one a line or JSON")
    gold: str = setting(None, "with --demos: FILE.py:FUNCTION, (prompt, response) -> float")
    n_corpus: int = setting(60000, "built-in tasks: documents of the base language for pi_0")
    n_demos: int = setting(4000, "demonstrations, at most")
    n_samples: int = setting(0, "samples of each policy for the reward models (0: 9000, or 1000 "
                                "with --demos)")
    n_prompts: int = setting(200, "held-out prompts for the evaluation, at most")
    n_candidates: int = setting(0, "largest N of best-of-N, a power of two (0: 64, or 16 with "
                                   "--demos)")
    n_embd: int = setting(64, "width of the transformer")
    n_layer: int = setting(2, "its layers")
    n_head: int = setting(4, "its attention heads")
    vocab_size: int = setting(2048, "with --demos: size of the byte-level BPE vocabulary")
    max_prompt: int = setting(192, "with --demos: longest prompt, tokens; longer ones are skipped")
    max_response: int = setting(64, "with --demos: longest response, tokens; longer ones are cut")
    pretrain_epochs: float = setting(0.0, "passes over the corpus (0: 1, or 4 with --demos)")
    sft_epochs: float = setting(2.0, "passes over the demonstrations")
    reward_epochs: float = setting(1.0, "passes over the reward models' pairs")


# Built-in texts are drawn anew as often as wanted; a file of demonstrations is small and its texts
# are long. Each pair: the value for a built-in task, the value with --demos.
DEFAULTS = {"n_samples": (9000, 1000), "n_candidates": (64, 16), "pretrain_epochs": (1.0, 4.0)}


def schedules(s):
    """How each stage is trained; why so is in docs/LOG.md."""
    return {"pretrain": Schedule(lr=1.2e-2, epochs=s.pretrain_epochs, batch_size=24, warmup=0.05,
                                 weight_decay=0.0),
            "sft": Schedule(lr=1e-3, epochs=s.sft_epochs, batch_size=16, weight_decay=0.0),
            "reward": Schedule(lr=3e-3, epochs=s.reward_epochs, batch_size=16, weight_decay=0.0)}


# ---- the algorithm ------------------------------------------------------------------------------

class Run:
    """One seed's bookkeeping: seconds per stage, losses to metrics.jsonl, what is being done."""

    def __init__(self, out, seed, device):
        self.out, self.seed, self.device, self.seconds = out, seed, device, {}

    @contextmanager
    def stage(self, name, says):
        print(f"  {says}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)

    def log(self, stage, history):
        with open(self.out / "metrics.jsonl", "a") as file:
            for record in history:
                file.write(json.dumps({"seed": self.seed, "stage": stage, **record}) + "\n")


def train_policies(world, s, run, rng):
    """(pi_0, pi_SFT): pretraining on the corpus, then maximum likelihood on the demonstrations."""
    tok, plan = world.tokenizer, schedules(s)
    init = GPT(GPTConfig(len(tok), world.max_prompt + world.max_response, s.n_embd, s.n_layer,
                         s.n_head, suppress_tokens=tok.suppress)).to(run.device)
    with run.stage("pretrain", f"1 pi_0: pretraining on {len(world.corpus):,} texts"):
        documents = encode_documents(tok, world.corpus, init.config.n_positions)
        run.log("pretrain", train.fit(init, [(d,) for d in documents], train.nll_loss,
                                      plan["pretrain"], rng, "pretrain"))
    sft = copy.deepcopy(init)
    with run.stage("sft", f"2 pi_SFT: forward KL to {len(world.demos):,} demonstrations"):
        learn, held_out = train.split([(world.pair(x, y),) for x, y in world.demos], 0.05, rng)
        run.log("sft", train.fit(sft, learn, train.nll_loss, plan["sft"], rng, "sft", held_out))
    return init, sft


def draw_samples(world, s, run, rng, init, sft, generator):
    """Pairs for the reward models: two samples of each policy to each of n_samples / 2 prompts."""
    prompts = [x for _ in range(math.ceil(s.n_samples / 2 / len(world.train_prompts)))
               for x in rng.sample(world.train_prompts, len(world.train_prompts))]
    ids = [world.tokenizer.encode(x) for x in prompts[:math.ceil(s.n_samples / 2)]]
    with run.stage("samples", f"3 samples: {2 * len(ids):,} each of pi_0 and pi_SFT"):
        written = [sample_responses(policy, ids, 2, world.max_response, world.tokenizer.eos,
                                    generator, label=label)
                   for policy, label in ((init, "y ~ pi_0"), (sft, "y ~ pi_SFT"))]
    return prompts, [[(x, y) for x, ys in zip(ids, part) for y in ys] for part in written]


def preference_items(world, prompts, y_sft):
    """(preferred, other) pairs: people's where there are any, else two SFT samples by golden."""
    if world.preferences:
        return [(world.pair(x, chosen), world.pair(x, rejected))
                for x, chosen, rejected in world.preferences]
    if world.golden is None:
        return []
    items = []
    for i, (a, b) in enumerate(zip(y_sft[0::2], y_sft[1::2])):
        gold_a, gold_b = (world.golden(prompts[i], world.text(y)) for _, y in (a, b))
        if gold_a != gold_b:
            items.append((a, b) if gold_a > gold_b else (b, a))
    return items


def train_rewards(world, s, run, rng, init, sft, prompts, y_init, y_sft):
    """{name: (reward, held-out items)} for every reward model of reward.py's table."""
    demos = [world.pair(x, y) for x, y in world.demos]
    data = {"init-sft": train.split(list(zip(y_sft, y_init)), 0.05, rng),    # the same prompts
            "init-demo": train.pair_up(demos, y_init, rng),
            "sft-demo": train.pair_up(demos, y_sft, rng),
            "preference": train.split(preference_items(world, prompts, y_sft), 0.05, rng)}
    rewards = {}
    for name, (items, held) in data.items():
        if not items:       # nobody labelled any pairs
            continue
        kind, loss = (("Bradley-Terry", train.preference_step) if name == "preference"
                      else ("discriminator", train.discriminator_step))
        with run.stage(name, f"4 {name}: {kind} on {len(items):,} pairs"):
            model, history = train.train_reward(init, items, held, loss, schedules(s)["reward"],
                                                rng, s.head, name)
        run.log(name, history)
        rewards[name] = (model, held)
    rewards["log-ratio"] = (log_ratio(sft, init), rewards["init-sft"][1])
    return rewards


# ---- best-of-N and its evaluation ---------------------------------------------------------------

@dataclass
class Written:
    """What each writer wrote to the held-out prompts: "init"; "sft", the candidates; "rival", other
    samples of pi_SFT, which picks are compared with; "demo", demonstrations as the policy's
    tokenizer reads them, cut where candidates are cut.
    """
    texts: dict         # writer -> [prompt][sample] text
    lengths: dict       # writer -> [prompt][sample] tokens, EOS included
    gold: dict          # writer -> golden rewards (P, samples), points; empty where nobody knows
    pairs: dict         # "init", "sft" -> flat list of (prompt ids, response ids)


def write_candidates(world, s, run, init, sft, generator):
    """N candidates of pi_SFT to each held-out prompt, a few samples of pi_0, the demonstrations."""
    tok, ids = world.tokenizer, [world.tokenizer.encode(x) for x in world.test_prompts]
    with run.stage("candidates", f"5 best-of-N: {s.n_candidates} candidates to each of {len(ids)} "
                                 "held-out prompts"):
        ys = {name: sample_responses(policy, ids, n, world.max_response, tok.eos, generator,
                                     label=name)
              for name, policy, n in (("init", init, 8), ("rival", sft, 8),
                                      ("sft", sft, s.n_candidates))}
    ys["demo"] = [[world.pair(x, y)[1] for y in row]
                  for x, row in zip(world.test_prompts, world.test_demos)]
    texts = {name: [[world.text(y) for y in row] for row in rows] for name, rows in ys.items()}
    lengths = {name: np.array([[len(y) for y in row] for row in rows], float)
               for name, rows in ys.items()}
    gold = {}
    if world.golden:
        gold = {name: np.array([[world.golden(x, y) for y in row]
                                for x, row in zip(world.test_prompts, rows)])
                for name, rows in texts.items()}
    pairs = {name: [(x, y) for x, row in zip(ids, rows) for y in row] for name, rows in ys.items()}
    return Written(texts, lengths, gold, pairs)


def score_candidates(run, rewards, written, rng):
    """{selector: scores (P, N)} of every reward model and of the controls that train nothing."""
    shape, pairs = written.lengths["sft"].shape, written.pairs["sft"]
    with run.stage("scores", f"6 truth: {len(pairs):,} candidates scored by every reward model"):
        scores = {name: score(reward, pairs, run.device).reshape(shape)
                  for name, (reward, _) in rewards.items()}
    scores["length"] = written.lengths["sft"]
    scores["random"] = np.array([rng.random() for _ in pairs]).reshape(shape)
    if written.gold:
        scores["golden"] = written.gold["sft"]
    return scores


def evaluate(s, seed, written, scores, kl_init):
    """Rows of results.json: pi_0, pi_SFT, demonstrations, and best-of-n by every selector."""
    source = {"task": "file" if s.demos else s.task, "seed": seed}

    def row(method, reward_model, n, writer, weights, proxy, kl):
        length = written.lengths[writer]
        if weights is None:
            weights = np.full(length.shape, 1 / length.shape[1])
        return {**source, "method": method, "reward_model": reward_model, "n": n,
                **golden_columns(written.gold, writer, weights), "proxy_mean": proxy,
                "kl_from_sft": kl, "length_mean": float((weights * length).sum(1).mean())}

    rows = [row(writer, None, 1, writer, None, None, kl)
            for writer, kl in (("init", kl_init), ("sft", 0.0), ("demo", None))]
    for name, values in scores.items():
        for n in (2 ** k for k in range(values.shape[1].bit_length())):
            weights = best_of_n_weights(values, n)
            rows.append(row("bon", name, n, "sft", weights, float((weights * values).sum(1).mean()),
                            0.0 if name == "random" else best_of_n_kl(n)))
    return rows


def golden_columns(gold, writer, weights):
    """Golden mean with its 95% interval over prompts, and both win rates; None where unknown."""
    if not gold:
        return dict.fromkeys(("gold_mean", "gold_ci95", "win_vs_sft", "win_vs_demo"))
    mean, ci = mean_ci((weights * gold[writer]).sum(1))
    wins = {key: float((weights * win_rate(gold[writer], gold[other])).sum(1).mean())
            for key, other in (("win_vs_sft", "rival"), ("win_vs_demo", "demo"))}
    return {"gold_mean": mean, "gold_ci95": ci, **wins}


def inspect_rewards(world, run, rewards, written, scores):
    """What each reward model has learned: one record a model.

    accuracy and calibration on its own held-out pairs; rank correlation within a prompt with the
    golden reward and with length; what the demonstrator's marks are worth to it, in standard
    deviations of its scores; how often it agrees with people on held-out pairs.
    """
    records = []
    for name, (reward, held) in rewards.items():
        mine = scores[name]
        record = {"seed": run.seed, "reward_model": name,
                  **held_out_quality(reward, held, name, run.device),
                  "corr_golden": (rank_correlation(mine, written.gold["sft"]) if written.gold
                                  else None),
                  "corr_length": rank_correlation(mine, written.lengths["sft"]),
                  "marks_worth": None, "human_agreement": None, "human_ci95": None,
                  "human_pairs": len(world.human_pairs)}
        if world.unmark and name != "log-ratio":    # to a policy that cannot write them: -inf
            marked, plain = (score(reward, [world.pair(x, strip(y)) for x, y in world.demos[:500]],
                                   run.device) for strip in (str, world.unmark))
            record["marks_worth"] = float((marked - plain).mean() / mine.std())
        if world.human_pairs:
            chosen, rejected = (score(reward, [world.pair(p[0], p[k]) for p in world.human_pairs],
                                      run.device) for k in (1, 2))
            record["human_agreement"], record["human_ci95"] = mean_ci(
                (chosen > rejected) + (chosen == rejected) / 2)
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


# ---- what is said at the end --------------------------------------------------------------------

COMPARISONS = (("init-sft", "sft"), ("init-sft", "demo"), ("init-sft", "init-demo"),
               ("init-demo", "sft-demo"), ("log-ratio", "init-sft"))


def summarise(rows, n):
    """Means over seeds with Student's t intervals, best-of-n throughout: the golden reward of each
    method, its share of the golden selector's gain over SFT, and paired differences.
    """
    gold = {(r["seed"], r["reward_model"] or r["method"]): r["gold_mean"] for r in rows
            if r["n"] == (n if r["method"] == "bon" else 1)}
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
        mean, ci = mean_ci([gold[k, a] - gold[k, b] for k in seeds])
        differences.append({"a": a, "b": b, "mean": mean, "ci95": ci})
    return {"n": n, "seeds": seeds, "methods": methods, "differences": differences}


def pick_samples(world, written, scores, n):
    """Per held-out prompt, side by side: a sample of pi_0, one of pi_SFT, init-sft's pick of n, a
    demonstration; each with its golden reward, and the candidates with init-sft's proxy.
    """
    def said(writer, i, j):
        return {"text": written.texts[writer][i][j],
                "golden": float(written.gold[writer][i][j]) if written.gold else None,
                "proxy": float(proxy[i][j]) if writer == "sft" else None}

    proxy = scores["init-sft"]
    return [{"prompt": prompt, "pi_0": said("init", i, 0), "pi_SFT": said("sft", i, 0),
             f"best of {n}": said("sft", i, int(proxy[i][:n].argmax())),
             "demonstration": said("demo", i, 0)}
            for i, prompt in enumerate(world.test_prompts)]


# ---- main ---------------------------------------------------------------------------------------

def check(s):
    """Fill in the defaults that depend on the data and refuse settings out of range.

    Nothing has been written yet. Raises InputError.
    """
    for name, values in DEFAULTS.items():
        if not getattr(s, name):
            setattr(s, name, values[s.demos is not None])
    if not 0 <= s.heterogeneity <= 1:
        raise InputError(f"--heterogeneity must lie in [0, 1], not {s.heterogeneity}")
    if s.n_candidates < 1 or s.n_candidates & (s.n_candidates - 1):
        raise InputError(f"--n-candidates must be a power of two, not {s.n_candidates}")
    for name in ("pretrain_epochs", "sft_epochs", "reward_epochs"):
        if not 0 < getattr(s, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} must be positive")
    for name in ("seeds", "n_demos", "n_corpus", "n_samples", "n_prompts", "n_layer", "max_prompt",
                 "max_response"):
        if getattr(s, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} must be at least 1, not {getattr(s, name)}")
    train.check_model(s.n_embd, s.n_head, s.vocab_size)
    if not s.demos and (s.corpus or s.prompts or s.gold):
        raise InputError("--corpus, --prompts and --gold go with --demos")


def run_seed(s, seed, world, out, device):
    """The whole story for one seed. Returns what results.json and the figures are made of."""
    run, rng = Run(out, seed, device), random.Random(seed)
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    init, sft = train_policies(world, s, run, rng)
    prompts, (y_init, y_sft) = draw_samples(world, s, run, rng, init, sft, generator)
    rewards = train_rewards(world, s, run, rng, init, sft, prompts, y_init, y_sft)
    written = write_candidates(world, s, run, init, sft, generator)
    scores = score_candidates(run, rewards, written, rng)
    kl_init = -float(score(log_ratio(sft, init), written.pairs["init"], device).mean())
    rows = evaluate(s, seed, written, scores, kl_init)
    records = inspect_rewards(world, run, rewards, written, scores)
    for name, model in (("init", init), ("sft", sft)):
        save_pretrained(out / f"seed{seed}" / name, model, world.tokenizer)
    for name, (reward, _) in rewards.items():
        if isinstance(reward, RewardModel):
            train.save_reward(out / f"seed{seed}" / name, reward, world.tokenizer)
    samples = pick_samples(world, written, scores, min(16, s.n_candidates))
    write_json(out / f"seed{seed}" / "samples.json", samples)
    return rows, records, samples, run.seconds


def main(argv=None):
    """Run every seed, write results.json and the figures, print the table. Returns the results."""
    s = train.parse_settings(Settings, argv)
    check(s)
    device = train.choose_device(s.device)
    make_world = file_world if s.demos else text_world
    world = make_world(s, s.seed)       # bad data is refused here, before a file is written
    out = train.claim_folder(s.out, s.overwrite)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "numpy": np.__version__, "tokenizers": tokenizers.__version__}
    command = " ".join(["python afd.py", *(sys.argv[1:] if argv is None else argv)])
    head = {"command": command, "config": asdict(s), "versions": versions, "device": str(device)}
    for stale in ("results.json", "metrics.jsonl", "best_of_n.png", "reward_models.png"):
        (out / stale).unlink(missing_ok=True)
    write_json(out / "config.json", head)
    rows, records, seconds, first, n = [], [], {}, None, min(16, s.n_candidates)
    for seed in range(s.seed, s.seed + s.seeds):
        world = world if seed == s.seed else make_world(s, seed)
        print(f"seed {seed} on {device}" + "".join(f"; {note}" for note in world.notes), flush=True)
        *parts, samples, seconds[str(seed)] = run_seed(s, seed, world, out, device)
        rows, records, first = rows + parts[0], records + parts[1], first or samples
        results = {**head, "seconds": seconds, "rows": rows, "reward_models": records,
                   "summary": summarise(rows, n) if world.golden else None}
        write_json(out / "results.json", results)
    print_table(rows, n)
    print_reward_models(records)
    print_samples(first)
    print()
    try:
        for path in draw_run(rows, records, out):
            print(f"figure  {path}")
    except ImportError as error:        # the numbers are safe; only the pictures need the extra
        print(error)
    total = sum(sum(stages.values()) for stages in seconds.values())
    print(f"results {out / 'results.json'}\n{total:.0f} seconds in all stages")
    return results


if __name__ == "__main__":
    train.run_script(main)
