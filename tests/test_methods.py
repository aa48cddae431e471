"""Claims about examples/methods.py: rules by hand, losses against a loop, every method in a real run."""
import contextlib
import dataclasses
import functools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import bread
from config import Config, load_function
from conftest import CHAIN, ROOT, read_lines
from packing import Batch
from traces import Problem

RULES = ["r3", "prefixrl", "questa", "adaback", "mfc", "adaprefix"]
CONTROLS = [f"{name}_where_failed" for name in ("random", "range", "half", "uft", "adaback", "mfc")]
G = 4
CONFIG = Config(model=f"{CHAIN / 'model'}", data="-", group_size=G, max_new_tokens=72, steps=100)
METHODS = f"{ROOT}/examples/methods.py"
load = functools.cache(lambda name: load_function("--method", f"{METHODS}:{name}", {}))
pytestmark = pytest.mark.usefixtures("one_thread")


def problem_of(id="p", cuts=(20, 40, 60, 80)):
    """Tokens of the example in the place of a question and of a trace of 100."""
    return Problem(id, [10, 11, 12], [20 + i % 50 for i in range(100)], list(cuts), "1", "1+1?", "2")


def dice(throw, luck=1.0):
    """In the place of random.Random: `throw` tells where in a range or list each pick lies, from 0 to 1."""
    return SimpleNamespace(random=lambda: luck, uniform=lambda low, high: low + (high - low) * throw,
                           choice=lambda options: options[round((len(options) - 1) * throw)])


def visit(name, state, rng, reward, bare=(0,)):
    """The cut that a rule names, which is then told the reward."""
    steps = load(name).rule(problem_of(), [*bare, 20, 40, 60, 80], rng, state, CONFIG)
    cut = next(steps)
    with contextlib.suppress(StopIteration):
        steps.send(reward)
    return cut


@pytest.mark.parametrize("name, step, expected", [
    # uniform; nearest to 40% to 80%; nearest to half, the shorter of two; p on a cosine until step 60 of 100
    ("r3", 0, [0.2] * 5), ("prefixrl", 0, [0, 0, 0.25, 0.5, 0.25]), ("questa", 0, [0, 0, 1, 0, 0]),
    ("annealed", 0, 0.95), ("annealed", 15, 0.8182), ("annealed", 30, 0.5), ("annealed", 59, 0.0506),
    ("annealed", 60, 0), ("annealed", 99, 0)])
def test_rules_without_memory_name_the_cuts_of_their_paper(name, step, expected):
    """UFT's is Binomial(4, p). Of 1000 picks each cut has its share within 5 standard deviations."""
    rng = random.Random(1)
    cuts = [visit(name, bread.State(step), rng, 0.0) for _ in range(1000)]
    for k in range(5):
        p = math.comb(4, k) * expected ** k * (1 - expected) ** (4 - k) if name == "annealed" else expected[k]
        assert abs(cuts.count(20 * k) - 1000 * p) <= 5 * math.sqrt(1000 * p * (1 - p))


@pytest.mark.parametrize("name, visits", [
    # Failure raises lo, hi stays; a mean of 0.5 sets hi and frees lo; unaided failure changes nothing.
    ("adaback", [(0.55, 0.1, 0.25, 60, [0.55, 1]), (0.5, 0.9, 0.5, 80, [0, 0.775]),
                 (0.4, 1, 0, 40, [0.31, 0.775]), (0.4, 0.09, 0, 0, [0.31, 0.775]),
                 (1, 1, 0.49, 80, [0.775] * 2), (1, 0.09, 0.5, 0, [0, 0])]),
    # Among all cuts up to the frontier, a throw of 1; success moves it down, nothing moves it up.
    ("mfc", [(1, 1, 0.25, 80, None), (0.75, 1, 0.5, 60, 60), (1, 1, 0, 60, 60), (0.3, 1, 1, 20, 20),
             (1, 1, 0.49, 20, 20), (0, 1, 0.5, 0, 0), (1, 1, 0, 0, 0)]),
    # [share, rate]: rate <- (rate + reward) / 2, share <- share + (0.5 - rate) / 2.
    ("adaprefix", [(0, 1, 0, 40, [0.625, 0.25]), (0, 1, 1, 60, [0.5625, 0.625])])])
def test_rules_with_memory_move_as_their_papers_say(name, visits):
    """(throw, luck, mean reward) of one visit after the other, the cut they give, and what is remembered."""
    state = bread.State()
    for throw, luck, reward, cut, memory in visits:
        assert visit(name, state, dice(throw, luck), reward) == cut
        assert state.memory.get("p") == pytest.approx(memory)


def test_where_adaback_begins_and_adaprefix_ends():
    """At the mean of all intervals; in [0, 1], and over the last 40 of 100 steps at none."""
    state = bread.State(memory={"a": [0.3, 0.7], "b": [0.1, 0.3]})
    # It has just failed, and no bare question is on offer: it is not tried unaided, whatever the luck.
    assert visit("adaback", state, dice(0.5, luck=0), 0, bare=()) == 40
    assert state.memory["p"] == pytest.approx([0.35, 0.5])
    for step, cut in ((59, 60), (80, 20), (99, 0)):
        assert visit("adaprefix", bread.State(step, memory={"p": [0.5625, 0.625]}), None, 0.0) == cut
    state = bread.State()
    for reward, end in ((0.0, 1.0), (1.0, 0.0)):
        assert [visit("adaprefix", state, None, reward) for _ in range(9)][-1] == 80 * end
        assert state.memory["p"][0] == end


class Judged(bread.Policy):
    """The first table(id, cut) rollouts of a group are right, whatever they say; the others are wrong."""

    def __init__(self, table):
        super().__init__(CONFIG, torch.device("cpu"), CONFIG.model)
        self.table = table
        self.seen = []

    def judge(self, problem, cut, context, completion):
        rollout = super().judge(problem, cut, context, completion)
        self.seen.append((problem.id, cut))
        rollout.reward = float(self.seen.count((problem.id, cut)) <= self.table(problem.id, cut))
        return rollout


@pytest.mark.parametrize("name", [*RULES, "annealed"])
def test_every_group_has_one_cut_and_only_unaided_ones_are_base(name):
    """In order, none from --max-new-tokens, 72, on. Two ranks make of halves what one makes of the whole."""
    problems = [problem_of(f"p{i}") for i in range(6)] + [problem_of("none", ()), problem_of("far", (72,))]
    found = {}
    for part in (problems, problems[0::2], problems[1::2]):
        policy = Judged(lambda id, cut: 2)
        state = bread.State(7)
        groups = load(name)(policy, part, state)
        cuts = [group[0].cut for group in groups]
        assert [group[0].problem for group in groups] == part and max(cuts) <= 60
        assert all([rollout.cut for rollout in group] == [cut] * G for group, cut in zip(groups, cuts))
        assert policy.counts["rollouts/base"] == G * cuts.count(0)
        assert policy.counts["rollouts/probe"] == G * (len(cuts) - cuts.count(0))
        for problem, cut in zip(part, cuts):
            result = cut, state.memory.get(problem.id)
            assert found.setdefault(problem.id, result) == result
    assert found["none"][0] == found["far"][0] == 0
    assert bool(state.memory) == (name in ("adaback", "mfc", "adaprefix"))
    assert json.loads(json.dumps(state.memory)) == state.memory  # as a checkpoint holds it


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_differs_from_bread_in_the_choice_of_the_cut_alone(name):
    """No probe where some are right or no cut is on offer; else one, which counts with 1 .. G-1 successes."""
    policy = Judged(lambda id, cut: {"solved": 1, "some": 3 * bool(cut), "all": G * bool(cut)}.get(id, 0))
    problems = [problem_of(id) for id in ("solved", "some", "all", "never")]
    state = bread.State()
    groups = load(name)(policy, problems + [problem_of("none", ()), problem_of("far", (72, 80))], state)
    successes = [(group[0].cut > 0, bread.num_successes(group)) for group in groups]
    assert successes == [(False, 1), (True, 3)] + 4 * [(False, 0)]
    assert policy.counts["rollouts/base"] == 6 * G and policy.counts["rollouts/probe"] == 3 * G
    assert policy.counts["searched"] == 5 and "solved" not in state.memory


def test_luffy_relift_and_uft_place_the_experts_tokens():
    """LUFFY: one of G. ReLIFT: in a failed group's stead. UFT: what was shown, 0.001 for each of G."""
    policy = Judged(lambda id, cut: 2 * (id == "right"))
    problems = [problem_of("right"), problem_of("wrong")]
    trace = problems[0].expert_ids + [policy.tokenizer.eos_id]
    groups = load("luffy")(policy, problems, bread.State())
    bread.set_advantages(groups, divide_by_std=True)
    assert policy.counts["rollouts/base"] == 2 * (G - 1) and [len(group) for group in groups] == [G, G]
    assert [rollout.advantage for rollout in groups[1]] == pytest.approx([-3 ** -0.5] * 3 + [3 ** 0.5])
    assert all((group[-1].completion_ids, group[-1].finish_reason) == (trace, "expert") for group in groups)
    unaided, [imitated] = load("relift")(Judged(policy.table), problems, bread.State())
    assert len(unaided) == G and (imitated.completion_ids, imitated.advantage) == (trace, 1.0)
    groups = load("uft")(policy, problems, bread.State())
    for group, [hint] in zip(groups[:2], groups[2:], strict=True):
        assert hint.completion_ids == group[0].anchor_ids and len(hint.completion_ids) == hint.cut > 0
        assert hint.finish_reason == "expert" and hint.advantage == pytest.approx(0.001 * G)


def random_batch(num_right, num_experts, std, seed=0):
    """(Batch of 8 rollouts of 3 tokens each, the last ones experts', in float64; the tokens' log-probs)."""
    rollouts = [SimpleNamespace(completion_ids=[0] * 3, finish_reason=reason)
                for reason in ["stop"] * (8 - num_experts) + ["expert"] * num_experts]
    rng = torch.Generator().manual_seed(seed)
    old_N, new_N, reference_N, weights_N = torch.rand(4, 24, generator=rng, dtype=torch.float64)
    rewards_G = torch.tensor([0.0] * (8 - num_right) + [1.0] * num_right, dtype=torch.float64)
    advantages_N = bread.group_advantages(rewards_G, std).repeat_interleave(3)
    batch = Batch(rollouts, [], torch.zeros(24), -3 * old_N, advantages_N, weights_N, -3 * reference_N)
    return batch, (-3 * new_N).requires_grad_()


def token_loss(name, A, new, old, is_expert, w_q):
    """(loss of a token, its derivative by `new`) by the papers' formulas; NFT with r = 3/8 and weight w_q."""
    ratio, p = math.exp(new - old), math.exp(new)
    if name == "nft" and A > 0:
        return -w_q * (new - old), -w_q
    if name == "nft":
        implicit = (1 - 3 / 8 * ratio) / (5 / 8)
        return -w_q * math.log(max(implicit, 1)), w_q * 3 / 5 * ratio / max(implicit, 1)
    if is_expert and name == "luffy":
        return -A * p / (p + 0.1), -A * p * 0.1 / (p + 0.1) ** 2
    if is_expert:
        return -A * new, -A
    clipped = min(max(ratio, 0.8), 1.2) * A
    return -min(ratio * A, clipped), -A * ratio if ratio * A <= clipped else 0.0


@pytest.mark.parametrize("name, num_experts", [("luffy", 1), ("relift", 2), ("uft", 1), ("nft", 0)])
@pytest.mark.parametrize("std, kl", [(True, 0.0), (False, 0.0), (True, 0.3)])
def test_losses_and_gradients_equal_a_loop_over_tokens(name, num_experts, std, kl):
    """In float64, to 1e-12, for 24 tokens, on every branch. The KL term is one over sampled tokens."""
    batch, logprobs_N = random_batch(3, num_experts, std)
    batch = batch if kl else dataclasses.replace(batch, reference_N=None)
    loss = load(name).loss(dataclasses.replace(CONFIG, no_std=not std, kl=kl), batch, logprobs_N)
    loss.backward()
    total = 0.0
    for n, new in enumerate(logprobs_N.tolist()):
        A, old, weight = (x[n].item() for x in (batch.advantages_N, batch.old_logprobs_N, batch.weights_N))
        is_expert = n >= 24 - 3 * num_experts
        value, slope = token_loss(name, A, new, old, is_expert, math.sqrt(5 / 3) if std else 5 / 8)
        if kl and not is_expert:
            d = batch.reference_N[n].item() - new
            value, slope = value + kl * (math.exp(d) - d - 1), slope + kl * (1 - math.exp(d))
        total += weight * value
        assert logprobs_N.grad[n].item() == pytest.approx(weight * slope, rel=1e-12)
    assert loss.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("std", [True, False])
def test_on_policy_nft_has_the_gradient_of_grpo(std):
    """For every share of right rollouts of 8, with the std and without; none at all where all are alike."""
    config = dataclasses.replace(CONFIG, no_std=not std)
    for num_right in range(9):
        batch = dataclasses.replace(random_batch(num_right, 0, std)[0], reference_N=None)
        now_N = batch.old_logprobs_N.clone().requires_grad_()
        losses = [loss(config, batch, now_N) for loss in (load("nft").loss, bread.batch_loss)]
        ours_N, grpo_N = [torch.autograd.grad(loss, now_N)[0] for loss in losses]
        assert torch.allclose(ours_N, grpo_N, rtol=1e-12, atol=1e-15) and ours_N.any() == (0 < num_right < 8)


@pytest.mark.parametrize("name", [*RULES, "uft", "luffy", "relift", "nft", "mfc_where_failed"])
def test_every_method_trains(name, tmp_path):
    """From the command line: two finite losses, some gradient, and probes where there are anchors."""
    flags = f"--method {METHODS}:{name} --output {tmp_path}/run --steps 2 --problems-per-step 4 --lr-decay 0"
    assert bread.main([*flags.split(), "--eval-data", ""]) == 0
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in rows)
    assert max(row["grad_norm"] or 0 for row in rows) > 0
    assert bool(rows[-1]["tokens/probe"]) == (name not in ("luffy", "relift", "nft"))
