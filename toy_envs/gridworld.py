"""A gridworld with slip: why known dynamics matter when the demonstrations are few.

A demonstrator walks from S to G around a lake of lava, by the upper or by the lower route, and one
step in five slips to the side. From n of its walks, and never from the reward, each method
makes a policy:

- behaviour cloning (BC) copies the action seen in each state. It never asks where its own steps
  lead, and where it was shown nothing the likelihood leaves it free: it moves at random there.
- occupancy matching knows the dynamics P. It rolls itself out, exactly, and lowers the divergence
  of its own occupancy from that of the demonstrations: an unseen state has no action to copy, but
  some actions lead back to states that were seen, and these are worth more.
- MaxEnt IRL knows P too. It finds a reward under which the demonstrations are likely, then plans.

Known dynamics, which in the token MDP are concatenation, are worth most with one demonstration.
With a hundred hardly a state is unseen, and cloning is as good or slightly better: matching also
copies the luck of the sample. Run `python -m toy_envs.gridworld`.

The world itself and its dynamic programming are in grids.py, with the shapes. Here any leading
batch is (seeds, numbers of demonstrations). All expectations are computed: only the walks are
sampled.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from toy_envs.grids import (MOVES, advantage, distances, draw_map, empirical_occupancy, marked,
                            occupancy, over_time, read_map, sample_walks, soft_value_iteration)
from utils.cli import InputError, make_folder, parse_settings, require, run_script, setting
from utils.evaluate import mean_ci
from utils.plots import COLORS, pyplot, write_world

# S start, G goal, x lava; u and l are the gates of the upper and of the lower route, free cells.
# Two rows lead past the lava on either side, so that a careful walker can keep off its shore.
MAP = ("....u....",
       "....u....",
       "...xxx...",
       "S..xxx..G",
       "...xxx...",
       "....l....",
       "....l....")
MAX_ENTRIES = 5_000_000  # of one policy[B,t,s,a]: a run holds about a dozen arrays of this size
STEP = 0.1      # of occupancy matching, in logits per unit of advantage; at 0.5 it oscillates
FLOOR = 0.01    # of the discriminator's counts, in steps per walk: one step in a hundred walks


@dataclass
class Settings:
    """Behaviour cloning, occupancy matching and MaxEnt IRL in a gridworld with slip."""
    seed: int = setting(0, "seed of all demonstrations", 0, 2 ** 32)
    seeds: int = setting(20, "independent sets of demonstrations (the intervals are over these)")
    demos: str = setting("1,3,10,30,100", "numbers of demonstrations, comma-separated")
    slip: float = setting(0.2, "probability of a step to the side (Russell and Norvig's 0.1 each)")
    horizon: int = setting(35, "steps of an episode: twice what the longer way takes, 14 / 0.8")
    out: str = setting("out/gridworld", "folder for gridworld.png and results.json")


# ---- the demonstrator ---------------------------------------------------------------------------

def route_policies(world, horizon, temperature=0.2):
    """The demonstrator's two ways, (2, T, S, A): near-optimal where the other's gate costs 1. At
    the default temperature a wasted step is e^5 times less likely."""
    gates = torch.stack([marked(world.cells, "l"), marked(world.cells, "u")])
    reward = (world.golden - gates)[..., None].expand(-1, -1, len(MOVES))
    return soft_value_iteration(world.P, reward, horizon, temperature)[1]


# ---- the method: three ways to learn from demonstrations -----------------------------------------

def behaviour_cloning(rho_demo, distance=None):
    """The maximum-likelihood policy pi(a|s) = rho_demo(s,a) / rho_demo(s): (..., S, A), for all t.

    A state without data does not enter the likelihood: no policy there is likelier than another,
    and it stays uniform. A better answer must know something of the world: given a distance (S, S),
    an unseen state copies the nearest seen one (ties: the first), which is geometry, not dynamics.
    """
    visits = rho_demo.sum(-1)
    # An unseen state is 0/0, which is nan.
    policy = torch.nan_to_num(rho_demo / visits[..., None], nan=1 / rho_demo.shape[-1])
    if distance is None:
        return policy
    # An unseen state has nothing to be copied: it counts as infinitely far away.
    far = torch.where(visits > 0, 0.0, torch.inf)[..., None, :]
    nearest = (distance + far).argmin(-1)
    return policy.gather(-2, nearest[..., None].expand_as(policy))


def log_ratio(rho_demo, rho, floor=FLOOR):
    """The tabular discriminator's optimum h*(s,a) = log(rho_demo + floor) - log(rho + floor).

    Of the logistic loss -sum [(rho_demo + floor) log D + (rho + floor) log(1 - D)], D = sigmoid(h):
    floor steps in each (s,a) bear both labels, which keeps h finite where nothing was demonstrated.
    The logit is high for demonstrations. rho_demo, rho: (..., S, A) in steps per walk.
    """
    return torch.log(rho_demo + floor) - torch.log(rho + floor)


def occupancy_matching(P, start, rho_demo, horizon, reward, rounds=100):
    """Adversarial imitation, discriminator and roll-outs exact: minimise D_f(demo || policy).

    Each round: h = the discriminator's optimum against the policy's own occupancy; r = reward(h),
    held constant (h for the reverse KL, softplus(h) for Jensen-Shannon, which is GAIL); one step of
    the natural policy gradient (Kakade 2001), which adds STEP * A[t,s,a] to the logits. The plain
    gradient weighs that by mu_t(s), and so would hardly move in the states into which the policy
    seldom slips: the very ones that matter here.
    rho_demo (..., S, A) in steps per walk -> policy (..., T, S, A).
    """
    # The policy starts uniform: nothing is borrowed from behaviour cloning.
    policy = over_time(torch.full_like(rho_demo, 1 / rho_demo.shape[-1]), horizon)
    for _ in range(rounds):
        rho = occupancy(P, start, policy).sum(-3)
        r = reward(log_ratio(rho_demo, rho))
        policy = policy * torch.exp(STEP * advantage(P, r, policy))
        policy = policy / policy.sum(-1, keepdim=True)
    return policy


def maxent_irl(P, start, rho_demo, horizon, precision):
    """MaxEnt IRL (Ziebart et al., AAAI 2008): one reward per state, by maximum a posteriori.

    Minimises V_w(start) - w.f_demo + precision/2 |w|^2: the first two are -E_demo[log pi_w] of the
    soft-optimal policy for reward w, once the demonstrator's slips average out. Convex; gradient
    f_pi - f_demo + precision w, where the features f are the steps spent in each state, so that at
    precision 0 their expectations match. A state that no demonstration entered would then go to
    minus infinity: a normal prior of width sigma stops it, precision = 1 / (n sigma^2) for n walks.
    rho_demo (..., S, A), precision broadcastable to (..., 1) -> w (..., S) in nats per step, which
    estimates golden / temperature where demonstrations came near, and its policy (..., T, S, A).
    """
    f_demo = rho_demo.sum(-1)
    w = torch.zeros_like(f_demo, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, history_size=20, tolerance_grad=1e-6,
                                  line_search_fn="strong_wolfe")

    @torch.no_grad()
    def loss():
        V, policy = soft_value_iteration(P, w[..., None].expand_as(rho_demo), horizon)
        f = occupancy(P, start, policy).sum((-3, -1))
        # The gradient is known, and cheaper so than by autograd through the recurrences.
        w.grad = f - f_demo + precision * w
        return (V[..., 0, :] @ start).sum() + (w * (precision / 2 * w - f_demo)).sum()

    optimizer.step(loss)
    w = w.detach()
    return w, soft_value_iteration(P, w[..., None].expand_as(rho_demo), horizon)[1]


# ---- the experiment -----------------------------------------------------------------------------

def score(world, rho, seen):
    """Golden return, failure rate and drift of occupancies (..., T, S, A), each of shape (...).

    Failure: not in the goal at the last step. Drift: steps spent in cells that no demonstration
    entered, seen (..., S), lava and goal (where the walk is over) not counted.
    """
    mu, end = rho.sum((-3, -1)), rho[..., -1, :, :].sum(-1)
    walking = 1 - marked(world.cells, "Gx")
    return {"return": mu @ world.golden, "failure": 1 - end @ marked(world.cells, "G"),
            "drift": (mu * ~seen * walking).sum(-1)}


def checked_counts(s):
    """The numbers of demonstrations, ascending; InputError where a setting makes no sense."""
    try:
        counts = sorted({int(word) for word in s.demos.split(",")})
    except ValueError:
        raise InputError(f"--demos {s.demos}: expected whole numbers, like 1,10,100") from None
    require(min(counts[0], s.horizon) >= 1, "--demos and --horizon must be at least 1")
    require(s.seeds >= 2, f"--seeds {s.seeds}: an interval needs at least 2")
    require(0 <= s.slip <= 1, f"--slip {s.slip}: a probability lies between 0 and 1")
    entries = s.seeds * s.horizon * max(len(counts) * len("".join(MAP)) * 4, counts[-1])
    require(entries <= MAX_ENTRIES, "--seeds, --demos and --horizon together ask for arrays of "
                                    f"{entries:,} entries; the limit is {MAX_ENTRIES:,}")
    return counts


def intervals(values):
    """[means, half-widths of their 95% intervals] over the seeds of values (seeds, counts)."""
    return [list(row) for row in zip(*(mean_ci(of_count) for of_count in values.T))]


def experiment(world, s, counts):
    """Every method on every set of demonstrations: (seeds, numbers of demonstrations) at once.

    Returns scores {method: {measure: (seeds, counts)}}, the demonstrator's own {measure: ()}, and
    the figure's maps: steps spent {method: (seeds, counts, S)}, cells seen and reward the same.
    """
    P, start, T, S = world.P, world.start, s.horizon, len(world.cells)
    generator = torch.Generator().manual_seed(s.seed)
    experts = route_policies(world, T)
    # A seed's first n walks are its n demonstrations, so that methods and numbers compare in pairs.
    states, actions = sample_walks(P, start, experts, (s.seeds, counts[-1]), generator)
    rho_demo = torch.stack([empirical_occupancy(states[:, :n], actions[:, :n], S, len(MOVES))
                            for n in counts], 1)
    precision = 1 / torch.tensor(counts)[:, None]   # The prior's width is 1 nat per cell.
    reward, planned = maxent_irl(P, start, rho_demo, T, precision)
    policies = {
        "BC": over_time(behaviour_cloning(rho_demo), T),
        "BC nearest": over_time(behaviour_cloning(rho_demo, distances(world)), T),
        "matching KL": occupancy_matching(P, start, rho_demo, T, lambda h: h),
        "matching JS": occupancy_matching(P, start, rho_demo, T, softplus),
        "MaxEnt IRL": planned,
    }
    maps, scores = {"seen": rho_demo.sum(-1) > 0, "reward": reward}, {}
    for name, policy in policies.items():
        rho = occupancy(P, start, policy)
        maps[name], scores[name] = rho.sum((-3, -1)), score(world, rho, maps["seen"])
    rho = occupancy(P, start, experts).mean(0)
    maps["expert"] = rho.sum((0, 2))
    return scores, score(world, rho, torch.ones(S, dtype=torch.bool)), maps


# ---- tables and figure --------------------------------------------------------------------------

def print_tables(summary, expert, counts):
    """Each measure by method (rows) and number of demonstrations (columns): mean and 95%."""
    for measure, unit, factor in (("return", "steps in the goal less steps in lava", 1),
                                  ("failure", "% not in the goal at the end", 100),
                                  ("drift", "steps where no demonstration went", 1)):
        print(f"{measure}: {unit}; the demonstrator's is {factor * expert[measure]:.2f}")
        print("demonstrations" + "".join(f"{n:>13}" for n in counts))
        for name, measures in summary.items():
            cells = [f"{factor * mean:.2f}±{factor * half:.2f}"
                     for mean, half in zip(*measures[measure])]
            print(f"{name:14}" + "".join(f"{cell:>13}" for cell in cells))
        print()


def draw_maps(figure, world, scores, expert, maps, counts):
    """Where the first seed's learners go from one set of demonstrations, and the reward found."""
    *axes, last = figure.subplots(1, 4)
    steps = {"cmap": "Greys", "norm": "log", "vmin": 0.02, "vmax": 20}
    draw_map(axes[0], world, maps["expert"].clamp(min=0.02),
             f"demonstrator: two routes\nfails {expert['failure']:.1%}", **steps)
    for ax, name, title in ((axes[1], "BC", "behaviour cloning"),
                            (axes[2], "matching KL", "occupancy matching")):
        draw_map(ax, world, maps[name][0, 0].clamp(min=0.02), f"{title}, {counts[0]} demo\nfails "
                 f"{scores[name]['failure'][0, 0]:.0%}", maps["seen"][0, 0], **steps)
    figure.colorbar(axes[0].images[0], ax=axes, location="bottom", aspect=60,
                    label="steps spent (• cell in the demonstration, × lava)")
    reward = maps["reward"][:, -1].mean(0)
    draw_map(last, world, reward, f"reward by MaxEnt IRL\n{counts[-1]} demos, mean of seeds",
             cmap="RdBu", vmin=-reward.abs().max(), vmax=reward.abs().max())
    figure.colorbar(last.images[0], ax=last, location="bottom", label="nats per step")


def draw_curves(figure, summary, expert, counts):
    """Return and failure rate by the number of demonstrations, with their 95% intervals."""
    colours = ("forward_kl", "forward_kl", "reverse_kl", "jensen_shannon", "length")
    for ax, measure, label in zip(figure.subplots(1, 2), ("return", "failure"),
                                  ("golden return (steps)", "failure rate")):
        ax.axhline(expert[measure], color=COLORS["demo"], lw=1, label="demonstrator")
        for (name, measures), colour in zip(summary.items(), colours):
            ax.errorbar(counts, *measures[measure], label=name, color=COLORS[colour], marker="o",
                        ms=3, ls="--" if name == "BC nearest" else "-")
        ax.set(xlabel="demonstrations", ylabel=label, xscale="log", xticks=counts,
               xticklabels=counts)
        ax.minorticks_off()
    ax.legend()


def main(s):
    """Run the experiment, print the tables, write gridworld.png and results.json."""
    counts = checked_counts(s)
    out = make_folder(s.out)
    world = read_map(MAP, s.slip)
    scores, expert, maps = experiment(world, s, counts)
    summary = {name: {measure: intervals(values) for measure, values in measures.items()}
               for name, measures in scores.items()}
    print_tables(summary, expert, counts)
    print(f"± is a 95% interval over {s.seeds} sets of demonstrations")
    figure = pyplot().figure(figsize=(10, 5.8))
    above, below = figure.subfigures(2, 1)
    draw_maps(above, world, scores, expert, maps, counts)
    draw_curves(below, summary, expert, counts)
    # Of each method and measure the results hold the means and the half-widths of their intervals.
    write_world(out, s, {"demonstrations": counts, **summary,
                         "demonstrator": {measure: x.item() for measure, x in expert.items()}},
                {"gridworld": figure})


if __name__ == "__main__":
    torch.set_num_threads(1)    # The tensors are small: a second thread costs more than it gives.
    run_script(lambda: main(parse_settings(Settings)))
