"""Products of a few rows with a large matrix, in one kernel each with what comes before and after them (Pallas, GPUs).

Dimension key: B rows, I inputs, O outputs.

A token step multiplies a few rows with every matrix of a model: the time is that of reading the matrices, and of
starting kernels. So a norm before the product, and the activation, bias and residual after it are done by the kernel
that multiplies. A program owns a block of outputs and walks along the inputs, always in the same order: a row's result
does not depend on the other rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxdistill.models.attention.pallas import kernel_call
from jaxdistill.models.layers import ACTIVATIONS

INPUTS = (128, 64, 32, 16)
"""Inputs that are multiplied at once: the first that divides all of them."""

OUTPUTS = (64, 32, 16)
"""Outputs of a program; likewise."""

PROGRAMS = 64
"""Programs that are wanted, at least: with fewer, the memory is not read at its full speed."""


SHARED_BYTES = {True: 225 * 1024, False: 97 * 1024}
"""For a program's tiles, on GPUs with 227 KiB of shared memory a block (`pallas.is_roomy`), and on those with 99."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut: rows, inputs and outputs of a program's step, warps, and steps that are loaded ahead."""

    rows: int
    inputs: int
    outputs: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int, inputs: int, outputs: int, matrices: int = 1, *, roomy: bool = True) -> Tiles | None:
        """None if no tile divides the matrix."""
        step = next((n for n in INPUTS if inputs % n == 0), None)
        width = next((n for n in OUTPUTS if outputs % n == 0), None)
        if step is None or width is None:
            return None
        height, warps = max(16, min(64, pl.next_power_of_2(rows))), 4
        if rows > 64 and outputs % 128 == 0:
            # more rows are bound by arithmetic: larger tiles use each number more often
            height, step, width, warps = 128, min(step, 64), 128, 8
        while height > 32 and outputs // width * -(-rows // height) < PROGRAMS:
            height //= 2
        while width > 32 and outputs // width * -(-rows // height) < PROGRAMS:
            width //= 2
        # bf16; the rows are held once more, normed
        free, ahead = SHARED_BYTES[roomy] - 2 * height * step, 2 * step * (height + matrices * width)
        return cls(height, step, width, warps, max(2, min(4, free // ahead + 1)))


def product(
    x_BI: Float[Array, "B I"],
    weights_IO: Sequence[Float[Array, "I O"]],
    *,
    scale_I: Float[Array, " I"] | None = None,
    eps: float = 0.0,
    bias_O: Float[Array, " O"] | None = None,
    activation: str | None = None,
    residual_BO: Float[Array, "B O"] | None = None,
    roomy: bool = True,
    interpret: bool = False,
) -> Float[Array, "B O"]:
    """rms_norm(x) @ w + bias + residual, or activation(rms_norm(x) @ gate) * (rms_norm(x) @ up); in x's dtype.

    Sums are fp32, and the result is rounded once. The norm's factor of a row multiplies the sums, not the inputs:
    x * scale is what is rounded to the weights' dtype before the product.

    Args:
      weights_IO: one matrix, or gate and up.
      scale_I: of the norm over the inputs, as it multiplies (not as its distance from 1); None: no norm.
      activation: one of `layers.ACTIVATIONS`, with two matrices.
      roomy: see `pallas.is_roomy`.
      interpret: runs it without a GPU, slowly.
    Raises:
      ValueError: no tile divides the matrix.
    """
    (B, I), O = x_BI.shape, weights_IO[0].shape[1]  # noqa: E741 (the dimension's name)
    assert (activation is not None) == (len(weights_IO) == 2)
    tiles = Tiles.of(B, I, O, len(weights_IO), roomy=roomy)
    if tiles is None:
        raise ValueError(f"no tile divides a matrix of {I} x {O}; both must be multiples of 16.")
    given = {"scale": scale_I, "bias": bias_O, "residual": residual_BO}
    named = {name: x for name, x in given.items() if x is not None}
    kernel = functools.partial(
        _kernel, names=("x", *named, *(f"weight_{i}" for i in range(len(weights_IO))), "out"), tiles=tiles, eps=eps,
        activation=activation,
    )  # fmt: skip
    call = kernel_call(
        kernel,
        [jax.ShapeDtypeStruct((B, O), x_BI.dtype)],
        # rows first: programs that read the same weights run at the same time
        grid=(pl.cdiv(B, tiles.rows), O // tiles.outputs),
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=interpret,
        name="product",
    )
    return call(x_BI, *named.values(), *weights_IO)[0]


def _kernel(*refs, names: tuple[str, ...], tiles: Tiles, eps: float, activation: str | None) -> None:
    at = dict(zip(names, refs, strict=True))
    weights = [at[name] for name in names if name.startswith("weight_")]
    (B, I), dtype = at["x"].shape, weights[0].dtype  # noqa: E741
    row, column = (pl.program_id(axis) for axis in (0, 1))
    rows, outputs = pl.ds(row * tiles.rows, tiles.rows), pl.ds(column * tiles.outputs, tiles.outputs)
    if B % tiles.rows:
        # what is beyond the last row repeats it
        rows = jnp.minimum(row * tiles.rows + jnp.arange(tiles.rows), B - 1)

    def along(i, carry):
        squares, *sums = carry
        inputs = pl.ds(i * tiles.inputs, tiles.inputs)
        x = at["x"][rows, inputs]
        if "scale" in at:
            wide = x.astype(jnp.float32)
            squares += jnp.sum(wide * wide, axis=1)
            x = wide * at["scale"][inputs][None]
        x = x.astype(dtype)
        return squares, *(
            total + jnp.dot(x, w[inputs, outputs], preferred_element_type=jnp.float32)
            for total, w in zip(sums, weights, strict=True)
        )

    zeros = jnp.zeros((tiles.rows, tiles.outputs), jnp.float32)
    start = (jnp.zeros((tiles.rows,), jnp.float32), *(zeros for _ in weights))
    squares, *sums = jax.lax.fori_loop(0, I // tiles.inputs, along, start)
    if "scale" in at:
        factor = jax.lax.rsqrt(squares / I + eps)[:, None]
        sums = [total * factor for total in sums]
    y = sums[0] if activation is None else ACTIVATIONS[activation](sums[0]) * sums[1]
    if "bias" in at:
        y += at["bias"][outputs].astype(jnp.float32)[None]
    if "residual" in at:
        y += at["residual"][rows, outputs].astype(jnp.float32)
    at["out"][rows, outputs] = y.astype(at["out"].dtype)
