"""What the gridworlds share: the dynamics of a map, and exact dynamic programming over it.

Shapes: T horizon, S states, A actions; leading dimensions (...) are cases side by side.
Time-indexed arrays follow the published recurrences: V[t,s], Q[t,s,a], policy[t,s,a] = pi_t(a|s),
occupancy[t,s,a] = P(s_t = s, a_t = a), which sums to T. P[s,a,s'], start[s], reward[s,a]; all of it
float64. A discount is a chance to end after each step: where one is wanted, give discount * P.
"""

import math
from dataclasses import dataclass

import torch

from utils.plots import COLORS

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left as (row, column)


# ---- the world ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class World:
    """A finite MDP; golden (S,) is the reward per step spent in a state, unknown to the learners.

    The goal pays 1 and lava -1 per step; both are absorbing and an episode always lasts T steps:
    nothing is gained by ending it early, and to arrive sooner is to earn more.
    """
    P: torch.Tensor
    start: torch.Tensor
    golden: torch.Tensor
    cells: str          # the map, row by row
    width: int


def read_map(rows, slip):
    """The World of a character map: with probability slip a move goes to one of its two sides.

    rows: equally long strings; S start, G goal, x lava, anything else a free cell. A move off the
    map stays where it is.
    """
    cells, width = "".join(rows), len(rows[0])
    P = torch.zeros(len(cells), len(MOVES), len(cells), dtype=torch.float64)
    for s, cell in enumerate(cells):
        for direction, (down, right) in enumerate(MOVES):
            row, column = s // width + down, s % width + right
            inside = 0 <= row < len(rows) and 0 <= column < width
            to = row * width + column if inside and cell not in "xG" else s
            P[s, direction, to] += 1 - slip
            for turn in (1, -1):    # whoever means to go to a side may slip into this direction
                P[s, (direction + turn) % 4, to] += slip / 2
    return World(P, marked(cells, "S"), marked(cells, "G") - marked(cells, "x"), cells, width)


def distances(world):
    """|s - s'|_1 between all cells, in steps: (S, S)."""
    rows, columns = len(world.cells) // world.width, world.width
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
    return torch.cdist(place, place, p=1)


def marked(cells, characters):
    """1.0 at the cells that hold one of the characters, 0.0 elsewhere: (S,)."""
    return torch.tensor([float(cell in characters) for cell in cells], dtype=torch.float64)


# ---- the method: dynamic programming ------------------------------------------------------------

def occupancy(P, start, policy):
    """How often each state and action come up at each time: the forward recurrence.

    rho[t,s,a] = mu_t(s) pi_t(a|s),  mu_0 = start,  mu_{t+1}(s') = sum_{s,a} rho[t,s,a] P[s,a,s'].
    policy (..., T, S, A) -> the same shape; each t sums to one, all of it to T (no discount).
    """
    mu, steps = start, []
    for pi in policy.unbind(-3):
        steps.append(mu[..., None] * pi)
        mu = torch.tensordot(steps[-1], P, dims=2)  # over s and a
    return torch.stack(steps, dim=-3)


def advantage(P, reward, policy):
    """A[t,s,a] = Q[t,s,a] - V[t,s] of a policy, by the backward recurrence.

    Q[t,s,a] = r(s,a) + E[V[t+1,s'] | s,a],  V[t,s] = sum_a pi_t(a|s) Q[t,s,a],  V[T] = 0.
    reward (..., S, A), policy (..., T, S, A) -> (..., T, S, A).
    """
    V, steps = torch.zeros_like(reward[..., 0]), []
    for pi in reversed(policy.unbind(-3)):      # V[T] is known, so the last step comes first
        Q = reward + torch.einsum("sap,...p->...sa", P, V)
        V = (pi * Q).sum(-1)
        steps.append(Q - V[..., None])
    return torch.stack(steps[::-1], dim=-3)


def soft_value_iteration(P, reward, horizon, temperature=1.0):
    """The policy of maximal return plus temperature times entropy, by soft value iteration.

    Q as in advantage,  V[t,s] = tau logsumexp_a Q[t,s,a] / tau,  pi_t(a|s) = exp((Q - V) / tau).
    With chance in the dynamics this is *causal* entropy (Ziebart, Bagnell & Dey, ICML 2010): the
    paper of 2008 weighs whole paths and so credits a policy with luck; without slip they agree.
    reward (..., S, A) -> V (..., T, S) and policy (..., T, S, A).
    """
    V, values, policies = torch.zeros_like(reward[..., 0]), [], []
    for _ in range(horizon):
        Q = reward + torch.einsum("sap,...p->...sa", P, V)
        V = temperature * torch.logsumexp(Q / temperature, -1)
        values.append(V)
        policies.append(torch.exp((Q - V[..., None]) / temperature))
    return torch.stack(values[::-1], dim=-2), torch.stack(policies[::-1], dim=-3)


def value_iteration(P, reward, potential, discount):
    """Q[t,s,a] of the shaped reward r + gamma Phi(s',a') - Phi(s,a), acting by argmax Q + Phi.

    Q[t] = r[t] - Phi[t] + gamma E[max_a' (Q + Phi)[t+1,s',a']], and after the last step both are 0.
    Then Q + Phi obeys the recurrence of Phi = 0: shaping moves no optimum, whatever Phi (Wiewiora,
    Cottrell & Elkan, ICML 2003), also if it changes with time (Devlin & Kudenko, AAMAS 2012).
    reward, potential (T, ..., S, A) -> the same shape; potential 0 is plain value iteration.
    """
    best, steps = torch.zeros_like(reward[0, ..., 0]), []
    for r, phi in zip(reversed(reward.unbind(0)), reversed(potential.unbind(0))):
        steps.append(r - phi + discount * torch.einsum("sap,...p->...sa", P, best))
        best = (steps[-1] + phi).amax(-1)
    return torch.stack(steps[::-1])


def over_time(policy, T):
    """The same policy at every step: (..., S, A) -> (..., T, S, A)."""
    return policy[..., None, :, :].expand(*policy.shape[:-2], T, *policy.shape[-2:])


# ---- walks --------------------------------------------------------------------------------------

def sample_walks(P, start, policies, shape, generator):
    """Draw walks, each by one of the K policies (K, T, S, A) chosen evenly at its start.

    Returns states and actions, both (*shape, T), int64.
    """
    n, T = math.prod(shape), policies.shape[1]
    route = torch.randint(len(policies), (n,), generator=generator)
    s = torch.multinomial(start, n, replacement=True, generator=generator)
    states, actions = [], []
    for t in range(T):
        a = torch.multinomial(policies[route, t, s], 1, generator=generator)[:, 0]
        states.append(s)
        actions.append(a)
        s = torch.multinomial(P[s, a], 1, generator=generator)[:, 0]
    return torch.stack(states, -1).reshape(*shape, T), torch.stack(actions, -1).reshape(*shape, T)


def empirical_occupancy(states, actions, S, A):
    """Steps per walk spent in each (s,a), mean over walks: (..., n, T) -> (..., S, A), sum T."""
    index = (states * A + actions).flatten(-2)
    count = torch.zeros(*index.shape[:-1], S * A, dtype=torch.float64)
    count.scatter_add_(-1, index, torch.ones_like(index, dtype=torch.float64))
    return count.unflatten(-1, (S, A)) / states.shape[-2]


# ---- a picture ----------------------------------------------------------------------------------

def draw_map(ax, world, values, title, seen=None, **colours):
    """One map of values (S,), with S, G, the lava and dots on the cells seen (S,)."""
    ax.imshow(values.reshape(-1, world.width), aspect="auto", **colours)
    for s, cell in enumerate(world.cells):
        if cell in "SGx" or (seen is not None and seen[s]):
            mark = {"S": "S", "G": "G", "x": "×"}.get(cell, "•")
            ax.text(s % world.width, s // world.width, mark, ha="center", va="center",
                    weight="bold", color=COLORS["sft-demo" if cell == "x" else "demo"])
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)
