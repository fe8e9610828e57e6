"""The loss of a batch and its gradient: sums over trained tokens, over all parts of the batch, divided once.

Dimension key: B rows, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdistill.losses import Layout, chunked_cross_entropy, shift
from jaxdistill.models import Decoder, join_params, with_params
from jaxdistill.parallel import mesh as meshes
from jaxdistill.train.distill import Distillation, metrics_of

Batch = dict[str, Any]
"""`tokens`, `regions`, `segment_ids`, `positions`, each [B, T]; with stored distributions `data.topk.FIELDS`; `pairs`,
a batch of pairs, and `rollouts`, rows that the student has sampled, where there are some."""
Taught = tuple[Distillation, Any, jax.Array]
ROLLOUT_WEIGHTS = (0.0, 1.0, 1.0)
"""Of the regions of rows that the student has sampled."""


def loss_sums(
    model: Decoder,
    batch: Batch,
    region_weights: jax.Array,
    dropout_key: jax.Array | None = None,
    taught: Taught | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(sum of weighted -log p, {count, hits}) over a batch of packed rows; with a teacher, its divergence is added.

    Args:
      region_weights: fp32 [3], the weight of prompt (0), thinking and answer tokens.
      dropout_key: for the dropout of adapters.
      taught: the distillation, what the teacher says of the batch, and the step.
    """
    weights_BT = region_weights[batch["regions"].astype(jnp.int32)]
    targets_BT, weights_BT = shift(batch["tokens"], weights_BT, batch["segment_ids"])
    hidden_BTE = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], dropout_key=dropout_key)
    if taught is not None:
        distillation, said, step = taught
        return distillation.loss_sums(model, hidden_BTE, targets_BT, weights_BT, batch, said, step)
    # the logits of a whole batch never exist, and prompts cost nothing in the vocabulary
    total, count, found = chunked_cross_entropy(
        hidden_BTE,
        model.projection(),
        targets_BT,
        weights_BT,
        softcap=model.config.final_softcap,
        dtype=model.dtype,
        layout=Layout.of(model.mesh),
    )
    return total, {"count": count, "hits": found["hits"]}


def gradient_sums(
    model: Decoder,
    params: Any,
    batch: Batch,
    region_weights: jax.Array,
    micro_batches: int,
    *,
    frozen: Any = None,
    dropout_key: jax.Array | None = None,
    distillation: Distillation | None = None,
    teacher: Any = None,
    step: jax.Array | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """(gradient of the sum of the loss, the sums `total`, `count`, `hits`, ...) over rows, in so many micro-batches.

    The arguments are those of `gradients`.
    """

    def sums(params: Any, part: Batch, key: jax.Array | None) -> tuple[Any, dict[str, jax.Array]]:
        taught = None
        if distillation is not None:
            assert step is not None
            taught = distillation, distillation.read(part, teacher), step
        (total, more), gradient = jax.value_and_grad(
            lambda p: loss_sums(with_params(model, join_params(p, frozen or {})), part, region_weights, key, taught),
            has_aux=True,
        )(params)
        return gradient, {"total": total} | more

    return in_parts(sums, params, batch, dropout_key, micro_batches, model.mesh, lambda name: ("batch", "sequence"))


def in_parts(
    sums: Callable[[Any, Batch, jax.Array | None], tuple[Any, dict[str, jax.Array]]],
    params: Any,
    batch: Batch,
    dropout_key: jax.Array | None,
    micro_batches: int,
    mesh: Mesh | None,
    axes: Callable[[str], tuple[str | None, ...]],
) -> tuple[Any, dict[str, jax.Array]]:
    """What `sums` gives for a batch, added over so many micro-batches of it.

    Args:
      sums: (parameters, rows, key of their dropout) -> (gradient, sums).
      axes: the logical axes of an array of the batch by its name; those that it does not tell are not split.
    """
    if micro_batches == 1:
        return sums(params, batch, dropout_key)

    def cut(name: str, x: jax.Array) -> jax.Array:
        # every device gives an equal share of its own rows to each part, so that none of them has to move
        parts = x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)
        known = (None, *axes(name))
        return meshes.constrain(parts, (*known, *(None,) * (parts.ndim - len(known))), mesh)

    parts = {name: cut(name, x) for name, x in batch.items()}
    keys = None if dropout_key is None else jax.random.split(dropout_key, micro_batches)
    first = jax.tree.map(lambda x: x[0], (parts, keys))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(sums, params, *first))
    found, _ = jax.lax.scan(
        lambda carry, part: (jax.tree.map(jnp.add, carry, sums(params, *part)), None), zero, (parts, keys)
    )
    return found


def gradients(
    model: Decoder,
    params: Any,
    batch: Batch,
    region_weights: jax.Array,
    micro_batches: int,
    *,
    frozen: Any = None,
    dropout_key: jax.Array | None = None,
    distillation: Distillation | None = None,
    teacher: Any = None,
    step: jax.Array | None = None,
    rollouts: Batch | None = None,
    on_policy: Distillation | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of (sum / count) over the whole batch, however many micro-batches it is taken in.

    Args:
      params: what is trained, see `models.split_params`.
      batch: may be empty if there are rollouts.
      frozen: the parameters that are not; none if absent.
      distillation, teacher, step: if given, the loss has a divergence too; parameters of the teacher that it names.
      rollouts, on_policy: if given, rows that the student has sampled, and how the teacher grades them: they add to
        the same sum and the same count, and come with what servers have said of them, if it is behind some.
    Returns:
      (gradient, {loss, count, accuracy, ...}). Sums are added over micro-batches and parts first and divided once.
    """
    common = {"frozen": frozen, "teacher": teacher, "step": step}
    parts, metrics = [], {}
    if batch:
        gradient, found = gradient_sums(
            model,
            params,
            batch,
            region_weights,
            micro_batches,
            dropout_key=dropout_key,
            distillation=distillation,
            **common,
        )
        parts.append((gradient, found))
        metrics = {"accuracy": found["hits"] / jnp.maximum(found["count"], 1e-9)}
        metrics |= {} if distillation is None else metrics_of(found)
    if rollouts is not None:
        assert on_policy is not None
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 2)
        weights = jnp.array(ROLLOUT_WEIGHTS, jnp.float32)
        gradient, found = gradient_sums(
            model, params, rollouts, weights, micro_batches, dropout_key=key, distillation=on_policy, **common
        )
        parts.append((gradient, found))
        graded = metrics_of(found)
        # of tokens drawn at temperature 1 this is the reverse KL on average, whatever the divergence is
        metrics |= {"on_policy_kd": graded["kd"], "on_policy_kl": graded["teacher_nll"] - graded["ce"]}
        metrics = {"accuracy": graded["accuracy"]} | metrics
    gradient, total, count = functools.reduce(
        lambda a, b: jax.tree.map(jnp.add, a, b),
        [(gradient, found["total"], found["count"]) for gradient, found in parts],
    )
    # a batch without a single trained token gives a zero gradient, not NaN
    divisor = jnp.maximum(count, 1e-9)
    return jax.tree.map(lambda g: g / divisor, gradient), metrics | {"loss": total / divisor, "count": count}
