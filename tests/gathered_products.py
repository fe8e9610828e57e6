"""A product with a matrix that devices share, compiled for a topology, and the collectives in its gradients.

python -m tests.gathered_products v6e:2x4 options     prints as JSON how many there are of each kind and dtype
python -m tests.gathered_products v6e:2x4             likewise, with XLA's own choices instead of the step's options
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter

KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"


def compiled(topology: str, options: bool) -> str:
    """The optimized program of the gradients by both sides of a product."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxdistill.models.attention import platform_of
    from jaxdistill.models.layers import matmul
    from jaxdistill.parallel import mesh as meshes
    from jaxdistill.parallel.options import step_options
    from jaxdistill.plan.targets import Topology
    from jaxdistill.plan.worker import described_devices

    mesh = meshes.make_mesh({"fsdp": -1}, described_devices(Topology.of(topology)))
    shardings = meshes.weight_shardings(mesh, ("embed", "mlp"))
    assert shardings is not None

    def gradients(x, w, g):
        y, backward = jax.vjp(lambda x, w: matmul(x, w, jnp.bfloat16, jnp.bfloat16, shardings), x, w)
        return y, backward(g)

    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, None))
    x = jax.ShapeDtypeStruct((mesh.size, 8192, 2048), jnp.bfloat16, sharding=rows)
    w = jax.ShapeDtypeStruct((2048, 2048), jnp.float32, sharding=shardings.stored)
    chosen = step_options(platform_of(mesh), device_kind=mesh.devices.flat[0].device_kind) if options else None
    return jax.jit(gradients, compiler_options=chosen).lower(x, w, x).compile().as_text()


def collectives(text: str) -> Counter[str]:
    """`all-gather bf16` and so on -> how many, as they stand in the program; one that waits for an answer is two."""
    found = re.findall(rf"= \(?(\w+)\[[^=]* ({KINDS})(?:-start)?\(", text)
    return Counter(f"{kind} {dtype}" for dtype, kind in found)


if __name__ == "__main__":
    # read when JAX is imported: this machine's own devices stay out of it
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    print(json.dumps(collectives(compiled(sys.argv[1], "options" in sys.argv[2:]))))
