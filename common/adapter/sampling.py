"""Says a generation config in llama.cpp's words, which are ollama's too: how answers are sampled, and what is lost."""

from collections.abc import Callable
from typing import Any

from gguf import GGUFWriter

from common.model.generation_config import changes_answers

# The values of transformers where the config has none (GenerationConfig._get_default_generation_params). llama.cpp has
# the same names and other defaults, so each is written.
_DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
_TRANSLATED = {"do_sample", "repetition_penalty", "eos_token_id", *_DRAWN}


def translate_sampling(values: dict[str, Any]) -> dict[str, float | int]:
    """The values of a generation config under llama.cpp's names."""
    penalty = values.get("repetition_penalty")
    sampling: dict[str, float | int] = {"repeat_penalty": 1.0 if penalty is None else penalty}
    if sampling["repeat_penalty"] != 1:
        sampling["repeat_last_n"] = -1  # of the whole context, as in transformers
    if not values.get("do_sample"):
        return sampling | {"temperature": 0}
    return sampling | {name: values[name] if values.get(name) is not None else _DRAWN[name] for name in _DRAWN}


def untranslated(values: dict[str, Any], *, also: tuple[str, ...] = ()) -> list[str]:
    """The values of a generation config that change answers, and that translate_sampling has no name for.

    Each as "name=value". A value that is not known is among them, unless it is off. also: names that are expressed
    elsewhere.
    """
    lost = []
    for name, value in sorted(values.items()):
        if name not in _TRANSLATED and name not in also and changes_answers(name, value):
            lost.append(f"{name}={value}")
    return lost


def add_sampling(writer: GGUFWriter, generation: dict[str, Any]) -> None:
    """Writes how answers are drawn, which llama.cpp follows where a user says nothing else."""
    add: dict[str, Callable[[Any], None]] = {
        "temperature": writer.add_sampling_temp,
        "top_k": writer.add_sampling_top_k,
        "top_p": writer.add_sampling_top_p,
        "min_p": writer.add_sampling_min_p,
        "repeat_penalty": writer.add_sampling_penalty_repeat,
        "repeat_last_n": writer.add_sampling_penalty_last_n,
    }
    for name, value in translate_sampling(generation).items():
        add[name](value)
