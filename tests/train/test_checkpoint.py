"""Checkpoints: what comes back, what is refused, and what is survived."""

import gc
import json
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.record import Checksums

IDENTITY = {"train": {"optimizer": {"learning_rate": 0.1, "name": "adamw"}, "epochs": 2}, "seed": 0}
PROGRESS = {"tokens": 7, "window": [{"loss": 1.5}]}


def state_of(seed=0, mesh=None):
    w = jax.random.normal(jax.random.key(seed), (16, 24))
    where = shardings(mesh)
    return jax.device_put({"params": {"w": w, "b": w[0] * 3}, "step": jnp.int32(seed)}, where)


def shardings(mesh=None):
    mesh = mesh or make_mesh({}, jax.devices()[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    return {"params": {"w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), "b": whole}, "step": whole}


def shapes():
    return jax.eval_shape(lambda: {"params": {"w": jnp.zeros((16, 24)), "b": jnp.zeros(24)}, "step": jnp.int32(0)})


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture
def said():
    return []


@pytest.fixture
def make(tmp_path, said):
    opened = []

    def open_checkpoints(identity=IDENTITY, keep=2, **more):
        opened.append(Checkpoints(tmp_path / "c", keep=keep, identity=identity, say=said.append, **more))
        return opened[-1]

    yield open_checkpoints
    for each in opened:
        each.close()


def damage(folder, how):
    """Breaks the checkpoint in `folder`."""
    data = max((f for f in (folder / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    if how == "truncated":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif how == "flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 4
        data.write_bytes(bytes(content))
    elif how == "emptied":
        for file in folder.rglob("*"):
            if file.is_file():
                file.unlink()
    else:
        (folder / "run" / "metadata").write_text('{"identity":')


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8}])
def test_what_was_saved_comes_back_on_any_mesh(make, shape):
    saver = make()
    saver.save(3, state_of(3), progress=PROGRESS)
    saver.finish(3)
    mesh = make_mesh(shape)
    found = make().restore(shapes(), shardings(mesh))
    assert (found.step, found.progress) == (3, PROGRESS)
    equal(found.state, state_of(3))
    assert found.state["params"]["w"].sharding.mesh.shape == mesh.shape


# Orbax drops a coroutine when a read fails, which Python then complains of, when it is collected
LEFT_BY_ORBAX = "ignore::pytest.PytestUnraisableExceptionWarning"


@pytest.fixture
def collected():
    yield
    gc.collect()


@pytest.mark.filterwarnings(LEFT_BY_ORBAX)
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("how", ["truncated", "flipped", "emptied", "torn json"])
def test_a_broken_newest_checkpoint_gives_way_to_the_one_before_it(make, tmp_path, said, how):
    saver = make()
    for step in (1, 2):
        saver.save(step, state_of(step), progress=PROGRESS | {"tokens": step})
    saver.settle()
    saver.close()
    damage(tmp_path / "c" / "2", how)
    again = make()
    found = again.restore(shapes(), shardings())
    assert (found.step, found.progress["tokens"]) == (1, 1)
    equal(found.state, state_of(1))
    assert "WARNING: the checkpoint at step 2 cannot be read" in said[-1]
    assert (tmp_path / "c" / "2.corrupt").is_dir()
    again.save(2, state_of(2), progress=PROGRESS)  # its step is free again
    again.finish(2)
    equal(make().restore(shapes(), shardings()).state, state_of(2))


@pytest.mark.filterwarnings(LEFT_BY_ORBAX)
@pytest.mark.usefixtures("collected")
def test_only_broken_checkpoints_are_no_reason_to_start_from_nothing(make, tmp_path):
    saver = make()
    saver.save(1, state_of(1), progress=PROGRESS)
    saver.settle()
    damage(tmp_path / "c" / "1", "truncated")
    with pytest.raises(ValueError, match="not one of its 1 checkpoints can be read"):
        make().restore(shapes(), shardings())


def test_nothing_there_is_none(make):
    assert make().restore(shapes(), shardings()) is None


def changed(**optimizer):
    return IDENTITY | {"train": IDENTITY["train"] | {"optimizer": IDENTITY["train"]["optimizer"] | optimizer}}


def test_another_config_is_refused_with_the_difference_and_may_be_accepted_by_name(make, said):
    saver = make()
    saver.save(1, state_of(1), progress=PROGRESS)
    saver.settle()
    other = changed(learning_rate=0.5) | {"seed": 4}
    with pytest.raises(ValueError, match=r"learning_rate: 0.1 -> 0.5.*train.accept_changed: \[.*learning_rate.*\]"):
        make(other).restore(shapes(), shardings())
    with pytest.raises(ValueError, match=r"\(seed: 0 -> 4\)"):
        make(other, accept=["train.optimizer.learning_rate"]).restore(shapes(), shardings())
    assert make(other, accept=["train.optimizer", "seed"]).restore(shapes(), shardings()).step == 1
    assert said[-1] == "  accepted: train.optimizer.learning_rate: 0.1 -> 0.5"


@pytest.mark.parametrize(
    ("template", "said_of_it"),
    [
        ({"w": (16, 25), "b": (24,)}, r"float32\[16, 24\] for params/w, and this config needs float32\[16, 25\]"),
        ({"w": (16, 24)}, r"float32\[24\] for params/b, and this config needs nothing"),
    ],
)
def test_another_model_is_refused_and_not_taken_for_a_broken_checkpoint(make, tmp_path, template, said_of_it):
    saver = make()
    saver.save(1, state_of(1), progress=PROGRESS)
    saver.settle()
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in template.items()}
    where = {"params": {name: shardings()["params"][name] for name in params}, "step": shardings()["step"]}
    with pytest.raises(ValueError, match=said_of_it):
        make().restore({"params": params, "step": shapes()["step"]}, where)
    assert (tmp_path / "c" / "1").is_dir()


def test_the_last_and_the_best_are_kept(make, tmp_path):
    saver = make(keep=1, keep_best=1)
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
        saver.save(step, state_of(step), progress=PROGRESS, loss=loss)
    saver.finish(5)
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == ["2", "5"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_a_checksum_sees_a_flipped_bit_and_parts_that_changed_places_and_no_mesh(dtype):
    x = jnp.arange(16 * 24).reshape(16, 24).astype(dtype)

    def bits(x):
        return Checksums({"x": x}).read()["x"][1]

    assert bits(x.at[3, 5].add(1)) != bits(x)
    assert bits(x[::-1]) != bits(x)
    assert bits(jax.device_put(x, shardings(make_mesh({"fsdp": 4, "tensor": 2}))["params"]["w"])) == bits(x)


FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxdistill.train.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = []
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2, identity={}, say=said.append)
state = {"w": jax.random.normal(jax.random.key(0), (200, 200))}
checkpoints.save(1, state, progress={})
checkpoints.settle()
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
checkpoints.save(2, state, progress={})
checkpoints.settle()
found = {"failed": checkpoints.failed, "latest": checkpoints.latest(), "said": list(said)}
found["left"] = sorted(f.name for f in Path(sys.argv[1]).iterdir())
try:
    checkpoints.save(3, state, progress={})
    checkpoints.finish(3)
except ValueError as error:
    found["end"] = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
again = Checkpoints(Path(sys.argv[1]), keep=2, identity={}, say=said.append)
again.save(4, state, progress={})
again.finish(4)
print(json.dumps(found))
"""


def test_a_full_disk_is_survived_and_said(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")], capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert (found["failed"], found["latest"], found["left"]) == (1, 1, ["1"])
    assert "WARNING: the checkpoint at step 2 could not be saved" in found["said"][0]
    assert "File too large" in found["said"][0] and "the newest one is that at step 1" in found["said"][0]
    assert "the checkpoint at step 3 could not be saved" in found["end"]


def test_a_folder_that_cannot_be_written_to_is_survived_and_said(make, tmp_path, said):
    """As on a read-only disk: no folder can be made where the checkpoint is to lie."""
    saver = make()
    saver.save(1, state_of(1), progress=PROGRESS)
    saver.settle()
    (tmp_path / "c").rename(tmp_path / "moved")
    (tmp_path / "c").write_text("no folder")
    saver.save(2, state_of(2), progress=PROGRESS)
    saver.settle()
    assert saver.failed == 1
    assert "WARNING: the checkpoint at step 2 could not be saved" in said[-1]
    (tmp_path / "c").unlink()
    (tmp_path / "moved").rename(tmp_path / "c")
    saver.save(3, state_of(3), progress=PROGRESS)
    saver.finish(3)
    equal(make().restore(shapes(), shardings()).state, state_of(3))
