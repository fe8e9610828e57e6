"""Evaluation while training goes on: loss and token accuracy on held-out rows, accuracy on held-out problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdistill.config import RunConfig
from jaxdistill.data.packing import Row
from jaxdistill.generate import decode
from jaxdistill.models import Decoder, join_params, with_params
from jaxdistill.records import Problem, RunDir, read_records
from jaxdistill.tokenization import decode_response, end_of_turn, load_tokenizer, render_prompts
from jaxdistill.train.feed import TrainRows, in_batches
from jaxdistill.train.gradients import loss_sums

GENERATED_AT_ONCE = 64
REGIONS = {"thinking": (0.0, 1.0, 0.0), "answer": (0.0, 0.0, 1.0)}


class Evaluator:
    """What `train.evaluate` asks for, at any step."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        shared: RunDir,
        rows: TrainRows,
        model: Decoder,
        mesh: Mesh,
        *,
        rows_at_once: int,
    ):
        """
        Args:
          model: with shapes for parameters, see `abstract_model`.
          run: with the student's tokenizer.
          shared: with the held-out problems.
        Raises:
          ValueError: there are no held-out problems.
        """
        settings = config.train.evaluate
        assert settings is not None
        self._settings, self._config, self._model, self._mesh = settings, config, model, mesh
        self._rows_at_once = rows_at_once
        self._tokenizer = load_tokenizer(str(run.tokenizer))
        self._problems: list[Problem] = []
        if settings.problems:
            self._problems = [p for p in _held_out(config, shared) if p.answer is not None][: settings.problems]
            if not self._problems:
                raise ValueError("train.evaluate.problems: no held-out problem has an answer; set it to 0.")
        self._rows: Row | None = rows.stored(rows.held_out) if rows.held_out else None
        self._sums = _make_sums(model, (config.train.thinking_weight, config.train.answer_weight))

    def __call__(self, step: int, params: Any, frozen: Any) -> dict[str, Any]:
        """Measures the parameters after `step` steps: a line for `evaluations.jsonl`."""
        line: dict[str, Any] = {"step": step}
        if self._rows is not None:
            line |= self._row_scores(params, frozen)
        if self._problems:
            line |= self._problem_scores(params, frozen)
        return line

    def _row_scores(self, params: Any, frozen: Any) -> dict[str, Any]:
        assert self._rows is not None
        batches = in_batches(self._rows, self._rows_at_once, self._mesh)
        parts = [jax.device_get(self._sums(params, frozen, batch)) for batch in batches]
        total: dict[str, np.ndarray] = {name: np.zeros(3) for name in parts[0]}
        for part in parts:
            for name, sums in part.items():
                total[name] += sums
        line = {"rows": len(self._rows["tokens"]), "loss": total["all"][0] / max(total["all"][1], 1e-9)}
        for region in REGIONS:
            loss, count, hits = total[region]
            if count:
                line |= {f"{region}_loss": loss / count, f"{region}_accuracy": hits / count}
        return {name: value if isinstance(value, int) else float(value) for name, value in line.items()}

    def _problem_scores(self, params: Any, frozen: Any) -> dict[str, Any]:
        # imported here: sympy takes a second, which a training without held-out problems need not wait for
        from jaxdistill.verify import check_math

        data = self._config.data
        texts = [p.prompt for p in self._problems]
        prompts = render_prompts(self._tokenizer, texts, system=data.system, suffix=data.suffix)
        model = with_params(self._model, join_params(params, frozen))
        outcomes, truncated = [], 0
        for index, ids, finish in _generated(
            model, prompts, max_tokens=self._settings.max_tokens, stop=end_of_turn(self._tokenizer)
        ):
            truncated += finish == "length"
            answer = self._problems[index].answer
            assert answer is not None
            text = decode_response(self._tokenizer, ids)
            outcomes.append(finish == "stop" and check_math(text, answer).outcome == "correct")
        return {
            "problems": len(outcomes),
            "accuracy": sum(outcomes) / len(outcomes),
            "truncated": truncated / len(outcomes),
        }


def _generated(
    model: Decoder, prompts: list[list[int]], *, max_tokens: int, stop: int
) -> Iterator[tuple[int, list[int], str]]:
    batch = min(GENERATED_AT_ONCE, len(prompts))
    seeds = [0] * len(prompts)
    yield from decode(model, prompts, seeds, max_tokens=max_tokens, temperature=0.0, stop_ids=[stop], batch=batch)


def _make_sums(model: Decoder, weights: tuple[float, float]) -> Callable[..., dict[str, jax.Array]]:
    """(params, frozen, batch) -> fp32 [3] (loss, count, hits): `all` by the training's weights, and by region."""
    wanted = {"all": (0.0, *weights), **REGIONS}

    def sums(params: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]:
        whole = with_params(model, join_params(params, frozen))
        found = {}
        for name, region_weights in wanted.items():
            total, more = loss_sums(whole, batch, jnp.array(region_weights, jnp.float32))
            found[name] = jnp.stack([total, more["count"], more["hits"]])
        return found

    return jax.jit(sums, compiler_options=model.compiler_options)


def _held_out(config: RunConfig, shared: RunDir) -> list[Problem]:
    if config.evaluate is None or config.evaluate.problems is None:
        raise ValueError("train.evaluate asks for held-out problems, and the config has none; add `evaluate.problems`.")
    return list(read_records(shared.problems / "heldout", Problem))
