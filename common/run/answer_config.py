"""The part of a generation config that answers can use here, where one token is drawn after another.

A base's generation_config.json is for all that transformers can do: beams, a penalty for what was said, forced words.
Chat and sample answers leave out what they cannot do, and say so. What is saved keeps it.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

from common.model.generation_config import changes_answers

# What transformers makes of a field, called with the tokens up to here and the scores of the next one.
_OPERATORS: dict[str, Callable[[Any], Any]] = {
    "temperature": processors.TemperatureLogitsWarper,
    "top_k": processors.TopKLogitsWarper,
    "top_p": processors.TopPLogitsWarper,
    "top_h": processors.TopHLogitsWarper,
    "min_p": processors.MinPLogitsWarper,
    "typical_p": processors.TypicalLogitsWarper,
    "epsilon_cutoff": processors.EpsilonLogitsWarper,
    "eta_cutoff": processors.EtaLogitsWarper,
    "repetition_penalty": processors.RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": processors.NoRepeatNGramLogitsProcessor,
    "bad_words_ids": processors.NoBadWordsLogitsProcessor,
    "sequence_bias": processors.SequenceBiasLogitsProcessor,
    "suppress_tokens": processors.SuppressTokensLogitsProcessor,
    "begin_suppress_tokens": lambda ids: processors.SuppressTokensAtBeginLogitsProcessor(ids, 1),
    "max_time": criteria.MaxTimeCriteria,
}
# Valid, as common.model.generation_config says; and what whoever wants an answer says with each call.
_LEFT_ALONE = ("do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "use_cache", "max_length")

_OF_DRAWING = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# For transformers' generate, which warns of these in a model's own generation config unless they are None.
GREEDY: dict[str, Any] = {"do_sample": False, **dict.fromkeys(_OF_DRAWING)}


def fit_to_answers(
    generation: GenerationConfig, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Arguments of generate that switch off, or mend, what answers cannot use. A line names what changes them, once.

    config: of the model, for the size of its vocabulary.
    """
    given = {name: value for name, value in vars(generation).items() if value is not None and not name.startswith("_")}
    known, defaults = vars(GenerationConfig()), generation._get_default_generation_params()
    arguments: dict[str, Any] = {"max_new_tokens": None}  # max_length says it; transformers warns of both
    if given.get("temperature") == 0:
        arguments |= GREEDY
    left_out = []
    for name in sorted(given.keys() & known.keys() - arguments.keys() - set(_LEFT_ALONE)):
        value = given[name]
        possible = [value, float(value)] if type(value) is int else [value]  # a penalty of 2 must be 2.0
        if name in _OPERATORS or name == "stop_strings":
            used = next((v for v in possible if _is_usable(name, v, config.vocab_size, tokenizer)), None)
        else:
            used = defaults.get(name)
        if used is not value:
            arguments[name] = used
        if used != value and changes_answers(name, value):
            left_out.append(name)
    if left_out:
        _say_left_out(", ".join(left_out))
    return arguments


def _is_usable(name: str, value: Any, vocabulary: int, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether transformers' operator for this field takes the value, and leaves a token to draw."""
    operator = _OPERATORS.get(name) or partial(criteria.StopStringCriteria, tokenizer)
    is_text = isinstance(value, str | list) and bool(value) and all(value)  # an empty text is the end of any
    if name == "stop_strings" and not is_text:
        return False
    try:
        scores = operator(value)(torch.ones((1, 1), dtype=torch.long), torch.zeros((1, vocabulary)))
    except Exception:  # of a value of any type
        return False
    return bool(torch.isfinite(scores).any())


@cache  # once in a process, which may generate many times
def _say_left_out(names: str) -> None:
    print(f"answers here are generated without {names} of the generation config, which is saved whole")
