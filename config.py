"""Every option of bread.py: its default, its reason and its limits beside each other. Standard library only.

The dataclass is the command line: each field becomes a flag, `group_size` is --group-size, and --help has
its order and its headings.
"""
import argparse
import dataclasses
import difflib
import importlib.util
import json
import math
import re
import shlex
import time
from pathlib import Path

POSITIVE = 1e-30  # the lowest value of a number that must be above 0
# What other trainers call the same thing, where the spelling is not near.
OTHER_NAMES = {
    "learning-rate": "lr", "beta": "kl", "kl-coef": "kl", "batch-size": "problems-per-step",
     "epsilon": "clip-low", "epsilon-high": "clip-high",
    "num-generations": "group-size", "max-completion-length": "max-new-tokens", "max-steps": "steps",
    "per-device-train-batch-size": "problems-per-step", "train-batch-size": "problems-per-step",
    "model-name-or-path": "model", "dataset": "data", "dataset-name": "data", "output-dir": "output",
    "gradient-checkpointing": "recompute", "save-steps": "save-every", "save-total-limit": "keep"}


def option(default, reason, low=None, high=math.inf, choices=None, heading=""):
    """A field of Config. low and high are allowed themselves, infinity never; heading begins a group."""
    limits = {"low": low, "high": high, "choices": choices}  # in one dictionary, for `check`
    return dataclasses.field(default=default, metadata={"help": reason, "heading": heading, **limits})


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is asked to do. ValueError for a value outside its limits."""
    model: str = option("", "Hugging Face folder: config.json, *.safetensors, tokenizer.json",
                        heading="what everybody sets first")
    data: str = option("", "rows with question, trace, answer: .jsonl, .json, .jsonl.gz or .parquet")
    eval_data: str = option("", "held-out rows; accuracy on them is measured without anchors")
    output: str = option("", "folder for run.json, metrics, samples, checkpoints (runs/METHOD-TIME)")
    method: str = option("bread", "bread, grpo, sft, or FILE.py:NAME, a function from problems to groups")
    steps: int = option(200, "training steps", 0)
    problems_per_step: int = option(32, "problems per step; each gets one group", 1)
    group_size: int = option(8, "G: rollouts per group", 1)
    max_new_tokens: int = option(512, "longest answer in tokens; an anchor counts toward it", 1)
    lr: float = option(1e-6, "AdamW's learning rate after warm-up", POSITIVE)
    # Without them data.py goes by the names that published sets use.
    question_field: str = option("", "the rows' field that is the question, dots lead inside: a.b (by name)",
                                 heading="data, templates, rewards")
    trace_field: str = option("", "the field that is the expert's trace (by name)")
    answer_field: str = option("", "the field that is the gold answer (by name)")
    strict: bool = option(False, "end at a row that cannot be used; else it is left out and counted")
    system: str = option("", "system message in front of every question")
    template_args: str = option("", "arguments of the chat template, JSON: '{\"enable_thinking\": false}'")
    reward: str = option("math", "math, math_verify, or FILE.py:NAME, a function (completion, answer, "
                         "problem) -> float, above 0 for a success, or None")
    # Algorithm 1: which probe ends a search, and what becomes of a problem without one.
    anchor_low: int = option(1, "fewest successes with which a probe is accepted", 1,
                             heading="search for anchors")
    anchor_high: int = option(0, "most successes with which a probe is accepted (0: G - 1, a mixed group)", 0)
    anchor_placement: str = option("prefill", "anchor as the start of the answer, or as a hint in the prompt",
                                   choices=("prefill", "hint"))
    on_fail: str = option("skip", "failed problem without accepted anchor: leave it, sample G more rollouts, "
                          "or put the expert's trace into its group", choices=("skip", "resample", "expert"))
    max_episodes: int = option(10, "K: episodes that a trace is cut into, at most", 2)
    # A draw depends on seed, step, problem and cut, never on what shares its batch.
    temperature: float = option(1.0, "of sampling, and of the log-probs that are trained on", POSITIVE,
                                heading="sampling")
    seed: int = option(0, "decides the order of problems and every sampled token")
    # Where memory runs out, micro-batches are halved by themselves, rows that are sampled are not.
    sample_batch_size: int = option(256, "rows sampled at once; lower it when sampling runs out of memory", 1,
                                    heading="memory and speed (never the result)")
    micro_batch_tokens: int = option(0, "tokens per backward pass, prefixes too (0: what fits)", 0)
    recompute: bool = option(False, "compute activations again in the backward pass: less memory, more time")
    offload: bool = option(False, "masters and moments in host memory: 6 bytes a parameter on a GPU, not 16")
    plan: float = option(-1.0, "print what memory a run takes and stop; --plan 80: on a GPU of 80 GB", -1)
    # The paper leaves these open; the first lines of bread.py say what was chosen.
    updates_per_batch: int = option(1, "optimizer steps on each batch of rollouts", 1,
                                    heading="loss and optimizer")
    mask_truncated: bool = option(False, "leave completions that were cut off at the limit out of the loss")
    loss_mean: str = option("token", "mean over tokens, or over rollouts of their token means (GRPO's paper)",
                            choices=("token", "sequence"))
    no_std: bool = option(False, "do not divide advantages by the group's std (Dr.GRPO)")
    clip_low: float = option(0.2, "no gradient where A < 0 and the ratio is below 1 - this", 0, 1)
    clip_high: float = option(0.2, "no gradient where A > 0 and the ratio is above 1 + this", 0)
    importance_cap: float = option(0.0, "weigh tokens by min(this, trainer's / sampler's probability)", 0)
    kl: float = option(0.0, "weight of the k3 divergence from the starting weights (0: no reference)", 0)
    warmup_steps: int = option(0, "steps over which the learning rate rises to --lr", 0)
    lr_decay: float = option(0.0, "share of the run, at its end, over which the rate falls to zero", 0, 1)
    weight_decay: float = option(0.0, "AdamW's weight decay", 0)
    grad_clip: float = option(1.0, "largest gradient norm", POSITIVE)
    max_skipped_updates: int = option(5, "stop after so many updates in a row that were not finite", 1)
    # Never behind anchors: what the model does alone.
    eval: bool = option(False, "evaluate the model and stop", heading="evaluation")
    eval_every: int = option(10, "steps between evaluations", 1)
    eval_samples: int = option(1, "sampled answers per held-out problem, beside one greedy answer", 1)
    write_hard: str = option("", "with --eval: file for the problems that no sampled answer solved")
    # How a run ends, what it keeps, how it goes on.
    resume: bool = option(False, "continue the run in --output from its last checkpoint, with its own flags",
                          heading="running, saving, resuming")
    overwrite: bool = option(False, "replace the run that --output holds")
    token_budget: int = option(0, "stop once so many tokens were sampled, probes included (0: no limit)", 0)
    save_every: int = option(0, "steps between checkpoints (0: only at the end)", 0)
    keep: int = option(2, "checkpoints that stay, the newest", 1)
    keep_best: bool = option(False, "the one with the best held-out accuracy stays, too")
    tensorboard: bool = option(False, "write the metrics for TensorBoard, too")
    device: str = option("", "cpu, cuda, cuda:1 (cuda where there is one)")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check(flag_of(field), getattr(self, field.name), **field.metadata)
        try:
            dict(**json.loads(self.template_args or "{}"))  # TypeError unless it is an object
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"--template-args is {self.template_args!r}, it must be a JSON object, as in "
                             """'{"enable_thinking": false}'""") from None
        if self.write_hard and not self.eval:
            raise ValueError("--write-hard is written by an evaluation: give --eval, too, or leave it out")
        if self.method == "sft":
            if self.kl:
                raise ValueError("--kl is a term of GRPO's loss; leave it out with --method sft")
            return
        if self.group_size < 2:
            raise ValueError("--group-size is 1, it must be at least 2: an advantage compares rollouts")
        if not self.anchor_low <= (self.anchor_high or self.group_size - 1) <= self.group_size:
            raise ValueError(f"--anchor-low {self.anchor_low} and --anchor-high "
                             f"{self.anchor_high or self.group_size - 1} must be a range within --group-size "
                             f"{self.group_size}")


def flag_of(field):
    """Of a dataclass's field: "--max-new-tokens"."""
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

    def parse_args(self, argv):
        """All flags are known, or a ValueError says which are meant."""
        try:
            args, unknown = self.parse_known_args(argv)
        except RecursionError:
            raise ValueError("an @FILE of flags includes itself") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"an @FILE of flags is no UTF-8 text: {error}") from None
        for name, value in vars(args).items():
            if isinstance(value, list):  # what argparse makes of --steps=--
                raise ValueError(f"--{name.replace('_', '-')} has no value; --help lists every flag")
        if unknown:
            raise ValueError(f"{no_flag(unknown[0])} --help lists every flag")
        return args


def no_flag(word):
    """What to say of a word that is no flag: which are meant, if some are near."""
    word = word.partition("=")[0]
    name = word.strip("-").replace("_", "-").lower()
    name = OTHER_NAMES.get(name, name)
    names = [flag_of(field)[2:] for field in dataclasses.fields(Config)]
    near = difflib.get_close_matches(name, names, 1, cutoff=0.7)
    if name and name not in names:  # the beginning of a name is nearer than a likeness
        near = [full for full in names if full.startswith(name)] or near
    return f"{word} is no flag;" + " or".join(f" --{full}" for full in near) + " is meant?" * bool(near)


def make_parser():
    """The parser of Config's fields, in their order, under their headings."""
    # An abbreviated flag would change its meaning when another one is added.
    parser = Parser(
        prog="bread.py", usage="bread.py [--model FOLDER --data FILE] [--FLAG VALUE ...] [@FILE ...]",
        allow_abbrev=False, add_help=False, fromfile_prefix_chars="@",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=27),
        description="BREAD: GRPO that branches from expert traces. Without --model it trains the embedded "
                    "example; @FILE reads flags from a file. Defaults stand in brackets.")
    parser.convert_arg_line_to_args = split_line
    for field in dataclasses.fields(Config):
        if field.metadata["heading"]:
            group = parser.add_argument_group(field.metadata["heading"])
        kind = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            kind = {"action": "store_true"}
        elif field.name == "plan":
            kind |= {"nargs": "?", "const": 0.0, "metavar": "GB"}  # without a number: this machine
        elif not kind["choices"]:  # --steps N, --question-field FIELD
            kind["metavar"] = {int: "N", float: "X"}.get(field.type, field.name.split("_")[-1].upper())
        hidden = field.type is bool or field.default in ("", -1)  # what is without a flag needs no word
        shown = "" if hidden else f" [{field.default}]"
        group.add_argument(flag_of(field), default=field.default, help=field.metadata["help"] + shown, **kind)
    group.add_argument("-h", "--help", action="help", help="print this text and stop")
    return parser


def split_line(line):
    """The words of a line of an @FILE, as a shell reads them."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise ValueError(f"an @FILE of flags has the line {line!r:.60}: {error}") from None


def parse_args(argv, example):
    """Flags -> Config; ValueError says what to type instead. @FILE reads flags from a file, later ones win.

    With --resume the flags of the run in --output come first; else, with neither --model nor --data, the
    folder `example` with those of its chain.args. Reads, never writes.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume and args.eval:
        raise ValueError("--eval evaluates --model: give --model RUN/checkpoint-N, without --resume")
    if args.resume and not args.output:
        raise ValueError("--resume needs --output: give the folder of the run to continue")
    if args.resume:
        args = parser.parse_args(flags_of_run(parser, Path(args.output) / "run.json") + argv)
    elif not (args.model or args.data):
        files = ["--model", f"{example / 'model'}", "--data", f"{example / 'train.jsonl'}",
                 "--eval-data", f"{example / 'heldout.jsonl'}", f"@{example / 'chain.args'}"]
        args = parser.parse_args(files + argv)  # what is given comes last, and wins
    if not (args.model and (args.data or args.eval or args.plan >= 0)):
        raise ValueError(f"--{'data' if args.model else 'model'} is missing: training needs a model folder "
                         "and a file with question, trace, answer; give neither to run the example")
    if args.eval and not args.eval_data:
        raise ValueError("--eval needs --eval-data: give the file to evaluate on")
    if not args.output:
        name = "eval" if args.eval else args.method.rpartition(":")[2]
        args.output = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Config(**vars(args))


def flags_of_run(parser, path):
    """The options in a run.json as a list of flags; ValueError if `parser` does not know them."""
    flags = []
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("no regular file")
        options = json.loads(path.read_bytes())
        for field in dataclasses.fields(Config):
            value = options.pop(field.name)  # all are there, or a default would change the run
            if type(value) not in (field.type, int) or type(value) is int and field.type not in (int, float):
                raise ValueError(f"{field.name} is {value!r:.40}")
            # What replaced an older run must not replace this one.
            if value is not False and field.name != "overwrite":
                flags.append(flag_of(field) if value is True else f"{flag_of(field)}={value}")
        unknown = [name for name in options if not name.endswith("_sha256") and name != "history"]
        if unknown:
            raise ValueError(no_flag(unknown[0]))
        parser.parse_args(flags)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # or not ours
        raise ValueError(f"--resume: {path} is missing, damaged or of another version ({error}): start "
                         "without --resume in another --output, with the weights of this run by "
                         f"--model {path.parent}/checkpoint-N") from None
    return flags


def check_paths(config):
    """ValueError if --model is no folder or data are no file; of a hub id it says how to download it."""
    for flag, path, kind in (("--model", config.model, ""), ("--data", config.data, "--repo-type dataset "),
                             ("--eval-data", config.eval_data, "--repo-type dataset ")):
        if not path or (Path(path).is_file() if kind else Path(path).is_dir()):
            continue
        line = f"{flag} {path} is no {'file' if kind else 'folder'}"
        owner, _, name = path.partition("/")
        # Where runs/ exists, runs/new is a path with a slip; Qwen/Qwen3-0.6B is none.
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and not Path(owner).exists():
            line += (f"; to take it from the Hugging Face hub, type `hf download {kind}{path} "
                     f"--local-dir {name}` and then {flag} {name}" + "/FILE" * bool(kind))
        raise ValueError(line)
    inside = Path(config.model).resolve().is_relative_to(Path(config.output).resolve())
    if config.overwrite and inside and not config.eval:
        raise ValueError(f"--model {config.model} lies in --output, which --overwrite empties: give another")
    if not (Path(config.model) / "config.json").is_file():
        raise ValueError(f"--model {config.model} is no model folder: it holds no config.json")
    if config.write_hard and Path(config.write_hard).exists() and not config.overwrite:
        raise ValueError(f"--write-hard is {config.write_hard}, which exists: give another, or --overwrite")
    if config.write_hard and not Path(config.write_hard).parent.is_dir():
        raise ValueError(f"--write-hard is {config.write_hard}, whose folder does not exist: create it first")


def load_function(flag, spec, known, modules=None):
    """known[spec], or function NAME of a user's FILE.py:NAME; ValueError names the flag if there is none.

    modules: {path: module} of files that ran before: each runs once, its functions share what it remembers.
    """
    if spec in known:
        return known[spec]
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"{flag} is {spec!r}, it must be {', '.join(known)} or FILE.py:NAME of a file")
    modules = {} if modules is None else modules
    path = Path(path).resolve()
    if path not in modules:
        # A module of its own, not a name on the path: two files may be called alike.
        found = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(found)
        try:
            found.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # whatever the user's program raises
            raise ValueError(f"{flag} {spec}: {path} cannot be run: {error!r}") from error
        modules[path] = module
    if not callable(getattr(modules[path], name, None)):
        raise ValueError(f"{flag} {spec}: {path} has no function {name!r}")
    return getattr(modules[path], name)
