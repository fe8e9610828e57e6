"""The work to do: every (problem, style, sample) in order, a pure function of config, problems and rounds.

A work list holds its prompts once and makes a request when it is asked for, so that its size does not depend on how
many samples are drawn of each prompt. What cannot be asked is said here, before the first token is drawn.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from jaxdistill import control, tokenization
from jaxdistill.config import TracesConfig, fingerprint
from jaxdistill.records import Problem
from jaxdistill.traces import thinking
from jaxdistill.traces.engines import Request
from jaxdistill.traces.styles import Style, load_styles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 512
"""Prompts rendered at once."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One sample that is to be drawn."""

    problem: Problem
    style: Style
    sample: int


def trace_id(problem_id: str, style: str, sample: int) -> str:
    return f"{problem_id}/{style}/{sample}"


def sample_seed(seed: int, name: str) -> int:
    """A trace's own seed in 0..2**31-1: the same on every machine, and whatever else there is to do."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4]) >> 1


class WorkList(Sequence[Work]):
    """All samples of all problems and styles; a prompt's samples lie side by side, so that they share its cache."""

    def __init__(
        self,
        config: TracesConfig,
        problems: list[Problem],
        tokenizer: PreTrainedTokenizerBase | None,
        counts: dict[tuple[str, str], int] | None = None,
    ):
        """Renders the prompts.

        Args:
          tokenizer: the teacher's; None where a chat server renders the prompts.
          counts: samples of a (problem id, style), where they are not `config.samples`.
        Raises:
          ValueError: an id that repeats, an empty problem, or a style or template that cannot be rendered.
        """
        check_problems(problems)
        self.config, self.problems = config, problems
        self.styles = load_styles(config.styles, config.styles_file)
        self._row = {problem.id: row for row, problem in enumerate(problems)}
        self._column = {style.name: column for column, style in enumerate(self.styles)}
        samples = np.full((len(problems), len(self.styles)), config.samples, np.int64)
        for (problem, style), count in (counts or {}).items():
            samples[self._row[problem], self._column[style]] = count
        self._ends = np.cumsum(samples.reshape(-1))
        self._samples = samples
        self._prompts: list[np.ndarray] = []
        self._opened = np.zeros(len(self._ends), np.bool_)
        if tokenizer is not None:
            self._render(tokenizer)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, number: int) -> Work: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Work]: ...
    def __getitem__(self, number: int | slice) -> Work | Sequence[Work]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        prompt, sample = self._place(number)
        row, column = divmod(prompt, len(self.styles))
        return Work(self.problems[row], self.styles[column], sample)

    def number_of(self, name: str) -> int | None:
        """A sample's number, by its trace's id; None if it is not in the list."""
        head, _, sample = name.rpartition("/")
        problem, _, style = head.rpartition("/")
        row, column = self._row.get(problem), self._column.get(style)
        if row is None or column is None or not sample.isdigit() or int(sample) >= self._samples[row, column]:
            return None
        prompt = row * len(self.styles) + column
        return int(self._ends[prompt] - self._samples[row, column]) + int(sample)

    def request(self, number: int) -> Request:
        work, (prompt, _) = self[number], self._place(number)
        name = trace_id(work.problem.id, work.style.name, work.sample)
        return Request(
            name,
            self._prompts[prompt].tolist() if self._prompts else [],
            sample_seed(self.config.seed, name),
            None if self._prompts else self.messages(work.problem, work.style),
        )

    def opened(self, number: int) -> bool:
        """Whether the prompt of a sample ends with the opening tag of the thinking."""
        return bool(self._opened[self._place(number)[0]])

    def messages(
        self, problem: Problem, style: Style, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[dict[str, str]]:
        """The chat that asks a problem: for a tokenizer's template with quoted control tokens marked, else as it is."""
        text = tokenization.quote(tokenizer, problem.prompt) if tokenizer is not None else problem.prompt
        return style.messages(text, system=self.config.system, suffix=self.config.suffix)

    def hashes(self) -> tuple[str, str]:
        """Of the problems, and of the prompts as they are sent: equal exactly if those are."""
        digest = hashlib.sha256()
        if self._prompts:
            for prompt in self._prompts:
                digest.update(len(prompt).to_bytes(8, "little") + prompt.astype("<i4").tobytes())
        else:
            for problem in self.problems:
                for style in self.styles:
                    digest.update(fingerprint(self.messages(problem, style)).encode())
        problems = hashlib.sha256()
        for problem in self.problems:
            problems.update(fingerprint([problem.id, problem.prompt]).encode())
        return problems.hexdigest()[:16], digest.hexdigest()[:16]

    def _place(self, number: int) -> tuple[int, int]:
        """(prompt, sample) of a sample's number."""
        prompt = int(np.searchsorted(self._ends, number, side="right"))
        return prompt, int(number - (self._ends[prompt - 1] if prompt else 0))

    def _render(self, tokenizer: PreTrainedTokenizerBase) -> None:
        asked = [(problem, style) for problem in self.problems for style in self.styles]
        for start in range(0, len(asked), CHUNK):
            part = asked[start : start + CHUNK]
            texts = tokenization.render_chats(tokenizer, [self.messages(*pair, tokenizer) for pair in part])
            for offset, ((problem, style), text) in enumerate(zip(part, texts, strict=True)):
                if problem.prompt.strip() not in control.clean(text):
                    raise ValueError(
                        f"{problem.id}: the chat template of {self.config.teacher} leaves the problem out of the "
                        f"prompt (style {style.name}); use another template or style."
                    )
                self._opened[start + offset] = thinking.is_open(text, self.config.think_tags)
            self._prompts += [np.array(ids, np.int32) for ids in tokenization.encode_prompts(tokenizer, texts)]


class Requests(Sequence[Request]):
    """Some samples of a work list as requests, made one at a time."""

    def __init__(self, work: WorkList, numbers: np.ndarray):
        self._work, self._numbers = work, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Request: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Request]: ...
    def __getitem__(self, place: int | slice) -> Request | Sequence[Request]:
        if isinstance(place, slice):
            return Requests(self._work, self._numbers[place])
        return self._work.request(int(self._numbers[place]))

    def __iter__(self) -> Iterator[Request]:
        return (self._work.request(int(number)) for number in self._numbers)


def check_problems(problems: list[Problem]) -> None:
    """Refuses problems that cannot be asked or told apart."""
    if not problems:
        raise ValueError("no problems to ask; make them first (`jaxdistill generate`).")
    repeated, times = Counter(problem.id for problem in problems).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{repeated}: {times} problems have this id; make ids differ, as traces go by them.")
    empty = [problem for problem in problems if not problem.prompt.strip()]
    if empty:
        raise ValueError(f"{empty[0].id} ({empty[0].source}): the problem is empty ({len(empty)} are); leave it out.")
