"""What attention's backward pass reads, by name, so that a remat policy can keep it and run no forward kernel twice.

`jax.checkpoint_policies.save_only_these_names(ATTENDED, STATISTICS)` does it for our own kernels and for splash;
`keep_attention` does it for cuDNN, too, whose results are out of reach of names.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENDED = "attended"
"""What the kernel gave, in its own dtype and layout."""
STATISTICS = "attention_statistics"
"""The logarithm of the softmax's sums, fp32, one number a query and head; and which blocks see each other."""
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
"""JAX's primitive that calls cuDNN, in 0.10 to 0.12. Were it renamed, cuDNN's forward pass would run twice."""


def name_residuals(out: jax.Array, statistics: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, named. The backward rule has to read these and no other copy of them."""
    return checkpoint_name(out, ATTENDED), checkpoint_name(statistics, STATISTICS)


def keep_attention(primitive: Any, *inputs: Any, **params: Any) -> Any:
    """A policy for `jax.checkpoint`: keeps what every attention kernel's backward pass needs, and nothing else.

    `jax.checkpoint_policies.save_from_both_policies` joins it with another.
    """
    named = jax.checkpoint_policies.save_only_these_names(ATTENDED, STATISTICS)
    return primitive.name == CUDNN_FORWARD or named(primitive, *inputs, **params)
