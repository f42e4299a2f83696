"""Writes a Modelfile for ollama: the chat template as a Go template, the stop tokens, and how answers are sampled.

ollama renders Go templates, not Jinja. So the Jinja template renders conversations whose messages are marker texts;
what stands between the markers is what the template writes around a message (Turns). From these pieces a Go template
is built. It is taken only if it gives the same text as the Jinja template for several conversations.
Syntax: github.com/ollama/ollama, docs/modelfile.md and docs/template.md.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from common.adapter.gguf_tokenizer import begins_with_bos
from common.adapter.sampling import translate_sampling, untranslated
from common.recipe import UserError

Messages = list[dict[str, str]]
# What a message says while a template is examined: characters for private use, which no template writes itself.
_MARKERS = {"system": "\ue000Ss\ue001", "user": "\ue000Uu\ue001", "assistant": "\ue000Aa\ue001"}
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_CHECKED_CONVERSATIONS = ("u", "su", "uau", "suau", "uauau", "suauau")  # each letter stands for a message of _ROLES


@dataclass(frozen=True)
class Turns:
    """The text that a chat template writes around the messages of a conversation."""

    begin: str  # before the first message of a conversation without a system message
    system_before: str
    system_after: str  # in a user's turn: between the system message and the user's
    system_in: Literal["turn", "first", "last"]  # a turn of its own, or part of the first or the last user's turn
    user_before: str
    user_after: str
    assistant_before: str
    assistant_after: str
    answering: str  # after the last message: where the answer begins

    def render(self, messages: Messages) -> str:
        """Renders a conversation as the Go template does."""
        system = next((m["content"] for m in messages if m["role"] == "system"), "")
        text = f"{self.system_before}{system}{self.system_after}" if system and self.system_in == "turn" else self.begin
        folded = f"{system}{self.system_after}" if system and self.system_in != "turn" else ""
        for index, message in enumerate(messages):
            last = index == len(messages) - 1
            if message["role"] == "user":
                takes_system = last if self.system_in == "last" else index <= 1  # 1: message 0 is the system's
                text += self.user_before + (folded if takes_system else "") + message["content"] + self.user_after
                text += self.answering if last else ""
            elif message["role"] == "assistant":
                text += self.assistant_before + message["content"] + ("" if last else self.assistant_after)
        return text

    def go_template(self) -> str:
        """Builds the Go template. `{{ }}` holds Go's actions; everything else is text."""
        start, folded = self.begin, ""
        if self.system_in == "turn":
            system = self.system_before + "{{ .System }}" + self.system_after
            start = "{{ if .System }}" + system + "{{ else }}" + self.begin + "{{ end }}"
        else:
            where = "$last" if self.system_in == "last" else "(le $i 1)"
            folded = "{{ if and $.System " + where + " }}{{ $.System }}" + self.system_after + "{{ end }}"
        user = self.user_before + folded + "{{ .Content }}" + self.user_after
        assistant = self.assistant_before + "{{ .Content }}"
        return (
            start
            + "{{ range $i, $message := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + ('{{ if eq .Role "user" }}' + user + "{{ if $last }}" + self.answering + "{{ end }}")
            + ('{{ else if eq .Role "assistant" }}' + assistant)
            + ("{{ if not $last }}" + self.assistant_after + "{{ end }}")
            + "{{ end }}{{ end }}"
        )


def parse_template(tokenizer: PreTrainedTokenizerFast) -> Turns:
    """Finds the Turns of the model's chat template, without BOS, which ollama adds itself.

    Raises UserError for a model without a template, and for a template that does more than write turns.
    """
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template, and ollama needs one; take FORMAT=gguf")
    refusal = "the chat template cannot be put in ollama's words: it is more than turns; take FORMAT=gguf"
    try:
        wanted = [_render_jinja(tokenizer, roles) for roles in _CHECKED_CONVERSATIONS]
        possible = _possible_turns(tokenizer)
    except (TemplateError, ValueError) as error:  # it refuses a conversation; it drops or repeats a message
        raise UserError(refusal) from error
    for turns in possible:
        if [turns.render(_marker_messages(roles)) for roles in _CHECKED_CONVERSATIONS] == wanted:
            return turns
    raise UserError(refusal)


def _possible_turns(tokenizer: PreTrainedTokenizerFast) -> list[Turns]:
    """What the template may be: one for each place where the system message may stand.

    Raises ValueError when a message does not appear exactly once.
    """

    def pieces(roles: str, *, answering: bool = True) -> list[str]:
        """What the template writes before, between and after the messages: one text more than messages."""
        return re.split("|".join(_MARKERS.values()), _render_jinja(tokenizer, roles, answering=answering))

    start, user_after = pieces("u", answering=False)
    _, _, assistant_after = pieces("ua", answering=False)
    _, user_to_assistant, assistant_to_user, end = pieces("uau")
    before_system, system_to_user, _ = pieces("su")
    user_before = assistant_to_user.removeprefix(assistant_after)
    turns = {
        "begin": start.removesuffix(user_before),
        "user_before": user_before,
        "user_after": user_after,
        "assistant_before": user_to_assistant.removeprefix(user_after),
        "assistant_after": assistant_after,
        "answering": end.removeprefix(user_after),
    }
    after = system_to_user.removesuffix(user_before)
    return [
        Turns(system_in="turn", system_before=before_system, system_after=after, **turns),
        Turns(system_in="first", system_before="", system_after=system_to_user, **turns),
        Turns(system_in="last", system_before="", system_after=system_to_user, **turns),
    ]


def _marker_messages(roles: str) -> Messages:
    return [{"role": _ROLES[role], "content": _MARKERS[_ROLES[role]]} for role in roles]


def _render_jinja(tokenizer: PreTrainedTokenizerFast, roles: str, *, answering: bool = True) -> str:
    """Renders a conversation of markers with the model's template, without BOS. answering: up to an answer's begin."""
    text: str = tokenizer.apply_chat_template(_marker_messages(roles), tokenize=False, add_generation_prompt=answering)
    return text.removeprefix(tokenizer.bos_token) if begins_with_bos(tokenizer) else text


def build_modelfile(
    gguf_name: str, tokenizer: PreTrainedTokenizerFast, generation: dict[str, Any], context: int
) -> str:
    """The text of the Modelfile beside a GGUF file. context: how many tokens ollama makes room for.

    generation: of trained_generation_config; its eos_token_id has all that end an answer. Raises
    UserError as parse_template, and for a template that no Modelfile can hold.
    """
    template = parse_template(tokenizer).go_template()
    if '"""' in template:
        raise UserError('the chat template holds """, which a Modelfile cannot; take FORMAT=gguf')
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""']
    stops = [tokenizer.decode([index], skip_special_tokens=False) for index in generation["eos_token_id"]]
    given = generation.get("stop_strings") or []
    stops += [given] if isinstance(given, str) else given
    lines += [f"PARAMETER stop {_quote(text)}" for text in stops]
    lines.append(f"PARAMETER num_ctx {context}")
    if generation.get("max_new_tokens"):
        lines.append(f"PARAMETER num_predict {generation['max_new_tokens']}")
    lines += [f"PARAMETER {name} {value}" for name, value in translate_sampling(generation).items()]
    return "\n".join(lines) + "\n"


def ollama_name(name: str) -> str:
    """A name that ollama accepts for a model: of ASCII letters, digits, single dots, - and _; at most 80 of them.

    Source: github.com/ollama/ollama, types/model/name.go. "model" where nothing of `name` is left.
    """
    kept = re.sub(r"[^a-zA-Z0-9_.-]+|\.{2,}", "-", name)[:80].strip("-_.")
    return kept or "model"


def lost_in_modelfile(generation: dict[str, Any]) -> list[str]:
    """A note of what ollama has no parameter for; none where there is nothing."""
    lost = untranslated(generation, also=("stop_strings", "max_new_tokens"))
    return [f"ollama has no parameter for this of the generation config: {', '.join(lost)}"] if lost else []


def _quote(text: str) -> str:
    """A parameter's text as a Modelfile has it."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
