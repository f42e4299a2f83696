"""Whatever a base's generation config holds, chat and sample answers use it, or leave it out and say so."""

import logging

import pytest

from common.adapter.chat import Chat, Sampling
from common.model.generation_config import keep_valid
from common.model.loading import load_4bit, load_tokenizer
from common.model.lora import attach_lora
from common.recipe import LoraSpec, ModelSpec
from common.run.answer_config import _say_left_out
from common.run.generation import generate
from common.run.prompts import load_prompts
from tests.conftest import FP32, TINY

TEA = "Start a tea timer, 1 minute."
ANSWER = "The timer for the tea is set to 1 minute."
DRAWN = {"do_sample": True, "temperature": 1e-6}  # draws the most likely token, unless another field says otherwise

LEFT_OUT = {
    "num_beams": {"num_beams": 3},
    "beam fields": {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True},
    "beam groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 50},
    "dola_layers": {"dola_layers": "high"},
    "force_words_ids": {"force_words_ids": [[5]], "num_beams": 2},
    "constraints": {"constraints": [1], "num_beams": 2},
    "forced_eos_token_id": {"forced_eos_token_id": 3},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "guidance_scale": {"guidance_scale": 2.0},
    "watermarking_config": {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 2.0}},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 1.5]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "token_healing": {"token_healing": True},
    "top_k below zero": DRAWN | {"top_k": -1},
    "temperature below zero": DRAWN | {"temperature": -0.5},
    "top_p above one": DRAWN | {"top_p": 1.5},
    "min_p above one": DRAWN | {"min_p": 2.0},
    "repetition_penalty of zero": {"repetition_penalty": -1.0},
    "bad_words_ids outside the vocabulary": {"bad_words_ids": [[99999]]},
    "bad_words_ids of text": {"bad_words_ids": ["tea"]},
    "suppress_tokens, all": {"suppress_tokens": list(range(4096))},
    "stop_strings, a number": {"stop_strings": 5},
    "stop_strings, an object": {"stop_strings": {"a": 1}},
    "stop_strings, one empty": {"stop_strings": ["tea", ""]},
    "min_new_tokens": {"min_new_tokens": 2},
    "min_length": {"min_length": 900},
    "max_time, a text": {"max_time": "3"},
}
SILENT = {  # no answer changes
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "is_assistant": {"is_assistant": True, "num_assistant_tokens": 5},
    "use_mtp": {"use_mtp": True},
    "num_return_sequences": DRAWN | {"num_return_sequences": 3, "top_k": 1},
    "return_dict_in_generate": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "cache_implementation": {"cache_implementation": "static"},
    "quantized cache": {"cache_implementation": "quantized"},
    "paged cache": {"cache_implementation": "paged"},
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "use_cache": {"use_cache": False},
    "max_length": {"max_length": 3},
    "max_new_tokens": {"max_new_tokens": 2},
    "off": {"top_k": 0, "stop_strings": [], "bad_words_ids": [], "sequence_bias": [], "no_repeat_ngram_size": 0}
    | DRAWN,
    "temperature 0": {"do_sample": True, "temperature": 0},
    "temperature 0.0": {"do_sample": True, "temperature": 0.0, "top_p": 0.5},
    "all that is drawn by": DRAWN | {"min_p": 0.1, "top_h": 0.9, "typical_p": 0.9, "eta_cutoff": 1e-4, "top_p": 0.5},
    "whole numbers": DRAWN | {"top_p": 1, "min_p": 0, "typical_p": 1, "repetition_penalty": 1, "length_penalty": 1},
    "a field of tomorrow": {"a_field_of_tomorrow": {"on": 1}},
    "another model's fields": {"chat_format": "chatml", "max_window_size": 6144},
}


@pytest.fixture(scope="module")
def model():
    return attach_lora(load_4bit(ModelSpec(str(TINY)), FP32), LoraSpec(rank=4, alpha=8)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSpec(str(TINY)))


@pytest.fixture(scope="module")
def answers(model, tokenizer):
    """answers(values): of the chat, and of the greedy generation, with this generation config; they go in pairs."""
    ends = model.generation_config.eos_token_id

    def ask(values: dict, sampling: Sampling = Sampling(max_new_tokens=8, seed=0)) -> tuple[str, str]:  # noqa: B008
        generation, _ = keep_valid({"eos_token_id": ends} | values)
        model.generation_config = generation
        saved = generation.to_dict()
        _say_left_out.cache_clear()
        shown = []
        chat = Chat(model, tokenizer, sampling)
        said = chat.ask(TEA, shown.append)
        assert "".join(shown) == said
        prompts = load_prompts("data/tiny/held_out.jsonl", tokenizer, limit=1)
        greedy = generate(model, tokenizer, prompts, max_new_tokens=4)
        assert generation.to_dict() == saved
        return said, greedy[0]

    return ask


@pytest.fixture(autouse=True)
def warnings_of_transformers(caplog):
    """The user sees none."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert caplog.get_records("call") == []


@pytest.fixture(scope="module")
def plain(answers):
    return answers({})


def beside_announcement(out: str) -> str:
    """What is printed beside the line before answers, which says how many there will be."""
    return "".join(line for line in out.splitlines(keepends=True) if not line.startswith("making 1 "))


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_answers_cannot_use_is_left_out_in_a_line(name, answers, plain, capfd):
    assert answers(LEFT_OUT[name]) == plain
    shown = capfd.readouterr()
    fine = DRAWN.items() | {("top_k", 50)}
    names = sorted(LEFT_OUT[name].keys() - {field for field, value in fine if LEFT_OUT[name].get(field) == value})
    said = f"answers here are generated without {', '.join(names)} of the generation config, which is saved whole\n"
    assert beside_announcement(shown.out) == said and not shown.err


@pytest.mark.parametrize("name", SILENT)
def test_what_changes_no_answer_is_not_mentioned(name, answers, plain, capfd):
    assert answers(SILENT[name]) == plain
    shown = capfd.readouterr()
    assert (beside_announcement(shown.out), shown.err) == ("", "")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stop_strings": "timer for"}, "The timer for"),
        ({"stop_strings": ["zzz", "timer"]}, "The timer"),
        ({"repetition_penalty": 9}, None),
        ({"max_time": 1e-9}, "The"),
        ({"bad_words_ids": None}, None),
        ({"suppress_tokens": None}, None),
        ({"begin_suppress_tokens": None}, None),
        ({"sequence_bias": None}, None),
    ],
)
def test_what_answers_can_use_is_used(values, said, answers, plain, tokenizer, capfd):
    the = tokenizer("The", add_special_tokens=False).input_ids[0]
    forms = {"bad_words_ids": [[the]], "sequence_bias": [[[the], -99.0]]}
    values = {name: value or forms.get(name, [the]) for name, value in values.items()}
    answer, _ = answers(values)
    assert answer == said or said is None and answer != plain[0]
    shown = capfd.readouterr()
    assert (beside_announcement(shown.out), shown.err) == ("", "")


def test_flags_come_before_the_generation_config(answers, plain):
    hot = {"do_sample": True, "temperature": 50.0, "top_k": 0}
    assert answers(hot)[0] != plain[0]
    assert answers(hot, Sampling(temperature=0, max_new_tokens=8)) == plain
    assert answers({"do_sample": True, "temperature": 0}, Sampling(temperature=50.0, max_new_tokens=8, seed=0)) != plain
