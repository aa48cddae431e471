r"""Properties of all that reads what others wrote: whatever comes, a result that holds or a ValueError.

2,000 examples of each; BREAD_EXAMPLES=20000 tries more. Needs hypothesis, which nothing else here uses.
"""
import dataclasses
import gzip
import json
import math
import os
import shutil
import time
import types

import pytest
import torch
from conftest import CHAIN

import bread
import data
from checkpoint import RunFolder, load, seal
from config import Config, check_paths, flag_of, parse_args
from model import ModelConfig, read_config, read_index, read_weights, rope_frequencies
from rewards import answers_match, extract_answer, math_reward, parse_gold, without_cut_word
from traces import Tokenizer

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
given = hypothesis.given
pytestmark = pytest.mark.slow

# Always the same examples: a test that fails once in a while is one that people run again. What varies the
# parts of a failure to explain it (`explain`) takes minutes where an example is slow.
hypothesis.settings.register_profile(
    "bread", max_examples=int(os.environ.get("BREAD_EXAMPLES", 2000)), derandomize=True, database=None,
    deadline=None, suppress_health_check=list(hypothesis.HealthCheck),
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink))
hypothesis.settings.load_profile("bread")

ODD = [None, True, -1, 8, 0.5, 10**30, 10**400, 1e308, 1e-320, math.nan, math.inf, "", "..", "\0", "x" * 300]
# Half of a surrogate pair is a text in JSON, too.
WORDS = st.text(max_size=5) | st.text(st.characters(categories=["Cs", "Lu", "Po"]), max_size=2)
JSON = st.recursive(st.sampled_from(ODD) | WORDS, lambda inner: st.lists(inner, max_size=2)
                    | st.dictionaries(WORDS, inner, max_size=2), max_leaves=3)
NO_JSON = st.sampled_from([b"", b"[" * 2000, b'{"a":' * 2000, b"\xff", b"9" * 5000, b'{"step'])


def mostly(usual, odd):
    """Nine in ten are usual. (In `usual | usual | odd` hypothesis counts the first two as one.)"""
    return st.sampled_from([usual] * 9 + [odd]).flatmap(lambda chosen: chosen)


def changed(bases, names, values=JSON):
    """One of these objects, one or two of its fields, or of those named, replaced by anything."""
    fields = st.dictionaries(mostly(st.sampled_from(names), WORDS), values, max_size=2)
    return st.builds(lambda base, fields: base | fields, st.sampled_from(bases), fields)


def in_files(objects):
    """Files that hold one of these objects; one in five holds something else."""
    return mostly(mostly(objects, JSON).map(lambda obj: json.dumps(obj).encode()), NO_JSON)


def outcome(call, *arguments, **keywords):
    """What the call returns, None if that is a ValueError; any other error is what the test looks for."""
    try:
        result = call(*arguments, **keywords)
    except ValueError:
        hypothesis.event(f"{call.__name__}: refused")
        return None
    hypothesis.event(f"{call.__name__}: accepted")
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


# ---------------------------------------------------------------- rows

ROW = {"question": "How many?", "trace": "A half of 48 is 24.\n#### 72", "answer": "72"}
TEXTS = st.sampled_from(["How many?", "so\n#### 72", "<think>\n</think>\n\\boxed{72}", "<think>", "Yes"])
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
MESSAGES = st.lists(st.fixed_dictionaries({"content": TEXTS | JSON}, optional={"role": ROLES, "from": JSON}))
FIELDS = sorted({*data.QUESTION, *data.TRACE, *data.ANSWER, *data.CONVERSATION, *data.THINKING, *data.HEEDED,
                 *data.THINKING.values(), "generations", "ground_truth_solution", "reward_model", "nums"})
ROWS = changed([ROW] * 9 + [{}], FIELDS, TEXTS | MESSAGES | JSON | st.lists(TEXTS | JSON, max_size=2))


@st.composite
def data_files(draw):
    """Lines or an array, behind the mark of an encoding or of another format, compressed, cut short."""
    rows = draw(st.lists(mostly(ROWS, JSON), max_size=4))
    lines = [json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") for row in rows]
    lines += draw(st.sampled_from([[]] * 8 + [[b"[" * 2000], [b"\xff"]]))
    content = b"[" + b",".join(lines) + b"]" if draw(st.booleans()) else b"\n".join(lines)
    content = draw(st.sampled_from([b""] * 13 + [b"\xef\xbb\xbf"] * 5 + [b"PAR1", b"\x1f\x8b"])) + content
    content = gzip.compress(content) if draw(st.booleans()) else content
    return content[:draw(st.sampled_from([None] * 18 + [-1, 30]))]


@given(data_files(), st.sampled_from([{}] * 8 + [{"question": "messages.0.content"}, {"answer": "level"}]),
       st.booleans())
def test_rows_are_of_their_kinds_and_strict_ends_where_one_is_left_out(folder, content, fields, needs):
    """Whatever is in a file; a row ends with the user's message and has an answer."""
    path = folder / "rows"
    path.write_bytes(content)
    rows = outcome(data.read_data, path, lambda row: row, fields, needs, say=len) or []
    for row in rows:
        assert [type(value) for value in dataclasses.astuple(row)] == [int, str, list, str, str, str]
        assert all(message.keys() == {"role", "content"} for message in row.messages)
        assert {type(text) for message in row.messages for text in message.values()} == {str}
        assert row.messages[-1]["role"] == "user" and row.answer and (row.trace or not needs)
    numbers = [row.number for row in rows]
    assert numbers == sorted(set(numbers)) and len({row.id for row in rows}) == len(rows)
    everything = outcome(list, data.read_rows(path)) or []
    strict = outcome(data.read_data, path, lambda row: row, fields, needs, strict=True, say=len)
    assert strict == (rows if rows and len(rows) == len(everything) else None)


# ---------------------------------------------------------------- anchors and verdicts

SPELLINGS = {"72": ["72.0", "\\$72"], "1/2": ["\\frac{1}{2}", "0.5", "½"], "B": ["(B)", "B: no"],
             "x+1": ["1 + x"], "(3, 4)": ["(3,4)"], "1,000": ["1000"], "blue": ["Blue"], "7 or 5": ["5, 7"]}
CLAIMS = ["It is {}. ", "**Answer:** {}", "\\boxed{{{}}}", "\\fbox {}", "#### {}", "answer: {}", "{}? ",
          "= {}", "<answer>{}</answer>", "# Answer\n{}", "(A) 3 (B) {}", "**{}**", "是{}。", "\\boxed",
          "Step {}. ", "The answer is\n{}", "Answer $${}$$", "<think>\n", "</think>", "```",
          "$", "\\[", "é😀", "{{"]
GAPS = st.sampled_from(["\n\n", "\n\n", "\n", " ", "", "\r\n\t\n", ". ", "\u2028"])


@st.composite
def traces(draw):
    answer = draw(st.sampled_from(sorted(SPELLINGS)))
    values = st.sampled_from([answer, *SPELLINGS[answer], "9", "24"]) | st.text(max_size=5)
    parts = draw(st.lists(st.tuples(st.sampled_from(CLAIMS), values, GAPS), max_size=12))
    end = draw(st.sampled_from([f"\n#### {answer}", f"\n\\boxed{{{answer}}}", ""]))
    return "".join(claim.format(value) + gap for claim, value, gap in parts) + end, answer


@pytest.fixture(scope="module")
def policy():
    config = Config(model=f"{CHAIN / 'model'}", max_new_tokens=9999)
    return bread.Policy(config, torch.device("cpu"), config.model)


@given(traces(), st.integers(2, 12))
def test_anchors_are_prefixes_that_earn_nothing(policy, written, most):
    """Increasing, inside the trace, fewer than its episodes; none is paid without a completion."""
    row = data.Row(1, "1", [{"role": "user", "content": "1+1?"}], *written, "")
    shape = types.SimpleNamespace(max_position_embeddings=10**6, vocab_size=401)
    problem = outcome(bread.to_problem, Config(max_episodes=most), policy.tokenizer, shape, True, row)
    cuts = policy.cuts(problem) if problem else []
    hypothesis.event(f"cuts: {min(len(cuts), 3)}")
    assert cuts == sorted(set(cuts)) and len(cuts) < most
    for cut in cuts:
        anchor = policy.tokenizer.decode(problem.expert_ids[:cut])
        assert 0 < cut < len(problem.expert_ids) and problem.trace.startswith(anchor)
        assert math_reward(anchor, problem.answer) == 0


FORMS = ["{}{}", "{} {}", "{},{}", "({},{}]", "\\{{{},{}\\}}", "\\frac{{{}}}{{{}}}", "{}/{}",
         "\\sqrt{{{}}}{}", "{}^{}", "\\boxed{{{}}}{}", "\\text{{{}}} {}", "{}\\pm{}", "{}\n#### {}",
         "{} answer is {}", "{} or {}"]
SIGNS = ["5", "12", "1,000", ".5", "9**9**9", "1e99", "1e-999999999", "10^{99}", "x", "B", "cm", "\\frac",
         "٣", "\\pi", "½", "−", "%", "\\", "{", "}", "(", "|", "~", "</think>", "<|", "or", "'"]
TEX = st.recursive(st.sampled_from(SIGNS) | st.sampled_from(SIGNS[:12]) | WORDS, lambda inner: st.builds(
    str.format, st.sampled_from(FORMS), inner, inner), max_leaves=6)
SAME = ["{}", " {} ", "${}$", "{}.", "x={}", "({})", "{} cm", "\\text{{{}}}", "\\left({}\\right)", "({}: one"]


@given(TEX, TEX, st.sampled_from(SAME), st.sampled_from([1, 1, 1, 1, 1, 1, 1, 60, 10_000]))
def test_verdicts_are_quick_symmetric_and_right_about_themselves(text, gold, form, times):
    """No text is an error or takes a second; a gold answer in a box is paid; two golds match both ways."""
    started = time.process_time()
    assert math_reward(text * times, gold) in (0.0, 1.0)
    cut = without_cut_word(text * times)
    assert (text * times).startswith(cut) and math_reward(cut, gold) in (0.0, 1.0)
    assert extract_answer(f"{gold} " * times) != ""
    assert time.process_time() - started < 1
    plain = parse_gold(gold)
    hypothesis.event(f"a gold answer: {plain is not None}")
    if plain is None:
        assert not answers_match(text, gold)
        return
    assert answers_match(plain, gold) and math_reward(f"so \\boxed{{{plain}}}", gold) == 1
    for other in (text, form.format(plain)):
        if parse_gold(plain) == plain and parse_gold(other) == other:
            hypothesis.event(f"a pair that matches: {answers_match(other, plain)}")
            assert answers_match(other, plain) == answers_match(plain, other)


# ---------------------------------------------------------------- arguments

FLAGS = {flag_of(field): field for field in dataclasses.fields(Config)}
NAMES = [field.name for field in FLAGS.values()]
FILES = {"good": b"--steps 3 # so\n--lr 1", "itself": b"@itself", "quote": b"--data 'a", "bytes": b"\xff\0"}
JUNK = WORDS | st.sampled_from(["-h", "--", "--step", "@none", "@.", "@\0", *(f"@{name}" for name in FILES)])


@st.composite
def arguments(draw):
    """A flag with a value that mostly fits; one in sixteen is anything that people mistype."""
    flag = draw(st.sampled_from(sorted(FLAGS)))
    field = FLAGS[flag]
    if draw(st.integers(0, 15)) == 0:
        return [draw(JUNK)]
    if field.type is bool:
        return [flag]
    fitting = field.metadata["choices"] or {int: "128", float: ["0.1", "1"], str: ["sft", "{}"]}[field.type]
    value = draw(mostly(st.sampled_from(fitting), JUNK | st.sampled_from(ODD).map(str)))
    return draw(st.sampled_from([[flag, value], [f"{flag}={value}"]]))


@given(st.lists(arguments(), max_size=4), in_files(changed([{"model": "m", "data": "d"}], NAMES)))
def test_arguments_are_a_config_or_one_line(folder, monkeypatch, words, run_json):
    """Every field is of its declared kind; --help alone ends otherwise, with 0."""
    monkeypatch.chdir(folder)
    for name, content in {**FILES, "run.json": run_json}.items():
        (folder / name).write_bytes(content)
    try:
        config = outcome(parse_args, [*sum(words, []), "--output", "."], CHAIN)
    except SystemExit as end:
        assert end.code == 0 and ["-h"] in words
        return
    if config:
        outcome(check_paths, config)
        assert {type(getattr(config, field.name)) is field.type for field in FLAGS.values()} == {True}


# ---------------------------------------------------------------- folders of models and runs

SHARDS = st.sampled_from(["model.safetensors"] * 40 + ["/etc/passwd", "../rows", ".", "", ".."])
INDEX = st.dictionaries(WORDS, mostly(SHARDS, JSON), max_size=3)


@given(in_files(changed([{"weight_map": {}}], ["weight_map"], mostly(INDEX, JSON))))
def test_an_index_names_files_of_its_folder(folder, policy, index):
    """Never one outside, whatever its text; what it names is loaded, or refused in one line."""
    inside = folder / "model"
    inside.mkdir(exist_ok=True)
    shutil.copy(CHAIN / "model" / "model.safetensors", inside)
    (inside / "model.safetensors.index.json").write_bytes(index)
    files = outcome(read_index, inside) or {}
    assert {os.path.dirname(os.path.normpath(f"{inside}/{file}")) for file in files.values()} <= {f"{inside}"}
    outcome(read_weights, inside, policy.model)


CONFIG = json.loads((CHAIN / "model" / "config.json").read_text())
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = [CONFIG, {**CONFIG, "model_type": "qwen2"}, {**CONFIG, "model_type": "qwen3", "rope_scaling": ROPE},
           {**CONFIG, "model_type": "mistral", "sliding_window": None, "rope_scaling": LLAMA3}]
FIELDS_OF_MODELS = [*CONFIG, "layer_types", "use_sliding_window", "max_window_layers", "quantization_config",
                    "partial_rotary_factor", "original_max_position_embeddings", "rope_scaling", "rope_theta"]
SETTINGS = changed([ROPE, LLAMA3], [*LLAMA3, "rope_theta", "type"], JSON | st.sampled_from([1, "linear"]))


@given(in_files(changed(CONFIGS, FIELDS_OF_MODELS, SETTINGS | JSON | st.sampled_from([1, 2, 12, False]))))
def test_a_config_is_numbers_that_a_model_can_be_made_of(folder, content):
    """Sizes are positive integers, everything else is finite, and so is every frequency."""
    (folder / "config.json").write_bytes(content)
    raw = outcome(read_config, folder)
    config = raw and outcome(ModelConfig.from_dict, raw)
    if config:
        fields = dataclasses.asdict(config)
        for field in dataclasses.fields(config):
            assert type(fields[field.name]) is field.type or field.name == "rms_norm_eps"
        assert min(value for value in fields.values() if type(value) is int) > 0
        assert 0 < float(config.rms_norm_eps) < math.inf
        if config.head_dim < 10**4:
            frequencies_R, scale = rope_frequencies(config)
            assert frequencies_R.isfinite().all() and math.isfinite(scale)


TOKENIZER = json.loads((CHAIN / "model" / "tokenizer_config.json").read_text())
ENDS = st.sampled_from([0, 5, [0, 7], "<|end|>", {"content": "<|end|>"}, "{{ messages }}1+1?", -1]) | JSON


@given(in_files(changed([TOKENIZER], [*TOKENIZER, "bos_token", "add_bos_token"], ENDS)),
       in_files(changed([{"eos_token_id": 0}], ["eos_token_id"], ENDS)))
def test_a_tokenizer_renders_or_says_what_is_wrong(folder, tokenizer_config, generation_config):
    """Its prompts are ids, and its stops have texts."""
    path = folder / "tokenizer"
    path.mkdir(exist_ok=True)
    shutil.copy(CHAIN / "model" / "tokenizer.json", path)
    (path / "tokenizer_config.json").write_bytes(tokenizer_config)
    (path / "generation_config.json").write_bytes(generation_config)
    tokenizer = outcome(Tokenizer.from_pretrained, path)
    if tokenizer:
        assert {type(id) for id in tokenizer.render("1+1?")} == {int}
        assert {type(text) for text in tokenizer.stop_texts} == {str}


MANIFESTS = in_files(st.just({"files": {}, "record": {}}))


@given(mostly(st.none(), MANIFESTS), in_files(st.just({"model": "m"})), st.lists(
    in_files(changed([{"step": 1}], ["step"])), max_size=4))
def test_a_run_is_opened_or_refused(folder, manifest, run_json, lines):
    """Whatever its JSON files have become; a log keeps no line behind the step that it goes on from."""
    path = folder / "run"
    saved = path / "checkpoint-1"
    saved.mkdir(parents=True, exist_ok=True)
    (saved / "trainer.json").unlink(missing_ok=True)
    seal(saved, {})
    if manifest is not None:
        (saved / "trainer.json").write_bytes(manifest)
    (path / "run.json").write_bytes(run_json)
    (path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    run = outcome(RunFolder, path, resume=True)
    if run:
        try:
            outcome(run.read_json, "run.json")
            outcome(load, saved, bool)
            run.truncate("metrics.jsonl", 1)
        finally:
            run.close()
