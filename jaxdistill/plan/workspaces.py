"""Scratch memory that libraries take beside a program's own buffers, on GPUs.

A program that was compiled on its GPU reserves it in results of type u8; one that was compiled without a GPU does not
know its size, and writes u8[0]. It is worked out here from the shapes of the calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from jaxdistill.plan.hlo import Computations, Op, dims
from jaxdistill.plan.products import MATRIX_CALLS

CUBLAS = 32 << 20
"""What XLA gives cuBLAS on Hopper and later, and what cuBLAS itself asks for there (`cublasSetWorkspace`)."""


def workspace_bytes(computations: Computations) -> float:
    """The most that one library call of a program needs beside what the program has reserved for it.

    Calls follow each other, so their workspaces share memory; XLA's own kernels (Triton) take none.
    """
    found = [call_workspace(op, ops) for ops in computations.values() for op in ops.values()]
    return max(found, default=0.0)


def call_workspace(op: Op, ops: Mapping[str, Op]) -> float:
    """Bytes that a call needs and the program has not reserved; 0 for everything but library calls.

    cuDNN's backward attention sums dQ in fp32, in its own layout [sequences, heads, tokens, head size], beside a sum
    per query (cudnn-frontend, `CompositeSDPABackwardNode`). A packed row is one sequence for each segment that the call
    is set up for, each as long as the row: the softmax statistics, one of the operands, have that shape. With fewer key
    heads than query heads, dK and dV are made for every query head first, in the operands' own type.
    """
    if op.opcode == "dot" or (op.opcode == "custom-call" and _target(op) in MATRIX_CALLS):
        # without a GPU matrix products stay as they are: on one they are cuBLAS's
        return 0.0 if _reserved(op) else float(CUBLAS)
    if op.opcode != "custom-call" or not _target(op).startswith("__cudnn$fmha"):
        return 0.0
    if _reserved(op) or "Backward" not in _target(op):
        return 0.0
    return attention_workspace(*backward_shape(op, ops))


def backward_shape(op: Op, ops: Mapping[str, Op]) -> tuple[int, int, int, int, int]:
    """(sequences, heads, key heads, tokens, head size) that cuDNN works with in a backward call."""
    operands = [ops[name].type for name in op.operands if name in ops]
    statistics = next(dims(kind) for kind in operands if kind.startswith("f32[") and len(dims(kind)) == 3)
    query, key = dims(operands[0]), dims(operands[1])  # [B, T, H, D]
    sequences, heads, tokens = statistics
    return sequences, heads, key[2], tokens, query[3]


def attention_workspace(sequences: int, heads: int, key_heads: int, tokens: int, head_size: int) -> float:
    """Bytes of the fp32 dQ, of the sums, and of dK and dV by query heads, for 16-bit operands."""
    queries = float(sequences * heads * tokens)
    grouped = 2 * 2 * head_size if key_heads != heads else 0
    return queries * (4 * head_size + 4 + grouped)


def _target(op: Op) -> str:
    return op.attribute(r'custom_call_target="([^"]+)"') or ""


def _reserved(op: Op) -> bool:
    return any(int(size) for size in re.findall(r"\bu8\[(\d+)\]", op.type))
