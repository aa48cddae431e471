"""What a run takes: bytes by purpose, what fits, which flag helps; from config.json, before weights are read.

N parameters, W processes; on a GPU bfloat16, on a CPU float32:

                                 GPU, bytes                              CPU
    weights                      2 N                                     4 N
    gradients, float32           4 N, while training                     4 N
    moments, bits of masters     10 N / W; in host memory: --offload     8 N / W
    reference of --kl            2 N                                     4 N
    K/V of what is sampled       the whole time                          while sampling
    activations, the head        while training, of a micro-batch        the same

Activations are what autograd keeps of a layer and token, counted with its hooks: six numbers per channel of
the residual stream (two norms twice, two products' inputs), the fused q, k, v, rotated q and k, padded q, k
and v, two outputs of attention, and four per channel of the MLP; and a copy of its prefix's keys and values
for every row. Standard library only.

Dimension key: D hidden size   I of the MLP   V vocabulary   H query heads   K key/value heads   C head size
"""
import dataclasses
import math
import os
import types
from pathlib import Path

GB = 10**9
PREFILL_TOKENS = 4096      # of one pass, sampler.prefill
SLICE_BYTES = 14 * 2**26   # of parameters that the optimizer steps at a time: master, gradient, integers
MOST_TOKENS = {True: 16384, False: 4096}  # of a micro-batch, on a GPU or not: more gains no speed


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes by purpose. `needed` is the peak: what is always there, and the largest of the three phases."""
    capacity: float
    always: dict
    phases: dict             # "sampling", "training", "optimizer": {purpose: bytes}
    host: dict               # what --offload moves to host memory
    rows: int                # sampled at once
    trunk: int               # tokens of prompts and traces whose K/V are kept
    micro_batch_tokens: int
    tokens: str              # of a step, in words
    advice: str = ""         # what to add where it does not fit

    @property
    def needed(self):
        """Bytes at the highest."""
        return sum(self.always.values()) + max(sum(parts.values()) for parts in self.phases.values())

    @property
    def fits(self):
        """Whether that is no more than there is."""
        return self.needed <= self.capacity

    def lines(self):
        """A table for the reader, GB: a line for what is always there, and one for each phase."""
        out = []
        for name, parts in (("always", self.always), *self.phases.items(), ("on the host", self.host)):
            sizes = [f"{purpose} {size / GB:.3g}" for purpose, size in parts.items() if size]
            if sizes:
                out.append(f"{name:<11} {sum(parts.values()) / GB:>6.3g} GB: {', '.join(sizes)}")
        verdict = "fits" if self.fits else f"does not fit: {self.advice or 'no flag is enough'}"
        out.append(f"{'peak':<11} {self.needed / GB:>6.3g} of {self.capacity / GB:.3g} GB: {verdict}; "
                   f"micro-batches of {self.micro_batch_tokens} tokens")
        # An evaluation has no steps.
        return [*out, f"a step      {self.tokens}"] if "training" in self.phases else out


def count_parameters(shape):
    """(all parameters of a model with the fields of ModelConfig, those of its head)."""
    D, C = shape.hidden_size, shape.head_dim
    H, K = shape.num_attention_heads, shape.num_key_value_heads
    inner, kind = shape.intermediate_size, shape.model_type
    attention = D * (H + 2 * K) * C + H * C * D
    if shape.attention_bias or kind == "qwen2":
        attention += (H + 2 * K) * C
    if shape.attention_bias:
        attention += D
    if kind == "qwen3":
        attention += 2 * C
    mlp = 3 * D * inner
    if shape.mlp_bias:
        mlp += 2 * inner + D
    head = shape.vocab_size * D
    layers = shape.num_hidden_layers * (attention + mlp + 2 * D)
    return layers + D + head * (1 if shape.tie_word_embeddings else 2), head


def activations(shape, size, tokens, copies, recompute):
    """Bytes that autograd keeps of `tokens`, in numbers of `size` bytes. copies: tokens of prefixes, one for
    each row, whose keys and values are copied."""
    D, C = shape.hidden_size, shape.head_dim
    H, K = shape.num_attention_heads, shape.num_key_value_heads
    inner = shape.intermediate_size
    token = 6 * D + (H + K) * C + 3 * H * C + 2 * K * C + 4 * inner
    if shape.model_type == "qwen3":
        token += 2 * (H + K) * C
    layer = size * (token * tokens + 2 * K * C * copies)
    # Gradients of the layer that is on its way back.
    backward = size * tokens * 6 * inner
    if recompute:
        # On a CPU what is kept comes to lie where the widest tensor was, whose place is then too small for
        # the next layer's: measured, 3.2 to 3.6 thousand numbers a token and layer; D = 576, 2 I = 3072.
        kept = D + (2 * inner if size == 4 else 0)
        return layer + backward + size * kept * tokens * shape.num_hidden_layers
    return layer * shape.num_hidden_layers + backward


def head_bytes(shape, on_cuda, tokens):
    """Of log-probs and their gradient: tiles of logits, the gradient of the weight, hidden states twice."""
    tile = 1.5 * 2**28 if on_cuda else 1.5 * 2**26
    # On a GPU in bf16 and, as it is to be added up in float32, at once in that, too.
    weight = shape.vocab_size * shape.hidden_size * (6 if on_cuda else 4)
    return tile + weight + 12 * tokens * shape.hidden_size


def make_plan(shape, config, lengths, capacity, on_cuda, num_ranks=1):
    """What a run takes of `capacity` bytes, and flags with which it fits if it does not: -> Plan.

    shape: fields of model.ModelConfig. config: of config.Config. lengths: (prompt tokens, tokens of the trace
    or 0 of a held-out problem), [] where they are not known: then each counts as --max-new-tokens.
    """
    lengths = lengths or [(config.max_new_tokens, config.max_new_tokens)] * config.problems_per_step
    plan = estimate(shape, config, lengths, capacity, on_cuda, num_ranks)
    if plan.fits:
        return plan
    smaller = {"micro_batch_tokens": 0}  # what fits
    all_flags = {"recompute": True, "offload": True} if on_cuda else {"recompute": True}
    shorter = {"max_new_tokens": max(1, config.max_new_tokens // 2),
               "sample_batch_size": max(1, config.sample_batch_size // 4)}
    for changes in (smaller, {"recompute": True}, {"offload": on_cuda}, all_flags, smaller | all_flags,
                    smaller | all_flags | shorter):
        changed = types.SimpleNamespace(**{**vars(config), **changes})
        found = estimate(shape, changed, lengths, capacity, on_cuda, num_ranks)
        if found.fits:
            values = [getattr(found if name in smaller else changed, name) for name in changes]
            flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                     for name, value in zip(changes, values)]
            return dataclasses.replace(plan, advice=f"give {' '.join(flags)}")
    return plan


def estimate(shape, config, lengths, capacity, on_cuda, num_ranks):
    """make_plan, without advice."""
    size = 2 if on_cuda else 4
    N, head = count_parameters(shape)
    # On a GPU the optimizer's state can be elsewhere, on a CPU it cannot.
    name, number = ("masters' bits and moments", 10) if on_cuda else ("moments", 8)
    trained = 0 if config.eval else N
    gradients = {"gradients": 4 * trained}
    state = {name: number * max(trained / num_ranks, min(head, trained))}  # no tensor is split
    host = state if config.offload and on_cuda else {}
    always = {"weights": size * N, "reference of --kl": size * N if config.kl else 0,
              **(state if not host else {name: 0}), "Python and torch": 0 if on_cuda else 0.35 * GB}
    left = capacity - sum(always.values()) - 4 * trained
    rows, trunk, cache, sampling = sampling_parts(shape, config, lengths, left, on_cuda)
    always["K/V"] = cache
    if not on_cuda:
        # The process keeps what it frees, in pieces of which training can use few: this adds up.
        laid_out = N if shape.tie_word_embeddings else N - head  # of the embedding there is no product
        always |= {"weights laid out to sample": size * laid_out, **sampling}
        sampling = {}
    left = capacity - sum(always.values()) - 4 * trained
    tokens = config.micro_batch_tokens or MOST_TOKENS[on_cuda]
    training = training_parts(shape, config, lengths, tokens, on_cuda)
    while not config.micro_batch_tokens and tokens > 64 and sum(training.values()) > 0.8 * left:
        tokens //= 2
        training = training_parts(shape, config, lengths, tokens, on_cuda)
    slices = {"a slice of parameters": min(SLICE_BYTES, 14 * head) if on_cuda else 0}
    phases = {"sampling": sampling}
    if trained:
        phases |= {"training": gradients | training, "optimizer": gradients | slices}
    unaided = config.problems_per_step * config.group_size * config.max_new_tokens
    probes = math.ceil(math.log2(config.max_episodes))
    text = f"at most {unaided:,} tokens sampled unaided, {unaided:,} trained on"
    if config.method == "bread":
        text += f", and as many in each of {probes} rounds of probes"
    elif config.method == "sft":
        text = f"{config.problems_per_step} traces, all of them trained on"
    return Plan(capacity, always, phases, host, rows, trunk, tokens, text)


def sampling_parts(shape, config, lengths, left, on_cuda):
    """(rows at once, tokens of the trunk, bytes of K/V, {purpose: bytes beside them})."""
    size = 2 if on_cuda else 4
    token = 2 * size * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    # Question and trace of the step's longest problems, or the prompts of an evaluation's batch.
    held_out = sorted(prompt for prompt, trace in lengths if not trace)[-config.sample_batch_size:]
    trunk = max(sum(sorted(map(sum, lengths))[-config.problems_per_step:]), sum(held_out))
    # On a GPU places are kept for the whole run: a third of what is left, at most, where training follows.
    share = 0.8 if config.eval else 1 / 3
    most = int((share * left / token - 2 * trunk) // config.max_new_tokens)
    if not on_cuda:
        most = max(config.problems_per_step * config.group_size, len(held_out))
    rows = max(1, min(config.sample_batch_size, most))
    # The trunk is there twice, as a captured step reads a copy, and a plain one a copy for each tile.
    cache = token * (rows * config.max_new_tokens + 2 * trunk)
    passed = min(PREFILL_TOKENS + max(map(sum, lengths)), trunk)
    prefill = 4 * size * passed * (shape.intermediate_size + shape.hidden_size)
    return rows, trunk, cache, {"logits": 8 * rows * shape.vocab_size, "a pass of prompts": prefill}


def training_parts(shape, config, lengths, most, on_cuda):
    """{purpose: bytes} of a micro-batch of at most so many tokens, gradients apart: whole groups of the
    longest kind, or of one that is larger as many rows as fit, each with a copy of its prefix."""
    size = 2 if on_cuda else 4
    prompt = max(prompt for prompt, _ in lengths)
    new = config.max_new_tokens
    group_size = config.group_size
    if config.method == "sft":
        new = max(1, max(trace for _, trace in lengths))
        group_size = 1
    group = prompt + group_size * new
    num_rows = max(1, (most - prompt) // new)
    tokens = prompt + num_rows * new
    if group <= most:
        num_groups = min(most // group, config.problems_per_step)
        num_rows = num_groups * group_size
        tokens = num_groups * group
    return {"activations": activations(shape, size, tokens, num_rows * prompt, config.recompute),
            "log-probs": head_bytes(shape, on_cuda, tokens)}


def host_memory():
    """Bytes of this machine's memory, or of the container's share of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))
