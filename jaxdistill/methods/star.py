"""STaR and its relatives: a student learns from its own right answers, round after round, each from the base anew.

A round is a run folder below `rounds`, with a config of its own beside it; what a round does are the ordinary stages.
Nothing else is remembered: which round comes next, and whether it is the last, follows from the rounds' manifests, so
the same command goes on wherever it was stopped.

Sources: STaR, Zelikman et al. 2022, arXiv:2203.14465, algorithm 1; rejection-sampling fine-tuning, Yuan et al. 2023,
arXiv:2308.01825, section 3.3; ReST-EM, Singh et al. 2023, arXiv:2312.06585, algorithm 1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxdistill import hub
from jaxdistill.config import RunConfig, StarConfig, build, fingerprint, to_dict
from jaxdistill.methods.hints import hinted, write_rationalized
from jaxdistill.progress import say
from jaxdistill.records import Problem, RunDir, Verdict, atomic_file, read_manifest, read_records, write_json

FOLDER, TABLE = "rounds", "star.json"
Run = Callable[[Sequence[str], str], int]
"""(commands, path of a config) -> exit code; each command is one of `jaxdistill`'s."""


@dataclasses.dataclass(frozen=True)
class Round:
    """One round and where it lies."""

    number: int
    """From 1."""
    root: Path

    @property
    def run(self) -> RunDir:
        return RunDir(self.root / FOLDER / str(self.number))

    @property
    def asked(self) -> RunDir:
        """The run of the problems with hints."""
        return RunDir(self.run.root / "rationalize")

    @property
    def rationalized(self) -> RunDir:
        """What is left of it, with the problems as they are."""
        return RunDir(self.run.root / "rationalized")

    def config(self, part: str) -> Path:
        return self.root / FOLDER / f"{self.number}_{part}.yaml"


class Failed(Exception):
    """A command of a round failed, and has said why."""

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code


def star(config: RunConfig, run: Run) -> int:
    """Does what is left of the rounds, and prints the table.

    Returns:
      0, or the exit code of the command that failed.
    Raises:
      ValueError: a config without `star` or with what does not go with it, a base model that cannot be sampled from, or
        a round with nothing to learn.
    """
    settings = _checked(config)
    root = Path(config.run_dir)
    RunDir(root).first_day()  # of all the rounds
    results: list[dict[str, Any]] = []
    try:
        for number in range(1, settings.rounds + 1):
            say(f"round {number} of at most {settings.rounds}: {Round(number, root).run.root}")
            results.append(_do_round(config, Round(number, root), run))
            write_json(root / TABLE, {"rounds": results, "best": best_of(results)["round"]})
            if on_plateau([r["measure"] for r in results], settings):
                say(f"  no gain of {settings.plateau:.1%} for {settings.patience} round(s): done")
                break
    except Failed as failed:
        return failed.code
    _tell(results, root)
    return 0


def _checked(config: RunConfig) -> StarConfig:
    if config.star is None:
        raise ValueError("star: the config has no section `star`; add `star: {}`.")
    init = config.student.init
    if init is None or hub.is_checkpoints(init):
        raise ValueError(
            "star samples from the student before its first step, so student.init must name a Hugging Face checkpoint: "
            "a hub id, or the folder `export` of another run."
        )
    if config.traces.engine in ("import", "server"):
        raise ValueError(f"star: traces.engine: {config.traces.engine} cannot sample a new student; use vllm or jax.")
    if config.data.mixture:
        raise ValueError("star mixes a round's attempts and rationalized traces by itself; drop data.mixture.")
    if config.traces.styles != ("plain",) and config.star.rationalize:
        raise ValueError("star.rationalize asks in the style `plain`; drop traces.styles, or set it to false.")
    return config.star


def _do_round(config: RunConfig, this: Round, run: Run) -> dict[str, Any]:
    assert config.star is not None
    path = _write_config(this.config("attempt"), attempt_config(config, this))
    _call(run, ("generate", "verify"), path)
    counts = _counts(this.run)
    learned = {"attempts": counts["kept"]}
    result: dict[str, Any] = {
        "round": this.number,
        "problems": counts["problems"],
        "solved": counts["problems_with_a_kept_trace"],
        "kept": counts["kept"],
    }
    if config.star.rationalize:
        found = _rationalize(config, this, run)
        learned["rationalized"] = found["kept"]
        result |= {"rationalized": found["kept"], "shows_hint": found["shows_hint"]}
    if not any(learned.values()):
        raise ValueError(
            f"{this.run.root}: not one attempt was right, so there is nothing to learn from; start from a stronger "
            "model (student.init), easier problems, or more samples (traces.samples)."
        )
    path = _write_config(this.config("train"), train_config(config, this, learned))
    commands = ("prepare", "train", "export", "evaluate")
    _call(run, commands if config.evaluate else commands[:3], path)
    result["measure"] = result["solved"] / max(result["problems"], 1)
    if config.evaluate:
        manifest = read_manifest(this.run.evaluation)
        assert manifest is not None
        result["measure"] = result["accuracy"] = manifest["counts"]["models"]["student"]["accuracy"]
    return result


def _rationalize(config: RunConfig, this: Round, run: Run) -> dict[str, int]:
    """Asks for the problems that were not solved with their answers as hints; the counts of what came of it."""
    assert config.star is not None
    solved = {v.problem_id for v in read_records(this.run.verdicts, Verdict) if v.kept}
    failed = [p for p in read_records(this.run.problems, Problem) if p.answer and p.id not in solved]
    if not failed:
        return {"kept": 0, "shows_hint": 0}
    lines = [
        {"id": p.id, "problem": hinted(p, config.star.hint), "answer": p.answer, "domain": p.domain} for p in failed
    ]
    # the name says what is in it, so that other questions are another config, and nothing of them is mixed up
    questions = this.asked.root / f"hints-{fingerprint(lines)}.jsonl"
    with atomic_file(questions) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = _write_config(this.config("rationalize"), rationalize_config(config, this, questions))
    _call(run, ("generate", "verify"), path)
    return write_rationalized(config.star, failed, this.asked, this.rationalized)


# ------------------------------------------------------------------------------------------------- configs


def attempt_config(config: RunConfig, this: Round) -> dict[str, Any]:
    """A round's own config: the student of the round before is the teacher; other rounds draw other samples."""
    data = to_dict(config) | {"name": f"{config.name}-round-{this.number}", "run_dir": str(this.run.root)}
    data |= {"star": None, "baselines": {}}
    model, revision = config.student.init, config.student.revision
    if this.number > 1:
        model, revision = str(Round(this.number - 1, this.root).run.export), None
    data["traces"] |= {"teacher": model, "revision": revision, "seed": config.traces.seed + this.number - 1}
    if data["evaluate"]:
        data["evaluate"]["models"] = ["student"]
    return data


def rationalize_config(config: RunConfig, this: Round, questions: Path) -> dict[str, Any]:
    """The config of the problems with hints; what was not solved is asked as often as before."""
    data = attempt_config(config, this) | {"run_dir": str(this.asked.root), "evaluate": None}
    data["problems"] = {"source": "jsonl", "path": str(questions), "id_field": "id", "domain_field": "domain"}
    return data


def train_config(config: RunConfig, this: Round, learned: dict[str, int]) -> dict[str, Any]:
    """The config of a round's training: from the base, on the attempts and on what was rationalized.

    Args:
      learned: source -> kept traces; one without any is left out.
    """
    data = attempt_config(config, this)
    sources = {"attempts": None, "rationalized": str(this.rationalized.root)}
    data["data"]["mixture"] = [{"name": name, "run": sources[name]} for name, kept in learned.items() if kept]
    return data


def _write_config(path: Path, data: dict[str, Any]) -> str:
    build(data, where=str(path))
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    return str(path)


def _call(run: Run, commands: Sequence[str], path: str) -> None:
    code = run(commands, path)
    if code:
        raise Failed(code)


def _counts(run: RunDir) -> dict[str, Any]:
    manifest = read_manifest(run.verdicts)
    assert manifest is not None
    return manifest["counts"]


# ------------------------------------------------------------------------------------------------- results


def on_plateau(measures: Sequence[float], settings: StarConfig) -> bool:
    """Whether the last `patience` rounds all stayed below the best one before them plus `plateau`."""
    if len(measures) <= settings.patience:
        return False
    before = max(measures[: -settings.patience])
    return all(m < before + settings.plateau for m in measures[-settings.patience :])


def best_of(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The round with the highest measure, the first of equals."""
    return max(results, key=lambda result: (result["measure"], -result["round"]))


def _tell(results: Sequence[dict[str, Any]], root: Path) -> None:
    say()
    say("  round   solved            kept   rationalized   show the hint   held-out accuracy")
    for r in results:
        solved = f"{r['solved']:,} of {r['problems']:,}"
        more = f"{r.get('rationalized', '-'):>12}   {r.get('shows_hint', '-'):>13}"
        accuracy = f"{r['accuracy']:.1%}" if "accuracy" in r else "-"
        say(f"  {r['round']:>5}   {solved:<15}   {r['kept']:>5,}   {more}   {accuracy:>17}")
    say(f"  best: round {best_of(results)['round']}, {Round(best_of(results)['round'], root).run.export}")
