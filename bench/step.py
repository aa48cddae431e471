"""Times a whole RL step, sampling and update, of bread.py against TRL's GRPOTrainer, step by step in one process.

    python bench/step.py                                       # ours alone
    python bench/step.py --rival trl
    python bench/step.py --rival trl --threads 2 --write bench/results/step-cpu.md

A tiny model with random weights and a tokenizer of 64 symbols, 16 prompts of 32 tokens, 8 rollouts each of exactly 64
new tokens (what ends a rollout is a 65th id, which the model cannot draw), temperature 1, no KL term, AdamW, one
optimizer step per generation, float32. The reward is a hash of the completion between 0 and 1: no two of a group are
equal and none is their mean, so every rollout has a gradient. Both start from the same folder and train on what they
sample.

Ours is a bread.Run with --method grpo and the lines of bread.train for one step, its metrics files included; replaced
are bread.math_reward, and what it prints. TRL takes the same number of rows per backward pass, and no gradient
checkpointing (its default is to recompute activations, which costs time). A callback takes one step of ours at the end
of every step of TRL's, so that a busy neighbour slows both.
"""
import argparse
import json
import logging
import os
import platform
import random
import shlex
import signal
import statistics
import string
import sys
import tempfile
import time
import warnings
import zlib
from datetime import datetime
from pathlib import Path

# As in bread.py: threads that spin at barriers collapse as soon as another program takes a core. Set it to `active`
# outside to measure TRL (and ours) as a quiet machine with libgomp's own default has it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

ROOT = Path(__file__).resolve().parents[1]
# transformers looks for a package `kernels`, and both this repository and this folder hold another thing of that
# name. So it is imported, and its answer to that question cached, while neither is on the path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "bench")]
trl = None
if any(argument.split("=")[0] == "--rival" for argument in sys.argv):
    try:
        import transformers
        import trl
        from datasets import Dataset
        from transformers.utils import is_kernels_available
        from trl import GRPOConfig, GRPOTrainer
        is_kernels_available()
    except ImportError:
        trl = None  # main() says so
sys.path[:0] = [str(ROOT)]

import bread
from config import Config
from model import ModelConfig, Transformer

SYMBOLS = string.digits + string.ascii_letters + "+-"
STOP = "<stop>"
PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 32, 64
WARM_UP = 2  # steps; TRL's first takes a quarter longer than its others
LR = 1e-6


# ---------------------------------------------------------------- what is trained


def make_folder(folder, steps):
    """Write model/ (weights, tokenizer) and problems.jsonl with the prompts of all steps."""
    config = ModelConfig(model_type="qwen3", vocab_size=len(SYMBOLS), hidden_size=128, intermediate_size=384,
                         num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                         max_position_embeddings=1024, tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    Transformer(config).initialize().save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    rng = random.Random(0)
    rows = [{"question": "".join(rng.choices(SYMBOLS, k=PROMPT_TOKENS)), "trace": "abc", "answer": "1"}
            for _ in range(PROMPTS * steps)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["question"] for row in rows]


def save_tokenizer(folder):
    """One token per symbol, and a stop token behind the model's vocabulary; the prompt is the question as it stands."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([STOP])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP, "pad_token": STOP,
                "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def hash_reward(text):
    """The reward of a completion: any number that differs between completions would do."""
    return zlib.crc32(text.encode()) / 2**32


# ---------------------------------------------------------------- the two


class Ours:
    """bread.py. A call takes one step and returns (seconds, CPU seconds, seconds of sampling, of the update)."""

    name = "bread.py"

    def __init__(self, folder, args, steps):
        config = Config(model=str(folder / "model"), data=str(folder / "problems.jsonl"), output=str(folder / "run"),
                        method="grpo", problems_per_step=PROMPTS, group_size=GROUP, max_new_tokens=NEW_TOKENS,
                        micro_batch_size=args.micro_batch_size, lr=LR, steps=steps + 1, device="cpu")
        bread.math_reward = lambda text, _answer: hash_reward(text)
        bread.Run.say = lambda _run, _line: None
        self.run = bread.Run(config)
        for number, handler in self.run.handlers.items():  # an interrupt ends the benchmark, not a run
            signal.signal(number, handler)

    def __call__(self):
        run, before = self.run, dict(self.run.seconds)
        began, cpu = time.perf_counter(), time.process_time()
        problems = run.ranks.share(run.next_problems())
        with run.clock("sample"):
            groups = bread.sample_groups(run, [(problem, 0) for problem in problems], "base")
        for group in groups:
            bread.set_advantages(group, divide_by_std=True)
        groups = run.together(groups)
        with run.clock("update"):
            bread.update(run, groups)
        run.advance()
        run.report(groups)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        lengths = {(len(r.prompt_ids), len(r.completion_ids)) for group in groups for r in group}
        assert lengths == {(PROMPT_TOKENS, NEW_TOKENS)}, lengths
        assert all(r.advantage for group in groups for r in group) and run.metrics["grad_norm"] > 0
        return seconds, cpu, *(run.seconds[name] - before.get(name, 0.0) for name in ("sample", "update"))

    def weight(self):
        return self.run.model.model.embed_tokens.weight

    def close(self):
        self.run.bar.close()
        self.run.folder.close()


class Trl:
    """TRL's GRPOTrainer. A step lasts from one on_step_end to the next: data, generation, reward, update, callbacks."""

    def __init__(self, folder, args, steps, prompts):
        self.name, self.samples, self.sampling, self.mark = f"TRL {trl.__version__}", [], 0.0, None
        path, passes = str(folder / "model"), PROMPTS * GROUP // args.micro_batch_size
        config = GRPOConfig(
            output_dir=str(folder / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0,
            per_device_train_batch_size=args.micro_batch_size, gradient_accumulation_steps=passes,
            num_generations=GROUP, max_completion_length=NEW_TOKENS, temperature=1.0, learning_rate=LR,
            lr_scheduler_type="constant", max_steps=steps, logging_strategy="no", save_strategy="no", report_to=[],
            disable_tqdm=True, dataloader_pin_memory=False)
        self.trainer = GRPOTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa"),
            reward_funcs=self.reward, args=config, train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=transformers.AutoTokenizer.from_pretrained(path, padding_side="left"))
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.generate = self.trainer._generate_and_score_completions
        self.trainer._generate_and_score_completions = self.timed_generate

    def reward(self, completions, prompts, completion_ids, **_):
        """TRL's form of `hash_reward`; checks that what it samples has the lengths that ours has."""
        assert {len(ids) for ids in completion_ids} == {NEW_TOKENS} and len(prompts) == PROMPTS * GROUP
        return list(map(hash_reward, completions))

    def timed_generate(self, inputs):
        """Sampling and rewards: what ours counts as sampling."""
        began = time.perf_counter()
        out = self.generate(inputs)
        self.sampling = time.perf_counter() - began
        return out

    def train(self, between):
        """Train to the end of max_steps; `between` is called after every step, outside of what is measured."""
        trl_steps = self

        class Alternate(transformers.TrainerCallback):
            def on_train_begin(self, *_args, **_kwargs):
                trl_steps.mark = time.perf_counter(), time.process_time()

            def on_step_end(self, *_args, **_kwargs):
                trl_steps.end_of_step()
                between()
                trl_steps.mark = time.perf_counter(), time.process_time()

        self.trainer.add_callback(Alternate())
        self.trainer.train()

    def end_of_step(self):
        seconds, cpu = time.perf_counter() - self.mark[0], time.process_time() - self.mark[1]
        self.samples.append((seconds, cpu, self.sampling, seconds - self.sampling))

    def weight(self):
        return self.trainer.model.get_input_embeddings().weight


# ---------------------------------------------------------------- measuring


def measure(folder, args):
    """[(name, [(seconds, CPU seconds, sampling, update) of every timed step])], ours first."""
    steps = WARM_UP + args.repeats
    prompts = make_folder(folder, steps)
    ours, taken = Ours(folder, args, steps), []
    contestants = [ours]
    if args.rival:
        contestants.append(Trl(folder, args, steps, prompts))
    before = [one.weight().detach().clone() for one in contestants]
    if args.rival:
        contestants[1].train(between=lambda: taken.append(ours()))
    else:
        taken = [ours() for _ in range(steps)]
    ours.close()
    for one, weight_VD in zip(contestants, before):
        assert not torch.equal(one.weight(), weight_VD), f"{one.name} has not trained"
    return [(one.name, samples[WARM_UP:]) for one, samples in
            zip(contestants, [taken] + [one.samples for one in contestants[1:]])]


HEADINGS = ("trainer", "n", "s/step, median (range)", "ours is (range)", "new tokens/s", "sampling s", "update s",
            "CPU s/step")

NOTES = f"""\
A step is {PROMPTS} prompts of {PROMPT_TOKENS} tokens x {GROUP} rollouts x {NEW_TOKENS} new tokens, then one update on \
all of them.
n: timed steps, after {WARM_UP} that are not. "ours is": seconds of this trainer's step over those of ours right after
it; above 1 ours is faster. new tokens/s: sampled tokens over the whole step. sampling and update: medians of their
own; rewards count as sampling, for TRL everything else as update. CPU s: processor time of all threads, median."""


def header(args):
    """The lines above the table: what ran where, beside what else."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.is_file() else []
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if args.rival:
        versions += [f"transformers {transformers.__version__}", f"trl {trl.__version__}"]
    return (f"# The step\n\n{datetime.now():%Y-%m-%d %H:%M}, {names[0] if names else platform.machine()}, "
            f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}\n{', '.join(versions)}; "
            f"{torch.get_num_threads()} torch threads (ours samples a model this small with one), "
            f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}; {args.micro_batch_size} rows per backward pass, "
            f"float32\n`python {shlex.join(sys.argv)}`\n\n{NOTES}\n")


def spread(values, form):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def table(results):
    """Markdown rows, one per trainer; the first is the one that the others are compared with."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    first = results[0][1]
    for name, samples in results:
        seconds, cpu, sampling, update = zip(*samples)
        ratios = [theirs[0] / ours[0] for theirs, ours in zip(samples, first)]
        lines.append("| " + " | ".join((
            name, str(len(samples)), spread(seconds, "{:.3f}"), "" if samples is first else spread(ratios, "{:.2f}x"),
            f"{PROMPTS * GROUP * NEW_TOKENS / statistics.median(seconds):,.0f}", f"{statistics.median(sampling):.3f}",
            f"{statistics.median(update):.3f}", f"{statistics.median(cpu):.2f}")) + " |")
    return lines


def parse_args():
    """The command line. Exits with 2 on a wrong one, and where the rival is not installed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rival", choices=["trl"], help="compare with TRL's GRPOTrainer")
    parser.add_argument("--threads", type=int, help="torch threads, for both; default: torch's")
    # Ours takes 0.89, 0.91, 1.0 s for an update of 32, 64, 128 rows at a time on one thread; TRL's differ by less than
    # their noise.
    parser.add_argument("--micro-batch-size", type=int, default=64,
                        help=f"rows per backward pass, for both; a divisor of {PROMPTS * GROUP}, default 64")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; default 5")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the Markdown to this file too")
    args = parser.parse_args()
    if args.micro_batch_size < 1 or PROMPTS * GROUP % args.micro_batch_size:
        parser.error(f"--micro-batch-size {args.micro_batch_size}: a divisor of {PROMPTS * GROUP} is needed")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1 is needed")
    if args.rival and trl is None:
        parser.exit(2, "--rival trl needs TRL, which is not installed here: pip install trl==1.16.0\n")
    return args


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.rival:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)  # between its parts, about their own names
        logging.getLogger("trl").setLevel(logging.ERROR)
    head = header(args)
    print(head, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lines = table(measure(Path(folder), args))
    text = "\n".join([*lines, f"\nLoad average at the end: {os.getloadavg()[0]:.1f}"])
    print(text)
    if args.write:
        args.write.write_text(f"{head}\n{text}\n")


if __name__ == "__main__":
    main()
