"""Triton kernels with the names and signatures of their plain-PyTorch twins in `model.py`."""

from .logprob import token_logprob

# transformers probes for a PyPI package of this name and compares versions; "0" is older than any it accepts.
__version__ = "0"
__all__ = ["token_logprob"]
