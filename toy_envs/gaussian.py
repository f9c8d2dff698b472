"""One Normal fitted to a mixture of two under each divergence: the textbook picture, by quadrature.

The demonstrator writes in two ways, the learner can only write in one. What each divergence makes
of that is the whole difference between supervised fine-tuning and adversarial imitation: the
forward KL spreads over both modes and puts most of its mass between them, where no demonstrator
ever was; the reverse KL picks one mode and writes it well.

    python -m toy_envs.gaussian

Shapes: R rows (starts) optimised side by side, P parameters of one row, N points of the grid.
"""

import math
from dataclasses import dataclass, replace

import torch

from divergences import (DIVERGENCES, FORWARD_KL, TOTAL_VARIATION, f_divergence, fairl_reward,
                         forward_kl, policy_surrogate)
from model import require
from utils.plots import COLORS, pyplot, write_world
from utils.cli import make_folder, parse_settings, run_script, setting


@dataclass
class Settings:
    """Fit one Normal to a two-mode mixture under each of the seven divergences."""
    left: float = setting(-2.0, "mean of the left mode")
    right: float = setting(2.0, "mean of the right mode")
    width: float = setting(0.7, "standard deviation of each mode")
    weight: float = setting(0.6, "probability of the right mode, between 0 and 1")
    starts: int = setting(16, "starting points of each fit")
    points: int = setting(4000, "points of the quadrature grid")
    seed: int = setting(0, "seed of the starting points")
    out: str = setting("out/gaussian", "folder for results.json and gaussian.png")


# ---- a minimiser for many starts at once --------------------------------------------------------

def minimise(objective, start, tolerance=1e-7, steps=500, history=10):
    """Minimise R independent objectives side by side by L-BFGS (Nocedal & Wright, algorithm 7.5).

    objective: (rows, P) -> (rows,) for any number of rows, each depending on its own row alone.
    start: (R, P), float64. A row is done when its gradient's norm is below tolerance, or when no
    step lowers it in this precision. Returns x (R, P), values (R,), gradient norms (R,).
    """
    x = start.clone().requires_grad_()
    value = objective(x)
    now = [x.detach(), value.detach(), torch.autograd.grad(value.sum(), x)[0]]
    active, pairs, scale = now[2].norm(dim=1) >= tolerance, [], torch.ones_like(x[:, :1]).detach()
    for _ in range(steps):
        if not active.any():
            break
        recent = [[rows[active] for rows in pair] for pair in pairs]
        x, value, gradient = (rows[active] for rows in now)
        direction = -inverse_hessian_times(gradient, recent, scale[active])
        before, now = now, [rows.clone() for rows in now]
        for rows, new in zip(now, backtrack(objective, x, value, gradient, direction)):
            rows[active] = new
        step, change = now[0] - before[0], now[2] - before[2]
        bend = dot(step, change)
        # a row of negative curvature sets rho = 0, which makes the recursion skip its pair
        pairs = [*pairs, (step, change, torch.where(bend > 0, 1 / bend, 0.0))][-history:]
        scale = torch.where(bend > 0, bend / dot(change, change), scale)
        active = active & (step != 0).any(1) & (now[2].norm(dim=1) >= tolerance)
    return now[0], now[1], now[2].norm(dim=1)


def dot(a, b):
    """The inner product of each row: (R, P), (R, P) -> (R, 1)."""
    return (a * b).sum(1, keepdim=True)


def inverse_hessian_times(q, pairs, scale):
    """The two-loop recursion: the inverse Hessian times q (R, P). It is scale times the identity,
    bent by the pairs (step s, change y of the gradient, rho = 1 / s.y), the oldest first."""
    alphas = []
    for s, y, rho in reversed(pairs):
        alphas.append(rho * dot(s, q))
        q = q - alphas[-1] * y
    q = q * scale
    for (s, y, rho), alpha in zip(pairs, reversed(alphas)):
        q = q + s * (alpha - rho * dot(y, q))
    return q


def backtrack(objective, x, value, gradient, direction):
    """Halve each row's step until it lowers that row's value (Armijo); a row that cannot stays."""
    slope = (gradient * direction).sum(1)
    step = (1 / direction.norm(dim=1)).clamp(max=1.0)  # never further than 1: no leap into a corner
    for _ in range(40):
        x_new = (x + step[:, None] * direction).requires_grad_()
        value_new = objective(x_new)
        lower = value_new <= value + 1e-4 * step * slope
        if lower.all():
            break
        step = torch.where(lower, step, step / 2)
    gradient_new = torch.autograd.grad(value_new.sum(), x_new)[0]
    keep = lower[:, None]
    return (torch.where(keep, x_new, x).detach(), torch.where(lower, value_new, value).detach(),
            torch.where(keep, gradient_new, gradient))


# ---- the world ----------------------------------------------------------------------------------

def check(s):
    """InputError for settings that describe no mixture."""
    require(0 < s.weight < 1, f"--weight must lie strictly between 0 and 1, not {s.weight}")
    require(s.width > 0 and s.left < s.right,
            "--width must be positive and --left smaller than --right")
    require(s.starts >= 1 and s.points >= 100,
            "--starts must be at least 1 and --points at least 100")


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


def solve(divergence, log_beta, log_policy, start, deltas):
    """Minimise D_f(beta || pi) over a family of policies, exactly, from every start at once.

    log_policy: parameters (R, P) -> log-probabilities (R, N) over the outcomes of log_beta (N,).
    What descends is log(1 + D_f), which has D_f's minima and tamer slopes. Total variation has a
    kink wherever pi = beta, and its optima sit on kinks: |u - 1| is rounded to sqrt((u - 1)^2 +
    delta^2), which changes the value by at most delta / 2, for each of the falling deltas in turn.
    Returns parameters (R, P), D_f (R,), and the norm of the gradient of what was minimised (R,).
    """
    def objective(x, delta):
        log_pi = log_policy(x)
        if delta is None:
            return torch.log1p(f_divergence(divergence, log_beta, log_pi))
        pi = log_pi.exp()
        return ((log_beta.exp() - pi).square() + (delta * pi).square()).sqrt().sum(-1) / 2

    x = start
    for delta in deltas if divergence is TOTAL_VARIATION else [None]:
        x, _, gradient_norm = minimise(lambda x: objective(x, delta), x)
    return x, f_divergence(divergence, log_beta, log_policy(x)), gradient_norm


def fit_all(s, x, log_beta):
    """Fit under every divergence: {name: [optimum, ...]}, best first (see distinct_optima)."""
    generator = torch.Generator().manual_seed(s.seed)
    uniform = torch.rand(s.starts, 2, generator=generator, dtype=torch.float64)
    gap = s.right - s.left
    start = torch.stack([s.left - gap / 4 + 1.5 * gap * uniform[:, 0],
                         math.log(s.width) + 1.5 * uniform[:, 1]], dim=1)    # mean, log std
    fits = {}
    for name, divergence in DIVERGENCES.items():
        theta, value, gradient_norm = solve(
            divergence, log_beta, lambda theta: normal_log_prob(x, theta[:, 0], theta[:, 1].exp()),
            start, deltas=(0.1, 0.03))
        fits[name] = distinct_optima(theta[:, 0], theta[:, 1].exp(), value, gradient_norm)
    return fits


def distinct_optima(mean, std, value, gradient_norm, tolerance=0.02):
    """The optima that the starts found, best first: mean, std, value, starts, gradient_norm."""
    found = []
    for row in torch.stack([mean, std, value, gradient_norm], dim=1)[value.argsort()].tolist():
        twin = next((o for o in found if abs(o["mean"] - row[0]) < tolerance
                     and abs(o["std"] - row[1]) < tolerance), None)
        if twin:
            twin["starts"] += 1
        else:
            found.append(dict(zip(("mean", "std", "value", "gradient_norm"), row), starts=1))
    return found


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
        theta = theta + rate * torch.autograd.grad(value, theta)[0]
    return track


# ---- what it prints and draws -------------------------------------------------------------------

def print_tables(s, fits, tracks):
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
        print(f"{reward:<10}{track[0]:>8.3f} ->{track[-1]:>8.3f} in {len(track) - 1} steps"
              + ("" if len(track) == len(tracks["e^h"]) else ", and collapses to a point"))


def draw(x, log_beta, fits, tracks):
    """Left: the best fit of each divergence over the mixture. Right: e^h against FAIRL's reward."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9.5, 3.6), width_ratios=[2, 1])
    per_unit = 1 / (x[1] - x[0])
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
    check(s)
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
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it gives
    run_script(lambda: main(parse_settings(Settings)))
