"""Does training change when activations are bf16, as on GPUs and TPUs? Loss curves of one student, side by side.

    python tools/compare_activations.py [--steps 300] [--layer-parts 4]

The quickstart's student (0.57M parameters, from scratch) learns the demo task's worked solutions, with bf16 matrix
products each time: with activations in fp32 (as CPUs have them), in bf16, and in fp32 from another seed, which shows
how far two equally good runs lie apart. Same rows, same order. Any machine will do; on a CPU without units for bf16,
300 steps take some minutes. A line has the mean loss of 20 steps, in nats a token. The exit code is 0 if the last
line's bf16 loss is no further from the fp32 one than the other seed's, or than 1%.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from jaxdistill import hub
from jaxdistill.config import OptimizerConfig
from jaxdistill.data.examples import Example
from jaxdistill.data.packing import best_fit, fill_row
from jaxdistill.demo.task import make_problems
from jaxdistill.models import ModelConfig, abstract_model, init_model, params_of
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.tokenization import load_tokenizer
from jaxdistill.train.optimizer import make_optimizer
from jaxdistill.train.step import init_state, make_step, state_shardings

RECIPE = yaml.safe_load((Path(__file__).parent.parent / "configs" / "quickstart.yaml").read_text())
ROWS, ROW_TOKENS, WINDOW = 16, 136, 20
CONTENDERS = {"fp32": ("float32", 0), "bf16": ("bfloat16", 0), "fp32, other seed": ("float32", 1)}


def batches(steps: int) -> Iterator[dict[str, Any]]:
    """Packed rows of worked solutions, a new set for every step; the response alone is trained."""
    tokenizer = load_tokenizer(str(hub.demo_teacher()))
    examples = []
    for question, _, solution in make_problems(2 * steps * ROWS, seed=1):
        prompt, response = (tokenizer.encode(text, add_special_tokens=False) for text in (question + "\n", solution))
        ids = [*prompt, *response, tokenizer.eos_token_id]
        examples.append(Example(question, ids, [0] * len(prompt) + [2] * (len(response) + 1)))
    examples = [e for e in examples if len(e.tokens) <= ROW_TOKENS]
    rows = best_fit([len(e.tokens) for e in examples], ROW_TOKENS)
    for first in range(0, min(steps, len(rows) // ROWS) * ROWS, ROWS):
        some = rows[first : first + ROWS]
        filled = [fill_row([examples[i] for i in row], ROW_TOKENS) for row in some]
        yield {name: jnp.asarray(np.stack([row[name] for row in filled])) for name in filled[0]}


def losses(shape: ModelConfig, activations: str, seed: int, steps: int, parts: int) -> list[float]:
    """The loss of every step."""
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(**RECIPE["train"]["optimizer"]), steps)
    shardings = state_shardings(shape, optimizer, mesh)
    model = abstract_model(
        shape, dtype="bfloat16", activations=activations, mesh=mesh, remat="full" if parts > 1 else "none",
        layer_parts=parts,
    )  # fmt: skip
    step = make_step(model, optimizer, shardings, region_weights=(1.0, 1.0), micro_batches=1)
    state = init_state(params_of(init_model(shape, seed, mesh=mesh)), optimizer, shardings)
    found = []
    for batch in batches(steps):
        state, metrics = step(state, batch)
        found.append(metrics["loss"])
    return [float(x) for x in found]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layer-parts", type=int, default=4, metavar="N", help="of the bf16 one (%(default)s)")
    given = parser.parse_args(arguments)
    vocabulary = len(load_tokenizer(str(hub.demo_teacher())))
    shape = ModelConfig.from_hf(RECIPE["student"]["architecture"] | {"vocab_size": vocabulary})
    curves = {
        name: losses(shape, dtype, seed, given.steps, given.layer_parts if dtype == "bfloat16" else 1)
        for name, (dtype, seed) in CONTENDERS.items()
    }
    print(f"{'steps':>12}" + "".join(f"{name:>20}" for name in curves))
    window = min(WINDOW, given.steps)
    for end in range(window, given.steps + 1, window):
        means = [float(np.mean(curve[end - window : end])) for curve in curves.values()]
        print(f"{end - window + 1:>6} to {end:>3}" + "".join(f"{mean:>20.4f}" for mean in means), flush=True)
    wide, narrow, other = means
    return int(abs(narrow - wide) > max(abs(other - wide), 0.01 * wide))


if __name__ == "__main__":
    sys.exit(main())
