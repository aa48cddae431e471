"""The two examples, each made from a seed: a tiny tokenizer, a base model, expert traces, held-out problems.

    python examples/make.py chain       # rewrites examples/chain/{model,train.jsonl,heldout.jsonl}; 30 min on one core
    python examples/make.py division    # rewrites examples/division/ likewise, from the chain's base; 7 min

A problem is a start value and L labelled moves; the answer is the value after the last. A trace names the next move and
then the value it leads to; a writer may JUMP: name two moves and only then the value.

    chain       arithmetic modulo 97: six additions, six products.
                question   start 26 a +5 b x3 c x7 d +1
                expert     a +5 b x3 = 93 / c x7 d +1 = 70 / #### 70     (always jumps: 97 x 144 facts)
                base       a +5 = 31 / b x3 c x7 = 12 / ...              (prefers to jump, but its jumps are guesses)
    division    long division of a number by 97 (as in the check of an IBAN), digit by digit: the remainder so far.
                question   number 26 a 5 b 3 c 0 d 8
                expert     a 5 b 3 = 34 / c 0 d 8 = 13 / #### 13         (brings down two digits: 97 x 100 facts)
                base       a 5 = 71 / b 3 c 0 = 44 / ...

Both base models have both failures that BREAD is about. They cannot express the expert's jumps, so imitating 512 traces
teaches nothing; and their own traces almost never avoid every jump, so groups fail and GRPO has no gradient. What they
can do is take single steps, once somebody has brought them close enough to the end for luck to be likely.
"""
import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from model import ModelConfig, Transformer  # noqa: E402

STOP = "<|end|>"
CHAT_TEMPLATE = "{{ messages[0]['content'] + '\\n' }}"  # a newline at the end of the template itself would be dropped

JUMP_SHARE = 0.6      # how often the base jumps wherever it can; every jump ends in a random value
HABITS = (0.0, 0.0, 0.3, 0.6, 1.0)   # share of jumps in what it has written so far, one per problem of its corpus
STEP_SKILL = 0.99     # share of its single steps that are right, until the last tenth of the corpus, which has no slips
NOT_LEARNED, ANY_VALUE = -1, -2      # in place of a token id, see corpus_batch


class Problem:
    """A start value and labelled moves. Tasks say what the VALUES and MOVES are and what one does to the other."""
    LABELS = "abcdefghijklmnopqrstuvwxyz"

    def __init__(self, rng, length):
        self.start, self.moves = rng.choice(self.VALUES), [rng.choice(self.MOVES) for _ in range(length)]

    @classmethod
    def words(cls):
        """Everything that is to be one token."""
        return [f" {word}" for word in (*cls.VALUES, *cls.MOVES, *cls.LABELS, "=")] + [cls.OPENING, "####"]

    def question(self):
        return f"{self.OPENING} {self.start} {self.named(0, len(self.moves))}"

    def named(self, i, span):
        """What the line of moves i .. i + span - 1 holds before " = ": named(0, 2) == "a +5 b x3"."""
        return " ".join(f"{self.LABELS[j]} {self.moves[j]}" for j in range(i, i + span))


class Chain(Problem):
    """Arithmetic modulo 97. The base's corpus holds up to 12 operations first, then up to 16: see docs/TRIED.md."""
    OPENING, VALUES = "start", range(97)
    MOVES = ["+1", "+2", "+3", "+5", "+7", "+11", "x2", "x3", "x5", "x6", "x7", "x10"]
    STARTS_FROM, STAGES = None, ((12, 2800), (16, 1600))

    @staticmethod
    def apply(value, move):
        """apply(26, "x7") == 85."""
        amount = int(move[1:])
        return (value + amount if move[0] == "+" else value * amount) % 97


class Division(Problem):
    """Long division by 97: the remainder so far, and the next digit brought down."""
    OPENING, VALUES = "number", range(97)
    MOVES = [*"0123456789"]
    STARTS_FROM, STAGES = "chain", ((12, 1000), (12, 1200))

    @staticmethod
    def apply(value, move):
        """apply(26, "5") == 71, the remainder of 265."""
        return (10 * value + int(move)) % 97


def trace_lines(problem, jumps, rng=None, skill=1.0):
    """Lines of a trace as (first move, text before the value, value, was it guessed?).

    jumps(i) decides whether to jump over move i + 1, where there is one. With `rng` jumps end in guesses and single
    steps are right with probability `skill` (the base's corpus); without, all values are right (the expert).
    """
    lines, value, i = [], problem.start, 0
    while i < len(problem.moves):
        span = 2 if i + 1 < len(problem.moves) and jumps(i) else 1
        for move in problem.moves[i:i + span]:
            value = problem.apply(value, move)
        is_guess = rng is not None and span == 2
        if is_guess or (rng and rng.random() > skill):
            value = rng.choice(problem.VALUES)
        lines.append((i, f"{problem.named(i, span)} =", value, is_guess))
        i += span
    return lines


def write_trace(lines):
    return "".join(f"{named} {value}\n" for _, named, value, _ in lines) + f"#### {lines[-1][2]}"


def make_tokenizer(words):
    """A byte-level BPE whose merges make every one of the words (" 93", " x10", "####") one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=1, special_tokens=[STOP], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
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


def word_id(tokenizer, word):
    return tokenizer.token_to_id(word.replace(" ", "Ġ"))


def corpus_batch(rng, tokenizer, task, rows, max_length, skill):
    """Token ids padded on the right, (rows, T), and what to learn of each, (rows, T, 2): the ids that may stand there,
    one for a single step and one for a jump. They differ behind a line's first move, where that is decided (an equals
    sign, or the next label); are the token itself elsewhere in a trace, its stop token included; NOT_LEARNED twice in
    question and padding; ANY_VALUE twice at a guess."""
    stop, equals, examples = tokenizer.token_to_id(STOP), word_id(tokenizer, " ="), []
    length = rng.randint(1, max_length)
    for _ in range(rows):
        problem = task(rng, length)
        ids = tokenizer.encode(problem.question() + "\n").ids
        wanted = [(NOT_LEARNED, NOT_LEARNED)] * len(ids)
        habit = rng.choice(HABITS)
        for i, named, value, is_guess in trace_lines(problem, lambda i: rng.random() < habit, rng, skill):
            line = tokenizer.encode(f"{named} {value}\n").ids  # no token spans two lines
            want = [(id, id) for id in line]
            if is_guess:
                want[-2] = ANY_VALUE, ANY_VALUE
            if i + 1 < length:
                want[2] = equals, word_id(tokenizer, f" {problem.LABELS[i + 1]}")
            ids, wanted = ids + line, wanted + want
        end = tokenizer.encode(f"#### {value}").ids + [stop]
        examples.append((ids + end, wanted + [(id, id) for id in end]))
    width = max(len(ids) for ids, _ in examples)
    return (torch.tensor([ids + [stop] * (width - len(ids)) for ids, _ in examples]),
            torch.tensor([wanted + [(NOT_LEARNED, NOT_LEARNED)] * (width - len(wanted)) for _, wanted in examples]))


def corpus_loss(logprobs_NV, wanted_N2, values):
    """Cross-entropy, (N,) each. Where the corpus is random its distribution is the target, not a draw from it: a guess
    is uniform over the values, a jump has probability JUMP_SHARE. Same gradient on average, without the noise that
    would drown the rest; and what was written before may be of any habit without teaching that habit."""
    step_N, jump_N = -logprobs_NV.gather(1, wanted_N2.clamp(min=0)).T
    guess_N = -logprobs_NV[:, values].mean(1)
    choice_N = JUMP_SHARE * jump_N + (1 - JUMP_SHARE) * step_N
    is_choice_N = wanted_N2[:, 0] != wanted_N2[:, 1]
    return torch.where(wanted_N2[:, 0] == ANY_VALUE, guess_N, torch.where(is_choice_N, choice_N, step_N))


def pretrain(model, tokenizer, task, rng, steps, max_length, peak, skill, rows=128):
    """Teach the base single steps in every context, and to prefer jumps in every context: AdamW, cosine decay."""
    values = torch.tensor([word_id(tokenizer, f" {value}") for value in task.VALUES])
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.time()
    for step in range(steps):
        lr = peak * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens_BT, wanted_BT2 = corpus_batch(rng, tokenizer, task, rows, max_length, skill)
        learned_BT = wanted_BT2[:, 1:, 0] != NOT_LEARNED
        wanted_N2 = wanted_BT2[:, 1:][learned_BT]
        logprobs_NV = model.logits(model(tokens_BT[:, :-1])[learned_BT]).log_softmax(-1)
        loss_N = corpus_loss(logprobs_NV, wanted_N2, values)
        optimizer.zero_grad(set_to_none=True)
        loss_N.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            is_certain_N = (wanted_N2[:, 0] == wanted_N2[:, 1]) & (wanted_N2[:, 0] != ANY_VALUE)
            print(f"pretrain {step}/{steps} loss {loss_N.mean().item():.3f}, "
                  f"of what is not random {loss_N[is_certain_N].mean().item():.3f}, {time.time() - began:.0f} s",
                  flush=True)


@torch.no_grad()
def single_step_skill(model, tokenizer, task, rng, length, jumped=0, count=256):
    """Share of right values of single steps when what was written before is right: the skill that BREAD can build on.

    jumped: over how many steps (an even number) that history jumps first, as an expert's anchor does.
    """
    right = total = 0
    equals = word_id(tokenizer, " =")
    for _ in range(count // 64):
        rows = []
        for _ in range(64):
            problem = task(rng, length)
            lines = trace_lines(problem, lambda i: i < jumped)
            rows.append(tokenizer.encode(problem.question() + "\n" + write_trace(lines)).ids)
        tokens_BT = torch.tensor(rows)
        at_equals = tokens_BT[:, :-1] == equals
        answers = model.logits(model(tokens_BT[:, :-1])[at_equals]).argmax(-1)
        is_right = (answers == tokens_BT[:, 1:][at_equals]).view(64, -1)[:, jumped // 2:]
        right, total = right + is_right.sum().item(), total + is_right.numel()
    return right / total


def write_problems(path, task, rng, count, length):
    """JSONL of `count` problems with an expert's trace each."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            problem = task(rng, length)
            trace = write_trace(trace_lines(problem, lambda i: True))
            row = {"id": f"{path.stem}-{i}", "question": problem.question(), "trace": trace,
                   "answer": trace.rsplit(" ", 1)[1]}
            file.write(json.dumps(row) + "\n")


def make_base(task, rng, seed):
    """Tokenizer and base model, pretrained in the task's stages."""
    tokenizer = make_tokenizer(task.words())
    config = ModelConfig(model_type="llama", vocab_size=tokenizer.get_vocab_size(), hidden_size=96,
                         intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                         head_dim=24, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True)
    stop = tokenizer.token_to_id(STOP)
    model = Transformer(config, {"eos_token_id": stop, "bos_token_id": None}).initialize(seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {config.vocab_size}")
    if task.STARTS_FROM:
        adopt(model, tokenizer, HERE / task.STARTS_FROM / "model")
    for number, (max_length, steps) in enumerate(task.STAGES):
        rng = random.Random(f"{seed} stage {number}") if number else rng
        pretrain(model, tokenizer, task, rng, steps, max_length, 2e-3, STEP_SKILL)
        # Slips of 1% cap twelve steps at 0.99^12 = 89% even if nothing jumps, so the base is polished without them.
        polish = random.Random(f"{seed} polish")
        pretrain(model, tokenizer, task, polish, steps // 10, max_length, 5e-4, 1.0)
    for length in (2, max_length // 2, max_length):
        print(f"single steps right at L = {length}: {single_step_skill(model, tokenizer, task, rng, length):.3f}")
    return tokenizer, model


@torch.no_grad()
def adopt(model, tokenizer, folder):
    """Begin with another base: all of its layers, and its embeddings of the words that both tokenizers have."""
    other, theirs = Transformer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    shared = {id: theirs[word] for word, id in tokenizer.get_vocab().items() if word in theirs}
    embeddings = model.lm_head.weight.clone()
    embeddings[list(shared)] = other.lm_head.weight[list(shared.values())]
    model.load_state_dict({name: embeddings if tensor.shape == embeddings.shape else other.state_dict()[name]
                           for name, tensor in model.state_dict().items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    tasks = {"chain": Chain, "division": Division}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=12, help="moves per problem of the data that is written")
    parser.add_argument("--data-only", action="store_true", help="write no base model")
    parser.add_argument("--output", type=Path, help="default: examples/TASK")
    args = parser.parse_args()
    task, folder, rng = tasks[args.task], args.output or HERE / args.task, random.Random(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder / "train.jsonl", task, rng, 512, args.length)
    write_problems(folder / "heldout.jsonl", task, rng, 200, args.length)
    if not args.data_only:
        tokenizer, model = make_base(task, rng, args.seed)
        save_tokenizer(tokenizer, folder / "model")
        model.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
