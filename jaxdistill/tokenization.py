"""Tokenizers, and the one way in which prompts and responses become token ids.

Prompt and response are tokenized apart and concatenated, so that no merge crosses the boundary. The prompt goes through
the chat template; the response never does, because the templates of Qwen3 and R1 drop the text between `<think>` tags.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jaxdistill import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a hub repository or `demo`.

    Raises:
      ValueError: none there, no chat template, or no eos token.
    """
    # not AutoTokenizer, which imports torch: tokenizer.json says everything, and this starts in a fifth of the time
    from transformers import PreTrainedTokenizerFast

    folder = hub.fetch(name, revision, weights=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{folder}: the tokenizer has no chat template; add chat_template.jinja, or use an instruct model's."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no eos token; set eos_token in tokenizer_config.json.")
    return tokenizer


@dataclasses.dataclass(frozen=True)
class TokenMap:
    """Which text each token id stands for: two models with equal maps have one vocabulary, however padded."""

    ids: dict[str, int]

    @classmethod
    def of(cls, folder: Path) -> TokenMap:
        """The map of a checkpoint's `tokenizer.json`, added tokens included."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True))

    @property
    def size(self) -> int:
        """Ids are below it."""
        return max(self.ids.values()) + 1

    @property
    def fingerprint(self) -> str:
        """A short hash, equal exactly if the maps are."""
        return hashlib.sha256(json.dumps(sorted(self.ids.items())).encode()).hexdigest()[:16]

    def difference(self, other: TokenMap) -> str | None:
        """In what two maps differ, for people; None if they are equal."""
        if self.ids == other.ids:
            return None
        token = min(self.ids.items() ^ other.ids.items(), key=lambda item: (item[1], item[0]))[0]
        return f"{token!r} is {self.ids.get(token, 'no token')} and {other.ids.get(token, 'no token')}"


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, problem: str, *, system: str | None = None, suffix: str = ""
) -> list[int]:
    """Token ids up to where the assistant's response begins."""
    return render_prompts(tokenizer, [problem], system=system, suffix=suffix)[0]


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, problems: list[str], *, system: str | None = None, suffix: str = ""
) -> list[list[int]]:
    """`render_prompt` of many problems, several times faster."""
    first = [{"role": "system", "content": system}] if system else []
    return encode_prompts(
        tokenizer,
        render_chats(tokenizer, [[*first, {"role": "user", "content": problem + suffix}] for problem in problems]),
    )


def render_chats(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]]) -> list[str]:
    """The text of chats by the tokenizer's template, up to where the assistant's response begins.

    Raises:
      ValueError: the template refuses such a chat, as some refuse a system prompt.
    """
    from jinja2 import TemplateError

    try:
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(dict.fromkeys(message["role"] for chat in chats for message in chat))
        raise ValueError(
            f"{tokenizer.name_or_path}: the chat template fails on messages of {roles} ({error}); "
            "leave the system prompt out (data.system; traces: a style without one), or use a model that takes it."
        ) from None
    return [str(text) for text in texts]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of rendered prompts; special tokens are those that the texts name."""
    return [e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of one response, with the eos that ends the assistant's turn."""
    return encode_responses(tokenizer, [response])[0][0]


def encode_responses(tokenizer: PreTrainedTokenizerBase, responses: list[str]) -> list[tuple[list[int], list[int]]]:
    """For each response its token ids, with the eos that ends the assistant's turn, and where each token's text starts.

    Returns:
      (ids, starts) a response: `starts[i]` is the offset of token i in the text, in characters; eos starts at its end.
    """
    found = tokenizer.backend_tokenizer.encode_batch(responses, add_special_tokens=False)
    return [
        ([*e.ids, tokenizer.eos_token_id], [*(a for a, _ in e.offsets), len(r)])
        for e, r in zip(found, responses, strict=True)
    ]


def decode_response(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], tags: tuple[str, ...] = ("<think>", "</think>")
) -> str:
    """The text of generated ids: special tokens left out, thinking's `tags` kept even where they are special tokens."""
    keep = {tokenizer.convert_tokens_to_ids(tag) for tag in tags}
    drop = set(tokenizer.all_special_ids) - keep
    return str(tokenizer.decode([i for i in ids if i not in drop], skip_special_tokens=False))


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the tokenizer's eos, and what `generation_config.json` and `config.json` name."""
    import json

    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            eos = json.loads((folder / name).read_text()).get("eos_token_id")
            found.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return sorted(found)
