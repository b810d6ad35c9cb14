"""What a run can be told: frozen models, unknown keys refused.

Names are Hugging Face's where users know them. The text under each field is what
`pennyweight explain KEY`, the JSON Schema and the generated YAML say.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
)

__all__ = [
    "AdaptersConfig",
    "BaseConfig",
    "CompareConfig",
    "DataConfig",
    "EvaluateConfig",
    "Format",
    "LoraConfig",
    "Method",
    "Quantization",
    "RunConfig",
    "Source",
    "TrainConfig",
]

Quantization = Literal["none", "int8", "nf4", "fp4"]
Method = Literal["qlora", "lora", "full"]
Format = Literal["auto", "chat", "alpaca", "sharegpt", "openassistant", "prompt_completion", "text"]


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _means_what_it_says(cls, value: Any, info: Any) -> Any:
        """`r: true` is not rank 1, and `"8"` is text, not a number."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and not kinds & {bool, dict}:
            raise ValueError("a truth value is not accepted here")
        if isinstance(value, str) and not kinds & {str, bool, dict}:
            raise ValueError("a text is not a number")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types inside an annotation: `{float, NoneType}` for `Annotated[float, ...] | None`."""
    parts = get_args(annotation)
    if not parts:
        return {annotation}
    kinds = {type(part) for part in parts if isinstance(part, str | int | float)}
    for part in parts:
        kinds |= _kinds(part)
    return kinds


class BaseConfig(_Frozen):
    """The frozen model everything else stands beside."""

    model: Annotated[str, Field(min_length=1)] = "builtin"
    """A Hugging Face id, `id@revision`, a folder, or `builtin`, the small model that ships here."""

    quantization: Quantization = "nf4"
    """How the linear weights are held: `nf4` or `fp4` (4 bits in blocks of 64), `int8` (one scale a row), `none`."""

    double_quantization: bool = True
    """Hold the 4-bit block scales in 8 bits too: 4.127 bits a parameter, not 4.5 (QLoRA, section 3)."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of all weights that are not quantized, and of the products. `auto`: bfloat16 where the device multiplies it fast, else float32."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""

    attention: Literal["auto", "documents", "masked", "varlen", "eager"] = "auto"
    """How attention keeps documents apart; all give the same numbers. `auto` picks by device."""

    embedding_device: Literal["auto", "host"] = "auto"
    """Where the table of token embeddings is held: `host` leaves it in host memory and looks rows up there (1 GB less on a card for Llama-3-8B)."""


class LoraConfig(_Frozen):
    """One adapter: h = W0 x + scaling * B(A(dropout(x))) (LoRA, section 4.1)."""

    r: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of the update."""

    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """Numerator of the scaling: alpha / r, or alpha / sqrt(r) with `use_rslora`."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs zeroed while training."""

    target_modules: (
        Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)]
    ) = "all-linear"
    """`all-linear` (all but the output head), `attention`, `mlp`, a list of module names, or a regular expression over full names."""

    use_rslora: bool = False
    """Scale by alpha / sqrt(r), so that a high rank keeps its step size (rsLoRA)."""

    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of B over that of A (LoRA+); 16 is the paper's advice."""

    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=4096)]] = {}
    """Ranks for modules whose name matches, in place of `r`."""

    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alphas for modules whose name matches, in place of `lora_alpha`."""

    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter, such as `embed_tokens` and `lm_head`."""


class Source(_Frozen):
    """Where rows come from."""

    path: str
    """A file (JSONL, JSON, CSV, Parquet, txt; `.gz` too), a folder of them, a Hub dataset id, or `builtin`."""

    split: str | None = None
    """Split of a Hub dataset or of `builtin`."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Rows taken from this source relative to its size: 0.5 takes half of them, 2 each twice, every epoch."""

    format: Format | None = None
    """Format of this source in place of `data.format`."""

    columns: dict[str, str] = {}
    """Columns of this source in place of `data.columns`."""


def _kind_of_rows(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "list"
    return "source" if isinstance(value, dict | Source) else "path"


_OneSource = Annotated[
    Annotated[str, Tag("path")] | Annotated[Source, Tag("source")], Discriminator(_kind_of_rows)
]
_Rows = Annotated[
    Annotated[str, Tag("path")]
    | Annotated[Source, Tag("source")]
    | Annotated[tuple[_OneSource, ...], Tag("list"), Field(min_length=1)],
    Discriminator(_kind_of_rows),
]


class DataConfig(_Frozen):
    """What to learn from, and how rows become tokens."""

    train: _Rows = "builtin"
    """Rows to train on: a path, an id, `builtin`, or a list of sources."""

    eval: _Rows | None = None
    """Held-out rows. None: `eval_fraction` of the training rows is set apart."""

    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the training rows held out where `eval` is not given, at most 500 rows."""

    split_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of which rows are held out, and which ones a source's weight takes. None: `seed`."""

    format: Format = "auto"
    """Format of the rows; `auto` looks at their keys and says what it found."""

    columns: dict[str, str] = {}
    """Names of your columns for the format's own: `{prompt: mr, completion: ref}`."""

    template: str = "auto"
    """`auto` (the tokenizer's own chat template; a plain default where it has none), `plain`, `chatml`, or a Jinja file."""

    prompt_suffix: str = ""
    """Text put between prompt and completion in plain rendering."""

    system: str | None = None
    """System message for conversations that have none."""

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens."""

    overlong: Literal["cut", "drop"] = "cut"
    """What happens to longer rows. Each one is counted and reported."""

    packing: bool = True
    """Fill each micro-batch with whole documents up to its token budget. Off: `train.batch_size` rows each."""

    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are trained: every assistant turn, the last one, or everything."""

    max_dropped_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Refuse the data when more of its rows than this share would be left out: empty answers, no trained token, too long."""

    max_cut_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Refuse the data when more of its rows than this share would lose the end of an answer to `max_length`, the stop token with it."""

    max_duplicate_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Refuse the data when more of its rows than this share have the very tokens of an earlier row."""

    max_leaked_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Refuse the data when more of the held-out rows than this share are trained on too."""

    max_unknown_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Refuse the data when more of its tokens than this share are the tokenizer's unknown token."""

    min_trained_share: Annotated[float, Field(ge=0, le=1)] = 0.002
    """Refuse the data when fewer of its tokens than this share are trained."""


class TrainConfig(_Frozen):
    """How the adapter, or the whole model, is trained."""

    method: Method = "qlora"
    """`qlora` (adapter on a quantized base), `lora` (adapter on an unquantized base), `full` (every weight)."""

    learning_rate: Annotated[float, Field(gt=0, lt=10)] | None = None
    """Peak step size. None: 2e-4 for adapters, 2e-5 for full."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data; `max_steps` is given in its place."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps in all."""

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows in a micro-batch; with packing its budget is batch_size * max_length tokens."""

    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Micro-batches in an optimizer step."""

    tokens_per_step: Annotated[int, Field(ge=16)] | None = None
    """Token budget of an optimizer step with packing, shared by its micro-batches; in place of `batch_size`."""

    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = (
        "adamw_torch"
    )
    """AdamW's moments: `adamw_torch` (float32), `adamw_8bit` (blocks of 256 in 8 bits), `paged_adamw_32bit`, `paged_adamw_8bit` (the same, moved to host memory where the card's does not do)."""

    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the schedule after warm-up."""

    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up. None: `warmup_ratio` of all steps."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of all steps spent warming up where `warmup_steps` is not given."""

    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where linear and cosine end, as a share of the peak."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay (AdamW)."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""

    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment."""

    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator floor."""

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the gradient of each adapter to this norm; None: no clipping."""

    gradient_checkpointing: bool | Literal["auto", "none", "minimal", "full", "offloaded"] = "auto"
    """What of a layer is computed again in backward: `none`; `minimal` (all but attention and `down_proj`); `full` or true (attention too); `offloaded` (`full`, layer inputs in host memory). `auto`: the fastest that memory allows, layer by layer."""

    logging_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between progress lines; every step is in events.jsonl."""

    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations. None: ten in a run."""

    save_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints. None: with each evaluation."""

    save_total_limit: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept beside the best one."""

    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many evaluations without a better loss."""

    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Further places to send metrics; events.jsonl is always written."""


class EvaluateConfig(_Frozen):
    """What is measured on held-out rows."""

    max_rows: Annotated[int, Field(ge=1)] = 500
    """Rows whose loss is measured."""

    generate_rows: Annotated[int, Field(ge=0)] = 100
    """Rows answered in text for exact match and ROUGE-L."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer."""


class CompareConfig(_Frozen):
    """What `pennyweight compare` sets side by side: one description, trained by several methods."""

    arms: Annotated[tuple[Method, ...], Field(min_length=1)] = ("full", "lora", "qlora")
    """Methods to compare; the base, untuned, is always among them."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1)] = (
        0,
        1,
        2,
    )
    """Every arm is trained once with each of these in place of `seed`."""

    ranks: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = ()
    """Ranks of the adapter arms, an arm each; alpha / r stays as described. Empty: `adapter.r` alone."""

    learning_rates: dict[str, Annotated[float, Field(gt=0, lt=10)]] = {}
    """Peak learning rates by arm, `{lora: 2e-4}` or `{lora-r8: 2e-4}`; an arm without one is tuned by a range test."""

    range_from: Annotated[float, Field(gt=0, lt=10)] = 1e-5
    """Smallest learning rate of the range test."""

    range_to: Annotated[float, Field(gt=0, lt=10)] = 1e-2
    """Largest learning rate of the range test; where the best is an end, the test goes on beyond it."""

    range_points: Annotated[int, Field(ge=2, le=50)] = 7
    """Learning rates from `range_from` to `range_to`, each the same factor above the last."""

    range_steps: Annotated[int, Field(ge=1)] = 40
    """Optimizer steps that each learning rate is tried for, warm-up and decay included."""

    range_rows: Annotated[int, Field(ge=1)] = 128
    """Training rows set apart to judge the learning rates by; the held-out rows are never used for it."""

    general_text: Annotated[str, Field(min_length=1)] = "builtin"
    """Text on which forgetting is measured: a file, folder or dataset, or `builtin`, Python's own reference."""

    general_rows: Annotated[int, Field(ge=1)] = 200
    """Documents of the general text that are read."""


class AdaptersConfig(_Frozen):
    """Many adapters over one base in one process: a run each, which differs in some settings."""

    list: tuple[dict[str, Any], ...] = ()
    """Adapters by name, each a table of what differs: `{name: sql, data.train: sql.jsonl, adapter.r: 8}`."""

    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Settings with values to try, every combination an adapter: `{adapter.r: [4, 16], seed: [0, 1]}`. With `list`, every entry in every combination."""

    mode: Literal["exact", "fast"] = "exact"
    """`exact`: they take turns, each ends with the very bits it would end with alone. `fast`: they share passes over the base, equal within rounding; quicker where micro-batches are small."""

    stop: Literal["none", "halving", "margin"] = "none"
    """How losers are stopped early, by held-out loss: `halving` keeps the better half after `stop_after`, twice, four times as many evaluations and so on (successive halving, Jamieson & Talwalkar 2016); `margin` stops, from `stop_after` evaluations on, whoever is `stop_margin` worse than the best."""

    stop_after: Annotated[int, Field(ge=1)] = 2
    """Evaluations that every adapter makes before any is stopped."""

    stop_margin: Annotated[float, Field(gt=0)] = 0.1
    """For `margin`: nats per trained token above the lowest held-out loss that cost an adapter its place."""


class RunConfig(_Frozen):
    """A whole run."""

    base: BaseConfig = BaseConfig()
    """The frozen model everything else stands beside."""

    adapter: LoraConfig = LoraConfig()
    """What is added to it and trained."""

    data: DataConfig = DataConfig()
    """What to learn from, and how rows become tokens."""

    train: TrainConfig = TrainConfig()
    """How it is trained."""

    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured on held-out rows."""

    compare: CompareConfig = CompareConfig()
    """What `pennyweight compare` sets side by side; nothing else reads it."""

    adapters: AdaptersConfig = AdaptersConfig()
    """Many adapters over the one base, trained by one command; each in a folder of its own under `output_dir`."""

    output_dir: Annotated[str, Field(min_length=1)] = "runs/default"
    """Where everything the run writes goes; the same folder again resumes."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation, order and dropout."""
