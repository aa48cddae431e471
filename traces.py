"""Expert traces: from text to token ids, and the places where an anchor may end.

    question   | expert trace                             | eos (SFT only)
    prompt_ids | episode 1 | episode 2 | .. | last episode
                           ^           ^    ^               cuts; an anchor is expert_ids[:cut]

Our choices: (1) A trace is tokenised once and whole, and a cut is an index into those ids: an anchor is a
prefix of the trace's own tokenisation. (2) No anchor states the answer, see `find_cuts`. (3) Data cannot
forge turns: text that spells a special token such as <|im_end|> is refused; at a trace's end it is stripped.
Left out: SentencePiece-only folders; limits on templates (sandboxed, but a loop may spin).
"""
import datetime
import functools
import itertools
import json
import math
import re
import statistics
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path

import jinja2.sandbox
import tokenizers

NO_DEFAULT = "{{ raise_exception('none of the templates is named default') }}"
HINT = "\n\nHint: the solution may begin like this:\n"
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)  # pinned: Llama-3.2's prompts hold today's


class Tokenizer:
    """Text to token ids and back, with the chat template and the stop ids of one Hugging Face folder.

    `stop_token_ids`: every id that ends a completion, sorted. `eos_id`: the one that ends an expert trace in
    SFT (what the template puts behind an assistant's message, else eos_token, else the smallest).
    `opens_thinking`: prompts end in "<think>"; `closes_thinking`: in an empty thought, "<think></think>".
    `thinks`: the model is meant to write a thought, by the template's word. `special_texts`: see (3).
    """

    @classmethod
    def from_pretrained(cls, path, template_args=None):
        """Read a folder; template_args: variables of its chat template, {"enable_thinking": False}.
        ValueError names a missing or broken file, or says that no file names an eos."""
        return cls(Path(path), template_args or {})

    def __init__(self, folder, template_args):
        self._folder = folder
        self._template_args = template_args
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
        # Where the config is silent (Llama-3), what tokenizer.json itself puts in front of a text decides.
        starts_with_bos = self._backend.encode("", add_special_tokens=True).ids[:1] == [bos]
        self._bos = [bos] if bos is not None and config.get("add_bos_token", starts_with_bos) else []
        template = config.get("chat_template") or ""
        if isinstance(template, list):  # [{"name": .., "template": ..}, ..]
            template = {entry["name"]: entry["template"] for entry in template}.get("default", NO_DEFAULT)
        self._template = _read(folder / "chat_template.jinja", bytes.decode, absent=template)
        added = self._backend.get_added_tokens_decoder()
        turn_end = self._turn_end({token.content: i for i, token in added.items() if token.special})
        self.stop_token_ids = tuple(sorted((stops | {turn_end}) - {None}))
        if not self.stop_token_ids:
            raise ValueError(f"{folder}: rollouts would never end; set eos_token in tokenizer_config.json, "
                             "or eos_token_id in generation_config.json or config.json")
        ends = [id for id in (turn_end, eos, self.stop_token_ids[0]) if id is not None]
        self.eos_id = ends[0]
        special = [token for i, token in added.items() if token.special or i in self.stop_token_ids]
        self.special_texts = sorted(token.content for token in special)
        # A first render shows a broken template at once, and what a prompt says about thinking.
        prompt = self._prompt_text(_as_messages("1+1?"))
        self.opens_thinking = bool(re.search(r"<think>\s*\Z", prompt))
        self.closes_thinking = bool(re.search(r"</think>\s*\Z", prompt))
        self.thinks = self.opens_thinking or (
            "enable_thinking" in self._template and not self.closes_thinking)

    def _turn_end(self, special):
        """The id of the special token, one of {text: id}, that the template puts behind an assistant's
        message, or None. Base models have templates, too, whose turns do not end in their eos_token."""
        messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "Two"}]
        try:
            text = self._prompt_text(messages, add_generation_prompt=False) if self._template else ""
        except ValueError:  # takes no assistant's message
            return None
        behind = text.rpartition("Two")[2].lstrip()
        found = [token for token in special if token and behind.startswith(token)]
        return special[max(found, key=len)] if found else None

    @property
    def stop_texts(self):
        """The stop ids as a reader knows them: "<|im_end|> (151645)"."""
        return [f"{self.decode([id], skip_special_tokens=False)} ({id})" for id in self.stop_token_ids]

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
                raise ValueError(f"{what} spells a special token, which forges turns: {token!r}")

    def _prompt_text(self, messages, add_generation_prompt=True):
        if not self._template:
            return "\n\n".join(message["content"] for message in messages) + "\n"
        try:
            return _compile_template(self._template).render({
                "messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None,
                "documents": None, "date_string": TEMPLATE_DATE.strftime("%d %b %Y"), **self._names,
                **self._template_args})
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


# ---------------------------------------------------------------- where an anchor may end

# The coarsest first: blank lines, line ends, sentence ends. "3! x" ends no sentence.
_SEPARATORS = [re.compile(text) for text in (
    r"\n[ \t\r]*\n\s*", r"\n\s*", r"(?:[.?][\"')\]]*\s+|![\"')\]]*\s+(?=[A-Z])|[。！？])")]
# Nobody pauses inside: code, drawings, environments, formulas. A "$" is a formula's by Pandoc's rule, which
# leaves "$5 and $6" alone: no blank behind the first, none before the second, and no digit behind it.
_CLOSED = re.compile(
    r"```.*?(?:```|\Z)|\[asy\].*?(?:\[/asy\]|\Z)|\\begin\{(\w+\*?)\}.*?(?:\\end\{\1\}|\Z)|\$\$.{1,2000}?\$\$"
    r"|\\\[.{1,2000}?\\\]|\\\(.{1,400}?\\\)"
    r"|(?<!\\)\$(?=\S)(?:[^$\n\\]|\\.|\n(?!\n)){1,400}?(?<=\S)\$(?![0-9])", re.S)


def find_cuts(trace, offsets, answer, matches, max_episodes=10):
    r"""Token positions where an anchor of this trace may end: increasing, never 0, never the whole trace.

    `offsets`: (start, end) of every token of the trace, in characters. `matches(given, answer)`: whether two
    answers are the same. Episodes end at blank lines; where these reach less than 60% of the way, at line
    ends, too, and then at sentence ends; never inside a formula, drawing or code; inside a token, at the
    nearest token end before. Usable are ends that show more than "<think>", leave an episode over and precede
    `first_statement`. Of more than max_episodes - 1 ends, those nearest to equal shares of the tokens before
    the statement stay.

    Two tokens a line; 12 is first stated on the third, so an anchor is one line (2 tokens) or two (4 tokens):
    >>> trace, offsets = "3*2 =6\n6*2 =\n12. So\n", [(0, 3), (3, 7), (7, 10), (10, 13), (13, 15), (15, 20)]
    >>> find_cuts(trace, offsets, "12", matches=str.__eq__)
    [2, 4]
    """
    ends = [end for _, end in offsets]  # the byte tokens of one character all carry its end: none is split
    statement = first_statement(trace, answer, matches)
    limit = min(statement, len(trace.rstrip()) - 1)  # behind it, some text is left to the student
    opening = re.match(r"\s*(?:<think>)?\s*", trace).end()
    closed = [match.span() for match in _CLOSED.finditer(trace)]
    starts = [start for start, _ in closed]
    cuts = set()
    for separator in _SEPARATORS:
        for place in (match.end() for match in separator.finditer(trace)):
            before = bisect_left(starts, place) - 1  # the last closed span that begins before the place
            if opening < place <= limit and (before < 0 or closed[before][1] <= place):
                cuts.add(bisect_right(ends, place))
        cuts -= {0, len(ends)}
        if cuts and ends[max(cuts) - 1] >= 0.6 * limit:
            break
    if len(cuts) < max_episodes:
        return sorted(cuts)
    shares = [bisect_right(ends, statement) * k / max_episodes for k in range(1, max_episodes)]
    return sorted({min(sorted(cuts), key=lambda cut: abs(cut - share)) for share in shares})


# What is said to be a value: it stands behind one of these, "about" and the like and decoration apart, ...
_CLAIM = re.compile(
    r"(?:=|≈|>>|→|⇒|->|=>|\\(?:to|approx|R?rightarrow|implies|equiv)(?![a-zA-Z])|['’]s\b|\b(?:is|are|was|were"
    r"|be|been|being|becomes?|equals?|gives?|giving|gave|gets?|getting|got|makes?|making|yields?|yielding"
    r"|leaves|leaving|finds?|found|returns?|total of|[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore)\b"
    r"|\b(?:[Aa]nswer|[Rr]esult|[Tt]otal|[Ss]olution)(?:\W{0,4}:|(?=\s*(?:\$|\\[(\[]))))"
    r"(?:,?\s+(?:to|about|around|exactly|precisely|just|simply|only|indeed|then|thus|therefore|still|actually"
    r"|now|also|us|me|you|equal to|a total of|the number|the answer|it is|it['’]s|we get)\b){0,3}"
    r"[\s$\\*_:({\[~€£]{0,20}(?<!\\)|\*\*(?=[^*\n]{1,80}\*\*)")
_AGREED = re.compile(r"(?<![\w.,/-])(-?[\w$./\\{}]{1,40}) (?:it is|is (?:the|our|my|correct|right))\b")
# ... up to one of these, if the expression does not go on and is no question.
_VALUE_END = re.compile(
    r"(?=[\s=≈;!?)\]}$*|<\"'’”%°€£]|\.(?![0-9])|[,:](?![0-9]|\\!)|/(?=[a-zA-Z])|\^\{?\\circ"
    r"|(?<=[0-9])(?:[a-zA-Z]{2}|[gmLhs]\b)|\\(?:text|mathrm|q?quad|mbox|right|(?![a-zA-Z{])))|\Z")
_GOES_ON = re.compile(
    r"[ \t]*(?:[+×·÷^_<>≤≥]|\*(?!\*)|/(?![a-zA-Z])|[-−–](?!-|\s+[a-zA-Z]{2})|!\s*[-+*/×=)$\\a-z]|\(\w"
    r"|\\(?:times|cdot|div|[dt]?frac|sqrt|pi|[lg]eq?|pm)(?![a-z]))|[$*\s)]{0,3}\?")
# 1,000 and LaTeX's 1{,}000 and 1,\!000 are one number each.
_NUMBER = r"[0-9]+(?:(?:,(?:\\!)?|\{,\})[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+"
_QUANTITY = re.compile(rf"([+-]?)({_NUMBER})(?:/({_NUMBER}))?")
_WORDS = dict(zip("two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
                  "sixteen seventeen eighteen nineteen twenty".split(), range(2, 21)))
_POWERS = str.maketrans("²³", "23")
_PLAIN = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\(?:text[a-z]*|mathrm|mathbf|mbox|operatorname|left|right|cdot|times|circ)(?![a-z])", ""),
    (r"\\\\|\\[!,;: ]", ""), (r"√", "sqrt"), (r"π", "pi"), (r"∞", "infty"), (r"[−–]", "-"),
    (r"\^?²", "^2"), (r"\^?³", "^3"), (r"\\sqrt\s*\{([^{}]*)\}", r"sqrt\1"),
    (r"\\[dtc]?frac\s*(\{[^{}]*\}|[0-9])\s*(\{[^{}]*\}|[0-9a-z])", r"\1/\2"), (r"[\s$\\(){}\[\]*×·°%]", ""))]


def first_statement(trace, answer, matches):
    """Character position in a trace behind which the answer is known; len(trace) if it never is.

    That is the first box, "####" or "</think>", or the first value that is claimed ("= 5", "is about 1/2",
    "gives **5**", "twelve it is") and is the answer: by `matches(value, answer)`, by its number, or written
    in plain signs ("sqrt(2)/2"). "Step 5" claims nothing, nor does "is it 5?"; but a word, such as a name,
    is never mentioned by chance. Linear in the trace.
    """
    ends = re.finditer(r"\\f?box|####|</think>|<answer>", trace)
    word = re.fullmatch(r"\W*(?:text[a-z]*\W*)?([^\W\d_]{3,}(?: [^\W\d_]+)*)\W*", answer)
    if word:
        ends = itertools.chain(ends, re.finditer(rf"\b{word[1]}\b", trace, re.I))
    end = min((match.start() for match in ends), default=len(trace))
    is_answer = recogniser(answer, matches)
    width = min(400, 3 * len(answer) + 60)
    most = 5 + 2 * len(_VALUE_END.findall(answer))  # ends of a value that are tried
    agreed = (match.start() for match in _AGREED.finditer(trace, 0, end) if is_answer(match[1]))
    first = min(agreed, default=end)
    for claim in _CLAIM.finditer(trace, 0, first):
        begin = claim.end()
        window = trace[begin:min(begin + width, end)].partition("\n\n")[0]
        for match in itertools.islice(_VALUE_END.finditer(window), most):
            given = window[:match.start()].rstrip()
            rest = window[match.start():]
            is_whole = rest.startswith("**") if claim[0] == "**" else not _GOES_ON.match(rest)
            if is_whole and given and given[-1] not in "+-*/×·^" and is_answer(given):
                return begin
    return first


def recogniser(answer, matches):
    """A function from text to whether it is the answer (see `first_statement`), cheap where it is not."""
    gold = _plain(answer)
    value = _quantity(gold)
    # Without its unit, too, whose power has a digit.
    digits = [_digits(answer), _digits(re.split(r"\\(?:text|mbox|mathrm)", answer)[0])]

    @functools.cache
    def is_answer(text):
        if value is None and _digits(text) not in digits:
            return False
        plain = _plain(text)
        number = _quantity(plain)
        if value is not None and number is not None:
            return math.isclose(number, value, rel_tol=1e-9)
        # Other orders of the same signs are for `matches` to judge, and names and units beside a number.
        is_close = value is None and digits[0] or sorted(plain) == sorted(gold)
        return plain == gold or is_close and matches(text, answer)
    return is_answer


def _digits(text):
    return sorted(re.findall("[0-9]", text.translate(_POWERS)))


def _plain(text):
    """A formula in signs that LaTeX, ASCII and Unicode share, without brackets and blanks; words in small."""
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return text.lower() if len(text) > 1 else text  # an option A is no article


def _quantity(plain):
    """The number that plain text spells, "-1/2" or "twelve", or None."""
    match = _QUANTITY.fullmatch(plain)
    if match is None:
        return _WORDS.get(plain)
    top, bottom = (float(re.sub("[^0-9.]", "", part or "1")) for part in match.groups()[1:])
    return (-top if match[1] == "-" else top) / bottom if bottom else None


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """One question, an expert's trace of its solution, and the answer that verifies it."""
    id: str
    prompt_ids: list[int]       # the rendered question
    expert_ids: list[int]       # the whole trace, no eos inside; empty where there is none
    cuts: list[int]             # where in expert_ids an anchor may end, increasing; may be empty
    answer: str
    question: str | list[dict]  # messages, if it has a system message or several turns; for display and hints
    trace: str
    level: str = ""             # how hard, where the data say so
    number: int = 0             # its place in the data file


def make_problem(row, tokenizer, matches, max_episodes=10, system=None):
    """A row (.id, .messages, .trace, .answer, .level, .number; data.Row) as a `Problem`.

    `matches`: see `find_cuts`. `system`: the system message of rows without one. ValueError, "reason:
    detail", for a question that is none, text that spells a special token, a trace that holds a stop token.
    """
    messages = _as_messages(row.messages, system)
    trace = row.trace.strip()
    while endings := [token for token in tokenizer.special_texts if trace.endswith(token)]:
        trace = trace.removesuffix(endings[0]).rstrip()
    # What the prompt says already: the beginning of a thought, or that there is none.
    if tokenizer.opens_thinking:
        trace = re.sub(r"\A<think>\s*", "", trace)
    elif tokenizer.closes_thinking:
        trace = re.sub(r"\A<think>\s*</think>\s*", "", trace)
    tokenizer.refuse_special(trace, "the trace")
    encoding = tokenizer.encoding(trace)
    if not set(encoding.ids).isdisjoint(tokenizer.stop_token_ids):
        raise ValueError("the trace holds a stop token")
    cuts = find_cuts(trace, encoding.offsets, row.answer, matches, max_episodes) if trace else []
    question = messages if len(messages) > 1 else messages[0]["content"]
    return Problem(row.id, tokenizer.render(messages), encoding.ids, cuts, row.answer, question, trace,
                   row.level, row.number)


def reach_lines(problems, tokenizer, max_new_tokens):
    """What a reader should know of traces before training: lengths, cuts in reach of --max-new-tokens (to
    which an anchor counts), and whether traces and template agree about thinking. Lines of text."""
    num = len(problems)
    lengths = [len(problem.expert_ids) for problem in problems]
    cuts = [cut for problem in problems for cut in problem.cuts]
    near = sum(cut < max_new_tokens for cut in cuts)
    num_without = sum(not problem.cuts for problem in problems)
    reach = f"{near} of {len(cuts)} cuts are in reach of --max-new-tokens {max_new_tokens}"
    # Behind the last cut an answer may be as long as what is left of the trace.
    all_reached = f"--max-new-tokens {max(lengths)} reaches all"
    lines = [f"traces of {min(lengths)} to {max(lengths)} tokens (median {statistics.median(lengths):.0f}), "
             f"{len(cuts) / num:.1f} cuts each, {num_without} without a cut; {reach}"]
    if near < len(cuts):
        lines[0] += f"; {all_reached}"
    if not cuts:
        lines.append("\n!!! WARNING: no trace has a place for an anchor: BREAD is GRPO here\n")
    elif 2 * near < len(cuts):
        lines.append(f"\n!!! WARNING: only {reach}; without anchors BREAD is GRPO: {all_reached}\n")
    num_thinking = sum("</think>" in problem.trace for problem in problems)
    if tokenizer.thinks and 2 * num_thinking < num:
        lines.append(f"warning: the template lets the model think, {num - num_thinking} of {num} traces do "
                     "not; where it knows the argument: --template-args '{\"enable_thinking\": false}'")
    elif not tokenizer.thinks and 2 * num_thinking > num:
        lines.append(f"warning: {num_thinking} of {num} traces think (<think>), the template does not: the "
                     "model has to learn that, too")
    return lines
