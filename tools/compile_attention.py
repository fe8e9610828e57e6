"""Compiles attention, forward and backward, for accelerators that are not there, and says what memory it takes.

    jaxdistill plan CONFIG --make-environment gpu          # once; or tpu
    ENV=~/.cache/jaxdistill/plan-gpu/bin/python
    PYTHONPATH=. $ENV tools/compile_attention.py --topology h100:1 [--rows 4 --tokens 8192 --heads 16,8,128]
    PYTHONPATH=. ~/.cache/jaxdistill/plan-tpu/bin/python tools/compile_attention.py --topology v6e:2x2

It runs on a machine with a CPU alone: libtpu and the CUDA plugin hold the compilers. For each kernel and mesh it
compiles the gradient of one layer's attention under the remat policy that keeps what attention gave, and prints the
compiler's count of temporary bytes a device, the array with the most elements, and how many kernels of attention the
program calls, by name. One program serves any number of segments. The exit code is 0 exactly if all compiled, none
holds an array of one head's T x T scores, and none calls a forward kernel twice.

For GPUs, it then counts the blocks of tokens that the kernels in Triton visit, for rows of so many segments of random
lengths, against a whole row. Those kernels and the TPU's are compiled to the end; calls of cuDNN stay calls, and the
workspace that it asks for is known only on a GPU.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import sys
from typing import Any

# read when JAX is imported: the host's own devices stay out of it, and no metadata server is asked
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.models.attention import attention, keep_attention
from jaxdistill.models.attention.tiles import make_tiles
from jaxdistill.models.attention.triton import sizes_of
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.plan.gpus import GPUS, pretend_cuda, target_config

GIB = 2**30
KERNELS = {
    r'__gpu\$xla\.gpu\.triton".*?\b(attention_\w+)\)*/pallas_call': None,
    r'__cudnn\$fmhaSoftmax"': "cudnn_forward",
    r'__cudnn\$fmhaSoftmaxBackward"': "cudnn_backward",
    r"%(splash_mha_(?:fwd|dkv|dq))[\w.]* = .*?tpu_custom_call": None,
}


def devices_of(name: str) -> list[Any]:
    """Of h100:4 or v6e:2x2."""
    chip, _, shape = name.partition(":")
    if chip not in GPUS:
        return list(topologies.get_topology_desc(name, "tpu").devices)
    pretend_cuda(chip)
    target = target_config(chip)
    return list(topologies.get_topology_desc("gpus", "cuda", target_config=target, topology=f"1x1x{shape}").devices)


def compile_one(kernel: str, mesh: Mesh, arguments: argparse.Namespace) -> Any:
    """The compiled gradient of a sum of squares; the rows are each device's, or its group's."""
    T, (H, K, D) = arguments.tokens, arguments.heads
    B = arguments.rows * mesh.shape["data"] * mesh.shape["fsdp"]
    rows = ("data", "fsdp")

    def shape(*sizes: int, dtype: Any = jnp.bfloat16, axes: tuple = ()) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec(rows, "context", *axes)))

    def loss(q, k, v, segment_ids):
        def attend(q, k, v):
            return attention(
                q, k, v, segment_ids, scale=D**-0.5, window=arguments.window, dtype=q.dtype, out_dtype=q.dtype,
                mesh=mesh, kernel=kernel, max_segments=arguments.max_segments,
            )  # fmt: skip

        out = jax.checkpoint(attend, policy=keep_attention)(q, k, v).astype(jnp.float32)
        return jnp.sum(out * out)

    q, k = shape(B, T, H, D, axes=("tensor", None)), shape(B, T, K, D, axes=("tensor", None))
    # JAX 0.11 and later find out there which GPU is meant
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, shape(B, T, dtype=jnp.int32))
    return lowered.compile()


def largest_array(program: str) -> tuple[int, str]:
    """(elements, shape) of the largest array in a compiled program's text, tuples and fusions included."""
    shapes = set(re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[[\d,]+\]", program))
    return max((math.prod(int(n) for n in re.findall(r"\d+", s.split("[")[1])), s) for s in shapes)


def calls_of(program: str) -> dict[str, int]:
    """How often each kernel of attention is called."""
    found: collections.Counter[str] = collections.Counter()
    for pattern, name in KERNELS.items():
        found.update(name or match for match in re.findall(pattern, program))
    return dict(found)


def print_work(tokens: int, head_dim: int) -> None:
    """Pairs of tokens in the blocks that each kernel visits, for a row of 1 to 100 segments."""
    rng = np.random.default_rng(0)
    whole: dict[str, int] = {}
    for count in (1, 6, 31, 40, 100):
        cuts = np.sort(rng.choice(np.arange(1, tokens), count - 1, replace=False))
        ids = jnp.asarray(np.searchsorted(cuts, np.arange(tokens), side="right")[None] + 1, jnp.int32)
        lengths = np.diff([0, *cuts, tokens])
        parts = [f"{count:4} segments, {sum(lengths * (lengths + 1)) // 2:>10,} pairs; pairs in visited blocks"]
        for name, tile in sizes_of(head_dim, roomy=True)._asdict().items():
            bounds = np.asarray(make_tiles(ids, ids, 0, None, tile.Q, tile.C).of_queries)
            work = int((bounds[..., 3] - bounds[..., 0]).sum()) * tile.Q * tile.C
            parts.append(f"{name} {work:>10,} ({work / whole.setdefault(name, work):6.1%} of the whole row)")
        print(", ".join(parts), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", action="append", required=True, help="as h100:1, v5p:2x2x1 or v6e:2x2")
    parser.add_argument("--kernels", default="auto,blocks")
    parser.add_argument("--meshes", default="fsdp=-1", help="axis sizes, as context=2,fsdp=-1;tensor=-1")
    parser.add_argument("--rows", type=int, default=1, help="of each device")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", default="16,8,128", help="query heads, key heads, head size")
    parser.add_argument("--window", type=int)
    parser.add_argument("--max-segments", type=int, default=32, help="that cuDNN is set up for")
    arguments = parser.parse_args()
    arguments.heads = tuple(int(n) for n in arguments.heads.split(","))
    return arguments


def report(kernel: str, mesh: Mesh, arguments: argparse.Namespace) -> bool:
    """Prints one line; whether all is well."""
    T, title = arguments.tokens, f"{mesh.devices.flat[0].device_kind} {dict(mesh.shape)} {kernel} T={arguments.tokens}"
    try:
        compiled = compile_one(kernel, mesh, arguments)
    except Exception as error:
        # one that the compiler refuses is a finding, and no reason not to try the next
        print(f"{title} FAILED {type(error).__name__}: {str(error)[:400]}", flush=True)
        return False
    memory, program = compiled.memory_analysis(), compiled.as_text()
    (elements, shape), calls = largest_array(program), calls_of(program)
    scores = arguments.rows * T * T
    forward = sum(n for name, n in calls.items() if name.endswith(("forward", "fwd")))
    print(
        f"{title}: temporary {memory.temp_size_in_bytes / GIB:.3f} GiB, arguments and results "
        f"{(memory.argument_size_in_bytes + memory.output_size_in_bytes) / GIB:.3f} GiB, largest array {shape} "
        f"({'below' if elements < scores else 'NOT BELOW'} T x T of one head), kernels {calls}",
        flush=True,
    )
    return elements < scores and forward <= 1


def main() -> int:
    arguments = parse()
    good = True
    for name in arguments.topology:
        devices = devices_of(name)
        for axes in arguments.meshes.split(";"):
            sizes = {axis: int(size) for axis, size in (part.split("=") for part in axes.split(","))}
            mesh = make_mesh(sizes, devices)
            for kernel in arguments.kernels.split(","):
                good &= report(kernel, mesh, arguments)
        if name.partition(":")[0] in GPUS:
            print_work(arguments.tokens, arguments.heads[2])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
