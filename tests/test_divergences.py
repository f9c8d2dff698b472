"""The mathematics of divergences.py against enumeration, closed forms and torch.distributions."""

import math

import pytest
import torch

from divergences import (
    DIVERGENCES, FORWARD_KL, JENSEN_SHANNON, REVERSE_KL, bradley_terry_loss, discriminator_loss,
    dpo_loss, f_divergence, fairl_reward, forward_kl, kl, leave_one_out, policy_gradient_loss,
    policy_surrogate, reverse_kl, sft_loss)

each = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)

# f and f* once more, written in u and t as the textbooks do, not in h = log u
TEXTBOOK = {
    "reverse_kl": (lambda u: -u.log(), lambda t: -1 - (-t).log()),
    "forward_kl": (lambda u: u * u.log(), lambda t: (t - 1).exp()),
    "jensen_shannon": (lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
                       lambda t: -(2 - t.exp()).log()),
    "total_variation": (lambda u: (u - 1).abs() / 2, lambda t: t),
    "pearson_chi2": (lambda u: (u - 1) ** 2, lambda t: t + t ** 2 / 4),
    "neyman_chi2": (lambda u: (1 - u) ** 2 / u, lambda t: 2 - 2 * (1 - t).sqrt()),
    "squared_hellinger": (lambda u: (u.sqrt() - 1) ** 2, lambda t: t / (1 - t)),
}
# r(h), up to the constant that follows it: f*(f'(u)) = r + constant
REWARDS = {
    "reverse_kl": (lambda h: h, -1.0),
    "forward_kl": (lambda h: h.exp(), 0.0),
    "jensen_shannon": (lambda h: torch.log(1 + h.exp()), -math.log(2)),
    "total_variation": (lambda h: torch.sign(h) / 2, 0.0),
    "pearson_chi2": (lambda h: (2 * h).exp() - 1, 0.0),
    "neyman_chi2": (lambda h: 2 - 2 * (-h).exp(), 0.0),
    "squared_hellinger": (lambda h: (h / 2).exp() - 1, 0.0),
}


def random_pair(batch=(), outcomes=7, seed=0, scale=1.0):
    """log beta (..., N) and the policy's logits (..., N), which require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    beta, logits = scale * torch.randn(2, *batch, outcomes, generator=generator,
                                       dtype=torch.float64)
    return beta.log_softmax(-1), logits.requires_grad_()


def gradient(value, x):
    return torch.autograd.grad(value.sum(), x, retain_graph=True)[0]


# ---- the table ----------------------------------------------------------------------------------

@each
def test_table_is_the_textbooks(divergence):
    """A failure means that a row of the table is another divergence than its name says."""
    h = torch.tensor([-3.0, -1.0, -0.2, 0.0, 0.3, 1.0, 2.5], dtype=torch.float64)
    f, conjugate = TEXTBOOK[divergence.name]
    torch.testing.assert_close(divergence.f(h), f(h.exp()), rtol=1e-12, atol=1e-14)
    t = divergence.f_prime(h)
    torch.testing.assert_close(divergence.conjugate(t), conjugate(t), rtol=1e-9, atol=1e-12)


@each
def test_f_prime_is_the_derivative(divergence):
    """A failure means that the witness T* is not the one that makes the bound tight."""
    u = torch.tensor([0.05, 0.5, 0.9, 1.2, 4.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(divergence.f_prime(u.detach().log()),
                               gradient(TEXTBOOK[divergence.name][0](u), u))


@each
def test_reward_is_the_conjugate_at_the_witness(divergence):
    """A failure means that the policy is paid for something else than lowering its divergence."""
    h = torch.linspace(-4, 4, 41, dtype=torch.float64)
    reward, constant = REWARDS[divergence.name]
    torch.testing.assert_close(divergence.reward(h), reward(h))
    u = h.exp()
    torch.testing.assert_close(divergence.reward(h) + constant,
                               u * divergence.f_prime(h) - divergence.f(h))
    torch.testing.assert_close(divergence.reward(h) + constant,
                               divergence.conjugate(divergence.f_prime(h)))


@each
def test_conjugate_is_the_supremum(divergence):
    """A failure means a bound that is no bound: f* too small, or finite where it is infinite."""
    u = torch.linspace(-12, 9, 40001, dtype=torch.float64).exp()
    f = TEXTBOOK[divergence.name][0](u)
    t = torch.tensor([-5.0, -2.5, -1.0, -0.4, -0.1, 0.2, 0.45], dtype=torch.float64)
    claimed = divergence.conjugate(t)
    brute = (t[:, None] * u - f).amax(-1)
    finite = claimed < torch.inf
    torch.testing.assert_close(claimed[finite], brute[finite], rtol=1e-3, atol=1e-3)
    assert (brute[~finite] > 5).all()


@pytest.mark.parametrize("name, at, value", [
    ("reverse_kl", 0.0, math.inf), ("reverse_kl", 2.0, math.inf),
    ("jensen_shannon", 0.8, math.inf), ("jensen_shannon", math.log(2) - 1e-3, 6.2146),
    ("total_variation", 0.51, math.inf), ("total_variation", 0.5, 0.5),
    ("total_variation", -3.0, -0.5), ("pearson_chi2", -2.0, -1.0), ("pearson_chi2", -7.0, -1.0),
    ("pearson_chi2", 4.0, 8.0), ("neyman_chi2", 1.0, 2.0), ("neyman_chi2", 1.1, math.inf),
    ("squared_hellinger", 1.0, math.inf), ("squared_hellinger", 0.9, 9.0)])
def test_conjugate_at_the_edge_of_its_domain(name, at, value):
    """A failure means that a witness out of range is rewarded instead of ruled out."""
    t = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    got = DIVERGENCES[name].conjugate(t)
    assert got.item() == pytest.approx(value, rel=1e-3)
    assert not gradient(got, t).isnan()


@each
def test_dual_exchanges_the_arguments(divergence):
    """A failure means that the price of what the policy misses is wrong."""
    log_beta, logits = random_pair()
    log_pi = logits.detach().log_softmax(-1)
    torch.testing.assert_close(f_divergence(divergence, log_beta, log_pi),
                               f_divergence(DIVERGENCES[divergence.dual], log_pi, log_beta))
    u = torch.tensor(1e-13, dtype=torch.float64)     # f(0) as the limit of f
    limit = divergence.f(u.log()).item()
    assert (limit > 20) if divergence.f_at_zero == math.inf else (
        limit == pytest.approx(divergence.f_at_zero, abs=1e-5))


def test_names_are_keys_and_rows_are_frozen():
    """A failure means that a name stands for another row, or that a row can be written over."""
    assert list(DIVERGENCES) == [d.name for d in DIVERGENCES.values()] == list(TEXTBOOK)
    with pytest.raises(AttributeError):
        REVERSE_KL.name = "other"


# ---- large values -------------------------------------------------------------------------------

@each
@pytest.mark.parametrize("part", ["f", "f_prime", "reward"])
def test_float32_up_to_fifty(divergence, part):
    """A failure means inf, nan, or wrong digits in float32 long before the policy is far away."""
    h = torch.linspace(-50, 50, 401).requires_grad_()
    function = getattr(divergence, part)
    value, exact = function(h), function(h.detach().double())
    assert value.isfinite().all() and gradient(value, h).isfinite().all()
    sure = exact.abs() < 1e34                       # beyond, the ceiling of e^x: say so and check
    torch.testing.assert_close(value.detach()[sure], exact[sure].float(), rtol=3e-5, atol=1e-6)
    assert (value.detach()[~sure].abs() > 1e34).all()
    assert (value.detach()[~sure].sign() == exact[~sure].sign()).all()


@each
def test_no_log_ratio_up_to_two_thousand_gives_inf_or_nan(divergence):
    """A failure means that one absurd logit poisons a whole batch."""
    for dtype in (torch.float32, torch.float64):
        h = torch.tensor([-2000, -711, -89, -81, -41, 41, 81, 89, 711, 2000], dtype=dtype)
        for function in (divergence.f, divergence.f_prime, divergence.reward, fairl_reward):
            assert function(h).isfinite().all()


# Near u = 1, h = log u: f, f', r and f* by their series; the first term left out is smaller than the
# first by h^2. What is not 0 at u = 1 has no digits to lose there and is left out.
SERIES = {
    "reverse_kl": {"f": lambda h: -h, "reward": lambda h: h},
    "forward_kl": {"f": lambda h: h + h ** 2},
    "jensen_shannon": {"f": lambda h: h ** 2 / 4 * (1 + h / 2), "conjugate": lambda t: t + t ** 2,
                       "f_prime": lambda h: h / 2 - h ** 2 / 8},
    "total_variation": {"f": lambda h: (h + h ** 2 / 2).abs() / 2},
    "pearson_chi2": {"f": lambda h: h ** 2 * (1 + h), "f_prime": lambda h: 2 * h + h ** 2,
                     "reward": lambda h: 2 * h + 2 * h ** 2, "conjugate": lambda t: t + t ** 2 / 4},
    "neyman_chi2": {"f": lambda h: h ** 2, "f_prime": lambda h: 2 * h - 2 * h ** 2,
                    "reward": lambda h: 2 * h - h ** 2, "conjugate": lambda t: t + t ** 2 / 4},
    "squared_hellinger": {"f": lambda h: h ** 2 / 4 * (1 + h / 2),
                          "f_prime": lambda h: h / 2 - h ** 2 / 8,
                          "reward": lambda h: h / 2 + h ** 2 / 8,
                          "conjugate": lambda t: t + t ** 2},
}


@each
def test_digits_near_one_are_kept(divergence):
    """In float32, down to |u - 1| = 1e-9. A failure means that a formula is computed as it is
    written: its terms cancel, f is 0 or negative and f' is 0 where pi is close to beta."""
    h = torch.tensor([1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
    h = torch.cat([-h, h])
    for part, series in SERIES[divergence.name].items():
        got = getattr(divergence, part)(h).double()
        torch.testing.assert_close(got, series(h.double()), rtol=3e-6, atol=0, msg=part)


@each
@pytest.mark.parametrize("part", ["f", "f_prime", "reward", "conjugate"])
def test_float32_is_float64_around_one(divergence, part):
    """From |h| = 1e-8 to 8, relative to the value: the series above joins what lies farther out. A
    failure means that digits are lost somewhere between."""
    h = torch.logspace(-8, 0.9, 90)
    h = torch.cat([-h, h])
    function = getattr(divergence, part)
    value, exact = function(h).double(), function(h.double())
    if part == "conjugate":     # it is infinite from some t on, and passes through 0 once more
        known = exact.isfinite() & (exact.abs() > 1e-9)
        value, exact = value[known], exact[known]
        assert len(exact) >= 90
    torch.testing.assert_close(value, exact, rtol=1e-5, atol=0)


def test_a_mean_over_samples_misses_what_pi_never_writes():
    """The docstring's example. A failure means that it is wrong, or that f_divergence forgets the
    price of what the policy misses."""
    beta, pi = (torch.tensor(p, dtype=torch.float64).log() for p in ((.5, 0, .5), (.5, .5, 0)))
    written = pi > -torch.inf
    h = (beta - pi)[written]
    hellinger = DIVERGENCES["squared_hellinger"]
    assert (pi[written].exp() * h.exp()).sum().item() == pytest.approx(0.5)           # E_pi[u]
    assert (pi[written].exp() * hellinger.f(h)).sum().item() == pytest.approx(0.5)    # E_pi[f(u)]
    assert f_divergence(hellinger, beta, pi).item() == pytest.approx(1)


def test_log_ratio_of_a_sample_that_beta_never_writes():
    """A failure means that one foreign sample turns an estimate with a finite price into a nan."""
    h = torch.tensor([-torch.inf])
    for name, price in (("forward_kl", 0), ("jensen_shannon", math.log(2)), ("pearson_chi2", 1),
                        ("squared_hellinger", 1), ("total_variation", 0.5)):
        assert DIVERGENCES[name].f(h).item() == pytest.approx(price)


# ---- both KLs -----------------------------------------------------------------------------------

def test_kls_against_torch_distributions():
    """A failure means a KL with its arguments exchanged: mass-covering sold as mode-seeking."""
    log_beta, logits = random_pair(batch=(3, 2))
    log_pi = logits.log_softmax(-1)
    beta, pi = (torch.distributions.Categorical(logits=x) for x in (log_beta, log_pi))
    divergence = torch.distributions.kl_divergence
    for ours, theirs in ((forward_kl(log_beta, log_pi), divergence(beta, pi)),
                         (reverse_kl(log_beta, log_pi), divergence(pi, beta)),
                         (kl(log_pi, log_beta), divergence(pi, beta)),
                         (f_divergence(FORWARD_KL, log_beta, log_pi), divergence(beta, pi)),
                         (f_divergence(REVERSE_KL, log_beta, log_pi), divergence(pi, beta))):
        assert ours.shape == (3, 2)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits))


@pytest.fixture
def p_and_q():
    """q covers p, p does not cover q: KL(p||q) is finite, KL(q||p) is not."""
    p = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log()
    q = torch.tensor([0.25, 0.25, 0.5, 0.0], dtype=torch.float64).log()
    return p, q


def test_kl_with_zero_probabilities(p_and_q):
    """A failure means nan for what nobody writes, or a finite price for the impossible."""
    p, q = p_and_q
    assert kl(p, q).item() == pytest.approx(math.log(2))
    assert kl(q, p).item() == math.inf
    assert kl(p, p).item() == 0


@pytest.mark.parametrize("name, p_to_q, q_to_p", [
    ("forward_kl", math.log(2), math.inf), ("reverse_kl", math.inf, math.log(2)),
    ("jensen_shannon", 2 * math.log(2) - 1.5 * math.log(3) + math.log(2), None),
    ("total_variation", 0.5, 0.5), ("pearson_chi2", 1.0, math.inf),
    ("neyman_chi2", math.inf, 1.0), ("squared_hellinger", 2 - math.sqrt(2), 2 - math.sqrt(2))])
def test_f_divergences_with_zero_probabilities(p_and_q, name, p_to_q, q_to_p):
    """A failure means a wrong price where only one of the two has mass. Values worked by hand."""
    p, q = p_and_q
    assert f_divergence(DIVERGENCES[name], p, q).item() == pytest.approx(p_to_q)
    assert f_divergence(DIVERGENCES[name], q, p).item() == pytest.approx(
        p_to_q if q_to_p is None else q_to_p)


@each
def test_gradients_survive_zero_probabilities(divergence):
    """A failure means that masking one token with -inf fills the whole gradient with nan."""
    logits = torch.tensor([0.3, -0.5, 0.1, -torch.inf], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor([0.2, 0.5, 0.3, 0.0], dtype=torch.float64).log()
    value = f_divergence(divergence, beta, logits.log_softmax(-1))
    short = logits.detach()[:3].requires_grad_()
    expected = f_divergence(divergence, beta[:3], short.log_softmax(-1))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient(value, logits)[:3], gradient(expected, short))
    for ours in (forward_kl, reverse_kl):
        assert gradient(ours(beta, logits.log_softmax(-1)), logits).isfinite().all()


def test_underflow_keeps_the_price_of_what_is_missed():
    """A failure means that a policy can hide what it misses by making it rarer than a float."""
    beta = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    pi = torch.tensor([0.0, -2000.0], dtype=torch.float64)
    assert forward_kl(beta, pi).item() == pytest.approx(0.3 * math.log(0.3) + 0.7 * (
        math.log(0.7) + 2000))
    assert f_divergence(FORWARD_KL, beta, pi).item() == pytest.approx(forward_kl(beta, pi).item())
    assert f_divergence(DIVERGENCES["total_variation"], beta, pi).item() == pytest.approx(0.7)
    assert f_divergence(DIVERGENCES["squared_hellinger"], beta, pi).item() == pytest.approx(
        2 - 2 * math.sqrt(0.3))


@each
def test_underflow_leaves_no_nan_in_the_gradient(divergence):
    """A failure means that one sequence the policy has long given up ends the training run."""
    for far in (-200.0, -1e5):
        beta = torch.tensor([math.log(0.3), math.log(0.7), -torch.inf, far])
        pi = torch.tensor([0.0, far, far, -1.0], requires_grad=True)
        value = f_divergence(divergence, beta, pi)
        assert not value.isnan() and not gradient(value, pi).isnan().any()


@each
def test_float32_agrees_with_float64(divergence):
    """A failure means that a run in float32 tracks another number than the one it reports."""
    log_beta, logits = random_pair(batch=(20,), scale=2.0)
    log_pi = logits.detach().log_softmax(-1)
    single = f_divergence(divergence, log_beta.float(), log_pi.float())
    torch.testing.assert_close(single.double(), f_divergence(divergence, log_beta, log_pi),
                               rtol=1e-4, atol=1e-5)


# ---- policy gradients ---------------------------------------------------------------------------

@each
def test_policy_gradient_of_the_reward_is_minus_the_gradient(divergence):
    """The heart: a failure means that following r(h) does not lower the divergence it is for."""
    for seed in range(5):
        log_beta, logits = random_pair(batch=(4,), outcomes=9, seed=seed)
        exact = gradient(f_divergence(divergence, log_beta, logits.log_softmax(-1)), logits)
        log_pi = logits.log_softmax(-1)
        # h and the weights carry gradients on purpose: the surrogate has to hold both constant
        surrogate = policy_surrogate(divergence, log_beta - log_pi, log_pi, weights=log_pi.exp(),
                                     baseline=torch.tensor(0.7))
        assert (gradient(surrogate, logits) + exact).abs().max() < 1e-8 * exact.abs().max().clamp(1)


def test_sft_is_the_policy_gradient_of_e_to_the_h():
    """A failure means that SFT and forward KL are not the same thing here: then nothing is."""
    log_beta, logits = random_pair(outcomes=9)
    log_pi = logits.log_softmax(-1)
    sft = gradient(-(log_beta.exp() * log_pi).sum(), logits)             # negative log-likelihood
    log_pi = logits.log_softmax(-1)
    torch.testing.assert_close(sft, gradient(forward_kl(log_beta, log_pi), logits),
                               rtol=0, atol=1e-12)
    log_pi = logits.log_softmax(-1)
    torch.testing.assert_close(-sft, gradient(policy_surrogate(
        FORWARD_KL, log_beta - log_pi, log_pi, weights=log_pi.exp()), logits), rtol=0, atol=1e-12)


def test_surrogate_over_samples_is_the_mean_of_reward_times_score():
    """A failure means that batch size or baseline changes what is optimised."""
    h = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    assert policy_surrogate(REVERSE_KL, h, logp).item() == pytest.approx((-0.5 + 2 - 6) / 3)
    value = policy_surrogate(REVERSE_KL, h, logp, baseline=0.25)
    assert value.item() == pytest.approx((-0.25 + 2.5 - 5.25) / 3)
    torch.testing.assert_close(gradient(value, logp), (h.detach() - 0.25) / 3)
    assert not torch.autograd.grad(policy_surrogate(REVERSE_KL, h, logp), h,
                                   allow_unused=True)[0]


@pytest.mark.parametrize("divergence", [REVERSE_KL, FORWARD_KL], ids=lambda d: d.name)
def test_a_reward_that_is_not_detached_moves_the_optimum(divergence):
    """The docstring's claim, where it says the optimum goes; at beta itself the gradient is not
    zero then. A failure means that the page teaches something false."""
    log_beta, _ = random_pair()

    def slope(log_pi):
        logits = log_pi.clone().requires_grad_()
        log_pi = logits.log_softmax(-1)
        reward = divergence.reward(log_beta - log_pi)           # not detached
        return gradient((log_pi.exp().detach() * reward * log_pi).sum(), logits)
    if divergence is REVERSE_KL:
        optimum = (log_beta / 2).log_softmax(-1)
    else:       # pi = beta (1 - log pi) / Z, by iterating it
        optimum = log_beta
        for _ in range(200):
            optimum = (log_beta + (1 - optimum).log()).log_softmax(-1)
    torch.testing.assert_close(slope(optimum), torch.zeros_like(log_beta), rtol=0, atol=1e-10)
    assert slope(log_beta).abs().max() > 1e-2 and (optimum - log_beta).abs().max() > 0.1


def test_fairl_reward_moves_away():
    """The caution: near pi = beta, FAIRL's reward is against the gradient, e^h is along it."""
    log_beta, logits = random_pair(seed=3)
    logits = (log_beta + 0.05 * logits.detach()).requires_grad_()
    log_pi = logits.log_softmax(-1)
    h = (log_beta - log_pi).detach()
    descent = -gradient(forward_kl(log_beta, log_pi), logits)
    fairl = gradient((log_pi.exp().detach() * fairl_reward(h) * logits.log_softmax(-1)).sum(),
                     logits)
    assert torch.cosine_similarity(fairl, descent, dim=0) < -0.95
    torch.testing.assert_close(fairl_reward(h), -FORWARD_KL.f(h))


# ---- the bound and the discriminator ------------------------------------------------------------

@each
def test_bound_is_below_and_tight(divergence):
    """E_beta[T] - E_pi[f*(T)] is at most D_f for every witness T, and equals it at f'(u). A failure
    means that a trained witness can claim more divergence than there is."""
    log_beta, logits = random_pair()
    log_pi = logits.detach().log_softmax(-1)
    exact = f_divergence(divergence, log_beta, log_pi)

    def bound(t):
        return (log_beta.exp() * t - log_pi.exp() * divergence.conjugate(t)).sum(-1)
    best = divergence.f_prime(log_beta - log_pi)
    torch.testing.assert_close(bound(best), exact)
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 0.1, 1.0, 5.0):
        t = best + scale * torch.randn(200, 7, generator=generator, dtype=torch.float64)
        assert (bound(t) <= exact + 1e-12).all()


def test_discriminator_loss_is_least_at_the_log_ratio():
    """A failure means that the logit has the wrong sign: the policy would flee the demonstrator."""
    log_beta, logits = random_pair()
    log_pi = logits.detach().log_softmax(-1)
    beta, pi = log_beta.exp(), log_pi.exp()
    h = (log_beta - log_pi).requires_grad_()
    least = discriminator_loss(h, h, weights_demo=beta, weights_policy=pi)
    assert gradient(least, h).abs().max() < 1e-12
    exact = 2 * math.log(2) - f_divergence(JENSEN_SHANNON, log_beta, log_pi).item()
    assert least.item() == pytest.approx(exact)
    for shift in (-0.1, 0.1):
        assert discriminator_loss(h + shift, h + shift, beta, pi) > least
    # demonstrations are label 1: a high logit on them, a low one on samples, is a low loss
    assert discriminator_loss(torch.tensor([3.0, 4.0]), torch.tensor([-3.0])).item() == (
        pytest.approx((math.log1p(math.exp(-3)) + math.log1p(math.exp(-4))) / 2
                      + math.log1p(math.exp(-3))))


# ---- losses of pairs and of policies, against numbers worked by hand ----------------------------

def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_sft_loss_is_the_mean_negative_log_likelihood():
    """A failure means that SFT unlearns its demonstrations, or that a long batch takes a larger
    step than a short one."""
    logp = torch.tensor([-1.0, -2.0, -6.0], requires_grad=True)
    assert sft_loss(logp).item() == pytest.approx(3)
    torch.testing.assert_close(gradient(sft_loss(logp), logp), torch.full((3,), -1 / 3))


def test_bradley_terry_loss_in_closed_form():
    """A failure means that the labels are read the other way round, that a reward's unknown zero
    matters, or that pairs are added up instead of averaged."""
    better, worse = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    expected = -(log_sigmoid(1.5) + log_sigmoid(-4.0)) / 2
    assert bradley_terry_loss(better, worse).item() == pytest.approx(expected)
    assert bradley_terry_loss(better + 7, worse + 7).item() == pytest.approx(expected)
    assert bradley_terry_loss(better, better).item() == pytest.approx(math.log(2))


def test_dpo_loss_is_as_published():
    """-log sigmoid(dpo_beta (a - b)), with gradient -dpo_beta sigmoid(-dpo_beta (a - b)) / N in a
    and its opposite in b. A failure means that the policy moves away from what is preferred, or
    that dpo_beta is another temperature than the paper's."""
    a = torch.tensor([1.0, -2.0], requires_grad=True)
    b = torch.tensor([-0.5, 1.0], requires_grad=True)
    loss = dpo_loss(a, b, 0.2)
    assert loss.item() == pytest.approx(-(log_sigmoid(0.3) + log_sigmoid(-0.6)) / 2)
    slope = -0.2 * torch.tensor([math.exp(log_sigmoid(-0.3)), math.exp(log_sigmoid(0.6))]) / 2
    torch.testing.assert_close(gradient(loss, a), slope)
    torch.testing.assert_close(gradient(loss, b), -slope)
    assert dpo_loss(a, a, 0.2).item() == pytest.approx(math.log(2))


def test_leave_one_out_subtracts_the_mean_of_the_others():
    """A failure means a baseline with the sample's own return in it (biased), or of another
    prompt's samples (noisy)."""
    returns = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    torch.testing.assert_close(leave_one_out(returns), torch.tensor(
        [[1 - 4.0, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3.0]]))
    by_token = torch.stack([returns, -2 * returns], dim=2)      # (P, K, T): each token by itself
    torch.testing.assert_close(leave_one_out(by_token)[..., 1], -2 * leave_one_out(returns))


def test_policy_gradient_loss_by_hand():
    """Two samples of one prompt, whose first token is the prompt. A failure means a return that
    holds rewards of the past, a KL of the wrong sign, or a loss that pays for padding."""
    logp = torch.tensor([[0.0, -1.0, -2.0], [0.0, -3.0, 0.0]], requires_grad=True)
    logp_ref = torch.tensor([[0.0, -1.5, -2.0], [0.0, -1.0, 0.0]])
    rewards = torch.tensor([[0.0, 1.0, 10.0], [0.0, 4.0, 0.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    loss = policy_gradient_loss(logp, logp_ref, rewards, mask, 0.2, k=2)
    # r - 0.2 (log pi - log ref): 1 - 0.1, 10 and 4 + 0.4; returns from each token on: 10.9, 10
    # and 4.4. With two samples the baseline is the other one's return.
    advantage = torch.tensor([[0.0, 10.9 - 4.4, 10.0 - 0.0], [0.0, 4.4 - 10.9, 0.0]])
    assert loss.item() == pytest.approx(-(6.5 * -1 + 10 * -2 + -6.5 * -3) / 2)
    torch.testing.assert_close(gradient(loss, logp), -advantage / 2)
