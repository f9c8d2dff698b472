"""One Normal fitted to a mixture of two under each divergence: the textbook picture, by quadrature.

The demonstrator writes in two ways, the learner can only write in one. What each divergence makes
of that is the whole difference between supervised fine-tuning and adversarial imitation: the
forward KL spreads over both modes and puts most of its mass between them, where no demonstrator
ever was; the reverse KL picks one mode and writes it well.

    python -m toy_envs.gaussian

Shapes: R starts of one fit, P parameters of the policy, N points of the grid.
"""

import math
from dataclasses import dataclass, replace

import torch

from divergences import (DIVERGENCES, FORWARD_KL, TOTAL_VARIATION, f_divergence, fairl_reward,
                         forward_kl, policy_surrogate)
from utils.cli import make_folder, parse_settings, require, run_script, setting
from utils.plots import COLORS, pyplot, write_world


@dataclass
class Settings:
    """Fit one Normal to a two-mode mixture under each of the seven divergences."""
    left: float = setting(-2.0, "mean of the left mode")
    right: float = setting(2.0, "mean of the right mode")
    width: float = setting(0.7, "standard deviation of each mode")
    weight: float = setting(0.6, "probability of the right mode, between 0 and 1")
    starts: int = setting(16, "starting points of each fit")
    points: int = setting(4000, "points of the quadrature grid")
    seed: int = setting(0, "seed of the starting points", 0, 2 ** 32)
    out: str = setting("out/gaussian", "folder for results.json and gaussian.png")


# ---- the world ----------------------------------------------------------------------------------

def normal_log_prob(x, mean, std):
    """log of the Normal's probabilities of the grid's points x (N,), normalised over the grid.

    mean, std: (R,). Returns (R, N). A sum over the grid is then an integral by the trapezoid rule,
    which for smooth functions that vanish at both ends is exact far beyond what is needed here.
    """
    return (-0.5 * ((x - mean[:, None]) / std[:, None]).square()).log_softmax(-1)


def demonstrator(s):
    """The grid x (N,) and the mixture's log-probabilities on it (N,), in float64."""
    reach = 8 * s.width + (s.right - s.left)
    x = torch.linspace(s.left - reach, s.right + reach, s.points, dtype=torch.float64)
    means = torch.tensor([s.left, s.right], dtype=torch.float64)
    weights = torch.tensor([1 - s.weight, s.weight], dtype=torch.float64)
    modes = normal_log_prob(x, means, torch.full_like(means, s.width))
    return x, torch.logsumexp(modes + weights.log()[:, None], dim=0)


def mixture_moments(s):
    """Mean and standard deviation of the mixture, in closed form."""
    w, gap = s.weight, s.right - s.left
    return s.left + w * gap, math.sqrt(s.width ** 2 + w * (1 - w) * gap ** 2)


# ---- the solver, of this world and of the token MDP ---------------------------------------------

def minimise(objective, start, steps=300, tolerance=3e-7):
    """Minimise objective, (1, P) -> (1,), from each row of start (R, P) by L-BFGS, in float64.

    Returns the minima (R, P) and the norms of the gradients there (R,). A row ends when no entry of
    its gradient exceeds the tolerance, when a step gains less than its square, or after `steps`.
    """
    minima, gradient_norms = [], []
    for row in start.split(1):
        # Every start has its own optimizer: starts that share one would share the length of each
        # step, and it would suit none of them.
        x = row.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [x], max_iter=steps, history_size=20, tolerance_grad=tolerance,
            tolerance_change=tolerance ** 2, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = objective(x).sum()
            value.backward()
            return value
        optimizer.step(closure)
        closure()       # The line search ends at its best point, which need not be its last.
        minima.append(x.detach())
        gradient_norms.append(x.grad.norm())
    return torch.cat(minima), torch.stack(gradient_norms)


def solve(divergence, log_beta, log_policy, start, deltas):
    """Minimise D_f(beta || pi) over a family of policies from every start (R, P).

    log_policy: parameters (R, P) -> log-probabilities (R, N) over the outcomes of log_beta (N,).
    deltas: how far total variation is rounded, falling (see rounded_total_variation).
    Returns parameters (R, P), D_f (R,), and the norm of the gradient of what was minimised (R,).
    """
    if divergence is TOTAL_VARIATION:
        x = start
        for delta in deltas:
            # A rounded kink is stiff. Further steps change the value's fourth digit at most.
            x, gradient_norm = minimise(
                lambda x: rounded_total_variation(log_beta, log_policy(x), delta), x, steps=100)
    else:
        def objective(x):
            # D_f = E_pi[f(u)] as it is defined. f_divergence takes longer, since it also knows
            # outcomes of probability zero. There are none here.
            log_pi = log_policy(x)
            value = (log_pi.exp() * divergence.f(log_beta - log_pi)).sum(-1)
            # log(1 + D_f) has D_f's minima, and its slopes are tamer where D_f is in the millions.
            return torch.log1p(value)
        x, gradient_norm = minimise(objective, start)
    return x, f_divergence(divergence, log_beta, log_policy(x)), gradient_norm


def rounded_total_variation(log_beta, log_pi, delta):
    """Total variation with |u - 1| rounded to sqrt((u - 1)^2 + delta^2), at most delta / 2 more.

    Its optima sit on its kinks, pi = beta, where no gradient vanishes. Shapes as in f_divergence.
    """
    pi = log_pi.exp()
    return ((log_beta.exp() - pi).square() + (delta * pi).square()).sqrt().sum(-1) / 2


# ---- the experiment -----------------------------------------------------------------------------

def fit_all(s, x, log_beta):
    """Fit under every divergence: {name: [optimum, ...]}, best first (see distinct_optima)."""
    def log_policy(theta):                                  # (R, 2) mean and log std -> (R, N)
        return normal_log_prob(x, theta[:, 0], theta[:, 1].exp())

    generator = torch.Generator().manual_seed(s.seed)
    uniform = torch.rand(s.starts, 2, generator=generator, dtype=torch.float64)
    gap = s.right - s.left
    start = torch.stack([s.left - gap / 4 + 1.5 * gap * uniform[:, 0],
                         math.log(s.width) + 1.5 * uniform[:, 1]], dim=1)
    fits = {}
    for name, divergence in DIVERGENCES.items():
        theta, value, gradient_norm = solve(divergence, log_beta, log_policy, start, (0.1, 0.03))
        fits[name] = distinct_optima(theta[:, 0], theta[:, 1].exp(), value, gradient_norm)
    return fits


def distinct_optima(mean, std, value, gradient_norm, tolerance=0.02):
    """The optima that the starts found, best first: mean, std, value, starts, gradient_norm."""
    optima = []
    for row in torch.stack([mean, std, value, gradient_norm], dim=1)[value.argsort()].tolist():
        known = [o for o in optima
                 if max(abs(o["mean"] - row[0]), abs(o["std"] - row[1])) < tolerance]
        if known:
            known[0]["starts"] += 1
        else:
            optima.append(dict(zip(("mean", "std", "value", "gradient_norm"), row), starts=1))
    return optima


def follow_reward(reward, x, log_beta, start, steps=1000, rate=0.003):
    """KL(beta || pi), nats, along the exact policy gradient of reward(h) from (mean, log std).

    The track ends early where the Normal has become too narrow for the grid to resolve.
    """
    divergence, theta, track = replace(FORWARD_KL, reward=reward), start, []
    while len(track) <= steps and theta[1].exp() > 4 * (x[1] - x[0]):
        theta = theta.detach().requires_grad_()
        log_pi = normal_log_prob(x, theta[:1], theta[1:].exp())[0]
        track.append(forward_kl(log_beta, log_pi.detach()).item())
        value = policy_surrogate(divergence, log_beta - log_pi, log_pi, weights=log_pi.exp())
        theta = theta + rate * torch.autograd.grad(value, theta)[0]     # ascent
    return track


# ---- tables and figure --------------------------------------------------------------------------

def print_tables(s, fits, tracks):
    """Every optimum of every divergence, and where the two rewards lead."""
    mean, std = mixture_moments(s)
    print(f"demonstrator: modes at {s.left:g} and {s.right:g}, width {s.width:g}; "
          f"mean {mean:.3f}, std {std:.3f}\n")
    print(f"{'minimise':<20}{'D_f':>8}{'mean':>9}{'std':>8}   starts that end here")
    for name, optima in fits.items():
        for rank, optimum in enumerate(optima):
            label = DIVERGENCES[name].label if rank == 0 else "  a local optimum"
            print(f"{label:<20}{optimum['value']:>8.3f}{optimum['mean']:>9.3f}"
                  f"{optimum['std']:>8.3f}   {optimum['starts']} of {s.starts}")
    print("\nKL(demonstrator || policy) along the policy gradient of two rewards, one start:")
    for reward, track in tracks.items():
        end = "" if len(track) == len(tracks["e^h"]) else ", and collapses to a point"
        print(f"{reward:<10}{track[0]:>8.3f} ->{track[-1]:>8.3f} in {len(track) - 1} steps{end}")


def draw(x, log_beta, fits, tracks):
    """Left: the best fit of each divergence over the mixture. Right: e^h against FAIRL's reward."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9.5, 3.6), width_ratios=[2, 1])
    per_unit = 1 / (x[1] - x[0])        # turns a grid point's probability into a density
    left.fill_between(x, log_beta.exp() * per_unit, color="#dddddd", label="demonstrator")
    for name, (best, *_) in fits.items():
        mean, std = torch.tensor([[best["mean"]], [best["std"]]], dtype=x.dtype)
        left.plot(x, normal_log_prob(x, mean, std)[0].exp() * per_unit, color=COLORS[name],
                  label=DIVERGENCES[name].label, linewidth=2,
                  linestyle="-" if name.endswith("_kl") else (0, (4, 2)))
    inside = x[log_beta.exp() * per_unit > 1e-4]
    left.set(title="one Normal fitted to two modes, by the divergence minimised", xlabel="y",
             ylabel="density", xlim=(inside[0] - 1, inside[-1] + 1))
    for key, name, label in (("e^h", "forward_kl", "reward $e^h$ = f*(f'(u))"),
                             ("-h e^h", "reverse_kl", "FAIRL's $-h\\,e^h$ = -f(u)")):
        right.plot(range(1, len(tracks[key]) + 1), tracks[key], color=COLORS[name], label=label)
        right.plot(len(tracks[key]), tracks[key][-1], "o", color=COLORS[name])
    right.set(title="the wrong reward moves away", xlabel="policy-gradient steps", xscale="log",
              ylabel="KL(demonstrator || policy), nats", yscale="log")
    for axes in (left, right):
        axes.legend(fontsize=8)
    return figure


def main(s):
    """Fit under every divergence, print the tables, write gaussian.png and results.json."""
    require(0 < s.weight < 1, f"--weight must lie strictly between 0 and 1, not {s.weight}")
    require(s.width > 0 and s.left < s.right,
            "--width must be positive and --left smaller than --right")
    require(s.starts >= 1 and s.points >= 100,
            "--starts must be at least 1 and --points at least 100")
    out = make_folder(s.out)
    x, log_beta = demonstrator(s)
    fits = fit_all(s, x, log_beta)
    start = torch.tensor([s.left / 2, math.log(s.width * 2)], dtype=torch.float64)
    tracks = {"e^h": follow_reward(FORWARD_KL.reward, x, log_beta, start),
              "-h e^h": follow_reward(fairl_reward, x, log_beta, start)}
    print_tables(s, fits, tracks)
    write_world(out, s, {"fits": fits, "forward_kl_along": tracks},
                {"gaussian": draw(x, log_beta, fits, tracks)})


if __name__ == "__main__":
    torch.set_num_threads(1)    # The tensors are small: a second thread costs more than it gives.
    run_script(lambda: main(parse_settings(Settings)))
