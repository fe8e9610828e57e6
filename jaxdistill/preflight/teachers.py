"""The teacher, before it is asked: is it there?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from jaxdistill.config import RunConfig, ServerConfig, TracesConfig
from jaxdistill.preflight.finding import Finding
from jaxdistill.preflight.repositories import config_of


def check(config: RunConfig) -> Iterator[Finding]:
    traces = config.traces
    if traces.asked is None or traces.teacher is None:
        return
    if traces.asked_server is not None:
        yield from check_key(traces.asked_server, "traces.server")
    if not _is_remote(traces):
        found = config_of(traces.teacher, traces.revision)
        if isinstance(found, Finding):
            yield Finding("traces.teacher", found.level, found.text)


def check_key(server: ServerConfig, what: str) -> Iterator[Finding]:
    """Servers of others want a key."""
    foreign = [url for url in server.urls if urlsplit(url).scheme == "https"]
    if foreign and not os.environ.get(server.api_key_env):
        text = f"no key is sent to {foreign[0]}, as {server.api_key_env} is not set; put it there if one is wanted."
        yield Finding(what, "warning", text)


def _is_remote(traces: TracesConfig) -> bool:
    """Whether its weights are on other machines, so that its name need not be one of the hub."""
    return traces.executor == "ray" or (traces.asked == "server" and not traces.server.start)
