"""Claims about anchor_search of bread.py, proved on tables of success counts; no model is involved."""
import doctest
import itertools
import math

import pytest

import bread
from bread import anchor_search
from conftest import drive


def check(table, group_size, low=1, high=0):
    """For every table: at most ceil(log2(n + 1)) probes, none twice, and the shortest probed cut in range."""
    found, asked = drive(anchor_search(len(table), group_size, low, high), table)
    in_range = [number for number in asked if low <= table[number] <= (high or group_size - 1)]
    assert len(asked) <= math.ceil(math.log2(len(table) + 1))
    assert len(set(asked)) == len(asked) and all(0 <= number < len(table) for number in asked)
    assert found == min(in_range, default=None)
    return found


@pytest.mark.parametrize("num_cuts", range(16))
@pytest.mark.parametrize("low, high", [(1, 0), (1, 1), (2, 6), (4, 4), (7, 8), (8, 8), (1, 8)])
def test_search_finds_the_shortest_cut_in_range_of_every_monotone_table(num_cuts, low, high):
    """G = 8. A table matters only through which cuts are below, in and above the range: every split is tried,
    and within the range the counts rise too."""
    top = high or 7
    for below, inside in itertools.product(range(num_cuts + 1), repeat=2):
        above = num_cuts - below - inside
        if above < 0 or (above and top == 8):
            continue
        rising = [low + (top - low) * i // max(inside - 1, 1) for i in range(inside)]
        assert check([low - 1] * below + rising + [8] * above, 8, low, high) == (below if inside else None)


def test_search_is_right_on_every_monotone_table_of_counts():
    """All 462 non-decreasing tables of 6 cuts for G = 5, none left out, for every range."""
    for low, high in itertools.combinations_with_replacement(range(1, 6), 2):
        for table in itertools.combinations_with_replacement(range(6), 6):
            expected = next((number for number, count in enumerate(table) if low <= count <= high), None)
            assert check(table, 5, low, high) == expected


def test_search_ends_on_every_table_monotone_or_not():
    """All tables of up to 7 cuts with counts below, in and above the range, among them: never in range, all
    succeed, a jump over the range. The answer is None or the shortest cut that was seen in range."""
    for num_cuts in range(8):
        for table in itertools.product((0, 3, 8), repeat=num_cuts):
            check(table, 8)
    assert check([0, 0, 0, 8, 8, 8, 8], 8) is None, "jumps over the range"
    assert check([8] * 9, 8) is None and check([0] * 9, 8) is None


def test_the_search_that_the_docstring_plays_is_played_so():
    """The example of anchor_search, and of every other function in bread.py that has one."""
    failed, tried = doctest.testmod(bread)
    assert failed == 0 and tried >= 4
