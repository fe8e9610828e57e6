"""The engine `jax`: the embedded decoder behind the common interface."""

from jaxdistill.config import VLLMConfig
from jaxdistill.traces import engines
from tests.traces.tiny import assert_greedy, checkpoint, demo_requests  # noqa: F401  (a fixture among them)


def generate(folder, requests, sampling):
    return list(engines.generate("jax", folder, requests, sampling, vllm=VLLMConfig(), batch=8))


def test_greedy_tokens_are_those_of_transformers(checkpoint):  # noqa: F811
    requests, sampling = demo_requests(checkpoint, 16, temperature=0.0)
    assert_greedy(checkpoint, requests, sampling, generate(checkpoint, requests, sampling))


def test_a_sample_depends_on_its_seed_and_not_on_its_company(checkpoint):  # noqa: F811
    requests, sampling = demo_requests(checkpoint, 12, temperature=1.0)
    whole = {completion.id: completion for completion in generate(checkpoint, requests, sampling)}
    some = generate(checkpoint, requests[::-3], sampling)
    assert len(some) == 4
    assert all(completion == whole[completion.id] for completion in some)
    assert len({tuple(completion.output_ids) for completion in whole.values()}) == 12
