"""Accelerators that a plan can be made for, and how they are named: `v5p:4x4x4`, `h100:8`, `cpu:8`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator; numbers are the vendor's, of one JAX device unless said otherwise.

    Sources: Google Cloud's TPU system pages (v4, v5e, v5p, v6e, TPU7x); "How to Scale Your Model" (Austin et al. 2025),
    chapter on TPUs, for links; NVIDIA's H100, H200 and B200 data sheets.
    """

    platform: str
    """Which compiler: tpu, gpu or cpu."""
    title: str
    tflops: float
    """Dense bf16."""
    hbm_gib: float
    """What the compiler lets a program use (TPUs); 95% of the memory (GPUs: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95)."""
    hbm_gbps: float
    """Memory bandwidth, GB/s."""
    link_gbps: float
    """TPUs: one way along one axis of the torus, GB/s. GPUs: NVLink, one way."""
    outside_gbps: float
    """Between slices or hosts, one way, GB/s of one device."""
    clock_ghz: float = 0.0
    """For the compiler's cycle counts: what makes the peak from the number of multipliers."""
    devices_per_chip: int = 1
    shapes: tuple[str, ...] = ()
    """Published slice shapes (TPUs) or devices of a host (GPUs)."""
    wraps: int = 4
    """Torus axes of at least this size, and a multiple of it, close to rings."""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """For the topology."""


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x4x12",
    "4x8x8",
    "8x8x8",
    "8x8x12",
    "8x8x16",
    "8x16x16",
)
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(
        platform="tpu", title="TPU v4", tflops=275, hbm_gib=30.75, hbm_gbps=1228, link_gbps=45, outside_gbps=6.25,
        clock_ghz=1.05, shapes=(*_CUBES, "12x16x16"), options={"chip_config_name": "megacore"},
    ),
    "v5e": Chip(
        platform="tpu", title="TPU v5e", tflops=197, hbm_gib=15.75, hbm_gbps=819, link_gbps=45, outside_gbps=3.125,
        clock_ghz=1.5, shapes=_FLAT, wraps=16,
    ),
    "v5p": Chip(
        platform="tpu", title="TPU v5p", tflops=459, hbm_gib=95.74, hbm_gbps=2765, link_gbps=90, outside_gbps=6.25,
        clock_ghz=1.75, shapes=(*_CUBES, "16x16x16", "16x16x24"),
    ),
    "v6e": Chip(
        platform="tpu", title="TPU v6e", tflops=918, hbm_gib=31.25, hbm_gbps=1640, link_gbps=90, outside_gbps=12.5,
        clock_ghz=1.75, shapes=_FLAT, wraps=16,
    ),
    "tpu7x": Chip(
        platform="tpu", title="TPU7x", tflops=1153, hbm_gib=94.75, hbm_gbps=3690, link_gbps=90, outside_gbps=6.25,
        clock_ghz=2.2, devices_per_chip=2, shapes=_CUBES,
    ),
    "h100": Chip(
        platform="gpu", title="NVIDIA H100 SXM", tflops=989, hbm_gib=75.1, hbm_gbps=3350, link_gbps=450,
        outside_gbps=50, shapes=("1", "2", "4", "8"),
    ),
    "h200": Chip(
        platform="gpu", title="NVIDIA H200 SXM", tflops=989, hbm_gib=132.8, hbm_gbps=4800, link_gbps=450,
        outside_gbps=50, shapes=("1", "2", "4", "8"),
    ),
    "b200": Chip(
        platform="gpu", title="NVIDIA B200 SXM", tflops=2250, hbm_gib=169, hbm_gbps=7700, link_gbps=900,
        outside_gbps=50, shapes=("1", "2", "4", "8"),
    ),
    "cpu": Chip(
        platform="cpu", title="virtual CPU devices", tflops=0, hbm_gib=0, hbm_gbps=0, link_gbps=0, outside_gbps=0,
        shapes=("1", "2", "4", "8", "16", "32"),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that are described, not there: `slices` of the shape each, with a slower network between them."""

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices_per_chip

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    @classmethod
    def of(cls, name: str, slices: int = 1) -> Topology:
        """
        Args:
          name: such as `v5p:4x4x4`; for GPUs `h100:8`, the devices of one host, and slices are hosts.
        Raises:
          ValueError: an unknown generation or shape; the known ones are named.
        """
        generation, _, shape = name.strip().lower().partition(":")
        if generation not in CHIPS:
            near = difflib.get_close_matches(generation, CHIPS, n=1, cutoff=0.5)
            known = "; ".join(f"{g}:{s}" for g, c in CHIPS.items() for s in c.shapes[-3:-2] or c.shapes)
            raise ValueError(
                f"--topology {name}: no accelerator {generation!r}; "
                + (f"did you mean {near[0]}? " if near else "")
                + f"Known are {', '.join(CHIPS)}, written as {known}."
            )
        chip = CHIPS[generation]
        if not re.fullmatch(r"\d+(x\d+)*", shape) or not _possible(chip, shape):
            raise ValueError(
                f"--topology {name}: {chip.title} comes as {', '.join(f'{generation}:{s}' for s in chip.shapes)}."
            )
        if slices < 1:
            raise ValueError(f"--slices {slices}: set at least 1.")
        return cls(generation, tuple(int(n) for n in shape.split("x")), slices)

    def with_room(self, needed_bytes: float) -> Topology | None:
        """The smallest one of these chips that in all has the memory that a program needs on every device of this one.

        None if no published shape does; of GPUs it is a number of hosts. What every device holds whole does not shrink
        with their number, so this is a lower bound.
        """
        devices = self.devices * needed_bytes / (self.chip.hbm_gib * GIB)
        if self.chip.platform == "gpu":
            return dataclasses.replace(self, slices=math.ceil(devices / math.prod(self.shape)))
        known = (Topology.of(f"{self.generation}:{shape}", self.slices) for shape in self.chip.shapes)
        return min((t for t in known if t.devices >= devices), key=lambda t: t.devices, default=None)


def _possible(chip: Chip, shape: str) -> bool:
    """Published shapes, and three-dimensional ones of whole 4 x 4 x 4 cubes; the compiler has the last word."""
    sizes = [int(n) for n in shape.split("x")]
    cubes = len(sizes) == 3 and "x" in chip.shapes[0] and len(chip.shapes[0]) == 5
    return shape in chip.shapes or (cubes and all(n > 0 and n % 4 == 0 for n in sizes))
