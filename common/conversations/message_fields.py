"""Where a message has its role, its text and what else is read of it, and which role its name of one means."""

from functools import lru_cache
from typing import Any, NamedTuple

from common.sources.formats import MEDIA_KEYS, fold_names, quoted
from common.sources.learn_flags import LEARN_FLAGS, UNCLEAR_FLAGS
from common.sources.source_row import BadRow, readable

# What others call the four roles. A call is a turn of the assistant whose text is the call as JSON.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
TOOL_FIELDS = ("tool_calls", "function_call", "name", "tool_call_id")
USED_FIELDS = (*THOUGHT_FIELDS, *TOOL_FIELDS, "tools", *LEARN_FLAGS, *UNCLEAR_FLAGS, *MEDIA_KEYS)
_PAIRS = (("input", "output"), ("human", "assistant"), ("user", "assistant"))  # Capybara's and XTuner's; ms-swift's


class Fields(NamedTuple):
    """Where a message has what is read of it: for each, the name as it stands there."""

    role: str
    content: str
    others: dict[str, str]  # from a field's own name
    unread: tuple[str, ...]


@lru_cache(maxsize=256)
def find_style(names: tuple[str, ...]) -> tuple[bool, tuple[str, str] | None]:
    """Whether messages with these names have a role, and the names of the two sides where an object holds both."""
    folded = set(fold_names(names))
    pair = None if folded & {"role", "from"} else next((pair for pair in _PAIRS if folded.issuperset(pair)), None)
    return "role" in folded, pair


@lru_cache(maxsize=256)  # the messages of a file have a few sets of names
def find_message_fields(names: tuple[str, ...], by_role: bool) -> Fields:
    folded = fold_names(names)
    role_key, content_keys = (
        ("role", ("content", "value", "text")) if by_role else ("from", ("value", "content", "text"))
    )
    content_key = next((key for key in content_keys if key in folded), content_keys[0])
    for key in (role_key, content_key, *USED_FIELDS):
        if (count := folded.count(key)) > 1:
            same = [name for name, other in zip(names, folded, strict=True) if other == key]
            raise BadRow(f"{count} keys of a message could be {key!r}: {same!r:.80}; leave one")
    if role_key not in folded:
        raise BadRow(f"a message has no role; its keys are {quoted(names)}")
    name_of = dict(zip(folded, names, strict=True))
    others = {key: name_of[key] for key in USED_FIELDS if key in name_of}
    used = {role_key, content_key, *others}
    unread = tuple(name for name, key in zip(names, folded, strict=True) if key not in used)
    return Fields(name_of[role_key], name_of.get(content_key, content_key), others, unread)


def read_role(value: Any) -> str:
    """The role that a message's name of it means, or "call". Raises BadRow."""
    if value is None:
        raise BadRow("a message has no role")
    role = ROLES.get(value) or ROLES.get(value.strip().lower()) if isinstance(value, str) else None
    if role is None:
        readable(value)
        raise BadRow(f"role {value!r:.40} is none of {', '.join(ROLES)}")
    return role
