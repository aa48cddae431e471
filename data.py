"""Rows of trace sets as people publish them: question, expert trace and gold answer, as text.

A file is .jsonl, a JSON array, gzip of either, or parquet, by its content. The first of the names below whose
field holds something counts. A trace that its publisher calls wrong or incomplete is none. A row that cannot
be used is left out and counted, by what its error says before ": ". Left out: folders; choosing among traces.
"""
import gzip
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

QUESTION = ("question", "problem", "prompt", "query")
TRACE = ("trace", "solution", "response", "completion", "target", "rationale", "generated_solution", "traces")
ANSWER = ("answer", "final_answer", "ground_truth", "gold", "gtruth_answer", "expected_answer",
          "reward_model.ground_truth")
CONVERSATION = ("conversations", "messages")
THINKING = {"deepseek_thinking_trajectory": "deepseek_attempt", "thinking_trajectories": "attempt",
            "deepseek_reasoning": "deepseek_solution", "message_thinking": "message_content"}  # its rest
VALID = {**dict.fromkeys(QUESTION, "problem_is_valid"), "solution": "solution_is_valid",  # must be Yes
         "deepseek_thinking_trajectory": "deepseek_grade"}
HEEDED = {"id", "system", "level", "difficulty", "correctness_math_verify", "correctness_llama",
          "is_reasoning_complete", *VALID.values()}
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
INSIDE = r"(?:[^{}\\]|\\.|\{%s\})*"  # braces, four deep; a text fits in one way only, so the time is linear
# "#### Step 1" is a heading; MetaMathQA goes on with "The answer is: 72".
LAST_LINE = re.compile(r"####([^\n]*)\s*(?:\n[^\n]*answer is[^\n]*)?\s*\Z", re.I)
BOX = re.compile(r"\\(?:boxed|fbox)\s?\{(" + INSIDE % (INSIDE % (INSIDE % (INSIDE % ""))) + r")\}", re.DOTALL)


@dataclass(frozen=True)
class Row:
    number: int     # its line in the file, or its place in an array or table, from 1
    id: str         # the row's own, else the number
    messages: list  # [{"role", "content"}, ..]: a system message first if the row has one, the user's last
    trace: str      # "" if there is none
    answer: str
    level: str      # how hard; "" if the row does not say


def read_data(path, convert, fields={}, needs_trace=True, strict=False, say=print):
    """What `convert` returns for every `Row` that can be used; a ValueError of its leaves the row out.

    `fields`: the user's own "question", "trace", "answer", dotted paths. `needs_trace`: rows without one are
    left out. `say` gets a line on what came from where, and one on the rows left out, if any. ValueError: the
    file cannot be read; over half of it, or all, is left out; with `strict`, the first row that would be.
    """
    kept = {}
    ways = Counter()
    left_out = {}  # reason: errors with their places
    for place, number, row in _places(path):
        try:
            item, way = _read_row(row, number, fields, needs_trace)
            if item.id in kept:
                raise ValueError(f"an id that an earlier row has: {item.id!r:.40}")
            kept[item.id] = convert(item)
            ways[way] += 1
        except ValueError as error:
            if strict:
                raise ValueError(f"{path}, {place} {number}: {error}") from error
            left_out.setdefault(str(error).split(": ")[0], []).append(f"{place} {number}: {error}")
    num_rows = len(kept) + sum(map(len, left_out.values()))
    if num_rows == 0:
        raise ValueError(f"{path} is empty: a row with question, trace and answer is needed")
    reasons = [f"{len(same)} like {same[0]}" for same in sorted(left_out.values(), key=len, reverse=True)]
    summary = f"{path}: {len(kept)} of {num_rows} rows can be used; left out: "
    if not kept and left_out.keys() == {"no trace"}:
        raise ValueError(f"{path}: no trace in any row: only --method grpo can use this file; {reasons[0]}")
    if not kept or 2 * len(kept) < num_rows:
        raise ValueError(summary + "; ".join(reasons[:3]))
    way, count = ways.most_common(1)[0]
    say(f"{path}: {way}" + f"; {len(kept) - count} rows in another way" * (count < len(kept)))
    if reasons:
        say(summary + "; ".join(reasons))
    return list(kept.values())


def read_rows(path):
    """Yield (number, row as a dict or the ValueError that says why it is none) for every row of a file."""
    return ((number, row) for _, number, row in _places(path))


def _places(path):
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        if data.startswith(b"PAR1"):
            from pyarrow import parquet
            sources = parquet.ParquetFile(path).read().to_pylist()
        elif data[:99].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            sources = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
        else:
            sources = data.split(b"\n")  # only there: JSON's texts may hold U+2028
    except Exception as error:  # gzip, zlib and pyarrow have their own
        hint = "; pip install pyarrow, or convert it to .jsonl" if isinstance(error, ImportError) else ""
        raise ValueError(f"{path} cannot be read: {error}{hint}") from error
    for number, source in enumerate(sources, 1):
        kind = "line" if isinstance(source, bytes) else "row"
        if kind == "row" or source.strip():
            yield kind, number, _check(source)


def _check(source):
    try:
        if isinstance(source, bytes):
            row = json.loads(source.decode("utf-8-sig"), object_pairs_hook=_object)
        else:
            row = source
        json.dumps(row, ensure_ascii=False, default=str).encode()  # fails at half a surrogate pair
        return row if isinstance(row, dict) else ValueError(f"no object: {row!r:.40}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON in UTF-8: {error}")
    except LookupError as error:
        return ValueError(f"{error}")


def _object(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):  # which of the two is meant nobody knows
        raise LookupError(f"a key stands twice: in an object with {', '.join(row):.60}")
    return row


def _read_row(row, number, fields, needs_trace):
    if isinstance(row, ValueError):
        raise row
    if {"nums", "target"} <= row.keys() and not any(fields.values()):
        raise ValueError("countdown rows (nums, target) carry no trace and no fixed answer")
    try:
        asked, messages = _find_question(row, fields)
        try:
            traced, trace = _find_trace(row, fields)
        except () if needs_trace else Exception:
            traced, trace = "nowhere", ""  # nor an answer from it: it may be wrong or cut off
        answered, answer = _find_answer(row, fields, trace)
    except (AttributeError, LookupError, TypeError, RecursionError) as error:  # nested as it may be
        raise ValueError(f"a field of an unknown kind: {error}") from error
    name = str(number if row.get("id") in (None, "") else row["id"])
    levels = [str(row[key]) for key in ("level", "difficulty") if row.get(key) is not None]
    way = f"question from {asked}, " + f"trace from {traced}, " * needs_trace + f"answer from {answered}"
    used = HEEDED.union(re.split("[ .,()]+", way))
    unused = ", ".join(key for key in row if key not in used and key.isprintable()) or "nothing"
    return Row(number, name, messages, trace, answer, [*levels, ""][0]), f"{way}; not used: {unused:.300}"


def _find(row, fields, what, names, stated={}):
    """(name, value) of the field that the user names, else of the first of ours that holds something. Of
    `stated` are what other fields say."""
    own = fields.get(what)
    for name in [own] if own else names:
        value = row if own else row | stated
        for key in name.split("."):
            value = {str(i): item for i, item in enumerate(value)} if isinstance(value, list) else value
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and row.get(VALID.get(name)) not in (None, "Yes", True):
            raise ValueError(f"{VALID[name]} is not Yes: {row[VALID[name]]!r:.40}")
        if value not in (None, "", []):
            return name, value
    names = list(row)
    for outer in (name for name in row if isinstance(row[name], dict)):
        names += [f"{outer}.{inner}" for inner in row[outer]]
    names = ", ".join(names)
    raise ValueError(f"no {f'field {own}' if own else what}: --{what}-field names one of {names:.300}")


def _messages(published):
    messages = []
    for message in published:
        role = message.get("role") or message.get("from")
        if role not in ROLES:
            raise ValueError(f"a role other than system, user, assistant: {role!r:.40}")
        content = message.get("content") or message.get("value") or ""
        messages.append({"role": ROLES[role], "content": _text(content)})
    return messages


def _text(value):
    """A text; the first of a list of them; the last of a list of messages, if it is the assistant's."""
    if isinstance(value, list) and isinstance(value[0], dict):
        last = _messages(value)[-1]
        if last["role"] != "assistant":
            raise ValueError("no trace: the messages do not end with the assistant's")
        return last["content"]
    text = value[0] if isinstance(value, list) else value
    if not isinstance(text, str):
        raise ValueError(f"neither text nor messages: {text!r:.40}")
    text = text.replace("<|begin_of_thought|>", "<think>").replace("<|end_of_thought|>", "</think>")
    return re.sub(r"<\|begin_of_solution\|>\s*|<\|end_of_solution\|>", "", text)  # OpenThoughts has these


def _find_question(row, fields):
    name, value = _find(row, fields, "question", QUESTION + CONVERSATION)
    is_text = isinstance(value, str) and name not in CONVERSATION
    messages = _messages([{"role": "user", "content": value}] if is_text else value)
    if name not in QUESTION and messages[-1]["role"] == "assistant":
        messages.pop()  # the trace; at the end of a prompt it would be the start of an answer
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError(f"the question is empty, or does not end with the user's message: field {name}")
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row["system"])})
    return name, messages


def _find_trace(row, fields):
    gsm8k = ["answer"] if "####" in str(row.get("answer")) else []
    source, value = _find(row, fields, "trace", ["generations", *THINKING, *TRACE, *gsm8k, *CONVERSATION])
    if source == "generations":  # OpenR1: several, with lists of verdicts, or null
        is_right = row.get("correctness_math_verify") or row.get("correctness_llama")
        verdicts = list(filter(None, [is_right, row.get("is_reasoning_complete")]))
        texts = value if isinstance(value, list) else [value]
        value = next((text for text, *good in zip(texts, *verdicts) if all(good)), None)
        source = "generations (the first verified, complete one)" if verdicts else "generations (the first)"
        if value is None:
            raise ValueError("no verified, complete generation")
    elif source in THINKING:
        rest = _text(row[THINKING[source]]).strip()
        value = f"<think>\n{_text(value).strip()}\n</think>\n\n{rest}"
        source = f"{source} and {THINKING[source]}"
    trace = _text(value).strip()
    if not trace:
        raise ValueError(f"the trace is empty: field {source}")
    if trace.rfind("<think>") > trace.rfind("</think>"):
        raise ValueError(f"an unfinished <think>: field {source}")
    return source, re.sub(r"<<[^<>\n]*>>", "", trace) if "####" in trace else trace  # GSM8K's <<2+2=4>>


def _find_answer(row, fields, trace):
    solution = str(row.get("solution") or "").strip() if row.keys() & {"attempt", "deepseek_attempt"} else ""
    trace = trace.rpartition("</think>")[2]  # an earlier answer may have been withdrawn
    last = LAST_LINE.search(trace)
    texts = {"ground_truth_solution (box)": (row.get("ground_truth_solution") or "", None),
             "solution (s1K)": (solution, solution if re.fullmatch(".{1,60}", solution) else None),
             "the trace": (trace, last and last[1])}
    stated = {source: (BOX.findall(text) or [other])[-1] for source, (text, other) in texts.items()}
    source, answer = _find(row, fields, "answer", [*ANSWER, *stated], stated)
    if type(answer) in (int, float):
        answer = str(int(answer) if answer % 1 == 0 else answer)  # 72.0 is 72
    if not isinstance(answer, str):
        raise ValueError(f"the answer is neither text nor a number: {answer!r:.40}")
    if "####" in answer:
        answer = answer.rpartition("####")[2].partition("\n")[0]
    if answer.strip().lower() in ("", "nan", "inf", "-inf", "proof", "notfound"):  # NuminaMath-1.5
        raise ValueError(f"no fixed answer: {answer!r}")
    return source, answer.strip()
