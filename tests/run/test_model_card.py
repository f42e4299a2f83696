"""README.md of a run: what others need to know of an adapter, and nothing of the machine that trained it."""

import contextlib
import getpass
import io
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub.repocard import metadata_load

from common.model.base_licence import KNOWN_LICENCES
from common.recipe import UserError
from common.run.folder import check_run_folder
from common.run.model_card import card_for, write_model_card
from common.run.training import train
from tests.conftest import ROOT
from tests.run.test_training import prepare


@pytest.fixture(scope="module")
def ended(small_llama, tmp_path_factory):
    """A run with held-out rows and drift, whose base and data lie in a home folder of their own."""
    from tests.conftest import small_recipe

    recipe = small_recipe(small_llama, tmp_path_factory.mktemp("card"))
    train(*prepare(replace(recipe, data=replace(recipe.data, drift_source=str(ROOT / "data/tiny/general.jsonl")))))
    return recipe


def edited(ended, tmp_path, change) -> tuple[dict, str]:
    """The card's head and its text after `change` of run.json's values."""
    run = json.loads((Path(ended.out) / "run.json").read_text())
    change(run)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    path = write_model_card(tmp_path / "run")
    return metadata_load(path), path.read_text()


def on_hub(name: str, commit: str = "a" * 40):
    def change(run: dict) -> None:
        run["recipe"]["model"]["name"], run["base"]["commit"] = name, commit

    return change


def test_a_run_leaves_a_card_with_what_it_did(ended):
    text, run = (Path(ended.out) / "README.md").read_text(), json.loads((Path(ended.out) / "run.json").read_text())
    head, metrics = yaml.safe_load(text.split("---")[1]), run["metrics"]
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-generation" and "qlora" in head["tags"]
    assert f"{metrics['eval_loss_before']:.4f} before and {metrics['eval_loss']:.4f} after training" in text
    assert f"100 texts of `general.jsonl`: loss {run['drift']['base_loss']:.2f} before" in text
    assert "| data | `chats.jsonl` |" in text and "rank 4, alpha 8" in text
    assert "| learning rate | 0.005 at its peak, cosine" in text


def test_nothing_of_the_machine_is_in_the_card(ended):
    text = (Path(ended.out) / "README.md").read_text()
    places = (str(Path(ended.model.name).parent), str(Path(ended.out).parent), str(Path.home()), str(ROOT), "/tmp")
    for name in (*places, getpass.getuser(), socket.gethostname()):
        assert name not in text
    assert f"a model in a folder `{Path(ended.model.name).name}`" in text
    assert "base_model" not in text.split("---")[1] and "datasets" not in text.split("---")[1]


def test_the_example_of_use_runs(ended, monkeypatch):
    text = (Path(ended.out) / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(Path(ended.model.name).parent)  # "your copy of the base" is the folder of that name
    code = card_for(code, ended.out)
    assert f'ADAPTER = "{ended.out}"' in code
    values: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code.replace("max_new_tokens=200", "max_new_tokens=2"), values)
    loaded = {name: value for name, value in values["model"].named_parameters() if "lora_B" in name}
    assert loaded and any(value.any() for value in loaded.values())


def test_a_base_and_data_of_the_hub_are_named_by_their_ids(ended, tmp_path):
    def change(run: dict) -> None:
        on_hub("meta-llama/Meta-Llama-3-8B-Instruct")(run)
        run["recipe"]["data"] |= {"source": "", "sources": [["owner/set", 0.9], ["'/home/me/own rows.jsonl'", 0.1]]}

    head, text = edited(ended, tmp_path, change)
    assert head["base_model"] == "meta-llama/Meta-Llama-3-8B-Instruct" and head["license"] == "llama3"
    assert head["datasets"] == ["owner/set"]
    assert "| data | `owner/set`, `own rows.jsonl` |" in text and "/home/me" not in text
    assert (
        f'revision="{"a" * 40}"' in text and "Licence of the base: llama3 (https://huggingface.co/meta-llama/" in text
    )


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("~/data/a.jsonl /mnt/me/b.jsonl", "a.jsonl, b.jsonl"),
        ("/mnt/me/*.jsonl", "*.jsonl"),
        ("../me/chats.csv.gz", "chats.csv.gz"),
        ("owner/set", "owner/set"),
    ],
)
def test_files_are_named_without_their_folders(ended, tmp_path, source, name):
    def change(run: dict) -> None:
        run["recipe"]["data"]["source"] = source

    assert f"| data | `{name}` |" in edited(ended, tmp_path, change)[1]


def test_a_snapshot_of_the_hubs_cache_is_a_folder(ended, tmp_path):
    head, text = edited(ended, tmp_path, on_hub(f"/home/me/.cache/models--a--b/snapshots/{'a' * 40}"))
    assert "base_model" not in head and "/home/me" not in text and 'revision="' not in text


def test_a_licence_that_is_not_known_is_left_to_the_bases_page(ended, tmp_path):
    head, text = edited(ended, tmp_path, on_hub("owner/model"))
    assert "license" not in head and "Licence of the base: see its page, https://huggingface.co/owner/model." in text


def test_a_run_without_held_out_rows_tells_its_training_loss(ended, tmp_path):
    def change(run: dict) -> None:
        run["metrics"] |= {"eval_loss_before": None, "eval_loss": None, "first_loss": 2.5, "last_loss": 1.25}
        run["drift"] = None

    text = edited(ended, tmp_path, change)[1]
    assert "No rows were held out. Training loss, in nats a token: 2.5000 in the first step, 1.2500" in text
    assert "Off the task" not in text


def test_the_base_of_every_recipe_has_a_licence():
    configs = {path.stem.replace("--", "/") for path in (ROOT / "models" / "configs").glob("*.json")}
    assert configs <= KNOWN_LICENCES.keys()


def test_a_readme_alone_is_no_run_and_one_beside_a_run_is_its_own(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no run .README.md."):
        check_run_folder(tmp_path, "overwrite")
    (tmp_path / "run.json").write_text("{}")
    assert check_run_folder(tmp_path, "overwrite") == {"README.md", "run.json"}


def test_a_run_of_another_version_is_one_line(tmp_path):
    (tmp_path / "run.json").write_text('{"recipe": {}}')
    with pytest.raises(UserError, match="is of another version, or damaged"):
        write_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
