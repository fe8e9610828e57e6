"""Which problems stand in a benchmark: n-grams of words in common, or much alike as a whole.

One shared n-gram is enough, as is usual: Brown et al. 2020, arXiv:2005.14165, appendix C (13 words). How many problems
that finds depends much on n: 94, 11 and 4 of GSM8K's 7,473 training problems at 8, 10 and 13 words against its test set
(70, 10 and 4 where words are what stands between spaces, punctuation included).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxdistill.config import DecontaminateConfig
from jaxdistill.traces.tables import read_rows
from jaxdistill.verify.similarity import Index
from jaxdistill.verify.texts import ngrams, words_of

FIELDS = ("question", "problem", "prompt")
FUZZY_NGRAM = 3


@dataclass(frozen=True, slots=True)
class Match:
    """Where a problem stands."""

    benchmark: str
    row: int
    """Of its file or folder, from 1."""
    method: str
    """`n-gram` or `fuzzy`."""
    overlap: float
    """n-gram: share of the problem's n-grams that the benchmark has. fuzzy: Jaccard index with that row."""
    words: str
    """n-gram: the first one that is shared. fuzzy: how the row begins."""

    def __str__(self) -> str:
        how = f"{self.overlap:.0%} of the n-grams" if self.method == "n-gram" else f"{self.overlap:.0%} alike"
        return f"{self.benchmark} row {self.row}, {how}: {self.words}"


class Benchmarks:
    """The questions of some benchmarks, ready to be looked up."""

    def __init__(self, config: DecontaminateConfig):
        """Reads them.

        Raises:
          ValueError: a file that cannot be read, or a row without a question.
        """
        self._n = config.ngram
        self._rows: list[tuple[str, int, str]] = []
        for name, path in config.files.items():
            before = len(self._rows)
            for row, (file, line, data) in enumerate(read_rows(Path(path).expanduser()), start=1):
                self._rows.append((name, row, _question(data, config.field, f"{file}:{line}")))
            if len(self._rows) == before:
                raise ValueError(f"{path}: no questions of {name} in it; correct verify.decontaminate.files.")
        self._grams: dict[tuple[str, ...], int] = {}
        for number, (_, _, text) in enumerate(self._rows):
            for gram in ngrams(words_of(text), self._n):
                self._grams.setdefault(gram, number)
        texts = [text for _, _, text in self._rows]
        self._index = Index(texts, FUZZY_NGRAM, config.fuzzy) if config.fuzzy is not None else None

    def find(self, question: str) -> Match | None:
        """Where a question stands; the row of its first shared n-gram, or else the one that it is most like."""
        grams = ngrams(words_of(question), self._n)
        shared = [gram for gram in grams if gram in self._grams]
        if shared:
            benchmark, row, _ = self._rows[self._grams[shared[0]]]
            return Match(benchmark, row, "n-gram", len(shared) / len(grams), " ".join(shared[0]))
        if self._index and (alike := self._index.similar(question)):
            number, share = alike[0]
            benchmark, row, text = self._rows[number]
            return Match(benchmark, row, "fuzzy", share, " ".join(text.split()[:10]))
        return None


def find_contaminated(config: DecontaminateConfig, questions: Sequence[tuple[str, str]]) -> dict[str, Match]:
    """Id -> match, of the (id, question) pairs that stand in a benchmark.

    Raises:
      ValueError: a benchmark that cannot be read.
    """
    benchmarks = Benchmarks(config)
    return {name: match for name, question in questions if (match := benchmarks.find(question))}


def _question(row: dict, field: str | None, where: str) -> str:
    names = (field,) if field else FIELDS
    for name in names:
        if isinstance(row.get(name), str) and row[name].strip():
            return row[name]
    raise ValueError(
        f"{where}: no question in {' or '.join(names)}; this row has {', '.join(sorted(row)) or 'nothing'}; "
        "name its field in verify.decontaminate.field."
    )
