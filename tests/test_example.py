"""Claims about both examples: their files come from their script, their experts are right, their bases are as told."""
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

EXAMPLES = Path(__file__).parents[1] / "examples"
LINES = {"chain": "a +5 b x3 = 93\nl x10 = 7\n#### 7", "walk": "a b 12> 31 X> B\nl 26> 17 Q> K #### 17 K"}
MOST_TOKENS = {"chain": 72, "walk": 84}  # of an answer that takes twelve single steps, and some more
both_tasks = pytest.mark.parametrize("name", list(LINES))


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make", EXAMPLES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tasks(make):
    return {"chain": make.Chain, "walk": make.Walk}


@pytest.fixture(scope="module")
def bases():
    """Model and tokenizer of each task."""
    return {name: (Transformer.from_pretrained(EXAMPLES / name / "model"),
                   Tokenizer.from_pretrained(EXAMPLES / name / "model")) for name in LINES}


def rows(name, file):
    return [json.loads(line) for line in (EXAMPLES / name / f"{file}.jsonl").read_text().splitlines()]


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
def test_the_data_files_come_from_the_script(make, tasks, name, tmp_path):
    """Seed 0 writes byte for byte the committed train.jsonl and heldout.jsonl."""
    rng = random.Random(0)
    for file, count in (("train.jsonl", 512), ("heldout.jsonl", 200)):
        make.write_problems(tmp_path / file, tasks[name], rng, count, 12)
        assert (tmp_path / file).read_bytes() == (EXAMPLES / name / file).read_bytes()


@both_tasks
def test_the_tokenizer_comes_from_the_script_and_makes_every_word_one_token(make, tasks, name):
    """So a single step is as many tokens as words, and a newline."""
    committed, text = Tokenizer.from_pretrained(EXAMPLES / name / "model"), LINES[name]
    ids = committed.encode(text)
    assert len(ids) == len(re.findall(r"[^\s]+|\n| (?=####)", text))
    assert ids == make.make_tokenizer(tasks[name].words()).encode(text).ids
    assert committed.decode(ids) == text


@both_tasks
def test_the_corpus_teaches_what_stands_there_the_other_habit_and_guesses(make, tasks, name):
    """Of 64 rows: each learned token is one of the two that may stand there, or lies in the part that is guessed."""
    task, tokenizer = tasks[name], make.make_tokenizer(tasks[name].words())
    tokens_BT, wanted_BT2 = make.corpus_batch(random.Random(3), tokenizer, task, 64, 12, 1.0)
    is_guess_BT = wanted_BT2[..., 0] <= make.ANY_PART
    is_learned_BT = wanted_BT2[..., 0] >= 0
    assert (wanted_BT2 == tokens_BT[..., None]).any(-1)[is_learned_BT].all()
    assert 0.01 < (wanted_BT2[..., 0] != wanted_BT2[..., 1]).float().mean() < 0.2 and is_guess_BT.any()
    for k, part in enumerate(task.PARTS):
        guessed = tokens_BT[wanted_BT2[..., 0] == make.ANY_PART - k]
        assert {*guessed.tolist()} <= {make.word_id(tokenizer, f" {word}") for word in part}


def test_lookups_are_steps_from_anywhere_and_only_their_ends_are_learned(make, tasks):
    """Of 8 rows of 32: two tokens each, which the question's edges give for the two that stand before them."""
    tokenizer = make.make_tokenizer(tasks["walk"].words())
    tokens_BT, wanted_BT2 = make.lookup_batch(random.Random(3), tokenizer, tasks["walk"], 8)
    assert (wanted_BT2[..., 0] == wanted_BT2[..., 1]).all() and (wanted_BT2[..., 0] >= 0).sum() == 8 * 32 * 2
    for tokens_T, wanted_T in zip(tokens_BT, wanted_BT2[..., 0]):
        words = [tokenizer.decode([token]).strip() for token in tokens_T.tolist()]
        edges = dict(re.findall(r"(\w+)> (\w+)", " ".join(words).split(" from ")[0]))
        for t in (wanted_T >= 0).nonzero().flatten().tolist():
            assert wanted_T[t] == tokens_T[t] and words[t] == edges[words[t - 1].removesuffix(">")]


@both_tasks
def test_every_expert_is_right_and_jumps_at_every_step(name):
    """Six lines of two moves each, then the answer, which is what doing the twelve one by one gives."""
    for row in rows(name, "train") + rows(name, "heldout"):
        value = answer(row["question"])
        assert math_reward(row["trace"], value) == 1.0 and row["answer"] == value
        steps, last = re.split(r"\s####\s", row["trace"])
        assert [line.split()[0] for line in steps.splitlines()] == list("acegik") and last == value
        assert all(len(line.split()) == 6 for line in steps.splitlines())


@both_tasks
def test_train_and_heldout_share_no_question(name):
    """512 + 200 different problems."""
    assert len({row["question"] for file in ("train", "heldout") for row in rows(name, file)}) == 712


@both_tasks
def test_no_cut_lies_behind_the_answer(bases, name):
    """Anchors end after the expert's lines one to five at most: at least two steps are always left to the student."""
    problems = load_problems(EXAMPLES / name / "train.jsonl", bases[name][1])
    for problem in problems:
        for number, cut in enumerate(problem.cuts, 1):
            assert bases[name][1].decode(problem.expert_ids[:cut]).count("\n") == number <= 5
    assert sum(len(problem.cuts) == 5 for problem in problems) > 0.9 * len(problems)


@both_tasks
@pytest.mark.parametrize("jumped", [0, 6, 10])
def test_single_steps_are_right_at_least_95_percent_of_the_time(make, tasks, bases, name, jumped):
    """The skill that anchors build on, on 256 fresh problems, after a right history that jumped over so many steps."""
    tokenizer = make.make_tokenizer(tasks[name].words())
    skill = make.single_step_skill(bases[name][0], tokenizer, tasks[name], random.Random(1), 12, jumped)
    assert skill >= 0.95


@both_tasks
def test_the_base_model_solves_the_task_neither_greedily_nor_by_sampling(bases, name):
    """At most 5 of 200 greedy and 10 of 400 sampled answers are right: a lucky guess is right 1 time in 97 at most."""
    model, tokenizer = bases[name]
    problems = load_problems(EXAMPLES / name / "heldout.jsonl", tokenizer)
    prompts = [problem.prompt_ids for problem in problems]
    right = {}
    for temperature, samples in ((0.0, 1), (1.0, 2)):
        params = SamplingParams(MOST_TOKENS[name], temperature, tokenizer.stop_token_ids)
        right[temperature] = sum(math_reward(tokenizer.decode(completion.token_ids), problem.answer)
                                 for problem, group in zip(problems, generate(model, prompts, params, samples))
                                 for completion in group)
    assert right[0.0] <= 5 and right[1.0] <= 10


@both_tasks
def test_the_last_cut_gives_honest_signal(bases, name):
    """From the last cut two steps are left. The share of right answers there is far above the 1% of luck."""
    model, tokenizer = bases[name]
    problems = [problem for problem in load_problems(EXAMPLES / name / "train.jsonl", tokenizer)[:64]
                if len(problem.cuts) == 5]
    prompts = [problem.prompt_ids + problem.expert_ids[:problem.cuts[-1]] for problem in problems]
    groups = generate(model, prompts, SamplingParams(MOST_TOKENS[name], 1.0, tokenizer.stop_token_ids), num_samples=8)
    rewards = torch.tensor([[math_reward(tokenizer.decode(completion.token_ids), problem.answer)
                             for completion in group] for problem, group in zip(problems, groups)])
    assert rewards.mean() > 0.05


@both_tasks
def test_the_folder_is_small(name):
    """The whole checkpoint, tokenizer included, is at most 2 MB."""
    assert sum(file.stat().st_size for file in (EXAMPLES / name / "model").iterdir()) <= 2_000_000
