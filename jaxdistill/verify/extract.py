r"""Finds the final answer of a response, without knowing the gold answer.

Only text after the last `</think>` counts: a box that stands in the thinking alone is no answer. Then, in this order:
the last `\boxed` or `\fbox`; the last `####`; the last "the (final) answer is" or "Answer:"; the last `A:`. The last
number of a text is never taken. One scan of the text finds the boxes, and every regex is linear.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

from jaxdistill.verify.notation import trim

MAX_CONTENT = 20_000
"""Characters of the content that are read, from its end: a final answer stands there."""


@dataclass(frozen=True)
class Extraction:
    """A final answer, or the reason why there is none."""

    answer: str | None
    reason: str = ""
    tail: str = ""
    """What follows the answer."""


def extract_answer(response: str) -> Extraction:
    """The final answer of a response, thinking included."""
    content = response.rpartition("</think>")[2]
    if "<think>" in content:
        return Extraction(None, "truncated")
    content = content[-MAX_CONTENT:].strip().replace("\u2019", "'")
    if _NEXT_QUESTION.search(content):
        return Extraction(None, "goes on with another question")
    found = _from_box(content) or _from_hashes(content) or _from_statement(content)
    if found is None or found.answer == "":
        return Extraction(None, "no answer found")
    if found.answer is not None and _TAKEN_BACK.search(found.tail):
        return Extraction(None, "taken back")
    return found


def later_statement(tail: str) -> Extraction | None:
    """The answer that is stated in what follows an answer; None if there is none."""
    return _from_hashes(tail) or _from_statement(tail)


_NEXT_QUESTION = re.compile(r"\n[ \t]*(?:Q|Question):")  # a base model that invents the next few-shot example
_TAKEN_BACK = re.compile(r"\b(?:wait|wrong|incorrect|mistaken|mistake|not (?:correct|right))\b", re.I)

# ---------------------------------------------------------------------------------------------------- boxes

_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{?)|\\.|[{}]", re.DOTALL)
_BEFORE, _AFTER, _GAP = 60, 60, 40  # characters around a box that are looked at
_DELIMITERS = re.compile(r"\\[()\[\]]|\\(?:text|mathrm|quad|qquad)(?![A-Za-z])|\\[,;: ]|[$*{}]")
_NOT_THIS = re.compile(r"(?:\bnot|n't|\bnever|\\neq?|≠)(?: equal(?: to)?| be| =)?\s*$", re.I)
_UNSURE = re.compile(r"\b(?:or|either|maybe|perhaps|possibly|probably)\s*$", re.I)
_OPERATOR_BEFORE = re.compile(
    r"(?:[0-9/^_+\-\u2212]|(?<![A-Za-z\\])[A-Za-z]|[\^_}]\{|[0-9A-Za-z]\(|\\(?:frac|sqrt)\{?|"
    r"\\(?:pm|mp|times|cdot|div|leq?|geq?|lt|gt|approx|sim))\Z"
)
_OPERATOR_APART = re.compile(  # a bullet (`- ` at the start of a line) and a tag (`<answer>`) are no operators
    r"(?:[^\s*(\[] [-+/<>]|\$[-+]|(?:(?<![A-Za-z</])[A-Za-z]|[^A-Za-z\"/])[<>]"
    r"|\\(?:pm|mp|times|cdot|div|leq?|geq?|lt|gt|approx|sim))\s*$"
)
_UNIT_AFTER = re.compile(
    r"\s*(?:\\,|\\;|\\ |~|\$)?\s*"
    r"(\\?%|\^\{?\\circ\}?|°|\\text\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?"
    r"|(?:percent|cents?|hundred|thousand|million|billion|trillion|dozen)\b)"
)
_END_AFTER = re.compile(r"\s|$|[$.,;:)\]*}!?`'\"]|\\[)\]\\,; ]|\\(?:text|quad|qquad|end|tag|label)|<[/|]")
_OPERATOR_AFTER = re.compile(
    r" *(?:[-+/^]|\\(?:pm|mp|times|cdot|div|pi|sqrt|frac|leq?|geq?|lt|gt|neq?|approx)(?![A-Za-z])"
    r"|[b-hj-zB-HJ-Z](?![A-Za-z']))"
)
_OR_AFTER = re.compile(r"[\s,]*or\b|\s*\?", re.I)
_DENIED_AFTER = re.compile(r"\s*(?:is|was|are|would be|cannot be)?\s*(?:not\b|isn't|wrong|incorrect)", re.I)


def _find_boxes(text: str) -> tuple[list[tuple[int, int, int]], int]:
    """Balanced boxes, outermost ones only, as (start, start of the content, end); and the start of the last broken one.

    That start is -1 if no box is broken.
    """
    boxes: list[tuple[int, int, int]] = []
    opened: list[tuple[int, int] | None] = []  # None: a brace that opens no box
    broken = -1
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token.startswith((r"\boxed", r"\fbox")):
            if match[1]:
                opened.append((match.start(), match.end()))
            else:
                broken = match.start()
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened:
            box = opened.pop()
            if box is not None:
                while boxes and boxes[-1][0] > box[0]:  # a box in this box
                    boxes.pop()
                boxes.append((*box, match.end()))
    return boxes, max([broken, *(box[0] for box in opened if box is not None)])


def _from_box(text: str) -> Extraction | None:
    boxes, broken = _find_boxes(text)
    if not boxes and broken < 0:
        return None
    if not boxes or broken > boxes[-1][0]:
        return Extraction(None, "unbalanced box")  # an earlier box is not what the response came to
    first = len(boxes) - 1
    while first and (joint := _joint(text[boxes[first - 1][2] : boxes[first][0]])):
        if joint == "or":
            return Extraction(None, "hedged")
        first -= 1
    start, end = boxes[first][0], boxes[-1][2]
    before, after = text[max(0, start - _BEFORE) : start], text[end : end + _AFTER]
    if reason := _objection(before, after):
        return Extraction(None, reason)
    answer = ", ".join(text[box[1] : box[2] - 1].strip() for box in boxes[first:])
    # `\boxed{10}\%` is ten percent
    if answer and (unit := _UNIT_AFTER.match(after)):
        answer += " " + unit[1]
    return Extraction(answer, tail=text[end:])


def _joint(gap: str) -> str:
    """What joins two boxes: `,`, `and` or `or`; empty if nothing does."""
    if len(gap) > _GAP:
        return ""
    words = " ".join(_DELIMITERS.sub(" ", gap).replace(",", " , ").split()).lower()
    if re.search(r"\bor\b", words) and not re.search(r"[.!]", words):
        return "or"
    return words if words in (",", "and", ", and") else ""


def _objection(before: str, after: str) -> str:
    """Why a box is no statement of the final answer, judged from the text around it; empty if it is one."""
    plain = _DELIMITERS.sub(" ", before)
    if _NOT_THIS.search(plain):
        return "negated"
    if _UNSURE.search(plain):
        return "hedged"
    rest = _DELIMITERS.sub(" ", after)
    if _OR_AFTER.match(rest):
        return "hedged"
    if _DENIED_AFTER.match(rest):
        return "negated"
    if _OPERATOR_BEFORE.search(before) or _OPERATOR_APART.search(before):
        return "box inside an expression"
    if _UNIT_AFTER.match(after) or (_END_AFTER.match(after) and not _OPERATOR_AFTER.match(after)):
        return ""
    return "box inside an expression"


# ----------------------------------------------------------------------------------------------- statements

_HASHES = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_STATEMENT = re.compile(r"\banswer[ \t]+(?:is\b|(isn't|can't[ \t]+be|cannot[ \t]+be)\b)|\banswer[ \t*]*:", re.I)
_LETTER_STATEMENT = re.compile(r"^[ \t*]*A[ \t*]*:", re.MULTILINE)
_LEADING = re.compile(r"(?:[\s:*`]|\\\[|\\\(|\$\$)*")
_SENTENCE_END = re.compile(r"(?<!\.)\.(?=\s|\*|$)|\n")


def _from_hashes(text: str) -> Extraction | None:
    """What follows the last `####`, unless it is a markdown heading: a heading has text below it and is no number."""
    last = _last(_HASHES, text)
    if last is None:
        return None
    answer, tail = trim(last[1]), text[last.end() :]
    numbered = re.match("[A-Za-z]+ [0-9]+[:.]", answer)  # `#### Step 3: add`
    if numbered or (tail.strip() and not re.search("[0-9]", answer.partition(":")[0][:20])):
        return None
    return Extraction(answer, tail=tail)


def _from_statement(text: str) -> Extraction | None:
    """What follows the last "the answer is", "Answer:" or, failing them, `A:`."""
    last = _last(_STATEMENT, text) or _last(_LETTER_STATEMENT, text)
    if last is None:
        return None
    if last.re is _STATEMENT and last[1]:
        return Extraction(None, "negated")
    leading = _LEADING.match(text, last.end())
    start = leading.end() if leading else last.end()
    end = _SENTENCE_END.search(text, start)
    stop = end.start() if end else len(text)
    if last.re is _LETTER_STATEMENT and re.match(r"\s*B[ \t]*:", text[stop:]):
        return None  # a list of choices
    return Extraction(trim(text[start:stop]), tail=text[stop:])


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)
