"""A real vLLM computes what transformers does from an export."""

import jax
import pytest

from jaxdistill import config as configs
from jaxdistill.export import export_hf
from jaxdistill.models import params_of, with_params
from jaxdistill.traces import engines
from tests.export.tiny import make_model, make_tokenizer_folder
from tests.traces.tiny import assert_greedy, demo_requests


@pytest.mark.vllm
def test_greedy_tokens_of_an_export_are_those_of_transformers(tmp_path):
    model = make_model(family="llama", tie_word_embeddings=False)
    # from scratch a model is so unsure of itself that rounding would decide between two tokens
    surer = with_params(
        model, jax.tree.map(lambda p: p * 3 if p.ndim > 1 and p.shape[-1] > 64 else p, params_of(model))
    )
    tokenizer = make_tokenizer_folder(tmp_path / "tokenizer")
    export_hf(surer, tmp_path / "out", tokenizer=tokenizer, card="", max_shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    requests, sampling = demo_requests(tmp_path / "out", 16, temperature=0.0)
    vllm = configs.VLLMConfig(dtype="float32", enforce_eager=True, max_num_seqs=16, kv_cache_gib=1)
    found = list(engines.generate("vllm", tmp_path / "out", requests, sampling, vllm=vllm, batch=1))
    assert_greedy(tmp_path / "out", requests, sampling, found)
    assert len({token for completion in found for token in completion.output_ids}) > 20  # not one token for ever
