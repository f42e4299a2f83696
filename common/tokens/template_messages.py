"""What a chat template is given: messages as dictionaries, the assistant's calls of tools, and the tools themselves.

Templates read calls in OpenAI's form, and differ in two things: whether arguments are an object or JSON text, and
whether a call needs an id of nine characters. Each way is tried in turn, the data's own first.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.conversations.conversation import Conversation, Message
from common.sources.source_row import BadRow

IDS_NOTE = "ids of tool calls are numbered anew: the chat template demands ids of nine characters"


@dataclass(frozen=True)
class CallForm:
    """How calls are given to the template."""

    arguments_as_text: bool = False
    numbered_ids: bool = False


PLAIN_FORM = CallForm()
CALL_FORMS = (PLAIN_FORM, CallForm(True), CallForm(False, True), CallForm(True, True))


def template_messages(
    conversation: Conversation, texts: list[tuple[str, str | None]], form: CallForm
) -> list[dict[str, Any]]:
    """Returns the messages with these texts, for each its content and its thoughts, as the template reads them."""
    messages = []
    ids = _numbered_ids(conversation) if form.numbered_ids else {}
    for index, (message, (content, reasoning)) in enumerate(zip(conversation.messages, texts, strict=True)):
        entry: dict[str, Any] = {"role": message.role, "content": content}
        if reasoning is not None:
            entry["reasoning_content"] = reasoning  # transformers also hands it on as `thinking`
        if message.tool_calls:
            calls = []
            for number, call in enumerate(message.tool_calls):
                arguments = json.dumps(call.arguments, ensure_ascii=False) if form.arguments_as_text else call.arguments
                function = {"name": call.name, "arguments": arguments}
                call_id = ids.get((index, number), call.id)
                calls.append({"type": "function", "function": function} | ({"id": call_id} if call_id else {}))
            entry["tool_calls"] = calls
        if message.name is not None:
            entry["name"] = message.name
        if (call_id := ids.get((index, 0), message.tool_call_id)) is not None and message.role == "tool":
            entry["tool_call_id"] = call_id
        messages.append(entry)
    return messages


def _numbered_ids(conversation: Conversation) -> dict[tuple[int, int], str]:
    """Returns an id of nine digits for each call, by message and place, and for each result the id of its call.

    A result without an id is that of the oldest call that still waits for one. Raises BadRow for one of no call.
    """
    ids, waiting = dict[tuple[int, int], str](), list[tuple[str | None, str]]()
    for index, message in enumerate(conversation.messages):
        for number, call in enumerate(message.tool_calls):
            ids[index, number] = f"{len(ids):09d}"
            waiting.append((call.id, ids[index, number]))
        if message.role == "tool":
            if not waiting:
                raise BadRow("a tool's result stands before any call: a call is in tool_calls, not in an answer's text")
            named = next((pair for pair in waiting if pair[0] == message.tool_call_id), None)
            if named is None and message.tool_call_id and any(call_id for call_id, _ in waiting):
                raise BadRow(f"a tool's result is that of a call which is not there: {message.tool_call_id!r:.40}")
            pair = named or waiting[0]
            waiting.remove(pair)
            ids[index, 0] = pair[1]
    return ids


def describe(conversation: Conversation, index: int) -> str:
    """Returns which message it is, in words."""
    return f"message {index + 1}, the {conversation.messages[index].role}'s"


def leaves(value: Any) -> Iterator[Any]:
    """Yields the keys, texts and numbers in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    elif value is not None and not isinstance(value, bool):
        yield value


def beside_texts(conversation: Conversation) -> Iterator[str]:
    """Yields all words that a template may write beside the messages' texts: of tools, calls, names and arguments."""
    told: list[Any] = [conversation.tools, conversation.template_arguments]
    for message in conversation.messages:
        told += [message.name, message.tool_call_id]
        told += [[call.name, call.arguments, call.id] for call in message.tool_calls]
    yield from (leaf for leaf in leaves(told) if isinstance(leaf, str))


def tool_name(tool: dict[str, Any]) -> str:
    """Returns the name of a tool's definition, in OpenAI's form or bare."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise BadRow("a tool's definition has no name")
    return name


def is_shown(value: Any, text: str) -> bool:
    """Returns whether a key, text or number stands in the rendered text, as it is or as JSON writes it."""
    forms = {str(value), json.dumps(value, ensure_ascii=False).strip('"'), json.dumps(value).strip('"')}
    return any(form in text for form in forms)


def refuse_dropped_call(message: Message, text: str, where: str) -> None:
    """Raises BadRow when a name or an argument of the message's calls does not stand in its rendered text."""
    for call in message.tool_calls:
        if not is_shown(call.name, text):
            raise BadRow(f"the chat template drops the tool calls ({where})")
        if not all(is_shown(leaf, text) for leaf in leaves(call.arguments)):
            raise BadRow(f"the chat template drops or changes an argument of a tool call ({where})")


def prints_python(message: Message, text: str) -> bool:
    """Returns whether the template wrote the arguments as Python prints them, where JSON would look otherwise."""
    return any(
        str(call.arguments) in text and str(call.arguments) != json.dumps(call.arguments, ensure_ascii=False)
        for call in message.tool_calls
        if call.arguments
    )
