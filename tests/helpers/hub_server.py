"""A stand-in for the Hugging Face Hub on loopback: as much of it as the unmodified client needs to push and to pull.

It keeps repositories as lists of commits, each {path: content}. A token is needed to write, and to read a private one.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_" + "tokenOfTheTests" * 2


@dataclass
class StoredRepository:
    """`commits`: (id, files), the oldest first. `refs`: branches and tags."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Adds a commit to `main`."""
        number = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((number, files))
        self.refs["main"] = number
        return number

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision, and its files."""
        wanted = self.refs.get(revision, revision)
        return next(((number, files) for number, files in self.commits if number == wanted), None)


class HubServer:
    """A context manager. `requests`: method, path and headers of each. `sizes[name]`: a size that is stated instead."""

    def __init__(self):
        self.repositories: dict[str, StoredRepository] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.large_files: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.failing: int | None = None
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: object) -> dict[str, str]:
        """For a process that uses it, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
        }


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, home: object, token: str | None = TOKEN) -> None:
    """The client of this process talks to `address`; constants were read from the environment at its import."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{home}/hub")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{home}/token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def do_GET(self):  # noqa: N802 - the names that http.server calls
        self._answer(b"")

    def do_HEAD(self):  # noqa: N802
        self._answer(b"")

    def do_POST(self):  # noqa: N802
        self._answer(self._body())

    def do_PUT(self):  # noqa: N802
        self._answer(self._body())

    def log_message(self, *_):
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server_state.requests.append((self.command, path, dict(self.headers)))
        if self.server_state.failing is not None:
            return self._refuse(self.server_state.failing, "", "out of order")
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, body, **match.groupdict())
        return self._refuse(404, "", "no such page")

    def _send(self, content: bytes | dict | list, code: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, code: int, kind: str, message: str) -> None:
        self._send({"error": message}, code, {"X-Error-Code": kind, "X-Error-Message": message})

    def _is_signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str) -> StoredRepository | None:
        """None, and an answer, where it is missing, private or gated."""
        found = self.server_state.repositories.get(name)
        if found is None or (found.private and not self._is_signed_in()):
            self._refuse(404 if self._is_signed_in() else 401, "RepoNotFound", "Repository not found")
            return None
        if found.gated:
            self._refuse(403, "GatedRepo", "Access is restricted")
            return None
        return found

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self._repository(name)
        if repository is None:
            return None
        found = repository.files(revision)
        if found is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # ---------------------------------------------------------------------------------------------------- answers

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._is_signed_in():
            return self._refuse(401, "", "Invalid username or password.")
        if asked["organization"] == "somebody-else":
            return self._refuse(403, "", "You don't have the rights to create a model under this namespace")
        if name in self.server_state.repositories:
            return self._send(
                {"error": "You already created this repo", "url": f"{self.server_state.address}/{name}"}, 409
            )
        stored = StoredRepository(private=asked.get("visibility") == "private" or asked.get("private") is True)
        self.server_state.repositories[name] = stored
        stored.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._send({"url": f"{self.server_state.address}/{name}"})

    def _info(self, _: bytes, name: str, revision: str = "main") -> None:
        found = self._files(name, revision)
        if found:
            number, files = found
            sizes = {path: self.server_state.sizes.get(path, len(data)) for path, data in files.items()}
            siblings = [{"rfilename": path, "size": size} for path, size in sizes.items()]
            private = self.server_state.repositories[name].private
            self._send({"id": name, "sha": number, "private": private, "siblings": siblings, "tags": []})

    def _tree(self, _: bytes, name: str, revision: str) -> None:
        found = self._files(name, revision)
        if found:
            self._send(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
                    for path, data in found[1].items()
                ]
            )

    def _resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        found = self._files(name, revision)
        if not found:
            return None
        number, files = found
        if path not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": number, "ETag": f'"{git_id(files[path])}"'}
        return self._send(files[path], headers=headers)

    def _validate_yaml(self, _: bytes) -> None:
        self._send({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._files(name, revision):
            asked = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            self._send(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": mode[f["path"].endswith("tensors")], "shouldIgnore": False}
                        for f in asked
                    ]
                }
            )

    def _batch(self, body: bytes, name: str) -> None:
        if self._repository(name):
            base = f"{self.server_state.address}/large"
            objects = [
                one | {"actions": {"upload": {"href": f"{base}/{one['oid']}"}, "verify": {"href": f"{base}/verify"}}}
                for one in json.loads(body)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server_state.large_files[oid] = body
        self._send({})

    def _verify(self, body: bytes) -> None:
        self._send({}, 200 if json.loads(body)["oid"] in self.server_state.large_files else 404)

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        _, files = repository.files(revision)
        files = dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server_state.large_files[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        number = repository.commit(files)
        self._send({"commitUrl": f"{self.server_state.address}/{name}/commit/{number}", "commitOid": number})


def git_id(content: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = {
    r"POST /api/repos/create": _Handler._create,
    rf"GET /api/models/{NAME}": _Handler._info,
    rf"GET /api/models/{NAME}/revision/(?P<revision>.+)": _Handler._info,
    rf"GET /api/models/{NAME}/tree/(?P<revision>.+)": _Handler._tree,
    rf"(GET|HEAD) /{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": _Handler._resolve,
    r"POST /api/validate-yaml": _Handler._validate_yaml,
    rf"POST /api/models/{NAME}/preupload/(?P<revision>.+)": _Handler._preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": _Handler._batch,
    r"PUT /large/(?P<oid>\w+)": _Handler._store,
    r"POST /large/verify": _Handler._verify,
    rf"POST /api/models/{NAME}/commit/(?P<revision>.+)": _Handler._commit,
}
