"""A corpus of malformed data files: each is refused with one line that names file and place, exit status 2."""

import gzip
import io
import json
import os
import resource
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from common.cli import run
from common.data.rows import load_rows
from common.machine.launch import ERROR_STATUS
from common.model.adapter_files import ADAPTER_WEIGHTS
from common.model.loading import load_tokenizer
from common.recipe import DataSpec, Recipe
from tests.child_processes import ended
from tests.run.test_faults import forked

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


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("chats.jsonl"))
    return buffer.getvalue()


def arrow(values: list[dict], rows: int | None = None) -> bytes:
    table, buffer = pyarrow.Table.from_pylist(values), io.BytesIO()
    with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table.slice(0, rows))
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
    "NaN in a list": ("a.json", '[{"text": NaN}]', "NaN and Infinity are not JSON; write null ({path}, entry 1)"),
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
    "a lone surrogate in a role": ("a.jsonl", '{"messages": [{"role": "\\ud800", "content": "a"}]}', "role '\\ud800' is none of system"),
    "NUL bytes": ("a.jsonl", b'{"text": "a\x00b"}', "invalid JSON ({path}:1)"),
    "nothing but NUL bytes": ("a.jsonl", b"\x00" * 4096, "invalid JSON ({path}:1)"),
    # files that are no data
    "empty": ("a.jsonl", "", "{path} holds no rows"),
    "blank lines": ("a.jsonl", "\n\n  \n", "{path} holds no rows"),
    "a mark alone": ("a.jsonl", b"\xef\xbb\xbf", "{path} holds no rows"),
    "gzip cut short": ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "{path} is damaged (Truncated compressed stream); download it again, or pack it again"),
    "gzip with another sum": ("a.jsonl", gzip.compress(GOOD.encode())[:-8] + b"1234" + gzip.compress(GOOD.encode())[-4:], "{path} is damaged (zlib inflate failed: incorrect data check)"),
    "gzip with more behind it": ("a.json", gzip.compress(b"[]") + b"more", "{path} is damaged (zlib inflate failed"),
    "zstd cut short": ("a.csv.zst", zstd(b"text\na\n")[:-3], "{path} is damaged (Truncated compressed stream)"),
    "gzip of nothing": ("a.jsonl.gz", gzip.compress(b""), "{path} holds no rows"),
    "gzip in gzip": ("a.jsonl.gz", gzip.compress(gzip.compress(GOOD.encode())), "{path} is compressed twice; unpack it once: gunzip -c < {path} > once.gz"),
    "a bad line in zstd": ("a.jsonl.zst", zstd((GOOD + "\n{").encode()), "invalid JSON ({path}:2)"),
    "a line of 50 MB in gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "' + b"a" * 50_000_000 + b'"}'), "a line of more than 16 MiB ({path}:1)"),
    "a list of 300 MB in gzip": ("a.json.gz", gzip.compress(b"[" + b" " * 300_000_000 + b"]", 1), "{path} is one list of more than 256 MiB, too large to be read whole. Write one object a line: gunzip -c < {path} | jq -c '.[]' > lines.jsonl"),
    "a Parquet file in gzip": ("a.parquet.gz", gzip.compress(parquet([json.loads(GOOD)])), "{path}: a compressed .parquet file is not read; unpack it first"),
    "tar in gzip": ("a.jsonl.gz", gzip.compress(tar()), "{path} is an archive of tar; unpack it, and name the files that were in it"),
    "another suffix": ("a.md", GOOD, "{path} is no data file by its name; a name ends in .jsonl, .json, .csv"),
    "a gzip of no kind": ("a.gz", gzip.compress(GOOD.encode()), "{path} is no data file by its name"),
    "Excel": ("a.xlsx", b"PK\x03\x04", "{path} is a spreadsheet; save it as CSV in UTF-8"),
    "Excel named .csv": ("a.csv", b"PK\x03\x04" + bytes(9), "{path} is a zip archive, as .xlsx and .docx are: save a table as CSV"),
    "an older Excel named .csv": ("a.csv", b"\xd0\xcf\x11\xe0" + bytes(9), "{path} is a file of an older Excel or Word: save a table as CSV"),
    "Word": ("a.docx", b"PK\x03\x04", "{path} is a document; save its text as .txt in UTF-8"),
    "PDF": ("a.pdf", b"%PDF-1.7", "{path} is a document; save its text as .txt"),
    "PDF named .txt": ("a.txt", b"%PDF-1.7", "{path} is a PDF; save its text as .txt"),
    "zip": ("a.zip", b"PK\x03\x04", "{path} is an archive; unpack it, and name the files that were in it"),
    "tar": ("a.tar", tar(), "{path} is an archive; unpack it"),
    "tar.gz": ("a.tar.gz", gzip.compress(tar()), "{path} is an archive; unpack it"),
    "bzip2": ("a.jsonl.bz2", b"BZh9", "{path} is packed in a way that is not read; unpack it first, or pack it with gzip or zstd"),
    "xz named .jsonl": ("a.jsonl", b"\xfd7zXZ\0", "{path} is packed in a way that is not read"),
    "a pickle": ("a.pkl", b"\x80\x04.", "{path} is a pickle, which is a program; write its rows as .jsonl or .parquet"),
    "Parquet named .jsonl": ("a.jsonl", parquet([json.loads(GOOD)]), "{path} is a Parquet file by its first bytes; name it .parquet"),
    "Arrow named .json": ("a.json", b"ARROW1\0\0", "{path} is an Arrow file by its first bytes; name it .arrow"),
    # plain text
    "an empty .txt": ("a.txt", "", "{path} holds no rows"),
    "a .txt of blanks": ("a.txt", " \n\n", "text is empty ({path})"),
    "a .txt in Latin-1": ("a.txt", "caf\xe9".encode("latin-1"), "{path} is not UTF-8 (byte 3); convert it: iconv -f WINDOWS-1252 -t UTF-8 {path} > utf8.txt"),
    "a .txt in UTF-16": ("a.txt", "Hello".encode("utf-16"), "{path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path} > utf8.txt"),
    "a .txt of 20 MB": ("a.txt", "word\n" * 4_000_000, "{path} is one text of more than 16 MiB: a .txt file is one document."),
    "a .txt of 300 MB in gzip": ("a.txt.gz", gzip.compress(bytes(300_000_000), 1), "{path} is one text of more than 16 MiB"),
    "a picture": ("a.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not UTF-8; convert the file: iconv -f WINDOWS-1252 -t UTF-8 ({path}:1"),
    "a line of 50 MB": ("a.jsonl", '{"text": "' + "a" * 50_000_000 + '"}', "a line of more than 16 MiB ({path}:1)"),
    # rows of no format, or of two
    "no key that is known": ("a.jsonl", '{"body": "a"}', "no format has these keys: 'body'; a row needs messages, prompt"),
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
    "an unknown role": ("a.jsonl", chat(ASK, ("bard", "Hi")), "role 'bard' is none of system, developer, user, human, "),
    "a role that is a number": ("a.jsonl", chat((1, "Hello"), SAY), "role 1 is none of"),
    "no role": ("a.jsonl", chat((None, "Hello"), SAY), "a message has no role; its keys are 'content'"),
    "a call that is no JSON": ("a.jsonl", chat(ASK, ("function_call", "look()"), SAY), "the tool calls are text, invalid JSON ({path}:1)"),
    "a call whose arguments are no object": ("a.jsonl", chat(ASK, ("function_call", '{"name": "f", "arguments": "1"}'), SAY), "the arguments of 'f' are not a JSON object ({path}:1)"),
    "tools that are no JSON": ("a.jsonl", GOOD[:-1] + ', "tools": "f"}', "the tools are text, invalid JSON ({path}:1)"),
    "a weight in between": ("a.jsonl", GOOD.replace('"Hi"', '"Hi", "weight": 0.5'), "'weight' is 0.5; an answer is learnt or not, and weights other than 0 and 1 are not supported"),
    "pictures": ("a.jsonl", GOOD[:-1] + ', "images": ["a.png"]}', "it has images; only text can be trained ({path}:1)"),
    "one message a row": ("a.jsonl", '{"text": "Hello", "role": "prompter"}', "the row is one message, a text with a role"),
    "rows of two formats that differ": ("a.jsonl", '{"question": "a", "answer": "b", "response": "c"}', "it can be read as question/answer and as question/response, which differ"),
    "a preference label": ("a.jsonl", GOOD + "\n" + GOOD[:-1] + ', "label": false}', "{path}:2: this is preference data ('label' is true or false, as KTO takes it)"),
    "better and worse answers": ("a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}', "{path}:1: this is preference data (it has 'chosen' and 'rejected', as DPO takes them)"),
    "better and worse answers in CSV": ("a.csv", "prompt,chosen,rejected\na,b,c\n", "{path}: its header: this is preference data"),
    "better and worse answers in Parquet": ("a.parquet", parquet([{"prompt": "a", "chosen": "b", "rejected": "c"}]), "{path}: its columns: this is preference data"),
    "the content is missing": ("a.jsonl", chat(ASK, ("assistant", None)), "the assistant's text is missing ({path}:1)"),
    "the content is null": ("a.jsonl", GOOD.replace('"Hi"', "null"), "the assistant's text is missing"),
    "the content is a number": ("a.jsonl", chat(ASK, ("assistant", 42)), "the assistant's text is not text"),
    "the content is a list": ("a.jsonl", chat(ASK, ("assistant", [["Hi"]])), "the assistant's text is a list, and not of parts with a type ({path}:1)"),
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
    "no answer": ("a.jsonl", chat(ASK, ASK), "it has no turn of the assistant to learn ({path}:1)"),
    "a system's text alone": ("a.jsonl", chat(("system", "Be brief.")), "it has no turn of the assistant to learn"),
    "an answer longer than a row": ("a.jsonl", chat(ASK, ("assistant", "word " * 500)), "its first answer ends after 128 tokens"),
    # the other formats
    "ShareGPT with an unknown name": ("a.jsonl", '{"conversations": [{"from": "bard", "value": "a"}]}', "role 'bard' is none of"),
    "ShareGPT without a value": ("a.jsonl", '{"conversations": [{"from": "human"}]}', "the user's text is missing"),
    "a completion that is null": ("a.jsonl", '{"prompt": "a", "completion": null}', "completion is missing ({path}:1)"),
    "an instruction that is empty": ("a.jsonl", '{"instruction": "", "output": "a"}', "instruction is empty"),
    "an input that is a number": ("a.jsonl", '{"instruction": "a", "input": 3, "output": "b"}', "input is not text"),
    "a text that was rendered": ("a.jsonl", '{"text": "<|user|>a<|end|>"}', "the text holds the control token <|user|>: where the model's own chat template rendered it"),
    # .json
    "an object for a list": ("a.json", GOOD, "{path} holds one object, with the keys 'messages'; a .json file is a list of objects"),
    "two lists in .json": ("a.json", "[" + GOOD + "]\n[" + GOOD + "]", "{path}:2: invalid JSON: Extra data; write one list of objects, or one object a line"),
    "a key twice in another case": ("a.json", '[{"text": "a", "Text": "b"}]', "2 keys could be 'text': ['text', 'Text']; leave one ({path}, entry 1)"),
    "a .json in Latin-1": ("a.json", '["caf\xe9"]'.encode("latin-1"), "{path} is not UTF-8 (byte 5); convert it: iconv -f WINDOWS-1252 -t UTF-8 {path} > utf8.json"),
    "a list cut short": ("a.json", "[" + GOOD + ",\n", "{path}:2: invalid JSON"),
    "a list of texts": ("a.json", '["a", "b"]', "not a JSON object ({path}, entry 1 and 1 more)"),
    "an empty list": ("a.json", "[]", "{path} holds no rows"),
    "a key twice in a list": ("a.json", '[{"text": "a", "text": "b"}]', "a key occurs twice in a JSON object ({path}, entry 1)"),
    "a deep list": ("a.json", "[" * 100_000, "{path}: invalid JSON"),
    # .csv
    "an open quote": ("a.csv", 'prompt,completion\n"a,b\n', "{path}:2: broken CSV"),
    "text after a quote": ("a.csv", 'prompt,completion\n"a" b,c\n', "{path}:2: broken CSV"),
    "a cell too few": ("a.csv", "prompt,completion\na\n", "a CSV row of another length than the header ({path}:2)"),
    "a cell too many": ("a.csv", "prompt,completion\na,b,c\n", "a CSV row of another length than the header ({path}:2)"),
    "other columns": ("a.csv", "promt,completion\na,b\n", "{path}: no format has the columns of its first line: 'promt', 'completion' (delimiter ','); name them messages, prompt"),
    "other columns, semicolons": ("a.csv", '"promt";"completion"\na;b\n', "'promt', 'completion' (delimiter ';'); name them messages, prompt"),
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
    # .tsv
    "a .tsv with commas": ("a.tsv", "prompt,completion\na,b\n", "{path}: no format has the columns of its first line: 'prompt,completion' (delimiter '\\t')"),
    "a .tsv with a cell too few": ("a.tsv", "prompt\tcompletion\na\n", "a CSV row of another length than the header ({path}:2)"),
    # .arrow
    "an empty .arrow": ("a.arrow", b"", "{path} is not a readable Arrow file: "),
    "text named .arrow": ("a.arrow", GOOD, "{path} is not a readable Arrow file: "),
    "an .arrow cut short": ("a.arrow", arrow([json.loads(GOOD)] * 50)[:-900], "{path} is not a readable Arrow file: "),
    "an .arrow with offsets that lie": ("a.arrow", arrow([{"text": "abcdefgh"}]).replace(b"\0\0\0\0\x08\0\0\0", b"\0\0\0\0\xff\xff\xff\x7f"), "{path} is not a readable Arrow file: "),
    "other columns in .arrow": ("a.arrow", arrow([{"promt": "a"}]), "{path}: no format has its columns: 'promt'; name them messages, prompt"),
    "nulls in .arrow": ("a.arrow", arrow([{"text": None}]), "text is missing ({path}, row 1)"),
    "an .arrow without rows": ("a.arrow", arrow([{"text": "a"}], rows=0), "{path} holds no rows"),
    # .parquet
    "pictures in Parquet": ("a.parquet", parquet([{"text": "a", "images": [b"1"]}, {"text": "a", "images": []}]), "{path} has values in its column 'images', and only text can be trained: leave out the rows that have one, then the column"),
    "a Parquet file cut short": ("a.parquet", parquet([json.loads(GOOD)])[:-20], "{path} is not a readable Parquet file"),
    "a Parquet file without its head": ("a.parquet", parquet([json.loads(GOOD)])[20:-9] + b"!", "{path} is not a readable"),
    "numbers in Parquet": ("a.parquet", parquet([{"prompt": 1, "completion": 2}]), "prompt is not text ({path}, row 1)"),
    "nulls in Parquet": ("a.parquet", parquet([{"text": None}]), "text is missing ({path}, row 1)"),
    "other columns in Parquet": ("a.parquet", parquet([{"promt": "a", "completion": "b"}]), "{path}: no format has its columns: 'promt', 'completion'; name them messages, prompt"),
    "a column twice in another case in Parquet": ("a.parquet", parquet([{"text": "a", "TEXT": "b"}]), "{path}: its columns: 2 keys could be 'text': ['text', 'TEXT']; leave one"),
    "a Parquet file without rows": ("a.parquet", parquet([]), "{path} holds no rows"),
}  # fmt: skip


@pytest.fixture
def story(recipe):
    """The steps of a recipe that come before the weights are loaded, and the recipe. A file stands for the adapter."""

    def main(recipe: Recipe) -> None:
        load_rows(recipe.data, load_tokenizer(recipe.model), recipe.train.seq_len)
        Path(recipe.out, ADAPTER_WEIGHTS).touch()

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
    assert "folder.jsonl has no data files; a name ends in .jsonl" in capsys.readouterr().err
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


@pytest.mark.parametrize(
    "name",
    [
        "a line of 50 MB",
        "brackets 100,000 deep",
        "nothing but NUL bytes",
        "a line of 50 MB in gzip",
        "a list of 300 MB in gzip",
        "a .txt of 300 MB in gzip",
        "an .arrow with offsets that lie",
    ],
)
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
        chat(("User", "Hello"), ("Bot", "Hi")).encode(),
        chat(SAY, ASK, SAY).encode(),
        chat(ASK, ASK, SAY, SAY).encode(),
        chat(ASK, SAY, ASK).encode(),
    ],
    ids=[
        "a mark and CRLF",
        "no line end at the end",
        "control tokens in the text",
        "roles in capitals",
        "the assistant begins",
        "two turns of one side",
        "no answer at the end",
    ],
)
def test_what_only_looks_malformed_is_taken(content, story, tmp_path):
    main, recipe = story
    (tmp_path / "a.jsonl").write_bytes(content)
    assert run(main, recipe, ["--data", str(tmp_path / "a.jsonl")]) == 0
