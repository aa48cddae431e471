"""Times sampler.py against other ways to sample the same tokens from the same weights, by turns.

    python bench/sampler.py                                      # every case that fits the machine
    python bench/sampler.py --rival transformers static
    python bench/sampler.py --case tiny prefix --rival transformers --threads 1 --write FILE
    python bench/sampler.py --quick --layers 2                   # a smoke run, its numbers mean nothing
    python bench/sampler.py --check --layers 4                   # its kernels against plain PyTorch, no times

Weights are random, and nothing stops a row early: every sampler draws exactly the same number of tokens from
the full distribution (temperature 1, no top-k, no top-p). "tokens/s" counts them over the whole call, prefill
included. "ms/step": the call after its first token, over N - 1 steps (transformers' set-up of a call counts
as prefill). "prefilled": prompt tokens run through the network, padding included.

"ours" computes a prefix once and its rows share it. "ours, copied" is the same code as a sampler without
sharing would use it: every row is prefilled and holds a prefix of its own, anew for every probe of a search.
"""
import dataclasses
import importlib
import itertools
import random
import statistics
import sys
import tempfile
import time

import timing
import torch

transformers = timing.import_rival("transformers")  # before our own files
from model import config_dict
from sampler import Fork, SamplingParams, branch, prefill

CASES = ("tiny", "branches", "0.5b", "search", "prefix", "gpu")  # the quick ones first


# ---------------------------------------------------------------- what is sampled


@dataclasses.dataclass(frozen=True)
class Job:
    """Rows to sample: `probes` one after another, all (sequence, prefix length, rows) of a probe at once."""
    shape: str
    what: str
    lengths: list            # of the sequences
    probes: list
    new_tokens: int          # per row
    copied: bool = False     # measure "ours, copied" too

    @property
    def sequences(self):
        return [random_ids(length, seed) for seed, length in enumerate(self.lengths)]

    def prompts(self, probe):
        """The prompt of every row of a probe, as a sampler without sharing is given them."""
        sequences = self.sequences
        return [sequences[i][:length] for i, length, rows in probe for _ in range(rows)]


def random_ids(count, seed=0):
    """Token ids below 64, which every vocabulary here has; which ones, decides nothing about the time."""
    return random.Random(seed).choices(range(64), k=count)


def group_job(shape, rows, group, prompt, new, copied=False):
    """`rows` rows in groups of `group`, every group with a prompt of its own: generate's ordinary work."""
    probe = [(i, prompt, group) for i in range(rows // group)]
    what = f"{rows} rows" + (", all prompts distinct" if group == 1 else f" in groups of {group}")
    return Job(shape, f"{what}, {prompt} + {new}", [prompt] * len(probe), [probe], new, copied)


def branch_job(shape, rows, question, trace, new):
    """Three groups that leave one trace at 25, 50 and 75 % of it, sampled together."""
    probe = [(0, question + trace * quarter // 4, rows) for quarter in (1, 2, 3)]
    what = f"branches at 25, 50, 75 % of a trace of {trace}, {rows} rows each, {new} new"
    return Job(shape, what, [question + trace], [probe], new)


def search_job(shape, rows, question, trace, new):
    """An anchor search: four cuts of one trace in the order of a binary search, each a group of its own."""
    probes = [[(0, question + trace * part // 16, rows)] for part in (8, 4, 6, 5)]
    what = f"search of 4 probes, trace of {trace}, {rows} rows each, {new} new"
    return Job(shape, what, [question + trace], probes, new, copied=True)


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
    if case in ("0.5b", "prefix"):
        return [group_job(small, rows, 8, n(128 if case == "0.5b" else 1024), n(64)) for rows in (8, 32)]
    jobs = [branch_job(small, 32, n(64), n(2048), n(256)), search_job(small, 64, n(64), n(512), n(256))]
    for shape in (small, "qwen2.5-1.5b", "qwen2.5-7b"):
        jobs += [group_job(shape, rows, 16, n(512), n(512)) for rows in (64, 256)]
        # Copies of 7B take 10 s to prefill, which is no part of the question.
        jobs.append(group_job(shape, 256, 16, n(2048), n(128), copied=shape != "qwen2.5-7b"))
    return jobs


# ---------------------------------------------------------------- samplers


class OurSampler:
    """sampler.py. A call samples the job once and returns (seconds, seconds of them after the prefill)."""

    def __init__(self, model, job, copied=False):
        self.name = "ours, copied" if copied else "ours"
        self.model = model
        self.new_tokens = job.new_tokens
        self.device = model.lm_head.weight.device
        self.ops = None  # plain PyTorch
        if self.device.type == "cuda":
            self.ops = importlib.import_module("kernels")
        self.rounds = []
        row_ids = itertools.count()
        for i, probe in enumerate(job.probes):
            if copied:
                sequences = job.prompts(probe)
                forks = [Fork(j, len(ids), (next(row_ids),)) for j, ids in enumerate(sequences)]
            else:  # the first probe fills the trunk, the others find it filled
                sequences = job.sequences if i == 0 else []
                forks = [Fork(j, n, tuple(itertools.islice(row_ids, rows))) for j, n, rows in probe]
            self.rounds.append((sequences, forks))
        self.prefilled = sum(len(ids) for sequences, _ in self.rounds for ids in sequences)

    def __call__(self):
        decode = 0.0
        began = timing.now(self.device)
        for sequences, forks in self.rounds:
            if sequences:
                trunk = prefill(self.model, sequences)
            filled = timing.now(self.device)
            groups = branch(self.model, trunk, forks, SamplingParams(self.new_tokens), ops=self.ops)
            ended = timing.now(self.device)
            decode += ended - filled
            assert all(len(row.token_ids) == self.new_tokens for group in groups for row in group)
        return ended - began, decode


def rival_model(model):
    """The same weights in transformers: through a folder on a CPU, by sharing the tensors on a GPU."""
    weight = model.lm_head.weight
    auto = transformers.AutoModelForCausalLM
    options = {"dtype": weight.dtype, "attn_implementation": "sdpa"}
    if weight.device.type == "cpu":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            rival = auto.from_pretrained(folder, **options)
    else:  # 7B are 15 GB
        fields = config_dict(model, str(weight.dtype).removeprefix("torch."))
        with torch.device(weight.device):
            rival = auto.from_config(transformers.AutoConfig.for_model(**fields), **options)
        rival.load_state_dict(model.state_dict(), assign=True)
        rival.tie_weights()
    rival.eval()
    tokens_BT = torch.tensor([random_ids(32)], device=weight.device)
    with torch.no_grad():
        ours_BTV = model.logits(model(tokens_BT))
        theirs_BTV = rival(tokens_BT).logits.float()
    gap = float((ours_BTV - theirs_BTV).abs().max() / theirs_BTV.abs().max())
    # bf16 has 8 bits, and every layer rounds in another order; a wrong weight is off by the scale itself.
    assert gap < (0.1 if weight.dtype == torch.bfloat16 else 1e-4), gap
    return rival


def full_distribution(new_tokens, **options):
    """transformers' settings for what ours does: anew for every call, as generate_batch writes into them."""
    return transformers.GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                                         eos_token_id=None, max_new_tokens=new_tokens, **options)


class Generate:
    """transformers' `generate`, a batch per probe, a dynamic or static cache; called like `OurSampler`."""

    def __init__(self, model, job, static=False):
        self.name = "transformers, static cache" if static else "transformers"
        self.model = model
        self.new_tokens = job.new_tokens
        self.options = {"cache_implementation": "static"} if static else {}
        self.batches = []
        for prompts in map(job.prompts, job.probes):
            longest = max(map(len, prompts))
            tokens = [[0] * (longest - len(ids)) + ids for ids in prompts]
            mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
            self.batches.append([torch.tensor(rows, device=model.device) for rows in (tokens, mask)])
        self.prefilled = sum(tokens_BT.numel() for tokens_BT, _ in self.batches)

    def __call__(self):
        # What a static cache leaves here (the name depends on its release) would make the next as long.
        for name in ("_cache", "_previous_max_cache_length"):
            self.model.__dict__.pop(name, None)
        decode = 0.0
        began = timing.now(self.model.device)
        for tokens_BT, mask_BT in self.batches:
            first = FirstTokenClock(self.model.device, len(tokens_BT))
            config = full_distribution(self.new_tokens, **self.options)
            with torch.inference_mode():
                out_BT = self.model.generate(tokens_BT, attention_mask=mask_BT, generation_config=config,
                                             stopping_criteria=transformers.StoppingCriteriaList([first]))
            ended = timing.now(self.model.device)
            decode += ended - first.time
            assert out_BT.shape[1] == tokens_BT.shape[1] + self.new_tokens, out_BT.shape
        return ended - began, decode


class FirstTokenClock:
    """Stopping criterion that never stops: it notes when the first token is there, which ends the prefill."""

    def __init__(self, device, rows):
        self.time = None
        self.never_R = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids, scores, **_):
        if self.time is None:
            self.time = timing.now(self.never_R.device)
        return self.never_R


# ---------------------------------------------------------------- one job after the other


def measure_job(model, rival, job, args, deadline):
    """Measure one job, as Markdown."""
    samplers = [OurSampler(model, job)]
    samplers += [OurSampler(model, job, copied=True)] if job.copied else []
    samplers += [Generate(rival, job, static=name == "static") for name in args.rival]
    results, failed = timing.take_turns(samplers, args.device, args.repeats, deadline)
    steps = len(job.probes) * (job.new_tokens - 1)
    total = job.new_tokens * sum(rows for probe in job.probes for _, _, rows in probe)

    def more(one, samples):
        speed = total / statistics.median(seconds for seconds, _, _ in samples)
        per_step = timing.spread([1e3 * decode / steps for _, decode, _ in samples], "{:.2f}")
        return f"{speed:,.1f}", per_step, f"{one.prefilled:,}"
    title = f"\n**{job.shape}{f', {args.layers} layers' if args.layers else ''}: {job.what}**\n\n"
    return title + timing.comparison(results, failed, ("tokens/s", "ms/step (range)", "prefilled"), more)


def measure_all(args, write):
    """All jobs of all cases. Each may use an equal share of the time that is left."""
    jobs = [job for case in args.case for job in jobs_of(case, args.quick)]
    deadline = time.monotonic() + 60 * args.minutes
    built = None
    for i, job in enumerate(jobs):
        left = deadline - time.monotonic()
        if left <= 0:
            write(f"\n**{job.shape}: {job.what}**: not run, --minutes {args.minutes:g} are used up")
            continue
        if job.shape != built:
            model = rival = None  # before the next one is built: two of 7B would be 30 GB
            model = timing.random_model(job.shape, args.layers, args.dtype, args.device)
            rival = rival_model(model) if args.rival else None
            built = job.shape
        share = time.monotonic() + left / (len(jobs) - i)
        write(measure_job(model, rival, job, args, share))


def check(args, dtype):
    """branch() with the device's operations against plain PyTorch: rows of all lengths, stops, refills.

    In float32 all rows must have plain's tokens and log-probs within 1e-5. In bf16 sums round in another
    order, and one other token changes all that follow: the share of equal rows is printed. In both, the same
    call twice must give the same rows.
    """
    model = timing.random_model("tiny" if args.quick else "qwen2.5-0.5b", args.layers, dtype, args.device)
    prompts = [random_ids(length, length) for length in (5, 17, 64, 130, 257)]
    forks = []  # three in each prompt, six rows each, which may sample 5, 12 or 19 tokens
    for i, prompt in enumerate(prompts):
        for j in range(3):
            row_ids = tuple(range(100 * i + 10 * j, 100 * i + 10 * j + 6))
            forks.append(Fork(i, max(1, len(prompt) - 3 * j), row_ids, 5 + 7 * j))
    params = SamplingParams(40, 1.0, tuple(range(0, model.config.vocab_size, 40)), seed=1)
    trunk = prefill(model, prompts)
    ops = importlib.import_module("kernels") if args.device.type == "cuda" else None
    found = []
    for places, used in ((90, None), (90, ops), (16, ops), (16, ops)):
        groups = branch(model, trunk, forks, params, max_rows=places, ops=used)
        found.append([row for group in groups for row in group])
        pairs = [(a, b) for a, b in zip(found[0], found[-1]) if a.token_ids == b.token_ids]
        gap = max(abs(x - y) for a, b in pairs for x, y in zip(a.logprobs, b.logprobs))
        print(f"{dtype}, {places} places, {'kernels' if used else 'plain PyTorch'}: {len(pairs)} of "
              f"{len(found[0])} rows have plain's tokens, log-probs within {gap:.1e}", flush=True)
        if dtype == torch.float32 and (len(pairs) < len(found[0]) or gap > 1e-5):
            return False
    return [row.token_ids for row in found[2]] == [row.token_ids for row in found[3]]


def main():
    parser = timing.new_parser(__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: gpu on CUDA, the others on a CPU")
    parser.add_argument("--rival", nargs="+", choices=("transformers", "static"), default=[],
                        help="compare with transformers' generate, with a dynamic or a static cache")
    parser.add_argument("--layers", type=int, help="fewer layers than the real shapes, for a smoke run")
    parser.add_argument("--quick", action="store_true", help="an eighth of all lengths: a smoke run")
    parser.add_argument("--minutes", type=float, default=10, help="begin no round later; default 10")
    parser.add_argument("--check", action="store_true", help="exit status 1 where tokens differ")
    args = timing.parse(parser)
    args.case = args.case or (CASES[-1:] if args.device.type == "cuda" else CASES[:-1])
    if args.rival and transformers is None:
        parser.error("--rival needs transformers, which is not installed here: pip install transformers")
    if args.check:
        dtypes = sorted({torch.float32, args.dtype}, key=str)
        return 0 if all([check(args, dtype) for dtype in dtypes]) else 1
    if args.rival:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    measure_all(args, timing.writer("The sampler", args))


if __name__ == "__main__":
    sys.exit(main())
