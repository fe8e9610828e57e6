"""Contrastive learning inside the step: pairs of responses beside the cross-entropy of the packed rows.

Dimension key: B rows of pairs, T tokens, E width, S segments of a row (a pair is two), P pairs of a batch.

A pair's loss is a function of two summed log-probabilities. Its derivatives by these are numbers; so the gradient is
that of a weighted cross-entropy, whose weights they are, and logits never exist whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdistill import progress
from jaxdistill.config import ContrastiveConfig, RunConfig, fingerprint
from jaxdistill.data.pairs import PairRows
from jaxdistill.losses import PREFERENCES, Layout, Pairs, chunked_cross_entropy, shift
from jaxdistill.losses.preferences import Form
from jaxdistill.models import Decoder, join_params, with_params
from jaxdistill.parallel import mesh as meshes
from jaxdistill.parallel import processes
from jaxdistill.records import RunDir, atomic_file, read_manifest

REFERENCE = "reference.npz"
METRICS = ("lm_loss", "pair_loss", "pair_accuracy", "pair_margin", "chosen_logprob", "rejected_logprob")
"""Means that a step has beside its loss; log-probabilities are those of a token, in nats."""
PROJECTED = 256
"""Positions of every row that are projected onto the vocabulary at once."""
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What a step has to know of it; all static.

    Attributes:
      segments: S, of the fullest row of pairs.
    """

    form: Form
    weight: float
    lm_weight: float
    beta: float
    gap: float
    normalize: bool
    segments: int

    @classmethod
    def of(cls, config: ContrastiveConfig, segments: int) -> Contrast:
        form = PREFERENCES[config.form]

        def given(name: str) -> Any:
            return getattr(form, name) if getattr(config, name) is None else getattr(config, name)

        return cls(
            form=form,
            weight=config.weight,
            lm_weight=config.lm_weight,
            beta=given("beta"),
            gap=given("gap"),
            normalize=given("normalize"),
            segments=segments,
        )

    def losses(self, pairs: Pairs) -> jax.Array:
        """One loss a pair, [P]."""
        return self.form.loss(pairs, beta=self.beta, gap=self.gap, normalize=self.normalize)

    def add_gradients(
        self,
        model: Decoder,
        params: Any,
        pairs: Batch,
        gradient: Any,
        metrics: dict[str, jax.Array],
        micro_batches: int,
        *,
        frozen: Any = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """The cross-entropy's gradient and metrics with those of the pairs added.

        Args:
          pairs: packed rows of pairs; `reference` [B, S], the reference's log-probabilities, zeros where none is used.
        """
        found_gradient, found = pair_gradients(
            self, model, params, pairs, micro_batches, frozen=frozen, dropout_key=dropout_key
        )
        gradient = jax.tree.map(lambda a, b: self.lm_weight * a + self.weight * b, gradient, found_gradient)
        lm = metrics["loss"]
        return gradient, metrics | found | {
            "loss": self.lm_weight * lm + self.weight * found["pair_loss"],
            "lm_loss": lm,
        }


def pair_gradients(
    contrast: Contrast,
    model: Decoder,
    params: Any,
    batch: Batch,
    micro_batches: int = 1,
    *,
    frozen: Any = None,
    dropout_key: jax.Array | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of the mean loss over all pairs of the batch, however many micro-batches it is taken in.

    Returns:
      (gradient, {pair_loss, pair_accuracy, pair_margin, chosen_logprob, rejected_logprob}).
    """
    count = jnp.maximum(_pairs_in(batch, contrast.segments), 1.0)

    def part_of(params: Any, part: Batch, key: jax.Array | None) -> tuple[Any, dict[str, jax.Array]]:
        def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            whole = with_params(model, join_params(params, frozen or {}))
            return _surrogate(contrast, whole, part, key, count)

        (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return gradient, sums

    if micro_batches == 1:
        gradient, sums = part_of(params, batch, dropout_key)
    else:
        parts = {name: _split(name, x, micro_batches, model.mesh) for name, x in batch.items()}
        keys = None if dropout_key is None else jax.random.split(dropout_key, micro_batches)
        first = jax.tree.map(lambda x: x[0], (parts, keys))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part_of, params, *first))
        (gradient, sums), _ = jax.lax.scan(
            lambda carry, part: (jax.tree.map(jnp.add, carry, part_of(params, *part)), None), zero, (parts, keys)
        )
    return gradient, {name: total / count for name, total in sums.items()}


def _split(name: str, x: jax.Array, parts: int, mesh: Mesh | None) -> jax.Array:
    """[B, ...] as [parts, B / parts, ...]; every device gives an equal share of its own rows to each part."""
    return meshes.constrain(x.reshape(-1, parts, x.shape[1]).swapaxes(0, 1), (None, *_axes(name)), mesh)


def _axes(name: str) -> tuple[str, str | None]:
    """Logical axes of an array of a batch of pairs: the reference's numbers are a segment's, the others a token's."""
    return "batch", None if name == "reference" else "sequence"


def _pairs_in(batch: Batch, segments: int) -> jax.Array:
    """How many pairs the batch has."""
    last_B = jnp.max(batch["segment_ids"], axis=1)
    return jnp.sum(jnp.minimum(last_B, segments) // 2).astype(jnp.float32)


def _surrogate(
    contrast: Contrast, model: Decoder, batch: Batch, dropout_key: jax.Array | None, count: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(what has the gradient of the sum of the pairs' losses / count, the sums behind the metrics)."""
    targets_BT, used_BT = _targets(batch)
    hidden_BTE = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], dropout_key=dropout_key)
    logprobs_BT = jax.lax.stop_gradient(token_logprobs(model, hidden_BTE, targets_BT))
    sums_BS, tokens_BS = _by_segment(logprobs_BT, used_BT, batch, contrast.segments)
    slopes_BS, sums = _slopes(contrast, sums_BS, tokens_BS, batch["reference"])
    at_BT = jnp.clip(batch["segment_ids"] - 1, 0, contrast.segments - 1)
    # loss falls as -log p does where the slope is negative
    weights_BT = -jnp.take_along_axis(slopes_BS, at_BT, axis=1) * used_BT / count
    total, _, _ = chunked_cross_entropy(
        hidden_BTE,
        model.projection(),
        targets_BT,
        jax.lax.stop_gradient(weights_BT),
        softcap=model.config.final_softcap,
        dtype=model.dtype,
        layout=Layout.of(model.mesh),
    )
    return total, sums


def _targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(the token that each position predicts, 1.0 where it belongs to a response)."""
    return shift(batch["tokens"], (batch["regions"] > 0).astype(jnp.float32), batch["segment_ids"])


def token_logprobs(model: Decoder, hidden_BTE: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """fp32 log p(target) of every position, [B, T], from some positions' logits at a time."""
    T = targets_BT.shape[1]
    chunk = math.gcd(T, PROJECTED)

    def of(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BCE, targets_BC = part
        logits = model.project(hidden_BCE)
        # a sum, not a gather, as the vocabulary may be spread over devices
        is_target = jnp.arange(logits.shape[-1])[None, None] == targets_BC[..., None]
        return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], T // chunk, chunk, *x.shape[2:]), 1, 0)

    found = jax.lax.map(of, (cut(hidden_BTE), cut(targets_BT)))
    return jnp.moveaxis(found, 0, 1).reshape(targets_BT.shape)


def _by_segment(logprobs_BT: jax.Array, used_BT: jax.Array, batch: Batch, segments: int) -> tuple[jax.Array, jax.Array]:
    """(log p of every segment's response, its tokens), fp32 [B, S]."""
    total = functools.partial(jax.ops.segment_sum, num_segments=segments + 1)
    both = (
        jax.vmap(total)(x, batch["segment_ids"])[:, 1:] for x in (jnp.where(used_BT > 0, logprobs_BT, 0.0), used_BT)
    )
    sums_BS, tokens_BS = both
    return sums_BS, tokens_BS


def _slopes(
    contrast: Contrast, sums_BS: jax.Array, tokens_BS: jax.Array, reference_BS: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(derivative of the pairs' summed loss by every segment's log p, sums behind the metrics)."""
    real = (tokens_BS[:, 1::2] > 0).astype(jnp.float32).reshape(-1)

    def pairs_of(sums_BS: jax.Array) -> Pairs:
        columns = (x[:, first::2].reshape(-1) for x in (sums_BS, tokens_BS, reference_BS) for first in (0, 1))
        return Pairs(*columns)

    def total(sums_BS: jax.Array) -> jax.Array:
        return jnp.sum(contrast.losses(pairs_of(sums_BS)) * real)

    loss, slopes_BS = jax.value_and_grad(total)(sums_BS)
    pairs = pairs_of(sums_BS)
    counts = (jnp.maximum(n, 1.0) for n in (pairs.chosen_tokens, pairs.rejected_tokens))
    chosen_tokens, rejected_tokens = counts if contrast.normalize else (1.0, 1.0)
    ahead = pairs.chosen / chosen_tokens - pairs.rejected / rejected_tokens
    if contrast.form.reference:
        ahead -= pairs.chosen_reference / chosen_tokens - pairs.rejected_reference / rejected_tokens
    return slopes_BS, {
        "pair_loss": loss,
        "pair_accuracy": jnp.sum((ahead > 0) * real),
        "pair_margin": jnp.sum(ahead * real),
        "chosen_logprob": jnp.sum(pairs.chosen / jnp.maximum(pairs.chosen_tokens, 1.0) * real),
        "rejected_logprob": jnp.sum(pairs.rejected / jnp.maximum(pairs.rejected_tokens, 1.0) * real),
    }


# ------------------------------------------------------------------------------------------ rows and reference


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
            where = meshes.sharding(self.mesh, _axes(name), shape=x.shape, name="batch of pairs")
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
    ways = t.micro_batches * mesh.shape["data"] * mesh.shape["fsdp"]
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
        targets_BT, used_BT = _targets(batch)
        hidden_BTE = whole.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        return _by_segment(token_logprobs(whole, hidden_BTE, targets_BT), used_BT, batch, contrast.segments)[0]

    compute = jax.jit(sums, out_shardings=everywhere)
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
