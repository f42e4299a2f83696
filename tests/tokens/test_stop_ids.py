"""What ends an answer: the end of the template's turns and what the configs know."""

import pytest

from common.recipe import UserError
from common.sources.source_row import BadRow
from common.tokens.stop_ids import stop_ids
from tests.tokens.test_chat_format import make_tokenizer

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
ENDLESS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


def turns(template: str | None = TURNS):
    return make_tokenizer(template, "<|user|>", "<|assistant|>", "<|end|>", "</s>", bos=None, eos="</s>")


def test_the_end_of_turn_and_the_known_ids():
    tokenizer = turns()
    end, text = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "</s>"))
    assert stop_ids(tokenizer, None) == [end]
    assert stop_ids(tokenizer, end) == [end]
    assert stop_ids(tokenizer, text) == stop_ids(tokenizer, [text, end]) == sorted([end, text])


def test_without_a_template_the_end_of_text():
    tokenizer = turns()
    tokenizer.chat_template = None
    assert stop_ids(tokenizer, None) == [tokenizer.eos_token_id]


def test_a_template_without_an_end_leaves_the_known_ids_or_is_an_error():
    assert stop_ids(turns(ENDLESS), [3]) == [3]
    with pytest.raises(UserError, match="nothing would stop it"):
        stop_ids(turns(ENDLESS), None)
    refusing = turns("{{ raise_exception('no') }}")
    assert stop_ids(refusing, 3) == [3]
    with pytest.raises(BadRow, match="the chat template refuses it: no"):
        stop_ids(refusing, None)
