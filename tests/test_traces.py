"""What traces.py promises: ids, prompts, cuts and errors."""
import json
import re

import pytest
from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers, processors, trainers

from conftest import ROOT
from traces import ALIASES, HINT, Tokenizer, find_cuts, load_problems

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the public test data is not here")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "<|im_start|>assistant\n")
TRACE = "There are 2 bags.\n\nSo 2*6 = 12 apples."
ROW = {"question": "Two bags hold 6 apples each. How many?", "trace": TRACE, "answer": "12"}


@pytest.fixture(scope="session")
def backend_json():
    """The text of a tokenizer.json: byte-level BPE of a few hundred tokens, with Qwen's chat markers."""
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
def make(tmp_path, backend_json):
    """Writes a tokenizer folder and reads it; keyword arguments are fields of tokenizer_config.json."""
    def write_and_read(files=None, **config):
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        config = {"eos_token": "<|im_end|>", "chat_template": CHATML} | config
        files = {"tokenizer.json": backend_json, "tokenizer_config.json": config} | (files or {})
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (path / name).write_text(text, encoding="utf-8")
        return Tokenizer.from_pretrained(path)
    return write_and_read


@pytest.fixture
def tokenizer(make):
    return make()


@pytest.fixture
def load(tmp_path, tokenizer):
    """Writes lines (objects, text or bytes) to a file and loads it."""
    def write_and_load(*lines, newline=b"\n", tokenizer=tokenizer, **options):
        texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
        encoded = [text.encode() if isinstance(text, str) else text for text in texts]
        (tmp_path / "data.jsonl").write_bytes(newline.join(encoded))
        return load_problems(tmp_path / "data.jsonl", tokenizer, **options)
    return write_and_load


def prompt(tokenizer, *question, **options):
    """The rendered prompt as text, special tokens shown."""
    return tokenizer.decode(tokenizer.render(*question, **options), skip_special_tokens=False)


def cuts_of(text, answer="zzz", question="", **options):
    """Cuts of a trace with one token per character, so that positions are characters."""
    return find_cuts(text, [(i, i + 1) for i in range(len(text))], answer, question, **options)


def test_missing_or_broken_files_are_named(tmp_path, make, tokenizer):
    """Each file of a tokenizer folder, and the data: a ValueError with the file's name."""
    with pytest.raises(ValueError, match="none/tokenizer.json cannot be read.*No such file"):
        Tokenizer.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="none.jsonl cannot be read.*No such file"):
        load_problems(tmp_path / "none.jsonl", tokenizer)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        with pytest.raises(ValueError, match=re.escape(f"/{name} cannot be read")):
            make({name: "version https://git-lfs.github.com/spec/v1"})


def test_stop_ids_are_the_union_of_all_files(make, backend_json):
    """generation_config, config and tokenizer each add an id, a list or null; without any, loading fails."""
    own = Backend.from_str(backend_json).token_to_id("<|im_end|>")
    tokenizer = make({"generation_config.json": {"eos_token_id": [5, 3]}, "config.json": {"eos_token_id": 9}})
    assert tokenizer.stop_token_ids == (3, 5, 9, own) and tokenizer.eos_id == own
    added = {"__type": "AddedToken", "content": "<|im_end|>"}
    tokenizer = make({"generation_config.json": {"eos_token_id": None}, "config.json": {}}, eos_token=added)
    assert tokenizer.stop_token_ids == (own,)
    assert make({"generation_config.json": {"eos_token_id": [5, 3]}}, eos_token=None).eos_id == 3
    with pytest.raises(ValueError, match="rollouts would never end"):
        make({"generation_config.json": {}}, eos_token=None)


def test_encode_gives_the_whole_text_as_plain_tokens(make, backend_json):
    """No special id, whatever the text spells, and none cut or padded, though the file was saved to do so."""
    backend = Backend.from_str(backend_json)
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = make({"tokenizer.json": backend.to_str()})
    text = "a<|im_end|>b<|im_start|>c<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text  # decode skips special ids: there is none
    assert len(tokenizer.encode("<think>")) == 1  # an added token that is not special
    assert tokenizer.decode(tokenizer.render("a")) == "user\na\nassistant"  # the template's markers are


@needs_data
@pytest.mark.parametrize("name, stops", [
    ("tokenizers/qwen2.5", (151645,)), ("tokenizers/qwen3", (151645,)), ("stories260K", (1, 2))])
def test_published_tokenizers_end_turns_keep_text_plain_and_cut_between_tokens(name, stops):
    """Qwen's, and a llama's in SentencePiece style with byte fallback, whose stop ids come from two files."""
    tokenizer = Tokenizer.from_pretrained(DATA / name)
    assert tokenizer.stop_token_ids == stops and tokenizer.eos_id == stops[-1]
    text = "x".join(["", *tokenizer.special_texts, ""])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    trace = "Lily had 3 水。She got more.\n\nThen \"yes\". So 7."
    cut, = find_cuts(trace, tokenizer.encoding(trace).offsets, "7", "Why?")
    assert tokenizer.decode(tokenizer.encode(trace)[:cut]) == "Lily had 3 水。She got more.\n\n"


SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
ASKED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA_ASKED = LLAMA.format("user") + "Why?<|eot_id|>" + LLAMA.format("assistant")
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
EXPECTED = {
    "qwen2_5": SYSTEM.format("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.") + ASKED,
    "qwen3": ASKED,
    "smollm2": SYSTEM.format("You are a helpful AI assistant named SmolLM, trained by Hugging Face") + ASKED,
    "tinyllama": "<|user|>\nWhy?</s>\n<|assistant|>\n",
    "llama3": "<s>" + LLAMA_ASKED,
    "llama3_1": "<s>" + LLAMA.format("system") + LLAMA_DATES + LLAMA_ASKED,
    "llama3_2": "<s>" + LLAMA.format("system") + LLAMA_DATES + LLAMA_ASKED,
    "deepseek_r1_distill": "<s><｜User｜>Why?<｜Assistant｜><think>\n"}


@needs_data
def test_published_templates_render_exactly(make, backend_json):
    """Every published template gives the expected prompt: no stray newline, no second bos, a pinned date."""
    backend = Backend.from_str(backend_json)
    backend.add_special_tokens(["<s>", "</s>"])
    for name, expected in EXPECTED.items():
        template = (DATA / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
        files = {"tokenizer.json": backend.to_str(), "chat_template.jinja": template}
        tokenizer = make(files, bos_token="<s>", eos_token="</s>", add_bos_token=True)
        assert prompt(tokenizer, "Why?") == expected
        assert "Be brief." in prompt(tokenizer, "Why?", system="Be brief.")


def test_templates_are_found_and_understood_as_by_transformers(make):
    """A list's "default", chat_template.jinja; filters, loop controls, generation tags, a pinned date."""
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "default"}]
    assert prompt(make(chat_template=named), "?") == "default"
    with pytest.raises(ValueError, match="none of the templates is named default"):
        make(chat_template=named[:1])
    template = ("  {% if true %}{% endif %}{% for m in messages %}{% generation %}{{ m.content | tojson }}"
                "{%- endgeneration -%} {% break %}{% endfor %}"
                "{{ strftime_now('%Y') }} {{ date_string }} {{ eos_token }} {{ bos_token }}")
    tokenizer = make({"chat_template.jinja": template}, chat_template=named)
    assert prompt(tokenizer, "<é>'&") == "\"<é>'&\"2024 26 Jul 2024 <|im_end|> "


@pytest.mark.parametrize("template, words", [
    ("a\n{% for %}", "TemplateSyntaxError"), ("{{ messages[0].a.b }}", "UndefinedError"),
    ("{{ raise_exception('only system') }}", "TemplateError.'only system'"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"), ("{% include '/etc/hostname' %}", "TypeError")])
def test_broken_and_hostile_templates_are_refused(make, template, words):
    """A template that fails or reaches out of the sandbox is a ValueError with the folder and the fault."""
    with pytest.raises(ValueError, match="model: chat template: " + words):
        make(chat_template=template)


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_data_cannot_forge_turns(make, tokenizer, load, marker):
    """Text that spells a special token, or whatever ends a turn, is refused by its name."""
    for field in ("question", "hint", "system"):
        with pytest.raises(ValueError, match=re.escape(marker)):
            tokenizer.render(**{"question": "a"} | {field: marker})
    with pytest.raises(ValueError, match="line 1.*'trace'.*" + re.escape(marker)):
        load(ROW | {"trace": f"a{marker}b"})
    with pytest.raises(ValueError, match="<think>"):
        make(eos_token="<think>").render("a<think>b")


def test_without_template_the_prompt_is_plain(make, backend_json):
    """System text, blank line, question, newline; in front bos, if the config or tokenizer.json says so."""
    plain = {"chat_template": None, "bos_token": "<|endoftext|>"}
    assert prompt(make(**plain), "Why?", system="Be brief.") == "Be brief.\n\nWhy?\n"
    assert prompt(make(**plain, add_bos_token=True), "Why?") == "<|endoftext|>Why?\n"
    backend = Backend.from_str(backend_json)
    bos = ("<|endoftext|>", backend.token_to_id("<|endoftext|>"))
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[bos])
    tokenizer = make({"tokenizer.json": backend.to_str()}, **plain)
    assert tokenizer.render("Why?") == [bos[1], *tokenizer.encode("Why?\n")]


def test_hint_stands_below_the_question(tokenizer):
    """A hint ends the user's message, in text and in messages; an empty one changes nothing."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    shown = prompt(tokenizer, messages, hint="There are")
    assert f"Why?{HINT}There are<|im_end|>" in shown and shown.startswith(SYSTEM.format("Be brief."))
    assert messages[-1]["content"] == "Why?"
    assert tokenizer.render("Why?", hint="") == tokenizer.render("Why?")
    assert tokenizer.render("Why?", system="Be brief.") == tokenizer.render(messages, system="Be long.")


@pytest.mark.parametrize("trace, answer, cuts", [
    # blank lines before line ends before sentence ends
    ("a. b\nc\n\nd\n \ne", "-", [8, 12]), ("a\r\n\r\nb\r\n\r\nc", "-", [5, 10]),
    ("a. b\nc\nd", "-", [5, 7]), ("Go. (Why?) No! 3.5 is ok.", "-", [4, 11, 15]),
    ("水。火。木", "-", [2, 4]), ("a b c", "-", []),
    # the next finer one where every coarser lies behind the answer
    ("a. b\nc\n\nthe 7", "7", [8]), ("a. b\nthe 7\n\nd", "7", [5]), ("a. the 7\n\nd", "7", [3]),
    # never 0 and never the whole trace, also where separators end it
    ("a\n\nb\n\nc", "-", [3, 6]), ("a\n\nb\n\n", "-", [3]), ("a\n\n", "-", []), ("", "-", [])])
def test_the_coarsest_usable_separator_wins(trace, answer, cuts):
    """K episodes give K - 1 cuts: the last one is never offered."""
    assert cuts_of(trace, answer) == cuts


def test_cuts_fall_on_token_ends():
    """Inside a token back to its start; cuts that meet are one; behind all byte tokens of a character."""
    tokens = [(0, 2), (2, 5), (5, 7), (7, 11), (11, 14)]
    assert find_cuts("a.\n\nb\n\nc\n\nd\n\ne", tokens, "zzz", "") == [1, 3, 4]
    byte_tokens = [(0, 1), (0, 1), (0, 1), (1, 2), (2, 3), (2, 3), (2, 3), (3, 4)]
    assert find_cuts("水。火b", byte_tokens, "zzz", "") == [4]


def test_many_episodes_merge_to_nearly_equal_lengths():
    """At most max_episodes - 1 cuts stay, spread evenly over the tokens, not over the boundaries."""
    lines = "".join(f"{'ab'[i % 2]}\n" for i in range(100))
    assert cuts_of(lines, max_episodes=10) == list(range(20, 200, 20))
    assert cuts_of(lines, max_episodes=2) == [100] and cuts_of(lines, max_episodes=1) == []
    uneven = "a\n" * 10 + "b" * 38 + "\n" + "c" * 40 + "\nd"  # ten short lines, then two of 39 and 41 tokens
    assert cuts_of(uneven, max_episodes=4) == [20, 59] and len(cuts_of(uneven, max_episodes=20)) == 12
    assert cuts_of("a\n" * 50 + "7\n" + "b\n" * 50, answer="7", max_episodes=5) == [20, 40, 60, 80]


STATED = [
    ("the 72 is", "72"), ("72.", "72"), ("$72,", "72"), ("72.00", "72"), ("x=72cm", "72"), ("1,000", "1000"),
    ("1000", "1,000"), ("1{,}000", "1000"), (r"1,\!000", "1000"), ("0.6", ".6"), ("-6", "-6"), ("10-6", "-6"),
    ("$18", "$18.00"), ("25%", r"25\%"), (r"\frac{3}{4}", r"\frac{3}{4}"), ("so (3, 4)", "(3,  4)"),
    ("Evelyn", "Evelyn"), ("yes, 9" + "9" * 400, "9" * 400), (r"\boxed{\frac12}", "1/2"), ("#### 11", "12"),
    ("3+2 = 5", "5"), ("3+2=$5", "5"), ("<<3+2>>5", "5"), ("that is 5", "5"), ("it is **5**", "5"),
    (r"it is $\$5$", "5")]
NOT_STATED = [
    ("172", "72"), ("72.5", "72"), ("7,200", "200"), ("7,200", "72"), ("720", "72"), ("1,000", "1"),
    ("0.6", "6"), ("Evelyns", "Evelyn"), ("we have 5", "5"), ("5+3", "5"), ("this 5", "5"), ("= 5.5", "5")]


@pytest.mark.parametrize("line, answer, is_stated", [
    *((*case, True) for case in STATED), *((*case, False) for case in NOT_STATED)])
def test_an_anchor_ends_before_the_first_statement_of_the_answer(line, answer, is_stated):
    """It is recognised as a whole; where the question holds the number, only behind "=", ">>" or "is"."""
    cuts = cuts_of(f"start\n{line}\nnext\nend", answer, question="Of 5.0 bags?")
    assert cuts == ([6] if is_stated else [6, 7 + len(line), 12 + len(line)])


@pytest.mark.parametrize("trace", ["  There are 2.\n\nSo\n\n\n6", "水は水です。\n\n答えは\n\n7", "é\n\nü",
                                   "a \\(\n\n\\frac{1}{2}\\)\n\nb", "a. b"])
def test_anchor_is_a_prefix_of_the_traces_own_ids(load, tokenizer, trace):
    """expert_ids is the trace tokenised once and whole, with merged newlines, multi-byte text and LaTeX."""
    problem, = load({"question": "Why?", "trace": trace, "answer": "none"})
    assert problem.expert_ids == tokenizer.encode(trace.strip()) and problem.cuts
    assert tokenizer.decode(problem.expert_ids) == problem.trace == trace.strip()
    for cut in problem.cuts:
        anchor = tokenizer.decode(problem.expert_ids[:cut])
        assert problem.trace.startswith(anchor) and "�" not in anchor


def test_a_trace_fits_the_prompt_and_the_stop_ids(load, make):
    """A leading "<think>\\n" goes if the prompt ends with it; a stop id, even of plain text, is refused."""
    thought = ROW | {"trace": "<think>\nhm\n</think>\n\n12"}
    opened = make(chat_template=CHATML + "{{ '<think>\\n' }}")
    assert load(thought, tokenizer=opened)[0].trace == "hm\n</think>\n\n12"
    assert load(thought)[0].trace == thought["trace"]
    full_stop, = make().encode(".")
    with pytest.raises(ValueError, match="line 1: .*holds a stop token"):
        load(ROW | {"trace": "a ."}, tokenizer=make({"config.json": {"eos_token_id": full_stop}}))


def test_problem_holds_the_rendered_question(load, tokenizer):
    """prompt_ids is render() of the question; ids default to line numbers; a system text makes it a list."""
    rows = ROW, ROW | {"id": "b", "system": "Be brief."}, ROW | {"id": 7}
    first, second, third = load(*rows, system="Think.")
    assert (first.id, second.id, third.id) == ("1", "b", "7")
    assert [tokenizer.decode(first.expert_ids[:cut]) for cut in first.cuts] == ["There are 2 bags.\n\n"]
    assert first.prompt_ids == tokenizer.render(ROW["question"], system="Think.")
    assert second.prompt_ids == tokenizer.render(ROW["question"], system="Be brief.")
    assert second.prompt_ids == tokenizer.render(second.question)


@pytest.mark.parametrize("fields, trace, answer", [
    # Answers keep their spelling, but for white space, a "####" head, and floats without a fraction.
    ({"answer": 72}, TRACE, "72"), ({"answer": 72.0}, TRACE, "72"), ({"answer": 0.5}, TRACE, "0.5"),
    ({"answer": "72.0"}, TRACE, "72.0"), ({"answer": -1e21}, TRACE, "-1" + "0" * 21),
    ({"answer": "so\n####  7 "}, TRACE, "7"), ({"answer": " 7 "}, TRACE, "7"),
    # Without one, it is what the trace's "####" or last box holds, braces balanced.
    ({"answer": None, "trace": "so\n#### 1,200"}, "so\n#### 1,200", "1,200"),
    ({"answer": None, "trace": r"\boxed{3} \boxed{\sqrt{2}}."}, r"\boxed{3} \boxed{\sqrt{2}}.", r"\sqrt{2}"),
    # Raw GSM8K: the answer's text is the trace, "####" line kept, calculator marks gone.
    ({"trace": None, "answer": "48/2 = <<48/2=24>>24.\n#### 24"}, "48/2 = 24.\n#### 24", "24"),
    # Every alias works, ours wins, null is absent, a list's first is taken, end-of-turn tokens are stripped.
    *(({name: None, alias: ROW[name]}, TRACE, "12") for name in ALIASES for alias in ALIASES[name]),
    ({"solution": "unused"}, TRACE, "12"), ({"trace": None, "traces": [TRACE, "other"]}, TRACE, "12"),
    ({"trace": TRACE + "<|im_end|>\n<|endoftext|> "}, TRACE, "12")])
def test_trace_and_answer_are_read_from_what_a_row_holds(load, fields, trace, answer):
    """Whatever the spelling and form."""
    problem, = load(ROW | fields)
    assert (problem.question, problem.trace, problem.answer) == (ROW["question"], trace, answer)


def test_file_forms_that_are_fine(load):
    """A byte order mark, CRLF, blank lines, no final newline or one, U+2028, a lone CR between fields."""
    row = json.dumps(ROW | {"question": "one\u2028two"}, ensure_ascii=False).replace('", "', '",\r "')
    problems = load(b"\xef\xbb\xbf" + row.encode(), "", "  ", ROW, "", newline=b"\r\n")
    assert [problem.id for problem in problems] == ["1", "4"] and problems[0].question == "one\u2028two"


MALFORMED = [
    [], [5], [{"role": "user"}], [{"role": "user", "content": 5}], [{"role": "tool", "content": ""}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user<|im_end|>", "content": "a"}, {"role": "user", "content": "b"}]]


@pytest.mark.parametrize("line, words", [
    ("{", "not JSON"), ("[1]", "a JSON list"), (b'{"question": "\xff"}', "utf-8"),
    ("[" * 100_000, "recursion"), ('{"question": ' + "9" * 5000 + "}", "4300"),
    (ROW | {"question": None}, "'question' is None; text is needed, under the name question or problem"),
    (ROW | {"trace": None}, "field 'trace' is None"), (ROW | {"answer": None}, "field 'answer' is None"),
    (ROW | {"answer": None, "trace": r"\boxed{1"}, "field 'answer' is None"),
    (ROW | {"question": 5}, "field 'question' is 5"), (ROW | {"trace": " "}, "field 'trace' is ' '"),
    (ROW | {"trace": "<|im_end|>"}, "field 'trace' is empty"), (ROW | {"trace": []}, "field 'trace' is"),
    (ROW | {"trace": None, "solution": [5]}, "field 'solution'"), (ROW | {"system": 5}, "'system' is 5"),
    (ROW | {"answer": float("nan")}, "'answer' is 'nan'"), (ROW | {"answer": 1e999}, "'answer' is 'inf'"),
    (ROW | {"answer": "####"}, "field 'answer' is ''"), (ROW | {"answer": True}, "field 'answer' is True"),
    (ROW | {"answer": {"a": 1}}, "field 'answer'"), (ROW | {"system": "<|im_end|>"}, "special token"),
    (ROW | {"trace": "a\ud800"}, "ud800.* surrogates not allowed"),
    (ROW | {"question": [{"role": "user", "content": "\udfff"}]}, "udfff.* surrogates not allowed"),
    *((ROW | {"question": messages}, "ends with the user's message") for messages in MALFORMED)])
def test_bad_line_is_named_with_number_and_field(load, line, words):
    """The first bad line stops with file, line number (blank lines counted) and field."""
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: (?s:.)*" + words):
        load(ROW, "", line, ROW)


def test_long_rows_and_repeated_questions_are_counted_and_repeated_ids_stop(load):
    """A row longer than max_tokens, prompt and trace together, is left out, never cut; one must be left."""
    log = []
    whole, = load(ROW)
    size = len(whole.prompt_ids) + len(whole.expert_ids)
    assert load(ROW, ROW | {"trace": TRACE + " And so on."}, max_tokens=size, log=log.append) == [whole]
    assert len(load(ROW, ROW, log=log.append)) == 2
    assert "1 longer than" in log[0] and "1 questions occur more than once" in log[1]
    for lines, limit in (([], None), ([""], None), ([ROW], size - 1)):
        with pytest.raises(ValueError, match="0 problems"):
            load(*lines, max_tokens=limit)
    with pytest.raises(ValueError, match="id '2' occurs 2 times"):  # runs key their records by it
        load(ROW | {"id": 2}, ROW)


@needs_data
def test_anchors_of_public_traces(tmp_path):
    """GSM8K's test set and MATH-500: they state no answer; 97 of 100 GSM8K problems have some."""
    qwen = Tokenizer.from_pretrained(DATA / "tokenizers" / "qwen2.5")
    rows = json.loads((DATA / "math500" / "math500_test.json").read_bytes())
    (tmp_path / "math.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    gsm8k = load_problems(DATA / "gsm8k" / "test.jsonl", qwen)
    num_cuts = [len(problem.cuts) for problem in gsm8k]
    assert len(gsm8k) == 1319 and num_cuts.count(0) < 0.03 * 1319 and 2.4 < sum(num_cuts) / 1319 < 2.6
    for problem in gsm8k + load_problems(tmp_path / "math.jsonl", qwen):
        assert problem.cuts == sorted(set(problem.cuts)) and len(problem.cuts) < 10
        numbers = re.findall(r"\d[\d,]*\.?\d*", problem.question)
        asked = {number.strip(".,").replace(",", "") for number in numbers}
        for cut in problem.cuts:
            anchor = qwen.decode(problem.expert_ids[:cut])
            assert problem.trace.startswith(anchor) and not re.search(r"####|\\boxed", anchor)
            # A plain reading of the rule, apart from the code's: numbers that the question does not show.
            if problem.answer.isdigit() and problem.answer not in asked:
                assert not re.search(rf"(?<![\d.,]){problem.answer}(?![\d,]|\.\d)", anchor), problem.id
