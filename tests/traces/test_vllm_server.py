"""The engine `server` where it starts real vLLM servers itself; apart from test_vllm.py, so that both run at once."""

import contextlib
import dataclasses
import os
import signal
from pathlib import Path

import pytest

from jaxdistill import config as configs
from jaxdistill import tokenization
from jaxdistill.demo.task import make_problems
from jaxdistill.traces import engines
from jaxdistill.traces.engines import Request, Sampling
from tests.traces.tiny import (
    VLLM,
    assert_logprobs,
    checkpoint,  # noqa: F401  (a fixture)
    demo_requests,
    wait_until,
)


def pids_of(name):
    """Ids of living processes by a word of their command line."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if name.encode() in line.read_bytes():
                found.append(int(line.parent.name))
    return found


def command_of(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


@pytest.mark.vllm
def test_a_server_of_our_own_is_started_again_when_it_dies_and_gone_at_the_end(checkpoint, tmp_path):  # noqa: F811
    """Also: sampled token ids and raw logprobs survive the way through HTTP, and responses are scored by prefill."""
    requests, sampling = demo_requests(checkpoint, 60, temperature=0.7)
    sampling = dataclasses.replace(sampling, logprobs=24, top_p=0.9)  # beyond the 20 that vLLM allows by itself
    tokenizer = tokenization.load_tokenizer(str(checkpoint))
    solutions = [tokenization.encode_response(tokenizer, solution) for _, _, solution in make_problems(12, seed=5)]
    scored = {f"scored {r.id}": ids for r, ids in zip(requests, solutions, strict=False)}
    requests += [
        dataclasses.replace(r, id=f"scored {r.id}", response_ids=ids)
        for r, ids in zip(requests, solutions, strict=False)
    ]
    section = configs.ServerConfig(start=1, in_flight=8)
    completions = engines.generate(
        "server",
        checkpoint,
        requests,
        sampling,
        vllm=configs.VLLMConfig(**VLLM),
        batch=1,
        server=section,
        log=tmp_path / "vllm.log",
    )
    found = [next(completions)]
    servers = [pid for pid in pids_of("openai.api_server") if str(checkpoint) in command_of(pid)]
    os.kill(min(servers), signal.SIGKILL)
    found += list(completions)
    assert {each.id: each.error for each in found} == {request.id: None for request in requests}
    assert len(found) == len(requests)
    assert {each.id: each.output_ids for each in found if each.id in scored} == scored
    assert_logprobs(checkpoint, {request.id: request.prompt_ids for request in requests}, found, 24)
    assert wait_until(lambda: not any(str(checkpoint) in command_of(pid) for pid in pids_of("openai.api_server")))


def test_a_server_that_never_comes_up_leaves_its_last_words(checkpoint, tmp_path):  # noqa: F811
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "(APIServer pid=7) ValueError: no such quantization"\nexit 3\n')
    python.chmod(0o755)
    sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=4, stop_ids=[2])
    with pytest.raises(ValueError, match=r"vllm-server-0\.log\): ValueError: no such quantization$"):
        list(
            engines.generate(
                "server",
                checkpoint,
                [Request("a", [5, 6], 0)],
                sampling,
                vllm=configs.VLLMConfig(**VLLM, python=str(python)),
                batch=1,
                server=configs.ServerConfig(start=1),
                log=tmp_path / "vllm.log",
            )
        )
