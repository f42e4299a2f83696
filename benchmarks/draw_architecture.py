"""Draws the packages of common/ and the imports between them, and lists every module with the first sentence it says.

python -m benchmarks.draw_architecture             # writes docs/architecture.svg and the table in docs/architecture.md
python -m benchmarks.draw_architecture --check     # exit status 1 when one of the two is out of date

Standard library only. benchmarks/ and tests/ import from every floor and are left out.
"""

import ast
import subprocess
import sys
from pathlib import Path

from common import REPOSITORY

PAGE = REPOSITORY / "docs" / "architecture.md"
DRAWING = REPOSITORY / "docs" / "architecture.svg"
FLOORS_FILE = REPOSITORY / "tests" / "test_structure.py"
TABLE_START = "<!-- modules: python -m benchmarks.draw_architecture -->"
TABLE_END = "<!-- end of modules -->"
COLORS = ("#1d6fa5", "#c0561f", "#17804a", "#8a3ea8", "#b3261e", "#52606d", "#9a7400", "#0f7c85", "#a8326f", "#3d4db7")

# Sizes in the drawing, pixels
WIDTH = 1120
MODULES_LEFT, MODULES_RIGHT = 190, 790  # where the boxes of a floor's modules begin and end
FIRST_LANE, LANE_WIDTH = 820, 20  # the vertical lines, one for each importing band
BOX_HEIGHT, LINE_HEIGHT, FLOOR_GAP = 24, 31, 14
CHARACTER_WIDTH = 6.7  # of a sans-serif font of 12 pixels, on average; boxes are sized by it

Modules = dict[str, Path]  # "common.run.folder" -> its file


def find_modules() -> Modules:
    """Every module of common/, and the recipes of the repository; a package stands for its __init__."""
    paths = sorted((REPOSITORY / "common").rglob("*.py")) + own_recipes()
    return {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path for path in paths
    }


def own_recipes() -> list[Path]:
    """The modules of recipes/ that belong to the repository: a user's own ones are not in git."""
    paths = sorted((REPOSITORY / "recipes").glob("*.py"))
    command = ["git", "-C", str(REPOSITORY), "ls-files", "recipes"]
    try:
        tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):  # no git, or a copy without its history
        return paths
    return [path for path in paths if f"recipes/{path.name}" in tracked]


def read_bands() -> list[tuple[str, ...]]:
    """The bands of the drawing from the ground up: a package each, or the modules of common/ that follow each other.

    The order is that of FLOORS in tests/test_structure.py, which holds it.
    """
    for node in ast.parse(FLOORS_FILE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            floors = [floor for floor in ast.literal_eval(node.value) if floor != "benchmarks"]
    bands: list[tuple[str, ...]] = []
    for floor in floors:
        if bands and not is_package(floor) and not is_package(bands[-1][-1]):
            bands[-1] += (floor,)
        else:
            bands.append((floor,))
    return bands


def is_package(floor: str) -> bool:
    return floor != "common" and (REPOSITORY / floor.replace(".", "/")).is_dir()


def floor_of(module: str) -> str:
    """The package of a module ("common.run" of "common.run.folder"), or the module itself directly in common/."""
    parts = module.split(".")
    return parts[0] if parts[0] == "recipes" else ".".join(parts[:2])


def imported_modules(path: Path, modules: Modules) -> set[str]:
    """Names of the modules of `modules` that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & modules.keys() or {node.module}
    return found & modules.keys()


def band_imports(bands: list[tuple[str, ...]], modules: Modules) -> dict[int, set[int]]:
    """The number of each band: the numbers of the bands that it imports from."""
    number_of = {floor: number for number, band in enumerate(bands) for floor in band}
    found: dict[int, set[int]] = {number: set() for number in range(len(bands))}
    for module, path in modules.items():
        here = number_of[floor_of(module)]
        found[here] |= {number_of[floor_of(name)] for name in imported_modules(path, modules)} - {here}
    return found


def modules_of(band: tuple[str, ...], modules: Modules) -> list[str]:
    """The names that the drawing shows in a band."""
    paths = [path for module, path in modules.items() if floor_of(module) in band]
    return [path.stem for path in paths if path.name != "__init__.py"]


def lay_out_boxes(names: list[str]) -> list[tuple[int, int, int, str]]:
    """Boxes from left to right in as many lines as needed: x, line, width, text."""
    boxes, x, line = [], MODULES_LEFT, 0
    for text in names:
        width = int(len(text) * CHARACTER_WIDTH) + 16
        if x + width > MODULES_RIGHT:
            x, line = MODULES_LEFT, line + 1
        boxes.append((x, line, width, text))
        x += width + 8
    return boxes


def draw(modules: Modules) -> str:
    """The drawing as SVG: packages as bands, modules as boxes in them, a vertical line for what each band imports."""
    bands = read_bands()
    imports = band_imports(bands, modules)
    shapes: list[str] = []
    middle, y = {}, 56
    for number in reversed(range(len(bands))):
        boxes = lay_out_boxes(modules_of(bands[number], modules))
        height = LINE_HEIGHT * (1 + max((line for _, line, _, _ in boxes), default=0)) + 9
        middle[number] = y + height // 2
        shapes += draw_band(bands[number], boxes, y, height)
        y += height + FLOOR_GAP
    importing = [number for number in reversed(range(len(bands))) if imports[number]]
    for place, number in enumerate(importing):
        lane, color = FIRST_LANE + place * LANE_WIDTH, COLORS[place % len(COLORS)]
        assert lane < WIDTH - 20, "more lines than there is room for"
        shapes += draw_imports(lane, color, middle[number], sorted(middle[target] for target in imports[number]))
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>\n'
        '<text x="16" y="24" font-size="15" font-weight="bold" fill="#1b1f24">Packages are floors; imports only go '
        "down</text>\n"
        '<text x="16" y="42" fill="#57606a">A line shows what one floor imports: a dot on that floor, and an arrow on '
        "each floor that it imports from.</text>\n"
    )
    return head + "\n".join(shapes) + "\n</svg>\n"


def draw_band(band: tuple[str, ...], boxes: list[tuple[int, int, int, str]], y: int, height: int) -> list[str]:
    name = band[0].replace(".", "/") + "/" if is_package(band[0]) else "common/*.py"
    frame = f'<rect x="8" y="{y}" width="{WIDTH - 16}" height="{height}" rx="6" fill="#f3f5f8" stroke="#d0d7de"/>'
    middle = y + height // 2 + 5
    shapes = [frame, f'<text x="20" y="{middle}" font-size="13" font-weight="bold" fill="#1b1f24">{name}</text>']
    for x, line, width, text in boxes:
        top = y + 8 + line * LINE_HEIGHT
        shapes.append(
            f'<rect x="{x}" y="{top}" width="{width}" height="{BOX_HEIGHT}" rx="4" fill="#ffffff" stroke="#b6bfca"/>'
            f'<text x="{x + width / 2:g}" y="{top + 16}" text-anchor="middle" fill="#24292f">{text}</text>'
        )
    return shapes


def draw_imports(lane: int, color: str, start: int, targets: list[int]) -> list[str]:
    """A vertical line: a dot at `start`, an arrow at each of `targets`, which are sorted and lie below it."""
    shapes = [
        f'<path d="M {lane} {start} V {targets[-1]}" fill="none" stroke="{color}" stroke-width="1.6"/>',
        f'<circle cx="{lane}" cy="{start}" r="6" fill="{color}"/>',
    ]
    return shapes + [f'<path d="M {lane} {y + 7} l -7 -12 h 14 z" fill="{color}"/>' for y in targets]


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(paragraph.split()).split(". ")[0].removesuffix(".")


def module_table(modules: Modules) -> str:
    """A table for each band from the top down, with a row for each of its modules."""
    lines: list[str] = []
    for band in reversed(read_bands()):
        title = f"{band[0].replace('.', '/')}/" if is_package(band[0]) else "common/*.py"
        lines += ["", f"| `{title}` | |", "|---|---|"]
        for module, path in modules.items():
            if floor_of(module) in band and (sentence := first_sentence(path)):
                text = sentence.replace("|", "\\|")
                lines.append(f"| [`{path.name}`](../{path.relative_to(REPOSITORY)}) | {text} |")
    return "\n".join(lines[1:])


def page_with_table(page: str, table: str) -> str:
    before, rest = page.split(TABLE_START)
    after = rest.split(TABLE_END)[1]
    return f"{before}{TABLE_START}\n\n{table}\n\n{TABLE_END}{after}"


def main(arguments: list[str]) -> int:
    modules = find_modules()
    page = PAGE.read_text(encoding="utf-8")
    wanted = {PAGE: page_with_table(page, module_table(modules)), DRAWING: draw(modules)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if arguments == ["--check"]:
        for path in stale:
            print(
                f"docs/{path.name} is out of date: python -m benchmarks.draw_architecture",
                file=sys.stderr,
            )
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"written: docs/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
