"""A stand-in for the W&B server on loopback: as much of it as the unmodified client needs to run, resume and sync.

It keeps what it receives over any number of client processes, as the real one does: a run's history is a list of lines,
to which each request adds at the offset that it names.
"""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.helpers.wandb_operations import ArtifactOperations, SweepOperations, WorkspaceOperations


class StoredRun:
    """What the server has of one run. `overwritten` counts lines that were sent to an offset already taken."""

    def __init__(self, name: str):
        self.name = name
        self.project = self.entity = "stand-in"
        self.lines: dict[int, str] = {}
        self.summary = "{}"
        self.config: str | None = None
        self.tags: list[str] = []
        self.group: str | None = None
        self.sweep: str | None = None
        self.overwritten = 0
        self.exit_codes: list[int] = []
        self.alerts: list[str] = []
        self.files: dict[str, bytes] = {}

    def add(self, offset: int, content: list[str]) -> None:
        """History lines as a file_stream request brings them."""
        for index, line in enumerate(content, start=offset):
            self.overwritten += index in self.lines
            self.lines[index] = line

    @property
    def history(self) -> list[dict[str, Any]]:
        """Its history in order; panels' keys and pictures included."""
        assert sorted(self.lines) == list(range(len(self.lines))), "lines are missing between two offsets"
        return [json.loads(self.lines[index]) for index in range(len(self.lines))]

    @property
    def last_step(self) -> int:
        """-1 where there is no history yet."""
        return json.loads(self.lines[len(self.lines) - 1])["_step"] if self.lines else -1

    def bucket(self) -> dict[str, Any]:
        """As GraphQL tells it, for a run that begins, resumes or syncs."""
        last = [self.lines[len(self.lines) - 1]] if self.lines else []
        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.name,
            "description": None,
            "notes": None,
            "sweepName": None,
            "config": self.config,
            "tags": self.tags,
            "summaryMetrics": self.summary,
            "historyLineCount": len(self.lines),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(last),
            "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": 1}),
            "project": {"id": "p", "name": self.project, "entity": {"id": "e", "name": self.entity}},
        }


class WandbServer(ArtifactOperations, SweepOperations, WorkspaceOperations):
    """A context manager. `runs` holds what arrived, by run id; `stop()` and `start()` take it off the net and back."""

    def __init__(self):
        for kind in WandbServer.__bases__:
            kind.__init__(self)
        self.runs: dict[str, StoredRun] = {}
        self.unknown: list[str] = []
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """What WANDB_BASE_URL is to be."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._server = _Server(("127.0.0.1", self._port), handler_of(self))
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Nobody listens from here on."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "WandbServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """The answer to one POST request."""
        with self._lock:
            if path == "/graphql":
                return self._graphql(json.loads(body))
            found = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path)
            return self._file_stream(self.runs[found[1]], json.loads(body)) if found else {}

    def put(self, path: str, body: bytes) -> None:
        """A file of a run, or of an artifact."""
        _, kind, owner, name = path.split("/", 3)
        with self._lock:
            files = self.runs[owner].files if kind == "put" else self.artifacts[owner].files
            files[name] = body

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
        work: Callable | None = getattr(self, f"_{operation}", None)
        if work is None:
            self.unknown.append(operation)
            return {"data": None, "errors": [{"message": f"{operation} is not known here"}]}
        return {"data": work(request.get("variables") or {})}

    def _file_stream(self, run: StoredRun, request: dict[str, Any]) -> dict[str, Any]:
        for name, chunk in (request.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run.add(chunk["offset"], chunk["content"])
            elif name == "wandb-summary.json":
                run.summary = chunk["content"][-1]
        if request.get("complete"):
            run.exit_codes.append(request["exitcode"])
        return {}

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802 - GraphQL's names
        teams = {"edges": []}
        return {"viewer": {"id": "v", "entity": "stand-in", "username": "u", "flags": "{}", "teams": teams}}

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get(variables["name"])
        model = {"id": "p", "name": "p", "entity": {"id": "e", "name": "stand-in"}}
        return {"model": {**model, "bucket": run.bucket() if run else None}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        name = variables.get("name") or variables["id"].removeprefix("id-")
        inserted = name not in self.runs
        run = self.runs.setdefault(name, StoredRun(name))
        run.project = variables.get("project") or run.project
        run.config = variables.get("config") or run.config
        run.tags = variables.get("tags") or run.tags
        run.group = variables.get("groupName") or run.group
        run.sweep = variables.get("sweep") or run.sweep
        return {"upsertBucket": {"bucket": run.bucket(), "inserted": inserted}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/put/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": f"id-{run}", "uploadHeaders": [], "files": files}}

    def _NotifyScriptableRunAlert(self, variables: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.runs[variables["runName"]].alerts.append(variables["title"])
        return {"notifyScriptableRunAlert": {"success": True}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that is killed is part of the tests."""


def handler_of(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    """Hands requests over to the server."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802 - the names that http.server calls
            self._reply(server.answer(self.path, self._body()))

        def do_PUT(self):  # noqa: N802
            server.put(self.path, self._body())
            self._reply({})

        def do_GET(self):  # noqa: N802
            self._reply({})

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _reply(self, answer: dict[str, Any]) -> None:
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
