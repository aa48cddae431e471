"""What answers to held-out problems amount to: accuracies, pass@k, intervals. Standard library only.

A row is what bread.py writes to eval.jsonl: a problem's "level", its "greedy" answer and its "samples", each
with "reward", "finish_reason", "tokens" and the final "answer" that it states or None.
"""
import collections
import math
import re
import statistics


def is_right(answer):
    """Whether an answer of eval.jsonl was paid."""
    return answer["reward"] > 0  # as in training


def summarise(rows):
    """What the rows of eval.jsonl amount to: {name: number}, shares of 1.

    A sample succeeds with a reward above 0. pass@k is the unbiased estimate (arXiv 2107.03374).
    """
    num_samples = len(rows[0]["samples"])
    successes = [sum(map(is_right, row["samples"])) for row in rows]
    accuracies = [count / num_samples for count in successes]
    samples = [sample for row in rows for sample in row["samples"]]
    summary = {"problems": len(rows), "samples": num_samples, **accuracy_of(rows),
               "greedy_interval": interval([float(is_right(row["greedy"])) for row in rows]),
               "accuracy_interval": interval(accuracies)}
    powers = [2 ** i for i in range(num_samples.bit_length())]
    for k in sorted({num_samples, *powers}):
        # Of all choices of k samples, those that hold no success.
        failing = [math.comb(num_samples - count, k) / math.comb(num_samples, k) for count in successes]
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
    samples = [sample for row in rows for sample in row["samples"]]
    return {"problems": len(rows), "greedy": statistics.fmean(is_right(row["greedy"]) for row in rows),
            "accuracy": statistics.fmean(map(is_right, samples))}


def interval(shares, z=1.96):
    """95% interval of the mean of one share (0 to 1) per problem, [low, high]: Wilson's, sound near 0 and 1,
    for as many independent trials as the spread between problems is worth."""
    # E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927. Samples of one
    # problem are not independent of each other: the problems are the trials, more if their shares differ less
    # than 0 and 1 do.
    share = statistics.fmean(shares)
    variance = statistics.pvariance(shares, share)
    trials = len(shares) * share * (1 - share) / variance if variance else len(shares)
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return [max(0.0, centre - half), min(1.0, centre + half)]


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
