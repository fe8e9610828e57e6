"""Frozen matrices in 8 or 4 bits, by qwix (https://github.com/google/qwix): the base that adapters are trained on.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3) stores 4-bit NormalFloat in blocks of 64 and computes in 16
bits; so does this, without its second quantization of the scales. Only the layers' matrices are quantized.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

QTYPES = ("int8", "nf4")
BLOCK = 64
"""Inputs of a matrix that share one scale."""


def quantize(matrix: jax.Array, qtype: str) -> Any:
    """[L, I, O] -> a qwix QArray of the same shape; the scales are fp32, one for up to `BLOCK` inputs of an output."""
    import qwix

    inputs = matrix.shape[1]
    block = BLOCK if inputs % BLOCK == 0 else inputs
    scales = {"channelwise_axes": (0, 2), "tiled_axes": {1: block}}
    return jax.jit(lambda w: qwix.quantize(w.astype(jnp.float32), qtype, **scales))(matrix)


def dense(matrix: Any) -> jax.Array:
    """The matrix as an array, whether it is quantized (then in fp32) or not."""
    if isinstance(matrix, jax.Array):
        return matrix
    import qwix

    return qwix.dequantize(matrix)
