"""The adapter that a run left is found with its recipe, and what is wrong with it is one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.adapter.find import find_adapter
from common.adapter.load import load_trained
from common.recipe import UserError


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_adapter_comes_back_with_the_recipe_that_ran(finished):
    edited = replace(finished, train=replace(finished.train, seq_len=64), model=replace(finished.model, bits=16))
    adapter = find_adapter(edited)
    assert adapter.recipe.train.seq_len == 128
    assert adapter.recipe.model == finished.model
    assert adapter.recipe.lora == finished.lora
    assert adapter.dtype == torch.float32


def test_a_run_json_of_another_version_is_read(copy):
    path = Path(copy.out) / "run.json"
    run = json.loads(path.read_text())
    run["recipe"]["train"]["a field of tomorrow"] = 1
    del run["recipe"]["train"]["report_to"], run["recipe"]["model"]["chat_template"]
    path.write_text(json.dumps(run))
    assert find_adapter(copy).recipe.train == copy.train


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no folder .*: train first"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter .adapter_config.json is missing"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter .adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not the configuration of an adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "is not the configuration of an adapter"),
        (
            lambda folder: change(folder / "adapter_config.json", peft_type="IA3"),
            "an adapter of the type IA3, which is not LoRA",
        ),
        (lambda folder: change(folder / "adapter_config.json", modules_to_save=["lm_head"]), "more than LoRA"),
        (lambda folder: change(folder / "adapter_config.json", r="4"), "of an adapter: r is '4'"),
        (lambda folder: change(folder / "adapter_config.json", target_modules=5), "of an adapter: target_modules is 5"),
        (lambda folder: change(folder / "adapter_config.json", target_modules=["x"]), "does not fit|Target modules"),
        (
            lambda folder: change(folder / "adapter_config.json", base_model_name_or_path="other/base"),
            "was trained on other/base, and the recipe says",
        ),
        (lambda folder: (folder / "run.json").write_text("{"), "run.json is damaged"),
        (lambda folder: truncate(folder / "adapter_model.safetensors"), "is cut short"),
        (lambda folder: flip(folder / "adapter_model.safetensors"), "is damaged: it is not what the run wrote"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(copy, harm, message):
    harm(Path(copy.out))
    with pytest.raises(UserError, match=message) as error:
        load_trained(find_adapter(copy))
    assert "\n" not in str(error.value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
