"""Makes models: from scratch, or from a Hugging Face checkpoint straight into (sharded) arrays."""

from __future__ import annotations

import functools
import math
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
from jaxdistill.models.names import EMBEDDING, HEAD, Entry, entries
from jaxdistill.models.quantize import QTYPES, quantize
from jaxdistill.models.tensor_files import BLOCK, FLOATS, Tensor, open_tensors
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
    abstract = params_of(abstract_model(config))
    tensors = open_tensors(folder)
    shapes = {e.path: get(abstract, e.path).shape for e in entries(config)}
    check_tensors(tensors, config, folder)
    first = _array_dtype(param_dtype)
    flat = {
        e.path: stored(
            _load_entry(e, config, tensors, shapes[e.path], get(shardings, e.path), first), e.path[-1], param_dtype
        )
        for e in entries(config)
    }
    return with_params(abstract_model(config, dtype=dtype, remat=remat, mesh=mesh), unflatten(flat))


def check_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Raises ValueError unless the checkpoint holds exactly the model's tensors, before any of them is loaded."""
    expected: dict[str, tuple[int, ...]] = {}
    abstract = params_of(abstract_model(config))
    for entry in entries(config):
        shape = get(abstract, entry.path).shape[1 if entry.stacked else 0 :]
        expected |= dict.fromkeys(entry.hf_names(config), shape[::-1] if entry.transposed else shape)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(
            f"{folder}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are); "
            "the checkpoint is not complete, download or export it again."
        )
    for name, shape in expected.items():
        found = tensors[name]
        if found.dtype not in FLOATS:
            raise ValueError(
                f"{found.file}: tensor {name} is {found.dtype}, and weights must be {'/'.join(FLOATS)}; "
                "take the checkpoint that is not quantized."
            )
        if found.shape != shape:
            raise ValueError(
                f"{found.file}: tensor {name} has shape {list(found.shape)}, and config.json asks for {list(shape)}; "
                "the two are not of one model."
            )
    # tied checkpoints may repeat the embedding; old ones hold the rotary frequencies, which follow from the config
    extra = sorted(n for n in set(tensors) - set(expected) - {HEAD} if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise ValueError(
            f"{tensors[extra[0]].file}: tensor {extra[0]} ({len(extra)} such in all) has no place in a "
            f"{config.model_type} model and would be ignored; config.json is of another model."
        )
    if config.tie_embeddings and HEAD in tensors and not _same(tensors[HEAD], tensors[EMBEDDING]):
        raise ValueError(
            f"{tensors[HEAD].file}: {HEAD} differs from {EMBEDDING}, and config.json says tie_word_embeddings: true; "
            "some programs would use the one and some the other. Set it to false if the model has a head of its own, "
            f"or take {HEAD} out of the file."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; memory beside them stays below two blocks."""
    if a.shape != b.shape:
        return False
    at_once = max(1, BLOCK // (4 * math.prod(a.shape[1:])))
    return all(
        np.array_equal(a.read(rows).astype(np.float32), b.read(rows).astype(np.float32))
        for start in range(0, a.shape[0], at_once)
        for rows in [(slice(start, start + at_once), *[slice(None)] * len(a.shape[1:]))]
    )


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
