"""Times sampler.py against other ways to sample the same tokens from the same weights, interleaved in one process.

    python bench/sampler.py                                      # every case that fits the machine, nobody else
    python bench/sampler.py --rival transformers,static,continuous
    python bench/sampler.py --case tiny prefix --rival transformers --threads 1 --write bench/results/sampler-cpu.md
    python bench/sampler.py --quick --layers 2                   # a smoke run, its numbers mean nothing

Weights are random, and nothing stops a row early: every sampler draws exactly the same number of tokens from the
full distribution (temperature 1, no top-k, no top-p). One untimed call each, then rounds in which every sampler runs
once, so that a busy neighbour slows all of them.

"ours" computes a prefix once and its rows share it. "ours, copied" is the same code as a sampler without sharing
would use it: every row is prefilled and holds a prefix of its own, anew for every probe of a search.

Dimension key: R rows   G rows of a group   P prefix tokens   N new tokens of a row   V vocabulary   L layers
    K key/value heads   C head size   D hidden size   B, T as in the model
"""
import argparse
import dataclasses
import gc
import itertools
import logging
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

# As in bread.py: threads that spin at barriers collapse as soon as another program takes a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

ROOT = Path(__file__).resolve().parents[1]
# transformers looks for a package `kernels`, and both this repository and this folder hold another thing of that
# name. So it is imported, and its answer to that question cached, while neither is on the path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "bench")]
transformers = None
if any(argument.split("=")[0] == "--rival" for argument in sys.argv):
    try:
        import transformers
        from transformers.utils import is_kernels_available
        is_kernels_available()
    except ImportError:
        pass  # main() says so
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from model import ModelConfig, Transformer, config_dict
from random_checkpoint import SHAPES
from sampler import Fork, SamplingParams, branch, prefill

CASES = ("tiny", "branches", "0.5b", "search", "prefix", "gpu")  # on a CPU in this order, the quick ones first
RIVALS = ("transformers", "static", "continuous")
PAGE = 256  # tokens of a page of transformers' continuous batching, its default
MIB = 2**20
SMALLEST_GROWTH = 32 * MIB  # glibc serves smaller blocks from memory that the process already has


# ---------------------------------------------------------------- what is sampled


@dataclasses.dataclass(frozen=True)
class Job:
    """Rows to sample: `probes` one after another, all (sequence, prefix length, rows) of a probe at once."""
    name: str
    shape: str
    sequences: list          # of token-id lists
    probes: list
    new_tokens: int          # per row
    copied: bool = False     # measure "ours, copied" too
    decode_only: bool = False  # prefill once, outside the measurement; for "ours" alone

    @property
    def total_tokens(self):
        return self.new_tokens * sum(rows for probe in self.probes for _, _, rows in probe)

    def prompts(self, probe):
        """The prompt of every row of a probe, as a sampler without sharing is given them."""
        return [self.sequences[i][:length] for i, length, rows in probe for _ in range(rows)]


def random_ids(count, seed=0):
    """Token ids below 64, which every vocabulary here has; which ones they are decides nothing about the time."""
    return random.Random(seed).choices(range(64), k=count)


def group_job(shape, rows, group, prompt, new, **options):
    """`rows` rows in groups of `group`, every group with a prompt of its own: generate's ordinary work."""
    sequences = [random_ids(prompt, seed) for seed in range(rows // group)]
    probe = [(i, prompt, group) for i in range(rows // group)]
    what = f"{rows} rows, all prompts distinct" if group == 1 else f"{rows} rows in groups of {group}"
    return Job(f"{what}, {prompt} + {new}", shape, sequences, [probe], new, **options)


def branch_job(shape, rows, question, trace, new):
    """Three groups that leave one trace at 25, 50 and 75 % of it, sampled together."""
    probe = [(0, question + trace * quarter // 4, rows) for quarter in (1, 2, 3)]
    name = f"branches at 25, 50, 75 % of a trace of {trace}, {rows} rows each, {new} new"
    return Job(name, shape, [random_ids(question + trace)], [probe], new)


def search_job(shape, rows, question, trace, new):
    """An anchor search: four cuts of one trace in the order of a binary search, each a group of its own."""
    probes = [[(0, question + trace * part // 16, rows)] for part in (8, 4, 6, 5)]
    name = f"search of 4 probes, trace of {trace}, {rows} rows each, {new} new"
    return Job(name, shape, [random_ids(question + trace)], probes, new, copied=True)


def jobs_of(case, quick):
    """The jobs of a case. `quick` divides all lengths by 8: enough to see that everything runs."""
    def n(tokens):
        return max(4, tokens // 8) if quick else tokens

    small, tiny = "qwen2.5-0.5b", "tiny"
    if case == "tiny":
        return [group_job(tiny, rows, group, n(64), n(128)) for rows in (64, 256) for group in (8, 1)]
    if case == "branches":
        return [branch_job(tiny, 8, n(64), n(1024), n(64))]
    if case == "search":
        return [search_job(tiny, 32, n(64), n(512), n(64)), search_job(small, 8, n(64), n(512), n(32))]
    if case == "0.5b":
        return [group_job(small, rows, 8, n(128), n(64)) for rows in (8, 32)]
    if case == "prefix":
        return [group_job(small, rows, 8, n(1024), n(64)) for rows in (8, 32)]
    jobs = []
    for shape in (small, "qwen2.5-1.5b", "qwen2.5-7b"):
        jobs += [group_job(shape, rows, 16, n(512), n(512)) for rows in (64, 256)]
        # Prefilling 256 copies of 2048 tokens takes 10 s at 7B and is no part of the question: decode alone.
        jobs.append(group_job(shape, 256, 16, n(2048), n(128), copied=True, decode_only=True))
        if shape == small:
            jobs += [branch_job(shape, 32, n(64), n(2048), n(256)), search_job(shape, 64, n(64), n(512), n(256))]
    return jobs


# ---------------------------------------------------------------- models


def random_model(shape, layers, device, dtype):
    """A model with weights N(0, 0.02), drawn where it will live: 7B on a CPU takes over a minute.

    "tiny" is a Qwen3 of 796,032 parameters, the others are Qwen2.5's published sizes. `layers`: fewer than those.
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
    model = model.to_empty(device=device).requires_grad_(False)
    if tied:  # to_empty has made two tensors of one
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def rival_model(model):
    """The same weights in transformers: through a folder on a CPU, by sharing the tensors on a GPU (7B are 15 GB)."""
    weight = model.lm_head.weight
    if weight.device.type == "cpu":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            rival = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=weight.dtype, attn_implementation="sdpa")
    else:
        config = transformers.AutoConfig.for_model(**config_dict(model, str(weight.dtype).removeprefix("torch.")))
        with torch.device(weight.device):
            rival = transformers.AutoModelForCausalLM.from_config(
                config, dtype=weight.dtype, attn_implementation="sdpa")
        rival.load_state_dict(model.state_dict(), assign=True)
        rival.tie_weights()
    rival.eval()
    tokens_BT = torch.tensor([random_ids(32)], device=weight.device)
    with torch.no_grad():
        ours, theirs = model.logits(model(tokens_BT)), rival(tokens_BT).logits.float()
    gap, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    # bf16 has 8 bits, and every layer rounds in another order; a wrong weight is off by the scale itself.
    assert gap < (0.1 if weight.dtype == torch.bfloat16 else 1e-4) * scale, (gap, scale)
    return rival


def kernel_ops(device):
    """Keyword arguments of `branch` beyond the plain ones: on a GPU the Triton kernels, on a CPU nothing."""
    if device.type != "cuda":
        return {}
    import kernels
    return {"ops": kernels}


# ---------------------------------------------------------------- samplers


def now(device):
    """Seconds on a monotonic clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def kv_bytes_per_token(model):
    """Bytes of K and V that one token leaves behind in all layers."""
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.lm_head.weight.element_size()


class Ours:
    """sampler.py. A call samples the job once and returns (seconds, seconds of them after the prefill)."""

    def __init__(self, model, job, copied=False):
        self.name, self.model, self.job = "ours, copied" if copied else "ours", model, job
        self.device, self.rounds, row_ids = model.lm_head.weight.device, [], itertools.count()
        for i, probe in enumerate(job.probes):
            if copied:
                sequences = job.prompts(probe)
                forks = [Fork(j, len(ids), (next(row_ids),)) for j, ids in enumerate(sequences)]
            else:  # the first probe fills the trunk, the others find it filled
                sequences = job.sequences if i == 0 else None
                forks = [Fork(j, length, tuple(itertools.islice(row_ids, rows))) for j, length, rows in probe]
            self.rounds.append((sequences, forks))
        filled = [sum(map(len, sequences)) for sequences, _ in self.rounds if sequences]
        self.prefilled = sum(filled)
        # Trunk: K/V and one hidden state per token. Branch: K/V of the tokens that rows sample.
        kv, rows = kv_bytes_per_token(model), max(sum(len(fork.row_ids) for fork in forks) for _, forks in self.rounds)
        hidden = model.config.hidden_size * model.lm_head.weight.element_size()
        self.kv_bytes = max(filled) * (kv + hidden) + rows * job.new_tokens * kv
        self.trunk, self.state_bytes = None, 0
        if job.decode_only:
            before = allocated(self.device)
            self.trunk = prefill(model, self.rounds[0][0])
            self.state_bytes = allocated(self.device) - before

    def __call__(self):
        params, trunk, decode = SamplingParams(max_new_tokens=self.job.new_tokens), self.trunk, 0.0
        began = now(self.device)
        for sequences, forks in self.rounds:
            if sequences and self.trunk is None:
                trunk = prefill(self.model, sequences)
            filled = now(self.device)
            groups = branch(self.model, trunk, forks, params, **kernel_ops(self.device))
            ended = now(self.device)
            decode += ended - filled
            assert all(len(row.token_ids) == self.job.new_tokens for group in groups for row in group)
        return ended - began, decode

    def close(self):
        self.trunk = None


def full_distribution(job, **options):
    """transformers' settings for what ours does. A new object for every call: generate_batch writes into it."""
    return transformers.GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None,
                                         pad_token_id=0, max_new_tokens=job.new_tokens, **options)


class Generate:
    """transformers' `generate`, a batch per probe, with a dynamic or static cache; called like `Ours`."""

    def __init__(self, model, job, static=False):
        self.name = "transformers, static cache" if static else "transformers"
        self.model, self.job, self.device = model, job, model.device
        self.options = {"cache_implementation": "static"} if static else {}
        self.batches, self.kv_bytes, self.state_bytes = [], 0, 0
        for prompts in map(job.prompts, job.probes):
            longest = max(map(len, prompts))
            rows = [[0] * (longest - len(ids)) + ids for ids in prompts]
            mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
            self.batches.append((torch.tensor(rows, device=self.device), torch.tensor(mask, device=self.device)))
        self.prefilled = sum(tokens_BT.numel() for tokens_BT, _ in self.batches)

    def __call__(self):
        first = not self.kv_bytes  # the untimed call also looks at the cache
        config = full_distribution(self.job, return_dict_in_generate=first, **self.options)
        began, decode = now(self.device), 0.0
        for tokens_BT, mask_BT in self.batches:
            clock = FirstTokenClock(self.device, len(tokens_BT))
            with torch.inference_mode():
                out = self.model.generate(tokens_BT, attention_mask=mask_BT, generation_config=config,
                                          stopping_criteria=transformers.StoppingCriteriaList([clock]))
            ended = now(self.device)
            decode += ended - clock.time
            sequences_BT = out.sequences if first else out
            assert sequences_BT.shape[1] == tokens_BT.shape[1] + self.job.new_tokens, sequences_BT.shape
            if first:
                layers = out.past_key_values.layers
                self.kv_bytes = max(self.kv_bytes, sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))
        return ended - began, decode

    def close(self):
        # What generate keeps of a static cache (the name depends on its release) would make the next job's as long.
        for name in ("_cache", "_previous_max_cache_length"):
            self.model.__dict__.pop(name, None)


class FirstTokenClock:
    """A stopping criterion that never stops: it notes when the first token is there, which ends the prefill."""

    def __init__(self, device, rows):
        self.time, self.never_R = None, torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids, scores, **_):
        if self.time is None:
            self.time = now(self.never_R.device)
        return self.never_R


class Continuous:
    """transformers' continuous batching, its manager and pages kept from call to call; called like `Ours`."""

    def __init__(self, model, job):
        self.name, self.model, self.job, self.device = "transformers, continuous", model, job, model.device
        self.prompts = [job.prompts(probe) for probe in job.probes]
        self.prefilled = sum(len(ids) for prompts in self.prompts for ids in prompts)
        # Pages for all rows at once. Left to itself it takes most of the machine's free memory.
        blocks = max(sum(-(-(len(ids) + job.new_tokens) // PAGE) for ids in prompts) for prompts in self.prompts)
        self.config = transformers.ContinuousBatchingConfig(
            num_blocks=blocks, max_batch_tokens=max(2048, *map(len, self.prompts)))
        kv = kv_bytes_per_token(model)
        self.kv_bytes, self.state_bytes = blocks * PAGE * kv, 0

    def __call__(self):
        began = now(self.device)
        for prompts in self.prompts:
            # Its loop runs in a thread of its own and switches gradients off there; no inference mode around it.
            out = self.model.generate_batch(prompts, generation_config=full_distribution(self.job),
                                            continuous_batching_config=self.config, persistent_manager=True)
            lengths = [len(result.generated_tokens) for result in out.values()]
            if lengths != [self.job.new_tokens] * len(prompts):
                errors = {result.error for result in out.values() if result.error}
                raise RuntimeError(f"{sum(lengths)} of {len(prompts) * self.job.new_tokens} tokens came; {errors}")
        return now(self.device) - began, None

    def close(self):
        self.model.destroy_cached_continuous_batching_manager()


# ---------------------------------------------------------------- measuring


def allocated(device):
    """Bytes of tensors on a GPU; on Linux, bytes of the process that lie in memory; else 0."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else process_bytes("VmRSS")


def process_bytes(field):
    """A line of /proc/self/status in bytes, 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def peak_of(call, device):
    """Run `call`; bytes by which memory grew at its highest point. On a CPU that of the process, None if unknown."""
    gc.collect()
    before = allocated(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)
        known = True
    except OSError:  # not Linux, or not allowed in this container
        known = False
    call()
    return process_bytes("VmHWM") - before if known else None


def step_bytes(model, job):
    """Bytes that the average decode step cannot avoid reading: weights, each group's prefix once, own K/V, logits.

    The floor of any sampler that knows about sharing; all samplers are held against it. The step that samples
    token s+1 finds s own tokens, s = 1..N-1, hence N/2 on average. Sums to the job's own forward passes.
    """
    embedding = model.model.embed_tokens.weight
    weights = sum(parameter.nbytes for parameter in model.parameters())
    weights -= 0 if model.config.tie_word_embeddings else embedding.nbytes  # looked up, not read
    totals = []
    for probe in job.probes:
        rows = sum(count for _, _, count in probe)
        tokens = sum(length for _, length, _ in probe) + rows * job.new_tokens / 2
        totals.append(weights + kv_bytes_per_token(model) * tokens + 4 * rows * embedding.shape[0])
    return statistics.mean(totals)


def copy_bandwidth(device):
    """Bytes per second of a plain copy, read and written: what this machine's memory gives, median of 5."""
    size = 2**32 if device.type == "cuda" else 2**28  # beyond every cache
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    seconds = []
    for _ in range(7):
        began = now(device)
        target.copy_(source)
        seconds.append(now(device) - began)
    return 2 * size / statistics.median(seconds[2:])


def measure(samplers, repeats, deadline):
    """{sampler: ([(seconds, decode seconds, CPU seconds)], peak bytes)} and the reasons of those that could not run.

    One untimed call each, then rounds of one call each. No sampler is begun after the deadline (time.monotonic()),
    and no round that would pass it; the first sampler and the first round always run.
    """
    peaks, failed = {}, {}
    for one in samplers:
        if peaks and time.monotonic() > deadline:
            failed[one] = "its share of --minutes was used up"
            continue
        try:
            peaks[one] = peak_of(one, one.device)
        except (torch.OutOfMemoryError, MemoryError):
            failed[one] = "out of memory"
        except Exception as error:
            if not isinstance(one, Continuous):  # which devices it runs on changes with its releases
                raise
            failed[one] = f"{type(error).__name__}: {error}".split("\n")[0]
    samples, longest = {one: [] for one in peaks}, 0.0
    for done in range(repeats):
        began = time.monotonic()
        if done and began + longest > deadline:
            break
        for one in samples:
            cpu = time.process_time()
            samples[one].append((*one(), time.process_time() - cpu))
        longest = max(longest, time.monotonic() - began)
    return {one: (samples[one], peaks[one]) for one in samples}, failed


# ---------------------------------------------------------------- the table


HEADINGS = ("sampler", "n", "tokens/s, median (range)", "ours is (range)", "ms/step (range)", "CPU s", "GB/s", "MBU",
            "prefilled", "K/V MiB", "peak MiB")

NOTES = """\
n: timed rounds. tokens/s: new tokens over the whole call, prefill included unless the case says decode alone.
"ours is": tokens/s of ours over this sampler's in the same round; above 1 ours is faster. ms/step: the call after its
first token, over N - 1 steps (transformers' own set-up of a call counts as prefill). CPU s: processor time of the whole
call, all threads, median; where neighbours take the cores, compare this. GB/s: what a step cannot avoid reading
(weights, K/V of a prefix once per group, own K/V, logits) over its time; MBU: that over the copy bandwidth above. On a
CPU small weights stay in its cache, which copies do not. prefilled: prompt tokens run through the network, padding
included; continuous batching may find some in its own prefix cache. K/V: ours from shapes, the trunk's hidden states
included; transformers' from its cache object, continuous batching's pages. peak: memory of tensors on a GPU, weights
included; on a CPU growth of the process during its first call."""


def header(args, device, bandwidth):
    """The lines above the table: what ran where, beside what else."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines()
                 if line.startswith("model name")] if info.is_file() else []
        machine = names[0] if names else platform.machine()
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        import triton
        versions.append(f"triton {triton.__version__}")
    if transformers:
        versions.append(f"transformers {transformers.__version__}")
    return (f"# The sampler\n\n{datetime.now():%Y-%m-%d %H:%M}, {machine}, {os.cpu_count()} cores, load average "
            f"{os.getloadavg()[0]:.1f}\n{', '.join(versions)}; {torch.get_num_threads()} torch threads, "
            f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}; {str(args.dtype).removeprefix('torch.')}, copy "
            f"bandwidth {bandwidth / 1e9:.1f} GB/s\n`python {shlex.join(sys.argv)}`\n\n{NOTES}")


def spread(values, form):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def memory(count, device):
    """Bytes as a table cell; what a process grew by says nothing when it is little."""
    if count is None:
        return "-"
    if device.type == "cpu" and count < SMALLEST_GROWTH:
        return f"< {SMALLEST_GROWTH // MIB}"
    return f"{count / MIB:,.0f}"


def table(model, job, results, bandwidth):
    """Markdown rows, one per sampler; the first sampler is the one that the others are compared with."""
    steps = len(job.probes) * (job.new_tokens - 1)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    speeds = {one: [job.total_tokens / sample[0] for sample in samples] for one, (samples, _) in results.items()}
    first = next(iter(results))
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for one, (samples, peak) in results.items():
        ratios = [ours / theirs for ours, theirs in zip(speeds[first], speeds[one])]
        per_step, speed, share = "-", "-", "-"
        if samples[0][1] is not None:
            seconds = [decode / steps for _, decode, _ in samples]
            rate = step_bytes(model, job) / statistics.median(seconds)
            per_step = spread([value * 1e3 for value in seconds], "{:.2f}")
            speed, share = f"{rate / 1e9:.1f}", f"{rate / bandwidth:.0%}"
        if one.device.type == "cuda":  # nothing but the weights and the sampler's own trunk counts as held before
            peak += weights + one.state_bytes
        held = f"{one.kv_bytes / MIB:,.1f}" + (
            "" if one is first else f" ({one.kv_bytes / first.kv_bytes:.1f}x)")
        lines.append("| " + " | ".join((
            one.name, str(len(samples)), spread(speeds[one], "{:,.0f}" if min(speeds[one]) > 100 else "{:.1f}"),
            "" if one is first else spread(ratios, "{:.2f}x"), per_step,
            f"{statistics.median(cpu for _, _, cpu in samples):.2f}", speed, share, f"{one.prefilled:,}", held,
            memory(peak, one.device))) + " |")
    return lines


# ---------------------------------------------------------------- the run


def run_job(model, rival, job, args, bandwidth, deadline):
    """Measure one job; the lines to print about it."""
    samplers = [Ours(model, job)]
    if job.copied:
        samplers.append(Ours(model, job, copied=True))
    if rival is not None and not job.decode_only:
        kinds = {"transformers": Generate, "static": lambda *given: Generate(*given, static=True),
                 "continuous": Continuous}
        samplers += [kinds[name](rival, job) for name in args.rival]
    try:
        results, failed = measure(samplers, args.repeats, deadline)
    finally:
        for one in samplers:
            one.close()
    shape = job.shape + (f" (layers: {args.layers})" if args.layers else "")
    lines = [f"\n**{shape}: {job.name}{', decode alone' if job.decode_only else ''}**\n"]
    if results:
        lines += table(model, job, results, bandwidth)
    return lines + [f"\n{one.name}: did not run on {one.device.type}: {reason}" for one, reason in failed.items()]


def run(args, device, bandwidth, write):
    """All jobs of all cases. Each may use an equal share of the time that is left; what it leaves goes to the rest."""
    jobs = [job for case in args.case for job in jobs_of(case, args.quick)]
    deadline = time.monotonic() + 60 * args.minutes
    built, model, rival = None, None, None
    for i, job in enumerate(jobs):
        left = deadline - time.monotonic()
        if left <= 0:
            write(f"\n**{job.shape}: {job.name}**: not run, the {args.minutes:g} minutes of --minutes are used up")
            continue
        if job.shape != built:
            model = rival = None  # before the next one is built: two of 7B would be 30 GB
            gc.collect()
            model, built = random_model(job.shape, args.layers, device, args.dtype), job.shape
            rival = rival_model(model) if args.rival else None
        share = time.monotonic() + left / (len(jobs) - i)
        try:
            write("\n".join(run_job(model, rival, job, args, bandwidth, share)))
        except torch.OutOfMemoryError:  # each fitted alone, but what they keep between calls did not
            write(f"\n**{job.shape}: {job.name}**: out of memory with {1 + job.copied + len(args.rival)} samplers")
    write(f"\nLoad average at the end: {os.getloadavg()[0]:.1f}")


def parse_args():
    """The command line, with the defaults that depend on the device filled in. Exits with 2 on a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: gpu on CUDA, the others on a CPU")
    parser.add_argument("--rival", type=lambda text: text.split(","), default=[], metavar="A,B",
                        help=f"compare with these as well: {', '.join(RIVALS)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device)
    parser.add_argument("--threads", type=int, help="torch threads, for all samplers; default: torch's")
    parser.add_argument("--layers", type=int, help="fewer layers than the real shapes, for a smoke run")
    parser.add_argument("--quick", action="store_true", help="an eighth of all lengths, 2 rounds: a smoke run")
    parser.add_argument("--repeats", type=int, help="timed rounds at most; default 5")
    parser.add_argument("--minutes", type=float, help="begin no round or case later; default 8 on CUDA, 25 on a CPU")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the Markdown to this file too")
    args = parser.parse_args()
    args.case = args.case or (CASES[-1:] if args.device == "cuda" else CASES[:-1])
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.repeats = args.repeats or (2 if args.quick else 5)
    args.minutes = args.minutes or (8 if args.device == "cuda" else 25)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda was given, but torch sees no CUDA device; allowed here: --device cpu")
    if "gpu" in args.case and args.device == "cpu":
        parser.error("--case gpu needs a CUDA device: 7B at 256 rows would take a CPU hours")
    if not set(args.rival) <= set(RIVALS):
        parser.error(f"--rival {','.join(args.rival)}: allowed are {', '.join(RIVALS)}, separated by commas")
    if args.rival and transformers is None:
        parser.exit(2, "--rival needs transformers, which is not installed here: pip install transformers\n")
    return args


def main():
    args = parse_args()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.rival:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    lines = []

    def write(text):
        print(text, flush=True)
        lines.append(text)
        if args.write:  # after every case: a run that is stopped leaves what it has measured
            args.write.write_text("\n".join(lines) + "\n")

    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    write(header(args, device, bandwidth))
    run(args, device, bandwidth, write)


if __name__ == "__main__":
    main()
