"""Rows as people publish them: which field becomes what, what is left out, which files are read."""
import gzip
import json
import math
import sys

import pytest
from conftest import ROOT

import data

CASES = ROOT.parent / "shared" / "data" / "cases"
QUESTION = {"question": "How many clips?"}
GOOD = {**QUESTION, "trace": "48 + 24 = 72", "answer": "72"}
THOUGHT = "<think>\nA half of 48 is 24.\n</think>\n\nSo \\boxed{72}."


def read(path, **options):
    """(the rows of a file, the lines that were said)."""
    said = []
    return data.read_data(path, lambda row: row, say=said.append, **options), said


def published(name):
    """The path of a file of the shared cases."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if not (CASES / name).exists():
        pytest.skip("no shared data")
    return CASES / name


@pytest.fixture
def write(tmp_path):
    """write(row, ..): a file of lines; a row is a dict, or a line as it is."""
    def write(*rows):
        path = tmp_path / "traces.jsonl"
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines))
        return path
    return write


@pytest.mark.parametrize("name, question, trace, answer, answers", [
    ("openr1.jsonl", "problem", "generations (the first verified, complete one)", "answer", "72 10"),
    ("metamath.jsonl", "query", "response", "the trace", "72 10"),
    ("deepscaler_empty_solution.jsonl", "problem", "solution", "answer", r"\frac{14}{3} 9"),
    ("numina_cot_proof.jsonl", "problem", "solution", "the trace", "B"),
    ("luffy.jsonl", "prompt", "target", "reward_model.ground_truth", "72 10"),
    ("trl_prompt_completion.jsonl", "prompt", "completion", "the trace", "72 10"),
    ("s1k.jsonl", "question", "thinking_trajectories and attempt", "solution (s1K)", "72 10"),
    ("s1k11.jsonl", "question", "deepseek_thinking_trajectory and deepseek_attempt", "solution (s1K)",
     "72 10 5"),
    ("openthoughts.jsonl", "conversations", "conversations", "the trace", "72 10"),
    ("openthoughts_metadata.jsonl", "problem", "deepseek_reasoning and deepseek_solution",
     "ground_truth_solution (box)", "72 10"),
    ("array_compact.json", "question", "answer", "answer", "72 10 5"),
    ("gsm8k.parquet", "question", "answer", "answer", "72 10 5"),
    ("gsm8k_equals.jsonl", "question", "answer", "answer", "1"),
])
def test_published_rows_are_read_as_their_publisher_meant(name, question, trace, answer, answers):
    """One file of each set; which rows are left out shows in the answers (9999: wrong on purpose)."""
    rows, said = read(published(name))
    assert f"question from {question}, trace from {trace}, answer from {answer}; not used: " in said[0]
    assert [row.answer for row in rows] == answers.split()
    for row in rows:
        assert row.answer in row.trace and row.messages[-1]["role"] == "user"
        assert not [mark for mark in ("<|", "<<", "9999") if mark in row.trace]


@pytest.mark.parametrize("name, refusal, answers", [
    ("verl_gsm8k.jsonl", "no trace in any row: only --method grpo can use this file", ["72", "10"]),
    ("dapo_verl.jsonl", "no trace in any row: only --method grpo can use this file", ["72", "10"]),
    ("answers_only_eval.jsonl", "no trace in any row: only --method grpo can use this file",
     [r"\left( 3, \frac{\pi}{2} \right)", r"\frac{14}{3}"]),
    ("unfinished_think.jsonl", "an unfinished <think>", ["42"]),
    ("countdown.jsonl", "countdown rows (nums, target) carry no trace and no fixed answer", None),
])
def test_files_without_traces_serve_where_none_is_needed(name, refusal, answers):
    """Refused by name for training on traces; question and answer remain, except of countdown."""
    with pytest.raises(ValueError) as error:
        read(published(name), needs_trace=answers is not None)
    assert refusal in str(error.value)
    if answers:
        rows, _ = read(published(name), needs_trace=False)
        assert [(row.trace, row.answer) for row in rows] == [("", answer) for answer in answers]


@pytest.mark.parametrize("row, trace, answer", [
    ({"solution": "s", "answer": 72.0}, "s", "72"),
    ({"traces": [" one ", "two"], "answer": 0.5}, "one", "0.5"),
    ({"target": [{"role": "assistant", "content": "t"}], "reward_model": {"ground_truth": 7}}, "t", "7"),
    ({"answer": "2 = <<1+1=2>>2\n#### 2"}, "2 = 2\n#### 2", "2"),
    ({"trace": "t", "messages": [], "final_answer": "so\n#### 7\nThe answer is: 8"}, "t", "7"),
    ({"thinking_trajectories": ["t "], "attempt": " a", "solution": "1"}, "<think>\nt\n</think>\n\na", "1"),
    ({"message_thinking": "t", "message_content": "a", "gtruth_answer": 1}, "<think>\nt\n</think>\n\na", "1"),
    ({"deepseek_thinking_trajectory": "t", "deepseek_attempt": "\\boxed{5}", "solution": "a\nb"},
     "<think>\nt\n</think>\n\n\\boxed{5}", "5"),
    ({"trace": "<|begin_of_thought|>t<|end_of_thought|>\n\n<|begin_of_solution|>\n\na\n<|end_of_solution|>",
      "ground_truth_solution": THOUGHT}, "<think>t</think>\n\na", "72"),
    ({"trace": "#### 1,000\nThe answer is: 8"}, "#### 1,000\nThe answer is: 8", "1,000"),
    ({"trace": "#### Step 1\nSo \\boxed{3}."}, "#### Step 1\nSo \\boxed{3}.", "3"),
    ({"trace": "<think>\n\\boxed{4}\n</think>\n#### Add\n1+2.\n#### 3"},
     "<think>\n\\boxed{4}\n</think>\n#### Add\n1+2.\n#### 3", "3"),
    ({"answer": "", "final_answer": "2", "solution": "", "generated_solution": "t"}, "t", "2"),
    ({"trace": r"\boxed{1}\boxed{\{\frac{1}{\sqrt{2}}.}."},
     r"\boxed{1}\boxed{\{\frac{1}{\sqrt{2}}.}.", r"\{\frac{1}{\sqrt{2}}."),
])
def test_trace_and_answer_are_found(write, row, trace, answer):
    """Text, texts, messages, thinking and attempt; numbers, the line of ####, the last box by its brace."""
    rows, _ = read(write({**QUESTION, **row}))
    assert (rows[0].trace, rows[0].answer) == (trace, answer)


@pytest.mark.parametrize("right, right_too, complete, chosen", [
    (None, None, None, "a"), ([0, 1, 1], None, [1, 0, 1], "c"), ([0, 1, 1], [1, 0, 0], None, "b"),
    (None, [0, 0, 1], None, "c"), (None, None, [0, 1, 1], "b"), ([1, 0, 0], None, [0, 1, 1], ""),
    ([0, 0, 0], [1, 1, 1], None, ""),
])
def test_the_first_verified_complete_generation_is_the_trace(write, right, right_too, complete, chosen):
    """A row without one is left out, and never read from another field."""
    row = {**QUESTION, "solution": "wrong field", "answer": "72", "generations": ["a", "b", "c"]}
    names = ("correctness_math_verify", "correctness_llama", "is_reasoning_complete")
    for name, marks in zip(names, (right, right_too, complete)):
        row[name] = marks and [bool(mark) for mark in marks]
    rows, said = read(write(GOOD, row))
    assert "".join(row.trace for row in rows[1:]) == chosen
    assert chosen or "1 of 2 rows can be used; left out: 1 like line 2: no verified" in said[1]


@pytest.mark.parametrize("reason, row", [
    *[("the answer is neither text nor a number", {**GOOD, "answer": value}) for value in (True, {"a": 1})],
    *[("no fixed answer", {**GOOD, "answer": value}) for value in (math.nan, math.inf, "proof", " ")],
    ("no answer", {**QUESTION, "trace": "no box"}), ("no question", {"trace": "t", "answer": "1"}),
    ("no trace", {**QUESTION, "answer": "1"}), ("the trace is empty", {**GOOD, "trace": " \n"}),
    ("an unfinished <think>", {**GOOD, "trace": "<think>\nso"}),
    ("neither text nor messages", {**GOOD, "trace": 5}),
    ("the question is empty, or does not end with the user's message",
     {**GOOD, "question": [{"role": "assistant", "content": "x"}]}),
    ("a role other than system, user, assistant", {**GOOD, "question": [{"role": "tool", "content": "x"}]}),
    *[("a field of an unknown kind", {**GOOD, "question": value}) for value in (7, ["x"])],
    ("problem_is_valid is not Yes", {**GOOD, "problem_is_valid": "No"}),
    ("solution_is_valid is not Yes", {**QUESTION, "solution": "s", "answer": "1", "solution_is_valid": "No"}),
    ("deepseek_grade is not Yes", {**QUESTION, "deepseek_thinking_trajectory": "t", "deepseek_grade": "No"}),
    ("an id that an earlier row has", {**GOOD, "id": "first"}),
    *[("not JSON in UTF-8", line) for line in (b'"\\ud800"', b"[" * 99999, b"9" * 5000, b'"\xff"', b"{")],
    ("a key stands twice: in an object with answer", b'{"a": [{"answer": 1, "answer": 2}]}'),
    ("no object", b"7"), ("the question is empty", {**GOOD, "question": " "}),
    *[("no question", {**GOOD, "question": value}) for value in ("", [])],
    ("a field of an unknown kind", {"messages": "a text", "answer": "1"}),
])
def test_a_bad_row_is_left_out_and_counted(write, reason, row):
    """Whatever it holds: a line says how many and why; `strict`, or more bad than good, is an error."""
    first = {**GOOD, "id": "first"}
    path = write(first, b"", row)
    rows, said = read(path)
    assert [row.number for row in rows] == [1]
    assert said[1].startswith(f"{path}: 1 of 2 rows can be used; left out: 1 like line 3: {reason}")
    with pytest.raises(ValueError) as error:
        read(path, strict=True)
    assert str(error.value).startswith(f"{path}, line 3: {reason}")
    with pytest.raises(ValueError) as error:
        read(write(first, row, row))
    assert f"1 of 3 rows can be used; left out: 2 like line 2: {reason}" in str(error.value)


def test_a_conversation_ends_where_its_trace_begins(write):
    """ShareGPT's turns below a system text; those that end with the user's have no trace."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    row = {"system": "Use <|begin_of_thought|>.", "answer": "1"}
    rows, _ = read(write({**row, "conversations": [*turns, {"from": "gpt", "value": "d"}]}))
    messages = [(message["role"], message["content"]) for message in rows[0].messages]
    assert messages == [("system", "Use <think>."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    assert rows[0].trace == "d"
    path = write({**row, "conversations": turns})
    assert read(path, needs_trace=False)[0][0].messages == rows[0].messages
    with pytest.raises(ValueError, match="no trace in any row"):
        read(path)


def test_no_answer_is_taken_from_a_trace_that_was_refused(write):
    """Where no trace is needed, a cut-off or unverified one is dropped whole; a good one still answers."""
    rows, _ = read(write({**GOOD, "trace": []}, {**QUESTION, "trace": THOUGHT}), needs_trace=False)
    assert [(row.trace, row.answer) for row in rows] == [("", "72"), (THOUGHT, "72")]
    cut_off = {"generations": ["\\boxed{1}"], "is_reasoning_complete": [False]}
    for bad in ({"trace": "<think>\\boxed{1}"}, cut_off):
        with pytest.raises(ValueError, match="no answer"):
            read(write({**QUESTION, **bad}), needs_trace=False)


def test_the_fields_of_the_user_win(write):
    """Dotted paths, also into lists; a row without one is left out, a file without any told what to type."""
    row = {**GOOD, "extra": {"answer": "so\n#### 5", "turns": [{"q": "Really?"}]}, "nums": [1], "target": "t"}
    fields = {"question": "extra.turns.0.q", "trace": "target", "answer": "extra.answer"}
    rows, said = read(write(row, GOOD), fields=fields)
    assert (rows[0].messages[0]["content"], rows[0].trace, rows[0].answer) == ("Really?", "t", "5")
    assert len(rows) == 1 and "1 like line 2: no field extra.turns.0.q" in said[1]
    assert read(write({**QUESTION, "solution": "7"}), fields={"answer": "solution"})[0][0].answer == "7"
    with pytest.raises(ValueError, match=r"no question: --question-field names one of input, output"):
        read(write({"input": "q", "output": "t"}))


def test_the_lines_that_are_said(write):
    """Sources and unused fields of the commonest kind of row, how many differ, what `convert` left out."""
    def convert(row):
        if row.answer == "9":
            raise ValueError(f"too long: {row.id}")
        return row.number, row.id, row.level

    rows = [{**GOOD, "uuid": 1, "id": 0, "level": "Level 2"}, {**GOOD, "uuid": 2},
            {"problem": "q", "solution": "s", "answer": "1", "difficulty": 5}, {**GOOD, "answer": 9}]
    path = write(*rows)
    said = []
    converted = data.read_data(path, convert, say=said.append)
    assert converted == [(1, "0", "Level 2"), (2, "2", ""), (3, "3", "5")]
    assert said == [f"{path}: question from question, trace from trace, answer from answer; not used: uuid; "
                    "1 rows in another way",
                    f"{path}: 3 of 4 rows can be used; left out: 1 like line 4: too long: 4"]
    assert list(data.read_rows(path)) == list(enumerate(rows, 1))


def test_files_are_told_apart_by_their_content(tmp_path):
    """Any name: lines (BOM, CRLF, blank ones, U+2028), arrays, gzip of either; rows are numbered from 1."""
    path = tmp_path / "file"
    row = {**GOOD, "question": "a\u2028b"}
    line = json.dumps(row, ensure_ascii=False).encode()
    array = json.dumps([row, row], indent=1).encode()
    for content in (b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\n\n", array, b"\xef\xbb\xbf \n" + array,
                    gzip.compress(array), gzip.compress(line + b"\n" + line)):
        path.write_bytes(content)
        rows, _ = read(path)
        assert [row.number for row in rows] == [1, 2]
        assert {row.messages[0]["content"] for row in rows} == {"a\u2028b"}
    path.write_text(json.dumps([GOOD, 7]))
    with pytest.raises(ValueError, match="file, row 2: no object: 7"):
        read(path, strict=True)


def test_parquet_holds_nested_rows_and_needs_pyarrow(tmp_path, monkeypatch):
    """Lists of structs, nulls and numbers become rows; without pyarrow one line says what to install."""
    parquet = pytest.importorskip("pyarrow.parquet")
    prompt = [{"role": "user", "content": "q"}]
    table = [{"prompt": prompt, "target": "t", "answer": 72.0, "id": None}, {"prompt": prompt}]
    parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(table), tmp_path / "rows")
    rows, said = read(tmp_path / "rows")
    assert rows == [data.Row(1, "1", prompt, "t", "72", "")]
    assert "1 like row 2: no trace" in said[1]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="rows cannot be read: .*pip install pyarrow"):
        read(tmp_path / "rows")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    """Missing, broken, cut short, nested too deep, empty."""
    path = tmp_path / "file"
    for content in (None, b"[{]", b"PAR1", b"\x1f\x8bx", gzip.compress(b"{}" * 99)[:-9], b"[" * 9999, b""):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="file cannot be read: |file is empty: "):
            read(path)
