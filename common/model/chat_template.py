"""The chat template that a run trains with: one text, which keeps a system message and writes one date.

Whatever comes later (training, chat, merge, GGUF) renders with this text: it is saved beside the adapter.
"""

import json
import re
from datetime import date

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from common import REPOSITORY
from common.machine.paths import local_path
from common.recipe import ModelSpec, UserError

DEFAULT_TEMPLATE = "default"  # transformers' name of a model's template where it has several
OUR_TEMPLATES = "models/chat_templates"
_CLOCK = re.compile(r"\bstrftime_now\s*\(")  # transformers' function for templates that write today's date
_CLOCK_FORMAT = re.compile(r"""\bstrftime_now\s*\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")
_FIXED_CLOCK = "macro strftime_now("


def choose_chat_template(tokenizer: PreTrainedTokenizerFast, spec: ModelSpec) -> None:
    """Gives the tokenizer the one chat template to train with: the recipe's file, else the model's own.

    Of the model's own, the default one of several; one of ours where it drops system messages, which is printed. A
    template that writes today's date writes `spec.template_date`. Raises UserError where there is no such file, where
    none of several is the default, and where the date is asked for in a form that cannot be found.
    """
    if spec.chat_template is not None:
        path = local_path(spec.chat_template)
        if not path.is_file():
            raise UserError(f"ModelSpec.chat_template: there is no file {path}")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = _default_template(tokenizer.chat_template, spec.name)
    if not tokenizer.chat_template:
        return
    if spec.chat_template is None and (ours := better_template(tokenizer)):
        print(f"the chat template of {spec.name} drops a system message where an answer follows: {ours} is taken")
        tokenizer.chat_template = (REPOSITORY / ours).read_text(encoding="utf-8")
    day = date.fromisoformat(spec.template_date) if spec.template_date else date.today()
    tokenizer.chat_template = fix_date(tokenizer.chat_template, day)


def _default_template(templates: dict[str, str], name: str) -> str:
    """The template "default" of several named ones, as transformers takes where no tools are given. Prints which.

    Raises UserError where none has that name. Whatever comes later sees one template.
    """
    if DEFAULT_TEMPLATE not in templates:
        raise UserError(
            f"{name} has {len(templates)} chat templates ({', '.join(sorted(templates))}) and none is the default; "
            "write the one to train with into a file: ModelSpec(chat_template='my_template.jinja')"
        )
    others = ", ".join(sorted(templates.keys() - {DEFAULT_TEMPLATE}))
    if others:
        print(f"of the chat templates of {name} the default one is taken, not {others}")
    return templates[DEFAULT_TEMPLATE]


def better_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Returns the path of our template for a Mistral tokenizer of the v3 format whose own drops system messages.

    The templates of Mistral 7B v0.3 and Nemo put a system message into the user's turn when that turn is the last
    message: in a prompt, never in a conversation to train on. None for another tokenizer, and for a sound template.
    """
    control = set(tokenizer.all_special_tokens) | {
        t.content for t in tokenizer.added_tokens_decoder.values() if t.special
    }
    # Later formats have a control token for the system message, and v1 has none at all.
    if not {"[INST]", "[/INST]"} <= control or "[SYSTEM_PROMPT]" in control:
        return None
    system = "\ue000a system message\ue001"  # characters for private use, which no template writes itself
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "Hi"}], tokenize=False)
    except (TemplateError, TypeError):  # it takes no system message at all, or is broken: ChatFormat says why
        return None
    if system not in prompt or system in whole:
        return None
    # The space after a control token is part of the first word, unless the tokenizer puts one there by itself.
    takes_space = tokenizer.tokenize("[INST] a") == ["[INST]", "▁a"]
    return f"{OUR_TEMPLATES}/{'mistral_v3' if takes_space else 'mistral_tekken'}.jinja"


def fix_date(template: str, day: date) -> str:
    """Returns the template with this date in place of today's; as it is where it writes none.

    strftime_now becomes a macro at its head. A row that names its own date (date_string of Llama 3.2) keeps that.
    Raises UserError where the form of the date is not written in the call.
    """
    calls = len(_CLOCK.findall(template))
    if not calls or _FIXED_CLOCK in template:
        return template
    formats = [double or single for double, single in _CLOCK_FORMAT.findall(template)]
    if len(formats) < calls:
        raise UserError(
            "the chat template writes today's date in a form that it computes, and a run has one date: write the date "
            "into the template, in a file of yours: ModelSpec(chat_template='my_template.jinja')"
        )
    texts = json.dumps({text: day.strftime(text) for text in formats})
    reason = "{#- Prompts have the date on which the training began, not today's. -#}"
    return f"{reason}\n{{%- {_FIXED_CLOCK}format) -%}}{{{{- {texts}[format] -}}}}{{%- endmacro -%}}\n{template}"
