"""Servers of our own, without vLLM in them: started, started again, and gone with whoever started them."""

import contextlib
import importlib.util
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxdistill import config as configs
from jaxdistill.records import Problem, RunDir, write_records
from jaxdistill.traces import collect, servers
from tests.traces.tiny import checkpoint  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_server.py")
# what vllm_server.py does, with another server at its end
INTERPRETER = """#!/bin/sh
exec {python} -c '
import json, os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import vllm_worker as worker
worker.die_with_parent()
worker.start_watchdog()
port = json.loads(sys.argv[2])["arguments"]["port"]
os.execv(sys.executable, [sys.executable, "{fake}", str(port), "0.05"])
' "$@"
"""


@pytest.fixture
def interpreter(tmp_path):
    path = tmp_path / "python"
    path.write_text(INTERPRETER.format(python=sys.executable, fake=FAKE))
    path.chmod(0o755)
    return path


def make_run(folder, problems=40):
    run = RunDir(folder)
    rows = [
        Problem(id=f"s:{n}", prompt=f"Ann has {n} pens.", answer=str(n), domain="math", source=f"s:{n}")
        for n in range(problems)
    ]
    write_records(run.problems / "problems.parquet", Problem, rows)
    return run


def make_config(folder, python, **traces):
    server = {"start": 2, "in_flight": 4, "backoff_s": 0.1}
    return configs.build(
        {
            "name": "test",
            "run_dir": "unused",
            "problems": {"source": "demo", "count": 4},
            "traces": {
                "engine": "server",
                "teacher": str(folder),
                "samples": 2,
                "max_tokens": 40,
                "server": server,
                "vllm": {"python": str(python)},
                **traces,
            },
            "data": {"row_tokens": 64},
            "student": {"init": "demo"},
            "train": {"batch_rows": 1, "steps": 1, "optimizer": {"learning_rate": 0.1}},
        }
    )


def fakes():
    """Ids of the living fake servers that were started through the script above."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = line.read_bytes().split(b"\0")
            if str(FAKE).encode() in words and words[-2:-1] == [b"0.05"]:
                found.append(int(line.parent.name))
    return found


def gone(seconds=20.0):
    end = time.monotonic() + seconds
    while fakes() and time.monotonic() < end:
        time.sleep(0.05)
    return not fakes()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_servers_are_started_shared_restarted_and_stopped(tmp_path, checkpoint, interpreter, monkeypatch):  # noqa: F811
    run = make_run(tmp_path / "run")
    killed = []
    add = collect.Journal.add

    def kill_one(journal, completion):
        if len(journal) == 20:
            killed.append(min(fakes()))
            os.kill(killed[0], signal.SIGKILL)
        return add(journal, completion)

    monkeypatch.setattr(collect.Journal, "add", kill_one)
    counts = collect.generate(make_config(checkpoint, interpreter), run)
    assert killed
    assert counts["finished"] == {"stop": 80}
    assert sorted(path.name for path in run.traces.glob("*.log")) == ["vllm-server-0.log", "vllm-server-1.log"]
    assert gone()


COLLECT = """
import sys
from pathlib import Path
from jaxdistill.records import RunDir
from jaxdistill.traces import collect
from tests.traces.test_servers import make_config
collect.generate(make_config(sys.argv[1], sys.argv[2], samples=200), RunDir(Path(sys.argv[3])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_kill_9_of_the_collector_takes_its_servers_along(tmp_path, checkpoint, interpreter):  # noqa: F811
    run = make_run(tmp_path / "run")
    journal = run.traces / collect.JOURNAL
    command = [sys.executable, "-c", COLLECT, checkpoint, interpreter, run.root]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 5) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert fakes()
        process.kill()
    assert gone()


def test_ports_differ():
    ports = list(servers.free_ports(20))
    assert len(set(ports)) == 20


@pytest.fixture
def launcher(monkeypatch):
    spec = importlib.util.spec_from_file_location("vllm_server", servers.LAUNCHER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return module


def test_vllm_is_told_its_arguments(launcher):
    arguments = {"model": "/m", "enforce_eager": True, "enable_prefix_caching": False, "quantization": None, "port": 8}
    assert launcher.flags(arguments) == [
        "--model", "/m", "--enforce-eager", "--no-enable-prefix-caching", "--port", "8"
    ]  # fmt: skip


def test_every_server_has_accelerators_of_its_own(launcher, monkeypatch):
    assert [launcher.devices(rank, 2) for rank in range(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert launcher.devices(1, 1) == "5"
    with pytest.raises(SystemExit, match="3 devices are too few for server 1 with 2"):
        launcher.devices(1, 2)


def test_more_connections_than_the_system_allows_are_refused_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    servers.allow_connections(100)
    servers.allow_connections(2000)
    assert asked == [(2256, 4096)]
    with pytest.raises(ValueError, match="4000 requests at a time need 4256 open files, but the system allows 4096"):
        servers.allow_connections(4000)
