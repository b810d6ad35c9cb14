"""axolotl's `datasets:`: what each type of row is here, and what its prompt would have said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pennyweight.config.foreign import trainer
from pennyweight.config.foreign.account import Account
from pennyweight.config.foreign.rows import local_path, put_sources
from pennyweight.config.foreign.trainer_keys import groups, names

__all__ = ["rows"]

_KEYS = names("""
path type split name data_files ds_type field field_messages message_property_mappings
message_field_role message_field_content roles roles_to_train train_on_eos chat_template
chat_template_jinja field_human field_model conversation revision text_column shards
""")

_UNNEEDED = groups(
    {
        "the file's ending says it": "ds_type",
        "rows are read in a stream": "preprocess_shards",
        "tools are read from the row's `tools`": "field_tools",
    }
)
_LOST = groups(
    {
        "code that makes the rows; none is run here, so write them to a file": "trust_remote_code",
        "a share of the rows; cut the file before": "shards shards_idx skip",
        "a key of each turn that says whether it is trained; here that is `weight` (0 or 1) or "
        "`train`": "message_field_training",
        "spans of a turn that are trained; here whole turns are": "message_field_training_detail",
        "where an answer's reasoning stands; here that is `reasoning_content`": (
            "field_thinking template_thinking_key split_thinking"
        ),
        "system turns left out; take them out of the rows": "drop_system_message",
        "a change of the rows before they are read; write them out changed": (
            "input_transform input_format"
        ),
        "logits of another model to learn from; here the rows' tokens are": (
            "logprobs_field temperature"
        ),
    }
)

_ALPACA_WORDS = (
    "the Alpaca preamble and its ### headings are not written: instruction, a newline and input are "
    "the question, printed by the model's own template (or plain). To keep that wording, write it "
    "into the rows as prompt and completion and set data.template: plain"
)
# axolotl's types of instruction rows: our format, and its columns where they differ from our names.
_TYPES: dict[str, tuple[str, dict[str, str]]] = {
    "alpaca": ("alpaca", {}),
    "alpaca_chat": ("alpaca", {}),
    "alpaca_w_system": ("alpaca", {}),
    "gpteacher": ("alpaca", {"output": "response"}),
    "jeopardy": ("prompt_completion", {"prompt": "question", "completion": "answer"}),
    "oasst": ("prompt_completion", {"prompt": "INSTRUCTION", "completion": "RESPONSE"}),
    "context_qa": ("prompt_completion", {"prompt": "question", "completion": "answer"}),
    "summarizetldr": ("prompt_completion", {"prompt": "article", "completion": "summary"}),
}


def rows(account: Account, beside: Path) -> bool:
    """`data.train`, `data.eval` and how rows are held out; whether any are."""
    train = [_source(part, beside) for part in account.parts("datasets")]
    pretraining = account.read("pretraining_dataset")
    if isinstance(pretraining, str):
        account.became("pretraining_dataset", "data.train", "plain text")
        train.append({"path": local_path(pretraining, beside), "format": "text"})
    elif pretraining is not None:
        train += [_pretraining(part, beside) for part in account.parts("pretraining_dataset")]
    held = [_source(part, beside) for part in account.parts("test_datasets")]
    train, held = ([s for s in several if s] for several in (train, held))
    if not train:
        account.fault("datasets", "missing; it names the rows to train on")
        return False
    put_sources(account, train, held)
    if account.truth("dataset_exact_deduplication"):
        account.lose(
            "dataset_exact_deduplication",
            "equal rows trained once; here they are counted, and refused past "
            "data.max_duplicate_share: take them out of the file",
        )
    return _held_out(account, bool(held))


def _held_out(account: Account, has_rows: bool) -> bool:
    share = account.number("val_set_size")
    if has_rows:
        if share is not None:
            account.unneeded("val_set_size", "test_datasets names the held-out rows")
        return True
    if not share:
        said = "no rows are held out, as there; 0.05 would show what the tuning was worth"
        account.carry_or_assume(
            "val_set_size", "data.eval_fraction", share, 0.0, said=said, assumed=said
        )
        return False
    if share >= 1:
        account.lose(
            "val_set_size",
            f"{share:g} rows; here a share of them (data.eval_fraction, 0.05 is set), at most 500",
        )
        account.run["data.eval_fraction"] = 0.05
    else:
        account.carry("val_set_size", "data.eval_fraction", share, "at most 500 rows")
    return True


def _pretraining(part: Account, beside: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"path": _path(part, beside), "format": "text"}
    column = part.text("text_column")
    if column not in (None, "text"):
        part.became("text_column", "data.columns")
        found["columns"] = {"text": column}
    if "type" in part:
        part.same("type", "plain text")
    _split(part, found)
    trainer.finish(part, _KEYS, _UNNEEDED, _LOST)
    return found


def _source(part: Account, beside: Path) -> dict[str, Any]:
    """One table of `datasets`, told of key by key; empty where it names no rows."""
    path = _path(part, beside)
    if not path:
        return {}
    found: dict[str, Any] = {"path": path}
    _split(part, found)
    kind = part.read("type")
    if isinstance(kind, dict):
        _custom(part, found)
    else:
        _typed(part, part.text("type") or "", found)
    _turns(part)
    trainer.finish(part, _KEYS, _UNNEEDED, _LOST)
    return found


def _path(part: Account, beside: Path) -> str:
    """A file, a folder or a Hub id; `path: json` with `data_files` means the files."""
    path, files = part.text("path"), part.words("data_files")
    if path is None:
        part.fault("path", "missing; every data set needs one")
        return ""
    if files and path in ("json", "csv", "text", "parquet"):
        part.same("path", "the file's ending says it")
        part.became("data_files", _to(part))
        if len(files) > 1:
            part.lose("data_files", f"{len(files)} files under one name; list each as a source")
        return local_path(files[0], beside)
    local = local_path(path, beside)
    if files:
        part.lose("data_files", "some files of a data set; name each file as a source")
    part.became("path", _to(part))
    if (revision := part.text("revision")) is not None:
        local = f"{local}@{revision}"
        part.became("revision", _to(part))
    if (name := part.text("name")) is not None:
        part.lose("name", f"the configuration {name} of a Hub data set; name its files or folder")
    return local


def _to(part: Account) -> str:
    return "data.eval" if part.path[:1] == ("test_datasets",) else "data.train"


def _split(part: Account, found: dict[str, Any]) -> None:
    split = part.text("split")
    if split is None:
        return
    whole = split.partition("[")[0]
    if "[" in split:
        part.lose("split", f"a slice ({split}); {whole} is read whole, so cut the file before")
    elif split == "train":
        part.same("split")
    else:
        part.became("split", _to(part))
    if whole != "train" and not Path(found["path"]).is_file():
        found["split"] = whole


def _typed(part: Account, kind: str, found: dict[str, Any]) -> None:
    name = kind.split(".")[0].split(":")[0]
    if name in ("chat_template", "sharegpt"):
        _chat(part, name, found)
    elif name in ("completion", "pretrain"):
        part.became("type", "data.format", "every token is trained")
        found["format"] = "text"
        if (column := part.text("field")) not in (None, "text"):
            part.became("field", "data.columns")
            found["columns"] = {"text": column}
    elif name in _TYPES:
        form, columns = _TYPES[name]
        found["format"] = form
        if columns:
            found["columns"] = columns
        part.became("type", "data.format", form)
        part.lose("type", _ALPACA_WORDS if form == "alpaca" else f"{kind}'s wording of the prompt")
    elif name == "input_output":
        part.lose(
            "type",
            "segments with a label each, true where trained; that format is not read here: join "
            "them to prompt and completion",
        )
    elif kind:
        found["format"] = "auto"
        part.lose("type", f"{kind} is not known here; the format is found by the rows' keys")


def _chat(part: Account, name: str, found: dict[str, Any]) -> None:
    """`messages` with role and content is our `chat`; `conversations` with from and value `sharegpt`."""
    mapped = part.part("message_property_mappings")
    role = (mapped and mapped.text("role")) or part.text("message_field_role")
    content = (mapped and mapped.text("content")) or part.text("message_field_content")
    shared = name == "sharegpt" or role == "from"
    field = part.text("field_messages") or ("conversations" if shared else "messages")
    form = "sharegpt" if shared or field in ("conversations", "conversation") else "chat"
    own = "conversations" if form == "sharegpt" else "messages"
    found["format"] = form
    if "type" in part:
        part.became("type", "data.format", form)
    if field not in (own, "conversation"):
        found["columns"] = {own: field}
        part.became("field_messages", "data.columns")
    elif "field_messages" in part:
        part.same("field_messages", f"the name {form} rows have")
    expected = ("from", "value") if shared else ("role", "content")
    for where, key, value, ours in (
        (mapped, "role", role, expected[0]),
        (mapped, "content", content, expected[1]),
    ):
        if value is None:
            continue
        told, named = (
            (where, key) if where is not None and key in where else (part, f"message_field_{key}")
        )
        if value == ours:
            told.same(named)
        else:
            told.lose(
                named, f"turns name it {value}; here it must be {ours}: rename it in the rows"
            )
    if mapped is not None:
        for key in mapped.open_keys():
            mapped.lose(key, "a further property of a turn")


def _custom(part: Account, found: dict[str, Any]) -> None:
    """A `type` written out: its columns are carried, the wording around them is not."""
    kind = part.part("type")
    assert kind is not None
    question = kind.text("field_instruction") or "instruction"
    answer = kind.text("field_output") or "output"
    asked = kind.text("field_input")
    if asked is None:
        found["format"] = "prompt_completion"
        found["columns"] = {"prompt": question, "completion": answer}
    else:
        found["format"] = "alpaca"
        names = {"instruction": question, "input": asked, "output": answer}
        found["columns"] = {own: theirs for own, theirs in names.items() if own != theirs}
    for key in ("field_instruction", "field_input", "field_output"):
        if key in kind:
            kind.became(key, "data.columns")
    bare = {"{instruction}", "{instruction} ", "{instruction}\n{input}", "{instruction} {input}"}
    for key in ("format", "no_input_format"):
        if (wording := kind.text(key)) is None:
            continue
        if wording in bare:
            kind.same(key, "nothing but the question")
        else:
            kind.lose(
                key,
                "words around the question; here the model's template prints it. Write them into "
                "the rows, or give a Jinja file as data.template",
            )
    if (system := kind.text("system_prompt")) is not None:
        if system.strip():
            kind.carry("system_prompt", "data.system", system)
        else:
            kind.same("system_prompt", "none, as here")
    for key in kind.open_keys():
        kind.lose(key, "part of a prompt written out; write it into the rows")
    # A run has one table of columns; an empty one says nothing.
    if not found["columns"]:
        del found["columns"]


def _turns(part: Account) -> None:
    """Which roles and stop tokens of a conversation are trained."""
    if (trained := part.words("roles_to_train")) is not None:
        if set(trained) <= {"assistant", "gpt", "model"}:
            part.same("roles_to_train", "answers are trained")
        elif not trained:
            part.lose("roles_to_train", "no role is trained there; here answers are")
        else:
            part.lose(
                "roles_to_train",
                f"{', '.join(trained)}; here answers are trained, or everything (data.train_on: all)",
            )
    ends = part.text("train_on_eos")
    if ends == "turn":
        part.same("train_on_eos", "the stop token of each trained turn is trained")
    elif ends is not None:
        part.lose("train_on_eos", f"{ends}; here the stop token of each trained turn is trained")
    if (names := part.part("roles")) is not None:
        for key in names.open_keys():
            spoken = names.words(key) or []
            known = {"human", "user", "gpt", "assistant", "system", "tool", "model", "bot"}
            if set(spoken) <= known:
                names.same(key, "the names these roles have here too")
            else:
                names.lose(
                    key, "names of speakers that are not known here: rename them in the rows"
                )
    for key in ("chat_template", "chat_template_jinja", "conversation"):
        if key in part and part.read(key) not in ("tokenizer_default",):
            part.lose(key, "a template for these rows alone; data.template is one for all rows")
