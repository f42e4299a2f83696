"""Each part of a tokenizer is known to be what llama.cpp does, or noted, or refused by name."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from common.adapter.gguf_tokenizer import read_vocabulary
from common.adapter.tokenizer_json import read_text_rules
from common.recipe import UserError
from tests.adapter.test_gguf import cut, finished, sentencepiece, whole_words

NFC = {"type": "NFC"}
LOWERCASE = {"type": "Lowercase"}
PUNCTUATION = {"type": "Punctuation", "behavior": "Isolated"}


def edited(tokenizer: PreTrainedTokenizerFast, change: Callable[[dict[str, Any]], object]) -> PreTrainedTokenizerFast:
    """The same tokenizer with a change in its tokenizer.json."""
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    change(values)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)), bos_token="<s>", eos_token="<|end|>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def qwen() -> PreTrainedTokenizerFast:
    return cut("qwen2")


@pytest.fixture(scope="module")
def mistral() -> PreTrainedTokenizerFast:
    return sentencepiece("first")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(normalizer=LOWERCASE), 'normalizer cannot be exported to GGUF: {"type": "Lowercase"}'),
        (lambda v: v.update(normalizer={"type": "NFKC"}), "normalizer cannot be exported to GGUF"),
        (lambda v: v.update(normalizer={"type": "NFD"}), "normalizer cannot be exported to GGUF"),
        (
            lambda v: v.update(normalizer={"type": "Strip", "strip_left": True, "strip_right": False}),
            "normalizer cannot be exported to GGUF",
        ),
        (
            lambda v: v.update(normalizer={"type": "Sequence", "normalizers": [NFC, LOWERCASE]}),
            "normalizer cannot be exported to GGUF",
        ),
        (
            lambda v: v["pre_tokenizer"]["pretokenizers"].insert(0, PUNCTUATION),
            'cuts text like this cannot be exported to GGUF: {"type": "Sequence"',
        ),
        (lambda v: v["pre_tokenizer"]["pretokenizers"][0].update(invert=True), "cuts text like this"),
        (lambda v: v["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "cuts text like this"),
        (lambda v: v["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\w+"}), "cuts text like this"),
        (lambda v: v["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "cuts text like this"),
        (lambda v: v.update(pre_tokenizer=None), "cuts text like this"),
        (lambda v: v.update(decoder={"type": "Fuse"}), "decoder cannot be exported to GGUF"),
        (lambda v: v.update(decoder=None), "decoder cannot be exported to GGUF: null"),
        (lambda v: v["model"].update(dropout=0.1), "model.dropout cannot be exported to GGUF: 0.1"),
        (lambda v: v["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix cannot be exported"),
        (lambda v: v["added_tokens"][2].update(lstrip=True), r"the token <\|user\|> with lstrip cannot be exported"),
        (lambda v: v["added_tokens"][2].update(rstrip=True), r"the token <\|user\|> with rstrip cannot be exported"),
        (lambda v: v["added_tokens"][2].update(single_word=True), "with single_word cannot be exported to GGUF"),
        (lambda v: v["model"].update(byte_fallback=True), "no token for some of the 256 bytes"),
    ],
)
def test_what_byte_level_bpe_of_llama_cpp_does_not_do_is_refused(qwen, change, message):
    with pytest.raises(UserError, match=message) as refused:
        read_text_rules(edited(qwen, change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(normalizer=LOWERCASE), "normalizer cannot be exported to GGUF"),
        (lambda v: v["pre_tokenizer"].update(replacement="_"), "cuts text like this"),
        (lambda v: v.update(pre_tokenizer=None), "cuts text like this cannot be exported to GGUF: null"),
        (lambda v: v["model"].update(ignore_merges=True), "model.ignore_merges cannot be exported to GGUF: true"),
        (lambda v: v.update(decoder=None), "decoder cannot be exported to GGUF: null"),
        (lambda v: v["decoder"]["decoders"].append({"type": "CTC", "pad_token": "x", "cleanup": True}), "decoder"),
    ],
)
def test_what_bpe_of_sentencepiece_in_llama_cpp_does_not_do_is_refused(mistral, change, message):
    def add_defaults(values: dict[str, Any]) -> None:
        change(values)
        for part in (values["decoder"] or {"decoders": []})["decoders"]:
            if part["type"] == "CTC":
                part["word_delimiter_token"] = "|"

    with pytest.raises(UserError, match=message):
        read_text_rules(edited(mistral, add_defaults))


def test_an_added_token_that_a_normalizer_changes_is_refused():
    def change(values: dict[str, Any]) -> None:
        values["added_tokens"][3].update(normalized=True)

    with pytest.raises(UserError, match="the token .* with normalized cannot be exported to GGUF"):
        read_text_rules(edited(sentencepiece("normalizer"), change))
    read_text_rules(edited(sentencepiece("first"), change))  # it has no normalizer


def test_bytes_without_a_token_are_refused_where_another_token_stands_for_them(qwen):
    def change(values: dict[str, Any]) -> None:
        values["model"].update(unk_token="<pad>")
        del values["model"]["vocab"]["ÿ"]

    with pytest.raises(UserError, match="no token for 1 of the 256 bytes and writes <pad> for them"):
        read_text_rules(edited(qwen, change))


def test_words_that_stay_whole_are_refused_where_llama_cpp_would_merge(qwen):
    def keep_words(values: dict[str, Any]) -> None:
        values["model"].update(ignore_merges=True)

    def add_word(values: dict[str, Any]) -> None:
        keep_words(values)
        values["model"]["vocab"]["Hello"] = 1000

    read_text_rules(edited(qwen, keep_words))  # the merges make every token: it is the same
    with pytest.raises(UserError, match="model.ignore_merges cannot be exported to GGUF: true"):
        read_text_rules(edited(qwen, add_word))
    read_text_rules(whole_words())
    with pytest.raises(UserError, match="model.ignore_merges cannot be exported to GGUF: false"):
        read_text_rules(edited(whole_words(), lambda values: values["model"].update(ignore_merges=False)))


def test_composed_characters_and_additions_to_a_text_are_noted(qwen):
    def change(values: dict[str, Any]) -> None:
        values["normalizer"] = {"type": "Sequence", "normalizers": [NFC]}
        single = values["post_processor"]["single"]
        single.append({"SpecialToken": {"id": "<|end|>", "type_id": 0}})
        ends = {"id": "<|end|>", "ids": [values["model"]["vocab"]["<|end|>"]], "tokens": ["<|end|>"]}
        values["post_processor"]["special_tokens"]["<|end|>"] = ends

    assert read_text_rules(qwen)[1].notes == []
    adding, composing = read_text_rules(edited(qwen, change))[1].notes
    assert "does not compose characters (NFC)" in composing
    assert adding.startswith("the tokenizer adds <s>, <|end|> to a plain text")


def test_pairs_that_llama_cpp_joins_and_the_merges_do_not_are_noted(mistral):
    def change(values: dict[str, Any]) -> None:
        del values["model"]["merges"][3:5]

    assert read_text_rules(mistral)[1].notes == []
    (note,) = read_text_rules(edited(mistral, change))[1].notes
    assert note.startswith("llama.cpp joins 2 pairs of tokens that the tokenizer does not, such as")


def test_what_transformers_sets_for_each_call_is_no_matter(qwen):
    def change(values: dict[str, Any]) -> None:
        values["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}

    assert read_text_rules(edited(qwen, change))[1] == read_text_rules(qwen)[1]


def test_other_kinds_and_too_many_tokens_are_refused(tokenizer):
    words = finished(Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, "a")))
    with pytest.raises(UserError, match="of type WordLevel cannot be exported"):
        read_vocabulary(words, 1024)
    with pytest.raises(UserError, match="the tokenizer has .* tokens, and the model only 100"):
        read_vocabulary(tokenizer, 100)
