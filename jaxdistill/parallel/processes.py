"""Several processes as one program: how they start, who writes, where they meet, how they end.

Nothing here imports JAX until there are processes to start, for the command line asks on its way to any stage.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
Step: TypeAlias = Callable[[], T]

STOPPED = 75
"""Exit code of a training that saved itself after SIGTERM (EX_TEMPFAIL of sysexits.h: give the same command again)."""


class Stopped(Exception):
    """A stage was asked to end, has saved its work, and goes on from there when it is run again."""


@dataclasses.dataclass
class _Started:
    """What this process knows of the others; alone, until `start` has been called."""

    process: int = 0
    count: int = 1


_here = _Started()


def start(
    coordinator: str | None = None,
    count: int | None = None,
    process: int | None = None,
    *,
    heartbeat_s: int = 100,
) -> None:
    """Joins the other processes; call it before anything else asks JAX for devices.

    Args:
      coordinator: `host:port` of process 0. Without it, JAX finds the others by itself under SLURM, Open MPI, GKE
        (JobSet) and on TPU VMs.
      count: of all processes.
      process: this one's number, from 0.
      heartbeat_s: a process that has not been heard of for so long is taken for dead, and the others end.
    Raises:
      ValueError: an incomplete set of arguments, or no cluster was found.
    """
    given = (coordinator, count, process)
    if coordinator is None and given != (None, None, None):
        raise ValueError("--processes and --process need --coordinator HOST:PORT, the address of process 0.")
    if coordinator is not None and ":" not in coordinator:
        raise ValueError(f"--coordinator {coordinator}: write it as HOST:PORT, such as 10.0.0.1:1234.")
    if count is not None and process is not None and not 0 <= process < count:
        raise ValueError(f"--process {process}: with --processes {count} it is one of 0 to {count - 1}.")
    import jax

    try:
        jax.distributed.initialize(coordinator, count, process, heartbeat_timeout_seconds=heartbeat_s)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes did not find each other ({' '.join(str(error).split())}); give --coordinator HOST:PORT "
            "--processes N --process I, or start them by SLURM, Open MPI, GKE or on TPU VMs with --distributed."
        ) from None
    _here.process, _here.count = jax.process_index(), jax.process_count()


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return _here.process == 0


def count() -> int:
    """How many processes there are."""
    return _here.count


def number() -> int:
    """Which of them this one is."""
    return _here.process


def barrier(name: str) -> None:
    """Waits until every process is here; returns at once where there is only one."""
    if _here.count > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def from_first(tree: Any) -> Any:
    """What the first process gives, in every process; all give arrays of the same shapes and dtypes, by any name."""
    if _here.count == 1:
        return tree
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


_WORDS = 1024
"""Bytes of an error that are told to the other processes."""


def by_first(step: Step[T]) -> T | None:
    """Runs a step in the first process, while the others wait; if it fails there, every process raises."""
    import jax

    error: Exception | None = None
    result = None
    if jax.process_index() == 0:
        try:
            result = step()
        except Exception as failed:
            error = failed
    agree(error)
    return result


def agree(error: Exception | None) -> None:
    """Raises the first process's error in every process; returns once that one has come here too."""
    import jax

    if jax.process_count() > 1:
        import numpy as np

        words = np.zeros(_WORDS, np.uint8)
        said = (str(error) or repr(error)).encode()[:_WORDS] if error is not None else b""
        words[: len(said)] = np.frombuffer(said, np.uint8)
        told = bytes(tell(words)).rstrip(b"\0").decode(errors="replace")
        if error is None and told:
            raise ValueError(told)
    if error is not None:
        raise error


def tell(array: np.ndarray) -> np.ndarray:
    """The first process's array, of the same shape and dtype in all; numbers of 64 bits are told in 32."""
    import numpy as np
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def leave(code: int) -> int:
    """Ends a process's part in the program: `code` if all went well, else the process ends here and now.

    A process that fails must not end in the usual way, which would wait for the others while they wait for it.
    """
    if _here.count == 1:
        return code
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    import jax

    jax.distributed.shutdown()
    _here.process, _here.count = 0, 1
    return code


class StopSignal:
    """Whether SIGTERM has come. Use as a context manager around the loop that asks."""

    def __enter__(self) -> StopSignal:
        self._came, self._before = False, None
        # with several processes, JAX listens for the signal and lets all of them stop at the same step
        self._listens = _here.count == 1 and threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        self._came = True

    def requested(self, step: int) -> bool:
        """Whether to save and stop now, after `step` steps; call it once a step, in every process."""
        if _here.count == 1:
            return self._came
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)
