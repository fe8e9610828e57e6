"""Two processes with two devices each export the bytes that one process does, and fail together."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdistill.export import export_hf
from jaxdistill.export.check import free_port
from tests.export.tiny import files_of, make_model, make_tokenizer_folder

SCRIPT = Path(__file__).with_name("multiprocess.py")


def start(folder, port, processes, process, devices):
    command = [sys.executable, str(SCRIPT), *map(str, (port, processes, process, devices, folder))]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def end_of(running):
    """What each process said on stderr; none outlives the test."""
    try:
        return [process.communicate(timeout=100)[1] for process in running]
    finally:
        for process in running:
            process.kill()


@pytest.mark.slow
def test_two_processes_export_what_one_does(tmp_path):
    export_hf(
        make_model(),
        tmp_path / "in",
        tokenizer=make_tokenizer_folder(tmp_path / "tokenizer"),
        card="",
        dtype="bfloat16",
    )
    running = [start(tmp_path, 0, 1, 0, 4)]
    port = free_port()
    running += [start(tmp_path, port, 2, process, 2) for process in range(2)]
    errors = end_of(running)
    assert [process.returncode for process in running] == [0, 0, 0], errors

    alone, first, second = (json.loads((tmp_path / f"said-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert (alone["whole arrays here"], first["whole arrays here"], second["whole arrays here"]) == (True, False, False)
    for dtype in ("float32", "bfloat16"):
        files = files_of(tmp_path / f"2-{dtype}")
        assert files == files_of(tmp_path / f"1-{dtype}")
        assert sum(name.endswith(".safetensors") for name in files) > 3
        assert first[f"{dtype} is there"] and second[f"{dtype} is there"]
        assert first[dtype]["check"].pop("folder").startswith(f".2-{dtype}.")
        assert second[dtype]["check"].pop("folder") is None
        assert second[dtype] == first[dtype]
        found = first[dtype]["check"]
        assert 0 < found["max_difference"] <= 1e-4 * found["logit_scale"]
    for said in (alone, first, second):
        assert said["check fails"] == "the first process does not like it"
        differ = r"export: transformers' logits differ by .* \(largest logit .*\), only in the final norm .*; nothing"
        assert re.match(differ, said["logits differ"])
        assert said["no tokenizer"] == f"{tmp_path}/nowhere: no such folder; give the tokenizer's."
        assert "safetensors: File too large; nothing was exported." in said["disk is full"]
    assert first["logits differ"] == second["logits differ"]
    assert first["disk is full"] == second["disk is full"]
    assert not [path.name for path in tmp_path.iterdir() if "failed" in path.name or path.name.endswith(".tmp")]
