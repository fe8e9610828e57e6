"""Time and peak memory of the losses over a large vocabulary, forward and backward, against others on the same work.

    python tools/bench_losses.py                            8,192 tokens, width 896, 151,936 columns; needs 24 GB
    python tools/bench_losses.py --tokens 2048 --repeat 1   a shorter look
    python tools/bench_losses.py --peers PYTHON             an interpreter with tokamax, trl and liger-kernel, too
    python tools/bench_losses.py --losses ce --dtypes float32 --chunk 256
    python tools/bench_losses.py --small                    tiny, to see that the tool runs; its ratios mean nothing

Every row is a fresh process on a CPU. `peak` is the largest resident set that Linux has seen (VmHWM, reset before it),
less what was resident with hidden states and projections in memory: the projection's gradient, which every row returns,
is in it. `XLA` is the compiler's own figure for temporaries. `seconds` is the best of --repeat runs, `CPU s` what all
threads together computed, which other work on the machine disturbs less. Hidden states and
projections are fp32, and rounded to the dtype in the products, but tokamax's op knows one dtype for everything.
`loss` is the mean over tokens; rows of one loss that do not agree to 1% are marked, and fail.

  whole logits      [tokens, vocabulary] at once: `losses.cross_entropy`, and the plain KL, differentiated by JAX
  ours              `chunked_cross_entropy`, `chunked_distillation` (forward KL)
  ours, half        the same with every second token masked
  recomputed        token chunks under jax.checkpoint, projected again in the backward pass, instead of gradients in the
                    forward sweep
  tokamax xla       tokamax.linear_softmax_cross_entropy_loss, its path for CPUs
  trl               trl.kernels: ChunkedLogProbFunction and ChunkedDivergenceFunction, whose torch path runs on CPUs
  liger             LigerFusedLinearJSDLoss(beta=0), without torch.compile; Liger's cross-entropy needs triton and a GPU

Exits with 1 where a target is missed: peak at most 1/8 of the whole logits', time no longer, and at most 0.6 times our
own for a half-masked batch (against the whole batch, ours).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = ("whole logits", "ours", "ours, half", "recomputed")
PEERS = {"ce": ("tokamax xla", "trl"), "kd": ("trl", "liger")}
MEMORY, TIME, HALF = 1 / 8, 1.0, 0.6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--chunk", type=int, help="tokens of a chunk, ours (default: the library's)")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--losses", nargs="+", choices=("ce", "kd"), default=("ce", "kd"))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows alone")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter for the other libraries' rows")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("LOSS", "DTYPE", "ROW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.small:
        arguments.tokens, arguments.hidden, arguments.vocabulary = 64, 16, 300
    sys.path.insert(0, str(ROOT))
    if arguments.child:
        print(json.dumps(measure(arguments, *arguments.child)))
        return 0
    if sys.platform != "linux":
        print("bench_losses.py reads /proc/self/status, which only Linux has.", file=sys.stderr)
        return 1
    missed = 0
    for loss in arguments.losses:
        for dtype in arguments.dtypes:
            missed += table(arguments, loss, dtype)
    return int(missed > 0)


def table(arguments: argparse.Namespace, loss: str, dtype: str) -> int:
    """Measures and prints the rows of one loss; the number of missed targets."""
    names = {"ce": "cross-entropy", "kd": "forward KL of two models"}
    print(f"\n{names[loss]}, {dtype}: {arguments.tokens:,} tokens x {arguments.hidden} -> {arguments.vocabulary:,}")
    print(f"  {'':<14}{'seconds':>9}{'ratio':>7}{'CPU s':>8}{'peak MB':>10}{'ratio':>8}{'XLA MB':>10}{'loss':>11}")
    rows = OURS[: 4 if loss == "ce" else 3] + (PEERS[loss] if arguments.peers else ())
    found: dict[str, dict[str, float]] = {}
    missed = 0
    for row in rows:
        if arguments.only and row not in arguments.only:
            continue
        result = run_child(arguments, loss, dtype, row)
        if "error" in result:
            print(f"  {row:<14}{result['error']}", flush=True)
            missed += row in OURS
            continue
        found[row] = result
        whole, notes = found.get("whole logits"), []
        seconds, peak = (result["seconds"], result["peak"])
        ratios = (seconds / whole["seconds"], peak / whole["peak"]) if whole else (float("nan"),) * 2
        if row == "ours" and whole:
            notes += [f"MISSED: peak above 1/{1 / MEMORY:.0f}"] * (not ratios[1] <= MEMORY)
            notes += ["MISSED: slower than whole logits"] * (not ratios[0] <= TIME)
        if row == "ours, half" and "ours" in found:
            share = seconds / found["ours"]["seconds"]
            notes += [f"{share:.2f} x ours" if share <= HALF else f"MISSED: {share:.2f} x ours"]
        elif whole and abs(result["loss"] / whole["loss"] - 1) > 0.01:
            notes += ["MISSED: another loss"]
        missed += sum(note.startswith("MISSED") for note in notes)
        print(
            f"  {row:<14}{seconds:>9.1f}{ratios[0]:>7.2f}{result['cpu']:>8.1f}{peak / 1e6:>10,.0f}{ratios[1]:>8.3f}"
            f"{result['xla'] / 1e6:>10,.0f}{result['loss']:>11.4f}  {', '.join(notes)}".rstrip(),
            flush=True,
        )
    return missed


def run_child(arguments: argparse.Namespace, loss: str, dtype: str, row: str) -> dict[str, Any]:
    """What `measure` finds in a process of its own, or {"error": its last line}."""
    python = sys.executable if row in OURS else arguments.peers
    command = [python, __file__, "--child", loss, dtype, row]
    for name in ("tokens", "hidden", "vocabulary", "chunk", "repeat"):
        if getattr(arguments, name) is not None:
            command += [f"--{name}", str(getattr(arguments, name))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"ended with {ran.returncode} (out of memory?)"}
    return json.loads(ran.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace, loss: str, dtype: str, row: str) -> dict[str, float]:
    """Runs one row in this process."""
    prepare = prepare_torch if row in ("trl", "liger") else prepare_jax
    del sys.argv[1:]  # tokamax parses it
    work, temporaries = prepare(arguments, loss, dtype, row)
    idle = resident("VmRSS")
    with contextlib.suppress(OSError):  # not allowed everywhere; the peak is then that of all before, too
        Path("/proc/self/clear_refs").write_text("5")
    times, processor = [], []
    for _ in range(arguments.repeat):
        started, busy = time.perf_counter(), time.process_time()
        value = work()
        times.append(time.perf_counter() - started)
        processor.append(time.process_time() - busy)
    return {
        "seconds": min(times),
        "cpu": min(processor),
        "peak": resident("VmHWM") - idle,
        "xla": temporaries,
        "loss": value,
    }


def resident(field: str) -> int:
    """Bytes: VmRSS is what is resident now, VmHWM the most there has been."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def arrays(arguments: argparse.Namespace, loss: str, row: str) -> dict[str, Any]:
    """Hidden states, projections, targets and weights as NumPy arrays, the same for every row."""
    import numpy as np

    random = np.random.default_rng(0)
    T, E, V = arguments.tokens, arguments.hidden, arguments.vocabulary

    def normal(rows: int, scale: float) -> np.ndarray:
        return random.standard_normal((rows, E), np.float32) * np.float32(scale)

    made = {"hidden": normal(T, 1.0), "projection": normal(V, E**-0.5)}
    if loss == "kd":
        made |= {"teacher_hidden": normal(T, 1.0), "teacher_projection": normal(V, E**-0.5)}
    weights = np.ones(T, np.float32)
    if row == "ours, half":
        weights[::2] = 0
    return made | {"targets": random.integers(0, V, T, np.int32), "weights": weights}


def prepare_jax(arguments: argparse.Namespace, loss: str, dtype: str, row: str) -> tuple[Callable[[], float], int]:
    """(the work, bytes of temporaries as XLA counts them)."""
    import jax
    import jax.numpy as jnp

    given = {n: jnp.array(x) for n, x in arrays(arguments, loss, row).items()}
    if row == "tokamax xla":
        given |= {"hidden": given["hidden"].astype(dtype), "projection": given["projection"].astype(dtype)}
    student = given.pop("hidden"), given.pop("projection")
    function = {"ce": jax_cross_entropies, "kd": jax_distillations}[loss](dtype, arguments.chunk)[row]
    jitted = jax.jit(jax.value_and_grad(function))
    compiled = jitted.lower(student, given).compile()

    def work() -> float:
        value, gradients = jax.block_until_ready(compiled(student, given))
        assert all(g.shape == x.shape for g, x in zip(gradients, student, strict=True))
        return float(value)

    return work, compiled.memory_analysis().temp_size_in_bytes


def jax_cross_entropies(dtype: str, chunk: int | None) -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp

    from jaxdistill.losses import chunked_cross_entropy, cross_entropy
    from jaxdistill.losses.sweep import default_chunk
    from jaxdistill.models.layers import matmul

    def mean(sums: Any) -> jax.Array:
        return sums[0] / sums[1]

    def whole(student, x):
        logits = matmul(student[0], student[1].T, dtype)
        return mean(cross_entropy(logits[None], x["targets"][None], x["weights"][None]))

    def ours(student, x):
        return mean(chunked_cross_entropy(*student, x["targets"], x["weights"], dtype=dtype, chunk=chunk))

    def recomputed(student, x):
        hidden, projection = student
        size = min(chunk or default_chunk(projection.shape[0]), hidden.shape[0])
        parts = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), (hidden, x["targets"], x["weights"]))

        @jax.checkpoint
        def one(projection, part):
            logits = matmul(part[0], projection.T, dtype)
            return cross_entropy(logits[None], part[1][None], part[2][None])[0]

        return jax.lax.scan(lambda s, part: (s + one(projection, part), None), 0.0, parts)[0] / jnp.sum(x["weights"])

    def tokamax_xla(student, x):
        import tokamax

        loss = tokamax.linear_softmax_cross_entropy_loss(
            student[0], x["targets"], student[1].T, reduction="mean", implementation="xla"
        )
        return loss.astype(jnp.float32)

    return dict(zip((*OURS, "tokamax xla"), (whole, ours, ours, recomputed, tokamax_xla), strict=True))


def jax_distillations(dtype: str, chunk: int | None) -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp

    from jaxdistill.losses import chunked_distillation
    from jaxdistill.models.layers import matmul

    def whole(student, x):
        log_p = jax.nn.log_softmax(matmul(student[0], student[1].T, dtype))
        log_q = jax.nn.log_softmax(matmul(x["teacher_hidden"], x["teacher_projection"].T, dtype))
        kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
        return jnp.sum(kl * x["weights"]) / jnp.sum(x["weights"])

    def ours(student, x):
        teacher = x["teacher_hidden"], x["teacher_projection"]
        total, count, _ = chunked_distillation(*student, *teacher, x["weights"], dtype=dtype, chunk=chunk)
        return total / count

    return {"whole logits": whole, "ours": ours, "ours, half": ours}


def prepare_torch(arguments: argparse.Namespace, loss: str, dtype: str, row: str) -> tuple[Callable[[], float], int]:
    """As `prepare_jax`; torch has no such figure, so 0."""
    import torch

    if row == "liger":
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss
    else:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    given = {n: torch.from_numpy(x) for n, x in arrays(arguments, loss, row).items()}
    student = given["hidden"].requires_grad_(), given["projection"].requires_grad_()

    def value() -> Any:
        if loss == "ce":
            columns = 32768  # TRL's own default
            found = ChunkedLogProbFunction.apply(*student, None, given["targets"].long(), 1.0, columns, None, 1.0, ())
            return -found[0].mean()
        teacher = given["teacher_hidden"], given["teacher_projection"]
        if row == "trl":
            return ChunkedDivergenceFunction.apply(*student, None, *teacher, None, 0.0)[0].mean()
        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
        return liger(*student, *teacher, given["targets"].long())

    def work() -> float:
        for leaf in student:
            leaf.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            found = value()
        found.backward()
        assert all(leaf.grad is not None for leaf in student)
        return found.item()

    return work, 0


if __name__ == "__main__":
    sys.exit(main())
