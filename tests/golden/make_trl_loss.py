"""Make trl_loss.json: random inputs of a GRPO loss, and the loss and gradient that TRL gives for them.

    cd /tmp && python PROJECT/tests/golden/make_trl_loss.py

Versions used for the committed file: trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU), float64. Run it as
a file and from another directory: our folder `kernels` has the name of a package that transformers probes for.

TRL has no loss function of its own: the loss is the method GRPOTrainer._compute_loss. It is called here,
unchanged, on a stand-in for the trainer that holds the settings it reads (clip range, beta, loss type) and whose
`_get_per_token_logps_and_entropies` hands out a leaf tensor of log-probs instead of running a model. The stand-in
is in evaluation mode, in which TRL divides by nothing but the loss type's own normaliser:

    grpo    mean over sequences of their token means
    bnpo    mean over the tokens of this batch
    dapo    sum over tokens / num_items_in_batch, the number of tokens of the whole update (here 40 more than in
            this batch, as if it were one micro-batch of several)
"""
import collections
import json
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer

HERE = Path(__file__).parent
LENGTHS = [7, 1, 4, 6, 3, 7]            # active tokens of each row; the rest is padding
OTHER_TOKENS = 40                       # tokens of the update's other micro-batches
SETTINGS = [{"clip_low": 0.2, "clip_high": 0.2, "kl": 0.0}, {"clip_low": 0.1, "clip_high": 0.28, "kl": 0.0},
            {"clip_low": 0.2, "clip_high": 0.2, "kl": 0.04}]
CASES = [{"loss_type": loss_type, **settings} for loss_type in ("grpo", "bnpo", "dapo") for settings in SETTINGS]


def make_inputs():
    """Log-probs around -1.5, with ratios on both sides of every clip bound; padding holds junk."""
    generator = torch.Generator().manual_seed(0)
    shape = 3, len(LENGTHS), max(LENGTHS)
    new_BT, old_BT, ref_BT = -1.5 + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages_B = torch.tensor([1.5, -0.5, 0.0, -1.25, 0.75, -0.5], dtype=torch.float64)
    return [x.round(decimals=4) for x in (new_BT, old_BT, ref_BT, advantages_B)]


def trl_loss(case, new_BT, old_BT, ref_BT, advantages_B):
    """(loss, gradient with respect to the new log-probs) by TRL's own method."""
    leaf_BT = new_BT.clone().requires_grad_()
    mask_BT = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        loss_type=case["loss_type"], epsilon_low=case["clip_low"], epsilon_high=case["clip_high"], beta=case["kl"],
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), importance_sampling_level="token",
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        vllm_importance_sampling_correction=False, _entropy_bonus_enabled=False, accelerator=accelerator,
        model=SimpleNamespace(training=False), _metrics={"eval": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf_BT, torch.zeros_like(leaf_BT), None))
    ids_BT = torch.zeros_like(mask_BT)
    loss = GRPOTrainer._compute_loss(trainer, None, {
        "prompt_ids": ids_BT[:, :2], "prompt_mask": mask_BT[:, :2], "completion_ids": ids_BT,
        "completion_mask": mask_BT, "advantages": advantages_B, "old_per_token_logps": old_BT,
        "ref_per_token_logps": ref_BT, "num_items_in_batch": mask_BT.sum() + OTHER_TOKENS})
    loss.backward()
    return loss.item(), leaf_BT.grad.tolist()


def main():
    inputs = make_inputs()
    results = []
    for case in CASES:
        loss, gradient = trl_loss(case, *inputs)
        results.append(case | {"loss": loss, "gradient": gradient})
    names = ("logprobs", "old_logprobs", "reference", "advantages")
    record = {"trl": trl.__version__, "lengths": LENGTHS, "other_tokens": OTHER_TOKENS,
              **{name: x.tolist() for name, x in zip(names, inputs)}, "cases": results}
    (HERE / "trl_loss.json").write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
