"""Conversion between a Hugging Face Llama directory and a Megatron distributed checkpoint, both ways."""

from coalm_nemo.checkpoint.export_hf import DTYPES, export_checkpoint
from coalm_nemo.checkpoint.import_hf import import_checkpoint
from coalm_nemo.checkpoint.report import DEFAULT_MEMORY_BYTES, ConversionReport

__all__ = ["DEFAULT_MEMORY_BYTES", "DTYPES", "ConversionReport", "export_checkpoint", "import_checkpoint"]
