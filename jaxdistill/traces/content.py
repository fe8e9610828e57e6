"""What a turn of a chat says: its text and its thoughts, in the forms in which servers and sets write them.

Content is text, null, or a list of parts: text, thinking, images, calls of tools. Thoughts stand between tags in the
text, in parts of their own, or in fields beside it: as text, or as lists of blocks (Anthropic's `thinking`,
OpenRouter's `reasoning_details`, OpenAI's `reasoning` with a `summary`).
"""

from __future__ import annotations

from typing import Any

from jaxdistill.records import split_response
from jaxdistill.traces import json_rows, thinking
from jaxdistill.traces.values import BadRow, Twice, clean, kind, shown, written

THOUGHT_FIELDS = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "reasoning_details",
    "thinking_blocks",
    "reasoning_text",
    "thought",
    "thoughts",
)
"""Fields of a turn that hold its thoughts."""
_THOUGHT_FIELDS = frozenset(THOUGHT_FIELDS)
_TOOL_FIELDS = frozenset(("tool_calls", "function_call"))
_TEXT = {None, "", "text", "output_text", "input_text"}
THOUGHT_PARTS = {"thinking", "reasoning", "thought", "reasoning_content", "reasoning_text", "reasoning.text"}
"""Types of parts that hold thoughts."""
_TOOL = {"tool_use", "tool_call", "tool_calls", "function_call", "server_tool_use", "tool_result", "function"}
_PARTS = (
    (_TEXT - {None, ""})
    | THOUGHT_PARTS
    | _TOOL
    | {"image", "image_url", "input_image", "audio", "input_audio", "video"}
)
"""Types of parts by which JSON in a text is known to be parts."""
_HIDDEN = ("redacted", "encrypted")
_INSIDE = ("text", "thinking", "reasoning", "reasoning_content", "content", "summary", "parts")
_SETTINGS = set("on off true false none null auto minimal low medium high xhigh max enabled disabled yes no".split())
"""Words that say how hard to think, and are no thoughts."""


def question(turn: dict[str, Any]) -> str:
    """The text of a question.

    Raises:
      BadRow: it has none, or something else beside text.
    """
    text, _ = _content(turn, "question")
    if text is None or not text.strip():
        raise BadRow("the question is null or empty")
    return text


def response(turn: dict[str, Any], tags: tuple[str, str], before: list[str] | None = None) -> tuple[list[str], str]:
    """A turn's thoughts that stand beside its text, and the text, which is empty if it has none.

    Thoughts that stand in two places are taken once. Where the text has the thoughts between tags, they stay there.

    Args:
      tags: what the teacher puts around its thinking (`traces.think_tags`), beside those that are known.
      before: thoughts that turns before this one have given.
    Raises:
      BadRow: a call of a tool, parts that are no text, thoughts that are hidden, or two different ones.
    """
    if not _TOOL_FIELDS.isdisjoint(turn) and any(_calls(turn.get(name)) for name in _TOOL_FIELDS):
        raise BadRow("the response calls a tool")
    text, inside = _content(turn, "response")
    text = text or ""
    if "<tool_call>" in text and "</tool_call>" in text:
        raise BadRow("the response calls a tool", ": <tool_call>")
    found = [inside] if inside else []
    if not _THOUGHT_FIELDS.isdisjoint(turn):
        for name in THOUGHT_FIELDS:
            if turn.get(name) and (thoughts := thoughts_of(turn[name], name)):
                found = _merge(found, thoughts)
    return _once([*(before or ()), *found], text, tags) if before or found else ([], text)


def whole(found: list[str], text: str) -> str:
    """One response of thoughts and text."""
    return thinking.join("\n\n".join(found), text)


def thoughts_of(value: Any, name: str) -> str:
    """The thoughts in a field; empty if it holds none, or says only how to think (`true`, `high`).

    Raises:
      BadRow: they are there and hidden: encrypted, redacted, or a signature alone.
    """
    if isinstance(value, Twice):
        raise BadRow(f"field {name!r} stands in it twice, with different values")
    found, hidden = _blocks(value)
    if not found.strip() and hidden:
        raise BadRow("its thoughts are hidden", f": {name!r} is {shown(value)}")
    found = thinking.bare(found)
    return "" if not found.strip() or found.strip().lower() in _SETTINGS else found.strip("\n")


def _blocks(value: Any) -> tuple[str, bool]:
    """The text in a value of any nesting, and whether some of it is hidden."""
    if isinstance(value, str):
        parsed = _encoded(value)
        return _blocks(parsed) if parsed is not None else (written(value) or "", False)
    if isinstance(value, list):
        return _joined(value)
    if not isinstance(value, dict):
        return "", False  # null, and settings such as true or a budget
    inner = [_blocks(value[name]) for name in _INSIDE if value.get(name)]
    found = [text for text, _ in inner if text.strip()]
    kind_of_block = str(value.get("type") or "")
    hidden = any(word in kind_of_block for word in _HIDDEN) or bool(value.get("signature") and not found)
    # one block says its text once; a summary stands beside nothing else, or beside what it sums up
    return (found[0] if found else ""), hidden or any(hidden for _, hidden in inner)


def _joined(blocks: list[Any]) -> tuple[str, bool]:
    """Blocks are paragraphs; those of one `index` are pieces of one block, as they were streamed."""
    text, hidden, last = "", False, None
    for block in blocks:
        found, dark = _blocks(block)
        hidden |= dark
        if not found:
            continue
        index = block.get("index") if isinstance(block, dict) else None
        glue = "" if not text or (index is not None and index == last) else "\n\n"
        text, last = text + glue + found, index
    return text, hidden


def _content(turn: dict[str, Any], what: str) -> tuple[str | None, str]:
    """A turn's text, None if it has none, and the thoughts among its parts."""
    value = next((turn[name] for name in ("content", "value", "text") if turn.get(name) is not None), None)
    if isinstance(value, str):
        parts = _encoded(value, only_parts=True) if value[:1] in _MAY_BE_ENCODED else None
        if parts is None:
            return clean(value), ""
        value = parts
    if isinstance(value, dict):  # one part, or ChatGPT's {"content_type": ..., "parts": [...]}
        value = value["parts"] if isinstance(value.get("parts"), list) else turned(value) or [value]
    if not isinstance(value, list):
        text = None if value is None or isinstance(value, bool) else written(value)
        if value is not None and text is None:
            raise BadRow(f"the {what} is {kind(value)}, not text", f": {shown(value)}")
        return text, ""
    texts, thoughts = [], []
    for part in value:
        is_thought, text = _part(part, what)
        if is_thought and any(t.strip() for t in texts):
            raise BadRow("thoughts go on behind text of the response")
        (thoughts if is_thought else texts).append(text)
    return "".join(texts), "\n\n".join(t for t in thoughts if t)


def _part(part: Any, what: str) -> tuple[bool, str]:
    """Whether a part is a thought, and its text."""
    if part is None:  # a hole that tables fill lists up with
        return False, ""
    if isinstance(part, str):
        return False, written(part) or ""
    if not isinstance(part, dict):
        raise BadRow(f"a part of the {what} is {kind(part)}", f": {shown(part)}")
    name = part.get("type")
    if not isinstance(name, str | None):
        raise BadRow(f"a part of the {what} has a type that is {kind(name)}")
    if name in THOUGHT_PARTS or any(word in str(name) for word in _HIDDEN):
        return True, thoughts_of([part], "content")
    if name in _TOOL:
        raise BadRow("the response calls a tool" if what == "response" else f"a part of the {what} is of type {name!r}")
    if name not in _TEXT:
        raise BadRow(f"a part of the {what} is of type {name!r}, not text")
    text = next((part[key] for key in ("text", "content", "value") if part.get(key) is not None), None)
    if isinstance(text, dict):  # OpenAI's assistants: {"text": {"value": ..., "annotations": []}}
        text = text.get("value")
    if not isinstance(text, str):
        other = [key for key in part if key != "type" and part[key] is not None]
        if text is None and name and not other:  # a part of nothing
            return False, ""
        raise BadRow(f"a part of the {what} has no text", f": {shown(part)}")
    return False, written(text) or ""


_MAY_BE_ENCODED = {"[", " ", "\n"}


def turned(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A struct of lists, as `datasets` writes a sequence of objects, as the list of objects; None if it is none.

    Raises:
      BadRow: its lists are not equally long.
    """
    columns = {key: column for key, column in value.items() if column is not None}
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        return None
    if len({len(column) for column in columns.values()}) != 1:
        raise BadRow("the lists in a struct of lists are not equally long", f": {shown(value)}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _encoded(text: str, *, only_parts: bool = False) -> Any:
    """A list of objects that was written into a text as JSON (tables whose rows differ do so); None if it is none."""
    begin = text[:32].lstrip().replace(" ", "").replace("\n", "")
    if not begin.startswith('[{"'):
        return None
    try:
        found = json_rows.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or not all(isinstance(part, dict) for part in found):
        return None
    # keys come in any order; a text that is JSON of something else is a text
    return found if not only_parts or all(str(part.get("type")) in _PARTS for part in found) else None


def _calls(value: Any) -> bool:
    """Whether a field of tools calls one: null, an empty list, and such as text do not."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null", "None")
    if isinstance(value, dict):  # also a struct of lists
        return any(_calls(part) if isinstance(part, list | dict) else part is not None for part in value.values())
    return bool(value)


def _merge(found: list[str], more: str) -> list[str]:
    """Thoughts of two fields of one turn, which servers fill with the same: the longer of the two."""
    if not found:
        return [more]
    both = "\n\n".join(found)
    longer = _longer(both, more)
    if longer is None:
        raise BadRow("two fields of the response hold different thoughts")
    return found if longer is both else [more]


def _once(found: list[str], text: str, tags: tuple[str, str]) -> tuple[list[str], str]:
    """Thoughts beside a text that may hold them too, between tags."""
    tagged = thinking.normalize(text, thinking.tags_of(text, tags))
    inside, answer = split_response(tagged)
    if inside is None:
        return found, text
    if not inside.strip():  # empty tags: a template's way to say that there are none
        return found, answer
    longer = _longer(inside, "\n\n".join(found))
    if longer is None:
        raise BadRow("its thoughts stand in a field, and other ones between tags in the text")
    return [longer], answer


def _longer(one: str, other: str) -> str | None:
    """The longer of two texts, if it holds the other but for spaces; None if they differ."""
    a, b = " ".join(one.split()), " ".join(other.split())
    if b in a:
        return one
    return other if a in b else None
