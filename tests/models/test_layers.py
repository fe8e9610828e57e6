"""The matrix product of all layers against float64, as one device computes it and as several do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models.layers import matmul


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_and_its_gradients_are_those_of_rounded_inputs(monkeypatch, devices, dtype):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 7, 5), (5, 11), (3, 7, 11)))
    out, backward = jax.vjp(jax.jit(lambda x, w: matmul(x, w, dtype)), x, w)
    dx, dw = backward(jnp.asarray(g))
    x, w, g = (np.asarray(jnp.asarray(a).astype(dtype), np.float64) for a in (x, w, g))
    np.testing.assert_allclose(out, x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    # several devices on a CPU keep this one's inputs in fp32
    rounding = 2**-7 if dtype == "bfloat16" and devices > 1 else 1e-5
    np.testing.assert_allclose(dw, np.einsum("bte,btf->ef", x, g), rtol=1e-5, atol=rounding * np.sqrt(21))
