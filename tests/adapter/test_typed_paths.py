"""The commands on a run whose folder and base are typed as people type them."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from common.adapter.find import find_adapter
from common.cli import run_command
from common.machine.launch import ERROR_STATUS
from common.recipe import ModelSpec, UserError
from common.run.folder import check_run_folder


def run_on(recipe, command: str, *flags: str) -> int:
    return run_command(command, "small", replace(recipe, out=""), flags)


@pytest.mark.parametrize("out", ["run/", "./run", ".", "link/", "~/run/", "run/checkpoints/.."])
def test_a_merge_goes_beside_the_run_however_its_folder_is_typed(copy, tmp_path, monkeypatch, out):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "run" if out == "." else tmp_path)
    before = {path.name for path in (tmp_path / "run").iterdir()}
    assert run_on(copy, "merge", "--out", out) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == before
    merged = tmp_path / ("link-merged" if out == "link/" else "run-merged")
    assert (merged / "config.json").exists()
    check_run_folder(tmp_path / "run", "resume")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "link", merged.name}


@pytest.mark.parametrize(
    "typed", ["merge --to run/merged", "export --to ~/run/x.gguf", "merge --to link/../run/m", "eval --json run/e.json"]
)
def test_what_would_block_the_folder_of_the_run_is_refused(copy, tmp_path, monkeypatch, capsys, typed):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command, *flags = typed.split()
    assert run_on(copy, command, "--out", "run/", *flags) == ERROR_STATUS
    assert "lies in the folder of a run" in capsys.readouterr().err
    check_run_folder(tmp_path / "run", "resume")


def test_a_base_has_one_identity_however_it_is_typed(copy, tmp_path, monkeypatch):
    base = Path(copy.model.name)
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(base.parent)
    monkeypatch.setenv("HOME", str(base.parent))
    for name in (f"{base}/", base.name, f"./{base.name}/", f"~/{base.name}", os.path.relpath(base), tmp_path / "link"):
        adapter = find_adapter(replace(copy, model=ModelSpec(str(name))))
        assert adapter.recipe.model == copy.model
    for name in (str(base.parent), "owner/model", f"{base}-2"):
        with pytest.raises(UserError, match=f"was trained on {base}, and the recipe says {name}: take the recipe of "):
            find_adapter(replace(copy, model=ModelSpec(name)))
