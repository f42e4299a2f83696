import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.recipe import ModelSpec, UserError
from common.run.final_save import write_optional
from common.run.training import train
from tests.run.test_training import prepare


def test_a_base_with_an_invalid_generation_config_trains_and_leaves_all_files(recipe, small_llama, tmp_path, capsys):
    base = shutil.copytree(small_llama, tmp_path / "base")
    (base / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}')
    train(*prepare(replace(recipe, model=ModelSpec(str(base)))))
    out = capsys.readouterr().out
    assert out.count("its generation config is used without temperature, top_p") == 1
    saved = json.loads((Path(recipe.out) / "generation_config.json").read_text())
    assert 2 in saved["eos_token_id"] and "temperature" not in saved
    assert (Path(recipe.out) / "run.json").exists() and (Path(recipe.out) / "report.html").exists()


def test_an_optional_file_that_fails_takes_no_other_with_it(recipe, monkeypatch, capsys):
    """Everything that matplotlib and transformers draw and generate for the report fails."""

    def fail(*_, **__):
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    monkeypatch.setattr("transformers.GenerationMixin.generate", fail)
    train(*prepare(recipe))
    out, folder = capsys.readouterr().out, Path(recipe.out)
    assert "warning: loss.png could not be made (RuntimeError: no font at all); the rest is saved" in out
    assert "warning: sample answers could not be made" in out
    assert f"adapter, tokenizer, run.json, metrics.jsonl and README.md are in {folder}" in out
    assert json.loads((folder / "run.json").read_text())["samples"] == []
    assert (folder / "report.html").exists() and not (folder / "loss.png").exists()
    assert not list(folder.glob("*.writing")) and not (folder / ".saving").exists()


def test_what_the_interpreter_itself_stops_is_no_missing_file():
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_optional("report.html", stop)


def test_a_fallback_that_holds_something_is_refused_before_the_first_step(recipe, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="which is not empty; name a new folder"):
        train(*prepare(replace(recipe, fallback_out=str(tmp_path / "other"))))
    assert not (Path(recipe.out) / "metrics.jsonl").exists()
