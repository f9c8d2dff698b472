"""shaping.py against exact value iteration, Wiewiora's equivalence, algebra by hand and the token
MDP; the world's own claims."""

import json

import pytest
import torch

from toy_envs import shaping as g
from toy_envs import token_mdp
from toy_envs.grids import occupancy, read_map, soft_value_iteration, value_iteration

pytestmark = pytest.mark.usefixtures("one_thread")
SLIPPERY, WORLD = read_map(g.MAP, slip=0.2), read_map(g.MAP, slip=0)
SMALL, TINY = read_map(("S..", "...", "..G"), slip=0), read_map(("S.", ".G"), slip=0)
GAMMA, T, S, A = g.DISCOUNT, 40, 81, 4


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def density(kind, world=SLIPPERY):
    s = g.Settings(seeds=3)
    return g.demonstrate(world, g.KINDS[kind], s, torch.Generator().manual_seed(0))


# ---- potentials never move the optimum ----------------------------------------------------------

@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("potential", [*g.KINDS, "noise", "noise over time"])
def test_a_potential_moves_no_optimum(potential, scale):
    """Q of the shaped reward is Q* - Phi to 1e-10, for whatever demonstrations, scale and time.

    Failing: an index, a discount or a sign is wrong, and shaping pays for going the wrong way.
    """
    reward = randn(1, 3, S, A).expand(T, -1, -1, -1)
    phi = {"noise": randn(1, 3, S, A, seed=1), "noise over time": randn(T, 3, S, A, seed=2)}
    phi = phi[potential] if potential in phi else density(potential)[0]
    phi = (scale * phi).expand(T, 3, S, A)
    plain = value_iteration(SLIPPERY.P, reward, torch.zeros_like(phi), GAMMA)
    shaped = value_iteration(SLIPPERY.P, reward, phi, GAMMA)
    assert (shaped + phi - plain).abs().max() < 1e-10
    assert torch.equal((shaped + phi).argmax(-1), plain.argmax(-1))


def test_plain_value_iteration_of_the_paid_reward_agrees():
    """Ng's form: pay r + gamma E[phi(s')] - phi(s) and plan as if nothing were known of phi.

    Failing: value_iteration's potential is not the reward that it stands for.
    """
    r, phi = randn(S, A), randn(T + 1, S, 1, seed=1)
    phi[T] = 0
    paid = torch.stack([r + GAMMA * (SLIPPERY.P @ phi[t + 1])[..., 0] - phi[t] for t in range(T)])
    none, potential = torch.zeros(T, 1, S, A).double(), phi[:T, None].expand(T, 1, S, A)
    as_paid = value_iteration(SLIPPERY.P, paid[:, None], none, GAMMA)
    as_potential = value_iteration(SLIPPERY.P, r.expand(T, 1, S, A), potential, GAMMA)
    assert (as_paid - as_potential).abs().max() < 1e-10


def test_the_shaped_return_of_every_policy_is_its_return_less_the_first_potential():
    """E[sum gamma^t F] = -E[Phi(s_0,a_0)], by exact occupancies of a random policy.

    Failing: the sum does not telescope, and what shaping pays depends on where one goes.
    """
    policy, phi = randn(T, S, A, seed=3).softmax(-1), randn(S, A, seed=4)
    rho = occupancy(GAMMA * SLIPPERY.P, SLIPPERY.start, policy)     # gamma^t is in it
    later = rho[1:].sum(0) - rho[:-1].sum(0)        # gamma Phi(s',a') - Phi(s,a) over time ...
    paid = (later * phi).sum() - (rho[-1] * phi).sum()              # ... and 0 after the last step
    first = (SLIPPERY.start[:, None] * policy[0] * phi).sum()
    assert paid.item() == pytest.approx(-first.item(), abs=1e-10)


def test_over_actions_one_must_act_by_q_plus_phi():
    """Failing: the test world hides the difference, and forgetting Phi would go unnoticed."""
    phi = randn(3, S, A, seed=6).expand(T, 3, S, A)
    reward = (WORLD.golden - 1)[:, None].expand(T, 3, S, A)
    Q, row = value_iteration(WORLD.P, reward, phi, GAMMA), torch.arange(3)
    forgetful = g.walk_greedily(WORLD, lambda t, s: Q[t, row, s], 3, T)
    mindful = g.walk_greedily(WORLD, lambda t, s: (Q + phi)[t, row, s], 3, T)
    assert (mindful == 1).all() and (forgetful < 1).any()


def test_a_cost_per_step_is_a_sparse_reward_and_a_constant_potential():
    """gamma c on arrival, c = 1/(1 - gamma), and the potential c before it pay -1 at each step.

    Failing: the golden reward is not the sparse one that the docstring and the lesson say it is.
    """
    c, goal = 1 / (1 - GAMMA), WORLD.golden
    arriving = WORLD.P @ goal                                       # (S, A)
    paid = GAMMA * c * arriving + GAMMA * c * (1 - arriving) - c
    assert (paid[goal == 0] + 1).abs().max() < 1e-10


# ---- goals --------------------------------------------------------------------------------------

def test_any_goals_leave_the_fixed_point_alone():
    """One backup of Q* - phi(s,g) for random goals g, g' gives Q* - phi(s,g) back; with -|s' - g'|
    as a reward, no Q that depends on g alone could be right for two g'.

    Failing: goals that are invented in hindsight teach the learner another task.
    """
    reward = (SMALL.golden - 1)[:, None].expand(9, 4)
    d, end = g.distances(SMALL), SMALL.golden == 1
    Q = torch.where(end[:, None], 0.0, value_iteration(
        SMALL.P, reward.expand(2000, 1, 9, 4), torch.zeros(2000, 1, 9, 4).double(), GAMMA)[0, 0])
    phi = torch.where(end[:, None], 0.0, -d)                        # [s, g]
    generator = torch.Generator().manual_seed(0)
    for pair in torch.randint(9, (50, 2), generator=generator).tolist():
        here, there = (phi[:, goal] for goal in pair)
        best = (Q - there[:, None]).amax(-1) + there                # max of Q_shaped + phi
        backup = reward + GAMMA * SMALL.P @ best - here[:, None]
        assert (backup - (Q - here[:, None]))[~end].abs().max() < 1e-10
    biased = [reward - SMALL.P @ d[:, goal] for goal in (0, 8)]
    assert (biased[0] - biased[1]).abs().max() > 1


def test_goals_follow_the_walk_without_its_loops():
    """Failing: D-Shape's goals run in circles, or stop before the walk does."""
    after = g.next_goal(torch.tensor([0, 1, 4, 1, 2, 5, 5]), 9)
    assert after.tolist() == [1, 2, 5, 3, 1, 5, 6, 7, 8]


def test_densities_are_counts_with_a_floor():
    """Failing: what nobody did weighs more than e^-5, or the walks are not those of their kind."""
    for kind, cell in g.KINDS.items():
        log_p, walk = density(kind, WORLD)
        p = log_p.exp() - g.FLOOR
        assert log_p.shape == (3, S, A) and log_p.min().item() == pytest.approx(-5)
        assert torch.allclose(p.sum((1, 2)), torch.ones(3).double())
        assert (p.sum(-1).argmax(-1) == WORLD.cells.index(cell)).all()
        assert (walk[:, 0] == WORLD.cells.index("S")).all()
    assert g.distances(WORLD)[0, S - 1] == 16 and g.distances(WORLD)[10, 2] == 2


# ---- Q-learning ---------------------------------------------------------------------------------

def learners(world, B, G, seed=5):
    """Random potentials, random goals: reward, potential, after, relabel, as q_learning takes."""
    reward = (world.golden - 1)[:, None].expand(B, G, -1, 4).contiguous()
    after = torch.randint(G, (B, G), generator=torch.Generator().manual_seed(seed))
    return reward, randn(*reward.shape, seed=seed), after, (torch.arange(B) % 2 == 0) & (G > 1)


def test_wiewiora_a_potential_is_a_start_of_the_table(monkeypatch):
    """Learner by learner, step by step: with potential Phi, and from a table that starts at Phi.

    The same chance must lead through the same states, and Q + Phi be the other's Q, at every cell
    and episode, for goals and without. Failing: shaping does more than to choose what is tried
    first, which by Wiewiora's theorem it cannot, or the two are not treated alike (at the end).
    """
    for G, rate in ((1, 1.0), (9, 1.0), (9, 0.3)):
        monkeypatch.setattr(g, "RATE", rate)
        s = g.Settings(episodes=20, horizon=12)
        reward, phi, after, relabel = learners(SMALL, 6, G)
        # Two moves against one wall would tie, and rounding would choose between them.
        reward = reward + 0.1 * randn(*reward.shape)
        shaped = g.q_learning(SMALL, s, reward, phi, after, relabel)
        started = g.q_learning(SMALL, s, reward, 0 * phi, after, relabel, start=phi)
        moved = 0
        for (mine, states, steps), (other, others, _) in zip(shaped, started):
            assert torch.equal(states, others)
            for t in (0, 3, 11):
                for cell in range(9):
                    at = torch.full((6,), cell)
                    assert (mine(t, at) - other(t, at)).abs().max() < 1e-10
            moved += steps.sum().item()
        assert moved > 6 * 20 * 3


@pytest.mark.parametrize("G", [1, 4])
def test_q_learning_finds_the_optimum_under_any_potential(G, monkeypatch):
    """On 2 x 2 cells -(1 + gamma), the value of two steps, to 1e-10, from random walks.

    Failing: Q-learning is wrong, or a potential, a goal or a relabelled goal biases it; for example
    goals may be invented whose own values are never learned.
    """
    monkeypatch.setattr(g, "EPSILON", 1.0)
    s = g.Settings(episodes=400, horizon=8)
    reward, phi, after, relabel = learners(TINY, 8, G)
    for values, states, steps in g.q_learning(TINY, s, reward, phi, after, relabel):
        arrived = states[:, -1] == 3
        assert (steps[~arrived] == 8).all() and (steps >= 2).all()
    best = values(0, torch.zeros(8, dtype=torch.long)).amax(-1)
    assert (best + 1 + GAMMA).abs().max() < 1e-10
    assert torch.equal(g.walk_greedily(TINY, values, 8, 8), torch.ones(8).double())


def test_scaled_returns_by_hand():
    """Failing: a detour, or never to arrive, is not worth what the figure's axis says."""

    def values(turn):
        """Up in vain `turn` times, then right twice, then down."""
        def of(t, s):
            move = 0 if t < turn else 1 if t < turn + 2 else 2
            return torch.nn.functional.one_hot(torch.full_like(s, move), 4)
        return of
    assert g.walk_greedily(SMALL, values(0), 1, 9).item() == pytest.approx(1)
    assert g.walk_greedily(SMALL, values(3), 1, 9).item() == pytest.approx(GAMMA ** 3)
    assert g.walk_greedily(SMALL, values(6), 1, 9).item() == 0      # in time no more


# ---- rewards from logits ------------------------------------------------------------------------

DEMO = token_mdp.make_demonstrator(["aaaa", "abca"], [0.6, 0.4], 0.1, 3)
LOG_PI = token_mdp.demonstrator_log_prob(DEMO)                      # (81,), of whole responses


def shifted_logits(seed):
    """log pi(a|s) + V(s), V random, of the demonstrator of a token MDP; and V: lists over t."""
    mass = [LOG_PI.view(3 ** t, -1).logsumexp(-1) for t in range(5)]
    V = [randn(3 ** t, seed=seed + t) for t in range(5)]
    return [mass[t + 1].view(-1, 3) - mass[t][:, None] + V[t][:, None] for t in range(4)], V


def response_sums(steps):
    total = torch.zeros(1).double()
    for step in steps:
        total = (total[:, None] + step).flatten()
    return total


def test_logits_give_a_reward_up_to_a_potential():
    """Summed over a response it is log pi(y) + V(start) - V(end): all V between cancel.

    So where V ends at 0 responses rank as log pi ranks them, and where it does not they may not.
    Failing: a sign or a step is off, and the reward ranks responses by an accident of the logits.
    """
    for seed in (0, 10):
        logits, V = shifted_logits(seed)
        whole = response_sums(g.logit_rewards(logits, torch.zeros(81).double()))
        assert (whole - (LOG_PI + V[0])).abs().max() < 1e-10
        cut = response_sums(g.logit_rewards(logits, V[4]))
        assert (cut - (LOG_PI + V[0] - V[4])).abs().max() < 1e-10
        assert not torch.equal(cut.argsort(), LOG_PI.argsort())


def test_soft_value_iteration_under_logit_rewards_gives_the_policy_back():
    """Backwards through the tree of prefixes from V(end): Q - V = log pi, whatever V was added.

    Failing: the reward read off is not one for which this policy is soft-optimal.
    """
    logits, V = shifted_logits(20)
    value = V[4]
    for f, r in reversed([*zip(logits, g.logit_rewards(logits, V[4]))]):
        Q = r + value.view_as(r)
        value = Q.logsumexp(-1)
        assert (Q - value[:, None] - f.log_softmax(-1)).abs().max() < 1e-10
    assert (value - V[0]).abs().max() < 1e-10


def test_in_a_world_with_chance_too():
    """The same in the gridworld with slip: r = log pi + V(s) - E[V(s')] for *any* V over time."""
    _, policy = soft_value_iteration(SLIPPERY.P, randn(S, A), T)
    V = randn(T + 1, S, seed=7)
    for t in reversed(range(T)):
        r = policy[t].log() + V[t][:, None] - SLIPPERY.P @ V[t + 1]
        Q = r + SLIPPERY.P @ V[t + 1]
        assert (Q.log_softmax(-1) - policy[t].log()).abs().max() < 1e-10


# ---- settings and claims ------------------------------------------------------------------------

@pytest.mark.parametrize("argv", [
    ["--seeds", "1"], ["--seeds", "1000"], ["--demos", "0"], ["--episodes", "9"],
    ["--horizon", "9"], ["--horizon", "x"], ["--nope"], ["--out", __file__]])
def test_bad_settings_are_refused_in_one_line(argv, refused_in_one_line):
    """Failing: a mistyped flag ends in a traceback, or in swapping."""
    refused_in_one_line(g, argv)


def test_the_claims_and_the_files(tmp_path, capsys, monkeypatch):
    """Five seeds and fewer episodes, otherwise as shipped.

    Failing: a potential moved an optimum, bad demonstrations as a reward did not, good ones as a
    potential do not help, or the controls that the lesson names would have done as well.
    """
    monkeypatch.setattr(g, "PLANNED", 100)
    out = tmp_path / "shaping"
    g.main(g.Settings(seeds=5, episodes=60, out=str(out)))
    got = json.loads((out / "results.json").read_text())
    exact, learned, at = got["exact"], got["learned"], got["weights"].index(1)
    for kind in g.KINDS:
        assert exact["D-Shape"][kind] == [[1, 0]] and exact["potential"][kind] == [[1, 0]] * 7
        assert exact["reward"][kind][0] == [1, 0]
        assert exact["reward"][kind][at] == ([1, 0] if kind == "good" else [0, 0])
    assert exact["distance"]["wrong goal"] == [[0, 0]]

    def apart(fast, slow):
        (a, a_half), (b, b_half) = learned[fast][0], learned[slow][0]
        return a + a_half < b - b_half
    for slow in ("plain Q-learning", "constant, log e^-5"):
        assert apart("density: good", slow)
    for slow in ("plain Q-learning", "goals, no shaping: good", "D-Shape: wrong goal"):
        assert apart("D-Shape: good", slow)
    assert (out / "shaping.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if "written" not in line) <= 92
