"""What answers to held-out problems amount to: accuracies, pass@k, intervals. Standard library only.

A row is what bread.py writes to eval.jsonl: a problem's "level", its "greedy" answer and its "samples", each
with "reward", "finish_reason", "tokens" and the final "answer" that it states or None.
"""
import collections
import math
import re
import statistics


def is_right(answer):
    return answer["reward"] > 0


def summarise(rows):
    """What the rows of eval.jsonl amount to: {name: number}, shares of 1.

    A sample succeeds with a reward above 0. pass@k is the unbiased estimate (arXiv 2107.03374), intervals are
    of 95%: Wilson's for greedy answers, by the spread between problems for sampled ones.
    """
    counts = [len(row["samples"]) for row in rows]  # fewer where a reward function said None
    successes = [sum(map(is_right, row["samples"])) for row in rows]
    accuracies = [c / n for c, n in zip(successes, counts)]
    samples = [sample for row in rows for sample in row["samples"]]
    summary = {"problems": len(rows), "samples": max(counts), **accuracy_of(rows),
               "greedy_interval": wilson(sum(is_right(row["greedy"]) for row in rows), len(rows)),
               "accuracy_interval": spread(accuracies)}
    powers = [2 ** i for i in range(max(counts).bit_length())]
    for k in sorted({max(counts), *powers}):
        # Of all choices of k samples, those that hold no success.
        failing = [math.comb(n - c, min(k, n)) / math.comb(n, min(k, n)) for c, n in zip(successes, counts)]
        summary[f"pass@{k}"] = 1 - statistics.fmean(failing)
    summary["cut_off"] = statistics.fmean(sample["finish_reason"] == "length" for sample in samples)
    summary["without_answer"] = statistics.fmean(sample["answer"] is None for sample in samples)
    summary["mean_tokens"] = statistics.fmean(sample["tokens"] for sample in samples)
    # By difficulty, where the data tell it.
    by_level = collections.defaultdict(list)
    for row in rows:
        by_level[row["level"]].append(row)
    if 1 < len(by_level) <= 20:  # else it is no scale
        summary["levels"] = {level: accuracy_of(by_level[level]) for level in sorted(by_level, key=natural)}
    return summary


def natural(level):
    """Sorts "Level 10" behind "Level 9"."""
    return [(len(part), part) if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", level)]


def accuracy_of(rows):
    """Problems, and shares of right greedy and right sampled answers."""
    # All samples count alike, whatever their problem.
    samples = [sample for row in rows for sample in row["samples"]]
    return {"problems": len(rows), "greedy": statistics.fmean(is_right(row["greedy"]) for row in rows),
            "accuracy": statistics.fmean(map(is_right, samples))}


def wilson(successes, trials, z=1.96):
    """95% interval of a share, [low, high], sound near 0 and 1."""
    # E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return [(centre - half) / (1 + z * z / trials), (centre + half) / (1 + z * z / trials)]


def spread(values, z=1.96):
    """95% interval of a mean over problems; samples of one problem are not independent of each other."""
    # Of one problem nothing is known.
    half = z * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.5
    return [max(0.0, statistics.fmean(values) - half), min(1.0, statistics.fmean(values) + half)]


def summary_lines(config, summary):
    """The summary for a reader."""
    lines = [f"\n{summary['problems']} problems of {config.eval_data}, no anchors"]
    for name, label in (("greedy", "greedy"), ("accuracy", f"{summary['samples']} sampled")):
        low, high = summary[f"{name}_interval"]
        lines.append(f"  {label:<12}{summary[name]:>7.1%}   95% interval {low:.1%} to {high:.1%}")
    passes = [name for name in summary if name.startswith("pass@")]
    passes = [f"{name.removeprefix('pass@')}: {summary[name]:.1%}" for name in passes]
    lines.append(f"  {'pass@k':<12}{'  '.join(passes)}")
    # Of the sampled ones: why an answer is not right may be that there is none.
    lines.append(f"  {summary['mean_tokens']:.0f} tokens a sample; {summary['without_answer']:.1%} without "
                 f"an answer; {summary['cut_off']:.1%} cut off at --max-new-tokens {config.max_new_tokens}")
    for level, of in summary.get("levels", {}).items():
        lines.append(f"  {level or 'no level':<12}{of['greedy']:>7.1%}   {of['problems']} problems; sampled "
                     f"{of['accuracy']:.1%}")
    return lines
