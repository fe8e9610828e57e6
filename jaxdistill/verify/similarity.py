"""How alike texts are: MinHash signatures of their n-grams of words, by datasketch.

Source: Broder 1997, "On the resemblance and containment of documents".
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import numpy as np

from jaxdistill.verify.texts import ngrams, words_of

PERMUTATIONS = 128
"""Numbers of a signature; a similarity of 0.8 is estimated to 0.035 (one standard deviation)."""


def shingles(text: str, n: int) -> set[bytes]:
    """The n-grams of a text's words; all of the words where there are fewer."""
    return {" ".join(gram).encode("utf-8", "surrogatepass") for gram in ngrams(words_of(text), n)}


def signature(text: str, n: int) -> np.ndarray:
    """MinHash signature, uint32 [PERMUTATIONS]: equal in a share of its places that estimates the Jaccard index."""
    from datasketch import MinHash

    return np.asarray(_minhash(MinHash, shingles(text, n)).hashvalues, np.uint32)


def _minhash(kind, found: set[bytes]):
    made = kind(num_perm=PERMUTATIONS, seed=1, hashfunc=_hash)
    made.update_batch(sorted(found))
    return made


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The estimated Jaccard index of two signatures."""
    return float(np.count_nonzero(a == b)) / PERMUTATIONS


def encode(found: np.ndarray) -> str:
    return base64.b64encode(found.astype("<u4").tobytes()).decode()


def decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u4")


def jaccard(a: set[bytes], b: set[bytes]) -> float:
    """Shared shingles, of all that two texts have; 0 if neither has one."""
    shared = len(a & b)
    return shared / max(1, len(a) + len(b) - shared)


class Index:
    """Texts that are found again by similar ones; candidates of the index are compared exactly, shingle by shingle."""

    def __init__(self, texts: Sequence[str], n: int, threshold: float):
        from datasketch import MinHash, MinHashLSH

        self._n, self._threshold, self._texts, self._kind = n, threshold, texts, MinHash
        # tuned a little below the threshold, with misses weighing more: what is found too much is sorted out exactly
        self._lsh = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=PERMUTATIONS, weights=(0.2, 0.8))
        for number, text in enumerate(texts):
            if found := shingles(text, n):
                self._lsh.insert(number, _minhash(MinHash, found))

    def similar(self, text: str) -> list[tuple[int, float]]:
        """(number, Jaccard index) of the texts at or above the threshold, the likest first."""
        mine = shingles(text, self._n)
        if not mine:
            return []
        found = []
        for number in self._lsh.query(_minhash(self._kind, mine)):
            alike = jaccard(mine, shingles(self._texts[number], self._n))
            if alike >= self._threshold:
                found.append((number, alike))
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def first_alike(texts: Sequence[str], n: int, threshold: float) -> list[int]:
    """For every text the number of the first one that it is a near-duplicate of, through others if need be."""
    index = Index(texts, n, threshold)
    root = list(range(len(texts)))

    def find(number: int) -> int:
        while root[number] != number:
            root[number] = root[root[number]]
            number = root[number]
        return number

    for number, text in enumerate(texts):
        for other, _ in index.similar(text):
            a, b = find(number), find(other)
            root[max(a, b)] = min(a, b)
    return [find(number) for number in range(len(texts))]
