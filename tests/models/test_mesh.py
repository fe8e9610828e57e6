"""Every family over FSDP x tensor x context on eight virtual devices equals the same model on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import abstract_model, load_hf, params_of, with_params
from jaxdistill.parallel.mesh import make_mesh
from tests.models import tiny

SHARE = 2e-5
"""Of the largest logit: fp32 sums in another order."""


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_logits_over_a_mesh_are_those_of_one_device(tmp_path, family):
    tiny.make(family, tmp_path, vocab_size=98)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 98, (4, 48)))
    segments = jnp.asarray(np.repeat([[1] * 20 + [2] * 22 + [0] * 6], 4, axis=0))
    positions = jnp.asarray(np.repeat([[*range(20), *range(22), *range(6)]], 4, axis=0))
    want = load_hf(tmp_path)(tokens, positions, segments)
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "context": 2})
    model = load_hf(tmp_path, mesh)
    gate = params_of(model)["layers"]["gate"]
    assert gate.addressable_shards[0].data.size * 8 == gate.size
    abstract = abstract_model(model.config, mesh=mesh)
    got = jax.jit(lambda p, *batch: with_params(abstract, p)(*batch))(params_of(model), tokens, positions, segments)
    np.testing.assert_allclose(got[:, :42], want[:, :42], atol=SHARE * float(jnp.abs(want).max()))
