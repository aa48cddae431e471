"""Times the forward and backward passes of one update: a shared prefix once, against whole rows padded to the right.

    python bench/update.py                                    # every case that suits the device
    python bench/update.py --case 0.5b --layers 6 --threads 2 --write bench/results/update-cpu.md
    python bench/update.py --case tiny --head linear logits   # with whole logits as well, for both
    python bench/update.py --case 7b                          # CUDA: two steps with AdamW, the peak of one card

Both variants are bread.update itself, with its own micro-batches, loss and log-probs, on a Run whose model, data and
tokenizer come from here instead of from files. "padded" replaces two names of bread.py: no prefix is computed ahead,
and every rollout is a row (context, completion, padding) of one ordinary causal pass; the head sees the completions'
tokens only. Both send a gradient to every parameter; that its norm agrees is checked. No optimizer step is timed.
One untimed call each, then rounds in which every variant runs once, so that a busy neighbour slows all of them.

Dimension key: B rows of a micro-batch   T positions   N tokens that carry loss   G rollouts of a group
    P tokens of a context   R tokens of a completion   V vocabulary   D hidden size
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import itertools
import os
import platform
import random
import shlex
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# As in bread.py: threads that spin at barriers collapse as soon as another program takes a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

# The root first: this script's own folder, which Python puts there, has files named like ours (sampler, kernels).
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "bench"]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import bread
from config import Config
from model import ModelConfig, Transformer
from packing import layout
from random_checkpoint import SHAPES

MIB = 2**20


# ---------------------------------------------------------------- what is trained on


@dataclasses.dataclass(frozen=True)
class Case:
    """`groups` contexts of `context` tokens, each with `group_size` completions of shortest..longest tokens."""
    shape: str
    groups: int
    group_size: int
    context: int
    shortest: int
    longest: int
    micro_batch: int  # rows per backward pass, for all variants

    def shrunk(self):
        """An eighth of all lengths, to see that everything runs."""
        return dataclasses.replace(self, **{name: max(2, getattr(self, name) // 8)
                                            for name in ("context", "shortest", "longest")})

    def text(self):
        lengths = f"{self.shortest}" + (f" to {self.longest}" if self.longest > self.shortest else "")
        return (f"{self.groups} group{'s' * (self.groups > 1)} of {self.group_size}, {self.context} + {lengths} "
                f"tokens, {self.micro_batch} rows per backward pass")


CASES = {
    "tiny": Case("tiny", 8, 8, 40, 20, 70, 32),
    # Whole rows of a group at once would keep 15 GB of activations: two backward passes for either variant.
    "0.5b": Case("qwen2.5-0.5b", 1, 8, 512, 128, 128, 4),
    "1.5b": Case("qwen2.5-1.5b", 2, 16, 512, 512, 512, 16),
    "7b": Case("qwen2.5-7b", 1, 16, 512, 512, 512, 8)}
NEEDS_GPU = ("1.5b", "7b")


def make_groups(case, seed=0):
    """Groups of bread.Rollout with advantages +1 and -1. Nobody sampled them: the first pass is their old log-prob, so
    every ratio is 1 and no gradient is clipped away. Ids below 64 exist in every vocabulary."""
    rng, groups = random.Random(seed), []
    for _ in range(case.groups):
        context = rng.choices(range(64), k=case.context)
        completions = [rng.choices(range(64), k=rng.randint(case.shortest, case.longest))
                       for _ in range(case.group_size)]
        groups.append([bread.Rollout(None, 0, context, [], ids, None, "length", reward, advantage=2 * reward - 1)
                       for ids, reward in zip(completions, itertools.cycle((1.0, 0.0)))])
    return groups


def random_model(shape, layers, device, dtype):
    """A model with weights N(0, 0.02), drawn where it will live: 7B on a CPU takes over a minute.

    "tiny" is a Qwen3 of 796,032 parameters, the others have Qwen2.5's published sizes. `layers`: fewer than those.
    """
    if shape == "tiny":
        kind, sizes, head_dim, vocab = "qwen3", (128, 4, 4, 2, 384, True), 32, 64
    else:
        kind, sizes, vocab = "qwen2", SHAPES[shape], 152064 if shape == "qwen2.5-7b" else 151936
        head_dim = sizes[0] // sizes[2]
    hidden, num_layers, heads, kv_heads, inner, tied = sizes
    config = ModelConfig(model_type=kind, vocab_size=vocab, hidden_size=hidden, intermediate_size=inner,
                         num_hidden_layers=layers or num_layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=32768,
                         tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model = model.to_empty(device=device)
    if tied:  # to_empty has made two tensors of one
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def new_run(case, args):
    """A bread.Run with its masters and its optimizer, as training makes it; only what it reads from files is not."""
    def model(_path, device, dtype):
        return random_model(case.shape, args.layers, device, dtype)

    config = Config(device=args.device, micro_batch_size=case.micro_batch, recompute=args.recompute,
                    group_size=case.group_size, eval=True)  # eval: no folder for results, no signal handlers
    with (mock.patch.object(bread.plain.Transformer, "from_pretrained", model),
          mock.patch.object(bread.Tokenizer, "from_pretrained", lambda _path: None),
          mock.patch.object(bread.Run, "load", lambda _self, _path: [])):
        return bread.Run(config)


# ---------------------------------------------------------------- variants


class WholeRows:
    """Stands in for packing.Prefixes: it computes nothing, and remembers the contexts."""

    def __init__(self, _model, sequences):
        self.sequences = sequences

    def backward(self):
        """There is no phase of its own to go back through."""


def padded_logprobs(run, model, prefixes, batch):
    """Stands in for bread.token_logprobs: the same result from whole rows, padded on the right, one causal pass."""
    rows = [prefixes.sequences[i] + ids for i, ids in batch.rows]
    lengths, T = torch.tensor([len(row) for row in rows]), max(map(len, rows))
    tokens_BT = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=run.device)
    completion_lengths = torch.tensor([len(ids) for _, ids in batch.rows])
    places_BT = torch.arange(T).expand(len(rows), T)
    is_loss_BT = (places_BT < lengths[:, None]) & (places_BT >= (lengths - completion_lengths)[:, None])
    hidden_ND = model(tokens_BT)[is_loss_BT.to(run.device)]
    logprobs_N, entropy_N = run.ops.linear_logprob(hidden_ND, model.lm_head.weight, batch.targets_N,
                                                   run.config.temperature)
    return torch.zeros_like(batch.loss_mask_BT).masked_scatter(batch.loss_mask_BT > 0, logprobs_N), entropy_N.sum()


def whole_logits(hidden_ND, weight_VD, targets_N, temperature):
    """Stands in for linear_logprob: log_softmax and gather on stored float32 logits, without the entropy."""
    logprobs_NV = torch.log_softmax((hidden_ND @ weight_VD.T).float() / temperature, dim=-1)
    return logprobs_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1), logprobs_NV.new_zeros(len(targets_N))


class Variant:
    """One way to compute the update; a call returns (seconds, processor seconds of all threads)."""

    def __init__(self, run, groups, head, shared):
        self.run, self.groups, self.shared = run, groups, shared
        self.name = ("shared, packed" if shared else "padded, unshared") + (", logits" if head == "logits" else "")
        self.ops = SimpleNamespace(linear_logprob=whole_logits) if head == "logits" else run.ops
        self.norm, self.tokens, self.places_per_token = None, 0, 1.0

    def __call__(self):
        run, swap = self.run, contextlib.nullcontext()
        if not self.shared:
            swap = mock.patch.multiple(bread, Prefixes=WholeRows, token_logprobs=padded_logprobs)
        with mock.patch.object(run, "ops", self.ops), swap:
            began, cpu = now(run.device), time.process_time()
            bread.update(run, self.groups)
            return now(run.device) - began, time.process_time() - cpu

    def inspect(self):
        """A call that notes the gradient's norm, and by a hook how many tokens ran through the network."""
        def count(_model, inputs):
            self.tokens += inputs[0].numel()

        def norm(_loss):
            self.norm = torch.linalg.vector_norm(torch.stack(
                [weight.grad.norm(dtype=torch.float32) for weight in self.run.weights])).item()
            return drop_gradients(self.run, _loss)

        hook = self.run.model.register_forward_pre_hook(count)
        try:
            with mock.patch.object(self.run, "optimizer_step", norm):
                self()
        finally:  # out of memory: the next variant counts its own
            hook.remove()
        self.places_per_token = self.padding()

    def padding(self):
        """Places that attention works on per token that is there, over all micro-batches; prefixes have no padding."""
        rollouts = [rollout for group in self.groups for rollout in group]
        places = tokens = 0
        for contexts, batches in bread.make_packs(self.run, self.groups, 1, len(rollouts)):
            for batch in batches:
                lengths = [len(ids) + (0 if self.shared else len(contexts[i])) for i, ids in batch.rows]
                tokens += sum(lengths)
                places += sum(G * R for _, G, R in layout(list(map(len, contexts)), batch.rows)[2]) if self.shared \
                    else len(lengths) * max(lengths)
        return places / tokens


def drop_gradients(run, _loss):
    """Stands in for Run.optimizer_step: forward and backward are measured, not AdamW."""
    for weight in run.weights:
        weight.grad = None
    return 0.0


# ---------------------------------------------------------------- measuring


def now(device):
    """Seconds on a monotonic clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(device, dtype):
    """FLOP/s of a square matrix product: what this device gives, median of 5."""
    size, calls = (8192, 10) if device.type == "cuda" else (2048, 1)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(7):
        began = now(device)
        for _ in range(calls):
            left @ right
        seconds.append((now(device) - began) / calls)
    return 2 * size**3 / statistics.median(seconds[2:])


def process_bytes(field):
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_of(call, device):
    """Run `call`; bytes by which memory grew at its highest point, gradients included. None if a CPU's is unknown."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what the last variant freed; the next would seem to need less
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
        before = process_bytes("VmRSS")
    except (OSError, AttributeError):  # not Linux and glibc, or not allowed in this container
        call()
        return None
    call()
    return process_bytes("VmHWM") - before


def measure(variants, repeats):
    """{variant: (what the calls of every round returned, peak bytes)}, and the reasons of those that could not run."""
    peaks, failed = {}, {}
    for one in variants:
        try:
            one.inspect()  # the compiler's and the allocator's first time, too
            peaks[one] = peak_of(one, one.run.device)
        except torch.OutOfMemoryError:
            drop_gradients(one.run, None)
            failed[one.name] = "out of memory"
    samples = {one: [] for one in peaks}
    for _ in range(repeats):
        for one in samples:
            samples[one].append(one())
    return {one: (samples[one], peaks[one]) for one in samples}, failed


def check_norms(variants):
    """AssertionError unless all variants have computed the same gradient, by its norm: bf16 rounds at 2^-8."""
    norms = {one.name: one.norm for one in variants}
    tolerance = 0.05 if next(iter(variants)).run.dtype == torch.bfloat16 else 1e-3
    assert max(norms.values()) - min(norms.values()) <= tolerance * max(norms.values()), norms
    assert min(norms.values()) > 0, norms


# ---------------------------------------------------------------- the table


HEADINGS = ("variant", "n", "seconds, median (range)", "shared is (range)", "CPU s", "completion tokens/s",
            "tokens through", "places/token", "peak MiB", "TFLOP/s", "of the matmul")

NOTES = """\
n: timed rounds. "shared is": this variant's time over that of the first in the same round; above 1 the first is
faster. CPU s: processor time, all threads, median; where neighbours take the cores, compare this. completion tokens/s:
tokens that carry loss, over the whole update. tokens through: what the network was given, padding included, counted by
a hook. places/token: places that attention works on over tokens that are there (shared: rows of a group padded to each
other; padded: whole rows). peak: growth above weights, masters and moments, gradients included. TFLOP/s: 6 x
(parameters of the layers x tokens through + those of the head x tokens that carry loss) / time; attention and
recomputing count nothing. "logits" stores whole logits, and computes no entropy."""


def header(args, rate):
    """The lines above the table: what ran where, beside what else."""
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines()
                 if line.startswith("model name")] if info.is_file() else []
        machine = names[0] if names else platform.machine()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if args.device == "cuda":
        import triton
        versions += f", triton {triton.__version__}"
    return (f"# The update\n\n{datetime.now():%Y-%m-%d %H:%M}, {machine}, {os.cpu_count()} cores, load average "
            f"{os.getloadavg()[0]:.1f}\n{versions}; {torch.get_num_threads()} torch threads, "
            f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}; matrix product {rate / 1e12:.3g} TFLOP/s\n"
            f"`python {shlex.join(sys.argv)}`\n\n{NOTES}")


def spread(values, form):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def table(run, groups, results, rate):
    """Markdown rows, one per variant; the first one is what the others are compared with."""
    loss_tokens = sum(len(rollout.completion_ids) for group in groups for rollout in group)
    head = run.model.lm_head.weight.numel()
    layers = run.num_parameters - head * (1 if run.model.config.tie_word_embeddings else 2)
    first = next(iter(results))
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    times = {one: [seconds for seconds, _ in samples] for one, (samples, _) in results.items()}
    for one, (samples, peak) in results.items():
        seconds, median = times[one], statistics.median(times[one])
        speed = 6 * (layers * one.tokens + head * loss_tokens) / median
        ratios = [theirs / ours for theirs, ours in zip(seconds, times[first])]
        lines.append("| " + " | ".join((
            one.name, str(len(seconds)), spread(seconds, "{:.3f}"),
            "" if one is first else spread(ratios, "{:.2f}x"),
            f"{statistics.median(cpu for _, cpu in samples):.2f}", f"{loss_tokens / median:,.0f}",
            f"{one.tokens:,}", f"{one.places_per_token:.2f}", "-" if peak is None else f"{peak / MIB:,.0f}",
            f"{speed / 1e12:.3g}", f"{speed / rate:.0%}")) + " |")
    return lines


# ---------------------------------------------------------------- the run


def run_case(case, args, rate):
    """Measure one case; the lines to print about it."""
    run, groups = new_run(case, args), make_groups(case)
    run.optimizer_step = functools.partial(drop_gradients, run)
    variants = [Variant(run, groups, head, shared) for head in args.head for shared in (True, False)]
    results, failed = measure(variants, args.repeats)
    lines = [title(case, run, args)]
    if results:
        check_norms(results)
        lines += table(run, groups, results, rate)
    return lines + [f"\n{name}: {reason}" for name, reason in failed.items()]


def title(case, run, args):
    """What is trained on what, as a line of Markdown."""
    options = "".join([f", {args.layers} layers" if args.layers else "", ", recompute" if args.recompute else ""])
    return (f"\n**{case.shape} ({run.num_parameters / 1e6:,.1f}M parameters, "
            f"{str(run.dtype).removeprefix('torch.')}{options}): {case.text()}**\n")


def whole_steps(case, args):
    """Two updates with AdamW as training takes them (the second has moments from its start): seconds and peak."""
    run, groups, lines = new_run(case, args), make_groups(case), []
    for step in (1, 2):
        torch.cuda.reset_peak_memory_stats()
        began, held = now(run.device), torch.cuda.memory_allocated()
        try:
            bread.update(run, groups)
        except torch.OutOfMemoryError as error:
            lines.append(f"update {step}, AdamW included: out of memory behind "
                         f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB: {str(error).splitlines()[0]}")
            break
        lines.append(f"update {step}, AdamW included: {now(run.device) - began:.2f} s, peak "
                     f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of "
                     f"{torch.cuda.get_device_properties(run.device).total_memory / 2**30:.1f}, "
                     f"{held / 2**30:.1f} GiB held before")
    return [title(case, run, args), "\n\n".join(lines)]


def parse_args():
    """The command line, with the defaults that depend on the device filled in. Exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--case", nargs="+", choices=CASES, help=f"default: {' '.join(NEEDS_GPU)} on CUDA, the others "
                        "on a CPU; 7b takes whole steps with AdamW and activations computed again")
    parser.add_argument("--head", nargs="+", choices=("linear", "logits"), default=["linear"],
                        help="linear_logprob, or log_softmax on whole logits")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's")
    parser.add_argument("--layers", type=int, help="fewer layers than the real shapes, for a small "
                        "machine; the head, which sharing leaves as it is, then weighs more")
    parser.add_argument("--micro-batch-size", type=int, help="rows per backward pass; default: see the title of a case")
    parser.add_argument("--recompute", action="store_true", help="as bread.py's flag, for all variants")
    parser.add_argument("--quick", action="store_true", help="an eighth of all lengths, 2 rounds: a smoke run")
    parser.add_argument("--repeats", type=int, help="timed rounds; default 5")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the Markdown to this file too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda was given, but torch sees no CUDA device; allowed here: --device cpu")
    args.case = args.case or [name for name in CASES if (name in NEEDS_GPU) == (args.device == "cuda")]
    if args.device == "cpu" and not set(args.case).isdisjoint(NEEDS_GPU):
        parser.error(f"--case {' '.join(args.case)}: {' and '.join(NEEDS_GPU)} need a CUDA device")
    args.repeats = args.repeats or (2 if args.quick else 5)
    return args


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, lines = torch.device(args.device), []

    def write(text):
        print(text, flush=True)
        lines.append(text)
        if args.write:  # after every case: a run that is stopped leaves what it has measured
            args.write.write_text("\n".join(lines) + "\n")

    torch.manual_seed(0)
    rate = matmul_rate(device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    write(header(args, rate))
    for name in args.case:
        case = CASES[name].shrunk() if args.quick else CASES[name]
        case = dataclasses.replace(case, micro_batch=args.micro_batch_size or case.micro_batch)
        if name == "7b":
            write("\n".join(whole_steps(case, argparse.Namespace(**vars(args) | {"recompute": True}))))
        else:
            write("\n".join(run_case(case, args, rate)))
        gc.collect()  # a model and its Run refer to each other in places: gone before the next one is built
    write(f"\nLoad average at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
