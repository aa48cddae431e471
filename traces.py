"""Expert traces: from text to token ids.

    question   | expert trace                             | eos (SFT only)
    prompt_ids | episode 1 | episode 2 | .. | last episode
                           ^           ^    ^               cuts; an anchor is expert_ids[:cut]

Our choices: (1) A trace is tokenised once and whole, and a cut is an index into those ids: an anchor is a
prefix of the trace's own tokenisation. (2) Data cannot forge turns: text that spells a special token such as
<|im_end|> is refused; at a trace's end it is stripped. (3) A template says how a turn ends, too.
Left out: SentencePiece-only folders.
"""
import datetime
import functools
import json
import os
import re
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

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
    `thinks`: the model is meant to write a thought, by the template's word. `special_texts`: see (2).
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
        config = _read(folder / "tokenizer_config.json", _json_object, absent={})
        self._names = special_names(folder, config)
        bos = self._backend.token_to_id(self._names.get("bos_token", ""))
        eos = self._backend.token_to_id(self._names.get("eos_token", ""))
        if eos is None and "eos_token" in self._names:
            raise ValueError(f"{folder}: eos_token is {self._names['eos_token']!r:.60}, which tokenizer.json "
                             "does not have")
        stops = {eos}
        # All three files, since one errs: Llama-3-8B-Instruct's lacked the <|eot_id|> that the model writes.
        for name in ("generation_config.json", "config.json"):
            entry = _read(folder / name, _json_object, absent={}).get("eos_token_id")
            entries = entry if isinstance(entry, list) else [entry]
            if not all(id is None or type(id) is int and 0 <= id < 2**31 for id in entries):
                raise ValueError(f"{folder / name}: eos_token_id is {entry!r:.60}, ids are integers from 0")
            # One that the tokenizer does not know, as of a padded vocabulary, ends nothing.
            stops |= {id for id in entries if id is not None and self._backend.id_to_token(id) is not None}
        # Where the config is silent (Llama-3), what tokenizer.json itself puts in front of a text decides.
        starts_with_bos = self._backend.encode("", add_special_tokens=True).ids[:1] == [bos]
        self._bos = [bos] if bos is not None and config.get("add_bos_token", starts_with_bos) else []
        self._template = read_template(folder, config, template_args)
        if self._template and not ends_within(5, lambda: self._prompt_text(_as_messages("1+1?"))):
            raise ValueError(f"{folder}: the chat template takes over 5 seconds, or over 1 GB")
        added = self._backend.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        turn_end = find_turn_end(self._prompt_text, special, stops) if self._template else None
        self.stop_token_ids = tuple(sorted((stops | {turn_end}) - {None}))
        if not self.stop_token_ids:
            raise ValueError(f"{folder}: rollouts would never end; set eos_token in tokenizer_config.json, "
                             "or eos_token_id in generation_config.json or config.json")
        ends = [id for id in (turn_end, eos, self.stop_token_ids[0]) if id is not None]
        self.eos_id = ends[0]
        ending = [token.content for i, token in added.items() if i in self.stop_token_ids]
        self.special_texts = sorted({*special, *ending})
        # A first render shows a broken template at once, and what a prompt says about thinking.
        prompt = self._prompt_text(_as_messages("1+1?"))
        if "1+1?" not in prompt:
            raise ValueError(f"{folder}: the chat template drops the question, it prints {prompt!r:.60}")
        self.opens_thinking = bool(re.search(r"<think>\s*\Z", prompt))
        self.closes_thinking = bool(re.search(r"</think>\s*\Z", prompt))
        self.thinks = self.opens_thinking or (
            "enable_thinking" in self._template and not self.closes_thinking)

    @property
    def stop_texts(self):
        """The stop ids as a reader knows them: "<|im_end|> (151645)"."""
        return [f"{self.decode([id], skip_special_tokens=False)} ({id})" for id in self.stop_token_ids]

    def encode(self, text):
        """Token ids of plain text: "<|im_end|>" is ten characters like any others, never the special id."""
        return self.encoding(text).ids

    def encoding(self, text, markup=False):
        """`.ids` of a text, and their (start, end) as `.offsets`. `markup`: special tokens are recognised.
        ValueError for half a surrogate pair."""
        self._backend.encode_special_tokens = not markup  # True reads "encode them as plain text"
        try:
            return self._backend.encode(text, add_special_tokens=False)  # templates write their own bos
        except TypeError:  # what it says of half a surrogate pair
            raise ValueError(f"a text that has no UTF-8: {text!r:.60}") from None

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
        if messages[-1]["content"].strip() not in text:
            raise ValueError(f"the chat template drops the question: it prints {text!r:.60}")
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


def read_template(folder, config, arguments):
    """The chat template of a folder, "" without one. ValueError if it is no text or lacks an argument."""
    template = "" if config.get("chat_template") is None else config["chat_template"]
    if isinstance(template, list):  # [{"name": .., "template": ..}, ..]
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else NO_DEFAULT
    if not isinstance(template, str):
        raise ValueError(f"{folder}: the chat template is {template!r:.40}, text is needed")
    template = _read(folder / "chat_template.jinja", bytes.decode, absent=template)
    for name in arguments:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"--template-args has {name!r}, which the template of {folder} never uses")
    return template


def ends_within(seconds, call):
    """Whether call() returns or fails in time, and without gigabytes, tried in a process of its own: nothing
    else stops 9**9**9."""
    if not hasattr(os, "fork"):  # Windows
        return True
    import resource  # POSIX only
    child = os.fork()
    if child == 0:
        status = 0
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds + 1, seconds + 1))  # if the parent is killed
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
        except OSError:  # macOS: time is limited, memory is not
            pass
        try:
            call()
        except ValueError as error:
            status = isinstance(error.__cause__, MemoryError)
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.001)


def find_turn_end(render, special, stops):
    """The id of the special token, one of {text: id}, that a template puts behind an assistant's message, or
    None. Base models have templates, too, whose turns do not end in their eos_token."""
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "Two"}]
    try:
        before, _, behind = render(messages, add_generation_prompt=False).rpartition("Two")
    except ValueError:  # takes no assistant's message
        return None
    found = [token for token in special if token and behind.lstrip().startswith(token)]
    if not found or not before:  # a template that drops the answer has all of its text behind it
        return None
    end = max(found, key=len)
    # What also begins the turn begins the next one.
    opens = max(special, key=before.rfind) == end and special[end] not in stops
    return None if opens else special[end]


def special_names(folder, config):
    """{name: text} of the special tokens that a tokenizer_config.json names; ValueError if one is no text."""
    names = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)  # an AddedToken, or its text
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str) and token is not None:
            raise ValueError(f"{folder / 'tokenizer_config.json'}: {name} is {token!r:.60}, text is needed")
        if text:
            names[name] = text
    adds_bos = config.get("add_bos_token")
    if not isinstance(adds_bos, bool | None):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: add_bos_token is {adds_bos!r:.60}, true or "
                         "false is needed")
    return names


def _read(file, parse, absent=None):
    try:
        if absent is not None and not os.path.lexists(file):  # a link that leads nowhere has been meant
            return absent
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        return parse(file.read_bytes())
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file} cannot be read: {error}") from error


def _json_object(data):
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}, an object is needed")
    return found


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


def make_problem(row, tokenizer, find_cuts, system=None):
    """A row (.id, .messages, .trace, .answer, .level, .number; data.Row) as a `Problem`.

    `find_cuts(trace, offsets, answer)`: where its anchors may end, see cuts.py. `system`: the system message
    of rows without one. ValueError, "reason: detail", for a question that is none, text that spells a special
    token, a trace that holds a stop token.
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
    cuts = find_cuts(trace, encoding.offsets, row.answer) if trace else []
    question = messages if len(messages) > 1 else messages[0]["content"]
    return Problem(row.id, tokenizer.render(messages), encoding.ids, cuts, row.answer, question, trace,
                   row.level, row.number)


def read_problem(row, tokenizer, find_cuts=None):
    """{"question", "trace", "answer", "id", "system"}, of which the last three may be absent, as a `Problem`:
    texts; the question may be messages, the answer a number. find_cuts, ValueError: see `make_problem`."""
    fields = SimpleNamespace(id=f"{row.get('id', 0)}", messages=row["question"], trace=row["trace"],
                             answer=f"{row.get('answer', '')}", level="", number=0)
    return make_problem(fields, tokenizer, find_cuts or (lambda *_: []), row.get("system"))


def reach_lines(problems, tokenizer, max_new_tokens):
    """What a reader should know of traces before training: lengths, cuts in reach of --max-new-tokens (to
    which an anchor counts), and whether traces and template agree about thinking. Lines of text."""
    num = len(problems)
    lengths = [len(problem.expert_ids) for problem in problems]
    cuts = [cut for problem in problems for cut in problem.cuts]
    near = sum(cut < max_new_tokens for cut in cuts)
    num_without = sum(not problem.cuts for problem in problems)
    reach = f"{near} of {len(cuts)} cuts are in reach of --max-new-tokens {max_new_tokens}"
    # Behind a cut an answer may be as long as what is left of the trace.
    all_reached = f"--max-new-tokens {max(lengths)} has room for all"
    lines = [f"traces of {min(lengths)} to {max(lengths)} tokens (median {statistics.median(lengths):.0f}), "
             f"{len(cuts) / num:.1f} cuts each, {num_without} without a cut; {reach}"]
    if max(lengths) > max_new_tokens:
        lines[0] += f"; {all_reached}"
    if not cuts:
        lines.append("\n!!! WARNING: no trace has a place for an anchor: BREAD is GRPO here\n")
    elif 2 * near < len(cuts):
        lines.append(f"\n!!! WARNING: {reach}; without anchors BREAD is GRPO: {all_reached}\n")
    num_thinking = sum("</think>" in problem.trace for problem in problems)
    if tokenizer.thinks and 2 * num_thinking < num:
        lines.append(f"warning: the template lets the model think, {num - num_thinking} of {num} traces do "
                     "not; where it knows the argument: --template-args '{\"enable_thinking\": false}'")
    elif not tokenizer.thinks and 2 * num_thinking > num:
        lines.append(f"warning: {num_thinking} of {num} traces think (<think>), the template does not: "
                     "anchors are in a form that the model does not write by itself")
    return lines
