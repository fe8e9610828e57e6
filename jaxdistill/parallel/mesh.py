"""The device mesh, and one table that says which tensor axis is split over which mesh axis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "sequence": "context",
    # parameters
    "layers": None,
    "vocab": "tensor",
    # over `context` too, whose devices would all hold the same otherwise; both are gathered where a weight is used
    "embed": ("fsdp", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "norm": None,
}


def make_mesh(shape: Mapping[str, int | None], devices: list[Any] | None = None) -> Mesh:
    """A mesh over `MESH_AXES`; one size may be -1, which takes the devices that remain.

    Args:
      shape: sizes by axis, and `slices`: groups of devices with a slower network between them, over which the axis
        `data` runs; if absent or None, TPUs say themselves which slice they belong to.
    Raises:
      ValueError: the sizes do not multiply out to the number of devices, or the slices do not divide `data`.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = [shape.get(axis) or 1 for axis in MESH_AXES]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh {dict(shape)}: only one axis may be -1.")
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    written = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
    if known <= 0 or len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"mesh {written} does not fit {len(devices)} devices; "
            f"the sizes must multiply out to {len(devices)} (-1 takes the rest)."
        )
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = shape.get("slices") or len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        from jax.experimental import mesh_utils

        # `jax.make_mesh` refuses sizes that cut across an axis of a TPU's torus, as fsdp=8, tensor=2 does on 4 x 4
        arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(arranged, MESH_AXES, axis_types=types)
    return Mesh(_over_slices(sizes, slices, devices), MESH_AXES, axis_types=types)


def _over_slices(sizes: list[int], slices: int, devices: list[Any]) -> np.ndarray:
    """Devices in the mesh's shape: the first axis over slices, everything else inside of one."""
    from jax.experimental import mesh_utils

    if sizes[0] % slices:
        raise ValueError(
            f"mesh data={sizes[0]} does not divide over {slices} slices; set train.mesh.data to a multiple of it, for "
            "the other axes need the fast links inside a slice."
        )
    named = {getattr(d, "slice_index", None) for d in devices}
    hosts = {d.process_index for d in devices}
    # where devices do not know of slices (GPUs, CPUs), hosts are what a slower network lies between
    by_host = None in named or len(named) != slices
    if by_host and len(hosts) != slices:
        raise ValueError(
            f"train.mesh.slices={slices}, but the devices are of {len(hosts)} processes and {len(named - {None})} "
            "slices; leave it out, or set it to one of these."
        )
    return mesh_utils.create_hybrid_device_mesh(
        [sizes[0] // slices, *sizes[1:]],
        [slices, 1, 1, 1],
        devices=devices,
        process_is_granule=by_host,
        allow_split_physical_axes=True,
    )


def sharding(
    mesh: Mesh,
    axes: tuple[str | None, ...],
    *,
    shape: tuple[int, ...] | None = None,
    name: str = "",
    rules: Mapping[str, Any] = RULES,
) -> NamedSharding:
    """Where an array with these logical axes lives.

    Args:
      axes: one logical name of `rules` (or None) a dimension.
      shape: if given, it is checked that the mesh divides it.
    Raises:
      ValueError: a dimension that its mesh axes do not divide; `name` says which array.
    """
    spec = PartitionSpec(*(rules[a] if a else None for a in axes))
    for size, axis, target in zip(shape or (), axes, spec, strict=bool(shape)):
        if size % ways(mesh, target):
            over = (target,) if isinstance(target, str) else target or ()
            written = ", ".join(f"{a}={mesh.shape[a]}" for a in over if mesh.shape[a] > 1)
            raise ValueError(
                f"{name}: axis {axis} of size {size} does not divide over {written} devices; choose a mesh that "
                "divides it."
            )
    return NamedSharding(mesh, spec)


def ways(mesh: Mesh | AbstractMesh, target: str | tuple[str, ...] | None) -> int:
    """Into how many parts an entry of a PartitionSpec splits an axis."""
    return math.prod(mesh.shape[axis] for axis in ((target,) if isinstance(target, str) else target or ()))


@dataclasses.dataclass(frozen=True)
class WeightShardings:
    """Where a layer's matrix lies between its uses, and while a product takes it: whole along the axes of FSDP."""

    stored: NamedSharding
    used: NamedSharding

    def gather(self, w: jax.Array) -> jax.Array:
        """The matrix as a product takes it. Round it to the products' dtype first: what is gathered is what is sent."""
        # both, or XLA may gather first and round after
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(w, self.stored), self.used)

    def scatter(self, dw: jax.Array) -> jax.Array:
        """The gradient by the matrix, which every device has of its own rows, summed to where the matrix is stored."""
        return jax.lax.with_sharding_constraint(dw, self.stored)


def weight_shardings(mesh: Mesh | None, axes: tuple[str | None, ...]) -> WeightShardings | None:
    """Of a matrix with these logical axes; None where there is nothing to gather, without a mesh or on one device."""
    if mesh is None or mesh.size == 1:
        return None
    return WeightShardings(sharding(mesh, axes), sharding(mesh, axes, rules={**RULES, "embed": None}))


def constrain(x: jax.Array, axes: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    """Keeps an activation sharded by its logical axes; does nothing without a mesh."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding(mesh, axes))
