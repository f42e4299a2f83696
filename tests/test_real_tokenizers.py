"""The tokenizers that tests build are the real ones."""

import pytest

from tests.wheels import wheel

KNOWN = {
    "llama3": {
        "Hello world": [9906, 1917],
        "<|eot_id|>": [128009],
        "<|start_header_id|>": [128006],
        "2024": [2366, 19],
    },
    "qwen2_5": {"Hello world": [9707, 1879], "<|im_end|>": [151645], "2024": [17, 15, 17, 19]},
    "qwen3": {"Hello world": [9707, 1879], "<think>": [151667], "</think>": [151668]},
    "mistral_v1": {"Hello world": [22557, 1526], "</s>": [2]},
    "mistral_v3": {"Hello world": [23325, 2294], "[INST]": [3], "[/INST]": [4]},
    "tekken": {"Hello world": [22177, 4304], "[INST]": [3], "[/INST]": [4]},
    "smollm2": {"Hello world": [19556, 905], "<|im_start|>": [1], "<|im_end|>": [2]},
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_tokenizer_gives_the_models_ids(name, real_tokenizer):
    tokenizer = real_tokenizer(name)
    assert {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in KNOWN[name]} == KNOWN[name]


def test_what_needs_a_wheel_is_skipped_where_none_can_be_had(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(pytest.skip.Exception, match="no-such-package==1 cannot be downloaded: .*No matching"):
        wheel("no-such-package==1")
