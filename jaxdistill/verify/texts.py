"""A response taken apart for the filters: thinking and answer, prose without code and LaTeX, words.

Every part is found in time linear in the text, whatever stands in it.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Literal

from jaxdistill.records import split_response

Structure = Literal["closed", "empty", "absent", "broken"]
_WORD = re.compile(r"\w{1,12}|[^\w\s]")  # what is written without spaces falls into pieces
_LETTERS = re.compile(r"\w+")


def think_structure(response: str) -> Structure:
    """How a response is built.

    Returns:
      `closed`: one pair of tags with thinking in it, nothing before it and an answer behind it. The opening tag may be
        missing where the prompt has set it.
      `empty`: the same, without any thinking between the tags.
      `absent`: an answer without tags.
      `broken`: anything else, such as two pairs, a pair that is not closed, or nothing but thinking.
    """
    opened, closed = response.count("<think>"), response.count("</think>")
    head, _, content = response.rpartition("</think>")
    if not content.strip() or closed > 1 or opened > closed:
        return "broken"
    if not closed:
        return "absent"
    before, _, thinking = head.rpartition("<think>")
    if before.strip():
        return "broken"
    return "closed" if thinking.strip() else "empty"


class Text:
    """A response and its problem; parts are made when they are asked for, and once."""

    def __init__(self, response: str, prompt: str = ""):
        self.response, self.prompt = response, prompt
        thinking, self.content = split_response(response)
        self.thinking = thinking or ""

    @cached_property
    def prose(self) -> str:
        """Thinking and answer without code and LaTeX."""
        return prose_of(f"{self.thinking}\n\n{self.content}")[0]

    @cached_property
    def code_characters(self) -> int:
        return prose_of(self.response)[1]

    @cached_property
    def words(self) -> list[str]:
        """Of thinking and answer, in small letters, without punctuation."""
        return words_of(f"{self.thinking} {self.content}")


def words_of(text: str) -> list[str]:
    """The words and numbers of a text, in small letters, without punctuation."""
    return _LETTERS.findall(text.lower())


def pieces_of(text: str) -> list[str]:
    """Words, cut after 12 characters, and every sign."""
    return _WORD.findall(text)


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    """Every n words that follow each other; a shorter text is one n-gram."""
    if len(words) < n:
        return [tuple(words)] if words else []
    return list(zip(*(words[i:] for i in range(n)), strict=False))


# ------------------------------------------------------------------------------------- prose, code and LaTeX

_TOKEN = re.compile(r"```|\$\$|\\begin\{|\\\[|\\\(|`|\$|\\[A-Za-z]+")
_CLOSERS = {"```": "```", "$$": "$$", "\\begin{": "\\end{", "\\[": "\\]", "\\(": "\\)", "`": "`", "$": "$"}
_CODE = {"```", "`"}
_INLINE = {"`", "$"}  # within one paragraph: a price has a dollar sign that nothing closes


def prose_of(text: str) -> tuple[str, int]:
    """What is neither code nor LaTeX, and how many characters of code blocks there are.

    A block that is never closed is taken as prose, all but its sign; of `\\begin{...}` the first `\\end{` is its end.
    """
    kept: list[str] = []
    code = place = at = 0
    unclosed: set[str] = set()  # each is looked for in vain once, so that the search stays linear
    while match := _TOKEN.search(text, at):
        sign, start, at = match[0], match.start(), match.end()
        closer = _CLOSERS.get(sign)
        end = -1
        if closer and closer not in unclosed:
            end = text.find(closer, at)
            if end < 0:
                unclosed.add(closer)
        if end >= 0 and sign in _INLINE and text.find("\n\n", at, end) >= 0:
            end = -1
        kept.append(text[place:start])
        if end >= 0 and closer:
            at = end + len(closer)
            code += (at - start) * (sign in _CODE)
            kept.append(" ")
        place = at
    kept.append(text[place:])
    return "".join(kept), code
