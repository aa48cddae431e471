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
it does by default; TRL takes --rows per backward pass, without gradient checkpointing (its default). Its
callback takes a step of ours after every step of TRL's, so that a busy neighbour slows both.

"sampling s", "update s": medians of their own; rewards count as sampling, for TRL all else as update.
"""
import json
import random
import statistics
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import timing

trl = timing.import_rival("trl")  # before our own files
if trl:
    import transformers
    from datasets import Dataset

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
    rows: int  # per backward pass of TRL's, that at which it is fastest here


CASES = {"real": StepCase("smollm2-135m", 4, timing.QUESTIONS, 8), "tiny": StepCase("tiny", 16, [32], 64)}


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
    return [" ".join(rng.choices(words, k=length)) for length in lengths[:case.prompts * steps]]


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


class TrlStep(transformers.TrainerCallback if trl else object):
    """TRL's GRPOTrainer. A step lasts from one on_step_end to the next: data, sampling, reward, update."""

    def __init__(self, folder, args, case, prompts, between):
        """between: called after every step, unmeasured."""
        self.name = f"TRL {trl.__version__}"
        self.between = between
        self.samples = []
        self.sampling = 0.0
        self.num_rows = case.prompts * GROUP
        self.device = args.device
        rows = args.rows or case.rows
        is_cpu = args.device.type == "cpu"
        path = str(folder / "model")
        config = trl.GRPOConfig(
            output_dir=str(folder / "trl"), use_cpu=is_cpu, bf16=not is_cpu, gradient_checkpointing=False,
            per_device_train_batch_size=rows, num_generations=GROUP, beta=0.0, shuffle_dataset=False,
            gradient_accumulation_steps=self.num_rows // rows, learning_rate=LR,
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
        assert {len(ids) for ids in completion_ids} == {NEW_TOKENS} and len(prompts) == self.num_rows
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


def measure_case(folder, case, args):
    """A table of one case: ours, and the rival if one is wanted."""
    prompts = make_folder(folder, case, WARM_UP + args.repeats)
    trainers = [BreadStep(folder, args, case, prompts)]
    if args.rival:
        trainers.append(TrlStep(folder, args, case, prompts, between=trainers[0]))
        trainers[1].trainer.train()
    else:
        for _ in range(WARM_UP + args.repeats):
            trainers[0]()
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
    parser.add_argument("--rows", type=int, help="rows per backward pass of TRL's; default: its fastest here")
    args = timing.parse(parser)
    if args.rival and trl is None:
        parser.error("--rival trl needs TRL, which is not installed here: pip install trl==1.16.0")
    write = timing.writer(__doc__, args)
    for name in args.case:
        with tempfile.TemporaryDirectory() as folder:
            write(measure_case(Path(folder), CASES[name], args))


if __name__ == "__main__":
    main()
