"""A decoder layer's norms and gated feed-forward, written so that backward keeps little of them."""

from pennyweight.blocks.embedding import HostEmbedding
from pennyweight.blocks.feed_forward import GatedFeedForward
from pennyweight.blocks.norm import RMSNorm
from pennyweight.blocks.stand_in import stand_in

__all__ = ["GatedFeedForward", "HostEmbedding", "RMSNorm", "stand_in"]
