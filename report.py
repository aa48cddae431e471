"""What a person sees of a run: the opening, one line per step, the table at the end. Text only; no state.

`config` is any object with the fields of bread.Config; `row` is a line of metrics.jsonl as a dict.
"""

ABOUT = {
    "bread": "Every problem is tried without help first. Where all tries fail, a binary search finds the shortest\n"
             "piece of the expert's trace from which some succeed; the model learns from those, and needs ever less.",
    "grpo": "Every problem is tried without help, and the model learns from groups in which some tries succeed.\n"
            "Where all fail there is no gradient: watch the reward. The expert's traces are not used.",
    "sft": "The model imitates the expert's traces token by token.\n"
           "Held-out accuracy tells whether it can express them.",
}
OTHER_ANCHORS = {
    "failed": "Every problem is tried without help first. Where all tries fail, --anchor {} chooses a piece of the\n"
              "expert's trace, once. BREAD itself searches for the shortest that helps.",
    "always": "Every problem is tried behind a piece of the expert's trace, chosen by --anchor {}, if any.\n"
              "The model's own success shows in the held-out accuracy only.",
}
NOT_OPTIONS = ("model", "data", "eval_data", "output", "method")


def group_metrics(groups, totals):
    """What a step's groups of rollouts say, by TRL's names where the meaning is the same.

    totals: {"unaided": successes without an anchor, "searched": problems, "probes": groups sampled for them}.
    """
    rollouts = [rollout for group in groups for rollout in group]
    accepted = [group for group in groups if group[0].cut]
    return {
        "reward/train": mean(rollout.reward for rollout in rollouts),
        "frac_reward_zero_std": mean(not any(rollout.advantage for rollout in group) for group in groups),
        "anchor/searched": totals["searched"], "anchor/accepted": len(accepted), "anchor/probes": totals["probes"],
        "anchor/fraction": mean(group[0].cut / len(group[0].problem.expert_ids) for group in accepted),
        "completions/mean_length": mean(len(rollout.completion_ids) for rollout in rollouts),
        "sampler/entropy": mean(rollout.entropy for rollout in rollouts if rollout.entropy is not None),
        "completions/clipped_ratio": mean(rollout.finish_reason == "length" for rollout in rollouts)}


def sample(step, rollout, decode):
    """A rollout as text for samples.jsonl, anchor and completion apart."""
    return {"step": step, "id": rollout.problem.id, "question": rollout.problem.question,
            "anchor": decode(rollout.problem.expert_ids[:rollout.cut]), "completion": decode(rollout.completion_ids),
            "answer": rollout.problem.answer, "reward": rollout.reward, "advantage": rollout.advantage,
            "finish_reason": rollout.finish_reason, "entropy": rollout.entropy}


def mean(values):
    """Mean of some numbers, None of none."""
    values = list(values)
    return sum(values) / len(values) if values else None


def opening(config, model, num_problems, num_held_out, changed):
    """What runs on what, what it will do and what a step costs. `model` is a line about it, `changed` the options
    that differ from their defaults, {name: value}."""
    c, held_out = config, f", {num_held_out} held out in {config.eval_data}" if num_held_out else ""
    options = " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                       for name, value in changed.items() if name not in NOT_OPTIONS)
    step = f"{c.problems_per_step} problems x {c.group_size} rollouts of at most {c.max_new_tokens} tokens"
    if c.method == "sft":
        step = f"{c.problems_per_step} expert traces"
    about = ABOUT[c.method]
    if c.method == "bread" and c.anchor != "search":
        about = OTHER_ANCHORS[c.anchor_when].format(c.anchor)
    updates = f"{c.updates_per_batch} update{'s' * (c.updates_per_batch > 1)}"
    return "\n".join([
        f"method   {c.method}", f"model    {c.model}: {model}", f"data     {c.data}: {num_problems} problems{held_out}",
        f"output   {c.output}", f"options  {options or 'all defaults'}",
        f"a step   {step}; {updates} in micro-batches of {c.micro_batch_size}", "", about, ""])


def step_line(config, row, seconds_left):
    """One step: reward without help, how many problems needed an anchor and how long it was, accuracy, time left."""
    c, width = config, len(str(config.steps))
    parts = [f"step {row['step']:>{width}}/{c.steps}"]
    if c.method == "sft":
        parts.append(f"loss {row['loss']:.4f}")
    else:
        parts.append(f"reward {row['reward']:.2f}" if c.tries_unaided else
                     f"reward behind anchors {row['reward/train']:.2f}")
    if c.method == "bread" and c.tries_unaided:
        found = f"{row['anchor/accepted']:>2} found one at {row['anchor/fraction']:.0%} of the trace" \
            if row["anchor/accepted"] else ""
        parts.append(f"{row['anchor/searched']:>2} of {c.problems_per_step} needed an anchor  {found:<32}")
    elif c.method == "grpo":
        parts.append(f"{1 - row['frac_reward_zero_std']:4.0%} of groups have a gradient")
    if c.method != "sft":
        parts.append(f"{row['tokens/sampled'] / 1000:5.0f}k tokens")
    parts.append(f"ETA {int(seconds_left) // 60}:{int(seconds_left) % 60:02d}")
    if "eval/accuracy" in row:
        parts.append(f"| held out: greedy {row['eval/greedy']:.1%}, sampled {row['eval/accuracy']:.1%}")
    return "  ".join(parts)


def closing(config, evals, checkpoint, tokens, seconds, is_example):
    """Before, after, the cost, where the checkpoint is, and the command for the comparison run."""
    lines, sampled = [""], tokens["base"] + tokens["probe"] + tokens["resample"]
    if evals:
        lines += [f"{'held out, no anchors':<24}{'before':>10}{'after':>10}"]
        lines += [f"  {name:<22}{evals[0][key]:>10.1%}{evals[-1][key]:>10.1%}"
                  for name, key in (("greedy", "eval/greedy"), ("sampled", "eval/accuracy"))]
    if config.method != "sft":
        probes = tokens["probe"] / max(sampled, 1)
        lines.append(f"{'tokens sampled':<24}{'':>10}{sampled:>10,}   ({probes:.0%} in probes)")
    lines += [f"{'seconds':<24}{'':>10}{seconds:>10.0f}", "", f"checkpoint  {checkpoint}  (a Hugging Face folder)"]
    if config.method == "bread":
        flags = "" if is_example else f"--model {config.model} --data {config.data} [the same flags] "
        lines.append(f"compare     python bread.py {flags}--method grpo --steps 100000 --token-budget {sampled}")
    return "\n".join(lines)
