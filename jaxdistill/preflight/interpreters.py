"""The interpreters that vLLM will run in: is it there? It is looked for and not imported, which takes seconds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from jaxdistill.config import RunConfig, ServerConfig, VLLMConfig
from jaxdistill.preflight.finding import Finding
from jaxdistill.traces.vllm_worker import INSTALL

SECONDS = 30
"""How long an interpreter may take to look."""
_FOUND, _NONE = 0, 3
_LOOK = f"import importlib.util as u, sys; sys.path.pop(0); sys.exit({_FOUND} if u.find_spec('vllm') else {_NONE})"


def check(config: RunConfig) -> Iterator[Finding]:
    """Every section that starts vLLM on this machine.

    It is an error for the traces, which come next; a later stage may run elsewhere.
    """
    for section, vllm in sections(config).items():
        missing = why_missing(vllm.interpreter)
        key = f"{section}.python"
        if missing is None:
            yield Finding(key, "ok", f"{vllm.interpreter} has vLLM")
        else:
            yield Finding(key, "error" if section == "traces.vllm" and _asks(config) else "warning", missing)


def sections(config: RunConfig) -> dict[str, VLLMConfig]:
    """Key of the section -> how vLLM is started, of all that start it on this machine."""
    traces, evaluate, judge, on_policy = config.traces, config.evaluate, config.verify.judge, config.train.on_policy
    found = {}
    graded = on_policy is not None and on_policy.grader == "server" and traces.server.start > 0
    if _asks(config) or graded or config.export.serve:
        found["traces.vllm"] = traces.vllm
    if judge is not None and _starts(judge.engine, judge.server):
        found["verify.judge.vllm"] = judge.vllm
    if on_policy is not None and on_policy.rollouts == "vllm":
        found["train.on_policy.vllm"] = on_policy.vllm
    if evaluate is not None and _starts(evaluate.engine, evaluate.server):
        found["evaluate.vllm"] = evaluate.vllm
    return found


def _asks(config: RunConfig) -> bool:
    """Whether `generate` starts it."""
    traces = config.traces
    return traces.executor == "local" and _starts(traces.asked, traces.server)


def _starts(engine: str | None, server: ServerConfig) -> bool:
    return engine == "vllm" or (engine == "server" and server.start > 0)


@cache
def why_missing(python: str) -> str | None:
    """Why an interpreter cannot run vLLM, and what to do; None if it can, by all that is known."""
    if python == sys.executable:
        return None if importlib.util.find_spec("vllm") else _missing(python)
    try:
        ran = subprocess.run([Path(python).expanduser(), "-c", _LOOK], capture_output=True, timeout=SECONDS)
    except OSError as error:
        return f"{python}: {str(error.strerror).lower()}; name the interpreter of an environment with vLLM."
    except subprocess.TimeoutExpired:  # a busy machine; vLLM's own start says the rest
        return None
    return _missing(python) if ran.returncode == _NONE else None


def _missing(python: str) -> str:
    return f"{python} has no vLLM; {INSTALL}."
