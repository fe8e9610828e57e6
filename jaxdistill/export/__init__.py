"""The trained student as a Hugging Face checkpoint."""

from jaxdistill.export.hf import export_adapter, export_hf

__all__ = ["export_adapter", "export_hf"]
