"""Figures of the claims from the results of bench/claims.py, as PNG. Needs matplotlib, which nothing else here does.

    python bench/claims_plot.py [--results bench/results/claims] [--output docs/figures]

accuracy.png     held-out accuracy against all sampled tokens, a panel per task
lengths.png      tokens to 80% against the length of a problem, BREAD and GRPO, a panel per task
curriculum.png   how much of the trace the anchors show, and how many groups have a gradient, step by step
controls.png     final accuracy of every method on chain, at equal budgets
theory.png       expected rollouts with and without branching, exact, from examples/theory.py
"""
import argparse
import importlib.util
import math
import statistics
import sys
from pathlib import Path

from claims import (CONTROLS, LABELS, LENGTHS, TARGET, TASKS, exponent, final, medians_by_length, read_results,
                    select, tokens_to)

ROOT = Path(__file__).resolve().parents[1]
# Okabe and Ito's colours: told apart by colour-blind readers, too.
COLORS = {"bread": "#d55e00", "grpo": "#0072b2", "resample": "#009e73", "sft+grpo": "#cc79a7", "sft": "#7a7a7a"}
INK, FAINT = "#333333", "#d9d9d9"
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "axes.edgecolor": INK, "axes.linewidth": 0.7, "text.color": INK,
         "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "xtick.major.width": 0.7,
         "ytick.major.width": 0.7, "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.5,
         "axes.axisbelow": True, "legend.frameon": False, "savefig.dpi": 150, "figure.constrained_layout.use": True}


def median_and_seeds(axes, curves, color):
    """Every seed of [(xs, ys), ...] as a thin line, their median as a thick one, interpolated between points. A seed
    that ends early keeps its last value, as its accuracy would. Returns where the median ends."""
    import numpy as np
    grid = np.unique(np.concatenate([xs for xs, _ in curves]))
    for xs, ys in curves:
        axes.plot(xs, ys, color=color, linewidth=0.6, alpha=0.45)
    middle = np.median([np.interp(grid, xs, ys) for xs, ys in curves], 0)
    axes.plot(grid, middle, color=color, linewidth=1.8, solid_capstyle="round")
    return middle[-1]


def labels_at_right(axes, named, gap):
    """A name beside each line's end, moved up where two would touch. named: [(y, text, color)]."""
    lowest = -math.inf
    for y, text, color in sorted(named):
        lowest = max(y, lowest + gap)
        axes.annotate(text, (1, lowest), xycoords=("axes fraction", "data"), xytext=(5, 0), annotation_clip=False,
                      textcoords="offset points", color=color, va="center", fontsize=8)


def panels(plt, results, height, rows=1):
    """A column of axes per task that has results: (figure, axes[row][column], [(task, length), ...])."""
    tasks = [(task, length) for task, length in TASKS.items() if select(results, task, length, "bread")]
    figure, axes = plt.subplots(rows, len(tasks), figsize=(1.2 + 2.9 * len(tasks), height), squeeze=False,
                                sharex="col", sharey="row")
    for column, (task, length) in enumerate(tasks):
        axes[0][column].set_title(f"{task}, L = {length}")
    return figure, axes, tasks


def accuracy(plt, results):
    figure, axes, tasks = panels(plt, results, 2.7)
    for axis, (task, length) in zip(axes[0], tasks):
        ends = []
        for method in ("grpo", "resample", "sft+grpo", "bread"):
            curves = [([row["tokens/sampled"] / 1000 for row in r["evaluations"]],
                       [row["eval/accuracy"] for row in r["evaluations"]])
                      for r in select(results, task, length, method)]
            if curves:
                ends.append((median_and_seeds(axis, curves, COLORS[method]), LABELS[method], COLORS[method]))
        sft = select(results, task, length, "sft")
        if sft:  # it samples nothing, so it is a level and not a curve
            level = statistics.median(map(final, sft))
            axis.axhline(level, color=COLORS["sft"], linewidth=1, linestyle=(0, (4, 3)))
            ends.append((level, "SFT (samples nothing)", COLORS["sft"]))
        axis.set(ylim=(-0.02, 1.02), xlim=(0, None))
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    labels_at_right(axis, ends, gap=0.075)
    axes[0][0].set_ylabel("held-out accuracy, sampled")
    figure.supxlabel("sampled tokens, probes included (thousands)", fontsize=9)
    return figure


def lengths(plt, results):
    tasks = [task for task in LENGTHS if any(r["task"] == task for r in results)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(1.2 + 3.1 * len(tasks), 3.2), squeeze=False, sharey=True)
    for axis, task in zip(axes[0], tasks):
        ours = [r for r in results if r["task"] == task and r["method"] in ("bread", "grpo")]
        for r in ours:
            color, x = COLORS[r["method"]], r["length"] * (1 + 0.01 * (r["seed"] - 1))  # seeds beside each other
            if tokens_to(r) < math.inf:
                axis.plot(x, tokens_to(r), "o", color=color, markersize=3.5, alpha=0.6, markeredgewidth=0)
            else:
                axis.annotate("", (x, r["tokens/sampled"] * 1.45), (x, r["tokens/sampled"]),
                              arrowprops={"arrowstyle": "-|>,head_width=0.1,head_length=0.2", "color": color,
                                          "linewidth": 0.6, "shrinkA": 2, "shrinkB": 0})
                axis.plot(x, r["tokens/sampled"] * 1.45, alpha=0)  # the axis has to reach the arrow
                axis.plot(x, r["tokens/sampled"], "o", markerfacecolor="white", markeredgecolor=color,
                          markersize=3.5, markeredgewidth=0.8)
        slope = exponent(medians_by_length(results, task, "bread"))
        fits = slope is not None and slope < math.inf
        names = {"grpo": LABELS["grpo"], "bread": LABELS["bread"] + (f" ~ $L^{{{slope:.2f}}}$" if fits else "")}
        for method, name in names.items():
            line = [(n, y) for n, y in medians_by_length(results, task, method).items() if 0 < y < math.inf]
            if line:
                left = method == "grpo"
                axis.plot(*zip(*line), color=COLORS[method], linewidth=1.6)
                axis.annotate(name, line[-1], xytext=(-7, 3) if left else (12, 0), color=COLORS[method], va="center",
                              ha="right" if left else "left", textcoords="offset points", annotation_clip=False)
        ticks = sorted({r["length"] for r in ours})
        axis.set(xscale="log", yscale="log", xlabel="moves per problem, L", title=task)
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
    axes[0][0].set_ylabel(f"sampled tokens to {TARGET:.0%} held out")
    figure.suptitle("open marker: never arrived within this budget", fontsize=8, color=INK)
    return figure


def curriculum(plt, results):
    figure, axes, tasks = panels(plt, results, 4.0, rows=2)
    for column, (task, length) in enumerate(tasks):
        ends, steps = [], max(r["steps"] for r in select(results, task, length, "bread"))
        for method in ("grpo", "bread"):  # GRPO's steps are cheaper, so its runs are longer: shown as far as BREAD's
            runs = select(results, task, length, method)
            if runs:
                share = [[1 - value for value in r["series"]["frac_reward_zero_std"][:steps]] for r in runs]
                end = median_and_seeds(axes[1][column], [(range(1, len(ys) + 1), ys) for ys in share], COLORS[method])
                ends.append((end, LABELS[method], COLORS[method]))
        anchors = [[y or 0.0 for y in r["series"]["anchor/fraction"]] for r in select(results, task, length, "bread")]
        median_and_seeds(axes[0][column], [(range(1, len(ys) + 1), ys) for ys in anchors], COLORS["bread"])
        axes[1][column].set_xlabel("step")
        axes[0][column].set_ylim(0, 1)
        axes[1][column].set_ylim(-0.02, 1.02)
    for row, text in zip(axes, ("accepted anchor, share of\nthe trace (0: none needed)", "groups with\na gradient")):
        row[0].set_ylabel(text)
        row[0].yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    labels_at_right(axes[1][-1], ends, gap=0.1)
    return figure


def controls(plt, results):
    groups = {"": ["bread"], "anchor where all rollouts failed": [], "every group behind an anchor": [],
              "no anchor": ["grpo", "resample", "sft", "sft+grpo"]}
    for method, _, _, flags, _ in CONTROLS:
        kind = 3 if "--anchor " not in flags else 2 if "--anchor-when always" in flags else 1
        groups[[*groups][kind]].append(method)
    rows, y = [], 0.0
    for title, methods in groups.items():
        methods = [method for method in methods if select(results, "chain", TASKS["chain"], method)]
        y += 1.2 if title and methods else 0
        rows += [(y - 0.15, None, title)] * bool(title and methods)
        rows += [(y + i + 1, method, LABELS[method]) for i, method in enumerate(methods)]
        y += len(methods)
    figure, axis = plt.subplots(figsize=(5.6, 0.5 + 0.22 * y))
    shades = {"bread": COLORS["bread"], **{method: COLORS["grpo"] for method in groups["no anchor"]}}
    for y, method, text in rows:
        if method is None:
            axis.annotate(text, (0, y), xycoords=("axes fraction", "data"), xytext=(3, 0), va="center",
                          textcoords="offset points", fontsize=8, style="italic")
            continue
        values = [final(r) for r in select(results, "chain", TASKS["chain"], method)]
        color = shades.get(method, "#e69f00")
        if method == "bread":
            axis.axvline(statistics.median(values), color=color, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.barh(y, statistics.median(values), height=0.7, color=color, alpha=0.35, linewidth=0)
        axis.plot(values, [y] * len(values), "o", color=color, markersize=3, markeredgewidth=0, clip_on=False)
    axis.set_yticks([y for y, method, _ in rows if method], [text for _, method, text in rows if method])
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axis.set(xlim=(0, 1), ylim=(max(y for y, *_ in rows) + 0.6, 0.3), xlabel="held-out accuracy, sampled: median and "
             "every seed", title=f"chain, L = {TASKS['chain']}, equal sampled tokens")
    return figure


def theory(plt, _results):
    spec = importlib.util.spec_from_file_location("theory", ROOT / "examples" / "theory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figure, axis = plt.subplots(figsize=(4.6, 2.9))
    span = range(module.JUMP, max(module.LENGTHS) + 1, module.JUMP)
    for method, text, jump, at in (("grpo", "unaided", None, len(span) * 2 // 3),
                                   ("bread", "branching from the expert's states", module.JUMP, len(span) - 1)):
        costs = [module.expected_rollouts(length, jump or length) for length in span]
        axis.plot(span, costs, color=COLORS[method], linewidth=1.6)
        axis.annotate(text, (span[at], costs[at]), xytext=(-3, 6), textcoords="offset points", ha="right",
                      color=COLORS[method])
    axis.set(yscale="log", xlabel="states between question and answer, L", ylabel="expected rollouts", xlim=(0, None))
    axis.set_title(f"student-expert chain: a right move has chance {module.P}, the expert leaps {module.JUMP}",
                   fontsize=8)
    return figure


FIGURES = {"accuracy": accuracy, "lengths": lengths, "curriculum": curriculum, "controls": controls, "theory": theory}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=Path("runs/claims/results"))
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    try:
        import matplotlib
        matplotlib.use("Agg")  # files only, so no display is needed
        import matplotlib.pyplot as plt
    except ImportError:
        parser.exit(2, "claims_plot.py needs matplotlib: pip install matplotlib\n")
    results = read_results(args.results)
    if not select(results, "chain", TASKS["chain"], "bread"):
        parser.exit(1, f"claims_plot.py: no run of BREAD on chain in {args.results}; python bench/claims.py --quick "
                       "makes the least that can be drawn\n")
    args.output.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(STYLE)
    for name, draw in FIGURES.items():
        draw(plt, results).savefig(args.output / f"{name}.png")
        print(args.output / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
