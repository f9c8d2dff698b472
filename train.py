"""The training loops: maximum likelihood, reward models, policy gradients, preference pairs.

A pair is (prompt ids, response ids): the response ends with EOS if it is finished. Pretraining
reads a document as a response to the empty prompt. An item is a tuple of pairs that a loss looks at
together: (demonstration,) for SFT, (better, worse) for reward models, DPO and SPIN.

Each loop is AdamW with a warm-up and a cosine. The losses are pure functions in divergences.py;
here they meet the models. A loss function is loss_fn(model, items) -> (sum, count): the loss summed
over its terms, and how many terms there are. A step follows the mean over all terms of its batch,
however many micro-batches the batch is cut into. Losses are in nats per term.
"""

import copy
import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from divergences import dpo_loss, policy_gradient_loss, sft_loss
from model import collate, logp_at, logp_token


@dataclass
class TrainConfig:
    """How one model is trained. There is no weight decay: the held-out loss guards the weights."""
    lr: float = 1e-3                # peak learning rate
    epochs: float = 1.0             # passes over the data
    batch_size: int = 16            # items per step
    warmup: float = 0.1             # share of the steps spent warming up
    clip: float = 1.0               # largest gradient norm
    beta2: float = 0.99             # Adam's memory for squared gradients
    evaluations: int = 8            # how often the held-out loss is measured
    micro_tokens: int = 8192        # tokens that go through the model at a time, padding included
    fast: bool = False              # bfloat16 autocast and a compiled transformer, for CUDA


@dataclass
class PolicyConfig(TrainConfig):
    """How a policy is optimised; batch_size is the number of prompts per step."""
    steps: int = 100                # policy-gradient steps
    samples: int = 4                # of each prompt; they are each other's baseline
    beta2: float = 0.95             # shorter, because a policy gradient's size changes quickly


# ---- the loop -----------------------------------------------------------------------------------

def fit(model, items, loss_fn, config, rng, held_out=(), label="fit"):
    """Minimise the mean of loss_fn over items; with held-out items keep the weights best on them.

    rng: random.Random, which shuffles the batches. Returns the history, a list of
    {step, loss, grad_norm[, held_out]}, losses in nats per term. Raises ValueError without items
    and what take_step raises.
    """
    if not items:
        raise ValueError(f"{label}: no data to train on")
    steps = max(1, math.ceil(config.epochs * len(items) / config.batch_size))
    eval_steps = {math.ceil(steps * (i + 1) / config.evaluations) - 1
                  for i in range(config.evaluations)}
    optimizer, trunk = make_optimizer(model, config), getattr(model, "trunk", model)
    if config.fast:
        trunk.hidden, trunk.logp = (torch.compile(function, dynamic=True)
                                    for function in (trunk.hidden, trunk.logp))
    batches, history, best, best_weights = [], [], math.inf, None
    for step in tqdm(range(steps), label, unit="step", disable=None, leave=False):
        if not batches:     # a new epoch: every item once, in a new order
            batches = random_batches(items, config.batch_size, rng)
        loss, count = 0.0, 0
        for part in micro_batches(batches.pop(), config.micro_tokens):
            with autocast(model, config):
                part_loss, part_count = loss_fn(model, part)
            part_loss.backward()        # gradients add up over the parts ...
            loss, count = loss + part_loss.item(), count + part_count
        count = max(count, 1)           # a batch without a single target has no loss
        for p in model.parameters():    # ... and are divided once, by all terms of the batch:
            p.grad /= count             # no part's terms count more than another's
        norm = take_step(model, optimizer, loss / count, config, step, steps, label)
        history.append({"step": step, "loss": loss / count, "grad_norm": norm})
        if held_out and step in eval_steps:
            history[-1]["held_out"] = now = mean_loss(model, held_out, loss_fn, config)
            if now < best:      # the best weights are returned, not the last, overfitted ones
                best, best_weights = now, copy.deepcopy(model.state_dict())
    if best_weights is not None:
        model.load_state_dict(best_weights)
    if config.fast:
        del trunk.hidden, trunk.logp    # the class's methods are seen again, without the compiler
    return history


def make_optimizer(model, config):
    return torch.optim.AdamW(model.parameters(), config.lr, (0.9, config.beta2), weight_decay=0.0,
                             fused=True)


def take_step(model, optimizer, loss, config, step, steps, label):
    """Step number `step` of `steps` down the gradient, clipped. Returns its norm before clipping.

    Without the clip one odd batch could undo much of a run. Raises FloatingPointError, naming the
    step, where the loss or the gradient is not finite: no weight has changed by then.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, steps)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"{label}: the loss is {loss}, its gradient's norm {norm}, at "
                                 f"step {step}; a lower learning rate may help")
    optimizer.step()
    optimizer.zero_grad()       # sets the gradients to None, so that they take no memory after
    return norm


def learning_rate(config, step, steps):
    """Linear warm-up to config.lr, then half a cosine down to a hundredth of it."""
    warmup = max(1, int(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.lr * (0.01 + 0.495 * (1 + math.cos(math.pi * progress)))


def autocast(model, config):
    device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=config.fast)


@torch.no_grad()
def mean_loss(model, items, loss_fn, config):
    """The mean of loss_fn over all terms of the items, nats per term."""
    # Sorting by length saves padding. It changes nothing here: no gradient sees these batches, and
    # the mean is taken over all terms at once.
    items, total, count = sorted(items, key=item_length), 0.0, 0
    for start in range(0, len(items), config.batch_size):
        for part in micro_batches(items[start:start + config.batch_size], config.micro_tokens):
            with autocast(model, config):
                loss, n = loss_fn(model, part)
            total, count = total + loss.item(), count + n
    return total / max(count, 1)


# ---- batches ------------------------------------------------------------------------------------

def item_length(item):
    """Tokens of the longest of an item's pairs."""
    return max(len(prompt) + len(response) for prompt, response in item)


def random_batches(items, batch_size, rng):
    """Batches of items at random, each item once.

    Batches of items of similar length would save padding and spoil the loss. It is a mean over the
    batch's own tokens: among short texts a token would weigh more than among long ones, each text
    about 1 / its length. The optimum would be demonstrator(y) / length(y), normalised, which writes
    too short, and no longer the least forward KL. At random a text's own length is one of
    batch_size in that mean: what is left of the bias is of the order of 1 / batch_size.
    """
    items = rng.sample(items, len(items))
    return [items[i:i + batch_size] for i in range(0, len(items), batch_size)]


def micro_batches(batch, tokens):
    """A batch cut into parts of at most `tokens` tokens, padding included, to fit the memory.

    An item that is longer by itself is a part of its own.
    """
    parts, longest = [[]], 0
    for item in batch:
        longest = max(longest, item_length(item))
        rows = (len(parts[-1]) + 1) * len(item)         # an item is one pair or more
        if parts[-1] and rows * longest > tokens:
            parts.append([])
            longest = item_length(item)
        parts[-1].append(item)
    return parts


def split(items, rng, share=0.05):
    """(the larger part, a share held out), shuffled; at least one in each where there are two."""
    items = rng.sample(items, len(items))
    n = max(1, round(share * len(items))) if len(items) > 1 else 0
    return items[n:], items[:n]


def pair_up(positives, negatives, rng):
    """(training, held-out) items (positive, negative) of two sources, not matched by prompts.

    A twentieth of each source is held out *first*, so that no held-out text was trained on. Then
    the shorter source is repeated.
    """
    def cycle(a, b):
        n = max(len(a), len(b)) if a and b else 0
        return [(a[i % len(a)], b[i % len(b)]) for i in range(n)]
    (a, a_held), (b, b_held) = split(positives, rng), split(negatives, rng)
    return cycle(a, b), cycle(a_held, b_held)


# ---- maximum likelihood: pretraining and SFT ----------------------------------------------------

def fine_tune(policy, pairs, held_out, config, rng, label="sft"):
    """(a copy of the policy, fitted to pairs by maximum likelihood; its history).

    On y ~ demonstrator this minimises the forward KL(demonstrator || pi), where pi can write all
    that the demonstrator writes. Marks that it cannot write are states: there it is trained to go
    on as the demonstrator did, in states that its own samples never reach.
    """
    policy = copy.deepcopy(policy)

    def loss_fn(policy, items):
        batch = collate([pair for (pair,) in items], policy.device)
        # A token that the policy cannot write, such as the demonstrator's mark, is a state and no
        # target: its log-probability is -inf.
        writable = batch.response_mask() & policy.suppress.isfinite()[batch.tokens]
        logp = logp_at(policy, batch, writable)
        if len(logp) == 0:      # no target in this part: the mean of nothing would be nan
            return logp.sum(), 0
        return sft_loss(logp) * len(logp), len(logp)
    history = fit(policy, [(pair,) for pair in pairs], loss_fn, config, rng,
                  [(pair,) for pair in held_out], label)
    return policy, history


# ---- reward models ------------------------------------------------------------------------------

def train_reward(reward, items, held_out, loss, config, rng, label="reward"):
    """(reward, history): a RewardModel trained on items (better, worse).

    loss: divergences.discriminator_loss, where better and worse are two sources, or
    bradley_terry_loss, where they are two responses to one prompt. The held-out items pick the
    weights.
    """
    def loss_fn(reward, items):
        r = reward(collate([pair for item in items for pair in item], reward.device))
        return loss(r[0::2], r[1::2]) * len(items), len(items)
    return reward, fit(reward, items, loss_fn, config, rng, held_out, label)


# ---- optimising the policy against a reward -----------------------------------------------------

def optimise_policy(sft, reward, draw, config, kl_coef, label="policy"):
    """max over pi of E_pi[r] - kl_coef KL(pi || pi_SFT), from pi_SFT, by REINFORCE with a
    leave-one-out baseline. Its optimum for a fixed reward is pi_SFT e^(r/kl_coef) / Z.

    draw(policy): pairs (x, y ~ pi), the config.samples responses to a prompt together. A reward
    that is trained along has update(pairs, policy). Returns the policy and its history: the
    samples' means {step, loss, grad_norm, proxy, kl, entropy}, in nats per sequence.
    """
    policy, history = copy.deepcopy(sft), []
    optimizer = make_optimizer(policy, config)
    for step in tqdm(range(config.steps), label, unit="step", disable=None, leave=False):
        pairs = draw(policy)            # on-policy: a step is taken where the policy is now
        if hasattr(reward, "update"):
            reward.update(pairs, policy)
        batch = collate(pairs, policy.device)
        with torch.no_grad(), autocast(policy, config):     # the reward is held constant
            rewards, logp_sft = reward.token_rewards(batch), logp_token(sft, batch)
        with autocast(policy, config):
            logp = logp_token(policy, batch)
        loss = policy_gradient_loss(logp, logp_sft, rewards, batch.response_mask(), kl_coef,
                                    config.samples)
        loss.backward()
        norm = take_step(policy, optimizer, loss.item(), config, step, config.steps, label)
        history.append({"step": step, "loss": loss.item(), "grad_norm": norm,
                        "proxy": rewards.sum(1).mean().item(),
                        "kl": (logp - logp_sft).sum(1).mean().item(),
                        "entropy": -logp.sum(1).mean().item()})
    return policy, history


# ---- preference pairs: DPO and SPIN -------------------------------------------------------------

def logp_writable(policy, batch):
    """logp_token with zero at tokens that no policy can write, such as the demonstrator's marks:
    they are part of the state, not actions."""
    logp = logp_token(policy, batch)
    return logp.masked_fill(logp.isneginf(), 0.0)


def fit_pairs(reference, items, dpo_beta, config, rng, label="pairs"):
    """(the policy of least dpo_loss on items (preferred pair, other pair), its history).

    It starts at the reference. Labelled pairs make this DPO. A demonstration and the reference's
    own sample make it an iteration of SPIN, with the optimum pi_ref (demonstrator / pi_ref)^(1 /
    dpo_beta): beyond the demonstrator, were it trained to its end.
    """
    policy = copy.deepcopy(reference)

    def loss_fn(policy, items):
        batch = collate([pair for item in items for pair in item], policy.device)
        with torch.no_grad():
            logp_ref = logp_writable(reference, batch)
        log_ratio = (logp_writable(policy, batch) - logp_ref).sum(1)
        return dpo_loss(log_ratio[0::2], log_ratio[1::2], dpo_beta) * len(items), len(items)
    items, held_out = split(items, rng)
    return policy, fit(policy, items, loss_fn, config, rng, held_out, label)
