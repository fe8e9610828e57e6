"""How much memory loading and exporting a checkpoint take: peak of the process against what has to be there.

    python tools/memory.py                     a Qwen3-shaped model of 0.6B parameters (1.2 GB in bf16), about a minute
    python tools/memory.py --keep FOLDER       keeps the checkpoint there, and takes it again the next time
    python tools/memory.py --small             a tiny one, to see that the tool runs; what is idle outweighs it by far

Every row of the table is a fresh process on a CPU, where device memory is memory of the process too. `peak` is the
largest resident set that Linux has seen (VmHWM), reset just before the work begins; `idle`, a part of it, is what the
same process holds before, with everything imported. ratio = peak / (largest file + device copy), where the device copy
is the parameters in their dtype; an export has its model in memory from the start, so it counts in the same way.
Exits with 1 if a ratio is not below the limit of 1.3.
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
SMALL = QWEN3_0_6B | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
# what is measured: the parameters' dtype, and the exported one (None: loading alone)
CASES = {
    "load, fp32 parameters": ("float32", None),
    "load, bf16 parameters": ("bfloat16", None),
    "export fp32 to fp32": ("float32", "float32"),
    "export fp32 to bf16": ("float32", "bfloat16"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that the tool runs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the checkpoint is made and kept")
    parser.add_argument("--limit", type=float, default=LIMIT, help="what every ratio has to be below (%(default)s)")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.child:
        print(json.dumps(measure(Path(arguments.child[0]), *CASES[arguments.child[1]])))
        return 0
    if sys.platform != "linux":
        print("memory.py reads /proc/self/status, which only Linux has.", file=sys.stderr)
        return 1
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "config.json").is_file():
            make_checkpoint(folder, *((SMALL, 1 << 18) if arguments.small else (QWEN3_0_6B, 300 << 20)))
        return report(folder, arguments.limit)


def report(folder: Path, limit: float) -> int:
    """Measures every case in a process of its own, and prints the table."""
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    print(f"{sum(files) / 1e6:,.1f} MB on disk in {len(files)} files, the largest {max(files) / 1e6:,.1f} MB; MB:\n")
    print(f"  {'':<22}{'device copy':>12}{'idle':>8}{'peak':>9}{'ratio':>8}   below {limit}{'seconds':>10}")
    failed = False
    for name in CASES:
        command = [sys.executable, __file__, "--child", str(folder), name]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=child_environment())
        found = json.loads(ran.stdout.splitlines()[-1])
        ratio = found["peak"] / (max(files) + found["device"])
        failed |= not ratio < limit
        print(
            f"  {name:<22}{found['device'] / 1e6:>12,.1f}{found['idle'] / 1e6:>8,.0f}{found['peak'] / 1e6:>9,.1f}"
            f"{ratio:>8.2f}   {'yes' if ratio < limit else 'NO':<9}{found['seconds']:>10.1f}",
            flush=True,
        )
    return int(failed)


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
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    sys.exit(main())
