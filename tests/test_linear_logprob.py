"""Claims about both linear_logprob: the Triton kernels' (without a GPU under Triton's interpreter, products
in float32), in one slice and in several, and its plain twin of model.py.

The rule for outputs: no further from the float64 truth than eager torch on the same numbers in float32 (bf16
inputs must not cost more), plus 1e-6 of the number (of 1 if it is smaller): 8 float32 roundings.
The rule for gradients: errors are divided by the sum of the absolute values of the element's terms; the
largest is no more than eager float32's (152064 terms are not exact) plus GRAD_TOLERANCE.
"""
import importlib
import itertools
import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model

# import_module, because the package has a function of the module's name.
kernel = importlib.import_module("kernels.linear_logprob")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Float32: exp(z) counts the rounding of z, up to 50 here, as often. bf16: dx is rounded (2**-8 of it where
# the interpreter cuts instead, and 2**-9 more for a product of its own), and so is the gradient itself.
GRAD_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7 + 2**-8}
# The interpreter computes with numpy, which announces every infinity and NaN that these tests ask for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def kernel_in_slices(hidden_ND, weight_VD, targets_N, temperature=1.0):
    """Slices as narrow as they come, 256 columns; 16384 of a real vocabulary, with a ragged last one."""
    return kernel._LinearLogprob.apply(hidden_ND, weight_VD, targets_N, temperature,
                                       256 if len(weight_VD) < 20000 else 16384)


FUNCTIONS = {"kernel": kernel.linear_logprob, "in slices": kernel_in_slices, "plain": model.linear_logprob}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def random_case(N, V, D=16, dtype=torch.float32):
    """hidden, weight with logits of standard deviation 3, targets (the edges of slices first), a gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=generator).to(dtype)
    weight_VD = (torch.randn(V, D, generator=generator) * 3 / D**0.5).to(dtype)
    edges = torch.tensor([0, V - 1, 255, 256, 511, 512, 1023, 1024, V - 2])
    targets_N = torch.cat([edges, torch.randint(0, V, (N,), generator=generator)])[:N].clamp(0, V - 1)
    return tuple(x.to(DEVICE) for x in (hidden_ND, weight_VD, targets_N, torch.randn(N, generator=generator)))


def run(function, hidden_ND, weight_VD, targets_N, upstream_N, temperature=1.0):
    """logprobs_N, entropies_N and the gradients of sum(upstream * logprobs)."""
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden_ND, weight_VD)]
    logprobs_N, entropies_N = function(*leaves, targets_N, temperature)
    (logprobs_N * upstream_N).sum().backward()
    return logprobs_N.detach(), entropies_N, leaves[0].grad, leaves[1].grad


def eager(hidden_ND, weight_VD, targets_N, temperature=1.0):
    """log_softmax + gather in the inputs' own type: in float64 the oracle."""
    all_NV = torch.log_softmax(hidden_ND @ weight_VD.T / temperature, dim=-1)
    entropies_N = torch.special.entr(all_NV.detach().exp()).sum(-1)
    return all_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1), entropies_N


def assert_right(function, hidden_ND, weight_VD, targets_N, upstream_N, temperature=1.0):
    """The two rules of the header."""
    ours = run(function, hidden_ND, weight_VD, targets_N, upstream_N, temperature)
    hidden, weight = hidden_ND.double(), weight_VD.double()
    truth = run(eager, hidden, weight, targets_N, upstream_N.double(), temperature)
    float32 = run(eager, hidden_ND.float(), weight_VD.float(), targets_N, upstream_N, temperature)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for ours_N, truth_N, float32_N in zip(ours[:2], truth, float32):
        allowed_N = (float32_N - truth_N).abs().max() + 1e-6 * truth_N.abs().clamp(min=1.0)
        assert ((ours_N - truth_N).abs() <= allowed_N).all(), (ours_N, truth_N)
    # Of the chosen token's 1 - p both terms count, since they may cancel.
    terms_NV = torch.softmax(hidden @ weight.T / temperature, -1)
    terms_NV[torch.arange(len(hidden)), targets_N] += 1
    terms_NV *= upstream_N.double().abs().unsqueeze(1) / temperature
    sizes = terms_NV @ weight.abs(), terms_NV.T @ hidden.abs()
    for i, (size, leaf) in enumerate(zip(sizes, (hidden_ND, weight_VD)), start=2):
        assert ours[i].dtype == leaf.dtype and ours[i].shape == leaf.shape
        # Below float32's normal numbers nothing is relative: hence 1e-30, of terms that are near 1.
        error, eager_error = (((x[i] - truth[i]).abs() / (size + 1e-30)).max() for x in (ours, float32))
        assert error <= eager_error + GRAD_TOLERANCE[leaf.dtype], f"gradient {i - 2}: error {error:.1e}"


@each_function
@pytest.mark.parametrize("V, dtype", [
    *itertools.product([1, 64, 1300, 4097], [torch.float32, torch.bfloat16]),
    (50257, torch.float32), (151936, torch.bfloat16), (152064, torch.float32)])
def test_outputs_and_gradients_are_right(function, V, dtype):
    """One token, one block, ragged slices, two blocks, GPT-2's and Qwen2.5's vocabulary; targets at edges."""
    # 110 rows of Qwen2.5's vocabulary are a chunk of the plain twin.
    N = 9 if V < 20000 else 115 if function is model.linear_logprob else 3
    assert_right(function, *random_case(N, V, dtype=dtype), 0.7)


@each_function
def test_peaked_and_very_negative_rows_lose_no_precision(function):
    """1e4 at one token or two, whose log-sum-exp rounds to 1e-3; -1e30 everywhere, whose would lose log V."""
    weight_VD = torch.randn(1300, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0, 0, 1])
    weight_VD[[3, 5, 1299]] = torch.tensor([[100.0, 0, 0], [0, 100.0, 0], [0, 100.0, 0]])
    hidden_ND = torch.tensor([[100.0, 0, 1], [0, 100.0, 1], [100.0, 0, 1]])
    peaked = hidden_ND, weight_VD, torch.tensor([3, 1299, 17]), torch.ones(3)
    negative = torch.full((2, 1), 1e15), torch.full((1300, 1), -1e15), torch.tensor([0, 1299]), torch.ones(2)
    for case in (peaked, negative):
        assert_right(function, *(x.to(DEVICE) for x in case))


@each_function
@pytest.mark.parametrize("wanted", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(function, wanted):
    """The gradient of one alone equals that beside the other, also a second time through a retained graph."""
    case = random_case(4, 300)
    both = run(function, *case)[2:]
    case[wanted].requires_grad_()
    logprobs_N, entropies_N = function(*case[:3])
    for _ in range(2):
        logprobs_N.backward(case[3], retain_graph=True)
    assert torch.equal(case[wanted].grad, 2 * both[wanted])
    assert case[1 - wanted].grad is None and not entropies_N.requires_grad


def test_the_gradient_of_hidden_is_summed_in_float32():
    """Over 64 slices of bf16 it is as in one piece but for the last bit; a bf16 sum is off by several."""
    case = random_case(4, 64 * 256, dtype=torch.bfloat16)
    whole_ND, ours_ND = (run(f, *case)[2].float() for f in (kernel.linear_logprob, kernel_in_slices))
    torch.testing.assert_close(ours_ND, whole_ND, rtol=2**-7, atol=2**-9 * float(whole_ND.abs().max()))


@each_function
def test_no_rows_work(function):
    """An update without loss tokens: empty outputs, and a gradient of the weight that is zero."""
    outputs = run(function, *random_case(0, 300))
    assert [x.shape for x in outputs] == [(0,), (0,), (0, 16), (300, 16)] and not outputs[3].any()


@pytest.mark.parametrize("name, wrong", [
    *itertools.product(FUNCTIONS, [math.nan]), *itertools.product(["kernel", "in slices"], [-1, 1300])])
def test_a_nan_or_a_target_out_of_range_makes_nan_of_its_row_and_no_other(name, wrong):
    """And of gradients. A kernel that raised for a target, as the plain twin does, would wait for the GPU."""
    case = hidden_ND, _, targets_N, _ = random_case(4, 1300)
    expected = run(FUNCTIONS[name], *case)
    if math.isnan(wrong):
        hidden_ND[1, 3] = wrong
    else:
        targets_N[1] = wrong
        with pytest.raises(IndexError, match="linear_logprob: .*of 1300 tokens"):
            model.linear_logprob(*case[:3])
    *rows, grad_VD = run(FUNCTIONS[name], *case)
    assert grad_VD.isnan().any()
    for got, want in zip(rows, expected):
        assert got[1].isnan().any()
        torch.testing.assert_close(got[[0, 2, 3]], want[[0, 2, 3]], rtol=1e-5, atol=1e-5)


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of torch's operations, views included, hold at one time."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        self.sizes |= {StorageWeakRef(storage): storage.nbytes() for storage in made}
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("function, N, D, V, device, share", [
    (kernel_in_slices, 16, 1, 2600, DEVICE, 0.1), (model.linear_logprob, 2048, 896, 151936, "meta", 0.25)])
def test_no_tensor_of_all_logits_is_made(function, N, D, V, device, share):
    """Forward and backward hold a tenth, a quarter of eager's memory, which is about three times all logits.

    Apart from the weight and its gradient, which every head needs. "meta" tensors have no contents.
    """
    hidden_ND, weight_VD, upstream_N = (torch.zeros(shape, device=device) for shape in ((N, D), (V, D), (N,)))
    targets_N = torch.zeros(N, dtype=torch.int64, device="cpu" if device == "meta" else device)
    case = hidden_ND, weight_VD, targets_N, upstream_N
    peaks = []
    for head in (function, eager):
        with LiveBytes() as mode:
            run(head, *case)
        peaks.append(mode.peak - 2 * weight_VD.nbytes)
    assert 0 < peaks[0] < share * peaks[1]


def test_slices_fit_the_budget_and_come_in_few_widths():
    """TILE_BYTES of logits for any number of rows; a kernel is compiled for each of at most 7 widths."""
    widths = [kernel._slice_width(N, 151936) for N in range(1, 16385)]
    assert max(4 * N * width for N, width in enumerate(widths, 1)) <= kernel.TILE_BYTES
    assert widths[0] == 151936 and len(set(widths)) <= 7


@pytest.mark.gpu
def test_a_large_bf16_batch_on_a_gpu_is_right_in_float32_without_waiting_within_the_budget():
    """Over 2**31 logits against float64; peak memory is 38 slices' tile, its bf16 copy and gradients."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    hidden_ND, weight_VD, targets_N, upstream_N = case = random_case(16384, 151936, 1536, torch.bfloat16)
    run(kernel.linear_logprob, *case)  # compiles, fills workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        *outputs, grad_ND, grad_VD = run(kernel.linear_logprob, *case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gradients = weight_VD.nbytes + 3 * hidden_ND.nbytes  # of hidden in float32, and once more in bf16
    assert torch.cuda.max_memory_allocated() - before < 1.5 * kernel.TILE_BYTES + gradients + 2**25
    rows = torch.tensor([0, 1, 7777, 14134, 14135, 16382, 16383], device=DEVICE)
    *true_outputs, true_nD, _ = run(eager, hidden_ND[rows].double(), weight_VD.double(), targets_N[rows],
                                    upstream_N[rows].double())
    for got_N, true_n in zip(outputs, true_outputs):
        assert (got_N[rows] - true_n).abs().max() < 1e-4  # eager bf16 logits are off by 1e-2
    assert (grad_ND[rows] - true_nD).norm() < 2**-7 * true_nD.norm()
    for token in (4095, 4096, 151935, int(targets_N[5])):
        # p of the token in every row, from the log-probs that the function gives for it as a target.
        p_N = kernel.linear_logprob(hidden_ND, weight_VD, torch.full_like(targets_N, token))[0].double().exp()
        true_D = (upstream_N * ((targets_N == token).double() - p_N)) @ hidden_ND.double()
        assert (grad_VD[token] - true_D).norm() < 2**-6 * true_D.norm()
