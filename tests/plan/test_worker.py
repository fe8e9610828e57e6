"""What is compiled is what `train` runs: the same step, with inputs of the same shapes on the same devices."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from jaxdistill.models import AttentionOptions, init_model, params_of, split_params, with_lora
from jaxdistill.plan.costs import Collective, Costs
from jaxdistill.plan.request import make_job
from jaxdistill.plan.shapes import Sizes, device_bytes
from jaxdistill.plan.targets import Topology
from jaxdistill.plan.worker import make_described, slice_of, traffic_of
from jaxdistill.train.program import abstract_inputs
from jaxdistill.train.step import init_state
from tests.plan.test_request import config

SHAPE = {
    "model_type": "qwen3", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
TOPOLOGY = Topology.of("cpu:8")


def described(**more):
    """A program, and its abstract inputs by name."""
    job = make_job(config(row_tokens=64, batch_rows=8), TOPOLOGY, mesh={"fsdp": 4, "tensor": 2})
    job = dataclasses.replace(job, student=SHAPE, train=job.train | more.pop("train", {}), **more)
    made, dtypes = make_described(job, TOPOLOGY)
    return made, dict(zip(("state", "batch", "frozen", "teacher"), abstract_inputs(made, **dtypes), strict=True))


def alike(abstract, real):
    def same(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)

    jax.tree.map(same, abstract, real)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_the_state_is_that_of_a_training(optimizer):
    made, inputs = described(train={"optimizer": {"name": optimizer, "learning_rate": 1e-3}})
    params = params_of(init_model(made.student, 0, mesh=made.mesh))
    alike(inputs["state"], init_state(params, made.optimizer, made.shardings))


def test_adapters_have_the_frozen_base_that_a_training_holds():
    made, inputs = described(lora={"rank": 4, "base_dtype": "nf4"})
    base = init_model(made.student, 0, param_dtype="nf4", mesh=made.mesh)
    trained, frozen = split_params(params_of(with_lora(base, made.lora, 0)))
    alike(inputs["state"]["params"], trained)
    assert jax.tree.structure(inputs["frozen"]) == jax.tree.structure(frozen)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(str(a)), inputs["frozen"], frozen)
    assert 0 < device_bytes(inputs["frozen"]) < device_bytes(described()[1]["state"]["params"]) / 2
    made.step.lower(*inputs.values())


def test_a_teacher_beside_the_student_is_lowered_with_it():
    teacher = SHAPE | {"num_hidden_layers": 3, "hidden_size": 128, "vocab_size": 104}
    made, inputs = described(train={"distill": {"source": "online"}}, teacher=teacher)
    assert {x.dtype.name for x in jax.tree.leaves(inputs["teacher"])} == {"bfloat16"}
    _, replicated = described(train={"distill": {"source": "online", "replicate": True}}, teacher=teacher)
    assert device_bytes(replicated["teacher"]) > 3 * device_bytes(inputs["teacher"])
    made.step.lower(*inputs.values())


def test_stored_distributions_come_with_the_batch():
    made, inputs = described(train={"distill": {"source": "stored"}}, topk=8)
    assert inputs["batch"]["topk_ids"].shape == (8, 64, 8)
    made.step.lower(*inputs.values())


@pytest.mark.parametrize(("asked", "kernel"), [("auto", "dense"), ("blocks", "blocks"), ("dense", "dense")])
def test_attention_is_the_one_that_the_config_names(asked, kernel):
    """In rows so short that `auto` takes `dense`."""
    made, _ = described(train={"attention": asked}, segment_tokens=20, max_segments=7)
    assert Sizes(made, 1, 1.0, 20).kernel == kernel
    assert made.model.attention == AttentionOptions(asked, 7)


def test_described_gpus_are_told_apart_by_their_hosts():
    hosts = [SimpleNamespace(platform="gpu", slice_index=0, process_index=host) for host in (0, 0, 1, 1)]
    assert [slice_of(d) for d in hosts] == [0, 0, 1, 1]
    costs = Costs()
    key = Collective("all-reduce", (0, 1, 2, 3), True)
    costs.collective_bytes[key], costs.collective_calls[key] = 1000.0, 3.0
    found = traffic_of(costs, hosts, Topology.of("h100:2", 2))
    assert [(t.network, t.devices, t.bytes) for t in found] == [("NVLink", 2, 1000.0), ("network", 2, 500.0)]


def test_devices_without_slices_are_of_one():
    assert {slice_of(d) for d in jax.devices()} == {0}
