"""One decoder for every family; what differs between them is configuration.

Dimension key: L layers, B rows, T tokens, E width, H query heads, K key heads, D head_dim, F MLP width, V vocabulary.
The layers are stacked along a leading axis L and scanned, so that depth costs no compile time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxdistill.models import layers, rotary
from jaxdistill.models.attention import ATTENDED, STATISTICS, attention, keep_attention, platform_of
from jaxdistill.models.attention.cached import KV, attend_cached
from jaxdistill.models.config import LayerKind, ModelConfig
from jaxdistill.models.lora import LORA_A, LORA_B, Lora, add_params
from jaxdistill.models.rope import Rope
from jaxdistill.parallel import mesh as meshes

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q [B,T,H,D], k [B,T,K,D], v [B,T,K,D]) -> [B, T, H * D]: full attention, or attention to a cache."""


UNROLLED = 8
"""Models of up to this many layers are not looped over (on 2 CPU cores, 3 layers of width 128: 103 -> 93 ms a step;
8 layers of width 384: 8.0 -> 6.9 s)."""

LAYER_INPUT = "layer_input"
REMAT: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, keep_attention
    ),
    "attention": keep_attention,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT, ATTENDED, STATISTICS],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass finds saved of each layer; see `TrainConfig.remat`."""


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


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """How attention is computed; see the arguments of `attention.attention` of the same names."""

    kernel: str = "auto"
    max_segments: int | None = None
    deterministic: bool = False


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

    def linear(name: str, x: jax.Array, heads: tuple[int, int] = (1, 1)) -> jax.Array:
        inputs, outputs = WEIGHT_AXES[name]
        y = layers.matmul(x, p[name], dtype, activations, meshes.weight_shardings(mesh, (inputs, outputs)), heads)
        # as heads from here on, where there are some
        y = y if heads[1] == 1 else y.reshape(B, T, heads[1], -1)
        bias = p.get(f"{name}_bias")
        y = y if bias is None else y + bias.reshape(1, 1, *y.shape[2:])
        if lora is not None and name in lora.targets:
            if DROPOUT_KEY in p:
                x = layers.dropout(x, lora.dropout, jax.random.fold_in(p[DROPOUT_KEY], lora.targets.index(name)))
            a, b = (meshes.weight_shardings(mesh, axes) for axes in ((inputs, None), (None, outputs)))
            low = layers.matmul(x, p[name + LORA_A], dtype, activations, a, (heads[0], 1))
            change = layers.matmul(low, p[name + LORA_B], dtype, jnp.float32, b, (1, heads[1]))
            y = y + lora.scale * change.reshape(y.shape)
        return y.astype(activations)

    def norm(name: str, x: jax.Array) -> jax.Array:
        return layers.rms_norm(x, p[name], c.rms_norm_eps, offset=c.family.norm_offset, out_dtype=activations)

    def turn(name: str, x: jax.Array, scale: float = 1.0) -> jax.Array:
        found = p[name] if c.family.qk_norm else None
        return rotary.turn(x, rope, found, eps=c.rms_norm_eps, offset=c.family.norm_offset, scale=scale)

    h = norm("attention_norm", x_BTE)
    q, k, v = (
        linear(name, h, (1, heads)).reshape(B, T, heads, c.head_dim)
        for name, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads))
    )
    q, k = turn("q_norm", q, query_scale), turn("k_norm", k)
    h = linear("o", attend(q, k, v), (c.num_heads, 1))
    x_BTE = x_BTE + (norm("post_attention_norm", h) if c.family.sandwich_norms else h)

    h = norm("mlp_norm", x_BTE)
    gate, up = linear("gate", h), linear("up", h)
    if activations == jnp.float32 or (lora is not None and "down" in lora.targets):
        h = linear("down", layers.gated(c.family.activation, gate, up))
    else:
        shardings = meshes.weight_shardings(mesh, WEIGHT_AXES["down"])
        h = layers.gated_matmul(c.family.activation, gate, up, p["down"], dtype, activations, shardings)
    return x_BTE + (norm("post_mlp_norm", h) if c.family.sandwich_norms else h)


def runs_of(kinds: Sequence[LayerKind]) -> list[tuple[int, int, int]]:
    """Cuts the layers into runs (first layer, period, repeats) of one repeating pattern, which can be scanned.

    Alike layers are one run of period 1; five local layers and a global one, again and again, one of period 6.
    """
    found, at = [], 0
    while at < len(kinds):
        best = (1, 1)
        for period in range(1, 9):
            repeats = 1
            while kinds[at : at + period] == kinds[at + period * repeats : at + period * (repeats + 1)]:
                repeats += 1
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        found.append((at, *best))
        at += best[0] * best[1]
    return found


class Decoder(nnx.Module):
    """A causal language model.

    Attributes:
      config: its shape.
      dtype: of the matrix products' inputs; parameters, sums and logits are fp32.
      activations: dtype of the residual stream, of products' results, and of what is kept for the backward pass:
        `dtype` on accelerators, whose elementwise passes are bound by bytes, fp32 on CPUs, where that is faster.
      remat: a policy of `REMAT`: which activations are kept for the backward pass.
      mesh: if set, activations are kept sharded over it.
      lora: if set, the layers' matrices have adapters.
      attention: the kernel of training's forward and backward passes.
      layer_parts: under the remat policy `full`, a layer takes the rows of a batch in this many parts, one after the
        other: what it works with, and its backward pass with, is as many times smaller; what is kept between layers is
        not. Every device's rows have to divide by it.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        key: jax.Array,
        dtype: Any = jnp.float32,
        remat: str = "none",
        mesh: Mesh | None = None,
        lora: Lora | None = None,
        activations: Any = None,
        attention: AttentionOptions | None = None,
        layer_parts: int = 1,
    ):
        self.config, self.dtype, self.remat, self.mesh, self.lora = config, jnp.dtype(dtype), remat, mesh, lora
        self.attention, self.layer_parts = attention or AttentionOptions(), layer_parts
        self.activations = jnp.dtype(activations or (jnp.float32 if platform_of(mesh) == "cpu" else dtype))
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nnx.Param(jax.random.normal(embed_key, shape, jnp.float32) * 0.02, axes=("vocab", "embed"))
        self.layers = Layers(config, layers_key, lora)
        self.norm = nnx.Param(
            jnp.full((config.hidden_size,), 0.0 if config.family.norm_offset else 1.0, jnp.float32), axes=("norm",)
        )
        if not config.tie_embeddings:
            self.head = nnx.Param(jax.random.normal(head_key, shape, jnp.float32) * 0.02, axes=("vocab", "embed"))

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B T V"]:
        """fp32 logits; position t holds the scores of token t + 1."""
        return self.project(self.hidden(tokens_BT, positions_BT, segment_ids_BT, dropout_key=dropout_key))

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B T E"]:
        """The last layer's output after the final norm: what the vocabulary projection takes.

        Args:
          positions_BT: counted from 0 along each row if absent; packed rows restart in every segment.
          segment_ids_BT: one segment a row if absent; a token sees earlier tokens of its own segment only.
          dropout_key: for the dropout of adapters in training; none without it.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        rope = self._rope_tables(positions_BT)
        if platform_of(self.mesh) == "tpu" and self.activations == jnp.bfloat16:
            rope = {kind: rotary.tables_on_tpu(tables) for kind, tables in rope.items()}
        activations = ("batch", "sequence", None)

        def layer(x: jax.Array, beside: Any, p: Mapping[str, jax.Array], kind: LayerKind) -> jax.Array:
            tables, ids_BT = beside

            def attend(q, k, v):
                return attention(
                    q,
                    k,
                    v,
                    ids_BT,
                    scale=1.0,
                    window=kind.window,
                    dtype=self.dtype,
                    mesh=self.mesh,
                    out_dtype=self.activations,
                    **dataclasses.asdict(self.attention),
                )

            x = checkpoint_name(x, LAYER_INPUT)
            more = {"mesh": self.mesh, "query_scale": self.config.query_scale}
            x = run_layer(p, self.config, x, tables, attend, self.dtype, self.lora, **more)
            return meshes.constrain(x, activations, self.mesh)

        parts = self.layer_parts
        if parts == 1 and self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.remat], static_argnums=3)
        x = meshes.constrain(self._embedded(tokens_BT), activations, self.mesh)
        x, rope, segment_ids_BT = self._cut((x, rope, segment_ids_BT))
        stacked = self.layer_params()
        if dropout_key is not None and self.lora is not None and self.lora.dropout:
            stacked[DROPOUT_KEY] = jax.random.split(dropout_key, self.config.num_layers)
        for first, period, repeats in runs_of(self.config.kinds):
            kinds = self.config.kinds[first : first + period]
            run = jax.tree.map(lambda p, cut=(first, period, repeats): _blocks(p, *cut), stacked)

            def block(x, p, kinds=kinds):
                for i, kind in enumerate(kinds):
                    own = p if len(kinds) == 1 else jax.tree.map(lambda v, i=i: v[i], p)
                    beside = rope[kind.rope] if kind.rope else None, segment_ids_BT
                    if parts == 1:
                        x = layer(x, beside, own, kind)
                    else:
                        x = in_parts(functools.partial(layer, kind=kind), x, beside, own)
                return x, None

            # a few layers compile as fast unrolled, and run faster: a loop's buffers are copied in and out
            x, _ = jax.lax.scan(block, x, run, unroll=self.config.num_layers <= UNROLLED)
        x = self._joined(x)
        return self._final_norm(x)

    def _cut(self, rows: Any) -> Any:
        """Arrays [B, ...] as [parts, B / parts, ...]."""
        if self.layer_parts == 1:
            return rows
        # every device gives an equal share of its own rows to each part, so that none of them has to move
        alone, parts = self.mesh is None or self.mesh.size == 1, self.layer_parts

        def cut(x: jax.Array) -> jax.Array:
            x = x.reshape(*((parts, -1) if alone else (-1, parts)), *x.shape[1:])
            x = x if alone else x.swapaxes(0, 1)
            return meshes.constrain(x, (None, "batch", "sequence", *[None] * (x.ndim - 3)), self.mesh)

        # tables have Rope as keys, which no tree of arrays can have
        x, rope, ids = rows
        return cut(x), {k: jax.tree.map(cut, v) for k, v in rope.items()}, jax.tree.map(cut, ids)

    def _joined(self, x: jax.Array) -> jax.Array:
        """`_cut` undone."""
        if self.layer_parts == 1:
            return x
        x = x if self.mesh is None or self.mesh.size == 1 else x.swapaxes(0, 1)
        return x.reshape(-1, *x.shape[2:])

    def project(self, hidden_BTE: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Hidden states -> fp32 logits."""
        return layers.softcap(layers.matmul(hidden_BTE, self.projection().T, self.dtype), self.config.final_softcap)

    def projection(self) -> Float[Array, "V E"]:
        """The vocabulary projection's weights; tied models use the embedding."""
        return self.embed[...] if self.config.tie_embeddings else self.head[...]

    def layer_params(self) -> dict[str, jax.Array]:
        """Every layer parameter by name, stacked along L."""
        return nnx.to_pure_dict(nnx.state(self.layers))

    def _embedded(self, tokens_BT: jax.Array) -> jax.Array:
        x = self.embed[...][tokens_BT].astype(jnp.float32)
        x = x * self.config.hidden_size**0.5 if self.config.family.scaled_embedding else x
        return x.astype(self.activations)

    def _final_norm(self, x_BTE: jax.Array) -> jax.Array:
        c = self.config
        norm = functools.partial(layers.rms_norm, offset=c.family.norm_offset, out_dtype=self.activations)
        return norm(x_BTE, self.norm[...], c.rms_norm_eps)

    def _rope_tables(self, positions_BT: jax.Array) -> dict[Rope, tuple[jax.Array, jax.Array]]:
        """cos and sin for every kind of positions that a layer of this model uses."""
        ropes = {kind.rope for kind in self.config.kinds if kind.rope}
        return {rope: layers.rope_tables(positions_BT, *rope.frequencies(self.config.head_dim)) for rope in ropes}

    def prefill(
        self,
        tokens_BT: Int[Array, "B T"],
        length_B: Int[Array, " B"],
        params: Sequence[Mapping[str, jax.Array]],
        projection_VE: Float[Array, "V E"],
    ) -> tuple[Float[Array, "B V"], list[KV]]:
        """Runs prompts that are padded on the right, and keeps their keys and values.

        Args:
          length_B: tokens of each prompt, at least 1.
          params: every layer's parameters by name, see `run_layer`.
          projection_VE: what `projection` gives; it and `params` may be rounded to the model's dtype.
        Returns:
          (fp32 logits after each prompt's last token, keys and values of every layer, as T slots).
        """
        filled: list[KV] = []

        def attend(q, k, v, kind):
            filled.append(KV.of(k, v, self.dtype))
            more = {"dtype": self.dtype, "mesh": self.mesh, "out_dtype": self.activations}
            return attention(q, k, v, None, scale=self.config.query_scale, window=kind.window, **more)

        # what pads a row lies behind its prompt, where the prompt cannot see it
        x = self._run(
            tokens_BT, jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape), params, attend
        )
        last_BE = jnp.take_along_axis(x, (length_B - 1)[:, None, None], axis=1)[:, 0]
        return self._logits(last_BE, projection_VE), filled

    def step(
        self,
        token_B: Int[Array, " B"],
        cache: Sequence[KV],
        recent: Sequence[KV],
        length_B: Int[Array, " B"],
        at: Int[Array, ""],
        params: Sequence[Mapping[str, jax.Array]],
        projection_VE: Float[Array, "V E"],
    ) -> tuple[Float[Array, "B V"], list[KV]]:
        """Runs one more token a row, at position length_B + at, against a key-value cache (see `attention.cached`).

        Args:
          cache, recent: one a layer; the token's keys and values are written to slot `at` of `recent`.
          params, projection_VE: as in `prefill`.
        Returns:
          (fp32 logits after the token, the new `recent`).
        """
        filled: list[KV] = []

        def attend(q, k, v, kind):
            i = len(filled)
            filled.append(recent[i].written(KV.of(k, v, self.dtype), at))
            out = attend_cached(
                q[:, 0],
                cache[i],
                filled[i],
                length_B,
                at,
                scale=self.config.query_scale,
                window=kind.window,
                dtype=self.dtype,
                platform=platform_of(self.mesh),
            )
            return out[:, None].astype(self.activations)

        x = self._run(token_B[:, None], (length_B + at)[:, None], params, attend)
        return self._logits(x[:, 0], projection_VE), filled

    def step_by(
        self,
        token_B: Int[Array, " B"],
        position_B: Int[Array, " B"],
        run: Callable[[jax.Array, dict[Rope, tuple[jax.Array, jax.Array]]], tuple[jax.Array, Any]],
        projection_VE: Float[Array, "V E"],
    ) -> tuple[Float[Array, "B V"], Any]:
        """One more token a row, through layers that the caller computes.

        Args:
          run: (embedded tokens [B, E], by kind of positions cos and sin [B, D / 2]) -> (the last layer's output [B, E],
            whatever else the caller wants).
        Returns:
          (fp32 logits after the token, what `run` gave beside).
        """
        tables = {rope: (cos[:, 0, 0], sin[:, 0, 0]) for rope, (cos, sin) in
                  self._rope_tables(position_B[:, None]).items()}  # fmt: skip
        x_BE, more = run(self._embedded(token_B[:, None])[:, 0], tables)
        return self._logits(x_BE, projection_VE), more

    def _run(self, tokens_BT: jax.Array, positions_BT: jax.Array, params: Sequence[Any], attend: Any) -> jax.Array:
        """All layers, one after the other; `attend` is told of which kind a layer is. Returns the last one's output."""
        rope = self._rope_tables(positions_BT)
        x = self._embedded(tokens_BT)
        for p, kind in zip(params, self.config.kinds, strict=True):
            tables = rope[kind.rope] if kind.rope else None
            x = run_layer(p, self.config, x, tables, functools.partial(attend, kind=kind), self.dtype, self.lora)
        return x

    def _logits(self, x_BE: jax.Array, projection_VE: jax.Array) -> jax.Array:
        x = self._final_norm(x_BE)
        if platform_of(self.mesh) == "cpu":
            # few rows against a large matrix: CPUs repack the second operand, which had better be the small one
            # (16 rows, 384 x 8192: 2.1 -> 1.2 ms on one core); the barriers keep XLA from turning it round again
            x_EB = jax.lax.optimization_barrier(x.T)
            logits = jax.lax.optimization_barrier(layers.matmul(projection_VE, x_EB, self.dtype)).T
        else:
            logits = layers.matmul(x, projection_VE.T, self.dtype)
        return layers.softcap(logits, self.config.final_softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_parts(run: Callable[..., jax.Array], x: jax.Array, beside: Any, p: Any) -> jax.Array:
    """run(x[i], beside[i], p) for every part i, [parts, ...] -> [parts, ...]: one after the other, in x's own memory.

    The backward pass keeps x alone and runs each part again, as `jax.checkpoint` does with `nothing_saveable`; what a
    part works with is gone before the next one begins. `beside` is a constant to it.
    """

    def body(i: jax.Array, x: jax.Array) -> jax.Array:
        part, others = _part((x, beside), i)
        return jax.lax.dynamic_update_index_in_dim(x, run(part, others, p), i, 0)

    return jax.lax.fori_loop(0, x.shape[0], body, x)


def _in_parts_forward(run, x, beside, p):
    return in_parts(run, x, beside, p), (x, beside, p)


def _in_parts_backward(run, saved, g):
    x, beside, p = saved

    def body(i, carry):
        g, by_p = carry
        part, others, g_part = _part((x, beside, g), i)
        _, pull = jax.vjp(lambda x, p: run(x, others, p), part, p)
        by_x, more = pull(g_part)
        return jax.lax.dynamic_update_index_in_dim(g, by_x, i, 0), jax.tree.map(jnp.add, by_p, more)

    by_x, by_p = jax.lax.fori_loop(0, x.shape[0], body, (g, jax.tree.map(jnp.zeros_like, p)))
    return by_x, None, by_p


in_parts.defvjp(_in_parts_forward, _in_parts_backward)


def _part(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree)


def _blocks(p: jax.Array, first: int, period: int, repeats: int) -> jax.Array:
    """The parameters of one run of layers, [L, ...] -> [repeats, period, ...] ([repeats, ...] if all are alike)."""
    p = p[first : first + period * repeats] if period * repeats < p.shape[0] else p
    return p if period == 1 else p.reshape(repeats, period, *p.shape[1:])
