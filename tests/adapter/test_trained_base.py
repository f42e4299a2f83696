"""Whatever reads the base after a run reads the one that was trained, or says that it has changed."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from common.adapter.find import find_adapter
from common.adapter.trained_base import find_trained_base
from common.cli import run_command
from common.machine.disk import sha256_of
from common.recipe import Recipe, UserError
from common.run.training import train
from tests.conftest import small_recipe
from tests.run.test_training import prepare

COMMANDS = {
    "merge": ["--to", "merged"],
    "export": ["--quant", "f16", "--to", "model.gguf"],
    "chat": ["--prompt", "Hello"],
    "eval": ["--samples", "0"],
}


@pytest.fixture(scope="module")
def run_of_own_base(small_llama, tmp_path_factory) -> Recipe:
    """A run that has ended, on a base that no other test reads."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(small_llama, folder / "base")
    recipe = small_recipe(folder / "base", folder)
    recipe = replace(recipe, train=replace(recipe.train, max_steps=1, sample_answers=0))
    Path(recipe.out).mkdir()
    train(*prepare(recipe))
    return recipe


@pytest.fixture
def base(run_of_own_base) -> Iterator[Path]:
    """The folder of the base, which is afterwards as it was."""
    folder = Path(run_of_own_base.model.name)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    yield folder
    for path in folder.iterdir():
        path.unlink()
    for path, content in kept.items():
        path.write_bytes(content)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_run_json_has_the_hash_of_each_file_of_the_base(run_of_own_base, base):
    recorded = json.loads((Path(run_of_own_base.out) / "run.json").read_text())["base"]
    names = ("model.safetensors", "config.json", "tokenizer.json")
    assert recorded == {"sha256": {name: sha256_of(base / name) for name in names}, "commit": None}
    assert find_trained_base(find_adapter(run_of_own_base)) == base


@pytest.mark.parametrize("command", COMMANDS)
def test_another_base_than_was_trained_is_refused_by(run_of_own_base, base, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    flip_a_bit(base / "model.safetensors")
    assert run_command(command, "x", run_of_own_base, COMMANDS[command]) == 2
    out = run_of_own_base.out
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {base} is not what the run in {out} was trained on: model.safetensors changed since. Bring it back, "
        f'or train again (to use it all the same, remove "base" from {out}/run.json)'
    )
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda base: (base / "config.json").write_text((base / "config.json").read_text() + " "), "config.json"),
        (lambda base: flip_a_bit(base / "tokenizer.json"), "tokenizer.json"),
        (lambda base: (base / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
    ids=["config", "tokenizer", "no tokenizer"],
)
def test_the_file_that_changed_is_named(run_of_own_base, base, change, named):
    change(base)
    with pytest.raises(UserError, match=f"was trained on: {named} changed since"):
        find_trained_base(find_adapter(run_of_own_base))


def test_without_a_record_nothing_is_compared(run_of_own_base, base, tmp_path):
    flip_a_bit(base / "model.safetensors")
    shutil.copytree(run_of_own_base.out, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    run = json.loads(path.read_text())
    del run["base"]
    path.write_text(json.dumps(run))
    assert find_trained_base(find_adapter(replace(run_of_own_base, out=str(tmp_path / "run")))) == base


def test_a_base_of_the_hub_is_the_commit_that_was_trained(run_of_own_base, tmp_path):
    """The main branch may have moved on since."""
    shutil.copytree(run_of_own_base.out, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    run = json.loads(path.read_text())
    run["base"]["commit"] = "c" * 40
    path.write_text(json.dumps(run))
    assert find_adapter(replace(run_of_own_base, out=str(tmp_path / "run"))).recipe.model.revision == "c" * 40
