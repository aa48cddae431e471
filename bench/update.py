"""Times an update on made-up rollouts: a shared prefix once, against whole rows padded to the right.

    python bench/update.py                                    # every case that suits the device
    python bench/update.py --case 0.5b --layers 6 --threads 2 --write bench/results/update-cpu.md

"shared" is bread.update with a stand-in for the optimizer. "padded" gives the same rollouts to the same loss
and head, but every rollout is a row (context, completion, padding) of one ordinary causal pass. "recompute":
activations are computed again in the backward pass, as under --recompute. All send a gradient to every
parameter; that its norm agrees is checked.

Dimension key: T positions   N tokens that carry loss   D hidden size   B rows of a micro-batch
"""
import dataclasses
import importlib
import random
import statistics
from types import SimpleNamespace

import timing
import torch

import bread
from config import Config


@dataclasses.dataclass(frozen=True)
class Case:
    """`groups` contexts of `context` tokens, with `group_size` completions of shortest..longest tokens."""
    shape: str
    groups: int
    group_size: int
    context: int
    shortest: int
    longest: int
    tokens: int  # per backward pass, prefixes once, for all variants


CASES = {
    "tiny": Case("tiny", 8, 8, 40, 20, 70, 1600),
    # Whole rows of a group at once would keep 15 GB of activations: two backward passes for either variant.
    "0.5b": Case("qwen2.5-0.5b", 1, 8, 512, 128, 128, 1024),
    # Those need a GPU. Lengths as people have them, of prompts about GSM8K's, and the equal ones of papers.
    "135m-ragged": Case("smollm2-135m", 32, 8, 90, 20, 192, 16384),
    "1.5b-ragged": Case("qwen2.5-1.5b", 8, 8, 90, 64, 512, 16384),
    "1.5b": Case("qwen2.5-1.5b", 2, 16, 512, 512, 512, 8704)}


def make_groups(case):
    """Groups of rollouts that nobody sampled, advantages +1 and -1. Any vocabulary has ids below 64."""
    rng = random.Random(0)
    groups = []
    for _ in range(case.groups):
        context = rng.choices(range(64), k=case.context)
        groups.append([])
        for i in range(case.group_size):
            ids = rng.choices(range(64), k=rng.randint(case.shortest, case.longest))
            groups[-1].append(bread.Rollout(None, 0, context, [], ids, [0.0] * len(ids), 0.0, "length",
                                            advantage=1.0 - 2 * (i % 2)))
    return groups


def on_policy_loss(config, batch, logprobs_N):
    """bread's loss with this pass's own log-probs as the old ones: every ratio is 1, nothing is clipped."""
    batch.old_logprobs_N = logprobs_N.detach()
    return bread.batch_loss(config, batch, logprobs_N)


def padded_update(policy, optimizer, groups):
    """The rival of bread.update: forward and backward over whole rows, padded on the right."""
    rollouts = [rollout for group in groups for rollout in group]
    share = 1 / sum(len(rollout.completion_ids) for rollout in rollouts)
    packs = bread.make_batches(rollouts, policy.micro_batch_tokens, lambda _: share, policy.device)
    for contexts, batches in packs:
        for batch in batches:
            rows = [contexts[i] + ids for i, ids in batch.rows]
            T = max(map(len, rows))
            tokens_BT = torch.tensor([ids + [0] * (T - len(ids)) for ids in rows], device=policy.device)
            places = []  # in the flattened (B, T), of the N tokens that predict a completion's
            for b, (whole, (_, ids)) in enumerate(zip(rows, batch.rows)):
                places += range(b * T + len(whole) - len(ids), b * T + len(whole))
            hidden_ND = policy.model(tokens_BT).flatten(0, 1)[places]
            weight_VD = policy.model.lm_head.weight
            logprobs_N, _ = policy.ops.linear_logprob(hidden_ND, weight_VD, batch.targets_N)
            on_policy_loss(policy.config, batch, logprobs_N).backward()
    optimizer.step()


class UpdateVariant:
    """One way to compute the update; a call returns (seconds,)."""

    def __init__(self, name, policy, groups):
        self.name = name
        self.policy = policy
        self.groups = groups
        self.ranks = bread.Ranks(str(policy.device))
        self.norm = None
        self.tokens = None  # that ran through the network in a call, padding included

    def __call__(self):
        counts = []
        model = self.policy.model
        model.recompute = "recompute" in self.name
        hook = model.register_forward_pre_hook(lambda _model, inputs: counts.append(inputs[0].numel()))
        began = timing.now(self.policy.device)
        try:
            if self.name.startswith("shared"):
                bread.update(self.policy, self, self.ranks, self.groups, 0.0, on_policy_loss)
            else:
                padded_update(self.policy, self, self.groups)
            return (timing.now(self.policy.device) - began,)
        finally:
            self.tokens = sum(counts)
            hook.remove()
            model.zero_grad(set_to_none=True)  # also what a pass that ran out of memory has left

    def step(self, *_):
        """Stands in for the optimizer's: notes the gradient's norm, in the untimed first call."""
        if self.norm is None:
            norms = [weight.grad.norm(dtype=torch.float32) for weight in self.policy.model.parameters()]
            self.norm = torch.linalg.vector_norm(torch.stack(norms)).item()


def measure_case(case, args, rate):
    """Measure one case. "tokens through": what the network was given, padding included. TFLOP/s: 6 x
    (parameters of the layers x tokens through + those of the head x tokens that carry loss) / time."""
    groups = make_groups(case)
    # What bread.update needs of a policy.
    config = Config(group_size=case.group_size)
    model = timing.random_model(case.shape, args.layers, args.dtype, args.device)
    ops = importlib.import_module("kernels" if args.device.type == "cuda" else "model")
    policy = SimpleNamespace(config=config, device=args.device, model=model, reference=None, ops=ops,
                             micro_batch_tokens=case.tokens)
    names = "shared", "padded", "shared, recompute"
    variants = [UpdateVariant(name, policy, groups) for name in names]
    results, failed = timing.take_turns(variants, args.device, args.repeats)
    norms = [one.norm for one in results]
    tolerance = 0.05 if args.dtype == torch.bfloat16 else 1e-3  # bf16 rounds at 2^-8
    assert failed or max(norms) - min(norms) <= tolerance * min(norms), norms
    loss_tokens = sum(len(rollout.completion_ids) for group in groups for rollout in group)
    head = policy.model.lm_head.weight.numel()
    num_parameters = sum(weight.numel() for weight in policy.model.parameters())
    layers = num_parameters - head * (1 if policy.model.config.tie_word_embeddings else 2)

    def more(one, samples):
        median = statistics.median(seconds for seconds, _ in samples)
        speed = 6 * (layers * one.tokens + head * loss_tokens) / median
        return f"{loss_tokens / median:,.0f}", f"{one.tokens:,}", f"{speed / 1e12:.3g}", f"{speed / rate:.0%}"
    heads = ("completion tokens/s", "tokens through", "TFLOP/s", "of the matmul")
    title = (f"\n**{case.shape}, {num_parameters / 1e6:,.1f}M parameters: {case.groups} x {case.group_size} "
             f"rollouts, {case.context} + {case.shortest} to {case.longest} tokens, {case.tokens} tokens "
             "per backward pass**")
    return title + "\n\n" + timing.comparison(results, failed, heads, more)


def main():
    parser = timing.new_parser(__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: all, or tiny and 0.5b on a CPU")
    parser.add_argument("--layers", type=int, help="fewer than the real shapes'; the head then weighs more")
    parser.add_argument("--quick", action="store_true", help="an eighth of all lengths: a smoke run")
    args = timing.parse(parser)
    rate = timing.matmul_rate(args.device, args.dtype)
    write = timing.writer(__doc__, args, f"matrix product {rate / 1e12:.3g} TFLOP/s")
    for name in args.case or (CASES if args.device.type == "cuda" else ["tiny", "0.5b"]):
        case = CASES[name]
        if args.quick:
            lengths = {key: getattr(case, key) // 8 for key in ("context", "shortest", "longest", "tokens")}
            case = dataclasses.replace(case, **lengths)
        write(measure_case(case, args, rate))


if __name__ == "__main__":
    main()
