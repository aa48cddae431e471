"""Log-probability of the chosen token, and entropy, from hidden states and LM head, without (N, V) tensors.

Per row, with logits x_v = hidden . weight_v, temperature T and m = max_v x_v:

    z_v     = (x_v - m) / T                      z <= 0, and 0 at the largest logit
    s       = sum_v exp(z_v)
    t       = sum_v exp(z_v) * z_v
    logprob = z_target - log s                   = log softmax(x / T)[target]
    entropy = log s - t / s                      = -sum_v p_v log p_v, in nats
    dx_v    = g * (1[v == target] - exp(z_v - log s)) / T
    dhidden = sum_v dx_v weight_v,  dweight_v = sum_n dx_nv hidden_n

For one slice of the vocabulary after the other cuBLAS writes a tile of logits, and a kernel folds it into m,
s, t. Where a tile raises the maximum from m to m', with d = (m - m') / T, the sums so far become s * exp(d)
and exp(d) * (t + s * d). Both terms of the entropy are >= 0: nothing cancels. m and log s are kept apart: m +
log s would lose log s where |m| is large. Backward makes the tile again and turns it into dx.

Dimensions: N tokens (rows), D hidden size, V vocabulary, C columns of one tile.
"""

import math

import torch
import triton
import triton.language as tl

TILE_BYTES = 2**28  # the float32 tile: 4096 columns for 16384 rows, so 38 slices of a vocabulary of 151936
BLOCK_C = 4096  # 16 columns per thread of 8 warps
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # triton 3.10 changes this default, 3.9 warns


@triton.jit
def _fold_kernel(tile_ptr, targets_ptr, max_ptr, sum_ptr, sum_z_ptr, chosen_ptr, row_stride, start, width,
                 inv_temperature, NUM_BLOCKS: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # rows * row_stride may pass 2**31
    row_ptr = tile_ptr + row * row_stride
    m = tl.load(max_ptr + row)
    s = tl.load(sum_ptr + row)
    t = tl.load(sum_z_ptr + row)
    for block in range(0, NUM_BLOCKS):
        cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
        x = tl.load(row_ptr + cols, mask=cols < width, other=-float("inf"))  # past the end: adds nothing
        m_new = tl.maximum(m, tl.max(x, axis=0))
        z = (x - m_new) * inv_temperature  # subtract, then scale: exact near the maximum, where it counts
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
def _gradient_kernel(tile_ptr, grad_ptr, targets_ptr, max_ptr, log_sum_ptr, grad_logprobs_ptr, tile_stride,
                     grad_stride, start, width, inv_temperature, BLOCK_C: tl.constexpr):
    # grad may be the tile itself: every element is read and written by the same thread.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.load(tile_ptr + row * tile_stride + cols, mask=cols < width, other=-float("inf"))
    p = tl.exp((x - tl.load(max_ptr + row)) * inv_temperature - tl.load(log_sum_ptr + row))
    is_target = cols == tl.load(targets_ptr + row) - start
    grad = tl.load(grad_logprobs_ptr + row) * inv_temperature * (tl.where(is_target, 1.0, 0.0) - p)
    tl.store(grad_ptr + row * grad_stride + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < width)


def _slice_width(N, V):
    # All columns if that tile fits, else a power of two: compiled per number of blocks, and N always differs.
    # Rows start at multiples of 64 bytes whatever V is, so that loads and cuBLAS stay on 16-byte accesses.
    columns = max(256, TILE_BYTES // (4 * max(N, 1)))
    return triton.cdiv(V, 32) * 32 if columns >= V else 2 ** (columns.bit_length() - 1)


def _logit_tiles(hidden_ND, weight_VD, slice_width):
    # Of every slice of the vocabulary: first token, weight_CD, logits_NC in float32, in one buffer for all.
    tile_NC = torch.empty((len(hidden_ND), slice_width), dtype=torch.float32, device=hidden_ND.device)
    for start in range(0, len(weight_VD), slice_width):
        weight_CD = weight_VD[start:start + slice_width]
        logits_NC = tile_NC[:, :len(weight_CD)]
        if hidden_ND.is_cuda and hidden_ND.dtype == torch.bfloat16:  # a logit of 20 in bf16 is off by 0.06
            torch.mm(hidden_ND, weight_CD.T, out_dtype=torch.float32, out=logits_NC)
        else:
            torch.mm(hidden_ND.float(), weight_CD.T.float(), out=logits_NC)
        yield start, weight_CD, logits_NC


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, temperature, slice_width):
        N, device = len(hidden_ND), hidden_ND.device
        max_N = torch.full((N,), -math.inf, device=device)
        sum_N = torch.zeros(N, device=device)
        sum_z_N = torch.zeros(N, device=device)
        # A check of targets would wait for the GPU: what no slice fills in stays NaN, and so do gradients.
        chosen_N = torch.full((N,), math.nan, device=device)
        for start, _, logits_NC in _logit_tiles(hidden_ND, weight_VD, slice_width):
            width = logits_NC.shape[1]
            _fold_kernel[(N,)](
                logits_NC, targets_N, max_N, sum_N, sum_z_N, chosen_N, logits_NC.stride(0), start, width,
                1.0 / temperature, triton.cdiv(width, BLOCK_C), BLOCK_C, **OPTIONS)
        log_sum_N = torch.where(chosen_N.isnan(), math.nan, sum_N.log())
        entropies_N = log_sum_N - sum_z_N / sum_N
        ctx.temperature = temperature
        ctx.slice_width = slice_width
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, max_N, log_sum_N)
        ctx.mark_non_differentiable(entropies_N)
        return (chosen_N - max_N) / temperature - log_sum_N, entropies_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs_N, _grad_entropies_N):
        hidden_ND, weight_VD, targets_N, max_N, log_sum_N = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_N = grad_logprobs_N.contiguous()  # .sum().backward() expands one number to (N,), with stride 0
        is_half = hidden_ND.dtype == torch.bfloat16  # then the products take dx in bf16, as eager torch does
        half_NC = hidden_ND.new_empty((len(hidden_ND), ctx.slice_width)) if is_half else None
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if wants_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if wants_weight else None
        for start, weight_CD, logits_NC in _logit_tiles(hidden_ND, weight_VD, ctx.slice_width):
            width = logits_NC.shape[1]
            dx_NC = half_NC[:, :width] if is_half else logits_NC
            _gradient_kernel[(len(hidden_ND), triton.cdiv(width, BLOCK_C))](
                logits_NC, dx_NC, targets_N, max_N, log_sum_N, grad_N, logits_NC.stride(0), dx_NC.stride(0),
                start, width, 1.0 / ctx.temperature, BLOCK_C, **OPTIONS)
            if wants_weight:
                torch.mm(dx_NC.T, hidden_ND, out=grad_weight_VD[start:start + width])
            # Summed in float32: rounding every slice's share of dhidden to bf16 would bias training.
            if wants_hidden and is_half and hidden_ND.is_cuda:
                torch.addmm(grad_hidden_ND, dx_NC, weight_CD, out_dtype=torch.float32, out=grad_hidden_ND)
            elif wants_hidden:
                grad_hidden_ND.addmm_(dx_NC.float(), weight_CD.float())
        return grad_hidden_ND.to(hidden_ND.dtype) if wants_hidden else None, grad_weight_VD, None, None, None


def linear_logprob(hidden_ND, weight_VD, targets_N, temperature=1.0):
    """Log-prob of each row's chosen token under softmax(hidden @ weight.T / temperature), and its entropy.

    hidden_ND, weight_VD: both float32 or both bfloat16 (torch >= 2.10: products with out_dtype), on CUDA.
    targets_N: int64 or int32, in 0..V-1; any other value makes its row NaN, and the gradients too. Returns
    (logprobs_N, entropies_N), float32, in nats; the entropies carry no gradient. Extra memory: TILE_BYTES,
    half as much again in bf16, and the gradients (that of hidden in float32 until it is complete). Raises
    ValueError for any other shape, dtype, device or temperature.
    """
    inputs = hidden_ND, weight_VD, targets_N
    shapes = [tuple(x.shape) for x in inputs]
    dtypes = [x.dtype for x in inputs]
    if hidden_ND.ndim != 2 or shapes[1][1:] != shapes[0][1:] or shapes[2] != shapes[0][:1]:
        raise ValueError(f"linear_logprob: {shapes} given, not (N, D), (V, D), (N,): type hidden.view(-1, D)")
    is_typed = dtypes[:2] in ([torch.bfloat16] * 2, [torch.float32] * 2) and not targets_N.is_floating_point()
    is_here = hidden_ND.is_cuda or not isinstance(_fold_kernel, triton.JITFunction)  # that is, interpreted
    if not (is_typed and is_here and 0.0 < temperature < math.inf):
        raise ValueError(f"linear_logprob: {dtypes} on {hidden_ND.device}, temperature {temperature} given, "
                         "not two of bfloat16 or float32 and integers on CUDA, positive and finite: type "
                         "hidden.to(weight.dtype), targets.long(), .cuda(), or use the one of model.py")
    width = _slice_width(len(hidden_ND), len(weight_VD))
    with torch.cuda.device_of(hidden_ND):  # Triton launches on the current device, not on the tensors'
        return _LinearLogprob.apply(*(x.contiguous() for x in inputs), temperature, width)
