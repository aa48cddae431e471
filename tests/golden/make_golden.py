"""Make the golden files of tests/test_model.py: tiny random checkpoints and their logits in transformers.

    python tests/golden/make_golden.py [--stories FOLDER]

Versions used for the committed files: transformers 5.23.0, torch 2.13.0 (CPU), safetensors 0.8.0. Run it as a
file, from any directory: our folder `kernels` has the name of a package that transformers looks for, so the
project root must stay off sys.path. Logits come from transformers' "eager" attention in float32, which shares
no kernel with ours. Written, beside this script:

    cases.json          case -> {"weights", "transformers4", "transformers5"}: both forms of its config.json
    weights/            bfloat16 weights, shared by all cases whose tensors have the same shapes
    logits.safetensors  "tokens" (T,) and one float32 (T, V) tensor for every case
    sharded/            one checkpoint in several shards, as transformers itself saves it
    stories260K.json    200 greedy tokens of a trained model, only with --stories FOLDER (that model's folder)
"""
import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
NUM_TOKENS = 56   # beyond the 16 to 32 positions that the scaled RoPEs call their original window
BASE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "rope_theta": 10000.0, "rope_scaling": None}
WINDOW = {"original_max_position_embeddings": 32}
NO_SLIDING = {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}  # as in Qwen2.5 files

# case: (its weights, model_type, what it adds to BASE; ... removes a field), in the form of transformers 4.
# A lone dict is a rope_scaling.
CASES = {
    "llama": ("llama", "llama", {}),
    "llama_biases": ("llama_biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_multi_head": ("llama_multi_head", "llama", {"num_key_value_heads": ...}),
    "llama_tied": ("llama_tied", "llama", {
        "tie_word_embeddings": True, "rope_theta": ..., "rms_norm_eps": ...}),
    "llama_wide_heads": ("llama_wide_heads", "llama", {"head_dim": 16}),
    "mistral": ("mistral", "mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", "qwen2", {**NO_SLIDING, "rope_theta": 1e6, "rms_norm_eps": 1e-6}),
    "qwen2_tied": ("qwen2_tied", "qwen2", {**NO_SLIDING, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen2_yarn": ("qwen2", "qwen2", {
        **NO_SLIDING, "rope_scaling": {"type": "yarn", "factor": 2.0, **WINDOW}}),
    "qwen3": ("qwen3", "qwen3", {**NO_SLIDING, "head_dim": 12, "attention_bias": True}),
    "qwen3_tied": ("qwen3_tied", "qwen3", {
        "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 1000000}),
    "rope_linear": {"type": "linear", "factor": 4.0},
    "rope_dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "rope_llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    **WINDOW},
    "rope_llama3_no_window": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5,
                              "high_freq_factor": 3.0},
    "rope_yarn": {"rope_type": "yarn", "factor": 4.0, **WINDOW},
    "rope_yarn_attention_factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8, **WINDOW},
    "rope_yarn_mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 2.0, **WINDOW},
    "rope_yarn_betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4, "beta_slow": 0.5, **WINDOW},
    "rope_yarn_untruncated": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4, "beta_slow": 0.5,
                              "truncate": False, **WINDOW},
    "rope_yarn_no_factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    # Odd ones, for the limits of the ramp: one ends before it starts, one beyond the last index.
    "rope_yarn_tiny_window": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 3},
    "rope_yarn_wide_ramp": {"rope_type": "yarn", "factor": 0.5, "beta_fast": 4, "beta_slow": 1e-4, **WINDOW},
}


def configs(entry):
    """(weights, config.json of transformers 4, config.json of transformers 5) of one entry of CASES."""
    if isinstance(entry, dict):  # RoPE cases differ in nothing else; theta 100 puts all frequencies in play
        entry = ("llama_wide_heads", "llama", {"head_dim": 16, "rope_theta": 100.0, "rope_scaling": entry})
    weights, kind, extra = entry
    old = {"model_type": kind, **BASE, **extra}
    old = {name: value for name, value in old.items() if value is not ...}
    new = {name: old[name] for name in old if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    scaling = dict(old["rope_scaling"] or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type"))
    new |= {"dtype": "bfloat16", "rope_parameters": {"rope_theta": old.get("rope_theta", 10000.0), **scaling}}
    return weights, old, new


def load(folder):
    """The transformers model of a folder, in float32; anything missing or unexpected in it is an error."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def random_weights(config, seed):
    """bfloat16 weights for a config: N(0, 0.2), biases too, norms around 1, so that logits are of order 1."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, parameter in model.named_parameters():  # a tied lm_head is not among them
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        state[name] = (1 + noise if "norm" in name else noise).bfloat16()
    return state


@torch.no_grad()
def golden_logits(weights, config, tokens):
    """float32 logits_TV that transformers gives for one config.json and a weights file."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        shutil.copyfile(HERE / "weights" / f"{weights}.safetensors", Path(folder) / "model.safetensors")
        return load(folder)(tokens.unsqueeze(0)).logits[0]


def make_cases(tokens):
    """Weights, both config forms and logits of all cases. The two forms have to agree to the bit."""
    (HERE / "weights").mkdir(exist_ok=True)
    cases, logits, made = {}, {"tokens": tokens}, set()
    for name, entry in CASES.items():
        weights, old, new = configs(entry)
        if weights not in made:
            file = HERE / "weights" / f"{weights}.safetensors"
            save_file(random_weights(old, seed=len(made)), file, {"format": "pt"})
            file.chmod(0o644)  # save_file leaves 0600
            made.add(weights)
        logits[name] = golden_logits(weights, old, tokens)
        assert torch.equal(logits[name], golden_logits(weights, new, tokens)), name
        cases[name] = {"weights": weights, "transformers4": old, "transformers5": new}
        print(f"{name:28s} {weights:18s} standard deviation of the logits {logits[name].std():.2f}")
    save_file(logits, HERE / "logits.safetensors")
    (HERE / "logits.safetensors").chmod(0o644)
    lines = [f'"{name}": {{\n  "weights": "{case["weights"]}",\n  "transformers4": '
             f'{json.dumps(case["transformers4"])},\n  "transformers5": {json.dumps(case["transformers5"])}}}'
             for name, case in cases.items()]
    (HERE / "cases.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def make_sharded():
    """The case "qwen3_tied" once more, as transformers itself writes a checkpoint in shards of 10 KB."""
    with tempfile.TemporaryDirectory() as folder:
        weights, _, new = configs(CASES["qwen3_tied"])
        (Path(folder) / "config.json").write_text(json.dumps(new))
        shutil.copyfile(HERE / "weights" / f"{weights}.safetensors", Path(folder) / "model.safetensors")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    shutil.rmtree(HERE / "sharded", ignore_errors=True)
    model.save_pretrained(HERE / "sharded", max_shard_size="10KB")
    (HERE / "sharded" / "generation_config.json").unlink(missing_ok=True)
    for file in (HERE / "sharded").iterdir():
        file.chmod(0o644)


@torch.no_grad()
def make_stories(folder, count=200):
    """Greedy continuation of the first token by a trained model; no token may win by mere float noise."""
    model, tokens, margins = load(folder), [1], []
    for _ in range(count):
        best = model(torch.tensor([tokens])).logits[0, -1].topk(2)
        tokens.append(best.indices[0].item())
        margins.append((best.values[0] - best.values[1]).item())
    assert min(margins) > 1e-3, min(margins)
    print(f"stories260K: smallest margin between the best two logits {min(margins):.4f}")
    (HERE / "stories260K.json").write_text(json.dumps({"prompt": tokens[:1], "greedy": tokens[1:]}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--stories", help="folder of the stories260K checkpoint; without it that file stays")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    make_cases(torch.randint(0, BASE["vocab_size"], (NUM_TOKENS,), generator=generator))
    make_sharded()
    if arguments.stories:
        make_stories(arguments.stories)


if __name__ == "__main__":
    main()
