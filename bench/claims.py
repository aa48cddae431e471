"""The paper's claims against the controls a sceptic asks for: every method, several seeds, equal tokens.

    python bench/claims.py [--quick] [--only REGEX] [--jobs 2]        # run what is missing
    python bench/claims.py --table [--results bench/results/claims]   # Markdown, from the JSON files alone

Resumable: a run that ended has its file RESULTS/NAME.json; delete the file, and it is run again. Each run is
a process of one thread, so that two side by side do not disturb each other. The clock that methods share is
sampled tokens, probes included: BREAD of a seed runs first, and what it spent is the budget of the others.
"""
import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.8                             # held-out sampled accuracy whose price in tokens is compared
TASKS = {"chain": 12, "walk": 12}        # and the length L of the problems in examples/TASK
LENGTHS = {"chain": (16, 10, 9, 8, 6, 4, 2), "walk": (10, 9, 8, 6)}  # others; long runs first
TOKENS = {"chain": 5, "walk": 6}         # of a line of one move
SFT_STEPS = 300                          # 19 passes over the 512 traces, 32 a step

# Budget: in tokens that BREAD of the same task, length and seed spent; 0: the steps of TASK.args. Every:
# steps between evaluations (2 x 200 answers, where a step samples 256 rollouts or more). Rows that probe
# spend up to 18k tokens a step at L = 12, the others 12k: 3 and 5 steps are about as far in tokens.
FILE = "--method examples/methods.py:"
# method   budget every  flags                                             name in tables and figures
HEADLINE = (
    ("bread",    0, 3, "--method bread",                                   "BREAD"),
    ("grpo",     1, 5, "--method grpo",                                    "GRPO"),
    ("resample", 1, 5, "--method grpo --on-fail resample",                 "GRPO, resample"),
    ("sft",      0, 50, f"--method sft --steps {SFT_STEPS}",               "SFT"),
    ("sft+grpo", 1, 5, "--method grpo",                                    "SFT, then GRPO"))
WHERE_FAILED = (  # as BREAD, but for the choice of the cut
    ("random",   1, 3, FILE + "random_where_failed",                       "random cut"),
    ("range",    1, 3, FILE + "range_where_failed",                        "random 40-80%"),
    ("fixed",    1, 3, FILE + "half_where_failed",                         "fixed half"),
    ("anneal",   1, 3, FILE + "uft_where_failed",                          "annealed"),
    ("adaback",  1, 3, FILE + "adaback_where_failed",                      "adaptive"),
    ("mfc",      1, 3, FILE + "mfc_where_failed",                          "frontier"))
ALWAYS = (  # every group behind an anchor: the papers' methods
    ("random-always",    1, 5, FILE + "r3",                                "R3: random cut"),
    ("range-always",     1, 5, FILE + "prefixrl",                          "PrefixRL: random 40-80%"),
    ("fixed-always",     1, 5, FILE + "questa",                            "fixed half"),
    ("anneal-always",    1, 5, FILE + "uft",                               "UFT: annealed"),
    ("adaback-always",   1, 5, FILE + "adaback",                           "AdaBack: adaptive"),
    ("mfc-always",       1, 5, FILE + "mfc",                               "MFC: frontier"),
    ("adaprefix-always", 1, 5, FILE + "adaprefix",                         "AdaPrefix: controlled"),
    ("hint-always",      1, 5, FILE + "questa --anchor-placement hint",    "QuestA: half, as a hint"))
NO_ANCHOR = (
    ("expert",   1, 5, "--method grpo --on-fail expert",                   "GRPO + expert trace"),
    ("luffy",    1, 5, FILE + "luffy",                                     "LUFFY: + expert, shaped"),
    ("relift",   1, 5, FILE + "relift",                                    "ReLIFT: + SFT on failures"),
    ("nft",      1, 5, FILE + "nft",                                       "NFT: negatives, too"))
CONTROLS = WHERE_FAILED + ALWAYS + NO_ANCHOR
LABELS = {method: label for method, *_, label in HEADLINE + CONTROLS}
LABELS |= {method: f"{label}, always" for method, *_, label in ALWAYS}


@dataclasses.dataclass(frozen=True)
class Trial:
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
    def needs(self):
        """Names of the runs that have to end before this one; the last may be SFT, from which it starts."""
        names = [self.sibling("bread")] if self.budget else []
        return names + ([self.sibling("sft")] if self.method == "sft+grpo" else [])


def by_length(length):
    """BREAD and GRPO at another L. Short problems are learned within a few steps, so each is evaluated. At
    L = 9 and 10 GRPO is late if it arrives, and may spend three times what BREAD spent. Where the base is
    right at times, SFT has something to spoil."""
    bread_every, grpo_every = (1, 1) if length <= 6 else (2, 3) if length <= 8 else (2, 6)
    rows = [("bread", 0, bread_every, "--method bread"),
            ("grpo", 3 if length in (9, 10) else 1, grpo_every, "--method grpo")]
    return rows + [row[:4] for row in HEADLINE if row[0] == "sft" and length <= 4]


def matrix(quick=False):
    """All runs; those that need others come behind them. `quick`: one seed of chain's headline."""
    rows = [("chain", TASKS["chain"], 1, row) for row in HEADLINE]
    if not quick:
        rows = [(task, length, 5, row) for task, length in TASKS.items() for row in HEADLINE]
        rows += [("chain", TASKS["chain"], 3, row) for row in CONTROLS]
        for task, lengths in LENGTHS.items():
            rows += [(task, length, 3, row) for length in lengths for row in by_length(length)]
    trials = [Trial(*where, *row[:4], seed) for *where, seeds, row in rows for seed in range(seeds)]
    return sorted(trials, key=lambda trial: len(trial.needs))


# ---------------------------------------------------------------- running


def flags_of(trial, output, budget="N"):
    """The arguments of bread.py; paths are relative to the repository, or lie in `output`."""
    example = f"examples/{trial.task}"
    model = f"{example}/model"
    data = example
    more = []
    if trial.method == "sft+grpo":
        model = f"{output}/runs/{trial.sibling('sft')}/checkpoint-{SFT_STEPS}"
    if trial.length != TASKS[trial.task]:
        data = f"{output}/data/{trial.task}-{trial.length}"
        more = ["--max-new-tokens", str(TOKENS[trial.task] * trial.length + 12)]  # 12 suffice for the answer
    if trial.budget:
        more += ["--steps", "100000", "--token-budget", str(budget)]
    return [f"@{example}/{trial.task}.args", "--model", model, "--data", f"{data}/train.jsonl",
            "--eval-data", f"{data}/heldout.jsonl", *trial.flags.split(), "--seed", str(trial.seed),
            "--eval-every", str(trial.every), "--output", f"{output}/runs/{trial.name}", "--overwrite", *more]


def call(arguments):
    """A Python program of this repository in a process of one thread, to its end: None, or why it failed."""
    # Two busy processes on two cores: threads that spin at barriers would take the other's core.
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=env, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return f"{done.stderr.rstrip()}\nexit code {done.returncode}" if done.returncode else None


def to_do(trials, output, results, only=""):
    """The runs that match `only` and have no result, and what they need, in their order."""
    chosen = []
    needed = set()
    for trial in reversed(trials):  # what is needed comes earlier
        ended = (results / f"{trial.name}.json").is_file()
        if trial.method == "sft" and trial.name in needed:  # results can be copied without the checkpoints
            ended &= (output / "runs" / trial.name / f"checkpoint-{SFT_STEPS}").is_dir()
        if not ended and (trial.name in needed or re.search(only, trial.name)):
            chosen.append(trial)
            needed.update(trial.needs)
    return chosen[::-1]


def make_data(trials, output, call):
    """The problems of all lengths that the repository does not hold. None, or what went wrong."""
    for task, length in sorted({(trial.task, trial.length) for trial in trials}):
        folder = output / "data" / f"{task}-{length}"
        if length != TASKS[task] and not folder.is_dir():
            unnamed = folder.with_suffix(".tmp")
            error = call(["examples/make.py", task, "--length", length, "--data-only", "--output", unnamed])
            if error:
                return error
            unnamed.rename(folder)


def execute(trial, output, results, jobs, call):
    """Carry out a run and write its result. Returns None, or what went wrong."""
    missing = [name for name in trial.needs if not (results / f"{name}.json").is_file()]
    if missing:
        return f"not started: it needs {' and '.join(missing)}"
    needed = [read_result(results / f"{name}.json") for name in trial.needs]
    budget = trial.budget * needed[0]["tokens/sampled"] if trial.budget else 0
    commit = git_commit()
    began = time.time()
    error = call(["bread.py", *flags_of(trial, output, budget)])
    if error:
        return error
    result = {
        "task": trial.task, "length": trial.length, "method": trial.method, "seed": trial.seed,
        "command": " ".join(["python bread.py", *flags_of(trial, "runs/claims", budget)]),
        "seconds": round(time.time() - began, 1), "jobs": jobs, "cores": os.cpu_count(), "commit": commit,
        "torch": importlib.metadata.version("torch"), "python": platform.python_version(),
        **summary(output / "runs" / trial.name / "metrics.jsonl")}
    used = [trial.name]
    if trial.method == "sft":
        used = []             # its checkpoint waits for the run that starts from it
        del result["series"]  # no rollouts, so no groups
    if trial.method == "sft+grpo":  # its weights have seen the traces that SFT was shown
        used.append(trial.needs[-1])
        result |= {key: needed[-1][key] for key in ("anchor/shown", "anchor/used")}
        result["flops"] += needed[-1]["flops"]
    write_result(results / f"{trial.name}.json", result)
    for name in used:
        for checkpoint in (output / "runs" / name).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def short(row, *keys):
    values = {key: row.get(key) for key in keys}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def summary(path):
    """What is kept of a metrics.jsonl: evaluations, series with one number a step, and where they ended."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    evaluations = [short(row, "step", "tokens/sampled", "eval/accuracy", "eval/greedy")
                   for row in rows if "eval/accuracy" in row]
    series = {}
    for key in ("tokens/sampled", "anchor/fraction", "frac_reward_zero_std", "reward"):
        series[key] = [short(row, key)[key] for row in rows if row["step"]]
    last = short(rows[-1], "tokens/sampled", "anchor/shown", "anchor/used", "flops")
    return {"steps": rows[-1]["step"], **last, "evaluations": evaluations, "series": series}


def git_commit():
    """The commit that runs, with -dirty behind it where a file differs; "unknown" outside of a clone."""
    command = "git describe --always --dirty --exclude=* --abbrev=12".split()
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def run_all(todo, output, results, jobs, call=call):
    """Run `todo` with `call`, at most `jobs` side by side; returns how many failed or could not start."""
    results.mkdir(parents=True, exist_ok=True)
    error = make_data(todo, output, call)
    if error:
        print(f"the problems could not be made\n{error}")
        return len(todo)

    def attempt(trial):
        error = execute(trial, output, results, jobs, call)
        text = f"FAILED\n{error}"
        if not error:
            text = f"sampled accuracy {final(read_result(results / f'{trial.name}.json')):6.1%}"
        print(f"{trial.name:<24} {text}", flush=True)
        return bool(error)

    with ThreadPoolExecutor(jobs) as pool:  # a wave: what needs nothing, what needs one, two others
        waves = itertools.groupby(todo, key=lambda trial: len(trial.needs))
        return sum(error for _, wave in waves for error in pool.map(attempt, wave))


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
    """Sampled tokens (by `key`: steps) at which held-out sampled accuracy first reaches `target`, linear
    between evaluations; infinity if it never does."""
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
    values = {}
    for r in sorted(results, key=lambda r: r["length"]):
        if (r["task"], r["method"]) == (task, method):
            values.setdefault(r["length"], []).append(tokens_to(r, key=key))
    return {length: statistics.median(found) for length, found in values.items()}


def exponent(tokens_by_length):
    """Slope of log tokens against log L by least squares from L = 4 on: infinite where a length never
    arrives, None with fewer than three lengths."""
    points = {length: tokens for length, tokens in tokens_by_length.items() if length >= 4}
    if len(points) < 3 or math.inf in points.values():
        return None if len(points) < 3 else math.inf
    return statistics.linear_regression([*map(math.log, points)], [*map(math.log, points.values())]).slope


# ---------------------------------------------------------------- tables


def percent(value):
    return "-" if value is None else f"{value:.1%}"


def count(value):
    return "never" if value == math.inf else f"{value:,.0f}"


def power(slope):
    return "-" if slope is None else "a length never arrives" if slope == math.inf else f"L^{slope:.2f}"


def spread(values, form):
    """Median (min to max); one text where they are all the same."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    low, middle, high = (form(pick(values)) for pick in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def markdown(heads, rows):
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


COLUMNS = (  # (head, what of a result, how it is written)
    ("sampled", final, percent), ("greedy", lambda r: final(r, "eval/greedy"), percent),
    ("tokens sampled", lambda r: r["tokens/sampled"], count), (f"tokens to {TARGET:.0%}", tokens_to, count),
    ("expert tokens shown", lambda r: r["anchor/shown"], percent),
    ("in accepted anchors", lambda r: r["anchor/used"], percent),
    ("operations", lambda r: r.get("flops"), lambda value: f"{value / 1e12:.3g} T"))


def method_table(results, task, methods):
    """Markdown: a row per method with median and range over seeds; the base model of the same runs first."""
    rows = []
    bases = select(results, task, TASKS[task], "bread")
    if bases:
        greedy = [first(r, "eval/greedy") for r in bases]
        cells = [spread(map(first, bases), percent), spread(greedy, percent), *"-----"]
        rows.append(["base model", len(bases), *cells])
    for method in methods:
        found = select(results, task, TASKS[task], method)
        if found:
            cells = [spread(map(value, found), form) for _, value, form in COLUMNS]
            rows.append([LABELS[method], len(found), *cells])
    return markdown(["method", "seeds", *(head for head, *_ in COLUMNS)], rows) if rows else "No results."


def length_table(results, task):
    """Markdown: tokens to 80% of BREAD and GRPO by L, and their ratio."""
    rows = []
    for length in medians_by_length(results, task, "bread"):
        ours, theirs, after = (select(results, task, length, method) for method in ("bread", "grpo", "sft"))
        steps = [tokens_to(r, key="step") for r in ours]
        budgets = [r["tokens/sampled"] for r in theirs]
        rows.append([length, spread(map(first, ours), percent), spread(map(final, after), percent),
                     spread(map(tokens_to, ours), count), spread(steps, count),
                     spread(map(tokens_to, theirs), count), spread(budgets, count),
                     ratio_text(results, task, length)])
    return markdown(["L", "base, sampled", "after SFT", f"BREAD, tokens to {TARGET:.0%}", "in steps",
                     f"GRPO, tokens to {TARGET:.0%}", "its budget", "GRPO / BREAD"], rows)


def growth_text(results):
    found = []
    for task in LENGTHS:
        tokens, steps = (power(exponent(medians_by_length(results, task, "bread", key)))
                         for key in ("tokens/sampled", "step"))
        found.append(f"{task}: tokens {tokens}, steps {steps}")
    return f"BREAD to {TARGET:.0%} from L = 4 on, least squares on medians: {'; '.join(found)}."


def ratio_text(results, task, length):
    """How many times BREAD's tokens GRPO needs; if it never arrives, at least its budget over them."""
    ours, theirs = (medians_by_length(results, task, method).get(length) for method in ("bread", "grpo"))
    if theirs is None or ours in (0, math.inf):
        return "-"
    if theirs < math.inf:
        return f"{theirs / ours:.2f}"
    budget = statistics.median(r["tokens/sampled"] for r in select(results, task, length, "grpo"))
    return f"> {budget / ours:.2f}"


# ---------------------------------------------------------------- the claims


def verdicts(results):
    """[(claim, True, False or None where runs are missing, its numbers)]."""
    found = [unsolvable(results, task) for task in TASKS]
    found += [cheaper(results, task) for task in TASKS] + [spoiled(results)]
    found += [few_traces(results, task) for task in TASKS] + [growth(results), search_first(results)]
    return found + [duration(results, matrix(), 3 * 3600, "The whole matrix takes under 3 hours"),
                    duration(results, matrix(quick=True), 600, "--quick takes under 10 minutes")]


def unsolvable(results, task):
    claim = f"{task}: BREAD reaches at least 90%, GRPO, resample, SFT, SFT then GRPO at most 5%"
    medians = {}
    for method, *_ in HEADLINE:
        found = select(results, task, TASKS[task], method)
        if found:
            medians[method] = statistics.median(map(final, found))
    numbers = ", ".join(f"{LABELS[method]} {value:.1%}" for method, value in medians.items())
    if len(medians) < len(HEADLINE):
        return claim, None, numbers
    return claim, medians.pop("bread") >= 0.9 and max(medians.values()) <= 0.05, numbers


def cheaper(results, task):
    """At the longest L at which GRPO arrives. Where it hardly has to search, BREAD cannot gain."""
    bread, grpo = (medians_by_length(results, task, method) for method in ("bread", "grpo"))
    claim = (f"{task}: where GRPO works too, BREAD needs at least 3x fewer sampled tokens to {TARGET:.0%} "
             "(longest such L)")
    numbers = ", ".join(f"L = {length}: {ratio_text(results, task, length)}" for length in bread)
    both = [n for n in bread if bread[n] and max(bread[n], grpo.get(n, math.inf)) < math.inf]
    if not (has_all_lengths(task, bread) and has_all_lengths(task, grpo)):
        return claim, None, numbers
    if not both:
        return claim, False, f"there is no such L. {numbers}"
    return claim, grpo[max(both)] / bread[max(both)] >= 3, f"GRPO arrives up to L = {max(both)}. {numbers}"


def spoiled(results):
    """At L = 2 the base is right in the 40% of its answers that do not jump. The paper saw it on Qwen2.5."""
    ours, after = (select(results, "chain", 2, method) for method in ("bread", "sft"))
    claim = "SFT on the expert's traces lowers the accuracy of a base that is right sometimes (chain, L = 2)"
    numbers = f"base {spread(map(first, ours), percent)}, after SFT {spread(map(final, after), percent)}"
    holds = max(map(final, after)) < min(map(first, ours)) if ours and after else None
    return claim, holds, numbers


def few_traces(results, task):
    shown = [r["anchor/shown"] for r in select(results, task, TASKS[task], "bread")]
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
    """A policy is ahead if its median is better than the search's best seed, in accuracy or in tokens."""
    def text_of(trials):
        tokens = spread(map(tokens_to, trials), count)
        return f"{spread(map(final, trials), percent)}, {tokens} tokens to {TARGET:.0%}"

    claim = "No other anchor policy is ahead of the search beyond its spread (chain)"
    found = {method: select(results, "chain", TASKS["chain"], method) for method, *_ in WHERE_FAILED + ALWAYS}
    measured = {method: trials for method, trials in found.items() if trials}
    search = select(results, "chain", TASKS["chain"], "bread")
    if not search or not measured:
        return claim, None, "-"
    ahead = []
    for method, trials in measured.items():
        if (statistics.median(map(final, trials)) > max(map(final, search))
                or statistics.median(map(tokens_to, trials)) < min(map(tokens_to, search))):
            ahead.append(f"; {LABELS[method]}: {text_of(trials)}")
    numbers = f"search {text_of(search)}; {len(ahead)} of {len(measured)} policies ahead" + "".join(ahead)
    return claim, False if ahead else True if len(measured) == len(found) else None, numbers


def duration(results, trials, limit, claim):
    """Sum of the runs' seconds, each divided by the number of processes that it ran beside."""
    names = {trial.name for trial in trials}
    seconds = [r["seconds"] / r["jobs"] for r in results
               if f"{r['task']}{r['length']}-{r['method']}-{r['seed']}" in names]
    numbers = f"{sum(seconds) / 60:.0f} minutes, {len(seconds)} of {len(trials)} runs"
    return claim, sum(seconds) <= limit if len(seconds) == len(trials) else None, numbers


def tables(results):
    """{name: Markdown} of everything that docs/RESULTS.md says in numbers."""
    words = {True: "holds", False: "does not hold", None: "not measured"}
    claims = [(claim, words[holds], numbers or "-") for claim, holds, numbers in verdicts(results)]
    source = f"\n\nMedian (range over seeds). {len(results)} runs"
    for key in ("commit", "torch", "python", "cores"):
        source += f"; {key} " + ", ".join(sorted({str(r[key]) for r in results}))
    methods = [method for method, *_ in HEADLINE]
    headline = [f"{task}, L = {length}:\n\n" + method_table(results, task, methods)
                for task, length in TASKS.items()]
    lengths = [f"{task}:\n\n" + length_table(results, task) for task in LENGTHS] + [growth_text(results)]
    controls = ["bread", "grpo"] + [method for method, *_ in CONTROLS]
    return {"claims": markdown(["claim", "verdict", "numbers"], claims) + source + ".",
            "headline": "\n\n".join(headline), "lengths": "\n\n".join(lengths),
            "controls": method_table(results, "chain", controls)}


def fill_in(path, results):
    """Write every table into a Markdown file, between `<!-- NAME -->` and `<!-- end -->`."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables(results).items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(?=<!-- end -->)", lambda found: f"{found[1]}\n{table}\n\n",
                      text, flags=re.DOTALL)
    path.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/claims"), help="of the runs and their data")
    parser.add_argument("--results", type=Path, help="folder of the JSON files (default: OUTPUT/results)")
    parser.add_argument("--quick", action="store_true", help="one seed of the chain's headline rows")
    parser.add_argument("--only", default="", metavar="REGEX", help="such names, and what they need")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--table", action="store_true", help="print Markdown from the results, run nothing")
    parser.add_argument("--into", type=Path, metavar="FILE", help="--table: write it into this Markdown file")
    args = parser.parse_args()
    output = args.output.resolve()
    folder = (args.results or output / "results").resolve()
    if args.table:
        results = read_results(folder)
        if not results:
            parser.error(f"no *.json in {folder}; run the matrix first, or give the folder as --results")
        return fill_in(args.into, results) if args.into else print("\n\n".join(tables(results).values()))
    todo = to_do(matrix(args.quick), output, folder, args.only)
    print(f"{len(todo)} runs", flush=True)
    return 1 if run_all(todo, output, folder, args.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
