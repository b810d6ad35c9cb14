"""LLaMA-Factory's YAML and its dataset_info.json to the settings of a run.

Facts are those of its argument classes (0.9.4), which extend the Trainer's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pennyweight.config.foreign import trainer
from pennyweight.config.foreign.account import Account
from pennyweight.config.foreign.adapter import targets, tell_scaling
from pennyweight.config.foreign.rows import local_path, put_sources
from pennyweight.config.foreign.templates import template
from pennyweight.config.foreign.trainer_keys import LOST as TRAINER_LOST
from pennyweight.config.foreign.trainer_keys import READ, groups, names
from pennyweight.config.foreign.trainer_keys import UNNEEDED as TRAINER_UNNEEDED

__all__ = ["KEYS", "translate"]

KEYS = [
    *READ,
    *names("""
model_name_or_path model_revision adapter_name_or_path quantization_bit quantization_type
quantization_method double_quantization stage finetuning_type lora_rank lora_alpha lora_dropout
lora_target additional_target use_rslora use_dora loraplus_lr_ratio pissa_init pure_bf16 dataset
dataset_dir eval_dataset template cutoff_len train_on_prompt mask_history packing neat_packing
val_size max_samples interleave_probs mix_strategy disable_gradient_checkpointing
early_stopping_steps max_new_tokens default_system compute_accuracy use_muon use_dft_loss
use_galore use_apollo use_badam use_adam_mini system_message streaming tokenized_path
"""),
]

UNNEEDED = TRAINER_UNNEEDED | groups(
    {
        "prepared rows are cached by what shapes them": (
            "preprocessing_num_workers preprocessing_batch_size overwrite_cache buffer_size "
            "data_shared_file_system cache_dir"
        ),
        "documents are kept apart by whichever attention suits the device": "flash_attn",
        "it changes speed or memory, not what is learned": (
            "use_unsloth use_unsloth_gc enable_liger_kernel use_reentrant_gc upcast_layernorm "
            "upcast_lmhead_output low_cpu_mem_usage use_v1_kernels quantization_device_map "
            "include_effective_tokens_per_second print_param_status"
        ),
        "a fast tokenizer is always used": "use_fast_tokenizer",
        "the curves are drawn after every run": "plot_loss",
        "every run begins with a fresh adapter": "create_new_adapter",
        "nothing is padded": "ignore_pad_token_for_loss",
        "token accuracy is always measured": "compute_accuracy",
        "it is for generating: pennyweight evaluate and chat have their own": (
            "infer_backend infer_dtype offload_folder use_kv_cache do_sample temperature top_p top_k "
            "num_beams max_length repetition_penalty length_penalty skip_special_tokens "
            "predict_with_generate generation_max_length generation_num_beams eval_num_beams "
            "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config "
            "sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config"
        ),
        "it is another command's: pennyweight merge": (
            "export_dir export_size export_device export_legacy_format export_hub_model_id "
            "export_quantization_bit export_quantization_dataset export_quantization_nsamples "
            "export_quantization_maxlen"
        ),
        "one process trains": (
            "ray_run_name ray_num_workers ray_storage_path ray_storage_filesystem "
            "resources_per_worker placement_strategy ray_init_kwargs"
        ),
        "rows are text here": (
            "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches "
            "video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video "
            "audio_sampling_rate freeze_vision_tower freeze_multi_modal_projector media_dir"
        ),
        "it belongs to a method that is not used": (
            "pissa_iter pissa_convert loraplus_lr_embedding freeze_trainable_layers "
            "freeze_trainable_modules freeze_extra_modules galore_target galore_rank "
            "galore_update_interval galore_scale galore_proj_type galore_layerwise apollo_target "
            "apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
            "apollo_scale_type apollo_layerwise apollo_scale_front badam_mode badam_start_block "
            "badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode "
            "badam_verbose oft_rank oft_block_size oft_target module_dropout pref_beta pref_ftx "
            "pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma "
            "ref_model reward_model"
        ),
    }
)

LOST = TRAINER_LOST | groups(
    {
        "weights of the update split into size and direction (DoRA); here it is LoRA's plain "
        "B·A": "use_dora",
        "A and B begun from the base's singular vectors (PiSSA); here B begins at zero": "pissa_init",
        "an optimizer that is not here; AdamW is used": (
            "use_galore use_apollo use_badam use_adam_mini use_muon"
        ),
        "another loss (DFT); here it is plain cross-entropy": "use_dft_loss",
        "blocks added to the model (LLaMA Pro)": "use_llama_pro mixture_of_depths",
        "shifted attention for long rows (LongLoRA)": "shift_attn",
        "longer positions than the model has; give a base with that context": "rope_scaling",
        "a model begun from random weights": "train_from_scratch",
        "other tokens; give a base whose tokenizer has them": (
            "resize_vocab add_tokens add_special_tokens new_special_tokens_config "
            "init_special_tokens split_special_tokens"
        ),
        "code from the model's repository; none is run here": "trust_remote_code",
        "access to a hub; HF_TOKEN in the environment gives it": "hf_hub_token ms_hub_token om_hub_token",
        "a loss over experts; the plain cross-entropy is used": "moe_aux_loss_coef",
        "the first rows of each set; cut the files before": "max_samples",
        "rows read while training; give files that fit the disk": "streaming",
        "sources drawn by chance, row by row; here all rows of each are trained every epoch, times "
        "the weight of its source (data.train: {path: ..., weight: 2})": (
            "mix_strategy interleave_probs"
        ),
        "rows in the file's order; here they are shuffled": "disable_shuffling",
        "tools printed in another model's way; the template prints them here": "tool_format",
        "rows tokenized before; give the rows themselves": "tokenized_path",
        "each set measured alone; here all held-out rows are one measure": "eval_on_each_dataset",
        "8-bit floating point; base.dtype has float32, bfloat16 and float16": (
            "fp8 fp8_backend fp8_enable_fsdp_float8_all_gather"
        ),
        "a tracking service that is not here: wandb and tensorboard are": (
            "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode "
            "swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret"
        ),
        "reasoning switched in the template; rows with reasoning ask for it here": (
            "enable_thinking preserve_thinking"
        ),
        "another program's training": "use_mca use_kt kt_optimize_rule",
    }
)


_OF_AN_ADAPTER = names("""
lora_rank lora_alpha lora_dropout lora_target additional_target use_rslora loraplus_lr_ratio
quantization_type quantization_method double_quantization
""")


def translate(account: Account, beside: Path) -> None:
    """Every key of the file; `beside` is the folder it stands in."""
    stage = account.text("stage") or "sft"
    if stage not in ("sft", "pt"):
        account.fault("stage", f"{stage} is not here; sft and pt are")
    elif "stage" in account:
        account.same("stage", "next-token loss")
    _method(account)
    if account.run.get("train.method") != "full":
        _adapter(account)
    account.idle("no adapter is trained, or no quantized base", *_OF_AN_ADAPTER)
    _lengths(account, stage)
    held_out = _rows(account, beside, stage)
    template(account, "template", account.text("model_name_or_path") or "", beside)
    trainer.steps_and_rates(account, rate=5e-5)
    if account.truth("disable_gradient_checkpointing"):
        account.carry("disable_gradient_checkpointing", "train.gradient_checkpointing", False)
    trainer.evaluation(account, held_out=held_out)
    trainer.saving(account)
    trainer.bookkeeping(account, output_dir="saves/run")
    if (patience := account.whole("early_stopping_steps")) is not None:
        account.carry(
            "early_stopping_steps", "train.early_stopping_patience", patience, "evaluations"
        )
    if (most := account.whole("max_new_tokens")) is not None:
        account.carry("max_new_tokens", "evaluate.max_new_tokens", most)
    for key in ("default_system", "system_message"):
        if (system := account.text(key)) is not None:
            account.carry(key, "data.system", system)
    trainer.finish(account, KEYS, UNNEEDED, LOST)


def _method(account: Account) -> None:
    model, revision = account.text("model_name_or_path"), account.text("model_revision")
    if model is None:
        account.fault("model_name_or_path", "missing; it names the model")
        return
    if revision not in (None, "main"):
        model = f"{model}@{revision}"
        account.carry("model_revision", "base.model", model)
    account.carry("model_name_or_path", "base.model", model)
    if "adapter_name_or_path" in account:
        account.lose(
            "adapter_name_or_path", "an adapter trained on; a run here begins with a fresh one"
        )
    kind, bits = account.text("finetuning_type"), account.whole("quantization_bit")
    if kind not in (None, "lora", "full"):
        account.fault("finetuning_type", f"{kind} is not here; lora and full are")
    method = "full" if kind == "full" else "qlora" if bits else "lora"
    account.carry_or_assume("finetuning_type", "train.method", kind and method, method)
    if bits in (4, 8):
        _quantized(account, bits)
    elif bits is not None:
        account.fault("quantization_bit", f"{bits} bits are not here; 4 and 8 are")


def _quantized(account: Account, bits: int) -> None:
    kind, double = account.text("quantization_type"), account.truth("double_quantization")
    named = "int8" if bits == 8 else "fp4" if kind == "fp4" else "nf4"
    account.carry(
        "quantization_bit", "base.quantization", named, trainer.OUTLIERS if bits == 8 else ""
    )
    if kind is not None and bits == 4:
        account.carry("quantization_type", "base.quantization", named)
    if bits == 4:
        account.carry_or_assume("double_quantization", "base.double_quantization", double, True)
    way = account.text("quantization_method")
    if way in ("bnb", "bitsandbytes"):
        account.same("quantization_method", "bitsandbytes' bytes" if bits == 4 else "")
    elif way is not None:
        account.lose("quantization_method", f"{way}; here it is {named}")


def _adapter(account: Account) -> None:
    rank, alpha = account.whole("lora_rank"), account.number("lora_alpha")
    account.carry_or_assume("lora_rank", "adapter.r", rank, 8)
    twice = 2.0 * (rank or 8)
    if alpha:
        account.carry("lora_alpha", "adapter.lora_alpha", alpha)
    elif alpha is None:
        account.assume("lora_alpha", "adapter.lora_alpha", twice, "twice the rank")
    else:
        account.carry("lora_alpha", "adapter.lora_alpha", twice, "0 means twice the rank there")
    dropout = account.number("lora_dropout")
    account.carry_or_assume("lora_dropout", "adapter.lora_dropout", dropout, 0.0)
    if "lora_target" in account:
        targets(account, "lora_target", every="all")
    else:
        account.assume("lora_target", "adapter.target_modules", "all-linear", "all")
    if saved := account.words("additional_target"):
        account.carry("additional_target", "adapter.modules_to_save", saved)
    if (stabilized := account.truth("use_rslora")) is not None:
        account.carry("use_rslora", "adapter.use_rslora", stabilized)
    if (ratio := account.number("loraplus_lr_ratio")) is not None:
        account.carry("loraplus_lr_ratio", "adapter.loraplus_lr_ratio", ratio)
    tell_scaling(account)


def _lengths(account: Account, stage: str) -> None:
    length = account.whole("cutoff_len")
    account.carry_or_assume("cutoff_len", "data.max_length", length, 2048)
    account.differ(
        "rows over cutoff_len: there prompt and answer are shortened in proportion, here the end "
        "is cut, and a run in which too many answers lose theirs is refused (data.max_cut_share): "
        "raise data.max_length, or leave such rows out (data.overlong: drop); `pennyweight "
        "preview` counts them"
    )
    everything, last = account.truth("train_on_prompt"), account.truth("mask_history")
    if everything or stage == "pt":
        key = "train_on_prompt" if everything else "stage"
        account.carry(key, "data.train_on", "all")
    if last:
        account.carry("mask_history", "data.train_on", "last")
    packed, apart = account.truth("packing"), account.truth("neat_packing")
    if apart:
        account.carry("neat_packing", "data.packing", True, "documents kept apart, as there")
    said = "a micro-batch is batch size x cutoff_len tokens, there and here"
    packs = packed if packed is not None else None if apart else stage == "pt"
    if packed is not None:
        account.carry("packing", "data.packing", packed or bool(apart), said if packed else "")
    elif packs is not None:
        account.assume("packing", "data.packing", packs)
    if packed and not apart:
        account.differ(
            "packing without neat_packing: documents packed together read each other there; here "
            "each reads only itself"
        )


def _rows(account: Account, beside: Path, stage: str) -> bool:
    """`dataset` by way of dataset_info.json; whether rows are held out."""
    folder = account.text("dataset_dir") or "data"
    where = local_path(folder, beside)
    described = _described(Path(where) / "dataset_info.json")
    if "dataset_dir" in account:
        account.became("dataset_dir", "data.train")
    train = _named(account, "dataset", where, described, stage)
    held = _named(account, "eval_dataset", where, described, stage)
    if not train:
        account.fault("dataset", "missing; it names the rows to train on")
    put_sources(account, train, held)
    share = account.number("val_size")
    if held:
        return True
    if not share:
        said = "no rows are held out, as there; 0.05 would show what the tuning was worth"
        account.carry_or_assume(
            "val_size", "data.eval_fraction", share, 0.0, said=said, assumed=said
        )
        return False
    if share >= 1:
        account.run["data.eval_fraction"] = 0.05
        account.lose("val_size", f"{share:g} rows; here a share, 0.05 is set, at most 500 rows")
    else:
        account.carry("val_size", "data.eval_fraction", share, "at most 500 rows")
    return True


def _described(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _named(
    account: Account, key: str, folder: str, described: dict[str, Any], stage: str
) -> list[dict[str, Any]]:
    found = []
    to = "data.eval" if key == "eval_dataset" else "data.train"
    for name in account.words(key) or []:
        about = described.get(name)
        if isinstance(about, dict):
            found.append(_source(account, key, name, folder, about, stage))
        elif Path(folder, "dataset_info.json").is_file() and not Path(name).exists():
            account.fault(key, f"{name} is not in {folder}/dataset_info.json")
        else:
            found.append({"path": f"{folder}/{name}.json"})
            account.lose(
                key,
                f"{name}: no {folder}/dataset_info.json is here to say which file it is; "
                f"{to} names {folder}/{name}.json",
            )
        if found:
            account.became(key, to, found[-1]["path"])
    return found


def _source(
    account: Account, key: str, name: str, folder: str, about: dict[str, Any], stage: str
) -> dict[str, Any]:
    """One entry of dataset_info.json as a source."""
    if about.get("ranking") or (about.get("columns") or {}).get("kto_tag"):
        account.fault(key, f"{name} has rows of preferences; here rows have one answer each")
    hub = about.get("hf_hub_url")
    file = about.get("file_name")
    found: dict[str, Any] = {"path": hub or str(Path(folder) / str(file or name))}
    if not (hub or file):
        account.lose(key, f"{name}: neither a file nor a Hub data set; name its file")
    for unread in ("subset", "num_samples", "folder"):
        if about.get(unread):
            account.lose(key, f"{name}: its {unread} ({about[unread]}) in dataset_info.json")
    if about.get("split") not in (None, "train"):
        found["split"] = about["split"]
    columns = about.get("columns") or {}
    form = about.get("formatting", "alpaca")
    ours, names = _format(form, columns, about.get("tags") or {})
    if stage == "pt":
        ours, names = "text", {"text": columns.get("prompt", "text")}
    found["format"] = ours
    renamed = {own: theirs for own, theirs in names.items() if own != theirs}
    if renamed:
        found["columns"] = renamed
    for unread in ("images", "videos", "audios"):
        if columns.get(unread):
            account.lose(key, f"{name}: {unread}; rows are text here")
    return found


def _format(form: str, columns: dict[str, Any], tags: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Our format and its columns; a column left out of `columns` is absent there."""
    if form == "alpaca":
        asked = {"instruction": columns.get("prompt", "instruction")}
        if columns.get("query"):
            asked["input"] = columns["query"]
        extra = {own: columns[own] for own in ("system", "history") if columns.get(own)}
        return "alpaca", {**asked, "output": columns.get("response", "output"), **extra}
    field = columns.get("messages", "conversations")
    if form == "openai" or tags.get("role_tag") == "role":
        return "chat", {"messages": columns.get("messages", "messages")}
    return "sharegpt", {"conversations": field}
