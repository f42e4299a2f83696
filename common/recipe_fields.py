"""What is wrong with a field of a recipe, in words: a value of another type, or a name that a spec does not have.

Standard library only.
"""

import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

TYPE_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", type(None): "None"}

# What other libraries call a field, and what to write instead.
_ROWS = "rows_per_step, the rows of an optimizer step; the plan splits them into micro-batches that fit"
BROUGHT = {
    "ModelSpec": {
        "name": (
            "model",
            "model_id",
            "model_name",
            "model_name_or_path",
            "base_model",
            "pretrained_model_name_or_path",
        ),
        "bits, 4 or 16": ("load_in_4bit", "load_in_8bit", "quantization_config", "quantization_bit"),
        "nothing: the GPU decides, bf16 where it has that": ("dtype", "torch_dtype"),
        "nothing: the recipe's attention is chosen for the GPU": (
            "attn_implementation",
            "flash_attn",
            "flash_attention",
        ),
        "nothing: no code from a model's repository runs": ("trust_remote_code",),
        "TrainSpec(seq_len=...)": ("max_seq_length", "max_length"),
        "rope_scaling": ("rope_parameters", "rope_config", "rope"),
    },
    "DataSpec": {
        "source": ("dataset", "datasets", "data", "data_files", "train_file", "dataset_name", "path", "file"),
        "eval_source": ("eval_dataset", "validation_file", "eval_file"),
        "eval_rows, a number of examples": ("val_set_size", "val_size", "test_size", "validation_split"),
        "columns": ("dataset_text_field", "text_field", "text_column", "prompt_column", "column_mapping"),
        'train_on, "assistant" or "everything"': ("train_on_inputs", "train_on_prompt", "assistant_only_loss"),
        "nothing: rows are always packed": ("packing", "sample_packing"),
    },
    "LoraSpec": {
        "rank": ("r", "lora_r", "lora_rank", "lora_dim"),
        "alpha": ("lora_alpha",),
        "dropout": ("lora_dropout",),
        "target_modules": ("lora_target", "lora_target_modules", "modules", "target_linear", "lora_target_linear"),
        "rslora": ("use_rslora",),
        "start_from": (
            *("adapter", "adapter_name_or_path", "adapter_path", "lora_model_dir", "lora_path", "peft_path"),
            *("resume_adapter_file", "pretrained_adapter"),
        ),
        "dora": ("use_dora",),
    },
    "TrainSpec": {
        "learning_rate": ("lr",),
        "epochs": ("num_train_epochs", "num_epochs", "n_epochs"),
        "seq_len": ("max_seq_length", "max_length", "max_seq_len", "sequence_len", "cutoff_len", "block_size"),
        "max_steps": ("steps", "iters", "num_steps"),
        _ROWS: (
            *("batch_size", "micro_batch_size", "per_device_train_batch_size", "train_batch_size"),
            *("gradient_accumulation_steps", "global_batch_size"),
        ),
        "warmup_ratio, a share of all steps": ("warmup", "warmup_steps", "num_warmup_steps"),
        "lr_schedule": ("lr_scheduler", "lr_scheduler_type", "scheduler", "schedule"),
        "weight_decay": ("wd", "decay"),
        "max_grad_norm": ("grad_clip", "clip_grad_norm", "max_norm", "gradient_clipping"),
        "optimizer": ("optim", "optimiser"),
        "checkpointing": ("gradient_checkpointing", "activation_checkpointing", "use_gradient_checkpointing"),
        'weights_on_host, a number of layers or "auto"': ("offload_layers", "layer_offloading"),
        'embedding_on_host, True or "auto"': ("offload_embedding", "offload_embeddings"),
        "eval_every": ("eval_steps", "evals_per_epoch", "val_every"),
        "save_every": ("save_steps", "saves_per_epoch", "checkpoint_every"),
        "patience": ("early_stopping_patience",),
        'keep="best"': ("load_best_model_at_end",),
        "report_to": ("use_wandb", "wandb_project", "tracker"),
        "seed": ("random_seed", "random_state"),
        "nothing: the GPU decides, bf16 where it has that": ("bf16", "fp16", "mixed_precision", "tf32"),
        "nothing: every step is in metrics.jsonl": ("logging_steps", "log_every"),
        "Recipe(out=...)": ("output_dir",),
    },
    "Recipe": {"out": ("output_dir", "output", "out_dir", "save_dir"), "card_gib": ("vram", "gpu_memory", "vram_gib")},
}


# What a value of another type is often meant to say, and how that is said here.
MEANT = {
    "DataSpec.source": "; several files stand in one text: 'a.jsonl b.jsonl'",
    "DataSpec.eval_rows": ", of examples to hold out",
    "LoraSpec.target_modules": ", or leave it out for all linear layers",
}


def wrong_type(value: Any, wanted: Any, name: str) -> str | None:
    """Why the value of the field `name` is not of the type `wanted`; None where it is, or where that is not known.

    wanted: the annotation: int, float, str, bool, None, a Literal, a tuple of texts, or a union of them. A whole number
    is a number; True is none.
    """
    choices = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    if any(_is(value, choice) for choice in choices):
        return None
    words = " or ".join(dict.fromkeys(_type_in_words(choice) for choice in choices))
    return f"{name} is {value!r:.80}{_said_otherwise(value, choices)}; give {words}{MEANT.get(name, '')}"


def _is(value: Any, wanted: Any) -> bool:
    if get_origin(wanted) is Literal:
        return isinstance(value, str)  # which one, the spec itself checks
    if get_origin(wanted) is tuple and get_args(wanted) == (str, ...):
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if get_origin(wanted) is not None:
        return True  # the spec itself checks
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, wanted or type(None)) and (wanted is bool or not isinstance(value, bool))


def _type_in_words(wanted: Any) -> str:
    if get_origin(wanted) is Literal:
        return " or ".join(map(repr, get_args(wanted)))
    if get_origin(wanted) is tuple:
        return "a tuple of texts: ('q_proj', 'v_proj')"
    return TYPE_WORDS.get(wanted or type(None)) or f"a {wanted.__name__}"


def _said_otherwise(value: Any, choices: Sequence[Any]) -> str:
    """What the value is, where its form alone does not show that."""
    if isinstance(value, str) and str not in choices:
        return ", a text"
    if isinstance(value, float) and int in choices:
        return ", which has a decimal point"
    return ""


def unknown_field(spec: str, name: str, fields: Mapping[str, Sequence[str]]) -> str:
    """That a spec has no such field, and what to write instead. fields: the fields of each spec."""
    for answer, names in BROUGHT.get(spec, {}).items():
        if name in names:
            written = answer.replace("nothing: ", "leave it out, because ")
            return f"{spec} has no {name}; {written}" if answer != written else f"{spec} has no {name}; it is {answer}"
    close = difflib.get_close_matches(name, fields[spec], n=1)
    elsewhere = [other for other in fields if name in fields[other]]
    if not close and elsewhere:
        return f"{spec} has no {name}; it is a field of {elsewhere[0]}"
    for other, answers in BROUGHT.items():
        ours = next((answer for answer, names in answers.items() if name in names), None)
        if not close and ours and other != spec and "nothing" not in ours:
            return f"{spec} has no {name}; it is {ours} of {other}"
    instead = f"do you mean {close[0]}?" if close else f"it has {', '.join(fields[spec])}"
    return f"{spec} has no {name}; {instead}"
