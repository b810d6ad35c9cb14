"""Adapters one keeps: immutable versions named by what they hold, names and tags that move, lineage."""

from pennyweight.registry.difference import Difference, difference
from pennyweight.registry.portability import Loader, keep_uniform, loaders
from pennyweight.registry.record import Version, held_out_in
from pennyweight.registry.remote import pull, push
from pennyweight.registry.store import Registry, default_folder

__all__ = [
    "Difference",
    "Loader",
    "Registry",
    "Version",
    "default_folder",
    "difference",
    "held_out_in",
    "keep_uniform",
    "loaders",
    "pull",
    "push",
]
