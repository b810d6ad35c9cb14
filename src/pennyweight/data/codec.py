"""Text to ids, with what rendering must know about a tokenizer: its BOS, its hard seams, its splits."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pennyweight.errors import DataError

__all__ = ["Codec", "Tokens"]

# Text put before a continuation so that it is tokenized as something that follows other text; the
# first that does not merge with it is used.
_GUARDS = ("\n", ":", "a", ".", "\n\n", "1")
_CACHE_ENTRIES = 4096
_CACHE_CHARS = 512
_MOST_ADDED = 512  # a pattern tries them one after the other


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
        self._tails: dict[str, tuple[list[int], bool]] = {}
        self._added = _pattern(added.values(), has_normalizer=backend.normalizer is not None)
        self._id_of = {token.content: i for i, token in added.items()}
        self._is_added = np.zeros(max(added, default=0) + 2, bool)  # the last: every higher id
        self._is_added[list(added)] = True

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text, on all cores."""
        # Offsets take a tenth of the time.
        fast = self._added is not None
        encode = self._backend.encode_batch_fast if fast else self._backend.encode_batch
        with _panics_as_faults():
            encodings = encode(list(texts), add_special_tokens=False)
        return [
            Tokens(self, text, encoding.ids, None if fast else encoding)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def encode_with_offsets(self, text: str) -> Any:
        """`tokenizers.Encoding` with character offsets."""
        with _panics_as_faults():
            return self._backend.encode(text, add_special_tokens=False)

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

    def tail(self, text: str) -> tuple[list[int], bool]:
        """The ids of a prompt's end, and whether its last character belongs to one of them."""
        if (known := self._tails.get(text)) is not None:
            return known
        encoding = self.encode_with_offsets(text)
        found = encoding.ids, encoding.char_to_token(len(text) - 1) is not None
        if len(text) <= _CACHE_CHARS and len(self._tails) < _CACHE_ENTRIES:
            self._tails[text] = found
        return found

    def marks(self, text: str, ids: np.ndarray) -> tuple[list[int], list[int], list[int]] | None:
        """Where added tokens begin and end in the text and stand among its ids, in their order.

        None where that is not proven: the tokenizer must find them by their text alone, and those
        found here must be, one by one, the added tokens among the ids.
        """
        if self._added is None:
            return None
        found = [(*match.span(), self._id_of[match[0]]) for match in self._added.finditer(text)]
        places = np.flatnonzero(self._is_added.take(ids, mode="clip")).tolist()
        if ids[places].tolist() != [token_id for _, _, token_id in found]:
            return None
        return [start for start, _, _ in found], [end for _, end, _ in found], places

    def continuation(self, text: str) -> list[int] | None:
        """Ids of text that follows other text, None where no guard keeps its first token whole."""
        for guard in _GUARDS:
            before = self.ids(guard)
            both: list[int] = self._backend.encode(guard + text, add_special_tokens=False).ids
            if both[: len(before)] == before:
                return both[len(before) :]
        return None


class Tokens:
    """The ids of one text, int32, and where characters went.

    Added tokens split text before anything else does, so they are found in the text and among the
    ids alike; where they do not answer, the text is encoded again with offsets.
    """

    __slots__ = ("_codec", "_marks", "_offsets", "ids", "text")

    def __init__(self, codec: Codec, text: str, ids: list[int], offsets: Any = None) -> None:
        self._codec, self.text = codec, text
        self.ids = np.array(array("i", ids), np.int32)  # twice as fast as of a list
        self._marks: tuple[list[int], list[int], list[int]] | None = None
        self._offsets = offsets

    def seam(self, prompt_chars: int) -> int | None:
        """Index of the first token after the prompt, or None where the prompt alone gives other ids.

        Only what follows the last added token can be tokenized differently with and without the
        answer; that part is tokenized alone, compared.
        """
        if prompt_chars == 0:
            return 0
        before = self._last_added(prompt_chars)
        if before is None:
            return None
        first, start_char = before
        alone, reaches = self._codec.tail(self.text[start_char:prompt_chars])
        if not reaches and self._offsets is None:
            self._encode_with_offsets()
            return self.seam(prompt_chars)
        after = first + len(alone)
        return after if self.ids[first:after].tolist() == alone else None

    def ending(self, end_chars: int) -> int | None:
        """Index of the token whose text ends there, None where the last character has none."""
        if (marks := self._marked()) is not None:
            _, ends, places = marks
            at = bisect_left(ends, end_chars)
            if at < len(ends) and ends[at] == end_chars:
                return places[at]
            self._encode_with_offsets()
        token: int | None = self._offsets.char_to_token(end_chars - 1)
        return token

    def _last_added(self, prompt_chars: int) -> tuple[int, int] | None:
        """The last added token of the prompt and where it begins; (0, 0) where there is none."""
        if (marks := self._marked()) is not None:
            starts, _, places = marks
            at = bisect_left(starts, prompt_chars) - 1
            return (places[at], starts[at]) if at >= 0 and places[at] else (0, 0)
        last = self._offsets.char_to_token(prompt_chars - 1)
        if last is None:
            return None
        added = self._codec.added_ids
        first = next((i for i in range(last, -1, -1) if int(self.ids[i]) in added), 0)
        return (first, self._offsets.token_to_chars(first)[0]) if first else (0, 0)

    def _marked(self) -> tuple[list[int], list[int], list[int]] | None:
        if self._marks is None and self._offsets is None:
            self._marks = self._codec.marks(self.text, self.ids)
            if self._marks is None:
                self._encode_with_offsets()
        return self._marks

    def _encode_with_offsets(self) -> None:
        self._offsets, self._marks = self._codec.encode_with_offsets(self.text), None


def _pattern(added: Iterable[Any], *, has_normalizer: bool) -> re.Pattern[str] | None:
    """Finds added tokens in text as the tokenizer does, the leftmost and of those the longest.

    None where a tokenizer looks for them in another way, in normalized text, within words or with
    the spaces around them, and where they are too many to be looked for here.
    """
    tokens = list(added)
    if not 0 < len(tokens) <= _MOST_ADDED:
        return None
    plain = not any(t.lstrip or t.rstrip or t.single_word or not t.content for t in tokens)
    one_pass = len({t.normalized for t in tokens}) == 1
    if not plain or not one_pass or (has_normalizer and tokens[0].normalized):
        return None
    longest_first = sorted((t.content for t in tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))
