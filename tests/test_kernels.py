"""Claims about kernels/logprob.py. Without a GPU they run under Triton's interpreter (tests/conftest.py).

The rule for numbers: no further from the float64 truth than eager torch in float32, plus a tolerance of 1e-6
of the number (of 1 if it is smaller). That is 8 float32 roundings: two or three each for exp and log on a
GPU, and 38 tile sums added in turn, whose roundings have random signs.

Dimensions: N tokens (rows), V vocabulary, W columns of a wider buffer.
"""

import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import kernels
from kernels import logprob as module
from kernels.logprob import reference_token_logprob, token_logprob

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-6
INF = math.inf
# One unit in the last place: Triton's interpreter cuts float32 down to bfloat16 instead of rounding, so half
# a unit is not enough. The added 2e-5 is for exp(z) at z near -50, where each rounding of z counts 50 times.
GRAD_RTOL = {torch.bfloat16: 2**-7 + 2e-5, torch.float16: 2**-10 + 2e-5, torch.float32: 2e-5}
# Below a dtype's normal numbers nothing is relative: one step of float16's subnormals, zero for the others.
GRAD_ATOL = {torch.bfloat16: 1e-37, torch.float16: 2**-24, torch.float32: 1e-37}
# The interpreter computes with numpy, which announces every infinity and NaN that these tests ask for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def random_case(N, V, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits_NV = (torch.randn(N, V, generator=generator) * scale).to(dtype)
    targets_N = torch.randint(0, V, (N,), generator=generator)
    return logits_NV.to(DEVICE), targets_N.to(DEVICE)


def upstream_gradient(N):
    return torch.randn(N, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def float64_token_logprob(logits_NV, targets_N, temperature):
    all_logprobs_NV = torch.log_softmax(logits_NV.double() / temperature, dim=-1)
    logprobs_N = all_logprobs_NV.gather(-1, targets_N.long().unsqueeze(-1)).squeeze(-1)
    return logprobs_N, torch.special.entr(all_logprobs_NV.detach().exp()).sum(-1)


def run(function, logits_NV, targets_N, temperature, upstream_N=None):
    """logprobs_N, entropy_N and the gradient of sum(upstream * logprobs), for one implementation."""
    leaf_NV = logits_NV.detach().requires_grad_()  # detach() keeps the strides, clone() would not
    logprobs_N, entropy_N = function(leaf_NV, targets_N, temperature)
    (logprobs_N * (upstream_gradient(len(targets_N)) if upstream_N is None else upstream_N)).sum().backward()
    return logprobs_N.detach(), entropy_N, leaf_NV.grad


def assert_no_further_from_truth_than_eager(logits_NV, targets_N, temperature=1.0):
    kernel = run(token_logprob, logits_NV, targets_N, temperature)
    assert kernel[0].dtype == kernel[1].dtype == torch.float32
    assert kernel[2].dtype == logits_NV.dtype and kernel[2].shape == logits_NV.shape
    compare_with_truth(kernel, logits_NV, targets_N, temperature)


def compare_with_truth(kernel, logits_NV, targets_N, temperature, upstream_N=None):
    truth = run(float64_token_logprob, logits_NV.double(), targets_N, temperature, upstream_N)
    eager = run(reference_token_logprob, logits_NV, targets_N, temperature, upstream_N)
    for name, truth_N, eager_N, kernel_N in zip(("logprob", "entropy"), truth, eager, kernel):
        assert kernel_N.isfinite().all(), f"{name} is not finite: {kernel_N}"
        allowed_N = (eager_N - truth_N).abs().max() + TOLERANCE * truth_N.abs().clamp(min=1.0)
        error_N = (kernel_N - truth_N).abs()
        assert (error_N <= allowed_N).all(), f"{name}: error {error_N}, allowed {allowed_N}"
    assert_gradient_close(kernel[2], truth[2], eager[2], targets_N)


def assert_gradient_close(kernel_NV, truth_NV, eager_NV, targets_N):
    """Absolute error for the chosen token (its 1 - p cancels), relative for the others, as small as p."""
    dtype, scale = kernel_NV.dtype, truth_NV.abs().max()
    error_NV, eager_error_NV = (kernel_NV - truth_NV).abs(), (eager_NV - truth_NV).abs()
    allowed_NV = eager_error_NV + GRAD_RTOL[dtype] * truth_NV.abs() + GRAD_ATOL[dtype]
    chosen_N1 = targets_N.long().unsqueeze(-1)
    allowed_NV.scatter_add_(-1, chosen_N1, (TOLERANCE * scale).expand(chosen_N1.shape))
    worst = (error_NV / allowed_NV).max()
    assert kernel_NV.isfinite().all() and worst <= 1, f"gradient error is {worst:.2f} times what is allowed"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 7, 64, 1000, 4096, 4097, 8192, 50257])
def test_kernel_is_no_further_from_float64_than_eager(V, dtype, temperature):
    """Log-prob, entropy and gradient are right for one column, one tile, exact tiles, a ragged last tile."""
    assert_no_further_from_truth_than_eager(*random_case(5, V, dtype), temperature)


@pytest.mark.parametrize("V, dtype, temperature", [(151936, torch.bfloat16, 0.7), (152064, torch.float32, 1)])
def test_qwen_vocabularies_are_no_further_from_float64_than_eager(V, dtype, temperature):
    """The two vocabularies of Qwen2.5, no multiples of the tile, keep the same rule over 38 tiles."""
    assert_no_further_from_truth_than_eager(*random_case(3, V, dtype), temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peaked_rows_lose_no_precision(dtype, temperature):
    """One logit of 1e4 (first tile, last tile, at the target, elsewhere, or twice) overflows nothing."""
    logits_NV, targets_N = random_case(5, 9001, dtype)
    targets_N[:] = torch.tensor([3, 9000, 17, 4096, 8999])
    for row, column in enumerate([3, 9000, 9000, 0, 8999]):
        logits_NV[row, column] = 1e4
    logits_NV[4, 5] = 1e4  # two equal peaks: log-prob -log 2 and entropy log 2, far below the rounding of 1e4
    assert_no_further_from_truth_than_eager(logits_NV, targets_N, temperature)
    logprobs_N, entropy_N = token_logprob(logits_NV, targets_N, temperature)
    # 1e-6 where a log-sum-exp near 1e4 would be rounded to 1e-3.
    assert abs(logprobs_N[4].item() + math.log(2)) < 1e-6 and abs(entropy_N[4].item() - math.log(2)) < 1e-6
    assert logprobs_N[:2].tolist() == [0.0, 0.0] and entropy_N[:4].abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_very_negative_rows_are_still_distributions(temperature):
    """A row of -1e30 is uniform, and a mask made of the lowest float32 acts as one, also next to -1e30."""
    V, lowest = 5000, torch.finfo(torch.float32).min
    logits_NV = torch.full((4, V), -1e30, device=DEVICE)
    logits_NV[1, 10] = -0.9e30
    logits_NV[2, :4500] = lowest
    logits_NV[3] = lowest
    logits_NV[3, 4999] = 1e30
    targets_N = torch.tensor([1, 10, 4600, 4999], device=DEVICE)
    assert_no_further_from_truth_than_eager(logits_NV, targets_N, temperature)
    logprobs_N, entropy_N, grad_NV = run(token_logprob, logits_NV, targets_N, temperature)
    expected_N = torch.tensor([math.log(V), 0.0, math.log(500), 0.0], device=DEVICE)
    # Relative to log 5000 = 8.5, 1e-6 is the file's tolerance.
    torch.testing.assert_close(logprobs_N, -expected_N, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy_N, expected_N, rtol=1e-6, atol=0)
    expected = -upstream_gradient(4)[0] / V / temperature
    torch.testing.assert_close(grad_NV[0, 2:], expected.expand(V - 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_tokens_count_as_impossible_and_give_no_nan(dtype, temperature):
    """-inf logits have probability 0, add 0 to the entropy and get gradient 0, wherever they stand."""
    logits_NV, targets_N = random_case(5, 9001, dtype)
    logits_NV[0, ::2] = -INF  # scattered
    logits_NV[1, :8192] = -INF  # the first two tiles have nothing
    logits_NV[2, 4096:] = -INF  # all but the first tile have nothing
    logits_NV[3] = -INF
    logits_NV[3, 5000] = 2.0  # one token is left: certain
    logits_NV[4, :4096] = -INF  # nothing, something, nothing
    logits_NV[4, 8192:] = -INF
    targets_N[:] = torch.tensor([1, 9000, 0, 5000, 5000])
    assert_no_further_from_truth_than_eager(logits_NV, targets_N, temperature)
    logprobs_N, entropy_N, grad_NV = run(token_logprob, logits_NV, targets_N, temperature)
    assert logprobs_N[3] == 0 and entropy_N[3] == 0
    assert (grad_NV[logits_NV == -INF] == 0).all()


def test_a_masked_target_has_log_probability_minus_infinity():
    """Choosing a masked token gives -inf, as in eager torch, and leaves the entropy finite."""
    logits_NV, targets_N = random_case(2, 5000)
    logits_NV[0, targets_N[0]] = -INF
    logprobs_N, entropy_N = token_logprob(logits_NV, targets_N)
    assert logprobs_N[0] == -INF and logprobs_N[1].isfinite() and entropy_N.isfinite().all()


def test_undefined_rows_are_nan_and_stay_alone():
    """No finite logit, a NaN, a +inf, a target outside the row: each makes its own row NaN, no other."""
    logits_NV, targets_N = random_case(6, 5000)
    logits_NV[0] = -INF
    logits_NV[1, 4999] = math.nan
    logits_NV[2, 7] = INF
    targets_N[3], targets_N[4] = -1, 5000
    logprobs_N, entropy_N, grad_NV = run(token_logprob, logits_NV, targets_N, 1.0)
    for rows in (logprobs_N, entropy_N, grad_NV.sum(-1)):
        assert rows.isnan().tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows_are_read_in_place_and_never_past_their_end(dtype):
    """Rows of a wider buffer, stepped columns, a transpose, an expanded row: all equal their dense copy."""
    wide_NW, targets_N = random_case(4, 9016, dtype)
    wide_NW[:, 4500:] = 1e4  # would dominate every sum it entered by mistake
    buffer_VN = random_case(4500, 4, dtype, seed=2)[0]
    views = [wide_NW[:, :4500], wide_NW[:, 1:4500], wide_NW[::2, :4500], wide_NW[:, :4500:3], buffer_VN.T]
    views.append(wide_NW[:1, :4500].expand(4, 4500))
    for view_NV in views:
        targets_n = targets_N[: len(view_NV)] % view_NV.shape[1]
        from_view = run(token_logprob, view_NV, targets_n, 0.7)
        from_copy = run(token_logprob, view_NV.contiguous(), targets_n, 0.7)
        for a, b in zip(from_view, from_copy):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert_no_further_from_truth_than_eager(wide_NW[:, :4500], targets_N % 4500, 0.7)


def test_rows_may_lie_beyond_two_to_the_31_elements():
    """Row offsets are 64-bit: a row that starts 2**31 + 32 elements into its buffer is read from there."""
    stride, V = 2**30 + 16, 5000
    buffer = torch.empty(2 * stride + V, dtype=torch.bfloat16, device=DEVICE)  # 4 GiB, mostly untouched
    logits_NV = buffer.as_strided((3, V), (stride, 1))
    values_NV, targets_N = random_case(3, V, torch.bfloat16)
    logits_NV.copy_(values_NV)
    with torch.no_grad():
        for a, b in zip(token_logprob(logits_NV, targets_N), token_logprob(values_NV, targets_N)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_no_rows_give_empty_outputs_and_an_empty_gradient():
    """N = 0, an update without loss tokens, works forward and backward."""
    logits_NV = torch.empty(0, 1000, device=DEVICE, requires_grad=True)
    logprobs_N, entropy_N = token_logprob(logits_NV, torch.empty(0, dtype=torch.int64, device=DEVICE))
    logprobs_N.sum().backward()
    assert logprobs_N.shape == entropy_N.shape == (0,) and logits_NV.grad.shape == (0, 1000)


def test_entropy_carries_no_gradient():
    """The entropy is for logging: it needs no gradient, and the log-prob does."""
    logits_NV, targets_N = random_case(3, 100)
    logprobs_N, entropy_N = token_logprob(logits_NV.requires_grad_(), targets_N)
    assert logprobs_N.requires_grad and not entropy_N.requires_grad and entropy_N.grad_fn is None
    logprobs_N, _ = token_logprob(logits_NV.detach(), targets_N)
    assert not logprobs_N.requires_grad


def test_integer_width_and_stride_of_the_gradient_do_not_matter():
    """int32 targets, strided targets and the stride-0 gradient of sum() change no number."""
    logits_NV, targets_N = random_case(4, 5000)
    leaves = [logits_NV.detach().clone().requires_grad_() for _ in range(3)]
    token_logprob(leaves[0], targets_N)[0].backward(torch.ones(4, device=DEVICE))
    token_logprob(leaves[1], targets_N.int())[0].sum().backward()
    token_logprob(leaves[2], targets_N.repeat_interleave(2)[::2])[0].sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad) and torch.equal(leaves[0].grad, leaves[2].grad)


class CountingKernel:
    """Stands in front of a Triton kernel and notes the grid of each launch."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


def test_the_triton_kernels_run_once_each_way(monkeypatch):
    """One launch each way, a program per row: the results above come from Triton, not from a fallback."""
    kind = triton.JITFunction if DEVICE == "cuda" else triton.runtime.interpreter.InterpretedFunction
    assert isinstance(module._forward_kernel, kind) and isinstance(module._backward_kernel, kind)
    forward, backward = CountingKernel(module._forward_kernel), CountingKernel(module._backward_kernel)
    monkeypatch.setattr(module, "_forward_kernel", forward)
    monkeypatch.setattr(module, "_backward_kernel", backward)
    logits_NV, targets_N = random_case(3, 5000)
    logprobs_N, _ = token_logprob(logits_NV.requires_grad_(), targets_N)
    assert forward.grids == [(3,)] and backward.grids == []
    assert logprobs_N.grad_fn.name() == "_TokenLogprobBackward"
    logprobs_N.sum().backward()
    assert forward.grids == [(3,)] and backward.grids == [(3,)]


def test_the_kernel_is_a_drop_in_for_its_plain_twin():
    """model.token_logprob has the same signature, and the same results within float32 sums (1e-5)."""
    import model

    assert inspect.signature(model.token_logprob) == inspect.signature(kernels.token_logprob)
    logits_NV, targets_N = random_case(4, 1000)
    for a, b in zip(*(run(twin, logits_NV, targets_N, 0.7) for twin in (token_logprob, model.token_logprob))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "logits, targets, temperature, text",
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), 1.0, r"\(2, 3, 4\)"),
        (torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), 1.0, "V >= 1"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), 1.0, r"\(3,\)"),
        (torch.zeros(2, 4).double(), torch.zeros(2, dtype=torch.int64), 1.0, "float64"),
        (torch.zeros(2, 4), torch.zeros(2), 1.0, "float32 targets"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 0.0, "temperature 0.0"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), math.nan, "temperature nan"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64, device="meta"), 1.0, "meta"),
    ],
)
def test_wrong_arguments_are_named(logits, targets, temperature, text):
    """A wrong shape, dtype, temperature or device raises ValueError and says what was given."""
    targets = targets if targets.device.type == "meta" else targets.to(DEVICE)
    with pytest.raises(ValueError, match=text):
        token_logprob(logits.to(DEVICE), targets, temperature)


COMPILE = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import logprob

for kernel in (logprob._forward_kernel, logprob._backward_kernel):
    types = {"logits_ptr": "*bf16", "grad_logits_ptr": "*bf16", "targets_ptr": "*i64", "row_stride": "i64"}
    types |= {"inv_temperature": "fp32", "V": "constexpr", "BLOCK_V": "constexpr"}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    options = logprob._launch_options(151936)
    constants = {"V": 151936, "BLOCK_V": options.pop("BLOCK_V")}
    # What the launcher finds out by itself: aligned tensors and a row stride that is a multiple of 16.
    aligned = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or name == "row_stride"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "ld.global.v4.b32" in compiled.asm["ptx"], "no 16-byte loads"
    assert len(compiled.asm["cubin"]) > 0
    print("compiled", kernel.__name__)

try:
    logprob.token_logprob(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
except ValueError as error:
    print(error)
"""


def test_the_kernels_compile_for_a_hopper_gpu_without_one(tmp_path):
    """The real compiler accepts both kernels, with 16-byte loads; not interpreted, CPU tensors raise."""
    # A process of its own, because this one interprets the kernels; an empty cache, so that it compiles.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(module.__file__).parent.parent)}
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.count("compiled") == 2, result.stdout + result.stderr
    assert "given; both must be on one CUDA device. On a CPU use the plain token_logprob" in result.stdout


@pytest.mark.gpu
def test_large_bf16_batch_on_a_gpu_is_no_further_from_float64_than_eager():
    """16384 rows of 151936, more than 2**31 logits, are right in the first, the last and some other rows."""
    N, V = 16384, 151936
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory: logits, gradient and temporaries")
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits_NV = torch.randn(N, V, device=DEVICE, dtype=torch.bfloat16, generator=generator).mul_(3)
    targets_N = torch.randint(0, V, (N,), device=DEVICE, generator=generator)
    upstream_N = torch.randn(N, device=DEVICE, generator=generator)
    logprobs_N, entropy_N, grad_NV = run(token_logprob, logits_NV, targets_N, 0.7, upstream_N)
    assert grad_NV.isfinite().all()
    rows = torch.tensor([0, 1, 7777, 14134, 14135, N - 2, N - 1], device=DEVICE)  # 2**31: row 14134
    kernel = logprobs_N[rows], entropy_N[rows], grad_NV[rows]
    compare_with_truth(kernel, logits_NV[rows], targets_N[rows], 0.7, upstream_N[rows])


@pytest.mark.gpu
def test_a_second_gpu_is_launched_on():
    """Tensors on a device that is not the current one are computed there."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits_NV, targets_N = (tensor.to("cuda:1") for tensor in random_case(3, 5000))
    logprobs_N, _ = token_logprob(logits_NV, targets_N)
    expected_N, _ = reference_token_logprob(logits_NV, targets_N)
    torch.testing.assert_close(logprobs_N, expected_N, rtol=1e-5, atol=1e-5)
