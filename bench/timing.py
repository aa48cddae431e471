"""What the benchmarks share: clocks, peak memory, rounds in which rivals take turns, tables, random models.

    python bench/timing.py [--device cpu]     # what this machine's memory and its matrix products give

Import it before torch and before any file of the repository.
"""
import argparse
import ctypes
import gc
import importlib
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path

# As in bread.py, which says why; OMP_WAIT_POLICY=active outside is libgomp's own default.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
import torch

BENCH = Path(__file__).resolve().parent
# The root first: this folder, which Python puts there for a script, has a sampler.py of its own.
OTHERS = [entry for entry in sys.path if Path(entry or ".").resolve() not in (BENCH, BENCH.parent)]
sys.path[:] = [str(BENCH.parent), str(BENCH), *OTHERS]
from model import ModelConfig, Transformer

# model type, vocabulary, hidden, layers, query heads, key/value heads, feed-forward, tied: the published
# config.json of SmolLM2 and each Qwen2.5, and a tiny Qwen3 of 796,032 parameters.
SHAPES = {"tiny": ("qwen3", 64, 128, 4, 4, 2, 384, True),
          "smollm2-135m": ("llama", 49152, 576, 30, 9, 3, 1536, True),
          "qwen2.5-0.5b": ("qwen2", 151936, 896, 24, 14, 2, 4864, True),
          "qwen2.5-1.5b": ("qwen2", 151936, 1536, 28, 12, 2, 8960, True),
          "qwen2.5-3b": ("qwen2", 151936, 2048, 36, 16, 2, 11008, True),
          "qwen2.5-7b": ("qwen2", 152064, 3584, 28, 28, 4, 18944, False)}
# As bread.py reads GSM8K's test problems, in tokens of SmolLM2-135M-Instruct: the first 100 questions in its
# chat template, the first 16 solutions without the marks <<..>>.
QUESTIONS = [
    96, 56, 87, 65, 140, 86, 74, 101, 135, 89, 90, 96, 97, 92, 84, 124, 83, 88, 59, 96, 94, 76, 90, 68, 71,
    97, 99, 90, 81, 99, 69, 94, 71, 61, 71, 84, 74, 93, 74, 105, 78, 158, 114, 91, 106, 124, 128, 80, 67,
    73, 68, 79, 93, 130, 112, 80, 75, 107, 114, 62, 68, 92, 100, 101, 124, 77, 88, 84, 68, 82, 84, 74, 81,
    77, 153, 96, 117, 75, 74, 78, 65, 90, 61, 60, 54, 115, 118, 109, 70, 80, 118, 68, 84, 118, 81, 72, 63,
    85, 127, 113]
SOLUTIONS = [46, 33, 133, 30, 88, 134, 82, 151, 125, 113, 136, 104, 107, 120, 123, 115]


def config_of(shape, layers=None, vocab=None):
    """The ModelConfig of a shape; layers, vocab: smaller than the real model's."""
    kind, real_vocab, hidden, num_layers, heads, kv_heads, inner, tied = SHAPES[shape]
    return ModelConfig(
        model_type=kind, vocab_size=vocab or real_vocab, hidden_size=hidden, intermediate_size=inner,
        num_attention_heads=heads, num_hidden_layers=layers or num_layers, num_key_value_heads=kv_heads,
        head_dim=hidden // heads, max_position_embeddings=32768, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6})


@torch.no_grad()
def random_model(shape, layers=None, dtype=torch.float32, device="cpu", vocab=None):
    """A model with weights N(0, 0.02), biases 0, norms 1, drawn on the device: 7B take a CPU a minute."""
    with torch.device("meta"):
        model = Transformer(config_of(shape, layers, vocab)).to(dtype)
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:  # to_empty has made two tensors of one
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def import_rival(name, wanted=any(text.startswith("--rival") for text in sys.argv)):
    """transformers or TRL, None where not wanted or not installed. They look for a package `kernels`, not for
    ours: so they ask, and remember, while ours cannot be found."""
    kept = sys.path[:]
    sys.path[:] = OTHERS
    try:
        if wanted:
            os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
            importlib.import_module("transformers.utils").is_kernels_available()
            return importlib.import_module(name)
    except ImportError:
        return None
    finally:
        sys.path[:] = kept


def new_parser(doc):
    """A parser with the flags of every benchmark."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--threads", type=int, help="torch threads, for all; default: torch's")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; default 5")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the Markdown to this file too")
    return parser


def parse(parser):
    """The arguments, with `device` a torch.device and `dtype` beside it; exits with 2 on wrong ones."""
    args = parser.parse_args()
    args.device = torch.device(args.device)
    if args.repeats < 1 or (args.device.type == "cuda" and not torch.cuda.is_available()):
        parser.error("--repeats must be at least 1, and --device cuda needs a CUDA device")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    return args


# ---------------------------------------------------------------- measuring


def now(device):
    """Seconds on a monotonic clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_of(call, device):
    """Run `call`; MiB by which memory grew at its highest, as text: tensors on a GPU, else the process."""
    def process_mib(field):
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        call()  # compiles kernels; what it keeps for later calls counts, what tuning takes does not
        torch.cuda.reset_peak_memory_stats()
        call()
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}"
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what the last one freed: this one would take it
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
        before = process_mib("VmRSS")
    except (OSError, AttributeError):  # not Linux and glibc, or not allowed in this container
        call()
        return "-"
    call()
    return f"{process_mib('VmHWM') - before:,.0f}"


def take_turns(rivals, device, repeats, deadline=math.inf):
    """({rival: (samples, peak)}, {rival: why it did not run}); the first must run, or its error is raised.

    A rival is called without arguments and returns (seconds, ...); a sample is that and, as the last one, the
    CPU seconds of all threads. An untimed call, in which the peak is taken, then rounds in which every one
    runs once, so that a busy neighbour slows all. Nothing is begun after the deadline (time.monotonic()) but
    the first round, which always runs.
    """
    peaks = {}
    failed = {}
    for one in rivals:
        if peaks and time.monotonic() > deadline:
            failed[one] = "its share of --minutes was used up"
            continue
        try:
            peaks[one] = peak_of(one, device)
        except Exception as error:  # what others' programs can do changes with device and release
            if one is rivals[0] and not isinstance(error, torch.OutOfMemoryError):
                raise
            failed[one] = f"{type(error).__name__}: {error}".split("\n")[0]
    samples = {one: [] for one in peaks}
    for done in range(repeats):
        if done and time.monotonic() > deadline:
            break
        for one in samples:
            cpu = time.process_time()
            samples[one].append((*one(), time.process_time() - cpu))
    return {one: (samples[one], peaks[one]) for one in samples}, failed


def seconds_of(call, device):
    """Median seconds of five calls, after two."""
    seconds = []
    for _ in range(7):
        began = now(device)
        call()
        seconds.append(now(device) - began)
    return statistics.median(seconds[2:])


def copy_bandwidth(device):
    """Bytes per second of a plain copy, read and written: what this machine's memory gives."""
    size = 2**32 if device.type == "cuda" else 2**28  # beyond every cache
    source = torch.ones(size // 4, device=device)
    target = torch.ones(size // 4, device=device)
    return 2 * size / seconds_of(lambda: target.copy_(source), device)


def matmul_rate(device, dtype):
    """FLOP/s of a square matrix product: what this device gives."""
    size = 8192 if device.type == "cuda" else 2048
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / seconds_of(lambda: left @ right, device)


# ---------------------------------------------------------------- tables


NOTES = """n: timed rounds. "ratio": seconds of this one over the first one's in the same round, above 1 where
the first is faster. CPU s: processor time of a call, all threads, median; where neighbours take the cores,
compare this. peak: growth of memory by one call, above weights and inputs."""


def spread(values, form="{:.3f}"):
    """Median and range as a table's cell."""
    middle, low, high = (form.format(pick(values)) for pick in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"


def comparison(results, failed, heads=(), more=lambda one, samples: ()):
    """What take_turns gave as Markdown; more(rival, its samples): the cells of the columns `heads`."""
    lines = [("", "n", "seconds, median (range)", "ratio (range)", "CPU s", "peak MiB", *heads)]
    first = [sample[0] for sample in next(iter(results.values()), ([],))[0]]
    for one, (samples, peak) in results.items():
        seconds = [sample[0] for sample in samples]
        ratios = [theirs / ours for theirs, ours in zip(seconds, first)]
        cpu = statistics.median(sample[-1] for sample in samples)
        lines.append((one.name, len(samples), spread(seconds), spread(ratios, "{:.2f}x"), f"{cpu:.2f}", peak,
                      *more(one, samples)))
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]
    lines.insert(1, "|---" * (6 + len(heads)) + "|")
    return "\n".join(lines + [f"\n{one.name}: did not run: {reason}" for one, reason in failed.items()])


def writer(title, args, *facts):
    """A function that prints a text and adds it to --write; both begin with what runs where. title: of a
    module's docstring the first line, which says whether inputs are made up."""
    texts = []

    def write(text):
        print(text, flush=True)
        texts.append(text)
        if args.write:  # at once: what stops early leaves what it has
            args.write.write_text("\n".join(texts) + "\n", encoding="utf-8")

    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.is_file() else "") or ["unknown CPU"]
    machine = torch.cuda.get_device_name() if args.device.type == "cuda" else names[0]
    versions = [f"Python {platform.python_version()}"]
    for name in ("torch", "triton", "transformers", "trl"):
        if name in sys.modules:
            versions.append(f"{name} {sys.modules[name].__version__}")
    write(f"# {title.splitlines()[0]}\n\n{datetime.now():%Y-%m-%d %H:%M}, {machine}, "
          f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}\n"
          f"{', '.join(versions)}, {torch.get_num_threads()} torch threads, "
          f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}, GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}, "
          f"{args.dtype}\n`python {shlex.join(sys.argv)}`\n")
    write("\n".join([*facts, "", NOTES, ""]))
    return write


def main():
    args = parse(new_parser(__doc__))
    copy = copy_bandwidth(args.device) / 1e9
    product = matmul_rate(args.device, args.dtype) / 1e12
    writer("The machine", args, f"copy {copy:.1f} GB/s, matrix product {product:.3g} TFLOP/s")


if __name__ == "__main__":
    main()
