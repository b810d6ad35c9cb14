"""What the server says no with: a status and the body that OpenAI's clients know."""

from __future__ import annotations

from typing import Any

from pennyweight.errors import PennyweightError

__all__ = ["Refused", "absent", "busy", "invalid", "one_line"]


class Refused(PennyweightError):
    """A request that is not answered as asked; `body()` is what the client reads.

    `retry_after_s`: when to come again, for what is full now and will not stay so.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value") -> Refused:
    return Refused(400, message, param=param, code=code)


def absent(what: str, named: str, *, param: str | None = None) -> Refused:
    """Nothing of this name, or nothing of the caller's: the answer is the same for both."""
    code = "model_not_found" if what == "model" else "not_found"
    return Refused(404, f"no {what} {named[:200]!r} here", param=param, code=code)


def busy(message: str, *, retry_after_s: int = 1) -> Refused:
    return Refused(
        429, message, kind="rate_limit_error", code="overloaded", retry_after_s=retry_after_s
    )


def one_line(text: str, most: int = 2000) -> str:
    """A message with its lines joined, for a place that holds one."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())[:most]
