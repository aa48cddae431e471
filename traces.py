"""Expert traces: from text to token ids, and the places where an anchor may end.

    question   | expert trace                             | eos (SFT only)
    prompt_ids | episode 1 | episode 2 | .. | last episode
                           ^           ^    ^               cuts; an anchor is expert_ids[:cut]

A data file is JSON lines; `ALIASES` lists the names of its fields, ours first. `question`: text, or chat
messages that end with the user's. `trace`: the expert's text. `answer`: text or a number; if absent, what follows
the trace's last "####", else its last \\boxed{}. Optional: `id`, `system`. Raw GSM8K lines work as they are: the
trace is then the whole `answer`, its "#### 72" included so that a reward can verify it.

Our choices: (1) A trace is tokenised once and whole, and a cut is an index into those ids: an anchor is a prefix
of the trace's own tokenisation. (2) No anchor states the answer, see `find_cuts`. (3) Data cannot forge turns: text
that spells a special token such as <|im_end|> is refused; at the very end of a trace it is stripped.

Left out: SentencePiece-only folders; template variables (tools, enable_thinking: `_prompt_text` would take them);
a time limit on templates (sandboxed and capped in size, but a loop may spin). The caller verifies the answers.
"""
import datetime
import functools
import json
import re
import traceback
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jinja2.sandbox
import tokenizers

ALIASES = {
    "question": ("question", "problem", "prompt", "query"),
    "trace": ("trace", "solution", "response", "completion", "target", "rationale", "traces"),  # traces: the first
    "answer": ("answer", "final_answer", "ground_truth", "gold"),
}
HINT = "\n\nHint: the solution may begin like this:\n"
MAX_PROMPT_CHARS = 1_000_000
# Llama-3.2's template prints today's date; a pinned one gives the same prompt, hence the same run, every day.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)


@functools.lru_cache
def _compile_template(source):
    """Compile a chat template as transformers does: in a sandbox, with the same options, filters and globals."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # TinyLlama's template needs the trimming. Jinja's own tojson would escape for HTML.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options)
    environment.globals.update(raise_exception=raise_exception, strftime_now=TEMPLATE_DATE.strftime)
    # {% generation %} .. {% endgeneration %} marks text for SFT masks: here a block that always holds.
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
    return environment.from_string(re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source))


class Tokenizer:
    """Text to token ids and back, with the chat template and the stop ids of one Hugging Face folder.

    `stop_token_ids`: sorted tuple of every id that ends a completion. `eos_id`: the one that ends an expert trace
    in SFT (the tokenizer's eos_token, else the smallest). `vocab_size`: number of tokens, added ones included.
    """

    @classmethod
    def from_pretrained(cls, path):
        """Read a folder's tokenizer.json and, if there, its configs and its chat_template.jinja, which overrides.

        Raises ValueError naming the file that is missing or broken, or if no file names an end-of-sequence token.
        """
        return cls(Path(path))

    def __init__(self, folder):
        self._backend = backend = _read(folder / "tokenizer.json", tokenizers.Tokenizer.from_buffer)
        backend.no_truncation()  # tokenizer.json may carry these settings, and would cut or pad in silence
        backend.no_padding()
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        config, generation_config, model_config = (
            _read(folder / name, json.loads) if (folder / name).is_file() else {}
            for name in ("tokenizer_config.json", "generation_config.json", "config.json"))
        names = ("bos_token", "eos_token", "pad_token", "unk_token")  # each an AddedToken, or its text
        self._names = {name: token["content"] if isinstance(token, dict) else token
                       for name in names if (token := config.get(name))}
        bos, eos = (backend.token_to_id(self._names.get(name, "")) for name in ("bos_token", "eos_token"))
        # All three, since one errs: Llama-3-8B-Instruct's config lacked the <|eot_id|> that the model writes.
        named = [eos, generation_config.get("eos_token_id"), model_config.get("eos_token_id")]
        named = {id for entry in named for id in (entry if isinstance(entry, list) else [entry])}
        self.stop_token_ids = tuple(sorted(named - {None}))
        if not self.stop_token_ids:
            raise ValueError(f"{folder}: rollouts would never end; set eos_token in tokenizer_config.json, or "
                             "eos_token_id in generation_config.json or config.json")
        self.eos_id = self.stop_token_ids[0] if eos is None else eos
        # Where the config is silent (Llama-3), what tokenizer.json itself puts in front of a text decides.
        starts_with_bos = backend.encode("", add_special_tokens=True).ids[:1] == [bos]
        self._bos = [bos] if bos is not None and config.get("add_bos_token", starts_with_bos) else []
        self._markers = sorted(token.content for id, token in backend.get_added_tokens_decoder().items()
                               if token.special or id in self.stop_token_ids)
        self._template, self._template_file = config.get("chat_template"), folder / "tokenizer_config.json"
        if isinstance(self._template, list):
            self._template = {entry["name"]: entry["template"] for entry in self._template}.get(
                "default", "{{ raise_exception('none of the templates is named default') }}")
        if (folder / "chat_template.jinja").is_file():
            self._template_file = folder / "chat_template.jinja"
            self._template = _read(self._template_file, bytes.decode)
        # A first render shows a broken template at once, and whether a prompt already opens the thinking.
        self.opens_thinking = self._prompt_text(_as_messages("1+1?")).endswith("<think>\n")

    def encode(self, text):
        """Token ids of plain text: "<|im_end|>" is ten characters like any others, never the special id."""
        return self._encoding(text).ids

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
        messages[-1]["content"] += HINT + hint if hint else ""
        for message in messages:
            self._refuse_markers(message["content"], "the prompt")
        if not self._template:
            return self._bos + self.encode(self._prompt_text(messages))
        return self._encoding(self._prompt_text(messages), markup=True).ids

    def _encoding(self, text, markup=False):
        self._backend.encode_special_tokens = not markup  # True reads "encode them as plain text"
        return self._backend.encode(text, add_special_tokens=False)  # templates write their own bos

    def _prompt_text(self, messages):
        if not self._template:
            return "\n\n".join(message["content"] for message in messages) + "\n"
        text = ""
        try:
            for piece in _compile_template(self._template).generate(
                    messages=messages, add_generation_prompt=True, tools=None, documents=None,
                    date_string=TEMPLATE_DATE.strftime("%d %b %Y"), **self._names):
                text += piece
                if len(text) > MAX_PROMPT_CHARS:
                    raise OverflowError(f"the prompt is longer than {MAX_PROMPT_CHARS} characters")
        except Exception as error:  # a template is a program; Jinja makes tracebacks show its own lines
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
            line = getattr(error, "lineno", lines[-1] if lines else "unknown")
            raise ValueError(f"chat template in {self._template_file}, line {line}: {error!r}") from error
        return text

    def _refuse_markers(self, text, what):
        for marker in self._markers:
            if marker in text:
                raise ValueError(f"{what} spells the special token {marker!r}, which could forge a turn; remove it")


def _read(file, parse):
    try:
        return parse(file.read_bytes())
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} cannot be read: {error}") from error


def _as_messages(question, system=None):
    """A fresh, checked list of messages; a question in plain text is one user message."""
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if not (isinstance(messages, list) and all(
            isinstance(m, dict) and m.get("role") in ("system", "user", "assistant")
            and isinstance(m.get("content"), str) for m in messages) and messages and messages[-1]["role"] == "user"):
        raise ValueError("a question is text, or a list of {'role': 'system', 'user' or 'assistant', "
                         "'content': text} that ends with the user's message")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return [{"role": message["role"], "content": message["content"]} for message in messages]


# Blank lines, line ends, sentence ends.
_SEPARATORS = [re.compile(r"\n(?:[ \t\r]*\n)+"), re.compile(r"\n"), re.compile(r"[.!?][\"')\]]*\s+|[。！？]")]
# 1,000 and LaTeX's 1{,}000 and 1,\!000 are one number each: neither 1 nor 000 is stated in them.
_NUMBER = re.compile(r"[0-9]+(?:(?:,(?:\\!)?|\{,\})[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+")
_GOLD_NUMBER = re.compile(rf"[\s$\\+−-]{{0,9}}({_NUMBER.pattern})[\s\\%]{{0,9}}")
_CLAIM = re.compile(r"(?:=|>>|\bis)[\s$\\*:(−-]{0,20}\Z")


def find_cuts(trace, offsets, answer, question, max_episodes=10):
    """Token positions where an anchor of this trace may end: increasing, never 0, never the whole trace.

    `offsets`: (start, end) of every token of the trace, in characters. Episodes end at blank lines; if none of
    those is usable, at line ends; else at sentence ends; inside a token, at the nearest token end before. Usable
    are ends that leave an episode over and precede the first statement of the answer: the first \\boxed or ####,
    or the answer as a whole number or word (72 is in 72.00, not in 172, 72.5 or 7,200), which must stand behind
    "=", ">>" or "is" if the question holds the answer too. Of more than max_episodes - 1 ends, those nearest to
    equal shares of the tokens before the statement stay.

    Two tokens a line; 12 is first stated on the third, so an anchor is one line (2 tokens) or two (4 tokens):

    >>> trace, offsets = "3*2 =6\\n6*2 =\\n12. So\\n", [(0, 3), (3, 7), (7, 10), (10, 13), (13, 15), (15, 20)]
    >>> find_cuts(trace, offsets, answer="12", question="3*2*2?")
    [2, 4]
    >>> find_cuts(trace, offsets, answer="12", question="3*2*2?", max_episodes=2)
    [2]
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
    gold = _GOLD_NUMBER.fullmatch(answer)
    gold = gold and float(re.sub("[^0-9.]", "", gold[1]))
    words = r"\s*".join(re.escape(word) for word in answer.split())

    def occurrences(text):  # a number is found by its value, anything else letter by letter
        if gold is None:
            return [match.start() for match in re.finditer(rf"(?<!\w){words}(?!\w)", text)]
        return [match.start() for match in _NUMBER.finditer(text)
                if float(re.sub("[^0-9.]", "", match[0])) == gold]

    starts = occurrences(trace)
    if occurrences(question):  # the search ends at `start`, so \Z in _CLAIM means "right in front of it"
        starts = [start for start in starts if _CLAIM.search(trace, max(0, start - 30), start)]
    return min(starts + [match.start() for match in re.finditer(r"\\boxed|####", trace)], default=len(trace))


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


def load_problems(path, tokenizer, max_episodes=10, max_tokens=None, skip_bad_lines=False, system=None, log=None):
    """Read a JSONL file (fields: top of this file) into a list of `Problem`s in file order.

    `max_tokens`: rows whose prompt + trace are longer are skipped and counted, never cut. `system`: the system
    message of rows without one. `log`: called with one line of text per skipped line, warning and summary.
    Raises ValueError naming file, line and field of a bad line (skip_bad_lines: skips it), or if no row is left.
    """
    log, problems, num_bad = log or (lambda text: None), [], 0
    lines = _read(Path(path), lambda data: data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                problems.append(_read_problem(line, number, tokenizer, max_episodes, system))
        except (ValueError, RecursionError) as error:
            reason = f"not JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
            if not skip_bad_lines:
                raise ValueError(f"{path}, line {number}: {reason}") from error
            log(f"{path}, line {number}, skipped: {reason}")
            num_bad += 1
    fitting = [problem for problem in problems
               if max_tokens is None or len(problem.prompt_ids) + len(problem.expert_ids) <= max_tokens]
    summary = (f"{path}: {len(fitting)} problems, {num_bad} bad lines skipped, "
               f"{len(problems) - len(fitting)} longer than {max_tokens} tokens skipped")
    if not fitting:
        raise ValueError(f"{summary}; one JSON object per line, short enough, is needed")
    id, count = Counter(problem.id for problem in fitting).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path}: the id {id!r} occurs {count} times; give every row its own, or none")
    if repeated := sum(count > 1 for count in Counter(str(problem.question) for problem in fitting).values()):
        log(f"warning: {path}: {repeated} questions occur more than once")
    num_cuts = [len(problem.cuts) for problem in fitting]
    log(f"{summary}; {sum(num_cuts) / len(fitting):.1f} cuts each, {num_cuts.count(0)} problems without a cut")
    return fitting


def _read_problem(line, number, tokenizer, max_episodes, system):
    row = json.loads(line.decode("utf-8"))
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}; one object per line is needed")
    for field, value in row.items():
        if re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
            raise ValueError(f"field {field!r} holds a lone surrogate (\\ud800 to \\udfff): no character")
    question_field, trace_field, answer_field = (
        next((name for name in names if row.get(name) is not None), names[0]) for names in ALIASES.values())
    question, trace, answer = row.get(question_field), row.get(trace_field), row.get(answer_field)
    if trace is None and isinstance(answer, str) and "####" in answer:  # GSM8K, with marks such as <<48/2=24>>
        trace = re.sub(r"<<[^<>\n]*>>", "", answer)
    trace = _text(trace_field, trace[0] if isinstance(trace, list) and trace else trace).strip()
    while marker := next(filter(trace.endswith, tokenizer._markers), None):
        trace = trace.removesuffix(marker).rstrip()
    if tokenizer.opens_thinking:
        trace = trace.removeprefix("<think>\n")
    tokenizer._refuse_markers(trace, f"field {trace_field!r}")
    if answer is None:
        answer = trace if "####" in trace else _last_boxed(trace)
    elif type(answer) in (int, float):
        answer = str(int(answer) if answer % 1 == 0 else answer)  # 72.0 is 72
    answer = _text(answer_field, answer).rpartition("####")[2].strip()
    if answer.lower() in ("", "nan", "inf", "-inf"):
        raise ValueError(f"field {answer_field!r} is {answer!r}; text or a finite number is needed")
    system = _text("system", row["system"]) if row.get("system") else system
    messages = _as_messages(question if isinstance(question, list) else _text(question_field, question), system)
    asked = "\n".join(message["content"] for message in messages)
    encoding = tokenizer._encoding(trace)
    if not encoding.ids or not {*encoding.ids}.isdisjoint(tokenizer.stop_token_ids):
        raise ValueError(f"field {trace_field!r} is empty, or holds a stop token")
    cuts = find_cuts(trace, encoding.offsets, answer, asked, max_episodes)
    id = str(number if row.get("id") is None else row["id"])
    question = messages if len(messages) > 1 else asked
    return Problem(id, tokenizer.render(messages), encoding.ids, cuts, answer, question, trace)


def _text(field, value):
    if not isinstance(value, str) or not value.strip():
        names = " or ".join(ALIASES.get(field, (field,)))
        raise ValueError(f"field {field!r} is {value!r:.40}; text is needed, under the name {names}")
    return value


def _last_boxed(text):
    """What the last \\boxed{..} holds, up to its own closing brace; None if there is none."""
    start, depth = text.rfind("\\boxed{") + 7, 0
    for end in range(start, len(text) if start > 6 else 0):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth < 0:
            return text[start:end]
