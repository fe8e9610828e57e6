"""A teacher's distributions on their way beside the tokens: whose they are, and which of them belongs to which token.

A distribution is stored beside the token that it is about: the one at token t says what the teacher would have written
in place of token t. Training shifts both together (`losses.shift`), so that position t learns from token t + 1's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdistill.data import topk
from jaxdistill.data.examples import Example
from jaxdistill.data.topk import TopK
from jaxdistill.records import RunDir
from jaxdistill.tokenization import encode_responses, special_tokens
from jaxdistill.traces import logprobs
from jaxdistill.traces.logprobs import Origin, TopLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLACK = 1e-3
"""Nats by which an engine may contradict itself."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a teacher wrote, token by token, and its distribution at each."""

    tokens: list[int]
    found: TopLogprobs


@dataclass(frozen=True, slots=True)
class Beside:
    """How distributions come beside an example's tokens."""

    codec: TopK
    teacher: PreTrainedTokenizerBase | None = None
    """Where it is not the student's."""


class Reader:
    """The distributions of one run's traces, gone through in the order of the traces."""

    def __init__(self, run: RunDir, tokenizer: str | None, wanted: int):
        """
        Args:
          tokenizer: the fingerprint of the student's token map; None if it need not be the teacher's.
          wanted: tokens to be stored of each distribution.
        Raises:
          ValueError: the run has no logprobs.
        """
        self._folder = run.traces / logprobs.FOLDER
        self._tokenizer, self._wanted = tokenizer, wanted
        self.origin = logprobs.read_origin(self._folder)
        self._rows: Any = None

    def of(self, trace: Any) -> Drawn:
        """The distributions of a trace; traces are asked for in the order of their files.

        Raises:
          ValueError: there are none for it, or they are another tokenizer's, another teacher's or of other tokens; its
            id is named.
        """
        if self._rows is None:
            self._check_origin(trace.id, self.origin)
            self._rows = logprobs.read_logprobs(self._folder)
        if trace.engine != "import" and trace.revision != self.origin.revision:
            raise ValueError(
                f"{trace.id}: drawn from revision {trace.revision} of {trace.teacher}, and {self._folder} holds "
                f"logprobs of revision {self.origin.revision} of {self.origin.teacher}; collect the traces again."
            )
        for name, found in self._rows:
            if name == trace.id:
                check(trace.id, trace.output_ids, found, self.origin.vocabulary, self._wanted, self.origin.random)
                return Drawn(trace.output_ids, found)
        raise ValueError(
            f"{trace.id}: no logprobs in {self._folder}, or not in the order of the traces; collect the traces again "
            "with traces.logprobs, or drop data.topk."
        )

    def _check_origin(self, trace_id: str, origin: Origin) -> None:
        if self._tokenizer is not None and origin.tokenizer != self._tokenizer:
            raise ValueError(
                f"{trace_id}: its logprobs are about the tokens of {origin.teacher} ({origin.tokenizer}), and the "
                f"student has others ({self._tokenizer}); give the student the teacher's tokenizer, or drop data.topk."
            )


def check(
    name: str, tokens: Sequence[int], found: TopLogprobs, vocabulary: int, wanted: int, random: bool = False
) -> None:
    """Refuses what cannot be the teacher's distributions at these tokens.

    A drawn token's own logprob stands beside the list of the likeliest: the two agree, if the rows belong to the tokens
    and are not one off. Random draws are without such a witness; of them none may be left out.

    Raises:
      ValueError: with the trace's id.
    """
    T, k = found.ids.shape
    if len(tokens) != T:
        raise ValueError(f"{name}: logprobs at {T} positions for {len(tokens)} tokens; collect the traces again.")
    if random:
        _check_draws(name, found, vocabulary, wanted)
        return
    if wanted > k:
        raise ValueError(f"{name}: logprobs of {k} tokens a position, and data.topk={wanted}; lower it.")
    values = np.concatenate([found.logprobs, found.sampled[:, None]], axis=1)
    if not np.isfinite(values).all() or values.max(initial=0) > SLACK:
        at = int(np.argmax((~np.isfinite(values) | (values > SLACK)).any(1)))
        raise ValueError(
            f"{name}: a logprob at position {at} is no finite number of at most 0; collect the traces again."
        )
    drawn = np.asarray(tokens, np.int64)
    ids = np.sort(found.ids, axis=1)
    if (ids[:, 1:] == ids[:, :-1]).any() or ids.min(initial=0) < 0 or max(ids.max(initial=0), 0) >= vocabulary:
        raise ValueError(f"{name}: token ids that repeat, or outside of 0..{vocabulary - 1}; collect the traces again.")
    same = found.ids == drawn[:, None]
    listed = np.where(same, found.logprobs, -np.inf).max(1)
    wrong = np.where(same.any(1), np.abs(listed - found.sampled) > SLACK, found.sampled > found.logprobs.min(1) + SLACK)
    wrong |= np.exp(found.logprobs.astype(np.float64)).sum(1) > 1.01
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"{name}: the logprobs at position {at} are not those of the token there ({int(drawn[at])}); they belong "
            "to other tokens, or are shifted; collect the traces again."
        )


def _check_draws(name: str, found: TopLogprobs, vocabulary: int, wanted: int) -> None:
    shares = np.exp(found.logprobs.astype(np.float64))
    most = int((shares > 0).sum(1).max(initial=0))
    if most > wanted:
        raise ValueError(f"{name}: {most} different draws at a position, and data.topk={wanted}; raise it to {most}.")
    if not np.allclose(shares.sum(1), 1, atol=1e-3) or found.ids.min(initial=0) < 0 or found.ids.max() >= vocabulary:
        raise ValueError(f"{name}: shares of draws that do not add up to 1, or ids that are none; collect them again.")


def align(tokenizer: PreTrainedTokenizerBase, student: Sequence[int], teacher: Sequence[int]) -> np.ndarray:
    """For each of the student's tokens, which of the teacher's is the same one, or -1; int64 [len(student)].

    Both are the same text, mostly cut into the same tokens: a sampled response need not be cut as its text would be,
    and the student's may have another beginning (`data.templates.response_text`). Tokens are the same if they have the
    same id, and behind them the same text to the end of the response.
    """
    student, teacher = list(student), list(teacher)
    if student == teacher:
        return np.arange(len(student))
    found = np.full(len(student), -1, np.int64)
    ends = set(special_tokens(tokenizer).values())
    size, drawn = len(student) - 1, len(teacher)  # the student's ends with the end of its turn
    if teacher and teacher[-1] in ends:
        drawn -= 1
        if teacher[-1] == student[-1]:
            found[-1] = drawn
    mine, theirs = (tokenizer.convert_ids_to_tokens(t) for t in (student[:size], teacher[:drawn]))
    common = common_end("".join(mine), "".join(theirs))
    places = {}
    left = 0
    for at in range(drawn - 1, -1, -1):
        places[left] = at
        left += len(theirs[at])
    left = 0
    for at in range(size - 1, -1, -1):
        other = places.get(left)
        left += len(mine[at])
        if left > common:
            break
        if other is not None and teacher[other] == student[at]:
            found[at] = other
    return found


def align_spans(student: Sequence[int], teacher: Sequence[int], common: int) -> np.ndarray:
    """For each of the student's tokens, which of the teacher's begins at the same place, or -1; int64 [len(student)].

    At such a place both have read the same text, and say what comes next. Approximate: what comes next is cut in
    another way, and of a character that takes several tokens only the first begins anywhere.

    Args:
      student, teacher: how many characters stand from the first of each token on, in falling order.
      common: so many characters at the end of both texts are equal.
    """
    places: dict[int, int] = {}
    for at, left in enumerate(teacher):
        places.setdefault(left, at)
    found, before = np.full(len(student), -1, np.int64), None
    for at, left in enumerate(student):
        if left <= common and left != before:
            found[at] = places.get(left, -1)
        before = left
    return found


def common_end(a: str, b: str) -> int:
    """How many characters at the end of both are equal."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def rows_beside(
    example: Example, response: str, tokenizer: PreTrainedTokenizerBase, drawn: Drawn, beside: Beside
) -> np.ndarray:
    """The packed distributions beside an example's tokens: uint8 [T, width], zeros where there is none.

    Args:
      response: the teacher's text.
    Raises:
      ValueError: not one token of the response is the teacher's.
    """
    codec, tokens, name = beside.codec, list(example.tokens), example.trace_id
    prompt = len(tokens) - len(example.starts)
    if beside.teacher is None:
        where = align(tokenizer, tokens[prompt:], drawn.tokens)
    else:
        ((ids, starts),) = encode_responses(beside.teacher, [response])
        # what was drawn may be cut otherwise than the text is
        rows = align(beside.teacher, ids, drawn.tokens)
        behind = [len(response) - start for start in starts]
        where = align_spans(example.starts, behind, common_end(example.written, response))
        where = np.where(where >= 0, rows[where], -1)
    if not (where >= 0).any():
        raise ValueError(
            f"{name}: not one of the {len(tokens) - prompt} tokens of the response is among the {len(drawn.tokens)} of "
            "its logprobs; they do not line up, so collect the traces again, or drop data.topk."
        )
    found = drawn.found
    if codec.random:
        packed = topk.encode_draws(found.ids, found.logprobs, codec)
    else:
        packed = topk.encode(found.ids, found.logprobs, np.asarray(drawn.tokens, np.int64), found.sampled, codec)
    rows = np.zeros((len(tokens), codec.width), np.uint8)
    rows[prompt:][where >= 0] = packed[where[where >= 0]]
    return rows
