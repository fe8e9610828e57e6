"""From a kept trace to token ids, with every token's region: what is prompt, what is thinking, what is answer."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from jaxdistill.data.templates import CLOSE, Ending, response_text
from jaxdistill.tokenization import encode_responses, render_prompts, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT, THINKING, ANSWER = 0, 1, 2
"""Regions of a token. `PROMPT` (and padding) is never trained; the other two are, each with its own weight."""
NAMES = ("prompt", "thinking", "answer")


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenized trace."""

    trace_id: str
    tokens: Sequence[int] | np.ndarray
    regions: Sequence[int] | np.ndarray
    topk: np.ndarray | None = None
    """The teacher's packed distributions beside the tokens, uint8 [T, width], see `data.topk`."""
    starts: Sequence[int] = ()
    """Of the response's tokens: how many characters of it stand from their first on, 0 for the eos."""
    written: str = ""
    """The response's text."""
    ends_early: bool = False
    """Whether a token that ends a response stands inside it, or is quoted there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """What one example is made from."""

    trace_id: str
    problem: str
    response: str
    """The teacher's whole text."""
    content: str
    """The part of it behind `</think>`."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    response: Literal["reasoning", "answer"],
    ending: Ending,
    system: str | None = None,
    suffix: str = "",
) -> list[Example]:
    """Prompt and response are tokenized apart and concatenated; the end of the assistant's turn is trained.

    The prompt is the chat template's up to where the assistant begins, so it is what the student is given later. The
    end is `tokenization.end_of_turn`, at which engines stop, whatever else the template would write behind a turn. A
    token that ends a response, written out at a response's end as raw samples have it, is that end, and not text.

    Args:
      ending: how the template's prompts end, from `check_template`.
    Raises:
      ValueError: an empty response, of which nothing would be trained.
    """
    prompts = render_prompts(tokenizer, [text.problem for text in texts], system=system, suffix=suffix)
    stops = stop_ids(Path(tokenizer.name_or_path), tokenizer)
    added = tokenizer.added_tokens_decoder
    names = tuple(added[i].content for i in stops if i in added)
    responses = [_without_end(response_text(text.response, text.content, response, ending), names) for text in texts]
    examples = []
    for text, prompt, written, (ids, starts) in zip(
        texts, prompts, responses, encode_responses(tokenizer, responses), strict=True
    ):
        if not (text.content if response == "answer" else text.response).strip():
            raise ValueError(
                f"{text.trace_id}: the {'answer' if response == 'answer' else 'response'} is empty, so there is "
                "nothing to train; let verify reject such traces (verify.think: required does)."
            )
        closed = written.rfind(CLOSE)
        thinking = bisect.bisect_left(starts, closed + len(CLOSE)) if closed >= 0 else 0
        regions = [PROMPT] * len(prompt) + [THINKING] * thinking + [ANSWER] * (len(ids) - thinking)
        left = [len(written) - start for start in starts]
        early = not set(stops).isdisjoint(ids[:-1]) or any(name in written for name in names)
        examples.append(Example(text.trace_id, prompt + ids, regions, starts=left, written=written, ends_early=early))
    return examples


def _without_end(response: str, stops: tuple[str, ...]) -> str:
    bare = response.rstrip()
    while stops and bare.endswith(stops):
        response = bare.removesuffix(next(stop for stop in stops if bare.endswith(stop)))
        bare = response.rstrip()
    return response


def count_steps(response: str, content: str) -> int:
    """Reasoning steps of a trace: the lines with something on them, of its thinking, or of all if it has none."""
    head, closing, _ = response.rpartition(CLOSE)
    thinking = head.replace("<think>", "") if closing else content
    return sum(1 for line in thinking.splitlines() if line.strip())
