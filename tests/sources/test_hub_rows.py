"""Data sets from a small server here that plays the hub: each cause of trouble has its own line and remedy."""

import errno
import hashlib
import http.server
import json
import os
import re
import threading
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, unquote

import datasets
import huggingface_hub
import pytest

from common.recipe import UserError
from common.sources.files import read_rows

COMMIT = "a" * 40
CHATS = [{"prompt": f"Start a timer, {minutes} minutes.", "completion": f"{minutes} minutes"} for minutes in range(40)]
LINES = "\n".join(map(json.dumps, CHATS))
WITH_SCORES = "\n".join(json.dumps(row | {"score": 1}) for row in CHATS)
PARTS = "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"


class DataHub(http.server.ThreadingHTTPServer):
    """Serves `files` as the data set owner/chats; refuses every path that `refused` matches with a status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.refused: tuple[str, int, str] | None = None  # a pattern of paths, the status, X-Error-Code

    def serve(self, **files: str | bytes) -> None:
        named = {name.replace("_", "."): content for name, content in files.items()}
        contents = {"README.md": b"hello"} | named
        self.files = {name: text if isinstance(text, bytes) else text.encode() for name, text in contents.items()}

    def handle_error(self, *_: object) -> None: ...


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DataHub

    def log_message(self, *_: object) -> None: ...

    def send(self, content: bytes, status: int = 200, code: str = "", commit: str = COMMIT) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        for name, value in (("X-Repo-Commit", commit), ("X-Error-Code", code)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:  # which of these paths are there?
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        files = [self.entry(path) for path in paths if path in self.server.files]
        self.send(json.dumps(files).encode())

    def entry(self, path: str) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(self.server.files[path]), "oid": "0" * 40}

    def do_GET(self) -> None:
        path, hub = unquote(self.path.split("?")[0]), self.server
        if hub.refused and re.search(hub.refused[0], path):
            page = b"<html>please log in</html>" if hub.refused[1] == 200 else b"{}"
            return self.send(page, hub.refused[1], hub.refused[2], commit="")
        if path.startswith("/api/datasets/owner/chats/tree/"):
            return self.send(json.dumps([self.entry(name) for name in hub.files]).encode())
        if path.startswith("/api/datasets/owner/chats"):
            siblings = [{"rfilename": name} for name in hub.files]
            told = {"_id": "1", "id": "owner/chats", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            return self.send(
                json.dumps(told | {"downloads": 0, "likes": 0, "gated": False, "disabled": False}).encode()
            )
        found = re.match(r"/datasets/owner/chats/resolve/[^/]+/(.*)", path)
        if found and found[1] in hub.files:
            return self.send(hub.files[found[1]])
        return self.send(b"{}", 404, "EntryNotFound" if found else "RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    served = DataHub()
    threading.Thread(target=served.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{served.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module, values in {
        huggingface_hub.constants: {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
        },
        datasets.config: {"HF_ENDPOINT": endpoint, "HF_DATASETS_CACHE": tmp_path / "datasets"},
    }.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits before it tries again
    monkeypatch.chdir(tmp_path)
    served.serve(train_jsonl=LINES)
    yield served
    served.shutdown()
    served.server_close()


def refusal(name: str = "owner/chats", **arguments: str) -> str:
    with pytest.raises(UserError) as error:
        list(read_rows(name, **arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


UNREACHABLE = "owner/chats is not in the local cache and the hub cannot be reached ("


def test_the_rows_come_with_their_places(hub):
    placed = list(read_rows("owner/chats"))
    assert [row for _, row in placed] == CHATS
    assert placed[1][0] == "owner/chats [train], row 2"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"chats_py": "import datasets"}, "data set owner/chats is a program, chats.py, which is not run. If its page"),
        ({}, "data set owner/chats has no data files of a kind that can be read; see https://huggingface.co/datasets/"),
        ({"weights_bin": "1"}, "data set owner/chats has no data files of a kind that can be read; see https://"),
        (
            {"train-0_jsonl": LINES, "train-1_jsonl": WITH_SCORES},
            "the files of data set owner/chats have different columns: there are 1 new columns ({'score'}); take one",
        ),
        (
            {"train_jsonl": LINES + '\n{"prompt": "x", "comp'},
            "data set owner/chats has a damaged file: JSON parse error",
        ),
        ({"train_csv": 'a,b\n1,2\n"x'}, "data set owner/chats has a damaged file: Error tokenizing data"),
        ({"train_parquet": "PAR1....PAR1"}, "data set owner/chats cannot be read: Parquet file size is 12 bytes"),
        ({"README_md": "---\nconfigs: [: \n---\n", "train_jsonl": LINES}, "data set owner/chats cannot be read: while"),
        (
            {"README_md": PARTS, "a_jsonl": LINES, "b_jsonl": LINES},
            "data set owner/chats has several configurations ('a', 'b'), and a run takes one: set DataSpec(config=...)",
        ),
    ],
    ids=["script", "empty", "no data", "columns", "jsonl", "csv", "parquet", "card", "configurations"],
)
def test_a_data_set_that_cannot_be_used_says_why(hub, files, message):
    hub.serve(**files)
    assert refusal().startswith(message)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (
            "owner/chats",
            "tran",
            "data set owner/chats has no split 'tran'; set DataSpec(split=...), or eval_split for eval_source, to one "
            "of those it has: 'train'",
        ),
        (
            "owner/none",
            "train",
            "the hub has no data set owner/none that you may read (or there is no file of that name)",
        ),
        ("owner/na--me", "train", "owner/na--me is no id of the hub: Cannot have -- or .. in repo_id"),
        ("a/b/c", "train", "data set a/b/c cannot be read: Couldn't find any data file at"),
    ],
)
def test_a_wrong_name_is_said(hub, name, split, message):
    assert refusal(name, split=split).startswith(message)


@pytest.mark.parametrize("config", ["a", "b"])
def test_a_configuration_is_read_by_its_name(hub, config):
    hub.serve(README_md=PARTS, a_jsonl=LINES, b_jsonl=WITH_SCORES)
    unread = Counter()
    placed = list(read_rows("owner/chats", config=config, unread=unread))
    assert [row for _, row in placed] == CHATS
    assert placed[0][0] == f"owner/chats [{config}, train], row 1"
    assert unread == ({} if config == "a" else {"score": 40})


def test_a_configuration_that_is_not_there_is_named_with_all_there_are(hub):
    names = [f"part{number}" for number in range(40)]
    parts = "".join(f"- config_name: {name}\n  data_files: a.jsonl\n" for name in names)
    hub.serve(README_md=f"---\nconfigs:\n{parts}---\n", a_jsonl=LINES)
    assert refusal() == (
        f"data set owner/chats has several configurations ({', '.join(map(repr, names))}), and a run takes one: "
        "set DataSpec(config=...)"
    )
    assert refusal(config="part").startswith(
        f"data set owner/chats has no configuration 'part'; set DataSpec(config=...) to one of those it has: "
        f"{', '.join(map(repr, names))}"
    )


def test_columns_of_no_format_are_one_line(hub):
    hub.serve(train_jsonl='{"frage": "a", "antwort": "b"}')
    assert refusal().startswith("owner/chats [train]: no format has its columns: 'frage', 'antwort'; name them ")


@pytest.mark.parametrize("path", ["", "train.jsonl"], ids=["at once", "in the middle"])
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (503, "", UNREACHABLE + "it answers with its error 503). Connect and try again, or give a file: DATA=my_chats"),
        (429, "", "the hub has had too many requests from here (429) and does not send owner/chats: wait some minutes"),
        (401, "", "the hub does not let you read owner/chats (401): a token that is out of date or lacks the right"),
        (403, "", "the hub does not let you read owner/chats (403): a token that is out of date or lacks the right"),
        (403, "GatedRepo", "owner/chats is gated. Ask for access on https://huggingface.co/datasets/owner/chats, then"),
        (451, "", "the hub does not send owner/chats: it answers 451. See https://huggingface.co/datasets/owner/chats"),
        (200, "", "what answers at http://127.0.0.1:"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_the_way_out(hub, status, code, message, path):
    hub.refused = (path, status, code)
    assert refusal().startswith(message)


def test_a_revision_that_is_not_there_is_named(hub):
    hub.refused = ("v9", 404, "RevisionNotFound")
    assert refusal(revision="v9") == (
        "owner/chats has no revision 'v9'; see https://huggingface.co/datasets/owner/chats/tree/main"
    )


def test_without_network_or_offline_it_says_so(hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert refusal().startswith(
            UNREACHABLE + "HF_HUB_OFFLINE is set). Connect and try again, or give a file: DATA="
        )
    hub.shutdown()
    hub.server_close()
    assert refusal().startswith(UNREACHABLE)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES], ids=os.strerror)
@pytest.mark.parametrize("place", ["hub", "datasets"])
def test_a_cache_that_cannot_be_written_is_no_lost_connection(hub, tmp_path, monkeypatch, number, place):
    """The system refuses to make folders there, as on a disk that is full or read-only."""
    make_folder = os.mkdir

    def mkdir(path, *arguments, **named):
        if Path(path).is_relative_to(tmp_path / place):
            raise OSError(number, os.strerror(number), str(path))
        return make_folder(path, *arguments, **named)

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    said = refusal()
    assert said.startswith(f"owner/chats cannot be kept in the cache: {os.strerror(number)} ({tmp_path / place}")
    assert said.endswith("). Mend that, or name another folder: HF_HOME")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    assert refusal().endswith("name another folder: HF_DATASETS_CACHE")


def test_a_cache_below_a_file_is_named(hub, tmp_path):
    (tmp_path / "hub").write_text("")
    assert refusal().startswith("owner/chats cannot be kept in the cache: ")
