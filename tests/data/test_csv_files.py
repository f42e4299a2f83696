"""CSV files as programs write them: with another delimiter, a line sep=;, other header names, empty rows."""

import pytest

from common.data.files import read_rows
from tests.data.test_files import write

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
    ],
)
def test_a_table_with_one_reading_is_read(content, tmp_path):
    assert [row for _, row in read_rows(write(tmp_path, "a.csv", content))] == ROWS


@pytest.mark.parametrize("text", ["a\u2028b", "a\0b", "👩‍👩‍👧", "a\u200bb", "a;b\tc", "a\nb", "x" * 200_000])
def test_a_cell_is_taken_as_it_stands(text, tmp_path):
    source = write(tmp_path, "a.csv", f'prompt,completion\nHello,"{text}"\n')
    assert [row for _, row in read_rows(source)] == [{"prompt": "Hello", "completion": text}]


def test_a_single_column_needs_no_delimiter(tmp_path):
    rows = list(read_rows(write(tmp_path, "a.csv", "text\nOne; two\tthree\n\nfour\n")))
    assert [row for _, row in rows] == [{"text": "One; two\tthree"}, {"text": "four"}]


def test_places_count_every_line_of_the_file(tmp_path):
    source = write(tmp_path, "a.csv", 'sep=;\nprompt;completion\n;\n"a\nb";c\nd;e\n')
    assert [place for place, _ in read_rows(source)] == [f"{source}:5", f"{source}:6"]
