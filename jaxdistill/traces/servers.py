"""vLLM servers of our own: started on this machine, started again if they die, and gone when we are."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.config import VLLMConfig
from jaxdistill.traces.vllm_process import epitaph

LAUNCHER = Path(__file__).with_name("vllm_server.py")
STOP_SECONDS = 15
"""How long a server may take to leave; then it is killed."""


class ManagedServer:
    """One server process, and the URL that it keeps through restarts."""

    def __init__(self, job: dict[str, Any], python: str, log: Path):
        self._job, self._python, self.log = job, python, log
        self.url = f"http://127.0.0.1:{job['arguments']['port']}/v1"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self.served = False
        """Whether it has been up since its last start."""

    def keep_running(self) -> None:
        """Starts the server if it does not run.

        Raises:
          ValueError: it ended before it was ever up; the log's last words say why.
        """
        if self._process is not None:
            if self._process.poll() is None:
                return
            code = self._process.returncode
            self._kill_group()
            if not self.served:
                raise ValueError(epitaph(None, code, self.log, self._log_start))
        self.served = False
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.log, "ab") as output:
                self._log_start = output.tell()
                self._process = subprocess.Popen(
                    [Path(self._python).expanduser(), LAUNCHER, json.dumps(self._job)],
                    stdin=subprocess.PIPE,  # its end tells the server that we have died
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,  # Ctrl-C reaches only us, who then stop it
                )
        except OSError as error:
            raise ValueError(
                f"vllm.python is {self._python}: {str(error.strerror).lower()}; "
                "name the interpreter of an environment with vLLM (of the traces traces.vllm.python)."
            ) from None

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        finally:  # a second Ctrl-C wants it at once
            self._kill_group()

    def _kill_group(self) -> None:
        """The group may hold vLLM's own processes even where the server itself has ended."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


def describe(
    checkpoint: Path, count: int, vllm: VLLMConfig, max_model_len: int | None, logprobs: int, log: Path
) -> list[ManagedServer]:
    """`count` servers of one checkpoint, each on a free port and with a log of its own; not started yet.

    Args: `logprobs` is how many of a token's they have to give.
    """
    found = []
    for rank, port in enumerate(free_ports(count)):
        job = {
            "arguments": {
                "model": str(checkpoint),
                "host": "127.0.0.1",
                "port": port,
                "dtype": vllm.dtype,
                "max_model_len": vllm.max_model_len or max_model_len,
                "max_num_seqs": vllm.max_num_seqs,
                "enforce_eager": vllm.enforce_eager,
                "gpu_memory_utilization": vllm.gpu_memory_utilization,
                "tensor_parallel_size": vllm.tensor_parallel_size,
                "pipeline_parallel_size": vllm.pipeline_parallel_size,
                "quantization": vllm.quantization,
                "enable_prefix_caching": vllm.enable_prefix_caching,
                "reasoning_parser": vllm.reasoning_parser,
                "logprobs_mode": "raw_logprobs",
                "max_logprobs": max(20, logprobs),
                "generation_config": "vllm",  # sampling is ours to say, not the checkpoint's
                "disable_log_stats": True,
                "uvicorn_log_level": "warning",
                "seed": 0,
            },
            "kv_cache_gib": vllm.kv_cache_gib,
            "rank": rank,
            "devices": vllm.tensor_parallel_size * vllm.pipeline_parallel_size,
        }
        found.append(ManagedServer(job, vllm.interpreter, log.with_name(f"{log.stem}-server-{rank}{log.suffix}")))
    return found


def free_ports(count: int) -> Iterator[int]:
    """Ports that nothing listens on now; all are taken at once, so that they differ."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    yield from ports


def allow_connections(count: int) -> None:
    """Raises this process's limit of open files, often 1,024, to what so many connections need.

    Raises:
      ValueError: the system does not allow it.
    """
    needed = count + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ValueError(
            f"{count} requests at a time need {needed} open files, but the system allows {hard}; "
            "lower traces.server.in_flight, or raise the limit (ulimit -Hn)."
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
