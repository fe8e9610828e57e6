"""How much memory it takes to load, export and check a checkpoint: peak of the process against what has to be there.

    python tools/memory.py                     a Qwen3-shaped model of 0.6B parameters (1.2 GB in bf16), a few minutes
    python tools/memory.py --keep FOLDER       keeps the checkpoint there, and takes it again the next time
    python tools/memory.py --small             a tiny one, to see that the tool runs; what is idle outweighs it by far

Every row of the table is a fresh process on a CPU, where device memory is memory of the process too. `peak` is the
largest resident set that Linux has seen (VmHWM), reset just before the work begins; `idle`, a part of it, is what the
same process holds before, with everything imported. ratio = peak / (largest file + device copy), where the device copy
is the parameters in their dtype; an export has its model in memory from the start, so it counts in the same way.

The check compares with transformers layer by layer; it is measured on a model of 0.7B parameters in 6 layers. Its rows
say what the process holds beside what is idle and beside the device copy, and that over a layer and the logits in fp32.
The last one, for comparison, loads both sides whole.
Exits with 1 if a ratio is not below its limit: 1.3, and CHECK_LIMIT for the check.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1.3
QWEN3_0_6B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
# few layers, and large ones: what the check holds at once is to be seen beside what the compiler takes
WIDE = QWEN3_0_6B | {
    "vocab_size": 32000,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 6,
    "num_attention_heads": 24,
}
SMALL = QWEN3_0_6B | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
# what is measured: the parameters' dtype, and the exported one (None: loading alone)
CASES = {
    "load, fp32 parameters": ("float32", None),
    "load, bf16 parameters": ("bfloat16", None),
    "export fp32 to fp32": ("float32", "float32"),
    "export fp32 to bf16": ("float32", "bfloat16"),
}
# what is checked: a model with parameters in this dtype; None: the files alone
CHECKS = {
    "check, from the files": None,
    "check, bf16 parameters": "bfloat16",
    "check, fp32 parameters": "float32",
    "both sides whole": "whole",
}
CHECK_LIMIT = 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that the tool runs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the checkpoint is made and kept")
    parser.add_argument("--limit", type=float, default=LIMIT, help="what every ratio has to be below (%(default)s)")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.child:
        folder, case = Path(arguments.child[0]), arguments.child[1]
        found = measure_check(folder, CHECKS[case]) if case in CHECKS else measure(folder, *CASES[case])
        print(json.dumps(found))
        return 0
    if sys.platform != "linux":
        print("memory.py reads /proc/self/status, which only Linux has.", file=sys.stderr)
        return 1
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "config.json").is_file():
            make_checkpoint(folder, *((SMALL, 1 << 18) if arguments.small else (QWEN3_0_6B, 300 << 20)))
        failed = report(folder, arguments.limit)
        wide = folder if arguments.small else folder / "wide"
        if not (wide / "config.json").is_file():
            make_checkpoint(wide, WIDE, 300 << 20)
        return max(failed, report_checks(wide, CHECK_LIMIT))


def report(folder: Path, limit: float) -> int:
    """Measures every case in a process of its own, and prints the table."""
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    print(f"{sum(files) / 1e6:,.1f} MB on disk in {len(files)} files, the largest {max(files) / 1e6:,.1f} MB; MB:\n")
    print(f"  {'':<22}{'device copy':>12}{'idle':>8}{'peak':>9}{'ratio':>8}   below {limit}{'seconds':>10}")
    failed = False
    for name in CASES:
        found = run_child(folder, name)
        ratio = found["peak"] / (max(files) + found["device"])
        failed |= not ratio < limit
        print(
            f"  {name:<22}{found['device'] / 1e6:>12,.1f}{found['idle'] / 1e6:>8,.0f}{found['peak'] / 1e6:>9,.1f}"
            f"{ratio:>8.2f}   {'yes' if ratio < limit else 'NO':<9}{found['seconds']:>10.1f}",
            flush=True,
        )
    return int(failed)


def report_checks(folder: Path, limit: float) -> int:
    """Likewise, what the export's check takes."""
    import math

    import numpy as np

    from jaxdistill import hub
    from jaxdistill.models import ModelConfig
    from jaxdistill.models.parity import token_ids
    from jaxdistill.models.tensor_files import open_tensors

    config = ModelConfig.from_hf(hub.read_config(folder))
    sizes = {name: 4 * math.prod(tensor.shape) for name, tensor in open_tensors(folder).items()}
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    logits = 4 * int(np.prod(token_ids(config).shape)) * config.vocab_size
    whole = sum(sizes.values())
    print(f"\nfp32: all {whole / 1e6:,.1f} MB, a layer {layer / 1e6:,.1f}, logits {logits / 1e6:,.1f}; MB:\n")
    print(f"  {'':<24}{'device copy':>12}{'idle':>8}{'peak':>9}{'beside':>9}{'/ (layer + logits)':>20}{'seconds':>10}")
    failed = False
    for name in CHECKS:
        found = run_child(folder, name)
        beside = found["peak"] - found["idle"] - found["device"]
        ratio = beside / (layer + logits)
        failed |= name.startswith("check") and not ratio < limit
        print(
            f"  {name:<24}{found['device'] / 1e6:>12,.1f}{found['idle'] / 1e6:>8,.0f}{found['peak'] / 1e6:>9,.1f}"
            f"{beside / 1e6:>9,.1f}{ratio:>20.2f}{found['seconds']:>10.1f}",
            flush=True,
        )
    return int(failed)


def run_child(folder: Path, case: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(folder), case]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=child_environment())
    return json.loads(ran.stdout.splitlines()[-1])


def child_environment() -> dict[str, str]:
    """One CPU device."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def measure(folder: Path, param_dtype: str, exported: str | None) -> dict[str, float]:
    """Loads (and exports) the checkpoint in this process: bytes of the device copy, idle and at the peak; seconds."""
    import time

    import jax
    import numpy as np

    from jaxdistill.export import export_hf
    from jaxdistill.models import load_hf, params_of

    jax.numpy.zeros(1).block_until_ready()  # the backend is up
    idle = resident("VmRSS")
    reset_peak()
    started = time.monotonic()
    model = load_hf(folder, param_dtype=param_dtype)
    device = sum(np.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(params_of(model)))
    if exported:
        reset_peak()
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            export_hf(
                model,
                Path(work) / "export",
                tokenizer=ROOT / "jaxdistill" / "demo" / "teacher",
                card="",
                dtype=exported,
                max_shard_bytes=max(file.stat().st_size for file in folder.glob("*.safetensors")),
            )
    return {"device": device, "idle": idle, "peak": resident("VmHWM"), "seconds": time.monotonic() - started}


def measure_check(folder: Path, params: str | None) -> dict[str, float]:
    """Compares the checkpoint with transformers in this process: as `measure`; the model is there before."""
    import time

    import jax
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from jaxdistill.models import load_hf, params_of
    from jaxdistill.models.parity import compare_files, compare_with_transformers, token_ids

    jax.numpy.zeros(1).block_until_ready()
    torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
    idle, device = resident("VmRSS"), 0
    model: Any = None
    if params in ("float32", "bfloat16"):
        model = load_hf(folder, param_dtype=params)
        device = sum(np.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(params_of(model)))
    reset_peak()
    started = time.monotonic()
    if params == "whole":
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model = load_hf(folder)
        ids = token_ids(model.config)
        ours = np.asarray(model(ids))
        with torch.no_grad():
            difference = np.abs(ours - theirs(torch.from_numpy(ids.astype(np.int64))).logits.numpy()).max()
        assert difference <= 1e-4 * np.abs(ours).max(), difference
    else:
        found = compare_files(folder) if model is None else compare_with_transformers(model, folder)
        assert found.agrees, found
    return {"device": device, "idle": idle, "peak": resident("VmHWM"), "seconds": time.monotonic() - started}


def resident(field: str) -> int:
    """Bytes: VmRSS is what is resident now, VmHWM the most there has been."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    with contextlib.suppress(OSError):  # not allowed everywhere; the peak is then that of all before, too
        Path("/proc/self/clear_refs").write_text("5")


def make_checkpoint(folder: Path, config: dict, file_bytes: int) -> None:
    """Writes a random bf16 checkpoint in files of at most `file_bytes`, a tensor at a time."""
    import ml_dtypes
    import numpy as np

    from jaxdistill.models import ModelConfig, abstract_model, params_of
    from jaxdistill.models.load import get
    from jaxdistill.models.names import entries
    from jaxdistill.models.tensor_files import INDEX, encode_header

    made = ModelConfig.from_hf(config)
    shapes = params_of(abstract_model(made))
    tensors: dict[str, tuple[int, ...]] = {}
    for entry in entries(made):
        shape = get(shapes, entry.path).shape[1 if entry.stacked else 0 :]
        tensors |= dict.fromkeys(entry.hf_names(made), shape[::-1] if entry.transposed else shape)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if shards[-1] and 2 * sum(map(np.prod, [*shards[-1].values(), shape])) > file_bytes:
            shards.append({})
        shards[-1][name] = shape
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / file, "wb") as out:
            out.write(encode_header({name: ("BF16", shape) for name, shape in shard.items()}))
            for name, shape in shard.items():
                values = random.standard_normal(shape, np.float32) * 0.02
                out.write(values.astype(ml_dtypes.bfloat16).tobytes())
                weight_map[name] = file
    total = 2 * sum(int(np.prod(shape)) for shape in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    sys.exit(main())
