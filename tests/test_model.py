"""Claims about model.py: it computes what transformers computes, saves what it loads, refuses the rest.

The golden files were made by tests/golden/make_golden.py. Only one slow test needs transformers."""
import copy
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save

from model import Linear, ModelConfig, Transformer, rms_norm, write_weights

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
LOGITS = load_file(GOLDEN / "logits.safetensors")
TOKENS = LOGITS["tokens"].unsqueeze(0)
SAVED_CASES = ("llama_biases", "llama_tied", "mistral", "qwen2_yarn", "qwen3", "rope_llama3")  # of all kinds
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, Q = "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"
GONE = object()


def edited(parts, edits):  # GONE removes
    return {name: value for name, value in {**parts, **edits}.items() if value is not GONE}


def make_folder(folder, case="llama", form="transformers4", **edits):
    """A tiny model folder. An edit's name is that of a file ("x.json"), a tensor ("x.weight") or a field."""
    files = {name: edits.pop(name) for name in list(edits) if name.endswith((".json", ".safetensors"))}
    tensors = {name: edits.pop(name) for name in list(edits) if "." in name}
    state = edited(load_file(GOLDEN / "weights" / f"{CASES[case]['weights']}.safetensors"), tensors)
    config = json.dumps(edited(CASES[case][form], edits)).encode()
    folder.mkdir(exist_ok=True)
    for name, content in edited({"config.json": config, WEIGHTS: save(state)}, files).items():
        (folder / name).write_bytes(content)
    return folder


def load(tmp_path, case="llama", form="transformers4", **options):
    return Transformer.from_pretrained(make_folder(tmp_path / "source", case, form), **options)


@torch.no_grad()
def logits_of(model):
    return model.logits(model(TOKENS))[0]


def assert_golden(model, case):
    """2e-5: float32 rounding of logits of order 1 makes 4e-6; cases differ from each other by over 0.4."""
    torch.testing.assert_close(logits_of(model), LOGITS[case], atol=2e-5, rtol=0)


@pytest.mark.parametrize("form", ["transformers4", "transformers5"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path, case, form):
    """Of every architecture and RoPE type, in both forms of config.json."""
    assert_golden(load(tmp_path, case, form), case)


@pytest.mark.parametrize("case", ["llama", "qwen2_yarn", "qwen3"])
def test_no_position_sees_a_later_one(tmp_path, case):
    """The gradient of one position's output reaches every earlier input; at later ones it is exactly 0."""
    model, here = load(tmp_path, case), 20
    inputs_BTD = model.model.embed_tokens(TOKENS).detach().requires_grad_()
    model.model.embed_tokens.register_forward_hook(lambda *_: inputs_BTD)
    gradient_TD, = torch.autograd.grad(model(TOKENS)[0, here].sum(), inputs_BTD)
    reached_T = gradient_TD[0].abs().amax(-1)
    assert (reached_T[:here + 1] > 0).all() and (reached_T[here + 1:] == 0).all()


def test_positions_count_from_zero_and_only_their_differences_matter(tmp_path):
    """Moving all by 100 changes nothing, spreading them out does. 1e-4: an angle near 150 radians is rounded
    by 1e-5 in float32, and two layers of attention amplify that."""
    model, positions_BT = load(tmp_path), torch.arange(TOKENS.shape[1]).unsqueeze(0)
    hidden_BTD = model(TOKENS)
    assert torch.equal(model(TOKENS, positions_BT), hidden_BTD)
    torch.testing.assert_close(model(TOKENS, positions_BT + 100), hidden_BTD, atol=1e-4, rtol=0)
    assert (model(TOKENS, positions_BT * 2) - hidden_BTD).abs().max() > 0.1


class GrowingCache(dict):
    """The smallest cache: keeps all keys and values of a layer; queries are the newest positions."""

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        past_k, past_v = self.get(layer, (k_BKTC[:, :, :0], v_BKTC[:, :, :0]))
        k_BKSC, v_BKSC = self[layer] = torch.cat((past_k, k_BKTC), 2), torch.cat((past_v, v_BKTC), 2)
        T, S = q_BHTC.shape[2], k_BKSC.shape[2]
        visible_TS = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        return F.scaled_dot_product_attention(q_BHTC, k_BKSC, v_BKSC, attn_mask=visible_TS, enable_gqa=True)


@pytest.mark.parametrize("case", ["llama_wide_heads", "qwen2", "qwen3_tied", "rope_yarn"])
def test_a_cache_filled_piece_by_piece_changes_nothing(tmp_path, case):
    """30 tokens, 1, then the rest through a cache give the hidden states of one pass (2e-5: as above)."""
    model, cache = load(tmp_path, case), GrowingCache()
    positions_BT = torch.arange(TOKENS.shape[1]).unsqueeze(0)
    cuts = slice(0, 30), slice(30, 31), slice(31, None)
    pieces = [model(TOKENS[:, cut], positions_BT[:, cut], cache) for cut in cuts]
    torch.testing.assert_close(torch.cat(pieces, 1), model(TOKENS), atol=2e-5, rtol=0)


def test_dynamic_rope_runs_inside_its_window_and_nowhere_else(tmp_path):
    """Beyond it, where others re-scale old keys, "dynamic" raises; "linear" runs on. On a device nothing is
    read back: a meta tensor, which has no numbers to read, passes beyond it too."""
    model, linear = load(tmp_path, "rope_dynamic"), load(tmp_path, "rope_linear")
    inside = torch.zeros(1, 64, dtype=torch.long)
    model(inside)
    for tokens_BT, positions_BT in ((F.pad(inside, (0, 1)), None), (inside[:, :1], torch.tensor([[64]]))):
        with pytest.raises(ValueError, match=r"dynamic.*max_position_embeddings \(64\)"):
            model(tokens_BT, positions_BT)
        linear(tokens_BT, positions_BT)
    assert model.to("meta")(F.pad(inside, (0, 1)).to("meta")).shape == (1, 65, 32)


def test_recompute_runs_a_block_twice_and_gives_the_same_gradients(tmp_path):
    """To the bit, also where a sampler's inference_mode saw the first use, which makes RoPE's frequencies."""
    gradients, calls = [], []
    for recompute in (False, True):
        model = load(tmp_path, recompute=recompute)
        with torch.inference_mode():
            model(TOKENS)
        model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(0))
        model(TOKENS).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 1 + 2 and gradients[0].keys() == dict(model.named_parameters()).keys() - {HEAD}
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("case", ["llama_tied", "qwen2", "qwen3", "rope_yarn"])
def test_bfloat16_stays_near_float32(tmp_path, case):
    """Hidden states (of size 1) at positions 0 and 4000, where bfloat16 angles would be off by 8 radians.
    Thirty roundings by 2^-9, signs random, make 0.011; seen: mean 0.012, at most 0.1. Logits are float32."""
    exact, model = load(tmp_path, case), load(tmp_path, case, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for start in (0, 4000):
        positions_BT = torch.arange(start, start + TOKENS.shape[1]).unsqueeze(0)
        hidden_BTD = model(TOKENS, positions_BT)
        error_BTD = (hidden_BTD.float() - exact(TOKENS, positions_BT)).abs()
        assert hidden_BTD.dtype == torch.bfloat16 and error_BTD.mean() < 0.02 and error_BTD.max() < 0.3
    assert model.logits(hidden_BTD).dtype == torch.float32


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_follows_and_sums_bfloat16_logits_in_float32(tmp_path):
    """Moved to CUDA after a first use, hidden states stay (1e-4: other kernels); bf16 logits are float64's to
    float32's rounding (1e-5; bf16's is 4e-3). Beyond dynamic RoPE's window states are NaN, and none
    are within it (a kernel may spread them to earlier tokens of a call, where 0 * NaN is NaN)."""
    model = load(tmp_path, "rope_llama3")
    hidden_BTD = model(TOKENS)
    torch.testing.assert_close(model.to("cuda")(TOKENS.to("cuda")).cpu(), hidden_BTD, atol=1e-4, rtol=0)
    hidden_BTD, weight_VD = hidden_BTD.to("cuda", torch.bfloat16), model.bfloat16().lm_head.weight
    exact_BTV = hidden_BTD.double() @ weight_VD.double().T
    torch.testing.assert_close(model.logits(hidden_BTD), exact_BTV.float(), atol=1e-5, rtol=1e-5)
    beyond_BT = torch.zeros(1, 65, dtype=torch.long, device="cuda")
    model = load(tmp_path, "rope_dynamic", device="cuda")
    assert model(beyond_BT)[0, 64].isnan().all() and model(beyond_BT[:, :64]).isfinite().all()


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}
BARE = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 7.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize("case, edits, expected", [
    ("qwen3", {"head_dim": GONE}, {"head_dim": 128}),
    ("llama", {"tie_word_embeddings": GONE}, {"tie_word_embeddings": False}),
    *((case, {"head_dim": None}, {"head_dim": 8}) for case in ("qwen3", "mistral")),
    ("mistral", {"num_key_value_heads": GONE, "num_attention_heads": 16}, {"num_key_value_heads": 8}),
    ("qwen2", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
    ("qwen2", {"attention_bias": True}, {"attention_bias": False}),  # these classes have no such fields
    ("mistral", {"mlp_bias": True}, {"mlp_bias": False}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, "layer_types": ["full_attention"]}, {}),
    # theta inside wins over that outside, a window outside over that inside; rope_scaling and rope_type win
    ("llama", {"rope_parameters": LINEAR, "rope_theta": 7.0}, {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": BARE | {"rope_theta": None}, "rope_theta": 9}, {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": YARN, "rope_scaling": BARE, "rope_theta": 9}, {"rope_parameters": LINEAR}),
    ("llama", {"rope_scaling": LINEAR | {"type": "yarn"}}, {"rope_parameters": LINEAR}),
    ("llama", {"rope_scaling": YARN | {"original_max_position_embeddings": 16},
               "original_max_position_embeddings": 8}, {"rope_parameters": YARN})])
def test_a_config_means_what_it_means_in_transformers(case, edits, expected):
    """What is left out, null, unused by a model type or said twice."""
    config = ModelConfig.from_dict(edited(CASES[case]["transformers4"], edits))
    assert {name: getattr(config, name) for name in expected} == expected


def test_norms_round_before_the_weight():
    """In bfloat16 the normalised value is rounded before the weight multiplies it, as in transformers."""
    x, weight = torch.randn(2, 200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    unit = F.rms_norm(x.float(), (64,), eps=1e-5)
    normed = rms_norm(x, weight[0], 1e-5)
    assert torch.equal(normed, unit.bfloat16() * weight[0])
    assert not torch.equal(normed, (unit * weight[0].float()).bfloat16())


@pytest.mark.parametrize("rows", [1, 2, 32, 257])
@torch.no_grad()
def test_a_product_of_few_rows_is_that_of_many(rows):
    """However a large weight is laid out: float64's numbers to float32's rounding (1e-5), also after the
    weight was changed in place, as an optimizer does it; of a copy, too."""
    linear = Linear(512, 600)
    x_BTD = torch.randn(rows, 1, 512, generator=torch.Generator().manual_seed(rows))
    for factor in (1, 2, 0.5):
        linear.weight.detach().view(-1)[:300].mul_(factor)
        for one in (linear, copy.deepcopy(linear)):
            expected_BTD = F.linear(x_BTD.double(), linear.weight.double(), linear.bias.double())
            torch.testing.assert_close(one(x_BTD).double(), expected_BTD, atol=1e-5, rtol=1e-5)
    assert (linear.packed is not None) == (1 < rows <= 256 and torch.backends.mkldnn.is_available())
    with torch.enable_grad():
        linear(x_BTD)
    assert linear.packed is None, "training gets the memory"


@torch.no_grad()
def test_a_product_takes_the_weight_that_is_there():
    """A new one of the same version, other memory, an adapter that is loaded between two samplings."""
    linear = Linear(512, 600)
    x_BTD = torch.randn(8, 1, 512)

    def error():
        return (linear(x_BTD) - F.linear(x_BTD, linear.weight, linear.bias)).abs().max()
    assert error() < 1e-4
    linear.weight = torch.nn.Parameter(torch.randn(600, 512))
    assert error() < 1e-3
    linear.weight.data = torch.randn(600, 512)
    assert error() < 1e-3
    scale = torch.ones(1)
    adapter = torch.nn.Module()
    adapter.forward = lambda weight: weight * scale
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", adapter)
    assert error() < 1e-3
    scale.fill_(3.0)
    assert error() < 1e-3


def test_random_weights_are_seeded_and_start_small():
    """initialize: one seed, one model; biases are 0, norms 1, matrices of standard deviation 0.02."""
    config = ModelConfig.from_dict(CASES["llama_biases"]["transformers4"])
    first, second, other = (Transformer(config).initialize(seed).state_dict() for seed in (1, 1, 2))
    assert not torch.equal(first[HEAD], other[HEAD])
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        if tensor.dim() == 2:  # at least 512 numbers know their deviation to 3%; 40% is far from chance
            assert 0.012 < tensor.std() < 0.028, name
        else:
            assert (tensor == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("form", ["transformers4", "transformers5"])
@pytest.mark.parametrize("case", SAVED_CASES)
def test_a_saved_model_is_the_same_model(tmp_path, case, form):
    """Identical logits and configuration, which states RoPE in both forms; no copy of a tied matrix; also of
    a model made from nothing, whose config.json is written from ModelConfig alone."""
    model, saved = load(tmp_path, case, form), tmp_path / "deep" / "saved"
    for original in (model, Transformer(model.config).initialize()):
        original.save_pretrained(saved)
        again = Transformer.from_pretrained(saved)
        assert torch.equal(logits_of(again), logits_of(original)) and again.config == model.config
        config = json.loads((saved / "config.json").read_text())
        for other_form in (("rope_parameters",), ("rope_theta", "rope_scaling")):
            assert config.keys() >= set(other_form)
            assert ModelConfig.from_dict(edited(config, dict.fromkeys(other_form, GONE))) == model.config
    with safe_open(saved / WEIGHTS, "pt") as reader:
        assert (HEAD in reader.keys()) == (not model.config.tie_word_embeddings)
        assert reader.metadata() == {"format": "pt"}


def test_what_we_do_not_know_is_saved_too(tmp_path):
    """Fields of config.json that model.py never reads; tokenizer files, valid JSON or not, of the folder that
    a model came from, which may be gone by then. dtype is stated under both its names."""
    files = {"tokenizer.json": b'"\xc3\xa9"\r\n', "merges.txt": b"a b\n", "generation_config.json": b"{"}
    fields = {"pretraining_tp": 7, "eos_token_id": [3, 5]}
    source = make_folder(tmp_path / "source", "qwen2", **fields)
    for name, content in {**files, "modeling_custom.py": b"raise SystemExit"}.items():
        (source / name).write_bytes(content)
    model = Transformer.from_pretrained(source)
    shutil.rmtree(source)
    model.save_pretrained(tmp_path / "saved")
    copied = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    config = json.loads(copied.pop("config.json"))
    assert edited(copied, {WEIGHTS: GONE}) == files
    fields |= {"sliding_window": 8, "dtype": "float32", "torch_dtype": "float32", "hidden_act": "silu"}
    assert config == config | fields | {"architectures": ["Qwen2ForCausalLM"]}
    assert "attention_bias" not in config  # qwen2 has biases although no field says so


def test_large_models_are_saved_in_shards_that_replace_each_other(tmp_path):
    """Shards within the limit, an index of all tensors, the same model back; no file of an earlier save (it
    would be read instead); readable by others, as config.json is (safetensors alone would leave 0600)."""
    saved, limit = tmp_path / "saved", 20_000
    first, second = load(tmp_path, "llama"), load(tmp_path, "llama_tied")
    for model in (first, second):
        model.save_pretrained(saved)
        write_weights(saved, model, limit)
        assert torch.equal(logits_of(Transformer.from_pretrained(saved)), logits_of(model))
        states = {file.name: load_file(file) for file in saved.glob("*.safetensors")}
        assert sorted(states) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        assert all(sum(tensor.nbytes for tensor in state.values()) <= limit for state in states.values())
        index = json.loads((saved / INDEX).read_text())
        assert index["weight_map"] == {name: file for file, state in states.items() for name in state}
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        assert {file.stat().st_mode for file in saved.iterdir()} == {(saved / "config.json").stat().st_mode}
    first.save_pretrained(saved)
    assert {file.name for file in saved.iterdir()} == {"config.json", WEIGHTS}


def test_what_nobody_could_load_is_not_saved(tmp_path):
    """A module that was wrapped, or parametrized and not merged: refused, and no file is written."""
    model = load(tmp_path)
    linear = model.model["layers"][0].self_attn.o_proj
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", torch.nn.Identity())
    with pytest.raises(ValueError, match="merge what was wrapped or parametrized first"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    torch.nn.utils.parametrize.remove_parametrizations(linear, "weight")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(Transformer.from_pretrained(tmp_path / "saved")), logits_of(model))


def test_a_model_is_never_saved_over_its_source(tmp_path):
    """Under any spelling; nothing there is touched."""
    model = load(tmp_path)
    (tmp_path / "alias").symlink_to(tmp_path / "source")
    before = {file: file.read_bytes() for file in (tmp_path / "source").iterdir()}
    for path in ("source", "x/../source", "alias"):
        with pytest.raises(ValueError, match="loaded from this folder"):
            model.save_pretrained(str(tmp_path / path))
    assert {file: file.read_bytes() for file in (tmp_path / "source").iterdir()} == before


CHECK_WITH_TRANSFORMERS = """
import sys, torch, transformers
from safetensors.torch import load_file
golden = load_file(sys.argv[1])
for folder in sys.argv[2:]:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), (folder, report)
    logits = model(golden["tokens"].unsqueeze(0)).logits[0]
    torch.testing.assert_close(logits, golden[folder.split("-")[0]], atol=2e-5, rtol=0)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_loads_what_we_save(tmp_path):
    """Sharded or not, no tensor missing, and it computes its logits (to 2e-5). In another process and folder:
    our `kernels` would be taken for a package that it looks for."""
    folders = []
    for case in SAVED_CASES:
        for limit in (2**30, 20_000):
            folders.append(f"{case}-{limit}")
            model = load(tmp_path, case)
            model.save_pretrained(tmp_path / folders[-1])
            write_weights(tmp_path / folders[-1], model, limit)
    command = [sys.executable, "-c", CHECK_WITH_TRANSFORMERS, GOLDEN / "logits.safetensors", *folders]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, check=True, timeout=300)


def test_shards_of_transformers_load_also_through_the_links_of_a_download_cache(tmp_path, monkeypatch):
    """Five shards and an index; Hugging Face's cache links snapshots/REVISION/file to ../../blobs/HASH."""
    snapshot = tmp_path / "snapshots" / "1a2b"
    snapshot.mkdir(parents=True)
    shutil.copytree(GOLDEN / "sharded", tmp_path / "blobs")
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    monkeypatch.chdir(snapshot)
    for path in (GOLDEN / "sharded", snapshot, "."):
        assert_golden(Transformer.from_pretrained(path), "qwen3_tied")


def test_harmless_leftovers_are_accepted(tmp_path):
    """inv_freq of old Llama files is ignored; an lm_head that equals the embedding it is tied to is fine, and
    may be its only name, as safetensors' save_model writes it."""
    embedding = load_file(GOLDEN / "weights" / "llama_tied.safetensors")["model.embed_tokens.weight"]
    leftovers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), HEAD: embedding.clone()}
    model = Transformer.from_pretrained(make_folder(tmp_path / "source", "llama_tied", **leftovers))
    assert_golden(model, "llama_tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    renamed = {HEAD: embedding.clone(), "model.embed_tokens.weight": GONE}
    folder = make_folder(tmp_path / "renamed", "llama_tied", **renamed)
    assert_golden(Transformer.from_pretrained(folder), "llama_tied")


def index(name):
    return json.dumps({"weight_map": {Q: WEIGHTS, HEAD: name}}).encode()


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NO_FILE = "no safetensors file"
REFUSED = [
    *(("mistral", {"sliding_window": x}, "sliding-window") for x in (4096, GONE)),  # GONE: 4096 by default
    ("qwen2", {"use_sliding_window": True}, "sliding-window"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
    ("qwen3", {"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported (llama, "),
    *(("llama", {x: {"bits": 4}}, "quantised weights") for x in ("quantization_config", "quantization")),
    ("llama", {"auto_map": {"AutoModel": "modeling_x.Model"}}, "auto_map"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
    ("llama", {"rope_scaling": {"type": "yarn", "mscale": 0.7}}, "'yarn' with settings ['mscale']"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor, high_f"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"rope_theta": GONE, "rope_parameters": YARN, "rope_scaling": BARE}, "write rope_theta at the"),
    ("llama", {"hidden_size": GONE}, "hidden_size missing"),
    # Values of another kind than they should be.
    ("llama", {"vocab_size": "40"}, "vocab_size is '40', not a positive integer"),
    ("llama", {"vocab_size": True}, "vocab_size is True, not a positive integer"),
    ("llama", {"head_dim": "24"}, "head_dim is '24'"), ("llama", {"model_type": ["llama"]}, "not text"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not a positive number"),
    ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    ("llama", {"rope_theta": 0}, "rope_theta is 0"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor of RoPE is 0, not a positive"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor of RoPE is '2'"),
    ("llama", {"rope_scaling": [1]}, "rope_scaling is [1], not an object"),
    ("llama", {"vocab_size": 10**18}, "vocab_size is 1000000000000000000, not a positive integer"),
    ("llama", {"rope_scaling": {"type": ["x"]}}, "type of RoPE is ['x'], not text"),
    ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor must be below"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1}, "a rope_theta above 1"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', not true or false"),
    ("llama", {"head_dim": 7}, "not 2 and 7"),
    ("llama", {"num_key_value_heads": 3}, "not 3 and 8"),
    ("qwen2", {"num_key_value_heads": GONE}, "not 32 and 8"),
    # Weights; 1e5 is finite in a file of float32 and infinite as float16.
    ("llama", {Q: GONE}, f"{Q} is missing"),
    ("llama", {HEAD: GONE}, f'{HEAD} is missing ("tie_word_embeddings": true uses the embedding)'),
    ("llama", {"a.x": torch.ones(1), "b.x": torch.ones(1)}, "a.x is unexpected; b.x is unexpected"),
    ("llama", {Q: torch.ones(32, 31)}, f"{Q} has shape [32, 31], expected [32, 32]"),
    *(("llama", {Q: x}, f"{Q} holds NaN") for x in (torch.eye(32).log(), torch.eye(32).sub(1).sqrt())),
    ("llama", {Q: torch.eye(32) * 1e5}, f"{Q} holds NaN or infinity in torch.float16"),
    *(("llama", {Q: torch.ones(32, 32).to(x)}, f"{Q} is {x}") for x in (torch.int8, torch.float8_e4m3fn)),
    ("llama_tied", {HEAD: torch.ones(40, 32)}, "keeps both"),
    ("llama", {"num_hidden_layers": 9}, "(and 43 more)"),  # 7 layers of 9 tensors: 63, of which 20 are named
    # Files: gone, cut, garbage, a Git LFS pointer; an index that leads out of its folder, or to a wrong file.
    *(("llama", {"config.json": x}, "not a model folder") for x in (GONE, b"{", b"[1]", b"7")),
    *(("llama", {WEIGHTS: x}, NO_FILE) for x in (GONE, b"", b"\x08", b"\xff" * 64, b"version https://git")),
    *(("llama", {INDEX: x}, f"{INDEX}: no {{") for x in (b"{}", b"[]", b"{", b'{"weight_map": 3}')),
    *(("llama", {INDEX: index(x)}, f"{INDEX}: no {{") for x in ("../x", "/etc/x", "x/y", ".", "..", "", 7)),
    ("llama", {INDEX: index("c.safetensors")}, NO_FILE),
    *(("llama", {INDEX: index("b.safetensors"), "b.safetensors": save({x: torch.ones(40, 32)})},
       f"{HEAD} is not in the shard that the index says") for x in (HEAD, "x"))]  # in two shards, in none


@pytest.mark.parametrize("case, edits, culprit", REFUSED)
def test_a_folder_that_we_do_not_compute_is_refused_by_name(tmp_path, case, edits, culprit):
    """Better no model than a wrong one: the text names the culprit and its place, and says what to do."""
    folder = make_folder(tmp_path / "source", case, **edits)
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(folder, dtype=torch.float16)
    assert culprit in str(error.value) and str(error.value).startswith(("config.json", str(folder)))
    if culprit == NO_FILE:
        assert "download it again (with git: git lfs pull), or convert pickled weights" in str(error.value)
