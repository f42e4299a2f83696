"""Where a trained span begins and ends: behind the generation prompt, with the token that generation stops at."""

import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.conversations.conversation import Conversation, Message
from common.recipe import UserError
from common.sources.source_row import BadRow
from common.tokens.chat_format import IGNORED, ChatFormat, Tokens
from tests.tokens.test_chat_format import CHAT, MISTRAL, QWEN3, TEMPLATES, llama3, make_tokenizer, mistral, qwen

# One answer a kind that tokenizers treat differently.
ANSWERS = [
    "Hi",
    "7",
    '"so"',
    "你好",
    "😀",
    " lead",
    "  two",
    "\nnew",
    "\n\nnew",
    "```py\nx = 1\n```",
    "-1",
    "é",
    "end \n",
]
TURNS = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
ASKING = TURNS + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
LLAMA2 = """{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- bos_token + '[INST] ' + m.content | trim + ' [/INST]' -}}
{%- else -%}{{- ' ' + m.content | trim + ' ' + eos_token -}}{%- endif -%}
{%- endfor -%}"""
HEADINGS = """{%- for m in messages -%}
{{- ('### Question:\n' if m.role == 'user' else '### Answer:\n') + m.content -}}
{{- (eos_token if m.role != 'user' else '') + '\n\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Answer:\n' -}}{%- endif -%}"""


def chatml(template: str = ASKING, *, eos: str = "<|end|>", bos: str | None = None) -> PreTrainedTokenizerFast:
    return make_tokenizer(template, "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "</s>", bos=bos, eos=eos)


def sentencepiece(template: str, *, legacy: bool) -> PreTrainedTokenizerFast:
    """Words begin with ▁, as for Llama 2 and Mistral; a legacy tokenizer puts it after control tokens too."""
    words = ["hello", "new", "end", "so", "Hi", "one"]
    pieces = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for word in [*words, *(f"▁{word}" for word in words)]:
        for length in range(2, len(word) + 1):
            if word[:length] not in vocabulary:
                vocabulary[word[:length]] = len(vocabulary)
                merges.append((word[: length - 1], word[length - 1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    control = ["<unk>", "<s>", "</s>", *(["[INST]", "[/INST]"] if not legacy else [])]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


TOKENIZERS = {
    "llama3": llama3,
    "qwen2.5": lambda: qwen((TEMPLATES / "qwen2_5.jinja").read_text()),
    "qwen3": lambda: qwen((TEMPLATES / "qwen3.jinja").read_text()),
    "qwen3 (ours)": lambda: qwen(QWEN3),
    "qwen3.5, thinking": lambda: qwen((TEMPLATES / "qwen3_5_think.jinja").read_text()),
    "mistral": mistral,
    "mistral, sentencepiece": lambda: sentencepiece(MISTRAL, legacy=False),
    "llama2, legacy sentencepiece": lambda: sentencepiece(LLAMA2, legacy=True),
    "headings": lambda: chatml(HEADINGS, eos="</s>"),
    "headings, sentencepiece": lambda: sentencepiece(HEADINGS, legacy=False),
    "headings, legacy sentencepiece": lambda: sentencepiece(HEADINGS, legacy=True),
    "no generation prompt": lambda: chatml(TURNS),
}


def spans(tokens: Tokens) -> list[tuple[int, int]]:
    """Returns start and end of each trained span."""
    trained = [label != IGNORED for label in tokens.labels] + [False]
    starts = [i for i, is_trained in enumerate(trained) if is_trained and not trained[i - 1]]
    return [(start, trained.index(False, start)) for start in starts]


def ask_and(*messages: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in messages))  # type: ignore[arg-type]


def text_of(tokenizer: PreTrainedTokenizerFast, tokens: Tokens) -> list[str]:
    return [tokenizer.decode(tokens.input_ids[start:end]) for start, end in spans(tokens)]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_stands_before_a_trained_span_is_the_prompt_that_chat_gives(name, answer):
    tokenizer = TOKENIZERS[name]()
    chat_format = ChatFormat(tokenizer)
    asked = [("user", "one"), ("assistant", answer), ("user", "1 more")]
    tokens = chat_format.encode(ask_and(*asked, ("assistant", answer)))
    start, end = spans(tokens)[-1]
    assert tokens.input_ids[:start] == chat_format.prompt_ids(ask_and(*asked))
    assert tokens.input_ids[end - 1] == chat_format.end_of_turn_id()
    (one,) = spans(chat_format.encode(ask_and(("user", "one"), ("assistant", answer))))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one"}], tokenize=False, add_generation_prompt=True
    )
    first = chat_format.encode(ask_and(("user", "one"), ("assistant", answer))).input_ids
    assert first[: one[0]] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("answer", ["7", '"so"', "你好"])
def test_the_blank_token_before_an_answer_is_trained_where_the_prompt_does_not_hold_it(answer):
    tokenizer = sentencepiece(MISTRAL, legacy=False)
    tokens = ChatFormat(tokenizer).encode(ask_and(("user", "one"), ("assistant", answer)))
    (span,) = spans(tokens)
    assert tokenizer.convert_ids_to_tokens(tokens.input_ids[span[0] - 1 : span[0] + 1]) == ["[/INST]", "▁"]


@pytest.mark.parametrize("legacy", [False, True])
def test_cutting_a_text_puts_no_blank_into_it(legacy):
    tokenizer = sentencepiece(HEADINGS, legacy=legacy)
    tokens = ChatFormat(tokenizer).encode(ask_and(("user", "one"), ("assistant", "one</s>one")))
    assert text_of(tokenizer, tokens) == ["one</s>one</s>"]


def test_a_header_that_the_prompt_does_not_hold_is_trained():
    tokenizer = chatml(TURNS)
    tokens = ChatFormat(tokenizer).encode(ask_and(("user", "one"), ("assistant", "Hi")))
    assert text_of(tokenizer, tokens) == ["<|assistant|>\nHi<|end|>"]


def test_a_template_that_always_asks_is_trained_as_others_are():
    tokenizer = chatml(TURNS + "{{ '<|assistant|>\n' }}")
    tokens = ChatFormat(tokenizer).encode(ask_and(("user", "one"), ("assistant", "Hi")))
    assert text_of(tokenizer, tokens) == ["Hi<|end|>"]


def test_the_empty_think_block_is_trained_where_the_prompt_does_not_hold_it():
    tokenizer = qwen((TEMPLATES / "qwen3.jinja").read_text())
    question = (Message("user", "one"), Message("assistant", "Hi"))
    asked = ChatFormat(tokenizer).encode(Conversation(question))
    assert text_of(tokenizer, asked) == ["<think>\n\n</think>\n\nHi<|im_end|>"]
    told = ChatFormat(tokenizer).encode(Conversation(question, template_arguments={"enable_thinking": False}))
    assert text_of(tokenizer, told) == ["Hi<|im_end|>"]


def test_an_answer_that_the_template_begins_otherwise_than_its_prompt_is_not_trained():
    chat_format = ChatFormat(qwen((TEMPLATES / "qwen3_5_think.jinja").read_text()))
    tokens = chat_format.encode(Conversation(CHAT))
    assert text_of(chat_format.tokenizer, tokens) == ["\n</think>\n\nSo long<|im_end|>"]
    assert tokens.notes == (
        "answers are not trained that the chat template begins otherwise than its generation prompt",
    )
    template = TURNS + "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>' }}{% endif %}"
    with pytest.raises(BadRow, match="no answer can be trained: the chat template begins them otherwise"):
        ChatFormat(chatml(template)).encode(Conversation(CHAT))


@pytest.mark.parametrize("sides", [("rstrip",), ("lstrip",), ("lstrip", "rstrip")])
def test_control_tokens_that_swallow_blanks_end_a_turn_as_others_do(sides):
    tokenizer = chatml()
    plain = ChatFormat(tokenizer).encode(ask_and(*[("user", "one"), ("assistant", "Hi there")] * 2))
    strips = dict.fromkeys(sides, True)
    tokens = [AddedToken(t, special=True, **strips) for t in ("<|end|>", "<|user|>", "<|assistant|>")]
    tokenizer.backend_tokenizer.add_special_tokens(tokens)
    stripping = ChatFormat(tokenizer)
    found = stripping.encode(ask_and(*[("user", "one"), ("assistant", "Hi there")] * 2))
    assert len(found.input_ids) < len(plain.input_ids)  # the line breaks are gone
    assert [found.input_ids[a:b] for a, b in spans(found)] == [plain.input_ids[a:b] for a, b in spans(plain)]
    assert found.input_ids[: spans(found)[0][0]] == stripping.prompt_ids(ask_and(("user", "one")))


def test_a_turn_that_nothing_closes_is_not_trained_up_to_a_later_token():
    last_only = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    last_only += "{{ '<|assistant|>' if add_generation_prompt else '<|end|>' }}"
    chat_format = ChatFormat(chatml(last_only))
    tokens = chat_format.encode(Conversation(CHAT))
    assert text_of(chat_format.tokenizer, tokens) == ["So long<|end|>"]
    assert tokens.notes == ("earlier answers are not trained: the chat template ends them otherwise than the last one",)


@pytest.mark.parametrize("end", ["", "\n", "<|assistant|>\n"])
def test_a_template_that_closes_no_turn_is_refused(end):
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}" + f"{{{{ {end!r} }}}}"
    template += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    with pytest.raises(UserError, match="without a control token: nothing would stop it"):
        ChatFormat(chatml(template)).encode(ask_and(("user", "one"), ("assistant", "Hi")))


def test_an_end_token_that_is_not_marked_special_ends_turns_and_is_plain_text_in_messages():
    tokenizer = make_tokenizer(ASKING, "<|user|>", "<|assistant|>", "</s>", bos=None, eos="</s>")
    tokenizer.add_tokens([AddedToken("<|end|>", special=False)])
    chat_format = ChatFormat(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    tokens = chat_format.encode(ask_and(("user", "a<|end|>"), ("assistant", "b<|end|>c")))
    assert text_of(tokenizer, tokens) == ["b<|end|>c<|end|>"]
    assert tokens.input_ids.count(end) == 2
    assert chat_format.end_of_turn_id() == end


def test_several_control_tokens_after_an_answer_are_trained_up_to_the_end_of_text():
    template = ASKING.replace("'<|end|>\n'", "'<|end|></s>\n'")
    tokenizer = chatml(template, eos="</s>")
    assert text_of(tokenizer, ChatFormat(tokenizer).encode(Conversation(CHAT))) == [
        "Hi!<|end|></s>",
        "So long<|end|></s>",
    ]


@pytest.mark.parametrize("strip", ["", " | trim", ".strip('\n')", ".lstrip()", ".rstrip()"])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_blanks_that_a_template_strips_on_any_side_for_one_role_are_no_fault(strip, role):
    content = f"(m.content{strip} if m.role == '{role}' else m.content)"
    tokenizer = chatml(ASKING.replace("m.content", content))
    chat = ask_and(("user", "\n\n one \n"), ("assistant", " \n Hi\n\n"), ("user", "one"), ("assistant", "\nHi"))
    messages = [{"role": m.role, "content": m.content} for m in chat.messages]
    tokens = ChatFormat(tokenizer).encode(chat)
    assert tokenizer.decode(tokens.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert [text.strip() for text in text_of(tokenizer, tokens)] == [
        tokenizer.apply_chat_template([message], tokenize=False).removeprefix("<|assistant|>\n").strip()
        for message in (messages[1], messages[3])
    ]


@pytest.mark.parametrize("text", ["\ue0000\ue000", "\ue000", "\ue0001\ue000\ue0010\ue001"])
def test_placeholders_in_texts_and_templates_are_text(text):
    for template in (ASKING, ASKING.replace("<|end|>", f"{text}<|end|>")):
        tokenizer = chatml(template)
        (trained,) = text_of(tokenizer, ChatFormat(tokenizer).encode(ask_and(("user", text), ("assistant", text))))
        assert trained.startswith(text)


def test_a_begin_of_text_at_each_turn_is_no_fault():
    llama2 = sentencepiece(LLAMA2, legacy=True)
    tokens = ChatFormat(llama2).encode(Conversation(CHAT))
    assert tokens.input_ids.count(llama2.bos_token_id) == 2
    smol = make_tokenizer(QWEN3, "<|im_start|>", "<|im_end|>", bos="<|im_start|>", eos="<|im_end|>")  # as SmolLM2's
    assert ChatFormat(smol).encode(Conversation(CHAT)).input_ids.count(smol.bos_token_id) == 4


def seconds_of(chat_format: ChatFormat, turns: int) -> float:
    """Of this process's CPU time, the shortest of three runs."""
    messages = [
        message for turn in range(turns) for message in (Message("user", "Hi"), Message("assistant", f"{turn}"))
    ]
    found = []
    for number in range(3):
        conversation = Conversation((Message("system", f"Be kind, {number}."), *messages))
        start = time.process_time()
        tokens = chat_format.encode(conversation)
        found.append(time.process_time() - start)
        assert len(tokens.turn_ends) == turns
    return min(found)


def test_eight_times_the_turns_take_about_eight_times_as_long():
    """A list that is scanned for each turn makes it 30 times as long."""
    chat_format = ChatFormat(chatml())
    seconds_of(chat_format, 10)
    assert seconds_of(chat_format, 6400) < 16 * seconds_of(chat_format, 800)
