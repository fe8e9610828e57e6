"""A token step of decoding, compiled for a GPU that is not here: its kernels, the bytes they move, and a model of time.

    python tools/compile_decode.py                             Qwen3-0.6B, 64 rows, caches of 384 slots, h100:1
    python tools/compile_decode.py --general                   the step for GPUs without Pallas' kernels
    python tools/compile_decode.py --kind sample --rows 8 --model Qwen3-8B --each

The compiler's environment is `plan`'s (`jaxdistill plan CONFIG --make-environment gpu`), on a CPU machine. Printed are
the kernels that one token step starts and the bytes of memory that they read and write, by kind; of attention's kernel
the bytes of slots that hold a token (--tokens a row), which are all that it reads. What the compiler would choose by
timing on the GPU, tiles of its own products, stays at its default here: it moves the same bytes.

The model of time, which is UNMEASURED: a kernel takes --kernel-us and its bytes at --tb-per-s. The two numbers give the
3.3 ms a step that were measured on an H200 under JAX 0.11.2 for an earlier step of 714 kernels and 5.5 GB, as if all of
that time had gone into kernels: some of it was prefill and the host's.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"greedy": (True, False, False), "sample": (False, False, False), "nucleus": (False, False, True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-0.6B", help="a published student (%(default)s)")
    parser.add_argument("--layers", type=int, help="fewer layers than it has")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--slots", type=int, default=384, help="of the caches (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="in a row's cache, on average (%(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="greedy", help="how tokens are drawn (%(default)s)")
    parser.add_argument("--general", action="store_true", help="without Pallas' kernels")
    parser.add_argument("--topology", default="h100:1")
    parser.add_argument("--each", action="store_true", help="print every kernel")
    parser.add_argument("--kernel-us", type=float, default=2.4, help="of one kernel, beside its bytes (%(default)s)")
    parser.add_argument("--tb-per-s", type=float, default=3.5, help="of memory (%(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if not arguments.child:
        from jaxdistill.plan import environments

        command = [str(environments.make("gpu")), __file__, "--child", *sys.argv[1:]]
        return subprocess.run(command, env=environments.variables()).returncode
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    report(arguments, compiled_text(arguments))
    return 0


def compiled_text(arguments: argparse.Namespace) -> str:
    """The optimized program of a chunk of token steps."""
    import contextlib

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxdistill.generate import fused, rows
    from jaxdistill.models import ModelConfig, abstract_model, published
    from jaxdistill.parallel.mesh import make_mesh
    from jaxdistill.plan.targets import Topology
    from jaxdistill.plan.worker import described_devices

    tables = [v for k, v in vars(published).items() if isinstance(v, dict) and not k.startswith("_")]
    known = {k: v[0] for table in tables for k, v in table.items() if isinstance(v, tuple)}
    if arguments.model not in known:
        raise SystemExit(f"--model {arguments.model} is not a published student; known are {', '.join(known)}.")
    shape = known[arguments.model]
    if arguments.layers:
        shape = shape | {"num_hidden_layers": arguments.layers, "layer_types": None}
    config = ModelConfig.from_hf(shape, arguments.model)
    mesh = make_mesh({}, described_devices(Topology.of(arguments.topology, 1)))
    model = abstract_model(config, dtype="bfloat16", mesh=mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(tree: Any, dtype: Any = None) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=whole), tree)

    use = not arguments.general
    why = fused.why_not(config, model.dtype, mesh, adapters=False)
    if use and why:
        raise SystemExit(f"{arguments.model}: the fused step cannot decode it: {why}; see --general.")
    graph, state = nnx.split(model)
    state = placed(state, jnp.bfloat16)
    weights = rows.Weights(state, *placed(jax.eval_shape(lambda s: rows._lay_out(graph, use, s), state)))
    cache, rows_state = jax.eval_shape(lambda: rows._empty(mesh, config, model.dtype, arguments.rows, arguments.slots))
    numbers = rows.Sampler(temperature=1.0, top_k=0, top_p=0.9, stop_ids=(1, 2)).numbers
    numbers = placed(jax.tree.map(np.asarray, numbers))
    # since JAX 0.11 Pallas asks the mesh what it compiles for
    described = getattr(jax.sharding, "use_abstract_mesh", None)
    with described(mesh.abstract_mesh) if described else contextlib.nullcontext():
        kind = rows.Kind(*KINDS[arguments.kind])
        lowered = rows.programs().chunk.lower(graph, kind, use, weights, placed(cache), placed(rows_state), numbers)
    text = lowered.compile().as_text()
    assert text is not None
    return text


def report(arguments: argparse.Namespace, text: str) -> None:
    """Prints the kernels of the loop over tokens, and those around it."""
    from jaxdistill.plan.hlo import array_bytes, parse
    from jaxdistill.plan.moved import _FREE, category_of, moved_bytes

    computations, entry = parse(text)
    loop = next(op for op in computations[entry].values() if op.opcode == "while")
    body = computations[loop.attribute(r"body=%?([\w.\-]+)") or ""]

    def kernels(ops: Any) -> list[tuple[str, float, str]]:
        found = []
        for op in ops.values():
            if op.opcode in _FREE or op.opcode.endswith("-done"):
                continue
            scope = op.scope.rstrip("/").removesuffix("/pallas_call").split("/")[-1]
            kind, size = category_of(op, computations), moved_bytes(op, ops, computations)
            if scope == "append_and_attend":
                # it reads the slots that are filled, and writes one
                caches = sum(array_bytes(op.type)[1:])
                size, kind = size - (2 - arguments.tokens / arguments.slots) * caches, "attention"
            elif scope == "product":
                kind = "products"
            found.append((kind, size, f"{op.name} {op.type.split('{')[0]} {scope}"))
        return found

    inside, outside = kernels(body), kernels(computations[entry])
    if arguments.each:
        for kind, size, name in inside:
            print(f"  {kind:<12}{size / 1e6:>10.3f} MB  {name}")
    step = "general" if arguments.general else "fused"
    print(f"{arguments.model}, {arguments.rows} rows, {arguments.slots} slots, {arguments.kind}, the {step} step")
    counts, sizes = collections.Counter(), collections.Counter()
    for kind, size, _ in inside:
        counts[kind] += 1
        sizes[kind] += size
    for kind, count in counts.most_common():
        print(f"  {kind:<12}{count:>6} kernels{sizes[kind] / 1e6:>12,.1f} MB")
    total, moved = sum(counts.values()), sum(sizes.values())
    print(f"  a token step{total:>6} kernels{moved / 1e6:>12,.1f} MB")
    print(f"  around the {16} steps of a chunk: {len(outside)} kernels, {sum(s for _, s, _ in outside) / 1e6:,.1f} MB")
    seconds = total * arguments.kernel_us * 1e-6 + moved / (arguments.tb_per_s * 1e12)
    print(
        f"  modelled, unmeasured: {1e3 * seconds:.2f} ms a step, {arguments.rows / seconds:,.0f} tokens/s "
        f"({arguments.kernel_us} us a kernel, {arguments.tb_per_s} TB/s)"
    )


if __name__ == "__main__":
    sys.exit(main())
