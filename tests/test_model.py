"""model.py against enumeration, a sampler that recomputes everything, and transformers' GPT-2.

The models here are tiny, in float64 where a number should be exact, and every weight is drawn wide,
biases and norms included, so that no distribution is near uniform and no term is zero by accident.
"""

import itertools
import math
import random

import pytest
import torch

import model as m
from model import (GPT, GPTConfig, collate, generate, logp_at, logp_seq, logp_token,
                   sample_logits)


def tiny(vocab_size=7, n_positions=16, suppress=(), seed=0, std=0.5, **shape):
    """A float64 model with every parameter off its default: weights, biases and norms. A response
    ends with token 1."""
    shape = {"n_embd": 8, "n_layer": 2, "n_head": 2, "eos_token_id": 1, **shape}
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab_size, n_positions, suppress_tokens=suppress, **shape)).double()
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator,
                                           dtype=torch.float64)
    return model


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def recomputed(model, ids):
    """The next-token logits after these ids, (V,): no cache, no batch, no padding."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1]


def reference_sample(model, prompts, n, max_new_tokens, generator):
    """The sampler to compare with: recompute everything, one row at a time, invert by counting.

    It takes its uniforms as generate does: one per step and row, whether or not the row has ended.
    """
    rows = [(list(prompt), []) for prompt in prompts for _ in range(n)]
    for uniforms in 1 - torch.rand(max_new_tokens, len(rows), generator=generator):
        for (prompt, response), u in zip(rows, uniforms.tolist()):
            if response[-1:] != [model.config.eos_token_id]:
                bounds = recomputed(model, prompt + response).softmax(-1).cumsum(-1).tolist()
                response.append(sum(bound < u * bounds[-1] for bound in bounds))
    responses = [response for _, response in rows]
    return [responses[i:i + n] for i in range(0, len(responses), n)]


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


def test_more_tokens_than_positions_are_refused():
    """A failure means that a text which is too long ends in an index error of torch."""
    model = tiny(7, 8)
    assert model(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, 7)
    for pair in (([1] * 5, [2] * 4), ([], [1] * 9)):
        with pytest.raises(ValueError, match="9 tokens, but 8 positions"):
            logp_seq(model, collate([pair]))


def test_logits_are_made_of_the_hidden_states():
    """A failure means that a reward head reads other states than the policy's."""
    model, idx = tiny(), torch.tensor([[1, 2, 3]])
    hidden = model.hidden(idx)
    assert hidden.shape == (1, 3, 8)
    torch.testing.assert_close(model(idx), hidden @ model.wte.weight.T, rtol=0, atol=1e-12)
    assert torch.equal(model.logits(hidden), model(idx))


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
    mask = collate(PAIRS).response_mask()
    assert torch.equal(logp_at(model, collate(PAIRS), mask), got[mask])


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


@pytest.mark.parametrize("rows", [1, 4, 1024])
@pytest.mark.parametrize("n", [1, 4])
def test_the_cache_draws_what_recomputing_draws(n, rows, monkeypatch):
    """A failure means that the cache, its positions or its mask change the policy that is sampled,
    or that a response is credited to another prompt: the same uniforms then give other tokens than
    the sampler that recomputes everything, chunk of prompts by chunk."""
    model, prompts = tiny(7, 16, (0,)), [*PROMPTS, [4, 4], [5]]
    monkeypatch.setattr(m, "ROWS", rows)
    got = generate(model, prompts, n, max_new_tokens=9, generator=seeded(5))
    generator, chunk, expected = seeded(5), max(1, rows // n), []
    for start in range(0, len(prompts), chunk):
        expected += reference_sample(model, prompts[start:start + chunk], n, 9, generator)
    assert got == expected
    assert len({len(response) for responses in expected for response in responses}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("eos", [1, None])
def test_cached_logits_are_the_recomputed_logits(eos, temperature, monkeypatch):
    """A failure means that what is sampled is not what is differentiated. Every distribution that
    generate draws from, for rows still running after others have ended, to 1e-10. A row is known
    by its uniform, so it does not matter where in the batch it stands."""
    drawn, uniforms = [], torch.rand(9, 9, generator=seeded(0))

    def record(logits, uniform):
        drawn.append((logits.clone(), uniform.clone()))
        return sample_logits(logits, uniform)
    model = tiny(7, 16, (0,), eos_token_id=eos)
    monkeypatch.setattr(m, "sample_logits", record)
    got = sum(generate(model, PROMPTS, 3, temperature, 9, seeded(0)), [])
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    assert eos is None or len({len(response) for response in got}) > 2
    compared = 0
    for t, (logits, uniform) in enumerate(drawn):
        for row, u in zip(logits, uniform):
            i = uniforms[t].tolist().index(u.item())
            if len(got[i]) > t:         # a row that has ended may stand there a while longer
                expected = recomputed(model, prompts[i] + got[i][:t]) / temperature
                torch.testing.assert_close(row, expected, rtol=0, atol=1e-10)
                compared += 1
    assert compared == sum(map(len, got))


def log_law(model, prompt, responses, temperature):
    """log of each response's probability if every token is drawn from pi^(1/temperature) / Z(s)."""
    def log_p(response):
        return sum((recomputed(model, prompt + response[:t]) / temperature).log_softmax(-1)[token]
                   for t, token in enumerate(response))
    return torch.stack([log_p(response) for response in responses])


@pytest.mark.parametrize("temperature, others", [
    (1.0, []), (1.0, [[3], [2, 2, 3]]), (0.5, [[3]]), (2.0, [[3]])])
def test_sampled_frequencies_are_the_probabilities(temperature, others):
    """A failure means that generate samples another distribution than logp_seq scores, that
    neighbours which end early change it, or that a temperature flattens where it should sharpen.
    20,000 draws, fixed seed; chi-square over the 40 responses of at most 3 of 4 tokens, rejected
    beyond its upper 1/2000 quantile. The temperature the other way round must be refused."""
    model, n = tiny(4, 8, seed=2), 20000
    responses = list(all_responses(range(4), 3, eos=1))
    assert len(responses) == 40
    written = generate(model, [[2, 3], *others], n, temperature, 3, seeded(0))
    for prompt, ys in zip([[2, 3], *others], written):
        counts = [ys.count(response) for response in responses]
        log_p = log_law(model, prompt, responses, temperature)
        if temperature == 1:
            scored = logp_seq(model, collate([(prompt, response) for response in responses]))
            torch.testing.assert_close(scored, log_p)
        statistic, freedom = chi_square(counts, (n * log_p.exp()).tolist())
        assert sum(counts) == n and freedom > 10 and statistic < chi_square_bound(freedom)
        if temperature != 1:
            wrong = n * log_law(model, prompt, responses, 1 / temperature).exp()
            statistic, freedom = chi_square(counts, wrong.tolist())
            assert statistic > 10 * chi_square_bound(freedom)


def test_a_response_ends_with_its_first_eos():
    """A failure means that a reward or a loss would be taken over the wrong tokens: a response
    holds EOS at its end only, or is as long as it may be. A row that has ended while most others
    run stays in the batch and may draw EOS again; that one must not count."""
    responses = generate(tiny(7, 16), PROMPTS, 8, max_new_tokens=6, generator=seeded(1))
    assert [len(row) for row in responses] == [8, 8, 8]
    lengths = {len(response) for row in responses for response in row}
    assert min(lengths) < max(lengths) == 6
    for response in sum(responses, []):
        assert 1 not in response[:-1]
        assert response[-1] == 1 or len(response) == 6


def test_without_eos_every_response_is_full():
    """A failure means that a token's id ends a response although nothing was said to end it."""
    responses, = generate(tiny(4, 16, eos_token_id=None), [[2, 3]], 20, max_new_tokens=10,
                          generator=seeded(0))
    assert {len(response) for response in responses} == {10}
    assert set(sum(responses, [])) == {0, 1, 2, 3}


def test_suppressed_tokens_are_never_sampled():
    """A failure means that the policy writes what its own log-probability calls impossible."""
    responses, = generate(tiny(6, 40, (0, 5), eos_token_id=None), [[2, 3]], 200, max_new_tokens=30,
                          generator=seeded(0))
    assert set(sum(responses, [])) == {1, 2, 3, 4}


def test_prompts_must_fit():
    """A failure means that a response runs beyond the learned positions, or that a prompt without
    a token is continued from padding; a response that just fits must be allowed."""
    model = tiny(7, 8, eos_token_id=None)
    prompts = [[1, 2, 3, 4], [5]]
    for new, expected in ((4, 4), (None, 4)):       # None: as many as the longest prompt leaves
        written = generate(model, prompts, max_new_tokens=new, generator=seeded(0))
        assert [len(row[0]) for row in written] == [expected] * 2
    assert len(generate(model, prompts[1:], generator=seeded(0))[0][0]) == 7
    for prompts, new in (([[1, 2, 3, 4], [5]], 5), ([[1, 2, 3, 4], []], 1), ([[1] * 8], None),
                         ([[1]], 0)):
        with pytest.raises(ValueError, match="do not fit 8"):
            generate(model, prompts, max_new_tokens=new)
    assert generate(model, []) == []


def test_draws_come_from_the_generator_alone():
    """A failure means that a run cannot be repeated, that sampling disturbs another's seed, or that
    a second call continues the first one's cache."""
    model = tiny()
    logits, before, python = recomputed(model, [1, 2, 3]), torch.get_rng_state(), random.getstate()

    def draw(seed):
        return generate(model, [[1, 2, 3]], 5, max_new_tokens=8, generator=seeded(seed))
    assert draw(0) == draw(0) != draw(1)
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python
    assert torch.equal(recomputed(model, [1, 2, 3]), logits)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sampling_stays_within_its_memory(monkeypatch):
    """A failure means that GPT-2 samples a thousand responses at a time, and no card holds that:
    as many rows as fit 2 (keys, values) x layers x width x slots numbers, at least one prompt's."""
    model, rows, prefill = tiny(7, 16), [], m._prefill

    def record(policy, batch, *rest):
        rows.append(len(batch.tokens))
        return prefill(policy, batch, *rest)
    monkeypatch.setattr(m, "_prefill", record)
    per_row = 2 * model.config.n_layer * model.config.n_embd * (4 + 6)
    for room, expected in ((10 * per_row, [3, 3, 1]), (per_row, [1] * 7), (1000 * per_row, [7])):
        monkeypatch.setattr(m, "CACHE_FLOATS", room)
        rows.clear()
        got = generate(model, [[2, 3], [4, 5, 6, 6]] * 3 + [[2]], 3, max_new_tokens=6)
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


def test_a_large_vocabulary_is_drawn_in_double_precision():
    """GPT-2's 50,257 tokens, in float32 as a model gives them. Of those with a probability from
    1e-13 to 2^-25, each is drawn in the middle of its interval; in float32 most never are."""
    logits = 6 * torch.randn(50257, generator=seeded(0))
    p = logits.double().softmax(-1)
    unlikely = ((p > 1e-13) & (p < 2 ** -25)).nonzero().squeeze(1)
    assert len(unlikely) > 25000
    some = unlikely[::500]
    middle = (p.cumsum(-1) - p / 2)[some]
    assert draw_at(middle, logits) == some.tolist()
    assert sum(a == b for a, b in zip(draw_at(middle.float(), logits), some)) < len(some) / 2


@pytest.mark.parametrize("vocab_size, dtype", [(m.SMALL_VOCABULARY, torch.float32),
                                               (m.SMALL_VOCABULARY + 1, torch.float64)])
def test_uniforms_are_as_fine_as_the_vocabulary_needs(vocab_size, dtype, monkeypatch):
    """A failure means that tokens of GPT-2's vocabulary can never be written; or that small models
    draw other samples than those that the tables were made of."""
    asked = []

    def record(logits, uniform):
        asked.append((uniform.dtype, uniform.tolist()))
        return sample_logits(logits, uniform)
    monkeypatch.setattr(m, "sample_logits", record)
    generate(tiny(vocab_size, eos_token_id=None).float(), [[2, 3]], 5, max_new_tokens=2,
             generator=seeded(0))
    assert asked == [(dtype, u) for u in torch.rand(2, 5, generator=seeded(0),
                                                    dtype=dtype).tolist()]


def test_rows_are_drawn_independently():
    """A failure means that candidates share a uniform, or that rows are mixed up. Two rows of
    opposite preferences, 4000 joint draws, four standard errors (0.031) on each share."""
    p = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
    uniform = torch.rand(8000, generator=torch.Generator().manual_seed(0))
    drawn = sample_logits(p.log().repeat(4000, 1), uniform).view(-1, 2)
    joint = [(drawn == torch.tensor(pair)).all(1).double().mean().item()
             for pair in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert joint == pytest.approx([0.16, 0.64, 0.04, 0.16], abs=0.031)
