"""Tasks made of traces: what is asked and what is learned, example by example."""

import pyarrow.parquet as pq
import pytest

from jaxdistill.config import TaskConfig
from jaxdistill.data.examples import NAMES, Text
from jaxdistill.data.packing import unpack
from jaxdistill.data.prepare import prepare
from jaxdistill.data.rows import Batches
from jaxdistill.data.tasks import STEPS, copies, split_steps, texts_of
from jaxdistill.tokenization import load_tokenizer
from tests.data.made import config_of, write_run

RESPONSE = "<think>\n Ann=2\n\n Bob=2+3=5\n</think>\nThe answer is \\boxed{5}."
TEXT = Text("p/plain/0", "How {many}?", RESPONSE, "The answer is \\boxed{5}.")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("trace", [("How {many}?", RESPONSE)]),
        ("label", [("How {many}?", "The answer is \\boxed{5}.")]),
        ("rationale", [("[rationale] How {many}?", "Ann=2\nBob=2+3=5")]),
        ("next_step", [("[next step] How {many}?\n", "Ann=2"), ("[next step] How {many}?\nAnn=2", "Bob=2+3=5")]),
        ("answer", [("[answer] How {many}?\nAnn=2\nBob=2+3=5", "The answer is \\boxed{5}.")]),
    ],
)
def test_what_is_asked_and_what_is_learned(kind, wanted):
    found = texts_of(TEXT, TaskConfig(kind=kind))
    assert [(t.problem, t.response) for t in found] == wanted
    assert len({t.trace_id for t in found}) == len(found)


def test_a_trace_without_reasoning_has_no_steps():
    bare = Text("p/plain/0", "?", "5", "5")
    assert texts_of(bare, TaskConfig(kind="next_step")) == texts_of(bare, TaskConfig(kind="rationale")) == []
    assert len(texts_of(bare, TaskConfig(kind="trace"))) == 1


def test_a_weight_is_how_often_examples_come():
    names = [f"p{i}/plain/0#label" for i in range(2000)]
    assert {copies(name, 2.0) for name in names} == {2}
    assert 900 < sum(copies(name, 0.5) for name in names) < 1100
    assert 2900 < sum(copies(name, 1.5) for name in names) < 3100


def test_rows_hold_every_task_and_the_parsed_steps_are_records(tmp_path):
    run = write_run(tmp_path, [("p", "math", RESPONSE, True)])
    tasks = [{"kind": "label"}, {"kind": "rationale", "weight": 2}, {"kind": "next_step"}]
    counts = prepare(config_of(tmp_path, tasks=tasks), run, run)
    assert (counts["examples"], counts["steps"]) == (5, 2)
    assert (
        pq.read_table(run.tokens / STEPS)["text"].to_pylist()
        == split_steps(" Ann=2\n\n Bob=2+3=5")
        == [
            "Ann=2",
            "Bob=2+3=5",
        ]
    )
    tokenizer = load_tokenizer(str(run.tokenizer))
    batches = Batches(run.tokens, batch_rows=1, seed=0)
    texts = []
    for row in range(batches.rows):
        for tokens, regions in unpack(batches.stored_row(row)):
            trained = [t for t, r in zip(tokens, regions, strict=True) if NAMES[r] == "answer"]
            texts.append(str(tokenizer.decode(trained)).removesuffix("<|im_end|>"))
            assert regions[0] == 0  # prompts are never trained
    assert sorted(texts) == sorted(
        ["The answer is \\boxed{5}.", "Ann=2", "Bob=2+3=5", "Ann=2\nBob=2+3=5", "Ann=2\nBob=2+3=5"]
    )


def test_a_prompt_without_its_holes_is_refused():
    with pytest.raises(ValueError, match=r"has \{steps\} 0 times"):
        TaskConfig(kind="answer", prompt="{problem}")
    with pytest.raises(ValueError, match=r"has \{problem\} 2 times"):
        TaskConfig(kind="label", prompt="{problem} {problem}")
