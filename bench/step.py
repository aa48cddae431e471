"""Times a step of bread.py against TRL's GRPOTrainer, by turns: prompts as long as GSM8K's, or all equal.

    python bench/step.py                                       # ours alone
    python bench/step.py --rival trl --case real tiny --write bench/results/step-cpu.md

`real`: SmolLM2-135M's shape, 4 prompts of the lengths of GSM8K's questions, in their order. `tiny`: a tiny
model, 16 prompts of 32 tokens, which no data set's are. Token ids and weights are made up, as they do not
decide the time. 8 rollouts of exactly 64 new tokens each (what ends a rollout is an id behind the vocabulary,
which the model cannot draw), temperature 1, no KL term, AdamW, one optimizer step per generation. The reward
is a hash of the completion between 0 and 1: no two of a group are equal and none is their mean, so every
rollout has a gradient. Both start from one folder, in bf16 on CUDA; ours keeps float32 masters. Ours is a
step of GRPO from bread.py's functions, without what a run prints and logs. Ours fills micro-batches as
it does by default; TRL takes --rows per backward pass, without gradient checkpointing (its default). Each is
in a process of its own, with its own settings of threads and memory, and waits while the other takes a step.

"sampling s", "update s": medians of their own; rewards count as sampling, for TRL all else as update.
"""
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import timing

import bread
from config import Config
from traces import Problem

GROUP, NEW_TOKENS = 8, 64
WARM_UP = 2  # steps; TRL's first takes a quarter longer than its others
LR = 1e-6
STOP = "<stop>"


@dataclass(frozen=True)
class StepCase:
    """What a step is given: `prompts` prompts, of the next of `lengths` tokens each."""
    shape: str
    prompts: int
    lengths: list
    rows: int  # per backward pass of TRL's; ours has as many in a micro-batch


CASES = {"real": StepCase("smollm2-135m", 4, timing.QUESTIONS, 32), "tiny": StepCase("tiny", 16, [32], 64)}


def make_folder(folder, case, steps):
    """Write model/ (weights, tokenizer); returns the prompts of all steps, as text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = timing.random_model(case.shape)
    model.save_pretrained(folder / "model")
    # A word per token id, a stop token behind the model's vocabulary; the prompt is the bare question.
    words = [f"t{i}" for i in range(model.config.vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([STOP])
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP, "pad_token": "t0",
                "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    rng = random.Random(0)
    lengths = case.lengths * (case.prompts * steps)
    prompts = [" ".join(rng.choices(words, k=length)) for length in lengths[:case.prompts * steps]]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return prompts


def hash_reward(text):
    """The reward of a completion: any number that differs between completions would do."""
    return zlib.crc32(text.encode()) / 2**32


# ---------------------------------------------------------------- the two


class BreadStep:
    """bread.py. A call takes one step and notes (seconds, those of sampling, of the update, CPU seconds)."""
    name = "bread.py"

    def __init__(self, folder, args, case, prompts):
        self.case = case
        self.ranks = bread.Ranks(str(args.device))
        config = Config(model=str(folder / "model"), group_size=GROUP, max_new_tokens=NEW_TOKENS)
        self.policy = bread.Policy(config, self.ranks.device, config.model)
        render = self.policy.tokenizer.render
        self.problems = [Problem(prompt, render(prompt), [], [], "", prompt, "") for prompt in prompts]
        self.policy.reserve(self.problems, [], 1, print)
        self.optimizer = bread.MasterAdamW(self.policy.model.parameters(), self.ranks)
        self.samples = []

    def __call__(self):
        count = self.case.prompts
        step = len(self.samples)
        points = [(problem, 0) for problem in self.problems[step * count:(step + 1) * count]]
        cpu = time.process_time()
        began = timing.now(self.ranks.device)
        groups = bread.sample_groups(self.policy, points, step, "base")
        rollouts = [rollout for group in groups for rollout in group]
        for rollout in rollouts:
            rollout.reward = hash_reward(self.policy.tokenizer.decode(rollout.completion_ids))
        sampled = timing.now(self.ranks.device)
        bread.set_advantages(groups, divide_by_std=True)
        _, norms = bread.update(self.policy, self.optimizer, self.ranks, groups, LR, bread.batch_loss)
        ended = timing.now(self.ranks.device)
        self.samples.append((ended - began, sampled - began, ended - sampled, time.process_time() - cpu))
        assert {len(rollout.completion_ids) for rollout in rollouts} == {NEW_TOKENS}
        assert all(rollout.advantage for rollout in rollouts) and min(norms) > 0


class TrlStep:
    """TRL's GRPOTrainer in a process of its own (bench/trl_step.py), which takes a step when told to."""

    def __init__(self, folder, args, case):
        settings = {"rows": args.rows or case.rows, "num_rows": case.prompts * GROUP, "group": GROUP,
                    "new_tokens": NEW_TOKENS, "lr": LR, "steps": WARM_UP + args.repeats,
                    "device": args.device.type, "threads": args.threads}
        (folder / "settings.json").write_text(json.dumps(settings))
        script = Path(__file__).with_name("trl_step.py")
        self.process = subprocess.Popen([sys.executable, f"{script}", f"{folder}"], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.name = self.read()
        self.samples = []

    def read(self):
        """What it says next; its libraries print other lines."""
        for line in self.process.stdout:
            if line.startswith("TOLD "):
                return json.loads(line[5:])
        raise RuntimeError("TRL's process has ended; its message stands above")

    def __call__(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.samples.append(self.read())


def measure_case(folder, case, args):
    """A table of one case: ours, and the rival if one is wanted."""
    prompts = make_folder(folder, case, WARM_UP + args.repeats)
    trainers = [BreadStep(folder, args, case, prompts)]
    if args.rival:
        trainers.append(TrlStep(folder, args, case))
    for _ in range(WARM_UP + args.repeats):
        for trainer in trainers:
            trainer()
    if args.rival:
        trainers[1].process.communicate()  # the end of its input ends it
    results = {one: (one.samples[WARM_UP:], "-") for one in trainers}
    new_tokens = case.prompts * GROUP * NEW_TOKENS

    def more(_one, samples):
        seconds, sampling, update = (statistics.median(column) for column in list(zip(*samples))[:3])
        return f"{new_tokens / seconds:,.0f}", f"{sampling:.3f}", f"{update:.3f}"
    num_parameters = sum(weight.numel() for weight in trainers[0].policy.model.parameters())
    lengths = case.lengths[:len(prompts)]
    title = (f"\n**{case.shape}, {num_parameters / 1e6:,.1f}M parameters: {case.prompts} prompts of "
             f"{min(lengths)} to {max(lengths)} tokens x {GROUP} rollouts of {NEW_TOKENS}; TRL takes "
             f"{args.rows or case.rows} rows per backward pass**\n\n")
    return title + timing.comparison(results, {}, ("new tokens/s", "sampling s", "update s"), more)


def main():
    parser = timing.new_parser(__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="default: both")
    parser.add_argument("--rival", choices=["trl"], help="compare with TRL's GRPOTrainer")
    parser.add_argument("--rows", type=int, help="per backward pass of TRL's; default: 32, tiny 64")
    args = timing.parse(parser)
    if args.rival and not importlib.util.find_spec("trl"):
        parser.error("--rival trl needs TRL, which is not installed here: pip install trl==1.16.0")
    write = timing.writer(__doc__, args)
    for name in args.case:
        with tempfile.TemporaryDirectory() as folder:
            write(measure_case(Path(folder), CASES[name], args))


if __name__ == "__main__":
    main()
