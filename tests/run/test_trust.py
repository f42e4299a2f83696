"""Attacks: code in checkpoints, names that lead elsewhere, secrets in files. That in model folders: test_weights.py."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.cli import run
from common.machine.disk import remove_atomically
from common.machine.launch import ERROR_STATUS
from common.model.loading import load_4bit, load_tokenizer
from common.recipe import DataSpec, ModelSpec, UserError
from common.run import checkpoints
from common.run.training import train
from tests.conftest import FP32
from tests.run.test_faults import main
from tests.run.test_training import prepare


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_not_run_although_its_manifest_says_that_all_is_well(recipe, tmp_path, name):
    recipe = replace(recipe, train=replace(recipe.train, save_every=1, max_steps=3))
    train(*prepare(recipe))
    checkpoint = Path(recipe.out) / "checkpoints" / "checkpoint-2"  # the last one trains nothing
    remove_atomically(checkpoint.parent / "checkpoint-3")
    torch.save({"state": Canary(tmp_path / "canary")}, checkpoint / name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(checkpoint / name, weights_only=True)
    forged = checkpoint.parent / "forged"
    checkpoint.rename(forged)
    run_of = checkpoints.read_run_identity(forged)
    (forged / checkpoints.MANIFEST).unlink()
    checkpoints.commit_checkpoint(forged, checkpoint, run_of)
    with pytest.raises(UserError, match="holds a state that is more than tensors and numbers: no run of ours wrote it"):
        train(*prepare(replace(recipe, existing_run="resume")))
    assert not (tmp_path / "canary").exists()
    torch.load(checkpoint / name, weights_only=False)  # the attack is one
    assert (tmp_path / "canary").exists()


def test_pickled_weights_beside_safetensors_are_not_opened(small_model, tmp_path):
    folder = small_model("llama")
    torch.save(Canary(tmp_path / "canary"), folder / "pytorch_model.bin")
    load_4bit(ModelSpec(str(folder)), FP32)
    assert not (tmp_path / "canary").exists()


def test_a_chat_template_cannot_reach_python(small_model, tmp_path, capsys, recipe):
    """transformers runs templates in Jinja's sandbox; what it refuses is a row that cannot be used."""
    template = tmp_path / "escape.jinja"
    template.write_text(
        "{{ messages.__class__.__mro__[1].__subclasses__() }}"
        "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "canary") + "') }}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    )
    recipe = replace(recipe, model=replace(recipe.model, chat_template=str(template)))
    assert run(main, recipe, []) == ERROR_STATUS
    assert not (tmp_path / "canary").exists()
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/passwd.jsonl", "a/../../b", "x\x00y", "-rf", "$(touch canary)"]
)
def test_names_of_models_and_data_lead_nowhere_else(recipe, tmp_path, monkeypatch, name, capsys):
    """Nothing is written but into the output folder, whatever a source is called."""
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*")}
    for spec in (replace(recipe, data=DataSpec(name)), replace(recipe, model=ModelSpec(name))):
        try:
            assert run(main, spec, []) == ERROR_STATUS
        except ValueError as error:  # Python's own refusal of a NUL byte
            assert "null byte" in str(error) and "\x00" in name
    written = {path for path in tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(recipe.out) for path in written), written


def test_an_output_folder_that_is_a_link_to_something_else_is_refused(recipe, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    assert run(main, recipe, ["--out", str(tmp_path / "link"), "--overwrite"]) == ERROR_STATUS
    assert "holds something that is no run (letter.txt)" in capsys.readouterr().err
    assert (tmp_path / "home" / "letter.txt").read_text() == "mine"


def test_the_paths_of_this_machine_are_not_in_what_is_shared(recipe):
    """PEFT writes the folder of the base model into the adapter's config: ours is the name that the recipe gives."""
    train(*prepare(recipe))
    config = json.loads((Path(recipe.out) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == recipe.model.name
    assert str(Path(recipe.model.name).parent) not in (Path(recipe.out) / "README.md").read_text()  # PEFT's has it


def test_the_home_folder_is_found_where_it_is_typed_and_named_in_no_file(recipe, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(recipe.model.name, home / "base")
    shutil.copy(recipe.data.source, home / "chats.jsonl")
    shutil.copy(home / "base" / "chat_template.jinja", home / "template.jinja")
    spec = replace(recipe.train, save_every=2)
    typed = replace(recipe, model=ModelSpec("~/base/", chat_template="~/template.jinja"), train=spec)
    assert (
        run(main, replace(typed, data=DataSpec("~/chats.jsonl", eval_rows=20, drift_source=None)), ["--out", "~/run/"])
        == 0
    )
    files = [path for path in (home / "run").rglob("*") if path.is_file()]
    assert {"adapter_config.json", "run.json", "manifest.json"} <= {path.name for path in files}
    assert [path for path in files if str(home).encode() in path.read_bytes()] == []
    assert json.loads((home / "run" / "run.json").read_text())["recipe"]["out"] == "~/run"


def test_a_tokenizer_is_loaded_without_the_code_beside_it(small_model, tmp_path):
    folder = small_model("llama")
    (folder / "tokenization_evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'canary')!r})\n")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    path.write_text(json.dumps(config))
    try:
        load_tokenizer(ModelSpec(str(folder)))
    except UserError:
        pass
    assert not (tmp_path / "canary").exists()
