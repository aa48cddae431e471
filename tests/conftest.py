"""What every test needs: the repository root on the path, and Triton's interpreter where there is no GPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Triton reads this variable when a kernel is defined, its own helpers included: before any import of triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def interpreter_without_two_faults(monkeypatch):
    """Triton's interpreter multiplies bfloat16 by its bits, as integers; that of 3.6 fails at range() with numpy 2.4.

    Its scalars are arrays of shape (1,), which numpy 2.4 no longer takes as numbers; triton 3.9 knows that.
    """
    if torch.cuda.is_available():
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return original_dot(self, widen(a), widen(b), *rest)

    def patch_tensor(tensor, scope):
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    original_dot, original_patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)


class CountingKernel:
    """Stands in front of a Triton kernel and notes the grid of each launch."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


def drive(search, table):
    """Run a search against a table of success counts: (what it returns, the cuts it asked for)."""
    asked, reply = [], None
    while True:
        try:
            asked.append(search.send(reply))
        except StopIteration as done:
            return done.value, asked
        reply = table[asked[-1]]


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models: several threads only wait for each other, for minutes on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
