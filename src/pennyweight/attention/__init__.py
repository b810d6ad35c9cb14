"""Attention that keeps documents apart, and the memory of keys and values for generation."""

from pennyweight.attention.cache import KEYS_AND_VALUES, KVCache, shelf_tokens
from pennyweight.attention.causal import attend

__all__ = ["KEYS_AND_VALUES", "KVCache", "attend", "shelf_tokens"]
