"""Word-level distillation inside the step: the teacher's distributions beside the cross-entropy.

Dimension key: B rows, T tokens, k stored tokens, E and F widths of student and teacher.

The stored kind reads distributions that lie beside the tokens (`data.topk`). The online kind runs a teacher over the
very same packed rows, forward only and outside of the gradient; both models' projections are swept chunk by chunk. The
served kind, of rows that the student has sampled, reads what servers have just said of them (`train.grading`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdistill import hub
from jaxdistill.config import DistillConfig, RunConfig
from jaxdistill.data import topk
from jaxdistill.data.rows import Batches
from jaxdistill.data.topk import TopK
from jaxdistill.losses import (
    Layout,
    chunked_distillation,
    sampled_distillation,
    sampled_reverse_kl,
    sorted_distillation,
    topk_distillation,
)
from jaxdistill.models import Decoder, ModelConfig, abstract_model, params_of, with_params
from jaxdistill.models.adapters import base_of
from jaxdistill.models.orbax import has_begun
from jaxdistill.models.start import load_checked
from jaxdistill.parallel.mesh import RULES
from jaxdistill.records import RunDir
from jaxdistill.tokenization import TokenMap

Sums = tuple[jax.Array, dict[str, jax.Array]]
SERVED = ("served_ids", "served_logprobs", "served_own")
"""What servers say, beside the token that it is about: the teacher's likeliest tokens, int32 [B, T, k], -1 where
nothing is known; their log-probabilities, fp32 [B, T, k]; that of the token itself, fp32 [B, T]."""


def served_shapes(k: int) -> dict[str, tuple[int, ...]]:
    """Of `SERVED`, behind the axes that count tokens."""
    return dict(zip(SERVED, ((k,), (k,), ()), strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """What a step has to know of it; all static but the teacher's parameters, which are given at every step.

    Attributes:
      share: step -> the divergence's weight.
      stored: how distributions lie beside the tokens, where they do: the likeliest tokens, random draws, or the highest
        probabilities of another tokenizer's.
      teacher: online: a model with shapes for parameters.
      served: whether `SERVED` lie beside the tokens, of which each was drawn by the student where the divergence is the
        reverse KL.
      vocabulary: online, served: the number of real tokens, which both models have beside other padded columns.
    """

    share: Callable[[jax.Array], jax.Array]
    ce_weight: float = 1.0
    divergence: str = "forward_kl"
    parameter: float | None = None
    temperature: float = 1.0
    stored: TopK | None = None
    teacher: Decoder | None = None
    served: bool = False
    vocabulary: int | None = None

    def read(self, batch: dict[str, jax.Array], teacher_params: Any) -> Any:
        """What the teacher says of a batch: its hidden states [B, T, F] and projection, or nothing where it is stored.

        To be called outside of what is differentiated.
        """
        if self.teacher is None:
            return None
        teacher = with_params(self.teacher, teacher_params)
        hidden_BTF = teacher.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        return jax.lax.stop_gradient((hidden_BTF, teacher.projection()))

    def loss_sums(
        self,
        model: Decoder,
        hidden_BTE: jax.Array,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
        batch: dict[str, jax.Array],
        said: Any,
        step: jax.Array,
    ) -> Sums:
        """Sum of weights * (ce_weight * -log p(target) + share * divergence), and the sums behind the metrics.

        Args:
          targets_BT, weights_BT: shifted, see `losses.shift`.
          said: what `read` gave.
        """
        share = self.share(step)
        common: dict[str, Any] = {
            "targets": targets_BT,
            "ce_weights": self.ce_weight * weights_BT if self.ce_weight else None,
            "softcap": model.config.final_softcap,
            "dtype": model.dtype,
            "layout": Layout.of(model.mesh),
        }
        head = hidden_BTE, model.projection()
        if self.served:
            total, found = self._served(head, share * weights_BT, batch, common)
        elif self.teacher is None:
            total, found = self._stored(head, share * weights_BT, batch, common)
        else:
            total, _, found = chunked_distillation(
                head[0],
                head[1],
                said[0],
                said[1],
                share * weights_BT,
                divergence=self.divergence,
                parameter=self.parameter,
                temperature=self.temperature,
                teacher_softcap=self.teacher.config.final_softcap,
                vocabulary=self.vocabulary,
                **common,
            )
        return total, found | {"count": jnp.sum(weights_BT)}

    def _served(
        self, head: tuple[jax.Array, jax.Array], weights_BT: jax.Array, batch: dict[str, jax.Array], common: dict
    ) -> Sums:
        common |= {"vocabulary": self.vocabulary}
        ids, logprobs, own = (jnp.roll(batch[name], -1, axis=1) for name in SERVED)
        if self.divergence == "reverse_kl":
            total, _, found = sampled_reverse_kl(*head, ids, logprobs, own, weights_BT, **common)
        else:
            total, _, found = topk_distillation(*head, ids, logprobs, None, weights_BT, **common)
        return total, found | {"teacher_nll": -jnp.sum(weights_BT * own)}

    def _stored(
        self, head: tuple[jax.Array, jax.Array], weights_BT: jax.Array, batch: dict[str, jax.Array], common: dict
    ) -> Sums:
        # a distribution lies beside the token that it is about, and moves to the position that predicts it
        ids, codes, tail = (jnp.roll(batch[name], -1, axis=1) for name in topk.FIELDS)
        weights_BT = jnp.where(codes[..., 0] > 0, weights_BT, 0.0)
        logprobs, rest = topk.log_probabilities(codes, tail, jnp)
        ids = jnp.where(codes > 0, ids, -1)
        assert self.stored is not None
        if self.stored.spans:
            total, _, found = sorted_distillation(head[0], head[1], logprobs, rest, weights_BT, **common)
        elif self.stored.random:
            total, _, found = sampled_distillation(head[0], head[1], ids, jnp.exp(logprobs), None, weights_BT, **common)
        else:
            # what is stored at a temperature is normalized there
            T, normalizer = self.stored.temperature, None if self.stored.temperature == 1 else jnp.zeros_like(rest)
            total, _, found = topk_distillation(
                head[0],
                head[1],
                ids,
                T * logprobs,
                rest,
                weights_BT,
                temperature=T,
                log_normalizer=normalizer,
                **common,
            )
        return total, found


def metrics_of(found: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Means by name, from sums over a whole batch: `ce`, `kd` (in nats, times temperature**2), `teacher_nll`."""
    ce_count, kd_count = (jnp.maximum(found[name], 1e-9) for name in ("ce_count", "kd_count"))
    means = {"ce": found["nll"] / ce_count, "kd": found["kd"] / kd_count, "accuracy": found["hits"] / ce_count}
    return means | ({"teacher_nll": found["teacher_nll"] / kd_count} if "teacher_nll" in found else {})


def share_schedule(config: DistillConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """step -> the divergence's weight: `weight` at the first step, `final_weight` at the last."""
    first = config.weight
    last = first if config.final_weight is None else config.final_weight

    def share(step: jax.Array) -> jax.Array:
        done = jnp.minimum(step.astype(jnp.float32) / max(steps - 1, 1), 1.0)
        done = done if config.schedule == "linear" else 0.5 - 0.5 * jnp.cos(jnp.pi * done)
        return first + (last - first) * done

    return share


def teacher_shape(config: RunConfig) -> ModelConfig | None:
    """The shape of the teacher that is distilled online; None without one."""
    d = config.train.distill
    if d is None or d.source == "stored":
        return None
    folder = base_of(_teacher_folder(config, d))
    return ModelConfig.from_hf(hub.read_config(folder), f"{folder}/config.json")


def _teacher_folder(config: RunConfig, d: DistillConfig) -> Path:
    name = d.teacher or config.traces.teacher
    assert name is not None
    return hub.fetch(name, d.revision if d.teacher else config.traces.revision)


def set_up_distillation(
    config: RunConfig, run: RunDir, mesh: Mesh, steps: int, batches: Batches, columns: int
) -> tuple[Distillation | None, Any, dict[str, Any]]:
    """(what the step has to know, the teacher's parameters, what identifies the teacher), each empty without one.

    Args:
      columns: of the student's projection.
    Raises:
      ValueError: a teacher of another tokenizer, or with a shorter context than the rows.
    """
    d = config.train.distill
    if d is None:
        return None, None, {}
    shared = {"share": share_schedule(d, steps), "ce_weight": d.ce_weight}
    if d.source == "stored":
        if batches.topk is not None and batches.topk.temperature != d.temperature:
            raise ValueError(
                f"train.distill.temperature is {d.temperature}, and the stored distributions were taken at "
                f"{batches.topk.temperature} (traces.logprobs_temperature); make them equal."
            )
        return Distillation(**shared, stored=batches.topk), None, {"topk": batches.topk_origin}
    name = d.teacher or config.traces.teacher
    assert name is not None
    folder = _teacher_folder(config, d)
    vocabulary = same_vocabulary(TokenMap.of(run.tokenizer), TokenMap.of(folder), name, columns)
    rules = {**RULES, "embed": None} if d.replicate else RULES
    check = config.student.check and not has_begun(run.checkpoints)  # what goes on was compared when it began
    loaded = load_checked(str(folder), mesh, rules, config.train.compute_dtype, param_dtype=d.dtype, check=check)
    if batches.row_tokens > loaded.config.max_position_embeddings:
        raise ValueError(
            f"data.row_tokens={batches.row_tokens} is beyond the context of the teacher {name} "
            f"({loaded.config.max_position_embeddings}); lower it, or take another teacher."
        )
    found = Distillation(
        **shared,
        divergence=d.divergence,
        parameter=d.parameter,
        temperature=d.temperature,
        teacher=abstract_model(loaded.config, dtype=config.train.compute_dtype, mesh=mesh),
        vocabulary=vocabulary,
    )
    return found, params_of(loaded), {"teacher": {"name": name, "revision": hub.revision_of(folder)}}


def same_vocabulary(student: TokenMap, teacher: TokenMap, name: str, columns: int) -> int:
    """The number of real tokens of two models with one tokenizer, whatever their padded widths are.

    Raises:
      ValueError: different tokenizers; one token in which they differ is named.
    """
    difference = student.difference(teacher)
    if difference is not None:
        raise ValueError(
            f"train.distill: the tokenizers of the student and of the teacher {name} differ: {difference}. Their "
            "distributions are about different tokens; give the student the teacher's tokenizer, or learn from its "
            "text alone (drop train.distill)."
        )
    assert student.size <= columns  # checked where the student's shape is read
    return student.size
