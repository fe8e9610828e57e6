"""What `prepare` does for `data.topk`: where the teacher's distributions come from, and what is said of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxdistill import hub, progress
from jaxdistill.config import DataConfig
from jaxdistill.data import sources, teacher, topk
from jaxdistill.records import RunDir, write_json
from jaxdistill.tokenization import TokenMap


def plan(
    data: DataConfig, run: RunDir, taken: list[sources.Taken]
) -> tuple[topk.TopK | None, list[teacher.Reader] | None]:
    """How the teacher's distributions are kept, and where they come from; nothing where they are not.

    Raises:
      ValueError: runs without them, of different kinds or, under `topk_align: spans`, of different tokenizers.
    """
    if data.topk is None:
        return None, None
    spans, tokens = data.topk_align == "spans", TokenMap.of(run.tokenizer)
    readers = [teacher.Reader(part.run, None if spans else tokens.fingerprint, data.topk) for part in taken]
    origins = [reader.origin for reader in readers]
    kinds = {(o.random, o.temperature, o.tokenizer if spans else "") for o in origins}
    if len(kinds) > 1:
        raise ValueError(
            "data.mixture: the runs' teachers' distributions are of different kinds (traces.logprobs_kind and "
            "logprobs_temperature), or of different tokenizers under data.topk_align: spans; take runs of one kind."
        )
    origin = origins[0]
    if spans and origin.random:
        raise ValueError("data.topk_align: spans compares the highest probabilities, and these are random draws.")
    vocabulary = origin.vocabulary if spans else tokens.size
    return topk.TopK(data.topk, vocabulary, origin.random, spans, origin.temperature), readers


def teacher_tokenizer(data: DataConfig, readers: list[teacher.Reader] | None) -> Path | None:
    """The folder of the teacher's tokenizer, where it is needed.

    Raises:
      ValueError: it is not the one that the logprobs are about.
    """
    if readers is None or data.topk_align != "spans":
        return None
    origin = readers[0].origin
    folder = hub.fetch(origin.teacher, weights=False)
    if TokenMap.of(folder).fingerprint != origin.tokenizer:
        raise ValueError(f"{folder}: another tokenizer than the logprobs are about; collect the traces again.")
    return folder


def finish(run: RunDir, codec: topk.TopK, readers: list[teacher.Reader], share: float) -> dict[str, Any]:
    """Writes down whose the distributions are; returns the counts."""
    origins = [dataclasses.asdict(reader.origin) for reader in readers]
    write_json(run.tokens / topk.FILE, {"codec": codec.to_dict(), "origins": origins})
    kind = "draws from the teacher" if codec.random else "likeliest tokens of the teacher"
    progress.say(f"  {codec.k} {kind} beside {share:.2%} of the response tokens, {codec.width} bytes each")
    return {"k": codec.k, "bytes_per_token": codec.width, "covered_share": share}
