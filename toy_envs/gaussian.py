"""One Normal fitted to a mixture of two under each divergence: the textbook picture, by quadrature.

The demonstrator writes in two ways, the learner can only write in one. What each divergence makes
of that is the whole difference between supervised fine-tuning and adversarial imitation: the
forward KL spreads over both modes and puts most of its mass between them, where no demonstrator
ever was; the reverse KL picks one mode and writes it well.

    python -m toy_envs.gaussian

Shapes: R rows (starts) optimised side by side, P parameters of one row, N points of the grid.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from divergences import (DIVERGENCES, FORWARD_KL, TOTAL_VARIATION, f_divergence, fairl_reward,
                         forward_kl, policy_surrogate)
from model import InputError, write_json
from toy_envs.figures import COLORS, pyplot, save_figure
from train import parse_settings, run_script, setting


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
    x = start.clone()
    value, gradient = _value_and_gradient(objective, x)
    done = torch.empty_like(x), torch.empty_like(value), torch.empty_like(gradient)
    rows, pairs = torch.arange(len(x)), []           # pairs: (step s, change y of the gradient)
    moved = torch.ones(len(x), dtype=torch.bool)
    for step in range(steps + 1):
        go_on = (gradient.norm(dim=1) >= tolerance) & moved & (step < steps)
        for result, now in zip(done, (x, value, gradient)):
            result[rows] = now
        if not go_on.any():
            break
        rows, x, value, gradient = rows[go_on], x[go_on], value[go_on], gradient[go_on]
        pairs = [(s[go_on], y[go_on]) for s, y in pairs[-history:]]
        direction = -_inverse_hessian_times(gradient, pairs)
        downhill = (direction * gradient).sum(1, keepdim=True) < 0
        direction = torch.where(downhill, direction, -gradient)
        x_new, value_new, gradient_new = _backtrack(objective, x, value, gradient, direction)
        pairs.append((x_new - x, gradient_new - gradient))
        moved = (x_new != x).any(1)
        x, value, gradient = x_new, value_new, gradient_new
    x, value, gradient = done
    return x, value, gradient.norm(dim=1)


def _value_and_gradient(objective, x):
    x = x.detach().requires_grad_()
    value = objective(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def _inverse_hessian_times(gradient, pairs):
    """The two-loop recursion: the inverse Hessian that the pairs imply, times the gradient."""
    def dot(a, b):
        return (a * b).sum(1, keepdim=True)

    q, scale, steps = gradient, torch.ones_like(gradient[:, :1]), []
    for s, y in reversed(pairs):
        # a row of negative curvature sets rho = 0, which makes the recursion skip its pair
        rho = torch.where(dot(s, y) > 0, 1 / dot(s, y), 0.0)
        alpha = rho * dot(s, q)
        q = q - alpha * y
        steps.append((s, y, rho, alpha))
    for s, y, rho, _ in reversed(steps):             # each row's newest pair sets its scale
        scale = torch.where(rho > 0, 1 / (rho * dot(y, y)), scale)
    q = q * scale
    for s, y, rho, alpha in reversed(steps):
        q = q + s * (alpha - rho * dot(y, q))
    return q


def _backtrack(objective, x, value, gradient, direction):
    """Halve each row's step until it lowers that row's value (Armijo); a row that cannot stays."""
    slope = (gradient * direction).sum(1)
    step = (1 / direction.norm(dim=1)).clamp(max=1.0)  # never further than 1: no leap into a corner
    for _ in range(40):
        x_new = x + step[:, None] * direction
        value_new, gradient_new = _value_and_gradient(objective, x_new)
        lower = value_new <= value + 1e-4 * step * slope
        if lower.all():
            break
        step = torch.where(lower, step, step / 2)
    keep = lower[:, None]
    return (torch.where(keep, x_new, x), torch.where(lower, value_new, value),
            torch.where(keep, gradient_new, gradient))


# ---- the world ----------------------------------------------------------------------------------

def check(config):
    """InputError for settings that describe no mixture."""
    if not 0 < config.weight < 1:
        raise InputError(f"--weight must lie strictly between 0 and 1, not {config.weight}")
    if not (config.width > 0 and config.left < config.right):
        raise InputError("--width must be positive and --left smaller than --right")
    if config.starts < 1 or config.points < 100:
        raise InputError("--starts must be at least 1 and --points at least 100")


def normal_log_prob(x, mean, std):
    """log of the Normal's probabilities of the grid's points x (N,), normalised over the grid.

    mean, std: (R,). Returns (R, N). A sum over the grid is then an integral by the trapezoid rule,
    which for smooth functions that vanish at both ends is exact far beyond what is needed here.
    """
    return (-0.5 * ((x - mean[:, None]) / std[:, None]).square()).log_softmax(-1)


def demonstrator(config):
    """The grid x (N,) and the mixture's log-probabilities on it (N,), in float64."""
    reach = 8 * config.width + (config.right - config.left)
    x = torch.linspace(config.left - reach, config.right + reach, config.points,
                       dtype=torch.float64)
    means = torch.tensor([config.left, config.right], dtype=torch.float64)
    modes = normal_log_prob(x, means, torch.full_like(means, config.width))
    weights = torch.tensor([1 - config.weight, config.weight], dtype=torch.float64)
    return x, torch.logsumexp(modes + weights.log()[:, None], dim=0)


def mixture_moments(config):
    """Mean and standard deviation of the mixture, in closed form."""
    w, gap = config.weight, config.right - config.left
    return config.left + w * gap, math.sqrt(config.width ** 2 + w * (1 - w) * gap ** 2)


def objective_of(divergence, log_beta, delta):
    """log_pi (R, N) -> (R,) to minimise: log(1 + D_f), which has D_f's minima and tamer slopes.

    Total variation has a kink wherever pi = beta, and its optima sit on kinks: |u - 1| is rounded
    to sqrt((u - 1)^2 + delta^2), which changes the value by at most delta / 2.
    """
    def smooth_total_variation(log_pi):
        pi = log_pi.exp()
        return ((log_beta.exp() - pi).square() + (delta * pi).square()).sqrt().sum(-1) / 2

    if divergence is TOTAL_VARIATION:
        return smooth_total_variation
    return lambda log_pi: torch.log1p(f_divergence(divergence, log_beta, log_pi))


def solve(divergence, log_beta, log_policy, start, deltas=(0.1, 0.01, 0.001), steps=500):
    """Minimise D_f(beta || pi) over a family of policies, exactly, from every start at once.

    log_policy: parameters (R, P) -> log-probabilities (R, N) over the outcomes of log_beta (N,).
    Returns parameters (R, P), D_f (R,), and the norm of the gradient of what was minimised (R,).
    """
    if divergence is not TOTAL_VARIATION:
        deltas = deltas[-1:]
    x = start
    for delta in deltas:
        objective = objective_of(divergence, log_beta, delta)
        x, _, gradient_norm = minimise(lambda x: objective(log_policy(x)), x, steps=steps)
    return x, f_divergence(divergence, log_beta, log_policy(x)), gradient_norm


def fit_all(config, x, log_beta):
    """Fit under every divergence: {name: [optimum, ...]}, best first (see distinct_optima)."""
    generator = torch.Generator().manual_seed(config.seed)
    uniform = torch.rand(config.starts, 2, generator=generator, dtype=torch.float64)
    gap = config.right - config.left
    mean = config.left - gap / 4 + 1.5 * gap * uniform[:, 0]
    log_std = math.log(config.width) + 1.5 * uniform[:, 1]
    start = torch.stack([mean, log_std], dim=1)
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
        optimum = dict(zip(("mean", "std", "value", "gradient_norm"), row), starts=1)
        twin = next((o for o in found if abs(o["mean"] - row[0]) < tolerance
                     and abs(o["std"] - row[1]) < tolerance), None)
        if twin:
            twin["starts"] += 1
        else:
            found.append(optimum)
    return found


def follow_reward(reward, x, log_beta, start, steps=1000, rate=0.003):
    """KL(beta || pi), nats, along the exact policy gradient of reward(h) from (mean, log std).

    The track ends early where the Normal has become too narrow for the grid to resolve.
    """
    divergence, theta = replace(FORWARD_KL, reward=reward), start.clone()
    narrowest, track = (4 * (x[1] - x[0])).log(), []
    for _ in range(steps + 1):
        if not theta[1] > narrowest:
            break
        theta.requires_grad_()
        log_pi = normal_log_prob(x, theta[:1], theta[1:].exp())[0]
        track.append(forward_kl(log_beta, log_pi.detach()).item())
        value = policy_surrogate(divergence, log_beta - log_pi, log_pi, weights=log_pi.exp())
        theta = theta.detach() + rate * torch.autograd.grad(value, theta)[0]
    return track


# ---- what it prints and draws -------------------------------------------------------------------

def print_table(config, fits):
    mean, std = mixture_moments(config)
    print(f"demonstrator: modes at {config.left:g} and {config.right:g}, width {config.width:g}; "
          f"mean {mean:.3f}, std {std:.3f}\n")
    print(f"{'minimise':<20}{'D_f':>8}{'mean':>9}{'std':>8}   starts that end here")
    for name, optima in fits.items():
        for rank, optimum in enumerate(optima):
            label = DIVERGENCES[name].label if rank == 0 else "  a local optimum"
            print(f"{label:<20}{optimum['value']:>8.3f}{optimum['mean']:>9.3f}"
                  f"{optimum['std']:>8.3f}   {optimum['starts']} of {config.starts}")


def draw(path, x, log_beta, fits, tracks):
    """Left: the best fit of each divergence over the mixture. Right: e^h against FAIRL's reward."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), width_ratios=[2, 1])
    per_unit = 1 / (x[1] - x[0])
    left.fill_between(x, log_beta.exp() * per_unit, color="#dddddd", label="demonstrator")
    for name, (best, *_) in fits.items():
        std = torch.tensor([best["std"]], dtype=x.dtype)
        density = normal_log_prob(x, torch.tensor([best["mean"]], dtype=x.dtype), std)[0].exp()
        left.plot(x, density * per_unit, color=COLORS[name], label=DIVERGENCES[name].label,
                  linewidth=2, linestyle="-" if name.endswith("_kl") else (0, (4, 2)))
    inside = x[log_beta.exp() * per_unit > 1e-4]
    left.set(title="one Normal fitted to two modes, by the divergence minimised", xlabel="y",
             ylabel="density", xlim=(inside[0] - 1, inside[-1] + 1))
    left.legend(fontsize=8)
    for key, name, label in (("e^h", "forward_kl", "reward $e^h$ = f*(f'(u))"),
                             ("-h e^h", "reverse_kl", "FAIRL's $-h\\,e^h$ = -f(u)")):
        right.plot(range(1, len(tracks[key]) + 1), tracks[key], color=COLORS[name], label=label)
        right.plot(len(tracks[key]), tracks[key][-1], "o", color=COLORS[name])
    right.set(title="the wrong reward moves away", xlabel="policy-gradient steps",
              ylabel="KL(demonstrator || policy), nats", yscale="log",
              xscale="log")
    right.legend(fontsize=8)
    return save_figure(figure, path)


def main(config):
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it gives
    check(config)
    x, log_beta = demonstrator(config)
    fits = fit_all(config, x, log_beta)
    start = torch.tensor([config.left / 2, math.log(config.width * 2)], dtype=torch.float64)
    tracks = {"e^h": follow_reward(FORWARD_KL.reward, x, log_beta, start),
              "-h e^h": follow_reward(fairl_reward, x, log_beta, start)}
    print_table(config, fits)
    print("\nKL(demonstrator || policy) along the policy gradient of two rewards, one start:")
    for reward, track in tracks.items():
        print(f"{reward:<10}{track[0]:>8.3f} ->{track[-1]:>8.3f} in {len(track) - 1} steps"
              + ("" if len(track) == len(tracks["e^h"]) else ", and collapses to a point"))
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {"settings": asdict(config), "fits": fits, "forward_kl_along": tracks}
    write_json(out / "results.json", results)
    print(f"\nwrote {out}/results.json and {draw(out / 'gaussian.png', x, log_beta, fits, tracks)}")


if __name__ == "__main__":
    run_script(lambda: main(parse_settings(Settings)))
