"""The rules of other papers as methods of bread.py: `python bread.py --method examples/methods.py:r3`

A method is a function (policy, problems, state) -> groups, lists of rollouts of a problem behind one anchor.
It may set advantages and have a `loss` (config, batch, logprobs_N) -> scalar; the default is GRPO's for both.
state.memory[problem.id] holds what it remembers, JSON-able: saved, and shared by all ranks after each step.

Most papers differ in one thing, the cut of the trace that they show. Such a rule is a generator, as BREAD's
search is: it yields a cut in tokens and is sent the mean reward of the group behind it. `every_group` makes
it the paper's method, `where_failed` the control that differs from BREAD in the choice of the cut alone. The
rest of a paper's recipe is not here. --on-fail belongs to BREAD: `where_failed` and `nft` heed it.
Dimension key: N tokens of a micro-batch, end to end
"""
import contextlib
import dataclasses
import functools
import math
import random

import torch

import bread  # the running module, also where bread.py was started as a program

UNAIDED = 0.1    # ours, as the numbers below: AdaBack's share of groups on the bare question
SMOOTHING = 0.5  # AdaPrefix: weight of the newest group in a problem's running success rate
GAIN = 0.5       # AdaPrefix: share of the trace per unit of distance from a success rate of 0.5
DECAY = 0.4      # AdaPrefix: over this last part of the run prefixes shrink to none


def every_group(rule):
    """The method that samples every group behind the cut that `rule` names, 0 being the bare question.

    rule(problem, cuts, rng, state, config): a generator, see above. cuts: those on offer, in tokens, shortest
    first. rng: random.Random of (seed, step, problem), so that runs resume and do not depend on ranks."""
    @functools.wraps(rule)
    def method(policy, problems, state):
        return follow(rule, policy, problems, state, [0])
    method.rule = rule
    return method


def where_failed(rule):
    """The method that is BREAD with one try behind the cut that `rule` names in the place of its search."""
    @functools.wraps(rule)
    def method(policy, problems, state):
        config = policy.config
        high = config.anchor_high or config.group_size - 1
        groups = bread.sample_groups(policy, [(problem, 0) for problem in problems], state.step, "base")
        failed = [problem for problem, group in zip(problems, groups) if bread.num_successes(group) == 0]
        policy.counts["searched"] += len(failed)
        failed = [problem for problem in failed if policy.cuts(problem)]
        accepted = {group[0].problem.id: group for group in follow(rule, policy, failed, state, [])
                    if config.anchor_low <= bread.num_successes(group) <= high}
        groups = [accepted.get(problem.id, group) for problem, group in zip(problems, groups)]
        return bread.after_failure(policy, groups, state.step)
    return method


def follow(rule, policy, problems, state, bare):
    """One group per problem, behind the cut that the rule chooses among `bare`, [0] or [], and the others."""
    config = policy.config
    running = []
    points = []
    for problem in problems:
        cuts = bare + policy.cuts(problem)
        rng = random.Random(bread.noise_id(config.seed, state.step, problem.id))
        running.append(rule(problem, cuts, rng, state, config))
        points.append((problem, next(running[-1])))
    # Only unaided groups are "base": the metric `reward` is the mean of those.
    unaided = bread.sample_groups(policy, [point for point in points if point[1] == 0], state.step, "base")
    aided = bread.sample_groups(policy, [point for point in points if point[1] > 0], state.step, "probe")
    groups = {group[0].problem.id: group for group in unaided + aided}
    # No rule learns before all have named their cuts: so they read what every rank had after the last step.
    for problem, steps in zip(problems, running):
        rewards = [rollout.reward for rollout in groups[problem.id]]
        with contextlib.suppress(StopIteration):
            steps.send(sum(rewards) / len(rewards))
    return [groups[problem.id] for problem in problems]


def nearest(cuts, problem, share):
    """The cut that shows nearest to this share of the trace; of two as near, the shorter."""
    return min(cuts, key=lambda cut: abs(cut - share * len(problem.expert_ids)))


@every_group
def r3(problem, cuts, rng, state, config):
    """R3 (arXiv 2402.05808): a uniform cut, the bare question among them. Theirs is PPO."""
    yield rng.choice(cuts)


@every_group
def prefixrl(problem, cuts, rng, state, config):
    """PrefixRL (arXiv 2601.18795): uniform between 40% and 80% of the trace, here the nearest cut."""
    yield nearest(cuts, problem, rng.uniform(0.4, 0.8))


@every_group
def questa(problem, cuts, rng, state, config):
    """QuestA (arXiv 2507.13266): half of the trace (--anchor-placement hint); no second stage here."""
    yield nearest(cuts, problem, 0.5)


@every_group
def annealed(problem, cuts, rng, state, config):
    """UFT's hints: Binomial(n, p) of the n episodes on offer. Over the first 60% of the run p falls from 0.95
    to 0.05 along half a cosine; after that there are none."""
    progress = state.progress(config)
    p = 0.05 + 0.45 * (1 + math.cos(math.pi * progress / 0.6)) if progress < 0.6 else 0.0
    yield cuts[sum(rng.random() < p for _ in cuts[1:])]


@every_group
def adaback(problem, cuts, rng, state, config):
    """AdaBack (arXiv 2506.18110): a share of the trace drawn from the problem's interval [lo, hi], here the
    nearest cut. Mean reward below 0.5: lo <- share, hi stays; else hi <- share, lo <- 0. An interval begins
    at the mean of all others, the first at [0, 1]. Now and then a group is unaided."""
    known = list(state.memory.values()) or [[0.0, 1.0]]
    lo, hi = state.memory.get(problem.id) or [math.fsum(ends) / len(known) for ends in zip(*known)]
    share = 0.0 if cuts[0] == 0 and rng.random() < UNAIDED else rng.uniform(lo, hi)
    reward = yield nearest(cuts, problem, share)
    # An unaided failure says nothing about prefixes: it must not lower lo.
    state.memory[problem.id] = [max(lo, share), hi] if reward < 0.5 else [0.0, share]


@every_group
def mfc(problem, cuts, rng, state, config):
    """MFC (arXiv 2609.13997): a uniform cut up to the problem's frontier, at first the last one. Mean reward
    of 0.5 or more: the frontier moves there. Failures change nothing, so it never moves back."""
    frontier = state.memory.get(problem.id, cuts[-1])
    cut = rng.choice([cut for cut in cuts if cut <= frontier])
    reward = yield cut
    if reward >= 0.5:
        state.memory[problem.id] = cut


@every_group
def adaprefix(problem, cuts, rng, state, config):
    """AdaPrefix-GRPO (arXiv 2607.07674): a controller per problem holds the success rate near 0.5 by the
    length of the prefix, which late in the run decays to 0. Law and start are ours: theirs is calibrated."""
    share, rate = state.memory.get(problem.id, [0.5, 0.5])
    left = min(1.0, (1 - state.progress(config)) / DECAY)
    reward = yield nearest(cuts, problem, share * left)
    rate += SMOOTHING * (reward - rate)
    share += GAIN * (0.5 - rate)
    state.memory[problem.id] = [min(max(share, 0.0), 1.0), rate]


# The controls: a rule in the place of BREAD's search, and nothing else changed.
random_where_failed = where_failed(r3.rule)
range_where_failed = where_failed(prefixrl.rule)
half_where_failed = where_failed(questa.rule)
uft_where_failed = where_failed(annealed.rule)
adaback_where_failed = where_failed(adaback.rule)
mfc_where_failed = where_failed(mfc.rule)


def loss_with_traces(objective):
    """GRPO's loss for what the policy sampled, -A objective(log-probability) for the tokens of an expert."""
    def loss(config, batch, logprobs_N):
        is_expert_N = batch.expand([rollout.finish_reason == "expert" for rollout in batch.rollouts])
        # Weight 0 keeps these tokens out of the KL term, too, whose estimate is one over sampled tokens.
        sampled = dataclasses.replace(batch, weights_N=batch.weights_N * (1 - is_expert_N))
        gain_N = batch.weights_N * is_expert_N * batch.advantages_N * objective(logprobs_N)
        return bread.batch_loss(config, sampled, logprobs_N) - gain_N.sum()
    return loss


def uft(policy, problems, state):
    """UFT (arXiv 2505.16984): `annealed`, and 0.001 times the log-likelihood of the hint of every rollout."""
    groups = annealed(policy, problems, state)
    hints = []
    for problem, cut in [(group[0].problem, group[0].cut) for group in groups if group[0].cut]:
        # One rollout stands for the hints of all G; its tokens are among those that the loss is a mean over.
        ids = problem.expert_ids[:cut]
        hints.append([bread.Rollout(problem, cut, problem.prompt_ids, [], ids, [0.0] * cut, 1.0, "expert",
                                    advantage=0.001 * policy.config.group_size)])
    return groups + hints


def luffy(policy, problems, state):
    """LUFFY (arXiv 2504.14945): the expert's trace is one of the G rollouts. Its tokens count A p / (p + 0.1)
    without clip: most gradient at p = 0.1, while the plain ratio hardly moves unlikely ones. Use --no-std."""
    points = [(problem, 0) for problem in problems]
    groups = bread.sample_groups(policy, points, state.step, "base", group_size=policy.config.group_size - 1)
    # An advantage given here spares the scoring; the group's replaces it, because group[0] has none yet.
    traces = bread.expert_rollouts(policy, problems, advantage=1.0)
    return [group + [trace] for group, trace in zip(groups, traces)]


def relift(policy, problems, state):
    """ReLIFT (arXiv 2506.07527): GRPO, and SFT on the traces of problems that fail. Theirs has SFT steps in
    between; here it is one combined update, and the tokens of a trace count as if A = 1."""
    groups = bread.sample_groups(policy, [(problem, 0) for problem in problems], state.step, "base")
    failed = [problem for problem, group in zip(problems, groups) if bread.num_successes(group) == 0]
    traces = {trace.problem.id: [trace] for trace in bread.expert_rollouts(policy, failed, advantage=1.0)}
    return [traces.get(problem.id, group) for problem, group in zip(problems, groups)]


def nft_loss(config, batch, logprobs_N):
    """NFT (arXiv 2505.18116): GRPO's groups, no anchor; wrong rollouts train an implicit negative policy.
    With R = pi / pi_old, and r the share of the group's rollouts that are right (rewards of 0 and 1):

        right  -w log R                   wrong  -w log max((1 - r R) / (1 - r), 1)

    w = sqrt((1 - r) / r), which on-policy gives GRPO's gradient; with --no-std 1 - r, which gives Dr.GRPO's.
    """
    is_right_N = batch.advantages_N > 0
    # A = (reward - r) / sqrt(r (1 - r)): A^2 is (1 - r) / r where the rollout is right, else r / (1 - r).
    square_N = batch.advantages_N ** 2
    rate_N = torch.where(is_right_N, 1, square_N) / (1 + square_N)
    if config.no_std:  # A = reward - r
        rate_N = torch.where(is_right_N, 1 - batch.advantages_N, -batch.advantages_N)
    rate_N = rate_N.clamp(0.02, 0.98)  # theirs
    importance_N = 1 - rate_N if config.no_std else ((1 - rate_N) / rate_N).sqrt()
    log_ratio_N = (logprobs_N - batch.old_logprobs_N).clamp(-20, 20)
    implicit_N = (1 - rate_N * log_ratio_N.exp()) / (1 - rate_N)
    # Straight-through: the floor holds for the value alone, so what lies below it keeps a gradient.
    floored_N = implicit_N + (implicit_N.clamp(min=1) - implicit_N).detach()
    objective_N = importance_N * torch.where(is_right_N, log_ratio_N, floored_N.log())
    # Where A = 0 there is nothing to learn; and if it is so everywhere, GRPO's loss is its KL term.
    gain_N = batch.weights_N * (batch.advantages_N != 0) * objective_N
    flat = dataclasses.replace(batch, advantages_N=torch.zeros_like(batch.advantages_N))
    return bread.batch_loss(config, flat, logprobs_N) - gain_N.sum()


uft.loss = relift.loss = loss_with_traces(lambda logprobs_N: logprobs_N)
luffy.loss = loss_with_traces(lambda logprobs_N: torch.sigmoid(logprobs_N - math.log(0.1)))
nft = functools.partial(bread.grpo)  # the same groups, but a loss of its own
nft.loss = nft_loss
nft.needs_trace = False
