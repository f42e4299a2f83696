"""CSV files as programs write them: with another delimiter, a line sep=;, other header names, empty rows."""

from collections import Counter

import pytest

from common.conversations.row_reader import RowReader
from common.sources.files import read_rows
from common.sources.source_row import BadRow
from tests.sources.test_files import write

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


@pytest.mark.parametrize(
    "content",
    [
        "prompt;completion\na;b\nc;d\n",
        '"prompt";"completion"\n"a";"b"\n"c";"d"\n',
        "prompt\tcompletion\na\tb\nc\td\n",
        "sep=;\nprompt;completion\na;b\nc;d\n",
        '"sep=|"\r\nprompt|completion\r\na|b\r\nc|d\r\n',
        "\ufeffsep=\t\nprompt\tcompletion\na\tb\nc\td\n",
        'Prompt, "completion ",PROMPT ID\na,b,1\nc,d,2\n'.replace(' "', '"'),
        "\ufeff\ufeffprompt , COMPLETION\na,b\nc,d\n",
        "prompt,completion,,\na,b,,\nc,d,,\n,,,\n ,,,\n",
        "\n,\nprompt,completion\n\na,b\n,\nc,d\n",
        "id,note,id,prompt,completion,note\n1,x,2,a,b,y\n1,x,2,c,d,y\n",
        "completion;prompt;text\nb;a;x\nd;c;y\n",
        "prompt,completion\ra,b\rc,d\r",
        "prompt,completion\r\na,b\r\nc,d",
        "PROMPT ;ID; Completion \na;1;b\nc;2;d\n",
    ],
    ids=[
        "semicolons",
        "quoted semicolons",
        "tabs",
        "sep=;",
        "quoted sep=|, CRLF",
        "a mark and sep=tab",
        "capitals and blanks",
        "two marks",
        "trailing columns and rows of nothing",
        "empty rows before the header",
        "other columns twice",
        "another order",
        "CR alone",
        "CRLF, no line end at the end",
        "capitals, blanks and semicolons",
    ],
)
def test_a_table_with_one_reading_is_read(content, tmp_path):
    assert [row for _, row in read_rows(write(tmp_path, "a.csv", content))] == ROWS


@pytest.mark.parametrize("text", ["a\u2028b", "a\0b", "👩‍👩‍👧", "a\u200bb", "a;b\tc", "a\nb", "x" * 200_000])
def test_a_cell_is_taken_as_it_stands(text, tmp_path):
    source = write(tmp_path, "a.csv", f'prompt,completion\nHello,"{text}"\n')
    assert [row for _, row in read_rows(source)] == [{"prompt": "Hello", "completion": text}]


@pytest.mark.parametrize("content", ["prompt\tcompletion\na;1\tb,2\n", 'Prompt\t"completion "\n"a;1"\t"b,2"\n'])
def test_a_tsv_file_has_tabs_and_nothing_else(content, tmp_path):
    assert [row for _, row in read_rows(write(tmp_path, "a.tsv", content))] == [{"prompt": "a;1", "completion": "b,2"}]


def test_a_single_column_needs_no_delimiter(tmp_path):
    rows = list(read_rows(write(tmp_path, "a.csv", "text\nOne; two\tthree\n\nfour\n")))
    assert [row for _, row in rows] == [{"text": "One; two\tthree"}, {"text": "four"}]


def test_rows_with_a_text_in_a_column_that_no_format_reads_are_counted(tmp_path):
    source = write(tmp_path, "a.csv", "id,prompt,note,completion,,note\n1,a,,b, ,\n2,c,x,d,,y\n3,e,,f,w,z\n4,g\n")
    unread = Counter()
    list(read_rows(source, unread=unread))
    assert unread == {"id": 3, "note (column 3)": 1, "note (column 6)": 2, "(column 5)": 1}


def test_a_row_is_refused_for_the_picture_that_it_has(tmp_path):
    source = write(tmp_path, "a.csv", "Image,prompt,completion\n,a,b\na.png,c,d\n")
    unread, reader = Counter(), RowReader()
    (_, without), (_, with_one) = read_rows(source, unread=unread)
    assert [message.content for message in reader.read(without).messages] == ["a", "b"]
    with pytest.raises(BadRow, match="it has image; only text can be trained"):
        reader.read(with_one)
    assert not unread


def test_places_count_every_line_of_the_file(tmp_path):
    source = write(tmp_path, "a.csv", 'sep=;\nprompt;completion\n;\n"a\nb";c\nd;e\n')
    assert [place for place, _ in read_rows(source)] == [f"{source}:5", f"{source}:6"]
