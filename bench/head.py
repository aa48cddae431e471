"""Times linear_logprob (log-prob and entropy from hidden states and LM head) against its rivals, in the same run.

    python bench/head.py [--device cuda|cpu] [--rows N] [--hidden D] [--vocab V] [--rival NAME ...]

The rivals: `torch` is log_softmax + gather in float32 as most trainers write it, `selective` TRL's
selective_log_softmax, `fused` TRL's Triton kernel on stored logits, `chunked` TRL's ChunkedLogProbFunction, `liger`
Liger's fused linear cross entropy, which can only do the mean. `products3` and `products4` are the matrix products
alone, with logits kept and made again: what no method of this kind can undercut. Ours and the last three of TRL's
and Liger's take the entropy or the loss along; `torch` and `selective` do not.

Every variant runs in a process of its own, without this repository on its path (our kernels/ would be taken for a
package that transformers looks for), after one warm-up. Forward is timed without autograd, as for old log-probs.
"extra MiB" is the peak of the first forward + backward above a base that holds hidden, weight and their gradients:
allocated memory on CUDA (one call later, after compiling), resident memory on a CPU. "TFLOP/s" is 6 N D V / time,
so recomputing earns nothing. bf16 on CUDA, float32 on a CPU. "load" is the machine's at the end of the variant.

Dimensions: N tokens (rows), D hidden size, V vocabulary, C columns of a slice.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RIVALS = ("torch", "selective", "fused", "chunked", "liger", "products3", "products4")
CUDA_ONLY = ("fused", "liger")


def load_function(name, device):
    """hidden_ND, weight_VD, targets_N -> logprobs_N (liger: minus their mean); ImportError if it is not there."""
    if name == "ours":
        sys.path.insert(0, str(ROOT))
        if device == "cuda":
            from kernels.linear_logprob import linear_logprob
        else:
            from model import linear_logprob
        return lambda hidden_ND, weight_VD, targets_N: linear_logprob(hidden_ND, weight_VD, targets_N)[0]
    if name == "torch":
        return lambda hidden_ND, weight_VD, targets_N: torch.log_softmax(
            (hidden_ND @ weight_VD.T).float(), dim=-1).gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
    if name == "selective":
        from trl.trainer.utils import selective_log_softmax

        return lambda hidden_ND, weight_VD, targets_N: selective_log_softmax(hidden_ND @ weight_VD.T, targets_N)
    if name == "fused":
        from trl.kernels import selective_log_softmax_and_entropy

        return lambda hidden_ND, weight_VD, targets_N: selective_log_softmax_and_entropy(
            hidden_ND @ weight_VD.T, targets_N)[0]
    if name == "chunked":
        from trl.kernels import ChunkedLogProbFunction

        # No bias, temperature 1, 8192 columns, no soft cap, scale 1, and the entropy, as its GRPO trainer asks.
        return lambda hidden_ND, weight_VD, targets_N: ChunkedLogProbFunction.apply(
            hidden_ND, weight_VD, None, targets_N, 1.0, 8192, None, 1.0, ("entropy",))[0]
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda hidden_ND, weight_VD, targets_N: LigerFusedLinearCrossEntropyFunction.apply(
        hidden_ND, weight_VD, targets_N)[0]


def autograd_calls(function, hidden_ND, weight_VD, targets_N, upstream_N):
    """(forward, forward and backward) of a function, as calls without arguments."""
    def forward():
        with torch.no_grad():
            function(hidden_ND, weight_VD, targets_N)

    def both():
        logprobs_N = function(hidden_ND, weight_VD, targets_N)
        logprobs_N.backward(upstream_N if logprobs_N.ndim else None)
    return forward, both


def product_calls(recompute, hidden_ND, weight_VD):
    """(one product, all three or four) over slices of the vocabulary, without the work between them."""
    hidden_ND, weight_VD, C = hidden_ND.detach(), weight_VD.detach(), 4096
    is_half = hidden_ND.dtype == torch.bfloat16
    kinds = {"out_dtype": torch.float32} if is_half else {}
    tile_NC = torch.empty(len(hidden_ND), C, device=hidden_ND.device)
    grad_NC = tile_NC.to(hidden_ND.dtype).zero_()
    total_ND, grad_VD = torch.zeros_like(hidden_ND, dtype=torch.float32), torch.zeros_like(weight_VD)

    def forward():
        for weight_CD in weight_VD.split(C):
            torch.mm(hidden_ND, weight_CD.T, out=tile_NC[:, :len(weight_CD)], **kinds)

    def both():
        for _ in range(2 if recompute else 1):
            forward()
        for weight_CD, grad_CD in zip(weight_VD.split(C), grad_VD.split(C)):
            part_NC = grad_NC[:, :len(weight_CD)]
            torch.mm(part_NC.T, hidden_ND, out=grad_CD)
            torch.addmm(total_ND, part_NC, weight_CD, out=total_ND, **kinds)
    return forward, both


def seconds_of(call, device, repeats):
    """Seconds of each of `repeats` calls."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return samples


def resident_mib(field):
    """VmRSS or VmHWM, the present and the largest resident memory of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}")


def extra_mib(call, device):
    """Peak memory of one call above what is there before it."""
    if device == "cpu":
        before = resident_mib("VmRSS")
        call()
        return resident_mib("VmHWM") - before
    call()  # compiles kernels and lets cuBLAS take its workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(name, args):
    """One variant, in this process: its measurements, or why there are none, as a dict."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.manual_seed(0)
    # Filled in place: temporaries of the setup must not count as the variant's peak.
    hidden_ND = torch.empty(args.rows, args.hidden, device=args.device, dtype=dtype).normal_().requires_grad_()
    weight_VD = torch.empty(args.vocab, args.hidden, device=args.device, dtype=dtype).normal_(std=0.05)
    weight_VD.requires_grad_().grad = torch.zeros_like(weight_VD)
    hidden_ND.grad = torch.zeros_like(hidden_ND)
    weight_VD.grad.add_(0)  # touched, so that its pages are resident
    targets_N = torch.randint(0, args.vocab, (args.rows,), device=args.device)
    upstream_N = torch.randn(args.rows, device=args.device)
    try:
        if name.startswith("products"):
            forward, both = product_calls(name == "products4", hidden_ND, weight_VD)
        else:
            function = load_function(name, args.device)
            forward, both = autograd_calls(function, hidden_ND, weight_VD, targets_N, upstream_N)
        extra = extra_mib(both, args.device)
    except (ImportError, torch.OutOfMemoryError) as error:
        return {"absent": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    forward()
    return {"extra": extra, "forward": seconds_of(forward, args.device, args.repeats),
            "both": seconds_of(both, args.device, args.repeats), "load": os.getloadavg()[0]}


def run_variant(name, args):
    """`measure` in a process of its own, in a folder from which this repository cannot be imported."""
    sizes = [f"--{key}={getattr(args, key)}" for key in ("device", "rows", "hidden", "vocab", "repeats")]
    command = [sys.executable, str(Path(__file__).resolve()), *sizes, "--child", name]
    # Spinning threads lose everything to one busy neighbour; see docs of GNU OpenMP.
    env = {"OMP_WAIT_POLICY": "passive", **os.environ}
    done = subprocess.run(command, cwd="/", env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"absent": f"its process ended with code {done.returncode}, see above"}
    return json.loads(done.stdout.splitlines()[-1])


def header(device):
    """When, where, with what, and by which command."""
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{os.cpu_count()} x {platform.machine()} CPU, {torch.get_num_threads()} threads"
    try:
        import triton

        versions = f"torch {torch.__version__}, triton {triton.__version__}"
    except ImportError:
        versions = f"torch {torch.__version__}, no triton"
    return (f"{datetime.now():%Y-%m-%d %H:%M} | {machine}, load {os.getloadavg()[0]:.1f} | {versions} | "
            f"python {shlex.join(sys.argv)}")


def print_row(name, result, args, baseline):
    """One line of the table; seconds are medians, the range in brackets is that of forward + backward."""
    if "absent" in result:
        print(f"{name:<10} left out: {result['absent']}", flush=True)
        return
    forward, both = statistics.median(result["forward"]), statistics.median(result["both"])
    span = f"{min(result['both']):.4g} - {max(result['both']):.4g}"
    speed = 6 * args.rows * args.hidden * args.vocab / both / 1e12
    ratio = f"{baseline / both:8.2f}" if baseline else f"{'-':>8}"
    print(f"{name:<10} {forward:>10.4f} {both:>10.4f} {span:>19} {ratio} {result['extra']:>10.0f} {speed:>9.3f} "
          f"{result['load']:>6.1f}", flush=True)


def parse_args():
    """The command line, with sizes that suit the device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="default: 16384 on CUDA, 256 on a CPU")
    parser.add_argument("--hidden", type=int, help="default: 1536 on CUDA, 896 on a CPU (Qwen2.5 1.5B, 0.5B)")
    parser.add_argument("--vocab", type=int, default=151936, help="default: Qwen2.5's 151936")
    parser.add_argument("--repeats", type=int, default=5, help="samples per median, default 5")
    parser.add_argument("--rival", nargs="+", choices=RIVALS, help="default: all of them")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    is_cuda = args.device == "cuda"
    if is_cuda and not torch.cuda.is_available():
        parser.error("--device cuda was given, but torch sees no CUDA device; allowed here: --device cpu")
    args.rows = (16384 if is_cuda else 256) if args.rows is None else args.rows
    args.hidden = (1536 if is_cuda else 896) if args.hidden is None else args.hidden
    if min(args.rows, args.hidden, args.vocab, args.repeats) < 1:
        parser.error("--rows, --hidden, --vocab and --repeats must be at least 1")
    return args


def main():
    args = parse_args()
    if args.child:
        # The script's own folder goes too: what lies in it is no package for others to find.
        sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "bench")]
        print(json.dumps(measure(args.child, args)))
        return
    print(header(args.device))
    print(f"N = {args.rows}, D = {args.hidden}, V = {args.vocab}; seconds, medians of {args.repeats}; ratio: torch's "
          "time / this one's")
    print(f"{'':<10} {'forward':>10} {'fwd+bwd':>10} {'(range)':>19} {'ratio':>8} {'extra MiB':>10} {'TFLOP/s':>9} "
          f"{'load':>6}")
    baseline = None
    for name in sorted({"ours", *(args.rival or RIVALS)}, key=("torch", "ours", *RIVALS).index):
        if name in CUDA_ONLY and args.device == "cpu":
            print(f"{name:<10} left out: it needs CUDA")
            continue
        result = run_variant(name, args)
        if name == "torch" and "both" in result:
            baseline = statistics.median(result["both"])
        print_row(name, result, args, baseline)


if __name__ == "__main__":
    main()
