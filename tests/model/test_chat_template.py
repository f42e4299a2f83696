"""The template to train with: Mistral's keeps a system message, and one that writes today's date writes one date."""

import json
import shutil
from dataclasses import replace
from datetime import date, datetime, timedelta

import pytest

from common.conversations.conversation import Conversation, Message, ToolCall
from common.model.chat_template import better_template, fix_date
from common.model.loading import load_tokenizer
from common.recipe import ModelSpec, UserError
from common.sources.source_row import BadRow
from common.tokens.chat_format import ChatFormat
from tests.conftest import ROOT
from tests.real_tokenizers import TRL_TEMPLATES
from tests.tokens.test_chat_format import llama3, make_tokenizer, trained_text

OURS = {
    name: (ROOT / "models" / "chat_templates" / f"{name}.jinja").read_text()
    for name in ("mistral_v3", "mistral_tekken")
}
SPACE, NO_SPACE = " ", ""


def dropping(space: str, condition: str = "loop.last") -> str:
    """A template with the fault of Mistral 7B v0.3's and Nemo's: a system message is written into the last message."""
    return (
        "{{- bos_token -}}{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}"
        "{%- set messages = messages[1:] -%}{%- endif -%}{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}{{- '[INST]" + space + "' -}}"
        "{%- if system is defined and " + condition + " -%}{{- system + '\n\n' -}}{%- endif -%}"
        "{{- message.content + '[/INST]' -}}"
        "{%- else -%}{{- '" + space + "' + message.content + eos_token -}}{%- endif -%}{%- endfor -%}"
    )


def small_mistral(template: str, *more: str):
    return make_tokenizer(template, "<s>", "</s>", "[INST]", "[/INST]", *more, bos="<s>", eos="</s>")


@pytest.mark.parametrize(
    ("name", "ours"),
    [("mistral_v3", "mistral_v3"), ("tekken", "mistral_tekken"), ("mistral_v3_prepend", "mistral_tekken")],
)
def test_a_mistral_template_that_drops_a_system_message_gets_ours_for_its_tokenizer(real_tokenizer, name, ours):
    faulty = real_tokenizer(name, dropping(SPACE if name == "mistral_v3" else NO_SPACE))
    assert better_template(faulty) == f"models/chat_templates/{ours}.jinja"
    assert better_template(real_tokenizer(name, OURS[ours])) is None


@pytest.mark.parametrize(
    "tokenizer",
    [
        small_mistral(dropping(SPACE, "true")),  # in each of the user's turns
        small_mistral(dropping(SPACE, "false")),  # nowhere, not even in a prompt: no such fault
        small_mistral("{{ raise_exception('no system message') }}"),
        small_mistral("{% if %}"),
        small_mistral(dropping(SPACE), "[SYSTEM_PROMPT]"),  # a later format
        make_tokenizer(dropping(SPACE), "<s>", "</s>", bos="<s>", eos="</s>"),  # v1: [INST] is plain text
        llama3(),
    ],
    ids=["sound", "never writes it", "refuses it", "no jinja", "later format", "v1", "llama3"],
)
def test_any_other_template_is_left_alone(tokenizer):
    assert better_template(tokenizer) is None


@pytest.fixture
def model(small_llama, tmp_path):
    """model(tokenizer): a folder with a model that has it."""

    def save(tokenizer):
        shutil.copytree(small_llama, tmp_path / "model", ignore=shutil.ignore_patterns("token*", "*.jinja"))
        tokenizer.save_pretrained(tmp_path / "model")
        return ModelSpec(str(tmp_path / "model"))

    return save


def test_ours_is_taken_when_the_tokenizer_is_loaded_and_a_line_says_so(model, capsys):
    spec = model(small_mistral(dropping(NO_SPACE), "<pad>"))
    assert load_tokenizer(spec).chat_template == OURS["mistral_tekken"]
    assert capsys.readouterr().out == (
        f"the chat template of {spec.name} drops a system message where an answer follows: "
        "models/chat_templates/mistral_tekken.jinja is taken\n"
    )


def test_a_template_that_the_recipe_names_is_taken_as_it_is(model, tmp_path, capsys):
    spec = model(small_mistral(dropping(NO_SPACE), "<pad>"))
    (tmp_path / "mine.jinja").write_text(dropping(SPACE))
    chosen = ModelSpec(spec.name, chat_template=str(tmp_path / "mine.jinja"))
    assert load_tokenizer(chosen).chat_template == dropping(SPACE)
    assert capsys.readouterr().out == ""


def test_ours_stays_what_it_is_beside_an_adapter(model, tmp_path, capsys):
    tokenizer = load_tokenizer(model(small_mistral(dropping(NO_SPACE), "<pad>")))
    capsys.readouterr()
    tokenizer.save_pretrained(tmp_path / "adapter")
    base = ModelSpec(str(tmp_path / "model"))
    assert load_tokenizer(ModelSpec(str(tmp_path / "adapter")), base).chat_template == OURS["mistral_tekken"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["mistral_v3", "tekken"])
def test_a_system_message_is_trained_on_before_the_last_turn_of_the_user(real_tokenizer, name):
    tokenizer = real_tokenizer(name, OURS["mistral_v3" if name == "mistral_v3" else "mistral_tekken"])
    chat = [
        Message("system", "Be brief."),
        Message("user", "Hello"),
        Message("assistant", "Hi!"),
        Message("user", "Bye"),
        Message("assistant", "So long."),
    ]
    tokens = ChatFormat(tokenizer).encode(Conversation(tuple(chat)))
    space = " " if name == "mistral_v3" else ""
    assert tokenizer.decode(tokens.input_ids) == (
        f"<s>[INST]{space}Hello[/INST]{space}Hi!</s>[INST]{space}Be brief.\n\nBye[/INST]{space}So long.</s>"
    )
    assert "Be brief." not in trained_text(tokenizer, tokens)
    assert len(tokens.turn_ends) == 2


CLOCKED = {  # name of a template of TRL's wheel, and how it writes the third of February 2020
    "llama3_2": "03 Feb 2020",
    "gptoss": "2020-02-03",
    "muse_glimmer": "2020-02-03",
}
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
TODAY = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"


@pytest.mark.parametrize("name", CLOCKED)
def test_a_template_that_writes_todays_date_writes_the_date_that_it_is_given(name):
    tokenizer = llama3()
    tokenizer.chat_template = TRL_TEMPLATES[name]
    live = tokenizer.apply_chat_template(CHAT, tokenize=False)
    tokenizer.chat_template = fix_date(TRL_TEMPLATES[name], date(2020, 2, 3))
    fixed = tokenizer.apply_chat_template(CHAT, tokenize=False)
    today = date.today().strftime("%d %b %Y" if name == "llama3_2" else "%Y-%m-%d")
    assert fixed == live.replace(today, CLOCKED[name])


@pytest.mark.parametrize("name", sorted(TRL_TEMPLATES.keys() - {*CLOCKED, "gptoss_training", "muse_glimmer_training"}))
def test_a_template_that_writes_no_date_stays_as_it_is(name):
    assert fix_date(TRL_TEMPLATES[name], date(2020, 2, 3)) == TRL_TEMPLATES[name]


def test_a_date_that_was_fixed_once_stays():
    fixed = fix_date(TODAY, date(2020, 2, 3))
    assert fix_date(fixed, date(2021, 1, 1)) == fixed


def test_a_row_that_names_its_own_date_keeps_it():
    tokenizer = llama3()
    tokenizer.chat_template = fix_date(TRL_TEMPLATES["llama3_2"], date(2020, 2, 3))
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, date_string="1 May 1890")
    assert "1 May 1890" in text
    assert "2020" not in text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("strftime_now('%A, %d.%m.%y')", "Monday, 03.02.20"),
        ('strftime_now( "%Y" ) + strftime_now("%m")', "202002"),
        ("strftime_now('it\\'s') if false else strftime_now('%Y')", None),
        ("strftime_now(form)", None),
        ("strftime_now(format='%Y')", None),
    ],
)
def test_every_form_of_the_date_that_is_written_in_the_call_is_known(call, text):
    tokenizer, template = llama3(), "{% set form = '%Y' %}{{ " + call + " }}"
    if text is None:
        with pytest.raises(UserError, match="writes today's date in a form that it computes"):
            fix_date(template, date(2020, 2, 3))
        return
    tokenizer.chat_template = fix_date(template, date(2020, 2, 3))
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text


EVENING = datetime(2026, 11, 27, 23, 59)


def test_rows_after_midnight_are_tokenised_as_those_before(model, clock):
    clock(EVENING)
    tokenizer = llama3()
    tokenizer.chat_template = TRL_TEMPLATES["llama3_2"]
    tokenizer.add_special_tokens({"pad_token": "<|finetune_right_pad_id|>"})
    tokenizer = load_tokenizer(model(tokenizer))
    chat_format, chat = ChatFormat(tokenizer), Conversation((Message("user", "Hello"), Message("assistant", "Hi!")))
    before = chat_format.encode(chat)
    clock(EVENING + timedelta(minutes=2))
    after = chat_format.encode(chat)
    other = chat_format.encode(Conversation((Message("system", "x"), *chat.messages)))
    assert before == after == ChatFormat(tokenizer).encode(chat)
    assert "Today Date: 27 Nov 2026" in tokenizer.decode(before.input_ids)
    assert "Today Date: 27 Nov 2026" in tokenizer.decode(other.input_ids)


@pytest.mark.parametrize(("given", "written"), [(None, "27 Nov 2026"), ("1999-12-31", "31 Dec 1999")])
def test_the_date_is_todays_or_the_recipes(model, clock, given, written):
    clock(EVENING)
    tokenizer = make_tokenizer(TODAY, "<|eot_id|>", "<pad>", bos=None, eos="<|eot_id|>")
    spec = model(tokenizer)
    loaded = load_tokenizer(ModelSpec(spec.name, template_date=given))
    clock(EVENING + timedelta(days=30))
    assert loaded.apply_chat_template(CHAT, tokenize=False).startswith(written)


@pytest.mark.parametrize("day", ["27 Nov 2026", "2026-13-01", "20261127", ""])
def test_a_date_that_is_none_is_refused(day):
    with pytest.raises(UserError, match=r"ModelSpec.template_date is .*; write it as '2026-11-27'"):
        ModelSpec("owner/model", template_date=day)


def test_the_readmes_first_example_is_learnt_by_mistral(real_tokenizer):
    row = next(line for line in (ROOT / "docs" / "data.md").read_text().splitlines() if line.startswith('{"messages"'))
    messages = [Message(m["role"], m["content"]) for m in json.loads(row)["messages"]]
    tokenizer = real_tokenizer("mistral_v3", OURS["mistral_v3"])
    tokens = ChatFormat(tokenizer).encode(Conversation(tuple(messages)))
    assert tokenizer.decode(tokens.input_ids) == "<s>[INST] Be brief.\n\nHello[/INST] Hi!</s>"


CALL = Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Köln"}, "abcdefghi"),))
WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("result", ["sunny", '{"degrees": 22}', "[1]", "22", "true", 'a "quote"\n', "{", ""])
@pytest.mark.parametrize("system", [(), (Message("system", "Be brief."),)], ids=["", "with system"])
def test_mistral_calls_tools_in_earlier_turns_too(real_tokenizer, system, result):
    tokenizer = real_tokenizer("mistral_v3", OURS["mistral_v3"])
    asked = (Message("user", "q"), CALL, Message("tool", result, tool_call_id="abcdefghi"), Message("assistant", "ok"))
    chat = Conversation((*system, *asked, Message("user", "x"), Message("assistant", "y")), tools=(WEATHER,))
    tokens = ChatFormat(tokenizer).encode(chat)
    written = result if result[-1:] in list("}]2e") else json.dumps(result)
    text = tokenizer.decode(tokens.input_ids)
    assert f'[TOOL_RESULTS] {{"content": {written}, "call_id": "abcdefghi"}}[/TOOL_RESULTS]' in text
    assert '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln"}, "id": "abcdefghi"}]</s>' in text
    assert ("Be brief.\n\nx[/INST]" in text) == bool(system)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((Message("user", "q"), replace(CALL, content="I look.")), "either says something or calls tools"),
        ((Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")), "no two answers in a row"),
    ],
)
def test_what_mistral_has_no_words_for_is_refused(real_tokenizer, messages, reason):
    tokenizer = real_tokenizer("mistral_v3", OURS["mistral_v3"])
    with pytest.raises(BadRow, match=reason):
        ChatFormat(tokenizer).encode(Conversation(messages))
