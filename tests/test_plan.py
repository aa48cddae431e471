"""Claims about plan.py: parameters and bytes are those of the real thing, and its advice helps."""
import dataclasses
import importlib
import re
import subprocess
import sys

import pytest
import torch

import bread
import plan
from config import Config
from conftest import CHAIN, ROOT
from model import ModelConfig, Transformer
from packing import Prefixes, forward_suffixes

sys.path.append(f"{ROOT / 'bench'}")
timing = importlib.import_module("timing")
memory = importlib.import_module("memory")

SMALL = {kind: ModelConfig(kind, 101, 64, 200, 3, 4, 2, 24, 512, attention_bias=has_bias, mlp_bias=has_bias)
         for kind, has_bias in (("llama", True), ("mistral", False), ("qwen2", False), ("qwen3", True))}
LENGTHS = [(200, 300)] * 32


@pytest.mark.parametrize("name", [*timing.SHAPES, *SMALL])
def test_parameters_are_counted(name):
    """Of every kind of model, tied or not, with its biases and norms."""
    shape = SMALL.get(name) or timing.config_of(name)
    with torch.device("meta"):
        model = Transformer(shape)
    N = sum(weight.numel() for weight in model.parameters())
    assert plan.count_parameters(shape) == (N, model.lm_head.weight.numel())


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_keeps(kind, recompute):
    """Counted by its hooks, each storage once, weights apart: 4 rows of 60 tokens behind each of 3 prefixes
    of 50. 7%: cos, sin, masks and one number per token, here and there. What is recomputed shows what enters
    a layer, beside cos, sin and the last norm's two inputs."""
    model = Transformer(SMALL[kind], recompute=recompute).initialize(0)
    kept = {x.untyped_storage().data_ptr(): 0 for x in model.parameters()}

    def pack(x):
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        prefixes = Prefixes(model, [[1] * 50] * 3)
        hidden_ND = forward_suffixes(model, prefixes, [(i, [1] * 60) for i in range(3) for _ in range(4)])
    assert hidden_ND.shape == (720, 64)
    tokens, copies = 3 * (50 + 240), 12 * 50
    shape = SMALL[kind]
    expected = plan.activations(shape, 4, tokens, copies, False)
    expected -= 4 * tokens * 6 * 200  # of the backward pass
    if recompute:
        expected = 4 * tokens * (64 * 3 + 2 * 24 + 2 * 64)
    assert sum(kept.values()) == pytest.approx(expected, rel=0.07)


def test_a_parameter_takes_16_bytes_or_6():
    """On a GPU, by one process, by four, with offload; 7B on one card of 80 GB and a host of 128."""
    shape = timing.config_of("qwen2.5-7b")
    N, _ = plan.count_parameters(shape)

    def parameter_bytes(num_ranks=1, on_cuda=True, **fields):
        made = plan.make_plan(shape, Config(**fields), LENGTHS, 79e9, on_cuda, num_ranks)
        parts = {**made.always, **made.phases["training"]}
        return sum(size for part, size in parts.items() if part in
                   ("weights", "gradients", "moments", "masters' bits and moments", "reference of --kl")) / N
    assert parameter_bytes() == 16 and parameter_bytes(kl=0.1) == 18 and parameter_bytes(offload=True) == 6
    assert parameter_bytes(4) == 8.5 and parameter_bytes(on_cuda=False) == 16
    made = plan.make_plan(shape, Config(offload=True), LENGTHS, 79e9, True)
    assert made.fits and sum(made.host.values()) == 10 * N < 128e9


def test_advice_helps_and_micro_batches_fill_what_there_is():
    """Where a plan does not fit, it does with the flags that are named; where nothing is, none would. More
    memory never means a smaller micro-batch; a given one is kept."""
    advised = set()
    for shape in map(timing.config_of, memory.MODELS):
        before = 0
        for card in (8, 12, 16, 21, 24, 40, 80, 141):
            made = plan.make_plan(shape, Config(), LENGTHS, card * 1e9, True)
            flags = re.findall(r"--(\S+)(?: (\d+))?", made.advice)
            advised.add(len(flags))
            assert not (made.fits and flags)
            fields = {name.replace("-", "_"): int(value) if value else True for name, value in flags}
            changed = plan.make_plan(shape, Config(**fields), LENGTHS, card * 1e9, True)
            assert changed.fits == bool(made.fits or flags)
            assert made.micro_batch_tokens >= before
            before = made.micro_batch_tokens
            assert any("fit" in line for line in made.lines())
            others = sum(made.always.values()) - made.always["K/V"] + made.phases["training"]["gradients"]
            assert made.rows == 1 or made.always["K/V"] <= (card * 1e9 - others) / 3
    assert advised >= {0, 1, 2}
    given = plan.make_plan(shape, Config(micro_batch_tokens=123), LENGTHS, 141e9, True)
    assert given.micro_batch_tokens == 123
    config = Config(micro_batch_tokens=2**16)
    large = plan.make_plan(timing.config_of("qwen2.5-1.5b"), config, LENGTHS, 79e9, True)
    assert not large.fits and re.fullmatch(r"give --micro-batch-tokens \d+", large.advice)


def test_an_evaluation_trains_nothing():
    """Neither gradients nor moments: 7B are evaluated on a card of 24 GB."""
    made = plan.make_plan(timing.config_of("qwen2.5-7b"), Config(eval=True), [(100, 0)] * 200, 23e9, True)
    assert made.fits and made.phases.keys() == {"sampling"} and made.rows > 100


def test_sft_is_planned_by_the_length_of_traces():
    """Rows of 4,000 tokens, not of --max-new-tokens."""
    shape = timing.config_of("qwen2.5-1.5b")
    config = Config(method="sft", micro_batch_tokens=1)
    sizes = [plan.make_plan(shape, config, [(100, trace)] * 32, 79e9, True).phases["training"]["activations"]
             for trace in (1000, 4000)]
    assert 3.5 < sizes[1] / sizes[0] < 4


def test_a_plan_needs_no_weights(tmp_path, capsys):
    """A folder with nothing but config.json, this machine or a card; with problems, their lengths count."""
    (tmp_path / "config.json").write_bytes((CHAIN / "model" / "config.json").read_bytes())
    for argv in (["--plan"], ["--plan", "80"], ["--plan", "--device", "cpu", "--max-new-tokens", "9"]):
        assert bread.main([*argv, "--model", f"{tmp_path}"]) == 0
        assert re.search(r"peak +[\d.]+ of [\d.]+ GB: fits", capsys.readouterr().out)
    assert bread.main(["--plan", "1.02", "--model", f"{tmp_path}"]) == 0
    assert "does not fit: " in capsys.readouterr().out
    assert bread.main(["--plan", "--model", f"{tmp_path / 'none'}"]) == 2


def test_the_documents_tables_are_those_of_the_plan():
    """docs/MEMORY.md, to the letter."""
    text = (ROOT / "docs" / "MEMORY.md").read_text(encoding="utf-8")
    for table in memory.tables().split("\n\n"):
        assert table.strip() in text, "python bench/memory.py --tables"


def test_a_plan_is_data():
    """Every part has a size of its own, and none is negative."""
    made = plan.make_plan(SMALL["qwen3"], Config(kl=0.1), [], 1e9, False)
    for parts in (made.always, *made.phases.values(), made.host):
        assert all(size >= 0 for size in parts.values())
    most = max(sum(parts.values()) for parts in made.phases.values())
    assert made.needed == sum(made.always.values()) + most
    assert dataclasses.replace(made, capacity=0).fits is False


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--new 128", "--new 128 --recompute",
                                   "--new 256 --problems 3 --micro-batch-tokens 1024"])
def test_the_peak_of_a_process_is_planned_within_15_percent(flags):
    """Two steps of SmolLM2-135M's shape with random weights, on this CPU."""
    command = [sys.executable, "bench/memory.py", "--device", "cpu", "--threads", "2", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error = int(re.search(r"peak .*measured .*: ([+-]\d+)%", done.stdout)[1])
    assert abs(error) <= 15, done.stdout
