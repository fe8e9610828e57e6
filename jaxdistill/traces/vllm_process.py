"""The process that vLLM runs in, from our side: started and ended, fed through one pipe and read through another.

`vllm_worker.py` is started by path, so that another environment's interpreter (`vllm.python`) can run it, and speaks
JSON lines over private pipes, because vLLM logs to stdout and stderr. The worker leads a process group of its own:
Ctrl-C reaches only this process, which then ends the worker and all that it started. Not a session of its own: Linux
shares cores out among sessions first, and this process, asleep most of the time, then waited whole seconds for its turn
beside vLLM's busy loops on a small machine, while finished samples piled up in the pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("vllm_worker.py")
CHUNK = 1 << 16
"""Bytes of requests made ready at once."""


class Wire:
    """A worker's process, and both pipes: what it writes is read while it is given what it has room for."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: int, feed: FileIO):
        """Args: `pipe` is read, `feed` is written and does not block."""
        self.process, self._pipe, self._feed = process, pipe, feed
        self._rest, self._waiting = b"", b""
        self._ending = False

    def send_job(self, job: dict[str, Any]) -> None:
        """Tells the worker its job. stdin stays open: its end tells the worker that we have died."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a worker that died at once; the missing `done` says so
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def give(self, lines: Iterator[bytes]) -> bool:
        """Takes lines to be written, a bounded number of bytes at a time; False when there are none left."""
        while len(self._waiting) < CHUNK:
            if (line := next(lines, None)) is None:
                return False
            self._waiting += line
        return True

    def finish(self) -> None:
        """Tells the worker that there are no more requests, when all that was given is written."""
        self._ending = True

    def pump(self, seconds: float = 1.0) -> list[Any] | None:
        """Writes and reads what can be, which it waits for so long at most; gives the messages, None after the last.

        The worker's end is looked for too: a child of its own may hold the pipe open.
        """
        ended = self.process.poll() is not None
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        if not self._feed.closed and (self._waiting or self._ending):
            poll.register(self._feed, select.POLLOUT)
        events = dict(poll.poll(0 if ended else 1000 * seconds))
        if any(descriptor != self._pipe for descriptor in events):
            self._push()
        if self._pipe not in events:
            return None if ended else []
        data = os.read(self._pipe, 1 << 20)
        if not data:
            return None
        *found, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in found]

    def _push(self) -> None:
        """Writes what the pipe takes, and closes it when all is written, or nobody reads on."""
        gone = False
        try:
            sent = self._feed.write(self._waiting) if self._waiting else 0
            self._waiting = self._waiting[sent or 0 :]
        except BrokenPipeError:  # the worker has died; the missing `done` says so
            gone = True
        if gone or (self._ending and not self._waiting):
            self._feed.close()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        os.close(self._pipe)
        self._feed.close()


@contextlib.contextmanager
def start_worker(python: str, log: Path) -> Iterator[Wire]:
    """A started worker; on leaving, nothing of it is left running."""
    pipe, write = os.pipe()
    read, requests = os.pipe()
    os.set_blocking(requests, False)
    feed = FileIO(requests, "w")
    try:
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [Path(python).expanduser(), WORKER, str(write), str(read)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(write, read),
                process_group=0,
            )
    except OSError as error:
        os.close(pipe)
        feed.close()
        raise ValueError(
            f"vllm.python is {python}: {str(error.strerror).lower()}; name the interpreter of an environment with vLLM "
            "(of the traces traces.vllm.python)."
        ) from None
    finally:
        os.close(write)
        os.close(read)
    wire = Wire(process, pipe, feed)
    try:
        yield wire
    finally:
        # the group may hold vLLM's own processes even where the worker itself has ended
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wire.close()


@contextlib.contextmanager
def log_file(log: Path | None) -> Iterator[Path]:
    """An existing file for the worker's output; a temporary one is kept only if an error tells people to look at it."""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        yield log
        return
    handle, name = tempfile.mkstemp(prefix="jaxdistill-vllm-", suffix=".log")
    os.close(handle)
    keep = False
    try:
        yield Path(name)
    except ValueError:
        keep = True
        raise
    finally:
        if not keep:
            Path(name).unlink()


# ------------------------------------------------------------------------------------------------- what went wrong


def epitaph(failure: str | None, returncode: int, log: Path, start: int) -> str:
    """One line on why the worker ended early: its own last words, or what it left in its log."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    if failure is None or "root cause" in failure:
        failure = _last_error(lines) or failure or (lines[-1].strip() if lines else "no output")
    if returncode == -signal.SIGKILL and not failure.startswith("vLLM"):
        failure = f"killed by the system, which may have run out of memory; its last words: {failure}"
    return f"vLLM's process ended early (see {log}): {_shorten(failure)}"


def _last_error(lines: list[str]) -> str | None:
    """The last exception in a log that does not only point to another one."""
    for line in reversed(lines):
        found = re.search(r"\b(\w*(?:Error|Exception|Exit)): (.+)", line)
        if found and "root cause" not in line and "leaked" not in line:
            return found[0].strip()
    return None


def _shorten(text: str, limit: int = 400) -> str:
    text = re.sub(r"^ValidationError: .*? for \w+ (Value error, )?", "", " ".join(text.split()))
    text = text.split(" [type=")[0]  # pydantic's dump of all that it was given
    return text if len(text) <= limit else text[: limit - 4] + " ..."
