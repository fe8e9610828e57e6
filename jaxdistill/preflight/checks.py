"""All checks of a run, one after the other; each is a function of what it needs, and gives what it finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jaxdistill import progress
from jaxdistill.config import RunConfig, with_baseline
from jaxdistill.config.paths import conflict, paths_of
from jaxdistill.preflight import devices, disk, interpreters, problems, students, teachers
from jaxdistill.preflight.finding import Finding


def check(config: RunConfig, yaml_file: Path | None = None) -> list[Finding]:
    """Everything that is found of a run, in the order of its stages.

    Args:
      yaml_file: where the config was read, whose folder somebody may have meant paths to be relative to.
    """
    found = [*_paths(config, yaml_file)]
    there = {finding.what for finding in found if finding.level == "error"}
    if "problems.path" not in there:
        found += problems.check(config)
    found += teachers.check(config)
    found += interpreters.check(config)
    found += students.check(config, "student")
    for name in config.baselines:
        baseline = with_baseline(config, name)
        if (baseline.student, baseline.data) != (config.student, config.data):
            found += students.check(baseline, f"baselines.{name}")
    found += devices.check(config)
    found += disk.check(config)
    return found


def refuse(config: RunConfig, yaml_file: Path | None = None) -> None:
    """Says what is noteworthy.

    Raises:
      ValueError: a later stage would refuse the run, or keep nothing.
    """
    found = check(config, yaml_file)
    for finding in found:
        if finding.level in ("warning", "unchecked"):
            progress.say(f"  {finding.what}: {finding.text}")
    errors = [f"{finding.what}: {finding.text}" for finding in found if finding.level == "error"]
    if errors:
        raise ValueError("before anything is paid for: " + " And ".join(errors))


def _paths(config: RunConfig, yaml_file: Path | None) -> Iterator[Finding]:
    """Files that are not there, or that may be others than were meant."""
    for path in paths_of(config):
        said = conflict(path, yaml_file.parent) if yaml_file is not None else None
        missing = not path.where.exists() and not path.is_output
        if said is not None:
            text = said.removeprefix(f"{path.key}: ")
            yield Finding(path.key, "error" if missing and not path.may_be_name else "warning", text)
        elif missing and not path.may_be_name and not path.key.endswith(".run"):
            yield Finding(path.key, "error", f"{path.where} is not there; name a file or folder that is.")
