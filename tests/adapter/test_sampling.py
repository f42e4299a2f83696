"""A generation config in llama.cpp's words: expressed, or named."""

import pytest
from transformers import GenerationConfig

from common.adapter.sampling import translate_sampling, untranslated


def test_what_is_drawn_has_every_value_of_transformers():
    drawn = {"do_sample": True, "temperature": 0.7, "min_p": 0.05}
    expected = {"repeat_penalty": 1.0, "temperature": 0.7, "top_k": 50, "top_p": 1.0, "min_p": 0.05}
    assert translate_sampling(drawn) == expected


def test_the_penalty_is_of_the_whole_context_also_where_nothing_is_drawn():
    greedy = translate_sampling({"repetition_penalty": 1.05, "temperature": 0.7})
    assert greedy == {"repeat_penalty": 1.05, "repeat_last_n": -1, "temperature": 0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_repeat_ngram_size", 1),
        ("typical_p", 0.9),
        ("num_beams", 4),
        ("suppress_tokens", [1, 2]),
        ("guidance_scale", 1.5),
        ("exponential_decay_length_penalty", [15, 1.6]),
        ("a_field_of_tomorrow", "on"),
    ],
)
def test_what_changes_answers_and_has_no_word_is_named(name, value):
    assert untranslated({"temperature": 0.7, name: value}) == [f"{name}={value}"]


def test_what_is_off_is_not_named():
    defaults = GenerationConfig._get_default_generation_params()
    assert untranslated(defaults) == []
    assert untranslated(GenerationConfig(eos_token_id=2, bos_token_id=1, pad_token_id=0).to_dict()) == []
