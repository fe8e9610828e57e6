"""Trace sets written to files, and what a run brings in of them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdistill import config as configs
from jaxdistill.records import Problem, RunDir, Trace, read_records
from jaxdistill.traces import collect
from jaxdistill.traces.problems import problems


def make_config(run_dir, source, path, *, traces=None, **section):
    return configs.build(
        {
            "name": "test",
            "run_dir": str(run_dir),
            "problems": {"source": source, "path": str(path), **section},
            "traces": {"engine": "import"} | (traces or {}),
            "data": {"row_tokens": 64},
            "student": {"init": "demo"},
            "train": {"batch_rows": 1, "steps": 1, "optimizer": {"learning_rate": 0.1}},
        }
    )


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bring_in(tmp_path, source, path, **section):
    config, run = make_config(tmp_path / "run", source, path, **section), RunDir(tmp_path / "run")
    problems(config, run)
    counts = collect.generate(config, run)
    return list(read_records(run.problems, Problem)), list(read_records(run.traces, Trace)), counts


def responses(tmp_path, source, rows, **section):
    """(thinking, content) of every trace of some rows, and the reasons for which rows and responses were left out."""
    path = write(tmp_path / "set.jsonl", rows)
    config, run = make_config(tmp_path / "run", source, path, **section), RunDir(tmp_path / "run")
    counts = problems(config, run)
    collect.generate(config, run)
    found = counts.get("bad_rows", {"reasons": {}, "responses": {}})
    return [(t.thinking, t.content) for t in read_records(run.traces, Trace)], [*found["reasons"], *found["responses"]]
