"""jaxdistill: distil the reasoning of a large teacher into a small student, in JAX."""

__version__ = "0.1.0"
