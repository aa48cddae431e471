"""Claims about rewards.py: right answers are rewarded in any spelling, wrong ones in none, and nothing hangs.

Most claims are shown on cases written here; those about MATH-500, GSM8K and the public verifier suites need
`../shared/data` beside the repository and are skipped without it.
"""
import json
import random
import re
import time

import pytest

from conftest import ROOT, read_lines
from rewards import (MAX_ANSWER, MAX_TEXT, answers_match, extract_answer, math_reward, parse_gold,
                     without_cut_word)

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the repository")


@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{5}", "5"), (r"\fbox{5}", "5"), (r"it is $\boxed 5$.", "5"), (r"it is $\boxed5$.", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."), (r"\boxed{x = \boxed{5}}", "5"),
    (r"} \boxed{5} {", "5"), ("\\boxed\n{5}", "5"),
    ("#### 72", "72"), ("####72", "72"), ("#### 1,000\n\nIs there anything else?", "1,000"),
    ("#### 3\n#### 4", "4"), ("#### 5<|im_end|>", "5"), ("#### 72\nThe answer is 73.", "72"),
    (r"#### 72 or rather \boxed{73}", "73"), ("#####5", "5"), ("### Answer\n5", "5"),
    ("#### 42 (6 times 7)", "42"), ("The answer is $70,000 (a - b)", "$70,000"), ("#### 42, since 6*7", "42"),
    ("#### 3 (4+5)", "3 (4+5)"), ("The answer is 1 and 2", "1 and 2"),
    ("The answer is 5. I am sure.", "5"), ("The answer is: 5.5.", "5.5."), ("<answer>5</answer>", "5"),
    ("**Final answer:** (3, 4)", "(3, 4)"), ("The answer is\n\\[\n9\n\\]", "9"),
    ("<answer> 4 </answer> no, <answer> 5 </answer>", "5"),
    ("<think>\\boxed{4}</think> \\boxed{5}", "5"), ("\\boxed{4}</think>#### 5", "5"),
    # Prose, empty or unfinished boxes and answers inside the thinking are none.
    *((text, None) for text in (
        "", " ", "5", "It is 5.", "I think that 5 apples are left", "####", "#### \n", "The answer",
        r"\boxed{}", r"\boxed{ }", r"\boxed{5} \boxed{}", r"\boxed{5", r"\boxed", "boxed{5}", r"\text{5}",
        r"\boxed{5} + 2, thus \boxed{\frac{14}{2}", r"The answer is 5. No: \boxed{", r"\boxed 5 wait \boxed",
        r"<think> \boxed{5}", r"<think> \boxed{5} </think> done", r"\boxed{5} </think>", "<think></think>"))])
def test_the_committed_answer_is_found(text, answer):
    """The last box wins, then the last `####`, then the last "answer is", all after the thinking."""
    assert extract_answer(text) == answer


SAME = [
    # numbers
    ("-0", "0"), ("+5", "5"), ("5.", "5"), (".5", "0.50"), ("004", "4"), ("−5", "-5"), ("72.0", "72"),
    ("1,234.5", "1234.50"), ("1 000 000", "1,000,000"), (r"10\,000", "10000"), ("10{,}000", r"10,\!000"),
    (r"6.7 \times 10^{-5}", ".000067"), ("2e3", "2000"), ("10 000", "1e4"),
    ("10^3", "1000"), (r"10^{12}", "1" + "0" * 12), ("½", "1/2"), ("5½", "11/2"), ("22.2 C", "22.2"),
    # at the end of a sentence
    (r"\frac{5}{8}.", "5/8"), ("72.)", "72"), ("72).", "72"), ("72。", "72"), ('72."', "72"), ("`72`", "72"),
    ("72\u200b", "72"), ("__72__", "72"), ("'72'", "72"), ("(1,2)", "(1,2)."),
    # alternatives, choices
    (r"7\text{ or }5", r"5\text{ or }7"), ("7, 5", "5 or 7"), ("E: seven", "E"), (r"\textbf{(E)}\ 12", "(E)"),
    (r"18\,\mathrm{m}", "18"),
    # fractions and mixed numbers
    ("1/2", r"\frac12"), (r"\dfrac{3}{4}", "0.75"), (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    (r"\frac{1}{-2}", "-0.5"), (r"\frac{6}{4}", r"\tfrac32"), (r"1\frac{4}{5}", "1.8"),
    (r"-1\frac{1}{2}", "-1.5"), ("1 1/2", r"\frac{3}{2}"), ("1 125/500", "1.25"),
    # units, percent, money, degrees, names
    ("5 apples", "5"), (r"5\text{ m}", "5"), ("5.4 cents", r"5.4 \text{ cents}"),
    ("0.5 cm", r"\frac12\text{ cm}"), (r"15\mbox{ cm}^2", "15"), ("25\\%", "25"), ("25 percent", "25%"),
    (r"\$18.90", "18.9"), ("1.5 dollars", "$1.50"), (r"90^{\circ}", "90"), ("90°", "90 degrees"),
    ("x = 5.0", "x=5"), ("2x+3", "y = 2x + 3"), ("f(2)=5", "5"), (r"2\pi\text{ cm}", r"2 \pi"),
    (r"\theta = \frac{\pi}{6}", r"\frac{\pi}6"), (r"5\,\mathrm{cm}", "5"), ("5€", "5"), ("x∈[0,1)", "[0,1)"),
    # decoration
    ("**5**", "5"), (r"\(5\)", "$5$"), ("5,", "5"), (r"\displaystyle\frac{1}{2}", "1/2"),
    # tuples, intervals, sets, plus-minus
    (r"\left(0.6, \frac{8}{3}\right]", r"(\frac{3}{5},\frac83]"), ("[-2,7]", r"x \in [-2,7]"),
    ("(1,234)", "(1, 234)"), (r"\{2, 1\}", r"\{1, 2\}"), (r"\{2, 1\}", "1, 2"), ("2, 1", r"\{1,2\}"),
    ("1; 2", "1 and 2"), (r"\{5\}", "5"), ("-5, 5", r"\pm 5"), ("(1,0.5),(3,4)", "(1,1/2),(3,4)"),
    (r"1-\sqrt{19}, 1+\sqrt{19}", r"1 \pm \sqrt{19}"), ("x=1, x=2", "1,2"),
    # formulas and words
    (r"\sqrt3", r"\sqrt{3}"), ("-5i+6", "6 - 5i"), (r"11+11\sqrt5", r"11 \sqrt{5} + 11"),
    ("4210_{5}", "4210_5"), ("x^{2}+1", "1 + x^2"), ("2πr", r"2 \pi r"), ("2·3", r"2 \cdot 3"),
    ("(-∞, 2)", r"(-\infty,2)"), ("north", r"\text{North}"), ("C", r"\text{(C)}"),
    ("No solution.", r"\text{no solution}"),
    (r"\begin{pmatrix} -\frac13 \\2 \end{pmatrix}", r"\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}"),
    # a wrong verdict that we know of: a product of three letters behind a blank reads as a unit
    ("2 xyz", "2")]
DIFFERENT = [
    # near misses
    ("5", "-5"), ("0.333", "1/3"), ("3.14", r"\pi"), ("28", "0.28"), ("1 2", "12"), ("1,2", "12"),
    ("1, 234", "1234"), ("(1,234)", "1234"), ("52", "52_8"), ("x^10", "x^{10}"), ("-1 1/2", "-1/2"),
    (r"\frac{1}{2}5", "1/25"), ("1 1/2", "11/2"), (r"\sqrt{2}", "2"), (r"\infty", r"-\infty"),
    ("3:00 PM", "3:00 AM"), ("12:00", "1:00"),
    # order and brackets
    ("2,3", "3,2"), ("3,2", "(3,2)"), (r"\{3,2\}", "(3,2)"), ("[0,1]", "[0,1)"),
    (r"\{1,1,2\}", r"\{1,2,2\}"), (r"(1, \pm 2)", r"\{1, 2, -2\}"),
    # hedging and spam
    ("5 or 6", "5"), ("5; 6", "5"), (r"\pm 5", "5"), ("1, 2, 3, 4, 5", "5"), ("not 5", "5"),
    (r"5\text{ or more}", "5"), (r"A\text{ B C D}", "A"), (r"\text{A}\text{ B}", "A"),
    ("5 apples and 3 pears", "5"), ("x", "y"), ("", "5"),
    # work left to the checker
    ("(9+1)", "10"), ("2*5", "10"), ("2^3", "8"), ("5!", "120"), ("5x=10", "2"), (r"\sqrt{4}", "2"),
    ("10^{400}", "10"),
    # words and names that change the value
    ("5 million", "5"), ("3 fourths", "3"), ("5 squared", "5"), ("5 cm", "5 miles"), ("x=5", "y=5"),
    (r"2\text{i}", "2"), (r"\sqrt{x}=5", "5"), (r"\frac{1}{x}=5", "5"), ("5x+4=0", "0"), ("5 xy", "5"),
    (r"2\sin 3", "2"), ("4 mod n", "4"), ("5 apples 0", "50"), (r"2\mathbf{i}", "2"),
    # sums are reordered only where that is sound
    ("x+y=2", "y=2+x"), ("x^{-2}-y^{-3}", "x^{-3}-y^{-2}"), ("2020-01-02", "2020-02-01"), ("a-b", "b-a"),
    ("r^2", "R^2"), ("2k", "2K"), (r"\sqrt\frac12", r"\sqrt{1}/2"), (r"x^\frac12", "x^1/2"),
    # what int(), float() and Fraction() would take, and division by zero
    ("٣", "3"), ("５", "5"), ("1_000", "1000"), ("1/0", "0"), ("0/0", "0"), ("nan", "nan"), ("inf", "inf"),
    # wrong verdicts that we know of: no algebra, coefficients stay put, as many names as the gold or none
    ("e^{-x}", r"\frac{1}{e^x}"), (r"\frac{3}{4}\sqrt{3}", r"\frac{3\sqrt{3}}{4}"),
    (r"x=2 \text{ or } x=-2", r"x = \pm 2")]


@pytest.mark.parametrize("given, gold, reward", [
    *((given, gold, 1.0) for given, gold in SAME), *((given, gold, 0.0) for given, gold in DIFFERENT)])
def test_one_value_in_two_spellings_matches_and_nothing_else_does(given, gold, reward):
    """Near misses, hedges, unfinished work and look-alikes earn nothing; either side may be the gold."""
    assert answers_match(given, gold) == answers_match(gold, given) == bool(reward)
    assert math_reward(rf"Hence $\boxed{{{given}}}$.", gold) == reward


@pytest.mark.parametrize("answer, gold", [
    ("72", "72"), (72, "72"), (72.0, "72"), (0.5, "0.5"), (-3, "-3"), (r"\boxed{\frac12}", r"\frac12"),
    ("reasoning\n#### 1,000", "1,000"), (r"Long solution, so $x = \boxed{5}$.", "5"), (r"\infty", r"\infty"),
    (r"\text{east}", r"\text{east}"), ("infinitely many solutions", "infinitely many solutions"),
    *((answer, None) for answer in (
        "", " ", "$$", "?", "#### ", r"\boxed{}", "Answer is forty two.", "proof", "notfound", "Proof.",
        float("nan"), float("inf"), r"\frac{1}{2", "7" * (MAX_ANSWER + 1)))])
def test_gold_answers_are_unwrapped_or_refused(answer, gold):
    """As text, without its box, it matches itself; None, and never rewarded, if no completion can match."""
    assert parse_gold(answer) == gold
    assert answers_match(gold or str(answer), str(answer)) == (gold is not None)


MILLION = 10**6
HOSTILE = {
    "letters": "a" * MILLION, "backslashes": "\\" * MILLION, "null bytes": "\0" * MILLION,
    "open braces": "{" * MILLION, "closed braces": "}" * MILLION, "line ends": "\r\n" * 500_000,
    "hash marks": "#" * MILLION, "markers": "#### " * 200_000, "answer is": "answer is " * 100_000,
    "almost answer is": "answer" * 160_000 + " " * 40_000,
    "thinking": "<think>" * 140_000, "thoughts ended": "</think>" * 120_000,
    "unfinished boxes": r"\boxed{" * 100_000, "nested boxes": r"\boxed{" * 10_000 + "6" + "}" * 10_000,
    "many boxes": r"\boxed{5}" * 100_000 + r"\boxed{6}", "no brace": (r"\boxed" + " " * 9) * 60_000,
} | {name: rf"\boxed{{{text}}}" for name, text in {
    "digits": "9" * MILLION, "digits up to the cap": "9" * MAX_ANSWER, "Python": "exit(5)",
    "a power tower": "9**9**9", "a LaTeX power tower": "2003^{2002^{2001}}",
    "a huge exponent": "1e999999999", "a negative huge exponent": "1e-999999999",
    "nested parentheses": "(" * 149 + "1" + ")" * 149, "nested lists": "[" * 149 + "1" + "]" * 149,
    "deeper than the cap": "(" * 100_000 + "5" + ")" * 100_000,
    "nested fractions": r"\frac{1}{" * 30 + "2" + "}" * 30, "plus-minus": "±" * 299,
    "many sets": r"\{" + "1," * 140 + r"\}", "blanks": " " * 299, "names": "x=" * 149,
    "units": "5" + " abc" * 74 + "!", "thousands": "1,000" * 59 + "!",
    "a long word": "x" * 10**6, "a zero denominator": "5/0",
    "Arabic digits": "٥", "a lone surrogate": "\ud800",
}.items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_judged_in_bounded_time(name):
    """No text raises, hangs or earns a reward; the worst takes 0.1 s, 2 s leave room on a busy machine."""
    start = time.process_time()
    assert math_reward(HOSTILE[name], "5") == 0.0
    assert not answers_match(HOSTILE[name], "5")
    assert len(without_cut_word(HOSTILE[name])) <= len(HOSTILE[name])
    assert time.process_time() - start < 2
    parse_gold(HOSTILE[name])


@pytest.mark.parametrize("gold", [None, ["5"], True, {"a": 5}])
def test_a_gold_answer_of_another_kind_is_refused(gold):
    """It would be a reward of 0 for ever. What no box can hold is none; an integer is text."""
    with pytest.raises(TypeError, match="text or a number"):
        math_reward("So \\boxed{5}.", gold)
    assert math_reward("So \\boxed{5}.", 5) == 1 and parse_gold("5 </think>") is None


def test_only_the_last_box_within_the_window_counts():
    """Boxing every candidate earns nothing; a completion is read from its end, up to MAX_TEXT characters."""
    boxes = "".join(rf"\boxed{{{n}}}" for n in range(20_000))
    assert math_reward(boxes, "19999") == 1.0
    assert math_reward(boxes, "19998") == 0.0
    assert math_reward(r"\boxed{5}" + " " * (MAX_TEXT - 9), "5") == 1.0
    assert math_reward(r"\boxed{5}" + " " * MAX_TEXT, "5") == 0.0


def test_random_latex_never_raises_and_matching_is_symmetric():
    """On random token soup the verdict is 0 or 1, an answer matches itself, and sides may be swapped."""
    tokens = (r"\frac \sqrt \text \boxed{ \left \right \pm \pi \{ \} \, \! \circ \% \$ { } ( ) [ ] , ; = + "
              r"- * / ^ _ ~ . : 0 1 2 10 1,000 0.5 e x i cm apples and \in ± ∞ − #### </think>").split(" ")
    rng = random.Random(0)
    tokens += ["answer is", " ", "\n"]
    soups = ["".join(rng.choices(tokens, k=rng.randrange(1, 12))) for _ in range(3000)]
    for given, gold in zip(soups, soups[1:]):
        assert math_reward(given, gold) in (0.0, 1.0)
        # An answer with a box or #### inside is unwrapped as gold only: no symmetry is promised there.
        if parse_gold(given) == given and parse_gold(gold) == gold:
            assert answers_match(given, given)
            assert answers_match(given, gold) == answers_match(gold, given)


# (gold, answer) of the public cases on which we differ, and why. A case that starts to pass must leave.
PUBLIC_LIMITATIONS = {
    ("1000.99", "the number is not 10 which is 1,000.99€"): "nothing is dug out of prose: it pays guessing",
    ("1000.99", "1000,99"): "a comma is a separator, and 1000,99 a list of two",
    ("$10$", r"Answer \( (9+1) \)"): "no sum is computed for the model: it pays copying the question",
}


@needs_data
def test_published_faults_of_verifiers_are_none_here():
    """Of the bug reports all; of answers at the end of a sentence all but one that is written out in words
    and those that may be no statement ("72?", "72!", "72 and that is it")."""
    folder = DATA / "cases" / "faults"
    for row in read_lines(folder / "reward_cases.jsonl"):
        assert math_reward(row["text"], row["gold"]) == row["right"], row
    rows = read_lines(folder / "answers_at_the_end_of_a_sentence.jsonl")
    wrong = [row["text"] for row in rows if not row.get("debatable")
             and math_reward(row["text"], row["gold"]) != row["right"]]
    assert len(rows) > 300 and wrong == ["The answer is seventy-two"]


def test_a_word_that_the_limit_cut_is_no_answer():
    """It may have gone on; a box that closed is whole."""
    for text, answer in (("#### 1", "1"), ("The answer is 12", "12"), (r"\boxed 5", "5")):
        assert math_reward(text, answer) == 1.0 and math_reward(without_cut_word(text), answer) == 0.0
    for text in ("#### 12\n", r"\boxed{12}", "The answer is 12. And so"):
        assert math_reward(without_cut_word(text), "12") == 1.0


@needs_data
def test_public_verifier_cases_agree_except_the_listed():
    """Of the 67 cases of Math-Verify, hendrycks/math and TRL, our verdict differs on the listed ones only."""
    cases = json.loads((DATA / "verifier_cases.json").read_text(encoding="utf-8"))
    differing = set()
    for case in cases:
        # The suites compare bare expressions: without an anchor, the whole text is the answer.
        given = extract_answer(case["answer"]) or case["answer"]
        if case["equal"] is not None and answers_match(given, case["gold"]) != case["equal"]:
            differing.add((case["gold"], case["answer"]))
    assert len(cases) == 67 and differing == PUBLIC_LIMITATIONS.keys()


@needs_data
def test_on_math500_right_answers_are_rewarded_and_others_are_not():
    """All 500 human solutions; none with a digit of the gold changed; of the golds only respellings match."""
    problems = json.loads((DATA / "math500" / "math500_test.json").read_text(encoding="utf-8"))
    assert [math_reward(problem["solution"], problem["answer"]) for problem in problems] == [1.0] * 500
    golds = sorted({problem["answer"] for problem in problems})
    wrongly_rewarded = []
    for gold in golds:
        for digit in re.finditer("[0-9]", gold):
            changed = gold[:digit.start()] + str((int(digit[0]) + 1) % 10) + gold[digit.end():]
            if math_reward(rf"\boxed{{{changed}}}", gold):
                wrongly_rewarded.append((gold, changed))
    assert wrongly_rewarded == []
    plain = re.compile(r"-?(?:[0-9]+|\\d?frac\{[0-9]+\}\{[0-9]+\})")  # thousands of pairs, all of one kind
    golds = [gold for gold in golds if not plain.fullmatch(gold)]
    pairs = {(a, b) for i, a in enumerate(golds) for b in golds[i + 1:] if answers_match(a, b)}
    assert len(golds) > 100 and pairs == {(r"2 \sqrt{5}", r"2\sqrt{5}"), (r"36^\circ", r"\$36")}


@needs_data
@pytest.mark.parametrize("split, count", [("train", 7473), ("test", 1319)])
def test_on_gsm8k_human_answers_are_rewarded_and_those_of_other_problems_are_not(split, count):
    """1.0 against the number behind their own `####`, and against a random problem's only if it agrees."""
    answers = [row["answer"] for row in read_lines(DATA / "gsm8k" / f"{split}.jsonl")]
    golds = [answer.rpartition("#### ")[2] for answer in answers]
    assert [math_reward(answer, gold) for answer, gold in zip(answers, golds)] == [1.0] * count
    others = random.Random(0).sample(golds, len(golds))
    for answer, gold, other in zip(answers, golds, others):
        same = int(gold.replace(",", "")) == int(other.replace(",", ""))
        assert math_reward(answer, other) == float(same)
