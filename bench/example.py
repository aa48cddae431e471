"""The embedded example, every method with the same number of sampled tokens, over several seeds.

    python bench/example.py --seeds 5 --output runs/example        # resumable: runs that ended are not repeated

BREAD is timed alone, with torch's default threads; its sampled tokens, probes included, are the budget of GRPO and of
GRPO after SFT (same seed). Those and SFT run two at a time with one thread each. Prints one line per run, then the
table of medians with their range, in Markdown.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("bread", "grpo", "sft", "sft+grpo")


def run(folder, flags, threads=None):
    """One run of bread.py in a process of its own; its summary as a dict, read from the folder if it ended before."""
    summary = folder / "summary.json"
    if not summary.is_file():
        env = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        began = time.time()
        command = [sys.executable, ROOT / "bread.py", *flags, "--output", folder, "--overwrite"]
        subprocess.run(list(map(str, command)), env=env, check=True, stdout=subprocess.DEVNULL)
        seconds = time.time() - began
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [row for row in rows if "eval/accuracy" in row][-1]
        summary.write_text(json.dumps({"seconds": seconds, "steps": rows[-1]["step"], **{
            key: last[key] for key in ("eval/greedy", "eval/accuracy", "tokens/sampled")},
            "reward": rows[-1]["reward"], "loss": rows[-1]["loss"]}))
    result = json.loads(summary.read_text())
    print(f"{folder.name:<14} greedy {result['eval/greedy']:6.1%}  sampled {result['eval/accuracy']:6.1%}  "
          f"{result['tokens/sampled']:>9,} tokens  {result['steps']:>4} steps  {result['seconds']:5.0f} s", flush=True)
    return result


def rivals(output, seed, budget):
    """GRPO, SFT, and GRPO from SFT's checkpoint, with BREAD's budget of sampled tokens."""
    grpo = ["--seed", seed, "--method", "grpo", "--steps", 100000, "--token-budget", budget, "--eval-every", 100000]
    sft = ["--seed", seed, "--method", "sft", "--steps", 300, "--eval-every", 100000]
    results = {"grpo": run(output / f"grpo-{seed}", grpo, 1), "sft": run(output / f"sft-{seed}", sft, 1)}
    example, checkpoint = ROOT / "examples" / "chain", output / f"sft-{seed}" / "checkpoint-300"
    after = [f"@{example / 'chain.args'}", "--model", checkpoint, "--data", example / "train.jsonl",
             "--eval-data", example / "heldout.jsonl", *grpo]
    return results | {"sft+grpo": run(output / f"sft+grpo-{seed}", after, 1)}


def spread(values, form):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/example"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    bread = [run(args.output / f"bread-{seed}", ["--seed", seed]) for seed in range(args.seeds)]
    budgets = [result["tokens/sampled"] for result in bread]
    with ThreadPoolExecutor(2) as pool:
        others = list(pool.map(lambda seed: rivals(args.output, seed, budgets[seed]), range(args.seeds)))
    by_method = {"bread": bread} | {name: [other[name] for other in others] for name in METHODS[1:]}
    print(f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"python bench/example.py --seeds {args.seeds}\n")
    print("| method | greedy | sampled | tokens sampled | seconds |\n|---|---|---|---|---|")
    for name in METHODS:
        rows = by_method[name]
        cells = [spread([row[key] for row in rows], form) for key, form in (
            ("eval/greedy", "{:.1%}"), ("eval/accuracy", "{:.1%}"),
            ("tokens/sampled", "{:,.0f}"), ("seconds", "{:.0f}"))]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
