import json
import shutil

import pytest

from common.model.config import load_config
from common.recipe import ModelSpec, UserError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            '{"model_type": "gpt2"}',
            "is of type 'gpt2'; the recipes fine-tune llama, mistral, qwen2, qwen3, gemma3_text models",
        ),
        ("{", "is not a readable model config"),
        ("{}", "is not a readable model config"),
        (None, "has no config.json"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as error:
        load_config(ModelSpec(str(tmp_path)))
    assert message in str(error.value)


def test_code_in_a_model_folder_is_not_run(small_llama, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small_llama, folder)
    canary = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Config: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_config(ModelSpec(str(folder))).model_type == "llama"
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "vocabulary"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", 32, 4096, 128256),
        ("mistralai/Mistral-7B-Instruct-v0.3", 32, 4096, 32768),
        ("Qwen/Qwen3-14B", 40, 5120, 151936),
        ("Qwen/Qwen2.5-14B-Instruct", 48, 5120, 152064),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 30, 576, 49152),
    ],
)
def test_the_configs_of_the_shipped_models_need_no_network(monkeypatch, name, layers, hidden, vocabulary):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_config(ModelSpec(name))
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (layers, hidden, vocabulary)
    assert config.head_dim == (64 if hidden == 576 else 128)
    assert load_config(ModelSpec(name, weights="random", layers=2)).num_hidden_layers == 2


def test_the_config_that_came_with_the_weights_wins_over_the_shipped_one(small_llama):
    spec = ModelSpec("meta-llama/Meta-Llama-3-8B-Instruct")
    assert load_config(spec, small_llama).hidden_size == 64
