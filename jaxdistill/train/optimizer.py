"""Optimizers and schedules, all optax's; what is ours is which parameter gets which."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxdistill.config import OptimizerConfig

# everything that multiplies activations as a matrix inside the layers; embeddings, heads, norms and biases are not
MATRICES = frozenset({"q", "k", "v", "o", "gate", "up", "down"})


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup, then the shape that `schedule` names."""
    peak, final = config.learning_rate, config.learning_rate * config.final_share
    warmup = max(1, round(steps * config.warmup_share))
    rest = max(1, steps - warmup)
    match config.schedule:
        case "constant":
            shape = optax.constant_schedule(peak)
        case "linear":
            shape = optax.linear_schedule(peak, final, rest)
        case "cosine":
            shape = optax.cosine_decay_schedule(peak, rest, alpha=config.final_share)
        case "wsd":
            decay = max(1, round(steps * config.decay_share))
            shape = optax.linear_schedule(peak, final, decay, transition_begin=max(0, rest - decay))
    # the first step already learns: the ramp starts at peak / warmup, not at 0
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, shape], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, Adafactor, or Muon on the layers' matrices beside AdamW on the rest.

    Weight decay is decoupled and of matrices alone, whichever it is.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101; Shazeer & Stern 2018, arXiv:1804.04235; Jordan et al. 2024,
    Muon, with the update scale of Liu et al. 2025, arXiv:2502.16982, section 2.2, which lets both share one rate.
    """
    import optax.contrib

    schedule = make_schedule(config, steps)
    if config.name == "adamw":
        update = optax.adamw(
            schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=_is_matrix
        )
    elif config.name == "adafactor":
        update = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
            optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        update = optax.contrib.muon(
            schedule,
            muon_weight_dimension_numbers=_muon_dimensions,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _is_matrix(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[-1].key in MATRICES, params)


def _muon_dimensions(params: Any) -> Any:
    """Layers are stacked along axis 0; each [inputs, outputs] is orthogonalised on its own."""
    import optax.contrib

    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map_with_path(lambda path, _: dimensions if path[-1].key in MATRICES else None, params)
