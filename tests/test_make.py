"""The Makefile, and make inside of make."""

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


def test_no_other_test_starts_make_by_itself():
    from tests.conftest import ROOT

    found = [p.name for p in (ROOT / "tests").rglob("*.py") if '["make"' in p.read_text() and p.name != "test_make.py"]
    assert found == ["run_make.py"]
