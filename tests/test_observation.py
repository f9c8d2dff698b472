"""observation.py: the quadratic logit, Riccati, both policy steps and the returns, each against
densities, autograd or samples; and that with the exact adversary the learner becomes the expert."""

import json
from dataclasses import replace

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from toy_envs import observation as o

N = 3
WORLD = o.make_world(N, 2, torch.Generator().manual_seed(0))
MODEL = torch.cat([WORLD.A, WORLD.B], -1)
START = 0.3 * WORLD.K       # gains on the way to the expert's


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def eta_of(size):
    return torch.tensor([size], dtype=torch.float64)


def densities(K):
    """The exact law of every pair (s_t, s_t+1) under gains K."""
    return MultivariateNormal(torch.zeros(2 * N).double(), o.pair_covariances(WORLD, K))


def exact_precision(K):
    return torch.linalg.inv(o.pair_covariances(WORLD, K))


def expected_logit(K, demo, policy):
    """E[sum_t h_t] (R,) under gains K, where h is held constant: -tr(H_t Sigma_t) / 2 each."""
    H = (demo - policy).detach()
    return -(H * o.pair_covariances(WORLD, K)).sum((1, 2, 3)) / 2


# ---- the world ----------------------------------------------------------------------------------

def test_the_expert_is_optimal():
    """Failing: the expert could do better, and a score of 1 would not be the best there is."""
    K = WORLD.K.clone().requires_grad_()
    o.expected_cost(WORLD, K).sum().backward()
    assert K.grad.abs().max() < 1e-9


def test_riccati_is_the_minimum_and_refuses_where_there_is_none():
    """s_t'C s_t costs of random positive definite C: autograd finds no slope at Riccati's gains, by
    a sum that shares no line with it. Failing: the policy step optimises something else."""
    n, steps = 2, 4
    root = torch.randn(steps, 2 * n, 2 * n, generator=seeded(1)).double()
    C, F = root @ root.mT, torch.randn(n, 2 * n, generator=seeded(2)).double()
    K, V = o.riccati(C, F, torch.eye(n).double())
    K.requires_grad_()
    s = torch.eye(n).double()
    cost = torch.zeros(()).double()
    for t in range(steps):
        z = torch.cat([s, -K[t] @ s])
        cost, s = cost + (z.T @ C[t] @ z).trace(), F @ z
    cost = cost + (s.T @ s).trace()
    cost.backward()
    assert K.grad.abs().max() < 1e-9 and torch.allclose(cost, V.trace())
    assert o.riccati(-C, F, 0 * torch.eye(n).double())[0].isnan().all()


def test_covariances_and_cost_against_samples():
    """40,000 episodes, margins of five standard errors or more. Failing: scores, the adversary's
    truth and the roll-outs are about different systems."""
    z, u = o.roll_out(WORLD, START, 40_000, seeded(1))
    exact = o.pair_covariances(WORLD, START)
    sampled = z.mT @ z / z.shape[-2]
    scale = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((sampled - exact).abs() / (scale[..., None] * scale[..., None, :])).max() < 0.04
    last = z[:, -1, :, N:]
    cost = (z[..., :N] ** 2).sum((1, 3)) + o.EFFORT * (u ** 2).sum((1, 3))
    cost = cost + ((last @ WORLD.P) * last).sum(-1)
    error = cost.std(-1) / 200
    assert ((cost.mean(-1) - o.expected_cost(WORLD, START)).abs() < 5 * error).all()


# ---- the adversary ------------------------------------------------------------------------------

def test_the_optimal_logit_is_a_quadratic_form():
    """Against the difference of torch's exact log-densities, at pairs of states. Failing: the
    reward is not the log-density ratio, or has the wrong sign."""
    z, _ = o.roll_out(WORLD, START, 20, seeded(1))
    points = z.movedim(2, 0)
    exact = densities(WORLD.K).log_prob(points) - densities(START).log_prob(points)
    h = o.logit(exact_precision(WORLD.K), exact_precision(START), z)
    assert torch.allclose(h.movedim(2, 0), exact, atol=1e-9)


def test_the_fitted_logit_has_the_least_logistic_loss():
    """On 20,000 fresh pairs of each side, no logit that is off by a tenth, or of the other sign,
    has a smaller discriminator loss. Failing: the closed form is no discriminator."""
    demos, policy = (o.roll_out(WORLD, K, 20_000, seeded(i))[0]
                     for i, K in enumerate((WORLD.K, START)))
    precisions = o.precision(demos), o.precision(policy)
    fresh = [o.logit(*precisions, o.roll_out(WORLD, K, 20_000, seeded(5 + i))[0])
             for i, K in enumerate((WORLD.K, START))]

    def loss(factor):
        softplus = torch.nn.functional.softplus
        return softplus(-factor * fresh[0]).mean() + softplus(factor * fresh[1]).mean()
    assert loss(1) < min(loss(0.9), loss(1.1), loss(-1), loss(0))


def test_precision_has_no_bias():
    """Mean of 4,000 precisions from 12 samples of 6 numbers each: the truth, within 0.1 of it,
    where a plain inverse would be off by the factor 12 / 5. Failing: the learner, who has fewer episodes
    than the expert, looks narrower than he is, and the reward pushes him outwards."""
    root = torch.randn(6, 6, generator=seeded(1)).double() / 3 + torch.eye(6).double()
    z = torch.randn(4000, 12, 6, generator=seeded(2)).double() @ root.T
    mean = root.T @ o.precision(z).mean(0) @ root
    assert (mean - torch.eye(6)).abs().max() < 0.1


# ---- the policy steps ---------------------------------------------------------------------------

def test_the_reward_s_gradient_is_minus_that_of_the_reverse_kl():
    """h held constant: d E[sum h] = -d sum_t KL(pairs of the policy || pairs of the expert)."""
    K = START.clone().requires_grad_()
    reward = expected_logit(K, exact_precision(WORLD.K), exact_precision(K))
    gradient, = torch.autograd.grad(reward.sum(), K)
    kl, = torch.autograd.grad(kl_divergence(densities(K), densities(WORLD.K.detach())).sum(), K)
    assert torch.allclose(gradient, -kl, atol=1e-8) and gradient.abs().max() > 0.1


def natural(K, demo, policy):
    """The exact natural gradient NOISE^2 grad_t E[s_t s_t']^-1, by autograd: the Fisher matrix of a
    gain is E[s s'] / NOISE^2 for each of its rows."""
    K = K.clone().requires_grad_()
    gradient, = torch.autograd.grad(expected_logit(K, demo, policy).sum(), K)
    states = o.pair_covariances(WORLD, K.detach())[..., :N, :N]
    return o.NOISE ** 2 * gradient @ torch.linalg.inv(states)


def test_a_small_riccati_step_is_the_natural_gradient():
    """Failing: Riccati maximises another reward than the policy gradient follows, and comparing the
    two learners would compare rewards."""
    demo, policy = exact_precision(WORLD.K), exact_precision(START)
    step = o.riccati_step(START, demo, policy, MODEL, eta_of(1e-7))[0] - START
    exact = natural(START, demo, policy)
    assert torch.allclose(step / 1e-7, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


def test_riccati_s_step_is_the_maximum_it_promises():
    """Autograd of E[sum h] - KL / eta, states by the new gains: no slope at the new gains."""
    demo, policy, eta = exact_precision(WORLD.K), exact_precision(START), 0.05
    K = o.riccati_step(START, demo, policy, MODEL, eta_of(eta))[0]
    K.requires_grad_()
    states = o.pair_covariances(WORLD, K)[..., :N, :N]
    kl = ((K - START) @ states @ (K - START).mT).diagonal(dim1=-2, dim2=-1).sum() / (
        2 * o.NOISE ** 2)
    gradient, = torch.autograd.grad(expected_logit(K, demo, policy).sum() - kl / eta, K)
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("one_gain", [False, True])
def test_the_model_free_gradient_is_right_on_average(one_gain):
    """From 60,000 episodes: the exact natural gradient, within a tenth of its norm; one gain for
    all times takes the mean over times, weighed by E[s s']. Failing: the baseline was made to lose."""
    demo, policy = exact_precision(WORLD.K), exact_precision(START)
    z, u = o.roll_out(WORLD, START, 60_000, seeded(3))
    got = o.natural_gradient(START, o.logit(demo, policy, z), z[..., :N], u, one_gain)
    exact = natural(START, demo, policy)
    if one_gain:
        states = o.pair_covariances(WORLD, START)[..., :N, :N]
        exact = (exact @ states).sum(1, keepdim=True) @ torch.linalg.inv(states.sum(1, True))
    assert (got - exact).norm() < 0.1 * exact.norm()


def test_with_the_exact_adversary_and_model_the_learner_becomes_the_expert():
    """And stays. Failing: the reward does not end where the demonstrations come from."""
    K, demo = 0 * WORLD.K, exact_precision(WORLD.K)
    for _ in range(300):
        K = o.riccati_step(K, demo, exact_precision(K), MODEL, eta_of(0.1))[0]
    assert (K - WORLD.K).abs().max() < 1e-4


def test_the_trust_region_bounds_every_round():
    """KL(new || old) from fresh episodes: about at most the bound. Failing: a learner may jump."""
    demos, _ = o.roll_out(WORLD, WORLD.K, 200, seeded(1))
    for learner in list(o.LEARNERS)[:3]:
        gains = o.imitate(learner, WORLD, demos, 400, 0.5, 3, seeded(2))
        assert (gains[1:] - gains[:-1]).abs().amax((1, 2, 3, 4)).min() > 0
        for old, new in zip(gains, gains[1:]):
            z, _ = o.roll_out(WORLD, old, 4000, seeded(3))
            kl = ((z[..., :N] @ (new - old).mT) ** 2).sum((1, 3)).mean(-1) / (2 * o.NOISE ** 2)
            assert kl.max() < 0.6


def test_cloning_and_the_inverse_model_find_the_gain():
    """From 20,000 demonstrations: within 0.02 of the expert's gains, one with actions given, the
    other with actions inferred. Failing: a control is made weaker than it is."""
    demos, u = o.roll_out(WORLD, WORLD.K, 20_000, seeded(1))
    assert (o.clone(demos[..., :N], u) - WORLD.K).abs().max() < 0.02
    gains = o.imitate("inverse model", WORLD, demos, 20_000, float("inf"), 1, seeded(2))
    assert (gains[1] - WORLD.K).abs().max() < 0.02


# ---- the script ---------------------------------------------------------------------------------

def test_everybody_arrives_with_plenty_of_episodes():
    """Failing: a learner is broken, and its number of interactions says nothing about its kind."""
    plenty = {name: ((200, 10.0),) * 4 for name in list(o.LEARNERS)[:3]}
    rows = o.experiment(o.Settings(seeds=2, rounds=15), plenty)
    assert len(rows) == 12 and all(row["arrived"] == 2 and row["last"][0] > 0.97 for row in rows)


@pytest.mark.parametrize("argv", [
    ["--seeds", "1"], ["--demos", "5"], ["--rounds", "0"], ["--out", __file__], ["--nope"]])
def test_bad_settings_are_refused_in_one_line(argv, refused_in_one_line):
    """Failing: a mistyped flag ends in a traceback."""
    refused_in_one_line(o, argv)


def test_the_script_writes_its_files_and_repeats_itself(tmp_path, capsys):
    """Failing: the same seed gives other numbers, or the table does not fit a terminal."""
    results = []
    for name in ("a", "b"):
        o.main(replace(o.Settings(), seeds=2, rounds=2, out=str(tmp_path / name)))
        results.append(json.loads((tmp_path / name / "results.json").read_text())["rows"])
        assert (tmp_path / name / "observation.png").stat().st_size > 10_000
    assert results[0] == results[1] and len(results[0]) == 4 * len(o.LEARNERS)
    table = [line for line in capsys.readouterr().out.splitlines() if "written" not in line]
    assert max(map(len, table)) <= 90
