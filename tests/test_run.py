"""Claims about a run of bread.py: its command line, what it leaves behind, how it ends and goes on, what it
prints.

Every run is real: the embedded example's model on the 12 problems of conftest.py. What has to go wrong
goes wrong in a method file, the hook that a user has: `hook` writes one whose function acts before a step.
"""
import collections
import dataclasses
import doctest
import errno
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import bread
import report
from bread import State
from config import Config, load_function, parse_args
from conftest import CHAIN, ROOT, read_lines
from model import Transformer

G = 4
NAMES = {field.name: field for field in dataclasses.fields(Config)}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def flags(data):
    """flags(output, ...): a command line for two small steps."""
    def make(output, *more):
        return ["--model", f"{CHAIN / 'model'}", "--data", f"{data / 'train.jsonl'}", "--output", f"{output}",
                "--eval-data", f"{data / 'heldout.jsonl'}", "--device", "cpu", "--steps", "2", "--eval-every",
                "2", "--problems-per-step", "3", "--group-size", f"{G}", "--max-new-tokens", "72", "--lr",
                "1e-3", *more]
    return make


def hook(folder, action="pass", step=-1, method="bread.bread"):
    """Write a method file that does `action` before `step`, notes the state it was handed and remembers
    every problem; the flags that use it. Its loss is the method's own, times `factor`."""
    (folder / "hook.py").write_text(f"""
import dataclasses, json, math, os, pathlib, signal
import bread
factor = 1.0
def method(policy, problems, state):
    global factor
    factor = 1.0
    if state.step + 1 == {step} or {step} == 0:
        {action}
    pathlib.Path(__file__).with_name("state.json").write_text(json.dumps(dataclasses.asdict(state)))
    for problem in problems:
        state.memory[problem.id] = [state.step, "seen"]
    return {method}(policy, problems, state)
def loss(config, batch, logprobs_N):
    return factor * getattr({method}, "loss", bread.batch_loss)(config, batch, logprobs_N)
method.loss = loss
""")
    return ["--method", f"{folder / 'hook.py'}:method"]


# ---------------------------------------------------------------- what a run leaves behind


def documented_metrics():
    """The names in the table of docs/PAPER.md, where `/probe` behind `tokens/base` is `tokens/probe`."""
    rows = (ROOT / "docs" / "PAPER.md").read_text().split("## Metrics")[1].split("##")[0].split("\n")
    cells = [re.findall("`([a-z_/]+)`", row.split("|")[1]) for row in rows if row.startswith("| `")]
    return {cell[0].split("/")[0] * name.startswith("/") + name for cell in cells for name in cell}


@pytest.mark.parametrize("method", ["bread", "grpo", "sft"])
def test_a_run_leaves_its_files_behind(flags, tmp_path, capsys, method):
    """run.json is the resolved configuration; one line of metrics a step, with what docs/PAPER.md explains
    and no more; the last checkpoint is a Hugging Face folder that loads. A pipe gets plain lines, one a
    step."""
    folder = tmp_path / "run"
    assert bread.main(flags(folder, "--method", method)) == 0
    written = json.loads((folder / "run.json").read_text())
    assert (written["method"], written["lr"], written["group_size"]) == (method, 1e-3, G)
    start, *rows = read_lines(folder / "metrics.jsonl")
    assert set(start) == {"step", "eval/accuracy", "eval/greedy", "tokens/sampled"}
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["grad_norm"] > 0
    assert method == "sft" or rows[0]["sampler/logprob_gap"] < 1e-5  # a few roundings of float32
    assert set(rows[1]) - {"step"} == documented_metrics() and set(rows[0]) == {
        name for name in rows[1] if not name.startswith("eval/")}
    last = rows[1]
    assert last["tokens/sampled"] == sum(last[f"tokens/{kind}"] for kind in ("base", "probe", "resample"))
    assert (last["tokens/probe"] > 0) == (method == "bread")
    assert (last["tokens/base"] > 0) == (method != "sft")
    num_parameters = sum(x.numel() for x in Transformer.from_pretrained(CHAIN / "model").parameters())
    forward = last["tokens/sampled"] + last["tokens/prefilled"]
    assert last["flops"] == num_parameters * (2 * forward + 6 * last["tokens/trained"])
    assert {sample["step"] for sample in read_lines(folder / "samples.jsonl")} == {1, 2}
    assert len(read_lines(folder / "probes.jsonl")) == rows[0]["anchor/probes"] + rows[1]["anchor/probes"]
    first, final = (Transformer.from_pretrained(path) for path in (CHAIN / "model", folder / "checkpoint-2"))
    assert any(not torch.equal(a, b) for a, b in zip(final.parameters(), first.parameters()))
    bread.Tokenizer.from_pretrained(folder / "checkpoint-2")
    out = capsys.readouterr()
    assert len(re.findall(r"^step [12]/2 .*ETA", out.out, re.M)) == 2 and out.err == ""
    assert not re.search(r"[\r\x1b]", out.out) and f"checkpoint  {folder / 'checkpoint-2'}" in out.out


def results(folder):
    """What must agree of two runs of four steps: weights and moments, and all lines of the logs but
    seconds."""
    manifest = json.loads((folder / "checkpoint-4" / "trainer.json").read_text())
    return {"weights": load_file(folder / "checkpoint-4" / "model.safetensors"),
            "optimizer": load_file(folder / "checkpoint-4" / "trainer.tensors"),
            "metrics": [{name: value for name, value in row.items() if not name.startswith("seconds/")}
                        for row in read_lines(folder / "metrics.jsonl")],
            "samples": read_lines(folder / "samples.jsonl"), "probes": read_lines(folder / "probes.jsonl"),
            "state": manifest["record"] | {"seconds": {}}}


OPTIONS = ["--updates-per-batch", "2", "--warmup-steps", "3", "--kl", "0.02", "--on-fail", "expert",
           "--weight-decay", "0.1", "--importance-cap", "2", "--temperature", "0.8", "--save-every", "2",
           "--lr", "1e-4"]


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """Results of the run that was not interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert bread.main(flags(folder / "run", "--steps", "4", *OPTIONS, *hook(folder))) == 0
    return results(folder / "run")


def test_how_many_rows_are_sampled_at_once_changes_nothing(flags, tmp_path, unbroken):
    """--sample-batch-size 3 (groups have 4 rows) gives the default's tokens, searches, counts and
    evaluations. Log-probs and with them weights differ by float32 rounding: after eight updates by less
    than 5e-6, 5% of --lr, since AdamW moves a weight of however small a gradient by about --lr."""
    more = ["--steps", "4", *OPTIONS, *hook(tmp_path), "--sample-batch-size", "3"]
    assert bread.main(flags(tmp_path / "run", *more)) == 0
    found = results(tmp_path / "run")
    for ours, theirs in zip(found["samples"], unbroken["samples"], strict=True):
        for name, value in theirs.items():
            assert ours[name] == (pytest.approx(value, abs=1e-5) if name == "entropy" and value else value)
    for ours, theirs in zip(found["metrics"], unbroken["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        counts = [name for name in theirs if name.split("/")[0] in ("tokens", "anchor", "eval")]
        assert all(ours[name] == theirs[name] for name in counts)
    assert (found["probes"], found["state"]) == (unbroken["probes"], unbroken["state"])
    assert all(row["sampler/logprob_gap"] < 1e-5 for row in found["metrics"][1:])
    for name, weight in unbroken["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=5e-6)


# ---------------------------------------------------------------- how it ends and goes on


@pytest.mark.parametrize("broken_by, step", [
    ("--steps", 2), ("SIGINT", 1), ("SIGTERM", 3), ("SIGINT", 4), ("crash", 4)])
def test_a_resumed_run_equals_an_unbroken_one(flags, tmp_path, unbroken, broken_by, step):
    """Four steps == some steps + --resume + the rest: weights, moments, metrics, samples, probes and
    state, bit for bit. A signal lets the step end, saves and exits with 130 or 143; after a crash in step
    4, step 3, logged but not saved, is run again and stands in the logs once."""
    folder = tmp_path / "run"
    command = flags(folder, *OPTIONS, "--steps", "4")
    if broken_by == "--steps":
        assert bread.main(command + hook(tmp_path) + ["--steps", f"{step}"]) == 0
    elif broken_by == "crash":
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(LookupError):
            bread.main(command + hook(tmp_path, "raise LookupError", step))
        assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [0, 1, 2, 3]
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.collect()  # the traceback held the run, and with it the folder's lock
    else:
        code = {"SIGINT": 130, "SIGTERM": 143}[broken_by]
        assert bread.main(command + hook(tmp_path, f"os.kill(os.getpid(), signal.{broken_by})", step)) == code
        assert (folder / f"checkpoint-{step}").is_dir()
    assert bread.main(command + hook(tmp_path) + ["--resume"]) == 0
    found = results(folder)
    for name in ("weights", "optimizer"):
        assert found[name].keys() == unbroken[name].keys()
        assert all(torch.equal(found[name][key], unbroken[name][key]) for key in found[name])
    for name in ("metrics", "samples", "probes", "state"):
        assert found[name] == unbroken[name], name


def test_a_checkpoint_holds_exactly_the_state_and_resuming_restores_every_field(flags, tmp_path):
    """trainer.json's record is asdict(state), State(**record) is the state, and what a resumed run hands
    to its method is that record, field by field; none of them is what a new run begins with, but for the
    skipped updates."""
    command = flags(tmp_path / "run", *hook(tmp_path), "--method", f"{tmp_path / 'hook.py'}:method")
    assert bread.main(command) == 0
    record = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer.json").read_text())["record"]
    assert record.keys() == {field.name for field in dataclasses.fields(State)}
    assert dataclasses.asdict(State(**record)) == record
    fresh = dataclasses.asdict(State())
    assert [name for name in record if record[name] == fresh[name]] == ["skipped_updates"]
    hook(tmp_path, "assert state.step == 2", 0)
    assert bread.main(command + ["--steps", "3", "--resume"]) == 0
    assert json.loads((tmp_path / "state.json").read_text()) == record


def test_a_token_budget_ends_the_run_with_the_whole_rate(flags, tmp_path, capsys):
    """A run is resumed with more steps and a budget: one line each says the new end and the old one. The
    step that uses the budget up is the last, and it saves; without a decay every step, the last included,
    has --lr. With one, the rate of a step is decided before its own tokens are sampled. A resumed run
    without an end of its own has nothing to do."""
    common = ["--method", "grpo", "--eval-data", ""]
    assert bread.main(flags(tmp_path / "one", *common, "--steps", "1")) == 0
    capsys.readouterr()
    for notes in (["--steps 9, not 1", "--token-budget 2000, not 0"], []):
        more = ["--steps", "9", "--token-budget", "2000", "--resume"]
        assert bread.main(flags(tmp_path / "one", *common, *more)) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--resume")]
        assert re.findall(r"--[a-z-]+ \d+, not \d+", " ".join(lines)) == notes and len(lines) == len(notes)
    rows = read_lines(tmp_path / "one" / "metrics.jsonl")
    assert [row["lr"] for row in rows] == [1e-3] * len(rows) and 2 < len(rows) < 9
    assert rows[-2]["tokens/sampled"] < 2000 <= rows[-1]["tokens/sampled"]
    assert (tmp_path / "one" / f"checkpoint-{len(rows)}").is_dir()
    more = ["--steps", "9", "--token-budget", "1000", "--lr-decay", "1"]
    assert bread.main(flags(tmp_path / "two", *common, *more)) == 0
    rows = read_lines(tmp_path / "two" / "metrics.jsonl")
    spent = [0, *(row["tokens/sampled"] for row in rows[:-1])]
    expected = [1e-3 * (1 - max(tokens / 1000, step / 9)) for step, tokens in enumerate(spent)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)


def test_too_many_skipped_updates_in_a_row_end_the_run(flags, tmp_path, capsys):
    """Of seven updates the 2nd, 3rd, 5th, 6th and 7th are not finite: with --max-skipped-updates 3 the
    sound one in between counts anew, and the seventh step is the last: exit code 1, one line on stderr,
    and a checkpoint that holds, bit for bit, what the fourth step left. From there a resumed run goes on."""
    common = flags(tmp_path / "run", "--eval-data", "", "--save-every", "4", "--steps", "9",
                   "--max-skipped-updates", "3")
    spoil = "factor = math.nan if state.step + 1 in (2, 3, 5, 6, 7) else 1.0"
    assert bread.main(common + hook(tmp_path, spoil, 0, "bread.sft")) == 1
    err = capsys.readouterr().err
    assert err.startswith("bread.py: 3 updates in a row") and err.count("\n") == 1 and "saved" in err
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 2, 2, 3, 4, 5]
    assert [row["grad_norm"] is None for row in rows] == [False, True, True, False, True, True, True]
    for name in ("model.safetensors", "trainer.tensors"):
        sound, saved = (load_file(tmp_path / "run" / f"checkpoint-{step}" / name) for step in (4, 7))
        assert sound.keys() == saved.keys() and all(torch.equal(sound[key], saved[key]) for key in sound)
    assert bread.main(common + hook(tmp_path, method="bread.sft") + ["--resume"]) == 0
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10)) and rows[-1]["skipped_updates"] == 5


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_and_output_refuse_another_run_and_touch_nothing(flags, data, tmp_path, capsys):
    """Another seed, rate or group size, data with another content, or a folder that holds a run: one line,
    exit code 2, every file as it was, and the right command works at once: locks and signal handlers are
    let go. Old checkpoints are pruned, the one that was resumed among them; its tokenizer is not lost.
    --overwrite replaces the run."""
    before = signal.getsignal(signal.SIGINT)
    copy = tmp_path / "data.jsonl"
    copy.write_bytes((data / "train.jsonl").read_bytes())
    base = flags(tmp_path / "run", "--method", "sft", "--data", f"{copy}", "--eval-data", "", "--save-every",
                 "1")
    assert bread.main([*base, "--steps", "1"]) == 0
    files = files_of(tmp_path / "run")
    for more in (["--seed", "1"], ["--lr", "2e-3"], ["--group-size", "5"], ["--steps", "4"], None):
        if more == ["--steps", "4"]:
            copy.write_text(copy.read_text().replace("start", "begin", 1))
        capsys.readouterr()
        assert bread.main([*base, *([*more, "--resume"] if more else [])]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and ("--resume: " if more else "--overwrite") in err
        assert files_of(tmp_path / "run") == files
    copy.write_bytes((data / "train.jsonl").read_bytes())
    assert bread.main([*base, "--resume", "--steps", "5"]) == 0 and signal.getsignal(signal.SIGINT) is before
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-5"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert all((tmp_path / "run" / f"checkpoint-{step}" / name).is_file() for step in (4, 5))
    assert bread.main([*base, "--steps", "1", "--overwrite"]) == 0
    assert [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_a_full_disk_ends_the_run_with_one_line(flags, tmp_path, monkeypatch, capsys):
    """Exit code 1, which says that the input was not the reason; what was saved before is whole."""
    assert bread.main(flags(tmp_path / "run", "--method", "sft", "--eval-data", "", "--steps", "1")) == 0

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert bread.main(flags(tmp_path / "run", "--method", "sft", "--eval-data", "", "--resume")) == 1
    err = capsys.readouterr().err
    assert err.startswith("bread.py: ") and err.count("\n") == 1 and "No space" in err
    Transformer.from_pretrained(tmp_path / "run" / "checkpoint-1")


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("more, expected", [
    (["--frobnicate", "3"], "--frobnicate"),
    (["--step", "3"], "--step"),                               # an abbreviation of --steps
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--data", "no-such-file.jsonl"], "no-such-file.jsonl"),
    (["--eval-data", "no-such-file.jsonl"], "no-such-file.jsonl"),
    (["--data", ""], "--data"),
    (["--model", ""], "--model"),
    (["--group-size", "1"], "--group-size"),
    (["--group-size", "eight"], "--group-size"),
    (["--problems-per-step", "13"], "12 usable problems"),
    (["--max-new-tokens", "500"], "lower --max-new-tokens to"),
    (["--method", "ppo"], "--method"),
    (["--method", "no-such-file.py:name"], "no-such-file.py:name"),
    (["--method", f"{ROOT / 'report.py'}:bread"], "no function 'bread'"),
    (["--anchor-low", "5"], "--anchor-low"),                   # of G = 4
    (["--anchor-low", "3", "--anchor-high", "2"], "--anchor-low"),
    (["--anchor-high", "5"], "--anchor-high"),
    (["--method", "sft", "--kl", "0.1"], "--kl"),
    (["--device", "toaster"], "toaster"),
    (["--eval", "--eval-data", ""], "--eval-data"),
    (["--resume"], "without --resume"),                        # nothing there yet
    (["--resume", "--output", ""], "--output"),
    (["@no-such-file.args"], "no-such-file.args"),
])
def test_bad_input_ends_with_one_line_and_exit_code_2(flags, tmp_path, capsys, more, expected):
    """The line names the flag or the file; no traceback, no page of usage, and no folder with a run in it."""
    assert bread.main(flags(tmp_path / "run", *more)) == 2
    err = capsys.readouterr().err
    assert expected in err and err.startswith("bread.py: ") and err.count("\n") == 1
    assert not (tmp_path / "run" / "run.json").exists() and not list(tmp_path.glob("run/checkpoint-*"))


@pytest.mark.parametrize("name", [name for name, field in NAMES.items() if field.metadata["low"] is not None])
def test_every_number_has_limits(name):
    """The limits themselves are taken, what is beyond them is not, nor NaN and infinity; the line names
    the flag and says what is allowed."""
    limits = NAMES[name].metadata
    flag = "--" + name.replace("_", "-")
    others = {"group_size": 8, "anchor_low": 1} if name != "group_size" else {"method": "sft"}
    allowed = [limits["low"]] + [limits["high"]] * (limits["high"] < float("inf"))
    for value in allowed:
        Config(**{**others, name: value})
    beyond = [0.0 if limits["low"] == 1e-30 else limits["low"] - 1, float("nan"), float("inf"), -float("inf")]
    for value in beyond + [limits["high"] + 0.01]:
        with pytest.raises(ValueError, match=f"^{flag} is .*, it must be a number (at least|above)"):
            Config(**{**others, name: value})


def test_every_field_is_a_flag_with_a_reason_and_may_come_from_a_file(tmp_path, capsys):
    """--help names them all; words are checked against their choices; without --model the embedded example
    and its recipe are used. @FILE: one flag a line, comments and quotes as in a shell; later flags win."""
    with pytest.raises(SystemExit, match="0"):
        bread.main(["--help"])
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in NAMES)
    assert all(field.metadata["help"] for field in NAMES.values())
    path = tmp_path / "recipe.args"
    path.write_text("# recipe\n--model 'my model' --data d.jsonl\n\n--lr 3e-4  # high\n--no-std\n--steps 7\n")
    config = parse_args([f"@{path}", "--steps", "9"], bread.EXAMPLE)
    assert (config.model, config.data, config.lr) == ("my model", "d.jsonl", 3e-4)
    assert config.no_std and config.steps == 9
    assert parse_args(["--steps", "5", f"@{path}"], bread.EXAMPLE).steps == 7
    for name in ("on_fail", "loss_mean", "anchor_placement"):
        with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} is 'x', it must be one of "):
            Config(**{name: "x"})
    config = parse_args(["--steps", "3"], bread.EXAMPLE)
    assert config.model == f"{CHAIN / 'model'}" and config.steps == 3 and config.lr != Config().lr
    assert re.fullmatch(r"runs/bread-\d{8}-\d{6}", config.output)


def test_eval_measures_a_model_and_writes_nothing(data, tmp_path, capsys):
    """--eval prints one line with greedy and sampled accuracy, --eval-samples answers a problem."""
    command = ["--model", f"{CHAIN / 'model'}", "--eval", "--eval-data", f"{data / 'heldout.jsonl'}",
               "--eval-samples", "8", "--max-new-tokens", "72", "--device", "cpu", "--output",
               f"{tmp_path / 'run'}"]
    assert bread.main(command) == 0
    greedy, sampled = re.search(r"3 problems, no anchors: greedy ([\d.]+)%, sampled ([\d.]+)%",
                                capsys.readouterr().out).groups()
    assert float(greedy) * 3 / 100 == pytest.approx(round(float(greedy) * 3 / 100), abs=0.01)
    assert 0 < float(sampled) < 100 and not (tmp_path / "run").exists()


def test_a_method_file_that_fails_is_the_users_error(tmp_path):
    """One line that names flag, file and what it raised; a colon may stand in the file's path."""
    for text, expected in (("1 / 0", "ZeroDivisionError"), ("import nothing_here", "nothing_here"),
                           ("(", "Syntax"), ("name = 3", "no function 'name'")):
        (tmp_path / "a:b.py").write_text(text)
        with pytest.raises(ValueError, match=f"^--method .*a:b.py.*{expected}") as caught:
            load_function("--method", f"{tmp_path / 'a:b.py'}:name", {})
        assert "\n" not in str(caught.value)
    (tmp_path / "a:b.py").write_text("def name(): return 3")
    assert load_function("--method", f"{tmp_path / 'a:b.py'}:name", {})() == 3


def test_a_methods_file_gets_the_running_module_also_from_the_program(flags, tmp_path):
    """`import bread` in it is the module that runs, not a second copy with other classes, although the
    program's name is __main__. Bad input of the program: exit code 2 and one line, no traceback, from any
    folder."""
    is_running = "assert bread is __import__('sys').modules['__main__'] and type(policy) is bread.Policy"
    command = flags("run", *hook(tmp_path, is_running, 0, "bread.sft"), "--eval-data", "", "--steps", "1")
    for argv, code in ((command, 0), (["--model", "nowhere", "--data", "x"], 2)):
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
    """A plain group, one behind 4 of 10 tokens, a flat one, and an expert's trace, which is no anchor and
    has no entropy: sums of two ranks add, and each metric is a mean over what it speaks of; of nothing it
    is null."""
    groups = [[rollout(1.0, 1.0), rollout(0.0, -1.0, tokens=5, finish_reason="length")],
              [rollout(1.0, 1.0, cut=4), rollout(0.0, -1.0, cut=4)], [rollout(), rollout()],
              [rollout(1.0, 1.0, cut=10, tokens=11, finish_reason="expert", entropy=None),
               rollout(0.0, -1.0)]]
    sums = report.count_groups(groups[:2]) + report.count_groups(groups[2:])
    row = report.step_metrics(sums)
    expected = {"reward/train": 3 / 8, "frac_reward_zero_std": 1 / 4, "anchor/accepted": 1,
                "anchor/fraction": 0.4, "completions/mean_length": (6 * 3 + 5 + 11) / 8,
                "completions/clipped_ratio": 1 / 8,
                "sampler/entropy": 0.5, "reward": None, "entropy": None}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert set(report.step_metrics(collections.Counter()).values()) == {None, 0}
    assert report.mean([1, None, 2]) == 1.5 and report.mean([None]) is None and report.ratio(1, 0) is None
    seconds = {"update": 1.0}
    with pytest.raises(KeyError), report.clock(seconds, "update"):
        raise KeyError
    assert 1.0 < seconds["update"] < 2.0


@pytest.mark.parametrize("method, changes, expected", [
    ("bread", {}, "step   7/200  reward 0.25   3 of 32 needed an anchor   2 found one at 40% of the trace  "
                  "   12k tokens  ETA 1:05"),
    ("bread", {"anchor/accepted": 0}, "   3 of 32 needed an anchor  " + " " * 34 + "   12k"),
    ("grpo", {}, "step   7/200  reward 0.25   75% of groups have a gradient     12k tokens  ETA 1:05"),
    ("sft", {"reward": None, "tokens/sampled": 0}, "step   7/200  loss 0.5000  ETA 1:05"),
    ("f.py:questa", {"reward": None}, "reward behind anchors 0.50"),
    ("f.py:nothing", {"reward": None, "reward/train": None, "frac_reward_zero_std": None}, "ETA 1:05"),
    ("bread", {"eval/accuracy": 0.25, "eval/greedy": 0.5}, "5  | held out: greedy 50.0%, sampled 25.0%")])
def test_a_step_is_one_line(method, changes, expected):
    """Reward without help, how many problems needed an anchor and how long it was, cost, time left,
    accuracy."""
    row = {"step": 7, "reward": 0.25, "reward/train": 0.5, "loss": 0.5, "frac_reward_zero_std": 0.25,
           "anchor/searched": 3, "anchor/accepted": 2, "anchor/fraction": 0.4, "tokens/sampled": 12000}
    line = report.step_line(Config(method=method), row | changes, 65.4)
    assert expected in line and "\n" not in line


def test_samples_and_the_closing_table(capsys):
    """A sample keeps anchor and completion apart; an expert's trace is all completion. The table compares
    before with after and gives the command for GRPO at the same number of sampled tokens. Only rank 0
    speaks."""
    config = Config(model="m", data="d")
    log = report.Log(config, speaks=False)
    log.decode = lambda ids: " ".join(map(str, ids))
    row = log.sample(3, rollout(1.0, 1.5, cut=2))
    assert (row["anchor"], row["completion"], row["advantage"], row["step"]) == ("0 1", "20 21 22", 1.5, 3)
    assert log.sample(3, rollout(cut=10, finish_reason="expert"))["anchor"] == ""
    state = State(step=9, tokens={"base": 600, "probe": 200, "eval": 999}, evals=[
        {"eval/greedy": 0.1, "eval/accuracy": 0.05}, {"eval/greedy": 0.5, "eval/accuracy": 0.4}])
    for speaks, is_example in ((False, False), (True, False), (True, True)):
        report.Log(config, speaks).closing(None, state, is_example)
    plain, example = capsys.readouterr().out.split("held out, no anchors")[1:]
    assert re.search(r"greedy +10.0% +50.0%\n +sampled +5.0% +40.0%\ntokens sampled +800 +\(25%", plain)
    assert "--model m --data d [the same flags] --method grpo --steps 100000 --token-budget 800" in plain
    assert "python bread.py --method grpo" in example


# ---------------------------------------------------------------- worked examples


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("*.py")) + ["kernels"] + sorted(
    f"kernels.{path.stem}" for path in (ROOT / "kernels").glob("[a-z]*.py")))
def test_the_examples_in_docstrings_are_true(name):
    """Every >>> of every module."""
    if name.startswith("kernels"):
        pytest.importorskip("triton")
    assert doctest.testmod(importlib.import_module(name)).failed == 0
