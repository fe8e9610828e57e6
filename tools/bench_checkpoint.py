"""How long a background save holds up training: a state of about 100M parameters with AdamW's moments.

    python tools/bench_checkpoint.py [--parameters 100e6] [--saves 3] [--folder FOLDER]

Prints for each save: its size, how long `save` blocked the caller, how long until everything was on disk, and their
ratio. A simulated step (a matrix product) runs meanwhile, so that the writer shares the machine with a training.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxdistill.train.checkpoint import Checkpoints


def make_state(parameters: int) -> dict:
    """Parameters of `parameters` fp32 numbers in 24 matrices, and two moments of the same shapes."""
    width = math.isqrt(parameters // 24)
    keys = jax.random.split(jax.random.key(0), 24)
    params = {f"w{i}": jax.random.normal(key, (width, width)) for i, key in enumerate(keys)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {"params": params, "mu": zeros, "nu": jax.tree.map(lambda x: x * x, params)}


@jax.jit
def busy(x: jax.Array) -> jax.Array:
    return x @ x / jnp.linalg.norm(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=lambda text: int(float(text)), default=100_000_000)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="a new folder on the disk to be measured; temporary if absent")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0.999, state), donate_argnums=0)
    state = jax.block_until_ready(step(make_state(arguments.parameters)))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    x = busy(jax.random.normal(jax.random.key(1), (1024, 1024)))
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, identity={})
    for save in range(arguments.saves):
        begun = time.monotonic()
        checkpoints.save(save, state, progress={})
        blocked = time.monotonic() - begun
        state, busy_steps = step(state), 0
        while checkpoints.saving():
            x = jax.block_until_ready(busy(x))
            busy_steps += 1
        checkpoints.settle()
        took = time.monotonic() - begun
        print(
            f"save {save}: {size / 1e9:.2f} GB, blocked {blocked:.3f} s of {took:.2f} s ({blocked / took:.1%}); "
            f"{busy_steps} busy steps meanwhile",
            flush=True,
        )
        jax.block_until_ready(state)
    checkpoints.close()
    shutil.rmtree(folder / "checkpoints")


if __name__ == "__main__":
    main()
