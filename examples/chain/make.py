"""The embedded example, made from a seed: a tiny tokenizer, a base model, expert traces, held-out problems.

    python examples/chain/make.py       # rewrites examples/chain/{model,train.jsonl,heldout.jsonl}; 17 min on one core

A problem is a start value and L labelled operations modulo 97; the answer is the final value. A trace names the next
operation and then the value it leads to; a writer may JUMP: name two operations and only then the value.

    question   start 26 a +5 b x3 c x7 d +1
    expert     a +5 b x3 = 93 / c x7 d +1 = 70 / #### 70       (always jumps: 97 x 144 two-step facts)
    base       a +5 = 31 / b x3 c x7 = 12 / ...                (prefers to jump, but its jumps are guesses)

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
OPERATIONS = ["+1", "+2", "+3", "+5", "+7", "+11", "x2", "x3", "x5", "x6", "x7", "x10"]
LABELS = "abcdefghijklmnopqrstuvwxyz"
STOP = "<|end|>"
CHAT_TEMPLATE = "{{ messages[0]['content'] + '\\n' }}"  # a newline at the end of the template itself would be dropped

JUMP_SHARE = 0.6      # how often the base jumps wherever it can; every jump ends in a random value
HABITS = (0.0, 0.0, 0.3, 0.6, 1.0)   # share of jumps in what it has written so far, one per problem of its corpus
STEP_SKILL = 0.99     # share of its single steps that are right, until the last tenth of the corpus, which has no slips


def apply(value, operation):
    """One operation on a value modulo 97: apply(26, "x7") == 85."""
    amount = int(operation[1:])
    return (value + amount if operation[0] == "+" else value * amount) % MODULUS


def make_problem(rng, length):
    """(start value, list of operations)."""
    return rng.randrange(MODULUS), [rng.choice(OPERATIONS) for _ in range(length)]


def question(start, operations):
    return f"start {start} " + " ".join(f"{LABELS[i]} {op}" for i, op in enumerate(operations))


def trace_lines(start, operations, jump_share, guess=None, skill=1.0):
    """Lines of a trace as (what is named, value, was it guessed?, could it have jumped?).

    `guess` is a random generator for jumps, their values and slips (the base's corpus), or None (exact, the expert).
    """
    lines, value, i = [], start, 0
    while i < len(operations):
        can_jump = i + 1 < len(operations)
        span = 2 if can_jump and (guess is None or guess.random() < jump_share) else 1
        for operation in operations[i:i + span]:
            value = apply(value, operation)
        is_guess = guess is not None and span == 2
        if is_guess or (guess and guess.random() > skill):
            value = guess.randrange(MODULUS)
        named = " ".join(f"{LABELS[j]} {operations[j]}" for j in range(i, i + span))
        lines.append((named, value, is_guess, can_jump))
        i += span
    return lines


def write_trace(lines):
    return "".join(f"{named} = {value}\n" for named, value, *_ in lines) + f"#### {lines[-1][1]}"


def make_tokenizer():
    """A byte-level BPE whose merges make every word of the task (" 93", " x10", "####") one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=1, special_tokens=[STOP], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words = [f" {word}" for word in (*range(MODULUS), *OPERATIONS, *LABELS, "=")] + ["start", "####"]
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


def corpus_batch(rng, tokenizer, rows, max_length, skill):
    """Token ids padded on the right and what to learn of each, both (rows, T): 0 nothing, 1 the token itself (a
    trace's, the stop token included), 2 any value (a guess), or the token id of a label (to jump there, or not)."""
    stop, examples = tokenizer.token_to_id(STOP), []
    length = rng.randint(1, max_length)
    for _ in range(rows):
        start, operations = make_problem(rng, length)
        ids = tokenizer.encode(question(start, operations) + "\n").ids
        kinds = [0] * len(ids)
        for named, value, is_guess, can_jump in trace_lines(start, operations, rng.choice(HABITS), rng, skill):
            line = tokenizer.encode(f"{named} = {value}\n").ids  # no token spans two lines
            kind = [1] * (len(line) - 2) + [1 + is_guess, 1]
            if can_jump:
                kind[2] = tokenizer.token_to_id(f"Ġ{LABELS[LABELS.index(named[0]) + 1]}")
            ids, kinds = ids + line, kinds + kind
        end = tokenizer.encode(f"#### {value}").ids + [stop]
        examples.append((ids + end, kinds + [1] * len(end)))
    width = max(len(ids) for ids, _ in examples)
    return (torch.tensor([ids + [stop] * (width - len(ids)) for ids, _ in examples]),
            torch.tensor([kinds + [0] * (width - len(kinds)) for _, kinds in examples]))


def corpus_loss(logprobs_NV, targets_N, kinds_N, values, equals):
    """Cross-entropy, (N,) each. Where the corpus is random its distribution is the target, not a draw from it: a guess
    is uniform over the values, a jump has probability JUMP_SHARE. Same gradient on average, without the noise that
    would drown the rest; and what was written before may be of any habit without teaching that habit."""
    loss_N = -logprobs_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    guess_N = -logprobs_NV[:, values].mean(1)
    jump_N = -logprobs_NV.gather(1, kinds_N.unsqueeze(1)).squeeze(1)
    choice_N = JUMP_SHARE * jump_N - (1 - JUMP_SHARE) * logprobs_NV[:, equals]
    return torch.where(kinds_N == 1, loss_N, torch.where(kinds_N == 2, guess_N, choice_N))


def pretrain(model, tokenizer, rng, steps, max_length, peak, skill, rows=128):
    """Teach the base single steps in every context, and to prefer jumps in every context: AdamW, cosine decay."""
    values = torch.tensor([tokenizer.token_to_id(f"Ġ{value}") for value in range(MODULUS)])
    equals = tokenizer.token_to_id("Ġ=")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.time()
    for step in range(steps):
        lr = peak * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens_BT, kinds_BT = corpus_batch(rng, tokenizer, rows, max_length, skill)
        wanted_BT = kinds_BT[:, 1:] > 0
        kinds_N, targets_N = kinds_BT[:, 1:][wanted_BT], tokens_BT[:, 1:][wanted_BT]
        logprobs_NV = model.logits(model(tokens_BT[:, :-1])[wanted_BT]).log_softmax(-1)
        loss_N = corpus_loss(logprobs_NV, targets_N, kinds_N, values, equals)
        optimizer.zero_grad(set_to_none=True)
        loss_N.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"pretrain {step}/{steps} loss {loss_N.mean().item():.3f}, "
                  f"of what is not random {loss_N[kinds_N == 1].mean().item():.3f}, {time.time() - began:.0f} s",
                  flush=True)


@torch.no_grad()
def single_step_skill(model, tokenizer, rng, length, count=256):
    """Share of right values when every earlier step is given right: the skill that BREAD can build on."""
    right = total = 0
    equals = tokenizer.token_to_id("Ġ=")
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
    parser.add_argument("--steps", type=int, default=2800, help="batches of 128 problems; 0 writes the data only")
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
    pretrain(model, tokenizer, rng, args.steps, args.max_length, 2e-3, STEP_SKILL)
    # Slips of 1% cap twelve steps at 0.99^12 = 89% even if nothing jumps, so the base is polished without them.
    pretrain(model, tokenizer, random.Random(f"{args.seed} polish"), args.steps // 10, args.max_length, 5e-4, 1.0)
    print(f"single steps right: {single_step_skill(model, tokenizer, rng, args.length):.3f}")
    save_tokenizer(tokenizer, args.output / "model")
    model.save_pretrained(args.output / "model")


if __name__ == "__main__":
    main()
