"""Attention of one decode step for rows that share prefixes: each prefix is read once per tile of rows.

    row r attends to [ trunk[:, begin : begin + length]  ;  its own tokens 0 .. lengths_R[r] - 1 ]
                       shared by the rows of its tiles      the last of them is stored by this step

Keys are cut into chunks. With scores x_j = q . k_j, c = log2(e) / sqrt(C), m = max_j x_j a chunk leaves m,

    s = sum_j 2^(c (x_j - m))    and    a = sum_j 2^(c (x_j - m)) v_j

and a second launch merges all chunks i of a query, with the largest maximum M = max_i m_i, to

    out = sum_i w_i a_i / sum_i w_i s_i          w_i = 2^(c (m_i - M))

(Hydragen, arXiv 2402.05099; flash-decoding). Lengths are read from the device, grids depend on shapes only: a
captured CUDA graph stays valid while rows grow, end and move. K/V bytes per step for R = 256 rows of 512
prefix and 512 own tokens, M = 8, K = 2, C = 128, bf16: 151 MB, and 6 MB of chunks; with copied prefixes 268.

Dimensions: R rows, H query heads, K key/value heads, C head size, S capacity for own tokens, N tokens of the
    trunk, T tiles, M rows of a tile, L lanes (queries of one program: rows x H/K heads, padded), P splits.
"""

import math
import typing

import torch
import triton
import triton.language as tl

PROGRAMS = 4 * 132  # 132 multiprocessors of an H100 or H200, about 4 programs on each
SHORTEST_CHUNK, LONGEST_CHUNK = 128, 1024  # keys: below, merging costs more; above, one program is the tail
MAX_SPLITS = 32  # of each part: the merge holds 64 partial outputs in registers


class PrefixTiles(typing.NamedTuple):
    """Which rows share which slice of the trunk: int32 tensors on the device of the trunk, updated in place.

    Five rows in tiles of M = 4, rows 0, 1, 4 behind 7 tokens that start at 20 and rows 2, 3 behind 5 at 0:
    rows_TM = [[0, 1, 4, -1], [2, 3, -1, -1]], begins_T = [20, 0], lengths_T = [7, 5], max_prefix = 7.
    """
    rows_TM: torch.Tensor  # row numbers, -1 for an empty place; a row is in at most one tile that is in use
    begins_T: torch.Tensor
    lengths_T: torch.Tensor  # tile t serves trunk[:, begin : begin + length]; length 0: the tile is unused
    max_prefix: int  # about the longest length; it only decides into how many chunks prefixes are cut


@triton.jit
def _attend_chunk(q_ptrs, k_ptr, v_ptr, stride, partial_L, live_L, length, split, splits, acc_ptr, max_ptr,
                  sum_ptr, c, C: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
                  BLOCK_N: tl.constexpr):
    # k_ptr, v_ptr: first key and value of the prefix or own tokens; partial_L: where lane l's result goes.
    chunk = tl.cdiv(length, splits * BLOCK_N) * BLOCK_N  # keys per split: whole steps, the last may be ragged
    start = split * chunk
    end = tl.minimum(start + chunk, length)
    # None for a tile whose rows have all ended. Counted: in a `while` loop no copies run ahead (cp.async).
    steps = tl.max(tl.where(live_L, tl.cdiv(end - start, BLOCK_N), 0), axis=0)
    if steps > 0:
        channels = tl.arange(0, BLOCK_C)  # those past C are 0 in q, k and v: they add nothing
        is_channel = (channels < C)[None, :]
        is_live = live_L[:, None] & is_channel
        q = tl.load(q_ptrs[:, None] + channels[None, :], mask=is_live, other=0.0)
        m = tl.full([LANES], -float("inf"), tl.float32)
        s = tl.full([LANES], 0.0, tl.float32)
        acc = tl.full([LANES, BLOCK_C], 0.0, tl.float32)
        keys = start + tl.arange(0, BLOCK_N)
        offsets = tl.arange(0, BLOCK_N)[:, None] * stride + channels[None, :]
        k_ptr += start.to(tl.int64) * stride
        v_ptr += start.to(tl.int64) * stride
        for _ in range(0, steps):
            # Unused capacity may hold NaN, and 0 * NaN is NaN: what lies past the end is not read, but 0.
            is_key = (keys < end)[:, None] & is_channel
            k = tl.load(k_ptr + offsets, mask=is_key, other=0.0)
            x = tl.dot(q, tl.trans(k), input_precision="ieee")
            x = tl.where((keys < end)[None, :], x, -float("inf"))
            m_new = tl.maximum(m, tl.max(x, axis=1))  # finite: every step has a key
            p = tl.exp2((x - m_new[:, None]) * c)  # subtract, then scale: exact near the peak
            rescale = tl.exp2((m - m_new) * c)
            s = s * rescale + tl.sum(p, axis=1)
            v = tl.load(v_ptr + offsets, mask=is_key, other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
            m = m_new
            keys += BLOCK_N
            k_ptr += BLOCK_N * stride
            v_ptr += BLOCK_N * stride
        tl.store(max_ptr + partial_L, m, mask=live_L)
        tl.store(sum_ptr + partial_L, s, mask=live_L)
        tl.store(acc_ptr + partial_L[:, None] * C + channels[None, :], acc, mask=is_live)


# One compiled kernel per model: a number that is 1 or a multiple of 16 would otherwise get one of its own.
# Distances of tokens are constants: the compiler then sees how many channels it may load at once.
@triton.jit(do_not_specialize=["T", "prefix_splits", "own_splits"])
def _partial_kernel(q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, lengths_ptr, trunk_keys_ptr, trunk_values_ptr,
                    rows_ptr, begins_ptr, prefix_lengths_ptr, acc_ptr, max_ptr, sum_ptr, q_stride, k_stride,
                    v_stride, own_stride_r, own_stride_k, own_stride_s: tl.constexpr, trunk_stride_k,
                    trunk_stride_n: tl.constexpr, T, prefix_splits, own_splits, c, H: tl.constexpr,
                    K: tl.constexpr, C: tl.constexpr, M: tl.constexpr, BLOCK_C: tl.constexpr,
                    TILE_LANES: tl.constexpr, ROW_LANES: tl.constexpr, BLOCK_N: tl.constexpr):
    G: tl.constexpr = H // K
    P = prefix_splits + own_splits
    pid = tl.program_id(0)
    num_prefix = T * K * prefix_splits
    if pid < num_prefix:  # both parts fill the same multiprocessors; the longest programs come first
        split = pid % prefix_splits
        head = (pid // prefix_splits % K).to(tl.int64)  # 2**31 is passed at 8.4 million tokens of K C = 256
        tile = pid // (K * prefix_splits)
        lane_L = tl.arange(0, TILE_LANES)
        row_L = tl.load(rows_ptr + tile * M + lane_L // G, mask=lane_L < M * G, other=-1).to(tl.int64)
        is_live_L = tl.load(lengths_ptr + row_L, mask=row_L >= 0, other=0) > 0
        query_L = head * G + lane_L % G
        at = head * trunk_stride_k + tl.load(begins_ptr + tile).to(tl.int64) * trunk_stride_n
        _attend_chunk(q_ptr + row_L * q_stride + query_L * C, trunk_keys_ptr + at, trunk_values_ptr + at,
                      trunk_stride_n, (row_L * H + query_L) * P + split, is_live_L,
                      tl.load(prefix_lengths_ptr + tile), split, prefix_splits, acc_ptr, max_ptr, sum_ptr, c,
                      C, BLOCK_C, TILE_LANES, BLOCK_N)
    else:
        nth = pid - num_prefix
        own_split = nth % own_splits
        own_head = (nth // own_splits % K).to(tl.int64)
        row = (nth // (K * own_splits)).to(tl.int64)
        lane_G = tl.arange(0, ROW_LANES)  # H/K queries, padded to the 16 rows of a tensor-core instruction
        query_G = own_head * G + lane_G
        own_at = row * own_stride_r + own_head * own_stride_k
        length = tl.load(lengths_ptr + row)
        # As in flash_attn_with_kvcache the step's key and value are stored here, a launch less: by the one
        # program that reads position length - 1. Any thread of it may read them: hence the barrier.
        chunk = tl.cdiv(length, own_splits * BLOCK_N) * BLOCK_N
        channels = tl.arange(0, BLOCK_C)
        is_last = (own_split * chunk < length) & (length <= (own_split + 1) * chunk)
        is_new = channels < tl.where(is_last, C, 0)
        new_at = own_at + (length - 1).to(tl.int64) * own_stride_s + channels
        k = tl.load(k_ptr + row * k_stride + own_head * C + channels, mask=is_new)
        v = tl.load(v_ptr + row * v_stride + own_head * C + channels, mask=is_new)
        tl.store(keys_ptr + new_at, k, mask=is_new)
        tl.store(values_ptr + new_at, v, mask=is_new)
        tl.debug_barrier()
        _attend_chunk(q_ptr + row * q_stride + query_G * C, keys_ptr + own_at, values_ptr + own_at,
                      own_stride_s, (row * H + query_G) * P + prefix_splits + own_split, lane_G < G, length,
                      own_split, own_splits, acc_ptr, max_ptr, sum_ptr, c, C, BLOCK_C, ROW_LANES, BLOCK_N)


@triton.jit(do_not_specialize=["num_places", "prefix_splits", "own_splits"])
def _merge_kernel(acc_ptr, max_ptr, sum_ptr, lengths_ptr, rows_ptr, prefix_lengths_ptr, out_ptr, num_places,
                  prefix_splits, own_splits, c, H: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
                  BLOCK_C: tl.constexpr, PLACES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    head = tl.program_id(1)
    # The row looks for its tile (T * M numbers, from the cache) instead of being told: a table less to keep.
    place = tl.arange(0, PLACES)
    is_here = tl.load(rows_ptr + place, mask=place < num_places, other=-1) == row
    prefix_length = tl.sum(tl.load(prefix_lengths_ptr + place // M, mask=is_here, other=0), axis=0)
    own_length = tl.load(lengths_ptr + row)
    split = tl.arange(0, SPLITS)
    is_prefix = split < prefix_splits
    length = tl.where(is_prefix & (own_length > 0), prefix_length, own_length)
    splits = tl.where(is_prefix, prefix_splits, own_splits)
    nth = tl.where(is_prefix, split, split - prefix_splits)
    # Chunks without keys, known by the lengths as in _attend_chunk, were not written: memory may hold NaN.
    chunk = tl.cdiv(length, splits * BLOCK_N) * BLOCK_N
    written = (nth < splits) & (nth * chunk < length)
    partial = (row.to(tl.int64) * H + head) * (prefix_splits + own_splits) + split
    channels = tl.arange(0, BLOCK_C)
    is_acc = written[:, None] & (channels < C)[None, :]
    m = tl.load(max_ptr + partial, mask=written, other=-float("inf"))
    s = tl.load(sum_ptr + partial, mask=written, other=0.0)
    acc = tl.load(acc_ptr + partial[:, None] * C + channels[None, :], mask=is_acc, other=0.0)
    peak = tl.max(m, axis=0)
    w = tl.exp2((m - tl.where(peak == -float("inf"), 0.0, peak)) * c)  # no keys: all weights 0, not NaN
    total = tl.sum(w * s, axis=0)
    out = tl.sum(w[:, None] * acc, axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + (row.to(tl.int64) * H + head) * C + channels, out, mask=channels < C)


def _num_splits(programs, keys):
    wanted = max(triton.cdiv(PROGRAMS, max(1, programs)), triton.cdiv(keys, LONGEST_CHUNK))
    return max(1, min(wanted, triton.cdiv(keys, SHORTEST_CHUNK), MAX_SPLITS))


def _launch_options(lanes, BLOCK_C, dtype):
    is_wide = dtype == torch.float32  # no tensor cores here: smaller tiles keep it inside the registers
    num_warps = 8 if lanes * BLOCK_C > (2048 if is_wide else 8192) else 4
    return {"BLOCK_N": 16 if is_wide else 32, "num_warps": num_warps, "num_stages": 2 if is_wide else 3}


def decode_attention(q_RHC, new, own, lengths_R, trunk, tiles):
    """Attention of one new token per row over [its prefix in the trunk ; its own tokens] -> out_RHC.

    Pairs of keys and values: new (R, K, C), of this token, are stored as the last of each row's own first.
    own (R, K, S, C), of R rows or more: the first lengths_R (int32) count, the new token included. A row of
    length 0 is idle: it stores and reads nothing, and gives zeros. trunk (K, N, C). Scaled by C**-0.5;
    softmax and sums are float32. No gradient. bfloat16, float16 or float32, on CUDA, C even, at most 256;
    rows of q and new may be far apart, of own and trunk the last stride has to be 1. ValueError for others.
    Numbers in lengths and tiles are not checked: that would wait for the GPU.
    """
    BLOCK_C = max(16, triton.next_power_of_2(q_RHC.shape[-1]))  # what tensor cores take
    _check(BLOCK_C, q_RHC, *new, *own, *trunk, lengths_R, *tiles[:3])
    R, H, C = q_RHC.shape
    K, S = own[0].shape[1:3]
    T, M = tiles.rows_TM.shape
    tile_lanes = max(16, triton.next_power_of_2(M * H // K))
    options = _launch_options(tile_lanes, BLOCK_C, q_RHC.dtype)
    # How many programs have work is a guess: a table has room for a tile per row, rows that share fill T / M.
    busy = (T // M + R) * K
    prefix_splits = _num_splits(busy, tiles.max_prefix)
    own_splits = _num_splits(busy, S)
    P = prefix_splits + own_splits
    c = math.log2(math.e) * C**-0.5
    acc_RHPC = torch.empty((R, H, P, C), dtype=torch.float32, device=q_RHC.device)
    max_RHP, sum_RHP = torch.empty((2, R, H, P), dtype=torch.float32, device=q_RHC.device)
    out_RHC = torch.empty((R, H, C), dtype=q_RHC.dtype, device=q_RHC.device)
    with torch.cuda.device_of(q_RHC):  # Triton launches on the current device, not on the tensors'
        _partial_kernel[(K * (T * prefix_splits + R * own_splits),)](
            q_RHC, *new, *own, lengths_R, *trunk, *tiles[:3], acc_RHPC, max_RHP, sum_RHP, q_RHC.stride(0),
            new[0].stride(0), new[1].stride(0), *own[0].stride()[:3], *trunk[0].stride()[:2], T,
            prefix_splits, own_splits, c, H, K, C, M, BLOCK_C, tile_lanes,
            max(16, triton.next_power_of_2(H // K)), **options, enable_fp_fusion=True)
        _merge_kernel[(R, H)](
            acc_RHPC, max_RHP, sum_RHP, lengths_R, tiles.rows_TM, tiles.lengths_T, out_RHC, T * M,
            prefix_splits, own_splits, c, H, C, M, BLOCK_C, triton.next_power_of_2(max(1, T * M)),
            triton.next_power_of_2(P), options["BLOCK_N"], num_warps=max(4, BLOCK_C // 32),
            enable_fp_fusion=True)
    return out_RHC


def _check(BLOCK_C, *tensors):
    shapes = [tuple(x.shape) for x in tensors]
    dtypes = [x.dtype for x in tensors]
    strides = [x.stride() for x in tensors[3:7]]
    one_row = [x[:1] for x in tensors[:3]]  # its heads are dense, wherever the next row is
    R, H, C = shapes[0][-3:]
    K, N = shapes[5][:2]
    T, M = shapes[8]
    own = (max(R, shapes[3][0]), K, *shapes[3][2:3], C)
    expected = [(R, H, C), *[(R, K, C)] * 2, own, own, *[(K, N, C)] * 2, (R,), (T, M), (T,), (T,)]
    if shapes != expected or H % K:
        raise ValueError(f"decode_attention: {shapes} given, not {expected}, H a multiple of K: type "
                         "q[:, :, 0], lengths[:R]")
    most = 16384 // (BLOCK_C * H // K)  # rows; 64 accumulators per thread of 8 warps: twice as many spill
    if C % 2 or C > 256 or M > most:
        raise ValueError(f"decode_attention: C = {C}, M = {M}, H/K = {H // K} given, not C even, <= 256, and "
                         f"M <= {most}: type M = {most}, or use the one of sampler.py")
    is_here = tensors[0].is_cuda or not isinstance(_partial_kernel, triton.JITFunction)  # or interpreted
    if not is_here or dtypes[0].itemsize > 4 or dtypes != dtypes[:1] * 7 + [torch.int32] * 4:
        raise ValueError(f"decode_attention: {dtypes} on {tensors[0].device} given: type q.to(keys), "
                         "lengths.to(torch.int32), .cuda(), or use decode_attention of sampler.py")
    # Copying here would run in every layer of every step, so the caller makes them dense once.
    is_dense = all(x.is_contiguous() for x in (*one_row, *tensors[7:])) and {x[-1] for x in strides} == {1}
    if not is_dense or strides[::2] != strides[1::2]:
        raise ValueError(f"decode_attention: keys and values of strides {strides} given, not alike, 1 last, "
                         "or gaps in q, k, v, lengths, tiles: type .contiguous() where they are made")
