"""The train step compiles for accelerators that are not here: a kernel that no longer builds fails these tests.

They need the compilers' environments: `jaxdistill plan CONFIG --make-environment tpu` (and `gpu`) makes them.
"""

import json
import subprocess

import pytest

from jaxdistill.plan import environments
from jaxdistill.plan.costs import outside_bytes
from jaxdistill.plan.planning import TooLarge, make_plan
from jaxdistill.plan.products import forward_kernels
from jaxdistill.plan.request import make_job
from jaxdistill.plan.targets import Topology
from tests.plan.test_request import config

pytestmark = pytest.mark.aot


@pytest.fixture(autouse=True)
def small_student(monkeypatch):
    """Two small layers, and shapes that the kernels take: key heads, head size and packed rows as in Qwen3."""
    shape = {
        "model_type": "qwen3", "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    monkeypatch.setattr("jaxdistill.plan.request.student_of", lambda config: shape)


def plan_for(name, slices=1, **train):
    topology = Topology.of(name, slices)
    platform = topology.chip.platform
    if environments.find(platform) is None:
        pytest.skip(
            f"no compiler for {environments.TITLES[platform]}: jaxdistill plan CONFIG --make-environment {platform}"
        )
    job = make_job(config(row_tokens=1024, **{"remat": "full", "batch_rows": topology.devices} | train), topology)
    return make_plan(job, topology)


def test_the_step_compiles_for_a_tpu_with_its_pallas_kernels():
    found = plan_for("v5e:2x2").found
    # forward, again in the backward pass, and the gradients of keys and of queries, in each of two layers
    assert found.kernels == {"splash_mha_fwd": 4, "splash_mha_dkv": 2, "splash_mha_dq": 2}
    assert found.flops == pytest.approx(found.analytic_flops, rel=0.01)
    assert not found.unknown_loops
    assert found.traffic, "four devices share the parameters"
    assert {t.network for t in found.traffic} == {"ICI"}


def test_the_step_compiles_for_a_gpu_with_its_attention_kernels():
    found = plan_for("h100:2").found
    # everything is recomputed: forward twice in each of two layers
    assert forward_kernels(found.kernels) == 2 * found.layers == 4
    assert found.flops == pytest.approx(found.analytic_flops, rel=0.01)
    assert sum(flops * count for flops, _, count in found.products) == pytest.approx(found.flops, rel=1e-6)
    assert found.moved["attention"] > 0
    assert outside_bytes(found.moved) > 0
    assert found.memory["libraries"] > 0
    assert {t.network for t in found.traffic} == {"NVLink"}


def test_what_does_not_fit_says_by_how_much():
    with pytest.raises(TooLarge, match=r"GiB too much; try train.remat: full, train.micro_batches: 4096"):
        plan_for("v5e:2x2", remat="none", batch_rows=4 * 4096)


MAKING = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
from jaxdistill.models import ModelConfig, abstract_model, load, params_of, published
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.plan.targets import Topology
from jaxdistill.plan.worker import described_devices

config = ModelConfig.from_hf(published.PUBLISHED["Qwen3-0.6B"][0], "published")
mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1, "slices": None}, described_devices(
    Topology.of("h100:1")))
memory = load.new_params(config, 0, mesh, "bfloat16").lower().compile().memory_analysis()
print(memory.peak_memory_in_bytes, 2 * sum(p.size for p in jax.tree.leaves(params_of(abstract_model(config)))))
"""


def test_making_a_model_takes_no_more_memory_on_a_gpu_than_it_keeps():
    python = environments.find("gpu")
    if python is None:
        pytest.skip("no compiler for NVIDIA GPUs: jaxdistill plan CONFIG --make-environment gpu")
    ran = subprocess.run([python, "-c", MAKING], env=environments.variables(), capture_output=True, text=True)
    assert not ran.returncode, ran.stderr[-2000:]
    peak, kept = map(float, ran.stdout.split())
    assert kept <= peak < 1.01 * kept


def collectives_of_a_product(name, *arguments):
    python = environments.find("tpu")
    if python is None:
        pytest.skip("no compiler for TPUs: jaxdistill plan CONFIG --make-environment tpu")
    ran = subprocess.run(
        [str(python), "-m", "tests.gathered_products", name, *arguments],
        env=environments.variables(),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_matrix_is_gathered_whole_in_16_bits_and_its_gradient_summed_once_in_fp32():
    found = collectives_of_a_product("v6e:2x4", "options")
    assert set(found) == {"all-gather bf16", "all-reduce f32"}
    # of which XLA keeps the own part alone
    assert found["all-reduce f32"] == 1


def test_left_to_itself_xla_sends_the_partial_sums_around():
    # were this no longer so, the option that forbids it could go
    assert collectives_of_a_product("v6e:2x4")["collective-permute f32"] > 1
