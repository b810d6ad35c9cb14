"""Where a setting's rule or number comes from: the paper and its section, for `pennyweight explain`.

Settings that name files, counts of lines or places to write have none.
"""

from __future__ import annotations

__all__ = ["SOURCES"]

_LORA = "Hu et al. 2021, LoRA"
_QLORA = "Dettmers et al. 2023, QLoRA"
_ADAM = "Kingma & Ba 2015, Adam, algorithm 1"
_ADAMW = "Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization, algorithm 2"
_SGDR = "Loshchilov & Hutter 2017, SGDR, section 3"
_WARM_UP = "Goyal et al. 2017, Accurate, Large Minibatch SGD, section 2.2"
_PACKING = "Ding et al. 2024, Fewer Truncations Improve Language Modeling, section 3"
_BOOTSTRAP = "Efron & Tibshirani 1993, An Introduction to the Bootstrap"

SOURCES: dict[str, str] = {
    "base.quantization": f"nf4: {_QLORA}, section 3 and appendix E",
    "base.double_quantization": f"{_QLORA}, section 3",
    "base.dtype": f"{_QLORA}, section 3: one type to store in, one to compute in",
    "base.attention": "Dao 2023, FlashAttention-2; Krell et al. 2021, Efficient Sequence Packing",
    "adapter.r": f"{_LORA}, section 4.1; section 7.2 on how little rank is needed",
    "adapter.lora_alpha": f"{_LORA}, section 4.1",
    "adapter.lora_dropout": f"{_LORA}, section 4.1, for what is scaled; {_QLORA}, appendix B, for usual values",
    "adapter.target_modules": f"{_QLORA}, section 4: all linear layers match full fine-tuning",
    "adapter.use_rslora": "Kalajdzievski 2023, A Rank Stabilization Scaling Factor",
    "adapter.loraplus_lr_ratio": "Hayou et al. 2024, LoRA+",
    "adapter.rank_pattern": "PEFT's rank_pattern",
    "adapter.alpha_pattern": "PEFT's alpha_pattern",
    "adapter.modules_to_save": "PEFT's modules_to_save",
    "data.packing": _PACKING,
    "data.max_cut_share": f"{_PACKING}: what truncation costs",
    "data.max_duplicate_share": "Lee et al. 2022, Deduplicating Training Data",
    "data.max_leaked_share": "Lee et al. 2022, Deduplicating Training Data",
    "data.train_on": f"{_QLORA}, appendix B: loss on the answer",
    "train.method": f"{_LORA}; {_QLORA}",
    "train.learning_rate": f"{_QLORA}, appendix B: 2e-4, and 1e-4 from 33B on",
    "train.tokens_per_step": _PACKING,
    "train.optim": "Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization",
    "train.lr_scheduler_type": f"cosine: {_SGDR}",
    "train.warmup_steps": _WARM_UP,
    "train.warmup_ratio": _WARM_UP,
    "train.min_lr_ratio": _SGDR,
    "train.weight_decay": _ADAMW,
    "train.adam_beta1": _ADAM,
    "train.adam_beta2": _ADAM,
    "train.adam_epsilon": _ADAM,
    "train.max_grad_norm": "Pascanu et al. 2013, On the Difficulty of Training RNNs, section 3.2",
    "train.gradient_checkpointing": "Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost",
    "train.early_stopping_patience": "Prechelt 1998, Early Stopping: But When?",
    "evaluate.max_rows": f"intervals by resampling rows: {_BOOTSTRAP}",
    "evaluate.generate_rows": "ROUGE-L: Lin 2004, section 3",
}
"""By key."""
