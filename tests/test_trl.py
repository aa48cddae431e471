"""Claims about examples/trl_bread.py: TRL trains on anchored groups, and no rank waits for ever.

Slow; skipped without TRL. On the CPU, with the embedded example's checkpoint and generation by transformers.
"""
import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from config import Config
from conftest import CHAIN, ROOT, read_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
EXAMPLE = ROOT / "examples" / "trl_bread.py"
SMALL = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 32,
         "num_generations": 8, "max_completion_length": 72, "learning_rate": 1e-3, "max_steps": 2,
         "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


@pytest.fixture(scope="module")
def example():
    """The example as a module, under the version of TRL that its header names."""
    trl = pytest.importorskip("trl")
    assert f"trl=={trl.__version__}," in EXAMPLE.read_text(encoding="utf-8")
    sys.path.insert(0, str(EXAMPLE.parent))
    import trl_bread
    return trl_bread


def recorded_trainer(example, folder):
    """(trainer on the example's problems, what its rollout_func has returned so far)."""
    options = Config(f"{CHAIN / 'model'}", f"{CHAIN / 'train.jsonl'}", problems_per_step=1, max_new_tokens=72)
    trainer = example.make_trainer(options, example.GRPOConfig(output_dir=str(folder), **SMALL))
    rollouts = trainer.rollout_func
    outputs = []

    def note(prompts, trainer):
        outputs.append({"prompt": prompts, **rollouts(prompts, trainer)})
        return outputs[-1]
    trainer.rollout_func = note
    return trainer, outputs


def start(arguments):
    """A Python process, started and ended well."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_steps_train_on_groups_behind_anchors(example, tmp_path):
    """Alone the model fails these problems. A group shares an anchor, the beginning of its trace, and is
    mixed behind it; TRL's rewards are those of anchor + completion."""
    trainer, outputs = recorded_trainer(example, tmp_path)
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    trainer.train()
    traces = {row["question"] + "\n": row["trace"] for row in read_lines(CHAIN / "train.jsonl")}
    logged = [row for row in trainer.state.log_history if "reward" in row]
    num_anchored = 0
    for output, row in zip(outputs, logged, strict=True):
        answers = [traces[prompt].rsplit("#### ")[1] for prompt in output["prompt"]]
        texts = trainer.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True)
        contexts = trainer.processing_class.batch_decode(output["prompt_ids"])
        rewards = [float((anchor + text).endswith(f"#### {answer}"))
                   for anchor, text, answer in zip(output["anchor"], texts, answers, strict=True)]
        assert row["reward"] == pytest.approx(sum(rewards) / len(rewards))
        for first in range(0, 32, 8):
            prompt = output["prompt"][first]
            anchor = output["anchor"][first]
            assert traces[prompt].startswith(anchor) and "#" not in anchor
            assert contexts[first:first + 8] == [prompt + anchor] * 8
            assert not anchor or 0 < sum(rewards[first:first + 8]) < 8
            num_anchored += bool(anchor)
        assert row["anchored"] == sum(map(bool, output["anchor"])) / 8 <= row["searched"]
    assert num_anchored >= 4, "of 8 groups"
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters()))


def test_what_is_paid_and_what_is_no_anchor(example, tmp_path):
    """Paid is the answer that anchor and completion give together, unless the limit may have cut it off. No
    anchor is what is paid by itself or leaves no room; half of a group's prompts are refused."""
    trainer, _ = recorded_trainer(example, tmp_path)
    rollouts = trainer.reward_funcs[0].__self__
    prompt, problem = next(iter(rollouts.problems.items()))
    whole = len(problem.expert_ids)
    for most, cuts in ((72, problem.cuts), (problem.cuts[1] + 1, problem.cuts[:2])):
        rollouts.config = dataclasses.replace(rollouts.config, max_new_tokens=most)
        assert rollouts.cuts(dataclasses.replace(problem, cuts=problem.cuts + [whole])) == cuts != []
    ids = rollouts.tokenizer.encode("15")
    whole_ids = ids + [rollouts.tokenizer.eos_id]
    rewards = rollouts.reward([whole_ids, whole_ids, ids], ["#### ", "", "#### "], ["15"] * 3, print)
    assert rewards == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="must be a multiple of num_generations"):
        rollouts([prompt] * 7 + ["another"] * 8, trainer)


def test_neither_question_nor_anchor_carries_loss(example, tmp_path):
    """The last hidden state at a position acts on the log-probs of the next token alone. Its gradient is 0
    where that token is of the question or the anchor, and not 0 where the policy sampled it."""
    trainer, outputs = recorded_trainer(example, tmp_path)
    hidden = []

    def keep(module, given, hidden_BTD):
        if hidden_BTD.requires_grad:  # of the update, not of sampling
            hidden_BTD.retain_grad()
            hidden.append(hidden_BTD)
    trainer.model.model.norm.register_forward_hook(keep)
    trainer.train()
    gradient_BT = hidden[-1].grad.abs().sum(2)
    inputs = trainer._buffered_inputs[0]
    width = inputs["prompt_ids"].shape[1]
    assert gradient_BT.shape[1] >= width + inputs["completion_ids"].shape[1] - 1
    assert gradient_BT[:, :width - 1].eq(0).all()
    anchored = []
    for ids, anchor in zip(outputs[-1]["prompt_ids"], outputs[-1]["anchor"]):
        assert trainer.processing_class.decode(ids).endswith("\n" + anchor)
        anchored += [ids] if anchor else []
    num_anchored = 0
    for row in range(32):
        is_prompt = inputs["prompt_mask"][row].bool()
        length = int(inputs["completion_mask"][row].sum())
        if inputs["prompt_ids"][row][is_prompt].tolist() in anchored:
            num_anchored += 1
            assert gradient_BT[row, width - 1:width - 1 + length].gt(0).all()
    assert num_anchored == len(anchored) >= 8


def test_the_program_trains_saves_and_evaluates_unaided(example, tmp_path):
    """--method grpo samples every question once and no more; accuracy on held-out problems is printed."""
    flags = [f"--{name}={str(value).lower()}" for name, value in SMALL.items() if name != "max_steps"]
    flags += ["--model", CHAIN / "model", "--data", CHAIN / "train.jsonl", "--output_dir", tmp_path]
    flags += ["--eval-data", CHAIN / "heldout.jsonl", "--per_device_eval_batch_size", "50"]
    done = start([EXAMPLE, *flags, "--method", "grpo", "--steps", "1"])
    assert re.search(r"held-out accuracy: [0-9.]+%", done.stdout)
    assert (tmp_path / "model.safetensors").exists()
    assert "'searched': '0'" in done.stdout


# Generating is made like a vLLM server: all have to send equally many prompts, and log-probs come back, here
# the negative ids. Who waits for another for a minute fails (ddp_timeout).
WORKER = """
    import json
    import sys
    import torch
    sys.path[:0] = sys.argv[1:3]
    import trl_bread
    from accelerate.utils import gather_object
    from config import Config

    data, out = sys.argv[3:]
    options = Config(f"{sys.argv[2]}/examples/chain/model", data, problems_per_step=1, max_new_tokens=72)
    trainer = trl_bread.make_trainer(options, trl_bread.GRPOConfig(
        output_dir=out, use_cpu=True, bf16=False, gradient_checkpointing=False, max_completion_length=72,
        per_device_train_batch_size=16, num_generations=8, max_steps=2, shuffle_dataset=False,
        ddp_timeout=60, save_strategy="no", report_to="none", disable_tqdm=True))
    generate = trainer._generate_single_turn
    rollouts = trainer.rollout_func
    calls = []

    def serve(prompts, *others):
        calls.append(len(prompts))
        assert len(set(gather_object([len(prompts)]))) == 1, "the server's reply would be cut wrongly"
        ids = generate(prompts, *others)[0]
        return ids, [[-float(id) for id in row] for row in ids]

    def check(prompts, trainer):
        output = rollouts(prompts, trainer)
        for ids, logprobs in zip(output["completion_ids"], output["logprobs"], strict=True):
            assert logprobs == [-float(id) for id in ids]
        return output
    trainer._generate_single_turn = serve
    trainer.rollout_func = check
    trainer.train()
    total = sum(weight.double().sum().item() for weight in trainer.model.parameters())
    told = gather_object([[rollouts.counts, calls, total]])
    if trainer.accelerator.is_main_process:
        print("TOLD", json.dumps(told))
    torch.distributed.destroy_process_group()
"""


def test_a_rank_without_searches_does_not_hold_up_one_that_searches(example, tmp_path):
    """Two processes over gloo: the first one's problems, of two moves, are solved at once, those of the other
    fail. Both generate equally often and equally much, end with the same weights, and log-probs stay with
    their tokens."""
    rows = read_lines(CHAIN / "train.jsonl")
    for row in (rows[6], rows[18]):  # the model solves these in 11 of 16 tries
        line = row["trace"].split("\n")[0]
        answer = line.rsplit("= ")[1]
        row |= {"answer": answer, "trace": f"{line}\n#### {answer}"}
        row["question"] = " ".join(row["question"].split()[:6])
    chosen = [rows[6], rows[18], rows[0], rows[1]]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "worker.py"]
    done = start([*launch, EXAMPLE.parent, ROOT, tmp_path / "data.jsonl", tmp_path / "out"])
    told = json.loads(done.stdout.split("TOLD ")[1].split("\n")[0])
    (idle, idle_calls, idle_sum), (busy, busy_calls, busy_sum) = told
    assert idle["searched"] == 0 and busy["searched"] == 2 and busy["anchored"] >= 1
    assert idle_calls == busy_calls and len(busy_calls) >= 2 * (1 + 2), "2 steps, at least 2 rounds each"
    assert idle_sum == busy_sum
