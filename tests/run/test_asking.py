"""Chat, merge and export ask with the saved template, and so with the prompt that the answers were trained behind."""

import json

import pytest
from transformers import AutoTokenizer

from common.conversations.conversation import Conversation, Message
from common.data.rows import load_rows
from common.recipe import DataSpec
from common.run.artefacts import save_tokenizer
from common.run.asking import ask_as_trained
from common.run.prompts import sample_prompts
from common.tokens.chat_format import ChatFormat
from tests.tokens.test_chat_format import QWEN3, TEMPLATES, qwen

THINKS = {"prompt": "1+1?", "completion": "2", "reasoning_content": "easy"}
ANSWERS = {"prompt": "1+1?", "completion": "2"}
OWN, NEMOTRON = ((TEMPLATES / f"{name}.jinja").read_text() for name in ("qwen3", "nemotron_3_nano"))


@pytest.mark.parametrize(
    ("template", "rows", "value"),
    [
        (QWEN3, [THINKS], True),
        (QWEN3, [ANSWERS], None),
        (QWEN3, [THINKS, ANSWERS], None),
        (QWEN3, [THINKS | {"chat_template_kwargs": {"enable_thinking": True}}], None),
        (OWN, [THINKS], None),
        (OWN, [ANSWERS], None),
        (NEMOTRON, [THINKS], None),
        (NEMOTRON, [ANSWERS], False),
    ],
)
def test_the_saved_template_asks_as_all_rows_were_trained(template, rows, value, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = qwen(template)
    loaded = load_rows(DataSpec(str(tmp_path / "a.jsonl"), eval_rows=0), tokenizer, 256)
    capsys.readouterr()
    save_tokenizer(ask_as_trained(tokenizer, loaded.reports), tmp_path / "run")
    said = capsys.readouterr().out
    assert said == (
        f"the saved chat template asks with enable_thinking={value}, as all rows were trained\n"
        if value is not None
        else ""
    )
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    prompt = ChatFormat(saved).prompt_ids(Conversation((Message("user", "1+1?"),)))
    trained = [sample.input_ids for sample in sample_prompts(loaded.train, tokenizer, 2)]
    assert prompt in trained or "chat_template_kwargs" in rows[0]
    assert (saved.chat_template == template) == (value is None)


def test_the_other_prompt_can_still_be_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(THINKS))
    tokenizer = qwen(QWEN3)
    loaded = load_rows(DataSpec(str(tmp_path / "a.jsonl"), eval_rows=0), tokenizer, 256)
    saved = ChatFormat(ask_as_trained(tokenizer, loaded.reports))
    asked = (Message("user", "1+1?"),)
    without = saved.prompt_ids(Conversation(asked, (), {"enable_thinking": False}))
    assert without == ChatFormat(tokenizer).prompt_ids(Conversation(asked))
    assert without != saved.prompt_ids(Conversation(asked))
