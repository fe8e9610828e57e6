"""`jaxdistill STAGE CONFIG`: the command line. A command prints what it does; a failure is one line and exit code 1."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.table import Table

from jaxdistill import pipeline, progress
from jaxdistill.arguments import HELP, check_stages, parser
from jaxdistill.config import RunConfig, load, to_dict
from jaxdistill.config.paths import paths_of
from jaxdistill.parallel import processes
from jaxdistill.plan import command as planning
from jaxdistill.records import RunDir, read_manifest

if TYPE_CHECKING:
    import argparse

__all__ = ["HELP", "entry", "main", "parser"]
PARENT = "JAXDISTILL_PARENT"
PR_SET_PDEATHSIG = 1
# XLA asks for its buffers anew at every step; large pages save the page faults (on 2 CPU cores: 135 -> 114 ms a step)
MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "compare":
            from jaxdistill.evals.compare import compare

            compare(arguments.runs)
            return 0
        check_stages(arguments)
        config = load_config(arguments)
        if arguments.command == "show" and arguments.rejected:
            from jaxdistill.verify.show import show_rejected

            show_rejected(config, arguments.rejected)
        elif arguments.command == "show" and arguments.prompts:
            from jaxdistill.traces.show import show_prompts

            show_prompts(config, arguments.prompts)
        elif arguments.command == "show":
            from jaxdistill.data.show import show

            show(config, arguments.row, arguments.baseline)
        elif arguments.command == "plan":
            return planning.run(config, arguments)
        elif arguments.command == "star":
            from jaxdistill.methods.star import star

            return star(config, lambda commands, path: _run_commands(commands, path, (), arguments.debug))
        elif arguments.dry_run:
            return dry_run(config, arguments)
        else:
            _start_processes(arguments)
            if arguments.redo:
                until = getattr(arguments, "until", None)
                if arguments.redo not in pipeline.stages_of(pipeline.commands_until(until)):
                    raise ValueError(
                        f"--redo {arguments.redo} would remove what --until {until} does not make again; leave one out."
                    )
                if arguments.redo in PAID_FOR:  # nothing is removed for a run that is refused then
                    _refuse_before_paying(config, arguments)
                pipeline.redo(arguments.redo, config)
            if arguments.command == "run":
                return run_all(arguments.config, arguments.overrides, config, arguments.debug, arguments.until)
            if arguments.command == "ablate":
                return ablate(arguments.config, arguments.overrides, config, arguments.debug)
            if arguments.command == "generate" and arguments.redo not in PAID_FOR:  # else it has just been done
                _check_before_paying(config, arguments)
            pipeline.run_command(arguments.command, config)
            if arguments.command == "export" and arguments.check:
                from jaxdistill.export.check import check_again

                for task in pipeline.tasks_of(config, ("export",)):
                    progress.say(f"{task.title}: {check_again(task.folder)}")
    except processes.Stopped as stopped:
        print(f"jaxdistill {arguments.command}: {stopped} The same command goes on from here.", file=sys.stderr)
        return processes.leave(processes.STOPPED)
    except (ValueError, OSError) as error:
        if arguments.debug and processes.count() == 1:
            raise
        _say_error(arguments, error)
        return processes.leave(1)
    except RuntimeError as error:
        if _is_out_of_memory(error):
            found = f"{_out_of_memory(arguments.command)} ({' '.join(str(error).split())[:160]})."
            error = RuntimeError(found).with_traceback(error.__traceback__)
        elif processes.count() == 1:
            raise
        # else another process is gone, as JAX puts it
        _say_error(arguments, error)
        return processes.leave(1)
    except KeyboardInterrupt:
        print(f"\njaxdistill {arguments.command}: stopped; the same command goes on from here.", file=sys.stderr)
        return processes.leave(130)
    return processes.leave(0)


def _start_processes(arguments: argparse.Namespace) -> None:
    """Joins the other processes, if the command line says that there are any; one of them speaks."""
    if arguments.command != "train":
        return
    given = (arguments.coordinator, arguments.processes, arguments.process)
    if arguments.distributed or given != (None, None, None):
        processes.start(*given, heartbeat_s=arguments.heartbeat)
        progress.console.quiet = not processes.is_first()


def _say_error(arguments: argparse.Namespace, error: Exception) -> None:
    who = f" (process {processes.number()} of {processes.count()})" if processes.count() > 1 else ""
    print(f"jaxdistill {arguments.command}{who}: {_one_line(error)}", file=sys.stderr)
    if arguments.debug:
        traceback.print_exception(error)


def run_all(
    config_path: str, overrides: Sequence[str], config: RunConfig, debug: bool, until: str | None = None
) -> int:
    """Runs every command in a process of its own, so that accelerator memory is free for the next one.

    Args:
      until: the last command; all of them if absent.
    Returns:
      the exit code: 0, or that of the command that failed, which has said why.
    """
    commands = pipeline.commands_until(until)
    for task in pipeline.tasks_of(config, pipeline.stages_of(commands)):
        if read_manifest(task.folder):
            task.status()  # a stale stage is said before anything is computed
    code = _run_commands(commands, config_path, overrides, debug)
    if code:
        return code
    if until is None:
        summary(config)
    else:
        progress.say()
        progress.say(f"  stopped behind {until}; the same command without --until goes on from here")
    return 0


def ablate(config_path: str, overrides: Sequence[str], config: RunConfig, debug: bool) -> int:
    """The run itself, the students of its ablations, their table, and the report once more, which shows it.

    Returns:
      the exit code, as `run_all`'s.
    """
    code = run_all(config_path, overrides, config, debug)
    if code:
        return code
    from jaxdistill.methods import ablations

    progress.say()
    progress.say(f"ablate: {Path(config.run_dir) / ablations.FOLDER}")
    path = str(ablations.prepare(config))
    code = _run_commands(("prepare", "train", "export", "evaluate"), path, (), debug)
    if code:
        return code
    ablations.tabulate(config)
    return _run_commands(("report",), config_path, overrides, debug)


def load_config(arguments: argparse.Namespace) -> RunConfig:
    """The config that a command names, or that a run's folder remembers.

    Raises:
      ValueError: the folder holds no run.
    """
    path, overrides = Path(arguments.config), list(arguments.overrides)
    if not path.exists() and (arguments.command == "report" or path.suffix not in (".yaml", ".yml")):
        here = sorted(str(found.parent) for found in Path("runs").glob(f"*/{pipeline.CONFIG}"))
        there = f"; there are {', '.join(here[:5])}" if here else ", such as runs/quickstart"
        raise ValueError(f"{path}: no such folder; name the folder of a run{there}, or a YAML file.")
    if path.is_dir():
        if not (path / pipeline.CONFIG).is_file():
            raise ValueError(
                f"{path}: no run in this folder (it has no {pipeline.CONFIG}); name a run's folder or a YAML file."
            )
        overrides = [f"run_dir={path}", *overrides]
        arguments.config, arguments.overrides = str(path / pipeline.CONFIG), overrides
    return load(arguments.config, overrides)


def _run_commands(commands: Sequence[str], config_path: str, overrides: Sequence[str], debug: bool) -> int:
    """One process a command; the exit code is 0, or that of the command that failed."""
    for command in commands:
        call = [sys.executable, "-m", "jaxdistill", command, config_path]
        for override in overrides:
            call += ["--set", override]
        environment = MEMORY | os.environ | {PARENT: str(os.getpid())}
        code = _call([*call, *(["--debug"] if debug else [])], environment)
        if code:
            return code if code > 0 else 128 - code
    return 0


def _call(command: list[str], environment: dict[str, str]) -> int:
    """Runs a command to its end; SIGTERM is passed on to it, so that a training can save itself."""
    child = subprocess.Popen(command, env=environment)
    before = signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def summary(config: RunConfig) -> None:
    """Ends a run: where the checkpoint and the report lie, and who scored what."""
    run = RunDir(Path(config.run_dir))
    progress.say()
    manifest = read_manifest(run.evaluation)
    if manifest:
        for name, score in manifest["counts"]["models"].items():
            interval = f"95% interval {score['low']:.1%} to {score['high']:.1%}"
            progress.say(f"  {name:<14}{score['accuracy']:>6.1%} of {score['problems']} held-out problems ({interval})")
        for each in manifest["counts"].get("benchmarks", {}).values():
            if score := each["models"].get("student"):
                interval = f"95% interval {score['low']:.1%} to {score['high']:.1%}"
                progress.say(f"  student       {score['accuracy']:>6.1%} of {each['title']} ({interval})")
    progress.say(f"  Hugging Face checkpoint: {run.export}")
    progress.say(f"  report:                  {run.report / 'index.html'}")


def dry_run(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Prints the resolved config, where its files are, what the command would do, and what can be checked now.

    What matters most comes last, where it is seen: the config alone is hundreds of lines.

    Returns:
      the exit code: 1 if something was found that a stage would refuse, else 0.
    """
    from jaxdistill import preflight

    print(yaml.safe_dump(to_dict(config), sort_keys=False))
    progress.say(f"files, relative to the working folder {Path.cwd()}:")
    for path in paths_of(config):
        if path.where.exists() or not path.may_be_name:
            missing = "" if path.where.exists() or path.is_output else " (is not there)"
            progress.say(f"  {path.key}: {path.where}{missing}")
    progress.say()
    table = Table("stage", "folder", "status", box=None, header_style="bold")
    commands = (arguments.command,) if arguments.command in pipeline.COMMANDS else None
    rows = pipeline.plan(config, commands or pipeline.commands_until(getattr(arguments, "until", None)))
    for row in rows:
        table.add_row(*row)
    progress.console.print(table)
    found = list(preflight.check(config, _yaml_of(arguments)))
    if not arguments.redo:  # which may be what is asked for there
        found += [preflight.Finding(task, "error", why) for task, _, why in rows if why not in ("to do", "done")]
    progress.say()
    progress.say("checks:")
    for finding in sorted(found, key=lambda finding: LEVELS.index(finding.level)):
        progress.say(f"  {finding.what}: {finding.level}: {finding.text}")
    counts = Counter(finding.level for finding in found)
    said = [
        f"{counts[level]} {level if level == 'unchecked' or counts[level] == 1 else level + 's'}"
        for level in ("error", "warning", "unchecked")
        if counts[level]
    ]
    progress.say(f"  {', '.join(said) or 'nothing was found'}; nothing was done")
    return int(counts["error"] > 0)


def _yaml_of(arguments: argparse.Namespace) -> Path | None:
    """The YAML file of a command; None where it is what a run's folder remembers, whose paths were right once."""
    path = Path(arguments.config)
    return None if path.name == pipeline.CONFIG and (path.parent / "traces").exists() else path.absolute()


def _check_before_paying(config: RunConfig, arguments: argparse.Namespace) -> None:
    """What can be known before the teacher is asked, unless that has been done."""
    (task,) = pipeline.tasks_of(config, ("generate",))
    if not task.is_done:
        _refuse_before_paying(config, arguments)


def _refuse_before_paying(config: RunConfig, arguments: argparse.Namespace) -> None:
    from jaxdistill import preflight

    preflight.refuse(config, _yaml_of(arguments))


PAID_FOR = ("problems", "generate")
"""Stages behind which the teacher is asked again."""
LEVELS = ("ok", "unchecked", "warning", "error")
"""The order in which findings are printed: the worst last, where they are seen."""
SMALLER = {
    "train": "set train.remat: full, more train.micro_batches, a smaller train.batch_rows or data.row_tokens, or take "
    "more devices (train.mesh); `jaxdistill plan` tells beforehand what a step needs",
    "generate": "lower traces.batch",
    "evaluate": "lower evaluate.batch",
    "export": "spread the student over more devices",
}
"""What makes a command need less of a device's memory."""


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether XLA says so, when it compiles or when it runs."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _out_of_memory(command: str) -> str:
    way = SMALLER.get(command, "take a device with more of it")
    return f"the device's memory is too small: {way}, and see that no other process holds some of it"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        advice = "; make room, then run the same command again" if error.errno == 28 else ""
        return f"{where}{error.strerror.lower()}{advice}."
    return " ".join(str(error).split())


def die_with_parent() -> None:
    """A stage that `run` started ends when `run` does, even by SIGKILL, so that nobody works on unseen (Linux)."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it had died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def entry() -> None:
    """The console script."""
    die_with_parent()
    # libraries that talk: progress and errors are ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("absl").setLevel(logging.ERROR)
    sys.exit(main())
