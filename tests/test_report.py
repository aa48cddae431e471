"""What a run left behind, seen again: report.py as a program, and what of a step it keeps to be looked at."""
import dataclasses
import json
import re
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import report
from config import Config, parse_args
from conftest import CHAIN

SEARCHES = """step 2: 2 searches, 1 anchors found
  problem p1   trace of 200 tokens
     cut 100  50%   0 of 4
     cut 150  75%   3 of 4   accepted
  problem p2   trace of 40 tokens
     cut 20  50%   4 of 4
"""
ROLLOUTS = """
problem p1, answer 7, 3 rollouts
[question]
3 + 4?
[anchor: 150 of 200 tokens, shown to the policy]
Count on: 4, 5,
[completion, reward 1.0]
 6, 7
[completion, reward 0.0]
 9"""


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def metrics(step, **changes):
    """A row of metrics, with an evaluation."""
    return {"step": step, "tokens/sampled": 100 * step, "reward": 0.5, "frac_reward_zero_std": 0.25,
            "anchor/searched": 4, "anchor/accepted": 3, "anchor/fraction": 0.4, "sampler/entropy": 0.7,
            "eval/accuracy": 0.2 * step, "eval/greedy": 0.1, "seconds/sample": 4.0 * step,
            "seconds/search": 1.0 * step, "seconds/update": 4.0 * step, "seconds/eval": 2.0, **changes}


@pytest.fixture
def folder(tmp_path):
    """Three steps, a search in the second, the last lines cut short as in a run that still writes."""
    probes = [("p1", 100, 200, 0), ("p2", 20, 40, 4), ("p1", 150, 200, 3)]
    samples = [(step, *end) for step in (1, 2, 3) for end in ((" 9", 0.0), (" 6, 7", 1.0), (" 5", 0.5))]
    tables = {
        "metrics": [{"step": 0, "tokens/sampled": 0, "eval/accuracy": 0.1, "eval/greedy": 0.0},
                    *map(metrics, (1, 2, 3))],
        "probes": [{"step": 2, "id": id, "cut": cut, "of": of, "share": cut / of, "rollouts": 4,
                    "successes": right, "accepted": 0 < right < 4} for id, cut, of, right in probes],
        "samples": [{"step": step, "id": "p1", "question": "3 + 4?", "answer": "7", "of": 200,
                     "cut": 150 * (step == 2), "anchor": "Count on: 4, 5,", "completion": completion,
                     "reward": reward, "finish_reason": "stop"} for step, completion, reward in samples]}
    for name, rows in tables.items():
        (tmp_path / f"{name}.jsonl").write_text(lines(rows) + '{"step": 9, "id')
    return tmp_path


def test_a_step_is_shown_search_by_search(folder, capsys, monkeypatch):
    """The last step with a search, cut by cut, then best and worst; colours change nothing else, and come on
    a terminal without NO_COLOR only."""
    assert report.show(folder) == SEARCHES + ROLLOUTS
    coloured = report.show(folder, 2, coloured=True)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == SEARCHES + ROLLOUTS
    texts = "3 + 4?", "Count on: 4, 5,", " 6, 7", " 9"
    assert len({coloured.split(text + "\x1b")[0].rsplit("\x1b", 1)[1] for text in texts}) == 4
    for is_terminal, no_color, codes in ((False, "", False), (True, "", True), (True, "1", False)):
        monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
        monkeypatch.setenv("NO_COLOR", no_color)
        assert report.main([f"{folder}"]) == 0 and ("\x1b" in capsys.readouterr().out) == codes
    row = json.loads((folder / "samples.jsonl").read_text().split("\n")[0])
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "3 + 4?"}]
    assert ("plain", "system: Add.\nuser: 3 + 4?") in report.group_parts([row | {"question": messages}])
    plain = report.show(folder, 3)
    assert plain.startswith("step 3: no search\n\nproblem p1") and "[anchor" not in plain


def test_no_text_of_a_model_commands_the_terminal(folder):
    """Escapes, returns, C1 controls, turned directions and half characters are replaced; line feeds stay."""
    row = json.loads((folder / "samples.jsonl").read_text().split("\n")[0])
    evil = "a\x1b]0;x\x07b\rc\x9bd\u202ee\ud83df\x00\x7f\n\tg é 数"
    (folder / "samples.jsonl").write_text(lines([row | {"completion": evil, "question": evil, "id": evil}]))
    shown = report.show(folder, 1)
    assert shown.count("a�]0;x�b�c�d�e�f��\n\tg é 数") == 3
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", shown)


@pytest.mark.parametrize("flags, words", [
    ("RUN/none", "none holds no step of a run"), ("RUN --step 9", "holds steps 1 to 3"),
    ("RUN RUN", "several runs are drawn"), ("RUN/none --plot RUN/a.png", "none holds no step of a run"),
    ("RUN --plot RUN/none/a.png", "No such file"), ("RUN --plot RUN/a.xyz", "not supported")])
def test_bad_input_is_one_line(folder, flags, words, capsys):
    """Exit code 2, and nothing but a line that says why."""
    if "RUN --plot" in flags:
        pytest.importorskip("matplotlib")
    assert report.main(flags.replace("RUN", f"{folder}").split()) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and words in error


def test_curves_are_drawn(folder, capsys, monkeypatch):
    """Each run in its colour in all six panels; imitation without evaluation, which samples nothing, and a
    single step are drawn as far as they go. Without matplotlib a line says what to install."""
    image = pytest.importorskip("matplotlib.image")
    nothing = dict.fromkeys(("reward", "frac_reward_zero_std", "anchor/fraction", "sampler/entropy"))
    imitated = {**metrics(1, **nothing), "tokens/sampled": 0, "anchor/searched": 0, "anchor/accepted": 0}
    imitated = {name: value for name, value in imitated.items() if not name.startswith("eval/")}
    later = imitated | {"step": 2, "seconds/update": 9.0}
    for name, rows in (("sft", [imitated, later]), ("one", [metrics(1)])):
        (folder / name).mkdir()
        (folder / name / "metrics.jsonl").write_text(lines(rows))
    drawn = {}
    for names in ("sft", "one", ". one"):
        runs = [f"{folder / name}" for name in names.split()]
        assert report.main([*runs, "--plot", f"{folder / 'a.png'}"]) == 0
        pixels_HWC = image.imread(folder / "a.png")[..., :3]
        halves = [half for third in np.array_split(pixels_HWC, 3, 1) for half in np.array_split(third, 2)]
        for colour in ((0.84, 0.37, 0.0), (0.0, 0.45, 0.70)):  # vermilion, blue
            near = [np.abs(half - colour).max(-1) < 0.12 for half in halves]
            drawn[names, colour[0]] = [int(panel.sum()) > 20 for panel in near]
    assert drawn[". one", 0.84] == [True] * 6 and drawn[". one", 0.0][:5] == [True] * 5
    assert drawn["sft", 0.84] == [True, False, False, False, False, True] and not any(drawn["one", 0.0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([f"{folder}", "--plot", "a.png"]) == 2
    assert capsys.readouterr().err == "report.py: --plot needs matplotlib: pip install matplotlib\n"


def test_time_is_split_between_rows():
    """Of 4 s of sampling, 1 of them a search, 4 of an update and, in the first step, 2 of evaluation."""
    first, second = report.derive([metrics(1), metrics(2)])
    assert first["time"] == pytest.approx([0.3, 0.1, 0.4, 0.2])
    assert second["time"] == pytest.approx([3 / 8, 1 / 8, 4 / 8, 0.0])
    assert (first["gradient"], first["found"]) == (0.75, 0.75)


def group(cut, *advantages, finish_reason="stop"):
    problem = SimpleNamespace(id=f"{cut}", question="q", answer="7", expert_ids=[])
    return [SimpleNamespace(problem=problem, cut=cut, advantage=advantage, reward=1.0, completion_ids=[5],
                            finish_reason=finish_reason, entropy=None) for advantage in advantages]


def test_the_group_to_look_at():
    """Anchored with a gradient, else with a gradient, else any, the first of them; a trace is no anchor."""
    flat = [group(0, 0.0, 0.0), group(3, 0.0)]
    trained = [group(0, 1.0, -1.0), group(9, 1.0, finish_reason="expert")]
    anchored = [group(4, 2.0, -1.0), group(5, 2.0)]
    for groups, best in ((flat + trained + anchored, anchored[0]), (flat + trained, trained[0]),
                         (flat + trained[::-1], trained[1]), (flat, flat[0])):
        assert report.trained_group(groups) is best
    assert report.trained_group([]) == []


def test_a_step_without_traces_is_logged():
    """All rollouts of the group; of no trace at all none is shown; rewards that are None."""
    written = []
    log = report.Log(Config(), speaks=True)
    log.decode = str
    state = SimpleNamespace(step=1, skipped_updates=0, tokens={}, seconds={"sample": 1.0, "update": 1.0},
                            shown={}, used={}, evals=[], progress=lambda config: 0.5)
    told = [{"counts": {"rollouts/unjudged": 2, "loss": 0.5}, "probes": []}] * 2
    log.step(SimpleNamespace(append=lambda name, row: written.append((name, row))), state, told,
             [group(0, 0.0), group(4, 1.0, -1.0)], {})
    (_, row), *samples = written
    assert (row["anchor/shown"], row["anchor/used"], row["rewards/none"]) == (0.0, 0.0, 4)
    assert [(name, sample["id"], sample["of"]) for name, sample in samples] == [("samples.jsonl", "4", 0)] * 2


def test_the_rival_is_a_whole_command():
    """Read back it is the same run, of GRPO, as many tokens, another folder; the example's stays short."""
    config = Config(model="a model", data="it's.jsonl", output="runs/b/", lr=3e-5, no_std=True, resume=True)
    command = shlex.split(report.rival(config, 800, is_example=False))
    expected = dataclasses.replace(config, method="grpo", steps=100000, token_budget=800, resume=False,
                                   output="runs/b-grpo")
    assert command[:2] == ["python", "bread.py"] and parse_args(command[2:], CHAIN) == expected
    assert report.rival(config, 800, True) == ("python bread.py --method grpo --steps 100000 "
                                               "--token-budget 800")


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    """A run that goes on after step 1 drops what came later; without the package it does not start."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, rows in ((0, [metrics(0), metrics(1), metrics(2)]), (1, [metrics(2, reward=None)])):
        report.write_numbers(report.open_board(f"{tmp_path}", step), rows)
    read = events.EventAccumulator(f"{tmp_path}").Reload()
    assert [event.step for event in read.Scalars("reward")] == [0, 1]
    assert [event.value for event in read.Scalars("tokens/sampled")] == [0, 100, 200]
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        report.Log(Config(tensorboard=True), speaks=False)
