"""A trained adapter on its base gives what plain PEFT gives."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from common.adapter.find import find_adapter
from common.adapter.load import load_trained, trained_tokenizer
from common.model.loading import load_4bit
from common.recipe import LoraSpec, ModelSpec, UserError
from tests.conftest import ARCHITECTURES, FP32

IDS = torch.arange(5, 45)[None]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "lora", [LoraSpec(rank=4, alpha=8), LoraSpec(rank=4, alpha=8, dora=True)], ids=["lora", "dora"]
)
def test_a_loaded_adapter_gives_the_logits_of_plain_peft_and_off_those_of_the_base(adapted, architecture, lora):
    recipe = adapted(architecture, lora)
    model = load_trained(find_adapter(recipe))
    base = load_4bit(recipe.model, FP32).eval()
    with torch.no_grad():
        plain_base = base(IDS).logits
        plain = PeftModel.from_pretrained(base, recipe.out).eval()(IDS).logits
        assert torch.allclose(model(IDS).logits, plain, atol=1e-4)
        with model.disable_adapter():
            assert torch.allclose(model(IDS).logits, plain_base, atol=1e-4)
    assert not torch.allclose(plain, plain_base, atol=1e-2)


def test_generation_stops_where_the_run_says(finished):
    model = load_trained(find_adapter(finished))
    assert model.generation_config.eos_token_id == [2]
    assert trained_tokenizer(find_adapter(finished)).chat_template


def test_an_adapter_from_elsewhere_needs_no_run_json(copy):
    (Path(copy.out) / "run.json").unlink()
    for name in ("tokenizer.json", "generation_config.json"):
        (Path(copy.out) / name).unlink()
    adapter = find_adapter(copy)
    assert adapter.run == {} and adapter.dtype is None
    assert load_trained(adapter) is not None
    assert trained_tokenizer(adapter).vocab_size


def test_an_adapter_that_does_not_fit_the_base_names_what_does_not(copy, small_model):
    other = small_model("llama", hidden_size=32)
    for name in ("adapter_config.json", "run.json"):
        path = Path(copy.out) / name
        path.write_text(path.read_text().replace(copy.model.name, str(other)))
    run = json.loads((Path(copy.out) / "run.json").read_text())
    (Path(copy.out) / "run.json").write_text(json.dumps(run | {"base": None}))  # of a version that did not record it
    with pytest.raises(UserError, match="does not fit .*: base_model.* is 4x128, and the base needs|is .*and the base"):
        load_trained(find_adapter(replace(copy, model=ModelSpec(str(other)))))


def test_a_base_that_is_not_there_is_one_line(copy, tmp_path):
    gone = str(tmp_path / "gone")
    for name in ("adapter_config.json", "run.json"):
        path = Path(copy.out) / name
        path.write_text(path.read_text().replace(copy.model.name, gone))
    with pytest.raises(UserError, match="there is no folder"):
        load_trained(find_adapter(replace(copy, model=ModelSpec(gone))))
