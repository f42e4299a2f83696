import json
from dataclasses import replace

import datasets
import pytest

from common.data.chat_format import IGNORED, ChatFormat, Tokens
from common.data.conversations import Message
from common.data.files import BadRow
from common.data.rows import fit_to_row, load_rows, mark_trained
from common.recipe import DataSpec, UserError


def conversation(user: str = "Hello", assistant: str = "Hi") -> str:
    return json.dumps({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]})


def write(folder, *lines: str) -> str:
    path = folder / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def tokens(length: int, first: int = 10) -> Tokens:
    ids = list(range(first, first + length))
    return Tokens(ids, [IGNORED, *ids[1:]], [length])


def test_the_report_counts_and_names_every_row(tmp_path, tokenizer, capsys):
    lines = [conversation(f"Hello {n}") for n in range(50)]
    lines[7], lines[9], lines[30] = "{", "{", conversation(assistant="")
    source = write(tmp_path, *lines)
    rows = load_rows(DataSpec(source, eval_rows=0, max_bad_share=0.1), tokenizer, 128)
    out = capsys.readouterr().out
    assert "50 rows read (messages), 47 kept, 3 dropped" in out
    assert f"dropped 2: invalid JSON ({source}:8; {source}:10)" in out
    assert f"dropped 1: the assistant's text is empty ({source}:31)" in out
    report = rows.reports[0]
    assert (report.read, report.kept, report.dropped) == (50, 47, 3)
    assert rows.train_tokens == report.tokens
    assert "⟦" in out and "<|end|>⟧" in out


def test_more_than_one_percent_bad_rows_stop_the_run(tmp_path, tokenizer):
    source = write(tmp_path, *[conversation()] * 97, "{", "{", "{")
    with pytest.raises(UserError) as error:
        load_rows(DataSpec(source), tokenizer, 128)
    assert f"3 of 100 rows of {source} cannot be used (3.0%, limit 1.0%)" in str(error.value)
    assert f"invalid JSON ({source}:98 and 2 more)" in str(error.value)


def test_one_percent_bad_rows_do_not(tmp_path, tokenizer):
    assert load_rows(DataSpec(write(tmp_path, *[conversation()] * 99, "{")), tokenizer, 128).reports[0].dropped == 1


def test_a_source_without_rows_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="holds no rows"):
        load_rows(DataSpec(write(tmp_path, "")), tokenizer, 128)


def test_held_out_rows_are_not_trained(tmp_path, tokenizer):
    source = write(tmp_path, *[conversation(f"Question number {n}") for n in range(100)])
    rows = load_rows(DataSpec(source, eval_rows=7), tokenizer, 64, seed=3)

    def examples(packed):
        for row in packed:
            start = 0
            for length in row["seq_lengths"]:
                yield tuple(row["input_ids"][start : start + length])
                start += length

    train, held_out = set(examples(rows.train)), set(examples(rows.evaluation))
    assert (len(train), len(held_out)) == (93, 7)
    assert not train & held_out
    again = load_rows(DataSpec(source, eval_rows=7), tokenizer, 64, seed=3)
    assert set(examples(again.evaluation)) == held_out


def test_a_hub_data_set_may_hold_its_own_split_out(tokenizer, monkeypatch):
    def load_dataset(name, split, revision):
        return datasets.Dataset.from_list([{"prompt": split, "completion": str(n)} for n in range(20)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows(DataSpec("owner/chats", eval_source="owner/chats", eval_split="test"), tokenizer, 64)
    for packed, split, other in ((rows.train, "train", "test"), (rows.evaluation, "test", "train")):
        text = tokenizer.decode(sum(packed["input_ids"], []))
        assert f"<|user|>{split}<|end|>" in text and f"<|user|>{other}<|end|>" not in text


def test_at_most_a_tenth_is_held_out(tmp_path, tokenizer):
    source = write(tmp_path, *[conversation(f"Question {n}") for n in range(30)])
    rows = load_rows(DataSpec(source, eval_rows=200), tokenizer, 64)
    assert sum(map(len, rows.evaluation["seq_lengths"])) == 3


def test_pitfall_7_a_long_conversation_keeps_whole_turns(tokenizer):
    chat = tuple(
        Message(role, f"{role} says a few words in turn {turn}") for turn in range(6) for role in ("user", "assistant")
    )
    whole = ChatFormat(tokenizer).encode(chat)
    (cut,) = fit_to_row(whole, whole.turn_ends[2] + 5, is_text=False)
    assert len(cut.input_ids) == whole.turn_ends[2]
    assert cut.input_ids[-1] == cut.labels[-1] == tokenizer.eos_token_id
    with pytest.raises(BadRow, match="its first answer ends after 12 tokens"):
        fit_to_row(whole, 12, is_text=False)


def test_a_long_text_is_cut_without_losing_a_token():
    pieces = fit_to_row(tokens(150), 64, is_text=True)
    assert [len(piece.input_ids) for piece in pieces] == [64, 64, 22]
    assert sum((piece.input_ids for piece in pieces), []) == tokens(150).input_ids
    assert all(piece.labels[0] == IGNORED for piece in pieces)


def test_pitfall_34_rows_whose_answers_do_not_fit_are_refused(tmp_path, tokenizer):
    source = write(tmp_path, *[conversation("word " * 200)] * 10)
    with pytest.raises(UserError, match="its first answer ends after 64 tokens"):
        load_rows(DataSpec(source), tokenizer, 64)


def test_marked_shows_what_is_trained(tokenizer):
    example = ChatFormat(tokenizer).encode((Message("user", "Hello"), Message("assistant", "Hi\nyou")))
    assert mark_trained(example, tokenizer) == "<s><|user|>Hello<|end|><|assistant|>⟦Hi⏎you<|end|>⟧"


def test_train_on_everything(tmp_path, tokenizer):
    spec = DataSpec(write(tmp_path, *[conversation()] * 20), eval_rows=0)
    part = load_rows(spec, tokenizer, 64).reports[0]
    whole = load_rows(replace(spec, train_on="everything"), tokenizer, 64).reports[0]
    assert part.trained_tokens < whole.trained_tokens == whole.tokens - 20
