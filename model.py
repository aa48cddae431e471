"""A Llama / Qwen decoder: configuration, RoPE, forward pass, Hugging Face folders, plain log-prob head.

Supported are Llama 2 / 3 / 3.1 / 3.2, Qwen2 / 2.5, Qwen3, and Mistral without sliding window. Whatever else
a folder asks for is refused by name: better no model than a wrong one.

Dimension key, used as a suffix of tensor names:
    B batch    T tokens of a row    N rows of a flat batch    n rows of a chunk    D hidden size
    V vocabulary    H query heads    K key/value heads    C size of one head    R = C / 2 frequencies
"""
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# model_type -> the prefix of its class in transformers
MODEL_TYPES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "max_position_embeddings")
# rope_type -> the settings that it cannot do without, and all settings that may stand beside it
ROPE_TYPES = {"default": [], "linear": ["factor"], "dynamic": ["factor"], "yarn": [],
              "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
ROPE_SETTINGS = {"rope_type", "rope_theta", "original_max_position_embeddings", "attention_factor",
                 "beta_fast", "beta_slow", *ROPE_TYPES["llama3"]}
# Everything beside the weights that makes a folder usable elsewhere; kept byte for byte.
COMPANION_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
                   "merges.txt")
# Kinds of the fields of config.json.
FIELDS = {"a positive integer": (*SIZES, "head_dim", "num_key_value_heads", "max_window_layers",
                                 "original_max_position_embeddings"),
          "a positive number": ("rms_norm_eps", "rope_theta", "partial_rotary_factor"),
          "true or false": ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
          "text": ("model_type", "hidden_act"), "an object": ("rope_scaling", "rope_parameters"),
          "a list": ("layer_types",)}
CHUNK_BYTES = 2**26  # of logits in the log-prob head: 110 rows of 151,936 tokens, in float32


@dataclass(frozen=True)
class ModelConfig:
    """What of config.json decides the arithmetic, under its own names; RoPE in the form of transformers 5."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int         # fewer than query heads: grouped-query attention
    head_dim: int
    max_position_embeddings: int     # the context window in tokens
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v and o; qwen2 has them on q, k and v, whatever this says
    mlp_bias: bool = False
    rope_parameters: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})

    @classmethod
    def from_dict(cls, raw):
        """Read a parsed config.json. Raises ValueError that names the first field that is not supported."""
        check_fields(raw)
        refuse_unsupported(raw)
        kind, heads = raw["model_type"], raw["num_attention_heads"]
        # An absent field takes transformers' class default; null means "derive it from the others".
        kv_heads = raw.get("num_key_value_heads", {"qwen2": 32, "qwen3": 32, "mistral": 8}.get(kind)) or heads
        head_dim = raw.get("head_dim", 128 if kind == "qwen3" else None) or raw["hidden_size"] // heads
        if heads % kv_heads or head_dim % 2:
            raise ValueError(f"config.json: {heads} query heads need key/value heads whose number divides "
                             f"theirs and whose size is even, not {kv_heads} and {head_dim}")
        return cls(
            model_type=kind, num_key_value_heads=kv_heads, head_dim=head_dim,
            **{name: raw[name] for name in SIZES},
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            attention_bias=kind in ("llama", "qwen3") and bool(raw.get("attention_bias")),
            mlp_bias=kind == "llama" and bool(raw.get("mlp_bias")),  # transformers ignores it in other types
            rope_parameters=read_rope(raw))


def check_fields(raw):
    """Raise ValueError that names every field of config.json that is of another kind than it should be."""
    def is_positive(value):  # and no number with which anything could be computed is further from 1
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-30 < value < 2**31

    # What is absent or null has a default, or is missed later.
    kinds = {
        "a positive integer": lambda value: is_positive(value) and isinstance(value, int),
        "a positive number": is_positive, "true or false": lambda value: isinstance(value, bool),
        "text": lambda value: isinstance(value, str), "an object": lambda value: isinstance(value, dict),
        "a list": lambda value: isinstance(value, list)}
    wrong = []
    for kind, names in FIELDS.items():
        given = [name for name in names if raw.get(name) is not None]
        wrong += [f"{name} is {raw[name]!r:.40}, not {kind}" for name in given if not kinds[kind](raw[name])]
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    for name, value in rope.items() if isinstance(rope, dict) else ():
        kind = "text" if name in ("rope_type", "type") else "a positive number"
        if name in ROPE_SETTINGS | {"type"} and value is not None and not kinds[kind](value):
            wrong.append(f"{name} of RoPE is {value!r:.40}, not {kind}")
    if wrong:
        raise ValueError(f"config.json: {'; '.join(wrong)}")


def refuse_unsupported(raw):
    """Raise ValueError for whatever this file does not compute exactly."""
    kind = raw.get("model_type")
    missing = [name for name in SIZES if raw.get(name) is None]
    slides = "sliding_attention" in (raw.get("layer_types") or ())
    if kind == "mistral":
        slides |= raw.get("sliding_window", 4096) is not None  # absent means transformers' default
    elif raw.get("use_sliding_window"):  # then layers from max_window_layers on slide
        slides |= raw.get("max_window_layers", 28) < (raw.get("num_hidden_layers") or 0)
    is_quantised = raw.get("quantization_config") or raw.get("quantization")
    refusals = {
        "auto_map asks for code from the checkpoint, which is never run": raw.get("auto_map"),
        f"model_type {kind!r} is not supported ({', '.join(MODEL_TYPES)} are)": kind not in MODEL_TYPES,
        "quantised weights are not supported; use the model's bf16, fp16 or fp32 checkpoint": is_quantised,
        'no sliding-window attention here: type "sliding_window": null, "use_sliding_window": false': slides,
        f"hidden_act {raw.get('hidden_act')!r} is not silu": raw.get("hidden_act", "silu") != "silu",
        f"{', '.join(missing)} missing": missing,
        "over 1,000 layers": (raw.get("num_hidden_layers") or 0) > 1000}
    for text, is_wrong in refusals.items():
        if is_wrong:
            raise ValueError(f"config.json: {text}")


def read_rope(raw):
    """Both forms of RoPE settings -> one dict with `rope_type`, `rope_theta` and what that type needs;
    ValueError for what is not supported."""
    # As in transformers rope_scaling, if set, replaces rope_parameters, whose theta must not be lost with it.
    parameters = raw.get("rope_parameters") or {}
    rope = dict(raw.get("rope_scaling") or parameters)
    theta = rope.get("rope_theta") or raw.get("rope_theta")
    if theta is None and parameters.get("rope_theta"):
        raise ValueError("config.json: rope_scaling replaces rope_parameters, and with it the only "
                         "rope_theta; write rope_theta at the top level too")
    old_name = rope.pop("type", None)
    kind = old_name if rope.get("rope_type") is None else rope["rope_type"]
    if kind is None:  # then `factor` and others would mean nothing
        kind = "default" if rope.keys() <= {"rope_theta", "partial_rotary_factor", "rope_type"} else "(none)"
    rope |= {"rope_type": kind, "rope_theta": float(theta or 10000)}
    partial = rope.pop("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    unknown = sorted(rope.keys() - ROPE_SETTINGS)
    if kind not in ROPE_TYPES or unknown or partial != 1.0:
        raise ValueError(f"config.json: rope_type {kind!r} with settings {unknown} and partial_rotary_factor "
                         f"{partial} is not supported; {', '.join(ROPE_TYPES)} with 1.0 are")
    if kind in ("llama3", "yarn"):  # here, unlike with theta, the value outside wins
        original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or raw["max_position_embeddings"]
    if kind == "yarn" and not rope.get("factor"):
        rope["factor"] = raw["max_position_embeddings"] / rope["original_max_position_embeddings"]
    missing = [name for name in ROPE_TYPES[kind] if rope.get(name) is None]
    if missing:
        raise ValueError(f"config.json: rope_type {kind!r} needs {', '.join(missing)}")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ValueError("config.json: low_freq_factor must be below high_freq_factor")
    betas = rope.get("beta_slow") or 1, rope.get("beta_fast") or 32
    if kind == "yarn" and not (rope["rope_theta"] > 1 and betas[0] < betas[1]):
        raise ValueError("config.json: yarn needs a rope_theta above 1, and beta_slow below beta_fast")
    return rope


def rope_frequencies(config):
    """Rotation frequencies in radians per position, and the factor on cos and sin: (frequencies_R, scale).

    Plain RoPE (arXiv 2104.09864) is f_i = theta^(-2i/C). For longer contexts linear and llama3 divide (some)
    frequencies by `factor`; yarn (arXiv 2309.00071) blends the two; "dynamic" is plain in its window.
    """
    rope, size = config.rope_parameters, config.head_dim
    theta, kind = rope["rope_theta"], rope["rope_type"]
    frequencies_R = 1.0 / theta ** (torch.arange(0, size, 2, device="cpu").float() / size)
    if kind in ("default", "dynamic"):
        return frequencies_R, 1.0
    slow_R = frequencies_R / rope["factor"]
    if kind == "linear":
        return slow_R, 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns_R = original / (2 * math.pi / frequencies_R)  # rotations within the original window
        kept_R = ((turns_R - low) / (high - low)).clamp(0, 1)
        return (1 - kept_R) * slow_R + kept_R * frequencies_R, 1.0

    def index(rotations):  # the i at which f_i turns this often within the original window
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(index(rope.get("beta_slow") or 1)), size - 1)
    width = (high - low) or 0.001  # transformers' guard for a ramp of width 0
    ramp_R = ((torch.arange(size // 2, device="cpu").float() - low) / width).clamp(0, 1)
    scale = rope.get("attention_factor") or 0.1 * math.log(max(rope["factor"], 1)) + 1
    return slow_R * ramp_R + frequencies_R * (1 - ramp_R), scale


def rotate(x_BTHC, cos_BT1C, sin_BT1C):
    """Turn the pairs (x_i, x_{i + C/2}) of every head by the angles of its position ("half-split" pairing).

        [ a | b ] * [ cos | cos ]  +  [ b | a ] * [ -sin | sin ]  =  [ a cos - b sin | b cos + a sin ]
    """
    return torch.addcmul(x_BTHC * cos_BT1C, x_BTHC.roll(x_BTHC.shape[-1] // 2, -1), sin_BT1C)


def rms_norm(x, weight, eps):
    """x / rms(x) in float32, cast down, then times the weight (in this order: it matters in bf16)."""
    return weight * F.rms_norm(x, x.shape[-1:], eps=eps)


def add_rms_norm(x, y, weight, eps):
    """(x + y, its norm): what a block adds to the residual stream, and what the next part of it reads."""
    total = x + y
    return total, rms_norm(total, weight, eps)


def swiglu(x):
    """[ gate | up ] -> silu(gate) * up, half as wide."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class Linear(nn.Linear):
    """One product. Where it fuses several maps of one input, `parts` is {"q_proj": its rows of the weight,
    ...}: checkpoints hold each part under its own name. Change a weight in place under no_grad, or put a new
    nn.Parameter there: after `weight.data.copy_` a CPU may sample on with the old one."""
    parts = None
    packed = None  # ((the weight, its address and version), the weight as oneDNN lays it out)

    def forward(self, x):
        if torch.is_grad_enabled():
            self.packed = None  # N floats, which an update has better use for
        rows = x.numel() // x.shape[-1]
        weight = self.weight
        # One that is computed anew, by parametrize, is no Parameter.
        is_skinny = 1 < rows <= 256 and weight.numel() >= 2**18 and isinstance(weight, nn.Parameter)
        is_here = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        if torch.is_grad_enabled() or not is_skinny or not is_here:
            return super().forward(x)
        # Few rows, a large weight, as in decoding. Other libraries lay a weight out anew in every product:
        # 1.9 times slower at 8 rows, 1.5 at 32, 1.3 at 128 (SmolLM2-135M's layers, 1 and 2 threads).
        key = id(weight), weight.data_ptr(), weight._version
        if self.packed is None or self.packed[0] != key:
            self.packed = key, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed[1], self.bias, "none", [], "")

    def __getstate__(self):
        return self.__dict__ | {"packed": None}  # which can be neither copied nor pickled


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads. Qwen3 normalises each before RoPE."""

    def __init__(self, config, layer):
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        self.heads = H, K
        self.qkv_proj = Linear(D, (H + 2 * K) * C, config.attention_bias or config.model_type == "qwen2")
        self.qkv_proj.parts = {"q_proj": H * C, "k_proj": K * C, "v_proj": K * C}
        self.o_proj = Linear(H * C, D, bias=config.attention_bias)
        self.has_norms = config.model_type == "qwen3"
        if self.has_norms:
            self.q_norm = nn.RMSNorm(C, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(C, config.rms_norm_eps)

    def forward(self, x_BTD, cos_BT1C, sin_BT1C, cache, ops):
        B, T, _ = x_BTD.shape
        H, K = self.heads
        # Queries and keys are treated alike, so they stay one tensor, of H + K heads, as long as that lasts.
        qk_BTHC, v_BTKC = self.qkv_proj(x_BTD).view(B, T, H + 2 * K, -1).split((H + K, K), 2)
        if self.has_norms:
            weight_HC = torch.cat((self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(K, -1)))
            qk_BTHC = ops.rms_norm(qk_BTHC, weight_HC, self.q_norm.eps)
        qk_BHTC = ops.rotate(qk_BTHC, cos_BT1C, sin_BT1C).transpose(1, 2)
        q_BHTC, k_BKTC = qk_BHTC.split((H, K), 1)
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
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(D, 2 * inner, config.mlp_bias)
        self.gate_up_proj.parts = {"gate_proj": inner, "up_proj": inner}
        self.down_proj = Linear(inner, D, bias=config.mlp_bias)

    def forward(self, x_BTD, ops):
        return self.down_proj(ops.swiglu(self.gate_up_proj(x_BTD)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD, cos_BT1C, sin_BT1C, cache, ops):
        eps = self.input_layernorm.eps
        normed_BTD = ops.rms_norm(x_BTD, self.input_layernorm.weight, eps)
        out_BTD = self.self_attn(normed_BTD, cos_BT1C, sin_BT1C, cache, ops)
        x_BTD, normed_BTD = ops.add_rms_norm(x_BTD, out_BTD, self.post_attention_layernorm.weight, eps)
        return x_BTD + self.mlp(normed_BTD, ops)


class Transformer(nn.Module):
    """A decoder-only language model: token ids -> hidden states; `logits` is a second, separate call."""

    def __init__(self, config, source=None, recompute=False):
        super().__init__()
        self.config = config
        self.source = source or {}  # the parsed config.json, saved with all fields that we do not know
        self.recompute = recompute  # a block's activations in the backward pass, instead of keeping them
        self.folder = None    # where from_pretrained read it; never saved to
        self.companions = {}  # what lay beside it: {name of a tokenizer's file: bytes}
        self.ops = None  # a module with the four functions above, faster and without gradients: kernels/
        self.model = nn.ModuleDict({  # so named because checkpoints call their tensors "model.layers.0..."
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:  # one matrix, read as (token -> D) and as (D -> token)
            self.lm_head.weight = self.model.embed_tokens.weight
        self.frequencies_R, self.rope_scale = rope_frequencies(config)

    def forward(self, tokens_BT, positions_BT=None, cache=None):
        """tokens_BT, at positions 0..T-1 if no others are given -> hidden_BTD after the last norm.

        Without a cache attention is causal inside each row: padding on the RIGHT needs no mask. A cache has
        `attend(layer, q_BHTC, k_BKTC, v_BKTC) -> out_BHTC`, gets rotated keys and decides who sees whom.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0)
        ops = self.ops if self.ops and not torch.is_grad_enabled() else sys.modules[__name__]
        if torch.is_grad_enabled():
            self.lm_head.packed = None  # which training does not call
        hidden_BTD = self.model.embed_tokens(tokens_BT)
        shared = *self.rope(positions_BT, hidden_BTD.dtype), cache, ops
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                hidden_BTD = checkpoint(block, hidden_BTD, *shared, use_reentrant=False)
            else:
                hidden_BTD = block(hidden_BTD, *shared)
        return ops.rms_norm(hidden_BTD, self.model.norm.weight, self.model.norm.eps)

    def rope(self, positions_BT, dtype):
        """[cos | cos] and [-sin | sin] of every position's angles, as `rotate` uses them: (B, T, 1, C).
        ValueError beyond the window of "dynamic"."""
        self.frequencies_R = self.frequencies_R.to(positions_BT.device)
        angles_BTR = positions_BT.unsqueeze(-1).float() * self.frequencies_R  # bf16 has no position 257
        if self.config.rope_parameters["rope_type"] == "dynamic":
            window = self.config.max_position_embeddings
            # The host does not wait for a GPU's positions (in a CUDA graph it could not): there, NaN says no.
            if positions_BT.device.type == "cpu" and positions_BT.max() >= window:
                raise ValueError(f"rope_type 'dynamic' ends at max_position_embeddings ({window})")
            angles_BTR = angles_BTR.masked_fill(positions_BT.unsqueeze(-1) >= window, math.nan)
        cos_BT1R = (angles_BTR.cos() * self.rope_scale).to(dtype).unsqueeze(2)
        sin_BT1R = (angles_BTR.sin() * self.rope_scale).to(dtype).unsqueeze(2)
        return torch.cat((cos_BT1R, cos_BT1R), -1), torch.cat((-sin_BT1R, sin_BT1R), -1)

    def logits(self, hidden_BTD):
        """hidden_BTD -> float32 logits_BTV. Give it only positions whose logits are needed: V is large."""
        if hidden_BTD.is_cuda and hidden_BTD.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            # A logit of 20 rounded to bf16 is off by up to 0.06, and with it the log-prob of what is sampled.
            logits_NV = torch.mm(hidden_BTD.flatten(0, -2), self.lm_head.weight.T, out_dtype=torch.float32)
            return logits_NV.view(*hidden_BTD.shape[:-1], -1)
        return self.lm_head(hidden_BTD).float()  # on a CPU models are float32: nothing is rounded

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
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32, recompute=False):
        """Load config.json and .safetensors files, converted to `dtype`; ValueError lists what is wrong."""
        path = Path(path)
        source = read_config(path)
        with torch.device("meta"):  # no memory and no random numbers for weights to be replaced
            model = cls(ModelConfig.from_dict(source), source, recompute)
        model.to(dtype).to_empty(device=device)
        if model.config.tie_word_embeddings:  # to_empty has made two of them
            model.lm_head.weight = model.model.embed_tokens.weight
        read_weights(path, model)
        model.folder = path.resolve()
        # Now, not when they are wanted: the folder may be a checkpoint that a later save removes.
        found = [path / name for name in COMPANION_FILES if (path / name).is_file()]
        model.companions = {file.name: file.read_bytes() for file in found}
        return model

    def save_pretrained(self, path):
        """Write a folder that transformers and vLLM load: config, weights, and the tokenizer's files as they
        were where the model came from. ValueError, before anything is written, if `path` is that folder, or
        if modules were wrapped or parametrized and not merged again: nobody could load that."""
        path = Path(path)
        if path.resolve() == self.folder:
            raise ValueError(f"{path}: the model was loaded from this folder; save it to another one")
        with torch.device("meta"):
            plain = {name for name, _ in Transformer(self.config).named_parameters()}
        others = sorted(plain ^ {name for name, _ in self.named_parameters()})
        if others:
            raise ValueError(f"{others[0]} and {len(others) - 1} others are added to this model, or missing: "
                             "merge what was wrapped or parametrized first, nobody could load them")
        path.mkdir(parents=True, exist_ok=True)
        dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(config_dict(self, dtype), indent=2) + "\n")
        write_weights(path, self)
        for name, content in self.companions.items():
            (path / name).write_bytes(content)


# ---------------------------------------------------------------- Hugging Face folders


def checkpoint_tensors(model):
    """{name in checkpoints: tensor}; parts of a fused product are views of its rows, a tied head is none."""
    tensors = {}
    for name, whole in model.named_parameters():  # a tied matrix comes once, as the embedding
        *parents, last, kind = name.split(".")
        module = model.get_submodule(".".join((*parents, last)))
        parts = getattr(module, "parts", None) or {last: len(whole)}
        for part, view in zip(parts, whole.detach().split(list(parts.values()))):
            tensors[".".join((*parents, part, kind))] = view
    return tensors


def read_config(path):
    """The parsed config.json of a model folder; ValueError if there is none."""
    try:
        return dict(json.loads((Path(path) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a model folder, which holds config.json (a JSON object) and "
                         f"*.safetensors: {error}") from None


def read_index(path):
    """{tensor: name of its file} as the index of a sharded model folder says; {} of a folder without one;
    ValueError if it is none."""
    index = path / "model.safetensors.index.json"
    if not os.path.lexists(index):  # a link that leads nowhere has been meant
        return {}
    try:
        weight_map = {**json.loads(index.read_text(encoding="utf-8"))["weight_map"]}
        if not weight_map:
            raise ValueError("it is empty")
        for file in weight_map.values():
            # Or an index could point anywhere on this machine.
            if Path(file).name != file or file in ("", ".."):
                raise ValueError(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: no {{\"weight_map\": {{tensor: file in here}}}}: {error!r}") from None
    return weight_map


def read_weights(path, model):
    """Fill a model from the files of a folder, checked name by name; ValueError lists all that is wrong.
    (Inside, an OSError says why a file cannot be opened.)"""
    expected = checkpoint_tensors(model)
    index = read_index(path)
    found, wrong = {}, []
    for file in dict.fromkeys(index.values()) or ["model.safetensors"]:
        try:
            if (path / file).exists() and not (path / file).is_file():  # a pipe would be waited for
                raise OSError("no regular file")
            open(path / file, "rb").close()  # whose error is truer than safe_open's
            reader = safe_open(path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path / file}: no safetensors file ({error}); download it again (with git: "
                             "git lfs pull), or convert pickled weights: they are never read") from None
        for name in reader.keys():
            if index and index.get(name) != file:
                wrong.append(f"{name} is not in the shard that the index says")
            if not name.endswith("rotary_emb.inv_freq"):  # a buffer of old Llama files, computed here instead
                found[name] = reader.get_tensor(name)  # mapped, not read
    if model.config.tie_word_embeddings:  # then the head is a second name of the embedding, or not there
        head = found.pop("lm_head.weight", None)
        if head is not None and "model.embed_tokens.weight" not in found:  # safetensors' save_model keeps one
            found["model.embed_tokens.weight"] = head
        if head is not None and not torch.equal(head, found.get("model.embed_tokens.weight", head)):
            wrong.append("lm_head.weight is not the embedding; \"tie_word_embeddings\": false keeps both")
    wrong += [f"{name} is missing" for name in expected.keys() - found.keys()]
    if "lm_head.weight is missing" in wrong:
        wrong[wrong.index("lm_head.weight is missing")] += ' ("tie_word_embeddings": true uses the embedding)'
    wrong += [f"{name} is unexpected" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        target, tensor = expected[name], found[name]
        if tensor.shape != target.shape:
            wrong.append(f"{name} has shape {list(tensor.shape)}, expected {list(target.shape)}")
        elif tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            wrong.append(f"{name} is {tensor.dtype}, expected float16, bfloat16 or float32")
        elif not target.copy_(tensor).isfinite().all():  # after the conversion: float16 may overflow
            wrong.append(f"{name} holds NaN or infinity in {target.dtype}")
    if wrong:
        more = f" (and {len(wrong) - 20} more)" if len(wrong) > 20 else ""
        raise ValueError(f"{path}: the weights do not fit config.json: {'; '.join(sorted(wrong)[:20])}{more}")


def config_dict(model, dtype):
    """config.json to write: the source's fields, the dtype, and RoPE in both forms, because transformers 4
    ignores `rope_parameters` and would silently use theta 10000."""
    fields = asdict(model.config)
    rope = fields["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    kind = model.config.model_type
    if kind == "mistral":
        fields["sliding_window"] = None
    if kind == "qwen2":  # its q, k and v have biases without saying so: do not say the opposite
        del fields["attention_bias"]
    return {"architectures": [f"{MODEL_TYPES[kind]}ForCausalLM"], "hidden_act": "silu", **model.source,
            **fields, "torch_dtype": dtype, "dtype": dtype, "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling}


def write_weights(path, model, max_shard_bytes=5 * 2**30):
    """Weights in one .safetensors file, or in shards with an index (5 GiB each, as transformers does)."""
    shards, room = [{}], max_shard_bytes
    for name, tensor in checkpoint_tensors(model).items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor.cpu().contiguous()
        room -= tensor.nbytes
    for stale in path.glob("model*.safetensors*"):  # an index left from another save would be believed
        stale.unlink()
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        shutil.copymode(path / "config.json", path / file)  # else 0600, which no server could read
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(parameter.nbytes for parameter in model.parameters())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (path / "model.safetensors.index.json").write_text(text + "\n")


# ---------------------------------------------------------------- the log-prob head: plain twin of kernels/


class ChunkedLogprob(torch.autograd.Function):
    """log_softmax of a chunk of rows at a time; backward makes the probabilities of each chunk again. At
    N = 2048, D = 896, V = 151936 this takes 770 MiB, torch.utils.checkpoint around each chunk 1717 (autograd
    adds up the weight's gradient in new tensors), log_softmax of all rows 3604."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N):
        N = len(hidden_ND)
        max_N, log_sum_N, entropies_N = hidden_ND.new_empty(3, N)
        chosen_N = hidden_ND.new_empty(N)
        for start, logits_nV in logit_chunks(hidden_ND, weight_VD):
            for rows, z_rV in few_rows(start, logits_nV):
                max_N[rows] = z_rV.amax(-1)
                z_rV.sub_(max_N[rows].unsqueeze(1))
                weights_rV = z_rV.exp()
                sum_r = weights_rV.sum(-1)
                log_sum_N[rows] = sum_r.log()
                entropies_N[rows] = log_sum_N[rows] - torch.linalg.vecdot(weights_rV, z_rV) / sum_r
                chosen_N[rows] = z_rV.gather(1, targets_N[rows].unsqueeze(1)).squeeze(1)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, max_N, log_sum_N)
        ctx.mark_non_differentiable(entropies_N)
        return chosen_N - log_sum_N, entropies_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream_N, _):
        hidden_ND, weight_VD, targets_N, max_N, log_sum_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD)
        for start, grad_nV in logit_chunks(hidden_ND, weight_VD):
            for rows, z_rV in few_rows(start, grad_nV):
                # d logprob / d logit_v = 1[v == target] - p_v, here times the upstream gradient of the row
                upstream_r1 = upstream_N[rows].unsqueeze(1)
                z_rV.sub_(max_N[rows].unsqueeze(1)).sub_(log_sum_N[rows].unsqueeze(1))
                z_rV.exp_().mul_(-upstream_r1)
                z_rV.scatter_add_(1, targets_N[rows].unsqueeze(1), upstream_r1)
            chunk = slice(start, start + len(grad_nV))
            grad_hidden_ND[chunk] = grad_nV @ weight_VD
            grad_weight_VD.addmm_(grad_nV.T, hidden_ND[chunk])  # in place: V x D is 519 MiB above
        return grad_hidden_ND, grad_weight_VD, None


def logit_chunks(hidden_ND, weight_VD):
    """Yields (number of its first row, logits_nV) of as many rows at a time as CHUNK_BYTES hold."""
    size = max(1, CHUNK_BYTES // (4 * len(weight_VD)))
    for start in range(0, len(hidden_ND), size):
        yield start, hidden_ND[start:start + size] @ weight_VD.T


def few_rows(start, logits_nV):
    """Yields (which rows of all, their part of a chunk): so few that what follows finds them in a cache."""
    for logits_rV in logits_nV.split(max(1, 2**18 // logits_nV.shape[1])):
        yield slice(start, start + len(logits_rV)), logits_rV
        start += len(logits_rV)


def linear_logprob(hidden_ND, weight_VD, targets_N, temperature=1.0):
    """Log-probability of one chosen token per row, and the entropy of the distribution it was drawn from.

    hidden_ND and LM head weight_VD (both float32 or bfloat16), targets_N (integers) -> (logprobs_N,
    entropies_N), float32, in nats, under softmax(hidden @ weight.T / temperature), of whose (N, V) logits
    only CHUNK_BYTES exist at a time. The entropies carry no gradient. Raises ValueError for any other shape,
    dtype or temperature, IndexError for a target that is no token (on a GPU, where a check would have to
    wait, its own assertion fails).
    """
    shapes = [tuple(x.shape) for x in (hidden_ND, weight_VD, targets_N)]
    if hidden_ND.ndim != 2 or shapes[1][1:] != shapes[0][1:] or shapes[2] != shapes[0][:1]:
        raise ValueError(f"linear_logprob: {shapes} given, not (N, D), (V, D), (N,): type hidden.view(-1, D)")
    dtypes = [x.dtype for x in (hidden_ND, weight_VD, targets_N)]
    is_typed = dtypes[:2] in ([torch.bfloat16] * 2, [torch.float32] * 2) and not targets_N.is_floating_point()
    if not (is_typed and 0.0 < temperature < math.inf):
        raise ValueError(f"linear_logprob: {dtypes}, temperature {temperature} given, not two of bfloat16 or "
                         "float32 and integers, positive and finite: type hidden.to(weight.dtype)")
    V = len(weight_VD)
    if targets_N.device.type == "cpu" and len(targets_N) and not 0 <= targets_N.min() <= targets_N.max() < V:
        raise IndexError(f"linear_logprob: targets from {targets_N.min()} to {targets_N.max()} of {V} tokens")
    return ChunkedLogprob.apply(hidden_ND.float() / temperature, weight_VD.float(), targets_N.long())
