"""docs/troubleshooting.md has every error that a user can meet."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

ERRORS = ("UserError", "HoldsRun", "RunUnderWay", "BadRow", "NotToLearn", "OtherKind", "TooLong", "require")
PAGE = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())


def literals(node: ast.AST) -> list[str]:
    """The fixed parts of a message."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.FormattedValue):
        return literals(node.value) if isinstance(node.value, ast.IfExp) else []
    parts = {ast.JoinedStr: ("values",), ast.BinOp: ("left", "right"), ast.IfExp: ("body", "orelse")}
    fields = [getattr(node, name) for name in parts.get(type(node), ())]
    nodes = [child for field in fields for child in (field if isinstance(field, list) else [field])]
    return [text for child in nodes for text in literals(child)]


@cache
def messages() -> dict[str, str]:
    """Place in common/: the longest fixed part of the message of each of ERRORS."""
    found = {}
    for path in sorted((ROOT / "common").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS:
                texts = literals(node.args[-1])
                if texts:  # a message made elsewhere has its own place: planner's refusal, require's
                    found[f"{Path(path).relative_to(ROOT)}:{node.lineno}"] = " ".join(
                        max(texts, key=len).split()
                    ).strip(" .,;:()")
    return found


@pytest.mark.parametrize("place", messages())
def test_the_page_has_every_error(place):
    assert messages()[place] in PAGE, f"{place} can say: {messages()[place]}"


def test_there_are_as_many_as_one_would_think():
    assert len(messages()) > 80
