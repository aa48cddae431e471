"""Claims about the algorithm of bread.py: groups, search, advantages, losses and the update, on the embedded
example. `Paid` is a policy that samples with the real model and reads its rewards from a table."""
import collections
import dataclasses
import itertools
import json
import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch

import bread
import report
from bread import State, group_advantages, grpo_loss, k3_divergence
from config import Config
from conftest import CHAIN, ROOT, capturing, drive
from model import Transformer, linear_logprob
from parallel import MasterAdamW, Ranks
from sampler import Completion

G = 4
GOLDEN = json.loads((ROOT / "tests" / "golden" / "trl_loss.json").read_text())
pytestmark = pytest.mark.usefixtures("one_thread")


class Paid(bread.Policy):
    """The first successes(problem, cut) rollouts of a group are right; without a table, those that are."""

    def __init__(self, config, successes):
        super().__init__(config, torch.device("cpu"), config.model)
        self.successes = successes
        self.asked = []  # (problem id, cut) of every rollout

    def judge(self, problem, cut, context, completion):
        rollout = super().judge(problem, cut, context, completion)
        if self.successes:
            rollout.reward = float(len(self.asked) % self.config.group_size < self.successes(problem, cut))
            self.asked.append((problem.id, cut))
        return rollout


@pytest.fixture(scope="module")
def make(data):
    """make(...) -> (policy, its 12 problems); keywords are `successes` and fields of Config."""
    def policy_and_problems(successes=None, **fields):
        defaults = dict(model=f"{CHAIN / 'model'}", data=f"{data / 'train.jsonl'}", device="cpu",
                        group_size=G, problems_per_step=3, max_new_tokens=72)
        policy = Paid(Config(**defaults | fields), successes)
        return policy, policy.read(bread.bread, print)[0]
    return policy_and_problems


def ids_of(group):
    return [rollout.completion_ids for rollout in group]


def flat(groups):
    return [rollout for group in groups for rollout in group]


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
    """It uses up the answer's room as a prefilled anchor does, so that the placements are comparable. The
    reward does not read it; it does read a prefilled anchor, which is the start of the answer."""
    policy, problems = make(anchor_placement="hint", max_new_tokens=30, temperature=1e6)
    problem = problems[4]
    for cut in problem.cuts[:3]:
        prompt_ids, anchor_ids = policy.context(problem, cut)
        text = policy.tokenizer.decode(prompt_ids)
        assert anchor_ids == [] and policy.tokenizer.decode(problem.expert_ids[:cut]) in text
        assert text.startswith(problem.question) and "Hint" in text
        group, = bread.sample_groups(policy, [(problem, cut)], 0, "probe")
        assert max(map(len, ids_of(group))) == 30 - cut
    assert policy.context(problem, 0) == (problem.prompt_ids, [])
    done, whole = Completion([policy.tokenizer.eos_id], [-1.0], "stop"), len(problem.expert_ids)
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


def test_a_run_captures_at_most_three_steps(make):
    """Two steps with searches, each with an evaluation, sampled and greedy, in places that last as on CUDA:
    what is sampled, trained and measured is what places made anew for every call give."""
    results = []
    for is_captured in (True, False):
        policy, problems = make(lambda problem, cut: 2 * (cut > 30), eval_every=1, eval_samples=2)
        captured_sizes = []
        notes = []
        if is_captured:
            policy.ops = capturing(captured_sizes, linear_logprob=linear_logprob)
        made = policy.reserve(problems, problems[:5], 1, notes.append)
        optimizer = MasterAdamW(policy.model.parameters(), Ranks("cpu"))
        state = State()
        for step in range(2):
            groups = bread.bread(policy, problems[3 * step:3 * step + 3], state)
            bread.set_advantages(groups, divide_by_std=True)
            sums, norms = bread.update(policy, optimizer, Ranks("cpu"), groups, 1e-3, bread.batch_loss)
            state.step += 1
            bread.evaluate(policy, Ranks("cpu"), problems[:5], state, None)
            results.append((list(map(ids_of, groups)), state.evals[-1]["eval/accuracy"], norms))
        assert state.tokens["probe"] > 0
        if is_captured:
            assert policy.places.places_6R.shape[1] == made.rows and 1 <= len(captured_sizes) <= 3
            assert "K/V" in notes[0] and f"micro-batches of {policy.micro_batch_tokens}" in notes[0]
            # As planned: keys and values of 2 bytes there, of 4 here.
            taken = sum(x.nbytes for x in policy.places.cache.own + policy.places.cache.trunk) / 2
            assert 0.8 * made.always["K/V"] < taken <= made.always["K/V"]
    for (ids, accuracy, norms), others in zip(results[:2], results[2:]):
        assert (ids, accuracy, pytest.approx(norms, rel=1e-4)) == others


def test_a_completion_cut_off_while_thinking_has_no_reward(make):
    """Where the template opens <think>, the completion does not: a thought that never closes is no answer."""
    policy, problems = make()
    problem = dataclasses.replace(problems[0], answer="5")
    for text, reward in ((r"so \boxed{5}, or 6?", 0), (r"so \boxed{6}</think> It is \boxed{5}.", 1)):
        policy.tokenizer = SimpleNamespace(opens_thinking=True, decode=lambda ids: text)
        assert policy.judge(problem, 0, ([7], []), Completion([1], [-1.0], "stop")).reward == reward


def test_a_probe_keeps_its_groups_and_offers_no_cut_without_room(make):
    """An anchor counts toward --max-new-tokens: of the cuts 7, 14, 21, 28, 35 only those below are offered.
    The group of the shortest cut in range is returned, also where the search moved on."""
    policy, problems = make()
    short = problems[0]
    problem = problems[4]
    solved, mixed, failed = [[SimpleNamespace(reward=i < count) for i in range(G)] for count in (G, 2, 0)]
    for max_new_tokens, of, table, expected in (
            (21, problem, {7: failed, 14: failed}, (None, [7, 14])),
            (22, problem, {14: failed, 21: mixed}, (mixed, [14, 21])),
            (99, problem, {21: mixed, 7: failed, 14: solved}, (mixed, [21, 7, 14])),
            (7, problem, {}, (None, [])), (99, short, {}, (None, []))):
        policy.config = dataclasses.replace(policy.config, max_new_tokens=max_new_tokens)
        assert drive(bread.probe(policy.config, policy.cuts(of)), table) == expected


@pytest.mark.parametrize("placement", ["prefill", "hint"])
def test_no_anchor_is_paid_by_itself_whatever_the_reward(make, placement):
    """A user's function that pays what a trace begins with: cuts behind that are none, unless only the prompt
    holds it; a reward below 0 and None are no pay. Ours, of a claim that cuts.py does not see."""
    policy, problems = make(anchor_placement=placement)
    problem = problems[4]
    texts = [policy.tokenizer.decode(problem.expert_ids[:cut]) for cut in problem.cuts]
    others = [None, -1.0]
    policy.reward = lambda text, *_: 1 if text.startswith(texts[2]) else others[len(text) % 2]
    assert policy.cuts(problem) == problem.cuts[:2 if placement == "prefill" else None]
    policy, _ = make()
    parts = ["Think.", "\n\nThe answer is 7, 5.0", "\n\nDone."]
    ids = [policy.tokenizer.encode(part) for part in parts]
    cuts = list(itertools.accumulate(map(len, ids)))
    problem = dataclasses.replace(problem, answer="7, 5", expert_ids=sum(ids, []), cuts=cuts)
    assert policy.cuts(problem) == cuts[:1]


def test_all_searches_run_in_lockstep_and_each_trace_is_prefilled_once(make):
    """Four problems become solvable at different cuts or never: together they ask what each asks alone, with
    the same samples, none twice and at most ceil(log2(5 + 1)) = 3 each; the accepted group is a probe."""
    first = dict(zip(["train-4", "train-5", "train-6"], [0, 2, 4]))
    policy, problems = make(lambda problem, cut: 2 * (cut in problem.cuts[first.get(problem.id, 99):]))
    problems = problems[4:8]
    accepted = bread.search_anchors(policy, problems, 6)
    assert policy.counts["tokens/prefilled"] == sum(len(p.prompt_ids + p.expert_ids) for p in problems)
    asked = {(probe["id"], probe["cut"]) for probe in policy.probes}
    assert asked == set(policy.asked) and len(asked) == len(policy.probes) == policy.counts["groups/probe"]
    for problem, group in zip(problems, list(accepted.values())):
        own = [probe for probe in policy.probes if probe["id"] == problem.id]
        assert 2 <= len(own) <= 3 and policy.shown[problem.id] == max(probe["cut"] for probe in own)
        for probe in own:
            length = len(problem.expert_ids)
            assert probe == {"step": 7, "id": problem.id, "cut": probe["cut"], "of": length,
                             "share": probe["cut"] / length, "rollouts": G,
                             "successes": policy.successes(problem, probe["cut"]),
                             "accepted": bool(group) and probe["cut"] == group[0].cut}
        alone = bread.search_anchors(policy, [problem], 6)[problem.id]
        assert (group is None) == (alone is None) == (problem.id not in first)
        if group:
            cut = problem.cuts[first[problem.id]]
            assert ids_of(group) == ids_of(alone) and {rollout.cut for rollout in group} == {cut}
            assert all(rollout.anchor_ids == problem.expert_ids[:cut] for rollout in group)


@pytest.mark.parametrize("divide_by_std, scale", [(True, 1.0), (False, 3**0.5 / 4)])
def test_an_accepted_probe_takes_the_place_of_the_failed_group(make, divide_by_std, scale):
    """Solved unaided, behind its fourth anchor, never. A branched group has its own baseline: its success has
    +sqrt(3), the others -1/sqrt(3); mixed with the failed rollouts that were +sqrt(7) and -1/sqrt(7)."""
    needed = {"train-4": 0, "train-5": 28}
    policy, problems = make(lambda problem, cut: int(cut >= needed.get(problem.id, 99)))
    _, hard, hopeless = problems[4:7]
    groups = bread.bread(policy, problems[4:7], State(step=2))
    bread.set_advantages(groups, divide_by_std)
    assert [[rollout.cut for rollout in group] for group in groups] == [[0] * G, [28] * G, [0] * G]
    for group, (success, failure) in zip(groups, [(3**0.5, -(3**-0.5))] * 2 + [(0.0, 0.0)]):
        advantages = [rollout.advantage / scale for rollout in group]
        assert advantages == pytest.approx([success] + [failure] * 3)
    # What other ranks are told are numbers, less than the ids of the rollouts; then counting starts anew.
    told = policy.tell(groups, {}, {hard.id: "seen", "another": 1})
    assert policy.counts == policy.shown == {} and policy.probes == []
    assert told["memory"] == {hard.id: "seen"} and max(told["used"].values()) == told["used"][hard.id] == 28
    assert told["shown"] == {hard.id: 28, hopeless.id: hopeless.cuts[-1]}
    assert len(json.dumps(told)) < len(json.dumps([ids_of(group) for group in groups]))
    row = report.step_metrics(collections.Counter(told["counts"]))
    expected = {"anchor/searched": 2, "anchor/accepted": 1, "anchor/probes": len(told["probes"]),
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
    """skip: as it is. resample: G more plain rollouts join, here 2 right ones. expert: the trace and a stop
    token take the place of one failure, with the policy's log-probs. A solved group is left alone."""
    policy, problems = make(lambda problem, cut: 2 * (problem.id == "train-5" or (
        policy.counts["groups/base"] > 0 and cut == 0)), on_fail=on_fail)
    problem = problems[4]
    group, solved = method(policy, problems[4:6], State())
    bread.set_advantages([group], divide_by_std=True)
    assert sorted(rollout.advantage for rollout in group) == pytest.approx(sorted(advantages))
    assert [rollout.reward for rollout in solved] == [1.0, 1.0, 0.0, 0.0]
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
    """The failed groups get their second try in one prefill; since noise depends on ids alone, the samples
    are those of a call for each. The group that did not fail is left alone."""
    policy, problems = make(lambda problem, cut: problem.id == "train-5", on_fail="resample")
    groups = bread.sample_groups(policy, [(problem, 0) for problem in problems[4:8]], 3, "base")
    before = policy.counts["tokens/prefilled"]
    more = bread.after_failure(policy, groups, 3)
    again = sum(len(problems[i].prompt_ids) for i in (4, 6, 7))
    assert policy.counts["tokens/prefilled"] == before + again and more[1] is groups[1]
    for i in (0, 2, 3):
        alone, = bread.sample_groups(policy, [(problems[4 + i], 0)], 3, "resample")
        assert more[i][:G] == groups[i] and ids_of(more[i][G:]) == ids_of(alone)


@pytest.mark.parametrize("count", [1, 4, 5, 11, 12])
def test_problems_come_once_a_step_and_equally_often(make, count):
    """Also where an epoch of 12 problems is no multiple of the step. Over 120 draws no two counts differ by
    more than 5; independent draws would by 10. An epoch is a permutation, decided by seed and step only."""
    _, problems = make()

    def ids(step, seed=0):
        return [p.id for p in bread.next_problems(problems, Config(problems_per_step=count, seed=seed), step)]
    steps = [ids(step) for step in range(120 // count)]
    assert all(len(set(step)) == len(step) == count for step in steps)
    drawn = collections.Counter(sum(steps, []))
    assert len(drawn) == 12 and max(drawn.values()) - min(drawn.values()) <= 5
    assert ids(7) == steps[7] != ids(7, seed=1)
    if 12 % count == 0:
        epochs = {tuple(sum(steps[i:i + 12 // count], [])) for i in range(0, len(steps), 12 // count)}
        assert {len(set(epoch)) for epoch in epochs} == {12} and len(epochs) == 10


def test_evaluation_uses_no_anchor_and_costs_no_training_tokens(make):
    """Of any problem, each counted once; a resumed run does not evaluate its step again."""
    policy, problems = make(lambda problem, cut: 1, group_size=3, eval_samples=3)
    state = State()
    for _ in range(2):
        bread.evaluate(policy, Ranks("cpu"), problems[:3], state, None)
    assert {cut for _, cut in policy.asked} == {0} and len(policy.asked) == 3 * (3 + 1)
    assert report.training_tokens(state.tokens) == 0 < state.tokens["eval"]
    row, = state.evals
    assert row["eval/accuracy"] == row["eval/greedy"] == pytest.approx(1 / 3)


# ---------------------------------------------------------------- advantages and losses


def test_losses_take_one_shape():
    """(B, 1) advantages beside (B, T) log-probs would be broadcast, and rewards of two groups mixed."""
    x_BT = torch.zeros(2, 3)
    for arguments in ((x_BT, x_BT, x_BT[:, :1], x_BT), (x_BT, x_BT[0], x_BT, x_BT)):
        with pytest.raises(ValueError, match="not one shape"):
            bread.grpo_loss(*arguments, 0.2, 0.2)
    for rewards in (x_BT, x_BT[0, 0], x_BT[0, :0]):
        with pytest.raises(ValueError, match=r"not \(G,\)"):
            bread.group_advantages(rewards)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 17])
def test_advantages_are_centred_and_divided_by_the_population_std(size):
    """Not with --no-std. Equal rewards give exactly 0: in float32 the mean of 7 times 0.1 is not 0.1."""
    for reward, divide in itertools.product([0.0, 1.0, 0.1, 1 / 3], [True, False]):
        assert group_advantages(torch.full((size,), reward), divide).tolist() == [0.0] * size
    for right in range(1, size):
        rewards = [1.0] * right + [0.0] * (size - right)
        for divide, scale in ((True, statistics.pstdev(rewards)), (False, 1.0)):
            expected = [(reward - right / size) / scale for reward in rewards]
            found = group_advantages(torch.tensor(rewards), divide).tolist()
            assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids="{0[loss_type]}-{0[clip_high]}-kl{0[kl]}".format)
def test_loss_and_gradient_equal_trls_padded_and_packed(case):
    """TRL 1.16.0 on the same numbers, to float64 rounding: "grpo" is the sequence mean, "bnpo" the token mean
    of a batch, "dapo" of an update. Packed as padded, whatever the padding holds."""
    new_BT, old_BT, reference_BT, advantages_B, lengths_B = (
        torch.tensor(GOLDEN[name], dtype=torch.float64)
        for name in ("logprobs", "old_logprobs", "reference", "advantages", "lengths"))
    expected_BT = torch.tensor(case["gradient"], dtype=torch.float64)
    mask_BT = torch.arange(new_BT.shape[1]) < lengths_B[:, None]
    denominators = {"grpo": len(mask_BT) * lengths_B[:, None], "bnpo": lengths_B.sum(),
                    "dapo": lengths_B.sum() + GOLDEN["other_tokens"]}
    weights_BT = mask_BT / denominators[case["loss_type"]]
    new_BT, old_BT = new_BT.masked_fill(~mask_BT, 1e4), old_BT.masked_fill(~mask_BT, -1e4)
    for layout in (lambda x_BT: x_BT, lambda x_BT: x_BT[mask_BT]):
        old, advantages, weights = map(layout, (old_BT, advantages_B[:, None].expand_as(mask_BT), weights_BT))
        new = layout(new_BT).clone().requires_grad_()
        loss = grpo_loss(new, old, advantages, weights, case["clip_low"], case["clip_high"])
        loss = loss + case["kl"] * k3_divergence(new, layout(reference_BT), weights)
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-12)
        torch.testing.assert_close(new.grad, layout(expected_BT), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.1, 0.28), (0.0, 0.0)])
@pytest.mark.parametrize("mean", ["token", "sequence", "dr_grpo"])
def test_loss_equals_a_float64_loop_over_tokens(mean, low, high):
    """One token at a time in plain numbers, ratios on both sides of the clip; Dr.GRPO's mean (TRL's
    "dr_grpo") is a sum over all B x T places, whatever the lengths."""
    B, T = 6, 9
    rng = random.Random(f"{mean} {low}")
    lengths = [rng.randint(1, T) for _ in range(B)]
    counts = {"token": lambda length: sum(lengths), "sequence": lambda length: B * length,
              "dr_grpo": lambda length: B * T}[mean]
    rows = []  # of every token: log-prob now, then, advantage, weight
    total = 0.0
    for length in lengths:
        advantage = rng.gauss(0, 1)
        for _ in range(length):
            new, old = rng.gauss(-2, 0.3), rng.gauss(-2, 0.3)
            clipped = min(max(math.exp(new - old), 1 - low), 1 + high)
            total -= min(math.exp(new - old) * advantage, clipped * advantage) / counts(length)
            rows.append((new, old, advantage, 1 / counts(length)))
    loss = grpo_loss(*torch.tensor(rows, dtype=torch.float64).T, low, high)
    assert loss.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("advantage, log_ratio, value", [
    (2.0, 1e4, 1.3), (2.0, -1e4, math.exp(-20)), (-2.0, 1e4, math.exp(20)), (-2.0, -1e4, 0.9)])
def test_ratios_that_overflow_leave_the_rest_of_the_batch_alone(advantage, log_ratio, value):
    """A real token's ratio of e^10000 or its inverse ends at e^20 or e^-20; in float32 e^89 overflows."""
    new_N = torch.tensor([log_ratio, 0.0], requires_grad=True)
    loss = grpo_loss(new_N, torch.zeros(2), torch.full((2,), advantage), torch.ones(2), 0.1, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(-(value + 1) * advantage, rel=1e-6)
    assert new_N.grad.tolist() == [0.0, -advantage]


# ---------------------------------------------------------------- the update


def take_gradient(policy):
    """Of all weights, flat, in float64; none is left behind."""
    gradient = torch.cat([weight.grad.double().flatten() for weight in policy.model.parameters()])
    policy.model.zero_grad()
    return gradient


def gradient_of(policy, groups, ranks=None, loss_of=bread.batch_loss):
    """(gradient of `update`, its sums); no weight changes."""
    taken = []
    recorder = SimpleNamespace(step=lambda lr, max_norm, loss: taken.append(take_gradient(policy)))
    sums, _ = bread.update(policy, recorder, ranks or Ranks("cpu"), groups, 1e-3, loss_of)
    return taken[0], sums


def mixed_groups(policy, problems, drift=0.3):
    """Six groups of ragged lengths with made-up rewards, the fourth with equal ones; three are anchored, one
    rollout is an expert's, the fifth stands behind one token (an empty prefix), the last behind the first's
    question. Old log-probs are moved by `drift`: ratios are not 1, and some tokens are clipped."""
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
    """(log-probs (N,) of a completion, with a gradient, and entropies (N,)), alone in a full row."""
    ids = torch.tensor(rollout.prompt_ids + rollout.anchor_ids + rollout.completion_ids)
    N = len(rollout.completion_ids)
    logits_NV = model.logits(model(ids[None])[0, -N - 1:-1]) / policy.config.temperature
    logprobs_NV = logits_NV.log_softmax(-1)
    return logprobs_NV[range(N), ids[-N:]], -(logprobs_NV.exp() * logprobs_NV).sum(-1).detach()


def one_at_a_time(policy, groups, loss_mean="token", kl=0.0, cap=0.0):
    """The oracle, the objective written out, every rollout alone: (gradient, loss)."""
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
    return take_gradient(policy), loss


@pytest.mark.parametrize("size, loss_mean, kl, cap, recompute, num_ranks", [
    (1, "token", 0.0, 0.0, False, 1), (90, "sequence", 0.0, 1.1, True, 1),
    (150, "token", 0.1, 1.1, False, 2), (4096, "sequence", 0.1, 0.0, False, 3),
    (240, "token", 0.1, 0.0, True, 1)])
def test_gradient_equals_one_rollout_at_a_time(make, size, loss_mean, kl, cap, recompute, num_ranks):
    """Whatever the micro-batches, the order of rollouts, what is recomputed, how groups fall to ranks; with
    both means, the KL term and capped importance weights (on every term; denominators count tokens). 5e-6 of
    the norm is some float32 roundings of the sum. Only completions have a loss; --kl 0 loads no reference."""
    policy, problems = make(temperature=0.7, recompute=recompute, micro_batch_tokens=size,
                            loss_mean=loss_mean, kl=kl, importance_cap=cap)
    assert (policy.reference is not None) == (kl > 0) and policy.model.recompute == recompute
    policy.reference = Transformer(policy.model.config).initialize(0) if kl else None
    groups = mixed_groups(policy, problems)
    expected, loss = one_at_a_time(policy, groups, loss_mean, kl, cap)
    run = [rollout for rollout in flat(groups) if rollout.advantage or kl]
    whole = {"tokens": sum(map(len, ids_of(flat(groups)))), "rollouts": len(flat(groups)),
             "trained": len(run)}
    shuffled = [random.Random(g).sample(group, len(group)) for g, group in enumerate(groups)][::-1]
    ranks = SimpleNamespace(total=lambda mine: whole) if num_ranks > 1 else Ranks("cpu")
    parts = [gradient_of(policy, shuffled[rank::num_ranks], ranks) for rank in range(num_ranks)]
    gradient = sum(mine for mine, _ in parts)
    assert (gradient - expected).norm() < 5e-6 * expected.norm()
    assert sum(sums["loss"] for _, sums in parts) == pytest.approx(loss, abs=1e-6) and abs(loss) > 1e-3
    if num_ranks == 1:
        contexts = {tuple(r.prompt_ids + r.anchor_ids) for r in run}
        passed = sum(len(context) - 1 for context in contexts) + sum(map(len, ids_of(run)))
        assert parts[0][1]["tokens/trained"] == passed, "every context once, every completion once"


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_truncated_completions_are_left_out_of_loss_and_denominators(make, loss_mean):
    """--mask-truncated: their reward counts in the group's mean, and they do in nothing else."""
    policy, problems = make(loss_mean=loss_mean, mask_truncated=True)
    groups = mixed_groups(policy, problems)
    for rollout in flat(groups)[::3]:
        rollout.finish_reason = "length"
    masked, _ = gradient_of(policy, groups)
    policy.config = dataclasses.replace(policy.config, mask_truncated=False)
    every, _ = gradient_of(policy, groups)
    kept, _ = gradient_of(policy, [[r for r in group if r.finish_reason != "length"] for group in groups])
    assert (masked - kept).norm() < 5e-6 * kept.norm() and (masked - every).norm() > 0.1 * every.norm()


@pytest.mark.parametrize("kl, cap, fails", [(0.0, 0.0, [0]), (0.1, 1.1, [1, 3, 18])])
def test_a_micro_batch_that_does_not_fit_is_halved_and_no_gradient_changes(make, capsys, kl, cap, fails):
    """The device runs out of memory in the loss of the micro-batches `fails`, counted from 0, of two updates:
    with gradients and log-probs of earlier ones kept. Gradients and sums are those of a run that has
    enough memory; later updates begin with what fits."""
    def gradients(fails):
        policy, problems = make(updates_per_batch=2, micro_batch_tokens=400, kl=kl, importance_cap=cap)
        calls = []

        def loss_of(config, batch, logprobs_N):
            calls.append(len(batch.rows))
            if len(calls) - 1 in fails:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand so on")
            return bread.batch_loss(config, batch, logprobs_N)
        taken = []
        recorder = SimpleNamespace(
            step=lambda lr, max_norm, loss: taken.append((take_gradient(policy), len(calls))))
        sums, _ = bread.update(policy, recorder, Ranks("cpu"), mixed_groups(policy, problems), 1e-3, loss_of)
        return taken, report.step_metrics(sums), policy.micro_batch_tokens
    expected, row, _ = gradients([])
    found, halved_row, tokens = gradients(fails)
    for (ours, _), (theirs, _) in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 5e-6 * theirs.norm()
    assert len(fails) == 1 or fails[1] < found[0][1] <= fails[2], "the last one is in the second update"
    for name in ("loss", "entropy", "clip_fraction", "sampler/logprob_gap", "sampler/importance_weight"):
        assert halved_row[name] == pytest.approx(row[name], rel=1e-5), name
    assert tokens == 400 >> len(fails) and f"micro-batches of {tokens} tokens" in capsys.readouterr().err


def test_no_micro_batch_waits_for_the_device(make):
    """On the meta device, whose numbers nobody can ask for: with a KL term and capped weights, forward and
    backward of all micro-batches are launched, and sums are still on the device."""
    policy, problems = make(kl=0.1, importance_cap=1.2, micro_batch_tokens=300)
    groups = mixed_groups(policy, problems)
    policy.model.to("meta")
    policy.reference.to("meta")
    sums = collections.Counter()
    for pack in bread.make_batches(flat(groups), 300, lambda rollout: 1.0, torch.device("meta")):
        bread.run_pack(policy, *pack, bread.batch_loss, True, sums)
    assert all(weight.grad.is_meta for weight in policy.model.parameters())
    assert all(sums[name].is_meta for name in ("loss", "gap", "clipped", "entropy"))


def test_a_rollout_that_does_not_fit_ends_with_what_to_type(make):
    """Everything is tried before; the line names flags, the gradient is gone."""
    policy, problems = make(micro_batch_tokens=4096)
    sizes = []

    def loss_of(config, batch, logprobs_N):
        sizes.append(len(batch.rows))
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(MemoryError, match="--recompute, --offload"):
        bread.update(policy, None, Ranks("cpu"), mixed_groups(policy, problems), 1e-3, loss_of)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
    assert all(weight.grad is None for weight in policy.model.parameters())


@pytest.mark.parametrize("cap", [0.0, 1.2])
def test_old_logprobs_and_weights_stay_fixed_over_the_updates_of_a_batch(make, cap):
    """Without a cap the sampler's and none. With one the trainer's of the first pass, and min(cap, ratio of
    both), 1 on the expert's tokens, 0 where the trainer thinks a token impossible."""
    policy, problems = make(updates_per_batch=3, micro_batch_tokens=4096, importance_cap=cap)
    groups = mixed_groups(policy, problems, drift=0.5)[:1]
    rows = groups[0]
    if cap:
        next(row for row in rows if row.finish_reason != "expert").logprobs[0] = 200.0
    exact_N = torch.cat([token_logprobs(policy, policy.model, row)[0].detach() for row in rows])
    sampler_N = torch.cat([torch.tensor(row.logprobs) for row in rows])
    is_sampled_N = torch.tensor([row.finish_reason != "expert" for row in rows for _ in row.logprobs])
    ratios_N = torch.where(is_sampled_N, (exact_N - sampler_N).exp().clamp(max=cap or math.inf), 1.0)
    seen = []

    def loss_of(config, batch, logprobs_N):
        seen.append((batch.old_logprobs_N.clone(), batch.weights_N.clone(), logprobs_N.detach()))
        return bread.batch_loss(config, batch, logprobs_N)
    optimizer = MasterAdamW(policy.model.parameters(), Ranks("cpu"))
    sums, _ = bread.update(policy, optimizer, Ranks("cpu"), groups, 1e-3, loss_of)
    olds, weights, news = zip(*seen, strict=True)
    assert len(seen) == 3 and all((a - b).abs().max() > 1e-3 for a, b in zip(news, news[1:]))
    for old_N, weights_N in zip(olds, weights):
        assert torch.equal(old_N, olds[0]) and torch.equal(weights_N, weights[0])
    torch.testing.assert_close(olds[0], exact_N if cap else sampler_N, rtol=0, atol=1e-5)
    expected_N = (ratios_N if cap else torch.ones_like(ratios_N)) / len(ratios_N)
    torch.testing.assert_close(weights[0], expected_N, rtol=1e-4, atol=1e-8)
    assert not cap or (ratios_N == cap).any() and (ratios_N == 0).any()
    mean = ratios_N[is_sampled_N].mean().item()
    assert report.step_metrics(sums)["sampler/importance_weight"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("drift", [0.5, -0.5])
def test_metrics_of_an_update_are_means_over_its_tokens(make, drift):
    """Old log-probs lowered by 0.5: every token of A > 0 (ratio 1.65) is clipped; raised, every one of A < 0.
    Loss and entropy are those of an oracle, not of the last micro-batch."""
    policy, problems = make(micro_batch_tokens=100)
    groups = mixed_groups(policy, problems)[1:3]
    totals = collections.Counter()
    for r in flat(groups):
        new_N, entropies_N = token_logprobs(policy, policy.model, r)
        r.logprobs = [logprob - drift for logprob in new_N.tolist()]
        is_clipped = r.advantage * drift > 0
        ratio = 1 + math.copysign(0.2, drift) if is_clipped else math.exp(drift)
        totals.update({"tokens": len(new_N), "clip_fraction": len(new_N) * is_clipped,
                       "sampler/logprob_gap": 0.5 * len(new_N), "entropy": entropies_N.sum().item(),
                       "loss": -len(new_N) * r.advantage * ratio})
    row = report.step_metrics(gradient_of(policy, groups)[1])
    count = totals.pop("tokens")
    assert all(row[name] == pytest.approx(total / count, rel=1e-4) for name, total in totals.items())


def test_sft_minimises_the_cross_entropy_of_trace_and_stop_token(make):
    """The question is context, the stop token is learnt; there is no sampler to compare with."""
    policy, problems = make(method="sft", micro_batch_tokens=400)
    groups = bread.sft(policy, problems[2:6], State())
    assert ids_of(flat(groups)) == [p.expert_ids + [policy.tokenizer.eos_id] for p in problems[2:6]]
    nll_N = -torch.cat([token_logprobs(policy, policy.model, rollout)[0] for rollout in flat(groups)])
    _, sums = gradient_of(policy, groups, loss_of=bread.sft.loss)
    assert sums["loss"] == pytest.approx(nll_N.mean().item(), rel=1e-5)
    assert report.step_metrics(sums)["sampler/logprob_gap"] is None
    assert policy.counts["rollouts/base"] == 0 and policy.shown[problems[4].id] == len(problems[4].expert_ids)


@pytest.mark.parametrize("tokens, num_ranks", [(1, 1), (700, 1), (10**6, 2)])
def test_the_gradient_of_sft_does_not_depend_on_micro_batches_or_ranks(make, tokens, num_ranks):
    """Traces of 5 and of 150 tokens: every token counts alike, wherever it is."""
    policy, problems = make(method="sft", micro_batch_tokens=tokens)
    groups = bread.sft(policy, problems[2:8], State())
    for n, rollout in enumerate(flat(groups)):
        rollout.completion_ids = (rollout.completion_ids * 9)[:5 if n % 3 else 150]
        rollout.logprobs = [0.0] * len(rollout.completion_ids)
    nll_N = -torch.cat([token_logprobs(policy, policy.model, rollout)[0] for rollout in flat(groups)])
    nll_N.mean().backward()
    expected = take_gradient(policy)
    whole = {"tokens": len(nll_N), "rollouts": len(groups), "trained": len(groups)}
    ranks = SimpleNamespace(total=lambda mine: whole) if num_ranks > 1 else Ranks("cpu")
    gradient = sum(gradient_of(policy, groups[rank::num_ranks], ranks, bread.sft.loss)[0]
                   for rank in range(num_ranks))
    assert (gradient - expected).norm() < 5e-6 * expected.norm()


def test_the_gradient_of_bf16_weights_does_not_depend_on_micro_batches(make):
    """96 micro-batches of a rollout each against all of them at once: what is left, measured 0.0022, is that
    every product is rounded to bf16 once. Summed in bf16, too, it would be several times that."""
    policy, problems = make()
    groups = [group for n in range(4) for group in mixed_groups(policy, problems, drift=0.01 * n)]
    policy.model.bfloat16()
    differences = []
    for is_float32 in (False, True):
        if is_float32:
            MasterAdamW(policy.model.parameters(), Ranks("cpu"))
        policy.micro_batch_tokens = 10**6
        whole, _ = gradient_of(policy, groups)
        policy.micro_batch_tokens = 1
        differences.append(((gradient_of(policy, groups)[0] - whole).norm() / whole.norm()).item())
    assert differences[1] < 0.005 and differences[0] > 3 * differences[1], differences


@pytest.mark.parametrize("junk", [lambda x: x * math.nan, lambda x: x * math.inf, lambda x: x + math.nan])
def test_what_is_not_finite_or_has_no_gradient_changes_nothing(make, junk):
    """No weight and no moment moves, by a bit, where loss or gradient is not finite: the norm is None. Where
    all rewards are equal there is no step at all. The next sound update works as ever."""
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
        _, norms = bread.update(policy, optimizer, Ranks("cpu"), batch, 1e-3, loss_of)
        states.append({name: tensor.clone() for name, tensor in optimizer.state()})
        assert ([norm is None for norm in norms], optimizer.skipped_in_a_row) == (expected, skipped)
    for later in states[1:3]:
        assert all(torch.equal(tensor, later[name]) for name, tensor in states[0].items())
    assert not torch.equal(states[2]["0.master"], states[3]["0.master"])


def test_the_rate_of_a_step_is_decided_before_it():
    """So the last step of a token budget has the whole rate, and with a decay more than 0."""
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
