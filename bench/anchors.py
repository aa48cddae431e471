r"""Do anchors state the answer, and how far do they reach? On public traces, raw and as thinking.

    python bench/anchors.py GSM8K.jsonl math500_test.json      # the table of docs/ANCHORS.md

MATH-500's solutions are LaTeX; people and models think in plain signs, so each trace is also written in ASCII
(1/6, sqrt(2), pi) and in Unicode (√2, π). "Thinking": the trace without its box between <think> and </think>,
the boxed answer behind it. A claim is found by a reading of its own, apart from cuts.py: the anchor, blanks
and brackets removed, holds "=", "is", "be", "equals", "gives", "get", "->", "it's" or "**" and directly
behind it the answer in one of the three notations, where no digit, letter or operator goes on.
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cuts import find_cuts, first_statement
from rewards import answers_match, math_reward

ASCII = [(r"\\d?frac\s*(\d)\s*(\d)", r"\1/\2"), (r"\\d?frac\{([^{}]{1,9})\}\{([^{}]{1,9})\}", r"\1/\2"),
         (r"\\sqrt\s*(\d)", r"sqrt(\1)"), (r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)"),
         (r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)"), (r"\\text\w*\{([^{}]*)\}", r"\1"),
         (r"\\pi\b", "pi"), (r"\\(?:cdot|times)\b", "*"), (r"\\(?:left|right)\b", ""),
         (r"\\[\[\]()!,]|\$", "")]
UNICODE = [(r"\bsqrt\((\w+)\)", r"√\1"), (r"(?<![a-z])pi(?![a-z])", "π"), (r"\*", "×"), (r"\^2\b", "²")]
NOTATIONS = {"LaTeX": [], "ASCII": ASCII, "Unicode": ASCII + UNICODE}
CLAIM = (r"(?:=|\bis|\bbe|\bequals|\bgives|\bgets?|->|(?:it|that|what|here)['’]s|\*\*)"
         r"[\s$*\\({\[:]{0,12}")
# A word may be a unit, unless a sum or product goes on: "is 5 x 3", "= 30 gallons + 10 gallons".
ENDS = r"(?:[.,;:](?!\d)|\*\*|\\\)|\\\]|$|(?=\s(?!x\s?\d)[A-Za-z]+\b(?!\s?[-+*/]\s?\d)))"
# Completions that state nothing: whatever an anchor with one of them is paid for, the anchor has stated.
EMPTY = ("", ".", "**\n\nDone.", "\n</think>\n\nSo that is it.")
COLUMNS = ("traces", "notation", "form", "problems", "cuts each", "without a cut",
           "last anchor claims the answer", "an anchor is paid, also with an empty completion",
           "reach of the last cut, median",
           "of those whose trace allows 60%")


def rewrite(text, rules):
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def claims(anchor, gold):
    """Whether the anchor claims the answer, by the plain reading above."""
    for rules in NOTATIONS.values():
        bare = re.sub(r"\\[()\[\]!,]|[\s${}()\[\]]|\\left|\\right", "", rewrite(gold, rules))
        spelled = "".join(re.escape(sign) + r"[\s${}()\[\]]*" for sign in bare)
        if re.search(CLAIM + spelled + ENDS, anchor):
            return True
    return False


def unboxed(text):
    """The text with what its boxes hold, but without the boxes."""
    while (start := text.find(r"\boxed{")) >= 0:
        depth = 0
        for end in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                break
        text = text[:start] + text[start + 7:end] + text[end + 1:]
    return text


def read(path):
    """[(steps, gold answer, how the trace states it), ...] of GSM8K's lines or MATH-500's array."""
    if path.suffix == ".json":
        rows = json.loads(path.read_bytes())
        return [(unboxed(row["solution"]), row["answer"], rf"\boxed{{{row['answer']}}}") for row in rows]
    texts = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    parts = [re.sub(r"<<[^<>\n]*>>", "", text).partition("\n#### ") for text in texts]
    return [(steps, gold, f"#### {gold}") for steps, _, gold in parts]


def measure(cases):
    """Cells of a row from [(trace, characters of steps or thinking in it, gold answer), ...]."""
    counts = []
    reaches = []
    allowed = []
    num_claims = 0
    num_paid = 0
    for trace, size, gold in cases:
        cuts = find_cuts(trace, [(i, i + 1) for i in range(len(trace))], gold, answers_match)
        counts.append(len(cuts))
        reaches.append(cuts[-1] / size if cuts else 0.0)
        if first_statement(trace, gold, answers_match) >= 0.6 * size:
            allowed.append(reaches[-1])
        num_claims += claims(trace[:cuts[-1]] if cuts else "", gold)
        num_paid += any(math_reward(trace[:cut] + said, gold) for cut in cuts for said in EMPTY)
    share = f"{statistics.median(allowed):.0%} ({len(allowed)})"
    return [len(cases), f"{statistics.mean(counts):.1f}", f"{counts.count(0) / len(cases):.1%}", num_claims,
            num_paid, f"{statistics.median(reaches):.0%}", share]


def rows_of(path):
    """The table's rows of one file."""
    for notation in NOTATIONS if path.suffix == ".json" else ["LaTeX"]:
        raw = []
        thinking = []
        for steps, gold, final in read(path):
            steps = rewrite(steps, NOTATIONS[notation])
            raw.append((f"{steps}\n{final}", len(steps), gold))
            thought = f"<think>\n{steps}"
            thinking.append((f"{thought}\n</think>\n\n{final}", len(thought), gold))
        for form, cases in (("raw", raw), ("thinking", thinking)):
            yield [path.stem, notation, form, *measure(cases)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="GSM8K as .jsonl, MATH-500 as .json")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for path in parser.parse_args().files:
        for row in rows_of(path):
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
