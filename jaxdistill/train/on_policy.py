"""On-policy distillation: the student answers problems itself, and the teacher grades every token that it wrote.

Dimension key: N rows, T tokens.

Some rows of a step give up their place: their problems are answered by the student as it is before the step, see
`train.answering`. What it writes is packed into as many rows of the same length, so that nothing is compiled anew, and
adds to the step's one sum: a divergence between both models at every token of the answers, over the whole vocabulary,
or estimated from what servers say of the teacher, see `train.grading`. Sampling has no gradient.

An answer that is cut off is learned from as far as it goes, for no grade waits for its end; both papers sample up to a
fixed length too. GKD averages over an answer's tokens first; here every token of a batch counts alike.

A step's answers are a pure function of its parameters, the seed and the step, so that a run that is resumed samples
the same ones again; where vLLM has older parameters, runs are resumed at steps at which it is given new ones.

Sources: GKD, Agarwal et al. 2023, arXiv:2306.13649, section 3 and algorithm 1 (`fraction` is its lambda); MiniLLM, Gu
et al. 2023, arXiv:2306.08543, of whose gradient of the reverse KL this is the single-step part (section 2.2), without
the rewards of later tokens; "On-Policy Distillation", Thinking Machines Lab 2025, which leaves these out as well and
takes the sampled token's log-ratio for the divergence, whose mean the divergence is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxdistill.config import TrainConfig
from jaxdistill.data.examples import ANSWER, PROMPT, Example
from jaxdistill.data.packing import Row, fill_row, unpack
from jaxdistill.models import join_params, with_params
from jaxdistill.train.answering import Answerer, Question
from jaxdistill.train.distill import Distillation, served_shapes
from jaxdistill.train.feed import TrainRows
from jaxdistill.train.gradients import Batch
from jaxdistill.train.grading import Grader
from jaxdistill.train.program import Program
from jaxdistill.train.step import put_batch

METRICS = ("on_policy_kd", "on_policy_kl", "finished", "rollout_tokens")
"""Means that a step with rollouts has beside its loss: the divergence, in nats times temperature**2; the reverse KL as
the sampled tokens show it, in nats; the share of answers that ended by themselves; tokens of an answer."""


class Rollouts:
    """The student's answers to the problems of the rows whose places they take."""

    def __init__(
        self,
        train: TrainConfig,
        made: Program,
        rows: TrainRows,
        answerer: Answerer,
        grader: Grader | None = None,
        *,
        vocabulary: int,
        seed: int,
    ):
        """
        Args:
          made: the model, with shapes for parameters, the mesh and the shape of a batch.
          grader: a teacher that is elsewhere; none is where it is a part of the step.
          vocabulary: tokens at or above it are padded columns, of which the teacher knows nothing.
        Raises:
          ValueError: a mesh that splits rows, rows that do not divide over the devices, or a first step on policy
            behind the last one.
        """
        assert train.on_policy is not None
        self._settings, self._made, self._rows = train.on_policy, made, rows
        self._answerer, self._grader = answerer, grader
        self._vocabulary, self._seed = vocabulary, seed
        self.count = train.on_policy.rows_of(train.batch_rows)
        _check(train, made, self.count)

    def stored_rows(self, step: int) -> int:
        """How many rows of batch `step` are learned from as they are stored, its first ones."""
        return self._made.shape[0] - (self.count if step >= self._settings.after else 0)

    def resumes(self, step: int) -> bool:
        """Whether a run that is resumed before `step` samples what one does that has come there."""
        return self._answerer.renews(step)

    def __call__(self, step: int, params: Any, frozen: Any) -> tuple[Batch | None, dict[str, float]]:
        """(the rows of rollouts of batch `step`, {finished, rollout_tokens, sampled_tokens}), from these parameters.

        There are none before `on_policy.after`.
        """
        if step < self._settings.after:
            return None, {}
        B, T = self._made.shape
        whole = self._rows.rows_of(step, slice(B - self.count, B))
        asked = self._questions(step, whole)
        model = with_params(self._made.model, join_params(params, frozen))
        found = self._answerer(step, model, list(itertools.chain(*asked)))
        answers = [list(itertools.takewhile(lambda token: token < self._vocabulary, ids)) for ids, _ in found]
        ended = [done and len(kept) == len(ids) for kept, (ids, done) in zip(answers, found, strict=True)]
        filled, beside = fill(asked, answers, T), None
        if self._grader is not None:
            filled |= self._grader(filled)
            beside = served_shapes(self._settings.topk)
        shape, mesh = (self.count, T), self._made.mesh
        batch = put_batch(lambda part: {k: v[part] for k, v in filled.items()}, shape, mesh, beside)
        sampled = sum(map(len, answers))
        return batch, {
            "finished": sum(ended) / len(answers),
            "rollout_tokens": sampled / len(answers),
            "sampled_tokens": sampled,
        }

    def _questions(self, step: int, rows: Row) -> list[list[Question]]:
        """Those of each row, with the seeds of this step."""
        T, most, numbers = self._made.shape[1], self._settings.max_tokens, itertools.count()
        asked = [questions({name: array[i] for name, array in rows.items()}, T, most) for i in range(self.count)]
        return [[dataclasses.replace(q, seed=seed_of(self._seed, step, next(numbers))) for q in row] for row in asked]

    def close(self) -> None:
        """Ends what answers and grades."""
        self._answerer.close()
        if self._grader is not None:
            self._grader.close()


def _check(train: TrainConfig, made: Program, count: int) -> None:
    assert train.on_policy is not None
    if made.mesh.shape["context"] > 1:
        raise ValueError("train.on_policy samples whole rows; set train.mesh.context to 1.")
    ways = made.micro_batches * made.mesh.shape["data"] * made.mesh.shape["fsdp"]
    if count % ways or (made.shape[0] - count) % ways:
        raise ValueError(
            f"train.on_policy.fraction={train.on_policy.fraction} makes {count} of {made.shape[0]} rows rollouts; both "
            f"these and the others must be multiples of micro_batches x data x fsdp = {ways}; change it, or batch_rows."
        )
    if train.on_policy.after >= made.steps:
        raise ValueError(
            f"train.on_policy.after={train.on_policy.after} is not before the end of the {made.steps} steps; lower it."
        )


def graded(train: TrainConfig, distillation: Distillation | None, vocabulary: int | None) -> Distillation | None:
    """How the teacher grades rollouts; None without `train.on_policy`.

    Args:
      distillation: that of the stored rows, with the teacher where it is on the mesh.
      vocabulary: the number of real tokens of student and teacher, where it is behind servers.
    """
    own = train.on_policy
    if own is None:
        return None
    served = own.grader == "server"
    assert served or distillation is not None
    base = distillation if distillation is not None and not served else Distillation(lambda step: jnp.float32(0))
    return dataclasses.replace(
        base,
        share=lambda step: jnp.float32(own.weight),
        ce_weight=0.0,  # the student's own tokens are no targets
        divergence=own.divergence,
        parameter=own.parameter,
        served=served,
        vocabulary=vocabulary if served else base.vocabulary,
    )


def questions(row: Row, row_tokens: int, max_tokens: int) -> list[Question]:
    """The prompts of a packed row, as many as fit into a row with answers of `max_tokens`.

    The first one always does: its answer may have what is left, as the stored one had.
    """
    found: list[Question] = []
    left = row_tokens
    for tokens, regions in unpack(row):
        prompt = list(itertools.takewhile(lambda pair: pair[1] == PROMPT, zip(tokens, regions, strict=True)))
        limit = min(max_tokens, left - len(prompt))
        if limit == max_tokens or (limit > 0 and not found):
            found.append(Question([token for token, _ in prompt], limit))
            left -= len(prompt) + limit
    return found


def seed_of(seed: int, step: int, number: int) -> int:
    """A seed of 31 bits, which all engines take, for answer `number` of a step."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{number}".encode(), digest_size=4).digest()) >> 1


def fill(asked: Sequence[Sequence[Question]], answers: Sequence[Sequence[int]], row_tokens: int) -> Row:
    """Rows [N, T] of the questions and their answers, which stand one after the other.

    All of an answer is trained, its eos too; which of it is thinking does not matter here.
    """
    following = iter(answers)
    rows = []
    for questions_of_row in asked:
        pairs = [(question.prompt, list(next(following))) for question in questions_of_row]
        examples = [Example("", p + a, [PROMPT] * len(p) + [ANSWER] * len(a)) for p, a in pairs]
        rows.append(fill_row(examples, row_tokens))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
