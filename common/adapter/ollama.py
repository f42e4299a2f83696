"""A Modelfile for ollama: the chat template in Go's words, what ends an answer, and how answers are drawn.

Ollama knows no Jinja. The model's template is taken apart by rendering it, put together again as a Go template, and
rendered in both ways over several conversations: what does not come out the same is refused.
Source of the words: github.com/ollama/ollama, docs/modelfile.md and docs/template.md.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerFast

from common.adapter.gguf_tokenizer import begins_with_bos
from common.data.chat_format import ChatFormat
from common.recipe import UserError

Messages = list[dict[str, str]]
_TEXTS = {"system": "\ue000Ss\ue001", "user": "\ue000Uu\ue001", "assistant": "\ue000Aa\ue001"}
_CHECKS = ("u", "su", "uau", "suau", "uauau", "suauau")  # conversations, by the first letters of their roles
_ROLES = {"s": "system", "u": "user", "a": "assistant"}


@dataclass(frozen=True)
class Turns:
    """What a template writes before and after each message. `begin`: before the first, where no system message is.

    system_in: "turn", a turn of its own; else the user's turn that it goes into, with system_after between the two.
    """

    begin: str
    system_before: str
    system_after: str
    system_in: Literal["turn", "first", "last"]
    user_before: str
    user_after: str
    assistant_before: str
    assistant_after: str
    answering: str  # after the last message, for the answer

    def render(self, messages: Messages) -> str:
        """What the Go template gives."""
        system = next((m["content"] for m in messages if m["role"] == "system"), "")
        text = f"{self.system_before}{system}{self.system_after}" if system and self.system_in == "turn" else self.begin
        folded = f"{system}{self.system_after}" if system and self.system_in != "turn" else ""
        for index, message in enumerate(messages):
            last = index == len(messages) - 1
            if message["role"] == "user":
                here = folded if (last if self.system_in == "last" else index <= 1) else ""
                text += self.user_before + here + message["content"] + self.user_after + self.answering * last
            elif message["role"] == "assistant":
                text += self.assistant_before + message["content"] + self.assistant_after * (not last)
        return text

    def go_template(self) -> str:
        system, folded = "", ""
        if self.system_in == "turn":
            system = f"{{{{ if .System }}}}{self.system_before}{{{{ .System }}}}{self.system_after}{{{{ else }}}}"
            system += f"{self.begin}{{{{ end }}}}"
        else:
            where = "$last" if self.system_in == "last" else "(le $i 1)"
            folded = f"{{{{ if and $.System {where} }}}}{{{{ $.System }}}}{self.system_after}{{{{ end }}}}"
            system = self.begin
        return (
            f"{system}{{{{ range $i, $message := .Messages }}}}"
            "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ if eq .Role "user" }}}}{self.user_before}{folded}{{{{ .Content }}}}{self.user_after}'
            f"{{{{ if $last }}}}{self.answering}{{{{ end }}}}"
            f'{{{{ else if eq .Role "assistant" }}}}{self.assistant_before}{{{{ .Content }}}}'
            f"{{{{ if not $last }}}}{self.assistant_after}{{{{ end }}}}"
            "{{ end }}{{ end }}"
        )


def take_apart(tokenizer: PreTrainedTokenizerFast) -> Turns:
    """The model's template as Turns, BOS left out: ollama adds it. Raises UserError when it is more than that."""
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template, and ollama needs one; take FORMAT=gguf")

    def render(roles: str, answering: bool = True) -> str:
        messages = [{"role": _ROLES[role], "content": _TEXTS[_ROLES[role]]} for role in roles]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
        return text.removeprefix(tokenizer.bos_token) if with_bos else text

    def pieces(text: str) -> list[str]:
        return re.split("|".join(_TEXTS.values()), text)

    too_much = "the chat template cannot be put in ollama's words: it is more than turns; take FORMAT=gguf"
    try:
        with_bos = begins_with_bos(tokenizer)
        first, user_after = pieces(render("u", answering=False))
        answered = pieces(render("ua", answering=False))[-1]
        _, between, again, asked = pieces(render("uau"))
        user_before = again.removeprefix(answered)
        turns = {
            "begin": first.removesuffix(user_before),
            "user_before": user_before,
            "user_after": user_after,
            "assistant_before": between.removeprefix(user_after),
            "assistant_after": answered,
            "answering": asked.removeprefix(user_after),
        }
        before, after, _ = pieces(render("su"))
        own = Turns(system_before=before, system_after=after.removesuffix(user_before), system_in="turn", **turns)
        candidates = [
            own,
            *(Turns(system_before="", system_after=after, system_in=w, **turns) for w in ("first", "last")),
        ]
        wanted = [render(roles) for roles in _CHECKS]
    except (TemplateError, ValueError) as error:  # it refuses a conversation, or drops or repeats a message
        raise UserError(too_much) from error
    for candidate in candidates:
        checks = [[{"role": _ROLES[r], "content": _TEXTS[_ROLES[r]]} for r in roles] for roles in _CHECKS]
        if [candidate.render(messages) for messages in checks] == wanted:
            return candidate
    raise UserError(too_much)


def modelfile(gguf_name: str, tokenizer: PreTrainedTokenizerFast, generation: GenerationConfig, context: int) -> str:
    """The Modelfile beside a GGUF file. context: tokens that ollama shall make room for."""
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    ids = {ChatFormat(tokenizer).end_of_turn_id(), *ends} - {None}
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{take_apart(tokenizer).go_template()}"""']
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(index)}"' for index in sorted(ids)]
    lines.append(f"PARAMETER num_ctx {context}")
    drawn: dict[str, Any] = {name: getattr(generation, name, None) for name in ("temperature", "top_p", "top_k")}
    if not generation.do_sample:
        drawn = {"temperature": 0}
    lines += [f"PARAMETER {name} {value}" for name, value in drawn.items() if value is not None]
    return "\n".join(lines) + "\n"
