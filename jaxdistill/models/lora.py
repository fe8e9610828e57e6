"""LoRA: a low-rank change beside frozen matrices (Hu et al. 2021, arXiv:2106.09685), on stacked layers.

Dimension key: L layers, I inputs, O outputs, R rank.
A matrix W [L, I, O] named `q` gets `q_lora_a` [L, I, R] and `q_lora_b` [L, R, O]; its layer then computes
x W + (alpha / R) * (dropout(x) A) B. Only A and B are trained; the rest of the model can be held in bf16.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdistill.models.quantize import dense

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
LORA_A, LORA_B = "_lora_a", "_lora_b"
ALL = "all-linear"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Which matrices are adapted, and how; made by `Lora.of`."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = MATRICES

    @classmethod
    def of(cls, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] | str = ALL) -> Lora:
        """
        Args:
          targets: names of linear layers, as `q` or as Hugging Face's `q_proj`; or `all-linear`.
        Raises:
          ValueError: a rank below 1, a dropout outside of [0, 1), an unknown or no target.
        """
        if rank < 1:
            raise ValueError(f"LoRA: rank is {rank}; set at least 1.")
        if not 0 <= dropout < 1:
            raise ValueError(f"LoRA: dropout is {dropout}; set a share in [0, 1).")
        wanted = MATRICES if targets == ALL else [targets] if isinstance(targets, str) else targets
        names = {name.removesuffix("_proj"): name for name in wanted}
        for name, given in names.items():
            if name not in MATRICES:
                near = difflib.get_close_matches(name, MATRICES, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"LoRA: no linear layer {given!r}; did you mean {near}_proj? There are "
                    f"{', '.join(f'{m}_proj' for m in MATRICES)}, or {ALL}."
                )
        if not names:
            raise ValueError(f"LoRA: no targets; name linear layers, or {ALL}.")
        return cls(rank=rank, alpha=alpha, dropout=dropout, targets=tuple(m for m in MATRICES if m in names))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def add_params(layers: nnx.Module, lora: Lora, key: jax.Array) -> None:
    """Gives stacked layers their adapters: A uniform in +-I ** -0.5, as PEFT has it, and B zero: no change."""
    for target, key_of in zip(MATRICES, jax.random.split(key, len(MATRICES)), strict=True):
        if target not in lora.targets:
            continue
        matrix = getattr(layers, target)
        L, inputs, outputs = matrix.shape
        _, in_axis, out_axis = matrix.get_metadata()["axes"]
        a = jax.random.uniform(key_of, (L, inputs, lora.rank), jnp.float32, -1.0, 1.0) * inputs**-0.5
        b = jnp.zeros((L, lora.rank, outputs), jnp.float32)
        setattr(layers, target + LORA_A, nnx.Param(a, axes=("layers", in_axis, None)))
        setattr(layers, target + LORA_B, nnx.Param(b, axes=("layers", None, out_axis)))


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its last name, is half of an adapter."""
    return name.endswith((LORA_A, LORA_B))


def split_params(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters as (what is trained, what is frozen): (adapters, the rest), or (all, nothing) without any."""
    layers = params["layers"]
    adapters = {name: p for name, p in layers.items() if is_adapter(name)}
    if not adapters:
        return params, {}
    base = {name: p for name, p in layers.items() if name not in adapters}
    return {"layers": adapters}, params | {"layers": base}


def join_params(trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """What `split_params` took apart."""
    return frozen | trained | {"layers": frozen.get("layers", {}) | trained["layers"]}


def merged_params(params: dict[str, Any], lora: Lora) -> dict[str, Any]:
    """The parameters with every adapter added to its matrix, in fp32, and in the matrix's own dtype again."""
    layers = {name: p for name, p in params["layers"].items() if not is_adapter(name)}
    for target in lora.targets:
        layers[target] = _merge(
            layers[target], params["layers"][target + LORA_A], params["layers"][target + LORA_B], lora.scale
        )
    return params | {"layers": layers}


@jax.jit
def _merge(w: Any, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
    change = jnp.einsum("lir,lro->lio", a, b, precision="highest", preferred_element_type=jnp.float32)
    w = dense(w)
    return (w.astype(jnp.float32) + scale * change).astype(w.dtype)
