r"""Where an anchor may end: at places where a person would pause, before the trace states its answer.

    <think>                                                    an anchor shows more than this
    Half of 48 is 24.                       <- cut
                                            <- cut
    Then 48 + 24 is 72, that is             <- the statement: no cut behind it

The policy is paid for the answer, so an anchor that states it would teach copying. A value counts as stated
where it is claimed ("= 72", "gives **72**", "comes to 72"), in whatever spelling; a mention ("Step 3", "is it
3?", "is 3 + 4") is mostly another quantity and ends nothing. docs/ANCHORS.md has what that comes to on public
traces. Patterns are linear in the trace; what they find is compared in at most 400 characters.
"""
import functools
import itertools
import math
import re
from bisect import bisect_left, bisect_right

# The coarsest first: blank lines, line ends, sentence ends. "3! x" ends no sentence.
SEPARATORS = [re.compile(text) for text in (
    r"\n[ \t\r]*\n\s*", r"\n\s*", r"(?:[.?][\"')\]]*\s+|![\"')\]]*\s+(?=[A-Z])|[。！？])")]
# Nobody pauses inside: code, drawings, environments, formulas. A "$" is a formula's by Pandoc's rule, which
# leaves "$5 and $6" alone: no blank behind the first, none before the second, and no digit behind it.
CLOSED = re.compile(
    r"```.*?(?:```|\Z)|\[asy\].*?(?:\[/asy\]|\Z)|\\begin\{(\w+\*?)\}.*?(?:\\end\{\1\}|\Z)|\$\$.{1,2000}?\$\$"
    r"|\\\[.{1,2000}?\\\]|\\\(.{1,400}?\\\)"
    r"|(?<!\\)\$(?=\S)(?:[^$\n\\]|\\.|\n(?!\n)){1,400}?(?<=\S)\$(?![0-9])", re.S)

# ---- What claims a value: a sign or a word, some words between, decoration.
SIGNS = (r"(?<!\s!)(?<!\+)=>?|[≈≡>→⇒⟹∴∈]|->|等于|得到|答案是|\\(?:to|in|approx|(?:[Ll]ong)?[Rr]ightarrow|implies"
         r"|equiv|therefore)(?![a-zA-Z])|\b(?:[Ii]t|[TtWw]hat|[Tt]?[Hh]ere|answer|result|total)['’]s\b")
WORDS = (r"\b(?:is|are|was|were|(?<!not )(?<!cannot )(?<!n['’]t )be|been|being|becom(?:es?|ing)"
         r"|equal(?:s|ling)?|giv(?:es?|ing)|gave|gets?|getting|got|mak(?:es?|ing)|yield(?:s|ing)?"
         r"|leav(?:es|ing)|finds?|found|returns?|obtain(?:s|ed|ing)?|costs?|pays|[Ss]o|[Tt]hus|[Hh]ence"
         r"|[Tt]herefore|total of|in total|left with|arriv(?:e|es|ing) at|end(?:s|ing)? up (?:at|with|as)"
         r"|(?:com(?:es?|ing)|came|adds?|sums?|simplif(?:y|ies)|reduces?|evaluates?|amounts?|works?|rounds?)"
         r"(?: up| out| down)? to|comes? out (?:at|as)|result(?:s|ing)? in)\b")
HEADS = (r"\b(?:[Aa]nswer|ANSWER|[Rr]esult|[Tt]otal|[Ss]olution)(?:\W{0,4}:|\*{0,2}\s*\n|\s[-–—]\s"
         r"|(?=\s*(?:\$|\\[(\[])))|####")
BETWEEN = (r"(?:,?\s+(?:to|about|around|roughly|nearly|approx(?:imately|\.)?|exactly|precisely|just|simply"
           r"|only|indeed|really|again|then|thus|therefore|still|actually|now|also|always|likely|probably"
           r"|definitely|clearly|us|me|you|equal to|a total of|the number|the answer|option|it is|it['’]s"
           r"|we get)\b){0,3}")
DECORATION = r"(?:[\s$\\*_:,(\[{~€£\"'`“‘]|<b>){0,20}(?<!\\)"
# Alone between two of these a value is claimed by being there.
FRAMES = {"**": "**", "$$": "$$", "\\[": "\\]"}
CLAIM = re.compile(f"(?:{SIGNS}|{WORDS}|{HEADS}){BETWEEN}{DECORATION}"
                   r"|\*\*(?=[^*\n]{1,80}\*\*)|(?:\$\$|\\\[)\s*")
AGREED = re.compile(
    r"(?<![\w.,/-])(-?[\w$./\\{}]{1,40}) (?:it is|checks out|(?:is|must be|should be|seems|looks) (?:indeed"
    r" )?(?:right|correct|(?:the|our|my) (?:final |correct )?(?:answer|result|total|value|solution)))\b")
# ---- Where the value may end, unless the expression goes on or is a question.
VALUE_END = re.compile(
    r"(?=[\s=≈;!?)\]}$*|<\"'`’”%°€£~。，；_]|\.(?![0-9])|[,:](?![0-9]|\\!|\})|/(?=[a-zA-Z])|\^\{?\\circ"
    r"|(?<=[0-9])(?!st\b|nd\b|rd\b|th\b)(?:[a-zA-Z]{2}|[gmLhs]\b)"
    r"|\\(?:text|mathrm|q?quad|mbox|right|end\{|(?![a-zA-Z{])))|\Z")
GOES_ON = re.compile(
    r"[ \t]?(?:[+×·÷≤≥√]|_(?=[\w{])|<(?!/)|\^(?!\{?\\circ)|\*(?=[ \t]*[\w\\(])|/(?![a-zA-Z])|x\s*[0-9]"
    r"|[-−–](?!-|\s+[a-zA-Z]{2})|![ \t]*[-+*/×=)$\\a-z]|[a-zA-Z]{1,9} ?&? ?(?:[+*^]|-\s?[0-9])"
    r"|(?:times|plus|minus|mod|divided by|multiplied by)\s+[0-9]"
    r"|\\(?:times|cdot|div|[dt]?frac|[dt]?binom|sqrt|pi|[lg]eq?|pm|sin|cos|tan|log|ln|alpha|theta|[bp]?mod)"
    r"(?![a-z]))|\(\w|[$*\s)]{0,3}\?")
# ---- Numbers and formulas, however spelled. 1,000 and LaTeX's 1{,}000 and 1,\!000 are one number each.
NUMBER = r"[0-9]+(?:(?:,(?:\\!)?|\{,\})[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+"
# Sign, the whole of a mixed number, numerator, exponent of 10, denominator.
QUANTITY = re.compile(rf"([+-]?)(?:([0-9]+)&)?({NUMBER})(?:e(-?[0-9]{{1,2}}))?(?:/({NUMBER}))?")
NUMERALS = {word: number for number, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty".split()) if number != 1}  # "is one of them"
POWERS = str.maketrans("²³", "23")
PLAIN = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\^\s*\{?\s*\\circ\s*\}?", ""),
    (r"\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{?(-?[0-9]{1,2})\}?", r"e\1"),
    (r"\\(?:text[a-z]*|mathrm|mathbf|mbox|operatorname|left|right|cdot|times|circ)(?![a-z])", ""),
    (r"\\\\|\\[!,;: ]", ""), (r"√", "sqrt"), (r"π", "pi"), (r"∞", "infty"), (r"[−–]", "-"),
    (r"\^?²", "^2"), (r"\^?³", "^3"), (r"\\sqrt\s*\{([^{}]*)\}", r"sqrt\1"), (r"(?:,\s*|\s+)and\s+", ","),
    (r"([0-9])\s*(?=\\[dtc]?frac)|([0-9])\s+(?=[0-9]+/[0-9])", r"\1\2&"),
    (r"\\[dtc]?frac\s*(\{[^{}]*\}|[0-9])\s*(\{[^{}]*\}|[0-9a-z])", r"\1/\2"), (r"[\s$\\(){}\[\]*×·°%]", ""))]


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
    closed = [match.span() for match in CLOSED.finditer(trace)]
    starts = [start for start, _ in closed]
    cuts = set()
    for separator in SEPARATORS:
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


def first_statement(trace, answer, matches):
    """Character position in a trace behind which the answer is known; len(trace) if it never is.

    That is the first box or "</think>", the last "####", or the first value that is claimed and is the
    answer: by `matches(value, answer)`, by its number, or written in plain signs ("sqrt(2)/2"). Of a word,
    such as a name, that is its first mention: nobody says it by chance.
    """
    ends = [match.start() for match in re.finditer(r"\\f?box|</think>|<answer>", trace)][:1]
    ends += [trace.rfind("####")] if "####" in trace else []  # earlier ones are headings: "#### Step 1"
    answer = answer[-300:]
    word = re.fullmatch(r"\W*(?:text[a-z]*\W*)?([^\W\d_]{3,}(?: [^\W\d_]+)*)\W*", answer)
    if word and word[1].lower() not in ("yes", "true", "false", "even", "odd", "none"):
        ends += [match.start() for match in re.finditer(rf"\b{word[1]}\b", trace, re.I)][:1]
    end = min(ends, default=len(trace))
    is_answer = recogniser(answer, matches)
    agreed = (match.start() for match in AGREED.finditer(trace, 0, end) if is_answer(match[1]))
    first = min(agreed, default=end)
    # Limits of sums and the like claim nothing: "i=1" below \\sum.
    trace = re.sub(r"_\{[^{}]{0,40}(?:=|\\to|\\in)[^{}]{0,40}\}", lambda match: "_" * len(match[0]), trace)
    width = min(400, 3 * len(answer) + 60)
    for claim in CLAIM.finditer(trace, 0, first):
        window = trace[claim.end():min(claim.end() + width, end)].partition("\n\n")[0]
        if any(map(is_answer, values(window, FRAMES.get(claim[0].strip()), answer))):
            return claim.end()
    return first


def values(window, closing, answer):
    """Beginnings of a text that may be the value which it states: whole expressions, no questions. Behind an
    opening frame, those that its `closing` ends."""
    most = 5 + min(40, 2 * len(VALUE_END.findall(answer)))
    is_letter = len(answer.strip("()")) == 1 and answer.strip("()").isalpha()
    for match in itertools.islice(VALUE_END.finditer(window), most):
        given = window[:match.start()].rstrip()
        rest = window[match.start():]
        if closing:
            is_whole = rest.lstrip().startswith(closing)
        elif is_letter:  # "A is at": an option or a name stands before a stop
            is_whole = not re.match(r" (?!because|since|which|so|is)[a-z]| ?(?:[+=/^-]|\*(?!\*))", rest)
        else:
            is_whole = not GOES_ON.match(rest)
        if is_whole and given and given[-1] not in "+-*/×·^":
            yield given


def recogniser(answer, matches):
    """A function from text to whether it is the answer (see `first_statement`), cheap where it is not."""
    gold = plain(answer)
    value = quantity(gold)
    # Without its unit, too, whose power has a digit.
    digits = [digits_of(answer), digits_of(re.split(r"\\(?:text|mbox|mathrm)", answer)[0])]

    @functools.cache
    def is_answer(text):
        if value is None and digits_of(text) not in digits:
            return False
        signs = plain(text)
        number = quantity(signs)
        if value is not None and number is not None:
            return math.isclose(number, value, rel_tol=1e-9)
        # Other orders of the same signs are for `matches` to judge, and names and units beside a number.
        is_close = value is None and digits[0] or sorted(signs) == sorted(gold)
        return signs == gold or is_close and matches(text, answer)
    return is_answer


def digits_of(text):
    """The digits of a text, raised ones too, in order of size."""
    return sorted(re.findall("[0-9]", text.translate(POWERS)))


def plain(text):
    """A formula in signs that LaTeX, ASCII and Unicode share, without brackets and blanks; words in small."""
    for pattern, replacement in PLAIN:
        text = pattern.sub(replacement, text)
    return text.lower() if len(text) > 1 else text  # an option A is no article


def quantity(signs):
    """The number that `plain` text spells, "-1/2", "3&1/2" (three and a half), "1.5e8", "twelve", or None."""
    match = QUANTITY.fullmatch(signs)
    if match is None:
        return NUMERALS.get(signs)
    top, bottom = (float(re.sub("[^0-9.]", "", part or "1")) for part in match.group(3, 5))
    size = int(match[2] or 0) + top * 10.0 ** int(match[4] or 0) / (bottom or math.nan)
    return -size if match[1] == "-" else size
