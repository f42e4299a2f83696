"""A base's generation_config.json may hold anything."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import GenerationConfig

from common.adapter.find import find_adapter
from common.adapter.load import trained_tokenizer
from common.adapter.tokenizer_files import write_tokenizer
from common.model.generation_config import keep_valid, read_generation_config

STRANGE = {
    "temperature without do_sample": ({"temperature": 0.9, "top_p": 0.6}, ["temperature", "top_p"]),
    "do_sample false": ({"do_sample": False, "top_k": 5, "min_p": 0.1}, ["min_p", "top_k"]),
    "arguments of generate": ({"streamer": 1, "logits_processor": []}, ["logits_processor", "streamer"]),
    "names of methods": ({"to_dict": 3, "validate": 4}, ["to_dict", "validate"]),
    "other types": ({"num_beams": "3", "eos_token_id": "</s>", "early_stopping": []}, None),
    "out of range": ({"max_new_tokens": -1, "pad_token_id": -1, "num_return_sequences": 4}, None),
    "no number": ({"do_sample": True, "temperature": float("nan")}, ["temperature"]),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_transformers_would_not_save_is_left_out(name, tmp_path):
    values, left_out = STRANGE[name]
    generation, names = keep_valid(values | {"bos_token_id": 1, "my_own": {"a": [1]}})
    assert names == (left_out or sorted(values))
    generation.max_length = 100  # as changed: transformers then saves what is valid alone
    generation.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again.bos_token_id == 1 and again.my_own == {"a": [1]}


@pytest.mark.parametrize("values", [{"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"eos_token_id": [2, 3]}])
def test_a_valid_config_stays_as_it_is(values, tmp_path, capsys):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    generation = read_generation_config(tmp_path, "base")
    assert values.items() <= generation.to_dict().items()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"", b"null"])
def test_a_file_that_is_no_json_object_stands_for_the_defaults(content, tmp_path, capsys):
    (tmp_path / "generation_config.json").write_bytes(content)
    assert not read_generation_config(tmp_path, "base").do_sample
    assert capsys.readouterr().out.count("holds no JSON object") == 1


@pytest.mark.parametrize("content", ["[1]", '{"temperature": 0.9, "top_p": 0.6, "max_new_tokens": -3}'])
def test_a_base_with_it_is_loaded_and_merged_in_its_mended_form(content, adapted, small_llama, tmp_path, capsys):
    base = shutil.copytree(small_llama, tmp_path / "base")
    (base / "generation_config.json").write_text(content)
    recipe = adapted(base=base)
    assert capsys.readouterr().out.count("generation config is used without" if "{" in content else "no JSON") == 1
    saved = json.loads((Path(recipe.out) / "generation_config.json").read_text())
    assert "temperature" not in saved and 2 in saved["eos_token_id"] or content == "[1]"
    (Path(recipe.out) / "generation_config.json").unlink()  # an adapter of elsewhere
    merged, adapter = tmp_path / "merged", find_adapter(recipe)
    merged.mkdir()
    write_tokenizer(adapter, base, trained_tokenizer(adapter), merged)
    assert "temperature" not in json.loads((merged / "generation_config.json").read_text())
