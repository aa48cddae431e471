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

Dimension key: N tokens end to end   M keys of all rows   G rows of a prefix   P its tokens   R a row's
    H query heads   K key/value heads   C head size   B, T, D as in the model
"""
import dataclasses
import inspect
import itertools

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 takes fewer key/value heads as they are, 2.12 wants to be told.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


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
            for rollout in group:
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


def split_context(context_ids, completion_ids):
    """(prefix, row) as lists: position n of a row behind its prefix predicts completion_ids[n].

        prefixes = Prefixes(model, [split_context(context_ids, [])[0]])
        rows = [(0, split_context(context_ids, ids)[1]) for ids in completions]
        hidden_ND = forward_suffixes(model, prefixes, rows)
        targets_N = torch.tensor(sum(completions, []))
        loss_of(head(hidden_ND), targets_N).backward()
        prefixes.backward()

    >>> split_context([5, 6, 7], [1, 2])
    ([5, 6], [7, 1])
    """
    return [*context_ids[:-1]], [context_ids[-1], *completion_ids[:-1]]


def make_batch(rows, weight_of, device):
    """[(which prefix, context, rollout), ...] -> Batch. Inputs begin with the last token of the context:

        context  q q q e e           completion  o o o s         (s: the stop token, an action like any other)
        prefix   q q q e             input       e o o o
                                     target      o o o s
    """
    rollouts = [rollout for _, _, rollout in rows]
    inputs = [(i, split_context(context, rollout.completion_ids)[1]) for i, context, rollout in rows]
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
        self.roots = []   # per layer: keys and values (N, K, C) with their graph
        self.leaves = []  # the same, cut off from it
        if any(self.lengths):
            device = next(model.parameters()).device
            self.ragged = Ragged(self.lengths, self.lengths, device)
            tokens_N = torch.tensor([token for sequence in sequences for token in sequence], device=device)
            positions_N = torch.cat([torch.arange(length, device=device) for length in self.lengths])
            model(tokens_N[None], positions_N[None], self)

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """Keep the K/V of the packed row (B = 1); attention is causal inside each sequence."""
        q_NHC, k_NKC, v_NKC = (x_BHTC[0].transpose(0, 1) for x_BHTC in (q_BHTC, k_BKTC, v_BKTC))
        if layer == len(self.roots):  # not when activations are recomputed: those K/V belong to no graph
            self.roots.append((k_NKC, v_NKC))
            self.leaves.append([x.detach().requires_grad_(x.requires_grad) for x in (k_NKC, v_NKC)])
        return self.ragged.attend(q_NHC, k_NKC, v_NKC).transpose(0, 1)[None]

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
    Raises ValueError for no rows, a row without tokens or of an unknown prefix.
    """
    if not rows:
        raise ValueError("forward_suffixes needs a row or more")
    for number, (i, ids) in enumerate(rows):
        if not ids or not 0 <= i < len(prefixes.lengths):
            raise ValueError(f"row {number}: {len(ids)} tokens behind prefix {i}; it needs a token or more "
                             f"and a prefix from 0 to {len(prefixes.lengths) - 1}")
    device = next(model.parameters()).device
    tokens_N = torch.tensor([token for _, ids in rows for token in ids], device=device)
    positions = [prefixes.lengths[i] + n for i, ids in rows for n in range(len(ids))]
    cache = Suffixes(prefixes, rows, device)
    return model(tokens_N[None], torch.tensor(positions, device=device)[None], cache)[0]


class Suffixes:
    """The cache of phase 2. It stores nothing: a layer may run any number of times."""

    def __init__(self, prefixes, rows, device):
        self.prefixes = prefixes
        # Where a row's keys are, its prefix's and its own, among those of all prefixes and then all rows.
        # Flash attention wants them together; with few key/value heads the copies are small.
        ends = [0, *itertools.accumulate(prefixes.lengths)]
        own = ends[-1]
        places = []
        for i, ids in rows:
            places += [*range(ends[i], ends[i + 1]), *range(own, own + len(ids))]
            own += len(ids)
        self.places_M = torch.tensor(places, device=device)
        lengths = [len(ids) for _, ids in rows]
        self.ragged = Ragged(lengths, [prefixes.lengths[i] + len(ids) for i, ids in rows], device)

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        """Each row inside the packed row (B = 1) attends to [its prefix ; itself], causally."""
        q_NHC, *own = (x_BHTC[0].transpose(0, 1) for x_BHTC in (q_BHTC, k_BKTC, v_BKTC))
        if self.prefixes.leaves:  # else no prefix has a token
            own = [Gather.apply(torch.cat(both), self.places_M)
                   for both in zip(self.prefixes.leaves[layer], own)]
        return self.ragged.attend(q_NHC, *own).transpose(0, 1)[None]


class Ragged:
    """Causal attention over sequences end to end, each of whose last query sees its last key."""

    def __init__(self, queries, keys, device):
        self.lengths = queries, keys  # on the host too, so that no layer waits for the GPU to read them
        # Variable-length flash attention is one call, where a GPU has it: an update is up to 4 times as fast
        # (docs/TRIED.md). Elsewhere each sequence has a call of its own, as fast on a CPU.
        self.flash = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        self.masks = {}  # (queries, keys) of a sequence: for all layers, as autograd keeps it
        if self.flash:
            self.ends = [torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
                         for lengths in self.lengths]

    def attend(self, q_NHC, k_MKC, v_MKC):
        """(N, H, C) queries, (M, K, C) keys and values -> (N, H, C)."""
        q_NHC = q_NHC.to(v_MKC.dtype)  # torch.autocast leaves what was rotated in float32
        k_MKC = k_MKC.to(v_MKC.dtype)
        if self.flash and q_NHC.dtype in (torch.float16, torch.bfloat16) and q_NHC.shape[-1] % 8 == 0:
            return varlen_attn(q_NHC, k_MKC, v_MKC, *self.ends, *map(max, self.lengths),
                               window_size=(-1, 0), **GQA)
        queries, keys = self.lengths
        rows = zip(q_NHC.transpose(0, 1).split(queries, 1), k_MKC.transpose(0, 1).split(keys, 1),
                   v_MKC.transpose(0, 1).split(keys, 1))
        outs = []
        for q, k, v in rows:
            if q.shape[1]:  # an empty prefix has no queries
                options = {"is_causal": True} if q.shape[1] == k.shape[1] else {"attn_mask": self.mask(q, k)}
                qkv = q[None], k[None], v[None]
                outs.append(F.scaled_dot_product_attention(*qkv, enable_gqa=True, **options))
        return torch.cat(outs, 2)[0].transpose(0, 1)

    def mask(self, q_HRC, k_KMC):
        """(R, M): 0 at the keys that a query sees, the last one all of them; else -infinity."""
        size = q_HRC.shape[1], k_KMC.shape[1]
        if size not in self.masks:
            self.masks[size] = q_HRC.new_full(size, -torch.inf).triu(size[1] - size[0] + 1)
        return self.masks[size]


class Gather(torch.autograd.Function):
    """x_NKC.index_select(0, places_M), whose gradient is summed in float32 or better."""

    @staticmethod
    def forward(ctx, x_NKC, places_M):
        ctx.save_for_backward(places_M)
        ctx.size = len(x_NKC)
        return x_NKC.index_select(0, places_M)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_MKC):
        dtype = torch.promote_types(grad_MKC.dtype, torch.float32)
        grad_NKC = grad_MKC.new_zeros(ctx.size, *grad_MKC.shape[1:], dtype=dtype)
        return grad_NKC.index_add_(0, ctx.saved_tensors[0], grad_MKC.to(dtype)).to(grad_MKC.dtype), None
