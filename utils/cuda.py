"""What only a GPU wants: a padded vocabulary, and sampling with shapes that never change.

Both compute what model.py computes elsewhere; the tests compare them on a CPU. Nothing here has run
on a GPU yet: tests/on_gpu.py is the script that does it. Two more things are for a GPU alone. TF32,
float32 with ten bits of fraction inside matrix products, is turned on in utils.cli.choose_device.
bfloat16 and the compiler, --fast, are in train.py.
"""

import math

import torch
import torch.nn.functional as F

COLUMNS = {"cuda": 64}      # by device: the vocabulary is rounded up to a multiple of this
STATIC = {"cuda"}           # the devices on which `generate` is generate_static


def padded_linear(hidden, weight, bias):
    """F.linear(hidden, weight, bias), (..., V), computed with V rounded up to a multiple of 64.

    GPT-2 has 50,257 words. In a matrix with so odd a number of columns no two rows begin at the
    same place of a GPU's memory lines, and its matrix units have to wait. Zeros are added and their
    logits cut off again: there is no id beyond the vocabulary, so none can be drawn.
    """
    V = len(weight)
    extra = -V % COLUMNS.get(hidden.device.type, 1)
    if not extra:
        return F.linear(hidden, weight, bias)
    return F.linear(hidden, F.pad(weight, (0, 0, 0, extra)), F.pad(bias, (0, extra)))[..., :V]


def cache_floats(device, default):
    """How many floats the caches of samples drawn side by side may take: an eighth of a GPU's
    memory. Of all its memory, not of what is free now: it decides the order of random numbers."""
    if device.type != "cuda":
        return default
    return torch.cuda.get_device_properties(device).total_memory // 8 // 4


# ---- sampling -----------------------------------------------------------------------------------

class StaticCache:
    """One layer's keys and values, (2, B, H, slots, D/H), all slots there from the beginning.

    slot: (1,), where the next token's are written, for all layers. It is a tensor, because a
    recorded step reads its numbers from tensors only.
    """

    def __init__(self, cache, slot):
        self.kv, self.slot = cache.kv, slot
        self.kv[..., cache.used:, :] = 0    # unused memory may hold nan, and 0 times nan is nan

    def append(self, kv):
        """Write the keys and values of one token, (2, B, H, 1, D/H); returns those of all slots."""
        return self.kv.index_copy_(3, self.slot, kv)


def generate_static(policy, batch, n, temperature, max_new_tokens, generator):
    """model._generate with the same tokens, by steps whose shapes and memory never change.

    For one token a row a GPU would mostly wait for Python to call the next of a few hundred small
    kernels. Here one step is recorded as a CUDA graph, and all further ones are one call each. For
    that, every query looks at all slots of the cache, with -inf at those to come, and rows that
    have ended go on until all have; what they write then is cut off.
    """
    from model import _prefill, sample_logits, uniform_numbers      # here: model.py imports this module
    device, eos = policy.device, policy.config.eos_token_id
    eos = -1 if eos is None else eos                # no token's id: then nothing ends a response
    hidden, caches, mask = _prefill(policy, batch, max_new_tokens, n)
    rows, used = len(hidden), caches[0].used
    hidden, position = hidden.clone(), batch.lengths.repeat_interleave(n)[:, None]
    t, slot = (torch.full((1,), start, device=device) for start in (0, used))
    caches = [StaticCache(cache, slot) for cache in caches]
    mask[..., used:] = -math.inf
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    uniform = uniform_numbers(policy, max_new_tokens, rows, generator=generator)

    def step():
        drawn = sample_logits(policy.logits(hidden) / temperature, uniform[t].squeeze(0))
        tokens.index_copy_(1, t, drawn[:, None])
        mask.index_fill_(3, slot, 0.0)
        hidden.copy_(policy.hidden(drawn[:, None], position, caches, mask)[:, 0])
        for counter in (position, slot, t):
            counter.add_(1)

    run = step
    for i in range(max_new_tokens):
        if i == 2:      # by now every kernel has been used, and is loaded
            run = record(step, device)
        run()
        # To ask whether all have ended is to wait for the GPU: so not at every token.
        if i % 16 == 15 and (tokens[:, :i + 1] == eos).any(1).all():
            break
    ends = tokens == eos
    return tokens, torch.where(ends.any(1), ends.int().argmax(1) + 1, max_new_tokens)


def record(step, device):
    """A function that replays what step() makes a GPU do. Recording does none of it."""
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
