"""Attention that keeps documents apart, and the memory of keys and values for generation."""

from pennyweight.attention.cache import KEYS_AND_VALUES, KVCache, shelf_tokens
from pennyweight.attention.causal import attend, attends_in_one_call

__all__ = ["KEYS_AND_VALUES", "KVCache", "attend", "attends_in_one_call", "shelf_tokens"]
