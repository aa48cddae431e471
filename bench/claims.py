"""The paper's claims against the controls a sceptic asks for: every method, several seeds, equal sampled tokens.

    python bench/claims.py [--quick] [--only REGEX] [--jobs 2]     # run what is missing; --list shows what that is
    python bench/claims.py --table [--results bench/results/claims]   # Markdown, from the JSON files alone

Resumable: a run that ended has its file OUTPUT/results/NAME.json and is not repeated; one that was cut short starts
anew. Each run is a process of one thread, so that two side by side do not disturb each other. The clock that methods
share is sampled tokens, probes included: BREAD of a seed runs first, and what it spent is the budget of the others.
"""
import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.8                             # held-out sampled accuracy whose price in tokens is compared
TASKS = {"chain": 12, "walk": 12}        # and the length L of the problems in examples/TASK
LENGTHS = {"chain": (16, 10, 9, 8, 6, 4, 2), "walk": (10, 9, 8, 6)}  # others. Long runs first: short ones fill the gaps
TOKENS = {"chain": 5, "walk": 6}         # of a line of one move
ENDLESS = "--steps 100000"               # more than any budget lasts
SFT_STEPS = 300                          # 19 passes over the 512 traces, 32 a step

# Budget: in tokens that BREAD of the same task, length and seed spent; 0: the steps of TASK.args.
# Every: steps between evaluations (2 x 200 answers, where a step samples 256 rollouts and more). Rows that probe spend
# up to 18k tokens a step at L = 12, the others 12k, so 3 and 5 steps are about the same distance on the axis of tokens.
# method             budget every  flags                                                   name in tables and figures
HEADLINE = (
    ("bread",             0, 3, "--method bread",                                          "BREAD"),
    ("grpo",              1, 5, "--method grpo",                                           "GRPO"),
    ("resample",          1, 5, "--method grpo --on-fail resample",                        "GRPO, resample"),
    ("sft",               0, 50, f"--method sft --steps {SFT_STEPS}",                      "SFT"),
    ("sft+grpo",          1, 5, "--method grpo",                                           "SFT, then GRPO"))
CONTROLS = (
    ("random",            1, 3, "--method bread --anchor random",                          "random cut"),
    ("range",             1, 3, "--method bread --anchor random --anchor-from 0.4 --anchor-to 0.8", "random 40-80%"),
    ("fixed",             1, 3, "--method bread --anchor fixed --anchor-fraction 0.5",     "fixed half"),
    ("anneal",            1, 3, "--method bread --anchor anneal",                          "annealed"),
    ("adaback",           1, 3, "--method bread --anchor adaback",                         "adaptive"),
    ("random-always",     1, 5, "--method bread --anchor random --anchor-when always",     "R3: random cut"),
    ("range-always",      1, 5, "--method bread --anchor random --anchor-from 0.4 --anchor-to 0.8 --anchor-when always",
     "PrefixRL: random 40-80%"),
    ("fixed-always",      1, 5, "--method bread --anchor fixed --anchor-fraction 0.5 --anchor-when always",
     "fixed half"),
    ("anneal-always",     1, 5, "--method bread --anchor anneal --anchor-when always",     "UFT: annealed"),
    ("adaback-always",    1, 5, "--method bread --anchor adaback --anchor-when always",    "AdaBack: adaptive"),
    ("hint-always",       1, 5, "--method bread --anchor fixed --anchor-fraction 0.5 --anchor-when always"
     " --anchor-placement hint",                                                           "QuestA: half, as a hint"),
    ("expert",            1, 5, "--method grpo --on-fail expert",                          "GRPO + expert trace"),
    ("luffy",             1, 5, "--method grpo --on-fail expert --expert-shaping 0.1",     "LUFFY: + expert, shaped"),
    ("relift",            1, 5, "--method grpo --on-fail sft",                             "ReLIFT: + SFT on failures"))
LABELS = {method: label for method, *_, label in HEADLINE + CONTROLS}


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of the matrix with its seed; `budget`, `every` and `flags` as above."""
    task: str
    length: int
    method: str
    budget: int
    every: int
    flags: str
    seed: int

    @property
    def name(self):
        return self.sibling(self.method)

    def sibling(self, method):
        """Name of the run with another method and everything else the same."""
        return f"{self.task}{self.length}-{method}-{self.seed}"

    @property
    def starts_from(self):
        """The run from whose checkpoint this one starts, or None: it starts from the task's base model."""
        return self.sibling("sft") if self.method == "sft+grpo" else None

    @property
    def needs(self):
        """Names of the runs that have to end before this one can start."""
        return ([self.sibling("bread")] if self.budget else []) + ([self.starts_from] if self.starts_from else [])


def by_length(length):
    """BREAD and GRPO at another L. Short problems are learned within a few steps, so each of them is evaluated. At
    L = 9 and 10 GRPO arrives late if at all, and may spend three times what BREAD spent. Where the base is right at
    times, SFT has something to spoil."""
    bread_every, grpo_every = (1, 1) if length <= 6 else (2, 3) if length <= 8 else (2, 6)
    rows = [("bread", 0, bread_every, "--method bread"),
            ("grpo", 3 if length in (9, 10) else 1, grpo_every, "--method grpo")]
    return rows + [row[:4] for row in HEADLINE if row[0] == "sft" and length <= 4]


def matrix(quick=False):
    """All runs, in the order in which they start. `quick`: one seed of chain's headline."""
    if quick:
        return [Run("chain", TASKS["chain"], *row[:4], 0) for row in HEADLINE]
    rows = [(task, length, row, 5) for task, length in TASKS.items() for row in HEADLINE]
    rows += [("chain", TASKS["chain"], row, 3) for row in CONTROLS]
    rows += [(task, length, row, 3) for task in LENGTHS for length in LENGTHS[task] for row in by_length(length)]
    return [Run(task, length, *row[:4], seed) for task, length, row, seeds in rows for seed in range(seeds)]


# ---------------------------------------------------------------- running


def flags_of(run, output, budget="N"):
    """The arguments of bread.py as a list of text. Paths are relative to the repository, or lie in `output`."""
    example, own_data = f"examples/{run.task}", run.length != TASKS[run.task]
    data = f"{output}/data/{run.task}-{run.length}" if own_data else example
    model = f"{output}/runs/{run.starts_from}/checkpoint-{SFT_STEPS}" if run.starts_from else f"{example}/model"
    flags = [f"@{example}/{run.task}.args", "--model", model, "--data", f"{data}/train.jsonl",
             "--eval-data", f"{data}/heldout.jsonl", *run.flags.split(), "--seed", str(run.seed),
             "--eval-every", str(run.every), "--output", f"{output}/runs/{run.name}", "--overwrite"]
    if own_data:
        flags += ["--max-new-tokens", str(TOKENS[run.task] * run.length + 12)]  # the answer is shorter than 12
    return flags + ([*ENDLESS.split(), "--token-budget", str(budget)] if run.budget else [])


def call(arguments):
    """A Python program of this repository in a process of one thread, to its end: None, or what it said when it
    failed, its exit code behind that."""
    # Two busy processes on two cores: threads that spin at barriers would take the other's core.
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True)
    return f"{done.stderr.rstrip()}\nexit code {done.returncode}" if done.returncode else None


def to_do(runs, output, only=""):
    """The runs that match `only` and have no result, and what they need, in the order of the matrix."""
    by_name, chosen = {run.name: run for run in runs}, set()

    def visit(run, wants_checkpoint=False):
        ended = (output / "results" / f"{run.name}.json").is_file()
        if wants_checkpoint:  # it may be gone: results can be copied without the folder of runs
            ended &= (output / "runs" / run.name / f"checkpoint-{SFT_STEPS}").is_dir()
        if not ended and run.name not in chosen:
            chosen.add(run.name)
            for name in run.needs:
                visit(by_name[name], name == run.starts_from)

    for run in runs:
        if re.search(only, run.name):
            visit(run)
    return [run for run in runs if run.name in chosen]


DATA_LOCK = threading.Lock()


def make_data(run, output):
    """The problems of a length that the repository does not hold. None, or what went wrong."""
    folder = output / "data" / f"{run.task}-{run.length}"
    if run.length == TASKS[run.task]:
        return None
    with DATA_LOCK:
        if not folder.is_dir():
            unnamed = folder.with_suffix(".tmp")
            error = call(["examples/make.py", run.task, "--length", run.length, "--data-only", "--output", unnamed])
            if error:
                return error
            unnamed.rename(folder)
    return None


def execute(run, output, jobs):
    """Carry out a run and write its result. Returns (the result, None), or (None, what went wrong)."""
    error, budget = make_data(run, output), 0
    if error:
        return None, error
    if run.budget:
        budget = run.budget * read_result(output / "results" / f"{run.sibling('bread')}.json")["tokens/sampled"]
    folder, commit, began = output / "runs" / run.name, git_commit(), time.time()
    error = call(["bread.py", *flags_of(run, output, budget)])
    seconds = time.time() - began
    if error:
        return None, error
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = {
        "task": run.task, "length": run.length, "method": run.method, "seed": run.seed,
        "command": " ".join(["python bread.py", *flags_of(run, "runs/claims", budget)]),
        "seconds": round(seconds, 1), "jobs": jobs, "cores": os.cpu_count(), "commit": commit,
        "torch": importlib.metadata.version("torch"), "python": platform.python_version(), **summary(rows)}
    if run.method == "sft":
        del result["series"]  # no rollouts, so no groups
    if run.starts_from:       # its weights have seen the traces that SFT was shown
        before = read_result(output / "results" / f"{run.starts_from}.json")
        result |= {key: before[key] for key in ("anchor/shown", "anchor/used")}
    write_result(output / "results" / f"{run.name}.json", result)
    used = [] if run.method == "sft" else [run.name]  # SFT's checkpoint waits for the run that starts from it
    for name in used + [run.starts_from] * bool(run.starts_from):
        for checkpoint in (output / "runs" / name).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return result, None


def summary(rows):
    """What is kept of metrics.jsonl: evaluations, series with one number a step, and where they ended."""
    def shorter(value):
        return round(value, 4) if isinstance(value, float) else value

    steps, kept = [row for row in rows if row["step"]], ("step", "tokens/sampled", "eval/accuracy", "eval/greedy")
    last = steps[-1]
    series = {key: [shorter(row.get(key)) for row in steps]
              for key in ("tokens/sampled", "anchor/fraction", "frac_reward_zero_std", "reward")}
    return {"steps": last["step"], "tokens/sampled": last["tokens/sampled"],
            "anchor/shown": shorter(last.get("anchor/shown")), "anchor/used": shorter(last.get("anchor/used")),
            "evaluations": [{key: shorter(row[key]) for key in kept} for row in rows if "eval/accuracy" in row],
            "series": series}


def git_commit():
    """The commit that runs, with -dirty behind it where a file differs; "unknown" outside of a clone."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_all(todo, output, jobs):
    """Run `todo`, at most `jobs` side by side, each as soon as what it needs has ended. Returns the number of runs
    that failed or could not start because one that they need failed."""
    (output / "results").mkdir(parents=True, exist_ok=True)
    waiting, active, missing, failed = list(todo), {}, {run.name for run in todo}, 0
    left, done, seconds = sum(map(expected_cost, todo)), 0, 0.0
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or active:
            ready = [run for run in waiting if missing.isdisjoint(run.needs)]
            for run in ready[:jobs - len(active)]:
                waiting.remove(run)
                active[pool.submit(execute, run, output, jobs)] = run
            if not active:
                break
            for future in wait(active, return_when=FIRST_COMPLETED).done:
                run = active.pop(future)
                result, error = future.result()
                left -= expected_cost(run)
                if error:
                    failed += 1
                    print(f"{run.name} FAILED\n    " + "\n    ".join(error.strip().splitlines()[-6:]), flush=True)
                    continue
                missing.discard(run.name)
                done, seconds = done + expected_cost(run), seconds + result["seconds"]
                number = len(todo) - len(waiting) - len(active)
                print(f"[{number:>3}/{len(todo)}] {line(run, result)}  ETA {clock(left * seconds / done / jobs)}",
                      flush=True)
    for run in waiting:
        print(f"{run.name} not started: it needs {' and '.join(sorted(missing & set(run.needs)))}")
    return failed + len(waiting)


def expected_cost(run):
    """Relative length of a run, for the time left: tokens grow with L, and with what a budget allows."""
    return run.length * max(run.budget, 1)


def clock(seconds):
    """clock(3725.0) == "1:02:05"."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def line(run, result):
    return (f"{run.name:<24} greedy {final(result, 'eval/greedy'):6.1%}  sampled {final(result):6.1%}  "
            f"{result['tokens/sampled']:>9,} tokens  {result['steps']:>4} steps  {result['seconds']:5.0f} s")


# ---------------------------------------------------------------- results


def write_result(path, result):
    """One key a line, so that a difference between two runs can be read. Complete or not there at all."""
    body = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    path.with_suffix(".tmp").write_text("{\n" + body + "\n}\n", encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def read_result(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_results(folder):
    """Every result of a folder, sorted by task, length, method and seed."""
    results = [read_result(path) for path in Path(folder).glob("*.json")]
    return sorted(results, key=lambda r: (r["task"], r["length"], r["method"], r["seed"]))


def select(results, task, length, method):
    return [r for r in results if (r["task"], r["length"], r["method"]) == (task, length, method)]


def final(result, key="eval/accuracy"):
    return result["evaluations"][-1][key]


def first(result, key="eval/accuracy"):
    """Of the base model, before the first step."""
    return result["evaluations"][0][key]


def tokens_to(result, target=TARGET, key="tokens/sampled"):
    """Sampled tokens (or, by `key`, steps) at which the held-out sampled accuracy first reaches `target`, linear
    between evaluations; infinity if it never does.

    >>> tokens_to({"evaluations": [{"tokens/sampled": 0, "eval/accuracy": 0.0},
    ...                            {"tokens/sampled": 100, "eval/accuracy": 0.4},
    ...                            {"tokens/sampled": 300, "eval/accuracy": 0.9}]})
    260.0
    """
    before = None
    for row in result["evaluations"]:
        tokens, accuracy = row[key], row["eval/accuracy"]
        if accuracy >= target:
            if before is None:
                return float(tokens)
            share = (target - before[1]) / (accuracy - before[1])
            return before[0] + share * (tokens - before[0])
        before = tokens, accuracy
    return math.inf


def medians_by_length(results, task, method, key="tokens/sampled"):
    """{L: median of the tokens (or steps) to 80% over seeds}; infinite where most seeds never arrive."""
    lengths = sorted({r["length"] for r in results if (r["task"], r["method"]) == (task, method)})
    return {length: statistics.median(tokens_to(r, key=key) for r in select(results, task, length, method))
            for length in lengths}


def exponent(tokens_by_length, shortest=4, longest=16):
    """Slope of log tokens against log L by least squares, lengths below `shortest` left out: infinite where a length
    never arrives, None with fewer than three lengths.

    >>> round(exponent({2: 1.0, 4: 32.0, 9: 108.0, 16: 256.0}), 6)      # 4 L^1.5 from L = 4 on
    1.5
    """
    points = [(length, tokens) for length, tokens in tokens_by_length.items() if shortest <= length <= longest]
    if len(points) < 3:
        return None
    if math.inf in (tokens for _, tokens in points):
        return math.inf
    return statistics.linear_regression(*([math.log(x) for x in column] for column in zip(*points))).slope


# ---------------------------------------------------------------- the table


def percent(value):
    return "-" if value is None else f"{value:.1%}"


def count(value):
    return "never" if value == math.inf else f"{value:,.0f}"


def spread(values, form):
    """Median (min to max); one text where they are all the same."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    low, middle, high = (form(pick(values)) for pick in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


COLUMNS = (  # (head, what of a result, how it is written)
    ("sampled", final, percent), ("greedy", lambda r: final(r, "eval/greedy"), percent),
    ("tokens sampled", lambda r: r["tokens/sampled"], count), (f"tokens to {TARGET:.0%}", tokens_to, count),
    ("expert tokens shown", lambda r: r["anchor/shown"], percent),
    ("in accepted anchors", lambda r: r["anchor/used"], percent), ("seconds", lambda r: r["seconds"], count))


def method_table(results, task, methods):
    """Markdown: a row per method with median and range over seeds; the base model of the same runs first."""
    heads = ["method", "seeds", *(head for head, *_ in COLUMNS)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    bases = select(results, task, TASKS[task], "bread")
    if bases:
        cells = [spread([first(r, key) for r in bases], percent) for key in ("eval/accuracy", "eval/greedy")]
        lines.append(f"| base model | {len(bases)} | " + " | ".join(cells + ["-"] * (len(COLUMNS) - 2)) + " |")
    for method in methods:
        runs = select(results, task, TASKS[task], method)
        if runs:
            cells = [spread([value(r) for r in runs], form) for _, value, form in COLUMNS]
            lines.append(f"| {table_label(method)} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else "No results."


def table_label(method):
    return LABELS[method] + (", always" if method.endswith("-always") else "")


def length_table(results, task):
    """Markdown: tokens to 80% of BREAD and GRPO by L, and their ratio."""
    bread, grpo = (medians_by_length(results, task, method) for method in ("bread", "grpo"))
    lines = [f"| L | base, sampled | after SFT | BREAD, tokens to {TARGET:.0%} | in steps "
             f"| GRPO, tokens to {TARGET:.0%} | its budget | GRPO / BREAD |", "|---" * 8 + "|"]
    for length in bread:
        ours, theirs = (select(results, task, length, method) for method in ("bread", "grpo"))
        after = select(results, task, length, "sft")
        cells = [spread(map(first, ours), percent), spread(map(final, after), percent),
                 spread(map(tokens_to, ours), count), spread([tokens_to(r, key="step") for r in ours], count),
                 spread(map(tokens_to, theirs), count), spread([r["tokens/sampled"] for r in theirs], count),
                 ratio_text(results, task, bread, grpo, length)]
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth_text(results):
    found = []
    for task in LENGTHS:
        tokens, steps = (power(exponent(medians_by_length(results, task, "bread", key)))
                         for key in ("tokens/sampled", "step"))
        found.append(f"{task}: tokens {tokens}, steps {steps}")
    return f"BREAD to {TARGET:.0%} from L = 4 on, least squares on medians: {'; '.join(found)}."


def power(slope):
    return "-" if slope is None else "a length never arrives" if slope == math.inf else f"L^{slope:.2f}"


def ratio_text(results, task, bread, grpo, length):
    """How many times BREAD's tokens GRPO needs; where it never arrives, at least its budget over BREAD's tokens."""
    if length not in grpo or bread[length] in (0, math.inf):
        return "-"
    if grpo[length] < math.inf:
        return f"{grpo[length] / bread[length]:.2f}"
    budget = statistics.median(r["tokens/sampled"] for r in select(results, task, length, "grpo"))
    return f"> {budget / bread[length]:.2f}"


# ---------------------------------------------------------------- the claims


def verdicts(results):
    """[(claim, True, False or None where runs are missing, its numbers)], in the order of the issue's "To reach"."""
    found = [unsolvable(results, task) for task in TASKS]
    found += [cheaper(results, task) for task in TASKS] + [spoiled(results)]
    found += [few_traces(results, task) for task in TASKS] + [growth(results), search_first(results)]
    return found + [duration(results, matrix(), 3 * 3600, "The whole matrix takes under 3 hours"),
                    duration(results, matrix(quick=True), 600, "--quick takes under 10 minutes")]


def unsolvable(results, task):
    medians = {method: [final(r) for r in select(results, task, TASKS[task], method)] for method, *_ in HEADLINE}
    medians = {method: statistics.median(values) for method, values in medians.items() if values}
    claim = f"{task}: BREAD reaches at least 90%, GRPO, resample, SFT, SFT then GRPO at most 5%"
    numbers = ", ".join(f"{LABELS[method]} {value:.1%}" for method, value in medians.items())
    if len(medians) < len(HEADLINE):
        return claim, None, numbers
    return claim, medians.pop("bread") >= 0.9 and max(medians.values()) <= 0.05, numbers


def cheaper(results, task):
    """At the longest L at which GRPO arrives too. Where it hardly has anything to search for, BREAD cannot gain."""
    bread, grpo = (medians_by_length(results, task, method) for method in ("bread", "grpo"))
    claim = (f"{task}: where GRPO works too, BREAD needs at least 3x fewer sampled tokens to {TARGET:.0%} "
             "(longest such L)")
    numbers = ", ".join(f"L = {length}: {ratio_text(results, task, bread, grpo, length)}" for length in bread)
    both = [length for length in bread if max(bread[length], grpo.get(length, math.inf)) < math.inf and bread[length]]
    if not (has_all_lengths(task, bread) and has_all_lengths(task, grpo)):
        return claim, None, numbers
    if not both:
        return claim, False, f"there is no such L. {numbers}"
    return claim, grpo[max(both)] / bread[max(both)] >= 3, f"GRPO arrives up to L = {max(both)}. {numbers}"


def spoiled(results, length=2):
    """At L = 2 the base is right in the 40% of its answers that do not jump. The paper saw the like on Qwen2.5."""
    ours, after = (select(results, "chain", length, method) for method in ("bread", "sft"))
    claim = f"SFT on the expert's traces lowers the accuracy of a base that is right sometimes (chain, L = {length})"
    numbers = f"base {spread(map(first, ours), percent)}, after SFT {spread(map(final, after), percent)}"
    if not (ours and after):
        return claim, None, numbers
    return claim, max(map(final, after)) < min(map(first, ours)), numbers


def few_traces(results, task):
    shown = [r["anchor/shown"] for r in select(results, task, TASKS[task], "bread") if r["anchor/shown"] is not None]
    claim = f"{task}: BREAD is shown at most 40% of the expert's tokens, probes included"
    return claim, statistics.median(shown) <= 0.4 if shown else None, spread(shown, percent)


def growth(results):
    bread = medians_by_length(results, "chain", "bread")
    slope = exponent(bread)
    claim = f"chain: BREAD's tokens to {TARGET:.0%} grow at most like L^1.5 over L = 4 to 16"
    return claim, slope <= 1.5 if has_all_lengths("chain", bread) else None, power(slope)


def has_all_lengths(task, medians):
    return medians.keys() >= {*LENGTHS[task], TASKS[task]}


def search_first(results):
    """A policy is ahead where its median is better than the best seed of the search, in accuracy or in tokens."""
    def runs(method):
        return select(results, "chain", TASKS["chain"], method)

    policies = [method for method, _, _, flags, _ in CONTROLS if "--anchor " in flags]
    claim = "No other anchor policy is ahead of the search beyond its spread (chain)"
    measured = [method for method in policies if runs(method)]
    if not runs("bread") or not measured:
        return claim, None, "-"
    best, fastest = max(map(final, runs("bread"))), min(map(tokens_to, runs("bread")))
    ahead = [f"{table_label(method)}: {spread(map(final, runs(method)), percent)}, "
             f"{spread(map(tokens_to, runs(method)), count)} tokens to {TARGET:.0%}" for method in measured
             if statistics.median(map(final, runs(method))) > best
             or statistics.median(map(tokens_to, runs(method))) < fastest]
    numbers = (f"search {spread(map(final, runs('bread')), percent)}, "
               f"{spread(map(tokens_to, runs('bread')), count)} tokens to {TARGET:.0%}; "
               f"{len(ahead)} of {len(measured)} policies ahead" + "".join(f"; {text}" for text in ahead))
    return claim, False if ahead else True if len(measured) == len(policies) else None, numbers


def duration(results, runs, limit, claim):
    """Sum of the runs' seconds, each divided by the number of processes that it ran beside."""
    times = {(r["task"], r["length"], r["method"], r["seed"]): r["seconds"] / r["jobs"] for r in results}
    measured = [times[key] for key in ((r.task, r.length, r.method, r.seed) for r in runs) if key in times]
    numbers = f"{sum(measured) / 60:.0f} minutes, {len(measured)} of {len(runs)} runs"
    return claim, sum(measured) <= limit if len(measured) == len(runs) else None, numbers


def tables(results):
    """{name: Markdown} of everything that docs/RESULTS.md says in numbers."""
    words = {True: "holds", False: "does not hold", None: "not measured"}
    claims = [f"| {claim} | {words[holds]} | {numbers or '-'} |" for claim, holds, numbers in verdicts(results)]
    made = {key: ", ".join(sorted({str(r[key]) for r in results})) for key in ("commit", "torch", "python", "cores")}
    source = f"Median (range over seeds). {len(results)} runs; " + "; ".join(
        f"{key} {value}" for key, value in made.items()) + "."
    headline = [f"{task}, L = {length}:\n\n" + method_table(results, task, [method for method, *_ in HEADLINE])
                for task, length in TASKS.items()]
    lengths = [f"{task}:\n\n" + length_table(results, task) for task in LENGTHS] + [growth_text(results)]
    controls = ["bread", "grpo"] + [method for method, *_ in CONTROLS]
    return {"claims": "\n".join(["| claim | | numbers |\n|---|---|---|", *claims, "", source]),
            "headline": "\n\n".join(headline), "lengths": "\n\n".join(lengths),
            "controls": method_table(results, "chain", controls)}


def fill_in(path, results):
    """Write every table into a Markdown file, between `<!-- NAME -->` and `<!-- end -->`."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables(results).items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(?=<!-- end -->)", lambda found: f"{found[1]}\n{table}\n\n", text,
                      flags=re.DOTALL)
    path.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/claims"))
    parser.add_argument("--results", type=Path, help="--table: folder of JSON files (default: OUTPUT/results)")
    parser.add_argument("--quick", action="store_true", help="one seed of the chain's headline rows")
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose name matches, and what they need")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--list", action="store_true", help="print the runs that are missing, and their commands")
    parser.add_argument("--table", action="store_true", help="print Markdown from the results, run nothing")
    parser.add_argument("--into", type=Path, metavar="FILE", help="--table: write it into this Markdown file")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}, it must be at least 1")
    if args.table:
        folder = args.results or args.output / "results"
        results = read_results(folder)
        if not results:
            parser.error(f"no *.json in {folder}; run the matrix first, or give the folder as --results")
        return fill_in(args.into, results) if args.into else print("\n\n".join(tables(results).values()))
    runs, output = matrix(args.quick), args.output.resolve()
    todo = to_do(runs, output, args.only)
    if args.list:
        for run in todo:
            print(f"{run.name}: python bread.py {' '.join(flags_of(run, args.output))}")
        print(f"{len(todo)} of {len(runs)} runs are missing" if not args.only else f"{len(todo)} runs")
        return None
    if not todo:
        print("no run is missing; --table prints the results")
        return 0
    try:
        return 1 if run_all(todo, output, args.jobs) else 0
    except KeyboardInterrupt:  # Ctrl-C reaches the runs as well, which end after their step
        print("interrupted; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
