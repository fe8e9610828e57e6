"""Names of what attention's backward pass reads, so that a remat policy can keep it and run no forward kernel twice.

`jax.checkpoint_policies.save_only_these_names(ATTENDED, STATISTICS)` keeps both.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENDED = "attended"
"""What the kernel gave, in its own dtype and layout."""
STATISTICS = "attention_statistics"
"""The softmax's log of sums, fp32 [B, H, T] or a reshaping of it."""


def name_residuals(out: jax.Array, statistics: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, named. The backward rule has to read these and no other copy of them."""
    return checkpoint_name(out, ATTENDED), checkpoint_name(statistics, STATISTICS)
