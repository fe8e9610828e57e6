"""The engine `server` against servers that refuse: when a run stops, what it says then, and that it asks again."""

import dataclasses
import email.utils
import json
import time

import pytest

from jaxdistill import cli
from jaxdistill import config as configs
from jaxdistill.records import Problem, RunDir, Trace, read_manifest, read_records, write_records
from jaxdistill.traces import collect, replies, server_errors
from jaxdistill.traces.engines import Request, Sampling
from jaxdistill.traces.server_errors import Failed, Refused, Tally, advice, check_status
from tests.helpers import tiny_config
from tests.traces.fake_server import FakeServer
from tests.traces.strict_server import REPLY, StrictServer
from tests.traces.test_server import QUICK, make_config
from tests.traces.tiny import checkpoint  # noqa: F401  (a fixture)

GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=4, stop_ids=[2])
PLAIN = Sampling(temperature=0.6, top_p=0.95, max_tokens=4, stop_ids=[2])
CHAT = Request("p/plain/0", [], 7, [{"role": "user", "content": "1 + 1 = ?"}])


def chat(url, **server):
    return make_config("m", url, samples=1, server={"urls": [url], "api": "chat", **QUICK, "retries": 1, **server})


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    problems = [
        Problem(id=f"set:{n}", prompt=f"{n} + 1 = ?", answer=str(n + 1), domain="math", source=f"set:{n}")
        for n in range(40)
    ]
    write_records(run.problems / "problems.parquet", Problem, problems)
    return run


# --------------------------------------------------------------------------------------------- documented fields


def test_a_server_that_refuses_unknown_fields_is_asked_with_documented_ones(run):
    with StrictServer() as server:
        counts = collect.generate(chat(server.url), run)
    assert counts["finished"] == {"stop": 40}
    assert set(server.asked[0]) == {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}
    assert [trace.content for trace in read_records(run.traces, Trace)] == ["\\boxed{2}"] * 40


def test_vllms_own_fields_go_to_vllm_alone():
    for vllm in (False, True):
        for api in ("chat", "completions"):
            body = replies.make_body(CHAT, PLAIN, "m", configs.ServerConfig(api=api), vllm=vllm)
            own = {"return_token_ids"} | ({"stop_token_ids"} if api == "completions" else set())
            assert own & set(body) == (own if vllm else set())


def test_the_list_of_models_says_what_is_vllm():
    auto, openai, vllm = (configs.ServerConfig(dialect=d) for d in ("auto", "openai", "vllm"))
    from jaxdistill.traces.server_models import speaks_vllm

    ours, other = {"owned_by": "vllm"}, {"owned_by": "openai"}
    assert [speaks_vllm(ours, c) for c in (auto, openai, vllm)] == [True, False, True]
    assert [speaks_vllm(other, c) for c in (auto, openai, vllm)] == [False, False, True]
    assert not speaks_vllm({}, auto)


def test_further_fields_are_the_users_and_what_is_refused_is_left_out(run):
    extra = {"top_k": 20, "min_p": 0.1}
    config = configs.ServerConfig(
        extra=extra, omit=("seed", "temperature"), max_tokens_field="max_completion_tokens", api="chat"
    )
    body = replies.make_body(CHAT, PLAIN, "m", config, vllm=False)
    assert body == {"model": "m", "messages": CHAT.messages, "max_completion_tokens": 4, "top_p": 0.95} | extra
    with pytest.raises(ValueError, match="set by other keys"):
        configs.ServerConfig(extra={"max_tokens": 3})
    with pytest.raises(ValueError, match="what may be left out is temperature, top_p, seed"):
        configs.ServerConfig(omit=("model",))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host:8000/v1/chat/completions", r"leave /chat/completions out: http://host:8000/v1\."),
        ("http://host:8000/v1/completions", r"leave /completions out: http://host:8000/v1\."),
        ("http://host:8000", "write it as http://HOST:PORT/v1"),
        ("host:8000/v1", "write it as http://HOST:PORT/v1"),
    ],
)
def test_a_base_url_is_no_endpoint(url, message):
    """EleutherAI/lm-evaluation-harness 3125: the URL of another endpoint, and 400 for every request."""
    with pytest.raises(ValueError, match=message):
        configs.ServerConfig(urls=(url,))


def test_base_urls_of_hosted_servers_need_not_end_in_v1():
    urls = ("https://api.example.com/api/paas/v4/", "https://example.com/v1beta/openai")
    assert configs.ServerConfig(urls=urls).urls == urls


# ------------------------------------------------------------------------------------------------ when a run stops


@pytest.mark.parametrize(
    ("refused", "server", "todo"),
    [
        (("seed",), {}, r"set server\.omit: \[seed\]"),
        (("temperature",), {"omit": ["seed"]}, r"set server\.omit: \[seed, temperature\]"),
        # simonw/llm 724, openai/openai-python 2046: reasoning models refuse max_tokens
        (("max_tokens",), {}, r"set server\.max_tokens_field: max_completion_tokens"),
        ((), {"dialect": "vllm"}, r"set server\.dialect: openai"),
        ((), {"extra": {"top_k": 5}}, r"take top_k out of server\.extra"),
    ],
)
def test_the_same_refusal_of_the_first_requests_stops_the_run_and_the_command_asks_again(run, refused, server, todo):
    """bespokelabsai/curator 202 and 251: every request failed, and an empty data set was the result. LlamaEdge 250 is
    one that does not know `seed`.
    """
    with StrictServer(refused) as strict:
        config = chat(strict.url, **server)
        match = rf"the first 8 requests were refused, all for one reason: HTTP 400: Unsupported parameter.*; {todo}"
        for _ in range(2):
            with pytest.raises(ValueError, match=match):
                collect.generate(config, run)
        assert len(strict.asked) == 16
        assert not list(run.traces.glob("*.parquet"))
        mended = {"omit": ["seed", "temperature"], "max_tokens_field": "max_completion_tokens"}
        assert collect.generate(chat(strict.url, **mended), run)["finished"] == {"stop": 40}


@pytest.mark.parametrize(
    "said",
    [
        # one-api, new-api, OpenAI, vLLM, Volcengine, AWS: what they say names the request
        "unsupported parameter: seed (request id: 2024112822334455667788abcdef{n:02d})",
        "unknown field seed, request_id: 3f2504e0-4f89-11d3-9a0c-0305e82c33{n:02d}",
        "Unsupported parameter seed. Request id: req_7Abcdefghij{n:02d}",
        "unsupported seed: chatcmpl-1234567abcdef{n:02d}",
        # of all requests, though something is too large
        "max_tokens is too large: 32768. This model supports at most 16384 completion tokens",
        "max_completion_tokens exceeds the limit of 8192",
    ],
)
def test_requests_that_are_refused_alike_stop_the_run_whatever_each_is_called(said):
    tally = Tally(100)
    stops = []
    for n in range(10, 10 + server_errors.PROBES):
        tally.asked += 1
        stops.append(tally.fail(Failed(f"HTTP 400: {said.format(n=n)}", retry=False, status=400)))
    assert stops[:-1] == [None] * (server_errors.PROBES - 1)
    assert stops[-1].startswith("the first 8 requests were refused, all for one reason: HTTP 400: ")


def test_a_server_of_one_model_that_speaks_of_it_has_no_other():
    config = configs.ServerConfig(urls=("http://h/v1",), api="chat")
    said = "HTTP 400: max_tokens is too large: 64. This model supports at most 32 completion tokens"
    assert advice(said, config, ["m"]) == "lower traces.max_tokens"
    assert "server.model" not in advice("HTTP 400: this model is not for chats", config, ["m"])
    assert advice("HTTP 400: this model is not for chats", config, ["m", "n"]).startswith("set server.model")


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 8192 (max_tokens exceeds)",
        "the prompt is too long: 9000 tokens",
        "content_filter",
    ],
)
def test_what_may_be_one_requests_own_fault_stops_nothing(said):
    assert not Failed(f"HTTP 400: {said}", retry=False, status=400).of_all


def test_a_stage_that_a_strict_server_stops_is_not_done(tmp_path, capsys):
    with StrictServer() as server:
        section = {"urls": [server.url], "api": "chat", **QUICK, "dialect": "vllm"}
        traces = {"engine": "server", "teacher": "m", "server": section}
        path = tiny_config(tmp_path, traces=traces, problems={"source": "demo", "count": 12, "seed": 1})
        for _ in range(2):
            assert cli.main(["generate", str(path)]) == 1
            said = capsys.readouterr().err
            assert "HTTP 400: Unsupported parameter: 'return_token_ids'" in said
            assert "set server.dialect: openai" in said
        assert read_manifest(tmp_path / "run" / "traces") is None
        assert cli.main(["generate", str(path), "--set", "traces.server.dialect=auto"]) == 0
    assert read_manifest(tmp_path / "run" / "traces")["counts"]["finished"] == {"stop": 12}


@pytest.mark.parametrize("status", [400, 422, 500])
def test_few_requests_that_all_fail_are_no_stage(run, status):
    """Fewer than would stop the run on the way; whatever the reason is."""
    problems = [p for p in read_records(run.problems, Problem)][:3]
    write_records(run.problems / "problems.parquet", Problem, problems)
    with StrictServer(status=status, body={"detail": [{"loc": ["body", "x"], "msg": "no such"}]}) as server:
        config = chat(server.url)
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"all requests failed, .*3 of 3.* HTTP {status}: body\.x: no"):
                collect.generate(config, run)
        server.body = None
        assert collect.generate(config, run)["finished"] == {"stop": 3}


def test_a_server_that_breaks_stops_the_run_and_nothing_is_noted_as_failed(run):
    """After some answers, nothing but errors: what was not answered is asked again, and nothing else."""
    problems = [dataclasses.replace(p, id=f"set:{n}", prompt=f"{n} = ?") for n in range(100) for p in [_first(run)]]
    write_records(run.problems / "problems.parquet", Problem, problems)
    with StrictServer() as server:
        answer = server.answer
        server.answer = lambda body: answer(body) if len(server.asked) < 10 else (503, {}, "<html><title>Busy</title>")
        config = chat(server.url, retries=0)
        with pytest.raises(ValueError, match=r"the last 64 requests failed.*503: a page of HTML: Busy; see to"):
            collect.generate(config, run)
        server.answer = answer
        counts = collect.generate(config, run)
    assert counts["finished"] == {"stop": 100}
    assert counts["resumed"] == 10


def _first(run):
    return next(iter(read_records(run.problems, Problem)))


def test_some_failures_are_counted_with_their_reasons(run):
    with StrictServer() as server:
        answer = server.answer

        def refuse_two(body):
            question = body["messages"][-1]["content"]
            too_long = {"error": {"message": f"This model's maximum context length is 8, not {question}"}}
            return (400, {}, too_long) if question in ("3 + 1 = ?", "5 + 1 = ?") else answer(body)

        server.answer = refuse_two
        counts = collect.generate(chat(server.url), run)
    assert counts["finished"] == {"error": 2, "stop": 38}
    assert sorted(counts["failures"]) == [
        f"HTTP 400: This model's maximum context length is 8, not {n} + 1 = ?" for n in (3, 5)
    ]


def test_requests_that_are_too_long_each_on_its_own_do_not_stop_a_run(run):
    """All of the first ones are, and the later ones are not."""
    with StrictServer(body={"message": "prompt is too long", "object": "error"}, good=20) as server:
        assert collect.generate(chat(server.url), run)["finished"] == {"error": 20, "stop": 20}


def test_a_tally_stops_only_for_what_all_have_in_common():
    def refusal(reason="HTTP 400: no such field", status=400):
        return Failed(reason, retry=False, status=status)

    tally = Tally(width=8)
    tally.asked = 40
    assert [tally.fail(refusal()) for _ in range(19)] == [None] * 19
    assert "the first 20 requests were refused" in (tally.fail(refusal()) or "")
    tally = Tally(width=8)
    tally.asked = 8
    assert [tally.fail(refusal(f"HTTP 400: {n}")) for n in range(40)] == [None] * 40
    tally.answer()
    assert [tally.fail(refusal()) for _ in range(40)] == [None] * 40
    assert [tally.fail(refusal("HTTP 400: content_filter")) for _ in range(40)] == [None] * 40
    busy = [tally.fail(Failed("HTTP 500: x", status=500)) for _ in range(64)]
    assert busy[:-1] == [None] * 63 and "the last 64 requests failed" in (busy[-1] or "")


# --------------------------------------------------------------------------------------------- keys, models, limits


def test_a_wrong_model_names_those_that_there_are(run):
    with StrictServer(models={"data": [{"id": "qwen3-8b"}, {"id": "qwen3-32b"}]}) as server:
        with pytest.raises(ValueError, match=r"no model 'qwen3-8' \(qwen3-8b, qwen3-32b\); name one of these"):
            collect.generate(chat(server.url, model="qwen3-8"), run)
        assert server.asked == []
        server.status, server.body = 404, {"error": {"message": "The model does not exist or you have no access."}}
        with pytest.raises(ValueError, match=r"404: The model does not exist .* The server lists qwen3-8b, qwen3-32b"):
            collect.generate(chat(server.url, model="qwen3-8b"), run)


def test_a_server_without_a_list_of_models_is_asked_by_the_name_that_is_given(run):
    with StrictServer(models={"error": "not found"}, models_status=404) as server:
        with pytest.raises(ValueError, match=r"404: not found; correct server\.model, server\.urls"):
            collect.generate(chat(server.url), run)
        assert collect.generate(chat(server.url, model="sonar"), run)["finished"] == {"stop": 40}
        assert server.asked[0]["model"] == "sonar"


def test_a_page_in_the_place_of_an_api_is_refused_at_once(run):
    with (
        StrictServer(models="<!doctype html><title>Open WebUI</title>") as server,
        pytest.raises(ValueError, match="not the answer of an OpenAI-compatible server"),
    ):
        collect.generate(chat(server.url), run)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, {"error": {"message": "Incorrect API key provided"}}, r"api_key_env names\. NO_KEY is not set"),
        (403, {"error": "Forbidden"}, "put the key into the environment variable"),
        (402, {"error": {"message": "Insufficient Balance"}}, "see to the account's quota"),
        # QwenLM/qwen-code 7841: a quota that is spent for the day was asked again in silence
        (429, {"error": {"message": "quota has been exhausted. It will reset at 00:00"}}, "see to the account's quota"),
        (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}, "quota"),
        (405, "<html><body><h1>Method Not Allowed</h1></body></html>", "HTTP 405: a page of HTML: Method Not Allowed"),
    ],
)
def test_what_refuses_everybody_stops_the_run_at_the_first_request(run, status, body, message):
    with StrictServer(status=status, body=body) as server:
        with pytest.raises(ValueError, match=message):
            collect.generate(chat(server.url, api_key_env="NO_KEY"), run)
        server.body = None
        assert collect.generate(chat(server.url), run)["finished"] == {"stop": 40}


def test_a_limited_rate_costs_no_attempts(run):
    """More refusals than attempts for every request, and none fails."""
    with StrictServer(status=429, headers={"Retry-After": "0.02"}, body={"error": "slow down"}, good=200) as server:
        assert collect.generate(chat(server.url, retries=0, patience_s=120), run)["finished"] == {"stop": 40}
    assert len(server.asked) == 240


def test_a_limit_without_an_end_stops_the_run(run):
    with (
        StrictServer(status=429, headers={"Retry-After": "0.01"}, body={"error": "slow down"}) as server,
        pytest.raises(ValueError, match="HTTP 429: slow down"),
    ):
        collect.generate(chat(server.url, retries=0, patience_s=0.2), run)


def test_times_to_wait():
    wait = server_errors.retry_after
    assert wait({}) is None
    assert wait({"Retry-After": "1.5"}) == 1.5
    assert wait({"Retry-After": "99999"}) == 600
    assert wait({"Retry-After": "2", "retry-after-ms": "250"}) == 0.25
    assert wait({"Retry-After": "soon"}) is None
    soon = wait({"Retry-After": email.utils.formatdate(time.time() + 30, usegmt=True)})
    assert soon is not None and 25 < soon <= 30
    assert wait({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0


# ------------------------------------------------------------------------------------------------- what is answered


def read(message=None, finish="stop", **reply):
    whole = {"choices": [{"message": message, "finish_reason": finish}], **reply}
    return replies.read_completion(json.dumps(whole).encode(), CHAT, GREEDY, "chat", "http://host/v1/chat/completions")


@pytest.mark.parametrize(
    ("reply", "kind", "reason"),
    [
        # UKGovernmentBEIS/inspect_ai 1534: OpenRouter's 429 in a reply of status 200, with choices of null
        ({"choices": None, "error": {"message": "Provider returned error", "code": 429,
          "metadata": {"raw": "Too Many Requests"}}}, Failed, "HTTP 429: Provider returned error (Too Many Requests)"),
        ({"error": {"message": "No auth", "code": 401}}, Refused, "HTTP 401: No auth"),
        ({"error": {"message": "Rate limit exceeded: free-models-per-day", "code": 429}}, Refused, "models-per-day"),
        ({"error": "went away"}, Failed, "an error instead of an answer: went away"),
        ({"choices": [{"error": {"message": "Upstream", "code": 502}, "finish_reason": "error"}]}, Failed, "HTTP 502"),
        ({"choices": None}, Failed, "no choices"),
        ({"choices": []}, Failed, "0 choices"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, Failed, "an empty response"),
        ({"choices": [{"message": None, "finish_reason": "stop"}]}, Failed, "without a message"),
        ({"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}, Failed, "not text"),
        ({"choices": [{"message": {"content": "x"}, "finish_reason": ["stop"]}]}, Failed, "finish_reason ['stop']"),
        ({"choices": [{"message": {"refusal": "I cannot."}, "finish_reason": "stop"}]}, Failed, "the model refused"),
        ([1, 2], Failed, "no choices"),
    ],
)  # fmt: skip
def test_a_reply_of_status_200_that_is_no_answer_is_said(reply, kind, reason):
    with pytest.raises(kind) as error:
        replies.read_completion(json.dumps(reply).encode(), CHAT, GREEDY, "chat", "http://host")
    assert reason in str(error.value)


def test_limits_in_a_reply_of_status_200_are_limits():
    with pytest.raises(Failed) as error:
        read(choices=None, error={"code": "429", "message": "slow"})
    assert error.value.limited and error.value.retry


def test_thoughts_come_in_many_fields():
    want = "<think>\nHm.\n</think>\n4"
    block = {"type": "text", "text": "Hm."}
    for message in (
        {"content": "4", "reasoning_content": "Hm."},
        {"content": "4", "reasoning": "Hm."},
        {"content": "4", "reasoning": "Hm.", "reasoning_content": "Hm.", "reasoning_details": [{"text": "Hm."}]},
        {"content": "4", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
        {"content": "4", "thinking": True, "thinking_blocks": [{"type": "thinking", "thinking": "Hm."}]},
        {"content": "4", "reasoning_content": "<think>\nHm.\n</think>"},
        {"content": "4", "reasoning": [block]},
        {"content": [{"type": "thinking", "thinking": [block]}, {"type": "text", "text": "4"}]},
        {"content": want},
        {"content": want, "reasoning_content": "Hm."},  # in both places: taken once
    ):
        assert read(message).text == want, message


def test_thinking_that_was_cut_off_stays_open():
    """vllm-project/vllm 52640: content is null and the reasoning is all there is when the limit comes first."""
    found = read({"content": None, "reasoning": "So far"}, "length")
    assert (found.finish_reason, found.text) == ("length", "<think>\nSo far")
    assert read({"content": None, "reasoning_content": "All."}).text == "<think>\nAll.\n</think>\n"


def test_other_words_for_the_end():
    assert [read({"content": "4"}, word).finish_reason for word in ("STOP", "eos", "end_turn", "max_tokens")] == [
        "stop",
        "stop",
        "stop",
        "length",
    ]
    with pytest.raises(Failed, match="content_filter") as error:
        read({"content": "4"}, "content_filter")
    assert not error.value.retry


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"error": {"message": "a"}}', "a"),
        (b'{"error": "b"}', "b"),
        (b'{"object": "error", "message": "c", "code": 400}', "c"),
        (b'{"detail": "d"}', "d"),
        (
            b'{"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}',
            "body.seed: Extra inputs",
        ),
        (b"<html><head><title>502 Bad\nGateway</title></head><body>x</body></html>", "a page of HTML: 502 Bad Gateway"),
        (b"<h1>It &amp; that</h1>", "a page of HTML: It & that"),
        (b"", "nothing"),
        (b"\xff\xfe", "\ufffd"),
        (b'{"error": {"code": 7}}', '{"code": 7}'),
    ],
)
def test_what_a_server_says_is_found(data, message):
    assert server_errors.error_message(data).startswith(message)


def test_advice_names_the_key():
    config = configs.ServerConfig()
    extra = configs.ServerConfig(extra={"top_k": 1})
    assert "server.dialect: openai" in advice("HTTP 400: unknown argument: return_token_ids", config)
    assert "max_completion_tokens" in advice("Use 'max_completion_tokens' instead", config)
    assert "server.omit: [seed]" in advice("HTTP 422: body.seed: Extra inputs are not permitted", config)
    assert "top_k" in advice("HTTP 400: unrecognized field top_k", extra)
    assert "lower traces.max_tokens" in advice("maximum context length is 8192", config)
    assert "a, b" in advice("HTTP 400: Invalid model name", config, ["a", "b"])
    assert "server.api: chat" in advice("[{'loc': ('body', 'messages'), 'msg': 'Field required'}]", config)


def test_a_moderated_request_is_not_everybodys():
    with pytest.raises(Failed) as error:
        check_status(403, {}, b'{"error": {"message": "Your input was flagged by moderation"}}', "http://host")
    assert not error.value.retry and not error.value.of_all


def test_logprobs_want_vllm(run, checkpoint):  # noqa: F811
    with (
        StrictServer() as server,
        pytest.raises(ValueError, match=r"logprobs need vLLM's server.*set server\.dialect: vllm if it is"),
    ):
        collect.generate(make_config(checkpoint, server.url, logprobs=2), run)


def test_the_answer_of_a_server_that_says_it_is_vllm_has_token_ids(run, checkpoint):  # noqa: F811
    with FakeServer() as server:
        collect.generate(make_config(checkpoint, server.url), run)
    assert server.asked[0]["return_token_ids"] is True
    assert all(trace.output_ids for trace in read_records(run.traces, Trace))


def test_the_strict_server_answers_as_the_reader_wants():
    assert replies.read_completion(json.dumps(REPLY).encode(), CHAT, GREEDY, "chat").text == "\\boxed{2}"
