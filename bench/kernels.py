"""Times kernels.token_logprob against plain torch on the same logits, in the same run.

    python bench/kernels.py [--device cuda|cpu] [--rows N] [--vocab V]

The rival is log_softmax + gather in float32, as most trainers write it, without the entropy. "ratio" is the
rival's time divided by the row's own: above 1 is faster. "useful GB/s" divides the bytes that nothing avoids
(logits read once forward; read once more and the gradient written backward) by the time, to be held against
the memory bandwidth of the card.

Dimensions: N tokens (rows), V vocabulary.
"""

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path

import torch

# At the front: this script's own folder is on the path too, and holds a kernels.py that is not the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def plain_logprob(logits_NV, targets_N, temperature=1.0):
    all_logprobs_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    return all_logprobs_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1), None


def seconds_of(call, device, repeats):
    """Median seconds per call over `repeats` samples, after two to warm up (compiler, allocator)."""
    # Ten calls between two synchronisations: all but the first launch hide behind the kernel before them.
    calls = 10 if device == "cuda" else 1
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    samples = []
    for _ in range(repeats + 2):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples[2:])


def times_of(function, logits_NV, targets_N, upstream_N, repeats):
    """(forward, forward + backward) in seconds; forward alone runs without autograd, as for old log-probs."""
    device = logits_NV.device.type

    def forward():
        with torch.no_grad():
            function(logits_NV, targets_N)

    def forward_backward():
        logits_NV.grad = None  # else the gradient of the last round is added to, which costs its own reads
        function(logits_NV, targets_N)[0].backward(upstream_N)

    times = seconds_of(forward, device, repeats), seconds_of(forward_backward, device, repeats)
    logits_NV.grad = None
    return times


def print_table(times, N, V, itemsize):
    """times: name -> (forward, forward + backward) in seconds; the first entry is the rival of the ratios."""
    rival = next(iter(times.values()))
    for part, label, passes in ((0, "forward", 1), (1, "forward + backward", 3)):
        print(f"\n{label:<38} {'ms':>10} {'ratio':>8} {'useful GB/s':>12}")
        for name, seconds in times.items():
            ratio, speed = rival[part] / seconds[part], passes * N * V * itemsize / seconds[part] / 1e9
            print(f"  {name:<36} {seconds[part] * 1e3:>10.3f} {ratio:>8.2f} {speed:>12.1f}")


def header(device):
    if device == "cuda":
        card = torch.cuda.get_device_name()
    else:
        # A CPU timing without the load beside it means nothing: one busy neighbour can triple it.
        card = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    try:
        import triton

        versions = f"torch {torch.__version__}, triton {triton.__version__}"
    except ImportError:
        versions = f"torch {torch.__version__}, no triton"
    return f"{datetime.now():%Y-%m-%d %H:%M} | {card} | {versions} | python {shlex.join(sys.argv)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device)
    parser.add_argument("--rows", type=int, help="default: 4096 on CUDA, 128 on a CPU")
    parser.add_argument("--vocab", type=int, default=151936, help="default: Qwen2.5's 151936")
    parser.add_argument("--repeats", type=int, default=7, help="samples per median, at least 5")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda was given, but torch sees no CUDA device; allowed here: --device cpu")
    N, V = args.rows or (4096 if args.device == "cuda" else 128), args.vocab
    if N < 1 or V < 1 or args.repeats < 5:
        parser.error(f"--rows {N} --vocab {V} --repeats {args.repeats}: at least 1, 1 and 5 are allowed")
    print(header(args.device))
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    print(f"{N} rows x {V} logits, {dtype}, medians of {args.repeats}")

    torch.manual_seed(0)
    logits_NV = torch.randn(N, V, device=args.device, dtype=dtype).mul_(3).requires_grad_()
    targets_N = torch.randint(0, V, (N,), device=args.device)
    upstream_N = torch.randn(N, device=args.device)
    functions = {"log_softmax + gather": plain_logprob}
    if args.device == "cuda":
        from kernels.logprob import reference_token_logprob, token_logprob

        functions["reference (with entropy)"] = reference_token_logprob
        functions["Triton (with entropy)"] = token_logprob
    else:
        from model import token_logprob

        print("The Triton kernel is not timed here (its interpreter is no measure): plain forms only.")
        functions["model.token_logprob (with entropy)"] = token_logprob
    tensors = logits_NV, targets_N, upstream_N
    times = {name: times_of(function, *tensors, args.repeats) for name, function in functions.items()}
    print_table(times, N, V, logits_NV.element_size())


if __name__ == "__main__":
    main()
