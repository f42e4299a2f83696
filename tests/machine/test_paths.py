"""Paths as people type them."""

from pathlib import Path

import pytest

from common.machine.paths import hide_home, is_same_place, local_path, output_path


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "tiny")
    return tmp_path


def test_the_home_folder_takes_the_place_of_its_sign(home):
    assert local_path("~/models") == home / "models"
    assert local_path("~") == home
    for name in ("owner/model", "~nobody-here/x", "a/~/b", "my.jsonl", ""):
        assert local_path(name) == Path(name)


def test_where_a_command_writes_has_a_name(home):
    assert str(output_path("outputs/x/")) == "outputs/x"
    assert str(output_path("./outputs//x/.")) == "outputs/x"
    assert output_path("~/x/") == home / "x"
    assert output_path("~") == home
    assert output_path(".") == home
    assert output_path("models/tiny/..") == home / "models"
    assert output_path("link/..") == home / "models"  # as the system reads it, not the text
    assert str(output_path("../outputs/x")) == "../outputs/x"


@pytest.mark.parametrize("other", ["models/tiny/", "./models/tiny", "~/models/tiny", "link", "models/../link/", "{}"])
def test_several_ways_to_a_place_are_one_place(home, other):
    assert is_same_place("models/tiny", other.format(home / "models" / "tiny"))


@pytest.mark.parametrize("other", ["models", "owner/model", "models/small", "models/tiny\0", ""])
def test_other_places_are_other_places(home, other):
    assert not is_same_place("models/tiny", other)


def test_names_of_the_hub_are_compared_as_text(home):
    assert is_same_place("owner/model", "owner/model")
    assert not is_same_place("owner/model", "./owner/model")  # no such folder


def test_the_home_folder_is_hidden(home, monkeypatch):
    assert hide_home(f"{home}/runs/a") == "~/runs/a"
    assert hide_home(str(home)) == "~"
    assert hide_home(f"{home}-of-another/runs") == f"{home}-of-another/runs"
    assert hide_home("outputs/a") == "outputs/a"
    monkeypatch.setenv("HOME", "/")
    assert hide_home("/runs/a") == "/runs/a"
