"""TRL ships the chat templates of many models, and for some of them a copy with marks around what TRL trains.

Nothing is trained that TRL does not train, but for what stands between the generation prompt and TRL's mark: the model
has to say that too. A tokenizer with one token a byte stands for each model's own, with the control tokens that its
template writes.
"""

import re
from functools import cache

import pytest

from common.conversations.conversation import Conversation, Message, ToolCall
from common.recipe import UserError
from common.sources.source_row import BadRow
from common.tokens.chat_format import IGNORED, ChatFormat, Tokens
from tests.real_tokenizers import TRL_TEMPLATES
from tests.tokens.test_chat_format import make_tokenizer
from tests.tokens.test_mistral_common import request
from tests.tokens.test_real_templates import check, trained_spans

MODELS = sorted(name for name in TRL_TEMPLATES if not name.endswith("_training"))
PAIRS = [name for name in MODELS if f"{name}_training" in TRL_TEMPLATES]
CONTROL = re.compile(r"<[|｜][^|｜<>]+[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_\w+>|</s>|<sop>|\[/?[A-Z_]+\]")
# What ends a turn, for a template that writes eos_token: the first one that stands in it.
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<turn|>"),
    *("<|return|>", "<|end|>", "<end_of_utterance>", "</s>", "<|eot|>", "<|endoftext|>"),
)
HELLO, HI, BYE, SO_LONG = (
    *(Message("user", "Hello"), Message("assistant", "Hi there")),
    *(Message("user", "Bye"), Message("assistant", "So long")),
)
CALL = Message("assistant", "", tool_calls=(ToolCall("weather", {"town": "Ulm"}, "call00001"),))
RESULT = Message("tool", "12 degrees", name="weather", tool_call_id="call00001")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "which"}}},
    },
}
CONVERSATIONS = {
    "single": Conversation((HELLO, HI)),
    "several turns": Conversation((HELLO, HI, BYE, SO_LONG)),
    "system": Conversation((Message("system", "Be kind"), HELLO, HI)),
    "tools": Conversation((HELLO, CALL, RESULT, HI), tools=(WEATHER,)),
    "reasoning": Conversation((HELLO, Message("assistant", "Hi there", reasoning="I greet back."))),
}


@cache
def chat_format(name: str) -> ChatFormat:
    template = TRL_TEMPLATES[name]
    eos = next((end for end in ENDS if end in template), ENDS[-1])
    control = sorted({*CONTROL.findall(template), "<bos>", eos, ENDS[-1]})
    return ChatFormat(make_tokenizer(template, *control, bos="<bos>", eos=eos))


ROLES_ALTERNATE = "the chat template refuses it: Conversation roles must alternate user/assistant/user/assistant/..."
WANTS_PARTS = "the chat template refuses it: 'str object' has no attribute 'text'"  # of a model that sees images
NO_TOOLS = "the chat template drops the tools: it has no place for them"
NO_END = "the chat template ends the assistant's turn without a control token: nothing would stop it"
OTHER_PROMPT = "no answer can be trained: the chat template begins them otherwise than its generation prompt"
NO_THOUGHTS = (
    "no answer can be trained: the chat template drops their thoughts; leave them out, or write them into the texts"
)
ALWAYS = {OTHER_PROMPT: "deepseek_r1_distill deepseekv3", NO_END: "glm4moe", WANTS_PARTS: "llava_next"}
# Which templates refuse a conversation, by the reason.
REFUSED = {
    "single": ALWAYS | {"the chat template drops message 1, the user's": "idefics3 smolvlm"},
    "several turns": ALWAYS | {"the chat template drops message 1, the user's": "idefics3 smolvlm"},
    "system": ALWAYS
    | {
        "the chat template drops message 1, the system's": "idefics3 smolvlm",
        "the chat template refuses it: System role not supported": "gemma",
    },
    "tools": {
        ROLES_ALTERNATE: "cohere cohere2 gemma gemma3",
        NO_TOOLS: "deepseek_r1_distill deepseekv3 llama3 qwen2_5_vl",
        NO_END: "glm4moe",
        "the chat template refuses it: str object has no element 0": "idefics3 llava_next smolvlm",
        "the chat template drops the tool calls (message 2, the assistant's)": "lfm2",
        "the chat template drops message 3, the tool's": "phi3 phi3_5",
    },
    "reasoning": {
        NO_THOUGHTS: "cohere cohere2 deepseek_r1_distill deepseekv3 gemma gemma3 gemma4 gemma4_v2 gemma4_v3 gemma4_v4 "
        "lfm2 lfm2_v2 llama3 llama3_1 llama3_2 phi3 phi3_5 qwen2_5 qwen2_5_vl qwen3_instruct_2507 qwen3_vl",
        NO_END: "glm4moe",
        WANTS_PARTS: "llava_next",
        "the chat template drops message 1, the user's": "idefics3 smolvlm",
    },
}
NEMOTRON = "nemotron_3_5_lightning nemotron_3_nano nemotron_3_super nemotron_3_ultra"
WITHOUT_THINKING = "answers are trained behind the prompt that enable_thinking=False gives"
OTHER_END = "earlier answers are not trained: the chat template ends them otherwise than the last one"
# With which templates a conversation is trained and something is said of it.
NOTED = {
    "single": {WITHOUT_THINKING: NEMOTRON},
    "several turns": {
        WITHOUT_THINKING: NEMOTRON,
        OTHER_END: "gptoss",
        "answers are not trained that the chat template begins otherwise than its generation prompt": "qwen3_5_nothink "
        "qwen3_5_think qwen3_6",
    },
    "system": {WITHOUT_THINKING: NEMOTRON},
    "tools": {WITHOUT_THINKING: NEMOTRON},
    "reasoning": {"answers are trained behind the prompt that enable_thinking=True gives": "qwen3_5_nothink"},
}


@cache
def outcome(name: str, conversation: str) -> Tokens | str:
    """The tokens of the conversation, or why it is refused."""
    try:
        return chat_format(name).encode(CONVERSATIONS[conversation])
    except (BadRow, UserError) as error:
        return str(error)


def accepted(names: list[str]) -> list[tuple[str, str]]:
    """The pairs of a template and a conversation that it does not refuse."""
    refused = {each: " ".join(REFUSED[each].values()).split() for each in CONVERSATIONS}
    return [(name, each) for name in names for each in CONVERSATIONS if name not in refused[each]]


def by_kind(said: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """From each thing that is said to the templates of which it is said."""
    kinds = {kind for several in said.values() for kind in several}
    return {kind: " ".join(name for name in MODELS if kind in said[name]) for kind in kinds}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_what_a_template_cannot_say_is_refused_with_the_reason(conversation):
    outcomes = {name: outcome(name, conversation) for name in MODELS}
    refused = {name: (told,) if isinstance(told, str) else () for name, told in outcomes.items()}
    assert by_kind(refused) == REFUSED[conversation]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_what_is_trained_in_part_or_behind_another_prompt_is_said(conversation):
    outcomes = {name: outcome(name, conversation) for name in MODELS}
    assert (
        by_kind({name: () if isinstance(told, str) else told.notes for name, told in outcomes.items()})
        == NOTED[conversation]
    )


@pytest.mark.parametrize(("name", "conversation"), accepted(MODELS))
def test_training_begins_where_the_prompt_of_the_template_ends(name, conversation):
    check(chat_format(name), CONVERSATIONS[conversation])


@pytest.mark.parametrize(("name", "conversation"), accepted(PAIRS))
def test_nothing_is_trained_that_trl_does_not_train(name, conversation):
    tokenizer, tokens = chat_format(name).tokenizer, chat_format(name).encode(CONVERSATIONS[conversation])
    told = request(CONVERSATIONS[conversation])
    by_trl = tokenizer.apply_chat_template(
        told["messages"],
        tools=told.get("tools"),
        chat_template=TRL_TEMPLATES[f"{name}_training"],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    ids, is_trained = by_trl["input_ids"], [bool(trained) for trained in by_trl["assistant_masks"]]
    if ids == tokens.input_ids:
        for start, end in trained_spans(tokens):
            marked = is_trained.index(True, start)
            assert all(is_trained[marked : end - 1])  # TRL leaves out the token that ends a call of Gemma 4
            assert is_trained[end - 1] or tokenizer.decode(tokens.input_ids[end - 1]) == "<|tool_response>"
    else:  # TRL's copy writes an empty thought before each answer, the model's own before the last one only
        labels = [token if trained else IGNORED for token, trained in zip(ids, is_trained, strict=True)]
        theirs = [tokenizer.decode(ids[start:end]) for start, end in trained_spans(Tokens(ids, labels, []))]
        for start, end in trained_spans(tokens):
            assert any(tokenizer.decode(tokens.input_ids[start:end]) in text for text in theirs)
