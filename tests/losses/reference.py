"""Float64 NumPy references of the losses, a value a token, from whole logits; slopes by finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MASKS = {
    "all": lambda n, rng: np.ones(n),
    "none": lambda n, rng: np.zeros(n),
    "random": lambda n, rng: rng.choice([0.0, 0.5, 1.0], n),
    "single": lambda n, rng: (np.arange(n) == n // 2) * 2.0,
}


def log_softmax(z: np.ndarray) -> np.ndarray:
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


def cross_entropy(z: np.ndarray, targets: np.ndarray, z_loss: float = 0.0, smoothing: float = 0.0) -> np.ndarray:
    log_p = log_softmax(z)
    aim = np.full(z.shape, smoothing / z.shape[-1])
    aim[np.arange(len(z)), targets] += 1 - smoothing
    log_z = z[:, 0] - log_p[:, 0]
    return -(aim * log_p).sum(-1) + z_loss * log_z**2


def kl(log_a: np.ndarray, log_b: np.ndarray) -> np.ndarray:
    """KL(a || b)."""
    return (np.exp(log_a) * (log_a - log_b)).sum(-1)


def mixture(log_a: np.ndarray, log_b: np.ndarray, share: float) -> np.ndarray:
    """log of share * a + (1 - share) * b."""
    return np.logaddexp(log_a + np.log(share), log_b + np.log(1 - share))


def adaptive_share(log_q: np.ndarray, log_p: np.ndarray, mu: float) -> np.ndarray:
    """The forward KL's weight of AKL, by sorting."""
    q, p = np.exp(log_q), np.exp(log_p)
    order = np.argsort(-q, -1)
    above = np.cumsum(np.take_along_axis(q, order, -1), -1) - np.take_along_axis(q, order, -1)
    apart = np.take_along_axis(np.abs(q - p), order, -1)
    return (apart * (above < mu)).sum(-1) / apart.sum(-1)


def divergence(name: str, parameter: float, log_q: np.ndarray, log_p: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Teacher's and student's log-probabilities -> nats a token; `share` is AKL's weight, a constant."""
    match name:
        case "forward_kl":
            return kl(log_q, log_p)
        case "reverse_kl":
            return kl(log_p, log_q)
        case "jsd":
            mixed = mixture(log_q, log_p, parameter)
            return parameter * kl(log_q, mixed) + (1 - parameter) * kl(log_p, mixed)
        case "total_variation":
            return 0.5 * np.abs(np.exp(log_q) - np.exp(log_p)).sum(-1)
        case "skew_kl":
            return kl(log_q, mixture(log_q, log_p, parameter))
        case "skew_reverse_kl":
            return kl(log_p, mixture(log_p, log_q, parameter))
        case "adaptive_kl":
            return share * kl(log_q, log_p) + (1 - share) * kl(log_p, log_q)
    raise KeyError(name)


def bucketed_kl(log_q: np.ndarray, log_p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Forward KL on the tokens `ids` [N, k], and one bucket of all others."""
    stored = np.zeros(log_q.shape, bool)
    np.put_along_axis(stored, ids, True, -1)
    q, p = np.exp(log_q), np.exp(log_p)
    tail_q, tail_p = (q * ~stored).sum(-1), (p * ~stored).sum(-1)
    some = tail_q > 0
    tail = np.where(some, tail_q * np.log(np.where(some, tail_q, 1) / np.where(some, tail_p, 1)), 0)
    return (q * (log_q - log_p) * stored).sum(-1) + tail


def slopes(value: Callable[[np.ndarray], np.ndarray], z: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """d value / d logits, [N, V], where each of the N values depends on its own row alone."""
    found = np.empty(z.shape)
    for v in range(z.shape[1]):
        nudge = np.zeros((1, z.shape[1]))
        nudge[0, v] = step
        found[:, v] = (value(z + nudge) - value(z - nudge)) / (2 * step)
    return found


def cap(z: np.ndarray, softcap: float | None) -> np.ndarray:
    return z if softcap is None else softcap * np.tanh(z / softcap)


def gradients(
    value: Callable[[np.ndarray], np.ndarray], hidden: np.ndarray, projection: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """(weighted sum, d / d hidden, d / d projection) of a loss of the logits hidden @ projection^T, in float64."""
    h, w = hidden.astype(np.float64), projection.astype(np.float64)
    z = h @ w.T
    by_logits = slopes(value, z) * weights[:, None]
    return float((value(z) * weights).sum()), by_logits @ w, by_logits.T @ h
