"""The stage `train`: packed rows -> checkpoints. The only place that owns the clock, the seeds and the logging."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import jax

from jaxdistill import progress
from jaxdistill.config import ProfileConfig, RunConfig
from jaxdistill.hub import SHAPE
from jaxdistill.parallel import processes
from jaxdistill.records import RunDir, write_json
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.evaluation import Evaluator
from jaxdistill.train.feed import read_ahead
from jaxdistill.train.flops import FlopCounter, peak_flops
from jaxdistill.train.gradients import Batch
from jaxdistill.train.metrics import BAD_STEPS, EVALUATIONS, METRICS, MetricsLog, Outputs
from jaxdistill.train.setup import Training, describe, set_up, start_state
from jaxdistill.train.step import ROLLOUTS


def train(config: RunConfig, run: RunDir, shared: RunDir) -> dict[str, Any]:
    """Trains the student on the packed rows of `run`, going on from the newest checkpoint if there is one.

    Returns:
      counts: steps, tokens, trained tokens, final loss, seconds and tokens/s of this process's steps.
    Raises:
      ValueError: bad input, a checkpoint of something else, a bad step under `on_bad_step: stop`, or a last checkpoint
        that could not be saved.
      processes.Stopped: SIGTERM came, and what was done is saved.
    """
    t = config.train
    made = set_up(config, run)
    checkpoints = Checkpoints(
        run.checkpoints,
        keep=t.keep_checkpoints,
        keep_best=t.keep_best,
        identity=made.identity,
        accept=t.accept_changed,
        say=progress.say,
    )
    if processes.is_first():
        write_json(run.checkpoints / SHAPE, made.student.to_hf())
    state, frozen, restored = start_state(run, made, checkpoints)
    first = restored.step if restored else 0
    if restored:
        progress.say(f"  going on from the checkpoint at step {first:,} of {made.steps:,}")
    parameters = sum(p.size for p in jax.tree.leaves(state["params"]))
    progress.say(describe(made, parameters))
    log = MetricsLog(FlopCounter(made.student, made.lora), peak_flops(jax.devices()[0], t.peak_tflops), made.mesh.size)
    if restored:
        log.carry_on(restored.progress)
    at_once = made.shape[0] // made.micro_batches
    evaluate = None
    if t.evaluate:
        evaluate = Evaluator(config, run, shared, made.rows, made.model, made.mesh, rows_at_once=at_once)
    outputs = Outputs(run.checkpoints, config, after=first, say=progress.say)
    try:
        with progress.bar("train", made.steps, done=first) as update:
            _Loop(config, made, checkpoints, log, outputs, evaluate, update, run.checkpoints).go(first, state, frozen)
        checkpoints.finish(made.steps)
    finally:
        outputs.close()
        if made.rollouts is not None:
            made.rollouts.close()
    found = log.summary()
    counts = {"parameters": parameters, "steps": made.steps, "epochs": made.epochs} | found
    if found["final_loss"] is not None:
        progress.say(
            f"  step {made.steps:,} of {made.steps:,}: loss {found['final_loss']:.4g}, {found['tokens']:,} tokens in "
            f"{found['seconds']:,.0f} s of training"
        )
    return counts | ({"failed_saves": checkpoints.failed} if checkpoints.failed else {})


class _Loop:
    """Step after step. A step's metrics are looked at while the devices do the next one, so that they never wait."""

    def __init__(
        self,
        config: RunConfig,
        made: Training,
        checkpoints: Checkpoints,
        log: MetricsLog,
        outputs: Outputs,
        evaluate: Evaluator | None,
        update: Any,
        folder: Path,
    ):
        self.t, self.made, self.checkpoints, self.log, self.outputs = config.train, made, checkpoints, log, outputs
        self.evaluate, self.update, self.folder = evaluate, update, folder
        self.pending: tuple[int, dict[str, jax.Array | float]] | None = None
        self.stopping = False

    def go(self, first: int, state: Any, frozen: Any) -> None:
        steps = range(first, self.made.steps)
        made, sampler = self.made, self.made.rollouts
        stored = None if sampler is None else sampler.stored_rows
        feed = read_ahead(made.rows, steps, made.shape, made.mesh, self.log.waited, made.pairs, stored)
        trace = contextlib.closing(_Trace(self.t.profile, self.folder / "profile"))
        with processes.StopSignal() as stop, contextlib.closing(feed), trace as profiler:
            for step, batch in feed:
                profiler.before(step)
                batch, sampled = self._with_rollouts(step, batch, state, frozen)
                state, metrics = made.step(state, batch, frozen, made.teacher)
                self._take_pending()
                self.pending = (step, metrics | sampled)
                self._end_of_step(step + 1, state, frozen, stop.requested(step + 1))

    def _with_rollouts(self, step: int, batch: Batch, state: Any, frozen: Any) -> tuple[Batch, dict[str, float]]:
        """The batch with what the student has sampled for it, and what there is to say of that; mostly nothing."""
        if self.made.rollouts is None:
            return batch, {}
        jax.block_until_ready(state["params"])  # the step before has to end first, and is not sampling
        begun = time.monotonic()
        rollouts, found = self.made.rollouts(step, state["params"], frozen)
        if rollouts is not None:
            self.log.sampled(time.monotonic() - begun)
        return (batch if rollouts is None else batch | {ROLLOUTS: rollouts}), found

    def _end_of_step(self, done: int, state: Any, frozen: Any, stop: bool) -> None:
        t, last = self.t, done == self.made.steps
        self.stopping |= stop
        stop = self.stopping and (self.made.rollouts is None or self.made.rollouts.resumes(done))
        evaluates = self.evaluate is not None and (done % self.t.evaluate.every == 0 or last)  # pyrefly: ignore
        saves = done % t.checkpoint_every == 0 or last or stop or (evaluates and t.keep_best > 0)
        loss = None
        if evaluates or saves:
            self._take_pending()  # what is saved holds the numbers of every step up to it
        if evaluates:
            loss = self._evaluate(done, state, frozen)
        if saves:
            self.checkpoints.save(done, state, progress=self.log.carried(), loss=loss)
        if stop and not last:
            self.checkpoints.finish(done)
            raise processes.Stopped(f"asked to stop; the checkpoint at step {done:,} is saved.")

    def _take_pending(self) -> None:
        """Waits for the metrics of the step before this one."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        note = self.log.add(step, values)
        if values["bad"]:
            self._bad_step(step, values)
        if (step + 1) % self.t.log_every == 0 or step + 1 == self.made.steps:
            self.outputs.write(METRICS, self.log.line())
        self.update(step + 1, note + (f", {values['skipped']:.0f} skipped" if values["skipped"] else ""))

    def _bad_step(self, step: int, values: dict[str, float]) -> None:
        """Writes down the batch of a step whose update was not applied, and stops if the config says so.

        Raises:
          ValueError: `on_bad_step: stop`, or too many in a row.
        """
        finite = abs(values["loss"]) < float("inf") and values["gradient_norm"] < float("inf")
        reason = f"spike above {self.t.spike} x {values['mean_loss']:.4g}" if finite else "not finite"
        rows = self.made.rows.row_numbers(step)
        line = {"step": step + 1, "reason": reason, "action": self.t.on_bad_step, "rows": rows}
        shown = {name: values[name] for name in ("loss", "gradient_norm", "accuracy", "learning_rate", "count")}
        self.outputs.write(BAD_STEPS, line | {name: _plain(value) for name, value in shown.items()})
        what = f"step {step + 1:,}: loss {values['loss']:.4g}, gradient norm {values['gradient_norm']:.4g} ({reason})"
        where = f"its rows are in {self.folder / BAD_STEPS}"
        if self.t.on_bad_step == "stop":
            self.checkpoints.settle()
            raise ValueError(
                f"{what}; its update was not applied, and {where}. Lower the learning rate, or go on without such "
                "batches by train.on_bad_step: skip."
            )
        if values["skipped_in_row"] >= self.t.max_skipped:
            self.checkpoints.settle()
            raise ValueError(f"{what}; it is bad step {self.t.max_skipped} in a row (train.max_skipped); {where}.")
        progress.say(f"  WARNING: {what}: skipped; {where}")

    def _evaluate(self, done: int, state: Any, frozen: Any) -> float | None:
        assert self.evaluate is not None
        resume_clock = self.log.pause()
        line = self.evaluate(done, state["params"], frozen)
        resume_clock()
        self.outputs.write(EVALUATIONS, line)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float))
        progress.say(f"  evaluation at step {done:,}: {shown}")
        return line.get("loss")


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if abs(value) < float("inf") else str(value)


class _Trace:
    """A trace of some steps by jax.profiler, for TensorBoard's profile plugin or Perfetto."""

    def __init__(self, profile: ProfileConfig | None, folder: Path):
        self._profile, self._folder, self._runs = profile, folder, False

    def before(self, step: int) -> None:
        """Starts or ends the trace where the config says so."""
        if self._profile is None:
            return
        if step == self._profile.start:
            jax.profiler.start_trace(str(self._folder))
            self._runs = True
        elif step == self._profile.start + self._profile.steps:
            self.close()

    def close(self) -> None:
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()
            progress.say(f"  profile: {self._folder}")
