"""The stage `train`: packed rows -> checkpoints. The only place that owns the clock, the seeds and the logging."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill import progress
from jaxdistill.config import RunConfig, fingerprint, to_dict
from jaxdistill.data.rows import Batches
from jaxdistill.models import abstract_model, params_of, split_params
from jaxdistill.models.student import lora_of, start_student, student_shape
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.records import RunDir, read_manifest, write_json
from jaxdistill.tokenization import load_tokenizer
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.optimizer import make_optimizer, make_schedule
from jaxdistill.train.step import init_state, make_step, put_batch, state_shardings

METRICS = "metrics.jsonl"
MODEL = "model.json"


def train(config: RunConfig, run: RunDir, shared: RunDir) -> dict[str, Any]:
    """Trains the student on the packed rows of `run`, going on from the newest checkpoint if there is one.

    Returns:
      counts: steps, tokens, trained tokens, final loss, seconds and tokens/s of this process's steps.
    """
    t = config.train
    batches = Batches(run.tokens, batch_rows=t.batch_rows, seed=config.seed)
    steps = t.steps or math.ceil((t.epochs or 0) * batches.rows / t.batch_rows)
    mesh = make_mesh(to_dict(t.mesh))
    vocabulary = len(load_tokenizer(str(run.tokenizer)))
    student, lora = student_shape(config.student, vocabulary, batches.row_tokens), lora_of(config.student)
    optimizer = make_optimizer(t.optimizer, steps)
    shardings = state_shardings(student, optimizer, mesh, lora)
    trained, frozen = split_params(params_of(start_student(config.student, student, config.seed, mesh)))
    state = init_state(trained, optimizer, shardings)
    step_fn = make_step(
        abstract_model(student, dtype=t.compute_dtype, remat=t.remat, mesh=mesh, lora=lora),
        optimizer,
        shardings,
        region_weights=(t.thinking_weight, t.answer_weight),
        micro_batches=t.micro_batches,
        seed=config.seed,
    )
    checkpoints = Checkpoints(run.checkpoints, keep=t.keep_checkpoints, identity=_identity(config, run))
    write_json(run.checkpoints / MODEL, student.to_hf())
    first = 0
    if checkpoints.latest() is not None:
        first, state = checkpoints.restore(state, shardings)
        progress.say(f"  going on from the checkpoint at step {first:,} of {steps:,}")
    parameters = sum(p.size for p in jax.tree.leaves(state["params"]))
    progress.say(
        f"  {parameters:,} parameters, {steps:,} steps of {t.batch_rows} x {batches.row_tokens} tokens "
        f"({steps * t.batch_rows / batches.rows:.1f} epochs) on {mesh.size} {jax.devices()[0].platform} device(s)"
    )
    log = MetricsLog(run.checkpoints / METRICS, after=first)
    schedule = make_schedule(t.optimizer, steps)
    shape = (t.batch_rows, batches.row_tokens)
    with ThreadPoolExecutor(1) as reader, progress.bar("train", steps, done=first) as update:

        def read(step: int):
            return reader.submit(put_batch, lambda rows: batches.rows_of(step, rows), shape, mesh)

        upcoming, pending = read(first), None
        for step in range(first, steps):
            batch = upcoming.result()
            upcoming = read(step + 1)
            state, metrics = step_fn(state, batch, frozen)
            if pending is not None:  # one step late, so that the device never waits for the log
                update(*log.add(*pending))
            pending = (step, metrics, float(schedule(step)), batch)
            if (step + 1) % t.log_every == 0 or step + 1 == steps:
                update(*log.add(*pending))
                log.write()
                pending = None
            if (step + 1) % t.checkpoint_every == 0 or step + 1 == steps:
                checkpoints.save(step + 1, state)
    checkpoints.wait()
    checkpoints.close()
    return {"parameters": parameters, "steps": steps, "epochs": steps * t.batch_rows / batches.rows} | log.summary()


class MetricsLog:
    """Sums of the metrics since the last line, and the lines themselves in `metrics.jsonl`."""

    def __init__(self, path: Path, *, after: int):
        """Keeps the lines up to step `after`: later ones belong to steps that are about to be done again."""
        self.path, self.sums, self.tokens, self.trained = path, [], 0, 0.0
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= after]
        path.write_text("".join(line + "\n" for line in kept))
        last = json.loads(kept[-1]) if kept else {}
        self.tokens, self.trained, self.seconds = (
            last.get("tokens", 0),
            last.get("trained_tokens", 0),
            last.get("seconds", 0.0),
        )
        self.last: dict[str, Any] = last
        self.begun = self.mark = time.monotonic()
        self.tokens_at_mark = self.tokens

    def add(
        self, step: int, metrics: dict[str, jax.Array], learning_rate: float, batch: dict[str, jax.Array]
    ) -> tuple[int, str]:
        """Takes one step's metrics (waiting for them); returns what the progress bar shows."""
        values = {k: float(v) for k, v in metrics.items()}
        self.tokens += int(np.count_nonzero(np.asarray(batch["segment_ids"])))
        self.trained += values["count"]
        self.sums.append(values | {"step": step + 1, "learning_rate": learning_rate})
        return step + 1, f"loss {values['loss']:.3f}"

    def write(self) -> None:
        """Writes one line: means over the steps since the last, weighted by trained tokens."""
        weight = sum(s["count"] for s in self.sums) or 1.0
        now = time.monotonic()
        self.seconds += now - self.mark
        self.last = {
            "step": self.sums[-1]["step"],
            "loss": sum(s["loss"] * s["count"] for s in self.sums) / weight,
            "accuracy": sum(s["accuracy"] * s["count"] for s in self.sums) / weight,
            "learning_rate": self.sums[-1]["learning_rate"],
            "gradient_norm": max(s["gradient_norm"] for s in self.sums),
            "tokens": self.tokens,
            "trained_tokens": round(self.trained),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round((self.tokens - self.tokens_at_mark) / max(now - self.mark, 1e-9)),
        }
        self.mark, self.tokens_at_mark, self.sums = now, self.tokens, []
        with open(self.path, "a") as file:
            file.write(json.dumps(self.last) + "\n")

    def summary(self) -> dict[str, Any]:
        """Totals, over all the processes that a resumed run took."""
        names = ("loss", "accuracy", "tokens", "trained_tokens", "seconds")
        return {("final_" + n if n in ("loss", "accuracy") else n): self.last.get(n) for n in names}


def _identity(config: RunConfig, run: RunDir) -> dict[str, Any]:
    manifest = read_manifest(run.tokens)
    return {
        "train config": fingerprint(config.train),
        "student config": fingerprint(config.student),
        "data": fingerprint(manifest["config_hash"], manifest["counts"], manifest["inputs"]) if manifest else "",
        "seed": config.seed,
    }
