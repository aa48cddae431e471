"""Claims about packing.py: a context that runs once gives every hidden state and every gradient of running it
G times.

The rival in all of them is the plain way: each rollout alone, as one full row without a cache. In float64
the two may differ by rounding only, about 1e-15 per operation, so 1e-10 of a gradient's largest entry is
already generous.
"""
import random
from types import SimpleNamespace

import pytest
import torch

from model import ModelConfig, Transformer
from packing import Prefixes, forward_suffixes, layout, make_batches

VOCABULARY = 61
# Contexts and completions, in tokens: an empty prefix, prefixes of equal length, one row and ragged ones.
MIXED = [(1, [3, 5]), (9, [4, 9, 1, 12]), (9, [6]), (30, [2, 2, 2]), (4, [20, 1, 7])]


def make_model(kind="qwen3", heads=4, kv_heads=2, dtype=torch.float64, recompute=False):
    """A random decoder with weights so large that attention is far from uniform."""
    config = ModelConfig(kind, VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8,
                         max_position_embeddings=256)
    model = Transformer(config, recompute=recompute).initialize(0)
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
    """A loss that weighs every position and channel differently, by a draw that depends on the completion
    only."""
    generator = torch.Generator().manual_seed(hash(tuple(completion)) % 2**31)
    weights_ND = torch.randn(length, hidden_ND.shape[1], generator=generator, dtype=torch.float64)
    return (hidden_ND * weights_ND.to(hidden_ND)).sum()


def take_gradients(model):
    """{name: gradient} of all parameters that have one; none is left behind."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def unshared(model, groups):
    """(hidden states of the positions that predict the completions, gradients), each rollout alone in a
    full row."""
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
    """The same through packing.py; `shuffle` is the seed of an order for the prefixes and one for the
    rows."""
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
    """Largest difference of hidden states and of any parameter's gradient, in units of the expected
    tensor's largest entry."""
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


@pytest.mark.parametrize("rows_per_pass, shuffle", [(1, None), (3, None), (5, None), (4, 1), (4, 2), (99, 1)])
@pytest.mark.parametrize("shape", [
    MIXED + [(12, [5, 8, 8, 3, 6, 7])], [(1, [4, 6]), (1, [3])], [(5, [4, 6]), (8, []), (1, [3]), (1, [])],
    [(P + 1, [6, 6, 4]) for P in (0, 1, 5, 6, 7, 40)]])
def test_prefixes_of_any_length_and_rows_in_any_order_and_any_micro_batches(shape, rows_per_pass, shuffle):
    """Prefixes empty, unused, shorter than, as long as and longer than the rows behind them; micro-batches
    that cut through groups; rows of different groups interleaved: hidden states come back in the rows'
    order, gradients add up."""
    model, groups = make_model(), make_groups(shape)
    assert error(shared(model, groups, rows_per_pass, shuffle), unshared(model, groups)) < 1e-10


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_low_precision_is_no_worse_than_without_sharing(device):
    """Compared with float64. float32: below 1e-5 of the gradient's scale, since eps is 1.2e-7 and sums
    have some hundred terms (1e-3 on a GPU, whose kernels are its own). bf16: K/V gradients are rounded to
    8 bits once more, hence half as much error again."""
    groups = make_groups(MIXED + [(70, [40] * 8)])
    expected = unshared(make_model(), groups)
    limit = 1e-5 if device == "cpu" else 1e-3
    assert error(shared(make_model(dtype=torch.float32).to(device), groups), expected) < limit
    model = make_model(dtype=torch.bfloat16).to(device)
    ours, theirs = (error(way(model, groups), expected) for way in (shared, unshared))
    assert ours < 1.5 * theirs and theirs < 0.5, (ours, theirs)


def test_the_loss_reaches_the_prefix_through_backward_and_only_once():
    """A token that only the prefix holds has its full gradient; without `backward` it has none, and
    nothing warns. A second `backward`, called between two micro-batches by mistake, does not pass in
    silence."""
    model = make_model()
    groups = [([60, 60, 7], [[1, 2, 3], [4, 5]])]  # 7 opens the rows, 60 is in the prefix alone
    expected = unshared(model, groups)[1]["model.embed_tokens.weight"][60]
    ours = shared(model, groups)[1]["model.embed_tokens.weight"][60]
    forgotten = shared(model, groups, backward=False)[1]["model.embed_tokens.weight"][60]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert forgotten.abs().max() == 0
    prefixes = Prefixes(model, [[1, 2, 3]])
    forward_suffixes(model, prefixes, [(0, [4])]).sum().backward()
    prefixes.backward()
    forward_suffixes(model, prefixes, [(0, [5])]).sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        prefixes.backward()


def test_linear_layers_see_every_token_once_and_no_padding_also_when_recomputed():
    """P + sum of R tokens a group, counted at an MLP: 45 + 18 rather than the 270 of a padded batch of 6
    rows. With every block checkpointed both phases run once more on the way back; hidden states and
    gradients stay as they are."""
    groups = make_groups([(46, [1, 2, 3, 3, 4, 5])])
    expected = unshared(make_model(), groups)
    for recompute in (False, True):
        model, tokens = make_model(recompute=recompute), []
        mlp = model.model["layers"][1].mlp
        mlp.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
        assert error(shared(model, groups), expected) < 1e-10
        assert tokens == ([45, 18, 18, 45] if recompute else [45, 18])


def test_without_gradients_it_only_computes():
    """Under no_grad, and with a frozen model: same hidden states, no graph, and `backward` has nothing to
    do."""
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
    assert Prefixes(model, [[], []]).leaves == [], "contexts of one token need no phase 1"


def test_less_than_half_of_the_places_is_padding():
    """However the lengths are spread; and rows of similar length, the longest first, share a call."""
    rng = random.Random(0)
    for _ in range(50):
        rows = [(rng.randrange(4), [0] * round(10 ** rng.uniform(0, 3))) for _ in range(rng.randrange(1, 40))]
        positions, places, calls = layout([7, 0, 3, 30], rows)
        assert len(set(places)) == len(places) == len(positions) == sum(len(ids) for _, ids in rows)
        assert max(places) < sum(G * R for _, G, R in calls) <= 2 * len(places)
    assert layout([5], [(0, [0] * n) for n in (10, 8, 6, 5)])[2] == [(0, 4, 10)]


@pytest.mark.parametrize("row", [(0, []), (2, [1]), (-1, [1])])
def test_a_row_that_continues_nothing_is_refused(row):
    """No tokens, or a prefix that does not exist: named by its number."""
    model = make_model()
    with pytest.raises(ValueError, match="row 1: .* prefix from 0 to 1"):
        forward_suffixes(model, Prefixes(model, [[1, 2], [3]]), [(0, [4]), row])


@pytest.mark.gpu
def test_flash_attention_runs_in_phase_2_on_cuda():
    """With heads of 64 channels in bf16, phase 2 runs with every other backend forbidden, forward and
    backward."""
    groups = make_groups([(65, [64, 50, 64, 33]), (20, [40, 41])])
    config = ModelConfig("qwen2", VOCABULARY, 256, 256, 2, 4, 2, 64, 256)
    model = Transformer(config).initialize(0).to("cuda", torch.bfloat16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        hidden_ND, gradients = shared(model, groups)
    assert all(torch.isfinite(x).all() for x in (hidden_ND, *gradients.values()))


# ---------------------------------------------------------------- micro-batches of rollouts


def rollout(prompt_ids, anchor_ids, completion_ids, advantage=1.0):
    logprobs = [-1.0 - 0.01 * i for i in range(len(completion_ids))]
    return SimpleNamespace(prompt_ids=prompt_ids, anchor_ids=anchor_ids, completion_ids=completion_ids,
                           logprobs=logprobs, advantage=advantage)


def test_a_batch_is_the_picture():
    """q q q e | e o o o -> o o o s: a prefix is the context but for its last token, which opens the input.
    Only sampled tokens are targets; no anchor token has a weight. The longer row first; N tokens end to
    end, without padding. Ids that pad elsewhere (0) and stop ids (9) are tokens like any other, wherever
    they stand."""
    rows = [rollout([0, 9, 13], [9, 0], [0, 9, 33, 9], 0.5), rollout([0] * 5, [], [0] * 6, -2.0)]
    (prefixes, (batch,)), = make_batches(rows, 10, lambda row: 1 / (2 * len(row.completion_ids)), "cpu")
    assert prefixes == [[0, 9, 13, 9], [0] * 4]
    assert batch.rollouts == rows
    assert batch.rows == [(0, [0, 0, 9, 33]), (1, [0] * 6)]
    assert batch.targets_N.tolist() == [0, 9, 33, 9] + [0] * 6
    torch.testing.assert_close(batch.old_logprobs_N, torch.tensor(rows[0].logprobs + rows[1].logprobs))
    torch.testing.assert_close(batch.weights_N, torch.tensor([1 / 8] * 4 + [1 / 12] * 6))
    assert batch.advantages_N.tolist() == [0.5] * 4 + [-2.0] * 6
    assert batch.expand([True, False]).tolist() == [1.0] * 4 + [0.0] * 6


def test_a_context_runs_once_and_every_rollout_is_in_one_micro_batch():
    """Groups of 5, 2, 1 and 1 in micro-batches of 3: no context is in two packs, no batch is larger than
    3, small groups share one, and rollouts behind the same tokens share a prefix, whichever of these are
    an anchor."""
    sizes = {(11, 12): 5, (13,): 2, (14, 15, 16): 1, (17, 18): 1}
    rows = [rollout(list(context), [], [31, 9], 1.0 + i)
            for context, size in sizes.items() for i in range(size)]
    rows.append(rollout([14], [15, 16], [32, 9], 2.0))
    packs = list(make_batches(rows, 3, lambda row: 1.0, "cpu"))
    assert sorted(prefix for prefixes, _ in packs for prefix in prefixes) == [[], [11], [14, 15], [17]]
    found = [([*prefixes[i], ids[0]], r.advantage) for prefixes, batches in packs for batch in batches
             for (i, ids), r in zip(batch.rows, batch.rollouts)]
    assert sorted(found) == sorted((r.prompt_ids + r.anchor_ids, r.advantage) for r in rows)
    assert [[len(batch.rows) for batch in batches] for _, batches in packs] == [[2], [3, 2], [3]]
