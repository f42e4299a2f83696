"""The examples of docs/data.md and of the README: each row becomes what stands below it."""

import ast
import json
import re

import pytest

from common.conversations.conversation import AnyExample, Message, Preference
from common.conversations.row_reader import RowReader
from common.recipe import Kind, PreferenceSpec
from common.sources.source_row import BadRow
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def examples(page: str) -> list[tuple[str, dict[str, str] | None, Kind, list[str]]]:
    """Each row of the page, columns and kind by the specs above it, and the lines below it that say what it becomes."""
    found: list[tuple[str, dict[str, str] | None, Kind, list[str]]] = []
    for block in blocks(page):
        columns, kind = None, "conversations"
        for line in block.splitlines():
            if match := re.fullmatch(r"PreferenceSpec\(\"(.*)\"\)", line):
                kind = PreferenceSpec(match[1]).kind
            if match := re.match(r"DataSpec\(.*columns=(\{.*?\})", line):
                columns = ast.literal_eval(match[1])
            elif line.startswith("{"):
                found.append((line, columns, kind, []))
            elif line.startswith("    ") and found and block.startswith(("{", "DataSpec", "PreferenceSpec")):
                found[-1][3].append(line.removeprefix("    "))
    return found


def in_words(message: Message) -> str:
    calls = "".join(f"{call.name}({json.dumps(call.arguments)})" for call in message.tool_calls)
    text = (f"({message.reasoning}) " if message.reasoning else "") + message.content + calls
    text = text.replace("\n", "⏎")
    return f"{message.role}: " + (f"⟦{text}⟧" if message.role == "assistant" and message.is_trained else text)


def lines_of(example: AnyExample) -> list[str]:
    if isinstance(example, str):
        return [f"text: ⟦{example}⟧"]
    if isinstance(example, Preference):
        words = ("chosen", "rejected") if len(example.signs) > 1 else ("good" if example.signs[0] > 0 else "bad",)
        sides = [list(map(in_words, conversation.messages)) for conversation in example.conversations]
        first = next(i for i, line in enumerate(sides[0]) if "⟦" in line)
        answers = [
            line.replace("assistant: ⟦", f"{word}: ⟦")
            for word, side in zip(words, sides, strict=True)
            for line in side[first:]
        ]
        return [*sides[0][:first], *answers]
    tools = [f"tools: {', '.join(tool['function']['name'] for tool in example.tools)}"] if example.tools else []
    arguments = [f"template: {name}={value}" for name, value in example.template_arguments.items()]
    return [*tools, *arguments, *map(in_words, example.messages)]


def becomes(row: str, columns: dict[str, str] | None, kind: Kind) -> list[str]:
    reader = RowReader(columns=columns, kind=kind)
    try:
        read = lines_of(reader.read(json.loads(row)))
    except BadRow as fault:
        return [f"refused: {fault}"]
    return [*read, *([f"not read: {', '.join(reader.unread)}"] if reader.unread else [])]


@pytest.mark.parametrize(("row", "columns", "kind", "shown"), examples(PAGE))
def test_each_row_of_the_page_becomes_what_is_shown_below_it(row, columns, kind, shown):
    assert becomes(row, columns, kind) == shown


def test_each_row_of_the_readme_is_read():
    rows = [(row, kind) for row, _, kind, _ in examples(README)]
    assert len(rows) >= 5
    for row, kind in rows:
        assert not becomes(row, None, kind)[0].startswith("refused")


def test_there_are_examples_of_all_kinds():
    shown = "\n".join(line for *_, lines in examples(PAGE) for line in lines)
    for word in (
        "user: ",
        "system: ",
        "tools: ",
        "tool: ",
        "template: ",
        "text: ",
        "refused: ",
        "not read: ",
        "chosen: ",
        "bad: ",
        "⏎",
    ):
        assert word in shown
