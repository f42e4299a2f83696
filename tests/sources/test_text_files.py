"""The command that a refusal names makes a file that is read."""

import gzip
import json
import shutil
import subprocess

import pytest

from common.recipe import UserError
from common.sources.files import read_rows

LINES = '{"text": "café"}\n{"text": "two"}\n'
LINE_ROWS = [json.loads(line) for line in LINES.splitlines()]
REFUSED = {
    "gzip twice": ("my rows.jsonl", gzip.compress(gzip.compress(LINES.encode())), "gunzip"),
    "UTF-16 in gzip": ("my rows.jsonl.gz", gzip.compress(LINES.encode("utf-16")), "gunzip"),
    "pretty-printed in gzip": ("my rows.jsonl.gz", gzip.compress(LINES.replace("{", "{\n ").encode()), "gunzip"),
    "rows in an object": ("my rows.json", json.dumps({"my rows": LINE_ROWS}).encode(), "jq"),
    "UTF-16": ("my rows.jsonl", LINES.encode("utf-16"), "iconv"),
    "WINDOWS-1252": ("my rows.csv", "text\r\ncafé\r\ntwo\r\n".encode("cp1252"), "iconv"),
    "pretty-printed": ("my rows.jsonl", LINES.replace("{", "{\n ").encode(), "jq"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_command_in_the_line_does_what_it_says(name, tmp_path):
    file, content, program = REFUSED[name]
    if not shutil.which(program):
        pytest.skip(f"there is no {program} here")
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        list(read_rows(str(path)))
    command = program + str(refused.value).partition(program)[2]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    (made,) = {*tmp_path.iterdir()} - {path}
    assert [row for _, row in read_rows(str(made))] == [{"text": "café"}, {"text": "two"}]
