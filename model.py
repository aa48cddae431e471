"""A Llama / Qwen decoder in one file: configuration, RoPE, forward pass, loading and saving of Hugging Face folders.

Supported are Llama 2 / 3 / 3.1 / 3.2, Qwen2 / 2.5, Qwen3, and Mistral without sliding window. Modules carry the
names of the tensors in the checkpoint (a fused product lists those of its parts), so that loading needs no weight
map; whatever else a folder asks for (mixture of experts, quantised weights, remote code, an unknown RoPE) is refused
by name, never approximated.

Dimension key, used as a suffix of tensor names:
    B batch    T tokens of a row    D hidden size    V vocabulary    N rows of a flat batch
    H query heads    K key/value heads    C size of one head    R = C / 2 rotation frequencies
"""
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# model_type -> the prefix of its class in transformers; rope_type -> the settings that it cannot do without.
MODEL_TYPES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ROPE_TYPES = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": (),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
FLOAT_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
MAX_SHARD_BYTES = 5 * 2**30
# Everything beside the weights that makes a folder usable elsewhere; copied byte for byte from the source.
COMPANION_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")


# ---------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The part of config.json that decides the arithmetic. Field names are config.json's own.

    `rope_parameters` is normalised: it always holds `rope_type` and `rope_theta`, whichever of the two forms
    (transformers 4: `rope_theta` + `rope_scaling`; transformers 5: `rope_parameters`) the file used.
    """
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False     # biases on q, k, v and o (qwen2: on q, k and v, whatever this says)
    mlp_bias: bool = False
    rope_parameters: dict = dataclasses.field(default_factory=lambda: {"rope_type": "default", "rope_theta": 1e4})

    @classmethod
    def from_dict(cls, raw):
        """Read a parsed config.json. Raises ValueError that names the first field that is not supported."""
        kind = raw.get("model_type")
        refuse_unsupported(raw)
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "max_position_embeddings")
        for name in required:
            if not isinstance(raw.get(name), int) or raw[name] < 1:
                raise ValueError(f"config.json: {name} is {raw.get(name)!r}, expected a positive integer")
        heads = raw["num_attention_heads"]
        # An absent field takes transformers' class default; null means "derive it from the others".
        kv_default = {"qwen2": 32, "qwen3": 32, "mistral": 8}.get(kind, heads)
        head_dim_default = 128 if kind == "qwen3" else None
        config = cls(
            model_type=kind,
            num_key_value_heads=raw.get("num_key_value_heads", kv_default) or heads,
            head_dim=raw.get("head_dim", head_dim_default) or raw["hidden_size"] // heads,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=kind in ("llama", "qwen3") and bool(raw.get("attention_bias", False)),
            mlp_bias=kind == "llama" and bool(raw.get("mlp_bias", False)),
            rope_parameters=read_rope(raw),
            **{name: raw[name] for name in required},
        )
        if heads % config.num_key_value_heads or config.head_dim % 2:
            raise ValueError(f"config.json: {heads} query heads need a number of key/value heads that divides them "
                             f"and an even head size, not {config.num_key_value_heads} and {config.head_dim}")
        return config


def refuse_unsupported(raw):
    """Raise ValueError for whatever this file does not compute exactly: better no model than a wrong one."""
    kind = raw.get("model_type")
    layers = raw.get("num_hidden_layers") or 0
    windowed = (raw.get("sliding_window", 4096) is not None if kind == "mistral" else
                raw.get("use_sliding_window") and raw.get("max_window_layers", 28) < layers)
    checks = [
        (raw.get("auto_map"), "auto_map asks for code from the checkpoint, which is never run"),
        (kind not in MODEL_TYPES, f"model_type {kind!r} is not supported (supported: {', '.join(MODEL_TYPES)})"),
        (raw.get("quantization_config") or raw.get("quantization"),
         "quantised weights are not supported; use the bf16, fp16 or fp32 checkpoint of this model"),
        (windowed or "sliding_attention" in (raw.get("layer_types") or ()),
         "sliding-window attention is not supported; for full attention set \"sliding_window\": null "
         "and \"use_sliding_window\": false"),
        (raw.get("hidden_act", "silu") != "silu", f"hidden_act {raw.get('hidden_act')!r} is not supported (silu is)"),
    ]
    for is_wrong, message in checks:
        if is_wrong:
            raise ValueError(f"config.json: {message}")


def read_rope(raw):
    """Both forms of RoPE settings -> one dict with `rope_type`, `rope_theta` and what that type needs."""
    scaling, parameters = raw.get("rope_scaling"), raw.get("rope_parameters") or {}
    # As in transformers, a rope_scaling that is set replaces rope_parameters, whose theta must not be lost with it.
    rope = dict(scaling or parameters)
    theta = rope.get("rope_theta") or raw.get("rope_theta")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"config.json: RoPE settings per layer type ({', '.join(rope)}) are not supported")
    if theta is None and parameters.get("rope_theta") is not None:
        raise ValueError("config.json: rope_scaling replaces rope_parameters, and with it the only rope_theta; "
                         "write rope_theta at the top level too")
    rope["rope_theta"] = 10000.0 if theta is None else float(theta)
    old_name = rope.pop("type", None)
    kind = rope["rope_type"] = rope.get("rope_type") or old_name or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"config.json: rope_type {kind!r} is not supported ({', '.join(ROPE_TYPES)} are)")
    if kind in ("llama3", "yarn"):
        original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or raw["max_position_embeddings"]
        if kind == "yarn" and not rope.get("factor"):
            rope["factor"] = raw["max_position_embeddings"] / rope["original_max_position_embeddings"]
    missing = [name for name in ROPE_TYPES[kind] if rope.get(name) is None]
    if missing:
        raise ValueError(f"config.json: rope_type {kind!r} needs {', '.join(missing)}")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor {partial} is not supported (1.0 is)")
    return rope


# ---------------------------------------------------------------- rotary positions


def rope_frequencies(config):
    """Rotation frequencies in radians per position, and the factor on cos and sin: (frequencies_R, scale).

    Plain RoPE (arXiv 2104.09864) is f_i = theta^(-2i/C). The other types stretch it to longer contexts:
    linear and llama3 divide (some) frequencies by `factor`; yarn (arXiv 2309.00071) blends the two with a ramp.
    "dynamic" equals plain RoPE inside the model's window, and beyond it the model refuses to run.
    """
    rope, size = config.rope_parameters, config.head_dim
    theta, kind = rope["rope_theta"], rope["rope_type"]
    frequencies_R = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    if kind in ("default", "dynamic"):
        return frequencies_R, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return frequencies_R / factor, 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns_R = original / (2 * math.pi / frequencies_R)  # rotations within the original window
        smooth_R = ((turns_R - low) / (high - low)).clamp(0, 1)
        return (1 - smooth_R) * frequencies_R / factor + smooth_R * frequencies_R, 1.0

    def dimension(rotations):  # the index i at which f_i turns this often within the original window
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp_R = ((torch.arange(size // 2).float() - low) / ((high - low) or 0.001)).clamp(0, 1)
    return frequencies_R / factor * ramp_R + frequencies_R * (1 - ramp_R), yarn_scale(rope)


def yarn_scale(rope):
    """YaRN's attention factor: given, or 0.1 ln(factor) + 1, or the ratio of the two mscale forms."""
    def log_scale(weight):
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return log_scale(rope["mscale"]) / log_scale(rope["mscale_all_dim"])
    return log_scale(1.0)


def rotate(x_BTHC, cos_BT1C, sin_BT1C):
    """Turn the pairs (x_i, x_{i + C/2}) of every head by the angles of its position: the "half-split" pairing.

        [ a | b ] * [ cos | cos ]  +  [ b | a ] * [ -sin | sin ]  =  [ a cos - b sin | b cos + a sin ]
    """
    return torch.addcmul(x_BTHC * cos_BT1C, x_BTHC.roll(x_BTHC.shape[-1] // 2, -1), sin_BT1C)


# ---------------------------------------------------------------- the decoder


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast down, then times the weight (in this order: it matters in bf16)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


def product(x, weight, bias=None):
    """F.linear, but on a CPU, where a few rows meet a large weight (decoding), W x^T: the matrix library then shares
    the weight out among threads, not the rows. 1.6x at 32 rows, 1.3x at 64, equal at 256 (Qwen2.5-0.5B, 2 threads)."""
    rows = x.numel() // x.shape[-1]
    is_skinny = 1 < rows <= 128 and weight.numel() >= 2**18 and torch.get_num_threads() > 1
    if x.device.type != "cpu" or torch.is_grad_enabled() or not is_skinny:
        return F.linear(x, weight, bias)
    out = torch.mm(weight, x.reshape(rows, -1).T).T.contiguous()
    return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    def forward(self, x):
        return product(x, self.weight, self.bias)


class FusedLinear(nn.Module):
    """Linear maps of the same input, stacked into one matrix product: rows is {"q_proj": rows of its weight, ...}."""

    def __init__(self, size, rows, bias):
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(sum(rows.values()), size))
        self.register_parameter("bias", nn.Parameter(torch.empty(sum(rows.values()))) if bias else None)

    def forward(self, x):
        return product(x, self.weight, self.bias)


def fused_parts(model, prefix):
    """(name in the model, [(name of a part in checkpoints, its rows), ...]) of every tensor of a FusedLinear."""
    for path, module in model.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(module, FusedLinear):
            for kind, _ in module.named_parameters():
                beside = path.rpartition(".")[0]
                yield f"{path}.{kind}", [(f"{beside}.{part}.{kind}", rows) for part, rows in module.rows.items()]


def stack_parts(model, state_dict, prefix, *_):
    """Before loading a state dict: q_proj.weight, k_proj.weight, v_proj.weight -> qkv_proj.weight."""
    for name, parts in fused_parts(model, prefix):
        if all(part in state_dict for part, _ in parts):
            state_dict[name] = torch.cat([state_dict.pop(part) for part, _ in parts])


def split_parts(model, state_dict, prefix, _):
    """After making a state dict: the parts under the names that checkpoints know them by, as views."""
    for name, parts in fused_parts(model, prefix):
        whole = state_dict.pop(name)
        state_dict.update(zip((part for part, _ in parts), whole.split([rows for _, rows in parts])))


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads. Qwen3 normalises every head before RoPE."""

    def __init__(self, config, layer):
        super().__init__()
        D, H, K, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.heads = layer, (H, K)
        self.qkv_proj = FusedLinear(D, {"q_proj": H * C, "k_proj": K * C, "v_proj": K * C},
                                    bias=config.model_type == "qwen2" or config.attention_bias)
        self.o_proj = Linear(H * C, D, bias=config.attention_bias)
        self.has_norms = config.model_type == "qwen3"
        if self.has_norms:
            self.q_norm, self.k_norm = RMSNorm(C, config.rms_norm_eps), RMSNorm(C, config.rms_norm_eps)

    def forward(self, x_BTD, cos_BT1C, sin_BT1C, cache):
        B, T, _ = x_BTD.shape
        H, K = self.heads
        # Queries and keys are treated alike, so they stay together as long as that lasts.
        qk_BTHC, v_BTKC = self.qkv_proj(x_BTD).view(B, T, H + 2 * K, -1).split((H + K, K), 2)
        if self.has_norms:
            weight_HC = torch.cat((self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(K, -1)))
            qk_BTHC = weight_HC * F.rms_norm(qk_BTHC, qk_BTHC.shape[-1:], eps=self.q_norm.eps)
        q_BHTC, k_BKTC = rotate(qk_BTHC, cos_BT1C, sin_BT1C).transpose(1, 2).split((H, K), 1)
        v_BKTC = v_BTKC.transpose(1, 2)
        if cache is None:
            out_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BKTC, v_BKTC, is_causal=True, enable_gqa=True)
        else:
            out_BHTC = cache.attend(self.layer, q_BHTC, k_BKTC, v_BKTC)
        return self.o_proj(out_BHTC.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = FusedLinear(D, {"gate_proj": inner, "up_proj": inner}, bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def forward(self, x_BTD):
        gate, up = self.gate_up_proj(x_BTD).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD, cos_BT1C, sin_BT1C, cache):
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_BT1C, sin_BT1C, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Transformer(nn.Module):
    """A decoder-only language model: token ids -> hidden states; `logits` is a second, separate call.

    `source` is the parsed config.json that the model came from: saving writes it back, fields that this file
    does not know included. `folder` is where it was loaded from, or None.
    """

    def __init__(self, config, source=None):
        super().__init__()
        self.config, self.source, self.folder = config, dict(source or {}), None
        self.recompute = False  # compute a block's activations again in the backward pass instead of keeping them
        self.model = nn.ModuleDict({  # so named because checkpoints call their tensors "model.layers.0..."
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_load_state_dict_pre_hook(stack_parts)
        self.register_state_dict_post_hook(split_parts)
        self.frequencies_R, self.rope_scale = None, 1.0  # filled at first use, on the device of the input

    def forward(self, tokens_BT, positions_BT=None, cache=None):
        """tokens_BT -> hidden_BTD after the last norm.

        positions_BT defaults to 0..T-1. Without a cache attention is causal inside each row, so rows padded on
        the RIGHT need no mask: no real token ever sees the padding. A cache is any object with
        `attend(layer, q_BHTC, k_BKTC, v_BKTC) -> out_BHTC`; it sees rotated keys and decides who attends to whom.
        """
        B, T = tokens_BT.shape
        if positions_BT is None:
            positions_BT = torch.arange(T, device=tokens_BT.device).unsqueeze(0)
        hidden_BTD = self.model.embed_tokens(tokens_BT)
        cos_BT1C, sin_BT1C = self.rope(positions_BT, hidden_BTD.dtype)
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                hidden_BTD = checkpoint(block, hidden_BTD, cos_BT1C, sin_BT1C, cache, use_reentrant=False)
            else:
                hidden_BTD = block(hidden_BTD, cos_BT1C, sin_BT1C, cache)
        return self.model.norm(hidden_BTD)

    def rope(self, positions_BT, dtype):
        """[cos | cos] and [-sin | sin] of every position's angles, as `rotate` uses them: (B, T, 1, C) each. Computed
        in float32 (bf16 cannot tell position 257 from 256)."""
        if self.frequencies_R is None or self.frequencies_R.device != positions_BT.device:
            with torch.device("cpu"):
                frequencies_R, self.rope_scale = rope_frequencies(self.config)
            self.frequencies_R = frequencies_R.to(positions_BT.device)
        window = self.config.max_position_embeddings
        if self.config.rope_parameters["rope_type"] == "dynamic" and positions_BT.max() >= window:  # a device sync
            raise ValueError(f"rope_type 'dynamic' is supported inside max_position_embeddings ({window}) only")
        angles_BTR = positions_BT.unsqueeze(-1).float() * self.frequencies_R
        cos_BTR, sin_BTR = ((x_BTR * self.rope_scale).to(dtype) for x_BTR in (angles_BTR.cos(), angles_BTR.sin()))
        return torch.cat((cos_BTR, cos_BTR), -1).unsqueeze(2), torch.cat((-sin_BTR, sin_BTR), -1).unsqueeze(2)

    def logits(self, hidden_BTD):
        """hidden_BTD -> float32 logits_BTV. Give it only the positions whose logits are needed: V is large."""
        return self.lm_head(hidden_BTD).float()

    @torch.no_grad()
    def initialize(self, seed=0):
        """Random weights for training from scratch: N(0, 0.02), biases 0, norms 1. Returns the model."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """Load a Hugging Face folder: config.json + one or many .safetensors files, converted to `dtype`.

        Strict: ValueError lists every tensor that is missing, unexpected or of the wrong shape, and refuses NaN,
        infinities, integer or quantised weights, and an index that points outside the folder.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            raise ValueError(f"{path}: not a model folder (it needs config.json and *.safetensors)")
        try:
            source = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path / 'config.json'}: not a JSON object ({error})") from None
        with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
            model = cls(ModelConfig.from_dict(source), source)
        model.load_state_dict(read_weights(path, model, device, dtype), assign=True, strict=False)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.folder = path.resolve()
        return model

    def save_pretrained(self, path):
        """Write a folder that transformers and vLLM load: config, weights, and the source's tokenizer files."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if self.folder is not None and path.resolve() == self.folder:
            raise ValueError(f"{path}: the model was loaded from this folder; save it to another one")
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(config_dict(self, dtype), indent=2) + "\n", encoding="utf-8")
        write_weights(path, self)
        for name in COMPANION_FILES:
            if self.folder is not None and (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, path / name)


# ---------------------------------------------------------------- Hugging Face folders


def weight_files(path):
    """{file name: the tensor names that the index says it holds (none without an index)} of a model folder."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        if not (path / "model.safetensors").exists():
            raise ValueError(f"{path}: no model.safetensors and no model.safetensors.index.json (pickled weights "
                             "like pytorch_model.bin are never read: convert them to safetensors)")
        return {"model.safetensors": set()}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {}
        for tensor, name in weight_map.items():
            files.setdefault(str(name), set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: not an index of the form {{\"weight_map\": {{tensor: file}}}}") from None
    # A Hugging Face cache keeps its files in ../../blobs and links to them; any other way out is refused.
    home = path.resolve()
    homes = {home, home.parents[1] / "blobs"} if home.parent.name == "snapshots" else {home}
    for name in files:
        if (path / name).resolve().parent not in homes:
            raise ValueError(f"{index}: {name!r} is outside the model folder")
        if not (path / name).is_file():
            raise ValueError(f"{index}: shard {name} is missing from {path}; download it again")
    return files


def read_weights(path, model, device, dtype):
    """The state dict of `model` from the files of `path`, checked name by name; ValueError lists what is wrong."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    state, seen, wrong = {}, set(), []
    for file, indexed in weight_files(path).items():
        try:
            with safe_open(path / file, framework="pt") as reader:
                names = set(reader.keys())
                wrong += [f"{name} is in two shards" for name in names & seen]
                wrong += [f"{name} is not in {file}" for name in indexed - names]
                seen |= names
                for name in names:
                    view = reader.get_slice(name)
                    if name.endswith("rotary_emb.inv_freq"):  # a buffer of old Llama files, computed here instead
                        continue
                    if name not in expected:
                        wrong.append(f"{name} is unexpected")
                    elif tuple(view.get_shape()) != expected[name]:
                        wrong.append(f"{name} has shape {list(view.get_shape())}, expected {list(expected[name])}")
                    elif view.get_dtype() not in FLOAT_TYPES:
                        wrong.append(f"{name} is {view.get_dtype()}, expected one of {', '.join(FLOAT_TYPES)}")
                    else:
                        state[name] = reader.get_tensor(name).to(device=device, dtype=dtype, copy=True)
                        if not state[name].isfinite().all():  # after the conversion: float16 may overflow
                            wrong.append(f"{name} holds NaN or infinity in {dtype}")
        except (SafetensorError, OSError) as error:
            with open(path / file, "rb") as raw:
                pointer = raw.read(40).startswith(b"version https://git-lfs")
            what = "a Git LFS pointer, not the weights (git lfs pull)" if pointer else f"not readable ({error})"
            raise ValueError(f"{path / file}: {what}; download it again") from None
    if tied and "lm_head.weight" in state:
        head, embedding = state.pop("lm_head.weight"), state.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            wrong.append("lm_head.weight differs from the embedding although tie_word_embeddings is true "
                         "(set it to false to keep both)")
    wrong += [f"{name} is missing" for name in expected if name not in seen and not (tied and name == "lm_head.weight")]
    if wrong:
        more = f" (and {len(wrong) - 20} more)" if len(wrong) > 20 else ""
        raise ValueError(f"{path}: the weights do not fit config.json: {'; '.join(sorted(wrong)[:20])}{more}")
    return state


def config_dict(model, dtype):
    """config.json to write: the source's fields, the dtype, and RoPE in both forms.

    Both, because transformers 4 ignores `rope_parameters` and would silently use theta 10000.
    """
    fields = dataclasses.asdict(model.config)
    rope = fields.pop("rope_parameters")
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    kind = model.config.model_type
    if kind == "mistral":
        fields["sliding_window"] = None
    if kind == "qwen2":  # its q, k and v have biases without saying so: do not say the opposite
        del fields["attention_bias"]
    return {"architectures": [f"{MODEL_TYPES[kind]}ForCausalLM"], "hidden_act": "silu",
            **model.source, **fields, "torch_dtype": dtype, "dtype": dtype, "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling, "rope_parameters": rope}


def write_weights(path, model):
    """Weights in one .safetensors file, or in shards of at most 5 GiB with an index."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
             if not (model.config.tie_word_embeddings and name == "lm_head.weight")}
    shards, room = [{}], MAX_SHARD_BYTES
    for name, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    files = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for stale in path.glob("model*.safetensors*"):  # an index left from another save would be believed
        stale.unlink()
    umask = os.umask(0)
    os.umask(umask)
    for file, shard in zip(files, shards):
        save_file(shard, path / file, metadata={"format": "pt"})
        os.chmod(path / file, 0o666 & ~umask)  # safetensors leaves 0600, which a serving user could not read
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
                 "weight_map": {name: file for file, shard in zip(files, shards) for name in shard}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- the log-prob head: plain twin of kernels/

TILE_BYTES = 2**23  # of one tile of logits: stays in the cache of a CPU while it is worked on
KEPT_BYTES = 2**28  # of tiles carried from forward to backward; what does not fit is computed again


class _LinearLogprob(torch.autograd.Function):
    """Slices of the vocabulary, all rows at once: no (N, V) tensor beyond KEPT_BYTES, and each row of the weight's
    gradient is written once. Tiles hold e = exp(x - m), x = logits / temperature, m the row's largest x so far."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, temperature):
        N, V = len(hidden_ND), len(weight_VD)
        # Every slice adds to the whole gradient of the hidden states: less than 512 columns would not pay for that.
        ctx.width, ctx.temperature, ctx.kept = min(V, max(512, TILE_BYTES // (4 * max(N, 1)))), temperature, []
        scaled_ND = hidden_ND.float() / temperature
        tile_NC, e_NC = scaled_ND.new_empty(N, ctx.width), scaled_ND.new_empty(N, ctx.width)
        max_N, chosen_N = scaled_ND.new_full((N,), -math.inf), scaled_ND.new_empty(N)
        sum_N, sum_z_N = scaled_ND.new_zeros(2, N)
        for start in range(0, V, ctx.width):
            weight_CD = weight_VD[start:start + ctx.width].float()
            x_NC = torch.mm(scaled_ND, weight_CD.T, out=tile_NC[:, :len(weight_CD)])
            rows = ((targets_N >= start) & (targets_N < start + len(weight_CD))).nonzero().squeeze(1)
            chosen_N[rows] = x_NC[rows, targets_N[rows] - start]
            new_max_N = torch.maximum(max_N, x_NC.amax(1))
            z_NC = x_NC.sub_(new_max_N.unsqueeze(1))
            e_NC = torch.exp(z_NC, out=e_NC[:, :len(weight_CD)])
            # Sums so far move with the maximum; exp(-200) is 0, and the floor keeps 0 * -inf out of the first.
            rise_N = (max_N - new_max_N).clamp_(min=-200)
            rescale_N = rise_N.exp()
            sum_z_N = rescale_N * (sum_z_N + sum_N * rise_N) + torch.linalg.vecdot(e_NC, z_NC)
            sum_N = rescale_N * sum_N + e_NC.sum(1)
            max_N = new_max_N
            if any(ctx.needs_input_grad) and sum(e.nbytes for e, _ in ctx.kept) + e_NC.nbytes <= KEPT_BYTES:
                ctx.kept.append((e_NC, max_N))
                e_NC = torch.empty_like(tile_NC)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, max_N, sum_N)
        # m and log s stay apart: their sum, the log-sum-exp, would lose log s where m is large.
        entropies_N = sum_N.log() - sum_z_N / sum_N
        ctx.mark_non_differentiable(entropies_N)
        return chosen_N - max_N - sum_N.log(), entropies_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs_N, _):
        hidden_ND, weight_VD, targets_N, max_N, sum_N = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # d logprob / d x_v = 1[v == target] - e_v / s = (e_v - s 1[v == target]) * (-1 / s): the tile holds the first
        # factor, and what is constant along a row is multiplied into the hidden states, far fewer than the logits.
        rate_N1 = (-grad_logprobs_N / sum_N).unsqueeze(1)
        scaled_ND = hidden_ND.float() / ctx.temperature
        rated_ND = scaled_ND * rate_N1
        grad_hidden_ND = torch.zeros_like(scaled_ND) if wants_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD) if wants_weight else None
        tile_NC = scaled_ND.new_empty(len(hidden_ND), ctx.width)
        kept, ctx.kept = ctx.kept, []  # overwritten below: a second backward of a retained graph computes them again
        for start in range(0, len(weight_VD), ctx.width):
            weight_CD = weight_VD[start:start + ctx.width].float()
            if kept:
                e_NC, max_then_N = kept.pop(0)
                e_NC.mul_((max_then_N - max_N).exp().unsqueeze(1))
            else:
                e_NC = torch.mm(scaled_ND, weight_CD.T, out=tile_NC[:, :len(weight_CD)])
                e_NC.sub_(max_N.unsqueeze(1)).exp_()
            rows = ((targets_N >= start) & (targets_N < start + len(weight_CD))).nonzero().squeeze(1)
            e_NC[rows, targets_N[rows] - start] -= sum_N[rows]
            if wants_weight:
                grad_weight_VD[start:start + ctx.width] = torch.mm(e_NC.T, rated_ND)
            if wants_hidden:
                grad_hidden_ND.addmm_(e_NC, weight_CD)  # in float32 over all slices, whatever the weights are
        if wants_hidden:
            grad_hidden_ND = grad_hidden_ND.mul_(rate_N1 / ctx.temperature).to(hidden_ND.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None


def linear_logprob(hidden_ND, weight_VD, targets_N, temperature=1.0):
    """Log-probability of one chosen token per row, and the entropy of the distribution it was drawn from, straight
    from the LM head: the (N, V) logits are never stored.

    hidden_ND and weight_VD (any float types), targets_N (int64) -> (logprobs_N, entropies_N), float32, in nats, under
    softmax(hidden @ weight.T / temperature). Differentiable in hidden and weight, whose gradients have their types;
    the entropies are for logging and carry no gradient. Raises IndexError for a target that is no token.
    """
    N, V = len(hidden_ND), len(weight_VD)
    if targets_N.shape != (N,) or (N and not 0 <= targets_N.min() <= targets_N.max() < V):
        raise IndexError(f"linear_logprob: targets {tuple(targets_N.shape)} for {N} rows; one in 0..{V - 1} each")
    if not torch.is_grad_enabled():  # then forward keeps no tiles
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    return _LinearLogprob.apply(hidden_ND, weight_VD, targets_N, temperature)
