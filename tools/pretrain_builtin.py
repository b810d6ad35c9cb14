"""Make the built-in model: tokenizer, a small Llama trained from nothing, and its folder.

    python tools/pretrain_builtin.py --minutes 60 --texts DATA/text --chats DATA/sft --work RUN

Stops on the clock (`--minutes` of training, learning rate and all), saves its state every few
minutes under `--work`, and goes on from there when started again. Each save also writes the model
folder, every file whole or not at all. Matrices are trained with Muon (Jordan et al., 2024), the
rest with AdamW.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import pretrain_corpus as corpus_of
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pennyweight.builtin import model_folder, task

SPECIAL = ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")
VOCABULARY, CONTEXT, ROWS = 4096, 1024, 3
PROSE_EVERY = 5  # the first of ROWS is source, or each fifth time prose; the others are made
ROPE_THETA, EMBEDDING_STD = 1e6, 0.2
WIRED_LR_SHARE = 0.15  # attention that starts wired is only shaped, not made anew
COPIED, FAST_PAIRS = 38, 8  # of the wiring that training starts from, see `initialise`
SHORT, LONG_FROM = 512, 0.85  # rows are halved for speed until this share of the time
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def main() -> None:
    options = _options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    corpus = corpus_of.read_corpus(options.texts, options.chats, options.seed)
    tokenizer_file = options.work / "tokenizer.json"
    if not tokenizer_file.exists():
        _train_tokenizer(corpus).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    rows = Rows(corpus, tokenizer, options.seed)
    model = LlamaForCausalLM(_config())
    initialise(model)
    train(model, rows, tokenizer, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, in all")
    parser.add_argument("--texts", type=Path, help="folder with peps/ and sherlock/")
    parser.add_argument("--chats", type=Path, help="folder with tldr/ and gsm8k/")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and log")
    parser.add_argument("--out", type=Path, default=model_folder(), help="the model folder")
    parser.add_argument("--save-minutes", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matrix-lr", type=float, default=0.02)
    parser.add_argument("--other-lr", type=float, default=0.003)
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        pad_token_id=SPECIAL.index("<|pad|>"),
        bos_token_id=SPECIAL.index("<|bos|>"),
        eos_token_id=SPECIAL.index("<|im_end|>"),
    )


@torch.no_grad()
def initialise(model: LlamaForCausalLM) -> None:
    """Random weights, and the first two layers wired as induction heads (Olsson et al., 2022).

    The circuit that continues a pattern seen before (`A B ... A` -> `B`) takes a small model many
    tokens to find. Here training starts with a rough one and shapes it:

    * the first entry of every embedding is one constant, so that a key and a query can be constant
      too, and rotary positions alone decide where the first two heads of layer 0 look: one and two
      tokens back. They write what they find (`COPIED` entries) into entries kept empty for it;
    * the first two heads of layer 1 compare this token with the one before each earlier token, on
      the slow rotary pairs that hardly depend on distance, and write what followed.
    """
    width, head = model.config.hidden_size, model.config.head_dim
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(weight)
        elif weight.ndim == 2 and "embed" not in name:
            nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)
    embedding = model.get_input_embeddings().weight
    nn.init.normal_(embedding, std=EMBEDDING_STD)
    embedding[:, 0] = 4 * EMBEDDING_STD
    embedding[:, width - 2 * COPIED :] = 0
    model.model.norm.weight.fill_(0.06)  # the tied head starts near a uniform guess all the same
    before, match = (layer.self_attn for layer in model.model.layers[:2])
    copied = torch.arange(COPIED)
    angles = ROPE_THETA ** (-torch.arange(head // 2) / (head // 2))
    before.k_proj.weight[:head] = 0
    before.k_proj.weight[:FAST_PAIRS, 0] = 1.6
    before.v_proj.weight[:head] = 0
    before.v_proj.weight[copied, 1 + copied] = 1.0
    for i, distance in enumerate((1, 2)):
        query = before.q_proj.weight[i * head : (i + 1) * head]
        query.zero_()
        turn = distance * angles[:FAST_PAIRS]
        query[:FAST_PAIRS, 0] = 1.6 * turn.cos()
        query[head // 2 : head // 2 + FAST_PAIRS, 0] = -1.6 * turn.sin()
        target = width - (2 - i) * COPIED + copied
        before.o_proj.weight[target, i * head + copied] = EMBEDDING_STD
    pairs = torch.arange(head // 2 - COPIED // 2, head // 2)
    slow = torch.cat([pairs, pairs + head // 2])
    match.k_proj.weight[:head] = 0
    match.k_proj.weight[slow, width - 2 * COPIED + copied] = 1.6
    match.v_proj.weight[:head] = 0
    entries = torch.arange(head)
    match.v_proj.weight[entries, 1 + entries] = 1.0
    for i in range(2):
        match.q_proj.weight[i * head : (i + 1) * head] = 0
        match.q_proj.weight[i * head + slow, 1 + copied] = 1.6
        match.o_proj.weight[1 + entries, i * head + entries] = 1.5 * EMBEDDING_STD


# Tokenizer -------------------------------------------------------------------------------------


def _train_tokenizer(corpus: corpus_of.Corpus) -> Tokenizer:
    """Byte-level BPE whose merges never join a space or underscore to a word.

    So an identifier is the same tokens wherever it stands: after a space, a bracket or a quote.
    The tighter splits are needed while merges are learned; the shipped rules are the looser ones of
    a tokenizer that other programs know (deepseek-coder), and give the same tokens.
    """
    known = [
        pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s?\p{P}+"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
    ]
    tighter = pre_tokenizers.Split(Regex(r"_+|\s(?=\p{L})"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*known, tighter, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chats = [f"{q}\n{a}" for q, a in corpus.chats[::8]]
    tokenizer.train_from_iterator(corpus.code + corpus.prose[::4] + chats, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*known, to_bytes])
    return tokenizer


# Rows ------------------------------------------------------------------------------------------


class Rows:
    """Batches of token ids, each a pure function of the seed and the step."""

    def __init__(self, corpus: corpus_of.Corpus, tokenizer: Tokenizer, seed: int) -> None:
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, seed
        self.code = self._windows(corpus.code)
        self.prose = self._windows(corpus.prose or corpus.code)
        held_out = [path.read_text("utf-8") for path in task.modules(held_out=True)]
        self.unseen = self._windows(held_out)[:24]
        self.unseen_bytes_per_token = sum(len(t.encode()) for t in held_out) / sum(
            len(e.ids) for e in tokenizer.encode_batch(held_out)
        )

    def _windows(self, texts: list[str]) -> Tensor:
        """Documents in a seeded order, one after another, cut into rows of CONTEXT + 1."""
        texts = random.Random(self.seed).sample(texts, len(texts))
        encoded = self.tokenizer.encode_batch([corpus_of.BOS + text for text in texts])
        flat = torch.tensor([i for each in encoded for i in each.ids])
        count = (len(flat) - 1) // CONTEXT
        return flat[: count * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)

    def at(self, step: int) -> Tensor:
        """`[ROWS, CONTEXT + 1]`: one row of source or prose, then made documents."""
        plain = self.prose if step % PROSE_EVERY == 0 else self.code
        made = [self._made(step * ROWS + i) for i in range(ROWS - 1)]
        return torch.cat([self._taken(plain, step)[None], torch.tensor(made)])

    def _taken(self, windows: Tensor, place: int) -> Tensor:
        """One window of an endless walk that reshuffles at each epoch."""
        epoch, i = divmod(place, len(windows))
        shuffle = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        return windows[torch.randperm(len(windows), generator=shuffle)[i]]

    def _made(self, number: int) -> list[int]:
        rng = random.Random(self.seed * 1_000_003 + number)
        ids: list[int] = []
        while len(ids) <= CONTEXT:
            document = corpus_of.made_document(self.corpus, rng)
            ids += self.tokenizer.encode(document, add_special_tokens=False).ids
        return ids[: CONTEXT + 1]


# Training --------------------------------------------------------------------------------------


def train(
    model: LlamaForCausalLM, rows: Rows, tokenizer: Tokenizer, options: argparse.Namespace
) -> None:
    optimizers = _optimizers(model, options)
    step, spent_s = _resume(model, optimizers, options.work)
    short_losses = torch.compile(_losses, dynamic=False) if options.compile else _losses
    total_s, saved_s, begun = options.minutes * 60, spent_s, time.monotonic() - spent_s
    recent: list[Tensor] = []
    while spent_s < total_s:
        batch = rows.at(step)
        if spent_s < LONG_FROM * total_s:
            by_row = short_losses(model, batch, SHORT).view(ROWS, -1).mean(1)
        else:
            by_row = _losses(model, batch, CONTEXT)
        by_row.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_share(spent_s / total_s, step)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        spent_s = time.monotonic() - begun
        recent.append(by_row.detach())
        if step % 20 == 0:
            kinds = torch.stack(recent).mean(0)
            _log(options, step, spent_s, plain=kinds[0].item(), made=kinds[1:].mean().item())
            recent.clear()
        if spent_s - saved_s > options.save_minutes * 60 or spent_s >= total_s:
            saved_s = spent_s
            _log(options, step, spent_s, unseen=unseen_loss(model, rows))
            _save_state(model, optimizers, options.work, step, spent_s)
            write_folder(model, tokenizer, options.out)
    bits = unseen_loss(model, rows) / 0.6931472 / rows.unseen_bytes_per_token
    _log(options, step, spent_s, unseen_bits_per_byte=bits, tokens=step * ROWS * CONTEXT)


def _losses(model: LlamaForCausalLM, batch: Tensor, length: int) -> Tensor:
    """Mean cross-entropy of each row cut into pieces of `length` tokens, in nats."""
    inputs = batch[:, :-1].reshape(-1, length)
    logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
    return loss.view(-1, length).mean(1)


@torch.no_grad()
def unseen_loss(model: LlamaForCausalLM, rows: Rows) -> float:
    """Mean loss on source of the task's held-out modules, nats a token."""
    parts = [_losses(model, part, CONTEXT) for part in rows.unseen.split(ROWS)]
    return torch.cat(parts).mean().item()


def lr_share(spent: float, step: int) -> float:
    """Warm-up by steps, then flat, then a straight way down over the last 40 % of the time."""
    return min(1.0, (step + 1) / 30, max(0.02, (1 - spent) / 0.4))


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal by Newton-Schulz (Jordan et al., 2024), in float32."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "peak": 0.0, "momentum": 0.95, "decay": 0.05})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                memory = self.state[weight].setdefault("memory", torch.zeros_like(weight))
                memory.lerp_(weight.grad, 1 - group["momentum"])
                direction = _orthogonal(weight.grad.lerp(memory, group["momentum"]))
                direction *= max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["decay"]).sub_(direction, alpha=group["lr"])


def _orthogonal(update: Tensor) -> Tensor:
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def _optimizers(
    model: LlamaForCausalLM, options: argparse.Namespace
) -> tuple[torch.optim.Optimizer, ...]:
    named = dict(model.named_parameters())
    matrices = [w for n, w in named.items() if w.ndim == 2 and "embed" not in n]
    wired = [w for n, w in named.items() if ".0.self_attn." in n or ".1.self_attn." in n]
    free = [w for w in matrices if all(w is not other for other in wired)]
    others = [w for n, w in named.items() if w.ndim != 2 or "embed" in n]
    adam = torch.optim.AdamW(
        [{"params": others, "peak": options.other_lr}],
        lr=options.other_lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    muon = Muon(
        [
            {"params": free, "peak": options.matrix_lr},
            {"params": wired, "peak": options.matrix_lr * WIRED_LR_SHARE},
        ]
    )
    return muon, adam


def _log(options: argparse.Namespace, step: int, spent_s: float, **values: float) -> None:
    line = {"step": step, "seconds": round(spent_s, 1)}
    line |= {name: round(value, 4) for name, value in values.items()}
    print(json.dumps(line), flush=True)
    with (options.work / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")


# Saving ----------------------------------------------------------------------------------------


def _save_state(
    model: LlamaForCausalLM,
    optimizers: tuple[torch.optim.Optimizer, ...],
    work: Path,
    step: int,
    spent_s: float,
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "spent_s": spent_s,
    }
    torch.save(state, work / "state.tmp")
    (work / "state.tmp").replace(work / "state.pt")


def _resume(
    model: LlamaForCausalLM, optimizers: tuple[torch.optim.Optimizer, ...], work: Path
) -> tuple[int, float]:
    if not (work / "state.pt").exists():
        return 0, 0.0
    state = torch.load(work / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["spent_s"]


def write_folder(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder, weights in bfloat16; the tied head is stored once."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.tmp", metadata={"format": "pt"})
    (folder / "model.tmp").chmod(0o644)
    (folder / "model.tmp").replace(folder / "model.safetensors")
    config = model.config.to_diff_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "use_cache": True}
    ids = {f"{n}_token_id": config[f"{n}_token_id"] for n in ("pad", "bos", "eos")}
    _write(folder / "config.json", _json(config))
    _write(folder / "generation_config.json", _json(ids))
    _write(folder / "tokenizer.json", tokenizer.to_str())
    _write(folder / "tokenizer_config.json", _json(_tokenizer_config()))


def _tokenizer_config() -> dict[str, Any]:
    pad, bos, _, eos = SPECIAL
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": TEMPLATE,
    }


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write(path: Path, text: str) -> None:
    waiting = path.with_suffix(".tmp")
    waiting.write_text(text, encoding="utf-8")
    waiting.replace(path)


if __name__ == "__main__":
    main()
