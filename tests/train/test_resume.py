"""Resuming: a run that was killed ends with the very parameters of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdistill.config import load
from jaxdistill.records import RunDir
from tests.helpers import prepared_run, tiny_config

KILLS = 2


def train(folder: Path, *overrides: str, **popen) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxdistill", "train", str(folder / "config.yaml")]
    for override in overrides:
        command += ["--set", override]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def parameters(folder: Path) -> dict[str, np.ndarray]:
    command = [sys.executable, "-m", "jaxdistill", "export", str(folder / "config.yaml"), "--set", "export.check=none"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return load_file(folder / "run" / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    prepared_run(folder)
    finish(train(folder))
    return folder


def test_killed_and_resumed_is_bitwise_the_same(undisturbed, tmp_path):
    prepared_run(tmp_path)
    metrics = tmp_path / "run" / "checkpoints" / "metrics.jsonl"
    for kill in range(KILLS):
        process = train(tmp_path)
        deadline = time.monotonic() + 200
        wanted = 8 * (kill + 1)
        while time.monotonic() < deadline and process.poll() is None:
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            if lines and json.loads(lines[-1])["step"] >= wanted:
                break
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    output = finish(train(tmp_path))
    assert "going on from the checkpoint at step" in output
    want, got = parameters(undisturbed), parameters(tmp_path)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 30


def test_a_finished_run_is_not_trained_again_and_a_changed_config_is_refused(undisturbed):
    assert "done before" in finish(train(undisturbed))
    process = train(undisturbed, "train.optimizer.learning_rate=0.5")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "train.optimizer.learning_rate: 0.003 -> 0.5" in output
    assert "Traceback" not in output


def test_an_unfinished_run_of_another_config_is_refused(tmp_path, undisturbed):
    prepared_run(tmp_path)
    finish(train(tmp_path, "train.steps=6", "train.checkpoint_every=6"))
    (tmp_path / "run" / "checkpoints" / "manifest.json").unlink()
    process = train(tmp_path, "train.optimizer.learning_rate=0.5")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "was made with another train config" in output


def test_a_row_longer_than_the_context_is_refused(tmp_path):
    prepared_run(tmp_path)
    output, _ = train(tmp_path, "student.architecture.max_position_embeddings=32").communicate(timeout=120)
    assert "beyond the student's context of 32" in output


def test_the_helper_config_is_valid(tmp_path):
    config = load(tiny_config(tmp_path))
    assert RunDir(Path(config.run_dir)).root == tmp_path / "run"
