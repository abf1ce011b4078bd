"""CoALM at any scale: Hugging Face Llama -> Megatron -> SFT -> Hugging Face."""

__version__ = "0.1.0"
