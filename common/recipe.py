"""The values of a recipe: frozen, and checked when they are created. Standard library only.

A mistyped field name, a value of another type and a value out of range raise UserError when the recipe is imported. The
message begins with the spec's name and the field.
"""

import os
from copy import copy
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields
from datetime import date
from typing import Any, Literal, Self, get_args

from common.recipe_fields import unknown_field, wrong_type
from common.rope_scaling import plain_numbers, wrong_rope_scaling

# What DataSpec.columns can name: the two sides of a row, or its messages, or its plain text; a better and a worse
# answer, or an answer's rating; and what goes with them.
COLUMN_KEYS = ("user", "assistant", "messages", "text", "chosen", "rejected", "label", "system", "tools", "reasoning")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Weights = Literal["pretrained", "random"]
TrainOn = Literal["assistant", "everything"]
LongTexts = Literal["split", "drop"]
Checkpointing = Literal["auto", "none", "every layer", "keep attention", "offload"]
Kernels = Literal["lean", "stock"]
Sharding = Literal["auto", "never", "always"]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"]
ReportTo = Literal[  # what transformers' trainer knows
    "none",
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]
PreferenceLoss = Literal["dpo", "ipo", "simpo", "orpo", "kto"]
Kind = Literal["conversations", "pairs", "rated"]
ExistingRun = Literal["refuse", "resume", "overwrite"]
Keep = Literal["last", "best"]
AUTO_ROWS_PER_STEP = (16, 8, 4, 2, 1)  # what TrainSpec(rows_per_step="auto") chooses among


class _OneLine(Exception):
    """An exception whose message says it all."""

    def _render_traceback_(self) -> list[str]:
        """The lines that a notebook, or IPython, shows in the place of the traceback; it asks an exception for them."""
        return [f"error: {self}"]


class UserError(_OneLine):
    """An error that the user can correct. It is shown as one line without a traceback, and the exit status is 2."""


class Stopped(_OneLine):
    """A signal stopped the run. The message says after which step. The exit status is 128 + the signal's number.

    can_go_on: whether steps are left to train.
    """

    def __init__(self, message: str, signal_number: int, *, can_go_on: bool = True) -> None:
        super().__init__(message)
        self.signal_number, self.can_go_on = signal_number, can_go_on

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_one_of(value: str, literal: object, name: str) -> None:
    """Raises UserError unless the value is one of a Literal type's. name: of the field."""
    choices = get_args(literal)
    require(value in choices, f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")


class FieldNameError(UserError, TypeError):
    """A spec has no such field, or one is missing."""


class _Spec:
    """Says in words, for all specs, what Python says of their arguments; and that a value has another type."""

    def __new__(cls, *args: Any, **values: Any) -> Self:
        known = [entry for entry in fields(cls) if entry.init]  # type: ignore[arg-type]
        for name in values:
            if name not in {entry.name for entry in known}:
                raise FieldNameError(unknown_field(cls.__name__, name, fields_of_specs()))
        by_place = [entry for entry in known if not entry.kw_only]
        if args or values:  # copy and pickle give none
            given = {*(entry.name for entry in by_place[: len(args)]), *values}
            missing = [entry.name for entry in by_place if entry.default is MISSING and entry.name not in given]
            if missing:
                raise FieldNameError(f"{cls.__name__} needs {' and '.join(missing)}")
            if len(args) > len(by_place):
                raise FieldNameError(
                    f"{cls.__name__} takes {len(by_place)} values without a name; write the others with theirs: "
                    f"{known[len(by_place)].name}=..."
                )
        return super().__new__(cls)

    def check_types(self) -> None:
        """Raises UserError for a value of another type than its field. A list becomes a tuple, a path a text."""
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, entry.name, os.fspath(value))
            if isinstance(value, list) and entry.type == tuple[str, ...]:
                object.__setattr__(self, entry.name, tuple(value))
            message = wrong_type(getattr(self, entry.name), entry.type, f"{type(self).__name__}.{entry.name}")
            require(message is None, message or "")


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except (ValueError, TypeError):
        return False


@dataclass(frozen=True)
class ModelSpec(_Spec):
    """The base model."""

    name: str  # id on the Hugging Face hub, or the path of a local folder with safetensors files
    _: KW_ONLY
    revision: str | None = None  # branch, tag or commit on the hub; None takes the main branch
    bits: int = 4  # 4: NF4 with double quantization; 16: bf16 (fp16 on a GPU without bf16, fp32 on a CPU)
    weights: Weights = "pretrained"  # "random" downloads nothing: for dry runs and tests
    layers: int | None = None  # how many decoder layers to keep, from the first; None keeps all; only with "random"
    chat_template: str | None = None  # path of a Jinja file; None takes the model's own template
    # The date that a chat template writes where it asks for today's, as Llama 3.2's does: "2026-11-27". None takes the
    # day on which the run began.
    template_date: str | None = None
    # Stretches the positions, for rows longer than the model's own, in transformers' words (linear, yarn, llama3,
    # dynamic): {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}. It takes the place of
    # the model's own scaling, and belongs to the adapter from then on: docs/long_rows.md. None keeps the model's.
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.check_types()
        if self.rope_scaling is not None:
            message = wrong_rope_scaling(self.rope_scaling, "ModelSpec.rope_scaling")
            require(message is None, message or "")
            object.__setattr__(self, "rope_scaling", plain_numbers(self.rope_scaling))
        require(bool(self.name.strip()), "ModelSpec.name is empty; give a hub id or the path of a folder")
        require(self.bits in (4, 16), f"ModelSpec.bits is {self.bits}; choose 4 or 16")
        require_one_of(self.weights, Weights, "ModelSpec.weights")
        require(self.layers is None or self.layers > 0, f"ModelSpec.layers is {self.layers}; it must be at least 1")
        require(
            self.layers is None or self.weights == "random",
            "ModelSpec.layers cuts the model, which makes sense only with weights='random'",
        )
        require(
            self.template_date is None or _is_date(self.template_date),
            f"ModelSpec.template_date is {self.template_date!r}; write it as '2026-11-27'",
        )


@dataclass(frozen=True)
class DataSpec(_Spec):
    """The training data and the held-out data.

    The format of the rows is recognised by their keys, and what could be read in two ways is refused: docs/data.md
    shows each format, and `make data` what becomes of the rows.
    """

    # A .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow file; several of them, "a.jsonl b.jsonl"; a glob,
    # "data/*.jsonl"; a folder of them, or one that save_to_disk wrote; or the id of a data set on the hub.
    source: str = ""
    _: KW_ONLY
    # Instead of `source` several ones, each with a weight: (("a.jsonl", 0.8), ("owner/set", 0.2)). The weights are
    # shares of the rows. No row is taken twice: the mixture ends where the first source is used up.
    sources: tuple[tuple[str, float], ...] = ()
    eval_source: str | None = None  # another source, to evaluate on; None holds out examples of those above
    eval_rows: int = 200  # examples to hold out, at most a tenth of them, with all their copies; 0 skips evaluation
    split: str = "train"  # split of each source that is a hub data set or a folder of save_to_disk
    eval_split: str = "test"  # split of `eval_source`, likewise
    revision: str | None = None  # branch, tag or commit of a hub data set; None takes the main branch
    config: str | None = None  # configuration of a hub data set that has several
    # Which column is which, where the names are yours: {"user": "frage", "assistant": "antwort"}. Keys: COLUMN_KEYS.
    columns: dict[str, str] | None = None
    train_on: TrainOn = "assistant"  # tokens in the loss: the assistant's, or "everything"; plain text counts whole
    # True: a row's text was rendered with the model's own chat template, control tokens included, and is taken as it
    # is. Trained are the answers that the template's marks show.
    rendered: bool = False
    long_texts: LongTexts = "split"  # plain texts longer than seq_len: "split" over rows, or "drop"
    # Prompts and texts off the task, on which base and adapter are compared: how far a run has moved the model
    # elsewhere. A file, or a hub data set with a split "train"; None measures nothing.
    drift_source: str | None = "data/general.jsonl"
    max_bad_share: float = 0.01  # the run stops before training when a larger share of the rows cannot be used
    max_long_share: float = 0.10  # or when a larger share is left out: not even its first answer fits seq_len
    # What a row is: a conversation, or with a PreferenceSpec a pair of a better and a worse answer, or for KTO an
    # answer that is rated good or bad. The recipe sets it.
    kind: Kind = field(default="conversations", init=False)

    @property
    def mixture(self) -> tuple[tuple[str, float], ...]:
        """The sources to train on, each with its weight: `sources`, or `source` alone."""
        return self.sources or ((self.source, 1.0),)

    @property
    def name(self) -> str:
        """The sources to train on, in words."""
        return ", ".join(source for source, _ in self.mixture)

    def __post_init__(self) -> None:
        self.check_types()
        pairs = tuple(tuple(pair) if isinstance(pair, (tuple, list)) else (pair,) for pair in self.sources)
        object.__setattr__(self, "sources", pairs)  # run.json holds lists
        require(
            all(len(pair) == 2 and isinstance(pair[0], str) and not isinstance(pair[1], str) for pair in pairs),
            "DataSpec.sources is a tuple of pairs, each a source and its weight: (('a.jsonl', 0.8), ('b.jsonl', 0.2))",
        )
        require(not (self.source and pairs), "DataSpec has a source and sources; give one of the two")
        require(
            all(source.strip() for source, _ in self.mixture),
            "DataSpec.source is empty; give a file or the id of a hub data set",
        )
        for source, weight in self.mixture:
            require(
                0 < weight < float("inf"),
                f"DataSpec.sources: the weight of {source} is {weight}; it must be above 0, and finite",
            )
        require(
            len({source for source, _ in self.mixture}) == len(self.mixture),
            "DataSpec.sources has the same source twice; give it once, with the sum of the weights",
        )
        require(
            not pairs or (self.revision is None and self.config is None),
            "DataSpec.revision and config are one data set's, and DataSpec.sources may name several; leave them out",
        )
        require(self.eval_rows >= 0, f"DataSpec.eval_rows is {self.eval_rows}; 0 skips evaluation")
        require(
            self.drift_source is None or bool(self.drift_source.strip()),
            "DataSpec.drift_source is empty; None measures no drift",
        )
        require(self.config is None or bool(self.config.strip()), "DataSpec.config is empty; None is for none")
        require_one_of(self.train_on, TrainOn, "DataSpec.train_on")
        require_one_of(self.long_texts, LongTexts, "DataSpec.long_texts")
        if self.columns is not None:
            _check_columns(self.columns)
        require(0 <= self.max_bad_share <= 1, f"DataSpec.max_bad_share is {self.max_bad_share}; it is a share, 0 to 1")
        require(
            0 <= self.max_long_share <= 1, f"DataSpec.max_long_share is {self.max_long_share}; it is a share, 0 to 1"
        )


def _check_columns(columns: dict[str, str]) -> None:
    """Raises UserError unless the keys are those of one row: a text, or messages, or a user's and an assistant's."""
    require(isinstance(columns, dict), f"DataSpec.columns is {columns!r:.80}; write {{'user': ..., 'assistant': ...}}")
    keys, choices = set(columns), ", ".join(map(repr, COLUMN_KEYS))
    for key, name in columns.items():
        require(key in COLUMN_KEYS, f"DataSpec.columns has {key!r}; choose among {choices}")
        require(isinstance(name, str) and bool(name.strip()), f"DataSpec.columns[{key!r}] is {name!r}; name a column")
    require(len(set(columns.values())) == len(columns), "DataSpec.columns names a column twice")
    answers, beside = keys & {"chosen", "rejected"}, {"system", "tools"}
    if answers:
        fits = (
            len(answers) == 2
            and len(keys & {"user", "messages"}) < 2
            and keys <= {*answers, "user", "messages", *beside}
        )
    elif "messages" in keys:
        fits = keys <= {"messages", "label", *beside}
    else:
        fits = keys == {"text"} or {"user", "assistant"} <= keys <= {"user", "assistant", "label", "reasoning", *beside}
    require(
        fits,
        f"DataSpec.columns has {', '.join(map(repr, columns)) or 'no key'}; name user and assistant, or messages "
        "(perhaps with system and tools), or text alone; of pairs chosen and rejected (perhaps with user or messages), "
        "of rated answers also label",
    )


def _check_preferences(data: DataSpec) -> None:
    """Raises UserError where the fields of a recipe's data are for another kind than the recipe's."""
    keys = set(data.columns or ())
    require(
        data.kind == "pairs" or "chosen" not in keys,
        "DataSpec.columns names chosen and rejected, which are of pairs: give the recipe preference=PreferenceSpec()",
    )
    require(
        data.kind == "rated" or "label" not in keys,
        "DataSpec.columns names a label, which is of rated answers: give the recipe preference=PreferenceSpec('kto')",
    )
    if data.kind != "conversations":
        wanted = {"pairs": "chosen and rejected", "rated": "user and assistant, or messages"}[data.kind]
        require(
            not keys or ("chosen" in keys if data.kind == "pairs" else "text" not in keys),
            f"DataSpec.columns names no {wanted}, and the recipe has a PreferenceSpec: name those too",
        )
        require(
            data.train_on == "assistant" and not data.rendered,
            "DataSpec.train_on and rendered are not for a PreferenceSpec: of better and worse answers the assistant's "
            "tokens alone are compared, as the chat template writes them",
        )


@dataclass(frozen=True)
class LoraSpec(_Spec):
    """The adapter: it adds scale * B A to a frozen weight, with scale = alpha / rank (arXiv:2106.09685)."""

    rank: int  # columns of B and rows of A
    alpha: float  # leave it as it is where you change the rank: the best learning rate then stays (docs/defaults.md)
    _: KW_ONLY
    dropout: float = 0.0  # of A's input; above 0 a layer keeps masks for backward: 70 KiB per token and layer for 8B
    rslora: bool = False  # scale = alpha / sqrt(rank), arXiv:2312.03732: as if alpha were sqrt(rank) times as large
    dora: bool = False  # trains a vector of magnitudes per linear layer too, arXiv:2402.09353: slower
    target_modules: tuple[str, ...] = ALL_LINEAR  # the linear layers of a decoder layer that get an adapter
    # Folder of an adapter whose weights are the first ones: of an earlier run, or one that PEFT saved, with the rank,
    # alpha and targets of this spec. Steps and learning rate begin anew: docs/after.md. None starts with a new adapter.
    start_from: str | None = None

    def __post_init__(self) -> None:
        self.check_types()
        require(self.rank > 0, f"LoraSpec.rank is {self.rank}; it must be at least 1")
        require(self.alpha > 0, f"LoraSpec.alpha is {self.alpha}; it must be above 0")
        require(0 <= self.dropout < 1, f"LoraSpec.dropout is {self.dropout}; it is a share, 0 to below 1")
        require(len(self.target_modules) > 0, "LoraSpec.target_modules is empty: nothing would be trained")
        require(
            self.start_from is None or bool(self.start_from.strip()),
            "LoraSpec.start_from is empty; None starts with a new adapter",
        )


@dataclass(frozen=True)
class TrainSpec(_Spec):
    """How to train."""

    seq_len: int  # tokens in a packed row
    # Packed rows in one optimizer step, over all GPUs; the plan splits them into micro-batches. "auto" takes the
    # largest of AUTO_ROWS_PER_STEP that gives 100 steps, and scales the learning rate, which is then that of 16 rows:
    # common/data/steps.py.
    rows_per_step: int | Literal["auto"]
    learning_rate: float  # peak
    _: KW_ONLY
    epochs: float = 1.0  # passes over the training rows
    max_steps: int | None = None  # optimizer steps; None trains for `epochs`
    lr_schedule: Schedule = "cosine"  # after the warmup: "cosine" and "linear" fall to 0, "constant" stays at the peak
    warmup_ratio: float = 0.03  # share of all steps in which the learning rate rises from 0 to its peak
    weight_decay: float = 0.0  # AdamW's, of the adapter's weights
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm, over all adapter weights
    optimizer: Optimizer = "adamw_torch_fused"  # "adamw_8bit" and "paged_adamw_8bit" are those of bitsandbytes
    # Activation checkpointing: which layers recompute their activations in backward.
    #   "auto": the plan takes the fastest choice that fits the card. "none": no layer. "every layer": all of them.
    #   "keep attention": every layer, except for its attention. "offload": every layer, its input kept in host memory.
    checkpointing: Checkpointing = "auto"
    # How the decoder layers compute: "lean" with our fused operators, "stock" as transformers and PEFT do.
    kernels: Kernels = "lean"
    # Decoder layers whose frozen weights wait in host memory and are copied to the card beside the computation, spread
    # over the model. "auto": as few as must, where nothing fits otherwise. 0: none. A number: so many, 3 at least,
    # because there is always room for two on the card.
    weights_on_host: int | Literal["auto"] = "auto"
    # Whether the embedding waits in host memory, where the rows of a micro-batch's tokens are looked up and sent.
    # "auto": where nothing fits otherwise, and with weights_on_host=0 not even there. One that is the head too stays.
    embedding_on_host: bool | Literal["auto"] = "auto"
    # On several GPUs: "never" gives each the whole model (DDP), "always" shards the decoder layers over them (FSDP2),
    # "auto" shards only a model that does not fit whole.
    sharding: Sharding = "auto"
    eval_every: int = 100  # optimizer steps between evaluations; the start and the end of the run are evaluated too
    save_every: int = 100  # optimizer steps between checkpoints; the newest two are kept
    keep: Keep = "last"  # the adapter that a run leaves: of the last step, or of the lowest held-out loss ("best")
    # Evaluations in a row that do not lower the held-out loss, after which the run stops; None never stops it early.
    patience: int | None = None
    sample_answers: int = 4  # answers to held-out prompts, by base and adapter, in report.html; 0 skips them
    # A tracker, which must be installed, that gets the metrics; most send them away. A run there has its folder's name.
    report_to: ReportTo = "none"
    seed: int = 0  # of the adapter's first weights, dropout, the order of rows, and the choice of held-out rows
    # True: the same seed on the same machine gives the same adapter, bit for bit on a CPU. On a GPU, flash attention's
    # backward still adds up in a varying order: torch has no faster deterministic form of it.
    deterministic: bool = True

    @property
    def most_rows_per_step(self) -> int:
        """The number of rows, or for "auto" the largest that it may choose, which a plan is made for."""
        return AUTO_ROWS_PER_STEP[0] if self.rows_per_step == "auto" else self.rows_per_step

    def __post_init__(self) -> None:
        self.check_types()
        require(
            self.rows_per_step == "auto" or not isinstance(self.rows_per_step, str),
            f'TrainSpec.rows_per_step is {self.rows_per_step!r}; give a whole number, or "auto"',
        )
        for name in (
            "seq_len",
            "most_rows_per_step",
            "learning_rate",
            "epochs",
            "max_grad_norm",
            "eval_every",
            "save_every",
        ):
            value = getattr(self, name)
            require(value > 0, f"TrainSpec.{name.removeprefix('most_')} is {value}; it must be above 0")
        require(self.max_steps is None or self.max_steps > 0, f"TrainSpec.max_steps is {self.max_steps}; at least 1")
        require(0 <= self.warmup_ratio < 1, f"TrainSpec.warmup_ratio is {self.warmup_ratio}; a share, 0 to below 1")
        require(self.weight_decay >= 0, f"TrainSpec.weight_decay is {self.weight_decay}; 0 or more")
        require(self.sample_answers >= 0, f"TrainSpec.sample_answers is {self.sample_answers}; 0 skips them")
        require_one_of(self.keep, Keep, "TrainSpec.keep")
        require(self.patience is None or self.patience > 0, f"TrainSpec.patience is {self.patience}; at least 1")
        require_one_of(self.report_to, ReportTo, "TrainSpec.report_to")
        require_one_of(self.lr_schedule, Schedule, "TrainSpec.lr_schedule")
        require_one_of(self.optimizer, Optimizer, "TrainSpec.optimizer")
        require_one_of(self.checkpointing, Checkpointing, "TrainSpec.checkpointing")
        require_one_of(self.kernels, Kernels, "TrainSpec.kernels")
        require_one_of(self.sharding, Sharding, "TrainSpec.sharding")
        on_host = self.weights_on_host
        require(
            on_host == "auto" or not isinstance(on_host, str) and (on_host == 0 or on_host > 2),
            f'TrainSpec.weights_on_host is {on_host!r}; give "auto", 0, or 3 and more: two are always on the card',
        )
        require(
            on_host in ("auto", 0) or self.sharding != "always",
            f"TrainSpec.weights_on_host is {on_host}, of layers that are whole, and sharding='always' shares them out; "
            "leave one of the two out",
        )
        require(
            not isinstance(self.embedding_on_host, str) or self.embedding_on_host == "auto",
            f'TrainSpec.embedding_on_host is {self.embedding_on_host!r}; give "auto", True or False',
        )
        require(
            self.embedding_on_host is not True or self.sharding != "always",
            "TrainSpec.embedding_on_host is True, and with sharding='always' the embedding stays on each card; leave "
            "one of the two out",
        )


# What each loss takes where the spec says None.
_PAIR_VALUES = {"sft_weight": 0.0, "label_smoothing": 0.0}
PREFERENCE_DEFAULTS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1, "length_normalized": False, **_PAIR_VALUES},
    "ipo": {"beta": 0.1, "length_normalized": True, "sft_weight": 0.0},
    "simpo": {"beta": 2.0, "length_normalized": True, "gamma": 1.0, **_PAIR_VALUES},
    "orpo": {"beta": 0.1, "sft_weight": 1.0},
    "kto": {"beta": 0.1, "length_normalized": False, "desirable_weight": 1.0, "undesirable_weight": 1.0},
}


@dataclass(frozen=True)
class PreferenceSpec(_Spec):
    """How to learn from answers that are better or worse, instead of learning every answer.

    With log-likelihoods p of an answer under the model that trains and r under the reference, which is the model as the
    run began, of the chosen answer (c) and the rejected one (j), and s the logistic function:

    - "dpo": -log s(beta * ((p_c - r_c) - (p_j - r_j))), arXiv:2305.18290, equation 7. beta 0.1.
    - "ipo": ((p_c - r_c) - (p_j - r_j) - 1 / (2 beta))^2, each per token, arXiv:2310.12036, equation 17. beta 0.1.
    - "simpo": -log s(beta * (p_c - p_j) - gamma), each per token, arXiv:2405.14734, equation 6. beta 2, gamma 1.
    - "orpo": -p_c - beta * log s(odds_c - odds_j), each per token, odds = p - log(1 - exp(p)), arXiv:2403.07691,
      equations 6 and 7. beta 0.1 (lambda there). It needs no instruction tuning before.
    - "kto": w * (1 - s(beta * (p - r - z))) for a good answer, w * (1 - s(beta * (z - p + r))) for a bad one, with z
      the mean of p - r over answers to other prompts, at least 0, arXiv:2402.01306, equation 7. beta 0.1. It takes
      single answers, rated good or bad, instead of pairs.
    """

    loss: PreferenceLoss = "dpo"
    _: KW_ONLY
    # None is the loss's own value, of PREFERENCE_DEFAULTS. What a loss does not have there cannot be given.
    beta: float | None = None  # how strongly it holds to the reference, or for "orpo" the weight of the comparison
    gamma: float | None = None  # "simpo": by how much a chosen answer's reward is to exceed the rejected one's
    label_smoothing: float | None = None  # the share of pairs that are taken to be the wrong way round
    # Added to a pair's loss, so many times: the chosen answer's negative log-likelihood per token (arXiv:2404.19733).
    sft_weight: float | None = None
    length_normalized: bool | None = None  # log-likelihoods per token instead of per answer
    desirable_weight: float | None = None  # "kto": w of a good answer
    undesirable_weight: float | None = None  # "kto": w of a bad answer

    def __post_init__(self) -> None:
        self.check_types()
        require_one_of(self.loss, PreferenceLoss, "PreferenceSpec.loss")
        own = PREFERENCE_DEFAULTS[self.loss]
        for name in (entry.name for entry in fields(self) if entry.name != "loss"):
            value, losses = getattr(self, name), [loss for loss, known in PREFERENCE_DEFAULTS.items() if name in known]
            if value is None:
                continue
            require(name in own, f"PreferenceSpec.{name} is for {', '.join(losses)}, and the loss is {self.loss}")
            require(value >= 0, f"PreferenceSpec.{name} is {value}; 0 or more")
        require(self.beta != 0, "PreferenceSpec.beta is 0.0; it must be above 0")
        require(
            (self.label_smoothing or 0) < 0.5, f"PreferenceSpec.label_smoothing is {self.label_smoothing}; below 0.5"
        )

    def value(self, name: str) -> float:
        """Of a field, or where it is None the loss's own; 0 where the loss does not have it."""
        given = getattr(self, name)
        return PREFERENCE_DEFAULTS[self.loss].get(name, 0.0) if given is None else given

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the log-likelihoods of the model as the run began."""
        return self.loss in ("dpo", "ipo", "kto")

    @property
    def kind(self) -> Kind:
        """What its rows of data are."""
        return "rated" if self.loss == "kto" else "pairs"


def rows_per_process(train: TrainSpec, processes: int) -> int:
    """Returns how many rows of an optimizer step each process trains. Raises UserError when it is no whole number."""
    rows = train.most_rows_per_step
    if rows % processes:
        counts = [count for count in range(1, rows + 1) if rows % count == 0]
        *some, last = map(str, counts)
        numbers = f"{', '.join(some)} or {last}" if some else last
        said = f'"auto", at most {rows}' if train.rows_per_step == "auto" else str(rows)
        raise UserError(
            f"TrainSpec.rows_per_step is {said}, which {processes} processes cannot share evenly: take "
            f"{numbers} GPUs, or a multiple of {processes} rows"
        )
    return rows // processes


@dataclass(frozen=True)
class Recipe(_Spec):
    """One value with everything that a user may want to edit."""

    model: ModelSpec
    data: DataSpec
    lora: LoraSpec
    train: TrainSpec
    card_gib: float | None = 24.0  # memory of the GPU that it is meant for; None runs anywhere, also on a CPU
    # Learns from better and worse answers: `data` is then pairs, or for KTO rated answers. None learns every answer.
    preference: PreferenceSpec | None = field(default=None, kw_only=True)
    out: str = field(default="", kw_only=True)  # output folder; "" becomes outputs/<recipe>
    # Another folder, on another disk, for what was trained when `out` cannot be written at the end; None has none.
    fallback_out: str | None = field(default=None, kw_only=True)
    existing_run: ExistingRun = field(default="refuse", kw_only=True)  # what to do when `out` already holds a run

    def __post_init__(self) -> None:
        self.check_types()
        require(self.card_gib is None or self.card_gib > 0, f"Recipe.card_gib is {self.card_gib}; it must be above 0")
        require_one_of(self.existing_run, ExistingRun, "Recipe.existing_run")
        data = copy(self.data)  # the same one may be another recipe's too
        object.__setattr__(data, "kind", "conversations" if self.preference is None else self.preference.kind)
        object.__setattr__(self, "data", data)
        _check_preferences(data)


# The parts of a recipe by the names that they have in it; "" is the recipe itself.
SPECS = {
    "": Recipe,
    "model": ModelSpec,
    "data": DataSpec,
    "lora": LoraSpec,
    "train": TrainSpec,
    "preference": PreferenceSpec,
}


def fields_of_specs() -> dict[str, list[str]]:
    """The names of the fields that can be given, by the name of the spec."""
    return {spec.__name__: [entry.name for entry in fields(spec) if entry.init] for spec in SPECS.values()}
