"""What a run prints and logs: the opening, one line and one JSON object per step, the table at the end.

    python report.py RUN [--step N]                shows a step: its searches, then rollouts that trained
    python report.py RUN [RUN ...] --plot FILE.png draws the curves of runs

`config` is any object with the fields of config.Config, `state` one with those of bread.State, `folder` a
RunFolder or None; a group is a list of rollouts of one problem behind one anchor.
"""
import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import shlex
import sys
import time
from pathlib import Path

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
# What a rival of a finished run is given anew, or not at all.
REPLACED = ("method", "steps", "token_budget", "output", "overwrite", "resume")
# Of tokens. "scored" is what --kl and --on-fail expert run without gradient.
PURPOSES = ("base", "probe", "resample", "eval", "prefilled", "scored", "trained")
# What a terminal obeys or cannot print: controls but tab and line feed, turns of direction, half characters.
UNSAFE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F),
                        *range(0x2066, 0x206A), *range(0xD800, 0xE000)], "\ufffd")
# Numbers of ANSI's styles.
STYLES = {"plain": 0, "mark": 2, "anchor": 36, "right": 32, "wrong": 33}
# Of a plot: title, x, y, dashed y.
PANELS = [("held-out accuracy, sampled\n(dashed: greedy)", "tokens/sampled", "eval/accuracy", "eval/greedy"),
          ("reward", "step", "reward"), ("share of groups with a gradient", "step", "gradient"),
          ("anchors found, share of searches\n(dashed: length, share of the trace)", "step", "found",
           "anchor/fraction"), ("entropy of what was sampled, nats", "step", "sampler/entropy")]
# Okabe and Ito's, which colour-blind readers tell apart, too.
PALETTE = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")
LOOKS = {"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "#d9d9d9", "grid.linewidth": 0.5,
         "figure.constrained_layout.use": True, "savefig.dpi": 150}


def mean(values):
    """Mean of those values that are not None; None of none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def ratio(part, whole):
    """part / whole; None of nothing."""
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
        "reward": ratio(sums["rewards/base"], sums["rollouts/base"]),
        "reward/train": ratio(sums["groups/reward"], sums["groups/rollouts"]),
        "frac_reward_zero_std": ratio(sums["groups/flat"], sums["groups"]),
        "rewards/none": sums["rollouts/unjudged"],  # a user's reward had no opinion: left out of the group
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


def trained_group(groups):
    """The group to look at: the first behind an anchor that has a gradient, else the first that has one, else
    the first; [] of none."""
    def worth(group):
        has_gradient = any(rollout.advantage for rollout in group)
        # An expert's trace is no anchor, though all of it was shown.
        is_anchored = group[0].cut > 0 and group[0].finish_reason != "expert"
        return has_gradient, has_gradient and is_anchored
    return max(groups, key=worth, default=[])  # of equals the first


# ---------------------------------------------------------------- for the reader, and for scripts


def speak(line):
    """Print at once, also into a pipe; where that cannot be, to nowhere from now on."""
    try:
        print(line, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # `| head`, for instance, is meant
            print(f"bread.py goes on, though nothing can be printed: {error}", file=sys.stderr)
        # Or the interpreter, when it ends, would try again to write what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress(phase):
    """A function of (rows done, rows in all) that keeps a line of a terminal up to date; None in a pipe."""
    if not (sys.stderr and sys.stderr.isatty()):
        return None
    began = shown = time.time()

    def show_rows(done, whole):
        nonlocal shown
        now = time.time()
        if now - shown > 0.5 or done == whole and shown > began:
            shown = now
            text = f"{phase}: {done} of {whole} rows, {now - began:.0f} s" if done < whole else ""
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)  # the rest of the line is cleared
    return show_rows


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
        self.board = None
        if config.tensorboard and not importlib.util.find_spec("tensorboard"):  # now, not at the first step
            raise ValueError("--tensorboard needs the package: pip install tensorboard")
        for note in notes:
            self.say(note)

    def say(self, line):
        """Print it, on rank 0."""
        if self.speaks:
            speak(line)

    def opening(self, policy, problems, held_out, state):
        """Print what runs on what, what it will do and what a step costs."""
        config = self.config
        self.before = state.progress(config)
        self.seconds = dict(state.seconds)
        self.decode = policy.tokenizer.decode
        self.num_parameters = sum(weight.numel() for weight in policy.model.parameters())
        self.num_expert_tokens = sum(len(problem.expert_ids) for problem in problems)
        dtype = next(policy.model.parameters()).dtype
        if config.tensorboard and self.speaks:
            self.board = open_board(config.output, state.step)
        each = f"{config.group_size} rollouts of at most {config.max_new_tokens} tokens"
        if config.method == "sft":
            each = "the expert's trace"
        held_out = f", {len(held_out)} held out in {config.eval_data}" if held_out else ""
        self.say(f"method   {config.method}")
        self.say(f"model    {config.model}: {self.num_parameters / 1e6:.2f}M parameters, {dtype} on "
                 f"{policy.device}, {'Triton kernels' if policy.ops else 'plain PyTorch'}")
        self.say(f"stops    {', '.join(policy.tokenizer.stop_texts)} end an answer")
        self.say(f"data     {config.data}: {len(problems)} problems{held_out}")
        stay = "checkpoint stays" if config.keep == 1 else "checkpoints stay"
        self.say(f"output   {config.output}, where the newest {config.keep} {stay} (--keep)")
        self.say(f"options  {command_line(config, NOT_OPTIONS) or 'all defaults'}")
        updates = f"{config.updates_per_batch} update{'s' * (config.updates_per_batch > 1)}"
        self.say(f"a step   {config.problems_per_step} problems x {each}; {updates} in micro-batches of "
                 f"{policy.micro_batch_tokens} tokens")
        self.say(f"\n{ABOUT.get(config.method, 'Groups are made by a function of the user.')}\n")

    def step(self, folder, state, told, groups, metrics):
        """One JSON object for scripts, every probe, a group to look at, one line for the reader.

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
            row[f"anchor/{name}"] = sum(getattr(state, name).values()) / max(1, self.num_expert_tokens)
        row |= {f"tokens/{purpose}": state.tokens.get(purpose, 0) for purpose in PURPOSES}
        # 2 operations a parameter and token forward, 4 backward (arXiv 2604.23747, appendix B).
        forward = row["tokens/sampled"] + row["tokens/prefilled"] + row["tokens/scored"]
        training = (8 if self.config.recompute else 6) * row["tokens/trained"]
        row["flops"] = self.num_parameters * (2 * forward + training)
        seconds = {"search": 0.0, **state.seconds}
        row |= {f"seconds/{phase}": round(spent, 3) for phase, spent in seconds.items()}
        if state.evals and state.evals[-1]["step"] == state.step:  # an evaluation was due
            row |= state.evals[-1]
        folder.append("metrics.jsonl", row)
        for theirs in told:
            for probe in theirs["probes"]:
                folder.append("probes.jsonl", probe)
        for rollout in trained_group(groups):
            folder.append("samples.jsonl", self.sample(state.step, rollout))
        if self.board:
            write_numbers(self.board, (state.evals[:1] if state.step == 1 else []) + [row])
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
                "cut": len(anchor_ids), "of": len(problem.expert_ids),
                "anchor": self.decode(anchor_ids), "completion": self.decode(rollout.completion_ids),
                "reward": rollout.reward, "advantage": rollout.advantage,
                "finish_reason": rollout.finish_reason, "entropy": rollout.entropy}

    def closing(self, folder, state, is_example):
        """Print before, after, the cost, where the checkpoint is, how to compare; let go of the folder."""
        sampled = training_tokens(state.tokens)
        self.say("")
        if state.evals:
            last = state.evals[-1]
            when = "after" if last["step"] == state.step else f"step {last['step']}"
            self.say(f"{'held out, no anchors':<24}{'before':>10}{when:>10}")
            for name, key in (("greedy", "eval/greedy"), ("sampled", "eval/accuracy")):
                self.say(f"  {name:<22}{state.evals[0][key]:>10.1%}{last[key]:>10.1%}")
        if sampled:
            share = state.tokens.get("probe", 0) / sampled
            self.say(f"{'tokens sampled':<24}{'':>10}{sampled:>10,}   ({share:.0%} in probes)")
        self.say(f"{'seconds':<24}{'':>10}{time.time() - self.began:>10.0f}\n")
        if folder:
            saved = folder.path / f"checkpoint-{state.step}"
            self.say(f"checkpoint  {saved if saved.is_dir() else 'none'}  (a Hugging Face folder)")
            folder.close()
        if self.config.method == "bread":
            self.say(f"compare     {rival(self.config, sampled, is_example)}")


def command_line(config, without):
    """The options that are not at their defaults, but for those named, as flags that a shell reads."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in without:
            words.append(f"--{field.name.replace('_', '-')}")
            if field.type is not bool:
                words.append(f"{value}")
    return shlex.join(words)


def rival(config, sampled, is_example):
    """The command of GRPO with as many sampled tokens, whatever number of steps that takes."""
    command = f"--method grpo --steps 100000 --token-budget {sampled}"
    if not is_example:
        output = shlex.quote(f"{Path(config.output)}-grpo")
        command = f"{command_line(config, REPLACED)} {command} --output {output}"
    return f"python bread.py {command}"


def open_board(path, step):
    """TensorBoard's writer for a run that is at this step."""
    from torch.utils.tensorboard import SummaryWriter
    # What the folder holds of steps that come again, or of a run that --overwrite replaces, is dropped.
    return SummaryWriter(path, purge_step=step + 1 if step else 0)


def write_numbers(board, rows):
    """Every number of rows of metrics, on the disk at once."""
    for row in rows:
        for name, number in row.items():
            if name != "step" and number is not None:
                board.add_scalar(name, number, row["step"])
    board.flush()


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
    # What a run may be wasted on.
    if row["rewards/none"]:
        parts.append(f"{row['rewards/none']} without a reward")
    if (row["completions/clipped_ratio"] or 0) > 0.5:
        parts.append(f"{row['completions/clipped_ratio']:.0%} cut off")
    if row["tokens/sampled"]:
        parts.append(f"{row['tokens/sampled'] / 1000:5.0f}k tokens")
    parts.append(f"ETA {int(seconds_left) // 60}:{int(seconds_left) % 60:02d}")
    if "eval/accuracy" in row:
        parts.append(f"| held out: greedy {row['eval/greedy']:.1%}, sampled {row['eval/accuracy']:.1%}")
    return "  ".join(parts)


# ---------------------------------------------------------------- a run, read again


def read_rows(folder, name):
    """The rows of a .jsonl file, [] without one; a line that is still being written is left out. ValueError
    for metrics without a step."""
    rows = []
    for line in (folder / name).read_bytes().split(b"\n") if (folder / name).exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    if name == "metrics.jsonl" and not any(row["step"] for row in rows):
        raise ValueError(f"{folder} holds no step of a run: give the folder that --output named")
    return rows


def show(folder, step=None, coloured=False):
    """One step as text: its searches, then the best and the worst rollout of the group that trained. By
    default the last step with a search, else the last. ValueError if the step is not there."""
    steps = [row["step"] for row in read_rows(folder, "metrics.jsonl") if row["step"]]
    probes = read_rows(folder, "probes.jsonl")
    if step is None:
        step = max((row["step"] for row in probes), default=steps[-1])
    if step not in steps:
        raise ValueError(f"--step is {step}, but {folder} holds steps {steps[0]} to {steps[-1]}")
    searches = collections.defaultdict(list)
    for row in probes:  # round by round, all searches of a round side by side
        if row["step"] == step:
            searches[row["id"]].append(row)
    group = [row for row in read_rows(folder, "samples.jsonl") if row["step"] == step]
    lines = []
    for style, text in search_parts(step, searches) + group_parts(group):
        text = text.translate(UNSAFE)
        lines.append(f"\x1b[{STYLES[style]}m{text}\x1b[0m" if coloured else text)
    return "\n".join(lines)


def search_parts(step, searches):
    """[(style, line), ...] of {problem id: probes of its search}."""
    if not searches:
        return [("plain", f"step {step}: no search")]
    accepted = {row["id"] for rows in searches.values() for row in rows if row["accepted"]}
    parts = [("plain", f"step {step}: {len(searches)} searches, {len(accepted)} anchors found")]
    for id, rows in searches.items():
        parts.append(("plain", f"  problem {id}   trace of {rows[0]['of']} tokens"))
        for row in rows:
            style, ending = ("right", "   accepted") if row["accepted"] else ("plain", "")
            cut = f"cut {row['cut']:>{len(str(row['of']))}} {row['share']:>4.0%}"
            parts.append((style, f"     {cut}   {row['successes']} of {row['rollouts']}{ending}"))
    return parts


def group_parts(group):
    """[(style, text), ...] of rows of samples.jsonl: what they have in common, the best and the worst."""
    if not group:
        return [("plain", "no rollouts")]
    ranked = sorted(group, key=lambda row: row["reward"], reverse=True)
    first = ranked[0]
    parts = [("plain", f"\nproblem {first['id']}, answer {first['answer']}, {len(group)} rollouts"),
             ("mark", "[question]"), ("plain", asked(first["question"]))]
    if first["cut"]:
        parts += [("mark", f"[anchor: {first['cut']} of {first['of']} tokens, shown to the policy]"),
                  ("anchor", first["anchor"])]
    # What the gradient pulls apart.
    for row in ranked[:1] + ranked[1:][-1:]:
        name = "the expert's trace" if row["finish_reason"] == "expert" else "completion"
        parts += [("mark", f"[{name}, reward {row['reward']}]"),
                  ("right" if row["reward"] > 0 else "wrong", row["completion"])]
    return parts


def asked(question):
    """A question as text, which may be messages."""
    # With --system it is.
    if isinstance(question, str):
        return question
    return "\n".join(f"{message['role']}: {message['content']}" for message in question)


def plot(folders, path):
    """Draw runs to a PNG file, each in one colour. ValueError without matplotlib, or without a run."""
    runs = [derive(read_rows(folder, "metrics.jsonl")) for folder in folders]
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    is_sampled = any(rows[-1]["tokens/sampled"] for rows in runs)  # imitation alone samples nothing
    with matplotlib.rc_context(LOOKS):
        figure = Figure(figsize=(11, 5.8))
        grid = figure.add_gridspec(2, 3)
        for cell, (title, x, *names) in zip(grid, PANELS):
            x = x if is_sampled else "step"
            axis = figure.add_subplot(cell, title=title, xlabel=x)
            for rows, colour in zip(runs, itertools.cycle(PALETTE)):
                draw(axis, rows, x, names, colour)
        # A strip for each run.
        strips = grid[5].subgridspec(len(runs), 1).subplots(sharex=True, squeeze=False)[:, 0]
        for folder, strip, rows, colour in zip(folders, strips, runs, itertools.cycle(PALETTE)):
            rows = [row for row in rows if "time" in row]
            bands = map(smooth, zip(*(row["time"] for row in rows)))
            strip.stackplot([row["step"] for row in rows], *bands,
                            colors=[(colour, alpha) for alpha in (0.9, 0.6, 0.35, 0.15)])
            strip.plot([], [], color=colour, label=folder.resolve().name)  # for the legend
            strip.set(ylim=(0, 1), yticks=[])
        for axis in figure.axes:
            axis.set_ylim(0)  # after all curves, which decide where it ends
            axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 150k
        strips[0].set_title("time: sampling, search, update, evaluation\n(from dark to light)")
        strips[-1].set_xlabel("step")
        figure.legend(loc="outside upper left", ncols=4, frameon=False)
        figure.savefig(path)


def derive(rows):
    """Rows of metrics, and in each step's what is drawn but not logged: shares of groups, searches, time."""
    before = torch.zeros(4)
    for row in rows:
        if "reward" in row:  # else it is the evaluation before the first step
            flat = row["frac_reward_zero_std"]
            row["gradient"] = None if flat is None else 1 - flat
            row["found"] = ratio(row["anchor/accepted"], row["anchor/searched"])
            phases = ("sample", "search", "update", "eval")
            now = torch.tensor([row.get(f"seconds/{phase}", 0.0) for phase in phases])
            took = now - before
            took[0] -= took[1]  # a search is timed as part of sampling
            row["time"] = (took / took.sum()).tolist()
            before = now
    return rows


def smooth(values):
    """Their running mean, over a twentieth of them: one step's reward is mostly noise."""
    half = len(values) // 40
    return [mean(values[max(0, i - half):i + half + 1]) for i in range(len(values))]


def draw(axis, rows, x, names, colour):
    """The first of `names` solid, the second dashed, through the rows that have it."""
    for name, dashes in zip(names, ("-", "--")):
        points = [(row[x], row[name]) for row in rows if row.get(name) is not None]
        if points:
            xs, ys = zip(*points)
            style = {"color": colour, "linestyle": dashes, "markersize": 3, "clip_on": False}
            axis.plot(xs, ys, linewidth=0.6, alpha=0.4, **style)
            # An evaluation is a mean already. A single point would be no line.
            ys = ys if name.startswith("eval/") else smooth(ys)
            axis.plot(xs, ys, linewidth=1.6, marker="o" if len(xs) < 40 else "", **style)


def main(argv=None):
    """Show or draw what runs left behind. Exit code: 0, or 2 after bad input."""
    about = ("Look at a run: the searches of one step, cut by cut, then the best and the worst rollout of a "
             "group that trained. With --plot: the curves of one or several runs.")
    parser = argparse.ArgumentParser(prog="report.py", description=about, allow_abbrev=False)
    parser.add_argument("folders", metavar="RUN", nargs="+", type=Path, help="the folder that --output named")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--step", type=int, help="the step to show (default: the last with a search)")
    what.add_argument("--plot", metavar="FILE.png", type=Path, help="draw all steps; needs matplotlib")
    args = parser.parse_args(argv)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    try:
        if args.plot:
            plot(args.folders, args.plot)
        elif len(args.folders) > 1:
            raise ValueError("several runs are drawn, not shown: add --plot FILE.png, or give one RUN")
        else:
            speak(show(args.folders[0], args.step, coloured))
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
