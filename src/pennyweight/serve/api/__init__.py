"""HTTP and nothing else: requests read, one call made, the answer written as OpenAI's clients expect."""

from pennyweight.serve.api.app import create_app
from pennyweight.serve.api.caller import require_key

__all__ = ["create_app", "require_key"]
