"""Texts that were rendered already: what is trained is found by the marks of the model's own chat template."""

import pytest

from common.conversations.conversation import Conversation, Message
from common.data.rows import load_rows
from common.recipe import DataSpec, UserError
from common.sources.source_row import BadRow
from common.tokens.chat_format import IGNORED, ChatFormat
from tests.conftest import ROOT
from tests.real_tokenizers import TRL_TEMPLATES
from tests.tokens.test_chat_format import QWEN3, llama3, make_tokenizer, qwen, trained_text

OURS = {path.stem: path.read_text() for path in (ROOT / "models" / "chat_templates").glob("*.jinja")}
# As Mistral 7B v0.1's: [INST] is no control token there
MISTRAL_V1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# As Zephyr's: the names of roles are plain text, and the user's turn ends with the same token as the assistant's
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
REAL = {  # name: tokenizer and template
    "llama3": ("llama3", TRL_TEMPLATES["llama3"]),
    "llama3.2": ("llama3", TRL_TEMPLATES["llama3_2"]),
    "qwen2.5": ("qwen2_5", TRL_TEMPLATES["qwen2_5"]),
    "qwen3": ("qwen3", TRL_TEMPLATES["qwen3_instruct_2507"]),
    "qwen3 (ours)": ("qwen3", OURS["qwen3"]),
    "mistral v0.1": ("mistral_v1", MISTRAL_V1),
    "mistral v0.3 (ours)": ("mistral_v3", OURS["mistral_v3"]),
    "nemo (ours)": ("tekken", OURS["mistral_tekken"]),
    "zephyr": ("mistral_v1", ZEPHYR),
    "smollm2": ("smollm2", None),
}
ANSWERS = [
    "Hello",
    "42 is it",
    '"quoted"',
    "你好",
    "😀 ok",
    "\nnew line",
    "\n\n  deep",
    "def f():\n\treturn 1",
    "x [y] z",
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", REAL)
def test_an_answer_is_trained_from_where_its_prompt_ends_to_its_end_token(real_tokenizer, name, answer):
    tokenizer = real_tokenizer(*REAL[name])
    chat = [
        {"role": "user", "content": "Hi you"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": answer},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    tokens = ChatFormat(tokenizer, rendered=True).encode(text)
    end = ChatFormat(tokenizer).end_of_turn_id()
    starts = [i for i, label in enumerate(tokens.labels) if label != IGNORED and tokens.labels[i - 1] == IGNORED]
    assert len(starts) == len(tokens.turn_ends) == 2
    for turn, start, stop in zip((1, 3), starts, tokens.turn_ends, strict=True):
        prompt = tokenizer.apply_chat_template(chat[:turn], tokenize=False, add_generation_prompt=True)
        if turn == 1 or "\n" not in answer[:1]:  # where a prompt of before is cut, so is what follows
            assert tokens.input_ids[:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokens.input_ids[start:stop]).strip().startswith(answer.strip())
        assert tokens.input_ids[stop - 1] == end
        assert tokens.labels[start:stop] == tokens.input_ids[start:stop]
        assert end not in tokens.input_ids[start : stop - 1]
    assert tokenizer.decode(tokens.input_ids) == tokenizer.decode(
        tokenizer(text, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", REAL)
def test_a_rendered_text_is_trained_as_the_conversation_that_it_was(real_tokenizer, name, answer):
    tokenizer = real_tokenizer(*REAL[name])
    chat = [{"role": role, "content": text} for role, text in (("user", "Hi you"), ("assistant", answer)) * 2]
    conversation = Conversation(tuple(Message(message["role"], message["content"]) for message in chat))
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ours, theirs = ChatFormat(tokenizer, rendered=True).encode(text), ChatFormat(tokenizer).encode(conversation)
    assert (ours.input_ids, ours.labels, ours.turn_ends) == (theirs.input_ids, theirs.labels, theirs.turn_ends)


@pytest.mark.parametrize("answer", ["\nHi", "\n\nHi", "  Hi", " \n\t Hi"])
@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "nemo (ours)"])
def test_no_token_reaches_over_the_end_of_the_prompt(real_tokenizer, name, answer):
    tokenizer = real_tokenizer(*REAL[name])
    question = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    end = tokenizer.eos_token
    tokens = ChatFormat(tokenizer, rendered=True).encode(f"{prompt}{answer}{end}")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokens.input_ids[: len(ids)] == ids
    assert trained_text(tokenizer, tokens) == f"{answer}{end}"


CHATML = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>"
)
MISTRAL = "<s>[INST] Hello[/INST] Hi!</s>"


def small_mistral():
    return make_tokenizer(OURS["mistral_v3"], "<s>", "</s>", "[INST]", "[/INST]", bos="<s>", eos="</s>")


TOKENIZERS = {
    "chatml": (lambda: qwen(TRL_TEMPLATES["qwen2_5"]), CHATML, "Hi!<|im_end|>"),
    "llama3": (llama3, LLAMA3, "Hi!<|eot_id|>"),
    "mistral": (small_mistral, MISTRAL, " Hi!</s>"),
}


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_a_missing_bos_is_added_and_one_that_is_there_is_not_doubled(name):
    make, text, trained = TOKENIZERS[name]
    tokenizer = make()
    chat_format = ChatFormat(tokenizer, rendered=True)
    tokens = chat_format.encode(text)
    assert tokens.input_ids.count(tokenizer.bos_token_id) == 1
    assert chat_format.encode(text.removeprefix(tokenizer.bos_token)) == tokens
    assert trained_text(tokenizer, tokens) == trained


def test_no_bos_is_added_where_the_template_writes_none():
    tokenizer = make_tokenizer(
        TRL_TEMPLATES["qwen2_5"], "<s>", "<|im_start|>", "<|im_end|>", bos="<s>", eos="<|im_end|>"
    )
    assert ChatFormat(tokenizer, rendered=True).encode(CHATML).input_ids[0] != tokenizer.bos_token_id


@pytest.mark.parametrize("name", TOKENIZERS)
def test_everything_trains_all_but_the_first_token(name):
    make, text, _ = TOKENIZERS[name]
    tokens = ChatFormat(make(), rendered=True).encode(text, "everything")
    assert tokens.labels == [IGNORED, *tokens.input_ids[1:]]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_rendered_text_for_another_model_is_refused_by_its_marks(name):
    chat_format = ChatFormat(TOKENIZERS[name][0](), rendered=True)
    for other in TOKENIZERS.keys() - {name}:
        with pytest.raises(
            BadRow, match="it was rendered for another model: .* is no mark of this one's chat template"
        ):
            chat_format.encode(TOKENIZERS[other][1])
    with pytest.raises(BadRow, match="rendered for another model: <start_of_turn>"):
        chat_format.encode("<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi!<end_of_turn>\n")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_own_text_that_talks_of_other_marks_is_taken(name):
    make, text, trained = TOKENIZERS[name]
    tokenizer = make()
    marks = "<start_of_turn>, <|user|>" + ("" if name == "mistral" else " and [INST]")
    tokens = ChatFormat(tokenizer, rendered=True).encode(text.replace("Hello", f"What are {marks}?"))
    assert trained_text(tokenizer, tokens) == trained


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("chatml", "Once upon a time", "it holds no answer: the chat template begins one with '<.im_start.>assistant"),
        ("chatml", "<|im_start|>user\nHello<|im_end|>\n", "it holds no answer"),
        ("llama3", "### Instruction:\nHello\n\n### Response:\nHi!", "it holds no answer"),
        ("mistral", "a text with <s> in it", "<s> stands in the middle of it"),
        ("mistral", "<s><s>[INST] Hello[/INST] Hi!</s>", "<s> stands in the middle of it"),
        ("mistral", "<s>[INST] a[/INST] b</s><s>[INST] c[/INST] d</s>", "<s> stands in the middle of it"),
        ("llama3", " " + LLAMA3, "<.begin_of_text.> stands in the middle of it"),
        ("chatml", CHATML.removesuffix("<|im_end|>\n"), r"no end token \(<.im_end.>\): it would not teach the model"),
        ("llama3", LLAMA3.removesuffix("<|eot_id|>"), "has no end token"),
        ("llama3", LLAMA3.removesuffix("<|eot_id|>") + "<|end_of_text|>", "has no end token"),
        ("mistral", MISTRAL.removesuffix("</s>"), "has no end token"),
        ("mistral", "<s>[INST] a[/INST] b [INST] c[/INST] d</s>", "has no end token"),
        ("chatml", CHATML.replace("Hi!<|im_end|>", "Hi!") + CHATML, "has no end token"),
        ("chatml", CHATML + "<|im_start|>assistant\n", "has no end token"),
        ("mistral", "<s>[INST] a[/INST]", "has no end token"),
        ("chatml", CHATML.replace("Hi!", ""), "an answer in it is empty"),
        ("mistral", "<s>[INST] a[/INST]</s>", "an answer in it is empty"),
    ],
)
def test_a_text_that_would_teach_something_else_is_refused(name, text, message):
    with pytest.raises(BadRow, match=message):
        ChatFormat(TOKENIZERS[name][0](), rendered=True).encode(text)


def test_what_follows_the_last_answer_is_not_trained():
    make, text, trained = TOKENIZERS["chatml"]
    tokenizer = make()
    tokens = ChatFormat(tokenizer, rendered=True).encode(f"{text}<|im_start|>user\nBye<|im_end|>\n<|endoftext|>")
    assert trained_text(tokenizer, tokens) == trained


@pytest.mark.parametrize("template", [QWEN3, TRL_TEMPLATES["qwen3"]], ids=["ours", "hub's"])
def test_thoughts_are_trained_and_an_empty_block_is_where_it_belongs_to_the_prompt(template):
    tokenizer = qwen(template)
    block = "<think>\n\n</think>\n\n"
    thoughts = CHATML.replace("Hi!", "<think>\nGreet.\n</think>\n\nHi!")
    text = CHATML + CHATML.replace("Hi!", f"{block}Hi!") + thoughts
    tokens = ChatFormat(tokenizer, rendered=True).encode(text)
    in_prompt = template == QWEN3  # the hub's prompt for thinking ends before the block
    assert trained_text(tokenizer, tokens) == (
        "Hi!<|im_end|>" + ("" if in_prompt else block) + "Hi!<|im_end|><think>\nGreet.\n</think>\n\nHi!<|im_end|>"
    )


@pytest.mark.parametrize("name", ["qwen3_8", "qwen3_5_think", "nemotron_3_nano"])
def test_a_prompt_that_begins_the_thoughts_is_not_trained_and_an_answer_without_thoughts_is_found(name):
    tokenizer = qwen(TRL_TEMPLATES[name])
    thoughts = CHATML.replace("Hi!", "<think>\nGreet.\n</think>\n\nHi!")
    tokens = ChatFormat(tokenizer, rendered=True).encode(CHATML + thoughts)
    assert trained_text(tokenizer, tokens) == "Hi!<|im_end|>Greet.\n</think>\n\nHi!<|im_end|>"


@pytest.mark.parametrize("name", REAL)
def test_an_answer_behind_the_generation_prompt_needs_no_note(real_tokenizer, name):
    tokenizer = real_tokenizer(*REAL[name])
    chat = [{"role": "user", "content": "Hi you"}, {"role": "assistant", "content": "Hello"}] * 2
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert ChatFormat(tokenizer, rendered=True).encode(text).notes == ()


@pytest.mark.parametrize("block", ["", "<think>\nHm\n</think>\n\n"], ids=["no thoughts", "thoughts"])
def test_an_answer_behind_another_prompt_than_the_model_is_asked_with_is_said(real_tokenizer, block):
    tokenizer = real_tokenizer(*REAL["qwen3 (ours)"])  # whose prompt ends with an empty block of thoughts
    text = f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{block}Hello<|im_end|>\n"
    tokens = ChatFormat(tokenizer, rendered=True).encode(text)
    assert trained_text(tokenizer, tokens) == f"{block}Hello<|im_end|>"
    assert tokens.notes == ("answers are trained behind another prompt than the one that the model will be asked with",)


def test_a_mistral_answer_after_a_tools_result_is_trained(real_tokenizer):
    tokenizer = real_tokenizer("mistral_v3", OURS["mistral_v3"])
    text = (
        '<s>[INST] Hi[/INST][TOOL_CALLS] [{"name": "f"}]</s>[TOOL_RESULTS] {"content": 1}[/TOOL_RESULTS] It is 1.</s>'
    )
    tokens = ChatFormat(tokenizer, rendered=True).encode(text)
    assert trained_text(tokenizer, tokens) == '[TOOL_CALLS] [{"name": "f"}]</s> It is 1.</s>'


def test_conversations_are_refused_where_texts_were_promised():
    chat = Conversation((Message("user", "Hello"), Message("assistant", "Hi!")))
    with pytest.raises(UserError, match=r"DataSpec\(rendered=True\) is for rows of text alone"):
        ChatFormat(llama3(), rendered=True).encode(chat)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}", "{{ raise_exception('no') }}"]
)
def test_a_template_without_marks_cannot_tell_answers(template):
    tokenizer = llama3()
    tokenizer.chat_template = template
    with pytest.raises((UserError, BadRow), match="marks no beginning of an answer|refuses"):
        ChatFormat(tokenizer, rendered=True).encode(LLAMA3)


def test_a_base_model_says_that_it_has_no_marks():
    tokenizer = llama3()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="Take its Instruct version"):
        ChatFormat(tokenizer, rendered=True).encode(LLAMA3)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_without_the_flag_a_text_with_control_tokens_is_refused_and_the_flag_named(name):
    make, text, _ = TOKENIZERS[name]
    with pytest.raises(
        BadRow, match=r"holds the control token .*: where .* rendered it, say DataSpec\(rendered=True\)"
    ):
        ChatFormat(make()).encode(text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_without_the_flag_a_text_that_begins_as_another_models_is_refused(name):
    chat_format = ChatFormat(TOKENIZERS[name][0]())
    for other in TOKENIZERS.keys() - {name}:
        with pytest.raises(BadRow, match="the text was rendered for another model: it begins with "):
            chat_format.encode(TOKENIZERS[other][1].removeprefix("<s>"))
    talk = chat_format.encode("ChatML writes <|user|> and <start_of_turn> differently.")
    assert talk.labels[1:] == talk.input_ids[1:]


def test_long_rendered_texts_are_cut_after_an_answer(tokenizer, tmp_path):
    turn = "<|user|>Hello<|end|><|assistant|>Hi you<|end|>"
    (tmp_path / "rendered.jsonl").write_text("\n".join('{"text": "<s>%s"}' % (turn * count) for count in (1, 40)))
    spec = DataSpec(str(tmp_path / "rendered.jsonl"), rendered=True, eval_rows=0)
    rows = load_rows(spec, tokenizer, 64).train
    ids = [token for row in rows["input_ids"] for token in row]
    labels = [token for row in rows["labels"] for token in row]
    assert len(rows) <= 2
    assert tokenizer.decode(ids).count("<s>") == 2
    assert ids[-1] == labels[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    assert set(tokenizer.decode([label for label in labels if label != IGNORED]).split("<|end|>")) == {"Hi you", ""}


def test_a_recipe_without_the_flag_stops_and_names_it(tokenizer, tmp_path):
    (tmp_path / "rendered.jsonl").write_text('{"text": "<s><|user|>Hello<|end|><|assistant|>Hi you<|end|>"}\n' * 3)
    with pytest.raises(UserError, match=r"DataSpec\(rendered=True\)"):
        load_rows(DataSpec(str(tmp_path / "rendered.jsonl")), tokenizer, 64)
