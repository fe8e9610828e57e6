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
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|channel>thought", "<channel|>"),
)
"""Opening and closing tag: DeepSeek-R1's and Qwen's first, then those of Sky-T1 and OpenThoughts, Command A, Seed-OSS,
LongCat, Kimi, Magistral, MedGemma, gpt-oss and Gemma 4, and what people ask models for."""
_FIRST = re.compile(r"\s*<([A-Za-z][\w:.-]{1,30})>")


def pair_of(text: str) -> tuple[str, str] | None:
    """The pair of tags that a text's thinking stands between: a known one, or an element that the text begins with."""
    for opening, closing in KNOWN:
        if closing in text and (opening in text or text.find(closing) > 0):
            return opening, closing
    if (match := _FIRST.match(text)) and f"</{match[1]}>" in text[match.end() :]:
        return f"<{match[1]}>", f"</{match[1]}>"
    return None


def count_pairs(texts: Iterable[str]) -> Counter[tuple[str, str] | None]:
    """Pair -> texts that think between these tags; None for those without any."""
    return Counter(map(pair_of, texts))
