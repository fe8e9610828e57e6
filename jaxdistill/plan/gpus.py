"""Descriptions of NVIDIA GPUs, as XLA's compiler takes them where none is at hand (`GpuTargetConfigProto`, as text).

Source of the format and of the rates by type: XLA's own descriptions, `xla/backends/gpu/target_config/specs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

CUDNN = (9, 10, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What distinguishes one GPU from another."""

    name: str
    capability: int
    """Major; the minor is 0 for all of these."""
    cores: int
    clock_ghz: float
    matrix_clock_ghz: float
    matrix_rates: tuple[int, int, int]
    """Operations a clock of one matrix unit on 8-bit, 16-bit and tf32 numbers."""
    memory_bytes: int
    memory_bytes_per_second: int
    l2_bytes: int


GPUS: Mapping[str, Gpu] = {
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3", capability=9, cores=132, clock_ghz=1.98, matrix_clock_ghz=1.83,
        matrix_rates=(1024, 512, 256), memory_bytes=84_942_979_072, memory_bytes_per_second=3_352_320_000_000,
        l2_bytes=50 << 20,
    ),
    "h200": Gpu(
        name="NVIDIA H200", capability=9, cores=132, clock_ghz=1.98, matrix_clock_ghz=1.83,
        matrix_rates=(1024, 512, 256), memory_bytes=150_110_011_392, memory_bytes_per_second=4_800_000_000_000,
        l2_bytes=50 << 20,
    ),
    "b200": Gpu(
        name="NVIDIA B200", capability=10, cores=148, clock_ghz=1.965, matrix_clock_ghz=1.965,
        matrix_rates=(2048, 1024, 512), memory_bytes=191_000_000_000, memory_bytes_per_second=7_672_000_000_000,
        l2_bytes=126 << 20,
    ),
}  # fmt: skip

# XLA's numbers of its types: 8-bit, 16-bit and tf32 on matrix units; the same and others elsewhere
_MATRIX_TYPES = ((2, 6, 19, 20, 23, 24, 25, 28, 29, 33), (10, 16), (11,))
_SCALAR_RATES = {4: (64, 1), 8: (64, 1), 12: (64, 1), 10: (128, 2), 16: (128, 2), 11: (128, 1)}


def target_config(generation: str) -> str:
    """The text protocol buffer for one of `GPUS`."""
    gpu = GPUS[generation]
    scalar = "".join(_rate(key, gpu.clock_ghz, units, ops) for key, (units, ops) in _SCALAR_RATES.items())
    matrix = "".join(
        _rate(key, gpu.matrix_clock_ghz, 4, ops)
        for keys, ops in zip(_MATRIX_TYPES, gpu.matrix_rates, strict=True)
        for key in keys
    )
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: {gpu.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {gpu.memory_bytes_per_second} l2_cache_size: {gpu.l2_bytes} clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {gpu.capability} feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  scalar_unit_description {{ {scalar} }}
  matrix_unit_description {{ {matrix} }}
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {gpu.capability}.0a"
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true name: "{gpu.name}"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "{".".join(map(str, CUDNN))}"
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
device_description_str: "{gpu.name}"
"""


def _rate(key: int, clock: float, units: int, ops: int) -> str:
    return (
        f"rate_infos {{ key: {key} value {{ clock_rate_ghz: {clock} units_per_core: {units} ops_per_clock: {ops} }} }} "
    )


def pretend_cuda(generation: str) -> None:
    """Has JAX's checks for cuDNN answer for the described GPU instead of for this machine."""
    import importlib
    from typing import Any

    capability = f"{GPUS[generation].capability}.0"
    major, minor, patch = CUDNN
    private: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    private.check_cudnn_version = lambda: major * 10000 + minor * 100 + patch
    private.check_compute_capability = lambda least: float(capability) >= float(least)
    private.is_cuda_compute_capability_equal = lambda wanted: capability == wanted
