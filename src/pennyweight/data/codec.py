"""Text to ids, with what rendering must know about a tokenizer: its BOS, its hard seams, its splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pennyweight.errors import DataError

__all__ = ["Codec"]

# Text put before a continuation so that it is tokenized as something that follows other text; the
# first that does not merge with it is used.
_GUARDS = ("\n", ":", "a", ".", "\n\n", "1")
_CACHE_ENTRIES = 4096
_CACHE_CHARS = 512


@contextmanager
def _panics_as_faults() -> Iterator[None]:
    """The tokenizers library panics, with what is no Exception, on an expression that takes too long."""
    try:
        yield
    except BaseException as fault:
        if type(fault).__name__ != "PanicException":
            raise
        raise DataError(
            f"the tokenizer gave up on a text ({str(fault)[:120]}); its tokenizer.json is not fit for use"
        ) from None


class Codec:
    """A fast tokenizer, asked only for ids and character spans; never adds tokens unasked."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"{type(tokenizer).__name__} has no fast tokenizer behind it (tokenizer.json); "
                "character spans cannot be read from it; convert it with transformers first"
            )
        if backend.padding is not None or backend.truncation is not None:
            backend = type(backend).from_str(backend.to_str())
            backend.no_padding()
            backend.no_truncation()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        self.special_texts = tuple(token.content for token in added.values() if token.special)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        others = {self.bos_id, self.eos_id, tokenizer.pad_token_id}
        unknown = tokenizer.unk_token_id
        self.unknown_id: int | None = None if unknown in others else unknown
        with_specials = backend.encode("a", add_special_tokens=True).ids
        without = backend.encode("a", add_special_tokens=False).ids
        self.adds_bos = (
            self.bos_id is not None
            and with_specials[:1] == [self.bos_id]
            and without[:1] != [self.bos_id]
        )
        self._short: dict[str, list[int]] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """`tokenizers.Encoding`s with character offsets, on all cores."""
        with _panics_as_faults():
            encodings: list[Any] = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return encodings

    def ids(self, text: str) -> list[int]:
        if (known := self._short.get(text)) is not None:
            return known
        with _panics_as_faults():
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if len(text) <= _CACHE_CHARS and len(self._short) < _CACHE_ENTRIES:
            self._short[text] = ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def text_of(self, token_id: int) -> str | None:
        """The text that stands for this one added token, None where there is none."""
        if token_id not in self.added_ids:
            return None
        text = str(self._backend.id_to_token(token_id))
        return text if self.ids(text) == [token_id] else None

    def seam(self, encoding: Any, ids: Sequence[int], text: str, prompt_chars: int) -> int | None:
        """Index of the first token after the prompt, or None where the prompt alone gives other ids.

        Added tokens split text before anything else does, so only what follows the last of them can
        be tokenized differently with and without the answer; that part is tokenized alone, compared.
        """
        if prompt_chars == 0:
            return 0
        last = encoding.char_to_token(prompt_chars - 1)
        if last is None:
            return None
        first = next((i for i in range(last, -1, -1) if ids[i] in self.added_ids), 0)
        start_char = encoding.token_to_chars(first)[0] if first else 0
        alone = self.ids(text[start_char:prompt_chars])
        after = first + len(alone)
        return after if list(ids[first:after]) == alone else None

    def continuation(self, text: str) -> list[int] | None:
        """Ids of text that follows other text, None where no guard keeps its first token whole."""
        for guard in _GUARDS:
            before = self.ids(guard)
            both: list[int] = self._backend.encode(guard + text, add_special_tokens=False).ids
            if both[: len(before)] == before:
                return both[len(before) :]
        return None
