"""Codec of a teacher's next-token distributions: k tokens and one tail, at a fixed width a token.

Dimension key: T tokens, k stored tokens of each.

A token takes ceil(k * b / 8) + 2 k + 2 bytes: k ids of b = ceil(log2 V) bits, k log-probabilities of 16 bits, and the
16-bit logarithm of the mass of all other tokens. With Qwen2.5's V = 151,936 (18 bits) that is

    k        8    16    32    64
    bytes   36    70   138   274

A code c > 0 stands for a log-probability of (1 - c) / 2048 nats, so that 16 bits reach from 0 to -32, where less than
1e-13 is left to be told; 0 is no mass at all. Of a likely and of an unlikely token alike, rounding is off by at most
2**-12 nats: fp16, which takes as much, is off by 2**-11 of the logarithm itself, 16 times as much at -8. What rounding
does to the sum of all is taken back on reading (`log_probabilities`), with the tail, which is no renormalisation to k
tokens. What is then left of it:

- KL(teacher || stored) is at most 2**-25 = 3e-8 nats, by Hoeffding's lemma;
- a student's KL of D nats reads wrong by at most (D + sqrt(2 D)) / 2000 + 1e-7: 1e-3 of a nat at D = 0.7.

All zeros is a token without a distribution, as prompts and padding are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

FILE = "topk.json"
"""Beside the rows: the codec, and where the distributions are from."""
STEP = 2.0**-11
"""Nats between two codes."""
LAST = (1 << 16) - 1
FIELDS = ("topk_ids", "topk_codes", "topk_tail")
"""What `TopK.unpack` gives: int32 [T, k], uint16 [T, k], uint16 [T]."""

STORED_DTYPES = dict(zip(FIELDS, (np.int32, np.uint16, np.uint16), strict=True))


def stored_shapes(k: int) -> dict[str, tuple[int, ...]]:
    """Of `FIELDS`, behind the axes that count tokens."""
    return dict(zip(FIELDS, ((k,), (k,), ()), strict=True))


@dataclasses.dataclass(frozen=True)
class TopK:
    """The shape of stored distributions.

    Attributes:
      k: tokens stored for each.
      vocabulary: ids are below it.
      random: whether the k are drawn from the teacher (arXiv:2503.16870), with their shares of the draws in place of
        probabilities and no tail, instead of its likeliest.
      spans: whether the tokens are another tokenizer's, so that their probabilities alone say something.
      temperature: divided the teacher's logits.
    """

    k: int
    vocabulary: int
    random: bool = False
    spans: bool = False
    temperature: float = 1.0

    def __post_init__(self):
        if not 1 <= self.k <= self.vocabulary:
            raise ValueError(f"data.topk={self.k}, of a vocabulary of {self.vocabulary} tokens; set 1 to that number.")

    @property
    def bits(self) -> int:
        """Of an id."""
        return max(1, (self.vocabulary - 1).bit_length())

    @property
    def width(self) -> int:
        """Bytes of a token."""
        return -(-self.k * self.bits // 8) + 2 * self.k + 2

    def pack(self, ids: np.ndarray, codes: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """`FIELDS` -> uint8 [T, width]."""
        bits = (ids[..., None] >> np.arange(self.bits, dtype=np.int32)) & 1
        packed = np.packbits(bits.astype(np.uint8).reshape(len(ids), -1), axis=1, bitorder="little")
        numbers = np.concatenate([codes, tail[:, None]], axis=1).astype("<u2")
        return np.concatenate([packed, numbers.view(np.uint8)], axis=1)

    def unpack(self, data: np.ndarray) -> dict[str, np.ndarray]:
        """Inverse of `pack`, by the names of `FIELDS`."""
        split = self.width - 2 * self.k - 2
        bits = np.unpackbits(data[:, :split], axis=1, count=self.k * self.bits, bitorder="little")
        bits = bits.reshape(len(data), self.k, self.bits)
        # whole bytes again, which is faster than a sum over bits
        octets = np.packbits(bits, axis=2, bitorder="little")
        ids = np.zeros((len(data), self.k), np.int32)
        for at in range(octets.shape[2]):
            ids |= octets[..., at].astype(np.int32) << (8 * at)
        numbers = np.ascontiguousarray(data[:, split:]).view("<u2").astype(np.uint16)
        return dict(zip(FIELDS, (ids, numbers[:, :-1], numbers[:, -1]), strict=True))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TopK:
        return cls(**{f.name: data[f.name] for f in dataclasses.fields(cls)})


def codes_of(logprobs: np.ndarray) -> np.ndarray:
    """Log-probabilities, in nats, as codes: uint16 of the same shape; -inf is 0, what is below -32 is -32."""
    scaled = np.rint(-np.maximum(np.asarray(logprobs, np.float64), -1e6) / STEP)
    codes = np.clip(scaled, 0, LAST - 1) + 1
    return np.where(np.isneginf(logprobs), 0, codes).astype(np.uint16)


def log_probabilities(codes: Any, tail: Any, xp: Any = np) -> tuple[Any, Any]:
    """Codes [..., k] and [...] -> (log-probabilities [..., k], the mass of all others [...]), fp32, of sum 1.

    Args:
      xp: NumPy, or jax.numpy.
    """
    both = xp.concatenate([codes, tail[..., None]], axis=-1).astype(xp.int32)
    logs = xp.where(both > 0, (1 - both) * xp.float32(STEP), -xp.inf)
    total = xp.sum(xp.exp(logs), axis=-1, keepdims=True)
    logs = logs - xp.log(xp.where(total > 0, total, xp.float32(1)))
    return logs[..., :-1], xp.exp(logs[..., -1])


def encode(ids: np.ndarray, logprobs: np.ndarray, drawn: np.ndarray, own: np.ndarray, codec: TopK) -> np.ndarray:
    """A teacher's likeliest tokens, with the drawn one among them, packed.

    Args:
      ids, logprobs: [T, K], likeliest first, K >= k.
      drawn, own: [T], the tokens that were drawn, and their log-probabilities; where the k likeliest are without it, it
        takes the place of the last of them, unless the tokens are another tokenizer's.
    Returns:
      uint8 [T, width].
    """
    ids, logprobs = ids[:, : codec.k].astype(np.int32), logprobs[:, : codec.k].astype(np.float64)
    missing = ~(ids == drawn[:, None]).any(1) & (not codec.spans)
    ids[missing, -1], logprobs[missing, -1] = drawn[missing], own[missing]
    rest = np.zeros(len(ids)) if codec.k == codec.vocabulary else 1.0 - np.exp(logprobs).sum(1)
    with np.errstate(divide="ignore"):
        tail = codes_of(np.log(np.maximum(rest, 0.0)))
    return codec.pack(ids, codes_of(logprobs), tail)


def encode_draws(ids: np.ndarray, shares: np.ndarray, codec: TopK) -> np.ndarray:
    """Random draws from a teacher, each token once with the logarithm of its share, packed; there is no tail.

    Args:
      ids, shares: [T, n], the most frequent first, -inf in empty slots; there are no more than k others.
    """
    assert not np.isfinite(shares[:, codec.k :]).any()
    missing = ((0, 0), (0, max(0, codec.k - ids.shape[1])))
    ids = np.pad(ids[:, : codec.k].astype(np.int32), missing)
    shares = np.pad(shares[:, : codec.k].astype(np.float64), missing, constant_values=-np.inf)
    return codec.pack(np.where(np.isneginf(shares), 0, ids), codes_of(shares), np.zeros(len(ids), np.uint16))
