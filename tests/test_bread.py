"""Claims about bread.py: the search on tables, the loss against oracles, the update, whole runs on a tiny model.

Two fakes: `Oracle` stands in for prefill and branch and reads from a table how many rows of a group succeed;
`paid_by_chance` rewards random text, so that a random model gets gradients.
"""
import dataclasses
import doctest
import gc
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bread
from bread import Config, Rollout, anchor_policy, group_advantages, grpo_loss, k3_divergence, luffy_loss
from conftest import drive
from model import ModelConfig, Transformer
from sampler import Completion
from traces import Problem

ROOT = Path(bread.__file__).resolve().parent
G = 4


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """A folder with model/ (random weights, the example's tokenizer), train.jsonl and heldout.jsonl."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "examples" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    folder, rng = tmp_path_factory.mktemp("example"), random.Random(0)
    tokenizer = make.make_tokenizer(make.Chain.words())
    make.save_tokenizer(tokenizer, folder / "model")
    config = ModelConfig("llama", tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                         max_position_embeddings=160, tie_word_embeddings=True)
    random_model(config).save_pretrained(folder / "model")
    make.write_problems(folder / "train.jsonl", make.Chain, rng, 12, length=12)
    make.write_problems(folder / "heldout.jsonl", make.Chain, rng, 3, length=12)
    return folder


def random_model(config, seed=0):
    """Weights 8 times larger than usual: distributions are far from uniform, gradients far from zero."""
    model = Transformer(config, {"eos_token_id": 0}).initialize(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """A run takes over SIGINT and SIGTERM; the test session gets them back."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


@pytest.fixture
def new_run(example, tmp_path):
    """A function that makes a Run on the example; keyword arguments are fields of Config."""
    count = itertools.count()

    def make(**fields):
        defaults = dict(model=str(example / "model"), data=str(example / "train.jsonl"), device="cpu",
                        output=str(tmp_path / f"run-{next(count)}"), group_size=G, problems_per_step=4,
                        max_new_tokens=48)
        return bread.Run(Config(**{**defaults, **fields}))
    return make


def flags(example, output, *more):
    """A command line for two small steps on the example."""
    return ["--model", f"{example / 'model'}", "--data", f"{example / 'train.jsonl'}", "--output", str(output),
            "--eval-data", f"{example / 'heldout.jsonl'}", "--device", "cpu", "--steps", "2", "--eval-every", "2",
            "--problems-per-step", "3", "--group-size", f"{G}", "--max-new-tokens", "24", "--lr", "1e-3", *more]


def read_lines(path):
    """A .jsonl file as a list of dicts; constants that are not JSON (NaN, Infinity) are refused."""
    def refuse(constant):
        raise AssertionError(f"{path.name} holds {constant}, which is not JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class Oracle:
    """Stands in for `prefill` and `branch`: of a group behind `cut` tokens of a trace, successes(problem, cut)
    rows finish the expert's trace, the others stop at once. Checks that what they continue is question + expert
    prefix."""

    def __init__(self, monkeypatch, run, successes):
        self.problems, self.successes, self.stop = run.problems, successes, run.tokenizer.eos_id
        self.prefilled, self.asked = [], []
        monkeypatch.setattr(bread, "prefill", self.prefill)
        monkeypatch.setattr(bread, "branch", self.branch)

    def prefill(self, model, sequences):
        self.prefilled += sequences
        return sequences

    def branch(self, model, trunk, forks, params, max_rows, ops, workers):
        groups = []
        for fork in forks:
            context = trunk[fork.sequence][:fork.length]
            assert len(context) == fork.length
            problem, = [p for p in self.problems if context[:len(p.prompt_ids)] == p.prompt_ids]
            cut = fork.length - len(problem.prompt_ids)
            assert context[len(problem.prompt_ids):] == problem.expert_ids[:cut]
            self.asked.append((problem.id, cut))
            good, wrong = problem.expert_ids[cut:] + [self.stop], [self.stop]
            count = self.successes(problem, cut)
            groups.append([Completion(ids, [-1.0] * len(ids), "stop")
                           for ids in [good] * count + [wrong] * (len(fork.row_ids) - count)])
        return groups


def by_cut(table):
    """successes(problem, cut) from a table: entry 0 is for no anchor, entry i + 1 for a problem's cut number
    i."""
    return lambda problem, cut: table[[0, *problem.cuts].index(cut)]


# ---------------------------------------------------------------- which anchor policy, with which cuts


def policy(problem, step=0, anchors=None, progress=0.0, **fields):
    """The cuts and the policy that a run with these options would use for a problem."""
    config = Config(**{"anchor": "search", "group_size": 8, "max_new_tokens": 100, **fields})
    run = SimpleNamespace(config=config, step=step, anchors={} if anchors is None else anchors,
                          progress=lambda: progress)
    return anchor_policy(run, problem)


def make_problem(cuts, length=60, id="p", prompt_ids=(1, 2, 3)):
    return Problem(id, list(prompt_ids), list(range(100, 100 + length)), list(cuts), "1", "q", "t")


def test_random_anchors_depend_on_seed_step_and_problem():
    """300 steps: the same picks again, others with another seed or problem."""
    def picks(problem, **fields):
        return [drive(policy(problem, step, anchor="random", **fields)[1], [3] * 9)[0] for step in range(300)]
    problem = make_problem(range(5, 50, 5))
    first = picks(problem)
    assert first == picks(problem) and set(first) == set(range(9))
    assert first != picks(problem, seed=1) and first != picks(dataclasses.replace(problem, id="other"))


OTHERS = ["random", "fixed", "anneal", "adaback"]


@pytest.mark.parametrize("anchor", ["search", *OTHERS])
def test_an_anchor_leaves_room_for_at_least_one_token(anchor):
    """An anchor counts toward --max-new-tokens, so of the cuts 10 .. 50 only those below 30 are offered."""
    problem, asked, memory = make_problem(range(10, 60, 10)), set(), {}
    for step in range(40):
        cuts, search = policy(problem, step, memory, anchor=anchor, anchor_fraction=1.0, max_new_tokens=30)
        assert cuts == [10, 20]
        asked |= set(drive(search, [0] * 5)[1])
    assert asked and max(asked) == 1
    cuts, search = policy(problem, anchor=anchor, max_new_tokens=10)
    assert cuts == [] and drive(search, [])[1] == []


@pytest.mark.parametrize("anchor", ["search", *OTHERS])
def test_grpo_and_problems_without_cuts_ask_for_no_anchor(anchor):
    """E9: a run with --method grpo differs from BREAD by that flag alone."""
    assert drive(policy(make_problem([5, 10]), anchor=anchor, method="grpo")[1], []) == (None, [])
    assert drive(policy(make_problem([]), anchor=anchor)[1], []) == (None, [])


@pytest.mark.parametrize("anchor", OTHERS)
def test_an_anchor_for_every_group_may_be_none_and_is_always_accepted(anchor):
    """--anchor-when always: the bare question is the first cut, and whatever its rollouts do they are the group."""
    problem = make_problem([5, 10])
    for step, count in itertools.product(range(20), (0, 3, 8)):
        cuts, search = policy(problem, step, anchor=anchor, anchor_when="always", progress=0.5)
        assert cuts == [0, 5, 10]
        accepted, asked = drive(search, [count] * 3)
        assert asked == [accepted]


# ---------------------------------------------------------------- advantages


def test_advantages_equal_numpys():
    """(r - mean) / population std, and without the division; sums are 0 to float32 rounding of numbers near 1."""
    for size, seed in itertools.product((2, 3, 8, 17), range(20)):
        rewards = np.random.default_rng(seed).integers(0, 2, size).astype(np.float32)
        centred = rewards - rewards.mean()
        expected = centred / rewards.std() if rewards.std() > 0 else np.zeros(size)
        rewards_G = torch.tensor(rewards)
        np.testing.assert_allclose(group_advantages(rewards_G), expected, atol=1e-5)
        np.testing.assert_allclose(group_advantages(rewards_G, divide_by_std=False), centred, atol=1e-6)
        assert abs(group_advantages(rewards_G).sum().item()) < 1e-5 * size
        assert abs(group_advantages(rewards_G, divide_by_std=False).sum().item()) < 1e-6 * size


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("size", [1, 3, 7, 10])
@pytest.mark.parametrize("divide", [True, False])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(reward, size, divide):
    """The rewards themselves are compared: the mean of 7 times 0.1 is not 0.1 in float32."""
    assert group_advantages(torch.full((size,), reward), divide).tolist() == [0.0] * size


def test_a_branched_group_has_its_own_baseline(new_run, monkeypatch):
    """One success of 4 behind the anchor, 0 of 4 without: the success gets +sqrt(3), the others -1/sqrt(3).
    Mixed with the failed group they would be +sqrt(7) and -1/sqrt(7), and the failed rollouts would be blamed,
    too."""
    run = new_run()
    Oracle(monkeypatch, run, lambda problem, cut: int(cut > 0))
    accepted = bread.search_anchors(run, run.problems[:1])
    group, = accepted.values()
    bread.set_advantages(group, divide_by_std=True)
    assert [r.advantage for r in group] == pytest.approx([3**0.5] + [-(3**-0.5)] * 3)
    assert len({r.cut for r in group}) == 1 and group[0].cut > 0


# ---------------------------------------------------------------- the loss


def random_inputs(B=6, T=9, seed=0, spread=0.3):
    """float64 (logprobs with grad, old, advantages, mask): rows of unequal length, ratios on both sides of the
    clip."""
    generator = torch.Generator().manual_seed(seed)
    new_BT, old_BT = (-2 + spread * torch.randn(B, T, generator=generator).double() for _ in range(2))
    advantages_B = torch.randn(B, generator=generator).double()
    lengths_B = torch.randint(1, T + 1, (B,), generator=generator)
    mask_BT = (torch.arange(T) < lengths_B[:, None]).double().roll(1, dims=1)
    return new_BT.requires_grad_(), old_BT, advantages_B, mask_BT


def loop_loss(new_BT, old_BT, advantages_B, mask_BT, low, high, mean):
    """The oracle: one token at a time, in plain numbers. mean: "token" or "sequence"."""
    rows, inputs = [], (new_BT, old_BT, advantages_B, mask_BT)
    for new_T, old_T, advantage, mask_T in zip(*(x.tolist() for x in inputs)):
        terms = []
        for new, old, is_active in zip(new_T, old_T, mask_T):
            if is_active:
                ratio = math.exp(new - old)
                clipped = min(max(ratio, 1 - low), 1 + high)
                terms.append(min(ratio * advantage, clipped * advantage))
        rows.append(terms)
    if mean == "token":
        return -np.mean([term for terms in rows for term in terms])
    return -np.mean([np.mean(terms) for terms in rows])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.28), (0.0, 0.0)])
def test_loss_equals_a_loop_over_tokens(seed, low, high):
    """Token mean and sequence mean, to float64 rounding."""
    new_BT, old_BT, advantages_B, mask_BT = random_inputs(seed=seed)
    denominators = {"token": mask_BT.sum().item(), "sequence": mask_BT.sum(1, keepdim=True) * len(mask_BT)}
    for mean, denominator in denominators.items():
        loss = grpo_loss(new_BT, old_BT, advantages_B, mask_BT, low, high, denominator)
        expected = loop_loss(new_BT, old_BT, advantages_B, mask_BT, low, high, mean)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def trl_cases():
    golden = json.loads((ROOT / "tests" / "golden" / "trl_loss.json").read_text())
    return [pytest.param(golden, case, id=f"{case['loss_type']}-{case['clip_high']}-kl{case['kl']}")
            for case in golden["cases"]]


@pytest.mark.parametrize("golden, case", trl_cases())
def test_loss_and_gradient_equal_trls(golden, case):
    """TRL 1.16.0 on the same numbers (golden/make_trl_loss.py), clip and k3 included, to float64 rounding. Its
    "grpo" is the sequence mean, "bnpo" the token mean of a batch, "dapo" that of an update in micro-batches."""
    new_BT, old_BT, reference_BT, advantages_B = (torch.tensor(golden[name], dtype=torch.float64) for name in
                                                  ("logprobs", "old_logprobs", "reference", "advantages"))
    mask_BT = (torch.arange(new_BT.shape[1]) < torch.tensor(golden["lengths"])[:, None]).double()
    denominator = {"grpo": mask_BT.sum(1, keepdim=True) * len(mask_BT), "bnpo": mask_BT.sum().item(),
                   "dapo": mask_BT.sum().item() + golden["other_tokens"]}[case["loss_type"]]
    new_BT.requires_grad_()
    loss = grpo_loss(new_BT, old_BT, advantages_B, mask_BT, case["clip_low"], case["clip_high"], denominator)
    loss = loss + case["kl"] * k3_divergence(new_BT, reference_BT, mask_BT, denominator)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-12)
    expected_BT = torch.tensor(case["gradient"], dtype=torch.float64)
    torch.testing.assert_close(new_BT.grad, expected_BT, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("junk", [1e4, -1e4, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["new", "old", "reference"])
def test_padding_cannot_reach_loss_or_gradient(junk, where):
    """Junk at masked positions leaves loss and gradient as they were, finite, and exactly 0 at these
    positions."""
    clean = random_inputs()
    dirty = [x.detach().clone() for x in clean]
    reference_BT = dirty[1] - 0.1
    padding_BT = clean[3] == 0
    {"new": dirty[0], "old": dirty[1], "reference": reference_BT}[where][padding_BT] = junk
    results = []
    for (new_BT, old_BT, advantages_B, mask_BT), ref_BT in ((clean, clean[1] - 0.1), (dirty, reference_BT)):
        new_BT = new_BT.detach().clone().requires_grad_()
        loss = grpo_loss(new_BT, old_BT, advantages_B, mask_BT, 0.2, 0.2, 30.0)
        (loss + k3_divergence(new_BT, ref_BT, mask_BT, 30.0)).backward()
        results.append((loss.item(), new_BT.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert results[1][1].isfinite().all() and (results[1][1][padding_BT] == 0).all()


@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_absurd_ratio_of_a_real_token_gives_a_finite_loss_and_gradient(log_ratio, advantage):
    """In float32, where e^89 overflows."""
    new_BT = torch.tensor([[log_ratio, 0.0]], requires_grad=True)
    loss = grpo_loss(new_BT, torch.zeros(1, 2), torch.tensor([advantage]), torch.ones(1, 2), 0.2, 0.2, 2.0)
    loss.backward()
    assert loss.isfinite() and new_BT.grad.isfinite().all() and new_BT.grad[0, 1] == -advantage / 2


@pytest.mark.parametrize("advantage, ratio, value, slope", [
    (2.0, 0.5, 0.5, 0.5), (2.0, 1.1, 1.1, 1.1), (2.0, 1.5, 1.3, 0.0),         # A > 0 is clipped above only
    (-2.0, 0.5, 0.9, 0.0), (-2.0, 0.95, 0.95, 0.95), (-2.0, 1.5, 1.5, 1.5)])  # A < 0 is clipped below only
def test_clip_in_all_six_regions(advantage, ratio, value, slope):
    """Clip 0.1 below, 0.3 above. The objective is value * A, its slope in the log-prob is slope * A."""
    new_BT = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = grpo_loss(new_BT, 0 * one, advantage * one[0], one, 0.1, 0.3, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(-value * advantage, rel=1e-12)
    assert new_BT.grad.item() == pytest.approx(-slope * advantage, rel=1e-12)
    config, batch = Config(clip_low=0.1, clip_high=0.3), SimpleNamespace(
        old_logprobs_BT=0 * one, advantages_B=advantage * one[0], loss_mask_BT=one)
    assert bread.num_clipped(config, batch, new_BT.detach()) == (slope == 0)


def test_at_old_equals_new_the_gradient_is_reinforces():
    """Ratio 1: the loss is minus the weighted mean of A, and d loss / d logprob = -A * mask / denominator."""
    new_BT, _, advantages_B, mask_BT = random_inputs()
    for denominator in (mask_BT.sum().item(), mask_BT.sum(1, keepdim=True) * len(mask_BT)):
        new_BT.grad = None
        loss = grpo_loss(new_BT, new_BT.detach(), advantages_B, mask_BT, 0.2, 0.2, denominator)
        loss.backward()
        expected_BT = -advantages_B[:, None] * mask_BT / denominator
        torch.testing.assert_close(new_BT.grad, expected_BT, rtol=1e-12, atol=0)
        assert loss.item() == pytest.approx(expected_BT.sum().item(), rel=1e-12)
        assert new_BT.grad.norm() > 0.01


def test_k3_is_never_negative_and_moves_the_policy_only():
    """0 where both agree; its slope in the policy's log-prob is 1 - exp(d) with d = log ref - log policy."""
    new_BT, reference_BT, _, mask_BT = random_inputs(spread=1.0)
    for row in range(len(new_BT)):
        assert k3_divergence(new_BT[row], reference_BT[row], mask_BT[row], 1.0) >= 0
    assert k3_divergence(new_BT, new_BT.detach(), mask_BT, 1.0) == 0
    k3_divergence(new_BT, reference_BT, mask_BT, 5.0).backward()
    expected_BT = (1 - (reference_BT - new_BT.detach()).exp()) * mask_BT / 5
    torch.testing.assert_close(new_BT.grad, expected_BT, rtol=1e-10, atol=1e-12)


def test_luffys_weight_is_p_over_p_plus_shaping_and_is_never_clipped():
    """Value and gradient against float64 written out, for likely and unlikely tokens; padding has no part in it."""
    new_BT, _, advantages_B, mask_BT = random_inputs(spread=3.0)
    new_BT = (new_BT.detach().double() - 2).requires_grad_()
    loss = luffy_loss(new_BT, advantages_B.double(), mask_BT.double(), 0.1, 7.0)
    p_BT, A_B1 = new_BT.detach().exp(), advantages_B.double().unsqueeze(1)
    assert p_BT.min() < 0.01 and p_BT.max() > 0.5
    assert loss.item() == pytest.approx(-(p_BT / (p_BT + 0.1) * A_B1 * mask_BT).sum().item() / 7, rel=1e-12)
    loss.backward()
    expected_BT = -p_BT * 0.1 / (p_BT + 0.1)**2 * A_B1 * mask_BT / 7
    torch.testing.assert_close(new_BT.grad, expected_BT, rtol=1e-10, atol=1e-14)


def test_expert_shaping_touches_the_experts_rollout_only(new_run, monkeypatch):
    """A group with an expert's trace: its row follows luffy_loss, the sampled rows GRPO's clipped objective; without
    the option all rows do, the expert's from a ratio of 1."""
    run = new_run()
    groups = sampled_groups(run, num=1)
    groups[0][-1] = bread.expert_rollout(run, run.problems[0], advantage=1.5)
    for shaping in (0.0, 0.1):
        run.config = dataclasses.replace(run.config, expert_shaping=shaping)
        seen = []
        real = bread.batch_loss
        with monkeypatch.context() as patch:
            patch.setattr(bread, "batch_loss", lambda config, batch, logprobs_BT, supervised: seen.append(
                (batch, logprobs_BT.detach(), real(config, batch, logprobs_BT, supervised))) or seen[-1][2])
            bread.update(run, groups)
        (batch, logprobs_BT, loss), = seen
        expert_B = batch.expert_B1.squeeze(1)
        assert expert_B.sum() == 1 and batch.advantages_B[expert_B > 0] == 1.5
        sampled_BT, trace_BT = (batch.loss_mask_BT * keep for keep in (1 - batch.expert_B1, batch.expert_B1))
        clipped = grpo_loss(logprobs_BT, batch.old_logprobs_BT, batch.advantages_B,
                            sampled_BT if shaping else batch.loss_mask_BT, 0.2, 0.2, batch.denominator)
        shaped = luffy_loss(logprobs_BT, batch.advantages_B, trace_BT, 0.1, batch.denominator) if shaping else 0
        assert loss.item() == pytest.approx(float(clipped + shaped), rel=1e-5)


def test_an_sft_step_after_the_update_is_sft(new_run):
    """`update(supervised=True)` moves the weights exactly as --method sft does on the same traces, once, however many
    updates a batch of rollouts gets; the update's own metrics stay."""
    weights = []
    for method, fields in (("grpo", dict(updates_per_batch=3, on_fail="sft")), ("sft", {})):
        run = new_run(method=method, lr=1e-2, **fields)
        run.metrics = {"loss": 7.0}
        traces = [[bread.expert_rollout(run, problem, advantage=1.0)] for problem in run.problems[:3]]
        bread.update(run, traces, *([True] if method == "grpo" else []))
        weights.append([weight.detach().clone() for weight in run.weights])
        assert method == "sft" or run.metrics["loss"] == 7.0 and run.metrics["sft/loss"] > 0
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_no_active_token_gives_loss_zero_and_a_usable_backward():
    """Not 0/0, neither by the token mean nor by the sequence mean of rows that hold nothing."""
    new_BT, old_BT, advantages_B, mask_BT = random_inputs()
    loss = grpo_loss(new_BT, old_BT, advantages_B, torch.zeros_like(mask_BT), 0.2, 0.2, 10.0)
    loss = loss + k3_divergence(new_BT, old_BT, torch.zeros_like(mask_BT), 10.0)
    loss.backward()
    assert loss.item() == 0 and (new_BT.grad == 0).all()


def test_gradient_flows_through_the_new_logprobs_only():
    """Old log-probs and advantages that carry a graph by mistake would be found here: they are data."""
    new_BT, old_BT, advantages_B, mask_BT = random_inputs()
    loss = grpo_loss(new_BT, old_BT, advantages_B, mask_BT, 0.2, 0.2, 10.0)
    assert loss.requires_grad and loss.dim() == 0
    loss.backward()
    assert new_BT.grad.abs().sum() > 0 and old_BT.grad is None and advantages_B.grad is None


# ---------------------------------------------------------------- batches


def hand_rollout(prompt_ids, anchor_ids, completion_ids, advantage=1.0, logprobs=...):
    logprobs = [-1.0 - 0.01 * i for i in range(len(completion_ids))] if logprobs is ... else logprobs
    return Rollout(make_problem([]), len(anchor_ids), prompt_ids, anchor_ids, completion_ids, logprobs, "stop",
                   reward=1.0, advantage=advantage)


def stand_in(**fields):
    return SimpleNamespace(config=Config(**fields), device=torch.device("cpu"))


def make_batch(run, rollouts, num_tokens=1, num_rollouts=1):
    """A Batch of rollouts that share nothing: row i continues prefix i."""
    return bread.make_batch(run, list(enumerate(rollouts)), num_tokens, num_rollouts)


def test_loss_mask_is_the_picture():
    """q q q e | e o o o -> o o o s: context but for its last token; input; one target each, all of them in the loss,
    and padding up to the longest completion, not to the longest question."""
    rows = [hand_rollout([11, 12, 13], [21, 22], [31, 32, 33, 9]), hand_rollout([11] * 5, [], [31] * 6)]
    (prefixes, (batch,)), = bread.make_packs(stand_in(), [rows], num_tokens=10, num_rollouts=2)
    assert prefixes == [[11, 12, 13, 21], [11] * 4]
    assert batch.rows == [(0, [22, 31, 32, 33]), (1, [11, 31, 31, 31, 31, 31])]
    assert batch.targets_N.tolist() == [31, 32, 33, 9] + [31] * 6
    assert batch.loss_mask_BT.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch.old_logprobs_BT[0].tolist() == pytest.approx([-1.0, -1.01, -1.02, -1.03, 0, 0])
    assert batch.denominator == 10


def test_masks_come_from_lengths_not_from_token_values():
    """Ids equal to the padding value 0, and stop ids inside prompt, anchor and completion, change nothing."""
    plain = [hand_rollout([11, 12, 13], [21, 22], [31, 32, 33]), hand_rollout([11], [], [31] * 9)]
    tricky = [hand_rollout([0, 9, 0], [9, 0], [0, 9, 0]), hand_rollout([0], [], [0] * 9)]
    a, b = (make_batch(stand_in(), rows, 12, 2) for rows in (plain, tricky))
    assert torch.equal(a.loss_mask_BT, b.loss_mask_BT) and torch.equal(a.old_logprobs_BT, b.old_logprobs_BT)
    assert [len(ids) for _, ids in a.rows] == [len(ids) for _, ids in b.rows] == [3, 9]


def test_anchor_tokens_are_in_no_denominator():
    """Sequence mean: a row counts its completion only, not prompt and anchor, times the rollouts of the
    update."""
    rows = [hand_rollout([11] * 3, [21] * 7, [31] * 4), hand_rollout([11] * 8, [], [31] * 2)]
    batch = make_batch(stand_in(loss_mean="sequence"), rows, num_tokens=999, num_rollouts=5)
    assert batch.denominator.tolist() == [[20.0], [10.0]]


def test_a_row_without_tokens_has_no_zero_denominator():
    """A sequence mean over nothing is 0, not 0/0, which would make the whole update NaN."""
    rows = [hand_rollout([11] * 3, [], []), hand_rollout([11] * 8, [], [31] * 2)]
    batch = make_batch(stand_in(loss_mean="sequence"), rows, num_tokens=2, num_rollouts=2)
    assert bread.batch_loss(Config(), batch, torch.zeros_like(batch.old_logprobs_BT), supervised=False).isfinite()


def test_a_context_runs_once_and_every_rollout_is_in_one_micro_batch():
    """Groups of 5, 2, 1 and 1 in micro-batches of 3: no context is in two packs, no batch is larger than 3, small
    groups share one, and rollouts behind the same tokens share a prefix, whichever of these are an anchor."""
    sizes = {(11, 12): 5, (13,): 2, (14, 15, 16): 1, (17, 18): 1}
    groups = [[hand_rollout(list(context), [], [31, 9], advantage=1.0 + i) for i in range(size)]
              for context, size in sizes.items()]
    groups[2].append(hand_rollout([14], [15, 16], [32, 9], advantage=2.0))
    packs = bread.make_packs(stand_in(micro_batch_size=3), groups, num_tokens=1, num_rollouts=1)
    contexts = [tuple(prefix) for prefixes, _ in packs for prefix in prefixes]
    assert sorted(contexts) == [(), (11,), (14, 15), (17,)]
    found = [([*prefixes[i], ids[0]], advantage) for prefixes, batches in packs for batch in batches
             for (i, ids), advantage in zip(batch.rows, batch.advantages_B.tolist())]
    assert sorted(found) == sorted((r.prompt_ids + r.anchor_ids, r.advantage) for group in groups for r in group)
    assert [[len(batch.rows) for batch in batches] for _, batches in packs] == [[2], [3, 2], [3]]


def test_only_completion_tokens_are_targets_and_the_anchor_is_attended_to(new_run):
    """The LM head sees the completion's targets and no others; another anchor gives them other log-probs."""
    run, seen = new_run(), []

    def linear_logprob(hidden_ND, weight_VD, targets_N, temperature):
        seen.append((len(hidden_ND), targets_N.tolist()))
        return bread.plain.linear_logprob(hidden_ND, weight_VD, targets_N, temperature)

    def logprobs():
        prefixes = bread.Prefixes(run.model, [(r.prompt_ids + r.anchor_ids)[:-1] for r in rows])
        return bread.token_logprobs(run, run.model, prefixes, make_batch(run, rows, 5, 2))[0]
    run.ops = SimpleNamespace(linear_logprob=linear_logprob)
    rows = [hand_rollout([11, 12], [21, 22], [31, 32, 9]), hand_rollout([11], [23], [33, 9])]
    logprobs_BT = logprobs()
    assert seen == [(5, [31, 32, 9, 33, 9])]
    for anchor_ids in ([99, 22], [21, 99]):  # one token that only the prefix holds, one that opens the input
        rows[0].anchor_ids = anchor_ids
        other_BT = logprobs()
        assert (logprobs_BT[0] != other_BT[0]).all() and torch.equal(logprobs_BT[1], other_BT[1])


# ---------------------------------------------------------------- the update


def trunk_of(run, problems):
    """What `search_anchors` makes: question and trace of every problem in one trunk, and who is where."""
    sequences = [problem.prompt_ids + problem.expert_ids for problem in problems]
    return bread.prefill(run.model, sequences), {problem.id: i for i, problem in enumerate(problems)}


def sampled_groups(run, num=5):
    """Groups that the run's own model sampled: some anchored, of mixed lengths, with made-up rewards."""
    points = [(problem, 0 if i % 2 else problem.cuts[0]) for i, problem in enumerate(run.problems[:num])]
    trunk = trunk_of(run, run.problems[:num]) if run.config.anchor_placement == "prefill" else None
    groups = bread.sample_groups(run, points, "base", trunk)
    for g, group in enumerate(groups):
        for i, rollout in enumerate(group):
            keep = 1 + (7 * g + 5 * i) % len(rollout.completion_ids)
            rollout.completion_ids, rollout.logprobs = rollout.completion_ids[:keep], rollout.logprobs[:keep]
            rollout.reward = float((g + i) % 3 == 0)
        bread.set_advantages(group, divide_by_std=True)
    return groups


def gradient_of_update(run, groups, **fields):
    """The gradient at which `update` calls the optimizer, flat, in float64; no weight changes."""
    gradients = []

    def record(loss):
        gradients.append(torch.cat([weight.grad.double().flatten() for weight in run.weights]))
        run.optimizer.zero_grad(set_to_none=True)
        return gradients[-1].norm().item()
    config = run.config
    run.config, run.optimizer_step = dataclasses.replace(config, **fields), record
    bread.update(run, groups)
    run.config = config
    gradient, = gradients
    return gradient


def drift(groups, size=0.3):
    """Move the old log-probs as if the policy had moved since: ratios are not 1, and some tokens are clipped."""
    rng = random.Random(0)
    for rollout in itertools.chain(*groups):
        if rollout.logprobs is not None:
            rollout.logprobs = [logprob + rng.gauss(0, size) for logprob in rollout.logprobs]


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_gradient_does_not_depend_on_micro_batches_or_row_order(new_run, loss_mean, kl):
    """One denominator for the whole update. float32: relative 1e-6 of the norm is a few roundings of the sum."""
    run = new_run(kl=kl)
    if kl:
        run.reference = random_model(run.model.config, seed=1)
    groups = sampled_groups(run)
    drift(groups)
    whole = gradient_of_update(run, groups, micro_batch_size=100, loss_mean=loss_mean, kl=kl)
    shuffled = [random.Random(g).sample(group, len(group)) for g, group in enumerate(groups)][::-1]
    for order, size in itertools.product((groups, shuffled), (1, 2, 8, 100)):
        part = gradient_of_update(run, order, micro_batch_size=size, loss_mean=loss_mean, kl=kl)
        assert (part - whole).norm() < 1e-6 * whole.norm()


def one_at_a_time(run, groups, loss_mean, kl=0.0, cap=0.0):
    """The oracle: every rollout alone through the model, the objective written out. Returns (loss, flat gradient).

    Old log-probs are the sampler's; the trainer's own where nobody sampled, and with a cap for importance weights.
    """
    rollouts, loss = [rollout for group in groups for rollout in group], 0.0
    num_tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    for weight in run.weights:
        weight.grad = torch.zeros_like(weight)
    for r in rollouts:
        ids, N = torch.tensor(r.prompt_ids + r.anchor_ids + r.completion_ids), len(r.completion_ids)
        new, ref = ((model.logits(model(ids[None])[0, -N - 1:-1]) / run.config.temperature).log_softmax(-1)
                    [range(N), ids[-N:]] for model in (run.model, run.reference or run.model))
        sampled = new.detach() if r.logprobs is None else torch.tensor(r.logprobs)
        weights = (new.detach() - sampled).exp().clamp(max=cap) if cap else 1.0
        ratio, d = (new - (new.detach() if cap else sampled)).exp(), ref.detach() - new
        terms = torch.min(ratio * r.advantage, ratio.clamp(0.8, 1.2) * r.advantage) - kl * (d.exp() - d - 1)
        part = -(weights * terms).sum() / (num_tokens if loss_mean == "token" else N * len(rollouts))
        part.backward()
        loss += part.item()
    gradient = torch.cat([weight.grad.double().flatten() for weight in run.weights])
    run.optimizer.zero_grad(set_to_none=True)
    return loss, gradient


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_gradient_equals_one_rollout_at_a_time_without_padding(new_run, loss_mean, kl):
    """A group with equal rewards has no gradient but counts in both means; KL acts on it, too."""
    run = new_run(kl=kl, temperature=0.7)
    run.reference = random_model(run.model.config, seed=1)
    groups = sampled_groups(run)
    for rollout in groups[1]:
        rollout.advantage = 0.0
    drift(groups)
    gradient = gradient_of_update(run, groups, micro_batch_size=8, loss_mean=loss_mean, kl=kl)
    _, expected = one_at_a_time(run, groups, loss_mean, kl)
    assert (gradient - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("cap", [0.0, 1.1])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 5, 100])
def test_gradient_does_not_depend_on_what_is_shared(new_run, micro_batch_size, cap):
    """Groups larger than a micro-batch; an expert's trace among a group's rollouts, which share its question; a
    context of one token, which leaves an empty prefix; the same question behind two groups; with importance weights
    and without. All as the oracle has it, which shares nothing."""
    run = new_run(importance_cap=cap)
    groups = sampled_groups(run, num=3)
    groups[1][-1] = bread.expert_rollout(run, run.problems[1], advantage=0.9)
    short = dataclasses.replace(run.problems[3], prompt_ids=run.problems[3].prompt_ids[:1])
    groups += bread.sample_groups(run, [(short, 0), (run.problems[1], 0)], "resample")
    for i, rollout in enumerate(itertools.chain(*groups[3:])):
        rollout.advantage = 1.0 - 0.3 * i
    drift(groups)
    packs = bread.make_packs(run, groups, 1, 1)
    assert sorted(len(prefix) for prefixes, _ in packs for prefix in prefixes)[0] == 0
    assert sum(len(prefixes) for prefixes, _ in packs) == 4, "the question of groups 1 and 4 is one context"
    gradient = gradient_of_update(run, groups, micro_batch_size=micro_batch_size)
    loss, expected = one_at_a_time(run, groups, "token", cap=cap)
    assert (gradient - expected).norm() < 2e-6 * expected.norm()
    assert run.metrics["loss"] == pytest.approx(loss, abs=1e-6)


def test_recompute_changes_memory_and_no_gradient(new_run):
    """Activations made again in the backward pass, of prefixes and of rows, give the same gradient to 1e-6, and every
    block does run twice: forward, and once more on the way back."""
    gradients, calls = [], []
    for recompute in (False, True):
        run = new_run(recompute=recompute, kl=0.1)
        run.reference = random_model(run.model.config, seed=1)
        groups = sampled_groups(run)
        drift(groups)
        handle = run.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(recompute))
        gradients.append(gradient_of_update(run, groups, micro_batch_size=3))
        handle.remove()
    assert calls.count(True) == 2 * calls.count(False) > 0
    assert (gradients[1] - gradients[0]).norm() < 1e-6 * gradients[0].norm()


# ---------------------------------------------------------------- importance weights


def recorded_update(run, groups, monkeypatch):
    """The batches at every call of batch_loss in an update: (old log-probs, loss mask, log-probs, loss) each."""
    seen, real = [], bread.batch_loss

    def batch_loss(config, batch, logprobs_BT, supervised):
        loss = real(config, batch, logprobs_BT, supervised)
        seen.append((batch.old_logprobs_BT.clone(), batch.loss_mask_BT.clone(), logprobs_BT.detach(), loss.item()))
        return loss
    with monkeypatch.context() as patch:
        patch.setattr(bread, "batch_loss", batch_loss)
        bread.update(run, groups)
    return seen


def test_importance_weights_are_capped_ratios_of_the_first_pass(new_run, monkeypatch):
    """min(cap, trainer's / sampler's probability) on every sampled token and 1 on the expert's; old log-probs are the
    trainer's; both stay as they are over three passes, while the policy moves. The metric is their mean."""
    run = new_run(updates_per_batch=3, lr=1e-2, micro_batch_size=8, importance_cap=1.2)
    groups = sampled_groups(run, num=1)
    groups[0][-1] = bread.expert_rollout(run, run.problems[0], advantage=1.0)
    rows = groups[0][-1:] + groups[0][:-1]  # as in the batch: the shortest context first
    sampler = [None if r.logprobs is None else torch.tensor(r.logprobs) for r in rows]
    drift(groups, size=0.5)
    first, second, third = recorded_update(run, groups, monkeypatch)
    weights = []
    for row, (rollout, exact) in enumerate(zip(rows, sampler)):
        N = len(rollout.completion_ids)
        ratio = torch.ones(N) if exact is None else (exact - torch.tensor(rollout.logprobs)).exp()
        weights.append(first[1][row, :N])
        torch.testing.assert_close(weights[-1], ratio.clamp(max=1.2), rtol=1e-4, atol=0)
        assert (first[1][row, N:] == 0).all()
    flat = torch.cat(weights)
    assert (flat == 1.2).any() and (flat < 0.9).any(), "the cap acts on some tokens and not on others"
    assert torch.equal(first[0], first[2]), "old log-probs are those of the first pass"
    assert all(torch.equal(first[i], later[i]) for later in (second, third) for i in (0, 1))
    assert (third[2] - first[2]).abs().max() > 1e-3
    assert run.metrics["sampler/importance_weight"] == pytest.approx(flat.mean().item(), rel=1e-5)


def test_without_a_cap_tokens_have_no_weights(new_run, monkeypatch):
    """--importance-cap 0: the mask stays 1, old log-probs are the sampler's, and the metric is the mean ratio, uncut:
    here exp(0.5) on every token."""
    run = new_run(micro_batch_size=100)
    groups = sampled_groups(run, num=2)
    for rollout in itertools.chain(*groups):
        rollout.logprobs = [logprob - 0.5 for logprob in rollout.logprobs]
    (old_BT, mask_BT, _, _), = recorded_update(run, groups, monkeypatch)
    assert set(mask_BT.unique().tolist()) <= {0.0, 1.0}
    sampled = sorted(logprob for rollout in itertools.chain(*groups) for logprob in rollout.logprobs)
    torch.testing.assert_close(old_BT[mask_BT > 0].sort().values, torch.tensor(sampled), rtol=1e-6, atol=0)
    assert run.metrics["sampler/importance_weight"] == pytest.approx(math.exp(0.5), rel=1e-4)


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_weighted_loss_and_gradient_equal_the_oracle(new_run, loss_mean, kl):
    """Every token's term, that of the KL included, is multiplied by its weight; denominators count tokens, not
    weights."""
    run = new_run(kl=kl, temperature=0.7, importance_cap=1.1, loss_mean=loss_mean, micro_batch_size=5)
    run.reference = random_model(run.model.config, seed=1)
    groups = sampled_groups(run)
    drift(groups)
    gradient = gradient_of_update(run, groups)
    loss, expected = one_at_a_time(run, groups, loss_mean, kl, cap=1.1)
    assert (gradient - expected).norm() < 2e-6 * expected.norm()
    assert run.metrics["loss"] == pytest.approx(loss, abs=1e-6) and abs(loss) > 1e-3


def test_a_weight_too_small_for_float32_moves_no_other_token(new_run, monkeypatch):
    """A token that the sampler drew and the trainer thinks impossible (a ratio below e^-104) has a weight of about 0.
    It is still a token: the log-probs of the tokens behind it stay in their places on the second pass."""
    run = new_run(updates_per_batch=2, lr=1e-9, importance_cap=2.0, micro_batch_size=100)
    groups = sampled_groups(run, num=1)
    rollout = max(groups[0], key=lambda rollout: len(rollout.completion_ids))
    rollout.logprobs[0] = 200.0
    first, second = recorded_update(run, groups, monkeypatch)
    torch.testing.assert_close(second[2], first[2], rtol=0, atol=1e-4)


def test_kl_zero_loads_no_reference_and_runs_dead_groups_not_at_all(new_run):
    """Rollouts of groups with equal rewards count in the denominator; only --kl runs them through the network."""
    run = new_run()
    assert run.reference is None
    groups = sampled_groups(run)
    alive = gradient_of_update(run, groups)
    for rollout in groups[0]:
        rollout.advantage = 0.0
    dead = gradient_of_update(run, groups)
    assert (alive - dead).norm() > 0.01 * alive.norm()
    for group in groups:
        for rollout in group:
            rollout.advantage = 0.0
    before = [weight.clone() for weight in run.weights]
    del run.optimizer_step
    bread.update(run, groups)
    assert all(torch.equal(a, b) for a, b in zip(before, run.weights)) and not run.optimizer.state
    assert run.metrics["loss"] == run.metrics["grad_norm"] == 0


def test_old_logprobs_stay_fixed_over_the_updates_of_a_batch(new_run, monkeypatch):
    """Also those of an expert's trace, which nobody sampled: the first pass fills them in, later ones do not."""
    run, seen = new_run(updates_per_batch=3, lr=1e-2, micro_batch_size=4), []
    groups = sampled_groups(run, num=1)
    groups[0] = groups[0][:-1] + [bread.expert_rollout(run, run.problems[0], advantage=1.0)]
    real = bread.batch_loss
    monkeypatch.setattr(bread, "batch_loss", lambda config, batch, logprobs_BT, supervised: (
        seen.append((batch.old_logprobs_BT.clone(), logprobs_BT.detach()))
        or real(config, batch, logprobs_BT, supervised)))
    bread.update(run, groups)
    (old_1, new_1), (old_2, new_2), (old_3, new_3) = seen
    assert torch.equal(old_1, old_2) and torch.equal(old_2, old_3) and old_1.isfinite().all()
    torch.testing.assert_close(new_1, old_1, atol=1e-5, rtol=0)
    assert (new_2 - old_2).abs().max() > 1e-3 and (new_3 - new_2).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("placement", ["prefill", "hint"])
def test_the_first_pass_agrees_with_the_sampler(new_run, temperature, placement):
    """Same model, ids, positions and temperature: every log-prob to 1e-5 in float32, anchored rollouts
    included."""
    run = new_run(temperature=temperature, anchor_placement=placement)
    groups = sampled_groups(run)
    rollouts = [rollout for group in groups for rollout in group]
    batch = make_batch(run, rollouts)
    with torch.no_grad():
        prefixes = bread.Prefixes(run.model, [(r.prompt_ids + r.anchor_ids)[:-1] for r in rollouts])
        logprobs_BT, _ = bread.token_logprobs(run, run.model, prefixes, batch)
    torch.testing.assert_close(logprobs_BT, batch.old_logprobs_BT, atol=1e-5, rtol=0)
    bread.update(run, groups)
    assert run.metrics["sampler/logprob_gap"] < 1e-5
    assert run.metrics["clip_fraction"] == 0


def test_metrics_of_an_update_are_means_over_its_tokens(new_run):
    """Old log-probs lowered by 0.5: the gap is 0.5, every token of A > 0 (ratio 1.65) is clipped, none of A < 0;
    loss and entropy are those of an oracle, not of the last micro-batch (M1)."""
    run = new_run(micro_batch_size=3, lr=1e-9)
    groups = sampled_groups(run)
    rollouts = [rollout for group in groups for rollout in group]
    num_tokens, num_clipped, entropy, objective = 0, 0, 0.0, 0.0
    for r in rollouts:
        r.logprobs = [logprob - 0.5 for logprob in r.logprobs]
        ids, N = torch.tensor(r.prompt_ids + r.anchor_ids + r.completion_ids), len(r.completion_ids)
        with torch.no_grad():
            logits_NV = run.model.logits(run.model(ids[None])[0, -N - 1:-1])
        entropy += torch.distributions.Categorical(logits=logits_NV).entropy().sum().item()
        objective += N * r.advantage * (1.2 if r.advantage > 0 else math.exp(0.5))
        num_tokens, num_clipped = num_tokens + N, num_clipped + N * (r.advantage > 0)
    bread.update(run, groups)
    assert run.metrics["sampler/logprob_gap"] == pytest.approx(0.5, rel=1e-4)
    assert run.metrics["clip_fraction"] == pytest.approx(num_clipped / num_tokens)
    assert run.metrics["entropy"] == pytest.approx(entropy / num_tokens, rel=1e-4)
    assert run.metrics["loss"] == pytest.approx(-objective / num_tokens, rel=1e-3)


@pytest.mark.parametrize("junk", [lambda x: x * math.nan, lambda x: x * math.inf, lambda x: x + math.nan])
def test_a_loss_or_gradient_that_is_not_finite_changes_nothing_and_is_counted(new_run, monkeypatch, junk):
    """No weight and no moment moves, by a bit, neither where the loss alone is NaN; the next sound step works as
    ever."""
    run = new_run(lr=1e-2)
    groups = sampled_groups(run)
    bread.update(run, groups)
    before = [x.clone() for x in bread.checkpoint.optimizer_tensors(run.optimizer, list(run.masters)).values()]
    with monkeypatch.context() as patch:
        patch.setattr(bread, "batch_loss", lambda config, batch, logprobs_BT, supervised: junk(logprobs_BT).sum())
        bread.update(run, groups)
    after = bread.checkpoint.optimizer_tensors(run.optimizer, list(run.masters)).values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and run.skipped_updates == 1
    bread.update(run, groups)
    assert run.skipped_updates == 1 and not torch.equal(before[0], run.masters[0])


def test_float32_masters_add_up_what_bf16_weights_would_lose(new_run):
    """AdamW moves a weight by about lr = 1e-6 a step. A bf16 weight of 0.1 has neighbours 5e-4 away, so a
    single step leaves it where it is; 600 steps must not."""
    run = new_run(lr=1e-6)
    run.weights = [torch.nn.Parameter(torch.full((8,), 0.1, dtype=torch.bfloat16))]
    run.masters, run.owners = {0: run.weights[0].detach().float()}, [0]
    run.optimizer = torch.optim.AdamW(run.masters.values(), 1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    start = run.weights[0].detach().clone()
    for step in range(600):
        run.weights[0].grad = torch.ones(8, dtype=torch.bfloat16)
        run.optimizer_step(0.0)
        if step == 0:
            assert torch.equal(run.weights[0], start) and (run.masters[0] < start.float()).all()
    torch.testing.assert_close(run.masters[0], start.float() - 600e-6, rtol=0, atol=2e-6)
    assert torch.equal(run.weights[0], run.masters[0].bfloat16()) and (run.weights[0] < start).all()


def test_the_learning_rate_rises_over_the_warm_up(new_run):
    """Step 0 of 4 has a quarter of --lr, and from step 3 on all of it; without warm-up all of it at once."""
    for warmup, expected in ((4, [0.25, 0.5, 0.75, 1.0, 1.0]), (0, [1.0] * 5)):
        run, rates = new_run(lr=1e-3, warmup_steps=warmup), []
        for run.step in range(5):
            for weight in run.weights:
                weight.grad = torch.zeros_like(weight)
            run.optimizer_step(0.0)
            rates.append(run.optimizer.param_groups[0]["lr"] / 1e-3)
        assert rates == pytest.approx(expected)


def test_the_gradient_is_clipped_once_after_accumulation(new_run):
    """The norm that is reported is the one before clipping, whatever the micro-batches."""
    run = new_run(lr=1e-9, grad_clip=1e-3)
    groups = sampled_groups(run)
    expected = gradient_of_update(run, groups, micro_batch_size=100).norm().item()
    del run.optimizer_step
    run.config = dataclasses.replace(run.config, micro_batch_size=2)
    bread.update(run, groups)
    assert run.metrics["grad_norm"] == pytest.approx(expected, rel=1e-5) and expected > 1e-3
    moments = [state["exp_avg"] for state in run.optimizer.state.values()]
    norm = torch.cat([moment.flatten() for moment in moments]).norm().item()
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3), "(1 - beta_1) times the clipped gradient"


def test_sft_minimises_the_cross_entropy_of_trace_and_stop_token(new_run):
    """The mean over all trace tokens of the update; the question is context, the stop token is learnt."""
    run = new_run(method="sft", max_new_tokens=90, micro_batch_size=2)
    groups = [[bread.expert_rollout(run, problem, advantage=1.0)] for problem in run.problems[:3]]
    nll, count = 0.0, 0
    for problem in run.problems[:3]:
        ids = torch.tensor(problem.prompt_ids + problem.expert_ids + [run.tokenizer.eos_id])
        with torch.no_grad():
            logits_NV = run.model.logits(run.model(ids[None, :-1])[0])[len(problem.prompt_ids) - 1:]
        targets_N = ids[len(problem.prompt_ids):]
        nll += torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum").item()
        count += len(targets_N)
    bread.update(run, groups)
    assert run.metrics["loss"] == pytest.approx(nll / count, rel=1e-5)


# ---------------------------------------------------------------- search, anchors and groups of a run


def test_all_searches_run_in_lockstep_and_each_trace_is_prefilled_once(new_run, monkeypatch):
    """Three problems become solvable at different cuts. No cut is probed twice, no more rounds than the longest
    search needs, one prefill of question + trace per problem; the accepted probe itself is the group (E1, E3,
    E6)."""
    run, rounds = new_run(), []
    solvable_at = {problem.id: i for problem, i in zip(run.problems, (0, 2, 4, 99))}
    oracle = Oracle(monkeypatch, run, lambda p, cut: 2 * (p.cuts.index(cut) >= solvable_at[p.id]))
    real = bread.sample_groups
    monkeypatch.setattr(bread, "sample_groups", lambda *args: rounds.append(real(*args)) or rounds[-1])
    problems = run.problems[:4]
    accepted = bread.search_anchors(run, problems)
    assert {key: group[0].cut for key, group in accepted.items()} == {
        problem.id: problem.cuts[solvable_at[problem.id]] for problem in problems[:3]}
    assert len(set(oracle.asked)) == len(oracle.asked) and run.counts["probes"] == len(oracle.asked)
    assert oracle.prefilled == [problem.prompt_ids + problem.expert_ids for problem in problems]
    probed = [group for groups in rounds for group in groups]
    assert all(any(group is probe for probe in probed) for group in accepted.values())
    assert sum(bool(groups) for groups in rounds) == 3, "ceil(log2(5 cuts + 1)) rounds for all problems together"
    assert run.counts["probe"] == sum(len(r.completion_ids) for group in probed for r in group)
    assert run.counts["prefilled"] == sum(map(len, oracle.prefilled)) and run.counts["searched"] == 4


def test_the_shortest_probe_in_range_is_kept_when_the_search_moves_on(new_run, monkeypatch):
    """Cut 2 of 5 is in range, the shorter ones that are tried afterwards fail: the group of cut 2 is used."""
    run = new_run()
    oracle = Oracle(monkeypatch, run, by_cut([0, 0, 0, 3, 4, 4]))
    group, = bread.search_anchors(run, run.problems[:1]).values()
    cuts = run.problems[0].cuts
    assert [cut for _, cut in oracle.asked] == [cuts[2], cuts[0], cuts[1]] and group[0].cut == cuts[2]
    assert bread.num_successes(group) == 3 and len(group) == G


@pytest.mark.parametrize("problems_per_step", [5, 8, 11, 12])
def test_no_step_holds_a_problem_twice(new_run, problems_per_step):
    """Neither where an epoch of 12 problems is no multiple of the step. Draws are keyed by problem, so the
    second group would repeat the first to the last token; searches, too, tell problems apart by their ids."""
    run = new_run(problems_per_step=problems_per_step)
    for run.step in range(20):
        ids = [problem.id for problem in run.next_problems()]
        assert len(set(ids)) == len(ids) == problems_per_step


def test_every_group_and_every_row_has_its_own_draws(new_run):
    """Other problem, step, kind or seed: other tokens; the same key: the same. 24 tokens do not agree by
    accident."""
    run = new_run(max_new_tokens=24)

    def rows(step=0, kind="base", seed=0):
        run.step, run.config = step, dataclasses.replace(run.config, seed=seed)
        groups = bread.sample_groups(run, [(problem, 0) for problem in run.problems[:3]], kind)
        return [tuple(r.completion_ids) for group in groups for r in group]
    first = rows()
    assert first == rows() and len(set(first)) == 3 * G
    assert len(set(first + rows(step=1) + rows(kind="resample") + rows(seed=1))) == 4 * 3 * G


def test_a_cut_of_the_trunk_equals_a_fresh_prefill_of_question_and_anchor(new_run):
    """sample_groups without a trunk prefills what it needs: same tokens, log-probs to 1e-5."""
    run = new_run(max_new_tokens=40)
    problem = run.problems[3]
    points = [(problem, problem.cuts[1])]
    shared, = bread.sample_groups(run, points, "probe", trunk_of(run, run.problems))
    fresh, = bread.sample_groups(run, points, "probe")
    assert [r.completion_ids for r in shared] == [r.completion_ids for r in fresh]
    for a, b in zip(shared, fresh):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize("no_std, scale", [(False, 1.0), (True, 3**0.5 / 4)])
def test_an_accepted_probe_takes_the_place_of_the_failed_group(new_run, monkeypatch, no_std, scale):
    """One step of three problems: solved unaided, solved behind its fourth anchor, never solved. The update gets
    the plain group, the probe (for its own advantages) and the failed group without gradient; metrics count it."""
    run, groups = new_run(steps=1, problems_per_step=3, max_new_tokens=90, no_std=no_std), []
    easy, hard, hopeless = run.problems[:3]
    needed = {easy.id: 0, hard.id: hard.cuts[3], hopeless.id: 1000}
    oracle = Oracle(monkeypatch, run, lambda problem, cut: cut >= needed[problem.id])
    run.next_problems = lambda: [easy, hard, hopeless]
    real = bread.update
    monkeypatch.setattr(bread, "update", lambda run, found: groups.extend(found) or real(run, found))
    bread.train(run)
    assert [[r.cut for r in group] for group in groups] == [[0] * G, [hard.cuts[3]] * G, [0] * G]
    assert [r.anchor_ids for r in groups[1]] == [hard.expert_ids[:hard.cuts[3]]] * G
    for group in groups[:2]:
        assert [r.advantage / scale for r in group] == pytest.approx([3**0.5] + [-(3**-0.5)] * 3)
    assert [r.advantage for r in groups[2]] == [0.0] * G
    row, = read_lines(run.folder.path / "metrics.jsonl")
    assert (row["anchor/searched"], row["anchor/accepted"], row["anchor/probes"]) == (2, 1, len(oracle.asked) - 3)
    assert row["anchor/fraction"] == pytest.approx(hard.cuts[3] / len(hard.expert_ids))
    assert row["reward"] == pytest.approx(1 / 12) and row["frac_reward_zero_std"] == pytest.approx(1 / 3)
    total = sum(len(problem.expert_ids) for problem in run.problems)
    shown = [max(cut for key, cut in oracle.asked if key == problem.id) for problem in (hard, hopeless)]
    assert shown[1] == hopeless.cuts[-1] and row["anchor/shown"] == pytest.approx(sum(shown) / total)
    assert row["anchor/used"] == pytest.approx(hard.cuts[3] / total)


def test_anchors_for_every_group_sample_nothing_else(new_run, monkeypatch):
    """--anchor-when always: one group per problem, behind the policy's cut, whatever comes of it; all tokens count as
    probes. AdaBack's interval moves with the outcome and is part of what a checkpoint holds."""
    run = new_run(steps=1, problems_per_step=3, anchor="adaback", anchor_when="always", max_new_tokens=90)
    oracle, groups = Oracle(monkeypatch, run, lambda problem, cut: 2 if problem is run.problems[0] else 0), []
    run.next_problems = lambda: run.problems[:3]
    real = bread.update
    monkeypatch.setattr(bread, "update", lambda run, found: groups.extend(found) or real(run, found))
    bread.train(run)
    assert [(group[0].problem.id, group[0].cut) for group in groups] == oracle.asked and len(oracle.asked) == 3
    assert run.tokens["base"] == 0 < run.tokens["probe"]
    row, = read_lines(run.folder.path / "metrics.jsonl")
    assert row["reward"] is None and row["anchor/probes"] == 3
    _, meta = bread.checkpoint.load(run.folder.path / "checkpoint-1")
    for (key, cut), problem in zip(oracle.asked, run.problems):
        cuts = [0, *problem.cuts]
        pick, right = cuts.index(cut), problem is run.problems[0]
        record = {"interval": [0, max(pick - 1, 0)] if right else [min(pick + 1, len(cuts) - 1), len(cuts) - 1],
                  "shown": cut, "used": cut}
        assert meta["anchors"][key] == run.anchors[key] == record


def record_forks(monkeypatch, run):
    """Every group fails; returns the list that collects (ids before the completion, room) of every fork."""
    seen = []
    monkeypatch.setattr(bread, "prefill", lambda model, sequences: sequences)

    def branch(model, trunk, forks, params, max_rows, ops, workers):
        seen.extend((trunk[fork.sequence][:fork.length], fork.max_new_tokens) for fork in forks)
        return [[Completion([run.tokenizer.eos_id], [-1.0], "stop") for _ in fork.row_ids] for fork in forks]
    monkeypatch.setattr(bread, "branch", branch)
    return seen


def test_a_prefilled_anchor_starts_the_answer(new_run, monkeypatch):
    """What is continued is prompt_ids + expert_ids[:cut], as ids; the anchor uses up --max-new-tokens."""
    run = new_run(max_new_tokens=40)
    seen, problem = record_forks(monkeypatch, run), run.problems[0]
    bread.search_anchors(run, [problem])
    for context, room in seen:
        cut = len(context) - len(problem.prompt_ids)
        assert context == problem.prompt_ids + problem.expert_ids[:cut] and room == 40 - cut
        assert cut in problem.cuts
    assert len(seen) >= 2


def test_a_hint_stands_in_the_prompt_and_nowhere_else(new_run, monkeypatch):
    """The anchor's text is part of the rendered question, anchor_ids stay empty, and the hint uses up the
    answer's room as a prefilled anchor does, so that the two placements are comparable."""
    run = new_run(max_new_tokens=40, anchor_placement="hint")
    problem = run.problems[0]
    for cut in problem.cuts:
        _, _, prompt_ids, anchor_ids = run.context(problem, cut)
        text = run.tokenizer.decode(prompt_ids)
        assert anchor_ids == [] and run.tokenizer.decode(problem.expert_ids[:cut]) in text
        assert text.startswith(problem.question) and "Hint" in text
    assert run.context(problem, 0)[2:] == (problem.prompt_ids, [])
    seen = record_forks(monkeypatch, run)
    bread.search_anchors(run, [problem])
    for context, room in seen:
        cut, = [cut for cut in problem.cuts if run.context(problem, cut)[2] == context]
        assert room == 40 - cut


def test_the_reward_does_not_read_the_hint(new_run):
    """An answer that stood in a hint would not be the model's own; a prefilled anchor starts its answer and is
    read."""
    run = new_run(anchor_placement="hint")
    problem = dataclasses.replace(run.problems[0], cuts=[len(run.problems[0].expert_ids)])
    done = Completion([run.tokenizer.eos_id], [-1.0], "stop")
    assert run.rollout(*run.context(problem, problem.cuts[0]), done).reward == 0
    run.config = dataclasses.replace(run.config, anchor_placement="prefill")
    assert run.rollout(*run.context(problem, problem.cuts[0]), done).reward == 1


@pytest.mark.parametrize("placement", ["prefill", "hint"])
def test_no_row_leaves_the_models_window(new_run, monkeypatch, placement):
    """With the longest --max-new-tokens allowed, what is read plus what may be written fits the positions."""
    window, prompt = 160, len(new_run().problems[0].prompt_ids)
    words = bread.HINT_ROOM if placement == "hint" else 0
    run = new_run(max_new_tokens=window - prompt - words, anchor_placement=placement)
    seen = record_forks(monkeypatch, run)
    bread.search_anchors(run, run.problems)
    assert seen and max(len(context) + room for context, room in seen) <= window


def test_a_completion_cut_off_while_thinking_has_no_reward():
    """Where the template opens <think>, the completion does not: what stands in a thought that never closes is
    no answer, as rewards.py has it for a completion that opens its own."""
    texts = {1: r"so \boxed{5}, or 6? Let me", 2: r"so \boxed{6}</think> It is \boxed{5}."}
    run = SimpleNamespace(tokenizer=SimpleNamespace(opens_thinking=True, decode=lambda ids: texts[ids[0]]))
    problem = dataclasses.replace(make_problem([]), answer="5")
    cut_off, done = (bread.Run.rollout(run, problem, 0, [7], [], Completion([i], [-1.0], "length"))
                     for i in texts)
    assert (cut_off.reward, done.reward) == (0.0, 1.0)


@pytest.mark.parametrize("method", ["bread", "grpo"])
@pytest.mark.parametrize("on_fail, advantages", [
    ("skip", [0.0] * 4), ("resample", [3**0.5] * 2 + [-(3**-0.5)] * 6), ("expert", [-(3**-0.5)] * 3 + [3**0.5]),
    ("sft", [0.0] * 4)])
def test_what_becomes_of_a_failed_group_without_anchor(new_run, monkeypatch, method, on_fail, advantages):
    """skip: as it is, without gradient. resample: G more plain rollouts join (2 of them right here: 2 of 8).
    expert: the whole trace and a stop token take the place of one failure. sft: as it is, and an SFT step on the trace
    follows the update."""
    run, calls = new_run(on_fail=on_fail, method=method, max_new_tokens=90), itertools.count()
    oracle = Oracle(monkeypatch, run, lambda p, cut: 2 * (cut == 0 and next(calls) > 0))
    groups, problem = [], run.problems[0]
    run.next_problems = lambda: [problem]
    supervised = []
    monkeypatch.setattr(bread, "update", lambda run, found, supervised=False: updates[supervised].extend(found))
    updates = {False: groups, True: supervised}
    run.config = dataclasses.replace(run.config, steps=1, problems_per_step=1)
    run.report = run.save = lambda *args: None
    bread.train(run)
    trace = problem.expert_ids + [run.tokenizer.eos_id]
    assert [r.completion_ids for group in supervised for r in group] == ([trace] if on_fail == "sft" else [])
    assert sorted(r.advantage for r in groups[0]) == pytest.approx(sorted(advantages))
    assert oracle.asked[0] == (problem.id, 0) and all(r.cut == 0 and not r.anchor_ids for r in groups[0])
    if on_fail == "expert":
        last = groups[0][-1]
        assert last.completion_ids == trace and last.logprobs is None
    extra = groups[0][G:] if on_fail == "resample" else []
    assert run.tokens["resample"] == sum(len(r.completion_ids) for r in extra)


def test_every_epoch_is_a_permutation_that_depends_on_seed_and_step_only(new_run):
    """12 problems, 4 a step: three steps see each of them once, in an order of the epoch's own."""
    run = new_run()

    def ids(step):
        run.step = step
        return [problem.id for problem in run.next_problems()]
    everyone = sorted(problem.id for problem in run.problems)
    epochs = [ids(3 * epoch) + ids(3 * epoch + 1) + ids(3 * epoch + 2) for epoch in range(5)]
    assert all(sorted(epoch) == everyone for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 5
    assert ids(7) == epochs[2][4:8] and new_run().next_problems() == new_run().next_problems()
    run.config = dataclasses.replace(run.config, seed=1)
    assert ids(0) != epochs[0][:4]


@pytest.mark.parametrize("problems_per_step", [1, 5, 12])
def test_every_problem_comes_equally_often(new_run, problems_per_step):
    """Whether or not the step size divides the 12 problems: over 60 problems drawn no two counts differ by more
    than a few, where independent draws would differ by 10 or so."""
    run = new_run(problems_per_step=problems_per_step)
    counts = dict.fromkeys((problem.id for problem in run.problems), 0)
    for run.step in range(60 // problems_per_step):
        for problem in run.next_problems():
            counts[problem.id] += 1
    assert max(counts.values()) - min(counts.values()) <= 3


def test_evaluation_uses_no_anchor_and_costs_no_training_tokens(new_run, example, monkeypatch):
    """Every fork of an evaluation is at the bare question; tokens/sampled, the cost of training, stays 0."""
    run = new_run(eval_data=str(example / "heldout.jsonl"), eval_samples=3)
    run.problems = run.eval_problems
    oracle = Oracle(monkeypatch, run, lambda problem, cut: 1)
    run.evaluate()
    assert {cut for _, cut in oracle.asked} == {0} and run.tokens_sampled() == 0
    assert run.evals[-1]["eval/accuracy"] == pytest.approx(1 / 3) and run.evals[-1]["eval/greedy"] == 1


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def paid_by_chance(monkeypatch):
    """Random text is right in one case of five, so that some groups fail, some do not, and probes are
    accepted."""
    real = bread.math_reward
    monkeypatch.setattr(bread, "math_reward", lambda text, answer: max(
        real(text, answer), float(zlib.crc32(f"{text} {answer}".encode()) % 5 == 0)))


def call(argv):
    """Exit code of the command line, whether it returns or raises SystemExit."""
    try:
        return bread.main(argv)
    except SystemExit as stop:
        return stop.code


METRICS = {"step", "reward", "reward/train", "frac_reward_zero_std", "tokens/base", "tokens/probe",
           "tokens/resample", "tokens/prefilled", "tokens/sampled", "anchor/searched", "anchor/accepted",
           "anchor/probes", "anchor/fraction", "completions/mean_length", "completions/clipped_ratio", "loss",
           "grad_norm", "entropy", "clip_fraction", "sampler/logprob_gap", "sampler/importance_weight",
           "sampler/entropy", "skipped_updates", "seconds/update"}


@pytest.mark.parametrize("method", ["bread", "grpo", "sft"])
def test_a_run_leaves_its_files_behind(example, tmp_path, capsys, paid_by_chance, method):
    """run.json is the resolved configuration; one line of metrics per step; the last step's checkpoint is a
    Hugging Face folder that loads. A pipe gets plain lines without control characters."""
    assert call(flags(example, tmp_path / "run", "--method", method)) == 0
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["method"] == method and written["lr"] == 1e-3 and written["group_size"] == G
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and all(METRICS <= set(row) for row in rows[1:])
    assert set(rows[0]) == {"step", "eval/accuracy", "eval/greedy", "tokens/sampled"}
    assert {"eval/accuracy", "eval/greedy"} <= set(rows[2]) and "eval/accuracy" not in rows[1]
    assert rows[2]["tokens/sampled"] == sum(rows[2][f"tokens/{kind}"] for kind in ("base", "probe", "resample"))
    assert (rows[2]["tokens/probe"] > 0) == (method == "bread")
    assert (rows[2]["tokens/base"] > 0) == (method != "sft")
    assert rows[1]["grad_norm"] > 0 and (method == "sft" or rows[1]["sampler/logprob_gap"] < 1e-5)
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    assert {"step", "id", "question", "anchor", "completion", "answer", "reward", "advantage"} <= set(samples[0])
    model = Transformer.from_pretrained(tmp_path / "run" / "checkpoint-2")
    start = Transformer.from_pretrained(example / "model")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))
    bread.Tokenizer.from_pretrained(tmp_path / "run" / "checkpoint-2")
    out = capsys.readouterr()
    assert "step 2/2" in out.out and not re.search(r"[\r\x1b]", out.out) and out.err == ""


def test_bread_is_grpo_where_nothing_fails(example, tmp_path, monkeypatch):
    """One success in every group: both methods give the same weights, bit for bit, and no probe is made (T10)."""
    real, weights = bread.math_reward, []
    for method in ("bread", "grpo"):
        tries = itertools.count(-12)  # the 12 traces are checked first; then come groups of G
        monkeypatch.setattr(bread, "math_reward",
                            lambda text, answer: max(real(text, answer), next(tries) % G == 0))
        output = tmp_path / method
        assert call(flags(example, output, "--method", method, "--steps", "1", "--eval-data", "")) == 0
        row, = read_lines(output / "metrics.jsonl")
        assert row["anchor/searched"] == 0 and row["frac_reward_zero_std"] == 0
        weights.append(load_file(output / "checkpoint-1" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def comparable(row):
    """A row of metrics without wall-clock times."""
    return {name: value for name, value in row.items() if not name.startswith("seconds/")}


def release():
    """Forget the last run of this process, whose lock would keep the next one out of the folder."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    gc.collect()


OPTIONS = ["--updates-per-batch", "2", "--warmup-steps", "3", "--kl", "0.02", "--on-fail", "expert",
           "--weight-decay", "0.1"]


@pytest.fixture(scope="module")
def unbroken():
    """Results of the run that was not interrupted, made by the first test that needs it."""
    return {}


def results(folder):
    """What must agree: weights and optimizer state of step 4, and all lines of metrics and samples."""
    return {"weights": load_file(folder / "checkpoint-4" / "model.safetensors"),
            "optimizer": load_file(folder / "checkpoint-4" / "trainer.tensors"),
            "metrics": [comparable(row) for row in read_lines(folder / "metrics.jsonl")],
            "samples": read_lines(folder / "samples.jsonl")}


def whole(example, tmp_path, unbroken):
    """Fill in `unbroken` if it is empty."""
    if not unbroken:
        assert call(flags(example, tmp_path / "whole", "--steps", "4", *OPTIONS)) == 0
        unbroken |= results(tmp_path / "whole")
        release()


def break_update(patch, at_call, action):
    """Let `action` happen when bread.update is called for the at_call-th time, before it does its work."""
    real, calls = bread.update, itertools.count(1)
    patch.setattr(bread, "update",
                  lambda run, groups: (next(calls) == at_call and action()) or real(run, groups))


@pytest.mark.parametrize("rows", [1, 7])
def test_how_many_rows_are_sampled_at_once_changes_nothing(example, tmp_path, paid_by_chance, unbroken, rows):
    """--sample-batch-size 1 and 7 (the groups have 4 rows) give the default's tokens, searches, counts and
    evaluations. Log-probs and with them weights differ by float32 rounding: after eight updates by less than 1e-5,
    1% of --lr, since AdamW moves a weight of however small a gradient by about --lr."""
    whole(example, tmp_path, unbroken)
    command = flags(example, tmp_path / "run", "--steps", "4", *OPTIONS, "--sample-batch-size", f"{rows}")
    assert call(command) == 0
    found = results(tmp_path / "run")
    for ours, theirs in zip(found["samples"], unbroken["samples"], strict=True):
        assert ours.pop("entropy") == pytest.approx(theirs["entropy"], abs=1e-5)
        assert ours == {name: value for name, value in theirs.items() if name != "entropy"}
    for ours, theirs in zip(found["metrics"], unbroken["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        assert all(ours[name] == theirs[name] for name in theirs if name.split("/")[0] in ("tokens", "anchor", "eval"))
    for name, weight in unbroken["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("broken_by", ["steps", "signal", "crash"])
def test_a_resumed_run_equals_an_unbroken_one(example, tmp_path, monkeypatch, paid_by_chance, unbroken, broken_by):
    """Four steps == some steps + --resume + the rest: weights, moments, metrics and samples, bit for bit. Broken
    by --steps 2; by SIGINT in step 2, which saves and exits with 130; by a crash in step 4, after which step 3,
    logged but not saved, is run again and stands in the logs once."""
    command = flags(example, tmp_path / "run", *OPTIONS, "--save-every", "2")
    whole(example, tmp_path, unbroken)
    with monkeypatch.context() as patch:
        if broken_by == "steps":
            assert call(command) == 0
        elif broken_by == "signal":
            break_update(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
            assert call([*command, "--steps", "4"]) == 130
        else:
            break_update(patch, 4, lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                call([*command, "--steps", "4"])
            assert [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
    release()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert call([*command, "--steps", "4", "--resume"]) == 0
    found = results(tmp_path / "run")
    for name in ("weights", "optimizer"):
        assert found[name].keys() == unbroken[name].keys()
        assert all(torch.equal(found[name][key], unbroken[name][key]) for key in found[name])
    assert found["metrics"] == unbroken["metrics"] and found["samples"] == unbroken["samples"]


def test_adabacks_memory_survives_a_resume(example, tmp_path):
    """Two epochs of two steps, every group behind its problem's own interval: broken after the first, they give the
    samples and metrics of an unbroken run, in which the second epoch's cuts depend on the first one's outcomes."""
    def command(name, steps, *more):
        return flags(example, tmp_path / name, "--anchor", "adaback", "--anchor-when", "always", "--eval-data", "",
                     "--problems-per-step", "6", "--max-new-tokens", "70", "--steps", steps, *more)
    assert call(command("whole", "4")) == 0
    assert call(command("broken", "2")) == 0
    assert call(command("broken", "4", "--resume")) == 0
    whole, broken = ([{key: value for key, value in row.items() if not key.startswith("seconds")}
                      for row in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "broken"))
    assert whole == broken and len({row["anchor/shown"] for row in whole}) > 2


def test_a_signal_that_comes_while_processes_agree_is_not_lost(new_run):
    """All of them have said that there was none, so this step is not the last for anyone; the next one is."""
    run = new_run(steps=9)

    def gather(mine):
        run.stop(signal.SIGINT, None)
        return mine
    run.ranks.gather = gather
    run.advance()
    assert not run.finished and run.signal == signal.SIGINT
    run.advance()
    assert run.finished and run.signal == signal.SIGINT and run.step == 2


def test_too_many_skipped_updates_in_a_row_end_the_run(example, tmp_path, monkeypatch, capsys):
    """Of seven updates the 2nd, 3rd, 5th, 6th and 7th are not finite: with --max-skipped-updates 3 the sound one in
    between counts anew, and the seventh step is the last: exit code 1, one line on stderr, and a checkpoint that
    holds, bit for bit, what the fourth step left. From there a resumed run goes on."""
    command = flags(example, tmp_path / "run", "--method", "sft", "--eval-data", "", "--save-every", "4", "--steps",
                    "9", "--max-skipped-updates", "3")
    real, number = bread.Run.optimizer_step, itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(bread.Run, "optimizer_step", lambda run, loss: real(
            run, math.nan if next(number) in (2, 3, 5, 6, 7) else loss))
        assert call(command) == 1
    err = capsys.readouterr().err
    assert err.startswith("bread.py: 3 updates in a row") and err.count("\n") == 1 and "saved" in err
    folder = tmp_path / "run"
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 2, 2, 3, 4, 5]
    for name in ("model.safetensors", "trainer.tensors"):
        sound, saved = (load_file(folder / f"checkpoint-{step}" / name) for step in (4, 7))
        assert sound.keys() == saved.keys() and all(torch.equal(sound[key], saved[key]) for key in sound)
    release()
    assert call([*command, "--resume"]) == 0
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == list(range(1, 10))


def test_a_process_may_run_twice(example, tmp_path):
    """A finished run lets go of its folder's lock and of the signal handlers, as a notebook needs."""
    before = signal.getsignal(signal.SIGINT)
    assert call(flags(example, tmp_path / "run", "--steps", "1", "--method", "grpo")) == 0
    assert call(flags(example, tmp_path / "run", "--steps", "2", "--method", "grpo", "--resume")) == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoints_of_a_resumed_run_are_complete_folders(example, tmp_path):
    """Old checkpoints are pruned, the one that a run was resumed from among them; its tokenizer must not be
    lost."""
    command = flags(example, tmp_path / "run", "--method", "sft", "--eval-data", "", "--save-every", "1")
    assert call([*command, "--steps", "1"]) == 0
    release()
    assert call([*command, "--steps", "5", "--resume"]) == 0
    for step in (4, 5):
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / "run" / f"checkpoint-{step}" / name).is_file()


@pytest.mark.parametrize("changed", [["--seed", "1"], ["--lr", "2e-3"], ["--group-size", "5"], "trace"])
def test_resume_refuses_another_run(example, tmp_path, capsys, changed):
    """Another seed, rate or group size, or data with another content: one line, exit code 2, nothing touched."""
    data = tmp_path / "data.jsonl"
    data.write_bytes((example / "train.jsonl").read_bytes())
    base = flags(example, tmp_path / "run", "--method", "sft", "--data", f"{data}", "--eval-data", "")
    assert call([*base, "--steps", "1"]) == 0
    release()
    capsys.readouterr()
    if changed == "trace":
        data.write_text(data.read_text().replace("start", "begin", 1))
    more = [] if changed == "trace" else changed
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert call([*base, *more, "--steps", "3", "--resume"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--resume" in err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize("more, expected", [
    (["--frobnicate", "3"], "--frobnicate"),
    (["--step", "3"], "--step"),                               # an abbreviation of --steps
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--data", "no-such-file.jsonl"], "no-such-file.jsonl"),
    (["--eval-data", "no-such-file.jsonl"], "no-such-file.jsonl"),
    (["--data", ""], "--data"),
    (["--group-size", "1"], "--group-size"),
    (["--group-size", "eight"], "--group-size"),
    (["--problems-per-step", "13"], "--problems-per-step"),    # of 12 problems
    (["--max-new-tokens", "500"], "--max-new-tokens"),
    (["--method", "ppo"], "--method"),
    (["--anchor-when", "always"], "--anchor-when"),            # the search needs problems that failed
    (["--anchor", "random", "--anchor-from", "0.8", "--anchor-to", "0.4"], "--anchor-from"),
    (["--expert-shaping", "-1"], "--expert-shaping"),
    (["--lr", "nan"], "--lr"),
    (["--kl", "-1"], "--kl"),
    (["--clip-high", "nan"], "--clip-high"),
    (["--importance-cap", "-1"], "--importance-cap"),
    (["--max-skipped-updates", "0"], "--max-skipped-updates"),
    (["--anchor-low", "5"], "--anchor-low"),                   # of G = 4
    (["--anchor-low", "3", "--anchor-high", "2"], "--anchor-low"),
    (["--device", "toaster"], "toaster"),
    (["--eval", "--eval-data", ""], "--eval-data"),
    (["--resume"], "checkpoint"),                              # nothing there yet
    (["@no-such-file.args"], "no-such-file.args"),
])
def test_bad_input_ends_with_one_line_and_exit_code_2(example, tmp_path, capsys, more, expected):
    """The line names the flag or the file; no traceback, no page of usage, and no folder with a run in it."""
    assert call(flags(example, tmp_path / "run", *more)) == 2
    err = capsys.readouterr().err
    assert expected in err and err.startswith("bread.py: ") and err.count("\n") == 1
    assert not (tmp_path / "run" / "run.json").exists()


def test_output_that_holds_a_run_is_kept_unless_overwrite(example, tmp_path, capsys):
    """One line says what to type; --overwrite then replaces the run."""
    command = flags(example, tmp_path / "run", "--method", "sft", "--steps", "1", "--eval-data", "")
    assert call(command) == 0
    release()
    capsys.readouterr()
    assert call(command) == 2
    err = capsys.readouterr().err
    assert "--overwrite" in err and err.count("\n") == 1
    release()
    assert call([*command, "--overwrite"]) == 0
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 1


def test_flags_are_read_from_a_file_and_later_ones_win(tmp_path):
    """@FILE: one flag a line, comments and quotes as in a shell."""
    path = tmp_path / "recipe.args"
    path.write_text("# a recipe\n--model 'my model' --data d.jsonl\n\n--lr 3e-4  # high\n--no-std\n--steps 7\n")
    c = bread.parse_args([f"@{path}", "--steps", "9"], bread.EXAMPLE)
    assert (c.model, c.data, c.lr, c.no_std, c.steps) == ("my model", "d.jsonl", 3e-4, True, 9)
    assert bread.parse_args(["--steps", "5", f"@{path}"], bread.EXAMPLE).steps == 7


def test_every_field_of_config_is_a_flag_with_a_reason(capsys):
    """--help names them all, with defaults; without --model the embedded example and its recipe are used."""
    assert call(["--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text and field.metadata["help"]
    config = bread.parse_args(["--steps", "3"], bread.EXAMPLE)
    assert Path(config.model).parts[-3:] == ("examples", "chain", "model")
    assert config.steps == 3 and config.lr != Config().lr


def test_eval_measures_a_model_and_writes_nothing(example, tmp_path, capsys):
    """--eval prints one line with greedy and sampled accuracy."""
    output = tmp_path / "run"
    assert call(["--model", f"{example / 'model'}", "--eval", "--eval-data", f"{example / 'heldout.jsonl'}",
                 "--max-new-tokens", "20", "--device", "cpu", "--output", str(output)]) == 0
    assert "greedy 0.0%" in capsys.readouterr().out and not output.exists()


def test_a_token_budget_ends_the_run(example, tmp_path):
    """The step that uses it up is the last one, and it saves."""
    assert call(flags(example, tmp_path / "run", "--method", "grpo", "--steps", "9", "--token-budget", "1")) == 0
    assert [row["step"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_the_program_fails_without_a_traceback(tmp_path):
    """As a user starts it, from another folder: exit code 2 and one line on stderr."""
    done = subprocess.run([sys.executable, ROOT / "bread.py", "--model", "nowhere", "--data", "x"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


# ---------------------------------------------------------------- worked examples


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("*.py")) + ["kernels"] + sorted(
    f"kernels.{path.stem}" for path in (ROOT / "kernels").glob("[a-z]*.py")))
def test_the_examples_in_docstrings_are_true(name):
    """Every >>> of every module."""
    if name.startswith("kernels"):
        pytest.importorskip("triton")
    assert doctest.testmod(importlib.import_module(name)).failed == 0
