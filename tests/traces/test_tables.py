"""Every kind of file gives the same rows; what is damaged is said, and never read as if it were whole."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdistill.config import ProblemsConfig
from jaxdistill.traces import json_rows, tables
from jaxdistill.traces.problems import load_problems

ROWS = [{"problem": f'{n}, or "{n}"\nplus 1?', "answer": str(n)} for n in range(3)]
EXPECTED = [(row["problem"], row["answer"]) for row in ROWS]


def read(path, **options):
    found = load_problems(ProblemsConfig(source="jsonl", path=str(path), bad_rows="stop", **options))
    return [(p.prompt, p.answer) for p in found]


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv(delimiter=",", rows=ROWS):
    quoted = [delimiter.join('"' + row[k].replace('"', '""') + '"' for k in ("problem", "answer")) for row in rows]
    return "\r\n".join([delimiter.join(("problem", "answer")), *quoted]).encode() + b"\r\n"


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def zipped(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("_", "."), data)
        archive.writestr("__MACOSX/._a.jsonl", b"\x00\x05")
    return out.getvalue()


def table():
    return pa.Table.from_pylist(ROWS)


def parquet():
    out = io.BytesIO()
    pq.write_table(table(), out)
    return out.getvalue()


def arrow_file():
    out = io.BytesIO()
    with pa.ipc.new_file(out, table().schema) as file:
        file.write_table(table())
    return out.getvalue()


def arrow_stream():
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table().schema) as stream:
        stream.write_table(table())
    return out.getvalue()


FILES = {
    "a.jsonl": lines(),
    "a.ndjson": lines(),
    "a.txt": lines(),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(),
    "two_boms.jsonl": b"\xef\xbb\xbf" + lines(ROWS[:1]) + b"\xef\xbb\xbf" + lines(ROWS[1:]),
    "crlf.jsonl": lines().replace(b"\n", b"\r\n"),
    "gaps.jsonl": b"\n  \n" + lines().replace(b"\n", b"\n\n"),
    "no_end.jsonl": lines().rstrip(),
    "list.json": json.dumps(ROWS, indent=2).encode(),
    "list_with_bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "lines.json": lines(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "a.jsonl.gz": gzip.compress(lines()),
    "two_members.jsonl.gz": gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:])),
    "gzipped_unsaid.jsonl": gzip.compress(lines()),
    "a.jsonl.zst": zstd(lines()),
    "two_frames.jsonl.zst": zstd(lines(ROWS[:1])) + zstd(lines(ROWS[1:])),
    "a.jsonl.bz2": bz2.compress(lines()),
    "a.jsonl.xz": lzma.compress(lines()),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv.gz": gzip.compress(csv()),
    "a.zip": zipped(a_jsonl=lines(ROWS[:2]), b_csv=csv(rows=ROWS[2:]), readme_md=b"x"),
    "a.csv": csv(),
    "bom.csv": b"\xef\xbb\xbf" + csv(),
    "semicolons.csv": csv(";"),
    "gaps.csv": csv() + b"\r\n",
    "a.tsv": csv("\t"),
    "a.parquet": parquet(),
    "parquet_unsaid": parquet(),
    "a.arrow": arrow_stream(),
    "a.feather": arrow_file(),
    "file.arrow": arrow_file(),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_from_every_kind_of_file(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert read(tmp_path / name) == EXPECTED


BROKEN = {
    "cut.jsonl.gz": (gzip.compress(lines() * 500)[:-200], "damaged or cut off"),
    "cut.jsonl.zst": (zstd(lines() * 500)[:-5], "damaged or cut off"),
    "cut.jsonl.xz": (lzma.compress(lines() * 500)[:-20], "damaged or cut off"),
    "cut.parquet": (parquet()[:-20], "damaged or cut off"),
    "cut.arrow": (arrow_stream()[:200], "damaged or cut off"),
    "cut.json": (json.dumps(ROWS).encode()[:-5], r"cut\.json:3: not valid JSON, or its list is cut off"),
    "open.json": (json.dumps(ROWS).encode()[:-1], "its list is cut off"),
    "more.json": (json.dumps(ROWS).encode() + b"[]", "something stands behind the end of its list"),
    "comma.json": (json.dumps(ROWS).encode().replace(b"}, {", b"} {"), "not valid JSON: '{' instead of ','"),
    "latin.json": (b'[{"problem": "\xe9"}]', "not UTF-8"),
    "utf16.jsonl": (lines().decode().encode("utf-16"), "it is in UTF-16; save it as UTF-8"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "a pointer of Git LFS"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "damaged|Git LFS"),
    "quote.csv": (csv() + b'"a,b\r\nc,d\r\n', r"quote\.csv:4: a quote opens in line 8 and is never closed"),
    "names.csv": (b"problem,problem\r\na,b\r\n", "no column 'answer'"),
    "twice.csv": (b"problem,answer,answer\r\na,b,c\r\n", "a column's name stands twice"),
    "other.parquet": (FILES["a.parquet"].replace(b"problem", b"questio"), "no column 'problem'|damaged"),
    "old.feather": (b"FEA1" + bytes(60), "Feather's first version"),
    "empty.zip": (zipped(readme_md=b"x"), "no files that end in"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_whole_file_is_an_error(tmp_path, name):
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load_problems(ProblemsConfig(source="jsonl", path=str(tmp_path / name)))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_of_a_csv_that_cannot_be_read_are_left_out(tmp_path):
    rows = b'problem,answer\n1?,1\n2?,2,3\n3?\n4\xff?,4\n"5"x?,5\n6?,\n7?,7\n'
    (tmp_path / "a.csv").write_bytes(rows)
    found = load_problems(ProblemsConfig(source="jsonl", path=str(tmp_path / "a.csv")))
    assert [(p.id, p.prompt, p.answer) for p in found] == [("a:1", "1?", "1"), ("a:6", "6?", None), ("a:7", "7?", "7")]


def test_a_field_longer_than_the_csv_module_allows(tmp_path):
    (tmp_path / "a.csv").write_bytes(csv(rows=[{"problem": "x" * 200_000, "answer": "1"}]))
    assert read(tmp_path / "a.csv") == [("x" * 200_000, "1")]


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
def test_a_list_is_read_in_pieces_of_any_size(monkeypatch, piece):
    monkeypatch.setattr(json_rows, "PIECE", piece)
    rows = [{"a": "é😀]},{[" * n, "n": [n, {"x": -1.50}], "e": 1e5} for n in range(20)]
    stream = io.BufferedReader(io.BytesIO(json.dumps(rows, ensure_ascii=False).encode()))
    found = list(json_rows.rows(stream, "x.json"))
    assert [number for number, _ in found] == list(range(1, 21))
    assert [row["a"] for _, row in found] == [row["a"] for row in rows]
    assert found[3][1]["n"] == [3, {"x": "-1.5"}]


def test_a_list_with_other_things_between_its_objects(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0], None, 12, "x", [1], ROWS[1]]))
    found = load_problems(ProblemsConfig(source="jsonl", path=str(tmp_path / "a.json")))
    assert [p.id for p in found] == ["a:1", "a:6"]


def test_files_of_a_folder_have_ids_of_their_own(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:1]))
    (tmp_path / "a.csv").write_bytes(csv(rows=ROWS[1:2]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[2:])))
    for other in ("README.md", "dataset_info.json", ".hidden.jsonl", "_SUCCESS"):
        (tmp_path / other).write_text("x")
    found = load_problems(ProblemsConfig(source="jsonl", path=str(tmp_path)))
    assert [p.id for p in found] == ["a.csv:1", "a.jsonl:1", "b.jsonl:1"]


def test_only_the_wanted_columns_are_read(tmp_path):
    """A column that cannot be had in Python (nanoseconds) does not matter where nobody wants it."""
    when = pa.array([1, 2], pa.timestamp("ns"))
    data = pa.table({"problem": ["1?", "2?"], "answer": ["1", "2"], "when": when, "key": [7, 8]})
    pq.write_table(data, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", id_field="key") == [("1?", "1"), ("2?", "2")]
    with pytest.raises(ValueError, match="no column 'name'; it has problem, answer, when, key"):
        read(tmp_path / "a.parquet", id_field="name")


def test_read_rows_is_for_those_who_want_every_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines() + b"{\n")
    found = tables.read_rows(tmp_path / "a.jsonl")
    assert [next(found)[1] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"a\.jsonl:4: not valid JSON"):
        next(found)
