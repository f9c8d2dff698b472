"""Alignment from Demonstrations, read top to bottom: `python afd.py` runs the whole story.

    1  pi_0       a small transformer is pretrained on text of mixed quality
    2  pi_SFT     supervised fine-tuning on demonstrations minimises the forward KL to their writer
    3  samples    the token MDP's dynamics are known, so both policies may write: y ~ pi_0, pi_SFT
    4  rewards    a discriminator's logit is a reward; what it separates decides what it rewards
    5  best-of-N  extrapolates over a reward: of N samples of pi_SFT keep what it scores highest
    6  policies   so does policy optimisation, max E_pi[r] - beta KL(pi || pi_SFT), and the closed
                  form; beside them online adversarial imitation, SPIN, IRFT and DPO

Source: Sun and van der Schaar, "Inverse-RLignment", arXiv:2405.15624. Differs from the paper: the
reward head is summed over tokens (--head last is the common one), policies are small, and the true
quality of a text is known: its golden reward, in points, which stands beside every learned proxy.
Only `preference` and DPO see it, in their labels. In code `init` is pi_0, `sft` pi_SFT, and
`kl_coef` the beta that weighs a KL (in formulas beta is the demonstrator too). KLs are in nats.
"""

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

import train
from divergences import DIVERGENCES, bradley_terry_loss, discriminator_loss
from model import GPT, GPTConfig, generate
from reward import (HEADS, Adversary, ExactAdversary, LogRatio, RewardModel, TokenExtrapolation,
                    score)
from toy_envs.text_tasks import text_world
from utils.checkpoints import Run, claim_folder, load_init, provenance
from utils.cli import (choose_device, in_threads, parse_settings, plural, require, run_script,
                       setting)
from utils.data import describe, file_world
from utils.evaluate import (SAMPLES, Evaluator, golden_from_model, inspect_rewards, parse_methods,
                            pick_samples, sample_responses)
from utils.report import collect, present


@dataclass
class Settings:
    """Align a language model from demonstrations alone; golden beside every number.

    python afd.py                             the helpful task, one seed
    python afd.py --task harmless --seeds 5   means, intervals over five seeds
    python afd.py --heterogeneity 1           the demonstrator is another writer
    python afd.py --demos FILE                your own data
    python afd.py --demos FILE --dry-run      what is in it, what would be cut
    """
    task: str = setting("helpful", "built-in text task", choices=["helpful", "harmless"])
    base: str = setting("good", "habits of pi_0's language in that task", choices=["good", "idle"])
    heterogeneity: float = setting(0.0, "chance of a mark, which no policy can write", 0, 1)
    seed: int = setting(0, "first random seed", 0, 2 ** 32)
    seeds: int = setting(1, "how many seeds; from two on, intervals are over seeds", 1)
    head: str = setting("sum", "reward head: summed over tokens, or at the last", choices=HEADS)
    methods: str = setting(
        "po init-sft 0.3, closed-form log-ratio 0.3, closed-form floored 0.3",
        "policies beyond best-of-N, with commas: po REWARD BETA, closed-form RATIO BETA, "
        "temperature T, spin, irft, dpo, adversarial(-exact) DIVERGENCE; all; none")
    label_noise: float = setting(0.0, "share of preference pairs with labels swapped", 0, 1)
    out: str = setting("out/afd", "folder for results, report, figures, checkpoints")
    resume: bool = setting(False, "go on with the run in --out after its last finished stage")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    fast: bool = setting(False, "train in bfloat16 autocast and compiled; CUDA only")
    init: str = setting(None, "pi_0: a checkpoint folder or a name on the hub, such as gpt2")
    demos: str = setting(None, "your own data: JSON lines with prompt and response, messages, or "
                               "chosen and rejected dialogues")
    corpus: str = setting(None, "with --demos: text to pretrain pi_0 on, plain or JSON lines")
    prompts: str = setting(None, "with --demos: further prompts to sample from")
    gold: str = setting(None, "with --demos: FILE.py:FUNCTION, (prompt, response) -> float; or "
                              "pairs: a model trained on half of the pairs, seen by no learner")
    dry_run: bool = setting(False, "with --demos: only describe the file")
    n_corpus: int = setting(60000, "documents of the base language that pi_0 is trained on", 1)
    n_demos: int = setting(4000, "demonstrations, at most", 1)
    n_samples: int = setting(0, "samples of each policy (0: 9000, with --demos 1000)", 0)
    n_prompts: int = setting(200, "held-out prompts for the evaluation, at most", 1)
    n_candidates: int = setting(0, "largest N of best-of-N (0: 64, with --demos 16)",
                                choices=[0, 1, 2, 4, 8, 16, 32, 64, 128, 256])
    n_embd: int = setting(64, "the model's width", choices=[16, 32, 64, 128, 256, 512, 768, 1024])
    n_layer: int = setting(2, "its layers", 1)
    max_prompt: int = setting(192, "with --demos: tokens of a prompt, at most; its end is kept", 1)
    max_response: int = setting(64, "with --demos: tokens of a response; longer ones are cut", 1)
    sft_epochs: float = setting(4.0, "passes over the demonstrations", 1e-9, 1e9)
    policy_steps: int = setting(100, "po, adversarial: policy-gradient steps", 1)


# How each stage is trained at a width of 64; docs/LOG.md says why.
PRETRAIN = train.TrainConfig(lr=1.2e-2, batch_size=24, warmup=0.05)
SFT, REWARD = train.TrainConfig(lr=3e-3), train.TrainConfig(lr=3e-3)
POLICY, ADVERSARIAL = train.PolicyConfig(lr=3e-3), train.PolicyConfig(lr=3e-4)
PAIRS, DPO_BETA, IRFT_ROUNDS = train.TrainConfig(lr=3e-4), 0.1, 3
FLOORS = {"log-ratio": 0.0, "floored": 0.1}         # alpha of reward.LogRatio


# ---- the algorithm ------------------------------------------------------------------------------

def run(s, world, stages, init=None):
    """The whole story for one seed. Returns the seed's part of results.json.

    init: pi_0 where it need not be trained (--init).
    stages: the seed's folder (utils.checkpoints.Run), which also gives each stage a random stream.
    `stages.load(...) or stages.save(name, model, history)` returns the model either way: read, if
    --resume goes on with a run that has finished the stage, or else trained now and saved.
    """
    device, tok = stages.device, world.tokenizer
    demos = [world.pair(x, y) for x, y in world.demos]

    def config(base, **changes):
        # A wider transformer gets a lower rate, in proportion to its width. That keeps the size of
        # what a step of Adam adds to a layer's output (arXiv:2203.03466).
        return replace(base, lr=base.lr * min(1.0, 64 / s.n_embd), fast=s.fast, **changes)

    # 1  pi_0: next-token prediction on text of mixed quality. What pi_SFT holds out is set apart
    #    before, because without --corpus pi_0 reads the demonstrations themselves.
    sft_rng = stages.rng("sft")
    learned, held_out = train.split(demos, sft_rng)
    if init is not None:
        init = init.to(device)
        s = replace(s, n_embd=init.config.n_embd)
    else:
        stages.begin(f"1 pi_0: pretraining on {plural(len(world.corpus or learned), 'texts')}")
        torch.manual_seed(stages.rng("weights").getrandbits(62))
        new = GPT(GPTConfig(len(tok), world.max_prompt + world.max_response, s.n_embd, s.n_layer,
                            n_head=max(4, s.n_embd // 64), suppress_tokens=tok.suppress,
                            eos_token_id=tok.eos, pad_token_id=tok.pad)).to(device)
        init = stages.load("init", GPT) or stages.save("init", *train.fine_tune(
            new, tok.encode_documents(world.corpus, new.config.n_positions)
            or [([], x + y) for x, y in learned], [],
            config(PRETRAIN, epochs=4 if s.demos else 1), stages.rng("pretrain"), "pretrain"))
    if world.gold_pairs:    # --gold pairs: a trained model in golden's place, on pairs of its own
        stages.begin(f"1 gold model: trained on {plural(len(world.gold_pairs), 'pairs')}")
        rng = stages.rng("gold model")
        items = [(world.pair(x, a), world.pair(x, b)) for x, a, b in world.gold_pairs]
        gold_model = stages.load("gold_model", RewardModel) or stages.save(
            "gold_model", *train.train_reward(RewardModel(init), *train.split(items, rng),
                                              bradley_terry_loss, config(REWARD), rng))
        world.golden, world.golden_ids, world.golden_note = golden_from_model(gold_model, world)

    # 2  pi_SFT: maximum likelihood on the demonstrations minimises KL(demonstrator || pi)
    stages.begin(f"2 pi_SFT: forward KL to {plural(len(demos), 'demonstrations')}")
    sft = stages.load("sft", GPT) or stages.save("sft", *train.fine_tune(
        init, learned, held_out, config(SFT, epochs=s.sft_epochs), sft_rng))

    # 3  samples: two of each policy to each prompt. The learner can write by itself, because it
    #    knows the dynamics: plain fine-tuning leaves that unused.
    rng, n_prompts = stages.rng("prompts"), math.ceil(s.n_samples / 2)
    stages.begin(f"3 samples: {2 * n_prompts:,} each of pi_0 and pi_SFT")
    prompts = []
    while len(prompts) < n_prompts:     # every prompt once before any comes again
        prompts += rng.sample(world.train_prompts, len(world.train_prompts))
    prompts = prompts[:n_prompts]
    ids, writers = [tok.encode(x) for x in prompts], {"y ~ pi_0": init, "y ~ pi_SFT": sft}

    def write(name):
        ys = generate(writers[name], ids, 2, max_new_tokens=world.max_response, label=name,
                      generator=stages.generator(name))
        return [(x, y) for x, two in zip(ids, ys) for y in two]     # pairs (prompt, response)
    from_init, from_sft = stages.load_json("samples") or stages.save_json(
        "samples", in_threads(write, list(writers), device))

    # 4  rewards: a discriminator learns whatever its two sources differ in.
    #    THE METHOD is the first line of the table: positives y ~ pi_SFT, negatives y ~ pi_0. One
    #    model family wrote both, to the same prompts. What is left to tell them apart is what
    #    fine-tuning changed, and that direction is the reward. Where demonstrations are the
    #    positives, the discriminator may learn who wrote instead of how well.
    rng = stages.rng("rewards")
    labelled = world.preference_pairs(from_sft, s.label_noise, stages.rng("labels"))
    data = {"init-sft": train.split(list(zip(from_sft, from_init)), rng),
            "init-demo": train.pair_up(demos, from_init, rng),
            "sft-demo": train.pair_up(demos, from_sft, rng),
            "preference": train.split(labelled, rng)}
    stages.begin(f"4 rewards: discriminators on {plural(len(data['init-sft'][0]), 'pairs')}")

    def train_one(name):
        loss = bradley_terry_loss if name == "preference" else discriminator_loss
        return stages.load(name, RewardModel) or stages.save(name, *train.train_reward(
            RewardModel(init, s.head), *data[name], loss, config(REWARD), stages.rng(name), name))
    names = [name for name, (items, _) in data.items() if items]        # labels may be missing
    rewards = dict(zip(names, in_threads(train_one, names, device)))
    # The optimum of init-sft in closed form, plain and floored: nothing is trained for these two.
    for name, floor in FLOORS.items():
        rewards[name], data[name] = LogRatio(sft, init, floor), data["init-sft"]

    # 5  best-of-N: of N samples of pi_SFT to a held-out prompt keep the one scored highest
    P, N, n = len(world.test_prompts), s.n_candidates, min(16, s.n_candidates)
    stages.begin(f"5 best-of-N: {N} candidates to each of {plural(P, 'held-out prompts')}")
    candidates = sample_responses(world, sft, N, stages.generator("candidates samples"), "y ~ SFT")
    # Win rates are counted against fresh samples, so that no candidate meets itself.
    comparison = sample_responses(world, sft, SAMPLES, stages.generator("rivals samples"))
    evaluator = Evaluator(world, sft, candidates, comparison, stages)
    evaluator.add_policy("init", init)
    evaluator.add_reference_rows()
    scores = dict(zip(rewards, in_threads(lambda name: score(rewards[name], candidates.pairs)
                                          .reshape(P, N), list(rewards), device)))
    # Controls train no reward: pi_SFT's own likelihood, length, chance, and the golden reward.
    scores.update(evaluator.controls(stages.rng("random")))
    for name in scores:
        # N candidates are N / n independent groups of n: the pick of each group is its argmax.
        picks = scores[name].reshape(P, N // n, n).argmax(-1) + n * np.arange(N // n)   # (P, N/n)
        evaluator.add_best_of_n(name, picks, scores[name], n)
        evaluator.add_curve(name, scores[name])     # for every n, from all subsets of size n

    # 6  policies: instead of picking among its samples, the policy itself moves
    def optimise(method, reward, base, kl_coef=0.0):
        rng, generator, seen = stages.rng(method), stages.generator(method), []

        def draw(policy):               # y ~ pi to training prompts, base.samples to each
            ids = [tok.encode(x) for x in rng.choices(world.train_prompts, k=base.batch_size)]
            ys = generate(policy, ids, base.samples, max_new_tokens=world.max_response,
                          generator=generator)
            pairs = [(x, y) for x, group in zip(ids, ys) for y in group]
            seen.append(evaluator.measure(pairs))       # the truth, which the learner never sees
            return pairs
        policy = stages.load(method, GPT)
        if policy is None:
            policy, history = train.optimise_policy(
                sft, reward, draw, config(base, steps=s.policy_steps), kl_coef, method)
            stages.save(method, policy, [{**a, **b} for a, b in zip(history, seen)])
        return policy

    for method in s.methods:            # "po init-sft 0.3", as in the table
        kind, *words = method.split()
        stages.begin(f"6 {method}")
        if kind == "po" and words[0] in rewards:    # max E_pi[r] - beta KL(pi || pi_SFT)
            policy = optimise(method, rewards[words[0]], POLICY, float(words[1]))
            evaluator.add_policy(method, policy, rewards[words[0]])
        elif kind == "closed-form":                 # pi_SFT (pi_SFT / pi_0)^(1/beta), by token
            policy = TokenExtrapolation(sft, init, float(words[1]), FLOORS[words[0]])
            evaluator.add_policy(method, policy, rewards[words[0]])
        elif kind == "temperature":                 # pi_SFT^(1/T): a floor of 1 makes pi_0's place
            T = float(words[0])                     # uniform, and 1/T is 1 + 1/beta
            evaluator.add_policy(method, TokenExtrapolation(sft, init, T / (1 - T), floor=1.0))
        elif kind == "adversarial":                 # the discriminator is trained along
            adversary = Adversary(RewardModel(init, s.head), demos, DIVERGENCES[words[0]],
                                  stages.rng(f"discriminator {words[0]}"), config(REWARD).lr)
            evaluator.add_policy(method, optimise(method, adversary, ADVERSARIAL))
        elif kind == "adversarial-exact" and world.demo_logp:       # a perfect discriminator
            adversary = ExactAdversary(world.demo_density, DIVERGENCES[words[0]], sft)
            evaluator.add_policy(method, optimise(method, adversary, POLICY))
        elif kind in ("spin", "irft"):              # demonstrations against the policy's samples:
            policy = sft                            # SPIN is one round, IRFT renews its opponent
            for i in range(1 if kind == "spin" else IRFT_ROUNDS):
                opponent, name = policy, f"self-play {i}"       # both share their first round
                policy = stages.load(name, GPT)
                if policy is None:
                    own = generate(opponent, [x for x, _ in demos], label=kind,
                                   max_new_tokens=world.max_response,
                                   generator=stages.generator(name))
                    items = [((x, y), (x, ys[0])) for (x, y), ys in zip(demos, own)]
                    policy = stages.save(name, *train.fit_pairs(
                        opponent, items, DPO_BETA, config(PAIRS), stages.rng(name), kind))
            evaluator.add_policy(method, policy)
        elif kind == "dpo" and labelled:            # labels, as `preference` gets them
            policy = stages.load("dpo", GPT) or stages.save("dpo", *train.fit_pairs(
                sft, labelled, DPO_BETA, config(PAIRS), stages.rng("dpo"), "dpo"))
            evaluator.add_policy(method, policy)
        else:
            print(f"     left out: these data have no labels or no density, which {kind} needs")

    return {"rows": evaluator.rows, "best_of_n": evaluator.curve, "golden": world.golden_note,
            "reward_models": inspect_rewards(world, stages.seed, rewards, data, scores, candidates),
            "curves": {m: stages.history(m) for m in s.methods if m.startswith(("po", "adv"))},
            "samples": pick_samples(evaluator, scores, n), "seconds": stages.end()}


# ---- main ---------------------------------------------------------------------------------------

def check(s):
    """Fill in what depends on other settings; refuse what cannot run. Raises InputError."""
    s.n_samples = s.n_samples or (1000 if s.demos else 9000)
    s.n_candidates = s.n_candidates or (16 if s.demos else 64)
    s.methods = parse_methods(s.methods)
    require(s.demos or not (s.corpus or s.prompts or s.gold or s.dry_run),
            "--corpus, --prompts, --gold and --dry-run go with --demos")


def main(argv=None):
    """Run every seed, write results.json, the report and the figures. Returns the results."""
    start, s = time.perf_counter(), parse_settings(Settings, argv)
    check(s)
    if s.dry_run:
        print(describe(s.demos, s))
        return None
    device, make_world = choose_device(s.device), file_world if s.demos else text_world
    require(device.type == "cuda" or not s.fast, f"--fast needs CUDA; the device is {device}")
    world = make_world(s, s.seed)       # bad data is refused here, before a file is written
    init = load_init(s.init, world) if s.init else None     # so is a checkpoint that does not fit
    header = provenance("afd.py", argv, s, device, world)
    out, parts = claim_folder(s.out, header, s.resume), {}
    for seed in range(s.seed, s.seed + s.seeds):
        world = world if seed == s.seed else make_world(s, seed)
        print("\n".join([f"seed {seed} on {device}", *world.notes]), flush=True)
        stages = Run(out, seed, device, world.tokenizer)
        parts[str(seed)] = stages.load_json("results") or stages.save_json(
            "results", run(s, world, stages, init))
        results = collect(out, header, parts)         # written anew after each seed
    present(out, results, world)
    print(f"results {out / 'results.json'}\n{time.perf_counter() - start:.0f} seconds")
    return results


if __name__ == "__main__":
    run_script(main)
