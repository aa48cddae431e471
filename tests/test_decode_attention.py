"""Claims about kernels/decode_attention.py. Without a GPU they run under Triton's interpreter (tests/conftest.py).

The rule for numbers: no further from the float64 truth than float32 PyTorch, plus per dtype
    float32   1e-6 of the largest value: about 8 roundings, in sums of up to 500 weights with random signs;
    bfloat16, float16   one unit in the last place of sum p |v| + |out|: weights and output are rounded to the
        dtype once each (half a unit, but Triton's interpreter cuts bfloat16 down: a whole one); for float16 also
        2**-24 per key, the step below its normal numbers.

Dimensions: as in kernels/decode_attention.py; X keys of one row, prefix and own.
"""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from conftest import CountingKernel
# By its full name: the package may export a function of the same name.
module = importlib.import_module("kernels.decode_attention")
PrefixTiles, decode_attention = module.PrefixTiles, module.decode_attention
reference_decode_attention = module.reference_decode_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 0.0}
STEP = {torch.bfloat16: 0.0, torch.float16: 2**-24, torch.float32: 0.0}
TILE = 32  # keys per step for bfloat16 and float16; 16 for float32: the edges of 32 are edges of both
INF, NAN = math.inf, math.nan
# The interpreter computes with numpy, which announces every infinity and NaN that these tests ask for.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
              pytest.mark.usefixtures("interpreter_without_two_faults")]


def make_case(groups, lengths, H=2, K=1, C=64, S=None, M=4, dtype=torch.float32, seed=0, garbage=NAN, spare=1):
    """Arguments of decode_attention. groups: (prefix length, row numbers) each; lengths: own tokens per row.

    Everything that no row may see is `garbage`: trunk between the prefixes, own capacity past the lengths, spare
    rows of the buffers. One more tile, not in use (length 0), lists rows that other tiles serve.
    """
    generator = torch.Generator().manual_seed(seed)
    R, S, gap = len(lengths), S or max(1, *lengths), 3
    N = gap + sum(length + gap for length, _ in groups)
    q_RHC = torch.randn(R, H, C, generator=generator)
    own = [torch.randn(R + spare, K, S, C, generator=generator) for _ in range(2)]
    trunk = [torch.randn(K, N, C, generator=generator) for _ in range(2)]
    visible_N, tiles, begin = torch.zeros(N, dtype=torch.bool), [([0] + [-1] * (M - 1), 1, 0)], gap
    for length, rows in groups:
        visible_N[begin : begin + length] = True
        for i in range(0, len(rows), M):
            tiles.append((list(rows[i : i + M]) + [-1] * (M - len(rows[i : i + M])), begin, length))
        begin += length + gap
    visible_RS = torch.arange(S) < torch.tensor([*lengths, *[0] * spare])[:, None]
    for x_RKSC, x_KNC in zip(own, trunk):
        x_RKSC.transpose(1, 2)[~visible_RS] = garbage
        x_KNC[:, ~visible_N] = garbage
    tables = [torch.tensor(x, dtype=torch.int32).to(DEVICE) for x in (lengths, *zip(*tiles))]
    tiles = PrefixTiles(*tables[1:], max_prefix=max([0] + [length for length, _ in groups]))
    q_RHC, *own, trunk_keys_KNC, trunk_values_KNC = (x.to(DEVICE, dtype) for x in (q_RHC, *own, *trunk))
    return q_RHC, *own, tables[0], trunk_keys_KNC, trunk_values_KNC, tiles


def truth_in_float64(q_RHC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, tiles):
    """out_RHC, sum_X p |v| and sum_X |v|, row by row and head by head over a copied prefix."""
    (R, H, C), K = q_RHC.shape, keys_RKSC.shape[1]
    out_RHC, spread_RHC, total_RHC = torch.zeros(3, R, H, C, dtype=torch.float64, device=q_RHC.device)
    for r in range(R):
        begin = length = 0
        for t in range(len(tiles.begins_T)):
            if tiles.lengths_T[t] > 0 and r in tiles.rows_TM[t].tolist():
                begin, length = int(tiles.begins_T[t]), int(tiles.lengths_T[t])
        for h in range(H):
            k = h // (H // K)
            k_XC, v_XC = (
                torch.cat([trunk_KNC[k, begin : begin + length], own_RKSC[r, k, : int(lengths_R[r])]]).double()
                for trunk_KNC, own_RKSC in ((trunk_keys_KNC, keys_RKSC), (trunk_values_KNC, values_RKSC))
            )
            if len(k_XC):
                p_X = torch.softmax(k_XC @ q_RHC[r, h].double() / math.sqrt(C), dim=0)
                out_RHC[r, h], spread_RHC[r, h], total_RHC[r, h] = p_X @ v_XC, p_X @ v_XC.abs(), v_XC.abs().sum(0)
    return out_RHC, spread_RHC, total_RHC


def assert_right(*case):
    """The rule of the module docstring; returns the kernel's result."""
    q_RHC, dtype = case[0], case[0].dtype
    out_RHC = decode_attention(*case)
    assert out_RHC.shape == q_RHC.shape and out_RHC.dtype == dtype and out_RHC.isfinite().all()
    truth_RHC, spread_RHC, total_RHC = truth_in_float64(*case)
    eager_error = (reference_decode_attention(*case) - truth_RHC).abs().max()
    allowed_RHC = ULP[dtype] * (spread_RHC + truth_RHC.abs()) + STEP[dtype] * total_RHC + eager_error
    if dtype == torch.float32:
        allowed_RHC += 1e-6 * total_RHC.abs().max().clamp(1, 4)  # values are normal: the largest are about 4
        assert eager_error < 1e-5  # or the rule would prove nothing
    worst = ((out_RHC - truth_RHC).abs() / allowed_RHC.clamp(min=1e-30)).max()
    assert worst <= 1, f"error is {worst:.2f} times what is allowed"
    return out_RHC


RAGGED_GROUPS = [(TILE + 5, [4, 0, 6]), (0, [1]), (150, [2, 7]), (1, [3])]  # row 5 has no tile
RAGGED_LENGTHS = [0, 1, TILE - 1, TILE, TILE + 1, 150, 2 * TILE, 70]
SMALL_GROUPS, SMALL_LENGTHS = [(TILE + 5, [3, 0]), (0, [1])], [0, 1, TILE + 1, 3]  # row 2 has no tile


@pytest.mark.parametrize(
    "C, dtype",
    [(C, torch.float32) for C in (16, 32, 64, 128, 256)]
    + [(16, torch.bfloat16), (128, torch.bfloat16), (64, torch.float16), (256, torch.float16)],
)
def test_ragged_rows_are_no_further_from_float64_than_eager(C, dtype):
    """Own lengths 0, 1, around a tile's edge, several chunks; prefixes of 0, 1, 37, 150; a row without a tile."""
    assert_right(*make_case(RAGGED_GROUPS, RAGGED_LENGTHS, H=2, K=1, C=C, dtype=dtype))


@pytest.mark.parametrize(
    "H, K, dtype",
    [(H, K, torch.float32) for H, K in ((3, 3), (4, 2), (14, 2), (7, 1), (20, 1))] + [(14, 2, torch.bfloat16)],
)
def test_query_heads_find_their_key_head(H, K, dtype):
    """H/K = 1, 2, 7 and 20, which is more than 16 lanes, with one and several key heads."""
    assert_right(*make_case([(TILE + 1, [2, 0, 1])], [TILE + 1, 0, 5], H=H, K=K, C=32, M=2, dtype=dtype))


@pytest.mark.parametrize("M", [1, 3, 16])
def test_rows_per_tile_do_not_matter(M):
    """One group of 6 rows with 7 query heads each, in 6 tiles of 1 row, 2 of 3 or one of 16, most places empty."""
    assert_right(*make_case([(TILE + 1, [2, 4, 0, 3, 1, 5])], [9, 0, 1, 0, 33, 0], H=7, K=1, C=16, M=M))


def test_several_tiles_on_every_axis_in_two_launches(monkeypatch):
    """Groups, tiles of a group, heads, splits of both parts, steps of a split: all above 1, two launches in all."""
    kind = triton.JITFunction if DEVICE == "cuda" else triton.runtime.interpreter.InterpretedFunction
    assert isinstance(module._partial_kernel, kind) and isinstance(module._merge_kernel, kind)
    partial, merge = CountingKernel(module._partial_kernel), CountingKernel(module._merge_kernel)
    monkeypatch.setattr(module, "_partial_kernel", partial)
    monkeypatch.setattr(module, "_merge_kernel", merge)
    assert_right(*make_case([(150, [0, 4, 2]), (140, [1, 3])], [150, 33, 0, 100, 149], H=4, K=2, C=16, M=2))
    # 4 tiles (one of them not in use) x 2 key heads x 2 chunks, 5 rows x 2 x 2; chunks of 80 keys are 5 steps.
    assert partial.grids == [(4 * 2 * 2 + 5 * 2 * 2,)] and merge.grids == [(5, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_chunks_does_not_matter(monkeypatch, dtype):
    """One chunk per part or one per step: the same result within the rounding of one rescaling more or less."""
    case = make_case([(100, [1, 0]), (TILE + 1, [2])], [70, 0, TILE - 1], C=32, dtype=dtype)
    results = []
    for most in (1, 16):
        monkeypatch.setattr(module, "MAX_SPLITS", most)
        monkeypatch.setattr(module, "SHORTEST_CHUNK", 16)
        results.append(assert_right(*case))
    # bfloat16 weights are rounded relative to the maximum so far, which the chunks change.
    torch.testing.assert_close(*results, rtol=0, atol=1e-6 if dtype == torch.float32 else 2**-6)


def test_more_keys_than_max_prefix_says_are_still_attended_to():
    """max_prefix chooses the number of chunks and nothing else: 0 or 10000 give the same result."""
    case = make_case([(150, [1, 0])], [20, 3], C=16)
    for max_prefix in (0, 10000):
        assert_right(*case[:-1], case[-1]._replace(max_prefix=max_prefix))


def test_one_row_alone():
    """R = 1: with a prefix, without one, with a single own key, whose value is the result to the bit."""
    assert_right(*make_case([(70, [0])], [40], C=16))
    assert_right(*make_case([], [40], C=16))
    case = make_case([], [1], H=4, K=2, C=16)
    assert torch.equal(decode_attention(*case), case[2][:1, :, 0].repeat_interleave(2, dim=1))


def test_no_keys_give_zeros_and_no_rows_give_nothing():
    """No prefix and no own token: zeros, not NaN. R = 0 and T = 0, an idle sampler: an empty result."""
    case = make_case([(0, [0]), (50, [2])], [0, 0, 0], C=16)
    out_RHC = assert_right(*case)
    assert (out_RHC[:2] == 0).all() and (out_RHC[2] != 0).any()
    q_RHC, keys, values, lengths_R, *trunk, tiles = case
    no_tiles = PrefixTiles(tiles.rows_TM[:0], tiles.begins_T[:0], tiles.lengths_T[:0], 0)
    assert (decode_attention(q_RHC, keys, values, lengths_R, *trunk, no_tiles) == 0).all()
    assert decode_attention(q_RHC[:0], keys, values, lengths_R[:0], *trunk, no_tiles).shape == (0, 2, 16)


def peaked_case(dtype, score, positions, groups, lengths):
    """All scores 0 but at `positions`, (row or "trunk", index): there exactly `score`, all numbers exact."""
    case = make_case(groups, lengths, H=2, K=1, C=64, dtype=dtype)
    q_RHC, keys_RKSC, _, _, trunk_keys_KNC, *_ = case
    signs_C = torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0).to(q_RHC)
    q_RHC[:] = 8 * signs_C  # score = 8 * a * 64 / sqrt(64) = 64 a, and 64 a is exact in float32
    keys_RKSC[keys_RKSC.isfinite()] = 0
    trunk_keys_KNC[trunk_keys_KNC.isfinite()] = 0
    for where, index in positions:
        target_XC = trunk_keys_KNC[0] if where == "trunk" else keys_RKSC[where, 0]
        target_XC[index] = score / 64 * signs_C
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", [200, -200])
def test_peaked_scores_lose_no_precision(score, dtype):
    """Scores of +-200 among zeros: in the prefix, in both parts at once, early, late. Two equal peaks halve."""
    positions = [("trunk", 3), ("trunk", 3 + 140), (0, 140), (1, 0)]  # the prefix of rows 0, 1 begins at 3
    case = peaked_case(dtype, score, positions, [(150, [1, 0])], [150, 1, 60])
    out_RHC = assert_right(*case)
    if score > 0:
        v_4C = torch.stack([case[5][0, 3], case[5][0, 143], case[2][0, 0, 140], case[2][1, 0, 0]]).double()
        expected_RC = torch.stack([v_4C[:3].mean(0), v_4C[[0, 1, 3]].mean(0)])
        # Thirds of exact equals. A log-sum-exp of 200 would be rounded to 1.5e-5 in float32.
        tolerance = max(1e-6, ULP[dtype])
        torch.testing.assert_close(out_RHC[:2, 0].double(), expected_RC, rtol=tolerance, atol=tolerance)


def test_very_negative_scores_are_still_a_distribution():
    """Every score -1e4: the mean of the values, where a log-sum-exp of -1e4 would be rounded to 1e-3."""
    case = make_case([(150, [1, 0])], [150, 1], H=2, K=1, C=64)
    q_RHC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, _ = case
    q_RHC[:] = 25  # 25 * -50 * 64 / 8 = -1e4, exact in float32
    keys_RKSC[:], trunk_keys_KNC[:] = -50, -50
    out_RHC = assert_right(*case)
    for row, length in enumerate(lengths_R.tolist()):
        v_XC = torch.cat([trunk_values_KNC[0, 3:153], values_RKSC[row, 0, :length]])
        torch.testing.assert_close(out_RHC[row, 0], v_XC.double().mean(0).float(), rtol=0, atol=1e-6)


def test_what_lies_outside_the_lengths_is_never_read():
    """NaN, inf and 1e4 past the lengths, between prefixes and in spare rows leave every bit as zeros do."""
    results = [
        decode_attention(*make_case(SMALL_GROUPS, SMALL_LENGTHS, C=16, S=200, garbage=garbage))
        for garbage in (0.0, NAN, INF, 1e4)
    ]
    assert all(torch.equal(result, results[0]) for result in results)


def test_partial_results_that_nobody_wrote_are_never_read(monkeypatch):
    """Fresh memory of NaN changes nothing: chunks without keys, rows without tiles, empty places are skipped."""
    case = make_case(SMALL_GROUPS, SMALL_LENGTHS, C=16, S=200)
    expected = decode_attention(*case)
    made, empty = [], torch.empty

    def empty_is_nan(*args, **kwargs):
        made.append(empty(*args, **kwargs).fill_(NAN))
        return made[-1]

    monkeypatch.setattr(torch, "empty", empty_is_nan)
    assert torch.equal(decode_attention(*case), expected) and len(made) == 3
    assert made[0].isnan().any(), "every partial result was written: the case proves nothing"


def test_strided_views_are_read_in_place():
    """Buffers stored as (S, R, C, ...) slices, a trunk stored as (N, K, C), q with steps: equal to dense copies."""
    case = q_RHC, keys, values, lengths_R, trunk_keys, trunk_values, tiles = make_case(
        SMALL_GROUPS, SMALL_LENGTHS, H=4, K=2, C=16
    )
    expected = decode_attention(*case)
    both = torch.stack([keys, values]).permute(3, 1, 2, 0, 4).contiguous()  # (S, R, K, 2, C): K next to V
    view_keys, view_values = both.permute(3, 1, 2, 0, 4)
    wide_values = torch.cat([values, values * NAN], dim=3)[..., :16]
    view_trunk_keys = trunk_keys.transpose(0, 1).contiguous().transpose(0, 1)
    view_trunk_values = torch.cat([trunk_values * NAN, trunk_values], dim=2)[..., 16:]
    view_q = q_RHC.transpose(0, 1).contiguous().transpose(0, 1)
    assert view_q.stride() != q_RHC.stride() and view_keys.stride() == view_values.stride() != keys.stride()
    for arguments in [
        (view_q, view_keys, view_values, lengths_R, view_trunk_keys, view_trunk_values, tiles),
        (q_RHC.mT.contiguous().mT, keys, wide_values, lengths_R, trunk_keys, trunk_values, tiles),
    ]:
        assert torch.equal(decode_attention(*arguments), expected)


def test_order_of_rows_in_tiles_and_of_tiles_does_not_matter():
    """Places shuffled, holes in the middle, tiles reversed: each row gets its own result."""
    *case, tiles = make_case([(40, [0, 1, 2]), (70, [3, 4])], [3, 0, 5, 7, 1], C=16)
    expected = assert_right(*case, tiles)
    rows = torch.tensor([[-1, 4, -1, 3], [2, -1, 0, 1], [0, 3, 2, 1]], dtype=torch.int32, device=DEVICE)
    shuffled = PrefixTiles(rows, tiles.begins_T.flip(0), tiles.lengths_T.flip(0), tiles.max_prefix)
    # Lanes change places inside a matrix product: at most its order of sums changes.
    torch.testing.assert_close(assert_right(*case, shuffled), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("own", [0, 1, 60, 150])
def test_where_the_prefix_ends_does_not_matter(own):
    """150 keys, the last `own` of them stored with the row and the others in the trunk: always the same softmax."""
    q_RHC, keys, values, lengths_R, *trunk, tiles = make_case([], [150, 150], H=2, K=1, C=32, spare=0)
    k, v = keys[:1].expand(2, -1, -1, -1), values[:1].expand(2, -1, -1, -1)  # both rows have row 0's keys
    expected = decode_attention(q_RHC, k, v, lengths_R, *trunk, tiles)
    rows, begins, lengths = ([[1, 0]], [0], [150 - own])
    tiles = PrefixTiles(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (rows, begins, lengths)), 150)
    case = q_RHC, k[:, :, 150 - own :], v[:, :, 150 - own :], torch.full_like(lengths_R, own), k[0], v[0], tiles
    torch.testing.assert_close(assert_right(*case), expected, rtol=0, atol=1e-6)


def test_trunks_may_hold_more_than_two_to_the_31_elements():
    """Trunk offsets are 64-bit, those of heads and those of tokens."""
    *case, keys, values, tiles = make_case([(5, [0]), (40, [1])], [3, 0], K=2, C=16, dtype=torch.float16, garbage=0.0)
    expected = decode_attention(*case, keys, values, tiles)
    K, N, C = keys.shape
    far = tiles._replace(begins_T=tiles.begins_T + 2040 * (tiles.lengths_T == 40).int())
    for strides, tokens, places in [((2**31 + 16, C, 1), N, tiles), ((C, 2**20, 1), N + 2040, far)]:
        size = (K - 1) * strides[0] + (tokens - 1) * strides[1] + C
        views = [torch.empty(size, dtype=keys.dtype, device=DEVICE).as_strided((K, tokens, C), strides) for _ in "kv"]
        for view, x in zip(views, (keys, values)):  # 4 GiB each, all but a few pages untouched
            view[:, :N] = x
            view[:, tokens - N :] = x
        assert torch.equal(decode_attention(*case, *views, places), expected)


def test_the_example_of_the_docstring():
    """Rows 0, 1, 4 see 7 tokens from 20 on, rows 2, 3 see 5 from 0 on: so the truth reads it, so does the kernel."""
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 2, 16), (5, 1, 1, 16), (1, 30, 16)
    q, own, trunk = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    tables = [[0, 1, 4, -1], [2, 3, -1, -1]], [20, 0], [7, 5]
    tiles = PrefixTiles(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in tables), max_prefix=7)
    out_RHC = assert_right(q, own, own, torch.zeros(5, dtype=torch.int32, device=DEVICE), trunk, trunk, tiles)
    for row, prefix in [(4, slice(20, 27)), (3, slice(0, 5))]:
        expected = torch.softmax(q[row] @ trunk[0, prefix].T / 4, dim=-1) @ trunk[0, prefix]
        torch.testing.assert_close(out_RHC[row], expected, rtol=1e-6, atol=1e-6)


def change(case, **changes):
    names = ("q", "keys", "values", "lengths", "trunk_keys", "trunk_values", "tiles")
    return [changes.get(name, x) for name, x in zip(names, case)]


ERRORS = {
    r"q \(3, 4, 1, 16\).*type q\[:, :, 0\]": lambda q, k, v, n, tk, tv, t: {"q": q[:, :, None]},
    "head size C = 24": lambda q, k, v, n, tk, tv, t: {"q": torch.zeros(3, 4, 24, device=DEVICE)},
    "H a multiple of K": lambda q, k, v, n, tk, tv, t: {"q": q[:, :3]},
    r"trunk_keys \(2, 56, 8\)": lambda q, k, v, n, tk, tv, t: {"trunk_keys": tk[..., :8]},
    r"values \(4, 2, 3, 16\).*shaped as their keys": lambda q, k, v, n, tk, tv, t: {"values": v[:, :, :3]},
    r"keys must have R rows": lambda q, k, v, n, tk, tv, t: {"keys": k[:2], "values": v[:2]},
    r"lengths \(2,\)": lambda q, k, v, n, tk, tv, t: {"lengths": n[:2]},
    r"tiles of shapes \(2, 4\), \(1,\)": lambda q, k, v, n, tk, tv, t: {"tiles": t._replace(begins_T=t.begins_T[:1])},
    r"type M = 512": lambda q, k, v, n, tk, tv, t: {"tiles": t._replace(rows_TM=t.rows_TM.repeat(1, 200))},
    "torch.float64": lambda q, k, v, n, tk, tv, t: {"q": q.double()},
    "one dtype": lambda q, k, v, n, tk, tv, t: {"keys": k.half(), "values": v.half()},
    "must be int32": lambda q, k, v, n, tk, tv, t: {"lengths": n.long()},
    "the last stride": lambda q, k, v, n, tk, tv, t: {"keys": k.mT.contiguous().mT},
    "the latter contiguous": lambda q, k, v, n, tk, tv, t: {"tiles": t._replace(rows_TM=t.rows_TM.T.contiguous().T)},
    "'meta'": lambda q, k, v, n, tk, tv, t: {"trunk_values": tv.to("meta")},
}


@pytest.mark.parametrize("text", ERRORS)
def test_wrong_arguments_are_named(text):
    """A wrong shape, dtype, stride, device or tile raises ValueError and says what was given."""
    case = make_case([(50, [1, 0])], [5, 0, 2], H=4, K=2, C=16)
    with pytest.raises(ValueError, match=text):
        decode_attention(*change(case, **ERRORS[text](*case)))


COMPILE = """
import importlib
import re
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module = importlib.import_module("kernels.decode_attention")
tensors = {"q_ptr", "keys_ptr", "values_ptr", "trunk_keys_ptr", "trunk_values_ptr", "out_ptr"}
tables = {"lengths_ptr", "rows_ptr", "begins_ptr", "prefix_lengths_ptr"}
options = module._launch_options(64, 128, torch.bfloat16)
sizes = {"H": 12, "K": 2, "C": 128, "M": 8, "TILE_LANES": 64, "ROW_LANES": 16, "BLOCK_N": options.pop("BLOCK_N")}
sizes |= {"PLACES": 512, "SPLITS": 64}
for kernel in (module._partial_kernel, module._merge_kernel):
    names = kernel.arg_names
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names} | {"c": "fp32"}
    types |= dict.fromkeys(tensors, "*bf16") | dict.fromkeys(tables, "*i32") | dict.fromkeys(sizes, "constexpr")
    # What the launcher finds out by itself: aligned tensors and strides that are multiples of 16.
    aligned = [i for i, name in enumerate(names) if name.endswith("_ptr") or "stride" in name]
    source = ASTSource(kernel, {name: types[name] for name in names}, {k: v for k, v in sizes.items() if k in names},
                       {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0
    print("compiled", kernel.__name__, compiled.metadata.shared, "wgmma" in ptx, "mma.sync" in ptx,
          len(re.findall(r"cp.async.cg.shared.global .*0x10", ptx)) > 0)

try:
    x = torch.zeros(1, 1, 16)
    n = torch.zeros(1, dtype=torch.int32)
    module.decode_attention(x, x[None], x[None], n, x, x, module.PrefixTiles(n[None], n, n, 0))
except ValueError as error:
    print(error)
"""


def test_the_kernels_compile_for_a_hopper_gpu_without_one(tmp_path):
    """The real compiler accepts both kernels: tensor cores for both parts, 16-byte copies ahead, 64 KiB."""
    # A process of its own, because this one interprets the kernels; an empty cache, so that it compiles.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(
        [str(Path(module.__file__).parent.parent), *filter(None, [env.get("PYTHONPATH")])])}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    # wgmma takes 64 lanes, the prefix part; mma.sync 16, the own part. 64 KiB: 3 programs per multiprocessor.
    assert "compiled _partial_kernel 65536 True True True" in result.stdout
    assert "compiled _merge_kernel" in result.stdout
    assert "must be on one CUDA device. On a CPU use partial_attention of sampler.py" in result.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_follows_lengths_and_tiles(dtype):
    """Captured once, replayed while rows grow, end and move to other tiles: each time as if called anew."""
    R = 40
    groups = [(600, list(range(0, 30))), (90, list(range(30, 40)))]
    case = make_case(groups, [700] * R, H=14, K=2, C=64, M=8, dtype=dtype)
    lengths_R, tiles = case[3], case[6]
    rows_TM, begins_T, prefix_lengths_T = (x.clone() for x in tiles[:3])
    decode_attention(*case)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_RHC = decode_attention(*case)
    for seed, (own, prefix) in enumerate([(0, 0), (1, 90), (700, 600), (257, 33), (64, 600)]):
        generator = torch.Generator().manual_seed(seed)
        lengths_R.copy_(torch.randint(0, own + 1, (R,), generator=generator))
        tiles.lengths_T.copy_(prefix_lengths_T.clamp(max=prefix))
        tiles.rows_TM.copy_(torch.where(torch.rand(rows_TM.shape, generator=generator).cuda() < 0.2, -1, rows_TM))
        tiles.rows_TM.copy_(tiles.rows_TM[:, torch.randperm(8, generator=generator)])
        case[0].copy_(torch.randn(case[0].shape, generator=generator))
        graph.replay()
        assert torch.equal(out_RHC, assert_right(*case))
    assert torch.equal(tiles.begins_T, begins_T)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "H, K, C, M",
    [(14, 2, 64, 8), (14, 2, 64, 16), (12, 2, 128, 8), (12, 2, 128, 16), (28, 4, 128, 8), (16, 8, 128, 16),
     (8, 2, 256, 16)],
)
def test_sizes_of_real_models_on_a_gpu(H, K, C, M):
    """Qwen2.5 0.5B, 1.5B, 7B, Qwen3 and a head size of 256, in bfloat16, with hundreds of programs at once."""
    generator = torch.Generator().manual_seed(0)
    groups = [(600, list(range(0, 20))), (77, list(range(20, 36)))]
    lengths = torch.randint(0, 900, (40,), generator=generator).tolist()
    assert_right(*make_case(groups, lengths, H=H, K=K, C=C, M=M, dtype=torch.bfloat16))
