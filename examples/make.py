"""The two examples, each made from a seed: a tiny tokenizer, a base model, expert traces, held-out problems.

    python examples/make.py chain       # rewrites examples/chain/{model,train.jsonl,heldout.jsonl}; 20 min on one core
    python examples/make.py walk        # rewrites examples/walk/ likewise; 15 min

A problem takes L steps. A trace writes one line a step; a writer may JUMP: take two steps and write one value.

    chain    L operations modulo 97; a line names them. What one does is in the weights, and two are 97 x 144 facts.
             question   start 26 a +5 b x3 c x7 d +1
             expert     a +5 b x3 = 93 / c x7 d +1 = 70 / #### 70       (always jumps)
             base       a +5 = 31 / b x3 c x7 = 12 / ...                (prefers to jump, but its jumps are guesses)
    walk     L hops through a graph; a line names their number. Where one leads stands in the question, and looking
             up twice takes more layers than the two that once takes.
             question   4 hops 41 >7 26 >41 12 >26 7 >93 93 >12 from 26
             expert     2 = 7 / 4 = 12 / #### 12
             base       1 = 41 / 3 = 55 / ...

Both base models have both failures that BREAD is about. They cannot express the expert's jumps, so imitating 512
traces teaches nothing; and their own traces almost never avoid every jump, so groups fail and GRPO has no gradient.
What they can do is take single steps, once somebody has brought them close enough to the end for luck to be likely.
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

VALUES = 97           # a value is a number from 0 to 96, so a lucky answer is right about 1% of the time
STOP = "<|end|>"
CHAT_TEMPLATE = "{{ messages[0]['content'] + '\\n' }}"  # a newline at the end of the template itself would be dropped

JUMP_SHARE = 0.6      # how often the base jumps wherever it can; every jump ends in a random value
HABITS = (0.0, 0.0, 0.3, 0.6, 1.0)   # share of jumps in what it has written so far, one per problem of its corpus
STEP_SKILL = 0.99     # share of its single steps that are right, until the last tenth of the corpus, which has no slips
NOT_LEARNED, ANY_VALUE = -1, -2      # in place of a token id, see corpus_batch


class Chain:
    """A start value and labelled operations modulo 97."""
    OPERATIONS = ["+1", "+2", "+3", "+5", "+7", "+11", "x2", "x3", "x5", "x6", "x7", "x10"]
    LABELS = "abcdefghijklmnopqrstuvwxyz"
    WORDS = [f" {word}" for word in (*range(VALUES), *OPERATIONS, *LABELS, "=")] + ["start", "####"]
    LAYERS, HEADS, STEPS = 3, 4, 2800

    def __init__(self, rng, length):
        self.length, self.start = length, rng.randrange(VALUES)
        self.operations = [rng.choice(self.OPERATIONS) for _ in range(length)]

    def question(self):
        return f"start {self.start} {self.named(0, self.length)}"

    def named(self, i, span):
        """What the line of steps i .. i + span - 1 holds before " = ": named(0, 2) == "a +5 b x3"."""
        return " ".join(f"{self.LABELS[j]} {self.operations[j]}" for j in range(i, i + span))

    def choice(self, i):
        """Where in the tokens of the line that begins with step i it is decided to jump; what is written if not; if so."""
        return 2, " =", f" {self.LABELS[i + 1]}"

    def apply(self, i, value):
        """The value after step i: 26 and "x7" give 85."""
        amount = int(self.operations[i][1:])
        return (value + amount if self.operations[i][0] == "+" else value * amount) % VALUES

    def guess(self, rng):
        return rng.randrange(VALUES)


class Walk:
    """A ring of 24 nodes, its edges in random order, and a start: no walk meets a node twice, all nodes look alike."""
    NODES = 24
    WORDS = [f" {mark}{value}" for mark in ("", ">") for value in range(VALUES)] + [
        *map(str, range(1, NODES)), " hops", " from", " =", "####"]
    LAYERS, HEADS, STEPS = 2, 4, 2800

    def __init__(self, rng, length):
        ring = rng.sample(range(VALUES), self.NODES)
        self.length, self.start, self.next = length, ring[0], dict(zip(ring, ring[1:] + ring[:1]))
        self.edges = rng.sample(list(self.next.items()), self.NODES)

    def question(self):
        edges = " ".join(f"{source} >{target}" for source, target in self.edges)
        return f"{self.length} hops {edges} from {self.start}"  # so the start precedes line 1 as a value would

    def named(self, i, span):
        return str(i + span)

    def choice(self, i):
        return 0, str(i + 1), str(i + 2)

    def apply(self, i, value):
        return self.next[value]

    def guess(self, rng):
        """A node of this graph, so that the walk can go on. What the base learns to write is any value, though."""
        return self.edges[rng.randrange(self.NODES)][0]


def trace_lines(problem, jumps, rng=None, skill=1.0):
    """Lines of a trace as (first step, text before the value, value, was it guessed?).

    jumps(i) decides whether to jump over step i + 1, where there is one. With `rng` jumps end in guesses and single
    steps are right with probability `skill` (the base's corpus); without, all values are right (the expert).
    """
    lines, value, i = [], problem.start, 0
    while i < problem.length:
        span = 2 if i + 1 < problem.length and jumps(i) else 1
        for j in range(i, i + span):
            value = problem.apply(j, value)
        is_guess = rng is not None and span == 2
        if is_guess or (rng and rng.random() > skill):
            value = problem.guess(rng)
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
    one for a single step and one for a jump. They differ where that is decided; are the token itself elsewhere in a
    trace, its stop token included; NOT_LEARNED twice in question and padding; ANY_VALUE twice at a guess."""
    stop, examples = tokenizer.token_to_id(STOP), []
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
                place, *words = problem.choice(i)
                want[place] = tuple(word_id(tokenizer, word) for word in words)
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
    values = torch.tensor([word_id(tokenizer, f" {value}") for value in range(VALUES)])
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


def make_base(task, rng, args):
    """Tokenizer and base model, pretrained from scratch."""
    tokenizer = make_tokenizer(task.WORDS)
    config = ModelConfig(model_type="llama", vocab_size=tokenizer.get_vocab_size(), hidden_size=96,
                         intermediate_size=256, num_hidden_layers=task.LAYERS, num_attention_heads=task.HEADS,
                         num_key_value_heads=task.HEADS // 2, head_dim=24, max_position_embeddings=256,
                         rms_norm_eps=1e-5, tie_word_embeddings=True)
    stop = tokenizer.token_to_id(STOP)
    model = Transformer(config, {"eos_token_id": stop, "bos_token_id": None}).initialize(args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {config.vocab_size}")
    pretrain(model, tokenizer, task, rng, args.steps, args.max_length, 2e-3, STEP_SKILL)
    # Slips of 1% cap twelve steps at 0.99^12 = 89% even if nothing jumps, so the base is polished without them.
    polish = random.Random(f"{args.seed} polish")
    pretrain(model, tokenizer, task, polish, args.steps // 10, args.max_length, 5e-4, 1.0)
    for jumped in (0, args.length // 2 // 2 * 2):
        skill = single_step_skill(model, tokenizer, task, rng, args.length, jumped)
        print(f"single steps right after {jumped // 2} jumps: {skill:.3f}")
    return tokenizer, model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    tasks = {"chain": Chain, "walk": Walk}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=12, help="steps per problem of the data that is written")
    parser.add_argument("--max-length", type=int, default=16, help="longest problem of the base model's corpus")
    parser.add_argument("--steps", type=int, help="batches of 128 problems (default: by task); 0 writes the data only")
    parser.add_argument("--output", type=Path, help="default: examples/TASK")
    args = parser.parse_args()
    task, folder = tasks[args.task], args.output or HERE / args.task
    args.steps = task.STEPS if args.steps is None else args.steps
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    write_problems(folder / "train.jsonl", task, rng, 512, args.length)
    write_problems(folder / "heldout.jsonl", task, rng, 200, args.length)
    if args.steps:
        tokenizer, model = make_base(task, rng, args)
        save_tokenizer(tokenizer, folder / "model")
        model.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
