"""Compiles attention, forward and backward, for accelerators that are not there, and says what memory it takes.

    python -m venv /tmp/tpu && /tmp/tpu/bin/pip install "jax[tpu]==0.10.2" -e .
    /tmp/tpu/bin/python tools/compile_attention.py --topology v5p:2x2x1 --topology v6e:2x2 [--tokens 32768]

    python -m venv /tmp/gpu && /tmp/gpu/bin/pip install "jax[cuda13]==0.10.2" -e .
    /tmp/gpu/bin/python tools/compile_attention.py --gpu-target h100.txtpb --topology 1x1x4

It runs on a machine with a CPU alone: libtpu and the CUDA plugin hold the compilers. TPU and CUDA builds of JAX want
environments of their own. A GPU is described by a text protocol buffer of XLA's (`GpuTargetConfigProto`; XLA's sources
hold examples under `xla/backends/gpu/target_config/specs`). The shape is that of Qwen2.5-7B, in bf16. For each kernel
and mesh it prints the compiler's own count of temporary bytes a device, and the array with the most elements in the
compiled program. The exit code is 0 exactly if all compiled and none holds an array of T x T elements or more.

For TPUs the Pallas kernels are compiled too. For GPUs, calls of cuDNN stay calls: whether cuDNN takes them, and the
workspace that it asks for, is known only on a GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

# read when JAX is imported: the host's own devices stay out of it, and no metadata server is asked
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.models.attention import attention
from jaxdistill.parallel.mesh import make_mesh

GIB = 2**30


def pretend_cuda(version: int = 91000, capability: str = "9.0") -> None:
    """Has JAX's checks for cuDNN answer for the target instead of this machine."""
    import importlib

    private: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    private.check_cudnn_version = lambda: version
    private.check_compute_capability = lambda least: capability >= least
    private.is_cuda_compute_capability_equal = lambda wanted: capability == wanted


def compile_one(kernel: str, mesh: Mesh, T: int, heads: tuple[int, int, int], window: int | None) -> Any:
    """The compiled gradient of a sum of squares; each device holds a whole row, or its share of one."""
    H, K, D = heads
    B = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = ("data", "fsdp")

    def shape(*sizes: int, dtype: Any = jnp.bfloat16, axes: tuple = ()) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec(rows, "context", *axes)))

    def loss(q, k, v, segment_ids):
        out = attention(
            q, k, v, segment_ids, scale=D**-0.5, window=window, dtype=jnp.bfloat16, mesh=mesh, kernel=kernel
        )
        return jnp.sum(out * out)

    q, k = shape(B, T, H, D, axes=("tensor", None)), shape(B, T, K, D, axes=("tensor", None))
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, shape(B, T, dtype=jnp.int32)).compile()


def largest_array(program: str) -> tuple[int, str]:
    """(elements, shape) of the largest array in a compiled program's text, tuples and fusions included."""
    shapes = set(re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[[\d,]+\]", program))
    return max((math.prod(int(n) for n in re.findall(r"\d+", s.split("[")[1])), s) for s in shapes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", action="append", required=True, help="as v5p:2x2x1 or v6e:2x2; of GPUs: 1x1x4")
    parser.add_argument("--gpu-target", type=Path, help="the description of a GPU; without it, TPUs are meant")
    parser.add_argument("--kernels", default="auto,blocks")
    parser.add_argument("--meshes", default="fsdp=-1;context=-1", help="axis sizes, as context=2,fsdp=-1;tensor=-1")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", default="28,4,128", help="query heads, key heads, head size")
    parser.add_argument("--window", type=int)
    arguments = parser.parse_args()
    T, heads = arguments.tokens, tuple(int(n) for n in arguments.heads.split(","))
    good = True
    for name in arguments.topology:
        if arguments.gpu_target:
            pretend_cuda()
            target = arguments.gpu_target.read_text()
            topology = topologies.get_topology_desc("gpus", "cuda", target_config=target, topology=name)
        else:
            topology = topologies.get_topology_desc(name, "tpu")
        for axes in arguments.meshes.split(";"):
            sizes = {axis: int(size) for axis, size in (part.split("=") for part in axes.split(","))}
            mesh = make_mesh(sizes, list(topology.devices))
            for kernel in arguments.kernels.split(","):
                title = f"{topology.devices[0].device_kind:12} {len(topology.devices)} x {axes:22} {kernel:7} T={T}"
                try:
                    compiled = compile_one(kernel, mesh, T, heads, arguments.window)
                except Exception as error:
                    # one that the compiler refuses is a finding, and no reason not to try the next
                    print(f"{title} FAILED {type(error).__name__}: {str(error)[:400]}", flush=True)
                    good = False
                    continue
                memory, program = compiled.memory_analysis(), compiled.as_text()
                elements, shape = largest_array(program)
                good &= elements < T * T
                verdict = "below T x T" if elements < T * T else "T x T OR MORE"
                calls = len(re.findall(r"tpu_custom_call|__cudnn\$fmha\w*\"", program))
                print(
                    f"{title} temporary {memory.temp_size_in_bytes / GIB:.2f} GiB, "
                    f"arguments {memory.argument_size_in_bytes / GIB:.2f} GiB, largest array {shape}, {verdict}, "
                    f"{calls} kernel calls",
                    flush=True,
                )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
