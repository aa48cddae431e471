"""Draw one token per row from softmax(logits / temperature) in one read of the logits, with its log-prob.

With E_v ~ Exp(1) for every token, argmax_v p_v / E_v is a draw from p (Gumbel-max before taking the
logarithm). E_v = -log(1 - u_v), and u_v is a hash of (key of the row, position, v): no state, no cumulative
sum, no host sync, and no row depends on another. A program reads one tile of one row and leaves five numbers;
with logits x_v, temperature T, m the tile's maximum and z_v = (x_v - m) / T:

    s = sum_v exp(z_v)    t = sum_v exp(z_v) z_v    best = max_v exp(z_v) / E_v, and the v where it is reached

A second kernel merges the tiles of a row: with M = max m and d = (m - M) / T they become s exp(d),
exp(d) (t + s d) and best exp(d), and then, as in kernels/linear_logprob.py,

    logprob = (x_token - M) / T - log s          entropy = log s - t / s

Nothing underflows that could win: E lies in [2**-32, 16.7], so the winner has exp(z) / E >= 1 / 16.7, while
the first token lost has less than 2**-126 * 2**32.

Dimensions: R rows, V vocabulary, BLOCK_V columns of one tile, TILES tiles of a row.
"""

import math

import torch
import triton
import triton.language as tl

BLOCK_V = 4096  # 16 columns per thread of 8 warps


@triton.jit
def _uniform(key, position, cols):
    # `uniform` of sampler.py (splitmix64, then "lowbias32") in unsigned integers, whose >> is logical. 64-bit
    # operations wrap; the 32-bit ones say that they do, or TRITON_DEBUG=1 would stop there.
    key = key.to(tl.uint64) + position.to(tl.int64).to(tl.uint64) * 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    x = tl.add(cols.to(tl.uint32), key.to(tl.uint32), sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = x ^ (key >> 32).to(tl.uint32)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    x = x ^ (x >> 16)
    u = ((x & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.0**-31
    return tl.minimum(u, 1 - 2.0**-24)  # 64 values round to 1: E infinite, a token of probability 1 may lose


@triton.jit
def _exponential(u):
    # -log(1 - u) to 2 units in the last place: small u decide who wins, where log(1 - u) is off by 2**-25 / u
    # (and Triton's interpreter has no log1p). With w = 1 - u rounded, r = (1 - w) - u is exact and
    # -log(1 - u) = -log(w) - r / w + O(r^2), where r for r / w costs at most 2**-24 of the result.
    w = 1.0 - u
    return (u - (1.0 - w)) - tl.log(w)


@triton.jit
def _tile_kernel(logits_ptr, keys_ptr, positions_ptr, partials_ptr, candidates_ptr, inv_temperature,
                 V: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr, GREEDY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # R * V passes 2**31 at 14135 rows of 151936
    tile = tl.program_id(1)
    cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits_ptr + row * V + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    m = tl.max(x, axis=0)
    z = (x - tl.where(m == -float("inf"), 0.0, m)) * inv_temperature  # all masked: -inf - -inf is NaN
    e = tl.exp(z)
    s = tl.sum(e, axis=0)
    t = tl.sum(e * tl.maximum(z, -200.0), axis=0)  # exp(-200) is 0 in float32: only 0 * -inf changes, to 0
    # NaN never wins: a row of NaN could give a token past the end, and the next embedding look-up fail.
    if GREEDY:
        score = tl.where(x == x, x, -float("inf"))
    else:
        u = _uniform(tl.load(keys_ptr + row), tl.load(positions_ptr + row), cols)
        score = tl.where(e > 0, e / _exponential(u), 0.0)
    best, index = tl.max(score, axis=0, return_indices=True)  # of equal scores the first
    row_partials_ptr = partials_ptr + row * 4 * TILES + tile
    tl.store(row_partials_ptr, m)
    tl.store(row_partials_ptr + TILES, s)
    tl.store(row_partials_ptr + 2 * TILES, t)
    tl.store(row_partials_ptr + 3 * TILES, best)
    tl.store(candidates_ptr + row * TILES + tile, tile * BLOCK_V + index)


@triton.jit
def _merge_kernel(logits_ptr, partials_ptr, candidates_ptr, tokens_ptr, logprobs_ptr, entropies_ptr,
                  inv_temperature, V: tl.constexpr, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr,
                  GREEDY: tl.constexpr):
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
    chosen = tl.load(logits_ptr + row * V + token).to(tl.float32)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, (chosen - row_max) * inv_temperature - tl.log(s))
    tl.store(entropies_ptr + row, tl.log(s) - t / s)


def sample(logits_RV, temperature, keys_R, positions_R):
    """Draw one token per row from softmax(logits / temperature); at temperature 0 the first of the largest.

    logits_RV: of any float type, on CUDA; -inf marks a token never to draw. keys_R: int64, the noise key of
    every row; positions_R: int64 or int32. Returns (tokens_R int64, logprobs_R, entropies_R), float32, in
    nats, of the distribution drawn from (greedy: of temperature 1). A row of nothing but -inf gives token 0,
    one with NaN or +inf some token below V, both NaN numbers. Raises ValueError for other arguments.
    """
    shapes = [tuple(x.shape) for x in (logits_RV, keys_R, positions_R)]
    is_shaped = logits_RV.ndim == 2 and shapes[1:] == [shapes[0][:1]] * 2
    is_here = logits_RV.is_cuda or not isinstance(_tile_kernel, triton.JITFunction)  # that is, interpreted
    if not (is_shaped and is_here and 0.0 <= temperature < math.inf):
        raise ValueError(f"sample: {shapes}, {logits_RV.device}, temperature {temperature} given, not (R, V),"
                         " (R,), (R,) on CUDA, >= 0: type logits[:, -1].cuda(), or use sample of sampler.py")
    logits_RV = logits_RV.contiguous()
    R, V = logits_RV.shape
    tiles = triton.cdiv(V, BLOCK_V)
    inv_temperature = 1.0 / (temperature or 1.0)  # 0 is greedy
    partials = torch.empty((R, 4, tiles), dtype=torch.float32, device=logits_RV.device)
    candidates = torch.empty((R, tiles), dtype=torch.int32, device=logits_RV.device)
    tokens_R = torch.empty(R, dtype=torch.int64, device=logits_RV.device)
    logprobs_R, entropies_R = torch.empty((2, R), dtype=torch.float32, device=logits_RV.device)
    with torch.cuda.device_of(logits_RV):  # Triton launches on the current device, not on the tensors'
        _tile_kernel[(R, tiles)](
            logits_RV, keys_R.contiguous(), positions_R.contiguous(), partials, candidates, inv_temperature,
            V, BLOCK_V, tiles, temperature == 0, num_warps=8, enable_fp_fusion=True)
        _merge_kernel[(R,)](
            logits_RV, partials, candidates, tokens_R, logprobs_R, entropies_R, inv_temperature, V, tiles,
            triton.next_power_of_2(tiles), temperature == 0, num_warps=1, enable_fp_fusion=True)
    return tokens_R, logprobs_R, entropies_R
