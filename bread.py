"""BREAD: GRPO that branches from an expert's trace where the model's own attempts all fail.

Zhang, Huang, Li, Ni, Chen, Oymak: "BREAD: Branched Rollouts from Expert Anchors Bridge SFT & RL for Reasoning",
arXiv 2506.17211, NeurIPS 2025. One training step, as `train` below carries it out:

    1  Sample G rollouts of every problem from the policy, unaided.                                  sample_groups
    2  Where none of them is right, cut the expert's trace into K episodes and binary-search the
       shortest prefix (the anchor) from which some of a FRESH group of G rollouts are right.        search_anchors
    3  That group, every rollout of it behind the same anchor, stands in for the failed one.
    4  Advantage of a rollout: (its reward - the mean of its group) / the std of its group.        group_advantages
    5  Clipped GRPO loss on the tokens that the policy sampled; question and anchor are only context.     grpo_loss

    paper         here                             what it is
    q             problem.prompt_ids               token ids of the rendered question
    e             problem.expert_ids, .cuts        token ids of the expert's trace, and where its episodes end
    G, K          --group-size, --max-episodes
    o_i, r_i      completion_ids, reward           what rollout i sampled (stop token included), and 1.0 or 0.0
    A_i           advantages_B                     (B,) one per rollout, the same for all of its tokens
    pi, pi_old    logprobs_BT, old_logprobs_BT     (B, T) natural logarithms at the sampling temperature
    (mask)        loss_mask_BT                     (B, T) 1 on sampled tokens; 0 on question, anchor and padding

The paper leaves room; these choices are ours: a group triggers a search when it holds no success; a probe is accepted
with 1 .. G-1 successes; no cut lies behind the first statement of the answer; a problem without accepted cut is
skipped (--on-fail); the loss is a token mean, clipped at 0.2 / 0.2, without KL; G = 8, K = 10, temperature 1.

Dimension key: B rows of a micro-batch   T positions   N tokens that carry loss   G rollouts of a group
"""
import collections
import contextlib
import dataclasses
import hashlib
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

# Threads that spin at barriers collapse as soon as another program takes a core (10 to 40 times slower, measured);
# threads that sleep do not. Has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
from tqdm import tqdm

import checkpoint
import model as plain
import report
from anchors import anchor_adaback, anchor_anneal, anchor_fixed, anchor_random, anchor_search
from config import Config, parse_args
from packing import Prefixes, forward_suffixes
from parallel import Ranks
from rewards import extract_answer, math_reward, parse_gold
from sampler import Fork, SamplingParams, branch, prefill
from traces import Problem, Tokenizer, load_problems

TOKENS = ("base", "probe", "resample", "eval", "prefilled", "eval prefilled")
COUNTS = (*TOKENS, "unaided", "searched", "probes")  # what ranks add up
HINT_ROOM = 64  # tokens for the words around a hint; the hint itself counts toward the answer, as every anchor does
TINY = 5_000_000  # parameters
EXAMPLE = Path(__file__).resolve().parent / "examples" / "chain"


@dataclasses.dataclass
class Rollout:
    """One answer to a problem: prompt_ids | anchor_ids | completion_ids. Only the last part carries loss."""
    problem: Problem
    cut: int                   # how many tokens of the expert's trace it was shown
    prompt_ids: list
    anchor_ids: list           # those tokens; empty where they were shown as a hint inside the prompt instead
    completion_ids: list
    logprobs: list | None      # one per completion token; None for an expert's trace, which nobody sampled
    finish_reason: str
    reward: float
    advantage: float = 0.0
    entropy: float | None = None  # mean over the completion's tokens, nats, as they were sampled


# ---------------------------------------------------------------- the algorithm


def train(run):
    """Train to the end of the run. The numbers are those of the algorithm at the top of this file."""
    config = run.config
    run.announce()
    run.evaluate()
    while not run.finished:
        problems = run.ranks.share(run.next_problems())
        if config.method == "sft":
            groups = [[expert_rollout(run, problem, advantage=1.0)] for problem in problems]
        else:
            with run.clock("sample"):
                groups = sample_groups(run, [(problem, 0) for problem in problems], "base") \
                    if config.tries_unaided else [[] for _ in problems]                                # 1
                run.counts["unaided"] += sum(map(num_successes, groups))
                failed = [i for i, group in enumerate(groups) if num_successes(group) == 0]
                anchored = search_anchors(run, [problems[i] for i in failed])                          # 2
                for i in failed:
                    groups[i] = anchored.get(problems[i].id) or after_failure(run, groups[i])          # 3
            for group in groups:
                set_advantages(group, divide_by_std=not config.no_std)                                 # 4
        groups = run.together(groups)
        with run.clock("update"):
            update(run, groups)                                                                        # 5
            if config.on_fail == "sft":
                update(run, [[expert_rollout(run, group[0].problem, advantage=1.0)]
                             for group in groups if num_successes(group) == 0], supervised=True)
        run.advance()
        run.evaluate()
        run.report(groups)
        run.save()
    run.conclude()


def sample_groups(run, points, kind, trunk=None, group_size=None, temperature=None):
    """A fresh group of rollouts for every (problem, cut) of `points`, in order; cut 0 is the bare question.

    trunk: (Trunk, {problem id: sequence}) holding question and trace of these problems; without one, the prompts
    are prefilled here. kind ("base", "probe", "resample", "eval") names the counter of the sampled tokens.
    """
    c, G, groups = run.config, group_size or run.config.group_size, []
    temperature = c.temperature if temperature is None else temperature
    params = SamplingParams(c.max_new_tokens, temperature, run.tokenizer.stop_token_ids, c.seed)
    for begin in range(0, len(points), c.sample_batch_size):  # bounds what the prompts of a large evaluation hold
        forks, contexts = [], [run.context(*point) for point in points[begin:begin + c.sample_batch_size]]
        for i, (problem, cut, prompt_ids, anchor_ids) in enumerate(contexts):
            row_ids = tuple(draw_id(run.step, kind, problem.id, cut, sample) for sample in range(G))
            sequence = i if trunk is None else trunk[1][problem.id]
            forks.append(Fork(sequence, len(prompt_ids) + len(anchor_ids), row_ids, c.max_new_tokens - cut))
        cache = trunk[0] if trunk else run.prefill([prompt + anchor for _, _, prompt, anchor in contexts], kind)
        sampled = branch(run.model, cache, forks, params, c.sample_batch_size, run.kernels, run.workers)
        groups += [[run.rollout(*context, completion) for completion in completions]
                   for context, completions in zip(contexts, sampled)]
    run.counts[kind] += sum(len(rollout.completion_ids) for group in groups for rollout in group)
    return groups


def search_anchors(run, problems):
    """Episode Anchor Search for all failed problems in lockstep: {problem id: group of the accepted probe}. (With
    --anchor-when always: for all problems, and every probe is accepted.)

    Every search names a cut, one batched branch serves them all, the success counts go back. Question and trace of
    each problem are prefilled once, however many probes follow.
    """
    by_id, probes, accepted = {problem.id: problem for problem in problems}, {}, {}
    policies = {problem.id: anchor_policy(run, problem) for problem in problems}  # id: (cuts, generator)
    trunk, replies = None, dict.fromkeys(by_id)  # the first thing sent to a generator is None
    if problems and run.config.method == "bread" and run.config.anchor_placement == "prefill":
        sequences = [problem.prompt_ids + problem.expert_ids for problem in by_id.values()]
        trunk = run.prefill(sequences, "probe"), {key: i for i, key in enumerate(by_id)}
    while replies:
        asked = {}
        for key, count in replies.items():
            try:
                asked[key] = policies[key][1].send(count)
            except StopIteration as done:
                if done.value is not None:
                    accepted[key] = probes[key, done.value]
                    run.remember(by_id[key], "used", accepted[key][0].cut)
        points = [(by_id[key], policies[key][0][cut]) for key, cut in asked.items()]
        groups = sample_groups(run, points, "probe", trunk)
        probes.update(zip(asked.items(), groups))
        for problem, cut in points:
            run.remember(problem, "shown", cut)
        replies = {key: num_successes(group) for key, group in zip(asked, groups)}
    run.counts.update(searched=len(problems), probes=len(probes))
    return accepted


def anchor_policy(run, problem):
    """(cuts, the generator that chooses among them) of a problem: it yields their indices and is sent success counts.
    A cut is a number of the trace's tokens; one that leaves no room for an answer is not offered."""
    c, always = run.config, not run.config.tries_unaided
    cuts = [0] * always + [cut for cut in problem.cuts if cut < c.max_new_tokens] if c.method == "bread" else []
    bounds = (0, c.group_size) if always else (c.anchor_low, c.anchor_high)
    question, rng = (len(cuts), c.group_size, *bounds), random.Random(draw_id(c.seed, run.step, problem.id))
    if c.anchor == "search":
        return cuts, anchor_search(*question)
    if c.anchor == "fixed":
        return cuts, anchor_fixed(*question, c.anchor_fraction)
    if c.anchor == "anneal":
        return cuts, anchor_anneal(*question, rng, run.progress())
    if c.anchor == "adaback":
        interval = run.anchors.setdefault(problem.id, {}).setdefault("interval", [0, len(cuts) - 1])
        return cuts, anchor_adaback(*question, rng, interval)
    return cuts, anchor_random(*question, rng, c.anchor_from, c.anchor_to)


def after_failure(run, group):
    """What becomes of a failed group for which no anchor was accepted (--on-fail)."""
    problem = group[0].problem
    if run.config.on_fail == "resample":    # the compute-matched control: G more tries in the same context
        return group + sample_groups(run, [(problem, 0)], "resample")[0]
    if run.config.on_fail == "expert":      # the paper's "GRPO with expert trace", which it finds to be worse
        return group[:-1] + [expert_rollout(run, problem)]
    return group                            # equal rewards, advantage zero: skipped (sft: the step after the update)


def expert_rollout(run, problem, advantage=0.0):
    """The expert's whole trace as a rollout, a stop token added; the policy itself scores it."""
    run.remember(problem, "shown", len(problem.expert_ids))
    run.remember(problem, "used", len(problem.expert_ids))
    completion_ids = problem.expert_ids + [run.tokenizer.eos_id]
    return Rollout(problem, 0, problem.prompt_ids, [], completion_ids, None, "stop", 1.0, advantage)


def num_successes(group):
    return sum(rollout.reward > 0 for rollout in group)


def group_advantages(rewards_G, divide_by_std=True):
    """Rewards of a group (same problem, same anchor) -> advantages (G,) that sum to 0: (r - mean) / population std.

    Equal rewards give exactly 0. Without the division: Dr.GRPO, arXiv 2503.20783.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0])).tolist()
    [1.0, -1.0, -1.0, 1.0]
    """
    if bool((rewards_G == rewards_G[0]).all()):
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    return centred_G / rewards_G.std(correction=0) if divide_by_std else centred_G


def set_advantages(group, divide_by_std):
    advantages_G = group_advantages(torch.tensor([rollout.reward for rollout in group]), divide_by_std)
    for rollout, advantage in zip(group, advantages_G.tolist()):
        rollout.advantage = advantage


def grpo_loss(logprobs_BT, old_logprobs_BT, advantages_B, loss_mask_BT, clip_low, clip_high, denominator):
    """GRPO's clipped objective (arXiv 2402.03300, eq. 3, without its KL term), negated: a scalar to minimise.

        J = sum over sampled tokens of min(rho A, clip(rho, 1 - low, 1 + high) A) / denominator,   rho = pi / pi_old

    logprobs_BT carries the gradient; loss_mask_BT is 1 on sampled tokens, the stop token included, else 0.
    denominator: a number (mean over the tokens of the WHOLE update) or one per row, (B, 1) (mean over sequences).
    """
    # Padding gets ratio 1 before exp, so that no 0 * inf can arise; e^20 is far outside any clip range.
    log_ratio_BT = torch.where(loss_mask_BT > 0, logprobs_BT - old_logprobs_BT, 0.0).clamp(-20, 20)
    ratio_BT, advantages_B1 = log_ratio_BT.exp(), advantages_B.unsqueeze(1)
    unclipped_BT = ratio_BT * advantages_B1
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_B1
    objective_BT = torch.minimum(unclipped_BT, clipped_BT)
    return -(objective_BT * loss_mask_BT / denominator).sum()


def luffy_loss(logprobs_BT, advantages_B, loss_mask_BT, shaping, denominator):
    """LUFFY's objective for an expert's tokens (arXiv 2504.14945), negated: p / (p + shaping) * A, never clipped.

    Its gradient p * shaping / (p + shaping)^2 * A is largest where p equals `shaping` (theirs: 0.1), so that unlikely
    tokens of the trace, which the plain ratio p / p_old would hardly move, are learned from too.
    """
    weight_BT = torch.sigmoid(logprobs_BT - math.log(shaping))
    return -(weight_BT * advantages_B.unsqueeze(1) * loss_mask_BT / denominator).sum()


def k3_divergence(logprobs_BT, reference_BT, loss_mask_BT, denominator):
    """KL(policy, reference), estimated without bias and never negative: exp(d) - d - 1, d = log ref - log policy."""
    d_BT = torch.where(loss_mask_BT > 0, reference_BT - logprobs_BT, 0.0).clamp(-20, 20)
    return ((d_BT.exp() - d_BT - 1) * loss_mask_BT / denominator).sum()


# ---------------------------------------------------------------- the update


@dataclasses.dataclass
class Batch:
    """A micro-batch of B rollouts. What a group shares, its context but for the last token, runs through the network
    once; a row's input begins with that last token, so that every position of it predicts one token of the completion.

        context  q q q e e           completion  o o o s         (s: the stop token, an action like any other)
        prefix   q q q e             input       e o o o
                                     target      o o o s         a (B, T) tensor has an entry for each, then zeros
    """
    rows: list                      # per rollout: (which prefix, input token ids)
    targets_N: torch.Tensor         # completions end to end
    loss_mask_BT: torch.Tensor      # 1 on every token of a completion, or its importance weight
    old_logprobs_BT: torch.Tensor   # NaN where nobody sampled (an expert's trace), until the first pass fills it
    advantages_B: torch.Tensor
    expert_B1: torch.Tensor         # (B, 1) 1 on the rollouts that are an expert's trace
    denominator: torch.Tensor | float
    reference_BT: torch.Tensor | None = None


def make_packs(run, groups, num_tokens, num_rollouts):
    """Rollouts that carry a gradient -> [(prefixes, [Batch, ...])]: contexts whose rollouts fill a micro-batch
    together, or one context with more of them. `num_tokens` and `num_rollouts` count the whole update."""
    members, packs, size = {}, [], run.config.micro_batch_size
    for rollout in (rollout for group in groups for rollout in group if rollout.advantage or run.config.kl):
        members.setdefault(tuple(rollout.prompt_ids + rollout.anchor_ids), []).append(rollout)
    room = 0
    for context in sorted(members, key=len):
        if len(members[context]) > room:
            packs.append([])
            room = size
        packs[-1].append(context)
        room -= len(members[context])
    return [([list(context[:-1]) for context in pack],
             [make_batch(run, rows[i:i + size], num_tokens, num_rollouts) for i in range(0, len(rows), size)])
            for pack in packs
            for rows in [[(i, rollout) for i, context in enumerate(pack) for rollout in members[context]]]]


def make_batch(run, rows, num_tokens, num_rollouts):
    """[(which prefix, rollout), ...] -> Batch."""
    rollouts, lengths = [rollout for _, rollout in rows], [len(rollout.completion_ids) for _, rollout in rows]
    old_BT = torch.zeros(len(rows), max(lengths))
    for row, rollout in enumerate(rollouts):
        old_BT[row, :lengths[row]] = torch.nan if rollout.logprobs is None else torch.tensor(rollout.logprobs)
    loss_mask_BT = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).float()
    denominator = float(num_tokens)
    if run.config.loss_mean == "sequence":
        denominator = (loss_mask_BT.sum(1, keepdim=True).clamp(min=1) * num_rollouts).to(run.device)
    inputs = [(i, [(rollout.prompt_ids + rollout.anchor_ids)[-1], *rollout.completion_ids[:-1]]) for i, rollout in rows]
    targets_N = torch.tensor([token for rollout in rollouts for token in rollout.completion_ids])
    advantages_B = torch.tensor([rollout.advantage for rollout in rollouts])
    expert_B1 = torch.tensor([[float(rollout.logprobs is None)] for rollout in rollouts])
    tensors = (targets_N, loss_mask_BT, old_BT, advantages_B, expert_B1)
    return Batch(inputs, *(x.to(run.device) for x in tensors), denominator)


def token_logprobs(run, model, prefixes, batch):
    """(log-probs (B, T) of the completions' tokens, zero on padding; sum of their entropies)."""
    hidden_ND = forward_suffixes(model, prefixes, batch.rows)
    logprobs_N, entropy_N = run.ops.linear_logprob(hidden_ND, model.lm_head.weight, batch.targets_N,
                                                   run.config.temperature)
    return torch.zeros_like(batch.loss_mask_BT).masked_scatter(batch.loss_mask_BT > 0, logprobs_N), entropy_N.sum()


def update(run, groups, supervised=False):
    """`--updates-per-batch` optimizer steps on all rollouts of a step; leaves its metrics in run.metrics. Supervised:
    one step of SFT on the expert's traces of problems that failed, as ReLIFT (2506.07527) interleaves them.

    One denominator for the whole update: gradients do not depend on how rows fall into micro-batches or on ranks.
    Rollouts of a group with equal rewards count in it, but (without a KL term) their gradient is exactly zero, so they
    are not run through the network; entropy and clip fraction are means over the tokens that were.
    """
    c, everyone = run.config, [rollout for group in groups for rollout in group]
    num_tokens = sum(len(rollout.completion_ids) for rollout in everyone)
    packs = make_packs(run, run.ranks.share(groups), num_tokens, len(everyone))
    has_gradient = any(rollout.advantage or c.kl for rollout in everyone)
    sums, norms = collections.Counter(), []
    epochs = 1 if supervised else c.updates_per_batch
    for epoch in range(epochs if has_gradient else 0):
        loss_before = sums["loss"]
        backward(run, packs, epoch == 0, supervised or c.method == "sft", sums)
        norms.append(run.optimizer_step(sums["loss"] - loss_before))
    names = ("loss", "entropy", "clipped", "gap", "weight", "tokens")
    loss, entropy, clipped, gap, weight, tokens = run.ranks.sum(sums[name] for name in names)
    epochs, tokens = max(len(norms), 1), max(tokens, 1)
    if supervised:
        run.metrics["sft/loss"] = loss
        return
    run.metrics = {"loss": loss / epochs, "grad_norm": sum(norms) / epochs, "entropy": entropy / tokens,
                   "clip_fraction": clipped / tokens, "sampler/logprob_gap": gap * epochs / tokens,
                   "sampler/importance_weight": weight * epochs / tokens}


def backward(run, packs, is_first, supervised, sums):
    """Forward and backward of every pack: gradients into the weights, sums over tokens into `sums`."""
    for contexts, batches in packs:
        prefixes, reference = Prefixes(run.model, contexts), None
        if is_first and run.reference is not None:
            with torch.no_grad():
                reference = Prefixes(run.reference, contexts)
        for batch in batches:
            logprobs_BT, entropy = token_logprobs(run, run.model, prefixes, batch)
            if is_first:
                fix_old_logprobs(run, reference, batch, logprobs_BT.detach(), sums)
            loss = batch_loss(run.config, batch, logprobs_BT, supervised)
            loss.backward()
            sums.update(loss=loss.item(), entropy=entropy.item(), tokens=len(batch.targets_N),
                        clipped=num_clipped(run.config, batch, logprobs_BT.detach()))
        prefixes.backward()


def fix_old_logprobs(run, reference, batch, logprobs_BT, sums):
    """First pass over a batch: measure how far the sampler's log-probs are from the trainer's, fill in those of tokens
    that nobody sampled, score the reference model (its prefixes, or None). From then on they stay as they are.

    With --importance-cap the ratio of both becomes each token's weight, cut off at the cap, and the trainer's
    log-probs are the old ones (truncated importance sampling, for a sampler that rounds differently).
    """
    gap_BT = torch.where(batch.old_logprobs_BT.isnan(), 0.0, logprobs_BT - batch.old_logprobs_BT)
    weight_BT = gap_BT.exp().clamp(1e-30, run.config.importance_cap or torch.inf)  # 0 in the mask would mean padding
    sums.update(gap=gap_BT.abs().sum().item(), weight=(weight_BT * batch.loss_mask_BT).sum().item())
    if run.config.importance_cap:
        batch.old_logprobs_BT, batch.loss_mask_BT = logprobs_BT, batch.loss_mask_BT * weight_BT
    batch.old_logprobs_BT = torch.where(batch.old_logprobs_BT.isnan(), logprobs_BT, batch.old_logprobs_BT)
    if reference is not None:
        with torch.no_grad():
            batch.reference_BT, _ = token_logprobs(run, run.reference, reference, batch)


def batch_loss(config, batch, logprobs_BT, supervised):
    """This micro-batch's share of the loss: SFT's negative log-likelihood, or GRPO's objective with its KL term."""
    if supervised:
        return -(logprobs_BT * batch.loss_mask_BT / batch.denominator).sum()
    mask_BT = ratio_mask(config, batch)
    loss = grpo_loss(logprobs_BT, batch.old_logprobs_BT, batch.advantages_B, mask_BT,
                     config.clip_low, config.clip_high, batch.denominator)
    if config.expert_shaping:
        loss = loss + luffy_loss(logprobs_BT, batch.advantages_B, batch.loss_mask_BT - mask_BT,
                                 config.expert_shaping, batch.denominator)
    if batch.reference_BT is None:
        return loss
    return loss + config.kl * k3_divergence(logprobs_BT, batch.reference_BT, batch.loss_mask_BT, batch.denominator)


def ratio_mask(config, batch):
    """(B, T) the loss mask where the clipped ratio counts: everywhere, but for an expert's trace that LUFFY shapes."""
    return batch.loss_mask_BT * (1 - batch.expert_B1) if config.expert_shaping else batch.loss_mask_BT


def num_clipped(config, batch, logprobs_BT):
    """Tokens whose gradient the clip removes: already too likely for A > 0, too unlikely for A < 0."""
    ratio_BT, advantages_B1 = (logprobs_BT - batch.old_logprobs_BT).exp(), batch.advantages_B.unsqueeze(1)
    clipped_BT = torch.where(advantages_B1 > 0, ratio_BT > 1 + config.clip_high,
                             (ratio_BT < 1 - config.clip_low) & (advantages_B1 < 0))
    return (clipped_BT & (ratio_mask(config, batch) > 0)).sum().item()


# ---------------------------------------------------------------- the run: its state and what it leaves behind


class Run:
    """Everything that changes while training: model, optimizer, counters, files.

    Random choices are functions of (seed, step, problem, sample), so a resumed run needs no generator state.
    """

    def __init__(self, config):
        c = self.config = config
        self.step, self.signal, self.began = 0, None, time.time()
        self.tokens, self.seconds = collections.Counter(), collections.Counter()
        self.counts, self.totals = collections.Counter(), {}  # on this rank and under way; summed, of the last step
        self.metrics, self.evals, self.anchors = {}, [], {}  # anchors: a record per problem, see `remember`
        self.skipped_updates, self.skipped_in_a_row, self.failure = 0, 0, None
        self.ranks = Ranks(pick_device(c.device))
        self.device = self.ranks.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.tokenizer = Tokenizer.from_pretrained(c.model)
        # A new run claims its folder once everything has been read, so that bad input leaves nothing behind.
        self.folder = checkpoint.RunFolder(c.output, resume=True) if c.resume and self.ranks.rank == 0 else None
        resumed, notes = self.ranks.from_first(self.folder.latest() if self.folder else (None, []))
        self.model = plain.Transformer.from_pretrained(resumed or c.model, self.device, self.dtype)
        self.model.recompute = c.recompute
        # The kernels' tiles want head sizes that are powers of two; other models run on plain PyTorch.
        fits = self.model.config.head_dim in (16, 32, 64, 128, 256)
        self.kernels = load_kernels() if self.device.type == "cuda" and fits else None
        self.ops = self.kernels or plain
        self.model.folder = Path(c.model).resolve()  # tokenizer files are copied from here; checkpoints come and go
        self.reference = plain.Transformer.from_pretrained(c.model, self.device, self.dtype) if c.kl else None
        self.problems, self.eval_problems = self.load(c.data), self.load(c.eval_data)
        if len(self.problems) < c.problems_per_step and not c.eval:
            raise ValueError(f"{c.data}: {len(self.problems)} usable problems, but --problems-per-step is "
                             f"{c.problems_per_step}; give at most {len(self.problems)}")
        for note in notes:
            self.say(note)
        self.prepare_weights()
        if not c.eval:
            if self.ranks.rank == 0:
                self.folder = self.folder or checkpoint.RunFolder(c.output, overwrite=c.overwrite)
            self.settle(resumed)
        self.before = self.progress()
        self.finished = self.before >= 1
        self.bar = tqdm(total=1.0, initial=self.before, disable=c.eval or self.ranks.rank > 0 or None, leave=False,
                        bar_format="{percentage:3.0f}% {bar} {elapsed} / {remaining} left")
        self.handlers = {} if c.eval else {number: signal.signal(number, self.stop)
                                           for number in (signal.SIGINT, signal.SIGTERM)}

    def prepare_weights(self):
        """Float32 masters of the weights that this rank owns, and their optimizer.

        bf16 keeps 8 bits: at a learning rate of 1e-6 every step would be rounded away. AdamW therefore works on
        float32 masters, and the bf16 weights are rounded copies of them.
        """
        c = self.config
        self.weights = list(self.model.parameters())
        self.num_parameters = sum(weight.numel() for weight in self.weights)
        # Decoding a tiny model is hundreds of tiny operations. To wake a sleeping second thread for each costs more
        # than it saves; threads that decode rows of their own, on one core each, are 1.4 times faster (256 rows).
        self.is_tiny = self.num_parameters < TINY
        self.workers = torch.get_num_threads() if self.is_tiny else 1
        self.owners = self.ranks.owners([weight.numel() for weight in self.weights])
        self.masters = {i: weight if self.dtype == torch.float32 else weight.detach().float()
                        for i, weight in enumerate(self.weights) if self.owners[i] == self.ranks.rank}
        self.optimizer = torch.optim.AdamW(self.masters.values(), c.lr, betas=(0.9, 0.95), weight_decay=c.weight_decay,
                                           fused=self.device.type == "cuda")  # no temporaries as large as the model

    def load(self, path):
        """Problems of a JSONL file that fit the model's context and whose gold answer and trace agree."""
        if not path:
            return []
        c, window = self.config, self.model.config.max_position_embeddings
        problems = load_problems(path, self.tokenizer, max_episodes=c.max_episodes, max_tokens=window,
                                 system=c.system or None, log=self.say)
        usable = [p for p in problems if parse_gold(p.answer) is not None
                  and (extract_answer(p.trace) is None or math_reward(p.trace, p.answer) > 0)]
        if len(usable) < len(problems):
            self.say(f"{path}: left out {len(problems) - len(usable)} problems whose trace contradicts their answer, "
                     "or whose answer cannot be checked")
        longest = max((len(p.prompt_ids) for p in usable), default=0)
        if c.anchor_placement == "hint":  # the hint repeats the anchor inside the prompt, with a line of its own
            longest += HINT_ROOM
        if not usable or longest + c.max_new_tokens > window:
            raise ValueError(f"{path}: no usable problem" if not usable else
                             f"{path}: a prompt of {longest} tokens and --max-new-tokens {c.max_new_tokens} exceed the "
                             f"model's {window} positions; lower --max-new-tokens to {max(window - longest, 1)}")
        return usable

    def settle(self, resumed):
        """Write run.json, or read back a checkpoint after checking that it belongs to the same run."""
        c = self.config
        record = dataclasses.asdict(c) | {"data_sha256": file_hash(c.data), "eval_sha256": file_hash(c.eval_data)}
        if resumed is None:
            return self.folder and self.folder.write_json("run.json", record)
        may_differ = {"steps", "token_budget", "output", "overwrite", "resume", "device", "eval_every", "eval_samples",
                      "save_every", "sample_batch_size", "micro_batch_size", "data", "eval_data", "eval_sha256",
                      "recompute", "max_skipped_updates"}
        for name, was in self.ranks.from_first(self.folder and self.folder.read_json("run.json")).items():
            if name not in may_differ and record.get(name) != was:
                raise ValueError(f"--resume: {name} is {record.get(name)!r}, but the run in {c.output} has {was!r}; "
                                 "start a new run in another --output")
        tensors, meta = checkpoint.load(resumed)
        checkpoint.restore_optimizer(self.optimizer, tensors, list(self.masters))
        self.step, self.evals, self.skipped_updates = meta["step"], meta["evals"], meta["skipped_updates"]
        self.anchors = meta["anchors"]
        self.tokens, self.seconds = collections.Counter(meta["tokens"]), collections.Counter(meta["seconds"])
        for name in ("metrics.jsonl", "samples.jsonl"):
            if self.folder:
                self.folder.truncate(name, self.step)

    # -------- what the algorithm asks of it

    def together(self, groups):
        """The step's groups from all ranks, in the order of its problems; what they counted is summed."""
        self.totals = self.add_up()
        ids = [group[0].problem.id for group in groups]
        self.anchors.update(self.ranks.gather([(key, self.anchors.get(key, {})) for key in ids]))
        return self.ranks.gather(groups)

    def remember(self, problem, what, tokens):
        """So many tokens of a problem's trace were "shown" to the policy, or "used" as the anchor of a group. The most
        of each is kept, beside AdaBack's "interval"."""
        record = self.anchors.setdefault(problem.id, {})
        record[what] = max(record.get(what, 0), tokens)

    def share_of_traces(self, what):
        """Share of the training set's expert tokens that were ever "shown", or "used"."""
        return (sum(record.get(what, 0) for record in self.anchors.values()) /
                sum(len(problem.expert_ids) for problem in self.problems))

    def add_up(self):
        """Sum what was counted since the last time over all ranks; tokens go into run.tokens."""
        totals = dict(zip(COUNTS, map(int, self.ranks.sum(self.counts[name] for name in COUNTS))))
        self.tokens.update({name: totals[name] for name in TOKENS})
        self.counts.clear()
        return totals

    def advance(self):
        """The step is taken. Whether another follows is decided here, once, by all ranks together."""
        self.step += 1
        agreed = int(max(self.ranks.gather([self.signal or 0])))
        self.signal = agreed or self.signal  # one that came while they talked counts in the next step
        self.finished = agreed > 0 or self.failure is not None or self.progress() >= 1

    def progress(self):
        """Share of the run that is done, from 0 to 1: of its steps or of its token budget, whichever ends it."""
        c = self.config
        spent = self.tokens_sampled() / c.token_budget if c.token_budget else 0.0
        return min(1.0, max(spent, self.step / c.steps if c.steps else 1.0))

    def stop(self, number, _frame):
        """First SIGINT or SIGTERM: end the run after this step, with everything saved. The second quits at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def tokens_sampled(self):
        """Tokens that the policy sampled for training: the honest cost of a method, probes included."""
        return sum(self.tokens[kind] for kind in ("base", "probe", "resample"))

    def next_problems(self):
        """The step's problems, which depend on (seed, step) only. An epoch is a shuffled pass in whole steps; what
        does not fill a step waits for another epoch, so no step holds a problem twice."""
        count = self.config.problems_per_step
        epoch, position = divmod(self.step, len(self.problems) // count)
        order = random.Random(f"{self.config.seed} {epoch}").sample(self.problems, len(self.problems))
        return order[position * count:(position + 1) * count]

    def prefill(self, sequences, kind):
        self.counts["eval prefilled" if kind == "eval" else "prefilled"] += sum(map(len, sequences))
        return prefill(self.model, sequences)

    def context(self, problem, cut):
        """(problem, cut, prompt ids, anchor ids): what the policy reads before it writes, by --anchor-placement."""
        anchor_ids = problem.expert_ids[:cut]
        if self.config.anchor_placement == "prefill" or not cut:
            return problem, cut, problem.prompt_ids, anchor_ids
        hint = self.tokenizer.decode(anchor_ids)
        return problem, cut, self.tokenizer.render(problem.question, hint=hint), []

    def rollout(self, problem, cut, prompt_ids, anchor_ids, completion):
        """A sampled completion with its reward."""
        # The answer may be written across anchor and completion, so both are read. Where the prompt opened a
        # thought the reward is told so, or a box inside a thought that never closes would pass for an answer.
        opening = "<think>\n" if self.tokenizer.opens_thinking else ""
        reward = math_reward(opening + self.tokenizer.decode(anchor_ids + completion.token_ids), problem.answer)
        return Rollout(problem, cut, prompt_ids, anchor_ids, completion.token_ids, completion.logprobs,
                       completion.finish_reason, reward, entropy=report.mean(completion.entropies))

    def optimizer_step(self, loss):
        """Sum gradients over the ranks, clip, step, round the masters back into the weights; returns the gradient
        norm before clipping.

        A loss or norm that is not finite leaves every weight and moment as it was, and is counted.
        """
        for i, (weight, owner) in enumerate(zip(self.weights, self.owners)):
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad, grad = None, self.ranks.reduce(grad.float(), owner)
            if i in self.masters:
                self.masters[i].grad = grad
        squares, loss = self.ranks.sum([sum(float(x.grad.square().sum(dtype=torch.float64))
                                            for x in self.masters.values()), loss])
        norm = math.sqrt(squares)
        if math.isfinite(norm) and math.isfinite(loss):
            self.skipped_in_a_row = 0
            self.step_masters(self.config.grad_clip / max(norm, self.config.grad_clip))
        else:
            self.skipped_updates, self.skipped_in_a_row = self.skipped_updates + 1, self.skipped_in_a_row + 1
            if self.skipped_in_a_row >= self.config.max_skipped_updates:
                self.failure = (f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite; "
                                "the run is saved as it was before them: lower --lr, or look at samples.jsonl")
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def step_masters(self, clip):
        """One step of AdamW on gradients scaled by `clip`, at the learning rate of this point of the run."""
        warm = (self.step + 1) / max(self.config.warmup_steps, 1)
        left = (1 - self.progress()) / max(self.config.lr_decay, 1e-9)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * min(1.0, warm, left)
        for master in self.masters.values():
            master.grad.mul_(clip)
        self.optimizer.step()
        for i, weight in enumerate(self.weights):
            if i in self.masters and self.masters[i] is not weight:
                weight.copy_(self.masters[i])
            self.ranks.broadcast(weight.data, self.owners[i])

    @contextlib.contextmanager
    def clock(self, name):
        """Time a phase. Sampling a tiny model, an operation gets one thread."""
        threads, began = torch.get_num_threads(), time.perf_counter()
        if name != "update" and self.is_tiny:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            self.seconds[name] += time.perf_counter() - began

    # -------- evaluation

    def evaluate(self):
        """Accuracy on the held-out problems without anchors, greedy and sampled, where an evaluation is due."""
        # Not because of a signal: somebody waits for the save, and a resumed run has an unbroken one's evaluations.
        due = self.step % self.config.eval_every == 0 or self.progress() >= 1
        if not (self.eval_problems and due) or (self.evals and self.evals[-1]["step"] == self.step):
            return
        with self.clock("eval"):
            self.evals.append({"step": self.step, "eval/accuracy": self.accuracy(self.config.temperature),
                               "eval/greedy": self.accuracy(0.0), "tokens/sampled": self.tokens_sampled()})
            self.add_up()
        if self.step == 0 and self.folder:  # later ones are part of their step's row
            self.folder.append("metrics.jsonl", self.evals[-1])

    def accuracy(self, temperature):
        """Mean reward on the held-out problems: of one greedy answer each, or of --eval-samples sampled ones."""
        samples = self.config.eval_samples if temperature else 1
        points = [(problem, 0) for problem in self.ranks.share(self.eval_problems)]
        groups = sample_groups(self, points, "eval", None, samples, temperature)
        rewards = self.ranks.gather([report.mean(rollout.reward for rollout in group) for group in groups])
        return report.mean(rewards)

    # -------- what a run leaves behind

    def save(self):
        """checkpoint-N: a Hugging Face folder beside masters, moments and counters. The last step always saves."""
        if not (self.finished or self.config.save_every and self.step % self.config.save_every == 0):
            return
        meta = {"step": self.step, "evals": self.evals, "skipped_updates": self.skipped_updates,
                "anchors": self.anchors, "tokens": self.tokens, "seconds": self.seconds}
        tensors = self.ranks.collect(checkpoint.optimizer_tensors(self.optimizer, list(self.masters)))
        if self.folder:
            self.folder.save(self.step, self.model.save_pretrained, tensors, meta)

    def report(self, groups):
        """One JSON object for scripts, a few rollouts to look at, one line for the reader."""
        if not self.folder:
            return
        c = self.config
        tried = len(groups) * c.group_size if c.method != "sft" and c.tries_unaided else 0
        reward = self.totals["unaided"] / tried if tried else None
        row = {"step": self.step, "reward": reward, **report.group_metrics(groups, self.totals), **self.metrics,
               "skipped_updates": self.skipped_updates, "tokens/sampled": self.tokens_sampled()}
        row |= {f"anchor/{what}": self.share_of_traces(what) for what in ("shown", "used")}
        row |= {f"tokens/{kind}": self.tokens[kind] for kind in ("base", "probe", "resample", "eval", "prefilled")}
        row |= {f"seconds/{name}": round(seconds, 3) for name, seconds in self.seconds.items()}
        if self.evals and self.evals[-1]["step"] == self.step:
            row |= self.evals[-1]
        self.folder.append("metrics.jsonl", row)
        for group in groups[:2]:
            self.folder.append("samples.jsonl", report.sample(self.step, group[0], self.tokenizer.decode))
        done = self.progress()
        seconds_left = (time.time() - self.began) * (1 - done) / max(done - self.before, 1e-9)
        self.say(report.step_line(self.config, row, seconds_left))
        self.bar.update(done - self.bar.n)

    def say(self, line):
        if self.ranks.rank == 0:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def announce(self):
        """Print what runs on what, and what a step costs."""
        kernels = "plain PyTorch" if self.ops is plain else "Triton kernels"
        model = f"{self.num_parameters / 1e6:.2f}M parameters, {self.dtype} on {self.device}, {kernels}"
        changed = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(Config)
                   if getattr(self.config, f.name) != f.default}
        self.say(report.opening(self.config, model, len(self.problems), len(self.eval_problems), changed))

    def conclude(self):
        """Print the table at the end, and let go of the folder and the signals."""
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.folder:
            saved = self.folder.path / f"checkpoint-{self.step}"
            self.say(report.closing(self.config, self.evals, saved if saved.is_dir() else "none", self.tokens,
                                    time.time() - self.began, self.config.model == str(EXAMPLE / "model")))
            self.folder.close()
        self.ranks.leave()


def draw_id(*key):
    """A 64-bit number that depends on all parts of the key: the identity of a row, the seed of a choice."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def load_kernels():
    import kernels  # needs triton, which a CPU run does not
    return kernels


def pick_device(name):
    """--device, or the first GPU, or the CPU; ValueError if there is no such device."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device is {name!r}, it must be cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}, but PyTorch finds no CUDA device; leave it out to run on the CPU")
    return device


# ---------------------------------------------------------------- the command line


def main(argv=None):
    """Exit code: 0; 2 after bad input; 1 if files cannot be written or gradients are not finite; 130 or 143 after an
    interrupt. The last two save the run's state."""
    try:
        run = Run(parse_args(sys.argv[1:] if argv is None else argv, EXAMPLE))
    except ValueError as error:
        print(f"bread.py: {error}", file=sys.stderr)
        return 2
    try:
        if not run.config.eval:
            train(run)
        else:
            run.evaluate()
            run.say(f"{len(run.eval_problems)} problems, no anchors: greedy {run.evals[-1]['eval/greedy']:.1%}, "
                    f"sampled {run.evals[-1]['eval/accuracy']:.1%}")
            run.ranks.leave()
    except OSError as error:  # a full disk, say; checkpoints saved before are whole
        print(f"bread.py: {error}", file=sys.stderr)
        return 1
    if run.failure:
        print(f"bread.py: {run.failure}", file=sys.stderr)
        return 1
    return 128 + run.signal if run.signal else 0


if __name__ == "__main__":
    sys.exit(main())
