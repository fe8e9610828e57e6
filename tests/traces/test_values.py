"""Gold answers as tables and JSON hold them, and text that no file can hold."""

import datetime
import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdistill.config import ProblemsConfig
from jaxdistill.traces import values
from jaxdistill.traces.problems import load_problems


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2.0, "2"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (1e20, "1" + 20 * "0"),
        (1.5e-7, "0.00000015"),
        (1e300, "1e+300"),
        (float("nan"), None),
        (None, None),
        ("", None),
        (" \n", None),
        ("nan", None),
        ("<NA>", None),
        ([], None),
        (["4"], "4"),
        ([[4.0]], "4"),
        (7, "7"),
        (10**30, "1" + 30 * "0"),
        (True, "True"),
        (decimal.Decimal("2.50"), "2.50"),
        (decimal.Decimal("2.00"), "2"),
        (decimal.Decimal("1E+3"), "1000"),
        (b"4", "4"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 12), "2024-05-01T12:00:00"),
        ("None", "None"),  # may be the answer
        (" 0.10 ", "0.10"),
    ],
)
def test_gold_as_it_is_written(value, expected):
    assert values.gold({"a": value}, "a") == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["4", "5"], "several gold answers"),
        ({"value": 4}, "is an object; no gold answer"),
        (float("inf"), "is infinite"),
        (9007199254740993.0, "may have lost digits"),
        (1.2345678901234567e25, "may have lost digits"),
        (b"\xff", "bytes that are not UTF-8"),
        ("4\ud800", "half of a character"),
        (datetime.timedelta(1), "is timedelta; no gold answer"),
    ],
)
def test_what_is_no_single_gold_answer(value, reason):
    with pytest.raises(values.BadRow, match=reason):
        values.gold({"a": value}, "a")


def golds(path, **options):
    return [p.answer for p in load_problems(ProblemsConfig(source="r1", path=str(path), **options))]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([2.0, float("nan"), None, 0.1, 1e20]), ["2", None, None, "0.1", "1" + 20 * "0"]),
        (pa.array([2.0, 0.1, None], pa.float32()), ["2", "0.1", None]),
        (pa.array(np.array([2.0, 0.1], np.float16)), ["2", "0.1"]),
        (pa.array([1, None], pa.int8()), ["1", None]),
        (pa.array([2**63], pa.uint64()), [str(2**63)]),
        (pa.array([decimal.Decimal("2.50")], pa.decimal128(10, 2)), ["2.50"]),
        (pa.array(["4", None]).dictionary_encode(), ["4", None]),
        (pa.array(["4"], pa.large_string()), ["4"]),
        (pa.array(["4", None], pa.string_view()), ["4", None]),
        (pa.array([b"4"], pa.binary()), ["4"]),
        (pa.array([["4"], []], pa.list_(pa.string())), ["4", None]),
        (pa.array([datetime.date(2024, 5, 1)]), ["2024-05-01"]),
        (pa.nulls(2), [None, None]),
    ],
    ids=lambda x: str(x.type) if isinstance(x, pa.Array) else None,
)
def test_gold_in_columns(tmp_path, column, expected):
    n = len(column)
    table = pa.table(
        {
            "problem": [f"{i}?" for i in range(n)],
            "generations": [["x"]] * n,
            "answer": column,
            "more": [object] and [1] * n,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert golds(tmp_path / "a.parquet") == expected
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    assert golds(tmp_path / "b.arrow") == expected


def test_a_struct_of_lists_and_floats_with_holes(tmp_path):
    turns = {"role": ["user", "assistant"], "content": ["What is 2 + 2?", "4"]}
    pq.write_table(pa.table({"messages": [turns, turns], "answer": ["4", "4"]}), tmp_path / "structs.parquet")
    found = load_problems(ProblemsConfig(source="messages", path=str(tmp_path / "structs.parquet")))
    assert [p.answer for p in found] == ["4", "4"]
    assert {p.prompt for p in found} == {"What is 2 + 2?"}


def test_turns_as_maps(tmp_path):
    turn = pa.map_(pa.string(), pa.string())
    chat = [[("role", "user"), ("content", "2+2?")], [("role", "assistant"), ("content", "4")]]
    pq.write_table(pa.table({"messages": pa.array([chat], pa.list_(turn))}), tmp_path / "maps.parquet")
    (found,) = load_problems(ProblemsConfig(source="messages", path=str(tmp_path / "maps.parquet")))
    assert found.prompt == "2+2?"


def test_a_column_that_one_row_breaks(tmp_path):
    """Bytes that are no UTF-8 in a column of text, as writers without checks leave them: the other rows are read."""
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"1?", b"\xff?", b"3?"]).buffers())
    table = pa.table({"problem": bad, "answer": ["1", "2", "3"]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    found = load_problems(ProblemsConfig(source="jsonl", path=str(tmp_path / "a.arrow")))
    assert [p.prompt for p in found] == ["1?", "3?"]


def test_json_that_says_a_thing_twice_or_not_at_all(tmp_path):
    lines = [
        '{"problem": "1?", "answer": "4", "answer": "5"}',  # which one?
        '{"problem": "2?", "answer": "4", "answer": "4"}',
        '{"problem": "3?", "answer": NaN}',
        '{"problem": "4?", "answer": Infinity}',
        '{"problem": "5?", "answer": 0.10, "metadata": {"a": 1, "a": 2}}',
        '{"problem": "6?", "answer": 1' + "0" * 5000 + "}",  # more digits than Python reads
        '{"problem": "7?", "answer": "4", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",  # too deep
        json.dumps({"problem": "8\ud83d?", "answer": "4"}),
        json.dumps({"problem": "9\U0001f600?", "answer": "4"}),
        '{"problem": "10?", "answer": "4"',  # the file ends here
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    found = load_problems(ProblemsConfig(source="jsonl", path=str(tmp_path / "set.jsonl")))
    expected = {"2?": "4", "3?": None, "5?": "0.10", "9\U0001f600?": "4"}
    assert {p.prompt: p.answer for p in found} == expected
    with pytest.raises(ValueError, match=r"set\.jsonl:1: field 'answer' stands in it twice, with different values"):
        load_problems(ProblemsConfig(source="jsonl", path=str(tmp_path / "set.jsonl"), bad_rows="stop"))


def test_a_turn_that_says_a_thing_twice(tmp_path):
    turns = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]'
    good = turns.replace(', "content": "c"', "")
    (tmp_path / "set.jsonl").write_text(f'{{"messages": {turns}}}\n{{"messages": {good}}}\n')
    found = load_problems(ProblemsConfig(source="messages", path=str(tmp_path / "set.jsonl")))
    assert [p.id for p in found] == ["set:2"]
