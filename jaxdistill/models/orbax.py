"""Parameters out of the Orbax checkpoints that training wrote, for exports and warm starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdistill.hub import SHAPE
from jaxdistill.parallel import processes


def read_shape(folder: Path) -> dict[str, Any]:
    """The shape of the model whose checkpoints lie in `folder`, in Hugging Face's names."""
    return json.loads((folder / SHAPE).read_text())


def flat_name(path: Any) -> str:
    """A flat name for an array, such as `params/layers/q`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def abstract_arrays(template: Any, shardings: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What is to be restored, by flat name: shapes, dtypes and places, and no memory."""
    return {
        flat_name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for (path, leaf), where in zip(jax.tree.leaves_with_path(template), jax.tree.leaves(shardings), strict=True)
    }


def named_like(template: Any, arrays: dict[str, Any]) -> Any:
    """Arrays by flat name as a tree like `template`."""
    leaves = [arrays[flat_name(path)] for path, _ in jax.tree.leaves_with_path(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, the newest last.

    Raises:
      ValueError: there is none.
    """
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        steps = sorted(manager.all_steps())
    if not steps:
        raise ValueError(f"{folder}: no checkpoint; run `jaxdistill train` first.")
    return steps


def has_begun(folder: Path) -> bool:
    """Whether a training has left checkpoints in `folder`, as the first process sees it; all processes call this."""
    here = folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())
    return bool(processes.from_first(np.array(here)))


def load_params(folder: Path, params: Any, shardings: Any, step: int | None = None) -> tuple[int, Any]:
    """The parameters alone, of one checkpoint in `folder`: (step, params).

    Args:
      params: arrays or shapes like them; nothing else of the checkpoint is read.
      step: one of `saved_steps`; the newest if absent.
    Raises:
      ValueError: no checkpoint there, or one of another model.
    """
    step = saved_steps(folder)[-1] if step is None else step
    named = {"params": params}
    abstract = abstract_arrays(named, shardings)
    with ocp.PyTreeCheckpointer() as reader:
        state = folder.absolute() / str(step) / "state"
        _check_shapes(f"{folder}/{step}", dict(reader.metadata(state).item_metadata.tree), abstract)
        arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
        restore = ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=True)
        arrays = reader.restore(state, args=restore)
    return step, named_like(named, arrays)["params"]


def _check_shapes(where: str, saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
    for name, array in wanted.items():
        found = tuple(saved[name].shape) if name in saved else None
        if found != array.shape:
            has = f"has {name} of shape {found}" if found else f"has no {name}"
            raise ValueError(f"{where}: the checkpoint {has}, and the student's is {array.shape}; it is another model.")
