"""The house that a reader can rely on: a package is a floor, and imports only go down."""

import ast
import importlib
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from benchmarks.draw_architecture import own_recipes
from tests.conftest import ROOT

# From the ground up. A module imports from its own package and from floors below; in a package nothing goes in circles.
FLOORS = (
    "common.control_group",
    "common.output_stream",
    "common.process_state",
    "common",
    "common.lazy",
    "common.recipe_fields",
    "common.rope_scaling",
    "common.recipe",
    "common.kernels",
    "common.machine",
    "common.sources",
    "common.conversations",
    "common.tokens",
    "common.data",
    "common.model",
    "common.plan",
    "common.run",
    "common.adapter",
    "common.exit_status",
    "common.commands",
    "common.cli",
    "recipes",
    "benchmarks",
)
PACKAGES = [path.parent.name for path in sorted((ROOT / "common").glob("*/__init__.py"))]
FACES = [name for name in PACKAGES if name not in ("kernels", "commands")]  # those that recipes import from
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("common", "recipes", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(path: Path, *, at_run_time: bool = False) -> set[str]:
    """Names of the modules of this repository that a file imports. at_run_time: not those for type checkers alone."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if at_run_time and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
    return found


def floor_of(module: str) -> int:
    return max(number for number, floor in enumerate(FLOORS) if module == floor or module.startswith(f"{floor}."))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_package_and_from_floors_below(module):
    for name in imports(MODULES[module]) & MODULES.keys():
        in_package = floor_of(name) == floor_of(module)  # the next test looks for circles there
        assert in_package or floor_of(name) < floor_of(module), f"{module} imports {name}"


def test_nothing_is_imported_in_circles():
    graph = {module: imports(path, at_run_time=True) & MODULES.keys() for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # a CycleError names the modules


def test_every_package_and_module_of_common_stands_on_a_floor():
    there = {".".join(module.split(".")[:2]) for module in MODULES if module.startswith("common")}
    assert there == {floor for floor in FLOORS if floor.startswith("common")}


@pytest.mark.parametrize("package", FACES)
def test_a_face_says_what_lives_there_and_gives_what_it_names(package):
    face = importlib.import_module(f"common.{package}")
    assert "Not here: " in face.__doc__
    for name in face.__all__:
        module = importlib.import_module(f"common.{package}.{face._MODULE_OF[name]}")
        given, defined = getattr(face, name), getattr(module, name)
        assert given is defined or (given.__name__, given.__module__) == (name, module.__name__)
    declared = ast.parse(MODULES[f"common.{package}"].read_text())
    checked = [node for node in ast.walk(declared) if isinstance(node, ast.If)][0].body
    assert {alias.name: node.module for node in checked for alias in node.names} == {
        name: f"common.{package}.{module}" for name, module in face._MODULE_OF.items()
    }


@pytest.mark.parametrize("package", FACES)
def test_a_face_has_no_other_name(package):
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        importlib.import_module(f"common.{package}").no_such_name  # noqa: B018


def top_level_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def test_no_name_is_defined_in_two_modules():
    """A search for a name finds one place."""
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        if module.startswith("common") and module.removeprefix("common.") not in FACES:
            for name in top_level_names(path):
                places.setdefault(name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("path", [path for path in own_recipes() if path.stem[0] != "_"], ids=lambda path: path.stem)
def test_a_recipe_has_at_most_60_lines_and_imports_from_faces(path):
    assert len(path.read_text().splitlines()) <= 60
    allowed = {f"common.{name}" for name in FACES} | {"common.recipe"}
    assert {name for name in imports(path) if name.startswith("common")} <= allowed


def test_recipe_values_need_the_standard_library_alone():
    own = {"common.recipe_fields", "common.rope_scaling"}
    for name in ("recipe.py", "recipe_fields.py", "rope_scaling.py"):
        modules = {name.split(".")[0] for name in imports(ROOT / "common" / name) - own}
        assert modules <= sys.stdlib_module_names
