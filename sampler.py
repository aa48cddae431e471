"""Batched sampling with a KV cache for rows that share prefixes: prefill once, branch anywhere.

    trunk    [ question | expert trace ............ ]     K/V computed once, stored once
                        |         |
    branch 1            +-- o o o o     row 0             a branch names a position of the trunk; its rows
                        +-- o o         row 1             own the K/V of the tokens they sample, nothing else
    branch 2                      +-- o o o   row 2
                                  +-- o o     row 3

K/V before a position do not depend on what follows, so every branch point is a slice of the trunk. Attention of
a row is one softmax over [prefix ; own tokens], but two products: the prefix's serves all rows of a group at once
(Hydragen, arXiv 2402.05099; bifurcated attention, 2403.08845). It is never copied and never masked.

Two caches do that. `Branch` is plain PyTorch: rows step together, and those that finish leave the batch.
`Slots` takes the Triton kernels of kernels/ (handed in as `ops`): rows of any age share a batch, a slot that
falls free is given to the next waiting row, and the whole step is one CUDA graph.

Works with any model that has `model(tokens_BT, positions_BT, cache) -> hidden_BTD`, `model.logits(hidden_BTD)`
and calls `cache.attend(layer, q_BHTC, k_BKTC, v_BKTC) -> out_BHTC` in its layers. Only torch is imported.

Dimension key: R rows in the batch   V vocabulary   H query heads   K key/value heads   C head size
    M = H / K queries that share keys   N tokens of the trunk   S own tokens of a row   B, T, D as in the model
"""
import collections
import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

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
    """Sampled token ids (the stop token kept), their log-probs and the entropies of the distributions that they
    were drawn from, in nats, and "stop" or "length"."""
    token_ids: list
    logprobs: list
    finish_reason: str
    entropies: list = dataclasses.field(default_factory=list)


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


def generate(model, prompts, params, num_samples=1, **options):
    """`num_samples` completions of every prompt: list of token-id lists -> list of lists of Completion.

    Row ids are prompt index * num_samples + sample index; for control over them use `prefill` and `branch`,
    whose other arguments are the options.
    """
    forks = [Fork(i, len(prompt), tuple(range(i * num_samples, (i + 1) * num_samples)))
             for i, prompt in enumerate(prompts)]
    return branch(model, prefill(model, prompts), forks, params, **options)


@torch.no_grad()
def branch(model, trunk, forks, params, max_rows=256, ops=None, workers=1):
    """Sample every row of every fork to its end: list of Fork -> list (per fork) of lists of Completion.

    At most `max_rows` rows are decoded at once. ops: a module with the Triton `decode_attention`, `PrefixTiles` and
    `sample` of kernels/, for CUDA; without it everything is plain PyTorch. workers: threads that share the rows of a
    CPU, one core each; for models too small to keep several cores busy with one operation. What is sampled depends on
    none of the three.
    """
    rows = Rows(trunk, forks, params)
    if ops is not None:
        decode_in_slots(model, trunk, forks, rows, min(max_rows, rows.num), params, ops)
        return rows.completions(forks, params.stop_token_ids)
    for begin in range(0, rows.num, max_rows):
        members = rows.order[begin:begin + max_rows]
        # Below 128 rows a thread, waiting for Python's lock costs more than the second core brings.
        parts = max(1, min(workers, len(members) // 128))
        share = -(-len(members) // parts)
        in_threads([lambda part=members[i:i + share]: decode_in_step(model, trunk, forks, rows, part, params)
                    for i in range(0, len(members), share)])
    return rows.completions(forks, params.stop_token_ids)


def in_threads(calls):
    """Make calls side by side, each in a thread with one core; a single one as it is."""
    if len(calls) == 1:
        return calls[0]()
    threads = torch.get_num_threads()

    def on_one_core(call):
        torch.set_num_threads(1)
        call()
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(on_one_core, calls))
    torch.set_num_threads(threads)


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


# ---------------------------------------------------------------- rows


class Rows:
    """What every row of a call is to sample, and what it has sampled so far: (rows, steps) buffers on the device.

    One more row takes what idle places of a batch write, one more column what a finished row would.
    """

    def __init__(self, trunk, forks, params):
        limits = [params.max_new_tokens if fork.max_new_tokens is None else fork.max_new_tokens for fork in forks]
        for f, (fork, limit) in enumerate(zip(forks, limits)):
            if limit < 1 or not 1 <= fork.length <= trunk.lengths[fork.sequence]:
                raise ValueError(f"fork {f}: cannot sample {limit} tokens after {fork.length} of "
                                 f"{trunk.lengths[fork.sequence]}; both must be at least 1")
        self.fork_of = [f for f, fork in enumerate(forks) for _ in fork.row_ids]
        self.num, self.steps, device = len(self.fork_of), max(limits), trunk.hidden_ND.device
        # Rows whose prefixes are equally long are decoded next to each other: their prefixes make one product.
        place = [(fork.length, trunk.starts[fork.sequence]) for fork in forks]
        self.order = sorted(range(self.num), key=lambda row: place[self.fork_of[row]])
        self.ends = [place[f][1] + place[f][0] - 1 for f in self.fork_of]  # last token of the prefix, in the trunk
        self.limits_R = torch.tensor([limits[f] for f in self.fork_of], device=device)
        self.prefixes_R = torch.tensor([place[f][0] for f in self.fork_of], device=device)
        self.keys_R = noise_keys(params.seed, [row for fork in forks for row in fork.row_ids]).to(device)
        self.stops_1X = torch.tensor([params.stop_token_ids], dtype=torch.int64, device=device)
        self.tokens_RS = torch.zeros(self.num + 1, self.steps + 1, dtype=torch.int64, device=device)
        self.logprobs_RS, self.entropies_RS = torch.zeros(2, self.num + 1, self.steps + 1, device=device)
        self.lengths_R = torch.zeros(self.num + 1, dtype=torch.int64, device=device)

    def batch(self, rows):
        """The places of a batch that start on these rows."""
        row_R = torch.tensor(rows, device=self.keys_R.device)
        return Batch(row_R, torch.zeros_like(row_R), self.prefixes_R[row_R] - 1, torch.zeros_like(row_R),
                     self.limits_R[row_R], self.keys_R[row_R])

    def first_logits(self, model, trunk, rows):
        """(R, V) logits of the rows' first tokens, from the trunk's hidden states: the head runs once per prefix."""
        ends = sorted({self.ends[row] for row in rows})
        index = {end: i for i, end in enumerate(ends)}
        return model.logits(trunk.hidden_ND[ends])[[index[self.ends[row]] for row in rows]]

    def draw(self, batch, logits_RV, temperature, sample):
        """Sample the next token of every place, in place: what a CUDA graph replays has fixed addresses."""
        is_live_R = batch.row < self.num
        batch.position += is_live_R
        token_R, logprob_R, entropy_R = sample(logits_RV, temperature, batch.key, batch.position)
        at = batch.row, batch.length
        self.tokens_RS[at], self.logprobs_RS[at], self.entropies_RS[at] = token_R, logprob_R, entropy_R
        batch.length += is_live_R
        self.lengths_R[batch.row] = batch.length
        ended_R = (token_R.unsqueeze(1) == self.stops_1X).any(1) | (batch.length >= batch.limit)
        batch.row.masked_fill_(ended_R, self.num)
        batch.token.copy_(token_R)

    def completions(self, forks, stop_token_ids):
        """The buffers as lists of Completion per fork."""
        tokens, logprobs, entropies = (x.tolist() for x in (self.tokens_RS, self.logprobs_RS, self.entropies_RS))
        completions = [[] for _ in forks]
        for row, (fork, length) in enumerate(zip(self.fork_of, self.lengths_R.tolist())):
            ids = tokens[row][:length]
            reason = "stop" if ids[-1] in stop_token_ids else "length"
            completions[fork].append(Completion(ids, logprobs[row][:length], reason, entropies[row][:length]))
        return completions


@dataclasses.dataclass
class Batch:
    """The places of a batch, (R,) each. A place whose row has ended is idle: its row is the one past the last."""
    row: torch.Tensor
    token: torch.Tensor      # the last one sampled; its K/V are not in the cache yet
    position: torch.Tensor   # of that token
    length: torch.Tensor     # tokens sampled so far
    limit: torch.Tensor
    key: torch.Tensor        # of the row's noise

    def tensors(self):
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def take(self, index_R):
        return Batch(*(x[index_R] for x in self.tensors()))

    def put(self, index_R, other):
        for mine, new in zip(self.tensors(), other.tensors()):
            mine[index_R] = new


def forward(model, batch, cache):
    """Logits after the last token of every place: (R, V) float32."""
    return model.logits(model(batch.token.unsqueeze(1), batch.position.unsqueeze(1), cache)[:, 0])


# ---------------------------------------------------------------- plain PyTorch: all rows in step


@torch.no_grad()  # also in a thread of its own
def decode_in_step(model, trunk, forks, rows, members, params):
    """Decode the rows `members` side by side, one token each per pass; rows that end leave the batch."""
    batch = rows.batch(members)
    cache = Branch(trunk, forks, [rows.fork_of[row] for row in members], capacity=min(64, rows.steps))
    logits_RV = rows.first_logits(model, trunk, members)
    while True:
        rows.draw(batch, logits_RV, params.temperature, sample)
        is_live_R = batch.row < rows.num
        num_live = int(is_live_R.sum())
        if num_live == 0:
            return
        # Dropping rows copies the K/V of the rest, so wait until an eighth of the batch is idle.
        if num_live <= 0.875 * len(is_live_R):
            index_R = is_live_R.nonzero().squeeze(1)
            batch = batch.take(index_R)
            cache.keep(index_R)
        logits_RV = forward(model, batch, cache)


class Branch:
    """The cache of rows in step: views of the trunk for the prefixes, own K/V (K, R, S, C) for sampled tokens.

    Key heads come first: then rows that share a prefix are neighbours, and regrouping them costs no copy.
    """

    def __init__(self, trunk, forks, fork_of, capacity=64):
        self.trunk, self.forks, self.fork_of, self.capacity, self.length = trunk, forks, fork_of, capacity, 0
        self.keys, self.values, self.runs = [], [], []
        self.set_runs()

    def set_runs(self):
        """Neighbouring forks with prefixes of one length at equal distances become one run, served by one product."""
        live = [(self.forks[f], len(list(same))) for f, same in itertools.groupby(self.fork_of)]
        begins = [self.trunk.starts[fork.sequence] for fork, _ in live]
        self.runs, i, row = [], 0, 0
        while i < len(live):
            stride, j, length = begins[i + 1] - begins[i] if i + 1 < len(live) else 0, i + 1, live[i][0].length
            while j < len(live) and live[j][0].length == length and begins[j] - begins[j - 1] == stride > 0:
                j += 1
            counts, where = [count for _, count in live[i:j]], (begins[i], max(stride, 0), j - i, length)
            views = [[x.unbind() for x in (prefixes(k, *where), prefixes(v, *where))]
                     for k, v in zip(self.trunk.keys, self.trunk.values)]
            self.runs.append(Run(slice(row, row + sum(counts)), j - i, length, views, *padding(counts, row)))
            i, row = j, row + sum(counts)

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """One new token per row (T = 1): append its K/V, attend to [prefix ; own tokens]."""
        (R, H, _, C), K = q_BHTC.shape, k_BKTC.shape[1]
        if layer == 0:
            self.make_room()
        if layer == len(self.keys):
            self.keys.append(k_BKTC.new_empty(K, R, self.capacity, C))
            self.values.append(k_BKTC.new_empty(K, R, self.capacity, C))
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length - 1] = k_BKTC[:, :, 0].transpose(0, 1)
        values[:, :, self.length - 1] = v_BKTC[:, :, 0].transpose(0, 1)
        keys, values = (x.flatten(0, 1)[:, :self.length] for x in (keys, values))
        q_KRMC = q_BHTC.reshape(R, K, H // K, C).transpose(0, 1).contiguous().mul_(C**-0.5)
        own_KRMS = torch.bmm(q_KRMC.flatten(0, 1), keys.mT).unflatten(0, (K, R))
        parts = [run.attend(layer, q_KRMC, own_KRMS) for run in self.runs]
        out, weights = parts[0] if len(parts) == 1 else (torch.cat(x, 1) for x in zip(*parts))
        out = torch.baddbmm(out.flatten(0, 1), weights.flatten(0, 1), values)
        return out.unflatten(0, (K, R)).transpose(0, 1).reshape(R, H, 1, C)

    def make_room(self):
        """Count the token that every layer is about to store; double the room when it is used up."""
        self.length += 1
        if self.length > self.capacity:
            self.capacity *= 2
            for owner in (self.keys, self.values):
                owner[:] = [F.pad(x, (0, 0, 0, x.shape[2])) for x in owner]

    def keep(self, index_R):
        """Drop all rows but index_R (increasing)."""
        def gather(old_KRSC):
            K, _, S, C = old_KRSC.shape
            new_KRSC = old_KRSC.new_empty(K, len(index_R), S, C)
            new_KRSC[:, :, :self.length] = old_KRSC[:, index_R, :self.length]
            return new_KRSC
        self.keys, self.values = [gather(x) for x in self.keys], [gather(x) for x in self.values]
        self.fork_of = [self.fork_of[i] for i in index_R.tolist()]
        self.set_runs()


@dataclasses.dataclass(frozen=True)
class Run:
    """Rows whose prefixes, equally long, one product per key head serves. Where groups differ in size, `places` pads
    them to the largest and `back` takes the padding away."""
    rows: slice
    groups: int
    length: int
    views: list  # per layer, for keys and values, per head: (groups, length, C) inside the trunk
    places: list | None
    back: list | None

    def attend(self, layer, q_KRMC, own_KRMS):
        """One softmax over [prefix ; own tokens]: (the prefix's share of the output, the weights of own tokens)."""
        pick = self.rows if self.places is None else self.places
        q_KRMC, own_KRMS = q_KRMC[:, pick], own_KRMS[:, pick]
        keys, values = self.views[layer]
        scores_KRMP = torch.stack([torch.bmm(q.unflatten(0, (self.groups, -1)).flatten(1, 2), k.mT)
                                   for q, k in zip(q_KRMC, keys)]).view(*own_KRMS.shape[:3], self.length)
        weights = torch.cat((scores_KRMP, own_KRMS), -1).float().softmax(-1).to(q_KRMC.dtype)
        out = torch.stack([torch.bmm(w[..., :self.length].unflatten(0, (self.groups, -1)).flatten(1, 2), v)
                           for w, v in zip(weights, values)]).view(q_KRMC.shape)
        weights = weights[..., self.length:]
        return (out, weights) if self.back is None else (out[:, self.back], weights[:, self.back])


def prefixes(flat_KNC, begin, stride, groups, length):
    """(K, groups, length, C) view of the trunk: prefixes whose first tokens are `stride` apart."""
    K, N, C = flat_KNC.shape
    return flat_KNC.as_strided((K, groups, length, C), (N * C, stride * C, C, 1), begin * C)


def padding(counts, first):
    """(places, back) for groups of `counts` rows that begin at row `first`; (None, None) where all are equal.

    >>> padding([2, 1], first=10)         # rows 10 11 | 12, padded to 10 11 | 12 12
    ([10, 11, 12, 12], [0, 1, 2])
    """
    if len(set(counts)) == 1:
        return None, None
    places, back, width = [], [], max(counts)
    for group, count in enumerate(counts):
        places += [first + min(i, count - 1) for i in range(width)]
        back += range(group * width, group * width + count)
        first += count
    return places, back


# ---------------------------------------------------------------- Triton kernels: slots, refilled


def decode_in_slots(model, trunk, forks, rows, num_slots, params, ops):
    """Decode all rows in `num_slots` places: one that falls idle is given to the next waiting row; when none waits,
    the batch is halved as it empties. The host learns which are idle a step late, so it never waits for the GPU."""
    waiting, idle = collections.deque(rows.order), list(range(num_slots))
    slots = Slots(model, trunk, forks, rows, params, ops)
    while waiting or len(idle) < num_slots:
        if waiting and idle:
            slots.admit(idle, [waiting.popleft() for _ in idle[:len(waiting)]])
        elif 2 * len(idle) >= num_slots:
            num_slots = slots.halve(idle)
        is_idle_R, arrived = to_host(slots.batch.row == rows.num)
        slots.step()
        if arrived is not None:
            arrived.synchronize()
        idle = is_idle_R.nonzero().flatten().tolist()


def to_host(x):
    """(copy of x on the CPU, event after which it may be read): the copy runs while the GPU goes on."""
    if x.device.type != "cuda":
        return x.clone(), None
    copy, arrived = x.to("cpu", non_blocking=True), torch.cuda.Event()  # pinned memory, by this flag
    arrived.record()
    return copy, arrived


class Slots:
    """The cache of rows of any age: own K/V (R, K, S, C) in fixed places, and tables on the device that say how much
    of them is valid and which tile of rows shares which part of the trunk. On CUDA a step is one graph."""

    def __init__(self, model, trunk, forks, rows, params, ops):
        self.model, self.trunk, self.rows, self.params, self.ops = model, trunk, rows, params, ops
        self.prefix_of = [(trunk.starts[forks[f].sequence], forks[f].length) for f in rows.fork_of]
        largest = max(collections.Counter(self.prefix_of).values())
        self.tile_rows = min(8, 1 << (largest - 1).bit_length())
        self.batch, self.members, self.tiles = None, [], None  # members: which row is, or was last, in each place
        self.keys, self.values, self.graph, self.is_warm = [], [], None, False

    def admit(self, idle, members):
        """Give idle places to waiting rows, whose first tokens come from the trunk."""
        fresh = self.rows.batch(members)
        self.rows.draw(fresh, self.rows.first_logits(self.model, self.trunk, members), self.params.temperature,
                       self.ops.sample)
        if self.batch is None:
            self.batch, self.members = fresh, list(members)
        else:
            places = idle[:len(members)]
            self.batch.put(torch.tensor(places, device=fresh.row.device), fresh)
            for place, row in zip(places, members):
                self.members[place] = row
        self.set_tiles()

    def halve(self, idle):
        """Move the live rows to the front of a batch of half the size, or a quarter, ...; returns the size."""
        live, size = sorted(set(range(len(self.members))) - set(idle)), len(self.members)
        while size > 1 and size // 2 >= len(live):
            size //= 2
        places = (live + idle)[:size]  # idle ones fill up
        index_R = torch.tensor(places, device=self.batch.row.device)
        self.batch, self.members = self.batch.take(index_R), [self.members[place] for place in places]
        self.keys, self.values = [x[index_R] for x in self.keys], [x[index_R] for x in self.values]
        self.tiles, self.graph, self.is_warm = None, None, False
        self.set_tiles()
        return size

    def set_tiles(self):
        """Rows that share a prefix, `tile_rows` at a time, with where it begins and how long it is."""
        groups, tiles = collections.defaultdict(list), []
        for place, row in enumerate(self.members):
            groups[self.prefix_of[row]].append(place)
        for (begin, length), places in groups.items():
            for i in range(0, len(places), self.tile_rows):
                tile = places[i:i + self.tile_rows]
                tiles.append((tile + [-1] * (self.tile_rows - len(tile)), begin, length))
        size = max(1 << (len(tiles) - 1).bit_length(), 0 if self.tiles is None else len(self.tiles.begins_T))
        tiles += [([-1] * self.tile_rows, 0, 0)] * (size - len(tiles))  # a length of 0: nothing to do
        tables = [torch.tensor(table, dtype=torch.int32).to(self.batch.row.device) for table in zip(*tiles)]
        if self.tiles is None or len(self.tiles.begins_T) < size:
            longest = max(length for _, length in self.prefix_of)
            self.tiles, self.graph, self.is_warm = self.ops.PrefixTiles(*tables, longest), None, False
        else:  # in place: the graph reads these addresses
            for old, new in zip(self.tiles, tables):
                old.copy_(new)

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """One new token per row (T = 1): store its K/V after the row's own, attend to [prefix ; own tokens]."""
        if layer == len(self.keys):
            (R, K, _, C), room = k_BKTC.shape, self.rows.steps
            self.keys.append(k_BKTC.new_empty(R, K, room, C))
            self.values.append(k_BKTC.new_empty(R, K, room, C))
        if layer == 0:
            self.places_R = torch.arange(len(q_BHTC), device=q_BHTC.device)
            self.lengths_R = self.batch.length.to(torch.int32)
        at = self.places_R, slice(None), self.batch.length - 1
        self.keys[layer][at], self.values[layer][at] = k_BKTC[:, :, 0], v_BKTC[:, :, 0]
        out_RHC = self.ops.decode_attention(q_BHTC[:, :, 0], self.keys[layer], self.values[layer], self.lengths_R,
                                            self.trunk.keys[layer], self.trunk.values[layer], self.tiles)
        return out_RHC.unsqueeze(2)

    def step(self):
        """One token for every place. The first step of a batch size runs eagerly, which compiles the kernels; then
        forward pass, attention, drawing and the stop test are captured once and replayed."""
        if self.graph is None and self.is_warm and self.batch.row.device.type == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.run()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.run()
        self.is_warm = True

    def run(self):
        logits_RV = forward(self.model, self.batch, self)
        self.rows.draw(self.batch, logits_RV, self.params.temperature, self.ops.sample)


# ---------------------------------------------------------------- drawing tokens


def noise_keys(seed, row_ids):
    """(R,) int64: one well-mixed 64-bit key per row, by splitmix64 of seed and row id."""
    keys = [splitmix64(splitmix64(seed) ^ (row & MASK64)) for row in row_ids]
    return torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys], dtype=torch.int64)


MASK64 = 2**64 - 1


def splitmix64(x):
    """One step of the splitmix64 generator on Python integers: a well-mixed 64-bit function of x."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def uniform(keys_R, positions_R, vocabulary):
    """Uniform numbers from a counter, u(key, position, token): the same whatever else is in the batch.

    (R, V) float32 in (0, 1), exact near 0: the small numbers decide who wins in `sample`. Key and position are mixed
    to 64 bits as in splitmix64; the halves key a 32-bit hash of the token index (the "lowbias32" multipliers).
    Integer arithmetic only, so every device draws the same numbers.
    """
    mixed_R = keys_R + positions_R * -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio
    mixed_R = (mixed_R ^ (mixed_R >> 30 & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    mixed_R = (mixed_R ^ (mixed_R >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    low_R1, high_R1 = mixed_R.to(torch.int32).unsqueeze(1), (mixed_R >> 32).to(torch.int32).unsqueeze(1)
    x_RV = torch.arange(vocabulary, dtype=torch.int32, device=keys_R.device) + low_R1
    x_RV ^= x_RV >> 16 & 0xFFFF
    x_RV *= 0x7FEB352D
    x_RV ^= high_R1
    x_RV ^= x_RV >> 15 & 0x1FFFF
    x_RV *= -0x7B935975  # 0x846CA68B
    x_RV ^= x_RV >> 16 & 0xFFFF
    # The top 64 of 2^31 values would round to 1, at which E is infinite and a token of probability 0 could win.
    return (x_RV & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def sample(logits_RV, temperature, keys_R, positions_R):
    """Draw one token per row from softmax(logits / temperature): (tokens_R, logprobs_R, entropies_R), in nats.

    Gumbel-max in its exponential form: with E ~ Exp(1) per token, argmax p / E is a draw from p. One pass, no
    cumulative sum, no host sync. Log-prob and entropy are those of the distribution drawn from; temperature 0 takes
    the largest logit, and reports them at temperature 1.
    """
    probs_RV = F.softmax(logits_RV.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token_R1 = logits_RV.argmax(-1, keepdim=True)
    else:
        exponential_RV = uniform(keys_R, positions_R, logits_RV.shape[1]).neg_().log1p_()  # = -E
        token_R1 = (probs_RV / exponential_RV).argmin(-1, keepdim=True)
    logprobs_R = probs_RV.gather(1, token_R1).squeeze(1).log()
    return token_R1.squeeze(1), logprobs_R, torch.special.entr(probs_RV).sum(-1)
