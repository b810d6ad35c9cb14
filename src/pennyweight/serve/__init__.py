"""One base, many adapters, over the API people already use: train, ask and meter them by name."""

from pennyweight.serve.run import serve
from pennyweight.serve.settings import ServeSettings, load_settings

__all__ = ["ServeSettings", "load_settings", "serve"]
