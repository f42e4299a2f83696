"""A conversation that is longer than a row becomes a shorter conversation, rendered as such."""

import json

import pytest

from common.conversations.conversation import Conversation, Message
from common.data.cutting import fit_example
from common.data.rows import load_rows
from common.recipe import DataSpec
from common.sources.source_row import BadRow
from common.tokens.chat_format import IGNORED, ChatFormat
from tests.real_tokenizers import TRL_TEMPLATES
from tests.tokens.test_chat_format import MISTRAL, TOKENIZERS, llama3, make_tokenizer, qwen, trained_text
from tests.tokens.test_rendered_text import OURS

SYSTEM = Message("system", "Be kind.")


def chat(turns: int, *before: Message) -> Conversation:
    pairs = ((Message("user", f"question {n}"), Message("assistant", f"answer {n}")) for n in range(turns))
    return Conversation((*before, *(message for pair in pairs for message in pair)))


def cut(tokenizer, conversation, seq_len: int):
    chat_format = ChatFormat(tokenizer)
    (tokens,) = fit_example(conversation, chat_format.encode(conversation), seq_len, chat_format, "assistant")
    assert len(tokens.input_ids) == len(tokens.labels) <= seq_len
    return tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_kept_is_what_the_shorter_conversation_alone_becomes(name):
    tokenizer = TOKENIZERS[name]()
    whole = chat(9, SYSTEM)
    for turns in range(1, 9):
        shorter = ChatFormat(tokenizer).encode(chat(turns, SYSTEM))
        longer = ChatFormat(tokenizer).encode(chat(turns + 1, SYSTEM))
        end = shorter.turn_ends[-1]  # what the template writes behind the last end token may be left out
        for seq_len in (end, end + 3, longer.turn_ends[-1] - 1):
            tokens = cut(tokenizer, whole, seq_len)
            assert tokens.input_ids[:end] == shorter.input_ids[:end]
            assert tokens.turn_ends == shorter.turn_ends


@pytest.mark.parametrize("template", [MISTRAL, OURS["mistral_v3"], OURS["mistral_tekken"]])
@pytest.mark.parametrize("turns", [1, 2, 5])
def test_a_cut_conversation_keeps_its_system_message_where_it_stands_before_the_last_turn(template, turns):
    tokenizer = make_tokenizer(template, "<s>", "</s>", "[INST]", "[/INST]", bos="<s>", eos="</s>")
    seq_len = ChatFormat(tokenizer).encode(chat(turns, SYSTEM)).turn_ends[-1]
    tokens = cut(tokenizer, chat(9, SYSTEM), seq_len)
    text = tokenizer.decode(tokens.input_ids)
    assert text.count("Be kind.") == 1
    assert f"Be kind.\n\nquestion {turns - 1}" in text
    assert trained_text(tokenizer, tokens).count("</s>") == turns


def test_a_system_message_is_counted_where_only_the_turns_would_fit():
    tokenizer = make_tokenizer(OURS["mistral_v3"], "<s>", "</s>", "[INST]", "[/INST]", bos="<s>", eos="</s>")
    three = ChatFormat(tokenizer).encode(chat(3, SYSTEM)).turn_ends[-1]
    assert len(cut(tokenizer, chat(9, SYSTEM), three - 1).turn_ends) == 2


def test_thoughts_of_the_last_kept_answer_are_kept_as_of_a_last_answer():
    tokenizer = qwen(TRL_TEMPLATES["qwen3_training"])
    whole = ChatFormat(tokenizer).encode(chat(9))
    kept = cut(tokenizer, chat(9), len(whole.input_ids) // 2)
    assert tokenizer.decode(kept.input_ids).rstrip().endswith("<|im_end|>")


def test_an_answer_that_is_not_to_be_learnt_is_no_last_one():
    messages = chat(3).messages
    untrained = Conversation((*messages[:3], Message("assistant", "answer 1", is_trained=False), *messages[4:]))
    chat_format = ChatFormat(llama3())
    encoded = chat_format.encode(untrained)
    seq_len = ChatFormat(llama3()).encode(chat(2)).turn_ends[-1]
    (tokens,) = fit_example(untrained, encoded, seq_len, chat_format, "assistant")
    assert len(tokens.input_ids) <= ChatFormat(llama3()).encode(chat(1)).turn_ends[-1]


def test_a_conversation_that_fits_stays_the_same_object():
    chat_format = ChatFormat(llama3())
    tokens = chat_format.encode(chat(3))
    assert fit_example(chat(3), tokens, len(tokens.input_ids), chat_format, "assistant")[0] is tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_first_answer_that_does_not_fit_is_named(name):
    with pytest.raises(BadRow, match=r"its first answer ends after 20 tokens \(TrainSpec.seq_len\)"):
        cut(TOKENIZERS[name](), chat(9, SYSTEM), 20)


def test_few_encodings_find_the_cut_of_a_very_long_conversation():
    chat_format, calls = ChatFormat(llama3()), []
    whole, encode = chat_format.encode(chat(400)), chat_format.encode
    chat_format.encode = lambda *given: calls.append(given) or encode(*given)
    (tokens,) = fit_example(chat(400), whole, len(whole.input_ids) // 3, chat_format, "assistant")
    assert len(tokens.turn_ends) > 120
    assert len(calls) <= 11  # 2 ** 9 > 400: as many to find it, one for the result


def test_plain_text_becomes_several_rows_and_rendered_text_is_cut_after_an_answer():
    chat_format = ChatFormat(llama3())
    tokens = chat_format.encode("x" * 100)
    assert len(fit_example("x" * 100, tokens, 40, chat_format, "assistant")) == 3
    rendered = ChatFormat(llama3(), rendered=True)
    text = llama3().apply_chat_template(
        [{"role": m.role, "content": m.content} for m in chat(9).messages], tokenize=False
    )
    (kept,) = fit_example(text, rendered.encode(text), 200, rendered, "assistant")
    assert kept.labels[-1] == kept.input_ids[-1] == chat_format.end_of_turn_id()
    assert kept.labels.count(IGNORED) < len(kept.labels) <= 200


def test_a_text_longer_than_a_row_is_split_or_dropped_as_the_recipe_says(tokenizer, tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "The tea is ready, and so is the pie, and then the tea is cold."}\n{"text": "Tea"}\n')
    rows = load_rows(DataSpec(str(path), eval_rows=0), tokenizer, 8).train
    whole = sum(map(sum, rows["seq_lengths"]))
    out = capsys.readouterr().out
    assert (
        "1 text is longer than a row, and split over several; DataSpec(long_texts='drop') leaves such texts out" in out
    )
    dropping = DataSpec(str(path), eval_rows=0, long_texts="drop", max_long_share=0.5)
    (lengths,) = load_rows(dropping, tokenizer, 8).train["seq_lengths"]
    assert sum(lengths) < 8 < whole
    assert "too long 1: it has more than 8 tokens (TrainSpec.seq_len, DataSpec.long_texts)" in capsys.readouterr().out


def test_the_report_says_how_much_a_cut_leaves_out(tokenizer, tmp_path, capsys):
    messages = [{"role": message.role, "content": message.content} for message in chat(9).messages]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    rows = load_rows(DataSpec(str(path), eval_rows=0), tokenizer, 100).train
    (kept,) = rows["seq_lengths"][0]
    whole = len(ChatFormat(tokenizer).encode(chat(9)).input_ids)
    assert f"1 cut (100.0%), which leaves out {whole - kept:,} tokens" in capsys.readouterr().out
