"""STaR: rounds as folders of their own, which go on wherever they were stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from jaxdistill import cli
from jaxdistill.config import StarConfig, build, load, to_dict
from jaxdistill.hub import demo_teacher
from jaxdistill.methods.star import Round, attempt_config, best_of, on_plateau, star, train_config
from jaxdistill.records import RunDir, Verdict, read_manifest, read_records
from tests.helpers import TINY, load_tool, tiny_config

SECTIONS = {
    "problems": {"source": "demo", "count": 8, "seed": 3},
    "traces": {"engine": "jax", "teacher": "demo", "max_tokens": 72, "temperature": 1.6, "batch": 8},
    "student": {"init": str(demo_teacher())},
    "train": TINY["train"] | {"steps": 2, "log_every": 1},
    "export": {"check": "none"},
    "evaluate": {"problems": {"source": "demo", "count": 4, "seed": 9}, "max_tokens": 8, "batch": 4},
    "star": {"rounds": 1},
}


def config_of(root: Path, **changes):
    return build(TINY | SECTIONS | {"run_dir": str(root)} | changes)


def test_every_round_starts_from_the_base_and_samples_from_the_round_before(tmp_path):
    config = config_of(tmp_path)
    first, second = (attempt_config(config, Round(n, tmp_path)) for n in (1, 2))
    assert first["student"] == second["student"] == to_dict(config)["student"]
    assert first["traces"]["teacher"] == str(demo_teacher())
    assert second["traces"]["teacher"] == str(tmp_path / "rounds" / "1" / "export")
    assert first["traces"]["seed"] != second["traces"]["seed"]
    assert first["run_dir"] != second["run_dir"]
    mixture = train_config(config, Round(2, tmp_path), {"attempts": 3, "rationalized": 0})["data"]["mixture"]
    assert [source["name"] for source in mixture] == ["attempts"]  # a source without a trace would be refused
    build(train_config(config, Round(2, tmp_path), {"attempts": 0, "rationalized": 2}))


@pytest.mark.parametrize(
    ("measures", "patience", "stops"),
    [
        ([0.5], 1, False),
        ([0.5, 0.52], 1, False),
        ([0.5, 0.505], 1, True),
        ([0.5, 0.4, 0.6], 1, False),
        ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.505], 2, True),
        ([0.5, 0.4, 0.52], 2, False),
    ],
)
def test_plateau(measures, patience, stops):
    assert on_plateau(measures, StarConfig(plateau=0.01, patience=patience)) == stops
    results = [{"round": i, "measure": m} for i, m in enumerate(measures, start=1)]
    assert best_of(results)["measure"] == max(measures)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"star": None}, "no section `star`"),
        ({"student": TINY["student"]}, "student.init must name"),
        ({"traces": {"engine": "import"}}, "cannot sample a new student"),
        ({"traces": SECTIONS["traces"] | {"styles": ["cot"]}}, "in the style `plain`"),
        ({"data": TINY["data"] | {"mixture": [{"name": "mine"}]}}, "drop data.mixture"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_done(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        star(config_of(tmp_path, **changes), lambda commands, path: pytest.fail("nothing is to be run"))


class Stopped(BaseException):
    """As a kill, it is caught by nobody."""


@pytest.fixture(scope="module")
def tool():
    return load_tool("kill_test_star")


@pytest.mark.slow
def test_killed_inside_a_stage_and_between_all_of_them_a_round_ends_as_an_undisturbed_one(tmp_path, tool, capsys):
    """`tools/kill_test_star.py` in short: several rounds, killed at random moments of all stages, are its work."""
    path = tiny_config(tmp_path, **SECTIONS)
    run = Round(1, tmp_path / "run").run
    assert star(load(path), lambda commands, p: max(cli.main([c, p]) for c in commands)) == 0
    (tmp_path / "run").rename(tmp_path / "undisturbed")
    names = [stage.name for stage in tool.stages_of(tmp_path / "undisturbed")]
    assert names[:3] == ["problems", "generate", "verify"] and names[-4:] == ["prepare", "train", "export", "evaluate"]
    journal = run.traces / "journal.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "jaxdistill", "star", str(path)], start_new_session=True)
    while process.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        psutil.wait_procs(family, timeout=60)  # its lock goes with the last of them
    process.wait()
    done: list[tuple[str, str]] = []

    def one_command(commands, config_path):
        """In this process; is killed after the first command that has something to do."""
        for command in commands:
            call = (command, config_path)
            assert cli.main(list(call)) == 0
            if call not in done:
                done.append(call)
                raise Stopped

    config = load(path)
    for _ in range(20):
        try:
            assert star(config, lambda commands, p: one_command(commands, p) or 0) == 0
        except Stopped:
            continue
        break
    assert [command for command, _ in done][-4:] == ["prepare", "train", "export", "evaluate"]
    assert read_manifest(run.traces)["counts"]["resumed"] > 0
    table = json.loads((tmp_path / "run" / "star.json").read_text())
    kept = sum(v.kept for v in read_records(run.verdicts, Verdict))
    assert table["rounds"][0]["kept"] == kept > 0
    assert table["rounds"][0]["accuracy"] == read_manifest(run.evaluation)["counts"]["models"]["student"]["accuracy"]
    tokens = read_manifest(run.tokens)["counts"]
    assert tokens["examples"] == kept + table["rounds"][0].get("rationalized", 0)
    assert tool.differences(tmp_path / "undisturbed", tmp_path / "run") == []
    # once more: nothing is done again
    before = {f: f.stat().st_mtime_ns for f in RunDir(run.root).root.rglob("*.parquet")}
    assert star(config, lambda commands, p: max(cli.main([c, p]) for c in commands)) == 0
    assert {f: f.stat().st_mtime_ns for f in RunDir(run.root).root.rglob("*.parquet")} == before
    assert "best: round 1" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "rounds" / "1_attempt.yaml").read_text())["star"] is None
    # and the comparison sees what differs
    (run.export / "model.safetensors").write_bytes(b"other")
    (run.verdicts / "verdicts.parquet").unlink()
    found = tool.differences(tmp_path / "undisturbed", tmp_path / "run")
    assert found == ["rounds/1/verdicts", "rounds/1/export/model.safetensors"]
