"""The programs whose numbers are promised in fp32, compiled for a topology, and what their matrix products ask for.

    python -m tests.fp32_programs h100:1     prints as JSON what each compiled program's products are

Accelerators' compilers have environments of their own (`jaxdistill.plan.environments`), whose interpreters run this.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOKENS, ROWS = 256, 8
SHAPE = {
    "model_type": "qwen3", "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
UNASKED = "a product that asks for nothing"
"""A program that shows what is read where the default precision is taken."""


def programs(topology: str, dtype: str) -> dict[str, Any]:
    """Name -> what `jax.jit(...).trace(...)` gives, for a topology (`cpu:1`: this machine)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxdistill.config import build
    from jaxdistill.generate import rows
    from jaxdistill.models import params_of, with_params
    from jaxdistill.models.attention.cached import KV
    from jaxdistill.models.layerwise import How, _layer, _logits
    from jaxdistill.plan.request import make_job
    from jaxdistill.plan.targets import Topology
    from jaxdistill.plan.worker import make_described
    from jaxdistill.traces.jax_scoring import _compiled
    from jaxdistill.train.program import abstract_inputs

    folder = tempfile.mkdtemp()
    Path(folder, "config.json").write_text(json.dumps(SHAPE))
    config = build({
        "name": "p", "run_dir": "runs/absent", "problems": {"source": "demo", "count": 8},
        "traces": {"engine": "vllm", "teacher": "demo", "max_tokens": 96}, "data": {"row_tokens": TOKENS},
        "student": {"init": folder},
        "train": {"batch_rows": ROWS, "steps": 10, "remat": "full", "compute_dtype": dtype, "mesh": {"fsdp": -1},
                  "optimizer": {"name": "muon", "learning_rate": 1e-4}},  # with products of its own, in optax
    })  # fmt: skip
    target = Topology.of(topology)
    made, dtypes = make_described(make_job(config, target), target)
    state, batch, frozen, teacher = abstract_inputs(made, **dtypes)
    model, params = made.model, state["params"]

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    whole = with_params(model, params)
    graph, abstract = nnx.split(whole)
    layers, projection = jax.eval_shape(functools.partial(rows._lay_out, graph, False), abstract)
    weights = rows.Weights(abstract, layers, projection)
    cache = [jax.eval_shape(lambda: KV.empty(ROWS, 2, 128, 128, model.dtype))] * 2
    kind = rows.Kind(greedy=True, top_k=False, nucleus=False)
    numbers = rows.Numbers(np.float32(0), np.int32(0), np.float32(1), np.zeros(1, np.int32))
    seeds, done = [jax.ShapeDtypeStruct((ROWS,), jnp.uint32)] * 2, jax.ShapeDtypeStruct((ROWS,), bool)
    flags = rows.State(*[ints(ROWS)] * 4, *seeds, done)
    places = [ints(256)] * 3
    matrix = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=NamedSharding(made.mesh, PartitionSpec()))
    check, stack = How(made.student, mesh=made.mesh), params_of(whole)["layers"]
    kept = jax.ShapeDtypeStruct((2, 64, SHAPE["hidden_size"]), jnp.float32)
    return {
        "check": _layer.trace(check, made.student.kinds[0], kept, stack, 0),
        "check's logits": _logits.trace(check, kept, params["norm"], params["embed"]),
        "forward": jax.jit(lambda p, ids: with_params(model, p)(ids)).trace(params_of(whole), ints(ROWS, TOKENS)),
        "train step": made.step.trace(state, batch, frozen, teacher),
        "prefill": rows.programs().prefill.trace(graph, False, weights, ints(ROWS, 32), ints(ROWS)),
        "decoding": rows.programs().chunk.trace(graph, kind, False, weights, cache, flags, numbers),
        UNASKED: jax.jit(lambda a, b: a @ b).trace(matrix, matrix),
        "scoring": _compiled(model, 4, 1000, False, 1.0).trace(params_of(whole), ints(ROWS, 64), *places),
    }


# ------------------------------------------------------------------------------------------------ what is asked for


def traced_products(jaxpr: Any) -> Iterator[tuple[str, str, Any]]:
    """(dtype of the left side, of the right side, precision) of every product, those inside of kernels too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
            yield *(str(v.aval.dtype) for v in eqn.invars[:2]), eqn.params["precision"]
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from traced_products(inner)


def compiled_products(text: str) -> Iterator[tuple[str, str]]:
    """(dtypes of both sides, precision as it is written; empty if none is) of every product of an optimized program."""
    from jaxdistill.plan.hlo import parse
    from jaxdistill.plan.products import MATRIX_CALLS

    for ops in parse(text)[0].values():
        for op in ops.values():
            target = op.attribute(r'custom_call_target="([^"]*)"') or ""
            if op.opcode not in ("dot", "convolution") and target not in MATRIX_CALLS:
                continue
            sides = " ".join(re.match(r"\w+", ops[name].type)[0] for name in op.operands[:2])
            written = op.attribute(r"operand_precision=\{([^}]*)\}")
            called = op.attribute(r'"operand_precision":\[([^\]]*)\]')
            yield sides, (written or called or "").replace('"', "").replace(" ", "").lower()


def compile_text(traced: Any) -> str:
    return traced.lower().compile().as_text()


def main(topology: str) -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    said = {
        name: [[*found, count] for found, count in Counter(compiled_products(compile_text(traced))).items()]
        for name, traced in programs(topology, "float32").items()
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
