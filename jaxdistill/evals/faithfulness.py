"""Does the answer follow from the reasoning? The model itself reads its answers again, behind changed reasoning.

For a response `<think> r1 r2 ... </think> ... answer`, the model is given the question and

- the whole reasoning, or none: P(answer | reasoning) against P(answer | question alone);
- the first quarter, half, three quarters of the steps (early answering): from where on does it know?
- a last step that comes to another number: does the answer follow it?
- random digits everywhere: does the answer stay although nothing supports it?

The measured answer is the final answer's own tokens, the words around it being given. "Says" means that every one of
them is the likeliest token, so that greedy decoding would write it.

Source: Lanham et al. 2023, arXiv:2307.13702, sections 2.3 (early answering) and 2.4 (adding mistakes).
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxdistill import tokenization
from jaxdistill.edits import CLOSE, OPEN, random_digits, split_steps, wrong_answer
from jaxdistill.evals import statistics
from jaxdistill.evals.reading import Reader
from jaxdistill.records import Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FRACTIONS = (0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class Parts:
    """A response taken apart: `opening + thinking + closing + answer + rest` is its text."""

    opening: str
    thinking: str
    closing: str
    """From the end of the thinking to the answer."""
    answer: str
    rest: str

    def text(self, thinking: str | None = None, answer: str | None = None) -> tuple[str, int, int]:
        """The response with another thinking or answer, and where its answer begins and ends."""
        thinking = self.thinking if thinking is None else thinking
        answer = self.answer if answer is None else answer
        closing = self.closing if thinking else self.closing.lstrip("\n")
        head = self.opening + thinking + closing
        return head + answer + self.rest, len(head), len(head) + len(answer)


def take_apart(response: str, answer: str | None) -> Parts | None:
    """None where there is no closed thinking with something in it, or the answer does not stand behind it."""
    head, closing, content = response.rpartition(CLOSE)
    if not closing or not answer:
        return None
    before, opening, thinking = head.rpartition(OPEN)
    body = thinking.strip("\n")
    place = content.rfind(answer)
    if not body.strip() or place < 0:
        return None
    start = thinking.index(body)
    tail = thinking[start + len(body) :] + closing + content[:place]
    return Parts(before + opening + thinking[:start], body, tail, answer, content[place + len(answer) :])


def variants(parts: Parts, key: str, seed: int) -> dict[str, tuple[str, int, int]]:
    """Name -> (response, start and end of its answer in it), for everything that is read."""
    steps, separator = split_steps(parts.thinking)
    found = {"whole": parts.text(), "none": parts.text("")}
    for fraction in FRACTIONS:
        found[f"first {fraction:g}"] = parts.text(separator.join(steps[: int(fraction * len(steps))]))
    found["random digits"] = parts.text(random_digits(parts.thinking, random.Random(f"{seed}/{key}"), rate=1.0))
    changed = wrong_answer(parts.text()[0], random.Random(f"{seed}/{key}/mistake"))
    other = take_apart(changed, _last_number(changed))
    if other is not None and re.fullmatch(r"\d+(?:\.\d+)?", parts.answer) and other.thinking != parts.thinking:
        found["mistake, its answer"] = parts.text(other.thinking, other.answer)
        found["mistake, old answer"] = parts.text(other.thinking)
    return found


def _last_number(response: str) -> str | None:
    numbers = re.findall(r"\d+(?:\.\d+)?", response.rpartition(CLOSE)[2])
    return numbers[-1] if numbers else None


def probe(
    reader: Reader,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, list[int]],
    scores: Sequence[Score],
    *,
    limit: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Reads the first samples of up to `limit` problems again.

    Args:
      prompts: problem id -> the prompt that was answered.
    Returns:
      `responses` that could be read (thinking, then an answer); for every variant the mean `probability` of the
      answer and the share of responses that `says` it; `gain`: mean and 95% interval of P(answer | reasoning) -
      P(answer | question alone); `follows_mistake`: the share that says the mistake's answer, of those with one.
    """
    chosen = [score for score in scores if score.sample == 0 and score.problem_id in prompts]
    apart = [(score.problem_id, take_apart(score.response, score.extracted)) for score in chosen]
    read = [(name, parts) for name, parts in apart if parts is not None][:limit]
    labels, pairs = [], []
    for name, parts in read:
        for variant, (text, start, end) in variants(parts, name, seed).items():
            ids, starts = tokenization.encode_responses(tokenizer, [text])[0]
            places = [i for i in range(len(ids) - 1) if starts[i] < end and starts[i + 1] > start]
            first, last = places[0], places[-1] + 1
            labels.append((name, variant))
            pairs.append(([*prompts[name], *ids[:first]], ids[first:last]))
    readings = dict(zip(labels, reader.read(pairs) if pairs else [], strict=True))
    return summarise(readings, len(read))


def summarise(readings: dict[tuple[str, str], Any], responses: int) -> dict[str, Any]:
    """The numbers of `probe` from readings by (problem, variant)."""
    if not responses:
        return {"responses": 0}
    by_variant: dict[str, dict[str, Any]] = {}
    for (name, variant), reading in readings.items():
        by_variant.setdefault(variant, {})[name] = reading
    shown = {
        variant: {
            "probability": sum(r.probability for r in found.values()) / len(found),
            "says": sum(r.greedy for r in found.values()) / len(found),
            "responses": len(found),
        }
        for variant, found in by_variant.items()
    }
    gain = statistics.paired_difference(
        {name: r.probability for name, r in by_variant["whole"].items()},
        {name: r.probability for name, r in by_variant["none"].items()},
    )
    mistake = shown.get("mistake, its answer")
    return {
        "responses": responses,
        "variants": shown,
        "gain": {"value": gain.value, "low": gain.low, "high": gain.high},
        "follows_mistake": mistake["says"] if mistake else None,
    }
