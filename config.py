"""Every option of bread.py: its default, its reason and its limits beside each other. Standard library only.

The dataclass is the command line: each field becomes a flag, `group_size` is --group-size.
"""
import argparse
import dataclasses
import importlib.util
import math
import shlex
import time
from pathlib import Path

POSITIVE = 1e-30  # the lowest value of a number that must be above 0


def option(default, reason, low=None, high=math.inf, choices=None):
    """A field of Config. low and high are allowed themselves; infinity never is."""
    # All in one dictionary, for `check`.
    limits = {"low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": reason, **limits})


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is asked to do. ValueError for a value outside its limits."""
    # What is read and written.
    model: str = option("", "Hugging Face folder: config.json, *.safetensors, tokenizer.json")
    data: str = option("", "JSONL with question, trace, answer (raw GSM8K lines work as they are)")
    eval_data: str = option("", "held-out JSONL; accuracy on it is measured without anchors")
    output: str = option("", "folder for run.json, metrics, samples, checkpoints (default: runs/METHOD-TIME)")
    overwrite: bool = option(False, "replace the run that --output holds")
    system: str = option("", "system message in front of every question")
    # What is trained on.
    method: str = option("bread", "bread, grpo, sft, or FILE.py:NAME, a function from problems to groups")
    anchor_low: int = option(1, "fewest successes with which a probe is accepted", 1)
    anchor_high: int = option(0, "most successes with which a probe is accepted (0: G - 1, a mixed group)", 0)
    anchor_placement: str = option("prefill", "anchor as the start of the answer, or as a hint in the prompt",
                                   choices=("prefill", "hint"))
    on_fail: str = option("skip", "failed problem without accepted anchor: leave it, sample G more rollouts, "
                          "or put the expert's trace into its group", choices=("skip", "resample", "expert"))
    max_episodes: int = option(10, "K: episodes that a trace is cut into, at most", 2)
    # How much of it.
    steps: int = option(200, "training steps", 0)
    token_budget: int = option(0, "stop once so many tokens were sampled, probes included (0: no limit)", 0)
    problems_per_step: int = option(32, "problems per step; each gets one group", 1)
    group_size: int = option(8, "G: rollouts per group", 1)
    max_new_tokens: int = option(512, "longest answer in tokens; an anchor counts toward it", 1)
    temperature: float = option(1.0, "of sampling, and of the log-probs that are trained on", POSITIVE)
    # Memory and speed. No result depends on these.
    sample_batch_size: int = option(256, "rows sampled at once; lower it when sampling runs out of memory", 1)
    micro_batch_tokens: int = option(
        0, "tokens per backward pass, prefixes too (0: what fits): memory and speed, never the gradient", 0)
    recompute: bool = option(False, "compute activations again in the backward pass: less memory, more time")
    offload: bool = option(False, "masters and moments in host memory: 6 bytes a parameter on a GPU, not 16")
    # The loss and the optimizer.
    updates_per_batch: int = option(1, "optimizer steps on each batch of rollouts", 1)
    lr: float = option(1e-6, "AdamW's learning rate after warm-up", POSITIVE)
    warmup_steps: int = option(0, "steps over which the learning rate rises to --lr", 0)
    lr_decay: float = option(0.0, "share of the run, at its end, over which the rate falls to zero", 0, 1)
    weight_decay: float = option(0.0, "AdamW's weight decay", 0)
    grad_clip: float = option(1.0, "largest gradient norm", POSITIVE)
    clip_low: float = option(0.2, "no gradient where A < 0 and the ratio is below 1 - this", 0, 1)
    clip_high: float = option(0.2, "no gradient where A > 0 and the ratio is above 1 + this", 0)
    importance_cap: float = option(0.0, "weigh tokens by min(this, trainer's / sampler's probability)", 0)
    no_std: bool = option(False, "do not divide advantages by the group's std (Dr.GRPO)")
    loss_mean: str = option("token", "mean over tokens, or over rollouts of their token means (GRPO's paper)",
                            choices=("token", "sequence"))
    kl: float = option(0.0, "weight of the k3 divergence from the starting weights (0: no reference)", 0)
    max_skipped_updates: int = option(5, "stop after so many updates in a row that were not finite", 1)
    # Everything else.
    seed: int = option(0, "decides the order of problems and every sampled token")
    device: str = option("", "cpu, cuda, cuda:1 (default: cuda where there is one)")
    eval_every: int = option(10, "steps between evaluations", 1)
    eval_samples: int = option(1, "sampled answers per held-out problem, beside one greedy answer", 1)
    save_every: int = option(0, "steps between checkpoints (0: only at the end)", 0)
    eval: bool = option(False, "evaluate the model and stop")
    plan: float = option(-1.0, "print what memory a run takes and stop; --plan 80: on a GPU of 80 GB", -1)
    resume: bool = option(False, "continue the run in --output from its last checkpoint")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check(flag_of(field), getattr(self, field.name), **field.metadata)
        if self.method == "sft":
            if self.kl:
                raise ValueError("--kl is a term of GRPO's loss; leave it out with --method sft")
            return
        if self.group_size < 2:
            raise ValueError("--group-size is 1, it must be at least 2: an advantage compares rollouts")
        if not self.anchor_low <= (self.anchor_high or self.group_size - 1) <= self.group_size:
            raise ValueError(f"--anchor-low {self.anchor_low} and --anchor-high {self.anchor_high} must be a "
                             f"range within --group-size {self.group_size}")


def flag_of(field):
    return "--" + field.name.replace("_", "-")


def check(flag, value, low, high, choices, **_):
    """ValueError for a value that is none of `choices`, or no finite number from low to high."""
    if choices and value not in choices:
        raise ValueError(f"{flag} is {value!r}, it must be one of {', '.join(choices)}")
    # Written so that NaN, which compares with nothing, is refused.
    if low is not None and not (low <= value <= high and value < math.inf):
        least = "above 0" if low == POSITIVE else f"at least {low}"
        most = f" and at most {high}" if high < math.inf else ""
        raise ValueError(f"{flag} is {value}, it must be a number {least}{most}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; --help lists every flag")


def parse_args(argv, example):
    """Flags -> Config; ValueError says what to type instead. @FILE reads flags from a file, later ones win.

    With neither --model nor --data, the folder `example` is run with the flags of its chain.args.
    """
    # An abbreviated flag would change its meaning when another one is added.
    parser = Parser(
        prog="bread.py", allow_abbrev=False, fromfile_prefix_chars="@",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="BREAD: GRPO that branches from expert traces. Without --model it trains the embedded "
                    "example; @FILE reads flags from a file.")
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    for field in dataclasses.fields(Config):
        kind = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            kind = {"action": "store_true"}
        if field.name == "plan":
            kind |= {"nargs": "?", "const": 0.0}  # this machine
        parser.add_argument(flag_of(field), default=field.default, help=field.metadata["help"], **kind)
    args = parser.parse_args(argv)
    # The example's own flags come first, so that later ones win.
    if not (args.model or args.data):
        files = ["--model", f"{example / 'model'}", "--data", f"{example / 'train.jsonl'}",
                 "--eval-data", f"{example / 'heldout.jsonl'}", f"@{example / 'chain.args'}"]
        args = parser.parse_args(files + argv)
    if not (args.model and (args.data or args.eval or args.plan >= 0)):
        raise ValueError(f"--{'data' if args.model else 'model'} is missing: training needs a model folder "
                         "and a JSONL file with question, trace, answer; give neither to run the example")
    if args.eval and not args.eval_data:
        raise ValueError("--eval needs --eval-data: give the JSONL file to evaluate on")
    if args.resume and not args.output:
        raise ValueError("--resume needs --output: give the folder of the run to continue")
    if not args.output:
        args.output = f"runs/{args.method.rpartition(':')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Config(**vars(args))


def load_function(flag, spec, known):
    """known[spec], or function NAME of a user's FILE.py:NAME; ValueError names the flag if there is none."""
    if spec in known:
        return known[spec]
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"{flag} is {spec!r}, it must be {', '.join(known)} or FILE.py:NAME of a file")
    # A module of its own, not a name on the path: two files may be called alike.
    found = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever the user's program raises
        raise ValueError(f"{flag} {spec}: {path} cannot be run: {error!r}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{flag} {spec}: {path} has no function {name!r}")
    return getattr(module, name)
