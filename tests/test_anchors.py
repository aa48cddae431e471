"""Claims about anchors.py, proved on tables of success counts; no model is involved."""
import itertools
import math
import random

import pytest

from anchors import anchor_adaback, anchor_anneal, anchor_fixed, anchor_random, anchor_search
from conftest import drive


# ---------------------------------------------------------------- the search


def check_search(table, group_size, low=1, high=0):
    """For every table: at most ceil(log2(n + 1)) probes, none twice, and the shortest probed cut in range."""
    found, asked = drive(anchor_search(len(table), group_size, low, high), table)
    in_range = [cut for cut in asked if low <= table[cut] <= (high or group_size - 1)]
    assert len(asked) <= math.ceil(math.log2(len(table) + 1))
    assert len(set(asked)) == len(asked) and all(0 <= cut < len(table) for cut in asked)
    assert found == min(in_range, default=None)
    return found


@pytest.mark.parametrize("num_cuts", range(16))
@pytest.mark.parametrize("low, high", [(1, 0), (1, 1), (2, 6), (4, 4), (7, 8), (8, 8), (1, 8)])
def test_search_finds_the_shortest_cut_in_range_of_every_monotone_table(num_cuts, low, high):
    """G = 8. A table matters only through which cuts are below, in and above the range, so every split is tried;
    within the range the counts rise too."""
    top = high or 7
    for below, inside in itertools.product(range(num_cuts + 1), repeat=2):
        above = num_cuts - below - inside
        if above < 0 or (above and top == 8):
            continue
        rising = [low + (top - low) * i // max(inside - 1, 1) for i in range(inside)]
        table = [low - 1] * below + rising + [8] * above
        assert check_search(table, 8, low, high) == (below if inside else None)


def test_search_is_right_on_every_monotone_table_of_counts():
    """All 462 non-decreasing tables of 6 cuts for G = 5, none left out, for every range."""
    for low, high in itertools.combinations_with_replacement(range(1, 6), 2):
        for table in itertools.combinations_with_replacement(range(6), 6):
            expected = next((cut for cut, count in enumerate(table) if low <= count <= high), None)
            assert check_search(table, 5, low, high) == expected


def test_search_ends_on_every_table_monotone_or_not():
    """All tables of up to 7 cuts with counts below, in and above the range, among them: never in range, all
    succeed, a jump over the range. The answer is None or the shortest cut that was seen in range."""
    for num_cuts in range(8):
        for table in itertools.product((0, 3, 8), repeat=num_cuts):
            check_search(table, 8)
    assert check_search([0, 0, 0, 8, 8, 8, 8], 8) is None, "jumps over the range"
    assert check_search([8] * 9, 8) is None and check_search([0] * 9, 8) is None


# ---------------------------------------------------------------- the policies of other papers: one probe each


def one_probe_policies(num_cuts, low=1, high=0):
    rng, interval = random.Random(0), [0, num_cuts - 1]
    return [anchor_random(num_cuts, 8, low, high, rng), anchor_fixed(num_cuts, 8, low, high, 0.5),
            anchor_anneal(num_cuts, 8, low, high, rng, 0.3), anchor_adaback(num_cuts, 8, low, high, rng, interval)]


@pytest.mark.parametrize("low, high, accepted", [(1, 0, range(1, 8)), (2, 4, range(2, 5)), (0, 8, range(9))])
def test_a_policy_without_search_probes_once_and_accepts_what_is_in_range(low, high, accepted):
    """G = 8: it returns its pick when the count is in range, else None; without cuts it asks nothing."""
    for count in range(9):
        for policy in one_probe_policies(5, low, high):
            found, asked = drive(policy, [count] * 5)
            assert len(asked) == 1 and found == (asked[0] if count in accepted else None)
    assert all(drive(policy, []) == (None, []) for policy in one_probe_policies(0))


@pytest.mark.parametrize("start, end, allowed", [
    (0.0, 1.0, range(9)), (0.4, 0.8, range(3, 8)), (0.5, 0.5, [4]), (1.0, 1.0, [8]), (0.0, 0.0, [0])])
def test_random_anchors_are_uniform_in_their_range(start, end, allowed):
    """600 picks of 9 cuts; each of n allowed ones is expected 600 / n times, and 5 standard deviations are left."""
    rng = random.Random(1)
    picks = [drive(anchor_random(9, 8, 1, 0, rng, start, end), [3] * 9)[0] for _ in range(600)]
    expected = 600 / len(allowed)
    assert set(picks) == set(allowed)
    assert all(abs(picks.count(pick) - expected) <= 5 * math.sqrt(expected) for pick in allowed)


@pytest.mark.parametrize("fraction, pick", [(0.0, 0), (0.5, 4), (0.99, 8), (1.0, 8)])
def test_a_fixed_anchor_is_a_share_of_the_cuts(fraction, pick):
    """Of 9 cuts; 1.0 is the last of them."""
    assert drive(anchor_fixed(9, 8, 1, 0, fraction), [3] * 9)[0] == pick


def test_annealed_anchors_have_ufts_mean_and_end_at_sixty_percent():
    """Binomial(8, p) with p = 0.95, 0.5, 0.05 at the start, middle and end of the first 60% of a run: over 2,000 draws
    the mean is within 4 standard errors of 8 p. From 60% on it is the first cut, always."""
    rng = random.Random(2)

    def picks(progress, count=2000):
        return [drive(anchor_anneal(9, 8, 1, 0, rng, progress), [3] * 9)[0] for _ in range(count)]
    for progress, p in ((0.0, 0.95), (0.15, 0.05 + 0.9 * 0.853553), (0.3, 0.5), (0.599999, 0.05)):
        found = picks(progress)
        assert abs(sum(found) / 2000 - 8 * p) <= 4 * math.sqrt(8 * p * (1 - p) / 2000)
        assert 0 <= min(found) and max(found) <= 8
    assert set(picks(0.6, 50)) == set(picks(1.0, 50)) == {0}


def test_adaback_keeps_an_interval_per_problem_that_follows_the_last_outcome():
    """Right behind its cut: next time a shorter one. All wrong: a longer one. The other bound starts anew."""
    rng = random.Random(3)
    for count, _ in itertools.product((0, 3, 8), range(50)):
        interval = [2, 6]
        found, (pick,) = drive(anchor_adaback(9, 8, 1, 0, rng, interval), [count] * 9)
        assert 2 <= pick <= 6 and found == (pick if count == 3 else None)
        assert interval == ([pick + 1, 8] if count == 0 else [0, pick - 1])
    for count, only in ((0, 8), (8, 0)):  # at the ends it stays
        interval = [only, only]
        drive(anchor_adaback(9, 8, 1, 0, rng, interval), [count] * 9)
        assert interval == [only, only]


def test_adaback_finds_the_boundary_and_follows_it():
    """Cuts from number 5 on succeed: over 200 visits the picks keep around it. Then all do: they go to the first."""
    rng, interval = random.Random(4), [0, 8]
    visits = [drive(anchor_adaback(9, 8, 1, 0, rng, interval), [0] * 5 + [4] * 4)[1][0] for _ in range(200)]
    assert 3.0 <= sum(visits) / 200 <= 6.0
    visits = [drive(anchor_adaback(9, 8, 1, 0, rng, interval), [4] * 9)[1][0] for _ in range(50)]
    assert visits[-1] == 0
