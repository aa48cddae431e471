"""Figures of the claims from the results of bench/claims.py, as PNG. Needs matplotlib.

    python bench/claims_plot.py [--results bench/results/claims] [--output docs/figures]

accuracy.png     held-out accuracy against all sampled tokens, a panel per task
lengths.png      tokens to 80% against the length of a problem, BREAD and GRPO, a panel per task
curriculum.png   how much of the trace the anchors show, and how many groups have a gradient, step by step
controls.png     final accuracy of every method on chain, equal budgets (theory.png: examples/theory.py)
"""
import argparse
import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from claims import (ALWAYS, LABELS, NO_ANCHOR, TARGET, TASKS, WHERE_FAILED, exponent, final,
                    medians_by_length, read_results, select, tokens_to)

# Okabe and Ito's colours: told apart by colour-blind readers, too.
COLORS = {"bread": "#d55e00", "grpo": "#0072b2", "resample": "#009e73", "sft+grpo": "#cc79a7",
          "sft": "#7a7a7a"}
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "axes.linewidth": 0.7, "axes.grid": True, "grid.color": "#d9d9d9",
         "grid.linewidth": 0.5, "figure.constrained_layout.use": True, "savefig.dpi": 150}


def median_and_seeds(axis, curves, color):
    """Every seed of [(xs, ys), ...] as a thin line, their median, interpolated, as a thick one. A seed that
    ends early keeps its last value, as its accuracy would. Returns where the median ends."""
    grid = np.unique(np.concatenate([xs for xs, _ in curves]))
    for xs, ys in curves:
        axis.plot(xs, ys, color=color, linewidth=0.6, alpha=0.45)
    middle = np.median([np.interp(grid, *curve) for curve in curves], 0)
    axis.plot(grid, middle, color=color, linewidth=1.8, solid_capstyle="round")
    return middle[-1]


def labels_at_right(axis, named, gap):
    """A name beside each line's end, moved up where two would touch. named: [(y, text, color)]."""
    lowest = -math.inf
    for y, text, color in sorted(named):
        lowest = max(y, lowest + gap)
        axis.annotate(text, (1, lowest), xycoords=("axes fraction", "data"), xytext=(5, 0), color=color,
                      textcoords="offset points", annotation_clip=False, va="center", fontsize=8)


def panels(results, height, rows=1):
    """A column of axes per task that has results: (figure, axes[row][column], [(task, length), ...])."""
    tasks = [(task, length) for task, length in TASKS.items() if select(results, task, length, "bread")]
    figure, axes = plt.subplots(rows, len(tasks), figsize=(1.2 + 2.9 * len(tasks), height), squeeze=False,
                                sharex="col", sharey="row")
    for axis, (task, length) in zip(axes[0], tasks):
        axis.set_title(f"{task}, L = {length}")
    for axis in axes.flat:
        axis.set_ylim(-0.02, 1.02)
        axis.yaxis.set_major_formatter("{x:.0%}")
    return figure, axes, tasks


def accuracy(results):
    figure, axes, tasks = panels(results, 2.7)
    for axis, (task, length) in zip(axes[0], tasks):
        ends = []
        for method in ("grpo", "resample", "sft+grpo", "bread"):
            curves = []
            for r in select(results, task, length, method):
                points = [(row["tokens/sampled"] / 1000, row["eval/accuracy"]) for row in r["evaluations"]]
                curves.append(tuple(zip(*points)))
            if curves:
                ends.append((median_and_seeds(axis, curves, COLORS[method]), LABELS[method], COLORS[method]))
        sft = select(results, task, length, "sft")
        if sft:  # it samples nothing, so it is a level and not a curve
            level = statistics.median(map(final, sft))
            axis.axhline(level, color=COLORS["sft"], linewidth=1, linestyle=(0, (4, 3)))
            ends.append((level, "SFT (samples nothing)", COLORS["sft"]))
        axis.set_xlim(0, None)
    labels_at_right(axis, ends, gap=0.075)
    axes[0][0].set_ylabel("held-out accuracy, sampled")
    figure.supxlabel("sampled tokens, probes included (thousands)", fontsize=9)
    return figure


def lengths(results):
    tasks = sorted({r["task"] for r in results})
    size = (1.2 + 3.1 * len(tasks), 3.2)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks):
        ours = [r for r in results if r["task"] == task and r["method"] in ("bread", "grpo")]
        for r in ours:
            color = COLORS[r["method"]]
            x = r["length"] * (1 + 0.01 * (r["seed"] - 1))  # seeds beside each other
            if tokens_to(r) < math.inf:
                axis.plot(x, tokens_to(r), "o", color=color, markersize=3.5, alpha=0.6, markeredgewidth=0)
            else:
                axis.plot(x, r["tokens/sampled"], "^", color=color, markerfacecolor="white", markersize=4)
        slope = exponent(medians_by_length(results, task, "bread"))
        power = f" ~ $L^{{{slope:.2f}}}$" if slope is not None and slope < math.inf else ""
        for method, power, shift, side in (("grpo", "", (-7, 3), "right"), ("bread", power, (12, 0), "left")):
            line = [(n, y) for n, y in medians_by_length(results, task, method).items() if 0 < y < math.inf]
            if line:
                axis.plot(*zip(*line), color=COLORS[method], linewidth=1.6)
                axis.annotate(LABELS[method] + power, line[-1], xytext=shift, ha=side,
                              color=COLORS[method], textcoords="offset points", annotation_clip=False)
        ticks = sorted({r["length"] for r in ours})
        axis.set(xscale="log", yscale="log", xlabel="moves per problem, L", title=task)
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
    axes[0][0].set_ylabel(f"sampled tokens to {TARGET:.0%} held out")
    figure.suptitle("open triangle: never arrived within this budget", fontsize=8)
    return figure


def curriculum(results):
    def draw(axis, trials, key, value):
        """The series `key` of all seeds, as far as BREAD's longest run: GRPO's steps are cheaper and more."""
        series = [r["series"][key][:steps] for r in trials]
        curves = [(range(1, len(ys) + 1), [*map(value, ys)]) for ys in series]
        return median_and_seeds(axis, curves, COLORS[trials[0]["method"]])

    figure, axes, tasks = panels(results, 4.0, rows=2)
    for (above, below), (task, length) in zip(axes.T, tasks):
        bread, grpo = (select(results, task, length, method) for method in ("bread", "grpo"))
        steps = max(r["steps"] for r in bread)
        draw(above, bread, "anchor/fraction", lambda y: y or 0.0)
        ends = []
        for trials in filter(None, (grpo, bread)):
            end = draw(below, trials, "frac_reward_zero_std", lambda y: 1 - y)
            ends.append((end, LABELS[trials[0]["method"]], COLORS[trials[0]["method"]]))
        below.set_xlabel("step")
    axes[0][0].set_ylabel("accepted anchor, share of\nthe trace (0: none needed)")
    axes[1][0].set_ylabel("groups with\na gradient")
    labels_at_right(below, ends, gap=0.1)
    return figure


def controls(results):
    unaided = ["grpo", "resample", "sft", "sft+grpo", *(method for method, *_ in NO_ANCHOR)]
    groups = {"": ["bread"], "anchor where all rollouts failed": [method for method, *_ in WHERE_FAILED],
              "every group behind an anchor": [method for method, *_ in ALWAYS], "no anchor": unaided}
    figure, axis = plt.subplots(figsize=(5.6, 6.6))
    ticks = {}
    y = 0.0
    for title, methods in groups.items():
        found = {method: select(results, "chain", TASKS["chain"], method) for method in methods}
        found = {method: trials for method, trials in found.items() if trials}
        if title and found:
            y += 1.2
            axis.annotate(title, (0, y - 0.15), xycoords=("axes fraction", "data"), xytext=(3, 0), fontsize=8,
                          textcoords="offset points", va="center", style="italic")
        for method, trials in found.items():
            y += 1
            ticks[y] = LABELS[method]
            values = [*map(final, trials)]
            color = COLORS["grpo"] if method in unaided else COLORS.get(method, "#e69f00")
            if method == "bread":
                axis.axvline(statistics.median(values), color=color, linewidth=0.8, linestyle=(0, (4, 3)))
            axis.barh(y, statistics.median(values), height=0.7, color=color, alpha=0.35, linewidth=0)
            axis.plot(values, [y] * len(values), "o", color=color, markersize=3, clip_on=False)
    axis.set_yticks([*ticks], ticks.values())
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.set(xlim=(0, 1), ylim=(y + 0.6, 0.3), title=f"chain, L = {TASKS['chain']}, equal sampled tokens",
             xlabel="held-out accuracy, sampled: median and every seed")
    return figure


def main():
    parser = argparse.ArgumentParser(description="Draw the figures of docs/RESULTS.md.", allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=Path("runs/claims/results"))
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    results = read_results(args.results)
    if not results:
        parser.exit(1, f"no results in {args.results}; python bench/claims.py --quick makes some\n")
    plt.switch_backend("Agg")  # files only, so no display is needed
    plt.rcParams.update(STYLE)
    args.output.mkdir(parents=True, exist_ok=True)
    for draw in (accuracy, lengths, curriculum, controls):
        path = args.output / f"{draw.__name__}.png"
        draw(results).savefig(path)
        print(path)


if __name__ == "__main__":
    main()
