"""Training adapters: the stages from packed rows to an adapter that PEFT loads, and to a merged model."""

import shutil

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jaxdistill import cli
from jaxdistill.config import OptimizerConfig
from jaxdistill.hub import demo_teacher
from jaxdistill.models import Lora, abstract_model, init_model, load_hf, params_of, split_params, with_lora
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.records import RunDir, read_manifest
from jaxdistill.train.optimizer import make_optimizer
from jaxdistill.train.step import init_state, make_step, put_batch, state_shardings
from tests.helpers import TINY, prepared_run
from tests.train.test_step import CONFIG, batch_of, examples

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    student = {"init": str(demo_teacher()), "lora": LORA}
    prepared_run(root, student=student, export={"lora": "adapter"}, train=TINY["train"] | {"steps": 10})
    assert cli.main(["train", str(root / "config.yaml")]) == 0
    assert cli.main(["export", str(root / "config.yaml")]) == 0
    return root


def test_the_exported_adapter_is_loaded_by_peft(folder):
    ids = np.random.default_rng(0).integers(0, 400, (2, 30))
    base = AutoModelForCausalLM.from_pretrained(demo_teacher(), dtype=torch.float32)
    with torch.no_grad():
        before = base(torch.from_numpy(ids)).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(base, folder / "run" / "export").eval()
        want = adapted(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(want - before).max() > 0.01
    got = load_hf(folder / "run" / "export")(jax.numpy.asarray(ids))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_a_checkpoint_holds_the_adapters_alone(folder):
    size = sum(f.stat().st_size for f in (folder / "run" / "checkpoints").rglob("*") if f.is_file())
    adapters = sum(p.nbytes for p in load_file(folder / "run" / "export" / "adapter_model.safetensors").values())
    kept = len([f for f in (folder / "run" / "checkpoints").iterdir() if f.name.isdigit()])
    base = (demo_teacher() / "model.safetensors").stat().st_size
    assert size / kept < 3 * adapters + 100_000 < base
    assert read_manifest(folder / "run" / "checkpoints")["counts"]["parameters"] * 4 == adapters


def test_going_on_from_a_checkpoint_is_bitwise_the_same(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    text = (folder / "config.yaml").read_text().replace(str(folder), str(tmp_path))
    (tmp_path / "config.yaml").write_text(text)
    run = RunDir(tmp_path / "run")
    steps = sorted(int(f.name) for f in run.checkpoints.iterdir() if f.name.isdigit())
    shutil.rmtree(run.checkpoints / str(steps[-1]))
    shutil.rmtree(run.export)
    (run.checkpoints / "manifest.json").unlink()
    assert cli.main(["train", str(tmp_path / "config.yaml")]) == 0
    assert cli.main(["export", str(tmp_path / "config.yaml"), "--set", "export.lora=merged"]) == 0
    merged, adapter = load_file(run.export / "model.safetensors"), load_hf(folder / "run" / "export")
    got = np.asarray(params_of(adapter)["layers"]["q"])
    for layer in range(got.shape[0]):
        np.testing.assert_array_equal(merged[f"model.layers.{layer}.self_attn.q_proj.weight"].T, got[layer])


@pytest.mark.parametrize(("optimizer", "base"), [("adamw", "nf4"), ("muon", "float32")])
def test_only_adapters_learn_and_have_moments(optimizer, base):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    lora = Lora.of(2, 4.0, 0.1)
    made = make_optimizer(OptimizerConfig(name=optimizer, learning_rate=3e-2, schedule="constant"), 40)
    shardings = state_shardings(CONFIG, made, mesh, lora)
    trained, frozen = split_params(params_of(with_lora(init_model(CONFIG, 0, mesh=mesh, param_dtype=base), lora, 0)))
    before = jax.tree.map(np.asarray, frozen)
    size = sum(p.size for p in jax.tree.leaves(trained))
    state = init_state(trained, made, shardings)
    moments = sum(p.size for p in jax.tree.leaves(state["optimizer"]))
    assert 2 * size <= moments < 2 * size + 50
    model = abstract_model(CONFIG, mesh=mesh, lora=lora)
    step = make_step(model, made, shardings, region_weights=(1.0, 1.0), micro_batches=2)
    arrays = {k: np.asarray(v) for k, v in batch_of(examples(), rows=16).items()}
    batch = put_batch(lambda rows: {k: v[rows] for k, v in arrays.items()}, arrays["tokens"].shape, mesh)
    losses = []
    for _ in range(25):
        state, metrics = step(state, batch, frozen)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.15
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, frozen), before)
