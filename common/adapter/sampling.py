"""Says a generation config in llama.cpp's words, which are ollama's too: how answers are sampled, and what is lost."""

from collections.abc import Callable
from typing import Any

from gguf import GGUFWriter

# The values of transformers where the config has none (GenerationConfig._get_default_generation_params). llama.cpp has
# the same names and other defaults, so each is written.
_DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
_TRANSLATED = {"do_sample", "repetition_penalty", "eos_token_id", *_DRAWN}
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
        if name in _TRANSLATED or name in _SAME_ANSWERS or name in also:
            continue
        if value not in _OFF_VALUES and not (name in _OFF_AT_ONE and value == 1):
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
