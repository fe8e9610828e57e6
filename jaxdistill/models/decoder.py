"""One decoder for every family; what differs between them is configuration.

Dimension key: L layers, B rows, T tokens, E width, H query heads, K key heads, D head_dim, F MLP width, V vocabulary.
The layers are stacked along a leading axis L and scanned, so that depth costs no compile time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.models import layers
from jaxdistill.models.config import ModelConfig
from jaxdistill.parallel import mesh as meshes

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q [B,T,H,D], k [B,T,K,D], v [B,T,K,D]) -> [B, T, H * D]: full attention, or attention to a cache."""


UNROLLED = 4
"""Models of up to this many layers are not looped over (3 layers, width 128, on 2 CPU cores: 103 -> 93 ms a step)."""


class Layers(nnx.Module):
    """The parameters of all L decoder layers, and the computation of one."""

    def __init__(self, config: ModelConfig, key: jax.Array):
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
        self.attention_norm = vector(c.hidden_size, "norm", 1.0)
        self.q = matrix(c.hidden_size, q_size, ("embed", "heads"))
        self.k = matrix(c.hidden_size, kv_size, ("embed", "kv_heads"))
        self.v = matrix(c.hidden_size, kv_size, ("embed", "kv_heads"))
        self.o = matrix(q_size, c.hidden_size, ("heads", "embed"), shrink)
        if c.qkv_bias:
            self.q_bias = vector(q_size, "heads", 0.0)
            self.k_bias = vector(kv_size, "kv_heads", 0.0)
            self.v_bias = vector(kv_size, "kv_heads", 0.0)
        if c.qk_norm:
            self.q_norm = vector(c.head_dim, "norm", 1.0)
            self.k_norm = vector(c.head_dim, "norm", 1.0)
        self.mlp_norm = vector(c.hidden_size, "norm", 1.0)
        self.gate = matrix(c.hidden_size, c.intermediate_size, ("embed", "mlp"))
        self.up = matrix(c.hidden_size, c.intermediate_size, ("embed", "mlp"))
        self.down = matrix(c.intermediate_size, c.hidden_size, ("mlp", "embed"), shrink)


def run_layer(
    p: dict[str, jax.Array], config: ModelConfig, x_BTE: jax.Array, rope: Any, attend: Attend, dtype: Any
) -> jax.Array:
    """One layer, from its parameters `p` (the slices of `Layers`' arrays): attention, then MLP, each added to x."""
    c = config
    B, T, _ = x_BTE.shape
    h = layers.rms_norm(x_BTE, p["attention_norm"], c.rms_norm_eps)
    q, k, v = (layers.matmul(h, p[n], dtype) for n in ("q", "k", "v"))
    if c.qkv_bias:
        q, k, v = (x + layers.last_axis(p[n], x.ndim) for x, n in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias")))
    q = q.reshape(B, T, c.num_heads, c.head_dim)
    k = k.reshape(B, T, c.num_kv_heads, c.head_dim)
    v = v.reshape(B, T, c.num_kv_heads, c.head_dim)
    if c.qk_norm:
        q = layers.rms_norm(q, p["q_norm"], c.rms_norm_eps)
        k = layers.rms_norm(k, p["k_norm"], c.rms_norm_eps)
    attended = attend(layers.apply_rope(q, rope), layers.apply_rope(k, rope), v)
    x_BTE = x_BTE + layers.matmul(attended, p["o"], dtype)

    h = layers.rms_norm(x_BTE, p["mlp_norm"], c.rms_norm_eps)
    gated = jax.nn.silu(layers.matmul(h, p["gate"], dtype)) * layers.matmul(h, p["up"], dtype)
    return x_BTE + layers.matmul(gated, p["down"], dtype)


class Decoder(nnx.Module):
    """A causal language model.

    Attributes:
      config: its shape.
      dtype: of the matrix products' inputs; parameters, sums and logits are fp32.
      remat: `none` keeps every activation for the backward pass, `full` only each layer's input.
      mesh: if set, activations are kept sharded over it.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        key: jax.Array,
        dtype: Any = jnp.float32,
        remat: str = "none",
        mesh: Mesh | None = None,
    ):
        self.config, self.dtype, self.remat, self.mesh = config, jnp.dtype(dtype), remat, mesh
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nnx.Param(jax.random.normal(embed_key, shape, jnp.float32) * 0.02, axes=("vocab", "embed"))
        self.layers = Layers(config, layers_key)
        self.norm = nnx.Param(jnp.ones((config.hidden_size,), jnp.float32), axes=("norm",))
        if not config.tie_embeddings:
            self.head = nnx.Param(jax.random.normal(head_key, shape, jnp.float32) * 0.02, axes=("vocab", "embed"))

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """fp32 logits; position t holds the scores of token t + 1."""
        return self.project(self.hidden(tokens_BT, positions_BT, segment_ids_BT))

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T E"]:
        """The last layer's output after the final norm: what the vocabulary projection takes.

        Args:
          positions_BT: counted from 0 along each row if absent; packed rows restart in every segment.
          segment_ids_BT: one segment a row if absent; a token sees earlier tokens of its own segment only.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        segments = jnp.ones_like(tokens_BT) if segment_ids_BT is None else segment_ids_BT
        rope = layers.rope_tables(positions_BT, self.config.head_dim, self.config.rope_theta)
        activations = ("batch", "sequence", None)

        def attend(q, k, v):
            return layers.causal_attention(q, k, v, segments, self.dtype)

        def body(x, p):
            x = run_layer(p, self.config, x, rope, attend, self.dtype)
            return meshes.constrain(x, activations, self.mesh), None

        x = meshes.constrain(self.embed[...][tokens_BT], activations, self.mesh)
        # a few layers compile as fast unrolled, and run faster: a loop's buffers are copied in and out
        unroll = self.config.num_layers <= UNROLLED
        x, _ = jax.lax.scan(
            jax.checkpoint(body) if self.remat == "full" else body, x, self.layer_params(), unroll=unroll
        )
        return layers.rms_norm(x, self.norm[...], self.config.rms_norm_eps)

    def project(self, hidden_BTE: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Hidden states -> fp32 logits."""
        return layers.matmul(hidden_BTE, self.projection().T, self.dtype)

    def projection(self) -> Float[Array, "V E"]:
        """The vocabulary projection's weights; tied models use the embedding."""
        return self.embed[...] if self.config.tie_embeddings else self.head[...]

    def layer_params(self) -> dict[str, jax.Array]:
        """Every layer parameter by name, stacked along L."""
        return nnx.to_pure_dict(nnx.state(self.layers))

    def step(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        cache: list[tuple[jax.Array, jax.Array]],
        at: Int[Array, ""],
        visible_BTS: Bool[Array, "B T S"],
    ) -> tuple[Float[Array, "B V"], list[tuple[jax.Array, jax.Array]]]:
        """Runs T more tokens against a key-value cache: prefill (T = prompt) and decoding (T = 1) alike.

        Args:
          cache: keys and values a layer, each [B, S, K, D].
          at: the tokens' keys and values are written to the slots at..at+T-1 of S.
          visible_BTS: which slots each token attends to.
        Returns:
          (fp32 logits after the last token, the cache with the new keys and values).
        """
        rope = layers.rope_tables(positions_BT, self.config.head_dim, self.config.rope_theta)
        x = self.embed[...][tokens_BT]
        stacked, filled = self.layer_params(), []
        for i, (keys, values) in enumerate(cache):

            def attend(q, k, v, keys=keys, values=values):
                keys = jax.lax.dynamic_update_slice_in_dim(keys, k.astype(keys.dtype), at, axis=1)
                values = jax.lax.dynamic_update_slice_in_dim(values, v.astype(values.dtype), at, axis=1)
                filled.append((keys, values))
                return layers.attend(q, keys, values, visible_BTS, self.dtype)

            x = run_layer({name: p[i] for name, p in stacked.items()}, self.config, x, rope, attend, self.dtype)
        hidden = layers.rms_norm(x[:, -1:], self.norm[...], self.config.rms_norm_eps)
        return self.project(hidden)[:, 0], filled
