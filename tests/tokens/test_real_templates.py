"""What holds with the tokenizers and the chat templates that people fine-tune with: a run trains what chat then asks.

Chat and evaluation give the model the prompt that the template makes, and the model goes on from there. So training
begins with the first token after that prompt, whatever its text, and ends with the token that generation stops at.
"""

import re
from dataclasses import replace
from functools import cache, partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.conversations.conversation import Conversation, Message
from common.tokens.chat_format import IGNORED, ChatFormat, Tokens
from common.tokens.stop_ids import stop_ids
from common.tokens.turns import WRITTEN_LATER
from tests.conftest import ROOT
from tests.real_tokenizers import TRL_TEMPLATES, real_tokenizer

# As the hub's templates of Mistral 7B v0.1 to v0.3 and Nemo, in small. SentencePiece's versions have a space before an
# answer, and some one before and after a user's text too.
MISTRAL_7B = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""
MISTRAL_7B_SPACED = MISTRAL_7B.replace("+ '[/INST]'", "+ ' [/INST]'")
MISTRAL_NEMO = MISTRAL_7B.replace("'[INST] '", "'[INST]'").replace("' ' + ", "")
OURS = {path.stem: path.read_text() for path in (ROOT / "models" / "chat_templates").glob("*.jinja")}

# Tokenizer, and the templates that it is used with by name. None: the template that comes with the tokenizer.
PAIRS = [
    *(("llama3", name, TRL_TEMPLATES[name]) for name in ("llama3", "llama3_1", "llama3_2")),
    ("qwen2_5", "qwen2_5", TRL_TEMPLATES["qwen2_5"]),
    ("qwen3", "ours", OURS["qwen3"]),
    *(("qwen3", name, TRL_TEMPLATES[name]) for name in ("qwen3", "qwen3_instruct_2507", "qwen3_vl", "qwen3_5_nothink")),
    *(("qwen3", name, TRL_TEMPLATES[name]) for name in ("qwen3_5_think", "qwen3_6", "qwen3_8")),
    ("mistral_v1", "7b", MISTRAL_7B),
    ("mistral_v1", "7b_spaced", MISTRAL_7B_SPACED),
    ("mistral_v3_prepend", "7b", MISTRAL_7B),
    ("mistral_v3", "7b", MISTRAL_7B),
    ("mistral_v3", "7b_spaced", MISTRAL_7B_SPACED),
    ("mistral_v3", "ours", OURS["mistral_v3"]),
    ("tekken", "nemo", MISTRAL_NEMO),
    ("tekken", "ours", OURS["mistral_tekken"]),
    ("smollm2", "its own", None),
]
NAMED = [pytest.param(tokenizer, text, id=f"{tokenizer}-{name}") for tokenizer, name, text in PAIRS]
QUICK = [
    case for case in NAMED if case.id in ("qwen2_5-qwen2_5", "mistral_v3-7b", "mistral_v3-ours", "smollm2-its own")
]

ANSWERS = [
    *("Yes, of course.", "no", "a", "É vero.", "Да", "مرحبا", "你好,世界", "日本語です。", "안녕하세요", "▁"),
    *("e\u0301", "42", "3.14 is pi.", "-1", "1. one\n2. two", '"Quoted," he said.', "'single'", "»So«"),
    *("(in brackets)", "...", "🙂 hello", "👩\u200d👩\u200d👧", " begins with a space", "  with two"),
    *("ends in a space ", "a  b   c", "\nbegins with a line", "\n\nwith two", "ends in a line\n", "\tdef f():"),
    *("def f(x):\n    return x", "$x^2$", "# Heading\n\nText", "*stars*", "```python\nprint(1)\n```"),
    *('{"a": [1, 2]}', "<b>bold</b>"),
]


@cache
def chat_format(tokenizer: str, template: str | None) -> ChatFormat:
    return ChatFormat(real_tokenizer(tokenizer, template))


def chat(*answers: str, question: str = "What is it?", system: str | None = None) -> Conversation:
    """A conversation in which the user asks one thing and is given these answers in turn."""
    messages = [] if system is None else [Message("system", system)]
    for answer in answers:
        messages += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(messages))


def trained_spans(tokens: Tokens) -> list[tuple[int, int]]:
    """Where the tokens stand that are trained: start and end of each piece of them."""
    is_trained = [label != IGNORED for label in tokens.labels]
    edges = [
        i
        for i, (before, here) in enumerate(zip([False, *is_trained], [*is_trained, False], strict=True))
        if before != here
    ]
    return list(zip(edges[0::2], edges[1::2], strict=True))


def prompts_before(
    made_by: ChatFormat, conversation: Conversation, turn: int, notes: tuple[str, ...]
) -> list[list[int]]:
    """The prompts that chat may give before this message: with the template's default, and with what a note names."""
    asked = replace(conversation, messages=conversation.messages[:turn])
    switched = [value for value in (True, False) if any(f"enable_thinking={value}" in note for note in notes)]
    if WRITTEN_LATER in notes:
        # Mistral has system message and tools with the user's last turn: what follows earlier ones is trained without.
        if any(message.role == "user" for message in conversation.messages[turn:]):
            asked = replace(asked, messages=tuple(m for m in asked.messages if m.role != "system"), tools=())
    arguments = [asked.template_arguments, *({"enable_thinking": value} for value in switched)]
    return [made_by.prompt_ids(replace(asked, template_arguments=one)) for one in arguments]


def check(made_by: ChatFormat, conversation: Conversation) -> None:
    """Asserts that what is trained is what follows the prompts that chat would give, up to a token that ends it."""
    tokens = made_by.encode(conversation)
    turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    prompts = [prompts_before(made_by, conversation, turn, tokens.notes) for turn in turns]
    spans, stops = trained_spans(tokens), stop_ids(made_by.tokenizer, None)
    for start, end in spans:
        assert any(tokens.input_ids[:start] == prompt for several in prompts for prompt in several), (
            f"training begins at {start}, prompts end at {[len(prompt) for several in prompts for prompt in several]}: "
            f"{made_by.tokenizer.convert_ids_to_tokens(tokens.input_ids[:end])[-12:]}"
        )
        is_stop = [token in stops for token in tokens.input_ids[start:end]]
        assert is_stop == [False] * (end - start - 1) + [True]
    # The last answer is always trained. Where a template writes earlier ones as no prompt asks for them, it is said.
    assert spans and spans[-1][0] in map(len, prompts[-1])
    assert len(spans) == len(turns) or tokens.notes
    assert [end for _, end in spans] == tokens.turn_ends


@pytest.mark.parametrize(("tokenizer", "template"), NAMED)
@pytest.mark.parametrize("answer", ANSWERS, ids=ascii)
def test_training_begins_where_the_prompt_ends(tokenizer, template, answer):
    check(chat_format(tokenizer, template), chat(answer))


@pytest.mark.parametrize(("tokenizer", "template"), NAMED)
def test_so_does_it_in_each_of_several_turns(tokenizer, template):
    check(chat_format(tokenizer, template), chat(*ANSWERS))


@pytest.mark.parametrize(("tokenizer", "template"), NAMED)
def test_the_ids_are_those_of_the_whole_text_where_no_token_reaches_over_the_prompts_end(tokenizer, template):
    made_by = chat_format(tokenizer, template)
    for answer in ANSWERS:
        question, told = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}
        whole = made_by.tokenizer.apply_chat_template([question, told], tokenize=False)
        prompt = made_by.tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        expected = made_by.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = made_by.encode(chat(answer)).input_ids
        if any(start < len(prompt) < end for start, end in expected["offset_mapping"]):
            assert whole[len(prompt)].isspace()  # as a line break that a token of two holds with the template's own
            decode = partial(made_by.tokenizer.decode, clean_up_tokenization_spaces=False)
            assert decode(ids) == decode(expected["input_ids"])
        else:
            assert ids == expected["input_ids"]


TEXT = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=30)
TEXT |= st.tuples(st.sampled_from(ANSWERS), st.sampled_from(["", *ANSWERS])).map("".join)
# Tags of thoughts and tools are read by the templates themselves.
TEXT = TEXT.filter(lambda text: text.strip() and not re.search("think>|tool_", text))


@pytest.mark.parametrize(("tokenizer", "template"), NAMED)
@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.none() | TEXT)
def test_training_begins_where_the_prompt_ends_whatever_is_said(tokenizer, template, turns, system):
    messages = [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    if system is not None and template not in (MISTRAL_7B, MISTRAL_7B_SPACED, MISTRAL_NEMO):  # which have none
        messages.insert(0, Message("system", system))
    check(chat_format(tokenizer, template), Conversation(tuple(messages)))
