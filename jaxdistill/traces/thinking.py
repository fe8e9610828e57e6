"""Where a response's thinking ends: one written form, `<think>...</think>answer`, whatever tags the teacher uses."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def is_open(prompt: str, tags: tuple[str, str] = (OPEN, CLOSE)) -> bool:
    """Whether a rendered prompt has already opened the thinking, as the templates of R1 and of QwQ do."""
    return prompt.rstrip().endswith(tags[0])


def normalize(response: str, tags: tuple[str, str] = (OPEN, CLOSE), *, opened: bool = False) -> str:
    """A response with `<think>` and `</think>` in the place of the teacher's tags.

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
    return response


def join(thinking: str | None, content: str) -> str:
    """One text from the two that a server with a reasoning parser gives."""
    return content if not thinking else f"{OPEN}\n{thinking.strip(chr(10))}\n{CLOSE}\n{content}"
