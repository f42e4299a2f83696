"""What a row becomes, whatever its format: a conversation, with all that a template can say, plain text, or answers."""

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant calls."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None  # which the tool's result refers to


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str  # "" where there is none: a call of a tool says nothing else, a system message may be empty
    reasoning: str | None = None  # the assistant's thoughts before the content; None has none
    tool_calls: tuple[ToolCall, ...] = ()  # the assistant's, after the content
    name: str | None = None  # of the tool whose result this is
    tool_call_id: str | None = None  # of the call whose result this is
    is_trained: bool = True  # False: the data says not to learn it; says nothing of a turn that is not the assistant's


@dataclass(frozen=True)
class Conversation:
    """Messages in their order, and what else the chat template is told."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()  # what the assistant may call, each as JSON schema of a function
    template_arguments: dict[str, Any] = field(default_factory=dict)  # of the template, as enable_thinking


@dataclass(frozen=True)
class Preference:
    """A better and a worse answer to the same prompt, or one answer that is rated good or bad.

    conversations: each the prompt and one answer, of which the answer alone is trained: the chosen one, then the
    rejected one; or the rated one. signs: for each, 1 where it is chosen or good, -1 where it is rejected or bad.
    """

    conversations: tuple[Conversation, ...]
    signs: tuple[int, ...]


Example = Conversation | str  # a str is plain text, all of which is trained
AnyExample = Example | Preference
