"""What is learned from is what transformers makes of the same folder: every family, once for every content."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxdistill import hub
from jaxdistill.config import StudentConfig
from jaxdistill.export.check import free_port
from jaxdistill.models import Lora, ModelConfig, load_hf
from jaxdistill.models.start import REMEMBERED, check_start, is_exact, load_checked, needs_check
from jaxdistill.models.student import start_student
from jaxdistill.parallel.mesh import make_mesh
from tests.models import tiny
from tests.models.test_parity import CASES

MESH = {"fsdp": 2, "data": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxdistill" / "checked.json"


def edit(folder, **more):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | more))


def spoil(folder):
    """Another model there than the one that was loaded."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] * 1.1}, file, {"format": "pt"})


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_every_family_may_be_started_from(tmp_path, capsys, family, tie):
    folder = tmp_path / family
    tiny.make(family, folder, tie=tie)
    found = check_start(folder, load_hf(folder, make_mesh(MESH)))
    assert found.agrees and found.logit_scale > 0.1
    assert f"{folder} is what transformers makes of it" in capsys.readouterr().out
    assert load_checked(folder, check=True).config.model_type == family
    assert not capsys.readouterr().out


@pytest.mark.parametrize("loaded", [False, True])
def test_a_start_is_compared_once(tmp_path, cache, loaded):
    folder = tmp_path / "model"
    tiny.make("llama", folder)
    model = load_hf(folder, make_mesh(MESH)) if loaded else None
    found = check_start(folder, model)
    assert found.agrees
    assert check_start(folder, model) is None
    assert [entry["folder"] for entry in json.loads(cache.read_text()).values()] == [str(folder)]
    (folder / "model.safetensors").touch()
    assert check_start(folder, model) == found
    cache.write_text("broken")
    assert check_start(folder, model) == found


def test_what_differs_is_refused_and_not_remembered(tmp_path, cache):
    folder = tmp_path / "model"
    tiny.make("llama", folder)
    model = load_hf(folder)
    spoil(folder)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"model: transformers' logits differ by .*, first after layer 2 of 3: it"):
            check_start(folder, model)
    assert not cache.exists()


def test_the_file_that_remembers_stays_small(tmp_path, cache):
    tiny.make("llama", tmp_path / "model")
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({f"{i}": {"folder": "gone"} for i in range(2 * REMEMBERED)}))
    check_start(tmp_path / "model")
    marks = list(json.loads(cache.read_text()))
    assert len(marks) == REMEMBERED and marks[:-1] == [f"{i}" for i in range(REMEMBERED + 1, 2 * REMEMBERED)]
    assert not needs_check(tmp_path / "model")


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path, capsys):
    tiny.make("llama", tmp_path / "model")
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert check_start(tmp_path / "model", seen=tmp_path / "file" / "checked.json").agrees
    assert "will be compared with transformers again" in capsys.readouterr().out


def test_what_was_rounded_when_it_was_loaded_is_no_fault_of_the_files(tmp_path):
    tiny.make("qwen3", tmp_path / "fp32").to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    rounded = load_hf(tmp_path / "fp32", param_dtype="bfloat16")
    assert not is_exact(rounded, tmp_path / "fp32") and is_exact(rounded, tmp_path / "bf16")
    for folder, kept in (("fp32", "bfloat16"), ("fp32", "nf4"), ("bf16", "bfloat16"), ("bf16", "float32")):
        (tmp_path / folder / "model.safetensors").touch()
        assert check_start(tmp_path / folder, load_hf(tmp_path / folder, param_dtype=kept)).agrees


def test_without_torch_it_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny.make("qwen3", folder)
    tiny.make("llama", tmp_path / "known")
    check_start(tmp_path / "known")
    monkeypatch.setitem(sys.modules, "torch", None)
    # what has been compared needs no torch, nor does what is not to be compared, nor this package's own
    load_checked(tmp_path / "known", check=True)
    load_checked(folder, check=False)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"torch .* is not installed; pip install .*, or set student\.check: false"):
        load_checked(folder, check=True)
    assert not needs_check(hub.demo_teacher())


def test_a_student_is_compared_before_it_gets_adapters(tmp_path, cache):
    folder = tmp_path / "model"
    tiny.make("qwen3", folder)
    shape = ModelConfig.from_hf(hub.read_config(folder))
    student = StudentConfig(init=str(folder), lora={"rank": 2})
    assert start_student(student, shape, 0, None).lora and not cache.exists()
    assert start_student(student, shape, 0, make_mesh(MESH), check=True).lora == Lora.of(2, 32.0)
    assert cache.exists()


def test_an_adapter_is_compared_with_peft(tmp_path):
    from jaxdistill.export import export_adapter
    from tests.export.tiny import make_tokenizer_folder
    from tests.models.test_comparison import adapted

    tiny.make("qwen3", tmp_path / "base")
    model = adapted(load_hf(tmp_path / "base"), Lora.of(4, 8.0, targets=["q", "down"]))
    more = {"tokenizer": make_tokenizer_folder(tmp_path / "tokenizer"), "card": ""}
    export_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"), revision=None, **more)
    found = check_start(tmp_path / "adapter", load_hf(tmp_path / "adapter"))
    assert found.agrees
    assert check_start(tmp_path / "adapter") is None
    (tmp_path / "base" / "model.safetensors").touch()  # a part of it
    assert check_start(tmp_path / "adapter").logit_scale == pytest.approx(found.logit_scale)
    base = check_start(tmp_path / "base").logit_scale
    assert abs(base - found.logit_scale) > 1e-4 * base


@pytest.mark.slow
def test_several_processes_compare_and_stop_together(tmp_path):
    """The first one alone has torch and remembers; all of them know what was found."""
    tiny.make("qwen3", tmp_path / "same")
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    spoil(tmp_path / "other")
    script, port = Path(__file__).with_name("multiprocess.py"), free_port()
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "XDG_CACHE_HOME": str(tmp_path / "home")}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), "2", str(process), str(tmp_path)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=200)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors
    first, second = (json.loads((tmp_path / f"said-{process}.json").read_text()) for process in range(2))
    assert first == second
    assert 0 < first["model"][0] < 1e-3 and 0 < first["files"][0] < 1e-3
    assert first["model again"] and first["files again"] and first["loaded"] == 3 and not first["remembers"]
    assert "first after layer 2 of 3" in first["other"] and "student.check: false" in first["other"]
