"""In how many parts a step is taken where the config says nothing."""

import dataclasses

import pytest

from jaxdistill.config import ContrastiveConfig, OnPolicyConfig, build
from jaxdistill.train.parts import CPU_PART, micro_batches_of
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
