"""The engine `vllm`: vLLM's offline engine, in a process of its own that streams completions back.

This module never imports vLLM. It starts `vllm_worker.py` by path, so that another environment's interpreter
(`vllm.python`) can run it, and reads JSON lines from a private pipe, because vLLM logs to stdout and stderr. Requests
go through another pipe as the worker takes them, so that memory does not grow with their number. The worker leads a
session of its own: Ctrl-C reaches only this process, which then ends the worker and all that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from jaxdistill.config import VLLMConfig
from jaxdistill.traces import logprobs
from jaxdistill.traces.engines import Completion, Request, Sampling

WORKER = Path(__file__).with_name("vllm_worker.py")
CHUNK = 1 << 16
"""Bytes of requests made ready at once."""
EXIT_SECONDS = 60
"""How long a worker that is done may take to leave; then it is killed."""


def generate(
    checkpoint: Path,
    requests: Collection[Request],
    sampling: Sampling,
    *,
    vllm: VLLMConfig,
    batch: int,
    log: Path | None,
    ready: Callable[[], None],
) -> Iterator[Completion]:
    """See `engines.generate`; `batch` is of no use here.

    Raises:
      ValueError: no vLLM there, vLLM refuses the checkpoint or a setting, or its process died.
    """
    del batch
    done, failure = False, None
    with _log_file(log) as path:
        start_of_log = path.stat().st_size
        with _worker(vllm.interpreter, path) as (process, pipe, feed):
            _send(process, make_job(checkpoint, requests, sampling, vllm))
            for message in _messages(process, pipe, feed, _request_lines(requests)):
                match message:
                    case {"ready": _}:
                        ready()
                    case {"failed": failure}:
                        pass
                    case {"done": _}:
                        done = True
                        break
                    case [identity, output_ids, reason, error, found]:
                        yield _completion(identity, output_ids, reason, error, found, sampling.logprobs)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_SECONDS)
        if not done:
            raise ValueError(epitaph(failure, process.returncode, path, start_of_log))


def make_job(checkpoint: Path, requests: Collection[Request], sampling: Sampling, vllm: VLLMConfig) -> dict[str, Any]:
    """What the worker is told; see `vllm_worker`."""
    longest = max(request.room for request in requests)
    engine = {
        "model": str(checkpoint),
        "tokenizer": str(checkpoint),
        "skip_tokenizer_init": True,
        "dtype": vllm.dtype,
        # vLLM wants room for one sequence of the full length; a model's own 131,072 often has none
        "max_model_len": vllm.max_model_len or longest + sampling.max_tokens,
        "max_num_seqs": vllm.max_num_seqs,
        "enforce_eager": vllm.enforce_eager,
        "gpu_memory_utilization": vllm.gpu_memory_utilization,
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "pipeline_parallel_size": vllm.pipeline_parallel_size,
        "quantization": vllm.quantization,
        "enable_prefix_caching": vllm.enable_prefix_caching,
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": max(20, sampling.logprobs),
        "generation_config": "vllm",  # sampling is ours to say, not the checkpoint's
        "disable_log_stats": True,
        "seed": 0,
    }
    return {
        "engine": engine,
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop_ids": sampling.stop_ids,
            "logprobs": sampling.logprobs,
        },
        "kv_cache_gib": vllm.kv_cache_gib,
        "in_flight": 2 * vllm.max_num_seqs,
    }


def _request_lines(requests: Collection[Request]) -> Iterator[bytes]:
    for request in requests:
        row = [request.id, request.prompt_ids, request.seed, request.response_ids]
        yield json.dumps(row, separators=(",", ":")).encode() + b"\n"


def _completion(
    identity: str, output_ids: list[int], reason: Any, error: str | None, found: list | None, k: int
) -> Completion:
    kept = None
    if found and k:
        try:
            kept = logprobs.from_candidates((dict(map(tuple, row)) for row in found), output_ids, k)
        except ValueError as problem:
            return Completion(id=identity, output_ids=[], finish_reason="error", error=str(problem))
    return Completion(id=identity, output_ids=output_ids, finish_reason=reason, error=error, logprobs=kept)


# ------------------------------------------------------------------------------------------- the worker's process


@contextlib.contextmanager
def _worker(python: str, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, FileIO]]:
    """A started worker, the pipe it writes to and the one it reads; on leaving, nothing of it is left running."""
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
                start_new_session=True,
            )
    except OSError as error:
        os.close(pipe)
        feed.close()
        raise ValueError(
            f"vllm.python is {python}: {str(error.strerror).lower()}; name the interpreter of an environment with vLLM."
        ) from None
    finally:
        os.close(write)
        os.close(read)
    try:
        yield process, pipe, feed
    finally:
        # the group may hold vLLM's own processes even where the worker itself has ended
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.close()
        os.close(pipe)
        feed.close()


def _send(process: subprocess.Popen[bytes], job: dict[str, Any]) -> None:
    """Tells the worker its job. stdin stays open: its end tells the worker that we have died."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # a worker that died at once; the missing `done` says so
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()


def _messages(process: subprocess.Popen[bytes], pipe: int, feed: FileIO, lines: Iterator[bytes]) -> Iterator[Any]:
    """The worker's messages until it ends, while `lines` go to it.

    Its end is looked for too: a child of its own may hold the pipe open.
    """
    rest, waiting = b"", b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        selector.register(feed, selectors.EVENT_WRITE)
        while True:
            ended = process.poll() is not None
            ready = {key.fileobj for key, _ in selector.select(timeout=0 if ended else 1)}
            if feed in ready:
                waiting = _push(feed, waiting or b"", lines)
                if waiting is None:
                    selector.unregister(feed)
                    feed.close()
            if pipe not in ready:
                if ended:
                    return
                continue
            data = os.read(pipe, 1 << 20)
            if not data:
                return
            *found, rest = (rest + data).split(b"\n")
            yield from map(json.loads, found)


def _push(feed: FileIO, waiting: bytes, lines: Iterator[bytes]) -> bytes | None:
    """Writes what the pipe takes. Gives the rest of the lines begun; None when all is sent, or nobody reads on."""
    while len(waiting) < CHUNK and (line := next(lines, None)) is not None:
        waiting += line
    try:
        sent = feed.write(waiting) if waiting else 0
    except BrokenPipeError:  # the worker has died; the missing `done` says so
        return None
    if not waiting:
        return None
    return waiting[sent or 0 :]


@contextlib.contextmanager
def _log_file(log: Path | None) -> Iterator[Path]:
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
