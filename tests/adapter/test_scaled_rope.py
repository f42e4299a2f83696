"""An adapter that was trained with ModelSpec.rope_scaling is used with it, wherever it is used."""

import contextlib
import io
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common.adapter.chat import Chat
from common.adapter.find import find_adapter
from common.adapter.load import load_trained, trained_tokenizer
from common.cli import run_command
from common.model.start_adapter import find_start_adapter
from common.recipe import ModelSpec, Recipe, UserError
from common.run.training import train
from tests.conftest import small_recipe
from tests.run.test_training import prepare

SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48, "attention_factor": 1.3}
IDS = torch.randint(10, 900, (1, 150), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def stretched(small_model, tmp_path_factory) -> Recipe:
    """A recipe whose run has ended: rows of 128 tokens, its base has 64 positions."""
    base = small_model("qwen3", max_position_embeddings=64)
    recipe = small_recipe(base, tmp_path_factory.mktemp("stretched"))
    with pytest.raises(UserError, match="TrainSpec.seq_len is 128; .* has 64 positions. For longer rows: ModelSpec"):
        prepare(recipe)
    recipe = replace(recipe, model=ModelSpec(str(base), bits=16, rope_scaling=SCALING))
    train(*prepare(replace(recipe, train=replace(recipe.train, save_every=1))))
    return recipe


@pytest.fixture
def copied(stretched, tmp_path) -> Recipe:
    shutil.copytree(stretched.out, tmp_path / "run")
    return replace(stretched, out=str(tmp_path / "run"))


def unscaled(recipe: Recipe) -> Recipe:
    return replace(recipe, model=replace(recipe.model, rope_scaling=None))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def test_the_run_and_the_adapter_and_each_checkpoint_say_it(stretched):
    folder = Path(stretched.out)
    run = json.loads((folder / "run.json").read_text())
    assert run["recipe"]["model"]["rope_scaling"] == SCALING
    assert run["rope"]["max_position_embeddings"] == 192
    assert run["rope"]["rope_parameters"] == SCALING | {"rope_theta": 10_000.0}
    for path in (folder, *(folder / "checkpoints").glob("checkpoint-*")):
        assert json.loads((path / "adapter_config.json").read_text())["rope_scaling"] == SCALING


def test_a_recipe_without_it_gets_the_adapters_own(copied, capsys):
    expected = logits(load_trained(find_adapter(copied)))
    assert torch.equal(logits(load_trained(find_adapter(unscaled(copied)))), expected)
    (Path(copied.out) / "run.json").unlink()  # as it is downloaded from the hub
    capsys.readouterr()
    assert torch.equal(logits(load_trained(find_adapter(unscaled(copied)))), expected)
    assert f"was trained with ModelSpec(rope_scaling={SCALING}), and gets that" in capsys.readouterr().out
    bare = load_trained(find_adapter(unscaled(copied)))
    assert bare.config.max_position_embeddings == 192


def test_a_run_that_had_none_keeps_none_whatever_the_recipe_says_by_now(small_llama, tmp_path):
    recipe = small_recipe(small_llama, tmp_path)
    train(*prepare(recipe))
    now = replace(recipe, model=replace(recipe.model, rope_scaling={"rope_type": "linear", "factor": 2.0}))
    path = Path(recipe.out) / "run.json"
    run = json.loads(path.read_text())
    del run["recipe"]["model"]["rope_scaling"]  # of a version that did not have it
    path.write_text(json.dumps(run))
    assert find_adapter(now).recipe.model.rope_scaling is None


def test_an_adapter_and_a_run_that_say_different_things_are_refused(copied):
    path = Path(copied.out) / "adapter_config.json"
    other = json.loads(path.read_text()) | {"rope_scaling": SCALING | {"factor": 5.0}}
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match="adapter_config.json says rope_scaling .* and run.json beside it"):
        find_adapter(copied)
    path.write_text(json.dumps(other | {"rope_scaling": {"rope_type": "yarn"}}))
    with pytest.raises(UserError, match="adapter_config.json: rope_scaling needs factor and original_max_position_emb"):
        find_adapter(copied)


def test_plain_peft_names_it_and_the_cards_example_computes_the_same(stretched, monkeypatch):
    expected = logits(load_trained(find_adapter(stretched)))
    base = AutoModelForCausalLM.from_pretrained(stretched.model.name, dtype=torch.float32)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .'rope_scaling'. for class LoraConfig"):
        plain = PeftModel.from_pretrained(base, stretched.out).eval()
    assert (logits(plain) - expected).abs().max() > 0.01  # which is why it must be named
    text = (Path(stretched.out) / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("max_new_tokens=200", "max_new_tokens=2")
    monkeypatch.chdir(Path(stretched.model.name).parent)
    values: dict = {}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unexpected keyword arguments")
        exec(code.replace('ADAPTER = "."', f"ADAPTER = {stretched.out!r}"), values)
    torch.testing.assert_close(logits(values["model"]), expected, rtol=0, atol=1e-5)


def test_a_merged_model_in_plain_transformers_computes_the_same(copied, tmp_path, capsys):
    assert run_command("merge", "x", copied, ["--to", str(tmp_path / "merged")]) == 0
    assert "self-check: KL" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    expected = logits(load_trained(find_adapter(copied)))
    assert merged.config.max_position_embeddings == 192
    # The merged weights are rounded to bf16.
    ours, theirs = (values.double().log_softmax(-1) for values in (expected, logits(merged)))
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() < 1e-3


def test_a_chat_goes_as_far_as_the_scaled_positions(stretched):
    adapter = find_adapter(stretched)
    assert Chat(load_trained(adapter), trained_tokenizer(adapter)).positions == 192


def test_a_run_that_starts_from_it_needs_it_and_one_that_changes_it_says_so(copied, tmp_path, capsys):
    lora = replace(copied.lora, start_from=copied.out)
    with pytest.raises(UserError, match="was trained with rope_scaling, and the recipe has none: write ModelSpec"):
        find_start_adapter(lora, replace(copied.model, rope_scaling=None), str(tmp_path / "second"))
    longer = replace(copied.model, rope_scaling=SCALING | {"factor": 8.0})
    assert find_start_adapter(lora, longer, str(tmp_path / "second")) == Path(copied.out)
    prepare(replace(copied, model=longer, lora=lora, out=str(tmp_path / "second")))
    said = capsys.readouterr().out
    assert f"was trained with rope_scaling {SCALING}, and goes on with {longer.rope_scaling}" in said
