"""Makes models: from scratch, or from a Hugging Face checkpoint straight into (sharded) arrays."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from jaxdistill import hub
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Decoder
from jaxdistill.models.names import Entry, entries
from jaxdistill.parallel import mesh as meshes


def abstract_model(
    config: ModelConfig, *, dtype: Any = "float32", remat: str = "none", mesh: Mesh | None = None
) -> Decoder:
    """A model with shapes for parameters, which costs no memory."""
    return nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0), dtype=dtype, remat=remat, mesh=mesh))


def param_shardings(config: ModelConfig, mesh: Mesh | None, rules: Mapping[str, Any] = meshes.RULES) -> dict[str, Any]:
    """Where every parameter lives: a tree like the parameters', of shardings.

    Raises:
      ValueError: the mesh does not divide a parameter.
    """
    state = nnx.state(abstract_model(config))

    def of(path: tuple[str, ...], p: nnx.Param) -> Any:
        if mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return meshes.sharding(
            mesh, p.get_metadata()["axes"], shape=p.get_value().shape, name=".".join(path), rules=rules
        )

    if mesh is not None and (config.num_heads % mesh.shape["tensor"] or config.num_kv_heads % mesh.shape["tensor"]):
        raise ValueError(
            f"mesh tensor={mesh.shape['tensor']} does not divide {config.num_heads} query heads and "
            f"{config.num_kv_heads} key heads; choose a tensor size that divides both."
        )
    flat = {names: of(names, p) for path, p in nnx.to_flat_state(state) for names in [tuple(map(str, path))]}
    return unflatten(flat)


def init_model(
    config: ModelConfig, seed: int, *, dtype: Any = "float32", remat: str = "none", mesh: Mesh | None = None
) -> Decoder:
    """A model from scratch; its parameters are born sharded and do not depend on the mesh."""

    def make() -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(Decoder(config, key=jax.random.key(seed))))

    params = jax.jit(make, out_shardings=param_shardings(config, mesh))()
    return with_params(abstract_model(config, dtype=dtype, remat=remat, mesh=mesh), params)


def load_hf(
    name: str | Path,
    mesh: Mesh | None = None,
    rules: Mapping[str, Any] = meshes.RULES,
    dtype: Any = "float32",
    *,
    revision: str | None = None,
    remat: str = "none",
) -> Decoder:
    """Loads a Hugging Face checkpoint.

    Args:
      name: a folder, a hub repository id, or `demo`.
      dtype: of the matrix products' inputs; parameters are fp32.
    Raises:
      ValueError: an unsupported config, or a tensor that is missing, left over or of another shape.
    """
    folder = hub.fetch(str(name), revision)
    config = ModelConfig.from_hf(hub.read_config(folder), f"{folder}/config.json")
    shardings = param_shardings(config, mesh, rules)
    with open_tensors(folder) as tensors:
        known = {hf for entry in entries(config) for hf in entry.hf_names(config)}
        extra = sorted(set(tensors) - known - {"lm_head.weight"})  # tied checkpoints may repeat the embedding
        if extra:
            raise ValueError(
                f"{folder}: tensor {extra[0]} ({len(extra)} in all) has no place in a {config.model_type} model; "
                "it would be ignored."
            )
        abstract = nnx.to_pure_dict(nnx.state(abstract_model(config)))
        flat = {
            e.path: _load_entry(e, config, tensors, get(abstract, e.path).shape, get(shardings, e.path), folder)
            for e in entries(config)
        }
    return with_params(abstract_model(config, dtype=dtype, remat=remat, mesh=mesh), unflatten(flat))


def _load_entry(
    entry: Entry, config: ModelConfig, tensors: Mapping[str, Any], shape: tuple[int, ...], sharding: Any, folder: Path
) -> jax.Array:
    """One parameter of ours; every device's part is read from disk on its own."""
    names = entry.hf_names(config)
    expected = list(shape[1:] if entry.stacked else shape)
    if entry.transposed:
        expected.reverse()
    for name in names:
        if name not in tensors:
            raise ValueError(f"{folder}: tensor {name} is missing; the checkpoint is not complete.")
        found = tensors[name].get_shape()
        if found != expected:
            raise ValueError(f"{folder}: tensor {name} has shape {found}, and config.json asks for {expected}.")

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        inner = index[1:] if entry.stacked else index
        wanted = names[index[0]] if entry.stacked else names
        parts = [np.asarray(tensors[n][inner[::-1] if entry.transposed else inner], np.float32) for n in wanted]
        parts = [p.T for p in parts] if entry.transposed else parts
        return np.stack(parts) if entry.stacked else parts[0]

    return jax.make_array_from_callback(shape, sharding, read, dtype=jnp.float32)


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Tensor name -> lazily read slice, over all safetensors files of a checkpoint.

    Raises:
      ValueError: a file that the index names is missing, or one that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(f.name for f in folder.glob("*.safetensors"))
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for name in files:
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder}: {name} is named by the index, but it is not there; download the checkpoint again."
                )
            try:
                file = stack.enter_context(safe_open(folder / name, framework="np"))
            except SafetensorError as error:
                raise ValueError(
                    f"{folder}/{name}: not a whole safetensors file ({error}); copy or download it again."
                ) from None
            tensors.update({key: file.get_slice(key) for key in file.keys()})  # noqa: SIM118 (not a dict)
        yield tensors


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
