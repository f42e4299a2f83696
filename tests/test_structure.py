"""The architecture that a reader can rely on."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports from floors below its own only.
FLOORS = {
    "charts": 1,
    "hub_errors": 1,
    "kernels": 1,
    "processes": 1,
    "provenance": 1,
    "recipe": 1,
    "checkpoints": 2,
    "data_files": 2,
    "host_memory": 2,
    "kernels.rms_norm": 2,
    "kernels.rope": 2,
    "kernels.swiglu": 2,
    "loss": 2,
    "machine": 2,
    "optimizer": 2,
    "output": 2,
    "run_folder": 2,
    "step": 2,
    "stopping": 2,
    "attention": 3,
    "conversations": 3,
    "kernels.lora_linear": 3,
    "shards": 3,
    "weights": 3,
    "activation_checkpointing": 4,
    "adapters": 4,
    "chat_format": 4,
    "loading": 4,
    "modules": 4,
    "answers": 5,
    "fake_model": 5,
    "gguf_tokenizer": 5,
    "memory": 5,
    "packing": 5,
    "row_cache": 5,
    "trained_adapter": 5,
    "chat": 6,
    "data": 6,
    "forecast": 6,
    "merge": 6,
    "ollama": 6,
    "evaluation": 7,
    "gguf_export": 7,
    "merge_check": 7,
    "planner": 7,
    "progress": 7,
    "resume": 7,
    "plan_report": 8,
    "report": 8,
    "trainer": 8,
    "plan_picture": 9,
    "training": 9,
    "cli": 10,
    "commands": 11,
}
MODULES = sorted(path for path in (ROOT / "common").rglob("*.py") if path != ROOT / "common" / "__init__.py")


def imports(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "common").with_suffix("").parts).removesuffix(".__init__")


def test_every_module_stands_on_a_floor():
    assert {name_of(path) for path in MODULES} == set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_from_lower_floors_only(path: Path):
    for name in imports(path):
        assert not name.startswith("recipes"), f"{path.name} imports {name}"
        if name.startswith("common."):
            below = name.removeprefix("common.")
            assert FLOORS[below] < FLOORS[name_of(path)], f"{path} (floor {FLOORS[name_of(path)]}) imports {below}"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_recipe_has_at_most_60_lines(path: Path):
    assert len(path.read_text().splitlines()) <= 60


def test_recipe_values_need_the_standard_library_alone():
    modules = {name.split(".")[0] for name in imports(ROOT / "common" / "recipe.py")}
    assert modules == {"dataclasses", "typing"}
