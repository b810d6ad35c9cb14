"""Which text a conversation becomes, and where in it each trained answer stands.

An answer's place comes from rendering the conversation up to it, with and without the generation
prompt; nothing is searched for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pennyweight.data.conversation import Message
from pennyweight.data.surface import Surface, TurnRefusedError

__all__ = ["Piece", "Turn", "pieces", "trained_turns"]


@dataclass(frozen=True, slots=True)
class Turn:
    """A trained answer: it follows `prompt_chars` characters and its stop token ends at `end_chars`.

    `alone` is the text up to `end_chars` with this answer as the last turn.
    """

    prompt_chars: int
    end_chars: int
    alone: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that becomes one example. `append_stop` is put behind it where the text has no stop."""

    surface: Surface
    text: str
    turns: tuple[Turn, ...]
    append_stop: int | None = None
    everything: bool = False

    def apart(self) -> list[Piece]:
        """One piece for each turn, each rendered as the last."""
        return [replace(self, text=turn.alone, turns=(turn,)) for turn in self.turns]


def pieces(
    surface: Surface,
    messages: tuple[Message, ...],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    train_on: str,
) -> list[Piece]:
    """The pieces of one conversation; raises TurnRefusedError where it cannot be rendered."""
    if messages[-1].role == "text" or train_on == "all":
        return [_everything(surface, messages, tools)]
    turns = [_turn(surface, messages[: i + 1], tools) for i in trained_turns(messages, train_on)]
    append = None if surface.prints_stop else surface.stop_id
    whole = turns[-1].alone
    together = Piece(surface, whole, tuple(turns), append)
    # Without a printed stop the text between turns would differ from what was trained.
    shared = append is None or len(turns) == 1
    if shared and all(whole.startswith(turn.alone) for turn in turns[:-1]):
        return [together]
    return together.apart()


def trained_turns(messages: Sequence[Message], train_on: str) -> list[int]:
    """Places of the answers that are trained; raises TurnRefusedError where none is."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise TurnRefusedError("no assistant turn")
    if train_on == "last":
        answers = answers[-1:]
    asked = [i for i in answers if messages[i].train is not False]
    if not asked:
        raise TurnRefusedError("the row sets every assistant turn's weight to 0")
    said = [i for i in asked if messages[i].content.strip() or "tool_calls" in messages[i].extra]
    if not said:
        raise TurnRefusedError("the answer is empty")
    return said


def _everything(
    surface: Surface, messages: tuple[Message, ...], tools: Sequence[Mapping[str, Any]] | None
) -> Piece:
    text = surface.text(messages, tools, generation=False)
    end = surface.end_of_answer(text)
    if end is None:
        return Piece(surface, text, (), surface.stop_id, everything=True)
    return Piece(surface, text[:end], (), everything=True)


def _turn(
    surface: Surface, messages: tuple[Message, ...], tools: Sequence[Mapping[str, Any]] | None
) -> Turn:
    if len(messages) == 1:
        raise TurnRefusedError(
            "an assistant turn with nothing before it; there is no prompt to answer"
        )
    prompt = surface.text(messages[:-1], tools, generation=True)
    own = surface.text(messages, tools, generation=False)
    if not own.startswith(prompt):
        own = _bridged(surface, prompt, own, messages[-1].content)
    end = surface.end_of_answer(own)
    if end is None:
        end = len(own)
        if surface.prints_stop:
            raise TurnRefusedError(f"no stop token after the answer; the text ends {own[-40:]!r}")
    if end <= len(prompt):
        raise TurnRefusedError("the template prints nothing for an assistant turn")
    return Turn(len(prompt), end, own[:end])


def _bridged(surface: Surface, prompt: str, own: str, answer: str) -> str:
    """The answer behind the prompt, where the prompt only adds a closed aside before it.

    Gemma 4 asks with an empty thought, opened and closed, that it does not print before an answer.
    An aside left open, such as `<think>`, would have to be closed by the answer: refused.
    """
    same = next((i for i, (a, b) in enumerate(zip(prompt, own, strict=False)) if a != b), len(own))
    aside, rest = prompt[same:], own[same:]
    if answer.strip() and rest.startswith(answer.strip()) and surface.is_closed_aside(aside):
        return prompt + rest
    raise TurnRefusedError(
        "the template asks for an answer in another way than it prints one: it asks with "
        f"{aside[:40]!r} and prints {rest[:40]!r}; give the answers' reasoning, or choose another "
        "data.template"
    )
