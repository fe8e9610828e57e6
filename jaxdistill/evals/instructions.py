"""IFEval's instructions that a few lines can check, each as the benchmark's own program checks it.

Known are 20 of its 25. Left out are those that need a language model's idea of language, or a trained sentence or word
splitter: `language:response_language`, `change_case:english_capital`, `change_case:english_lowercase` (whose checks ask
whether the text is English), `length_constraints:number_sentences` and `change_case:capital_word_frequency`.

Source: Zhou et al. 2023, arXiv:2311.07911, and the program published with it. A check is strict: the response as it is.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Callable
from typing import Any

PAUSES = {".", ",", "?", "!", "'", '"'}


def follows(response: str, instructions: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The names of the instructions that a response does not follow; its thinking is not looked at."""
    content = response.rpartition("</think>")[2].strip("\n")
    if not content.strip():
        return [name for name, _ in instructions]
    return [name for name, given in instructions if not CHECKS[name](content, **given)]


def _holds(count: int, relation: str | None, bound: int) -> bool:
    """`less than` is strict; everything else means at least."""
    return count < bound if relation == "less than" else count >= bound


# ------------------------------------------------------------------------------------------- words and letters


def _no_comma(text: str) -> bool:
    return "," not in text


def _number_words(text: str, num_words: int, relation: str | None = None) -> bool:
    return _holds(len(re.findall(r"\w+", text)), relation, num_words)


def _existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(word, text, re.I) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str | None = None) -> bool:
    return _holds(len(re.findall(keyword.strip(), text, re.I)), relation, frequency)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.I) for word in forbidden_words)


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str | None = None) -> bool:
    return _holds(collections.Counter(text.lower())[letter.strip().lower()], let_relation, let_frequency)


# ------------------------------------------------------------------------------------------------- parts


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs with `***` between them; only the first and the last part may be empty."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = parts[1:-1]
    return all(part.strip() for part in inner) and sum(bool(part.strip()) for part in parts) == num_paragraphs


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs with an empty line between them; one of them begins with a given word."""
    parts = re.split(r"\n\n", text)
    count = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > count or not (paragraph := parts[nth_paragraph - 1].strip()):
        return False
    word = ""
    for letter in paragraph.split()[0].lstrip("'").lstrip('"'):
        if letter in PAUSES:
            break
        word += letter.lower()
    return count == num_paragraphs and word == first_word.lower()


def _bullets(text: str, num_bullets: int) -> bool:
    stars, dashes = re.findall(r"^\s*\*[^\*].*$", text, re.M), re.findall(r"^\s*-.*$", text, re.M)
    return len(stars) + len(dashes) == num_bullets


def _highlights(text: str, num_highlights: int) -> bool:
    single = [found for found in re.findall(r"\*[^\n\*]*\*", text) if found.strip("*").strip()]
    double = [f for f in re.findall(r"\*\*[^\n\*]*\*\*", text) if f.removeprefix("**").removesuffix("**").strip()]
    return len(single) + len(double) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter}\s?\d+\s?", text)) - 1 >= num_sections


def _json(text: str) -> bool:
    text = text.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(opening)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = known.get(postscript_marker, r"\s*" + postscript_marker.lower() + r".*$")
    return bool(re.search(pattern, text.lower(), re.M))


# ---------------------------------------------------------------------------------------- the whole response


def _constrained(text: str) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _ending(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _two_responses(text: str) -> bool:
    """Two different answers with `******` between them; only the first and the last part may be empty."""
    parts = text.split("******")
    given = [part.strip() for part in parts if part.strip()]
    return all(part.strip() for part in parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def _repeated(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


CHECKS: dict[str, Callable[..., bool]] = {
    "punctuation:no_comma": _no_comma,
    "length_constraints:number_words": _number_words,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter_frequency,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "detectable_format:constrained_response": _constrained,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "startend:end_checker": _ending,
    "startend:quotation": _quoted,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeated,
}
"""Name -> check of a response without its thinking, with the arguments that the benchmark's row gives."""
