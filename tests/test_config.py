"""Claims about the command line: help, near misses, paths, a run's own flags, a user's functions.

What each number is limited to, and argument files, are in test_run.py.
"""
import dataclasses
import json
import re

import pytest

from checkpoint import RunFolder
from config import Config, check_paths, load_function, make_parser, parse_args
from conftest import CHAIN

FLAGS = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(Config)]
FIRST = "model data eval_data output method steps problems_per_step group_size max_new_tokens lr".split()
HASHES = {"data_sha256": "a", "eval_sha256": "", "model_sha256": "b", "history": [{"step": 0}]}


def message(*argv):
    """The one line of a refused command line."""
    with pytest.raises(ValueError) as error:
        parse_args([*argv], CHAIN)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_help_has_every_flag_once_under_a_heading_and_the_ten_that_all_set_first(monkeypatch):
    """On 80 columns; a default is shown once, and none where it is nothing or no."""
    monkeypatch.setenv("COLUMNS", "80")
    text = make_parser().format_help()
    _, *groups = re.split(r"\n\n(?=\S.*:\n  -)", text)
    found = [re.findall(r"^  (?:-h, )?(--[a-z-]+)", group, re.M) for group in groups]
    assert found[0] == ["--" + name.replace("_", "-") for name in FIRST]
    assert sum(found, []) == [*FLAGS, "--help"] and min(map(len, found)) > 1 and len(found) == 8
    assert max(map(len, text.splitlines())) <= 80
    assert "default" not in "".join(groups) and "False" not in text and "[]" not in text
    assert "training steps [200]" in text and "[-1" not in text


@pytest.mark.parametrize("given, meant", [
    ("--max_new_tokens", "--max-new-tokens"), ("--learning-rate", "--lr"), ("--learning_rate=3", "--lr"),
    ("--num-generations", "--group-size"), ("--beta", "--kl"), ("--epsilon-high", "--clip-high"),
    ("--per_device_train_batch_size", "--problems-per-step"), ("--model_name_or_path", "--model"),
    ("--eval-s", "--eval-samples"), ("--grop-size", "--group-size"), ("-lr", "--lr"), ("resume", "--resume"),
    ("--anchor", "--anchor-low or --anchor-high or --anchor-placement"), ("--anchor_low", "--anchor-low")])
def test_a_near_miss_is_answered_with_the_flag_that_is_meant(given, meant):
    """Underscores, slips, beginnings, names of other trainers."""
    word = given.partition("=")[0]
    assert message(given, "5") == f"{word} is no flag; {meant} is meant? --help lists every flag"


@pytest.mark.parametrize("given", ["--num-train-epochs", "--frobnicate", "--vllm", "true", "-"])
def test_what_has_no_equal_gets_no_guess(given):
    """An epoch is no step."""
    assert message("--overwrite", given) == f"{given} is no flag; --help lists every flag"


def test_a_path_that_is_none_says_what_to_type(tmp_path, monkeypatch):
    """A hub id: the command that downloads it, and the flag for what it leaves; any other path: what it is
    not. A folder that exists makes `runs/new` a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    good = {"model": f"{CHAIN / 'model'}", "data": f"{CHAIN / 'train.jsonl'}"}
    check_paths(Config(**good))
    get = "; to take it from the Hugging Face hub, type `hf download"
    for name, path, expected in (
            ("model", "Qwen/Qwen3-0.6B",
             f"is no folder{get} Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B` and then --model Qwen3-0.6B"),
            ("data", "GAIR/LIMO", f"is no file{get} --repo-type dataset GAIR/LIMO --local-dir LIMO` and then "
             "--data LIMO/FILE"),
            ("eval_data", "nowhere.jsonl", "is no file"), ("data", f"{CHAIN}", "is no file"),
            ("model", f"{CHAIN}", "is no model folder: it holds no config.json"),
            ("model", "runs/new", "is no folder"), ("model", good["data"], "is no folder")):
        with pytest.raises(ValueError) as error:
            check_paths(Config(**good | {name: path}))
        assert str(error.value) == f"--{name.replace('_', '-')} {path} {expected}"
    with pytest.raises(ValueError, match="lies in --output, which --overwrite empties"):
        check_paths(Config(**good, output=f"{CHAIN}", overwrite=True))
    for path, words in ((good["data"], "which exists"), (f"{CHAIN}/new/a", "folder does not exist")):
        with pytest.raises(ValueError, match=f"--write-hard is {path}, .*{words}"):
            check_paths(Config(**good, write_hard=path, eval=True))


def test_a_resumed_run_has_its_own_flags_and_given_ones_win(tmp_path):
    """--output alone restores every field, whatever its text; @FILE and flags win; --overwrite does not come
    back; no file changes."""
    was = Config(model="-m odd=1", data="d", eval_data="h", output="elsewhere", overwrite=True, no_std=True,
                 lr=3e-7, steps=7, seed=-1, template_args='{"a": "x y"}', system="@ \u00e9\n'q'")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(dataclasses.asdict(was) | HASHES))
    before = path.read_bytes()
    now = dataclasses.replace(was, output=f"{tmp_path}", resume=True, overwrite=False)
    command = ["--resume", "--output", f"{tmp_path}"]
    assert parse_args(command, CHAIN) == now
    (tmp_path / "more.args").write_text("--steps 9\n--eval-data ''")
    assert parse_args([*command, f"@{tmp_path}/more.args", "--model", "m", "--data", "d"], CHAIN) == (
        dataclasses.replace(now, steps=9, eval_data="", model="m"))
    assert parse_args([*command, "--plan"], CHAIN) == dataclasses.replace(now, plan=0.0)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_a_file_of_flags_that_includes_itself_is_one_line(tmp_path):
    """And no traceback of a thousand lines."""
    (tmp_path / "a.args").write_text(f"@{tmp_path / 'a.args'}")
    assert message(f"@{tmp_path / 'a.args'}") == "an @FILE of flags includes itself"
    for content, words in ((b"--system '", "has the line"), (b"\xff", "is no UTF-8")):
        (tmp_path / "a.args").write_bytes(content)
        assert message(f"@{tmp_path / 'a.args'}").startswith(f"an @FILE of flags {words}")
    assert message("--steps=--") == "--steps has no value; --help lists every flag"


@pytest.mark.parametrize("content", [
    None, "{", "[1]", "{}", '{"lr": "high"}', '{"epochs": 3}', '{"steps": true}'])
def test_a_damaged_run_json_is_one_line_that_names_it(tmp_path, content):
    """Missing, cut off, no object, a value or an option that this version does not have."""
    if content:
        (tmp_path / "run.json").write_text(content)
    line = message("--resume", "--output", f"{tmp_path}", "--model", "m", "--data", "d")
    assert line.startswith(f"--resume: {tmp_path / 'run.json'} is missing, damaged")
    assert line.endswith(f"--model {tmp_path}/checkpoint-N")


@pytest.mark.parametrize("given, expected", [
    (["--template-args", "[1]"], r"--template-args is '\[1\]', it must be a JSON object, as in '{"),
    (["--template-args", "{'a': 1}"], "--template-args is"),
    (["--template-args", "[" * 9**5], "--template-args is"), (["--keep", "0"], "--keep is 0, .* at least 1"),
    (["--write-hard", "hard.jsonl"], "--write-hard .* give --eval")])
def test_new_flags_have_limits(given, expected):
    """One line each, also with --method sft, which knows no groups."""
    for method in ("bread", "sft"):
        assert re.match(expected, message(*given, "--method", method))


def test_an_evaluation_has_a_folder_and_fields_may_be_dotted():
    """runs/eval-TIME without --output; all new flags reach Config as they were given."""
    texts = {"question_field": "q", "trace_field": "a.b", "answer_field": "reward_model.ground_truth",
             "template_args": '{"a": false}', "reward": "math_verify", "write_hard": "hard.jsonl"}
    argv = ["--eval", "--strict", "--mask-truncated", "--tensorboard", "--keep", "5"]
    for name, text in texts.items():
        argv += ["--" + name.replace("_", "-"), text]
    config = parse_args(argv, CHAIN)
    assert re.fullmatch(r"runs/eval-\d{8}-\d{6}", config.output)
    assert {name: getattr(config, name) for name in texts} == texts and config.keep == 5
    assert config.strict and config.mask_truncated and config.tensorboard


def test_overwrite_takes_an_evaluation_with_the_run_that_it_measured(tmp_path):
    """Its checkpoints are gone; files of others stay."""
    for name in ("run.json", "eval.json", "eval.jsonl", "hard.jsonl"):
        (tmp_path / name).touch()
    RunFolder(tmp_path, overwrite=True).close()
    assert {path.name for path in tmp_path.iterdir()} == {"hard.jsonl", ".lock"}


def test_a_users_file_runs_once_for_all_its_functions(tmp_path, monkeypatch):
    """By whatever path it is named; handed to no other call, modules are fresh."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("seen = []\ndef method(): return seen\ndef reward(): return seen\n")
    modules = {}
    method = load_function("--method", "mine.py:method", {}, modules)
    reward = load_function("--reward", f"{tmp_path}/mine.py:reward", {}, modules)
    assert method() is reward() and load_function("--method", "mine.py:method", {})() is not method()
    assert load_function("--reward", "math", {"math": len}, modules) is len
    with pytest.raises(ValueError, match="^--reward is 'x', it must be math, math_verify or FILE.py:N"):
        load_function("--reward", "x", {"math": len, "math_verify": len}, modules)
