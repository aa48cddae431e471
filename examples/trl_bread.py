"""BREAD inside TRL's GRPOTrainer: `python examples/trl_bread.py --model FOLDER --data FILE.jsonl --steps 100`

For trl==1.16.0, whose `rollout_func` is experimental. TRL generates (--use_vllm true: vLLM, on a server or
beside the trainer; else transformers) and trains (`accelerate launch`: FSDP, DeepSpeed, nodes). Added here:

    rollout_func    G completions of each question; where all fail, anchor_search asks for groups behind cuts
                    of the trace, and an accepted one takes the failed one's place
    prompt_ids      question | anchor: what TRL takes for the prompt carries no loss
    anchor          its text, for the reward function: the answer is anchor + completion

Ranks search for different numbers of rounds, but to generate is a collective call: FSDP and ZeRO-3 gather
weights for it, and TRL cuts a vLLM server's reply into pieces of one length for all ranks. So every rank goes
every round with equally many groups: before it all gather how many each asks for, the most is what each one
generates, and what a rank did not ask for is thrown away. Once none asks, all are done. Left out: hints.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bread import METHODS, num_successes, probe, read_problems
from config import Config
from rewards import math_reward, without_cut_word
from traces import Tokenizer


class AnchoredRollouts:
    """GRPOTrainer's rollout_func, when called, and its reward function. config: bread.py's Config. problems:
    {text of the prompt, TRL's "prompt": Problem}, held-out ones, too. tokenizer: that of traces.py."""

    def __init__(self, config, problems, tokenizer):
        self.config = config
        self.problems = problems
        self.tokenizer = tokenizer
        # Of this rank, as metrics: tokens so far, thrown away ones too; searches of the last batch.
        self.counts = {"sampled_tokens": 0, "searched": 0, "anchored": 0}

    def __call__(self, prompts, trainer):
        """The rollouts of this process's slice of a batch, in its order, under the names that TRL expects."""
        size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        if prompts != [prompt for prompt in prompts[::size] for _ in range(size)]:
            raise ValueError("groups are spread over processes: per_device_train_batch_size times "
                             f"steps_per_generation must be a multiple of num_generations, {size}")
        problems = [self.problems[prompt] for prompt in prompts[::size]]
        groups = self.sample(trainer, [(problem, 0) for problem in problems], problems[0], size)
        if trainer.model.training and self.config.method == "bread":
            self.search(trainer, problems, groups)
        rows = [row for group in groups for row in group]
        return {"prompt_ids": [row.prompt_ids for row in rows], "anchor": [row.anchor for row in rows],
                "completion_ids": [row.completion_ids for row in rows],
                "logprobs": None if rows[0].logprobs is None else [row.logprobs for row in rows]}

    def search(self, trainer, problems, groups):
        """Episode Anchor Search for all failed of `groups` in lockstep; accepted groups take their places."""
        failed = [i for i, group in enumerate(groups) if num_successes(group) == 0]
        searches = {i: probe(self.config, self.cuts(problems[i])) for i in failed}
        replies = dict.fromkeys(failed)  # the first thing sent to a generator is None
        self.counts |= {"searched": len(failed), "anchored": 0}
        while True:
            asked = {}
            for i, reply in replies.items():
                try:
                    asked[i] = problems[i], searches[i].send(reply)
                except StopIteration as done:
                    groups[i] = done.value or groups[i]
                    self.counts["anchored"] += bool(done.value)
            sampled = self.sample(trainer, list(asked.values()), problems[0], self.config.group_size)
            if sampled is None:
                return
            replies = dict(zip(asked, sampled))

    def cuts(self, problem):
        """Where an anchor may end: with room for an answer, and not paid itself, or that would be learned."""
        texts = {cut: self.tokenizer.decode(problem.expert_ids[:cut]) for cut in problem.cuts}
        return [cut for cut, text in texts.items()
                if cut < self.config.max_new_tokens and not self.judge(text, [], problem.answer)]

    def sample(self, trainer, points, idle, size):
        """A group of `size` rows behind each (problem, cut), or None if no rank has points. All ranks call it
        at the same time; one with fewer points than another fills up with the problem `idle`, see above."""
        asked = torch.tensor([len(points)], device=trainer.accelerator.device)
        busiest = int(trainer.accelerator.gather(asked).max())
        if busiest == 0:
            return None
        contexts = []
        for problem, cut in points + [(idle, 0)] * (busiest - len(points)):
            contexts += [problem.prompt_ids + problem.expert_ids[:cut]] * size
        # What TRL itself calls where there is no rollout_func. Log-probs are None if it is transformers.
        ids, logprobs = trainer._generate_single_turn(contexts, None, {}, size)
        self.counts["sampled_tokens"] += sum(map(len, ids)) if trainer.model.training else 0
        rows = []
        for n, (problem, cut) in enumerate(point for point in points for _ in range(size)):
            anchor = self.tokenizer.decode(problem.expert_ids[:cut])
            own_ids = list(ids[n][:self.config.max_new_tokens - cut])  # an anchor counts toward the limit
            rows.append(SimpleNamespace(prompt_ids=contexts[n], anchor=anchor, completion_ids=own_ids,
                                        logprobs=logprobs and list(logprobs[n][:len(own_ids)]),
                                        reward=self.judge(anchor, own_ids, problem.answer)))
        return [rows[first:first + size] for first in range(0, len(rows), size)]

    def judge(self, anchor, completion_ids, answer):
        """1.0 if anchor (text) and completion, together, end in the answer, else 0.0."""
        # Told where the prompt opened a thought: a box inside one that never closes is no answer.
        opening = "<think>\n" if self.tokenizer.opens_thinking else ""
        text = opening + anchor + self.tokenizer.decode(completion_ids)
        is_whole = not completion_ids or completion_ids[-1] in self.tokenizer.stop_token_ids
        return math_reward(text if is_whole else without_cut_word(text), answer)

    def reward(self, completion_ids, anchor, answer, log_metric, **_):
        """TRL's reward function. `anchor` is what __call__ returned, `answer` a column of the data set."""
        for name, number in self.counts.items():
            log_metric(name, number)  # TRL shows the mean over ranks
        return [self.judge(*row) for row in zip(anchor, completion_ids, answer)]


def make_trainer(options, trl_config):
    """The GRPOTrainer of a bread.py Config (model, data, held-out data, method, sizes) and a GRPOConfig."""
    tokenizer = Tokenizer.from_pretrained(options.model)
    shape = AutoConfig.from_pretrained(options.model).get_text_config()
    named = {}
    sets = []
    for problems in read_problems(options, tokenizer, shape, METHODS[options.method], PartialState().print):
        prompts = [tokenizer.decode(problem.prompt_ids, skip_special_tokens=False) for problem in problems]
        named = dict(zip(prompts, problems)) | named  # of a question in both files, the one with a trace
        rows = [{"prompt": prompt, "answer": named[prompt].answer} for prompt in prompts]
        sets.append(Dataset.from_list(rows) if rows else None)
    rollouts = AnchoredRollouts(options, named, tokenizer)
    return GRPOTrainer(options.model, rollouts.reward, trl_config, train_dataset=sets[0],
                       eval_dataset=sets[1], rollout_func=rollouts)


def main():
    """Train, save, and print the accuracy on --eval-data: one unaided sample of each problem."""
    parser = argparse.ArgumentParser(epilog="all other flags are GRPOConfig's", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="rows with question, trace and answer")
    parser.add_argument("--eval-data", default="", help="held-out rows")
    parser.add_argument("--method", choices=("bread", "grpo"), default="bread")
    parser.add_argument("--steps", default="100", help="optimizer steps")
    given, others = parser.parse_known_args()
    flags = ["--max_steps", given.steps, "--num_generations_eval", "1", *others]
    config = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(flags)[0]
    options = Config(given.model, given.data, given.eval_data, method=given.method, problems_per_step=1,
                     group_size=config.num_generations, max_new_tokens=config.max_completion_length)
    trainer = make_trainer(options, config)
    trainer.train()
    trainer.save_model()
    if given.eval_data:
        trainer.evaluate()  # what it returns lacks TRL's own metrics
        PartialState().print(f"held-out accuracy: {trainer.state.log_history[-1]['eval_reward']:.1%}")


if __name__ == "__main__":
    main()
