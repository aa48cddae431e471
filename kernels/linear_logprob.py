"""Log-probability of the chosen token, and entropy, from hidden states and LM head: no (N, V) tensor is stored.

Per row, with logits x_v = hidden . weight_v, temperature T and m = max_v x_v:

    z_v     = (x_v - m) / T                      z <= 0, and 0 at the largest logit
    s       = sum_v exp(z_v)
    t       = sum_v exp(z_v) * z_v
    logprob = z_target - log s                   = log softmax(x / T)[target]
    entropy = log s - t / s                      = -sum_v p_v log p_v, in nats
    dx_v    = g * (1[v == target] - exp(z_v - log s)) / T
    dhidden = sum_v dx_v weight_v,  dweight_v = sum_n dx_nv hidden_n

The vocabulary is cut into slices, and all rows meet one slice at a time: a cuBLAS product writes the tile of
logits, a kernel folds it into m, s, t and takes the chosen logit from it. When a tile raises the maximum from m
to m', the sums so far move with it: with d = (m - m') / T they become s * exp(d) and exp(d) * (t + s * d). Both
terms of the entropy are >= 0, so nothing cancels, however large the logits are. For the same reason m and log s
are kept apart: their sum, the usual log-sum-exp, loses log s where |m| is large (at m = -1e30 all of it).
Backward makes the same tile again, turns it into dx, and multiplies it from both sides.

Slices of the vocabulary and not of the rows, because then each row of dweight is written once, by one product.
dhidden is the sum over slices, and is kept in float32: rounding every slice's share to bf16 biases training.
The matrix products stay with cuBLAS: a Triton product reaches 60-65 % of its speed on Hopper, which from D = 1536
up costs more than passing the tiles through memory (arithmetic from published speeds, not measured here).

Not measured: speed. Bytes are counted, registers and spills were read from the compiler's output; tile, warps and
grid are reasoned choices that `python bench/head.py` on a GPU would confirm or change.

Dimensions: N tokens (rows), D hidden size, V vocabulary, C columns of one tile, BLOCK_C columns of one step.
"""

import math

import torch
import triton
import triton.language as tl

# The float32 tile. At N = 16384 it is 4096 columns wide: 38 slices of 151936, each a product large enough for full
# speed, and dhidden (100 MB at D = 1536) is read and written 38 times, about 2 ms of 45 at 4.3 TB/s. A tile
# four times smaller would stay in the 50 MB of L2, and pay for it with four times as many passes over dhidden.
TILE_BYTES = 2**28


def reference_linear_logprob(hidden_ND, weight_VD, targets_N, temperature=1.0):
    """The same two numbers in plain PyTorch: the definition that the kernels are tested against.

    Bytes per logit beside the products' inputs, for bf16 inputs. Here, forward: product 2, cast 6, divide 8,
    log_softmax 8, exp 8, entr 8, sum 4 = 44; backward: zeros for gather 4, log_softmax 12, divide 8, cast 6, two
    products 4 = 34. And up to five (N, V) tensors at once. Below, forward: product 4, fold 4 = 8; backward:
    product 4, gradient 4 + 2, two products 4 = 14. So 78 against 22, and one more product (four, not three).
    """
    all_logprobs_NV = torch.log_softmax((hidden_ND @ weight_VD.T).float() / temperature, dim=-1)
    entropies_N = torch.special.entr(all_logprobs_NV.detach().exp()).sum(dim=-1)
    return all_logprobs_NV.gather(-1, targets_N.long().unsqueeze(-1)).squeeze(-1), entropies_N


@triton.jit
def _fold_kernel(
    tile_ptr, targets_ptr, max_ptr, sum_ptr, sum_z_ptr, chosen_ptr,
    row_stride, start, width, inv_temperature, NUM_BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr
):
    # One program per row: the 132 multiprocessors of an H200 run about 800 rows at a time, and an update has
    # thousands. Row statistics live in memory between slices: 24 bytes per row against 16 KB of tile.
    row = tl.program_id(0).to(tl.int64)  # rows * row_stride may pass 2**31
    row_ptr = tile_ptr + row * row_stride
    m = tl.load(max_ptr + row)
    s = tl.load(sum_ptr + row)
    t = tl.load(sum_z_ptr + row)
    for block in range(0, NUM_BLOCKS):
        cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
        # 151936 is not a multiple of the tile: columns past its end read as -inf and add nothing to s or t.
        x = tl.load(row_ptr + cols, mask=cols < width, other=-float("inf"))
        m_new = tl.maximum(m, tl.max(x, axis=0))
        # Subtract, then scale: near the maximum, where it counts, the difference is exact.
        z = (x - m_new) * inv_temperature
        d = (m - m_new) * inv_temperature
        e = tl.exp(z)
        rescale = tl.exp(d)
        # exp(-200) is 0 in float32, so this floor changes no product except 0 * -inf, which becomes 0.
        t = rescale * (t + s * tl.maximum(d, -200.0)) + tl.sum(e * tl.maximum(z, -200.0), axis=0)
        s = rescale * s + tl.sum(e, axis=0)
        m = m_new
    tl.store(max_ptr + row, m)
    tl.store(sum_ptr + row, s)
    tl.store(sum_z_ptr + row, t)
    target = tl.load(targets_ptr + row) - start
    is_here = (target >= 0) & (target < width)
    tl.store(chosen_ptr + row, tl.load(row_ptr + target, mask=is_here, other=0.0), mask=is_here)


@triton.jit
def _gradient_kernel(
    tile_ptr, grad_ptr, targets_ptr, max_ptr, log_sum_ptr, grad_logprobs_ptr,
    tile_stride, grad_stride, start, width, inv_temperature, BLOCK_C: tl.constexpr
):
    # grad may be the tile itself: every element is read and written by the same thread.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.load(tile_ptr + row * tile_stride + cols, mask=cols < width, other=-float("inf"))
    p = tl.exp((x - tl.load(max_ptr + row)) * inv_temperature - tl.load(log_sum_ptr + row))
    is_target = cols == tl.load(targets_ptr + row) - start
    grad = tl.load(grad_logprobs_ptr + row) * inv_temperature * (tl.where(is_target, 1.0, 0.0) - p)
    tl.store(grad_ptr + row * grad_stride + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < width)


def _slice_width(N, V):
    """Columns of a slice: all of them if the tile fits TILE_BYTES (it is then kept for backward), else a power of
    two that fits. Powers of two because the kernel is compiled per number of blocks, and N differs every time."""
    columns = max(256, TILE_BYTES // (4 * max(N, 1)))
    return V if columns >= V else 2 ** (columns.bit_length() - 1)


def _new_tile(N, width, dtype, device):
    # Rows start at multiples of 64 bytes whatever V is, so that loads and cuBLAS stay on 16-byte accesses.
    return torch.empty((N, triton.cdiv(width, 32) * 32), dtype=dtype, device=device)[:, :width]


def _launch_options(width):
    # 4096 columns over 8 warps are 16 per thread, four 16-byte loads. Fusion is spelled out because triton 3.10
    # changes its default and 3.9 warns of that at the first launch.
    BLOCK_C = min(4096, max(128, triton.next_power_of_2(width)))
    return {"BLOCK_C": BLOCK_C, "num_warps": 8 if BLOCK_C >= 2048 else 4, "enable_fp_fusion": True}


def _product(a, b, out):
    """out = a @ b in float32. bf16 logits would be off by up to 0.06 at a logit of 20."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)  # CUDA only, as is the one below
    return torch.mm(a.float(), b.float(), out=out)


def _add_product(total, a, b):
    """total += a @ b in float32, without rounding the product first."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.addmm_(a.float(), b.float())


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, temperature):
        N, V, device = len(hidden_ND), len(weight_VD), hidden_ND.device
        ctx.temperature, ctx.width = temperature, _slice_width(N, V)
        tile_NC = _new_tile(N, ctx.width, torch.float32, device)
        max_N = torch.full((N,), -math.inf, device=device)
        sum_N, sum_z_N = torch.zeros(N, device=device), torch.zeros(N, device=device)
        # Checking targets on the host would wait for the GPU. What no slice fills in stays NaN: a bad target makes
        # its row's outputs NaN, and (through log_sum_N) the gradients.
        chosen_N = torch.full((N,), math.nan, device=device)
        for start in range(0, V, ctx.width):
            weight_CD = weight_VD[start:start + ctx.width]
            width, options = len(weight_CD), _launch_options(len(weight_CD))
            _product(hidden_ND, weight_CD.T, tile_NC[:, :width])
            # Triton launches on the current device, not on the tensor's. A grid of 0 rows it skips by itself.
            with torch.cuda.device_of(hidden_ND):
                _fold_kernel[(N,)](
                    tile_NC, targets_N, max_N, sum_N, sum_z_N, chosen_N, tile_NC.stride(0), start, width,
                    1.0 / temperature, triton.cdiv(width, options["BLOCK_C"]), **options
                )
        ctx.tile_NC = tile_NC if ctx.width == V else None
        log_sum_N = torch.where(chosen_N.isnan(), math.nan, sum_N.log())
        entropies_N = log_sum_N - sum_z_N / sum_N
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, max_N, log_sum_N)
        ctx.mark_non_differentiable(entropies_N)
        return (chosen_N - max_N) / temperature - log_sum_N, entropies_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs_N, _grad_entropies_N):
        hidden_ND, weight_VD, targets_N, max_N, log_sum_N = ctx.saved_tensors
        N, V, (wants_hidden, wants_weight) = len(hidden_ND), len(weight_VD), ctx.needs_input_grad[:2]
        # A kept tile is overwritten, so a second backward of a retained graph finds none and computes it again.
        kept_NC, ctx.tile_NC = ctx.tile_NC, None
        tile_NC = kept_NC if kept_NC is not None else _new_tile(N, ctx.width, torch.float32, hidden_ND.device)
        is_half = hidden_ND.dtype == torch.bfloat16  # then the products take dx in bf16, as eager torch does
        grad_NC = _new_tile(N, ctx.width, torch.bfloat16, hidden_ND.device) if is_half else tile_NC
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if wants_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if wants_weight else None
        for start in range(0, V, ctx.width):
            weight_CD = weight_VD[start:start + ctx.width]
            width, options = len(weight_CD), _launch_options(len(weight_CD))
            if kept_NC is None:
                _product(hidden_ND, weight_CD.T, tile_NC[:, :width])
            with torch.cuda.device_of(hidden_ND):
                # contiguous(): .sum().backward() hands over one number expanded to (N,), with stride 0.
                _gradient_kernel[(N, triton.cdiv(width, options["BLOCK_C"]))](
                    tile_NC, grad_NC, targets_N, max_N, log_sum_N, grad_logprobs_N.contiguous(), tile_NC.stride(0),
                    grad_NC.stride(0), start, width, 1.0 / ctx.temperature, **options
                )
            if wants_weight:
                torch.mm(grad_NC[:, :width].T, hidden_ND, out=grad_weight_VD[start:start + width])
            if wants_hidden:
                _add_product(grad_hidden_ND, grad_NC[:, :width], weight_CD)
        return grad_hidden_ND.to(hidden_ND.dtype) if wants_hidden else None, grad_weight_VD, None, None


def linear_logprob(hidden_ND, weight_VD, targets_N, temperature=1.0):
    """How likely each row's chosen token was under softmax(hidden @ weight.T / temperature), and how undecided it is.

    hidden_ND: (N, D) and weight_VD: (V, D), both bfloat16 or both float32, on CUDA; they may be strided.
    targets_N: (N,), int64 or int32, in 0..V-1; any other value makes its row NaN, and the gradients too.
    Returns (logprobs_N, entropies_N), float32, in nats. The first is differentiable in hidden and weight, with
    gradients in their dtype; the second is for logging and carries none. Extra memory: TILE_BYTES, half as much
    again in bf16, and the gradients (that of hidden in float32 until it is complete).
    Raises ValueError for any other shape, dtype, device or temperature.
    Source: the policy ratio of the GRPO loss (`grpo_loss` in bread.py) needs this number per sampled token.
    """
    shapes = tuple(hidden_ND.shape), tuple(weight_VD.shape), tuple(targets_N.shape)
    if [len(shape) for shape in shapes] != [2, 2, 1] or shapes[0] != (*shapes[2], shapes[1][1]) or 0 in shapes[1]:
        raise ValueError(
            f"linear_logprob: hidden {shapes[0]}, weight {shapes[1]}, targets {shapes[2]} given; allowed are (N, D), "
            "(V, D) with V, D >= 1, and (N,): type hidden.view(-1, D), targets.view(-1)"
        )
    if hidden_ND.dtype != weight_VD.dtype or hidden_ND.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"linear_logprob: {hidden_ND.dtype} hidden and {weight_VD.dtype} weight given; allowed are both bfloat16 "
            "or both float32: type hidden.to(weight.dtype)"
        )
    if targets_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"linear_logprob: {targets_N.dtype} targets given, not int64, int32: type targets.long()")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"linear_logprob: temperature {temperature} given; it must be positive and finite")
    # Under TRITON_INTERPRET=1 the kernels are no JITFunction, and the host reads tensors of any device.
    needs_cuda = isinstance(_fold_kernel, triton.JITFunction)
    devices = hidden_ND.device, weight_VD.device, targets_N.device
    if len(set(devices)) > 1 or (needs_cuda and hidden_ND.device.type != "cuda"):
        raise ValueError(
            "linear_logprob: hidden on {}, weight on {}, targets on {} given; all must be on one CUDA device. On a CPU "
            "use the plain linear_logprob of model.py (or TRITON_INTERPRET=1)".format(*devices)
        )
    return _LinearLogprob.apply(hidden_ND.contiguous(), weight_VD.contiguous(), targets_N.contiguous(), temperature)
