"""The enumerated token MDP: enumeration against dynamic programming, closed forms and by hand."""

import json
import math
import tracemalloc

import pytest
import torch

from divergences import DIVERGENCES, f_divergence, forward_kl, policy_surrogate
from toy_envs.token_mdp import (
    MAX_SEQUENCES, Settings, all_sequences, check_enumerable, demonstrator_log_prob,
    demonstrator_occupancies, demonstrator_of, describe, horizon_curve, main,
    make_demonstrator, nobody_wrote, occupancies, policy_from_roots, policy_log_prob,
    print_tables, sequence_index, sequence_log_prob, sft_optimum, solve_all, solve_exactly,
    starting_points, styles_found, summarise, typical_sequences)
from utils.cli import InputError

PATTERNS = ["aaaa", "abca", "dcdc"]


@pytest.fixture(scope="module")
def demo():
    return make_demonstrator(PATTERNS, [0.5, 0.3, 0.2], slip=0.05, letters=4)


@pytest.fixture(scope="module")
def solutions(demo):
    return solve_all(demo, starts=2, seed=0)


def random_policy(letters, length, memory, rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, letters ** memory, letters, generator=generator,
                         dtype=torch.float64)
    return logits.log_softmax(-1)


def contexts_by_hand(sequence, letters, memory):
    """The context of each step by the definition: what came before, the start filled with a's."""
    padded = (0,) * memory + tuple(sequence)
    return [sum(a * letters ** i for i, a in enumerate(reversed(padded[t:t + memory])))
            for t in range(len(sequence))]


def by_hand(log_pi, sequence, letters, memory):
    """log pi of one sequence by the definition, looking each context up on its own."""
    contexts = contexts_by_hand(sequence, letters, memory)
    return sum(log_pi[t, contexts[t], letter].item() for t, letter in enumerate(sequence))


# ---- enumeration --------------------------------------------------------------------------------

@pytest.mark.parametrize("memory", [0, 1, 2, 5])
def test_enumeration_is_the_definition(memory):
    """A failure means that a policy's sequence probabilities belong to other sequences."""
    log_pi = random_policy(letters=3, length=4, memory=memory)
    logp = sequence_log_prob(log_pi)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(3).double())
    every = all_sequences(4, 3)
    assert every.shape == (81, 4) and sequence_index(every, 3).tolist() == list(range(81))
    for index in (0, 1, 5, 40, 79):
        for row in range(3):
            assert logp[row, index].item() == pytest.approx(
                by_hand(log_pi[row], every[index].tolist(), 3, memory))
    torch.testing.assert_close(policy_log_prob(log_pi, every[None]), logp)


def test_sequences_of_one_step():
    """A failure means that the smallest MDP, a bandit, does not work."""
    log_pi = random_policy(letters=3, length=1, memory=0)
    torch.testing.assert_close(sequence_log_prob(log_pi), log_pi[:, 0, 0])
    assert all_sequences(1, 3).tolist() == [[0], [1], [2]]


def test_contexts_by_hand():
    """A failure means that a learner who remembers more, or less, is taken for the definition."""
    assert contexts_by_hand((2, 0, 1, 1), 3, 0) == [0, 0, 0, 0]
    assert contexts_by_hand((2, 0, 1, 1), 3, 1) == [0, 2, 0, 1]
    assert contexts_by_hand((2, 0, 1, 1), 3, 2) == [0, 2, 6, 1]


def test_demonstrator_by_hand():
    """A failure means that every comparison here is with another demonstrator than described."""
    demo = make_demonstrator(["ab", "bb"], [0.25, 0.75], slip=0.1, letters=2)
    torch.testing.assert_close(demonstrator_log_prob(demo).exp(), torch.tensor(
        [0.25 * 0.9 * 0.1 + 0.75 * 0.1 * 0.1, 0.25 * 0.9 * 0.9 + 0.75 * 0.1 * 0.9,
         0.25 * 0.1 * 0.1 + 0.75 * 0.9 * 0.1, 0.25 * 0.1 * 0.9 + 0.75 * 0.9 * 0.9]).double())


def test_too_large_an_mdp_is_refused_before_memory_is_touched():
    """A failure means that a typo in T takes the machine down."""
    tracemalloc.start()
    for call in (lambda: check_enumerable(40, 4), lambda: all_sequences(40, 4),
                 lambda: sequence_log_prob(torch.zeros(1, 40, 1, 4))):
        with pytest.raises(InputError, match=rf"4\^40.*{MAX_SEQUENCES}"):
            call()
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    check_enumerable(8, 4)                          # the largest that is allowed
    with pytest.raises(InputError):
        check_enumerable(0, 4)


@pytest.mark.parametrize("change", [
    {"weights": [0.5, 0.4, 0.2]}, {"weights": [0.5, 0.5]}, {"weights": [-0.5, 1.0, 0.5]},
    {"weights": [0.0, 0.5, 0.5]},
    {"patterns": ["aa", "aaa", "b"]}, {"patterns": ["", "", ""]}, {"patterns": ["ae", "aa", "bb"]},
    {"slip": 1.0}, {"slip": -0.1}, {"letters": 1}, {"letters": 27}])
def test_bad_demonstrators_are_refused(change):
    """A failure means that probabilities which are none are averaged into a figure."""
    good = {"patterns": PATTERNS, "weights": [0.5, 0.3, 0.2], "slip": 0.1, "letters": 4}
    make_demonstrator(**good)
    with pytest.raises(InputError):
        make_demonstrator(**{**good, **change})


@pytest.mark.parametrize("change", [{"weights": "a,b,c"}, {"weights": "1"}, {"starts": 0},
                                    {"slip": 0.0},
                                    {"patterns": "a" * 40, "weights": "1"}])
def test_bad_settings_are_refused(change):
    """A failure means a stack trace for a typo on the command line."""
    with pytest.raises(InputError):
        main(Settings(**change))


# ---- dynamic programming ------------------------------------------------------------------------

@pytest.mark.parametrize("memory", [0, 1, 2, 5])
def test_occupancies_agree_with_enumeration(memory):
    """A failure means that results for large T, where nothing can be listed, are wrong."""
    letters, length = 3, 4
    log_pi = random_policy(letters, length, memory)
    rho = occupancies(log_pi.exp())
    torch.testing.assert_close(rho.sum((2, 3)), torch.ones(3, length).double())
    p = sequence_log_prob(log_pi).exp()
    listed = torch.zeros_like(rho)
    for index, sequence in enumerate(all_sequences(length, letters).tolist()):
        for t, context in enumerate(contexts_by_hand(sequence, letters, memory)):
            listed[:, t, context, sequence[t]] += p[:, index]
    torch.testing.assert_close(rho, listed)


@pytest.mark.parametrize("memory", [0, 1, 3])
def test_sft_optimum_is_the_least_forward_kl(demo, memory):
    """A failure means that the closed form is not SFT's solution: its gradient does not vanish."""
    pi = sft_optimum(demo, memory)
    logits = pi.log()[None].requires_grad_()
    logp = sequence_log_prob(logits.log_softmax(-1))
    value = forward_kl(demonstrator_log_prob(demo), logp)[0]
    assert torch.autograd.grad(value, logits)[0].abs().max() < 1e-12
    rho = demonstrator_occupancies(demo, memory)
    assert rho.sum().item() == pytest.approx(demo.length)
    if memory == 3:                                 # full memory: the demonstrator itself
        assert value.item() == pytest.approx(0, abs=1e-12)
    else:
        assert value.item() > 0.1


def test_horizon_curve_has_its_closed_form():
    """A failure means that the lesson, 1 - 2^(1-T), is drawn over something else. Up to T = 8 the
    dynamic programme is also checked against listing every sequence."""
    for memory in (0, 1):
        for length, measured, closed in horizon_curve(range(1, 30), memory):
            assert measured == pytest.approx(closed, abs=1e-12)
            if memory == 0:
                assert closed == 1 - 2.0 ** (1 - length)
    for length in (2, 5, 8):
        demo = make_demonstrator(["a" * length, "b" * length], [0.5, 0.5], slip=0.0, letters=2)
        pi = sft_optimum(demo, memory=0)
        p = sequence_log_prob(pi.log()[None])[0].exp()
        assert nobody_wrote(pi, demo) == pytest.approx(1 - p[0].item() - p[-1].item())


def test_nobody_wrote_counts_a_repeated_pattern_once():
    """A failure means that two styles with one pattern make precision exceed one."""
    demo = make_demonstrator(["ab", "ab"], [0.5, 0.5], slip=0.0, letters=2)
    assert nobody_wrote(sft_optimum(demo, 0), demo) == pytest.approx(0)
    assert describe(demo, demonstrator_log_prob(demo))["precision"] == pytest.approx(1)


def test_large_horizon_is_dynamic_programming_alone():
    """A failure means that something lists the sequences of a T where that is impossible."""
    demo = make_demonstrator(["a" * 200, "ab" * 100], [0.5, 0.5], slip=0.01, letters=4)
    pi = sft_optimum(demo, memory=1)
    assert occupancies(pi[None]).sum().item() == pytest.approx(200)
    assert 0.99 < nobody_wrote(pi, demo) <= 1


# ---- exact solutions ----------------------------------------------------------------------------

def test_policy_from_roots_is_a_policy():
    """A failure means that the minimiser walks among things that are not distributions."""
    z = torch.randn(2, 2, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(policy_from_roots(z).exp(), z ** 2 / (z ** 2).sum(-1, True))


def test_starts_are_policies_and_hold_every_set_of_styles(demo):
    """A failure means that some choice of styles is never tried as a mode to seek."""
    start = starting_points(demo, 1, 4, torch.Generator().manual_seed(0))
    assert len(start) == 4 + 2 ** 3 - 1
    torch.testing.assert_close(start.exp().sum(-1), torch.ones(start.shape[:3]).double())
    assert set(styles_found(demo, start[4:])) >= {"1", "2", "3", "1+3", "1+2+3"}


def test_solutions_are_stationary_in_logits(demo, solutions):
    """A failure means that `exact` is not: the gradient of D_f itself, in logits, must vanish.
    Total variation has no gradient at its kinks: there its value must beat every neighbour."""
    log_beta = demonstrator_log_prob(demo)
    for (memory, name), (log_pi, value, gradient_norm) in solutions.items():
        assert value.tolist() == sorted(value.tolist())
        if name == "total_variation":
            continue
        logits = log_pi[:1].clone().requires_grad_()
        logp = sequence_log_prob(logits.log_softmax(-1))
        exact = f_divergence(DIVERGENCES[name], log_beta, logp)[0]
        assert exact.item() == pytest.approx(value[0].item())
        assert torch.autograd.grad(exact, logits)[0].norm() < 1e-6 * max(1, exact.item())
        assert gradient_norm[0] < 1e-6


def test_total_variation_optimum_beats_its_neighbours(demo, solutions):
    """A failure means that the smoothing has moved total variation's optimum by more than 0.005."""
    log_beta = demonstrator_log_prob(demo)
    generator = torch.Generator().manual_seed(0)
    for memory in (0, 1):
        log_pi, value, _ = solutions[memory, "total_variation"]
        for size in (0.003, 0.03, 0.3):
            noise = torch.randn(300, *log_pi.shape[1:], generator=generator, dtype=torch.float64)
            near = (log_pi[:1] + size * noise).log_softmax(-1)
            logp = sequence_log_prob(near)
            assert f_divergence(DIVERGENCES["total_variation"], log_beta, logp).min() > (
                value[0] - 0.005)


def test_forward_kl_solution_is_the_closed_form(demo, solutions):
    """A failure means that descent on the enumerated objective misses a known optimum."""
    for memory in (0, 1):
        logp = sequence_log_prob(sft_optimum(demo, memory).log()[None])
        expected = forward_kl(demonstrator_log_prob(demo), logp)[0].item()
        _, value, _ = solutions[memory, "forward_kl"]
        torch.testing.assert_close(value, torch.full_like(value, expected))   # from every start


def test_covering_covers_and_seeking_seeks(demo, solutions):
    """The lesson itself (C3). A failure means that the page shows the opposite of its caption."""
    rows = {(r["memory"], r["minimised"]): r for r in summarise(demo, solutions)}
    for memory in (0, 1):
        cover, seek = rows[memory, "forward_kl"], rows[memory, "reverse_kl"]
        assert seek["precision"] > cover["precision"] + 0.05
        assert seek["entropy"] < cover["entropy"] - 0.2
        for name in DIVERGENCES:                    # each solution is the best at its own measure
            best = rows[memory, name]["cross"][name]
            assert best == pytest.approx(rows[memory, name]["value"])
            assert all(rows[memory, other]["cross"][name] >= best - 0.005 for other in DIVERGENCES)
    assert rows[0, "reverse_kl"]["precision"] > 3 * rows[0, "forward_kl"]["precision"]
    assert rows[0, "forward_kl"]["recall"] > 0.9 > rows[0, "reverse_kl"]["recall"]
    assert rows[0, "reverse_kl"]["styles"][0] > 0.7
    # writing style 1 alone costs at most -log of its weight, since beta >= 0.5 style 1
    assert 0.6 < rows[0, "reverse_kl"]["value"] < -math.log(0.5)
    assert set(rows[0, "reverse_kl"]["found"]) == {"1", "2", "3"}


def test_full_memory_has_nothing_to_trade(demo):
    """A failure means that seven divergences disagree even where the policy can be beta."""
    log_pi = sft_optimum(demo, memory=3).log()[None]
    logp = sequence_log_prob(log_pi)[0]
    for divergence in DIVERGENCES.values():
        assert f_divergence(divergence, demonstrator_log_prob(demo), logp).item() == pytest.approx(
            0, abs=1e-9)
    random = starting_points(demo, 3, 3, torch.Generator().manual_seed(0))[:3]
    for name in ("reverse_kl", "forward_kl"):        # no other optimum in the way, from anywhere
        assert solve_exactly(demo, DIVERGENCES[name], random)[1].max() < 1e-4


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_policy_gradient_on_sequences(demo, divergence):
    """C1 through a policy that writes letter by letter. A failure means that the identity of
    divergences.py is lost between sequences and tokens."""
    log_beta = demonstrator_log_prob(demo)
    logits = random_policy(4, 4, 1).requires_grad_()
    logp = sequence_log_prob(logits.log_softmax(-1))
    exact = torch.autograd.grad(f_divergence(divergence, log_beta, logp).sum(), logits,
                                retain_graph=True)[0]
    surrogate = policy_surrogate(divergence, log_beta - logp, logp, weights=logp.exp())
    policy = torch.autograd.grad(surrogate.sum(), logits)[0]
    assert (policy + exact).abs().max() < 1e-8 * exact.abs().max().clamp(min=1)


# ---- what is printed and drawn ------------------------------------------------------------------

def test_describe_by_hand():
    """A failure means that precision or recall in the table is something else."""
    demo = make_demonstrator(["aa", "bb"], [0.75, 0.25], slip=0.0, letters=2)
    logp = torch.tensor([0.5, 0.3, 0.199, 0.001], dtype=torch.float64).log()  # aa, ab, ba, bb
    told = describe(demo, logp, samples=1000)
    assert told["styles"] == pytest.approx([0.5, 0.001])
    assert told["precision"] == pytest.approx(0.501)
    assert told["recall"] == pytest.approx(0.75 + 0.25 * (1 - 0.999 ** 1000))
    assert told["entropy"] == pytest.approx(-(logp.exp() * logp).sum().item())


def test_typical_sequences_are_in_proportion():
    """A failure means that the page of samples is not what the policy writes."""
    logp = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64).log()
    assert typical_sequences(logp, 10).tolist() == [1] * 6 + [2] * 3 + [0]


def test_typical_sequences_break_ties_in_dictionary_order():
    """A failure means that the README's picture depends on the machine's rounding."""
    p = torch.tensor([0.25 - 1e-12, 0.25, 0.25 + 1e-12, 0.25], dtype=torch.float64)
    assert typical_sequences(p.log(), 4).tolist() == [0, 1, 2, 3]


def test_tables_fit_a_terminal(demo, solutions, capsys):
    """A failure means that a row breaks where seven divergences end in five sets of styles."""
    rows = summarise(demo, solutions)
    for row in rows:
        row["found"] = {"1+3": 3, "1": 4, "2+3": 3, "2": 1, "3": 1}
    curves = {memory: horizon_curve(range(1, 25), memory) for memory in (0, 1)}
    print_tables(Settings(), demo, rows, curves)
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


def test_default_demonstrator_and_main(tmp_path, capsys):
    """A failure means that `python -m toy_envs.token_mdp` is broken, or its tables too wide."""
    assert demonstrator_of(Settings()).patterns.shape == (3, 6)
    main(Settings(patterns="aaa,bcb", weights="0.6,0.4", letters=3, starts=1, out=str(tmp_path)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["solutions"]) == 14
    for name in ("token_mdp.png", "token_mdp_horizon.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    table = capsys.readouterr().out
    assert max(len(line) for line in table.splitlines()[:-1]) <= 80
