"""A small server that plays the hub for uploads: what it takes, it keeps in memory."""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TOKEN = "hf_CanaryThatMayBeNowhere"
ID = re.compile(r"[\w.-]+/[\w.-]+")


class UploadHub(http.server.ThreadingHTTPServer):
    """repositories: files by name. `refused`: a pattern of paths, and the status that they are answered with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # by sha256, before they are committed
        self.refused: tuple[str, int] | None = None
        self.ignored: set[str] = set()  # names that the repository's .gitignore has
        self.moved: dict[str, str] = {}  # old name: new name
        self.owner = "me"  # where the token may write
        self.requests: list[tuple[str, str, str]] = []  # method, path, Authorization

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit_of(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()

    def handle_error(self, *_: object) -> None: ...


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    server = UploadHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: UploadHub

    def log_message(self, *_: object) -> None: ...

    def send(self, value: object, status: int = 200, code: str = "", said: str = "") -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, text in (("X-Error-Code", code), ("X-Error-Message", said)):
            if text:
                self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        body = self.body()
        authorization = self.headers.get("Authorization", "")
        hub.requests.append((self.command, path, authorization))
        if hub.refused and re.search(hub.refused[0], path):
            return self.send({"error": "no"}, hub.refused[1], said="no")
        if path.startswith("/large/"):
            hub.large[path.rpartition("/")[2]] = body
            return self.send({})
        if authorization != f"Bearer {TOKEN}":
            return self.send({"error": "no"}, 401, said="Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            asked = json.loads(body)["objects"]
            upload = [{**file, "actions": {"upload": {"href": f"{hub.address}/large/{file['oid']}"}}} for file in asked]
            return self.send({"transfer": "basic", "objects": upload})
        found = re.match(r"/api/models/([^/]+/[^/]+)(/.*)?", path)
        assert found, path
        name, rest = found[1], found[2] or ""
        if name in hub.moved:
            self.send_response(307)
            self.send_header("Location", path.replace(name, hub.moved[name]))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if name not in hub.repositories:
            return self.send({"error": "Repository not found"}, 404, "RepoNotFound")
        if rest.startswith("/preupload/"):
            files = [{"path": f["path"], "uploadMode": self.mode(f["path"])} for f in json.loads(body)["files"]]
            for file in files:
                content = hub.repositories[name].get(file["path"])
                file["shouldIgnore"] = file["path"] in hub.ignored
                file["oid"] = None if content is None else self.oid(content, file["uploadMode"])
            return self.send({"files": files})
        if rest.startswith("/commit/"):
            return self.commit(name, body)
        files = [{"rfilename": file} for file in hub.repositories[name]]
        sha = hub.commit_of(name)
        return self.send({"_id": "1", "id": name, "sha": sha, "private": hub.private[name], "siblings": files})

    do_GET = do_POST = do_PUT = answer

    @staticmethod
    def mode(name: str) -> str:
        return "lfs" if name.endswith(".safetensors") else "regular"

    @staticmethod
    def oid(content: bytes, mode: str) -> str:
        if mode == "lfs":
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def validate(self, card: str) -> None:
        """As the hub does: a base or a data set that is no id is an error."""
        bad = [line for line in card.split("---")[1].splitlines() if line.startswith("base_model:")]
        bad = [line for line in bad if not ID.fullmatch(line.partition(": ")[2].strip())]
        errors = [{"message": f'"base_model" with value "{line.partition(": ")[2]}" is not valid.'} for line in bad]
        self.send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != self.server.owner:
            return self.send({"error": "no"}, 403, said="You don't have the rights to create a model there")
        if name in self.server.private:  # also one of another kind
            return self.send({"error": "You already created this model repo"}, 409)
        self.server.repositories[name] = {".gitattributes": b""}
        self.server.private[name] = asked.get("visibility") == "private"
        return self.send({"url": f"{self.server.address}/{name}"})

    def commit(self, name: str, body: bytes) -> None:
        files = dict(self.server.repositories[name])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                assert line["key"] == "header", line
        self.server.repositories[name] = files
        oid = self.server.commit_of(name)
        self.send({"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid})
