"""Claims about model.py: it computes what transformers computes, saves what it loads, refuses the rest.

The golden files were made by tests/golden/make_golden.py. Only one slow test needs transformers.
"""
import importlib.util
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import ModelConfig, RMSNorm, Transformer, linear_logprob, rope_frequencies, product

GOLDEN = Path(__file__).parent / "golden"
STORIES = Path(__file__).parents[1].parent / "shared" / "data" / "stories260K"
CASES = json.loads((GOLDEN / "cases.json").read_text())
LOGITS = load_file(GOLDEN / "logits.safetensors")
TOKENS = LOGITS["tokens"].unsqueeze(0)
FORMS = ("transformers4", "transformers5")
# Every model type, biases, tied and untied, three RoPE types.
SAVED_CASES = ("llama_biases", "llama_tied", "mistral", "qwen2_yarn", "qwen3", "rope_llama3")
GONE = object()


def make_folder(folder, case="llama", form="transformers4", weights=None, **config):
    """A model folder of a golden case. `config` and `weights` change fields and tensors; GONE removes one."""
    folder.mkdir(exist_ok=True)
    config = {**CASES[case][form], **config}
    config = {name: value for name, value in config.items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(config))
    state = {**load_file(GOLDEN / "weights" / f"{CASES[case]['weights']}.safetensors"), **(weights or {})}
    state = {name: tensor for name, tensor in state.items() if tensor is not GONE}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_shards(folder, weight_map=None):
    """The plain case in two shards, `a` and `b`, and an index of all tensors; `weight_map` adds entries."""
    state = load_file(make_folder(folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, held in shards.items():
        save_file({name: state[name] for name in held}, folder / file)
    index = {name: file for file, held in shards.items() for name in held} | (weight_map or {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def load(tmp_path, case="llama", form="transformers4", dtype=torch.float32):
    return Transformer.from_pretrained(make_folder(tmp_path / "source", case, form), dtype=dtype)


@torch.no_grad()
def logits_of(model):
    return model.logits(model(TOKENS))[0]


def refusal(folder):
    """The text with which a folder is refused."""
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(folder)
    return str(error.value)


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path, case, form):
    """Every architecture and RoPE type, in both forms of config.json, gives the logits of transformers.

    2e-5: the largest difference seen is 4e-6, float32 rounding of logits of order 1 (transformers ran eager
    attention, we fuse); the smallest error that a wrong RoPE makes here is 0.4 (see the next test).
    """
    torch.testing.assert_close(logits_of(load(tmp_path, case, form)), LOGITS[case], atol=2e-5, rtol=0)


def test_the_golden_cases_tell_all_rope_settings_apart():
    """Cases with the same weights differ in their logits by over 0.4: agreement above means something."""
    for case in CASES:
        for other in CASES:
            if case < other and CASES[case]["weights"] == CASES[other]["weights"]:
                assert (LOGITS[case] - LOGITS[other]).abs().max() > 0.4, (case, other)


def test_shards_written_by_transformers_load():
    """A checkpoint in five shards with an index, as transformers saved it, gives the logits of one file."""
    assert len(list((GOLDEN / "sharded").glob("*.safetensors"))) == 5
    model = Transformer.from_pretrained(GOLDEN / "sharded")
    torch.testing.assert_close(logits_of(model), LOGITS["qwen3_tied"], atol=2e-5, rtol=0)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K checkpoint is not here")
@torch.no_grad()
def test_a_trained_model_tells_the_same_story_as_in_transformers():
    """200 greedy tokens of stories260K equal transformers'. The closest call between two logits is 0.004."""
    golden = json.loads((GOLDEN / "stories260K.json").read_text())
    model, tokens = Transformer.from_pretrained(STORIES), list(golden["prompt"])
    for _ in golden["greedy"]:
        tokens.append(model.logits(model(torch.tensor([tokens]))[:, -1]).argmax().item())
    assert tokens[1:] == golden["greedy"] and len(golden["greedy"]) == 200


@pytest.mark.parametrize("case", ["llama", "qwen2_yarn", "qwen3"])
def test_no_position_sees_a_later_one(tmp_path, case):
    """The gradient of one position's output reaches every earlier input; at later ones it is exactly 0."""
    model, here = load(tmp_path, case), 20
    inputs_BTD = model.model.embed_tokens(TOKENS).detach().requires_grad_()
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: inputs_BTD)
    hidden_BTD = model(TOKENS)
    handle.remove()
    gradient_TD, = torch.autograd.grad(hidden_BTD[0, here].sum(), inputs_BTD)
    reached_T = gradient_TD[0].abs().amax(-1)
    assert (reached_T[:here + 1] > 0).all() and (reached_T[here + 1:] == 0).all()


@torch.no_grad()
def test_padding_on_the_right_changes_no_real_position(tmp_path):
    """A row padded on the right, whatever the padding, has the hidden states of the row alone.

    1e-5: another T makes the matrix products group their sums differently, nothing more.
    """
    model, length = load(tmp_path), 30
    alone_BTD = model(TOKENS[:, :length])
    for padding in (0, 39):
        padded = TOKENS.repeat(2, 1)
        padded[0, length:] = padding
        torch.testing.assert_close(model(padded)[:1, :length], alone_BTD, atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_count_from_zero_and_only_their_differences_matter(tmp_path):
    """Positions default to 0..T-1; moving all of them by 100 changes nothing, spreading them out does.

    1e-4: an angle near 150 radians is rounded by 1e-5 in float32, and two layers of attention amplify that.
    """
    model = load(tmp_path)
    positions_BT, hidden_BTD = torch.arange(TOKENS.shape[1]).unsqueeze(0), model(TOKENS)
    assert torch.equal(model(TOKENS, positions_BT), hidden_BTD)
    torch.testing.assert_close(model(TOKENS, positions_BT + 100), hidden_BTD, atol=1e-4, rtol=0)
    assert (model(TOKENS, positions_BT * 2) - hidden_BTD).abs().max() > 0.1


class GrowingCache:
    """The smallest cache: keeps all keys and values; queries are the newest positions."""

    def __init__(self):
        self.layers = {}

    def attend(self, layer, q_BHTC, k_BKTC, v_BKTC):
        past_k, past_v = self.layers.get(layer, (k_BKTC[:, :, :0], v_BKTC[:, :, :0]))
        k_BKSC, v_BKSC = torch.cat((past_k, k_BKTC), 2), torch.cat((past_v, v_BKTC), 2)
        self.layers[layer] = k_BKSC, v_BKSC
        T, S = q_BHTC.shape[2], k_BKSC.shape[2]
        visible_TS = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        return F.scaled_dot_product_attention(q_BHTC, k_BKSC, v_BKSC, attn_mask=visible_TS, enable_gqa=True)


@pytest.mark.parametrize("case", ["llama_wide_heads", "qwen2", "qwen3_tied", "rope_yarn"])
@torch.no_grad()
def test_a_cache_filled_piece_by_piece_changes_nothing(tmp_path, case):
    """Feeding 30 tokens, 1, then the rest through a cache gives the hidden states of one pass (to 2e-5)."""
    model, cache = load(tmp_path, case), GrowingCache()
    pieces = []
    for start, stop in ((0, 30), (30, 31), (31, TOKENS.shape[1])):
        pieces.append(model(TOKENS[:, start:stop], torch.arange(start, stop).unsqueeze(0), cache))
    torch.testing.assert_close(torch.cat(pieces, 1), model(TOKENS), atol=2e-5, rtol=0)


def test_dynamic_rope_runs_inside_its_window_and_nowhere_else(tmp_path):
    """Beyond max_position_embeddings, where others re-scale old keys, "dynamic" raises; "linear" runs on."""
    model, linear = load(tmp_path, "rope_dynamic"), load(tmp_path, "rope_linear")
    inside = torch.zeros(1, 64, dtype=torch.long)
    model(inside)
    for tokens_BT, positions_BT in ((F.pad(inside, (0, 1)), None), (inside[:, :1], torch.tensor([[64]]))):
        with pytest.raises(ValueError, match=r"dynamic.*max_position_embeddings \(64\)"):
            model(tokens_BT, positions_BT)
        linear(tokens_BT, positions_BT)


def test_a_first_use_under_inference_mode_does_not_spoil_training(tmp_path):
    """RoPE frequencies are made at first use; made by a sampler, they still serve a backward pass."""
    model = load(tmp_path)
    with torch.inference_mode():
        model(TOKENS)
    model(TOKENS).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == ["lm_head.weight"]  # logits were not asked for


@pytest.mark.parametrize("case", ["llama", "llama_tied", "qwen2", "qwen3", "rope_yarn"])
@torch.no_grad()
def test_bfloat16_stays_near_float32(tmp_path, case):
    """Loaded as bfloat16, hidden states (of size 1) stay near float32's, at position 0 and at 4000 alike.

    bfloat16 rounds by 2^-9 = 0.002; some thirty roundings in a row, signs random, make 0.011. Seen: 0.012 on
    average, 0.1 at most. Angles in bfloat16 would be off by 8 radians at position 4000.
    """
    exact, model = load(tmp_path, case), load(tmp_path, case, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for start in (0, 4000):
        positions_BT = torch.arange(start, start + TOKENS.shape[1]).unsqueeze(0)
        hidden_BTD = model(TOKENS, positions_BT)
        error_BTD = (hidden_BTD.float() - exact(TOKENS, positions_BT)).abs()
        assert hidden_BTD.dtype == torch.bfloat16 and error_BTD.mean() < 0.02 and error_BTD.max() < 0.3
    assert model.logits(hidden_BTD).dtype == torch.float32


def test_llama3_rope_has_three_bands():
    """High frequencies stay, low ones are divided by the factor, the rest lies between (as in Llama-3.2)."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"), 8)
    raw = {"model_type": "llama", "vocab_size": 8, "head_dim": 64, "max_position_embeddings": 131072, **sizes}
    plain_R, _ = rope_frequencies(ModelConfig.from_dict({**raw, "rope_theta": 5e5}))
    scaled_R, scale = rope_frequencies(ModelConfig.from_dict({**raw, "rope_parameters": rope}))
    wavelength_R = 2 * math.pi / plain_R
    short_R, long_R = wavelength_R < 8192 / 4, wavelength_R > 8192
    between_R = ~short_R & ~long_R
    assert scale == 1.0 and short_R.sum() == 15 and long_R.sum() == 14
    assert torch.equal(scaled_R[short_R], plain_R[short_R])
    assert torch.equal(scaled_R[long_R], plain_R[long_R] / 32)
    assert (scaled_R < plain_R)[between_R].all() and (scaled_R > plain_R / 32)[between_R].all()


def test_absent_fields_take_the_defaults_of_transformers():
    """What a config.json leaves out, or sets to null, means what it means in transformers, type by type."""
    def read(kind, **changes):
        raw = {**CASES["qwen2"]["transformers4"], "model_type": kind, "sliding_window": None, **changes}
        return ModelConfig.from_dict({name: value for name, value in raw.items() if value is not GONE})

    assert read("qwen3").head_dim == 128 and read("qwen3", head_dim=None).head_dim == 8
    assert read("llama").head_dim == read("qwen2").head_dim == read("mistral", head_dim=None).head_dim == 8
    assert read("llama", num_key_value_heads=GONE).num_key_value_heads == 4
    assert read("qwen2", num_key_value_heads=None).num_key_value_heads == 4
    assert read("mistral", num_key_value_heads=GONE, num_attention_heads=16).num_key_value_heads == 8
    assert read("llama", rope_theta=GONE).rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert read("llama", rms_norm_eps=GONE).rms_norm_eps == 1e-6 and not read("qwen3").tie_word_embeddings
    for kind in ("mistral", "qwen2"):  # neither class has these fields
        assert not read(kind, attention_bias=True).attention_bias and not read(kind, mlp_bias=True).mlp_bias


def test_rope_settings_are_read_in_the_order_of_transformers():
    """rope_scaling before rope_parameters; theta inside before outside; the original window the other way."""
    def read(**changes):
        return ModelConfig.from_dict({**CASES["llama"]["transformers4"], **changes}).rope_parameters

    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    assert read(rope_parameters=new, rope_theta=9.0) == new
    assert read(rope_parameters={**new, "rope_theta": None}, rope_theta=9.0)["rope_theta"] == 9.0
    assert read(rope_parameters=new, rope_scaling={"type": "linear", "factor": 3.0}, rope_theta=9.0) == {
        "rope_type": "linear", "factor": 3.0, "rope_theta": 9.0}
    assert read(rope_scaling={"rope_type": "linear", "type": "yarn", "factor": 3.0})["rope_type"] == "linear"
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    assert read(rope_scaling=yarn)["original_max_position_embeddings"] == 16
    outside = read(rope_scaling=yarn, original_max_position_embeddings=8)
    assert outside["original_max_position_embeddings"] == 8
    assert read(rope_scaling={"type": "yarn", "factor": 2.0})["original_max_position_embeddings"] == 64


def test_norms_round_before_the_weight():
    """In bfloat16 the normalised value is rounded before the weight multiplies it, as in transformers."""
    norm = RMSNorm(64, 1e-5).bfloat16()
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 200, 64, generator=generator).bfloat16()
    norm.weight.data = weight[0]
    unit = F.rms_norm(x.float(), (64,), eps=1e-5)
    assert torch.equal(norm(x), unit.bfloat16() * weight[0])
    assert not torch.equal(norm(x), (unit * weight[0].float()).bfloat16())


@pytest.mark.gpu
@torch.no_grad()
def test_a_model_moved_to_another_device_follows(tmp_path):
    """Used on the CPU, moved to CUDA, used again: the same hidden states, to rounding of other kernels."""
    model = load(tmp_path, "rope_llama3")
    hidden_BTD = model(TOKENS)
    on_cuda_BTD = model.to("cuda")(TOKENS.to("cuda"))
    torch.testing.assert_close(on_cuda_BTD.cpu(), hidden_BTD, atol=1e-4, rtol=0)


def test_random_weights_are_seeded_and_start_small():
    """initialize: one seed, one model; biases are 0, norms 1, matrices of standard deviation 0.02."""
    config = ModelConfig.from_dict(CASES["llama_biases"]["transformers4"])
    first, second, other = (Transformer(config).initialize(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    for name, tensor in first.items():
        if tensor.dim() == 2:  # at least 512 numbers know their deviation to 3%; 40% is far from chance
            assert 0.012 < tensor.std() < 0.028, name
        else:
            assert (tensor == (0 if name.endswith("bias") else 1)).all(), name


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SAVED_CASES)
def test_a_saved_model_is_the_same_model(tmp_path, case, form):
    """Saved and loaded again: identical logits, an identical configuration, and no copy of a tied matrix."""
    model = load(tmp_path, case, form)
    model.save_pretrained(tmp_path / "deep" / "saved")
    again = Transformer.from_pretrained(tmp_path / "deep" / "saved")
    assert torch.equal(logits_of(again), logits_of(model)) and again.config == model.config
    with safe_open(tmp_path / "deep" / "saved" / "model.safetensors", "pt") as reader:
        assert ("lm_head.weight" in reader.keys()) == (not model.config.tie_word_embeddings)
        assert reader.metadata() == {"format": "pt"}


@pytest.mark.parametrize("case", SAVED_CASES)
def test_a_model_made_from_nothing_can_be_saved(tmp_path, case):
    """Without a source folder, config.json is written from ModelConfig alone and reads back as the same."""
    config = ModelConfig.from_dict(CASES[case]["transformers5"])
    model = Transformer(config).initialize()
    model.save_pretrained(tmp_path / "saved")
    again = Transformer.from_pretrained(tmp_path / "saved")
    assert again.config == config and torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_config_states_rope_in_both_forms(tmp_path, form):
    """rope_theta and rope_scaling for transformers 4, rope_parameters for 5: both stand there, and agree."""
    load(tmp_path, "rope_llama3", form).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    settings = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32}
    assert saved["rope_theta"] == 100.0 and saved["rope_scaling"] == settings
    assert saved["rope_parameters"] == {"rope_theta": 100.0, **settings}
    for form in (("rope_parameters",), ("rope_theta", "rope_scaling")):  # each form alone says it all
        part = {name: value for name, value in saved.items() if name in form or not name.startswith("rope_")}
        assert ModelConfig.from_dict(part).rope_parameters == saved["rope_parameters"]


def test_a_saved_config_keeps_what_we_do_not_know_and_states_the_dtype(tmp_path):
    """Fields of the source that model.py never reads survive; dtype, under both of its names, is updated."""
    source = make_folder(tmp_path / "source", "qwen2", pretraining_tp=7, eos_token_id=[3, 5])  # in bfloat16
    Transformer.from_pretrained(source, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["pretraining_tp"] == 7 and saved["eos_token_id"] == [3, 5] and saved["sliding_window"] == 8
    assert saved["dtype"] == saved["torch_dtype"] == "float32" and saved["rope_scaling"] is None
    assert saved["architectures"] == ["Qwen2ForCausalLM"] and saved["hidden_act"] == "silu"
    assert "attention_bias" not in saved  # qwen2 has biases although no field says so


def test_saved_files_are_readable_by_others(tmp_path):
    """Files get mode 0666 & ~umask, as any file does; safetensors alone would leave 0600."""
    model, before = load(tmp_path), os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "saved")
        assert os.umask(0o027) == 0o027, "saving left another umask behind"
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "saved").iterdir()}
    assert modes == {"config.json": 0o640, "model.safetensors": 0o640}


def test_tokenizer_files_are_copied_byte_for_byte(tmp_path):
    """What stands beside the weights and makes a folder usable goes along unread, valid JSON or not."""
    model = load(tmp_path)
    companions = {"tokenizer.json": b'{"x": "\xc3\xa9"}\r\n', "merges.txt": b"a b\n",
                  "generation_config.json": b"{"}
    for name, content in companions.items():
        (tmp_path / "source" / name).write_bytes(content)
    (tmp_path / "source" / "modeling_custom.py").write_text("raise SystemExit")
    model.save_pretrained(tmp_path / "saved")
    assert {name: (tmp_path / "saved" / name).read_bytes() for name in companions} == companions
    assert not (tmp_path / "saved" / "modeling_custom.py").exists()


def test_large_models_are_saved_in_shards(tmp_path, monkeypatch):
    """Above MAX_SHARD_BYTES: shards of at most that size, an index of all tensors, the same model back."""
    model, total = load(tmp_path, "llama_tied"), 0
    monkeypatch.setattr("model.MAX_SHARD_BYTES", 20_000)
    model.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        state = load_file(tmp_path / "saved" / file)
        assert set(state) == {name for name, home in index["weight_map"].items() if home == file}
        assert sum(tensor.nbytes for tensor in state.values()) <= 20_000
        total += sum(tensor.nbytes for tensor in state.values())
    assert index["metadata"]["total_size"] == total == sum(p.nbytes for p in model.parameters())
    assert torch.equal(logits_of(Transformer.from_pretrained(tmp_path / "saved")), logits_of(model))


def test_a_second_save_leaves_nothing_of_the_first(tmp_path, monkeypatch):
    """Shards and an index of an earlier save would be read instead of the new file: they are gone."""
    first, second = load(tmp_path, "llama"), load(tmp_path, "llama_biases")
    for limit, model, files in ((20_000, first, 3), (2**30, second, 1), (20_000, first, 3)):
        monkeypatch.setattr("model.MAX_SHARD_BYTES", limit)
        model.save_pretrained(tmp_path / "saved")
        assert len(list((tmp_path / "saved").glob("*.safetensors"))) == files
        assert torch.equal(logits_of(Transformer.from_pretrained(tmp_path / "saved")), logits_of(model))


def test_a_model_is_never_saved_over_its_source(tmp_path):
    """Saving into the folder it came from is refused under any spelling, and nothing there is touched."""
    model = load(tmp_path)
    (tmp_path / "alias").symlink_to(tmp_path / "source")
    before = {file: file.read_bytes() for file in (tmp_path / "source").iterdir()}
    spellings = (tmp_path / "source", tmp_path / "x" / ".." / "source", tmp_path / "alias")
    for path in (*spellings, str(tmp_path / "source")):
        with pytest.raises(ValueError, match="loaded from this folder"):
            model.save_pretrained(path)
    assert {file: file.read_bytes() for file in (tmp_path / "source").iterdir()} == before


CHECK_WITH_TRANSFORMERS = """
import sys, torch, transformers
from safetensors.torch import load_file
tokens = load_file("ours.safetensors")["tokens"]
for name, ours in load_file("ours.safetensors").items():
    if name != "tokens":
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True)
        assert not any(report.values()), (name, report)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits[0], ours, atol=2e-5, rtol=0, msg=name)
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_loads_what_we_save(tmp_path, monkeypatch):
    """transformers loads saved folders, sharded or not, no tensor missing, and computes our logits (to 2e-5).

    In another process and folder: our `kernels` would be taken for a package that transformers looks for.
    """
    ours = {"tokens": TOKENS}
    for case in SAVED_CASES:
        for limit in (2**30, 20_000):
            monkeypatch.setattr("model.MAX_SHARD_BYTES", limit)
            model = load(tmp_path, case)
            model.save_pretrained(tmp_path / f"{case}-{limit}")
            ours[f"{case}-{limit}"] = logits_of(model)
    save_file(ours, tmp_path / "ours.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", CHECK_WITH_TRANSFORMERS], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split()[-1] == "done", done.stderr


# ---------------------------------------------------------------- refusals


REFUSED_CONFIGS = {
    "mistral with a window": ("mistral", {"sliding_window": 4096}, "sliding-window"),
    "mistral that leaves the window to a default": ("mistral", {"sliding_window": GONE}, "sliding-window"),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True}, "sliding-window"),
    "qwen3 with layer types": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-"),
    "mixture of experts": ("qwen3", {"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported (supported: "),
    "no model_type": ("llama", {"model_type": GONE}, "model_type None"),
    "quantised": ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantised weights"),
    "remote code": ("llama", {"auto_map": {"AutoModel": "modeling_x.Model"}}, "auto_map"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "unknown rope": ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
    "unknown rope, new form": ("llama", {"rope_parameters": {"rope_type": "mrope"}}, "rope_type 'mrope'"),
    "llama3 rope without its keys": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
                                     "'llama3' needs low_freq_factor, high_freq_factor"),
    "linear rope without a factor": ("llama", {"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
    "rope per layer type": ("qwen3", {"rope_parameters": {"full_attention": {"factor": 2.0}}}, "full_attent"),
    "partly rotated heads": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "a theta that rope_scaling would hide": ("llama", {
        "rope_theta": GONE, "rope_parameters": {"rope_theta": 1e6},
        "rope_scaling": {"type": "linear", "factor": 2.0}},
        "write rope_theta at the top level"),
    "no hidden size": ("llama", {"hidden_size": GONE}, "hidden_size is None"),
    "text for a number": ("llama", {"vocab_size": "40"}, "vocab_size is '40'"),
    "quantised, MLX form": ("llama", {"quantization": {"bits": 4}}, "quantised weights"),
    "an odd head size": ("llama", {"head_dim": 7}, "not 2 and 7"),
    "heads that do not divide": ("llama", {"num_key_value_heads": 3}, "not 3 and 8"),
    "qwen2 that leaves its heads to a default": ("qwen2", {"num_key_value_heads": GONE}, "not 32 and 8"),
}


@pytest.mark.parametrize("what", REFUSED_CONFIGS)
def test_a_config_we_do_not_compute_is_refused_by_name(tmp_path, what):
    """Better no model than a wrong one: the text names config.json and the culprit."""
    case, changes, culprit = REFUSED_CONFIGS[what]
    text = refusal(make_folder(tmp_path / "source", case, **changes))
    assert text.startswith("config.json") and culprit in text


def test_unused_window_fields_are_accepted(tmp_path):
    """Qwen files carry sliding_window and max_window_layers with use_sliding_window false: no window."""
    for changes in ({"use_sliding_window": True, "max_window_layers": 2},
                    {"layer_types": ["full_attention"] * 2}):
        Transformer.from_pretrained(make_folder(tmp_path / "source", "qwen2", **changes))


def test_a_path_that_is_no_model_folder_is_refused(tmp_path):
    """A missing folder, a file, a folder without config.json, a config.json that is no JSON object."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file", tmp_path / "empty", "meta-llama/Llama-3.2-1B"):
        assert "not a model folder" in (text := refusal(path)) and str(path) in text
    for content in ("{", "[1]", "7", "version https://git-lfs.github.com/spec/v1"):
        (tmp_path / "empty" / "config.json").write_text(content)
        assert "config.json: not a JSON object" in refusal(tmp_path / "empty")


HEAD, Q = "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"
REFUSED_WEIGHTS = {
    "missing": ("llama", {Q: GONE}, f"{Q} is missing"),
    "missing head": ("llama", {HEAD: GONE}, f"{HEAD} is missing"),
    "missing bias": ("llama", {"attention_bias": True}, "layers.0.self_attn.o_proj.bias is missing"),
    "extra": ("llama", {"score.weight": torch.ones(1)}, "score.weight is unexpected"),
    "a bias too many": ("mistral", {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, "q_proj.bias is un"),
    "shape": ("llama", {Q: torch.ones(32, 31)}, f"{Q} has shape [32, 31], expected [32, 32]"),
    "another vocabulary": ("llama", {"vocab_size": 41}, f"{HEAD} has shape [40, 32], expected [41, 32]"),
    "NaN": ("llama", {Q: torch.full((32, 32), float("nan"))}, f"{Q} holds NaN"),
    "one infinity": ("llama", {Q: torch.eye(32).masked_fill(torch.eye(32) > 0, math.inf)}, f"{Q} holds NaN"),
    "integers": ("llama", {Q: torch.ones(32, 32, dtype=torch.int8)}, f"{Q} is I8"),
    "float8": ("llama", {Q: torch.ones(32, 32).to(torch.float8_e4m3fn)}, f"{Q} is F8_E4M3"),
    "a tie that is none": ("llama_tied", {HEAD: torch.ones(40, 32)}, "tie_word_embeddings is true"),
    "a tie to nothing": ("llama_tied", {HEAD: torch.ones(40, 32), "model.embed_tokens.weight": GONE},
                         "model.embed_tokens.weight is missing"),
}


@pytest.mark.parametrize("what", REFUSED_WEIGHTS)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, what):
    """Every tensor that is missing, extra, misshapen, not finite or of a type we do not read is named."""
    case, changes, culprit = REFUSED_WEIGHTS[what]
    weights = {name: value for name, value in changes.items() if "." in name}
    config = {name: value for name, value in changes.items() if "." not in name}
    text = refusal(make_folder(tmp_path / "source", case, weights=weights, **config))
    assert culprit in text and str(tmp_path / "source") in text


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    """One error lists all culprits, the first 20 of them by name."""
    weights = {Q: GONE, HEAD: torch.ones(2, 2), "x.y": torch.ones(1)}
    text = refusal(make_folder(tmp_path / "source", weights=weights))
    assert f"{Q} is missing" in text and f"{HEAD} has shape" in text and "x.y is unexpected" in text
    text = refusal(make_folder(tmp_path / "source", num_hidden_layers=9))
    assert "(and 43 more)" in text  # 7 layers of 9 tensors are missing: 63, of which 20 are named


def test_weights_that_overflow_the_asked_dtype_are_refused(tmp_path):
    """1e5 is finite in a file of float32 and infinite as float16: refused as that, loaded as bfloat16."""
    folder = make_folder(tmp_path / "source", weights={Q: torch.full((32, 32), 1e5)})
    with pytest.raises(ValueError, match=f"{Q} holds NaN or infinity in torch.float16"):
        Transformer.from_pretrained(folder, dtype=torch.float16)
    Transformer.from_pretrained(folder, dtype=torch.bfloat16)


def test_harmless_leftovers_are_accepted(tmp_path):
    """inv_freq of old Llama files is ignored; an lm_head that equals the embedding it is tied to is fine."""
    embedding = load_file(GOLDEN / "weights" / "llama_tied.safetensors")["model.embed_tokens.weight"]
    leftovers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), HEAD: embedding.clone()}
    model = Transformer.from_pretrained(make_folder(tmp_path / "source", "llama_tied", weights=leftovers))
    torch.testing.assert_close(logits_of(model), LOGITS["llama_tied"], atol=2e-5, rtol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("content, culprit", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
    (b"", "not readable"), (b"\x08\x00", "not readable"), (b"\xff" * 64, "not readable"),
    (None, "not readable")])
def test_files_that_are_no_weights_are_refused(tmp_path, content, culprit):
    """A Git LFS pointer, an empty, cut or garbage file: the text names it and says to download it again."""
    file = make_folder(tmp_path / "source") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    text = refusal(tmp_path / "source")
    assert culprit in text and str(file) in text and "download it again" in text


def test_pickled_weights_are_never_read(tmp_path):
    """pytorch_model.bin alone: refused with a hint, unopened."""
    folder = make_folder(tmp_path / "source")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "convert them to safetensors" in refusal(folder)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/passwd", "sub/c.safetensors", "..", ".", "",
                                  "link.safetensors", "c.safetensors", 7, ["a.safetensors"]])
def test_an_index_cannot_point_out_of_its_folder(tmp_path, name):
    """Parent folders, absolute paths, links out of the folder, absent files, non-names: refused by name."""
    folder = make_shards(tmp_path / "source", {HEAD: name})
    save_file({HEAD: torch.ones(40, 32)}, tmp_path / "stolen.safetensors")
    (folder / "sub").mkdir()
    shutil.copyfile(tmp_path / "stolen.safetensors", folder / "sub" / "c.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "stolen.safetensors")
    text, is_absent = refusal(folder), name in ("c.safetensors", 7, ["a.safetensors"])
    assert (f"shard {name} is missing" if is_absent else f"{name!r} is outside the model folder") in text
    assert "model.safetensors.index.json" in text


def test_shards_must_be_what_their_index_says(tmp_path):
    """A tensor in two shards, one that is in neither, an index without a weight_map: refused by name."""
    assert logits_of(Transformer.from_pretrained(make_shards(tmp_path / "fine"))).isfinite().all()
    folder = make_shards(tmp_path / "twice")
    save_file({**load_file(folder / "b.safetensors"), HEAD: torch.ones(40, 32)}, folder / "b.safetensors")
    assert f"{HEAD} is in two shards" in refusal(folder)
    folder = make_shards(tmp_path / "neither", {"x.y": "b.safetensors"})
    assert "x.y is not in b.safetensors" in refusal(folder)
    for content in ("{}", "[]", "{", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(content)
        assert "index.json: not an index of the form" in refusal(folder)


def test_links_of_a_download_cache_are_followed(tmp_path, monkeypatch):
    """Hugging Face's cache links snapshots/<revision>/file to ../../blobs/<hash>: that way out is allowed."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1a2b", tmp_path / "models--x" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(make_shards(snapshot).iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    monkeypatch.chdir(snapshot)
    for path in (snapshot, "."):
        model = Transformer.from_pretrained(path)
        torch.testing.assert_close(logits_of(model), LOGITS["llama"], atol=2e-5, rtol=0)


# ---------------------------------------------------------------- the log-prob head (see also test_linear_logprob.py)


@pytest.mark.parametrize("hidden_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16, torch.float16])
def test_the_log_prob_head_widens_half_precision_first(hidden_type, weight_type):
    """Types may be mixed: log-probs and entropies equal those of the same numbers in float32 to the bit, and so do
    gradients once rounded to the type of their tensor."""
    generator = torch.Generator().manual_seed(2)
    hidden_ND = torch.randn(5, 8, generator=generator).to(hidden_type)
    weight_VD = torch.randn(700, 8, generator=generator).to(weight_type)
    results = []
    for narrow in (True, False):
        leaves = [x.clone() if narrow else x.float() for x in (hidden_ND, weight_VD)]
        logprobs_N, entropies_N = linear_logprob(*(x.requires_grad_() for x in leaves), torch.arange(5) * 170, 1.7)
        logprobs_N.sum().backward()
        results.append([logprobs_N, entropies_N, *(leaf.grad for leaf in leaves)])
    assert results[0][0].dtype == results[0][1].dtype == torch.float32
    for narrow, wide in zip(*results):
        assert torch.equal(narrow, wide.to(narrow.dtype))
    assert (results[0][2].dtype, results[0][3].dtype) == (hidden_type, weight_type)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_the_log_prob_head_equals_log_softmax_of_the_logits(tmp_path, temperature):
    """What the update trains on is what `logits` says: log_softmax(logits / temperature) of a model, in float64 up to
    the head's own float32 rounding of sums of 32 terms of order 1 (1e-6)."""
    model = load(tmp_path)
    hidden_ND = model(TOKENS)[0].detach()
    logprobs_N, entropies_N = linear_logprob(hidden_ND, model.lm_head.weight, TOKENS[0], temperature)
    all_NV = (hidden_ND.double() @ model.lm_head.weight.double().T / temperature).log_softmax(-1)
    expected_N = all_NV.gather(1, TOKENS[0].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs_N.double(), expected_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropies_N.double(), -(all_NV.exp() * all_NV).sum(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 32, 129])
def test_a_product_of_few_rows_is_that_of_many(rows, bias):
    """Whichever way round a large weight is multiplied, the numbers are those of float64 to float32's rounding."""
    generator = torch.Generator().manual_seed(rows)
    x_BTD, weight = torch.randn(rows, 1, 512, generator=generator), torch.randn(600, 512, generator=generator)
    b = torch.randn(600, generator=generator) if bias else None
    expected = torch.nn.functional.linear(x_BTD.double(), weight.double(), None if b is None else b.double())
    with torch.no_grad():
        out = product(x_BTD, weight, b)
    assert out.shape == (rows, 1, 600) and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-5)
