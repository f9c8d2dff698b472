"""GPT-2's transformer, its sampler, log-probabilities and tokenizers.

Shapes: B batch, T time (tokens), V vocabulary, D width, H heads, N candidates per prompt.

A policy is a language model: pi(a_t|s_t) = softmax(logits_t) with s_t = (prompt, response so far).
What is sampled here is exactly what is differentiated: temperature 1, no top-k, and tokens that the
policy cannot write (`suppress_tokens`: padding, unknown words) have probability zero in both.

A batch holds sequences of different lengths, padded on the right; masks come from lengths, never
from a token's id, so padding may be any id and is not EOS. Causal attention lets no real token see
the padding behind it, hence no mask is needed in training.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


class InputError(ValueError):
    """The user's input is at fault: scripts print it as one line and exit with status 2."""


def require(good, message):
    """InputError with this message unless the condition is good."""
    if not good:
        raise InputError(message)


# ---- the transformer (names and layout of GPT-2) ------------------------------------------------

@dataclass
class GPTConfig:
    vocab_size: int
    n_positions: int = 64       # longest sequence, prompt and response together, in tokens
    n_embd: int = 96
    n_layer: int = 3
    n_head: int = 4
    layer_norm_epsilon: float = 1e-5
    suppress_tokens: tuple = ()     # ids of probability zero: pi never writes them


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, mask=None):
        B, T, D = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = qkv = qkv.permute(2, 0, 3, 1, 4)      # each (B, H, T, D/H)
        if cache is not None:
            k, v = cache.append(qkv[1:])                # (B, H, T so far, D/H)
        if T == 1 and cache is not None:    # the fused attention is slow at a single query
            y = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3) + mask).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, eps = config.n_embd, config.layer_norm_epsilon
        self.ln_1, self.ln_2 = nn.LayerNorm(D, eps=eps), nn.LayerNorm(D, eps=eps)
        self.attn = Attention(config)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x, cache=None, mask=None):
        x = x + self.attn(self.ln_1(x), cache, mask)
        h = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.mlp.c_proj(h)


class GPT(nn.Module):
    """GPT-2: learned positions, pre-norm blocks, tanh-GELU, output head tied to the embedding.

    Differs from GPT-2: no dropout. Source: Radford et al. 2019.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        suppress = torch.zeros(config.vocab_size)
        suppress[list(config.suppress_tokens)] = -math.inf
        self.register_buffer("suppress", suppress, persistent=False)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        std = 0.02 * math.sqrt(768 / self.config.n_embd)    # GPT-2 small's 0.02 at its width of 768
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):   # keeps the residual stream's variance at depth n_layer
            for name in ("attn.c_proj", "mlp.c_proj"):
                weight = module.get_submodule(name).weight
                nn.init.normal_(weight, std=std / math.sqrt(2 * self.config.n_layer))

    def hidden(self, idx, positions=None, caches=None, mask=None):
        """Hidden states after the last norm, (B, T, D), of token ids idx (B, T)."""
        if positions is None:
            positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.wte(idx) + self.wpe(positions)
        for i, block in enumerate(self.h):
            x = block(x, caches[i] if caches else None, mask)
        return self.ln_f(x)

    def logits(self, hidden):
        """Next-token logits (..., V) of hidden states (..., D); suppressed tokens are -inf."""
        return F.linear(hidden, self.wte.weight, self.suppress.to(hidden.dtype))

    def forward(self, idx, return_hidden=False):
        """Next-token logits at every position, (B, T, V); with return_hidden also (B, T, D)."""
        hidden = self.hidden(idx)
        return (self.logits(hidden), hidden) if return_hidden else self.logits(hidden)

    # ---- sampling -------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, lengths=None, n=1, eos=None, pad=0, generator=None):
        """Sample n responses to each prompt from pi, at temperature 1, with a KV cache.

        prompts (B, T) token ids padded on the right, lengths (B,) their lengths (all T if None).
        A response ends with eos, which is part of it, or after max_new_tokens. Each prompt is
        encoded once for its n candidates; rows that have ended leave the batch, a quarter of it at
        a time.
        Returns tokens (B*n, max_new_tokens), filled up with pad, and lengths (B*n,); the candidates
        of a prompt stand together. Raises ValueError if a response might outgrow n_positions.
        """
        B, T = prompts.shape
        device = prompts.device
        if lengths is None:
            lengths = torch.full((B,), T, device=device)
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 1 or longest + max_new_tokens > self.config.n_positions:
            raise ValueError(f"prompts of {shortest} to {longest} tokens and {max_new_tokens} new "
                             f"ones do not fit {self.config.n_positions} positions")
        hidden, caches, mask = self._prefill(prompts, lengths, max_new_tokens, n)
        position = lengths.repeat_interleave(n)
        tokens = torch.full((B * n, max_new_tokens), pad, dtype=torch.long, device=device)
        done = torch.full((B * n,), max_new_tokens, device=device)
        alive = torch.arange(B * n, device=device)      # output row of each row still in the batch
        uniform = torch.rand(max_new_tokens, B * n, generator=generator, device=device)
        for t in range(max_new_tokens):
            drawn = sample_logits(self.logits(hidden), uniform[t, alive])
            tokens[alive, t] = drawn
            if eos is not None:
                ended = alive[drawn == eos]
                done[ended] = done[ended].clamp(max=t + 1)
            running = (done[alive] > t + 1).nonzero().squeeze(1)
            if len(running) == 0:
                break
            if len(running) <= 0.75 * len(alive):   # dropping rows copies the caches: not each time
                alive, drawn, mask, position = (x[running] for x in (alive, drawn, mask, position))
                for cache in caches:
                    cache.select(running)
            hidden = self.hidden(drawn[:, None], position[:, None], caches,
                                 mask[..., :caches[0].used + 1])[:, 0]
            position = position + 1
        slot = torch.arange(max_new_tokens, device=device)
        return tokens.masked_fill_(slot >= done[:, None], pad), done

    def _prefill(self, prompts, lengths, max_new_tokens, n):
        """Encode the prompts, moved to the right edge so that all rows write the same cache slot.

        Returns, n rows for each prompt, the last hidden states (B*n, D), the caches and what a
        later query adds to its scores of the T + max_new_tokens slots, (B*n, 1, 1, slots): -inf at
        padding, else 0.
        """
        T = int(lengths.max())
        slot = torch.arange(T, device=prompts.device)
        source = slot - (T - lengths)[:, None]      # (B, T): place in the prompt; < 0 is padding
        positions, causal = source.clamp(min=0), slot[:, None] >= slot
        # a padding row may look at itself: a softmax over nothing would be nan
        seen = (causal & (source >= 0)[:, None]) | (slot[:, None] == slot)
        mask = torch.zeros(seen.shape, device=prompts.device).masked_fill(~seen, -math.inf)
        caches = [KVCache(T + max_new_tokens) for _ in self.h]
        hidden = self.hidden(prompts.gather(1, positions), positions, caches, mask[:, None])
        last, later = hidden[:, -1], F.pad(mask[:, None, -1:], (0, max_new_tokens))
        if n > 1:       # else the caches would be copied for nothing
            rows = torch.arange(len(prompts), device=prompts.device).repeat_interleave(n)
            last, later = last[rows], later[rows]
            for cache in caches:
                cache.select(rows)
        return last, caches, later


CACHE_NUMBERS = 2 ** 29     # 2 GB in float32: what sampling may keep of keys and values


@torch.inference_mode()
def sample_responses(model, prompts, n, max_new_tokens, eos, generator, rows=1024, label=None):
    """n sampled responses, EOS included, to each prompt (a list of ids): [prompt][candidate].

    Prompts go through in order, as many at a time as give about `rows` candidates, or fewer where
    the caches of keys and values of so many would not fit CACHE_NUMBERS.
    """
    slots = max(map(len, prompts), default=0) + max_new_tokens
    rows = min(rows, CACHE_NUMBERS // (2 * len(model.h) * model.config.n_embd * slots))
    device, responses, chunk = model.wte.weight.device, [], max(1, rows // n)
    for start in tqdm(range(0, len(prompts), chunk), desc=label, disable=None, leave=False):
        batch = collate([(prompt, []) for prompt in prompts[start:start + chunk]], device)
        tokens, lengths = model.generate(batch.tokens, max_new_tokens, batch.lengths, n, eos,
                                         generator=generator)
        ids = [row[:k] for row, k in zip(tokens.tolist(), lengths.tolist())]
        responses += [ids[i:i + n] for i in range(0, len(ids), n)]
    return responses


class KVCache:
    """One layer's keys and values, preallocated: (2, B, H, slots, D/H), the first `used` filled."""

    def __init__(self, slots):
        self.slots, self.used, self.kv = slots, 0, None

    def append(self, kv):
        if self.kv is None:
            self.kv = kv.new_empty(*kv.shape[:3], self.slots, kv.shape[4])
        end = self.used + kv.shape[3]
        self.kv[..., self.used:end, :] = kv
        self.used = end
        return self.kv[..., :end, :]

    def select(self, rows):
        """Keep these batch rows, in this order; a row may be named more than once."""
        self.kv = self.kv[:, rows]


def sample_logits(logits, uniform):
    """One token per row, (B,), drawn from softmax(logits), (B, V), by inverting the cumulative sum
    at uniform (B,) in [0, 1); a token of probability zero is never drawn.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    u = 1 - uniform[:, None]        # in (0, 1]: 0 would pick a first token of probability zero
    return torch.searchsorted(cumulative, u * cumulative[:, -1:]).squeeze(1)


# ---- batches of (prompt, response) pairs and their log-probabilities -----------------------------

@dataclass
class Batch:
    """Token ids (B, T), padded on the right; prompt_lengths (B,) and whole lengths (B,).

    Rows come in runs of n with the same prompt.
    """
    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    n: int = 1

    def response_mask(self):
        """True at response tokens, EOS included, (B, T); never at t = 0, which has no state."""
        t = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        start = self.prompt_lengths.clamp(min=1)
        return (t >= start[:, None]) & (t < self.lengths[:, None])


def collate(pairs, device="cpu", pad=0, n=1):
    """A Batch of (prompt ids, response ids) pairs, each a list of int; n: see Batch."""
    rows = [[*prompt, *response] for prompt, response in pairs]
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    lengths = [(len(prompt), len(row)) for (prompt, _), row in zip(pairs, rows)]
    prompt_lengths, lengths = torch.tensor(lengths).T
    return Batch(tokens.to(device), prompt_lengths.to(device), lengths.to(device), n)


def states(model, batch):
    """Hidden states (B, T, D), at the last prompt token and at response tokens.

    In inference a prompt of n > 1 responses goes through the transformer once, as in sampling.
    """
    if batch.n == 1 or torch.is_grad_enabled() or not batch.prompt_lengths.all():
        return model.hidden(batch.tokens)
    prompts, lengths = batch.prompt_lengths, batch.prompt_lengths[::batch.n]
    longest, new = int(lengths.max()), int((batch.lengths - prompts).max())
    last, caches, mask = model._prefill(batch.tokens[::batch.n], lengths, new, batch.n)
    step = torch.arange(new, device=prompts.device)
    places = (prompts[:, None] + step).clamp(max=batch.tokens.shape[1] - 1)
    mask = mask.repeat(1, 1, new, 1)
    mask[..., longest:].masked_fill_(step > step[:, None], -math.inf)
    hidden = model.hidden(batch.tokens.gather(1, places), places, caches, mask)
    hidden = torch.cat([last[:, None], hidden], 1)       # from the last prompt token on
    t = torch.arange(batch.tokens.shape[1], device=prompts.device)
    source = (t - prompts[:, None] + 1).clamp(0, new)
    return hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[2]))


def logp_at(model, batch, mask):
    """log pi(y_t | x, y_<t) of the tokens where mask, (B, T), is true: (n,) nats per token.

    The vocabulary's logits are made there only.
    """
    hidden = states(model, batch)[:, :-1][mask[:, 1:]]
    logp = model.logits(hidden).log_softmax(-1)
    return logp.gather(1, batch.tokens[mask][:, None]).squeeze(1)


def logp_token(model, batch):
    """log pi(y_t | x, y_<t), (B, T) in nats per token; zero outside the response."""
    mask = batch.response_mask()
    logp = logp_at(model, batch, mask)
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)


def logp_writable(model, batch):
    """logp_token with zero at tokens that no policy can write, such as the demonstrator's marks:
    they are part of the state, not actions."""
    logp = logp_token(model, batch)
    return logp.masked_fill(logp.isneginf(), 0.0)


def logp_seq(model, batch):
    """log d^pi(y|x) = sum_t log pi(y_t | x, y_<t), (B,) in nats per sequence."""
    return logp_token(model, batch).sum(1)


# ---- tokenizers ---------------------------------------------------------------------------------

PAD, EOS, UNK = "<|pad|>", "<|endoftext|>", "<|unk|>"


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids a policy needs: eos, and pad and unk if it has them."""

    def __init__(self, backend, eos=EOS):
        self.backend = backend
        backend.encode_special_tokens = True    # "<|endoftext|>" in people's text is only text
        self.eos, self.pad, self.unk = (backend.token_to_id(t) for t in (eos, PAD, UNK))
        if self.eos is None:
            raise InputError(f"the tokenizer has no {eos} token")
        backend.add_special_tokens([eos])       # decoding leaves it out
        backend.no_padding()
        backend.no_truncation()

    def __len__(self):
        return self.backend.get_vocab_size()

    @property
    def suppress(self):
        """Ids that no policy may write: padding and the unknown word."""
        return tuple(i for i in (self.pad, self.unk) if i is not None)

    def encode(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def tail(self, text, n):
        """The end of a text: as much of it as n tokens hold, from a token's beginning on."""
        while len(found := self.backend.encode(text, add_special_tokens=False)) > n:
            text = text[max(1, found.offsets[-n][0]):]      # read anew, it may be a token longer
        return text

    def decode(self, ids):
        return self.backend.decode(list(ids), skip_special_tokens=True)


def word_tokenizer(words):
    """Word-level tokenizer of a closed vocabulary; any other word becomes UNK."""
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, UNK, *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([PAD, EOS, UNK])
    return Tokenizer(backend)


def byte_level(bpe):
    """The tokenizers.Tokenizer of a byte-level BPE: GPT-2's splitting of text and its bytes."""
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def bpe_tokenizer(texts, vocab_size):
    """Byte-level BPE, as GPT-2's, trained on these texts: it can write and read any bytes."""
    backend = byte_level(tokenizers.models.BPE())
    backend.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer(backend)


def encode_pair(tokenizer, prompt, response, max_prompt, max_response):
    """(prompt ids, response ids + EOS). A prompt longer than max_prompt tokens keeps its end.

    A response longer than max_response is cut there and then has no EOS: it is not finished.
    """
    response = tokenizer.encode(response) + [tokenizer.eos]
    return tokenizer.encode(tokenizer.tail(prompt, max_prompt)), response[:max_response]


def encode_documents(tokenizer, texts, n_positions):
    """Documents as responses to the empty prompt, cut into pieces of at most n_positions tokens."""
    pieces = []
    for encoding in tokenizer.backend.encode_batch(texts, add_special_tokens=False):
        ids = [*encoding.ids, tokenizer.eos]
        pieces += [([], ids[i:i + n_positions]) for i in range(0, len(ids), n_positions)]
    return [piece for piece in pieces if len(piece[1]) > 1]     # nothing to predict in one token


# ---- files --------------------------------------------------------------------------------------

def write_aside(path, write):
    """write(part) fills a file beside path, which is then renamed: path is whole or not there.

    Raises InputError where it cannot be written: what was there before is then still there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.replace(path)
    except Exception as error:      # a full disk is another kind of error in each library
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        raise InputError(f"{path}: cannot be written; is the disk full? ({reason})") from error
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value, indent=1):
    """Write records as JSON, aside first; a number that does not exist (nan) is null, as JSON has
    none.
    """
    def known(v):
        if isinstance(v, dict):
            return {key: known(item) for key, item in v.items()}
        if isinstance(v, (list, tuple)):
            return [known(item) for item in v]
        return None if isinstance(v, float) and math.isnan(v) else v
    text = json.dumps(known(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    write_aside(Path(path), lambda part: part.write_text(text, encoding="utf-8"))
