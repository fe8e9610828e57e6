"""Tokenizers, and the one way in which prompts and responses become token ids.

Prompt and response are tokenized apart and concatenated, so that no merge crosses the boundary. The prompt goes through
the chat template; the response never does, because the templates of Qwen3 and R1 drop the text between `<think>` tags.
It ends with the token that ends the assistant's turn in the template, which need not be the tokenizer's eos.

Control tokens that a problem or a response quotes are text (`jaxdistill.control`). A server's chat endpoint makes
control tokens of them; our own engines send token ids, and do not.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxdistill import control, hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PROMPTS = "prompts.json"
"""In a run's tokenizer folder, and never in an export: the day that its prompts are of."""
_DAY = "jaxdistill_day"


def load_tokenizer(name: str, revision: str | None = None, *, day: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a hub repository or `demo`.

    Args:
      day: for templates that write the date, `2026-01-31`; absent, the one in the folder's `prompts.json`, or today.
        The tokenizer keeps it, so that the same chat is always the same text.
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
    _read_as_transformers(tokenizer, folder)
    known = json.loads((folder / PROMPTS).read_text()) if (folder / PROMPTS).is_file() else {}
    # left behind by whoever saved it: transformers sets them anew at every call, and here they would cut what is long
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.init_kwargs[_DAY] = day or known.get("day") or datetime.date.today().isoformat()
    return tokenizer


def _read_as_transformers(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Cuts words as transformers 5 does it in every qwen2 checkpoint, whatever its tokenizer.json says.

    What else may differ is found where it can be mended (`jaxdistill.served`).
    """
    import transformers
    from tokenizers import decoders

    path = folder / "config.json"
    if not path.is_file() or hub.read_config(folder).get("model_type") != "qwen2":
        return
    ours = tokenizer.backend_tokenizer
    # transformers 4 reads tokenizer.json; and what is not byte-level would lose its spaces
    if not hasattr(transformers, "TokenizersBackend") or not isinstance(ours.decoder, decoders.ByteLevel):
        return
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    theirs = Qwen2Tokenizer().backend_tokenizer
    ours.normalizer, ours.pre_tokenizer, ours.decoder = theirs.normalizer, theirs.pre_tokenizer, theirs.decoder


def day_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The day that the tokenizer's prompts are of."""
    return str(tokenizer.init_kwargs.setdefault(_DAY, datetime.date.today().isoformat()))


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
    """`render_prompt` of many problems, several times faster; control tokens in a problem are text."""
    chats = chats_of([quote(tokenizer, problem) for problem in problems], system, suffix)
    return encode_prompts(tokenizer, render_chats(tokenizer, chats))


def chats_of(problems: list[str], system: str | None = None, suffix: str = "") -> list[list[dict[str, str]]]:
    """The chats that ask for problems."""
    first = [{"role": "system", "content": system}] if system else []
    return [[*first, {"role": "user", "content": problem + suffix}] for problem in problems]


def quote(tokenizer: PreTrainedTokenizerBase, problem: str) -> str:
    """A problem for a chat: control tokens in it are marked, so that `encode_prompts` takes them for text."""
    return control.quote(problem, control.in_problems(tokenizer))


def render_chats(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]]) -> list[str]:
    """The text of chats by the tokenizer's template, up to where the assistant's response begins.

    Marks of quoted control tokens stay in it, for `encode_prompts`; `control.clean` takes them out for people.

    Raises:
      ValueError: the template refuses such a chat, as some refuse a system prompt.
    """
    from jinja2 import TemplateError

    try:
        return [str(text) for text in _render(tokenizer, chats, add_generation_prompt=True)]
    except TemplateError as error:
        roles = ", ".join(dict.fromkeys(message["role"] for chat in chats for message in chat))
        raise ValueError(
            f"{tokenizer.name_or_path}: the chat template fails on messages of {roles} ({error}); "
            "leave the system prompt out (data.system; traces: a style without one), or use a model that takes it."
        ) from None


def _render(tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]], **more: bool) -> Any:
    now = now_of(tokenizer)
    return tokenizer.apply_chat_template(chats, tokenize=False, strftime_now=now, **more)  # type: ignore[arg-type]


def now_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What a template calls as `strftime_now`: the clock stands at the tokenizer's day."""
    return datetime.datetime.fromisoformat(day_of(tokenizer)).strftime


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of rendered prompts; special tokens are those that the texts name, but for marked quotes."""
    return [ids for ids, _ in control.encode(texts, control.in_problems(tokenizer))]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of one response, with the token that ends the assistant's turn."""
    return encode_responses(tokenizer, [response])[0][0]


def encode_responses(tokenizer: PreTrainedTokenizerBase, responses: list[str]) -> list[tuple[list[int], list[int]]]:
    """For each response its token ids, with the token that ends the turn, and where each token's text starts.

    Returns:
      (ids, starts) a response: `starts[i]` is the offset of token i in the text, in characters; the turn's end starts
      at the text's.
    """
    quoted, end = control.in_responses(tokenizer), end_of_turn(tokenizer)
    found = control.encode([control.quote(r, quoted) for r in responses], quoted)
    return [([*ids, end], [*starts, len(r)]) for (ids, starts), r in zip(found, responses, strict=True)]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends the assistant's turn: the first special token that the template writes behind a response.

    That is Gemma's `<end_of_turn>`, not its `<eos>`, and `<|im_end|>` of a base model that was given ChatML. White
    space before it, and what comes behind it, is not the student's to write, for generation stops there. A template
    that writes text alone behind a response has nothing that an engine stops at: then it is the tokenizer's eos.
    """
    return _end_of_turn(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=16)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    from jinja2 import TemplateError

    eos, answer = tokenizer.eos_token_id, "Forty-two."
    assert isinstance(eos, int)
    chat = [{"role": "user", "content": "6 * 7 = ?"}, {"role": "assistant", "content": answer}]
    try:
        text = str(_render(tokenizer, [chat], add_generation_prompt=False)[0])
    except (TemplateError, TypeError, LookupError, ValueError, AttributeError):  # made for prompts alone
        return eos
    behind = text.rpartition(answer)[2] if answer in text else ""
    places = [(behind.find(name), -len(name), i) for name, i in special_tokens(tokenizer).items() if name in behind]
    return int(min(places)[2]) if places else eos


@functools.lru_cache(maxsize=16)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens, text -> id: those with a name, as eos, and those that tokenizer.json calls so."""
    found = {token.content: int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return found | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def decode_response(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], tags: tuple[str, ...] = ("<think>", "</think>")
) -> str:
    """The text of generated ids: special tokens left out, thinking's `tags` kept even where they are special tokens."""
    keep = {tokenizer.convert_tokens_to_ids(tag) for tag in tags}
    drop = set(special_tokens(tokenizer).values()) - keep
    return str(tokenizer.decode([i for i in ids if i not in drop], skip_special_tokens=False))


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the template's end of the turn, the tokenizer's eos, and what the configs name."""
    return sorted({tokenizer.eos_token_id, end_of_turn(tokenizer), *config_stops(folder)})


def config_stops(folder: Path) -> list[int]:
    """Tokens that end a response by a folder's `generation_config.json` and `config.json`."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            eos = json.loads((folder / name).read_text()).get("eos_token_id")
            found.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return sorted(found)
