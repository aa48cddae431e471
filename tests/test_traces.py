"""What traces.py promises: ids, prompts, cuts and errors."""
import functools
import json
import os
import random
import re
import runpy
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers, processors, trainers

import bread
from config import Config
from conftest import ROOT
from cuts import find_cuts, first_statement
from data import Row
from rewards import answers_match, math_reward
from traces import HINT, Tokenizer, make_problem, reach_lines, read_problem

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the public test data is not here")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "<|im_start|>assistant\n")
TRACE = "There are 2 bags.\n\nSo 2*6 = 12 apples."
ASKED = "Two bags hold 6 apples each. How many?"


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
    def write_and_read(files=None, template_args=None, **config):
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        config = {"eos_token": "<|im_end|>", "chat_template": CHATML} | config
        files = {"tokenizer.json": backend_json, "tokenizer_config.json": config} | (files or {})
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (path / name).write_text(text, encoding="utf-8")
        return Tokenizer.from_pretrained(path, template_args)
    return write_and_read


@pytest.fixture
def tokenizer(make):
    return make()


@pytest.fixture
def problem_of(tokenizer):
    """make_problem of a row with this trace; keyword arguments replace its other fields."""
    def make_one(trace=TRACE, tokenizer=tokenizer, system=None, **fields):
        row = {"number": 3, "id": "a", "messages": [{"role": "user", "content": ASKED}], "answer": "12",
               "level": "2"} | fields
        cut = functools.partial(find_cuts, matches=answers_match)
        return make_problem(Row(trace=trace, **row), tokenizer, cut, system)
    return make_one


def prompt(tokenizer, *question, **options):
    """The rendered prompt as text, special tokens shown."""
    return tokenizer.decode(tokenizer.render(*question, **options), skip_special_tokens=False)


def cuts_of(text, answer="zzz", **options):
    """Cuts of a trace with one token per character, so that positions are characters."""
    return find_cuts(text, [(i, i + 1) for i in range(len(text))], answer, answers_match, **options)


def test_missing_or_broken_files_are_named(tmp_path, make):
    """Each file of a tokenizer folder: a ValueError with the file's name."""
    with pytest.raises(ValueError, match="none/tokenizer.json cannot be read.*No such file"):
        Tokenizer.from_pretrained(tmp_path / "none")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        with pytest.raises(ValueError, match=re.escape(f"/{name} cannot be read")):
            make({name: "version https://git-lfs.github.com/spec/v1"})


@pytest.mark.parametrize("words, fields", [
    *[("text is needed", {"eos_token": value}) for value in (5, [], {"a": 1})],
    *[("the chat template is", {"chat_template": value}) for value in (0, [{"name": "default"}])],
    ("none of the templates", {"chat_template": [{"name": [], "template": "x"}]}),
    ("add_bos_token is 'no'", {"add_bos_token": "no"}), ("'nosuch', which", {"eos_token": "nosuch"}),
    *[("ids are integers", {"files": {"config.json": {"eos_token_id": id}}}) for id in (-1, 10**30, True)],
    ("would never end", {"eos_token": None, "chat_template": None,
                         "files": {"config.json": {"eos_token_id": 10**6}}})])
def test_values_of_another_kind_are_named(make, words, fields):
    """In the files of a tokenizer; of ids one that the tokenizer does not know is none."""
    with pytest.raises(ValueError, match=words):
        make(**fields)


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("spoil", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)])
def test_what_is_there_and_no_file_is_not_taken_for_absent(tmp_path, make, name, spoil):
    """A folder, a pipe (which nobody waits for), a link that leads nowhere: else prompts would be others."""
    make()
    (tmp_path / "model" / name).unlink(missing_ok=True)
    spoil(tmp_path / "model" / name)
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_pretrained(tmp_path / "model")


def test_a_prompt_holds_its_question(make):
    """Not the one with which the template was tried. Half a surrogate pair has no UTF-8."""
    with pytest.raises(ValueError, match="drops the question"):
        make(chat_template="{{ '1+1?' }}").render(ASKED)
    with pytest.raises(ValueError, match="no UTF-8"):
        make().render(ASKED, system="\ud800")


def test_stop_ids_are_the_union_of_all_files(make, backend_json):
    """generation_config, config and tokenizer each add an id, a list or null; without any, loading fails."""
    own = Backend.from_str(backend_json).token_to_id("<|im_end|>")
    tokenizer = make({"generation_config.json": {"eos_token_id": [5, 3]}, "config.json": {"eos_token_id": 9}})
    assert tokenizer.stop_token_ids == (3, 5, 9, own) and tokenizer.eos_id == own
    added = {"__type": "AddedToken", "content": "<|im_end|>"}
    tokenizer = make({"generation_config.json": {"eos_token_id": None}, "config.json": {}}, eos_token=added)
    assert tokenizer.stop_token_ids == (own,)
    bare = {"eos_token": None, "chat_template": None}
    assert make({"generation_config.json": {"eos_token_id": [5, 3]}}, **bare).eos_id == 3
    with pytest.raises(ValueError, match="rollouts would never end"):
        make({"generation_config.json": {}}, **bare)
    with pytest.raises(ValueError, match=r"config.json: eos_token_id is \['5'\], ids are integers"):
        make({"config.json": {"eos_token_id": ["5"]}})


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
    cut, = find_cuts(trace, tokenizer.encoding(trace).offsets, "7", answers_match)
    assert tokenizer.decode(tokenizer.encode(trace)[:cut]) == "Lily had 3 水。She got more.\n\n"


SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
WHY = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA_ASKED = LLAMA.format("user") + "Why?<|eot_id|>" + LLAMA.format("assistant")
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
EXPECTED = {
    "qwen2_5": SYSTEM.format("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.") + WHY,
    "qwen3": WHY,
    "smollm2": SYSTEM.format("You are a helpful AI assistant named SmolLM, trained by Hugging Face") + WHY,
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
    ask = "default: {{ messages[-1].content }}"
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": ask}, {"x": 1}, 2]
    assert prompt(make(chat_template=named), "?") == "default: ?"
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
    ("{{ messages.append(1) }}", "SecurityError"), ("{% include '/etc/hostname' %}", "TypeError"),
    ("{{ '' }}", "drops the question"), ([{"name": "default", "template": 5}], "5, text is needed"),
    ("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}", "drops"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes over 5"),
    ("{{ 9**(9**9) }}", "takes over 5 seconds"), ("{{ 'a' * 10**10 }}", "takes over .*, or over 1 GB")])
def test_broken_and_hostile_templates_are_refused(make, template, words):
    """A template that fails or reaches out of the sandbox is a ValueError with the folder and the fault."""
    with pytest.raises(ValueError, match="model: (the )?chat template:? .*" + words):
        make(chat_template=template)


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_data_cannot_forge_turns(make, tokenizer, problem_of, marker):
    """Text that spells a special token, or whatever ends a turn, is refused by its name."""
    for field in ("question", "hint", "system"):
        with pytest.raises(ValueError, match=re.escape(marker)):
            tokenizer.render(**{"question": "a"} | {field: marker})
    with pytest.raises(ValueError, match="the trace spells a special token, .*" + re.escape(marker)):
        problem_of(f"a{marker}b")
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


@needs_data
def test_base_models_stop_where_their_template_ends_a_turn(tmp_path, make, backend_json):
    """A folder whose template writes <|im_end|> while its eos is <|endoftext|>: both end a completion, the
    first one an expert's trace. A template without a special token there, or for questions only: none."""
    base = DATA / "cases" / "base_eos_folder"
    files = {path.name: path.read_text() for path in base.iterdir()} | {"tokenizer.json": backend_json}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    backend = Backend.from_str(backend_json)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_id == backend.token_to_id("<|im_end|>")
    ends = [backend.token_to_id("<|endoftext|>"), tokenizer.eos_id]
    assert set(tokenizer.stop_token_ids) == {0, *ends}
    plain = "<|im_start|>{% for m in messages %}{{ m.content }}\n{% endfor %}<|im_start|>"  # of the next turn
    for refusal in ("", "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}",
                    "{% set messages = messages[:1] %}"):
        tokenizer = make(eos_token="<|endoftext|>", chat_template=refusal + plain)
        assert tokenizer.stop_token_ids == (ends[0],) and tokenizer.eos_id == ends[0]


@needs_data
def test_template_arguments_and_what_a_prompt_says_of_thinking(make):
    """Qwen3's template with and without enable_thinking, as transformers 5.24 renders it."""
    files = {"chat_template.jinja": (DATA / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")}
    tokenizer = make(files)
    assert prompt(tokenizer, "Why?") == WHY
    assert (tokenizer.thinks, tokenizer.opens_thinking, tokenizer.closes_thinking) == (True, False, False)
    tokenizer = make(files, template_args={"enable_thinking": False})
    assert prompt(tokenizer, "Why?") == WHY + "<think>\n\n</think>\n\n"
    assert (tokenizer.thinks, tokenizer.opens_thinking, tokenizer.closes_thinking) == (False, False, True)
    with pytest.raises(ValueError, match="--template-args has 'enable_thinkng', which the template of"):
        make(files, template_args={"enable_thinkng": False})


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "smollm2", "llama3_1", "deepseek_r1_distill"])
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}, {"date_string": "1 Jan 2030"}])
def test_rendering_equals_that_of_transformers(make, tmp_path, name, arguments):
    """The same text for the same arguments."""
    transformers = pytest.importorskip("transformers")
    template = (DATA / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    arguments = {name: value for name, value in arguments.items() if name in template}  # others are refused
    tokenizer = make({"chat_template.jinja": template}, template_args=arguments, bos_token="<|endoftext|>")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "model" / "tokenizer.json"), eos_token="<|im_end|>",
        bos_token="<|endoftext|>", chat_template=template)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    defaults = {"date_string": "26 Jul 2024"} | arguments
    assert tokenizer.render(messages) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **defaults)


@pytest.mark.parametrize("trace, answer, cuts", [
    # blank lines before line ends before sentence ends
    ("a. b\nc\n\nd\n \ne", "-", [8, 12]), ("a\r\n\r\nb\r\n\r\nc", "-", [5, 10]),
    ("a. b\nc\nd", "-", [5, 7]), ("Go. (Why?) No! Well, 3.5 is ok.", "-", [4, 11, 15]),
    ("水。火。木", "-", [2, 4]), ("a b c", "-", []),
    # the next finer one where every coarser lies behind the answer
    ("a. b\nc\n\nso 7", "7", [8]), ("a. b\nso 7\n\nd", "7", [5]), ("a. so 7\n\nd", "7", [3]),
    # and where the coarser end too early: 60% of the way
    ("a\n\nb and c\nd\nend", "-", [3, 11, 13]), ("ab\ncd\n\nend", "-", [7]),
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
    assert cuts_of("a\n" * 50 + "=7\n" + "b\n" * 50, answer="7", max_episodes=5) == [20, 40, 60, 80]


CLAIMS = [  # of "12": each of these words, decoration, words between
    "= 12", "=$12$", "<<6+6>>12", "is 12", "would be **12**", "equals 12.", "gives $\\{12\\}$", "get 12,",
    "-> 12", "it's 12", "so it is just about 12", "gives us 12 apples", "becomes \\(12\\)", "Answer: 12",
    "**12**", "So 12.",
    "leaves exactly 12;", "= 12cm", "= 12€", "= $12/month", "twelve it is", "that is twelve legs", "= 12.00",
    "= \\frac{24}{2}", "= 24/2", "the answer $12$", "is \\[12\\]", "is 12 - good",
    "=12=3\\cdot4", "\\boxed{12}", "#### 11"]
MENTIONS = ["Step 12: add", "12 of them", "is 12 + 1", "= 12 * 3", "is 12.5", "= 1,012", "= 121", "is it 12?",
            "I'd guess 12", "= 12! ways", "= -12", "**12. Add**", "this 12", "= 12\\sqrt{2}", "= 12/5",
            "is 12^2"]
SPELLINGS = [
    (r"\frac{3}{2}", ["3/2", "1.5", r"\dfrac32", r"\tfrac{3}{2}"]),
    (r"\sqrt{2}", ["√2", "sqrt(2)", r"\sqrt2"]), ("1,000", ["1000", r"1{,}000", r"1,\!000"]),
    (r"\left( 3, \frac{\pi}{2} \right)", ["(3, π/2)", "(3, pi/2)", r"(3,\frac{\pi}{2})"]),
    (r"\{1, 2\}", ["{2, 1}", "1, 2"]), ("x^2+1", ["x² + 1", "1 + x^2"]), ("-5", ["-5", "−5"]),
    (r"5 \text{ m}", ["5 m", "5"]), ("x=5", ["5"]), (r"\frac{3\sqrt{13}}{2}", ["3√13/2"]),
    ("A", ["(A)", "A"]), (r"25\%", ["25%", "25"]), (r"864 \mbox{ inches}^2", ["864 inches²", "864"])]


@pytest.mark.parametrize("claim", CLAIMS)
def test_no_anchor_lies_behind_a_claimed_answer(claim):
    """Whatever claims it, and whatever else the question holds."""
    assert cuts_of(f"start\n{claim}\nnext\nend", "12") == [6]


@pytest.mark.parametrize("mention", MENTIONS)
def test_a_mention_ends_nothing(mention):
    """A number that nobody claims to be the answer, a part of another one, a question, a guess."""
    assert len(cuts_of(f"start\n{mention}\nnext\nend", "12")) == 3


@pytest.mark.parametrize("answer, given", [(answer, given) for answer, all in SPELLINGS for given in all])
def test_a_claim_is_recognised_in_any_spelling(answer, given):
    """All that answers_match accepts, and plain notation for LaTeX's; not a word more: "a vowel" is no A."""
    assert cuts_of(f"start\nThis is {given}.\nnext\nend", answer) == [6]
    assert len(cuts_of("start\nThis is a vowel, 7 of 9.\nnext\nend", answer)) == 3


def test_what_the_reward_pays_is_a_statement(tokenizer):
    """3,000 texts that end a sentence in the answer. (Of what is paid and not seen no anchor is left either:
    test_no_anchor_is_paid_by_itself_whatever_the_reward.)"""
    rng = random.Random(0)
    golds = ["5", "B", r"\frac{1}{2}", "1,000", r"\sqrt{2}", "(1,2)", "x^2+1", "-3", "Evelyn", r"5\text{ m}",
             "7:30", r"\{1,2\}", "10%"]
    heads = ["The answer is", "Answer:", "**Answer:**", "ANSWER:", "#### ", "<answer>", "the answer $",
             "answer is:\n"]
    middles = [" ", "$", "\\(", "**", " the ", " about ", "x = ", '"']
    ends = ["", ".", "$", "\\)", "**", " cm", "!", " or so", ", no", "%", " (a)", " because", "</answer>",
            " = 5", "\nnext", ". So"]
    num_paid = 0
    for _ in range(3000):
        gold = rng.choice(golds)
        text = rng.choice(heads) + rng.choice(middles) + gold + rng.choice(ends)
        if math_reward(text, gold):
            num_paid += 1
            assert first_statement(text + "\n\nlast", gold, answers_match) < len(text), (gold, text)
    assert num_paid > 1000


def test_a_problem_from_a_dict_in_memory(tokenizer):
    """Without a file: question, trace and a number for an answer."""
    cut = functools.partial(find_cuts, matches=answers_match)
    row = {"question": ASKED, "trace": TRACE, "answer": 12}
    problem = read_problem(row, tokenizer, cut)
    assert problem.answer == "12" and problem.cuts and tokenizer.decode(problem.expert_ids) == TRACE.strip()
    assert problem.prompt_ids == tokenizer.render(ASKED) and read_problem(row, tokenizer).cuts == []


def test_a_token_beyond_the_embedding_is_named(tokenizer):
    """Not an index error in the first step."""
    row = Row(1, "a", [{"role": "user", "content": ASKED}], "Think.", "7", "")
    shape = SimpleNamespace(max_position_embeddings=999, vocab_size=300)
    with pytest.raises(ValueError, match=r"a token beyond the 300 rows of .*: '<\|im_\w+\|>' is"):
        bread.to_problem(Config(max_new_tokens=9), tokenizer, shape, True, row)


@pytest.mark.parametrize("trace, answer, words", [
    ("So #### 13", "12", "the trace contradicts the answer: '13' for '12'"),
    ("So 12", "proof", "the answer cannot be checked: 'proof'"),
    ("So " * 999, "12", "prompt and trace exceed the model's 999 positions")])
def test_rows_of_no_use_have_a_reason(tokenizer, trace, answer, words):
    """Which `read_data` counts; a user's reward may know what ours cannot check."""
    shape = SimpleNamespace(max_position_embeddings=999, vocab_size=400)
    row = Row(1, "a", [{"role": "user", "content": ASKED}], trace, answer, "")
    with pytest.raises(ValueError, match=words):
        bread.to_problem(Config(max_new_tokens=9), tokenizer, shape, True, row)
    own = Config(max_new_tokens=9, reward="own.py:reward")
    if "positions" not in words:
        assert bread.to_problem(own, tokenizer, shape, True, row).answer == answer


def test_thinking_is_cut_inside_only():
    """Never behind </think>, nor so that an anchor shows "<think>" alone; a name's first mention counts."""
    assert cuts_of("<think>\n\nhm\n\nso\n</think>\n\nwell\n\nthen", "7") == [13]
    assert cuts_of("<think>\n\nhm\n</think>\n\nwell\n\nthen", "7") == [12]
    assert cuts_of("One.\n\nEvelyn ran.\n\nLess.\n\nYes", r"\text{Evelyn}") == [6]


@pytest.mark.parametrize("closed", [
    "$x.\ny$", "$$a\n\nb$$", "\\[ a. b\n\nc \\]", "\\( a.\nb \\)", "\\begin{align*}a\n\nb\n\\end{align*}",
    "[asy]\ndraw. x;\n\ndot;\n[/asy]", "```\na\n\nb\n```", "$3! \\times 5!$ is", "3! x"])
def test_nobody_pauses_inside(closed):
    """Formulas, environments, drawings, code; "3!" ends no sentence."""
    text = f"one. {closed} two. end"
    assert set(cuts_of(text)) <= {5, len(text) - 3}


def test_dollars_of_money_are_no_formula():
    """By Pandoc's rule."""
    assert cuts_of("He has $5. She has $10. All is $15. ok", "15") == [11, 24]


def test_finding_cuts_is_bounded():
    """40,000 claims, 100,000 brackets, dollars or backslashes: well under a minute, not hours."""
    for piece in ("x = 1/2 + y, so ", "\\(", "$a ", "**", "= \\frac{", "(" * 20, "1,"):
        assert cuts_of(piece * (200_000 // len(piece)), r"\frac{1}{3}") == []


@needs_data
def test_published_cases_of_cuts_and_leaks():
    """The cases on which anchors once told the answer, or ended inside a drawing."""
    for name in ("leak_spellings", "gsm8k_equals", "cut_places"):
        for line in (DATA / "cases" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            trace = row.get("trace") or row.get("solution") or row["answer"]
            gold = row["answer"].rpartition("#### ")[2]
            statement = first_statement(trace, gold, answers_match)
            assert statement < len(trace) and "</think>" not in trace[:statement]
            for cut in cuts_of(trace, gold):
                anchor = trace[:cut]
                assert cut <= statement and anchor.strip() != "<think>" and not math_reward(anchor, gold)
                assert anchor.count("[asy]") == anchor.count("[/asy]") and anchor.count("$") % 2 == 0
                assert anchor.count("\\begin") == anchor.count("\\end") and not anchor.endswith("3! ")


@pytest.mark.parametrize("trace", ["  There are 2.\n\nSo\n\n\n6", "水は水です。\n\n答えは\n\n7", "é\n\nü",
                                   "a \\(\n\n\\frac{1}{2}\\)\n\nb", "a. b"])
def test_anchor_is_a_prefix_of_the_traces_own_ids(problem_of, tokenizer, trace):
    """expert_ids is the trace tokenised once and whole, with merged newlines, multi-byte text and LaTeX."""
    problem = problem_of(trace, answer="zzz")
    assert problem.expert_ids == tokenizer.encode(trace.strip()) and problem.cuts
    assert tokenizer.decode(problem.expert_ids) == problem.trace == trace.strip()
    for cut in problem.cuts:
        anchor = tokenizer.decode(problem.expert_ids[:cut])
        assert problem.trace.startswith(anchor) and "�" not in anchor


@pytest.mark.parametrize("white", ["\n", " ", "", "\n\n", " \r\n"])
def test_a_leading_think_is_written_once(problem_of, make, white):
    """Where the prompt has it, or an empty thought, the trace does not; white space around it is free."""
    thought = f"<think>{white}hm\n</think>\n\n12"
    opened = make(chat_template=CHATML + "{{ '<think>\\n' }}")
    assert problem_of(thought, opened).trace == "hm\n</think>\n\n12"
    assert problem_of(thought).trace == thought
    closed = make(chat_template=CHATML + "{{ '<think>\\n\\n</think>\\n\\n' }}")
    assert problem_of(f"<think>{white}</think>\n\nSo 12", closed).trace == "So 12"
    assert problem_of(thought, closed).trace == thought


def test_a_trace_fits_the_stop_ids(problem_of, make):
    """End-of-turn tokens go from its end; a stop id inside, even of plain text, is refused."""
    assert problem_of(TRACE + "<|im_end|>\n<|endoftext|> ").trace == TRACE
    full_stop, = make().encode(".")
    with pytest.raises(ValueError, match="holds a stop token"):
        problem_of("a . b", make({"config.json": {"eos_token_id": full_stop}}))


def test_problem_holds_the_rendered_question(problem_of, tokenizer):
    """prompt_ids is render() of the messages; a system text makes the question a list; no trace, no cuts."""
    asked = {"role": "user", "content": ASKED}
    first = problem_of(system="Think.")
    assert (first.id, first.number, first.level, first.answer, first.trace) == ("a", 3, "2", "12", TRACE)
    assert [tokenizer.decode(first.expert_ids[:cut]) for cut in first.cuts] == ["There are 2 bags.\n\n"]
    assert first.prompt_ids == tokenizer.render(ASKED, system="Think.")
    second = problem_of("", messages=[{"role": "system", "content": "Be brief."}, asked], system="Think.")
    assert second.prompt_ids == tokenizer.render(second.question)
    assert second.prompt_ids == tokenizer.render(ASKED, system="Be brief.")
    assert problem_of().question == ASKED and (second.expert_ids, second.cuts) == ([], [])


MALFORMED = [
    [], [5], [{"role": "user"}], [{"role": "user", "content": 5}], [{"role": "tool", "content": ""}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user<|im_end|>", "content": "a"}, {"role": "user", "content": "b"}]]


@pytest.mark.parametrize("messages", MALFORMED)
def test_malformed_messages_are_refused(tokenizer, messages):
    """A user of the class hands them in as they are."""
    with pytest.raises(ValueError, match="ends with the user's message"):
        tokenizer.render(messages)


def test_what_a_reader_is_told_of_traces(problem_of, make):
    """Lengths, cuts in reach and the value that reaches all; a warning if most are out of reach, if there is
    none, or if trace and template do not agree about thinking."""
    problem = problem_of("Two.\n\nThen.\n\nMore.\n\nSo 12.")
    tokenizer = make()
    size = len(problem.expert_ids)
    line, = reach_lines([problem], tokenizer, size)
    assert "3.0 cuts each, 0 without" in line and "3 of 3 cuts are in reach" in line
    line, warning = reach_lines([problem], tokenizer, problem.cuts[0] + 1)
    reach = f"1 of 3 cuts are in reach of --max-new-tokens {problem.cuts[0] + 1}"
    assert line.endswith(f"{reach}; --max-new-tokens {size} has room for all")
    assert warning.startswith(f"\n!!! WARNING: {reach}; ")
    assert "no trace has a place" in reach_lines([problem_of("12")], tokenizer, 9)[1]
    thinking = problem_of("<think>\nOne.\n\nTwo.\n</think>\n\n12")
    assert "warning: 1 of 1 traces think" in reach_lines([thinking], tokenizer, 99)[1]
    opened = make(chat_template=CHATML + "{{ '<think>\\n' }}")
    assert "1 of 1 traces do not" in reach_lines([problem], opened, 99)[1]
    assert len(reach_lines([thinking], opened, 99)) == 1


@needs_data
@pytest.mark.parametrize("path", [
    "gsm8k/test.jsonl", "math500/math500_test.json",
    pytest.param("gsm8k/train.jsonl", marks=pytest.mark.slow)])
def test_anchors_of_public_traces(path):
    """In all notations, raw and as thinking: docs/ANCHORS.md is what bench/anchors.py measures; no anchor
    claims the answer or is paid, and they reach beyond 60% in the median."""
    rows_of = runpy.run_path(f"{ROOT / 'bench' / 'anchors.py'}")["rows_of"]
    document = (ROOT / "docs" / "ANCHORS.md").read_text(encoding="utf-8").splitlines()
    for row in rows_of(DATA / path):
        assert f"| {' | '.join(map(str, row))} |" in document
        num_claims, num_paid, reach, allowed = row[6:]
        assert num_claims == num_paid == 0
        assert int(reach.rstrip("%")) > 60 and int(allowed.split("%")[0]) > 60
