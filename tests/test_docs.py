"""README and docs/: what they name is there."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.run_make import VARIABLES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_PATH = re.compile(r"`((?:common|tests|benchmarks|docs|recipes|models|data)/[\w./-]*)`")


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(text: str) -> str:
    """What stands in code blocks and between backticks."""
    blocks = re.findall(r"^```.*?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", rest)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path):
    for link in LINK.findall(TEXTS[page]):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_is_named_exists(page: Path):
    missing = [path for path in NAMED_PATH.findall(TEXTS[page]) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_and_variable_is_in_the_makefile(page: Path):
    for command in re.findall(r"^\s*make ([^\n#&|]*)", code(TEXTS[page]), re.MULTILINE):
        words = re.sub(r"""(["']).*?\1""", "", command).split()
        for word in words:
            name, equals, _ = word.partition("=")
            if equals:
                assert name in VARIABLES | {"PYTHON"}, f"{page.name}: make {command}"
            elif re.fullmatch(r"[a-z][a-z-]+", word) and word is words[0]:
                assert word in TARGETS, f"{page.name}: make {command}"


def test_the_readme_is_read_in_five_minutes_and_leads_to_every_page():
    readme = TEXTS[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 150
    assert {link for link in LINK.findall(readme) if link.endswith(".md")} >= {
        f"docs/{page.name}" for page in PAGES[1:]
    }


def test_every_page_leads_back():
    assert [page.name for page in PAGES[1:] if "../README.md" not in TEXTS[page]] == []
