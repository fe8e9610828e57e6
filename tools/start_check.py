"""What it costs to compare a checkpoint with transformers before it is started from (`student.check`).

    python tools/start_check.py                     measures it on a random bf16 checkpoint in the shape of Qwen2.5-0.5B
    python tools/start_check.py --small             on a tiny one, to see that the tool runs
    python tools/start_check.py --plan NAME ...     computes it for published shapes, whose weights are not needed

Measured in processes of their own on a CPU: seconds, and the most memory beside what is idle (with torch, transformers
and JAX imported) and beside the model, where one is loaded. `files`: both sides are computed from the files. `model`:
ours is, where it lies, in fp32. `again`: the same content once more, which is only looked up.

Planned: one layer in fp32 on either side, the logits, and the bytes that are read. Each side reads every layer once; of
the embedding only the rows of a few tokens, and the head.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
QWEN25_0_5B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
SMALL = QWEN25_0_5B | {"vocab_size": 512, "hidden_size": 112, "intermediate_size": 192, "num_hidden_layers": 2}
CASES = {"files": False, "model": True}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that the tool runs")
    parser.add_argument("--plan", nargs="+", metavar="NAME", help="published models, such as Qwen3-8B")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(Path(arguments.child[0]), CASES[arguments.child[1]])))
        return 0
    if arguments.plan:
        return plan(arguments.plan)
    if sys.platform != "linux":
        print("start_check.py reads /proc/self/status, which only Linux has.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder), SMALL if arguments.small else QWEN25_0_5B)
    return 0


def report(folder: Path, shape: dict) -> None:
    import memory

    memory.make_checkpoint(folder, shape, 300 << 20)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{size / 1e6:,.1f} MB on disk; MB:\n")
    print(f"  {'':<8}{'model':>10}{'idle':>8}{'beside':>10}{'seconds':>10}{'again':>8}")
    for name in CASES:
        command = [sys.executable, __file__, "--child", str(folder), name]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=memory.child_environment())
        found = json.loads(ran.stdout.splitlines()[-1])
        beside = found["peak"] - found["idle"] - found["model"]
        print(
            f"  {name:<8}{found['model'] / 1e6:>10,.1f}{found['idle'] / 1e6:>8,.0f}{beside / 1e6:>10,.1f}"
            f"{found['seconds']:>10.1f}{found['again']:>8.2f}",
            flush=True,
        )


def measure(folder: Path, loaded: bool) -> dict[str, float]:
    """Bytes of the model, idle and at the peak; seconds of the first comparison and of the second."""
    import jax
    import memory
    import torch
    import transformers.modeling_utils  # noqa: F401

    from jaxdistill.models import load_hf, params_of
    from jaxdistill.models.start import check_start

    jax.numpy.zeros(1).block_until_ready()
    torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
    idle, size, model = memory.resident("VmRSS"), 0, None
    if loaded:
        model = load_hf(folder)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params_of(model)))
    memory.reset_peak()
    with tempfile.TemporaryDirectory() as home, contextlib.redirect_stdout(open(os.devnull, "w")):
        begun = time.monotonic()
        found = check_start(folder, model, seen=Path(home) / "checked.json")
        first = time.monotonic()
        assert found is not None and check_start(folder, model, seen=Path(home) / "checked.json") is None
        again = time.monotonic() - first
    return {"model": size, "idle": idle, "peak": memory.resident("VmHWM"), "seconds": first - begun, "again": again}


def plan(names: list[str]) -> int:
    """Prints what the comparison of published models holds and reads."""
    from jaxdistill.models.published import PUBLISHED

    unknown = [name for name in names if name not in PUBLISHED]
    if unknown:
        print(f"{unknown[0]} is not known; known are {', '.join(PUBLISHED)}.", file=sys.stderr)
        return 1
    print(
        f"GB:\n\n  {'':<32}{'weights (bf16)':>16}{'a layer (fp32)':>16}{'logits':>9}{'held':>8}{'read':>8}{'TFLOP':>8}"
    )
    for name in names:
        found = {key: value / 1e9 for key, value in planned(PUBLISHED[name][0]).items()}
        print(
            f"  {name:<32}{found['weights']:>16.1f}{found['layer']:>16.2f}{found['logits']:>9.3f}{found['held']:>8.2f}"
            f"{found['read']:>8.1f}{found['flop'] / 1e3:>8.1f}"
        )
    return 0


def planned(shape: dict) -> dict[str, float]:
    """Bytes: of the weights as they are stored (bf16), of a layer in fp32, of the logits, held at once, and read; and
    the operations of the matrix products.

    Held where both sides are computed from the files: ours holds a layer as it is stored and in fp32; transformers' one
    in both, one module at a time, which this counts as a whole layer; both sides' logits. From a model, ours needs the
    layer in fp32 alone, over all devices that share it, and reads nothing.
    """
    from jaxdistill.models import ModelConfig
    from jaxdistill.models.load import param_shapes
    from jaxdistill.models.parity import token_ids

    config = ModelConfig.from_hf(shape)
    sizes = {path: math.prod(size) for path, size in param_shapes(config).items()}
    layer = sum(size for path, size in sizes.items() if path[0] == "layers") // config.num_layers
    rows = config.vocab_size * config.hidden_size
    logits = 4 * math.prod(token_ids(config).shape) * config.vocab_size
    each = 2 * (layer * config.num_layers + rows)
    # the two sides do not run at once
    return {
        "weights": 2 * sum(sizes.values()),
        "layer": 4 * layer,
        "logits": logits,
        "held": (4 + 2) * layer + 2 * logits,
        "read": 2 * each,
        "flop": 2 * each * math.prod(token_ids(config).shape),  # a multiplication and an addition, on both sides
    }


if __name__ == "__main__":
    sys.exit(main())
