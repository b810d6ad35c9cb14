"""Affordable fine-tuning of large language models with LoRA and QLoRA."""

__version__ = "0.1.0"
