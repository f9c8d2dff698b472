"""model.py against enumeration, a sampler that recomputes everything, and transformers' GPT-2.

The models here are tiny, in float64 where a number should be exact, and every weight is drawn wide,
biases and norms included, so that no distribution is near uniform and no term is zero by accident.
"""

import itertools
import math
import random

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import model as m
from model import (
    EOS, PAD, UNK, GPT, GPTConfig, InputError, bpe_tokenizer, collate, encode_documents,
    encode_pair, logp_seq, logp_token, sample_logits, sample_responses, word_tokenizer)

TEXTS = ["the cat sat on the mat .", "a dog ran at the cat .", "señor — 日本 ☼"]
BPE = bpe_tokenizer(TEXTS, 300)
WORDS = word_tokenizer(["the", "cat", "sat", "."])


def tiny(vocab_size=7, n_positions=16, suppress=(), seed=0, std=0.5, **shape):
    """A float64 model with every parameter off its default: weights, biases and norms."""
    shape = {"n_embd": 8, "n_layer": 2, "n_head": 2, **shape}
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab_size, n_positions, suppress_tokens=suppress, **shape)).double()
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator,
                                           dtype=torch.float64)
    return model


def right_padded(prompts, pad=0):
    batch = collate([(prompt, []) for prompt in prompts], pad=pad)
    return batch.tokens, batch.lengths


def recomputed(model, ids):
    """The next-token logits after these ids, (V,): no cache, no batch, no padding."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1]


def reference_sample(model, prompts, max_new_tokens, n, eos, generator):
    """The sampler to compare with: recompute everything, one row at a time, invert by counting.

    It takes its uniforms as generate does: one per step and row, whether or not the row has ended.
    """
    rows = [(list(prompt), []) for prompt in prompts for _ in range(n)]
    for uniforms in 1 - torch.rand(max_new_tokens, len(rows), generator=generator):
        for (prompt, response), u in zip(rows, uniforms.tolist()):
            if response[-1:] != [eos]:
                bounds = recomputed(model, prompt + response).softmax(-1).cumsum(-1).tolist()
                response.append(sum(bound < u * bounds[-1] for bound in bounds))
    return [response for _, response in rows]


def cut(tokens, lengths):
    return [row[:k] for row, k in zip(tokens.tolist(), lengths.tolist())]


def all_responses(vocabulary, longest, eos):
    """Every response: words that end with eos, or that were cut at `longest` tokens."""
    going = [v for v in vocabulary if v != eos]
    for k in range(1, longest + 1):
        for head in itertools.product(going, repeat=k - 1):
            for last in (vocabulary if k == longest else [eos]):
                yield [*head, last]


def chi_square_bound(freedom, z=3.3):
    """Upper quantile of chi-square by Wilson and Hilferty's cube; z = 3.3 is one in 2000."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(counts, expected):
    """The statistic and its degrees of freedom; cells that expect fewer than 5 are put together."""
    small = [i for i, e in enumerate(expected) if e < 5]
    cells = [(c, e) for i, (c, e) in enumerate(zip(counts, expected)) if i not in set(small)]
    if small:
        cells.append((sum(counts[i] for i in small), sum(expected[i] for i in small)))
    return sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1


def test_chi_square_bound_is_the_quantile():
    """A failure means that the statistical tests below have another margin than they state.
    Tabulated 0.999 quantiles (z = 3.0902): 29.588 for 10 degrees of freedom, 149.449 for 100; the
    approximation is good to 1%."""
    assert chi_square_bound(10, 3.0902) == pytest.approx(29.588, rel=1e-2)
    assert chi_square_bound(100, 3.0902) == pytest.approx(149.449, rel=1e-2)


# ---- the transformer ----------------------------------------------------------------------------

def test_logits_are_those_of_transformers_gpt2():
    """A failure means that this is not GPT-2: pretrained weights would not fit, or not mean the
    same. float32, random weights in every parameter, to 1e-4."""
    transformers = pytest.importorskip("transformers")
    ours = tiny(11, 12, n_embd=12, n_layer=3, n_head=3, std=0.3).float()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=11, n_positions=12, n_embd=12, n_layer=3, n_head=3)).eval()
    state = theirs.state_dict()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")    # stored as (in, out)
    for name, value in ours.state_dict().items():
        state["transformer." + name] = value.T if name.endswith(conv1d) else value
    state["lm_head.weight"] = state["transformer.wte.weight"]
    theirs.load_state_dict(state)
    idx = torch.randint(11, (5, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = theirs(idx).logits, ours(idx)
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_no_token_sees_its_future():
    """A failure means that the model reads the answer: every log-probability is then too high."""
    model, idx = tiny(), torch.tensor([[1, 2, 3, 4, 5]])
    other = idx.clone()
    other[0, 3:] = torch.tensor([6, 0])
    torch.testing.assert_close(model(idx)[:, :3], model(other)[:, :3], rtol=0, atol=1e-12)
    assert (model(idx)[:, 3:] - model(other)[:, 3:]).abs().min() > 1e-6


def test_return_hidden_gives_what_the_logits_are_made_of():
    """A failure means that a reward head reads other states than the policy's."""
    model, idx = tiny(), torch.tensor([[1, 2, 3]])
    logits, hidden = model(idx, return_hidden=True)
    assert hidden.shape == (1, 3, 8)
    torch.testing.assert_close(logits, hidden @ model.wte.weight.T, rtol=0, atol=1e-12)
    assert torch.equal(logits, model(idx))


def test_initial_scale():
    """A failure means that training starts from another scale than GPT-2's, carried over by width,
    with residual projections smaller by sqrt(2 layers). Weights of 64 x 64 and more: to 5%."""
    torch.manual_seed(0)
    model, std = GPT(GPTConfig(200, n_embd=64, n_layer=8)), 0.02 * math.sqrt(768 / 64)
    for block in model.h:
        for weight in (block.attn.c_attn.weight, block.mlp.c_fc.weight):
            assert weight.std().item() == pytest.approx(std, rel=0.05)
        for weight in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
            assert weight.std().item() == pytest.approx(std / 4, rel=0.05)
    assert model.wte.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.wpe.weight.std().item() == pytest.approx(std, rel=0.05)


# ---- log-probabilities --------------------------------------------------------------------------

PAIRS = [([1, 2], [3, 4, 5, 6]), ([3], [2]), ([6, 5, 4, 3, 2, 1], [1, 1, 6]), ([2, 2, 2], [0, 5])]


def test_logp_token_is_the_log_softmax_at_the_token_before():
    """A failure means that a token is scored under the wrong state, an off-by-one of the mask."""
    model = tiny()
    got = logp_token(model, collate(PAIRS))
    for row, (prompt, response) in zip(got, PAIRS):
        expected = torch.zeros_like(row)
        for t, token in enumerate(response, start=len(prompt)):
            expected[t] = recomputed(model, (prompt + response)[:t]).log_softmax(-1)[token]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logp_seq(model, collate(PAIRS)), got.sum(1), rtol=0, atol=0)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
@pytest.mark.parametrize("pad", [0, 1, 6])
def test_padding_and_batch_order_change_nothing(order, pad):
    """A failure means that a pair's probability depends on its neighbours in the batch."""
    model = tiny()
    batch = collate([PAIRS[i] for i in order], pad=pad)
    tokens, sums = logp_token(model, batch), logp_seq(model, batch)
    for row, total, i in zip(tokens, sums, order):
        alone = logp_token(model, collate([PAIRS[i]]))[0]
        torch.testing.assert_close(row[:len(alone)], alone, rtol=0, atol=1e-12)
        assert (row[len(alone):] == 0).all()
        torch.testing.assert_close(total, alone.sum(), rtol=0, atol=1e-12)


def test_response_mask_is_by_length_not_by_id():
    """A failure means that a response that holds the pad id, or EOS inside, loses tokens."""
    pairs = [([2, 0], [0, 1, 0, 1, 0]), ([3], [0]), ([1, 0, 0], [])]
    batch = collate(pairs, pad=0)
    assert batch.tokens.shape == (3, 7) and batch.tokens.dtype == torch.long
    assert batch.prompt_lengths.tolist() == [2, 1, 3] and batch.lengths.tolist() == [7, 2, 3]
    mask = batch.response_mask()
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0], [0] * 7]
    assert batch.tokens[0].tolist() == [2, 0, 0, 1, 0, 1, 0]
    assert collate(pairs, pad=6).tokens[1].tolist() == [3, 0, 6, 6, 6, 6, 6]
    assert ((logp_token(tiny(), batch) != 0) == mask).all()


def test_empty_prompt_leaves_out_the_first_token():
    """A failure means that pretraining scores a token that no state precedes."""
    model, ids = tiny(), [4, 2, 6]
    batch = collate([([], ids), ([5], [1, 2, 3])])
    assert batch.response_mask()[0].tolist() == [False, True, True, False]
    expected = logp_seq(model, collate([(ids[:1], ids[1:])]))
    torch.testing.assert_close(logp_seq(model, batch)[:1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("suppress", [(), (0, 2)])
def test_probabilities_of_all_sequences_sum_to_one(suppress):
    """A failure means that logp_seq is not the log of a distribution over responses that stop at
    EOS or are cut at three tokens; with suppressed tokens, that mass leaks to them."""
    model = tiny(5, 8, suppress)
    responses = list(all_responses(range(5), 3, eos=1))
    logp = logp_seq(model, collate([([3, 4], response) for response in responses]))
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert logp.exp().max() > 3 / len(responses)        # far from uniform, or this says little
    forbidden = torch.tensor([bool({*suppress} & {*response}) for response in responses])
    assert (logp[forbidden] == -math.inf).all() and logp[~forbidden].isfinite().all()


def test_suppressed_tokens_in_logits_and_gradients():
    """A failure means that the policy can write padding, or that -inf turns a gradient into nan.
    A suppressed token that is also never read gets no gradient at all."""
    model, batch = tiny(7, 16, (0, 3)), collate([([1, 2], [4, 5, 1]), ([6], [2])])
    logits = model(batch.tokens)
    assert (logits[..., [0, 3]] == -math.inf).all()
    assert logits[..., [1, 2, 4, 5, 6]].isfinite().all()
    assert (logits.softmax(-1)[..., [0, 3]] == 0).all()
    logp_seq(model, batch).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (model.wte.weight.grad[3] == 0).all()
    assert (model.wte.weight.grad[[1, 2, 4, 5, 6]] != 0).all()


def test_gradient_of_logp_seq():
    """A failure means that what is differentiated is not what is scored. Central differences along
    a random direction, float64, to 1e-6."""
    model, batch = tiny(7, 16, (0,)), collate([([1, 2], [4, 5, 1]), ([6], [2])])
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64)
                 for p in model.parameters()]
    logp_seq(model, batch).sum().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction))
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in zip(model.parameters(), direction):
                p += step * d
            values.append(logp_seq(model, batch).sum())
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=0)


# ---- sampling -----------------------------------------------------------------------------------

PROMPTS = [[2, 3, 4, 5, 6], [6], [1, 1, 2]]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("pad", [0, 5])
def test_cache_draws_what_recomputing_draws(n, pad):
    """A failure means that the cache, its positions or its mask change the policy that is sampled:
    the same uniforms then give other tokens than the sampler that recomputes everything."""
    model, (prompts, lengths) = tiny(7, 16, (0,)), right_padded(PROMPTS, pad)
    got = model.generate(prompts, 9, lengths, n, eos=1,
                         generator=torch.Generator().manual_seed(5))
    expected = reference_sample(model, PROMPTS, 9, n, 1, torch.Generator().manual_seed(5))
    assert cut(*got) == expected
    assert len({len(response) for response in expected}) > 1


@pytest.mark.parametrize("eos", [1, None])
def test_cached_logits_are_the_recomputed_logits(eos, monkeypatch):
    """A failure means that what is sampled is not what is differentiated. Every distribution that
    generate draws from, for rows still running after others have ended, to 1e-10."""
    seen = []

    def record(logits, generator):
        seen.append(logits.clone())
        return sample_logits(logits, generator)

    model, (prompts, lengths) = tiny(7, 16, (0,)), right_padded(PROMPTS)
    monkeypatch.setattr(m, "sample_logits", record)
    got = cut(*model.generate(prompts, 9, lengths, 3, eos, generator=torch.Generator()))
    rows = [(prompt, response) for prompt, response in zip(
        [prompt for prompt in PROMPTS for _ in range(3)], got)]
    assert eos is None or len({len(response) for response in got}) > 2
    for t, logits in enumerate(seen):
        alive = [prompt + response[:t] for prompt, response in rows if len(response) > t]
        expected = torch.stack([recomputed(model, ids) for ids in alive])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("others", [[], [[3], [2, 2, 3]]])
def test_sampled_frequencies_are_the_probabilities(others):
    """A failure means that generate samples another distribution than logp_seq scores, or that
    neighbours which end early change it. 20000 draws, fixed seed; chi-square over the 40 responses
    of at most 3 of 4 tokens, rejected beyond its upper 1/2000 quantile."""
    model, n = tiny(4, 8, seed=2), 20000
    prompts = [[2, 3], *others]
    responses = list(all_responses(range(4), 3, eos=1))
    assert len(responses) == 40
    tokens, lengths = right_padded(prompts)
    drawn = cut(*model.generate(tokens, 3, lengths, n, eos=1,
                                generator=torch.Generator().manual_seed(0)))
    for i, prompt in enumerate(prompts):
        counts = dict.fromkeys(map(tuple, responses), 0)
        for response in drawn[i * n:(i + 1) * n]:
            counts[tuple(response)] += 1
        with torch.no_grad():
            logp = logp_seq(model, collate([(prompt, response) for response in responses]))
        statistic, freedom = chi_square(list(counts.values()), (n * logp.exp()).tolist())
        assert freedom > 15 and statistic < chi_square_bound(freedom)


def test_lengths_count_eos_and_the_rest_is_pad():
    """A failure means that a reward or a loss would be taken over the wrong tokens."""
    model, (prompts, lengths) = tiny(7, 16), right_padded(PROMPTS)
    tokens, k = model.generate(prompts, 6, lengths, 8, eos=1, pad=5,
                               generator=torch.Generator().manual_seed(1))
    assert tokens.shape == (24, 6) and k.shape == (24,)
    assert 1 <= k.min() < k.max() == 6
    for row, length in zip(tokens.tolist(), k.tolist()):
        assert 1 not in row[:length - 1]
        assert row[length - 1] == 1 or length == 6
        assert row[length:] == [5] * (6 - length)


def test_without_eos_every_response_is_full():
    """A failure means that a token's id ends a response although nothing was said to end it."""
    model = tiny(4, 16)
    tokens, lengths = model.generate(torch.tensor([[2, 3]]), 10, n=20,
                                     generator=torch.Generator().manual_seed(0))
    assert (lengths == 10).all() and {*tokens.flatten().tolist()} == {0, 1, 2, 3}


def test_suppressed_tokens_are_never_sampled():
    """A failure means that the policy writes what its own log-probability calls impossible."""
    tokens, _ = tiny(6, 40, (0, 5)).generate(torch.tensor([[2, 3]]), 30, n=200,
                                             generator=torch.Generator().manual_seed(0))
    assert {*tokens.flatten().tolist()} == {1, 2, 3, 4}


def test_prompts_must_fit():
    """A failure means that a response runs beyond the learned positions, or that a prompt without
    a token is continued from padding; a response that just fits must be allowed."""
    model, prompts = tiny(7, 8), torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0]])
    model.generate(prompts, 4)
    model.generate(prompts[1:], 7, torch.tensor([1]))
    for new, lengths in [(5, None), (5, torch.tensor([4, 1])), (1, torch.tensor([4, 0]))]:
        with pytest.raises(ValueError, match="do not fit 8"):
            model.generate(prompts, new, lengths)


def test_draws_come_from_the_generator_alone():
    """A failure means that a run cannot be repeated, or that sampling disturbs another's seed."""
    model, prompts = tiny(), torch.tensor([[1, 2, 3]])

    def draw(seed):
        return model.generate(prompts, 8, n=5, eos=1,
                              generator=torch.Generator().manual_seed(seed))[0].tolist()

    before, python = torch.get_rng_state(), random.getstate()
    assert draw(0) == draw(0) != draw(1)
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python


def test_sampling_leaves_no_trace():
    """A failure means that a second call continues the first one's cache."""
    model, prompts = tiny(), torch.tensor([[1, 2, 3]])
    logits = recomputed(model, [1, 2, 3])
    model.generate(prompts, 4, n=3, generator=torch.Generator())
    assert torch.equal(recomputed(model, [1, 2, 3]), logits)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("rows", [1, 4, 1024])
def test_sample_responses_keeps_prompts_and_candidates_together(rows):
    """A failure means that a response is credited to another prompt. Each chunk of prompts must
    give what the reference sampler gives for it."""
    model, prompts, n = tiny(7, 16, (0,)), [*PROMPTS, [4, 4], [5]], 2
    got = sample_responses(model, prompts, n, 6, 1, torch.Generator().manual_seed(7), rows)
    generator, chunk, expected = torch.Generator().manual_seed(7), max(1, rows // n), []
    for start in range(0, len(prompts), chunk):
        flat = reference_sample(model, prompts[start:start + chunk], 6, n, 1, generator)
        expected += [flat[i:i + n] for i in range(0, len(flat), n)]
    assert got == expected


def test_sampling_stays_within_its_memory(monkeypatch):
    """A failure means that GPT-2 samples a thousand responses at a time, and no card holds that:
    as many rows as fit 2 (keys, values) x layers x width x slots numbers, at least one prompt's."""
    model, rows = tiny(7, 16), []
    monkeypatch.setattr(model, "_prefill", lambda prompts, *rest: (
        rows.append(len(prompts)), m.GPT._prefill(model, prompts, *rest))[1])
    per_row = 2 * model.config.n_layer * model.config.n_embd * (4 + 6)
    for room, expected in ((10 * per_row, [3, 3, 1]), (per_row, [1] * 7), (1000 * per_row, [7])):
        monkeypatch.setattr(m, "CACHE_NUMBERS", room)
        rows.clear()
        got = sample_responses(model, [[2, 3], [4, 5, 6, 6]] * 3 + [[2]], 3, 6, None, None)
        assert rows == expected and [len(row) for row in got] == [3] * 7


# ---- one draw -----------------------------------------------------------------------------------

def draw_at(u, logits):
    """The tokens that sample_logits draws from one row of logits at u, what the uniforms leave to
    one: u in (0, 1]."""
    return sample_logits(logits.expand(len(u), -1), 1 - u).tolist()


def test_sample_logits_inverts_the_cumulative_sum():
    """A failure means that some token is drawn more or less often than its probability. Uniforms
    1e-9 below and above each bound, tokens of probability zero first, last and between."""
    p = torch.tensor([0, 0.1, 0, 0.25, 0.05, 0, 0.6, 0], dtype=torch.float64)
    bounds = [(0.1, 1, 3), (0.35, 3, 4), (0.4, 4, 6)]
    u = torch.tensor([b + e for b, _, _ in bounds for e in (-1e-9, 1e-9)], dtype=torch.float64)
    assert draw_at(u, p.log()) == [1, 3, 3, 4, 4, 6]
    assert draw_at(u, p.log() + 50) == [1, 3, 3, 4, 4, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_logits_never_draws_probability_zero(dtype):
    """A failure means that at the ends of the unit interval, where the cumulative sum's rounding
    shows, a forbidden token or one outside the vocabulary comes out. 1 - u is what rand returns:
    from 0 to 1 - 2^-24."""
    generator = torch.Generator().manual_seed(0)
    u = torch.cat([torch.tensor([2 ** -24, 2 ** -23, 1 - 2 ** -24, 1.0]),
                   torch.rand(200, generator=generator).clamp(min=2 ** -24)]).to(dtype)
    for scale in (0.1, 3.0, 30.0):
        logits = (scale * torch.randn(3000, generator=generator)).to(dtype)
        logits[torch.rand(3000, generator=generator) < 0.5] = -math.inf
        logits[[0, -1]] = -math.inf
        drawn = draw_at(u, logits)
        assert all(logits.softmax(-1)[token] > 0 for token in drawn)
    certain = torch.tensor([-math.inf, 0.0, -math.inf, -1e4], dtype=dtype)
    assert {*draw_at(u, certain)} == {1}


def test_rows_are_drawn_independently():
    """A failure means that candidates share a uniform, or that rows are mixed up. Two rows of
    opposite preferences, 4000 joint draws, four standard errors (0.031) on each share."""
    p = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
    uniform = torch.rand(8000, generator=torch.Generator().manual_seed(0))
    drawn = sample_logits(p.log().repeat(4000, 1), uniform).view(-1, 2)
    joint = [(drawn == torch.tensor(pair)).all(1).double().mean().item()
             for pair in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert joint == pytest.approx([0.16, 0.64, 0.04, 0.16], abs=0.031)


# ---- tokenizers ---------------------------------------------------------------------------------

def test_word_tokenizer_round_trip_and_unknown_words():
    """A failure means that the toy tasks' words change on their way through the policy."""
    assert WORDS.encode("the cat sat .") == [3, 4, 5, 6]
    assert WORDS.decode([3, 4, 5, 6]) == "the cat sat ."
    assert WORDS.encode("the dog sat ☼") == [3, WORDS.unk, 5, WORDS.unk]
    assert len(WORDS) == 7 and WORDS.backend.id_to_token(WORDS.unk) == UNK
    assert WORDS.decode([3, WORDS.eos, WORDS.pad]) == "the"
    assert set(WORDS.suppress) == {WORDS.pad, WORDS.unk}


@pytest.mark.parametrize("tokenizer", [WORDS, BPE], ids=["words", "bpe"])
def test_pad_is_not_eos(tokenizer):
    """A failure means that stopping and padding are one token, so that masks by id seem to work."""
    assert tokenizer.pad != tokenizer.eos
    assert tokenizer.backend.id_to_token(tokenizer.eos) == EOS
    assert tokenizer.backend.id_to_token(tokenizer.pad) == PAD
    assert tokenizer.pad in tokenizer.suppress and tokenizer.eos not in tokenizer.suppress


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(st.text().filter(lambda text: EOS not in text and PAD not in text))
@example(" two  spaces\n\tand a tab ")
@example("é 日本 🦆 \x00")
def test_bpe_round_trip(text):
    """A failure means that there are texts which the policy cannot read or write."""
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert not {BPE.eos, BPE.pad} & {*ids} and BPE.unk is None
    assert all(0 <= i < len(BPE) for i in ids)


@pytest.mark.parametrize("text", [f"the {EOS} cat", f"the{PAD} cat"])
def test_a_special_token_spelled_out_is_text(text):
    """A failure means that a document which quotes the special tokens, such as a page on language
    models, ends responses in their middle, and that decoding drops what stood there."""
    assert BPE.decode(BPE.encode(text)) == text
    assert not {BPE.eos, BPE.pad} & {*BPE.encode(text)}


def test_a_tokenizer_needs_eos():
    """A failure means that a policy is made that can never stop."""
    backend = bpe_tokenizer(TEXTS, 300).backend
    plain = type(backend)(type(backend.model)())
    with pytest.raises(InputError, match="endoftext"):
        m.Tokenizer(plain)


def test_encode_pair():
    """A failure means that a finished response has no EOS, a cut one has, or a prompt that does
    not fit loses its end."""
    def pair(response, max_prompt=2, max_response=3):
        return encode_pair(WORDS, "the cat", response, max_prompt, max_response)

    assert pair("sat .") == ([3, 4], [5, 6, WORDS.eos])
    assert pair("sat . the") == ([3, 4], [5, 6, 3])
    assert pair("sat . the cat") == ([3, 4], [5, 6, 3])
    assert pair("") == ([3, 4], [WORDS.eos])
    assert pair("sat", max_prompt=1) == ([4], [5, WORDS.eos])


@given(st.text(max_size=30), st.integers(1, 12))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_a_tail_is_an_end_that_fits(text, n):
    """A failure means that a cut prompt does not fit, is no end of the prompt, or that more of it
    than a character and a token would have fitted."""
    tail = BPE.tail(text, n)
    assert text.endswith(tail) and len(BPE.encode(tail)) <= n
    assert tail == text or len(BPE.encode(text[-len(tail) - 3:])) >= min(n, 3)
    assert BPE.tail(tail, n) == tail


def test_encode_documents_covers_all_tokens():
    """A failure means that pretraining skips text, or never sees that documents end. Only a last
    piece of one token may be missing: nothing can be predicted in it."""
    for text in ["the cat sat .", "the cat sat", "the", "", "the cat . the cat . sat"]:
        whole = [*WORDS.encode(text), WORDS.eos]
        pieces = encode_documents(WORDS, [text], 4)
        assert all(prompt == [] and 1 < len(ids) <= 4 for prompt, ids in pieces)
        joined = [i for _, ids in pieces for i in ids]
        assert joined == (whole[:-1] if len(whole) % 4 == 1 else whole)
    both = encode_documents(WORDS, ["the cat", "sat ."], 4)
    assert [ids for _, ids in both] == [[3, 4, WORDS.eos], [5, 6, WORDS.eos]]


# ---- files --------------------------------------------------------------------------------------

def test_interrupted_write_keeps_the_old_file(tmp_path):
    """A failure means that stopping a run at the wrong moment loses the checkpoint before it."""
    path = tmp_path / "file"
    path.write_text("old")

    def fail(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        m.write_aside(path, fail)
    assert path.read_text() == "old"
    m.write_aside(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new"
