"""A training begins only from what transformers reads likewise, and says so before its first step."""

import shutil
import sys

import pytest

from jaxdistill import pipeline
from jaxdistill.config import effective, load
from jaxdistill.hub import demo_teacher
from jaxdistill.records import RunDir
from tests.helpers import TINY, prepared_run

SAME = "is what transformers makes of it"
TRAIN = TINY["train"] | {"steps": 3, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(folder, its config) of a run before `train`: a student and an online teacher, each a checkpoint of its own."""
    root = tmp_path_factory.mktemp("start")
    for name in ("student", "teacher"):
        shutil.copytree(demo_teacher(), root / name)
    distill = {"source": "online", "teacher": str(root / "teacher"), "weight": 0.5}
    return root, prepared_run(root, student={"init": str(root / "student")}, train=TRAIN | {"distill": distill})


def begin(folder):
    """Forgets what was trained; the checkpoints are new, too."""
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    for name in ("student", "teacher"):
        (folder / name / "model.safetensors").touch()


def test_student_and_teacher_are_compared_once_and_not_when_a_run_goes_on(prepared, capsys):
    root, path = prepared
    begin(root)
    config = load(path)
    pipeline.run_command("train", config)
    said = capsys.readouterr().out
    assert said.count(SAME) == 2
    assert f"{root / 'student'} {SAME}" in said and f"{root / 'teacher'} {SAME}" in said
    checkpoints = RunDir(root / "run").checkpoints
    steps = sorted(int(f.name) for f in checkpoints.iterdir() if f.name.isdigit())
    shutil.rmtree(checkpoints / str(steps[-1]))
    (checkpoints / "manifest.json").unlink()
    for name in ("student", "teacher"):  # not remembered any more
        (root / name / "model.safetensors").touch()
    pipeline.run_command("train", config)
    said = capsys.readouterr().out
    assert "going on from the checkpoint at step" in said and SAME not in said


def test_without_torch_nothing_is_trained_unless_the_check_is_off(prepared, capsys, monkeypatch):
    root, path = prepared
    begin(root)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"teacher: before anything is learned .* set student\.check: false"):
        pipeline.run_command("train", load(path))
    off = load(path, ["student.check=false"])
    assert effective(off.student) == effective(load(path).student)  # no stage is made anew for it
    pipeline.run_command("train", off)
    assert SAME not in capsys.readouterr().out
