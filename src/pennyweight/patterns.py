"""Regular expressions over module names, matched without backtracking.

An adapter's settings bring expressions from strangers (`target_modules`, `rank_pattern`), and
Python's `re` may take longer than anyone lives on `(a+)+b`. Here each part maps the places where
it may begin to the places where it may end, all of them at once (Thompson, "Regular Expression
Search Algorithm", 1968), a set of places being the bits of one integer. Captures are not needed;
back references, look-behind and flags are refused.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Callable, Iterable

from pennyweight.errors import AdapterError

__all__ = ["Pattern", "pattern"]

CHARS_LIMIT, PARTS_LIMIT, DEPTH_LIMIT, NAME_LIMIT = 4_000, 1_000, 30, 300
# Steps of one match, and of a match on average once there were many. What people write takes tens.
STEPS_LIMIT, STEPS_ON_AVERAGE, MANY_STEPS = 10_000, 1_000, 30_000
_NO_END = 10**10
_CLASSES = {"d": r"\d", "D": r"\D", "w": r"\w", "W": r"\W", "s": r"\s", "S": r"\S"}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}

# A part of an expression: where it can end in a name, if it begins at one of these places.
Part = Callable[["_Match", int], int]


class Pattern:
    """One expression; AdapterError where it is none, or uses what is not supported."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._root = _Parser(text).whole()
        self._steps = self._names = 0

    def fullmatch(self, name: str) -> bool:
        """Whether the whole name matches, as `re.fullmatch` has it."""
        if len(name) > NAME_LIMIT:
            raise AdapterError(f"{name[:60]!r}…: a module name of {len(name):,} characters")
        match = _Match(name, self.text)
        matches = bool(self._root(match, 1) >> len(name))
        self._steps, self._names = self._steps + match.steps, self._names + 1
        if self._steps > max(MANY_STEPS, STEPS_ON_AVERAGE * self._names):
            raise _too_much(self.text)
        return matches


@functools.lru_cache(maxsize=1024)
def pattern(text: str) -> Pattern:
    """The expression, parsed once."""
    return Pattern(text)


class _Match:
    """One name, and the work spent on it."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text, self.steps = name, text, 0
        self.masks: dict[object, int] = {}

    def step(self) -> None:
        self.steps += 1
        if self.steps > STEPS_LIMIT:
            raise _too_much(self.text)


def _too_much(text: str) -> AdapterError:
    return AdapterError(f"{text[:60]!r}: takes too long to match; write the module names as a list")


class _Parser:
    """Recursive descent over the expression; the grammar is that of `re`, section by section."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.parts, self.depth = text, 0, 0, 0

    def whole(self) -> Part:
        if len(self.text) > CHARS_LIMIT:
            raise AdapterError(f"a pattern of {len(self.text):,} characters, too long to be one")
        part = self._alternatives()
        if self.at < len(self.text):
            raise self._fault("unbalanced parenthesis")
        return part

    def _fault(self, what: str) -> AdapterError:
        return AdapterError(
            f"{self.text[:60]!r}: not a regular expression for module names: {what} at position {self.at}"
        )

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self, token: str) -> bool:
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def _counted(self, part: Part) -> Part:
        self.parts += 1
        if self.parts > PARTS_LIMIT:
            raise self._fault("too many parts")
        return part

    def _alternatives(self) -> Part:
        self.depth += 1
        if self.depth > DEPTH_LIMIT:
            raise self._fault("nested too deeply")
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        self.depth -= 1
        return branches[0] if len(branches) == 1 else self._counted(_either(branches))

    def _sequence(self) -> Part:
        parts: list[Part] = []
        while self._peek() not in ("", "|", ")"):
            part = self._atom()
            if (bounds := self._repeat()) is not None:
                part = self._counted(_repeated(part, *bounds))
            parts.append(part)
        return self._counted(_in_turn(parts))

    def _repeat(self) -> tuple[int, int] | None:
        start = self.at
        found = re.compile(r"\{(\d{0,9})(,?)(\d{0,9})\}").match(self.text, self.at)
        if self._take("*"):
            bounds = (0, _NO_END)
        elif self._take("+"):
            bounds = (1, _NO_END)
        elif self._take("?"):
            bounds = (0, 1)
        elif found and (found[1] or found[3]):
            self.at = found.end()
            least = int(found[1] or 0)
            bounds = (least, int(found[3]) if found[3] else _NO_END if found[2] else least)
        else:
            return None
        if bounds[0] > bounds[1]:
            raise self._fault("the least count is greater than the most")
        self._take("?")  # lazy or greedy, the same names match
        if self._peek() in ("*", "+", "?"):
            raise self._fault(f"a repeat of a repeat, {self.text[start : self.at + 1]!r}")
        return bounds

    def _atom(self) -> Part:
        if self._take("("):
            return self._group()
        if self._take("["):
            return self._set()
        if self._take("."):
            return self._counted(_one(lambda c: c != "\n"))
        if self._take("^"):
            return self._counted(_where(lambda name, at: at == 0))
        if self._take("$"):
            return self._counted(_where(lambda name, at: at == len(name)))
        if self._take("\\"):
            return self._escape()
        if self._peek() in ("*", "+", "?"):
            raise self._fault("nothing to repeat")
        literal = self._peek()
        self.at += 1
        return self._counted(_one(lambda c: c == literal, literal))

    def _group(self) -> Part:
        wanted: bool | None = None
        if self._take("?"):
            if self._take("="):
                wanted = True
            elif self._take("!"):
                wanted = False
            elif named := re.compile(r"P<[A-Za-z_]\w*>").match(self.text, self.at):
                self.at = named.end()
            elif not self._take(":"):
                raise self._fault(f"(?{self._peek()}…) is not supported")
        inside = self._alternatives()
        if not self._take(")"):
            raise self._fault("a parenthesis is not closed")
        return inside if wanted is None else self._counted(_ahead(inside, wanted))

    def _escape(self) -> Part:
        letter = self._peek()
        self.at += 1
        if letter in ("b", "B"):
            return self._counted(_where(lambda name, at: _is_edge(name, at) == (letter == "b")))
        if letter in ("A", "Z"):
            return self._counted(_where(lambda name, at: at == (0 if letter == "A" else len(name))))
        return self._counted(_one(self._char_test(letter)))

    def _char_test(self, letter: str) -> Callable[[str], bool]:
        if letter in _CLASSES:
            of_class = re.compile(_CLASSES[letter])
            return lambda c: of_class.match(c) is not None
        if not letter or (
            letter in string.ascii_letters + string.digits and letter not in _CONTROLS
        ):
            raise self._fault(f"\\{letter} is not supported")
        literal = _CONTROLS.get(letter, letter)
        return lambda c: c == literal

    def _set(self) -> Part:
        negated = self._take("^")
        tests: list[Callable[[str], bool]] = []
        while not (self._peek() == "]" and tests):
            low = self._peek()
            self.at += 1
            if not low:
                raise self._fault("a set [ is not closed")
            if low == "\\":
                tests.append(self._char_test(self._peek()))
                self.at += 1
            elif self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in (
                "]",
                "\\",
                "",
            ):
                high = self.text[self.at + 1]
                self.at += 2
                if high < low:
                    raise self._fault(f"the range {low}-{high} is empty")
                tests.append(lambda c, low=low, high=high: low <= c <= high)  # type: ignore[misc]
            else:
                tests.append(lambda c, low=low: c == low)  # type: ignore[misc]
        self.at += 1
        return self._counted(_one(lambda c: any(test(c) for test in tests) != negated))


def _one(test: Callable[[str], bool], key: object = None) -> Part:
    """One character; its places in a name are looked up once for each `key`."""
    key = key or test

    def part(match, starts):  # type: ignore[no-untyped-def]  # the innermost loop
        match.step()
        places = match.masks.get(key)
        if places is None:
            places = match.masks[key] = _bits(test(c) for c in match.name)
        return (starts & places) << 1

    return part


def _where(test: Callable[[str, int], bool]) -> Part:
    def part(match, starts):  # type: ignore[no-untyped-def]
        match.step()
        return starts & _bits(test(match.name, at) for at in range(len(match.name) + 1))

    return part


def _bits(holds: Iterable[bool]) -> int:
    return sum(1 << at for at, each in enumerate(holds) if each)


def _is_edge(name: str, at: int) -> bool:
    before = at > 0 and re.match(r"\w", name[at - 1]) is not None
    after = at < len(name) and re.match(r"\w", name[at]) is not None
    return before != after


def _ahead(inside: Part, wanted: bool) -> Part:
    def part(match, starts):  # type: ignore[no-untyped-def]
        places = (at for at in range(starts.bit_length()) if starts >> at & 1)
        return sum(1 << at for at in places if bool(inside(match, 1 << at)) == wanted)

    return part


def _either(branches: list[Part]) -> Part:
    def part(match, starts):  # type: ignore[no-untyped-def]
        ends = 0
        for branch in branches:
            ends |= branch(match, starts)
        return ends

    return part


def _in_turn(parts: list[Part]) -> Part:
    def part(match, starts):  # type: ignore[no-untyped-def]
        match.step()
        for each in parts:
            if not starts:
                break
            starts = each(match, starts)
        return starts

    return part


def _repeated(inside: Part, least: int, most: int) -> Part:
    """Each round moves every place forward or keeps some, so the rounds end with the name."""

    def part(match, starts):  # type: ignore[no-untyped-def]
        for _ in range(least):
            after = inside(match, starts)
            if after == starts:
                break
            starts = after
        ends, rounds = starts, most - least
        while starts and rounds:
            match.step()
            after = inside(match, starts)
            starts, rounds = after & ~ends, rounds - 1
            ends |= after
        return ends

    return part
