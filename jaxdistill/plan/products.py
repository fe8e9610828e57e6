"""FLOPs of matrix products, in all the forms that compilers give them: dots, convolutions, library calls, kernels."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping

from jaxdistill.plan.hlo import Op, dims

MATRIX_CALLS = ("__cublas$gemm", "__cublas$lt$matmul", "__onednn$matmul")


def dot_flops(op: Op, ops: Mapping[str, Op]) -> float:
    lhs = dims(ops[op.operands[0]].type)
    contracted = [int(n) for n in (op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",") if n]
    return 2.0 * math.prod(dims(op.type)) * math.prod(lhs[i] for i in contracted)


def convolution_flops(op: Op, ops: Mapping[str, Op]) -> float:
    """TPUs write matrix products as convolutions; taps that fall outside of the input are no work."""
    labels = op.attribute(r"dim_labels=(\S+?),?(?:\s|$)") or ""
    left, right, out = re.split(r"_|->", labels)
    lhs, rhs, result = dims(ops[op.operands[0]].type), dims(ops[op.operands[1]].type), dims(op.type)
    window = op.attribute(r"window=\{([^}]*)\}") or ""
    spatial = sorted(c for c in left if c.isdigit())

    def per_axis(key: str, default: str) -> list[str]:
        found = re.search(rf"\b{key}=(\S+)", window)
        return found.group(1).split("x") if found else [default] * len(spatial)

    taps = 1
    columns = zip(*(per_axis(k, d) for k, d in (
        ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))), strict=True)  # fmt: skip
    for axis, (stride, pad, lhs_dilate, rhs_dilate) in zip(spatial, columns, strict=True):
        taps *= _taps(
            lhs[left.index(axis)], rhs[right.index(axis)], result[out.index(axis)],
            int(stride), int(pad.split("_")[0]), int(lhs_dilate), int(rhs_dilate),
        )  # fmt: skip
    groups = int(op.attribute(r"batch_group_count=(\d+)") or 1)
    batch, features = lhs[left.index("b")] // groups, result[out.index("f")]
    return 2.0 * batch * features * rhs[right.index("i")] * taps


@functools.cache
def _taps(size: int, window: int, results: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of (result, tap) that hit an element of the input."""
    reach, count = (size - 1) * lhs_dilate, 0
    for tap in range(window):
        offset = tap * rhs_dilate - pad
        # results r with 0 <= r * stride + offset <= reach
        first, last = max(0, -(offset // stride)), min(results - 1, (reach - offset) // stride)
        if lhs_dilate == 1:
            count += max(0, last - first + 1)
        else:
            count += sum((r * stride + offset) % lhs_dilate == 0 for r in range(first, last + 1))
    return count


def matrix_call_flops(op: Op, ops: Mapping[str, Op]) -> float:
    """A library's matrix product; its contraction is in the backend's config."""
    lhs = dims(ops[op.operands[0]].type)
    found = op.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    contracted = [int(n) for n in re.findall(r"\d+", found)] if found else [len(lhs) - 1]
    return 2.0 * math.prod(dims(op.type)) * math.prod(lhs[i] for i in contracted)


# how many products of queries with keys (2 * H * T * T * D FLOPs each) a kernel does
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
_CUDNN = {"cudnn_forward": 2, "cudnn_backward": 5}
_TRITON = {"attention_forward": 2, "attention_keys": 4, "attention_queries": 3}
KERNEL_NAMES = (*_SPLASH, *_CUDNN, *_TRITON)

FORWARD = ("splash_mha_fwd", "cudnn_forward", "attention_forward")


def attention_kernel(op: Op, target: str) -> tuple[str, int] | None:
    """(name, products of queries with keys) of a call of an attention kernel; None for other calls."""
    if target == "tpu_custom_call":
        for name, products in _SPLASH.items():
            if name in op.name or name in op.scope:
                return name, products
        return None
    if target.startswith("__cudnn$fmha"):
        name = "cudnn_backward" if "Backward" in target else "cudnn_forward"
        return name, _CUDNN[name]
    if "triton" in target:
        # what Pallas calls a kernel: its own name comes after the code that it is made of
        called = re.findall(r'\bname = "([^"]*)"', op.rest)
        if called and called[-1] in _TRITON:
            return called[-1], _TRITON[called[-1]]
    return None


def forward_kernels(kernels: Mapping[str, float]) -> float:
    """How many forward attention kernels are among the calls of a step."""
    return sum(count for name, count in kernels.items() if name in FORWARD)


def attention_flops(name: str, op: Op, ops: Mapping[str, Op]) -> float:
    """FLOPs of one product of queries with all keys that they may see, in blocks of 512."""
    arrays = [dims(ops[o].type) for o in op.operands if o in ops and ops[o].type.startswith(("bf16", "f16"))]
    shape = max((a for a in arrays if len(a) >= 3), key=math.prod)
    if not name.startswith("splash"):  # [B, T, H, D]
        tokens, rest = shape[1], shape[0] * shape[2] * shape[3]
    else:  # [(B,) H, T, D]
        tokens, rest = shape[-2], math.prod(shape[:-2]) * shape[-1]
    blocks = max(1, tokens // 512)
    return 2.0 * rest * tokens * tokens * (blocks + 1) / (2 * blocks)
