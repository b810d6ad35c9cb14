"""axolotl's YAML (0.12 and its predecessors) to the settings of a run.

Facts are those of its configuration reference and of the arguments it hands to the Trainer.
"""

from __future__ import annotations

from pathlib import Path

from pennyweight.config.foreign import trainer
from pennyweight.config.foreign.account import Account
from pennyweight.config.foreign.adapter import targets, tell_scaling
from pennyweight.config.foreign.axolotl_rows import rows
from pennyweight.config.foreign.templates import template
from pennyweight.config.foreign.trainer import BFLOAT16, FLOAT16, OUTLIERS
from pennyweight.config.foreign.trainer_keys import LOST as TRAINER_LOST
from pennyweight.config.foreign.trainer_keys import UNNEEDED as TRAINER_UNNEEDED
from pennyweight.config.foreign.trainer_keys import groups, names

__all__ = ["KEYS", "translate"]

KEYS = names("""
base_model model_revision revision_of_model adapter load_in_4bit load_in_8bit bnb_config_kwargs
gptq peft lora_r lora_alpha lora_dropout lora_target_linear lora_target_modules
lora_modules_to_save peft_use_rslora peft_layers_to_transform peft_layers_pattern
peft_init_lora_weights loraplus_lr_ratio datasets test_datasets pretraining_dataset val_set_size
chat_template chat_template_jinja default_system_message train_on_inputs sequence_len
excess_length_strategy sample_packing flash_attention micro_batch_size gradient_accumulation_steps
batch_size num_epochs max_steps learning_rate lr_scheduler lr_scheduler_kwargs cosine_min_lr_ratio
warmup_steps warmup_ratio optimizer weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
gradient_checkpointing bf16 bfloat16 fp16 float16 float32 eval_strategy evaluation_strategy
eval_steps evals_per_epoch save_strategy save_steps saves_per_epoch save_total_limit
early_stopping_patience load_best_model_at_end metric_for_best_model logging_steps use_tensorboard
wandb_project use_wandb seed output_dir rl reward_model process_reward_model
dataset_exact_deduplication special_tokens
""")

UNNEEDED = TRAINER_UNNEEDED | groups(
    {
        "config.json says what the model is": (
            "base_model_config model_type type_of_model tokenizer_type cls_model_config "
            "processor_type is_falcon_derived_model is_llama_derived_model "
            "is_mistral_derived_model is_qwen_derived_model tokenizer_use_fast tokenizer_legacy "
            "lora_fan_in_fan_out num_labels"
        ),
        "documents are kept apart by whichever attention suits the device": (
            "flash_attention xformers_attention sdp_attention flex_attention eager_attention "
            "attn_implementation flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv "
            "flash_attn_fuse_mlp flex_attn_compile_kwargs batch_flattening flash_optimum"
        ),
        "rows are never padded": "pad_to_sequence_len min_sample_len",
        "rows are packed best fit first, within their budget": (
            "sample_packing_group_size sample_packing_bin_size sample_packing_sequentially "
            "sample_packing_eff_est multipack_real_batches eval_sample_packing "
            "sample_packing_mp_start_method"
        ),
        "prepared rows are cached by what shapes them": (
            "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory "
            "skip_prepare_dataset hf_use_auth_token shuffle_merged_datasets"
        ),
        "it changes speed or memory, not what is learned": (
            "lora_mlp_kernel lora_qkv_kernel lora_o_kernel unsloth_cross_entropy_loss "
            "unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope "
            "low_cpu_mem_usage lora_on_cpu gc_steps device_map max_memory gpu_memory_limit tf32 "
            "chunked_cross_entropy chunked_cross_entropy_num_chunks tiled_mlp tiled_mlp_num_shards "
            "use_kernels qlora_sharded_model_loading activation_offloading profiler_steps "
            "torch_compile_backend liger_rope liger_rms_norm liger_glu_activation liger_layer_norm "
            "liger_fused_linear_cross_entropy liger_cross_entropy cut_cross_entropy "
            "embeddings_skip_upcast peft_autocast_adapter_dtype"
        ),
        "the same command resumes": "auto_resume_from_checkpoints resume_from_checkpoint",
        "a loss that is not finite stops the run; a held-out loss that rises keeps the best": (
            "loss_watchdog_threshold loss_watchdog_patience"
        ),
        "unknown keys are always refused": "strict",
        "nothing is padded, so no token stands for padding": "fix_untrained_tokens",
        "it is another command's: pennyweight chat, pennyweight merge": (
            "gradio_title gradio_share gradio_server_name gradio_server_port "
            "gradio_max_new_tokens gradio_temperature merge_lora merge_method"
        ),
        "evaluation fills its own batches": "eval_batch_size eval_sequence_len",
        "one process trains": "world_size ddp device",
    }
)

LOST = TRAINER_LOST | groups(
    {
        "a further adapter trained on; a run here begins with a fresh one": "lora_model_dir",
        "weights of the update split into size and direction (DoRA); here it is LoRA's plain "
        "B·A": "peft_use_dora use_dora",
        "an update of parameters that are not linear layers; name linear layers in "
        "adapter.target_modules": "lora_target_parameters peft_trainable_token_indices",
        "layers repeated before training; make such a base first": "peft_layer_replication",
        "adapters folded in and begun anew during training (ReLoRA); train longer or with a "
        "higher rank": (
            "relora relora_steps relora_warmup_steps relora_anneal_steps relora_prune_ratio "
            "relora_prune_method relora_cpu_offload jagged_restart_steps"
        ),
        "other tokens; give a base whose tokenizer has them": (
            "tokens added_tokens_overrides tokenizer_config "
            "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings"
        ),
        "stop tokens of turns; here the template's own closing token is trained and stopped on, "
        "as `pennyweight preview` shows": "eot_tokens",
        "changes to the model's configuration; give a base that has them": (
            "model_config overrides_of_model_config model_kwargs overrides_of_model_kwargs "
            "rope_scaling model_quantization_config model_quantization_config_kwargs "
            "llama4_linearized_experts"
        ),
        "code from the model's repository; none is run here": "trust_remote_code",
        "a part of the base trained in full (its names); adapter.modules_to_save does that beside "
        "an adapter": "unfrozen_parameters lisa_n_layers lisa_step_interval lisa_layers_attribute",
        "learning rates of their own; adapter.loraplus_lr_ratio is the only one here": (
            "lr_groups embedding_lr embedding_lr_scale loraplus_lr_embedding"
        ),
        "a further turn of the schedule; the plain cosine is used": (
            "cosine_constant_lr_ratio lr_quadratic_warmup lr_div_factor"
        ),
        "noise on the embeddings (NEFTune); there is none here": "noisy_embedding_alpha",
        "a share of the data by number; cut the file before": "dataset_shard_num dataset_shard_idx",
        "rows from short to long; here they are shuffled": "curriculum_sampling",
        "longer positions than the rows have (PoSE); give a base with that context": (
            "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks s2_attention"
        ),
        "one row over several devices; `pennyweight plan --fit` says what one device holds": (
            "sequence_parallel_degree context_parallel_size heads_k_stride ring_attn_func "
            "tensor_parallel_size dp_shard_size dp_replicate_size fsdp_version "
            "fsdp_final_state_dict_type deepcompile use_ray ray_run_name ray_num_workers "
            "resources_per_worker"
        ),
        "8-bit floating point; base.dtype has float32, bfloat16 and float16": (
            "fp8 fp8_enable_fsdp_float8_all_gather qat quantization"
        ),
        "answers and benchmark scores during training; `pennyweight evaluate` gives them after": (
            "eval_table_size eval_max_new_tokens do_causal_lm_eval eval_causal_lm_metrics "
            "do_bench_eval bench_dataset bench_split generate_samples num_generation_samples"
        ),
        "names in a tracking service; its own variables (WANDB_PROJECT, WANDB_NAME, ...) set them": (
            "wandb_name wandb_entity wandb_watch wandb_run_id wandb_log_model wandb_mode "
        ),
        "a tracking service that is not here: wandb and tensorboard are": (
            "use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name "
            "hf_mlflow_log_artifacts use_comet comet_api_key comet_workspace comet_project_name "
            "comet_experiment_key comet_mode comet_online comet_experiment_config use_trackio "
            "use_otel_metrics"
        ),
        "an upload of the prepared rows": "push_dataset_to_hub",
        "a plugin; what it patches is not here": "plugins",
        "rows read while training; give files that fit the disk": (
            "streaming streaming_multipack_buffer_size pretrain_multipack_buffer_size "
            "pretrain_multipack_attn pretraining_sample_concatenation"
        ),
        "an optimizer's own constants; AdamW has train.adam_*": (
            "adam_epsilon2 adam_beta3 torchdistx_path dion_learning_rate dion_momentum"
        ),
        "images or sound; rows are text here": "image_size image_resize_algorithm freeze_mm_modules",
        "a loss over experts; the plain cross-entropy is used": "router_aux_loss_coef",
    }
)

_OF_AN_ADAPTER = names("""
lora_r lora_alpha lora_dropout lora_target_linear lora_target_modules lora_modules_to_save
peft_use_rslora peft_layers_to_transform peft_layers_pattern peft_init_lora_weights
loraplus_lr_ratio peft load_in_4bit load_in_8bit bnb_config_kwargs
""")

_PLAIN = {
    "gradient_accumulation_steps": ("train.gradient_accumulation_steps", "whole", 1),
    "learning_rate": ("train.learning_rate", "number", None),
    "weight_decay": ("train.weight_decay", "number", None),
    "adam_beta1": ("train.adam_beta1", "number", None),
    "adam_beta2": ("train.adam_beta2", "number", None),
    "adam_epsilon": ("train.adam_epsilon", "number", None),
    "cosine_min_lr_ratio": ("train.min_lr_ratio", "number", None),
    "early_stopping_patience": ("train.early_stopping_patience", "whole", None),
    "default_system_message": ("data.system", "text", None),
}


def translate(account: Account, beside: Path) -> None:
    """Every key of the file; `beside` is the folder it stands in."""
    for key in ("rl", "reward_model", "process_reward_model"):
        if account.read(key):
            account.fault(key, "trains on preferences or rewards; here rows have one answer each")
    _model(account)
    if account.run.get("train.method") != "full":
        _adapter(account)
    account.idle("no adapter is trained, or another key of it counts", *_OF_AN_ADAPTER)
    _precision(account)
    held_out = rows(account, beside)
    template(account, "chat_template", account.text("base_model") or "", beside)
    _lengths(account)
    _steps(account)
    trainer.schedule(account, "lr_scheduler", "cosine")
    trainer.optimizer(account, "optimizer")
    _evaluation(account, held_out)
    trainer.bookkeeping(account, output_dir="model-out")
    _trackers(account)
    _special_tokens(account)
    if (norm := account.number("max_grad_norm")) is not None:
        account.carry("max_grad_norm", "train.max_grad_norm", norm or None, "" if norm else "off")
    for key, (to, reader, default) in _PLAIN.items():
        value = getattr(account, reader)(key)
        if value is not None or (default is not None and to not in account.run):
            account.carry_or_assume(key, to, value, default)
    trainer.finish(account, KEYS, UNNEEDED, LOST)


def _model(account: Account) -> None:
    model = account.text("base_model")
    revisions = [key for key in ("revision_of_model", "model_revision") if key in account]
    if model is None:
        account.fault("base_model", "missing; it names the model")
        return
    for key in revisions:
        account.carry(key, "base.model", f"{model}@{account.text(key)}")
    named = account.run.get("base.model", model)
    account.carry("base_model", "base.model", named)
    kind = account.text("adapter")
    if kind not in (None, "lora", "qlora"):
        account.fault("adapter", f"{kind} is not here; lora and qlora are")
    if account.truth("gptq"):
        account.fault("gptq", "a GPTQ base is not read here; name the unquantized model")
    four, eight = account.truth("load_in_4bit"), account.truth("load_in_8bit")
    if kind is None:
        account.assume("adapter", "train.method", "full", "no adapter: every weight is trained")
        return
    if four or kind == "qlora":
        account.carry("adapter", "train.method", "qlora")
        _four_bits(account)
    elif eight:
        account.carry("adapter", "train.method", "qlora", "an adapter on a quantized base")
        account.carry("load_in_8bit", "base.quantization", "int8", OUTLIERS)
    else:
        account.carry("adapter", "train.method", "lora")


def _four_bits(account: Account) -> None:
    if "load_in_4bit" in account:
        account.carry("load_in_4bit", "base.quantization", "nf4")
    else:
        account.assume("load_in_4bit", "base.quantization", "nf4")
    more = account.part("bnb_config_kwargs")
    double = True
    if more is not None:
        kind = more.text("bnb_4bit_quant_type")
        if kind in ("nf4", "fp4"):
            more.carry("bnb_4bit_quant_type", "base.quantization", kind)
        if (given := more.truth("bnb_4bit_use_double_quant")) is not None:
            more.carry("bnb_4bit_use_double_quant", "base.double_quantization", given)
            double = given
        for key in more.open_keys():
            more.unneeded(key, "storage and products have the base's type")
    account.run["base.double_quantization"] = double


def _precision(account: Account) -> None:
    """bfloat16 wherever the device multiplies it fast is `auto`; half precision is not trained in."""
    for key in ("bf16", "bfloat16"):
        if account.read(key) == "auto" or account.truth(key):
            account.carry(key, "base.dtype", "auto", BFLOAT16)
    for key in ("fp16", "float16"):
        if account.read(key) not in (None, "auto") and account.truth(key):
            account.lose(key, FLOAT16)
    if account.truth("float32"):
        account.carry("float32", "base.dtype", "float32")


def _adapter(account: Account) -> None:
    rank = account.whole("lora_r")
    alpha, dropout = account.number("lora_alpha"), account.number("lora_dropout")
    account.carry_or_assume("lora_r", "adapter.r", rank, 8, assumed="PEFT's own")
    account.carry_or_assume("lora_alpha", "adapter.lora_alpha", alpha, 8, assumed="PEFT's own")
    account.carry_or_assume("lora_dropout", "adapter.lora_dropout", dropout, 0.0)
    if (stabilized := account.truth("peft_use_rslora")) is not None:
        account.carry("peft_use_rslora", "adapter.use_rslora", stabilized)
    if (ratio := account.number("loraplus_lr_ratio")) is not None:
        account.carry("loraplus_lr_ratio", "adapter.loraplus_lr_ratio", ratio)
    if saved := account.words("lora_modules_to_save"):
        account.carry("lora_modules_to_save", "adapter.modules_to_save", saved)
    initial = account.read("peft_init_lora_weights")
    if initial is True or initial in ("true", "kaiming"):
        account.same("peft_init_lora_weights", "A Kaiming uniform, B zero")
    elif initial is not None:
        account.lose("peft_init_lora_weights", "here A is Kaiming uniform and B zero")
    if account.truth("lora_target_linear"):
        account.carry("lora_target_linear", "adapter.target_modules", "all-linear", "but the head")
        if "lora_target_modules" in account:
            account.unneeded("lora_target_modules", "lora_target_linear names them all")
    else:
        targets(account, "lora_target_modules", "peft_layers_to_transform", "peft_layers_pattern")
    if (peft := account.part("peft")) is not None:
        for key in peft.open_keys():
            peft.lose(key, "a way to begin from a quantized base; here B begins at zero")
    tell_scaling(account)


def _lengths(account: Account) -> None:
    length = account.whole("sequence_len")
    account.carry_or_assume("sequence_len", "data.max_length", length, 512)
    longer = account.text("excess_length_strategy")
    if longer == "truncate":
        account.carry("excess_length_strategy", "data.overlong", "cut")
    elif longer == "raise":
        account.carry(
            "excess_length_strategy", "data.overlong", "drop", "and none may be: max_dropped_share"
        )
        account.run["data.max_dropped_share"] = 0.0
    else:
        said = "a longer row is left out; past data.max_dropped_share the run is refused"
        account.carry_or_assume(
            "excess_length_strategy", "data.overlong", longer, "drop", said=said, assumed=said
        )
    if account.truth("train_on_inputs"):
        account.carry("train_on_inputs", "data.train_on", "all")
    elif "train_on_inputs" in account:
        account.same("train_on_inputs", "only answers are trained")
    packed = account.truth("sample_packing")
    said = "a micro-batch is micro_batch_size x sequence_len tokens, there and here"
    account.carry_or_assume(
        "sample_packing", "data.packing", packed, False, said=said if packed else ""
    )
    apart = any(account.truth(f"{kind}_attention") for kind in ("flash", "sdp", "flex"))
    if packed and not apart:
        account.differ(
            "packing: without flash, sdp or flex attention documents packed together read each "
            "other there; here each reads only itself"
        )


def _steps(account: Account) -> None:
    rows_at_once = account.whole("micro_batch_size")
    account.carry_or_assume("micro_batch_size", "train.batch_size", rows_at_once, 1)
    whole = account.whole("batch_size")
    if whole and "gradient_accumulation_steps" not in account:
        account.carry(
            "batch_size",
            "train.gradient_accumulation_steps",
            max(1, whole // (rows_at_once or 1)),
            "divided by micro_batch_size",
        )
    steps = account.whole("max_steps")
    epochs = account.number("num_epochs")
    if steps and steps > 0:
        account.carry("max_steps", "train.max_steps", steps)
        if epochs is not None:
            account.unneeded("num_epochs", "max_steps decides the length")
    else:
        account.carry_or_assume("num_epochs", "train.epochs", epochs, 1.0)
    again = account.read("gradient_checkpointing")
    if isinstance(again, str) and account.read("gradient_checkpointing") not in ("true", "false"):
        policy = "offloaded" if again.startswith("offload") else True
        account.carry("gradient_checkpointing", "train.gradient_checkpointing", policy)
    else:
        value = account.truth("gradient_checkpointing")
        account.carry_or_assume(
            "gradient_checkpointing", "train.gradient_checkpointing", value, False
        )


def _evaluation(account: Account, held_out: bool) -> None:
    trainer.evaluation(account, held_out=held_out)
    trainer.saving(account)
    for key, to in (("evals_per_epoch", "eval_steps"), ("saves_per_epoch", "save_steps")):
        if (count := account.number(key)) is None:
            continue
        if count and (held_out or to == "save_steps"):
            account.lose(
                key, f"{count:g} an epoch; here ten a run, or train.{to} as a count of steps"
            )
        else:
            account.unneeded(key, "nothing is held out there")


def _special_tokens(account: Account) -> None:
    named = account.part("special_tokens")
    if named is None:
        return
    for key in named.open_keys():
        if key == "pad_token":
            named.unneeded(key, "nothing is padded")
        else:
            named.lose(
                key,
                "a token of another role; here the tokenizer's own count, and the template's closing "
                "token ends an answer",
            )


def _trackers(account: Account) -> None:
    services = []
    if account.text("wandb_project") or account.truth("use_wandb"):
        key = "wandb_project" if "wandb_project" in account else "use_wandb"
        said = "the project's name is read from WANDB_PROJECT" if key == "wandb_project" else ""
        account.carry(key, "train.report_to", ["wandb"], said)
        services.append("wandb")
    if account.truth("use_tensorboard"):
        services.append("tensorboard")
        account.carry("use_tensorboard", "train.report_to", services)
