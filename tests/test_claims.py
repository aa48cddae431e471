"""Claims about bench/claims.py and bench/claims_plot.py: a sound matrix, right numbers, runs that resume.

Nothing is trained: a stand-in writes what bread.py would leave behind, and the figures show made-up numbers.
"""
import importlib.util
import json
import math
import re
import statistics
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import parse_args

ROOT = Path(__file__).parents[1]
FAILED = "noise\nno memory left\nexit code 1"


@pytest.fixture
def claims():
    """A fresh module for every test, so that a test may replace what it calls."""
    spec = importlib.util.spec_from_file_location("claims", ROOT / "bench" / "claims.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["claims"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["claims"]


@pytest.fixture
def fake(claims, monkeypatch):
    """Instead of bread.py and make.py: writes what they leave behind; notes names and flags; fails where told to."""
    log = SimpleNamespace(started=[], flags={}, failing=set())

    def call(arguments):
        arguments = list(map(str, arguments))
        folder = Path(arguments[arguments.index("--output") + 1])
        log.started.append(folder.name)
        log.flags[folder.name] = arguments
        if folder.name in log.failing:
            return FAILED
        (folder / "checkpoint-300").mkdir(parents=True, exist_ok=True)
        last = {"step": 1, "tokens/sampled": 1000, "eval/accuracy": 0.123456, "eval/greedy": 0.5, "reward": None,
                "anchor/fraction": 0.25, "frac_reward_zero_std": 0.75, "anchor/shown": 0.4, "anchor/used": 0.2}
        rows = [{"step": 0, "tokens/sampled": 0, "eval/accuracy": 0.0, "eval/greedy": 0.0}, last]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return None

    monkeypatch.setattr(claims, "call", call)
    return log


def curve(*points):
    return {"evaluations": [{"tokens/sampled": tokens, "eval/accuracy": accuracy, "step": i}
                            for i, (tokens, accuracy) in enumerate(points)]}


def result(task, length, method, seed, accuracy, tokens, seconds=60.0, **more):
    """A made-up run that rises straight from 0 to `accuracy` within `tokens`."""
    rows = [{"step": step, "tokens/sampled": tokens * step // 2, "eval/accuracy": accuracy * step / 2,
             "eval/greedy": accuracy * step / 2} for step in (0, 1, 2)]
    series = {"tokens/sampled": [tokens // 2, tokens], "anchor/fraction": [0.5, None], "reward": [0.0, 0.5],
              "frac_reward_zero_std": [0.5, 0.25]}
    return {"task": task, "length": length, "method": method, "seed": seed, "seconds": seconds, "jobs": 2, "cores": 2,
            "commit": "abc", "torch": "2.13.0", "python": "3.11", "steps": 2, "tokens/sampled": tokens,
            "anchor/shown": 0.3, "anchor/used": 0.2, "evaluations": rows, "series": series, **more}


def made_up(claims):
    """A result for every run of the matrix: BREAD arrives, anchors nearly, GRPO up to L = 8, nothing else."""
    results = []
    for run in claims.matrix():
        accuracy, tokens = 0.01, 10_000 * run.length
        if run.method == "bread" or "--anchor " in run.flags:
            accuracy = 0.95 if run.method == "bread" else 0.9
        elif run.method == "grpo" and run.length <= 8:
            accuracy, tokens = 0.95, 5_000 * run.length ** 2
        results.append(result(run.task, run.length, run.method, run.seed, accuracy, tokens))
        if run.length == 2:  # short enough for the base to be right sometimes
            results[-1]["evaluations"][0]["eval/accuracy"] = 0.3
    return results


# ---------------------------------------------------------------- the matrix


def test_the_matrix_is_well_formed(claims):
    """Names are unique; what a run needs comes before it; every label is there; the quick form is a part of it."""
    names = [run.name for run in claims.matrix()]
    assert len(set(names)) == len(names)
    for run in claims.matrix():
        assert all(names.index(need) < names.index(run.name) for need in run.needs) and run.method in claims.LABELS
    assert [run for run in claims.matrix(quick=True) if run not in claims.matrix()] == []


def test_headline_rows_have_five_seeds_and_the_others_three(claims):
    """Of both tasks, and every run with a budget has BREAD of its own seed, task and length."""
    seeds = {}
    for run in claims.matrix():
        seeds.setdefault((run.task, run.length, run.method), []).append(run.seed)
        assert run.budget == 0 or run.sibling("bread") in run.needs
    for (task, length, method), numbers in seeds.items():
        is_headline = length == claims.TASKS[task] and method in {row[0] for row in claims.HEADLINE}
        assert numbers == list(range(5 if is_headline else 3))
    assert {length for task, length, _ in seeds if task == "chain"} == {2, 4, 6, 8, 9, 10, 12, 16}


def test_bread_takes_every_command(claims):
    """Its own parser reads the flags of all runs; every move gets the tokens of its line, the answer 12."""
    for run in claims.matrix():
        flags = claims.flags_of(run, "out", 1000)
        flags[0] = flags[0].replace("@", f"@{ROOT}/")
        config = parse_args(flags, ROOT / "examples" / "chain")
        assert (config.seed, config.eval_every, config.output) == (run.seed, run.every, f"out/runs/{run.name}")
        assert config.token_budget == (1000 if run.budget else 0) and config.overwrite
        assert config.max_new_tokens == {"chain": 5, "walk": 6}[run.task] * run.length + 12


def test_the_lengths_are_those_of_the_committed_problems(claims):
    """Each move has a letter."""
    for task, length in claims.TASKS.items():
        text = (ROOT / "examples" / task / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[0]
        assert length == len(re.findall(r"\b[a-z]\b", json.loads(text)["question"]))


# ---------------------------------------------------------------- running


def test_a_budget_is_what_bread_of_the_seed_spent(claims, fake, tmp_path):
    """Once for the headline, three times for L = 10, whose data are made first and once."""
    todo = claims.to_do(claims.matrix(), tmp_path, "^chain(12|10)-grpo-0")
    assert claims.run_all(todo, tmp_path, jobs=1) == 0
    assert fake.started == ["chain12-bread-0", "chain12-grpo-0", "chain-10.tmp", "chain10-bread-0", "chain10-grpo-0"]
    budgets = [fake.flags[f"chain{length}-grpo-0"][-1] for length in (12, 10)]
    assert budgets == ["1000", "3000"] and (tmp_path / "data" / "chain-10").is_dir()


def test_a_result_holds_the_run_and_no_path_of_this_machine(claims, fake, tmp_path):
    """Rounded numbers, evaluations from step 0 on, series, and a command that can be typed."""
    claims.run_all(claims.to_do(claims.matrix(), tmp_path, "chain12-bread-0"), tmp_path, jobs=1)
    text = (tmp_path / "results" / "chain12-bread-0.json").read_text()
    read = json.loads(text)
    assert str(tmp_path) not in text and str(ROOT) not in text and read["command"].startswith("python bread.py @exam")
    assert [(row["step"], row["eval/accuracy"]) for row in read["evaluations"]] == [(0, 0.0), (1, 0.1235)]
    assert read["series"]["anchor/fraction"] == [0.25] and read["series"]["frac_reward_zero_std"] == [0.75]
    assert (read["anchor/shown"], read["anchor/used"], read["jobs"], read["steps"]) == (0.4, 0.2, 1, 1)


def test_what_ended_is_not_repeated_and_what_was_cut_short_is(claims, fake, tmp_path):
    """A run's folder alone does not count, its result does."""
    runs = claims.matrix(quick=True)
    (tmp_path / "runs" / "chain12-grpo-0").mkdir(parents=True)
    claims.run_all(claims.to_do(runs, tmp_path, "bread|resample"), tmp_path, jobs=1)
    assert fake.started == ["chain12-bread-0", "chain12-resample-0"]
    claims.run_all(claims.to_do(runs, tmp_path), tmp_path, jobs=2)
    assert sorted(fake.started[2:]) == ["chain12-grpo-0", "chain12-sft+grpo-0", "chain12-sft-0"]
    assert claims.to_do(runs, tmp_path) == [] and not list((tmp_path / "results").glob("*.tmp"))


def test_sft_keeps_its_checkpoint_until_grpo_has_started_from_it(claims, fake, tmp_path):
    """No other run keeps one; where it is gone too early, SFT is run again."""
    runs = claims.matrix(quick=True)
    claims.run_all(claims.to_do(runs, tmp_path, "bread|sft-0"), tmp_path, jobs=1)
    kept = tmp_path / "runs" / "chain12-sft-0" / "checkpoint-300"
    assert [*tmp_path.glob("runs/*/checkpoint-*")] == [kept]
    kept.rmdir()
    todo = claims.to_do(runs, tmp_path, re.escape("sft+grpo"))
    assert [run.method for run in todo] == ["sft", "sft+grpo"]
    claims.run_all(todo, tmp_path, jobs=2)
    assert fake.flags["chain12-sft+grpo-0"][3] == str(kept) and not [*tmp_path.glob("runs/*/checkpoint-*")]


def test_a_failing_run_is_reported_and_the_others_go_on(claims, fake, tmp_path, capsys):
    """Its last words are printed, it has no result, what needs it does not start, and both count."""
    fake.failing.add("chain12-sft-0")
    assert claims.run_all(claims.to_do(claims.matrix(quick=True), tmp_path), tmp_path, jobs=2) == 2
    printed = capsys.readouterr().out
    assert "chain12-sft-0 FAILED\n    noise\n    no memory left\n    exit code 1" in printed
    assert "chain12-sft+grpo-0 not started: it needs chain12-sft-0" in printed
    ended = {path.stem for path in (tmp_path / "results").iterdir()}
    assert ended == {"chain12-bread-0", "chain12-grpo-0", "chain12-resample-0"}


def test_data_that_cannot_be_made_fail_the_run_and_leave_nothing(claims, fake, tmp_path, capsys):
    """The next start tries again."""
    fake.failing.add("chain-2.tmp")
    todo = claims.to_do(claims.matrix(), tmp_path, "chain2-bread-0")
    assert claims.run_all(todo, tmp_path, jobs=1) == 1 and "no memory left" in capsys.readouterr().out
    fake.failing.clear()
    assert claims.run_all(todo, tmp_path, jobs=1) == 0


def test_no_more_runs_than_jobs_are_side_by_side(claims, fake, tmp_path, monkeypatch):
    """Two, and never three: counted at every start of 20 runs that take 10 ms each."""
    active, most, call = [], [], claims.call

    def counted(arguments):
        active.append(1)
        most.append(len(active))
        time.sleep(0.01)
        done = call(arguments)
        active.pop()
        return done

    monkeypatch.setattr(claims, "call", counted)
    assert claims.run_all(claims.to_do(claims.matrix(), tmp_path, "walk12.*(bread|grpo)-"), tmp_path, jobs=2) == 0
    assert max(most) == 2 and len(most) == 20


def test_the_command_ends_with_1_after_a_failure(claims, fake, tmp_path, monkeypatch):
    """And with 0 once the failed run went well."""
    monkeypatch.setattr(sys, "argv", ["claims.py", "--quick", "--output", str(tmp_path), "--only", "bread"])
    fake.failing.add("chain12-bread-0")
    assert claims.main() == 1
    fake.failing.clear()
    assert claims.main() == 0


def test_a_process_runs_with_one_thread_and_its_failure_has_a_text(claims, tmp_path):
    """One that is killed says nothing, so its exit code stands in; two that spin would fight for two cores."""
    program = tmp_path / "program.py"
    program.write_text("import os, sys; sys.exit('{OMP_NUM_THREADS} {OMP_WAIT_POLICY}'.format(**os.environ))")
    assert claims.call([program]) == "1 passive\nexit code 1"
    program.write_text("import os; os.kill(os.getpid(), 9)")
    assert claims.call([program]).strip() == "exit code -9"
    program.write_text("")
    assert claims.call([program]) is None


# ---------------------------------------------------------------- numbers


def test_tokens_to_80_percent(claims):
    """Never; at the first evaluation; exactly on one; between two; the first crossing counts, whatever follows."""
    assert claims.tokens_to(curve((0, 0.0), (100, 0.79))) == math.inf
    assert claims.tokens_to(curve((0, 0.85), (100, 0.9))) == 0
    assert claims.tokens_to(curve((0, 0.0), (100, 0.8), (200, 0.9))) == 100
    assert claims.tokens_to(curve((0, 0.0), (100, 0.6), (300, 1.0))) == pytest.approx(200)
    assert claims.tokens_to(curve((0, 0.7), (10, 0.9), (20, 0.5), (30, 1.0))) == pytest.approx(5)


def test_the_exponent_of_a_power_law(claims):
    """Exact for 7 L^1.3, whatever L = 2 does; infinite where a length never arrives; none from two lengths."""
    law = {length: 7 * length ** 1.3 for length in (4, 6, 8, 10, 12, 16)}
    assert claims.exponent(law | {2: 1e9}) == pytest.approx(1.3, abs=1e-12)
    assert claims.exponent(law | {8: math.inf}) == math.inf
    assert claims.exponent({4: 1.0, 6: 2.0}) is None


def test_a_median_with_one_seed_that_never_arrives(claims):
    """Two of three arrive: the median is the slower one. One of three: never."""
    runs = [result("chain", 8, "grpo", seed, accuracy, 100) for seed, accuracy in enumerate((1.0, 0.9, 0.1))]
    assert claims.medians_by_length(runs, "chain", "grpo")[8] == pytest.approx(80 / 0.9)
    runs_ = runs[1:] + [result("chain", 8, "grpo", 3, 0.2, 100)]
    assert claims.medians_by_length(runs_, "chain", "grpo")[8] == math.inf
    assert claims.spread(map(claims.tokens_to, runs), claims.count) == "89 (80 to never)"


def test_every_claim_holds_where_the_numbers_say_so_and_turns_where_they_do_not(claims):
    """One number at a time is made bad, and exactly its claim no longer holds."""
    def holds(results):
        return [verdict for _, verdict, _ in claims.verdicts(results)]

    def changed(key, accuracy=None, tokens=9, **new):
        rows = {"evaluations": curve((0, 0.0), (tokens, accuracy))["evaluations"]} if accuracy else {}
        return [r | new | rows if key in f"{r['task']}{r['length']}-{r['method']}-" else r for r in results]

    results = made_up(claims)
    assert holds(results) == [True] * 11
    bad = {1: changed("walk12-resample-", 0.06), 2: changed("chain8-grpo-", 0.95, 230_000),
           3: changed("walk9-grpo-", 0.95, 100_000), 4: changed("chain2-sft-", 0.4),
           5: changed("chain12-bread-", **{"anchor/shown": 0.5}), 7: changed("chain16-bread-", 0.7),
           8: changed("chain12-fixed-", 0.9, 9_000), 9: changed("chain16-", seconds=9000.0)}
    for position, results_ in bad.items():
        turned = [i for i, (was, now) in enumerate(zip(holds(results), holds(results_))) if was != now]
        assert turned == [position] and holds(results_)[position] is False


def test_the_gain_is_judged_at_the_longest_length_that_grpo_reaches(claims):
    """BREAD 10k tokens per operation, GRPO 5k L^2: 4 times at L = 8; at 4k L^2 it is 3.2 and at 3k L^2 below 3."""
    for factor, expected in ((5_000, True), (3_000, False)):
        results = [r for r in made_up(claims) if r["method"] in ("bread", "grpo")]
        results = [result("chain", r["length"], "grpo", r["seed"], 0.95, factor * r["length"] ** 2)
                   if r["method"] == "grpo" and r["length"] <= 8 else r for r in results]
        _, holds, numbers = claims.cheaper(results, "chain")
        assert holds is expected and f"L = 8: {factor * 8 / 10_000:.2f}" in numbers and "up to L = 8" in numbers


def test_claims_without_results_are_not_measured(claims):
    """After --quick: chain's headline is judged, the rest is not."""
    quick = [result("chain", 12, run.method, 0, 0.95 if run.method == "bread" else 0.0, 1000)
             for run in claims.matrix(quick=True)]
    verdicts = [verdict for _, verdict, _ in claims.verdicts(quick)]
    assert verdicts == [True, None, None, None, None, True, None, None, None, None, True]


def test_the_tables_come_from_the_files_alone(claims, tmp_path):
    """Every method once in its tables, with its median and range; a Markdown file is filled in, again and again."""
    for r in made_up(claims):
        claims.write_result(tmp_path / f"{r['task']}{r['length']}-{r['method']}-{r['seed']}.json", r)
    results = claims.read_results(tmp_path)
    assert results == sorted(made_up(claims), key=lambda r: (r["task"], r["length"], r["method"], r["seed"]))
    tables = claims.tables(results)
    for method in claims.LABELS:
        assert f"\n| {claims.table_label(method)} | " in tables["headline"] + tables["controls"]
    assert "| BREAD | 5 | 95.0% | 95.0% | 120,000 | 101,053 | 30.0% | 20.0% | 60 |" in tables["headline"]
    assert "L^1.00" in tables["lengths"]
    assert tables["claims"].count(" holds ") + tables["claims"].count(" does not hold ") == 11
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- claims -->\nold\n<!-- end -->\nafter\n")
    for _ in range(2):
        claims.fill_in(document, results)
        assert document.read_text() == f"before\n<!-- claims -->\n\n{tables['claims']}\n\n<!-- end -->\nafter\n"


def test_the_published_results_are_those_of_the_files(claims):
    """docs/RESULTS.md holds every table of bench/results/claims, to the letter."""
    published = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    for name, table in claims.tables(claims.read_results(ROOT / "bench" / "results" / "claims")).items():
        assert f"<!-- {name} -->\n\n{table}\n\n<!-- end -->" in published, name


# ---------------------------------------------------------------- figures


def plot(folder, path=None):
    command = [sys.executable, ROOT / "bench" / "claims_plot.py", "--results", folder, "--output", folder / "figures"]
    env = {**os.environ, "PYTHONPATH": str(path)} if path else os.environ
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_figures_without_matplotlib_are_refused_in_one_line(tmp_path):
    """Exit status 2, and what to type."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = plot(tmp_path, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["claims_plot.py needs matplotlib: pip install matplotlib"]


@pytest.mark.parametrize("quick", [False, True])
def test_five_figures_are_written(claims, quick, tmp_path):
    """From the whole matrix, and from what --quick leaves: PNG files below 150 kB."""
    pytest.importorskip("matplotlib")
    names = {run.name for run in claims.matrix(quick)}
    for r in made_up(claims):
        name = f"{r['task']}{r['length']}-{r['method']}-{r['seed']}"
        if name in names:
            claims.write_result(tmp_path / f"{name}.json", r)
    done = plot(tmp_path)
    assert done.returncode == 0, done.stderr
    figures = list((tmp_path / "figures").iterdir())
    assert {path.stem for path in figures} == {"accuracy", "lengths", "curriculum", "controls", "theory"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size < 150_000 for path in figures)


def test_the_readme_has_the_medians_of_the_files(claims):
    """Its table of both tasks: the base, then the headline's methods in their order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = claims.read_results(ROOT / "bench" / "results" / "claims")
    for name, task in (("calculation", "chain"), ("walk", "walk")):
        runs = {method: claims.select(results, task, claims.TASKS[task], method) for method, *_ in claims.HEADLINE}
        medians = [statistics.median(map(claims.first, runs["bread"]))]
        medians += [statistics.median(map(claims.final, runs[method])) for method in runs]
        row = " | ".join(map(claims.percent, medians))
        assert f"\n| {name} | {row} |\n" in readme.replace("**", "")
