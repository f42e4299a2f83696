"""Every template in TRL's wheel, with TRL's own training templates as the oracle of what is trained."""

import re

import pytest

from common.data.chat_format import IGNORED, ChatFormat
from common.data.conversation import Conversation, Message, ToolCall
from common.data.source_row import BadRow
from common.recipe import UserError
from tests.data.test_chat_format import CHAT, SYSTEM, TEMPLATES, make_tokenizer
from tests.data.test_thoughts import APART
from tests.data.test_tool_calls import CALLED, TOOL

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
PAIRS = [name for name in NAMES if (TEMPLATES / f"{name}_training.jinja").exists()]
CONTROL = re.compile(r"<\|[^|>'\" +]+\|>|<｜[^｜>]+｜>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>|<end_of_utterance>")
ENDS = {"gemma4": "<turn|>", "gptoss": "<|return|>", "deepseek": "<｜end▁of▁sentence｜>", "smol": "<end_of_utterance>"}
CHATS = {
    "chat": Conversation(CHAT),
    "system": Conversation(SYSTEM),
    "thoughts": Conversation(APART),
    "calls": Conversation(CALLED, (TOOL,)),
    "two calls": Conversation(
        (*CALLED[:2], *CALLED[2:], Message("user", "And in Oslo?"), *CALLED[1:3], Message("assistant", "Rain")), (TOOL,)
    ),
    "call without arguments": Conversation(
        (CALLED[0], Message("assistant", "", tool_calls=(ToolCall("get_weather", {}),)), *CALLED[2:]), (TOOL,)
    ),
}


def tokenizer_for(name: str):
    text = (TEMPLATES / f"{name}.jinja").read_text()
    control = dict.fromkeys(CONTROL.findall(text))
    end = next((token for model, token in ENDS.items() if model in name), None)
    end = end or next(
        (t for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>") if t in control), "</s>"
    )
    return make_tokenizer(text, "<s>", *(control | {end: None}), bos="<s>", eos=end)


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_is_the_templates_own_or_refused_by_name(name, kind):
    tokenizer = tokenizer_for(name)
    chat_format = ChatFormat(tokenizer)
    try:
        tokens = chat_format.encode(CHATS[kind])
    except (BadRow, UserError) as refusal:
        assert "template" in str(refusal)
        return
    trained = [i for i, label in enumerate(tokens.labels) if label != IGNORED]
    assert {tokens.input_ids[end - 1] for end in tokens.turn_ends} <= chat_format.end_of_turn_ids()
    assert trained[-1] == tokens.turn_ends[-1] - 1
    prompt = CHATS[kind].messages[:-1]
    if not any("enable_thinking" in note for note in tokens.notes) and "thoughts" not in kind:
        ids = chat_format.prompt_ids(Conversation(prompt, CHATS[kind].tools))
        last = max(i for i in trained if i - 1 not in trained)
        assert tokens.input_ids[:last][-20:] == ids[-20:]


@pytest.mark.parametrize("kind", ["chat", "system", "thoughts"])
@pytest.mark.parametrize("name", PAIRS)
def test_nothing_is_trained_that_trl_does_not_train_but_for_what_the_prompt_does_not_hold(name, kind):
    tokenizer = tokenizer_for(name)
    chat = CHATS[kind]
    messages = [
        {"role": m.role, "content": m.content} | ({"reasoning_content": m.reasoning} if m.reasoning else {})
        for m in chat.messages
    ]
    try:
        tokens = ChatFormat(tokenizer).encode(chat)
        stock = tokenizer.apply_chat_template(
            messages,
            chat_template=(TEMPLATES / f"{name}_training.jinja").read_text(),
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
    except (BadRow, UserError) as refusal:
        pytest.skip(str(refusal))
    if tokens.input_ids != stock["input_ids"]:
        pytest.skip("TRL's training template writes another text")
    ours = {i for i, label in enumerate(tokens.labels) if label != IGNORED}
    theirs = {i for i, trained in enumerate(stock["assistant_masks"]) if trained}
    extra = sorted(ours - theirs)
    # What we train beyond it is a header between the end of the prompt and TRL's mark.
    for place in extra:
        following = next(i for i in range(place, len(tokens.labels)) if i not in extra)
        assert following in theirs, tokenizer.decode([tokens.input_ids[place]])
