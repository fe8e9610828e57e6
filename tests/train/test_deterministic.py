"""A deterministic training asks the compiler for it wherever a number is computed that the training depends on."""

import jax
import pytest
from jax._src import compiler

from jaxdistill import cli
from jaxdistill.models import AttentionOptions, abstract_model
from jaxdistill.parallel import options
from tests.helpers import TINY, prepared_run
from tests.train.test_step import CONFIG

ASKED = ("xla_cpu_enable_fast_math", False)
"""An option that CPUs' compiler knows, in the place of GPUs'."""


@pytest.fixture
def compiled(monkeypatch):
    """Names of the programs that were compiled, and the options that each was given."""
    found, compile_one = [], compiler.compile_or_get_cached

    def record(backend, computation, devices, given, *more, **named):
        name = str(computation.operation.attributes["sym_name"]).strip('"')
        found.append((name, list(given.env_option_overrides)))
        return compile_one(backend, computation, devices, given, *more, **named)

    monkeypatch.setattr(compiler, "compile_or_get_cached", record)
    return found


@pytest.mark.parametrize("deterministic", [True, False])
def test_decoding_evaluation_and_references(tmp_path, monkeypatch, compiled, deterministic):
    monkeypatch.setitem(options.DETERMINISTIC, "cpu", dict([ASKED]))
    train = TINY["train"] | {
        "steps": 1,
        "deterministic": deterministic,
        "contrastive": {"form": "dpo", "beta": 0.5},
        "evaluate": {"every": 1, "rows": 5, "problems": 3, "max_tokens": 8},
    }
    config = prepared_run(
        tmp_path, data={"row_tokens": 256, "overlong": "drop", "pairs": {"edits": True}}, train=train
    )  # fmt: skip
    jax.clear_caches()  # or what other tests have compiled would not be compiled here
    compiled.clear()
    assert cli.main(["train", str(config)]) == 0
    asked = [ASKED] if deterministic else []
    for name, count in {"sums": 2, "_lay_out": 1, "_prefill": 1, "_insert": 1, "_chunk": 1}.items():
        given = [of for program, of in compiled if program == f"jit_{name}"]
        assert len(given) >= count, name
        assert all(of == asked for of in given), (name, given)


def test_gpus_alone_are_asked():
    model = abstract_model(CONFIG, attention=AttentionOptions(deterministic=True))
    assert model.compiler_options is None
    assert options.deterministic_options("tpu") is None
    # the step's, but for what makes it faster
    step = options.step_options("gpu", deterministic=True)
    assert options.deterministic_options("gpu") == {"xla_gpu_deterministic_ops": True}
    assert options.deterministic_options("gpu").items() <= step.items()
