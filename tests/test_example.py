"""Claims about examples/chain: its files come from its script, its experts are right, its base is as described."""
import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import torch

from model import Transformer
from rewards import math_reward
from sampler import SamplingParams, generate
from traces import Tokenizer, load_problems

CHAIN = Path(__file__).parents[1] / "examples" / "chain"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make", CHAIN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base():
    return Transformer.from_pretrained(CHAIN / "model"), Tokenizer.from_pretrained(CHAIN / "model")


def test_the_data_files_come_from_the_script(make, tmp_path):
    """Seed 0 writes byte for byte the committed train.jsonl and heldout.jsonl."""
    rng = random.Random(0)
    for name, count in (("train", 512), ("heldout", 200)):
        make.write_problems(tmp_path / f"{name}.jsonl", rng, count, 12)
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (CHAIN / f"{name}.jsonl").read_bytes()


def test_the_tokenizer_comes_from_the_script_and_makes_every_word_one_token(make):
    """So a single step is five tokens: label, operation, equals sign, value, newline."""
    committed, text = Tokenizer.from_pretrained(CHAIN / "model"), "a +5 = 93\nl x10 = 7\n#### 7"
    ids = committed.encode(text)
    assert len(ids) == 12 and ids == make.make_tokenizer().encode(text).ids
    assert committed.decode(ids) == text


def test_every_expert_trace_is_right_and_jumps_at_every_step():
    """Six lines of two operations each, then the answer, which is what doing the twelve one by one gives."""
    for name in ("train", "heldout"):
        for line in (CHAIN / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            words = row["question"].split()
            value = int(words[1])
            for operation in words[3::2]:
                amount = int(operation[1:])
                value = (value + amount if operation[0] == "+" else value * amount) % 97
            assert math_reward(row["trace"], str(value)) == 1.0 and row["answer"] == str(value)
            *steps, last = row["trace"].splitlines()
            assert len(steps) == 6 and all(len(re.findall("[+x]", step)) == 2 for step in steps)
            assert last == f"#### {value}"


def test_train_and_heldout_share_no_question():
    """512 + 200 different problems."""
    questions = [json.loads(line)["question"] for name in ("train", "heldout")
                 for line in (CHAIN / f"{name}.jsonl").read_text().splitlines()]
    assert len(set(questions)) == 712


def test_single_steps_are_right_at_least_95_percent_of_the_time(make, base):
    """The skill that the last cuts build on, measured on 256 fresh problems with every earlier step given right."""
    model, _ = base
    assert make.single_step_skill(model, make.make_tokenizer(), random.Random(1), length=12) >= 0.95


def test_the_base_model_solves_the_task_neither_greedily_nor_by_sampling(base):
    """At most 5 of 200 greedy and 10 of 400 sampled answers are right: a lucky guess is right 1 time in 97."""
    model, tokenizer = base
    problems = load_problems(CHAIN / "heldout.jsonl", tokenizer)
    prompts = [problem.prompt_ids for problem in problems]
    right = {}
    for temperature, samples in ((0.0, 1), (1.0, 2)):
        params = SamplingParams(72, temperature, tokenizer.stop_token_ids)
        right[temperature] = sum(math_reward(tokenizer.decode(completion.token_ids), problem.answer)
                                 for problem, group in zip(problems, generate(model, prompts, params, samples))
                                 for completion in group)
    assert right[0.0] <= 5 and right[1.0] <= 10


def test_the_last_cut_gives_honest_signal(base):
    """From the last cut two operations are left. The share of right answers there is far above the 1% of luck."""
    model, tokenizer = base
    problems = [problem for problem in load_problems(CHAIN / "train.jsonl", tokenizer)[:64] if len(problem.cuts) == 5]
    prompts = [problem.prompt_ids + problem.expert_ids[:problem.cuts[-1]] for problem in problems]
    groups = generate(model, prompts, SamplingParams(72, 1.0, tokenizer.stop_token_ids), num_samples=8)
    rewards = torch.tensor([[math_reward(tokenizer.decode(completion.token_ids), problem.answer)
                             for completion in group] for problem, group in zip(problems, groups)])
    assert rewards.mean() > 0.05


def test_the_folder_is_small():
    """The whole checkpoint, tokenizer included, is at most 2 MB."""
    assert sum(file.stat().st_size for file in (CHAIN / "model").iterdir()) <= 2_000_000
