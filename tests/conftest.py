"""What every test needs: the root on the path, Triton's interpreter, a small set of problems, its flags."""
import collections
import json
import os
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CHAIN = ROOT / "examples" / "chain"
sys.path.insert(0, str(ROOT))
import sampler

# Triton reads it when a kernel is defined, its own helpers included: before any import of triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def interpreter_without_two_faults(monkeypatch):
    """Triton's interpreter multiplies bfloat16 by its bits, as integers; that of 3.6 fails at range(), as its
    scalars are arrays of shape (1,), which numpy 2.4 no longer takes as numbers."""
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


def drive(search, table):
    """Run a search against a table of success counts: (what it returns, the cuts it asked for)."""
    asked, reply = [], None
    while True:
        try:
            asked.append(search.send(reply))
        except StopIteration as done:
            return done.value, asked
        reply = table[asked[-1]]


Tables = collections.namedtuple("Tables", "rows_TM begins_T lengths_T max_prefix")


def attend_by_tables(*arguments):
    """The plain operation with the arguments of the kernel's."""
    *tensors, tables = arguments
    return sampler.decode_attention(*tensors, sampler.GatheredTiles(*tables))


def noting_capture(sizes):
    """A fake of kernels.capture: notes the size, and replays only while all that a CUDA graph would read by
    address lies where it lay."""
    def capture(step):
        places = step.__self__

        def addresses():
            cache = places.cache
            tensors = places.places_6R, *cache.own, *cache.trunk, *cache.tiles[:3]
            return [len(cache.tiles[0]), *(x.data_ptr() for x in tensors)]
        captured = addresses()
        sizes.append(places.size)

        def replay():
            assert addresses() == captured
            return step()
        return replay
    return capture


def capturing(sizes, **ops):
    """Plain operations for `Places` that capture, by that fake."""
    plain = {"decode_attention": attend_by_tables, "PrefixTiles": Tables, "sample": sampler.sample}
    return types.SimpleNamespace(**{**plain, **ops}, capture=noting_capture(sizes))


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models: several threads only wait for each other, for minutes on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def read_lines(path):
    """A .jsonl file as a list of dicts, [] if there is none; NaN and Infinity are no JSON."""
    def refuse(constant):
        raise AssertionError(f"{path.name} holds {constant}")
    text = path.read_text() if path.exists() else ""
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with train.jsonl, 4 problems of 2 moves and 8 of 12, and heldout.jsonl, 2 and 1. The
    example's model solves the short ones now and then, the long ones behind an anchor."""
    folder = tmp_path_factory.mktemp("data")
    for name, num_short, num in (("train.jsonl", 4, 12), ("heldout.jsonl", 2, 3)):
        rows = read_lines(CHAIN / name)[:num]
        for row in rows[:num_short]:
            line = row["trace"].split("\n")[0]
            row["answer"] = line.rsplit("= ")[1]
            row["trace"] = f"{line}\n#### {row['answer']}"
            row["question"] = " ".join(row["question"].split()[:6])
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def flags(data):
    """flags(output, "--lr 1e-4"): the command line of a small run, as a list; later flags win."""
    paths = ["--model", f"{CHAIN / 'model'}", "--data", f"{data / 'train.jsonl'}", "--eval-data",
             f"{data / 'heldout.jsonl'}", "--output"]
    small = "--device cpu --steps 2 --eval-every 2 --problems-per-step 3 --max-new-tokens 72 --lr 1e-3"
    return lambda output, more="": [*paths, f"{output}", *small.split(), *shlex.split(more)]
