"""What `plan` prints of a compiled step."""

import re

import pytest

from jaxdistill import progress
from jaxdistill.plan.estimate import LAUNCH_SECONDS
from jaxdistill.plan.request import make_job
from jaxdistill.plan.show import attention_text, row_of, show_plan, warnings_of
from jaxdistill.plan.targets import GIB, Topology
from tests.plan.test_request import config, plan_of

H100 = Topology.of("h100:1")
MOVED = {"products": 300e9, "attention": 60e9, "collectives": 1e9, "elementwise": 200e9, "copies": 40e9}


def shown(**more):
    plan = plan_of(make_job(config(batch_rows=4, remat="full"), H100), H100, cycles=0.0, moved=MOVED, layers=36, **more)
    with progress.console.capture() as text:
        show_plan(plan)
    return plan, " ".join(text.get().split())


def test_a_gpus_bytes_memory_and_attention_are_shown():
    plan, text = shown(
        kernels={"attention_forward": 72.0, "attention_keys": 36.0, "attention_queries": 36.0},
        memory={"params": 6 * GIB, "libraries": 2 * GIB}, products=[(1e12, 1e9, 100.0)],
    )  # fmt: skip
    assert "601 GB a device and step, 240 GB of them outside of products, attention and collectives" in text
    assert "products 300, elementwise 200, attention 60, copies 40, collectives 1" in text
    assert "attention_forward, attention_keys, attention_queries: 2 forward kernel(s) a layer and step" in text
    assert "libraries 2.00" in text
    assert "s matrix products" in text
    assert "s elementwise passes, reductions, copies" in text
    assert plan.as_dict()["outside_bytes"] == 240e9
    assert not any("attention" in warning for warning in warnings_of(plan))


@pytest.mark.parametrize("chip", ["h100:1", "v5e:2x2"])
def test_a_tiny_step_is_bound_by_launches_and_its_units_can_be_read(chip):
    topology = Topology.of(chip)
    small = {"flops": 1e6, "kernel_flops": {}, "products": [(1e4, 1e4, 100.0)], "moved": {"elementwise": 1e6}}
    job = make_job(config(batch_rows=4, remat="full"), topology)
    plan = plan_of(job, topology, **small, cycles=1000.0, traffic=[], launches=500.0, layers=2)
    with progress.console.capture() as captured:
        show_plan(plan)
    text = " ".join(captured.get().split())
    assert not re.search(r"\de-\d", " ".join([text, *row_of(plan)]))  # such as 1e-09 hours
    assert "a step this short is bound by" in text and "no estimate" in text
    assert "at most 0.01 chip-hours" in text
    if chip.startswith("h100"):
        assert plan.fast.seconds == pytest.approx(500 * LAUNCH_SECONDS)
        assert "step 1.2 to 1.2 ms" in text
        assert "1,000 steps: 1.2 to 1.2 s" in text


def test_launches_cost_a_long_step_nothing():
    plan, text = shown(products=[(1e12, 1e9, 100.0)], launches=5000.0)
    assert plan.fast.launches == plan.slow.launches == 0
    assert "launches" not in text


def test_attention_without_a_kernel_is_warned_of():
    plan, text = shown(attention="blocks", products=[(1e12, 1e9, 100.0)])
    assert attention_text(plan.found) == "blocks: written in JAX, no kernel of its own"
    assert "WARNING: attention is written in JAX (blocks), which is slow: no kernel of this GPU takes it" in text


def test_why_there_is_no_kernel_is_said():
    def warned(**train):
        job = make_job(config(batch_rows=4, remat="full", **train), H100)
        return " ".join(warnings_of(plan_of(job, H100, cycles=0.0, moved=MOVED, attention="blocks")))

    assert "(blocks), which is slow: chosen by train.attention; set auto" in warned(attention="blocks")
    # whatever else would have been in the way
    assert "chosen by train.attention" in warned(attention="blocks", compute_dtype="float32")
    assert "no kernel takes fp32, which train.compute_dtype asks for" in warned(compute_dtype="float32")
    assert "no kernel of this GPU takes it" in warned(compute_dtype="bfloat16")
