r"""Verifiable reward: 1.0 when the final answer of a completion equals the gold answer, else 0.0.

`extract_answer` finds what the model committed to, `answers_match` compares it with the gold answer, and
`parse_gold` tells a loader beforehand whether a gold answer can be checked at all.

A policy optimises whatever this file accepts, so a wrong answer rewarded costs more than a right one missed:
  - nothing is dug out of prose: without a box, `####` or "answer is", there is no answer;
  - nothing is computed for the model: `\frac{6}{4}` is the number 3/2, but `(9+1)` is not 10, for otherwise
    copying the question's expression would be paid like solving it;
  - numbers are exact (`fractions.Fraction`), so 0.333 is not 1/3.

Model text is never evaluated and no timeout is needed: the scans over a completion are linear, and whatever
looks closer sees at most MAX_ANSWER characters, which bounds digits and nesting as well.
"""
import numbers
import re
import unicodedata
from collections import Counter
from fractions import Fraction
from itertools import accumulate

MAX_TEXT = 1_000_000 # characters read, counted from the end
MAX_ANSWER = 300     # characters of an answer; the longest gold answer of MATH-500 has 53

# ---- 1. Extraction: what did the model commit to?

# The tokens that matter for matching braces; `\\.` swallows `\{` and `\}`, which open and close nothing.
BOX_TOKEN = re.compile(
    r"\\(?:boxed|fbox)(?![a-zA-Z])\s{0,9}(?:(\{)|([-+.]?[0-9][^\s{}$\\]{0,99})|())|\\.|[{}]", re.S)

# Weaker anchors, in order of trust; each also skips the decoration between itself and the answer.
ANCHORS = [re.compile(anchor + r"(?:[\s:*]|\\[\[(]){0,20}", re.I) for anchor in (
    "####+", r"(?:<answer>|# (?:final )?answer\n"
    r"|answer(?:\s{1,9}is\b|\*{0,2}:|\*{0,2}\s{0,9}(?=\\[\[(]|\$)))")]
# End of a line or sentence, a closing tag, a special token; prose that goes on: "42 (6 times 7), since ...".
ANSWER_END = re.compile(
    r"\n|\.[\"”)*]{0,2}\s|。|</|<\||,?\s(?:because|since|which|so|is)\b|\s[-–—]\s(?=[a-z]+ [a-z]+)"
    r"|(?<=[0-9$%])\s\((?=[a-zA-Z]|[^()]{0,99}[a-z]{2})")


def _last_box(text):
    """Content of the box that starts last, "" if it never closes, None without a box; one pass, whatever the
    nesting."""
    answer, answer_start = None, -1
    open_braces = []
    first = re.search(r"(?<!\\)\\+(?:boxed|fbox)", text)  # a megabyte of braces has none, and is passed over
    for token in BOX_TOKEN.finditer(text, first.start()) if first else ():
        if token[2] or token[3] is not None:          # \boxed 5, or a box that holds nothing
            answer, answer_start = token[2] or "", token.start()
        elif token[1] or token[0] == "{":
            open_braces.append(token)
        elif token[0] == "}" and open_braces:
            opener = open_braces.pop()
            # A box around a box closes later but starts earlier: the inner one stands.
            if opener[1] and opener.start() > answer_start:
                answer, answer_start = text[opener.end():token.start()], opener.start()
    unclosed = [opener for opener in open_braces if opener[1] and opener.start() > answer_start]
    return "" if unclosed else answer


def extract_answer(text: str) -> str | None:
    r"""Return the final answer that a completion states, or None when it states none.

    That is the last balanced `\boxed{}` or `\fbox{}`, else what follows the last `####`, else the last
    "answer is", "answer:" or `<answer>`. Only text after the last `</think>` counts: a completion cut off
    while thinking has no answer. Neither has one whose last box is empty.

    >>> extract_answer(r"First \boxed{4}, no: \boxed{x = 5}."), extract_answer("2+3 = 5\n#### 5")
    ('x = 5', '5')
    >>> extract_answer("<think> The answer is 5. </think> I do not know.") is None
    True
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    text = text[-MAX_TEXT:]
    answer = _last_box(text)
    for anchor in ANCHORS:
        ends = [match.end() for match in anchor.finditer(text)] if answer is None else []
        if ends:
            answer = ANSWER_END.split(text[ends[-1]:], maxsplit=1)[0]
    return (answer or "").strip() or None


def without_cut_word(text: str) -> str:
    """Return what a completion says that the length limit cut: "#### 1" may have been on its way to 12.

    >>> without_cut_word("So 12.\\n#### 1"), without_cut_word(r"It is \\boxed{12}")
    ('So 12.\\n#### ', 'It is \\\\boxed{12}')
    """
    size = re.match(r"[^\s}]*", text[::-1]).end()
    return text[:len(text) - size]


# ---- 2. Normal form: one answer, many spellings

END = r"(?![a-zA-Z])"                                # where the name of a LaTeX command ends
INTEGER = r" ?(?:([0-9])|\{([+-]?[0-9]+)\})"         # an argument of \frac, with or without braces

# Applied from top to bottom. `~` marks what was set as text: `5\text{ m}` has a unit, `5 m` a variable.
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"[\u200b-\u200d\u2060\ufeff]", ""),
    (r"[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]", lambda sign: " " + unicodedata.normalize("NFKC", sign[0]).replace("⁄", "/")),
    (r"[−–]", "-"),
    (r"π", r"\\pi"),
    (r"∞", r"\\infty"),
    (r"\\pm" + END, "±"),
    (r"(?:\\times|\\cdot)" + END + "|×|·", "*"),
    (r"\\in" + END + "|∈", "="),                                     # `x \in` and `x =` both name a value
    (r"\\[dtc]frac" + END, r"\\frac"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)" + END + r"|\\!\s*", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad|~|\s+", " "),
    (r"\^ ?\{? ?\\circ ?\}?|°|\\?%|\\?\$|[€£]|(?<!\\)\\[\[\]()]", ""),     # 28% is 28, $5 is 5, 90° is 90
    (r"\\([{}])", r"\1"),
    (r" ?\\(?:text[a-z]*|[mh]box|mathrm) ?\{([^{}]*)\}", r"~\1"),
    (r" ?\\(?:math(?:bf|it|sf)|operatorname) ?\{([^{}]*)\}", r" \1"),
    (r"\{ ?([^{}\\ ]|\\[a-zA-Z]+) ?\}", r"\1"),                           # x^{2} is x^2, 1{,}000 is 1,000
    (r"[ ~,]+or[ ~]+", " | "),                                             # in any order
    (r"[ ~,]+and[ ~]+", ", "),
    # 1,000 and 1 000 are one number; `1, 000` and (1,000) are two, as lists are spaced or bracketed.
    (r"(?<![0-9.,(\[{])[0-9]{1,3}([, ])[0-9]{3}(?:\1[0-9]{3})*(?!,?[0-9]|/)",
     lambda number: re.sub("[, ]", "", number[0])),
    (r" ?([-+*/=<>,;:^_(){}\[\]]) ?", r"\1"),
    (r"(?<![a-zA-Z^_])\\frac" + INTEGER * 2 + r"(?!\.?[0-9])", r" \1\2/\3\4"),   # 1\frac{3}{4} is 1 3/4
    (r"(?<=[0-9])\*10\^(?:\{([+-]?[0-9]{1,2})\}|([0-9]))(?![0-9])", r"e\1\2"),
    (r"\A10\^(?:\{([0-9]{1,2})\}|([0-9]))\Z", r"1e\1\2"),
)]

# Sign, whole part of a mixed number, decimal, exponent, denominator. [0-9], as \d takes any script's digits.
NUMBER = re.compile(r"([+-]?) ?(?:([0-9]+) (?=[0-9]+/[0-9]))?([0-9]+\.?[0-9]*|\.[0-9]+)"
                    r"(?:[eE]([+-]?[0-9]{1,2}))?(?:/([+-]?[0-9]+\.?[0-9]*))?")
# What may precede a value and only names it: `x=`, `(p,q)=`, `f(2)=`, `V_1:V_2=`; not `5x+4=` or `\sqrt x=`.
NAME = re.compile(r"(?<![^,;(\[{])\(?(?!\\(?:frac|sqrt))[A-Za-z\\][A-Za-z0-9\\_(),: ]{0,30}=")
# What may follow a value and only measures it. Words that change a value are no units: 5 million is not 5.
UNIT = re.compile(
    r"(?:(?<=[0-9}])|(?<=\\pi))(?:~ ?| (?=[A-Za-z]{3}|[ckm][gm]|ft|[CFKVWNJL]\b))"
    r"(?!hundred|thousand|[mbtr]+illion|dozen|squared|cubed|factorial|sin|cos|tan|log|sqrt|mod|[ei]\b"
    r"|hal[fv]|third|fourth|quarter|fifth|sixth|seventh|eighth|ninth|tenth)"
    r"([A-Za-z][A-Za-z ~/]*(?:\^[23])?)(?![^,;)\]}])")
# A choice with its text: `E: seven`, `(E) 12`.
CHOICE = re.compile(r"\(?([A-Z])(?:\)|:).+")
# A formula whose top-level terms may be reordered: it has letters, and no relation or matrix.
SUM = re.compile(r"(?=.*[A-Za-z])(?:[A-Za-z0-9.*/^_+(){}-]|\\(?:sqrt|frac|pi)" + END + ")+")


def _clean(text):
    """The text after all rewrites, without the punctuation around it."""
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    quoted = re.fullmatch(r"'(.*)'[.]?", text)
    text = (quoted[1] if quoted else text).lstrip(" ~*:_`\"“").rstrip(" ~*.,;:_`\"”。")
    while text.endswith(")") and text.count(")") > text.count("("):   # of the sentence around it
        text = text[:-1].rstrip(" ~*.,;:_`\"”。")
    return text


def _depths(text):
    """Bracket depth after each character; `[0,1)` is as good a pair as `(0,1)`."""
    return accumulate((char in "([{") - (char in ")]}") for char in text)


def _split(text, separators):
    """Cut at the separators outside all brackets: `1,(2,3)` at `,` gives `1` and `(2,3)`."""
    pieces = [""]
    for char, depth in zip(text, _depths(text)):
        if depth == 0 and char in separators:
            pieces.append("")
        else:
            pieces[-1] += char
    return pieces


def _scalar(text):
    """A Fraction if the text is a number, else a string in which equal formulas look equal."""
    number = NUMBER.fullmatch(text)
    if number and (number[5] is None or Fraction(number[5])):
        sign, whole, decimal, exponent, denominator = number.groups()
        value = Fraction(decimal) * Fraction(10) ** int(exponent or 0) / Fraction(denominator or 1)
        return (value + int(whole or 0)) * (-1 if sign == "-" else 1)
    text = text.replace(" ", "").replace("~", "")
    if text.isalpha():
        return text.casefold()                        # words only: R^2 is not r^2
    if SUM.fullmatch(text):
        terms = _split(re.sub(r"(?<=[\w)}])([+-])", r" \1", text), " ")
        return "".join(sorted("+" + term.lstrip("+") for term in terms))
    return text


def _parse(text):
    """A scalar, or (brackets, items): `(1,2]` is ("(]", (1, 2)); a bare list has brackets ""."""
    text = text.strip(" ~")
    brackets = ""
    if text[:1] in ("(", "[", "{") and 0 not in list(_depths(text))[:-1] and text[-1] in ")]}":
        brackets = text[0] + text[-1]
        text = text[1:-1]
    pieces = _split(text, ",;|")
    if brackets == "()" and len(pieces) == 1:
        return _parse(text)                           # grouping, not a tuple
    if brackets in ("", "{}") and "±" in text:        # 1 ± 2 is the set of 1+2 and 1-2
        brackets = "{}"
        pieces = [piece.replace("±", sign) for piece in pieces for sign in ("+-" if "±" in piece else "+")]
    if not brackets and len(pieces) == 1:
        return _scalar(text)
    brackets = brackets or "{}" * ("|" in text)       # 5 or 7
    return brackets, tuple(_parse(piece) for piece in pieces)


def _as_list(parsed):
    """(brackets, items), a scalar being a bare list of one."""
    return parsed if isinstance(parsed, tuple) else ("", (parsed,))


# ---- 3. Comparison

# No gold answer: the fillers of NuminaMath-1.5, floats without a value, sentences of four words or more.
NO_GOLD = re.compile(r"proof|notfound|nan|-?inf|[a-z'’,-]+(?:[ ~]+[a-z'’,-]+){3,}", re.I)


def parse_gold(answer: str | int | float) -> str | None:
    r"""Return the gold answer without its wrapping, or None when no completion could be checked against it.

    Unwraps `\boxed{}` and `####`, and writes 72.0 as 72. Refused: no letter or digit, over MAX_ANSWER
    characters, what no box can hold, sentences of four words or more, fillers such as "proof". A loader calls
    this once per row: a row with an unusable gold answer would have reward 0 for ever. TypeError for what is
    neither text nor a number: None, a list, a tensor.

    >>> parse_gold(r"\boxed{\pi}"), parse_gold(72.0), parse_gold("Answer is forty two."), parse_gold("")
    ('\\pi', '72', None, None)
    """
    if isinstance(answer, bool) or not isinstance(answer, str | numbers.Number):
        raise TypeError(f"a gold answer is text or a number, not {answer!r:.60}")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    text = str(answer)[-MAX_TEXT:].rpartition("####")[2]
    box = _last_box(text)
    text = (text if box is None else box).strip()
    plain = _clean(text) if len(text) <= MAX_ANSWER else ""
    if not any(char.isalnum() for char in plain) or NO_GOLD.fullmatch(plain):
        return None
    return text if extract_answer(rf"\boxed{{{text}}}") == text else None


def answers_match(given: str, gold: str) -> bool:
    r"""Return whether two answers are the same in whatever spelling; False if the gold cannot be checked.

    Numbers compare exactly; tuples, intervals and lists in order; sets and `\pm` in any order; sums in any
    order of their terms; words without case; other formulas as strings. A unit or a name that one side alone
    gives is ignored (`x = 5` is 5), two that differ are not. Percent signs, degrees, currencies are dropped.

    >>> answers_match(r"x = \dfrac{7}{4}", "1.75"), answers_match(r"\{3, -1\}", r"\{-1, 3\}")
    (True, True)
    >>> answers_match("5 cm", "5"), answers_match("5 cm", "5 miles"), answers_match("[0,1)", "(0,1)")
    (True, False, False)
    """
    gold = parse_gold(gold)
    if gold is None or len(given) > MAX_ANSWER:
        return False
    given, gold = _clean(given), _clean(gold)
    for letter, other in ((given, gold), (gold, given)):
        choice = CHOICE.fullmatch(other)
        if choice and re.fullmatch(r"\(?[A-Z]\)?", letter):
            return choice[1] == letter.strip("()")
    for aside in (NAME, UNIT):
        in_given, in_gold = aside.findall(given), aside.findall(gold)
        if in_given == in_gold or not in_given or not in_gold:
            given, gold = aside.sub("", given), aside.sub("", gold)
    brackets, items = _as_list(_parse(given))
    gold_brackets, gold_items = _as_list(_parse(gold))
    # Once one side is a set, order is free and the other may be a bare list or scalar.
    is_set = "{}" in (brackets, gold_brackets)
    if is_set and brackets in ("", "{}") and gold_brackets in ("", "{}"):
        return Counter(items) == Counter(gold_items)
    return brackets == gold_brackets and items == gold_items


def math_reward(completion: str, answer: str) -> float:
    r"""Return 1.0 if the final answer of a completion equals the gold answer, else 0.0; raises on no text.

    >>> math_reward(r"She is left with \boxed{\frac{3}{4}} of it.", "0.75"), math_reward("It may be 5.", "5")
    (1.0, 0.0)
    """
    given = extract_answer(completion)
    return float(given is not None and answers_match(given, answer))


def math_verify_reward(completion: str, answer: str) -> float | None:
    """Return the verdict of the math-verify library (optional), None when it cannot read the gold answer.

    As in `math_reward` only what follows the thinking counts. ValueError without the package.
    """
    try:
        import math_verify
    except ImportError:
        raise ValueError("math_verify is not installed: pip install math-verify") from None
    gold = math_verify.parse(f"${answer}$")
    if not gold:
        return None
    text = completion.rpartition("</think>")[2]
    is_thinking = "<think>" in text
    return float(not is_thinking and math_verify.verify(gold, math_verify.parse(text[-MAX_TEXT:])))
