"""What transformers computes from a checkpoint's files, with one matrix of them in memory at a time.

Transformers' own classes and their own forward pass, in fp32 on the CPU; the files are read by the safetensors library.
Parameters are made without memory. A module's are read just before it runs, and let go right after; of the embedding,
only the rows that are looked up; the vocabulary projection in blocks of rows.

A folder with adapters is computed by PEFT, on the base that it names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.models.adapters import WEIGHTS, base_of
from jaxdistill.models.layerwise import HEAD_ROWS, KEPT, Outputs
from jaxdistill.models.names import HEAD
from jaxdistill.models.tensor_files import Tensor, open_tensors, read_header


def reference(folder: Path, ids_BT: np.ndarray) -> Outputs:
    """
    Raises:
      ValueError: torch (or PEFT, for adapters) is not installed, or transformers does not know the model or wants
        parameters that the files do not hold.
    """
    torch = _import("torch", folder)
    base = base_of(folder)
    model = _made(base, torch)
    tensors = open_tensors(base)
    _feed(model, tensors, base, torch)
    hidden: list[np.ndarray] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        hidden.append(found[:, -KEPT:].numpy().copy())

    for module in (model.get_input_embeddings(), *model.model.layers):
        module.register_forward_hook(keep)
    whole: Any = model
    if base != folder:
        whole = _import("peft", folder).PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True).eval()
        _feed_adapters(whole, read_header(folder / WEIGHTS), folder, torch)
    with torch.no_grad():
        logits = whole(input_ids=torch.from_numpy(ids_BT.astype(np.int64)), use_cache=False).logits
    return Outputs(hidden, logits.numpy())


def _import(name: str, folder: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"{folder}: {name} is not installed, and without it transformers cannot compute what this model gives; "
            "pip install 'jaxdistill[torch]', or switch the check off."
        ) from None


def _made(folder: Path, torch: Any) -> Any:
    """Transformers' model of a folder's config: buffers are real, parameters have no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        with _parameters_on_meta(torch):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except (OSError, KeyError) as error:
        raise ValueError(f"{folder}: transformers does not load it: {' '.join(str(error).split())[:300]}") from None


@contextlib.contextmanager
def _parameters_on_meta(torch: Any) -> Iterator[None]:
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def moved(_module: Any, _name: str, parameter: Any) -> Any:
        # a parameter that is shared stays one
        return None if parameter is None or parameter.is_meta else _empty(parameter, torch)

    hook = register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        hook.remove()


def _empty(parameter: Any, torch: Any) -> Any:
    return torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


# ------------------------------------------------------------------------------------- parameters while they are used


def _feed(model: Any, tensors: Mapping[str, Tensor], folder: Path, torch: Any) -> None:
    """Has every module read its parameters before it runs, and drop them after."""
    embedding = model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    head = names.pop(model.get_output_embeddings())
    # transformers keeps a head of its own where the file has one, whether or not the config says that there is none
    tied = model.config.get_text_config().tie_word_embeddings and HEAD not in tensors
    table = f"{names.pop(embedding)}.weight"
    _feed_rows(embedding, _find(tensors, table, folder), torch)
    setattr(model, head, _head(_find(tensors, table if tied else f"{head}.weight", folder), torch))
    for module, path in names.items():
        own = {name: f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
        if own:
            _feed_all(module, {name: _find(tensors, full, folder) for name, full in own.items()}, torch)


def _feed_adapters(whole: Any, tensors: Mapping[str, Tensor], folder: Path, torch: Any) -> None:
    """PEFT has put its modules beside those of the base, and their parameters to where the base's are: nowhere."""
    for path, module in whole.named_modules():
        own = {name: f"{path}.{name}".replace(".default.", ".") for name, _ in module.named_parameters(recurse=False)}
        if path.endswith(".default") and own:
            _feed_all(module, {name: _find(tensors, full, folder) for name, full in own.items()}, torch)


def _find(tensors: Mapping[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{folder}: transformers' model has a parameter {name}, and no file holds it.")
    return tensors[name]


def _read(tensor: Tensor, rows: slice | None = None) -> Any:
    """fp32; the file is mapped only as long as the tensor lives."""
    from safetensors import safe_open

    with safe_open(tensor.file, framework="pt") as file:
        return (file.get_tensor(tensor.name) if rows is None else file.get_slice(tensor.name)[rows]).float()


def _feed_all(module: Any, own: Mapping[str, Tensor], torch: Any) -> None:
    empty = {name: getattr(module, name) for name in own}

    def fill(_module: Any, _args: Any) -> None:
        for name, tensor in own.items():
            setattr(module, name, torch.nn.Parameter(_read(tensor), requires_grad=False))

    def drop(_module: Any, _args: Any, _output: Any) -> None:
        for name, parameter in empty.items():
            setattr(module, name, parameter)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)


def _feed_rows(embedding: Any, table: Tensor, torch: Any) -> None:
    """The rows that are looked up take the table's place, under new numbers."""
    empty = embedding.weight
    embedding.padding_idx = None  # of gradients alone; it need not be one of the new numbers

    def fill(_module: Any, args: Any) -> Any:
        unique, numbers = torch.unique(args[0], return_inverse=True)
        rows = torch.cat([_read(table, slice(i, i + 1)) for i in unique.tolist()])
        embedding.weight = torch.nn.Parameter(rows, requires_grad=False)
        return (numbers, *args[1:])

    def drop(_module: Any, _args: Any, _output: Any) -> None:
        embedding.weight = empty

    embedding.register_forward_pre_hook(fill)
    embedding.register_forward_hook(drop)


def _head(table: Tensor, torch: Any) -> Any:
    """A vocabulary projection that reads its rows block by block."""

    class Head(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            logits = x.new_empty((*x.shape[:-1], table.shape[0]))
            for start in range(0, table.shape[0], HEAD_ROWS):
                rows = slice(start, min(start + HEAD_ROWS, table.shape[0]))
                logits[..., rows] = torch.nn.functional.linear(x, _read(table, rows))
            return logits

    return Head()
