#!/usr/bin/env bash
# With bf16 parameters, optax.adam's second moment never decays at the default b2, for 0.999 rounds to 1 in bf16.
#
# The moment takes the parameters' dtype and so does the factor that it is multiplied with. A few large gradients early in
# training then keep a weight's step size down for ever. mu_dtype=float32 changes the first moment alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv env
env/bin/pip install --quiet --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2

cat > program.py <<'PY'
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import optax

QUIET = 3000  # steps whose gradient is zero, after ten whose gradient is one


def share_left(dtype, **options):
    """What is left of the second moment after the quiet steps, as a share of what it was before."""
    optimizer = optax.adam(1e-3, **options)
    params = jnp.ones((), dtype)

    def step(state, gradient):
        return optimizer.update(gradient, state, params)[1], None

    before, _ = jax.lax.scan(step, optimizer.init(params), jnp.ones(10, dtype))
    after, _ = jax.lax.scan(step, before, jnp.zeros(QUIET, dtype))
    moments = [optax.tree.get(state, "nu") for state in (before, after)]
    assert moments[0].dtype == dtype, moments
    return float(moments[1]) / float(moments[0])


print(f"optax {version('optax')}, jax {version('jax')}; bf16(0.999) = {float(jnp.bfloat16(0.999))}")
cases = {  # name: share seen, share expected
    "float32": (share_left(jnp.float32), 0.999**QUIET),
    "bfloat16": (share_left(jnp.bfloat16), 0.999**QUIET),
    "bfloat16, mu_dtype=float32": (share_left(jnp.bfloat16, mu_dtype=jnp.float32), 0.999**QUIET),
    "bfloat16, b2=0.95": (share_left(jnp.bfloat16, b2=0.95), 0.95**QUIET),
}
print(f"share of the second moment left after {QUIET} zero gradients:")
for name, (seen, expected) in cases.items():
    print(f"  {name + ':':<30}expected {expected:.4f}, seen {seen:.4f}")
seen = [share for share, _ in cases.values()]
if not (seen[0] < 0.06 and seen[1] == seen[2] == 1 and seen[3] < 0.06):
    sys.exit("CHANGED: the bf16 moment decays, or the others no longer do")
print("as described: in bf16 the second moment stands still at the default b2")
PY
JAX_PLATFORMS=cpu env/bin/python -I program.py
