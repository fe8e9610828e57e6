"""Tiny checkpoints for tests: a small BPE tokenizer with a chat template, and a Qwen3 with random weights."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from jaxdistill import tokenization
from jaxdistill.demo.task import make_problems
from jaxdistill.traces.engines import Completion, Request, Sampling

EOS = 2
VLLM = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16, "kv_cache_gib": 1}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(folder: Path, vocab_size: int = 448) -> int:
    """Trains a byte-level BPE on demo problems and saves it; gives the number of tokens that it has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        (f"{question}\n{solution}" for question, _, solution in make_problems(300, seed=0)), trainer
    )
    bpe.add_tokens(
        [
            AddedToken("<think>", special=False, normalized=False),
            AddedToken("</think>", special=False, normalized=False),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_checkpoint(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 32,
    intermediate: int = 128,
    vocab: int = 448,
    context: int = 256,
    spread: float = 0.2,
) -> Path:
    """Saves a random Qwen3 with tied embeddings.

    Args:
      head_dim: vLLM's CPU attention takes 32 at least.
      spread: the weights' standard deviation; more makes the model surer of itself.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = make_tokenizer(folder, vocab)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=EOS,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that Transformers, vLLM and jaxdistill load; import it by name into a test module."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def demo_requests(folder: Path, count: int, *, temperature: float) -> tuple[list[Request], Sampling]:
    """Rendered demo problems, for responses of up to 40 tokens; several tokens end one, as eos alone would not."""
    tokenizer = tokenization.load_tokenizer(str(folder))
    prompts = [tokenization.render_prompt(tokenizer, question) for question, _, _ in make_problems(count, seed=5)]
    requests = [Request(str(number), prompt, 100 + number) for number, prompt in enumerate(prompts)]
    stop_ids = sorted({*tokenization.stop_ids(folder, tokenizer), *range(20, 448, 40)})
    return requests, Sampling(temperature=temperature, top_p=1.0, max_tokens=40, stop_ids=stop_ids)


def assert_greedy(folder: Path, requests: list[Request], sampling: Sampling, found: list[Completion]) -> None:
    """Every request was answered once, with the tokens that Transformers finds, and some of both endings."""
    answers = {completion.id: completion for completion in found}
    assert len(found) == len(answers) == len(requests)
    expected = greedy_of_transformers(folder, [request.prompt_ids for request in requests], sampling)
    for request, output_ids in zip(requests, expected, strict=True):
        assert answers[request.id].output_ids == output_ids
        assert answers[request.id].finish_reason == ("stop" if output_ids[-1] in sampling.stop_ids else "length")
    assert {completion.finish_reason for completion in found} == {"stop", "length"}


def greedy_of_transformers(folder: Path, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """What Transformers adds to each prompt, in fp32 and one at a time, the stop token included."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {"do_sample": False, "max_new_tokens": sampling.max_tokens, "eos_token_id": sampling.stop_ids}
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            both = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        answers.append(both[0, len(prompt) :].tolist())
    return answers


def assert_logprobs(folder, prompts, found, k):
    """The stored logprobs are those of the JAX model in fp32, raw, on the very same tokens."""
    import jax
    import jax.numpy as jnp

    from jaxdistill.models import load_hf

    model = load_hf(folder)
    longest = max(len(prompts[each.id]) + len(each.output_ids) for each in found)
    ids = np.zeros((len(found), longest), np.int32)
    for row, each in enumerate(found):
        whole = prompts[each.id] + each.output_ids
        ids[row, : len(whole)] = whole
    expected = np.asarray(jax.nn.log_softmax(model(jnp.asarray(ids)), axis=-1))
    for row, each in enumerate(found):
        stored, start = each.logprobs, len(prompts[each.id]) - 1
        own = expected[row, start : start + len(each.output_ids)]  # position t predicts token t+1
        assert stored.ids.shape == (len(each.output_ids), k)
        np.testing.assert_allclose(stored.logprobs, np.take_along_axis(own, stored.ids, 1), atol=2e-3)
        np.testing.assert_allclose(stored.logprobs, -np.sort(-own, axis=1)[:, :k], atol=2e-3)
        drawn = own[np.arange(len(own)), each.output_ids]
        np.testing.assert_allclose(stored.sampled, drawn, atol=2e-3)


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()
