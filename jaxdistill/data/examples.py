"""From a kept trace to token ids, with every token's region: what is prompt, what is thinking, what is answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from jaxdistill.records import Problem, Trace
from jaxdistill.tokenization import encode_responses, render_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT, THINKING, ANSWER = 0, 1, 2
"""Regions of a token. `PROMPT` (and padding) is never trained; the other two are, each with its own weight."""

EMPTY_THINKING = "<think>\n</think>\n"


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenized trace."""

    trace_id: str
    tokens: list[int]
    regions: list[int]


def response_text(trace: Trace, response: Literal["reasoning", "answer"]) -> str:
    """What the student is to write: the trace as it is, or its answer behind an empty thinking."""
    if response == "answer":
        return EMPTY_THINKING + trace.content
    opened_by_prompt = "</think>" in trace.response and "<think>" not in trace.response
    return ("<think>\n" if opened_by_prompt else "") + trace.response


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Problem, Trace]],
    *,
    response: Literal["reasoning", "answer"],
    system: str | None = None,
    suffix: str = "",
) -> list[Example]:
    """Prompt and response are tokenized apart and concatenated; the response ends with the eos, which is trained."""
    prompts = render_prompts(tokenizer, [problem.prompt for problem, _ in pairs], system=system, suffix=suffix)
    texts = [response_text(trace, response) for _, trace in pairs]
    examples = []
    for (_, trace), prompt, text, (ids, starts) in zip(
        pairs, prompts, texts, encode_responses(tokenizer, texts), strict=True
    ):
        thinking_end = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
        regions = [THINKING if start < thinking_end else ANSWER for start in starts]
        examples.append(Example(trace.id, prompt + ids, [PROMPT] * len(prompt) + regions))
    return examples
