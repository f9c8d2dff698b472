"""Text in, checkpoints out: reading data, batches, the training loops; usable stage by stage.

    python train.py pretrain --corpus FILE --out DIR                    pi_0
    python train.py sft      --demos FILE --init DIR --out DIR          pi_SFT
    python train.py reward   --positives FILE --negatives FILE --init DIR --out DIR

A pair is (prompt ids, response ids): the response ends with EOS if it is finished. Pretraining
reads a document as a response to the empty prompt. Only response tokens that the policy can write
bear loss. Losses are in nats per token, discriminator losses in nats per pair of samples.
"""

import argparse
import copy
import dataclasses
import math
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from tqdm import tqdm

from checkpoints import load_pretrained, save_pretrained, save_reward
from divergences import discriminator_loss, policy_gradient_loss
from model import (GPT, GPTConfig, InputError, bpe_tokenizer, claim_folder, collate,
                   encode_documents, encode_pair, logp_token)
from reward import HEADS, RewardModel, at_the_end, bradley_terry_loss, implicit_reward
from toy_envs.worlds import read_examples, read_texts


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
        if field.default not in (None, ""):
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


# ---- batches ------------------------------------------------------------------------------------

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
    """How one stage is trained: AdamW, linear warm-up, cosine to a hundredth, gradient clipping."""
    lr: float = setting(1e-3, "peak learning rate")
    epochs: float = setting(1.0, "passes over the data")
    batch_size: int = setting(16, "items per step")
    warmup: float = setting(0.1, "share of the steps spent warming up")
    weight_decay: float = setting(0.0, "decoupled weight decay, on matrices only")
    clip: float = setting(1.0, "largest gradient norm")
    evaluations: int = setting(8, "looks at the held-out data; the best one is kept")


def learning_rate(schedule, step, steps):
    """Linear warm-up to schedule.lr, then half a cosine down to a hundredth of it."""
    warmup = max(1, int(schedule.warmup * steps))
    if step < warmup:
        return schedule.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return schedule.lr * (0.01 + 0.495 * (1 + math.cos(math.pi * progress)))


def fit(model, items, loss_fn, schedule, rng, label="fit", held_out=None):
    """Minimise loss_fn(model, list of items); with held-out items, keep the weights best on them.

    Returns the history, a list of {step, loss[, held_out]}. Raises InputError at a loss that is not
    finite, naming the step; the model is then not to be used.
    """
    if not items:
        raise InputError(f"{label}: no data to train on")
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": schedule.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=schedule.lr, betas=(0.9, 0.99), fused=True)
    steps = max(1, math.ceil(schedule.epochs * len(items) / schedule.batch_size))
    looks = {math.ceil(steps * (i + 1) / schedule.evaluations) - 1
             for i in range(schedule.evaluations)}
    history, best, best_state, queue = [], math.inf, None, []
    bar = tqdm(range(steps), desc=label, unit="step", disable=None, leave=False)
    for step in bar:
        queue = queue or length_batches(items, schedule.batch_size, rng)
        loss = loss_fn(model, queue.pop())
        take_step(model, optimizer, loss, schedule, step, steps, label)
        history.append({"step": step, "loss": loss.item()})
        if held_out and step in looks:
            history[-1]["held_out"] = now = mean_loss(model, held_out, loss_fn, schedule.batch_size)
            if now < best:
                best, best_state = now, copy.deepcopy(model.state_dict())
            bar.set_postfix(held_out=f"{now:.3f}")
    if best_state is not None:
        model.load_state_dict(best_state)
    return history


def take_step(model, optimizer, loss, schedule, step, steps, label):
    """Step number `step` of `steps` down the loss, at the schedule's rate, the gradient clipped.
    Raises InputError if the loss is not finite.
    """
    if not math.isfinite(loss.item()):
        raise InputError(f"{label}: the loss is {loss.item()} at step {step}; a lower learning "
                         "rate may help")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(schedule, step, steps)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.inference_mode()
def mean_loss(model, items, loss_fn, batch_size):
    """loss_fn over all items, each batch counting by its number of items."""
    items = sorted(items, key=item_length)
    chunks = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
    return sum(loss_fn(model, chunk).item() * len(chunk) for chunk in chunks) / len(items)


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


def train_reward(policy, items, held_out, loss_fn, schedule, rng, head="sum", label="reward"):
    """A RewardModel started from policy, trained on items (better pair, worse pair).

    The held-out items pick the weights: no model is judged by its overfit. Returns the model and
    its history.
    """
    model = RewardModel(policy, head)
    return model, fit(model, items, loss_fn, schedule, rng, label, held_out)


def optimise_policy(sft, reward, draw, steps, schedule, beta, k, ppo_clip=0.0, dense=True,
                    label="policy", watch=None):
    """max over pi of E_pi[r] - beta KL(pi || pi_SFT), starting at pi_SFT, by REINFORCE with a
    leave-one-out baseline. Returns the policy and its history: the samples' means in nats per
    sequence, and what watch(policy, pairs) says of them.

    draw(policy) gives pairs, the k samples of a prompt together; a reward that learns along has
    learn(pairs). dense: a reward that is a sum over tokens is given where it is earned.
    """
    policy, history = copy.deepcopy(sft), []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=schedule.lr, betas=(0.9, 0.95),
                                  weight_decay=schedule.weight_decay)
    for step in tqdm(range(steps), desc=label, unit="step", disable=None, leave=False):
        pairs = draw(policy)
        if hasattr(reward, "learn"):
            reward.learn(pairs)
        batch = collate(pairs, device_of(policy))
        with torch.no_grad():
            rewards, reference = reward.token_rewards(batch), logp_token(sft, batch)
            if not dense:
                rewards = at_the_end(rewards.sum(1), batch)
        old = None
        for _ in range(4 if ppo_clip else 1):
            logp = logp_token(policy, batch)
            old = logp.detach() if old is None else old
            loss = policy_gradient_loss(logp, old, reference, rewards, batch.response_mask(), beta,
                                        k, ppo_clip)
            take_step(policy, optimizer, loss, schedule, step, steps, label)
        history.append({"step": step, "proxy": rewards.sum(1).mean().item(),
                        "kl_from_sft": (old - reference).sum(1).mean().item(),
                        "entropy": -old.sum(1).mean().item(),
                        **(watch(policy, pairs) if watch else {})})
    return policy, history


def fit_pairs(reference, items, beta, schedule, rng, label="pairs"):
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
    return policy, fit(policy, learn, loss_fn, schedule, rng, label, held_out)


def choose_device(name):
    """torch.device of a --device flag; "auto" takes CUDA, then MPS, then the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name.split(":")[0], False):
        raise InputError(f"no device {name!r} here; available: "
                         + ", ".join(kind for kind, there in available.items() if there))
    try:
        return torch.zeros(1, device=name).device
    except RuntimeError as error:
        raise InputError(f"no device {name!r} here") from error


def side_by_side(function, jobs, device):
    """[function(job) for job in jobs]; on a CPU as many at a time as there are cores, each on one:
    a step of a small model is too short to share out.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores == 1:
        return [function(job) for job in jobs]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:
            return list(pool.map(function, jobs))
    finally:
        torch.set_num_threads(cores)


# ---- stage by stage, from the command line ------------------------------------------------------

@dataclass
class Settings:
    """Train one stage: files in, a checkpoint folder out.

    python train.py pretrain --corpus TEXT --out pi_0
    python train.py sft --demos DEMOS.jsonl --init pi_0 --out pi_sft
    python train.py reward --positives SFT.jsonl --negatives INIT.jsonl --init pi_0 --out reward
    """
    corpus: str = setting(None, "pretrain: plain text, or JSON lines with 'text'")
    demos: str = setting(None, "sft: JSON lines with prompt and response, or chosen and rejected")
    positives: str = setting(None, "reward: examples with label 1, as for --demos")
    negatives: str = setting(None, "reward: examples with label 0, as for --demos")
    init: str = setting(None, "the checkpoint to start from: a folder in the format of GPT-2, or a "
                              "name on the Hugging Face hub such as gpt2 (pretrain: optional)")
    out: str = setting(None, "the checkpoint folder to write")
    overwrite: bool = setting(False, "replace the checkpoint that --out holds")
    seed: int = setting(0, "random seed")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    lr: float = setting(1e-3, "peak learning rate")
    epochs: float = setting(1.0, "passes over the data")
    batch_size: int = setting(16, "items per step")
    head: str = setting("sum", "reward: the reward head", choices=list(HEADS))
    max_response: int = setting(64, "sft, reward: longest response in tokens; longer ones are cut")
    n_positions: int = setting(256, "pretrain: longest sequence in tokens")
    n_embd: int = setting(64, "pretrain: width")
    n_layer: int = setting(2, "pretrain: layers")
    n_head: int = setting(4, "pretrain: attention heads")
    vocab_size: int = setting(2048, "pretrain: size of the byte-level BPE vocabulary")


def read_pairs(path, tokenizer, n_positions, max_response):
    """Token pairs of a file of examples; prompts that do not fit are left out with a note."""
    examples, left_out = read_examples(path)
    pairs = [encode_pair(tokenizer, e.prompt, e.response, n_positions - max_response, max_response)
             for e in examples]
    kept = [pair for pair in pairs if pair]
    if not kept:
        raise InputError(f"{path}: no prompt fits {n_positions - max_response} tokens")
    if left_out or len(kept) < len(pairs):
        print(f"{path}: {left_out} unusable, {len(pairs) - len(kept)} too long: left out")
    return kept


def check_model(n_embd, n_head, vocab_size):
    """Refuse a transformer that cannot be built. Raises InputError."""
    if n_head < 1 or n_embd < n_head or n_embd % n_head:
        raise InputError(f"--n-embd {n_embd} must be a multiple of --n-head {n_head}")
    if vocab_size < 258:
        raise InputError(f"--vocab-size {vocab_size}: 256 bytes and two special tokens are least")


def run_stage(stage, s):
    """Train one stage as the settings say and write its checkpoint."""
    for name in ("lr", "epochs", "batch_size", "max_response", "n_positions", "n_layer"):
        if not (getattr(s, name) > 0 and math.isfinite(getattr(s, name))):
            raise InputError(f"--{name.replace('_', '-')} must be positive")
    check_model(s.n_embd, s.n_head, s.vocab_size)
    for name in {"pretrain": ["corpus"], "sft": ["demos", "init"],
                 "reward": ["positives", "negatives", "init"]}[stage] + ["out"]:
        if getattr(s, name) is None:
            raise InputError(f"{stage} needs --{name}")
    schedule = Schedule(s.lr, s.epochs, s.batch_size)
    device, rng = choose_device(s.device), random.Random(s.seed)
    torch.manual_seed(s.seed)
    texts = read_texts(s.corpus) if stage == "pretrain" else None
    if s.init:
        model, tokenizer, _ = load_pretrained(s.init)
    else:
        tokenizer = bpe_tokenizer(texts, s.vocab_size)
        model = GPT(GPTConfig(len(tokenizer), s.n_positions, s.n_embd, s.n_layer, s.n_head,
                              suppress_tokens=tokenizer.suppress))
    fitting = model.config.n_positions, s.max_response
    if stage == "reward":
        positives, negatives = (read_pairs(path, tokenizer, *fitting)
                                for path in (s.positives, s.negatives))
    elif stage == "sft":
        pairs = read_pairs(s.demos, tokenizer, *fitting)
    out = claim_folder(s.out, s.overwrite)
    model = model.to(device)
    if stage == "reward":
        reward, history = train_reward(model, *pair_up(positives, negatives, rng),
                                       discriminator_step, schedule, rng, s.head, stage)
        save_reward(out, reward, tokenizer)
    else:
        if stage == "pretrain":
            learn, held_out = encode_documents(tokenizer, texts, model.config.n_positions), []
        else:
            learn, held_out = split(pairs, 0.05, rng)
        history = fit(model, [(pair,) for pair in learn], nll_loss, schedule, rng, stage,
                      [(pair,) for pair in held_out])
        save_pretrained(out, model, tokenizer)
    print(f"{stage}: loss {history[0]['loss']:.3f} -> {history[-1]['loss']:.3f} in {len(history)} "
          f"steps; {out}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    stages = ("pretrain", "sft", "reward")
    if argv and argv[0] in stages:
        return run_stage(argv[0], parse_settings(Settings, argv[1:]))
    if {"-h", "--help"} & set(argv):
        return parse_settings(Settings, ["--help"])
    raise InputError(f"name a stage first: {', '.join(stages)} (--help lists the flags)")


if __name__ == "__main__":
    run_script(main)
