"""The training pass for rollouts that share a context, which runs through the network once, with gradient.

    context  a b c d        completions  e f g          one group: G = 2 rows behind the context a b c d
                                         h

    phase 1: a b c                                      Prefixes: once per group, K/V of every layer kept
    phase 2:       d e f -> predicts e f g              forward_suffixes: [prefix K/V ; own K/V], row by row
                   d     -> predicts h

The context's last token opens every row, so each position of phase 2 predicts one token of a completion, and
of phase 1 nothing but K/V is needed. Tokens through the network: P + G R instead of G (P + R).

Gradients are exact. Phase 2 reads the K/V as detached leaves, which collect its gradients over as many
micro-batches as it takes; `Prefixes.backward` then sends the sum through phase 1, once. Same schedule in
arXiv 2606.01143; layouts that put prefix and rows into one sequence (arXiv 2506.05433) need both in one pass.

Works with any model that has `model(tokens_BT, positions_BT, cache) -> hidden_BTD` and calls
`cache.attend(layer, q_BHTC, k_BKTC, v_BKTC) -> out_BHTC` in its layers; a layer may run again, as
torch.utils.checkpoint makes it in the backward pass.

Dimension key: G rows of a call   P tokens of their prefix   R tokens of the longest   N tokens end to end
    H query heads   K key/value heads   C head size   B, T, D as in the model
"""
import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right


@dataclasses.dataclass
class Batch:
    """A micro-batch: N sampled tokens of some rollouts, end to end."""
    rollouts: list
    rows: list                      # per rollout: (which prefix, input ids), see `forward_suffixes`
    targets_N: torch.Tensor
    old_logprobs_N: torch.Tensor    # when they were drawn, in nats
    advantages_N: torch.Tensor | None = None
    weights_N: torch.Tensor | None = None  # what a token counts in the loss
    reference_N: torch.Tensor | None = None

    def expand(self, values):
        """A number per rollout, repeated for each of its tokens: (N,) float32."""
        lengths = torch.tensor([len(rollout.completion_ids) for rollout in self.rollouts])
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths).to(self.targets_N.device)

    def part(self, begin, end, first=0):
        """Its rows begin .. end - 1 as a batch of their own, in whose pack prefix `first` comes first."""
        ends = [0, *itertools.accumulate(len(rollout.completion_ids) for rollout in self.rollouts)]
        at = slice(ends[begin], ends[end])
        # Whatever it holds per token, a reference's log-probs or capped weights included.
        numbers = {name: value[at] for name, value in vars(self).items()
                   if isinstance(value, torch.Tensor)}
        rows = [(i - first, ids) for i, ids in self.rows[begin:end]]
        return dataclasses.replace(self, rollouts=self.rollouts[begin:end], rows=rows, **numbers)


def make_batches(rollouts, max_tokens, weight_of, device):
    """Micro-batches of rollouts that run behind the same prefixes: yields ([prefix ids, ...], [Batch, ...]).

    A rollout has prompt_ids, anchor_ids, completion_ids, logprobs (one for each of these) and advantage;
    weight_of(rollout) is what each of its tokens counts. At most `max_tokens` run through the model at once,
    prefixes included, or else a single rollout behind its prefix: one batch holds several contexts, or
    several batches hold one context with more rollouts.
    """
    members = {}  # context: its rollouts
    for rollout in rollouts:
        members.setdefault(tuple(rollout.prompt_ids + rollout.anchor_ids), []).append(rollout)
    packs = []
    room = 0  # tokens that the last pack can still take
    for context, group in sorted(members.items(), key=lambda item: len(item[0])):
        num_tokens = len(context) - 1 + sum(len(rollout.completion_ids) for rollout in group)
        if num_tokens > room:
            packs.append([])
            room = max_tokens
        packs[-1].append((context, group))  # of like length, so that phase 1 is balanced
        room -= num_tokens
    # Whoever takes a pair runs its prefixes, its batches, and the prefixes' backward.
    for pack in packs:
        contexts = [list(context[:-1]) for context, _ in pack]
        batches = []
        room = 0
        for i, (context, group) in enumerate(pack):
            # Of a context the longest first, as `layout` wants them.
            for rollout in sorted(group, key=lambda rollout: -len(rollout.completion_ids)):
                if not batches or len(rollout.completion_ids) > room:
                    batches.append([])
                    room = max_tokens - sum(map(len, contexts))
                batches[-1].append((i, context, rollout))
                room -= len(rollout.completion_ids)
        yield contexts, [make_batch(rows, weight_of, device) for rows in batches]


def halve(contexts, batches):
    """What `make_batches` yielded once, as yields of half the size; the same ones where rows are alone."""
    if len(contexts) > 1:  # then they are in one batch
        middle = len(contexts) // 2
        row = sum(i < middle for i, _ in batches[0].rows)
        return [(contexts[:middle], [batches[0].part(0, row)]),
                (contexts[middle:], [batches[0].part(row, len(batches[0].rows), middle)])]
    halves = []
    for batch in batches:
        row = (len(batch.rows) + 1) // 2
        halves.append(batch.part(0, row))
        if row < len(batch.rows):  # a row is not cut
            halves.append(batch.part(row, len(batch.rows)))
    return [(contexts, halves)]


def make_batch(rows, weight_of, device):
    """[(which prefix, context, rollout), ...] -> Batch. Inputs begin with the last token of the context:

        context  q q q e e           completion  o o o s         (s: the stop token, an action like any other)
        prefix   q q q e             input       e o o o
                                     target      o o o s
    """
    rollouts = [rollout for _, _, rollout in rows]
    inputs = [(i, [context[-1], *rollout.completion_ids[:-1]]) for i, context, rollout in rows]
    targets = [token for rollout in rollouts for token in rollout.completion_ids]
    logprobs = [logprob for rollout in rollouts for logprob in rollout.logprobs]
    targets_N = torch.tensor(targets, device=device)
    batch = Batch(rollouts, inputs, targets_N, old_logprobs_N=torch.tensor(logprobs, device=device))
    batch.advantages_N = batch.expand([rollout.advantage or 0.0 for rollout in rollouts])
    batch.weights_N = batch.expand([weight_of(rollout) for rollout in rollouts])
    return batch


class Prefixes:
    """Phase 1: K/V of token-id sequences, packed end to end and run through the model once. One may be empty.

    The activations live until `backward`, so make one per pack of micro-batches, not one per step. Under
    torch.no_grad there is nothing to call backward on.
    """

    def __init__(self, model, sequences):
        self.lengths = [len(sequence) for sequence in sequences]
        self.roots = []   # per layer: keys (K, P, C) of every sequence, then their values, with their graph
        self.leaves = []  # the same, cut off from it
        if any(self.lengths):
            device = next(model.parameters()).device
            tokens_N = torch.tensor([token for sequence in sequences for token in sequence], device=device)
            positions_N = torch.cat([torch.arange(length, device=device) for length in self.lengths])
            model(tokens_N[None], positions_N[None], self)

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """Keep the K/V of the packed row (B = 1); attention is causal inside each sequence."""
        # split, not slices: its backward pass is one concatenation.
        queries, keys, values = (x[0].split(self.lengths, 1) for x in (q_BHTC, k_BKTC, v_BKTC))
        if layer == len(self.roots):  # not when activations are recomputed: those K/V belong to no graph
            self.roots.append(keys + values)
            self.leaves.append([x.detach().requires_grad_(x.requires_grad) for x in keys + values])
        outs = [F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
                for q, k, v in zip(queries, keys, values) if q.shape[1]]
        return torch.cat(outs, 2)

    def backward(self):
        """Send the gradients that phase 2 left on the K/V through phase 1: once, after the last micro-batch.

        Without this call the parameters lack the context's part of the gradient, and nothing says so.
        """
        pairs = [(root, leaf.grad) for roots, leaves in zip(self.roots, self.leaves)
                 for root, leaf in zip(roots, leaves) if leaf.grad is not None]
        if pairs:
            torch.autograd.backward(*zip(*pairs))


def forward_suffixes(model, prefixes, rows):
    """Phase 2: hidden states of rows behind prefixes: [(index of the prefix, token ids), ...] -> hidden_ND.

    Packed row by row in the given order, without padding; the rows of a prefix may come in several calls.
    Raises ValueError for a row without tokens or of an unknown prefix.
    """
    for number, (i, ids) in enumerate(rows):
        if not ids or not 0 <= i < len(prefixes.lengths):
            raise ValueError(f"row {number}: {len(ids)} tokens behind prefix {i}; it needs a token or more "
                             f"and a prefix from 0 to {len(prefixes.lengths) - 1}")
    positions, places, calls = layout(prefixes.lengths, rows)
    device = next(model.parameters()).device
    tokens_N = torch.tensor([token for _, ids in rows for token in ids], device=device)
    cache = Suffixes(prefixes, torch.tensor(places, device=device), calls)
    return model(tokens_N[None], torch.tensor(positions, device=device)[None], cache)[0]


def layout(prefix_lengths, rows):
    """Which attention calls serve the rows: (positions of the packed tokens, their places among the padded
    rows of all calls, the calls (index of the prefix, G, R)).

    A call takes neighbours of one prefix, none longer than its first and none shorter than 4/5 of it: at most
    a fifth is padding, and rows of falling length need few calls. (Half, and no padding, are 3 to 5% slower
    for a tiny model's update on a CPU; for rows of 64 to 512 tokens attention takes 1.3 times as long with
    half, as long without padding.)

        packed  7 8 9 3 4 1 2 1 2 6 5    calls  7 8 9 3 4   6   5     prefix 0 of 4 tokens: all but the 5
                                                1 2 1 2 .             prefix 1 of 2 tokens: 5

    >>> rows = [(0, [7, 8, 9, 3, 4]), (0, [1, 2, 1, 2]), (0, [6]), (1, [5])]
    >>> layout([4, 2], rows)[1:]
    ([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11], [(0, 2, 5), (0, 1, 1), (1, 1, 1)])
    """
    positions, places = [], []
    calls = []
    start = 0  # of the row's padded place
    for i, ids in rows:
        if not calls or calls[-1][0] != i or not 4 * len(ids) <= 4 * calls[-1][2] <= 5 * len(ids):
            calls.append((i, 0, len(ids)))
        _, G, R = calls[-1]  # R is the length of its first row
        calls[-1] = (i, G + 1, R)
        positions += range(prefix_lengths[i], prefix_lengths[i] + len(ids))
        places += range(start, start + len(ids))
        start += R
    return positions, places, calls


class Suffixes:
    """The cache of phase 2. It stores nothing: a layer may run any number of times."""

    def __init__(self, prefixes, places_N, calls):
        self.prefixes = prefixes
        self.places_N = places_N
        self.calls = calls

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """Each row inside the packed row (B = 1) attends to [its prefix ; itself], causally."""
        outs = []
        for (i, G, R), q, k, v in zip(self.calls, self.pad(q_BHTC), self.pad(k_BKTC), self.pad(v_BKTC)):
            # (G * R, heads, C) -> (G, heads, R, C)
            q, k, v = (x.unflatten(0, (G, R)).transpose(1, 2) for x in (q, k, v))
            # Every row sees its prefix, which is stored once: expand copies nothing, the concatenation does.
            if self.prefixes.lengths[i]:
                leaves = self.prefixes.leaves[layer]
                k = torch.cat((leaves[i].expand(G, -1, -1, -1), k), 2)
                v = torch.cat((leaves[i + len(self.prefixes.lengths)].expand(G, -1, -1, -1), v), 2)
            # Queries end where keys end: the causal mode of flash attention, on the CPU an (R, P + R) mask.
            # Padding is to the right, so no real token sees it.
            out = F.scaled_dot_product_attention(q, k, v, causal_lower_right(R, k.shape[2]), enable_gqa=True)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return Unpad.apply(torch.cat(outs), self.places_N).transpose(0, 1).unsqueeze(0)

    def pad(self, x_BHTC):
        """The packed row as one (G * R, H, C) per call. A copy into zeros: the backward pass of a gather with
        repeats would add with atomics."""
        x_NHC = x_BHTC[0].transpose(0, 1)
        sizes = [G * R for _, G, R in self.calls]
        padded = x_NHC.new_zeros(sum(sizes), *x_NHC.shape[1:]).index_copy(0, self.places_N, x_NHC)
        return padded.split(sizes)


class Unpad(torch.autograd.Function):
    """x_MHC.index_select(0, places_N), no place taken twice: its own backward pass would add with atomics."""

    @staticmethod
    def forward(ctx, x_MHC, places_N):
        ctx.save_for_backward(places_N)
        ctx.size = len(x_MHC)
        return x_MHC.index_select(0, places_N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NHC):
        grad_MHC = grad_NHC.new_zeros(ctx.size, *grad_NHC.shape[1:])
        return grad_MHC.index_copy_(0, ctx.saved_tensors[0], grad_NHC), None
