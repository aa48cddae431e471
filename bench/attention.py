"""Times the update's attention, one layer, random numbers: packing.py's calls against variable-length ones.

    python bench/attention.py [--device cuda|cpu]

Eight prompts of the lengths of GSM8K's, eight rollouts each, of lengths drawn between 64 and 512; heads of
Qwen2.5-1.5B. "packing.py": phase 1 makes a call for every prompt, phase 2 one for every few rows of like
length, on padded copies with the prefix in front. "varlen": torch's variable-length flash attention, one call
a phase, on keys and values gathered row by row; on a CPU, which has none, a loop stands in for it, so that
the script can be tried. "seconds" are those of forward and backward, both phases; outputs are compared.

Dimension key: N tokens end to end   H query heads   K key/value heads   C head size   B batch (1)
"""
import inspect
import random

import timing
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from packing import Prefixes, forward_suffixes

H, K = 12, 2
C = 128
# torch 2.11 takes fewer key/value heads as they are, 2.12 wants to be told.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attend(q_NHC, k_NKC, v_NKC, lengths_q, lengths_k):
    """Causal attention inside each sequence, whose last query sees its last key."""
    if q_NHC.is_cuda:
        ends = [torch.tensor([0, *lengths], device=q_NHC.device).cumsum(0, dtype=torch.int32)
                for lengths in (lengths_q, lengths_k)]
        longest = max(lengths_q), max(lengths_k)
        return varlen_attn(q_NHC, k_NKC, v_NKC, *ends, *longest, window_size=(-1, 0), **GQA)
    outs = []
    for parts in zip(q_NHC.split(lengths_q), k_NKC.split(lengths_k), v_NKC.split(lengths_k)):
        q, k, v = (x.transpose(0, 1)[None] for x in parts)
        bias = causal_lower_right(q.shape[2], k.shape[2])
        outs.append(F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


class AttentionLayer:
    """A model of one layer that is attention alone: queries, keys and values are random numbers."""

    def __init__(self, num_first, num_tokens, device, dtype):
        self.num_first = num_first  # tokens of phase 1, which come first
        self.qkv = [torch.randn(num_tokens, heads, C, device=device, dtype=dtype).requires_grad_()
                    for heads in (H, K, K)]

    def parameters(self):
        return iter(self.qkv)

    def __call__(self, tokens_BT, positions_BT, cache):
        first = slice(self.num_first) if isinstance(cache, Prefixes) else slice(self.num_first, None)
        q_BHTC, k_BKTC, v_BKTC = (x_NHC[first].transpose(0, 1)[None] for x_NHC in self.qkv)
        return cache.attend(0, q_BHTC, k_BKTC, v_BKTC).transpose(1, 2)


class AttentionVariant:
    """One way to both phases; a call returns (seconds,)."""

    def __init__(self, name, layer, contexts, rows, device):
        self.name = name
        self.layer = layer
        self.contexts = contexts
        self.rows = rows
        self.device = device
        self.out_NHC = None

    def packed(self):
        """Both phases by packing.py."""
        prefixes = Prefixes(self.layer, self.contexts)
        self.out_NHC = forward_suffixes(self.layer, prefixes, self.rows)
        self.out_NHC.backward(torch.ones_like(self.out_NHC))
        prefixes.backward()

    def varlen(self):
        """One call for each; what phase 1 gives is of no use, as in a model's last layer."""
        q_NHC, k_NKC, v_NKC = self.layer.qkv
        first = self.layer.num_first
        lengths = list(map(len, self.contexts))
        own = [len(ids) for _, ids in self.rows]
        attend(q_NHC[:first], k_NKC[:first], v_NKC[:first], lengths, lengths)
        begins = torch.tensor([0, *lengths]).cumsum(0).tolist()
        places = []
        start = first
        for (i, _), length in zip(self.rows, own):
            places += [*range(begins[i], begins[i + 1]), *range(start, start + length)]
            start += length
        places_N = torch.tensor(places, device=self.device)
        keys = [x_NKC.index_select(0, places_N) for x_NKC in (k_NKC, v_NKC)]
        whole = [lengths[i] + length for (i, _), length in zip(self.rows, own)]
        self.out_NHC = attend(q_NHC[first:], *keys, own, whole)
        self.out_NHC.backward(torch.ones_like(self.out_NHC))

    def __call__(self):
        for x_NHC in self.layer.qkv:
            x_NHC.grad = None
        began = timing.now(self.device)
        self.packed() if self.name == "packing.py" else self.varlen()
        return (timing.now(self.device) - began,)


def main():
    args = timing.parse(timing.new_parser(__doc__))
    rng = random.Random(0)
    contexts = [[0] * length for length in timing.QUESTIONS[:8]]
    rows = []
    for i in range(len(contexts)):
        rows += [(i, [0] * length) for length in sorted(rng.choices(range(64, 513), k=8), reverse=True)]
    counts = sum(map(len, contexts)), sum(len(ids) for _, ids in rows)
    layer = AttentionLayer(counts[0], sum(counts), args.device, args.dtype)
    variants = [AttentionVariant(name, layer, contexts, rows, args.device)
                for name in ("packing.py", "varlen")]
    results, failed = timing.take_turns(variants, args.device, args.repeats)
    write = timing.writer(__doc__, args, f"{counts[0]} + {counts[1]} tokens, {len(rows)} rows")
    write(timing.comparison(results, failed))
    if not failed:
        torch.testing.assert_close(variants[0].out_NHC, variants[1].out_NHC, atol=2e-2, rtol=2e-2)


if __name__ == "__main__":
    main()
