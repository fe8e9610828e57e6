"""Resuming: a run that was killed ends with the very parameters of one that was not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdistill import cli
from jaxdistill.config import load
from jaxdistill.parallel.processes import STOPPED
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
    assert cli.main(["export", str(folder / "config.yaml"), "--set", "export.check=none"]) == 0
    return load_file(folder / "run" / "export" / "model.safetensors")


def assert_same_parameters(folder: Path, other: Path) -> None:
    """Equal to the bit."""
    got, want = parameters(folder), parameters(other)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor)


def numbers(folder: Path) -> list[tuple]:
    """What the log says of every line but its times."""
    lines = (folder / "run" / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    names = ("step", "loss", "learning_rate", "tokens", "trained_tokens", "skipped")
    return [tuple(json.loads(line)[name] for name in names) for line in lines]


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Returns once the log has a line of this step, or the process has ended."""
    metrics = folder / "run" / "checkpoints" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    prepared_run(folder)
    finish(train(folder))
    return folder


def test_killed_and_resumed_is_bitwise_the_same(undisturbed, tmp_path):
    prepared_run(tmp_path)
    for kill in range(KILLS):
        process = train(tmp_path)
        wait_for_step(process, tmp_path, 8 * (kill + 1))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    # what the first runs have compiled is compiled anew: nor may that change a bit
    output = finish(train(tmp_path, env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}))
    assert "going on from the checkpoint at step" in output
    assert_same_parameters(tmp_path, undisturbed)
    assert numbers(tmp_path) == numbers(undisturbed)
    assert numbers(tmp_path)[-1][0] == 30


def test_sigterm_saves_ends_with_its_own_code_and_loses_nothing(undisturbed, tmp_path):
    prepared_run(tmp_path)
    process = train(tmp_path, "train.checkpoint_every=1000")
    wait_for_step(process, tmp_path, 4)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == STOPPED == 75, output
    saved = re.search(r"the checkpoint at step (\d+) is saved. The same command goes on from here", output)
    assert saved and 4 <= int(saved[1]) < 30
    assert f"going on from the checkpoint at step {saved[1]} of 30" in finish(train(tmp_path))
    assert_same_parameters(tmp_path, undisturbed)
    assert numbers(tmp_path) == numbers(undisturbed)


def test_fewer_devices_go_on_with_the_same_rows_and_losses(undisturbed, tmp_path):
    """Saved on eight devices, continued on two."""
    prepared_run(tmp_path)
    process = train(tmp_path, "train.checkpoint_every=1000")
    wait_for_step(process, tmp_path, 4)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert process.returncode == STOPPED
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    assert "on 2 cpu device(s)" in finish(train(tmp_path, "train.micro_batches=4", env=os.environ | flags))
    got, want = (np.array(numbers(f)) for f in (tmp_path, undisturbed))
    np.testing.assert_array_equal(got[:, [0, 3, 4]], want[:, [0, 3, 4]])
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=5e-3)  # bf16 products, summed in another order


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
    process = train(tmp_path, "train.optimizer.learning_rate=0.5", "train.steps=6")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "was made with another config, data set or model (train.optimizer.learning_rate: 0.003 -> 0.5)" in output
    named = "train.accept_changed=[train.optimizer.learning_rate]"
    output = finish(train(tmp_path, "train.optimizer.learning_rate=0.5", "train.steps=6", named))
    assert "accepted: train.optimizer.learning_rate: 0.003 -> 0.5" in output


def test_a_row_longer_than_the_context_is_refused(tmp_path):
    prepared_run(tmp_path)
    output, _ = train(tmp_path, "student.architecture.max_position_embeddings=32").communicate(timeout=120)
    assert "beyond the student's context of 32" in output


def test_the_helper_config_is_valid(tmp_path):
    config = load(tiny_config(tmp_path))
    assert RunDir(Path(config.run_dir)).root == tmp_path / "run"
