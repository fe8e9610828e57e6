"""The train step: a pure function of (state, batch).

Dimension key: B rows, T tokens, M micro-batches.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.data.rows import FIELDS
from jaxdistill.data.topk import stored_shapes
from jaxdistill.losses import Layout, chunked_cross_entropy, shift
from jaxdistill.models import (
    Decoder,
    Lora,
    ModelConfig,
    abstract_model,
    join_params,
    param_shardings,
    params_of,
    split_params,
    with_params,
)
from jaxdistill.parallel import mesh as meshes
from jaxdistill.train.contrastive import Contrast
from jaxdistill.train.distill import Distillation, metrics_of

State = dict[str, Any]
"""`params`, `optimizer`, `step`, and `guard` (`mean_loss` of good steps, `skipped` bad ones, `skipped_in_row`): plain
nested containers of arrays."""
Batch = dict[str, Any]
"""`tokens`, `regions`, `segment_ids`, `positions`, each [B, T]; with stored distributions `data.topk.FIELDS`; `pairs`,
a batch of pairs, where there are some."""
PAIRS = "pairs"
Taught = tuple[Distillation, Any, jax.Array]
LOSS_MEMORY = 50
"""A loss is a spike against the running mean of about so many good steps, and not before there were so many."""


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
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of (sum / count) over the whole batch, however many micro-batches it is taken in.

    Args:
      params: what is trained, see `models.split_params`.
      frozen: the parameters that are not; none if absent.
      distillation, teacher, step: if given, the loss has a divergence too; parameters of the teacher that it names.
    Returns:
      (gradient, {loss, count, accuracy}). Sums are added over micro-batches first and divided once.
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

    if micro_batches == 1:
        gradient, found = sums(params, batch, dropout_key)
    else:
        # every device gives an equal share of its own rows to each part, so that none of them has to move
        parts = {
            k: meshes.constrain(
                v.reshape(-1, micro_batches, *v.shape[1:]).swapaxes(0, 1),
                (None, "batch", "sequence", *(None,) * (v.ndim - 2)),
                model.mesh,
            )
            for k, v in batch.items()
        }
        keys = None if dropout_key is None else jax.random.split(dropout_key, micro_batches)
        first = jax.tree.map(lambda x: x[0], (parts, keys))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(sums, params, *first))
        (gradient, found), _ = jax.lax.scan(
            lambda carry, part: (jax.tree.map(jnp.add, carry, sums(params, *part)), None), zero, (parts, keys)
        )
    # a batch without a single trained token gives a zero gradient, not NaN
    count = jnp.maximum(found["count"], 1e-9)
    metrics = {"loss": found["total"] / count, "count": found["count"], "accuracy": found["hits"] / count}
    if distillation is not None:
        metrics |= metrics_of(found)
    return jax.tree.map(lambda g: g / count, gradient), metrics


def make_step(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    shardings: State,
    *,
    region_weights: tuple[float, float],
    micro_batches: int,
    seed: int = 0,
    schedule: optax.Schedule | None = None,
    spike: float | None = None,
    contrast: Contrast | None = None,
    distillation: Distillation | None = None,
) -> jax.stages.Wrapped:
    """The compiled step (state, batch, frozen parameters, teacher's parameters) -> (state, metrics).

    It donates the state's buffers; the last two are left out where there are none.

    A step is bad if its loss or gradient is not finite, or its loss is a spike. Parameters and optimizer state then
    stay as they were, to the bit, and `metrics["bad"]` is 1; this is decided on the devices, and nobody waits for it.

    Args:
      seed: of the adapters' dropout, which is a pure function of it and of the step.
      schedule: the optimizer's, for `metrics["learning_rate"]`.
      spike: a loss this many times its running mean is one; none is if absent.
      contrast: if given, the batch has rows of pairs too, in `batch["pairs"]`, whose loss is added.
    """
    weights = jnp.array((0.0, *region_weights), jnp.float32)
    dropout = model.lora is not None and model.lora.dropout > 0

    def step(state: State, batch: Batch, frozen: Any = None, teacher: Any = None) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"]) if dropout else None
        batch, pairs = {k: v for k, v in batch.items() if k != PAIRS}, batch.get(PAIRS)
        gradient, metrics = gradients(
            model,
            state["params"],
            batch,
            weights,
            micro_batches,
            frozen=frozen,
            dropout_key=key,
            distillation=distillation,
            teacher=teacher,
            step=state["step"],
        )
        if contrast is not None:
            assert pairs is not None
            more = None if key is None else jax.random.fold_in(key, 1)
            gradient, metrics = contrast.add_gradients(
                model, state["params"], pairs, gradient, metrics, micro_batches, frozen=frozen, dropout_key=more
            )
        gradient = jax.lax.with_sharding_constraint(gradient, shardings["params"])
        norm = optax.tree.norm(gradient)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        good, guard = _judge(metrics["loss"], norm, state["guard"], state["step"], spike)
        old = {"params": state["params"], "optimizer": state["optimizer"]}
        kept = jax.tree.map(lambda n, o: jnp.where(good, n, o), {"params": params, "optimizer": optimizer_state}, old)
        metrics |= {
            "gradient_norm": norm,
            "bad": 1 - good.astype(jnp.int32),
            **guard,
            **_sizes(batch, pairs, model.config),
        }
        if schedule is not None:
            # a step that was not taken does not move the optimizer's own count either
            metrics["learning_rate"] = jnp.float32(schedule(state["step"] - state["guard"]["skipped"]))
        return kept | {"step": state["step"] + 1, "guard": guard}, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _judge(
    loss: jax.Array, norm: jax.Array, guard: dict[str, jax.Array], step: jax.Array, spike: float | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(whether a step is good, the guard after it)."""
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    taken = step - guard["skipped"]
    if spike is not None:
        good &= (loss <= spike * guard["mean_loss"]) | (taken < LOSS_MEMORY)
    # a plain mean at first, then one that forgets
    share = 1.0 / jnp.minimum(taken + 1, LOSS_MEMORY)
    mean = guard["mean_loss"] + share * (loss - guard["mean_loss"])
    return good, {
        "mean_loss": jnp.where(good, mean, guard["mean_loss"]),
        "skipped": jnp.where(good, guard["skipped"], guard["skipped"] + 1),
        "skipped_in_row": jnp.where(good, 0, guard["skipped_in_row"] + 1),
    }


def _sizes(batch: Batch, beside: Batch | None, config: ModelConfig) -> dict[str, jax.Array]:
    """`tokens` that are no padding, and the query-key `pairs` of their attention, over all layers."""
    if beside is not None:
        parts = (_sizes(part, None, config) for part in (batch, beside))
        return jax.tree.map(jnp.add, *parts)
    real = batch["segment_ids"] > 0
    seen = (batch["positions"] + 1).astype(jnp.float32)
    windows = collections.Counter(kind.window for kind in config.kinds)
    pairs = sum(n * jnp.sum(jnp.where(real, jnp.minimum(seen, w or jnp.inf), 0.0)) for w, n in windows.items())
    return {"tokens": jnp.sum(real, dtype=jnp.int32), "pairs": jnp.float32(pairs)}


def state_shardings(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, lora: Lora | None = None
) -> State:
    """Where every array of the state lives: the optimizer's moments lie as their parameters do."""
    params, _ = split_params(param_shardings(config, mesh, lora=lora))
    by_path = {tuple(k.key for k in path): s for path, s in jax.tree.leaves_with_path(params)}
    trained, _ = split_params(params_of(abstract_model(config, lora=lora)))
    by_shape = {tuple(k.key for k in path): x.shape for path, x in jax.tree.leaves_with_path(trained)}
    shapes = jax.eval_shape(optimizer.init, trained)
    replicated = NamedSharding(mesh, PartitionSpec())

    def of(path: Any, leaf: Any) -> NamedSharding:
        keys = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        # Adafactor's rows and columns have their parameter's path, and not its shape
        matches = [by_path[own] for own, shape in by_shape.items() if keys[-len(own) :] == own and leaf.shape == shape]
        return matches[0] if matches else replicated

    return {
        "params": params,
        "optimizer": jax.tree.map_with_path(of, shapes),
        "step": replicated,
        "guard": dict.fromkeys(GUARD, replicated),
    }


GUARD = {"mean_loss": np.float32(0), "skipped": np.int32(0), "skipped_in_row": np.int32(0)}
"""Before the first step."""


def state_shapes(params: Any, optimizer: optax.GradientTransformation) -> State:
    """The state's shapes and dtypes, to be restored into: no memory."""
    step = np.int32(0)
    return jax.eval_shape(lambda p: {"params": p, "optimizer": optimizer.init(p), "step": step, "guard": GUARD}, params)


def init_state(params: Any, optimizer: optax.GradientTransformation, shardings: State) -> State:
    """The state before the first step; moments are created sharded."""
    state = jax.jit(optimizer.init, out_shardings=shardings["optimizer"])(params)
    rest = {"step": np.int32(0), "guard": GUARD}
    return {"params": params, "optimizer": state} | jax.device_put(rest, {k: shardings[k] for k in rest})


def put_batch(
    rows_of: Callable[[slice], dict[str, np.ndarray]], shape: tuple[int, int], mesh: Mesh, topk: int | None = None
) -> Batch:
    """A global batch on the mesh; every host reads the rows of its own devices only.

    Args:
      topk: tokens of the teacher's stored distributions, if they are to come along.
    """
    read: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def part(name: str, index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first, last, _ = index[0].indices(shape[0])
        if (first, last) not in read:
            read[first, last] = rows_of(slice(first, last))
        return read[first, last][name][:, index[1]]

    shapes = dict.fromkeys(FIELDS, shape) | ({n: (*shape, *s) for n, s in stored_shapes(topk).items()} if topk else {})
    axes = ("batch", "sequence", None)
    where = {n: meshes.sharding(mesh, axes[: len(s)], shape=s, name="batch") for n, s in shapes.items()}
    return {n: jax.make_array_from_callback(s, where[n], lambda i, n=n: part(n, i)) for n, s in shapes.items()}
