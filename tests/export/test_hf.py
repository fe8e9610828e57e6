"""What is exported is what was trained, other programs read it, and a failure leaves nothing behind."""

import contextlib
import errno
import json
import resource

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from jaxdistill.export import export_hf, writer
from jaxdistill.models import load_hf, params_of, with_params
from jaxdistill.parallel.mesh import make_mesh
from tests.export.tiny import config_of, files_of, make_model, make_tokenizer_folder, tensors_of

IDS = jnp.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    return make_model()


def names_in(path):
    return sorted(p.name for p in path.iterdir())


# ------------------------------------------------------------------------------------------------------ the bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_is_byte_for_byte_what_the_library_writes(model, tokenizer, tmp_path, dtype):
    counts = export_hf(model, tmp_path / "out", tokenizer=tokenizer, card="card", dtype=dtype)
    tensors = tensors_of(tmp_path / "out")
    assert {str(t.dtype) for t in tensors.values()} == {dtype}
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    total = sum(t.nbytes for t in tensors.values())
    assert counts == {"tensors": len(tensors), "bytes": total, "files": 1, "check": None}


def test_paths_may_be_texts_as_in_load_hf(model, tokenizer, tmp_path):
    export_hf(model, str(tmp_path / "out"), tokenizer=str(tokenizer), card="card")
    export_hf(model, tmp_path / "same", tokenizer=tokenizer, card="card")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "same")
    np.testing.assert_array_equal(load_hf(str(tmp_path / "out"))(IDS), model(IDS))
    with pytest.raises(ValueError, match="no such folder"):
        export_hf(model, str(tmp_path / "other"), tokenizer=str(tmp_path / "nowhere"), card="")


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [None, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_an_unchanged_checkpoint_comes_out_as_it_went_in(model, tokenizer, tmp_path, stored, shape):
    dtype = np.dtype(stored).name
    export_hf(model, tmp_path / "in", tokenizer=tokenizer, card="", dtype=dtype)
    # subnormal numbers and signed zeros too
    tensors = tensors_of(tmp_path / "in")
    odd = np.array([ml_dtypes.finfo(stored).smallest_subnormal, -0.0, ml_dtypes.finfo(stored).max], stored)
    for name in ("model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"):
        tensors[name][1, :3] = odd
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    loaded = load_hf(tmp_path / "in", make_mesh(shape) if shape else None)
    export_hf(loaded, tmp_path / "out", tokenizer=tmp_path / "in", card="", dtype=dtype)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "in")


def test_bf16_is_rounded_to_nearest_with_ties_to_even(model, tokenizer, tmp_path):
    # halfway between two bf16 numbers below an odd and an even one, just beside it, and into infinity
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x7F7FFFFF]
    values = np.array(bits, np.uint32).view(np.float32)
    params = params_of(model)
    changed = params | {"norm": params["norm"].at[: len(bits)].set(values)}
    export_hf(with_params(model, changed), tmp_path / "out", tokenizer=tokenizer, card="", dtype="bfloat16")
    found = tensors_of(tmp_path / "out")["model.norm.weight"][: len(bits)].view(np.uint16)
    assert [hex(v) for v in found] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80", "0xbf82", "0x7f80"]
    torchs = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(found, torchs)


def test_bf16_parameters_are_exported_too(model, tokenizer, tmp_path):
    export_hf(model, tmp_path / "a", tokenizer=tokenizer, card="", dtype="bfloat16")
    frozen = load_hf(tmp_path / "a", param_dtype="bfloat16")
    export_hf(frozen, tmp_path / "b", tokenizer=tokenizer, card="", dtype="bfloat16")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_shards_hold_what_they_may_and_the_index_names_them(model, tokenizer, tmp_path):
    limit = 60_000  # less than the embedding, which gets a file of its own
    counts = export_hf(model, tmp_path / "out", tokenizer=tokenizer, card="", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert counts["files"] == len(files) > 3
    assert [f.name for f in files] == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert index["metadata"]["total_size"] == counts["bytes"]
    seen = {}
    for file in files:
        from safetensors.numpy import load_file

        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
        seen |= dict.fromkeys(tensors, file.name)
    assert seen == index["weight_map"]
    same = tensors_of(tmp_path / "out")
    export_hf(model, tmp_path / "one", tokenizer=tokenizer, card="")
    for name, tensor in tensors_of(tmp_path / "one").items():
        np.testing.assert_array_equal(same[name], tensor)


def test_transformers_loads_it_and_computes_the_same(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_model(family="llama", tie_word_embeddings=False)
    export_hf(model, tmp_path / "out", tokenizer=tokenizer, card="", max_shard_bytes=100_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = np.random.default_rng(0).integers(0, 448, (2, 20))
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(model(jnp.asarray(ids)), want, atol=1e-4 * np.abs(want).max())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize("shape", [None, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_memory_holds_one_tensor_at_a_time(tokenizer, tmp_path, monkeypatch, shape):
    """A tensor is written, and nothing keeps it, before the next one is fetched."""
    import weakref

    model = make_model(mesh=make_mesh(shape) if shape else None)

    alive, largest = [], []
    real = writer.to_host

    def counted(value):
        found = real(value)
        alive.append(weakref.ref(found))
        largest.append(found.nbytes)
        assert sum(ref() is not None for ref in alive) <= 2  # this one, and the one before until it is replaced
        return found

    monkeypatch.setattr(writer, "to_host", counted)
    export_hf(model, tmp_path / "out", tokenizer=tokenizer, card="")
    tensors = tensors_of(tmp_path / "out")
    assert len(largest) == len(tensors)
    assert max(largest) == max(t.nbytes for t in tensors.values())
    # an array that keeps its host copy would keep all of the model there in the end
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves(params_of(model)))


# ------------------------------------------------------------------------------------------------ the other files


def test_unrelated_keys_of_the_base_survive_and_ours_win(model, tokenizer, tmp_path):
    base = {
        "model_type": "qwen3",
        "architectures": ["Other"],
        "hidden_size": 9999,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "quantization_config": {"bits": 4},
        "auto_map": {"AutoModel": "their_code.Model"},
        "initializer_range": 0.125,
        "eos_token_id": [2, 7],
        "bos_token_id": 1,
        "torch_dtype": "float16",
    }
    generation = {"eos_token_id": [2, 7, 9], "temperature": 0.6, "top_p": 0.95, "do_sample": True}
    export_hf(
        model,
        tmp_path / "out",
        tokenizer=tokenizer,
        card="",
        dtype="bfloat16",
        base_config=base,
        base_generation_config=generation,
    )
    config = config_of(tmp_path / "out")
    assert config["initializer_range"] == 0.125
    assert config["eos_token_id"] == [2, 7]
    assert config["bos_token_id"] == 1
    assert config["pad_token_id"] == 0
    assert config["hidden_size"] == 64
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert not {"quantization_config", "auto_map"} & config.keys()
    assert config.get("rope_scaling") == model.config.to_hf().get("rope_scaling")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == generation | {"pad_token_id": 0}
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.6


def test_a_base_with_another_tokenizer_does_not_say_when_to_stop(model, tokenizer, tmp_path):
    base = {"model_type": "qwen3", "eos_token_id": 151645, "bos_token_id": 151643, "pad_token_id": 151643}
    generation = {"eos_token_id": [151645, 151643], "temperature": 0.6, "do_sample": True}
    more = {"base_config": base, "base_generation_config": generation}
    export_hf(model, tmp_path / "out", tokenizer=tokenizer, card="", **more)
    assert [config_of(tmp_path / "out")[f"{name}_token_id"] for name in ("eos", "pad", "bos")] == [2, 0, None]
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": 2, "pad_token_id": 0, "temperature": 0.6, "do_sample": True}


def test_a_base_of_another_family_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="base_config is of a llama model, and this is a qwen3"):
        export_hf(model, tmp_path / "out", tokenizer=tokenizer, card="", base_config={"model_type": "llama"})
    assert names_in(tmp_path) == []


def test_a_whole_checkpoint_may_lend_its_tokenizer(model, tokenizer, tmp_path):
    """Its configs, index and weights stay behind."""
    export_hf(make_model(num_hidden_layers=1), tmp_path / "in", tokenizer=tokenizer, card="other", max_shard_bytes=9)
    export_hf(model, tmp_path / "out", tokenizer=tmp_path / "in", card="card")
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(names_in(tmp_path / "out")) == expected
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 3
    assert (tmp_path / "out" / "README.md").read_text() == "card"


# ----------------------------------------------------------------------------------------------------- failures


@contextlib.contextmanager
def files_of_at_most(size):
    """The kernel lets no file grow further, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 50_000, 300_000])
def test_a_full_disk_leaves_what_was_there_before(model, tokenizer, tmp_path, size):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "before").write_text("still here")
    with files_of_at_most(size), pytest.raises(ValueError, match=r"model\.safetensors: File too large") as error:
        export_hf(model, tmp_path / "out", tokenizer=tokenizer, card="")
    assert "\n" not in str(error.value)
    assert "nothing was exported" in str(error.value)
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["before"]


def test_whatever_fails_leaves_nothing(model, tokenizer, tmp_path, monkeypatch):
    def refuse(folder):
        assert (folder / "model.safetensors").is_file()
        raise ValueError("the logits differ")

    def export(**more):
        export_hf(model, tmp_path / "out", **{"tokenizer": tokenizer, "card": ""} | more)

    with pytest.raises(ValueError, match="the logits differ"):
        export(check=refuse)
    with pytest.raises(ValueError, match="no such folder"):
        export(tokenizer=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        export(tokenizer=tmp_path / "empty")
    (tmp_path / "empty").rmdir()
    with pytest.raises(ValueError, match="dtype 'float64'; choose float32 or bfloat16"):
        export(dtype="float64")
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        export(max_shard_bytes=0)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(ValueError, match=r"model\.safetensors: No space left on device; nothing was exported"):
        export()
    assert names_in(tmp_path) == []


def test_a_place_that_cannot_be_is_named(model, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: File exists; nothing was exported"):
        export_hf(model, tmp_path / "file" / "out", tokenizer=tokenizer, card="")
