import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from common.recipe import ModelSpec
from common.run.artefacts import save_adapter
from common.run.folder import prepare_run_folder
from common.run.training import train
from tests.conftest import ARCHITECTURES
from tests.model.test_loading import with_templates
from tests.run.test_training import prepare


def test_pitfall_4_the_saved_generation_config_stops_at_the_end_of_a_turn(recipe, small_llama, tokenizer):
    train(*prepare(recipe))
    saved = GenerationConfig.from_pretrained(recipe.out)
    assert tokenizer.convert_tokens_to_ids("<|end|>") in saved.eos_token_id
    assert saved.pad_token_id not in saved.eos_token_id


def test_a_run_on_a_model_with_several_templates_leaves_one_and_can_go_on(recipe, small_llama, tmp_path):
    spec, template = with_templates(small_llama, tmp_path / "m", ["default", "tool_use"], "tokenizer_config.json")
    recipe = replace(recipe, model=spec, train=replace(recipe.train, max_steps=1))
    train(*prepare(recipe))
    assert (Path(recipe.out) / "chat_template.jinja").read_text() == template
    assert "chat_template" not in json.loads((Path(recipe.out) / "tokenizer_config.json").read_text())
    prepare_run_folder(recipe.out, "resume")
    prepare_run_folder(recipe.out, "overwrite")


def test_an_adapter_is_written_without_what_peft_leaves_beside_it(recipe, tmp_path):
    model, *_ = prepare(recipe)
    (tmp_path / "adapter" / ".saving").mkdir(parents=True)  # of a killed run
    save_adapter(model, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    assert stored.keys() == trained.keys()
    assert all(torch.equal(stored[name], trained[name]) for name in stored)


def test_others_may_read_what_a_run_leaves_where_the_umask_says_so(finetuned):
    """Its checkpoints too; safetensors writes files that nobody else can read."""
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in finetuned[1].rglob("*") if path.is_file()]
    assert {"adapter_model.safetensors", "optimizer.pt", "report.html"} <= {path.name for path in files}
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {p.name: 0o666 & ~umask for p in files}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_of_the_adapter_has_the_name_and_shape_that_peft_gives_it(
    small_model, recipe, tmp_path, architecture
):
    """Beside a stock model with PEFT's own adapter, which PEFT itself saves: a server looks for these names."""
    folder = small_model(architecture)
    model, *_ = prepare(replace(recipe, model=ModelSpec(str(folder))))
    save_adapter(model, tmp_path / "ours")
    config = LoraConfig(r=recipe.lora.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path / "pefts")
    ours, pefts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "pefts"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: tensor.shape for n, tensor in pefts.items()}
    assert len(ours) == 2 * 7 * 2  # A and B of seven projections in two layers
