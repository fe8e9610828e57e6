"""`executor: ray` on real Ray clusters of this machine: the same files as without it, whoever is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxdistill import cluster as clusters
from jaxdistill import config as configs
from jaxdistill.config import RayConfig
from jaxdistill.records import Problem, RunDir, Trace, Verdict, read_records, write_records
from jaxdistill.traces import collect, logprobs
from jaxdistill.verify import examine
from jaxdistill.verify.ray_pool import RayPool
from jaxdistill.verify.stage import verify
from tests.traces.tiny import make_checkpoint
from tests.verify import test_verify_stage as stage

ROOT = Path(__file__).parents[1]
PROBLEMS, SAMPLES = 12, 2
pytestmark = [pytest.mark.ray, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]


@pytest.fixture(scope="module")
def cluster():
    """Two workers have room on it, and all that joins a cluster in this process joins this one."""
    pytest.importorskip("ray")
    with clusters.joined(RayConfig(num_cpus=0.5, workers=2), "test.ray") as found:
        yield found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """As small as a teacher can be: what it says does not matter here."""
    return make_checkpoint(
        tmp_path_factory.mktemp("teacher"), hidden=16, layers=1, heads=1, head_dim=16, intermediate=16
    )


def config_data(folder, run_dir="unused", **traces):
    ray = {"workers": 2, "num_cpus": 0.4} | traces.pop("ray", {})
    return {
        "name": "test",
        "run_dir": str(run_dir),
        "problems": {"source": "demo", "count": PROBLEMS},
        "traces": {
            "engine": "jax",
            "teacher": str(folder),
            "samples": SAMPLES,
            "max_tokens": 32,
            "batch": 4,
            "executor": "ray",
            "ray": ray,
            **traces,
        },
        "data": {"row_tokens": 64},
        "student": {"init": "demo"},
        "train": {"batch_rows": 1, "steps": 1, "optimizer": {"learning_rate": 0.1}},
    }


def make_config(folder, **traces):
    return configs.build(config_data(folder, **traces))


def make_run(folder):
    run = RunDir(folder)
    rows = [
        Problem(id=f"s:{n}", prompt=f"Ann has {n} pens.", answer=str(n), domain="math", source=f"s:{n}")
        for n in range(PROBLEMS)
    ]
    write_records(run.problems / "problems.parquet", Problem, rows)
    return run


def read(run):
    return list(read_records(run.traces, Trace))


def assert_same_logprobs(run, other):
    """Sums differ in their last bits with what a sequence is scored beside."""
    rows, others = (list(logprobs.read_logprobs(each.traces / logprobs.FOLDER)) for each in (run, other))
    assert [name for name, _ in rows] == [name for name, _ in others]
    for (_, found), (_, wanted) in zip(rows, others, strict=True):
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)
        np.testing.assert_allclose(found.sampled, wanted.sampled, atol=1e-5)


@pytest.fixture(scope="module")
def local(teacher, tmp_path_factory):
    """The run that has never heard of Ray."""
    run = make_run(tmp_path_factory.mktemp("local"))
    collect.generate(make_config(teacher, executor="local", logprobs=3), run)
    return run


def processes(name):
    """Ids of the living processes of Ray's that do something; it names them by what it is, as `ray::Judge.check`."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if line.read_bytes().startswith(b"ray::" + name.encode()):
                found.append(int(line.parent.name))
    return found


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def lines_of(run):
    journal = run.traces / collect.JOURNAL
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


# ------------------------------------------------------------------------------------------------- generation


DRIVER = """
import sys
from pathlib import Path
from jaxdistill.records import RunDir
from jaxdistill.traces import collect
from tests.test_cluster import make_config
collect.generate(make_config(sys.argv[1], logprobs=3, batch=1, ray={"address": sys.argv[3]}), RunDir(Path(sys.argv[2])))
"""


def test_driver_and_worker_are_killed_and_traces_and_logprobs_are_the_same(
    cluster, teacher, local, tmp_path, monkeypatch, capsys
):
    """First the driver, which has joined a cluster that outlives it; its workers do not. Then a worker of the next."""
    import ray

    run = make_run(tmp_path)
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, teacher, run.root, address]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as driver:
        assert wait_until(lambda: driver.poll() is not None or lines_of(run) > 2, 100)
        driver.kill()
    assert wait_until(lambda: not processes("EngineWorker"))
    done = lines_of(run) - 1
    assert 0 < done < PROBLEMS * SAMPLES - 8
    with open(run.traces / collect.JOURNAL, "ab") as journal:
        journal.write(b'{"id":"s:0/plain/0","outp')

    killed = []
    add = collect.Journal.add

    def killing(journal, completion):
        """When the first sample comes from one worker, another one is at work."""
        if not killed and (busy := processes("EngineWorker.exchange")):
            killed.append(busy[0])
            os.kill(busy[0], signal.SIGKILL)
        return add(journal, completion)

    monkeypatch.setattr(collect.Journal, "add", killing)
    assert collect.generate(make_config(teacher, logprobs=3), run)["resumed"] == done
    out = capsys.readouterr().out
    assert killed and "died, and is replaced; " in out and "(raylet)" not in out
    assert read(run) == read(local)
    assert_same_logprobs(run, local)
    assert lines_of(run) == 1 + PROBLEMS * SAMPLES
    assert wait_until(lambda: not processes("EngineWorker"))


def descendants(pid):
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += [int(child), *descendants(child)]
    return found


def test_ctrl_c_ends_a_cluster_of_our_own(teacher, tmp_path, user_environment):
    run, environment = RunDir(tmp_path / "run"), user_environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_data(teacher, run.root, samples=500, ray={"workers": 1})))
    command = [sys.executable, "-m", "jaxdistill", "generate", path]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        assert wait_until(lambda: driver.poll() is not None or lines_of(run) > 2, 100)
        started = descendants(driver.pid)
        driver.send_signal(signal.SIGINT)
        out, _ = driver.communicate(timeout=60)
    assert (driver.returncode, out.splitlines()[-1]) == (
        130,
        "jaxdistill generate: stopped; the same command goes on from here.",
    )
    assert len(started) > 3
    assert "ray" not in out.lower()
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 20)
    assert (run.traces / collect.JOURNAL).read_bytes().endswith(b"\n")


# ----------------------------------------------------------------------------------------------- verification


def test_verdicts_are_those_of_this_machine_byte_for_byte(cluster, tmp_path, monkeypatch):
    """Answers, filters and programs, though all workers are killed when the first of them is asked."""
    doubled = "```python\ndef double(x):\n    return 2 * x\n```"
    code = stage.problem("p", None)
    code = Problem(
        **{**vars(code), "tests": '{"kind": "asserts", "tests": ["assert double(4) == 8"]}', "domain": "code"}
    )
    programs = [
        stage.trace("p", n, f"<think>\nTwice.\n</think>\n{text}")
        for n, text in enumerate([doubled, doubled.replace("2 *", "3 *")])
    ]
    shards = (*stage.SHARDS, programs)
    here = stage.write_run(tmp_path / "here", [*stage.PROBLEMS, code], *shards)
    there = stage.write_run(tmp_path / "there", [*stage.PROBLEMS, code], *shards)
    counts = verify(stage.make_config(), here)
    killed = []
    do = RayPool._do

    def killing(self, *arguments):
        if not killed:
            killed.extend(processes("Judge"))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        return do(self, *arguments)

    monkeypatch.setattr(RayPool, "_do", killing)
    config = stage.make_config(executor="ray", ray={"workers": 2, "num_cpus": 0.4})
    found = verify(config, there)
    assert stage.verdict_bytes(there) == stage.verdict_bytes(here)
    isolation = found.pop("ray")["isolation"]
    assert found == counts
    tiers = {v.method.partition("(")[2].rstrip(")") for v in read_records(there.verdicts, Verdict) if "(" in v.method}
    assert set(isolation.values()) == tiers and tiers
    # what is known asks nobody
    monkeypatch.setattr(examine, "joined", None)
    assert verify(config, there) == counts
    assert wait_until(lambda: not processes("Judge"))


# ---------------------------------------------------------------------------------------------------- bad input


def test_a_cluster_that_cannot_be_had_is_one_line(cluster, teacher, tmp_path, monkeypatch):
    run = make_run(tmp_path)
    with pytest.raises(ValueError, match=r"traces\.ray asks for 2 workers of 0\.4 CPU, 64 GPU each, but") as error:
        collect.generate(make_config(teacher, ray={"num_gpus": 64, "wait_s": 0.5}), run)
    assert "\n" not in str(error.value) and not processes("EngineWorker")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    begun = time.monotonic()
    with pytest.raises(
        ValueError, match=r"traces\.ray\.address is 127\.0\.0\.1:9: connection refused; start the cluster"
    ):
        collect.generate(make_config(teacher, ray={"address": "127.0.0.1:9"}), run)
    assert time.monotonic() - begun < 10
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"traces\.executor: ray needs Ray; pip install 'jaxdistill\[ray\]'"):
        collect.generate(make_config(teacher), run)


def test_a_worker_that_cannot_start_says_why(cluster, teacher, tmp_path):
    config = make_config(teacher, logprobs=1000, ray={"workers": 1})
    with pytest.raises(ValueError, match=r"no worker is left; the last one on .*: traces\.logprobs=1000, of a voc"):
        collect.generate(config, make_run(tmp_path))


@pytest.mark.parametrize(
    ("ray", "message"),
    [
        ({"address": "somewhere"}, r"address is somewhere; write it as auto, HOST:PORT or ray://HOST:PORT"),
        ({"workers": 0}, "workers is 0"),
        ({"num_cpus": 0}, "a worker that needs nothing"),
        ({"resources": {"GPU": 1}}, "processors and GPUs by num_cpus, num_gpus"),
    ],
)
def test_settings_that_cannot_work_are_refused(ray, message):
    with pytest.raises(ValueError, match=message):
        make_config("demo", ray=ray)


def test_servers_need_no_cluster():
    with pytest.raises(ValueError, match=r"traces\.executor: ray runs the engines vllm and jax"):
        make_config("demo", engine="server", server={"urls": ["http://a/v1"]})
