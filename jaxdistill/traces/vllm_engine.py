"""The engine `vllm`: vLLM's offline engine, in a process of its own that streams completions back.

This module never imports vLLM, see `vllm_process`. Requests go to the worker as it takes them, so that memory does not
grow with their number.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from jaxdistill.config import VLLMConfig
from jaxdistill.traces import logprobs
from jaxdistill.traces.engines import Completion, Request, Sampling
from jaxdistill.traces.vllm_process import Wire, epitaph, log_file, start_worker

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
    longest = max(request.room for request in requests)
    with log_file(log) as path:
        start_of_log = path.stat().st_size
        with start_worker(vllm.interpreter, path) as wire:
            wire.send_job(make_job(checkpoint, longest, sampling, vllm))
            for message in _messages(wire, _request_lines(requests)):
                match message:
                    case {"ready": _}:
                        ready()
                    case {"failed": failure}:
                        pass
                    case {"done": _}:
                        done = True
                        break
                    case list():
                        yield _completion(message, sampling.logprobs)
            with contextlib.suppress(subprocess.TimeoutExpired):
                wire.process.wait(EXIT_SECONDS)
        if not done:
            raise ValueError(epitaph(failure, wire.process.returncode, path, start_of_log))


class Session:
    """A worker that is asked bit by bit, while it answers what came before. See `engines.Session`."""

    def __init__(
        self,
        checkpoint: Path,
        sampling: Sampling,
        *,
        vllm: VLLMConfig,
        batch: int,
        log: Path | None,
        longest: int,
    ):
        """Returns when vLLM has loaded the model; `batch` is of no use here.

        Raises:
          ValueError: as `generate`.
        """
        del batch
        self._k = sampling.logprobs
        self._lines: deque[bytes] = deque()
        self._stack = contextlib.ExitStack()
        with self._stack:  # so that an error leaves nothing behind
            self._log = self._stack.enter_context(log_file(log))
            self._start_of_log = self._log.stat().st_size
            self._wire = self._stack.enter_context(start_worker(vllm.interpreter, self._log))
            self._wire.send_job(make_job(checkpoint, longest, sampling, vllm))
            while not any(isinstance(message, dict) for message in self._pump()):
                pass
            self._stack = self._stack.pop_all()

    def give(self, requests: list[Request]) -> None:
        self._lines.extend(_request_lines(requests))

    def give_batch(self, requests: list[Request], weights: Path | None) -> None:
        """Requests that are begun together, when all before have been taken: what comes of them goes by nothing else.

        Args:
          weights: the folder of a checkpoint of the same shape, which is loaded in place first.
        """
        message = {"weights": None if weights is None else str(weights), "count": len(requests)}
        self._lines.append(json.dumps(message).encode() + b"\n")
        self.give(requests)

    def take(self, seconds: float) -> list[Completion]:
        """See `engines.Session`.

        Raises:
          ValueError: the worker died.
        """
        self._wire.give(_drain(self._lines))
        return [_completion(message, self._k) for message in self._pump(seconds) if isinstance(message, list)]

    def close(self) -> None:
        self._stack.close()

    def _pump(self, seconds: float = 1.0) -> list[Any]:
        found = self._wire.pump(seconds)
        failure = next((m["failed"] for m in found or [] if isinstance(m, dict) and "failed" in m), None)
        if found is None or failure:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._wire.process.wait(EXIT_SECONDS if failure else 1)
            returncode = self._wire.process.poll()
            raise ValueError(epitaph(failure, returncode or 0, self._log, self._start_of_log))
        return found


def _drain(lines: deque[bytes]) -> Iterator[bytes]:
    while lines:
        yield lines.popleft()


def make_job(checkpoint: Path, longest: int, sampling: Sampling, vllm: VLLMConfig) -> dict[str, Any]:
    """What the worker is told, see `vllm_worker`; `longest` is the most room that a request takes."""
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


def _messages(wire: Wire, lines: Iterator[bytes]) -> Iterator[Any]:
    """The worker's messages until it ends, while `lines` go to it."""
    more = True
    while True:
        if more and not (more := wire.give(lines)):
            wire.finish()
        found = wire.pump()
        if found is None:
            return
        yield from found


def _completion(message: list[Any], k: int) -> Completion:
    identity, output_ids, reason, error, found = message
    kept = None
    if found and k:
        try:
            kept = logprobs.from_candidates((dict(map(tuple, row)) for row in found), output_ids, k)
        except ValueError as problem:
            return Completion(id=identity, output_ids=[], finish_reason="error", error=str(problem))
    return Completion(id=identity, output_ids=output_ids, finish_reason=reason, error=error, logprobs=kept)
