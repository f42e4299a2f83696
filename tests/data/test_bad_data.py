"""A corpus of malformed data files: each is refused with one line that names file and place, exit status 2."""

import gzip
import io
import json
import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from common.cli import run
from common.data.rows import load_rows
from common.machine.launch import ERROR_STATUS
from common.model.loading import load_tokenizer
from common.recipe import DataSpec, Recipe
from tests.run.test_faults import ended, forked

GIB = 1 << 30


def chat(*turns: tuple[object, object], key: str = "messages") -> str:
    """A row of messages; None leaves a role or a content out."""
    messages = []
    for role, content in turns:
        message = {"role": role, "content": content}
        messages.append({name: value for name, value in message.items() if value is not None})
    return json.dumps({key: messages})


ASK, SAY = ("user", "Hello"), ("assistant", "Hi")
GOOD = chat(ASK, SAY)


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def many(bad: str, good: int = 3) -> str:
    return "\n".join([GOOD] * good + [bad]) + "\n"


# From the name of a case to the file's name, its content, and what the error says. {path} is the file's path.
CORPUS: dict[str, tuple[str, bytes | str, str]] = {
    # broken JSON
    "half an object": ("a.jsonl", '{"messages": [', "invalid JSON ({path}:1)"),
    "a trailing comma": ("a.jsonl", '{"text": "a",}', "invalid JSON ({path}:1)"),
    "single quotes": ("a.jsonl", "{'text': 'a'}", "invalid JSON ({path}:1)"),
    "two objects in a line": ("a.jsonl", GOOD + GOOD, "invalid JSON ({path}:1)"),
    "a comment": ("a.jsonl", "// chats\n" + GOOD, "invalid JSON ({path}:1)"),
    "a raw line break in a string": ("a.jsonl", '{"text": "a\nb"}', "invalid JSON ({path}:1 and 1 more)"),
    "a tab in a string": ("a.jsonl", '{"text": "a\tb"}', "invalid JSON ({path}:1)"),
    "a bad escape": ("a.jsonl", '{"text": "\\x41"}', "invalid JSON ({path}:1)"),
    "NaN": ("a.jsonl", '{"text": NaN}', "NaN and Infinity are not JSON; write null ({path}:1)"),
    "Infinity": ("a.jsonl", '{"text": -Infinity}', "NaN and Infinity are not JSON; write null ({path}:1)"),
    "NaN in a list": ("a.json", '[{"text": NaN}]', "{path}: NaN and Infinity are not JSON; write null"),
    "Python's None": ("a.jsonl", '{"text": None}', "invalid JSON ({path}:1)"),
    "a number too long for Python": ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "invalid JSON ({path}:1)"),
    "a key twice": ("a.jsonl", '{"text": "a", "text": "b"}', "a key occurs twice in a JSON object ({path}:1)"),
    "a role twice": (
        "a.jsonl",
        GOOD.replace('"role": "user"', '"role": "user", "role": "system"'),
        "a key occurs twice in a JSON object ({path}:1)",
    ),
    "brackets 100,000 deep": ("a.jsonl", "[" * 100_000 + "]" * 100_000, "invalid JSON ({path}:1)"),
    "objects 100,000 deep": ("a.jsonl", '{"a":' * 100_000 + "1" + "}" * 100_000, "invalid JSON ({path}:1)"),
    "a string": ("a.jsonl", '"Hello"', "not a JSON object ({path}:1)"),
    "a list": ("a.jsonl", "[1, 2]", "a list, not a JSON object ({path}:1)"),
    "a list of messages a line": ("a.jsonl", '[{"role": "user"}]\n[{"role": "user"}]', "a list, not a JSON object ({path}:1 and 1 more)"),
    "pretty-printed": ("a.jsonl", json.dumps({"prompt": "a", "completion": "b"}, indent=1), "{path} is pretty-printed: its objects span several lines. Write one object a line: jq -c . {path} > lines.jsonl"),
    "a list cut short in .jsonl": ("a.jsonl", "[\n" + GOOD + ",\n", "{path}:3: invalid JSON: "),
    "null": ("a.jsonl", "null", "not a JSON object ({path}:1)"),
    "a number": ("a.jsonl", "42", "not a JSON object ({path}:1)"),
    "a bad line after good ones": ("a.jsonl", many("{"), "1 of 4 rows of {path} cannot be used (25.0%, limit 1.0%)"),
    # encodings
    "UTF-16 with a mark": ("a.jsonl", GOOD.encode("utf-16"), "{path} is UTF-16; convert it: iconv"),
    "UTF-16 without": ("a.jsonl", GOOD.encode("utf-16-le"), "invalid JSON ({path}:1)"),
    "UTF-32": ("a.jsonl", GOOD.encode("utf-32"), "{path} is UTF-16; convert it"),
    "Latin-1": ("a.jsonl", '{"text": "caf\xe9"}'.encode("latin-1"), "not UTF-8; convert the file: iconv -f WINDOWS-1252 -t UTF-8 ({path}:1)"),
    "a cut character": ("a.jsonl", '{"text": "é"}'.encode().replace(b"\xa9", b""), "not UTF-8; convert the file: iconv -f WINDOWS-1252 -t UTF-8 ({path}:1)"),
    "a lone surrogate": ("a.jsonl", '{"text": "\\ud800"}', "text holds a lone surrogate, which is not text ({path}:1)"),
    "a lone surrogate in a role": ("a.jsonl", '{"messages": [{"role": "\\ud800", "content": "a"}]}', "is not system, user"),
    "NUL bytes": ("a.jsonl", b'{"text": "a\x00b"}', "invalid JSON ({path}:1)"),
    "nothing but NUL bytes": ("a.jsonl", b"\x00" * 4096, "invalid JSON ({path}:1)"),
    # files that are no data
    "empty": ("a.jsonl", "", "{path} holds no rows"),
    "blank lines": ("a.jsonl", "\n\n  \n", "{path} holds no rows"),
    "a mark alone": ("a.jsonl", b"\xef\xbb\xbf", "{path} holds no rows"),
    "gzip": ("a.jsonl", gzip.compress(GOOD.encode()), "{path} is gzip-compressed; unpack it first"),
    "gzip named .json": ("a.json", gzip.compress(b"[]"), "{path} is gzip-compressed; unpack it first"),
    "another suffix": ("a.txt", GOOD, "{path} is not one of .jsonl, .json, .csv, .parquet"),
    "a picture": ("a.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not UTF-8; convert the file: iconv -f WINDOWS-1252 -t UTF-8 ({path}:1"),
    "a line of 50 MB": ("a.jsonl", '{"text": "' + "a" * 50_000_000 + '"}', "a line of more than 16 MiB ({path}:1)"),
    # rows of no format, or of two
    "no key that is known": ("a.jsonl", '{"body": "a"}', "no format has these keys; a row needs messages, or"),
    "a prompt alone": ("a.jsonl", '{"prompt": "a"}', "no format has these keys"),
    "an empty object": ("a.jsonl", "{}", "no format has these keys"),
    "two formats": ("a.jsonl", GOOD + '\n{"text": "b"}', "the format is text, not messages as above it ({path}:2)"),
    # messages
    "messages are null": ("a.jsonl", '{"messages": null}', "the list of messages is missing or empty ({path}:1)"),
    "messages are a text": ("a.jsonl", '{"messages": "Hello"}', "the messages are text, invalid JSON ({path}:1)"),
    "messages as Python prints them": ("a.csv", "messages\n\"[{'role': 'user', 'content': 'a'}]\"\n", "the messages are text, invalid JSON, but a list as Python prints it; write it with json.dumps ({path}:2)"),
    "messages as JSON with a key twice": ("a.csv", 'messages\n"[{""role"": ""user"", ""role"": ""system""}]"\n', "the messages are text, a key occurs twice in a JSON object ({path}:2)"),
    "messages are an object": ("a.jsonl", '{"messages": {"role": "user"}}', "the messages are not a list ({path}:1)"),
    "messages are empty": ("a.jsonl", '{"messages": []}', "the list of messages is missing or empty"),
    "a message is a text": ("a.jsonl", '{"messages": ["Hello"]}', "a message is not an object ({path}:1)"),
    "a message is null": ("a.jsonl", '{"messages": [null]}', "a message is not an object"),
    "an unknown role": ("a.jsonl", chat(ASK, ("bot", "Hi")), "role 'bot' is not system, user or assistant ({path}:1)"),
    "a role in capitals": ("a.jsonl", chat(("User", "Hello"), SAY), "role 'User' is not system"),
    "a role that is a number": ("a.jsonl", chat((1, "Hello"), SAY), "role 1 is not system"),
    "no role": ("a.jsonl", chat((None, "Hello"), SAY), "role None is not system"),
    "a tool's turn": ("a.jsonl", chat(ASK, ("tool", "42"), SAY), "role 'tool' is not system"),
    "the content is missing": ("a.jsonl", chat(ASK, ("assistant", None)), "the assistant's text is missing ({path}:1)"),
    "the content is null": ("a.jsonl", GOOD.replace('"Hi"', "null"), "the assistant's text is missing"),
    "the content is a number": ("a.jsonl", chat(ASK, ("assistant", 42)), "the assistant's text is not text"),
    "the content is a list": ("a.jsonl", chat(ASK, ("assistant", ["Hi"])), "the assistant's text is a list, and not of parts with a type ({path}:1)"),
    "a part without its text": ("a.jsonl", chat(ASK, ("assistant", [{"type": "text"}])), "the assistant's text is missing ({path}:1)"),
    "a part with a number": ("a.jsonl", chat(ASK, ("assistant", [{"type": "text", "text": 4}])), "the assistant's text is not text ({path}:1)"),
    "a part that is a picture": ("a.jsonl", chat(("user", [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]), SAY), "the user's text has a part of type 'image_url'; only text can be trained ({path}:1)"),
    "no parts": ("a.jsonl", chat(("user", []), SAY), "the user's text is empty ({path}:1)"),
    "the content is true": ("a.jsonl", chat(("user", True), SAY), "the user's text is not text"),
    "an empty answer": ("a.jsonl", chat(ASK, ("assistant", "")), "the assistant's text is empty ({path}:1)"),
    "an answer of blanks": ("a.jsonl", chat(ASK, ("assistant", " \n\t")), "the assistant's text is empty"),
    "an answer of zero-width characters": ("a.jsonl", chat(ASK, ("assistant", "\u200b\u2060\ufeff")), "the assistant's text is of invisible characters alone ({path}:1)"),
    "a question of zero-width characters and blanks": ("a.jsonl", chat(("user", " \u200d\n\u00ad"), SAY), "the user's text is of invisible characters alone"),
    "an answer of fillers and selectors": ("a.jsonl", chat(ASK, ("assistant", "\u3164\ufe0f\u115f")), "the assistant's text is of invisible characters alone"),
    "an answer of NUL": ("a.jsonl", chat(ASK, ("assistant", "\0")), "the assistant's text is of invisible characters alone"),
    "a zero-width text in CSV": ("a.csv", "prompt,completion\na,\u200b\n", "completion is of invisible characters alone ({path}:2)"),
    "an empty question": ("a.jsonl", chat(("user", ""), SAY), "the user's text is empty"),
    "the assistant begins": ("a.jsonl", chat(SAY, ASK, SAY), "a turn of the assistant where the user's should be"),
    "two questions": ("a.jsonl", chat(ASK, ASK, SAY), "a turn of the user where the assistant's should be"),
    "two answers": ("a.jsonl", chat(ASK, SAY, SAY), "a turn of the assistant where the user's should be"),
    "no answer at the end": ("a.jsonl", chat(ASK, SAY, ASK), "the last turn is not the assistant's ({path}:1)"),
    "a system's text alone": ("a.jsonl", chat(("system", "Be brief.")), "the last turn is not the assistant's"),
    "a system's text in the middle": ("a.jsonl", chat(ASK, ("system", "a"), SAY), "a turn of the system where"),
    "an answer longer than a row": ("a.jsonl", chat(ASK, ("assistant", "word " * 500)), "its first answer ends after 128 tokens"),
    # the other formats
    "ShareGPT with an unknown name": ("a.jsonl", '{"conversations": [{"from": "bard", "value": "a"}]}', "role 'bard' is not"),
    "ShareGPT without a value": ("a.jsonl", '{"conversations": [{"from": "human"}]}', "the user's text is missing"),
    "a completion that is null": ("a.jsonl", '{"prompt": "a", "completion": null}', "completion is missing ({path}:1)"),
    "an instruction that is empty": ("a.jsonl", '{"instruction": "", "output": "a"}', "instruction is empty"),
    "an input that is a number": ("a.jsonl", '{"instruction": "a", "input": 3, "output": "b"}', "input is not text"),
    "a text that was rendered": ("a.jsonl", '{"text": "<|user|>a<|end|>"}', "the text holds the control token <|user|>: where the model's own chat template rendered it"),
    # .json
    "an object for a list": ("a.json", GOOD, "{path} holds one dict; a .json file is a list of objects"),
    "two lists in .json": ("a.json", "[" + GOOD + "]\n[" + GOOD + "]", "{path}:2: invalid JSON: Extra data; write one list of objects, or one object a line"),
    "a key twice in another case": ("a.json", '[{"text": "a", "Text": "b"}]', "2 keys could be 'text': ['text', 'Text']; leave one ({path}, entry 1)"),
    "a .json in Latin-1": ("a.json", '["caf\xe9"]'.encode("latin-1"), "{path} is not UTF-8 (byte 5); convert it: iconv -f WINDOWS-1252 -t UTF-8 {path} > utf8.json"),
    "a list cut short": ("a.json", "[" + GOOD + ",\n", "{path}:2: invalid JSON"),
    "a list of texts": ("a.json", '["a", "b"]', "not a JSON object ({path}, entry 1 and 1 more)"),
    "an empty list": ("a.json", "[]", "{path} holds no rows"),
    "a key twice in a list": ("a.json", '[{"text": "a", "text": "b"}]', "{path}: a key occurs twice in a JSON object"),
    "a deep list": ("a.json", "[" * 100_000, "{path}: invalid JSON"),
    # .csv
    "an open quote": ("a.csv", 'prompt,completion\n"a,b\n', "{path}:2: broken CSV"),
    "text after a quote": ("a.csv", 'prompt,completion\n"a" b,c\n', "{path}:2: broken CSV"),
    "a cell too few": ("a.csv", "prompt,completion\na\n", "a CSV row of another length than the header ({path}:2)"),
    "a cell too many": ("a.csv", "prompt,completion\na,b,c\n", "a CSV row of another length than the header ({path}:2)"),
    "other columns": ("a.csv", "promt,completion\na,b\n", "{path}: no format has the columns of its first line: 'promt', 'completion' (delimiter ','); name them there: messages, or"),
    "other columns, semicolons": ("a.csv", '"promt";"completion"\na;b\n', "'promt', 'completion' (delimiter ';'); name them there"),
    "no header": ("a.csv", "Hello;Hi\nHow?;So.\n", "{path}: no format has the columns of its first line: 'Hello', 'Hi' (delimiter ';')"),
    "another delimiter than sep= says": ("a.csv", "sep=,\nprompt;completion\na;b\n", "'prompt;completion' (delimiter ',')"),
    "two delimiters that fit": ("a.csv", "text,a;text\nb,c;d\n", "{path}: its header can be read as ['text', 'a;text'] and as ['text,a', 'text']; name the delimiter"),
    "a column twice": ("a.csv", "prompt,completion,completion\na,b,c\n", "{path}: its header: 2 keys could be 'completion': ['completion', 'completion']; leave one"),
    "a column twice in another case": ("a.csv", "prompt;completion; Prompt\na;b;c\n", "{path}: its header: 2 keys could be 'prompt': ['prompt', ' Prompt']; leave one"),
    "an optional column twice": ("a.csv", "instruction,input,output,Input\na,b,c,d\n", "{path}: its header: 2 keys could be 'input'"),
    "a header alone": ("a.csv", "prompt,completion\n", "{path} holds no rows"),
    "an empty cell": ("a.csv", "prompt,completion\na,\n", "completion is empty ({path}:2)"),
    "a CSV in Latin-1": ("a.csv", "prompt,completion\na,caf\xe9\n".encode("latin-1"), "{path} is not UTF-8 (line 2); if Excel saved it, convert it: iconv -f WINDOWS-1252 -t UTF-8 {path} > utf8.csv"),
    "a cell of 20 MB": ("a.csv", f"prompt,completion\na,{'b' * 20_000_000}\n", "{path}:2: broken CSV: a line of more than 16 MiB"),
    "an open quote in a large file": ("a.csv", 'prompt,completion\na,"b\n' + "c,d\n" * 5_000_000, "broken CSV: field larger than field limit (16777216) (the row begins in line 2)"),
    # .parquet
    "a Parquet file cut short": ("a.parquet", parquet([json.loads(GOOD)])[:-20], "{path} is not a readable Parquet file"),
    "a Parquet file without its head": ("a.parquet", parquet([json.loads(GOOD)])[20:-9] + b"!", "{path} is not a readable"),
    "numbers in Parquet": ("a.parquet", parquet([{"prompt": 1, "completion": 2}]), "prompt is not text ({path}, row 1)"),
    "nulls in Parquet": ("a.parquet", parquet([{"text": None}]), "text is missing ({path}, row 1)"),
    "other columns in Parquet": ("a.parquet", parquet([{"promt": "a", "completion": "b"}]), "{path}: no format has its columns: 'promt', 'completion'; name them messages, or"),
    "a column twice in another case in Parquet": ("a.parquet", parquet([{"text": "a", "TEXT": "b"}]), "{path}: its columns: 2 keys could be 'text': ['text', 'TEXT']; leave one"),
    "a Parquet file without rows": ("a.parquet", parquet([]), "{path} holds no rows"),
}  # fmt: skip


@pytest.fixture
def story(recipe):
    """The steps of a recipe that come before the weights are loaded, and the recipe."""

    def main(recipe: Recipe) -> None:
        load_rows(recipe.data, load_tokenizer(recipe.model), recipe.train.seq_len)

    return main, recipe


def test_the_corpus_is_large_enough():
    assert len(CORPUS) >= 60


@pytest.mark.parametrize("name", CORPUS)
def test_malformed_data_is_refused_with_one_line_that_names_the_place(name, story, tmp_path, capsys):
    main, recipe = story
    file, content, words = CORPUS[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    started = time.monotonic()
    status = run(main, recipe, ["--data", str(path)])
    assert time.monotonic() - started < 10
    error = capsys.readouterr().err
    assert status == ERROR_STATUS, error
    lines = [line for line in error.splitlines() if line]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ") and words.format(path=path) in lines[0], lines[0]


def test_a_folder_and_an_unreadable_file_are_refused_too(story, tmp_path, capsys, monkeypatch):
    main, recipe = story
    (tmp_path / "folder.jsonl").mkdir()
    assert run(main, recipe, ["--data", str(tmp_path / "folder.jsonl")]) == ERROR_STATUS
    assert "folder.jsonl is a folder; name one .jsonl" in capsys.readouterr().err
    # Root may read everything, so the test raises the error that another user would get.
    (tmp_path / "secret.jsonl").write_text(GOOD)
    ordinary_open = Path.open

    def open_unless_secret(path, *arguments, **named):
        if path.name == "secret.jsonl":
            raise PermissionError(13, "Permission denied")
        return ordinary_open(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", open_unless_secret)
    assert run(main, recipe, ["--data", str(tmp_path / "secret.jsonl")]) == ERROR_STATUS
    assert "secret.jsonl cannot be read: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a line of 50 MB", "brackets 100,000 deep", "nothing but NUL bytes"])
def test_no_malformed_file_takes_a_GiB_of_memory(name, story, tmp_path):
    main, recipe = story
    file, content, _ = CORPUS[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    del content

    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + GIB, used + GIB))

    log = tmp_path / "log"
    recipe = replace(recipe, data=DataSpec(str(path)), out=str(tmp_path / "run"))
    assert ended(forked(recipe, log, before=limit, story=main)) == ERROR_STATUS, log.read_text()
    assert "error: " in log.read_text()


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n",
        (GOOD + "\n\n" + GOOD).encode(),
        chat(("user", "Say <|end|> and </s>"), ("assistant", "<|end|></s><s>")).encode(),
    ],
    ids=["a mark and CRLF", "no line end at the end", "control tokens in the text"],
)
def test_what_only_looks_malformed_is_taken(content, story, tmp_path):
    main, recipe = story
    (tmp_path / "a.jsonl").write_bytes(content)
    assert run(main, recipe, ["--data", str(tmp_path / "a.jsonl")]) == 0
