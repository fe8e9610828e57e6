"""The export's check: what passes, and what it says of an export that is not the model."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdistill.export import export_hf
from jaxdistill.export.check import check_again, check_logits
from tests.export.tiny import config_of, make_model, make_tokenizer_folder, tensors_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    return make_model()


def damage(folder):
    """The last layer's MLP is another one now."""
    tensors = tensors_of(folder)
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name] = (tensors[name].astype(np.float32) * 1.5).astype(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_passes_and_a_damaged_one_does_not(model, tokenizer, tmp_path, dtype):
    more = {"tokenizer": tokenizer, "card": "", "dtype": dtype}
    done = export_hf(model, tmp_path / "out", check=lambda path: check_logits(model, path, dtype), **more)
    assert 0 < done["check"]["max_difference"] <= 1e-4 * done["check"]["logit_scale"]
    assert check_again(tmp_path / "out").startswith("transformers' logits differ by at most ")
    # a second place for one setting, which says something else
    config = config_of(tmp_path / "out") | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"rope_parameters .* and rope_scaling .* disagree"):
        check_again(tmp_path / "out")

    def damaged(path):
        damage(path)
        return check_logits(model, path, dtype)

    with pytest.raises(ValueError, match=r"export: .*, first after layer 3 of 3; nothing was exported\."):
        export_hf(model, tmp_path / "other", check=damaged, **more)
    assert not (tmp_path / "other").exists()
