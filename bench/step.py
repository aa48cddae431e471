"""Times a step of bread.py, on made-up prompts of one length, against TRL's GRPOTrainer, by turns.

    python bench/step.py                                       # ours alone
    python bench/step.py --rival trl --threads 2 --write bench/results/step-cpu.md

A tiny model with random weights and a tokenizer of 64 symbols, 16 prompts of 32 tokens, 8 rollouts each of
exactly 64 new tokens (what ends a rollout is a 65th id, which the model cannot draw), temperature 1, no KL
term, AdamW, one optimizer step per generation. The reward is a hash of the completion between 0 and 1: no two
of a group are equal and none is their mean, so every rollout has a gradient. Both start from one folder, in
bf16 on CUDA; ours keeps float32 masters. Ours is a step of GRPO from bread.py's functions, without what a run
prints and logs. TRL takes as many rows per backward pass, and no gradient checkpointing (its default). Its
callback takes a step of ours after every step of TRL's, so that a busy neighbour slows both.

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

trl = timing.import_rival("trl")  # before our own files
if trl:
    import transformers
    from datasets import Dataset

import bread
from config import Config
from traces import Problem

SYMBOLS = string.digits + string.ascii_letters + "+-"
STOP = "<stop>"
PROMPTS, GROUP = 16, 8
PROMPT_TOKENS, NEW_TOKENS = 32, 64
WARM_UP = 2  # steps; TRL's first takes a quarter longer than its others
LR = 1e-6


def make_folder(folder, steps):
    """Write model/ (weights, tokenizer); returns the prompts of all steps."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    timing.random_model("tiny").save_pretrained(folder / "model")
    # One token per symbol, a stop token behind the model's vocabulary; the prompt is the bare question.
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.add_special_tokens([STOP])
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP, "pad_token": STOP,
                "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    rng = random.Random(0)
    return ["".join(rng.choices(SYMBOLS, k=PROMPT_TOKENS)) for _ in range(PROMPTS * steps)]


def hash_reward(text):
    """The reward of a completion: any number that differs between completions would do."""
    return zlib.crc32(text.encode()) / 2**32


# ---------------------------------------------------------------- the two


class BreadStep:
    """bread.py. A call takes one step and notes (seconds, those of sampling, of the update, CPU seconds)."""
    name = "bread.py"

    def __init__(self, folder, args, prompts):
        self.ranks = bread.Ranks(str(args.device))
        config = Config(model=str(folder / "model"), group_size=GROUP, max_new_tokens=NEW_TOKENS,
                        micro_batch_size=args.micro_batch_size)
        self.policy = bread.Policy(config, self.ranks.device, config.model)
        render = self.policy.tokenizer.render
        self.problems = [Problem(prompt, render(prompt), [], [], "", prompt, "") for prompt in prompts]
        self.policy.reserve(self.problems, [], print)
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


class TrlStep(transformers.TrainerCallback if trl else object):
    """TRL's GRPOTrainer. A step lasts from one on_step_end to the next: data, sampling, reward, update."""

    def __init__(self, folder, args, prompts, between):
        """between: called after every step, unmeasured."""
        self.name = f"TRL {trl.__version__}"
        self.between = between
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
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype,
                                                                  attn_implementation="sdpa")
        self.trainer = trl.GRPOTrainer(
            model, self.reward, config, train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=transformers.AutoTokenizer.from_pretrained(path, padding_side="left"))
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.trainer.add_callback(self)
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

    def on_train_begin(self, *_args, **_kwargs):
        self.mark = timing.now(self.device), time.process_time()

    def on_step_end(self, *_args, **_kwargs):
        seconds = timing.now(self.device) - self.mark[0]
        cpu = time.process_time() - self.mark[1]
        self.samples.append((seconds, self.sampling, seconds - self.sampling, cpu))
        self.between()
        self.on_train_begin()


def main():
    parser = timing.new_parser(__doc__)
    parser.add_argument("--rival", choices=["trl"], help="compare with TRL's GRPOTrainer")
    # An update of 32, 64, 128 rows at a time takes us 0.89, 0.91, 1.0 s on one thread, TRL about the same.
    parser.add_argument("--micro-batch-size", type=int, default=64, help="rows per backward pass; default 64")
    args = timing.parse(parser)
    if args.micro_batch_size < 1 or PROMPTS * GROUP % args.micro_batch_size:
        parser.error(f"--micro-batch-size must be a divisor of {PROMPTS * GROUP}")
    if args.rival and trl is None:
        parser.error("--rival trl needs TRL, which is not installed here: pip install trl==1.16.0")
    with tempfile.TemporaryDirectory() as folder:
        prompts = make_folder(Path(folder), WARM_UP + args.repeats)
        trainers = [BreadStep(Path(folder), args, prompts)]
        if args.rival:
            trainers.append(TrlStep(Path(folder), args, prompts, between=trainers[0]))
            trainers[1].trainer.train()
        else:
            for _ in range(WARM_UP + args.repeats):
                trainers[0]()
    results = {one: (one.samples[WARM_UP:], "-") for one in trainers}

    def more(_one, samples):
        seconds, sampling, update = (statistics.median(column) for column in list(zip(*samples))[:3])
        return f"{PROMPTS * GROUP * NEW_TOKENS / seconds:,.0f}", f"{sampling:.3f}", f"{update:.3f}"
    write = timing.writer(__doc__, args, f"{args.micro_batch_size} rows per backward pass")
    write(timing.comparison(results, {}, ("new tokens/s", "sampling s", "update s"), more))


if __name__ == "__main__":
    main()
