"""Compares the memory plan with a step's peak, on random weights and prompts as long as GSM8K's.

    python bench/memory.py [--shape NAME] [--new TOKENS] [--recompute] [--offload] [--micro-batch-tokens N]
    python bench/memory.py --tables      # those of docs/MEMORY.md: what fits on which card

Two steps by bread.py's functions: --problems problems, groups of 8, rollouts of exactly --new tokens, all
with a gradient. Peaks of the second: on a GPU of all tensors, by phase, and what torch has reserved in the
end; else the process (VmHWM).
"optimizer s": its part of a step, with transfers under --offload.
"""
import random
import re
from pathlib import Path

import timing
import torch

import bread
import plan
from config import Config
from traces import Problem

MODELS = "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"
CARDS = 24, 40, 80, 141  # GB
FLAGS = {"plain": {}, "`--recompute`": {"recompute": True}, "`--offload`": {"offload": True},
         "both": {"recompute": True, "offload": True}, "`--kl 0.01`": {"kl": 0.01}}
PARTS = ("weights", "reference of --kl", "masters' bits and moments", "K/V", "gradients", "activations",
         "log-probs")


def peak(device, reset=False):
    """Bytes at the highest since the last reset."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


class Optimizer(bread.MasterAdamW):
    """Notes the peak of the update before it, its own, and the seconds that it takes."""

    def step(self, lr, max_norm, loss=0.0):
        self.training_peak = peak(self.ranks.device)
        peak(self.ranks.device, reset=True)
        began = timing.now(self.ranks.device)
        norm = super().step(lr, max_norm, loss)
        self.step_seconds = timing.now(self.ranks.device) - began
        return norm


def make_policy(args, config):
    """A bread.Policy of a random model, which is in no folder."""
    policy = object.__new__(bread.Policy)
    policy.config = config
    policy.device = args.device
    policy.model = timing.random_model(args.shape, args.layers, args.dtype, args.device)
    policy.model.recompute = config.recompute
    policy.reference = policy.ops = policy.places = None
    if args.device.type == "cuda":
        import kernels

        policy.ops = policy.model.ops = kernels
    return policy


def plan_for(shape, card, flags):
    """The plan with default flags, prompts of 200 and traces of 300 tokens, on a card of so many GB."""
    lengths = [(200, 300)] * 32
    return plan.make_plan(timing.config_of(shape), Config(**flags), lengths, (card - 1) * 1e9, True)


def markdown(heads, rows):
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (heads, ["---"] * len(heads), *rows))


def fit(made):
    return f"{made.micro_batch_tokens:,}" if made.fits else "no"


def sizes_of(made):
    parts = made.always | made.phases["training"]
    sizes = [*(parts[part] for part in PARTS), made.needed, sum(made.host.values())]
    return [f"{size / 1e9:.1f}" for size in sizes]


def tables():
    """What fits where, and what takes how much on the largest card."""
    fits = []
    sizes = []
    for shape in MODELS:
        for card in CARDS:
            cells = [fit(plan_for(shape, card, flags)) for flags in FLAGS.values()]
            fits.append([shape, f"{card} GB", *cells])
        for name, flags in FLAGS.items():
            sizes.append([shape, name, *sizes_of(plan_for(shape, CARDS[-1], flags))])
    return (markdown(["model", "card", *FLAGS], fits) + "\n"
            + markdown(["model", "flags", *PARTS, "peak", "on the host"], sizes))


def rollouts_of(problem, completions):
    """A group of what was sampled, with a gradient."""
    return [bread.Rollout(problem, 0, problem.prompt_ids, [], one.token_ids, one.logprobs, 0.0, "length",
                          advantage=1.0 - 2 * (n % 2)) for n, one in enumerate(completions)]


def main():
    parser = timing.new_parser(__doc__)
    parser.add_argument("--shape", choices=timing.SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="fewer than the real shape's")
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--micro-batch-tokens", type=int, default=0)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--tables", action="store_true", help="print the tables of docs/MEMORY.md and stop")
    args = timing.parse(parser)
    if args.tables:
        print(tables(), end="")
        return
    config = Config(problems_per_step=args.problems, max_new_tokens=args.new, recompute=args.recompute,
                    offload=args.offload, micro_batch_tokens=args.micro_batch_tokens)
    policy = make_policy(args, config)
    rng = random.Random(0)
    prompts = [rng.choices(range(64), k=length) for length in timing.QUESTIONS[:args.problems]]
    problems = [Problem(f"{i}", prompt, [], [], "", "", "") for i, prompt in enumerate(prompts)]
    ranks = bread.Ranks(str(args.device))
    optimizer = Optimizer(policy.model.parameters(), ranks, offload=args.offload)
    planned = policy.reserve(problems, [], 1, lambda text: None)  # told below
    rows = [(i, len(prompt)) for i, prompt in enumerate(prompts)]
    measured = {}
    for step in range(2):
        peak(args.device, reset=True)
        trunk = bread.prefill(policy.model, prompts)
        forks = [bread.Fork(i, length, tuple(range(8 * i, 8 * i + 8))) for i, length in rows]
        params = bread.SamplingParams(args.new, seed=step)
        places = policy.places or bread.Places(policy.model, config.sample_batch_size)
        done = bread.branch(policy.model, trunk, forks, params, places)
        del trunk, places
        measured["sampling"] = peak(args.device)
        groups = list(map(rollouts_of, problems, done))
        peak(args.device, reset=True)
        bread.update(policy, optimizer, ranks, groups, 1e-6, bread.batch_loss)
        measured["training"] = optimizer.training_peak
        measured["optimizer"] = peak(args.device)
    pairs = {"peak": (planned.needed, max(measured.values()))}
    if args.device.type == "cuda":  # a process keeps what it had in another phase
        pairs["reserved"] = planned.needed, torch.cuda.memory_reserved()
        always = sum(planned.always.values())
        pairs |= {phase: (always + sum(planned.phases[phase].values()), found)
                  for phase, found in measured.items()}
    write = timing.writer(__doc__, args, f"{args.shape}, optimizer {optimizer.step_seconds:.3g} s", "",
                          *planned.lines())
    for phase, (expected, found) in pairs.items():
        write(f"{phase:<10} planned {expected / 1e9:6.2f} GB, measured {found / 1e9:6.2f}: "
              f"{expected / found - 1:+.0%}")


if __name__ == "__main__":
    main()
