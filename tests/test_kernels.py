"""Claims about the Triton kernels: what all refuse, compile to and do, then each file's own.

(linear_logprob's own are in test_linear_logprob.py.) Without a GPU they run under Triton's interpreter, which
computes with numpy and announces every infinity and NaN that these tests ask for: hence the filter below.
"""
import inspect
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import KernelInterface

import kernels
import model
import sampler
from kernels import PrefixTiles, capture, decode_attention, sample
from kernels.sampling import _exponential, _uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = math.inf, math.nan
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
              pytest.mark.usefixtures("interpreter_without_two_faults")]


def fused_arguments(C, H, dtype=torch.float32):
    """Of fused.py: H heads of a wider tensor, angles of one batch row for all, rows of 32 C numbers."""
    numbers = torch.randn(700 * (H + 2) * C, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x_BTHC = numbers[:6 * (H + 2) * C].view(2, 3, H + 2, C).to(dtype)[:, :, :H]
    x, y, weight = numbers[-480 * C:].view(3, 5, 32 * C).to(dtype)
    angles_1T1R = numbers[:3 * C // 2].view(1, 3, 1, C // 2) * 5
    cos = angles_1T1R.cos().repeat(1, 1, 1, 2).to(dtype)
    sin = torch.cat([-angles_1T1R.sin(), angles_1T1R.sin()], -1).to(dtype)
    return {"rms_norm": {"x": x_BTHC, "weight": weight[0, :H * C].view(H, C), "eps": 1e-6},
            "add_rms_norm": {"x": x, "y": y, "weight": weight[0], "eps": 0.1},
            "rotate": {"x_BTHC": x_BTHC, "cos_BT1C": cos, "sin_BT1C": sin}, "swiglu": {"x": x}}


def arguments():
    """Valid ones of each kernel: 3 rows, vocabularies of 3 tiles, room for 2 chunks of own keys."""
    normal = partial(torch.randn, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    integers = partial(torch.tensor, device=DEVICE)
    tables = [integers(x, dtype=torch.int32) for x in ([[2, 0], [1, -1]], [10, 0], [37, 5])]
    return fused_arguments(10, 3) | {
        "linear_logprob": {
            "hidden_ND": normal(3, 8).requires_grad_(), "weight_VD": normal(9001, 8).requires_grad_(),
            "targets_N": integers([0, 4096, 9000]), "temperature": 0.7},
        "sample": {"logits_RV": normal(3, 9001), "temperature": 0.7, "keys_R": integers([1, 2, 3]),
                   "positions_R": integers([4, 5, 6])},
        "decode_attention": {
            "q_RHC": normal(3, 4, 16), "k_RKC": normal(3, 2, 16), "v_RKC": normal(3, 2, 16),
            "lengths_R": integers([0, 33, 150], dtype=torch.int32),
            "keys_RKSC": normal(4, 2, 200, 16), "values_RKSC": normal(4, 2, 200, 16),
            "trunk_keys_KNC": normal(2, 50, 16), "trunk_values_KNC": normal(2, 50, 16),
            "tiles": PrefixTiles(*tables, max_prefix=37)}}


def changed_arguments(name, ending, change):
    """Those of a kernel, with a change to all whose names end so."""
    return {key: change(x) if key.endswith(ending) else x for key, x in arguments()[name].items()}


def attend(q_RHC, k_RKC, v_RKC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, tiles):
    return decode_attention(q_RHC, (k_RKC, v_RKC), (keys_RKSC, values_RKSC), lengths_R,
                            (trunk_keys_KNC, trunk_values_KNC), tiles)


def results(name, case):
    """Outputs of a kernel and, where it has them, gradients."""
    out = attend(**case) if name == "decode_attention" else getattr(kernels, name)(**case)
    if name == "linear_logprob":
        return [*out, *torch.autograd.grad(out[0].sum(), (case["hidden_ND"], case["weight_VD"]))]
    return [out] if torch.is_tensor(out) else list(out)


@pytest.mark.parametrize("name, ending, change, given", [
    ("linear_logprob", "hidden_ND", lambda x: x[None], "(1, 3, 8)"),
    ("linear_logprob", "weight_VD", lambda x: x[:, :3], "(9001, 3)"),
    ("linear_logprob", "hidden_ND", lambda x: x.bfloat16(), "torch.bfloat16"),
    ("linear_logprob", "targets_N", lambda x: x.float(), "torch.float32"),
    ("linear_logprob", "temperature", lambda x: 0.0, "temperature 0.0"),
    ("sample", "logits_RV", lambda x: x[:, None], "(3, 1, 9001)"),
    ("sample", "keys_R", lambda x: x[:1], "(1,)"),
    ("sample", "temperature", lambda x: NAN, "temperature nan"),
    ("rms_norm", "weight", lambda x: x[:2], "(2, 10)"),
    ("rms_norm", "x", torch.Tensor.requires_grad_, "True"),
    ("add_rms_norm", "y", lambda x: x.bfloat16(), "torch.bfloat16"),
    ("rotate", "1C", lambda x: x[:, :2], "(1, 2, 1, 10)"),
    ("swiglu", "x", lambda x: x[:, :13], "(5, 13)"),
    ("decode_attention", "q_RHC", lambda x: x[:, :, None], "(3, 4, 1, 16)"),
    ("decode_attention", "q_RHC", lambda x: x[:, :3], "(3, 3, 16)"),  # 3 query heads of 2 key heads
    ("decode_attention", "lengths_R", lambda x: x[:2], "(2,)"),
    ("decode_attention", "tiles", lambda x: x._replace(rows_TM=x.rows_TM.repeat(1, 300)), "M = 600"),
    ("decode_attention", "C", lambda x: torch.cat([x, x[..., :1]], -1), "C = 17"),  # an odd number
    ("decode_attention", "v_RKC", lambda x: x[:, :1], "(3, 1, 16)"),
    ("decode_attention", "C", lambda x: x.double(), "torch.float64"),
    ("decode_attention", "keys_RKSC", lambda x: x.half(), "torch.float16"),
    ("decode_attention", "lengths_R", lambda x: x.long(), "torch.int64"),
    ("decode_attention", "keys_RKSC", lambda x: x.mT.contiguous().mT, "(6400, 3200, 1, 200)"),  # strides
    ("decode_attention", "tiles", lambda x: x._replace(rows_TM=x.rows_TM.T.contiguous().T), "gaps"),
])
def test_wrong_arguments_are_named(name, ending, change, given):
    """A wrong shape, dtype, stride, size or temperature: what was given and what to type. The head's plain
    twin refuses the same, in the same words."""
    arguments = changed_arguments(name, ending, change)
    with pytest.raises(ValueError, match=f"^{name}: .*{re.escape(given)}.*type ."):
        results(name, arguments)
    if name == "linear_logprob":
        with pytest.raises(ValueError, match=f"^{name}: .*{re.escape(given)}.*type ."):
            model.linear_logprob(**arguments)


def stepped(x):
    return x.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("name, ending, change", [
    ("linear_logprob", "D", stepped), ("linear_logprob", "targets_N", stepped), ("sample", "V", stepped),
    ("sample", "_R", stepped),
    *[("decode_attention", kind, lambda x: torch.cat([x, x], 1)[:, :x.shape[1]]) for kind in ("HC", "KC")],
    *[("decode_attention", kind, lambda x: torch.cat([x, x], -1)[..., :16]) for kind in ("SC", "NC")],
    ("decode_attention", "SC", lambda x: x.transpose(0, -2).contiguous().transpose(0, -2)),
    ("linear_logprob", "targets_N", torch.Tensor.int), ("sample", "positions_R", torch.Tensor.int),
    ("rms_norm", "x", torch.Tensor.contiguous), ("rotate", "x_BTHC", torch.Tensor.contiguous),
    ("rotate", "x_BTHC", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    ("rotate", "1C", lambda x: x.repeat(2, 1, 1, 1))])
def test_views_and_int32_give_what_dense_int64_gives(name, ending, change):
    """Every second column; for what attention reads in place, wider rows and (S, K, R, C)."""
    for a, b in zip(results(name, changed_arguments(name, ending, change)), results(name, arguments()[name])):
        assert torch.equal(a, b)


def test_twins_have_the_parameters_of_their_kernels():
    """`ops` may be either module."""
    for name in arguments():
        plain = getattr(model if hasattr(model, name) else sampler, name)
        assert inspect.signature(getattr(kernels, name)) == inspect.signature(plain)


@pytest.mark.parametrize("name, launched", [
    ("linear_logprob", ["_fold_kernel", "_gradient_kernel"]), ("sample", ["_tile_kernel", "_merge_kernel"]),
    ("decode_attention", ["_partial_kernel", "_merge_kernel"]), ("rms_norm", ["_rms_norm_kernel"]),
    ("add_rms_norm", ["_rms_norm_kernel"]), ("rotate", ["_rotate_kernel"]), ("swiglu", ["_swiglu_kernel"])])
def test_results_come_from_triton_and_never_from_fresh_memory(name, launched, monkeypatch):
    """The kernels are launched, and NaN in all of torch.empty changes no bit of the results."""
    seen = []
    launch = KernelInterface.__getitem__
    monkeypatch.setattr(KernelInterface, "__getitem__",
                        lambda kernel, grid: seen.append(kernel.fn.__name__) or launch(kernel, grid))
    plain = results(name, arguments()[name])
    assert seen == launched
    torch.use_deterministic_algorithms(True, warn_only=True)  # then torch.empty gives NaN
    try:
        assert torch.empty(9).isnan().all()
        filled = results(name, arguments()[name])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(plain, filled))


COMPILE = """
import importlib, re, subprocess, sys
from pathlib import Path
import torch, triton, kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
linear, sampling, decode, fused = map(importlib.import_module, (
    "kernels.linear_logprob", "kernels.sampling", "kernels.decode_attention", "kernels.fused"))
TYPES = {"inv_temperature": "fp32", "c": "fp32", "eps": "fp32"}
for t, names in (("*bf16", "grad logits q k v values trunk_keys trunk_values out x y weight total cos sin"),
                 ("*i64", "targets keys positions tokens"),
                 ("*i32", "lengths rows begins prefix_lengths candidates")):
    TYPES |= {name + "_ptr": t for name in names.split()}

def build(kernel, sizes, options):
    names = kernel.arg_names
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names} | TYPES
    sizes = {name: sizes[name] for name in names if name in sizes}
    signature = {name: "constexpr" if name in sizes else types[name] for name in names}
    # What the launcher finds out by itself: aligned tensors, and strides and slices that are multiples of 16.
    aligned = [i for i, name in enumerate(names) if re.search("_ptr|stride|start|width", name)]
    source = ASTSource(kernel, signature, sizes, {(i,): [["tt.divisibility", 16]] for i in aligned})
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    built = triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})
    Path("kernel.cubin").write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", "kernel.cubin"], capture_output=True, text=True).stdout
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, ("spills", kernel.__name__, sizes, usage)
    assert kernel is not decode._partial_kernel or "mma" in built.asm["ptx"], "no tensor cores"

sizes = {"V": 151936, "NUM_BLOCKS": 38, "BLOCK_C": linear.BLOCK_C, "BLOCK_V": sampling.BLOCK_V, "TILES": 38}
sizes |= {"BLOCK_TILES": 64, "GREEDY": False}
build(linear._fold_kernel, sizes, linear.OPTIONS)
build(linear._gradient_kernel, sizes, linear.OPTIONS)
build(sampling._tile_kernel, sizes, {"num_warps": 8})
build(sampling._merge_kernel, sizes, {"num_warps": 1})
TYPES["keys_ptr"] = "*bf16"  # those of attention
for H, K, C, M in [(14, 2, 64, 8), (28, 4, 128, 8), (8, 2, 256, 16), (32, 32, 80, 8), (24, 8, 120, 16)]:
    lanes = max(16, triton.next_power_of_2(M * H // K))
    BLOCK_C = triton.next_power_of_2(C)
    options = decode._launch_options(lanes, BLOCK_C, torch.bfloat16)
    sizes = {"H": H, "K": K, "C": C, "M": M, "TILE_LANES": lanes, "ROW_LANES": 16, "PLACES": 2048}
    sizes |= {"SPLITS": 64, "BLOCK_N": options.pop("BLOCK_N"), "BLOCK_C": BLOCK_C, "BLOCK_H": fused.BLOCK_H}
    build(decode._partial_kernel, sizes | {"own_stride_s": C, "trunk_stride_n": C}, options)
    build(decode._merge_kernel, sizes, {"num_warps": max(4, BLOCK_C // 32)})
    build(fused._rotate_kernel, sizes, {"num_warps": 4})
for D, num_warps, adds in [(128, 1, False), (896, 2, True), (8192, 16, True)]:
    build(fused._rms_norm_kernel, {"D": D, "BLOCK_D": triton.next_power_of_2(D), "ADDS": adds},
          {"num_warps": num_warps})
build(fused._swiglu_kernel, {"I": 4864, "BLOCK_I": fused.BLOCK_I}, {"num_warps": 4})

x, n = torch.zeros(1, 1, 16), torch.zeros(1, dtype=torch.int32)
tiles = kernels.PrefixTiles(n[None], n, n, 0)
for call in (lambda: kernels.linear_logprob(x[0], x[0], n), lambda: kernels.sample(x[0], 1.0, n.long(), n),
             lambda: kernels.decode_attention(x, (x, x), (x[None], x[None]), n, (x, x), tiles),
             lambda: kernels.swiglu(x)):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90,
                                  pytest.param(100, marks=pytest.mark.slow)])
def test_the_kernels_compile_without_spills_for_gpus_that_are_not_here(arch, tmp_path):
    """The real compiler, sizes of real models: no spills, attention on tensor cores. A CPU tensor raises."""
    # A process of its own, because this one interprets the kernels; an empty cache, so that it compiles.
    env = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path),
               PYTHONPATH=str(Path(__file__).parent.parent))
    (tmp_path / "build.py").write_text(COMPILE)
    done = subprocess.run([sys.executable, "build.py", str(arch)], env=env, cwd=tmp_path, timeout=300,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"cuda\(\).* or use .*\.py", done.stdout)) == 4


@pytest.mark.gpu
def test_a_step_that_raises_closes_its_capture_and_the_pool_outlives_its_graphs():
    """The first run is for real. No graph is alive when the second step is captured."""
    def broken_step():
        torch.zeros(1, device=DEVICE)
        1 / (not torch.cuda.is_current_stream_capturing())

    x_N = torch.zeros(4, device=DEVICE)
    assert capture(lambda: x_N.add_(1) * 2)().tolist() == [4] * 4
    with pytest.raises(ZeroDivisionError):
        capture(broken_step)
    replay = capture(lambda: x_N.add_(1) * 2)
    assert replay() is replay() and x_N.tolist() == [5] * 4


# ---------------------------------------------------------------- fused

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("C, H", [(2, 1), (24, 9), (80, 3), (256, 2)])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "rotate", "swiglu"])
def test_fused_operations_round_where_their_plain_twins_round(name, C, H, dtype, monkeypatch):
    """float32: 8 roundings from float64. Else equal to the twin but for a unit in the last place of one in a
    hundred: exp and rsqrt may differ in the last bit of float32, which decides near a halfway point."""
    if DEVICE == "cpu":  # the interpreter cuts bfloat16 down
        convert = interpreter._convert_float
        monkeypatch.setattr(interpreter, "_convert_float", lambda x, source, target, mode: (
            torch.tensor(x).bfloat16().view(torch.uint16).numpy() if target == tl.bfloat16
            else convert(x, source, target, mode)))
    case = fused_arguments(C, H, dtype)[name]
    twin_dtype = torch.float64 if dtype == torch.float32 else dtype
    twins = getattr(model, name)(**{key: x if key == "eps" else x.to(twin_dtype) for key, x in case.items()})
    for ours, twin in zip(results(name, case), twins if name == "add_rms_norm" else [twins], strict=True):
        unit = max(1e-6, torch.finfo(dtype).eps)
        torch.testing.assert_close(ours.to(twin_dtype), twin, rtol=unit, atol=1e-6)
        assert ours.dtype == dtype
        assert dtype == torch.float32 or (ours != twin).sum() <= 1 + ours.numel() // 100


# ---------------------------------------------------------------- sampling


def sampling_case(R, V, temperature=1.0, dtype=torch.float32, seed=0):
    """The four arguments of `sample`."""
    generator = torch.Generator().manual_seed(seed)
    logits_RV = (torch.randn(R, V, generator=generator) * 3).to(dtype)
    keys_R = torch.randint(-2**63, 2**63 - 1, (R,), generator=generator)
    positions_R = torch.randint(0, 40_000, (R,), generator=generator)
    return logits_RV.to(DEVICE), temperature, keys_R.to(DEVICE), positions_R.to(DEVICE)


def assert_drawn_right(logits_RV, temperature, keys_R, positions_R):
    """What the kernel gives, after comparison with float64.

    A token must have the largest score log(p / E), but for ties: within 1e-5 nats of it, since float32 scores
    carry about ten roundings of numbers up to 30; that serves one draw in 100,000, and no greedy one.
    Log-prob and entropy: within what eager float32 is off by and 1e-6, 8 roundings, of the number (or of 1).
    """
    tokens_R, *numbers = sample(logits_RV, temperature, keys_R, positions_R)
    assert [x.dtype for x in (tokens_R, *numbers)] == [torch.int64, torch.float32, torch.float32]
    scores_RV = logits_RV.double() - logits_RV.double().amax(1, keepdim=True)
    if temperature > 0:
        u_RV = sampler.uniform(keys_R, positions_R, logits_RV.shape[1]).double()
        scores_RV = scores_RV / temperature - torch.log(-torch.log1p(-u_RV))
    gaps_R = scores_RV.amax(1) - scores_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    assert (gaps_R <= (0 if temperature == 0 else 1e-5)).all(), gaps_R
    expected = []
    for dtype in (torch.float64, torch.float32):
        all_RV = torch.log_softmax(logits_RV.to(dtype) / (temperature or 1.0), dim=-1)
        expected.append(all_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1))
        expected.append(torch.special.entr(all_RV.exp()).sum(-1))
    for ours_R, truth_R, eager_R in zip(numbers, expected[:2], expected[2:]):
        allowed_R = (eager_R - truth_R).abs().max() + 1e-6 * truth_R.abs().clamp(min=1.0)
        assert ((ours_R - truth_R).abs() <= allowed_R).all(), (ours_R, truth_R)
    return tokens_R, *numbers


@triton.jit
def _noise_kernel(u_ptr, e_ptr, keys_ptr, positions_ptr, first_column, V: tl.constexpr):
    row = tl.program_id(0)
    lanes = tl.arange(0, V)
    u = _uniform(tl.load(keys_ptr + row), tl.load(positions_ptr + row), first_column + lanes)
    tl.store(u_ptr + row * V + lanes, u)
    tl.store(e_ptr + row * V + lanes, _exponential(u))


@pytest.mark.parametrize("first_column", [0, 67_072, 151_936 - 256])
def test_noise_equals_that_of_the_plain_twin_to_the_bit(first_column):
    """Extreme and random keys and positions; u is below 1, and -log(1 - u) right to 4 units of 2**-23."""
    # A find: the 31 bits of token 67220 for key 3 at position 0 are 2**31 - 48; the last 64 would round to 1,
    # and a token of probability 1 score 1 / infinity, no better than a masked one.
    keys_R = sampling_case(11, 1)[2]
    keys_R[:6] = torch.tensor([3, 0, 1, -1, 2**63 - 1, -2**63])
    positions_R = torch.tensor([0, 0, 1, 32_767, 131_072, 2**31 - 1, 5, 0, 77, 4096, -1], device=DEVICE)
    u_RV, e_RV = torch.empty(2, 11, 256, device=DEVICE)
    _noise_kernel[(11,)](u_RV, e_RV, keys_R, positions_R, first_column, 256)
    assert torch.equal(u_RV, sampler.uniform(keys_R, positions_R, first_column + 256)[:, first_column:])
    truth_RV = -torch.log1p(-u_RV.double())
    # log(1 - u) alone is off by 2**-25 / u. Two units are due to the formula, the others to the logarithm.
    assert u_RV.max() < 1 and ((e_RV - truth_RV).abs() / truth_RV).max() < 4 * 2.0**-23


@pytest.mark.parametrize("temperature", [0, 0.7, 1, 2.0])
@pytest.mark.parametrize("V, R, dtype", [
    (1, 2, torch.float32), (7, 24, torch.float32), (1000, 16, torch.bfloat16), (4096, 4, torch.float16),
    (4097, 4, torch.float32), (50_257, 2, torch.bfloat16), (151_936, 2, torch.float32)])
def test_the_kernel_draws_what_float64_draws(V, R, dtype, temperature):
    """Token, log-prob and entropy, in all dtypes: one column, exact tiles, a ragged last one, 38."""
    assert_drawn_right(*sampling_case(R, V, temperature, dtype))


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_masked_peaked_and_very_negative_rows_are_drawn_right(temperature):
    """-inf is never drawn and adds nothing, 1 - 1e-12 of the mass always is, -1e30 everywhere is uniform."""
    logits_RV, *rest = sampling_case(6, 9001, temperature)
    logits_RV[0, ::2] = -INF
    logits_RV[1, :8192] = -INF  # the first two tiles have nothing
    logits_RV[2, :4096] = -INF  # nothing, something, nothing
    logits_RV[2, 8192:] = -INF
    logits_RV[3] = -INF
    logits_RV[3, 5000] = -40.0  # one token is left: certain
    logits_RV[4] /= 10
    logits_RV[4, 9000] = 36.7  # exp(0.3^2 / 2 - 36.7) * 9000 others = 1e-12
    logits_RV[5] = -1e30
    tokens_R, logprobs_R, _ = assert_drawn_right(logits_RV, *rest)
    assert tokens_R[3:5].tolist() == [5000, 9000] and (logprobs_R[3:5] == 0).all()


@pytest.mark.parametrize("V", [100, 9001])
def test_of_equal_scores_the_smallest_index_wins(V):
    """Greedy ties inside a tile, across tiles and between whole tiles go to the first."""
    logits_RV, *rest = sampling_case(4, V, 0)
    logits_RV[0] = 0.0
    logits_RV[1, [V - 1, V // 2]] = 50.0
    logits_RV[2, V // 3:] = 50.0
    logits_RV[3, [V - 1, V - 2]] = 50.0
    assert sample(logits_RV, *rest)[0].tolist() == [0, V // 2, V // 3, V - 2]


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_rows_do_not_depend_on_others_not_even_on_undefined_ones(temperature):
    """Alone as in a batch, to the bit. All -inf: token 0; NaN, +inf: one below V; their numbers are NaN."""
    logits_RV, _, keys_R, positions_R = sampling_case(8, 9001)
    logits_RV[0], logits_RV[1], logits_RV[2] = -INF, NAN, INF
    logits_RV[3, 9000], logits_RV[4, 7] = NAN, INF
    tokens_R, *numbers = batch = sample(logits_RV, temperature, keys_R, positions_R)
    assert tokens_R[0] == 0 and ((tokens_R >= 0) & (tokens_R < 9001)).all()
    assert [x.isnan().tolist() for x in numbers] == [[True] * 5 + [False] * 3] * 2
    for row in range(9):  # the last slice holds no row
        one = slice(row, row + 1)
        alone = sample(logits_RV[one], temperature, keys_R[one], positions_R[one])
        torch.testing.assert_close([x[one] for x in batch], [*alone], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("over", ["positions", "rows", "counting keys"])
def test_draws_follow_the_distribution_and_neighbours_are_independent(over):
    """9 tokens over positions of one row, row ids at one position, and keys 0, 1, 2, ...: chi-square.

    A right sampler exceeds 42.7 (8 degrees of freedom), and 157 for pairs of neighbours (80), in one of a
    million seeds. A token of p = 0.1 drawn 5 % too often adds 50. Interpreted, the kernel makes the first 40.
    """
    draws = 200_000
    positions_R = torch.arange(draws) if over == "positions" else torch.full((draws,), 300)
    ids = [5] * draws if over == "positions" else range(draws)
    keys_R = torch.tensor(ids) if over == "counting keys" else sampler.noise_keys(1, ids)
    logits_V = torch.tensor([0.0, 1.0, -0.5, 0.3, 0.8, 0.1, -0.2, 0.5, 0.9], device=DEVICE)
    case = logits_V.expand(draws, 9), 0.7, keys_R.to(DEVICE), positions_R.to(DEVICE)
    tokens_R = (sample if DEVICE == "cuda" else sampler.sample)(*case)[0]
    assert torch.equal(sample(case[0][:40], 0.7, case[2][:40], case[3][:40])[0], tokens_R[:40])
    probs_V = (logits_V.double() / 0.7).softmax(0)
    pair_probs = torch.outer(probs_V, probs_V).flatten()
    pairs_R = tokens_R[::2] * 9 + tokens_R[1::2]
    for cells_R, probs, most in ((tokens_R, probs_V, 42.7), (pairs_R, pair_probs, 157)):
        expected = probs * len(cells_R)
        assert ((cells_R.bincount(minlength=len(probs)) - expected) ** 2 / expected).sum() < most


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_a_captured_graph_draws_what_a_cpu_draws(dtype, temperature):
    """64 rows of 151936: right, by the logits, keys and positions of the moment, as the plain twin on a CPU
    but for one tie."""
    case = sampling_case(64, 151_936, temperature, dtype)
    replay = capture(lambda: sample(*case))
    for i in (0, 2, 3):
        case[i].copy_(sampling_case(64, 151_936, temperature, dtype, seed=1)[i])
    drawn = assert_drawn_right(*case)
    assert all(torch.equal(a, b) for a, b in zip(replay(), drawn))
    on_cpu = sampler.sample(*(x.cpu() if torch.is_tensor(x) else x for x in case))[0]
    assert (drawn[0].cpu() != on_cpu).sum() <= (0 if temperature == 0 else 1)


# ---------------------------------------------------------------- decode_attention

# Times sum p |v|. float32: some 30 roundings of scores, exponentials and sums of up to 1,500 weights. Others:
# two units in the last place; weights and output are rounded once each (the interpreter cuts bfloat16 down).
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
TILE = 32  # keys per step for bfloat16 and float16; 16 for float32: the edges of 32 are edges of both


def decode_case(groups, lengths, H=2, K=1, C=64, S=None, M=4, max_prefix=150, dtype=torch.float32):
    """Arguments of `attend`. groups: (prefix length, row numbers) each; lengths: own tokens per row.

    What no row may see is NaN: trunk between prefixes, own capacity from the new token on, a spare row of the
    buffers. One more tile, not in use (length 0), lists a row that another tile serves. Holes come first.
    """
    generator = torch.Generator().manual_seed(0)
    R, S = len(lengths), S or max(lengths)
    N = 3 + sum(length + 3 for length, _ in groups)
    is_seen_RS = torch.arange(S) < torch.tensor([*lengths, 0]).unsqueeze(1) - 1
    is_seen_N = torch.zeros(N, dtype=torch.bool)
    tiles, begin = [([0] + [-1] * (M - 1), 1, 0)], 3
    for length, rows in groups:
        is_seen_N[begin:begin + length] = True
        for i in range(0, len(rows), M):
            places = rows[i:i + M]
            tiles.append(([-1] * (M - len(places)) + places[::-1], begin, length))
        begin += length + 3
    own = torch.randn(2, R + 1, K, S, C, generator=generator).masked_fill(~is_seen_RS[:, None, :, None], NAN)
    trunk = torch.randn(2, K, N, C, generator=generator).masked_fill(~is_seen_N[:, None], NAN)
    qkv = torch.randn(R, H + 2 * K, C, generator=generator)
    qkv, own, trunk = (x.to(DEVICE, dtype) for x in (qkv, own, trunk))
    lengths_R, *tables = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (lengths, *zip(*tiles)))
    return *qkv.split((H, K, K), 1), *own, lengths_R, *trunk, PrefixTiles(*tables, max_prefix)


def truth_in_float64(q_RHC, keys_RKSC, values_RKSC, lengths_R, trunk_keys_KNC, trunk_values_KNC, tiles):
    """(R, H, 2 C): sum p v beside sum p |v|, row by row over a copied prefix and all own tokens."""
    prefixes = {}
    for rows, begin, length in zip(*(x.tolist() for x in tiles[:3])):
        prefixes |= {row: slice(begin, begin + length) for row in rows if length}
    sums = []
    for r, length in enumerate(lengths_R.tolist()):
        prefix = prefixes.get(r, slice(0)) if length else slice(0)  # an idle row attends to nothing
        k_KXC = torch.cat([trunk_keys_KNC[:, prefix], keys_RKSC[r, :, :length]], dim=1).double()
        v_KXC = torch.cat([trunk_values_KNC[:, prefix], values_RKSC[r, :, :length]], dim=1).double()
        q_KGC = q_RHC[r].double().unflatten(0, (len(k_KXC), -1))
        p_KGX = torch.softmax(q_KGC @ k_KXC.mT / math.sqrt(q_RHC.shape[2]), dim=-1)  # no keys: nothing
        sums.append((p_KGX @ torch.cat([v_KXC, v_KXC.abs()], dim=-1)).flatten(0, 1))
    return torch.stack(sums)


def assert_attended_right(q_RHC, k_RKC, v_RKC, *case):
    """The kernel's result, after comparison with float64; new tokens are stored, and nothing else changes."""
    caches = [x.clone() for x in case[:2]]
    for r, length in enumerate(case[2].tolist()):
        for cache_RKSC, new_RKC in zip(caches, (k_RKC, v_RKC)):
            cache_RKSC[r, :, max(0, length - 1):length] = new_RKC[r].unsqueeze(1)
    out_RHC = attend(q_RHC, k_RKC, v_RKC, *case)
    torch.testing.assert_close([*case[:2]], caches, rtol=0, atol=0, equal_nan=True)
    assert out_RHC.shape == q_RHC.shape and out_RHC.dtype == q_RHC.dtype and out_RHC.isfinite().all()
    truth_RHC, spread_RHC = truth_in_float64(q_RHC, *caches, *case[2:]).chunk(2, dim=-1)
    error_RHC, allowed_RHC = (out_RHC - truth_RHC).abs(), TOLERANCE[q_RHC.dtype] * spread_RHC
    assert (error_RHC <= allowed_RHC).all(), f"{(error_RHC / allowed_RHC).max():.2f} times what is allowed"
    return out_RHC


# Own lengths 0, 1, a tile's edge, several chunks; prefixes of 37, 0, 150, 1; rows 5, 8 without a tile.
RAGGED = ([(TILE + 5, [4, 0, 6]), (0, [1]), (150, [2, 7]), (1, [3])],
          [0, 1, TILE - 1, TILE, TILE + 1, 150, 2 * TILE, 70, 0])
FEW = [(TILE + 1, [2, 0, 1])], [TILE + 1, 0, 5]
ONE_GROUP = [(TILE + 1, [2, 4, 0, 3, 1, 5])], [9, 0, 1, 0, 33, 0]
LONG = [(150, [0, 4, 2]), (140, [1, 3])], [150, 33, 0, 96, 149]  # in 3 chunks 96 ends with the last one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case, sizes", [
    *[(RAGGED, {"C": C}) for C in (16, 24, 64, 80, 112, 256)],
    *[(FEW, {"C": 16, "M": 2, "H": H, "K": K}) for H, K in ((3, 3), (4, 2), (14, 2), (20, 1))],
    *[(ONE_GROUP, {"C": 16, "M": M, "H": 7}) for M in (1, 3, 16)],
    *[(LONG, {"C": 16, "M": 2, "H": 4, "K": 2, "S": 300, "max_prefix": P}) for P in (0, 150, 1000)]])
def test_rows_of_all_kinds_are_right(case, sizes, dtype):
    """H/K = 20 is over 16 lanes; a group in 6, 2 or 1 tiles; 1 to 3 chunks; idle rows give zeros, not NaN."""
    assert_attended_right(*decode_case(*case, dtype=dtype, **sizes))


def test_no_tiles_and_no_rows_work():
    """A batch without prefixes, and one that has ended."""
    *case, tiles = decode_case(*ONE_GROUP, C=16)
    no_tiles = PrefixTiles(*(x[:0] for x in tiles[:3]), 0)
    assert_attended_right(*case, no_tiles)
    no_rows = [x[:0] if i in (0, 1, 2, 5) else x for i, x in enumerate(case)]  # q, k, v, lengths
    assert attend(*no_rows, no_tiles).shape == (0, 2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("peak, rest", [(200, 0), (-200, 0), (-10000, -10000)])
def test_peaked_and_very_negative_scores_lose_no_precision(peak, rest, dtype):
    """Peaks in both parts, early, late; all at -1e4, whose log-sum-exp float32 would round to 1e-3."""
    q_RHC, k_RKC, _, own_keys, _, _, trunk_keys, *_ = case = decode_case(
        [(150, [1, 0])], [150, 1, 60], dtype=dtype)
    signs_C = torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0).to(q_RHC)
    q_RHC[:] = 8 * signs_C  # score = 8 * a * 64 / sqrt(64) = 64 a, exact in float32
    k_RKC[:] = own_keys[:] = trunk_keys[:] = rest / 64 * signs_C
    for peak_C in (trunk_keys[0, 3], trunk_keys[0, 143], own_keys[0, 0, 140], k_RKC[1, 0]):
        peak_C[:] = peak / 64 * signs_C  # the prefix of rows 0, 1 begins at 3
    assert_attended_right(*case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H, K, C, M", [
    (14, 2, 64, 8), (12, 2, 128, 8), (28, 4, 128, 8), (16, 8, 128, 16), (8, 2, 256, 16), (32, 32, 80, 8)])
def test_a_captured_graph_follows_lengths_and_tiles(H, K, C, M, dtype):
    """Sizes of Qwen2.5 0.5B, 1.5B, 7B, Qwen3, C = 256 and 80. Captured once, replayed while rows grow,
    restart and change tiles: each time as if called anew."""
    rows = list(range(40))
    sizes = {"H": H, "K": K, "C": C, "S": 700, "M": M, "max_prefix": 600, "dtype": dtype}
    early = decode_case([(600, rows[:30]), (90, rows[30:])], [row // 2 for row in rows], **sizes)
    late = decode_case([(90, rows[:10]), (600, rows[10:])], [700 - 9 * row for row in rows], **sizes)
    *tensors, tiles = decode_case([(600, rows[:30]), (90, rows[30:])], [0] * 40, **sizes)
    replay = capture(lambda: attend(*tensors, tiles))
    for *case, case_tiles in (early, late, early):
        for old, new in zip((*tensors, *tiles[:3]), (*case, *case_tiles[:3])):
            old.copy_(new)
        assert torch.equal(replay(), assert_attended_right(*case, case_tiles))
