"""Times sampler.py against other ways to sample, by turns: with lengths of real prompts, and equal ones.

    python bench/sampler.py                                      # every case that fits the machine
    python bench/sampler.py --rival transformers --case tiny real --write FILE
    python bench/sampler.py --quick --layers 2                   # a smoke run, its numbers mean nothing
    python bench/sampler.py --profile                            # where a step's time goes; graphs captured

Cases `real` and `evaluation` have the lengths of GSM8K's first test questions and their solutions, `gpu` has
both; in `tiny` and `0.5b` all prompts are equally long, which no data set's are. Token ids are made
up, as they do not decide the time, and so are weights. Only `gpu` has rows that stop early: elsewhere every
sampler draws the same number of tokens, from the full distribution (temperature 1, no top-k, no top-p).

"tokens/s" counts sampled tokens over the whole call, prefill included. "ms/step": the call after its prefill
over N - 1 steps; ours draws the first token in it, for transformers that and its set-up count as prefill. "of
floor": what no step can do without (`floor`), over that. "prefilled": prompt tokens, padding included.

"ours" computes a prefix once and its rows share it. "ours, copied" is the same code as a sampler without
sharing would use it: every row is prefilled and holds a prefix of its own, anew for every probe of a search.
"""
import dataclasses
import importlib
import itertools
import random
import statistics
import sys
import time
import types

import timing
import torch

transformers = timing.import_rival("transformers")  # before our own files
from model import checkpoint_tensors, config_dict
from sampler import Fork, Places, SamplingParams, branch, prefill

CASES = ("tiny", "real", "0.5b", "evaluation", "gpu")  # the quick ones first
COLUMNS = ("tokens/s", "ms/step (range)", "of floor", "prefilled")


# ---------------------------------------------------------------- what is sampled


@dataclasses.dataclass(frozen=True)
class Job:
    """Rows to sample: `probes` one after another, all (sequence, prefix length, rows) of a probe at once."""
    shape: str
    what: str
    lengths: list            # of the sequences
    probes: list
    new_tokens: int          # per row, at most
    copied: bool = False     # measure "ours, copied" too
    stops: bool = False      # every 64th token ends its row; nothing does otherwise

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


def group_job(shape, lengths, group, new, copied=False, stops=False):
    """A group of `group` rows behind each prompt; 1 is an evaluation, and generate's ordinary work."""
    probe = [(i, length, group) for i, length in enumerate(lengths)]
    what = f"equal lengths: {len(lengths)} prompts of {lengths[0]}"
    if len(set(lengths)) > 1:
        what = f"lengths as they come: {len(lengths)} prompts of {min(lengths)} to {max(lengths)}"
    what += f" tokens, {group} rows each, {new} new" + (" at most, 64 on average" if stops else "")
    return Job(shape, what, lengths, [probe], new, copied, stops)


def search_job(shape, questions, traces, group, new):
    """Anchor searches in lockstep: each probe halves what is left of a trace, by chance to either side."""
    sides = random.Random(0)
    parts = [8] * len(traces)  # sixteenths of its trace that each problem shows
    probes = []
    for half in (4, 2, 1, 1):
        shown = enumerate(zip(questions, traces, parts))
        probes.append([(i, question + trace * part // 16, group) for i, (question, trace, part) in shown])
        parts = [part + sides.choice((-half, half)) for part in parts]
    whole = [question + trace for question, trace in zip(questions, traces)]
    what = (f"lengths as they come: search of 4 probes, {len(traces)} problems with traces of {min(traces)} "
            f"to {max(traces)} tokens, {group} rows each, {new} new")
    return Job(shape, what, whole, probes, new, copied=True)


def jobs_of(case, args):
    """The jobs of a case. --quick divides all lengths by 8: enough to see that everything runs."""
    def n(*lengths):
        return [max(4, length // 8) if args.quick else length for length in lengths]

    on_cpu = args.device.type == "cpu"
    real = "smollm2-135m" if on_cpu else "qwen2.5-1.5b"
    large = "tiny" if on_cpu else "qwen2.5-1.5b"  # so that `gpu` can be tried on a CPU
    largest = "tiny" if on_cpu else "qwen2.5-7b"
    if case == "tiny":
        return [group_job("tiny", n(64) * (rows // group), group, *n(128)) for rows in (64, 256)
                for group in (8, 1)]
    if case == "real":
        return [group_job(real, n(*timing.QUESTIONS[:64]), 1, *n(48)),
                group_job(real, n(*timing.QUESTIONS[:32]), 8, *n(48)),
                search_job(real, n(*timing.QUESTIONS[:16]), n(*timing.SOLUTIONS), 8, *n(32))]
    if case == "evaluation":
        return [group_job(real, n(*timing.QUESTIONS), 1, *n(256))]
    if case == "0.5b":
        return [group_job("qwen2.5-0.5b", n(prompt) * 4, 8, *n(64)) for prompt in (128, 1024)]
    jobs = [group_job(large, n(512) * 4, 16, *n(512)), group_job(large, n(512) * 16, 16, *n(512)),
            group_job(large, n(2048) * 16, 16, *n(128), copied=True)]
    # Places fall idle one by one: the batch shrinks; with 1024 rows in 256 places, they are filled again.
    jobs += [group_job(large, n(*timing.QUESTIONS[:groups]), 16, *n(512), stops=True) for groups in (16, 64)]
    jobs += [group_job(largest, n(512) * groups, 16, *n(512)) for groups in (4, 16)]
    return jobs


def floor(model, job, bandwidth, rate):
    """Seconds that the average step of a sampler that shares prefixes cannot do without: the larger of
    bytes / `bandwidth` (weights, a prefix once per group, own K/V, logits) and operations / `rate`. The
    step that samples token s + 1 finds s own tokens of a row: N / 2 on average."""
    config = model.config
    head_VD = model.lm_head.weight
    matrices = head_VD.numel() + sum(weight.numel() for weight in model.model.layers.parameters())
    per_token = config.num_hidden_layers * config.head_dim  # of one head
    forks = [fork for probe in job.probes for fork in probe]
    rows = sum(count for _, _, count in forks)
    stored = rows * job.new_tokens / 2 + sum(length for _, length, _ in forks)
    attended = rows * job.new_tokens / 2 + sum(length * count for _, length, count in forks)
    values = len(job.probes) * matrices + 2 * config.num_key_value_heads * per_token * stored
    num_bytes = head_VD.element_size() * values + 4 * rows * config.vocab_size
    operations = 2 * rows * matrices + 4 * config.num_attention_heads * per_token * attended
    return max(num_bytes / bandwidth, operations / rate) / len(job.probes)


# ---------------------------------------------------------------- samplers


class OurSampler:
    """sampler.py. A call samples the job once and returns (seconds, seconds of them after the prefill)."""

    def __init__(self, model, job, copied=False, ops=None):
        """ops: as the sampler's; default: our kernels on CUDA, plain PyTorch on a CPU."""
        self.name = "ours, copied" if copied else "ours"
        self.model = model
        self.device = model.lm_head.weight.device
        stop_ids = range(0, model.config.vocab_size, 64) if job.stops else ()
        self.params = SamplingParams(job.new_tokens, stop_token_ids=tuple(stop_ids))
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
        self.tokens = None  # sampled in a call, which are always the same
        if self.device.type == "cuda":
            model.ops = importlib.import_module("kernels")
            ops = ops or model.ops
        # Kept from call to call, as in a run: graphs are captured once.
        trunk_room = max(sum(map(len, sequences)) for sequences, _ in self.rounds)
        self.places = Places(model, 256, ops, job.new_tokens, trunk_room) if ops else None

    def __call__(self):
        decode = 0.0
        self.tokens = 0
        began = timing.now(self.device)
        for sequences, forks in self.rounds:
            if sequences:
                trunk = prefill(self.model, sequences)
            filled = timing.now(self.device)
            groups = branch(self.model, trunk, forks, self.params, self.places)
            decode += timing.now(self.device) - filled
            self.tokens += sum(len(row.token_ids) for group in groups for row in group)
        return timing.now(self.device) - began, decode


def rival_model(model):
    """A model of transformers that shares the tensors of ours: 7B are 15 GB."""
    weight = model.lm_head.weight
    config = transformers.AutoConfig.for_model(**config_dict(model, str(weight.dtype).removeprefix("torch.")))
    with torch.device(weight.device):
        rival = transformers.AutoModelForCausalLM.from_config(config, dtype=weight.dtype,
                                                              attn_implementation="sdpa")
    tensors = checkpoint_tensors(model)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])  # tied
    rival.load_state_dict(tensors, assign=True)
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


class Generate:
    """transformers' `generate`, a batch per probe, padded on the left; called like `OurSampler`."""
    name = "transformers"

    def __init__(self, model, job):
        self.model = model
        # What ours does: the full distribution.
        self.options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
                            eos_token_id=None, max_new_tokens=job.new_tokens)
        self.batches = []
        for prompts in map(job.prompts, job.probes):
            longest = max(map(len, prompts))
            tokens = [[0] * (longest - len(ids)) + ids for ids in prompts]
            mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
            self.batches.append([torch.tensor(rows, device=model.device) for rows in (tokens, mask)])
        self.prefilled = sum(tokens_BT.numel() for tokens_BT, _ in self.batches)
        self.tokens = sum(len(tokens_BT) for tokens_BT, _ in self.batches) * job.new_tokens

    def __call__(self):
        firsts = []

        def note_first(input_ids, _scores, **_):
            """A stopping criterion that never stops: the first token is there, which ends the prefill."""
            if len(firsts) == 0:
                firsts.append(timing.now(self.model.device))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=self.model.device)

        decode = 0.0
        began = timing.now(self.model.device)
        for tokens_BT, mask_BT in self.batches:
            firsts.clear()
            config = transformers.GenerationConfig(**self.options)  # anew: generate writes into it
            with torch.inference_mode():
                out_BT = self.model.generate(
                    tokens_BT, attention_mask=mask_BT, generation_config=config,
                    stopping_criteria=transformers.StoppingCriteriaList([note_first]))
            decode += timing.now(self.model.device) - firsts[0]
            assert out_BT.shape[1] == tokens_BT.shape[1] + self.options["max_new_tokens"], out_BT.shape
        return timing.now(self.model.device) - began, decode


# ---------------------------------------------------------------- one job after the other


def measure_job(model, rival, job, args, rates, deadline):
    """Measure one job, as Markdown. rates: (bytes per second, FLOP/s) that the device reaches."""
    samplers = [OurSampler(model, job)]
    samplers += [OurSampler(model, job, copied=True)] if job.copied else []
    if rival and not job.stops:  # it draws other tokens, so that its rows would end elsewhere
        samplers.append(Generate(rival, job))
    results, failed = timing.take_turns(samplers, args.device, args.repeats, deadline)

    def more(one, samples):
        speed = f"{one.tokens / statistics.median(seconds for seconds, _, _ in samples):,.1f}"
        if job.stops:  # how many steps there are, is the sampler's own affair
            return speed, "", "", f"{one.prefilled:,}"
        steps = [decode / (len(job.probes) * (job.new_tokens - 1)) for _, decode, _ in samples]
        per_step = timing.spread([1e3 * step for step in steps], "{:.2f}")
        of_floor = f"{floor(model, job, *rates) / statistics.median(steps):.0%}"
        return speed, per_step, of_floor, f"{one.prefilled:,}"
    title = f"\n**{job.shape}{f', {args.layers} layers' if args.layers else ''}; {job.what}**\n\n"
    return title + timing.comparison(results, failed, COLUMNS, more)


def measure_all(args, write, rates):
    """All jobs of all cases. Each may use an equal share of the time that is left."""
    jobs = [job for case in args.case for job in jobs_of(case, args)]
    deadline = time.monotonic() + 60 * args.minutes
    built = None
    for i, job in enumerate(jobs):
        left = deadline - time.monotonic()
        if left <= 0:
            write(f"\n**{job.shape}; {job.what}**: not run, --minutes {args.minutes:g} are used up")
            continue
        if job.shape != built:
            model = rival = None  # before the next one is built: two of 7B would be 30 GB
            model = timing.random_model(job.shape, args.layers, args.dtype, args.device)
            rival = rival_model(model) if args.rival else None
            built = job.shape
        share = time.monotonic() + left / (len(jobs) - i)
        write(measure_job(model, rival, job, args, rates, share))


def profile(args, write):
    """Where the time of 10 eager steps of 256 rows goes, and what captures cost when a training begins."""
    shape = "qwen2.5-1.5b" if args.device.type == "cuda" else "tiny"
    model = timing.random_model(shape, args.layers, args.dtype, args.device)
    ops = importlib.import_module("kernels" if args.device.type == "cuda" else "sampler")
    captures = []

    def counted(step):
        began = timing.now(args.device)
        replay = ops.capture(step)
        captures.append(timing.now(args.device) - began)
        return replay

    job = group_job(shape, [512] * 16, 16, 11)
    ours = OurSampler(model, job, ops=types.SimpleNamespace(**vars(ops) | {"capture": None}))
    ours()  # compiles kernels
    with torch.profiler.profile() as profiler:
        ours()
    table = profiler.key_averages().table(sort_by=f"self_{args.device.type}_time_total", row_limit=25)
    write(f"{job.what}: the prefill and 10 steps\n\n```\n{table}\n```\n")
    # A BREAD step samples a group for every problem, and then searches.
    search = search_job(shape, timing.QUESTIONS[:16], timing.SOLUTIONS, 8, 32)
    base = [(i, length, 8) for i, length in enumerate(timing.QUESTIONS[:16])]
    whole = dataclasses.replace(search, probes=[base, *search.probes])
    capture = ops.capture and counted  # None on a CPU
    ours = OurSampler(model, whole, ops=types.SimpleNamespace(**vars(ops) | {"capture": capture}))
    for number in (1, 2, 3):
        captures.clear()
        seconds, _ = ours()
        write(f"BREAD step {number}: sampling took {seconds:.3f} s, {sum(captures):.3f} s of them for "
              f"{len(captures)} graphs and the eager steps before each")


def main():
    parser = timing.new_parser(__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: tiny real 0.5b; on CUDA real gpu")
    parser.add_argument("--rival", choices=["transformers"], help="compare with transformers' generate")
    parser.add_argument("--layers", type=int, help="fewer layers than the real shapes, for a smoke run")
    parser.add_argument("--quick", action="store_true", help="an eighth of all lengths: a smoke run")
    parser.add_argument("--minutes", type=float, default=10, help="begin no round later; default 10")
    parser.add_argument("--profile", action="store_true", help="instead of times: what a step consists of")
    args = timing.parse(parser)
    args.case = args.case or (("real", "gpu") if args.device.type == "cuda" else CASES[:3])
    if args.rival and transformers is None:
        parser.error("--rival needs transformers, which is not installed here: pip install transformers")
    if args.profile:
        return profile(args, timing.writer("A step of the sampler, profiled", args))
    rates = timing.copy_bandwidth(args.device), timing.matmul_rate(args.device, args.dtype)
    facts = f"copy {rates[0] / 1e9:.1f} GB/s, matrix product {rates[1] / 1e12:.3g} TFLOP/s"
    measure_all(args, timing.writer(__doc__, args, facts), rates)


if __name__ == "__main__":
    sys.exit(main())
