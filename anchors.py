"""Which part of the expert's trace to show: BREAD's search, and what other papers do instead. Standard library only.

    trace   e e e e | e e e e | e e e e e | e e e e ####        a policy yields the index of a cut
                    0         1           2                     is sent how many of a fresh group behind it were right
                                                                returns the index whose group is trained on, or None

A policy is a generator. It knows no model and no problem, so it is proved on tables, and a loop drives many of them at
once. Where every group is to be sampled behind an anchor (`--anchor-when always`), the first cut is the bare question.

    search    BREAD (2506.17211)                      the shortest cut in range, by binary search     <= 4 probes
    random    R3 (2402.05808), PrefixRL (2601.18795)  uniform, in a range of the trace                one
    fixed     QuestA (2507.13266)                     a share of the trace                            one
    anneal    UFT (2505.16984)                        Binomial, its mean falling with the run         one
    adaback   AdaBack (2506.18110)                    a search per problem, one probe at each visit   one

Except for the search, the papers sample every group behind their anchor; used where all unaided rollouts failed, the
policies differ from BREAD in nothing but the cut.
"""
import math


def anchor_search(num_cuts, group_size, low=1, high=0):
    """Binary search for the shortest anchor whose group is neither hopeless nor trivial (a generator).

    Yields the index of a cut, 0 being the shortest anchor; is sent the number of successes of a fresh group there;
    returns the shortest cut seen with low <= successes <= high (0: group_size - 1), or None. No cut is asked for
    twice, and at most ceil(log2(num_cuts + 1)) are: 4 where K = 10 episodes give 9 cuts.

    >>> search = anchor_search(num_cuts=9, group_size=8)
    >>> next(search), search.send(0), search.send(8)      # 0 of 8 at cut 4: show more; 8 of 8 at cut 6: show less
    (4, 6, 5)
    >>> search.send(3)                                    # 3 of 8 at cut 5: accepted, and nothing shorter is left
    Traceback (most recent call last):
    StopIteration: 5
    """
    high = high or group_size - 1
    first, last, accepted = 0, num_cuts - 1, None
    while first <= last:
        cut = (first + last) // 2
        successes = yield cut
        if successes < low:
            first = cut + 1          # out of reach: show more of the trace
        else:
            last = cut - 1           # within reach: try to show less
            if successes <= high:
                accepted = cut
    return accepted


def anchor_random(num_cuts, group_size, low, high, rng, start=0.0, end=1.0):
    """A uniform cut among those from share `start` to share `end` of the cuts, from the random.Random `rng`."""
    if num_cuts:
        first = min(int(start * num_cuts), num_cuts - 1)
        pick = rng.randrange(first, max(math.ceil(end * num_cuts), first + 1))
        return (yield from _once(pick, group_size, low, high))


def anchor_fixed(num_cuts, group_size, low, high, fraction):
    """The cut at a share of the cuts; 1.0 is the last of them."""
    if num_cuts:
        return (yield from _once(min(int(fraction * num_cuts), num_cuts - 1), group_size, low, high))


def anchor_anneal(num_cuts, group_size, low, high, rng, progress):
    """UFT: the cut's index is Binomial(num_cuts - 1, p); p falls from 0.95 to 0.05 along half a cosine over the first
    60% of the run and is 0 from there on. `progress`: share of the run that is done, 0 to 1."""
    if num_cuts:
        p = 0.05 + 0.45 * (1 + math.cos(math.pi * progress / 0.6)) if progress < 0.6 else 0.0
        pick = sum(rng.random() < p for _ in range(num_cuts - 1))
        return (yield from _once(pick, group_size, low, high))


def anchor_adaback(num_cuts, group_size, low, high, rng, interval):
    """AdaBack: a uniform cut from the problem's `interval` [first, last] (of cuts, both included), which is changed in
    place for the problem's next turn: to what is shorter if `low` rollouts (at least one) were right, else to what is
    longer. The other bound starts anew each time, since the policy changes from epoch to epoch."""
    if num_cuts:
        pick = rng.randint(*interval)
        successes = yield pick
        within_reach = successes >= max(low, 1)
        interval[:] = (0, max(pick - 1, 0)) if within_reach else (min(pick + 1, num_cuts - 1), num_cuts - 1)
        if low <= successes <= (high or group_size - 1):
            return pick


def _once(pick, group_size, low, high):
    successes = yield pick
    if low <= successes <= (high or group_size - 1):
        return pick
