"""From a config and a command line to what the compiler is asked: shapes and meshes, without weights and data."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdistill import hub
from jaxdistill.config import RunConfig, to_dict
from jaxdistill.models.decoder import REMAT
from jaxdistill.plan.job import Job
from jaxdistill.plan.targets import Topology
from jaxdistill.records import RunDir, read_manifest
from jaxdistill.train.defaults import micro_batches_of

AXES = ("data", "fsdp", "tensor", "context")


def parse_mesh(text: str) -> dict[str, int]:
    """`fsdp=16,tensor=4` -> sizes by axis.

    Raises:
      ValueError: an unknown axis, or no number.
    """
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis.strip() not in AXES or not size.strip().lstrip("-").isdigit():
            raise ValueError(f"--mesh {text}: write it as fsdp=16,tensor=4; the axes are {', '.join(AXES)}.")
        sizes[axis.strip()] = int(size)
    return sizes


def make_job(
    config: RunConfig,
    topology: Topology,
    *,
    mesh: Mapping[str, int] | None = None,
    batch_rows: int | None = None,
    micro_batches: int | None = None,
    remat: str | None = None,
    row_tokens: int | None = None,
    segment_tokens: int | None = None,
    quick: bool = False,
) -> Job:
    """A config's step on a topology; what is given takes the place of the config's.

    Raises:
      ValueError: a contrastive or an on-policy training, a student whose shape is not known here, rows beyond its
        context, an unknown remat policy, or a mesh that does not fit.
    """
    if config.train.contrastive is not None:
        raise ValueError("plan knows nothing of train.contrastive's rows of pairs; set train.contrastive=null.")
    if config.train.on_policy is not None:
        raise ValueError("plan knows nothing of train.on_policy's sampling; set train.on_policy=null.")
    train = to_dict(config.train)
    if mesh is not None:
        train["mesh"] = {"data": 1, "fsdp": -1, "tensor": 1, "context": 1, "slices": None} | dict(mesh)
        if topology.slices > 1 and "data" not in mesh:
            train["mesh"]["data"] = topology.slices
    elif topology.slices > 1 and train["mesh"]["data"] == 1:
        train["mesh"]["data"] = topology.slices
    known = ("auto", *REMAT)
    if remat is not None and remat not in known:
        near = difflib.get_close_matches(remat, known, n=1)
        raise ValueError(
            f"--remat {remat}: no such policy; {f'did you mean {near[0]}? ' if near else ''}"
            f"Known are {', '.join(known)}."
        )
    for key, value in (("batch_rows", batch_rows), ("micro_batches", micro_batches), ("remat", remat)):
        if value is not None:
            train[key] = value
    open_parts = train["micro_batches"] is None
    train["micro_batches"] = train["micro_batches"] or 1
    rows = row_tokens or config.data.row_tokens
    shape = student_of(config)
    longest = shape.get("max_position_embeddings") or rows
    if rows > longest:
        raise ValueError(f"data.row_tokens={rows} is beyond the student's context of {longest}; lower it.")
    check_mesh(train, shape, topology)
    if open_parts:
        of = dataclasses.replace(config.train, batch_rows=train["batch_rows"])
        sizes = resolve(train["mesh"], topology.devices)
        dropout = config.student.lora is not None and config.student.lora.dropout > 0
        train["micro_batches"] = micro_batches_of(
            of, topology.chip.platform, sizes, rows, shape["hidden_size"], dropout=dropout
        )
    return Job(
        topology=topology.name,
        slices=topology.slices,
        student=shape,
        lora=to_dict(config.student.lora) if config.student.lora else None,
        train=train,
        teacher=teacher_of(config),
        topk=config.data.topk if config.train.distill and config.train.distill.source == "stored" else None,
        row_tokens=rows,
        steps=steps_of(config) or 1000,
        seed=config.seed,
        segment_tokens=segment_tokens,
        max_segments=_most_segments(config, row_tokens) or -(-rows // min(segment_tokens or rows, rows)),
        quick=quick,
    )


def _most_segments(config: RunConfig, row_tokens: int | None) -> int | None:
    """The most examples in a row, as `prepare` counted them; None if it has not, or for rows of another length."""
    counts = (read_manifest(RunDir(Path(config.run_dir)).tokens) or {}).get("counts", {})
    return counts.get("most_segments") if row_tokens in (None, counts.get("row_tokens")) else None


def student_of(config: RunConfig) -> dict[str, Any]:
    """The student's shape in Hugging Face's keys, from a `config.json` alone; its weights need not be here."""
    student = config.student
    if student.init is None:
        given = {k: v for k, v in to_dict(student.architecture).items() if v is not None}
        return given | {"vocab_size": _vocabulary(config)}
    return shape_of(student.init, student.revision)


def teacher_of(config: RunConfig) -> dict[str, Any] | None:
    """The shape of the teacher that runs beside the student, if one does."""
    d = config.train.distill
    if d is None or d.source != "online":
        return None
    return shape_of(d.teacher or str(config.traces.teacher), d.revision if d.teacher else config.traces.revision)


def shape_of(checkpoint: str, revision: str | None) -> dict[str, Any]:
    """A checkpoint's `config.json`: of a folder, a published one by its name, or from the hub."""
    from jaxdistill.models.published import PUBLISHED

    if checkpoint == hub.DEMO:
        return hub.read_config(hub.demo_teacher())
    for file in (hub.SHAPE, "config.json"):
        path = Path(checkpoint) / file
        if path.is_file():
            return json.loads(path.read_bytes())
    name = checkpoint.rpartition("/")[2]
    if name in PUBLISHED:
        return PUBLISHED[name][0]
    return hub.read_config(hub.fetch(checkpoint, revision, weights=False))


def _vocabulary(config: RunConfig) -> int:
    """Tokens of the tokenizer of a student from scratch."""
    from jaxdistill.tokenization import load_tokenizer

    run = RunDir(Path(config.run_dir))
    if run.tokenizer.is_dir():
        return len(load_tokenizer(str(run.tokenizer)))
    name = config.student.tokenizer or config.traces.teacher
    return config.student.tokenizer_vocab if name in (None, "train") else len(load_tokenizer(name))


def steps_of(config: RunConfig) -> int | None:
    """Steps of the whole run; None if they depend on rows that are not packed yet."""
    t = config.train
    if t.steps:
        return t.steps
    manifest = read_manifest(RunDir(Path(config.run_dir)).tokens)
    rows = (manifest or {}).get("counts", {}).get("rows")
    return -(-int((t.epochs or 0) * rows) // t.batch_rows) if rows else None


def resolve(mesh: Mapping[str, Any], devices: int) -> dict[str, int]:
    """The sizes of all axes, where -1 takes the devices that remain."""
    sizes = {axis: mesh.get(axis) or 1 for axis in AXES}
    rest = devices // math.prod(size for size in sizes.values() if size != -1)
    return {axis: rest if size == -1 else size for axis, size in sizes.items()}


def check_mesh(train: Mapping[str, Any], shape: Mapping[str, Any], topology: Topology) -> None:
    """
    Raises:
      ValueError: sizes that do not multiply out to the devices, or do not divide heads or batch; the nearest that do.
    """
    mesh, devices = train["mesh"], topology.devices
    sizes = {axis: mesh.get(axis) or 1 for axis in ("data", "fsdp", "tensor", "context")}
    known = 1
    for size in sizes.values():
        known *= size if size != -1 else 1
    heads = shape["num_attention_heads"]
    kv_heads = shape.get("num_key_value_heads") or heads
    fitting = [n for n in range(1, devices + 1) if not heads % n and not kv_heads % n and not devices % n]
    tensor = sizes["tensor"]
    if tensor != -1 and (heads % tensor or kv_heads % tensor):
        near = min(fitting, key=lambda n: abs(n - tensor))
        raise ValueError(
            f"mesh tensor={tensor} does not divide {heads} query heads and {kv_heads} key heads; the nearest that does "
            f"is tensor={near}."
        )
    if known <= 0 or devices % known or (-1 not in sizes.values() and known != devices):
        near = _nearest(sizes, devices, fitting)
        written = ",".join(f"{a}={s}" for a, s in sizes.items() if s != 1)
        raise ValueError(
            f"mesh {written or 'of 1 device'} does not multiply out to the {devices} devices of {topology}; "
            f"the nearest that does is {','.join(f'{a}={s}' for a, s in near.items() if s != 1)}."
        )
    sizes = resolve(mesh, devices)
    ways = sizes["data"] * sizes["fsdp"]
    rows = train["batch_rows"] // train["micro_batches"]
    if train["batch_rows"] % train["micro_batches"] or rows % ways:
        step = train["micro_batches"] * ways
        near = max(step, round(train["batch_rows"] / step) * step)
        raise ValueError(
            f"{train['batch_rows']} rows in {train['micro_batches']} micro-batches do not divide over {ways} devices "
            f"(data x fsdp); the nearest that do are --batch {near}."
        )


def _nearest(sizes: Mapping[str, int], devices: int, tensors: list[int]) -> dict[str, int]:
    """The sizes whose product is the number of devices and which differ least, by factors."""
    wanted = {axis: abs(size) for axis, size in sizes.items()}
    best, least = {"data": 1, "fsdp": devices, "tensor": 1, "context": 1}, math.inf
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor in tensors:
        for context in (n for n in divisors if devices // tensor % n == 0):
            for data in (n for n in divisors if devices // tensor // context % n == 0):
                made = {
                    "data": data,
                    "fsdp": devices // tensor // context // data,
                    "tensor": tensor,
                    "context": context,
                }
                off = sum(abs(math.log(made[a] / wanted[a])) * (0.1 if a == "fsdp" else 1) for a in made)
                if off < least:
                    best, least = made, off
    return best
