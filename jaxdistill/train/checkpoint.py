"""Checkpoints: Orbax, as flat dicts of arrays, beside what is needed to go on exactly where the run stopped.

A checkpoint holds parameters, optimizer state and step (the data's position and every random number are functions of
the seed and the step), the sums behind the metrics, and the identity: the plain data of config, data set and model.
Checksums of every array, taken on the devices when it was saved, say on reading whether it came back to the bit.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from jaxdistill.config import differences
from jaxdistill.models.orbax import abstract_arrays, flat_name, named_like
from jaxdistill.parallel import processes
from jaxdistill.train.record import Checksums, RecordHandler, RecordRestore, RecordSave

# what storage raises: the system's errors as they are, TensorStore's as ValueError
STORAGE_ERRORS = (OSError, ValueError, KeyError)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read."""

    step: int
    state: Any
    progress: dict[str, Any]
    """What `save` was given."""


class Checkpoints:
    """The checkpoints of one training run, saved in the background."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        identity: dict[str, Any],
        keep_best: int = 0,
        accept: Sequence[str] = (),
        say: Callable[[str], None] = print,
    ):
        """
        Args:
          keep: how many of the newest are kept.
          identity: what must be the same for a checkpoint to be continued, as plain data.
          keep_best: how many with the lowest evaluation loss are kept beside them.
          accept: keys of `identity`, such as `train.optimizer`, in which it may differ.
          say: how people are told of what went wrong and was survived.
        """
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if keep_best:
            # no evaluation, no claim to be the best
            by_loss = {"get_metric_fn": lambda metrics: metrics["loss"], "reverse": True}
            kept.append(policies.BestN(**by_loss, n=keep_best, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept), cleanup_tmp_directories=True
        )
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._identity, self._accept, self._say = folder, identity, tuple(accept), say
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=options,
            item_handlers={"run": RecordHandler(), "state": ocp.StandardCheckpointHandler()},
        )
        self._saving: int | None = None
        self.failed = 0
        """Saves that failed in this process."""

    def save(self, step: int, state: Any, *, progress: dict[str, Any], loss: float | None = None) -> None:
        """Starts to save the state after `step` steps; a step that is there already is left alone.

        A save that fails is said and counted, and training goes on: the checkpoints before it are still there.

        Args:
          progress: plain data that `restore` gives back.
          loss: of the evaluation at this step, if there was one.
        """
        self.settle()
        if step in self._manager.all_steps():
            return
        arrays = {flat_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
        said = {"identity": self._identity, "progress": progress}
        record = RecordSave(said, Checksums(arrays))  # computed before the state can be donated, waited for by nobody
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), run=record)
        self._saving = step
        # Orbax's threads would wait five minutes for a folder that could not be made, and hold up the end of the run
        made, why = self._attempt(self._try_folder)
        if not made:
            self._failed(OSError(why))
            return
        try:
            saved = self._manager.save(step, args=items, metrics=None if loss is None else {"loss": loss})
        except STORAGE_ERRORS as error:
            self._failed(error)
            return
        assert saved, f"{self._folder}: Orbax did not save step {step}"

    def _try_folder(self) -> bool:
        """Whether a folder can be made where the checkpoint is to lie; raises what the system raises."""
        if processes.is_first():
            probe = self._folder / "probe.orbax-checkpoint-tmp"
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        return True

    def settle(self) -> None:
        """Returns once everything is on disk, or is known to have failed."""
        try:
            self._manager.wait_until_finished()
        except STORAGE_ERRORS as error:
            self._failed(error)
        self._saving = None

    def _failed(self, error: Exception) -> None:
        self.failed += 1
        self._say(
            f"  WARNING: the checkpoint at step {self._saving:,} could not be saved ({_short(error)}); training goes "
            f"on, and the newest one is {_step_name(self.latest())}."
        )
        self._saving = None
        if processes.is_first():  # what was written of it takes up the space that the next one needs
            for left in self._folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(left, ignore_errors=True)

    def saving(self) -> bool:
        """Whether a save is being written in the background."""
        return self._manager.is_saving_in_progress()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, template: Any, shardings: Any) -> Restored | None:
        """The newest checkpoint that can be read; None if there is none at all.

        One that cannot be read, or whose arrays are not what was saved, is said, renamed to `STEP.corrupt`, and the one
        before it is taken.

        Args:
          template: shapes (or arrays) like the state's; nothing is held twice.
          shardings: where each of them goes; the mesh may differ from the one that saved.
        Raises:
          ValueError: the checkpoint belongs to another config, data set or model, or none of several can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        abstract = abstract_arrays(template, shardings)
        for step in steps:
            run, why = self._attempt(lambda step=step: self._read_run(step))
            if run is not None:
                self._check_identity(step, run["identity"])
                self._check_shapes(step, run["checksums"], abstract)
                arrays, why = self._attempt(lambda step=step, run=run: self._read_arrays(step, abstract, run))
                if arrays is not None:
                    return Restored(step, named_like(template, arrays), run["progress"])
            self._set_aside(step, why)
        if steps:
            raise ValueError(
                f"{self._folder}: not one of its {len(steps)} checkpoints can be read; `--redo train` starts anew."
            )
        return None

    def _attempt(self, read: Callable[[], Any]) -> tuple[Any, str]:
        """(what was found, why not): None in every process if it failed in one of them."""
        try:
            found, why = read(), ""
        except STORAGE_ERRORS as error:
            found, why = None, _short(error)
        if jax.process_count() > 1:
            fine = multihost_utils.process_allgather(np.array(found is not None))
            if not fine.all():
                return None, why or "another process could not"
        return found, why

    def _read_run(self, step: int) -> dict[str, Any]:
        run = self._manager.restore(step, args=ocp.args.Composite(run=RecordRestore())).run
        missing = {"identity", "progress", "checksums"} - set(run)
        if missing:
            raise ValueError(f"nothing of its {', '.join(sorted(missing))}")
        return run

    def _read_arrays(self, step: int, abstract: dict[str, Any], run: dict[str, Any]) -> dict[str, jax.Array]:
        restore = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            arrays = self._manager.restore(step, args=restore).state
        except Exception as error:
            if type(error) is not Exception:  # Orbax raises the base class itself where TensorStore cannot read
                raise
            raise ValueError(str(error.__cause__ or error)) from error
        wrong = [name for name, (_, bits) in Checksums(arrays).read().items() if run["checksums"][name][1] != bits]
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(arrays)} arrays are not what was saved, {wrong[0]} among them")
        return arrays

    def _check_identity(self, step: int, identity: dict[str, Any]) -> None:
        changed = dict(differences(identity, self._identity))
        accepted = {k for k in changed if any(k == a or k.startswith(f"{a}.") for a in self._accept)}
        for key in sorted(accepted):
            self._say(f"  accepted: {key}: {changed[key]}")
        refused = [f"{key}: {change}" for key, change in changed.items() if key not in accepted]
        if refused:
            names = ", ".join(key for key in changed if key not in accepted)
            raise ValueError(
                f"{self._folder}: the checkpoint at step {step} was made with another config, data set or model "
                f"({'; '.join(refused[:6])}{'; ...' if len(refused) > 6 else ''}); use another run_dir, `--redo "
                f"train`, or go on all the same with train.accept_changed: [{names}]."
            )

    def _check_shapes(self, step: int, saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
        for name in sorted(saved.keys() | wanted.keys()):
            old = f"{saved[name][0]}" if name in saved else "nothing"
            new = f"{wanted[name].dtype}{list(wanted[name].shape)}" if name in wanted else "nothing"
            if old != new:
                raise ValueError(
                    f"{self._folder}: the checkpoint at step {step} has {old} for {name}, and this config needs {new}; "
                    "use another run_dir, or `--redo train`."
                )

    def _set_aside(self, step: int, why: str) -> None:
        """Renames a checkpoint that cannot be read, so that its step can be saved again."""
        self._say(
            f"  WARNING: the checkpoint at step {step:,} cannot be read ({why}); it is now {step}.corrupt, and the one "
            "before it is taken."
        )
        if processes.is_first():
            target = self._folder / f"{step}.corrupt"
            shutil.rmtree(target, ignore_errors=True)
            (self._folder / str(step)).rename(target)
        processes.barrier(f"set aside {step}")
        self._manager.reload()

    def finish(self, step: int) -> None:
        """Waits for the last save.

        Raises:
          ValueError: the checkpoint at `step` is not on disk.
        """
        self.settle()
        latest = self.latest()
        self.close()
        if latest != step:
            raise ValueError(
                f"{self._folder}: the checkpoint at step {step:,} could not be saved, and the newest one is "
                f"{_step_name(latest)}; make room, then run the same command again."
            )

    def close(self) -> None:
        self._manager.close()


def _short(error: Exception) -> str:
    """The part of a storage error that says what happened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:60]} ... {text[-130:]}"


def _step_name(step: int | None) -> str:
    return "none" if step is None else f"that at step {step:,}"
