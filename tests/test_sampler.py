"""Claims about sampler.py: what is sampled depends on (seed, row id, position) and the model, and on nothing else."""
import dataclasses
import doctest
import math
import types

import pytest
import torch

import sampler
from model import ModelConfig, Transformer
from sampler import Branch, Fork, SamplingParams, branch, generate, noise_keys, prefill, sample, uniform

VOCABULARY = 61


@pytest.fixture(scope="module")
def model():
    """A random decoder with grouped heads; weights large enough that its distributions are far from uniform."""
    config = ModelConfig("qwen3", VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
    model = Transformer(config).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model


class CountingModel(torch.nn.Module):
    """A fake: the next token is always the last one plus 1, and every forward pass records how many rows it had."""

    def __init__(self):
        super().__init__()
        self.unused, self.rows = torch.nn.Parameter(torch.zeros(1)), []

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
    with torch.no_grad():
        logits_NV = model.logits(model(tokens_BT[:, :-1]))[0, len(prompt) - 1:]
    return (logits_NV / temperature).log_softmax(-1).gather(1, tokens_BT[0, len(prompt):, None])[:, 0]


def as_tuples(groups):
    return [[(tuple(c.token_ids), c.finish_reason) for c in group] for group in groups]


def test_greedy_cached_decoding_equals_the_full_forward_pass(model):
    """Token for token, over more steps than the first allocation of the cache holds (64)."""
    prompts = [ids(5), ids(1, 1), ids(17, 2)]
    for prompt, (completion,) in zip(prompts, generate(model, prompts, SamplingParams(80, temperature=0))):
        tokens = list(prompt)
        for _ in range(80):
            with torch.no_grad():
                tokens.append(int(model.logits(model(torch.tensor([tokens]))[:, -1]).argmax()))
        assert completion.token_ids == tokens[len(prompt):]
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_the_trainers(model, temperature):
    """To 1e-5 in float32, at the sampling temperature, the stop token's included."""
    prompts, params = [ids(9), ids(3, 1)], SamplingParams(40, temperature, stop_token_ids=(7,), seed=3)
    for prompt, completions in zip(prompts, generate(model, prompts, params, num_samples=6)):
        for completion in completions:
            expected_N = full_forward_logprobs(model, prompt, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected_N, atol=1e-5, rtol=0)


def test_a_batch_of_mixed_lengths_equals_one_at_a_time(model):
    """Same tokens for the same (seed, row id), whoever shares the batch and in whatever order."""
    prompts, params = [ids(n, n) for n in (4, 30, 1, 4, 12)], SamplingParams(30, stop_token_ids=(3, 5), seed=1)
    rows = [tuple(range(10 * i, 10 * i + 3)) for i in range(5)]
    trunk = prefill(model, prompts)
    together = branch(model, trunk, [Fork(i, len(p), rows[i]) for i, p in enumerate(prompts)], params)
    shuffled = branch(model, trunk, [Fork(i, len(prompts[i]), rows[i]) for i in (3, 0, 4, 2, 1)], params)
    alone = [branch(model, prefill(model, [p]), [Fork(0, len(p), (row,))], params)[0][0]
             for p, group in zip(prompts, rows) for row in group]
    assert as_tuples(together) == as_tuples([alone[3 * i:3 * i + 3] for i in range(5)])
    assert as_tuples(shuffled) == as_tuples([together[i] for i in (3, 0, 4, 2, 1)])


def test_a_branch_equals_a_fresh_prefill_of_question_and_anchor(model):
    """A cut of the trunk is a slice: rows that branch at p see exactly the first p tokens."""
    sequence, params = ids(40), SamplingParams(20, seed=2)
    cuts = (1, 7, 23, 40)
    trunk = prefill(model, [ids(11, 5), sequence, ids(40, 6)])
    branched = branch(model, trunk, [Fork(1, cut, (cut, 100 + cut)) for cut in cuts], params)
    for cut, completions in zip(cuts, branched):
        fresh = branch(model, prefill(model, [sequence[:cut]]), [Fork(0, cut, (cut, 100 + cut))], params)[0]
        assert as_tuples([completions]) == as_tuples([fresh])
        for completion in completions:
            expected_N = full_forward_logprobs(model, sequence[:cut], completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected_N, atol=1e-5, rtol=0)


def test_prefill_in_several_passes_equals_one_pass(model):
    """Chunking changes the passes, not the K/V: sequences are longer, equal and shorter than a pass."""
    sequences = [ids(n, n) for n in (12, 3, 12, 25, 8)]
    whole, parts = prefill(model, sequences), prefill(model, sequences, tokens_per_pass=13)
    torch.testing.assert_close(whole.hidden_ND, parts.hidden_ND, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.keys[1], parts.keys[1], atol=1e-5, rtol=1e-5)


def test_rows_hold_no_copy_of_the_prefix(model):
    """The prefix of every run is a view of the trunk's storage, and own K/V have room for sampled tokens only."""
    trunk = prefill(model, [ids(50, i) for i in range(4)])
    forks = [Fork(i, 40, (8 * i, 8 * i + 1)) for i in range(4)]
    cache = Branch(trunk, forks, [0, 0, 1, 1, 2, 2, 3, 3], capacity=16)
    assert len(cache.runs) == 1, "four alike neighbours are one batched product"
    for head, view in enumerate(cache.runs[0].views[0][0]):
        assert view.shape == (4, 40, 8)
        assert view.untyped_storage().data_ptr() == trunk.keys[0].untyped_storage().data_ptr()
        for i in range(4):
            start = trunk.starts[i]
            assert torch.equal(view[trunk.order.index(i)], trunk.keys[0][head, start:start + 40])
    new = torch.zeros(8, 2, 1, 8)
    cache.attend(0, torch.zeros(8, 4, 1, 8), new, new)
    assert cache.keys[0].shape == (2, 8, 16, 8)


def test_groups_of_unequal_size_share_one_product(model):
    """Rows finish one by one: groups of 3, 1, 4 and 2 rows on prefixes of one length, one length apart and not, still
    sample what each row samples alone."""
    prompts, params = [ids(10, i) for i in range(6)], SamplingParams(12, seed=9)
    trunk = prefill(model, prompts)
    for chosen, sizes, num_runs in (((0, 1, 2, 3), (3, 1, 4, 2), 1), ((0, 1, 3, 5), (2, 2, 3, 1), 2)):
        forks = [Fork(i, 10, tuple(range(100 * i, 100 * i + size))) for i, size in zip(chosen, sizes)]
        owners = [f for f, size in enumerate(sizes) for _ in range(size)]
        assert len(Branch(trunk, forks, owners).runs) == num_runs
        alone = [branch(model, prefill(model, [prompts[i]]), [Fork(0, 10, (100 * i + j,))], params)[0][0]
                 for i, size in zip(chosen, sizes) for j in range(size)]
        together = [completion for group in branch(model, trunk, forks, params) for completion in group]
        assert as_tuples([together]) == as_tuples([alone])


@pytest.mark.parametrize("max_rows", [1, 5, 12])
def test_rows_at_once_change_nothing(model, max_rows):
    """However many rows are decoded side by side, a row samples the same tokens."""
    prompts, params = [ids(n, n) for n in (6, 2, 6)], SamplingParams(15, stop_token_ids=(3, 8), seed=6)
    whole, parts = (generate(model, prompts, params, num_samples=4, max_rows=rows) for rows in (256, max_rows))
    assert as_tuples(whole) == as_tuples(parts)


def test_finished_rows_leave_the_batch():
    """The fake counts upward, so rows stop one after the other; later passes hold fewer rows."""
    fake = CountingModel()
    prompts = [[start] for start in range(16)]
    groups = generate(fake, prompts, SamplingParams(40, temperature=0, stop_token_ids=(20,)))
    for start, (completion,) in enumerate(groups):
        assert completion.token_ids == list(range(start + 1, 21)), "the stop token is kept"
        assert completion.finish_reason == "stop"
        assert completion.logprobs == pytest.approx([0.0] * (20 - start))
    passes = fake.rows[1:]
    assert passes[0] == 16 and passes[-1] <= 2 and passes == sorted(passes, reverse=True)
    assert len(passes) == 19, "no pass after the last row has stopped"


def test_every_stop_id_stops_and_only_stop_ids_do():
    """Several stop ids; a token that merely equals the padding value (0) is a token like any other."""
    (first,), (second,) = generate(CountingModel(), [[58], [3]], SamplingParams(30, 0.0, stop_token_ids=(2, 9)))
    assert first.token_ids == [59, 60, 0, 1, 2] and first.finish_reason == "stop"
    assert second.token_ids == [4, 5, 6, 7, 8, 9] and second.finish_reason == "stop"


def test_stop_ids_inside_the_prompt_mean_nothing(model):
    """A chat prompt holds end-of-turn tokens; pad id, eos id and stop id may be one. Only sampled tokens stop."""
    prompt = [7, 0, 7, 7, 3, 7]
    (completion,), = generate(model, [prompt], SamplingParams(12, stop_token_ids=(7,), seed=5))
    expected_N = full_forward_logprobs(model, prompt, completion.token_ids, 1.0)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected_N, atol=1e-5, rtol=0)


def test_every_fork_has_its_own_length_limit(model):
    """An anchor counts toward the longest answer, so the rows behind it may sample less."""
    trunk, params = prefill(model, [ids(20)]), SamplingParams(25, seed=4)
    short, long = branch(model, trunk, [Fork(0, 20, (1, 2), max_new_tokens=5), Fork(0, 10, (3,))], params)
    assert [len(c.token_ids) for c in short] == [5, 5] and len(long[0].token_ids) == 25
    assert short[0].finish_reason == long[0].finish_reason == "length"


def test_same_seed_same_tokens_and_rows_of_a_group_differ(model):
    """8 samples of 30 tokens: the chance that two agree by accident is below 1e-10 at an entropy above 1 nat."""
    params = SamplingParams(30, seed=11)
    first, again = (generate(model, [ids(6)], params, num_samples=8) for _ in range(2))
    other = generate(model, [ids(6)], SamplingParams(30, seed=12), num_samples=8)
    assert as_tuples(first) == as_tuples(again)
    assert len({tuple(c.token_ids) for c in first[0] + other[0]}) == 16


@pytest.mark.parametrize("peak", [0.0, 1.5, 4.0])
def test_the_drawn_distribution_is_the_softmax(peak):
    """Chi-square over 9 cells of 40,000 draws: mean 8, standard deviation 4. Below 30 for a right sampler in all but
    about 2 of 10,000 seeds (the seed is fixed); a distortion of one cell of probability p by a share d adds
    40,000 p d^2, so 10% of a cell of 0.1 would add 40."""
    logits_V = torch.linspace(-1, 1, 9) * peak
    keys_R, positions_R = noise_keys(0, range(200)).repeat_interleave(200), torch.arange(200).repeat(200)
    tokens_R, logprobs_R, _ = sample(logits_V.expand(40_000, 9), 1.0, keys_R, positions_R)
    expected_V = logits_V.softmax(0) * 40_000
    chi_square = ((torch.bincount(tokens_R, minlength=9) - expected_V) ** 2 / expected_V).sum().item()
    assert chi_square < 30
    torch.testing.assert_close(logprobs_R, logits_V.log_softmax(0)[tokens_R], atol=1e-6, rtol=0)


def test_random_numbers_are_uniform_and_uncorrelated():
    """151,936 x 20 numbers: mean within 5 standard errors of 1/2, neighbours (token, position, row) uncorrelated."""
    keys_R, positions_R = noise_keys(1, [5, 6]).repeat_interleave(10), torch.arange(10).repeat(2)
    u_RV = uniform(keys_R, positions_R, 151_936).double()
    error = 1 / math.sqrt(12 * u_RV.numel())
    assert abs(u_RV.mean().item() - 0.5) < 5 * error and 0 < u_RV.min() and u_RV.max() <= 1
    centred_RV = (u_RV - 0.5) * math.sqrt(12)
    for product in (centred_RV[:, 1:] * centred_RV[:, :-1], centred_RV[1:] * centred_RV[:-1],
                    centred_RV[:10] * centred_RV[10:]):
        assert abs(product.mean().item()) < 5 / math.sqrt(product.numel())


def test_masked_and_peaked_logits_are_handled():
    """-inf is never drawn, a certain token has log-prob 0, very negative logits give no NaN."""
    logits_RV = torch.tensor([[0.0, -math.inf, 0.0], [1e4, 0.0, 0.0], [-1e30, -1e30, -1e30]])
    for position in range(50):
        tokens_R, logprobs_R, entropies_R = sample(logits_RV, 1.0, noise_keys(0, range(3)), torch.full((3,), position))
        assert tokens_R[0] != 1 and tokens_R[1] == 0 and logprobs_R[1] == 0 and logprobs_R.isfinite().all()
        torch.testing.assert_close(entropies_R, torch.tensor([math.log(2), 0.0, math.log(3)]))


@pytest.mark.parametrize("length, limit", [(0, 5), (21, 5), (10, 0)])
def test_impossible_forks_are_refused(model, length, limit):
    """A fork before the first token, behind the last one, or without room to sample."""
    with pytest.raises(ValueError, match="must be at least 1"):
        branch(model, prefill(model, [ids(20)]), [Fork(0, length, (0,))], SamplingParams(limit))


def test_threads_that_share_the_rows_change_nothing():
    """300 rows on three threads: the fake's counting rows, each where it belongs, and the thread count as before."""
    fake, threads = CountingModel(), torch.get_num_threads()
    prompts, params = [[start] for start in range(60)], SamplingParams(9, temperature=0, stop_token_ids=(20,))
    alone = generate(fake, prompts, params, num_samples=5, max_rows=384)
    shared = generate(fake, prompts, params, num_samples=5, max_rows=384, workers=3)
    assert as_tuples(alone) == as_tuples(shared) and torch.get_num_threads() == threads
    assert [len(group) for group in shared] == [5] * 60


# ---------------------------------------------------------------- slots, with the kernels


def reference_ops():
    """The kernels' plain twins: attention by kernels/decode_attention.py's reference, drawing by the sampler's own."""
    from kernels.decode_attention import PrefixTiles, reference_decode_attention
    return types.SimpleNamespace(PrefixTiles=PrefixTiles, decode_attention=reference_decode_attention, sample=sample)


def counting_ops():
    """For the fake: attention that does nothing, so that only tokens and slots are at work."""
    ops = reference_ops()
    ops.decode_attention = lambda q_RHC, *_: q_RHC
    return ops


@pytest.mark.parametrize("max_rows", [1, 4, 7, 64])
def test_slots_sample_what_rows_in_step_do(model, max_rows):
    """Same tokens, log-probs to 1e-5, for ragged rows that are refilled (15 rows in 1, 4 or 7 slots) and compacted,
    with branch points inside a sequence, limits of their own and rows that stop at their first token."""
    prompts, params = [ids(n, n) for n in (4, 30, 1, 4, 12)], SamplingParams(30, stop_token_ids=(3, 5, 9), seed=1)
    forks = [Fork(i, len(p) - (i == 1) * 7, tuple(range(10 * i, 10 * i + 3)), 30 if i else 4)
             for i, p in enumerate(prompts)]
    trunk = prefill(model, prompts)
    in_step = branch(model, trunk, forks, params)
    in_slots = branch(model, trunk, forks, params, max_rows=max_rows, ops=reference_ops())
    assert as_tuples(in_step) == as_tuples(in_slots)
    for ours, theirs in zip(sum(in_step, []), sum(in_slots, [])):
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(ours.entropies), torch.tensor(theirs.entropies), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("interpreter_without_two_faults")
def test_the_triton_kernels_sample_what_plain_pytorch_does(model):
    """The same through kernels/ themselves (here by Triton's interpreter): tokens equal, log-probs to 1e-5."""
    import kernels
    model = Transformer(dataclasses.replace(model.config, head_dim=16)).initialize(0)
    prompts, params = [ids(5), ids(9, 1)], SamplingParams(6, stop_token_ids=(3, 5), seed=8)
    forks = [Fork(0, 5, (0, 1, 2)), Fork(1, 9, (3, 4)), Fork(1, 4, (5,))]
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    trunk = prefill(model, prompts)
    plain = branch(model, trunk, forks, params)
    fused = branch(model, trunk, forks, params, max_rows=4, ops=kernels)
    assert as_tuples(plain) == as_tuples(fused)
    for ours, theirs in zip(sum(plain, []), sum(fused, [])):
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-5, rtol=0)


def test_a_freed_slot_is_given_to_the_next_row():
    """The fake counts upward and stops at 20: 12 rows of 1 to 12 tokens in 4 slots. A row's first token costs no pass,
    so 66 tokens fill 4 slots for 17 passes at best; waves of 4 would take 11 + 10 + 9, as long as their longest."""
    fake, prompts = CountingModel(), [[start] for start in (8, 19, 18, 17, 9, 16, 15, 14, 10, 13, 12, 11)]
    params = SamplingParams(40, temperature=0, stop_token_ids=(20,))
    groups = generate(fake, prompts, params, max_rows=4, ops=counting_ops())
    for (completion,), (start,) in zip(groups, prompts):
        assert completion.token_ids == list(range(start + 1, 21)) and completion.finish_reason == "stop"
    passes, in_waves = fake.rows[1:], CountingModel()
    generate(in_waves, prompts, params, max_rows=4)
    assert max(passes) == 4 and min(passes) < 4, "the batch shrinks when nobody waits"
    assert len(in_waves.rows[1:]) == 30 and len(passes) <= 24


def test_docstring_examples():
    """The worked examples of sampler.py are true."""
    assert doctest.testmod(sampler).failed == 0
