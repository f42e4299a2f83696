"""The examples of docs/data.md and of the README: each row becomes what stands below it."""

import ast
import json
import re

import pytest

from common.conversations.conversation import Example, Message
from common.conversations.row_reader import RowReader
from common.sources.source_row import BadRow
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def examples(page: str) -> list[tuple[str, dict[str, str] | None, list[str]]]:
    """Each row of the page, the columns of the DataSpec above it, and the lines below it that say what it becomes."""
    found: list[tuple[str, dict[str, str] | None, list[str]]] = []
    for block in blocks(page):
        columns = None
        for line in block.splitlines():
            if match := re.match(r"DataSpec\(.*columns=(\{.*?\})", line):
                columns = ast.literal_eval(match[1])
            elif line.startswith("{"):
                found.append((line, columns, []))
            elif line.startswith("    ") and found and block.startswith(("{", "DataSpec")):
                found[-1][2].append(line.removeprefix("    "))
    return found


def in_words(message: Message) -> str:
    calls = "".join(f"{call.name}({json.dumps(call.arguments)})" for call in message.tool_calls)
    text = (f"({message.reasoning}) " if message.reasoning else "") + message.content + calls
    text = text.replace("\n", "⏎")
    return f"{message.role}: " + (f"⟦{text}⟧" if message.role == "assistant" and message.is_trained else text)


def lines_of(example: Example) -> list[str]:
    if isinstance(example, str):
        return [f"text: ⟦{example}⟧"]
    tools = [f"tools: {', '.join(tool['function']['name'] for tool in example.tools)}"] if example.tools else []
    arguments = [f"template: {name}={value}" for name, value in example.template_arguments.items()]
    return [*tools, *arguments, *map(in_words, example.messages)]


def becomes(row: str, columns: dict[str, str] | None) -> list[str]:
    reader = RowReader(columns=columns)
    try:
        read = lines_of(reader.read(json.loads(row)))
    except BadRow as fault:
        return [f"refused: {fault}"]
    return [*read, *([f"not read: {', '.join(reader.unread)}"] if reader.unread else [])]


@pytest.mark.parametrize(("row", "columns", "shown"), examples(PAGE))
def test_each_row_of_the_page_becomes_what_is_shown_below_it(row, columns, shown):
    assert becomes(row, columns) == shown


def test_each_row_of_the_readme_is_read():
    rows = [row for row, _, _ in examples(README)]
    assert len(rows) >= 5
    for row in rows:
        assert not becomes(row, None)[0].startswith("refused")


def test_there_are_examples_of_all_kinds():
    shown = "\n".join(line for _, _, lines in examples(PAGE) for line in lines)
    for word in ("user: ", "system: ", "tools: ", "tool: ", "template: ", "text: ", "refused: ", "not read: ", "⏎"):
        assert word in shown
