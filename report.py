"""What a run prints and logs: the opening, one line and one JSON object per step, the table at the end.

`config` is any object with the fields of config.Config, `state` one with those of bread.State, `folder` a
RunFolder or None; a group is a list of rollouts of one problem behind one anchor.
"""
import collections
import contextlib
import dataclasses
import time

import torch

ABOUT = {
    "bread": "Every problem is tried without help first. Where all tries fail, a binary search finds the\n"
             "shortest piece of the expert's trace from which some succeed. The model learns from those.",
    "grpo": "Every problem is tried without help; the model learns from groups in which some tries succeed.\n"
            "Where all fail there is no gradient: watch the reward. The expert's traces are not used.",
    "sft": "The model imitates the expert's traces token by token.\n"
           "Held-out accuracy tells whether it can express them.",
}
# Shown on lines of their own.
NOT_OPTIONS = ("model", "data", "eval_data", "output", "method")
# Of tokens. "scored" is what --kl and --on-fail expert run without gradient.
PURPOSES = ("base", "probe", "resample", "eval", "prefilled", "scored", "trained")


def mean(values):
    """Mean of those values that are not None; None of none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def ratio(part, whole):
    return part / whole if whole else None  # null in JSON


def training_tokens(tokens):
    """Tokens that the policy sampled for training: the honest cost of a method, probes included."""
    return sum(tokens.get(purpose, 0) for purpose in ("base", "probe", "resample"))


@contextlib.contextmanager
def clock(seconds, phase):
    """Add the time of a `with` block to seconds[phase]."""
    began = time.perf_counter()
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # else the tail of this phase's work would count in the next
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began


# ---------------------------------------------------------------- what a step adds up to


def count_groups(groups):
    """What a step's groups add up to, {"groups/...": number}; sums of several ranks add."""
    counts = collections.Counter()
    for group in groups:
        if group[0].finish_reason == "expert":  # nobody sampled it: it has no reward, no length and no anchor
            continue
        counts["groups"] += 1
        counts["groups/flat"] += not any(rollout.advantage for rollout in group)
        if group[0].cut:
            counts["groups/anchored"] += 1
            counts["groups/anchor_share"] += group[0].cut / len(group[0].problem.expert_ids)
        for rollout in group:
            counts["groups/rollouts"] += 1
            counts["groups/reward"] += rollout.reward
            counts["groups/tokens"] += len(rollout.completion_ids)
            counts["groups/cut_off"] += rollout.finish_reason == "length"
            if rollout.entropy is not None:  # an expert's trace has none
                counts["groups/entropy"] += rollout.entropy
                counts["groups/sampled"] += 1
    return counts


def compare(batch, logprobs_N):
    """(1 for each token that a sampler drew, 0 for an expert's; log(trainer's / sampler's probability) of the
    former, 0 of the latter)."""
    sampled_N = batch.expand([rollout.finish_reason != "expert" for rollout in batch.rollouts])
    return sampled_N, sampled_N * (logprobs_N - batch.old_logprobs_N)


def measure(config, batch, logprobs_N, entropies_N, is_first):
    """What a batch tells of the policy, {name: sum, a tensor}: nobody waits for the device here. In the first
    pass over a step's rollouts also how far the sampler was from the trainer."""
    sampled_N, log_ratio_N = compare(batch, logprobs_N)
    sums = {}
    if is_first:
        importance_N = log_ratio_N.exp().clamp(max=config.importance_cap or torch.inf)
        sums = {"compared": sampled_N, "gap": log_ratio_N.abs(), "importance": sampled_N * importance_N}
        if config.importance_cap:  # then the trainer's log-probs are the old ones
            log_ratio_N = torch.zeros_like(log_ratio_N)
    # The clip removes a token's gradient where it is already too likely for A > 0, too unlikely for A < 0.
    ratio_N = log_ratio_N.exp()
    too_likely_N = (batch.advantages_N > 0) & (ratio_N > 1 + config.clip_high)
    too_unlikely_N = (batch.advantages_N < 0) & (ratio_N < 1 - config.clip_low)
    sums |= {"clipped": too_likely_N | too_unlikely_N, "entropy": entropies_N,
             "scored": torch.ones_like(logprobs_N)}
    return {name: numbers_N.sum(dtype=torch.float64) for name, numbers_N in sums.items()}


def step_metrics(sums):
    """Summed counts of a step -> metrics, by TRL's names where the meaning is the same."""
    return {
        "reward": ratio(sums["successes/base"], sums["rollouts/base"]),
        "reward/train": ratio(sums["groups/reward"], sums["groups/rollouts"]),
        "frac_reward_zero_std": ratio(sums["groups/flat"], sums["groups"]),
        "anchor/searched": sums["searched"], "anchor/accepted": sums["groups/anchored"],
        "anchor/probes": sums["groups/probe"],
        "anchor/fraction": ratio(sums["groups/anchor_share"], sums["groups/anchored"]),
        "completions/mean_length": ratio(sums["groups/tokens"], sums["groups/rollouts"]),
        "completions/clipped_ratio": ratio(sums["groups/cut_off"], sums["groups/rollouts"]),
        "sampler/entropy": ratio(sums["groups/entropy"], sums["groups/sampled"]),
        # The loss is that of the whole update; the others are means over the tokens of all its passes, of
        # which the first alone compares the sampler's log-probs with the trainer's.
        "loss": sums["loss"], "entropy": ratio(sums["entropy"], sums["scored"]),
        "clip_fraction": ratio(sums["clipped"], sums["scored"]),
        "sampler/logprob_gap": ratio(sums["gap"], sums["compared"]),
        "sampler/importance_weight": ratio(sums["importance"], sums["compared"])}


# ---------------------------------------------------------------- for the reader, and for scripts


class Log:
    """Lines for the reader and files for scripts; silent except on rank 0."""

    def __init__(self, config, speaks, notes=()):
        self.config = config
        self.speaks = speaks
        self.began = time.time()
        self.before = 0.0  # progress when this process began, for the time that is left
        self.seconds = None  # by phase before its first step, until that is told
        self.decode = None
        self.num_parameters = 0
        self.num_expert_tokens = 0
        for note in notes:
            self.say(note)

    def say(self, line):
        if self.speaks:
            print(line, flush=True)  # at once, also into a pipe

    def opening(self, policy, problems, held_out, state):
        """Print what runs on what, what it will do and what a step costs."""
        config = self.config
        self.before = state.progress(config)
        self.seconds = dict(state.seconds)
        self.decode = policy.tokenizer.decode
        self.num_parameters = sum(weight.numel() for weight in policy.model.parameters())
        self.num_expert_tokens = sum(len(problem.expert_ids) for problem in problems)
        dtype = next(policy.model.parameters()).dtype
        options = []
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if value != field.default and field.name not in NOT_OPTIONS:
                value = "" if field.type is bool else f" {value}"
                options.append(f"--{field.name.replace('_', '-')}{value}")
        each = f"{config.group_size} rollouts of at most {config.max_new_tokens} tokens"
        if config.method == "sft":
            each = "the expert's trace"
        held_out = f", {len(held_out)} held out in {config.eval_data}" if held_out else ""
        self.say(f"method   {config.method}")
        self.say(f"model    {config.model}: {self.num_parameters / 1e6:.2f}M parameters, {dtype} on "
                 f"{policy.device}, {'Triton kernels' if policy.ops else 'plain PyTorch'}")
        self.say(f"data     {config.data}: {len(problems)} problems{held_out}")
        self.say(f"output   {config.output}")
        self.say(f"options  {' '.join(options) or 'all defaults'}")
        updates = f"{config.updates_per_batch} update{'s' * (config.updates_per_batch > 1)}"
        self.say(f"a step   {config.problems_per_step} problems x {each}; {updates} in micro-batches of "
                 f"{policy.micro_batch_tokens} tokens")
        self.say(f"\n{ABOUT.get(config.method, 'Groups are made by a function of the user.')}\n")

    def step(self, folder, state, told, groups, metrics):
        """One JSON object for scripts, every probe, a few rollouts to look at, one line for the reader.

        told: Policy.tell of every rank. metrics: what is known already, {"lr": ..., ...}.
        """
        if not self.speaks:
            return
        sums = collections.Counter()
        for theirs in told:
            sums.update(theirs["counts"])  # of a Counter, this adds
        row = {"step": state.step, **step_metrics(sums), **metrics, "skipped_updates": state.skipped_updates,
               "tokens/sampled": training_tokens(state.tokens)}
        for name in ("shown", "used"):
            row[f"anchor/{name}"] = sum(getattr(state, name).values()) / self.num_expert_tokens
        row |= {f"tokens/{purpose}": state.tokens.get(purpose, 0) for purpose in PURPOSES}
        # 2 operations a parameter and token forward, 4 backward (arXiv 2604.23747, appendix B).
        forward = row["tokens/sampled"] + row["tokens/prefilled"] + row["tokens/scored"]
        training = 8 if self.config.recompute else 6
        row["flops"] = self.num_parameters * (2 * forward + training * row["tokens/trained"])
        seconds = {"search": 0.0, **state.seconds}
        row |= {f"seconds/{phase}": round(seconds[phase], 3) for phase in seconds}
        if state.evals and state.evals[-1]["step"] == state.step:  # an evaluation was due
            row |= state.evals[-1]
        folder.append("metrics.jsonl", row)
        for theirs in told:
            for probe in theirs["probes"]:
                folder.append("probes.jsonl", probe)
        for group in groups[:2]:  # two rollouts a step are enough to look at
            folder.append("samples.jsonl", self.sample(state.step, group[0]))
        # The time that is left, from the pace of this process alone.
        done = state.progress(self.config)
        seconds_left = (time.time() - self.began) * (1 - done) / max(done - self.before, 1e-9)
        self.say(step_line(self.config, row, seconds_left))
        if self.seconds is not None:  # once: what a step takes here
            self.say(share_line(self.seconds, seconds))
            self.seconds = None

    def sample(self, step, rollout):
        """A rollout as text, anchor and completion apart."""
        problem = rollout.problem
        anchor_ids = problem.expert_ids[:rollout.cut] if rollout.finish_reason != "expert" else []
        return {"step": step, "id": problem.id, "question": problem.question, "answer": problem.answer,
                "anchor": self.decode(anchor_ids), "completion": self.decode(rollout.completion_ids),
                "reward": rollout.reward, "advantage": rollout.advantage,
                "finish_reason": rollout.finish_reason, "entropy": rollout.entropy}

    def closing(self, folder, state, is_example):
        """Print before, after, the cost, where the checkpoint is, how to compare; let go of the folder."""
        config = self.config
        sampled = training_tokens(state.tokens)
        self.say("")
        if state.evals:
            self.say(f"{'held out, no anchors':<24}{'before':>10}{'after':>10}")
            for name, key in (("greedy", "eval/greedy"), ("sampled", "eval/accuracy")):
                self.say(f"  {name:<22}{state.evals[0][key]:>10.1%}{state.evals[-1][key]:>10.1%}")
        if sampled:
            share = state.tokens.get("probe", 0) / sampled
            self.say(f"{'tokens sampled':<24}{'':>10}{sampled:>10,}   ({share:.0%} in probes)")
        self.say(f"{'seconds':<24}{'':>10}{time.time() - self.began:>10.0f}\n")
        if folder:
            saved = folder.path / f"checkpoint-{state.step}"
            self.say(f"checkpoint  {saved if saved.is_dir() else 'none'}  (a Hugging Face folder)")
            folder.close()
        if config.method == "bread":
            flags = "" if is_example else f"--model {config.model} --data {config.data} [the same flags] "
            # GRPO with as many sampled tokens, whatever number of steps that takes.
            rival = f"--method grpo --steps 100000 --token-budget {sampled}"
            self.say(f"compare     python bread.py {flags}{rival}")


def share_line(before, after):
    """What the first step took, and for what. Searches are timed as part of sampling."""
    took = {phase: after[phase] - before.get(phase, 0.0) for phase in ("sample", "search", "update")}
    whole = took["sample"] + took["update"]
    took["sample"] -= took["search"]
    shares = [f"{phase} {spent / whole:.0%}" for phase, spent in took.items()]
    return f"that step took {whole:.3g} s: {', '.join(shares)}"


def step_line(config, row, seconds_left):
    """One step: reward without help, how many problems needed an anchor and how long it was, accuracy."""
    parts = [f"step {row['step']:>{len(str(config.steps))}}/{config.steps}"]
    # A method may sample no unaided group, or nothing at all.
    if row["reward"] is not None:
        parts.append(f"reward {row['reward']:.2f}")
    elif row["tokens/sampled"] and row["reward/train"] is not None:
        parts.append(f"reward behind anchors {row['reward/train']:.2f}")
    else:
        parts.append(f"loss {row['loss']:.4f}")
    if config.method == "bread":
        found = ""
        if row["anchor/accepted"]:
            found = f"{row['anchor/accepted']:>2} found one at {row['anchor/fraction']:.0%} of the trace"
        searched = f"{row['anchor/searched']:>2} of {config.problems_per_step} needed an anchor"
        parts.append(f"{searched}  {found:<32}")
    elif row["frac_reward_zero_std"] is not None and config.method != "sft":
        parts.append(f"{1 - row['frac_reward_zero_std']:4.0%} of groups have a gradient")
    if row["tokens/sampled"]:
        parts.append(f"{row['tokens/sampled'] / 1000:5.0f}k tokens")
    parts.append(f"ETA {int(seconds_left) // 60}:{int(seconds_left) % 60:02d}")
    if "eval/accuracy" in row:
        parts.append(f"| held out: greedy {row['eval/greedy']:.1%}, sampled {row['eval/accuracy']:.1%}")
    return "  ".join(parts)
