"""Chat templates, as far as the response has to fit behind them.

A response never goes through a chat template: Qwen3's and R1's drop the text between `<think>` tags. But a prompt does,
and what its last characters say decides how the response has to begin: R1-Distill's template ends with an opened
`<think>`, Qwen3's can end with a closed, empty pair, and most end with the assistant's header alone.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxdistill import progress
from jaxdistill.data.tokenizer import CHAT_TEMPLATE
from jaxdistill.tokenization import chats_of, decode_response, encode_prompts, render_chats, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<think>", "</think>"
EMPTY_THINKING = f"{OPEN}\n{CLOSE}\n"
PLAIN = (
    "{% if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
# some tokenizers name <|im_start|> itself as their BOS, and it stands at the start as it is
CHATML = (
    "{% if bos_token is defined and bos_token and bos_token != '<|im_start|>' %}{{ bos_token }}{% endif %}"
    + CHAT_TEMPLATE
)
BUILT_IN = {"plain": PLAIN, "chatml": CHATML}
"""What `data.chat_template` may name instead of a file."""
PROBLEM = "1 + 1 = ?"
_MARKERS = re.compile(r"<\|(\w+)\|>")


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a template's prompt ends."""

    thinking: Literal["none", "open", "closed"]
    space: str
    """White space behind the tag that it ends with; empty without one."""


def ending_of(prompt: str) -> Ending:
    """How a rendered prompt ends: with the assistant's header, an opened `<think>`, or a closed pair."""
    bare = prompt.rstrip()
    if bare.endswith(OPEN):
        return Ending("open", prompt[len(bare) :])
    if bare.endswith(CLOSE):
        return Ending("closed", prompt[len(bare) :])
    return Ending("none", "")


def check_template(
    tokenizer: PreTrainedTokenizerBase, response: Literal["reasoning", "answer"], system: str | None, suffix: str
) -> Ending:
    """Renders one prompt, and says how every prompt of this template ends.

    Raises:
      ValueError: the template refuses the chat (some know no system role), leaves the problem out, closes the thinking
        that is to be learned, starts with two BOS, or is ChatML without its tokens; or the tokenizer loses `<think>`.
    """
    ids = render_prompt(tokenizer, PROBLEM, system=system, suffix=suffix)
    text = str(tokenizer.decode(ids, skip_special_tokens=False))
    if PROBLEM not in text:
        raise ValueError(
            f"the student's chat template leaves the problem out of the prompt ({text[:80]!r}); it may want messages "
            f"of parts, which have none here; set data.chat_template ({', '.join(BUILT_IN)} or a file)."
        )
    shown = render_chats(tokenizer, chats_of([PROBLEM], system, suffix))[0]
    if system and system.strip() not in shown:
        raise ValueError(
            f"the student's chat template leaves the system prompt out ({shown[:80]!r}); leave data.system out, or set "
            f"data.chat_template ({', '.join(BUILT_IN)} or a file)."
        )
    _check_tokens(tokenizer, ids)
    ending = ending_of(text)
    if ending.thinking == "closed" and response == "reasoning":
        raise ValueError(
            "the student's chat template closes the thinking before the response begins, so that no reasoning can be "
            f"learned behind it; set data.chat_template ({', '.join(BUILT_IN)} or a file), or data.response: answer."
        )
    tags = tokenizer.encode(EMPTY_THINKING, add_special_tokens=False)
    if decode_response(tokenizer, tags).split() != [OPEN, CLOSE]:
        raise ValueError("the student's tokenizer does not keep <think> and </think>; use one that does.")
    return ending


def _check_tokens(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> None:
    """What a template takes for granted of the tokenizer."""
    written = [f"<|{name}|>" for name in dict.fromkeys(_MARKERS.findall(str(tokenizer.chat_template)))]
    missing = [text for text, ids in zip(written, encode_prompts(tokenizer, written), strict=True) if len(ids) > 1]
    if missing:
        found = f"the chat template writes {', '.join(missing)}, and the tokenizer has no such token"
        if set(missing) & {"<|im_start|>", "<|im_end|>"}:
            raise ValueError(
                f"{found}: a turn would begin and end with several tokens of text, at which nothing stops; use "
                "data.chat_template: plain, or a template in the tokenizer's own tokens, or a tokenizer that has these."
            )
        progress.say(f"  {found}: it is several tokens of text; look whether this template belongs to this tokenizer")
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    if prompt[:2] == [bos, bos]:
        raise ValueError(
            f"the chat template starts a prompt with two {tokenizer.bos_token}; let it write one (data.chat_template)."
        )
    if prompt[:1] != [bos] and tokenizer.encode("x")[:1] == [bos]:
        progress.say(
            f"  the chat template starts without the {tokenizer.bos_token} with which the tokenizer starts texts; if "
            "the student was trained with it, put {{ bos_token }} in front (data.chat_template)"
        )


def response_text(response: str, content: str, wanted: Literal["reasoning", "answer"], ending: Ending) -> str:
    """What the student is to write behind its prompt: the trace as it is, or its answer behind an empty thinking.

    Prompt and response together hold exactly one pair of tags, whatever of it the teacher's prompt or the student's
    template has set: what the student's prompt has already is left out, what the teacher's had is put back.

    Args:
      response: the teacher's whole text.
      content: the part of it behind `</think>`.
    """
    if ending.thinking == "closed":
        return content
    if wanted == "answer":
        text = EMPTY_THINKING + content
    elif CLOSE in response and OPEN not in response:  # the teacher's prompt had opened it
        text = f"{OPEN}\n{response}"
    else:
        text = response
    if ending.thinking == "none":
        return text
    if not text.lstrip().startswith(OPEN):  # no thinking at all: close at once what the prompt opens
        return f"{CLOSE}\n{text}"
    text = text.lstrip().removeprefix(OPEN)
    return text.removeprefix(ending.space) if text.startswith(ending.space) else text.lstrip("\n")


def template_text(name: str) -> str:
    """The text that `data.chat_template` stands for.

    Raises:
      ValueError: neither a built-in one nor a file.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    file = Path(name).expanduser()
    if not file.is_file():
        raise ValueError(f"data.chat_template: {name} is no file; built in are {', '.join(BUILT_IN)}.")
    return file.read_text()
