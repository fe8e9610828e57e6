"""What models put around their thinking: the pairs that are known, and what stands in some texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

KNOWN = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<thoughts>", "</thoughts>"),
    ("<reasoning>", "</reasoning>"),
    ("<reason>", "</reason>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<analysis>", "</analysis>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),
    ("<unused94>", "<unused95>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
)
"""Opening and closing tag: DeepSeek-R1's and Qwen's first, then those of Sky-T1 and OpenThoughts, Command A, Seed-OSS,
LongCat, Kimi, Magistral, MedGemma, gpt-oss and Gemma 4, and what people ask models for."""
NO_THINKING = (
    "answer",
    "final_answer",
    "solution",
    "response",
    "output",
    "question",
    "problem",
    "p",
    "b",
    "div",
    "html",
)
"""Elements that texts begin with, too."""
_FIRST = re.compile(r"\s*<([A-Za-z][\w:.-]{1,30})>")


def pair_of(text: str, *, guess: bool = True) -> tuple[str, str] | None:
    """The pair of tags that a text's thinking stands between.

    Args:
      guess: also an element that the text begins with, where no known pair is in it.
    """
    for opening, closing in KNOWN:
        if closing in text and (opening in text or text.find(closing) > 0):
            return opening, closing
    match = _FIRST.match(text) if guess else None
    if match and match[1].lower() not in NO_THINKING and f"</{match[1]}>" in text[match.end() :]:
        return f"<{match[1]}>", f"</{match[1]}>"
    return None


def count_pairs(texts: Iterable[str], *, guess: bool = True) -> Counter[tuple[str, str] | None]:
    """Pair -> texts that think between these tags; None for those without any."""
    return Counter(pair_of(text, guess=guess) for text in texts)
