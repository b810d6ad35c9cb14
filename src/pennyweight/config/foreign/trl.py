"""A configuration of TRL's `sft` command (1.x), or a dump of the Trainer's arguments, to a run.

Facts are those of SFTConfig, ModelConfig and the script's own arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pennyweight.config.foreign import trainer
from pennyweight.config.foreign.account import Account
from pennyweight.config.foreign.adapter import default_targets, targets, tell_scaling
from pennyweight.config.foreign.rows import first_keys, local_path, put_sources
from pennyweight.config.foreign.trainer_keys import LOST as TRAINER_LOST
from pennyweight.config.foreign.trainer_keys import READ, groups, names
from pennyweight.config.foreign.trainer_keys import UNNEEDED as TRAINER_UNNEEDED

__all__ = ["KEYS", "translate"]

KEYS = [
    *READ,
    *names("""
model_name_or_path model_revision dtype torch_dtype load_in_4bit load_in_8bit bnb_4bit_quant_type
use_bnb_nested_quant use_peft lora_r lora_alpha lora_dropout lora_target_modules
lora_modules_to_save lora_task_type use_rslora dataset_name dataset_config dataset_train_split
dataset_test_split datasets test_split_size max_length max_seq_length packing packing_strategy
dataset_text_field completion_only_loss assistant_only_loss chat_template_path eos_token loss_type
truncation_mode lora_target_parameters
"""),
]

UNNEEDED = TRAINER_UNNEEDED | groups(
    {
        "documents are kept apart by whichever attention suits the device": "attn_implementation",
        "rows are never padded": "padding_free pad_to_multiple_of pad_token eval_packing",
        "prepared rows are cached by what shapes them": "dataset_num_proc dataset_batch_size",
        "rows are shuffled every epoch": "shuffle_dataset",
        "storage and products have the base's type": "bnb_4bit_quant_storage",
        "it is for several devices": "ignore_bias_buffers",
        "it changes speed or memory, not what is learned": "use_liger",
    }
)

LOST = TRAINER_LOST | groups(
    {
        "weights of the update split into size and direction (DoRA); here it is LoRA's plain "
        "B·A": "use_dora",
        "an update of parameters that are not linear layers; name linear layers in "
        "adapter.target_modules": "lora_target_parameters",
        "code from the model's repository; none is run here": "trust_remote_code",
        "arguments for loading the model": "model_init_kwargs",
        "rows read while training; give files that fit the disk": "dataset_streaming streaming",
        "rows prepared elsewhere; give the rows themselves": "dataset_kwargs",
        "a loss over experts; the plain cross-entropy is used": "router_aux_loss_coef",
    }
)

_OF_AN_ADAPTER = names("""
lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save use_rslora load_in_4bit
load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant lora_task_type
""")
# What only the trainers of preferences and rewards have.
_OTHER_TRAINERS = names("""
beta reward_model_path reward_funcs num_generations reference_free
""")


def translate(account: Account, beside: Path) -> None:
    """Every key of the file; `beside` is the folder it stands in."""
    for key in _OTHER_TRAINERS:
        if key in account:
            account.fault(key, "trains on preferences or rewards; here rows have one answer each")
    adapted = _method(account)
    if adapted:
        _adapter(account)
    account.idle("it did nothing there: use_peft or load_in_4bit is not true", *_OF_AN_ADAPTER)
    held_out = _rows(account, beside)
    _lengths(account)
    _template(account, beside)
    trainer.steps_and_rates(account, rate=2e-5)
    trainer.evaluation(account, held_out=held_out)
    trainer.saving(account)
    trainer.bookkeeping(account, output_dir="trainer_output")
    trainer.finish(account, KEYS, UNNEEDED, LOST)


def _method(account: Account) -> bool:
    """Base and method; whether an adapter is trained."""
    model, revision = account.text("model_name_or_path"), account.text("model_revision")
    if model is None:
        account.fault("model_name_or_path", "missing; it names the model")
        return False
    if revision not in (None, "main"):
        model = f"{model}@{revision}"
        account.carry("model_revision", "base.model", model)
    account.carry("model_name_or_path", "base.model", model)
    four, eight = account.truth("load_in_4bit"), account.truth("load_in_8bit")
    adapted = bool(account.truth("use_peft"))
    method = "full" if not adapted else "qlora" if four or eight else "lora"
    said = "" if adapted else "without use_peft every weight is trained"
    if "use_peft" in account:
        account.carry("use_peft", "train.method", method, said)
    else:
        account.assume("use_peft", "train.method", method, said)
    if adapted and (four or eight):
        _quantized(account, four=bool(four))
    for key in ("dtype", "torch_dtype"):
        named = account.text(key)
        if named in ("float32", "float16", "bfloat16", "auto"):
            kept = "float32" if named == "float32" and account.truth("bf16") is False else "auto"
            account.carry(key, "base.dtype", kept, trainer.BFLOAT16 if kept == "auto" else "")
        elif named is not None:
            account.lose(key, f"{named}; base.dtype has float32, bfloat16 and float16")
    return adapted


def _quantized(account: Account, *, four: bool) -> None:
    if not four:
        account.carry("load_in_8bit", "base.quantization", "int8", trainer.OUTLIERS)
        return
    kind = account.text("bnb_4bit_quant_type") or "nf4"
    account.carry("load_in_4bit", "base.quantization", kind)
    if "bnb_4bit_quant_type" in account:
        account.carry("bnb_4bit_quant_type", "base.quantization", kind)
    double = account.truth("use_bnb_nested_quant")
    said = "true would save 0.37 bits a weight"
    account.carry_or_assume(
        "use_bnb_nested_quant", "base.double_quantization", double, False, assumed=said
    )


def _adapter(account: Account) -> None:
    rank, alpha = account.whole("lora_r"), account.number("lora_alpha")
    account.carry_or_assume("lora_r", "adapter.r", rank, 16)
    account.carry_or_assume("lora_alpha", "adapter.lora_alpha", alpha, 32)
    dropout = account.number("lora_dropout")
    account.carry_or_assume("lora_dropout", "adapter.lora_dropout", dropout, 0.05)
    if "lora_target_modules" in account:
        targets(account, "lora_target_modules")
    else:
        default_targets(account, "lora_target_modules", account.text("model_name_or_path") or "")
    if saved := account.words("lora_modules_to_save"):
        account.carry("lora_modules_to_save", "adapter.modules_to_save", saved)
    if (stabilized := account.truth("use_rslora")) is not None:
        account.carry("use_rslora", "adapter.use_rslora", stabilized)
    task = account.text("lora_task_type")
    if task == "CAUSAL_LM":
        account.same("lora_task_type", "a language model")
    elif task is not None:
        account.fault("lora_task_type", f"{task} is not here; CAUSAL_LM is")
    tell_scaling(account)


def _rows(account: Account, beside: Path) -> bool:
    """`dataset_name` or `datasets`, and what is trained of their rows; whether any are held out."""
    train = [_listed(part, beside) for part in account.parts("datasets")]
    name = account.text("dataset_name")
    if train and name:
        account.unneeded("dataset_name", "`datasets` counts where both are given")
    elif name:
        path = local_path(name, beside)
        account.became("dataset_name", "data.train")
        train = [_with_split(account, path, "dataset_train_split", "train")]
    if (configuration := account.text("dataset_config")) is not None:
        account.lose(
            "dataset_config", f"the configuration {configuration}; name its files or folder"
        )
    train = [source for source in train if source]
    if not train:
        account.fault("dataset_name", "missing; it names the rows to train on")
        return False
    _what_is_trained(account, train)
    return _held_out(account, train, beside)


def _with_split(account: Account, path: str, key: str, default: str) -> dict[str, Any]:
    split = account.text(key)
    found: dict[str, Any] = {"path": path}
    if split is not None and split != default:
        account.became(key, "data.eval" if "test" in key else "data.train")
    elif split is not None:
        account.same(key)
    if not Path(path).is_file() and (split or default) != "train":
        found["split"] = split or default
    return found


def _listed(part: Account, beside: Path) -> dict[str, Any]:
    path, files = part.text("path"), part.words("data_files")
    if path is None:
        part.fault("path", "missing; every data set needs one")
        return {}
    if files and path in ("json", "csv", "text", "parquet"):
        part.same("path", "the file's ending says it")
        path = files[0]
        part.became("data_files", "data.train")
        if len(files) > 1:
            part.lose("data_files", f"{len(files)} files under one name; list each as a source")
    else:
        part.became("path", "data.train")
    found = _with_split(part, local_path(path, beside), "split", "train")
    for key in part.open_keys():
        part.lose(key, "a choice among a set's rows or columns; write what you want to a file")
    return found


def _held_out(account: Account, train: list[dict[str, Any]], beside: Path) -> bool:
    when = account.text("eval_strategy") or account.text("evaluation_strategy") or "no"
    held: list[dict[str, Any]] = []
    share = account.number("test_split_size")
    if share and share < 1:
        account.carry("test_split_size", "data.eval_fraction", share, "at most 500 rows")
    elif share:
        account.lose("test_split_size", f"{share:g} rows; here a share (data.eval_fraction)")
    elif when != "no" and "dataset_name" in account:
        held = [_with_split(account, train[0]["path"], "dataset_test_split", "test")]
        if Path(held[0]["path"]).is_file():
            said = "a file has no splits; data.eval_fraction of its rows is held out in its place"
            account.differ(f"held-out rows: {said}")
            held = []
            share = 0.05
    if when == "no" and not share:
        key = "eval_strategy"
        said = "no rows are held out, as there; 0.05 would show what the tuning was worth"
        account.assume(key, "data.eval_fraction", 0.0, said)
    account.idle("nothing is measured there", "dataset_test_split")
    account.idle("`datasets` has its own", "dataset_train_split")
    put_sources(account, train, held)
    return bool(held or share)


def _what_is_trained(account: Account, train: list[dict[str, Any]]) -> None:
    """TRL trains every token of conversations and texts, and of prompt and completion the latter."""
    answers, completions = (
        account.truth(key) for key in ("assistant_only_loss", "completion_only_loss")
    )
    column = account.text("dataset_text_field")
    keys = [first_keys(source["path"]) for source in train]
    pairs = [None if each is None else {"prompt", "completion"} <= each for each in keys]
    if answers or completions:
        for key in ("assistant_only_loss", "completion_only_loss"):
            if account.truth(key):
                account.carry(key, "data.train_on", "assistant")
    elif completions is False or (pairs and all(each is False for each in pairs)):
        key = "completion_only_loss" if completions is False else "assistant_only_loss"
        said = "every token is trained, questions too; assistant would train answers alone"
        if key in account:
            account.carry(key, "data.train_on", "all", said)
        else:
            account.assume(key, "data.train_on", "all", said)
    elif not all(pairs):
        account.differ(
            "trained tokens: the rows are not at hand, so data.train_on is assistant; of rows with "
            "`messages` or `text` TRL trains every token (data.train_on: all), of prompt and "
            "completion the completion"
        )
    for key in ("assistant_only_loss", "completion_only_loss"):
        if account.truth(key) is False and key in account.open_keys():
            account.same(key)
    if column is None:
        return
    if all(each is not None and column in each for each in keys):
        account.became("dataset_text_field", "data.columns")
        for source in train:
            source["format"] = "text"
            if column != "text":
                source["columns"] = {"text": column}
    else:
        account.unneeded("dataset_text_field", "the rows' keys say what they are")


def _lengths(account: Account) -> None:
    key = "max_seq_length" if "max_seq_length" in account else "max_length"
    account.carry_or_assume(key, "data.max_length", account.whole(key), 1024)
    packed = account.truth("packing")
    said = "a micro-batch is batch size x max_length tokens, there and here"
    account.carry_or_assume("packing", "data.packing", packed, False, said=said if packed else "")
    way = account.text("packing_strategy")
    if way == "bfd":
        account.same("packing_strategy", "best fit decreasing, documents whole and apart")
    elif way is not None and packed:
        account.lose("packing_strategy", f"{way} splits documents; here they are packed whole")
    elif way is not None:
        account.unneeded("packing_strategy", "packing is off")
    if packed and not str(account.read("attn_implementation") or "").startswith(
        ("flash", "kernels")
    ):
        account.differ(
            "packing: without a flash attention documents packed together read each other there; "
            "here each reads only itself"
        )
    kept = account.text("truncation_mode")
    if kept == "keep_start":
        account.same("truncation_mode", "the end is cut")
    elif kept is not None:
        account.lose("truncation_mode", f"{kept}; here the end is cut, and too many cuts refused")
    loss = account.text("loss_type")
    if loss == "nll":
        account.same("loss_type", "cross-entropy")
    elif loss is not None:
        account.lose("loss_type", f"{loss}; here the loss is cross-entropy")


def _template(account: Account, beside: Path) -> None:
    path = account.text("chat_template_path")
    if path is not None and path.endswith((".jinja", ".j2")):
        account.carry("chat_template_path", "data.template", local_path(path, beside))
    elif path is not None:
        account.lose(
            "chat_template_path",
            f"the template of {path}; save it as a Jinja file and name that in data.template",
        )
    if "eos_token" in account:
        account.lose(
            "eos_token",
            "the token that ends a turn; here it is the template's own closing token, or what the "
            "model's generation_config.json names",
        )
