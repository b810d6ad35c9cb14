"""Keys of transformers' TrainingArguments (5.x, and those its predecessors had): what is said of
each that no function looks at."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["LOST", "READ", "UNNEEDED", "groups", "names"]


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


READ = names("""
learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim weight_decay
adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps
per_device_train_batch_size per_gpu_train_batch_size gradient_accumulation_steps
gradient_checkpointing activation_checkpointing bf16 fp16 eval_strategy evaluation_strategy
eval_steps do_eval save_strategy save_steps save_total_limit load_best_model_at_end
metric_for_best_model logging_steps report_to seed output_dir use_cpu no_cuda
""")
"""Keys that the functions here and in the tools' files look at one by one."""


def groups(table: Mapping[str, str]) -> dict[str, str]:
    """`{what is said: "key key"}` as `{key: what is said}`."""
    return {key: said for said, keys in table.items() for key in keys.split()}


UNNEEDED = groups(
    {
        "evaluation fills its own batches; the numbers do not depend on their size": (
            "per_device_eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps "
            "eval_do_concat_batches prediction_loss_only batch_eval_metrics include_for_metrics "
            "fp16_full_eval bf16_full_eval eval_use_gather_object eval_delay eval_on_start do_predict"
        ),
        "events.jsonl has every step, whatever is printed": (
            "logging_first_step logging_strategy logging_dir log_level log_level_replica "
            "log_on_each_node disable_tqdm include_num_input_tokens_seen include_tokens_per_second "
            "skip_memory_metrics debug"
        ),
        "a loss that is not finite stops the run": "logging_nan_inf_filter",
        "the same command resumes; checkpoints are whole or not there": (
            "resume_from_checkpoint overwrite_output_dir ignore_data_skip save_on_each_node "
            "save_safetensors enable_jit_checkpoint restore_callback_states_from_checkpoint "
            "save_only_model"
        ),
        "rows are prepared once and memory-mapped; no worker loads them": (
            "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
            "dataloader_prefetch_factor dataloader_in_order dataloader_multiprocessing_context "
            "remove_unused_columns label_names"
        ),
        "rows are never padded, so their lengths need no sorting": (
            "group_by_length length_column_name train_sampling_strategy"
        ),
        "one process trains": (
            "local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
            "ddp_static_graph ddp_backend ddp_timeout average_tokens_across_devices "
            "accelerator_config"
        ),
        "it changes speed or memory, not what is learned": (
            "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel "
            "liger_kernel_config torch_empty_cache_steps gradient_checkpointing_kwargs "
            "activation_checkpointing_kwargs tf32 use_cache jit_mode_eval half_precision_backend"
        ),
        "the command says it: pennyweight train": "do_train",
        "the adapter's rows are read in one order, from one seed": "data_seed",
        "a seeded run repeats itself on the same machine": "full_determinism",
        "lower is better: the held-out loss decides": "greater_is_better",
    }
)

LOST = groups(
    {
        "noise on the embeddings (NEFTune); there is none here": "neftune_noise_alpha",
        "smoothed targets; here the loss is plain cross-entropy": "label_smoothing_factor",
        "further arguments of the optimizer; set train.adam_* where they are AdamW's": (
            "optim_args optim_target_modules"
        ),
        "training on several devices; here one device trains, so give "
        "train.gradient_accumulation_steps their number times as much": (
            "deepspeed fsdp fsdp_config parallelism_config fsdp_min_num_params "
            "fsdp_transformer_layer_cls_to_wrap"
        ),
        "an upload to the Hub; upload the adapter's folder yourself when it is measured": (
            "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
            "hub_revision"
        ),
        "a last batch that is not full is left out there; here every row is trained": (
            "dataloader_drop_last"
        ),
        "a smaller batch where memory runs out; `pennyweight plan --fit` finds one beforehand": (
            "auto_find_batch_size"
        ),
        "activations held in host memory; `pennyweight plan` says whether it fits without": (
            "activation_offloading"
        ),
        "the name in a tracking service; WANDB_PROJECT and WANDB_NAME in the environment do it": (
            "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"
        ),
    }
)
