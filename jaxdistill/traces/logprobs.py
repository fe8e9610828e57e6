"""Top-k logprobs of a teacher: what an engine hands over, a file beside the journal, and Parquet at the end.

While samples arrive they are appended to `logprobs.bin`, and the journal's line says where; a tail that no line speaks
of is cut off. The finished stage has `logprobs/logprobs.parquet`, one row a trace, in the order of the traces:

    trace_id: string    tokens: int64 (T)    k: int64    ids: binary    logprobs: binary    sampled: binary

`ids` are int32 [T, k] and `logprobs` float32 [T, k], likeliest first, `sampled` float32 [T] is the drawn token's own
logprob; all little-endian, row by row. They are natural logarithms of the teacher's probabilities before temperature
and top-p, over the whole vocabulary, so that what the k do not hold is the tail's mass. This plain form takes 8 k + 4
bytes a token; `encode` and `decode` are the one place to change for a denser one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdistill.records import atomic_file

FOLDER = "logprobs"
"""Below the traces' own folder, whose Parquet files are all traces."""
FILE = "logprobs.parquet"
SCHEMA = pa.schema(
    [
        ("trace_id", pa.string()),
        ("tokens", pa.int64()),
        ("k", pa.int64()),
        ("ids", pa.binary()),
        ("logprobs", pa.binary()),
        ("sampled", pa.binary()),
    ]
)


_ORIGIN = b"jaxdistill.origin"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Whose logprobs a file holds; in the file's own metadata."""

    teacher: str
    revision: str
    tokenizer: str
    """The fingerprint of its token map, see `tokenization.TokenMap`."""
    vocabulary: int
    """Token ids are below it."""
    random: bool = False
    """The k are random draws, each token once, with the logarithm of its share of them, and -inf in empty slots."""
    temperature: float = 1.0
    """Divided the teacher's logits."""


@dataclasses.dataclass(frozen=True, eq=False)
class TopLogprobs:
    """The k likeliest tokens at each of T generated positions."""

    ids: np.ndarray
    """int32 [T, k], likeliest first."""
    logprobs: np.ndarray
    """float32 [T, k], in nats."""
    sampled: np.ndarray
    """float32 [T], of the token that was drawn."""

    def __post_init__(self):
        assert self.ids.ndim == 2
        assert self.ids.shape == self.logprobs.shape
        assert self.sampled.shape == self.ids.shape[:1]


def from_candidates(positions: Iterable[dict[int, float]], drawn: list[int], k: int) -> TopLogprobs:
    """Sorts what an engine gives: at each position token id -> logprob, the drawn token among them.

    Raises:
      ValueError: a position too few or too many, fewer than k tokens at one, or a logprob that is none.
    """
    rows = []
    positions = list(positions)
    if len(positions) != len(drawn):
        raise ValueError(f"logprobs at {len(positions)} positions for {len(drawn)} tokens")
    for number, (found, token) in enumerate(zip(positions, drawn, strict=True)):
        if token not in found or len(found) < k:
            raise ValueError(f"logprobs of {len(found)} tokens at position {number}, not of {k} and the drawn one")
        if not all(math.isfinite(value) and value <= 1e-3 for value in found.values()):
            raise ValueError(f"a logprob at position {number} is not a finite number of at most 0")
        rows.append(sorted(found.items(), key=lambda item: (-item[1], item[0]))[:k])
    shape = (len(rows), k)
    return TopLogprobs(
        ids=np.array([[token for token, _ in row] for row in rows], np.int32).reshape(shape),
        logprobs=np.array([[value for _, value in row] for row in rows], np.float32).reshape(shape),
        sampled=np.array([found[token] for found, token in zip(positions, drawn, strict=True)], np.float32),
    )


def encode(found: TopLogprobs) -> bytes:
    """Ids, logprobs and the drawn token's, one after the other."""
    return (
        found.ids.astype("<i4").tobytes()
        + found.logprobs.astype("<f4").tobytes()
        + found.sampled.astype("<f4").tobytes()
    )


def decode(data: bytes, tokens: int, k: int) -> TopLogprobs:
    """The inverse of `encode`."""
    ids, logprobs, sampled = data[: 4 * tokens * k], data[4 * tokens * k : 8 * tokens * k], data[8 * tokens * k :]
    return TopLogprobs(
        ids=np.frombuffer(ids, "<i4").reshape(tokens, k),
        logprobs=np.frombuffer(logprobs, "<f4").reshape(tokens, k),
        sampled=np.frombuffer(sampled, "<f4"),
    )


def size(tokens: int, k: int) -> int:
    """Bytes that `encode` makes of T tokens."""
    return 4 * tokens * (2 * k + 1)


# ------------------------------------------------------------------------------------------------ the finished file


def write_logprobs(folder: Path, rows: Iterable[tuple[str, TopLogprobs]], origin: Origin, *, batch: int = 256) -> int:
    """Writes (trace id, logprobs) to `folder/logprobs.parquet`, few at a time; gives how many."""
    count = 0
    schema = SCHEMA.with_metadata({_ORIGIN: json.dumps(dataclasses.asdict(origin)).encode()})
    # statistics are the least and the greatest value of each batch: nobody asks for them, and the writer holds them all
    options: dict = {"compression": "zstd", "write_statistics": False}
    with atomic_file(folder / FILE) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        rest: list[dict] = []
        for name, found in rows:
            rest.append(_row(name, found))
            if len(rest) == batch:
                writer.write_table(pa.Table.from_pylist(rest, schema=schema))
                count, rest = count + len(rest), []
        writer.write_table(pa.Table.from_pylist(rest, schema=schema))
    return count + len(rest)


def read_logprobs(folder: Path) -> Iterator[tuple[str, TopLogprobs]]:
    """Reads what `write_logprobs` wrote, in its order.

    Raises:
      ValueError: there is no such file.
    """
    with pq.ParquetFile(_existing(folder)) as file:
        for part in file.iter_batches(batch_size=256):
            for row in part.to_pylist():
                data = row["ids"] + row["logprobs"] + row["sampled"]
                yield row["trace_id"], decode(data, row["tokens"], row["k"])


def read_origin(folder: Path) -> Origin:
    """Whose logprobs a folder holds.

    Raises:
      ValueError: there is no file, or it does not say whose.
    """
    found = (pq.read_schema(_existing(folder)).metadata or {}).get(_ORIGIN)
    if found is None:
        raise ValueError(f"{folder}: {FILE} does not say which teacher's it is; collect the traces again.")
    return Origin(**json.loads(found))


def _existing(folder: Path) -> Path:
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder}: no {FILE}; collect the traces with traces.logprobs set.")
    return folder / FILE


def _row(name: str, found: TopLogprobs) -> dict:
    tokens, k = found.ids.shape
    data = encode(found)
    return {
        "trace_id": name,
        "tokens": tokens,
        "k": k,
        "ids": data[: 4 * tokens * k],
        "logprobs": data[4 * tokens * k : 8 * tokens * k],
        "sampled": data[8 * tokens * k :],
    }
