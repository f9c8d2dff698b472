"""Items to batches, and a batch cut up: to fit the memory, and among torchrun's processes.

    torchrun --nproc_per_node=K train.py ...        K processes on one machine, one GPU each

Either way the gradients add up to those of the whole batch, to rounding. Every process knows the
whole batch, draws the same random numbers and takes every K-th item; one process is K = 1.
"""

import os
import sys
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist


# ---- processes ----------------------------------------------------------------------------------

def rank_and_count():
    """(this process's number, how many there are); (0, 1) unless torchrun started more."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


@contextmanager
def processes(device):
    """Join what torchrun started, if it did, while the block lasts; only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    finished = False
    try:
        with redirect_stdout(None if dist.get_rank() else sys.stdout):
            yield
        finished = True
    finally:        # after an error NCCL might wait for the others, which torchrun ends
        if finished or device.type != "cuda":
            dist.destroy_process_group()


def from_first(value):
    """The first process's value, in all of them, which wait for it."""
    if rank_and_count()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_all(value):
    """[the value of each process], in all of them."""
    count = rank_and_count()[1]
    if count == 1:
        return [value]
    values = [None] * count
    dist.all_gather_object(values, value)
    return values


def flattened(parameters):
    """One tensor of which the parameters become views, and its gradient, of which theirs do.

    To clip, add up over processes and move it is one operation each, not one for each parameter.
    """
    sizes = [p.numel() for p in parameters]
    flat = torch.cat([p.detach().flatten() for p in parameters])
    flat.grad = torch.zeros_like(flat)
    for p, data, grad in zip(parameters, flat.split(sizes), flat.grad.split(sizes)):
        p.data, p.grad = data.view_as(p), grad.view_as(p)
    return flat


def add_up_gradients(optimizer):
    """The gradients of what the optimizer moves become their sums over all processes."""
    for group in optimizer.param_groups if rank_and_count()[1] > 1 else ():
        for p in group["params"]:
            dist.all_reduce(p.grad)


# ---- batches ------------------------------------------------------------------------------------

def item_length(item):
    """Tokens of the longest of an item's pairs (prompt ids, response ids)."""
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


def micro_batches(batch, tokens):
    """A batch cut into parts of at most `tokens` tokens, padding included; 0 does not cut.

    An item that is longer by itself is a part of its own.
    """
    parts, longest = [[]], 0
    for item in batch:
        longest = max(longest, item_length(item))
        if tokens and parts[-1] and (len(parts[-1]) + 1) * len(item) * longest > tokens:
            parts.append([])
            longest = item_length(item)
        parts[-1].append(item)
    return parts


class Forward:
    """loss_fn(model, items), as it is computed in training.

    bf16: in autocast. compile: with the transformer's `hidden` compiled, in training alone, since
    sampling's caches change shape at every token; nothing of it stays in the model.
    """

    def __init__(self, model, loss_fn, bf16=False, compile=False):
        self.model, self.loss_fn, self.bf16 = model, loss_fn, bf16
        self.trunk = getattr(model, "trunk", model)
        self.fast = torch.compile(self.trunk.hidden, dynamic=True) if compile else None

    def __call__(self, items):
        fast = self.fast and torch.is_grad_enabled()
        if fast:
            self.trunk.hidden = self.fast
        try:
            device = next(self.trunk.parameters()).device
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                return self.loss_fn(self.model, items)
        finally:
            if fast:
                del self.trunk.hidden


class Objective:
    """The mean of loss_fn(model, items) over a batch.

    weigh(model, items): how many terms, such as tokens, loss_fn is a mean over; by it the means of
    a batch's parts are weighted, so that no part's tokens count more than another's.
    """

    def __init__(self, model, loss_fn, weigh, schedule):
        self.weigh, self.micro_tokens = lambda items: weigh(model, items), schedule.micro_tokens
        self.forward = Forward(model, loss_fn, schedule.bf16, schedule.compile)

    def parts(self, batch, rank=0, count=1):
        """[(micro-batch, its share of the batch's mean)] of one process; all shares add up to 1."""
        total = self.weigh(batch)
        return [(part, self.weigh(part) / total)
                for part in micro_batches(batch[rank::count], self.micro_tokens) if part]

    def accumulate(self, batch):
        """Add up the gradient of the batch's mean loss, its own items' part in each process.
        Returns that loss, the whole batch's in all of them, a float."""
        total = 0.0
        for part, share in self.parts(batch, *rank_and_count()):
            loss = self.forward(part) * share
            loss.backward()
            total += loss.item()
        return sum(from_all(total))

    @torch.inference_mode()
    def mean(self, items, batch_size):
        """The loss over all items, in batches of similar length: a mean over all of its terms."""
        items = sorted(items, key=item_length)
        chunks = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
        return sum(self.forward(part).item() * self.weigh(part) for chunk in chunks
                   for part in micro_batches(chunk, self.micro_tokens)) / self.weigh(items)
