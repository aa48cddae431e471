"""Times linear_logprob, log-prob and entropy from hidden states and LM head, on random numbers, by turns.

    python bench/head.py [--device cuda|cpu] [--rows N] [--hidden D] [--vocab V] [--rival NAME ...]

The rivals: `products` are the four matrix products that ours needs (logits twice, both gradients) and nothing
else, a floor; `torch` is log_softmax + gather in float32 as most trainers write it, without an entropy;
`fused` is TRL's Triton kernel on stored logits, `chunked` TRL's ChunkedLogProbFunction, `liger` Liger's fused
linear cross entropy, which can only do the mean.

"seconds" are those of forward and backward, "forward" is timed without autograd, as for old log-probs; the
gradients are part of the base of the peak. "TFLOP/s" is 6 N D V / time, so recomputing earns nothing. bf16 on
CUDA, float32 on a CPU.

Dimensions: N tokens (rows), D hidden size, V vocabulary.
"""
import importlib
import statistics

import timing
import torch

RIVALS = ("products", "torch", "fused", "chunked", "liger")
timing.import_rival("trl", wanted=True)  # before our own files


def load_function(name, device):
    """hidden_ND, weight_VD, targets_N -> logprobs_N (liger: minus their mean); or ImportError."""
    if name == "ours":
        ours = importlib.import_module("kernels" if device.type == "cuda" else "model").linear_logprob
        return lambda hidden_ND, weight_VD, targets_N: ours(hidden_ND, weight_VD, targets_N)[0]
    if name == "products":
        return Products.apply
    if name == "torch":
        return lambda hidden_ND, weight_VD, targets_N: torch.log_softmax(
            (hidden_ND @ weight_VD.T).float(), dim=-1).gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
    if name == "fused":
        from trl.kernels import selective_log_softmax_and_entropy

        return lambda hidden_ND, weight_VD, targets_N: selective_log_softmax_and_entropy(
            hidden_ND @ weight_VD.T, targets_N)[0]
    if name == "chunked":
        from trl.kernels import ChunkedLogProbFunction

        # No bias, temperature 1, 8192 columns, no soft cap, scale 1, the entropy: as its trainer asks.
        return lambda hidden_ND, weight_VD, targets_N: ChunkedLogProbFunction.apply(
            hidden_ND, weight_VD, None, targets_N, 1.0, 8192, None, 1.0, ("entropy",))[0]
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda hidden_ND, weight_VD, targets_N: LigerFusedLinearCrossEntropyFunction.apply(
        hidden_ND, weight_VD, targets_N)[0]


class Products(torch.autograd.Function):
    """The products of a head whose logits are not stored, a sixteenth of the vocabulary at a time, and no
    softmax: results are meaningless."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N):
        ctx.save_for_backward(hidden_ND, weight_VD)
        for weight_CD in weight_VD.chunk(16):
            logits_NC = hidden_ND @ weight_CD.T
        return logits_NC[:, 0].float()

    @staticmethod
    def backward(ctx, _upstream_N):
        hidden_ND, weight_VD = ctx.saved_tensors
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_weight_VD = torch.empty_like(weight_VD)
        for weight_CD, grad_CD in zip(weight_VD.chunk(16), grad_weight_VD.chunk(16)):
            logits_NC = hidden_ND @ weight_CD.T
            grad_hidden_ND.addmm_(logits_NC, weight_CD)
            torch.mm(logits_NC.T, hidden_ND, out=grad_CD)
        return grad_hidden_ND, grad_weight_VD, None


class HeadVariant:
    """One way to the log-probs; a call returns (seconds of forward and backward, of forward alone)."""

    def __init__(self, name, device, inputs, upstream_N):
        self.name = name
        self.device = device
        self.inputs = inputs
        self.upstream_N = upstream_N
        self.function = None

    def __call__(self):
        if self.function is None:  # here, so that what is not installed is told like what does not run
            self.function = load_function(self.name, self.device)
        began = timing.now(self.device)
        logprobs_N = self.function(*self.inputs)
        logprobs_N.backward(self.upstream_N if logprobs_N.ndim else None)
        middle = timing.now(self.device)
        with torch.no_grad():
            self.function(*self.inputs)
        return middle - began, timing.now(self.device) - middle


def main():
    parser = timing.new_parser(__doc__)
    parser.add_argument("--rows", type=int, help="default: 16384 on CUDA, 256 on a CPU")
    parser.add_argument("--hidden", type=int, help="default: 1536 on CUDA, 896 on a CPU (Qwen2.5 1.5B, 0.5B)")
    parser.add_argument("--vocab", type=int, default=151936, help="default: Qwen2.5's 151936")
    parser.add_argument("--rival", nargs="+", choices=RIVALS, default=RIVALS, help="default: all of them")
    args = timing.parse(parser)
    is_cuda = args.device.type == "cuda"
    rows = args.rows or (16384 if is_cuda else 256)
    hidden = args.hidden or (1536 if is_cuda else 896)
    # Filled in place: temporaries of the setup must not count as a variant's peak.
    hidden_ND = torch.empty(rows, hidden, device=args.device, dtype=args.dtype).normal_().requires_grad_()
    weight_VD = torch.empty(args.vocab, hidden, device=args.device, dtype=args.dtype).normal_(std=0.05)
    weight_VD.requires_grad_().grad = torch.zeros_like(weight_VD)
    hidden_ND.grad = torch.zeros_like(hidden_ND)
    weight_VD.grad.add_(0)  # touched, so that its pages are resident
    targets_N = torch.randint(0, args.vocab, (rows,), device=args.device)
    upstream_N = torch.randn(rows, device=args.device)
    variants = [HeadVariant(name, args.device, (hidden_ND, weight_VD, targets_N), upstream_N)
                for name in ("ours", *args.rival)]
    results, failed = timing.take_turns(variants, args.device, args.repeats)

    def more(_one, samples):
        both, forward = (statistics.median(column) for column in list(zip(*samples))[:2])
        return f"{forward:.4f}", f"{6 * rows * hidden * args.vocab / both / 1e12:.3f}"
    write = timing.writer(__doc__, args, f"N = {rows}, D = {hidden}, V = {args.vocab}")
    write(timing.comparison(results, failed, ("forward s", "TFLOP/s"), more))


if __name__ == "__main__":
    main()
