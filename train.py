"""Text in, checkpoints out: the training loops and their losses, stage by stage.

    python train.py data FILE                       what is in it, what is cut
    python train.py pretrain --corpus TEXT --out pi_0
    python train.py sft --demos DEMOS.jsonl --init pi_0 --out pi_sft
    python train.py sample --prompts PROMPTS.txt --init pi_sft --out A
    python train.py reward --positives A --negatives B --init pi_0 --out reward
    torchrun --nproc_per_node=2 train.py sft ...    the same on two GPUs

A pair is (prompt ids, response ids): the response ends with EOS if it is finished. Pretraining
reads a document as a response to the empty prompt. Only response tokens that the policy can write
bear loss. Losses are in nats per token, discriminator losses in nats per pair of samples.
"""

import copy
import json
import math
import random
import shutil
import sys
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from divergences import discriminator_loss, policy_gradient_loss
from model import (GPT, GPTConfig, InputError, bpe_tokenizer, collate, encode_documents,
                   logp_at, logp_token, sample_responses, write_aside, write_json)
from reward import HEADS, RewardModel, at_the_end, bradley_terry_loss, implicit_reward
from utils.batches import (Forward, Objective, add_up_gradients, flattened, from_all,
                              length_batches, micro_batches, processes, rank_and_count)
from utils.checkpoints import load_pretrained, save_pretrained, save_reward
from utils.data import describe, read_pairs, read_prompts, read_texts
from utils.cli import (Snapshot, choose_device, claimed, parse_settings, provenance, run_script,
                           setting)


# ---- the loop -----------------------------------------------------------------------------------

@dataclass
class Schedule:
    """How one stage is trained: AdamW, linear warm-up, cosine to a hundredth, gradient clipping."""
    lr: float = setting(1e-3, "peak learning rate")
    epochs: float = setting(1.0, "passes over the data")
    batch_size: int = setting(16, "items per step")
    warmup: float = setting(0.1, "share of the steps spent warming up")
    weight_decay: float = setting(0.0, "decoupled weight decay, of matrices")
    clip: float = setting(1.0, "largest gradient norm")
    evaluations: int = setting(8, "looks at the held-out data; the best one is kept")
    micro_tokens: int = setting(0, "tokens that go through the model at a time, padding included; "
                                   "a step's gradients add up to the same (0: all of a step)")
    bf16: bool = setting(False, "train in bfloat16 autocast; CUDA only")
    compile: bool = setting(False, "compile the transformer while it is trained; CUDA only")


def learning_rate(schedule, step, steps):
    """Linear warm-up to schedule.lr, then half a cosine down to a hundredth of it."""
    warmup = max(1, int(schedule.warmup * steps))
    if step < warmup:
        return schedule.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return schedule.lr * (0.01 + 0.495 * (1 + math.cos(math.pi * progress)))


def fit(model, items, loss_fn, schedule, rng, label="fit", held_out=(), snapshot=None,
        weigh=lambda model, items: len(items)):
    """Minimise loss_fn(model, list of items); with held-out items, keep the weights best on them.

    weigh(model, items): how many terms loss_fn is a mean over; items of none are left out.
    snapshot: a path where the loop keeps its state now and then; called with the same arguments
    again it goes on from there, bit for bit. The caller removes it.
    Returns the history, a list of {step, loss[, held_out]}. Raises InputError at a loss that is not
    finite, naming the step; the model is then not to be used.
    """
    items, held_out = ([i for i in part if weigh(model, [i])] for part in (items, held_out))
    if not items:
        raise InputError(f"{label}: no data to train on")
    objective = Objective(model, loss_fn, weigh, schedule)
    optimizer = make_optimizer(model, schedule)
    first = rank_and_count()[0] == 0
    snapshots = Snapshot(snapshot, (schedule, items, held_out, rng.getstate()), model=model,
                         optimizer=optimizer)
    state = {"history": [], "best": math.inf, "best_model": None, "epoch": rng.getstate(),
             "left": None, **snapshots.restore(device_of(model))}
    rng.setstate(state["epoch"])        # from before this epoch's batches were drawn
    queue = length_batches(items, schedule.batch_size, rng)[:state["left"]]
    history = state["history"]
    steps = max(1, math.ceil(schedule.epochs * len(items) / schedule.batch_size))
    looks = {math.ceil(steps * (i + 1) / schedule.evaluations) - 1
             for i in range(schedule.evaluations)}
    for step in tqdm(range(len(history), steps), label, steps, initial=len(history), unit="step",
                     disable=None if first else True, leave=False):
        if not queue:
            state["epoch"] = rng.getstate()
            queue = length_batches(items, schedule.batch_size, rng)
        loss = objective.accumulate(queue.pop())
        add_up_gradients(optimizer)
        take_step(optimizer, loss, schedule, step, steps, label)
        history.append({"step": step, "loss": loss})
        if held_out and step in looks:
            history[-1]["held_out"] = now = objective.mean(held_out, schedule.batch_size)
            if now < state["best"]:
                state.update(best=now, best_model=copy.deepcopy(model.state_dict()))
        if first:
            snapshots.keep(**{**state, "left": len(queue)})
    if state["best_model"] is not None:
        model.load_state_dict(state["best_model"])
    model.zero_grad()       # or its gradient would stay in memory with it
    return history


def make_optimizer(model, schedule, betas=(0.9, 0.99)):
    """AdamW of two tensors that hold all parameters; weight decay is for matrices only."""
    groups = [{"params": [flattened([p for p in model.parameters() if (p.dim() > 1) == matrices])],
               "weight_decay": schedule.weight_decay * matrices} for matrices in (True, False)]
    return torch.optim.AdamW(groups, lr=schedule.lr, betas=betas, fused=True)


def take_step(optimizer, loss, schedule, step, steps, label):
    """Step number `step` of `steps` down the gradient, clipped, at the schedule's rate. Raises
    InputError if the loss or the gradient is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.clip).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise InputError(f"{label}: the loss is {loss}, its gradient's norm {norm}, at step {step};"
                         " a lower learning rate may help")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(schedule, step, steps)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)      # the parameters' gradients are parts of these


# ---- the stages ---------------------------------------------------------------------------------

def device_of(model):
    return next(model.parameters()).device


def nll_loss(model, items):
    """-mean over the batch's response tokens of log pi(y_t|s_t), nats per token: the SFT loss.

    Its expectation over demonstrations is the forward KL up to a constant and to the weight of a
    token, 1 / (tokens in its batch). Tokens that the policy cannot write are states, not targets:
    they bear no loss.
    """
    batch = collate([pair for (pair,) in items], device_of(model))
    writable = batch.response_mask() & model.suppress.isfinite()[batch.tokens]
    return -logp_at(model, batch, writable).mean()


def targets(model, items):
    """How many tokens nll_loss is a mean over."""
    never = set(model.config.suppress_tokens)
    return sum(token not in never for ((prompt, response),) in items
               for token in response[not prompt:])      # a first token of all has no state


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


def pair_up(positives, negatives, rng):
    """(learn, held-out) items (positive, negative).

    A twentieth of each source is held out first, so that no held-out text was trained on; then the
    shorter source is gone through again and again.
    """
    def cycle(a, b):
        n = max(len(a), len(b)) if a and b else 0
        return [(a[i % len(a)], b[i % len(b)]) for i in range(n)]
    (a, a_held), (b, b_held) = split(positives, 0.05, rng), split(negatives, 0.05, rng)
    return cycle(a, b), cycle(a_held, b_held)


def fine_tune(policy, learn, held_out, schedule, rng, label="sft", snapshot=None):
    """(policy, history): a copy of policy of least nll_loss on pairs (prompt ids, response ids)."""
    policy = copy.deepcopy(policy)
    learn, held_out = ([(pair,) for pair in pairs] for pairs in (learn, held_out))
    return policy, fit(policy, learn, nll_loss, schedule, rng, label, held_out, snapshot, targets)


def train_reward(policy, items, held_out, loss_fn, schedule, rng, head="sum", label="reward",
                 snapshot=None):
    """A RewardModel started from policy, trained on items (better pair, worse pair).

    The held-out items pick the weights: no model is judged by its overfit. Returns the model and
    its history.
    """
    model = RewardModel(policy, head)
    return model, fit(model, items, loss_fn, schedule, rng, label, held_out, snapshot)


def optimise_policy(sft, reward, draw, steps, schedule, beta, k, ppo_clip=0.0, dense=True,
                    label="policy", watch=None, snapshot=None, draws_from=None):
    """max over pi of E_pi[r] - beta KL(pi || pi_SFT), starting at pi_SFT, by REINFORCE with a
    leave-one-out baseline. Returns the policy and its history: the samples' means in nats per
    sequence, and what watch(policy, pairs) says of them.

    draw(policy) gives pairs, the k samples of a prompt together; a reward that learns along has
    learn(pairs, policy). dense: a reward that is a sum over tokens is given where it is earned.
    snapshot: as in fit(); draws_from: what draw draws from, {name: random.Random or
    torch.Generator}, and a reward that learns are then part of it.
    """
    policy = copy.deepcopy(sft)
    forward = Forward(policy, logp_token, schedule.bf16, schedule.compile)
    reference = Forward(sft, logp_token, schedule.bf16)     # as it is computed for the policy
    optimizer = make_optimizer(policy, schedule, betas=(0.9, 0.95))
    learner = {"reward": reward} if hasattr(reward, "learn") else {}
    snapshots = Snapshot(snapshot, (schedule, steps, beta, k, ppo_clip, dense), model=policy,
                         optimizer=optimizer, **learner, **(draws_from or {}))
    history = snapshots.restore(device_of(policy)).get("history", [])
    for step in tqdm(range(len(history), steps), label, steps, initial=len(history), unit="step",
                     disable=None, leave=False):
        pairs = draw(policy)
        if learner:
            reward.learn(pairs, policy)
        groups = [pairs[i:i + k] for i in range(0, len(pairs), k)]
        parts = [rewarded(reference, reward, [pair for group in part for pair in group], dense)
                 for part in micro_batches(groups, schedule.micro_tokens)]
        old = None
        for _ in range(4 if ppo_clip else 1):
            loss, logp = policy_gradient(forward, parts, old, beta, k, ppo_clip)
            old = old or logp
            take_step(optimizer, loss, schedule, step, steps, label)
        history.append({"step": step, **sample_means(parts, old),
                        **(watch(policy, pairs) if watch else {})})
        snapshots.keep(history=history)
    policy.zero_grad()
    return policy, history


@torch.no_grad()
def rewarded(reference, reward, pairs, dense):
    """(batch, its rewards (B, T), log pi_SFT (B, T)) of samples."""
    batch = collate(pairs, device_of(reference.model))
    rewards = reward.token_rewards(batch)
    return batch, rewards if dense else at_the_end(rewards.sum(1), batch), reference(batch)


def policy_gradient(forward, parts, old, beta, k, clip):
    """Add up the gradient of policy_gradient_loss over the parts that rewarded() gave.

    old: log pi of each part when it was drawn; None: it is drawn from the policy as it is now.
    Returns the loss, a float, and log pi of each part.
    """
    n, total, logps = sum(len(rewards) for _, rewards, _ in parts), 0.0, []
    for i, (batch, rewards, logp_sft) in enumerate(parts):
        logp = forward(batch)
        logps.append(logp.detach())
        loss = policy_gradient_loss(logp, (old or logps)[i], logp_sft, rewards,
                                    batch.response_mask(), beta, k, clip) * (len(logp) / n)
        loss.backward()
        total += loss.item()
    return total, logps


def sample_means(parts, old):
    """Means over samples, nats per sequence: proxy reward, log pi - log pi_SFT, -log pi."""
    def mean(values):
        return torch.cat([part.sum(1) for part in values]).mean().item()
    return {"proxy": mean(rewards for _, rewards, _ in parts),
            "kl_from_sft": mean(a - b for a, (_, _, b) in zip(old, parts)), "entropy": -mean(old)}


def fit_pairs(reference, items, beta, schedule, rng, label="pairs", snapshot=None):
    """The policy, started at the reference, of least Bradley-Terry loss of its implicit reward
    beta (log pi - log pi_ref) on items (preferred pair, other pair), and the history.

    Labelled pairs make this DPO; a demonstration and pi_ref's own sample make it SPIN.
    """
    policy = copy.deepcopy(reference)

    def loss_fn(model, items):
        batch = collate([pair for item in items for pair in item], device_of(model))
        r = implicit_reward(model, reference, batch, beta)
        return bradley_terry_loss(r[0::2], r[1::2])
    learn, held_out = split(items, 0.05, rng)
    return policy, fit(policy, learn, loss_fn, schedule, rng, label, held_out, snapshot)


# ---- stage by stage, from the command line ------------------------------------------------------

STAGES = {"data": [], "pretrain": ["corpus"], "sft": ["demos", "init"],     # and what each needs
          "sample": ["prompts", "init"], "reward": ["positives", "negatives", "init"]}
# Who trains nothing uses, of the flags whose help names no stage:
SHARED = {"data": ["init"], "sample": ["init", "out", "overwrite", "seed", "device"]}


@dataclass
class Settings(Schedule):
    """The flags of all stages; where the help begins with names of stages, they alone use it."""
    corpus: str = setting(None, "pretrain: plain text by paragraph, or JSON lines with 'text'")
    demos: str = setting(None, "sft: JSON lines with prompt and response, or chosen and rejected")
    positives: str = setting(None, "reward: examples with label 1, as for --demos")
    negatives: str = setting(None, "reward: examples with label 0, as for --demos")
    prompts: str = setting(None, "sample: prompts, one a line or JSON lines")
    per_prompt: int = setting(1, "sample: responses to each prompt")
    init: str = setting(None, "the checkpoint to start from: a folder in the format of GPT-2, or a "
                              "name on the Hugging Face hub such as gpt2 (pretrain: optional)")
    out: str = setting(None, "the checkpoint folder to write; sample: the file")
    overwrite: bool = setting(False, "replace what --out holds")
    resume: bool = setting(False, "pretrain, sft, reward: go on where this was stopped")
    seed: int = setting(0, "random seed")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    head: str = setting("sum", "reward: the reward head", choices=list(HEADS))
    max_prompt: int = setting(192, "data: longest prompt in tokens; longer ones keep their end")
    max_response: int = setting(64, "data, sft, reward, sample: longest response, tokens")
    n_positions: int = setting(256, "pretrain: longest sequence in tokens")
    n_embd: int = setting(64, "pretrain: width")
    n_layer: int = setting(2, "pretrain: layers")
    n_head: int = setting(4, "pretrain: attention heads")
    vocab_size: int = setting(2048, "data, pretrain: size of the byte-level BPE vocabulary")


def flags_of(stage=None):
    """Settings with the flags that one stage uses alone, its examples for a docstring: its help."""
    def used(f):
        named = {*f.metadata["help"].partition(":")[0].split(", ")}
        return stage in named if named <= {*STAGES} else f.name in SHARED.get(stage, [f.name])
    flags = [(f.name, f.type, setting(f.default, **f.metadata)) for f in fields(Settings)
             if stage is None or used(f)]
    title, *lines = __doc__.splitlines()
    examples = [line for line in lines if f" train.py {stage or ''}" in line]
    return make_dataclass("Flags", flags, namespace={"__doc__": "\n".join([title, "", *examples])})


def check_model(n_embd, n_head, vocab_size):
    """Refuse a transformer that cannot be built. Raises InputError."""
    if n_head < 1 or n_embd < n_head or n_embd % n_head:
        raise InputError(f"--n-embd {n_embd} must be a multiple of --n-head {n_head}")
    if vocab_size < 258:
        raise InputError(f"--vocab-size {vocab_size}: 256 bytes and two special tokens are least")


def check(stage, s):
    """Refuse settings that the stage cannot run with. Raises InputError."""
    for name in ("lr", "epochs", "batch_size", "max_response", "n_positions", "n_layer",
                 "per_prompt", "clip", "evaluations"):
        if not (getattr(s, name) > 0 and math.isfinite(getattr(s, name))):
            raise InputError(f"--{name.replace('_', '-')} must be positive")
    check_model(s.n_embd, s.n_head, s.vocab_size)
    for name in (*STAGES[stage], "out"):
        if getattr(s, name) is None:
            raise InputError(f"{stage} needs --{name}")


def sample(s, device):
    """Write n responses to each prompt as JSON lines, which the other stages read as examples.

    Prompts go in chunks, each with randomness of its own: the result is the same whoever draws it.
    """
    out, (rank, count) = Path(s.out), rank_and_count()
    if out.exists() and not s.overwrite:
        raise InputError(f"{out} is there already: choose another --out, or --overwrite it")
    model, tokenizer, _ = load_pretrained(s.init, trunk=False)
    model, room = model.to(device), model.config.n_positions - s.max_response
    if room < 1:
        raise InputError(f"--max-response {s.max_response} leaves no room for a prompt")
    prompts = [(x, tokenizer.encode(tokenizer.tail(x, room))) for x in read_prompts(s.prompts)]
    chunks = [prompts[i:i + 32] for i in range(0, len(prompts), 32)]

    def draw(number):
        seed = random.Random(f"{s.seed} {number}").getrandbits(62)
        return sample_responses(model, [ids for _, ids in chunks[number]], s.per_prompt,
                                s.max_response, tokenizer.eos,
                                torch.Generator(device).manual_seed(seed))
    parts = from_all([draw(number) for number in range(rank, len(chunks), count)])
    drawn = [row for number in range(len(chunks)) for row in parts[number % count][number // count]]
    rows = [{"prompt": x, "response": tokenizer.decode(y)} for (x, _), ys in zip(prompts, drawn)
            for y in ys]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["response"].strip()]
    if rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_aside(out, lambda part: part.write_text("".join(lines), encoding="utf-8"))
    print(f"sample: {len(lines)} responses, {len(rows) - len(lines)} empty ones left out; {out}")


def run_stage(stage, s, device):
    """Train one stage as the settings say and write its checkpoint."""
    rng = random.Random(s.seed)
    torch.manual_seed(s.seed)
    texts = read_texts(s.corpus) if stage == "pretrain" else None
    if s.init:
        model, tokenizer, _ = load_pretrained(s.init)
    else:
        tokenizer = bpe_tokenizer(texts, s.vocab_size)
        model = GPT(GPTConfig(len(tokenizer), s.n_positions, s.n_embd, s.n_layer, s.n_head,
                              suppress_tokens=tokenizer.suppress))
    if stage == "pretrain":
        data = encode_documents(tokenizer, texts, model.config.n_positions), []
    else:
        pairs = [read_pairs(getattr(s, name), tokenizer, model.config.n_positions, s.max_response)
                 for name in STAGES[stage] if name != "init"]
        data = pair_up(*pairs, rng) if stage == "reward" else split(*pairs, 0.05, rng)
    out, head = Path(s.out), provenance(f"python train.py {stage}", s, device, data)
    with claimed(out, "train.json", head, s.overwrite, s.resume) as head:
        history, model = head.get("history"), model.to(device)
        if history is None:     # else it was finished before
            plan = Schedule(*(getattr(s, field.name) for field in fields(Schedule))), rng
            if stage == "reward":
                model, history = train_reward(model, *data, discriminator_step, *plan, s.head,
                                              stage, out / "stages" / "fit")
            else:
                model, history = fine_tune(model, *data, *plan, stage, out / "stages" / "fit")
            if rank_and_count()[0] == 0:
                (save_reward if stage == "reward" else save_pretrained)(out, model, tokenizer)
                write_json(out / "train.json", {**head, "history": history})
                shutil.rmtree(out / "stages", ignore_errors=True)
    best = sorted(record["held_out"] for record in history if "held_out" in record)[:1]
    print(f"{stage}: loss {history[0]['loss']:.3f} -> {history[-1]['loss']:.3f} in {len(history)} "
          f"steps{''.join(f', held-out loss {loss:.3f}' for loss in best)}; {out}")


def main(argv=None):
    stage, *rest = (sys.argv[1:] if argv is None else argv) or [None]
    if {"-h", "--help"} & {stage, *rest}:
        return parse_settings(flags_of(stage if stage in STAGES else None), ["--help"])
    if stage not in STAGES:
        raise InputError(f"name a stage first: {', '.join(STAGES)} (--help says more)")
    file = rest.pop(0) if stage == "data" and rest and rest[0][:1] != "-" else None
    s = parse_settings(Settings, rest)      # all flags: a script may share some among its stages
    if stage == "data":
        if file is None:
            raise InputError("data needs a file: python train.py data FILE")
        check_model(s.n_embd, s.n_head, s.vocab_size)
        return print(describe(file, s))
    check(stage, s)
    device = choose_device(s.device, s.bf16, s.compile)
    with processes(device):
        return sample(s, device) if stage == "sample" else run_stage(stage, s, device)


if __name__ == "__main__":
    run_script(main)
