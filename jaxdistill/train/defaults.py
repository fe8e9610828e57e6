"""What a step is where the config leaves it open: its parts, its dtype, and what it keeps for the backward pass."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path

from jaxdistill.config import TrainConfig
from jaxdistill.models import ModelConfig

CPU_PART = 2**19
"""Numbers of the hidden state (rows x tokens x width) in one part on a CPU. What a part leaves for its backward pass
then stays near the caches, and comes from memory that the part before has used: pages that the system has to make anew
in every step cost more than adding up gradients. 15.7M parameters, 16 rows of 512 tokens, two cores, malloc as the
system has it: a step of 8.1 s in one part takes 6.1 s in eight, with a third of the memory."""


def micro_batches_of(
    train: TrainConfig,
    platform: str,
    sizes: Mapping[str, int],
    row_tokens: int,
    hidden_size: int,
    *,
    dropout: bool = False,
) -> int:
    """`train.micro_batches`; if absent, 1, or on CPUs the fewest equal parts of at most `CPU_PART` numbers a device.

    Accelerators want the largest part that their memory holds. A step that has other rows too, pairs or what the
    student has sampled, is not cut unasked, for these would have to divide as well.

    Args:
      platform: `cpu`, `tpu` or `gpu`.
      sizes: of the mesh's axes.
      dropout: of adapters; every part draws its own, so that other meshes would learn from other draws.
    """
    if train.micro_batches is not None:
        return train.micro_batches
    ways = sizes["data"] * sizes["fsdp"]
    other_rows = train.contrastive is not None or train.on_policy is not None
    if platform != "cpu" or dropout or other_rows or train.batch_rows % ways:
        return 1
    rows, row = train.batch_rows // ways, row_tokens // sizes["context"] * hidden_size
    return next((parts for parts in range(1, rows) if rows % parts == 0 and rows // parts * row <= CPU_PART), rows)


BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of processors that multiply bf16 numbers: x86's two kinds, and Arm's."""


def compute_dtype_of(train: TrainConfig, platform: str) -> str:
    """`train.compute_dtype`; for `auto`, bf16 on accelerators and on CPUs that have units for it, fp32 elsewhere.

    A CPU without such units converts every number first: with AVX2 alone, a student of 135M parameters trains half as
    fast in bf16 as in fp32.
    """
    if train.compute_dtype != "auto":
        return train.compute_dtype
    return "bfloat16" if platform != "cpu" or has_bf16_units() else "float32"


@functools.cache
def has_bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's processor multiplies bf16 numbers; False where the system does not tell."""
    if not cpuinfo.is_file():
        return False
    lines = cpuinfo.read_text(errors="replace").splitlines()
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not BF16_UNITS.isdisjoint(flags.partition(":")[2].split())


LAYER_TOKENS = 8192
"""Tokens that keep an accelerator's matrix units busy in one layer."""


def layer_parts_of(platform: str, remat: str, rows: int, row_tokens: int, adapters: bool) -> int:
    """In how many parts a layer takes a device's rows: the most that leave each of them `LAYER_TOKENS`, or one row.

    More tokens at once make a layer no faster, and its memory grows with them. CPUs cut whole steps instead. Policies
    other than `full` are for those who have the memory. Beside adapters most of a layer's parameters are constants.

    Args:
      rows, row_tokens: of a micro-batch on one device.
    """
    if platform == "cpu" or remat != "full" or adapters:
        return 1
    return next((n for n in range(rows, 1, -1) if rows % n == 0 and rows // n * row_tokens >= LAYER_TOKENS), 1)


MEMORY_SHARE = 0.85
"""Of a device's memory that the estimate may fill: it knows neither fragmentation nor what libraries take."""
HEAD_BYTES = 1.5e9
"""Of one chunk of logits with its slopes, where a step projects onto the vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSize:
    """What an estimate of a step's memory is made from; numbers are of one device.

    Attributes:
      tokens: of one micro-batch.
      trained, frozen: parameters, after they are split over the mesh.
      moments: optimizer numbers a trained parameter.
      frozen_bytes: of one parameter that is not trained.
      tensor: devices that share a matrix's heads or width.
      itemsize: bytes of one activation.
      teacher: bytes that a teacher on the same devices takes.
    """

    tokens: int
    trained: float
    frozen: float
    moments: int
    frozen_bytes: float
    tensor: int
    itemsize: int
    teacher: float = 0.0


def remat_of(train: TrainConfig, platform: str, student: ModelConfig, size: StepSize, memory: float | None) -> str:
    """`train.remat`; for `auto`, what keeps the most of what the device's memory holds.

    On accelerators that is `dots`, `attention` or `full`: to keep everything (`none`) moves more bytes than computing
    the elementwise passes again. CPUs keep everything, as their steps are cut into small parts.

    Args:
      memory: bytes of one device; None if nobody knows, then `full`.
    """
    if train.remat != "auto":
        return train.remat
    if platform == "cpu":
        return "none"
    room = (memory or 0.0) * MEMORY_SHARE - resident_bytes(student, size)
    layers = size.tokens * student.num_layers
    return next((p for p in ("dots", "attention") if layers * kept_bytes(student, size, p) <= room), "full")


def resident_bytes(student: ModelConfig, size: StepSize) -> float:
    """Bytes that every policy holds: the state, its gradients, one layer at work, a chunk of logits, a teacher."""
    state = size.trained * 4 * (2 + size.moments) + size.frozen * size.frozen_bytes
    head = HEAD_BYTES + 6.0 * student.vocab_size * student.hidden_size / size.tensor
    return size.teacher + state + head + 2 * size.tokens * _layer_numbers(student, size) * size.itemsize


def kept_bytes(student: ModelConfig, size: StepSize, policy: str) -> float:
    """Bytes of one token and layer that the backward pass finds saved under a policy of `models.decoder.REMAT`."""
    heads = student.num_heads / size.tensor
    attention = heads * (student.head_dim * size.itemsize + 4)  # and its softmax statistics, in fp32
    kept = {
        "full": 0.0,
        "attention": attention,
        "dots": attention + size.itemsize * _layer_numbers(student, size),
    }
    return student.hidden_size * size.itemsize + kept[policy]


def _layer_numbers(student: ModelConfig, size: StepSize) -> float:
    """Results of one layer's matrix products for one token, but the last one's, which nothing needs again."""
    heads = (student.num_heads + 2 * student.num_kv_heads) * student.head_dim
    return student.hidden_size + (heads + 2 * student.intermediate_size) / size.tensor


def teacher_bytes(
    train: TrainConfig, teacher: ModelConfig, numbers: int, byte: float, sizes: Mapping[str, int], student: StepSize
) -> float:
    """Bytes of one device: the teacher's parameters, what it says of a micro-batch, and its chunk of logits.

    Args:
      numbers, byte: its parameters, and the bytes of one.
      student: of the step that it works beside.
    """
    assert train.distill is not None
    axes = ("tensor",) if train.distill.replicate else ("fsdp", "tensor", "context")
    ways = math.prod(sizes[axis] for axis in axes)
    return numbers * byte / ways + student.tokens * teacher.hidden_size * student.itemsize + HEAD_BYTES


def step_size(
    train: TrainConfig,
    student: ModelConfig,
    sizes: Mapping[str, int],
    row_tokens: int,
    micro_batches: int,
    *,
    trained: int,
    frozen: int = 0,
    frozen_bytes: float = 4.0,
    itemsize: int = 2,
) -> StepSize:
    """The sizes of one device.

    Args:
      sizes: of the mesh's axes.
      trained, frozen: numbers of parameters of the whole model.
    """
    ways = math.prod(sizes[axis] for axis in ("fsdp", "tensor", "context"))
    rows = max(1, train.batch_rows // micro_batches // (sizes["data"] * sizes["fsdp"]))
    return StepSize(
        tokens=rows * row_tokens // sizes["context"],
        trained=trained / ways,
        frozen=frozen / ways,
        moments={"adamw": 2, "muon": 1, "adafactor": 0}[train.optimizer.name],
        frozen_bytes=frozen_bytes,
        tensor=sizes["tensor"],
        itemsize=itemsize,
    )
