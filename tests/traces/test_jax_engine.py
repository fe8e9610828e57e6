"""The engine `jax`: the embedded decoder behind the common interface."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from jaxdistill.config import VLLMConfig
from jaxdistill.models import load_hf
from jaxdistill.tokenization import TokenMap
from jaxdistill.traces import engines
from jaxdistill.traces.jax_engine import decoding_dtype
from jaxdistill.traces.jax_scoring import Scorer
from tests.traces.tiny import assert_greedy, checkpoint, demo_requests  # noqa: F401  (a fixture among them)


def generate(folder, requests, sampling):
    return list(engines.generate("jax", folder, requests, sampling, vllm=VLLMConfig(), batch=8))


def test_greedy_tokens_are_those_of_transformers(checkpoint):  # noqa: F811
    requests, sampling = demo_requests(checkpoint, 16, temperature=0.0)
    assert_greedy(checkpoint, requests, sampling, generate(checkpoint, requests, sampling))


def test_a_teacher_is_compared_with_transformers_before_it_is_asked(checkpoint, capsys, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    requests, sampling = demo_requests(checkpoint, 2, temperature=0.0)
    options = {"vllm": VLLMConfig(), "batch": 8, "check": True}
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch", None)
        with pytest.raises(ValueError, match=r"torch .* is not installed; .* or set student\.check: false"):
            next(engines.generate("jax", checkpoint, requests, sampling, **options))
        assert not list(
            engines.generate("jax", checkpoint, [], sampling, **options)
        )  # nothing to ask, nothing to check
    for count in (1, 0):
        assert len(list(engines.generate("jax", checkpoint, requests, sampling, **options))) == 2
        assert capsys.readouterr().out.count("is what transformers makes of it") == count


def test_a_sample_depends_on_its_seed_and_not_on_its_company(checkpoint):  # noqa: F811
    requests, sampling = demo_requests(checkpoint, 12, temperature=1.0)
    whole = {completion.id: completion for completion in generate(checkpoint, requests, sampling)}
    some = generate(checkpoint, requests[::-3], sampling)
    assert len(some) == 4
    assert all(completion == whole[completion.id] for completion in some)
    assert len({tuple(completion.output_ids) for completion in whole.values()}) == 12


def whole(folder, requests, completions):
    """Float32 log-probabilities of all real tokens at every drawn one, by id: one sequence at a time."""
    size = TokenMap.of(folder).size
    run = jax.jit(load_hf(folder))
    found = {}
    for c in completions:
        prompt = next(r.prompt_ids for r in requests if r.id == c.id)
        ids = np.zeros((1, 256), np.int32)
        ids[0, : len(prompt) + len(c.output_ids)] = prompt + c.output_ids
        logits = np.asarray(run(ids))[0, len(prompt) - 1 : len(prompt) + len(c.output_ids) - 1, :size]
        found[c.id] = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
    return found


def test_logprobs_are_those_of_the_model_at_every_drawn_token(checkpoint):  # noqa: F811
    requests, sampling = demo_requests(checkpoint, 5, temperature=1.0)
    drawn = generate(checkpoint, requests, sampling)
    found = generate(checkpoint, requests, dataclasses.replace(sampling, logprobs=30))
    assert sorted(found, key=lambda c: c.id) == sorted(drawn, key=lambda c: c.id)
    # of responses that are there already they are the same
    again = [dataclasses.replace(r, response_ids=c.output_ids) for r in requests for c in drawn if c.id == r.id]
    scored = {c.id: c for c in generate(checkpoint, again, dataclasses.replace(sampling, logprobs=30))}
    want = whole(checkpoint, requests, drawn)
    for c in found:
        assert c.logprobs is not None
        ids = np.argsort(-want[c.id], 1)[:, :30]
        np.testing.assert_allclose(c.logprobs.logprobs, np.take_along_axis(want[c.id], ids, 1), atol=1e-3)
        np.testing.assert_allclose(c.logprobs.logprobs, np.take_along_axis(want[c.id], c.logprobs.ids, 1), atol=1e-3)
        np.testing.assert_allclose(c.logprobs.sampled, want[c.id][range(len(c.output_ids)), c.output_ids], atol=1e-3)
    # at a temperature it is the whole distribution that is another one
    softer = dataclasses.replace(sampling, logprobs=30, logprobs_temperature=3.0)
    for c in generate(checkpoint, again[:1], softer):
        logits = want[c.id] / 3 - np.logaddexp.reduce(want[c.id] / 3, 1, keepdims=True)
        np.testing.assert_allclose(c.logprobs.logprobs, np.take_along_axis(logits, c.logprobs.ids, 1), atol=1e-3)
    for c in found:
        np.testing.assert_allclose(scored[c.id].logprobs.logprobs, c.logprobs.logprobs, atol=1e-3)


def test_random_draws_are_the_distribution_on_average_and_the_same_again(checkpoint):  # noqa: F811
    requests, sampling = demo_requests(checkpoint, 1, temperature=1.0)
    drawn = generate(checkpoint, requests, sampling)
    want = np.exp(whole(checkpoint, requests, drawn)[drawn[0].id])
    n = 400
    scorer = Scorer(load_hf(checkpoint), n, want.shape[1], random=True)
    asked = [dataclasses.replace(requests[0], response_ids=drawn[0].output_ids)]
    ((_, found),), ((_, again),) = scorer.score(asked), scorer.score(asked)
    np.testing.assert_array_equal(found.ids, again.ids)
    shares = np.exp(found.logprobs)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    got = np.zeros(want.shape)
    np.put_along_axis(got, found.ids[:, ::-1], shares[:, ::-1], 1)  # empty slots hold id 0, and the used one comes last
    # Pearson's statistic over all tokens of all positions, against its own mean and variance
    expected = n * want
    statistic = (np.square(n * got - expected) / expected).sum(1)
    freedom = want.shape[1] - 1
    assert abs(statistic.mean() - freedom) < 6 * np.sqrt(2 * freedom / len(statistic))


@pytest.mark.parametrize(
    ("wanted", "config", "platform", "dtype"),
    [
        ("auto", {"dtype": "bfloat16"}, "cpu", "float32"),
        ("auto", {"dtype": "bfloat16"}, "gpu", "bfloat16"),
        ("auto", {"torch_dtype": "float16"}, "tpu", "bfloat16"),
        ("auto", {"torch_dtype": "float32"}, "gpu", "float32"),
        ("auto", {}, "gpu", "float32"),
        ("bfloat16", {"dtype": "float32"}, "cpu", "bfloat16"),
        ("float32", {"dtype": "bfloat16"}, "gpu", "float32"),
    ],
)
def test_the_decoder_computes_in_the_checkpoint_s_dtype_on_accelerators(wanted, config, platform, dtype):
    assert decoding_dtype(wanted, config, platform) == dtype
