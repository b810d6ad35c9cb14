"""Log-likelihoods against transformers' own, one continuation at a time; a shared context read once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.evaluate.tasks import likelihood
from pennyweight.evaluate.tasks.answering import Asked, answers
from pennyweight.evaluate.tasks.likelihood import Continuation, likelihoods
from pennyweight.generate import Request, generate
from pennyweight.lora import adapter_of, attach
from pennyweight.model import BaseModel, load_base

CONTEXTS = [tuple(range(5, 45)), (7,), tuple(range(60, 75))]
ASKED = [
    Continuation(CONTEXTS[0], (100,)),
    Continuation(CONTEXTS[0], (101,)),
    Continuation(CONTEXTS[1], (9, 8, 7)),
    Continuation(CONTEXTS[0], (100, 50, 51)),
    Continuation(CONTEXTS[0], (100, 50, 52)),
    Continuation(CONTEXTS[0], (102, 60)),
    Continuation(CONTEXTS[0], (103, 61, 62, 63, 64)),
    Continuation(CONTEXTS[0], (103, 61)),
    Continuation(CONTEXTS[2], (100, 50)),
    Continuation(CONTEXTS[2], (111, 50)),
    Continuation(CONTEXTS[0], (100,)),
]


def opened(folder: Path) -> BaseModel:
    return load_base(BaseConfig(model=str(folder), quantization="none", device="cpu"))


@pytest.mark.parametrize("budget_tokens", [1, 70, 4096])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "mistral"])
def test_each_continuation_is_as_likely_as_alone(
    tiny_model_folder: Callable[[str], Path], family: str, budget_tokens: int
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(family)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    told: list[int] = []
    found = likelihoods(opened(folder), ASKED, budget_tokens=budget_tokens, done=told.append)
    assert sum(told) == len(ASKED)
    for each, likely in zip(ASKED, found, strict=True):
        ids = torch.tensor([each.context + each.ids])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(each.context) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(each.ids)[:, None]).sum()
        assert likely.logprob == pytest.approx(float(own), abs=1e-4)
        assert likely.greedy == (logits.argmax(-1).tolist() == list(each.ids))


def test_what_greedy_decoding_gives_is_greedy(tiny_llama_folder: Path) -> None:
    base = opened(tiny_llama_folder)
    given = generate(base, [Request(CONTEXTS[0], max_new_tokens=5, stop_ids=())])[0]
    other = (*given.ids[:-1], (given.ids[-1] + 1) % 288)
    right, wrong = likelihoods(
        base, [Continuation(CONTEXTS[0], given.ids), Continuation(CONTEXTS[0], other)]
    )
    assert right.greedy
    assert not wrong.greedy
    assert right.logprob == pytest.approx(sum(given.logprobs), abs=1e-4)


def test_a_shared_context_is_read_once(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = opened(tiny_llama_folder)
    hidden, read = base.hidden, []
    monkeypatch.setattr(base, "hidden", lambda ids, at: (read.append(len(ids)), hidden(ids, at))[1])
    four = [Continuation(CONTEXTS[0], (token,)) for token in range(100, 104)]
    likelihoods(base, four)
    assert read == [40], "the answers A to D cost one question"
    read.clear()
    four = [Continuation(CONTEXTS[0], (token, 50, 51)) for token in range(100, 104)]
    likelihoods(base, four)
    assert read == [42, 6], "and longer ones their own tokens beside it"


def test_chunks_of_logits_change_nothing(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = opened(tiny_llama_folder)
    whole = likelihoods(base, ASKED)
    monkeypatch.setattr(likelihood, "MOST_LOGITS", 2 * base.vocab_size)
    assert [each.logprob for each in likelihoods(base, ASKED)] == pytest.approx(
        [each.logprob for each in whole], abs=1e-5
    )


def test_the_adapter_that_is_named_reads(tiny_llama_folder: Path) -> None:
    base = opened(tiny_llama_folder)
    plain = likelihoods(base, ASKED)
    # The head too, which reads rows of its own.
    attach(base, LoraConfig(r=2, target_modules=("q_proj", "lm_head")), name="fresh")
    for parameter in (p for n, p in base.module.named_parameters() if "lora_B" in n):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    assert len(adapter_of(base, "fresh", LoraConfig(r=2)).factors) == 3
    bare = likelihoods(base, ASKED)
    assert [a.logprob for a in bare] == pytest.approx([a.logprob for a in plain], abs=1e-6)
    tuned = likelihoods(base, ASKED, adapter="fresh")
    alone = [likelihoods(base, [each], adapter="fresh")[0].logprob for each in ASKED]
    assert [a.logprob for a in tuned] == pytest.approx(alone, abs=1e-4)
    assert all(abs(a.logprob - b.logprob) > 1e-3 for a, b in zip(tuned, plain, strict=True))


def test_an_answer_ends_before_its_stop_string(tiny_llama_folder: Path) -> None:
    base = opened(tiny_llama_folder)
    requests = [
        Request(context, max_new_tokens=most, stop_ids=())
        for context, most in zip(CONTEXTS, (30, 12, 20), strict=True)
    ]
    whole = [
        base.tokenizer.decode(list(c.ids), skip_special_tokens=True)
        for c in generate(base, requests)
    ]
    stops = [(text[7:9], "never said") for text in whole]
    told: list[int] = []
    asked = [Asked(*pair) for pair in zip(requests, stops, strict=True)]
    found = answers(base, asked, batch_size=2, done=told.append)
    assert told == [1, 1, 1]
    assert found == [text.split(stop)[0] for text, (stop, _) in zip(whole, stops, strict=True)]
    assert answers(base, [Asked(request, ()) for request in requests]) == whole
