"""Makes models: from scratch, or from a Hugging Face checkpoint straight into (sharded) arrays."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxdistill import hub
from jaxdistill.models.adapters import fetch_base, read_adapter, read_peft
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import AttentionOptions, Decoder
from jaxdistill.models.lora import MATRICES, Lora, join_params, merged_params, split_params
from jaxdistill.models.names import Entry, entries
from jaxdistill.models.quantize import QTYPES, quantize
from jaxdistill.models.tensor_checks import check_tensors
from jaxdistill.models.tensor_files import Tensor, open_tensors
from jaxdistill.parallel import mesh as meshes


def abstract_model(
    config: ModelConfig,
    *,
    dtype: Any = "float32",
    remat: str = "none",
    mesh: Mesh | None = None,
    lora: Lora | None = None,
    activations: Any = None,
    attention: AttentionOptions | None = None,
    layer_parts: int = 1,
) -> Decoder:
    """A model with shapes for parameters, which costs no memory; the arguments are those of `Decoder`."""
    more: dict[str, Any] = {"dtype": dtype, "remat": remat, "mesh": mesh, "lora": lora, "activations": activations}
    more |= {"attention": attention, "layer_parts": layer_parts}
    return nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0), **more))


def param_shardings(
    config: ModelConfig, mesh: Mesh | None, rules: Mapping[str, Any] = meshes.RULES, lora: Lora | None = None
) -> dict[str, Any]:
    """Where every parameter lives: a tree like the parameters', of shardings.

    Raises:
      ValueError: the mesh does not divide a parameter.
    """
    state = nnx.state(abstract_model(config, lora=lora))

    def of(path: tuple[str, ...], p: nnx.Param) -> Any:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return meshes.sharding(
            mesh, p.get_metadata()["axes"], shape=p.get_value().shape, name=".".join(path), rules=rules
        )

    ways = mesh.shape["tensor"] if mesh is not None else 1
    if config.num_heads % ways or config.num_kv_heads % ways:
        raise ValueError(
            f"mesh tensor={ways} does not divide {config.num_heads} query heads and "
            f"{config.num_kv_heads} key heads; choose a tensor size that divides both."
        )
    flat = {names: of(names, p) for path, p in nnx.to_flat_state(state) for names in [tuple(map(str, path))]}
    return unflatten(flat)


def init_model(
    config: ModelConfig,
    seed: int,
    *,
    dtype: Any = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    mesh: Mesh | None = None,
) -> Decoder:
    """A model from scratch; its parameters are born sharded and do not depend on the mesh.

    Beside the parameters, memory holds at most one of them as it was before it was quantized.
    """
    _check_param_dtype(param_dtype)
    params = new_params(config, seed, mesh, param_dtype)()
    if param_dtype in QTYPES:
        _quantize_matrices(params["layers"], param_dtype)
    return with_params(abstract_model(config, dtype=dtype, remat=remat, mesh=mesh), params)


def new_params(config: ModelConfig, seed: int, mesh: Mesh | None, param_dtype: str) -> jax.stages.Wrapped:
    """() -> the parameters of a model from scratch, each rounded where it is drawn: an fp32 copy of all would be twice
    what is kept (Qwen3-8B in bf16: a peak of 45.8 GiB instead of 15.3)."""

    def make() -> dict[str, Any]:
        made = nnx.to_pure_dict(nnx.state(Decoder(config, key=jax.random.key(seed))))
        return jax.tree.map(lambda p: p.astype(_array_dtype(param_dtype)), made)

    return jax.jit(make, out_shardings=param_shardings(config, mesh))


def _quantize_matrices(layers: dict[str, Any], param_dtype: str) -> None:
    """In place, one matrix after the other: what was quantized is freed before the next."""
    for name in [name for name in layers if name in MATRICES]:
        layers[name] = jax.block_until_ready(stored(layers.pop(name), name, param_dtype))


def with_lora(model: Decoder, lora: Lora, seed: int, rules: Mapping[str, Any] = meshes.RULES) -> Decoder:
    """The same model with adapters that change nothing yet; they are born sharded and do not depend on the mesh."""
    config = model.config

    def make() -> dict[str, Any]:
        made = nnx.to_pure_dict(nnx.state(Decoder(config, key=jax.random.key(seed), lora=lora)))
        return split_params(made)[0]

    shardings = split_params(param_shardings(config, model.mesh, rules, lora))[0]
    params = join_params(jax.jit(make, out_shardings=shardings)(), params_of(model))
    return with_params(abstract_model(config, dtype=model.dtype, remat=model.remat, mesh=model.mesh, lora=lora), params)


def merge_lora(model: Decoder) -> Decoder:
    """The same function without adapters: each is added to its matrix."""
    if model.lora is None:
        return model
    params = merged_params(params_of(model), model.lora)
    return with_params(abstract_model(model.config, dtype=model.dtype, remat=model.remat, mesh=model.mesh), params)


PARAM_DTYPES = ("float32", "bfloat16", *QTYPES)


def _check_param_dtype(name: str) -> None:
    if name not in PARAM_DTYPES:
        raise ValueError(f"param_dtype is {name!r}; choose one of {', '.join(PARAM_DTYPES)}.")


def _array_dtype(param_dtype: str) -> jnp.dtype:
    """What a parameter is first loaded as."""
    return jnp.dtype("bfloat16" if param_dtype in QTYPES else param_dtype)


def stored(p: jax.Array, name: str, param_dtype: str) -> Any:
    """A loaded parameter as it is kept: matrices of the layers may be quantized."""
    p = p.astype(_array_dtype(param_dtype))
    return quantize(p, param_dtype) if param_dtype in QTYPES and name in MATRICES else p


def load_hf(
    name: str | Path,
    mesh: Mesh | None = None,
    rules: Mapping[str, Any] = meshes.RULES,
    dtype: Any = "float32",
    *,
    param_dtype: str = "float32",
    revision: str | None = None,
    remat: str = "none",
) -> Decoder:
    """Loads a Hugging Face checkpoint, tensor by tensor, straight into (sharded) arrays.

    Beside the parameters, memory holds about one tensor of the checkpoint: what this process's devices need of it is
    read once, however many of them hold it.

    Args:
      name: a folder, a hub repository id, or `demo`; a PEFT adapter is merged into the base that it names.
      dtype: of the matrix products' inputs.
      param_dtype: of the parameters: float32; bfloat16 for a model that is not trained, which halves them; int8 or nf4
        for the frozen base of adapters, which quantizes the layers' matrices (`models/quantize.py`).
    Raises:
      ValueError: an unsupported config; a broken file or index; a tensor that is missing, left over, of another shape
        or not of floats; a mesh that does not divide a parameter.
    """
    _check_param_dtype(param_dtype)
    folder = hub.fetch(str(name), revision)
    if hub.is_adapter(folder):
        lora, base = read_peft(folder)[0], fetch_base(folder)
        model = load_hf(base, mesh, rules, dtype, param_dtype=param_dtype, remat=remat)
        adapted = with_lora(model, lora, seed=0, rules=rules)
        params, shardings = params_of(adapted), param_shardings(adapted.config, mesh, rules, lora)["layers"]
        for adapter, value in read_adapter(folder, adapted.config, lora).items():
            if value.shape != params["layers"][adapter].shape:
                raise ValueError(
                    f"{folder}: {adapter} has shape {list(value.shape)}, and {base} needs "
                    f"{list(params['layers'][adapter].shape)}; the adapter is of another base."
                )
            params["layers"][adapter] = jax.device_put(value, shardings[adapter])
        return merge_lora(with_params(adapted, params))
    config = ModelConfig.from_hf(hub.read_config(folder), f"{folder}/config.json")
    shardings = param_shardings(config, mesh, rules)
    tensors, shapes = open_tensors(folder), param_shapes(config)
    check_tensors(tensors, shapes, config, folder)
    first = _array_dtype(param_dtype)
    flat = {
        e.path: stored(
            _load_entry(e, config, tensors, shapes[e.path], get(shardings, e.path), first), e.path[-1], param_dtype
        )
        for e in entries(config)
    }
    return with_params(abstract_model(config, dtype=dtype, remat=remat, mesh=mesh), unflatten(flat))


def param_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every parameter, by its path."""
    abstract = params_of(abstract_model(config))
    return {entry.path: get(abstract, entry.path).shape for entry in entries(config)}


def _load_entry(
    entry: Entry,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    sharding: Any,
    dtype: jnp.dtype,
) -> jax.Array:
    """One parameter of ours: made empty on its devices, then filled in place, tensor by tensor of the checkpoint."""
    piece = sharding
    if isinstance(sharding, NamedSharding):  # of one tensor, as it lies in the checkpoint
        spec = sharding.spec[1:] if entry.stacked else sharding.spec[:]
        piece = NamedSharding(sharding.mesh, PartitionSpec(*(spec[::-1] if entry.transposed else spec)))
    put = _put_into(sharding, entry.stacked, entry.transposed)
    array = jnp.zeros(shape, dtype, device=sharding)
    for at, name in enumerate(entry.hf_names(config)):
        value = _read_sharded(tensors[name], piece)
        array.block_until_ready()  # else tensors would be read faster than they are put in place
        array = put(array, value, at)
    return array.block_until_ready()


@functools.cache
def _put_into(sharding: Any, stacked: bool, transposed: bool) -> Any:
    """(array, tensor, layer) -> the same array, with the tensor in its place; the array's memory is reused."""

    def put(array: jax.Array, tensor: jax.Array, layer: jax.Array) -> jax.Array:
        value = (tensor.T if transposed else tensor).astype(array.dtype)
        starts = (layer if stacked else 0, *(0,) * (array.ndim - 1))
        return jax.lax.dynamic_update_slice(array, value[None] if stacked else value, starts)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


def _read_sharded(tensor: Tensor, sharding: Any) -> jax.Array:
    """One tensor as it lies in the checkpoint, over its devices.

    What this process's devices hold of it is read at once: replicas share it, and parts of rows cost no extra reads.
    """
    rank = range(len(tensor.shape))
    indices = [
        [s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=True)]
        for index in sharding.addressable_devices_indices_map(tensor.shape).values()
    ]
    first = [min(index[i][0] for index in indices) for i in rank]
    end = [max(index[i][1] for index in indices) for i in rank]
    data = tensor.read(tuple(map(slice, first, end)))
    if data.dtype == np.float16:
        data = data.astype(np.float32)  # exact, also for subnormal numbers, which accelerators may flush to 0

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = [s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=True)]
        return data[tuple(slice(a - start, b - start) for (a, b), start in zip(bounds, first, strict=True))]

    return jax.make_array_from_callback(tensor.shape, sharding, part, dtype=data.dtype)


def with_params(model: Decoder, params: dict[str, Any]) -> Decoder:
    """The same model with other parameters (a plain nested dict of arrays)."""
    return nnx.merge(nnx.graphdef(model), params)


def params_of(model: Decoder) -> dict[str, Any]:
    """The parameters as a plain nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(model))


def get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def unflatten(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
