"""Attention of one decode step for rows that share prefixes: each prefix is read once per tile of rows.

    row r attends to [ trunk[:, begin : begin + length]  ;  its own tokens 0 .. lengths_R[r] - 1 ]
                       shared by the rows of its tiles      written by the sampler, one per step

Keys are cut into chunks. With scores x_j = q . k_j, c = log2(e) / sqrt(C) and m = max_j x_j, a chunk leaves

    m,    s = sum_j 2^(c (x_j - m)),    a = sum_j 2^(c (x_j - m)) v_j

and softmax attention over all chunks i, with the largest maximum M = max_i m_i, is

    out = sum_i w_i a_i / sum_i w_i s_i          w_i = 2^(c (m_i - M))

which is the merge by log-sum-exp without its logarithm (Hydragen, arXiv 2402.05099; flash-decoding). m and s are
kept apart: their sum m + log s would lose log s where |m| is large.

Two launches. The first has a program per (tile, key head, chunk) for prefixes and per (row, key head, chunk) for
own tokens; a tile's queries, M rows x H/K heads, go through the tensor cores together. The second merges. Both
read all lengths from device memory and the grid depends on shapes only, so a captured CUDA graph stays valid
while rows grow, end and change tiles.

Not measured: speed. Bytes are counted, registers, spills and shared memory were read from the compiler's output;
tile sizes, warps, stages and numbers of chunks are reasoned choices that a benchmark on a GPU would confirm or
change.

Dimensions: R rows, H query heads, K key/value heads, C head size, S capacity for own tokens, N tokens of the
    trunk, T tiles, M rows of a tile, L lanes (queries of one program: rows x H/K heads, padded), P splits.
"""

import math
import typing

import torch
import triton
import triton.language as tl

PROGRAMS = 4 * 132  # 132 multiprocessors of an H100 or H200, about 4 programs on each
SHORTEST_CHUNK, LONGEST_CHUNK = 128, 1024  # keys: below, merging costs too much; above, one program is the tail
MAX_SPLITS = 32  # of each part: the merge holds 64 partial outputs in registers


class PrefixTiles(typing.NamedTuple):
    """Which rows share which slice of the trunk: int32 tensors on the device of the trunk, updated in place.

    rows_TM: (T, M) row numbers, -1 for an empty place; a row has a place in at most one tile that is in use.
    begins_T, lengths_T: (T,) tile t serves trunk[:, begin : begin + length]; length 0 marks an unused tile.
    max_prefix: about the longest length; it only decides into how many chunks prefixes are cut.

    Five rows in tiles of M = 4, rows 0, 1, 4 behind 7 tokens that start at 20 and rows 2, 3 behind 5 at 0:
    rows_TM = [[0, 1, 4, -1], [2, 3, -1, -1]], begins_T = [20, 0], lengths_T = [7, 5], max_prefix = 7.
    """

    rows_TM: torch.Tensor
    begins_T: torch.Tensor
    lengths_T: torch.Tensor
    max_prefix: int


def reference_decode_attention(q_RHC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, tiles):
    """The same in plain PyTorch, in float32, by copying every row's prefix: what the kernel is tested against.

    K/V bytes per step with b bytes per number, P prefix and U own tokens per row, M rows of a group per tile:
    copied prefixes 2 b K C R (P + U), the kernel 2 b K C R (P / M + U), and for each row and chunk with keys
    4 H (C + 2) written and read once more, mostly from the L2 cache. R = 256, P = U = 512, M = 16, bf16, H = 12,
    K = 2, C = 128 (Qwen2.5-1.5B, one layer): 268 MB against 143 + 6 MB, 1.8 times less; P = 2048: 3.8 times.
    """
    R, H, C = q_RHC.shape
    K = keys_RKSC.shape[1]
    prefixes = [slice(0, 0)] * R
    for rows, begin, length in zip(tiles.rows_TM.tolist(), tiles.begins_T.tolist(), tiles.lengths_T.tolist()):
        for row in rows:
            if row >= 0 and length > 0:
                prefixes[row] = slice(begin, begin + length)
    out_RHC = torch.zeros_like(q_RHC)
    for row, length in enumerate(lengths_R.tolist()):
        keys_KNC = torch.cat([trunk_keys_KNC[:, prefixes[row]], keys_RKSC[row, :, :length]], dim=1).float()
        values_KNC = torch.cat([trunk_values_KNC[:, prefixes[row]], values_RKSC[row, :, :length]], dim=1).float()
        scores_KGN = q_RHC[row].float().view(K, H // K, C) @ keys_KNC.mT * C**-0.5
        out_RHC[row] = (scores_KGN.softmax(-1) @ values_KNC).view(H, C)  # no keys: an empty sum, zeros
    return out_RHC


@triton.jit
def _attend_chunk(
    q_ptrs, k_ptr, v_ptr, partial_L, live_L, length, split, splits, k_stride, v_stride, acc_ptr, max_ptr, sum_ptr, c,
    C: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr
):
    # k_ptr and v_ptr: first key and value of the part; partial_L: where lane l's partial result goes.
    chunk = tl.cdiv(length, splits * BLOCK_N) * BLOCK_N  # keys per split: whole steps, the last one may be ragged
    start = split * chunk
    end = tl.minimum(start + chunk, length)
    # No steps for a tile whose rows have all ended. They are counted for a `for` loop: in a `while` loop the
    # compiler issues no copies ahead (no cp.async in its PTX).
    steps = tl.max(tl.where(live_L, tl.cdiv(end - start, BLOCK_N), 0), axis=0)
    if steps > 0:
        channels = tl.arange(0, C)
        q = tl.load(q_ptrs[:, None] + channels[None, :], mask=live_L[:, None], other=0.0)
        m = tl.full([LANES], -float("inf"), tl.float32)
        s = tl.full([LANES], 0.0, tl.float32)
        acc = tl.full([LANES, C], 0.0, tl.float32)
        keys = start + tl.arange(0, BLOCK_N)
        k_offsets = tl.arange(0, BLOCK_N)[:, None] * k_stride + channels[None, :]
        v_offsets = tl.arange(0, BLOCK_N)[:, None] * v_stride + channels[None, :]
        k_ptr += start.to(tl.int64) * k_stride
        v_ptr += start.to(tl.int64) * v_stride
        for _ in range(0, steps):
            # Unused capacity may hold NaN, and 0 * NaN is NaN: what lies past the end is not read, but 0.
            k = tl.load(k_ptr + k_offsets, mask=(keys < end)[:, None], other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision="ieee")
            x = tl.where((keys < end)[None, :], x, -float("inf"))
            m_new = tl.maximum(m, tl.max(x, axis=1))  # finite: every step has a key
            p = tl.exp2((x - m_new[:, None]) * c)  # subtracted, then scaled: near the peak the difference is exact
            rescale = tl.exp2((m - m_new) * c)
            s = s * rescale + tl.sum(p, axis=1)
            v = tl.load(v_ptr + v_offsets, mask=(keys < end)[:, None], other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
            m = m_new
            keys += BLOCK_N
            k_ptr += BLOCK_N * k_stride
            v_ptr += BLOCK_N * v_stride
        tl.store(max_ptr + partial_L, m, mask=live_L)
        tl.store(sum_ptr + partial_L, s, mask=live_L)
        tl.store(acc_ptr + partial_L[:, None] * C + channels[None, :], acc, mask=live_L[:, None])


# One compiled kernel per model: a number that is 1 or a multiple of 16 would otherwise get one of its own.
@triton.jit(do_not_specialize=["T", "prefix_splits", "own_splits"])
def _partial_kernel(
    q_ptr, keys_ptr, values_ptr, lengths_ptr, trunk_keys_ptr, trunk_values_ptr, rows_ptr, begins_ptr,
    prefix_lengths_ptr, acc_ptr, max_ptr, sum_ptr, q_stride_r, q_stride_h, k_stride_r, k_stride_k, k_stride_s,
    v_stride_r, v_stride_k, v_stride_s, trunk_k_stride_k, trunk_k_stride_n, trunk_v_stride_k, trunk_v_stride_n,
    T, prefix_splits, own_splits, c,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, M: tl.constexpr, TILE_LANES: tl.constexpr,
    ROW_LANES: tl.constexpr, BLOCK_N: tl.constexpr
):
    G: tl.constexpr = H // K
    pid = tl.program_id(0)
    num_prefix = T * K * prefix_splits
    # One launch for both parts: their programs fill the same multiprocessors and a graph has one node less per
    # layer. Prefix programs come first, since each does the most work.
    if pid < num_prefix:
        tile, head, split = pid // (K * prefix_splits), pid // prefix_splits % K, pid % prefix_splits
        lane_L = tl.arange(0, TILE_LANES)
        row_L = tl.load(rows_ptr + tile * M + lane_L // G, mask=lane_L < M * G, other=-1).to(tl.int64)
        head_L = head * G + lane_L % G
        begin = tl.load(begins_ptr + tile).to(tl.int64)  # offsets pass 2**31 at 8.4 million tokens of K C = 256
        _attend_chunk(
            q_ptr + row_L * q_stride_r + head_L * q_stride_h,
            trunk_keys_ptr + head.to(tl.int64) * trunk_k_stride_k + begin * trunk_k_stride_n,
            trunk_values_ptr + head.to(tl.int64) * trunk_v_stride_k + begin * trunk_v_stride_n,
            (row_L * H + head_L) * (prefix_splits + own_splits) + split, row_L >= 0,
            tl.load(prefix_lengths_ptr + tile), split, prefix_splits, trunk_k_stride_n, trunk_v_stride_n,
            acc_ptr, max_ptr, sum_ptr, c, C, TILE_LANES, BLOCK_N
        )
    else:
        # H/K = 1 to 8 queries, padded to the 16 rows of a tensor-core instruction: 16 operations per byte of bf16
        # keys and values, where an H200 is bound by memory up to 180. Without padding the ordinary cores would
        # have to do 7 per byte at H/K = 7, 30 of their 67 TFLOP/s at full bandwidth. Not measured.
        nth = pid - num_prefix
        row, kv_head, chunk = (nth // (K * own_splits)).to(tl.int64), nth // own_splits % K, nth % own_splits
        lane_G = tl.arange(0, ROW_LANES)
        head_G = kv_head * G + lane_G
        _attend_chunk(
            q_ptr + row * q_stride_r + head_G * q_stride_h,
            keys_ptr + row * k_stride_r + kv_head.to(tl.int64) * k_stride_k,
            values_ptr + row * v_stride_r + kv_head.to(tl.int64) * v_stride_k,
            (row * H + head_G) * (prefix_splits + own_splits) + prefix_splits + chunk, lane_G < G,
            tl.load(lengths_ptr + row), chunk, own_splits, k_stride_s, v_stride_s,
            acc_ptr, max_ptr, sum_ptr, c, C, ROW_LANES, BLOCK_N
        )


@triton.jit(do_not_specialize=["num_places", "prefix_splits", "own_splits"])
def _merge_kernel(
    acc_ptr, max_ptr, sum_ptr, lengths_ptr, rows_ptr, prefix_lengths_ptr, out_ptr, num_places, prefix_splits,
    own_splits, c, H: tl.constexpr, C: tl.constexpr, M: tl.constexpr, PLACES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr
):
    row, head = tl.program_id(0), tl.program_id(1)
    # The row looks for its tile (T * M numbers, from the cache) instead of being told: one table less to keep.
    place = tl.arange(0, PLACES)
    is_here = tl.load(rows_ptr + place, mask=place < num_places, other=-1) == row
    prefix_length = tl.sum(tl.load(prefix_lengths_ptr + place // M, mask=is_here, other=0), axis=0)
    split = tl.arange(0, SPLITS)
    is_prefix = split < prefix_splits
    length = tl.where(is_prefix, prefix_length, tl.load(lengths_ptr + row))
    splits = tl.where(is_prefix, prefix_splits, own_splits)
    nth = tl.where(is_prefix, split, split - prefix_splits)
    # A chunk without keys was not written, so it must not be read: fresh memory may hold NaN. Which these are
    # follows from the lengths as in _attend_chunk; nobody has to note it down.
    chunk = tl.cdiv(length, splits * BLOCK_N) * BLOCK_N
    written = (nth < splits) & (nth * chunk < length)
    partial = (row.to(tl.int64) * H + head) * (prefix_splits + own_splits) + split
    channels = tl.arange(0, C)
    m = tl.load(max_ptr + partial, mask=written, other=-float("inf"))
    s = tl.load(sum_ptr + partial, mask=written, other=0.0)
    acc = tl.load(acc_ptr + partial[:, None] * C + channels[None, :], mask=written[:, None], other=0.0)
    peak = tl.max(m, axis=0)
    w = tl.exp2((m - tl.where(peak == -float("inf"), 0.0, peak)) * c)  # no keys at all: all weights 0, not NaN
    total = tl.sum(w * s, axis=0)
    out = tl.sum(w[:, None] * acc, axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + (row.to(tl.int64) * H + head) * C + channels, out.to(out_ptr.dtype.element_ty))


def _num_splits(programs, keys):
    # Enough programs for every multiprocessor, no chunk so long that the rest waits for it, none too short.
    wanted = max(triton.cdiv(PROGRAMS, max(1, programs)), triton.cdiv(keys, LONGEST_CHUNK))
    return max(1, min(wanted, triton.cdiv(keys, SHORTEST_CHUNK), MAX_SPLITS))


def _launch_options(lanes, C, dtype):
    # A tile of 32 keys of bf16 is 16 KiB of K and V at C = 128, two of them on their way while one is used. Bytes
    # in flight are bandwidth times latency, about 26 KiB per multiprocessor of an H200, so 1 to 4 programs each
    # are enough. Compiled for sm_90: C = 128, M = 8 takes 188 (H/K = 6) or 214 (7) registers and 64 KiB, 2 programs
    # fit; M = 16 has 8 warps, 202 registers and 80 KiB, 1 fits; C = 64, M = 8, H/K = 7 has 128 registers and 32 KiB,
    # 4 fit. No spills. A separate launch for own tokens would need fewer registers and one more node in the graph.
    # float32 has no tensor cores here and is for tests: smaller tiles keep it inside the registers.
    is_wide = dtype.itemsize == 4
    num_warps = 8 if lanes * C > (2048 if is_wide else 8192) else 4
    return {"BLOCK_N": 16 if is_wide else 32, "num_warps": num_warps, "num_stages": 2 if is_wide else 3,
            "enable_fp_fusion": True}


def _check_shapes(q_RHC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, tiles):
    q, keys, values, lengths, trunk_keys, trunk_values, rows, begins, prefix_lengths = (
        tuple(x.shape)
        for x in (q_RHC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, *tiles[:3])
    )
    if [len(q), len(keys), len(trunk_keys), len(rows)] != [3, 4, 3, 2]:
        raise ValueError(
            f"decode_attention: q {q}, keys {keys}, trunk_keys {trunk_keys}, tiles.rows_TM {rows} given; allowed are "
            "(R, H, C), (R, K, S, C), (K, N, C), (T, M): for one token per row type q[:, :, 0]"
        )
    (R, H, C), K, (T, M) = q, keys[1], rows
    if C not in (16, 32, 64, 128, 256):
        raise ValueError(f"decode_attention: head size C = {C} given, not 16, 32, 64, 128, 256: use PyTorch instead")
    if K == 0 or H % K or keys[3] != C or trunk_keys[::2] != (K, C):
        raise ValueError(
            f"decode_attention: q {q}, keys {keys}, trunk_keys {trunk_keys} given; K and C of (R, H, C), (R, K, S, C), "
            "(K, N, C) must be the same and H a multiple of K"
        )
    if values != keys or trunk_values != trunk_keys or keys[0] < R or lengths != (R,):
        raise ValueError(
            f"decode_attention: q {q}, keys {keys}, values {values}, lengths {lengths}, trunk_keys {trunk_keys}, "
            f"trunk_values {trunk_values} given; values must be shaped as their keys, lengths (R,) as the rows of q, "
            "and keys must have R rows or more: type lengths_R[:len(q_RHC)]"
        )
    if M == 0 or begins != (T,) or prefix_lengths != (T,):
        raise ValueError(
            f"decode_attention: tiles of shapes {rows}, {begins}, {prefix_lengths} given; allowed are (T, M) with "
            "M >= 1, (T,), (T,); for rows without prefixes T = 0"
        )
    # 64 accumulators per thread of 8 warps. With twice as many C = 64 and C = 256 spill.
    if triton.next_power_of_2(M * (H // K)) * C > 16384:
        raise ValueError(
            f"decode_attention: tiles of M = {M} rows x {H // K} query heads x C = {C} given; the product, rounded up "
            f"to a power of two, may be 16384: type M = {max(1, 16384 // C // (H // K))}"
        )


def _check_storage(q_RHC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, tiles):
    buffers, tables = (keys_RKSC, values_RKSC, trunk_keys_KNC, trunk_values_KNC), (lengths_R, *tiles[:3])
    dtypes, table_dtypes = [x.dtype for x in (q_RHC, *buffers)], [x.dtype for x in tables]
    if len(set(dtypes)) > 1 or dtypes[0] not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"decode_attention: q, keys, values, trunk_keys, trunk_values of {dtypes} given; all must be of one dtype, "
            "bfloat16, float16 or float32: type q.to(keys.dtype)"
        )
    if set(table_dtypes) != {torch.int32}:
        raise ValueError(
            f"decode_attention: lengths, tiles.rows_TM, tiles.begins_T, tiles.lengths_T of {table_dtypes} given; all "
            "must be int32: type .to(torch.int32) where they are made"
        )
    # Copying here would run in every layer of every step, so the caller makes them dense once.
    if any(x.stride(-1) != 1 for x in buffers) or not all(x.is_contiguous() for x in tables):
        raise ValueError(
            f"decode_attention: keys, values, trunk_keys, trunk_values with strides {[x.stride() for x in buffers]}, "
            f"lengths and tiles with {[x.stride() for x in tables]} given; the last stride of the former must be 1, "
            "the latter contiguous: type .contiguous() where they are made"
        )
    # Under TRITON_INTERPRET=1 the kernels are no JITFunction, and the host reads tensors of any device.
    needs_cuda = isinstance(_partial_kernel, triton.JITFunction)
    devices = [str(x.device) for x in (q_RHC, *buffers, *tables)]
    if len(set(devices)) > 1 or (needs_cuda and q_RHC.device.type != "cuda"):
        raise ValueError(
            f"decode_attention: q, keys, values, trunk_keys, trunk_values, lengths and tiles on {devices} given; all "
            "must be on one CUDA device. On a CPU use partial_attention of sampler.py (or TRITON_INTERPRET=1)"
        )


def decode_attention(q_RHC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, tiles):
    """Attention of one new token per row over [its prefix in the trunk ; its own tokens], scaled by C ** -0.5.

    q_RHC: (R, H, C), bfloat16, float16 or float32, on CUDA. keys_RKSC, values_RKSC: at least R rows, row r owned
    by row r of q; H a multiple of K; C 16, 32, 64, 128 or 256. lengths_R: (R,) int32, own tokens stored, 0 to S.
    trunk_keys_KNC, trunk_values_KNC: all prefixes. tiles: PrefixTiles. Dtypes as q; any strides, the last 1.
    Returns out_RHC in q's dtype, softmax and sums in float32; a row without any key is zeros. No gradient.
    Lengths, begins and row numbers are not checked, since looking at them would wait for the GPU: outside their
    ranges they read other memory. Capturable in a CUDA graph; they may then change in place between replays.
    Raises ValueError for any other shape, dtype, stride, device or size of tile.
    Source: the decode step of sampler.py (`Branch.attend`) is the same merge in PyTorch.
    """
    arguments = (q_RHC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, tiles)
    _check_shapes(*arguments)
    _check_storage(*arguments)
    (R, H, C), K, (T, M) = q_RHC.shape, keys_RKSC.shape[1], tiles.rows_TM.shape
    tile_lanes, row_lanes = (max(16, triton.next_power_of_2(rows * H // K)) for rows in (M, 1))
    options, c = _launch_options(tile_lanes, C, q_RHC.dtype), math.log2(math.e) * C**-0.5
    prefix_splits, own_splits = (_num_splits((T + R) * K, x) for x in (tiles.max_prefix, keys_RKSC.shape[2]))
    P = prefix_splits + own_splits
    acc_RHPC = torch.empty((R, H, P, C), dtype=torch.float32, device=q_RHC.device)
    max_RHP, sum_RHP = torch.empty((2, R, H, P), dtype=torch.float32, device=q_RHC.device)
    out_RHC = torch.empty((R, H, C), dtype=q_RHC.dtype, device=q_RHC.device)
    if q_RHC.stride(2) != 1:
        q_RHC = q_RHC.contiguous()
    # Triton launches on the current device, not on the tensor's. A grid of 0 programs it skips by itself.
    with torch.cuda.device_of(q_RHC):
        _partial_kernel[(K * (T * prefix_splits + R * own_splits),)](
            q_RHC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, *tiles[:3], acc_RHPC, max_RHP,
            sum_RHP, *q_RHC.stride()[:2], *keys_RKSC.stride()[:3], *values_RKSC.stride()[:3],
            *trunk_keys_KNC.stride()[:2], *trunk_values_KNC.stride()[:2], T, prefix_splits, own_splits, c,
            H, K, C, M, tile_lanes, row_lanes, **options
        )
        _merge_kernel[(R, H)](
            acc_RHPC, max_RHP, sum_RHP, lengths_R, tiles.rows_TM, tiles.lengths_T, out_RHC, T * M, prefix_splits,
            own_splits, c, H, C, M, triton.next_power_of_2(max(1, T * M)), triton.next_power_of_2(P),
            options["BLOCK_N"], num_warps=4, enable_fp_fusion=True
        )
    return out_RHC
