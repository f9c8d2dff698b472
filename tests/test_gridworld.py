"""gridworld.py against hand-written MDPs, brute force, identities and the world's own claims."""

import itertools
import json
import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from toy_envs import gridworld as g

WORLD = g.read_map(g.MAP, slip=0.2)
T = 12


def random_policy(world, horizon, seed=0):
    """A policy (T, S, A) that depends on time and state, every action possible."""
    generator = torch.Generator().manual_seed(seed)
    shape = horizon, *world.P.shape[:2]
    return torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


# Two states, two actions, by hand: action 0 mostly stays, action 1 mostly leaves state 0.
HAND_P = exact([[[0.9, 0.1], [0.2, 0.8]], [[0.0, 1.0], [0.5, 0.5]]])
HAND_START = exact([1, 0])
HAND_POLICY = exact([[[0.5, 0.5], [1, 0]], [[0.25, 0.75], [0, 1]]])


# ---- the world ----------------------------------------------------------------------------------

def test_slip_goes_to_the_sides_only():
    """Failing: the world drifts otherwise than it says (backwards, too much, or through walls)."""
    middle = 1 * 9 + 1
    up, right, down, left = middle - 9, middle + 1, middle + 9, middle - 1
    for action, (ahead, sides) in enumerate([(up, (left, right)), (right, (up, down)),
                                             (down, (left, right)), (left, (up, down))]):
        row = WORLD.P[middle, action]
        assert row[ahead] == pytest.approx(0.8) and row.sum() == pytest.approx(1)
        assert all(row[side] == pytest.approx(0.1) for side in sides)


def test_borders_keep_and_lava_and_goal_hold():
    """Failing: a walker leaves the map, wraps round it, or climbs out of the lava."""
    assert WORLD.P[0, 0, 0] == pytest.approx(0.9)  # up from the corner: 0.8 stay, 0.1 left: stay
    assert torch.allclose(WORLD.P.sum(-1), torch.ones(63, 4, dtype=torch.float64))
    for s, cell in enumerate(WORLD.cells):
        if cell in "xG":
            assert (WORLD.P[s, :, s] == 1).all()
    assert WORLD.golden[WORLD.cells.index("G")] == 1 and WORLD.golden[WORLD.cells.index("x")] == -1


# ---- dynamic programming ------------------------------------------------------------------------

def test_occupancy_by_hand():
    """Failing: transitions are transposed, or time is off by one."""
    rho = g.occupancy(HAND_P, HAND_START, HAND_POLICY)
    # t = 0: state 0, half and half; then P(state 0) = 0.5 * 0.9 + 0.5 * 0.2 = 0.55
    by_hand = exact([[[0.5, 0.5], [0, 0]], [[0.55 * 0.25, 0.55 * 0.75], [0, 0.45]]])
    assert torch.allclose(rho, by_hand, atol=1e-14)


def test_occupancy_sums_to_the_horizon_and_obeys_the_flow():
    """Failing: probability is lost or made; no policy has this occupancy."""
    rho = g.occupancy(WORLD.P, WORLD.start, random_policy(WORLD, T))
    assert rho.sum() == pytest.approx(T, abs=1e-9)
    inflow = torch.einsum("tsa,sap->tp", rho[:-1], WORLD.P)
    assert (rho[1:].sum(-1) - inflow).abs().max() < 1e-8
    assert torch.allclose(rho[0].sum(-1), WORLD.start, atol=1e-12)


def test_batches_are_runs_side_by_side():
    """Failing: vectorising over seeds mixes them up."""
    policies = torch.stack([random_policy(WORLD, T, seed) for seed in (1, 2)])
    rho = g.occupancy(WORLD.P, WORLD.start, policies)
    assert torch.allclose(rho[1], g.occupancy(WORLD.P, WORLD.start, policies[1]), atol=1e-14)
    reward = torch.randn(2, 63, 4, dtype=torch.float64)
    both = g.soft_value_iteration(WORLD.P, reward, T)
    alone = g.soft_value_iteration(WORLD.P, reward[1], T)
    assert all(torch.allclose(b[1], a, atol=1e-12) for b, a in zip(both, alone))


def test_advantage_by_the_performance_difference():
    """return(new) - return(old) = sum rho_new A_old exactly (Kakade & Langford 2002).

    Failing: the backward recurrence does not fit the forward one, and every policy gradient errs.
    """
    old, new = random_policy(WORLD, T, 1), random_policy(WORLD, T, 2)
    reward = torch.randn(63, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rho_old, rho_new = (g.occupancy(WORLD.P, WORLD.start, policy) for policy in (old, new))
    A = g.advantage(WORLD.P, reward, old)
    assert ((rho_new - rho_old) * reward).sum().item() == pytest.approx((rho_new * A).sum().item())
    assert (old * A).sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_soft_values_on_a_2x2_grid_by_brute_force(temperature):
    """Without slip: exp(V/tau) sums exp(return/tau) over all 4^5 walks, the policy's own weights.

    Failing: not the soft maximum (a hard one, or the temperature in the wrong place).
    """
    world, horizon = g.read_map(("S.", "xG"), slip=0), 5
    reward = (world.golden[:, None] + exact([0, 0.1, 0.2, 0.3]))
    V, policy = g.soft_value_iteration(world.P, reward, horizon, temperature)
    returns, logps = [], []
    for walk in itertools.product(range(4), repeat=horizon):
        s, total, logp = 0, 0.0, 0.0
        for t, a in enumerate(walk):
            total += reward[s, a].item()
            logp += math.log(policy[t, s, a])
            s = int(world.P[s, a].argmax())
        returns.append(total / temperature)
        logps.append(logp)
    log_Z = torch.logsumexp(exact(returns), 0)
    assert V[0, 0].item() == pytest.approx(temperature * log_Z.item(), abs=1e-10)
    assert torch.allclose(exact(logps), exact(returns) - log_Z, atol=1e-10)


def test_soft_values_with_slip_are_the_best_return_plus_entropy():
    """Failing: with slip the planner counts on luck (the log of a mean instead of a mean)."""
    world, temperature = g.read_map(("S.", "xG"), slip=0.4), 0.5
    reward = world.golden[:, None].expand(-1, 4)
    V, policy = g.soft_value_iteration(world.P, reward, 4, temperature)

    def objective(pi):
        rho = g.occupancy(world.P, world.start, pi)
        return (rho * (reward - temperature * torch.log(pi))).sum().item()

    assert objective(policy) == pytest.approx(V[0, 0].item(), abs=1e-12)
    for seed in range(20):
        noise = 0.3 * torch.log(random_policy(world, 4, seed))
        assert objective((policy.log() + noise).softmax(-1)) < V[0, 0].item()


# ---- demonstrations -----------------------------------------------------------------------------

def test_routes_are_taken_and_both():
    """Failing: the demonstrator is no mixture of two routes, or no good."""
    experts = g.route_policies(WORLD, 35, 0.2)
    mu = g.occupancy(WORLD.P, WORLD.start, experts).sum((1, 3))
    upper, lower = g.marked(WORLD.cells, "u"), g.marked(WORLD.cells, "l")
    assert (mu[0] @ upper) > 0.9 > 0.1 > (mu[0] @ lower)  # steps in the gate
    assert (mu[1] @ lower) > 0.9 > 0.1 > (mu[1] @ upper)
    assert ((mu @ WORLD.golden) > 16).all()  # the best return is 17.03


def test_walks_follow_a_policy_that_changes_with_time():
    """20,000 walks by two unlike policies: standard error below 0.0036; the margin is five.

    Failing: walks ignore the time, or every walk takes the same policy.
    """
    world = g.read_map(("S.", "xG"), slip=0.2)
    policies = torch.stack([random_policy(world, 4, seed) ** 3 for seed in (1, 2)])
    policies /= policies.sum(-1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    states, actions = g.sample_walks(world.P, world.start, policies, (20_000,), generator)
    rho = g.occupancy(world.P, world.start, policies).mean(0)
    for t in range(4):
        at = torch.bincount(states[:, t] * 4 + actions[:, t], minlength=16)
        assert (at / 20_000 - rho[t].flatten()).abs().max() < 0.018


def test_walks_follow_the_occupancy_and_keep_to_a_route():
    """Failing: demonstrations come from another policy or another world than is evaluated.

    4,000 walks: a cell's frequency has a standard error below 0.008; the margin is five of them.
    """
    experts = g.route_policies(WORLD, 35, 0.2)
    generator = torch.Generator().manual_seed(0)
    states, actions = g.sample_walks(WORLD.P, WORLD.start, experts, (4, 1000), generator)
    assert states.shape == (4, 1000, 35)
    rho = g.occupancy(WORLD.P, WORLD.start, experts).mean(0)
    for t in (0, 7, 20):
        at = torch.bincount(states[..., t].flatten() * 4 + actions[..., t].flatten(), minlength=252)
        assert (at / 4000 - rho[t].flatten()).abs().max() < 0.04
    gates = torch.stack([g.marked(WORLD.cells, c)[states].amax(-1) for c in "ul"])
    assert (gates.sum(0) > 1).double().mean() < 0.01 and 0.45 < gates[0].mean() < 0.55


def test_empirical_occupancy_counts_steps_per_walk():
    """Failing: counts are mixed between states and actions, or not divided by the walks."""
    states, actions = torch.tensor([[0, 1, 1], [0, 0, 1]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    rho = g.empirical_occupancy(states, actions, 2, 2)
    assert torch.equal(rho, exact([[0, 1.5], [1, 0.5]]))


# ---- the learners -------------------------------------------------------------------------------

def test_behaviour_cloning_copies_counts_and_is_uniform_elsewhere():
    """Failing: seen actions are not copied, or unseen states get an invented preference."""
    rho = exact([[0, 3, 1], [0, 0, 0], [2, 0, 0]])
    third = 1 / 3
    assert torch.allclose(g.behaviour_cloning(rho),
                          exact([[0, 0.75, 0.25], [third, third, third], [1, 0, 0]]))
    distance = exact([[0, 2, 3], [2, 0, 1], [3, 1, 0]])
    assert torch.equal(g.behaviour_cloning(rho, distance)[1], exact([1, 0, 0]))  # copies state 2


def test_the_discriminator_is_the_minimum_of_its_loss():
    """Failing: h is not the optimal logit, or its sign is that of the wrong class."""
    rho_demo, rho = exact([3, 0, 1, 0.5]), exact([1, 2, 0, 0.5])
    floor = 0.01
    h = g.log_ratio(rho_demo, rho, floor).requires_grad_()
    loss = (binary_cross_entropy_with_logits(h, torch.ones(4).double(), rho_demo + floor,
                                             reduction="sum")
            + binary_cross_entropy_with_logits(h, torch.zeros(4).double(), rho + floor,
                                               reduction="sum"))
    loss.backward()
    assert h.grad.abs().max() < 1e-12 and h[0] > 0 > h[1]


@pytest.mark.parametrize("reward, f", [
    (lambda h: h, lambda u: -torch.log(u)),
    (softplus, lambda u: u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2))],
    ids=["reverse KL", "Jensen-Shannon"])
def test_held_constant_the_reward_gives_minus_the_gradient(reward, f):
    """d/dtheta[t,s,a] of sum q f(p/q) is -rho[t,s,a] A[t,s,a] for the reward of that f.

    Failing: occupancy matching follows another divergence than it names, or climbs it.
    """
    world, horizon, floor = g.read_map(("S..", "x.G"), slip=0.2), 6, 0.01
    rho_demo = g.occupancy(world.P, world.start, random_policy(world, horizon, 1)).sum(-3)
    theta = random_policy(world, horizon, 2).log().requires_grad_()
    rho = g.occupancy(world.P, world.start, theta.softmax(-1))
    p, q = rho_demo + floor, rho.sum(-3) + floor
    (q * f(p / q)).sum().backward()
    with torch.no_grad():
        r = reward(g.log_ratio(rho_demo, rho.sum(-3), floor))
        by_advantage = rho * g.advantage(world.P, r, theta.softmax(-1))
    assert torch.allclose(theta.grad, -by_advantage, atol=1e-10)


@pytest.mark.parametrize("reward", [lambda h: h, softplus], ids=["reverse KL", "Jensen-Shannon"])
def test_matching_finds_the_demonstrators_occupancy_and_never_climbs(reward):
    """Failing: the step is too large (it oscillates), or the policy updates do not descend."""
    experts = g.route_policies(WORLD, 35, 0.2)
    rho_demo = g.occupancy(WORLD.P, WORLD.start, experts).mean(0).sum(-3)
    distances = []
    for rounds in (0, 1, 3, 10, 30, 100):
        policy = g.occupancy_matching(WORLD.P, WORLD.start, rho_demo, 35, reward, rounds)
        rho = g.occupancy(WORLD.P, WORLD.start, policy).sum(-3)
        h = g.log_ratio(rho_demo, rho, 0.01)
        distances.append((-h * (rho + 0.01)).sum().item() / 35)  # reverse KL, nats per step
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.005


def test_matching_comes_back_where_cloning_wanders():
    """One demonstration straight along the top row; the row below was never seen.

    Failing: known dynamics make no difference off the demonstrated states.
    """
    world = g.read_map(("S...G", "....."), slip=0.2)
    rho_demo = torch.zeros(10, 4, dtype=torch.float64)
    rho_demo[:4, 1] = 1
    rho_demo[4, 1] = 4
    matched = g.occupancy_matching(world.P, world.start, rho_demo, 8, lambda h: h)
    cloned = g.behaviour_cloning(rho_demo)
    below = 6  # under the second cell of the row
    assert torch.equal(cloned[below], torch.full((4,), 0.25).double())
    assert matched[2, below, :2].sum() > 0.95  # up, back to the row, or on towards the goal


def test_maxent_irl_matches_feature_expectations():
    """A soft-optimal demonstrator, its exact occupancy, no prior: a solvable problem.

    Failing: the gradient or the optimiser is wrong, and the reward explains nothing.
    """
    world, horizon = g.read_map(("S..", ".x.", "..G"), slip=0.2), 10
    reward = (world.golden + 0.3 * g.marked(world.cells, "."))[:, None].expand(-1, 4)
    _, expert = g.soft_value_iteration(world.P, reward, horizon)
    rho_demo = g.occupancy(world.P, world.start, expert).sum(-3)
    w, policy = g.maxent_irl(world.P, world.start, rho_demo, horizon, torch.zeros(1).double())
    features = g.occupancy(world.P, world.start, policy).sum((-3, -1))
    assert (features - rho_demo.sum(-1)).abs().max() < 1e-5
    # a constant added to w changes nothing, so the reward is compared without its mean
    assert torch.allclose(w - w.mean(), reward[:, 0] - reward[:, 0].mean(), atol=0.01)


def test_maxent_irl_weighs_the_prior():
    """Where it has converged, f_pi - f_demo + precision w = 0 in each of a batch of problems.

    Failing: the prior is scaled wrongly, or one problem of the batch spoils another.
    """
    experts = g.route_policies(WORLD, 35, 0.2)
    generator = torch.Generator().manual_seed(1)
    states, actions = g.sample_walks(WORLD.P, WORLD.start, experts, (2, 10), generator)
    rho_demo = g.empirical_occupancy(states, actions, 63, 4)
    precision = exact([[0.1], [0.5]])
    w, policy = g.maxent_irl(WORLD.P, WORLD.start, rho_demo, 35, precision)
    features = g.occupancy(WORLD.P, WORLD.start, policy).sum((-3, -1))
    assert (features - rho_demo.sum(-1) + precision * w).abs().max() < 1e-3
    assert (w.argmax(-1) == WORLD.cells.index("G")).all()


# ---- measures, settings and claims --------------------------------------------------------------

def test_score_by_hand():
    """Failing: return, failure or drift means something else than the table says."""
    world = g.read_map(("S.", "xG"), slip=0)
    rho = torch.zeros(3, 4, 4, dtype=torch.float64)
    rho[0, 0, 0] = 1
    rho[1, 1, 0], rho[1, 2, 0] = 0.75, 0.25
    rho[2, 3, 0], rho[2, 1, 0], rho[2, 2, 0] = 0.5, 0.25, 0.25
    of = g.score(world, rho, torch.tensor([True, False, False, True]))
    assert {k: v.item() for k, v in of.items()} == {"return": 0.0, "failure": 0.5, "drift": 1.0}


@pytest.mark.parametrize("n, quantile", [(10, 2.26216), (20, 2.09302), (1000, 1.96234)])
def test_intervals_use_students_t(n, quantile):
    """Failing: the intervals claim more certainty than n runs give, or mix seeds with cases."""
    x = torch.arange(n, dtype=torch.float64)
    mean, half = g.intervals(torch.stack([x, 2 * x], dim=1))
    assert mean == pytest.approx([(n - 1) / 2, n - 1]) and half[1] == pytest.approx(2 * half[0])
    assert half[0] * math.sqrt(n) / x.std().item() == pytest.approx(quantile, rel=2e-3)


@pytest.mark.parametrize("argv", [
    ["--demos", "1,x"], ["--demos", "0,5"], ["--seeds", "1"], ["--slip", "1.5"], ["--slip", "nan"],
    ["--horizon", "0"], ["--seeds", "100000"], ["--demos", "1,10000000"], ["--out", __file__]])
def test_bad_settings_are_refused_in_one_line(argv, refused_in_one_line):
    """Failing: a mistyped flag ends in a traceback, or in swapping."""
    refused_in_one_line(g, argv)


def test_the_claim_and_the_files(tmp_path, capsys):
    """Six seeds, settings otherwise as shipped: the lesson holds, and where it ends.

    Failing: with one demonstration cloning does not fail more than matching, or with a hundred
    matching still wins. Margins: the 95% intervals of six seeds do not touch.
    """
    out = tmp_path / "grid"
    g.main(g.Settings(seeds=6, demos="1,100", out=str(out)))
    got = json.loads((out / "results.json").read_text())
    (few, many), (few_half, many_half) = got["BC"]["failure"]
    for name in ("matching KL", "matching JS"):
        (matched, late), (half, late_half) = got[name]["failure"]
        assert few - few_half > matched + half
        assert many - many_half < late + late_half
    assert got["MaxEnt IRL"]["return"][0][0] > 10 and got["MaxEnt IRL"]["return"][0][1] > 16
    assert got["matching KL"]["drift"][0][0] < got["BC"]["drift"][0][0]
    assert (out / "gridworld.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if "written" not in line) <= 80
