"""Triton kernels with the names and signatures of their plain PyTorch twins in model.py and sampler.py."""

from .decode_attention import PrefixTiles, decode_attention
from .linear_logprob import linear_logprob
from .sampling import sample

# transformers probes for a PyPI package of this name and compares versions; "0" is older than any it accepts.
__version__ = "0"
