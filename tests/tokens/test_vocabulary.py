"""A tokenizer with tokens that the model has no embedding for."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.adapter.find import find_adapter
from common.adapter.load import trained_tokenizer
from common.conversations.conversation import Conversation, Message
from common.data.rows import load_rows
from common.model.loading import load_tokenizer
from common.recipe import DataSpec, ModelSpec, UserError
from common.run.prompts import load_prompts
from common.sources.source_row import BadRow
from common.tokens.chat_format import ChatFormat

BEYOND = r"<\|ticket\|> \(id 1024\), beyond the model's vocabulary of 1,024"


def with_token(model: Path, folder: Path, text: str = "<|ticket|>", *, special: bool = False, **config: str) -> Path:
    """A copy of the model's folder whose tokenizer has one more token, id 1024, than the embedding has rows."""
    copy = folder / "model"
    shutil.copytree(model, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 1024, "content": text, "special": special})
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return copy


def write_rows(folder: Path, *answers: str, name: str = "rows.jsonl") -> str:
    rows = [{"prompt": f"Question {n}?", "completion": answer} for n, answer in enumerate(answers)]
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


@pytest.fixture
def ticket(small_llama, tmp_path) -> Path:
    return with_token(small_llama, tmp_path)


def test_a_row_with_such_a_token_is_named_with_token_id_and_place(ticket, tmp_path):
    source = write_rows(tmp_path, "yes", "no", "<|ticket|> yes")
    tokenizer = load_tokenizer(ModelSpec(str(ticket)))
    with pytest.raises(UserError, match=rf"1 of 3 rows.*: it holds the token {BEYOND} \({re.escape(source)}:3\)"):
        load_rows(DataSpec(source), tokenizer, 64)
    rows = load_rows(DataSpec(source, max_bad_share=0.5, eval_rows=0), tokenizer, 64)
    assert rows.reports[0].dropped == 1
    assert max(map(max, rows.train["input_ids"])) < 1024


def test_plain_text_and_held_out_rows_are_held_against_it_too(ticket, tmp_path):
    tokenizer = load_tokenizer(ModelSpec(str(ticket)))
    (tmp_path / "text.jsonl").write_text('{"text": "a <|ticket|>"}')
    with pytest.raises(UserError, match=BEYOND):
        load_rows(DataSpec(str(tmp_path / "text.jsonl")), tokenizer, 64)
    good, held = write_rows(tmp_path, "yes"), write_rows(tmp_path, "yes", "<|ticket|>", name="held.jsonl")
    with pytest.raises(UserError, match=rf"held.jsonl.*{BEYOND}"):
        load_rows(DataSpec(good, eval_source=held), tokenizer, 64)
    asked = [{"prompt": text, "completion": "yes"} for text in ("What?", "What is <|ticket|>?")]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    assert [prompt.text for prompt in load_prompts(str(tmp_path / "asked.jsonl"), tokenizer)] == ["What?"]


def test_what_is_typed_in_a_chat_is_held_against_it(ticket):
    chat_format = ChatFormat(load_tokenizer(ModelSpec(str(ticket))))
    with pytest.raises(BadRow, match=BEYOND):
        chat_format.prompt_ids(Conversation((Message("user", "my <|ticket|>"),)))
    assert chat_format.prompt_ids(Conversation((Message("user", "my ticket"),)))


def test_rows_in_the_cache_were_held_against_another_vocabulary(ticket, small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.data.cache.MIN_SOURCE_BYTES", 1)
    source = write_rows(tmp_path, "yes", "<|ticket|>")
    larger = small_model("llama", vocab_size=1088)
    shutil.copy(ticket / "tokenizer.json", larger)
    shutil.copy(ticket / "tokenizer_config.json", larger)
    rows = load_rows(DataSpec(source, eval_rows=0), load_tokenizer(ModelSpec(str(larger))), 64)
    assert max(map(max, rows.train["input_ids"])) == 1024
    with pytest.raises(UserError, match=BEYOND):
        load_rows(DataSpec(source, eval_rows=0), load_tokenizer(ModelSpec(str(ticket))), 64)


def test_a_template_with_such_a_token_is_refused(ticket, tmp_path):
    template = "{% for m in messages %}{{ '<|ticket|>' + m.content + '<|end|>' }}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    tokenizer = load_tokenizer(ModelSpec(str(ticket), chat_template=str(tmp_path / "mine.jinja")))
    with pytest.raises(UserError, match=f"the chat template needs the token {BEYOND}: take the tokenizer and"):
        load_rows(DataSpec(write_rows(tmp_path, "yes")), tokenizer, 64)


def test_a_pad_token_beyond_it_is_passed_over_and_that_is_said(small_llama, tmp_path, capsys):
    model = with_token(small_llama, tmp_path, "[PAD]", special=True, pad_token="[PAD]")
    tokenizer = load_tokenizer(ModelSpec(str(model)))
    assert tokenizer.pad_token == "<pad>" and tokenizer.pad_token_id < 1024
    said = "the pad token is [PAD] (id 1024), beyond the model's vocabulary of 1,024: <pad> pads instead\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("kind", ["bos", "eos"])
@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_texts_cannot_begin_or_end_with_such_a_token(small_llama, tmp_path, kind, weights):
    model = with_token(small_llama, tmp_path, special=True, **{f"{kind}_token": "<|ticket|>"})
    with pytest.raises(UserError, match=rf"the {kind.upper()} token of .*model is {BEYOND}: take the tokenizer"):
        load_tokenizer(ModelSpec(str(model), weights=weights))


def test_the_tokenizer_of_a_run_is_held_against_its_base(adapted, tmp_path):
    recipe = adapted()
    run = with_token(Path(recipe.out), tmp_path)
    tokenizer = trained_tokenizer(find_adapter(replace(recipe, out=str(run))))
    with pytest.raises(UserError, match=BEYOND):
        load_rows(DataSpec(write_rows(tmp_path, "<|ticket|>")), tokenizer, 64)
