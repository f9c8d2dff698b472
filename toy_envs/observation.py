"""Imitation from observation: states without actions, in a world that is linear and Gaussian.

An expert steers s' = A s + B u + w by the linear-quadratic regulator, u = -K s + noise. A learner
sees its states only, and has the system to try things on. How many steps on it (interactions) until
its return is 95% of the expert's? All learners act by u = -K_t s + noise:

    discriminator   z = (s_t, s_t+1) has a normal density under every policy, so the optimal logit
                    is a quadratic form, h = z'(Sigma_pi^-1 - Sigma_demo^-1) z / 2 + constant
    model-based     reward h, the reverse KL's. With a fitted s' = A s + B u it is quadratic in
                    (s, u): the best policy near the old one is a Riccati recursion (DEALIO)
    model-free      the same reward, a natural policy gradient with a critic (GAIfO)
    ... one gain    the same, told that one gain serves at all times: T times fewer parameters
    inverse model   no adversary: the model says which action leads from s to s'; clone it (BCO)

Simpler than DEALIO (arXiv:2104.00163): the system is linear, with an actuator for each dimension;
the adversary is fitted in closed form, by covariances; the noise of actions is fixed, known, and
the expert's own; Riccati in a trust region stands for PILQR, which also mends a wrong model.
GAIfO's (arXiv:1807.06158) networks become quadratic forms. BCO: arXiv:1805.01954.
Run `python -m toy_envs.observation`. Shapes: R runs, a system each; T times; M episodes a round; n
dimensions of the state, and as many of the action. Rewards in nats, float64.
"""

from collections import namedtuple
from dataclasses import dataclass

import torch

from utils.cli import make_folder, parse_settings, run_script, setting
from utils.evaluate import mean_ci
from utils.plots import COLORS, pyplot, write_world

T = 10                              # steps of an episode
NOISE, DISTURBANCE = 0.3, 0.1       # standard deviations, by dimension: of actions, and of w
EFFORT = 0.3                        # cost of a squared unit of action; one of the state costs 1
TARGET = 0.95                       # of the way from the return of K = 0 to the expert's
ETAS = 0.5 ** torch.arange(12).double()     # sizes of a policy step
# (episodes a round, trust region in nats) for 1 to 4 dimensions: of a grid, on 10 to 30 other
# systems (seed 1), the fewest interactions among those whose last mean score is above the target.
LEARNERS = {
    "model-based": ((6, 30), (8, 300), (16, 100), (36, 300)),
    "model-free": ((12, 10), (20, 3), (28, 3), (68, 10)),
    "model-free, one gain": ((6, 100), (8, 30), (16, 10), (36, 30)),
    "inverse model": ((1, float("inf")),) * 4,
}
LOOKS = (("init-sft", "o-"), ("sft-demo", "s-"), ("init-demo", "^--"), ("preference", "d:"))
# Systems A, B (R, n, n), the expert's gains K (R, T, n, n), and the cost s'P s of an episode's last
# state. That is the cost of going on as the expert for ever, so its gain is the same at all times.
World = namedtuple("World", "A B K P")


@dataclass
class Settings:
    """Imitation from observation, with and without a model: interactions until it succeeds."""
    seed: int = setting(0, "seed of the systems and of all samples", 0, 2 ** 32)
    seeds: int = setting(10, "systems (the intervals are over these)", 2, 100)
    demos: int = setting(100, "episodes of the expert", 12, 10_000)
    rounds: int = setting(25, "rounds of roll-out, discriminator and policy", 2, 1000)
    out: str = setting("out/observation", "folder for observation.png and results.json")


# ---- the world ----------------------------------------------------------------------------------

def make_world(n, runs, generator):
    """Random systems: A has spectral radius 1 (left alone, a state does not calm down), B turns."""
    A, B = torch.randn(2, runs, n, n, generator=generator, dtype=torch.float64)
    A, B = A / torch.linalg.eigvals(A).abs().amax(-1)[:, None, None], torch.linalg.qr(B)[0]
    cost = torch.tensor([1.0] * n + [EFFORT] * n, dtype=torch.float64).diag()
    K, P = riccati(cost.expand(runs, 200, -1, -1), torch.cat([A, B], -1), torch.zeros_like(A))
    return World(A, B, K[:, :1].expand(-1, T, -1, -1), P)


def riccati(C, F, P):
    """Gains of least cost: u = -K_t s minimises E sum_t z_t'C_t z_t + s_T'P s_T, with z = (s, u).

    V_T = P;  G = C_t + F'V_t+1 F;  K_t = G_uu^-1 G_us;  V_t = G_ss - G_su K_t.  C (..., T, 2n, 2n),
    F = [A B] (..., n, 2n) -> K (..., T, n, n), nan where there is no minimum, and V_0."""
    n, gains = P.shape[-1], []
    for C_t in reversed(C.unbind(-3)):
        G = C_t + F.mT @ P @ F
        L, failed = torch.linalg.cholesky_ex(G[..., n:, n:])    # needs a positive definite G_uu
        L = torch.where(failed[..., None, None] > 0, torch.nan, L)
        gains.append(torch.cholesky_solve(G[..., n:, :n], L))
        P = G[..., :n, :n] - G[..., :n, n:] @ gains[-1]
    return torch.stack(gains[::-1], -3), P


def pair_covariances(world, K):
    """Exact covariances [[S, S M'], [M S, S+]] of (s_t, s_t+1), (R, T, 2n, 2n), M = A - B K_t and
    S+ = M S M' + NOISE^2 BB' + DISTURBANCE^2 I, of gains K (R, T, n, n); s_0 ~ N(0, I)."""
    S, pairs = torch.eye(K.shape[-1]).double().expand_as(world.A), []
    noise = NOISE ** 2 * world.B @ world.B.mT + DISTURBANCE ** 2 * S
    for M in (world.A[:, None] - world.B[:, None] @ K).unbind(1):
        above, after = torch.cat([S, S @ M.mT], -1), M @ S @ M.mT + noise
        pairs.append(torch.cat([above, torch.cat([M @ S, after], -1)], -2))
        S = after
    return torch.stack(pairs, 1)


def expected_cost(world, K):
    """E[sum_t s's + EFFORT u'u + s_T'P s_T], which is minus the return: K (R, T, n, n) -> (R,)."""
    pairs, n = pair_covariances(world, K), K.shape[-1]
    weight = torch.eye(n).double() + EFFORT * K.mT @ K
    running = (weight * pairs[..., :n, :n]).sum((-3, -2, -1)) + T * EFFORT * NOISE ** 2 * n
    return running + (world.P * pairs[:, -1, n:, n:]).sum((-2, -1))


def roll_out(world, K, M, generator):
    """M episodes by gains K (R, T, n, n): z = (s_t, s_t+1), (R, T, M, 2n); actions (R, T, M, n)."""
    s, *x = torch.randn(2 * T + 1, len(K), M, K.shape[-1], generator=generator, dtype=K.dtype)
    z, u = [], []
    for K_t, noise, w in zip(K.unbind(1), x[:T], x[T:]):
        u.append(NOISE * noise - s @ K_t.mT)
        after = s @ world.A.mT + u[-1] @ world.B.mT + DISTURBANCE * w
        z.append(torch.cat([s, after], -1))
        s = after
    return torch.stack(z, 1), torch.stack(u, 1)


# ---- the method ---------------------------------------------------------------------------------

def precision(z):
    """Sigma^-1 (..., p, p) of samples z (..., M, p), mean 0, without bias: inverting a covariance
    alone gives M / (M - p - 1) times as much on average (inverse Wishart)."""
    return (z.shape[-2] - z.shape[-1] - 1) * torch.linalg.inv(z.mT @ z)


def logit(demo, policy, z):
    """h = log N(z; 0, demo^-1) - log N(z; 0, policy^-1), the optimal discriminator's logit in nats,
    from two precisions (..., 2n, 2n), at pairs z (..., M, 2n) -> (..., M)."""
    constant = (torch.logdet(demo) - torch.logdet(policy))[..., None] / 2
    return constant - ((z @ (demo - policy)) * z).sum(-1) / 2


def fit(X, Y):
    """Least squares W (..., p, q), Y ~ X W over M. The ridge is for fewer samples than features."""
    return torch.linalg.solve(X.mT @ X + 1e-6 * torch.eye(X.shape[-1]).double(), X.mT @ Y)


def clone(s, u):
    """Behaviour cloning: one gain (R, T, n, n) for all times, by least squares of u on s."""
    return -fit(s.flatten(1, 2), u.flatten(1, 2)).mT[:, None].expand(-1, T, -1, -1)


def riccati_step(K, demo, policy, F, eta):
    """The gains that maximise E[sum_t h_t] - KL(new || old) / eta in the model s' = F (s, u).

    There the logit is quadratic in (s, u). So is the KL, |u + K s|^2 / (2 NOISE^2). K (R, T, n, n),
    two precisions, F (R, n, 2n), eta (E,) -> (E, R, T, n, n); nan where h outweighs the KL."""
    eye = torch.eye(K.shape[-1]).double().expand_as(K)
    to_pair = torch.cat([torch.cat([eye, 0 * eye], -1), F[:, None].expand(-1, T, -1, -1)], -2)
    away = torch.cat([K, eye], -1)                                  # (s, u) -> u + K s
    C = to_pair.mT @ (demo - policy) @ to_pair
    C = C + away.mT @ away / (NOISE ** 2 * eta[:, None, None, None, None])
    return riccati(C, F, torch.zeros_like(F[..., :K.shape[-1]]))[0]


def natural_gradient(K, reward, s, u, one_gain=False):
    """The natural gradient of E[sum_t reward] in the gains K (R, T, n, n), from episodes.

    V_t is quadratic in s and fitted to reward + V_t+1(s'). e'W_t s is fitted to what is left, e the
    action's noise in units. These features are compatible with the policy, so that -NOISE W_t is
    the natural gradient (Peters and Schaal 2008). reward (R, T, M), s, u (R, T, M, n)."""
    e = (u + s @ K.mT) / NOISE
    i, j = torch.triu_indices(s.shape[-1], s.shape[-1])
    features = torch.cat([s[..., i] * s[..., j], torch.ones_like(s[..., :1])], -1)
    advantage, value = torch.zeros_like(reward), 0
    for t in reversed(range(T)):
        target = reward[:, t] + value
        value = (features[:, t] @ fit(features[:, t], target[..., None]))[..., 0]
        advantage[:, t] = target - value
    x, y = (e[..., None] * s[..., None, :]).flatten(-2), advantage[..., None]
    x, y = (v.flatten(1, 2)[:, None] if one_gain else v for v in (x, y))
    return -NOISE * fit(x, y)[..., 0].unflatten(-1, K.shape[-2:]).expand_as(K)


def imitate(learner, world, demos, M, trust, rounds, generator):
    """Gains before and after each round, (rounds + 1, R, T, n, n), from pairs of the expert's
    states (R, T, demos, 2n). trust bounds a round's KL(new || old), in nats an episode."""
    history, n = [torch.zeros_like(world.K)], world.A.shape[-1]
    demo, moments = precision(demos), 1e-6 * torch.eye(3 * n).double()
    for _ in range(rounds):
        K = history[0 if learner == "inverse model" else -1]    # BCO acts at random throughout.
        z, u = roll_out(world, K, M, generator)
        s, after = z.split(n, -1)
        # A model learns from all that was ever tried, a policy gradient from its own steps alone.
        x = torch.cat([s, u, after], -1).flatten(1, 2)
        moments = moments + x.mT @ x
        F = torch.linalg.solve(moments[:, :2 * n, :2 * n], moments[:, :2 * n, 2 * n:]).mT
        if learner == "inverse model":
            B_u = demos[..., n:] - demos[..., :n] @ F[:, None, :, :n].mT        # and w
            new = clone(demos[..., :n], B_u @ torch.linalg.inv(F[:, None, :, n:]).mT)[None]
        elif learner == "model-based":
            new = riccati_step(K, demo, precision(z), F, ETAS)
        else:
            step = natural_gradient(K, logit(demo, precision(z), z), s, u, "one gain" in learner)
            new = K + ETAS[:, None, None, None, None] * step
        kl = ((s @ (new - K).mT) ** 2).sum((-3, -1)).mean(-1) / (2 * NOISE ** 2)
        # The largest step that the trust region allows; the old gains, last in line, if none is.
        allowed = torch.cat([kl <= trust, torch.ones(1, len(K), dtype=torch.bool)])
        history.append(torch.cat([new, K[None]])[allowed.int().argmax(0), torch.arange(len(K))])
    return torch.stack(history)


def experiment(s, learners=LEARNERS):
    """A row for each dimension and learner: scores by round (0: K = 0, 1: the expert), and log10 of
    the interactions until two rounds running reach the target, since one may be luck."""
    rows = []
    for n in range(1, 5):
        generator = torch.Generator().manual_seed(1000 * s.seed + n)
        world = make_world(n, s.seeds, generator)
        demos, actions = roll_out(world, world.K, s.demos, generator)
        worst, best = expected_cost(world, 0 * world.K), expected_cost(world, world.K)
        for learner, sizes in learners.items():
            gains = imitate(learner, world, demos, *sizes[n - 1], s.rounds, generator)
            costs = [expected_cost(world, K) for K in (*gains, clone(demos[..., :n], actions))]
            scores = (worst - torch.stack(costs)) / (worst - best)           # (rounds + 2, R)
            there = (scores[:-2] >= TARGET) & (scores[1:-1] >= TARGET)
            rounds = torch.where(there.any(0), there.int().argmax(0), s.rounds)
            used = (T * sizes[n - 1][0] * rounds).double().log10()
            base = used if learner == "model-based" else base
            rows.append({"dimensions": n, "learner": learner, "episodes": sizes[n - 1][0],
                         "log10_used": mean_ci(used), "log10_ratio": mean_ci(used - base),
                         "arrived": int(there.any(0).sum()), "scores": scores[:-1].mean(1).tolist(),
                         "last": mean_ci(scores[-2]), "cloning": mean_ci(scores[-1])})
    return rows


def draw(rows):
    """Interactions by dimension, and how many times the model-based learner's these are."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.8))
    titles = f"interactions until {TARGET:.0%} of the expert's return", "... over those with a model"
    for ax, title, key in zip(axes, titles, ("log10_used", "log10_ratio")):
        for place, (learner, (color, look)) in enumerate(zip(LEARNERS, LOOKS)):
            mean, half = torch.tensor([row[key] for row in rows if row["learner"] == learner]).T
            bars = 10 ** mean - 10 ** (mean - half), 10 ** (mean + half) - 10 ** mean
            ax.errorbar(torch.arange(1, 5) + place / 20, 10 ** mean, bars, fmt=look, ms=5,
                        color=COLORS[color], capsize=2, label=learner)
        ax.set(yscale="log", xlabel="dimensions", xticks=range(1, 5), title=title)
        ax.yaxis.set_major_formatter("{x:g}")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main(s):
    """Run the experiment, print the table, write observation.png and results.json."""
    out, rows = make_folder(s.out), experiment(s)
    print(f"n{'':24}M  interactions  times model-based    arrived     last score")
    for row in rows:
        used, ratio = ("{:6.{}f} ×÷ {:.2f}".format(10 ** row[key][0], digits, 10 ** row[key][1])
                       for key, digits in (("log10_used", 0), ("log10_ratio", 2)))
        print("{dimensions} {learner:21}{episodes:3}".format(**row), used, ratio.rjust(17),
              f"{row['arrived']:5} of {s.seeds:2} {row['last'][0]:7.3f} ± {row['last'][1]:.3f}")
    print(f"95% intervals over {s.seeds} systems. Cloning, given the actions, scores at least "
          f"{min(row['cloning'][0] for row in rows):.3f}\nwithout any interaction.")
    write_world(out, s, {"rows": rows}, {"observation": draw(rows)})


if __name__ == "__main__":
    torch.set_num_threads(1)    # The tensors are small: a second thread costs more than it gives.
    run_script(lambda: main(parse_settings(Settings)))
