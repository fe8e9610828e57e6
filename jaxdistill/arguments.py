"""The words of the command line: commands, their options and examples."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import platform

from jaxdistill import __version__, pipeline
from jaxdistill.plan import command as planning

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
    "compare": "models of several runs, problem by problem, against the first",
}
EXAMPLES = {
    "run": (
        "configs/quickstart.yaml",
        "configs/gsm8k.yaml --set problems.path=data/gsm8k/train.jsonl",
        "configs/quickstart.yaml --dry-run",
        "my.yaml --until verify",
    ),
    "generate": ("my.yaml --dry-run", "my.yaml --set traces.samples=4"),
    "verify": ("my.yaml", "my.yaml --set verify.keep_per_problem=1 --redo verify"),
    "prepare": ("my.yaml", "my.yaml --set data.overlong=drop --redo prepare"),
    "train": (
        "my.yaml --set train.optimizer.learning_rate=1e-5 --redo train",
        "my.yaml --coordinator 10.0.0.1:1234 --processes 4 --process 0",
    ),
    "export": ("my.yaml", "my.yaml --check", "my.yaml --set export.dtype=bfloat16 --redo export"),
    "evaluate": ("my.yaml", "my.yaml --set evaluate.samples=4 --set evaluate.temperature=0.6 --redo evaluate"),
    "report": ("runs/quickstart", "my.yaml"),
    "show": ("configs/quickstart.yaml --row 3", "my.yaml --prompts 2"),
    "star": ("configs/quickstart_star.yaml",),
    "plan": ("my.yaml --topology v5p:4x4x4 --mesh fsdp=16,tensor=4", "my.yaml --topology h100:8 --search"),
    "ablate": ("configs/quickstart.yaml --set 'ablate.seeds=[0, 1, 2]'",),
    "compare": ("runs/quickstart runs/other runs/other:answer_only",),
}
"""Of each command, what stands behind its name."""
PACKAGES = ("jax", "flax", "transformers", "torch", "vllm")
"""What `--version` names beside our own, where it is installed."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="jaxdistill",
        description="Distil the reasoning of a large teacher into a small student, in JAX.",
        epilog=_epilog({name: found[:1] for name, found in EXAMPLES.items()}),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=version(), help="print versions and stop")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in HELP.items():
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_epilog({name: EXAMPLES[name]}),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "compare":
            sub.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder (its student), or FOLDER:MODEL")
        else:
            _add_config(sub, name)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        _add_own(sub, name)
        if name in pipeline.COMMANDS or name in ("run", "ablate"):
            _add_stages(sub)
    return top


def check_stages(arguments: argparse.Namespace) -> None:
    """The stages that are named on the command line.

    Raises:
      ValueError: there is none of that name; one line with the nearest one, as of every other mistake.
    """
    for option, known in (("redo", pipeline.STAGES), ("until", pipeline.COMMANDS)):
        name = getattr(arguments, option, None)
        if name is not None and name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"--{option} {name}: no such stage; {meant}There are {', '.join(known)}.")


def version() -> str:
    """Ours, Python's, and those of the packages that results depend on most."""
    found = [f"jaxdistill {__version__}", f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _epilog(examples: dict[str, tuple[str, ...]]) -> str:
    lines = [f"  jaxdistill {name} {rest}" for name, found in examples.items() for rest in found]
    return "\n".join(("examples:" if len(lines) > 1 else "example:", *lines, ""))


def _add_config(sub: argparse.ArgumentParser, name: str) -> None:
    if name == "report":
        what = "the folder of a run, such as runs/quickstart, or its YAML file"
    else:
        what = "a YAML file, such as configs/quickstart.yaml, or the folder of a run"
    sub.add_argument("config", help=what)
    sub.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="overrides a key of the config; may be repeated",
    )


def _add_stages(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, where files lie, what can be checked now, and the plan; do nothing",
    )
    sub.add_argument(
        "--redo",
        metavar="STAGE",
        help=f"first remove this stage's output and all that follows from it: {', '.join(pipeline.STAGES)}",
    )


def _add_own(sub: argparse.ArgumentParser, name: str) -> None:
    """What one command alone has."""
    if name == "run":
        sub.add_argument(
            "--until",
            metavar="STAGE",
            help=f"stop behind this stage: {', '.join(pipeline.COMMANDS)}",
        )
    elif name == "show":
        sub.add_argument("--row", type=int, default=0, help="which packed row (default 0)")
        sub.add_argument("--baseline", help="of this baseline, instead of the student")
        sub.add_argument("--prompts", type=int, metavar="N", help="instead: what the teacher is asked, N problems")
        sub.add_argument("--rejected", type=int, metavar="N", help="instead: N traces that were not kept, and why")
    elif name == "plan":
        planning.add_arguments(sub)
    elif name == "export":
        sub.add_argument(
            "--check", action="store_true", help="reload the exports with transformers and compare the logits again"
        )
    elif name == "train":
        _add_processes(sub)


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
