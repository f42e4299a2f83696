"""A recipe's main called from Python or a notebook: the same run as the command's, and what goes wrong in a line."""

import importlib
import os
import signal
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from common.cli import run_command
from common.machine import slow_work
from common.recipe import Recipe, Stopped, UserError
from common.run.recipe_main import recipe_name, story
from common.run.training import train
from tests.conftest import ROOT
from tests.notebook_cell import OutStream
from tests.run.test_training import adapter, prepare


@pytest.fixture
def here(recipe, tmp_path, monkeypatch) -> Recipe:
    """A recipe of three steps that names no folder, in an empty folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return replace(recipe, out="", train=replace(recipe.train, sample_answers=0))


@story
def main(recipe: Recipe) -> None:
    train(*prepare(recipe))


def shown(error: BaseException) -> str:
    """What a notebook shows of an exception: IPython asks it for its lines, and else shows the traceback."""
    return "\n".join(error._render_traceback_())  # type: ignore[attr-defined]


def test_main_trains_into_the_default_folder_as_the_command_does(here, capsys):
    main(here)
    assert os.listdir() == ["outputs"] and os.listdir("outputs") == ["test-recipe-main"]
    assert run_command("finetune", "other", here, [], main) == 0  # as make finetune MODEL=other
    ours, of_command = adapter("outputs/test-recipe-main"), adapter("outputs/other")
    assert all(torch.equal(ours[name], tensor) for name, tensor in of_command.items())
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("machine: ") for line in lines) == 2  # neither called the other


def test_a_second_call_changes_nothing_until_it_says_what_to_do_with_the_first(here):
    main(here)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(UserError) as refused:
        main(here)
    assert "outputs/test-recipe-main already holds a run. From Python: main(replace(RECIPE, " in shown(refused.value)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    main(replace(here, existing_run="resume"))
    longer = replace(here, existing_run="overwrite", train=replace(here.train, max_steps=1))
    main(longer)
    assert adapter("outputs/test-recipe-main").keys() and not list(Path("outputs").rglob("checkpoint-3"))
    main(replace(longer, existing_run="refuse", out="outputs/mine"))
    assert sorted(os.listdir("outputs")) == ["mine", "test-recipe-main"]


def test_an_error_is_one_line_and_keeps_no_model_in_memory(here):
    models = []

    @story
    def failing(recipe: Recipe) -> None:
        model = nn.Linear(2, 2)
        models.append(weakref.ref(model))
        raise UserError(f"{recipe.out} is not what it should be")

    with pytest.raises(UserError) as caught:
        failing(here)
    assert shown(caught.value) == "error: outputs/test-recipe-main is not what it should be"
    assert models[0]() is None  # as a notebook keeps the error
    assert os.listdir("outputs") == []


def test_memory_that_is_used_up_is_a_line_too_and_a_fault_of_the_code_stays_what_it_is(here):
    @story
    def too_large(recipe: Recipe) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    @story
    def wrong(recipe: Recipe) -> None:
        raise ZeroDivisionError

    with pytest.raises(UserError, match="out of GPU memory. nvidia-smi shows what else uses the card"):
        too_large(here)
    with pytest.raises(ZeroDivisionError):
        wrong(here)


def test_an_interrupted_cell_says_what_goes_on(here, monkeypatch):
    """Jupyter's stop button sends the kernel SIGINT, which comes here in the middle of the first step."""
    step = torch.optim.AdamW.step

    def interrupt(*given, **named):
        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        signal.raise_signal(signal.SIGINT)
        return step(*given, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(Stopped) as stopped:
        main(here)
    line = 'stopped after step 1 of 3. Go on with: main(replace(RECIPE, existing_run="resume"))'
    assert shown(stopped.value) == line
    main(replace(here, existing_run="resume"))
    assert adapter("outputs/test-recipe-main")


def test_a_cell_shows_the_run_as_a_terminal_does(here, monkeypatch, capsys):
    """One line for the steps, in which each takes the place of the one before; lines that stay for what stays."""
    monkeypatch.setattr(slow_work, "CELL_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stdout", cell := OutStream())
    main(here)
    lines = cell.lines()
    assert all(f"step {step}/3 | loss" in cell.getvalue() for step in (1, 2, 3))
    kept = [line.split("loss")[0] for line in lines if line.startswith("step")]
    assert kept == ["step 0: held-out ", "step 3/3 | ", "step 3: held-out "]
    assert lines[-2].startswith("the run on a page: outputs/")
    assert "\033" not in cell.getvalue() and capsys.readouterr().err == ""


def test_a_copy_of_a_recipe_from_before_is_told_what_to_write_and_leaves_nothing(here):
    with pytest.raises(UserError, match="the run has no folder: write @story above the recipe's main"):
        train(*prepare(replace(here, out="elsewhere"))[:3], here, None)  # type: ignore[arg-type]
    assert os.listdir() == ["elsewhere"]


def test_a_recipe_has_its_files_name_and_a_cells_is_notebook(tmp_path):
    def made_in(file: Path | str) -> object:
        names: dict = {}
        exec(compile("def main(recipe): pass", str(file), "exec"), names)
        return names["main"]

    (tmp_path / "my_bot.py").touch()
    (tmp_path / "ipykernel_12").mkdir()
    (tmp_path / "ipykernel_12" / "3456.py").touch()  # as with JupyterLab's debugger
    assert (
        recipe_name(made_in(tmp_path / "my_bot.py")) == recipe_name(story(made_in(tmp_path / "my_bot.py"))) == "my-bot"
    )
    for cell in ("<ipython-input-3-0f>", "/tmp/ipykernel_1/2.py", tmp_path / "ipykernel_12" / "3456.py"):
        assert recipe_name(made_in(cell)) == "notebook"


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "recipes").glob("[a-z]*.py")])
def test_every_recipe_that_ships_can_be_called_from_python(name):
    shipped = importlib.import_module(f"recipes.{name}")
    assert recipe_name(shipped.main) == name.replace("_", "-")
    assert shipped.main.__wrapped__, "write @story above its main"


def test_a_recipe_that_is_imported_imports_no_torch():
    """The decorator runs at import; a mistyped flag is refused at once."""
    code = "import sys, recipes.llama3_8b; sys.exit('torch' in sys.modules)"
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0
