"""Paths are relative to the working folder, and where the YAML file's folder has another of that name it is said.

hiyouga/LlamaFactory 2222, 4037 and 10158: a relative path, and a command that was given in another folder.
"""

from pathlib import Path

import pytest
import yaml

from jaxdistill import cli
from jaxdistill.config import build, load
from jaxdistill.config.paths import NamedPath, conflict, paths_of
from tests.helpers import TINY

HERE = '{"problem": "1 + 1 = ?", "answer": "2"}\n'
OTHER = '{"problem": "2 + 2 = ?", "answer": "4"}\n'


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The working folder, and another one with a YAML file in it."""
    work, other = tmp_path / "work", tmp_path / "other"
    work.mkdir()
    other.mkdir()
    monkeypatch.chdir(work)
    problems = {"source": "jsonl", "path": "problems.jsonl"}
    data = {k: v for k, v in TINY.items() if k != "evaluate"}
    (other / "my.yaml").write_text(yaml.safe_dump(data | {"run_dir": "run", "problems": problems}))
    return work, other


def test_every_path_of_a_config_is_found():
    more = {
        "run_dir": "run",
        "problems": {"source": "jsonl", "path": "a.jsonl"},
        "traces": {"engine": "import", "styles_file": "s.yaml"},
        "verify": {"decontaminate": {"files": {"aime": "aime.jsonl"}}},
        "data": {"row_tokens": 64, "chat_template": "t.jinja", "mixture": [{"name": "x", "run": "runs/other"}]},
        "evaluate": {"benchmarks": [{"name": "mine", "kind": "jsonl", "path": "b.jsonl"}]},
    }
    assert {path.key: path.value for path in paths_of(build(TINY | more))} == {
        "run_dir": "run",
        "problems.path": "a.jsonl",
        "traces.styles_file": "s.yaml",
        "verify.decontaminate.files.aime": "aime.jsonl",
        "data.chat_template": "t.jinja",
        "data.mixture.0.run": "runs/other",
        "student.tokenizer": "train",
        "evaluate.benchmarks.0.path": "b.jsonl",
    }


def test_addresses_of_the_hub_are_no_paths():
    found = build(TINY | {"run_dir": "x", "problems": {"source": "r1", "path": "hf://datasets/a/b"}})
    assert "problems.path" not in [path.key for path in paths_of(found)]


def test_nothing_is_said_where_nothing_can_be_confused(folders):
    work, other = folders
    path = NamedPath("problems.path", "problems.jsonl")
    assert conflict(path, other) is None  # nowhere
    (work / "problems.jsonl").write_text(HERE)
    assert conflict(path, other) is None  # here alone
    (other / "problems.jsonl").write_text(HERE)
    assert conflict(path, other) is None  # the same in both
    assert conflict(path, work) is None  # one place
    assert conflict(NamedPath("problems.path", str(work / "problems.jsonl")), other) is None
    assert conflict(NamedPath("run_dir", "run"), other) is None


def test_another_file_beside_the_yaml_file_is_named(folders, capsys):
    work, other = folders
    (work / "problems.jsonl").write_text(HERE)
    (other / "problems.jsonl").write_text(OTHER)
    assert cli.main(["run", str(other / "my.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"files, relative to the working folder {work}:" in said
    assert f"problems.path: {work}/problems.jsonl\n" in said
    assert f"problems.path: warning: {work}/problems.jsonl is taken" in said
    assert f"{other}/problems.jsonl, beside the YAML file, is another one" in said


def test_a_file_that_lies_beside_the_yaml_file_alone_is_named(folders, capsys):
    work, other = folders
    (other / "problems.jsonl").write_text(OTHER)
    for arguments in (["run", "--dry-run"], ["generate"]):
        assert cli.main([arguments[0], str(other / "my.yaml"), *arguments[1:]]) == 1
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert f"{work}/problems.jsonl is not there" in said
        assert f"{other}/problems.jsonl is there, beside the YAML file" in said
    assert not (work / "run" / "problems").exists()


def test_recipes_in_a_folder_of_their_own_name_paths_of_the_working_folder():
    recipes = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert all(load(path).run_dir.startswith("runs/") for path in recipes)
