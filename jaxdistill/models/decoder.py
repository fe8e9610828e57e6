"""One decoder for every family; what differs between them is configuration.

Dimension key: L layers, B rows, T tokens, E width, H query heads, K key heads, D head_dim, F MLP width, V vocabulary.
The layers are stacked along a leading axis L and scanned, so that depth costs no compile time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxdistill.models import layers, rotary, row_parts
from jaxdistill.models.attention import ATTENDED, STATISTICS, attention, keep_attention, platform_of
from jaxdistill.models.attention.cached import KV, attend_cached
from jaxdistill.models.config import LayerKind, ModelConfig
from jaxdistill.models.layer import DROPOUT_KEY, Layers, run_layer
from jaxdistill.models.lora import Lora
from jaxdistill.models.rope import Rope
from jaxdistill.parallel import mesh as meshes
from jaxdistill.parallel.options import deterministic_options

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


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """How attention is computed; see the arguments of `attention.attention` of the same names."""

    kernel: str = "auto"
    max_segments: int | None = None
    deterministic: bool = False


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
        not. A batch of other rows than the step's (pairs, rollouts) takes as many as divide a device's rows, too.

    Raises:
      ValueError: `layer_parts` above 1 beside adapters (its backward pass has gradients of every parameter, and a base
        has none), or under another policy than `full`.
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
        if layer_parts < 1 or (layer_parts > 1 and (lora is not None or remat != "full")):
            beside = " and adapters" if lora is not None else ""
            raise ValueError(
                f"layer_parts is {layer_parts} beside remat {remat!r}{beside}; layers take rows in parts under remat "
                "'full' and without adapters alone: leave it at 1."
            )
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

        parts = math.gcd(self.layer_parts, self._rows_of_device(tokens_BT.shape[0]))
        if parts == 1 and self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.remat], static_argnums=3)
        x = meshes.constrain(self._embedded(tokens_BT), activations, self.mesh)
        if parts > 1:
            # tables have Rope as keys, which no tree of arrays can have
            cut = functools.partial(row_parts.cut, parts=parts, mesh=self.mesh)
            x, rope, segment_ids_BT = cut(x), {k: cut(v) for k, v in rope.items()}, cut(segment_ids_BT)
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
                        x = row_parts.in_parts(functools.partial(layer, kind=kind), x, beside, own)
                return x, None

            # a few layers compile as fast unrolled, and run faster: a loop's buffers are copied in and out
            x, _ = jax.lax.scan(block, x, run, unroll=self.config.num_layers <= UNROLLED)
        return self._final_norm(x if parts == 1 else row_parts.joined(x, self.mesh))

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """What `jax.jit` needs for programs that run this model beside the train step: decoding, evaluation."""
        return deterministic_options(platform_of(self.mesh)) if self.attention.deterministic else None

    def _rows_of_device(self, rows: int) -> int:
        return rows if self.mesh is None else rows // meshes.ways(self.mesh, meshes.RULES["batch"])

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


def _blocks(p: jax.Array, first: int, period: int, repeats: int) -> jax.Array:
    """The parameters of one run of layers, [L, ...] -> [repeats, period, ...] ([repeats, ...] if all are alike)."""
    p = p[first : first + period * repeats] if period * repeats < p.shape[0] else p
    return p if period == 1 else p.reshape(repeats, period, *p.shape[1:])
