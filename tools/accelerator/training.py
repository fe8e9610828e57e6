"""Training: the package's own step on packed rows, and Hugging Face's with Liger's kernels on the same tokens."""

from __future__ import annotations

import functools
import importlib.util
import time
from typing import Any

from accelerator.common import (
    GIB,
    ROW_TOKENS,
    SEGMENTS,
    TINY_TOKENS,
    free_device,
    packed_rows,
    peak_of,
    say,
    shape_of,
    timed,
)


def ours(name: str, rows: int, remat: str, base: str | None, tiny: bool) -> None:
    """
    Args:
      base: dtype of the frozen model that adapters of rank 16 are trained on; None: all parameters are trained.
    """
    import jax

    from jaxdistill.train.flops import FlopCounter, mfu

    made, state, frozen, batch = prepared(name, rows, remat, base, tiny)
    device = jax.devices()[0]
    before = _peak_gib(device)
    begun = time.perf_counter()
    compiled = made.step.lower(state, batch, frozen, None).compile()
    compile_s = time.perf_counter() - begun
    found: dict[str, float] = {}
    held = [state]
    del state

    def step() -> None:
        held[0], metrics = compiled(held[0], batch, frozen, None)
        found.update({k: float(metrics[k]) for k in ("loss", "tokens", "pairs")})  # which waits for the device

    seconds = timed(step)
    flops = FlopCounter(made.student, made.lora).of(found["tokens"], found["pairs"])
    after = _peak_gib(device)
    say(
        ms=1e3 * seconds, tokens_per_second=found["tokens"] / seconds, compile_s=compile_s, loss=found["loss"],
        mfu=mfu(flops, seconds, peak_of(device.device_kind), 1), peak_gib=after, before_gib=before,
        planned_gib=planned_gib(compiled, device.platform),
        note=None if before is None or after > before else "the peak is that of what ran before the step",
    )  # fmt: skip


def planned_gib(compiled: Any, platform: str) -> float:
    """What `plan` says of a program that was compiled here: XLA's buffers, and what libraries take beside them."""
    from jaxdistill.plan.hlo import parse
    from jaxdistill.plan.worker import compiler_peak
    from jaxdistill.plan.workspaces import workspace_bytes

    libraries = 0.0 if platform in ("cpu", "tpu") else workspace_bytes(parse(compiled.as_text())[0])
    return (compiler_peak(compiled.memory_analysis(), platform) + libraries) / GIB


def prepared(
    name: str, rows: int, remat: str, base: str | None, tiny: bool, deterministic: bool = False
) -> tuple[Any, Any, Any, Any]:
    """(program, state, frozen parameters, batch) on the first device, made array by array, far below a step's peak."""
    import jax

    from jaxdistill.config import TrainConfig
    from jaxdistill.config.train import OptimizerConfig
    from jaxdistill.models import Lora, ModelConfig
    from jaxdistill.parallel.mesh import make_mesh
    from jaxdistill.train.program import abstract_inputs, make_program

    tokens = TINY_TOKENS if tiny else ROW_TOKENS
    config = ModelConfig.from_hf(shape_of(name, tiny), name)
    train = TrainConfig(
        batch_rows=rows, steps=100, micro_batches=1, remat=remat, compute_dtype="bfloat16", deterministic=deterministic,
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-5),
    )  # fmt: skip
    lora = None if base is None else Lora.of(16, 32.0)
    mesh = make_mesh({}, jax.devices()[:1])
    made = make_program(train, config, lora, mesh, row_tokens=tokens, steps=100, seed=0)
    state, batch, frozen, _ = abstract_inputs(made, base or "float32")
    source = packed_rows(rows, tokens, config.vocab_size, SEGMENTS)
    batch = {k: jax.device_put(source[k].astype(x.dtype), x.sharding) for k, x in batch.items()}
    filled = {k: random_like(v) if k == "params" else jax.tree.map(zeros_like, v) for k, v in state.items()}
    return made, filled, random_like(frozen), batch


def zeros_like(x: Any) -> Any:
    return _maker("zeros", x.shape, x.dtype, x.sharding)(0)


def random_like(tree: Any) -> Any:
    """Weights as of a model that was just made: norms 1, biases 0, matrices normal."""
    import jax

    def leaf(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path)
        what = "ones" if "norm" in name else "zeros" if "bias" in name or "lora_b" in name else "normal"
        return _maker(what, x.shape, x.dtype, x.sharding)(sum(map(ord, name)))

    return jax.tree.map_with_path(leaf, tree)


@functools.cache
def _maker(what: str, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """A compiled function of a seed; arrays of one shape share it."""
    import jax
    import jax.numpy as jnp

    makers = {
        "zeros": lambda seed: jnp.zeros(shape, dtype),
        "ones": lambda seed: jnp.ones(shape, dtype),
        "normal": lambda seed: 0.02 * jax.random.normal(jax.random.key(seed), shape, dtype),
    }
    return jax.jit(makers[what], out_shardings=sharding)


def _peak_gib(device: Any) -> float | None:
    stats = device.memory_stats() or {}
    return stats["peak_bytes_in_use"] / GIB if "peak_bytes_in_use" in stats else None


def hugging_face(name: str, rows: int, tiny: bool) -> None:
    """Qwen3 by transformers, bf16 over fp32 weights, checkpointed, with Liger's kernels where they are installed.

    Every row is one segment to it, for which its attention has the fastest kernel: it computes more pairs, and its MFU
    counts them.
    """
    import torch
    import transformers

    where = free_device()
    liger = where == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3()
    tokens = TINY_TOKENS if tiny else ROW_TOKENS
    config = transformers.Qwen3Config(**shape_of(name, tiny), attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(where):
        model = transformers.Qwen3ForCausalLM(config)
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=where == "cuda")
    source = packed_rows(rows, tokens, config.vocab_size, SEGMENTS)
    ids = torch.tensor(source["tokens"], dtype=torch.long, device=where)
    labels = torch.where(torch.tensor(source["regions"] > 0, device=where), ids, -100)

    def step() -> None:
        with torch.autocast(where, torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found["loss"] = loss.item()  # which waits for the device

    found: dict[str, float] = {}
    seconds = timed(step)
    c, layers = config, config.num_hidden_layers
    pairs = layers * rows * tokens * (tokens + 1) / 2
    tied = c.tie_word_embeddings  # then the embedding is the projection
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and (tied or "embed" not in n))
    flops = 6 * weights * rows * tokens + 12 * c.num_attention_heads * c.head_dim * pairs
    peak = peak_of(torch.cuda.get_device_name()) if where == "cuda" else None
    say(
        ms=1e3 * seconds, tokens_per_second=rows * tokens / seconds, loss=found["loss"],
        mfu=None if peak is None else flops / seconds / peak,
        peak_gib=torch.cuda.max_memory_allocated() / GIB if where == "cuda" else None,
        note="Liger's kernels" if liger else "plain: liger_kernel is missing, or there is no CUDA",
    )  # fmt: skip
