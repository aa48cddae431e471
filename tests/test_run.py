"""Claims about a run of bread.py: its command line, its files, how it ends and goes on, what it prints.

Every run is real: the embedded example's model on the 12 problems of conftest.py. What has to go wrong goes
wrong in a method file, the hook that a user has: `hook` writes one whose function acts before a step.
"""
import collections
import dataclasses
import doctest
import gc
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import bread
import evaluation
import report
from bread import State
from checkpoint import fingerprint
from config import Config, parse_args
from conftest import CHAIN, ROOT, read_lines
from model import Transformer

G = 4
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
pytestmark = pytest.mark.usefixtures("one_thread")


def hook(folder, action="pass", step=-1, method="bread.bread"):
    """Write a method file that does `action` before `step` (0: every one), remembers every problem and has
    the method's own loss, times `factor`; the flag that uses it."""
    (folder / "hook.py").write_text(f"""
import math, os, signal
import bread
factor = 1.0
def method(policy, problems, state):
    global factor
    if state.step + 1 == {step} or {step} == 0:
        {action}
    for problem in problems:
        state.memory[problem.id] = [state.step, "seen"]
    return {method}(policy, problems, state)
def loss(config, batch, logprobs_N):
    return factor * getattr({method}, "loss", bread.batch_loss)(config, batch, logprobs_N)
method.loss = loss
""")
    return f" --group-size {G} --method {folder / 'hook.py'}:method"


def one_line(capsys, beginning="bread.py: "):
    """What stands on stderr, which is one line."""
    err = capsys.readouterr().err
    assert err.startswith(beginning) and err.count("\n") == 1
    return err


@pytest.mark.parametrize("method", ["bread", "grpo", "sft"])
def test_a_run_leaves_its_files_behind(flags, tmp_path, capsys, method):
    """run.json is the resolved configuration; metrics are what docs/PAPER.md explains and no more; the last
    checkpoint is a Hugging Face folder that loads. A pipe gets plain lines, one a step."""
    folder = tmp_path / "run"
    assert bread.main(flags(folder, f"--method {method} --group-size {G}")) == 0
    written = json.loads((folder / "run.json").read_text())
    assert (written["method"], written["lr"], written["group_size"]) == (method, 1e-3, G)
    start, first, last = read_lines(folder / "metrics.jsonl")
    assert set(start) == {"step", "eval/accuracy", "eval/greedy", "tokens/sampled"}
    assert (first["step"], last["step"]) == (1, 2) and first["grad_norm"] > 0
    assert method == "sft" or first["sampler/logprob_gap"] < 1e-5  # a few roundings of float32
    table = (ROOT / "docs" / "PAPER.md").read_text().split("## Metrics")[1].split("##")[0].split("\n| `")[1:]
    cells = [re.findall("`([a-z_/]+)`", "`" + row.split("|")[0]) for row in table]
    documented = {cell[0].split("/")[0] * name.startswith("/") + name for cell in cells for name in cell}
    assert set(last) - {"step"} == documented  # `/probe` behind `tokens/base` is `tokens/probe`
    assert set(first) == {name for name in last if not name.startswith("eval/")}
    assert last["tokens/sampled"] == sum(last[f"tokens/{kind}"] for kind in ("base", "probe", "resample"))
    assert (last["tokens/base"] > 0, last["tokens/probe"] > 0) == (method != "sft", method == "bread")
    num_parameters = sum(x.numel() for x in Transformer.from_pretrained(CHAIN / "model").parameters())
    forward = last["tokens/sampled"] + last["tokens/prefilled"] + last["tokens/scored"]
    assert last["flops"] == num_parameters * (2 * forward + 6 * last["tokens/trained"])
    assert {sample["step"] for sample in read_lines(folder / "samples.jsonl")} == {1, 2}
    assert len(read_lines(folder / "probes.jsonl")) == first["anchor/probes"] + last["anchor/probes"]
    before, after = (Transformer.from_pretrained(path) for path in (CHAIN / "model", folder / "checkpoint-2"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    bread.Tokenizer.from_pretrained(folder / "checkpoint-2")
    out, err = capsys.readouterr()
    assert len(re.findall(r"^step [12]/2 .*ETA", out, re.M)) == 2 and err == ""
    assert not re.search(r"[\r\x1b]", out) and f"checkpoint  {folder / 'checkpoint-2'}" in out


def results(folder):
    """What must agree of two runs of four steps: weights, moments, and all lines of the logs but seconds."""
    record = json.loads((folder / "checkpoint-4" / "trainer.json").read_text())["record"]
    assert record.keys() == {field.name for field in dataclasses.fields(State)}
    rows = read_lines(folder / "metrics.jsonl")
    seconds = [row["seconds/sample"] for row in rows[1:]]
    assert seconds == sorted(seconds), "they go on where they were"
    return {"weights": load_file(folder / "checkpoint-4" / "model.safetensors"),
            "optimizer": load_file(folder / "checkpoint-4" / "trainer-0-0.tensors"),
            "metrics": [{name: row[name] for name in row if not name.startswith("seconds/")} for row in rows],
            "samples": read_lines(folder / "samples.jsonl"), "probes": read_lines(folder / "probes.jsonl"),
            "state": record | {"seconds": {}}}


OPTIONS = ("--steps 4 --updates-per-batch 2 --warmup-steps 3 --kl 0.02 --on-fail expert --weight-decay 0.1 "
           "--importance-cap 2 --temperature 0.8 --save-every 2 --lr 1e-4")


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """Results of the run that was not interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert bread.main(flags(folder / "run", OPTIONS + hook(folder))) == 0
    return results(folder / "run")


@pytest.mark.parametrize("broken_by, step, code", [
    ("--steps", 2, 0), ("SIGINT", 1, 130), ("SIGTERM", 3, 143), ("SIGINT", 4, 130), ("SIGHUP", 2, 129),
    ("memory", 3, 1), ("crash", 4, None)])
def test_a_resumed_run_equals_an_unbroken_one(flags, tmp_path, capsys, unbroken, broken_by, step, code):
    """Weights, moments, logs and every field of the state, bit for bit. A signal lets the step end, saves and
    exits with 130, 143 or 129; where memory runs out, or a method fails, in step 4, step 3 is saved, and one
    line says why."""
    folder = tmp_path / "run"
    if broken_by == "crash":
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        assert bread.main(flags(folder, OPTIONS + hook(tmp_path, "raise LookupError", step))) == 1
        line = one_line(capsys, "bread.py: LookupError()")
        assert f"the traceback is in {folder / 'crash.txt'}, saved after step 3" in line
        assert "hook.py" in (folder / "crash.txt").read_text()
        assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [0, 1, 2, 3]
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.collect()  # the traceback held the run, and with it the folder's lock
    else:
        action = "pass" if broken_by == "--steps" else f"os.kill(os.getpid(), signal.{broken_by})"
        if broken_by == "memory":
            action = "import torch; raise torch.OutOfMemoryError('2 GiB are missing' + chr(10))"
        end = f" --steps {step}" if broken_by == "--steps" else ""
        capsys.readouterr()
        at = step + (broken_by == "memory")
        assert bread.main(flags(folder, OPTIONS + hook(tmp_path, action, at) + end)) == code
        if broken_by == "memory":
            line = one_line(capsys, "bread.py: out of memory")
            assert "--micro-batch-tokens" in line and "2 GiB are missing" in line
        assert (folder / f"checkpoint-{step}").is_dir()
    assert bread.main(flags(folder, f"{OPTIONS} {hook(tmp_path)} --resume")) == 0
    found = results(folder)
    for name in ("weights", "optimizer"):
        ours, theirs = found.pop(name), unbroken[name]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert found == {name: unbroken[name] for name in found}


@pytest.mark.parametrize("device, noise", [("cpu", 0.0), pytest.param("cuda", 2.1e-4, marks=pytest.mark.gpu)])
def test_two_steps_of_a_device_and_a_resumed_second(flags, tmp_path, device, noise):
    """Finite, trained on what was sampled, and resumed as if unbroken. noise: on CUDA sums are not in one
    order, and Adam moves a weight of hardly any gradient by the rate, 1e-4, up or down."""
    options = f"--device {device} --on-fail expert --lr 1e-4 --group-size {G} --save-every 1"
    for folder, end in (("whole", "--steps 2"), ("broken", "--steps 1"), ("broken", "--steps 2 --resume")):
        assert bread.main(flags(tmp_path / folder, f"{options} {end}")) == 0
    for row in read_lines(tmp_path / "whole" / "metrics.jsonl")[1:]:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["skipped_updates"] == 0
        assert row["sampler/logprob_gap"] < 0.05
    paths = [tmp_path / run / "checkpoint-2" / "trainer-0-0.tensors" for run in ("whole", "broken")]
    one, other = map(load_file, paths)
    masters = [name for name in one if name.endswith("master")]
    assert masters
    for name in masters:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=noise)


def test_a_token_budget_ends_the_run_and_its_last_step_has_a_rate(flags, tmp_path, capsys):
    """A run is resumed with more steps and a budget: one line each says the new end and the old one. The step
    that uses the budget up is the last, and it saves; its rate was decided before it."""
    common = f"--method grpo --group-size {G} --eval-data '' --lr-decay 1"
    assert bread.main(flags(tmp_path / "run", f"{common} --steps 1")) == 0
    capsys.readouterr()
    assert bread.main(flags(tmp_path / "run", f"{common} --steps 0 --resume")) == 2
    assert "the run has done 1 steps, --steps is 0" in one_line(capsys)
    for notes in (["--steps 9, not 1", "--token-budget 2000, not 0"], []):
        assert bread.main(flags(tmp_path / "run", f"{common} --steps 9 --token-budget 2000 --resume")) == 0
        out = capsys.readouterr().out
        lines = [line for line in out.splitlines() if line.startswith("--resume")]
        last = json.loads((tmp_path / "run" / "run.json").read_text())["history"][-1]["step"]
        assert f"continues from checkpoint-{last} at step {last}\n" in out
        assert len(lines) == len(notes) and all(note in line for note, line in zip(notes, lines))
    history = json.loads((tmp_path / "run" / "run.json").read_text())["history"]
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [process["step"] for process in history] == [0, 1, len(rows)]
    spent = [0, *(row["tokens/sampled"] for row in rows)]
    assert 2 < len(rows) < 9 and spent[-2] < 2000 <= spent[-1]
    expected = [1e-3 * (1 - max(tokens / 2000, step / 9)) for step, tokens in enumerate(spent[:-1])]
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    assert (tmp_path / "run" / f"checkpoint-{len(rows)}").is_dir()


@pytest.mark.parametrize("spoil", [
    "next(policy.model.parameters()).data[0] = math.nan",
    "policy.model.model['norm'].weight.data.fill_(3e38)"])
def test_logits_that_are_not_finite_end_the_run(flags, tmp_path, capsys, spoil):
    """At the first one: exit code 1, one line; what made them reaches no checkpoint, and the one that is
    there stays the newest, from which the run goes on."""
    folder = tmp_path / "run"
    common = "--steps 6 --save-every 2 --eval-data ''"
    assert bread.main(flags(folder, common + hook(tmp_path, spoil, 4))) == 1
    line = one_line(capsys, "bread.py: the model's logits are NaN or infinite")
    assert "nothing more was saved" in line
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [1, 2, 3]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert bread.main(flags(folder, f"{common} {hook(tmp_path)} --resume")) == 0


def test_weights_that_are_not_finite_are_not_saved(flags, tmp_path, capsys):
    """Where nothing was sampled from them: imitation with a rate that no number holds."""
    more = "--method sft --steps 4 --save-every 1 --eval-data '' --lr 1e38 --max-skipped-updates 9"
    assert bread.main(flags(tmp_path / "run", more)) == 1
    assert "the weights are NaN or infinite; older checkpoints are sound" in one_line(capsys)
    for path in (tmp_path / "run").glob("checkpoint-*/model.safetensors"):
        assert all(bool(weight.isfinite().all()) for weight in load_file(path).values())


def test_a_reader_that_goes_away_ends_no_run(flags, tmp_path):
    """Neither `| head`, nor a closed stdout or stderr, nor a terminal without Unicode."""
    argv = flags("OUT", "--eval-data '' --method sft")
    command = shlex.join([sys.executable, f"{ROOT / 'bread.py'}", *argv])
    endings = {"head": "| head -n 1 >/dev/null; exit ${PIPESTATUS[0]}", "out": ">&-", "err": "2>&-",
               "full": ">/dev/full"}
    for name, ending in endings.items():
        line = f"{command.replace('OUT', str(tmp_path / f'{name}-ü'))} {ending}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path,
                              env=os.environ | {"PYTHONIOENCODING": "ascii"})
        told = "bread.py goes on, though nothing can be printed: " if name == "full" else ""
        assert done.returncode == 0 and done.stderr.startswith(told) and bool(told) == bool(done.stderr)
        assert (tmp_path / f"{name}-ü" / ".lock").read_bytes() == b""
        assert (tmp_path / f"{name}-ü" / "checkpoint-2" / "trainer.json").is_file()


def test_a_signal_is_heard_though_nobody_reads_stderr(flags, tmp_path):
    """A terminal that hangs up takes stderr along, and sends the signal: no error in its handler."""
    argv = flags(tmp_path / "run", hook(tmp_path, "os.kill(os.getpid(), signal.SIGHUP)", 2, "bread.sft")
                 + " --eval-data '' --steps 9")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, f"{ROOT / 'bread.py'}", *argv], stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 128 + signal.SIGHUP and (tmp_path / "run" / "checkpoint-2").is_dir()


def test_a_disk_without_room_is_known_before_training(flags, tmp_path, capsys, monkeypatch):
    """One line, exit code 2, and nothing of a run is left behind."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert bread.main(flags(tmp_path / "run", "--method sft")) == 2
    assert re.search(r"a checkpoint needs \d+ MB, 0 MB are free", one_line(capsys))
    assert not list((tmp_path / "run").glob("*.json*"))


def test_the_best_checkpoint_stays_if_asked(flags, tmp_path):
    """By accuracy on held-out problems; else the newest alone."""
    common = "--save-every 1 --eval-every 1 --steps 5 --keep 1 --method sft --lr 1e-2 --eval-samples 8"
    assert bread.main(flags(tmp_path / "run", f"{common} --keep-best")) == 0
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")[1:]
    best = max(rows, key=lambda row: (row["eval/accuracy"], row["step"]))["step"]
    stays = {f"checkpoint-{best}", "checkpoint-5"}
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == stays


def test_too_many_skipped_updates_in_a_row_end_the_run(flags, tmp_path, capsys):
    """Of seven updates the 2nd, 3rd, 5th, 6th and 7th are not finite. The seventh step is the last: exit code
    1, one line, a checkpoint of what the fourth step left, bit for bit; from there a resumed run goes on."""
    common = "--eval-data '' --save-every 4 --steps 9 --max-skipped-updates 3"
    spoil = hook(tmp_path, "factor = math.nan if state.step + 1 in (2, 3, 5, 6, 7) else 1.0", 0, "bread.sft")
    assert bread.main(flags(tmp_path / "run", common + spoil)) == 1
    assert "saved" in one_line(capsys, "bread.py: 3 updates in a row")
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 2, 2, 3, 4, 5]
    assert [row["grad_norm"] is None for row in rows] == [False, True, True, False, True, True, True]
    for name in ("model.safetensors", "trainer-0-0.tensors"):
        sound, saved = (load_file(tmp_path / "run" / f"checkpoint-{step}" / name) for step in (4, 7))
        assert sound.keys() == saved.keys() and all(torch.equal(sound[key], saved[key]) for key in sound)
    healed = hook(tmp_path, method="bread.sft") + " --resume"
    assert bread.main(flags(tmp_path / "run", common + healed)) == 0
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10)) and rows[-1]["skipped_updates"] == 5


def test_resume_and_output_refuse_another_run_and_touch_nothing(flags, data, tmp_path, capsys):
    """One line, exit code 2, every file as it was, and the right command works at once: locks and signal
    handlers are let go. Old checkpoints are pruned, the resumed one among them; its tokenizer is not lost."""
    before = signal.getsignal(signal.SIGINT)
    text = (data / "train.jsonl").read_text()
    copy, folder = tmp_path / "data.jsonl", tmp_path / "run"

    def run(more, content=text):
        copy.write_text(content)
        return bread.main(flags(folder, f"--method sft --data {copy} --eval-data '' --save-every 1 {more}"))
    assert run("--steps 1") == 0
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for more, content, words in (
            ("--resume --seed 1", text, "--resume: "), ("--resume --lr 2e-3", text, "--resume: "),
            ("--resume --group-size 5", text, "--resume: "), ("", text, "(overwrite)"),
            ("--resume --steps 4", text.replace("start", "begin", 1), "--resume: ")):
        capsys.readouterr()
        assert run(more, content) == 2 and words in one_line(capsys)
        assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run("--resume --steps 5") == 0 and signal.getsignal(signal.SIGINT) is before
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert all((folder / f"checkpoint-{step}" / name).is_file() for step in (4, 5))
    assert run("--steps 1 --overwrite") == 0
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [1]


def test_resume_sees_a_changed_template(flags, tmp_path, capsys):
    """Which would give other prompts, or other weights to stay near to: one line says what has changed."""
    shutil.copytree(CHAIN / "model", tmp_path / "model")
    common = f"--model {tmp_path / 'model'} --method sft --eval-data ''"
    assert bread.main(flags(tmp_path / "run", f"{common} --steps 1")) == 0
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[-1].content }} ")
    capsys.readouterr()
    assert bread.main(flags(tmp_path / "run", f"{common} --resume")) == 2
    changed = f"tokenizer, template or reference {tmp_path / 'model'} has changed"
    assert changed in one_line(capsys)
    common = f"--model {tmp_path / 'model'} --method grpo --kl 0.1 --group-size {G} --eval-data '' --steps 1"
    assert bread.main(flags(tmp_path / "kl", common)) == 0
    shutil.copy(tmp_path / "run" / "checkpoint-1" / "model.safetensors", tmp_path / "model")
    capsys.readouterr()
    assert bread.main(flags(tmp_path / "kl", f"{common} --resume")) == 2 and changed in one_line(capsys)


def test_resume_from_what_cannot_be_resumed_names_the_way_out(flags, tmp_path, capsys):
    """A run.json that is gone or none; a state with a field of another version. The history may be anything.
    Flipped bits in the newest weights cost the steps since the checkpoint before, with a line."""
    folder = tmp_path / "run"
    common = "--method sft --eval-data '' --save-every 1"
    assert bread.main(flags(folder, f"{common} --steps 2")) == 0
    options = json.loads((folder / "run.json").read_text())
    weights = folder / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9] + b"123456789")
    (folder / "run.json").write_text(json.dumps(options | {"history": 5}))
    capsys.readouterr()
    assert bread.main(flags(folder, f"{common} --resume --steps 3")) == 0
    told = capsys.readouterr().out
    assert "checkpoint-2 is damaged and was skipped" in told
    assert "continues from checkpoint-1 at step 1" in told
    way_out = f"--model {folder}/checkpoint-"
    for content in (None, "[5]"):
        (folder / "run.json").unlink() if content is None else (folder / "run.json").write_text(content)
        assert bread.main(flags(folder, f"{common} --resume")) == 2 and way_out in one_line(capsys)
    (folder / "run.json").write_text(json.dumps(options))
    manifest = json.loads((folder / "checkpoint-3" / "trainer.json").read_text())
    manifest["record"]["mood"] = manifest.pop("sha256")
    manifest["sha256"] = fingerprint(manifest)
    (folder / "checkpoint-3" / "trainer.json").write_text(json.dumps(manifest))
    assert bread.main(flags(folder, f"{common} --resume")) == 2 and way_out in one_line(capsys)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("expected, inputs", [
    ("--frobnicate", ["--frobnicate 3"]),
    ("--step", ["--step 3"]),                              # an abbreviation of --steps
    ("no-such", ["--model no-such/folder", "--data no-such.jsonl", "--eval-data no-such.jsonl",
                 "--method no-such.py:name", "@no-such.args"]),
    ("--data", ["--data ''"]),
    ("--model", ["--model ''"]),
    ("--group-size", ["--group-size 1", "--group-size eight"]),
    ("12 usable problems", ["--problems-per-step 13"]),
    ("lower --max-new-tokens to 249", ["--max-new-tokens 500"]),
    ("--method", ["--method ppo"]),
    ("no function 'name'", ["--method empty.py:name"]),
    ("a:b.py cannot be run: ZeroDivisionError", ["--method a:b.py:name"]),
    ("--anchor-low", ["--anchor-low 9", "--anchor-low 3 --anchor-high 2"]),   # of G = 8
    ("--anchor-high", ["--anchor-high 9"]),
    ("--kl", ["--method sft --kl 0.1"]),
    ("must be cpu, cuda or cuda:NUMBER", [f"--device {name}" for name in ("toaster", "mps", "meta")]),
    ("--eval-data", ["--eval --eval-data ''"]),
    ("without --resume", ["--resume"]),                    # nothing there yet
    ("[...]", [f"{flag} {'x' * 5000}" for flag in ("--model", "--data", "--reward", "--output")]),
    ("--output", ["--resume --output ''"])])
def test_bad_input_ends_with_one_line_and_exit_code_2(flags, tmp_path, monkeypatch, capsys, expected, inputs):
    """The line names the flag or the file; no traceback, no page of usage, and no folder with a run in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").touch()
    (tmp_path / "a:b.py").write_text("1 / 0")
    for more in inputs:
        assert bread.main(flags(tmp_path / "run", more)) == 2
        assert expected in one_line(capsys)
        assert not (tmp_path / "run" / "run.json").exists() and not list(tmp_path.glob("run/checkpoint-*"))


@pytest.mark.parametrize("name", [name for name in FIELDS if FIELDS[name].metadata["low"] is not None])
def test_every_number_has_limits(name):
    """The limits themselves are taken, what is beyond them is not, nor NaN and infinity; the line names
    the flag and says what is allowed."""
    low, high = FIELDS[name].metadata["low"], FIELDS[name].metadata["high"]
    others = {"group_size": 8, "anchor_low": 1} if name != "group_size" else {"method": "sft"}
    for value in [low, high][:1 + (high < float("inf"))]:
        Config(**{**others, name: value})
    below = 0.0 if low == 1e-30 else low - 1
    for value in (below, high + 0.01, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} is .*number (at least|above)"):
            Config(**{**others, name: value})


def test_every_field_is_a_flag_with_a_reason_and_may_come_from_a_file(tmp_path, capsys):
    """--help names them all; words are checked against their choices; without --model the embedded example
    and its recipe are used. @FILE: one flag a line, comments and quotes as in a shell; later flags win."""
    with pytest.raises(SystemExit, match="0"):
        bread.main(["--help"])
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in FIELDS)
    assert all(field.metadata["help"] for field in FIELDS.values())
    path = tmp_path / "recipe.args"
    path.write_text("# recipe\n--model 'my model' --data d.jsonl\n\n--lr 3e-4  # high\n--no-std\n--steps 7\n")
    config = parse_args([f"@{path}", "--steps", "9"], bread.EXAMPLE)
    assert (config.model, config.data, config.lr, config.steps) == ("my model", "d.jsonl", 3e-4, 9)
    assert config.no_std and parse_args(["--steps", "5", f"@{path}"], bread.EXAMPLE).steps == 7
    for name in ("on_fail", "loss_mean", "anchor_placement"):
        with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} is 'x', it must be one of "):
            Config(**{name: "x"})
    config = parse_args(["--steps", "3"], bread.EXAMPLE)
    assert config.model == f"{CHAIN / 'model'}" and config.steps == 3 and config.lr != Config().lr
    assert re.fullmatch(r"runs/bread-\d{8}-\d{6}", config.output)


def test_eval_writes_every_answer_and_what_they_amount_to(flags, data, tmp_path, capsys):
    """eval.jsonl has each problem with its greedy and its sampled answers, from which eval.json follows;
    --write-hard keeps the rows, as they were, that no sample solved. A second time replaces all."""
    hard = tmp_path / "hard.jsonl"
    for seed in (1, 0):
        more = f"--eval --eval-samples 6 --write-hard {hard} --seed {seed} {'--overwrite' * hard.exists()}"
        assert bread.main(flags(tmp_path / "run", more)) == 0
    rows = read_lines(tmp_path / "run" / "eval.jsonl")
    summary = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert [len(row["samples"]) for row in rows] == [6] * 3 and summary["options"]["seed"] == 0
    for row in rows:
        for answer in (row["greedy"], *row["samples"]):
            assert answer["reward"] == bread.math_reward(answer["completion"], row["answer"])
    rates = [sum(sample["reward"] for sample in row["samples"]) / 6 for row in rows]
    assert summary["accuracy"] == summary["pass@1"] == pytest.approx(sum(rates) / 3) and 0 < sum(rates) < 3
    assert summary["pass@6"] == pytest.approx(sum(rate > 0 for rate in rates) / 3)
    originals = read_lines(data / "heldout.jsonl")
    assert read_lines(hard) == [row for row, rate in zip(originals, rates) if rate == 0] != []
    out = capsys.readouterr().out
    assert f"6 sampled   {summary['accuracy']:>7.1%}   95% interval" in out and "pass@k      1:" in out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["eval.json", "eval.jsonl"]


def test_what_answers_amount_to():
    """By hand: two problems of two levels; pass@k without repetition; Wilson's interval as in its paper's
    successors (10 of 100: 5.5% to 17.4%)."""
    def made(reward, finish_reason="stop", answer="7"):
        return {"reward": reward, "finish_reason": finish_reason, "answer": answer, "tokens": 4}
    rows = [{"level": "1", "greedy": made(1.0), "samples": [made(1.0), made(0.0), made(0.0, "length", None)]},
            {"level": "5", "greedy": made(0.0), "samples": [made(0.0)] * 3}]
    found = evaluation.summarise(rows)
    expected = {"problems": 2, "samples": 3, "greedy": 0.5, "accuracy": 1 / 6, "pass@1": 1 / 6,
                "pass@2": 1 / 3, "pass@3": 1 / 2, "cut_off": 1 / 6, "without_answer": 1 / 6, "mean_tokens": 4}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["levels"]["1"] == pytest.approx({"problems": 1, "greedy": 1.0, "accuracy": 1 / 3})
    assert evaluation.interval([1.0] * 10 + [0.0] * 90) == pytest.approx([0.0552, 0.1744], abs=1e-4)
    assert evaluation.interval([0.0] * 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
    halves = evaluation.interval([0.5] * 10 + [0.0] * 10)  # between problems there is less than chance
    assert halves[0] > evaluation.interval([1.0] * 5 + [0.0] * 15)[0] and halves[1] < 0.45


def test_only_methods_that_use_traces_need_them(flags, tmp_path, data, capsys):
    """Rows without: GRPO trains, an evaluation is the same, BREAD says what can use the file."""
    rows = read_lines(data / "train.jsonl")
    rows = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = f"--data {bare} --eval-data {bare} --steps 1 --group-size {G}"
    assert bread.main(flags(tmp_path / "grpo", f"{more} --method grpo")) == 0
    assert "warning: 12 of 12 held-out questions are trained on, too" in capsys.readouterr().out
    silent = tmp_path / "silent.jsonl"
    silent.write_text("".join(json.dumps(row | {"trace": "Step 1.\n\nDone."}) + "\n" for row in rows))
    no_answers = f"--data {silent} --eval-data '' --steps 1 --max-new-tokens 8"
    assert bread.main(flags(tmp_path / "silent", no_answers)) == 0
    assert "warning: 12 of 12 traces state no answer that the reward can read" in capsys.readouterr().out
    assert read_lines(tmp_path / "grpo" / "metrics.jsonl")[-1]["anchor/shown"] == 0
    capsys.readouterr()
    assert bread.main(flags(tmp_path / "bread", more)) == 2
    assert "no trace in any row: only --method grpo can use this file" in one_line(capsys)
    assert bread.main(flags(tmp_path / "kept", f"{more} --method grpo --on-fail expert")) == 2


REWARD = """
calls = []
def graded(completion, answer, problem):
    calls.append(problem.id)
    if len(calls) == 30:
        {action}
    return None if len(calls) % 3 == 0 else 0.5 * (answer in completion)
def right(completion, answer, problem):
    return answer in completion
"""


def test_a_users_reward_is_heard(flags, tmp_path):
    """Numbers, and None, which is left out of its group and counted; a gold answer that only it can judge."""
    (tmp_path / "own.py").write_text(REWARD.format(action="pass"))
    more = f"--reward {tmp_path / 'own.py'}:graded --method grpo --steps 1 --eval-data '' --group-size 6"
    assert bread.main(flags(tmp_path / "run", more)) == 0
    row, = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert row["rewards/none"] == 6 and 0 <= row["reward/train"] <= 0.5
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 4 and {sample["reward"] for sample in samples} <= {0.0, 0.5}
    # In metrics "reward" is the mean of what the function says; True is 1.
    assert row["reward"] == row["reward/train"] <= 0.5
    assert bread.main(flags(tmp_path / "bool", more.replace(":graded", ":right"))) == 0
    row, = read_lines(tmp_path / "bool" / "metrics.jsonl")
    assert row["rewards/none"] == 0 and row["reward"] > 0 and row["grad_norm"] > 0


@pytest.mark.parametrize("action, words", [
    ("raise KeyError('x')", "KeyError"), ("raise SystemExit(0)", "SystemExit"),
    ("return 'good'", "it returned 'good'"), ("return math.nan", "nan")])
def test_a_reward_that_fails_ends_the_run_and_leaves_its_completion(flags, tmp_path, capsys, action, words):
    """One line, exit code 1; the completion is in a file; what was trained before is saved."""
    (tmp_path / "own.py").write_text("import math\n" + REWARD.format(action=action))
    more = f"--reward {tmp_path / 'own.py'}:graded --method grpo --steps 9 --eval-data '' --group-size 6"
    assert bread.main(flags(tmp_path / "run", more)) == 1
    line = one_line(capsys, "bread.py: --reward")
    path = tmp_path / "run" / "reward_failed.json"
    assert words in line and str(path) in line
    assert json.loads(path.read_text()).keys() == {"id", "answer", "completion"}
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


@pytest.mark.parametrize("action, words", [
    ("return []", "groups, lists of Rollout"), ("return (x for x in [])", "groups, lists of Rollout"),
    ("state.memory['a'] = {1}", "state.memory holds {1}"),
    ("raise RuntimeError('DefaultCPUAllocator: not enough memory')", "out of memory: give"),
    ("raise FloatingPointError('NaN (base, step 3)')", "NaN (base, step 3); nothing more was saved")])
def test_a_method_that_fails_costs_no_finished_step(flags, tmp_path, capsys, action, words):
    """What it returns is looked at before anything learns from it. Where numbers broke, nothing is saved."""
    more = hook(tmp_path, action, 3, "bread.sft") + " --eval-data '' --steps 9 --problems-per-step 2"
    assert bread.main(flags(tmp_path / "run", more)) == 1
    line = one_line(capsys)
    assert words in line and (tmp_path / "run" / "checkpoint-2").is_dir() == ("saved after step 2" in line)
    assert ("it holds no checkpoint, --overwrite begins anew" in line) == ("NaN" in words)


def test_the_library_for_rewards(flags, tmp_path):
    """math_verify, where it is installed, on what ours reads alike."""
    pytest.importorskip("math_verify")
    for completion, answer, expected in (("So \\boxed{\\frac{1}{2}}.", "0.5", 1.0), ("\\boxed{3}", "4", 0.0),
                                         ("<think>\\boxed{4}", "4", 0.0)):
        assert bread.REWARDS["math_verify"](completion, answer, None) == expected
    more = f"--reward math_verify --steps 1 --eval-data '' --group-size {G}"
    assert bread.main(flags(tmp_path / "run", more)) == 0


def test_a_methods_file_gets_the_running_module_also_from_the_program(flags, tmp_path):
    """`import bread` in it is no second copy with other classes, although the program's name is __main__. Bad
    input of the program: exit code 2 and one line, from any folder."""
    is_running = "assert bread is __import__('sys').modules['__main__'] and type(policy) is bread.Policy"
    more = hook(tmp_path, is_running, 0, "bread.sft") + " --eval-data '' --steps 1"
    for argv, code in ((flags("run", more), 0), (["--model", "nowhere", "--data", "x"], 2)):
        done = subprocess.run([sys.executable, ROOT / "bread.py", *argv], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1 and "nowhere" in done.stderr
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()


# ---------------------------------------------------------------- what it prints and counts


def rollout(reward=0.0, advantage=0.0, cut=0, tokens=3, finish_reason="stop", entropy=0.5):
    problem = SimpleNamespace(id="p", question="q", answer="7", expert_ids=list(range(10)))
    return SimpleNamespace(problem=problem, reward=reward, advantage=advantage, cut=cut, entropy=entropy,
                           finish_reason=finish_reason, completion_ids=list(range(20, 20 + tokens)))


def test_counts_of_groups_become_metrics():
    """A plain group, one behind 4 of 10 tokens, a flat one, one that ends in an expert's trace, which is no
    anchor and has no entropy; a trace alone counts nowhere. Sums of ranks add; a mean of nothing is null."""
    groups = [[rollout(1.0, 1.0), rollout(0.0, -1.0, tokens=5, finish_reason="length")],
              [rollout(1.0, 1.0, cut=4), rollout(0.0, -1.0, cut=4)], [rollout(), rollout()],
              [rollout(0.0, -1.0),
               rollout(1.0, 1.0, cut=10, tokens=11, finish_reason="expert", entropy=None)],
              [rollout(1.0, 1.0, cut=10, tokens=99, finish_reason="expert", entropy=None)]]
    row = report.step_metrics(report.count_groups(groups[:2]) + report.count_groups(groups[2:]))
    expected = {"reward/train": 3 / 8, "frac_reward_zero_std": 1 / 4, "anchor/accepted": 1,
                "anchor/fraction": 0.4, "completions/mean_length": (6 * 3 + 5 + 11) / 8,
                "completions/clipped_ratio": 1 / 8, "sampler/entropy": 0.5, "reward": None, "entropy": None}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert set(report.step_metrics(collections.Counter()).values()) == {None, 0}


@pytest.mark.parametrize("method, changes, expected", [
    ("bread", {}, "step   7/200  reward 0.25   3 of 32 needed an anchor   2 found one at 40% of the trace  "
                  "   12k tokens  ETA 1:05"),
    ("grpo", {}, "step   7/200  reward 0.25   75% of groups have a gradient     12k tokens  ETA 1:05"),
    ("sft", {"reward": None, "tokens/sampled": 0}, "step   7/200  loss 0.5000  ETA 1:05"),
    ("f.py:questa", {"reward": None}, "reward behind anchors 0.50"),
    ("grpo", {"rewards/none": 3, "completions/clipped_ratio": 0.51}, "  3 without a reward  51% cut off  "),
    ("bread", {"eval/accuracy": 0.25, "eval/greedy": 0.5}, "5  | held out: greedy 50.0%, sampled 25.0%")])
def test_a_step_is_one_line(method, changes, expected):
    """Reward without help, who needed an anchor and how long it was, cost, time left, accuracy."""
    row = {"step": 7, "reward": 0.25, "reward/train": 0.5, "loss": 0.5, "frac_reward_zero_std": 0.25,
           "anchor/searched": 3, "anchor/accepted": 2, "anchor/fraction": 0.4, "tokens/sampled": 12000,
           "rewards/none": 0, "completions/clipped_ratio": 0.5}
    line = report.step_line(Config(method=method), row | changes, 65.4)
    assert expected in line and "\n" not in line


def test_samples_and_the_closing_table(capsys):
    """A sample keeps anchor and completion apart. The table compares before with after, or, where a run was
    interrupted, with the last evaluation, and gives the whole command for GRPO at the same number of sampled
    tokens. Only rank 0 speaks."""
    config = Config(model="m", data="d", output="o", lr=3e-4, system="a b")
    log = report.Log(config, speaks=False)
    log.decode = lambda ids: " ".join(map(str, ids))
    row = log.sample(3, rollout(1.0, 1.5, cut=2))
    assert (row["anchor"], row["completion"], row["advantage"], row["step"]) == ("0 1", "20 21 22", 1.5, 3)
    assert log.sample(3, rollout(cut=10, finish_reason="expert"))["anchor"] == ""
    state = State(step=9, tokens={"base": 600, "probe": 200, "eval": 999}, evals=[
        {"eval/greedy": 0.1, "eval/accuracy": 0.05}, {"step": 9, "eval/greedy": 0.5, "eval/accuracy": 0.4}])
    for speaks, is_example, step in ((False, False, 9), (True, False, 9), (True, True, 11)):
        state.step = step
        report.Log(config, speaks).closing(None, state, is_example)
    plain, example = capsys.readouterr().out.split("held out, no anchors")[1:]
    assert re.search(r" before +after\n", plain) and re.search(r" before +step 9\n", example)
    assert re.search(r"greedy +10.0% +50.0%\n +sampled +5.0% +40.0%\ntokens sampled +800 +\(25%", plain)
    assert ("python bread.py --model m --data d --lr 0.0003 --system 'a b' --method grpo --steps 100000 "
            "--token-budget 800 --output o-grpo") in plain
    assert "python bread.py --method grpo" in example


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("*.py")) + ["kernels"] + sorted(
    f"kernels.{path.stem}" for path in (ROOT / "kernels").glob("[a-z]*.py")))
def test_the_examples_in_docstrings_are_true(name):
    """Every >>> of every module."""
    if name.startswith("kernels"):
        pytest.importorskip("triton")
    assert doctest.testmod(importlib.import_module(name)).failed == 0
