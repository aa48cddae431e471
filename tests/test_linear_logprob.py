"""Claims about kernels/linear_logprob.py and its plain twin in model.py, which keep the same promises by other
means. Without a GPU the kernels run under Triton's interpreter (tests/conftest.py) and products in float32.

The rule for outputs: no further from the float64 truth than eager torch on the same numbers in float32 (so bf16
inputs must not cost more than float32 ones), plus 1e-6 of the number (of 1 if it is smaller): 8 float32 roundings.
The rule for gradients: errors are divided by the sum of the absolute values of the element's terms; the largest
is no more than eager float32's (a product of 152064 terms is not exact) plus GRAD_TOLERANCE.

Dimensions: N tokens (rows), D hidden size, V vocabulary.
"""

import importlib
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import CountingKernel
import model

# import_module, because the package has a function of the module's name.
module = importlib.import_module("kernels.linear_logprob")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-6
# Float32: exp(z) counts the rounding of z, up to 50 here, as often. bf16: dx is rounded (2**-8 of it where the
# interpreter cuts instead of rounding, and 2**-9 more for a product of its own), and so is the gradient itself.
GRAD_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7 + 2**-8}
FUNCTIONS = {"kernel": module.linear_logprob, "plain": model.linear_logprob}
# The interpreter computes with numpy, which announces every infinity and NaN that these tests ask for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=sorted(FUNCTIONS))
def function(request):
    return FUNCTIONS[request.param]


def random_case(N, V, D=16, dtype=torch.float32, seed=0):
    """hidden, weight with logits of standard deviation 3, targets and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=generator).to(dtype)
    weight_VD = (torch.randn(V, D, generator=generator) * 3 / D**0.5).to(dtype)
    targets_N = torch.randint(0, V, (N,), generator=generator)
    return tuple(x.to(DEVICE) for x in (hidden_ND, weight_VD, targets_N, torch.randn(N, generator=generator)))


def run(function, hidden_ND, weight_VD, targets_N, upstream_N, temperature=1.0):
    """logprobs_N, entropies_N and the gradients of sum(upstream * logprobs)."""
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden_ND, weight_VD)]  # detach() keeps strides
    logprobs_N, entropies_N = function(*leaves, targets_N, temperature)
    (logprobs_N * upstream_N).sum().backward()
    return logprobs_N.detach(), entropies_N, leaves[0].grad, leaves[1].grad


def eager(hidden_ND, weight_VD, targets_N, temperature):
    """log_softmax + gather in the inputs' own type."""
    all_NV = torch.log_softmax(hidden_ND @ weight_VD.T / temperature, dim=-1)
    entropies_N = torch.special.entr(all_NV.detach().exp()).sum(-1)
    return all_NV.gather(-1, targets_N.long().unsqueeze(-1)).squeeze(-1), entropies_N


def assert_right(function, hidden_ND, weight_VD, targets_N, upstream_N, temperature=1.0):
    """The two rules of the header."""
    ours = run(function, hidden_ND, weight_VD, targets_N, upstream_N, temperature)
    hidden, weight = hidden_ND.double(), weight_VD.double()
    truth = run(eager, hidden, weight, targets_N, upstream_N.double(), temperature)
    float32 = run(eager, hidden_ND.float(), weight_VD.float(), targets_N, upstream_N, temperature)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for name, ours_N, truth_N, float32_N in zip(("logprob", "entropy"), ours, truth, float32):
        error_N, allowed_N = (ours_N - truth_N).abs(), (float32_N - truth_N).abs().max()
        allowed_N = allowed_N + TOLERANCE * truth_N.abs().clamp(min=1.0)
        assert (error_N <= allowed_N).all(), f"{name}: error {error_N}, allowed {allowed_N}"
    # Of the chosen token's 1 - p both terms count, since they may cancel.
    terms_NV = torch.softmax(hidden @ weight.T / temperature, -1)
    terms_NV[torch.arange(len(hidden)), targets_N.long()] += 1
    terms_NV *= upstream_N.double().abs().unsqueeze(1) / temperature
    sizes = terms_NV @ weight.abs(), terms_NV.T @ hidden.abs()
    for index, (size, leaf) in enumerate(zip(sizes, (hidden_ND, weight_VD)), start=2):
        assert ours[index].dtype == leaf.dtype and ours[index].shape == leaf.shape
        # Below float32's normal numbers nothing is relative: hence 1e-30, of terms that are near 1.
        error, eager_error = (((x[index] - truth[index]).abs() / (size + 1e-30)).max() for x in (ours, float32))
        allowed = eager_error + GRAD_TOLERANCE[leaf.dtype]
        assert error <= allowed, f"gradient {index - 2}: error {error:.1e}, allowed {allowed:.1e}"


def cut_vocabulary(monkeypatch):
    """Tiles as narrow as the two implementations go, 256 and 512 columns; nothing kept for backward."""
    monkeypatch.setattr(module, "TILE_BYTES", 1)
    monkeypatch.setattr(model, "TILE_BYTES", 1)
    monkeypatch.setattr(model, "KEPT_BYTES", 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 64, 1000, 4097])
def test_outputs_and_gradients_are_right(function, V, dtype, temperature):
    """One token, one block, a ragged block, two blocks: right within the rules, in float32 and bf16."""
    assert_right(function, *random_case(5, V, dtype=dtype), temperature)


@pytest.mark.parametrize("V, dtype", [(50257, torch.float32), (151936, torch.bfloat16), (152064, torch.float32)])
def test_real_vocabularies_are_right_in_one_slice_and_in_several(function, V, dtype, monkeypatch):
    """GPT-2's and Qwen2.5's vocabularies, no multiples of a tile; 16384 columns a slice leave a ragged last one."""
    assert_right(function, *random_case(3, V, dtype=dtype), 0.7)
    monkeypatch.setattr(module, "TILE_BYTES", 4 * 3 * 16384)
    monkeypatch.setattr(model, "TILE_BYTES", 4 * 3 * 16384)
    assert_right(function, *random_case(3, V, dtype=dtype), 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_change_nothing_wherever_the_target_lies(function, dtype, monkeypatch):
    """Targets at both edges of the slices of 256 and 512 columns, and in the ragged last one."""
    hidden_ND, weight_VD, _, upstream_N = random_case(9, 1300, dtype=dtype)
    targets_N = torch.tensor([0, 255, 256, 511, 512, 1023, 1024, 1298, 1299], device=DEVICE)
    case = hidden_ND, weight_VD, targets_N, upstream_N
    whole = run(function, *case, 0.7)
    cut_vocabulary(monkeypatch)
    assert_right(function, *case, 0.7)
    # The sums over slices round differently, in bf16 by one unit in the last place.
    tolerances = [1e-5] * 2 + [2e-5 if dtype == torch.float32 else 2**-6] * 2
    for a, b, tolerance in zip(whole, run(function, *case, 0.7), tolerances):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("tiles", [0, 1, 2, 3])
def test_tiles_kept_from_forward_equal_tiles_made_again(tiles, monkeypatch):
    """The plain twin gives the same gradients with none, some and all of its three tiles kept."""
    case = random_case(4, 1300)
    cut_vocabulary(monkeypatch)
    made_again = run(model.linear_logprob, *case)
    monkeypatch.setattr(model, "KEPT_BYTES", tiles * 4 * 4 * 512)
    for a, b in zip(made_again, run(model.linear_logprob, *case)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_retained_graph_gives_the_same_gradient_twice_and_a_freed_one_raises(function):
    """Tiles are overwritten by backward, so the second has to notice; without retain_graph autograd refuses."""
    hidden_ND, weight_VD, targets_N, upstream_N = random_case(4, 300)
    leaves = hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    logprobs_N, _ = function(*leaves, targets_N)
    first = torch.autograd.grad(logprobs_N, leaves, upstream_N, retain_graph=True)
    second = torch.autograd.grad(logprobs_N, leaves, upstream_N)
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(logprobs_N, leaves, upstream_N)


def test_peaked_rows_lose_no_precision(function, monkeypatch):
    """Logits of 1e4 at the first, last, chosen or another token, or at two of them, in other slices too."""
    V = 1300
    weight_VD = torch.randn(V, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight_VD[:, :2] = 0
    weight_VD[3, 0] = weight_VD[V - 1, 1] = weight_VD[5, 1] = 100.0
    weight_VD[[3, 5, V - 1], 2] = 0
    hidden_ND = torch.tensor([[100.0, 0, 1], [0, 100.0, 1], [100.0, 0, 1]], device=DEVICE)
    case = hidden_ND, weight_VD, torch.tensor([3, V - 1, 17], device=DEVICE), torch.ones(3, device=DEVICE)
    for _ in range(2):
        assert_right(function, *case)
        logprobs_N, entropies_N, _, _ = run(function, *case)
        # Two equal peaks: log 2, where a log-sum-exp near 1e4 would be rounded to 1e-3.
        assert logprobs_N[0] == 0 and abs(logprobs_N[1].item() + math.log(2)) < TOLERANCE
        assert abs(entropies_N[1].item() - math.log(2)) < TOLERANCE and entropies_N[[0, 2]].abs().max() < TOLERANCE
        cut_vocabulary(monkeypatch)


def test_very_negative_rows_are_still_distributions(function, monkeypatch):
    """All logits at -1e30: uniform, forward and backward, where a log-sum-exp would lose all of log V."""
    V = 1300
    hidden_ND = torch.full((2, 1), 1e15, device=DEVICE)
    weight_VD = torch.full((V, 1), -1e15, device=DEVICE)
    targets_N, upstream_N = torch.tensor([0, V - 1], device=DEVICE), torch.ones(2, device=DEVICE)
    for _ in range(2):
        logprobs_N, entropies_N, _, grad_VD = run(function, hidden_ND, weight_VD, targets_N, upstream_N)
        expected_N = torch.full((2,), math.log(V), device=DEVICE)
        torch.testing.assert_close(logprobs_N, -expected_N, rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(entropies_N, expected_N, rtol=TOLERANCE, atol=0)
        expected_vD = torch.full((V - 2, 1), -2e15 / V, device=DEVICE)
        torch.testing.assert_close(grad_VD[1:-1], expected_vD, rtol=1e-5, atol=0)
        cut_vocabulary(monkeypatch)


def test_tied_weights_get_both_gradients(function):
    """A weight that is embedding and head at once: autograd sums its two uses, as in eager torch."""
    _, weight_VD, targets_N, upstream_N = random_case(6, 300)
    tokens_N = torch.arange(6, device=DEVICE)

    def tied(linear_logprob, weight):
        leaf_VD = weight.detach().requires_grad_()
        logprobs_N, _ = linear_logprob(torch.tanh(leaf_VD[tokens_N]), leaf_VD, targets_N, 1.0)
        (logprobs_N * upstream_N.to(weight.dtype)).sum().backward()
        return leaf_VD.grad
    torch.testing.assert_close(tied(function, weight_VD), tied(eager, weight_VD.double()).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(function, wanted):
    """Each gradient alone equals the one of both together; a frozen model needs no backward at all."""
    hidden_ND, weight_VD, targets_N, upstream_N = random_case(4, 300)
    both = dict(zip(("hidden", "weight"), run(function, hidden_ND, weight_VD, targets_N, upstream_N)[2:]))
    leaves = {"hidden": hidden_ND, "weight": weight_VD}
    if wanted in leaves:
        leaves[wanted].requires_grad_()
    logprobs_N, entropies_N = function(hidden_ND, weight_VD, targets_N)
    assert logprobs_N.requires_grad == (wanted != "neither") and not entropies_N.requires_grad
    if wanted in leaves:
        logprobs_N.backward(upstream_N)
    for name, leaf in leaves.items():
        assert leaf.grad is None if name != wanted else torch.equal(leaf.grad, both[name])


def test_the_gradient_of_hidden_is_summed_in_float32(monkeypatch, function):
    """Over many slices of bf16: as exact as one product over all, where a bf16 sum is four times further off."""
    hidden_ND, weight_VD, targets_N, upstream_N = random_case(4, 64 * 256, dtype=torch.bfloat16)
    # A target in the first slice puts the largest share first; the small ones after it would round away.
    targets_N %= 256
    cut_vocabulary(monkeypatch)
    ours_ND = run(function, hidden_ND, weight_VD, targets_N, upstream_N)[2].double()
    truth_ND = run(eager, hidden_ND.double(), weight_VD.double(), targets_N, upstream_N.double())[2]
    dx_NV = -torch.softmax(hidden_ND.double() @ weight_VD.double().T, -1)
    dx_NV[torch.arange(4), targets_N] += 1
    dx_NV = (dx_NV * upstream_N.double().unsqueeze(1)).to(torch.bfloat16).double()
    rounded_ND = torch.zeros_like(hidden_ND)
    for dx_NC, weight_CD in zip(dx_NV.split(256, dim=1), weight_VD.double().split(256)):
        rounded_ND += (dx_NC @ weight_CD).to(torch.bfloat16)
    error, rounded_error = (ours_ND - truth_ND).norm(), (rounded_ND.double() - truth_ND).norm()
    assert error < rounded_error / 4, f"{error:.2e} against {rounded_error:.2e} when summed in bf16"


def test_strided_inputs_equal_their_dense_copies(function):
    """Columns of a wider buffer, every second row, a transpose, int32 or strided targets: all the same numbers."""
    hidden_ND, weight_VD, targets_N, upstream_N = random_case(6, 300, D=40)
    views = [(hidden_ND[:, :16], weight_VD[:, :16]), (hidden_ND[:, 1:17], weight_VD[:, 24:]),
             (hidden_ND[:, ::2], weight_VD[:, ::2]), (hidden_ND.T.contiguous().T, weight_VD.T.contiguous().T)]
    for hidden, weight in views:
        dense = run(function, hidden.contiguous(), weight.contiguous(), targets_N, upstream_N)
        strided = run(function, hidden, weight, targets_N.repeat_interleave(2)[::2], upstream_N)
        for a, b in zip(dense, strided):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("N", [0, 1])
def test_no_rows_and_one_row_work(function, N):
    """N = 0, an update without loss tokens: empty outputs, and a gradient of the weight that is zero, not missing."""
    case = random_case(N, 300)
    logprobs_N, entropies_N, grad_ND, grad_VD = run(function, *case)
    assert logprobs_N.shape == entropies_N.shape == (N,) and grad_ND.shape == case[0].shape
    assert grad_VD.shape == case[1].shape and grad_VD.isfinite().all() and (grad_VD == 0).all() == (N == 0)
    if N:
        assert_right(function, *case)


def test_a_bad_target_is_nan_on_a_gpu_and_an_error_on_a_cpu():
    """The kernel makes the row NaN, no other, and the gradients too: checking would wait for the GPU."""
    hidden_ND, weight_VD, targets_N, upstream_N = random_case(4, 300)
    targets_N[1], targets_N[2] = -1, 300
    logprobs_N, entropies_N, grad_ND, grad_VD = run(module.linear_logprob, hidden_ND, weight_VD, targets_N, upstream_N)
    for rows in (logprobs_N, entropies_N, grad_ND.sum(1)):
        assert rows.isnan().tolist() == [False, True, True, False]
    assert grad_VD.isnan().all()
    for wrong_N in (targets_N, targets_N[:2].abs(), torch.tensor([0, 0, 0, -1])):
        with pytest.raises(IndexError, match=r"for 4 rows; one in 0\.\.299 each"):
            model.linear_logprob(hidden_ND, weight_VD, wrong_N.to(DEVICE))


def test_a_nan_row_stays_alone(function, monkeypatch):
    """A NaN in one row of hidden makes that row NaN and leaves the others' outputs as they are."""
    hidden_ND, weight_VD, targets_N, upstream_N = random_case(4, 1300)
    expected = run(function, hidden_ND, weight_VD, targets_N, upstream_N)
    hidden_ND[1, 3] = math.nan
    cut_vocabulary(monkeypatch)
    for got, want in zip(run(function, hidden_ND, weight_VD, targets_N, upstream_N)[:3], expected):
        assert got[1].isnan().any()
        torch.testing.assert_close(got[[0, 2, 3]], want[[0, 2, 3]], rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        return out


def test_no_tensor_of_all_logits_is_made(function, monkeypatch):
    """Forward and backward see nothing larger than a slice of 512 columns (the weight is smaller still)."""
    N, V = 16, 2600
    case = random_case(N, V, D=1)
    cut_vocabulary(monkeypatch)
    with LargestTensor() as mode:
        run(function, *case)
    assert 0 < mode.largest <= 4 * N * 512 < 4 * N * V


def test_the_plain_twin_keeps_no_tiles_where_none_are_needed(monkeypatch):
    """Under no_grad, as when a reference model is scored, only the buffers of one slice exist."""
    hidden_ND, weight_VD, targets_N, _ = random_case(4, 1300)
    monkeypatch.setattr(model, "TILE_BYTES", 1)
    kept = []
    original = model._LinearLogprob.forward

    def spy(ctx, *args):
        out = original(ctx, *args)
        kept.append(len(ctx.kept))
        return out
    monkeypatch.setattr(model._LinearLogprob, "forward", staticmethod(spy))
    weight_VD.requires_grad_()
    with torch.no_grad():
        model.linear_logprob(hidden_ND, weight_VD, targets_N)
    model.linear_logprob(hidden_ND, weight_VD, targets_N)
    model.linear_logprob(hidden_ND, weight_VD.detach(), targets_N)
    assert kept == [0, 3, 0]


def test_the_triton_kernels_run_once_per_slice_each_way(monkeypatch):
    """Four slices, 1000 = 3 * 256 + 232 columns: the results above come from Triton, not from a fallback."""
    kind = triton.JITFunction if DEVICE == "cuda" else triton.runtime.interpreter.InterpretedFunction
    assert isinstance(module._fold_kernel, kind) and isinstance(module._gradient_kernel, kind)
    fold, gradient = CountingKernel(module._fold_kernel), CountingKernel(module._gradient_kernel)
    monkeypatch.setattr(module, "_fold_kernel", fold)
    monkeypatch.setattr(module, "_gradient_kernel", gradient)
    cut_vocabulary(monkeypatch)
    run(module.linear_logprob, *random_case(3, 1000))
    assert fold.grids == [(3,)] * 4 and gradient.grids == [(3, 1)] * 4


def test_slices_fit_the_budget_and_come_in_few_widths():
    """The whole vocabulary where it fits TILE_BYTES, else one of six powers of two at up to 16384 rows."""
    widths = {module._slice_width(N, 151936) for N in range(1, 16385)}
    assert widths == {151936} | {2**k for k in range(12, 18)}
    for N in (1, 441, 442, 2048, 16384):
        assert 4 * N * module._slice_width(N, 151936) <= module.TILE_BYTES
    assert module._slice_width(0, 7) == 7 and module._slice_width(10**6, 151936) == 256


def test_the_twins_agree(monkeypatch):
    """Same signature, and the same results over several slices, each in its own cut, within float32 sums (1e-5)."""
    assert inspect.signature(model.linear_logprob) == inspect.signature(module.linear_logprob)
    case = random_case(6, 1300)
    cut_vocabulary(monkeypatch)
    for a, b in zip(run(module.linear_logprob, *case, 0.7), run(model.linear_logprob, *case, 0.7)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_reference_is_right_too():
    """The definition in the kernels' file, in float32, keeps the same rules."""
    assert_right(module.reference_linear_logprob, *random_case(4, 300), 0.7)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden \(2, 3, 4\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight \(5, 3\)"),
        ({"weight": torch.zeros(0, 4)}, "V, D >= 1"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets \(3,\)"),
        ({"hidden": torch.zeros(2, 4).bfloat16()}, r"bfloat16 hidden and torch.float32 weight"),
        ({"hidden": torch.zeros(2, 4).half(), "weight": torch.zeros(5, 4).half()}, "float16 hidden"),
        ({"targets": torch.zeros(2)}, r"float32 targets given.*targets.long\(\)"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, "targets on meta"),
    ],
)
def test_wrong_arguments_are_named(changes, text):
    """A wrong shape, dtype, temperature or device raises ValueError that says what was given, and what to type."""
    case = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(2, dtype=torch.int64)}
    case = {name: x if x.device.type == "meta" else x.to(DEVICE)
            for name, x in (case | changes).items() if name != "temperature"}
    with pytest.raises(ValueError, match=text):
        module.linear_logprob(*case.values(), changes.get("temperature", 1.0))


COMPILE = """
import importlib
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
module = importlib.import_module("kernels.linear_logprob")

for kernel in (module._fold_kernel, module._gradient_kernel):
    types = {"targets_ptr": "*i64", "grad_ptr": "*bf16", "inv_temperature": "fp32"}
    types |= {name: "i32" for name in ("row_stride", "tile_stride", "grad_stride", "start", "width")}
    types |= {"NUM_BLOCKS": "constexpr", "BLOCK_C": "constexpr"}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    options = module._launch_options(4096)
    constants = {"NUM_BLOCKS": 1, "BLOCK_C": options.pop("BLOCK_C")}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    # What the launcher finds out by itself: aligned tensors, and numbers that are multiples of 16.
    aligned = [i for i, name in enumerate(kernel.arg_names) if types.get(name, "*")[0] in "*i"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "ld.global.v4.b32" in compiled.asm["ptx"], "no 16-byte loads"
    assert len(compiled.asm["cubin"]) > 0
    print("compiled", kernel.__name__)

try:
    module.linear_logprob(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))
except ValueError as error:
    print(error)
"""


def test_the_kernels_compile_for_a_hopper_gpu_without_one(tmp_path):
    """The real compiler accepts both kernels, with 16-byte loads; not interpreted, CPU tensors raise."""
    # A process of its own, because this one interprets the kernels; an empty cache, so that it compiles.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(module.__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.count("compiled") == 2, result.stdout + result.stderr
    assert "all must be on one CUDA device. On a CPU use the plain linear_logprob" in result.stdout


def large_case_on_a_gpu():
    """16384 rows, D = 1536, V = 151936, bf16: 38 slices, and more than 2**31 logits."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    generator = torch.Generator(DEVICE).manual_seed(0)
    N, D, V = 16384, 1536, 151936
    hidden_ND = torch.randn(N, D, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    weight_VD = torch.randn(V, D, device=DEVICE, dtype=torch.bfloat16, generator=generator).mul_(0.05)
    targets_N = torch.randint(0, V, (N,), device=DEVICE, generator=generator)
    return hidden_ND, weight_VD, targets_N, torch.randn(N, device=DEVICE, generator=generator)


@pytest.mark.gpu
def test_a_large_bf16_batch_on_a_gpu_is_right_in_float32():
    """First, last and some other rows: outputs within 1e-4 of float64 (eager bf16 logits are off by 1e-2), the
    gradient of hidden within bf16; some rows of the weight's gradient within bf16 of a float64 sum over all rows."""
    hidden_ND, weight_VD, targets_N, upstream_N = large_case_on_a_gpu()
    logprobs_N, entropies_N, grad_ND, grad_VD = run(module.linear_logprob, hidden_ND, weight_VD, targets_N, upstream_N)
    rows = torch.tensor([0, 1, 7777, 14134, 14135, 16382, 16383], device=DEVICE)
    truth = run(eager, hidden_ND[rows].double(), weight_VD.double(), targets_N[rows], upstream_N[rows].double())
    for got_n, true_n in ((logprobs_N[rows], truth[0]), (entropies_N[rows], truth[1])):
        assert (got_n - true_n).abs().max() < 1e-4
    assert (grad_ND[rows] - truth[2]).norm() < 2**-7 * truth[2].norm()
    tokens = torch.tensor([0, 4095, 4096, 151935, int(targets_N[5])], device=DEVICE)
    # p of these tokens in every row, from the log-probs that function gives for them: an independent target each.
    for token in tokens.tolist():
        with torch.no_grad():
            p_N = module.linear_logprob(hidden_ND, weight_VD, torch.full_like(targets_N, token))[0].double().exp()
        true_D = (upstream_N * ((targets_N == token).double() - p_N)) @ hidden_ND.double()
        assert (grad_VD[token] - true_D).norm() < 2**-6 * true_D.norm()


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for_and_memory_stays_within_the_budget():
    """No synchronisation in forward or backward; the peak is tile, its bf16 copy, and the gradients."""
    hidden_ND, weight_VD, targets_N, upstream_N = large_case_on_a_gpu()
    run(module.linear_logprob, hidden_ND, weight_VD, targets_N, upstream_N)  # compiles, fills cuBLAS's workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(module.linear_logprob, hidden_ND, weight_VD, targets_N, upstream_N)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradients = weight_VD.nbytes + 3 * hidden_ND.nbytes  # of hidden in float32, and once more in bf16
    assert torch.cuda.max_memory_allocated() - before < 1.5 * module.TILE_BYTES + gradients + 2**25


@pytest.mark.gpu
def test_a_second_gpu_is_launched_on():
    """Tensors on a device that is not the current one are computed there."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = [tensor.to("cuda:1") for tensor in random_case(3, 5000)]
    for a, b in zip(run(module.linear_logprob, *case), run(eager, *case)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
