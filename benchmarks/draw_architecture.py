"""Draws the architecture from the imports, and lists every module with the first sentence of its docstring.

python -m benchmarks.draw_architecture            # docs/architecture.png, and the table in docs/architecture.md
python -m benchmarks.draw_architecture --check    # exit status 1 where the table is not up to date
"""

import argparse
import ast
import sys
from collections import Counter
from pathlib import Path

from common import REPOSITORY

PAGE = REPOSITORY / "docs" / "architecture.md"
PICTURE = REPOSITORY / "docs" / "architecture.png"
BEGIN, END = "<!-- modules: python -m benchmarks.draw_architecture -->", "<!-- end of modules -->"
# From the top down, as in tests/test_structure.py.
FLOORS = ("recipes", "commands", "adapter", "run", "plan", "model", "data", "machine", "kernels", "ground")
NAMES = {"recipes": "recipes/", "ground": "common/*.py, imported from every floor"}
ON_TOP = {"cli"}  # modules of common/ that belong to the floor "commands"
COLOURS = ("#4477AA", "#66CCEE", "#228833", "#CCBB44", "#EE6677", "#AA3377")  # Paul Tol's bright palette


def floor_of(module: str) -> str:
    """The floor that a module such as "common.plan.count" or "recipes.tiny" stands on."""
    first, *rest = module.split(".")
    if first == "recipes":
        return "recipes"
    if not rest or rest[0] not in FLOORS:
        return "commands" if rest and rest[0] in ON_TOP else "ground"
    return rest[0]


def modules() -> dict[str, Path]:
    """Every module of common/ and recipes/ by its dotted name."""
    paths = [path for folder in ("recipes", "common") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path for path in paths
    }


def count_imports(known: dict[str, Path]) -> Counter[tuple[str, str]]:
    """How many modules of one floor import a module of another: (importing floor, imported floor) -> count."""
    found: Counter[tuple[str, str]] = Counter()
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("common", "recipes"):
                here, there = floor_of(module), floor_of(node.module)
                if here != there and there != "ground":
                    found[here, there] += 1
    return found


def first_sentence(path: Path) -> str:
    """Of the module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    end = paragraph.find(". ")
    return (paragraph[: end + 1] if end > 0 else paragraph).replace("|", "\\|")


def table(known: dict[str, Path]) -> str:
    lines = ["| module | what it holds |", "|---|---|"]
    for floor in FLOORS:
        for module, path in known.items():
            if floor_of(module) == floor and module not in ("recipes", "recipes.__main__"):
                place = path.relative_to(REPOSITORY).as_posix().removesuffix("/__init__.py")
                strong = "**" if path.name == "__init__.py" else ""
                lines.append(f"| {strong}`{place}`{strong} | {first_sentence(path)} |")
    return "\n".join(lines)


def page_with(table_text: str, page: str) -> str:
    """The page with the table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table_text}\n{END}{after}"


def draw(known: dict[str, Path], path: Path) -> None:
    """Floors from the recipes down, with their modules; beside each, how many modules of the floors above import it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    imports, step = count_imports(known), 10
    figure = Figure(figsize=(14, 11.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.5, 100), ylim=(-step * len(FLOORS) + 6, 14))
    axes.axis("off")
    axes.text(0, 10, "A floor imports from the floors below it", fontsize=15, fontweight="bold")
    columns = {floor: 72.5 + 3.3 * number for number, floor in enumerate(FLOORS[:-2])}
    for floor, x in columns.items():
        axes.text(x, 7.2, floor, rotation=50, fontsize=10.5, ha="left", color="0.2")
    axes.text(100, 13, "imported by (number of imports)", fontsize=10.5, ha="right", color="0.2")
    for number, floor in enumerate(FLOORS):
        top, colour = -step * number, _colour_of(floor)
        rounded = "round,pad=0,rounding_size=0.8"
        axes.add_patch(
            FancyBboxPatch((0, top - 3), 70, 8.6, rounded, facecolor=f"{colour}22", edgecolor=colour, linewidth=1.4)
        )
        axes.text(1.2, top + 3.2, NAMES.get(floor, f"common/{floor}/"), fontsize=12.5, fontweight="bold", color="0.1")
        names = [module.split(".")[-1] for module in known if floor_of(module) == floor and not _is_face(module)]
        for row, line in enumerate(_lines(names, 100)):
            axes.text(1.2, top + 1.0 - 1.7 * row, line, fontsize=9.5, color="0.15")
        for other, x in columns.items():
            if count := imports[other, floor]:
                look = {"boxstyle": "round,pad=0.3", "facecolor": f"{_colour_of(other)}33", "edgecolor": "none"}
                axes.text(x + 1, top + 1.2, str(count), fontsize=10.5, ha="center", va="center", bbox=look)
    figure.savefig(path, dpi=100)


def _is_face(module: str) -> bool:
    return module in ("recipes", "recipes.__main__", "common") or module.removeprefix("common.") in FLOORS


def _colour_of(floor: str) -> str:
    return COLOURS[FLOORS.index(floor) % len(COLOURS)]


def _lines(names: list[str], width: int) -> list[str]:
    lines, line = [], ""
    for name in names:
        if line and len(line) + len(name) + 3 > width:
            lines.append(line)
            line = ""
        line = f"{line} · {name}" if line else name
    return [*lines, line]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the table is old")
    args = parser.parse_args()
    known = modules()
    page = PAGE.read_text(encoding="utf-8")
    wanted = page_with(table(known), page)
    if args.check:
        if wanted != page:
            print("docs/architecture.md is not up to date: python -m benchmarks.draw_architecture", file=sys.stderr)
        return int(wanted != page)
    PAGE.write_text(wanted, encoding="utf-8")
    draw(known, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
