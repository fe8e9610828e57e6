"""Several real processes on loopback: what one process computes, one set of files, and an end for all when one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.parallel import processes
from jaxdistill.parallel.processes import STOPPED
from jaxdistill.train.answering import WEIGHTS
from tests.export.test_processes import free_port
from tests.helpers import TINY, prepared_run
from tests.traces.fake_server import FakeServer
from tests.train.test_resume import numbers, wait_for_step

PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
"""Devices of one process wait for those of another while that one starts vLLM; XLA ends them after 40 s by itself."""
BOUND_S = 60
"""Within which the others must have ended after one process died (heartbeats of 10 s, on a busy machine)."""
TRAIN = TINY["train"] | {
    "steps": 100,
    "checkpoint_every": 100,
    "log_every": 1,
    "compute_dtype": "float32",
    "optimizer": {"name": "adamw", "learning_rate": 1e-4},
    "evaluate": {"every": 50, "rows": 4, "problems": 2, "max_tokens": 4},
}


def start(folder: Path, count: int, devices: int, *overrides: str) -> list[subprocess.Popen]:
    """`count` processes with `devices` each; one alone needs no coordinator."""
    port = free_port()
    running = []
    for process in range(count):
        command = [sys.executable, "-m", "jaxdistill", "train", str(folder / "config.yaml")]
        for override in overrides:
            command += ["--set", override]
        if count > 1:
            command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process", str(process)]
            command += ["--heartbeat", "10"]
        flags = f"--xla_force_host_platform_device_count={devices} {PATIENCE}"
        environment = os.environ | {"XLA_FLAGS": flags}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command, env=environment, **pipe))
    return running


def ends(running: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
    """(exit code, output) of each; none outlives the test."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in running]
        return [(process.returncode, output) for process, output in zip(running, said, strict=True)]
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    prepared_run(folder, train=TRAIN)
    ((code, output),) = ends(start(folder, 1, 4))
    assert code == 0, output
    return folder


@pytest.mark.slow
def test_four_processes_stop_together_and_one_goes_on(alone, tmp_path):
    prepared_run(tmp_path, train=TRAIN)
    running = start(tmp_path, 4, 1, "train.mesh.data=4", "train.mesh.fsdp=1", "train.mesh.slices=4")
    wait_for_step(running[0], tmp_path, 5)
    running[2].send_signal(signal.SIGTERM)  # one of them hears it, all of them stop
    found = ends(running)
    assert [code for code, _ in found] == [STOPPED] * 4, found
    assert "4 cpu device(s) of 4 processes" in found[0][1]
    assert "parameters" not in found[1][1]  # one of them speaks
    (saved,) = (int(f.name) for f in (tmp_path / "run" / "checkpoints").iterdir() if f.name.isdigit())
    assert numbers(tmp_path)[-1][0] == saved
    ((code, output),) = ends(start(tmp_path, 1, 2))
    assert code == 0, output
    assert f"going on from the checkpoint at step {saved:,} of 100" in output
    got, want = np.array(numbers(tmp_path)), np.array(numbers(alone))
    np.testing.assert_array_equal(got[:, [0, 3, 4, 5]], want[:, [0, 3, 4, 5]])
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-4)


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_and_write_once(alone, tmp_path):
    prepared_run(tmp_path, train=TRAIN)
    found = ends(start(tmp_path, 2, 2))
    assert [code for code, _ in found] == [0, 0], found
    got, want = np.array(numbers(tmp_path)), np.array(numbers(alone))
    np.testing.assert_array_equal(got[:, [0, 3, 4, 5]], want[:, [0, 3, 4, 5]])
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-4)
    theirs, ours = (
        [json.loads(line) for line in (f / "run" / "checkpoints" / "evaluations.jsonl").read_text().splitlines()]
        for f in (alone, tmp_path)
    )
    assert [line["step"] for line in ours] == [50, 100]
    for a, b in zip(theirs, ours, strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    again = ends(start(tmp_path, 2, 2))
    assert [code for code, _ in again] == [0, 0] and "done before" in again[0][1]


@pytest.mark.slow
def test_one_process_dies_and_the_others_end_with_an_error(tmp_path):
    prepared_run(tmp_path, train=TRAIN | {"steps": 100_000, "evaluate": None})
    running = start(tmp_path, 3, 1, "train.batch_rows=6")
    wait_for_step(running[0], tmp_path, 5)
    running[1].kill()
    begun = time.monotonic()
    found = ends(running, timeout=BOUND_S)
    assert time.monotonic() - begun < BOUND_S
    assert all(code != 0 for code, _ in found)


# ----------------------------------------------------------------------------------------------------- on policy

ON_POLICY = TRAIN | {
    "steps": 2,
    "evaluate": None,
    "on_policy": {
        "max_tokens": 8,
        "fraction": 1.0,
        "grader": "server",
        "topk": 4,
        "vllm": {"enforce_eager": True, "kv_cache_gib": 1},
    },
}


def on_policy_run(folder: Path, server: FakeServer) -> Path:
    folder.mkdir(exist_ok=True)
    traces = {"engine": "import", "teacher": "demo", "server": {"urls": [server.url]}}
    prepared_run(folder, traces=traces, student=TINY["student"] | {"tokenizer": "demo"}, train=ON_POLICY)
    return folder


@pytest.mark.slow
@pytest.mark.skipif("JAXDISTILL_LONG" not in os.environ, reason="one with vLLM is quicker: set JAXDISTILL_LONG=1")
def test_two_processes_sample_and_are_graded_as_one(tmp_path):
    with FakeServer() as server:
        folders = [on_policy_run(tmp_path / name, server) for name in ("one", "two")]
        asked = []
        for folder, (count, devices) in zip(folders, ((1, 4), (2, 2)), strict=True):
            found = ends(start(folder, count, devices, "train.mesh.data=4", "train.mesh.fsdp=1"))
            assert [code for code, _ in found] == [0] * count, found
            asked.append(sorted(body["prompt"] for body in server.asked))
            server.asked.clear()
    assert asked[0] == asked[1]  # the same samples, of which the servers are asked once
    one, two = (
        [json.loads(line) for line in (f / "run" / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
        for f in folders
    )
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "on_policy_kd", "on_policy_kl", "finished", "sampled_tokens", "gradient_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), name


@pytest.mark.vllm
@pytest.mark.slow
def test_two_processes_sample_by_vllm_beside_the_first(tmp_path):
    with FakeServer() as server:
        folder = on_policy_run(tmp_path, server)
        found = ends(start(folder, 2, 2, "train.on_policy.rollouts=vllm"))
        assert [code for code, _ in found] == [0, 0], found
    checkpoints = folder / "run" / "checkpoints"
    lines = [json.loads(line) for line in (checkpoints / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    sampled = sum(len(body["prompt"]) for body in server.asked)
    assert len(server.asked) >= 2 * 8 and sampled > lines[-1]["sampled_tokens"] > 2 * 8
    assert not (checkpoints / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, 0), "need --coordinator"),
        (("host", 2, 0), "write it as HOST:PORT"),
        (("host:1", 2, 2), "it is one of 0 to 1"),
    ],
)
def test_arguments_that_make_no_sense_say_so(given, message):
    with pytest.raises(ValueError, match=message):
        processes.start(*given)


def test_alone_there_is_nothing_to_wait_for():
    processes.barrier("nobody else")
    assert (processes.is_first(), processes.count(), processes.leave(3)) == (True, 1, 3)
