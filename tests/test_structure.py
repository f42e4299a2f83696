"""The architecture that a reader can rely on."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports from floors below its own only.
FLOORS = {
    "answers": 1,
    "charts": 1,
    "checkpoints": 1,
    "host_memory": 1,
    "hub_errors": 1,
    "kernels": 1,
    "loss": 1,
    "provenance": 1,
    "recipe": 1,
    "step": 1,
    "adapters": 2,
    "data_files": 2,
    "kernels.rms_norm": 2,
    "kernels.rope": 2,
    "kernels.swiglu": 2,
    "launch": 2,
    "optimizer": 2,
    "output": 2,
    "processes": 2,
    "run_folder": 2,
    "weights": 2,
    "conversations": 3,
    "kernels.lora_linear": 3,
    "machine": 3,
    "row_cache": 3,
    "shards": 3,
    "stopping": 3,
    "attention": 4,
    "base_weights": 4,
    "chat_format": 4,
    "modules": 4,
    "progress": 4,
    "activation_checkpointing": 5,
    "chat": 5,
    "fake_model": 5,
    "gguf_tokenizer": 5,
    "packing": 5,
    "report": 5,
    "data": 6,
    "loading": 6,
    "memory": 6,
    "ollama": 6,
    "sharding": 6,
    "evaluation": 7,
    "forecast": 7,
    "resume": 7,
    "trained_adapter": 7,
    "merge": 8,
    "planner": 8,
    "trainer": 8,
    "cli": 9,
    "gguf_export": 9,
    "merge_check": 9,
    "plan_report": 9,
    "training": 9,
    "commands": 10,
    "plan_picture": 10,
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
