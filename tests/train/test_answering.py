"""A student that vLLM samples from while it changes; the decoder's part is in test_on_policy.py."""

import jax
import pytest

from jaxdistill import tokenization
from jaxdistill.config import OnPolicyConfig, VLLMConfig
from jaxdistill.demo.task import make_problems
from jaxdistill.generate import decode
from jaxdistill.models import load_hf, params_of, with_params
from jaxdistill.train.answering import ByVLLM, Question
from tests.traces.tiny import EOS, checkpoint  # noqa: F401  (a fixture)

COLD = 0.01
"""A temperature at which nearly every sample is the likeliest one; vLLM goes no lower."""


@pytest.mark.vllm
def test_vllm_samples_from_the_weights_that_it_was_last_given(checkpoint, tmp_path):  # noqa: F811
    tokenizer = tokenization.load_tokenizer(str(checkpoint))
    prompts = [tokenization.render_prompt(tokenizer, question) for question, _, _ in make_problems(12, seed=5)]
    asked = [Question(prompt, 8, seed) for seed, prompt in enumerate(prompts)]
    asked[3] = Question(prompts[3], 3, 3)
    loaded = load_hf(checkpoint)
    sharp = params_of(loaded) | {"norm": 50 * params_of(loaded)["norm"]}  # sure of itself
    first = with_params(loaded, sharp)
    # its projection is its embedding, and changes with it
    changed = {"layers": jax.tree.map(lambda p: p[::-1], sharp["layers"]), "embed": sharp["embed"][::-1]}
    other = with_params(loaded, sharp | changed)
    vllm = VLLMConfig(dtype="float32", enforce_eager=True, max_num_seqs=4, kv_cache_gib=1)
    settings = OnPolicyConfig(max_tokens=8, temperature=COLD, rollouts="vllm", vllm=vllm, sync_every=2)
    folder = tmp_path / "weights"
    student = ByVLLM(
        settings, stop=EOS, row_tokens=200, dtype="float32", tokenizer=checkpoint, folder=folder, log=tmp_path / "log"
    )
    try:
        found = [student(step, model, asked) for step, model in enumerate((first, other, other, other, first))]
        assert [path.name for path in folder.iterdir()] == ["4"]  # none but the newest
    finally:
        student.close()
    assert not folder.exists()
    # at steps 1 and 3 it has the weights of the step before; loaded in place they are what they were in the beginning
    assert found[0] == found[1] == found[4] and found[2] == found[3]
    for answers, model in ((found[0], first), (found[2], other)):
        likeliest = {
            index: (ids, reason == "stop")
            for index, ids, reason in decode(
                model, prompts, [0] * 12, max_tokens=[q.limit for q in asked], temperature=0.0, stop_ids=[EOS], batch=12
            )
        }
        assert sum(likeliest[i] == answer for i, answer in enumerate(answers)) >= 9
        assert all(len(ids) <= question.limit for (ids, _), question in zip(answers, asked, strict=True))
    assert sum(a == b for a, b in zip(found[0], found[2], strict=True)) <= 2
