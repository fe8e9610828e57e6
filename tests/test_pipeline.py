"""The whole story on a tiny run: every stage for real, with the embedded decoder in vLLM's place."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxdistill import cli, pipeline
from jaxdistill.config import load
from jaxdistill.records import RunDir, Verdict, read_manifest, read_records
from tests.helpers import TINY, tiny_config

BASELINES = {"answer_only": {"data.response": "answer"}}

PLAIN_SCRIPT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "Ann has 2 pens."}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=-1)
print(out.shape[1] - prompt["input_ids"].shape[1])
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDir:
    """The demo teacher's traces, and two students that learn from them."""
    root = tmp_path_factory.mktemp("story")
    traces = {"engine": "jax", "teacher": "demo", "max_tokens": 80, "batch": 20}
    student = {k: v for k, v in TINY["student"].items() if not k.startswith("tokenizer")}
    config = tiny_config(root, traces=traces, student=student, baselines=BASELINES)
    assert cli.main(["run", str(config)]) == 0
    return RunDir(root / "run")


def test_every_stage_leaves_its_manifest(finished):
    for stage in pipeline.STAGES.values():
        manifest = read_manifest(stage.folder(finished))
        assert manifest is not None, stage.name
        assert manifest["stage"] == stage.name
        if stage.per_student:
            assert read_manifest(stage.folder(finished.baseline("answer_only"))) is not None


def test_the_export_is_what_transformers_loads(finished):
    """A plain script, without a line of ours."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_SCRIPT, str(finished.export)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "5", done.stderr
    check = read_manifest(finished.export)["counts"]["check"]
    assert check["max_difference"] <= 1e-4 * check["logit_scale"]
    assert "yield" in (finished.export / "README.md").read_text()


def test_the_scores_and_the_report_are_there(finished):
    models = read_manifest(finished.evaluation)["counts"]["models"]
    assert set(models) == {"teacher", "student", "answer_only"}
    assert all(score["problems"] == 12 for score in models.values())
    page = (finished.report / "index.html").read_text()
    assert "answer_only" in page


def test_a_second_run_does_nothing_again(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.root.rglob("*.parquet")}
    assert cli.main(["run", str(finished.root.parent / "config.yaml")]) == 0
    assert {p: p.stat().st_mtime_ns for p in finished.root.rglob("*.parquet")} == before


def test_a_stage_killed_halfway_starts_over_to_the_same_result(finished, tmp_path):
    """Verdicts and tokens without their manifest, and with leftovers, are made again and equal what was there."""
    copy = RunDir(tmp_path / "run")
    shutil.copytree(finished.root, copy.root)
    config = load(finished.root.parent / "config.yaml", [f"run_dir={copy.root}"])
    want = (copy.tokens / "rows.arrayrecord").read_bytes()
    for folder in (copy.verdicts, copy.tokens):
        (folder / "manifest.json").unlink()
        (folder / ".left.123.tmp").write_bytes(b"half")
    (copy.verdicts / "verdicts.parquet").write_bytes(b"torn")
    for command in ("verify", "prepare"):
        pipeline.run_command(command, config)
    assert (copy.tokens / "rows.arrayrecord").read_bytes() == want
    assert all(isinstance(v, Verdict) for v in read_records(copy.verdicts, Verdict))


def test_a_changed_config_is_refused_and_redo_replaces_it(finished, tmp_path, capsys):
    copy = RunDir(tmp_path / "run")
    shutil.copytree(finished.root, copy.root)
    arguments = [
        "prepare",
        str(finished.root.parent / "config.yaml"),
        "--set",
        f"run_dir={copy.root}",
        "--set",
        "data.row_tokens=200",
    ]
    assert cli.main(arguments) == 1
    line = capsys.readouterr().err
    assert "data.row_tokens: 160 -> 200" in line
    assert "--redo prepare" in line
    assert cli.main([*arguments, "--redo", "prepare"]) == 0
    assert read_manifest(copy.tokens)["config"]["data"]["row_tokens"] == 200
    for folder in (copy.checkpoints, copy.export, copy.evaluation):
        assert read_manifest(folder) is None
    assert read_manifest(copy.verdicts) is not None


def test_show_prints_what_is_graded(finished, capsys):
    assert cli.main(["show", str(finished.root.parent / "config.yaml"), "--row", "0"]) == 0
    output = capsys.readouterr().out
    assert "prompt (never trained)" in output
    assert "<|im_start|>user" in output
    assert cli.main(["show", str(finished.root.parent / "config.yaml"), "--row", "9999"]) == 1


def test_a_baseline_has_the_same_examples_and_no_reasoning(finished):
    student, baseline = (read_manifest(run.tokens)["counts"] for run in (finished, finished.baseline("answer_only")))
    assert student["examples"] == baseline["examples"]
    assert baseline["thinking_tokens"] < student["thinking_tokens"]


def test_origins_lead_from_a_row_back_to_its_traces(finished):
    import pyarrow.parquet as pq

    from jaxdistill.data.rows import Batches

    origins = pq.read_table(finished.tokens / "origins.parquet").to_pylist()
    kept = {v.trace_id for v in read_records(finished.verdicts, Verdict) if v.kept}
    assert {o["trace_id"] for o in origins} == kept
    row = Batches(finished.tokens, batch_rows=1, seed=0).stored_row(0)
    for origin in (o for o in origins if o["row"] == 0):
        assert np.count_nonzero(row["segment_ids"] == origin["segment"]) == origin["tokens"]


def on_a_small_disk(tmp_path: Path, size: str, command: str) -> subprocess.CompletedProcess:
    """Runs a shell command with $DISK, a file system of that size, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"mount -t tmpfs -o size={size} none {disk} && export DISK={disk} && {command}"
    return subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("command", ["generate", "verify", "prepare", "train", "export"])
def test_no_room_on_disk_is_one_line_and_nothing_half_written(finished, tmp_path, command):
    if on_a_small_disk(
        tmp_path / "probe" if (tmp_path / "probe").mkdir() is None else tmp_path, "1m", "true"
    ).returncode:
        pytest.skip("this system does not let users mount a small file system")
    config = finished.root.parent / "config.yaml"
    stage = pipeline.STAGES[pipeline.COMMANDS[command][-1]]
    folder = stage.folder(RunDir(Path("run")))
    result = on_a_small_disk(
        tmp_path,
        "64m",
        f"cp -r {finished.root} $DISK/run && rm -rf $DISK/{folder} && (cat /dev/zero > $DISK/fill; true) 2>/dev/null; "
        f"{sys.executable} -m jaxdistill {command} {config} --set run_dir=$DISK/run; echo code $?; "
        f"find $DISK/{folder} -type f ! -size 0 2>/dev/null",
    )
    assert "code 1" in result.stdout, result.stderr
    error = [line for line in result.stderr.splitlines() if line.startswith("jaxdistill ")]
    assert len(error) == 1, result.stderr
    assert "space" in error[0].lower()
    assert "manifest.json" not in result.stdout


def test_a_busy_port_is_said_before_any_work(finished, tmp_path, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        copy = tmp_path / "run"
        shutil.copytree(finished.root, copy)
        port = taken.getsockname()[1]
        overrides = [f"run_dir={copy}", "export.serve=true", f"export.port={port}"]
        arguments = [part for o in overrides for part in ("--set", o)]
        assert cli.main(["export", str(finished.root.parent / "config.yaml"), *arguments, "--redo", "export"]) == 1
    assert f"port {port}: address already in use" in capsys.readouterr().err
    assert not (copy / "export").exists()
