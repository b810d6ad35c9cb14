"""Chat templates are programs from strangers: this runs them with bounds on time, steps and output.

Jinja's immutable sandbox keeps a template from touching Python; it does not keep it from looping
for ever or writing for ever. Here every loop step and every call counts against a deadline, and
every value a template builds counts against a size, before it is built where an operation could
make a huge one at once. What a template sees and writes is otherwise what transformers'
`apply_chat_template` gives it (the same filters, globals and whitespace rules).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from pennyweight.data.sandbox.environment import Environment
from pennyweight.data.sandbox.meter import TemplateRefusedError, metering, too_large
from pennyweight.data.sandbox.tree import with_meters

__all__ = ["ChatTemplate", "TemplateRefusedError"]

SOURCE_LIMIT_CHARS = 65_536
_REASON_CHARS = 300


class ChatTemplate:
    """A compiled template: messages in, text out, within bounds.

    `now` stands in for the clock (`strftime_now`), so that one run renders one text.
    """

    def __init__(self, source: str, *, name: str, now: datetime) -> None:
        self.name = name
        self.reads_clock = "strftime_now" in source
        if len(source) > SOURCE_LIMIT_CHARS:
            raise TemplateRefusedError(f"{name}: longer than {SOURCE_LIMIT_CHARS:,} characters")
        try:
            source.encode()
            self._template = _compiled(source)
            self._globals = {**self._template.globals, "strftime_now": now.strftime}
        except TemplateRefusedError as error:
            raise TemplateRefusedError(f"{name}: {error}") from None
        except jinja2.TemplateSyntaxError as error:
            raise TemplateRefusedError(
                f"{name}:{error.lineno}: not a Jinja template: {_short(error.message)}"
            ) from error
        except (RecursionError, MemoryError, OverflowError) as error:
            raise TemplateRefusedError(f"{name}: nested too deeply to compile") from error
        except (SyntaxError, ValueError) as error:
            # What Jinja passes on and Python's compiler refuses: `break` outside a loop, twenty
            # loops in each other, a number of 5,000 digits, half a surrogate pair.
            raise TemplateRefusedError(
                f"{name}: cannot be compiled: {_short(getattr(error, 'msg', error))}"
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises TemplateRefusedError on a broken bound, and ValueError with what the template said."""
        with metering() as meter:
            try:
                parts = []
                # Jinja's own `generate` goes through all of its globals at each call.
                known = {**self._globals, **variables}
                context = self._template.new_context(known, shared=True)
                for part in self._template.root_render_func(context):
                    meter.step()
                    parts.append(part)
                text = "".join(parts)
                text.encode()  # a tokenizer takes Unicode only: half a surrogate pair is refused
                return text
            except (TemplateRefusedError, SecurityError) as error:
                raise TemplateRefusedError(_short(error)) from error
            except MemoryError as error:
                raise too_large() from error
            except RecursionError as error:
                raise TemplateRefusedError(f"{self.name}: calls itself without end") from error
            except Exception as error:  # a stranger's program may raise anything, about one row
                raise ValueError(_short(error) or type(error).__name__) from error


@functools.lru_cache(maxsize=128)
def _compiled(source: str) -> jinja2.Template:
    environment = Environment()
    return environment.from_string(with_meters(environment.parse(source)))


def _short(said: object) -> str:
    """What a template says of itself is a stranger's text too: a line, not a screen."""
    text = str(said)
    return text if len(text) <= _REASON_CHARS else text[:_REASON_CHARS] + "…"
