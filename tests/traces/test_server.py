"""The engine `server`: what goes over the wire, and that no server, however hostile, ends a run or spoils a trace."""

import dataclasses
import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxdistill import config as configs
from jaxdistill.records import Problem, RunDir, Trace, read_records, write_records
from jaxdistill.traces import collect, engines, logprobs, replies
from jaxdistill.traces.engines import Request, Sampling
from tests.traces.fake_server import FAULTS, FakeServer, answer, reply_to
from tests.traces.tiny import checkpoint  # noqa: F401  (a fixture)

SAMPLING = Sampling(temperature=1.0, top_p=0.9, max_tokens=40, stop_ids=[2, 7])
QUICK = {"backoff_s": 0.01, "timeout_s": 1.0, "patience_s": 2.0, "in_flight": 4}


def make_requests(count):
    return [Request(f"p{n}/plain/0", [5, 6, n], 1000 + n) for n in range(count)]


def ask(folder, requests, urls, sampling=SAMPLING, **options):
    section = configs.ServerConfig(urls=tuple(urls), **QUICK | options)
    return engines.generate("server", folder, requests, sampling, vllm=configs.VLLMConfig(), batch=1, server=section)


def by_id(completions):
    found = list(completions)
    assert len({completion.id for completion in found}) == len(found)
    return {completion.id: completion for completion in found}


# ------------------------------------------------------------------------------------------------ the wire


def test_tokens_go_in_and_come_out_and_every_request_is_asked_once(checkpoint):  # noqa: F811
    requests = make_requests(50)
    with FakeServer(delay=0.01) as server:
        found = by_id(ask(checkpoint, requests, [server.url]))
    assert {name: each.output_ids for name, each in found.items()} == {
        request.id: answer(request.prompt_ids, request.seed, 2) for request in requests
    }
    assert all(each.text is None and each.error is None for each in found.values())
    asked = sorted(server.asked, key=lambda body: body["seed"])
    assert [body["prompt"] for body in asked] == [request.prompt_ids for request in requests]
    assert asked[3] == {
        "model": "fake",
        "prompt": [5, 6, 3],
        "seed": 1003,
        "max_tokens": 40,
        "temperature": 1.0,
        "top_p": 0.9,
        "stop_token_ids": [2, 7],
        "return_token_ids": True,
    }
    assert server.most_at_once == 4


def test_several_servers_share_the_work(checkpoint):  # noqa: F811
    with FakeServer(delay=0.02) as one, FakeServer(delay=0.02) as other:
        found = by_id(ask(checkpoint, make_requests(60), [one.url, other.url]))
    assert len(found) == 60
    assert len(one.asked) + len(other.asked) == 60
    assert min(len(one.asked), len(other.asked)) > 20


def test_greedy_needs_no_seed():
    greedy = Sampling(temperature=0.0, top_p=0.5, max_tokens=4, stop_ids=[2])
    body = replies.make_body(make_requests(1)[0], greedy, "m", configs.ServerConfig(), vllm=True)
    assert "seed" not in body
    assert body["top_p"] == 1.0


def test_logprobs_are_sorted_and_the_drawn_token_has_its_own(checkpoint):  # noqa: F811
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=40, stop_ids=[2], logprobs=3)
    with FakeServer() as server:
        found = by_id(ask(checkpoint, make_requests(2), [server.url], sampling))
    one = found["p1/plain/0"]
    assert one.logprobs is not None
    assert one.logprobs.ids.tolist() == [[token, token + 1, token + 2] for token in one.output_ids]
    assert one.logprobs.logprobs.tolist() == [[-1.0, -2.0, -3.0]] * len(one.output_ids)
    assert one.logprobs.sampled.tolist() == [-1.0] * len(one.output_ids)


def test_the_key_comes_from_the_environment_and_is_told_to_nobody(checkpoint, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MY_KEY", "secret-123")
    with FakeServer({1000: ("400", 9)}, key="secret-123") as server:
        found = by_id(ask(checkpoint, make_requests(2), [server.url], api_key_env="MY_KEY"))
        assert found["p1/plain/0"].error is None
        monkeypatch.setenv("MY_KEY", "secret-124")
        with pytest.raises(ValueError, match="HTTP 401: wrong key; put the key into the environment") as error:
            list(ask(checkpoint, make_requests(2), [server.url], api_key_env="MY_KEY"))
    assert "secret" not in str(error.value)


# -------------------------------------------------------------------------------------------------- a hostile server

REASONS = {
    "stall": "no answer within 0.3 s",
    "close": "the connection was lost",
    "cut": "the connection was lost",
    "429": "HTTP 429: no, 429",
    "500": "HTTP 500: no, 500",
    "html": "not JSON: a page of HTML: Bad Gateway",
    "broken": "not JSON",
    "list": "no choices",
    "no choice": "0 choices",
    "two choices": "2 choices",
    "wrong count": "token ids, but the server counted 1",
    "too long": "999 token ids with max_tokens 40",
    "no tokens": "an empty response",
    "bad tokens": "no list of token ids",
    "empty": "an empty response",
    "other prompt": "another prompt",
    "aborted": "finish_reason 'abort'",
    "nan": "not a finite number",
    "no logprobs": "logprobs that are missing",
    "few logprobs": "logprobs that are missing",
}


def test_a_hostile_server_costs_only_the_requests_that_it_never_answers(checkpoint):  # noqa: F811
    """Every fault twice: at one request for good, at another twice and then no more."""
    requests = make_requests(80)
    kinds = [*REASONS]
    faults = {1000 + n: (kind, 999) for n, kind in enumerate(kinds)}
    faults |= {1040 + n: (kind, 2) for n, kind in enumerate(kinds)}
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=40, stop_ids=[2], logprobs=2)
    with FakeServer(faults) as server:
        found = by_id(ask(checkpoint, requests, [server.url], sampling, retries=3, timeout_s=0.3))
    assert set(found) == {request.id for request in requests}
    for n, kind in enumerate(kinds):
        failed = found[f"p{n}/plain/0"]
        assert (failed.finish_reason, failed.output_ids) == ("error", [])
        assert REASONS[kind] in failed.error, kind
        # a server that has too much to do is given time (`patience_s`), not attempts
        attempts = r"\d\d" if kind == "429" else "4"
        assert re.search(rf"\(the last of {attempts} attempts\)$", failed.error), failed.error
    good = [each for each in found.values() if each.error is None]
    assert len(good) == 80 - len(kinds)
    assert all(
        each.output_ids == answer([5, 6, int(each.id[1:].split("/")[0])], 1000 + int(each.id[1:].split("/")[0]), 2)
        for each in good
    )
    assert set(REASONS) | {"400"} == set(FAULTS)


def test_a_bad_request_is_not_repeated(checkpoint):  # noqa: F811
    with FakeServer({1001: ("400", 999)}) as server:
        found = by_id(ask(checkpoint, make_requests(3), [server.url]))
    assert found["p1/plain/0"].error == "HTTP 400: no, 400"
    assert len(server.asked) == 3


def test_retry_after_is_heeded(checkpoint):  # noqa: F811
    with FakeServer({1000: ("429", 1)}) as server:
        begun = time.monotonic()
        found = by_id(ask(checkpoint, make_requests(1), [server.url], backoff_s=30.0))
    assert found["p0/plain/0"].error is None
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"choices": None}, "no choices"),
        ({"choices": [{"finish_reason": "stop", "token_ids": [True]}]}, "no list of token ids"),
        ({"choices": [{"finish_reason": "length", "token_ids": [5]}]}, "ended by length"),
        ({"choices": [{"finish_reason": None, "token_ids": [5]}]}, "finish_reason None"),
        ({"choices": [{"finish_reason": "stop", "text": 5}]}, "a text that is none"),
    ],
)
def test_what_is_no_completion_is_said(change, reason):
    with pytest.raises(replies.Failed, match=reason):
        replies.read_completion(json.dumps(change).encode(), make_requests(1)[0], SAMPLING, "completions")


def test_a_server_without_token_ids_gives_text():
    reply = {"choices": [{"finish_reason": "stop", "text": "five"}], "usage": {"completion_tokens": 1}}
    found = replies.read_completion(json.dumps(reply).encode(), make_requests(1)[0], SAMPLING, "completions")
    assert (found.text, found.output_ids, found.output_tokens) == ("five", [], 1)


def test_infinite_and_positive_logprobs_are_refused():
    for value in (math.nan, math.inf, -math.inf, 0.5):
        with pytest.raises(ValueError, match="not a finite number"):
            logprobs.from_candidates([{5: value, 6: -1.0}], [5], 1)


# ---------------------------------------------------------------------------------- servers that are not there


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_server_at_all_ends_the_run_with_a_reason(checkpoint):  # noqa: F811
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ValueError, match=r"no server could be reached for 0\.6 s \(http"):
        list(ask(checkpoint, make_requests(2), [url], patience_s=0.6))


def test_one_server_is_enough_while_another_is_not_there(checkpoint):  # noqa: F811
    with FakeServer() as server:
        urls = [f"http://127.0.0.1:{free_port()}/v1", server.url]
        assert len(by_id(ask(checkpoint, make_requests(20), urls))) == 20


def test_another_service_or_model_is_named(checkpoint):  # noqa: F811
    with FakeServer(models=("a", "b")) as server:
        with pytest.raises(ValueError, match=r"serves several models \(a, b\); name one"):
            list(ask(checkpoint, make_requests(2), [server.url]))
        with pytest.raises(ValueError, match=r"serves no model 'c' \(a, b\)"):
            list(ask(checkpoint, make_requests(2), [server.url], model="c"))
        assert len(by_id(ask(checkpoint, make_requests(2), [server.url], model="b"))) == 2
        with pytest.raises(ValueError, match="HTTP 404"):
            list(ask(checkpoint, make_requests(2), [server.url.replace("/v1", "/x/v1")]))


def test_a_prompt_beyond_the_servers_context_is_told_before_anything_is_asked(tmp_path):
    long = Request("p0/plain/0", list(range(230)), 0)
    with FakeServer() as server, pytest.raises(ValueError, match=r"230 tokens \+ max_tokens=40 > 256"):
        list(ask(tmp_path, [long], [server.url]))
    assert server.asked == []


def test_a_server_that_dies_and_comes_back_costs_no_request(checkpoint):  # noqa: F811
    """A process is killed in the middle of its answers, and started again a second later, on the same port."""
    port = free_port()
    command = [sys.executable, Path(__file__).with_name("fake_server.py"), str(port), "0.05"]
    processes = [subprocess.Popen(command)]
    found, killer = [], None

    def kill_and_start():
        processes[0].kill()
        time.sleep(1)
        processes.append(subprocess.Popen(command))

    try:
        for completion in ask(checkpoint, make_requests(100), [f"http://127.0.0.1:{port}/v1"], patience_s=20):
            found.append(completion)
            if len(found) == 30:
                killer = threading.Thread(target=kill_and_start)
                killer.start()
                time.sleep(0.1)
    finally:
        if killer:
            killer.join()
        for process in processes:
            process.kill()
            process.wait()
    assert len(by_id(found)) == 100
    assert [each.error for each in found if each.error] == []


# --------------------------------------------------------------------------------------------------- a whole stage


def make_config(folder, url, **traces):
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
                "server": {"urls": [url], **QUICK},
                **traces,
            },
            "data": {"row_tokens": 64},
            "student": {"init": "demo"},
            "train": {"batch_rows": 1, "steps": 1, "optimizer": {"learning_rate": 0.1}},
        }
    )


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    problems = [
        Problem(id=f"set:{n}", prompt=f"Ann has {n} pens.", answer=str(n), domain="math", source=f"set:{n}")
        for n in range(6)
    ]
    write_records(run.problems / "problems.parquet", Problem, problems)
    return run


def test_a_stage_with_logprobs_and_two_styles(run, checkpoint):  # noqa: F811
    with FakeServer() as server:
        config = make_config(checkpoint, server.url, logprobs=2, styles=["plain", "cot"])
        counts = collect.generate(config, run)
    traces = list(read_records(run.traces, Trace))
    assert [trace.id for trace in traces] == [
        f"set:{n}/{style}/{sample}" for n in range(6) for style in ("plain", "cot") for sample in range(2)
    ]
    assert counts["samples"] == 24
    for trace in traces:
        assert trace.output_ids == answer(trace.prompt_ids, trace.seed, 2)
    assert len(traces[2].prompt_ids) > len(traces[0].prompt_ids)
    stored = list(logprobs.read_logprobs(run.traces / logprobs.FOLDER))
    assert [name for name, _ in stored] == [trace.id for trace in traces]
    assert [found.ids[:, 0].tolist() for _, found in stored] == [trace.output_ids for trace in traces]


def test_failures_are_recorded_and_drawn_again_on_request(run, checkpoint):  # noqa: F811
    with FakeServer() as server:
        config = make_config(checkpoint, server.url)
        seed = collect.WorkList(config.traces, list(read_records(run.problems, Problem)), None).request(5).seed
        server.faults = {seed: ("500", 999)}
        config = make_config(checkpoint, server.url, server={"urls": [server.url], **QUICK, "retries": 1})
        counts = collect.generate(config, run)
        assert counts["finished"] == {"error": 1, "stop": 11}
        failed = next(trace for trace in read_records(run.traces, Trace) if trace.finish_reason == "error")
        assert (failed.id, failed.error) == ("set:2/plain/1", "HTTP 500: no, 500 (the last of 2 attempts)")
        server.faults = {}
        assert collect.generate(config, run)["finished"] == {"error": 1, "stop": 11}
        again = make_config(checkpoint, server.url, retry_failed=True)
        counts = collect.generate(again, run)
        assert (counts["finished"], counts["resumed"]) == ({"stop": 12}, 11)
        assert collect.generate(config, run)["finished"] == {"stop": 12}


def test_a_chat_server_needs_no_checkpoint_here(run):
    with FakeServer() as server:
        section = {"urls": [server.url], **QUICK, "api": "chat"}
        config = make_config("deepseek-reasoner", server.url, server=section, system="Be brief.", styles=["cot"])
        counts = collect.generate(config, run)
    assert counts["finished"] == {"stop": 12}
    assert server.asked[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Ann has 0 pens.\n\nLet's think step by step."},
    ]
    trace = next(iter(read_records(run.traces, Trace)))
    assert trace.thinking == "Thinking of Ann has 0 pens.\n\nLet's think step by step."
    assert trace.content == "It is \\boxed{1}."
    assert (trace.teacher, trace.output_ids) == ("deepseek-reasoner", [])


# ----------------------------------------------------------------------------------------- scoring what is there

SCORING = Sampling(temperature=0.0, top_p=1.0, max_tokens=1, stop_ids=[], logprobs=3)
SCORE_REASONS = {
    "prompt nan": "not a finite number",
    "prompt short": "prompt_logprobs at 4 positions for 5 tokens",
    "prompt none": "no prompt_logprobs, which vLLM's completions have",
    "prompt null": "not in vLLM's form",
    "prompt few": "logprobs of 2 tokens at position 1, not of 3 and the drawn one",
    "prompt text": "not in vLLM's form",
    "other prompt": "another prompt",
    "no choice": "0 choices",
    "500": "HTTP 500",
    "stall": "no answer within 0.3 s",
    "broken": "not JSON",
}


def test_responses_are_scored_over_several_servers_whatever_they_answer(checkpoint):  # noqa: F811
    kinds = [*SCORE_REASONS]
    requests = [Request(f"t{n}", [50 + n, 6, 7], 0, response_ids=[30 + n, 2]) for n in range(40)]
    faults = {50 + n: (kind, 99) for n, kind in enumerate(kinds)} | {70 + n: (kind, 2) for n, kind in enumerate(kinds)}
    with FakeServer(faults, delay=0.01) as one, FakeServer(faults, delay=0.01) as other:
        found = by_id(ask(checkpoint, requests, [one.url, other.url], SCORING, retries=4, timeout_s=0.3))
    assert min(len(one.asked), len(other.asked)) > 10
    body = one.asked[0]
    assert (body["prompt_logprobs"], body["max_tokens"], body["temperature"], len(body["prompt"])) == (3, 1, 0.0, 5)
    for n, kind in enumerate(kinds):
        assert re.search(SCORE_REASONS[kind], found[f"t{n}"].error or ""), kind
    good = [each for each in found.values() if each.error is None]
    assert len(good) == 40 - len(kinds)
    for each in good:
        n = int(each.id[1:])
        assert each.output_ids == [30 + n, 2]
        assert each.logprobs is not None
        assert each.logprobs.ids.tolist()[0] == [31 + n, 32 + n, 33 + n]
        np.testing.assert_allclose(each.logprobs.logprobs, [[-0.1, -0.2, -0.3]] * 2, rtol=1e-6)
        np.testing.assert_allclose(each.logprobs.sampled, [-(30 + n) / 10 - 1, -1.2], rtol=1e-6)


def test_a_server_that_gives_fewer_logprobs_ends_the_run(checkpoint):  # noqa: F811
    request = Request("t", [50], 0, response_ids=[5])
    with (
        FakeServer({50: ("too many", 9)}) as server,
        pytest.raises(ValueError, match=r"max allowed: 20; start it with --max-logprobs so high, or lower"),
    ):
        list(ask(checkpoint, [request], [server.url], SCORING))


def test_a_stage_of_traces_that_a_server_scores(run, checkpoint, capsys):  # noqa: F811
    """One can never be scored, and keeps its place without logprobs; the rest is asked once, over two runs."""
    found = [dataclasses.replace(p, solution=f"It is {p.answer}.") for p in read_records(run.problems, Problem)]
    write_records(run.problems / "problems.parquet", Problem, found)
    with FakeServer() as server:
        options = {"engine": "import", "scorer": "server", "logprobs": 2, "samples": 1}
        config = make_config(checkpoint, server.url, server={"urls": [server.url], **QUICK, "retries": 1}, **options)
        reply, failing = server._reply, []

        async def refuse_one(request, body):
            failing[:] = failing or [body["prompt"]]
            return await (FAULTS["500"](request, {}) if body["prompt"] == failing[0] else reply(request, body))

        server._reply = refuse_one
        counts = collect.generate(config, run)
        traces = list(read_records(run.traces, Trace))
        assert counts["finished"] == {"imported": 6}
        stored = dict(logprobs.read_logprobs(run.traces / logprobs.FOLDER))
        unscored = [trace for trace in traces if trace.id not in stored]
        assert len(unscored) == 1 and len(stored) == 5
        told = f"1 of 6 traces could not be scored; the first is {unscored[0].id}: HTTP 500: no, 500"
        assert told in " ".join(capsys.readouterr().out.split())
        assert len(server.asked) == 7
        server._reply = reply
        again = dataclasses.replace(config, traces=dataclasses.replace(config.traces, retry_failed=True))
        collect.generate(again, run)
        assert len(server.asked) == 8
    for trace in read_records(run.traces, Trace):
        ids = dict(logprobs.read_logprobs(run.traces / logprobs.FOLDER))[trace.id].ids
        assert ids.tolist() == [[token + 1, token + 2] for token in trace.output_ids]


def test_scoring_needs_a_server_that_gives_tokens():
    options = {"engine": "import", "scorer": "server", "logprobs": 2}
    with pytest.raises(ValueError, match=r"traces\.scorer: server needs `traces\.server\.urls`"):
        make_config("demo", "", server={}, **options)
    with pytest.raises(ValueError, match=r"a server with server\.api: completions"):
        make_config("demo", "", server={"start": 1, "api": "chat"}, **options)


CTRL_C = """
import sys
from pathlib import Path
from jaxdistill.records import RunDir
from jaxdistill.traces import collect
from tests.traces.test_server import make_config
try:
    collect.generate(make_config(sys.argv[1], sys.argv[2], samples=500), RunDir(Path(sys.argv[3])))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_ends_it_at_once_and_keeps_what_is_done(run, checkpoint):  # noqa: F811
    journal = run.traces / collect.JOURNAL
    with FakeServer(delay=0.02) as server:
        command = [sys.executable, "-c", CTRL_C, checkpoint, server.url, run.root]
        with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while not (journal.exists() and journal.read_bytes().count(b"\n") > 20) and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            assert process.wait(20) == 130
            assert time.monotonic() - begun < 5
    assert journal.read_bytes().endswith(b"\n")


def test_the_fake_server_is_like_vllms():
    """Guards the fake against drifting from what the reader wants: its plain reply is read without complaint."""
    request = make_requests(1)[0]
    body = replies.make_body(request, SAMPLING, "fake", configs.ServerConfig(), vllm=True)
    found = replies.read_completion(json.dumps(reply_to(body)).encode(), request, SAMPLING, "completions")
    assert found.output_ids == answer(request.prompt_ids, request.seed, 2)
