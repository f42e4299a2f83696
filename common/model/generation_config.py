"""The base's generation config, in a form that transformers can save again.

Published files hold values that transformers reads with a warning and refuses to save, such as a temperature without
do_sample, and nothing keeps a file of somebody else from holding anything at all.
"""

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from common.process_state import without_generation_warnings
from common.sources.json_files import parse_json

GENERATION_CONFIG = "generation_config.json"
# Whether another field is valid depends on these, so they are looked at first.
_DECISIVE = ("do_sample", "num_beams", "return_dict_in_generate", "cache_implementation", "max_new_tokens")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DEFAULTS = {  # of the fields that are numbers or switches
    name: value
    for name, value in GenerationConfig._get_default_generation_params().items()
    if isinstance(value, int | float) and name != "early_stopping"  # which may be a text too
}

# These change no answer of one conversation: ids that other keys hold, memory, speed, and what a call returns.
_SAME_ANSWERS = {
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
    *("compile_config", "disable_compile", "continuous_batching_config", "num_return_sequences"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "use_mtp", "speculation_type", "renormalize_logits", "remove_invalid_values"),
    "max_length",  # of prompt and answer together, and a chat grows
}
_OFF_AT_ONE = {"num_beams", "num_beam_groups", "typical_p", "length_penalty", "encoder_repetition_penalty"}
_OFF_AT_ONE |= {"guidance_scale"}
_OFF_VALUES: tuple[Any, ...] = (None, False, 0, [], {}, "")


def read_generation_config(folder: Path | None, name: str, config: PretrainedConfig | None = None) -> GenerationConfig:
    """The generation config in the folder, without what transformers would not save. A line says what was left out.

    Without such a file: what `config` says of generation, or the default. name: of the model, for the line.
    """
    values: Any = {}
    path = None if folder is None else folder / GENERATION_CONFIG
    if path is None or not path.exists():
        if config is not None:
            values = GenerationConfig.from_model_config(config).to_dict()
            values.pop("_from_model_config", None)  # with it, unknown fields are left out
    else:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            values = None
        if not isinstance(values, dict):
            print(f"warning: {path} holds no JSON object: the defaults of transformers stand in for it")
            values = {}
    generation, left_out = keep_valid(values)
    if left_out:
        print(f"{name}: its generation config is used without {', '.join(left_out)}, which transformers would not save")
    return generation


def keep_valid(values: dict[str, Any]) -> tuple[GenerationConfig, list[str]]:
    """A config of the fields that are valid together, and the names of the others. Fields that are null stay out."""
    order = sorted(values, key=lambda name: _DECISIVE.index(name) if name in _DECISIVE else len(_DECISIVE))
    kept: dict[str, Any] = {}
    left_out = []
    with without_generation_warnings():  # of each field that is left out
        for name in order:
            if values[name] is None:
                continue
            if _is_valid(kept | {name: values[name]}):
                kept[name] = values[name]
            else:
                left_out.append(name)
        return GenerationConfig(**kept), sorted(left_out)


def changes_answers(name: str, value: Any) -> bool:
    """Whether a field changes the answers of a conversation. One that is not known does, unless it is off."""
    if name in _SAME_ANSWERS:
        return False
    return value not in _OFF_VALUES and not (name in _OFF_AT_ONE and value == 1)


def _is_valid(values: dict[str, Any]) -> bool:
    """Whether transformers would save and read these fields."""
    for name in _TOKEN_IDS:
        ids = values.get(name, 0)
        if not all(type(index) is int and index >= 0 for index in (ids if isinstance(ids, list) and ids else [ids])):
            return False
    for name in _DEFAULTS.keys() & values.keys():
        switch = isinstance(_DEFAULTS[name], bool)
        if isinstance(values[name], bool) != switch or not isinstance(values[name], int | float):
            return False
    try:
        generation = GenerationConfig(**values)
        generation.validate(strict=True)
        parse_json(generation.to_json_string())  # NaN is no JSON
    except Exception:  # values of any type: transformers compares and calls them unchecked
        return False
    return True
