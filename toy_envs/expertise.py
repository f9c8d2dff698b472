"""Whose expertise: one reward from demonstrators of unknown skill and unknown bias (IRLEED).

Five demonstrators walk in one grid. Demonstrator i is soft-optimal for the reward

    beta_i (theta + epsilon_i) . phi(s)     theta: golden, the reward that all of them are after
                                            beta_i > 0: expertise, the inverse of a temperature
                                            epsilon_i: bias, what i alone likes or avoids

The learner sees their walks, and fits all three by maximum likelihood. With f_i the features that i
demonstrated, mu_i those that its policy is expected to show, and m_i of the m walks, the gradients
of the mean log-likelihood of a walk are

    theta: sum_i (m_i/m) beta_i (f_i - mu_i)      beta_i: (m_i/m) (f_i - mu_i) . (theta + epsilon_i)
    epsilon_i: (m_i/m) beta_i (f_i - mu_i)

MaxEnt IRL on the pooled walks is the same with beta = 1 and epsilon = 0: it takes a clumsy step for
a wish, and one walker's whim for everybody's. No number of walks can tell these apart, because the
policies are the same:

    scale    (theta, epsilon, beta)  and  (c theta, c epsilon, beta/c): here sum_i log beta_i = 0
    shift    (theta, epsilon_i)      and  (theta + d, epsilon_i - d)
    each i   (beta_i, epsilon_i)     and  (beta_i/c, c (theta + epsilon_i) - theta)

By the last two, it takes a prior on epsilon to speak of a common reward or of expertise at all.
The tau of a text demonstrator (toy_envs/text_tasks.py) is such a 1/beta.

Source: arXiv:2402.01886. Differs from the paper: priors and convergence instead of few steps; a
finite horizon without discount; demonstrators that are soft-optimal, as its model has them (in its
code they weigh the next states by powers of their values). phi is the indicator of a cell.

Run `python -m toy_envs.expertise`. Shapes: B any leading batch (seeds, spreads, biases), D
demonstrators, S states, T horizon, A actions; float64. `demos` is all that a learner sees, the
tuple of features (B, D, S), steps per walk spent in each cell; start (B, D, S), the share of the
walks that start there; and walks (B, D), their number. Only biases and walks are sampled.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from toy_envs.grids import (MOVES, empirical_occupancy, marked, occupancy, read_map, sample_walks,
                            soft_value_iteration)
from utils.cli import in_threads, make_folder, parse_settings, run_script, setting
from utils.evaluate import mean_ci
from utils.plots import COLORS, pyplot, write_world

MAP = ("G....",     # G goal: 1 per step; x lava: -1 per step; a walk starts in any free cell
       ".xx..",
       "...x.",
       ".x...",
       "....G")
HORIZON = 12
MEAN_BETA = 0.5                                         # log beta_i = log MEAN_BETA
SPREADS = torch.tensor([0, 1.5, 3]).double()            # + spread * LADDER[i]
LADDER = torch.linspace(-1, 1, 5, dtype=torch.float64)
BIASES = torch.tensor([0, 0.2, 0.4, 0.6]).double()      # spread of epsilon_i; a goal's golden is 1
METHODS = {     # name: its line in the figure
    "MaxEnt IRL, pooled": {"color": COLORS["length"], "marker": "o"},
    "MaxEnt IRL, best alone": {"color": COLORS["golden"], "marker": "s", "ls": "--"},
    "expertise only": {"color": COLORS["log-ratio"], "marker": "^", "ls": ":"},
    "bias only": {"color": COLORS["preference"], "marker": "v", "ls": "-."},
    "IRLEED": {"color": COLORS["init-sft"], "marker": "D", "lw": 2.5},
    "demonstrators": {"color": COLORS["demo"], "marker": "", "ls": ":"},
}
PAPER = 30.3    # % over MaxEnt IRL in return, the mean of its 121 settings


@dataclass
class Settings:
    """IRLEED against MaxEnt IRL, on demonstrators of different expertise and bias in a grid."""
    seed: int = setting(0, "seed of all biases and walks")
    seeds: int = setting(10, "independent sets of demonstrators (for the intervals)", 2, 100)
    walks: int = setting(40, "demonstrations of each demonstrator", 1, 1000)
    width: float = setting(0.5, "standard deviation of all priors", 0.01, 100)
    steps: int = setting(60, "iterations of L-BFGS at most", 1, 10_000)
    out: str = setting("out/expertise", "folder for expertise.png and results.json")


# ---- the world ----------------------------------------------------------------------------------

def grid():
    """The World, and where walks start (S,). Without slip the gradients above are exact for the
    walks that were seen, too, and not in expectation only."""
    world = read_map(MAP, slip=0)
    free = marked(world.cells, ".")
    return world, free / free.sum()


def soft_optimal(P, reward):
    """V (B, T, S) and policy (B, T, S, A), soft-optimal for a reward per cell (B, S), in nats."""
    return soft_value_iteration(P, reward[..., None].expand(*reward.shape, len(MOVES)), HORIZON)


def greedy(P, theta):
    """The optimal policy for theta (B, S), which no scale of theta alters."""
    unit = theta / theta.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return soft_optimal(P, 1e6 * unit)[1]       # So cold that only exact ties are left to chance.


def golden_return(world, start, policy):
    """Steps in a goal less steps in lava, as a share of the most possible: (B, T, S, A) -> (B)."""
    visits = [occupancy(world.P, start, pi).sum((-3, -1))
              for pi in (policy, greedy(world.P, world.golden))]
    return visits[0] @ world.golden / (visits[1] @ world.golden)


def demonstrate(world, start, policies, n, generator):
    """n walks by each demonstrator: policies (B, D, T, S, A)."""
    S, shape = len(world.cells), policies.shape[:-3]
    walks = [sample_walks(world.P, start, policy[None], (n,), generator)
             for policy in policies.flatten(0, -4)]
    states, actions = (torch.stack(x).reshape(*shape, n, HORIZON) for x in zip(*walks))
    return (empirical_occupancy(states, actions, S, len(MOVES)).sum(-1),
            one_hot(states[..., 0], S).double().mean(-2),
            torch.full(shape, float(n), dtype=torch.float64))


def merged(demos, weights):
    """The demos as if one (D = 1) had walked them: weights (B, D) that sum to 1, 0 leaves out."""
    features, start, walks = demos
    return (*((weights[..., None] * x).sum(-2, keepdim=True) for x in (features, start)),
            (walks * (weights > 0)).sum(-1, keepdim=True))


# ---- the method ---------------------------------------------------------------------------------

def log_likelihood(P, theta, beta, epsilon, demos):
    """Mean log-likelihood of a walk's actions (B), in nats, and its gradients in the arguments.

    L = sum_i (m_i/m) [r_i.f_i - start_i.V_i[0]] with r_i = beta_i (theta + epsilon_i): a walk's
    log pi = Q - V telescope. The derivative of start.V[0] in r is mu; hence f - mu. The paper has
    no m_i/m in beta_i's and epsilon_i's: only with it are the three the gradient of one function.
    theta (B, S), beta (B, D), epsilon (B, D, S).
    """
    features, start, walks = demos
    share = walks / walks.sum(-1, keepdim=True)
    wanted = theta[..., None, :] + epsilon
    V, policy = soft_optimal(P, beta[..., None] * wanted)
    mu = occupancy(P, start, policy).sum((-3, -1))
    gap = share[..., None] * (features - mu)
    explained = beta * (wanted * features).sum(-1) - (start * V[..., 0, :]).sum(-1)
    for_epsilon = beta[..., None] * gap
    return (share * explained).sum(-1), (for_epsilon.sum(-2), (gap * wanted).sum(-1), for_epsilon)


def irleed(P, demos, s, expertise=True, bias=True):
    """theta (B, S), log beta (B, D) and epsilon (B, D, S) by maximum a posteriori, with L-BFGS.

    Each has a normal prior of mean 0 and width s.width. Without expertise log beta stays 0, without
    bias epsilon does: without both this is MaxEnt IRL. With them the problem is not convex; it
    starts where all are alike, from zeros.
    """
    features, _, walks = demos
    theta, log_beta, epsilon = map(torch.zeros_like, (features[..., 0, :], walks, features))
    learned = [theta] + [log_beta] * expertise + [epsilon] * bias
    optimizer = torch.optim.LBFGS([x.requires_grad_() for x in learned], max_iter=s.steps,
                                  history_size=20, tolerance_grad=1e-6, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")
    precision = 1 / (s.width ** 2 * walks.sum(-1))     # per walk, as the log-likelihood is

    @torch.no_grad()
    def loss():
        value, gradients = log_likelihood(P, theta, log_beta.exp(), epsilon, demos)
        for_log_beta = log_beta.exp() * gradients[1]
        # No step changes the sum of log beta: along it the likelihood is flat, if theta follows.
        for_log_beta = for_log_beta - for_log_beta.mean(-1, keepdim=True)
        total = -value.sum()        # Cases share nothing: their sum is least where each of them is.
        for x, gradient in zip((theta, log_beta, epsilon),
                               (gradients[0], for_log_beta, gradients[2])):
            scale = precision.reshape(*precision.shape, *[1] * (x.ndim - precision.ndim))
            x.grad = scale * x - gradient
            total = total + (scale * x ** 2).sum() / 2
        return total

    optimizer.step(loss)
    return theta.detach(), log_beta.detach(), epsilon.detach()


# ---- the experiment -----------------------------------------------------------------------------

def experiment(s):
    """Every method on every set of demonstrators, (seeds, spreads, biases) at once.

    Returns {method: golden return (seeds, spreads, biases)}; {method: log beta (..., D)}.
    """
    world, start = grid()
    generator = torch.Generator().manual_seed(s.seed)
    # In all of a seed's settings the biases differ in size alone, so that settings pair up.
    epsilon = BIASES[:, None, None] * torch.randn(
        s.seeds, 1, 1, len(LADDER), len(world.cells), generator=generator, dtype=torch.float64)
    beta = MEAN_BETA * torch.exp(SPREADS[:, None, None] * LADDER)
    policies = soft_optimal(world.P, beta[..., None] * (world.golden + epsilon))[1]
    demos = demonstrate(world, start, policies, s.walks, generator)
    own = golden_return(world, start, policies)
    # Only golden can say who is best: "best alone" is told, as nobody is outside of a toy world.
    best = one_hot(own.argmax(-1), len(LADDER)).double()
    jobs = [(merged(demos, torch.full_like(own, 1 / len(LADDER))), False, False),
            (merged(demos, best), False, False),
            (demos, True, False), (demos, False, True), (demos, True, True)]
    fits = in_threads(lambda job: irleed(world.P, job[0], s, *job[1:]), jobs, torch.device("cpu"))
    scores = {name: golden_return(world, start, greedy(world.P, theta))
              for name, (theta, _, _) in zip(METHODS, fits)}
    scores["demonstrators"] = own.mean(-1)
    return scores, {name: log_beta for name, (_, log_beta, _) in zip(METHODS, fits)}


def intervals(values):
    """[means, half-widths of their 95% intervals] over the seeds of values (seeds, ...)."""
    cases = [mean_ci(case) for case in values.flatten(1).T]
    return [torch.tensor(x).reshape(values.shape[1:]).tolist() for x in zip(*cases)]


def percent(mine, base, of_settings):
    """By how many % mine lies above base: (mean, half-width), by the jackknife over seeds.

    of_settings: the mean of the settings' percentages, as the paper has it; else that of the mean
    return over all settings. (seeds, spreads, biases) each.
    """
    def rise(keep):
        a, b = (x[keep].mean(0) if of_settings else x[keep].mean() for x in (mine, base))
        return 100 * (a / b - 1).mean().item()
    n = len(mine)
    everybody = rise(torch.arange(n))
    _, half = mean_ci([n * everybody - (n - 1) * rise(torch.arange(n) != i) for i in range(n)])
    return everybody, half


# ---- tables and figure --------------------------------------------------------------------------
def print_tables(scores, gains, s):
    """Golden return by method (rows) and setting (columns), and what each gains on the pooled."""
    print(f"golden return of the optimal policy for theta, % of the most possible; ± {s.seeds} seeds")
    for i, spread in enumerate(SPREADS):
        print(f"\nspread of log beta ±{spread:g}, bias" + "".join(f"{b:12.1f}" for b in BIASES))
        for name, values in scores.items():
            means, halves = intervals(100 * values[:, i])
            print(f"{name:27}" + "".join(f"{m:7.1f} ±{h:3.0f}" for m, h in zip(means, halves)))
    print("\nover MaxEnt IRL, pooled    points      % of all returns   % by setting, then mean")
    for name, of in gains.items():
        print(f"{name:23}" + "".join(f"{m:+10.1f} ± {h:4.1f}" for m, h in of.values()))
    print(f"the paper's IRLEED{'':37}{PAPER:+10.1f}")


def draw(scores, log_beta):
    """The figure: returns by bias where expertise differs most; what IRLEED gains; log beta."""
    figure, axes = pyplot().subplot_mosaic([["return", "pooled", "beta"], ["return", "best", "beta"]],
                                           figsize=(10, 4.2), width_ratios=(1.25, 1, 1))
    for name, values in scores.items():
        axes["return"].errorbar(BIASES, *intervals(100 * values[:, -1]), label=name, ms=5,
                                **METHODS[name])
    axes["return"].set(xlabel="bias (a goal is worth 1 per step)", xticks=BIASES.tolist(),
                       ylabel="golden return, % of the most possible",
                       title="expertise from 1/20 to 20 times the mean")
    axes["return"].legend(loc="lower left")
    for ax, base in ((axes["pooled"], "MaxEnt IRL, pooled"), (axes["best"], "MaxEnt IRL, best alone")):
        means, halves = intervals(100 * (scores["IRLEED"] - scores[base]))
        ax.imshow(means, cmap="RdBu", vmin=-50, vmax=50, aspect="auto")
        for i, row in enumerate(means):
            for j, mean in enumerate(row):
                ax.text(j, i, f"{mean:+.0f}\n±{halves[i][j]:.0f}", ha="center", va="center", size=8)
        ax.set(title=f"IRLEED less {base}", xticks=range(len(BIASES)), yticks=range(len(SPREADS)),
               xticklabels=[f"{b:g}" for b in BIASES], yticklabels=[f"±{x:g}" for x in SPREADS],
               ylabel="spread of log β")
        ax.grid(False)
    axes["best"].set_xlabel("bias")
    for name, j, label in (("expertise only", 0, "expertise only, no bias"),
                           ("IRLEED", 0, "IRLEED, no bias"), ("IRLEED", -1, "IRLEED, strongest bias")):
        axes["beta"].errorbar(SPREADS[-1] * LADDER, *intervals(log_beta[name][:, -1, j]), label=label,
                              **METHODS[name] | ({} if j == 0 else {"ls": "--", "mfc": "white"}))
    axes["beta"].axline((0, 0), slope=1, color="black", lw=1, label="true")
    axes["beta"].set(xlabel="true log β, less its mean", ylabel="estimated log β",
                     title="expertise, known up to a scale")
    axes["beta"].legend()
    return figure


def main(s):
    """Run the sweep, print the tables, write expertise.png and results.json."""
    out = make_folder(s.out)
    scores, log_beta = experiment(s)
    base = scores["MaxEnt IRL, pooled"]
    gains = {name: {"points": mean_ci(100 * (values - base).mean((1, 2))),
                    "percent": percent(values, base, False),
                    "percent by setting": percent(values, base, True)}
             for name, values in scores.items() if values is not base}
    print_tables(scores, gains, s)
    results = {"spreads": SPREADS.tolist(), "biases": BIASES.tolist(), "gain": gains, "paper": PAPER,
               "return": {name: intervals(values) for name, values in scores.items()},
               "log beta": {name: intervals(log_beta[name]) for name in ("expertise only", "IRLEED")}}
    write_world(out, s, results, {"expertise": draw(scores, log_beta)})


if __name__ == "__main__":
    run_script(lambda: main(parse_settings(Settings)))
