"""BREAD: GRPO that branches from an expert's trace where the model's own attempts all fail.

Zhang, Huang, Li, Ni, Chen, Oymak: "BREAD: Branched Rollouts from Expert Anchors Bridge SFT & RL for
Reasoning", arXiv 2506.17211, NeurIPS 2025. One training step, as `train` below carries it out:

    1  Sample G rollouts of every problem from the policy, unaided.                     sample_groups
    2  Where none is right, binary-search the shortest prefix of the expert's trace     anchor_search,
       (the anchor) from which some of a FRESH group of G rollouts are right.           search_anchors
    3  That group, all of it behind the same anchor, takes the failed one's place.      bread
    4  Advantage of a rollout: (its reward - mean of its group) / std of its group.     group_advantages
    5  Clipped GRPO loss on the tokens that the policy sampled; the rest is context.    grpo_loss, update

    paper        here                         what it is
    q            problem.prompt_ids           token ids of the rendered question
    e            problem.expert_ids, .cuts    token ids of the expert's trace, and where its episodes end
    G, K         --group-size, --max-episodes
    o_i, r_i     completion_ids, reward       what rollout i sampled (stop token included), and 1.0 or 0.0
    A_i          advantages_N                 one per rollout, repeated for each of its tokens
    pi, pi_old   logprobs_N, old_logprobs_N   natural logarithms at the sampling temperature

The paper leaves room; these choices are ours: a group triggers a search when it holds no success; a probe is
accepted with 1 .. G-1 successes; no cut lies behind the first statement of the answer; a problem without an
accepted cut is skipped (--on-fail); the loss is a token mean, clipped at 0.2, without KL; G = 8, K = 10.

Dimension key: G rollouts of a group   N sampled tokens of a micro-batch, end to end   D hidden size
"""
import collections
import ctypes
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import math
import numbers
import os
import random
import re
import sys
import time
import traceback
from pathlib import Path

# Threads that spin at barriers collapse as soon as another program takes a core (10 to 40 times slower,
# measured), threads that sleep at once make a tiny model half as fast: they spin for some microseconds, and
# then sleep. Has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# cuDNN, which torch prefers for attention, plans anew for every length that it meets.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
# Micro-batches differ in length: segments that grow leave no gaps between blocks of CUDA memory.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# On a CPU glibc would give every freed block of 32 MB back to the kernel, which has to clear the pages of the
# next one: 8% of an update. M_MMAP_MAX = 0: no such blocks; M_TRIM_THRESHOLD = -1: nothing goes back.
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):  # musl has none
    ctypes.CDLL(None).mallopt(-4, 0)
    ctypes.CDLL(None).mallopt(-1, -1)
import torch

import model as plain
import report
from checkpoint import RunFolder, digest, fingerprint, load, to_json, write_tensors, write_whole
from config import check_paths, load_function, parse_args
from cuts import find_cuts
from data import read_data, read_rows
from endings import ANY_MEMORY_FLAG, Ended, RewardError, out_of_memory, training
from evaluation import is_right, summarise, summary_lines
from packing import Prefixes, forward_suffixes, halve, make_batches
from parallel import MasterAdamW, Ranks
from plan import host_memory, make_plan
from rewards import (answers_match, extract_answer, math_reward, math_verify_reward, parse_gold,
                     without_cut_word)
from sampler import Fork, Places, SamplingParams, branch, prefill
from traces import Problem, Tokenizer, make_problem, reach_lines

EXAMPLE = Path(__file__).resolve().parent / "examples" / "chain"
HINT_ROOM = 64  # tokens for the words around a hint; the hint itself counts toward --max-new-tokens
# Options that a resumed run may change: they decide when it stops and what fits, never what is computed.
MAY_DIFFER = """steps token_budget output overwrite resume device eval_every eval_samples save_every data
                eval_data eval_sha256 sample_batch_size micro_batch_tokens recompute offload
                max_skipped_updates keep keep_best tensorboard strict write_hard""".split()


@dataclasses.dataclass
class Rollout:
    """One answer to a problem: prompt_ids | anchor_ids | completion_ids. Only the last part carries loss."""
    problem: Problem
    cut: int                         # tokens of the expert's trace that the policy was shown
    prompt_ids: list
    anchor_ids: list                 # those tokens; empty where they were shown as a hint inside the prompt
    completion_ids: list
    logprobs: list                   # of every completion token when it was drawn, in nats
    reward: float                    # None where the reward function said so: not for long, see sample_groups
    finish_reason: str               # "stop", "length", or "expert": a trace, which nobody sampled
    entropy: float | None = None     # mean over the completion's tokens, in nats
    advantage: float | None = None   # a method may set it; else `set_advantages` does


@dataclasses.dataclass
class State:
    """All that changes while training, beside weights and moments. A checkpoint holds exactly this."""
    step: int = 0
    tokens: dict = dataclasses.field(default_factory=dict)   # so far, by purpose: base, probe, trained, ...
    seconds: dict = dataclasses.field(default_factory=dict)  # so far, by phase
    shown: dict = dataclasses.field(default_factory=dict)    # problem id: most tokens of its trace ever shown
    used: dict = dataclasses.field(default_factory=dict)     # problem id: the same, in groups trained on
    memory: dict = dataclasses.field(default_factory=dict)   # problem id: what a method remembers, JSON-able
    evals: list = dataclasses.field(default_factory=list)    # rows of metrics
    skipped_updates: int = 0

    def progress(self, config):
        """Share of the run that is done, 0 to 1: of its steps or of its token budget, whichever ends it."""
        spent = report.training_tokens(self.tokens) / config.token_budget if config.token_budget else 0.0
        return min(1.0, max(spent, self.step / config.steps if config.steps else 1.0))

    def count(self, told):
        """Take in what every rank tells of the time since the last count: [Policy.tell(...), ...]."""
        for theirs in told:
            for name, number in theirs["counts"].items():
                kind, _, purpose = name.partition("/")
                if kind == "tokens":
                    self.tokens[purpose] = self.tokens.get(purpose, 0) + number
            for mine, new in ((self.shown, theirs["shown"]), (self.used, theirs["used"])):
                mine |= {id: max(cut, mine.get(id, 0)) for id, cut in new.items()}
            self.memory |= theirs["memory"]


# --reward; a user's is a function of (completion, answer, problem), too. None: it cannot be judged.
REWARDS = {"math": lambda completion, answer, problem: math_reward(completion, answer),
           "math_verify": lambda completion, answer, problem: math_verify_reward(completion, answer)}


class Policy:
    """The model, and what it takes to sample from it and to judge what it sampled."""

    def __init__(self, config, device, weights, reward=REWARDS["math"]):
        """weights: the folder they are read from, --model or a checkpoint. reward: as those of REWARDS."""
        self.config = config
        self.device = device
        self.reward = reward
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.tokenizer = Tokenizer.from_pretrained(config.model, json.loads(config.template_args or "{}"))
        self.model = plain.Transformer.from_pretrained(weights, device, dtype, recompute=config.recompute)
        self.reference = plain.Transformer.from_pretrained(config.model, device, dtype) if config.kl else None
        self.ops = None     # plain PyTorch
        self.places = None  # new ones for every call
        self.micro_batch_tokens = config.micro_batch_tokens or 4096
        if device.type == "cuda":
            import kernels  # needs triton, which a CPU run does not
            # Partial sums of a product stay in float32.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            self.ops = self.model.ops = kernels
        # What happened on this rank since `tell`:
        self.counts = collections.Counter()
        self.shown = {}
        self.probes = []

    def reserve(self, problems, held_out, num_ranks, say):
        """Say what the run takes, and return this Plan. On CUDA: places for the whole run, for which a decode
        step is captured once."""
        lengths = lengths_of(problems, held_out)
        shape = self.model.config
        plan = make_plan(shape, self.config, lengths, capacity(self.device), bool(self.ops), num_ranks)
        say("\n".join(plan.lines()))
        self.micro_batch_tokens = plan.micro_batch_tokens
        if self.ops:
            # The attention kernel has room for heads of at most 256 channels.
            ops = self.ops if shape.head_dim <= 256 else None
            longest = max(map(sum, lengths), default=0)
            self.places = Places(self.model, plan.rows, ops, self.config.max_new_tokens, plan.trunk, longest)
        return plan

    def read(self, method, say):
        """(problems of --data, of --eval-data): lists, empty without a file."""
        return read_problems(self.config, self.tokenizer, self.model.config, method, say)

    def context(self, problem, cut):
        """(prompt ids, anchor ids): what the policy reads before it writes, by --anchor-placement."""
        anchor_ids = problem.expert_ids[:cut]
        if self.config.anchor_placement == "prefill" or cut == 0:
            return problem.prompt_ids, anchor_ids
        return self.tokenizer.render(problem.question, hint=self.tokenizer.decode(anchor_ids)), []

    def prefill(self, contexts, purpose):
        """The trunk of [(prompt ids, anchor ids), ...], whose tokens are counted."""
        sequences = [prompt_ids + anchor_ids for prompt_ids, anchor_ids in contexts]
        # Evaluations are no cost of training.
        counted_as = "tokens/eval prefilled" if purpose == "eval" else "tokens/prefilled"
        self.counts[counted_as] += sum(len(sequence) for sequence in sequences)
        return prefill(self.model, sequences)

    def cuts(self, problem):
        """Where an anchor may end: with room for an answer, and not paid itself, or that would be learned."""
        near = [cut for cut in problem.cuts if cut < self.config.max_new_tokens]
        return [cut for cut in near if not (self.pay(self.context(problem, cut)[1], problem) or 0) > 0]

    def judge(self, problem, cut, context, completion):
        """A sampled completion with its reward. The answer may be written across anchor and completion."""
        prompt_ids, anchor_ids = context
        is_whole = completion.finish_reason != "length"
        reward = self.pay(anchor_ids + completion.token_ids, problem, is_whole)
        return Rollout(problem, cut, prompt_ids, anchor_ids, completion.token_ids, completion.logprobs,
                       reward, completion.finish_reason, report.mean(completion.entropies))

    def pay(self, token_ids, problem, is_whole=True):
        """The reward of an answer, or None where it cannot be judged. RewardError if the function fails."""
        # Told where the prompt opened a thought: a box inside one that never closes is no answer.
        opening = "<think>\n" if self.tokenizer.opens_thinking else ""
        text = opening + self.tokenizer.decode(token_ids)
        if not is_whole and self.config.reward in REWARDS:
            text = without_cut_word(text)
        try:
            reward = self.reward(text, problem.answer, problem)
            if not (reward is None or isinstance(reward, numbers.Real) and math.isfinite(reward)):
                raise TypeError(f"it returned {reward!r}, a finite number or None is needed")
            return None if reward is None else float(reward)  # True is 1
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            path = Path(self.config.output) / "reward_failed.json"
            write_whole(path, to_json({"id": problem.id, "answer": problem.answer, "completion": text}, 2))
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(f"--reward {self.config.reward}: {error!r} ({at.filename}, line {at.lineno}) "
                              f"at problem {problem.id}; the completion is in {path}") from error

    def tell(self, groups, sums, memory):
        """What other ranks have to know of this one's step: numbers, no rollouts. Counting starts anew."""
        used = {}
        for group in groups:  # the last rollout of a group may be the expert's trace, all of it
            used[group[0].problem.id] = max(group[0].cut, group[-1].cut)
        told = {"counts": {**self.counts, **sums, **report.count_groups(groups)},
                "shown": self.shown, "used": used, "probes": self.probes,
                "memory": {id: memory[id] for id in used if id in memory}}
        self.counts = collections.Counter()
        self.shown = {}
        self.probes = []
        return told


# ---------------------------------------------------------------- the algorithm


def train(config):
    """Train to the end of the run; returns the exit code. The numbers are those of the algorithm above."""
    ranks = Ranks(config.device)
    folder = RunFolder(config.output, resume=True) if config.resume and ranks.rank == 0 else None
    saved, notes = ranks.from_first(folder.latest() if folder else (None, []))
    log = report.Log(config, ranks.rank == 0, notes)
    method, reward = load_functions(config)
    policy = Policy(config, ranks.device, saved or config.model, reward)
    problems, held_out = policy.read(method, log.say)
    loss_of = getattr(method, "loss", batch_loss)
    optimizer = MasterAdamW(policy.model.parameters(), ranks, config.weight_decay, config.offload)
    if ranks.rank == 0 and not folder:  # not before everything was read: bad input leaves nothing behind
        folder = RunFolder(config.output, overwrite=config.overwrite)
    state = begin(config, ranks, folder, optimizer, saved, log.say)
    policy.reserve(problems, held_out, ranks.size, log.say)
    log.opening(policy, problems, held_out, state)

    evaluate(policy, ranks, held_out, state, folder)
    is_stuck = False
    ended = state.progress(config) >= 1
    with training(functools.partial(rescue, policy, optimizer, ranks, folder, state)):
        while not ended:
            lr = learning_rate(config, state)
            batch = ranks.share(next_problems(problems, config, state.step))
            with report.clock(state.seconds, "sample"):
                groups = checked(method(policy, batch, state), batch, state)            # 1, 2, 3
            set_advantages(groups, divide_by_std=not config.no_std)                     # 4
            with report.clock(state.seconds, "update"):
                sums, norms = update(policy, optimizer, ranks, groups, lr, loss_of)     # 5
            state.step += 1
            state.skipped_updates += norms.count(None)
            told = ranks.gather(policy.tell(groups, sums, state.memory))
            state.count(told)
            evaluate(policy, ranks, held_out, state, folder)
            log.step(folder, state, told, groups, {"lr": lr, "grad_norm": report.mean(norms)})
            is_stuck = optimizer.skipped_in_a_row >= config.max_skipped_updates
            ended = ranks.interrupted() or is_stuck or state.progress(config) >= 1
            if ended or config.save_every and state.step % config.save_every == 0:
                save(policy, optimizer, ranks, folder, state)
    log.closing(folder, state, is_example=config == parse_args(["--output", config.output], EXAMPLE))
    ranks.leave()
    if is_stuck:
        raise FloatingPointError(f"{optimizer.skipped_in_a_row} updates in a row had a loss or gradient that "
                                 "is not finite; the run is saved as it was before them: lower --lr")
    return 128 + ranks.signal if ranks.signal else 0


def checked(groups, problems, state):
    """What a method returned, a user's too, or a TypeError: a list of groups, which are lists of rollouts."""
    is_right = isinstance(groups, list) and bool(groups) == bool(problems)
    for group in groups if is_right else []:
        is_right &= isinstance(group, list) and group != [] and all(isinstance(one, Rollout) for one in group)
    if not is_right:
        raise TypeError(f"--method: groups, lists of Rollout, are needed, not {groups!r:.60}")
    for id, held in list(state.memory.items()):
        try:
            json.dumps(held)
        except (TypeError, ValueError) as error:
            del state.memory[id]  # or no checkpoint could be written any more
            raise TypeError(f"--method: state.memory holds {held!r:.60}: {error}") from error
    return groups


def bread(policy, problems, state):
    """Steps 1 to 3: one group per problem, unaided where some rollout was right, else behind an anchor."""
    groups = sample_groups(policy, [(problem, 0) for problem in problems], state.step, "base")      # 1
    failed = [problem for problem, group in zip(problems, groups) if num_successes(group) == 0]
    with report.clock(state.seconds, "search"):
        anchored = search_anchors(policy, failed, state.step)                                       # 2
    groups = [anchored.get(problem.id) or group for problem, group in zip(problems, groups)]        # 3
    return after_failure(policy, groups, state.step)


def grpo(policy, problems, state):
    """GRPO: step 1 alone. Traces are not used (unless --on-fail expert puts them into failed groups)."""
    groups = sample_groups(policy, [(problem, 0) for problem in problems], state.step, "base")
    return after_failure(policy, groups, state.step)


def sft(policy, problems, state):
    """Supervised fine-tuning on the expert's traces: no sampling, and a loss of its own."""
    return [[rollout] for rollout in expert_rollouts(policy, problems, advantage=1.0)]


def sample_groups(policy, points, step, purpose, trunk=None, group_size=None, temperature=None):
    """A fresh group of rollouts for every (problem, cut) of `points`, in order; cut 0 is the bare question.

    purpose: "base", "probe", "resample" or "eval": what the sampled tokens are counted as.
    trunk: (Trunk, {problem id: its sequence there}) that holds question and trace; without one, contexts are
    prefilled here. A row's noise depends on (seed, step, purpose, problem, cut, number in its group) alone.
    """
    config = policy.config
    group_size = group_size or config.group_size
    temperature = config.temperature if temperature is None else temperature
    params = SamplingParams(config.max_new_tokens, temperature, policy.tokenizer.stop_token_ids, config.seed)
    if not points:
        return []
    contexts = [policy.context(problem, cut) for problem, cut in points]
    cache, sequence_of = trunk or (policy.prefill(contexts, purpose), None)
    forks = []
    for i, ((problem, cut), context) in enumerate(zip(points, contexts)):
        row_ids = tuple(noise_id(step, purpose, problem.id, cut, n) for n in range(group_size))
        sequence = sequence_of[problem.id] if sequence_of else i
        forks.append(Fork(sequence, len(context[0] + context[1]), row_ids, config.max_new_tokens - cut))
    groups = []
    places = policy.places or Places(policy.model, config.sample_batch_size)
    half = max(1, places.places_6R.shape[1] // 2)
    try:
        with out_of_memory(f"--sample-batch-size {half}", " while sampling"):
            sampled = branch(policy.model, cache, forks, params, places, report.progress(purpose))
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} ({purpose}, step {step + 1})") from error
    for (problem, cut), context, completions in zip(points, contexts, sampled):
        judged = [policy.judge(problem, cut, context, completion) for completion in completions]
        group = [rollout for rollout in judged if rollout.reward is not None]
        if not group or purpose == "eval":  # what cannot be judged is not right, and all of it no lesson
            group = [dataclasses.replace(rollout, reward=rollout.reward or 0.0) for rollout in judged]
        groups.append(group)
        policy.counts["rollouts/unjudged"] += sum(rollout.reward is None for rollout in judged)
        if cut:
            policy.shown[problem.id] = max(policy.shown.get(problem.id, 0), cut)
        policy.counts[f"groups/{purpose}"] += 1
        policy.counts[f"rollouts/{purpose}"] += len(group)
        policy.counts[f"rewards/{purpose}"] += sum(rollout.reward for rollout in group)
        policy.counts[f"tokens/{purpose}"] += sum(len(rollout.completion_ids) for rollout in judged)
    return groups


def anchor_search(num_cuts, group_size, low=1, high=0):
    """Binary search for the shortest anchor whose group is neither hopeless nor trivial (a generator).

    Yields the number of a cut, 0 being the shortest anchor; is sent the successes of a fresh group there;
    returns the shortest cut seen with low <= successes <= high (0: group_size - 1), or None. No cut is asked
    for twice, and at most ceil(log2(num_cuts + 1)) are: 4 where K = 10 episodes give 9 cuts.

    >>> search = anchor_search(num_cuts=9, group_size=8)
    >>> next(search), search.send(0), search.send(8)  # 0 of 8 at cut 4: show more; 8 of 8 at cut 6: show less
    (4, 6, 5)
    >>> search.send(3)                                # 3 of 8 at cut 5: accepted, and nothing shorter is left
    Traceback (most recent call last):
    StopIteration: 5
    """
    high = high or group_size - 1
    accepted = None
    first = 0
    last = num_cuts - 1
    while first <= last:
        number = (first + last) // 2
        successes = yield number
        if successes < low:
            first = number + 1           # out of reach: show more of the trace
        else:
            last = number - 1            # within reach: try to show less
            if successes <= high:
                accepted = number
    return accepted


def probe(config, cuts):
    """`anchor_search` over cuts in tokens (a generator): yields one, is sent the group that was sampled
    there, returns the accepted group or None."""
    search = anchor_search(len(cuts), config.group_size, config.anchor_low, config.anchor_high)
    groups = {}
    successes = None  # what a generator is sent first
    while True:
        try:
            number = search.send(successes)
        except StopIteration as done:
            return groups.get(done.value)
        group = groups[number] = yield cuts[number]
        # Fewer than G where a reward was None: all of them right is no mixed group either.
        is_flat = num_successes(group) == len(group)
        successes = config.group_size if is_flat else num_successes(group)


def search_anchors(policy, problems, step):
    """Episode Anchor Search for all failed problems in lockstep: {problem id: accepted group, or None}.

    Every search names a cut, one batched branch serves them all, the groups go back. Question and trace of
    each problem are prefilled once, however many probes follow (a hint is another prompt for each).
    """
    trunk = None
    if problems and policy.config.anchor_placement == "prefill":
        contexts = [(problem.prompt_ids, problem.expert_ids) for problem in problems]
        trunk = policy.prefill(contexts, "probe"), {problem.id: i for i, problem in enumerate(problems)}
    by_id = {problem.id: problem for problem in problems}
    probes = []
    searches = {problem.id: probe(policy.config, policy.cuts(problem)) for problem in problems}
    replies = dict.fromkeys(searches)  # the first thing sent to a generator is None
    accepted = {}
    while replies:
        asked = {}
        for id, reply in replies.items():
            try:
                asked[id] = searches[id].send(reply)
            except StopIteration as done:
                accepted[id] = done.value
        groups = sample_groups(policy, [(by_id[id], cut) for id, cut in asked.items()], step, "probe", trunk)
        replies = dict(zip(asked, groups))
        for id, group in replies.items():
            length = len(by_id[id].expert_ids)
            probes.append({"step": step + 1, "id": id, "cut": asked[id], "of": length,
                           "share": asked[id] / length, "rollouts": len(group),
                           "successes": num_successes(group)})
    for row in probes:
        found = accepted[row["id"]]
        policy.probes.append(row | {"accepted": bool(found) and found[0].cut == row["cut"]})
    policy.counts["searched"] += len(problems)
    return accepted


def after_failure(policy, groups, step):
    """What becomes of failed groups for which no anchor was accepted (--on-fail); others stay as they are."""
    failed = [i for i, group in enumerate(groups) if num_successes(group) == 0]
    problems = [groups[i][0].problem for i in failed]
    if policy.config.on_fail == "resample":  # the compute-matched control: G more tries in the same context
        more = sample_groups(policy, [(problem, 0) for problem in problems], step, "resample")
        replaced = {i: groups[i] + again for i, again in zip(failed, more)}
    elif policy.config.on_fail == "expert":  # the paper's "GRPO with expert trace", which it finds worse
        traces = expert_rollouts(policy, problems)
        replaced = {i: groups[i][:-1] + [trace] for i, trace in zip(failed, traces)}
    else:                                    # skip: equal rewards, advantage zero
        return groups
    return [replaced.get(i, group) for i, group in enumerate(groups)]


def expert_rollouts(policy, problems, advantage=None):
    """The experts' whole traces as rollouts, a stop token added, with the policy's log-probs of them.

    Given an advantage they are to be imitated, by a loss without a ratio: then nothing is scored.
    """
    rollouts = []
    for problem in problems:
        # The whole trace is the completion, so that all of it carries loss.
        ids = problem.expert_ids + [policy.tokenizer.eos_id]
        cut = policy.shown[problem.id] = len(problem.expert_ids)
        rollouts.append(Rollout(problem, cut, problem.prompt_ids, [], ids, [0.0] * len(ids), 1.0, "expert",
                                advantage=advantage))
    unscored = rollouts if advantage is None else []
    size = policy.micro_batch_tokens
    for contexts, batches in make_batches(unscored, size, lambda rollout: 0.0, policy.device):
        for batch, logprobs_N in zip(batches, score(policy, policy.model, contexts, batches)):
            lengths = [len(rollout.completion_ids) for rollout in batch.rollouts]
            for rollout, own in zip(batch.rollouts, logprobs_N.split(lengths)):
                rollout.logprobs = own.tolist()
    return rollouts


def num_successes(group):
    """Of its rollouts those with a reward above 0."""
    return sum(rollout.reward > 0 for rollout in group)


def noise_id(*key):
    """A 64-bit number that depends on all parts of the key: the identity of a row's randomness."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


# ---------------------------------------------------------------- advantages and losses


def group_advantages(rewards_G, divide_by_std=True):
    """Rewards of a group (same problem, same anchor) -> advantages (G,): (r - mean) / population std.

    Float, of one group; ValueError else. They sum to 0; equal rewards give exactly 0. Without the division:
    Dr.GRPO, arXiv 2503.20783.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0])).tolist()
    [1.0, -1.0, -1.0, 1.0]
    """
    if rewards_G.dim() != 1 or not len(rewards_G):
        raise ValueError(f"group_advantages: rewards are {tuple(rewards_G.shape)}, not (G,)")
    if bool((rewards_G == rewards_G[0]).all()):
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    return centred_G / rewards_G.std(correction=0) if divide_by_std else centred_G


def set_advantages(groups, divide_by_std):
    """Give every rollout its advantage, unless the method has."""
    for group in groups:
        if group[0].advantage is None:
            rewards_G = torch.tensor([rollout.reward for rollout in group])
            advantages_G = group_advantages(rewards_G, divide_by_std)
            for rollout, advantage in zip(group, advantages_G.tolist()):
                rollout.advantage = advantage


def grpo_loss(logprobs_N, old_logprobs_N, advantages_N, weights_N, clip_low, clip_high):
    """GRPO's clipped objective (arXiv 2402.03300, eq. 3, without its KL term), negated: a scalar to minimise.

        J = sum over sampled tokens of  w min(rho A, clip(rho, 1 - low, 1 + high) A),     rho = pi / pi_old

    All of one shape, whichever, and float; ValueError else. logprobs_N carries the gradient. weights_N: what
    a token counts. For a mean over tokens 1 / tokens of the WHOLE update; for a mean over rollouts 1 /
    (rollouts x tokens of this one); in a padded (B, T) batch mask / denominator, with finite padding.
    """
    shapes = [tuple(x.shape) for x in (logprobs_N, old_logprobs_N, advantages_N, weights_N)]
    if len(set(shapes)) > 1:  # (B, 1) advantages would be broadcast, and weighted wrongly
        raise ValueError(f"grpo_loss: {shapes} given, not one shape for log-probs, old ones, advantages and "
                         "weights")
    ratio_N = (logprobs_N - old_logprobs_N).clamp(-20, 20).exp()  # e^20 is far outside any clip range
    unclipped_N = ratio_N * advantages_N
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantages_N
    objective_N = torch.minimum(unclipped_N, clipped_N)
    return -(weights_N * objective_N).sum()


def k3_divergence(logprobs_N, reference_N, weights_N):
    """KL(policy, reference), unbiased and never negative: exp(d) - d - 1 with d = log ref - log policy."""
    d_N = (reference_N - logprobs_N).clamp(-20, 20)
    return (weights_N * (d_N.exp() - d_N - 1)).sum()


def truncate_importance(batch, logprobs_N, cap):
    """The batch under --importance-cap: a token's weight is multiplied by the trainer's probability over the
    sampler's, which may round differently, at most by `cap`; the trainer's log-probs are then the old ones
    (truncated importance sampling). An expert's token keeps its weight."""
    _, log_ratio_N = report.compare(batch, logprobs_N)
    return dataclasses.replace(batch, old_logprobs_N=logprobs_N,
                               weights_N=batch.weights_N * log_ratio_N.exp().clamp(max=cap))


def batch_loss(config, batch, logprobs_N):
    """A micro-batch's share of GRPO's loss, with its KL term under --kl."""
    loss = grpo_loss(logprobs_N, batch.old_logprobs_N, batch.advantages_N, batch.weights_N,
                     config.clip_low, config.clip_high)
    if batch.reference_N is not None:
        loss = loss + config.kl * k3_divergence(logprobs_N, batch.reference_N, batch.weights_N)
    return loss


def likelihood_loss(config, batch, logprobs_N):
    """A micro-batch's share of SFT's loss: the negative log-likelihood of the trace."""
    return -(batch.weights_N * logprobs_N).sum()


sft.loss = likelihood_loss
grpo.needs_trace = False
# --method; others are functions of the user's files, examples/methods.py for instance.
METHODS = {"bread": bread, "grpo": grpo, "sft": sft}


# ---------------------------------------------------------------- the update


def update(policy, optimizer, ranks, groups, lr, loss_of):
    """`--updates-per-batch` optimizer steps on the groups of all ranks: (this rank's sums, gradient norms).

    loss_of(config, batch, logprobs_N): a micro-batch's share of the loss. A token's weight is one number for
    the whole update, so gradients depend neither on how rows fall into micro-batches nor on how problems fall
    to ranks. A norm is None where nothing was changed, since it or the loss was not finite.
    """
    config = policy.config
    mine = [rollout for group in groups for rollout in group]
    if config.mask_truncated:  # an answer that was cut off may have been on its way to the right one
        mine = [rollout for rollout in mine if rollout.finish_reason != "length"]
    # Without advantage and KL term a rollout's gradient is exactly zero: it counts, but is not run.
    trained = [rollout for rollout in mine if rollout.advantage or config.kl]
    whole = ranks.total({"tokens": sum(len(rollout.completion_ids) for rollout in mine),
                         "rollouts": len(mine), "trained": len(trained)})

    def weight_of(rollout):
        if config.loss_mean == "token":
            return 1 / whole["tokens"]
        return 1 / (whole["rollouts"] * len(rollout.completion_ids))

    packs = list(make_batches(trained, policy.micro_batch_tokens, weight_of, policy.device))
    sums = collections.Counter()
    norms = []
    for epoch in range(config.updates_per_batch if whole["trained"] else 0):
        passed, packs = add_gradients(policy, packs, loss_of, is_first=epoch == 0)
        sums.update(passed)  # of a Counter, this adds
        with out_of_memory("--offload", " in the optimizer"):
            norms.append(optimizer.step(lr, config.grad_clip, passed.get("loss", 0.0)))
    optimizer.is_whole = True
    sums["loss"] /= max(len(norms), 1)
    return sums, norms


def add_gradients(policy, packs, loss_of, is_first):
    """The gradient of all micro-batches: (sums for metrics, the packs as later passes have to see them).

    Where memory runs out all begins anew with micro-batches of half the size, which changes no gradient."""
    while True:
        sums = collections.Counter()
        try:
            seen = [run_pack(policy, *pack, loss_of, is_first, sums) for pack in packs]
            return {name: getattr(number, "item", lambda: number)() for name, number in sums.items()}, seen
        except torch.OutOfMemoryError as error:
            failure = error.with_traceback(None)  # whose frames hold the tensors of the pass
        policy.model.zero_grad(set_to_none=True)
        halved = list(itertools.chain.from_iterable(halve(*pack) for pack in packs))
        if num_batches(halved) == num_batches(packs):
            with out_of_memory("--recompute, --offload or a lower --max-new-tokens", " with one rollout"):
                raise failure
        packs = halved
        policy.micro_batch_tokens = max(1, policy.micro_batch_tokens // 2)
        print(f"out of memory: from now on micro-batches of {policy.micro_batch_tokens} tokens "
              "(--micro-batch-tokens)", file=sys.stderr)


def num_batches(packs):
    """Of all that `make_batches` yielded."""
    return sum(len(batches) for _, batches in packs)


def run_pack(policy, contexts, batches, loss_of, is_first, sums):
    """Forward and backward of rollouts that share prefixes; adds to `sums`, which wait for no device."""
    config = policy.config
    if is_first and policy.reference is not None:
        for batch, reference_N in zip(batches, score(policy, policy.reference, contexts, batches)):
            batch.reference_N = reference_N
    prefixes = Prefixes(policy.model, contexts)
    seen = []
    for batch in batches:
        logprobs_N, entropies_N = token_logprobs(policy, policy.model, prefixes, batch)
        sums.update(report.measure(config, batch, logprobs_N.detach(), entropies_N, is_first))
        if is_first and config.importance_cap:
            batch = truncate_importance(batch, logprobs_N.detach(), config.importance_cap)
        loss = loss_of(config, batch, logprobs_N)
        loss.backward()
        sums["loss"] += loss.detach().double()
        sums["tokens/trained"] += len(batch.targets_N)
        seen.append(batch)
    prefixes.backward()
    sums["tokens/trained"] += sum(map(len, contexts))
    return contexts, seen


@torch.no_grad()
def score(policy, model, contexts, batches):
    """Log-probs of the batches' targets under `model`, without a gradient: [(N,), ...]."""
    policy.counts["tokens/scored"] += sum(map(len, contexts)) + sum(len(batch.targets_N) for batch in batches)
    prefixes = Prefixes(model, contexts)
    return [token_logprobs(policy, model, prefixes, batch)[0] for batch in batches]


def token_logprobs(policy, model, prefixes, batch):
    """(log-probs (N,) of the batch's targets, entropies (N,) of the distributions that they come from)."""
    hidden_ND = forward_suffixes(model, prefixes, batch.rows)
    ops = policy.ops or plain
    return ops.linear_logprob(hidden_ND, model.lm_head.weight, batch.targets_N, policy.config.temperature)


def learning_rate(config, state):
    """The rate of the coming step: --lr, after a linear warm-up, falling over the last --lr-decay of the run.
    Decided before the step, whose own tokens may end a run of --token-budget."""
    warm = (state.step + 1) / config.warmup_steps if config.warmup_steps else 1.0
    left = (1 - state.progress(config)) / config.lr_decay if config.lr_decay else 1.0
    return config.lr * min(1.0, warm, left)


# ---------------------------------------------------------------- problems, evaluation, files


def read_problems(config, tokenizer, shape, method, say):
    """(problems of --data, of --eval-data) that a model of this ModelConfig can be trained and evaluated on
    by this method; [] without a file. Rows that are no use are left out and counted by reason."""
    named = {name: getattr(config, f"{name}_field") for name in ("question", "trace", "answer")}
    fields = {name: path for name, path in named.items() if path}
    both = []
    for path, trains in ((config.data, True), (config.eval_data, False)):
        # An evaluation shows no trace, so that it has no business in it.
        needs_trace = trains and (getattr(method, "needs_trace", True) or config.on_fail == "expert")
        convert = functools.partial(to_problem, config, tokenizer, shape, needs_trace)
        path = "" if config.eval and trains else path
        problems = read_data(path, convert, fields, needs_trace, config.strict, say) if path else []
        if path and trains and len(problems) < config.problems_per_step:
            raise ValueError(f"{path}: {len(problems)} usable problems, but a step needs "
                             f"{config.problems_per_step}: add some, or lower --problems-per-step")
        if problems and needs_trace and config.method != "sft":
            say("\n".join(reach_lines(problems, tokenizer, config.max_new_tokens)))
            silent = sum(extract_answer(problem.trace) is None for problem in problems)
            if silent and config.reward in REWARDS:
                say(f"warning: {silent} of {len(problems)} traces state no answer that the reward can read: "
                    "\\boxed{}, #### or 'the answer is'; from their anchors the model learns no form of it")
        both.append(problems)
    trained = {str(problem.question) for problem in both[0]}
    overlap = sum(str(problem.question) in trained for problem in both[1])
    if overlap:
        say(f"warning: {overlap} of {len(both[1])} held-out questions are trained on, too")
    return both


def load_functions(config):
    """The functions of --method and --reward; a user's file that both name runs once."""
    modules = {}
    method = load_function("--method", config.method, METHODS, modules)
    reward = load_function("--reward", config.reward, REWARDS, modules)
    if config.reward == "math_verify":
        math_verify_reward("", "1")  # without the package the run ends here, not after its first step
    return method, reward


def to_problem(config, tokenizer, shape, needs_trace, row):
    """A data.Row as a Problem for a model of this ModelConfig, or a ValueError, "reason: detail"."""
    row = row if needs_trace else dataclasses.replace(row, trace="")
    if config.reward in REWARDS:  # a user's function may know answers that ours cannot check
        gold = parse_gold(row.answer)
        if gold is None:
            raise ValueError(f"the answer cannot be checked: {row.answer!r:.60}")
        row = dataclasses.replace(row, answer=gold)
        found = extract_answer(row.trace)
        if found is not None and not answers_match(found, gold):
            raise ValueError(f"the trace contradicts the answer: {found!r:.60} for {gold!r:.60}")
    cuts_of = functools.partial(find_cuts, matches=answers_match, max_episodes=config.max_episodes)
    problem = make_problem(row, tokenizer, cuts_of, config.system or None)
    size = len(problem.prompt_ids)
    window = shape.max_position_embeddings
    largest = max(problem.prompt_ids + problem.expert_ids)
    if largest >= shape.vocab_size:
        raise ValueError(f"a token beyond the {shape.vocab_size} rows of the model's embedding: "
                         f"{tokenizer.decode([largest], skip_special_tokens=False)!r} is {largest}")
    hint_room = HINT_ROOM if config.anchor_placement == "hint" else 0  # for a line around the anchor's text
    if size + hint_room + config.max_new_tokens > window:
        raise ValueError(f"prompt and --max-new-tokens exceed the model's {window} positions: lower "
                         f"--max-new-tokens to {max(1, window - size - hint_room)}")
    if size + len(problem.expert_ids) > window:
        raise ValueError(f"prompt and trace exceed the model's {window} positions: by "
                         f"{size + len(problem.expert_ids) - window}")
    return problem


def next_problems(problems, config, step):
    """The step's problems, which depend on (seed, step) only. An epoch is a shuffled pass in whole steps;
    what does not fill a step waits for another epoch, so no step holds a problem twice."""
    count = config.problems_per_step
    epoch, position = divmod(step, len(problems) // count)
    order = random.Random(f"{config.seed} {epoch}").sample(problems, len(problems))
    return order[position * count:(position + 1) * count]


def evaluate(policy, ranks, problems, state, folder):
    """Accuracy on the held-out problems without anchors, greedy and sampled, where an evaluation is due."""
    config = policy.config
    # Not because of a signal: a resumed run has the evaluations of an unbroken one.
    due = state.step % config.eval_every == 0 or state.progress(config) >= 1
    if not (problems and due) or (state.evals and state.evals[-1]["step"] == state.step):
        return
    row = {"step": state.step}
    mine = ranks.share(problems)
    with report.clock(state.seconds, "eval"):
        for name, samples, temperature in (("accuracy", config.eval_samples, None), ("greedy", 1, 0.0)):
            groups = answer(policy, mine, state.step, samples, temperature)
            total = ranks.total({"right": sum(map(num_successes, groups)), "all": sum(map(len, groups))})
            row[f"eval/{name}"] = total["right"] / total["all"]
    state.count(ranks.gather(policy.tell([], {}, {})))
    state.evals.append(row | {"tokens/sampled": report.training_tokens(state.tokens)})
    if state.step == 0 and folder:  # later ones are part of their step's row
        folder.append("metrics.jsonl", state.evals[-1])


def answer(policy, problems, step, samples, temperature=None):
    """Unaided answers to every problem, for an evaluation: a group for each."""
    size = policy.config.sample_batch_size
    groups = []
    for begin in range(0, len(problems), size):  # bounds what prompts hold
        points = [(problem, 0) for problem in problems[begin:begin + size]]
        groups += sample_groups(policy, points, step, "eval", None, samples, temperature)
    return groups


def begin(config, ranks, folder, optimizer, saved, say):
    """A new State, or a checkpoint's, which must be of a run with these options; writes run.json."""
    options = dataclasses.asdict(config)
    options["data_sha256"] = digest(config.data)
    options["eval_sha256"] = digest(config.eval_data) if config.eval_data else ""
    # What decides prompts, stops and arithmetic; the weights where they are the reference.
    files = [Path(config.model) / name for name in ("config.json", *plain.COMPANION_FILES)]
    files += sorted(Path(config.model).glob("*.safetensors")) if config.kl else []
    options["model_sha256"] = fingerprint([digest(file) for file in files if file.is_file()])
    state = State()
    history = []  # of every process that worked on this run
    if saved:
        before = ranks.from_first(folder.read_json("run.json") if folder else None)
        told = before.pop("history", [])
        history = told if isinstance(told, list) else []
        for name, was in before.items():
            now = options.get(name)
            if name in ("data_sha256", "model_sha256") and now != was:
                what = f"tokenizer, template or reference {config.model}"
                what = config.data if name == "data_sha256" else what
                raise ValueError(f"--resume: {what} has changed since the run in {config.output} began; "
                                 "start a new run in another --output")
            if name not in MAY_DIFFER and now != was:
                raise ValueError(f"--resume: {name} is {now!r}, but the run in {config.output} has {was!r}; "
                                 "start a new run in another --output")
            if name in ("steps", "token_budget") and now != was:
                say(f"--resume: the run ends at --{name.replace('_', '-')} {now}, not {was}; decay of the "
                    "learning rate and every schedule over the run move with it")
        tensors, record = load(saved, optimizer.owns)
        optimizer.restore(tensors)
        try:
            state = State(**record)
        except TypeError as error:
            raise ValueError(f"--resume: {saved} is of another version of this program ({error}): begin a "
                             f"new run with its weights, --model {saved}, in another --output") from error
        if config.steps < state.step:
            raise ValueError(f"--resume: the run has done {state.step} steps, --steps is {config.steps}")
        say(f"continues from {saved.name} at step {state.step}")
    if folder:
        try:
            folder.need(checkpoint_bytes(optimizer))
        except OSError as error:
            raise ValueError(f"{error}: make room, or give another --output") from error
        for name in ("metrics.jsonl", "samples.jsonl", "probes.jsonl"):
            folder.truncate(name, state.step)
        history.append({"time": time.strftime("%Y-%m-%d %H:%M:%S"), "step": state.step, "steps": config.steps,
                        "device": str(ranks.device), "processes": ranks.size})
        folder.write_json("run.json", options | {"history": history})
    ranks.listen(state.step)
    return state


def save(policy, optimizer, ranks, folder, state):
    """checkpoint-N: a Hugging Face folder, beside it masters and moments, by the rank that owns them, and the
    state. The folder --output is that of all ranks."""
    if not all(bool(weight.isfinite().all()) for weight in optimizer.weights):
        raise FloatingPointError("the weights are NaN or infinite; older checkpoints are sound")

    def write(path=None):
        path = ranks.from_first(path)
        if folder:
            policy.model.save_pretrained(path)
        write_tensors(path, ranks.rank, optimizer.state())
        ranks.gather(None)  # all are done

    if folder:
        accuracies = {row["step"]: row["eval/accuracy"] for row in state.evals}
        best = accuracies.get if policy.config.keep_best else None
        folder.save(state.step, write, dataclasses.asdict(state), checkpoint_bytes(optimizer),
                    policy.config.keep, best)
    else:
        write()


def checkpoint_bytes(optimizer):
    """Of a checkpoint: weights, float32 masters and moments."""
    return sum(weight.numel() * (weight.element_size() + 12) for weight in optimizer.weights)


def rescue(policy, optimizer, ranks, folder, state, trace, is_sound):
    """Save a run that could not go on, if that is possible: a text of what became of it."""
    told = ""
    if trace and folder:
        write_whole(folder.path / "crash.txt", trace.encode())
        told = f"the traceback is in {folder.path / 'crash.txt'}, "
    saved, _ = folder.latest() if folder else (None, [])
    last = f"{policy.config.output}: " + (f"--resume goes on from {saved.name}" if saved else
                                          "it holds no checkpoint, --overwrite begins anew")
    # Other processes, which have no trouble, wait for this one, which can only end.
    is_sound = is_sound and optimizer.is_whole and ranks.size == 1
    if not is_sound or not state.step or (folder.path / f"checkpoint-{state.step}").is_dir():
        return f"{told}nothing more was saved in {last}"
    try:
        save(policy, optimizer, ranks, folder, state)
    except Exception as error:
        return f"{told}nothing more could be saved ({error}) in {last}"
    return f"{told}saved after step {state.step} in {policy.config.output}: --resume goes on from there"


def lengths_of(problems, held_out):
    """(tokens of the prompt, of the expert's trace) of every problem; of a held-out one no trace is used."""
    return [(len(problem.prompt_ids), len(problem.expert_ids)) for problem in problems] + [
        (len(problem.prompt_ids), 0) for problem in held_out]


def capacity(device):
    """Bytes that this process may hold: of a GPU what is free or its own already, or the host's memory."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes + torch.cuda.memory_reserved(device)
    return host_memory()


def plan_only(config):
    """--plan: what a run takes, by config.json and, where they are given, the problems; no weights."""
    shape = plain.ModelConfig.from_dict(plain.read_config(config.model))
    lengths = []
    if config.data or config.eval_data:
        method, _ = load_functions(config)
        tokenizer = Tokenizer.from_pretrained(config.model, json.loads(config.template_args or "{}"))
        lengths = lengths_of(*read_problems(config, tokenizer, shape, method, print))
    ranks = Ranks("cpu" if config.plan else config.device)
    room = (config.plan - 1) * 1e9 if config.plan else capacity(ranks.device)  # CUDA itself takes about 1 GB
    on_cuda = bool(config.plan) or ranks.device.type == "cuda"
    print("\n".join(make_plan(shape, config, lengths, room, on_cuda, ranks.size).lines()))
    ranks.leave()
    return 0


def evaluate_only(config):
    """--eval: what the model answers to every held-out problem, and what that amounts to."""
    ranks = Ranks(config.device)
    policy = Policy(config, ranks.device, config.model, load_functions(config)[1])
    log = report.Log(config, ranks.rank == 0)
    _, problems = policy.read(grpo, log.say)
    policy.reserve([], problems, ranks.size, log.say)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    mine = ranks.share(problems)
    greedy = answer(policy, mine, 0, 1, temperature=0.0)
    sampled = answer(policy, mine, 0, config.eval_samples)
    rows = ranks.gather([answer_row(policy, *groups) for groups in zip(greedy, sampled)])
    if ranks.rank == 0:
        rows = sorted(itertools.chain.from_iterable(rows), key=lambda row: row["number"])
        summary = summarise(rows)
        write_whole(folder / "eval.jsonl", b"".join(map(to_json, rows)))
        write_whole(folder / "eval.json", to_json(summary | {"options": dataclasses.asdict(config)}, 2))
        log.say("\n".join(summary_lines(config, summary)))
        log.say(f"written: {folder / 'eval.json'}, with every completion {folder / 'eval.jsonl'}")
        if config.write_hard:
            hard = {row["number"] for row in rows if not any(map(is_right, row["samples"]))}
            kept = [row for number, row in read_rows(config.eval_data) if number in hard]
            # A table may hold dates, which JSON does not know.
            lines = [json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in kept]
            write_whole(Path(config.write_hard), "".join(lines).encode())
            log.say(f"{len(kept)} problems without a right sample: {config.write_hard}")
    ranks.leave()
    return 0


def answer_row(policy, greedy, sampled):
    """A problem and its answers, [one greedy rollout] and the sampled ones, for eval.jsonl."""
    problem = greedy[0].problem
    answers = []
    for rollout in greedy + sampled:
        text = policy.tokenizer.decode(rollout.completion_ids)
        opening = "<think>" if policy.tokenizer.opens_thinking else ""
        answers.append({"completion": text, "reward": rollout.reward, "tokens": len(rollout.completion_ids),
                        "finish_reason": rollout.finish_reason, "answer": extract_answer(opening + text)})
    return {"number": problem.number, "id": problem.id, "level": problem.level, "question": problem.question,
            "answer": problem.answer, "greedy": answers[0], "samples": answers[1:]}


def main(argv=None):
    """Exit code: 0; 2 after bad input; 1 if files cannot be written or gradients are not finite; 130 or 143
    after an interrupt. The last two save the run's state."""
    sys.modules.setdefault("bread", sys.modules[__name__])  # a user's `import bread` gets no second copy
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would be taken for stderr
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a closed one is None
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode ends no run
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv, EXAMPLE)
        check_paths(config)
        with out_of_memory(ANY_MEMORY_FLAG):
            if config.plan >= 0:
                return plan_only(config)
            return evaluate_only(config) if config.eval else train(config)
    except ValueError as error:
        complain(error)
        return 2
    except KeyboardInterrupt:  # while training, Ranks.listen hears it
        complain("interrupted")
        return 130
    except (OSError, FloatingPointError, MemoryError, RewardError, Ended) as error:  # what was saved is whole
        complain(error)
        return 2 if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG else 1


def complain(error):
    """One line on stderr, with no more than the beginning of a name of 200 letters."""
    line = " ".join(f"{error}".splitlines())
    print(re.sub(r"\S{200,}", lambda word: f"{word[0][:60]}[...]", f"bread.py: {line}"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
