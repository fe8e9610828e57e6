"""`jaxdistill STAGE CONFIG`: the command line. A command prints what it does; a failure is one line and exit code 1."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.table import Table

from jaxdistill import pipeline, progress
from jaxdistill.config import RunConfig, load, to_dict
from jaxdistill.parallel import processes
from jaxdistill.plan import command as planning
from jaxdistill.records import RunDir, read_manifest

PARENT = "JAXDISTILL_PARENT"
PR_SET_PDEATHSIG = 1
# XLA asks for its buffers anew at every step; large pages save the page faults (on 2 CPU cores: 135 -> 114 ms a step)
MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
HELP = {
    "run": "everything, from problems to report; skips what is done and goes on where it was stopped",
    "generate": "problems, and the teacher's traces of them",
    "verify": "which traces may be learned from, and why not the others",
    "prepare": "kept traces to packed rows of tokens",
    "train": "the student and its baselines; SIGTERM saves a checkpoint and ends with exit code 75",
    "export": "checkpoints to Hugging Face folders, checked",
    "evaluate": "held-out accuracy of student, baselines and teacher",
    "report": "one HTML page about the run",
    "show": "one packed row, coloured by what is trained; `--row` picks it",
    "star": "rounds of learning from own right answers (STaR, ReST-EM, RFT), as the section `star` says",
    "plan": "the train step, compiled for devices that are not here: memory, FLOPs, communication, time",
    "ablate": "the run, then students on changed traces (`ablate`), every one once a seed; prints the table",
}
EXAMPLES = """examples:
  jaxdistill run configs/quickstart.yaml
  jaxdistill run configs/gsm8k.yaml --set problems.path=data/gsm8k/train.jsonl
  jaxdistill run configs/quickstart.yaml --dry-run
  jaxdistill train my.yaml --set train.optimizer.learning_rate=1e-5 --redo train
  jaxdistill export my.yaml --check
  jaxdistill show configs/quickstart.yaml --row 3
  jaxdistill plan my.yaml --topology v5p:4x4x4 --mesh fsdp=16,tensor=4
  jaxdistill report runs/quickstart
  jaxdistill compare runs/quickstart runs/other runs/other:answer_only
  jaxdistill ablate configs/quickstart.yaml --set 'ablate.seeds=[0, 1, 2]'
  jaxdistill star configs/quickstart_star.yaml
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="jaxdistill",
        description="Distil the reasoning of a large teacher into a small student, in JAX.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in HELP.items():
        sub = commands.add_parser(
            name, help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("config", help="a YAML file, such as configs/quickstart.yaml, or the folder of a run")
        sub.add_argument(
            "--set",
            dest="overrides",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="overrides a key of the config; may be repeated",
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == "show":
            sub.add_argument("--row", type=int, default=0, help="which packed row (default 0)")
            sub.add_argument("--baseline", help="of this baseline, instead of the student")
            sub.add_argument("--prompts", type=int, metavar="N", help="instead: what the teacher is asked, N problems")
            continue
        if name == "star":
            continue
        if name == "plan":
            planning.add_arguments(sub)
            continue
        sub.add_argument(
            "--dry-run", action="store_true", help="print the resolved config and the plan, and do nothing"
        )
        sub.add_argument(
            "--redo",
            metavar="STAGE",
            choices=list(pipeline.STAGES),
            help="first remove this stage's output and all that follows from it",
        )
        if name == "export":
            sub.add_argument(
                "--check", action="store_true", help="reload the exports with transformers and compare the logits again"
            )
        if name == "train":
            _add_processes(sub)
    text = "models of several runs, problem by problem, against the first"
    sub = commands.add_parser("compare", help=text, description=text)
    sub.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder (its student), or FOLDER:MODEL")
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def _add_processes(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group(
        "several processes", "the same command in every process, on a file system that all of them see"
    )
    group.add_argument("--distributed", action="store_true", help="they find each other: SLURM, Open MPI, GKE, TPU VMs")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="or: where process 0 is")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--heartbeat",
        type=int,
        default=100,
        metavar="SECONDS",
        help="a process that is silent for so long is dead, and all of them end (default 100)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "compare":
            from jaxdistill.evals.compare import compare

            compare(arguments.runs)
            return 0
        config = load_config(arguments)
        if arguments.command == "show" and arguments.prompts:
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
            dry_run(config)
        else:
            _start_processes(arguments)
            if arguments.redo:
                pipeline.redo(arguments.redo, config)
            if arguments.command == "run":
                return run_all(arguments.config, arguments.overrides, config, arguments.debug)
            if arguments.command == "ablate":
                return ablate(arguments.config, arguments.overrides, config, arguments.debug)
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
            error = RuntimeError(f"{_out_of_memory(arguments.command)} ({' '.join(str(error).split())[:160]}).")
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


def run_all(config_path: str, overrides: Sequence[str], config: RunConfig, debug: bool) -> int:
    """Runs every command in a process of its own, so that accelerator memory is free for the next one.

    Returns:
      the exit code: 0, or that of the command that failed, which has said why.
    """
    for task in pipeline.tasks_of(config, tuple(pipeline.STAGES)):
        if read_manifest(task.folder):
            task.status()  # a stale stage is said before anything is computed
    code = _run_commands(tuple(pipeline.COMMANDS), config_path, overrides, debug)
    if code == 0:
        summary(config)
    return code


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


def dry_run(config: RunConfig) -> None:
    """Prints the resolved config, then what `run` would do."""
    print(yaml.safe_dump(to_dict(config), sort_keys=False))
    table = Table("stage", "folder", "status", box=None, header_style="bold")
    for row in pipeline.plan(config):
        table.add_row(*row)
    progress.console.print(table)


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
