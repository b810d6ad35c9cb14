"""PEFT's adapter_config.json to the adapter of a run; it says nothing of rows or steps."""

from __future__ import annotations

from pathlib import Path

from pennyweight.config.foreign import trainer
from pennyweight.config.foreign.account import Account
from pennyweight.config.foreign.adapter import default_targets, targets, tell_scaling
from pennyweight.config.foreign.trainer_keys import groups, names

__all__ = ["KEYS", "translate"]

KEYS = names("""
peft_type task_type base_model_name_or_path revision r lora_alpha lora_dropout target_modules
modules_to_save use_rslora rank_pattern alpha_pattern layers_to_transform layers_pattern
init_lora_weights bias
""")

UNNEEDED = groups(
    {
        "it says how the adapter was loaded or saved": (
            "auto_mapping inference_mode peft_version runtime_config megatron_core "
            "ensure_weight_tying"
        ),
        "the layers' own layout is known": "fan_in_fan_out",
        "it belongs to a way to begin that is not used": "corda_config eva_config loftq_config",
    }
)

LOST = groups(
    {
        "weights of the update split into size and direction (DoRA); here it is LoRA's plain "
        "B·A": "use_dora",
        "another form of the update; here it is LoRA's plain B·A": (
            "use_qalora qalora_group_size arrow_config lora_bias use_bdlora lora_ga_config "
            "alora_invocation_tokens monteclora_config kasa_config velora_config"
        ),
        "modules left out; adapter.target_modules takes a list or a pattern of what is in": (
            "exclude_modules"
        ),
        "layers repeated before training; make such a base first": "layer_replication",
        "an update of parameters that are not linear layers": (
            "target_parameters trainable_token_indices"
        ),
        "layers over several devices": "megatron_config",
    }
)


def translate(account: Account, beside: Path) -> None:
    """Every key of the file; `beside` is the folder it stands in."""
    kind, task = account.text("peft_type"), account.text("task_type")
    if kind not in (None, "LORA"):
        account.fault("peft_type", f"{kind} is not here; LORA is")
    elif "peft_type" in account:
        account.same("peft_type")
    if task not in (None, "CAUSAL_LM"):
        account.fault("task_type", f"{task} is not here; CAUSAL_LM is")
    elif "task_type" in account:
        account.same("task_type", "a language model")
    model, revision = account.text("base_model_name_or_path"), account.text("revision")
    if model is None:
        account.fault("base_model_name_or_path", "missing; it names the base")
        return
    if revision is not None:
        account.carry("revision", "base.model", f"{model}@{revision}")
        model = f"{model}@{revision}"
    account.carry("base_model_name_or_path", "base.model", model)
    account.assume("train.method", "train.method", "lora", "qlora would hold the base in 4 bits")
    account.run["data.train"] = "my.jsonl"
    account.differ(
        "rows and steps: an adapter's configuration has none; write data.train (my.jsonl stands "
        "there) and what else differs from the defaults"
    )
    _adapter(account, model)
    trainer.finish(account, KEYS, UNNEEDED, LOST)


def _adapter(account: Account, model: str) -> None:
    account.carry_or_assume("r", "adapter.r", account.whole("r"), 8)
    account.carry_or_assume("lora_alpha", "adapter.lora_alpha", account.number("lora_alpha"), 8)
    dropout = account.number("lora_dropout")
    account.carry_or_assume("lora_dropout", "adapter.lora_dropout", dropout, 0.0)
    if (stabilized := account.truth("use_rslora")) is not None:
        account.carry("use_rslora", "adapter.use_rslora", stabilized)
    if "target_modules" in account:
        targets(account, "target_modules", "layers_to_transform", "layers_pattern")
    else:
        default_targets(account, "target_modules", model)
        if "layers_to_transform" in account:
            account.lose(
                "layers_to_transform",
                "some layers only; adapter.target_modules takes a pattern of names",
            )
        account.idle("no layers are chosen by it", "layers_pattern")
    if saved := account.words("modules_to_save"):
        account.carry("modules_to_save", "adapter.modules_to_save", saved)
    for key in ("rank_pattern", "alpha_pattern"):
        if table := account.table(key):
            account.carry(key, f"adapter.{key}", table)
    begun = account.read("init_lora_weights")
    if begun is True:
        account.same("init_lora_weights", "A Kaiming uniform, B zero")
    elif begun is not None:
        account.lose("init_lora_weights", f"{begun}; here A is Kaiming uniform and B zero")
    if account.text("bias") == "none":
        account.same("bias", "no bias is trained")
    elif "bias" in account:
        account.lose("bias", "biases trained beside the adapter; here none are")
    tell_scaling(account)
