"""Compile time of the train step by depth: layers are stacked and scanned, so that it hardly grows.

    python tools/bench_compile.py                        2 and 48 layers of a Qwen3 shape, forward, backward and AdamW
    python tools/bench_compile.py --layers 2 80 --unscanned     beside the same model with every layer written out

Nothing is computed: the step is lowered and compiled from shapes alone, each depth in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 48], metavar=("FEW", "MANY"))
    parser.add_argument("--unscanned", action="store_true", help="also compile the many layers without a scan")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return 0
    few, many = arguments.layers
    cases = [(few, 0), (many, 0)] + ([(many, 1)] if arguments.unscanned else [])
    seconds = {case: sorted(_child(*case) for _ in range(REPEATS))[REPEATS // 2] for case in cases}
    for (layers, unrolled), took in seconds.items():
        print(
            f"{layers:>3} layers{', written out' if unrolled else ', scanned':<14}{took:7.1f} s (median of {REPEATS})"
        )
    print(f"{many} layers take {seconds[many, 0] / seconds[few, 0]:.2f} x the time of {few}")
    return 0


def _child(layers: int, unrolled: int) -> float:
    call = [sys.executable, str(Path(__file__)), "--child", str(layers), str(unrolled)]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(layers: int, unrolled: int) -> float:
    """Seconds to trace, lower and compile one train step of a model with so many layers."""
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp

    from jaxdistill.config import OptimizerConfig
    from jaxdistill.models import ModelConfig, abstract_model, decoder, params_of
    from jaxdistill.parallel.mesh import make_mesh
    from jaxdistill.train.optimizer import make_optimizer
    from jaxdistill.train.step import make_step, state_shapes, state_shardings

    # a few layers are unrolled otherwise, which would compare two different programs
    decoder.UNROLLED = layers if unrolled else 0
    config = ModelConfig.from_hf(
        {
            "model_type": "qwen3",
            "vocab_size": 32000,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
        }
    )
    mesh = make_mesh({"fsdp": -1})
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-4), 100)
    shardings = state_shardings(config, optimizer, mesh)
    model = abstract_model(config, dtype="bfloat16", remat="attention", mesh=mesh)
    step = make_step(model, optimizer, shardings, region_weights=(1.0, 1.0), micro_batches=1)
    state = state_shapes(params_of(model), optimizer)
    names = ("tokens", "regions", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct((8, 1024), jnp.int32) for name in names}
    begun = time.monotonic()
    step.lower(state, batch).compile()
    return time.monotonic() - begun


if __name__ == "__main__":
    sys.exit(main())
