"""What traces.py promises: ids, prompts, cuts and errors."""
import doctest
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers, trainers

import traces
from traces import HINT, Tokenizer, find_cuts, load_problems

DATA = Path(__file__).parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the public test data is not here")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "<|im_start|>assistant\n")
ROW = {"question": "Two bags hold 6 apples each. How many?", "trace": "There are 2 bags.\n\nSo 2*6 = 12 apples.",
       "answer": "12"}


@pytest.fixture(scope="session")
def backend_json():
    """A byte-level BPE tokenizer of a few hundred tokens, with Qwen's chat markers, as the text of tokenizer.json."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = ["There are 2 bags.\n\nSo 2*6 = 12 apples. Half of 12 is 6.\n", "水は水です。\n\n答えは 7 です。"]
    backend.train_from_iterator(text * 20, trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>"])
    return backend.to_str()


@pytest.fixture
def folder(tmp_path, backend_json):
    """Writes a tokenizer folder; keyword arguments are fields of tokenizer_config.json."""
    def write(files=None, **config):
        config = {"eos_token": "<|im_end|>", "chat_template": CHATML} | config
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        (path / "tokenizer.json").write_text(backend_json, encoding="utf-8")
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        for name, text in (files or {}).items():
            (path / name).write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
        return path
    return write


@pytest.fixture
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder())


@pytest.fixture
def load(tmp_path, tokenizer):
    """Writes lines (objects, text or bytes) to a file and loads it."""
    def run(*lines, newline=b"\n", **options):
        encoded = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
                   for line in lines]
        (tmp_path / "data.jsonl").write_bytes(newline.join(encoded))
        return load_problems(tmp_path / "data.jsonl", options.pop("tokenizer", tokenizer), **options)
    return run


@pytest.fixture(scope="session")
def qwen():
    return Tokenizer.from_pretrained(DATA / "tokenizers" / "qwen2.5")


def prompt(tokenizer, *question, **options):
    """The rendered prompt as text, special tokens shown."""
    return tokenizer.decode(tokenizer.render(*question, **options), skip_special_tokens=False)


def offsets_of(*tokens):
    """(start, end) of tokens given as text."""
    ends = [len("".join(tokens[:i + 1])) for i in range(len(tokens))]
    return list(zip([0, *ends], ends))


def cuts_of(text, answer="zzz", question="", **options):
    """Cuts of a trace with one token per character, so that positions are characters."""
    return find_cuts(text, [(i, i + 1) for i in range(len(text))], answer, question, **options)


# Tokenizer ------------------------------------------------------------------------------------------------------

def test_docstring_examples_run():
    """The worked example of find_cuts is true."""
    result = doctest.testmod(traces)
    assert result.attempted >= 3 and not result.failed


def test_missing_or_broken_files_are_named(tmp_path, folder):
    """A missing or broken file of a tokenizer folder is a ValueError with the file's name."""
    with pytest.raises(ValueError, match="tokenizer.json cannot be read.*No such file"):
        Tokenizer.from_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        path = folder()
        (path / name).write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(ValueError, match=re.escape(name)):
            Tokenizer.from_pretrained(path)
        (path / name).unlink()


def test_stop_ids_are_the_union_of_all_files(folder):
    """generation_config, config and the tokenizer each add their eos, as one id, a list or null (T5)."""
    own = Backend.from_file(str(folder() / "tokenizer.json")).token_to_id("<|im_end|>")
    path = folder({"generation_config.json": {"eos_token_id": [5, 3]}, "config.json": {"eos_token_id": 9}})
    tokenizer = Tokenizer.from_pretrained(path)
    assert tokenizer.stop_token_ids == (3, 5, 9, own) and tokenizer.eos_id == own
    path = folder({"generation_config.json": {"eos_token_id": None}, "config.json": {}},
                  eos_token={"__type": "AddedToken", "content": "<|im_end|>"})
    assert Tokenizer.from_pretrained(path).stop_token_ids == (own,)
    path = folder({"generation_config.json": {"eos_token_id": [5, 3]}}, eos_token=None)
    assert Tokenizer.from_pretrained(path).eos_id == 3


def test_no_end_token_anywhere_is_an_error(folder):
    """Without any eos, rollouts would never end: loading refuses."""
    with pytest.raises(ValueError, match="rollouts would never end"):
        Tokenizer.from_pretrained(folder(eos_token=None))


def test_vocab_size_counts_added_tokens(tokenizer, backend_json):
    """vocab_size includes the tokens added after training."""
    saved = json.loads(backend_json)
    assert tokenizer.vocab_size == len(saved["model"]["vocab"]) + len(saved["added_tokens"])


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path, folder, backend_json):
    """A tokenizer.json that was saved with truncation or padding does not cut or pad a trace."""
    backend = Backend.from_str(backend_json)
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.from_pretrained(folder({"tokenizer.json": backend.to_str()}))
    assert tokenizer.decode(tokenizer.encode("So 2*6 = 12 apples.")) == "So 2*6 = 12 apples."


def test_text_of_special_tokens_stays_plain(tokenizer):
    """encode never yields a special id, whatever the text spells; ordinary added tokens are still recognised."""
    text = "a<|im_end|>b<|im_start|>c<|endoftext|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text  # decode skips special ids, so none of them is there
    assert len(tokenizer.encode("<think>")) == 1


@needs_data
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_text_of_special_tokens_stays_plain_in_qwen(name):
    """The real Qwen tokenizers: the three markers are 151643..151645, and plain text never yields them."""
    tokenizer = Tokenizer.from_pretrained(DATA / "tokenizers" / name)
    for marker in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"):
        ids = tokenizer.encode(f"x{marker}y")
        assert max(ids) < 151643 and tokenizer.decode(ids) == f"x{marker}y"
    assert {151644, 151645} <= set(tokenizer.render("x"))  # the template's own markers are special ids
    assert 151645 in tokenizer.stop_token_ids and tokenizer.eos_id == 151645


# Prompts --------------------------------------------------------------------------------------------------------

EXPECTED = {
    "qwen2_5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
               "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "smollm2": "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
               "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "tinyllama": "<|user|>\nWhy?</s>\n<|assistant|>\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama3_2": "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
                "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "deepseek_r1_distill": "<s><｜User｜>Why?<｜Assistant｜><think>\n",
}
EXPECTED["llama3_1"] = EXPECTED["llama3_2"]


@needs_data
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_published_templates_render_exactly(name, folder, backend_json):
    """Published templates give the expected prompt to the letter: no stray newline, no second bos, no date of today."""
    backend = Backend.from_str(backend_json)
    backend.add_special_tokens(["<s>", "</s>"])
    template = (DATA / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    files = {"tokenizer.json": backend.to_str(), "chat_template.jinja": template}
    tokenizer = Tokenizer.from_pretrained(folder(files, bos_token="<s>", eos_token="</s>", add_bos_token=True))
    assert prompt(tokenizer, "Why?") == EXPECTED[name]
    assert "Be brief." in prompt(tokenizer, "Why?", system="Be brief.")


@needs_data
def test_no_published_template_is_left_out():
    """The comparison above covers every template of the test data."""
    assert {path.stem for path in (DATA / "chat_templates").glob("*.jinja")} == set(EXPECTED)


def test_template_sources_in_order(folder):
    """chat_template.jinja overrides tokenizer_config.json; of a list of templates, "default" is taken."""
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "default"}]
    assert prompt(Tokenizer.from_pretrained(folder(chat_template=named)), "?") == "default"
    path = folder({"chat_template.jinja": "file"}, chat_template=named)
    assert prompt(Tokenizer.from_pretrained(path), "?") == "file"
    (path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="none of the templates is named default"):
        Tokenizer.from_pretrained(folder(chat_template=named[:1]))


def test_template_language_is_that_of_transformers(folder):
    """tojson without HTML escapes, loop controls, the generation tag, strftime_now with the pinned date."""
    template = ("  {% if true %}{% endif %}{% for m in messages %}{% generation %}{{ m.content | tojson }}"
                "{%- endgeneration -%} {% break %}"
                "{% endfor %}{{ strftime_now('%Y') }} {{ date_string }} {{ eos_token }} {{ bos_token }}")
    tokenizer = Tokenizer.from_pretrained(folder(chat_template=template))
    assert prompt(tokenizer, "<é>'&") == "\"<é>'&\"2024 26 Jul 2024 <|im_end|> "


@pytest.mark.parametrize("template, words", [
    ("a\n{% for %}", "line 2: TemplateSyntaxError"),
    ("a\n\n{{ messages[0].a.b }}", "line 3: UndefinedError"),
    ("{{ raise_exception('only system') }}", "line 1: TemplateError.'only system'"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{% include '/etc/hostname' %}", "TypeError"),
    ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "longer than 1000000"),
])
def test_broken_and_hostile_templates_are_refused(folder, template, words):
    """A template that fails, reaches out of the sandbox or floods is a ValueError with its file and line."""
    with pytest.raises(ValueError, match=words) as info:
        Tokenizer.from_pretrained(folder(chat_template=template))
    assert "tokenizer_config.json" in str(info.value)


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_data_cannot_forge_turns(tokenizer, load, marker):
    """A question, hint, system message or trace that spells a special token is refused by the token's name."""
    for arguments in ({"question": marker}, {"question": "a", "hint": marker}, {"question": "a", "system": marker}):
        with pytest.raises(ValueError, match=re.escape(marker)):
            tokenizer.render(**arguments)
    for field in ("question", "trace", "system"):
        with pytest.raises(ValueError, match="line 1.*" + re.escape(marker)):
            load(ROW | {field: f"a{marker}b"})


def test_without_template_the_prompt_is_plain(folder, backend_json):
    """System text, blank line, question, newline; bos in front if the config or tokenizer.json itself says so."""
    tokenizer = Tokenizer.from_pretrained(folder(chat_template=None, bos_token="<|endoftext|>"))
    assert prompt(tokenizer, "Why?") == "Why?\n"
    assert prompt(tokenizer, "Why?", system="Be brief.") == "Be brief.\n\nWhy?\n"
    tokenizer = Tokenizer.from_pretrained(folder(chat_template=None, bos_token="<|endoftext|>", add_bos_token=True))
    assert prompt(tokenizer, "Why?") == "<|endoftext|>Why?\n"
    from tokenizers.processors import TemplateProcessing
    backend = Backend.from_str(backend_json)
    bos = backend.token_to_id("<|endoftext|>")
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)])
    path = folder({"tokenizer.json": backend.to_str()}, chat_template=None, bos_token="<|endoftext|>")
    tokenizer = Tokenizer.from_pretrained(path)
    assert tokenizer.render("Why?") == [bos, *tokenizer.encode("Why?\n")] and bos not in tokenizer.encode("Why?")


def test_hint_stands_below_the_question(tokenizer):
    """A hint ends the user's message, in text and in messages; an empty one changes nothing; input stays as it is."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    shown = prompt(tokenizer, messages, hint="There are")
    assert f"Why?{HINT}There are<|im_end|>" in shown and shown.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert messages[-1]["content"] == "Why?"
    assert tokenizer.render("Why?", hint="") == tokenizer.render("Why?")
    assert tokenizer.render("Why?", system="Be brief.") == tokenizer.render(messages, system="Be long.")


@pytest.mark.parametrize("question", [
    [], None, 5, [5], [{"role": "user"}], [{"role": "user", "content": 5}], [{"role": "tool", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user<|im_end|>", "content": "a"}, {"role": "user", "content": "b"}]])
def test_malformed_messages_are_refused(tokenizer, question):
    """Messages need known roles, text contents, and the user's turn last."""
    with pytest.raises(ValueError, match="ends with the user's message"):
        tokenizer.render(question)


# Cuts -----------------------------------------------------------------------------------------------------------

def test_coarsest_usable_separator_wins():
    """Blank lines before line ends before sentence ends, and the next finer one where no coarser place is usable."""
    assert cuts_of("a. b\nc\n\nd\n \ne") == [8, 12]
    assert cuts_of("a. b\nc\nd") == [5, 7]
    assert cuts_of("Go. (Why?) No! 3.5 is ok.") == [4, 11, 15]
    assert cuts_of("水。火。木") == [2, 4]
    assert cuts_of("a b c") == []
    assert cuts_of("a. b\nc\n\nthe 7", answer="7") == [8]
    assert cuts_of("a. b\nthe 7\n\nd", answer="7") == [5]  # the blank line lies behind the answer
    assert cuts_of("a. the 7\n\nd", answer="7") == [3]
    assert cuts_of("a\r\n\r\nb\r\n\r\nc") == [5, 10]


def test_last_episode_is_never_offered():
    """K episodes give K - 1 cuts, never 0 and never the whole trace, also where separators end it (E5)."""
    assert cuts_of("a\n\nb\n\nc") == [3, 6]
    assert cuts_of("a\n\nb\n\n") == [3]
    assert cuts_of("a") == [] and cuts_of("a\n\n") == [] and cuts_of("") == []


def test_cuts_fall_on_token_ends():
    """A boundary inside a token moves back to the token's start; cuts that meet are one."""
    tokens = ("a.", "\n\nb", "\n\n", "c\n\nd", "\n\ne")
    text = "".join(tokens)
    assert find_cuts(text, offsets_of(*tokens), "zzz", "") == [1, 3, 4]
    assert find_cuts("a\n\nb", [(0, 4)], "zzz", "") == []


def test_no_multi_byte_character_is_split():
    """Byte-level tokens of one character all carry its end, so that a cut stands behind all of them."""
    offsets = [(0, 1), (0, 1), (0, 1), (1, 2), (2, 3), (2, 3), (2, 3), (3, 4)]
    assert find_cuts("水。火b", offsets, "zzz", "") == [4]


def test_many_episodes_merge_to_nearly_equal_lengths():
    """At most max_episodes - 1 cuts stay, spread evenly over the tokens, not over the boundaries."""
    lines = "".join(f"{'ab'[i % 2]}\n" for i in range(100))
    assert cuts_of(lines, max_episodes=10) == list(range(20, 200, 20))
    assert cuts_of(lines, max_episodes=2) == [100] and cuts_of(lines, max_episodes=1) == []
    uneven = "a\n" * 10 + "b" * 38 + "\n" + "c" * 40 + "\nd"  # ten short lines, then two of 39 and 41 tokens
    assert cuts_of(uneven, max_episodes=4) == [20, 59] and len(cuts_of(uneven, max_episodes=20)) == 12
    assert cuts_of("a\n" * 50 + "7\n" + "b\n" * 50, answer="7", max_episodes=5) == [20, 40, 60, 80]


@pytest.mark.parametrize("line, answer, stated", [
    ("the 72 is", "72", True), ("72.", "72", True), ("$72,", "72", True), ("72.00", "72", True),
    ("x=72cm", "72", True), ("172", "72", False), ("72.5", "72", False), ("7,200", "200", False),
    ("7,200", "72", False), ("720", "72", False),
    ("1,000", "1000", True), ("1000", "1,000", True), ("1{,}000", "1000", True), (r"1,\!000", "1000", True),
    ("1,000", "1", False), ("0.5", ".5", True), ("0.5", "5", False), ("-5", "-5", True), ("10-5", "-5", True),
    ("$18", "$18.00", True), ("25%", r"25\%", True), (r"\frac{3}{4}", r"\frac{3}{4}", True),
    ("so (3, 4)", "(3,  4)", True),
    ("Evelyn", "Evelyn", True), ("Evelyns", "Evelyn", False), ("yes, 9" + "9" * 400, "9" * 400, True),
    (r"\boxed{\frac12}", "1/2", True), ("#### twelve", "12", True)])
def test_answer_is_recognised_as_a_whole(line, answer, stated):
    """An anchor may end behind a line if and only if the line does not state the answer."""
    cuts = cuts_of(f"start\n{line}\nnext\nend", answer)
    assert cuts == ([6] if stated else [6, 7 + len(line), 12 + len(line)])


@pytest.mark.parametrize("line, stated", [
    ("we have 5 bags", False), ("5+3", False), ("3+2 = 5", True), ("3+2=$5", True), ("<<3+2>>5", True),
    ("the result is 5", True), ("it is **5**", True), (r"it is $\$5$", True), ("this 5", False), ("= 5.5", False)])
def test_answer_in_the_question_counts_only_where_claimed(line, stated):
    """Where the question holds the answer's number, only occurrences behind "=", ">>" or "is" state it."""
    cuts = cuts_of(f"start\n{line}\nnext\nend", "5", "Of 5.0 bags, how many?")
    assert cuts == ([6] if stated else [6, 7 + len(line), 12 + len(line)])


# Loading --------------------------------------------------------------------------------------------------------

def test_anchor_is_a_prefix_of_the_traces_own_ids(load, tokenizer):
    """expert_ids is the trace tokenised once and whole: newline merges, multi-byte text and LaTeX included (T6)."""
    for trace in ("  There are 2.\n\nSo\n\n\n6", "水は水です。\n\n答えは\n\n7", "é\n\nü",
                  "a \\(\n\n\\frac{1}{2}\\)\n\nb", "a. b"):
        problem, = load({"question": "Why?", "trace": trace, "answer": "none"})
        assert problem.expert_ids == tokenizer.encode(trace.strip()) and problem.cuts
        for cut in problem.cuts:
            anchor = tokenizer.decode(problem.expert_ids[:cut])
            assert trace.strip().startswith(anchor) and "�" not in anchor
            assert tokenizer.decode(problem.expert_ids[:cut] + problem.expert_ids[cut:]) == problem.trace


def test_anchor_holds_no_end_token(load, tokenizer):
    """End-of-turn tokens at a trace's end are stripped, white space with them; expert_ids has no stop id (T7)."""
    problem, = load(ROW | {"trace": ROW["trace"] + "<|im_end|>\n<|endoftext|> "})
    assert problem.trace == ROW["trace"] and not set(problem.expert_ids) & set(tokenizer.stop_token_ids)
    with pytest.raises(ValueError, match="line 1: field 'trace' is empty"):
        load(ROW | {"trace": "<|im_end|>"})


def test_ordinary_token_as_stop_token_is_noticed(load, folder, backend_json):
    """A trace that would contain a stop id, because an ordinary token is one, is refused."""
    full_stop = Backend.from_str(backend_json).token_to_id(".")
    tokenizer = Tokenizer.from_pretrained(folder({"config.json": {"eos_token_id": full_stop}}))
    with pytest.raises(ValueError, match="stop token"):
        load(ROW | {"trace": "a ."}, tokenizer=tokenizer)


def test_opened_thinking_is_not_opened_twice(load, folder):
    """One leading "<think>\\n" is stripped from the trace if, and only if, the prompt ends with it."""
    trace = "<think>\nhm\n</think>\n\n12"
    opened = Tokenizer.from_pretrained(folder(chat_template=CHATML + "{{ '<think>\\n' }}"))
    assert load(ROW | {"trace": trace}, tokenizer=opened)[0].trace == trace.removeprefix("<think>\n")
    assert load(ROW | {"trace": trace})[0].trace == trace


def test_problem_holds_the_rendered_question(load, tokenizer):
    """prompt_ids is render() of the question; ids default to line numbers; a system message makes it messages."""
    first, second, third = load(ROW, ROW | {"id": "b", "system": "Be brief."}, ROW | {"id": 7}, system="Think.")
    assert first.id == "1" and second.id == "b" and third.id == "7" and first.answer == "12"
    assert first.prompt_ids == tokenizer.render(ROW["question"], system="Think.")
    assert second.prompt_ids == tokenizer.render(ROW["question"], system="Be brief.")
    assert second.prompt_ids == tokenizer.render(second.question)
    plain, = load(ROW)
    assert plain.question == ROW["question"] and plain.prompt_ids == tokenizer.render(plain.question)
    assert [tokenizer.decode(plain.expert_ids[:cut]) for cut in plain.cuts] == ["There are 2 bags.\n\n"]


def test_field_names_of_public_sets_are_read(load):
    """Every alias works, ours wins, and null counts as absent."""
    for name, aliases in traces.ALIASES.items():
        for alias in aliases:
            row = {key: value for key, value in ROW.items() if key != name}
            value = [ROW[name], "other"] if alias == "traces" else ROW[name]
            problem, = load(row | {alias: value, **({name: None} if alias != name else {})})
            assert (problem.question, problem.trace, problem.answer) == tuple(ROW.values())
    messages = [{"role": "user", "content": "2*6?"}]
    assert load({"prompt": messages, "solution": "a\n\n12", "gold": 12})[0].question == "2*6?"
    assert load(ROW | {"solution": "unused"})[0].trace == ROW["trace"]


def test_gsm8k_lines_work_unchanged(load):
    """Raw GSM8K: the answer text is the trace, "####" line kept, calculator marks gone, the gold behind "####"."""
    answer = "One: 48/2 = <<48/2=24>>24.\nBoth: 48+24 = <<48+24=72>>72.\n#### 72"
    problem, = load({"question": "Two days?", "answer": answer})
    assert problem.trace == "One: 48/2 = 24.\nBoth: 48+24 = 72.\n#### 72" and problem.answer == "72"
    assert len(problem.cuts) == 1


@pytest.mark.parametrize("given, answer", [
    (72, "72"), (72.0, "72"), (0.5, "0.5"), (-3, "-3"), (1e21, "1" + "0" * 21), ("72.0", "72.0"), (" 7 ", "7"),
    ("so\n#### 7", "7")])
def test_gold_numbers_keep_their_spelling(load, given, answer):
    """72 and 72.0 become "72"; text stays as it is, less white space and a "####" head."""
    assert load(ROW | {"answer": given})[0].answer == answer


@pytest.mark.parametrize("trace, answer", [
    ("so\n#### 1,200", "1,200"), (r"so \boxed{3}, or \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}")])
def test_gold_is_taken_from_the_trace(load, trace, answer):
    """Without an answer field, the "####" tail or the last \\boxed{}, braces balanced, is the gold."""
    assert load({"question": "?", "trace": trace})[0].answer == answer


def test_file_forms_that_are_fine(load):
    """A byte order mark, CRLF, blank lines, no or one final newline, U+2028 inside text, a lone CR between fields."""
    row = json.dumps(ROW | {"question": "one\u2028two"}, ensure_ascii=False).replace('", "', '",\r "')
    problems = load(b"\xef\xbb\xbf" + row.encode(), "", "  ", ROW, "", newline=b"\r\n")
    assert [problem.id for problem in problems] == ["1", "4"] and problems[0].question == "one\u2028two"


@pytest.mark.parametrize("line, words", [
    ("{", "not JSON"), ("[1]", "a JSON list"), (b'{"question": "\xff"}', "utf-8"), ("[" * 100_000, "recursion"),
    ('{"question": ' + "9" * 5000 + "}", "4300"),
    ({"trace": "a", "answer": "1"}, "field 'question' is None; text is needed, under the name question or problem"),
    ({"question": "a", "answer": "1"}, "field 'trace' is None"),
    ({"question": "a", "trace": "b"}, "field 'answer' is None"),
    ({"question": "a", "trace": r"\boxed{1"}, "field 'answer' is None"),
    (ROW | {"question": 5}, "field 'question' is 5"), (ROW | {"trace": " "}, "field 'trace' is ' '"),
    (ROW | {"traces": [], "trace": None}, "field 'traces'"),
    (ROW | {"trace": None, "solution": [5]}, "field 'solution'"),
    (ROW | {"answer": float("nan")}, "field 'answer' is 'nan'"), (ROW | {"answer": 1e999}, "field 'answer' is 'inf'"),
    (ROW | {"answer": "####"}, "field 'answer' is ''"), (ROW | {"answer": True}, "field 'answer' is True"),
    (ROW | {"answer": {"a": 1}}, "field 'answer'"), (ROW | {"system": 5}, "field 'system' is 5"),
    (ROW | {"trace": "a\ud800"}, "field 'trace' holds a lone surrogate"),
    (ROW | {"question": [{"role": "user", "content": "\udfff"}]}, "field 'question' holds a lone surrogate"),
    (ROW | {"question": [{"role": "user"}]}, "ends with the user's message")])
def test_bad_line_is_named_with_number_and_field(load, line, words):
    """The first bad line stops with file, line number (blank lines counted) and field; or is skipped and reported."""
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: (?s:.)*" + words):
        load(ROW, "", line, ROW)
    log = []
    problems = load(ROW, "", line, ROW, skip_bad_lines=True, log=log.append)
    assert [problem.id for problem in problems] == ["1", "4"]
    assert "line 3, skipped" in log[0] and "2 problems, 1 bad lines skipped" in log[-1]


def test_nothing_usable_is_an_error(load, tmp_path, tokenizer):
    """Missing file, empty file, only bad or only too long rows."""
    with pytest.raises(ValueError, match="none.jsonl cannot be read.*No such file"):
        load_problems(tmp_path / "none.jsonl", tokenizer)
    for lines, options in (([], {}), ([""], {}), (["{"], {"skip_bad_lines": True}), ([ROW], {"max_tokens": 10})):
        with pytest.raises(ValueError, match="0 problems"):
            load(*lines, **options)


def test_long_rows_are_skipped_whole_and_counted(load):
    """A row longer than max_tokens, prompt and trace together, is left out, never cut (T9)."""
    log = []
    whole, = load(ROW)
    size = len(whole.prompt_ids) + len(whole.expert_ids)
    assert len(load(ROW, max_tokens=size)) == 1
    kept, = load(ROW, ROW | {"trace": ROW["trace"] + " And so on."}, max_tokens=size, log=log.append)
    assert kept == whole and "1 longer than" in log[-1]


def test_repeated_questions_warn_and_repeated_ids_stop(load):
    """The same question twice is a warning; the same id twice an error, for runs key their records by it."""
    log = []
    assert len(load(ROW, ROW, log=log.append)) == 2 and "warning" in log[0] and "1 questions" in log[0]
    with pytest.raises(ValueError, match="id '2' occurs 2 times"):
        load(ROW | {"id": 2}, ROW)


@needs_data
def test_anchors_of_public_traces(qwen, tmp_path):
    """500 GSM8K and 500 MATH traces: every anchor is a prefix of the trace's text and states no answer (T6, E5)."""
    lines = (DATA / "gsm8k" / "train.jsonl").read_bytes().split(b"\n")[:500]
    lines += [json.dumps(row).encode() for row in json.loads((DATA / "math500" / "math500_test.json").read_bytes())]
    (tmp_path / "public.jsonl").write_bytes(b"\n".join(lines))
    problems = load_problems(tmp_path / "public.jsonl", qwen)
    assert len(problems) == 1000
    for problem in problems:
        assert problem.expert_ids == qwen.encode(problem.trace) and len(problem.cuts) < 10
        assert problem.cuts == sorted(set(problem.cuts))
        numbers = set(re.findall(r"\d[\d,]*\.?\d*", problem.question))
        for cut in problem.cuts:
            assert 0 < cut < len(problem.expert_ids)
            anchor = qwen.decode(problem.expert_ids[:cut])
            assert problem.trace.startswith(anchor) and "####" not in anchor and "\\boxed" not in anchor
            # A plain reading of the rule, apart from the code's: numbers that the question does not show either.
            asked = any(number.strip(".,").replace(",", "") == problem.answer for number in numbers)
            if problem.answer.isdigit() and not asked:
                assert not re.search(rf"(?<![\d.,]){problem.answer}(?![\d,]|\.\d)", anchor), (problem.id, anchor)


@needs_data
def test_most_gsm8k_problems_have_an_anchor(qwen):
    """On GSM8K test, 97 of 100 problems have a cut, 2.5 on average, although no anchor states the answer."""
    problems = load_problems(DATA / "gsm8k" / "test.jsonl", qwen)
    num_cuts = [len(problem.cuts) for problem in problems]
    assert len(problems) == 1319 and num_cuts.count(0) < 0.03 * 1319 and 2.4 < sum(num_cuts) / 1319 < 2.6


@needs_data
def test_a_trained_llama_folder_loads(tmp_path):
    """stories260K: a SentencePiece-style tokenizer with byte fallback; stop ids come from two files."""
    tokenizer = Tokenizer.from_pretrained(DATA / "stories260K")
    assert tokenizer.stop_token_ids == (1, 2) and tokenizer.eos_id == 2 and tokenizer.vocab_size == 512
    trace = "Lily had 3 水。She got more.\n\nThen \"yes\". So 7."
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Why?", "trace": trace, "answer": 7}))
    problem, = load_problems(tmp_path / "a.jsonl", tokenizer)
    anchor, = [tokenizer.decode(problem.expert_ids[:cut]) for cut in problem.cuts]
    assert anchor == "Lily had 3 水。She got more.\n\n"
