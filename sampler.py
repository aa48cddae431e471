"""Batched sampling with a KV cache for rows that share prefixes: prefill once, branch anywhere.

    trunk    [ question | expert trace ............ ]     K/V computed once, stored once
                        |         |
    branch 1            +-- o o o o     row 0             a branch names a position of the trunk; its rows
                        +-- o o         row 1             own the K/V of the tokens they sample, nothing else
    branch 2                      +-- o o o   row 2
                                  +-- o o     row 3

K/V before a position do not depend on what follows, so every branch point is a slice of the trunk. Attention
of a row is one softmax over [prefix ; own tokens], but two products: the prefix's serves all rows of a tile
at once (Hydragen, arXiv 2402.05099; bifurcated attention, 2403.08845).

`branch` is one loop for every device: rows of any age share a batch of fixed places, a place that falls idle
goes to a waiting row, and when none waits the batch shrinks. Devices differ in `ops`: `decode_attention`,
`PrefixTiles`, `sample`, `capture`. Those below are plain PyTorch; with Triton's (kernels/) a step on CUDA is
one graph, captured once and replayed as long as the places are kept.

Works with any model in eval mode that has `parameters()`, `model(tokens_BT, positions_BT, cache) ->
hidden_BTD`, `model.logits(hidden_BTD)` and in its layers, numbered from 0, calls `cache.attend(layer, q_BHTC,
k_BKTC, v_BKTC) -> out_BHTC` with rotated q and k: a softmax over all earlier tokens, scaled by C**-0.5 here.
A prefill is one row (B = 1) of sequences end to end, whose positions begin anew. Only torch is imported.

Dimension key: R rows in a batch   V vocabulary   H query heads   K key/value heads, G = H / K   C head size
    N tokens of the trunk   T tiles of M rows   P tokens of a prefix   S own tokens   B, T, D as in the model
    X rows, tile by tile   merged: Z = K R, Y = K T, L = M G
"""
import dataclasses
import itertools
import math
import sys

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample. Temperature 0 is greedy; ValueError below. No top-k or top-p: the policy is trained on
    what it samples."""
    max_new_tokens: int = 512
    temperature: float = 1.0
    stop_token_ids: tuple = ()
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, it must be 0 (greedy) or more, and finite")


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a row sampled. Log-probs, and entropies of the distributions drawn from, are in nats."""
    token_ids: list     # the stop token kept
    logprobs: list
    finish_reason: str  # "stop" or "length"
    entropies: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Fork:
    """A branch point: `len(row_ids)` rows continue the trunk's sequence number `sequence` (its place in the
    list that `prefill` was given) after its first `length` tokens.
    A row's randomness is keyed by (seed, its row id, position) and by nothing else, so give every row of a
    training its own id. At most `max_new_tokens` are sampled (None: as the sampling parameters say).
    """
    sequence: int
    length: int
    row_ids: tuple
    max_new_tokens: int | None = None


def generate(model, prompts, params, num_samples=1, places=None):
    """`num_samples` completions of every prompt: list of token-id lists -> list of lists of Completion.
    Row ids are prompt index * num_samples + sample index; for control over them use `prefill` and `branch`.
    Equal seeds repeat their noise in every call: give a training loop's calls different ones. Errors: theirs.
    """
    forks = []
    for i, prompt in enumerate(prompts):
        forks.append(Fork(i, len(prompt), tuple(range(i * num_samples, (i + 1) * num_samples))))
    return branch(model, prefill(model, prompts), forks, params, places)


@torch.no_grad()
def branch(model, trunk, forks, params, places=None, progress=None):
    """Sample every row of every fork to its end: list of Fork -> list (per fork) of lists of Completion.
    places: `Places(model, ...)`, worth keeping where steps are captured; None: new ones, at most 256. What is
    sampled does not depend on them. progress(rows that are done, rows in all) is called after every step.
    Raises ValueError for a fork that lies outside its sequence or may not sample a token, FloatingPointError
    for logits that are not finite.
    """
    if not forks:
        return []
    rows = Rows(trunk, forks, params)
    places = places or Places(model, min(256, rows.num))
    places.open(trunk, rows)
    # Neighbours share a prefix, or at least about its length: less padding.
    waiting = sorted(range(rows.num), key=lambda row: rows.prefixes[row][::-1])
    idle = list(range(places.size))
    while waiting or len(idle) < places.size:
        # Admitting gathers prefixes and runs the head: worth it once an eighth of the places is idle.
        if waiting and len(idle) >= places.size / 8:
            places.admit(idle, waiting[:len(idle)])
            del waiting[:len(idle)]
        elif not waiting:
            places.shrink(idle)
        idle = places.step()
        if progress:
            progress(rows.num - len(waiting) - places.size + len(idle), rows.num)
    return rows.completions(forks)


# ---------------------------------------------------------------- trunk


class Trunk:
    """K/V and last hidden states of whole sequences: stored[2 * layer] (K, N, C) are keys, the next values.
    Sequence i lies at starts[i] .. starts[i] + lengths[i] there and in hidden_ND, short ones first."""

    def __init__(self, lengths):
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        starts = itertools.accumulate((lengths[i] for i in order), initial=0)
        self.lengths = lengths
        self.starts = dict(zip(order, starts))
        self.stored = []
        self.hidden_ND = None
        self.queries_per_key = 1  # H / K


class PrefillCache:
    """The cache of one forward pass that fills a trunk: sequences `members`, end to end in one row (B = 1).
    Lengths within 19% are a bucket: a layer takes as many attentions as there are buckets, not lengths."""

    def __init__(self, trunk, members, device):
        self.trunk = trunk
        self.first = trunk.starts[members[0]]
        self.buckets = []  # (B, T) each: where in the row their tokens are, padded
        kept = []
        for _, same in itertools.groupby(members, lambda i: int(4 * math.log2(trunk.lengths[i]))):
            spans_B2 = upload([(trunk.starts[i] - self.first, trunk.lengths[i]) for i in same], device)
            at_BT, is_padding_BT = padded_spans(*spans_B2.split(1, 1))
            self.buckets.append(at_BT)
            kept.append(~is_padding_BT.flatten())
        self.kept_N = torch.cat(kept).nonzero().flatten()  # what of all buckets is no padding

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """Store the row's K/V in the trunk; attention is causal inside each sequence. ValueError for a layer
        that skips a number."""
        stored = self.trunk.stored
        if 2 * layer > len(stored):
            raise ValueError(f"layer {layer} came after {len(stored) // 2} others: number them from 0")
        _, K, T, C = k_BKTC.shape
        if 2 * layer == len(stored):
            self.trunk.queries_per_key = q_BHTC.shape[1] // K
            stored += [k_BKTC.new_empty(K, sum(self.trunk.lengths), C) for _ in range(2)]
        for stored_KNC, x_BKTC in zip(stored[2 * layer:], (k_BKTC, v_BKTC)):
            stored_KNC[:, self.first:self.first + T] = x_BKTC[0]
        outs = []
        for at_BT in self.buckets:
            parts = [x[0].index_select(1, at_BT.flatten()) for x in (q_BHTC, k_BKTC, v_BKTC)]
            parts = [x.unflatten(1, at_BT.shape).transpose(0, 1) for x in parts]
            # Padding lies to the right, where no token looks.
            out_BHTC = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
            outs.append(out_BHTC.transpose(0, 1).flatten(1, 2))
        return torch.cat(outs, 1).index_select(1, self.kept_N).unsqueeze(0)


@torch.no_grad()
def prefill(model, sequences, tokens_per_pass=4096):
    """Run whole sequences of token ids, lists or 1-D tensors, through the model once and keep their K/V: a
    Trunk. They are packed end to end, so that only attention meets padding; a pass holds about
    `tokens_per_pass` tokens. Raises ValueError where there is nothing to run, TypeError for another model.
    """
    sequences = [one.tolist() if isinstance(one, torch.Tensor) else one for one in sequences]
    if not sequences or not all(sequences):
        raise ValueError("prefill needs at least one sequence, and every sequence at least one token")
    missing = [name for name in ("parameters", "logits") if not callable(getattr(model, name, None))]
    if missing:
        raise TypeError(f"the model has no {' and no '.join(missing)}(): see the head of sampler.py")
    device = next(model.parameters()).device
    trunk = Trunk([len(sequence) for sequence in sequences])
    hiddens = []
    # A pass: the sequences that start within the same `tokens_per_pass` tokens.
    for _, members in itertools.groupby(trunk.starts, lambda i: trunk.starts[i] // tokens_per_pass):
        members = list(members)
        tokens = [token for i in members for token in sequences[i]]
        positions = [position for i in members for position in range(trunk.lengths[i])]
        tokens_BT, positions_BT = upload([[tokens], [positions]], device)
        hidden_BTD = model(tokens_BT, positions_BT, PrefillCache(trunk, members, device))
        if getattr(hidden_BTD, "shape", ())[:-1] != tokens_BT.shape or not trunk.stored:
            raise TypeError(f"the model returned {type(hidden_BTD).__name__} and called cache.attend in "
                            f"{len(trunk.stored) // 2} layers; hidden states (1, N, D) are needed")
        hiddens.append(hidden_BTD[0])
    trunk.hidden_ND = torch.cat(hiddens)
    return trunk


def padded_spans(begins_B1, lengths_B1):
    """(B, T): the indices of each span, its last one repeated up to the longest; and which are repeats."""
    nth_T = torch.arange(int(lengths_B1.max()), device=lengths_B1.device)
    return begins_B1 + nth_T.minimum(lengths_B1 - 1), nth_T >= lengths_B1


def upload(table, device):
    """Lists of integers as a tensor; the copy to a GPU does not wait for it."""
    table_XX = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table_XX.to(device, non_blocking=True)


# ---------------------------------------------------------------- rows, and the batch that samples them


class Rows:
    """What every row of a call is to sample, and what it has sampled so far: (rows, steps) buffers.
    The last row and the last column are bins: idle places, whose row is -1, write there without a mask."""

    def __init__(self, trunk, forks, params):
        self.params = params
        self.hidden_ND = trunk.hidden_ND
        self.prefixes = []  # of each row: (first token in the trunk, number of tokens)
        # What a place begins with: its row (-1: idle), the last token sampled (its K/V are not stored yet),
        # that token's position, how many are sampled, how many may be, the key of the row's noise.
        self.states = []
        for f, fork in enumerate(forks):
            limit = params.max_new_tokens if fork.max_new_tokens is None else fork.max_new_tokens
            longest = trunk.lengths[fork.sequence]
            if limit < 1 or not 1 <= fork.length <= longest:
                raise ValueError(f"fork {f}: cannot sample {limit} tokens after {fork.length} of {longest}; "
                                 "both must be at least 1")
            for key in noise_keys(params.seed, fork.row_ids).tolist():
                self.states.append((len(self.states), 0, fork.length - 1, 0, limit, key))
                self.prefixes.append((trunk.starts[fork.sequence], fork.length))
        self.num = len(self.states)
        self.steps = max((limit for *_, limit, _ in self.states), default=0)
        device = trunk.hidden_ND.device
        self.stops_1X = upload([params.stop_token_ids], device)
        shape = self.num + 1, self.steps + 1
        self.tokens_RS = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs_RS = torch.zeros(shape, device=device)
        self.entropies_RS = torch.zeros(shape, device=device)
        self.lengths_R = torch.zeros(shape[0], dtype=torch.int64, device=device)

    def draw(self, places_6R, logits_RV, sample):
        """Sample the next token of every place; changes places_6R and the buffers."""
        row_R, token_R, position_R, length_R, limit_R, key_R = places_6R
        is_live_R = row_R >= 0
        position_R += is_live_R
        drawn_R, logprob_R, entropy_R = sample(logits_RV, self.params.temperature, key_R, position_R)
        self.tokens_RS[row_R, length_R] = drawn_R
        self.logprobs_RS[row_R, length_R] = logprob_R
        self.entropies_RS[row_R, length_R] = entropy_R
        length_R += is_live_R
        self.lengths_R[row_R] = length_R
        has_ended_R = (drawn_R.unsqueeze(1) == self.stops_1X).any(1) | (length_R >= limit_R)
        row_R.masked_fill_(has_ended_R, -1)
        token_R.copy_(drawn_R)

    def completions(self, forks):
        """The buffers as lists of Completion per fork. FloatingPointError if a log-prob is not finite: the
        model is broken, and what it would go on to sample is its token 0."""
        # Idle places wrote into the last row and column.
        if not self.logprobs_RS[:-1, :-1].isfinite().all():
            raise FloatingPointError("the model's logits are NaN or infinite")
        buffers = self.lengths_R, self.tokens_RS, self.logprobs_RS, self.entropies_RS
        done = []
        for length, tokens, logprobs, entropies in zip(*map(torch.Tensor.tolist, buffers)):
            reason = "stop" if tokens[length - 1] in self.params.stop_token_ids else "length"
            done.append(Completion(tokens[:length], logprobs[:length], reason, entropies[:length]))
        done = iter(done)
        return [list(itertools.islice(done, len(fork.row_ids))) for fork in forks]


class DecodeCache:
    """What a decode step attends to: K/V (K, R, S, C) of what each row has sampled, and a trunk, by tiles of
    rows that share a prefix. Key heads come first: then the queries of a tile are neighbours."""

    def __init__(self, ops, trunk, own, tile_rows, max_prefix):
        self.ops = ops
        self.trunk = trunk     # as Trunk.stored
        self.own = own         # likewise
        self.tile_rows = tile_rows
        self.max_prefix = max_prefix
        self.tiles = None
        self.lengths_R = None  # own tokens that this step attends to; an idle row attends to none
        self.tables = {}       # {number of rows: the tiles that a captured step reads}
        self.captured = {}     # {number of rows: that step}

    def set_tiles(self, prefixes):
        """Say which rows share which prefix: in as many tiles as they can ever need, unused ones empty."""
        table = tile_table(prefixes, self.tile_rows)
        table += [[0, 0] + [-1] * self.tile_rows] * (len(prefixes) - len(table))
        table_XT = upload(table, self.own[0].device).T.to(torch.int32).contiguous()
        numbers = table_XT[2:].T.contiguous(), table_XT[0], table_XT[1]
        self.tiles = self.ops.PrefixTiles(*numbers, self.max_prefix)
        if self.ops.capture:
            self.tiles = self.tables.setdefault(len(prefixes), self.tiles)
            for old_X, new_X in zip(self.tiles, numbers):
                old_X.copy_(new_X)

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """One new token per row (T = 1): its K/V go after the row's own, it attends to [prefix ; own]."""
        new = k_BKTC[:, :, 0], v_BKTC[:, :, 0]
        own = [x_KRSC[:, :len(q_BHTC)].transpose(0, 1) for x_KRSC in self.own[2 * layer:2 * layer + 2]]
        trunk = self.trunk[2 * layer:2 * layer + 2]
        out_RHC = self.ops.decode_attention(q_BHTC[:, :, 0], new, own, self.lengths_R, trunk, self.tiles)
        return out_RHC.unsqueeze(2)


class Places:
    """Rows of any age in fixed places: what each samples next, and the K/V that it attends to.

    ops: a module with `decode_attention`, `PrefixTiles`, `sample` and `capture`, on CUDA that of kernels/;
    None: this one. With a `capture` a step is captured once for each of three sizes and stays valid from call
    to call, as all that it reads and writes stays where it is, the weights and a copy of the trunk included.
    room, trunk_room: tokens of a row's own and of a whole trunk to make room for at once. A call that needs
    more gets more, and capturing begins anew. max_prefix: about the longest; it decides about speed alone.
    """

    def __init__(self, model, max_rows=256, ops=None, room=0, trunk_room=0, max_prefix=1024):
        self.model = model
        self.ops = ops or sys.modules[__name__]
        self.cache = None
        self.room = room, trunk_room
        self.max_prefix = max_prefix
        device = next(model.parameters()).device
        self.places_6R = torch.zeros(6, max_rows, dtype=torch.int64, device=device)
        self.rows = None
        self.prefixes = []  # of each place in use: (first token in the trunk, number of tokens)

    @property
    def size(self):
        """Places in use."""
        return len(self.prefixes)

    def fitting(self, num_rows):
        """The size for so many rows. Captured steps have three: below 64 rows they are hardly faster."""
        most = self.places_6R.shape[1]
        if not self.ops.capture:
            return min(num_rows, most)
        return min((size for size in (most // 4, most // 2) if size >= num_rows), default=most)

    def open(self, trunk, rows):
        """Begin a call: all places idle."""
        self.rows = rows
        self.places_6R.zero_()
        self.places_6R[0] = -1
        self.prefixes = [(0, 1)] * self.fitting(rows.num)
        K, N, C = trunk.stored[0].shape
        # A kernel keeps M x H/K x C sums in registers, C padded to a power of two: at most 16384.
        M = min(8, 16384 // (trunk.queries_per_key * max(16, 1 << (C - 1).bit_length())))
        if not self.ops.capture:
            own = [x.new_zeros(K, self.size, min(64, rows.steps), C) for x in trunk.stored]
            self.cache = DecodeCache(self.ops, trunk.stored, own, M, self.max_prefix)
            return
        room = max(rows.steps, self.room[0]), max(N, self.room[1])
        if not self.cache or self.room != room:
            self.room = room
            self.cache = None  # freed before there is another
            own = [x.new_zeros(K, self.places_6R.shape[1], room[0], C) for x in trunk.stored]
            copy = [x.new_zeros(K, room[1], C) for x in trunk.stored]
            self.cache = DecodeCache(self.ops, copy, own, M, self.max_prefix)
        for mine_KNC, theirs_KNC in zip(self.cache.trunk, trunk.stored):
            mine_KNC[:, :N] = theirs_KNC

    def admit(self, idle, members):
        """Give idle places to waiting rows, whose first tokens come from the trunk."""
        table = []
        for place, row in zip(idle, members):
            self.prefixes[place] = self.rows.prefixes[row]
            table.append((place, sum(self.prefixes[place]) - 1, *self.rows.states[row]))
        table_8N = upload(table, self.places_6R.device).T
        new_6N = table_8N[2:]
        self.rows.draw(new_6N, self.model.logits(self.rows.hidden_ND[table_8N[1]]), self.ops.sample)
        self.places_6R[:, table_8N[0]] = new_6N
        self.cache.set_tiles(self.prefixes)

    def shrink(self, idle):
        """Where fewer places would do, move the live rows behind those into idle ones."""
        size = self.fitting(self.size - len(idle))
        if size > 0.875 * self.size:
            return
        moved = sorted(set(range(size, self.size)) - set(idle))
        to = idle[:len(moved)]
        for place, new in zip(moved, to):
            self.prefixes[new] = self.prefixes[place]
        del self.prefixes[size:]
        from_N, to_N = upload([moved, to], self.places_6R.device)
        for x in (self.places_6R, *self.cache.own):
            x[:, to_N] = x[:, from_N]
        if not self.ops.capture:  # dense, so that plain products take heads and rows as one dimension
            self.cache.own = [x[:, :size].contiguous() for x in self.cache.own]
        self.cache.set_tiles(self.prefixes)

    def decode(self):
        """Run the last token of every place through the model: logits (R, V) of the next one."""
        row_R, token_R, position_R, length_R, _, _ = self.places_6R[:, :self.size]
        self.cache.lengths_R = (length_R * (row_R >= 0)).to(torch.int32)
        hidden_BTD = self.model(token_R.unsqueeze(1), position_R.unsqueeze(1), self.cache)
        return self.model.logits(hidden_BTD[:, 0])

    def step(self):
        """One token for every live place; returns the idle places. On CUDA they are those of before the step:
        the host learns of them while the GPU works."""
        places_6R = self.places_6R[:, :self.size]
        if places_6R.is_cuda:
            is_idle_R = (places_6R[0] < 0).to("cpu", non_blocking=True)  # pinned, by this flag
            has_arrived = torch.cuda.current_stream().record_event()
        decode = self.decode
        if self.ops.capture:
            captured = self.cache.captured
            if self.size not in captured:
                captured[self.size] = self.ops.capture(self.decode)
            decode = captured[self.size]
        else:
            room = self.cache.own[0].shape[2]
            if room < self.rows.steps and int(places_6R[3].max()) > room:
                self.cache.own = [F.pad(x, (0, 0, 0, room)) for x in self.cache.own]
        self.rows.draw(places_6R, decode(), self.ops.sample)
        if places_6R.is_cuda:
            has_arrived.synchronize()
        else:
            is_idle_R = places_6R[0] < 0
        return is_idle_R.nonzero().flatten().tolist()


def tile_table(prefixes, M):
    """Places that share a prefix, at most M to a tile: lists of its first token, its length, M places or -1.

    >>> tile_table([(0, 5), (20, 7), (0, 5), (0, 5)], M=4)  # (first token, length) of each place's prefix
    [[0, 5, 0, 2, 3, -1], [20, 7, 1, -1, -1, -1]]
    """
    table = []
    places = sorted(range(len(prefixes)), key=prefixes.__getitem__)
    for prefix, same in itertools.groupby(places, key=prefixes.__getitem__):
        same = list(same)
        for i in range(0, len(same), M):
            tile = same[i:i + M]
            table.append([*prefix, *tile] + [-1] * (M - len(tile)))
    return table


# ---------------------------------------------------------------- ops in plain PyTorch

capture = None  # a step runs as it is; kernels.capture turns it into a CUDA graph


class GatheredTiles:
    """`PrefixTiles` of the plain `decode_attention`: keeps a copy of each tile's prefix.
    rows_TM: (T, M) row numbers, then -1; every row is in one tile. begins_T, lengths_T: tile t serves
    trunk[:, begin : begin + length]; one of length 0 is not in use."""

    def __init__(self, rows_TM, begins_T, lengths_T, max_prefix):
        order_T = lengths_T.argsort(stable=True)[int((lengths_T == 0).sum()):]
        lengths_T = lengths_T[order_T].long()
        begins_T = begins_T[order_T]
        rows_TM = rows_TM[order_T, :int((rows_TM >= 0).sum(1).max())].long()
        rows_X = rows_TM.flatten()  # X: rows tile by tile
        # Where rows already lie so, nothing is moved: that would be up to 8% of a step of a tiny model.
        is_sorted = rows_X.equal(torch.arange(len(rows_X), device=rows_X.device))
        self.rows_X = None if is_sorted else rows_X.clamp(min=0)
        self.back_R = None if is_sorted else rows_X.argsort()[int((rows_X < 0).sum()):]
        # Lengths within a factor of 2 make a bucket, padded: a step has as many operations as buckets, not as
        # lengths. 64 prompts of 20 to 150 tokens, tiny model, CPU: 3 times faster than a product for each.
        sizes = [len(list(same)) for _, same in itertools.groupby(lengths_T.tolist(), int.bit_length)]
        self.counts = [size * rows_TM.shape[1] for size in sizes]
        spans = zip(begins_T[:, None].split(sizes), lengths_T[:, None].split(sizes))
        self.buckets = [padded_spans(*span) for span in spans]  # (T, P) each
        self.copies = {}

    def gather(self, trunk_KNC):
        """The prefixes of a layer, copied once: (K * T, P, C) of each bucket."""
        if trunk_KNC not in self.copies:
            copies = [trunk_KNC.index_select(1, at_TP.flatten()) for at_TP, _ in self.buckets]
            shapes = [at_TP.shape for at_TP, _ in self.buckets]
            self.copies[trunk_KNC] = [x.unflatten(1, TP).flatten(0, 1) for x, TP in zip(copies, shapes)]
        return self.copies[trunk_KNC]


PrefixTiles = GatheredTiles  # its name in `ops`


def decode_attention(q_RHC, new, own, lengths_R, trunk, tiles):
    """Attention of one new token per row over [its prefix in the trunk ; its own tokens] -> out_RHC.

    Pairs of keys and values: new (R, K, C), of this token, are stored as the last of each row's own first.
    own (R, K, S, C), fastest as views of (K, R, S, C): the first lengths_R (int32) count, the others are
    finite. trunk (K, N, C). Scaled by C ** -0.5, softmax in float32.
    """
    R, H, C = q_RHC.shape
    keys_RKSC, values_RKSC = own
    K = keys_RKSC.shape[1]
    longest = int(lengths_R.max())
    is_ragged = int(lengths_R.min()) < longest
    # A slice where all rows are of one age. An idle row (length 0) writes to its last slot, read by nobody.
    at = slice(None), slice(None), longest - 1
    if is_ragged:
        at = torch.arange(R, device=q_RHC.device), slice(None), lengths_R.long() - 1
    keys_RKSC[at], values_RKSC[at] = new
    own_keys_ZSC = keys_RKSC[:, :, :longest].transpose(0, 1).flatten(0, 1)  # Z = K R
    own_values_ZSC = values_RKSC[:, :, :longest].transpose(0, 1).flatten(0, 1)
    q_KRGC = q_RHC.unflatten(1, (K, -1)).transpose(0, 1).contiguous() * C**-0.5
    own_KRGS = torch.bmm(q_KRGC.flatten(0, 1), own_keys_ZSC.mT).unflatten(0, (K, R))
    if is_ragged:
        is_unused_RGS = torch.arange(longest, device=q_RHC.device) >= lengths_R.view(R, 1, 1)
        own_KRGS.masked_fill_(is_unused_RGS, -torch.inf)
    # Tile by tile: queries and scores go to where prefixes are, outputs and weights come back.
    queries = pick(q_KRGC, tiles.rows_X).split(tiles.counts, 1)
    own_scores = pick(own_KRGS, tiles.rows_X).split(tiles.counts, 1)
    prefixes = zip(tiles.buckets, *map(tiles.gather, trunk))
    outs = []
    weights = []
    for q_KXGC, own_KXGS, ((_, is_padding_TP), keys_YPC, values_YPC) in zip(queries, own_scores, prefixes):
        T, P = is_padding_TP.shape
        scores_YLP = torch.bmm(q_KXGC.reshape(K * T, -1, C), keys_YPC.mT)  # Y = K T, L = M G
        if is_padding_TP[0, -1]:  # lengths ascend: the first tile has padding if any has
            scores_YLP.view(K, T, -1, P).masked_fill_(is_padding_TP.unsqueeze(1), -torch.inf)
        scores_KXGS = torch.cat((scores_YLP.view(*own_KXGS.shape[:3], P), own_KXGS), -1)
        # One softmax: merging two by log-sum-exp took 4 times as long where no rows share (256, on a CPU).
        weights_KXGS = scores_KXGS.float().softmax(-1).to(q_RHC.dtype)
        out_YLC = torch.bmm(weights_KXGS[..., :P].view(scores_YLP.shape), values_YPC)
        outs.append(out_YLC.view(q_KXGC.shape))
        weights.append(weights_KXGS[..., P:])
    out_KRGC = pick(torch.cat(outs, 1), tiles.back_R)
    weights_KRGS = pick(torch.cat(weights, 1), tiles.back_R)
    out_ZGC = torch.baddbmm(out_KRGC.flatten(0, 1), weights_KRGS.flatten(0, 1), own_values_ZSC)
    return out_ZGC.unflatten(0, (K, R)).transpose(0, 1).reshape(R, H, C)


def pick(x_KR, index_R):
    """Columns of x by their indices; all for None."""
    return x_KR if index_R is None else x_KR.index_select(1, index_R)


def noise_keys(seed, row_ids):
    """(R,) int64: one well-mixed 64-bit key per row, by splitmix64 of seed and row id."""
    keys = [splitmix64(splitmix64(seed) ^ row) for row in row_ids]
    return torch.tensor([(key + 2**63) % 2**64 - 2**63 for key in keys], dtype=torch.int64)


def splitmix64(x):
    """One step of the splitmix64 generator on Python integers: a well-mixed function of 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def uniform(keys_R, positions_R, vocabulary):
    """Uniform numbers from a counter, u(key, position, token): the same whatever else is in the batch.
    (R, V) float32 in (0, 1), exact near 0: the small numbers decide who wins in `sample`. Key and position
    are mixed to 64 bits as in splitmix64; the halves key a 32-bit hash of the token index (the "lowbias32"
    multipliers). Integer arithmetic only, so every device draws the same numbers.
    """
    mixed_R = keys_R + positions_R * -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio
    mixed_R = (mixed_R ^ (mixed_R >> 30 & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    mixed_R = (mixed_R ^ (mixed_R >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    mixed_R1 = mixed_R.unsqueeze(1)
    x_RV = torch.arange(vocabulary, dtype=torch.int32, device=keys_R.device) + mixed_R1.to(torch.int32)
    shifted_RV = torch.empty_like(x_RV)  # two buffers for all that follows: V is large

    def fold(bits):  # >> copies the sign of an int32; & clears the copies
        torch.bitwise_right_shift(x_RV, bits, out=shifted_RV).bitwise_and_((1 << 32 - bits) - 1)
        x_RV.bitwise_xor_(shifted_RV)
    fold(16)
    x_RV *= 0x7FEB352D
    x_RV ^= (mixed_R1 >> 32).to(torch.int32)
    fold(15)
    x_RV *= -0x7B935975  # 0x846CA68B
    fold(16)
    u_RV = shifted_RV.view(torch.float32).copy_(x_RV.bitwise_and_(0x7FFFFFFF))
    # The top 64 of 2^31 values would round to 1, at which E is infinite and a token of p = 0 could win.
    return u_RV.add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def sample(logits_RV, temperature, keys_R, positions_R):
    """Draw a token per row from softmax(logits / temperature): (tokens_R, logprobs_R, entropies_R), in nats.
    Gumbel-max in its exponential form: with E ~ Exp(1) per token, argmax p / E is a draw from p. One pass, no
    cumulative sum, no host sync. Log-prob and entropy are those of the distribution drawn from; temperature 0
    takes the largest logit, and reports them at temperature 1.
    """
    # A few rows at a time: what they need fits a cache, and no memory of the size of the logits is taken.
    size = max(1, 2**18 // logits_RV.shape[1])
    parts = zip(logits_RV.split(size), keys_R.split(size), positions_R.split(size))
    drawn = [sample_few(logits_rV, temperature, *noise) for logits_rV, *noise in parts]
    return tuple(map(torch.cat, zip(*drawn)))


def sample_few(logits_rV, temperature, keys_r, positions_r):
    """`sample` of r rows. With z = (logit - largest) / T and s = sum exp z: p = exp(z) / s, entropy = log s -
    sum z exp(z) / s, both terms of which are positive."""
    z_rV = logits_rV.float() - logits_rV.amax(-1, keepdim=True)
    z_rV = z_rV.div_(temperature or 1.0).clamp_(min=-200)  # exp(-200) is 0 in float32, and 0 * -inf is NaN
    weights_rV = z_rV.exp()
    sum_r = weights_rV.sum(-1)
    entropies_r = sum_r.log() - torch.linalg.vecdot(z_rV, weights_rV) / sum_r
    if temperature == 0:
        tokens_r1 = logits_rV.argmax(-1, keepdim=True)
    else:
        race_rV = uniform(keys_r, positions_r, logits_rV.shape[1]).neg_().log1p_()  # = -E
        tokens_r1 = torch.div(weights_rV, race_rV, out=race_rV).argmin(-1, keepdim=True)
    return tokens_r1.squeeze(1), z_rV.gather(1, tokens_r1).squeeze(1) - sum_r.log(), entropies_r
