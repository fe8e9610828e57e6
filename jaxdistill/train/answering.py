"""Who answers for the student: the decoder on the training's mesh, or vLLM, which is given the weights again and again.

All processes of a training ask together, and get the same answers. vLLM runs beside the first one.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from jaxdistill.config import OnPolicyConfig, TrainConfig
from jaxdistill.export.hf import export_hf
from jaxdistill.export.writer import by_the_writer
from jaxdistill.generate import decode
from jaxdistill.models import Decoder, abstract_model, merge_lora, params_of, with_params
from jaxdistill.parallel import processes
from jaxdistill.records import RunDir
from jaxdistill.traces import vllm_engine
from jaxdistill.traces.engines import Completion, Request, Sampling

WEIGHTS = "rollout_weights"
"""Beside the checkpoints: what vLLM reads."""
AT_ONCE = 256
"""Rows that are decoded at once, at most."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, and how many tokens its answer may have."""

    prompt: list[int]
    limit: int
    seed: int = 0
    """Of 31 bits."""


Answer = tuple[list[int], bool]
"""(token ids with the one that ended it, whether one did)"""


@runtime_checkable
class Answerer(Protocol):
    """The student, by some engine."""

    def __call__(self, step: int, model: Decoder, asked: Sequence[Question]) -> list[Answer]:
        """The answers in order, a function of the weights that it has at this step and of the questions.

        Raises:
          ValueError: the engine died, or could not answer.
        """
        ...

    def renews(self, step: int) -> bool:
        """Whether the weights that it has at this step are the step's own, so that a run can be resumed there."""
        ...

    def close(self) -> None:
        """Ends what it has started."""


class ByDecoder:
    """The JAX decoder on the training's mesh, every process its part."""

    def __init__(self, settings: OnPolicyConfig, *, stop: int, rows: int, row_tokens: int):
        self._settings, self._stop = settings, stop
        # so many fit into the rows at most: the number does not go by the step, and nothing is compiled anew
        self._batch = min(rows * max(1, row_tokens // settings.max_tokens), AT_ONCE)

    def __call__(self, step: int, model: Decoder, asked: Sequence[Question]) -> list[Answer]:
        found = decode(
            model,
            [question.prompt for question in asked],
            [question.seed for question in asked],
            max_tokens=[question.limit for question in asked],
            temperature=self._settings.temperature,
            stop_ids=[self._stop],
            batch=self._batch,
        )
        answers: list[Answer] = [([], False)] * len(asked)
        for index, ids, reason in found:
            answers[index] = ids, reason == "stop"
        return answers

    def renews(self, step: int) -> bool:
        return True

    def close(self) -> None:
        pass


class ByVLLM:
    """vLLM in a process of its own, which reads the weights from a folder and takes them over in place."""

    def __init__(
        self,
        settings: OnPolicyConfig,
        *,
        stop: int,
        row_tokens: int,
        dtype: Literal["float32", "bfloat16"],
        tokenizer: Path,
        folder: Path,
        log: Path,
    ):
        """
        Args:
          dtype: that the student computes with, for vLLM where `vllm.dtype` is `auto`.
          folder: for the weights, on a disk that the first process sees.
        Raises:
          ValueError: vLLM's context is shorter than a row.
        """
        own = settings.vllm if settings.vllm.dtype != "auto" else dataclasses.replace(settings.vllm, dtype=dtype)
        if own.max_model_len is not None and own.max_model_len < row_tokens:
            raise ValueError(
                f"train.on_policy.vllm.max_model_len={own.max_model_len} is less than data.row_tokens={row_tokens}; "
                "leave it out."
            )
        self._settings, self._tokenizer, self._folder, self._log = settings, tokenizer, folder, log
        self._vllm = dataclasses.replace(own, max_model_len=own.max_model_len or row_tokens)
        self._dtype = "bfloat16" if own.dtype == "bfloat16" else "float32"
        self._sampling = Sampling(
            temperature=settings.temperature, top_p=1.0, max_tokens=settings.max_tokens, stop_ids=[stop]
        )
        self._session: vllm_engine.Session | None = None
        self._begun = False

    def __call__(self, step: int, model: Decoder, asked: Sequence[Question]) -> list[Answer]:
        weights = None
        if not self._begun or self.renews(step):
            weights = self._folder / str(step)
            merged = untied(merge_lora(model))
            # no texts, for vLLM gets and gives token ids
            export_hf(merged, weights, tokenizer=self._tokenizer, card="", dtype=self._dtype, texts=None)
            self._begun = True
        longest = max(question.limit for question in asked)
        found = by_the_writer(lambda: _packed(self._ask(weights, asked), asked, longest))
        packed = processes.from_first(np.zeros((len(asked), 2 + longest), np.int32) if found is None else found)
        return [(row[2 : 2 + row[0]], bool(row[1])) for row in packed.tolist()]

    def _ask(self, weights: Path | None, asked: Sequence[Question]) -> list[Completion]:
        newer = weights
        if self._session is None:
            assert weights is not None
            options = {"vllm": self._vllm, "batch": 0, "log": self._log, "longest": 0}
            self._session, newer = vllm_engine.Session(weights, self._sampling, **options), None
        requests = [Request(str(i), question.prompt, question.seed) for i, question in enumerate(asked)]
        self._session.give_batch(requests, newer)
        found: dict[str, Completion] = {}
        while len(found) < len(requests):
            found |= {completion.id: completion for completion in self._session.take(1.0)}
        if weights is not None:
            _remove_others(weights)
        failed = next((each for each in found.values() if each.error is not None), None)
        if failed is not None:
            raise ValueError(f"train.on_policy: vLLM could not answer ({failed.error}); see {self._log}.")
        return [found[request.id] for request in requests]

    def renews(self, step: int) -> bool:
        # the first step on policy always begins with its own weights
        return step % self._settings.sync_every == 0 or step <= self._settings.after

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
        if processes.is_first():
            shutil.rmtree(self._folder, ignore_errors=True)


def untied(model: Decoder) -> Decoder:
    """The same function with a projection of its own.

    vLLM 0.32 on processors multiplies by a copy of the projection, and renews in place what is in the file alone: the
    copy of a tied one would stay what it was.
    """
    if not model.config.tie_embeddings:
        return model
    config, params = dataclasses.replace(model.config, tie_embeddings=False), params_of(model)
    whole = abstract_model(config, dtype=model.dtype, mesh=model.mesh)
    return with_params(whole, params | {"head": params["embed"]})


def set_up_answerer(train: TrainConfig, run: RunDir, row_tokens: int, stop: int) -> Answerer:
    """What `train.on_policy.rollouts` asks for.

    Args:
      stop: the token that ends an answer.
    Raises:
      ValueError: as `ByVLLM`.
    """
    own = train.on_policy
    assert own is not None and train.compute_dtype != "auto", "the training has settled it"
    if own.rollouts == "jax":
        return ByDecoder(own, stop=stop, rows=own.rows_of(train.batch_rows), row_tokens=row_tokens)
    return ByVLLM(
        own,
        stop=stop,
        row_tokens=row_tokens,
        dtype=train.compute_dtype,
        tokenizer=run.tokenizer,
        folder=run.checkpoints / WEIGHTS,
        log=run.root / "vllm-student.log",
    )


def _packed(found: Sequence[Completion], asked: Sequence[Question], longest: int) -> np.ndarray:
    """A row for each answer: its length, whether it ended by itself, and its tokens, cut to the question's limit."""
    packed = np.zeros((len(asked), 2 + longest), np.int32)
    for row, completion, question in zip(packed, found, asked, strict=True):
        ids = completion.output_ids[: question.limit]
        row[0], row[1] = len(ids), completion.finish_reason == "stop" and len(ids) == len(completion.output_ids)
        row[2 : 2 + len(ids)] = ids
    return packed


def _remove_others(folder: Path) -> None:
    """Weights of steps before."""
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
