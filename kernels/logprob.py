"""Log-probability of the chosen token, and entropy, from one read of each row of logits.

Per row, with logits x_v, temperature T and m = max_v x_v:

    z_v     = (x_v - m) / T                      z <= 0, and 0 at the largest logit
    s       = sum_v exp(z_v)
    t       = sum_v exp(z_v) * z_v
    logprob = z_target - log s                   = log softmax(x / T)[target]
    entropy = log s - t / s                      = -sum_v p_v log p_v, in nats
    dlogits = g * (1[v == target] - exp(z_v - log s)) / T

The row is read in tiles. When a tile raises the maximum from m to m', the sums so far move with it: with
d = (m - m') / T they become s * exp(d) and exp(d) * (t + s * d). Both terms of the entropy are >= 0, so
nothing cancels, however large the logits are. For the same reason m and log s are kept apart: their sum, the
usual log-sum-exp, loses log s where |m| is large (at m = -1e30 all of it).

Not measured: speed. Bytes are counted, registers and spills were read from the compiler's output; tile, warps
and grid are reasoned choices that `python bench/kernels.py` on a GPU would confirm or change.

Dimensions: N tokens (rows), V vocabulary, BLOCK_V columns of one tile.
"""

import math

import torch
import triton
import triton.language as tl


def reference_token_logprob(logits_NV, targets_N, temperature=1.0):
    """The same two numbers in plain PyTorch: the definition that the kernel is tested against.

    Bytes per logit of b bytes, each operation reading and writing once. Forward: cast b + 4, divide 8,
    log_softmax 8, exp 8, entr 8, sum 4 = b + 40. Backward: zeros for gather 4, log_softmax 12, divide 8,
    cast 4 + b = b + 28. The kernel moves b and 2b. For bf16: 42 + 30 against 2 + 4, twelve times less.
    """
    all_logprobs_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    entropy_N = torch.special.entr(all_logprobs_NV.detach().exp()).sum(dim=-1)  # entr(0) = 0: masked tokens
    return all_logprobs_NV.gather(-1, targets_N.long().unsqueeze(-1)).squeeze(-1), entropy_N


@triton.jit
def _forward_kernel(
    logits_ptr, targets_ptr, logprobs_ptr, entropy_ptr, max_ptr, log_sum_ptr,
    row_stride, inv_temperature, V: tl.constexpr, BLOCK_V: tl.constexpr
):
    # One program per row: the 132 multiprocessors of an H200 run 6 each, about 800 rows at a time, and an
    # update has thousands. For a few rows, split each over several programs: a first kernel writes (m, s, t)
    # per slice of a row, a second merges the slices by the rule in the header.
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2**31 at 14135 rows of 151936
    row_ptr = logits_ptr + row * row_stride
    m = -float("inf")
    s = 0.0
    t = 0.0
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        # 151936 is not a multiple of the tile: columns past the end read as -inf and add nothing to s or t.
        x = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        # As long as only masked tokens were seen the maximum is -inf, and -inf - -inf would be NaN.
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        # Subtract, then scale: bf16 logits subtract almost without rounding, their scaled values would not.
        z = (x - shift) * inv_temperature
        d = (m - shift) * inv_temperature
        e = tl.exp(z)
        rescale = tl.exp(d)
        # exp(-200) is 0 in float32, so this floor changes no product except 0 * -inf, which becomes 0.
        t = rescale * (t + s * tl.maximum(d, -200.0)) + tl.sum(e * tl.maximum(z, -200.0), axis=0)
        s = rescale * s + tl.sum(e, axis=0)
        m = m_new

    target = tl.load(targets_ptr + row)
    in_range = (target >= 0) & (target < V)
    chosen = tl.load(row_ptr + target, mask=in_range, other=0.0).to(tl.float32)
    # Checking targets on the host would wait for the GPU: a bad one makes its outputs and its gradient NaN.
    log_sum = tl.where(in_range, tl.log(s), float("nan"))
    tl.store(logprobs_ptr + row, (chosen - m) * inv_temperature - log_sum)
    tl.store(entropy_ptr + row, log_sum - t / s)
    tl.store(max_ptr + row, m)
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit
def _backward_kernel(
    logits_ptr, targets_ptr, max_ptr, log_sum_ptr, grad_logprobs_ptr, grad_logits_ptr,
    row_stride, inv_temperature, V: tl.constexpr, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + row * row_stride
    grad_row_ptr = grad_logits_ptr + row * V
    target = tl.load(targets_ptr + row)
    m = tl.load(max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    g = tl.load(grad_logprobs_ptr + row) * inv_temperature
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        p = tl.exp((x - m) * inv_temperature - log_sum)
        grad = g * (tl.where(cols == target, 1.0, 0.0) - p)
        tl.store(grad_row_ptr + cols, grad.to(grad_logits_ptr.dtype.element_ty), mask=cols < V)


def _launch_options(V):
    # 4096 columns over 8 warps are 16 per thread, two 16-byte loads of bf16: 32 to 46 registers, no spills
    # (compiled for sm_80, sm_90 and sm_100 by triton 3.6 and 3.9). A row stride that is no multiple of 16, as
    # with V = 50257, loses the wide loads. V is a constant of the compiled kernel: one model, one vocabulary;
    # and the interpreter of triton 3.6 cannot loop up to a runtime number under numpy 2.4.
    BLOCK_V = min(4096, max(128, triton.next_power_of_2(V)))
    # Fusion is spelled out because triton 3.10 changes its default and 3.9 warns of that at the first launch.
    return {"BLOCK_V": BLOCK_V, "num_warps": 8 if BLOCK_V >= 2048 else 4, "enable_fp_fusion": True}


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, targets_N, temperature):
        N, V = logits_NV.shape
        logprobs_N, entropy_N, max_N, log_sum_N = (
            torch.empty(N, dtype=torch.float32, device=logits_NV.device) for _ in range(4)
        )
        # Triton launches on the current device, not on the tensor's. A grid of 0 rows it skips by itself.
        with torch.cuda.device_of(logits_NV):
            _forward_kernel[(N,)](
                logits_NV, targets_N, logprobs_N, entropy_N, max_N, log_sum_N,
                logits_NV.stride(0), 1.0 / temperature, V, **_launch_options(V)
            )
        ctx.save_for_backward(logits_NV, targets_N, max_N, log_sum_N)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs_N, _grad_entropy_N):
        logits_NV, targets_N, max_N, log_sum_N = ctx.saved_tensors
        N, V = logits_NV.shape
        grad_logits_NV = torch.empty((N, V), dtype=logits_NV.dtype, device=logits_NV.device)
        with torch.cuda.device_of(logits_NV):
            # contiguous(): .sum().backward() hands over one number expanded to (N,), with stride 0.
            _backward_kernel[(N,)](
                logits_NV, targets_N, max_N, log_sum_N, grad_logprobs_N.contiguous(), grad_logits_NV,
                logits_NV.stride(0), 1.0 / ctx.temperature, V, **_launch_options(V)
            )
        return grad_logits_NV, None, None


def token_logprob(logits_NV, targets_N, temperature=1.0):
    """How likely each row's chosen token was under softmax(logits / temperature), and how undecided it is.

    logits_NV: (N, V), bfloat16, float16 or float32, on CUDA; rows may be strided; -inf marks a masked token.
    targets_N: (N,), int64 or int32, in 0..V-1; any other value makes its row NaN, forward and backward.
    Returns (logprobs_N, entropy_N), float32. The first is differentiable in the logits, with a gradient in
    their dtype; the second, in nats, is for logging and carries none. A row of nothing but -inf gives NaN.
    Raises ValueError for any other shape, dtype, device or temperature.
    Source: the policy ratio of the GRPO loss (`grpo_loss` in bread.py) needs this number per sampled token.
    """
    if logits_NV.ndim != 2 or logits_NV.shape[1] == 0 or targets_N.shape != logits_NV.shape[:1]:
        raise ValueError(
            f"token_logprob: logits {tuple(logits_NV.shape)} and targets {tuple(targets_N.shape)} given; "
            "allowed are (N, V) with V >= 1, and (N,): type logits.view(-1, V), targets.view(-1)"
        )
    if logits_NV.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"token_logprob: {logits_NV.dtype} logits given, not bfloat16, float16, float32")
    if targets_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token_logprob: {targets_N.dtype} targets given, not int64, int32")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"token_logprob: temperature {temperature} given; it must be positive and finite")
    # Under TRITON_INTERPRET=1 the kernels are no JITFunction, and the host reads tensors of any device.
    needs_cuda = isinstance(_forward_kernel, triton.JITFunction)
    if targets_N.device != logits_NV.device or (needs_cuda and logits_NV.device.type != "cuda"):
        raise ValueError(
            f"token_logprob: logits on {logits_NV.device}, targets on {targets_N.device} given; both must be "
            "on one CUDA device. On a CPU use the plain token_logprob of model.py (or TRITON_INTERPRET=1)"
        )
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    return _TokenLogprob.apply(logits_NV, targets_N.contiguous(), temperature)
