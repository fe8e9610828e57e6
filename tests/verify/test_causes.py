"""A verification, or a preparation, that keeps nothing says the likeliest cause, and the key that mends it.

huggingface/open-r1 255 and huggingface/trl 3452: every answer counts as wrong, and nobody says why.
"""

import json

import numpy as np
import pytest

from jaxdistill import cli
from jaxdistill.config import TracesConfig, VerifyConfig, load
from jaxdistill.data.prepare import all_dropped
from jaxdistill.records import RunDir, Trace, read_manifest, read_records
from jaxdistill.traces import tags
from jaxdistill.verify.causes import Looked, is_next_to_nothing, likeliest
from tests.helpers import TINY, tiny_config
from tests.traces.strict_server import REPLY, StrictServer
from tests.traces.test_server import QUICK

IMPORT = TracesConfig(engine="import")


def counts(name, reason, fell=80, total=80):
    return {"traces": total, "kept": total - fell, "rejected": {name: fell}, "reasons": {name: {reason: fell}}}


def why(name, reason="", responses=(), extracted=(), gold=(), traces=IMPORT, **more):
    looked = Looked(responses, extracted or [None] * len(gold), gold)
    return likeliest(counts(name, reason, **more), looked, VerifyConfig(), traces)


# ------------------------------------------------------------------------------------------------------ whole stages


def imported(tmp_path, rows, **more):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = {"source": "prompt_completion", "path": str(path)}
    return tiny_config(tmp_path, **{"problems": problems, "evaluate": None} | more)


def row(n, completion, answer=None):
    return {"prompt": f"{n} + 1 = ?", "completion": completion, "answer": str(n + 1) if answer is None else answer}


def boxed(n):
    return f"<think>\n{n} and one more.\n</think>\nIt is \\boxed{{{n + 1}}}."


def test_gold_answers_of_another_field_are_all_incorrect(tmp_path, capsys):
    rows = [row(n, boxed(n), f"We add one to {n}. " + "Then we look at the sum once more. " * 5) for n in range(80)]
    path = imported(tmp_path, rows)
    assert cli.main(["generate", str(path)]) == cli.main(["verify", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "kept is nothing; likeliest cause: 80 of 80 traces are" in said
    assert "the gold answers are whole texts" in said
    assert "problems.answer_field" in said
    cause = read_manifest(tmp_path / "run" / "verdicts")["counts"]["cause"]
    assert "problems.answer_field" in cause


def test_a_verification_that_keeps_enough_says_nothing_of_causes(tmp_path, capsys):
    path = imported(tmp_path, [row(n, boxed(n)) for n in range(30)])
    assert cli.main(["generate", str(path)]) == cli.main(["verify", str(path)]) == 0
    assert "likeliest cause" not in capsys.readouterr().out
    assert "cause" not in read_manifest(tmp_path / "run" / "verdicts")["counts"]


def test_other_tags_of_a_teacher_are_mended_without_asking_it_again(tmp_path, capsys):
    """The advice as it stands: set the key, remove the manifest, verify anew; the journal has the answers."""
    with StrictServer() as server:
        answer = server.answer

        def think(body):
            answer(body)
            text = "<reasoning>\nWe add.\n</reasoning>\nThe answer is \\boxed{1}."
            reply = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
            return 200, {}, REPLY | reply

        server.answer = think
        traces = {"engine": "server", "teacher": "m", "server": {"urls": [server.url], "api": "chat", **QUICK}}
        path = tiny_config(tmp_path, traces=traces, verify={"answer": False})
        assert cli.main(["generate", str(path)]) == cli.main(["verify", str(path)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "set traces.think_tags: ['<reasoning>', '</reasoning>'], and remove traces/manifest.json" in said
        assert "kept is nothing; likeliest cause: 40 of 40 traces are malformed" in said
        (tmp_path / "run" / "traces" / "manifest.json").unlink()
        mended = [str(path), "--set", "traces.think_tags=['<reasoning>', '</reasoning>']"]
        assert cli.main(["verify", *mended, "--redo", "verify"]) == 1  # needs the traces
        assert cli.main(["generate", *mended]) == cli.main(["verify", *mended]) == 0
        assert len(server.asked) == 40
    assert [t.thinking for t in read_records(RunDir(tmp_path / "run").traces, Trace)] == ["We add."] * 40
    assert read_manifest(tmp_path / "run" / "verdicts")["counts"]["well_formed"] == 40


def test_rows_that_are_too_short_for_all_say_the_lengths(tmp_path, capsys):
    data = {"row_tokens": 8, "overlong": "drop"}
    path = imported(tmp_path, [row(n, boxed(n)) for n in range(10)], data=data)
    assert cli.main(["generate", str(path)]) == cli.main(["verify", str(path)]) == 0
    assert cli.main(["prepare", str(path)]) == 1
    said = capsys.readouterr().err
    assert "all 10 kept traces were dropped: 10 longer than data.row_tokens=8; they have " in said
    assert "raise data.row_tokens, to " in said
    advised = int(said.split("raise data.row_tokens, to ")[1].split()[0])
    assert cli.main(["prepare", str(path), "--set", f"data.row_tokens={advised}"]) == 0
    assert load(path).data.row_tokens == 8


# ---------------------------------------------------------------------------------------------------------- one cause


@pytest.mark.parametrize("pair", tags.KNOWN[1:])
def test_tags_that_are_seen_are_named(pair):
    opening, closing = pair
    said = why("malformed", "the thinking is absent", [f"{opening}\nHm.\n{closing}\nIt is 4."] * 80)
    assert said.startswith("80 of 80 traces are malformed: ")
    assert f"set traces.think_tags: ['{opening}', '{closing}']" in said
    assert "--redo generate" in said
    paid = why("malformed", "", [f"{opening}a{closing}b"], traces=TracesConfig(engine="jax", teacher="demo"))
    assert "--redo generate" not in paid and "nothing is asked twice" in paid


def test_unknown_elements_at_the_beginning_are_tags():
    assert tags.pair_of("<my_thoughts>\nHm.</my_thoughts>\n4") == ("<my_thoughts>", "</my_thoughts>")
    assert tags.pair_of("Take <b>four</b> of them.") is None
    assert tags.pair_of("<b>four") is None
    assert tags.pair_of("<answer>4</answer>") is None
    assert tags.pair_of("<my_thoughts>\nHm.</my_thoughts>\n4", guess=False) is None
    assert tags.pair_of("Hm.\n</think>\n4") == ("<think>", "</think>")
    assert tags.pair_of("") is None


@pytest.mark.parametrize(
    ("said", "key"),
    [
        (why("malformed", "the thinking is absent", ["It is 4."] * 9), "verify.think: optional"),
        (why("malformed", "the thinking is broken", ["<think>a</think><think>b</think>4"]), "one begins '<think>a"),
        (why("truncated", traces=TracesConfig(engine="jax", teacher="demo")), "traces.max_tokens=512; raise it"),
        (why("failed"), "traces.retry_failed: true"),
        (
            why("incorrect", "no answer found", gold=["4"] * 20, traces=TracesConfig(engine="jax", teacher="demo")),
            "traces.suffix: ",
        ),
        (why("incorrect", "different", extracted=["4"] * 20, gold=["True"] * 20), "nothing but 'True'"),
        (why("undecided", "no answer found", gold=["yes", "no"] * 10), "set verify.answer: false to take them"),
        (why("incorrect", "different", extracted=["4", "5"], gold=["7", "8"]), "says '4', and its gold answer is '7'"),
        (why("undecided", "no gold answer"), "problems.answer_field"),
        (why("loops", "a loop of 300 words"), "a loop of 300 words; the threshold is a key of verify"),
        (why("duplicate", "the response is there twice"), "traces.temperature=1"),
    ],
)
def test_every_cause_names_a_key(said, key):
    assert key in said


def test_next_to_nothing():
    assert is_next_to_nothing({"traces": 80, "kept": 0})
    assert is_next_to_nothing({"traces": 100, "kept": 2})
    assert not is_next_to_nothing({"traces": 100, "kept": 3})
    assert not is_next_to_nothing({"traces": 1, "kept": 1})
    assert not is_next_to_nothing({"traces": 0, "kept": 0})


def test_what_all_too_long_examples_say():
    lengths = np.array([300, 500, 900])
    fits = all_dropped(3, lengths, 3, 0, 128, 4096)
    assert "they have 300 / 500 / 900 tokens (shortest, median, longest); raise data.row_tokens, to 1024" in fits
    assert "raise data.row_tokens, to 512" in all_dropped(3, lengths, 3, 0, 128, 512)
    assert "the student's context is 256" in all_dropped(3, lengths, 3, 0, 128, 256)
    early = all_dropped(3, lengths, 0, 3, 1024, None)
    assert "3 with a token inside that ends a turn" in early and "raise" not in early


def test_the_tiny_config_keeps_its_traces():
    assert TINY["traces"]["engine"] == "import"
