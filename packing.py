"""The training pass for rollouts that share a context: the context runs through the network once, with gradient.

    context  a b c d        completions  e f g          one group: G = 2 rows behind the context a b c d
                                         h

    phase 1: a b c                                      Prefixes: once per group, K/V of every layer kept
    phase 2:       d e f -> predicts e f g              forward_suffixes: [prefix K/V ; own K/V], row by row
                   d     -> predicts h

The context's last token opens every row, so each position of phase 2 predicts one token of a completion, and of
phase 1 nothing but K/V is needed. Tokens through the network: P + G R instead of G (P + R).

Gradients are exact. Phase 2 reads the K/V as detached leaves, which collect its gradients over as many
micro-batches as it takes; `Prefixes.backward` then sends the sum through phase 1, once. Same schedule in
arXiv 2606.01143; layouts that put prefix and rows into one sequence, as arXiv 2506.05433, need both in one pass.

Works with any model that has `model(tokens_BT, positions_BT, cache) -> hidden_BTD` and calls
`cache.attend(layer, q_BHTC, k_BKTC, v_BKTC) -> out_BHTC` in its layers. attend may be called again for a layer, as
torch.utils.checkpoint does in the backward pass. Only torch is imported.

Dimension key: G rows of a call   P tokens of their prefix   R tokens of the longest   S = P + R   N tokens end to end
    H query heads   K key/value heads   C head size   B, T, D as in the model
"""
import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right


class Prefixes:
    """Phase 1: K/V of token-id sequences, run through the model once. A sequence may be empty.

    Sequences are packed end to end, sorted by length. Under torch.no_grad there is nothing to call backward on.
    The activations live until `backward`, so make one per pack of micro-batches, not one per step.
    """

    def __init__(self, model, sequences):
        self.lengths = [len(sequence) for sequence in sequences]
        self.order = sorted((i for i, length in enumerate(self.lengths) if length), key=self.lengths.__getitem__)
        self.packed_lengths = [self.lengths[i] for i in self.order]
        self.roots, self.leaves = [], []  # per layer: (k_NKC, v_NKC) in the graph of phase 1, and cut off from it
        if self.order:
            device = next(model.parameters()).device
            tokens_N = torch.tensor([token for i in self.order for token in sequences[i]], device=device)
            positions_N = torch.cat([torch.arange(length, device=device) for length in self.packed_lengths])
            model(tokens_N[None], positions_N[None], self)

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """Keep the K/V of the packed row (B = 1); attention is causal inside each sequence."""
        if layer == len(self.roots):  # not when activations are recomputed: those K/V belong to no graph
            self.roots.append(tuple(x[0].transpose(0, 1) for x in (k_BKTC, v_BKTC)))
            self.leaves.append(tuple(x.detach().requires_grad_(x.requires_grad) for x in self.roots[-1]))
        # Neighbours of equal length are one call. split, not slices: its backward pass is one concatenation.
        shapes = [(len(list(same)), length) for length, same in itertools.groupby(self.packed_lengths)]
        parts = zip(*(x[0].split([count * length for count, length in shapes], 1) for x in (q_BHTC, k_BKTC, v_BKTC)))
        outs = [F.scaled_dot_product_attention(*(x.unflatten(1, shape).transpose(0, 1) for x in part), is_causal=True,
                                               enable_gqa=True).transpose(0, 1).flatten(1, 2)
                for shape, part in zip(shapes, parts)]
        return torch.cat(outs, 1).unsqueeze(0)

    def pieces(self, layer):
        """{i: (k_PKC, v_PKC)} of a layer: views of the leaves. Empty sequences are left out."""
        if not self.order:
            return {}
        return dict(zip(self.order, zip(*(leaf_NKC.split(self.packed_lengths) for leaf_NKC in self.leaves[layer]))))

    def backward(self):
        """Send the gradients that phase 2 left on the K/V through phase 1: once, after the last micro-batch.

        Without this call the parameters lack the context's part of the gradient, and nothing says so. A second call
        is an error of autograd: the first has freed the graph.
        """
        pairs = [(root, leaf.grad) for roots, leaves in zip(self.roots, self.leaves)
                 for root, leaf in zip(roots, leaves) if leaf.grad is not None]
        if pairs:
            torch.autograd.backward(*zip(*pairs))


def forward_suffixes(model, prefixes, rows):
    """Phase 2: hidden states of rows that continue a prefix: list of (index of the prefix, token ids) -> hidden_ND.

    Packed row by row in the given order, without padding; any order, any number of rows per prefix, and the rows of
    a prefix may come in several calls. Raises ValueError for a row without tokens or of an unknown prefix.
    """
    for number, (i, ids) in enumerate(rows):
        if not ids or not 0 <= i < len(prefixes.lengths):
            raise ValueError(f"row {number}: {len(ids)} tokens behind prefix {i}; it needs at least one token and a "
                             f"prefix from 0 to {len(prefixes.lengths) - 1}")
    positions, places, calls = layout(prefixes.lengths, rows)
    device = next(model.parameters()).device
    tokens_N = torch.tensor([token for _, ids in rows for token in ids], device=device)
    cache = Suffixes(prefixes, torch.tensor(places, device=device), calls)
    return model(tokens_N[None], torch.tensor(positions, device=device)[None], cache)[0]


def layout(prefix_lengths, rows):
    """Which attention calls serve the rows: (positions of the packed tokens, their places among the padded rows of
    all calls, the calls (index of the prefix, G, R)).

    A call takes the rows of one prefix, but none shorter than half its longest: so less than half is padding. Below,
    prefix 0 of 4 tokens has the rows 7 8 9, 6 and 1 2; prefix 1 of 2 tokens has the row 5.

        packed  7 8 9 6 5 1 2        calls  7 8 9     6     5
                                            1 2 .

    >>> layout([4, 2], [(0, [7, 8, 9]), (0, [6]), (1, [5]), (0, [1, 2])])
    ([4, 5, 6, 4, 2, 4, 5], [0, 1, 2, 6, 7, 3, 4], [(0, 2, 3), (0, 1, 1), (1, 1, 1)])
    """
    longest, members, calls, starts, place = {}, {}, [], {}, 0
    for number in sorted(range(len(rows)), key=lambda number: (rows[number][0], -len(rows[number][1]))):
        i, ids = rows[number]
        if 2 * len(ids) < longest.setdefault(i, len(ids)):
            longest[i] = len(ids)
        members.setdefault((i, longest[i]), []).append(number)
    for (i, R), numbers in members.items():
        calls.append((i, len(numbers), R))
        starts |= {number: place + row * R for row, number in enumerate(numbers)}
        place += len(numbers) * R
    positions = [prefix_lengths[i] + t for i, ids in rows for t in range(len(ids))]
    places = [starts[number] + t for number, (_, ids) in enumerate(rows) for t in range(len(ids))]
    return positions, places, calls


class Suffixes:
    """The cache of phase 2. It stores nothing: a layer may run any number of times.

    Only attention is padded. With 8 rows of 20 to 70 tokens behind each of 8 prefixes this takes 6 % of phase 2
    (1.1M parameters, one CPU core); all rows of a prefix padded to its longest, it was 10 %.
    """

    def __init__(self, prefixes, places_N, calls):
        self.prefixes, self.places_N, self.calls = prefixes, places_N, calls
        self.sizes = [G * R for _, G, R in calls]

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """Each row inside the packed row (B = 1) attends to [its prefix ; itself], causally."""
        pieces, outs = self.prefixes.pieces(layer), []
        for (i, G, R), *own in zip(self.calls, *map(self.pad, (q_BHTC, k_BKTC, v_BKTC))):
            q_GRHC, k_GSKC, v_GSKC = (x.unflatten(0, (G, R)) for x in own)
            if i in pieces:
                k_GSKC, v_GSKC = (torch.cat((prefix_PKC.expand(G, -1, -1, -1), x), 1)
                                  for prefix_PKC, x in zip(pieces[i], (k_GSKC, v_GSKC)))
            # Queries end where keys end: the causal mode of flash attention, and on the CPU an (R, P + R) mask.
            # Padding is to the right, so no real token sees it.
            out_GHRC = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q_GRHC, k_GSKC, v_GSKC)),
                                                      causal_lower_right(R, k_GSKC.shape[1]), enable_gqa=True)
            outs.append(out_GHRC.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, self.places_N).transpose(0, 1).unsqueeze(0)

    def pad(self, x_BHTC):
        """The packed row as one (G * R, H, C) per call. A copy into zeros: the backward pass of a gather with repeats
        would add with atomics."""
        x_NHC = x_BHTC[0].transpose(0, 1)
        return x_NHC.new_zeros(sum(self.sizes), *x_NHC.shape[1:]).index_copy(0, self.places_N, x_NHC).split(self.sizes)
