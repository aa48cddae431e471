"""The embedded example, made from a seed: a tiny tokenizer, a base model, expert traces, held-out problems.

    python examples/chain/make.py            # rewrites examples/chain/{model,train.jsonl,heldout.jsonl}, about 40 min

A problem is a start value and L labelled operations modulo 97; the answer is the final value. A trace names the next
operation and then the value it leads to; a writer may JUMP: name two operations and only then the value.

    question   start 26 a+5 b*3 c*7 d+1
    expert     a+5b*3=93 / c*7d+1=70 / #### 70           (always jumps: 97 x 144 two-step facts)
    base       a+5=31 / b*3c*7=12 / ...                  (prefers to jump, but its jumps are guesses)

The base model has both failures that BREAD is about. It cannot express the expert's jumps, so imitating 512 traces
teaches nothing; and its own traces almost never avoid every jump, so its groups fail and GRPO has no gradient.
What it can do is take single steps, once somebody has brought it close enough to the end for luck to be likely.
"""
import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from model import ModelConfig, Transformer  # noqa: E402

MODULUS = 97
OPERATIONS = ["+1", "+2", "+3", "+5", "+7", "+11", "*2", "*3", "*5", "*6", "*7", "*10"]
LABELS = "abcdefghijklmnopqrstuvwxyz"
STOP = "<|end|>"
CHAT_TEMPLATE = "{{ messages[0]['content'] + '\\n' }}"  # a newline at the end of the template itself would be dropped

JUMP_SHARE = 0.6      # share of the base corpus' steps that jump, each ending in a random value
STEP_SKILL = 0.99     # share of its single steps that are right


def apply(value, operation):
    """One operation on a value modulo 97: apply(26, "*7") == 85."""
    amount = int(operation[1:])
    return (value + amount if operation[0] == "+" else value * amount) % MODULUS


def make_problem(rng, length):
    """(start value, list of operations)."""
    return rng.randrange(MODULUS), [rng.choice(OPERATIONS) for _ in range(length)]


def question(start, operations):
    return f"start {start} " + " ".join(f"{LABELS[i]}{op}" for i, op in enumerate(operations))


def trace_lines(start, operations, jump_share, guess=None, skill=1.0):
    """Lines of a trace as (text up to the value, value, was it guessed?).

    `guess` is a random generator for jumps, their values and slips (the base's corpus), or None (exact, the expert).
    """
    lines, value, i = [], start, 0
    while i < len(operations):
        span = 2 if i + 1 < len(operations) and (guess is None or guess.random() < jump_share) else 1
        for operation in operations[i:i + span]:
            value = apply(value, operation)
        is_guess = guess is not None and span == 2
        if is_guess or (guess and guess.random() > skill):
            value = guess.randrange(MODULUS)
        lines.append(("".join(f"{LABELS[j]}{operations[j]}" for j in range(i, i + span)) + "=", value, is_guess))
        i += span
    return lines


def write_trace(lines):
    return "".join(f"{named}{value}\n" for named, value, _ in lines) + f"#### {lines[-1][1]}"


def make_tokenizer():
    """A byte-level BPE whose merges make every value ("93"), operation ("*10") and word of the task one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[+*]\d+|\d+|[a-z]+|#+|\s"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=1, special_tokens=[STOP], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words = [str(value) for value in range(MODULUS)] + OPERATIONS + ["start", "####"]
    tokenizer.train_from_iterator(words * 2, trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    stop = tokenizer.token_to_id(STOP)
    for name, content in {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP, "pad_token": STOP,
                                  "chat_template": CHAT_TEMPLATE},
        "generation_config.json": {"eos_token_id": stop, "pad_token_id": stop},
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def corpus_batch(rng, tokenizer, rows, max_length, jump_share):
    """Token ids padded on the right, and what to learn of each: 1 a trace's token (the stop token included), 2 a
    guessed value, 0 nothing. Both (rows, T)."""
    stop, examples = tokenizer.token_to_id(STOP), []
    length = rng.randint(1, max_length)
    for _ in range(rows):
        start, operations = make_problem(rng, length)
        ids = tokenizer.encode(question(start, operations) + "\n").ids
        kinds, lines = [0] * len(ids), trace_lines(start, operations, jump_share, rng, STEP_SKILL)
        for named, value, is_guess in lines:  # no token spans two lines, so lines may be encoded one by one
            line = tokenizer.encode(f"{named}{value}\n").ids
            kinds += [1] * (len(line) - 2) + [1 + is_guess, 1]
            ids += line
        end = tokenizer.encode(f"#### {lines[-1][1]}").ids + [stop]
        examples.append((ids + end, kinds + [1] * len(end)))
    width = max(len(ids) for ids, _ in examples)
    return (torch.tensor([ids + [stop] * (width - len(ids)) for ids, _ in examples]),
            torch.tensor([kinds + [0] * (width - len(kinds)) for _, kinds in examples]))


def pretrain(model, tokenizer, rng, steps, max_length, rows=128, peak=2e-3, plain_share=0.35):
    """Teach the base its single steps, then its bad habit: for the first `plain_share` of the run nothing jumps.

    The target of a guess is the uniform distribution over the 97 values rather than a draw from it: the same gradient
    on average without its noise, which would otherwise drown what there is to learn.
    """
    values = torch.tensor([tokenizer.token_to_id(str(value)) for value in range(MODULUS)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.time()
    for step in range(steps):
        share = JUMP_SHARE if step >= plain_share * steps else 0.0
        lr = peak * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens_BT, kinds_BT = corpus_batch(rng, tokenizer, rows, max_length, share)
        wanted_BT, kinds_N = kinds_BT[:, 1:] > 0, kinds_BT[:, 1:][kinds_BT[:, 1:] > 0]
        logprobs_NV = model.logits(model(tokens_BT[:, :-1])[wanted_BT]).log_softmax(-1)
        right_N = logprobs_NV.gather(1, tokens_BT[:, 1:][wanted_BT].unsqueeze(1)).squeeze(1)
        loss = -torch.where(kinds_N == 2, logprobs_NV[:, values].mean(1), right_N).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            named = -right_N[kinds_N == 1].mean().item()
            print(f"pretrain {step}/{steps} loss {loss.item():.3f} without guesses {named:.3f} "
                  f"{time.time() - began:.0f} s", flush=True)


@torch.no_grad()
def single_step_skill(model, tokenizer, rng, length, count=256):
    """Share of right values when every earlier step is given right: the skill that BREAD can build on."""
    right = total = 0
    equals = tokenizer.token_to_id("=")
    for _ in range(count // 64):
        rows = []
        for _ in range(64):
            start, operations = make_problem(rng, length)
            lines = trace_lines(start, operations, 0.0, random.Random(0))
            rows.append(tokenizer.encode(question(start, operations) + "\n" + write_trace(lines)).ids)
        tokens_BT = torch.tensor(rows)
        at_equals = tokens_BT[:, :-1] == equals
        guess = model.logits(model(tokens_BT[:, :-1])[at_equals]).argmax(-1)
        right += (guess == tokens_BT[:, 1:][at_equals]).sum().item()
        total += guess.numel()
    return right / total


def write_problems(path, rng, count, length):
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            start, operations = make_problem(rng, length)
            trace = write_trace(trace_lines(start, operations, 1.0))
            row = {"id": f"{path.stem}-{i}", "question": question(start, operations), "trace": trace,
                   "answer": trace.rsplit(" ", 1)[1]}
            file.write(json.dumps(row) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=12, help="operations per problem of the data that is written")
    parser.add_argument("--max-length", type=int, default=12, help="longest problem of the base model's corpus")
    parser.add_argument("--steps", type=int, default=3600, help="batches of 128 problems; 0 writes the data only")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    write_problems(args.output / "train.jsonl", rng, 512, args.length)
    write_problems(args.output / "heldout.jsonl", rng, 200, args.length)
    if args.steps == 0:
        return
    tokenizer = make_tokenizer()
    config = ModelConfig(model_type="llama", vocab_size=tokenizer.get_vocab_size(), hidden_size=96,
                         intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                         head_dim=24, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True)
    stop = tokenizer.token_to_id(STOP)
    model = Transformer(config, {"eos_token_id": stop, "bos_token_id": None}).initialize(args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {config.vocab_size}")
    pretrain(model, tokenizer, rng, args.steps, args.max_length)
    print(f"single steps right: {single_step_skill(model, tokenizer, rng, args.length):.3f}")
    save_tokenizer(tokenizer, args.output / "model")
    model.save_pretrained(args.output / "model")


if __name__ == "__main__":
    main()
