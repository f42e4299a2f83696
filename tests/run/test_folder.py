import pytest

from common.recipe import UserError
from common.run.folder import prepare_run_folder


@pytest.fixture
def old_run(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    return folder


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    assert prepare_run_folder(str(tmp_path / "a" / "b"), "refuse").is_dir()


def test_a_folder_with_a_run_is_refused_with_the_three_ways_on(old_run):
    with pytest.raises(UserError) as error:
        prepare_run_folder(str(old_run), "refuse")
    assert all(way in str(error.value) for way in ("already holds a run", "--resume", "--overwrite", "OUT="))
    assert (old_run / "run.json").exists()


def test_resume_keeps_what_is_there(old_run):
    prepare_run_folder(str(old_run), "resume")
    assert (old_run / "run.json").exists() and (old_run / "checkpoints" / "checkpoint-1").exists()


def test_overwrite_removes_the_run(old_run):
    prepare_run_folder(str(old_run), "overwrite")
    assert list(old_run.iterdir()) == []


@pytest.mark.parametrize("existing", ["refuse", "resume", "overwrite"])
def test_a_folder_with_anything_else_is_never_touched(old_run, existing):
    (old_run / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something that is no run .thesis.tex."):
        prepare_run_folder(str(old_run), existing)
    assert (old_run / "thesis.tex").exists() and (old_run / "run.json").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file; choose another output folder"):
        prepare_run_folder(str(tmp_path / "run"), "overwrite")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        prepare_run_folder(str(tmp_path / "file" / "run"), "refuse")
