"""Claims about packing.py: a context that runs once gives every hidden state and every gradient of running it G times.

The rival in all of them is the plain way: each rollout alone, as one full row without a cache. In float64 the two may
differ by rounding only, about 1e-15 per operation, so 1e-10 of a gradient's largest entry is already generous.
"""
import doctest
import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import packing
from model import ModelConfig, Transformer
from packing import Prefixes, forward_suffixes, layout

VOCABULARY = 61
# Contexts and completions, in tokens: an empty prefix, prefixes of equal length, groups of one row and of ragged ones.
MIXED = [(1, [3, 5]), (9, [4, 9, 1, 12]), (9, [6]), (30, [2, 2, 2]), (4, [20, 1, 7])]


def make_model(kind="qwen3", heads=4, kv_heads=2, dtype=torch.float64, **kwargs):
    """A random decoder with weights so large that attention is far from uniform."""
    config = ModelConfig(kind, VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8,
                         max_position_embeddings=256, **kwargs)
    model = Transformer(config).initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
            else:  # biases and norms, so that their gradients are not those of a special case
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype)


def make_groups(shape, seed=0):
    """[(context length, completion lengths)] -> [(context ids, list of completion ids)]."""
    rng = random.Random(seed)
    return [(rng.choices(range(VOCABULARY), k=P), [rng.choices(range(VOCABULARY), k=R) for R in lengths])
            for P, lengths in shape]


def split(context, completions):
    """A group as (prefix, suffixes): the context's last token opens every row."""
    return context[:-1], [[context[-1], *ids[:-1]] for ids in completions]


def loss_of(hidden_ND, completion, length):
    """A loss that weighs every position and channel differently, by a draw that depends on the completion only."""
    generator = torch.Generator().manual_seed(hash(tuple(completion)) % 2**31)
    weights_ND = torch.randn(length, hidden_ND.shape[1], generator=generator, dtype=torch.float64)
    return (hidden_ND * weights_ND.to(hidden_ND)).sum()


def take_gradients(model):
    """{name: gradient} of all parameters that have one; none is left behind."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def unshared(model, groups):
    """(hidden states of the positions that predict the completions, gradients), each rollout alone in a full row."""
    hiddens = []
    for context, completions in groups:
        for ids in completions:
            tokens_BT = torch.tensor([context + ids[:-1]], device=next(model.parameters()).device)
            hidden_ND = model(tokens_BT)[0, len(context) - 1:]
            loss_of(hidden_ND, ids, len(ids)).backward()
            hiddens.append(hidden_ND.detach())
    return torch.cat(hiddens), take_gradients(model)


def permutation(size, seed):
    """0 .. size - 1 in an order that depends on the seed; as they are without one."""
    return list(range(size)) if seed is None else random.Random(seed).sample(range(size), size)


def shared(model, groups, rows_per_pass=1000, shuffle=None, backward=True):
    """The same through packing.py; `shuffle` is the seed of an order for the prefixes and one for the rows."""
    rows, prefixes = [], [None] * len(groups)
    for number, (context, completions) in zip(permutation(len(groups), shuffle), groups):
        prefixes[number], suffixes = split(context, completions)
        rows += [(number, suffix, ids) for suffix, ids in zip(suffixes, completions)]
    order = permutation(len(rows), shuffle)
    phase1, hiddens = Prefixes(model, prefixes), {}
    for start in range(0, len(rows), rows_per_pass):
        members = order[start:start + rows_per_pass]
        hidden_ND = forward_suffixes(model, phase1, [rows[n][:2] for n in members])
        parts = hidden_ND.split([len(rows[n][1]) for n in members])
        sum(loss_of(part, rows[n][2], len(part)) for n, part in zip(members, parts)).backward()
        hiddens |= {n: part.detach() for n, part in zip(members, parts)}
    if backward:
        phase1.backward()
    return torch.cat([hiddens[n] for n in range(len(rows))]), take_gradients(model)


def error(results, expected):
    """Largest difference of hidden states and of any parameter's gradient, in units of the expected tensor's largest
    entry."""
    (hidden, gradients), (true_hidden, true_gradients) = results, expected
    assert gradients.keys() == true_gradients.keys()
    pairs = [(hidden, true_hidden)] + [(gradients[name], true) for name, true in true_gradients.items()]
    pairs = [(x.double().cpu(), y.double().cpu()) for x, y in pairs]
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_hidden_states_and_all_gradients_are_those_of_the_unshared_pass(kind, heads, kv_heads):
    """Every parameter, GQA ratios 1, 2 and 4, groups of all shapes in one micro-batch."""
    model, groups = make_model(kind, heads, kv_heads), make_groups(MIXED)
    expected = unshared(model, groups)
    assert len(expected[1]) == len(list(model.parameters())) - 1  # all but the LM head
    assert error(shared(model, groups), expected) < 1e-10


@pytest.mark.parametrize("P", [0, 1, 5, 6, 7, 40])
def test_prefixes_may_be_empty_or_of_any_length(P):
    """Shorter than, as long as and longer than the rows of 6 tokens behind it."""
    model, groups = make_model(), make_groups([(P + 1, [6, 6, 4])])
    assert error(shared(model, groups), unshared(model, groups)) < 1e-10


@pytest.mark.parametrize("rows_per_pass", [1, 3, 5])
def test_micro_batches_may_cut_through_groups(rows_per_pass):
    """Gradients of the K/V add up over the passes, a group's rows may be in several of them."""
    model, groups = make_model(), make_groups(MIXED + [(12, [5, 8, 8, 3, 6, 7])])
    assert error(shared(model, groups, rows_per_pass), unshared(model, groups)) < 1e-10


@pytest.mark.parametrize("shuffle", [1, 2])
def test_order_of_prefixes_and_rows_does_not_matter(shuffle):
    """Rows of different groups interleaved, prefixes not by length: hidden states come back in the rows' order."""
    model, groups = make_model(), make_groups(MIXED)
    assert error(shared(model, groups, 4, shuffle), unshared(model, groups)) < 1e-10


def test_float32_is_as_exact_as_float32_can_be():
    """Errors against float64 stay below 1e-5 of the gradient's scale: eps is 1.2e-7, sums have some hundred terms."""
    groups = make_groups(MIXED)
    assert error(shared(make_model(dtype=torch.float32), groups), unshared(make_model(), groups)) < 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_is_no_worse_than_without_sharing(device):
    """Both are compared with float64. The K/V gradients are rounded to 8 bits once more, hence half as much again."""
    groups = make_groups(MIXED + [(70, [40] * 8)])
    expected = unshared(make_model(), groups)
    model = make_model(dtype=torch.bfloat16).to(device)
    ours, theirs = (error(run(model, groups), expected) for run in (shared, unshared))
    assert ours < 1.5 * theirs and theirs < 0.5, (ours, theirs)


def test_the_loss_reaches_the_prefix_and_only_through_backward():
    """A token that only the prefix holds has its full gradient; without `backward` it has none, and nothing warns."""
    model = make_model()
    groups = [([60, 60, 7], [[1, 2, 3], [4, 5]])]  # 7 opens the rows, 60 is in the prefix alone
    expected = unshared(model, groups)[1]["model.embed_tokens.weight"][60]
    ours = shared(model, groups)[1]["model.embed_tokens.weight"][60]
    forgotten = shared(model, groups, backward=False)[1]["model.embed_tokens.weight"][60]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert forgotten.abs().max() == 0


def test_a_second_backward_is_an_error():
    """Called between two micro-batches by mistake, it does not pass in silence."""
    model = make_model()
    prefixes = Prefixes(model, [[1, 2, 3]])
    forward_suffixes(model, prefixes, [(0, [4])]).sum().backward()
    prefixes.backward()
    forward_suffixes(model, prefixes, [(0, [5])]).sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        prefixes.backward()


class Recomputed(torch.nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args):
        return checkpoint(self.block, *args, use_reentrant=False)


def test_recomputed_activations_change_nothing(monkeypatch):
    """With every block checkpointed: same gradients, attend runs again for every layer of both phases, and the K/V of
    phase 1 stay the first ones."""
    model, groups = make_model(), make_groups(MIXED)
    expected, calls = unshared(model, groups), []
    for cache in (packing.Prefixes, packing.Suffixes):
        def attend(self, layer, *qkv, plain=cache.attend):
            kept = [id(x) for leaves in getattr(self, "leaves", []) for x in leaves]
            out = plain(self, layer, *qkv)
            assert [id(x) for leaves in getattr(self, "leaves", []) for x in leaves][:len(kept)] == kept
            calls.append((type(self).__name__, layer))
            return out
        monkeypatch.setattr(cache, "attend", attend)
    blocks = model.model["layers"]
    model.model["layers"] = torch.nn.ModuleList(Recomputed(block) for block in blocks)
    hidden_ND, gradients = shared(model, groups, rows_per_pass=6)
    gradients = {name.replace(".block", ""): gradient for name, gradient in gradients.items()}
    assert error((hidden_ND, gradients), expected) < 1e-10
    passes = {name: [layer for who, layer in calls if who == name] for name in ("Prefixes", "Suffixes")}
    assert len(passes["Suffixes"]) == 2 * 3 * 3  # twice, 3 micro-batches, 3 layers
    assert len(passes["Prefixes"]) >= 2 * 3 - 1  # the last layer may stop before: only its K/V have a gradient


def test_without_gradients_it_only_computes():
    """Under no_grad, and with a frozen model: same hidden states, no graph, and `backward` has nothing to do."""
    model, groups = make_model(), make_groups(MIXED)
    expected_ND, _ = unshared(model, groups)
    prefixes, suffixes = zip(*(split(*group) for group in groups))
    rows = [(i, suffix) for i, group in enumerate(suffixes) for suffix in group]
    with torch.no_grad():
        plain = Prefixes(model, prefixes)
        hidden_ND = forward_suffixes(model, plain, rows)
    frozen = Prefixes(model.requires_grad_(False), prefixes)
    for cache, result_ND in ((plain, hidden_ND), (frozen, forward_suffixes(model, frozen, rows))):
        torch.testing.assert_close(result_ND, expected_ND, rtol=1e-10, atol=1e-12)
        assert not result_ND.requires_grad and not any(x.requires_grad for pair in cache.leaves for x in pair)
        cache.backward()


def test_empty_and_unused_prefixes_cost_nothing():
    """Contexts of one token need no phase 1; a prefix without rows adds no gradient."""
    model = make_model()
    only_empty = make_groups([(1, [4, 6]), (1, [3])])
    assert error(shared(model, only_empty), unshared(model, only_empty)) < 1e-10
    assert Prefixes(model, [[], []]).leaves == []
    groups = make_groups([(5, [4, 6]), (8, []), (1, [3]), (1, [])])
    assert error(shared(model, groups), unshared(model, groups)) < 1e-10


def test_linear_layers_see_every_token_once_and_no_padding():
    """P + sum of R tokens per group, counted at the MLP: 45 + 18 rather than the 270 of a padded batch of 6 rows."""
    model, tokens = make_model(), []
    model.model["layers"][0].mlp.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[:2]))
    shared(model, make_groups([(46, [1, 2, 3, 3, 4, 5])]))
    assert tokens == [(1, 45), (1, 18)]


def test_less_than_half_of_the_places_is_padding():
    """However the lengths are spread; and rows of similar length share a call."""
    rng = random.Random(0)
    for _ in range(50):
        rows = [(rng.randrange(4), [0] * round(10 ** rng.uniform(0, 3))) for _ in range(rng.randrange(1, 40))]
        positions, places, calls = layout([7, 0, 3, 30], rows)
        assert len(set(places)) == len(places) == len(positions) == sum(len(ids) for _, ids in rows)
        assert max(places) < sum(G * R for _, G, R in calls) <= 2 * len(places)
    assert layout([5], [(0, [0] * n) for n in (6, 10, 5, 8)])[2] == [(0, 4, 10)]


@pytest.mark.parametrize("row", [(0, []), (2, [1]), (-1, [1])])
def test_a_row_that_continues_nothing_is_refused(row):
    """No tokens, or a prefix that does not exist: named by its number."""
    model = make_model()
    with pytest.raises(ValueError, match="row 1: .* prefix from 0 to 1"):
        forward_suffixes(model, Prefixes(model, [[1, 2], [3]]), [(0, [4]), row])


def test_the_example_in_the_docstring_is_true():
    """layout, in small integers."""
    assert doctest.testmod(packing) == (0, 1)


@pytest.mark.gpu
def test_flash_attention_runs_in_phase_2_on_cuda():
    """With heads of 64 channels in bf16, phase 2 runs with every other backend forbidden, forward and backward, and
    float32 gradients on the GPU equal those of the CPU to 1e-3 (TF32 is off; sums are ordered differently)."""
    groups = make_groups([(65, [64, 50, 64, 33]), (20, [40, 41])])
    config = ModelConfig("qwen2", VOCABULARY, 256, 256, 2, 4, 2, 64, 256)
    model = Transformer(config).initialize(0).to("cuda", torch.bfloat16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        hidden_ND, gradients = shared(model, groups)
    assert all(torch.isfinite(x).all() for x in (hidden_ND, *gradients.values()))
    on_cpu, model = unshared(make_model(dtype=torch.float32), groups), make_model(dtype=torch.float32).cuda()
    assert error(shared(model, groups), on_cpu) < 1e-3
