"""The whole story: problems -> traces -> verdicts -> rows -> checkpoint -> export -> scores -> report.

A stage is done when its folder has a manifest. A manifest holds the fingerprint of the config sections and of the
inputs that it was made from: the same ones are skipped, others are an error that shows the difference, never a mixture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from jaxdistill import progress
from jaxdistill.config import RunConfig, differences, effective, fingerprint, to_dict, with_baseline
from jaxdistill.parallel import processes
from jaxdistill.records import CACHE, RunDir, atomic_file, read_manifest, write_manifest


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the story."""

    name: str
    folder: Callable[[RunDir], Path]
    sections: Callable[[RunConfig], dict[str, Any]]
    """The config sections that shape what comes out."""
    inputs: tuple[str, ...]
    """Stages whose manifests it is made from."""
    function: str
    """`module:function`, imported when it runs, so that the command line starts fast."""
    per_student: bool = False
    """Whether baselines have a folder of their own for it."""
    always: bool = False
    """Done anew each time: quick, and a view of everything else."""


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "problems",
            lambda run: run.problems,
            lambda c: {"problems": c.problems, "heldout": c.evaluate and c.evaluate.problems},
            (),
            "jaxdistill.traces.problems:problems",
        ),
        Stage(
            "generate",
            lambda run: run.traces,
            lambda c: {"traces": c.traces},
            ("problems",),
            "jaxdistill.traces.collect:generate",
        ),
        Stage(
            "verify",
            lambda run: run.verdicts,
            lambda c: {"verify": c.verify},
            ("generate",),
            "jaxdistill.verify.stage:verify",
        ),
        Stage(
            "prepare",
            lambda run: run.tokens,
            lambda c: {"data": c.data, "tokenizer": [c.student.tokenizer, c.student.init, c.student.tokenizer_vocab]},
            ("verify",),
            "jaxdistill.data.prepare:prepare",
            per_student=True,
        ),
        Stage(
            "train",
            lambda run: run.checkpoints,
            lambda c: {"train": c.train, "student": c.student, "seed": c.seed},
            ("prepare",),
            "jaxdistill.train.loop:train",
            per_student=True,
        ),
        Stage(
            "export",
            lambda run: run.export,
            lambda c: {"export": c.export},
            ("train",),
            "jaxdistill.export.stage:export",
            per_student=True,
        ),
        Stage(
            "evaluate",
            lambda run: run.evaluation,
            lambda c: {"evaluate": c.evaluate, "baselines": c.baselines},
            ("export",),
            "jaxdistill.evals.evaluate:evaluate",
        ),
        Stage("report", lambda run: run.report, lambda c: {}, (), "jaxdistill.evals.report:report", always=True),
    )
}
CONFIG = "config.yaml"
"""In a run's folder: the resolved config of the last command, so that the folder can stand for it."""
COMMANDS = {
    "generate": ("problems", "generate"),
    "verify": ("verify",),
    "prepare": ("prepare",),
    "train": ("train",),
    "export": ("export",),
    "evaluate": ("evaluate",),
    "report": ("report",),
}
"""What each command does; `run` does them all, in this order."""


def commands_until(last: str | None) -> tuple[str, ...]:
    """The commands of a run up to one of them; all of them if None."""
    names = tuple(COMMANDS)
    return names if last is None else names[: names.index(last) + 1]


def stages_of(commands: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(stage for command in commands for stage in COMMANDS[command])


@dataclasses.dataclass(frozen=True)
class Task:
    """A stage of one student: the run's own (`student`), or a baseline's by its name."""

    stage: Stage
    student: str
    config: RunConfig
    run: RunDir
    shared: RunDir

    @property
    def folder(self) -> Path:
        return self.stage.folder(self.run)

    @property
    def title(self) -> str:
        return self.stage.name + (f" ({self.student})" if self.student != "student" else "")

    @property
    def is_done(self) -> bool:
        """Whether it has been done, from whatever config."""
        return read_manifest(self.folder) is not None

    def input_hashes(self) -> dict[str, str]:
        """Fingerprints of what this task reads.

        Raises:
          ValueError: a stage that it needs has not been run.
        """
        hashes = {}
        for name in self.stage.inputs:
            before = STAGES[name]
            students = (
                [self.student]
                if self.stage.per_student or not before.per_student
                else ["student", *self.config.baselines]
            )
            for student in students:
                run = self.shared if not before.per_student or student == "student" else self.shared.baseline(student)
                manifest = read_manifest(before.folder(run))
                if manifest is None:
                    raise ValueError(
                        f"{self.title} needs `{name}`, which has not been run yet; run it first, or `jaxdistill run`."
                    )
                key = name if student == "student" else f"{name}:{student}"
                hashes[key] = fingerprint(manifest["config_hash"], manifest["inputs"])
        if self.stage.name == "prepare":  # a mixture may take the verified traces of other runs
            for source in self.config.data.mixture:
                other = source.run and read_manifest(RunDir(Path(source.run)).verdicts)
                if other:
                    hashes[f"verify of {source.run}"] = fingerprint(other["config_hash"], other["inputs"])
        return hashes

    def status(self) -> str:
        """`to do` or `done`.

        Raises:
          ValueError: done, but from another config or other inputs.
        """
        manifest = read_manifest(self.folder)
        if manifest is None or self.stage.always:
            return "to do"
        wanted = effective(self.stage.sections(self.config))
        advice = f"use another run_dir, or `--redo {self.stage.name}` to replace it and all that follows from it"
        changed = [f"{key}: {change}" for key, change in differences(manifest["config"], wanted)]
        if changed:
            raise ValueError(f"{self.folder} was made with another config ({'; '.join(changed[:4])}); {advice}.")
        if manifest["inputs"] != self.input_hashes():
            raise ValueError(
                f"{self.folder} was made from other {', '.join(self.stage.inputs)} output than is there now; {advice}."
            )
        return "done"

    def do(self) -> dict[str, Any]:
        """Runs the stage and marks it finished."""
        inputs = self.input_hashes()
        module, name = self.stage.function.split(":")
        function = getattr(importlib.import_module(module), name)
        begun = time.monotonic()
        counts = (
            function(self.config, self.run, self.shared) if self.stage.per_student else function(self.config, self.run)
        )
        if processes.is_first():
            self._finish(inputs, counts, time.monotonic() - begun)
        processes.barrier(f"{self.title} is done")
        return counts

    def _finish(self, inputs: dict[str, str], counts: dict[str, Any], seconds: float) -> None:
        counts = {"wall_seconds": round(seconds, 2)} | counts
        sections = effective(self.stage.sections(self.config))
        write_manifest(
            self.folder,
            stage=self.stage.name,
            config=sections,
            config_hash=fingerprint(sections),
            inputs=inputs,
            counts=counts,
        )
        if self.stage.name in ("evaluate", "report"):
            # the exports' model cards state the scores; at the report again, for a run that was stopped in between
            importlib.import_module("jaxdistill.export.card").refresh_cards(self.config, self.shared)


def tasks_of(config: RunConfig, stages: tuple[str, ...]) -> list[Task]:
    """What there is to do for some stages: one task each, or one a student."""
    shared = RunDir(Path(config.run_dir))
    tasks = []
    for name in stages:
        stage = STAGES[name]
        if stage.name == "evaluate" and config.evaluate is None:
            continue
        tasks.append(Task(stage, "student", config, shared, shared))
        if stage.per_student:
            for baseline in config.baselines:
                tasks.append(Task(stage, baseline, with_baseline(config, baseline), shared.baseline(baseline), shared))
    return tasks


def run_command(command: str, config: RunConfig) -> None:
    """Runs one command's stages; what is done already is said and skipped.

    Raises:
      ValueError: bad input, a stale stage, or another process at work in the run folder.
    """
    with _locked(Path(config.run_dir)):
        _remember(config)
        _run_stages(COMMANDS[command], config)
        while command == "verify" and _resample(config):
            _run_stages(("generate", "verify"), config)


def _remember(config: RunConfig) -> None:
    """Leaves the config in the run's folder; a stage's manifest says what that stage was made with."""
    path = Path(config.run_dir) / CONFIG
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    if not processes.is_first():
        return
    RunDir(path.parent).first_day()
    if not (path.is_file() and path.read_text() == text):
        with atomic_file(path) as temporary:
            temporary.write_text(text)


def _run_stages(names: tuple[str, ...], config: RunConfig) -> None:
    for task in tasks_of(config, names):
        if task.status() == "done":
            progress.say(f"{task.title}: done before, in {task.folder}")
            continue
        progress.say(f"{task.title}: {task.folder}")
        task.do()


def _resample(config: RunConfig) -> int:
    """Marks traces and verdicts as unfinished if problems want more samples (`traces.until_kept`); gives how many."""
    return importlib.import_module("jaxdistill.traces.resample").plan(config, RunDir(Path(config.run_dir)))


def redo(stage: str, config: RunConfig) -> None:
    """Removes a stage's output and all that follows from it, so that they are made anew; caches stay."""
    gone = {stage}
    for later in STAGES.values():
        if gone & set(later.inputs):
            gone.add(later.name)
    with _locked(Path(config.run_dir)):
        for task in tasks_of(config, tuple(gone)):
            if processes.is_first() and task.folder.exists():
                progress.say(f"removing {task.folder}")
                # the manifest first: a folder without one is unfinished, not wrong
                (task.folder / "manifest.json").unlink(missing_ok=True)
                for path in task.folder.iterdir():
                    if path.name != CACHE:  # results that hold for whatever is made next
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                if not (task.folder / CACHE).exists():
                    task.folder.rmdir()
    processes.barrier(f"redo {stage}")


def plan(config: RunConfig, commands: tuple[str, ...] = tuple(COMMANDS)) -> list[tuple[str, str, str]]:
    """(task, folder, `done` | `to do` | what is in the way) of some commands, without doing anything."""
    rows = []
    for task in tasks_of(config, stages_of(commands)):
        try:
            status = task.status()
        except ValueError as error:
            status = str(error)
        rows.append((task.title, str(task.folder), status))
    return rows


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One program at a time works in a run folder; the lock goes with its first process, however it ends."""
    if not processes.is_first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another jaxdistill process is at work there; wait for it, or use another run_dir."
            ) from None
        yield
