import pytest

from common.recipe import UserError
from common.run.folder import (
    hold_for_reading,
    hold_run_folder,
    prepare_run_folder,
    refuse_inside,
    refuse_run_under_way,
)
from tests.machine.test_lock import held_by_another


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


@pytest.mark.parametrize("existing", ["resume", "overwrite"])
def test_half_a_file_that_a_killed_run_left_is_removed(old_run, existing):
    for name in ("run.json.writing", "report.html.writing"):
        (old_run / name).write_text("{")
    prepare_run_folder(str(old_run), existing)
    assert not list(old_run.glob("*.writing"))
    (old_run / "thesis.writing").write_text("years of work")
    with pytest.raises(UserError, match="holds something that is no run .thesis.writing."):
        prepare_run_folder(str(old_run), existing)


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
    with pytest.raises(UserError, match="cannot be made: .*; choose another folder: OUT="):
        prepare_run_folder(str(tmp_path / "file" / "run"), "refuse")


@pytest.mark.parametrize("existing", ["refuse", "resume", "overwrite"])
def test_a_folder_whose_run_is_under_way_is_not_touched(old_run, existing):
    with held_by_another(old_run / ".lock") as other:
        words = f"a run is under way in {old_run} .process {other.pid} on .* since 20.*: wait until it has ended"
        with pytest.raises(UserError, match=words), hold_run_folder(str(old_run), existing):
            pass
        with pytest.raises(UserError, match=words), hold_for_reading(str(old_run)):
            pass
        with pytest.raises(UserError, match=words):
            refuse_run_under_way(str(old_run))
        assert (old_run / "run.json").exists() and (old_run / "checkpoints" / "checkpoint-1").exists()
    refuse_run_under_way(str(old_run))


def test_a_folder_that_a_command_reads_takes_no_run_and_further_readers(old_run):
    with held_by_another(old_run / ".lock", "shared"):
        with hold_for_reading(str(old_run)):
            pass
        words = f"a command .make eval, merge, export or report. reads {old_run}: wait"
        with pytest.raises(UserError, match=words), hold_run_folder(str(old_run), "overwrite"):
            pass
        assert (old_run / "run.json").exists()


def test_the_lock_that_a_killed_run_left_is_no_run_and_nothing_foreign(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on here since 2020-01-01 00:00")
    (tmp_path / "run" / ".saving").mkdir()
    with hold_run_folder(str(tmp_path / "run"), "refuse") as folder:
        assert [path.name for path in folder.iterdir()] == [".lock"]
        (folder / "run.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_folder_that_a_run_leaves_empty_is_removed(tmp_path):
    with pytest.raises(UserError, match="no data"), hold_run_folder(str(tmp_path / "run"), "refuse"):
        raise UserError("no data")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("foreign", ["link", "folder"])
def test_what_is_named_like_a_lock_and_is_none_is_foreign(tmp_path, foreign):
    (tmp_path / "letter.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / ".lock"
    path.symlink_to(tmp_path / "letter.txt") if foreign == "link" else path.mkdir()
    with pytest.raises(UserError, match="holds something that is no run ..lock."):
        prepare_run_folder(str(tmp_path / "run"), "overwrite")


def test_reading_a_folder_that_is_not_there_makes_none(tmp_path):
    with hold_for_reading(str(tmp_path / "run")):
        assert not (tmp_path / "run").exists()


def test_nothing_else_is_written_into_the_folder_of_a_run(old_run, tmp_path):
    (tmp_path / "link").symlink_to(old_run)
    for inside in (old_run, old_run / "-merged", tmp_path / "link" / "a" / "b", old_run.parent / "x" / ".." / "run"):
        with pytest.raises(UserError, match="lies in the folder of a run.* choose another place: TO=..."):
            refuse_inside(inside, str(old_run), "TO")
    refuse_inside(tmp_path / "run-merged", str(old_run), "TO")
