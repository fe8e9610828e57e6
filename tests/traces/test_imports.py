"""Import of existing trace sets: every shape and kind of file, and what is said of broken ones."""

import json

import pytest

from tests.traces.brought import bring_in, write

THOUGHT = "<think>\n2 and 2\n</think>\nIt is \\boxed{4}."
ROWS = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": THOUGHT},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "answer": "4",
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": THOUGHT}]},
    "r1": {"problem": "2+2?", "answer": "4", "generations": [THOUGHT, "", THOUGHT.replace("2 and 2", "1+3")]},
    "prompt_completion": {"prompt": "2+2?", "completion": THOUGHT},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
@pytest.mark.parametrize("source", ROWS)
def test_every_shape_in_every_kind_of_file(tmp_path, source, suffix):
    second = json.loads(json.dumps(ROWS[source]).replace("2+2?", "4+0?"))
    path = write(tmp_path / f"set{suffix}", [ROWS[source], second])
    found, traces, counts = bring_in(tmp_path, source, path)
    assert [(p.id, p.prompt) for p in found] == [("set:1", "2+2?"), ("set:2", "4+0?")]
    assert found[0].answer == ("4" if "answer" in ROWS[source] else None)
    each = [0, 2] if source == "r1" else [0]  # an empty generation is none, and its number stays free
    assert [trace.id for trace in traces] == [f"set:{n}/plain/{sample}" for n in (1, 2) for sample in each]
    assert (traces[0].thinking, traces[0].content) == ("2 and 2", "It is \\boxed{4}.")
    assert (traces[0].engine, traces[0].teacher, traces[0].finish_reason) == ("import", f"set{suffix}:1", "imported")
    assert counts["samples"] == len(traces)


def test_a_folder_of_datasets_with_one_split_or_a_named_one(tmp_path):
    folder = tmp_path / "set"
    for name in ("train", "test"):
        (folder / name).mkdir(parents=True)
        for part in range(2):
            write(folder / name / f"data-0000{part}-of-00002.arrow", [ROWS["r1"] | {"problem": f"{name} {part}"}])
        (folder / name / "state.json").write_text("{}")
        (folder / name / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"it has the splits train, test; name one, such as .*set/train"):
        bring_in(tmp_path, "r1", folder)
    found, _, _ = bring_in(tmp_path, "r1", folder / "test")
    assert [p.prompt for p in found] == ["test 0", "test 1"]
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    found, _, _ = bring_in(tmp_path, "r1", folder)
    assert [p.prompt for p in found] == ["train 0", "train 1"]


def test_thinking_beside_the_content_is_put_before_it(tmp_path):
    row = {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4.", "reasoning_content": "2 and 2"},
        ]
    }
    _, traces, _ = bring_in(tmp_path, "messages", write(tmp_path / "set.jsonl", [row]))
    assert (traces[0].thinking, traces[0].content) == ("2 and 2", "4.")


def test_only_the_problems_that_were_taken_bring_traces(tmp_path):
    rows = [ROWS["r1"] | {"problem": f"{n}?", "id": f"p{n}"} for n in range(5)]
    _, traces, counts = bring_in(tmp_path, "r1", write(tmp_path / "set.jsonl", rows), count=2, id_field="id")
    assert [trace.problem_id for trace in traces] == ["p0", "p0", "p1", "p1"]
    assert counts["without_solution"] == 0


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        ("messages", {"text": "x"}, "no field 'messages'; this line has text"),
        ("messages", {"messages": "x"}, "'messages' is not a list of turns"),
        ("messages", {"messages": []}, "'messages' has no question"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, "no turn of the assistant behind the question"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "begins with a turn by 'tool', not with"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "the question is null or empty"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}]}, "begins with a turn by 'gpt'"),
        ("r1", {"problem": "x", "generations": "y"}, "'generations' is not a list of texts"),
        ("r1", {"problem": " ", "generations": ["y"]}, "field 'problem' is empty"),
        ("prompt_completion", {"prompt": "x"}, "no field 'completion'"),
        ("prompt_completion", {"prompt": "x", "completion": True}, "the response is a boolean, not text"),
    ],
)
def test_a_row_of_another_shape_is_named(tmp_path, source, row, message):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([ROWS[source], row]))
    with pytest.raises(ValueError, match=message) as error:
        bring_in(tmp_path, source, path, bad_rows="stop")
    assert "set.json:2" in str(error.value)
    found, _, _ = bring_in(tmp_path, source, path)
    assert [p.id for p in found] == ["set:1"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, text, message in (
        ("a.parquet", "x", r"a\.parquet: damaged or cut off from its start"),
        ("a.arrow", "xxxxxxxxxxxxxxxx", r"a\.arrow: damaged or cut off"),
        ("a.json", "{}", "no problems in it; 1 of 1 rows cannot be read; .*no field 'messages'; this line has none"),
        ("b.json", "[", "not valid JSON, or its list is cut off"),
        ("c.json", "[1]", r"c\.json:1: expected a JSON object"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            bring_in(tmp_path, "messages", tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        bring_in(tmp_path, "messages", tmp_path / "missing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data in it"):
        bring_in(tmp_path, "messages", tmp_path / "empty")
    rows = [ROWS["r1"] | {"id": "p"}] * 2
    with pytest.raises(ValueError, match=r"set\.jsonl:2: .* id 'p' is that of .*set\.jsonl:1 already"):
        bring_in(tmp_path, "r1", write(tmp_path / "set.jsonl", rows), id_field="id", bad_rows="stop")
