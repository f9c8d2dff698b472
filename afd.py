"""Alignment from Demonstrations, read top to bottom: `python afd.py` runs the whole story.

    1  pi_0      a small transformer is pretrained on text of mixed quality
    2  pi_SFT    supervised fine-tuning on demonstrations minimises the forward KL to who wrote them
    3  samples   the token MDP's dynamics are known, so both policies may write: y ~ pi_0, pi_SFT
    4  rewards   a discriminator's logit is a reward; what it separates decides what it rewards
    5  best-of-N extrapolates over a reward: of N samples of pi_SFT keep what it scores highest
    6  policies  so does optimising the policy, max E_pi[r] - beta KL(pi || pi_SFT), and so does the
                 closed form; beside them online adversarial imitation, SPIN, IRFT and DPO
    7  truth     beside every proxy the golden reward, seen only by the methods that need labels

Source: Sun and van der Schaar, "Inverse-RLignment", arXiv:2405.15624. Differs from the paper: the
reward head is summed over tokens (--head last is the common one), policies are small and the golden
reward is known. In code `init` is pi_0, `sft` pi_SFT. Golden in points; proxies and KL in nats.
"""

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import train
from divergences import DIVERGENCES, get_divergence
from model import GPT, GPTConfig, InputError, encode_documents, write_json
from reward import (HEADS, REWARD_MODELS, Adversary, ExactAdversary, LogRatio, RewardModel,
                    TokenExtrapolation, score)
from utils.checkpoints import load_init, save_pretrained, save_reward
from utils.plots import draw_run, print_reward_models, print_samples, print_table
from utils.report import FIGURES, write_report
from utils.cli import (Run, choose_device, claimed, counted, parse_settings, provenance,
                           run_script, setting, side_by_side)
from utils.evaluate import Truth, inspect_rewards, pick_samples, summarise, train_judge
from utils.worlds import file_world, text_world
from train import Schedule

METHODS = ("po", "closed-form", "adversarial", "adversarial-exact", "spin", "irft", "dpo")


@dataclass
class Settings:
    """Align a language model from demonstrations alone, the truth beside every number.

    python afd.py                             the helpful task, one seed
    python afd.py --task harmless --seeds 5   means, intervals over five seeds
    python afd.py --heterogeneity 1           the demonstrator is another writer
    python afd.py --demos FILE                your own data (--gold: a judge)
    """
    task: str = setting("helpful", "built-in text task", choices=["helpful", "harmless"])
    heterogeneity: float = setting(0.0, "chance in [0, 1] that a demonstrator's clause carries a "
                                        "mark that the policy cannot write")
    seed: int = setting(0, "first random seed")
    seeds: int = setting(1, "how many seeds to run; from two on, intervals are over seeds")
    head: str = setting("sum", "reward head: summed over response tokens, or at the last one",
                        choices=list(HEADS))
    rewards: str = setting(",".join(REWARD_MODELS), "reward models for best-of-N, with commas")
    methods: str = setting("po,closed-form", "what else to run, with commas, of "
                                             + ", ".join(METHODS) + "; all; none")
    optimise: str = setting("", "po: against which of --rewards, commas; all (default: the first)")
    betas: str = setting("0.3", "po, closed-form: weights of KL(pi || pi_SFT), with commas; all of "
                                "them for the first of --optimise, the first for the others")
    divergences: str = setting("reverse_kl,forward_kl",
                               "adversarial(-exact): which divergences to minimise, with commas")
    out: str = setting("out/afd", "folder for config, metrics, results, checkpoints and figures")
    overwrite: bool = setting(False, "replace the run that --out holds")
    resume: bool = setting(False, "go on with the run that --out holds where it was stopped")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    micro_tokens: int = setting(0, "tokens that go through the model at a time in training, with "
                                   "padding; a step's gradients add up to the same (0: all)")
    bf16: bool = setting(False, "train in bfloat16 autocast; CUDA only")
    compile: bool = setting(False, "compile the transformer while it is trained; CUDA only")
    init: str = setting(None, "pi_0, with --demos its tokenizer too: a checkpoint folder or a name "
                              "on the Hugging Face hub, such as gpt2, instead of pretraining")
    demos: str = setting(None, "JSON lines (or .gz) with prompt and response, or chosen and "
                               "rejected dialogues: your own data instead of a built-in task")
    corpus: str = setting(None, "with --demos: text that pi_0 is pretrained on, plain or JSON "
                                "lines with 'text' (without it: all text of the training part)")
    prompts: str = setting(None, "with --demos: further prompts to sample from, one a line or JSON")
    gold: str = setting(None, "with --demos: FILE.py:FUNCTION, (prompt, response) -> float; or "
                              "pairs: a judge trained on half of the pairs, which no learner sees")
    n_corpus: int = setting(60000, "built-in tasks: documents of the base language for pi_0")
    n_demos: int = setting(4000, "demonstrations, at most")
    n_samples: int = setting(0, "samples of each policy for the reward models (0: 9000, or 1000 "
                                "with --demos)")
    n_preferences: int = setting(4000, "preference pairs, at most")
    label_noise: float = setting(0.0, "share in [0, 1] of preference pairs with labels swapped")
    n_prompts: int = setting(200, "held-out prompts for the evaluation, at most")
    n_candidates: int = setting(0, "largest N of best-of-N, a power of two (0: 64, or 16 with "
                                   "--demos)")
    n_embd: int = setting(64, "width of the transformer")
    n_layer: int = setting(2, "its layers")
    n_head: int = setting(4, "its attention heads")
    vocab_size: int = setting(2048, "with --demos: size of the byte-level BPE vocabulary")
    max_prompt: int = setting(192, "with --demos: longest prompt, tokens; longer ones: their end")
    max_response: int = setting(64, "with --demos: longest response, tokens; longer ones are cut")
    pretrain_epochs: float = setting(0.0, "passes over the corpus (0: 1, or 4 with --demos)")
    sft_epochs: float = setting(2.0, "passes over the demonstrations")
    reward_epochs: float = setting(1.0, "passes over the reward models' pairs")
    policy_steps: int = setting(100, "po, adversarial(-exact): policy-gradient steps")
    group: int = setting(4, "po, adversarial(-exact): samples a prompt, each other's baseline")
    dense: bool = setting(True, "po: reward each token where it is earned, not all at the last")
    ppo_clip: float = setting(0.0, "po, adversarial(-exact): PPO's clip, 4 steps a batch (0: off)")
    label_smoothing: float = setting(0.0, "adversarial: demonstrations get label 1 - this")
    reward_clip: float = setting(10.0, "adversarial(-exact): largest absolute reward")
    keep_old: bool = setting(True, "adversarial: half of the negatives are samples of old policies")
    pair_beta: float = setting(0.1, "spin, irft, dpo: beta of the reward beta log pi/pi_ref")
    rounds: int = setting(3, "irft: rounds; its opponent and samples are renewed in each")


# Built-in texts are drawn anew as often as wanted; a file of demonstrations is small and its texts
# are long. Each pair: the value for a built-in task, the value with --demos.
DEFAULTS = {"n_samples": (9000, 1000), "n_candidates": (64, 16), "pretrain_epochs": (1.0, 4.0)}
# Lists with commas and what may stand in them; the range of each number.
LISTS = {"rewards": REWARD_MODELS, "methods": METHODS, "optimise": None,    # any of the rewards
         "divergences": tuple(DIVERGENCES)}
RANGES = {"heterogeneity label_noise": (0, 1), "ppo_clip": (0, 0.9), "label_smoothing": (0, 0.4),
          "pretrain_epochs sft_epochs reward_epochs reward_clip pair_beta betas": (1e-9, 1e9),
          "seeds n_demos n_corpus n_samples n_prompts n_preferences n_candidates n_layer "
          "max_prompt max_response policy_steps rounds": (1, math.inf), "group": (2, math.inf),
          "micro_tokens": (0, math.inf)}
FLOORS = {"log-ratio": 0.0, "floored": 0.1}     # alpha; 0.1 is the plausibility constraint's usual


def schedules(s):
    """How each stage is trained, without weight decay; why so is in docs/LOG.md.

    The rates suit a width of 64. A wider transformer gets less in proportion to its width, which
    keeps the size of what a step of Adam adds to a layer's output (arXiv:2203.03466).
    """
    plans = {"pretrain": Schedule(1.2e-2, s.pretrain_epochs, batch_size=24, warmup=0.05),
             "sft": Schedule(1e-3, s.sft_epochs, evaluations=max(8, math.ceil(s.sft_epochs))),
             "reward": Schedule(3e-3, s.reward_epochs),
             "po": Schedule(3e-3), "adversarial": Schedule(3e-4),
             "adversarial-exact": Schedule(3e-3), "pairs": Schedule(3e-4)}
    return {name: replace(plan, lr=plan.lr * min(1.0, 64 / s.n_embd), micro_tokens=s.micro_tokens,
                          bf16=s.bf16, compile=s.compile) for name, plan in plans.items()}


# ---- the algorithm ------------------------------------------------------------------------------

def pretrain(world, s, run):
    """pi_0: a checkpoint, or a transformer pretrained on the corpus."""
    if s.init:
        return load_init(s.init, world).to(run.device)
    tok = world.tokenizer
    torch.manual_seed(run.rng("weights").getrandbits(62))
    new = GPT(GPTConfig(len(tok), world.max_prompt + world.max_response, s.n_embd, s.n_layer,
                        s.n_head, suppress_tokens=tok.suppress)).to(run.device)
    init, history = run.trained(
        "pretrain", f"1 pi_0: pretraining on {counted(len(world.corpus), 'texts')}", new,
        lambda: train.fine_tune(new, encode_documents(tok, world.corpus, new.config.n_positions),
                                [], schedules(s)["pretrain"], run.rng("pretrain"), "pretrain",
                                run.snapshot("pretrain")))
    run.log("pretrain", history)
    return init


def fine_tune(world, s, run, init):
    """pi_SFT: maximum likelihood on the demonstrations, which minimises the forward KL to them."""
    rng = run.rng("sft")
    parts = train.split([world.pair(x, y) for x, y in world.demos], 0.05, rng)
    sft, history = run.trained(
        "sft", f"2 pi_SFT: forward KL to {counted(len(world.demos), 'demonstrations')}", init,
        lambda: train.fine_tune(init, *parts, schedules(s)["sft"], rng, "sft", run.snapshot("sft")))
    run.log("sft", history)
    return sft


def draw_samples(world, s, run, init, sft):
    """Pairs for the reward models: two samples of each policy to each of n_samples / 2 prompts."""
    rng, half = run.rng("prompts"), math.ceil(s.n_samples / 2)
    prompts = [x for _ in range(math.ceil(half / len(world.train_prompts)))
               for x in rng.sample(world.train_prompts, len(world.train_prompts))][:half]
    ids = [world.tokenizer.encode(x) for x in prompts]
    written = run.stage(
        "samples", f"3 samples: {2 * half:,} each of pi_0 and pi_SFT", lambda: side_by_side(
            lambda job: world.sample(job[0], ids, 2, run.generator(job[1]), job[1]),
            [(init, "y ~ pi_0"), (sft, "y ~ pi_SFT")], run.device))
    return prompts, [[(x, y) for x, ys in zip(ids, part) for y in ys] for part in written]


def preference_items(world, s, run, prompts, y_sft):
    """(preferred, other) pairs: people's where there are any, else two SFT samples by golden.

    A share --label-noise of them is swapped.
    """
    items, rng = [], run.rng("labels")
    if world.preferences:
        items = [(world.pair(x, chosen), world.pair(x, rejected))
                 for x, chosen, rejected in world.preferences]
    elif world.golden:
        for i, (a, b) in enumerate(zip(y_sft[0::2], y_sft[1::2])):
            gold_a, gold_b = (world.golden(prompts[i], world.text(y)) for _, y in (a, b))
            if gold_a != gold_b:
                items.append((a, b) if gold_a > gold_b else (b, a))
    return [item[::-1] if rng.random() < s.label_noise else item
            for item in items[:s.n_preferences]]


def train_rewards(world, s, run, init, sft, labelled, y_init, y_sft):
    """{name: (reward, held-out items)} for every reward model of reward.py's table asked for."""
    rng, demos = run.rng("rewards"), [world.pair(x, y) for x, y in world.demos]
    data = {"init-sft": train.split(list(zip(y_sft, y_init)), 0.05, rng),    # the same prompts
            "init-demo": train.pair_up(demos, y_init, rng),
            "sft-demo": train.pair_up(demos, y_sft, rng),
            "preference": train.split(labelled, 0.05, rng)}

    def learn(name):
        items, held = data[name]
        loss = train.preference_step if name == "preference" else train.discriminator_step
        return run.trained(
            name, f"4 {name}: reward model on {counted(len(items), 'pairs')}",
            RewardModel(init, s.head),
            lambda: train.train_reward(init, items, held, loss, schedules(s)["reward"],
                                       run.rng(name), s.head, name, run.snapshot(name)))

    names = [name for name in data if name in s.rewards and data[name][0]]  # labels may be missing
    rewards = {}
    for name, (model, history) in zip(names, side_by_side(learn, names, run.device)):
        run.log(name, history)
        rewards[name] = (model, data[name][1])
    rewards.update({name: (LogRatio(sft, init, floor), data["init-sft"][1])
                    for name, floor in FLOORS.items() if name in s.rewards})
    return rewards


def best_of_n(s, run, rewards, truth):
    """Scores (P, N) of the candidates by every reward model and by the controls that train nothing;
    their best-of-n for every n goes to the table."""
    pairs, n, rng = truth.candidates.pairs, s.n_candidates, run.rng("random")
    values = run.stage(
        "best-of-N", f"5 best-of-N: {len(pairs):,} candidates scored", lambda: side_by_side(
            lambda name: score(rewards[name][0], pairs, run.device, n=n).tolist(),
            list(rewards), run.device))
    scores = {name: np.array(mine) for name, mine in zip(rewards, values)}
    scores["length"] = truth.candidates.lengths
    scores["random"] = np.array([rng.random() for _ in pairs])
    if truth.candidates.gold is not None:
        scores["golden"] = truth.candidates.gold
    scores = {name: mine.reshape(truth.candidates.lengths.shape) for name, mine in scores.items()}
    for name, values in scores.items():
        truth.add_best_of_n(name, values)
    return scores


# ---- beyond best-of-N: the policy itself moves ---------------------------------------------------

def optimise_policy(world, s, run, sft, truth, reward, plan, beta, label):
    """max over pi of E_pi[r] - beta KL(pi || pi_SFT), from pi_SFT; its optimum for a fixed reward
    and beta > 0 is pi_SFT e^(r/beta) / Z. Its history, with the truth that the learner does not
    see, goes to run.curves.
    """
    rng, generator = run.rng(label), run.generator(label)

    def draw(policy):
        ids = [world.tokenizer.encode(x)
               for x in rng.choices(world.train_prompts, k=plan.batch_size)]
        written = world.sample(policy, ids, s.group, generator)
        return [(x, y) for x, ys in zip(ids, written) for y in ys]

    policy, history = run.trained(
        label, f"6 {label}: {counted(s.policy_steps, 'policy-gradient steps')}", sft,
        lambda: train.optimise_policy(sft, reward, draw, s.policy_steps, plan, beta, s.group,
                                      s.ppo_clip, s.dense, label, truth.watch,
                                      run.snapshot(label), {"rng": rng, "generator": generator}),
        getattr(reward, "judge", None))
    if isinstance(reward, ExactAdversary):
        reward.policy = policy          # also if the stage was finished before
    run.log(label, history)
    run.curves[label] = history
    return policy


def self_play(world, s, run, sft, demos, rounds, label):
    """SPIN is one round: demonstrations against pi_SFT's own samples to the same prompts. IRFT
    renews the opponent and its samples in every round."""
    policy, histories = sft, []
    for i in range(rounds):
        own = world.sample(policy, [x for x, _ in demos], 1, run.generator(f"self-play {i}"), label)
        items = [(pair, (pair[0], ys[0])) for pair, ys in zip(demos, own)]
        policy, history = fit_pairs(s, run, policy, items, label, i + 1)
        histories += history
    return policy, histories


def fit_pairs(s, run, reference, items, label, number=1):
    """train.fit_pairs with this run's settings: DPO, or round `number` of SPIN and IRFT."""
    policy, history = train.fit_pairs(reference, items, s.pair_beta, schedules(s)["pairs"],
                                      run.rng("pairs"), f"{label} {number}",
                                      run.snapshot(label, f"fit {number}"))
    return policy, [{"round": number, **record} for record in history]


def run_methods(world, s, run, init, sft, rewards, labelled, truth):
    """A row of the table for every policy of --methods. Returns what the first one wrote."""
    first, plan, demos = None, schedules(s), [world.pair(x, y) for x, y in world.demos]
    if "po" in s.methods:
        for i, model in enumerate(name for name in s.optimise if name in rewards):
            for beta in s.betas if i == 0 else s.betas[:1]:     # all of them for the first model
                label = f"po {model} {beta:g}"
                policy = optimise_policy(world, s, run, sft, truth, rewards[model][0],
                                         plan["po"], beta, label)
                responses = truth.add_policy("po", policy, rewards[model][0], reward_model=model,
                                             beta=beta, seconds=run.seconds[label])
                first = first or responses
    if "closed-form" in s.methods:
        for beta in s.betas:
            for model, floor in FLOORS.items():
                truth.add_policy("closed-form", TokenExtrapolation(sft, init, beta, floor),
                                 LogRatio(sft, init, floor), reward_model=model, beta=beta)
    for method in ("adversarial", "adversarial-exact"):
        for name in s.divergences if method in s.methods else ():
            label, divergence = f"{method} {name}", get_divergence(name)
            if method == "adversarial":
                adversary = Adversary(RewardModel(init, s.head), demos, divergence,
                                      run.rng(f"judge {name}"), s.label_smoothing, s.reward_clip,
                                      s.keep_old, plan["reward"].lr, s.micro_tokens)
            elif world.demo_logp:
                adversary = ExactAdversary(world.density, divergence, s.reward_clip)
            else:
                continue        # nobody knows the density of people's own demonstrations
            policy = optimise_policy(world, s, run, sft, truth, adversary, plan[method], 0.0, label)
            truth.add_policy(method, policy, adversary, reward_model=name,
                             seconds=run.seconds[label])
    pair_methods = {"spin": lambda: self_play(world, s, run, sft, demos, 1, "spin"),
                    "irft": lambda: self_play(world, s, run, sft, demos, s.rounds, "irft"),
                    "dpo": lambda: fit_pairs(s, run, sft, labelled, "dpo")}
    for method, make in pair_methods.items():
        if method in s.methods and (labelled or method != "dpo"):
            policy, history = run.trained(method, f"6 {method}", sft, make)
            run.log(method, history)
            truth.add_policy(method, policy, seconds=run.seconds[method])
    return first


# ---- main ---------------------------------------------------------------------------------------

def check(s):
    """Fill in the defaults that depend on the data, split the lists, refuse settings out of range.

    Nothing has been written yet. Raises InputError.
    """
    for name, values in DEFAULTS.items():
        if not getattr(s, name):
            setattr(s, name, values[s.demos is not None])
    for name, known in LISTS.items():
        known = known or s.rewards
        chosen = [part for part in getattr(s, name).split(",") if part not in ("", "none")]
        chosen = list(known) if chosen == ["all"] else chosen
        for part in chosen:
            if part not in known:
                raise InputError(f"--{name}: unknown {part!r}; known: {', '.join(known)}")
        setattr(s, name, chosen)
    try:
        s.betas = [float(beta) for beta in s.betas.split(",")]
    except ValueError:
        raise InputError(f"--betas must be numbers with commas, not {s.betas}") from None
    s.optimise = s.optimise or s.rewards[:1]
    for names, (least, top) in RANGES.items():
        for name in names.split():
            if not all(least <= value <= top for value in np.atleast_1d(getattr(s, name))):
                raise InputError(f"--{name.replace('_', '-')} must lie in [{least:g}, {top:g}], "
                                 f"not {getattr(s, name)}")
    if s.n_candidates & (s.n_candidates - 1):
        raise InputError(f"--n-candidates must be a power of two, not {s.n_candidates}")
    train.check_model(s.n_embd, s.n_head, s.vocab_size)
    if s.demos:
        s.task = s.heterogeneity = s.n_corpus = None        # a built-in task's
    elif s.corpus or s.prompts or s.gold:
        raise InputError("--corpus, --prompts and --gold go with --demos")


def run_seed(s, run, world):
    """The whole story for one seed. Returns what results.json and the figures are made of."""
    init = pretrain(world, s, run)
    if world.judge_pairs:
        train_judge(world, run, init, schedules(s)["reward"])
    sft = fine_tune(world, s, run, init)
    prompts, (y_init, y_sft) = draw_samples(world, s, run, init, sft)
    labelled = preference_items(world, s, run, prompts, y_sft)
    rewards = train_rewards(world, s, run, init, sft, labelled, y_init, y_sft)
    truth = Truth(world, s.task or "file", init, sft, s.n_candidates, run)
    scores = best_of_n(s, run, rewards, truth)
    optimised = run_methods(world, s, run, init, sft, rewards, labelled, truth)
    records = run.stage("inspection", None, lambda: inspect_rewards(
        world, run.seed, rewards, scores, truth.candidates, run.device))
    out = run.out / f"seed{run.seed}"
    for name, model in (("init", init), ("sft", sft)):
        save_pretrained(out / name, model, world.tokenizer)
    for name, (reward, _) in rewards.items():
        if isinstance(reward, RewardModel):
            save_reward(out / name, reward, world.tokenizer)
    samples = pick_samples(truth, scores, min(16, s.n_candidates), optimised)
    write_json(out / "samples.json", samples)
    return truth.rows, records, run.curves, samples, run.seconds, world.gold


def run_seeds(s, world, make_world, out, head, device):
    """Every seed's story, results.json rewritten after each; prints the tables of all of them."""
    seeds, n = {}, min(16, s.n_candidates)
    for seed in range(s.seed, s.seed + s.seeds):
        world = world if seed == s.seed else make_world(s, seed)
        print("\n".join([f"seed {seed} on {device}", *world.notes]), flush=True)
        run = Run(out, seed, device)
        seeds[str(seed)] = run.whole(lambda: run_seed(s, run, world))
        rows, records, curves, samples, seconds, gold = zip(*seeds.values())
        rows, records = sum(rows, []), sum(records, [])
        results = {**head, "gold": "; ".join(filter(None, gold)), "rows": rows,
                   "reward_models": records, "seconds": dict(zip(seeds, seconds)),
                   "curves": dict(zip(seeds, curves)), "summary": summarise(rows, n)}
        write_json(out / "results.json", results)
    print_table(rows, n, results["summary"], results["gold"])
    print_reward_models(records)
    print_samples(samples[0])
    try:
        for path in draw_run(rows, records, out, results["gold"]):
            print(f"figure  {path}")
    except ImportError as error:        # the numbers are safe; only the pictures need the extra
        print(error)
    print(f"report  {write_report(out, results, samples[0], world)}")
    return results


def main(argv=None):
    """Run every seed, write results.json and the figures, print the table. Returns the results."""
    start, s = time.perf_counter(), parse_settings(Settings, argv)
    check(s)
    device, out = choose_device(s.device, s.bf16, s.compile), Path(s.out)
    make_world = file_world if s.demos else text_world
    world = make_world(s, s.seed)       # bad data is refused here, before a file is written
    if s.init:
        s.n_embd = load_init(s.init, world).config.n_embd       # schedules() goes by it
    command = " ".join(["python afd.py", *(sys.argv[1:] if argv is None else argv)])
    head = provenance(command, s, device, (
        world.corpus, world.demos, world.preferences, world.human_pairs, world.judge_pairs,
        world.train_prompts, world.test_prompts, world.test_demos))
    with claimed(out, "config.json", head, s.overwrite, s.resume) as head:
        if not any(out.glob("seed*/stages")):       # nothing to go on with
            for stale in ("results.json", "metrics.jsonl", "report.html", *FIGURES):
                (out / stale).unlink(missing_ok=True)
        results = run_seeds(s, world, make_world, out, head, device)
    print(f"results {out / 'results.json'}\n{time.perf_counter() - start:.0f} seconds")
    return results


if __name__ == "__main__":
    run_script(main)
