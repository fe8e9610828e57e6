"""What is measured while training: sums between two lines, `metrics.jsonl`, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxdistill.config import RunConfig
from jaxdistill.parallel import processes
from jaxdistill.train.contrastive import METRICS as CONTRASTED
from jaxdistill.train.flops import FlopCounter, mfu
from jaxdistill.train.on_policy import METRICS as ON_POLICY

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
BAD_STEPS = "bad_steps.jsonl"
TENSORBOARD = "tensorboard"
DISTILLED = ("ce", "kd", "teacher_nll")
"""Means that a training with a teacher has beside its loss."""
# what a checkpoint carries on, so that a resumed run logs what an undisturbed one does
_CARRIED = ("window", "tokens", "trained", "sampled_tokens", "seconds")


class MetricsLog:
    """Sums of the metrics since the last line; a line takes their means, weighted by trained tokens."""

    def __init__(self, flops: FlopCounter, peak: float | None, devices: int):
        self._flops, self._peak, self._devices = flops, peak, devices
        self.window: list[dict[str, float]] = []
        self.tokens, self.trained, self.sampled_tokens, self.seconds = 0, 0, 0, 0.0
        self.last: dict[str, Any] = {}
        self._begun = self._mark = time.monotonic()
        self._timed_tokens, self._timed_flops, self._waited, self._compiled = 0, 0.0, 0.0, False
        self._sampled: float | None = None

    def add(self, step: int, values: dict[str, float]) -> str:
        """Takes one step's metrics, those of step `step` from 0; returns a note for people."""
        self.tokens += int(values["tokens"])
        self.sampled_tokens += int(values.get("sampled_tokens", 0))
        self.window.append(values | {"step": step + 1})
        if not values["bad"]:
            self.trained += round(values["count"])
        if self._compiled:
            self._timed_tokens += int(values["tokens"])
            self._timed_flops += self._flops.of(values["tokens"], values["pairs"])
        else:  # speeds are those of compiled steps
            self._compiled = True
            self._start_clock()
        note = f"loss {values['loss']:.3f}"
        if "tokens_per_second" in self.last:
            note += f", {self.last['tokens_per_second']:,} tokens/s"
        if self.last.get("mfu") is not None:
            note += f", MFU {self.last['mfu']:.1%}"
        return note

    def waited(self, seconds: float) -> None:
        """The loop had to wait for data."""
        self._waited += seconds if self._compiled else 0.0

    def sampled(self, seconds: float) -> None:
        """The student was sampled from."""
        self._sampled = (self._sampled or 0.0) + (seconds if self._compiled else 0.0)

    def pause(self) -> Callable[[], None]:
        """Stops the clock of speeds, for an evaluation; call what it returns to go on."""
        begun = time.monotonic()

        def resume() -> None:
            self._mark += time.monotonic() - begun

        return resume

    def line(self) -> dict[str, Any]:
        """One line: means over the good steps since the last one."""
        good = [s for s in self.window if not s["bad"]] or self.window
        weight = sum(s["count"] for s in good) or 1.0
        now = time.monotonic()
        elapsed = max(now - self._mark, 1e-9)
        self.last = {
            "step": int(self.window[-1]["step"]),
            "loss": sum(s["loss"] * s["count"] for s in good) / weight,
            "accuracy": sum(s["accuracy"] * s["count"] for s in good) / weight,
            "learning_rate": self.window[-1]["learning_rate"],
            "gradient_norm": max(s["gradient_norm"] for s in good),
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "skipped": int(self.window[-1]["skipped"]),
            "seconds": round(self._total_seconds(now), 3),
        }
        if self.sampled_tokens:
            self.last["sampled_tokens"] = self.sampled_tokens
        for name in (*DISTILLED, *CONTRASTED, *ON_POLICY):
            having = [s for s in good if name in s]  # steps before `on_policy.after` have no rollouts
            if having:
                counted = sum(s["count"] for s in having) or 1.0
                self.last[name] = sum(s[name] * s["count"] for s in having) / counted
        if self._timed_tokens:
            share = mfu(self._timed_flops, elapsed, self._peak, self._devices)
            self.last |= {
                "tokens_per_second": round(self._timed_tokens / elapsed),
                "mfu": None if share is None else round(share, 4),
                "data_wait_share": round(self._waited / elapsed, 5),
            }
            if self._sampled is not None:
                self.last["sampling_share"] = round(self._sampled / elapsed, 5)
        self.last |= memory()
        self.window = []
        self._start_clock()
        return self.last

    def _start_clock(self) -> None:
        self._mark = time.monotonic()
        self._timed_tokens, self._timed_flops, self._waited = 0, 0.0, 0.0
        self._sampled = None if self._sampled is None else 0.0

    def _total_seconds(self, now: float) -> float:
        return self.seconds + now - self._begun

    def carried(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        found = {name: getattr(self, name) for name in _CARRIED}
        return found | {"seconds": self._total_seconds(time.monotonic()), "last": self.last}

    def carry_on(self, found: dict[str, Any]) -> None:
        """Goes on from what a checkpoint kept."""
        for name in (*_CARRIED, "last"):  # one that is newer than the checkpoint begins here
            setattr(self, name, found.get(name, getattr(self, name)))
        self.last = {k: v for k, v in self.last.items() if k not in ("tokens_per_second", "mfu")}

    def summary(self) -> dict[str, Any]:
        """Totals, over all the processes that a resumed run took."""
        names = ("loss", "accuracy", "tokens", "trained_tokens", "seconds", "skipped")
        found = {("final_" + n if n in ("loss", "accuracy") else n): self.last.get(n) for n in names}
        return found | ({"sampled_tokens": self.sampled_tokens} if self.sampled_tokens else {})


class Outputs:
    """Where the numbers go: JSON lines always, TensorBoard and Weights & Biases if the config asks for them.

    One process writes. A disk that is full or read-only is said once, and training goes on without the lines.
    """

    def __init__(self, folder: Path, config: RunConfig, *, after: int, say: Callable[[str], None]):
        """Keeps the lines up to step `after`: later ones belong to steps that are about to be done again.

        Raises:
          ValueError: Weights & Biases is asked for and not installed.
        """
        self._folder, self._say, self._failed = folder, say, False
        self._board: Any = None
        self._wandb: Any = None
        self._writes = processes.is_first()
        if not self._writes:
            return
        for name in (METRICS, EVALUATIONS, BAD_STEPS):
            _keep_until(folder / name, after)
        if config.train.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=after + 1, flush_secs=30)
        if config.train.wandb is not None:
            self._wandb = _start_wandb(config, folder)

    def write(self, name: str, line: dict[str, Any]) -> None:
        """Appends `line`, which has a `step`, to the file `name`, and draws its numbers."""
        if not self._writes:
            return
        # JSON has no NaN
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            with open(self._folder / name, "a") as file:
                file.write(json.dumps(line) + "\n")
            self._draw(name.removesuffix(".jsonl"), line)
        except OSError as error:
            if not self._failed:
                self._say(f"  WARNING: {self._folder / name}: {error.strerror}; training goes on without its lines.")
            self._failed = True

    def _draw(self, group: str, line: dict[str, Any]) -> None:
        numbers = {f"{group}/{k}": v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _keep_until(path: Path, step: int) -> None:
    """Leaves a file's whole lines up to a step; a process that was killed may have torn the last one."""
    if not path.is_file():
        return
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))


def _start_wandb(config: RunConfig, folder: Path) -> Any:
    try:
        import wandb  # pyrefly: ignore
    except ImportError:
        raise ValueError(
            f"train.wandb: {config.train.wandb} needs Weights & Biases; pip install wandb, or drop the key."
        ) from None
    # the same name goes on with the same run after a restart
    name = f"{config.name}-{folder.absolute().parent.name}"
    return wandb.init(project=config.train.wandb, name=name, id=name, resume="allow", dir=str(folder))


def memory() -> dict[str, float | None]:
    """Peak memory in GiB: of this process on its host, and of its fullest device (None where JAX cannot say)."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    stats: Sequence[dict[str, Any] | None] = [d.memory_stats() for d in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return {
        "host_memory_gib": round(host / (1 << 30), 3),
        "device_memory_gib": round(max(peaks) / (1 << 30), 3) if peaks else None,
    }
