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
from conftest import ROOT

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
        output.mkdir(parents=True, exist_ok=True)
        first = {"step": 0, "tokens/sampled": 0, "eval/accuracy": 0.0}
        last = {"step": 1, "tokens/sampled": 1000, "eval/accuracy": 0.123456, "anchor/shown": 0.4}
        (output / "metrics.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(last)}")

    todo = claims.to_do(claims.matrix(quick), folder, folder / "results", only)
    return claims.run_all(todo, folder, folder / "results", 1, call), flags


def made_up():
    """A result for every run of the matrix: BREAD arrives, anchors nearly, GRPO up to L = 8, nothing else."""
    accuracies = {"bread": 0.95} | {method: 0.9 for method, *_ in claims.WHERE_FAILED + claims.ALWAYS}
    results = []
    for trial in claims.matrix():
        results.append({
            "task": trial.task, "length": trial.length, "method": trial.method, "seed": trial.seed, "jobs": 2,
            "seconds": 60.0, "cores": 2, "steps": 2, "anchor/shown": 0.3, "anchor/used": 0.2,
            "series": {"tokens/sampled": [5, 10], "anchor/fraction": [0.5, None], "reward": [0.0, 0.5],
                       "frac_reward_zero_std": [0.5, 0.25]}})
        end(results[-1], accuracies.get(trial.method, 0.01), 10_000 * trial.length)
        if trial.method == "grpo" and trial.length <= 8:
            end(results[-1], 0.95, 5_000 * trial.length ** 2)
        if trial.length == 2:  # short enough for the base to be right sometimes
            results[-1]["evaluations"][0]["eval/accuracy"] = 0.3
    return results


def end(result, accuracy, tokens):
    """Let a run arrive at this accuracy with so many tokens."""
    result["tokens/sampled"] = tokens
    result["evaluations"] = [
        {"step": step, "tokens/sampled": tokens * step // 2, "eval/accuracy": accuracy * step / 2,
         "eval/greedy": accuracy * step / 2} for step in (0, 1, 2)]


def test_the_matrix_is_well_formed():
    """Names are unique; what a run needs comes before it; headline rows have five seeds, others three; a
    budget is that of BREAD of the same seed; the quick form is a part of the whole."""
    trials = claims.matrix()
    names = [trial.name for trial in trials]
    assert len(set(names)) == len(names) and set(claims.matrix(quick=True)) < set(trials)
    for trial in trials:
        assert all(names.index(need) < names.index(trial.name) for need in trial.needs)
        assert not trial.budget or trial.sibling("bread") in trial.needs
        headline = [row[0] for row in claims.HEADLINE] if trial.length == claims.TASKS[trial.task] else []
        others = [other.seed for other in trials if other.name[:-1] == trial.name[:-1]]
        assert others == list(range(5 if trial.method in headline else 3))


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
    """Once for the headline, thrice for L = 10, whose data are made; what has a result is not repeated. It
    holds rounded numbers from step 0 on, no path of this machine, and a command that can be typed."""
    failed, flags = missing(tmp_path, "^chain(12|10)-grpo-0")
    names = ["chain-10.tmp", "chain12-bread-0", "chain10-bread-0", "chain12-grpo-0", "chain10-grpo-0"]
    assert (failed, [*flags]) == (0, names)
    assert [flags[f"chain{length}-grpo-0"][-1] for length in (12, 10)] == ["1000", "3000"]
    path = tmp_path / "results" / "chain12-bread-0.json"
    text, read = path.read_text(), claims.read_result(path)
    assert str(tmp_path) not in text and str(ROOT) not in text and "python bread.py @examples" in text
    assert [(row["step"], row["eval/accuracy"]) for row in read["evaluations"]] == [(0, 0.0), (1, 0.1235)]
    assert read["series"]["tokens/sampled"] == [1000] and read["anchor/shown"] == 0.4
    path.unlink()  # how a run is asked for again
    assert [*missing(tmp_path, "^chain12-(bread|grpo)-0")[1]] == ["chain12-bread-0"]


def test_a_failing_run_is_reported_and_the_others_go_on(tmp_path, capsys):
    """Its last words are printed, what needs it does not start, both count; data that fail leave nothing."""
    assert missing(tmp_path, "", "chain12-sft-0", quick=True)[0] == 2
    printed = capsys.readouterr().out
    assert "no memory left" in printed and "it needs chain12-sft-0" in printed
    assert len([*(tmp_path / "results").iterdir()]) == 3
    assert missing(tmp_path, "chain2-bread-0", "chain-2.tmp")[0] == 1
    assert missing(tmp_path, "chain2-bread-0")[0] == 0


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
            r.update(new)
            if accuracy:
                end(r, accuracy, tokens)
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
    subprocess.run(command, check=True)
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert sizes.keys() == {"accuracy", "lengths", "curriculum", "controls"}
    assert all(0 < size < 150_000 for size in sizes.values())
    judged = [holds for _, holds, _ in claims.verdicts(results)]
    assert judged == ([True, *[None] * 4, True, *[None] * 4, True] if quick else [True] * 11)
