"""All parts of a server, put together; the API asks nothing else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pennyweight.files import make_folder
from pennyweight.model import BaseModel
from pennyweight.serve.catalogue import Catalogue
from pennyweight.serve.engine import Engine
from pennyweight.serve.guard import PageRefusal
from pennyweight.serve.jobs import Foreman, Orders
from pennyweight.serve.keys import Keys
from pennyweight.serve.memory import Memory
from pennyweight.serve.pace import Pace
from pennyweight.serve.questions import Questions
from pennyweight.serve.settings import ServeSettings
from pennyweight.serve.store import Store
from pennyweight.serve.uploads import Uploads
from pennyweight.serve.versions import Versions

__all__ = ["Service"]


class Service:
    """A server's parts over one resident base. `notes`: what was passed over at the start.

    `pages`: further routers, `open_paths` of theirs that need no key, and `page_refusal`, what a
    browser without a key is shown.
    """

    def __init__(self, settings: ServeSettings, keys: Keys, store: Store, base: BaseModel) -> None:
        self.settings, self.keys, self.store = settings, keys, store
        data = settings.data_path
        make_folder(data)
        self.clerk = ThreadPoolExecutor(1, thread_name_prefix="clerk")
        # An answer ends once it is billed, and does not wait for a checkpoint that is written down.
        self.cashier = ThreadPoolExecutor(1, thread_name_prefix="cashier")
        self.uploads = Uploads(store, data / "files")
        self.versions = Versions(data / "versions")
        self.memory = Memory(base, settings)
        self.engine = Engine(base, self.versions, self.memory, settings)
        folders = [*([settings.adapters] if settings.adapters else []), *settings.load_from]
        self.catalogue = Catalogue(
            store,
            self.versions,
            base_id=settings.base_id,
            allowed=tuple(Path(folder).expanduser() for folder in folders),
            fits=self.engine.require_fit,
        )
        self.questions = Questions(
            base, self.versions, self.engine, store, settings.chat, self.cashier
        )
        self.foreman = Foreman(
            settings, store, self.uploads, self.versions, self.engine, base, self.memory, self.clerk
        )
        self.jobs = Orders(
            settings,
            store,
            self.uploads,
            max_positions=base.max_positions,
            nudge=self.foreman.nudge,
        )
        self.pace = Pace(settings.base)
        self.draining = False
        self.pages: list[Any] = []
        self.open_paths: set[str] = {"/healthz"}
        self.page_refusal: Callable[[], PageRefusal] | None = None
        self.notes: list[str] = []

    def start(self) -> None:
        """Take up where the last server of this data folder ended."""
        self.uploads.tidy()
        if self.settings.adapters:
            self.notes += self.catalogue.read_folder(Path(self.settings.adapters).expanduser())
        self.versions.sweep(self.store.versions_in_use())
        self.engine.start()
        self.foreman.start()

    def drain(self) -> None:
        """Begin to end: jobs save themselves, and nothing new is taken up."""
        self.draining = True
        self.foreman.drain()

    def end(self, timeout_s: float) -> bool:
        """Stop for good; whether everything came to its end in time."""
        self.drain()
        ended = self.engine.end(timeout_s)
        self.foreman.end()
        self.clerk.shutdown(wait=True)
        self.cashier.shutdown(wait=True)
        self.store.close()
        return ended
