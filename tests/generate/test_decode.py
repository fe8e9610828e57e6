"""The JAX decoder against transformers' generate, and what makes its samples repeatable."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdistill.generate import decode
from jaxdistill.generate import rows as compiled
from jaxdistill.models import Lora, init_model, load_hf, params_of, with_lora, with_params
from jaxdistill.parallel import mesh as meshes
from tests.models import tiny

LENGTHS = (3, 30, 17, 1, 32, 25, 8)
TOKENS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.make("qwen3", folder, num_hidden_layers=2, max_position_embeddings=256)
    return load_hf(folder)


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(3, 97, n).tolist() for n in lengths]


def run(model, prompts, seeds, **options):
    arguments = {"max_tokens": TOKENS, "temperature": 1.0, "stop_ids": [2], "batch": 4} | options
    found = {i: (ids, why) for i, ids, why in decode(model, prompts, seeds, **arguments)}
    assert sorted(found) == list(range(len(prompts) * arguments.get("samples", 1)))
    return [found[i] for i in sorted(found)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_equals_transformers_token_for_token(family, tmp_path):
    """Rows of unequal length, more of them than fit at once, some of which stop early; windows are 24 tokens."""
    reference = tiny.make(family, tmp_path, max_position_embeddings=128)
    # in one family, prompts of several widths, and a cache that grows
    lengths = (3, 40, 17, 1, 70, 33, 8) if family == "mistral" else LENGTHS
    expected = []
    for prompt in prompts(lengths):
        with torch.no_grad():
            out = reference.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0
            )
        expected.append(out[0, len(prompt) :].tolist())
    stop = [expected[1][4], expected[4][17]]
    ended = [next((i for i, token in enumerate(ids) if token in stop), None) for ids in expected]
    assert any(end is not None and end < TOKENS - 1 for end in ended)
    ours = run(load_hf(tmp_path), prompts(lengths), [0] * len(lengths), temperature=0.0, stop_ids=stop)
    for ids, end, (found, why) in zip(expected, ended, ours, strict=True):
        assert found == (ids if end is None else ids[: end + 1])
        assert why == ("length" if end is None else "stop")


def test_a_sample_depends_on_its_prompt_and_seed_alone(model):
    """Alone, in other company, in another order, in a longer cache, in another place: the very same tokens."""
    seeds = list(range(len(LENGTHS)))
    options = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
    together = run(model, prompts(), seeds, **options)
    assert [run(model, [p], [s], **options)[0] for p, s in zip(prompts(), seeds, strict=True)] == together
    assert run(model, prompts()[::-1], seeds[::-1], **options)[::-1] == together
    long = prompts((*LENGTHS, 150, 160, 170))
    assert run(model, long[7:] + long[:7], [7, 8, 9, *seeds], **options)[3:] == together
    assert run(model, prompts(), [s + 100 for s in seeds], **options) != together


def test_the_order_of_refills_does_not_matter(model):
    """Two batches side by side, whose rows are refilled as it happens."""
    many, seeds = prompts(tuple(np.random.default_rng(1).integers(1, 32, 60))), list(range(60))
    limits = np.random.default_rng(2).integers(1, 30, 60).tolist()
    together = run(model, many, seeds, max_tokens=limits, batch=16)
    assert [len(ids) <= limit for (ids, _), limit in zip(together, limits, strict=True)] == [True] * 60
    assert {len(ids) for ids, why in together if why == "length"} <= set(limits)
    order = np.random.default_rng(3).permutation(60)
    shuffled = run(
        model, [many[i] for i in order], [seeds[i] for i in order], max_tokens=[limits[i] for i in order], batch=16
    )
    assert [shuffled[i] for i in np.argsort(order)] == together


def test_rows_that_end_are_given_to_waiting_prompts(model, monkeypatch):
    """One long answer and eleven short ones in two rows: eight short ones pass beside the long one."""
    chunks, once = [], compiled.Rows.run
    monkeypatch.setattr(compiled.Rows, "run", lambda self, ahead: chunks.append(self) or once(self, ahead))
    limits = [8 * compiled.CHUNK, *[4] * 11]
    found = run(model, [[5, i + 3] for i in range(12)], [0] * 12, max_tokens=limits, stop_ids=[], batch=2)
    assert [len(ids) for ids, _ in found] == limits
    # in whole batches it would be 8 for the first two, and one for each of the other five
    assert len(chunks) == 10


def test_chunks_that_begin_ahead_change_no_token(model, monkeypatch):
    """As on accelerators: rows end by a stop token and by their limits while the next chunk is on its way."""
    many, limits = prompts((3, 30, 17, 1, 32, 25, 8, 60)), [70, 5, 33, 90, 17, 64, 48, 80]
    options = {"max_tokens": limits, "batch": 4}
    expected = run(model, many, list(range(8)), **options)
    assert {"stop", "length"} == {why for _, why in expected}
    begun, once = [], compiled.Rows.run
    monkeypatch.setattr(compiled.Engine, "ahead", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr(
        compiled.Rows, "run", lambda self, ahead: begun.append((ahead, self.begun)) or once(self, ahead)
    )  # fmt: skip
    assert run(model, many, list(range(8)), **options) == expected
    # one chunk on its own, then some that had begun, and those that are over begin nothing
    assert (True, 0) in begun and (True, compiled.CHUNK) in begun and (False, compiled.CHUNK) in begun


def test_samples_of_a_prompt(model):
    """n samples share a prefill; each has its own stream, which does not depend on n."""
    three = run(model, prompts()[:2], [1, 2], samples=3)
    assert len({tuple(ids) for ids, _ in three}) == 6
    two = run(model, prompts()[:2], [1, 2], samples=2)
    assert two == [three[i] for i in (0, 1, 3, 4)]
    assert run(model, [prompts()[0]] * 2, [1, 1])[1] == three[0]


def test_other_weights_compile_nothing(model):
    first, other = run(model, prompts(), [0] * 7, temperature=0.7), init_model(model.config, 5)
    compiled_now = []

    def listen(event, seconds, **_):
        compiled_now.append(event) if event.endswith("backend_compile_duration") else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert run(other, prompts(), [0] * 7, temperature=0.9) != first
        assert compiled_now == []
        run(other, prompts(), [0] * 7, batch=5)
        assert compiled_now, "this listener hears nothing"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_sharded_model_gives_the_same_tokens(tmp_path):
    shape = {"num_hidden_layers": 2, "max_position_embeddings": 128, "vocab_size": 96}
    tiny.make("qwen3", tmp_path, **shape)
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    one, eight = load_hf(tmp_path), load_hf(tmp_path, mesh)
    some = [[min(i, 95) for i in p] for p in prompts()]
    assert len(jax.tree.leaves(eight.layers)[0].sharding.device_set) == 8
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}):
        assert run(eight, some, [3] * 7, **options) == run(one, some, [3] * 7, **options)


def test_adapters_on_a_quantized_base_decode_as_the_whole_sequence_says(tmp_path):
    tiny.make("qwen3", tmp_path, num_hidden_layers=2, max_position_embeddings=256)
    adapted = with_lora(load_hf(tmp_path, param_dtype="int8"), Lora.of(2, 4.0), seed=0)
    params = params_of(adapted)
    params["layers"]["v_lora_b"] += 0.5
    adapted = with_params(adapted, params)
    prompt = prompts()[1]
    [(ids, _)] = run(adapted, [prompt], [0], temperature=0.0, stop_ids=[])
    logits = adapted(jnp.asarray([prompt + ids]))[0, len(prompt) - 1 : -1]
    assert jnp.argmax(logits, axis=-1).tolist() == ids


def test_bf16_follows_the_whole_sequence(tmp_path):
    """Prefill and steps give the logits of one pass over prompt and output, but for rounding."""
    tiny.make("gemma3_text", tmp_path, max_position_embeddings=128, initializer_range=0.1)
    model = load_hf(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    prompt = prompts()[1]
    ids, _ = run(model, [prompt], [0], temperature=0.0, stop_ids=[])[0]
    logits = np.asarray(model(jnp.array([prompt + ids])))[0, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.array(ids)[:, None], axis=1)[:, 0]
    assert np.all(logits.max(-1) - chosen < 0.03 * logits.std())


def test_leaving_early_ends_the_threads(model):
    before = threading.active_count()
    results = decode(model, prompts(), [0] * 7, max_tokens=[1] * 6 + [90], temperature=0.0, stop_ids=[], batch=16)
    next(results)
    results.close()
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[5], list(range(3, 60)) * 5]}, r"prompt 1: 285 tokens \+ max_tokens=20 > 256"),
        ({"prompts": [[5], []]}, "prompt 1 is empty"),
        ({"prompts": [[5], [97]]}, "prompt 1 has a token"),
        ({"prompts": [[5], [-1]]}, "prompt 1 has a token"),
        ({"seeds": [1]}, "2 prompts and 1 seeds"),
        ({"seeds": [1, -1]}, "seed -1"),
        ({"max_tokens": [1]}, "2 prompts and 1 max_tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"samples": 0}, "samples is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"stop_ids": [2, 97]}, "stop id 97"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(model, change, message):
    arguments = {"prompts": [[5], [6]], "seeds": [1, 2], "max_tokens": TOKENS, "temperature": 1.0, "stop_ids": [2]}
    arguments |= change
    with pytest.raises(ValueError, match=message) as found:
        decode(model, arguments.pop("prompts"), arguments.pop("seeds"), **arguments)
    assert "\n" not in str(found.value)


def test_nothing_to_do(model):
    assert run(model, [], []) == []
