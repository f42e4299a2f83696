"""What a recipe says: frozen values, checked when they are made. Standard library only.

A mistyped field is a TypeError at import; a value out of range is a UserError that names the field.
"""

from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, get_args

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Weights = Literal["pretrained", "random"]
TrainOn = Literal["assistant", "everything"]
Checkpointing = Literal["auto", "none", "every layer", "keep attention", "offload"]
Kernels = Literal["lean", "stock"]
Sharding = Literal["auto", "never", "always"]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"]
ReportTo = Literal["none", "tensorboard", "trackio", "wandb"]
ExistingRun = Literal["refuse", "resume", "overwrite"]


class UserError(Exception):
    """Something that the user can mend. Shown as one line without a traceback; the exit status is 2."""


class Stopped(Exception):
    """The run was stopped by a signal. The message says where it is; the exit status is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_one_of(value: str, kind: object, name: str) -> None:
    choices = get_args(kind)
    require(value in choices, f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class ModelSpec:
    """The base model: what to load, and in how many bits."""

    name: str  # hub id, or the path of a local folder with safetensors
    _: KW_ONLY
    revision: str | None = None  # branch, tag or commit on the hub; None takes the main branch
    bits: int = 4  # 4: NF4 with double quantisation; 16: bf16 (fp16 where the GPU has no bf16)
    weights: Weights = "pretrained"  # "random" downloads nothing: for dry runs and tests
    layers: int | None = None  # keep only the first layers; for dry runs and tests, with random weights
    chat_template: str | None = None  # path of a Jinja file; None takes the model's own

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "ModelSpec.name is empty; give a hub id or the path of a folder")
        require(self.bits in (4, 16), f"ModelSpec.bits is {self.bits}; choose 4 or 16")
        require_one_of(self.weights, Weights, "ModelSpec.weights")
        require(self.layers is None or self.layers > 0, f"ModelSpec.layers is {self.layers}; it must be at least 1")
        require(
            self.layers is None or self.weights == "random",
            "ModelSpec.layers cuts the model, which makes sense only with weights='random'",
        )


@dataclass(frozen=True)
class DataSpec:
    """What to learn from. The format of the rows is recognised: README.md, "Your own data"."""

    source: str  # a .jsonl, .json, .csv or .parquet file, or the id of a hub data set
    _: KW_ONLY
    eval_source: str | None = None  # held-out rows of their own; None holds rows of `source` out
    eval_rows: int = 200  # rows held out of `source`, at most a tenth of it; 0 skips evaluation
    split: str = "train"  # of a hub data set
    eval_split: str = "test"  # of `eval_source`, where that is a hub data set
    revision: str | None = None  # of a hub data set
    train_on: TrainOn = "assistant"  # whose tokens count in the loss; plain text always counts whole
    max_bad_share: float = 0.01  # stop when a larger share of the rows cannot be used

    def __post_init__(self) -> None:
        require(bool(self.source.strip()), "DataSpec.source is empty; give a file or the id of a hub data set")
        require(self.eval_rows >= 0, f"DataSpec.eval_rows is {self.eval_rows}; 0 skips evaluation")
        require_one_of(self.train_on, TrainOn, "DataSpec.train_on")
        require(0 <= self.max_bad_share <= 1, f"DataSpec.max_bad_share is {self.max_bad_share}; it is a share, 0 to 1")


@dataclass(frozen=True)
class LoraSpec:
    """The adapter: delta W = scale * B A; scale = alpha / rank (arXiv:2106.09685), with rslora alpha / sqrt(rank)."""

    rank: int
    alpha: float
    _: KW_ONLY
    dropout: float = 0.0  # above 0 each layer saves its masks and dropped inputs: 70 KiB a token and layer for 8B
    rslora: bool = False  # arXiv:2312.03732: worth it at rank 64 and above
    dora: bool = False  # arXiv:2402.09353: one more vector a layer, and slower
    target_modules: tuple[str, ...] = ALL_LINEAR

    def __post_init__(self) -> None:
        require(self.rank > 0, f"LoraSpec.rank is {self.rank}; it must be at least 1")
        require(self.alpha > 0, f"LoraSpec.alpha is {self.alpha}; it must be above 0")
        require(0 <= self.dropout < 1, f"LoraSpec.dropout is {self.dropout}; it is a share, 0 to below 1")
        require(len(self.target_modules) > 0, "LoraSpec.target_modules is empty: nothing would be trained")


@dataclass(frozen=True)
class TrainSpec:
    """One run."""

    seq_len: int  # tokens in a packed row
    rows_per_step: int  # packed rows in one optimizer step, whatever the card
    learning_rate: float  # peak
    _: KW_ONLY
    epochs: float = 1.0
    max_steps: int | None = None  # optimizer steps; None trains for `epochs`
    lr_schedule: Schedule = "cosine"
    warmup_ratio: float = 0.03  # of all steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: Optimizer = "adamw_torch_fused"
    # Activation checkpointing: which layers recompute in backward. "auto" lets the plan choose the fastest that fits;
    # "keep attention" recomputes every layer but attention, "offload" keeps the layers' inputs in host memory.
    checkpointing: Checkpointing = "auto"
    # The decoder layers: "lean" computes them with our fused operators, "stock" as transformers and PEFT do.
    kernels: Kernels = "lean"
    # On several GPUs: "auto" gives each the whole model where it fits, and else cuts the layers over them (FSDP2).
    sharding: Sharding = "auto"
    eval_every: int = 100  # optimizer steps; the end of the run is evaluated too
    save_every: int = 100  # optimizer steps between checkpoints on disk, the last two of which stay
    sample_answers: int = 4  # to held-out prompts, by base and adapter, for report.html; 0 skips them
    report_to: ReportTo = "none"  # hands the metrics to a tracker, which must be installed; "wandb" sends them away
    seed: int = 0
    # The same adapter from the same seed on the same machine: bit for bit on a CPU; on a GPU up to the order in which
    # flash attention's backward adds up, for which torch has no faster deterministic form.
    deterministic: bool = True

    def __post_init__(self) -> None:
        for name in (
            "seq_len",
            "rows_per_step",
            "learning_rate",
            "epochs",
            "max_grad_norm",
            "eval_every",
            "save_every",
        ):
            value = getattr(self, name)
            require(value > 0, f"TrainSpec.{name} is {value}; it must be above 0")
        require(self.max_steps is None or self.max_steps > 0, f"TrainSpec.max_steps is {self.max_steps}; at least 1")
        require(0 <= self.warmup_ratio < 1, f"TrainSpec.warmup_ratio is {self.warmup_ratio}; a share, 0 to below 1")
        require(self.weight_decay >= 0, f"TrainSpec.weight_decay is {self.weight_decay}; 0 or more")
        require(self.sample_answers >= 0, f"TrainSpec.sample_answers is {self.sample_answers}; 0 skips them")
        require_one_of(self.report_to, ReportTo, "TrainSpec.report_to")
        require_one_of(self.lr_schedule, Schedule, "TrainSpec.lr_schedule")
        require_one_of(self.optimizer, Optimizer, "TrainSpec.optimizer")
        require_one_of(self.checkpointing, Checkpointing, "TrainSpec.checkpointing")
        require_one_of(self.kernels, Kernels, "TrainSpec.kernels")
        require_one_of(self.sharding, Sharding, "TrainSpec.sharding")


def rows_per_process(train: TrainSpec, processes: int) -> int:
    """Rows of an optimizer step that each process trains. Raises UserError when they cannot be shared out."""
    if train.rows_per_step % processes:
        counts = [count for count in range(1, train.rows_per_step + 1) if train.rows_per_step % count == 0]
        *some, last = map(str, counts)
        numbers = f"{', '.join(some)} or {last}" if some else last
        raise UserError(
            f"TrainSpec.rows_per_step is {train.rows_per_step}, which {processes} processes cannot share evenly: take "
            f"{numbers} GPUs, or a multiple of {processes} rows"
        )
    return train.rows_per_step // processes


@dataclass(frozen=True)
class Recipe:
    """Everything that a user may want to edit, in one value."""

    model: ModelSpec
    data: DataSpec
    lora: LoraSpec
    train: TrainSpec
    card_gib: float | None = 24.0  # the GPU that it is meant for, GiB; None runs anywhere, on a CPU too
    out: str = field(default="", kw_only=True)  # "" becomes outputs/<recipe>
    existing_run: ExistingRun = field(default="refuse", kw_only=True)

    def __post_init__(self) -> None:
        require(self.card_gib is None or self.card_gib > 0, f"Recipe.card_gib is {self.card_gib}; it must be above 0")
        require_one_of(self.existing_run, ExistingRun, "Recipe.existing_run")
