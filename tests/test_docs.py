"""README.md and docs/: links lead somewhere, and what the pages name exists."""

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks import draw_architecture
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
MAKEFILE = (ROOT / "Makefile").read_text()
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES", "GOMP_SPINCOUNT", "HF_HOME", "OMP_WAIT_POLICY"}  # variables that are not of make
MAX_README_LINES = 150
LINES_OF_A_LONG_PAGE = 80
FOLDERS = ("common", "tests", "benchmarks", "recipes", "models", "data", "docs")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Targets of the page's links and pictures, those of other sites left out."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose_of(page)) + re.findall(r'<img src="([^"]+)"', prose_of(page))
    return [target for target in found if "://" not in target]


def anchor_of(heading: str) -> str:
    """As GitHub makes it: lower case, no punctuation, dashes for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path, level: str = "#+") -> set[str]:
    """The anchors of the page's headings. level: a pattern for their number signs."""
    return {anchor_of(heading) for heading in re.findall(rf"^{level} (.+)$", prose_of(page), flags=re.MULTILINE)}


def commands(page: Path) -> list[str]:
    """What the page tells to type after `make`, in blocks of code and between backquotes."""
    text = text_of(page)
    typed = re.findall(r"`make ([^`\n]+)`", text)
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        typed += re.findall(r"^make (.+?)(?: {2,}#.*)?$", block, flags=re.MULTILINE)
    return typed


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}; there are {sorted(anchors(target))}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_target_and_variable_of_make_is_in_the_makefile(page):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, flags=re.MULTILINE))
    for command in commands(page):
        words = re.sub(r"""=("[^"]*"|'[^']*')""", "=", command).split()
        for word in words:
            if "=" in word:
                assert word.split("=")[0] in variables, f"{page.name}: make {command}"
            elif re.fullmatch("[a-z-]+", word):
                assert word in targets, f"{page.name}: make {command}"
    for name in re.findall(r"`([A-Z][A-Z_]+)=", text_of(page)):
        assert name in variables | ENVIRONMENT, f"{page.name}: {name}="


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_path_exists(page):
    made_by_a_user = {"recipes/my_bot.py"}
    for path in re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]*)", text_of(page)):
        name = path.rstrip(".")
        assert name in made_by_a_user or (ROOT / name).exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_module_that_is_run_exists(page):
    for module in re.findall(r"python -m ((?:benchmarks|recipes)[\w.]*)", text_of(page)):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), f"{page.name}: {module}"


def test_the_readme_is_short_and_leads_to_every_page_which_leads_back():
    readme = ROOT / "README.md"
    assert len(text_of(readme).splitlines()) <= MAX_README_LINES
    pages = list((ROOT / "docs").glob("*.md"))
    assert {f"docs/{page.name}" for page in pages} <= set(links(readme))
    assert [page.name for page in pages if "../README.md" not in links(page)] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_long_page_begins_with_its_contents(page):
    if page.parent.name == "docs" and len(text_of(page).splitlines()) >= LINES_OF_A_LONG_PAGE:
        assert anchors(page, "##") <= {link[1:] for link in links(page) if link.startswith("#")}


def test_the_pages_show_the_committed_results():
    results = ROOT / "benchmarks" / "results"
    merge = json.loads((results / "merge_llama3_8b_cpu.json").read_text())
    after = text_of(ROOT / "docs" / "after.md")
    for name, label in (("merge", "merge, with the check"), ("export q8_0", "export to q8_0")):
        assert f"| {label} | {merge[name]['peak_gib']:.1f} GiB | {merge[name]['seconds']:.0f} s |" in after
    parity = json.loads((results / "parity_tiny_cpu.json").read_text())
    ours, plain, ratio = (parity[name] for name in ("ours_seconds", "plain_seconds", "speed_ratio"))
    line = f"time:   ours {ours:.1f} s, plain TRL + PEFT {plain:.1f} s, {ratio:.2f} x as fast"
    assert line in text_of(ROOT / "docs" / "speed.md")


def test_the_names_in_the_architecture_are_defined_in_the_package_beside_them():
    rows = re.findall(r"^\| [^|]+ \| `(common/[\w./]+)` \| ([^|]+) \|", text_of(draw_architecture.PAGE), re.MULTILINE)
    assert len(rows) > 15
    for place, names in rows:
        path = ROOT / place
        files = [path] if path.is_file() else sorted(path.glob("*.py"))
        defined: set[str] = set()
        for file in files:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    defined.add(node.name)
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        for name in re.findall(r"`(\w+)`", names):
            assert name in defined, f"{name} is not defined in {place}"


def test_the_drawing_and_the_table_of_modules_are_up_to_date(capsys):
    assert draw_architecture.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_drawing_or_table_is_found_and_made_anew(tmp_path, monkeypatch, capsys):
    page, drawing = tmp_path / "architecture.md", tmp_path / "architecture.svg"
    page.write_text(f"before\n{draw_architecture.TABLE_START}\na stale row\n{draw_architecture.TABLE_END}\nafter\n")
    monkeypatch.setattr(draw_architecture, "PAGE", page)
    monkeypatch.setattr(draw_architecture, "DRAWING", drawing)
    assert draw_architecture.main(["--check"]) == 1
    assert "is out of date" in capsys.readouterr().err
    assert draw_architecture.main([]) == 0
    assert draw_architecture.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "a stale row" not in text
    assert "common/recipe.py" in text and "<svg" in drawing.read_text()
