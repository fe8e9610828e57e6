"""Topologies, meshes and estimates: what is refused, and what is proposed instead."""

import dataclasses

import pytest

from jaxdistill.config import build
from jaxdistill.models.decoder import REMAT
from jaxdistill.plan.estimate import FAST, SLOW, estimate, seconds_of
from jaxdistill.plan.job import Compiled, Traffic
from jaxdistill.plan.planning import Plan, TooLarge, advice, reason_of
from jaxdistill.plan.request import make_job, parse_mesh
from jaxdistill.plan.search import candidates, policies, search
from jaxdistill.plan.show import warnings_of
from jaxdistill.plan.targets import GIB, Topology
from jaxdistill.plan.worker import out_of_memory, split_memory
from jaxdistill.records import RunDir, write_manifest


def config(student="Qwen/Qwen3-8B", row_tokens=16384, **train):
    return build(
        {
            "name": "p",
            "run_dir": "runs/absent",
            "problems": {"source": "demo", "count": 8},
            "traces": {"engine": "vllm", "teacher": "demo", "max_tokens": 96},
            "data": {"row_tokens": row_tokens},
            "student": {"init": student},
            "train": {"batch_rows": 64, "steps": 10, "optimizer": {"learning_rate": 1e-4}} | train,
        }
    )


def test_topologies_count_chips_and_devices():
    assert Topology.of("v5p:4x4x4").devices == 64
    assert (Topology.of("tpu7x:2x2x1").chips, Topology.of("tpu7x:2x2x1").devices) == (4, 8)
    assert Topology.of("h100:8", 4).devices == 32
    assert Topology.of("v5p:4x8x12").devices == 384, "whole cubes are possible though not listed"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5q:4x4", "did you mean v5p"),
        ("a100:8", "Known are v4, v5e, v5p, v6e, tpu7x, h100, h200, b200, cpu"),
        ("v5e:3x3", "v5e:2x2, v5e:2x4, v5e:4x4"),
        ("v5p:4x4", "v5p:2x2x1"),
        ("h100:7", "h100:1, h100:2, h100:4, h100:8"),
        ("v5p", "v5p:2x2x1"),
    ],
)
def test_an_unknown_topology_lists_the_known_ones(name, said):
    with pytest.raises(ValueError, match=said):
        Topology.of(name)


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("fsdp=7", "does not multiply out to the 16 devices of v5e:4x4; the nearest that does is fsdp=16"),
        ("fsdp=4,tensor=8", "the nearest that does is fsdp=2,tensor=8"),
        ("fsdp=1,tensor=16", "does not divide 32 query heads and 8 key heads; the nearest that does is tensor=8"),
        ("tensor=3,fsdp=-1", "the nearest that does is tensor=2"),
    ],
)
def test_a_mesh_that_does_not_fit_says_the_nearest_that_does(mesh, said):
    with pytest.raises(ValueError, match=said):
        make_job(config(), Topology.of("v5e:4x4"), mesh=parse_mesh(mesh))


def test_other_bad_input_is_said():
    with pytest.raises(ValueError, match="the nearest that do are --batch 64"):
        make_job(config(), Topology.of("v5e:4x4"), batch_rows=70)
    with pytest.raises(ValueError, match="beyond the student's context of 40960"):
        make_job(config(row_tokens=65536), Topology.of("v5e:4x4"))
    with pytest.raises(ValueError, match="the axes are data, fsdp, tensor, context"):
        parse_mesh("model=4")


def test_slices_become_the_data_axis():
    assert make_job(config(), Topology.of("v5e:4x4", 2)).train["mesh"]["data"] == 2
    assert make_job(config(), Topology.of("h100:8", 4), mesh={"tensor": 8}).train["mesh"]["data"] == 4


@pytest.mark.parametrize(
    ("text", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.34G) "
            "exceeds available HBM (15.75G).",
            19.34,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.18G of 31.25G hbm. Ex", 33.18, 31.25),
    ],
)  # fmt: skip
def test_out_of_memory_is_read_from_what_the_compiler_says(text, needed, available):
    found = out_of_memory(text)
    assert (found.needed_bytes, found.available_bytes) == pytest.approx((needed * GIB, available * GIB))
    assert out_of_memory("INTERNAL: a bug") is None


def test_what_does_not_fit_is_told_what_would_help():
    topology = Topology.of("v5e:2x2")
    job = make_job(config(batch_rows=64, remat="none"), topology)
    assert advice(job, 2e9).startswith("try train.remat: full, train.micro_batches: 16, a larger `tensor`")
    job = make_job(config(batch_rows=64, remat="full", micro_batches=32), topology, mesh={"fsdp": 2, "tensor": 2})
    assert advice(job, 2e9).startswith("try a larger `tensor`")


def test_advice_goes_by_the_policy_that_the_step_had():
    job = make_job(config(batch_rows=64, remat="auto", micro_batches=16), Topology.of("v5e:2x2"))
    assert advice(job, 2e9, "dots").startswith("try train.remat: full, a larger")
    assert advice(job, 2e9, "full").startswith("try a larger")


def test_memory_is_split_without_losing_a_byte():
    split = split_memory(100.0, {"params": 20.0, "optimizer": 40.0}, gradients=20.0, logits=90.0)
    assert split == {"params": 20, "optimizer": 40, "gradients": 20, "logits": 20, "activations": 0}


def test_the_most_segments_of_a_row_are_those_that_were_packed(tmp_path):
    topology = Topology.of("h100:1")

    def most(row_tokens=16384, segment_tokens=None, **given):
        asked = dataclasses.replace(config(row_tokens=row_tokens), run_dir=str(tmp_path))
        return make_job(asked, topology, segment_tokens=segment_tokens, **given).max_segments

    # nothing is packed yet: by the mean length
    assert (most(), most(segment_tokens=1000), most(segment_tokens=99999)) == (1, 17, 1)
    tokens = RunDir(tmp_path).tokens
    tokens.mkdir(parents=True)
    more = {"stage": "prepare", "config": {}, "config_hash": "", "inputs": {}}
    write_manifest(tokens, counts={"row_tokens": 16384, "most_segments": 41}, **more)
    assert most() == most(segment_tokens=1000) == most(row_tokens=16384) == 41
    assert most(row_tokens=8192) == 41, "the config's own rows, as long as prepare made them"
    assert make_job(
        dataclasses.replace(config(), run_dir=str(tmp_path)), topology, row_tokens=8192, segment_tokens=1000
    ).max_segments == 9  # fmt: skip
    write_manifest(tokens, counts={"row_tokens": 16384}, **more)
    assert most(segment_tokens=1000) == 17, "prepared before they were counted"


def compiled(**more):
    return Compiled(
        **dict(
            mesh={"data": 1, "fsdp": 16, "tensor": 1, "context": 1}, peak_bytes=8 * GIB, memory={}, flops=1e14,
            kernel_flops={"splash": 1e13}, cycles=1e9, kernels={}, traffic=[], unknown_loops={}, analytic_flops=1e14,
            model_flops=1e15, tokens=1 << 20, parameters=1, seconds=1.0, host_bytes=1.0,
        ) | more
    )  # fmt: skip


def traffic(**more):
    return Traffic(
        **dict(kind="all-gather", network="ICI", devices=16, axes=2.0, asynchronous=True, calls=1.0, bytes=18e10) | more
    )


def test_seconds_follow_from_bytes_links_and_axes():
    v5p = Topology.of("v5p:4x4x4", 2)
    assert seconds_of(traffic(), v5p) == pytest.approx(18e10 / (2 * 2 * 90e9))
    assert seconds_of(traffic(axes=0.5), v5p) == pytest.approx(2.0), "a line sends one way"
    assert seconds_of(traffic(network="DCN"), v5p) == pytest.approx(18e10 / 6.25e9)


def test_asynchronous_communication_hides_and_synchronous_does_not():
    v5p = Topology.of("v5p:4x4x4")
    alone = estimate(compiled(), v5p, FAST)
    hidden = estimate(compiled(traffic=[traffic(bytes=1e9)]), v5p, FAST)
    waited = estimate(compiled(traffic=[traffic(bytes=1e9, asynchronous=False)]), v5p, FAST)
    assert alone.seconds == hidden.seconds < waited.seconds
    assert alone.compute == pytest.approx(1e9 / 1.75e9)
    # code that was made with little effort is slow, and its cycles say nothing
    assert estimate(compiled(cycles=9e12), v5p, FAST, quick=True).compute == pytest.approx(1e14 / (FAST.whole * 459e12))
    # a compiler that counts too few cycles does not beat the peak
    assert estimate(compiled(cycles=1.0), v5p, FAST).compute == pytest.approx(1e14 / 459e12)
    for network in ("ICI", "DCN"):
        found = compiled(traffic=[traffic(network=network)])
        assert estimate(found, v5p, FAST).seconds < estimate(found, v5p, SLOW).seconds


H200 = Topology.of("h200:1")
# the step of Qwen3-0.6B, 4 rows of 8,192 tokens of which 79% are trained, everything recomputed, AdamW: what is moved
# and multiplied by plan, and for how many milliseconds a profile on an H200 showed it
MOVED_GB, PRODUCTS_TFLOP = 671.9, 134.05
PRODUCTS_MS, MOVED_MS = 197.0, 91.0 + 70.0 + 8.0


def test_a_gpus_kernel_times_are_in_the_range():
    products = [(PRODUCTS_TFLOP * 1e12, 0.0, 1.0)]
    found = compiled(cycles=0.0, products=products, moved={"elementwise": MOVED_GB * 1e9, "products": 9e15})
    fast, slow = (estimate(found, H200, of) for of in (FAST, SLOW))
    assert fast.compute < PRODUCTS_MS / 1e3 < slow.compute
    assert fast.memory < MOVED_MS / 1e3 < slow.memory
    assert fast.seconds == fast.compute + fast.memory + fast.kernels


def test_a_product_takes_as_long_as_its_flops_or_its_bytes():
    peak, bandwidth = 989e12 * FAST.matrix, 4800e9 * FAST.memory
    large, thin = (8e12, 1e9, 2.0), (1e9, 9e9, 3.0)
    assert estimate(compiled(products=[large], cycles=0.0), H200, FAST).compute == pytest.approx(2 * 8e12 / peak)
    assert estimate(compiled(products=[thin], cycles=0.0), H200, FAST).compute == pytest.approx(3 * 9e9 / bandwidth)


def test_what_goes_to_the_host_is_hidden_as_far_as_there_is_work():
    def seconds(size):
        return estimate(compiled(cycles=0.0, products=[(1e13, 0.0, 1.0)], offloaded_bytes=size), H200, FAST).seconds

    assert seconds(1e9) == seconds(0.0)
    assert seconds(64e9 * FAST.links * 100) == pytest.approx(100)


def plan_of(job, topology, **more):
    found = compiled(**more)
    return Plan(
        topology=topology, job=job, found=found, fast=estimate(found, topology, FAST),
        slow=estimate(found, topology, SLOW), steps=1000,
    )  # fmt: skip


def test_a_plan_is_plain_data_with_hours_and_chip_hours():
    topology = Topology.of("tpu7x:2x2x1")
    said = plan_of(make_job(config(), topology), topology).as_dict()
    assert said["fast"]["hours"] == pytest.approx(1000 * said["fast"]["seconds"] / 3600)
    assert said["fast"]["chip_hours"] == pytest.approx(4 * said["fast"]["hours"])
    assert said["fits"]
    assert not plan_of(make_job(config(), topology), topology, peak_bytes=95 * GIB).fits


def test_flat_fsdp_over_a_torus_is_warned_of():
    topology = Topology.of("v5e:4x4")
    plan = plan_of(make_job(config(), topology), topology, traffic=[traffic(kind="all-reduce")])
    assert any("twice" in warning for warning in warnings_of(plan))
    split = dataclasses.replace(plan.found, mesh={"data": 1, "fsdp": 4, "tensor": 4, "context": 1})
    assert not any("twice" in warning for warning in warnings_of(dataclasses.replace(plan, found=split)))


def test_candidates_fit_and_differ():
    topology = Topology.of("v5e:4x4", 2)
    found = list(candidates(make_job(config(), topology), topology))
    for job in found:
        make_job(config(**{k: job.train[k] for k in ("remat", "micro_batches")}), topology, mesh=job.train["mesh"])
        assert job.quick
    assert len({str(job.train) for job in found}) == len(found) > 5


def test_policies_are_the_models_own_and_the_first_keeps_least():
    assert sorted(policies()) == sorted(REMAT)
    assert (policies()[0], policies()[-1]) == ("full", "none")
    with pytest.raises(ValueError, match=r"--remat ful: no such policy; did you mean full\? Known are auto, none, "):
        make_job(config(), Topology.of("v5e:4x4"), remat="ful")
    for remat in REMAT:
        assert make_job(config(), Topology.of("v5e:4x4"), remat=remat).train["remat"] == remat


def test_a_search_ranks_and_does_not_try_what_is_hopeless():
    topology, asked = Topology.of("v5e:4x4"), []

    def compiler(job, topology, steps):
        mesh = job.train["mesh"]
        asked.append((job.train["remat"], mesh["tensor"], mesh["context"], job.train["micro_batches"]))
        if job.train["remat"] == "full" and mesh["tensor"] == 1 and mesh["context"] == 1:
            raise TooLarge("too large", out_of_memory("RESOURCE_EXHAUSTED: Used 20G of 15G hbm"))
        return plan_of(job, topology, cycles=1e9 * mesh["tensor"])

    found = search(make_job(config(), topology), topology, 10, limit=100, plan=compiler)
    assert len(asked) == len(set(asked))
    assert not any(remat != "full" and tensor == context == 1 for remat, tensor, context, _ in asked)
    assert {remat for remat, *_ in asked} == set(REMAT), "every policy of the model is tried"
    speeds = [p.fast.seconds for p in found.plans]
    assert speeds == sorted(speeds)
    assert len(found.failed) == 2
    assert len(search(make_job(config(), topology), topology, 10, limit=3, plan=compiler).plans) == 1


def test_a_search_on_one_gpu_tries_the_policies_in_order_of_memory():
    topology, asked = Topology.of("h100:1"), []

    def compiler(job, topology, steps):
        asked.append((job.train["micro_batches"], job.train["remat"]))
        assert job.train["optimizer"]["name"] == "adafactor"
        needed = {"full": 20, "none": 500}.get(job.train["remat"], 100 if job.train["micro_batches"] == 1 else 60)
        return plan_of(job, topology, cycles=0.0, peak_bytes=needed * GIB, flops=1e14 / (1 + needed / 1000))

    job = make_job(config(batch_rows=4, optimizer={"name": "adafactor", "learning_rate": 1e-4}), topology)
    found = search(job, topology, 10, plan=compiler)
    assert asked[:2] == [(4, "full"), (1, "full")]
    # in whole batches nothing between fits, so that keeping everything is not tried
    assert (1, "none") not in asked
    assert (4, "none") in asked
    assert [p.fits for p in found.plans] == sorted((p.fits for p in found.plans), reverse=True)
    assert found.plans[0].job.train["micro_batches"] == 4
    assert found.plans[0].job.train["remat"] not in ("full", "none")


def test_a_compiler_that_died_says_why():
    check = "F1121 offload.cc:316] Check failed: inc < core_count() (1 vs. 1)"
    assert reason_of(f"W starts\n{check}\n    @ 0x7f Log()\nE Raising signal 6\n") == check
    assert reason_of("Traceback\n\nKeyError: 'x'\n\n") == "KeyError: 'x'"
    assert reason_of("") == ""


def test_a_topology_with_room_is_named():
    def room(name: str, gib: float, slices: int = 1) -> str:
        return str(Topology.of(name, slices).with_room(gib * GIB))

    assert room("v5e:4x4", 16) == "v5e:4x8"
    assert room("v5e:2x2", 263.2) == "v5e:8x16"
    assert room("v5p:2x2x1", 96, slices=2) == "2 x v5p:2x2x2"
    assert room("tpu7x:2x2x1", 95) == "tpu7x:2x2x2"
    assert room("v5e:16x16", 16) == "None"
    assert room("h100:8", 150, slices=2) == "4 x h100:8"
    assert "a larger topology (by memory alone v5e:4x8)" in advice(make_job(config(), Topology.of("v5e:4x4")), 17e9)
