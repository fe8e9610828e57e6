"""Losses: pure functions of arrays, without any knowledge of models."""

from jaxdistill.losses.chunked import chunked_cross_entropy, chunked_distillation
from jaxdistill.losses.divergences import DIVERGENCES, PARAMETERS
from jaxdistill.losses.preferences import PREFERENCES, Pairs
from jaxdistill.losses.ranks import sorted_distillation
from jaxdistill.losses.sequence import cross_entropy, shift
from jaxdistill.losses.topk import sampled_distillation, sampled_reverse_kl, topk_distillation
from jaxdistill.losses.vocabulary import Layout

__all__ = [
    "DIVERGENCES",
    "PARAMETERS",
    "PREFERENCES",
    "Layout",
    "Pairs",
    "chunked_cross_entropy",
    "chunked_distillation",
    "cross_entropy",
    "sampled_distillation",
    "sampled_reverse_kl",
    "shift",
    "sorted_distillation",
    "topk_distillation",
]
