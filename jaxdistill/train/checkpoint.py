"""Checkpoints: Orbax, as flat dicts of arrays, beside what is needed to go on exactly where the run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one training run, saved in the background."""

    def __init__(self, folder: Path, *, keep: int, identity: dict[str, Any]):
        """
        Args:
          identity: what must be the same for a checkpoint to be continued: hashes of config, data and model.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._identity, self._folder = identity, folder

    def save(self, step: int, state: Any) -> None:
        """Starts to save the state after `step` steps; a step that is there already is left alone."""
        if step in self._manager.all_steps():
            return
        arrays = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), identity=ocp.args.JsonSave(self._identity)),
        )
        if not saved:
            raise RuntimeError(f"{self._folder}: Orbax did not save step {step}.")

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, template: Any, shardings: Any) -> tuple[int, Any]:
        """The newest checkpoint: (step, state).

        Args:
          template: arrays or shapes like the state's.
          shardings: where each of them goes; the mesh may differ from the one that saved.
        Raises:
          ValueError: the checkpoint belongs to another config, data set or model.
        """
        step = self._manager.latest_step()
        assert step is not None
        abstract = {
            _name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
            for (path, leaf), where in zip(jax.tree.leaves_with_path(template), jax.tree.leaves(shardings), strict=True)
        }
        identity = self._manager.restore(step, args=ocp.args.Composite(identity=ocp.args.JsonRestore())).identity
        changed = [k for k in self._identity if identity.get(k) != self._identity[k]]
        if changed:
            raise ValueError(
                f"{self._folder}: the checkpoint at step {step} was made with another {', '.join(changed)}; "
                "use another run_dir, or `--redo train`."
            )
        arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state
        leaves = [arrays[_name(path)] for path, _ in jax.tree.leaves_with_path(template)]
        return step, jax.tree.unflatten(jax.tree.structure(template), leaves)

    def wait(self) -> None:
        """Returns once everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def load_params(folder: Path, params: Any, shardings: Any) -> tuple[int, Any]:
    """The parameters alone, of the newest checkpoint in `folder`: (step, params).

    Raises:
      ValueError: no checkpoint there.
    """
    manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(read_only=True))
    step = manager.latest_step()
    if step is None:
        raise ValueError(f"{folder}: no checkpoint; run `jaxdistill train` first.")
    named = {"params": params}
    abstract = {
        _name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for (path, leaf), where in zip(jax.tree.leaves_with_path(named), jax.tree.leaves(shardings), strict=True)
    }
    with manager:
        restore = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        arrays = ocp.PyTreeCheckpointer().restore(folder.absolute() / str(step) / "state", args=restore)
    leaves = [arrays[_name(path)] for path, _ in jax.tree.leaves_with_path(named)]
    return step, jax.tree.unflatten(jax.tree.structure(named), leaves)["params"]


def _name(path: Any) -> str:
    """A flat name for an array, such as `params/layers/q`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
