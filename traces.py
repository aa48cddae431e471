"""Expert traces: from text to token ids, and the places where an anchor may end.

    question   | expert trace                             | eos (SFT only)
    prompt_ids | episode 1 | episode 2 | .. | last episode
                           ^           ^    ^               cuts; an anchor is expert_ids[:cut]

A data file is JSON lines; `ALIASES` lists the names of its fields, ours first. `question`: text, or messages
that end with the user's. `trace`: the expert's text. `answer`: text or a number; if absent, what follows the
trace's last "####", else its last \\boxed{}. Optional: `id`, `system`. Raw GSM8K lines work as they are: the
trace is then the whole `answer`, its "#### 72" included so that a reward can verify it.

Our choices: (1) A trace is tokenised once and whole, and a cut is an index into those ids: an anchor is a
prefix of the trace's own tokenisation. (2) No anchor states the answer, see `find_cuts`. (3) Data cannot
forge turns: text that spells a special token such as <|im_end|> is refused; at a trace's end it is stripped.
Left out: SentencePiece-only folders; template variables such as enable_thinking (`_prompt_text` would take
them); limits on templates (sandboxed, but a loop may spin). The caller verifies the answers.
"""
import datetime
import functools
import json
import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import jinja2.sandbox
import tokenizers

ALIASES = {
    "question": ("question", "problem", "prompt", "query"),
    "trace": ("trace", "solution", "response", "completion", "target", "rationale", "traces"),  # or a list
    "answer": ("answer", "final_answer", "ground_truth", "gold"),
}
NO_DEFAULT = "{{ raise_exception('none of the templates is named default') }}"
HINT = "\n\nHint: the solution may begin like this:\n"
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)  # pinned: Llama-3.2's prompts hold today's


class Tokenizer:
    """Text to token ids and back, with the chat template and the stop ids of one Hugging Face folder.

    `stop_token_ids`: every id that ends a completion, sorted. `eos_id`: the one that ends an expert trace in
    SFT (eos_token, else the smallest). `opens_thinking`: prompts end in "<think>". `special_texts`: see (3).
    """

    @classmethod
    def from_pretrained(cls, path):
        """Read a folder. ValueError names a missing or broken file, or says that no file names an eos."""
        return cls(Path(path))

    def __init__(self, folder):
        self._folder = folder
        self._backend = _read(folder / "tokenizer.json", tokenizers.Tokenizer.from_buffer)
        self._backend.no_truncation()  # the file may carry these settings, and would cut or pad in silence
        self._backend.no_padding()
        config = _read(folder / "tokenizer_config.json", json.loads, absent={})
        names = ("bos_token", "eos_token", "pad_token", "unk_token")  # each an AddedToken, or its text
        self._names = {name: token["content"] if isinstance(token, dict) else token
                       for name in names if (token := config.get(name))}
        bos = self._backend.token_to_id(self._names.get("bos_token", ""))
        eos = self._backend.token_to_id(self._names.get("eos_token", ""))
        stops = {eos}
        # All three files, since one errs: Llama-3-8B-Instruct's lacked the <|eot_id|> that the model writes.
        for name in ("generation_config.json", "config.json"):
            entry = _read(folder / name, json.loads, absent={}).get("eos_token_id")
            stops |= set(entry) if isinstance(entry, list) else {entry}
        self.stop_token_ids = tuple(sorted(stops - {None}))
        if not self.stop_token_ids:
            raise ValueError(f"{folder}: rollouts would never end; set eos_token in tokenizer_config.json, "
                             "or eos_token_id in generation_config.json or config.json")
        self.eos_id = self.stop_token_ids[0] if eos is None else eos
        # Where the config is silent (Llama-3), what tokenizer.json itself puts in front of a text decides.
        starts_with_bos = self._backend.encode("", add_special_tokens=True).ids[:1] == [bos]
        self._bos = [bos] if bos is not None and config.get("add_bos_token", starts_with_bos) else []
        added = self._backend.get_added_tokens_decoder()
        special = [token for i, token in added.items() if token.special or i in self.stop_token_ids]
        self.special_texts = sorted(token.content for token in special)
        template = config.get("chat_template") or ""
        if isinstance(template, list):  # [{"name": .., "template": ..}, ..]
            template = {entry["name"]: entry["template"] for entry in template}.get("default", NO_DEFAULT)
        self._template = _read(folder / "chat_template.jinja", bytes.decode, absent=template)
        # A first render shows a broken template at once, and whether a prompt already opens the thinking.
        self.opens_thinking = self._prompt_text(_as_messages("1+1?")).endswith("<think>\n")

    def encode(self, text):
        """Token ids of plain text: "<|im_end|>" is ten characters like any others, never the special id."""
        return self.encoding(text).ids

    def encoding(self, text, markup=False):
        """`.ids` of a text, and their (start, end) as `.offsets`. `markup`: special tokens are recognised."""
        self._backend.encode_special_tokens = not markup  # True reads "encode them as plain text"
        return self._backend.encode(text, add_special_tokens=False)  # templates write their own bos

    def decode(self, ids, skip_special_tokens=True):
        """Text of token ids."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def render(self, question, hint=None, system=None):
        """Prompt ids of a question, up to where the model's turn begins.

        `question`: text, or a list of {"role", "content"} that ends with the user's. `hint`: the start of a
        solution, shown below the question. `system`: a system message, if the list has none. Without a chat
        template: bos (if the tokenizer uses it), system text, blank line, question, newline.
        Raises ValueError for malformed messages, text that spells a special token, a template that fails.
        """
        messages = _as_messages(question, system)
        if hint:
            messages[-1]["content"] += HINT + hint
        for message in messages:
            self.refuse_special(message["content"], "the prompt")
        text = self._prompt_text(messages)
        return self.encoding(text, markup=True).ids if self._template else self._bos + self.encode(text)

    def refuse_special(self, text, what):
        """ValueError, which calls the text `what`, if it spells one of the special tokens."""
        for token in self.special_texts:
            if token in text:
                raise ValueError(f"{what} spells the special token {token!r}, which forges turns: remove it")

    def _prompt_text(self, messages):
        if not self._template:
            return "\n\n".join(message["content"] for message in messages) + "\n"
        try:
            return _compile_template(self._template).render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None,
                date_string=TEMPLATE_DATE.strftime("%d %b %Y"), **self._names)
        except Exception as error:  # a template is a program and may raise anything
            raise ValueError(f"{self._folder}: chat template: {error!r}") from error


def _read(file, parse, absent=None):
    try:
        return parse(file.read_bytes()) if absent is None or file.is_file() else absent  # optional files only
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} cannot be read: {error}") from error


@functools.lru_cache
def _compile_template(source):
    """A chat template, compiled as transformers does: in a sandbox, with its options, filters and globals."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(  # TinyLlama's template needs the trimming
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # Jinja's is for HTML
    environment.globals.update(raise_exception=raise_exception, strftime_now=TEMPLATE_DATE.strftime)
    # {% generation %} .. {% endgeneration %} marks text for SFT masks: here a block without an effect.
    return environment.from_string(re.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", source))


def _as_messages(question, system=None):
    """A fresh, checked list of messages; a question in plain text is one user message."""
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    is_valid = isinstance(messages, list) and len(messages) > 0 and all(
        isinstance(m, dict) and m.get("role") in ("system", "user", "assistant")
        and isinstance(m.get("content"), str) for m in messages)
    if not is_valid or messages[-1]["role"] != "user":
        raise ValueError("a question is text, or a list of {'role': 'system', 'user' or 'assistant', "
                         "'content': text} that ends with the user's message")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return [{"role": message["role"], "content": message["content"]} for message in messages]


# Where episodes may end, the coarsest first: blank lines, line ends, sentence ends.
_SEPARATORS = [re.compile(text) for text in (r"\n(?:[ \t\r]*\n)+", r"\n", r"[.!?][\"')\]]*\s+|[。！？]")]
# 1,000 and LaTeX's 1{,}000 and 1,\!000 are one number each: neither 1 nor 000 is stated in them.
_NUMBER = re.compile(r"[0-9]+(?:(?:,(?:\\!)?|\{,\})[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+")
_GOLD_NUMBER = re.compile(rf"[\s$\\+−-]{{0,9}}({_NUMBER.pattern})[\s\\%]{{0,9}}")
_CLAIM = re.compile(r"(?:=|>>|\bis)[\s$\\*:(−-]{0,20}\Z")


def find_cuts(trace, offsets, answer, question, max_episodes=10):
    """Token positions where an anchor of this trace may end: increasing, never 0, never the whole trace.

    `offsets`: (start, end) of every token of the trace, in characters. Episodes end at blank lines; if none
    is usable, at line ends; else at sentence ends; inside a token, at the nearest token end before. Usable
    are ends that leave an episode over and precede the first statement of the answer: the first \\boxed or
    ####, or the answer as a whole number or word (72 is in 72.00, not in 172, 72.5 or 7,200), which must be
    behind "=", ">>" or "is" if the question holds the answer too. Of more than max_episodes - 1 ends, those
    nearest to equal shares of the tokens before the statement stay.

    Two tokens a line; 12 is first stated on the third, so an anchor is one line (2 tokens) or two (4 tokens):
    >>> trace, offsets = "3*2 =6\\n6*2 =\\n12. So\\n", [(0, 3), (3, 7), (7, 10), (10, 13), (13, 15), (15, 20)]
    >>> find_cuts(trace, offsets, answer="12", question="3*2*2?")
    [2, 4]
    """
    ends = [end for _, end in offsets]  # the byte tokens of one character all carry its end: none is split
    statement = _first_statement(trace, answer, question)
    limit = min(statement, len(trace.rstrip()) - 1)  # behind it, some text is left to the student
    for separator in _SEPARATORS:
        places = [match.end() for match in separator.finditer(trace) if match.end() <= limit]
        cuts = sorted({bisect_right(ends, place) for place in places} - {0, len(ends)})
        if cuts:
            break
    if len(cuts) < max_episodes:
        return cuts
    shares = [bisect_right(ends, statement) * k / max_episodes for k in range(1, max_episodes)]
    return sorted({min(cuts, key=lambda cut: abs(cut - share)) for share in shares})


def _first_statement(trace, answer, question):
    """Character position where the answer is first stated (see `find_cuts`); len(trace) if it never is."""
    starts = _occurrences(answer, trace)
    if _occurrences(answer, question):  # \Z in _CLAIM is `start`, where the search ends
        starts = [start for start in starts if _CLAIM.search(trace, max(0, start - 30), start)]
    starts += [match.start() for match in re.finditer(r"\\boxed|####", trace)]
    return min(starts, default=len(trace))


def _occurrences(answer, text):
    """Where a text holds the answer: a number is found by its value, anything else letter by letter."""
    gold = _GOLD_NUMBER.fullmatch(answer)
    if gold is None:
        words = r"\s*".join(re.escape(word) for word in answer.split())
        return [match.start() for match in re.finditer(rf"(?<!\w){words}(?!\w)", text)]
    value = float(re.sub("[^0-9.]", "", gold[1]))
    return [m.start() for m in _NUMBER.finditer(text) if float(re.sub("[^0-9.]", "", m[0])) == value]


@dataclass(frozen=True)
class Problem:
    """One question, an expert's trace of its solution, and the answer that verifies it."""
    id: str
    prompt_ids: list[int]       # the rendered question
    expert_ids: list[int]       # the whole trace, no eos inside
    cuts: list[int]             # where in expert_ids an anchor may end, increasing; may be empty
    answer: str
    question: str | list[dict]  # messages, if it has a system message or several turns; for display and hints
    trace: str


def load_problems(path, tokenizer, max_episodes=10, max_tokens=None, system=None, log=None):
    """Read a JSONL file (fields: top of this file) into a list of `Problem`s in file order.

    `max_tokens`: rows whose prompt + trace are longer are skipped and counted, never cut. `system`: for rows
    without one. `log`: called with a summary. ValueError names a bad line, or says that no row is left.
    """
    problems = []
    for number, line in enumerate(_read(Path(path), bytes).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            if line.strip():
                problems.append(_read_problem(line, number, tokenizer, max_episodes, system))
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{path}, line {number}: {reason}") from error
    fitting = [problem for problem in problems
               if max_tokens is None or len(problem.prompt_ids) + len(problem.expert_ids) <= max_tokens]
    num_long = len(problems) - len(fitting)
    summary = f"{path}: {len(fitting)} problems, {num_long} longer than {max_tokens} tokens skipped"
    if not fitting:
        raise ValueError(f"{summary}; one JSON object per line, short enough, is needed")
    name, count = Counter(problem.id for problem in fitting).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path}: the id {name!r} occurs {count} times; give every row its own, or none")
    if log:
        counts = Counter(str(problem.question) for problem in fitting).values()
        num_cuts = [len(problem.cuts) for problem in fitting]
        log(f"{summary}; {sum(count > 1 for count in counts)} questions occur more than once; "
            f"{sum(num_cuts) / len(fitting):.1f} cuts each, {num_cuts.count(0)} without a cut")
    return fitting


def _read_problem(line, number, tokenizer, max_episodes, system):
    row = json.loads(line.decode("utf-8"))
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}; one object per line is needed")
    json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no character: ValueError
    trace_field, trace = _field(row, "trace")
    answer_field, answer = _field(row, "answer")
    if trace is None and isinstance(answer, str) and "####" in answer:
        trace = re.sub(r"<<[^<>\n]*>>", "", answer)  # GSM8K, with marks such as <<48/2=24>>
    trace = _text(trace_field, trace[0] if isinstance(trace, list) and trace else trace).strip()
    while endings := [token for token in tokenizer.special_texts if trace.endswith(token)]:
        trace = trace.removesuffix(endings[0]).rstrip()
    if tokenizer.opens_thinking:
        trace = trace.removeprefix("<think>\n")
    tokenizer.refuse_special(trace, f"field {trace_field!r}")
    if answer is None:
        answer = trace if "####" in trace else _last_boxed(trace)
    elif type(answer) in (int, float):
        answer = str(int(answer) if answer % 1 == 0 else answer)  # 72.0 is 72
    answer = _text(answer_field, answer).rpartition("####")[2].strip()
    if answer.lower() in ("", "nan", "inf", "-inf"):
        raise ValueError(f"field {answer_field!r} is {answer!r}; text or a finite number is needed")
    question_field, question = _field(row, "question")
    question = question if isinstance(question, list) else _text(question_field, question)
    messages = _as_messages(question, _text("system", row["system"]) if row.get("system") else system)
    asked = "\n".join(message["content"] for message in messages)
    encoding = tokenizer.encoding(trace)
    if not encoding.ids or not set(encoding.ids).isdisjoint(tokenizer.stop_token_ids):
        raise ValueError(f"field {trace_field!r} is empty, or holds a stop token")
    cuts = find_cuts(trace, encoding.offsets, answer, asked, max_episodes)
    name = str(number if row.get("id") is None else row["id"])
    question = messages if len(messages) > 1 else asked
    return Problem(name, tokenizer.render(messages), encoding.ids, cuts, answer, question, trace)


def _field(row, name):
    """(the alias under which a row has a field, its value); (our name, None) if it has none."""
    found = [alias for alias in ALIASES[name] if row.get(alias) is not None]
    return (found[0], row[found[0]]) if found else (name, None)


def _text(field, value):
    if not isinstance(value, str) or not value.strip():
        names = " or ".join(ALIASES.get(field, (field,)))
        raise ValueError(f"field {field!r} is {value!r:.40}; text is needed, under the name {names}")
    return value


def _last_boxed(text):
    """What the last \\boxed{..} holds, up to its own closing brace; None if there is none."""
    _, box, rest = text.rpartition("\\boxed{")
    depths = accumulate((char == "{") - (char == "}") for char in rest)
    ends = [end for end, depth in enumerate(depths) if depth < 0]
    return rest[:ends[0]] if box and ends else None
