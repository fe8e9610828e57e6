"""Meshes over slices: which devices lie where, and what cannot be."""

import dataclasses

import jax
import pytest

from jaxdistill.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a TPU says of itself, as far as the layout of a mesh asks."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def two_slices():
    return [
        Chip(id=4 * s + i, slice_index=s, process_index=s, coords=(i % 2, i // 2, 0))
        for s in range(2)
        for i in range(4)
    ]


@pytest.mark.parametrize("shape", [{"data": 2}, {"data": 2, "slices": 2}, {"data": 4, "fsdp": 1, "tensor": 2}])
def test_only_the_data_axis_leaves_a_slice(shape):
    mesh = make_mesh({"fsdp": -1} | shape if "fsdp" not in shape else shape, two_slices())
    assert mesh.devices.shape == (
        shape["data"],
        8 // shape["data"] // shape.get("tensor", 1),
        shape.get("tensor", 1),
        1,
    )
    per_slice = shape["data"] // 2
    for row, devices in enumerate(mesh.devices):
        assert {d.slice_index for d in devices.flat} == {row // per_slice}


def test_slices_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match="data=1 does not divide over 2 slices"):
        make_mesh({"fsdp": -1}, two_slices())
    with pytest.raises(ValueError, match=r"train\.mesh\.slices=2, but the devices are of 1 processes"):
        make_mesh({"data": 2, "fsdp": -1, "slices": 2}, jax.devices())


def test_one_slice_is_an_ordinary_mesh():
    assert make_mesh({"data": 2, "fsdp": -1, "slices": 1}).devices.shape == (2, 4, 1, 1)
