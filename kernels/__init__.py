"""Triton kernels with the names and signatures of their plain PyTorch twins in model.py and sampler.py."""

from .capture import capture
from .decode_attention import PrefixTiles, decode_attention
from .fused import add_rms_norm, rms_norm, rotate, swiglu
from .linear_logprob import linear_logprob
from .sampling import sample

# transformers probes for a PyPI package of this name and compares versions; "0" is older than any it accepts.
__version__ = "0"
