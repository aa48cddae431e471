"""Make the golden files of tests/test_model.py: tiny random checkpoints and their logits in transformers.

Made with transformers 5.23.0, torch 2.13.0 (CPU), safetensors 0.8.0. Run it as a file: our folder `kernels`
has the name of a package that transformers looks for. "eager" attention shares no kernel with ours.
cases.json has both forms of every config.json, of transformers 4 and 5; logits.safetensors "tokens" (T,) and
the float32 (T, V) of each case; sharded/ is one of them in several shards, as transformers itself saves it.
"""
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
BASE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rope_theta": 10000.0,
        "hidden_act": "silu", "rope_scaling": None}
WINDOW = {"original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
FULL = {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}  # as in Qwen2.5 files

# case: (its weights, what it adds to BASE; ... removes), as in transformers 4; or only a rope_scaling
CASES = {
    "llama": ("llama", {}),
    "llama_biases": ("llama_biases", {"attention_bias": True, "mlp_bias": True}),
    "llama_multi_head": ("llama_multi_head", {"num_key_value_heads": ...}),
    "llama_tied": ("llama_tied", {"tie_word_embeddings": True, "rope_theta": ..., "rms_norm_eps": ...}),
    "llama_wide_heads": ("llama_wide_heads", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {**FULL, "rope_theta": 1e6, "rms_norm_eps": 1e-6}),
    "qwen2_tied": ("qwen2_tied", {**FULL, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2_yarn": ("qwen2", FULL | {"rope_scaling": {"type": "yarn", "factor": 2.0, **WINDOW}}),
    "qwen3": ("qwen3", {**FULL, "head_dim": 12, "attention_bias": True}),
    "qwen3_tied": ("qwen3_tied", {"tie_word_embeddings": True, "head_dim": 16, "rope_theta": 1000000}),
    "rope_linear": {"type": "linear", "factor": 4.0},
    "rope_dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "rope_llama3": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **WINDOW},
    "rope_llama3_no_window": {**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 3.0},
    "rope_yarn": {"rope_type": "yarn", "factor": 4.0, **WINDOW},
    "rope_yarn_attention_factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8, **WINDOW},
    "rope_yarn_betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4, "beta_slow": 0.5, **WINDOW},
    "rope_yarn_no_factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    # Odd ones, for the limits of the ramp: one ends before it starts, one beyond the last index.
    "rope_yarn_tiny_window": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 3},
    "rope_yarn_wide_ramp": {"rope_type": "yarn", "factor": 0.5, "beta_fast": 4, "beta_slow": 1e-4, **WINDOW},
}


def configs(entry):
    """(weights, config.json of transformers 4, config.json of transformers 5) of one entry of CASES."""
    if isinstance(entry, dict):  # RoPE cases differ in nothing else; theta 100 puts all frequencies in play
        entry = ("llama_wide_heads", {"head_dim": 16, "rope_theta": 100.0, "rope_scaling": entry})
    weights, extra = entry
    old = {"model_type": weights.split("_")[0], **BASE, **extra}
    old = {name: value for name, value in old.items() if value is not ...}
    new = {name: old[name] for name in old if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    scaling = dict(old["rope_scaling"] or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type"))
    new |= {"dtype": "bfloat16", "rope_parameters": {"rope_theta": old.get("rope_theta", 10000.0), **scaling}}
    return weights, old, new


def random_weights(config, seed):
    """bfloat16 weights for a config: N(0, 0.2), biases too, norms around 1, so that logits are of order 1."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, parameter in model.named_parameters():  # a tied lm_head is not among them
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        state[name] = (1 + noise if "norm" in name else noise).bfloat16()
    return state


def build(config, state, dtype=torch.float32):
    """The model in transformers, from a folder of these weights."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(state, Path(folder, "model.safetensors"), {"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    tokens = torch.randint(0, 40, (56,), generator=torch.Generator().manual_seed(0))  # beyond any WINDOW
    states, cases = {}, {}
    logits = {"tokens": tokens}
    for name, entry in CASES.items():
        weights, old, new = configs(entry)
        if weights not in states:
            states[weights] = random_weights(old, seed=len(states))
            save_file(states[weights], HERE / "weights" / f"{weights}.safetensors", {"format": "pt"})
        logits[name], again = (build(form, states[weights])(tokens[None]).logits[0] for form in (old, new))
        assert torch.equal(logits[name], again), name  # a matrix that was missing would be random
        for other, case in cases.items():  # were two of the same weights equal, agreement would be cheap
            assert case["weights"] != weights or (logits[name] - logits[other]).abs().max() > 0.4, other
        cases[name] = {"weights": weights, "transformers4": old, "transformers5": new}
    save_file(logits, HERE / "logits.safetensors")
    (HERE / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")
    model = build(cases["qwen3_tied"]["transformers5"], states["qwen3_tied"], torch.bfloat16)
    model.save_pretrained(HERE / "sharded", max_shard_size="10KB")
