"""Adapters of one server kept apart: random operations of several keys against a model of what each
name must stand for, every answer equal to that of the adapter alone.

In full fifty adapters and two thousand operations; tests/serve/test_isolation.py lets hypothesis look for the shortest way to a fault.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from campaigns.small_run import build_model
from campaigns.tally import Tally

__all__ = ["NAMES", "OWNERS", "Expected", "Names", "World", "run"]

ADAPTERS, OPERATIONS = 50, 2000
NAMES = ("first", "second", "third", "fourth")
OWNERS = ("alice", "bob", "carol")
TURN = [{"role": "user", "content": "say red and green 1"}]
TOKENS = 6

Expected = tuple[tuple[str, float], ...]


class World:
    """A service in this process, adapters in a folder, and what each of them says by itself."""

    def __init__(self, folder: Path, adapters: int, *, resident: int = 5) -> None:
        import torch

        from pennyweight.config import BaseConfig, LoraConfig
        from pennyweight.lora import adapter_of, attach, described, detach
        from pennyweight.model import load_base
        from pennyweight.serve.keys import Keys
        from pennyweight.serve.service import Service
        from pennyweight.serve.settings import ServeSettings
        from pennyweight.serve.store import SqliteDatabase, Store

        build_model(folder / "model")
        self.base = load_base(BaseConfig(model=str(folder / "model"), device="cpu"))
        for number in range(adapters):
            config = LoraConfig(
                r=1 + number % 5, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj")
            )
            attach(self.base, config, name="made", seed=number)
            adapter = adapter_of(self.base, "made", config)
            generator = torch.Generator().manual_seed(number)
            for a, b in adapter.factors.values():
                a.data.normal_(generator=generator)
                b.data.normal_(std=0.3, generator=generator)
            described(adapter, self.base).save(folder / "adapters" / f"a{number}")
            detach(self.base, "made")
        settings = ServeSettings.model_validate(
            {
                "base": {"model": str(folder / "model"), "device": "cpu"},
                "model_name": "base",
                "data_dir": str(folder / "data"),
                "load_from": [str(folder / "adapters")],
                # Few, so that adapters come and go all the time.
                "chat": {"rows": 4, "waiting": 64, "resident_adapters": resident},
            }
        )
        settings.data_path.mkdir(parents=True)
        store = Store(SqliteDatabase(settings.data_path / "server.sqlite"))
        keys = Keys({owner: f"{owner}-key-0123456789" for owner in OWNERS})
        self.service = Service(settings, keys, store, self.base)
        self.service.start()
        self.alone: dict[int | None, Expected] = {None: self.said("alice", "base")}
        for number in range(adapters):
            self.service.catalogue.load("alice", "alone", f"a{number}")
            self.alone[number] = self.said("alice", "alone")
            self.service.catalogue.unload("alice", "alone")

    def said(self, owner: str, name: str) -> Expected:
        (only,) = self.said_together([(owner, name)])
        return only

    def said_together(self, asked: list[tuple[str, str]]) -> list[Expected]:
        """What these models answer to one question, all asked at the same time."""
        from pennyweight.serve.questions import How

        how = How(max_new_tokens=TOKENS, temperature=0, logprobs=True)

        async def answer(owner: str, name: str) -> Expected:
            model = self.service.catalogue.get(owner, name)
            question = self.service.questions.chat(owner, model, TURN, None, how)
            got = self.service.questions.ask(question)
            told: list[tuple[str, float]] = []
            async for part in got.parts():
                told += [(each.text, each.logprob) for each in part.tokens]
            await got.close()
            return tuple(told)

        async def all_of_them() -> list[Expected]:
            return list(await asyncio.gather(*(answer(*each) for each in asked)))

        return asyncio.run(all_of_them())

    def end(self) -> None:
        assert self.service.end(30)


class Names:
    """What each key's names must stand for, and whether the service holds to it. Every act gives what
    went wrong, or None.
    """

    def __init__(self, world: World) -> None:
        self._world, self._service = world, world.service
        self.known: dict[tuple[str, str], int] = {}
        self.largest = 0.0

    def load(self, owner: str, name: str, number: int) -> str | None:
        right = "name_taken" if (owner, name) in self.known else None
        self.known.setdefault((owner, name), number)
        return _unlike(right, lambda: self._service.catalogue.load(owner, name, f"a{number}"))

    def unload(self, owner: str, name: str) -> str | None:
        right = "model_not_found" if self.known.pop((owner, name), None) is None else None
        return _unlike(right, lambda: self._service.catalogue.unload(owner, name))

    def ask(self, asked: list[tuple[str, str]]) -> str | None:
        """Ask these together; those that are another key's or nobody's are not there."""
        there = [each for each in asked if each[1] == "base" or each in self.known]
        for owner, name in set(asked) - set(there):
            got = partial(self._service.catalogue.get, owner, name)
            if fault := _unlike("model_not_found", got):
                return f"{owner} asks for {name}: {fault}"
        for each, said in zip(there, self._world.said_together(there), strict=True):
            alone = self._world.alone[self.known[each] if each[1] != "base" else None]
            pairs = list(zip(said, alone, strict=False))
            apart = max((abs(a - b) for (_, a), (_, b) in pairs), default=0.0)
            self.largest = max(self.largest, apart)
            # Alone again it is the same to the bit; in company sums are added in another order.
            bound = 0.0 if len(there) == 1 else 1e-4
            if [text for text, _ in said] != [text for text, _ in alone] or apart > bound:
                return f"{each} answers other than alone, by {apart:.2g}"
        return None


def run(tally: Tally, cases: int | None) -> None:
    """Load, unload, ask alone and together, and ask for what is another key's."""
    adapters = ADAPTERS if cases is None else 6
    world = World(tally.folder, adapters)
    names, draw = Names(world), random.Random(0)

    def load() -> str | None:
        return names.load(draw.choice(OWNERS), draw.choice(NAMES), draw.randrange(adapters))

    def unload() -> str | None:
        return names.unload(draw.choice(OWNERS), draw.choice(NAMES))

    def ask() -> str | None:
        several = range(draw.randint(1, 6))
        return names.ask([(draw.choice(OWNERS), draw.choice((*NAMES, "base"))) for _ in several])

    for number in range(cases or OPERATIONS):
        act = draw.choice([load, load, unload, ask, ask, ask])
        tally.case(f"{act.__name__} {number}", act())
    world.end()
    tally.remark(
        f"{adapters} adapters; logarithms of probabilities at most {names.largest:.1g} from those alone"
    )


def _unlike(right: str | None, act: Callable[[], object]) -> str | None:
    code = _code(act)
    return None if code == right else f"{code} where {right} was right"


def _code(act: Callable[[], Any]) -> str | None:
    from pennyweight.serve.refusals import Refused

    try:
        act()
    except Refused as refused:
        return refused.code
    return None
