"""The rival of bench/step.py: TRL's GRPOTrainer, which takes a step for each line on stdin. Started by it."""
import json
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import timing
import torch

trl = timing.import_rival("trl", wanted=True)
import transformers
from datasets import Dataset


def tell(value):
    print("TOLD " + json.dumps(value), flush=True)


class TrlTrainer(transformers.TrainerCallback):
    """A step lasts from one on_step_end to the next: data, sampling, reward, update."""

    def __init__(self, folder, settings):
        self.settings = settings
        self.device = torch.device(settings.device)
        self.sampling = 0.0
        is_cpu = self.device.type == "cpu"
        path = f"{folder / 'model'}"
        config = trl.GRPOConfig(
            output_dir=f"{folder / 'trl'}", use_cpu=is_cpu, bf16=not is_cpu, gradient_checkpointing=False,
            per_device_train_batch_size=settings.rows, num_generations=settings.group, beta=0.0,
            gradient_accumulation_steps=settings.num_rows // settings.rows, learning_rate=settings.lr,
            max_completion_length=settings.new_tokens, temperature=1.0, lr_scheduler_type="constant",
            max_steps=settings.steps, logging_strategy="no", save_strategy="no", report_to=[],
            disable_tqdm=True, dataloader_pin_memory=False, shuffle_dataset=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32 if is_cpu else torch.bfloat16, attn_implementation="sdpa")
        prompts = json.loads((folder / "prompts.json").read_text())
        self.trainer = trl.GRPOTrainer(
            model, self.reward, config, train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=transformers.AutoTokenizer.from_pretrained(path, padding_side="left"))
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.trainer.add_callback(self)
        self.generate = self.trainer._generate_and_score_completions
        self.trainer._generate_and_score_completions = self.timed_generate

    def reward(self, completions, prompts, completion_ids, **_):
        """bench/step.py's `hash_reward`; checks that what it samples has the lengths that ours has."""
        assert {len(ids) for ids in completion_ids} == {self.settings.new_tokens}
        assert len(prompts) == self.settings.num_rows
        return [zlib.crc32(text.encode()) / 2**32 for text in completions]

    def timed_generate(self, inputs):
        """Sampling and rewards: what ours counts as sampling."""
        began = timing.now(self.device)
        out = self.generate(inputs)
        self.sampling = timing.now(self.device) - began
        return out

    def on_train_begin(self, *_args, **_kwargs):
        """Wait to be told, then start the clocks."""
        sys.stdin.readline()
        self.mark = timing.now(self.device), time.process_time()

    def on_step_end(self, *_args, **_kwargs):
        seconds = timing.now(self.device) - self.mark[0]
        tell((seconds, self.sampling, seconds - self.sampling, time.process_time() - self.mark[1]))
        self.on_train_begin()


def main():
    folder = Path(sys.argv[1])
    settings = SimpleNamespace(**json.loads((folder / "settings.json").read_text()))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    trainer = TrlTrainer(folder, settings)
    tell(f"TRL {trl.__version__}")
    trainer.trainer.train()


if __name__ == "__main__":
    main()
