"""Checkpoints into sharded arrays: the same numbers on every mesh, little memory beside them, broken ones named."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdistill.models import ModelConfig, init_model, load, load_hf, params_of, tensor_files
from jaxdistill.models.tensor_files import Tensor, open_tensors, read_header
from jaxdistill.parallel.mesh import RULES, make_mesh
from tests.models import tiny

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A Qwen3 checkpoint in one file, which no test changes."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.make("qwen3", folder, **SHAPE)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy in three files with an index, to be broken."""
    tensors = load_file(whole / "model.safetensors")
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        weight_map |= dict.fromkeys(names[number::3], file)
        save_file({name: tensors[name] for name in names[number::3]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def leaves(model):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params_of(model))}


def same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[name], err_msg=name)


# ------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "tensor": 2}])
def test_every_mesh_holds_the_same_numbers(folder, whole, shape):
    mesh = make_mesh(shape)
    model = load_hf(folder, mesh)
    same(model, load_hf(whole))
    wanted = jax.tree.leaves(load.param_shardings(model.config, mesh))
    for leaf, sharding in zip(jax.tree.leaves(params_of(model)), wanted, strict=True):
        assert leaf.sharding == sharding


def test_layers_may_be_split_over_devices_too(whole):
    mesh = make_mesh({"data": 3}, jax.devices()[:3])
    model = load_hf(whole, mesh, RULES | {"layers": "data"})
    assert model.layers.q[...].sharding.spec[0] == "data"
    same(model, load_hf(whole))


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_stored_and_parameter_dtypes(whole, tmp_path, stored, param_dtype):
    tensors = {name: value.astype(stored) for name, value in load_file(whole / "model.safetensors").items()}
    # the smallest numbers of each format: subnormal, where hardware likes to round to 0
    tiniest = np.array([ml_dtypes.finfo(stored).smallest_subnormal, -0.0, ml_dtypes.finfo(stored).max], stored)
    tensors["model.layers.1.self_attn.q_proj.weight"][0, :3] = tiniest
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    model = load_hf(tmp_path, param_dtype=param_dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params_of(model))} == {param_dtype}
    want = tensors["model.layers.1.self_attn.q_proj.weight"].astype(param_dtype)
    got = np.asarray(model.layers.q[...][1]).T
    bits = np.uint32 if param_dtype == "float32" else np.uint16
    np.testing.assert_array_equal(np.ascontiguousarray(got).view(bits), want.view(bits))


def test_another_parameter_dtype_is_refused(whole):
    with pytest.raises(ValueError, match="param_dtype is 'float16'; choose one of float32, bfloat16, int8, nf4"):
        load_hf(whole, param_dtype="float16")


def test_a_tied_checkpoint_may_repeat_the_embedding_and_hold_rotary_frequencies(tmp_path):
    tiny.make("llama", tmp_path, tie=True)
    expected = load_hf(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    same(load_hf(tmp_path), expected)


# -------------------------------------------------------------------------------------------------- the memory


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 2, "data": 4}])
def test_every_byte_is_read_once_however_many_devices_hold_it(whole, shape, monkeypatch):
    read, largest = [], max(value.nbytes for value in load_file(whole / "model.safetensors").values())
    real = Tensor.read

    def counted(self, index=None):
        found = real(self, index)
        read.append((self.name, found.nbytes))
        return found

    monkeypatch.setattr(Tensor, "read", counted)
    load_hf(whole, make_mesh(shape))
    names = [name for name, _ in read]
    assert len(names) == len(set(names))
    assert sum(size for _, size in read) == sum(v.nbytes for v in load_file(whole / "model.safetensors").values())
    assert max(size for _, size in read) <= largest  # never a stacked parameter


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_is_put_in_place_without_a_copy_of_the_others(transposed):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    array = jax.ShapeDtypeStruct((64, 128, 256), np.float32, sharding=where)
    tensor = jax.ShapeDtypeStruct((256, 128) if transposed else (128, 256), ml_dtypes.bfloat16, sharding=where)
    memory = load._put_into(where, True, transposed).lower(array, tensor, 0).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 64 * 128 * 256 * 4  # the result is the array that came in
    assert memory.temp_size_in_bytes <= 128 * 256 * 4


def test_parts_are_what_numpy_would_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK", 100)  # several reads for some columns of a few rows
    random = np.random.default_rng(0)
    arrays = {
        "m": random.random((13, 7), np.float32),
        "v": random.random(9, np.float32),
        "s": np.array(3, np.float32),
    }
    save_file(arrays | {"empty": np.zeros((0, 4), np.float32)}, tmp_path / "a.safetensors")
    found = open_tensors(tmp_path)
    for rows in (slice(None), slice(2, 9), slice(12, 13), slice(5, 5)):
        for columns in (slice(None), slice(0, 3), slice(4, 7)):
            np.testing.assert_array_equal(found["m"].read((rows, columns)), arrays["m"][rows, columns])
        np.testing.assert_array_equal(found["v"].read((rows,)), arrays["v"][rows])
    assert found["s"].read() == 3
    assert found["empty"].read().shape == (0, 4)


# ------------------------------------------------------------------------------------------------- what is broken


def one_line(call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def change(folder, file, **changes):
    """Adds or replaces tensors of a file."""
    save_file(load_file(folder / file) | changes, folder / file)


def test_a_missing_tensor(folder, whole):
    tensors = load_file(whole / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    assert "tensor model.layers.1.mlp.up_proj.weight is missing (2 of 36 are)" in one_line(load_hf, folder)


def test_a_tensor_too_many(folder):
    change(folder, "model-00002-of-00003.safetensors", **{"model.layers.9.mlp.up_proj.weight": np.ones(2, np.float32)})
    message = one_line(load_hf, folder)
    assert "model-00002-of-00003.safetensors: tensor model.layers.9.mlp.up_proj.weight" in message
    assert "qwen3" in message


def test_a_misshapen_tensor(whole, tmp_path):
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    tensors = load_file(whole / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.mlp.up_proj.weight": np.ones((48, 80), np.float32)}, tmp_path / "model.safetensors"
    )
    message = one_line(load_hf, tmp_path)
    assert "tensor model.layers.0.mlp.up_proj.weight has shape [48, 80], and config.json asks for [80, 48]" in message


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_quantized_weights(whole, tmp_path, dtype):
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    tensors = load_file(whole / "model.safetensors")
    save_file(tensors | {"model.norm.weight": np.ones(48, dtype)}, tmp_path / "model.safetensors")
    message = one_line(load_hf, tmp_path)
    assert f"model.norm.weight is {'I8' if dtype == np.int8 else 'F8_E4M3'}" in message
    assert "not quantized" in message


def test_a_cut_file_is_noticed_wherever_it_is_cut(folder):
    file = folder / "model-00003-of-00003.safetensors"
    data = file.read_bytes()
    for length in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        message = one_line(load_hf, folder)
        assert message.startswith(f"{file}: not a whole safetensors file"), length
    file.write_bytes(data + b"\0")
    assert "instead of the" in one_line(load_hf, folder)


def test_a_file_that_shrinks_while_it_is_read(folder):
    found = open_tensors(folder)["model.norm.weight"]
    found.file.write_bytes(found.file.read_bytes()[: found.offset + 4])
    assert "ends within tensor model.norm.weight" in one_line(found.read)


def with_header(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "not valid JSON"),
        ({"a": {"dtype": "F77", "shape": [2], "data_offsets": [0, 8]}}, "tensor a has the unknown dtype 'F77'"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"tensor a of shape \[2\] in F32 has 4 bytes"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, "tensor a of shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "tensor a starts at byte"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "entry of tensor a"),
        ({"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}, "unknown dtype"),
        ({"a": 3}, "entry of tensor a"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            },
            "tensor b starts at byte",
        ),
    ],
)
def test_a_corrupt_header(tmp_path, header, message):
    with_header(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=message) as error:
        read_header(tmp_path / "a.safetensors")
    assert str(tmp_path / "a.safetensors") in str(error.value)


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))


def test_broken_indexes(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weight_map = index["weight_map"]
    where = f"{folder}/model.safetensors.index.json"
    first, second, third = sorted(set(weight_map.values()))

    write_index(folder, '{"weight_map": {')
    assert one_line(load_hf, folder).startswith(f"{where}: not valid JSON")
    for other in ({"metadata": {}}, {"weight_map": []}, {"weight_map": {}}, []):
        write_index(folder, other)
        assert one_line(load_hf, folder).startswith(f"{where}: no weight_map")
    for outside in ("../model.safetensors", 7):
        write_index(folder, {"weight_map": weight_map | {"model.norm.weight": outside}})
        assert f"the file of tensor model.norm.weight is {outside!r}" in one_line(load_hf, folder)
    write_index(folder, {"weight_map": weight_map | {"model.surprise": first}})
    assert one_line(load_hf, folder).startswith(f"{folder}/{first}: no tensor model.surprise in it")
    right = weight_map["model.norm.weight"]
    wrong = second if right == first else first
    write_index(folder, {"weight_map": weight_map | {"model.norm.weight": wrong}})
    assert f"puts tensor model.norm.weight into {wrong}, but it is in {right}" in one_line(load_hf, folder)
    write_index(folder, index)
    (folder / third).unlink()
    assert f"no {third}, which model.safetensors.index.json names" in one_line(load_hf, folder)


def test_a_tensor_in_two_files(folder):
    first, second, _ = sorted(folder.glob("*.safetensors"))
    name, value = next(iter(load_file(first).items()))
    change(folder, second.name, **{name: value})
    assert f"tensor {name} is in {first.name} and in {second.name}" in one_line(load_hf, folder)


def test_checkpoints_without_safetensors(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert "an index, and none of the weights" in one_line(load_hf, folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "no weights (*.safetensors) in it" in one_line(load_hf, folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    message = one_line(load_hf, folder)
    assert "its weights are pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_a_config_that_is_no_config(folder):
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        assert one_line(load_hf, folder).startswith(f"{folder}/config.json")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"tensor": 4, "data": 2}, "tensor=4 does not divide 4 query heads and 2 key heads"),
        ({"fsdp": 5}, "axis embed of size 48 does not divide over fsdp=5"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model(whole, shape, message):
    devices = jax.devices()[: shape.get("fsdp", 8)]
    assert message in one_line(load_hf, whole, make_mesh(shape, devices))


# ------------------------------------------------------------------------------------------------- from scratch


def small():
    shape = {
        "model_type": "qwen3", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 16,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return ModelConfig.from_hf(shape | SHAPE, "tiny")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "nf4"])
def test_a_model_from_scratch_in_fewer_bits_is_the_fp32_one_rounded(dtype):
    full, low = (params_of(init_model(small(), 3, param_dtype=of)) for of in ("float32", dtype))
    rounded = jax.tree.map_with_path(lambda path, p: load.stored(p, path[-1].key, dtype), full)
    assert jax.tree.structure(low) == jax.tree.structure(rounded)
    for (path, a), b in zip(jax.tree.leaves_with_path(low), jax.tree.leaves(rounded), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
