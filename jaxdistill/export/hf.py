"""A student in Hugging Face format: safetensors with an index, configs, tokenizer, chat template and model card.

Any number of processes may hold the model. All of them call `export_hf` and take part in gathering every tensor; the
first one writes, and the others return when the folder has its name, or raise what stopped the writing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxdistill import hub
from jaxdistill.export.writer import DTYPES, Piece, agree, by_the_writer, pieces_of, plan_files, write_file
from jaxdistill.models import Decoder, ModelConfig
from jaxdistill.models.adapters import CONFIG, WEIGHTS, adapter_entries, to_peft
from jaxdistill.models.tensor_files import INDEX
from jaxdistill.records import atomic_folder
from jaxdistill.served import Sample, check_served
from jaxdistill.tokenization import end_of_turn, load_tokenizer

_NO_TEXTS = Sample()
Check = Callable[[Path | None], Any]
"""Called with the folder that is about to get its name, or with None in processes that do not write."""
TOKENIZER_SUFFIXES = (".jinja", ".txt", ".model")
TOKENIZER_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
# of a base config: what ours says in other words, what was done to its weights, and code that does not come along
_DROPPED = ("rope_theta", "rope_scaling", "rope_parameters", "quantization_config", "auto_map", "_name_or_path")


def export_hf(
    model: Decoder,
    path: str | Path,
    *,
    tokenizer: str | Path,
    card: str,
    dtype: str = "float32",
    max_shard_bytes: int = 4 << 30,
    check: Check | None = None,
    texts: Sample | None = _NO_TEXTS,
    base_config: Mapping[str, Any] | None = None,
    base_generation_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint that transformers and vLLM load.

    The folder is written beside its place and renamed last, so that nothing partial is ever found there. Beside the
    model, memory holds about one tensor. With several processes every one has to call this, with the same arguments.

    Args:
      path: on a disk that the first process sees.
      tokenizer: folder with the tokenizer's files, which are copied as they are.
      dtype: `float32`, or `bfloat16` (rounded to nearest, ties to even).
      max_shard_bytes: a file holds at most this many bytes of tensors, or one tensor.
      check: called before the folder is renamed, in every process: with the folder in the one that writes, with None in
        the others. What it raises there stops the export, what it returns is passed on.
      texts: of the run, for which transformers' tokenizer has to give the ids of `tokenizer`, as it always has to for a
        few of ours; None: nothing is compared.
      base_config: `config.json` of the checkpoint that the model was loaded from, whose other keys are kept.
      base_generation_config: its `generation_config.json`, likewise.
    Returns:
      {"tensors", "bytes", "files", "check"}.
    Raises:
      ValueError: the disk is full or read-only, the tokenizer or an argument is unfit; nothing was exported then.
    """
    path, tokenizer = Path(path).expanduser(), Path(tokenizer).expanduser()
    if dtype not in DTYPES:
        raise ValueError(f"export: dtype {dtype!r}; choose {' or '.join(DTYPES)}.")
    if max_shard_bytes < 1:
        raise ValueError(f"export: max_shard_bytes is {max_shard_bytes}; a file must hold something.")
    files = plan_files(model, DTYPES[dtype], max_shard_bytes)
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            if not tokenizer.is_dir():
                raise ValueError(f"{tokenizer}: no such folder; give the tokenizer's.")
            return stack.enter_context(atomic_folder(path))

        def finish() -> None:
            assert folder is not None
            _write_index(folder, files)
            _write_configs(model.config, folder, tokenizer, dtype, base_config, base_generation_config)
            _write_texts(folder, tokenizer, card)
            if texts is not None:
                check_served(folder, load_tokenizer(str(tokenizer)), texts)

        folder = by_the_writer(begin)
        for name, pieces in files.items():
            write_file(folder / name if folder else None, pieces)
        by_the_writer(finish)
        checked = _checked(check, folder)
        by_the_writer(stack.close)  # which gives the folder its name
    return {
        "tensors": sum(map(len, files.values())),
        "bytes": sum(piece.bytes for pieces in files.values() for piece in pieces),
        "files": len(files),
        "check": checked,
    }


def export_adapter(
    model: Decoder,
    path: str | Path,
    *,
    base: str,
    revision: str | None,
    tokenizer: str | Path,
    card: str,
    check: Check | None = None,
    texts: Sample | None = _NO_TEXTS,
) -> dict[str, Any]:
    """Writes the adapters of a model alone, as PEFT loads them, in fp32; otherwise like `export_hf`.

    Args:
      base: the checkpoint that the adapters were trained on: a hub repository id, or a folder, which is written down
        absolute: PEFT looks for a relative one in the working folder of whoever loads the adapter.
    """
    assert model.lora is not None
    path, tokenizer = Path(path).expanduser(), Path(tokenizer).expanduser()
    pieces = sorted(
        pieces_of(model, adapter_entries(model.config, model.lora), DTYPES["float32"]), key=lambda piece: piece.name
    )
    settings = to_peft(model.lora, _place_of(base), None if _is_folder(base) else revision)
    with contextlib.ExitStack() as stack:
        folder = by_the_writer(lambda: stack.enter_context(atomic_folder(path)))
        write_file(folder / WEIGHTS if folder else None, pieces)

        def finish() -> None:
            assert folder is not None
            (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
            _write_texts(folder, tokenizer, card)
            if texts is not None:
                check_served(folder, load_tokenizer(str(tokenizer)), texts)

        by_the_writer(finish)
        checked = _checked(check, folder)
        by_the_writer(stack.close)
    return {"tensors": len(pieces), "bytes": sum(piece.bytes for piece in pieces), "files": 1, "check": checked}


def _is_folder(base: str) -> bool:
    return hub.local(base).is_dir()


def _place_of(base: str) -> str:
    """Hub names stay, and folders are found from wherever the adapter is loaded."""
    return str(hub.local(base).resolve()) if _is_folder(base) else base


def _checked(check: Check | None, folder: Path | None) -> Any:
    """What the check returns here; every process raises what it raises in the first."""
    error: Exception | None = None
    result = None
    try:
        result = check(folder) if check else None
    except Exception as failed:
        error = failed
    agree(error)
    return result


# --------------------------------------------------------------------------------------------------- other files


def _write_texts(folder: Path, tokenizer: Path, card: str) -> None:
    (folder / "README.md").write_text(card)
    for file in sorted(tokenizer.iterdir()):
        if file.suffix in TOKENIZER_SUFFIXES or file.name in TOKENIZER_JSON:
            shutil.copyfile(file, folder / file.name)


def _write_index(folder: Path, files: Mapping[str, list[Piece]]) -> None:
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(piece.bytes for pieces in files.values() for piece in pieces)},
            "weight_map": {piece.name: name for name, pieces in files.items() for piece in pieces},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_configs(
    model: ModelConfig,
    folder: Path,
    tokenizer: Path,
    dtype: str,
    base: Mapping[str, Any] | None,
    base_generation: Mapping[str, Any] | None,
) -> None:
    loaded = load_tokenizer(str(tokenizer))
    ours = model.to_hf()
    base = base or {}
    if base.get("model_type", ours["model_type"]) != ours["model_type"]:
        raise ValueError(
            f"export: base_config is of a {base['model_type']} model, and this is a {ours['model_type']}; "
            "give the config.json that the model was loaded from."
        )
    tokens = {name: getattr(loaded, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    end = end_of_turn(loaded)
    kept = {key: value for key, value in base.items() if key not in _DROPPED}
    config = kept | ours | _special_tokens(tokens, base, end) | {"dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = dict(base_generation or {})
    found = _special_tokens(tokens, generation or base, end)
    generation |= {key: value for key, value in found.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _special_tokens(ours: Mapping[str, int | None], base: Mapping[str, Any], end: int) -> dict[str, Any]:
    """The base's ids where it has the tokenizer's eos among its own, else it is of another tokenizer: ours.

    Args:
      end: the token that ends a response, at which generation has to stop.
    """
    eos = base.get("eos_token_id")
    stops = eos if isinstance(eos, list) else [eos]
    if not {ours["eos_token_id"], end} & set(stops):
        found, stops = dict(ours), [ours["eos_token_id"]]
    else:
        found = {name: value if base.get(name) is None else base[name] for name, value in ours.items()}
    return found if end in stops else found | {"eos_token_id": [*stops, end]}
