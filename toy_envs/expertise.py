"""Whose expertise: one reward from demonstrators of unknown skill and unknown bias (IRLEED).

Five demonstrators walk in one grid. Demonstrator i is soft-optimal for the reward

    beta_i (theta + epsilon_i) . phi(s)     theta: golden, the reward that all of them are after
                                            beta_i > 0: expertise, the inverse of a temperature
                                            epsilon_i: bias, what i alone likes or avoids

The learner sees m_i walks of each, and fits all three by maximum likelihood. With f_i the features
that i demonstrated and mu_i those that its policy is expected to show, per walk, the gradients are

    theta: sum_i m_i beta_i (f_i - mu_i)          beta_i: m_i (f_i - mu_i) . (theta + epsilon_i)
    epsilon_i: m_i beta_i (f_i - mu_i)

MaxEnt IRL on the pooled walks is the same with beta = 1 and epsilon = 0: it takes a clumsy step for
a wish, and one walker's whim for everybody's. No number of walks can tell these apart, because the
policies are the same:

    scale    (theta, epsilon, beta)  and  (c theta, c epsilon, beta/c): here sum_i log beta_i = 0
    shift    (theta, epsilon_i)      and  (theta + d, epsilon_i - d)
    each i   (beta_i, epsilon_i)     and  (beta_i/c, c (theta + epsilon_i) - theta)

By the last two it takes a prior on epsilon to speak of a common reward, or of expertise, at all.
A text demonstrator's tau (toy_envs/text_tasks.py) is such a 1/beta. Source: arXiv:2402.01886.
Differs from the paper: priors and convergence instead of few steps; a finite horizon; demonstrators
that are soft-optimal, as its model (not its code) has them. phi is the indicator of a cell.

Run `python -m toy_envs.expertise`. Shapes: B any leading batch (seeds, spreads, biases), D
demonstrators, S states, T horizon, A actions; float64. `demos` is the tuple of steps per walk in
each cell (B, D, S), share of the walks that start there (B, D, S), and number of walks (B, D).
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from toy_envs.grids import (MOVES, empirical_occupancy, marked, occupancy, read_map, sample_walks,
                            soft_value_iteration)
from utils.cli import in_threads, make_folder, parse_settings, run_script, setting
from utils.evaluate import mean_ci
from utils.plots import COLORS, pyplot, write_world

MAP = ("G....", ".xx..", "...x.", ".x...", "....G")     # G goal: 1 per step; x lava: -1 per step
HORIZON = 12
LADDER = torch.linspace(-1, 1, 5, dtype=torch.float64)
MEAN_BETA, SPREADS = 0.5, torch.tensor([0, 1.5, 3], dtype=torch.float64)
# log beta_i = log MEAN_BETA + spread * LADDER[i]; epsilon_i ~ N(0, bias^2) in every cell.
BIASES = torch.tensor([0, 0.2, 0.4, 0.6], dtype=torch.float64)
METHODS = {     # name: its line in the figure
    "MaxEnt IRL, pooled": {"color": COLORS["length"], "marker": "o"},
    "MaxEnt IRL, best alone": {"color": COLORS["golden"], "marker": "s", "ls": "--"},
    "expertise only": {"color": COLORS["log-ratio"], "marker": "^", "ls": ":"},
    "bias only": {"color": COLORS["preference"], "marker": "v", "ls": "-."},
    "IRLEED": {"color": COLORS["init-sft"], "marker": "D", "lw": 2.5},
    "demonstrators": {"color": COLORS["demo"], "marker": "", "ls": ":"},
}


@dataclass
class Settings:
    """IRLEED against MaxEnt IRL, on demonstrators of different expertise and bias in a grid."""
    seed: int = setting(0, "seed of all biases and walks", 0, 2 ** 32)
    seeds: int = setting(16, "independent sets of demonstrators (intervals)", 2, 100)
    walks: int = setting(40, "demonstrations of each demonstrator", 1, 1000)
    width: float = setting(0.5, "standard deviation of all priors", 0.01, 100)
    steps: int = setting(60, "iterations of L-BFGS at most", 1, 10_000)
    out: str = setting("out/expertise", "folder for expertise.png and results.json")


# ---- the world ----------------------------------------------------------------------------------

def grid():
    """World; start (S,), any free cell. Without slip gradients are exact for the walks seen."""
    world = read_map(MAP, slip=0)
    free = marked(world.cells, ".")
    return world, free / free.sum()


def soft_optimal(P, reward):
    """V (B, T, S) and policy (B, T, S, A), soft-optimal for a reward per cell (B, S), in nats."""
    return soft_value_iteration(P, reward[..., None].expand(*reward.shape, len(MOVES)), HORIZON)


def greedy(P, theta):
    """The optimal policy for theta (B, S), which no scale of theta alters."""
    # So cold that only exact ties are left to chance.
    return soft_optimal(P, 1e6 * theta / theta.abs().amax(-1, keepdim=True).clamp(min=1e-12))[1]


def demonstrate(world, start, policies, n, generator):
    """n walks by each demonstrator: policies (B, D, T, S, A)."""
    S, shape = len(world.cells), policies.shape[:-3]
    walks = [sample_walks(world.P, start, policy[None], (n,), generator)
             for policy in policies.flatten(0, -4)]
    states, actions = (torch.stack(x).reshape(*shape, n, HORIZON) for x in zip(*walks))
    features = empirical_occupancy(states, actions, S, len(MOVES)).sum(-1)
    start = one_hot(states[..., 0], S).double().mean(-2)
    return features, start, torch.full_like(features[..., 0], n)


def merged(demos, weights):
    """The demos as if one (D = 1) had walked them: weights (B, D) that sum to 1, 0 leaves out."""
    features, start, walks = demos
    return (*((weights[..., None] * x).sum(-2, keepdim=True) for x in (features, start)),
            (walks * (weights > 0)).sum(-1, keepdim=True))


# ---- the method ---------------------------------------------------------------------------------

def log_likelihood(P, theta, beta, epsilon, demos):
    """Log-likelihood of all actions (B), in nats, and its gradients in theta, beta, epsilon.

    L = sum_i m_i [r_i.f_i - start_i.V_i[0]], r_i = beta_i (theta + epsilon_i): a walk's log pi =
    Q - V telescope. The derivative of start.V[0] in r is mu; hence f - mu. The paper has m_i/m
    in theta's and 1 in the others' place: other step sizes, and the same zeros.
    theta (B, S), beta (B, D), epsilon (B, D, S).
    """
    features, start, walks = demos
    wanted = theta[..., None, :] + epsilon
    V, policy = soft_optimal(P, beta[..., None] * wanted)
    mu = occupancy(P, start, policy).sum((-3, -1))
    gap = walks[..., None] * (features - mu)
    value = beta * (wanted * features).sum(-1) - (start * V[..., 0, :]).sum(-1)
    for_epsilon = beta[..., None] * gap
    return (walks * value).sum(-1), (for_epsilon.sum(-2), (gap * wanted).sum(-1), for_epsilon)


def irleed(P, demos, s, expertise=True, bias=True):
    """theta (B, S), log beta (B, D) and epsilon (B, D, S) by maximum a posteriori, with L-BFGS.

    Each has a normal prior, N(0, width^2). Without expertise log beta stays 0, without bias epsilon
    does: without both this is MaxEnt IRL. Not convex; it starts from zeros, where all are alike.
    """
    theta, log_beta, epsilon = map(torch.zeros_like, (demos[0][..., 0, :], demos[2], demos[0]))
    learned = [theta] + [log_beta] * expertise + [epsilon] * bias
    optimizer = torch.optim.LBFGS([x.requires_grad_() for x in learned], max_iter=s.steps,
                                  tolerance_change=1e-12, line_search_fn="strong_wolfe")

    @torch.no_grad()
    def loss():
        value, gradients = log_likelihood(P, theta, log_beta.exp(), epsilon, demos)
        # No step changes the sum of log beta, the scale that theta and epsilon could undo.
        for_log_beta = log_beta.exp() * gradients[1]
        for_log_beta = for_log_beta - for_log_beta.mean(-1, keepdim=True)
        total = -value.sum()    # Cases share nothing: their sum is least where each of them is.
        for x, gradient in zip((theta, log_beta, epsilon),
                               (gradients[0], for_log_beta, gradients[2])):
            x.grad = x / s.width ** 2 - gradient
            total = total + (x ** 2).sum() / (2 * s.width ** 2)
        return total

    optimizer.step(loss)
    return theta.detach(), log_beta.detach(), epsilon.detach()


# ---- the experiment -----------------------------------------------------------------------------

def experiment(s):
    """Every method on every set of demonstrators, (seeds, spreads, biases) at once: {method: golden
    return (seeds, spreads, biases)} and {method: log beta (..., D)} of those that learn it."""
    world, start = grid()

    def golden_return(policy):
        return occupancy(world.P, start, policy).sum((-3, -1)) @ world.golden

    generator = torch.Generator().manual_seed(s.seed)
    # In all of a seed's settings the biases differ in size alone, so that settings pair up.
    epsilon = BIASES[:, None, None] * torch.randn(
        s.seeds, 1, 1, len(LADDER), len(world.cells), generator=generator, dtype=torch.float64)
    beta = MEAN_BETA * torch.exp(SPREADS[:, None, None] * LADDER)
    policies = soft_optimal(world.P, beta[..., None] * (world.golden + epsilon))[1]
    demos = demonstrate(world, start, policies, s.walks, generator)
    most = golden_return(greedy(world.P, world.golden))
    own = golden_return(policies) / most
    # Only golden can say who is best: "best alone" is told, as nobody is outside of a toy world.
    best = one_hot(own.argmax(-1), len(LADDER)).double()
    jobs = [(merged(demos, torch.full_like(own, 1 / len(LADDER))), False, False),
            (merged(demos, best), False, False),
            (demos, True, False), (demos, False, True), (demos, True, True)]
    fits = in_threads(lambda job: irleed(world.P, job[0], s, *job[1:]), jobs, torch.device("cpu"))
    fits = dict(zip(METHODS, fits))
    scores = {name: golden_return(greedy(world.P, fit[0])) / most for name, fit in fits.items()}
    return scores | {"demonstrators": own.mean(-1)}, {
        name: fits[name][1] for name in ("expertise only", "IRLEED")}


def intervals(values):
    """[means, half-widths of their 95% intervals] over the seeds of values (seeds, ...)."""
    return [torch.tensor(x).reshape(values.shape[1:]).tolist()
            for x in zip(*map(mean_ci, values.flatten(1).T))]


def percent(mine, base):
    """The paper's measure: by how many % mine (seeds, ...) lies above base, mean of the settings;
    and the 95% half-width by the jackknife over seeds."""
    n = len(mine)
    rise = [100 * (mine[keep].mean(0) / base[keep].mean(0) - 1).mean().item()
            for keep in torch.cat([torch.zeros(1, n), torch.eye(n)]) == 0]   # all, all but one, ...
    return rise[0], mean_ci([n * rise[0] - (n - 1) * without for without in rise[1:]])[1]


# ---- tables and figure --------------------------------------------------------------------------

def print_tables(scores, gains, s):
    """Golden return by method and setting; what each method gains on MaxEnt IRL, pooled."""
    print("golden return of the optimal policy for theta, % of the most possible")
    for i, spread in enumerate(SPREADS):
        print(f"\nlog beta ±{spread:<4g} bias:" + "".join(f"{bias:14g}" for bias in BIASES))
        for name, values in scores.items():
            cells = zip(*intervals(100 * values[:, i]))
            print(f"{name:22}" + "".join(f"{mean:7.1f} ±{half:5.1f}" for mean, half in cells))
    print("\nover MaxEnt IRL, pooled    points     %, settings' mean (the paper's: +30.3)")
    for name, of in gains.items():
        print(f"{name:22}" + "".join(f"{mean:+9.1f} ±{half:5.1f}" for mean, half in of.values()))
    print(f"± is a 95% interval over {s.seeds} sets of demonstrators")


def draw(scores, log_beta):
    """Returns where expertise differs most; IRLEED's gain on the pooled by setting; log beta."""
    figure, (left, middle, right) = pyplot().subplots(1, 3, figsize=(10, 3.8))
    for i, (name, values) in enumerate(scores.items()):     # Side by side, to tell bars apart.
        left.errorbar(BIASES + 0.008 * (i - 2), *intervals(100 * values[:, -1]), label=name, ms=5,
                      **METHODS[name])
    left.set(xlabel="bias", xticks=BIASES.tolist(), ylim=(-65, 110), yticks=range(0, 101, 20),
             ylabel="return, % of the most", title=f"expertise differs: log β ±{SPREADS[-1]:g}")
    means, halves = intervals(100 * (scores["IRLEED"] - scores["MaxEnt IRL, pooled"]))
    middle.imshow(means, cmap="RdBu", vmin=-80, vmax=80, aspect="auto")
    for i, j in torch.cartesian_prod(torch.arange(len(SPREADS)), torch.arange(len(BIASES))):
        middle.text(j, i, f"{round(means[i][j]):+d}\n±{halves[i][j]:.0f}", ha="center", va="center")
    middle.set(title="IRLEED less pooled, points", xlabel="bias", ylabel="spread of log β",
               xticks=range(len(BIASES)), xticklabels=BIASES.tolist(),
               yticks=range(len(SPREADS)), yticklabels=[f"±{spread:g}" for spread in SPREADS])
    middle.grid(False)
    for name, of in log_beta.items():
        right.errorbar(SPREADS[-1] * LADDER, *intervals(of[:, -1, 0]), label=name, **METHODS[name])
    right.axline((0, 0), slope=1, color="black", lw=1, label="true")
    right.set(xlabel="true log β, less its mean", ylabel="estimated log β", ylim=(-4, 3.2),
              title="log β, where nobody is biased")
    left.legend(loc="lower left")
    right.legend(loc="lower right")
    return figure


def main(s):
    """Run the sweep, print the tables, write expertise.png and results.json."""
    out = make_folder(s.out)
    scores, log_beta = experiment(s)
    pooled = scores["MaxEnt IRL, pooled"]
    gains = {name: {"points": mean_ci(100 * (values - pooled).mean((1, 2))),
                    "percent": percent(values, pooled)} for name, values in scores.items()}
    print_tables(scores, gains, s)
    write_world(out, s, {"spreads": SPREADS.tolist(), "biases": BIASES.tolist(), "gain": gains,
                         "return": {name: intervals(values) for name, values in scores.items()},
                         "log beta": {name: intervals(of) for name, of in log_beta.items()}},
                {"expertise": draw(scores, log_beta)})


if __name__ == "__main__":
    run_script(lambda: main(parse_settings(Settings)))
