import itertools
import os
import shutil
import sys

import pytest

from common.recipe import UserError
from common.run.checkpoints import staging_folder, write_checkpoint
from common.run.folder import (
    hold_for_reading,
    hold_run_folder,
    prepare_run_folder,
    put_old_run_back,
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


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


OLD = ["checkpoints", "checkpoints/checkpoint-1", "run.json"]


def test_overwrite_sets_the_run_aside_and_removes_it_when_the_new_one_has_ended_well(old_run):
    with hold_run_folder(str(old_run), "overwrite") as folder:
        assert files_of(folder) == [".replaced", *(f".replaced/{name}" for name in OLD)]
        (folder / "run.json").write_text("new")
    assert files_of(old_run) == ["run.json"] and (old_run / "run.json").read_text() == "new"


@pytest.mark.parametrize("error", [UserError("no data"), KeyboardInterrupt()])
def test_an_error_before_the_first_checkpoint_brings_the_old_run_back(old_run, error, capsys):
    with pytest.raises(type(error)), hold_run_folder(str(old_run), "overwrite") as folder:
        (folder / "metrics.jsonl").write_text("new")
        (folder / "checkpoints" / ".writing").mkdir(parents=True)
        raise error
    assert files_of(old_run) == OLD and (old_run / "run.json").read_text() == "{}"
    assert f"the run that was to be replaced is back in {old_run}" in capsys.readouterr().out


def test_an_error_after_the_first_checkpoint_leaves_the_new_run(old_run):
    with pytest.raises(UserError), hold_run_folder(str(old_run), "overwrite") as folder:
        write = staging_folder(folder / "checkpoints") / "checkpoint-7"
        write_checkpoint(folder / "checkpoints", 7, lambda: write.mkdir(parents=True), {})
        assert not (folder / ".replaced").exists()
        raise UserError("later")
    assert files_of(old_run) == ["checkpoints", "checkpoints/checkpoint-7", "checkpoints/checkpoint-7/manifest.json"]


def run_and_die(run, moment):
    """The exit status of a process that replaces the run and ends, as by SIGKILL, at its n-th change of the folder."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    moments = itertools.count(1)

    def die(event, arguments):
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(run) in str(arguments[0]):
            if next(moments) == moment:
                os._exit(9)

    sys.addaudithook(die)
    with hold_run_folder(str(run), "overwrite"):
        (run / "metrics.jsonl").write_text("new")
        write = staging_folder(run / "checkpoints") / "checkpoint-7"
        write_checkpoint(run / "checkpoints", 7, lambda: write.mkdir(parents=True), {})
        (run / "run.json").write_text("new")
    os._exit(0)


def test_a_run_that_is_killed_at_any_moment_leaves_the_old_one_or_itself(old_run, tmp_path):
    shutil.copytree(old_run, tmp_path / "kept")
    left = []
    while run_and_die(old_run, len(left) + 1):
        put_old_run_back(str(old_run))
        names = files_of(old_run)
        is_old = names == OLD and (old_run / "run.json").read_text() == "{}"
        assert is_old or "checkpoints/checkpoint-7" in names and not [name for name in names if "replaced" in name]
        left.append(is_old)
        shutil.rmtree(old_run)
        shutil.copytree(tmp_path / "kept", old_run)
    assert left == sorted(left, reverse=True) and {*left} == {True, False}  # the old one, then the new one
    assert len(left) > 10


def test_what_is_set_aside_is_a_run_too(old_run):
    (old_run / ".replaced").mkdir()
    for name in ("run.json", "checkpoints"):
        (old_run / name).rename(old_run / ".replaced" / name)
    with pytest.raises(UserError, match="already holds a run"), hold_run_folder(str(old_run), "refuse"):
        pass
    with hold_run_folder(str(old_run), "resume"):  # and can be resumed
        assert files_of(old_run) == OLD


def test_nothing_is_put_back_while_a_run_is_under_way(old_run):
    (old_run / ".replaced").mkdir()
    with held_by_another(old_run / ".lock"):
        put_old_run_back(str(old_run))
    assert (old_run / ".replaced").is_dir()


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
        words = f"a command .make eval, merge, export, report or push. reads {old_run}: wait"
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
