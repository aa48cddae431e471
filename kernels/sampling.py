"""Draw one token per row from softmax(logits / temperature) in one read of the logits, with its log-prob.

With E_v ~ Exp(1) for every token, argmax_v p_v / E_v is a draw from p (Gumbel-max: argmax_v z_v - log E_v, before
taking exp). E_v = -log(1 - u_v), and u_v is a hash of (key of the row, position, v): no state, no cumulative sum, no
host sync. Each program reads one tile of one row and leaves five numbers; with x_v the logits, T the temperature,
m the tile's maximum and z_v = (x_v - m) / T:

    s = sum_v exp(z_v)    t = sum_v exp(z_v) z_v    best = max_v exp(z_v) / E_v, and the v where it is reached

A second kernel merges the tiles of a row: with M = max m and d = (m - M) / T they become s exp(d),
exp(d) (t + s d) and best exp(d), and then, as in kernels/linear_logprob.py,

    logprob = (x_token - M) / T - log s          entropy = log s - t / s

Nothing underflows that could win: E lies in [2**-32, 16.7], so the winner has exp(z) / E >= 1 / 16.7, while the
first token lost to underflow has exp(z) / E < 2**-126 * 2**32. Nor does an offset of the logits cost precision,
only differences to the maximum are used: a row of -1e30 is a uniform distribution.

Tiles depend on V alone. So a row's token and numbers do not depend on the rows beside it, nor on how many there are.

Not measured: speed. Bytes are counted; instructions, registers and spills were read from the compiler's output. On an
H200 it should be bound by instructions, about 90 per logit, a quarter of them the logarithm: 256 rows of 151936 are
1.1e8 per-warp instructions, 0.12 ms if all 4 issue slots of 132 multiprocessors are busy, where reading float32 takes
0.04 ms and the plain twin moves 9 GB, 2 ms.

Dimensions: R rows, V vocabulary, BLOCK_V columns of one tile, TILES tiles of a row.
"""

import math

import torch
import triton
import triton.language as tl


def reference_sample(logits_RV, temperature, keys_R, positions_R):
    """The same draw in plain PyTorch: the definition that the kernel is tested against.

    Bytes per logit of b bytes, each operation reading and writing once: cast b + 4, divide 8, log_softmax 8, exp 8,
    entr 8, sum 4; hash: add 4, 3 shifts and masks 48, 3 xors 36, xor with the key 8, 2 products 16, mask 8;
    float, add, scale, clamp, 2 signs, log1p 56; divide 12, argmax 4: b + 232. The kernels move b + 40 / BLOCK_V.
    """
    logits_RV = logits_RV.float()
    all_logprobs_RV = torch.log_softmax(logits_RV / (temperature or 1.0), dim=-1)
    probs_RV = all_logprobs_RV.exp()
    if temperature == 0:
        scores_RV = logits_RV
    else:
        scores_RV = probs_RV / -torch.log1p(-reference_uniform(keys_R, positions_R, logits_RV.shape[1]))
    tokens_R = scores_RV.argmax(dim=-1)
    logprobs_R = all_logprobs_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    return tokens_R, logprobs_R, torch.special.entr(probs_RV).sum(dim=-1)


def reference_uniform(keys_R, positions_R, V):
    """(R, V) float32 in (0, 1) from (R,) int64 keys and (R,) positions, fine near 0: the small numbers decide who wins.

    key + position * golden ratio is mixed to 64 bits (splitmix64); its halves key a 32-bit hash of the token index
    ("lowbias32"). Integers wrap, and >> copies the sign of a torch integer: the masks make it a logical shift.
    """
    key_R = keys_R + positions_R.long() * -7046029254386353131  # 0x9E3779B97F4A7C15
    key_R = (key_R ^ (key_R >> 30 & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    key_R = (key_R ^ (key_R >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    low_R1, high_R1 = key_R.to(torch.int32).unsqueeze(1), (key_R >> 32).to(torch.int32).unsqueeze(1)
    x_RV = torch.arange(V, dtype=torch.int32, device=keys_R.device) + low_R1
    x_RV = (x_RV ^ (x_RV >> 16 & 0xFFFF)) * 0x7FEB352D ^ high_R1
    x_RV = (x_RV ^ (x_RV >> 15 & 0x1FFFF)) * -0x7B935975  # 0x846CA68B
    x_RV = x_RV ^ (x_RV >> 16 & 0xFFFF)
    # 64 of the 2**31 values round to 1: E would be infinite, and a token of probability 1 could lose to a masked one.
    return ((x_RV & 0x7FFFFFFF).float() + 0.5).mul(2.0**-31).clamp(max=1 - 2.0**-24)


@triton.jit
def _uniform(key, position, cols):
    # reference_uniform with unsigned integers, whose >> is logical. 64-bit operations wrap as they are; the 32-bit
    # ones say so, or TRITON_DEBUG=1 would stop at the first overflow.
    key = key.to(tl.uint64) + position.to(tl.int64).to(tl.uint64) * 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    x = tl.add(cols.to(tl.uint32), key.to(tl.uint32), sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = x ^ (key >> 32).to(tl.uint32)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    x = x ^ (x >> 16)
    # A signed conversion, one instruction everywhere: the top bit is cleared.
    u = ((x & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.0**-31
    return tl.minimum(u, 1 - 2.0**-24)


@triton.jit
def _exponential(u):
    # -log(1 - u) to about 2 units in the last place, for u in (0, 1). log(1 - u) alone would be off by 2**-25 / u,
    # and small u decide who wins; Triton's interpreter has no log1p. With w = 1 - u rounded, 1 - u = w + r where
    # r = (1 - w) - u is exact and at most 2**-25 (0 if u >= 1/2), so -log(1 - u) = -log(w) - r / w + O(r^2), and
    # r for r / w costs |r| (1 / w - 1) / E <= 2**-25 / w <= 2**-24 of the result. u < 2**-25: w = 1, E = u.
    w = 1.0 - u
    return (u - (1.0 - w)) - tl.log(w)


@triton.jit
def _store_row(
    logits_row_ptr, tokens_ptr, logprobs_ptr, entropies_ptr, row, token, m, s, t, inv_temperature
):
    chosen = tl.load(logits_row_ptr + token).to(tl.float32)
    log_sum = tl.log(s)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, (chosen - m) * inv_temperature - log_sum)
    tl.store(entropies_ptr + row, log_sum - t / s)


@triton.jit
def _tile_kernel(
    logits_ptr, keys_ptr, positions_ptr, partials_ptr, candidates_ptr, tokens_ptr, logprobs_ptr, entropies_ptr,
    row_stride, inv_temperature, V: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr, GREEDY: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # R * V passes 2**31 at 14135 rows of 151936
    tile = tl.program_id(1)
    cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    logits_row_ptr = logits_ptr + row * row_stride
    # 151936 is not a multiple of the tile: columns past the end read as masked tokens, -inf.
    x = tl.load(logits_row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    m = tl.max(x, axis=0)
    # A tile of masked tokens only has the maximum -inf, and -inf - -inf would be NaN.
    shift = tl.where(m == -float("inf"), 0.0, m)
    z = (x - shift) * inv_temperature
    e = tl.exp(z)
    s = tl.sum(e, axis=0)
    t = tl.sum(e * tl.maximum(z, -200.0), axis=0)  # exp(-200) is 0 in float32: only 0 * -inf changes, to 0
    # NaN never wins either, or a row of NaN could give a token past the end, and the next embedding look-up fail.
    if GREEDY:
        score = tl.where(x == x, x, -float("inf"))
    else:
        u = _uniform(tl.load(keys_ptr + row), tl.load(positions_ptr + row), cols)
        score = tl.where(e > 0, e / _exponential(u), 0.0)
    best, index = tl.max(score, axis=0, return_indices=True)  # of equal scores the first
    token = tile * BLOCK_V + index
    if TILES == 1:
        _store_row(
            logits_row_ptr, tokens_ptr, logprobs_ptr, entropies_ptr, row, token, m, s, t, inv_temperature
        )
    else:
        row_partials_ptr = partials_ptr + row * 4 * TILES + tile
        tl.store(row_partials_ptr, m)
        tl.store(row_partials_ptr + TILES, s)
        tl.store(row_partials_ptr + 2 * TILES, t)
        tl.store(row_partials_ptr + 3 * TILES, best)
        tl.store(candidates_ptr + row * TILES + tile, token)


@triton.jit
def _merge_kernel(
    logits_ptr, partials_ptr, candidates_ptr, tokens_ptr, logprobs_ptr, entropies_ptr,
    row_stride, inv_temperature, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr, GREEDY: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK_TILES)
    is_tile = tiles < TILES
    row_partials_ptr = partials_ptr + row * 4 * TILES + tiles
    m = tl.load(row_partials_ptr, mask=is_tile, other=-float("inf"))
    s = tl.load(row_partials_ptr + TILES, mask=is_tile, other=0.0)
    t = tl.load(row_partials_ptr + 2 * TILES, mask=is_tile, other=0.0)
    best = tl.load(row_partials_ptr + 3 * TILES, mask=is_tile, other=-float("inf"))
    row_max = tl.max(m, axis=0)
    d = (m - tl.where(row_max == -float("inf"), 0.0, row_max)) * inv_temperature
    rescale = tl.exp(d)
    if not GREEDY:
        best = tl.where(rescale > 0, best * rescale, 0.0)
    _, winner = tl.max(best, axis=0, return_indices=True)  # of equal scores the first tile's
    token = tl.load(candidates_ptr + row * TILES + winner)
    t = tl.sum(rescale * (t + s * tl.maximum(d, -200.0)), axis=0)
    s = tl.sum(rescale * s, axis=0)
    _store_row(
        logits_ptr + row * row_stride, tokens_ptr, logprobs_ptr, entropies_ptr, row, token, row_max, s, t,
        inv_temperature
    )


def _launch_options(V):
    # 4096 columns over 8 warps are 16 per thread: at most 77 registers, no spills, four 16-byte loads of float32
    # (compiled for sm_80, sm_90 and sm_100 by triton 3.6 and 3.9). One row of 151936 is 38 programs, and 14 rows give
    # each of the 132 multiprocessors of an H200 the 3 or 4 it can hold. Smaller tiles for fewer rows would save about
    # 1 us, but then a row's last bits would depend on the size of its batch.
    BLOCK_V = min(4096, max(128, triton.next_power_of_2(V)))
    # Fusion is spelled out because triton 3.10 changes its default and 3.9 warns of that at the first launch.
    return {"BLOCK_V": BLOCK_V, "num_warps": 8 if BLOCK_V >= 2048 else 4, "enable_fp_fusion": True}


def sample(logits_RV, temperature, keys_R, positions_R):
    """Draw one token per row from softmax(logits / temperature). Temperature 0: the first of the largest logits.

    logits_RV: (R, V), bfloat16, float16 or float32, on CUDA; rows may be strided; -inf marks a token never to draw.
    temperature: a number >= 0. keys_R: (R,) int64, the noise key of every row. positions_R: (R,), int64 or int32:
    the same key and position draw the same noise, whatever the other rows are.
    Returns (tokens_R int64, logprobs_R, entropies_R), float32, in nats, of the distribution drawn from (greedy: of
    temperature 1). A row of nothing but -inf gives token 0, a NaN or +inf some token of the row, both NaN numbers.
    May be captured in a CUDA graph after one call outside, which compiles: the launches depend on shapes alone.
    Raises ValueError for any other shape, dtype, device or temperature. Source: `sample` in sampler.py.
    """
    check_arguments(logits_RV, temperature, keys_R, positions_R)
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    (R, V), device = logits_RV.shape, logits_RV.device
    options = _launch_options(V)
    TILES = triton.cdiv(V, options["BLOCK_V"])
    partials = torch.empty((R, 4, TILES), dtype=torch.float32, device=device)
    candidates = torch.empty((R, TILES), dtype=torch.int32, device=device)
    tokens_R = torch.empty(R, dtype=torch.int64, device=device)
    logprobs_R, entropies_R = torch.empty((2, R), dtype=torch.float32, device=device)
    inv_temperature = 1.0 / (temperature or 1.0)
    # Triton launches on the current device, not on the tensor's. A grid of 0 rows it skips by itself.
    with torch.cuda.device_of(logits_RV):
        _tile_kernel[(R, TILES)](
            logits_RV, keys_R.contiguous(), positions_R.contiguous(), partials, candidates, tokens_R, logprobs_R,
            entropies_R, logits_RV.stride(0), inv_temperature, V, TILES=TILES, GREEDY=temperature == 0, **options
        )
        if TILES > 1:
            _merge_kernel[(R,)](
                logits_RV, partials, candidates, tokens_R, logprobs_R, entropies_R, logits_RV.stride(0),
                inv_temperature, TILES, triton.next_power_of_2(TILES), temperature == 0, num_warps=1,
                enable_fp_fusion=True
            )
    return tokens_R, logprobs_R, entropies_R


def check_arguments(logits_RV, temperature, keys_R, positions_R):
    """Raise ValueError for whatever `sample` does not allow, with what was given and what to type."""
    if logits_RV.ndim != 2 or logits_RV.shape[1] == 0 or not keys_R.shape == positions_R.shape == logits_RV.shape[:1]:
        raise ValueError(
            f"sample: logits {tuple(logits_RV.shape)}, keys {tuple(keys_R.shape)}, positions "
            f"{tuple(positions_R.shape)} given; allowed are (R, V) with V >= 1, (R,) and (R,): for the last token of "
            "(R, T, V) type logits[:, -1]"
        )
    if logits_RV.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"sample: {logits_RV.dtype} logits given, not bfloat16, float16, float32: type logits.float()")
    if keys_R.dtype != torch.int64 or positions_R.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"sample: {keys_R.dtype} keys and {positions_R.dtype} positions given; keys must be int64 (type "
            "keys.long()), positions int64 or int32"
        )
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"sample: temperature {temperature} given; it must be finite and positive, or 0 for greedy")
    # Under TRITON_INTERPRET=1 the kernels are no JITFunction, and the host reads tensors of any device.
    needs_cuda = isinstance(_tile_kernel, triton.JITFunction)
    device = logits_RV.device
    if not keys_R.device == positions_R.device == device or (needs_cuda and device.type != "cuda"):
        raise ValueError(
            f"sample: logits on {device}, keys on {keys_R.device}, positions on {positions_R.device} given; all must "
            "be on one CUDA device. On a CPU use the plain sample of sampler.py (or TRITON_INTERPRET=1)"
        )
