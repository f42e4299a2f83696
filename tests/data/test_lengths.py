"""The report says how many rows would fit whole at other lengths."""

import json
from collections import Counter

import pytest

from common.data.lengths import fit_line, shortest_fit
from common.data.rows import load_rows
from common.recipe import DataSpec, UserError
from tests.data.test_rows import conversation, write


@pytest.mark.parametrize(
    "tokens, expected",
    [(1, 512), (512, 512), (513, 768), (768, 768), (769, 1024), (1025, 1536), (1536, 1536), (1537, 2048), (2049, 3072)],
)
def test_the_shortest_length_that_takes_a_row(tokens, expected):
    assert shortest_fit(tokens, 512) == expected


def test_the_line_counts_the_rows_that_fit_at_each_length():
    assert fit_line(Counter({512: 976, 768: 20, 1024: 3}), 512) == "512: 976 of 999 rows; 768: 996; 1,024: all"
    assert fit_line(Counter({512: 999}), 512) == ""
    assert fit_line(Counter({1536: 3}), 512) == "512: 0 of 3 rows; 1,536: all"


def test_the_line_stays_short_for_lengths_of_all_kinds():
    line = fit_line(Counter({64 << power: 1 for power in range(12)}), 64)
    assert line == "64: 1 of 12 rows; 128: 2; 256: 3; 512: 4; 131,072: all"


def long_chats(folder, *, short: int, long: int) -> str:
    chats = [conversation(f"Question {n}") for n in range(short)]
    return write(folder, *chats, *[conversation(f"Long {n}", "word " * 24) for n in range(long)])


def test_rows_that_are_only_too_long_are_no_faults(tmp_path, tokenizer, capsys):
    source = long_chats(tmp_path, short=95, long=5)
    report = load_rows(DataSpec(source, eval_rows=0, max_bad_share=0), tokenizer, 64).reports[0]
    assert (report.kept, report.dropped, report.too_long.total) == (95, 0, 5)
    said = capsys.readouterr().out
    assert f"{source}: 100 rows read (messages), 95 kept, 0 dropped, 5 too long" in said
    assert "  too long 5: its first answer ends after 64 tokens (TrainSpec.seq_len)" in said
    assert "  whole at TrainSpec.seq_len = 64: 95 of 100 rows; 96: all" in said


def test_too_many_rows_that_are_too_long_stop_the_run_and_the_line_says_which_length_takes_them(tmp_path, tokenizer):
    source = long_chats(tmp_path, short=50, long=6)
    with pytest.raises(UserError) as error:
        load_rows(DataSpec(source), tokenizer, 64)
    assert f"6 of 56 rows of {source} are too long (10.7%, limit 10.0%): its first answer" in str(error.value)
    assert "Whole at TrainSpec.seq_len = 64: 50 of 56 rows; 96: all. Raise it, or" in str(error.value)
    load_rows(DataSpec(source, max_long_share=0.2), tokenizer, 64)


def test_the_limit_of_bad_rows_does_not_count_long_ones_nor_the_other_way_round(tmp_path, tokenizer):
    path = long_chats(tmp_path, short=90, long=5)
    with open(path, "a") as file:
        file.write("{\n" * 5)
    load_rows(DataSpec(path, max_bad_share=0.05, max_long_share=0.05), tokenizer, 64)
    with pytest.raises(UserError, match="5 of 100 rows .* cannot be used"):
        load_rows(DataSpec(path, max_bad_share=0.04, max_long_share=0.05), tokenizer, 64)
    with pytest.raises(UserError, match="5 of 100 rows .* are too long"):
        load_rows(DataSpec(path, max_bad_share=0.05, max_long_share=0.04), tokenizer, 64)


def test_cut_conversations_and_split_texts_count_as_not_whole(tmp_path, tokenizer, capsys):
    chat = [{"role": role, "content": f"{role} says this"} for _ in range(12) for role in ("user", "assistant")]
    load_rows(DataSpec(write(tmp_path, json.dumps({"messages": chat}), conversation()), eval_rows=0), tokenizer, 64)
    assert "  whole at TrainSpec.seq_len = 64: 1 of 2 rows; " in capsys.readouterr().out
    text = write(tmp_path, json.dumps({"text": "word " * 100}), json.dumps({"text": "word"}))
    load_rows(DataSpec(text, eval_rows=0), tokenizer, 64)
    assert "  whole at TrainSpec.seq_len = 64: 1 of 2 rows; 384: all" in capsys.readouterr().out
