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
`PrefixTiles`, `sample`. Those below are plain PyTorch; with Triton's (kernels/) a step on CUDA is one graph.

Works with any model that has `model(tokens_BT, positions_BT, cache) -> hidden_BTD`, `model.logits(hidden)`
and calls `cache.attend(layer, q_BHTC, k_BKTC, v_BKTC) -> out_BHTC` in its layers. Only torch is imported.

Dimension key: R rows in a batch   V vocabulary   H query heads   K key/value heads, G = H / K   C head size
    N tokens of the trunk   T tiles of M rows   P tokens of a prefix   S own tokens   B, T, D as in the model
"""
import collections
import dataclasses
import itertools
import sys

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
    """What a row sampled. Log-probs, and entropies of the distributions drawn from, are in nats."""
    token_ids: list     # the stop token kept
    logprobs: list
    finish_reason: str  # "stop" or "length"
    entropies: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Fork:
    """A branch point: `len(row_ids)` rows continue `sequence` of the trunk after its first `length` tokens.
    A row's randomness is keyed by (seed, its row id, position) and by nothing else, so give every row of a
    training its own id. At most `max_new_tokens` are sampled (None: as the sampling parameters say).
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
    forks = []
    for i, prompt in enumerate(prompts):
        forks.append(Fork(i, len(prompt), tuple(range(i * num_samples, (i + 1) * num_samples))))
    return branch(model, prefill(model, prompts), forks, params, **options)


@torch.no_grad()
def branch(model, trunk, forks, params, max_rows=256, ops=None):
    """Sample every row of every fork to its end: list of Fork -> list (per fork) of lists of Completion.
    At most `max_rows` rows are decoded at once. ops: a module with `decode_attention`, `PrefixTiles` and
    `sample`, on CUDA that of kernels/; None: this one. What is sampled depends on neither. Raises ValueError
    for a fork that lies outside its sequence or may not sample a token.
    """
    rows = Rows(trunk, forks, params)
    num_places = min(max_rows, rows.num)
    batch = Places(model, trunk, rows, num_places, ops or sys.modules[__name__])
    # Neighbours share a prefix, or at least about its length: less padding.
    waiting = collections.deque(sorted(range(rows.num), key=lambda row: rows.prefixes[row][::-1]))
    idle = list(range(num_places))
    # On CUDA each size costs an eager step and a capture, and below 64 rows a step is hardly cheaper.
    fullest, fewest = (0.5, 64) if trunk.hidden_ND.is_cuda else (0.875, 1)
    while waiting or len(idle) < num_places:
        # Admitting gathers prefixes and runs the head: worth it once an eighth of the places is idle.
        if waiting and len(idle) >= num_places / 8:
            batch.admit(idle, [waiting.popleft() for _ in idle[:len(waiting)]])
        elif not waiting and num_places > fewest and num_places - len(idle) <= fullest * num_places:
            num_places = max(num_places - len(idle), fewest)
            batch.shrink(idle, num_places)
        idle = batch.step()
    return rows.completions(forks)


# ---------------------------------------------------------------- trunk


class Trunk:
    """K/V and last hidden states of whole sequences, end to end: keys[layer] is (K, N, C), sequence i lies at
    starts[i] .. starts[i] + lengths[i]."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.starts = [0, *itertools.accumulate(lengths)]
        self.keys = []
        self.values = []
        self.hidden_ND = None
        self.queries_per_key = 1
        self.members = []  # the sequences of the forward pass under way

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """Store the K/V of one packed row (B = 1) of sequences; attention is causal inside each of them."""
        _, K, T, C = k_BKTC.shape
        if layer == len(self.keys):
            self.queries_per_key = q_BHTC.shape[1] // K
            self.keys.append(k_BKTC.new_empty(K, self.starts[-1], C))
            self.values.append(k_BKTC.new_empty(K, self.starts[-1], C))
        start = self.starts[self.members[0]]
        self.keys[layer][:, start:start + T] = k_BKTC[0]
        self.values[layer][:, start:start + T] = v_BKTC[0]
        lengths = [self.lengths[i] for i in self.members]
        parts = zip(*(x.split(lengths, dim=2) for x in (q_BHTC, k_BKTC, v_BKTC)))
        outs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat(outs, dim=2)


@torch.no_grad()
def prefill(model, sequences, tokens_per_pass=16384):
    """Run whole token-id sequences through the model once and keep their K/V: list of lists -> Trunk.
    Sequences are packed end to end, so nothing is spent on padding; a pass holds about `tokens_per_pass`
    tokens. Raises ValueError where there is nothing to run.
    """
    if not sequences or not all(sequences):
        raise ValueError("prefill needs at least one sequence, and every sequence at least one token")
    device = next(model.parameters()).device
    trunk = Trunk([len(sequence) for sequence in sequences])
    hiddens = []
    # A pass: the sequences that start within the same `tokens_per_pass` tokens.
    for _, members in itertools.groupby(range(len(sequences)), lambda i: trunk.starts[i] // tokens_per_pass):
        trunk.members = list(members)
        tokens = [token for i in trunk.members for token in sequences[i]]
        positions = [position for i in trunk.members for position in range(trunk.lengths[i])]
        tokens_BT, positions_BT = torch.tensor([[tokens], [positions]], device=device)
        hiddens.append(model(tokens_BT, positions_BT, trunk)[0])
    trunk.hidden_ND = torch.cat(hiddens)
    return trunk


# ---------------------------------------------------------------- rows, and the batch that samples them


class Rows:
    """What every row of a call is to sample, and what it has sampled so far: (rows, steps) buffers.
    The last row and the last column are bins: idle places write there, so that no write needs a mask."""

    def __init__(self, trunk, forks, params):
        self.params = params
        self.prefixes = []  # of each row: (first token in the trunk, number of tokens)
        starts = []
        for f, fork in enumerate(forks):
            limit = params.max_new_tokens if fork.max_new_tokens is None else fork.max_new_tokens
            longest = trunk.lengths[fork.sequence]
            if limit < 1 or not 1 <= fork.length <= longest:
                raise ValueError(f"fork {f}: cannot sample {limit} tokens after {fork.length} of {longest}; "
                                 "both must be at least 1")
            for key in noise_keys(params.seed, fork.row_ids).tolist():
                starts.append((len(starts), 0, fork.length - 1, 0, limit, key))
                self.prefixes.append((trunk.starts[fork.sequence], fork.length))
        self.num = len(starts)
        self.sizes = collections.Counter(self.prefixes)
        self.steps = max((start[4] for start in starts), default=0)
        # A place: its row (idle: the bin), the last token sampled (its K/V are not in the cache yet), that
        # token's position, how many are sampled, how many may be, the key of the row's noise.
        device = trunk.hidden_ND.device
        self.starts_6R = torch.tensor(starts, dtype=torch.int64, device=device).view(-1, 6).T.contiguous()
        self.stops_1X = torch.tensor([params.stop_token_ids], dtype=torch.int64, device=device)
        shape = self.num + 1, self.steps + 1
        self.tokens_RS = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs_RS = torch.zeros(shape, device=device)
        self.entropies_RS = torch.zeros(shape, device=device)
        self.lengths_R = torch.zeros(shape[0], dtype=torch.int64, device=device)

    def draw(self, places_6R, logits_RV, sample):
        """Sample the next token of every place, in place: what a CUDA graph replays has fixed addresses."""
        row_R, token_R, position_R, length_R, limit_R, key_R = places_6R
        is_live_R = row_R < self.num
        position_R += is_live_R
        drawn_R, logprob_R, entropy_R = sample(logits_RV, self.params.temperature, key_R, position_R)
        self.tokens_RS[row_R, length_R] = drawn_R
        self.logprobs_RS[row_R, length_R] = logprob_R
        self.entropies_RS[row_R, length_R] = entropy_R
        length_R += is_live_R
        self.lengths_R[row_R] = length_R
        has_ended_R = (drawn_R.unsqueeze(1) == self.stops_1X).any(1) | (length_R >= limit_R)
        row_R.masked_fill_(has_ended_R, self.num)
        token_R.copy_(drawn_R)

    def completions(self, forks):
        """The buffers as lists of Completion per fork."""
        buffers = self.lengths_R, self.tokens_RS, self.logprobs_RS, self.entropies_RS
        done = []
        for length, tokens, logprobs, entropies in zip(*map(torch.Tensor.tolist, buffers)):
            reason = "stop" if tokens[length - 1] in self.params.stop_token_ids else "length"
            done.append(Completion(tokens[:length], logprobs[:length], reason, entropies[:length]))
        done = iter(done)
        return [list(itertools.islice(done, len(fork.row_ids))) for fork in forks]


class Places:
    """Rows of any age in fixed places: what each samples next, the K/V (K, R, S, C) of what it has sampled,
    and which share a prefix. Key heads come first: then the queries of a tile are neighbours."""

    def __init__(self, model, trunk, rows, num_places, ops):
        self.model = model
        self.trunk = trunk
        self.rows = rows
        self.ops = ops
        self.places_6R = rows.starts_6R.new_empty(6, num_places)
        self.members = [0] * num_places  # the row that is, or was last, in each place
        self.keys = []
        self.values = []
        self.tiles = None
        self.lengths_R = None  # own tokens that this step attends to; an idle place attends to none
        self.at = None         # where the K/V of this step go
        self.graph = None

    def admit(self, idle, members):
        """Give idle places to waiting rows, whose first tokens come from the trunk."""
        new_6R = self.rows.starts_6R[:, members]
        ends = [sum(self.rows.prefixes[row]) - 1 for row in members]
        self.rows.draw(new_6R, self.model.logits(self.trunk.hidden_ND[ends]), self.ops.sample)
        self.places_6R[:, idle[:len(members)]] = new_6R
        for place, row in zip(idle, members):
            self.members[place] = row
        self.set_tiles()

    def shrink(self, idle, size):
        """Move the live rows to the front of a smaller batch; idle places fill it up."""
        live = sorted(set(range(len(self.members))) - set(idle))
        kept = (live + idle)[:size]
        self.members = [self.members[place] for place in kept]
        kept_R = torch.tensor(kept, device=self.places_6R.device)
        self.places_6R = self.places_6R.index_select(1, kept_R)
        self.keys = [keys_KRSC.index_select(1, kept_R) for keys_KRSC in self.keys]
        self.values = [values_KRSC.index_select(1, kept_R) for values_KRSC in self.values]
        self.graph = None
        self.set_tiles()

    def set_tiles(self):
        """Say which rows share which prefix."""
        sizes = self.rows.sizes
        # A kernel keeps M x H/K x C sums in registers, at most 16384.
        most = 16384 // (self.trunk.queries_per_key * self.trunk.keys[0].shape[2])
        M = min(8, max(sizes.values()), most)
        table = tile_table([self.rows.prefixes[row] for row in self.members], M)
        if self.ops.PrefixTiles is not PrefixTiles:
            # As many tiles as these places can ever need; a length of 0: nothing to do.
            num_tiles = min(len(self.members), sum(-(-size // M) for size in sizes.values()))
            table += [[0, 0] + [-1] * M] * (num_tiles - len(table))
        table_XT = torch.tensor(table, dtype=torch.int32, device=self.places_6R.device).T.contiguous()
        longest = max(length for _, length in sizes)
        tiles = self.ops.PrefixTiles(table_XT[2:].T.contiguous(), table_XT[0], table_XT[1], longest)
        if self.graph is None:
            self.tiles = tiles
        else:  # which reads the old tables where they lie
            for old, new in zip(self.tiles[:3], tiles):
                old.copy_(new)

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """One new token per row (T = 1): store its K/V after the row's own, attend to [prefix ; own]."""
        if layer == len(self.keys):
            R, K, _, C = k_BKTC.shape
            # A graph needs fixed addresses; elsewhere `advance` doubles the room.
            room = self.rows.steps if k_BKTC.is_cuda else min(64, self.rows.steps)
            self.keys.append(k_BKTC.new_zeros(K, R, room, C))
            self.values.append(k_BKTC.new_zeros(K, R, room, C))
        keys_KRSC, values_KRSC = self.keys[layer], self.values[layer]
        keys_KRSC[self.at] = k_BKTC[:, :, 0].transpose(0, 1)
        values_KRSC[self.at] = v_BKTC[:, :, 0].transpose(0, 1)
        out_RHC = self.ops.decode_attention(
            q_BHTC[:, :, 0], keys_KRSC.transpose(0, 1), values_KRSC.transpose(0, 1), self.lengths_R,
            self.trunk.keys[layer], self.trunk.values[layer], self.tiles)
        return out_RHC.unsqueeze(2)

    def advance(self):
        """Run the last token of every place through the model and draw the next one."""
        row_R, token_R, position_R, length_R, _, _ = self.places_6R
        self.lengths_R = (length_R * (row_R < self.rows.num)).to(torch.int32)
        self.at = slice(None), torch.arange(len(row_R), device=row_R.device), length_R - 1
        room = self.keys[0].shape[2] if self.keys else self.rows.steps
        if room < self.rows.steps and int(length_R.max()) > room:
            self.keys = [F.pad(keys_KRSC, (0, 0, 0, room)) for keys_KRSC in self.keys]
            self.values = [F.pad(values_KRSC, (0, 0, 0, room)) for values_KRSC in self.values]
        hidden_BTD = self.model(token_R.unsqueeze(1), position_R.unsqueeze(1), self)
        self.rows.draw(self.places_6R, self.model.logits(hidden_BTD[:, 0]), self.ops.sample)

    def step(self):
        """One token for every live place; returns the idle places. On CUDA they are those of before the step:
        the host reads of them while the GPU works."""
        if not self.places_6R.is_cuda:
            self.advance()
            return (self.places_6R[0] == self.rows.num).nonzero().flatten().tolist()
        is_idle_R = (self.places_6R[0] == self.rows.num).to("cpu", non_blocking=True)  # pinned, by this flag
        has_arrived = torch.cuda.Event()
        has_arrived.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.advance()  # the first step of a size runs eagerly, which compiles the kernels
            if self.ops.PrefixTiles is not PrefixTiles:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.advance()
        has_arrived.synchronize()
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


class GatheredTiles:
    """`PrefixTiles` of the plain `decode_attention`, which hold a copy of each tile's prefix.
    rows_TM: (T, M) row numbers, -1 for none; every row has a place. begins_T, lengths_T: tile t serves
    trunk[:, begin : begin + length]."""

    def __init__(self, rows_TM, begins_T, lengths_T, max_prefix):
        lengths_T, order_T = lengths_T.long().sort(stable=True)
        begins_T = begins_T[order_T]
        rows_X = rows_TM[order_T].long().flatten()  # X: rows tile by tile
        # Where rows already lie so, nothing is moved: that would be up to 8% of a step of a tiny model.
        is_sorted = rows_X.equal(torch.arange(len(rows_X), device=rows_X.device))
        self.rows_X = None if is_sorted else rows_X.clamp(min=0)
        self.back_R = None if is_sorted else rows_X.argsort()[int((rows_X < 0).sum()):]
        # Lengths within a factor of 2 make a bucket, padded: a step has as many operations as buckets, not as
        # lengths. 64 prompts of 20 to 150 tokens, tiny model, CPU: 3 times faster than a product for each.
        sizes = [len(list(same)) for _, same in itertools.groupby(lengths_T.tolist(), int.bit_length)]
        self.counts = [size * rows_TM.shape[1] for size in sizes]
        self.buckets = []  # (T, P) each: where keys lie in the trunk, and which are padding
        for begins_T1, lengths_T1 in zip(begins_T[:, None].split(sizes), lengths_T[:, None].split(sizes)):
            nth_P = torch.arange(int(lengths_T1.max()), device=lengths_T.device)
            self.buckets.append((begins_T1 + nth_P.minimum(lengths_T1 - 1), nth_P >= lengths_T1))
        self.copies = {}

    def gather(self, trunk_KNC):
        """The prefixes of a layer, copied once: (K * T, P, C) of each bucket."""
        if trunk_KNC not in self.copies:
            copies = [trunk_KNC.index_select(1, at_TP.flatten()) for at_TP, _ in self.buckets]
            shapes = [at_TP.shape for at_TP, _ in self.buckets]
            self.copies[trunk_KNC] = [x.unflatten(1, TP).flatten(0, 1) for x, TP in zip(copies, shapes)]
        return self.copies[trunk_KNC]


PrefixTiles = GatheredTiles  # its name in `ops`


def decode_attention(q_RHC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, tiles):
    """Attention of one new token per row over [its prefix in the trunk ; its own tokens] -> out_RHC.
    Scaled by C ** -0.5, softmax in float32. keys_RKSC, values_RKSC: own tokens, fastest as a view of
    (K, R, S, C); of each row's the first lengths_R (int32) count and the others are finite.
    """
    R, H, C = q_RHC.shape
    K = keys_RKSC.shape[1]
    longest = int(lengths_R.max())
    own_keys_ZSC = keys_RKSC[:, :, :longest].transpose(0, 1).flatten(0, 1)  # Z = K R
    own_values_ZSC = values_RKSC[:, :, :longest].transpose(0, 1).flatten(0, 1)
    q_KRGC = q_RHC.unflatten(1, (K, -1)).transpose(0, 1).contiguous() * C**-0.5
    own_KRGS = torch.bmm(q_KRGC.flatten(0, 1), own_keys_ZSC.mT).unflatten(0, (K, R))
    if int(lengths_R.min()) < longest:
        is_unused_RGS = torch.arange(longest, device=q_RHC.device) >= lengths_R.view(R, 1, 1)
        own_KRGS.masked_fill_(is_unused_RGS, -torch.inf)
    # Tile by tile: queries and scores go to where prefixes are, outputs and weights come back.
    queries = pick(q_KRGC, tiles.rows_X).split(tiles.counts, 1)
    scores = pick(own_KRGS, tiles.rows_X).split(tiles.counts, 1)
    trunk = zip(tiles.buckets, tiles.gather(trunk_keys_KNC), tiles.gather(trunk_values_KNC))
    outs = []
    weights = []
    for q_KXGC, own_KXGS, ((_, is_padding_TP), keys_YPC, values_YPC) in zip(queries, scores, trunk):
        T, P = is_padding_TP.shape
        scores_YLP = torch.bmm(q_KXGC.reshape(K * T, -1, C), keys_YPC.mT)  # Y = K T, L = M G
        if is_padding_TP[0, -1]:  # of the shortest
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
    probs_RV = F.softmax(logits_RV.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token_R1 = logits_RV.argmax(-1, keepdim=True)
    else:
        race_RV = uniform(keys_R, positions_R, logits_RV.shape[1]).neg_().log1p_()  # = -E
        token_R1 = torch.div(probs_RV, race_RV, out=race_RV).argmin(-1, keepdim=True)
    logprobs_R = probs_RV.gather(1, token_R1).squeeze(1).log()
    # -sum p log p, where 0 log 0 is 0. special.entr takes twice as long: its logarithm is not vectorised.
    log_RV = probs_RV.clamp(min=torch.finfo(torch.float32).tiny).log_()
    return token_R1.squeeze(1), logprobs_R, log_RV.mul_(probs_RV).sum(-1).neg_()
