"""Every option of bread.py: its default, its reason, what it may be. Standard library only.

The dataclass is the command line: each field becomes a flag, `micro_batch_size` is --micro-batch-size.
"""
import argparse
import dataclasses
import shlex
import time


def option(default, reason, choices=None):
    return dataclasses.field(default=default, metadata={"help": reason, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line: `micro_batch_size` is --micro-batch-size."""
    model: str = option("", "Hugging Face folder: config.json, *.safetensors, tokenizer.json")
    data: str = option("", "JSONL with question, trace, answer (raw GSM8K lines work as they are)")
    eval_data: str = option("", "held-out JSONL; accuracy on it is measured without anchors")
    output: str = option("", "folder for run.json, metrics, samples, checkpoints (default: runs/METHOD-TIME)")
    overwrite: bool = option(False, "replace the run that --output holds")
    system: str = option("", "system message in front of every question")
    method: str = option("bread", "what to train with", ("bread", "grpo", "sft"))
    anchor: str = option("search", "how the anchor is chosen: BREAD's search, or another paper's rule",
                         ("search", "random", "fixed", "anneal", "adaback"))
    anchor_when: str = option("failed", "anchor the problems whose unaided rollouts all failed, or sample every group "
                              "behind one, as the other rules' papers do", ("failed", "always"))
    anchor_fraction: float = option(0.5, "--anchor fixed: which cut, as a share of a trace's cuts")
    anchor_from: float = option(0.0, "--anchor random: the first cut, as a share of a trace's cuts")
    anchor_to: float = option(1.0, "--anchor random: the last cut, as a share of a trace's cuts")
    anchor_low: int = option(1, "fewest successes with which a probe is accepted")
    anchor_high: int = option(0, "most successes with which a probe is accepted (0: G - 1, any mixed group)")
    anchor_placement: str = option("prefill", "anchor as the start of the answer, or as a hint in the prompt",
                                   ("prefill", "hint"))
    on_fail: str = option("skip", "failed problem without accepted anchor: leave it, sample G more plain rollouts, "
                          "put the whole expert trace into its group, or imitate the trace in an SFT step of its own",
                          ("skip", "resample", "expert", "sft"))
    expert_shaping: float = option(0.0, "--on-fail expert: weight p / (p + this) on the expert's tokens (LUFFY: 0.1) "
                                   "instead of the clipped ratio (0)")
    max_episodes: int = option(10, "K: episodes that a trace is cut into, at most")
    steps: int = option(200, "training steps")
    token_budget: int = option(0, "stop once this many tokens were sampled, probes included (0: no limit)")
    problems_per_step: int = option(32, "problems per step; each gets one group")
    group_size: int = option(8, "G: rollouts per group")
    max_new_tokens: int = option(512, "longest answer in tokens; an anchor counts toward it")
    temperature: float = option(1.0, "of sampling, and of the log-probs that are trained on")
    sample_batch_size: int = option(256, "rows sampled at once; lower it when sampling runs out of memory")
    micro_batch_size: int = option(32, "rows per backward pass; decides memory and speed, never the gradient")
    recompute: bool = option(False, "compute activations again in the backward pass: less memory, a third more time")
    updates_per_batch: int = option(1, "optimizer steps on each batch of rollouts")
    lr: float = option(1e-6, "AdamW's learning rate after warm-up")
    warmup_steps: int = option(0, "steps over which the learning rate rises to --lr")
    lr_decay: float = option(0.0, "share of the run, at its end, over which the learning rate falls to zero")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    grad_clip: float = option(1.0, "largest gradient norm")
    clip_low: float = option(0.2, "no gradient where A < 0 and the ratio is below 1 - this")
    clip_high: float = option(0.2, "no gradient where A > 0 and the ratio is above 1 + this")
    importance_cap: float = option(0.0, "weight tokens by min(this, trainer's / sampler's probability); 0: no weights")
    no_std: bool = option(False, "do not divide advantages by the group's std (Dr.GRPO)")
    loss_mean: str = option("token", "mean over all tokens, or over rollouts of their token means (GRPO's paper)",
                            ("token", "sequence"))
    kl: float = option(0.0, "weight of the k3 divergence from the starting weights (0: no reference model)")
    max_skipped_updates: int = option(5, "stop after this many updates in a row whose loss or gradient was not finite")
    seed: int = option(0, "decides the order of problems and every sampled token")
    device: str = option("", "cpu, cuda, cuda:1 (default: cuda where there is one)")
    eval_every: int = option(10, "steps between evaluations")
    eval_samples: int = option(1, "sampled answers per held-out problem, beside one greedy answer")
    save_every: int = option(0, "steps between checkpoints (0: only at the end)")
    eval: bool = option(False, "evaluate the model and stop")
    resume: bool = option(False, "continue the run in --output from its last checkpoint")

    def __post_init__(self):
        at_least = {"steps": 0, "token_budget": 0, "warmup_steps": 0, "save_every": 0, "anchor_high": 0,
                    "group_size": 1 if self.method == "sft" else 2, "max_episodes": 2}
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), "--" + field.name.replace("_", "-")
            least = at_least.get(field.name, 1)
            if field.type is int and field.name != "seed" and value < least:
                raise ValueError(f"{flag} is {value}, it must be at least {least}")
            if field.name in ("temperature", "lr", "grad_clip") and not 0 < value < float("inf"):
                raise ValueError(f"{flag} is {value}, it must be a number above 0")
            if field.name in ("kl", "weight_decay", "clip_high", "importance_cap", "expert_shaping") \
                    and not 0 <= value < float("inf"):
                raise ValueError(f"{flag} is {value}, it must be a number that is not negative")
            if field.metadata["choices"] and value not in field.metadata["choices"]:
                raise ValueError(f"{flag} is {value!r}, it must be one of {', '.join(field.metadata['choices'])}")
            if field.name in ("clip_low", "anchor_fraction", "anchor_from", "anchor_to", "lr_decay") \
                    and not 0 <= value <= 1:
                raise ValueError(f"{flag} is {value}, it must lie from 0 to 1")
        high = self.anchor_high or self.group_size - 1
        if self.method != "sft" and not self.anchor_low <= high <= self.group_size:
            raise ValueError(f"--anchor-low {self.anchor_low} and --anchor-high {self.anchor_high} must be a range "
                             f"within --group-size {self.group_size}")
        if self.anchor_from > self.anchor_to:
            raise ValueError(f"--anchor-from {self.anchor_from} is beyond --anchor-to {self.anchor_to}")
        if not self.tries_unaided and (self.anchor == "search" or self.on_fail != "skip"):
            raise ValueError("--anchor-when always leaves no unaided group that could fail: it goes with --anchor "
                             "random, fixed, anneal or adaback, and with --on-fail skip")
        if self.method == "sft" and self.kl:
            raise ValueError("--kl is a term of GRPO's loss; leave it out with --method sft")

    @property
    def tries_unaided(self):
        """Whether every problem is first tried without an anchor, as BREAD and GRPO do."""
        return self.method != "bread" or self.anchor_when == "failed"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; --help lists every flag")


def parse_args(argv, example):
    """Flags -> Config; ValueError says what to type instead. @FILE reads flags from a file, later ones win.

    With neither --model nor --data, the folder `example` is run with the flags of its chain.args.
    """
    parser = Parser(
        prog="bread.py", allow_abbrev=False, fromfile_prefix_chars="@",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="BREAD: GRPO that branches from expert traces. Without --model it trains the embedded example; "
                    "@FILE reads flags from a file.")
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    for field in dataclasses.fields(Config):
        flag, choices = "--" + field.name.replace("_", "-"), field.metadata["choices"]
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type, "choices": choices}
        parser.add_argument(flag, default=field.default, help=field.metadata["help"], **kind)
    args = parser.parse_args(argv)
    if not (args.model or args.data):
        files = ["--model", f"{example / 'model'}", "--data", f"{example / 'train.jsonl'}",
                 "--eval-data", f"{example / 'heldout.jsonl'}", f"@{example / 'chain.args'}"]
        args = parser.parse_args(files + argv)
    if not (args.model and (args.data or args.eval)):
        raise ValueError(f"--{'data' if args.model else 'model'} is missing: training needs a model folder and a "
                         "JSONL file with question, trace, answer; give neither to run the example")
    if args.eval and not args.eval_data:
        raise ValueError("--eval needs --eval-data: give the JSONL file to evaluate on")
    if args.resume and not args.output:
        raise ValueError("--resume needs --output: give the folder of the run to continue")
    if not args.output:
        args.output = f"runs/{args.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Config(**vars(args))
