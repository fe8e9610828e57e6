"""All that is measured of one response, as plain data that a store keeps."""

from __future__ import annotations

import json
from typing import Any

from jaxdistill.config import FiltersConfig
from jaxdistill.verify import similarity
from jaxdistill.verify.quality import measures_wanted
from jaxdistill.verify.store import hash_of_code
from jaxdistill.verify.texts import Text

SIGNATURE_NGRAM = 5


def measure(response: str, prompt: str, filters: FiltersConfig, *, with_signature: bool) -> dict[str, Any]:
    """Name -> number, of the measures that `filters` has thresholds for; with `signature`, if it is wanted."""
    text = Text(response, prompt)
    found: dict[str, Any] = {name: one(text, filters) for name, one in measures_wanted(filters).items()}
    if with_signature:
        found["signature"] = similarity.encode(similarity.signature(response, SIGNATURE_NGRAM))
    return found


def names_wanted(filters: FiltersConfig, with_signature: bool) -> str:
    """The names of what `measure` finds, as one text."""
    return json.dumps([*measures_wanted(filters), "signature"] if with_signature else [*measures_wanted(filters)])


def code_hash() -> str:
    """Of the code that measures."""
    return hash_of_code(
        ["measuring.py", "quality.py", "texts.py", "similarity.py"], ["datasketch", "py3langid", "regex"]
    )
