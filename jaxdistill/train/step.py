"""The train step: a pure function of (state, batch).

Dimension key: B rows, T tokens.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.data.rows import FIELDS
from jaxdistill.models import Decoder, Lora, ModelConfig, abstract_model, param_shardings, params_of, split_params
from jaxdistill.parallel import mesh as meshes
from jaxdistill.precision import asking_for
from jaxdistill.train.contrastive import Contrast
from jaxdistill.train.distill import Distillation
from jaxdistill.train.gradients import Batch, gradients

State = dict[str, Any]
"""`params`, `optimizer`, `step`, and `guard` (`mean_loss` of good steps, `skipped` bad ones, `skipped_in_row`): plain
nested containers of arrays."""
PAIRS, ROLLOUTS = "pairs", "rollouts"
"""Parts of a batch that have rows of their own."""
LOSS_MEMORY = 50
"""A loss is a spike against the running mean of about so many good steps, and not before there were so many."""


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
    on_policy: Distillation | None = None,
    options: dict[str, Any] | None = None,
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
      on_policy: how the rows are graded that a batch may have in `batch["rollouts"]`, sampled by the student.
      options: of the compiler, see `parallel.options`.
    """
    weights = jnp.array((0.0, *region_weights), jnp.float32)
    dropout = model.lora is not None and model.lora.dropout > 0

    def step(state: State, batch: Batch, frozen: Any = None, teacher: Any = None) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"]) if dropout else None
        pairs, rollouts = batch.get(PAIRS), batch.get(ROLLOUTS)
        batch = {k: v for k, v in batch.items() if k not in (PAIRS, ROLLOUTS)}
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
            rollouts=rollouts,
            on_policy=on_policy,
        )
        if contrast is not None:
            assert pairs is not None
            more = None if key is None else jax.random.fold_in(key, 1)
            gradient, metrics = contrast.add_gradients(
                model, state["params"], pairs, gradient, metrics, micro_batches, frozen=frozen, dropout_key=more
            )
        gradient = jax.lax.with_sharding_constraint(gradient, shardings["params"])
        norm = optax.tree.norm(gradient)
        # Muon's products are optax's; its authors take them in bf16, so other dtypes than fp32 ask for nothing
        with asking_for(model.dtype):
            updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        good, guard = _judge(metrics["loss"], norm, state["guard"], state["step"], spike)
        old = {"params": state["params"], "optimizer": state["optimizer"]}
        kept = jax.tree.map(lambda n, o: jnp.where(good, n, o), {"params": params, "optimizer": optimizer_state}, old)
        metrics |= {
            "gradient_norm": norm,
            "bad": 1 - good.astype(jnp.int32),
            **guard,
            **_sizes([part for part in (batch, pairs, rollouts) if part], model.config),
        }
        if schedule is not None:
            # a step that was not taken does not move the optimizer's own count either
            metrics["learning_rate"] = jnp.float32(schedule(state["step"] - state["guard"]["skipped"]))
        return kept | {"step": state["step"] + 1, "guard": guard}, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


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


def _sizes(parts: Sequence[Batch], config: ModelConfig) -> dict[str, jax.Array]:
    """`tokens` that are no padding, and the query-key `pairs` of their attention, over all layers."""
    windows = collections.Counter(kind.window for kind in config.kinds)
    tokens, pairs = jnp.int32(0), jnp.float32(0)
    for part in parts:
        real = part["segment_ids"] > 0
        seen = (part["positions"] + 1).astype(jnp.float32)
        tokens += jnp.sum(real, dtype=jnp.int32)
        pairs += sum(n * jnp.sum(jnp.where(real, jnp.minimum(seen, w or jnp.inf), 0.0)) for w, n in windows.items())
    return {"tokens": tokens, "pairs": jnp.float32(pairs)}


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
    rows_of: Callable[[slice], dict[str, np.ndarray]],
    shape: tuple[int, int],
    mesh: Mesh,
    beside: Mapping[str, tuple[int, ...]] | None = None,
) -> Batch:
    """A global batch on the mesh; every host reads the rows of its own devices only.

    Args:
      beside: arrays that come along beside the tokens, as a teacher's distributions: name -> shape of each token's.
    """
    read: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def part(name: str, index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first, last, _ = index[0].indices(shape[0])
        if (first, last) not in read:
            read[first, last] = rows_of(slice(first, last))
        return read[first, last][name][:, index[1]]

    shapes = dict.fromkeys(FIELDS, shape) | {n: (*shape, *s) for n, s in (beside or {}).items()}
    axes = ("batch", "sequence", None)
    where = {n: meshes.sharding(mesh, axes[: len(s)], shape=s, name="batch") for n, s in shapes.items()}
    return {n: jax.make_array_from_callback(s, where[n], lambda i, n=n: part(n, i)) for n, s in shapes.items()}
