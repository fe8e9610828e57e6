#!/usr/bin/env bash
# jax.checkpoint's "save the dots" policies save no product of a custom_vjp whose forward rule calls the custom_vjp function itself.
#
# The policy is asked about one custom_vjp_call and never sees the dot_general inside, so the backward pass computes each
# such product again, without a word. The same rule with the product written out is saved as the policy promises.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv env
env/bin/pip install --quiet --quiet jax==0.10.2 jaxlib==0.10.2

cat > program.py <<'PY'
import sys

import jax
import jax.numpy as jnp


def multiply(x, w):
    return x @ w


def with_own_gradient(forward_calls_itself):
    """The product with its usual gradient, as a custom_vjp."""
    product = jax.custom_vjp(multiply)
    inner = product if forward_calls_itself else multiply
    product.defvjp(
        lambda x, w: (inner(x, w), (x, w)),
        lambda kept, g: (g @ kept[1].T, kept[0].T @ g),
    )
    return product


def dots_in_the_gradient(product, policy):
    """dot_generals in the gradient of two products: 2 forward, 4 backward, and any computed again."""
    layers = jax.checkpoint(lambda x, w, v: jnp.sum(jnp.sin(product(jnp.sin(product(x, w)), v))), policy=policy)
    a = jnp.ones((8, 8))
    return str(jax.make_jaxpr(jax.grad(layers, argnums=(0, 1, 2)))(a, a, a)).count("dot_general")


print(f"jax {jax.__version__}")
policies = jax.checkpoint_policies
nothing = dots_in_the_gradient(multiply, policies.nothing_saveable)
print(f"plain product, nothing_saveable: {nothing} products in the gradient, the 2 forward ones computed again")
seen = {}
for name in ("dots_saveable", "dots_with_no_batch_dims_saveable"):
    policy = getattr(policies, name)
    seen[name] = [
        dots_in_the_gradient(product, policy)
        for product in (multiply, with_own_gradient(False), with_own_gradient(True))
    ]
    print(f"{name}: expected 6 products each way")
    for way, count in zip(("plain", "rule calls the inner product", "rule calls itself"), seen[name], strict=True):
        print(f"  {way + ':':<30}{count}")
if nothing != 8 or any(counts != [6, 6, 8] for counts in seen.values()):
    sys.exit("CHANGED: the counts are no longer 6, 6 and 8")
print("as described: where the rule calls itself, every forward product is computed again")
PY
JAX_PLATFORMS=cpu env/bin/python -I program.py
