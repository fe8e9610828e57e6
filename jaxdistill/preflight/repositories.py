"""Small files of a checkpoint, from a folder, the hub's cache or the hub itself; without a network it is said."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jaxdistill import hub
from jaxdistill.preflight.finding import Finding

SECONDS = 5.0
"""How long the hub may take to answer; where there is no network nobody wants to wait for it."""


def config_of(name: str, revision: str | None, file: str = "config.json") -> dict | Finding:
    """A checkpoint's config, or why it is not to be had.

    Args:
      name: a folder, `demo`, or a repository of the hub.
      file: another file that shows that the repository is there; the config is empty then.
    Returns:
      the config; empty for adapters, which have none.
    """
    folder = hub.local(name)
    if folder.is_dir():
        try:
            hub.fetch(str(folder), None)
            return {} if hub.is_adapter(folder) else hub.read_config(folder)
        except ValueError as error:
            return Finding(name, "error", str(error))
    # runs/base may be a repository's name, but where there is a folder `runs` it is not meant so
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.is_dir():
        text = f"{folder.absolute()}: no such folder; name a checkpoint's folder or a repository (owner/name)."
        return Finding(name, "error", text)
    return _of_hub(name, revision, file)


@cache
def _of_hub(name: str, revision: str | None, file: str) -> dict | Finding:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = try_to_load_from_cache(name, file, revision=revision)
        if not isinstance(path, str):
            if (silent := _why_silent()) is not None:
                text = f"{name} is unchecked: not on this machine, and the hub cannot be reached ({silent})."
                return Finding(name, "unchecked", text)
            path = hf_hub_download(name, file, revision=revision, etag_timeout=SECONDS)
        return hub.read_config(Path(path).parent) if file == "config.json" else {}
    except GatedRepoError:
        return Finding(name, "error", f"{name} is gated; accept its licence on the hub and log in (hf auth login).")
    except RevisionNotFoundError:
        return Finding(name, "error", f"{name} has no revision {revision}.")
    except (RepositoryNotFoundError, HFValidationError):
        return Finding(name, "error", f"{name} is neither a folder nor a repository of the hub that you may see.")
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError too
        return Finding(name, "unchecked", f"{name} is unchecked: {_first_line(error)}")
    except EntryNotFoundError:
        if file != "config.json":
            return {}
        return Finding(name, "error", f"{name} has no {file}; it is no checkpoint that can be read.")
    except (OSError, ValueError) as error:
        return Finding(name, "unchecked", f"{name} is unchecked: {_first_line(error)}")


@cache
def _why_silent() -> str | None:
    """Why the hub does not answer; None if it does. Its own client would try for half a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # whatever the client of the day raises, offline mode too
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
