"""An adapter made elsewhere is two files: all else comes from its base, and answers end with the turn."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer, GenerationConfig

from common.adapter.find import find_adapter
from common.adapter.load import load_trained, trained_tokenizer
from common.adapter.merge import MergedWeights, write_merged
from common.cli import run_command
from common.recipe import Recipe


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


@pytest.fixture(scope="module")
def base(small_llama, tmp_path_factory) -> Path:
    """A base whose own end of text is not the end of its template's turns, as those of Llama 3 and Qwen."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(small_llama, folder)
    change(folder / "config.json", eos_token_id=0)
    change(folder / "generation_config.json", eos_token_id=0, pad_token_id=None)
    change(folder / "tokenizer_config.json", eos_token="<pad>", pad_token="<s>")
    return folder


@pytest.fixture
def elsewhere(adapted, base, tmp_path) -> Recipe:
    recipe = adapted("llama", base=base)
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(Path(recipe.out) / name, folder / name)
    return replace(recipe, out=str(folder))


def merged(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Merges into the folder. Returns the generation config that lies there."""
    folder.mkdir()
    write_merged(MergedWeights(find_adapter(recipe)), folder)
    return json.loads((folder / "generation_config.json").read_text())


def test_chat_and_evaluation_end_with_the_turn(elsewhere):
    assert load_trained(find_adapter(elsewhere)).generation_config.eos_token_id == [0, 2]


def test_the_merged_folder_is_whole(elsewhere, tmp_path):
    generation = merged(elsewhere, tmp_path / "merged")
    assert generation["eos_token_id"] == [0, 2]
    GenerationConfig.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == trained_tokenizer(find_adapter(elsewhere)).chat_template
    assert tokenizer("I will.")["input_ids"]


@pytest.mark.parametrize("quant", ["f16"])
def test_the_export_has_the_bases_tokenizer_and_both_ends(elsewhere, tmp_path, capsys, quant):
    target = tmp_path / "bot"
    assert run_command("export", "x", elsewhere, ["--format", "ollama", "--quant", quant, "--to", str(target)]) == 0
    text = (target / "Modelfile").read_text()
    assert 'PARAMETER stop "<pad>"' in text and 'PARAMETER stop "<|end|>"' in text
    facts = {n: f.contents() for n, f in gguf.GGUFReader(next(target.glob("*.gguf"))).fields.items()}
    assert facts["tokenizer.ggml.eos_token_id"] == 0 and facts["tokenizer.ggml.eot_token_id"] == 2
    assert "note:" not in capsys.readouterr().out


def test_a_base_without_a_generation_config_gets_one(elsewhere, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(elsewhere.model.name, folder)
    (folder / "generation_config.json").unlink()
    change(Path(elsewhere.out) / "adapter_config.json", base_model_name_or_path=str(folder))
    recipe = replace(elsewhere, model=replace(elsewhere.model, name=str(folder)))
    assert merged(recipe, tmp_path / "merged")["eos_token_id"] == [0, 2]


def test_the_template_of_the_recipe_is_the_only_one_in_the_merged_folder(elsewhere, tmp_path):
    """The base has its own in tokenizer_config.json, as many do."""
    folder, template = tmp_path / "base", tmp_path / "mine.jinja"
    shutil.copytree(elsewhere.model.name, folder)
    change(folder / "tokenizer_config.json", chat_template=(folder / "chat_template.jinja").read_text())
    (folder / "chat_template.jinja").unlink()
    template.write_text("{% for m in messages %}<|user|>{{ m.content }}<|assistant|>{% endfor %}")
    change(Path(elsewhere.out) / "adapter_config.json", base_model_name_or_path=str(folder))
    model = replace(elsewhere.model, name=str(folder), chat_template=str(template))
    generation = merged(replace(elsewhere, model=model), tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == template.read_text()
    assert "chat_template" not in json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    ends = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["<pad>", "<|assistant|>"])
    assert generation["eos_token_id"] == sorted(ends)


def rename_a_token(values: dict[str, Any]) -> None:
    token = next(token for token in values["added_tokens"] if token["content"] == "<|end|>")
    token["content"] = "<|im_end|>"
    values["model"]["vocab"]["<|im_end|>"] = values["model"]["vocab"].pop("<|end|>")


@pytest.mark.parametrize(
    ("edit", "kept"), [(lambda values: None, "<|end|>"), (rename_a_token, "<|im_end|>")], ids=["same", "other tokens"]
)
def test_a_tokenizer_beside_the_adapter_is_kept_where_it_has_other_tokens(
    elsewhere, tmp_path, edit: Callable[[dict[str, Any]], None], kept
):
    for path in Path(elsewhere.model.name).glob("*token*"):
        shutil.copyfile(path, Path(elsewhere.out) / path.name)
    path = Path(elsewhere.out) / "tokenizer.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    merged(elsewhere, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_ids_to_tokens(2) == kept


def test_a_generation_config_that_cannot_be_read_is_said_and_an_answer_still_stops(elsewhere, tmp_path, capsys):
    (Path(elsewhere.out) / "generation_config.json").write_text("[1")
    merged(elsewhere, tmp_path / "merged")
    assert "generation_config.json holds no JSON object" in capsys.readouterr().out
    assert 2 in json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]


def test_what_a_base_asks_for_is_in_the_modelfile_or_named(elsewhere, tmp_path, capsys):
    wishes = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.05, "min_p": 0.05, "max_new_tokens": 77}
    change(Path(elsewhere.out) / "generation_config.json", **wishes, no_repeat_ngram_size=3, eos_token_id=[0, 2, 3, 4])
    flags = ["--quant", "f16", "--to"]
    assert run_command("export", "x", elsewhere, ["--format", "ollama", *flags, str(tmp_path / "bot")]) == 0
    lines = (tmp_path / "bot" / "Modelfile").read_text().splitlines()
    for line in ("repeat_penalty 1.05", "repeat_last_n -1", "min_p 0.05", "temperature 0.7", "num_predict 77"):
        assert f"PARAMETER {line}" in lines
    said = capsys.readouterr().out
    assert "note: ollama has no parameter for this of the generation config: no_repeat_ngram_size=3\n" in said
    assert run_command("export", "x", elsewhere, [*flags, str(tmp_path / "x.gguf")]) == 0
    said = capsys.readouterr().out
    fourth = trained_tokenizer(find_adapter(elsewhere)).convert_ids_to_tokens(4)
    lost = f"eos_token_id {fourth}, max_new_tokens=77, no_repeat_ngram_size=3"
    assert f"note: GGUF has no words for this of the generation config: {lost}\n" in said
    facts = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "x.gguf").fields.items()}
    assert facts["tokenizer.ggml.eom_token_id"] == 3
    assert facts["general.sampling.penalty_repeat"] == pytest.approx(1.05)
    assert facts["general.sampling.min_p"] == pytest.approx(0.05) and facts["general.sampling.top_k"] == 50


def test_a_normalizer_is_noted_or_refused_before_anything_is_written(elsewhere, tmp_path, capsys):
    for path in Path(elsewhere.model.name).glob("*token*"):
        shutil.copyfile(path, Path(elsewhere.out) / path.name)
    to = ["--quant", "f16", "--to", str(tmp_path / "x.gguf")]
    change(Path(elsewhere.out) / "tokenizer.json", normalizer={"type": "Lowercase"})
    assert run_command("export", "x", elsewhere, to) == 2
    assert 'the tokenizer\'s normalizer cannot be exported to GGUF: {"type": "Lowercase"}' in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()
    change(Path(elsewhere.out) / "tokenizer.json", normalizer={"type": "NFC"})
    assert run_command("export", "x", elsewhere, to) == 0
    assert "note: llama.cpp does not compose characters (NFC)" in capsys.readouterr().out
