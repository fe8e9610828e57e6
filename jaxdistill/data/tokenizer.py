"""A small byte-level BPE tokenizer, for students from scratch.

It keeps what reasoning models need: one token a digit, `<think>` and `</think>` as single ordinary tokens (so that
decoding keeps them), and a chat template in the ChatML form of Qwen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
THINK_TAGS = ("<think>", "</think>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Trains a tokenizer on `texts` and writes its files to `folder`; deterministic.

    Raises:
      ValueError: `vocab_size` is too small for the 256 bytes and the special tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    least = 256 + 3 + len(THINK_TAGS)
    if vocab_size < least:
        raise ValueError(f"student.tokenizer_vocab is {vocab_size}; the bytes and special tokens alone need {least}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THINK_TAGS),
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # the roles stand in every prompt, and the tags are tokens of their own
    plain = (t.replace(THINK_TAGS[0], "").replace(THINK_TAGS[1], "") for t in texts)
    tokenizer.train_from_iterator((f"user\n{t}\nassistant\n" for t in plain), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in THINK_TAGS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
