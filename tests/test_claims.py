"""Claims about bench/claims.py and its figures: a sound matrix, right numbers, runs that resume.

Nothing is trained: a stand-in writes what bread.py would leave behind, and the figures show made-up numbers.
"""
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from config import parse_args

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # behind the root, whose sampler.py is another one
import claims

PUBLISHED = claims.read_results(ROOT / "bench" / "results" / "claims")


def missing(folder, only, failing="", quick=False):
    """Carry out what is missing with a stand-in for bread.py and make.py, which writes what they leave behind
    and fails for one name: (number of runs that failed, {name: its flags} in the order of their starts)."""
    flags = {}

    def call(arguments):
        arguments = list(map(str, arguments))
        output = Path(arguments[arguments.index("--output") + 1])
        flags[output.name] = arguments
        if output.name == failing:
            return "no memory left\nexit code 1"
        (output / "checkpoint-300").mkdir(parents=True, exist_ok=True)
        last = {"step": 1, "tokens/sampled": 1000, "eval/accuracy": 0.123456, "eval/greedy": 0.5,
                "reward": 0.0, "anchor/fraction": 0.2, "frac_reward_zero_std": 0.7, "anchor/shown": 0.4,
                "anchor/used": 0.2}
        rows = [{"step": 0, "tokens/sampled": 0, "eval/accuracy": 0.0, "eval/greedy": 0.0}, last]
        (output / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    todo = claims.to_do(claims.matrix(quick), folder, folder / "results", only)
    return claims.run_all(todo, folder, folder / "results", 1, call), flags


def result(trial, accuracy, tokens):
    """A made-up run that rises straight from 0 to `accuracy` within `tokens`."""
    rows = [{"step": step, "tokens/sampled": tokens * step // 2, "eval/accuracy": accuracy * step / 2,
             "eval/greedy": accuracy * step / 2} for step in (0, 1, 2)]
    series = {"tokens/sampled": [tokens // 2, tokens], "anchor/fraction": [0.5, None], "reward": [0.0, 0.5],
              "frac_reward_zero_std": [0.5, 0.25]}
    return {"task": trial.task, "length": trial.length, "method": trial.method, "seed": trial.seed, "jobs": 2,
            "seconds": 60.0, "cores": 2, "commit": "abc", "torch": "2.13", "python": "3.11", "steps": 2,
            "anchor/shown": 0.3, "anchor/used": 0.2, "tokens/sampled": tokens, "evaluations": rows,
            "series": series}


def made_up():
    """A result for every run of the matrix: BREAD arrives, anchors nearly, GRPO up to L = 8, nothing else."""
    accuracies = {"bread": 0.95} | {method: 0.9 for method, *_ in claims.WHERE_FAILED + claims.ALWAYS}
    results = []
    for trial in claims.matrix():
        results.append(result(trial, accuracies.get(trial.method, 0.01), 10_000 * trial.length))
        if trial.method == "grpo" and trial.length <= 8:
            results[-1] = result(trial, 0.95, 5_000 * trial.length ** 2)
        if trial.length == 2:  # short enough for the base to be right sometimes
            results[-1]["evaluations"][0]["eval/accuracy"] = 0.3
    return results


def test_the_matrix_is_well_formed():
    """Names are unique; what a run needs comes before it; headline rows have five seeds, others three; a
    budget is that of BREAD of the same seed; the quick form is a part of the whole."""
    trials = claims.matrix()
    names = [trial.name for trial in trials]
    for trial in trials:
        assert all(names.index(need) < names.index(trial.name) for need in trial.needs)
        assert not trial.budget or trial.sibling("bread") in trial.needs
    assert len(set(names)) == len(names) and set(claims.matrix(quick=True)) < set(trials)
    for name in {name.rpartition("-")[0] for name in names}:
        task, length, method = re.fullmatch(r"(\D+)(\d+)-(.*)", name).groups()
        is_headline = int(length) == claims.TASKS[task] and method in [row[0] for row in claims.HEADLINE]
        assert {f"{name}-{seed}" for seed in range(5 if is_headline else 3)} <= set(names)
        assert f"{name}-{5 if is_headline else 3}" not in names


def test_bread_takes_every_command():
    """Its parser reads all flags, the methods are in their file, and a move gets its line's tokens."""
    methods = (ROOT / "examples" / "methods.py").read_text(encoding="utf-8")
    for trial in claims.matrix():
        flags = claims.flags_of(trial, "out", 1000)
        flags[0] = flags[0].replace("@", f"@{ROOT}/")
        config = parse_args(flags, ROOT / "examples" / "chain")
        assert (config.seed, config.eval_every) == (trial.seed, trial.every) and config.overwrite
        assert config.token_budget == (1000 if trial.budget else 0)
        assert config.max_new_tokens == {"chain": 5, "walk": 6}[trial.task] * trial.length + 12
        path, _, name = config.method.rpartition(":")
        assert not path or re.search(rf"^(def )?{name}\b", methods, re.M)


def test_runs_resume_and_get_the_budget_that_bread_spent(tmp_path):
    """Once for the headline, thrice for L = 10, whose data are made; what has a result is not repeated."""
    failed, flags = missing(tmp_path, "^chain(12|10)-grpo-0")
    names = ["chain-10.tmp", "chain12-bread-0", "chain10-bread-0", "chain12-grpo-0", "chain10-grpo-0"]
    assert (failed, [*flags]) == (0, names)
    assert [flags[f"chain{length}-grpo-0"][-1] for length in (12, 10)] == ["1000", "3000"]
    (tmp_path / "results" / "chain12-bread-0.json").unlink()  # how a run is asked for again
    assert [*missing(tmp_path, "^chain12-(bread|grpo)-0")[1]] == ["chain12-bread-0"]


def test_a_result_holds_the_run_and_no_path_of_this_machine(tmp_path):
    """Rounded numbers, evaluations from step 0 on, series, and a command that can be typed."""
    missing(tmp_path, "chain12-bread-0")
    text = (tmp_path / "results" / "chain12-bread-0.json").read_text()
    read = json.loads(text)
    assert str(tmp_path) not in text and str(ROOT) not in text and "python bread.py @examples" in text
    assert [(row["step"], row["eval/accuracy"]) for row in read["evaluations"]] == [(0, 0.0), (1, 0.1235)]
    assert read["series"]["anchor/fraction"] == [0.2] and read["series"]["frac_reward_zero_std"] == [0.7]
    assert (read["anchor/shown"], read["anchor/used"], read["jobs"], read["steps"]) == (0.4, 0.2, 1, 1)


def test_sft_keeps_its_checkpoint_until_grpo_has_started_from_it(tmp_path):
    """No other run keeps one; where it is gone too early, SFT is run again."""
    missing(tmp_path, "bread|sft-0", quick=True)
    kept = tmp_path / "runs" / "chain12-sft-0" / "checkpoint-300"
    assert [*tmp_path.glob("runs/*/checkpoint-*")] == [kept]
    kept.rmdir()
    flags = missing(tmp_path, re.escape("sft+grpo"), quick=True)[1]
    assert [*flags] == ["chain12-sft-0", "chain12-sft+grpo-0"] and str(kept) in flags["chain12-sft+grpo-0"]
    assert not [*tmp_path.glob("runs/*/checkpoint-*")]


def test_a_failing_run_is_reported_and_the_others_go_on(tmp_path, capsys):
    """Its last words are printed, what needs it does not start, both count; data that fail leave nothing."""
    assert missing(tmp_path, "", "chain12-sft-0", quick=True)[0] == 2
    printed = capsys.readouterr().out
    assert "no memory left\nexit code 1" in printed and "not started: it needs chain12-sft-0" in printed
    ended = {path.stem for path in (tmp_path / "results").iterdir()}
    assert ended == {"chain12-bread-0", "chain12-grpo-0", "chain12-resample-0"}
    assert missing(tmp_path, "chain2-bread-0", "chain-2.tmp")[0] == 1
    assert missing(tmp_path, "chain2-bread-0")[0] == 0


def test_a_process_runs_with_one_thread_and_its_failure_has_a_text(tmp_path):
    """Two that spin would fight for two cores; one that is killed says nothing but its exit code."""
    program = tmp_path / "program.py"
    program.write_text("import os, sys; sys.exit('{OMP_NUM_THREADS} {OMP_WAIT_POLICY}'.format(**os.environ))")
    assert claims.call([program]) == "1 passive\nexit code 1"
    program.write_text("import os; os.kill(os.getpid(), 9)")
    assert claims.call([program]).strip() == "exit code -9"


@pytest.mark.parametrize("points, expected", [
    ([(0, 0.0), (99, 0.79)], math.inf), ([(0, 0.85), (9, 0.9)], 0), ([(0, 0.0), (99, 0.8), (200, 0.9)], 99),
    ([(0, 0.0), (100, 0.6), (300, 1.0)], 200), ([(0, 0.7), (10, 0.9), (20, 0.5), (30, 1.0)], 5)])
def test_tokens_to_80_percent(points, expected):
    """Never; at the first evaluation; exactly on one; between two; the first crossing, whatever follows."""
    rows = [{"tokens/sampled": tokens, "eval/accuracy": accuracy} for tokens, accuracy in points]
    assert claims.tokens_to({"evaluations": rows}) == pytest.approx(expected)


def test_the_exponent_of_a_power_law():
    """Exact for 7 L^1.3, whatever L = 2 does; infinite if a length never arrives; none from two lengths."""
    law = {length: 7 * length ** 1.3 for length in (4, 6, 8, 10, 12, 16)}
    assert claims.exponent(law | {2: 1e9}) == pytest.approx(1.3, abs=1e-12)
    assert claims.exponent(law | {8: math.inf}) == math.inf and claims.exponent({4: 1.0, 6: 2.0}) is None


@pytest.mark.parametrize("position, key, accuracy, tokens, new", [
    (1, "walk12-resample-", 0.06, 9, {}), (2, "chain8-grpo-", 0.95, 230_000, {}),
    (3, "walk9-grpo-", 0.95, 100_000, {}), (4, "chain2-sft-", 0.4, 9, {}),
    (5, "chain12-bread-", None, 9, {"anchor/shown": 0.5}), (7, "chain16-bread-", 0.7, 9, {}),
    (8, "chain12-fixed-", 0.9, 9_000, {}), (9, "chain16-", None, 9, {"seconds": 9000.0})])
def test_a_claim_turns_where_its_number_is_bad(position, key, accuracy, tokens, new):
    """All hold in made-up results; one number is made bad, and exactly its claim no longer holds."""
    results = made_up()
    assert all(holds for _, holds, _ in claims.verdicts(results))
    for trial, r in zip(claims.matrix(), results):
        if trial.name.startswith(key):
            r.update(result(trial, accuracy, tokens) if accuracy else {}, **new)
    verdicts = [holds for _, holds, _ in claims.verdicts(results)]
    assert verdicts.pop(position) is False and verdicts == [True] * 10


def test_the_published_results_are_those_of_the_files():
    """docs/RESULTS.md holds every table of bench/results/claims to the letter, README.md the medians."""
    published = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    for name, table in claims.tables(PUBLISHED).items():
        assert f"<!-- {name} -->\n\n{table}\n\n<!-- end -->" in published, name
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("**", "")
    for name, task in (("calculation", "chain"), ("walk", "walk")):
        rows = [claims.select(PUBLISHED, task, claims.TASKS[task], method) for method, *_ in claims.HEADLINE]
        medians = [statistics.median(map(claims.first, rows[0]))]
        medians += [statistics.median(map(claims.final, found)) for found in rows]
        assert f"\n| {name} | {' | '.join(map(claims.percent, medians))} |\n" in readme


@pytest.mark.parametrize("quick", [False, True])
def test_figures_are_written_from_the_whole_matrix_and_from_a_part(quick, tmp_path):
    """Four PNG files below 150 kB; after --quick chain's headline is judged, the other claims are not."""
    pytest.importorskip("matplotlib")
    kept = claims.matrix(quick)
    results = [r for trial, r in zip(claims.matrix(), made_up()) if trial in kept]
    for i, r in enumerate(results):
        claims.write_result(tmp_path / f"{i}.json", r)
    command = [sys.executable, ROOT / "bench" / "claims_plot.py", "--results", tmp_path, "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = {path.stem: path for path in tmp_path.glob("*.png")}
    assert figures.keys() == {"accuracy", "lengths", "curriculum", "controls"}
    assert all(0 < path.stat().st_size < 150_000 for path in figures.values())
    judged = [holds for _, holds, _ in claims.verdicts(results)]
    assert judged == ([True, *[None] * 4, True, *[None] * 4, True] if quick else [True] * 11)
