"""GPT-2's transformer, its sampler and its log-probabilities.

A policy is a language model: pi(a_t|s_t) = softmax(logits_t) with s_t = (prompt, response so far).
At temperature 1 what is sampled is exactly what is differentiated: there is no top-k, and a token
that the policy cannot write (`suppress_tokens`: padding, unknown words) has probability 0 in both.

A pair is (prompt ids, response ids), two lists of int; a finished response ends with EOS. A batch
is padded on the right. Masks come from lengths, never from a token's id, so padding may be any id
and is not EOS. Causal attention lets no real token see the padding behind it.

Shapes: B batch, T time (tokens), V vocabulary, D width, H heads, n samples of a prompt.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from utils.cuda import STATIC, cache_floats, generate_static, padded_linear


# ---- the transformer (names and layout of GPT-2) ------------------------------------------------

@dataclass
class GPTConfig:                    # the names are those of GPT-2's config.json
    vocab_size: int
    n_positions: int = 64           # longest sequence, prompt and response together, in tokens
    n_embd: int = 96
    n_layer: int = 3
    n_head: int = 4
    layer_norm_epsilon: float = 1e-5
    suppress_tokens: tuple = ()     # ids of probability zero: the policy never writes them
    eos_token_id: int | None = None     # the token that ends a response
    pad_token_id: int | None = None     # for other programs: here masks come from lengths


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)   # queries, keys and values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, mask=None):
        B, T, D = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv                                   # (B, H, T, D/H) each
        if cache is not None:
            k, v = cache.append(qkv[1:])                # (B, H, T so far, D/H)
        if T == 1 and cache is not None:
            # For a single query two plain products are faster than the fused attention.
            y = ((q * q.shape[3] ** -0.5) @ k.transpose(2, 3) + mask).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))      # heads side by side again


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, eps = config.n_embd, config.layer_norm_epsilon
        self.ln_1, self.ln_2 = nn.LayerNorm(D, eps=eps), nn.LayerNorm(D, eps=eps)
        self.attn = Attention(config)
        # A ModuleDict, because GPT-2's checkpoints name these weights mlp.c_fc and mlp.c_proj.
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x, cache=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, mask)
        h = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.mlp.c_proj(h)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) without dropout; its output head is tied to the embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)       # tokens
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)      # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        # Suppressed tokens get -inf as a bias of the logits, which is not saved with the weights.
        suppress = torch.zeros(config.vocab_size)
        suppress[list(config.suppress_tokens)] = -math.inf
        self.register_buffer("suppress", suppress, persistent=False)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        std = 0.02 * math.sqrt(768 / self.config.n_embd)    # GPT-2's at its width of 768
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            # Each block adds twice to the residual stream; this keeps its variance at any depth.
            for layer in (module.attn.c_proj, module.mlp.c_proj):
                nn.init.normal_(layer.weight, std=std / math.sqrt(2 * self.config.n_layer))

    @property
    def device(self):
        return self.wte.weight.device

    def hidden(self, idx, positions=None, caches=None, mask=None):
        """Hidden states after the last norm, (B, T, D), of idx (B, T). ValueError: T too long."""
        if positions is None:
            if idx.shape[1] > self.config.n_positions:
                raise ValueError(f"{idx.shape[1]} tokens, but {self.config.n_positions} positions")
            positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.wte(idx) + self.wpe(positions)
        for i, block in enumerate(self.h):
            x = block(x, caches[i] if caches else None, mask)
        return self.ln_f(x)

    def logits(self, hidden):
        """Next-token logits (..., V) of hidden states (..., D); suppressed tokens are -inf."""
        return padded_linear(hidden, self.wte.weight, self.suppress.to(hidden.dtype))

    def logp(self, hidden, tokens):
        """log pi, (n,) nats, of tokens (n,) at hidden states (n, D): what --fast compiles whole."""
        return self.logits(hidden).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)

    def forward(self, idx):
        """Next-token logits at every position, (B, T, V)."""
        return self.logits(self.hidden(idx))

    @classmethod
    def from_pretrained(cls, name, **options):
        """The policy in a folder of GPT-2's format, or of a name on the hub. Raises InputError."""
        from utils.checkpoints import load_gpt
        return load_gpt(name, **options)

    def save_pretrained(self, folder):
        """Write a folder that transformers opens with equal logits, without the tokenizer."""
        from utils.checkpoints import save_gpt
        save_gpt(folder, self)


# ---- sampling -----------------------------------------------------------------------------------

class KVCache:
    """One layer's keys and values, preallocated: (2, B, H, slots, D/H), the first `used` filled."""
    def __init__(self, slots):
        self.slots, self.used, self.kv = slots, 0, None

    def append(self, kv):
        """Add keys and values (2, B, H, T, D/H); returns all of them so far."""
        if self.kv is None:
            self.kv = kv.new_empty(*kv.shape[:3], self.slots, kv.shape[4])
        start, self.used = self.used, self.used + kv.shape[3]
        self.kv[..., start:self.used, :] = kv
        return self.kv[..., :self.used, :]

    def select(self, rows):
        """Keep these batch rows, in this order; a row may be named more than once."""
        self.kv = self.kv[:, rows]


ROWS, CACHE_FLOATS = 1024, 2 ** 29      # samples side by side, floats in their caches, at most
SMALL_VOCABULARY = 4096     # up to here a float32 draw misses a total probability of at most 2^-12


@torch.inference_mode()
def generate(policy, prompts, n=1, temperature=1.0, max_new_tokens=None, generator=None,
             label=None):
    """n sampled responses to each prompt, each token from softmax(logits / temperature).

    prompts: lists of token ids. Returns [prompt][sample], lists of ids. A response ends with the
    policy's eos_token_id, which is part of it, or after max_new_tokens (None: all that n_positions
    leaves). label: of the progress bar. Raises ValueError for an empty prompt or too few positions.
    """
    config, longest = policy.config, max(map(len, prompts), default=0)
    if max_new_tokens is None:
        max_new_tokens = config.n_positions - longest
    if not all(prompts) or not 0 < max_new_tokens <= config.n_positions - longest:
        raise ValueError(f"prompts of {min(map(len, prompts), default=0)} to {longest} tokens and "
                         f"{max_new_tokens} new ones do not fit {config.n_positions} positions")
    # A long context makes a sample's caches large; then fewer are drawn side by side.
    floats = 2 * len(policy.h) * config.n_embd * (longest + max_new_tokens)
    chunk = max(1, min(ROWS, cache_floats(policy.device, CACHE_FLOATS) // floats) // n)
    sample = generate_static if policy.device.type in STATIC else _generate
    responses = []
    for start in tqdm(range(0, len(prompts), chunk), desc=label, disable=None, leave=False):
        batch = collate([(prompt, []) for prompt in prompts[start:start + chunk]], policy.device)
        tokens, lengths = sample(policy, batch, n, temperature, max_new_tokens, generator)
        ids = [row[:k] for row, k in zip(tokens.tolist(), lengths.tolist())]
        responses += [ids[i:i + n] for i in range(0, len(ids), n)]
    return responses


def _generate(policy, batch, n, temperature, max_new_tokens, generator):
    """Tokens (B*n, max_new_tokens) and lengths (B*n,) of n samples to each prompt of a batch."""
    eos, device, rows = policy.config.eos_token_id, policy.device, len(batch.tokens) * n
    hidden, caches, mask = _prefill(policy, batch, max_new_tokens, n)
    start = batch.lengths.repeat_interleave(n)      # the position of each row's first new token
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    lengths = torch.full((rows,), max_new_tokens, device=device)
    alive = torch.arange(rows, device=device)       # the output row of each row still in the batch
    uniform = uniform_numbers(policy, max_new_tokens, rows, generator=generator)
    for t in range(max_new_tokens):
        drawn = sample_logits(policy.logits(hidden) / temperature, uniform[t, alive])
        tokens[alive, t] = drawn
        if eos is not None:
            ended = alive[drawn == eos]
            lengths[ended] = lengths[ended].clamp(max=t + 1)    # the first EOS counts
        running = (lengths[alive] > t + 1).nonzero().squeeze(1)
        if len(running) == 0:
            break
        if len(running) <= 0.75 * len(alive):
            # Ended rows leave the batch; not at each token, because that copies the caches.
            alive, drawn, mask, start = (x[running] for x in (alive, drawn, mask, start))
            for cache in caches:
                cache.select(running)
        hidden = policy.hidden(drawn[:, None], start[:, None] + t, caches,
                               mask[..., :caches[0].used + 1])[:, 0]
    return tokens, lengths


def _prefill(policy, batch, max_new_tokens, n):
    """Encode a batch's prompts once, moved to the right edge: all rows then write the same slots.

    Returns, n rows to each prompt, the last hidden states (B*n, D), one cache a layer and what a
    later query adds to its scores, (B*n, 1, 1, slots): -inf at padding, else 0.
    """
    T, device = batch.tokens.shape[1], batch.tokens.device
    slot = torch.arange(T, device=device)
    source = slot - (T - batch.lengths)[:, None]    # (B, T): place in the prompt; < 0 is padding
    positions, causal = source.clamp(min=0), slot[:, None] >= slot
    # A row of padding may look at itself: a softmax over nothing would be nan.
    seen = (causal & (source >= 0)[:, None]) | (slot[:, None] == slot)
    mask = torch.zeros(seen.shape, device=device).masked_fill(~seen, -math.inf)
    caches = [KVCache(T + max_new_tokens) for _ in policy.h]
    hidden = policy.hidden(batch.tokens.gather(1, positions), positions, caches, mask[:, None])
    last, later = hidden[:, -1], F.pad(mask[:, None, -1:], (0, max_new_tokens))
    if n > 1:       # for n = 1 the caches would be copied for nothing
        rows = torch.arange(len(batch.tokens), device=device).repeat_interleave(n)
        last, later = last[rows], later[rows]
        for cache in caches:
            cache.select(rows)
    return last, caches, later


def uniform_numbers(policy, *shape, generator):
    """What the tokens are drawn with, all beforehand: no sample depends on which others ended."""
    # In float32 thousands of a large vocabulary's tokens could never be drawn. MPS has no float64.
    exact = policy.config.vocab_size > SMALL_VOCABULARY and policy.device.type != "mps"
    return torch.rand(*shape, generator=generator, device=policy.device,
                      dtype=torch.float64 if exact else None)


def sample_logits(logits, uniform):
    """One token per row, (B,), drawn from softmax(logits), (B, V), by inverting the cumulative sum
    at uniform (B,) in [0, 1), in the wider precision. Probability zero is never drawn."""
    wider = torch.promote_types(logits.dtype, uniform.dtype)
    cumulative = logits.to(wider).softmax(-1).cumsum(-1)
    # u lies in (0, 1], since 0 would pick a first token of probability zero. The last sum is 1 up
    # to rounding; scaled by it, u never points past the last token.
    u = 1 - uniform[:, None]
    return torch.searchsorted(cumulative, u * cumulative[:, -1:]).squeeze(1)


# ---- batches of pairs and their log-probabilities -----------------------------------------------

@dataclass
class Batch:
    """Token ids (B, T), padded on the right; lengths (B,) of the prompts, and of both parts."""
    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor

    def response_mask(self):
        """True at response tokens, EOS included, (B, T); never at t = 0, which has no state."""
        t = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        start = self.prompt_lengths.clamp(min=1)
        return (t >= start[:, None]) & (t < self.lengths[:, None])


def collate(pairs, device="cpu", pad=0):
    """A Batch of pairs (prompt ids, response ids)."""
    rows = [[*prompt, *response] for prompt, response in pairs]
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in pairs], device=device)
    return Batch(tokens, prompt_lengths, torch.tensor([len(row) for row in rows], device=device))


def logp_at(policy, batch, mask):
    """log pi(y_t | x, y_<t) of the tokens where mask, (B, T), is true: (n,) nats per token."""
    hidden = policy.hidden(batch.tokens)
    # The state before token t is at t - 1. A row of logits is V / D times as large as a state.
    return policy.logp(hidden[:, :-1][mask[:, 1:]], batch.tokens[mask])


def logp_token(policy, batch):
    """log pi(y_t | x, y_<t), (B, T) in nats per token; zero outside the response."""
    mask = batch.response_mask()
    logp = logp_at(policy, batch, mask)
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)


def logp_seq(policy, batch):
    """log d^pi(y|x) = sum_t log pi(y_t | x, y_<t), (B,) in nats per sequence."""
    return logp_token(policy, batch).sum(1)
