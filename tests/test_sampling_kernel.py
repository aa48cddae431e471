"""Claims about kernels/sampling.py. Without a GPU they run under Triton's interpreter (tests/conftest.py).

The noise is integer arithmetic and must equal an oracle in Python integers to the bit. Tokens must equal those of
the plain reference, except where two scores tie in float32: see `assert_same_draws`. Log-prob and entropy: no
further from float64 than eager torch, plus 1e-6 of the number (of 1 if it is smaller), 8 float32 roundings.

Dimensions: R rows, V vocabulary, W columns of a wider buffer.
"""

import inspect
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from conftest import CountingKernel
import kernels
import sampler
from kernels import sampling as module
from kernels.sampling import _exponential, _uniform, reference_sample, reference_uniform, sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-6
INF = math.inf
M32, M64 = 2**32 - 1, 2**64 - 1
# The interpreter computes with numpy, which announces every infinity and NaN that these tests ask for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def random_case(R, V, temperature=1.0, dtype=torch.float32, seed=0, scale=3.0):
    """The four arguments of `sample`."""
    generator = torch.Generator().manual_seed(seed)
    logits_RV = (torch.randn(R, V, generator=generator) * scale).to(dtype)
    keys_R = torch.randint(-2**63, 2**63 - 1, (R,), generator=generator)
    positions_R = torch.randint(0, 40_000, (R,), generator=generator)
    return logits_RV.to(DEVICE), temperature, keys_R.to(DEVICE), positions_R.to(DEVICE)


# ---------------------------------------------------------------- the oracle: Python integers


def splitmix64(x):
    x = (x + 0x9E3779B97F4A7C15) & M64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & M64
    return x ^ (x >> 31)


def row_keys(seed, rows):
    """The signed 64-bit noise keys of a sampler with this seed: splitmix64(splitmix64(seed) ^ row id)."""
    keys = [splitmix64(splitmix64(seed) ^ row) for row in rows]
    return torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys], device=DEVICE)


def mixed_key(key, position):
    x = (key + position * 0x9E3779B97F4A7C15) & M64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & M64
    return (x ^ (x >> 27)) * 0x94D049BB133111EB & M64


def oracle_bits(key, position, column):
    """The 31 random bits of a token, in Python integers that cannot wrap by accident."""
    mixed = mixed_key(key, position)
    x = (column + mixed) & M32
    x = (x ^ (x >> 16)) * 0x7FEB352D & M32
    x ^= mixed >> 32
    x = (x ^ (x >> 15)) * 0x846CA68B & M32
    return (x ^ (x >> 16)) & 0x7FFFFFFF


def column_of_bits(key, position, bits):
    """Which token index gets these 31 bits (top bit 0): every step of the hash, undone."""
    mixed = mixed_key(key, position)
    x = (bits ^ (bits >> 16)) * pow(0x846CA68B, -1, 2**32) & M32
    x = (x ^ (x >> 15) ^ (x >> 30)) ^ (mixed >> 32)
    x = x * pow(0x7FEB352D, -1, 2**32) & M32
    return ((x ^ (x >> 16)) - mixed) & M32


def oracle_uniform(bits):
    """float32, as every operation of the twin rounds: convert, add a half, scale; 1 becomes the float below it."""
    return min((np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-31), np.float32(1 - 2.0**-24))


@triton.jit
def _noise_kernel(u_ptr, keys_ptr, positions_ptr, first_column, V: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, V)
    u = _uniform(tl.load(keys_ptr + row), tl.load(positions_ptr + row), first_column + lanes)
    tl.store(u_ptr + row * V + lanes, u)


@triton.jit
def _exponential_kernel(u_ptr, out_ptr, N: tl.constexpr):
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + lanes, _exponential(tl.load(u_ptr + lanes)))


def kernel_noise(keys_R, positions_R, first_column, V):
    u_RV = torch.empty(len(keys_R), V, device=DEVICE)
    _noise_kernel[(len(keys_R),)](u_RV, keys_R, positions_R, first_column, V)
    return u_RV


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("first_column", [0, 151_936 - 256])
def test_noise_equals_python_integers_to_the_bit(first_column):
    """Extreme and random keys and positions, int64 and int32: the kernel's and the reference's u are the oracle's."""
    keys = [0, 1, -1, 2**63 - 1, -2**63, *random_case(5, 1, seed=3)[2].tolist()]
    positions = [0, 1, 32_767, 131_072, 2**31 - 1, 5, 0, 77, 4096, -1]
    columns = range(first_column, first_column + 256)
    expected = np.array([[oracle_uniform(oracle_bits(k, p, c)) for c in columns] for k, p in zip(keys, positions)])
    keys_R, positions_R = torch.tensor(keys, device=DEVICE), torch.tensor(positions, device=DEVICE)
    for integers_R in (positions_R, positions_R.int()):
        u_RV = kernel_noise(keys_R, integers_R, first_column, 256)
        assert u_RV.cpu().numpy().tobytes() == expected.tobytes()
        u_RV = reference_uniform(keys_R, integers_R, first_column + 256)[:, first_column:]
        assert u_RV.cpu().numpy().tobytes() == expected.tobytes()


def test_noise_is_never_0_and_never_1():
    """All 31 bits 0 give 2**-32; the 64 values that round to 1 give 1 - 2**-24, of which E is 16.6, not infinite."""
    for bits, u in [(0, 2.0**-32), (1, 1.5 * 2.0**-31), (2**31 - 1, 1 - 2.0**-24), (2**31 - 64, 1 - 2.0**-24)]:
        column = column_of_bits(12345, 6, bits)
        assert oracle_bits(12345, 6, column) == bits
        signed = column - 2**32 if column >= 2**31 else column
        keys_R = torch.tensor([12345], device=DEVICE)
        assert kernel_noise(keys_R, torch.tensor([6], device=DEVICE), signed, 1).item() == u


def test_exponential_is_accurate_to_a_few_units_in_the_last_place():
    """-log(1 - u) within 4 units of 2**-23 over the whole range, where log(1 - u) alone is off by all of it at 1e-8.

    Two units come from the formula and a correctly rounded log; numpy's log, which the interpreter uses, may be off
    by almost 4 of its own in the last place, a GPU's by 1.
    """
    generator = torch.Generator().manual_seed(0)
    small = torch.exp2(-32 * torch.rand(4096, generator=generator))
    powers = torch.exp2(-torch.arange(1, 33).float())
    near = torch.cat([powers, powers * (1 - 2.0**-24), powers * (1 + 2.0**-23), 1 - powers[:24]])
    u = torch.cat([small, torch.rand(4096, generator=generator), near]).clamp(2.0**-32, 1 - 2.0**-24)
    u = torch.nn.functional.pad(u, (0, -len(u) % 512), value=0.5).to(DEVICE)
    out = torch.empty_like(u)
    _exponential_kernel[(len(u) // 512,)](u, out, 512)
    truth = -torch.log1p(-u.double())
    assert ((out - truth).abs() / truth).max() < 4 * 2.0**-23


# ---------------------------------------------------------------- tokens, log-probs, entropies


def float64_sample(logits_RV, temperature, keys_R, positions_R, tokens_R):
    """log(p / E) of all tokens in nats, log-prob of tokens_R and entropy, in float64 but for the noise itself."""
    all_logprobs_RV = torch.log_softmax(logits_RV.double() / (temperature or 1.0), dim=-1)
    u_RV = reference_uniform(keys_R, positions_R, logits_RV.shape[1]).double()
    scores_RV = logits_RV.double() if temperature == 0 else all_logprobs_RV - torch.log(-torch.log1p(-u_RV))
    entropies_R = torch.special.entr(all_logprobs_RV.exp()).sum(dim=-1)
    return scores_RV, all_logprobs_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1), entropies_R


def assert_same_draws(logits_RV, temperature, keys_R, positions_R):
    """Tokens as the reference draws them, or tied with them: in float64 within 1e-5 nats of the best score.

    Scores carry about ten float32 roundings of numbers up to 30: 1e-5. The gap between the two best scores has
    density at most 1 at 0, so the exception serves one draw in 100,000. Greedy has no rounding and no exception.
    """
    case = logits_RV, temperature, keys_R, positions_R
    tokens_R, logprobs_R, entropies_R = kernel = sample(*case)
    assert [x.dtype for x in kernel] == [torch.int64, torch.float32, torch.float32]
    expected_R, *eager = reference_sample(*case)
    scores_RV, *truth = float64_sample(*case, tokens_R)
    gaps_R = scores_RV.amax(1) - scores_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    is_other_R = tokens_R != expected_R
    assert (gaps_R[is_other_R] < (0 if temperature == 0 else 1e-5)).all(), (tokens_R, expected_R, gaps_R)
    for name, truth_R, eager_R, kernel_R in zip(("logprob", "entropy"), truth, eager, (logprobs_R, entropies_R)):
        eager_error = (eager_R - truth_R)[~is_other_R].abs().max()  # of another token's log-prob it would be no error
        allowed_R = eager_error + TOLERANCE * truth_R.abs().clamp(min=1.0)
        assert ((kernel_R - truth_R).abs() <= allowed_R).all(), f"{name}: {kernel_R}, expected {truth_R}"


@pytest.mark.parametrize("temperature", [0, 0.7, 1, 2.0])
@pytest.mark.parametrize("V, R", [(1, 2), (7, 24), (64, 16), (1000, 16), (4096, 4), (4097, 4), (50_257, 2),
                                  (151_936, 2)])
def test_kernel_draws_the_tokens_of_the_reference(V, R, temperature):
    """Same token, log-prob and entropy right: one column, one tile, exact tiles, a ragged last one, 38 tiles."""
    assert_same_draws(*random_case(R, V, temperature))


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_as_they_are(dtype, temperature):
    """bfloat16 and float16 logits give the draws of the same numbers in float32, to the bit."""
    logits_RV, *rest = random_case(3, 5000, temperature, dtype)
    assert_same_draws(logits_RV, *rest)
    for a, b in zip(sample(logits_RV, *rest), sample(logits_RV.float(), *rest)):
        assert torch.equal(a, b)


def test_a_token_of_almost_all_the_mass_is_always_drawn():
    """Probability 1 - 1e-12, in the first, second and last tile: drawn, log-prob 0, entropy below 1e-9."""
    logits_RV, *rest = random_case(6, 9001, scale=0.1)
    peaks_R = torch.tensor([0, 5000, 9000], device=DEVICE).repeat(2)
    # exp(-36.7) * 9000 tokens = 1e-12: 6 right draws have probability 1 - 6e-12
    logits_RV.scatter_(1, peaks_R.unsqueeze(1), 36.7)
    tokens_R, logprobs_R, entropies_R = sample(logits_RV, *rest)
    assert torch.equal(tokens_R, peaks_R) and logprobs_R.abs().max() == 0 and entropies_R.abs().max() < 1e-9
    assert_same_draws(logits_RV, *rest)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_rows_of_minus_1e30_are_uniform_distributions(temperature):
    """The offset of a row costs nothing: the draws are those of a row of zeros, log-prob -log V, entropy log V."""
    V = 5000
    _, *rest = random_case(4, V, temperature)
    outputs = sample(torch.full((4, V), -1e30, device=DEVICE), *rest)
    for a, b in zip(outputs, sample(torch.zeros(4, V, device=DEVICE), *rest)):
        assert torch.equal(a, b)
    torch.testing.assert_close(outputs[2], torch.full((4,), math.log(V), device=DEVICE), rtol=1e-6, atol=0)
    torch.testing.assert_close(outputs[1], -outputs[2], rtol=1e-6, atol=0)
    assert len(set(outputs[0].tolist())) == (1 if temperature == 0 else 4)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_masked_tokens_are_never_drawn(temperature):
    """-inf logits, scattered, filling tiles, leaving one token: not drawn, nothing added to log-prob or entropy."""
    logits_RV, *rest = random_case(6, 9001, temperature)
    logits_RV[0, ::2] = -INF
    logits_RV[1, :8192] = -INF  # the first two tiles have nothing
    logits_RV[2, 4096:] = -INF  # all but the first tile have nothing
    logits_RV[3] = -INF
    logits_RV[3, 5000] = -40.0  # one token is left: certain
    logits_RV[4, :4096] = -INF  # nothing, something, nothing
    logits_RV[4, 8192:] = -INF
    logits_RV[5, 2:] = -INF
    tokens_R, logprobs_R, entropies_R = sample(logits_RV, *rest)
    assert logits_RV.gather(1, tokens_R.unsqueeze(1)).isfinite().all()
    assert (tokens_R[3], logprobs_R[3], entropies_R[3]) == (5000, 0, 0)
    assert_same_draws(logits_RV, *rest)


def test_the_only_allowed_token_is_drawn_even_where_its_noise_rounds_to_1():
    """Without the clamp of u its score would be 1 / infinity = 0, no better than that of the masked token 0."""
    found = ((key, column_of_bits(key, 0, 2**31 - 1 - low)) for key in itertools.count() for low in range(64))
    key, column = next((key, column) for key, column in found if 0 < column < 151_936)
    logits_RV = torch.full((1, 151_936), -INF, device=DEVICE)
    logits_RV[0, column] = 1.0
    case = logits_RV, 1.0, torch.tensor([key], device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert sample(*case)[0].item() == reference_sample(*case)[0].item() == column


def test_undefined_rows_give_a_token_of_the_row_and_stay_alone():
    """All -inf: token 0. NaN or +inf, one or everywhere: a token below V. Log-prob and entropy NaN, other rows fine."""
    logits_RV, _, keys_R, positions_R = random_case(6, 4100)
    alone = sample(logits_RV[5:], 1.0, keys_R[5:], positions_R[5:])
    logits_RV[0], logits_RV[1] = -INF, math.nan
    logits_RV[2, 4099], logits_RV[3, 7], logits_RV[4] = math.nan, INF, INF
    for temperature in (0, 1.0):
        tokens_R, logprobs_R, entropies_R = sample(logits_RV, temperature, keys_R, positions_R)
        assert tokens_R[0] == 0 and ((tokens_R >= 0) & (tokens_R < 4100)).all()
        assert logprobs_R.isnan().tolist() == entropies_R.isnan().tolist() == [True] * 5 + [False]
    assert (tokens_R[5], logprobs_R[5], entropies_R[5]) == tuple(x[0] for x in alone)


@pytest.mark.parametrize("V", [100, 9001])
def test_of_equal_scores_the_smallest_index_wins(V):
    """Greedy ties inside a tile, across tiles and between whole tiles go to the first, whatever the keys are."""
    logits_RV, *rest = random_case(4, V, 0)
    logits_RV[0] = 0.0
    logits_RV[1, [V - 1, V // 2]] = 50.0
    logits_RV[2, V // 3:] = 50.0
    logits_RV[3, [V - 1, V - 2]] = 50.0
    assert sample(logits_RV, *rest)[0].tolist() == [0, V // 2, V // 3, V - 2]


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("V", [100, 9001])
def test_a_row_alone_equals_the_row_in_a_batch_to_the_bit(V, temperature):
    """Token, log-prob and entropy depend on the row, its key and its position, not on other rows or their order."""
    logits_RV, _, keys_R, positions_R = random_case(5, V)
    batch = sample(logits_RV, temperature, keys_R, positions_R)
    turned = sample(logits_RV.flip(0), temperature, keys_R.flip(0), positions_R.flip(0))
    for row in range(5):
        here = slice(row, row + 1)
        # clone(): the same alignment, and so the same compiled kernel, on a GPU
        alone = sample(logits_RV[here].clone(), temperature, keys_R[here], positions_R[here])
        for together, flipped, single in zip(batch, turned, alone):
            assert together[row] == flipped[4 - row] == single[0]


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_size_of_the_tiles_changes_no_token(monkeypatch, temperature):
    """1 tile and no second kernel, or 2 or 16 tiles: the same tokens, and the same numbers within float32 sums."""
    logits_RV, *rest = random_case(4, 2000, temperature)
    logits_RV[0, :1000], logits_RV[1, 300:] = -INF, -INF
    whole = sample(logits_RV, *rest)
    for columns in (128, 1024):
        options = module._launch_options(2000) | {"BLOCK_V": columns}
        monkeypatch.setattr(module, "_launch_options", lambda V: options)
        tokens_R, *numbers = sample(logits_RV, *rest)
        assert torch.equal(tokens_R, whole[0])
        for a, b in zip(numbers, whole[1:]):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        monkeypatch.undo()


# ---------------------------------------------------------------- distribution


def chi_square_p_value(counts, probs):
    """Probability of a larger chi-square statistic; dof = cells - 1, here even: exp(-x/2) sum_k<dof/2 (x/2)^k / k!"""
    expected = probs * counts.sum()
    assert expected.min() >= 5 and len(probs) % 2 == 1
    half = float(((counts - expected) ** 2 / expected).sum()) / 2
    terms = itertools.accumulate(range(1, (len(probs) - 1) // 2), lambda term, k: term * half / k, initial=1.0)
    return math.exp(-half) * sum(terms)


# Under the interpreter a draw of the kernel takes 4 ms. There the large sample comes from the reference, whose tokens
# the kernel draws too (above), and a small one from the kernel itself.
DRAWS = [(sample, 200_000, 1.0), (sample, 200_000, 0.7)]
if DEVICE == "cpu":
    DRAWS = [(sample, 150, 1.0), (reference_sample, 200_000, 1.0), (reference_sample, 200_000, 0.7)]


@pytest.mark.parametrize("function, draws, temperature", DRAWS)
@pytest.mark.parametrize("over", ["positions", "rows", "counting keys"])
def test_draws_follow_the_distribution_and_neighbours_are_independent(function, draws, temperature, over):
    """9 tokens over positions of one row, adjacent row ids at one position, and keys 0, 1, 2, ... themselves.

    Chi-square with 8 degrees of freedom: the threshold p = 1e-6 is a statistic of 42.7, which a right sampler passes
    once in a million seeds; the seed is fixed. Pairs of neighbours (81 cells, 80 degrees, 134.8 at p = 1e-4 and
    157.0 at 1e-6) must look independent as well. With 200,000 draws a token of probability 0.1 that is drawn 3 %
    too often or too seldom adds 18 to the statistic, 5 % adds 50.
    """
    logits_V = torch.tensor([0.0, 1.0, -0.5, 0.3, 0.8, 0.1, -0.2, 0.5, 0.9], device=DEVICE)
    probs_V = (logits_V.double() / temperature).softmax(0).cpu().numpy()
    counter_R = torch.arange(draws, device=DEVICE)
    if over == "positions":
        keys_R, positions_R = row_keys(1, [5]).expand(draws), counter_R
    else:
        keys_R = row_keys(1, range(draws)) if over == "rows" else counter_R
        positions_R = torch.full_like(counter_R, 300)
    case = logits_V.expand(draws, 9), temperature, keys_R, positions_R
    tokens_R = function(*case)[0].cpu().numpy()
    # Ties of two scores in float32 are one draw in 100,000 (assert_same_draws).
    assert (tokens_R != reference_sample(*case)[0].cpu().numpy()).sum() <= draws // 50_000
    assert chi_square_p_value(np.bincount(tokens_R, minlength=9), probs_V) > 1e-6
    if draws == 200_000:
        pairs = np.bincount(tokens_R[::2] * 9 + tokens_R[1::2], minlength=81)
        assert chi_square_p_value(pairs, np.outer(probs_V, probs_V).ravel()) > 1e-6


# ---------------------------------------------------------------- layout, launches, errors


def test_strided_logits_keys_and_positions_equal_their_copies():
    """Rows of a wider buffer, stepped columns, a transpose, an expanded row; stepped keys; int32 positions."""
    wide_RW, _, keys_R, positions_R = random_case(4, 9016)
    wide_RW[:, 4500:] = 1e4  # would win every draw that it entered by mistake
    views = [wide_RW[:, :4500], wide_RW[:, 1:4500], wide_RW[:, :4500:3], random_case(4500, 4)[0].T]
    views.append(wide_RW[:1, :4500].expand(4, 4500))
    for view_RV in views:
        expected = sample(view_RV.contiguous(), 0.7, keys_R, positions_R)
        stepped = keys_R.repeat_interleave(2)[::2], positions_R.int().repeat_interleave(3)[::3]
        for a, b in zip(sample(view_RV, 0.7, *stepped), expected):
            # Another alignment is another compiled kernel on a GPU: the same tokens, sums in another order.
            torch.testing.assert_close(a, b, rtol=0 if DEVICE == "cpu" else 1e-6, atol=0 if DEVICE == "cpu" else 1e-6)


def test_no_rows_give_empty_outputs():
    """R = 0, a batch that has ended, launches nothing."""
    outputs = sample(*random_case(0, 5000))
    assert [x.shape for x in outputs] == [(0,)] * 3


def test_one_launch_for_a_small_vocabulary_two_for_a_large_one(monkeypatch):
    """Grids come from the shape alone: (R, tiles) and, where there is more than one tile, (R,)."""
    kind = triton.JITFunction if DEVICE == "cuda" else triton.runtime.interpreter.InterpretedFunction
    assert isinstance(module._tile_kernel, kind) and isinstance(module._merge_kernel, kind)
    tile, merge = CountingKernel(module._tile_kernel), CountingKernel(module._merge_kernel)
    monkeypatch.setattr(module, "_tile_kernel", tile)
    monkeypatch.setattr(module, "_merge_kernel", merge)
    sample(*random_case(3, 4096))
    assert tile.grids == [(3, 1)] and merge.grids == []
    sample(*random_case(3, 9001, 0))
    assert tile.grids == [(3, 1), (3, 3)] and merge.grids == [(3,)]


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_kernel_is_a_drop_in_for_its_plain_twin(temperature):
    """sampler.sample has the same parameters, tokens and dtypes, and the same numbers within float32 sums (1e-5)."""
    assert kernels.sample is sample
    assert list(inspect.signature(sample).parameters) == list(inspect.signature(sampler.sample).parameters)
    case = random_case(12, 64, temperature)
    (tokens_R, *numbers), (plain_R, *plain) = sample(*case), sampler.sample(*case)
    assert torch.equal(tokens_R, plain_R)
    for a, b in zip(numbers, plain):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


LOGITS, KEYS = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("logits, temperature, keys, positions, text", [
    (torch.zeros(2, 3, 4), 1.0, KEYS, KEYS, r"logits \(2, 3, 4\).* type logits\[:, -1\]"),
    (torch.zeros(2, 0), 1.0, KEYS, KEYS, r"logits \(2, 0\)"),
    (LOGITS, 1.0, KEYS[:1], KEYS, r"keys \(1,\)"),
    (LOGITS, 1.0, KEYS, KEYS[:1], r"positions \(1,\)"),
    (LOGITS.double(), 1.0, KEYS, KEYS, r"float64 logits given.* type logits\.float\(\)"),
    (LOGITS, 1.0, KEYS.int(), KEYS, r"int32 keys.*type keys\.long\(\)"),
    (LOGITS, 1.0, KEYS, KEYS.float(), "float32 positions given"),
    (LOGITS, -1.0, KEYS, KEYS, "temperature -1.0 given; it must be finite and positive, or 0"),
    (LOGITS, math.nan, KEYS, KEYS, "temperature nan given"),
    (LOGITS, INF, KEYS, KEYS, "temperature inf given"),
    (LOGITS, 1.0, KEYS.to("meta"), KEYS, "keys on meta, .* one CUDA device"),
])
def test_wrong_arguments_are_named(logits, temperature, keys, positions, text):
    """A wrong shape, dtype, temperature or device raises ValueError and says what was given."""
    keys = keys if keys.device.type == "meta" else keys.to(DEVICE)
    with pytest.raises(ValueError, match=text):
        sample(logits.to(DEVICE), temperature, keys, positions.to(DEVICE))


COMPILE = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import sampling

for kernel, greedy in [(sampling._tile_kernel, True), (sampling._tile_kernel, False), (sampling._merge_kernel, False)]:
    options = sampling._launch_options(151936)
    constants = {"V": 151936, "BLOCK_V": options.pop("BLOCK_V"), "TILES": 38, "BLOCK_TILES": 64, "GREEDY": greedy}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {"logits_ptr": "*bf16", "keys_ptr": "*i64", "positions_ptr": "*i64", "candidates_ptr": "*i32",
             "tokens_ptr": "*i64", "row_stride": "i64", "inv_temperature": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or name == "row_stride"]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert kernel is sampling._merge_kernel or "ld.global.v4.b32" in compiled.asm["ptx"], "no 16-byte loads"
    assert len(compiled.asm["cubin"]) > 0
    print("compiled", kernel.__name__)

try:
    sampling.sample(torch.zeros(2, 4), 1.0, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
except ValueError as error:
    print(error)
"""


def test_the_kernels_compile_for_a_hopper_gpu_without_one(tmp_path):
    """The real compiler accepts the kernels, with 16-byte loads; not interpreted, CPU tensors raise."""
    # A process of its own, because this one interprets the kernels; an empty cache, so that it compiles.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(module.__file__).parent.parent)}
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.count("compiled") == 3, result.stdout + result.stderr
    assert "given; all must be on one CUDA device. On a CPU use the plain sample of sampler.py" in result.stdout


# ---------------------------------------------------------------- what only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_a_gpu_draws_the_tokens_of_the_reference_on_the_cpu(dtype, temperature):
    """64 rows of 151936, compiled, against float64 and the reference on the same GPU and on the CPU."""
    case = random_case(64, 151_936, temperature, dtype)
    assert_same_draws(*case)
    on_cpu = reference_sample(*(x.cpu() if torch.is_tensor(x) else x for x in case))[0]
    # A tie of scores serves one draw in 100,000 (assert_same_draws): two of 64 would be a wrong kernel.
    assert (sample(*case)[0].cpu() != on_cpu).sum() <= (0 if temperature == 0 else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_captured_graph_draws_with_the_keys_and_positions_of_the_moment(temperature):
    """Nothing in `sample` waits for the GPU, and a replay reads logits, keys and positions where they lie."""
    logits_RV, _, keys_R, positions_R = random_case(8, 151_936)
    sample(logits_RV, temperature, keys_R, positions_R)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = sample(logits_RV, temperature, keys_R, positions_R)
        positions_R += 1
    before = None
    for step in range(4):
        if step == 2:
            keys_R.copy_(random_case(8, 1, seed=9)[2])
            logits_RV.copy_(random_case(8, 151_936, seed=9)[0])
        expected = sample(logits_RV, temperature, keys_R, positions_R)
        graph.replay()
        for a, b in zip(outputs, expected):
            assert torch.equal(a, b)
        assert temperature == 0 or before is None or not torch.equal(outputs[0], before)
        before = outputs[0].clone()


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_logits_are_read():
    """Row offsets are 64-bit: 14200 rows of 151936 bfloat16 logits, 4.3 GB; the last rows as if they were alone."""
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    R, V = 14_200, 151_936
    logits_RV = torch.zeros(R, V, dtype=torch.bfloat16, device=DEVICE)
    few_RV = random_case(3, V, dtype=torch.bfloat16)[0]
    logits_RV[-3:] = few_RV
    keys_R, positions_R = row_keys(0, range(R)), torch.zeros(R, dtype=torch.int64, device=DEVICE)
    for a, b in zip(sample(logits_RV, 1.0, keys_R, positions_R), sample(few_RV, 1.0, keys_R[-3:], positions_R[-3:])):
        assert torch.equal(a[-3:], b)
