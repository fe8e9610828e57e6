"""One server as the client knows it, and what its list of models tells."""

from __future__ import annotations

import difflib
import json
import time
from typing import Any

from jaxdistill.config import ServerConfig
from jaxdistill.traces.server_errors import Refused
from jaxdistill.traces.servers import ManagedServer

UNLISTED = (403, 404, 405, 501)
"""Statuses of a list of models that is not to be had: not every server has one, and not every key may see it."""


class Server:
    """One server, as the client knows it."""

    def __init__(self, url: str, slots: int, managed: ManagedServer | None = None):
        self.url, self.managed = url.rstrip("/"), managed
        self.up, self.parked = False, slots
        """Slots are parked while the server is not up."""
        self.model = ""
        self.vllm = managed is not None
        """Whether it is asked in vLLM's dialect."""
        self.down_since = time.monotonic()
        self.said = ""
        """Why it is not up, as it was said last."""


def read_models(data: bytes) -> dict[str, dict[str, Any]] | None:
    """The models that a server lists, by name; None if this is no such list."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    rows = found.get("data") if isinstance(found, dict) else found  # some give the bare list
    if not isinstance(rows, list) or not all(isinstance(r, dict) and isinstance(r.get("id"), str) for r in rows):
        return None
    return {row["id"]: row for row in rows}


def speaks_vllm(model: dict[str, Any], config: ServerConfig) -> bool:
    """Whether a server is asked in vLLM's dialect: as the user says, or as the list of models does."""
    return config.dialect == "vllm" or (config.dialect == "auto" and model.get("owned_by") == "vllm")


def choose_model(names: list[str], wanted: str | None, url: str) -> str:
    """The model to ask: the wanted one, or the only one.

    Raises:
      Refused: the server has several, or others; the likeliest are named.
    """
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return wanted
    what = "no model at all" if not names else "several models" if wanted is None else f"no model {wanted!r}"
    near = difflib.get_close_matches(wanted or "", names, n=8, cutoff=0.3)
    shown = [*near, *(name for name in names if name not in near)][:8]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    raise Refused(f"{url} serves {what} ({', '.join(shown)}{more}); name one of these in server.model.")
