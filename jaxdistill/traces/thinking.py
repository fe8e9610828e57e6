"""Where a response's thinking ends: one written form, `<think>...</think>answer`, whatever tags the teacher uses."""

from __future__ import annotations

from jaxdistill.records import split_response
from jaxdistill.traces import tags

OPEN, CLOSE = "<think>", "</think>"
KNOWN_TAGS = tags.KNOWN
"""An imported response that begins with such a one is read by them."""
SOLUTION_TAGS = (("<|begin_of_solution|>", "<|end_of_solution|>"), ("<|START_RESPONSE|>", "<|END_RESPONSE|>"))
"""What some teachers put around the answer behind their thinking; no part of the answer."""
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|return|>",
    "<|end|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "</s>",
)
"""Tokens that end a turn, which some sets have kept in the text of their responses."""


def is_open(prompt: str, tags: tuple[str, str] = (OPEN, CLOSE)) -> bool:
    """Whether a rendered prompt has already opened the thinking, as the templates of R1 and of QwQ do."""
    return prompt.rstrip().endswith(tags[0])


def normalize(response: str, tags: tuple[str, str] = (OPEN, CLOSE), *, opened: bool = False) -> str:
    """A response with `<think>` and `</think>` in the place of the teacher's tags, and its answer without tags.

    Only the first opening tag and the last closing one are tags; between them they would be the teacher's words.

    Args:
      opened: the prompt ended with the opening tag, so that the response lacks it; it is put back.
    """
    if tags != (OPEN, CLOSE):
        head, closing, content = response.rpartition(tags[1])
        if closing:
            response = head.replace(tags[0], OPEN, 1) + CLOSE + content
        else:
            response = response.replace(tags[0], OPEN, 1)
    # a prompt that opened the thinking does so for truncated responses too: then no closing tag comes
    if opened and not response.lstrip().startswith(OPEN):
        response = f"{OPEN}\n{response.lstrip(chr(10))}"
    return _without_solution_tags(response)


def normalize_imported(response: str, tags: tuple[str, str] = (OPEN, CLOSE)) -> str:
    """As `normalize`, of a response of which nobody has said the tags: `tags` if it has them, else the known ones.

    The tokens that ended its turn, where they were left in the text, are taken off.
    """
    while (bare := response.rstrip()).endswith(ENDS):
        response = bare.removesuffix(next(end for end in ENDS if bare.endswith(end)))
    return normalize(response, tags_of(response, tags))


def tags_of(response: str, tags: tuple[str, str] = (OPEN, CLOSE)) -> tuple[str, str]:
    """The tags around a response's thinking: `tags`, or those of `KNOWN_TAGS` that it begins with."""
    begin = response.lstrip()
    if tags[1] in response or CLOSE in response or begin.startswith(tags[0]):
        return tags
    return next((known for known in KNOWN_TAGS if begin.startswith(known[0])), tags)


def bare(thoughts: str) -> str:
    """Thoughts of a field of their own without tags around them, which some servers and sets leave there, too.

    Tags further inside are words, and so is an opening one whose closing one does not stand at the end.
    """
    inner = thoughts.strip()
    for begin, end in KNOWN_TAGS:
        if inner.startswith(begin) and (inner.endswith(end) or end not in inner):
            return inner.removeprefix(begin).removesuffix(end).strip("\n")
        if inner.endswith(end) and begin not in inner:  # the prompt had opened them
            return inner.removesuffix(end).strip("\n")
    return thoughts


def only(response: str, tags: tuple[str, str] = (OPEN, CLOSE)) -> str | None:
    """The thoughts of a response that has nothing else; None if it has an answer, or no thoughts."""
    inside, answer = split_response(normalize_imported(response, tags))
    return None if answer else inside


def join(thinking: str | None, content: str) -> str:
    """One text from the two that a server with a reasoning parser gives."""
    return content if not thinking else f"{OPEN}\n{thinking.strip(chr(10))}\n{CLOSE}\n{content}"


def _without_solution_tags(response: str) -> str:
    """The answer without the tags that it begins with; in the thinking, and further on in it, they are words."""
    head, closing, content = response.rpartition(CLOSE)
    for begin, end in SOLUTION_TAGS:
        if begin not in content:
            continue
        inner = content.lstrip()
        if inner.startswith(begin):
            before, closed, behind = inner.removeprefix(begin).rpartition(end)
            answer = before.strip() + behind if closed else behind.strip()  # without the closing one it was cut off
            content = f"\n\n{answer}" if closing else answer
    return head + closing + content
