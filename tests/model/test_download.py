"""Downloads from a small server here that plays the hub: trouble gives one clear line, and nothing half loaded."""

import errno
import hashlib
import http.server
import json
import os
import re
import resource
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest

from common.model.download import model_folder
from common.model.loading import load_4bit, load_tokenizer
from common.recipe import ModelSpec, UserError
from tests.conftest import FP32

COMMIT = "a" * 40
NAME = "owner/model"


class Hub:
    """Serves the files of a folder as owner/model. What goes wrong is set from outside."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.cut_at: dict[str, int] = {}  # the connection breaks after so many bytes of the file, once
        self.stalls: set[str] = set()  # files of which nothing comes
        self.moved_from: str | None = None  # a name that leads to ours
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: set[str] = set()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path, wanted = handler.path.split("?")[0], handler.headers.get("Range")
        self.requests.append((handler.command, path, wanted))
        self.tokens.add(handler.headers.get("Authorization", ""))
        if self.moved_from and self.moved_from in path:
            handler.send_response(307)
            handler.send_header("Location", path.replace(self.moved_from, NAME))
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        if path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
            model = {"_id": "1", "id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings, "private": False}
            if "/tree/" in path:
                listing = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
                return self.send(handler, json.dumps(listing).encode(), "json")
            return self.send(handler, json.dumps(model | {"tags": [], "downloads": 0}).encode(), "json")
        name = path.rsplit("/", 1)[-1]
        if name not in self.files:
            handler.send_response(404)
            handler.send_header("X-Error-Code", "EntryNotFound")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        return self.send(handler, self.files[name], name, wanted)

    def send(self, handler, content: bytes, name: str, wanted: str | None = None) -> None:
        start = int(re.match(r"bytes=(\d+)-", wanted).group(1)) if wanted else 0
        handler.send_response(206 if wanted else 200)
        handler.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.send_header("Content-Type", "application/json" if name == "json" else "application/octet-stream")
        if wanted:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if name in self.stalls:
            time.sleep(3)
            handler.close_connection = True
            return
        end = self.cut_at.pop(name, None) if start == 0 else None
        handler.wfile.write(content[start:end])
        if end is not None:
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.close()


@pytest.fixture
def hub(small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    played = Hub(small_model("llama", max_shard_size="100KB"))

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            played.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HUGGINGFACE_CO_URL_TEMPLATE": f"http://127.0.0.1:{server.server_port}"
        + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DOWNLOAD_TIMEOUT": 1,
        "HF_HUB_ETAG_TIMEOUT": 1,
        "HF_HUB_DISABLE_XET": True,
        "DOWNLOAD_CHUNK_SIZE": 500,  # what has come so far is on the disk
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield played
    server.shutdown()
    server.server_close()


def test_a_model_is_downloaded_and_loaded(hub):
    folder = model_folder(ModelSpec(NAME), weights=True)
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert load_tokenizer(ModelSpec(NAME)).chat_template
    assert load_4bit(ModelSpec(NAME), FP32).config._name_or_path == NAME


def test_what_is_loaded_from_the_hub_is_known_by_commit_and_hash(hub):
    record = load_4bit(ModelSpec(NAME), FP32).base_record
    assert record.commit == COMMIT
    wanted = {name: content for name, content in hub.files.items() if name in record.sha256}
    assert record.sha256 == {name: hashlib.sha256(content).hexdigest() for name, content in wanted.items()}
    assert shard(hub) in record.sha256


def test_only_the_weights_that_the_index_names_are_downloaded(hub):
    other = hub.files[shard(hub)]
    others = ["consolidated.safetensors", "model.fp16.safetensors", "model-fp16.safetensors", "pytorch_model.bin"]
    hub.files |= dict.fromkeys([*others, "model-00001-of-00099.safetensors"], other)
    folder = model_folder(ModelSpec(NAME), weights=True)
    index = json.loads(hub.files["model.safetensors.index.json"])
    assert {path.name for path in folder.glob("*model*.*")} == {
        *index["weight_map"].values(),
        "model.safetensors.index.json",
    }


def test_two_models_in_one_repository_are_refused_before_they_are_downloaded(hub):
    hub.files["model.safetensors"] = hub.files[shard(hub)]
    message = refusal()
    assert message.startswith(f"{NAME} holds two models on the hub: model.safetensors, and what model.safetensors.ind")
    assert f"hf download {NAME} --exclude model.safetensors --local-dir my_model" in message
    assert not any(path.endswith(".safetensors") for method, path, _ in hub.requests if method == "GET")


def test_two_models_in_the_cache_are_refused(hub):
    folder = model_folder(ModelSpec(NAME), weights=True)
    (folder / "model.safetensors").write_bytes(hub.files[shard(hub)])  # as another program may have downloaded it
    assert refusal().startswith(f"{folder} holds two models: model.safetensors, and model-00001-of-")


def shard(hub: Hub) -> str:
    return next(name for name in sorted(hub.files) if name.startswith("model-00002"))


def refusal(name: str = NAME) -> str:
    with pytest.raises(UserError) as error:
        model_folder(ModelSpec(name), weights=True)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_download_that_breaks_off_goes_on_where_it_was(hub):
    hub.cut_at[shard(hub)] = 1000
    try:
        model_folder(ModelSpec(NAME), weights=True)
    except UserError:  # the library gave up: the next start goes on
        model_folder(ModelSpec(NAME), weights=True)
    ranges = [wanted for method, path, wanted in hub.requests if path.endswith(shard(hub)) and method == "GET"]
    assert ranges[0] is None and ranges[1] == "bytes=1000-"
    load_4bit(ModelSpec(NAME), FP32)


@pytest.mark.slow  # the library waits and tries again, five times: 22 seconds
def test_a_download_that_stalls_ends_with_a_line(hub):
    hub.stalls = set(hub.files)
    started = time.monotonic()
    message = refusal()
    assert time.monotonic() - started < 60
    assert message.startswith(f"{NAME} is not in the local cache and the hub cannot be reached (")
    hub.stalls = set()
    model_folder(ModelSpec(NAME), weights=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[:-100], "is cut short or damaged: "),
        (lambda content: content[:5], "is cut short: 5 bytes, less than its header; delete it and download it again"),
        (lambda content: content[:8] + b"!" + content[9:], "is not a safetensors file, or its header is damaged"),
        (lambda content: b"<html>try again later</html>", "is cut short: "),
    ],
    ids=["cut", "five bytes", "a damaged header", "a page of a proxy"],
)
def test_a_corrupt_shard_is_named_before_anything_is_loaded(hub, spoil, message):
    name = shard(hub)
    hub.files[name] = spoil(hub.files[name])
    said = refusal()
    assert message in said and name in said


def test_a_flipped_bit_in_the_weights_is_found_once_and_for_all(hub, monkeypatch):
    folder = model_folder(ModelSpec(NAME), weights=True)
    with monkeypatch.context() as patch:  # what was checked is not read again
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("it was read again"))
        model_folder(ModelSpec(NAME), weights=True)
    blob = (folder / shard(hub)).resolve()
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.write_bytes(content)
    said = refusal()
    assert said == f"{folder / shard(hub)} is damaged: it is not what the hub has. Delete {blob} and run again"
    blob.unlink()
    model_folder(ModelSpec(NAME), weights=True)


def test_a_shard_that_the_hub_does_not_have_is_named(hub):
    name = shard(hub)
    del hub.files[name]
    said = refusal()
    assert re.search(r"lacks 1 of \d+ weight files, first ", said) and said.endswith(name)


def test_a_model_that_has_moved_is_found(hub):
    hub.moved_from = "old/name"
    assert model_folder(ModelSpec("old/name"), weights=True).is_dir()


def test_what_is_in_the_cache_needs_no_network(hub, monkeypatch):
    folder = model_folder(ModelSpec(NAME), weights=True)
    asked = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model_folder(ModelSpec(NAME), weights=True) == folder
    assert len(hub.requests) == asked


def test_an_access_token_goes_to_the_hub_and_into_no_message(hub, monkeypatch, capsys):
    token = "hf_canaryCANARYcanary"
    monkeypatch.setenv("HF_TOKEN", token)
    hub.files = {}
    with pytest.raises(UserError) as error:
        model_folder(ModelSpec(NAME), weights=True)
    assert hub.tokens >= {f"Bearer {token}"}
    chain = [error.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    assert all(token not in str(part) for part in chain)
    captured = capsys.readouterr()
    assert token not in captured.out + captured.err


def test_a_name_that_is_neither_folder_nor_hub_id_says_so():
    for name in ("./nowhere", "/nowhere/model", "just-a-name", "a/b/c"):
        with pytest.raises(UserError, match="there is no folder .*, and it is no hub id"):
            model_folder(ModelSpec(name), weights=False)


@pytest.fixture
def refusing_hub(monkeypatch):
    """refusing_hub(status, **headers): a server on this machine that plays the hub and refuses every request so."""
    servers = []

    def start(status: int, **headers: str) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", "owner/none is gated. Ask for access on https://huggingface.co/owner/none, then log in"),
        (403, "GatedRepo", "owner/none is gated. Ask for access on https://huggingface.co/owner/none, then log in"),
        (403, "", "the hub does not let you read owner/none (403): a token that is out of date or lacks the right to"),
        (429, "", "the hub has had too many requests from here (429) and does not send owner/none: wait some minutes"),
        (451, "", "the hub does not send owner/none: it answers 451. See https://huggingface.co/owner/none"),
        (503, "", "owner/none is not in the local cache and the hub cannot be reached (it answers with its error 503)"),
        (200, "", "is not the hub, perhaps the login page of a network or a proxy. Log in there, correct HF_ENDPOINT"),
        (404, "RepoNotFound", "the hub has no model owner/none that you may read"),
        (404, "RevisionNotFound", "owner/none has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_the_way_out(refusing_hub, tmp_path, monkeypatch, status, code, message):
    refusing_hub(status, X_Error_Code=code)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        model_folder(ModelSpec("owner/none", revision="v9"), weights=False)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_network_and_cache_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="is not in the local cache and the hub cannot be reached"):
        model_folder(ModelSpec("owner/none"), weights=False)


def test_a_cache_that_cannot_be_written_is_no_lost_connection(hub, tmp_path, monkeypatch):
    """The system refuses to make folders there, as on a disk that is full or read-only."""
    make_folder = os.mkdir

    def mkdir(path, *arguments, **named):
        if Path(path).is_relative_to(tmp_path / "cache"):
            raise OSError(number, os.strerror(number), str(path))
        return make_folder(path, *arguments, **named)

    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(os, "mkdir", mkdir)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG):
        said = refusal()
        assert said.startswith(f"{NAME} cannot be kept in the cache: {os.strerror(number)} ({tmp_path / 'cache'}")
        assert said.endswith("). Mend that, or name another folder: HF_HOME")


def test_a_disk_that_takes_no_more_in_the_middle_of_a_file_is_named(hub, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # bytes of a file; a shard has more
    try:
        said = refusal()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said.startswith(f"{NAME} cannot be kept in the cache: File too large ({tmp_path / 'cache'}")


def test_without_a_home_folder_it_asks_for_one(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~no-such-user/hub")
    assert refusal() == f"there is no home folder to keep {NAME} in; name a folder for it: HF_HOME=/folder"


def test_a_name_that_the_hub_does_not_allow_is_said(hub):
    assert refusal("owner/my--model").startswith("owner/my--model is no id of the hub: Cannot have -- or ..")


@pytest.fixture
def proxy(hub, monkeypatch):
    """proxy(address): all requests to the hub go through it."""

    def set_proxy(address: str) -> None:
        monkeypatch.setenv("ALL_PROXY", address)
        for name in ("NO_PROXY", "no_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        huggingface_hub.close_session()  # it reads the variables when it is made

    yield set_proxy
    monkeypatch.undo()
    huggingface_hub.close_session()


def test_a_proxy_with_socks_names_the_package(proxy, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)  # it is not installed
    proxy("socks5://user:secret@127.0.0.1:1")
    said = refusal()
    assert ".venv/bin/pip install socksio" in said and "secret" not in said


def test_a_proxy_with_socks_is_asked(proxy, hub):
    pytest.importorskip("socksio")
    proxy("socks5://127.0.0.1:1")
    assert refusal().startswith(f"{NAME} is not in the local cache and the hub cannot be reached (")
    assert hub.requests == []


@pytest.mark.parametrize("address", ["socks://user:secret@127.0.0.1:1080", "http://user:secret@127.0.0.1:abc"])
def test_a_proxy_that_is_no_address_is_named(proxy, address):
    proxy(address)
    said = refusal()
    assert said.startswith("an address in the environment is none (") and "correct or unset ALL_PROXY" in said
    assert "secret" not in said
