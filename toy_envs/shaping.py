"""The same log-density as reward, as potential, as logit: what moves the goal, what shows the way.

Each step costs 1 until the goal G: the golden reward is sparse, it never says which way. What
demonstrations show (good ones, ones that stay half-way, ones to a wrong goal W) can be used as

- a reward, as AfD does:       r + lambda log(p(s,a) + e^-5)      p: the demonstrations' density
- a potential over (s,a):      r + gamma Phi(s',a') - Phi(s,a)    Phi = log(p(s,a) + e^-5)
- a potential over goals:      r + gamma phi(s',g') - phi(s,g)    phi = -|s - g|_1  (D-Shape)
- a reward read off logits:    log pi(a|s) + V(s) - V(s')         for any V that is 0 at the end

A reward moves the optimum as far as the demonstrations are bad and lambda is large. A potential
never does, for any demonstrations, since its sum along a walk telescopes: it only changes what is
tried first. A reward from logits is known up to a potential. Run `python -m toy_envs.shaping`.

Sources: Ng, Harada & Russell (ICML 1999); Wiewiora, Cottrell & Elkan (ICML 2003) and Wiewiora (JAIR
2003); the density with its floor is arXiv:2011.01298, whose p is a flow or a GAN, here counts (the
floor bounds the log where p is small, as `floored` in reward.py does); D-Shape is arXiv:2210.14428;
logits are EndoRM, arXiv:2506.23235. Differs from D-Shape's paper: no time in the state, a discount,
and one relabelled goal a step, from any two states in a row of the episode.
Shapes as in grids.py; B learners, G goals (one, or each cell). Rewards and phi are in steps, Phi in
nats, all at weight 1 where nothing else is said.
"""

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from toy_envs.grids import (MOVES, distances, draw_map, empirical_occupancy, marked, read_map,
                            sample_walks, soft_value_iteration, value_iteration)
from utils.cli import make_folder, parse_settings, run_script, setting
from utils.evaluate import mean_ci
from utils.plots import COLORS, pyplot, write_world

MAP = ("........G", *2 * (".........",), ".....M...", "...S.....", *3 * (".........",), "W........")
KINDS = {"good": "G", "half-way": "M", "wrong goal": "W"}   # where demonstrations go, and stay
WEIGHTS = (0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0)              # lambda
DISCOUNT, FLOOR, PLANNED = 0.98, math.exp(-5), 300          # PLANNED: steps of exact planning
RATE, EPSILON = 1.0, 0.1    # of Q-learning; nothing is random in this world, so the rate may be 1


@dataclass
class Settings:
    """Demonstrations as reward, as potential (density, D-Shape) and as logit."""
    seed: int = setting(0, "seed of demonstrations and learners", 0, 2 ** 32)
    seeds: int = setting(20, "independent runs (the intervals are over these)", 2, 100)
    demos: int = setting(20, "walks that a density is counted from; D-Shape gets the first", 1, 100)
    episodes: int = setting(200, "episodes of Q-learning", 10, 10_000)
    horizon: int = setting(30, "steps of an episode, and of a demonstration", 10, 200)
    out: str = setting("out/shaping", "folder for shaping.png and results.json")


# ---- demonstrations -----------------------------------------------------------------------------

def demonstrate(world, cell, s, generator):
    """log(p(s,a) + e^-5), (seeds, S, A), counted from walks of a soft-optimal walker to a cell
    (temperature 0.2, as in gridworld.py), and the first walk of each seed (seeds, T)."""
    there = marked(world.cells, cell)[:, None].expand(-1, len(MOVES))
    policy = soft_value_iteration(world.P, there, s.horizon, temperature=0.2)[1]
    walks = sample_walks(world.P, world.start, policy[None], (s.seeds, s.demos), generator)
    p = empirical_occupancy(*walks, len(there), len(MOVES)) / s.horizon
    return torch.log(p + FLOOR), walks[0][:, 0]


def next_goal(walk, S):
    """The goal that follows each goal, (S,): a walk's next state, and from other cells the same. A
    state seen twice goes on as it did the last time: this cuts the loops out of the walk."""
    after = torch.arange(S)
    for state, following in zip(walk[:-1].tolist(), walk[1:].tolist()):
        after[state] = following
    return after


# ---- the method ---------------------------------------------------------------------------------

def walk_greedily(world, values, runs, horizon):
    """gamma^(steps - fewest) of the walk that argmax values(t, s) (B, A) leads to, 0 if it does not
    arrive: the golden return (B,), scaled so that the best is 1 and never to arrive is 0."""
    s, goal = world.start.argmax().expand(runs), marked(world.cells, "G").bool()
    steps = -distances(world)[s[0], goal].sum().expand(runs)
    for t in range(horizon):
        steps = steps + ~goal[s]
        s = world.P[s, values(t, s).argmax(-1)].argmax(-1)
    return DISCOUNT ** steps * goal[s]


def q_learning(world, s, reward, potential, after, relabel, start=0.0):
    """Yields, an episode each, values(t, s) = Q + Phi (B, A), states (B, T+1), steps to G (B,).

    Q(x,a) += rate [r + gamma (Q + Phi)(x',a') - Phi(x,a) - Q(x,a)],  a' = argmax Q + Phi, where
    the state x is goal and cell: reward, potential (B, G, S, A), after (B, G) the next goal; Q is
    at first start. After an episode as many of its steps are seen once more, drawn at random. Where
    relabel (B,), their goals g, g' are two states in a row of it (hindsight): Q = Q* - phi(s,g) is
    the fixed point for every g, g', so invented goals do no harm unless the reward knows of goals.
    """
    B, G, S, A = potential.shape
    generator, end = torch.Generator().manual_seed(s.seed), marked(world.cells, "G").bool()
    # Chance breaks ties once and for all: argmax alone would prefer the first action.
    Q = start + 1e-9 * torch.rand(B, G, S, A, generator=generator, dtype=torch.float64)
    # Nothing is worth anything after the end: were a potential left there, its sum would count.
    Q, phi, reward = (torch.where(end[:, None], 0.0, x).reshape(B, G * S, A)
                      for x in (Q, potential, reward))
    row, to, goals = torch.arange(B), world.P.argmax(-1), [world.start.argmax().expand(B) * (G > 1)]
    for _ in range(s.horizon):
        goals.append(after[row, goals[-1]])
    goals = torch.stack(goals, 1)

    def values(x):
        return Q[row, x] + phi[row, x]

    def update(x, a, x_next, walking=True):
        best = values(x_next).amax(-1)
        error = reward[row, x, a] + DISCOUNT * best - phi[row, x, a] - Q[row, x, a]
        Q[row, x, a] += RATE * walking * error

    for _ in range(s.episodes):
        states = [world.start.argmax().expand(B)]
        actions = torch.randint(A, (s.horizon, B), generator=generator)
        explore = torch.rand(s.horizon, B, generator=generator) < EPSILON
        for t in range(s.horizon):
            x = goals[:, t] * S + states[t]
            actions[t] = actions[t].where(explore[t], values(x).argmax(-1))
            states.append(to[states[t], actions[t]])
            update(x, actions[t], goals[:, t + 1] * S + states[t + 1], ~end[states[t]])
        states = torch.stack(states, 1)
        taken = (~end[states[:, :-1]]).sum(1)
        again = torch.rand(2, s.horizon, B, generator=generator)
        for t, other in zip((again[0] * taken).long(), (again[1] * (taken + 1)).long()):
            g, g_next = (torch.where(relabel, states[row, (other + k).clamp(max=s.horizon)],
                                     goals[row, t + k]) for k in (0, 1))
            update(g * S + states[row, t], actions[t, row], g_next * S + states[row, t + 1])
        yield lambda t, at: values(goals[:, t] * S + at), states, taken


def learn(world, s, *learners):
    """Steps until the greedy policy first has 95% of the optimal return, or all steps; whether it
    ever had; its mean return in the last tenth of the episodes. (3, B)."""
    total, returns, steps, row = 0, [], [], torch.arange(len(learners[0]))
    for values, _, taken in tqdm(q_learning(world, s, *learners), "Q-learning", s.episodes,
                                 disable=None, leave=False):
        total = total + taken
        steps.append(total.double())
        returns.append(walk_greedily(world, values, len(row), s.horizon))
    returns, steps = torch.stack(returns), torch.stack(steps)
    ever = (returns >= 0.95).any(0)
    first = (returns >= 0.95).double().argmax(0).where(ever, s.episodes - 1)
    return torch.stack([steps[first, row], ever.double(), returns[-(s.episodes // 10):].mean(0)])


def logit_rewards(logits, end):
    """r = f(s,a) - V(s') = log pi(a|s) + V(s) - V(s') of logits f, V = logsumexp_a f, in nats.

    logits: a list over t of (A^t, A), after every prefix in dictionary order. end (A^T,): V of
    whole sequences. For any V, soft value iteration under r gives pi back. Returns the same shapes.
    """
    V = [step.logsumexp(-1) for step in logits[1:]] + [end]
    return [step - v.view_as(step) for step, v in zip(logits, V)]


# ---- the experiment -----------------------------------------------------------------------------

def plan(world, reward, potential):
    """mean_ci over runs of the scaled golden return of a shaped reward's exact optimum. reward and
    potential: (B, S, A), or with time (T, B, S, A)."""
    reward, potential = (x.expand(PLANNED, *x.shape[-3:]) for x in (reward, potential))
    values = value_iteration(world.P, reward, potential, DISCOUNT) + potential
    row = torch.arange(values.shape[1])
    return mean_ci(walk_greedily(world, lambda t, at: values[t, row, at], len(row), PLANNED))


def experiment(world, s):
    """mean_ci over seeds of exact optima {use: {kind: [by lambda]}}, and of what learn tells,
    {"method: kind": [three]}."""
    generator, S, d = torch.Generator().manual_seed(s.seed), len(world.cells), distances(world)
    walking, to = (1 - marked(world.cells, "G"))[:, None], world.P.argmax(-1)
    golden, row = -walking.expand(s.seeds, S, len(MOVES)), torch.arange(s.seeds)
    none, no = 0 * golden, torch.zeros(s.seeds, dtype=torch.bool)
    flat = {"plain Q-learning": none, "constant, log e^-5": none + math.log(FLOOR)}
    exact, goals = {use: {} for use in ("reward", "potential", "distance", "D-Shape")}, {}
    for kind, cell in KINDS.items():
        density, walk = demonstrate(world, cell, s, generator)
        flat[f"density: {kind}"] = density
        flat[f"nearest state shown: {kind}"] = none - d[:, walk].amin(-1).T[..., None]
        exact["reward"][kind] = [plan(world, golden + w * density, none) for w in WEIGHTS]
        exact["potential"][kind] = [plan(world, golden, w * density * walking) for w in WEIGHTS]
        after = torch.stack([next_goal(one, S) for one in walk])
        r, phi = golden[:, None].expand(-1, S, -1, -1), none[:, None] - d[:, :, None]   # of g, s, a
        nearer = r - d[after][:, :, to] * walking           # golden and -|s' - g'|
        goals[f"goals, no shaping: {kind}"] = r, 0 * phi, after, no
        goals[f"D-Shape: {kind}"] = r, phi, after, ~no
        goals[f"D-Shape, own goals: {kind}"] = r, phi, after, no
        goals[f"distance as reward: {kind}"] = nearer, 0 * phi, after, no
        path = [walk[:, 0]]
        for _ in range(PLANNED - 1):
            path.append(after[row, path[-1]])
        at = row, torch.stack(path)                         # the goals over time: (T, seeds)
        exact["distance"][kind] = [plan(world, nearer[at], none)]
        exact["D-Shape"][kind] = [plan(world, golden, (phi * walking)[at])]
    flat = {k: (golden[:, None], x[:, None], no.long()[:, None], no) for k, x in flat.items()}
    learned = {}
    for group in (flat, goals):
        of_all = learn(world, s, *(torch.cat(parts) for parts in zip(*group.values())))
        learned |= zip(group, [[*map(mean_ci, of)] for of in of_all.split(s.seeds, 1)])
    return exact, learned


# ---- table and figure ---------------------------------------------------------------------------

def print_tables(exact, learned):
    """Exact optima by lambda; what Q-learning needs and reaches; means and 95% half-widths."""
    print("golden return of the exact optimum (1 best, 0 never arrives) by lambda; ±: 95%\n"
          + " " * 20 + "".join(f"{w:>10g}" for w in WEIGHTS))
    for use, kinds in exact.items():
        for kind, row in kinds.items():
            print(f"{use}, {kind}".ljust(21) + "".join(f"{m:5.2f}±{half:.2f}" for m, half in row))
    print(f"\n{'Q-learning':32}{'steps to 95%':>14}{'reached':>9}{'last tenth':>13}")
    for name, ((steps, half), (reached, _), (last, width)) in learned.items():
        print(f"{name:32}{steps:>8.0f} ±{half:<4.0f}{reached:>9.0%}{last:>8.2f}±{width:.2f}")


def draw(exact, learned):
    """The figure: how far each use moves the optimum, and the steps that Q-learning needs."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4.2), width_ratios=(1, 1.15))
    looks = {"good": ("jensen_shannon", "o", -0.15), "half-way": ("demo", "s", 0),
             "wrong goal": ("sft-demo", "^", 0.15), "": ("random", "D", 0)}
    for kind in KINDS:
        left.errorbar(WEIGHTS, *zip(*exact["reward"][kind]), color=COLORS[looks[kind][0]],
                      marker=looks[kind][1], label=f"as reward, {kind}")
    left.plot(WEIGHTS, [mean for mean, _ in exact["potential"]["wrong goal"]], "k--",
              zorder=3, label="as potential, all three")
    methods = [*dict.fromkeys(name.partition(": ")[0] for name in learned)]
    for name, (steps, _, last) in learned.items():
        method, _, kind = name.partition(": ")
        colour, marker, shift = looks[kind]
        right.errorbar(steps[0], methods.index(method) + shift, xerr=steps[1], marker=marker,
                       color=COLORS[colour], mfc=None if last[0] > 0.9 else "white")
    left.set(xscale="log", xlabel=r"weight $\lambda$ of the demonstrations' log-density",
             ylabel="golden return of the exact optimum (1: the best)",
             title="a reward moves the optimum, a potential never")
    left.legend(loc=(0.56, 0.6), fontsize=8)
    right.set(xscale="log", xlim=(1, None), ylim=(len(methods) - 0.5, -0.5),
              yticks=range(len(methods)), yticklabels=methods,
              xlabel="steps until 95% of the best (hollow: not kept to the end)",
              title="what demonstrations save or cost Q-learning")
    return figure


def main(s):
    """Plan and learn, print the tables, write shaping.png and results.json."""
    out = make_folder(s.out)
    exact, learned = experiment(read_map(MAP, slip=0), s)
    print_tables(exact, learned)
    write_world(out, s, {"weights": WEIGHTS, "exact": exact, "learned": learned},
                {"shaping": draw(exact, learned)})


if __name__ == "__main__":
    torch.set_num_threads(1)    # The tensors are small: a second thread costs more than it gives.
    run_script(lambda: main(parse_settings(Settings)))
