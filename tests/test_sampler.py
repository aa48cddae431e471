"""Claims about sampler.py: a sample depends on (seed, row id, position) and the model, on nothing else."""
import collections
import dataclasses
import doctest
import math
import types

import pytest
import torch

import sampler
from conftest import capturing, noting_capture
from model import ModelConfig, Transformer
from sampler import (Fork, Places, SamplingParams, branch, generate, noise_keys, prefill, sample, tile_table,
                     uniform)

VOCABULARY = 61


@pytest.fixture(scope="module")
def model():
    """A random decoder with grouped heads; weights so large that its distributions are far from uniform."""
    config = ModelConfig("qwen3", VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=99)
    return random_model(config)


def random_model(config, scale=0.2):
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        else:
            parameter.fill_(1.0)
    return model


class CountingModel(torch.nn.Module):
    """A fake: the next token is the last one plus 1, and every forward pass records how many rows it had."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.rows = []

    def forward(self, tokens_BT, positions_BT=None, cache=None):
        self.rows.append(tokens_BT.shape[0])
        one = torch.zeros(tokens_BT.shape[0], 1, tokens_BT.shape[1], 8)
        cache.attend(0, one, one, one)
        return torch.nn.functional.one_hot((tokens_BT + 1) % VOCABULARY, VOCABULARY).float()

    def logits(self, hidden_BTD):
        return hidden_BTD * 1e4


def ids(length, seed=0):
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def full_forward_logprobs(model, prompt, completion, temperature):
    """Log-probs of `completion` by the trainer's way: one whole forward pass without any cache."""
    tokens_BT = torch.tensor([prompt + completion])
    logits_NV = model.logits(model(tokens_BT[:, :-1]))[0, len(prompt) - 1:]
    return (logits_NV / temperature).log_softmax(-1).gather(1, tokens_BT[0, len(prompt):, None])[:, 0]


def as_tuples(groups):
    return [[(tuple(c.token_ids), c.finish_reason) for c in group] for group in groups]


def assert_same(groups, others):
    """Equal tokens; log-probs and entropies to 1e-5, what float32 sums in another order may differ by."""
    assert as_tuples(groups) == as_tuples(others)
    for ours, theirs in zip(sum(groups, []), sum(others, [])):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert ours.entropies == pytest.approx(theirs.entropies, abs=1e-5)


def test_greedy_cached_decoding_equals_the_full_forward_pass(model):
    """Token for token, over more steps than the first allocation of the cache holds (64)."""
    prompts = [ids(5), ids(1, 1), ids(17, 2)]
    for prompt, (completion,) in zip(prompts, generate(model, prompts, SamplingParams(70, temperature=0))):
        # The logits behind each of its own tokens at once: the argmax of each is the next.
        hidden_BTD = model(torch.tensor([prompt + completion.token_ids[:-1]]))
        expected_T = model.logits(hidden_BTD[0, len(prompt) - 1:]).argmax(-1)
        assert (completion.token_ids, completion.finish_reason) == (expected_T.tolist(), "length")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_the_trainers(model, temperature):
    """To 1e-5 in float32, at the sampling temperature, the stop token's included; stop tokens inside a prompt
    mean nothing."""
    prompts = [ids(9), ids(3, 1), [7, 0, 7, 7, 3, 7]]
    params = SamplingParams(40, temperature, stop_token_ids=(7,), seed=3)
    for prompt, completions in zip(prompts, generate(model, prompts, params, num_samples=6)):
        for completion in completions:
            expected_N = full_forward_logprobs(model, prompt, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected_N, atol=1e-5, rtol=0)


def test_a_branch_equals_a_fresh_prefill_of_question_and_anchor(model):
    """A cut of the trunk is a slice: rows that branch at p see exactly the first p tokens."""
    sequence = ids(40)
    params = SamplingParams(20, seed=2)
    cuts = (1, 7, 23, 40)
    trunk = prefill(model, [ids(11, 5), sequence, ids(40, 6)])
    branched = branch(model, trunk, [Fork(1, cut, (cut, 100 + cut)) for cut in cuts], params)
    for cut, completions in zip(cuts, branched):
        fresh = branch(model, prefill(model, [sequence[:cut]]), [Fork(0, cut, (cut, 100 + cut))], params)
        assert_same([completions], fresh)


def test_prefill_in_several_passes_equals_one_pass(model):
    """Chunking changes the passes, not the K/V: sequences are longer, equal and shorter than a pass."""
    sequences = [ids(n, n) for n in (12, 3, 12, 25, 8)]
    whole, parts = prefill(model, sequences), prefill(model, sequences, tokens_per_pass=13)
    for one, other in ((whole.hidden_ND, parts.hidden_ND), (whole.stored[2], parts.stored[2])):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_prefill_takes_as_many_attentions_as_buckets(model, monkeypatch):
    """Sequences of 32 to 63 tokens are four buckets in each of two layers, not 32."""
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counting(*parts, **options):
        calls.append(parts)
        return attention(*parts, **options)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    prefill(model, [ids(length) for length in range(32, 64)])
    assert len(calls) == 2 * 4


def mixed_forks():
    """15 rows: branch points inside a sequence, a limit of their own, some that stop at their first token."""
    lengths = 4, 23, 1, 4, 12
    prompts = [ids(n + 7 * (n == 23), n) for n in lengths]
    forks = [Fork(i, n, (10 * i, 10 * i + 1, 10 * i + 2), None if i else 4) for i, n in enumerate(lengths)]
    return prompts, forks, SamplingParams(16, stop_token_ids=(3, 5, 9), seed=1)


def test_rows_sample_alone_what_they_sample_together(model):
    """Same tokens for the same (seed, row id), whoever shares the batch and in whatever order."""
    prompts, forks, params = mixed_forks()
    trunk, order = prefill(model, prompts), (3, 0, 4, 2, 1)
    together = branch(model, trunk, forks, params)
    assert_same(branch(model, trunk, [forks[i] for i in order], params), [together[i] for i in order])
    for fork, group in zip(forks, together):
        prompt = prompts[fork.sequence][:fork.length]
        for row_id, completion in zip(fork.row_ids, group):
            row = Fork(0, fork.length, (row_id,), fork.max_new_tokens)
            assert_same([[completion]], branch(model, prefill(model, [prompt]), [row], params))


@pytest.mark.parametrize("max_rows, num_samples", [(1, 1), (4, 3), (7, 3), (16, 8)])
def test_refilled_places_change_nothing(model, max_rows, num_samples):
    """5 rows in a single place, 15 in 4 or 7, 40 in 16, which are admitted at least 2 at a time."""
    prompts, _, params = mixed_forks()
    refilled = generate(model, prompts, params, num_samples, Places(model, max_rows))
    assert_same(refilled, generate(model, prompts, params, num_samples))


def test_groups_of_unequal_size_and_length_share_a_batch(model):
    """Groups of 3, 1, 9 and 2 rows, more than a tile holds and fewer, behind prefixes of 3 to 50 tokens."""
    prompts, params = [ids(length, length) for length in (10, 3, 50, 11)], SamplingParams(12, seed=9)
    forks = [Fork(i, len(prompts[i]), tuple(range(100 * i, 100 * i + n))) for i, n in enumerate((3, 1, 9, 2))]
    together = branch(model, prefill(model, prompts), forks, params)
    for i, (fork, group) in enumerate(zip(forks, together)):
        fork = dataclasses.replace(fork, sequence=0)
        assert_same([group], branch(model, prefill(model, [prompts[i]]), [fork], params))


def test_finished_rows_leave_the_batch():
    """The fake counts upward, so rows stop one after the other; later passes hold fewer rows."""
    fake = CountingModel()
    groups = generate(fake, [[start] for start in range(16)], SamplingParams(40, 0.0, stop_token_ids=(20,)))
    for start, (completion,) in enumerate(groups):
        assert completion.token_ids == list(range(start + 1, 21)), "the stop token is kept"
        assert completion.finish_reason == "stop"
        assert completion.logprobs == pytest.approx([0.0] * (20 - start))
    passes = fake.rows[1:]
    assert passes[0] == 16 and passes[-1] <= 2 and passes == sorted(passes, reverse=True)
    assert len(passes) == 19, "no pass after the last row has stopped"


def test_an_idle_place_is_given_to_the_next_row():
    """12 rows of 1 to 12 tokens in 4 places, by the fake that stops at 20. A row's first token costs no pass:
    66 tokens fill 4 places for 17 passes at best; waves of 4 would take 11 + 10 + 9, as their longest do."""
    fake, starts = CountingModel(), (8, 19, 18, 17, 9, 16, 15, 14, 10, 13, 12, 11)
    params = SamplingParams(40, temperature=0, stop_token_ids=(20,))
    groups = generate(fake, [[start] for start in starts], params, places=Places(fake, 4))
    for (completion,), start in zip(groups, starts):
        assert completion.token_ids == list(range(start + 1, 21)) and completion.finish_reason == "stop"
    passes = fake.rows[1:]
    assert max(passes) == 4 and min(passes) < 4, "the batch shrinks when nobody waits"
    assert len(passes) <= 24


def test_every_stop_id_stops_and_only_stop_ids_do():
    """Several stop ids; a token that merely equals the padding value (0) is a token like any other."""
    params = SamplingParams(30, 0.0, stop_token_ids=(2, 9))
    (first,), (second,) = generate(CountingModel(), [[58], [3]], params)
    assert first.token_ids == [59, 60, 0, 1, 2] and first.finish_reason == "stop"
    assert second.token_ids == [4, 5, 6, 7, 8, 9] and second.finish_reason == "stop"


def test_every_fork_has_its_own_length_limit(model):
    """An anchor counts toward the longest answer, so the rows behind it may sample less, one token even."""
    forks = [Fork(0, 20, (1, 2), max_new_tokens=5), Fork(0, 10, (3,)), Fork(0, 9, (4,), max_new_tokens=1)]
    groups = branch(model, prefill(model, [ids(20)]), forks, SamplingParams(25, seed=4))
    assert [[len(c.token_ids) for c in group] for group in groups] == [[5, 5], [25], [1]]
    assert {c.finish_reason for c in sum(groups, [])} == {"length"}


def test_a_borrowers_slips_are_named(model):
    """A model that lacks a method, returns a tuple, or begins with layer 1; a temperature below 0. Tensors
    are prompts, too, and no forks no rows."""
    with pytest.raises(TypeError, match=r"no logits\(\)"):
        prefill(types.SimpleNamespace(parameters=model.parameters), [[1]])

    class Wrapped(torch.nn.Module):
        def __init__(self, first):
            super().__init__()
            self.model = model
            self.logits = model.logits
            self.first = first

        def forward(self, tokens_BT, positions_BT, cache):
            shifted = types.SimpleNamespace(attend=lambda layer, *qkv: cache.attend(layer + self.first, *qkv))
            hidden_BTD = self.model(tokens_BT, positions_BT, shifted)
            return (hidden_BTD,) if self.first == 0 else hidden_BTD
    with pytest.raises(TypeError, match="returned tuple"):
        prefill(Wrapped(0), [[1]])
    with pytest.raises(ValueError, match="layer 1 came after 0 others"):
        prefill(Wrapped(1), [[1]])
    for temperature in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="must be 0 .greedy. or more"):
            SamplingParams(temperature=temperature)
    params = SamplingParams(4)
    assert_same(generate(model, torch.tensor([ids(9)]), params), generate(model, [ids(9)], params))
    assert branch(model, prefill(model, [ids(5)]), [], params) == []


def test_same_seed_same_tokens_and_rows_of_a_group_differ(model):
    """8 samples of 30 tokens: the chance that two agree is below 1e-10 at an entropy above 1 nat."""
    first, again = (generate(model, [ids(6)], SamplingParams(30, seed=11), 8) for _ in range(2))
    other = generate(model, [ids(6)], SamplingParams(30, seed=12), num_samples=8)
    assert as_tuples(first) == as_tuples(again)
    assert len({tuple(c.token_ids) for c in first[0] + other[0]}) == 16


@pytest.mark.parametrize("length, limit", [(0, 5), (21, 5), (10, 0)])
def test_impossible_forks_are_refused(model, length, limit):
    """A fork before the first token, behind the last one, or without room to sample; an empty prompt."""
    with pytest.raises(ValueError, match="must be at least 1"):
        branch(model, prefill(model, [ids(20)]), [Fork(0, length, (0,))], SamplingParams(limit))
    with pytest.raises(ValueError, match="at least one token"):
        prefill(model, [ids(20), []])


def random_attention(ages, seed=0):
    """Seven rows, H = 4, K = 2, C = 16, behind prefixes of 3, 60 (four rows) and 17 tokens of a trunk."""
    prefixes = [(0, 3), (10, 60), (10, 60), (40, 17), (10, 60), (40, 17), (10, 60)]
    table_TX = torch.tensor(tile_table(prefixes, M=3), dtype=torch.int32)
    tables = [table_TX[:, 2:].contiguous(), table_TX[:, 0].contiguous(), table_TX[:, 1].contiguous(), 60]
    random = torch.Generator().manual_seed(seed)
    shapes = (7, 4, 16), (7, 2, 16), (7, 2, 16), (2, 7, 20, 16), (2, 7, 20, 16), (2, 80, 16), (2, 80, 16)
    tensors = [torch.randn(shape, generator=random) for shape in shapes]
    own = [x_KRSC.transpose(0, 1) for x_KRSC in tensors[3:5]]
    lengths_R = torch.tensor(ages, dtype=torch.int32)
    return prefixes, (tensors[0], tensors[1:3], own, lengths_R, tensors[5:]), tables


def oracle(prefixes, q_RHC, new, own, lengths_R, trunk):
    """Row by row and head by head in float64; the new token is the last of each row's own."""
    out_RHC = torch.empty_like(q_RHC, dtype=torch.float64)
    keys_RKSC, values_RKSC = (x_RKSC.clone() for x_RKSC in own)
    trunk_keys_KNC, trunk_values_KNC = trunk
    for row, length in enumerate(lengths_R.tolist()):
        if length:
            keys_RKSC[row, :, length - 1] = new[0][row]
            values_RKSC[row, :, length - 1] = new[1][row]
    for row, (begin, length) in enumerate(prefixes):
        for head in range(q_RHC.shape[1]):
            k = head // 2
            own = slice(0, int(lengths_R[row]))
            keys = torch.cat((trunk_keys_KNC[k, begin:begin + length], keys_RKSC[row, k, own])).double()
            values = torch.cat((trunk_values_KNC[k, begin:begin + length], values_RKSC[row, k, own])).double()
            out_RHC[row, head] = (keys @ q_RHC[row, head].double() / 4).softmax(0) @ values  # 4 = sqrt(C)
    return out_RHC


@pytest.mark.parametrize("ages", [[5] * 7, [1, 20, 0, 7, 3, 0, 11]])
def test_attention_equals_a_float64_oracle(ages):
    """Rows of one age and of several, two idle (0) among them; tiles of 1 to 3 rows out of order, padded.
    1e-5: sums of 80 float32 terms below 4."""
    prefixes, arguments, tables = random_attention(ages)
    expected_RHC = oracle(prefixes, *arguments)
    out_RHC = sampler.decode_attention(*arguments, sampler.GatheredTiles(*tables))
    torch.testing.assert_close(out_RHC.double(), expected_RHC, atol=1e-5, rtol=0)


def test_operations_grow_with_buckets_and_not_with_lengths():
    """64 prefixes of 64 to 127 tokens are one bucket, whose padding holds no key of a neighbour's."""
    prefixes = [(190 - length, length) for length in range(64, 128)]
    table_TX = torch.tensor(tile_table(prefixes, M=1), dtype=torch.int32)
    tiles = sampler.GatheredTiles(table_TX[:, 2:], table_TX[:, 0], table_TX[:, 1], 127)
    (at_TP, is_padding_TP), = tiles.buckets
    assert at_TP.shape == (64, 127) and (~is_padding_TP).sum(1).tolist() == list(range(64, 128))
    assert at_TP.max() == 189, "nothing behind the last prefix is read"


def test_a_step_is_captured_once_for_all_calls(model):
    """Calls of one row and of many, of short and long trunks, sampled and greedy, in the same places: three
    sizes are captured, and rows sample what they do in places of their own. Then a call needs more room."""
    sizes = []
    places = Places(model, 12, capturing(sizes), room=16, trunk_room=80)
    prompts, forks, params = mixed_forks()
    calls = [(prompts, forks, params), ([ids(7)], [Fork(0, 5, (1,))], params),
             (prompts[:2], forks[:2], dataclasses.replace(params, temperature=0.0)), (prompts, forks, params)]
    for prompts, forks, params in calls:
        assert_same(branch(model, prefill(model, prompts), forks, params, places),
                    branch(model, prefill(model, prompts), forks, params))
    assert sorted(sizes) == [3, 6, 12]
    longer = [ids(60), ids(50)]
    assert_same(generate(model, longer, params, 3, places), generate(model, longer, params, 3))
    assert len(sizes) > 3, "longer trunks than places were made for: captured anew"


@pytest.mark.usefixtures("interpreter_without_two_faults")
def test_the_triton_kernels_sample_what_plain_pytorch_does(model):
    """Through kernels/ (here by Triton's interpreter), refilled and shrunk: tokens equal, numbers to 1e-5."""
    kernels = pytest.importorskip("kernels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = random_model(dataclasses.replace(model.config, head_dim=16)).to(device)
    trunk = prefill(wide, [ids(5), ids(9, 1)])
    forks = [Fork(0, 5, (0, 1, 2)), Fork(1, 9, (3, 4)), Fork(1, 4, (5,))]
    params = SamplingParams(6, stop_token_ids=(3, 5), seed=8)
    plain = branch(wide, trunk, forks, params)
    wide.ops = kernels
    ops = types.SimpleNamespace(**vars(kernels))
    if device == "cpu":
        ops.capture = noting_capture([])
    assert_same(branch(wide, trunk, forks, params, Places(wide, 4, ops)), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_replayed_graph_equals_an_eager_step_bit_for_bit(dtype):
    """H/K = 7, 90 rows in 32 places: refilled, shrunk, with stops and limits, in two calls. In float32 they
    are the rows of plain PyTorch, too; in bfloat16 sums round in another order, and tokens may differ."""
    kernels = pytest.importorskip("kernels")
    config = ModelConfig("qwen2", 4096, hidden_size=448, intermediate_size=512, num_hidden_layers=3,
                         num_attention_heads=14, num_key_value_heads=2, head_dim=32,
                         max_position_embeddings=999)
    model = random_model(config, 0.05).to("cuda", dtype)
    eager = types.SimpleNamespace(**vars(kernels) | {"capture": lambda step: step})
    prompts = [ids(length, length) for length in (5, 17, 64, 130, 257)]
    forks = [Fork(i, len(prompt) - 2 * j, tuple(range(100 * i + 10 * j, 100 * i + 10 * j + 6)), 5 + 17 * j)
             for i, prompt in enumerate(prompts) for j in range(3)]
    params = SamplingParams(40, 1.0, tuple(range(0, 4096, 40)), seed=1)
    trunk = prefill(model, prompts)
    plain = branch(model, trunk, forks, params)
    model.ops = kernels
    runs = []
    for ops in (kernels, eager):
        places = Places(model, 32, ops)
        runs.append([branch(model, trunk, forks, params, places) for _ in range(2)])
    assert runs[0][0] == runs[0][1] == runs[1][0] == runs[1][1]
    if dtype == torch.float32:
        assert_same(runs[0][0], plain)


def test_a_kernel_gets_tables_of_one_size():
    """What a graph needs: as many tiles as places whatever these share, empty ones of length 0. Idle places
    attend to no token."""
    seen = []

    def attend(q_RHC, _new, _own, lengths_R, _trunk, tiles):
        seen.append((len(q_RHC), *tiles.rows_TM.shape, sum(tiles.lengths_T > 0).item(), int(lengths_R.min())))
        return q_RHC
    fake = CountingModel()
    places = Places(fake, 24, capturing([], decode_attention=attend))
    params = SamplingParams(15, temperature=0, stop_token_ids=(15,))
    generate(fake, [[1], [10]] * 8, params, 3, places)
    assert seen[0] == (24, 24, 8, 8, 1) and {idle for *_, idle in seen if idle < 2} == {0, 1}
    assert {(rows, num_tiles) for rows, num_tiles, *_ in seen} == {(24, 24), (6, 6)}


@pytest.mark.parametrize("peak", [0.0, 1.5, 4.0])
def test_the_drawn_distribution_is_the_softmax(peak):
    """Chi-square over 9 cells of 40,000 draws: mean 8, standard deviation 4. Below 30 for a right sampler in
    all but about 2 of 10,000 seeds (it is fixed); a distortion of a cell of probability p by a share d adds
    40,000 p d^2, so 10% of a cell of 0.1 would add 40."""
    logits_V = torch.linspace(-1, 1, 9) * peak
    keys_R = noise_keys(0, range(200)).repeat_interleave(200)
    tokens_R, logprobs_R, _ = sample(logits_V.expand(40_000, 9), 1.0, keys_R, torch.arange(200).repeat(200))
    expected_V = logits_V.softmax(0) * 40_000
    assert ((torch.bincount(tokens_R, minlength=9) - expected_V) ** 2 / expected_V).sum() < 30
    assert logprobs_R.allclose(logits_V.log_softmax(0)[tokens_R], atol=1e-6, rtol=0)


def test_random_numbers_are_uniform_and_uncorrelated():
    """151,936 x 20 numbers: mean within 5 standard errors of 1/2, neighbours (token, position, row)
    uncorrelated. Two of them are pinned: runs of earlier versions can be repeated."""
    keys_R = noise_keys(1, [5, 6]).repeat_interleave(10)
    u_RV = uniform(keys_R, torch.arange(10).repeat(2), 151_936).double()
    assert abs(u_RV.mean().item() - 0.5) < 5 / math.sqrt(12 * u_RV.numel())
    assert 0 < u_RV.min() and u_RV.max() <= 1
    assert [u_RV[0, 0].item(), u_RV[13, 401].item()] == [0.9675349593162537, 0.5646591186523438]
    centred_RV = (u_RV - 0.5) * math.sqrt(12)
    for product in (centred_RV[:, 1:] * centred_RV[:, :-1], centred_RV[1:] * centred_RV[:-1],
                    centred_RV[:10] * centred_RV[10:]):
        assert abs(product.mean().item()) < 5 / math.sqrt(product.numel())


def test_masked_and_peaked_logits_are_handled():
    """-inf is never drawn, a certain token has log-prob 0, very negative logits give no NaN."""
    logits_RV = torch.tensor([[0.0, -math.inf, 0.0], [1e4, 0.0, 0.0], [-1e30, -1e30, -1e30]])
    for position in range(50):
        positions_R = torch.full((3,), position)
        tokens_R, logprobs_R, entropies_R = sample(logits_RV, 1.0, noise_keys(0, range(3)), positions_R)
        assert tokens_R[0] != 1 and tokens_R[1] == 0 and logprobs_R[1] == 0 and logprobs_R.isfinite().all()
        torch.testing.assert_close(entropies_R, torch.tensor([math.log(2), 0.0, math.log(3)]))


def test_docstring_examples():
    """The worked examples of sampler.py are true."""
    assert doctest.testmod(sampler).failed == 0
