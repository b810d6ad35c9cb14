"""A decoder layer's norms, attention and gated feed-forward, so that backward keeps little of them and
a GPU does their elementwise work in few launches."""

from pennyweight.blocks.decoder_layer import DecoderLayer
from pennyweight.blocks.embedding import HostEmbedding
from pennyweight.blocks.feed_forward import GatedFeedForward
from pennyweight.blocks.norm import RMSNorm
from pennyweight.blocks.self_attention import SelfAttention
from pennyweight.blocks.stand_in import stand_in

__all__ = [
    "DecoderLayer",
    "GatedFeedForward",
    "HostEmbedding",
    "RMSNorm",
    "SelfAttention",
    "stand_in",
]
