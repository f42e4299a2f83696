"""Keys by which a row or a message says whether an answer is to be learnt."""

from typing import Any

from common.sources.source_row import BadRow, readable

# OpenAI and mistral-finetune: weight. axolotl: train, training. ms-swift: loss. LLaMA-Factory: loss_weight.
# XTuner: output_with_loss. True or 1 learns, False or 0 does not; of masked it is the other way round.
LEARN_FLAGS = (
    "weight",
    "train",
    "training",
    "train_on_turn",
    "learn",
    "loss",
    "loss_weight",
    "loss_mask",
    "output_with_loss",
    "masked",
)
# axolotl's spans of an answer, and a flag that peers read both ways: 1 learns here, and does not learn there.
UNCLEAR_FLAGS = ("train_detail", "training_detail", "mask")
_TEXTS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def is_flag_text(value: Any) -> bool:
    """Returns whether the value is a flag as a text, as it is in a CSV file."""
    return isinstance(value, str) and value.strip().lower() in _TEXTS


def says_learn(name: str, value: Any) -> bool:
    """Returns whether an answer with this flag is to be learnt. Raises BadRow for a weight other than 0 and 1."""
    flag = _TEXTS[value.strip().lower()] if is_flag_text(value) else value
    if not isinstance(readable(flag), bool | int | float) or flag not in (0, 1):
        raise BadRow(
            f"{name!r} is {value!r:.40}; an answer is learnt or not, and weights other than 0 and 1 are not supported "
            "(if it is something else, rename the key)"
        )
    return bool(flag) != (name == "masked")


def refuse_unclear(name: str) -> None:
    if name == "mask":
        raise BadRow("'mask' can mean to learn the answer or not to; write train: true, or train: false")
    raise BadRow(f"{name!r} names parts of an answer to learn, and an answer is learnt whole or not at all")
