"""Claims about the algorithm of bread.py: groups, search, advantages, losses and the update, on the embedded
example.

`Paid` is a policy that samples with the real model and reads its rewards from a table. `Recorder` stands
where the optimizer stands and keeps the gradients.
"""
import collections
import dataclasses
import itertools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bread
import report
from bread import State, group_advantages, grpo_loss, k3_divergence
from config import Config
from conftest import CHAIN, ROOT, drive
from model import Transformer
from parallel import MasterAdamW, Ranks
from sampler import Completion

G = 4
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


class Paid(bread.Policy):
    """The first successes(problem, cut) rollouts of a group are right, whatever they say; the others are
    wrong."""

    def __init__(self, config, successes):
        super().__init__(config, CPU, config.model)
        self.successes = successes
        self.asked = []  # (problem id, cut) of every rollout

    def judge(self, problem, cut, context, completion):
        rollout = super().judge(problem, cut, context, completion)
        rollout.reward = float(len(self.asked) % self.config.group_size < self.successes(problem, cut))
        self.asked.append((problem.id, cut))
        return rollout


@pytest.fixture(scope="module")
def make(data):
    """make(...) -> (policy, its 12 problems); keywords are fields of Config, `successes` a table for
    `Paid`."""
    def policy_and_problems(successes=None, **fields):
        defaults = dict(model=f"{CHAIN / 'model'}", data=f"{data / 'train.jsonl'}", device="cpu",
                        group_size=G, problems_per_step=3, max_new_tokens=72)
        config = Config(**{**defaults, **fields})
        policy = Paid(config, successes) if successes else bread.Policy(config, CPU, config.model)
        return policy, bread.read_problems(policy, config.data, print)
    return policy_and_problems


def ids_of(group):
    return [rollout.completion_ids for rollout in group]


def flat(groups):
    return [rollout for group in groups for rollout in group]


def watch_prefills(policy):
    """A list of the tokens of every prefill from now on; a step of decoding has one token a row."""
    passes = []

    def note(_, inputs):
        if inputs[0].shape[1] > 1:
            passes.append(inputs[0].numel())
    policy.model.model["embed_tokens"].register_forward_pre_hook(note)
    return passes


# ---------------------------------------------------------------- groups


def test_every_group_and_every_row_has_its_own_draws(make):
    """Other problem, cut, step, purpose or seed: other tokens; the same key: the same, in whatever batch.
    So hot that noise alone decides: of two rows with the same noise one would hold the other's beginning."""
    policy, problems = make(max_new_tokens=30, temperature=1e6)

    def rows(num=3, step=0, purpose="base", seed=0, cut=0):
        policy.config = dataclasses.replace(policy.config, seed=seed)
        points = [(problem, cut) for problem in problems[4:4 + num]]
        return ids_of(flat(bread.sample_groups(policy, points, step, purpose)))
    first = rows()
    assert first == rows() and first == rows(num=5)[:3 * G]
    others = rows(step=1) + rows(purpose="resample") + rows(seed=1) + rows(cut=7) + rows(cut=14)
    for a, b in itertools.permutations(first + others, 2):
        assert b[:5] not in [a[shift:shift + 5] for shift in (0, 7, 14)]


def test_a_hint_stands_in_the_prompt_and_nowhere_else(make):
    """The anchor's text is part of the rendered question, anchor_ids stay empty, and it uses up the
    answer's room as a prefilled anchor does, so that the two placements are comparable. The reward does
    not read it; it does read a prefilled anchor, which is the start of the answer."""
    policy, problems = make(anchor_placement="hint", max_new_tokens=30)
    problem = problems[4]
    for cut in problem.cuts[:3]:
        prompt_ids, anchor_ids = policy.context(problem, cut)
        text = policy.tokenizer.decode(prompt_ids)
        assert anchor_ids == [] and policy.tokenizer.decode(problem.expert_ids[:cut]) in text
        assert text.startswith(problem.question) and "Hint" in text
        group, = bread.sample_groups(policy, [(problem, cut)], 0, "probe")
        assert max(map(len, ids_of(group))) <= 30 - cut
    assert policy.context(problem, 0) == (problem.prompt_ids, [])
    done = Completion([policy.tokenizer.eos_id], [-1.0], "stop")
    whole = len(problem.expert_ids)
    assert policy.judge(problem, whole, policy.context(problem, whole), done).reward == 0
    assert policy.judge(problem, whole, (problem.prompt_ids, problem.expert_ids), done).reward == 1


def test_no_row_leaves_the_models_window(make):
    """With the longest --max-new-tokens allowed, what is read plus what may be written fits the positions."""
    for placement, words in (("prefill", 0), ("hint", bread.HINT_ROOM)):
        room = 256 - max(len(problem.prompt_ids) for problem in make()[1]) - words
        with pytest.raises(ValueError, match=f"lower --max-new-tokens to {room}$"):
            make(max_new_tokens=room + 1, anchor_placement=placement)
        policy, problems = make(max_new_tokens=room, anchor_placement=placement)
        for problem in problems:
            for cut in [0, *problem.cuts]:
                assert sum(map(len, policy.context(problem, cut))) + room - cut <= 256


def test_a_completion_cut_off_while_thinking_has_no_reward(make):
    """Where the template opens <think>, the completion does not: what stands in a thought that never
    closes is no answer, as rewards.py has it for a completion that opens its own."""
    texts = {1: r"so \boxed{5}, or 6? Let me", 2: r"so \boxed{6}</think> It is \boxed{5}."}
    policy, problems = make()
    policy.tokenizer = SimpleNamespace(opens_thinking=True, decode=lambda ids: texts[ids[0]])
    problem = dataclasses.replace(problems[0], answer="5")
    rewards = [policy.judge(problem, 0, ([7], []), Completion([i], [-1.0], "stop")).reward for i in texts]
    assert rewards == [0.0, 1.0]


# ---------------------------------------------------------------- the search


def test_a_probe_keeps_its_groups_and_offers_no_cut_without_room(make):
    """An anchor counts toward --max-new-tokens: of the cuts 7, 14, 21, 28, 35 only those below are
    offered, and without cuts nothing is asked. The group of the shortest cut in range is returned, also
    where the search moved on."""
    _, problems = make()
    problem = problems[4]
    assert problem.cuts == [7, 14, 21, 28, 35]
    solved, mixed, failed = [[SimpleNamespace(reward=i < count) for i in range(G)] for count in (G, 2, 0)]

    def probe(max_new_tokens, table, problem=problem):
        return drive(bread.probe(Config(max_new_tokens=max_new_tokens, group_size=G), problem), table)
    assert probe(21, {7: failed, 14: failed}) == (None, [7, 14])
    assert probe(22, {14: failed, 21: mixed}) == (mixed, [14, 21])
    assert probe(99, {21: mixed, 7: failed, 14: solved}) == (mixed, [21, 7, 14])
    assert probe(7, {}) == probe(99, {}, problems[0]) == (None, [])


def test_all_searches_run_in_lockstep_and_each_trace_is_prefilled_once(make):
    """Four problems become solvable at different cuts or never. Together they ask what each asks alone,
    with the same samples, and a cut of the trunk gives what a fresh prefill of question and anchor gives;
    no cut is probed twice and at most ceil(log2(5 + 1)) = 3 are; question and trace of each problem go
    through the model once; the accepted group is the one that was sampled as a probe, and every probe is
    told."""
    first = dict(zip(["train-4", "train-5", "train-6"], [0, 2, 4]))
    policy, problems = make(lambda problem, cut: 2 * (cut in problem.cuts[first.get(problem.id, 99):]))
    problems = problems[4:8]
    prefills = watch_prefills(policy)
    accepted = bread.search_anchors(policy, problems, 6)
    assert prefills == [sum(len(problem.prompt_ids + problem.expert_ids) for problem in problems)]
    assert policy.counts["tokens/prefilled"] == prefills[0] and policy.counts["searched"] == 4
    asked = [(probe["id"], probe["cut"]) for probe in policy.probes]
    assert len(set(asked)) == len(asked) == policy.counts["groups/probe"] and set(asked) == set(policy.asked)
    for problem, group in zip(problems, list(accepted.values())):
        own = [probe for probe in policy.probes if probe["id"] == problem.id]
        assert 2 <= len(own) <= 3 and policy.shown[problem.id] == max(probe["cut"] for probe in own)
        for probe in own:
            assert probe == {"step": 7, "id": problem.id, "cut": probe["cut"], "of": len(problem.expert_ids),
                             "successes": policy.successes(problem, probe["cut"]), "rollouts": G}
        alone = bread.search_anchors(policy, [problem], 6)[problem.id]
        assert (group is None) == (alone is None) == (problem.id not in first)
        if group:
            cut = problem.cuts[first[problem.id]]
            fresh, = bread.sample_groups(policy, [(problem, cut)], 6, "probe")
            assert group[0].cut == cut and ids_of(group) == ids_of(alone) == ids_of(fresh)
            for a, b in zip(group, fresh):
                assert a.anchor_ids == problem.expert_ids[:cut]
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize("divide_by_std, scale", [(True, 1.0), (False, 3**0.5 / 4)])
def test_an_accepted_probe_takes_the_place_of_the_failed_group(make, divide_by_std, scale):
    """Solved unaided, solved behind its fourth anchor, never solved: the plain group, the probe and the
    failed group. A branched group has its own baseline: its success gets +sqrt(3), the others -1/sqrt(3);
    mixed with the failed rollouts, which would be blamed too, it would be +sqrt(7) and -1/sqrt(7). What
    other ranks are told of it are numbers, less than the ids of the rollouts; metrics count it."""
    needed = {"train-4": 0, "train-5": 28}
    policy, problems = make(lambda problem, cut: int(cut >= needed.get(problem.id, 99)))
    easy, hard, hopeless = problems[4:7]
    groups = bread.bread(policy, [easy, hard, hopeless], State(step=2))
    bread.set_advantages(groups, divide_by_std)
    assert [[rollout.cut for rollout in group] for group in groups] == [[0] * G, [28] * G, [0] * G]
    for group in groups[:2]:
        advantages = [rollout.advantage / scale for rollout in group]
        assert advantages == pytest.approx([3**0.5] + [-(3**-0.5)] * 3)
    assert [rollout.advantage for rollout in groups[2]] == [0.0] * G
    probes = policy.probes
    told = policy.tell(groups, {}, {hard.id: "seen", "another": 1})
    assert policy.counts == policy.shown == {} and policy.probes == [], "counting starts anew"
    assert told["probes"] == probes and told["memory"] == {hard.id: "seen"}
    used, shown = ({id: cut for id, cut in told[name].items() if cut} for name in ("used", "shown"))
    assert used == {hard.id: 28} and shown == {hard.id: 28, hopeless.id: hopeless.cuts[-1]}
    assert all(isinstance(number, (int, float)) for number in told["counts"].values())
    assert len(json.dumps(told)) < len(json.dumps([ids_of(group) for group in groups]))
    row = report.step_metrics(collections.Counter(told["counts"]))
    expected = {"anchor/searched": 2, "anchor/accepted": 1, "anchor/probes": len(probes),
                "anchor/fraction": 28 / len(hard.expert_ids), "reward": 1 / 12, "reward/train": 2 / 12,
                "frac_reward_zero_std": 1 / 3}
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_bread_is_grpo_where_nothing_fails(make):
    """One success in every group: the same rollouts, token for token, and no probe is made."""
    policy, problems = make(lambda problem, cut: 1)
    first, second = (method(policy, problems[3:6], State()) for method in (bread.bread, bread.grpo))
    assert ids_of(flat(first)) == ids_of(flat(second))
    assert policy.probes == [] and policy.counts["searched"] == policy.counts["groups/probe"] == 0


@pytest.mark.parametrize("method", [bread.bread, bread.grpo])
@pytest.mark.parametrize("on_fail, advantages", [
    ("skip", [0.0] * G), ("resample", [3**0.5] * 2 + [-(3**-0.5)] * 6),
    ("expert", [-(3**-0.5)] * 3 + [3**0.5])])
def test_what_becomes_of_a_failed_group_without_anchor(make, method, on_fail, advantages):
    """skip: as it is, without gradient. resample: G more plain rollouts join (2 of them right here: 2 of
    8). expert: the whole trace and a stop token take the place of one failure, with the log-probs of the
    policy."""
    policy, problems = make(lambda problem, cut: 0, on_fail=on_fail)
    policy.successes = lambda problem, cut: 2 * (policy.counts["groups/base"] == 1 and cut == 0)
    problem = problems[4]
    group, = method(policy, [problem], State())
    bread.set_advantages([group], divide_by_std=True)
    assert sorted(rollout.advantage for rollout in group) == pytest.approx(sorted(advantages))
    *_, last = group
    if on_fail == "expert":
        assert (last.finish_reason, last.reward, last.cut) == ("expert", 1.0, len(problem.expert_ids))
        assert last.completion_ids == problem.expert_ids + [policy.tokenizer.eos_id]
        logprobs_N, _ = token_logprobs(policy, policy.model, last)
        assert last.logprobs == pytest.approx(logprobs_N.tolist(), abs=1e-5)
    assert all(rollout.cut == 0 or rollout is last for rollout in group) and not last.anchor_ids
    extra = group[G:] if on_fail == "resample" else []
    assert policy.counts["tokens/resample"] == sum(map(len, ids_of(extra)))


def test_resampling_is_one_batched_call_and_equals_separate_ones(make):
    """Three failed groups get their second try in one prefill; since noise depends on ids alone, the
    samples are those of a call for each. The group that did not fail is left alone."""
    policy, problems = make(lambda problem, cut: problem.id == "train-5", on_fail="resample")
    groups = bread.sample_groups(policy, [(problem, 0) for problem in problems[4:8]], 3, "base")
    prefills = watch_prefills(policy)
    more = bread.after_failure(policy, groups, 3)
    assert prefills == [sum(len(problems[i].prompt_ids) for i in (4, 6, 7))] and more[1] is groups[1]
    for i in (0, 2, 3):
        alone, = bread.sample_groups(policy, [(problems[4 + i], 0)], 3, "resample")
        assert more[i][:G] == groups[i] and ids_of(more[i][G:]) == ids_of(alone)


# ---------------------------------------------------------------- problems and evaluation


@pytest.mark.parametrize("count", [1, 4, 5, 11, 12])
def test_problems_come_once_a_step_and_equally_often(make, count):
    """Also where an epoch of 12 problems is no multiple of the step (draws are keyed by problem: a second
    group would repeat the first). Over 120 draws no two counts differ by more than 5; independent draws
    would by 10. What a step gets depends on seed and step only; an epoch that is a multiple is a
    permutation, of its own order."""
    _, problems = make()

    def ids(step, seed=0):
        return [p.id for p in bread.next_problems(problems, Config(problems_per_step=count, seed=seed), step)]
    steps = [ids(step) for step in range(120 // count)]
    assert all(len(set(step)) == len(step) == count for step in steps)
    drawn = collections.Counter(itertools.chain(*steps))
    assert len(drawn) == 12 and max(drawn.values()) - min(drawn.values()) <= 5
    assert ids(7) == steps[7] != ids(7, seed=1)
    if 12 % count == 0:
        length = 12 // count
        epochs = [tuple(itertools.chain(*steps[i:i + length])) for i in range(0, len(steps), length)]
        assert {len(set(epoch)) for epoch in epochs} == {12} and len(set(epochs)) == len(epochs)


def test_evaluation_uses_no_anchor_and_costs_no_training_tokens(make):
    """Every rollout of an evaluation starts at the bare question; tokens/sampled, the cost of training,
    stays 0. A resumed run does not evaluate its step again."""
    policy, problems = make(lambda problem, cut: 1, group_size=3, eval_samples=3)
    state = State()
    for _ in range(2):
        bread.evaluate(policy, Ranks("cpu"), problems[:3], state, None)
    assert {cut for _, cut in policy.asked} == {0} and len(policy.asked) == 3 * (3 + 1)
    assert report.training_tokens(state.tokens) == 0 < state.tokens["eval"]
    row, = state.evals
    assert row["eval/accuracy"] == pytest.approx(1 / 3) and row["eval/greedy"] == pytest.approx(1 / 3)


# ---------------------------------------------------------------- advantages and losses


def test_advantages_equal_numpys():
    """(r - mean) / population std, and without the division; sums are 0 to float32 rounding of numbers
    near 1. Equal rewards and groups of one give exactly 0: the mean of 7 times 0.1 is not 0.1 in float32."""
    for size, seed in itertools.product((2, 3, 8, 17), range(20)):
        rewards = np.random.default_rng(seed).integers(0, 2, size).astype(np.float32)
        centred = rewards - rewards.mean()
        expected = centred / rewards.std() if rewards.std() > 0 else np.zeros(size)
        rewards_G = torch.tensor(rewards)
        np.testing.assert_allclose(group_advantages(rewards_G), expected, atol=1e-5)
        np.testing.assert_allclose(group_advantages(rewards_G, divide_by_std=False), centred, atol=1e-6)
        assert abs(group_advantages(rewards_G).sum().item()) < 1e-5 * size
    for reward, size, divide in itertools.product([0.0, 1.0, 0.1, 1 / 3], [1, 3, 7, 10], [True, False]):
        assert group_advantages(torch.full((size,), reward), divide).tolist() == [0.0] * size


def random_inputs(seed, B=6, T=9, spread=0.3):
    """float64 (logprobs, old, advantages, mask), all (B, T): rows of unequal length, ratios on both sides
    of the clip."""
    generator = torch.Generator().manual_seed(seed)
    new_BT, old_BT = (-2 + spread * torch.randn(B, T, generator=generator).double() for _ in range(2))
    advantages_B1 = torch.randn(B, 1, generator=generator).double()
    lengths_B1 = torch.randint(1, T + 1, (B, 1), generator=generator)
    mask_BT = (torch.arange(T) < lengths_B1).double().roll(1, dims=1)
    return new_BT, old_BT, advantages_B1.expand(B, T), mask_BT


def weights_of(mask_BT, mean):
    """What a token counts: in a mean over tokens, over rows of their token means, or as a share of B x T
    places."""
    denominators = {"token": mask_BT.sum(), "sequence": mask_BT.sum(1, keepdim=True) * len(mask_BT),
                    "constant": torch.tensor(mask_BT.numel())}
    return mask_BT / denominators[mean]


def loop_loss(new_BT, old_BT, advantages_BT, mask_BT, low, high, mean):
    """The oracle: one token at a time, in plain numbers."""
    rows = []
    for row in zip(*(x.tolist() for x in (new_BT, old_BT, advantages_BT, mask_BT))):
        rows.append([])
        for new, old, advantage, is_active in zip(*row):
            if is_active:
                ratio = math.exp(new - old)
                clipped = min(max(ratio, 1 - low), 1 + high)
                rows[-1].append(min(ratio * advantage, clipped * advantage))
    return -np.mean(sum(rows, [])) if mean == "token" else -np.mean([np.mean(terms) for terms in rows])


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.28), (0.0, 0.0)])
@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_loss_equals_a_loop_over_tokens_padded_and_packed(mean, low, high):
    """To float64 rounding. (N,) packed gives the value and gradient of (B, T) padded, whatever finite junk
    the padding holds, and there the gradient is exactly 0."""
    for seed, junk in enumerate((0.0, 1e4, -1e4)):
        *inputs, mask_BT = random_inputs(seed)
        weights_BT = weights_of(mask_BT, mean)
        expected = loop_loss(*inputs, mask_BT, low, high, mean)
        packed = [x[mask_BT > 0].requires_grad_() for x in (*inputs[:2], inputs[2] + 0, weights_BT)]
        padded = [x.masked_fill(mask_BT == 0, junk * i).requires_grad_() for i, x in enumerate(inputs, 1)]
        for *x, weights in (packed, (*padded, weights_BT)):
            loss = grpo_loss(*x, weights, low, high) + 0 * k3_divergence(x[0], x[1], weights)
            loss.backward()
            assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert torch.equal(padded[0].grad[mask_BT > 0], packed[0].grad)
        assert (padded[0].grad[mask_BT == 0] == 0).all() and packed[0].grad.norm() > 0.01


def trl_cases():
    golden = json.loads((ROOT / "tests" / "golden" / "trl_loss.json").read_text())
    return [pytest.param(golden, case, id=f"{case['loss_type']}-{case['clip_high']}-kl{case['kl']}")
            for case in golden["cases"]]


@pytest.mark.parametrize("golden, case", trl_cases())
def test_loss_and_gradient_equal_trls(golden, case):
    """TRL 1.16.0 on the same numbers (golden/make_trl_loss.py), clip and k3 included, to float64 rounding.
    Its "grpo" is the sequence mean, "bnpo" the token mean of a batch, "dapo" that of an update in
    micro-batches. Its "dr_grpo" is the sum of "bnpo" over B x T places, whatever the lengths."""
    new_BT, old_BT, reference_BT, advantages_B = (torch.tensor(golden[name], dtype=torch.float64) for name in
                                                  ("logprobs", "old_logprobs", "reference", "advantages"))
    mask_BT = (torch.arange(new_BT.shape[1]) < torch.tensor(golden["lengths"])[:, None]).double()
    tokens = mask_BT.sum().item()
    forms = {"grpo": [(weights_of(mask_BT, "sequence"), 1)],
             "dapo": [(mask_BT / (tokens + golden["other_tokens"]), 1)],
             "bnpo": [(weights_of(mask_BT, "token"), 1),
                      (weights_of(mask_BT, "constant"), tokens / mask_BT.numel())]}
    for weights_BT, scale in forms[case["loss_type"]]:
        leaf_BT = new_BT.clone().requires_grad_()
        loss = grpo_loss(leaf_BT, old_BT, advantages_B[:, None], weights_BT, case["clip_low"],
                         case["clip_high"])
        loss = loss + case["kl"] * k3_divergence(leaf_BT, reference_BT, weights_BT)
        loss.backward()
        assert loss.item() == pytest.approx(scale * case["loss"], rel=1e-12)
        expected_BT = scale * torch.tensor(case["gradient"], dtype=torch.float64)
        torch.testing.assert_close(leaf_BT.grad, expected_BT, rtol=1e-12, atol=1e-15)


BIG, SMALL = math.exp(20), math.exp(-20)


@pytest.mark.parametrize("advantage, ratio, value, slope", [
    (2.0, 0.5, 0.5, 0.5), (2.0, 1.1, 1.1, 1.1), (2.0, 1.5, 1.3, 0.0),         # A > 0 is clipped above only
    (-2.0, 0.5, 0.9, 0.0), (-2.0, 0.95, 0.95, 0.95), (-2.0, 1.5, 1.5, 1.5),   # A < 0 is clipped below only
    (2.0, math.inf, 1.3, 0.0), (2.0, 0.0, SMALL, 0.0), (-2.0, math.inf, BIG, 0.0), (-2.0, 0.0, 0.9, 0.0)])
def test_clip_in_all_regions(advantage, ratio, value, slope):
    """Clip 0.1 below, 0.3 above. The objective is value * A, its slope in the log-prob is slope * A; where
    the clip made it 0 the token counts as clipped. A ratio of e^10000 or its inverse, of a real token,
    ends at e^20 or e^-20: in float32, where e^89 overflows, loss and gradient stay finite, and the other
    token's gradient is its own."""
    log_ratio = 1e4 if ratio == math.inf else math.log(ratio or 1e-300) * (1 if ratio else 20)
    new_N = torch.tensor([log_ratio, 0.0], requires_grad=True)
    old_N = torch.zeros(2)
    advantages_N = torch.full((2,), advantage)
    loss = grpo_loss(new_N, old_N, advantages_N, torch.ones(2), 0.1, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(-(value + 1) * advantage, rel=1e-6)
    assert new_N.grad.tolist() == pytest.approx([-slope * advantage, -advantage], rel=1e-6)
    batch = SimpleNamespace(rollouts=[SimpleNamespace(finish_reason="stop")], old_logprobs_N=old_N,
                            expand=lambda values: torch.ones(2), advantages_N=advantages_N)
    sums = collections.Counter()
    report.measure(Config(clip_low=0.1, clip_high=0.3), batch, new_N.detach(), torch.ones(2), True, sums)
    assert sums["clipped"] == (value in (0.9, 1.3)) and sums["gap"] == pytest.approx(abs(log_ratio))


def test_k3_is_never_negative_and_zero_where_both_agree():
    """Of one token each, below and above; its gradient is TRL's (above)."""
    new_BT, reference_BT, _, mask_BT = random_inputs(0, spread=1.0)
    tokens = zip(new_BT.flatten(), reference_BT.flatten(), mask_BT.flatten())
    assert all(k3_divergence(*token) >= 0 for token in tokens)
    assert k3_divergence(new_BT, new_BT, mask_BT) == 0 < k3_divergence(new_BT, reference_BT, mask_BT)


# ---------------------------------------------------------------- the update


class Recorder:
    """Stands where the optimizer stands: keeps the gradient of every step, flat, in float64; changes no
    weight."""

    def __init__(self, policy):
        self.weights = list(policy.model.parameters())
        self.gradients = []

    def step(self, lr, max_norm, loss):
        self.gradients.append(torch.cat([weight.grad.double().flatten() for weight in self.weights]))
        for weight in self.weights:
            weight.grad = None
        return self.gradients[-1].norm().item()


def gradient_of(policy, groups, ranks=None, loss_of=bread.batch_loss, **fields):
    """(gradient of `update`, its sums); keywords are fields of Config."""
    recorder = Recorder(policy)
    changed = SimpleNamespace(**vars(policy) | {"config": dataclasses.replace(policy.config, **fields)})
    sums, _ = bread.update(changed, recorder, ranks or Ranks("cpu"), groups, 1e-3, loss_of)
    return recorder.gradients[0], sums


def other_model():
    """The example's model with noise on its weights: a reference that differs."""
    model = Transformer.from_pretrained(CHAIN / "model")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
    return model


def mixed_groups(policy, problems, drift=0.3):
    """Five groups that the policy sampled, of ragged lengths with made-up rewards, three of them anchored;
    one rollout is an expert's trace; the fourth group has equal rewards; the last two stand behind a
    context of one token (an empty prefix) and behind the first one's question. Old log-probs are moved by
    `drift`, as if the policy had moved since: ratios are not 1, and some tokens are clipped."""
    short = dataclasses.replace(problems[7], prompt_ids=problems[7].prompt_ids[:1])
    points = [(problems[4], 0), *((problems[i], problems[i].cuts[i % 3]) for i in (5, 6, 8))]
    groups = bread.sample_groups(policy, points, 0, "base")
    groups += bread.sample_groups(policy, [(short, 0), (problems[4], 0)], 0, "resample")
    groups[0][-1], = bread.expert_rollouts(policy, [problems[4]])
    rng = random.Random(0)
    for i, rollout in enumerate(flat(groups)):
        keep = 1 + 5 * i % len(rollout.completion_ids)
        rollout.completion_ids = rollout.completion_ids[:keep]
        rollout.logprobs = [logprob + rng.gauss(0, drift) for logprob in rollout.logprobs[:keep]]
        rollout.reward = float((i // 4 + i) % 3 == 0 and i // 4 != 3)
    bread.set_advantages(groups, divide_by_std=True)
    return groups


def token_logprobs(policy, model, rollout):
    """(log-probs (N,) of a completion, with a gradient, and entropies (N,)): the rollout alone in a full
    row."""
    ids = torch.tensor(rollout.prompt_ids + rollout.anchor_ids + rollout.completion_ids)
    N = len(rollout.completion_ids)
    logits_NV = model.logits(model(ids[None])[0, -N - 1:-1]) / policy.config.temperature
    logprobs_NV = logits_NV.log_softmax(-1)
    return logprobs_NV[range(N), ids[-N:]], -(logprobs_NV.exp() * logprobs_NV).sum(-1).detach()


def one_at_a_time(policy, groups, loss_mean="token", kl=0.0, cap=0.0):
    """The oracle: every rollout alone through the model, the objective written out. Returns (gradient,
    loss)."""
    rollouts = flat(groups)
    num_tokens = sum(map(len, ids_of(rollouts)))
    loss = 0.0
    for r in rollouts:
        new = token_logprobs(policy, policy.model, r)[0]
        reference = token_logprobs(policy, policy.reference or policy.model, r)[0].detach()
        sampler = new.detach() if cap and r.finish_reason == "expert" else torch.tensor(r.logprobs)
        weights = (new.detach() - sampler).exp().clamp(max=cap) if cap else 1.0
        ratio = (new - (new.detach() if cap else sampler)).exp()
        d = reference - new
        terms = torch.min(ratio * r.advantage, ratio.clamp(0.8, 1.2) * r.advantage) - kl * (d.exp() - d - 1)
        count = num_tokens if loss_mean == "token" else len(new) * len(rollouts)
        part = -(weights * terms).sum() / count
        part.backward()
        loss += part.item()
    recorder = Recorder(policy)
    recorder.step(0, 0, loss)
    return recorder.gradients[0], loss


@pytest.mark.parametrize("size, loss_mean, kl, cap, recompute, num_ranks", [
    (1, "token", 0.0, 0.0, False, 1), (3, "sequence", 0.0, 1.1, True, 1), (5, "token", 0.1, 1.1, False, 2),
    (100, "sequence", 0.1, 0.0, False, 3), (8, "token", 0.1, 0.0, True, 1)])
def test_gradient_equals_one_rollout_at_a_time(make, size, loss_mean, kl, cap, recompute, num_ranks):
    """Whatever the micro-batches, the order of rollouts, what is shared or recomputed, and how groups fall
    to ranks; with both means, the KL term and capped importance weights (on every term; denominators count
    tokens): 5e-6 of the norm is some float32 roundings of the sum. Only completions have a loss; a group
    with equal rewards counts in both means and is run for the KL term alone; --kl 0 loads no reference."""
    policy, problems = make(temperature=0.7, recompute=recompute)
    assert policy.reference is None and policy.model.recompute == recompute
    policy.reference = other_model() if kl else None
    groups = mixed_groups(policy, problems)
    expected, loss = one_at_a_time(policy, groups, loss_mean, kl, cap)
    run = groups if kl else [[r for r in group if r.advantage] for group in groups]
    whole = {"tokens": sum(map(len, ids_of(flat(groups)))), "rollouts": len(flat(groups)),
             "trained": len(flat(run))}
    shuffled = [random.Random(g).sample(group, len(group)) for g, group in enumerate(groups)][::-1]
    gradient, sums = 0.0, collections.Counter()
    for rank in range(num_ranks):
        ranks = SimpleNamespace(total=lambda mine: whole) if num_ranks > 1 else Ranks("cpu")
        mine, counts = gradient_of(policy, shuffled[rank::num_ranks], ranks, micro_batch_size=size,
                                   loss_mean=loss_mean, kl=kl, importance_cap=cap)
        gradient = gradient + mine
        sums.update(counts)
    assert (gradient - expected).norm() < 5e-6 * expected.norm()
    assert sums["loss"] == pytest.approx(loss, abs=1e-6) and abs(loss) > 1e-3
    if num_ranks == 1:
        contexts = {tuple(r.prompt_ids + r.anchor_ids) for r in flat(run)}
        passed = sum(len(context) - 1 for context in contexts) + sum(map(len, ids_of(flat(run))))
        assert sums["tokens/trained"] == passed, "every context once, every completion once"


@pytest.mark.parametrize("cap", [0.0, 1.2])
def test_old_logprobs_and_weights_stay_fixed_over_the_updates_of_a_batch(make, cap):
    """Three updates, while the policy moves. With a cap the old log-probs are the trainer's of the first
    pass, and a token's weight min(cap, trainer's / sampler's probability), 1 on the expert's; without, the
    sampler's and none. The metric is the mean of the ratios. A token that the trainer thinks impossible (a
    ratio below e^-104) has weight 0."""
    policy, problems = make(updates_per_batch=3, micro_batch_size=100, importance_cap=cap)
    groups = mixed_groups(policy, problems, drift=0.5)[:1]
    rows = sorted(groups[0], key=lambda rollout: -len(rollout.completion_ids))
    if cap:
        next(row for row in rows if row.finish_reason != "expert").logprobs[0] = 200.0
    exact_N = torch.cat([token_logprobs(policy, policy.model, row)[0].detach() for row in rows])
    sampler_N = torch.cat([torch.tensor(row.logprobs) for row in rows])
    is_sampled_N = torch.cat([torch.full((len(row.logprobs),), row.finish_reason != "expert")
                              for row in rows])
    factors_N = torch.where(is_sampled_N, (exact_N - sampler_N).exp().clamp(max=cap or math.inf), 1.0)
    seen = []

    def loss_of(config, batch, logprobs_N):
        seen.append((batch.old_logprobs_N.clone(), batch.weights_N.clone(), logprobs_N.detach()))
        return bread.batch_loss(config, batch, logprobs_N)
    optimizer = MasterAdamW(policy.model.parameters(), Ranks("cpu"))
    sums, norms = bread.update(policy, optimizer, Ranks("cpu"), groups, 1e-3, loss_of)
    (old_1, weights_1, new_1), (_, _, new_2), (_, _, new_3) = seen
    assert len(norms) == 3
    for old_N, weights_N, _ in seen[1:]:
        assert torch.equal(old_N, old_1) and torch.equal(weights_N, weights_1)
    torch.testing.assert_close(old_1, exact_N if cap else sampler_N, rtol=0, atol=1e-5)
    expected_N = (factors_N if cap else torch.ones_like(factors_N)) / len(factors_N)
    torch.testing.assert_close(weights_1, expected_N, rtol=1e-4, atol=1e-8)
    assert not cap or (factors_N == cap).any() and (factors_N == 0).any()
    assert (new_2 - new_1).abs().max() > 1e-3 and (new_3 - new_2).abs().max() > 1e-3
    mean = factors_N[is_sampled_N].mean().item()
    assert report.step_metrics(sums)["sampler/importance_weight"] == pytest.approx(mean, rel=1e-4)


def test_metrics_of_an_update_are_means_over_its_tokens(make):
    """Old log-probs lowered by 0.5: the gap is 0.5, every token of A > 0 (ratio 1.65) is clipped, none of
    A < 0; loss and entropy are those of an oracle, not of the last micro-batch."""
    policy, problems = make()
    groups = mixed_groups(policy, problems)[1:3]
    totals = collections.Counter()
    for r in flat(groups):
        new_N, entropies_N = token_logprobs(policy, policy.model, r)
        r.logprobs = [logprob - 0.5 for logprob in new_N.tolist()]
        objective = len(new_N) * r.advantage * (1.2 if r.advantage > 0 else math.exp(0.5))
        totals.update(tokens=len(new_N), clipped=len(new_N) * (r.advantage > 0), gap=0.5 * len(new_N),
                      entropy=entropies_N.sum().item(), loss=-objective)
    row = report.step_metrics(gradient_of(policy, groups, micro_batch_size=3)[1])
    names = {"clip_fraction": "clipped", "sampler/logprob_gap": "gap", "entropy": "entropy", "loss": "loss"}
    expected = {name: totals[total] / totals["tokens"] for name, total in names.items()}
    assert {name: row[name] for name in names} == pytest.approx(expected, rel=1e-4)


def test_sft_minimises_the_cross_entropy_of_trace_and_stop_token(make):
    """The mean over all trace tokens of the update; the question is context, the stop token is learnt.
    Nothing is sampled, so there is nothing to compare with a sampler."""
    policy, problems = make(method="sft", micro_batch_size=2)
    groups = bread.sft(policy, problems[2:6], State())
    assert ids_of(flat(groups)) == [p.expert_ids + [policy.tokenizer.eos_id] for p in problems[2:6]]
    nll_N = -torch.cat([token_logprobs(policy, policy.model, rollout)[0] for rollout in flat(groups)])
    _, sums = gradient_of(policy, groups, loss_of=bread.sft.loss)
    assert sums["loss"] == pytest.approx(nll_N.mean().item(), rel=1e-5)
    assert report.step_metrics(sums)["sampler/logprob_gap"] is None
    assert policy.counts["rollouts/base"] == 0 and policy.shown[problems[4].id] == len(problems[4].expert_ids)


@pytest.mark.parametrize("junk", [lambda x: x * math.nan, lambda x: x * math.inf, lambda x: x + math.nan])
def test_what_is_not_finite_or_has_no_gradient_changes_nothing(make, junk):
    """No weight and no moment moves, by a bit, where a loss or gradient is not finite, neither where the
    loss alone is NaN: the norm is None. Where all rewards are equal there is no step at all. The next
    sound update works as ever."""
    policy, problems = make(updates_per_batch=2)
    groups = mixed_groups(policy, problems)[1:3]
    equal = [[dataclasses.replace(rollout, advantage=0.0) for rollout in group] for group in groups]
    optimizer = MasterAdamW(policy.model.parameters(), Ranks("cpu"))
    states = []
    for batch, loss_of, expected, skipped in (
            (groups, bread.batch_loss, [False] * 2, 0),
            (groups, lambda config, batch, logprobs_N: junk(logprobs_N).sum(), [True] * 2, 2),
            (equal, bread.batch_loss, [], 2),
            (groups, bread.batch_loss, [False] * 2, 0)):
        sums, norms = bread.update(policy, optimizer, Ranks("cpu"), batch, 1e-3, loss_of)
        states.append({name: tensor.clone() for name, tensor in optimizer.state().items()})
        assert [norm is None for norm in norms] == expected
        assert optimizer.skipped_in_a_row == skipped and (expected or sums["loss"] == 0)
    for later in states[1:3]:
        assert all(torch.equal(tensor, later[name]) for name, tensor in states[0].items())
    assert not torch.equal(states[2]["0.master"], states[3]["0.master"])


def test_the_rate_of_a_step_is_decided_before_it():
    """A linear warm-up to --lr; a decay that ends one step behind the last one; of a token budget what was
    spent before the step counts, so its last step has the whole rate, and with a decay more than 0."""
    def rates(num, tokens=0, **fields):
        config = Config(lr=1.0, **fields)
        return [bread.learning_rate(config, State(step, {"base": tokens * step})) for step in range(num)]
    assert rates(5, steps=5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(3, steps=3) == [1.0] * 3
    assert rates(4, steps=4, lr_decay=0.5) == [1.0, 1.0, 1.0, 0.5]
    assert rates(2, tokens=90, steps=9, token_budget=100) == [1.0, 1.0]
    assert rates(2, tokens=90, steps=9, token_budget=100, lr_decay=0.5) == pytest.approx([1.0, 0.2])
    state = State(2, {"base": 60, "probe": 30, "resample": 10, "eval": 999})
    assert state.progress(Config(token_budget=100)) == 1 > state.progress(Config(token_budget=101))
    assert State().progress(Config(steps=0)) == 1
