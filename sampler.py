"""Batched sampling with a KV cache for rows that share prefixes: prefill once, branch anywhere.

    trunk    [ question | expert trace ............ ]     K/V computed once, stored once
                        |         |
    branch 1            +-- o o o o     row 0             a branch names a position of the trunk; its rows
                        +-- o o         row 1             own the K/V of the tokens they sample, nothing else
    branch 2                      +-- o o o   row 2
                                  +-- o o     row 3

K/V before a position do not depend on what follows, so every branch point is a slice of the trunk. Attention of
a row is softmax over [prefix ; own tokens], computed as two partial softmaxes merged by their log-sum-exp: the
prefix part is one matrix product for all rows and heads of a group (Hydragen, arXiv 2402.05099).

Works with any model that has `model(tokens_BT, positions_BT, cache) -> hidden_BTD`, `model.logits(hidden_BTD)`
and calls `cache.attend(layer, q_BHTC, k_BKTC, v_BKTC) -> out_BHTC` in its layers. Only torch is imported.

Dimension key: R rows   V vocabulary   H query heads   K key/value heads   C head size   N tokens of the trunk
    S own tokens of a row   M queries that share keys   B, T, D as in the model
"""
import dataclasses
import itertools

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample. Temperature 0 is greedy. No top-k or top-p: the policy is trained on what it samples."""
    max_new_tokens: int = 512
    temperature: float = 1.0
    stop_token_ids: tuple = ()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """Sampled token ids (the stop token kept), their log-probs in nats, and "stop" or "length"."""
    token_ids: list
    logprobs: list
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Fork:
    """A branch point: `len(row_ids)` rows continue `sequence` of the trunk after its first `length` tokens.

    A row's randomness is keyed by (seed, its row id, position) and by nothing else, so give every row of a run
    its own id. At most `max_new_tokens` are sampled (None: as the sampling parameters say).
    """
    sequence: int
    length: int
    row_ids: tuple
    max_new_tokens: int | None = None


def generate(model, prompts, params, num_samples=1):
    """`num_samples` completions of every prompt: list of token-id lists -> list of lists of Completion.

    Row ids are prompt index * num_samples + sample index; for control over them use `prefill` and `branch`.
    """
    forks = [Fork(i, len(prompt), tuple(range(i * num_samples, (i + 1) * num_samples)))
             for i, prompt in enumerate(prompts)]
    return branch(model, prefill(model, prompts), forks, params)


# ---------------------------------------------------------------- trunk


class Trunk:
    """K/V and last hidden states of whole sequences, flat and without padding: keys[layer] is (K, N, C).

    Sequence i lies at starts[i] .. starts[i] + lengths[i]. Sequences of equal length are neighbours, so that
    the rows branching from them can be served by one batched product.
    """

    def __init__(self, lengths):
        self.lengths = list(lengths)
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        ends = list(itertools.accumulate(self.lengths[i] for i in order))
        self.starts = dict(zip(order, [0, *ends]))
        self.order, self.num_tokens = order, sum(self.lengths)
        self.keys, self.values, self.hidden_ND = [], [], None
        self.pass_start, self.pass_lengths = 0, []  # what the forward pass under way is writing

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """Store the K/V of one packed row (B = 1) of sequences; attention is causal inside each of them."""
        if layer == len(self.keys):
            _, K, _, C = k_BKTC.shape
            self.keys.append(k_BKTC.new_empty(K, self.num_tokens, C))
            self.values.append(k_BKTC.new_empty(K, self.num_tokens, C))
        here = slice(self.pass_start, self.pass_start + k_BKTC.shape[2])
        self.keys[layer][:, here], self.values[layer][:, here] = k_BKTC[0], v_BKTC[0]
        outs, start = [], 0
        for length, same in itertools.groupby(self.pass_lengths):
            count = len(list(same))
            q, k, v = (x[0, :, start:start + count * length].unflatten(1, (count, length)).transpose(0, 1)
                       for x in (q_BHTC, k_BKTC, v_BKTC))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            outs.append(out.transpose(0, 1).flatten(1, 2))
            start += count * length
        return torch.cat(outs, dim=1).unsqueeze(0)


@torch.no_grad()
def prefill(model, sequences, tokens_per_pass=16384):
    """Run whole token-id sequences through the model once and keep their K/V: list of lists -> Trunk.

    Sequences are packed end to end, so nothing is spent on padding; a pass holds about `tokens_per_pass` tokens.
    """
    if not sequences or not all(sequences):
        raise ValueError("prefill needs at least one sequence, and every sequence at least one token")
    device = next(model.parameters()).device
    trunk, passes, room = Trunk(map(len, sequences)), [], 0
    for i in trunk.order:
        if trunk.lengths[i] > room:
            passes.append([])
            room = tokens_per_pass
        passes[-1].append(i)
        room -= trunk.lengths[i]
    hiddens = []
    for members in passes:
        trunk.pass_start, trunk.pass_lengths = trunk.starts[members[0]], [trunk.lengths[i] for i in members]
        tokens_T = torch.tensor([token for i in members for token in sequences[i]], device=device)
        positions_T = torch.cat([torch.arange(length, device=device) for length in trunk.pass_lengths])
        hiddens.append(model(tokens_T[None], positions_T[None], trunk)[0])
    trunk.hidden_ND = torch.cat(hiddens)
    return trunk


# ---------------------------------------------------------------- branch


class Branch:
    """The cache of a branch: views of the trunk for the prefixes, own K/V (R, K, S, C) for sampled tokens."""

    def __init__(self, trunk, forks, capacity=64):
        self.trunk, self.forks, self.capacity, self.length = trunk, forks, capacity, 0
        self.keys, self.values = [], []
        self.set_groups([len(fork.row_ids) for fork in forks])

    def set_groups(self, counts):
        """Rebuild the prefix views for `counts` live rows per fork. Neighbouring forks that are alike in rows and
        prefix length become one run, served by one batched product over a strided view of the trunk."""
        live = [(fork, count) for fork, count in zip(self.forks, counts) if count]
        begins = [self.trunk.starts[fork.sequence] for fork, _ in live]
        self.runs, i = [], 0
        while i < len(live):
            (fork, count), j = live[i], i + 1
            stride = begins[j] - begins[i] if j < len(live) else 0
            while j < len(live) and stride > 0 and begins[j] - begins[j - 1] == stride \
                    and (live[j][0].length, live[j][1]) == (fork.length, count):
                j += 1
            self.runs.append((j - i, count, begins[i], max(stride, 0), fork.length))
            i = j

    def prefix(self, flat_KNC, begin, count, stride, length):
        """(count, K, length, C) view of the trunk: `count` prefixes that start `stride` tokens apart."""
        K, N, C = flat_KNC.shape
        return flat_KNC.as_strided((count, K, length, C), (stride * C, N * C, C, 1),
                                   flat_KNC.storage_offset() + begin * C)

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """One new token per row (T = 1): append its K/V, attend to [prefix ; own tokens]."""
        R, H, _, C = q_BHTC.shape
        K = k_BKTC.shape[1]
        if layer == len(self.keys):
            self.keys.append(k_BKTC.new_empty(R, K, self.capacity, C))
            self.values.append(k_BKTC.new_empty(R, K, self.capacity, C))
        S = self.length + 1
        self.keys[layer][:, :, S - 1], self.values[layer][:, :, S - 1] = k_BKTC[:, :, 0], v_BKTC[:, :, 0]
        q_RKMC = q_BHTC.reshape(R, K, H // K, C)
        own, own_lse = partial_attention(q_RKMC, self.keys[layer][:, :, :S], self.values[layer][:, :, :S])
        parts, row = [], 0
        for groups, count, *where in self.runs:
            q = q_RKMC[row:row + groups * count].unflatten(0, (groups, count)).transpose(1, 2).flatten(2, 3)
            k, v = (self.prefix(flat[layer], where[0], groups, *where[1:])
                    for flat in (self.trunk.keys, self.trunk.values))
            out, lse = partial_attention(q, k, v)
            parts.append((out.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1),
                          lse.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)))
            row += groups * count
        shared, shared_lse = parts[0] if len(parts) == 1 else (torch.cat(x) for x in zip(*parts))
        # softmax over both parts: weights exp(lse) / (exp(lse_1) + exp(lse_2)) = sigmoid of the difference
        weight = torch.sigmoid(shared_lse - own_lse).unsqueeze(-1).to(own.dtype)
        return torch.lerp(own, shared, weight).view(R, H, 1, C)

    def advance(self):
        """Count the token that every layer has just stored; double the room when it is used up."""
        self.length += 1
        if self.length == self.capacity:
            self.capacity *= 2
            self.keys = [F.pad(x, (0, 0, 0, x.shape[2])) for x in self.keys]
            self.values = [F.pad(x, (0, 0, 0, x.shape[2])) for x in self.values]

    def keep(self, index_R, counts):
        """Drop all rows but index_R (increasing); `counts` are the rows per fork that remain."""
        def gather(old_RKSC):
            new_RKSC = old_RKSC.new_empty(len(index_R), *old_RKSC.shape[1:])
            new_RKSC[:, :, :self.length] = old_RKSC[index_R, :, :self.length]
            return new_RKSC
        self.keys, self.values = [gather(x) for x in self.keys], [gather(x) for x in self.values]
        self.set_groups(counts)


def partial_attention(q_BKMC, k_BKSC, v_BKSC):
    """softmax(q k^T / sqrt(C)) v over some of the keys, and the log-sum-exp by which parts are merged (B, K, M)."""
    if q_BKMC.device.type == "cpu":  # fused, and the only public-schema CPU op that returns the log-sum-exp
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BKMC, k_BKSC, v_BKSC)
    scores_BKMS = (q_BKMC @ k_BKSC.transpose(-1, -2)).float() * q_BKMC.shape[-1] ** -0.5
    lse_BKM = scores_BKMS.logsumexp(-1)
    return (scores_BKMS - lse_BKM.unsqueeze(-1)).exp().to(v_BKSC.dtype) @ v_BKSC, lse_BKM


@torch.no_grad()
def branch(model, trunk, forks, params):
    """Sample every row of every fork to its end: list of Fork -> list (per fork) of lists of Completion."""
    device, limits, row_ids, owners = trunk.hidden_ND.device, [], [], []
    for f, fork in enumerate(forks):
        limit = params.max_new_tokens if fork.max_new_tokens is None else fork.max_new_tokens
        if limit < 1 or not 1 <= fork.length <= trunk.lengths[fork.sequence]:
            raise ValueError(f"fork {f}: cannot sample {limit} tokens after {fork.length} of "
                             f"{trunk.lengths[fork.sequence]}; both must be at least 1")
        limits += [limit] * len(fork.row_ids)
        row_ids += fork.row_ids
        owners += [f] * len(fork.row_ids)
    steps = max(limits)
    noise = RowNoise(params.seed, row_ids, device)
    limits_R, owners_R = torch.tensor(limits, device=device), torch.tensor(owners, device=device)
    prefix_R = torch.tensor([fork.length for fork in forks], device=device)[owners_R]
    stops_1X = torch.tensor([params.stop_token_ids], dtype=torch.int64, device=device)
    slots_R = torch.arange(len(row_ids), device=device)  # which row of the buffers a live row writes to
    tokens_RS = torch.zeros(len(row_ids), steps, dtype=torch.int64, device=device)
    logprobs_RS = torch.zeros(len(row_ids), steps, device=device)
    lengths_R = torch.zeros_like(slots_R)

    cache = Branch(trunk, forks, capacity=min(64, steps + 1))
    ends_R = torch.tensor([trunk.starts[fork.sequence] + fork.length - 1 for fork in forks], device=device)
    logits_RV = model.logits(trunk.hidden_ND[ends_R])[owners_R]
    alive_R = torch.ones_like(slots_R, dtype=torch.bool)
    for step in range(steps):
        positions_R = prefix_R[slots_R] + step
        token_R, logprob_R = sample(logits_RV, params.temperature, noise, slots_R, positions_R)
        tokens_RS[slots_R, step], logprobs_RS[slots_R, step] = token_R, logprob_R
        ended_R = alive_R & ((token_R.unsqueeze(1) == stops_1X).any(1) | (limits_R[slots_R] == step + 1))
        lengths_R[slots_R[ended_R]] = step + 1
        alive_R &= ~ended_R
        num_alive = int(alive_R.sum())
        if num_alive == 0:
            break
        # Dropping rows copies the K/V of the rest, so wait until an eighth of the batch is idle.
        if num_alive <= 0.875 * len(slots_R):
            index_R = alive_R.nonzero().squeeze(1)
            slots_R, token_R, positions_R, alive_R = (x[index_R] for x in (slots_R, token_R, positions_R, alive_R))
            cache.keep(index_R, torch.bincount(owners_R[slots_R], minlength=len(forks)).tolist())
        logits_RV = model.logits(model(token_R.unsqueeze(1), positions_R.unsqueeze(1), cache)[:, 0])
        cache.advance()
    return collect(forks, tokens_RS.tolist(), logprobs_RS.tolist(), lengths_R.tolist(), params.stop_token_ids)


def collect(forks, tokens, logprobs, lengths, stop_token_ids):
    """Rows of the buffers -> lists of Completion per fork."""
    completions, row = [], 0
    for fork in forks:
        completions.append([])
        for _ in fork.row_ids:
            ids = tokens[row][:lengths[row]]
            reason = "stop" if ids[-1] in stop_token_ids else "length"
            completions[-1].append(Completion(ids, logprobs[row][:lengths[row]], reason))
            row += 1
    return completions


# ---------------------------------------------------------------- drawing tokens


class RowNoise:
    """Uniform numbers from a counter: u(seed, row id, position, token), the same whatever else is in the batch.

    (seed, row id, position) is mixed to 64 bits by splitmix64; its halves key a 32-bit hash of the token index
    (the "lowbias32" multipliers). Integer arithmetic only, so every device draws the same numbers.
    """

    def __init__(self, seed, row_ids, device):
        keys = [splitmix64(splitmix64(seed) ^ (row & MASK64)) for row in row_ids]
        self.keys_R = torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys], device=device)
        self.counter_V = None

    def uniform(self, slots_R, positions_R, vocabulary):
        """(R, V) float32 in (0, 1), exact near 0: the small numbers decide who wins in `sample`."""
        if self.counter_V is None:
            self.counter_V = torch.arange(vocabulary, dtype=torch.int32, device=positions_R.device)
        key_R = self.keys_R[slots_R] + positions_R * -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio
        key_R = (key_R ^ (key_R >> 30 & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
        key_R = (key_R ^ (key_R >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
        low_R1, high_R1 = key_R.to(torch.int32).unsqueeze(1), (key_R >> 32).to(torch.int32).unsqueeze(1)
        x_RV = self.counter_V + low_R1
        x_RV ^= x_RV >> 16 & 0xFFFF
        x_RV *= 0x7FEB352D
        x_RV ^= high_R1
        x_RV ^= x_RV >> 15 & 0x1FFFF
        x_RV *= -0x7B935975  # 0x846CA68B
        x_RV ^= x_RV >> 16 & 0xFFFF
        return (x_RV & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)


MASK64 = 2**64 - 1


def splitmix64(x):
    """One step of the splitmix64 generator on Python integers: a well-mixed 64-bit function of x."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def sample(logits_RV, temperature, noise, slots_R, positions_R):
    """Draw one token per row from softmax(logits / temperature): (tokens_R, logprobs_R). Temperature 0: arg max.

    Gumbel-max in its exponential form: with E ~ Exp(1) per token, argmax p / E is a draw from p. One pass, no
    cumulative sum, no host sync. The log-prob is that of the distribution drawn from (greedy: of temperature 1).
    """
    if temperature == 0:
        token_R1 = logits_RV.argmax(-1, keepdim=True)
        return token_R1.squeeze(1), F.log_softmax(logits_RV, -1).gather(1, token_R1).squeeze(1)
    probs_RV = F.softmax(logits_RV / temperature, dim=-1)
    exponential_RV = noise.uniform(slots_R, positions_R, logits_RV.shape[1]).neg_().log1p_()  # = -E
    token_R1 = (probs_RV / exponential_RV).argmin(-1, keepdim=True)
    return token_R1.squeeze(1), probs_RV.gather(1, token_R1).squeeze(1).log()
