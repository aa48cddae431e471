"""Claims about both examples: files come from their script, experts are right, the bases are as told."""
import functools
import random
import re
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, read_lines
from cuts import find_cuts
from data import read_data
from model import Transformer
from rewards import answers_match, math_reward
from sampler import SamplingParams, generate
from traces import Tokenizer, make_problem

EXAMPLES = ROOT / "examples"
LINES = {"chain": "a +5 b x3 = 93\nl x10 = 7\n#### 7", "walk": "a b 12> 31 X> B\nl 26> 17 Q> K #### 17 K"}
MOST_TOKENS = {"chain": 72, "walk": 84}  # of an answer that takes twelve single steps, and some more
make = SimpleNamespace(**runpy.run_path(f"{EXAMPLES}/make.py"))
TASKS = {"chain": make.Chain, "walk": make.Walk}
both_tasks = pytest.mark.parametrize("name", list(LINES))


@functools.cache
def base(name):
    return [kind.from_pretrained(EXAMPLES / name / "model") for kind in (Transformer, Tokenizer)]


def problems_of(name, file):
    cut = functools.partial(find_cuts, matches=answers_match)
    return read_data(EXAMPLES / name / file, lambda row: make_problem(row, base(name)[1], cut))


def answer(question):
    """Where the last move leads, read from the question alone."""
    if question.startswith("start"):
        _, value, *words = question.split()
        for move in words[1::2]:
            amount = int(move[1:])
            value = (int(value) + amount if move[0] == "+" else int(value) * amount) % 97
        return str(value)
    edges, walk = question.removeprefix("edges ").split(" from ")
    successor, (number, letter, *labels) = dict(re.findall(r"(\w+)> (\w+)", edges)), walk.split()
    for _ in labels:
        number, letter = successor[number], successor[letter]
    return f"{number} {letter}"


@both_tasks
def test_data_and_tokenizer_come_from_the_script(name, tmp_path):
    """Seed 0 writes the committed files, to the byte, of 712 different questions; every word is one token."""
    rng = random.Random(0)
    questions = set()
    for file, count in (("train.jsonl", 512), ("heldout.jsonl", 200)):
        make.write_problems(tmp_path / file, TASKS[name], rng, count, 12)
        assert (tmp_path / file).read_bytes() == (EXAMPLES / name / file).read_bytes()
        questions |= {row["question"] for row in read_lines(tmp_path / file)}
    assert len(questions) == 712
    ids = base(name)[1].encode(LINES[name])
    assert len(ids) == len(re.findall(r"[^\s]+|\n| (?=####)", LINES[name]))
    assert ids == make.make_tokenizer(TASKS[name].words()).encode(LINES[name]).ids
    assert base(name)[1].decode(ids) == LINES[name]


@both_tasks
def test_every_expert_is_right_and_no_anchor_comes_near_the_answer(name):
    """Six lines of two moves, and the answer that twelve single ones give; anchors end after lines 1 to 5."""
    for row in read_lines(EXAMPLES / name / "train.jsonl") + read_lines(EXAMPLES / name / "heldout.jsonl"):
        value = answer(row["question"])
        assert math_reward(row["trace"], value) == 1.0 and row["answer"] == value
        steps, last = re.split(r"\s####\s", row["trace"])
        assert [line.split()[0] for line in steps.splitlines()] == list("acegik") and last == value
        assert all(len(line.split()) == 6 for line in steps.splitlines())
    problems = problems_of(name, "train.jsonl")
    for problem in problems:
        for number, cut in enumerate(problem.cuts, 1):
            assert base(name)[1].decode(problem.expert_ids[:cut]).count("\n") == number <= 5
    assert sum(len(problem.cuts) == 5 for problem in problems) > 0.9 * len(problems)


@both_tasks
@pytest.mark.parametrize("jumped", [0, 6, 10])
def test_single_steps_are_right_at_least_95_percent_of_the_time(name, jumped):
    """The skill that anchors build on, on 256 fresh problems, after a right history with so many jumps."""
    task, tokenizer = TASKS[name], make.make_tokenizer(TASKS[name].words())
    assert make.single_step_skill(base(name)[0], tokenizer, task, random.Random(1), 12, jumped) >= 0.95


def successes(name, problems, num_cuts, temperature, samples):
    """How many samples are right behind the anchor of `num_cuts` episodes, 0 being the bare question."""
    model, tokenizer = base(name)
    prompts = [problem.prompt_ids + problem.expert_ids[:[0, *problem.cuts][num_cuts]] for problem in problems]
    params = SamplingParams(MOST_TOKENS[name], temperature, tokenizer.stop_token_ids)
    groups = generate(model, prompts, params, samples)
    return sum(math_reward(tokenizer.decode(completion.token_ids), problem.answer)
               for problem, group in zip(problems, groups) for completion in group)


@both_tasks
def test_the_base_fails_alone_and_succeeds_behind_the_last_cut(name):
    """Of 200 greedy and 400 sampled answers, where luck is 1 in 97 at most; the folder has at most 2 MB."""
    held_out = problems_of(name, "heldout.jsonl")
    assert successes(name, held_out, 0, 0.0, 1) <= 5 and successes(name, held_out, 0, 1.0, 2) <= 10
    problems = problems_of(name, "train.jsonl")[:64]
    problems = [problem for problem in problems if len(problem.cuts) == 5]
    assert successes(name, problems, 5, 1.0, 8) > 0.05 * 8 * len(problems)  # two steps from the end
    assert sum(file.stat().st_size for file in (EXAMPLES / name / "model").iterdir()) <= 2_000_000


def test_extrapolation_follows_the_line_through_two_checkpoints(tmp_path):
    """One in one file, one in two; to 1e-6, as sums near 1 are rounded to float32 twice, by 6e-8."""
    before, after, output = EXAMPLES / "chain/model", tmp_path / "after", tmp_path / "output"
    old = load_file(before / "model.safetensors")
    shutil.copytree(before, after, ignore=shutil.ignore_patterns("*.safetensors"))
    for i, names in enumerate((sorted(old)[:5], sorted(old)[5:])):
        save_file({name: old[name] + 0.25 for name in names}, after / f"model-{i}.safetensors")
    subprocess.run([sys.executable, EXAMPLES / "extrapolate.py", before, after, "0.5", output], check=True)
    new = load_file(output / "model-0.safetensors") | load_file(output / "model-1.safetensors")
    assert new.keys() == old.keys()
    assert all(torch.allclose(new[name], old[name] + 0.375, rtol=0, atol=1e-6) for name in old)
    assert (output / "config.json").read_bytes() == (before / "config.json").read_bytes()
