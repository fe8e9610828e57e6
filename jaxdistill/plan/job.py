"""What a compiler process is asked, and what it answers: plain data, as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One train step on one mesh of one topology."""

    topology: str
    slices: int
    student: dict[str, Any]
    """Its shape, as Hugging Face's config."""
    lora: dict[str, Any] | None
    """Section `student.lora`."""
    train: dict[str, Any]
    """Section `train`."""
    teacher: dict[str, Any] | None = None
    """The shape of the teacher that is distilled online, if there is one."""
    topk: int | None = None
    """Tokens of a stored distribution, where there are some."""
    row_tokens: int
    steps: int
    seed: int
    trained_share: float = 1.0
    """Of the tokens: what reaches the vocabulary."""
    segment_tokens: int | None = None
    """Mean length of the examples in a packed row; None: one example fills it."""
    max_segments: int | None = None
    """The most examples in a packed row; None: unknown."""
    quick: bool = False
    """Compile several times faster, with a worse program: for comparing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind over one network, of one device in one step."""

    kind: str
    network: str
    """`ICI`, `DCN`, `NVLink`, `network` (between GPU hosts), or `memory` (virtual devices)."""
    devices: int
    """Of one group."""
    axes: float
    """Of the torus, that the group spans; 0.5 for one that is no ring."""
    asynchronous: bool
    calls: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What is known of a compiled step; all numbers are of one device."""

    mesh: dict[str, int]
    peak_bytes: float
    """The most that is in use at once, arguments and what libraries take beside XLA's buffers included."""
    memory: dict[str, float]
    """What of it: params, optimizer, frozen, batch (exact); gradients, logits (from shapes); libraries (workspaces);
    activations (the rest)."""
    flops: float
    """Of matrix products in the compiled program."""
    kernel_flops: dict[str, float]
    """Of attention kernels: GPUs' for the segments of a row, TPUs' for the whole row."""
    cycles: float
    kernels: dict[str, float]
    traffic: list[Traffic]
    unknown_loops: dict[str, float]
    analytic_flops: float
    """What the program should need, from shapes: matrix products without attention's kernels."""
    model_flops: float
    """What the model needs, without recomputation: for the MFU."""
    tokens: int
    """Of the global batch."""
    parameters: int
    seconds: float
    """Of compiling."""
    host_bytes: float
    """Peak memory of the compiler's process."""
    moved: dict[str, float] = dataclasses.field(default_factory=dict)
    """Bytes that are read from and written to memory, by category (`moved`)."""
    products: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)
    """Matrix products: FLOPs and bytes moved of one, and how many there are."""
    launches: float = 0.0
    """Instructions that move bytes: on GPUs about as many kernels are launched."""
    offloaded_bytes: float = 0.0
    """Bytes that go to or come from the host's memory."""
    layers: int = 0
    remat: str = ""
    """The policy that the step has: what `auto` came to."""
    attention: str = ""
    """The kernel that `train.attention` names, or that was chosen for this backend; of `models.attention.KERNELS`."""

    @classmethod
    def of(cls, data: dict[str, Any]) -> Compiled:
        lists: dict[str, Any] = {"traffic": [Traffic(**t) for t in data["traffic"]]}
        lists["products"] = [tuple(p) for p in data.get("products", ())]
        return cls(**data | lists)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """The compiler found no way to fit the step."""

    needed_bytes: float
    available_bytes: float
    text: str
    remat: str = ""
    """The policy that the step had."""
