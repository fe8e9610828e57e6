"""One decoder layer: its parameters, stacked for all layers, and what it computes.

Dimension key: L layers, B rows, T tokens, E width, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxdistill.models import layers, rotary
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.lora import LORA_A, LORA_B, Lora, add_params
from jaxdistill.parallel import mesh as meshes

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q [B,T,H,D], k [B,T,K,D], v [B,T,K,D]) -> [B, T, H * D]: full attention, or attention to a cache."""

WEIGHT_AXES: Mapping[str, tuple[str, str]] = {
    "q": ("embed", "heads"),
    "k": ("embed", "kv_heads"),
    "v": ("embed", "kv_heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}
"""Logical axes of a layer's matrices: inputs, outputs."""


class Layers(nnx.Module):
    """The parameters of all L decoder layers, stacked, by name."""

    def __init__(self, config: ModelConfig, key: jax.Array, lora: Lora | None = None):
        c, L = config, config.num_layers
        keys = iter(jax.random.split(key, 8))
        # outputs into the residual stream start smaller, as in GPT-2: L layers add up
        shrink = (2 * L) ** -0.5

        def matrix(inputs: int, outputs: int, axes: tuple[str, str], scale: float = 1.0) -> nnx.Param:
            value = jax.random.normal(next(keys), (L, inputs, outputs), jnp.float32) * (scale * inputs**-0.5)
            return nnx.Param(value, axes=("layers", *axes))

        def vector(size: int, axis: str, fill: float) -> nnx.Param:
            return nnx.Param(jnp.full((L, size), fill, jnp.float32), axes=("layers", axis))

        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        one = 0.0 if c.family.norm_offset else 1.0
        self.attention_norm = vector(c.hidden_size, "norm", one)
        self.q = matrix(c.hidden_size, q_size, WEIGHT_AXES["q"])
        self.k = matrix(c.hidden_size, kv_size, WEIGHT_AXES["k"])
        self.v = matrix(c.hidden_size, kv_size, WEIGHT_AXES["v"])
        self.o = matrix(q_size, c.hidden_size, WEIGHT_AXES["o"], shrink)
        if c.qkv_bias:
            self.q_bias = vector(q_size, "heads", 0.0)
            self.k_bias = vector(kv_size, "kv_heads", 0.0)
            self.v_bias = vector(kv_size, "kv_heads", 0.0)
        if c.attention_bias:
            self.o_bias = vector(c.hidden_size, "norm", 0.0)
        if c.family.qk_norm:
            self.q_norm = vector(c.head_dim, "norm", one)
            self.k_norm = vector(c.head_dim, "norm", one)
        self.mlp_norm = vector(c.hidden_size, "norm", one)
        self.gate = matrix(c.hidden_size, c.intermediate_size, WEIGHT_AXES["gate"])
        self.up = matrix(c.hidden_size, c.intermediate_size, WEIGHT_AXES["up"])
        self.down = matrix(c.intermediate_size, c.hidden_size, WEIGHT_AXES["down"], shrink)
        if c.family.sandwich_norms:
            self.post_attention_norm = vector(c.hidden_size, "norm", one)
            self.post_mlp_norm = vector(c.hidden_size, "norm", one)
        if lora is not None:
            add_params(self, lora, jax.random.fold_in(key, 1))


DROPOUT_KEY = "dropout_key"
"""Beside a layer's parameters while adapters are trained with dropout: its own random key."""


def run_layer(
    p: Mapping[str, jax.Array],
    config: ModelConfig,
    x_BTE: jax.Array,
    rope: Any,
    attend: Attend,
    dtype: Any,
    lora: Lora | None = None,
    mesh: Mesh | None = None,
    query_scale: float = 1.0,
) -> jax.Array:
    """One layer, from its parameters `p` (slices of `Layers`' arrays): attention, then MLP, each added to x.

    Args:
      x_BTE: in the dtype of the activations, which every product's result is rounded to.
      rope: tables of `layers.rope_tables` or `rotary.tables_on_tpu`; None in a layer without positions.
      mesh: if the parameters are spread over one as `WEIGHT_AXES` says, they are gathered matrix by matrix.
      query_scale: multiplies the queries here; with 1, `attend` has to do it.
    """
    c = config
    B, T, _ = x_BTE.shape
    activations = x_BTE.dtype

    def linear(name: str, x: jax.Array, *, inputs: int = 1, heads: int | None = None) -> jax.Array:
        """x times a matrix, whose inputs are so many heads; the outputs as [B, T, H, D] if they are heads, too."""
        rows, columns = WEIGHT_AXES[name]
        shardings = meshes.weight_shardings(mesh, (rows, columns))
        y = layers.matmul(x, p[name], dtype, activations, shardings, (inputs, heads or 1))
        y = y if heads is None else y.reshape(B, T, heads, -1)
        bias = p.get(f"{name}_bias")
        y = y if bias is None else y + bias.reshape(1, 1, *y.shape[2:])
        if lora is not None and name in lora.targets:
            if DROPOUT_KEY in p:
                x = layers.dropout(x, lora.dropout, jax.random.fold_in(p[DROPOUT_KEY], lora.targets.index(name)))
            a, b = (meshes.weight_shardings(mesh, axes) for axes in ((rows, None), (None, columns)))
            low = layers.matmul(x, p[name + LORA_A], dtype, activations, a, (inputs, 1))
            change = layers.matmul(low, p[name + LORA_B], dtype, jnp.float32, b, (1, heads or 1))
            y = y + lora.scale * change.reshape(y.shape)
        return y.astype(activations)

    def norm(name: str, x: jax.Array) -> jax.Array:
        return layers.rms_norm(x, p[name], c.rms_norm_eps, offset=c.family.norm_offset, out_dtype=activations)

    def turn(name: str, x: jax.Array, scale: float = 1.0) -> jax.Array:
        found = p[name] if c.family.qk_norm else None
        return rotary.turn(x, rope, found, eps=c.rms_norm_eps, offset=c.family.norm_offset, scale=scale)

    h = norm("attention_norm", x_BTE)
    q = linear("q", h, heads=c.num_heads)
    k, v = linear("k", h, heads=c.num_kv_heads), linear("v", h, heads=c.num_kv_heads)
    q, k = turn("q_norm", q, query_scale), turn("k_norm", k)
    h = linear("o", attend(q, k, v), inputs=c.num_heads)
    x_BTE = x_BTE + (norm("post_attention_norm", h) if c.family.sandwich_norms else h)

    h = norm("mlp_norm", x_BTE)
    gate, up = linear("gate", h), linear("up", h)
    if activations == jnp.float32 or (lora is not None and "down" in lora.targets):
        h = linear("down", layers.gated(c.family.activation, gate, up))
    else:
        shardings = meshes.weight_shardings(mesh, WEIGHT_AXES["down"])
        h = layers.gated_matmul(c.family.activation, gate, up, p["down"], dtype, activations, shardings)
    return x_BTE + (norm("post_mlp_norm", h) if c.family.sandwich_norms else h)
