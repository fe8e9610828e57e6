"""A token step in five kernels a layer, for GPUs, where starting kernels takes as long as reading the weights.

Dimension key: B rows, E width, H query heads, K key heads, G = H / K, D head_dim, F MLP width.

A layer is: norm and one product for queries, keys and values (`products`); norms of heads, rotation, the write to the
cache and attention (`appended`); the output product, added to the residual; norm, gate, up and activation; the down
product, added to the residual. The residual stream is in the model's dtype; sums, norms and softmax are fp32.

The kernels are Pallas', for Triton (`attention.pallas`). Where they cannot run, the general step (`Decoder.step`) takes
over, with a warning. NEVER EXECUTED ON A GPU so far: tested are the kernels' numbers, interpreted on a CPU, and that
they compile for an H100 (to wgmma or mma, cp.async and no spills).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxdistill.generate.appended import BLOCK, append_and_attend
from jaxdistill.generate.products import Tiles, product
from jaxdistill.models import Decoder
from jaxdistill.models.attention import pallas, platform_of
from jaxdistill.models.attention.cached import KV
from jaxdistill.models.attention.warn import warn_once
from jaxdistill.models.config import LayerKind, ModelConfig
from jaxdistill.models.layers import rms_norm
from jaxdistill.parallel import mesh as meshes


def usable(model: Decoder) -> bool:
    """Whether tokens are decoded this way; on a GPU that could not, a warning says why."""
    if platform_of(model.mesh) != "gpu":
        return False
    why = why_not(model.config, model.dtype, model.mesh, adapters=model.lora is not None)
    if why is not None:
        warn_once(f"decoding takes the general token step, with several times as many kernels: {why}.")
    return why is None


def why_not(config: ModelConfig, dtype: Any, mesh: Mesh | None, *, adapters: bool) -> str | None:
    """Why the fused step cannot run this model on its GPUs; None if it can."""
    c = config
    if adapters:
        return "it knows no adapters; decode from merged weights"
    if mesh is not None and mesh.shape["tensor"] * mesh.shape["context"] > 1:
        return "heads or tokens are split over devices; split rows alone (train.mesh: data or fsdp)"
    if c.head_dim & (c.head_dim - 1) or c.head_dim < 32:
        return f"head_dim {c.head_dim} is not a power of two from 32 on"
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    sizes = {(c.hidden_size, heads), (c.num_heads * c.head_dim, c.hidden_size), (c.hidden_size, c.intermediate_size),
             (c.intermediate_size, c.hidden_size)}  # fmt: skip
    odd = next((size for size in sorted(sizes) if Tiles.of(64, *size) is None), None)
    if odd is not None:
        return f"no tile divides a matrix of {odd[0]} x {odd[1]}"
    device = None if mesh is None else mesh.devices.flat[0]
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it takes models in bf16, not {jnp.dtype(dtype)}"
    return pallas.why_not(dtype, c.head_dim, device)


def packed(config: ModelConfig, p: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A layer's parameters as `step` takes them: q, k and v in one matrix, for each key head its G queries, key, value.

    Norms are stored as they multiply, in fp32.
    """
    found = {name: p[name] for name in ("o", "gate", "up", "down")}
    found["qkv"] = _joined(config, *(p[name] for name in "qkv"))
    if config.qkv_bias:
        found["qkv_bias"] = _joined(config, *(p[f"{name}_bias"].astype(jnp.float32) for name in "qkv"))
    if config.attention_bias:
        found["o_bias"] = p["o_bias"].astype(jnp.float32)
    for name in p:
        if name.endswith("_norm"):
            found[name] = p[name].astype(jnp.float32) + (1.0 if config.family.norm_offset else 0.0)
    return found


def unpacked(config: ModelConfig, p: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What `packed` made of a layer, as `run_layer` takes it."""
    found = {name: x for name, x in p.items() if not name.startswith("qkv")}
    found |= dict(zip("qkv", _apart(config, p["qkv"]), strict=True))
    if config.qkv_bias:
        found |= {f"{name}_bias": x for name, x in zip("qkv", _apart(config, p["qkv_bias"]), strict=True)}
    for name in p:
        if name.endswith("_norm"):
            found[name] = p[name] - (1.0 if config.family.norm_offset else 0.0)
    return found


def _joined(c: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    heads = [x.reshape(*x.shape[:-1], c.num_kv_heads, -1, c.head_dim) for x in (q, k, v)]
    joined = jnp.concatenate(heads, axis=-2)
    return joined.reshape(*q.shape[:-1], -1)


def _apart(c: ModelConfig, qkv: jax.Array) -> list[jax.Array]:
    G = c.num_heads // c.num_kv_heads
    heads = qkv.reshape(*qkv.shape[:-1], c.num_kv_heads, G + 2, c.head_dim)
    parts = (heads[..., :G, :], heads[..., G : G + 1, :], heads[..., G + 1 :, :])
    return [x.reshape(*qkv.shape[:-1], -1) for x in parts]


def step(
    model: Decoder,
    token_B: jax.Array,
    position_B: jax.Array,
    cache: Sequence[KV],
    layers: Sequence[Mapping[str, jax.Array]],
    projection_VE: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, list[KV]]:
    """Runs one more token a row, at `position_B`, and writes its keys and values to that slot of the cache.

    Args:
      cache: one a layer, with a multiple of `BLOCK` slots.
      layers: what `packed` makes, one a layer.
      interpret: runs the kernels without a GPU, slowly.
    Returns:
      (fp32 logits [B, V] after the token, the cache with it).
    """
    assert all(kv.slots % BLOCK == 0 for kv in cache)
    device = None if model.mesh is None else model.mesh.devices.flat[0]
    options = {"roomy": pallas.is_roomy(device), "interpret": interpret}

    def stack(x_BE, position_B, tables, cache, layers):
        filled = []
        for p, kind, kv in zip(layers, model.config.kinds, cache, strict=True):
            rope = tables[kind.rope] if kind.rope else None
            x_BE, kv = _layer(model.config, kind, p, x_BE, position_B, rope, kv, options)
            filled.append(kv)
        return x_BE, filled

    def run(x_BE: jax.Array, tables: Any) -> tuple[jax.Array, list[KV]]:
        over_rows: Callable[..., Any] = stack
        if model.mesh is not None and model.mesh.size > 1:
            rows, whole = PartitionSpec(meshes.RULES["batch"]), PartitionSpec()  # ty: ignore
            over_rows = jax.shard_map(
                stack, mesh=model.mesh, in_specs=(rows, rows, rows, rows, whole), out_specs=(rows, rows),
                check_vma=False,
            )  # fmt: skip
        return over_rows(x_BE.astype(model.dtype), position_B, tables, list(cache), list(layers))

    return model.step_by(token_B, position_B, run, projection_VE)


def _layer(
    c: ModelConfig, kind: LayerKind, p: Mapping[str, jax.Array], x_BE: jax.Array, position_B: jax.Array, rope: Any,
    kv: KV, options: Mapping[str, bool],
) -> tuple[jax.Array, KV]:  # fmt: skip
    run = functools.partial(product, eps=c.rms_norm_eps, **options)

    def added(x_BE: jax.Array, y: jax.Array, name: str, norm: str) -> jax.Array:
        """x + y @ w, or with a norm of the product."""
        if not c.family.sandwich_norms:
            return run(y, [p[name]], bias_O=p.get(f"{name}_bias"), residual_BO=x_BE)
        y = rms_norm(run(y, [p[name]], bias_O=p.get(f"{name}_bias")), p[norm], c.rms_norm_eps)
        return (x_BE.astype(jnp.float32) + y).astype(x_BE.dtype)

    qkv = run(x_BE, [p["qkv"]], scale_I=p["attention_norm"], bias_O=p.get("qkv_bias"))
    h, kv = append_and_attend(
        qkv.reshape(-1, c.num_kv_heads, c.num_heads // c.num_kv_heads + 2, c.head_dim), kv, position_B,
        scale=c.query_scale, window=kind.window, rope=rope, **options,
        norms=(p["q_norm"], p["k_norm"], c.rms_norm_eps) if c.family.qk_norm else None,
    )  # fmt: skip
    x_BE = added(x_BE, h, "o", "post_attention_norm")
    h = run(x_BE, [p["gate"], p["up"]], scale_I=p["mlp_norm"], activation=c.family.activation)
    return added(x_BE, h, "down", "post_mlp_norm"), kv
