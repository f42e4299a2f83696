"""Golden renderings and masks. TRL's wheel holds the templates of the real models: tests read them there."""

import copy
from pathlib import Path

import pytest
import torch
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.conversations.conversation import Conversation, Message
from common.recipe import UserError
from common.sources.source_row import BadRow
from common.tokens.chat_format import IGNORED, ChatFormat
from common.tokens.control_tokens import with_control
from tests.conftest import ROOT

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
QWEN3 = (ROOT / "models" / "chat_templates" / "qwen3.jinja").read_text()
# [INST] user[/INST] answer</s>, the system message before the last user's; Mistral 7B v0.3's form
MISTRAL = """{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '[INST] ' -}}
{%- if system is defined and loop.index0 == messages | length - 2 -%}{{- system + '\n\n' -}}{%- endif -%}
{{- message.content + '[/INST]' -}}
{%- else -%}{{- ' ' + message.content | trim + eos_token -}}{%- endif -%}
{%- endfor -%}"""
CHAT = (
    Message("user", "Hello you"),
    Message("assistant", "Hi!"),
    Message("user", "Bye"),
    Message("assistant", "So long"),
)
SYSTEM = (Message("system", "Be kind"), *CHAT)


def make_tokenizer(template: str, *special: str, bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    """Byte-level, one token a byte, as the byte-level tokenizers of Llama 3 and Qwen with no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=template)


def llama3() -> PreTrainedTokenizerFast:
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    template = (TEMPLATES / "llama3.jinja").read_text()
    return make_tokenizer(template, *special, bos="<|begin_of_text|>", eos="<|eot_id|>")


def qwen(template: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(template, "<|im_start|>", "<|im_end|>", "<|endoftext|>", bos=None, eos="<|im_end|>")


def mistral() -> PreTrainedTokenizerFast:
    return make_tokenizer(MISTRAL, "<s>", "</s>", "[INST]", "[/INST]", bos="<s>", eos="</s>")


TOKENIZERS = {
    "llama3": llama3,
    "qwen2.5": lambda: qwen((TEMPLATES / "qwen2_5.jinja").read_text()),
    "qwen3 (ours)": lambda: qwen(QWEN3),
    "mistral": mistral,
}


def trained_text(tokenizer, tokens) -> str:
    return tokenizer.decode([label for label in tokens.labels if label != IGNORED])


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("llama3", "Hi!<|eot_id|>So long<|eot_id|>"),
        ("qwen2.5", "Hi!<|im_end|>So long<|im_end|>"),
        ("qwen3 (ours)", "Hi!<|im_end|>So long<|im_end|>"),
        ("mistral", " Hi!</s> So long</s>"),  # the space is not in the prompt: the model has to say it
    ],
)
@pytest.mark.parametrize("chat", [CHAT, SYSTEM], ids=["chat", "with system"])
def test_pitfall_8_only_answers_and_their_ends_are_trained(name, trained, chat):
    tokenizer = TOKENIZERS[name]()
    tokens = ChatFormat(tokenizer).encode(Conversation(chat))
    assert trained_text(tokenizer, tokens) == trained
    assert all(label in (IGNORED, token) for label, token in zip(tokens.labels, tokens.input_ids, strict=True))
    assert [tokens.input_ids[end - 1] for end in tokens.turn_ends] == [ChatFormat(tokenizer).end_of_turn_id()] * 2


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("chat", [CHAT, SYSTEM], ids=["chat", "with system"])
def test_the_tokens_are_those_of_the_models_own_template(name, chat):
    tokenizer = TOKENIZERS[name]()
    messages = [{"role": m.role, "content": m.content} for m in chat]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    tokens = ChatFormat(tokenizer).encode(Conversation(chat))
    assert tokens.input_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert tokens.input_ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)  # pitfall 2


@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen3 (ours)"])
def test_what_is_trained_follows_the_prompt_that_inference_gives(name):
    tokenizer = TOKENIZERS[name]()
    tokens = ChatFormat(tokenizer).encode(Conversation(CHAT))
    for turn, end in ((1, tokens.turn_ends[0]), (3, tokens.turn_ends[1])):
        messages = [{"role": m.role, "content": m.content} for m in CHAT[:turn]]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer = tokenizer(prompt + CHAT[turn].content, add_special_tokens=False)["input_ids"]
        assert tokens.input_ids[: end - 1] == answer


@pytest.mark.parametrize("name", ["llama3", "qwen2.5"])
def test_pitfall_9_masks_are_those_of_trls_training_templates_but_for_the_templates_newlines(name):
    tokenizer = TOKENIZERS[name]()
    stock = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in CHAT],
        chat_template=(TEMPLATES / f"{name.replace('.', '_')}_training.jinja").read_text(),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    tokens = ChatFormat(tokenizer).encode(Conversation(CHAT))
    assert tokens.input_ids == stock["input_ids"]
    ours = {i for i, label in enumerate(tokens.labels) if label != IGNORED}
    theirs = {i for i, trained in enumerate(stock["assistant_masks"]) if trained}
    assert ours <= theirs
    # TRL also trains the newline before an answer, which the prompt holds already, and the one after its end.
    assert {tokenizer.decode([tokens.input_ids[i]]) for i in theirs - ours} <= {"\n"}


def test_pitfall_10_thoughts_are_trained_as_given_and_absent_ones_are_prompt():
    tokenizer = qwen(QWEN3)
    chat = (
        Message("user", "1+1?"),
        Message("assistant", "<think>\neasy\n</think>\n\n2"),
        Message("user", "And 2+2?"),
        Message("assistant", "4"),
    )
    tokens = ChatFormat(tokenizer).encode(Conversation(chat))
    assert trained_text(tokenizer, tokens) == "<think>\neasy\n</think>\n\n2<|im_end|>4<|im_end|>"
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\n4" in tokenizer.decode(tokens.input_ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pitfall_12_control_tokens_in_a_message_are_plain_text(name):
    tokenizer = TOKENIZERS[name]()
    chat_format = ChatFormat(tokenizer)
    forged = f"a{tokenizer.eos_token} b"
    tokens = chat_format.encode(Conversation((Message("user", forged), Message("assistant", forged))))
    clean = chat_format.encode(Conversation((Message("user", "a b"), Message("assistant", "a b"))))
    for control in chat_format.control.ids:
        assert tokens.input_ids.count(control) == clean.input_ids.count(control)
    assert trained_text(tokenizer, tokens).lstrip() == forged + tokenizer.eos_token


def test_line_breaks_inside_an_answer_are_trained():
    tokenizer = llama3()
    tokens = ChatFormat(tokenizer).encode(
        Conversation((Message("user", "Two lines"), Message("assistant", "one\n\n  two é 漢")))
    )
    assert trained_text(tokenizer, tokens) == "one\n\n  two é 漢<|eot_id|>"


def test_everything_but_the_first_token_can_be_trained():
    tokens = ChatFormat(llama3()).encode(Conversation(CHAT), "everything")
    assert tokens.labels == [IGNORED, *tokens.input_ids[1:]]


def test_plain_text_is_trained_whole_between_bos_and_eos():
    tokenizer = llama3()
    tokens = ChatFormat(tokenizer).encode("Once")
    assert tokenizer.decode(tokens.input_ids) == "<|begin_of_text|>Once<|eot_id|>"
    assert tokens.labels == [IGNORED, *tokens.input_ids[1:]]


def test_pitfall_2_text_that_was_rendered_already_is_refused():
    with pytest.raises(BadRow, match=r"DataSpec\(rendered=True\); else give messages"):
        ChatFormat(llama3()).encode("<|begin_of_text|>Once")


def test_a_base_model_without_a_template_takes_plain_text_only():
    tokenizer = llama3()
    tokenizer.chat_template = None
    chat_format = ChatFormat(tokenizer)
    assert len(chat_format.encode("Once").input_ids) == 6
    assert chat_format.end_of_turn_id() == tokenizer.eos_token_id
    with pytest.raises(UserError, match="Take its Instruct version"):
        chat_format.encode(Conversation(CHAT))


def test_pitfall_5_control_tokens_that_were_never_trained_are_refused():
    chat_format = ChatFormat(llama3())
    embedding = torch.randn(len(chat_format.tokenizer), 8)
    chat_format.refuse_untrained_tokens(embedding)
    embedding[chat_format.tokenizer.convert_tokens_to_ids("<|eot_id|>")] = 1e-8
    with pytest.raises(UserError, match="needs <.eot_id.>, which this model was never trained on"):
        chat_format.refuse_untrained_tokens(embedding)


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{{ messages[0].content }}<|eot_id|>", BadRow, "drops message 2, the assistant's"),
        (
            "{{ messages[0].content }}{% for m in messages %}{{ m.content }}{% endfor %}",
            BadRow,
            "repeats message 1",
        ),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", UserError, "without a control token"),
        (
            "{{ bos_token * 2 }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}",
            UserError,
            "more than one BOS",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}<|eot_id|>{% endfor %}",
            BadRow,
            "text of message 1, the user",
        ),
        ("{{ raise_exception('no system') }}", BadRow, "the chat template refuses it: no system"),
    ],
)
def test_a_template_that_cannot_be_trained_with_says_why(template, error, message):
    tokenizer = llama3()
    tokenizer.chat_template = template
    with pytest.raises(error, match=message):
        ChatFormat(tokenizer).encode(Conversation(CHAT))


QUESTION = (Message("user", "Hello you"), Message("assistant", "Hi!"), Message("user", "Bye <|eot_id|>"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_is_what_the_template_renders_for_an_answer(name):
    tokenizer = TOKENIZERS[name]()
    chat = (*QUESTION[:2], Message("user", "Bye"))
    messages = [{"role": m.role, "content": m.content} for m in chat]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ChatFormat(tokenizer).prompt_ids(Conversation(chat))) == text


def test_control_tokens_in_a_prompt_are_plain_text():
    tokenizer = llama3()
    ids = ChatFormat(tokenizer).prompt_ids(Conversation(QUESTION))
    assert ids.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 3
    assert "Bye <|eot_id|>" in tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("chat", [QUESTION[:1], (*QUESTION[:2], Message("user", "And\n\n now?"))], ids=["one", "two"])
def test_the_last_message_of_a_prompt_is_found_again(name, chat):
    chat_format = ChatFormat(TOKENIZERS[name]())
    assert chat_format.last_message(chat_format.prompt_ids(Conversation(chat))) == chat[-1].content
    trained = chat_format.encode(Conversation((*chat, Message("assistant", "Fine."))))
    start = next(
        i for i in reversed(range(len(trained.labels))) if trained.labels[i] == IGNORED and i < trained.turn_ends[-1]
    )
    assert chat_format.last_message(trained.input_ids[: start + 1]) == chat[-1].content


def test_a_prompt_of_a_model_without_a_template_is_its_text(tokenizer):
    bare = llama3()
    bare.chat_template = None
    ids = bare("Once upon a time", add_special_tokens=False)["input_ids"]
    assert ChatFormat(bare).last_message(ids) == "Once upon a time"


def test_a_line_break_that_is_an_added_token_is_no_control_token(tokenizer):
    """As Gemma's: its template writes line breaks, and so does every message."""
    marked = copy.deepcopy(tokenizer)
    marked.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("\n", "<|turn|>")])
    found = with_control(marked, "<|turn|>user\n")
    assert not found.added_tokens_decoder[found.convert_tokens_to_ids("\n")].special
    assert found.backend_tokenizer.get_added_tokens_decoder()[found.convert_tokens_to_ids("<|turn|>")].special
    assert with_control(marked, "user\n") is marked
