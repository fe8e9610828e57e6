"""Losses on a mesh: as on one device, without gathering the vocabulary or the batch."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdistill.losses import (
    Layout,
    chunked_cross_entropy,
    chunked_distillation,
    sorted_distillation,
    topk_distillation,
)
from jaxdistill.parallel.mesh import RULES, make_mesh

B, T, E, V, K = 8, 6, 16, 48, 5
MESHES = [{"tensor": 2, "data": 2, "fsdp": 2}, {"tensor": 4, "fsdp": 2}, {"tensor": 8}, {"fsdp": 4, "context": 2}]


def case():
    rng = np.random.default_rng(0)
    # rows of very different numbers of trained tokens: the devices' loops are not equally long
    weights = (rng.random((B, T)) < np.linspace(0, 1, B)[:, None]).astype(np.float32)
    targets = rng.integers(0, 45, (B, T)).astype(np.int32)
    hiddens = [rng.normal(0, 1, (B, T, E)).astype(np.float32) for _ in range(2)]
    # the teacher has fewer padded columns: no column lies on the device where the student has it
    projections = [rng.normal(0, 1, (columns, E)).astype(np.float32) for columns in (V, 46)]
    logprobs = rng.normal(-2, 0.3, (B, T, K)).astype(np.float32) - 1
    ids = np.stack([rng.permutation(45)[:K] for _ in range(B * T)]).reshape(B, T, K).astype(np.int32)
    hiddens, projections = [jnp.asarray(x) for x in hiddens], [jnp.asarray(x) for x in projections]
    return hiddens, projections, *map(jnp.asarray, (targets, weights, ids, logprobs))


def losses(layout):
    """Every loss as a function of the student's hidden states and projection: (sum, (count, metrics))."""
    hiddens, projections, targets, weights, ids, logprobs = case()
    shared = {"vocabulary": 45, "chunk": 4, "layout": layout}

    def both(f):
        return lambda h, w: (lambda total, count, metrics: (total, (count, metrics)))(*f(h, w))

    found = {
        "ce": lambda h, w: chunked_cross_entropy(
            h, w, targets, weights, z_loss=0.1, label_smoothing=0.1, softcap=9.0, **shared
        ),
        "topk": lambda h, w: topk_distillation(h, w, ids, logprobs, None, weights, targets=targets, **shared),
    }
    highest = -jnp.sort(-logprobs, axis=-1)
    tail = 1 - jnp.sum(jnp.exp(highest), axis=-1)
    found["sorted"] = lambda h, w: sorted_distillation(h, w, highest, tail, weights, **shared)
    found["adaptive_kl"] = lambda h, w: chunked_distillation(
        h,
        w,
        hiddens[1],
        projections[1],
        weights,
        divergence="adaptive_kl",
        targets=targets,
        ce_weights=weights,
        **shared,
    )
    return {name: both(f) for name, f in found.items()}


@functools.cache
def on_one_device():
    hiddens, projections, *_ = case()
    return {
        name: jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hiddens[0], projections[0])
        for name, f in losses(None).items()
    }


def placed(mesh, columns=V):
    hiddens, projections, *_ = case()
    specs = PartitionSpec(("data", "fsdp"), "context", None), PartitionSpec("tensor", ("fsdp", "context"))
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((hiddens[0], projections[0]), specs, strict=True)]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_eight_devices_are_as_one(shape):
    mesh = make_mesh(shape)
    arrays = placed(mesh)
    for name, f in losses(Layout(mesh)).items():
        found = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(*arrays)
        want = on_one_device()[name]
        close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5, err_msg=name)
        jax.tree.map(close, found, want)
        assert [g.sharding.is_equivalent_to(x.sharding, x.ndim) for g, x in zip(found[1], arrays, strict=True)] == [
            True, True,
        ]  # fmt: skip


def test_a_width_that_the_mesh_does_not_divide_is_padded_inside():
    hiddens, projections, targets, weights, *_ = case()

    def loss(h, w, layout):
        return chunked_cross_entropy(h, w, targets, weights, chunk=4, layout=layout)[0]

    given = jnp.asarray(hiddens[0]), jnp.asarray(projections[0][:45])
    layout = Layout(make_mesh({"tensor": 8}))
    want = jax.value_and_grad(loss, argnums=(0, 1))(*given, None)
    found = jax.jit(jax.value_and_grad(lambda h, w: loss(h, w, layout), argnums=(0, 1)))(*given)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, want)


def test_neither_vocabulary_nor_batch_is_gathered():
    mesh = make_mesh({"tensor": 4, "fsdp": 2})
    f = losses(Layout(mesh))["ce"]
    text = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True)).lower(*placed(mesh)).compile().as_text()
    gathered = [
        tuple(int(n) for n in shape.split(",") if n)
        for shape in re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    ]
    # the projection's columns of one device at full width, as FSDP gathers weights; nothing else
    assert gathered
    assert all(np.prod(shape) <= V // 4 * E for shape in gathered), gathered
    # no array of any kind has the whole vocabulary beside all of a device's tokens
    assert not re.search(rf"\[{B // 2 * T},{V}\]|\[{B},{T},{V}\]", text)


def test_a_mesh_that_does_not_divide_the_batch_is_an_error():
    hiddens, projections, targets, weights, *_ = case()
    with pytest.raises(ValueError, match=r"student hidden states \(3, 6, 16\).*does not divide over"):
        chunked_cross_entropy(
            *map(jnp.asarray, (hiddens[0][:3], projections[0], targets[:3], weights[:3])),
            layout=Layout(make_mesh({"fsdp": 8})),
        )


def test_the_layout_is_that_of_the_sharding_rules():
    layout = Layout(make_mesh({"fsdp": 8}))
    want = (RULES["batch"], RULES["sequence"], RULES["vocab"], RULES["embed"])
    assert (layout.rows, layout.positions, layout.columns, layout.embed) == want


def test_tokens_in_one_line_have_the_gradient_of_one_device():
    """Their devices along `context` see the same tokens, and each keeps its part of the projection's gradient."""
    hiddens, projections, targets, weights, *_ = case()

    def loss(h, w, layout):
        flat = jnp.reshape(h, (-1, E)), jnp.reshape(targets, -1), jnp.reshape(weights, -1)
        return chunked_cross_entropy(flat[0], w, *flat[1:], chunk=4, layout=layout)[0]

    given = jnp.asarray(hiddens[0]), jnp.asarray(projections[0])
    want = jax.value_and_grad(loss, argnums=(0, 1))(*given, None)
    layout = Layout(make_mesh({"fsdp": 2, "context": 2, "tensor": 2}))
    found = jax.jit(jax.value_and_grad(lambda h, w: loss(h, w, layout), argnums=(0, 1)))(*given)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, want)
