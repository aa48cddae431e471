"""Write TRL's loss and gradient of every case into trl_loss.json, beside the inputs of a GRPO loss.

Made with trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU), float64; run it as a file, like make_golden.py.
Inputs are log-probs around -1.5, with ratios on both sides of every clip bound; padding holds junk.
GRPOTrainer._compute_loss is called unchanged, on a stand-in for the trainer that holds the settings it reads
and hands out a leaf of log-probs instead of running a model. In evaluation mode it divides by the loss type's
normaliser only: grpo means over tokens, then sequences; bnpo over this batch's tokens; dapo divides by the
tokens of the whole update, "other_tokens" of other micro-batches included.
"""
import collections
import json
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer


def trl_loss(golden, case):
    """(loss, gradient with respect to the new log-probs) by TRL's own method."""
    leaf_BT, old_BT, ref_BT, advantages_B = (torch.tensor(golden[name], dtype=torch.float64) for name in
                                             ("logprobs", "old_logprobs", "reference", "advantages"))
    leaf_BT.requires_grad_()
    mask_BT = (torch.arange(leaf_BT.shape[1]) < torch.tensor(golden["lengths"])[:, None]).long()
    trainer = SimpleNamespace(
        loss_type=case["loss_type"], epsilon_low=case["clip_low"], epsilon_high=case["clip_high"],
        beta=case["kl"], args=SimpleNamespace(delta=None, use_bias_correction_kl=False), use_vllm=False,
        importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"eval": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf_BT, torch.zeros_like(leaf_BT), None))
    loss = GRPOTrainer._compute_loss(trainer, None, {
        "prompt_ids": mask_BT[:, :2], "prompt_mask": mask_BT[:, :2], "completion_ids": mask_BT,  # ids: any
        "completion_mask": mask_BT, "advantages": advantages_B, "old_per_token_logps": old_BT,
        "ref_per_token_logps": ref_BT, "num_items_in_batch": mask_BT.sum() + golden["other_tokens"]})
    loss.backward()
    return loss.item(), leaf_BT.grad.tolist()


if __name__ == "__main__":
    file = Path(__file__).with_name("trl_loss.json")
    golden = json.loads(file.read_text()) | {"trl": trl.__version__}
    for case in golden["cases"]:
        case["loss"], case["gradient"] = trl_loss(golden, case)
    file.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
