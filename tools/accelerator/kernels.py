"""Attention by number of segments, and the losses over a large vocabulary, beside whole logits and Liger's kernels."""

from __future__ import annotations

from typing import Any

from accelerator.common import ROW_TOKENS, free_device, packed_rows, say, short, timed

SEGMENT_COUNTS = (0, 6, 31, 40, 100)
"""0: a whole row, without segment ids."""
OF_PLATFORM = {"gpu": ("triton", "cudnn", "blocks"), "tpu": ("splash", "blocks"), "cpu": ("dense", "blocks")}


def attention(tiny: bool) -> None:
    """One layer, forward and backward, by each kernel of this platform; errors are against fp32 at full precision."""
    import jax
    import jax.numpy as jnp

    from jaxdistill.models.attention import attention as attend
    from jaxdistill.models.attention import platform_of

    T, H, K, D = (256, 4, 2, 32) if tiny else (ROW_TOKENS, 16, 8, 128)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (H, K, K, H)
    q, k, v, g = (jax.random.normal(key, (1, T, n, D), jnp.float32) for key, n in zip(keys, heads, strict=True))

    def gradients(kernel: str, ids: Any, real: Any, dtype: Any) -> Any:
        def loss(q, k, v):
            out = attend(q, k, v, ids, scale=D**-0.5, dtype=dtype, kernel=kernel).reshape(1, T, H, D)
            out = jnp.where(real, out.astype(jnp.float32), 0)
            return jnp.sum(out * g), out

        return jax.jit(lambda *a: jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*a))

    for count in SEGMENT_COUNTS[:2] if tiny else SEGMENT_COUNTS:
        ids = jnp.asarray(packed_rows(1, T, 8, count)["segment_ids"]) if count else None
        real = True if ids is None else (ids > 0)[:, :, None, None]
        exact = None
        for kernel in OF_PLATFORM[platform_of(None)]:
            what = f"{kernel}, {count or 'no'} segments"
            try:
                if exact is None:
                    with jax.default_matmul_precision("highest"):
                        exact = gradients("blocks", ids, real, jnp.float32)(q, k, v)
                inputs = [x.astype(jnp.bfloat16) for x in (q, k, v)]
                f = gradients(kernel, ids, real, jnp.bfloat16)
                found = f(*inputs)
                pairs = zip(jax.tree.leaves(found)[1:], jax.tree.leaves(exact)[1:], strict=True)
                worst = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)
                ms = 1e3 * timed(lambda f=f, inputs=inputs: jax.block_until_ready(f(*inputs)))
                say(name=what, ms=ms, error_of_fp32=worst)
            except Exception as error:  # another kernel may work
                say(name=what, failed=short(error))


def losses(which: str, tiny: bool) -> None:
    """`ce`, or a divergence's name: ours, and by whole logits; both with gradients of hidden states and projection."""
    import jax
    import jax.numpy as jnp

    from jaxdistill.losses import chunked_cross_entropy, chunked_distillation

    N, E, F, V = (128, 32, 48, 500) if tiny else (8192, 2048, 4096, 151936)
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, taught = (jax.random.normal(keys[i], (1, N, n)).astype(jnp.bfloat16) for i, n in enumerate((E, F)))
    W = jax.random.normal(keys[2], (V, E)) * E**-0.5
    teacher = (jax.random.normal(keys[3], (V, F)) * F**-0.5).astype(jnp.bfloat16)
    targets, weights = jax.random.randint(keys[4], (1, N), 0, V), jnp.ones((1, N))

    def logits(x: Any, w: Any) -> Any:
        sides = (((2,), (1,)), ((), ()))
        return jax.lax.dot_general(x, w.astype(jnp.bfloat16), sides, preferred_element_type=jnp.float32)

    def chunked(h: Any, W: Any) -> Any:
        if which == "ce":
            return chunked_cross_entropy(h, W, targets, weights, dtype="bfloat16")[0]
        return chunked_distillation(h, W, taught, teacher, weights, divergence=which, dtype="bfloat16")[0]

    def whole(h: Any, W: Any) -> Any:
        z = logits(h, W)
        if which == "ce":
            return jnp.sum(jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, targets[..., None], -1)[..., 0])
        p, q = jax.nn.log_softmax(z, -1), jax.nn.log_softmax(logits(taught, teacher), -1)
        return jnp.sum(jnp.exp(q) * (q - p))

    for name, f in (("ours", chunked), ("whole logits", whole)):
        try:
            compiled = jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(hidden, W).compile()
            value = float(compiled(hidden, W)[0])
            ms = 1e3 * timed(lambda c=compiled: jax.block_until_ready(c(hidden, W)))
            temporary = compiled.memory_analysis().temp_size_in_bytes / 2**30
            say(name=f"{which}, {name}", ms=ms, peak_gib=temporary, loss=value / N, note="memory is of temporaries")
        except Exception as error:
            say(name=f"{which}, {name}", failed=short(error))


def liger(which: str, tiny: bool) -> None:
    """Liger's fused losses at the same sizes: `ce`, or `forward_kl` as its JSD with beta 0."""
    import torch

    if free_device() == "cpu":
        say(name=f"{which}, Liger", failed="Liger's kernels need CUDA")
        return
    N, E, F, V = (128, 32, 48, 500) if tiny else (8192, 2048, 4096, 151936)
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(N, E, **options, requires_grad=True)
    W = (torch.randn(V, E, **options) * E**-0.5).requires_grad_()
    targets = torch.randint(0, V, (N,), device="cuda")
    if which == "ce":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused, arguments = LigerFusedLinearCrossEntropyLoss(reduction="sum"), (W, hidden, targets)
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        taught, teacher = torch.randn(N, F, **options), torch.randn(V, F, **options) * F**-0.5
        fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
        arguments = (hidden, W, taught, teacher, targets)
    before = torch.cuda.memory_allocated()

    def step() -> None:
        found = fused(*arguments)
        (found[0] if isinstance(found, tuple) else found).backward()
        hidden.grad = W.grad = None
        torch.cuda.synchronize()

    ms = 1e3 * timed(step)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    say(name=f"{which}, Liger", ms=ms, peak_gib=peak, note="memory is what was allocated beside the inputs")
