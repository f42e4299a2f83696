"""Plain text files: one is one document, and one row of text."""

import gzip

import pytest

from common.data.rows import load_rows
from common.recipe import DataSpec
from common.sources.files import read_rows
from tests.sources.test_files import write


@pytest.mark.parametrize(
    "content",
    [b"One line.\nTwo.\n\nThree.", b"\xef\xbb\xbfOne line.\r\nTwo.\r\n\r\nThree.", b"One line.\rTwo.\r\rThree."],
    ids=["as Unix writes it", "as Windows does, with a mark", "as old Macs did"],
)
def test_a_file_is_one_row_whose_lines_end_as_in_every_text(content, tmp_path):
    source = write(tmp_path, "a.txt", content)
    assert list(read_rows(source)) == [(source, {"text": "One line.\nTwo.\n\nThree."})]


def test_blanks_at_both_ends_stay(tmp_path):
    assert [row for _, row in read_rows(write(tmp_path, "a.txt", "\n  a\n\n"))] == [{"text": "\n  a\n\n"}]


def test_a_folder_of_texts_is_a_row_each(tmp_path):
    for number in (10, 2, 1):
        write(tmp_path, f"chapter{number}.txt", f"Chapter {number}")
    write(tmp_path, "chapter3.txt.gz", gzip.compress(b"Chapter 3"))
    write(tmp_path, "README.txt", "about")
    assert [row["text"] for _, row in read_rows(str(tmp_path))] == [f"Chapter {number}" for number in (1, 2, 3, 10)]


def test_a_document_is_cut_to_rows_and_ends_once(tmp_path, tokenizer):
    source = write(tmp_path, "a.txt", "\n".join(f"Line {number} of the book." for number in range(100)))
    rows = load_rows(DataSpec(source, eval_rows=0), tokenizer, 64)
    assert rows.reports[0].read == 1 and len(rows.train) > 1
    ends = sum(row.count(tokenizer.eos_token_id) for row in rows.train["input_ids"])
    assert ends == 1
