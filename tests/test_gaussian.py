"""The Gaussian world and the minimiser behind every exact solution."""

import json
import math

import pytest
import torch

from divergences import DIVERGENCES, FORWARD_KL, REVERSE_KL
from toy_envs import gaussian
from toy_envs.gaussian import (
    Settings, demonstrator, distinct_optima, fit_all, follow_reward, main, minimise,
    mixture_moments, normal_log_prob, rounded_total_variation, solve)
from utils.cli import InputError


@pytest.fixture(scope="module")
def world():
    config = Settings(starts=6, points=1500)
    x, log_beta = demonstrator(config)
    return config, x, log_beta, fit_all(config, x, log_beta)


def test_minimise_finds_known_minima_row_by_row():
    """A failure means that no exact solution of the project can be trusted. Each row is a
    quadratic of its own conditioning plus a quartic, with its minimum known."""
    centre = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    stiff = torch.tensor([[1.0, 10.0, 1e4], [1.0, 1e-2, 1.0]], dtype=torch.float64)
    names = torch.tensor([0, 1])

    def objective(x):                  # rows tell themselves apart by a last, unused coordinate
        row = x[:, 3].round().long()
        gap = x[:, :3] - centre[row]
        return (stiff[row] * gap.square()).sum(1) + gap.pow(4).sum(1) + row

    start = torch.cat([torch.full((2, 3), 5.0, dtype=torch.float64), names[:, None]], dim=1)
    x, gradient_norm = minimise(objective, start, tolerance=1e-9)
    torch.testing.assert_close(x[:, :3], centre, rtol=0, atol=1e-5)
    torch.testing.assert_close(objective(x), names.double(), rtol=0, atol=1e-9)
    assert (gradient_norm < 1e-7).all()
    at = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(objective(at).sum(), at)[0].norm(dim=1),
                               gradient_norm)


def test_minimise_stays_put_where_nothing_is_lower():
    """A failure means an endless loop, or a nan, at a kink that no step improves on."""
    x, gradient_norm = minimise(lambda x: x.abs().sum(1), torch.zeros(1, 2, dtype=torch.float64))
    assert (x == 0).all() and gradient_norm.item() == 0


def test_quadrature_is_the_integral(world):
    """A failure means that the grid is too coarse or too short: every number here is then off."""
    config, x, log_beta, _ = world
    mean = (log_beta.exp() * x).sum().item()
    std = (log_beta.exp() * (x - mean).square()).sum().sqrt().item()
    assert (mean, std) == pytest.approx(mixture_moments(config), abs=1e-6)
    log_normal = normal_log_prob(x, torch.tensor([0.3]).double(), torch.tensor([1.1]).double())[0]
    torch.testing.assert_close(log_normal - (x[1] - x[0]).log(),
                               torch.distributions.Normal(0.3, 1.1).log_prob(x), atol=1e-6, rtol=0)


def test_mixture_moments_by_hand():
    """A failure means that forward KL is checked against wrong moments."""
    assert mixture_moments(Settings(left=0.0, right=4.0, width=1.0, weight=0.25)) == (
        1.0, pytest.approx(2.0))


def test_forward_kl_matches_the_moments(world):
    """A failure means that covering does not cover: forward KL's Normal has beta's moments."""
    config, _, _, fits = world
    best, = fits["forward_kl"]                       # convex: one optimum, from every start
    assert (best["mean"], best["std"]) == pytest.approx(mixture_moments(config), abs=1e-3)
    assert best["starts"] == config.starts


def test_reverse_kl_sits_on_one_mode(world):
    """A failure means that seeking does not seek: the best optimum is on the likelier mode."""
    config, _, _, fits = world
    best = fits["reverse_kl"][0]
    assert best["mean"] == pytest.approx(config.right, rel=0.05)
    assert best["std"] == pytest.approx(config.width, rel=0.05)
    assert best["value"] == pytest.approx(-math.log(config.weight), abs=0.02)


def test_every_fit_is_stationary_and_its_value_is_least(world):
    """A failure means that a row of the table is not a solution."""
    config, x, log_beta, fits = world
    assert list(fits) == list(DIVERGENCES)
    for optima in fits.values():
        assert all(optimum["gradient_norm"] < 1e-6 for optimum in optima)
        assert sum(optimum["starts"] for optimum in optima) == config.starts
        assert optima == sorted(optima, key=lambda o: o["value"])


def test_smoothing_of_total_variation_is_within_its_bound(world):
    """A failure means that the smoothed total variation finds another optimum than the true one:
    a fine search around it must not find anything lower by more than delta / 2."""
    _, x, log_beta, fits = world
    best = fits["total_variation"][0]
    mean = best["mean"] + torch.linspace(-0.2, 0.2, 21, dtype=torch.float64)
    std = best["std"] * torch.linspace(0.9, 1.1, 21, dtype=torch.float64)
    grid = torch.cartesian_prod(mean, std)
    pi = normal_log_prob(x, grid[:, 0], grid[:, 1]).exp()
    assert ((pi - log_beta.exp()).abs().sum(1) / 2).min() > best["value"] - 0.015


def test_rounding_total_variation_adds_at_most_half_a_delta():
    """A failure means that the optimum found is not that of total variation."""
    p = torch.rand(2, 50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_beta, log_pi = (p / p.sum(-1, keepdim=True)).log()
    exact = (log_beta.exp() - log_pi.exp()).abs().sum(-1) / 2
    for delta in (0.1, 0.01):
        more = rounded_total_variation(log_beta, log_pi, delta) - exact
        assert (0 < more).all() and (more < delta / 2).all()


def test_solve_returns_the_unsmoothed_divergence():
    """A failure means that log(1 + D) or a smoothed value is printed as D."""
    log_beta = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    start = torch.zeros(1, 2, dtype=torch.float64)

    def log_policy(z):                               # outcome 3 always has probability 1/3
        two = (2 / 3 * z.softmax(-1)).log()
        return torch.cat([two, torch.full_like(two[:, :1], -math.log(3))], dim=1)
    for name, expected in (("forward_kl", 0.5 * math.log(1.5) + 0.5 * math.log(0.75)),
                           ("total_variation", 1 / 6)):
        _, value, _ = solve(DIVERGENCES[name], log_beta, log_policy, start, (0.1, 0.01, 0.001))
        assert value.item() == pytest.approx(expected, abs=1e-6)


def test_distinct_optima_counts_each_start_once():
    """A failure means that the table reports more optima, or fewer starts, than there are."""
    column = torch.tensor
    found = distinct_optima(column([1.0, -1.0, 1.001]), column([0.5, 0.5, 0.5]),
                            column([0.2, 0.9, 0.1]), column([0.0, 0.0, 0.0]))
    assert [(round(o["mean"], 2), o["starts"]) for o in found] == [(1.0, 2), (-1.0, 1)]
    assert found[0]["value"] == pytest.approx(0.1)


def test_fairl_moves_away_and_e_to_the_h_comes_closer(world):
    """A failure means that the caution of divergences.py is not what the picture shows."""
    _, x, log_beta, _ = world
    start = torch.tensor([-1.0, 0.3], dtype=torch.float64)
    right = follow_reward(FORWARD_KL.reward, x, log_beta, start, steps=100)
    wrong = follow_reward(gaussian.fairl_reward, x, log_beta, start, steps=100)
    assert right == sorted(right, reverse=True) and right[-1] < right[0]
    assert wrong == sorted(wrong) and wrong[-1] > 2 * wrong[0] and len(wrong) < len(right)
    seeking = follow_reward(REVERSE_KL.reward, x, log_beta, start, steps=5)
    assert seeking[0] == right[0] and seeking[-1] != right[5]


@pytest.mark.parametrize("change", [{"weight": 1.0}, {"weight": -0.1}, {"width": 0.0},
                                    {"left": 3.0}, {"starts": 0}, {"points": 5}])
def test_bad_settings_are_refused(change):
    """A failure means a stack trace, or a silent nan, for a typo on the command line."""
    with pytest.raises(InputError):
        main(Settings(**change))


def test_main_writes_its_results_and_figure(tmp_path, capsys):
    """A failure means that `python -m toy_envs.gaussian` is broken, or its table too wide."""
    main(Settings(starts=3, points=800, out=str(tmp_path)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["fits"]) == set(DIVERGENCES) and results["settings"]["starts"] == 3
    assert (tmp_path / "gaussian.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert all(d.label in table for d in DIVERGENCES.values())
    assert max(len(line) for line in table.splitlines()[:-1]) <= 80
