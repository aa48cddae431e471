"""Claims about packing.py: a context that runs once gives what running it G times gives, gradients and all.

The rival is the plain way: each rollout alone, as one full row without a cache. In float64 the two may differ
by rounding only, about 1e-15 per operation, so 1e-10 of a gradient's largest entry is already generous.
"""
import random
from types import SimpleNamespace

import pytest
import torch

from model import ModelConfig, Transformer
from packing import Prefixes, forward_suffixes, halve, make_batches

VOCABULARY = 61
# Contexts and completions, in tokens. Prefixes empty, unused, shorter than, as long as and longer than the
# rows behind them; one row and ragged ones. Then nothing but empty prefixes.
MIXED = [(1, [3, 5]), (9, [4, 9, 1, 12]), (9, [6]), (30, [2, 2, 2]), (4, [20, 1, 7]), (8, []),
         (6, [6, 6, 4]), (7, [6, 6, 4]), (12, [5, 8, 8, 3, 6, 7])]
EMPTY = [(1, [4, 6]), (1, [3]), (1, [])]


def make_model(kind="qwen3", kv_heads=2, dtype=torch.float64, recompute=False):
    """A random decoder with weights so large that attention is far from uniform."""
    config = ModelConfig(kind, VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=8,
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


def make_groups(shape):
    """[(context length, completion lengths)] -> [(context ids, list of completion ids)]."""
    rng = random.Random(0)
    return [(rng.choices(range(VOCABULARY), k=P), [rng.choices(range(VOCABULARY), k=R) for R in lengths])
            for P, lengths in shape]


def loss_of(hidden_ND, completion):
    """Weighs every position and channel differently, by a draw that depends on the completion only."""
    generator = torch.Generator().manual_seed(hash(tuple(completion)) % 2**31)
    weights_ND = torch.randn(hidden_ND.shape, generator=generator, dtype=torch.float64)
    return (hidden_ND * weights_ND.to(hidden_ND)).sum()


def take_gradients(model):
    """{name: gradient} of all parameters that have one; none is left behind."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def unshared(model, groups):
    """(hidden states that predict the completions, gradients), each rollout alone in a full row."""
    hiddens = []
    for context, completions in groups:
        for ids in completions:
            tokens_BT = torch.tensor([context + ids[:-1]], device=next(model.parameters()).device)
            hidden_ND = model(tokens_BT)[0, len(context) - 1:]
            loss_of(hidden_ND, ids).backward()
            hiddens.append(hidden_ND.detach())
    return torch.cat(hiddens), take_gradients(model)


def shared(model, groups, rows_per_pass=1000, shuffle=None, backward=True):
    """The same through packing.py, prefixes and rows in an order of the seed `shuffle`."""
    order = list(range(len(groups)))
    rows = [(number, ids) for number, (_, completions) in enumerate(groups) for ids in completions]
    numbers = list(range(len(rows)))
    if shuffle is not None:
        random.Random(shuffle).shuffle(order)
        random.Random(shuffle).shuffle(numbers)
    phase1, hiddens = Prefixes(model, [groups[i][0][:-1] for i in order]), {}
    for start in range(0, len(rows), rows_per_pass):
        members = numbers[start:start + rows_per_pass]
        inputs = [(order.index(i), [groups[i][0][-1], *ids[:-1]]) for i, ids in (rows[n] for n in members)]
        parts = forward_suffixes(model, phase1, inputs).split([len(ids) for _, ids in inputs])
        sum(loss_of(part, rows[n][1]) for n, part in zip(members, parts)).backward()
        hiddens |= {n: part.detach() for n, part in zip(members, parts)}
    if backward:
        phase1.backward()
    return torch.cat([hiddens[n] for n in range(len(rows))]), take_gradients(model)


def error(results, expected):
    """Largest difference of hidden states or of a gradient, by the expected tensor's largest entry."""
    (hidden, gradients), (true_hidden, true_gradients) = results, expected
    assert gradients.keys() == true_gradients.keys()
    pairs = [(hidden, true_hidden)] + [(gradients[name], true) for name, true in true_gradients.items()]
    pairs = [(x.double().cpu(), y.double().cpu()) for x, y in pairs]
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)


@pytest.mark.parametrize("shape, rows_per_pass, shuffle", [
    (MIXED, 99, None), (MIXED, 1, None), (MIXED, 3, None), (MIXED, 4, 1), (EMPTY, 99, None), (EMPTY, 2, 1)])
@pytest.mark.parametrize("kind, kv_heads", [
    ("qwen3", 4), ("qwen3", 2), ("qwen2", 2), ("qwen2", 1), ("llama", 1)])
def test_a_shared_pass_equals_the_unshared_one(kind, kv_heads, shape, rows_per_pass, shuffle):
    """Every hidden state, in the rows' order, and every parameter's gradient; GQA ratios 1, 2 and 4;
    micro-batches that cut through groups, and rows of different groups interleaved."""
    model, groups = make_model(kind, kv_heads), make_groups(shape)
    expected = unshared(model, groups)
    assert len(expected[1]) == len(list(model.parameters())) - 1  # all but the LM head
    assert error(shared(model, groups, rows_per_pass, shuffle), expected) < 1e-10


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_low_precision_is_no_worse_than_without_sharing(device):
    """Compared with float64. float32: below 1e-5 of the gradient's scale, since eps is 1.2e-7 and sums
    have some hundred terms (1e-3 on a GPU, whose kernels are its own). bf16: K/V gradients are rounded to
    8 bits once more, hence half as much error again. On a GPU that one is variable-length attention."""
    groups = make_groups(MIXED + [(70, [40] * 8)])
    expected = unshared(make_model(), groups)
    limit = 1e-5 if device == "cpu" else 1e-3
    assert error(shared(make_model(dtype=torch.float32).to(device), groups), expected) < limit
    model = make_model(dtype=torch.bfloat16).to(device)
    ours, theirs = (error(way(model, groups), expected) for way in (shared, unshared))
    assert ours < 1.5 * theirs and theirs < 0.5, (ours, theirs)


def test_under_autocast_gradients_are_near():
    """q and k come out of the rotation in float32, v in bf16, as wherever torch.autocast is used."""
    groups = make_groups(MIXED)
    expected = unshared(make_model(), groups)
    model = make_model(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(shared(model, groups), expected) < 0.5
    with pytest.raises(ValueError, match="a row or more"):
        forward_suffixes(model, Prefixes(model, [[1]]), [])


def test_the_loss_reaches_the_prefix_through_backward_and_only_once():
    """Without `backward` a token that only the prefix holds has no gradient; a second one is refused."""
    model = make_model()
    groups = [([60, 60, 7], [[1, 2, 3], [4, 5]])]  # 7 opens the rows, 60 is in the prefix alone
    for backward in (True, False):
        _, gradients = shared(model, groups, backward=backward)
        assert gradients["model.embed_tokens.weight"][60].any() == backward
    prefixes = Prefixes(model, [[1, 2, 3]])
    forward_suffixes(model, prefixes, [(0, [4])]).sum().backward()
    prefixes.backward()
    forward_suffixes(model, prefixes, [(0, [5])]).sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        prefixes.backward()


@pytest.mark.parametrize("recompute, expected", [(False, [45, 18]), (True, [45, 18, 18, 45])])
def test_linear_layers_see_every_token_once_and_no_padding_also_when_recomputed(recompute, expected):
    """P + sum of R tokens a group, counted at an MLP: 45 + 18 rather than the 270 of a padded batch. With
    every block checkpointed both phases run once more on the way back."""
    groups = make_groups([(46, [1, 2, 3, 3, 4, 5])])
    model, tokens = make_model(recompute=recompute), []
    mlp = model.model["layers"][1].mlp
    mlp.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
    results = shared(model, groups)
    assert tokens == expected and error(results, unshared(make_model(), groups)) < 1e-10


@pytest.mark.parametrize("row", [(0, []), (2, [1]), (-1, [1])])
def test_a_row_that_continues_nothing_is_refused(row):
    """No tokens, or a prefix that does not exist: named by its number."""
    model = make_model()
    with pytest.raises(ValueError, match="row 1: .* prefix from 0 to 1"):
        forward_suffixes(model, Prefixes(model, [[1, 2], [3]]), [(0, [4]), row])


def rollout(prompt_ids, anchor_ids, completion_ids, advantage):
    logprobs = [-1.0 - 0.01 * i for i in range(len(completion_ids))]
    return SimpleNamespace(prompt_ids=prompt_ids, anchor_ids=anchor_ids, completion_ids=completion_ids,
                           logprobs=logprobs, advantage=advantage)


def test_a_batch_is_the_picture():
    """q q q e | e o o o -> o o o s: only sampled tokens are targets, end to end, without padding. Ids that
    pad elsewhere (0) and stop ids (9) are tokens like any other."""
    rows = [rollout([0, 9, 13], [9, 0], [0, 9, 33, 9], 0.5), rollout([0] * 5, [], [0] * 6, -2.0)]
    (prefixes, (batch,)), = make_batches(rows, 18, lambda row: 1 / (2 * len(row.completion_ids)), "cpu")
    assert prefixes == [[0, 9, 13, 9], [0] * 4] and batch.rollouts == rows
    assert batch.rows == [(0, [0, 0, 9, 33]), (1, [0] * 6)]
    assert batch.targets_N.tolist() == [0, 9, 33, 9] + [0] * 6
    torch.testing.assert_close(batch.old_logprobs_N, torch.tensor(rows[0].logprobs + rows[1].logprobs))
    torch.testing.assert_close(batch.weights_N, torch.tensor([1 / 8] * 4 + [1 / 12] * 6))
    assert batch.advantages_N.tolist() == [0.5] * 4 + [-2.0] * 6


def test_a_context_runs_once_and_every_rollout_is_in_one_micro_batch():
    """Groups of 5, 2, 2 and 1 in micro-batches of 9 tokens, prefixes included: no context is in two packs,
    small groups share a batch, and rollouts behind the same tokens share a prefix, whichever of these are an
    anchor. A row that is too long is alone. Halves hold what the whole held, in half as much."""
    contexts = [[11, 12]] * 5 + [[13]] * 2 + [[14, 15, 16], [17, 18]]
    rows = [rollout(context, [], [31, 9], float(i)) for i, context in enumerate(contexts)]
    rows.append(rollout([14], [15, 16], [32, 9], 9.0))
    packs = list(make_batches(rows, 9, lambda row: 1.0, "cpu"))
    assert sorted(prefix for prefixes, _ in packs for prefix in prefixes) == [[], [11], [14, 15], [17]]
    found = {r.advantage: [*prefixes[i], ids[0]] for prefixes, batches in packs for batch in batches
             for (i, ids), r in zip(batch.rows, batch.rollouts)}
    assert found == dict(enumerate([*contexts, [14, 15, 16]]))
    assert [[len(batch.rows) for batch in batches] for _, batches in packs] == [[2], [4, 1], [3]]
    for sizes in ([[1, 1], [2, 2, 1], [2], [1]], [[1, 1], [1] * 5, [1, 1], [1]]):
        packs = [half for pack in packs for half in halve(*pack)]
        assert sorted(len(batch.rows) for _, batches in packs for batch in batches) == sorted(sum(sizes, []))
        for contexts, batches in packs:
            for batch in batches:
                assert [contexts[i] for i, _ in batch.rows] == [
                    (row.prompt_ids + row.anchor_ids)[:-1] for row in batch.rollouts]
                assert batch.targets_N.tolist() == sum((row.completion_ids for row in batch.rollouts), [])
                assert batch.advantages_N[::2].tolist() == [row.advantage for row in batch.rollouts]
    single = list(make_batches(rows[:1], 1, lambda row: 1.0, "cpu"))[0]
    (_, (batch,)), = halve(*single)
    assert batch.rows == single[1][0].rows, "what cannot be halved stays"
