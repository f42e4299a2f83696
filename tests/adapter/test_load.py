import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from common.adapter.find import find_adapter
from common.adapter.load import load_trained, trained_tokenizer
from common.model.loading import load_4bit
from common.recipe import LoraSpec, ModelSpec, Recipe, UserError
from common.run.training import train
from tests.conftest import FP32
from tests.run.test_training import prepare

IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def finished(small_llama, tmp_path_factory) -> Recipe:
    """A recipe whose run has ended, with its run.json."""
    from common.recipe import DataSpec, TrainSpec
    from tests.conftest import TRAIN

    recipe = Recipe(
        model=ModelSpec(str(small_llama)),
        data=DataSpec(TRAIN, eval_rows=20),
        lora=LoraSpec(rank=4, alpha=8),
        train=TrainSpec(seq_len=128, rows_per_step=4, learning_rate=5e-3, max_steps=2),
        card_gib=None,
        out=str(tmp_path_factory.mktemp("finished") / "run"),
    )
    Path(recipe.out).mkdir()
    train(*prepare(recipe))
    return recipe


@pytest.fixture
def copy(finished, tmp_path) -> Recipe:
    shutil.copytree(finished.out, tmp_path / "run")
    return replace(finished, out=str(tmp_path / "run"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_adapter_comes_back_with_the_recipe_that_ran(finished):
    edited = replace(finished, train=replace(finished.train, seq_len=64), model=replace(finished.model, bits=16))
    adapter = find_adapter(edited)
    assert adapter.recipe.train.seq_len == 128
    assert adapter.recipe.model == finished.model
    assert adapter.recipe.lora == finished.lora
    assert adapter.dtype == torch.float32


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
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
        (lambda folder: change(folder / "adapter_config.json", peft_type="IA3"), "or something else: IA3"),
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


def test_an_adapter_that_does_not_fit_the_base_names_what_does_not(copy, small_model):
    other = small_model("llama", hidden_size=32)
    for name in ("adapter_config.json", "run.json"):
        path = Path(copy.out) / name
        path.write_text(path.read_text().replace(copy.model.name, str(other)))
    with pytest.raises(UserError, match="does not fit .*: base_model.* is 4x128, and the base needs|is .*and the base"):
        load_trained(find_adapter(replace(copy, model=ModelSpec(str(other)))))


def test_a_base_that_is_not_there_is_one_line(copy, tmp_path):
    gone = str(tmp_path / "gone")
    for name in ("adapter_config.json", "run.json"):
        path = Path(copy.out) / name
        path.write_text(path.read_text().replace(copy.model.name, gone))
    with pytest.raises(UserError, match="there is no folder"):
        load_trained(find_adapter(replace(copy, model=ModelSpec(gone))))
