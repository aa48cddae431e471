"""The two examples, each made from a seed: a tiny tokenizer, a base model, expert traces, held-out problems.

    python examples/make.py chain    # rewrites examples/chain: model, data (30 min on one core)
    python examples/make.py walk     # rewrites examples/walk likewise (12 min on two cores)

A problem is a start and L labelled moves; the answer is where the last one leads. A trace names the next move
and then the value it leads to; a writer may JUMP: name two moves and only then the value.

    chain    arithmetic modulo 97: six additions, six products. What a move does has to be known.
             question   start 26 a +5 b x3 c x7 d +1
             expert     a +5 b x3 = 93 / c x7 d +1 = 70 / #### 70     (always jumps: 97 x 144 facts)
             base       a +5 = 31 / b x3 c x7 = 12 / ...              (prefers to jump, but jumps are guesses)
    walk     two walkers, each on a ring of its own. Where an edge leads is in the question, in random order.
             question   edges 31> 12 12> 26 26> 31 Q> B B> X X> Q from 12 X a b c d
             expert     a b 12> 31 X> B / c d 31> 26 B> Q #### 26 Q   (always jumps: names every other node)
             base       a 12> 26 X> Q / b c 26> 17 Q> K / ...         (prefers to jump, but jumps are guesses)

Both base models have both failures that BREAD is about. They cannot express the expert's jumps, so imitating
512 traces teaches nothing; and their own traces almost never avoid every jump, so groups fail and GRPO has no
gradient. What they can do is take single steps, once somebody has brought them close enough to the end for
luck to be likely.

Dimension key: B rows of a batch   T tokens of the longest   N learned tokens   V vocabulary
"""
import argparse
import itertools
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
CHAT_TEMPLATE = "{{ messages[0]['content'] + '\\n' }}"  # a newline that ends a template would be dropped

JUMP_SHARE = 0.6      # how often the base jumps wherever it can; every jump ends in a random value
HABITS = (0.0, 0.0, 0.3, 0.6, 1.0)   # share of jumps in what it has written so far, one per problem
STEP_SKILL = 0.99     # share of its single steps that are right, but for the corpus's last tenth: all of them
NOT_LEARNED, ANY_PART = -1, -2       # in place of a token id, see corpus_batch
LABELS = "abcdefghijklmnopqrstuvwxyz"


class Chain:
    """Arithmetic modulo 97. The base's corpus holds up to 12 operations, then 16: see docs/TRIED.md. Its
    values, unlike the walk's nodes, are the same in all problems, so a problem has no `size`."""
    VALUES = range(97)
    PARTS, PLACES = [VALUES], (-1,)      # the words of a value, and where they stand in a line
    BEFORE_ANSWER = "\n"
    MOVES = ["+1", "+2", "+3", "+5", "+7", "+11", "x2", "x3", "x5", "x6", "x7", "x10"]
    SIZES = (None,)
    LOOKUPS = 0
    STAGES = ((12, 2800), (16, 1600))    # most moves of a problem, and for how many batches

    def __init__(self, rng, length, size=None):
        self.start = rng.choice(self.VALUES)
        self.moves = [rng.choice(self.MOVES) for _ in range(length)]
        self.length = length

    @classmethod
    def words(cls):
        """Everything that is to be one token."""
        return [f" {word}" for word in (*cls.VALUES, *cls.MOVES, *LABELS, "=")] + ["start", "####"]

    def question(self):
        return f"start {self.start} {self.named(0, self.length)}"

    def named(self, i, span):
        """named(0, 2) == "a +5 b x3"."""
        return " ".join(f"{LABELS[j]} {self.moves[j]}" for j in range(i, i + span))

    def line(self, i, span, before, after):
        """The line of moves i .. i + span - 1, which lead from one value to another."""
        return f"{self.named(i, span)} = {after}"

    def next(self, value, i):
        """Where move i leads from `value`: 26 and "x7" to 85."""
        amount = int(self.moves[i][1:])
        return (value + amount if self.moves[i][0] == "+" else value * amount) % 97

    def guess(self, rng):
        """A value for the corpus to go on from."""
        return rng.choice(self.VALUES)


class Walk:
    """Two walkers, each on a ring of its own: numbers and letters. The corpus has rings of all SIZES, data
    the largest. A lookup forms late or not at all (docs/TRIED.md), so the base starts with LOOKUPS batches of
    single steps and nothing else."""
    PARTS, PLACES = [range(10, 36), "ABCDEFGHIJKLMNOPQRSTUVWXYZ"], (-3, -1)
    BEFORE_ANSWER = " "     # in the last line, which names its words, so that no anchor ends between the two
    VALUES = [f"{number} {letter}" for number, letter in itertools.product(*PARTS)]
    SIZES = (2, 4, 8, 16)
    LOOKUPS = 400
    STAGES = ((12, 1000),)

    def __init__(self, rng, length, size=SIZES[-1]):
        self.length = length
        self.edges = {}
        starts = []
        for part in self.PARTS:
            ring = [str(node) for node in rng.sample(part, size)]
            edges = list(zip(ring, ring[1:] + ring[:1]))
            self.edges |= rng.sample(edges, size)
            starts.append(ring[0])
        self.start = " ".join(starts)

    @classmethod
    def words(cls):
        """Everything that is to be one token."""
        return [f" {word}" for part in cls.PARTS for node in part for word in (node, f"{node}>")] + [
            *(f" {label}" for label in LABELS), "edges", " from", "####"]

    def question(self):
        edges = " ".join(f"{node}> {successor}" for node, successor in self.edges.items())
        return f"edges {edges} from {self.start} {' '.join(LABELS[:self.length])}"

    def line(self, i, span, before, after):
        hops = [f"{node}> {reached}" for node, reached in zip(before.split(), after.split())]
        return " ".join([*LABELS[i:i + span], *hops])

    def next(self, value, i):
        """Where the walkers come to; None if one of them is lost, at a node that its ring does not have."""
        nodes = [self.edges.get(node) for node in value.split()]
        return None if None in nodes else " ".join(nodes)

    def anywhere(self, rng):
        """A node of each ring."""
        nodes = list(self.edges)
        return f"{rng.choice(nodes[:len(nodes) // 2])} {rng.choice(nodes[len(nodes) // 2:])}"

    def guess(self, rng):
        """In the corpus half of the guesses are nodes that exist, so that not all histories end lost."""
        return self.anywhere(rng) if rng.random() < 0.5 else rng.choice(self.VALUES)


def trace_lines(problem, jumps, rng=None, skill=1.0):
    """Lines of a trace as (first move, value before, value after, text, was the value guessed?).

    jumps(i) decides whether to jump over move i + 1, where there is one. With `rng` jumps end in guesses and
    single steps are right with probability `skill` (the base's corpus); without, all are right (the expert).
    """
    lines = []
    value = problem.start
    i = 0
    while i < problem.length:
        span = 2 if i + 1 < problem.length and jumps(i) else 1
        before = value
        is_guess = rng is not None and span == 2
        if not is_guess:
            for j in range(i, i + span):
                value = problem.next(value, j)
            is_guess = value is None
        if is_guess or (rng and rng.random() > skill):
            value = problem.guess(rng)
        i += span
        end = "\n" if i < problem.length else problem.BEFORE_ANSWER
        lines.append((i - span, before, value, problem.line(i - span, span, before, value) + end, is_guess))
    return lines


def write_trace(lines):
    return "".join(text for *_, text, _ in lines) + f"#### {lines[-1][2]}"


def make_tokenizer(words):
    """A byte-level BPE whose merges make every one of the words (" 93", " x10", "####") one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=1, special_tokens=[STOP],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(words * 2, trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    stop = tokenizer.token_to_id(STOP)
    files = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP,
                                       "pad_token": STOP, "chat_template": CHAT_TEMPLATE},
             "generation_config.json": {"eos_token_id": stop, "pad_token_id": stop}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def word_ids(tokenizer, words):
    """The token ids of words with a blank before them."""
    return [tokenizer.token_to_id(f"Ġ{word}") for word in words]


def lookup_batch(rng, tokenizer, task, rows, count=32):
    """As corpus_batch, but the lines are steps from anywhere, without labels; only their ends are learned."""
    tokens = []
    wanted = []
    size = rng.choice(task.SIZES)
    for _ in range(rows):
        problem = task(rng, 1, size)
        places = [problem.anywhere(rng) for _ in range(count)]
        ids = tokenizer.encode(problem.question() + "\n").ids
        want = [NOT_LEARNED] * len(ids)
        for place in places:
            line = tokenizer.encode(f" {problem.line(0, 0, place, problem.next(place, 0))}\n").ids
            ids += line
            # PLACES count from the end of a line without its newline.
            want += [id if k - len(line) + 1 in task.PLACES else NOT_LEARNED for k, id in enumerate(line)]
        tokens.append(ids)
        wanted.append(want)
    return torch.tensor(tokens), torch.tensor(wanted)[..., None].expand(-1, -1, 2)


def corpus_batch(rng, tokenizer, task, rows, max_length, skill):
    """Token ids padded on the right, (rows, T), and what to learn of each, (rows, T, 2).

    The two numbers are the ids that may stand there, one for a single step and one for a jump. They differ
    where a line turns into the one or the other; are the token itself elsewhere in a trace, its stop token
    included; NOT_LEARNED twice in question and padding; ANY_PART - k twice at token k of a guess.
    """
    stop = tokenizer.token_to_id(STOP)
    length = rng.randint(1, max_length)
    size = rng.choice(task.SIZES)
    examples = []
    for _ in range(rows):
        problem = task(rng, length, size)
        ids = tokenizer.encode(problem.question() + "\n").ids
        wanted = [(NOT_LEARNED, NOT_LEARNED)] * len(ids)
        habit = rng.choice(HABITS)
        lines = trace_lines(problem, lambda i: rng.random() < habit, rng, skill)
        for i, before, value, text, is_guess in lines:
            line = tokenizer.encode(text).ids  # no token spans two lines; the newline is one
            want = [(id, id) for id in line]
            if is_guess:
                for k, place in enumerate(task.PLACES):
                    want[place - 1] = ANY_PART - k, ANY_PART - k
            if i + 1 < length:
                step, jump = (tokenizer.encode(problem.line(i, span, before, value)).ids for span in (1, 2))
                turn = next(k for k, (a, b) in enumerate(zip(step, jump)) if a != b)
                want[turn] = step[turn], jump[turn]
            ids = ids + line
            wanted = wanted + want
        end = tokenizer.encode(f"#### {value}").ids + [stop]
        examples.append((ids + end, wanted + [(id, id) for id in end]))
    width = max(len(ids) for ids, _ in examples)
    padding = (NOT_LEARNED, NOT_LEARNED)
    return (torch.tensor([ids + [stop] * (width - len(ids)) for ids, _ in examples]),
            torch.tensor([wanted + [padding] * (width - len(wanted)) for _, wanted in examples]))


def corpus_loss(logprobs_NV, wanted_N2, parts):
    """Cross-entropy, (N,) each. Where the corpus is random the target is its distribution, not a draw of it:
    a guess is uniform over the ids of its part, a jump has probability JUMP_SHARE. The gradient's mean is the
    same, without noise that would drown the rest; what stands before may be of any habit and teaches none."""
    step_N, jump_N = -logprobs_NV.gather(1, wanted_N2.clamp(min=0)).T
    either_N = JUMP_SHARE * jump_N + (1 - JUMP_SHARE) * step_N
    loss_N = torch.where(wanted_N2[:, 0] == wanted_N2[:, 1], step_N, either_N)
    for k, ids in enumerate(parts):
        loss_N = torch.where(wanted_N2[:, 0] == ANY_PART - k, -logprobs_NV[:, ids].mean(1), loss_N)
    return loss_N


def pretrain(model, tokenizer, task, batch, steps, peak):
    """Teach the base what `batch` returns, see corpus_batch: AdamW, cosine decay."""
    parts = [word_ids(tokenizer, part) for part in task.PARTS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.time()
    for step in range(steps):
        lr = peak * min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens_BT, wanted_BT2 = batch()
        learned_BT = wanted_BT2[:, 1:, 0] != NOT_LEARNED
        wanted_N2 = wanted_BT2[:, 1:][learned_BT]
        logprobs_NV = model.logits(model(tokens_BT[:, :-1])[learned_BT]).log_softmax(-1)
        loss_N = corpus_loss(logprobs_NV, wanted_N2, parts)
        optimizer.zero_grad(set_to_none=True)
        loss_N.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            is_certain_N = (wanted_N2[:, 0] == wanted_N2[:, 1]) & (wanted_N2[:, 0] >= 0)
            certain = loss_N[is_certain_N].mean().item()
            print(f"pretrain {step}/{steps} loss {loss_N.mean().item():.3f}, of what is not random "
                  f"{certain:.3f}, {time.time() - began:.0f} s", flush=True)


@torch.no_grad()
def single_step_skill(model, tokenizer, task, rng, length, jumped=0, count=256):
    """Share of right values of single steps when what was written before is right: what BREAD can build on.

    jumped: over how many steps (an even number) that history jumps first, as an expert's anchor does.
    """
    right = total = 0
    for _ in range(count):
        problem = task(rng, length, task.SIZES[-1])
        tokens = tokenizer.encode(problem.question() + "\n").ids
        answers = []
        for i, *_, text, _ in trace_lines(problem, lambda i: i < jumped):
            tokens += tokenizer.encode(text).ids
            answers += [len(tokens) - 1 + place for place in task.PLACES] if i >= jumped else []
        tokens_T = torch.tensor(tokens)
        guessed_T = model.logits(model(tokens_T[None, :-1])[0]).argmax(-1)
        is_right = guessed_T[[place - 1 for place in answers]] == tokens_T[answers]
        is_right = is_right.view(-1, len(task.PARTS)).all(1)
        right += is_right.sum().item()
        total += len(is_right)
    return right / total


def write_problems(path, task, rng, count, length):
    """JSONL of `count` problems with an expert's trace each."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            problem = task(rng, length, task.SIZES[-1])
            trace = write_trace(trace_lines(problem, lambda i: True))
            row = {"id": f"{path.stem}-{i}", "question": problem.question(), "trace": trace,
                   "answer": trace.rsplit("#### ", 1)[1]}
            file.write(json.dumps(row) + "\n")


def make_base(task, rng, seed):
    """Tokenizer and base model, pretrained in the task's stages."""
    tokenizer = make_tokenizer(task.words())
    config = ModelConfig(model_type="llama", vocab_size=tokenizer.get_vocab_size(), hidden_size=96,
                         intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=24, max_position_embeddings=256, rms_norm_eps=1e-5,
                         tie_word_embeddings=True)
    stop = tokenizer.token_to_id(STOP)
    model = Transformer(config, {"eos_token_id": stop, "bos_token_id": None}).initialize(seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {config.vocab_size}")

    def corpus(rng, max_length, skill):
        return lambda: corpus_batch(rng, tokenizer, task, 128, max_length, skill)

    pretrain(model, tokenizer, task, lambda: lookup_batch(rng, tokenizer, task, 32), task.LOOKUPS, 2e-3)
    for number, (max_length, steps) in enumerate(task.STAGES):
        rng = random.Random(f"{seed} stage {number}") if number else rng
        pretrain(model, tokenizer, task, corpus(rng, max_length, STEP_SKILL), steps, 2e-3)
        # Slips of 1% cap twelve steps at 0.99^12 = 89% even if nothing jumps, so a polish goes without them.
        polish = corpus(random.Random(f"{seed} polish"), max_length, 1.0)
        pretrain(model, tokenizer, task, polish, steps // 10, 5e-4)
    for length in (2, max_length // 2, max_length):
        skill = single_step_skill(model, tokenizer, task, rng, length)
        print(f"single steps right at L = {length}: {skill:.3f}")
    return tokenizer, model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    tasks = {"chain": Chain, "walk": Walk}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=12, help="moves per problem of the data")
    parser.add_argument("--data-only", action="store_true", help="write no base model")
    parser.add_argument("--output", type=Path, help="default: examples/TASK")
    args = parser.parse_args()
    if not 1 <= args.length <= len(LABELS):
        parser.error(f"--length is {args.length}, it must be 1 to {len(LABELS)}: every move has a letter")
    task = tasks[args.task]
    folder = args.output or HERE / args.task
    rng = random.Random(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder / "train.jsonl", task, rng, 512, args.length)
    write_problems(folder / "heldout.jsonl", task, rng, 200, args.length)
    if not args.data_only:
        tokenizer, model = make_base(task, rng, args.seed)
        save_tokenizer(tokenizer, folder / "model")
        model.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
