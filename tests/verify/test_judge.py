"""The judge: what it is shown, how its replies are read, retries, and its agreement with the verifier."""

from __future__ import annotations

import json

import pytest

from jaxdistill import tokenization
from jaxdistill.config import JudgeConfig
from jaxdistill.records import JudgeMark, Verdict, read_records
from jaxdistill.traces import engines
from jaxdistill.verify import judge as judging
from jaxdistill.verify.judge import Shown, agreement, build_prompt, read_marks
from jaxdistill.verify.stage import verify
from tests.traces import fake_server
from tests.traces.fake_server import FakeServer
from tests.traces.tiny import make_tokenizer
from tests.verify.test_verify_stage import answer, make_config, problem, trace, write_run

GOOD = '{"faithfulness": 4, "coherence": 3, "correct": true, "reason": "fine"}'
MARKS = {"faithfulness": 4, "coherence": 3, "correct": True, "reason": "fine"}


@pytest.mark.parametrize(
    ("reply", "marks"),
    [
        (GOOD, MARKS),
        (f"<think>\nMaybe {GOOD.replace('4', '1')}\n</think>\n```json\n{GOOD}\n```", MARKS),
        (f"{GOOD.replace('4', '1')} no, rather\n{GOOD} {{not json}}", MARKS),
        (GOOD.replace("true", "null"), MARKS | {"correct": None}),
        ('{"faithfulness": 5, "coherence": 1}', {"faithfulness": 5, "coherence": 1, "correct": None, "reason": ""}),
        ("", None),
        ("I'd say 4 of 5.", None),
        (GOOD.replace("4", "6"), None),
        (GOOD.replace("4", "true"), None),
        (GOOD.replace("4", "4.5"), None),
        (GOOD.replace("true", '"yes"'), None),
        (f"<think>\n{GOOD}\n</think>\n", None),
        ("{" * 100_000 + "[" * 100_000, None),
        ('{"faithfulness": ' + "9" * 10_000 + "}", None),
    ],
)
def test_replies_are_read_strictly(reply, marks):
    assert read_marks(reply) == marks


def test_of_a_long_response_the_middle_is_left_out():
    text = build_prompt(Shown("t", "How many?", "a" * 5000 + "b" * 5000), 2000)
    assert "How many?" in text and "a" * 1000 + "\n[... 8000 characters left out ...]\n" + "b" * 1000 in text
    assert "a" * 1001 not in text


@pytest.fixture
def server(monkeypatch):
    """A chat server that gives low marks to what says `poor`, and nothing readable until it is asked `late` times."""
    times = {}

    def reply(body):
        shown = body["messages"][-1]["content"].split("=" * 40)[2]
        times[shown] = times.get(shown, 0) + 1
        if "garbled" in shown or ("slow" in shown and times[shown] < 2):
            content = "no marks"
        else:
            poor = "poor" in shown
            marks = {"faithfulness": 2 if poor else 5, "coherence": 4, "correct": not poor, "reason": "so"}
            content = json.dumps(marks)
        message = {"role": "assistant", "content": content}
        return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 7}}

    monkeypatch.setattr(fake_server, "chat_reply_to", reply)
    with FakeServer() as running:
        yield running


def test_marks_retries_agreement_and_what_was_said_before(tmp_path, server, capsys):
    traces = [
        trace("a", 0, answer(54, "good")),
        trace("a", 1, answer(54, "poor")),
        trace("a", 2, answer(55, "poor too")),
        trace("a", 3, answer(54, "slow")),
        trace("a", 4, answer(54, "garbled")),
        trace("a", 5, answer(54, "cut"), "length"),
    ]
    run = write_run(tmp_path, [problem("a", "54")], traces[:4])
    settings = {"model": "m", "min_faithfulness": 3, "attempts": 2, "server": {"urls": [server.url], "api": "chat"}}
    verify(make_config(judge=settings), run)
    assert len(server.asked) == 5  # the slow one twice
    write_run(tmp_path, [problem("a", "54")], traces)
    counts = verify(make_config(judge=settings), run)
    assert len(server.asked) == 7  # the new one twice, and the truncated one not at all
    assert [body["temperature"] for body in server.asked[-2:]] == [0.0, judging.RETRY_TEMPERATURE]
    assert "gold" not in server.asked[0]["messages"][0]["content"]

    fallen = {v.trace_id[-1]: v.rejected_for for v in read_records(run.verdicts, Verdict)}
    assert fallen == {"0": None, "1": "low_marks", "2": "incorrect", "3": None, "4": None, "5": "truncated"}
    marks = {m.trace_id[-1]: m for m in read_records(run.verdicts / "judge", JudgeMark)}
    assert (marks["3"].attempts, marks["3"].error, marks["3"].faithfulness) == (2, None, 5)
    assert marks["4"].error == "a reply that cannot be read: it has no marks" and marks["4"].faithfulness is None
    found = counts["judge"]
    assert (found["judged"], found["unread"], found["agree"]) == (5, 1, 0.75)
    assert found["table"]["correct"] == {"right": 2, "wrong": 1, "none": 0}
    assert found["means"]["incorrect"] == {"faithfulness": 2.0, "coherence": 4.0}
    assert "both say the same of 75.0% of the decided traces, Cohen's kappa 0.50" in capsys.readouterr().out


def mark(name, correct, error=None):
    return JudgeMark(
        trace_id=name, model="m", faithfulness=5, coherence=5, correct=correct, reason="", attempts=1, error=error
    )


def test_agreement_by_chance_is_no_agreement():
    outcomes = {str(n): "correct" if n < 50 else "incorrect" for n in range(100)}
    always = agreement([mark(name, True) for name in outcomes], outcomes)
    assert (always["agree"], always["kappa"]) == (0.5, 0.0)
    same = agreement([mark(name, outcome == "correct") for name, outcome in outcomes.items()], outcomes)
    assert (same["agree"], same["kappa"]) == (1.0, 1.0)
    nothing = agreement([mark("0", None), mark("1", True, "x")], outcomes)
    assert (nothing["unread"], nothing["agree"], nothing["kappa"]) == (1, None, None)


def test_it_is_off_unless_it_is_named():
    assert make_config().verify.judge is None
    with pytest.raises(ValueError, match="marks go from 1 to 5"):
        JudgeConfig(model="m", min_coherence=6, server={"urls": ["http://a/v1"]})


def test_an_engine_of_tokens_is_asked_through_its_chat_template(tmp_path, monkeypatch):
    folder = tmp_path / "judge"
    make_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3", "max_position_embeddings": 8192}')
    (folder / "model.safetensors").touch()
    tokenizer = tokenization.load_tokenizer(str(folder))
    asked = []

    def engine(checkpoint, requests, sampling, **options):
        for request in requests:
            asked.append(tokenizer.decode(request.prompt_ids))
            ids = tokenization.encode_response(tokenizer, f"<think>\nWell.\n</think>\n{GOOD}")
            yield engines.Completion(id=request.id, output_ids=ids, finish_reason="stop")

    monkeypatch.setitem(engines.ENGINES, "jax", engine)
    run = write_run(tmp_path / "run", [problem("a", "54")], [trace("a", 0, answer(54, "a step of its own"))])
    verify(make_config(judge={"engine": "jax", "model": str(folder)}), run)
    (mark_,) = read_records(run.verdicts / "judge", JudgeMark)
    assert (mark_.faithfulness, mark_.coherence, mark_.correct, mark_.error) == (4, 3, True, None)
    assert "<|im_start|>assistant" in asked[0] and "a step of its own" in asked[0] and "How many?" in asked[0]
