"""What a step is where the config says nothing: parts, dtype, and what is kept for the backward pass."""

import dataclasses

import jax
import pytest

from jaxdistill.config import ContrastiveConfig, DistillConfig, OnPolicyConfig, build
from jaxdistill.models import ModelConfig, abstract_model, params_of
from jaxdistill.models.published import PUBLISHED
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.parallel.options import step_options
from jaxdistill.train.defaults import (
    CPU_PART,
    compute_dtype_of,
    has_bf16_units,
    kept_bytes,
    layer_parts_of,
    micro_batches_of,
    remat_of,
    resident_bytes,
    step_size,
    teacher_bytes,
)
from jaxdistill.train.program import settle
from tests.helpers import TINY

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def train(**changes):
    config = build(TINY | {"run_dir": "runs/parts", "train": TINY["train"] | {"batch_rows": 16} | changes})
    return config.train


def test_on_a_cpu_a_part_stays_near_the_caches():
    # the benchmark's shape: 2 of 16 rows
    assert micro_batches_of(train(), "cpu", ONE, row_tokens=512, hidden_size=384) == 8
    assert micro_batches_of(train(), "cpu", ONE, row_tokens=136, hidden_size=128) == 1
    # a row is never cut
    assert micro_batches_of(train(), "cpu", ONE, row_tokens=4096, hidden_size=1024) == 16
    assert micro_batches_of(train(batch_rows=12), "cpu", ONE, row_tokens=512, hidden_size=384) == 6


@pytest.mark.parametrize("row_tokens", [64, 500, 512, 1024])
def test_it_is_the_fewest_parts_that_do(row_tokens):
    parts = micro_batches_of(train(), "cpu", ONE, row_tokens, 384)
    rows = {n: 16 // n for n in (1, 2, 4, 8, 16)}
    assert parts == min(n for n, left in rows.items() if left * row_tokens * 384 <= CPU_PART)


def test_every_device_has_a_part_of_its_own():
    assert micro_batches_of(train(), "cpu", ONE | {"data": 2}, 512, 384) == 4
    assert micro_batches_of(train(), "cpu", ONE | {"data": 2, "fsdp": 4}, 512, 384) == 1
    assert micro_batches_of(train(), "cpu", ONE | {"context": 2}, 512, 384) == 4
    # 16 rows do not divide over 3 devices: the program says so
    assert micro_batches_of(train(), "cpu", ONE | {"data": 3}, 512, 384) == 1


def test_what_the_config_says_holds_and_accelerators_are_left_alone():
    assert micro_batches_of(train(micro_batches=2), "cpu", ONE, 4096, 4096) == 2
    assert micro_batches_of(train(micro_batches=2), "tpu", ONE, 4096, 4096) == 2
    assert micro_batches_of(train(), "tpu", ONE, 4096, 4096) == micro_batches_of(train(), "gpu", ONE, 4096, 4096) == 1


def test_steps_with_other_rows_too_are_not_cut_unasked():
    alone = train()
    assert micro_batches_of(alone, "cpu", ONE, 4096, 4096, dropout=True) == 1
    assert micro_batches_of(alone, "cpu", ONE, 4096, 4096) == 16
    for more in ({"contrastive": ContrastiveConfig()}, {"on_policy": OnPolicyConfig(max_tokens=8, grader="server")}):
        assert micro_batches_of(dataclasses.replace(alone, **more), "cpu", ONE, 4096, 4096) == 1


CPUINFO = {
    "AVX2 alone": "processor\t: 0\nflags\t\t: fpu sse2 avx avx2 fma\n",
    "AVX-512 without bf16": "flags\t\t: avx2 avx512f avx512vl avx512_vnni\n",
    "Zen 4": "flags\t\t: avx2 avx512f avx512_bf16\n",
    "AMX": "flags\t\t: avx512f amx_tile amx_bf16\n",
    "Arm": "processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n",
    "of another form": "hello\n",
}


@pytest.mark.parametrize("machine", CPUINFO)
def test_cpus_without_units_for_bf16_compute_in_fp32(machine, tmp_path):
    path = tmp_path / machine.replace(" ", "_")
    path.write_text(CPUINFO[machine])
    assert has_bf16_units(path) == (machine in ("Zen 4", "AMX", "Arm"))
    assert not has_bf16_units(tmp_path / "absent")


def test_the_dtype_that_the_config_names_holds_and_accelerators_compute_in_bf16():
    open_, narrow, wide = (train(compute_dtype=dtype) for dtype in ("auto", "bfloat16", "float32"))
    assert train().compute_dtype == "auto"
    assert compute_dtype_of(open_, "cpu") == ("bfloat16" if has_bf16_units() else "float32")
    for platform in ("cpu", "gpu", "tpu"):
        assert compute_dtype_of(narrow, platform) == "bfloat16"
        assert compute_dtype_of(wide, platform) == "float32"
    assert compute_dtype_of(open_, "gpu") == compute_dtype_of(open_, "tpu") == "bfloat16"


def published_size(name, rows, *, tokens=8192, **sizes):
    shape = ModelConfig.from_hf(PUBLISHED[name][0], name)
    count = sum(x.size for x in jax.tree.leaves(params_of(abstract_model(shape))))
    of = train(batch_rows=rows)
    return shape, step_size(of, shape, ONE | sizes, tokens, 1, trained=count)


@pytest.mark.parametrize(
    ("name", "rows", "gib", "policy"),
    [
        # an H200 holds all products of the smaller ones, an H100 less, and a small card the layers' inputs alone
        ("Qwen3-0.6B", 4, 132.8, "dots"),
        ("Qwen3-1.7B", 4, 132.8, "dots"),
        ("Qwen3-1.7B", 4, 75.1, "attention"),
        ("Qwen3-0.6B", 4, 22, "attention"),
        ("Qwen3-0.6B", 4, 14, "full"),
        ("Qwen3-8B", 4, 132.8, "full"),
        ("Qwen3-0.6B", 4, None, "full"),
    ],
)
def test_what_is_kept_is_the_most_that_memory_holds(name, rows, gib, policy):
    shape, size = published_size(name, rows)
    assert remat_of(train(), "gpu", shape, size, gib and gib * 2**30) == policy


def test_a_teacher_on_the_same_devices_leaves_less_to_keep():
    """An H100 would hold all products of 8 rows, but not beside a teacher of 16 GB."""
    shape, size = published_size("Qwen3-0.6B", 8)
    teacher = ModelConfig.from_hf(PUBLISHED["Qwen3-8B"][0], "Qwen3-8B")
    online = dataclasses.replace(train(), distill=DistillConfig(source="online", teacher="Qwen3-8B"))
    beside = teacher_bytes(online, teacher, 8_190_735_360, 2.0, ONE, size)
    assert 16.4e9 < beside < 19e9
    together = dataclasses.replace(size, teacher=beside)
    assert resident_bytes(shape, together) == resident_bytes(shape, size) + beside
    memory = 75.1 * 2**30
    assert remat_of(train(), "gpu", shape, size, memory) == "dots"
    assert remat_of(online, "gpu", shape, together, memory) == "attention"
    eight, replicated = ONE | {"fsdp": 8}, dataclasses.replace(online.distill, replicate=True)
    split = teacher_bytes(online, teacher, 8_190_735_360, 2.0, eight, size)
    whole = dataclasses.replace(online, distill=replicated)
    assert teacher_bytes(whole, teacher, 8_190_735_360, 2.0, eight, size) == beside
    assert beside - split == pytest.approx(8_190_735_360 * 2.0 * 7 / 8)


def test_more_memory_never_keeps_less_and_what_the_config_says_holds():
    shape, size = published_size("Qwen3-1.7B", 8, fsdp=2)
    order = ["full", "attention", "dots"]
    found = [order.index(remat_of(train(), "tpu", shape, size, gib * 2**30)) for gib in range(8, 140, 4)]
    assert found == sorted(found) and {0, 1, 2} == set(found)
    assert remat_of(train(), "cpu", shape, size, None) == "none"
    assert remat_of(train(remat="none"), "tpu", shape, size, 1.0) == "none"


def test_a_mesh_divides_what_a_device_holds():
    shape, one = published_size("Qwen3-1.7B", 8)
    for axis in ("fsdp", "tensor", "context"):
        _, eight = published_size("Qwen3-1.7B", 8, **{axis: 8})
        assert eight.trained == one.trained / 8
        assert 8 * resident_bytes(shape, eight) > resident_bytes(shape, one) > resident_bytes(shape, eight)
        assert kept_bytes(shape, eight, "dots") * eight.tokens < kept_bytes(shape, one, "dots") * one.tokens


def test_offloading_is_refused_on_cpus():
    shape = ModelConfig.from_hf(PUBLISHED["Qwen3-0.6B"][0], "Qwen3-0.6B")
    with pytest.raises(ValueError, match=r"train\.remat: offload is for GPUs and TPUs; on CPUs set full"):
        settle(train(remat="offload"), shape, None, make_mesh({"fsdp": 8}), 1024)


@pytest.mark.parametrize("kernel", ["splash", "triton", "cudnn"])
def test_kernels_of_other_devices_are_refused(kernel):
    shape = ModelConfig.from_hf(PUBLISHED["Qwen3-0.6B"][0], "Qwen3-0.6B")
    with pytest.raises(ValueError, match=rf"train\.attention: {kernel} does not run on a cpu; choose one of auto, bl"):
        settle(train(attention=kernel), shape, None, make_mesh({"fsdp": 8}), 1024)


def test_nothing_of_the_step_is_left_open():
    shape = ModelConfig.from_hf(PUBLISHED["Qwen3-0.6B"][0], "Qwen3-0.6B")
    found = settle(train(), shape, None, make_mesh({"fsdp": 8}), 1024)
    assert found.remat == "none" and found.compute_dtype in ("float32", "bfloat16") and found.micro_batches == 2
    assert settle(found, shape, None, make_mesh({"fsdp": 8}), 1024) == found


def test_determinism_is_an_option_of_gpus_alone():
    assert step_options("gpu", deterministic=True)["xla_gpu_deterministic_ops"] is True
    assert "xla_gpu_deterministic_ops" not in step_options("gpu")
    for platform in ("cpu", "tpu"):
        assert step_options(platform, deterministic=True) == step_options(platform, deterministic=False)


def test_a_layer_takes_no_more_rows_at_once_than_keep_the_device_busy():
    assert layer_parts_of("gpu", "full", 4, 8192, False) == layer_parts_of("tpu", "full", 4, 16384, False) == 4
    assert layer_parts_of("gpu", "full", 8, 4096, False) == 4
    assert layer_parts_of("gpu", "full", 6, 4096, False) == 3
    assert layer_parts_of("gpu", "full", 1, 65536, False) == layer_parts_of("gpu", "full", 8, 512, False) == 1
    for other in (("cpu", "full", 4, 8192, False), ("gpu", "dots", 4, 8192, False), ("gpu", "full", 4, 8192, True)):
        assert layer_parts_of(*other) == 1
