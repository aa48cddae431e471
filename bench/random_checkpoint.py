"""Write a checkpoint with random weights in the shape of a real model, to time and test real sizes without a download.

    python bench/random_checkpoint.py OUTPUT [--shape qwen2.5-0.5b] [--tokenizer FOLDER] [--layers N]

--tokenizer is a folder with tokenizer.json and tokenizer_config.json, copied beside the weights.
"""
import argparse
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import COMPANION_FILES, ModelConfig, Transformer

# hidden, layers, query heads, key/value heads, feed-forward, tied: the published config.json of each model.
SHAPES = {"qwen2.5-0.5b": (896, 24, 14, 2, 4864, True), "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, True),
          "qwen2.5-3b": (2048, 36, 16, 2, 11008, True), "qwen2.5-7b": (3584, 28, 28, 4, 18944, False)}


def random_model(shape, layers=None, dtype=torch.float32, device="cpu", seed=0):
    """A Qwen2.5 with weights N(0, 0.02): only its sizes are real."""
    hidden, num_layers, heads, kv_heads, inner, tied = SHAPES[shape]
    config = ModelConfig(model_type="qwen2", vocab_size=152064 if shape == "qwen2.5-7b" else 151936, hidden_size=hidden,
                         intermediate_size=inner, num_hidden_layers=layers or num_layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, head_dim=hidden // heads, max_position_embeddings=32768,
                         tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    source = {"bos_token_id": 151643, "eos_token_id": 151645, "use_sliding_window": False}
    with torch.device(device):
        return Transformer(config, source).to(dtype).initialize(seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    args = parser.parse_args()
    random_model(args.shape, args.layers).save_pretrained(args.output)
    for name in COMPANION_FILES:
        if args.tokenizer and (args.tokenizer / name).is_file():
            shutil.copyfile(args.tokenizer / name, args.output / name)
    print(f"{args.output}: {sum(f.stat().st_size for f in args.output.iterdir()) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
