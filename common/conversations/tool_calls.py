"""Reads what an assistant may call and what it calls, in the shapes of OpenAI, LLaMA-Factory and others."""

from typing import Any

from common.conversations.conversation import ToolCall
from common.conversations.texts import is_nothing, parse_cell
from common.sources.source_row import BadRow, readable

_MAY_BE_NULL = ("default", "const", "enum", "examples")  # of JSON schema; any other null is a table's empty column


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Returns the tools as {"type": "function", "function": …} each, from a list or its JSON text."""
    value = parse_cell(value, "the tools") if isinstance(value, str) else readable(value)
    if is_nothing(value):
        return ()
    if not isinstance(value, list):
        raise BadRow("the tools are not a list")
    return tuple(_read_tool(entry) for entry in value)


def _read_tool(entry: Any) -> dict[str, Any]:
    entry = parse_cell(entry, "the tools") if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise BadRow("a tool is not an object")
    entry = _without_nulls(entry)
    if (kind := entry.get("type", "function")) != "function":
        raise BadRow(f"a tool is of type {kind!r:.40}; a tool is a function")
    function = entry.get("function", {key: value for key, value in entry.items() if key != "type"})
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow("a tool has no name")
    # A plain function gets its wrapper; a wrapper keeps what else is in it.
    return entry if "function" in entry else {"type": "function", "function": function}


def _without_nulls(value: Any) -> Any:
    """The value without the nulls that a table writes where other tools have a key. JSON schema has none there."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None or k in _MAY_BE_NULL}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def read_calls(value: Any) -> tuple[ToolCall, ...]:
    """Returns the calls of one turn: of a list, of one call, or of the JSON text of either."""
    value = parse_cell(value, "the tool calls") if isinstance(value, str) else readable(value)
    if is_nothing(value):
        return ()
    return tuple(_read_call(entry) for entry in (value if isinstance(value, list) else [value]))


def _read_call(entry: Any) -> ToolCall:
    entry = parse_cell(entry, "the tool calls") if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise BadRow("a tool call is not an object")
    if (kind := entry.get("type")) not in (None, "function"):
        raise BadRow(f"a tool call is of type {kind!r:.40}; a call is of a function")
    function = entry if is_nothing(entry.get("function")) else entry["function"]
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise BadRow("a tool call has no name of a function")
    call_id = entry.get("id")
    if call_id is not None and not isinstance(call_id, str):
        raise BadRow(f"the id of a tool call is not text: {call_id!r:.40}")
    return ToolCall(name, _read_arguments(function.get("arguments"), name), call_id or None)


def _read_arguments(value: Any, name: str) -> dict[str, Any]:
    """The arguments as an object, from an object or its JSON text. Missing ones are those of a call without any."""
    if value is None:
        return {}
    if isinstance(value, str):
        arguments = parse_cell(value, f"the arguments of {name!r:.40}")
    else:
        arguments = value
        if _holds_null(value):
            raise BadRow(
                f"the arguments of {name!r:.40} hold null, which may be a table's way to say that an argument is not "
                "there: give the arguments as JSON text, or leave it out"
            )
    if not isinstance(arguments, dict):
        hint = ", but JSON text that holds JSON text: encode them once" if isinstance(arguments, str) else ""
        raise BadRow(f"the arguments of {name!r:.40} are not a JSON object{hint}")
    return arguments


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_null, value.values() if isinstance(value, dict) else value))
    return value is None
