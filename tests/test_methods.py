"""What each method's optimum is, on a token MDP small enough to list all its responses.

A policy is a tiny GPT over three letters and EOS, with at most three new tokens: 40 responses to
each of two prompts. Every log-probability is exact, in float64, and so are optima and expectations,
unless a test says that it samples.
"""

import copy
import itertools
import math
import random

import numpy as np
import pytest
import torch

from divergences import (DIVERGENCES, REVERSE_KL, discriminator_loss, dpo_loss, kl,
                         policy_gradient_loss)
from model import GPT, GPTConfig, collate, generate, logp_seq, logp_token
from reward import (REWARD_CLIP, Adversary, ExactAdversary, LogRatio, RewardModel,
                    TokenExtrapolation, at_the_end, best_of_n_kl, best_of_n_weights, score)
from test_model import all_responses, chi_square, chi_square_bound
from train import PolicyConfig, TrainConfig, fit, fit_pairs, logp_writable, optimise_policy, split

PAD, EOS, LETTERS, LONGEST = 0, 1, (2, 3, 4), 3
PROMPTS = ([2], [4, 3])
RESPONSES = list(all_responses([EOS, *LETTERS], LONGEST, EOS))
PAIRS = [(x, y) for x in PROMPTS for y in RESPONSES]
BATCH = collate(PAIRS)
SHAPE = len(PROMPTS), len(RESPONSES)


def tiny(seed, std=0.2, suppress=(PAD,)):
    """A GPT off its starting weights, so that no distribution is near uniform; it never pads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = GPT(GPTConfig(5, n_positions=8, n_embd=16, n_layer=1, n_head=2,
                              suppress_tokens=suppress, eos_token_id=EOS)).double()
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator,
                                           dtype=torch.float64)
    return model


SFT, INIT = tiny(1), tiny(2)


def listed(policy):
    """log pi(y|x) of every response to every prompt, (prompts, responses)."""
    return logp_seq(policy, BATCH).view(SHAPE)


def tilted(reference, rewards, beta):
    """log of pi_ref e^(r/beta) / Z, the optimum of E_pi[r] - beta KL(pi || pi_ref)."""
    return (listed(reference).detach() + rewards.view(SHAPE) / beta).log_softmax(-1)


def keys(batch):
    """(prompt, response) of each row, to look up in a table."""
    return [(tuple(row[:p]), tuple(row[p:n])) for row, p, n in zip(
        batch.tokens.tolist(), batch.prompt_lengths.tolist(), batch.lengths.tolist())]


class Table(torch.nn.Module):
    """Any function of whole responses: a reward with no structure, or a discriminator that can
    learn any h."""
    device = "cpu"

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(values)
        self.row = {key: i for i, key in enumerate(keys(BATCH))}

    def forward(self, batch):
        return self.values[[self.row[key] for key in keys(batch)]]

    def token_rewards(self, batch):
        return at_the_end(self(batch), batch)


def random_table(seed, scale=0.7):
    generator = torch.Generator().manual_seed(seed)
    return Table(scale * torch.randn(len(PAIRS), generator=generator, dtype=torch.float64))


def constant_table(value):
    return Table(torch.full((len(PAIRS),), value, dtype=torch.float64))


def drawing(k, seed=0):
    """draw(policy): k samples of each prompt, by the sampler that the learner uses."""
    generator = torch.Generator().manual_seed(seed)

    def draw(policy):
        written = generate(policy, PROMPTS, k, max_new_tokens=LONGEST, generator=generator)
        return [(x, y) for x, ys in zip(PROMPTS, written) for y in ys]
    return draw


def test_the_enumeration_is_complete():
    """A failure means that every exact number below is of another distribution. The policies also
    have to differ, or nothing below would be put to a test."""
    assert len(RESPONSES) == len(set(map(tuple, RESPONSES))) == 40
    with torch.no_grad():
        sft, init = listed(SFT), listed(INIT)
    torch.testing.assert_close(sft.exp().sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(init.exp().sum(1), torch.ones(2, dtype=torch.float64))
    uniform = torch.full_like(sft, -math.log(40))
    assert kl(sft, init).min() > 0.3 and kl(sft, uniform).min() > 0.1
    assert kl(sft[0], sft[1]) > 0.05        # the prompt matters


# ---- policy optimisation ------------------------------------------------------------------------

REWARDS = {"dense": LogRatio(SFT, INIT), "last": random_table(0), "constant": constant_table(5.0)}


@pytest.mark.parametrize("name, steps", [("dense", 80), ("last", 150)])
def test_policy_optimisation_lands_on_the_tilted_policy(name, steps):
    """By sampling, within 0.01 nats of pi_SFT e^(r/beta) / Z, from at least ten times that: wrong
    signs, a KL to another policy or rewards on the wrong token all end elsewhere."""
    reward, k = REWARDS[name], 64
    with torch.no_grad():
        target = tilted(SFT, reward(BATCH), beta=1.0)
    policy, history = optimise_policy(SFT, reward, drawing(k),
                                      PolicyConfig(lr=1e-2, steps=steps, samples=k), 1.0)
    with torch.no_grad():
        assert kl(listed(SFT), target).min() > 0.1 and kl(listed(policy), target).max() < 0.01
        far = kl(listed(policy), listed(SFT)).mean().item()
        entropy = -(listed(policy).exp() * listed(policy)).sum(1).mean().item()
    assert history[0]["kl"] == 0        # 2 k samples of the last step: to a quarter
    assert history[-1]["kl"] == pytest.approx(far, abs=0.25 * far + 0.1)
    assert history[-1]["entropy"] == pytest.approx(entropy, rel=0.25) and entropy > 0.5


def objective(policy, name, beta):
    """-(E_pi[r] - beta KL(pi || pi_SFT)), summed over prompts, by the divergence module's kl."""
    with torch.no_grad():
        rewards, reference = REWARDS[name](BATCH).view(SHAPE), listed(SFT)
    return (beta * kl(listed(policy), reference) - (listed(policy).exp() * rewards).sum(1)).sum()


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("k", [2, 3])
def test_the_leave_one_out_gradient_is_unbiased(name, k):
    """Averaged over every group of k responses to a prompt, by its probability, the gradient is
    that of E_pi[r] - beta KL(pi || pi_ref) by autograd. A baseline that knows the sample's own
    actions, a return that starts late or a KL in the wrong direction would each show here. For a
    constant reward the gradient is that of the KL alone."""
    policy, beta = tiny(3), 0.4
    parameters = list(policy.parameters())
    with torch.no_grad():
        rewards, reference = REWARDS[name].token_rewards(BATCH), logp_token(SFT, BATCH)
    logp, mask = logp_token(policy, BATCH), BATCH.response_mask()
    exact, got = objective(policy, name, beta), 0.0
    for i in range(len(PROMPTS)):
        rows = torch.arange(i * len(RESPONSES), (i + 1) * len(RESPONSES))
        groups = rows[torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=k)))]
        chance = logp.detach().sum(1)[groups].sum(1).exp()
        flat = groups.flatten()
        leaf = logp.detach()[flat].requires_grad_()
        loss = policy_gradient_loss(leaf, reference[flat], rewards[flat], mask[flat], beta, k)
        slope, = torch.autograd.grad(loss * len(groups), leaf)      # each group's own loss
        got = got + (chance.repeat_interleave(k)[:, None] * slope * logp[flat]).sum()
    expected = torch.autograd.grad(exact, parameters)
    assert max(slope.abs().max() for slope in expected) > 1e-2
    for a, b in zip(expected, torch.autograd.grad(got, parameters)):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_constant_reward_moves_nothing(beta):
    """A baseline that is not exact, or that takes a response which has ended for one without any
    reward, would push samples up or down. Each step sees the same samples."""
    policy = tiny(4)
    moved, _ = optimise_policy(policy, REWARDS["constant"], lambda policy: drawing(8)(policy),
                               PolicyConfig(lr=1e-2, steps=5, samples=8), beta)
    with torch.no_grad():
        assert kl(listed(moved), listed(policy)).max() < 1e-6
        assert kl(listed(moved), listed(SFT)).min() > 0.05      # a kl that can see


# ---- the closed form ----------------------------------------------------------------------------

def state_logps(policy):
    """log pi(.|s_t) at every position t > 0, (rows, T, V); zeros at t = 0."""
    with torch.no_grad():
        logp = policy.logits(policy.hidden(BATCH.tokens)[:, :-1]).log_softmax(-1)
    return torch.nn.functional.pad(logp, (0, 0, 1, 0))


def formula(beta, floor):
    """Per token, from both policies' probabilities: (log pi_SFT, h), each (rows, T, V)."""
    sft, init = state_logps(SFT).exp(), state_logps(INIT).exp()
    bottom = torch.maximum(init, floor * init.max(-1, keepdim=True).values)
    return sft, torch.log(sft / bottom)


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.6])
def test_extrapolation_is_its_formula_at_every_token(floor):
    """pi(a|s) = pi_SFT (pi_SFT / max(pi_0, floor max pi_0))^(1/beta) / Z(s), and LogRatio's terms
    are the same h. Otherwise it is some other policy that the table calls the closed form."""
    beta, mask = 0.3, BATCH.response_mask()
    sft, h = formula(beta, floor)
    weight = torch.where(sft > 0, sft * torch.exp(h / beta), 0.0)
    expected = (weight / weight.sum(-1, keepdim=True))[mask]
    got = state_logps(TokenExtrapolation(SFT, INIT, beta, floor)).exp()[mask]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert (expected[:, PAD] == 0).all()
    terms = h.gather(2, BATCH.tokens[..., None]).squeeze(2).where(mask, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(LogRatio(SFT, INIT, floor).token_rewards(BATCH), terms)
    floored = (h < formula(beta, 0.0)[1] - 1e-9)[mask].sum()
    assert floored == 0 if floor == 0 else floored >= 3         # at 0.1 some, or nothing is tested


def test_a_floor_leads_from_the_ratio_to_the_likelihood():
    """Token by token: at a floor of 0 h is log pi_SFT - log pi_0, and at 1 it is log pi_SFT less a
    term of the state alone, log max pi_0. Otherwise a run of floors compares other rewards than it
    says."""
    mask, sft, init = BATCH.response_mask(), state_logps(SFT), state_logps(INIT)
    tokens = BATCH.tokens[..., None]
    taken, ratio = (x.gather(2, tokens).squeeze(2) for x in (sft, sft - init))
    with torch.no_grad():
        plain, likely = (LogRatio(SFT, INIT, floor).token_rewards(BATCH) for floor in (0.0, 1.0))
        h = LogRatio(SFT, INIT, 1.0).logp_and_ratio(*(
            policy.hidden(BATCH.tokens)[:, :-1] for policy in (SFT, INIT)))[1]
    torch.testing.assert_close(plain[mask], ratio[mask])
    torch.testing.assert_close(likely[mask], (taken - init.amax(2))[mask])
    term = (sft[:, 1:] - h)[..., 1:][mask[:, 1:]]       # without PAD, where it is inf - inf
    torch.testing.assert_close(term, term[:, :1].expand_as(term))
    assert (plain - likely)[mask].abs().max() > 1 and term.std() > 0.1


@pytest.mark.parametrize("T", [0.25, 0.5, 0.8])
def test_a_temperature_is_a_power_of_pi_sft(T):
    """pi(a|s) = pi_SFT(a|s)^(1/T) / Z(s), of every next token and with no pi_0 in it, as afd.py
    makes it: a floor of 1 and beta = T / (1 - T). It is what the sampler draws at this temperature.
    With beta inverted it would be pi_SFT^(1/(1 - T)), the same at T = 1/2 alone."""
    policies = [TokenExtrapolation(SFT, init, T / (1 - T), 1.0) for init in (INIT, tiny(5))]
    mask = BATCH.response_mask()
    power = state_logps(SFT).exp() ** (1 / T)
    expected = (power / power.sum(-1, keepdim=True))[mask]
    for policy in policies:
        torch.testing.assert_close(state_logps(policy).exp()[mask], expected, rtol=1e-9, atol=1e-12)
    taken = expected.gather(1, BATCH.tokens[mask][:, None]).squeeze(1).log()
    logp = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, taken).sum(1)
    with torch.no_grad():
        torch.testing.assert_close(listed(policies[0]), logp.view(SHAPE))
        assert kl(listed(policies[0]), listed(SFT)).min() > 5e-3
    cold, drawn = (generate(policy, PROMPTS, 200, temperature=temperature, max_new_tokens=LONGEST,
                            generator=torch.Generator().manual_seed(0))
                   for policy, temperature in ((policies[0], 1.0), (SFT, T)))
    assert cold == drawn


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_extrapolation_and_the_sequence_optimum(floor):
    """log pi(y|x) = log pi*(y|x) + log Z(x) - sum_t log Z(s_t) on every response: the two are not
    the same policy. At beta = 0.3 they are more than 0.05 nats apart; for one-token responses they
    agree."""
    beta, mask = 0.3, BATCH.response_mask()
    sft, h = formula(beta, floor)
    log_z = torch.where(sft > 0, sft * torch.exp(h / beta), 0.0).sum(-1).log().where(mask, 0.0)
    with torch.no_grad():
        policy = listed(TokenExtrapolation(SFT, INIT, beta, floor))
        reward = LogRatio(SFT, INIT, floor)(BATCH)
        best = tilted(SFT, reward, beta)
        log_z_x = (listed(SFT) + reward.view(SHAPE) / beta).logsumexp(-1, keepdim=True)
    torch.testing.assert_close(policy, best + log_z_x - log_z.sum(1).view(SHAPE))
    assert kl(policy, best).min() > 0.05
    single = collate([([2], [a]) for a in (EOS, *LETTERS)])
    with torch.no_grad():
        one = (logp_seq(SFT, single) + LogRatio(SFT, INIT, floor)(single) / beta).log_softmax(-1)
        torch.testing.assert_close(
            logp_seq(TokenExtrapolation(SFT, INIT, beta, floor), single), one)


def test_extrapolation_samples_from_its_own_density():
    """4,000 samples of each prompt against logp_seq, chi-square at one in 2,000: its generate goes
    through two key-value caches, and a mix-up there would sample some other policy. Without
    alternatives it would pass: pi_SFT's density is refused."""
    policy, n = TokenExtrapolation(SFT, INIT, 1.0, 0.1), 4000
    written = generate(policy, PROMPTS, n, max_new_tokens=LONGEST,
                       generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right, wrong = listed(policy).exp() * n, listed(SFT).exp() * n
    for i, ys in enumerate(written):
        counts = [ys.count(y) for y in RESPONSES]
        assert sum(counts) == n
        statistic, freedom = chi_square(counts, right[i].tolist())
        assert statistic < chi_square_bound(freedom)
        statistic, freedom = chi_square(counts, wrong[i].tolist())
        assert statistic > 10 * chi_square_bound(freedom)


def test_the_exact_discriminator_is_the_log_ratio():
    """Each response has a logit of its own; with exact densities as weights the loss is least at
    LogRatio's value on all 80 of them. (Weights divided by their sum, response by response, leave
    each minimum where it is and make the rare ones as easy as the others.)"""
    with torch.no_grad():
        positive, negative = listed(SFT).exp().flatten(), listed(INIT).exp().flatten()
        target = LogRatio(SFT, INIT)(BATCH)
    both = positive + negative
    logit = torch.zeros(len(PAIRS), dtype=torch.float64, requires_grad=True)
    minimise([logit], lambda: discriminator_loss(logit, logit, positive / both, negative / both))
    torch.testing.assert_close(logit.detach(), target, rtol=0, atol=1e-5)
    assert target.abs().max() > 1


def minimise(parameters, loss_fn, steps=300):
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss
    optimizer.step(closure)


# ---- pairs: SPIN, IRFT, DPO ---------------------------------------------------------------------

def self_play(demos, rounds):
    """SPIN from SFT, IRFT for more than one round: the policy, and each round's first loss."""
    policy, first, generator = SFT, [], torch.Generator().manual_seed(0)
    for _ in range(rounds):
        own = generate(policy, [x for x, _ in demos], max_new_tokens=LONGEST, generator=generator)
        items = [((x, y), (x, ys[0])) for (x, y), ys in zip(demos, own)]
        policy, history = fit_pairs(policy, items, 0.1, TrainConfig(lr=3e-4), random.Random(0))
        first.append(history[0]["loss"])
    return policy, first


def test_self_play_comes_closer_to_the_demonstrator():
    """INIT demonstrates. Each round starts at log 2, where the implicit reward against its own
    reference is zero, and goes further towards whoever wrote the demonstrations: SPIN with the
    pair's members exchanged would flee."""
    rng = random.Random(0)
    with torch.no_grad():
        chance = listed(INIT).exp().tolist()
    demos = [(x, y) for i, x in enumerate(PROMPTS)
             for y in rng.choices(RESPONSES, chance[i], k=150)]
    spin, _ = self_play(demos, 1)
    irft, first = self_play(demos, 3)
    assert first == pytest.approx(3 * [math.log(2)], abs=1e-12)
    with torch.no_grad():
        away = [kl(listed(INIT), listed(policy)).mean() for policy in (SFT, spin, irft)]
    assert away[0] > away[1] > away[2]


def test_a_mark_is_a_state_and_no_action():
    """A token that no policy can write counts nothing, and nothing else is left out: a failure
    means that a demonstrator's mark makes DPO's loss nan or infinite."""
    marked = collate([([2], [PAD, 3, EOS]), ([2, PAD], [3, EOS])])
    with torch.no_grad():
        logp, plain = logp_writable(SFT, marked), logp_token(SFT, BATCH)
        assert logp[0].tolist()[1:2] == [0] and logp.isfinite().all()
        assert logp[0, 2:].tolist() == pytest.approx(logp[1, 2:].tolist()) and logp[0, 2] != 0
        assert torch.equal(logp_writable(SFT, BATCH), plain)


def test_dpo_lands_on_its_closed_form():
    """The least exact loss, over all 1,600 pairs of responses to a prompt as pi_ref writes and r
    prefers them, is at pi_ref e^(r/beta) / Z: within 0.01 nats, from 0.1 or more. Otherwise DPO's
    row of the table is of some other reward."""
    beta, policy = 0.5, copy.deepcopy(SFT)
    with torch.no_grad():
        r = 0.5 * REWARDS["last"](BATCH).view(SHAPE)
        logp_ref, target = listed(SFT), tilted(SFT, r, beta)
        prefers = torch.sigmoid(r[:, :, None] - r[:, None, :])
        weights = logp_ref.exp()[:, :, None] * logp_ref.exp()[:, None, :] * prefers
    each = torch.vmap(lambda a, b: dpo_loss(a[None], b[None], beta))

    def loss_fn():
        log_ratio = listed(policy) - logp_ref
        a, b = torch.broadcast_tensors(log_ratio[:, :, None], log_ratio[:, None, :])
        return (weights * each(a.flatten(), b.flatten()).view(weights.shape)).sum()
    assert loss_fn().item() == pytest.approx(math.log(2) * weights.sum().item())
    minimise(list(policy.parameters()), loss_fn, 60)
    with torch.no_grad():
        assert kl(listed(SFT), target).min() > 0.1
        assert kl(listed(policy), target).max() < 0.01


def test_fit_pairs_learns_from_labelled_pairs():
    """Towards the same optimum from 4,000 sampled pairs, through train.fit_pairs: the KL to it at
    least halves. With preferred and other swapped it would go the other way."""
    beta, rng = 1.0, random.Random(0)
    with torch.no_grad():
        r = REWARDS["last"](BATCH)
        target = tilted(SFT, r, beta)
    value = dict(zip(keys(BATCH), r.tolist()))
    written, items = drawing(8000)(SFT), []
    for a, b in zip(written[0::2], written[1::2]):
        gap = value[tuple(a[0]), tuple(a[1])] - value[tuple(b[0]), tuple(b[1])]
        items.append((a, b) if rng.random() < 1 / (1 + math.exp(-gap)) else (b, a))
    policy, _ = fit_pairs(SFT, items, beta, TrainConfig(lr=3e-3, epochs=2, batch_size=64), rng)
    with torch.no_grad():
        assert (kl(listed(policy), target) < 0.5 * kl(listed(SFT), target)).all()


def test_fit_pairs_minimises_dpo_s_loss_as_published():
    """-log sigmoid(beta log pi(y+)/pi_ref(y+) - beta log pi(y-)/pi_ref(y-)), written out: the same
    weights after some steps. Another beta or reference would have another optimum."""
    beta, config = 0.3, TrainConfig(lr=3e-3, epochs=10, batch_size=20, clip=1e9, micro_tokens=60)
    items = list(zip(PAIRS[:40], PAIRS[39::-1]))

    def loss_fn(model, items):
        logits = 0.0
        for k, sign in ((0, 1), (1, -1)):
            batch = collate([item[k] for item in items])
            with torch.no_grad():
                reference = logp_seq(SFT, batch)
            logits = logits + sign * beta * (logp_seq(model, batch) - reference)
        return -torch.nn.functional.logsigmoid(logits).sum(), len(items)
    expected, rng = copy.deepcopy(SFT), random.Random(0)
    mine, held_out = split(items, rng)
    history = fit(expected, mine, loss_fn, config, rng, held_out)
    policy, records = fit_pairs(SFT, items, beta, config, random.Random(0))
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in history])
    for a, b in zip(policy.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)     # AdamW blows up rounding errors
    assert (policy.wte.weight - SFT.wte.weight).abs().max() > 1e-3


# ---- best-of-N ----------------------------------------------------------------------------------

def best_of_n_law(pi, rewards, n):
    """P(y): F(r)^n - F(r-)^n for all responses of y's reward together, shared as pi shares it."""
    law = np.empty_like(pi)
    for value in np.unique(rewards):
        same, below = rewards == value, pi[rewards < value].sum()
        law[same] = pi[same] / pi[same].sum() * ((below + pi[same].sum()) ** n - below ** n)
    return law


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_weights_follow_the_exact_law(ties):
    """5,000 sets of 16 candidates; each response's mean weight is within 4.5 standard errors of the
    exact law. A bias here would be one in every best-of-N number of the table."""
    with torch.no_grad():
        pi = listed(SFT)[0].exp().numpy()
    rng, rewards = np.random.default_rng(0), REWARDS["last"].values.detach().numpy()[:len(pi)]
    rewards = rewards.round() if ties else rewards
    assert len(np.unique(rewards)) < 8 if ties else len(np.unique(rewards)) == len(pi)
    drawn = rng.choice(len(pi), size=(5000, 16), p=pi / pi.sum())
    for n in (1, 4, 16):
        law = best_of_n_law(pi, rewards, n)
        assert law.sum() == pytest.approx(1)
        weights = np.zeros((len(drawn), len(pi)))
        np.add.at(weights, (np.arange(len(drawn))[:, None], drawn),
                  best_of_n_weights(rewards[drawn], n))
        often = law > 2e-3
        error = weights.std(0, ddof=1) / math.sqrt(len(drawn))
        assert often.sum() > 5
        assert (np.abs(weights.mean(0) - law) < 4.5 * error)[often].all()
        assert weights[:, ~often].sum(1).mean() == pytest.approx(law[~often].sum(), abs=5e-3)


def test_best_of_n_kl_bounds_the_exact_one():
    """KL(best-of-n || pi) never exceeds log n - (n - 1)/n, and equals it where no single response
    has a probability to speak of (each split in 1,000 here). The KL column would be wrong else."""
    with torch.no_grad():
        pi = listed(SFT)[0].exp().numpy()
    rewards = REWARDS["last"].values.detach().numpy()[:len(pi)]
    fine = np.repeat(pi / 1000, 1000)
    for n in (1, 2, 4, 16, 64):
        law = best_of_n_law(pi, rewards, n)
        got = (law * np.log(law / pi, where=law > 0, out=np.zeros_like(law))).sum()
        assert -1e-12 < got <= best_of_n_kl(n) + 1e-12
        upper = np.cumsum(fine)
        law = upper ** n - (upper - fine) ** n
        smooth = (law * np.log(law / fine, where=law > 0, out=np.zeros_like(law))).sum()
        assert smooth == pytest.approx(best_of_n_kl(n), abs=0.01)
        assert n == 1 or smooth > got


# ---- adversarial imitation ----------------------------------------------------------------------

A, B = ([2], [3, EOS]), ([2], [4, 4, EOS])


def table_adversary(demos, lr):
    return Adversary(constant_table(0.0), demos, REVERSE_KL, random.Random(0), lr)


@pytest.mark.parametrize("own, expected", [([A] * 4, 0.0), ([A, A, B, B], math.log(2))])
def test_the_adversary_s_optimum_is_the_log_ratio(own, expected):
    """Demonstrations are always A; the policy writes it always, or half of the time: h* = log beta
    - log pi. With the labels swapped its sign would be the other one."""
    adversary = table_adversary([A], lr=0.3)
    for _ in range(300):
        adversary.update(list(own), None)
        for group in adversary.optimizer.param_groups:
            group["lr"] *= 0.98
    h = adversary.discriminator(collate([A, B])).tolist()
    assert h[0] == pytest.approx(expected, abs=0.15)
    assert B not in own or h[1] < -2


@pytest.mark.parametrize("head", ["sum", "last"])
def test_the_adversary_learns_to_tell(head):
    """Demonstrations hold letter 4, the policy's samples never: the loss falls from 2 log 2, and a
    demonstration's reward is the higher one. With the labels swapped it would be the lower."""
    rng = random.Random(0)
    demos = [pair for pair in PAIRS if 4 in pair[1]]
    own = [pair for pair in PAIRS if 4 not in pair[1]]
    adversary = Adversary(RewardModel(INIT, head).double(), demos, REVERSE_KL, rng)

    def loss():
        with torch.no_grad():
            return discriminator_loss(adversary(collate(demos)), adversary(collate(own))).item()
    assert loss() == pytest.approx(2 * math.log(2))
    for _ in range(60):
        adversary.update(rng.choices(own, k=16), None)
    assert loss() < 0.7
    assert score(adversary, demos).mean() > 0 > score(adversary, own).mean()


def test_which_negatives_the_adversary_sees():
    """As many as demonstrations: half of them the policy's own, every second one so that each
    prompt is among them, and half of all there ever were. Only old ones, or a growing number, would
    be a discriminator of the past."""
    adversary, seen = table_adversary([A], lr=0.3), []
    adversary.discriminator.register_forward_pre_hook(lambda _, args: seen.append(keys(args[0])))
    a, b = keys(collate([A, B]))
    adversary.update([A, B] * 4, None)
    assert len(seen[0]) == 16 and seen[0][:8] == [a] * 8 and seen[0][8:12] == [a] * 4
    assert set(seen[0][12:]) <= {a, b}
    adversary, seen[:] = table_adversary([A], lr=0.3), []
    adversary.discriminator.register_forward_pre_hook(lambda _, args: seen.append(keys(args[0])))
    for _ in range(3):
        adversary.update([B] * 8, None)
    for _ in range(50):
        adversary.update([A] * 8, None)
    assert all(len(batch) == 16 and batch[:8] == [a] * 8 for batch in seen)
    later = [batch[8:] for batch in seen[3:]]
    assert all(batch[:4] == [a] * 4 for batch in later)
    old, expected = sum(batch.count(b) for batch in later), sum(12 / (4 + i) for i in range(50))
    assert abs(old - expected) <= 4 * math.sqrt(expected)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "pearson_chi2"])
def test_the_adversary_s_reward_is_clipped(name):
    """r(h) of the divergence, given at the end, and no further from zero than the clip: e^h of one
    sample would otherwise be the whole gradient."""
    h = torch.linspace(-60, 60, len(PAIRS), dtype=torch.float64)
    adversary = Adversary(Table(h), PAIRS, DIVERGENCES[name], random.Random(0))
    with torch.no_grad():
        rewards, tokens = adversary(BATCH), adversary.token_rewards(BATCH)
    exact = DIVERGENCES[name].reward(h)
    torch.testing.assert_close(rewards, exact.clamp(-REWARD_CLIP, REWARD_CLIP))
    assert rewards.max() == REWARD_CLIP and (exact.abs() < REWARD_CLIP).sum() > 5
    assert torch.equal(tokens[:, -1], rewards) and (tokens != 0).sum(1).max() == 1


def test_adversarial_imitation_comes_closer_to_the_demonstrator():
    """INIT demonstrates, the policy starts at SFT, the discriminator learns any h: the reverse KL
    that is minimised at least halves. With a reward of the wrong sign it would rise. (At lr 3e-3
    the discriminator lags behind the policy, and they run away together: the KL rises.)"""
    adversary = table_adversary(drawing(1000, seed=1)(INIT), lr=0.05)
    policy, _ = optimise_policy(SFT, adversary, drawing(64),
                                PolicyConfig(lr=3e-4, steps=80, samples=64), 0.0)
    with torch.no_grad():
        assert (kl(listed(policy), listed(INIT)) < kl(listed(SFT), listed(INIT)) / 2).all()


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon"])
def test_with_the_exact_discriminator_the_policy_lands_on_the_demonstrator(name):
    """INIT demonstrates and h = log d_beta - log pi is exact: within 0.01 nats of it, from 0.3. A
    discriminator of another policy than the one that wrote, or a wrong sign, would end elsewhere.
    """
    adversary = ExactAdversary(lambda batch: logp_seq(INIT, batch), DIVERGENCES[name], SFT)
    policy, _ = optimise_policy(SFT, adversary, drawing(64),
                                PolicyConfig(lr=1e-2, steps=120, samples=64), 0.0)
    with torch.no_grad():
        assert kl(listed(policy), listed(INIT)).max() < 0.01
        h = adversary.discriminator(BATCH).view(SHAPE)
    torch.testing.assert_close(h, (listed(INIT) - listed(policy)).detach())
