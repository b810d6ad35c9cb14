"""Requests beside one another: memory given and taken back, prompts in pieces, turns, likely tokens."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pennyweight.attention import shelf_tokens
from pennyweight.budget import MemoryBudget
from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.errors import ConfigError
from pennyweight.generate import Decoding, Request, Token, draw, generate, kv_bytes_per_token
from pennyweight.generate.draw import draw_each
from pennyweight.model import BaseModel, load_base


@pytest.fixture(scope="module")
def base(tiny_llama_folder: Path) -> BaseModel:
    return load_base(BaseConfig(model=str(tiny_llama_folder), quantization="none", device="cpu"))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    drawn = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(5, 288, (length,), generator=drawn).tolist())


def asked(length: int, new: int, seed: int = 0, **how: object) -> Request:
    return Request(prompt(length, seed), max_new_tokens=new, stop_ids=(), **how)  # type: ignore[arg-type]


def all_of(decoding: Decoding) -> dict[int, list[Token]]:
    found: defaultdict[int, list[Token]] = defaultdict(list)
    while decoding.busy:
        for token in decoding.step():
            found[token.number].append(token)
    return found


def ids(tokens: list[Token]) -> tuple[int, ...]:
    return tuple(token.id for token in tokens)


def test_bytes_of_a_token_are_those_of_its_keys_and_values(base: BaseModel) -> None:
    layers, kv_heads, head_dim, of_float32 = 2, 2, 8, 4
    assert kv_bytes_per_token(base) == 2 * layers * kv_heads * head_dim * of_float32


def test_requests_wait_for_memory_and_give_it_back(base: BaseModel) -> None:
    shelf = kv_bytes_per_token(base) * shelf_tokens(64)
    budget = MemoryBudget(3 * shelf + 17)
    requests = [asked(9 + i, 12, seed=i) for i in range(7)] + [asked(100, 20, seed=7)]
    decoding = Decoding(base, budget=budget)
    decoding.add(requests)
    found: defaultdict[int, list[Token]] = defaultdict(list)
    most = 0
    while decoding.busy:
        for token in decoding.step():
            found[token.number].append(token)
        most = max(most, decoding.under_way)
        assert decoding.held_bytes <= budget.total_bytes - budget.free_bytes <= budget.total_bytes
    assert most == 3 or most == 2
    assert budget.free_bytes == budget.total_bytes
    assert decoding.held_bytes == 0
    for number, alone in enumerate(generate(base, requests)):
        assert ids(found[number]) == alone.ids


def test_what_others_hold_keeps_requests_waiting(base: BaseModel) -> None:
    shelf = kv_bytes_per_token(base) * shelf_tokens(64)
    budget = MemoryBudget(2 * shelf)
    assert budget.reserve("training", shelf + 1)
    decoding = Decoding(base, budget=budget)
    decoding.add([asked(5, 3)])
    assert decoding.step() == []
    assert (decoding.under_way, decoding.waiting) == (0, 1)
    budget.release("training", shelf + 1)
    assert len(all_of(decoding)[0]) == 3


def test_what_can_never_fit_is_refused_with_the_numbers(base: BaseModel) -> None:
    budget = MemoryBudget(kv_bytes_per_token(base) * 130)
    decoding = Decoding(base, budget=budget)
    with pytest.raises(ConfigError, match=r"request 1: 100 prompt .* of 128 tokens; shorten"):
        decoding.add([asked(100, 29), asked(100, 30)])
    assert not decoding.busy
    with pytest.raises(ConfigError, match=r"batch_size 0[^\n]*\n.*chunk_tokens 0"):
        Decoding(base, batch_size=0, chunk_tokens=0)


def test_dropped_requests_free_their_memory(base: BaseModel) -> None:
    budget = MemoryBudget(1 << 30)
    decoding = Decoding(base, batch_size=2, budget=budget)
    decoding.add([asked(5, 30), asked(5, 30, seed=1), asked(5, 30, seed=2)])
    decoding.step()
    for number in (0, 2, 1, 1):
        decoding.drop(number)
    assert not decoding.busy
    assert budget.free_bytes == budget.total_bytes


def test_all_is_forgotten_at_once_after_a_fault(base: BaseModel) -> None:
    budget = MemoryBudget(1 << 20)
    decoding = Decoding(base, batch_size=2, budget=budget)
    decoding.add([asked(5, 30, seed=n) for n in range(3)])
    decoding.step()
    decoding.clear()
    assert (decoding.busy, budget.held(), decoding.held_bytes) == (False, {}, 0)
    decoding.add([asked(5, 3)])
    assert len(all_of(decoding)[3]) == 3


def test_rows_leave_what_another_waits_for(base: BaseModel) -> None:
    shelf = kv_bytes_per_token(base) * shelf_tokens(64)
    budget = MemoryBudget(4 * shelf, {"keys and values": shelf})
    decoding = Decoding(base, budget=budget)
    assert decoding.most_tokens == 64
    decoding.add([asked(5, 4 + n, seed=n) for n in range(6)])
    decoding.step()
    assert decoding.under_way == 4
    assert not budget.reserve("training", 2 * shelf)
    budget.waiting = "training"
    while not budget.reserve("training", 2 * shelf):
        decoding.step()
    # Nobody began anew meanwhile; and with its floor the rest goes on.
    assert decoding.waiting == 2
    all_of(decoding)
    assert budget.held() == {"training": 2 * shelf}


def test_a_long_prompt_is_read_in_pieces_and_stalls_nobody(base: BaseModel) -> None:
    requests = [asked(6, 20), asked(200, 5, seed=1), asked(7, 5, seed=2), asked(1, 5, seed=3)]
    alone = [generate(base, [request])[0].ids for request in requests]
    decoding = Decoding(base, chunk_tokens=16)
    decoding.add(requests[:1])
    found: defaultdict[int, list[Token]] = defaultdict(list)
    for step in range(60):
        if step == 2:
            decoding.add(requests[1:2])
        if step == 4:
            decoding.add(requests[2:])
        if not decoding.busy:
            break
        for token in decoding.step():
            found[token.number].append(token)
        assert sum(decoding.last_read.values()) <= 16 + 4
        assert len(found[0]) == min(step + 1, 20), "the first request has a token every step"
        if step == 4:
            assert len(found[2]) == len(found[3]) == 1, (
                "a short prompt does not wait for a long one"
            )
    assert [ids(found[number]) for number in range(4)] == alone


def test_samples_of_one_prompt_have_it_read_once(base: BaseModel) -> None:
    requests = [asked(50, 6, temperature=0.9) for _ in range(4)]
    requests = [replace(request, seed=seed) for seed, request in enumerate(requests)]
    requests.append(asked(1, 6))
    requests.append(asked(1, 6))
    alone = [generate(base, [request])[0].ids for request in requests]
    decoding = Decoding(base)
    decoding.add(requests)
    found: defaultdict[int, list[Token]] = defaultdict(list)
    read = 0
    while decoding.busy:
        for token in decoding.step():
            found[token.number].append(token)
        read += sum(decoding.last_read.values())
    assert [ids(found[number]) for number in range(6)] == alone
    assert read == 50 + 3 + 2 + 6 * 5, "the prompt once, its last token for each further sample"


def test_users_take_turns_by_the_tokens_they_have_had(base: BaseModel) -> None:
    decoding = Decoding(base, batch_size=1)
    many = [asked(8, 4, seed=i, user="many") for i in range(4)]
    few = [asked(8, 4, seed=9, user="few"), asked(8, 4, seed=10, user="few")]
    decoding.add(many)
    first = {decoding.step()[0].number}
    decoding.add(few)
    decoding.add([asked(8, 4, seed=11, user="many", priority=1)])
    ended = [t.number for _ in range(60) if decoding.busy for t in decoding.step() if t.stop_reason]
    assert first == {0}
    # The urgent one as soon as a row is free, then the user who has had less.
    assert ended == [0, 6, 4, 5, 1, 2, 3]


def test_one_user_leaves_rows_to_others(base: BaseModel) -> None:
    decoding = Decoding(base, batch_size=4, rows_per_user=3)
    decoding.add([asked(5, 20, seed=i, user="many") for i in range(6)])
    decoding.step()
    assert (decoding.under_way, decoding.waiting) == (3, 3)
    (number,) = decoding.add([asked(5, 20, user="late")])
    assert number in {token.number for token in decoding.step()}


def test_likely_tokens_are_told_with_their_probabilities(base: BaseModel) -> None:
    requests = [asked(9, 4, top_logprobs=3), asked(5, 4, temperature=1.5, seed=3, top_logprobs=20)]
    plain, both = asked(4, 4), generate(base, [*requests, asked(4, 4)])
    assert both[2] == replace(generate(base, [plain])[0], logprobs=both[2].logprobs)
    assert both[2].top_logprobs == ()
    for request, found in zip(requests, both[:2], strict=True):
        assert [len(top) for top in found.top_logprobs] == [request.top_logprobs] * 4
        text = torch.tensor(request.prompt_ids + found.ids)
        with torch.no_grad(), base.route.over((0, len(text)), (None,)):
            logits = base.logits(base.hidden(text, torch.arange(len(text))))
        known = logits.log_softmax(-1)[len(request.prompt_ids) - 1 : -1]
        for top, row in zip(found.top_logprobs, known, strict=True):
            assert [one.logprob for one in top] == sorted((o.logprob for o in top), reverse=True)
            expected, places = row.topk(request.top_logprobs)
            assert [one.id for one in top] == places.tolist()
            assert [one.logprob for one in top] == pytest.approx(expected.tolist(), abs=1e-4)
    greedy = both[0]
    assert [top[0].id for top in greedy.top_logprobs] == list(greedy.ids)
    with pytest.raises(ConfigError, match="top_logprobs 21; use 0 to 20"):
        generate(base, [asked(3, 1, top_logprobs=21)])


def test_rows_drawn_together_are_drawn_alone() -> None:
    logits = torch.randn(12, 50) * 3
    logits[3] = logits[3].round()
    requests = [
        Request((1,), temperature=0.5 + 0.1 * i, seed=i, top_k=(0, 7, 60)[i % 3], top_p=p)
        for i, p in enumerate((1.0, 0.3, 0.9, 0.7) * 3)
    ]
    together = draw_each(logits, requests, range(12))
    for row, (request, number) in enumerate(zip(requests, range(12), strict=True)):
        assert draw(logits[row], request, number) == together[row]


def test_a_nucleus_of_many_tokens_is_whole() -> None:
    """Past the few likeliest that are looked at first, and beside a row whose nucleus is small."""
    logits = torch.stack([torch.randn(4000) * 0.01, torch.randn(4000) * 5])
    requests = [
        Request((1,), temperature=1.0, top_p=0.9),
        Request((1,), temperature=1.0, top_p=0.5),
    ]
    drawn = torch.stack([draw_each(logits, requests, [n, n]) for n in range(300)])
    flat = set(drawn[:, 0].tolist())
    kept = set(logits[0].sort(descending=True).indices[:3700].tolist())
    assert flat <= kept
    assert len(flat) > 200
    known, order = logits[1].softmax(-1).sort(descending=True)
    small = set(order[: int((known.cumsum(-1) < 0.5).sum()) + 1].tolist())
    assert set(drawn[:, 1].tolist()) == small
    for row in range(2):
        assert draw(logits[row], requests[row], 7) == drawn[7, row]


def test_one_that_diverges_ends_alone_and_leaves_nothing_behind(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pennyweight.lora import attach, detach, trained_parameters

    attach(base, LoraConfig(r=2), name="broken")
    attach(base, LoraConfig(r=2), name="sound")
    try:
        with torch.no_grad():
            for parameter in trained_parameters(base, "broken").values():
                parameter.fill_(float("nan"))
        sound = [asked(4 + i, 9, seed=i, adapter=(None, "sound")[i % 2]) for i in range(4)]
        alone = [generate(base, [request])[0].ids for request in sound]
        decoding = Decoding(base, batch_size=5)
        decoding.add([asked(40, 5, adapter="broken"), *sound])
        found = all_of(decoding)
        assert [token.stop_reason for token in found[0]] == ["diverged"]
        assert [ids(found[number]) for number in range(1, 5)] == alone
        # The next to stand where it stood reads zeros past its own end, not its keys and values.
        longer = asked(50, 3, seed=5)
        decoding.add([longer, *sound])
        again = all_of(decoding)
        assert [ids(again[number]) for number in range(6, 10)] == alone
    finally:
        detach(base, "broken")
        detach(base, "sound")


def test_adapters_in_use_are_told(base: BaseModel) -> None:
    from pennyweight.lora import attach, detach

    attach(base, LoraConfig(r=2), name="used")
    try:
        decoding = Decoding(base, batch_size=1)
        decoding.add([asked(3, 2), asked(3, 2, adapter="used")])
        assert decoding.adapters() == {"used"}
        all_of(decoding)
        assert decoding.adapters() == set()
    finally:
        detach(base, "used")
