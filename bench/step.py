"""Times a whole RL step, sampling and update, of bread.py against TRL's GRPOTrainer, by turns in one process.

    python bench/step.py                                       # ours alone
    python bench/step.py --rival trl --threads 2 --write bench/results/step-cpu.md

A tiny model with random weights and a tokenizer of 64 symbols, 16 prompts of 32 tokens, 8 rollouts each of
exactly 64 new tokens (what ends a rollout is a 65th id, which the model cannot draw), temperature 1, no KL
term, AdamW, one optimizer step per generation. The reward is a hash of the completion between 0 and 1: no two
of a group are equal and none is their mean, so every rollout has a gradient. Both start from the same folder
and train on what they sample. Ours is a step of GRPO from bread.py's functions, without what a run prints and
logs. TRL takes as many rows per backward pass, and no gradient checkpointing (its default, which costs time).
A callback takes one step of ours at the end of every step of TRL's, so that a busy neighbour slows both.

"sampling s", "update s": medians of their own; rewards count as sampling, for TRL all else as update.
"""
import json
import random
import statistics
import string
import tempfile
import time
import zlib
from pathlib import Path

import timing
import torch

trl = timing.import_rival("trl")  # before our own files
if trl:
    import transformers
    from datasets import Dataset

import bread
from config import Config
from traces import load_problems

SYMBOLS = string.digits + string.ascii_letters + "+-"
STOP = "<stop>"
PROMPTS, GROUP = 16, 8
PROMPT_TOKENS, NEW_TOKENS = 32, 64
WARM_UP = 2  # steps; TRL's first takes a quarter longer than its others
LR = 1e-6


def make_folder(folder, steps):
    """Write model/ (weights, tokenizer) and problems.jsonl; returns the prompts of all steps."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    timing.random_model("tiny").save_pretrained(folder / "model")
    # One token per symbol, a stop token behind the model's vocabulary; the prompt is the bare question.
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([STOP])
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP, "pad_token": STOP,
                "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    rng = random.Random(0)
    prompts = ["".join(rng.choices(SYMBOLS, k=PROMPT_TOKENS)) for _ in range(PROMPTS * steps)]
    lines = [json.dumps({"question": prompt, "trace": "abc", "answer": "1"}) for prompt in prompts]
    (folder / "problems.jsonl").write_text("\n".join(lines))
    return prompts


def hash_reward(text):
    """The reward of a completion: any number that differs between completions would do."""
    return zlib.crc32(text.encode()) / 2**32


# ---------------------------------------------------------------- the two


class BreadStep:
    """bread.py. A call takes one step and notes (seconds, those of sampling, of the update, CPU seconds)."""
    name = "bread.py"

    def __init__(self, folder, args):
        self.ranks = bread.Ranks(str(args.device))
        config = Config(model=str(folder / "model"), group_size=GROUP, max_new_tokens=NEW_TOKENS,
                        micro_batch_size=args.micro_batch_size)
        self.policy = bread.Policy(config, self.ranks.device, config.model)
        self.problems = load_problems(folder / "problems.jsonl", self.policy.tokenizer)
        self.optimizer = bread.MasterAdamW(self.policy.model.parameters(), self.ranks)
        self.samples = []

    def __call__(self):
        step = len(self.samples)
        points = [(problem, 0) for problem in self.problems[step * PROMPTS:(step + 1) * PROMPTS]]
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
        lengths = {(len(rollout.prompt_ids), len(rollout.completion_ids)) for rollout in rollouts}
        assert lengths == {(PROMPT_TOKENS, NEW_TOKENS)}, lengths
        assert all(rollout.advantage for rollout in rollouts) and min(norms) > 0


class TrlStep:
    """TRL's GRPOTrainer. A step lasts from one on_step_end to the next: data, sampling, reward, update."""

    def __init__(self, folder, args, prompts):
        self.name = f"TRL {trl.__version__}"
        self.samples = []
        self.sampling = 0.0
        self.device = args.device
        is_cpu = args.device.type == "cpu"
        path = str(folder / "model")
        config = trl.GRPOConfig(
            output_dir=str(folder / "trl"), use_cpu=is_cpu, bf16=not is_cpu, gradient_checkpointing=False,
            per_device_train_batch_size=args.micro_batch_size, num_generations=GROUP, beta=0.0,
            gradient_accumulation_steps=PROMPTS * GROUP // args.micro_batch_size, learning_rate=LR,
            max_completion_length=NEW_TOKENS, temperature=1.0, lr_scheduler_type="constant",
            max_steps=WARM_UP + args.repeats, logging_strategy="no", save_strategy="no", report_to=[],
            disable_tqdm=True, dataloader_pin_memory=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32,
                                                                  attn_implementation="sdpa")
        self.trainer = trl.GRPOTrainer(
            model, self.reward, config, train_dataset=Dataset.from_dict({"prompt": prompts}),
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
        began = timing.now(self.device)
        out = self.generate(inputs)
        self.sampling = timing.now(self.device) - began
        return out

    def train(self, between):
        """Train to the end of max_steps; `between` is called after every step, unmeasured."""
        rival = self

        class Alternate(transformers.TrainerCallback):
            def on_train_begin(self, *_args, **_kwargs):
                self.mark = timing.now(rival.device), time.process_time()

            def on_step_end(self, *_args, **_kwargs):
                seconds = timing.now(rival.device) - self.mark[0]
                cpu = time.process_time() - self.mark[1]
                rival.samples.append((seconds, rival.sampling, seconds - rival.sampling, cpu))
                between()
                self.on_train_begin()

        self.trainer.add_callback(Alternate())
        self.trainer.train()


def main():
    parser = timing.new_parser(__doc__)
    parser.add_argument("--rival", choices=["trl"], help="compare with TRL's GRPOTrainer")
    # Ours takes 0.89, 0.91, 1.0 s for an update of 32, 64, 128 rows at a time on one thread; TRL's differ by
    # less than their noise.
    parser.add_argument("--micro-batch-size", type=int, default=64, help="rows per backward pass; default 64")
    args = timing.parse(parser)
    if args.micro_batch_size < 1 or PROMPTS * GROUP % args.micro_batch_size:
        parser.error(f"--micro-batch-size must be a divisor of {PROMPTS * GROUP}")
    if args.rival and trl is None:
        parser.error("--rival trl needs TRL, which is not installed here: pip install trl==1.16.0")
    if args.rival:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        prompts = make_folder(Path(folder), WARM_UP + args.repeats)
        trainers = [BreadStep(Path(folder), args)]
        if args.rival:
            trainers.append(TrlStep(Path(folder), args, prompts))
            trainers[1].train(between=trainers[0])
        else:
            for _ in range(WARM_UP + args.repeats):
                trainers[0]()
    results = {one: (one.samples[WARM_UP:], "-") for one in trainers}

    def more(_one, samples):
        seconds, sampling, update = (statistics.median(column) for column in list(zip(*samples))[:3])
        return f"{PROMPTS * GROUP * NEW_TOKENS / seconds:,.0f}", f"{sampling:.3f}", f"{update:.3f}"
    write = timing.writer("The step", args, f"{args.micro_batch_size} rows per backward pass")
    write(timing.comparison(results, {}, ("new tokens/s", "sampling s", "update s"), more))


if __name__ == "__main__":
    main()
