"""Decoding in JAX: used by evaluation and by the embedded teacher."""

from jaxdistill.generate.decode import decode

__all__ = ["decode"]
