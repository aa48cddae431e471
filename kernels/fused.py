"""The small operations of a decoder layer, one launch each, without gradients: rounded as in model.py.

In a decode step each handles at most 1 MB: a launch, about 2 us, is all that it costs. RMSNorms, residual,
RoPE and SwiGLU of a layer are 10 launches in PyTorch, here 4. Between two roundings all is float32.

Dimensions: B batch, T tokens of a row, H heads, C head size, D what is normed, I width inside the MLP.
"""
import torch
import triton
import triton.language as tl

BLOCK_H, BLOCK_I = 8, 1024  # heads, columns of one program: 14 heads of 64 rows make 128 programs


@triton.jit
def _rms_norm_kernel(x_ptr, y_ptr, weight_ptr, total_ptr, out_ptr, x_stride, y_stride, eps, D: tl.constexpr,
                     BLOCK_D: tl.constexpr, ADDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    at = tl.program_id(1) * D + cols  # in a head with its own weight; without heads there is one
    out_at = row * tl.num_programs(1) * D + at
    x = tl.load(x_ptr + row * x_stride + at, mask=cols < D, other=0.0)
    z = x.to(tl.float32)
    if ADDS:
        y = tl.load(y_ptr + row * y_stride + at, mask=cols < D, other=0.0)
        total = (z + y.to(tl.float32)).to(x.dtype)  # what the next layer adds to is what is normed
        tl.store(total_ptr + out_at, total, mask=cols < D)
        z = total.to(tl.float32)
    normed = (z * tl.rsqrt(tl.sum(z * z, axis=0) / D + eps)).to(x.dtype)
    weight = tl.load(weight_ptr + at, mask=cols < D, other=0.0)
    tl.store(out_ptr + out_at, normed.to(tl.float32) * weight.to(tl.float32), mask=cols < D)


@triton.jit(do_not_specialize=["angle_rows"])  # B T of a prefill is another number every time
def _rotate_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, x_stride, angle_rows, H: tl.constexpr, C: tl.constexpr,
                   BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    is_here = (head < H) & (channel < C)
    at = head * C + channel
    x = tl.load(x_ptr + row * x_stride + at, mask=is_here, other=0.0)
    # The other of each pair: a second read, of what the first one has brought into the cache.
    pair = tl.load(x_ptr + row * x_stride + head * C + (channel + C // 2) % C, mask=is_here, other=0.0)
    angle_at = row % angle_rows * C + channel  # angles of one batch row serve all
    cos = tl.load(cos_ptr + angle_at, mask=channel < C, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle_at, mask=channel < C, other=0.0).to(tl.float32)
    turned = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)  # so rounds addcmul's first argument
    tl.store(out_ptr + row * H * C + at, turned + pair.to(tl.float32) * sin, mask=is_here)


@triton.jit
def _swiglu_kernel(x_ptr, out_ptr, x_stride, I: tl.constexpr, BLOCK_I: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    gate = tl.load(x_ptr + row * x_stride + cols, mask=cols < I, other=0.0)
    up = tl.load(x_ptr + row * x_stride + I + cols, mask=cols < I, other=0.0).to(tl.float32)
    z = gate.to(tl.float32)
    silu = (z / (1.0 + tl.exp(-z))).to(gate.dtype)
    tl.store(out_ptr + row * I + cols, silu.to(tl.float32) * up, mask=cols < I)


def rms_norm(x, weight, eps):
    """x / rms(x) over the last dimension, times weight_D, or weight_HC: each head its own."""
    return _norm(x, x, weight, eps, adds=False)[1]


def add_rms_norm(x, y, weight, eps):
    """(x + y, its norm)."""
    return _norm(x, y, weight, eps, adds=True)


def _norm(x, y, weight, eps, adds):
    _check("add_rms_norm" if adds else "rms_norm",
           x.shape[-weight.dim():] == weight.shape and y.shape == x.shape, x, y, weight)
    D = weight.shape[-1]
    BLOCK_D = triton.next_power_of_2(D)
    x_rows = x.reshape(-1, weight.numel())  # a view also of the first heads of a wider tensor
    y_rows = y.reshape(-1, weight.numel())
    total = x.new_empty(x.shape) if adds else x
    out = x.new_empty(x.shape)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on the tensors'
        _rms_norm_kernel[(len(x_rows), weight.numel() // D)](
            x_rows, y_rows, weight.contiguous(), total, out, x_rows.stride(0), y_rows.stride(0), eps, D,
            BLOCK_D, adds, num_warps=max(1, min(16, BLOCK_D // 512)), enable_fp_fusion=True)
    return total, out


def rotate(x_BTHC, cos_BT1C, sin_BT1C):
    """Turn the pairs (x_i, x_{i + C/2}) of every head, by angles of each batch row or of one for all."""
    B, T, H, C = x_BTHC.shape
    _check("rotate", cos_BT1C.shape == sin_BT1C.shape and cos_BT1C.shape in ((B, T, 1, C), (1, T, 1, C)),
           x_BTHC, cos_BT1C, sin_BT1C)
    rows = x_BTHC.reshape(B * T, H * C)
    out_BTHC = x_BTHC.new_empty(x_BTHC.shape)
    with torch.cuda.device_of(x_BTHC):
        _rotate_kernel[(B * T, triton.cdiv(H, BLOCK_H))](
            rows, cos_BT1C.contiguous(), sin_BT1C.contiguous(), out_BTHC, rows.stride(0), len(cos_BT1C) * T,
            H, C, BLOCK_H, triton.next_power_of_2(C), num_warps=4, enable_fp_fusion=True)
    return out_BTHC


def swiglu(x):
    """[ gate | up ] -> silu(gate) * up, half as wide."""
    _check("swiglu", x.shape[-1] % 2 == 0, x)
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    with torch.cuda.device_of(x):
        _swiglu_kernel[(len(rows), triton.cdiv(out.shape[-1], BLOCK_I))](
            rows, out, rows.stride(0), out.shape[-1], BLOCK_I, num_warps=4, enable_fp_fusion=True)
    return out


def _check(name, fits, *inputs):
    is_here = inputs[0].is_cuda or not isinstance(_swiglu_kernel, triton.JITFunction)  # that is, interpreted
    is_learning = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)  # what would be lost
    kinds = [(tuple(x.shape), x.dtype, x.stride(-1)) for x in inputs]
    if not (fits and is_here) or is_learning or {kind[1:] for kind in kinds} != {(inputs[0].dtype, 1)}:
        raise ValueError(f"{name}: {kinds} on {inputs[0].device}, gradient wanted: {is_learning} given, not "
                         "shapes that fit, one dtype, stride 1, no gradient: type with torch.no_grad():, "
                         ".contiguous(), .cuda(), or use the one of model.py")
