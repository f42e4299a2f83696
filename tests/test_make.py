"""The Makefile, and make inside of make."""

import os

import pytest

from tests.run_make import OF_MAKE, VARIABLES, run_make


def test_the_flags_and_variables_of_an_outer_make_stay_outside(monkeypatch):
    shown = run_make("-n", "chat", "VENV=/nowhere").stdout
    assert "recipes chat" in shown
    for name in VARIABLES - {"PYTHON"}:
        monkeypatch.setenv(name, "from-outside")
    monkeypatch.setenv("MAKEFLAGS", "s -- ARGS=from-outside MODEL=from-outside")
    monkeypatch.setenv("MAKEOVERRIDES", "${-*-command-variables-*-}")
    monkeypatch.setenv("MAKELEVEL", "1")
    assert run_make("-n", "chat", "VENV=/nowhere").stdout == shown
    assert {"ARGS", "MODEL", "PROMPT"} <= VARIABLES and "MAKEFLAGS" in OF_MAKE


@pytest.mark.parametrize(
    ("typed", "folder"),
    [
        (("OUT=outputs/x/",), "outputs/x-merged"),
        (("OUT=~/my runs/x/",), "{home}/my runs/x-merged"),
        (("MODEL=my_bot",), "outputs/my-bot-merged"),
        (("OUT=outputs/x/", "TO=~/merged"), "{home}/merged"),
    ],
)
def test_lm_eval_looks_where_a_merge_writes(typed, folder):
    shown = run_make("-n", "lm-eval", "VENV=/nowhere", *typed).stdout
    assert f'"pretrained={folder.format(home=os.environ["HOME"])}"' in shown


def test_no_other_test_starts_make_by_itself():
    from tests.conftest import ROOT

    found = [p.name for p in (ROOT / "tests").rglob("*.py") if '["make"' in p.read_text() and p.name != "test_make.py"]
    assert found == ["run_make.py"]
