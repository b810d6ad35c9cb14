"""Our resident model as lm-eval sees a model: text in, log-likelihoods and text out.

Text becomes tokens, and long text is cut, as in lm-eval's own `hf` model, so that figures compare;
what is computed goes through the base's route, its adapters and its cache. This is the one module
that imports lm-eval at once; it is imported when tasks are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pennyweight.data.chat import Renderer
from pennyweight.errors import DataError
from pennyweight.evaluate.tasks.answering import Asked, answers
from pennyweight.evaluate.tasks.likelihood import Continuation, likelihoods
from pennyweight.generate import Request
from pennyweight.model import BaseModel

__all__ = ["ResidentLM"]

MOST_NEW_TOKENS = 256  # where a task names no number, as lm-eval has it
KNOWN_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class ResidentLM(TemplateLM):
    """One reader of a resident base: the bare base, or one of its adapters.

    `renderer` renders chat, where prompts are rendered as chat; `stop_ids` end an answer beside the
    base's own. `told(doing, done, total)` hears of progress. `cut`: prompts that lost their
    beginning because they were longer than the base's positions.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        adapter: str | None = None,
        renderer: Renderer | None = None,
        stop_ids: Sequence[int] = (),
        told: Callable[[str, int, int], None] = lambda doing, done, total: None,
    ) -> None:
        super().__init__()
        self._base, self._adapter, self._renderer = base, adapter, renderer
        self._stop_ids = tuple(dict.fromkeys([*base.stop_ids, *stop_ids]))
        self._told = told
        self._begin = str(base.tokenizer.decode([self.prefix_token_id]))
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        eos = self._base.tokenizer.eos_token_id
        if eos is None and not self._stop_ids:
            raise DataError(f"{self._base.name}: its tokenizer has no token that ends a text")
        return int(self._stop_ids[0] if eos is None else eos)

    @property
    def prefix_token_id(self) -> int:
        bos = self._base.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self._base.max_positions

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text: BOS where the tokenizer puts one and the text has none."""
        if add_special_tokens is None and self._renderer is not None:
            return self._renderer.ids(string)
        if add_special_tokens is None and string.startswith(self._begin):
            add_special_tokens = False
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        # Text longer than the model is cut here, and counted.
        settings["verbose"] = False
        return [int(i) for i in self._base.tokenizer.encode(string, **settings)]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as training rendered it, up to where an answer begins, or goes on."""
        assert self._renderer is not None, "prompts are not rendered as chat"
        if add_generation_prompt:
            return self._renderer.prompt_text(chat_history)
        *before, last = chat_history
        return self._renderer.prompt_text(before) + last["content"]

    @property
    def tokenizer_name(self) -> str:
        return self._base.name

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._fitting(context, ids) for _, context, ids in requests]
        count = _Count(self._told, "continuations scored", len(asked))
        found = likelihoods(self._base, asked, adapter=self._adapter, done=count)
        return [(each.logprob, each.greedy) for each in found]

    def _fitting(self, context: list[int], ids: list[int]) -> Continuation:
        """Both cut on the left to the base's positions and the one token after them."""
        room = self.max_length + 1
        if len(ids) >= room:
            raise DataError(
                f"{self._base.name}: an answer of {len(ids):,} tokens is longer than its "
                f"{self.max_length:,} positions; choose another task, or a base with more"
            )
        self.cut += len(context) + len(ids) > room
        return Continuation(tuple(context[max(0, len(context) + len(ids) - room) :]), tuple(ids))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts: in windows of the base's positions, each token predicted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(own))
            windows += own
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that end before the first of a request's stop strings."""
        asked, seen = [], dict[str, int]()
        for request in requests:
            context, settings = request.args
            # The same prompt drawn again is another draw.
            again = seen[context] = seen.get(context, -1) + 1
            asked.append(
                self._asked(context, normalize_gen_kwargs(settings, MOST_NEW_TOKENS), again)
            )
        count = _Count(self._told, "answers written", len(asked))
        return answers(self._base, asked, done=count)

    def _asked(self, context: str, settings: Any, seed: int) -> Asked:
        strange = sorted(set(settings) - KNOWN_SETTINGS)
        if strange:
            raise DataError(
                f"the task asks for generation with {', '.join(strange)}, which is not known here; choose "
                "another task"
            )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        most = settings["max_gen_toks"]
        # The prompt keeps half the positions at the least, however long an answer may be.
        room = max(self.max_length - most, self.max_length // 2, 1)
        self.cut += len(prompt) > room
        prompt = prompt[-room:]
        request = Request(
            prompt_ids=tuple(prompt),
            max_new_tokens=min(most, self.max_length - len(prompt)),
            temperature=float(settings.get("temperature", 0.0)) if settings["do_sample"] else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            top_k=int(settings.get("top_k", 0)),
            seed=seed,
            stop_ids=self._stop_ids,
            adapter=self._adapter,
        )
        return Asked(request, tuple(stop for stop in settings["until"] if stop))


class _Count:
    """Adds up what is done, and passes it on."""

    def __init__(self, told: Callable[[str, int, int], None], doing: str, total: int) -> None:
        self._told, self._doing, self._total, self._done = told, doing, total, 0

    def __call__(self, more: int) -> None:
        self._done += more
        self._told(self._doing, self._done, self._total)
