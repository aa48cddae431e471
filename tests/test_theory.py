"""Claims about examples/theory.py: its exact numbers are exact, its students obey them, growths differ."""
import fractions
import importlib.util
import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from bread import anchor_search
from conftest import ROOT, drive


@pytest.fixture  # a fresh module for every test, which may choose P and G
def theory():
    spec = importlib.util.spec_from_file_location("theory", ROOT / "examples/theory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cost_by_enumeration(theory, length, jump):
    """Mean rollouts from all 2^anchors outcomes of the probes, searched by bread.py, by a linear system."""
    anchors = [*range(jump, length, jump)]
    frontiers = [*anchors, length]
    stay = np.zeros((len(frontiers),) * 2)
    cost = np.zeros(len(frontiers))
    for row, frontier in enumerate(frontiers):
        unknown = [max(frontier - start, 0) for start in (0, *anchors)]
        alone, *chances = [1 - (1 - theory.P ** n) ** theory.G for n in unknown]
        cost[row] = alone * theory.G
        for hits in itertools.product((0, 1), repeat=len(anchors)):
            weight = (1 - alone) * math.prod(c if hit else 1 - c for c, hit in zip(chances, hits))
            accepted, probes = drive(anchor_search(len(anchors), theory.G, high=theory.G), hits)
            known = frontier if accepted is None else min(frontier, anchors[accepted])
            stay[row, frontiers.index(known)] += weight
            cost[row] += weight * theory.G * (1 + len(probes))
    return np.linalg.solve(np.eye(len(frontiers)) - stay, cost)[-1]


@pytest.mark.parametrize("L", [1, 2, 3, 4])
def test_the_chain_moves_one_state_on_or_back_to_the_question(theory, L):
    """Row i: p_i to i + 1, the rest to 0; the goal stays. 2L moves from 0 gain the factor 1 + (1 - P) L."""
    forward_L = np.random.default_rng(L).random(L)
    chain_SS = theory.transition_matrix(forward_L)
    for i, chance in enumerate(forward_L):
        assert {j: p for j, p in enumerate(chain_SS[i]) if p} == {0: 1 - chance, i + 1: chance}
    assert list(chain_SS[L]) == [0] * L + [1]
    alike = theory.transition_matrix(np.full(L, 0.3))
    assert np.linalg.matrix_power(alike, 2 * L)[0, L] == pytest.approx(0.3 ** L * (1 + 0.7 * L), rel=1e-12)


@pytest.mark.parametrize("chance, group", [(0.5, 8), (0.3, 2), (0.8, 1)])
def test_expected_rollouts_equal_brute_force(theory, chance, group):
    """Of every outcome of every probe, also where j does not divide L; without anchors G / q(L)."""
    theory.P, theory.G = chance, group
    for length, jump in ((1, 1), (4, 2), (6, 1), (7, 3), (8, 2), (10, 2), (6, 6)):
        exact = theory.expected_rollouts(length, jump)
        assert exact == pytest.approx(cost_by_enumeration(theory, length, jump), rel=1e-9)
    for length in (1, 9, 99):
        q = 1 - (1 - fractions.Fraction(chance) ** length) ** group  # float64 would round it to 0
        assert theory.expected_rollouts(length, length) == pytest.approx(group / float(q), rel=1e-12)


@pytest.mark.parametrize("length, jump", [(4, 4), (7, 7), (4, 2), (9, 3), (13, 4), (16, 2)])
def test_simulated_students_cost_what_the_equations_say(theory, length, jump):
    """400 students each, within 4 standard errors, which skewed costs miss by chance once in 1,000."""
    rng = np.random.default_rng([length, jump])
    costs = np.array([theory.learn(length, jump, rng) for _ in range(400)])
    assert abs(costs.mean() - theory.expected_rollouts(length, jump)) < 4 * costs.std(ddof=1) / 20


def test_unaided_the_growth_is_exponential_and_with_anchors_at_most_k_log_k(theory):
    """Alone by 1/P a state, up to the (G - 1) P^L / 2 by which groups round; and so with K fixed."""
    cost = theory.expected_rollouts
    alone = np.array([cost(n, n) for n in range(10, 60)])
    assert np.allclose(alone[1:] / alone[:-1], 2, rtol=7 * 2.0 ** -11)
    assert cost(4 * 30, 30) / cost(4 * 29, 29) == pytest.approx(2, rel=1e-4)
    for theory.P, length, jump in itertools.product((0.3, 0.5, 0.8), [*range(4, 41), 64, 128], (1, 2, 4)):
        segments = math.ceil(length / jump)
        bound = segments * theory.G * (1 + math.ceil(math.log2(segments))) / theory.group_success(jump)
        assert theory.G <= cost(length, jump) <= bound * (1 + 1e-12)


def test_the_command_prints_the_table_and_the_growth(theory):
    """The exact costs; e^(-ln P L) within 1% without anchors, L^1.5 or less with them."""
    printed = subprocess.check_output([sys.executable, theory.__file__], text=True)
    _, *rows, last = printed.replace("|", " ").replace("+-", " ").splitlines()
    for row, length in zip(map(str.split, rows), theory.LENGTHS, strict=True):
        for cost, jump in ((row[3], length), (row[-3], theory.JUMP)):
            assert float(cost) == pytest.approx(theory.expected_rollouts(length, jump), rel=5e-4, abs=0.051)
    rate, power = re.findall(r"\^\(?([\d.]+)", last)
    assert float(rate) == pytest.approx(math.log(2), rel=0.01) and 1 < float(power) <= 1.5
