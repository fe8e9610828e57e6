"""The JAX decoder against transformers' generate, and what makes its samples repeatable."""

import numpy as np
import pytest
import torch

from jaxdistill.generate import decode
from jaxdistill.models import load_hf
from tests.models import tiny

LENGTHS = (3, 40, 17, 1, 32, 33)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny.make("qwen3", folder, num_hidden_layers=2), load_hf(folder)


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 97, n).tolist() for n in LENGTHS]


def sample(model, prompts, seeds, **options):
    arguments = {"max_tokens": 12, "temperature": 1.0, "stop_ids": [2], "batch": 4} | options
    found = {i: (ids, why) for i, ids, why in decode(model, prompts, seeds, **arguments)}
    return [found[i] for i in range(len(prompts))]


def test_greedy_equals_transformers_token_for_token(pair):
    reference, model = pair
    ours = sample(model, prompts(), [0] * len(LENGTHS), temperature=0.0)
    for prompt, (ids, why) in zip(prompts(), ours, strict=True):
        with torch.no_grad():
            out = reference.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=0
            )
        assert ids == out[0, len(prompt) :].tolist()
        assert why == ("stop" if ids[-1] == 2 else "length")


def test_a_sample_depends_on_its_prompt_and_seed_alone(pair):
    _, model = pair
    all_together = sample(model, prompts(), list(range(6)))
    alone = [sample(model, [p], [s])[0] for s, p in enumerate(prompts())]
    assert all_together == alone
    again = sample(model, prompts(), [s + 100 for s in range(6)])
    assert again != all_together


def test_a_row_ends_at_its_first_stop_token(pair):
    _, model = pair
    free = sample(model, prompts(), [0] * 6, stop_ids=[96])
    stop = free[1][0][4]
    ids, why = sample(model, prompts(), [0] * 6, stop_ids=[96, stop])[1]
    assert ids == free[1][0][: free[1][0].index(stop) + 1]
    assert why == "stop"


def test_samples_follow_the_softmax(pair):
    """First tokens of 4,000 samples of one prompt against the model's own distribution."""
    reference, model = pair
    prompt = prompts()[2]
    with torch.no_grad():
        p = torch.softmax(reference(torch.tensor([prompt])).logits[0, -1].double() / 2.0, -1).numpy()
    drawn = sample(model, [prompt] * 4000, list(range(4000)), max_tokens=1, temperature=2.0, batch=500)
    counts = np.bincount([ids[0] for ids, _ in drawn], minlength=97)
    expected = 4000 * p
    often = expected > 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert chi2 < often.sum() + 5 * np.sqrt(2 * often.sum())


def test_nucleus_leaves_out_the_tail(pair):
    reference, model = pair
    prompt = prompts()[2]
    with torch.no_grad():
        p = torch.softmax(reference(torch.tensor([prompt])).logits[0, -1].double() / 3.0, -1).numpy()
    order = np.argsort(-p)
    inside = set(order[: int(np.searchsorted(np.cumsum(p[order]), 0.5)) + 1].tolist())
    drawn = sample(model, [prompt] * 500, list(range(500)), max_tokens=1, temperature=3.0, top_p=0.5, batch=500)
    assert {ids[0] for ids, _ in drawn} == inside
