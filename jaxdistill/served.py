"""What other programs make of a folder's tokenizer: transformers' AutoTokenizer, which vLLM asks, too.

Ours is tokenizer.json as it stands. AutoTokenizer may put a class of its own before it, by `tokenizer_class` or by the
model's type, and some classes of transformers 5 bring a pre-tokenizer of their own: then the same text has other ids,
and a student meets prompts that it was not trained on. So both are compared, when the run's tokenizer is written and
when the student is exported.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxdistill import control, hub
from jaxdistill.tokenization import chats_of, encode_prompts, end_of_turn, load_tokenizer, now_of, quote, render_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_CLASS = "PreTrainedTokenizerFast"
"""The class that is tokenizer.json and nothing else, in transformers 4 and 5."""
PROBES = (
    "Ned has 60 apples, Bob's 1,234,567.89 more: 3*x^2 - 5 = 0.\n\n\tI'm  sure   it isn't 007.\r\n",
    "def f(x):\n    return {'a': [1, 2]}  # ok\n\n\n",
    "<think>\nSo \\boxed{\\frac{1}{2}}.\n</think>\n\n",
    "na\u00efve cafe\u0301 \u00bd \u2260 \u6f22\u5b57 \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f600\u200b\u00a0",
    " ",
)
"""Texts in which tokenizers differ: numbers, contractions, white space, code, tags, several scripts."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Texts of a run."""

    problems: Sequence[str] = ()
    responses: Sequence[str] = ()
    system: str | None = None
    suffix: str = ""


def difference(ours: PreTrainedTokenizerBase, folder: Path, sample: Sample) -> str | None:
    """In what AutoTokenizer, asked for a folder, first differs from a tokenizer of ours; None if in nothing.

    Compared are the special ids, the chat template, the rendered chats, the ids of whole prompts, of responses and of
    `PROBES`, and the text of the ids.
    """
    from transformers import AutoTokenizer

    try:
        theirs: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever it is, nobody could load it
        return f"transformers does not load the tokenizer: {' '.join(str(error).split())[:300]}"
    by = f"by transformers' {type(theirs).__name__}"
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "chat_template"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        # a template may be stored with a line's end or without
        if mine != other and not (isinstance(mine, str) and isinstance(other, str) and mine.strip() == other.strip()):
            return f"{name} is {str(mine)[:60]!r}, and {str(other)[:60]!r} {by}"
    chats = chats_of([quote(ours, problem) for problem in sample.problems], sample.system, sample.suffix)
    rendered = render_chats(ours, chats) if chats else []
    more: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "strftime_now": now_of(ours)}
    for chat, mine in zip(chats, rendered, strict=True):
        other = theirs.apply_chat_template(chat, **more)
        if mine != other:
            return f"a prompt is {_around(mine, other)} {by}"
    # quoted control tokens are text for us alone
    texts = [text for text in rendered if control.MARK not in text]
    pattern = control.in_responses(ours).pattern
    texts += [text for text in (*sample.responses, *PROBES) if not pattern.search(text)]
    other_ids = theirs(texts, add_special_tokens=False)["input_ids"]
    for text, mine, other in zip(texts, encode_prompts(ours, texts), other_ids, strict=True):
        if mine != other:
            return f"{_ids(ours, theirs, text, mine, other)} {by}"
        if ours.decode(mine) != theirs.decode(other):
            return f"the text of {mine[:8]}... is {_around(str(ours.decode(mine)), str(theirs.decode(other)))} {by}"
    return None


def check_served(folder: Path, ours: PreTrainedTokenizerBase, sample: Sample) -> None:
    """Raises ValueError unless a finished export gives transformers the ids and the ends that training used."""
    found = difference(ours, folder, sample)
    if found is None and (folder / "config.json").is_file():
        found = _unknown_end(folder, end_of_turn(ours))
    if found is not None:
        raise ValueError(
            f"export: the tokenizer that was trained with and the exported one differ: {found}; nothing was exported. "
            "Run `prepare` again with this version of transformers, or set export.check: none if you know why."
        )


def _unknown_end(folder: Path, end: int) -> str | None:
    from transformers import GenerationConfig

    known = GenerationConfig.from_pretrained(folder).eos_token_id
    if end not in (known if isinstance(known, list) else [known]):
        return f"a response ends with the token {end}, and generation_config.json stops at {known}"
    vocabulary = hub.read_config(folder).get("vocab_size")
    if vocabulary is not None and end >= vocabulary:
        return f"a response ends with the token {end}, and the model has {vocabulary}"
    return None


def settle(folder: Path, model_type: str) -> str | None:
    """Writes a tokenizer's folder so that AutoTokenizer reads it as we do, beside a model of this type.

    Where transformers goes by `tokenizer_class`, that becomes the plain class, which is tokenizer.json. Where it goes
    by the model's type alone (qwen2), tokenizer.json gets the pre-tokenizer that transformers would put in its place:
    then every program cuts words alike, and training does, too.

    Returns:
      What was changed, for people; None if nothing.
    Raises:
      ValueError: they cannot be made to agree.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "tokenizer"

        def found() -> str | None:
            shutil.copytree(folder, place, dirs_exist_ok=True)
            (place / "config.json").write_text(json.dumps({"model_type": model_type}))
            return difference(load_tokenizer(str(folder)), place, _SAMPLE)

        first = found()
        if first is None:
            return None
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text()) if path.is_file() else {}
        was = settings.get("tokenizer_class")
        settings["tokenizer_class"] = PLAIN_CLASS
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        if found() is None:
            return f"tokenizer_class is now {PLAIN_CLASS} instead of {was}, under which {first}"
        # a class that needs an unknown token adds one, for which the model has no embedding
        settings = {"unk_token": str(load_tokenizer(str(folder)).eos_token)} | settings
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        found()
        before = _read(folder, PROBES[0])
        _take_words(folder / "tokenizer.json", place)
        last = found() or (None if _read(folder, PROBES[0]) == before else f"text is lost, as in {before[:40]!r}")
    if last is not None:
        raise ValueError(
            f"transformers reads this tokenizer otherwise in a {model_type} model: {last}; give the student another "
            "tokenizer, or start from another architecture (qwen3 and llama take any)."
        )
    return f"words are cut as transformers does it in every {model_type} model; as the files had it, {first}"


def _read(folder: Path, text: str) -> str:
    """A text as its ids have it."""
    tokenizer = load_tokenizer(str(folder))
    return str(tokenizer.decode(encode_prompts(tokenizer, [text])[0]))


def _take_words(path: Path, place: Path) -> None:
    """Puts AutoTokenizer's normalizer, pre-tokenizer and decoder into a tokenizer.json."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    theirs = json.loads(tokenizer.backend_tokenizer.to_str())
    state = json.loads(path.read_text())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        state[part] = theirs[part]
    path.write_text(json.dumps(state, ensure_ascii=False))


_SAMPLE = Sample(problems=["Ned has 60 apples. Bob's got 9 fewer. How many?\nAnswer."])


def _around(a: str, b: str) -> str:
    """Where two texts part, for people."""
    at = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    start = max(0, at - 20)
    return f"{a[start : at + 20]!r}, and {b[start : at + 20]!r}"


def _ids(ours: Any, theirs: Any, text: str, a: Sequence[int], b: Sequence[int]) -> str:
    at = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    mine, other = ours.convert_ids_to_tokens(list(a[at : at + 4])), theirs.convert_ids_to_tokens(list(b[at : at + 4]))
    return (
        f"{text[:40]!r}... has {len(a)} ids, and {len(b)}, the first difference at {at} ({list(a[at : at + 4])} "
        f"{mine}, and {list(b[at : at + 4])} {other})"
    )
