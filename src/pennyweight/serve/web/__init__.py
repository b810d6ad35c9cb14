"""The page at `/`: what the API can do, for people. Server-rendered; its scripts and fonts ship in `static/`."""

from pennyweight.serve.web.mounting import mount

__all__ = ["mount"]
