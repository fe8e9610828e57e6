"""What libraries take beside XLA's buffers: the model of it, against what was resident on a GPU."""

import pytest

from jaxdistill.plan.hlo import parse
from jaxdistill.plan.targets import GIB
from jaxdistill.plan.workspaces import CUBLAS, attention_workspace, workspace_bytes

BACKWARD = """\
ENTRY %main (q: bf16[4,8192,16,128]) -> bf16[4,8192,16,128] {
  %q = bf16[4,8192,16,128]{3,2,1,0} parameter(0)
  %k = bf16[4,8192,KEYS,128]{3,2,1,0} parameter(1)
  %v = bf16[4,8192,KEYS,128]{3,2,1,0} parameter(2)
  %s = f32[SEQUENCES,16,8192]{2,1,0} parameter(3)
  %r = (bf16[4,16,8192,128]{3,1,2,0}, bf16[4,16,8192,128]{3,1,2,0}, bf16[4,16,8192,128]{3,1,2,0}, u8[RESERVED]{0}) custom-call(%q, %k, %v, %s, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %dq = bf16[4,16,8192,128]{3,1,2,0} get-tuple-element(%r), index=0
}
"""  # noqa: E501


def backward(sequences, keys=16, reserved=0):
    text = BACKWARD.replace("SEQUENCES", str(sequences)).replace("KEYS", str(keys)).replace("RESERVED", str(reserved))
    return workspace_bytes(parse(text)[0])


def test_packed_rows_are_a_sequence_for_every_segment():
    # dQ in fp32, and a sum for each query
    assert backward(4 * 32) == 128 * 16 * 8192 * (4 * 128 + 4)
    assert backward(4) == backward(4 * 32) / 32


def test_with_fewer_key_heads_gradients_are_made_for_every_query_head():
    assert backward(4, keys=8) == 4 * 16 * 8192 * (4 * 128 + 4 + 2 * 2 * 128)


def test_what_the_program_has_reserved_is_among_its_own_memory():
    assert backward(128, reserved=8657043456) == 0


def test_products_are_cublas_where_there_is_a_gpu():
    product = """\
ENTRY %main (a: bf16[8,8]) -> f32[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    assert workspace_bytes(parse(product)[0]) == CUBLAS
    assert workspace_bytes(parse(product.replace("dot(%a, %a)", "add(%a, %a)"))[0]) == 0


# peaks of training steps on an H200, jax 0.11.2, cuDNN 9.19, and what the compiler counts without a GPU, in GiB; rows
# of 8,192 tokens, packed for 32 segments each
MEASURED = {
    "Qwen3-0.6B, full": ((4 * 32, 16), 16.51, 23.62),
    "Qwen3-0.6B, attention": ((4 * 32, 16), 23.51, 31.04),
    "Qwen3-1.7B, full": ((4 * 32, 16), 38.15, 45.60),
    # its step alone, as the compiler on that GPU counted it: the process had more in use while the model was made
    "Qwen3-8B, LoRA, full": ((32, 32), 24.59, 27.8),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_resident_is_what_is_planned(name):
    (sequences, heads), compiler, resident = MEASURED[name]
    planned = compiler + attention_workspace(sequences, heads, heads, 8192, 128) / GIB
    assert 0.9 < planned / resident < 1.1
