"""What contrastive training needs beside its loss: rows of pairs for every step, and what the reference says of them.

Dimension key: S segments of a row of pairs (a pair is two).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdistill import progress
from jaxdistill.config import RunConfig, fingerprint
from jaxdistill.data.pairs import PairRows
from jaxdistill.models import Decoder, join_params, with_params
from jaxdistill.parallel import mesh as meshes
from jaxdistill.parallel import processes
from jaxdistill.records import RunDir, atomic_file, read_manifest
from jaxdistill.train.contrastive import Batch, Contrast, axes_of, response_logprobs

REFERENCE = "reference.npz"


class PairFeed:
    """The rows of pairs of every step, on the devices, with the reference's log-probabilities beside them."""

    def __init__(self, rows: PairRows, mesh: Mesh):
        self.rows, self.mesh = rows, mesh
        self.reference: np.ndarray | None = None
        """fp32 [rows, S] of the stored rows."""

    def __call__(self, step: int) -> Batch:
        """Batch `step` of the pairs."""
        return self.put(self.rows.row_numbers(step))

    def put(self, numbers: list[int]) -> Batch:
        """Some stored rows on the devices."""
        found = self.rows.stored(numbers)
        zeros = np.zeros((len(numbers), self.rows.segments), np.float32)
        found["reference"] = zeros if self.reference is None else self.reference[numbers]

        def place(name: str, x: np.ndarray) -> jax.Array:
            where = meshes.sharding(self.mesh, axes_of(name), shape=x.shape, name="batch of pairs")
            return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

        return {name: place(name, x) for name, x in found.items()}


def set_up_contrast(
    config: RunConfig, run: RunDir, mesh: Mesh, vocabulary: int
) -> tuple[Contrast | None, PairFeed | None]:
    """What the step has to know, and its rows; nothing without `train.contrastive`.

    Raises:
      ValueError: no pairs, tokens that the student has no embedding for, or rows that do not divide over the devices.
    """
    c, t = config.train.contrastive, config.train
    if c is None:
        return None, None
    batch_rows = c.batch_rows or t.batch_rows
    ways = (t.micro_batches or 1) * mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_rows % ways:
        raise ValueError(
            f"train.contrastive.batch_rows={batch_rows} is not a multiple of micro_batches x data x fsdp = {ways}."
        )
    rows = PairRows(run.tokens, batch_rows=batch_rows, seed=config.seed)
    if rows.largest_token >= vocabulary:
        raise ValueError(
            f"{run.tokens}: a pair has token {rows.largest_token}, outside of the student's vocabulary of "
            f"{vocabulary}; prepare the data again with the student's own tokenizer."
        )
    return Contrast.of(c, rows.segments), PairFeed(rows, mesh)


def reference_logprobs(
    contrast: Contrast,
    feed: PairFeed,
    model: Decoder,
    folder: Path,
    identity: Any,
    start: Callable[[], tuple[Any, Any]],
) -> None:
    """Gives the feed the reference's log-probabilities: those of a file, or computed now and written to it.

    Args:
      identity: of the student before its first step and of the pairs; a file of another one is replaced.
      start: gives (parameters, frozen parameters) of the student before its first step.
    """
    if not contrast.form.reference:
        return
    path, wanted = folder / REFERENCE, fingerprint(identity)
    if path.is_file():
        with np.load(path) as found:
            if str(found["identity"]) == wanted:
                feed.reference = found["logprobs"]
                return
    params, frozen = start()
    everywhere = jax.sharding.NamedSharding(feed.mesh, jax.sharding.PartitionSpec())

    def sums(params: Any, frozen: Any, batch: Batch) -> jax.Array:
        whole = with_params(model, join_params(params, frozen))
        hidden_BTE = whole.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        return response_logprobs(whole, hidden_BTE, batch, contrast.segments)[0]

    compute = jax.jit(sums, out_shardings=everywhere, compiler_options=model.compiler_options)
    count, size = feed.rows.rows, feed.rows.batch_rows
    found = np.zeros((count, contrast.segments), np.float32)
    for first in range(0, count, size):
        numbers = [min(first + i, count - 1) for i in range(size)]  # the last row again, where they do not divide
        found[numbers] = np.asarray(compute(params, frozen, feed.put(numbers)))
    if processes.is_first():
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, logprobs=found, identity=np.array(wanted))
    progress.say(f"  reference log-probabilities of {count:,} rows of pairs: {path}")
    feed.reference = found


def reference_identity(config: RunConfig, run: RunDir) -> Any:
    """What the reference's log-probabilities depend on, as plain data."""
    manifest = read_manifest(run.tokens) or {"config_hash": "", "inputs": {}}
    return [config.student, config.seed, config.train.compute_dtype, manifest["config_hash"], manifest["inputs"]]
