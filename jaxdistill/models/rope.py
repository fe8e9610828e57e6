"""Rotary positions: the frequencies of every kind of scaling, as Hugging Face configs name them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill.models.refusals import GLOBAL, SLIDING, is_number

# what each kind reads from a config, beside `rope_theta`
KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
_REQUIRED = {"linear": ("factor",), "llama3": KEYS["llama3"][:3], "yarn": ("factor",)}
_NUMERIC = {"rope_theta", *(key for keys in KEYS.values() for key in keys)} - {"truncate"}
_HARMLESS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """One kind of rotary positions; keys that a kind does not use stay None."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    @classmethod
    def from_hf(cls, rope: dict[str, Any], theta: float, max_positions: int, where: str) -> Rope:
        """Reads `rope_parameters` (transformers 5) or `rope_scaling` (4).

        Args:
          theta: the base, if `rope` has none.
          max_positions: the original context, if `rope` has none.
        Raises:
          ValueError: an unknown kind, a key that is missing, or one that this kind does not know.
        """
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in KEYS:
            raise ValueError(f"{where}: rope type {kind!r} is not supported; known are {', '.join(KEYS)}.")
        _check_values(rope, where)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"{where}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported (only 1.0)."
            )
        missing = [key for key in _REQUIRED.get(kind, ()) if rope.get(key) is None]
        if missing:
            raise ValueError(f"{where}: rope type {kind!r} needs {', '.join(missing)}.")
        # the default kind ignores what is left over from another; every other key of a scaled kind has an effect
        unknown = sorted(
            k for k in set(rope) - set(KEYS[kind]) - _HARMLESS if kind != "default" and rope[k] is not None
        )
        if unknown:
            raise ValueError(f"{where}: rope type {kind!r} has a key {unknown[0]!r} that is not supported.")
        found = {key: rope.get(key) for key in KEYS[kind]}
        if kind in ("llama3", "yarn") and found["original_max_position_embeddings"] is None:
            found["original_max_position_embeddings"] = max_positions
        return cls(kind=kind, theta=float(rope.get("rope_theta") or theta), **found)

    def to_hf(self) -> dict[str, Any]:
        """`rope_parameters` as transformers 5 writes them."""
        found = {key: getattr(self, key) for key in KEYS[self.kind]}
        return {"rope_type": self.kind, "rope_theta": self.theta} | {k: v for k, v in found.items() if v is not None}

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """(radians a position, fp32 [head_dim / 2]; factor on cos and sin).

        Source: Su et al. 2021, arXiv:2104.09864 (plain); Chen et al. 2023, arXiv:2306.15595 (linear);
        Peng et al. 2023, arXiv:2309.00071, section 3 (yarn); Llama 3.1's reference code (llama3).
        """
        plain = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            assert self.factor
            return (plain / self.factor).astype(np.float32), 1.0
        if self.kind == "llama3":
            return self._llama3(plain).astype(np.float32), 1.0
        if self.kind == "yarn":
            frequencies, scale = self._yarn(plain, head_dim)
            return frequencies.astype(np.float32), scale
        return plain.astype(np.float32), 1.0

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        """Long waves are stretched, short ones kept, those between are blended."""
        assert self.factor and self.low_freq_factor and self.high_freq_factor and self.original_max_position_embeddings
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)  # in the original context
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - smooth) * plain / self.factor + smooth * plain
        return np.where(
            turns < self.low_freq_factor,
            plain / self.factor,
            np.where(turns > self.high_freq_factor, plain, blended),
        )

    def _yarn(self, plain: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
        """A linear ramp over dimensions between stretched and kept, and a temperature on the attention scores."""
        assert self.factor and self.original_max_position_embeddings
        context = self.original_max_position_embeddings

        def dimension(turns: float) -> float:
            return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast or 32), dimension(self.beta_slow or 1)
        if self.truncate is not False:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / ((high - low) or 0.001), 0, 1)
        scale = self.attention_factor
        if scale is None and self.mscale and self.mscale_all_dim:
            scale = _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return plain / self.factor * ramp + plain * (1 - ramp), _mscale(self.factor) if scale is None else scale


def read_rope(config: Mapping[str, Any], theta: float, max_positions: int, where: str) -> Rope:
    """The positions of a model whose layers share them, where both transformers 4 and 5 look for them.

    Args:
      theta, max_positions: the family's, where the config has none.
    Raises:
      ValueError: see `Rope.from_hf`; or two places say different things.
    """
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    top = config.get("rope_theta")
    original = config.get("original_max_position_embeddings")
    found = []
    for name, given in (("rope_parameters", new), ("rope_scaling", old)):
        _check_twice("rope_theta", top, given.get("rope_theta"), name, where)
        rope = Rope.from_hf(dict(given), top or theta, original or max_positions, where)
        if rope.original_max_position_embeddings is not None:
            key = "original_max_position_embeddings"
            _check_twice(key, original, given.get(key), name, where)
        found.append(rope)
    if new and old and found[0] != found[1]:
        raise _disagree(where, new, old)
    return found[0] if new else found[1]


def read_ropes(config: Mapping[str, Any], theta: float, max_positions: int, where: str) -> tuple[Rope, Rope]:
    """Gemma 3's positions: (those of layers that see everything, those of layers with a window).

    Raises:
      ValueError: as `read_rope`.
    """
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    flat = sorted(set(new) - {GLOBAL, SLIDING})
    if flat or not all(isinstance(part, Mapping | None) for part in new.values()):
        raise ValueError(
            f"{where}: rope_parameters of Gemma 3 has one object for {GLOBAL} and one for {SLIDING}, and nothing "
            f"beside them{f', such as {flat[0]}' if flat else ''}; correct it."
        )
    found = []
    for kind, key, base in ((GLOBAL, "rope_theta", theta), (SLIDING, "rope_local_base_freq", 10000.0)):
        given = dict(new.get(kind) or {})
        _check_twice(key, config.get(key), given.get("rope_theta"), f"rope_parameters.{kind}.rope_theta", where)
        base = config.get(key) or base
        read = Rope.from_hf(given, base, max_positions, where)
        if kind == GLOBAL and old:
            # transformers adds it to what is there
            both = Rope.from_hf(given | dict(old), base, max_positions, where)
            if new.get(kind) and both != read:
                raise _disagree(where, new, old)
            if "type" in old and "rope_type" not in old and both.kind != "default":
                raise ValueError(
                    f"{where}: rope_scaling of Gemma 3 says type: {old['type']}, which transformers does not read "
                    "there; write rope_type."
                )
            read = both
        if read.truncate is not None or (
            read.original_max_position_embeddings is not None and config.get("original_max_position_embeddings")
        ):
            raise ValueError(
                f"{where}: rope type {read.kind!r} of Gemma 3 with truncate, or with original_max_position_embeddings "
                "outside of rope_parameters, is not supported: transformers does not read it."
            )
        found.append(read)
    return found[0], found[1]


def _check_values(rope: Mapping[str, Any], where: str) -> None:
    """Whether what is said about positions can be read at all."""
    a, b = rope.get("rope_type"), rope.get("type")
    if a and b and a != b:
        raise ValueError(f"{where}: positions with rope_type: {a} and type: {b}, which disagree; remove the wrong one.")
    for key, value in rope.items():
        if isinstance(value, Mapping) or key in (GLOBAL, SLIDING):
            raise ValueError(
                f"{where}: positions with an object of their own for {key!r}, which this model_type does not have."
            )
        numeric = key in _NUMERIC and value is not None
        if numeric and not (is_number(value) and value > 0):
            raise ValueError(f"{where}: positions with {key}: {value!r}; it has to be a number above 0.")


def _check_twice(key: str, top: Any, inner: Any, name: str, where: str) -> None:
    if top is not None and inner is not None and top != inner:
        raise ValueError(
            f"{where}: {key}: {top} beside {inner} in {name}; programs differ in which they take. Write the right one "
            "in both places, or in rope_parameters alone."
        )


def _disagree(where: str, new: Any, old: Any) -> ValueError:
    return ValueError(
        f"{where}: rope_parameters {dict(new)} and rope_scaling {dict(old)} disagree; transformers 5 takes the second, "
        "and others the first. Write into rope_parameters what you mean, and remove rope_scaling."
    )


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
