"""The plan for CPU devices against what really happens on them."""

import os

import pytest

from jaxdistill.config import build
from jaxdistill.plan.measured import measure
from jaxdistill.plan.planning import make_plan
from jaxdistill.plan.request import make_job, parse_mesh
from jaxdistill.plan.targets import Topology


@pytest.mark.slow
@pytest.mark.skipif("JAXDISTILL_LONG" not in os.environ, reason="a minute alone on the machine: set JAXDISTILL_LONG=1")
@pytest.mark.parametrize(
    ("mesh", "row_tokens", "train"),
    [
        # rows so long that attention goes block by block, in loops whose length only the data says
        ("fsdp=4,tensor=2", 1536, {"batch_rows": 8, "micro_batches": 2, "remat": "full"}),
    ],
)
def test_memory_and_flops_are_as_planned(tmp_path, mesh, row_tokens, train):
    config = build(
        {
            "name": "p",
            "run_dir": str(tmp_path),
            "problems": {"source": "demo", "count": 8},
            "traces": {"engine": "vllm", "teacher": "demo", "max_tokens": 96},
            "data": {"row_tokens": row_tokens},
            "student": {
                "tokenizer": "train",
                "tokenizer_vocab": 8192,
                "architecture": {
                    "hidden_size": 128,
                    "intermediate_size": 256,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 32,
                    "max_position_embeddings": 2048,
                },
            },
            "train": {"steps": 5, "optimizer": {"learning_rate": 1e-3}} | train,
        }
    )
    topology = Topology.of("cpu:8")
    job = make_job(config, topology, mesh=parse_mesh(mesh))
    found, really = make_plan(job, topology).found, measure(job)
    assert 8 * found.flops == pytest.approx(really.flops, rel=0.01)
    assert found.flops == pytest.approx(found.analytic_flops, rel=0.01)
    assert 8 * found.peak_bytes == pytest.approx(really.bytes, rel=0.1)
    assert not found.unknown_loops
    assert really.loss > 0
