"""Why branching from an expert's trace beats waiting for luck: a Markov chain, solved exactly and simulated.

    python examples/theory.py [--plot theory.png]         # NumPy alone; the picture needs matplotlib

States 0 (the question) to L (the answer). The expert leaps 0 -> j -> 2j -> .. -> L. The student moves to i+1
with probability p_i, else it errs and is back in 0. At first all p_i = P; a success sets p_i = 1 wherever it
passed. A rollout from state a has L - a moves: one error is fatal. (2L moves from 0: times 1 + (1 - P) L.)

  SFT    teaches nothing: a leap has probability 0 whatever the p_i are, for j > 1: the trace has no gradient.
  GRPO   waits for a group of G rollouts from 0 with a success: on average G / q(L) >= P^-L rollouts, where
         q(n) = 1 - (1 - P^n)^G is the chance that a group succeeds which has n unknown states ahead.
  BREAD  G rollouts from 0; if all fail, binary search for the anchor nearest to 0 from which some of G fresh
         rollouts succeed; learn there; repeat. With K = L/j a search takes at most ceil(log2 K) probes.
         Unless one is lucky earlier, it probes the last anchor before the known states, at most j away: with
         chance >= q(j) a step learns one of K segments or more. So at most
         K G (1 + ceil(log2 K)) / q(j) rollouts: of order L log L.

From the paper (Zhang et al., arXiv 2506.17211): BREAD, and that SFT + RL fails where the student cannot
express the traces or its own success is exponentially rare, shown on a toy student-expert Markov chain. Ours:
this chain and bound; they illustrate the paper's theory and are not it. They flatter: p_i is 1 at once (at
r < 1, known states would succeed with r^L only); any success teaches (bread.py wants a failure in the group,
too); anchors stay j apart (a fixed number K of segments, the paper's is 10, only divides the exponent by K).

Dimension key: L states left   S = L + 1   N rollouts
"""
import argparse
import math

import numpy as np

P = 0.5                                    # chance of a right move at first
JUMP = 2                                   # the expert's j
G = 8                                      # rollouts in a group
LENGTHS = (4, 6, 8, 10, 12, 16, 24, 32, 48)
ROLLOUTS = 200_000                         # simulated for each rate
STUDENTS = 100                             # simulated for each cost; GRPO's only up to L = LUCK
LUCK = 10
HEAD = "  L | unaided success   simulated | GRPO, rollouts      simulated | BREAD, rollouts     simulated"
ROW = "{:3d} | {:15.2e}  {:10.1e} | {:14.4g}  {:5.0f} +- {:4.0f} | {:15.1f}  {:5.1f} +- {:4.1f}"


def transition_matrix(forward_L):
    """(S, S) the student's chain, from row to column; forward_L: all p_i. Its n-th power: n moves."""
    chain_SS = np.diag(forward_L, k=1)
    chain_SS[:-1, 0] = 1 - forward_L       # errors
    chain_SS[-1, -1] = 1                   # the goal is never left
    return chain_SS


def group_success(unknown):
    """q(unknown), exact. Not written as 1 - (1 - P^n)^G, which float64 rounds to 0 from n = 54 on."""
    return -math.expm1(G * math.log1p(-P ** unknown)) if unknown > 0 else 1.0


def search(frontier, anchors, known, cost):
    """Exact means over a binary search: [probes, chance to learn, rollouts still to come where it learned].

    States are known from `frontier` on before the search, and by now from `known` on.
    """
    if not anchors:
        return np.array([0, known < frontier, cost.get(known, 0)])
    middle = (len(anchors) - 1) // 2
    chance = group_success(frontier - anchors[middle])
    return ([1, 0, 0] + chance * search(frontier, anchors[:middle], anchors[middle], cost)
            + (1 - chance) * search(frontier, anchors[middle + 1:], known, cost))


def expected_rollouts(length, jump):
    """Exact mean of what `learn` returns: cost = G groups + later + (1 - learns) cost, last segment first."""
    cost = {0: 0.0}
    anchors = range(jump, length, jump)
    for frontier in [*anchors, length]:
        alone = group_success(frontier)
        groups, learns, later = [1, alone, 0] + (1 - alone) * search(frontier, anchors, frontier, cost)
        cost[frontier] = (G * groups + later) / learns
    return cost[length]


def walk(forward_L, start, moves, count, rng):
    """(N,) bool: which of `count` simulated rollouts of `moves` moves from state `start` end in the goal."""
    chance_S = np.append(forward_L, 1.0)
    state_N = np.full(count, start)
    for luck_N in rng.random((moves, count)):
        state_N = (state_N + (state_N < len(forward_L))) * (luck_N < chance_S[state_N])
    return state_N == len(forward_L)


def learn(length, jump, rng):
    """Rollouts that a student spends, simulated, until it knows all states. Without anchors, jump = length,
    this is GRPO."""
    forward_L = np.full(length, P)
    spent = 0
    while forward_L[0] < 1:
        starts = range(0, length, jump)
        known = length
        probe = 0                          # the first group is unaided: it starts from 0
        while starts:
            spent += G
            if walk(forward_L, starts[probe], length - starts[probe], G, rng).any():
                known = starts[probe]
                starts = starts[:probe]    # within reach: try to show less
            else:
                starts = starts[probe + 1:]
            probe = (len(starts) - 1) // 2
        forward_L[known:] = 1
    return spent


def table_row(length, rng):
    """[L, unaided success exact and simulated, then of GRPO and BREAD: exact cost, simulated cost, error]."""
    fresh_L = np.full(length, P)
    chain_SS = np.linalg.matrix_power(transition_matrix(fresh_L), length)
    row = [length, chain_SS[0, length], walk(fresh_L, 0, length, ROLLOUTS, rng).mean()]
    for jump in (length, JUMP):
        students = STUDENTS if length <= LUCK or jump < length else 0
        costs = [learn(length, jump, rng) for _ in range(students)] or [math.nan, math.nan]
        row += [expected_rollouts(length, jump), np.mean(costs), np.std(costs, ddof=1) / STUDENTS ** 0.5]
    return row


def slope(x, y):
    return np.polyfit(x, y, 1)[0]


def main():
    """Print the table and the growth fitted to the exact costs; with --plot, draw the costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--plot", metavar="FILE", help="draw both costs against L; needs matplotlib")
    args = parser.parse_args()
    if args.plot:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            parser.exit(2, "--plot needs matplotlib: pip install matplotlib\n")
    rng = np.random.default_rng(0)
    rows = []
    print(HEAD)
    for length in LENGTHS:
        rows.append(table_row(length, rng))
        print(ROW.format(*rows[-1]).replace("nan +-  nan", "           ").replace("nan", "   "))
    lengths, _, _, grpo, grpo_mean, _, bread, bread_mean, _ = np.array(rows).T
    leap = transition_matrix(np.full(JUMP, P))[0, JUMP]
    print(f"growth: GRPO e^({slope(lengths, np.log(grpo)):.3f} L), where -ln P = {-math.log(P):.3f}; "
          f"BREAD L^{slope(np.log(lengths), np.log(bread)):.2f}; SFT: P(leap of {JUMP}) = {leap:.0f}")
    if args.plot:
        figure = Figure(layout="constrained")
        axes = figure.add_subplot(xlabel="L", ylabel="rollouts until all is known", yscale="log")
        axes.plot(lengths, grpo, lengths, bread, lengths, grpo_mean, "k.", lengths, bread_mean, "k.")
        axes.legend(["GRPO, exact", "BREAD, exact", "simulated"])
        figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    main()
