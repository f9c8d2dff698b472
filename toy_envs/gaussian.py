"""One Normal fitted to a mixture of two under each divergence: the textbook picture, by quadrature.

The demonstrator writes in two ways, the learner can only write in one. What each divergence makes
of that is the whole difference between supervised fine-tuning and adversarial imitation: the
forward KL spreads over both modes and puts most of its mass between them, where no demonstrator
ever was; the reverse KL picks one mode and writes it well.

    python -m toy_envs.gaussian

Shapes: R rows (starts) optimised side by side, P parameters of one row, N points of the grid.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from divergences import DIVERGENCES, FORWARD_KL, f_divergence, fairl_reward, policy_surrogate
from model import InputError
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
    points: int = setting(2000, "points of the quadrature grid")
    seed: int = setting(0, "seed of the starting points")
    out: str = setting("out/gaussian", "folder for results.json and the figure")


# ---- a minimiser for many starts at once --------------------------------------------------------

def minimise(objective, start, tolerance=1e-7, steps=500, history=20):
    """Minimise R independent objectives side by side by L-BFGS (Nocedal & Wright, algorithm 7.5).

    objective: (R, P) -> (R,), row i depending on row i alone. start: (R, P), float64. A row stops
    when its gradient's norm is below tolerance. Returns x (R, P), values (R,), gradient norms (R,).
    """
    x = start.clone()
    value, gradient = _value_and_gradient(objective, x)
    pairs = []                                       # (step s, change of the gradient y, 1/(s.y))
    for _ in range(steps):
        active = gradient.norm(dim=1) >= tolerance
        if not active.any():
            break
        direction = -_inverse_hessian_times(gradient, pairs)
        downhill = (direction * gradient).sum(1, keepdim=True) < 0
        direction = torch.where(downhill, direction, -gradient) * active[:, None]
        x_new, value_new, gradient_new = _backtrack(objective, x, value, gradient, direction)
        s, y = x_new - x, gradient_new - gradient
        sy = (s * y).sum(1, keepdim=True)
        # rows without positive curvature leave no pair: 1/(s.y) = 0 makes the recursion skip them
        pairs = pairs[-history + 1:] + [(s, y, torch.where(sy > 1e-300, 1 / sy, 0.0))]
        if not (s != 0).any():                       # no row can go lower in this precision
            break
        x, value, gradient = x_new, value_new, gradient_new
    return x, value, gradient.norm(dim=1)


def _value_and_gradient(objective, x):
    x = x.detach().requires_grad_()
    value = objective(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def _inverse_hessian_times(gradient, pairs):
    """The two-loop recursion: the inverse Hessian that the pairs imply, times the gradient."""
    q, alphas, scale = gradient, [], torch.ones_like(gradient[:, :1])
    for s, y, rho in reversed(pairs):
        alphas.append(rho * (s * q).sum(1, keepdim=True))
        q = q - alphas[-1] * y
    for s, y, rho in pairs:                          # the newest pair of each row sets its scale
        scale = torch.where(rho > 0, 1 / (rho * y.square().sum(1, keepdim=True)), scale)
    q = q * scale
    for (s, y, rho), alpha in zip(pairs, reversed(alphas)):
        q = q + s * (alpha - rho * (y * q).sum(1, keepdim=True))
    return q


def _backtrack(objective, x, value, gradient, direction):
    """Halve each row's step until it lowers that row's value (Armijo); a row that cannot stays."""
    slope = (gradient * direction).sum(1)
    step = (1 / direction.norm(dim=1).clamp(min=1.0)).clamp(min=0.1)
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
