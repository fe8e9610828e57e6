"""Control tokens, and texts that quote them.

A chat template writes control tokens (`<|im_end|>`), and a tokenizer finds them wherever they stand: also in a problem
that only speaks of them. Such a quote is text, and nobody's end of a turn. So it is marked before the template is
rendered (`quote`), and a marked one is cut into the tokens of its letters (`encode`).

transformers offers `split_special_tokens`, which is for a whole text, the template's own tokens included, and knows
nothing of added tokens that are not special, as Qwen3's `<think>`.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

THINK_TAGS = ("<think>", "</think>")
MARK, APART = "\ufdd0", "\ufdd1"
"""Unicode's noncharacters, which no text holds: one stands inside a quoted token, the other is a token of our own."""
_BRACKETED = re.compile(r"[<\[].+[>\]]", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Control:
    """Some control tokens of a tokenizer: text -> id."""

    ids: dict[str, int]
    tokenizer: PreTrainedTokenizerBase

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches any of them, the longest first; nothing if there are none."""
        return re.compile("|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) or r"(?!)")

    @functools.cached_property
    def without(self) -> Tokenizer:
        """The same tokenizer, which does not know them, and knows `APART`."""
        from tokenizers import AddedToken, Tokenizer

        state: dict[str, Any] = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # renamed, not removed: ids behind a gap would move up
        names = {text: f"{APART}{i}" for text, i in self.ids.items()}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        found = Tokenizer.from_str(json.dumps(state | {"post_processor": None}))
        found.add_special_tokens([AddedToken(APART, special=True, normalized=False)])
        return found


def in_problems(tokenizer: PreTrainedTokenizerBase) -> Control:
    """What is text in a problem: special tokens, the tags around the thinking, and whatever else the template writes.

    Other added tokens are words: Gemma's line breaks and HTML tags, for instance.
    """
    return _control(tokenizer, str(tokenizer.chat_template or ""), True)


def in_responses(tokenizer: PreTrainedTokenizerBase) -> Control:
    """What is text in a response: special tokens, but not the tags around the thinking.

    Decoding leaves special tokens out, so that whoever wrote such a text has not written the token. Of other added
    tokens (`<tool_call>`) the text does not tell; they stay what the tokenizer makes of them.
    """
    return _control(tokenizer, "", False)


@functools.lru_cache(maxsize=16)
def _control(tokenizer: PreTrainedTokenizerBase, template: str, tags: bool) -> Control:
    found = {}
    for i, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        if text in THINK_TAGS:
            wanted = tags
        else:
            wanted = token.special or (bool(_BRACKETED.fullmatch(text)) and text in template)
        if wanted and text.strip():
            found[text] = int(i)
    return Control(found, tokenizer)


def quote(text: str, control: Control) -> str:
    """The text with a mark inside every control token that it quotes; `clean` takes the marks out."""
    text = clean(text)
    return control.pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)


def clean(text: str) -> str:
    """The text without marks."""
    return text.replace(MARK, "") if MARK in text else text


def encode(texts: list[str], control: Control) -> list[tuple[list[int], list[int]]]:
    """Token ids of texts, marked quotes as text and everything else as the tokenizer has it.

    Returns:
      (ids, starts) a text: `starts[i]` is where token i begins, in characters of the clean text.
    """
    backend = control.tokenizer.backend_tokenizer
    found = backend.encode_batch(texts, add_special_tokens=False)
    return [
        _encode_quoted(text, e, control) if MARK in text else (e.ids, [a for a, _ in e.offsets])
        for text, e in zip(texts, found, strict=True)
    ]


def _encode_quoted(text: str, whole: Any, control: Control) -> tuple[list[int], list[int]]:
    """Control tokens part a text into pieces that are tokenized by themselves; those with a mark are tokenized anew."""
    ids: list[int] = []
    starts: list[int] = []
    known = {i: name for name, i in control.ids.items()}
    # an unknown character has an id among them, too, and is written otherwise
    borders = [
        k
        for k, (i, (a, b)) in enumerate(zip(whole.ids, whole.offsets, strict=True))
        if i in known and known[i] in text[a:b]
    ]
    first, begin = 0, 0
    for k in [*borders, len(whole.ids)]:
        end = whole.offsets[k][0] if k < len(whole.ids) else len(text)
        piece, before = text[begin:end], len(clean(text[:begin]))
        if MARK in piece:
            # behind a token, as it is in the text: some tokenizers treat a text's beginning otherwise
            head = APART if begin else ""
            again = control.without.encode(head + clean(piece), add_special_tokens=False)
            ids += again.ids[len(head) :]
            starts += [before + a - len(head) for a, _ in again.offsets[len(head) :]]
        else:
            ids += whole.ids[first:k]
            starts += [before + a - begin for a, _ in whole.offsets[first:k]]
        if k < len(whole.ids):
            ids.append(whole.ids[k])
            starts.append(len(clean(text[:end])))
            first, begin = k + 1, whole.offsets[k][1]
    return ids, starts
