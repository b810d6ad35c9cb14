"""Log-likelihoods of continuations, many in one flat row; a context they share is read once.

log p(c | x) = Σ log p(c_i | x, c_<i), summed over the continuation's tokens. Continuations that
differ in their last token alone are read off the same logits; others fork the context's row in the
cache, so that the four answers to a question cost one question and four answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.attention import KVCache
from pennyweight.model import BaseModel

__all__ = ["Continuation", "Likelihood", "likelihoods"]

# Tokens read in one pass; one longer question goes alone.
MOST_TOKENS = 4096
# Logits held at once: 64 MiB of float32.
MOST_LOGITS = 2**24

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Continuation:
    """Token ids that are asked for after a context of at least one token."""

    context: Ids
    ids: Ids


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Natural logarithm of a continuation's probability, and whether greedy decoding gives it."""

    logprob: float
    greedy: bool


@dataclass(slots=True)
class _Question:
    """A context and what is asked after it: `asked` holds (number, ids); `paths` the beginnings that
    have to be read after the context, none of them the beginning of another."""

    context: Ids
    asked: list[tuple[int, Ids]]
    paths: list[Ids]

    @property
    def cost_tokens(self) -> int:
        return len(self.context) + sum(map(len, self.paths))


@dataclass(frozen=True, slots=True)
class _Read:
    """Token `token` of continuation `number` is predicted by row `row` of the hidden states."""

    row: int
    token: int
    number: int


@torch.inference_mode()
def likelihoods(
    base: BaseModel,
    asked: Sequence[Continuation],
    *,
    adapter: str | None = None,
    budget_tokens: int = MOST_TOKENS,
    done: Callable[[int], None] = lambda count: None,
) -> list[Likelihood]:
    """One for each continuation, in their order; `done` is told how many each pass answered.

    Context and continuation without its last token must fit the base's positions.
    """
    sums = torch.zeros(len(asked), dtype=torch.float64)
    greedy = torch.ones(len(asked), dtype=torch.bool)
    for batch in _batches(_questions(asked), budget_tokens):
        hidden, reads = _read(base, batch, adapter)
        for logprobs, best, part in _chunks(base, hidden, reads, adapter):
            numbers = torch.tensor([read.number for read in part])
            sums.index_add_(0, numbers, logprobs.double().cpu())
            greedy[numbers[~best.cpu()]] = False
        done(sum(len(question.asked) for question in batch))
    return [Likelihood(*pair) for pair in zip(sums.tolist(), greedy.tolist(), strict=True)]


def _questions(asked: Sequence[Continuation]) -> list[_Question]:
    """Continuations by their context, the dearest first."""
    by_context: dict[Ids, list[tuple[int, Ids]]] = {}
    for number, each in enumerate(asked):
        assert each.context, "a context of one token at least"
        assert each.ids, "a continuation of one token at least"
        by_context.setdefault(each.context, []).append((number, each.ids))
    questions = []
    for context, group in by_context.items():
        paths: list[Ids] = []
        for path in sorted({ids[:-1] for _, ids in group} - {()}, key=len, reverse=True):
            if not any(longer[: len(path)] == path for longer in paths):
                paths.append(path)
        questions.append(_Question(context, group, paths))
    return sorted(questions, key=lambda question: -question.cost_tokens)


def _batches(questions: list[_Question], budget_tokens: int) -> Iterator[list[_Question]]:
    waiting: list[_Question] = []
    tokens = 0
    for question in questions:
        if waiting and tokens + question.cost_tokens > budget_tokens:
            yield waiting
            waiting, tokens = [], 0
        waiting.append(question)
        tokens += question.cost_tokens
    if waiting:
        yield waiting


def _read(
    base: BaseModel, batch: list[_Question], adapter: str | None
) -> tuple[Tensor, list[_Read]]:
    """Hidden states `[rows, d]` of one batch, and which of them predicts which token.

    First every context with its first path; then, in forked rows, the further paths.
    """
    forks = [(at, path) for at, question in enumerate(batch) for path in question.paths[1:]]
    cache = KVCache(len(batch) + len(forks)) if forks else None
    texts = [question.context + (question.paths or [()])[0] for question in batch]
    hidden = _pass(base, texts, [0] * len(texts), adapter, cache, list(range(len(batch))))
    # Where the row that predicts a path's first token stands, for every path of every question.
    after: dict[tuple[int, Ids], int] = {}
    lasts: list[int] = []
    start = 0
    for at, (question, text) in enumerate(zip(batch, texts, strict=True)):
        lasts.append(start + len(question.context) - 1)
        if question.paths:
            after[at, question.paths[0]] = lasts[-1] + 1
        start += len(text)
    if forks:
        assert cache is not None
        rows = [cache.fork(at, len(batch[at].context)) for at, _ in forks]
        starts = [len(batch[at].context) for at, _ in forks]
        more = _pass(base, [path for _, path in forks], starts, adapter, cache, rows)
        for at, path in forks:
            after[at, path] = start
            start += len(path)
        hidden = torch.cat([hidden, more])
    return hidden, list(_reads(batch, lasts, after))


def _reads(
    batch: list[_Question], lasts: list[int], after: dict[tuple[int, Ids], int]
) -> Iterator[_Read]:
    for at, question in enumerate(batch):
        for number, ids in question.asked:
            yield _Read(lasts[at], ids[0], number)
            rest = ids[:-1]
            if rest:
                path = next(path for path in question.paths if path[: len(rest)] == rest)
                for place, token in enumerate(ids[1:]):
                    yield _Read(after[at, path] + place, token, number)


def _pass(
    base: BaseModel,
    texts: list[Ids],
    starts: list[int],
    adapter: str | None,
    cache: KVCache | None,
    rows: list[int],
) -> Tensor:
    """Hidden states of texts back to back, each going on from position `starts` of its row."""
    if cache is not None:
        cache.extend(rows, [len(text) for text in texts])
    boundaries = [0]
    for text in texts:
        boundaries.append(boundaries[-1] + len(text))
    ids = torch.tensor([token for text in texts for token in text], device=base.device)
    positions = torch.cat(
        [torch.arange(a, a + len(text)) for a, text in zip(starts, texts, strict=True)]
    ).to(base.device)
    with base.route.over(boundaries, [adapter] * len(texts), cache=cache):
        return base.hidden(ids, positions)


def _chunks(
    base: BaseModel, hidden: Tensor, reads: list[_Read], adapter: str | None
) -> Iterator[tuple[Tensor, Tensor, list[_Read]]]:
    """Log-probability of each token read, whether it was the likeliest, and the reads themselves;
    a row's logits are made once, however many tokens are read off it."""
    reads = sorted(reads, key=lambda read: read.row)
    rows = sorted({read.row for read in reads})
    most = max(1, MOST_LOGITS // base.vocab_size)
    at = 0
    for first in range(0, len(rows), most):
        chosen = rows[first : first + most]
        place = {row: i for i, row in enumerate(chosen)}
        with base.route.over((0, len(chosen)), (adapter,)):
            logits = base.logits(hidden[torch.tensor(chosen, device=hidden.device)])
        part = []
        while at < len(reads) and reads[at].row in place:
            part.append(reads[at])
            at += 1
        which = torch.tensor([place[read.row] for read in part], device=logits.device)
        tokens = torch.tensor([read.token for read in part], device=logits.device)
        total = logits.logsumexp(-1)
        yield logits[which, tokens] - total[which], logits.argmax(-1)[which] == tokens, part
