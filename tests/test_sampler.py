"""Claims about sampler.py: what is sampled depends on (seed, row id, position) and the model, and on nothing else."""
import math

import pytest
import torch

from model import ModelConfig, Transformer, token_logprob
from sampler import Branch, Fork, RowNoise, SamplingParams, branch, generate, prefill, sample

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
    return token_logprob(logits_NV, tokens_BT[0, len(prompt):], temperature)[0]


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
    cache = Branch(trunk, [Fork(i, 40, (8 * i, 8 * i + 1)) for i in range(4)], capacity=16)
    assert len(cache.runs) == 1, "four alike neighbours are one batched product"
    groups, _, *where = cache.runs[0]
    view = cache.prefix(trunk.keys[0], where[0], groups, *where[1:])
    assert view.shape == (4, 2, 40, 8)
    assert view.untyped_storage().data_ptr() == trunk.keys[0].untyped_storage().data_ptr()
    for i in range(4):
        start = trunk.starts[i]
        assert torch.equal(view[trunk.order.index(i)], trunk.keys[0][:, start:start + 40])
    new = torch.zeros(8, 2, 1, 8)
    cache.attend(0, torch.zeros(8, 4, 1, 8), new, new)
    assert cache.keys[0].shape == (8, 2, 16, 8)


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
    noise = RowNoise(0, list(range(200)), "cpu")
    slots_R, positions_R = (x.flatten() for x in torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij"))
    tokens_R, logprobs_R = sample(logits_V.expand(40_000, 9), 1.0, noise, slots_R, positions_R)
    expected_V = logits_V.softmax(0) * 40_000
    chi_square = ((torch.bincount(tokens_R, minlength=9) - expected_V) ** 2 / expected_V).sum().item()
    assert chi_square < 30
    torch.testing.assert_close(logprobs_R, logits_V.log_softmax(0)[tokens_R], atol=1e-6, rtol=0)


def test_random_numbers_are_uniform_and_uncorrelated():
    """151,936 x 20 numbers: mean within 5 standard errors of 1/2, neighbours (token, position, row) uncorrelated."""
    noise = RowNoise(1, [5, 6], "cpu")
    slots_R, positions_R = torch.tensor([0] * 10 + [1] * 10), torch.arange(10).repeat(2)
    u_RV = noise.uniform(slots_R, positions_R, 151_936).double()
    error = 1 / math.sqrt(12 * u_RV.numel())
    assert abs(u_RV.mean().item() - 0.5) < 5 * error and 0 < u_RV.min() and u_RV.max() <= 1
    centred_RV = (u_RV - 0.5) * math.sqrt(12)
    for product in (centred_RV[:, 1:] * centred_RV[:, :-1], centred_RV[1:] * centred_RV[:-1],
                    centred_RV[:10] * centred_RV[10:]):
        assert abs(product.mean().item()) < 5 / math.sqrt(product.numel())


def test_masked_and_peaked_logits_are_handled():
    """-inf is never drawn, a certain token has log-prob 0, very negative logits give no NaN."""
    logits_RV = torch.tensor([[0.0, -math.inf, 0.0], [1e4, 0.0, 0.0], [-1e30, -1e30, -1e30]])
    noise = RowNoise(0, [0, 1, 2], "cpu")
    for position in range(50):
        tokens_R, logprobs_R = sample(logits_RV, 1.0, noise, torch.arange(3), torch.full((3,), position))
        assert tokens_R[0] != 1 and tokens_R[1] == 0 and logprobs_R[1] == 0 and logprobs_R.isfinite().all()


@pytest.mark.parametrize("length, limit", [(0, 5), (21, 5), (10, 0)])
def test_impossible_forks_are_refused(model, length, limit):
    """A fork before the first token, behind the last one, or without room to sample."""
    with pytest.raises(ValueError, match="must be at least 1"):
        branch(model, prefill(model, [ids(20)]), [Fork(0, length, (0,))], SamplingParams(limit))
