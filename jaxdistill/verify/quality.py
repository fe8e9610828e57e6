"""Quality of a trace: pure measures of its text, each with a filter's name and a threshold of `verify.filters`.

A measure is a number, found in time linear in the text; a filter compares it with its threshold. So measures are made
once a trace, and thresholds may be changed at no cost. What of a long text only a part is looked at says so.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import regex

from jaxdistill.config import FiltersConfig
from jaxdistill.verify.texts import Text, ngrams, pieces_of, prose_of, words_of

NGRAM = 8
"""Words of an n-gram that repeats, or that echoes the problem."""
FEW_WORDS, FEW_BYTES = 100, 1000
"""Shorter texts repeat themselves without being repetitive."""


# ------------------------------------------------------------------------------------------------ languages

_SCRIPTS = "Latin Cyrillic Han Hiragana Katakana Hangul Arabic Hebrew Devanagari Bengali Tamil Thai".split()
# Greek letters are mathematics; what is in no script of the list counts as one more
_SCRIPT = regex.compile("|".join(rf"(?P<{s}>\p{{Script={s}}}+)" for s in _SCRIPTS) + r"|\p{Greek}+|(?P<Other>\p{L}+)")
_SYMBOL = 2
"""Letters of a run of Latin ones that may be a variable in any language."""


def foreign_script(text: Text, config: FiltersConfig) -> float:
    """Share of the prose's letters in scripts that the problem is not written in."""
    known = {name for name, letters in _scripts(prose_of(text.prompt)[0]).items() if letters}
    if not known or (text.prose.isascii() and "Latin" in known):
        return 0.0
    found = _scripts(text.prose)
    return sum(n for name, n in found.items() if name not in known) / max(1, found.total())


def _scripts(prose: str) -> Counter[str]:
    """Script -> letters."""
    found: Counter[str] = Counter()
    for match in _SCRIPT.finditer(prose):
        size = match.end() - match.start()
        name = match.lastgroup
        if name and not (name == "Latin" and size <= _SYMBOL):
            found["Japanese" if name in ("Hiragana", "Katakana") else name] += size
    return found


WINDOW, WINDOWS = 600, 64
"""Characters of prose that are given a language at a time, and how many such pieces of a long text, evenly spread."""
_LEAST_LETTERS = 60


def other_language(text: Text, config: FiltersConfig) -> float:
    """Share of the prose in another language than `language`, or than most of it. Source of the model: langid.py."""
    import py3langid

    prose = " ".join(text.prose.split())
    starts = range(0, len(prose), WINDOW)
    if len(starts) > WINDOWS:
        starts = [starts[i * len(starts) // WINDOWS] for i in range(WINDOWS)]
    windows = [prose[start : start + WINDOW] for start in starts]
    known = [window for window in windows if sum(map(str.isalpha, window)) >= _LEAST_LETTERS]
    if not known:
        return 0.0
    languages = Counter(py3langid.classify(window)[0] for window in known)
    wanted = languages[config.language] if config.language else max(languages.values())
    return 1 - wanted / len(known)


# ----------------------------------------------------------------------------------------------- repetition


def repeated_ngrams(text: Text, config: FiltersConfig) -> float:
    """Share of the 8-grams of words that stood in the response before. Source: Rae et al. 2021, arXiv:2112.11446."""
    if len(text.words) < FEW_WORDS:
        return 0.0
    grams = ngrams(text.words, NGRAM)
    return 1 - len(set(grams)) / len(grams)


def compression(text: Text, config: FiltersConfig) -> float:
    """Bytes of the response for each byte that zlib needs."""
    data = text.response.encode("utf-8", "surrogatepass")
    return 1.0 if len(data) < FEW_BYTES else len(data) / len(zlib.compress(data, 1))


LOOP_PIECES, ROUNDS = 4000, 4
"""Words and signs before the end in which a loop is looked for, and how often it goes round at least."""


def loop(text: Text, config: FiltersConfig) -> float:
    """Words and signs of the loop that the thinking or the answer ends with; 0 if neither does."""
    return max(_loop_at_end(part) for part in (text.thinking, text.content))


def _loop_at_end(text: str) -> int:
    pieces = pieces_of(text[-12 * LOOP_PIECES :])[-LOOP_PIECES:][::-1]
    loops: list[tuple[int, int]] = []  # words and signs of a round, and of the whole loop
    sizes = range(1, len(pieces) // ROUNDS + 1)
    # most sizes are no loop's, and are seen to be so at the first word of two rounds
    for size in [size for size in sizes if pieces[size] == pieces[0] == pieces[2 * size]]:
        if any(size % shorter == 0 and whole >= size + shorter for shorter, whole in loops):
            continue  # several rounds of that loop, which ends where that one does
        if any(pieces[n * size : (n + 1) * size] != pieces[:size] for n in range(1, ROUNDS)):
            continue
        whole = ROUNDS * size
        while whole < len(pieces) and pieces[whole] == pieces[whole - size]:
            whole += 1
        loops.append((size, whole))
    return max((whole for _, whole in loops), default=0)


# ------------------------------------------------------------------------------------------ length and steps


def thinking_characters(text: Text, config: FiltersConfig) -> float:
    """Characters between the tags."""
    return len(text.thinking)


def answer_characters(text: Text, config: FiltersConfig) -> float:
    """Characters behind the tags, or of the whole response without them."""
    return len(text.content)


def steps(text: Text, config: FiltersConfig) -> float:
    """Lines of the thinking that hold a letter or a digit."""
    return sum(any(map(str.isalnum, line)) for line in text.thinking.splitlines())


# ---------------------------------------------------------------------------------------------------- words

_HEDGE = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|presumably|i (?:guess|think|believe|assume)|not (?:entirely |quite )?sure|"
    r"unsure|uncertain|might be|could be|it seems|seems like|hard to say|i don't know)\b"
)
_DOUBT = re.compile(r"\b(?:wait|hmm+|hold on|no,|actually|alternatively|let me (?:re|double)-?\w*|on second thought)")
_REFUSAL = re.compile(
    r"\bas an ai\b|\b(?:i am|i'm|we are|we're) (?:sorry|unable|not able)\b|\bi apologi[sz]e\b|"
    r"\bi (?:cannot|can't|can not|won't|will not) (?:assist|help|provide|answer|comply|fulfil|do that|continue)|"
    r"\bi must (?:decline|refuse)\b|抱歉|无法(?:回答|提供)"
)
_REFUSAL_START = 300
"""Characters of an answer in which it would refuse."""


def hedges(text: Text, config: FiltersConfig) -> float:
    """Hedges in the answer."""
    return len(_HEDGE.findall(_plain(text.content)))


def doubt(text: Text, config: FiltersConfig) -> float:
    """Hedges and changes of mind for 1,000 words of thinking."""
    thinking = _plain(text.thinking)
    found = len(_HEDGE.findall(thinking)) + len(_DOUBT.findall(thinking))
    return 1000 * found / max(FEW_WORDS, len(thinking.split()))


def refusals(text: Text, config: FiltersConfig) -> float:
    """Phrases at the start of the answer that refuse to give one."""
    return len(_REFUSAL.findall(_plain(text.content[:_REFUSAL_START])))


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")


def echo(text: Text, config: FiltersConfig) -> float:
    """Share of the response's 8-grams of words that stand in the problem."""
    asked, said = words_of(text.prompt), text.words
    if min(len(asked), len(said)) < NGRAM:
        return 0.0
    known, grams = set(ngrams(asked, NGRAM)), ngrams(said, NGRAM)
    return sum(gram in known for gram in grams) / len(grams)


_STATED = re.compile(
    r"\\boxed\s*\{|(?<!#)####(?!#)|\b(?<!what )(?<!until )the (?:final |correct )?answer (?:is|:|=)", re.I
)


def answer_place(text: Text, config: FiltersConfig) -> float:
    """Where in the thinking the answer is first stated, as a share of it; 1 where it is stated behind it alone."""
    found = _STATED.search(text.thinking)
    return found.start() / max(1, len(text.thinking)) if found else 1.0


# ----------------------------------------------------------------------------------------------------- form


def open_ends(text: Text, config: FiltersConfig) -> float:
    """Code blocks, environments and displays of the answer that are never closed."""
    count = text.content.count
    return (
        count("```") % 2
        + count("$$") % 2
        + max(0, count("\\begin{") - count("\\end{"))
        + max(0, count("\\[") - count("\\]"))
    )


def paragraph(text: Text, config: FiltersConfig) -> float:
    """Characters of the longest prose without an empty line."""
    return max(len(part.strip()) for part in re.split(r"\n[ \t]*\n", text.prose))


def code(text: Text, config: FiltersConfig) -> float:
    """Share of the response's characters in code."""
    return text.code_characters / max(1, len(text.response))


_PLAIN = re.compile(r"[\w\s!-/:-@\[-`{-~]+")


def symbols(text: Text, config: FiltersConfig) -> float:
    """Share of the prose's characters that are neither letters, digits, spaces nor punctuation of ASCII."""
    return len(_PLAIN.sub("", text.prose)) / max(1, len(text.prose))


# ---------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True, slots=True)
class Quality:
    """A filter: the trace falls if its measure is on the wrong side of a threshold of `FiltersConfig`."""

    measure: Callable[[Text, FiltersConfig], float]
    threshold: str


QUALITY: dict[str, Quality] = {
    "cut_off": Quality(open_ends, "max_open_ends"),
    "short_thinking": Quality(thinking_characters, "min_thinking"),
    "long_thinking": Quality(thinking_characters, "max_thinking"),
    "short_answer": Quality(answer_characters, "min_answer"),
    "long_answer": Quality(answer_characters, "max_answer"),
    "few_steps": Quality(steps, "min_steps"),
    "many_steps": Quality(steps, "max_steps"),
    "loop": Quality(loop, "max_loop"),
    "compressible": Quality(compression, "max_compression"),
    "repetitive": Quality(repeated_ngrams, "max_repeated_ngrams"),
    "foreign_script": Quality(foreign_script, "max_foreign_script"),
    "other_language": Quality(other_language, "max_other_language"),
    "refusal": Quality(refusals, "max_refusals"),
    "hedging": Quality(hedges, "max_hedges"),
    "doubting": Quality(doubt, "max_doubt"),
    "echo": Quality(echo, "max_echo"),
    "leaked_answer": Quality(answer_place, "min_answer_place"),
    "long_paragraph": Quality(paragraph, "max_paragraph"),
    "code": Quality(code, "max_code"),
    "symbols": Quality(symbols, "max_symbols"),
}
"""In this order; the name is the `rejected_for` of a verdict."""


def measures_wanted(config: FiltersConfig) -> dict[str, Callable[[Text, FiltersConfig], float]]:
    """Name -> measure, of those that a threshold is set for; a name says all that the number depends on."""
    found = {}
    for filter_ in QUALITY.values():
        if getattr(config, filter_.threshold) is not None:
            found[_name(filter_, config)] = filter_.measure
    return found


def _name(filter_: Quality, config: FiltersConfig) -> str:
    name = filter_.measure.__name__
    return f"{name}:{config.language or ''}" if filter_.measure is other_language else name


def fault(measures: Mapping[str, float], config: FiltersConfig) -> tuple[str, str] | None:
    """The first filter that a trace with these measures falls to, and why; None if it passes them all."""
    for name, filter_ in QUALITY.items():
        threshold = getattr(config, filter_.threshold)
        if threshold is None:
            continue
        value = measures[_name(filter_, config)]
        if value < threshold if filter_.threshold.startswith("min_") else value > threshold:
            return name, f"{filter_.threshold} is {threshold:g}, found {value:.4g}"
    return None
