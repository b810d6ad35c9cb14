"""Stop tokens, sampling, streaming, refusals and the order of answers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pennyweight.config import BaseConfig
from pennyweight.errors import ConfigError, DivergedError
from pennyweight.generate import Decoding, Request, draw, generate, stream, uniform
from pennyweight.model import BaseModel, load_base


@pytest.fixture(scope="module")
def base(tiny_llama_folder: Path) -> BaseModel:
    return load_base(BaseConfig(model=str(tiny_llama_folder), quantization="none", device="cpu"))


PROMPT = (5, 77, 130, 9)


def test_a_stop_token_ends_the_row_and_is_left_out(base: BaseModel) -> None:
    free = generate(base, [Request(PROMPT, max_new_tokens=10, stop_ids=())])[0]
    assert free.stop_reason == "length"
    assert len(free.ids) == len(free.logprobs) == 10
    at = free.ids.index(free.ids[4])
    stopped = generate(base, [Request(PROMPT, max_new_tokens=10, stop_ids=(free.ids[4],))])[0]
    assert stopped.ids == free.ids[:at]
    assert stopped.stop_reason == "stop"
    last = generate(base, [Request(PROMPT, max_new_tokens=at + 1, stop_ids=(free.ids[4],))])[0]
    assert last.stop_reason == "stop", "a stop token in the last place still stops"


def test_the_bases_own_stop_tokens_hold_where_none_are_named(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generate(base, [Request(PROMPT, max_new_tokens=1, stop_ids=())])[0].ids[0]
    monkeypatch.setattr(base, "stop_ids", (first,))
    assert generate(base, [Request(PROMPT, max_new_tokens=4)])[0].ids == ()


def test_streaming_yields_what_generate_returns(base: BaseModel) -> None:
    request = Request(PROMPT, max_new_tokens=9, temperature=1.0, seed=3)
    assert tuple(stream(base, request)) == generate(base, [request])[0].ids


def test_a_row_does_not_depend_on_who_stands_beside_it(base: BaseModel) -> None:
    requests = [
        Request(
            tuple(range(5 + i, 5 + i + length)),
            max_new_tokens=3 + 5 * (i % 3),
            temperature=0.9,
            top_k=20 * (i % 2),
            top_p=0.9,
            seed=i,
            stop_ids=(),
        )
        for i, length in enumerate((7, 2, 90, 1, 30, 4, 4))
    ]
    together = generate(base, requests, batch_size=3)
    assert [len(c.ids) for c in together] == [r.max_new_tokens for r in requests]
    for request, completion in zip(requests, together, strict=True):
        assert generate(base, [request])[0].ids == completion.ids


def test_logprobs_are_the_models_own(base: BaseModel) -> None:
    request = Request(PROMPT, max_new_tokens=6, temperature=1.3, seed=1, stop_ids=())
    found = generate(base, [request])[0]
    ids = torch.tensor(PROMPT + found.ids)
    with torch.no_grad(), base.route.over((0, len(ids)), (None,)):
        logits = base.logits(base.hidden(ids, torch.arange(len(ids))))
    expected = logits.log_softmax(-1)[3:-1].gather(1, ids[4:, None]).squeeze(1)
    assert found.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    request = Request(PROMPT, temperature=1.0, seed=7)
    counts = Counter(int(draw(logits, request, number)) for number in range(4000))
    for token, share in enumerate(logits.softmax(-1).tolist()):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


def test_top_k_and_top_p_leave_out_the_unlikely() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[torch.tensor([2, 0, 3, 1])]

    def ids(**how: float) -> set[int]:
        request = replace(Request(PROMPT, temperature=1.0, seed=1), **how)
        return {int(draw(logits, request, number)) for number in range(300)}

    assert ids() == {0, 1, 2, 3}
    assert ids(top_k=2) == {1, 3}
    assert ids(top_p=0.65) == {1, 3}
    assert ids(top_p=0.71) == {0, 1, 3}
    assert ids(top_k=3, top_p=0.5) == {1, 3}, "top-p is counted over what top-k left"
    assert ids(top_p=1e-9) == {1}


def test_uniform_numbers_are_a_pure_function_of_seed_and_number() -> None:
    values = [uniform(3, number) for number in range(2000)]
    assert values[:5] == [uniform(3, number) for number in range(5)]
    assert uniform(3, 0) != uniform(4, 0)
    assert all(0 <= value < 1 for value in values)
    assert sum(values) / 2000 == pytest.approx(0.5, abs=0.03)


def test_every_fault_is_named_at_once(base: BaseModel) -> None:
    with pytest.raises(ConfigError) as caught:
        generate(
            base,
            [
                Request(()),
                Request((1, 99999)),
                Request((1,) * 250, max_new_tokens=7),
                Request(PROMPT, temperature=-1.0, top_p=0.0, top_k=-2, max_new_tokens=0),
                Request(PROMPT, adapter="sqll"),
            ],
        )
    text = str(caught.value)
    assert isinstance(caught.value, ValueError)
    for words in (
        "request 0: the prompt is empty",
        "request 1: prompt id 99999 is outside the vocabulary",
        "request 2: 250 prompt tokens and 7 new ones exceed the base's 256 positions",
        "request 3: temperature -1.0",
        "request 3: top_p 0.0",
        "request 3: top_k -2",
        "request 3: max_new_tokens 0",
        "request 4: adapter 'sqll' is not attached; attached: none",
    ):
        assert words in text
    assert len(generate(base, [Request((1,) * 250, max_new_tokens=6, stop_ids=())])[0].ids) == 6


def test_logits_that_are_not_finite_are_refused(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = torch.full((1, base.vocab_size), float("nan"))
    monkeypatch.setattr(base, "logits", lambda hidden: poisoned)
    with pytest.raises(DivergedError, match="request 0, new token 0"):
        generate(base, [Request(PROMPT, max_new_tokens=8)])


def test_requests_join_and_leave_while_others_are_under_way(base: BaseModel) -> None:
    requests = [Request(PROMPT[: i + 1], max_new_tokens=8, stop_ids=()) for i in range(4)]
    expected = [c.ids for c in generate(base, requests)]
    decoding = Decoding(base, batch_size=2)
    decoding.add(requests[:2])
    found: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    for step in range(40):
        if step == 3:
            assert decoding.add(requests[2:]) == [2, 3]
        if step == 5:
            decoding.drop(0)
        if not decoding.busy:
            break
        for token in decoding.step():
            found[token.number].append(token.id)
    assert len(found.pop(0)) < 8
    for number, ids in found.items():
        assert tuple(ids) == expected[number]


def test_no_requests_give_no_completions(base: BaseModel) -> None:
    assert generate(base, []) == []


def test_a_real_model_tells_its_known_story(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260k"
    base = load_base(BaseConfig(model=str(folder), quantization="none", device="cpu"))
    golden = json.loads((folder / "GOLDEN.json").read_text(encoding="utf-8"))
    prompt = (base.tokenizer.bos_token_id,)
    ids = generate(base, [Request(prompt, max_new_tokens=200, stop_ids=())])[0].ids
    text = base.tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    assert text == golden["greedy_from_bos_200_new_tokens"]
