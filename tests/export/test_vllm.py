"""A real vLLM computes what transformers does from an export, and serves it."""

import sys
from pathlib import Path

import jax
import pytest

from jaxdistill import config as configs
from jaxdistill.export import check, export_hf
from jaxdistill.models import params_of, with_params
from jaxdistill.traces import engines
from tests.export.tiny import make_model, make_tokenizer_folder
from tests.traces.tiny import assert_greedy, demo_requests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export in several files."""
    root = tmp_path_factory.mktemp("export")
    model = make_model(family="llama", tie_word_embeddings=False)
    # from scratch a model is so unsure of itself that rounding would decide between two tokens
    surer = with_params(
        model, jax.tree.map(lambda p: p * 3 if p.ndim > 1 and p.shape[-1] > 64 else p, params_of(model))
    )
    tokenizer = make_tokenizer_folder(root / "tokenizer")
    export_hf(surer, root / "out", tokenizer=tokenizer, card="", max_shard_bytes=100_000)
    assert len(list((root / "out").glob("*.safetensors"))) > 1
    return root / "out"


@pytest.mark.vllm
def test_greedy_tokens_of_an_export_are_those_of_transformers(folder):
    requests, sampling = demo_requests(folder, 16, temperature=0.0)
    vllm = configs.VLLMConfig(dtype="float32", enforce_eager=True, max_num_seqs=16, kv_cache_gib=1)
    found = list(engines.generate("vllm", folder, requests, sampling, vllm=vllm, batch=1))
    assert_greedy(folder, requests, sampling, found)
    assert len({token for completion in found for token in completion.output_ids}) > 20  # not one token for ever


@pytest.mark.vllm
def test_vllm_serves_an_export(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)  # folders in a config are mostly relative
    with check.vllm_server(Path(folder.name), port=0, log=tmp_path / "log", python=sys.executable) as url:
        answer = check.ask(url, "Ann has 2 pens. Bob has 3 more than Ann. How many pens does Bob have?", max_tokens=8)
    assert answer.strip()
