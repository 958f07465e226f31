"""`report.py --serve`: the page of runs that are being trained, made again when something in their folders changed."""

import errno
import hashlib
import logging
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pipeline.reporting.build_page import Options, build_page
from pipeline.reporting.run_folder import RunReader, entries
from pipeline.storage.run_lock import is_held
from pipeline.storage.status import read_status

log = logging.getLogger("pipeline")

FILES = ("metrics.jsonl", "status.json", "config.yaml", "log.txt")
FOLDERS = ("samples", "reconstructions", "evaluations", "checkpoints")
RUNNING_SECONDS = 60
"""After which the page of a run that states `running` is made again, also where its folder did not change."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Pages:
    """The newest page of some runs. Safe to use from several threads."""

    def __init__(self, folders: Sequence[Path], contact_sheet: bool):
        self._folders = folders
        self._contact_sheet = contact_sheet
        self._readers = [RunReader(folder) for folder in folders]
        self._lock = threading.Lock()
        self._version = ""
        self._page = b""

    def version(self) -> str:
        """A name for the present state of the folders; another one when something changed."""
        paths = [folder / name for folder in self._folders for name in FILES]
        paths += [path for folder in self._folders for name in FOLDERS for path in sorted(entries(folder / name))]
        state: list[object] = [(str(path), _state(path)) for path in paths]
        running = [folder for folder in self._folders if read_status(folder).state == "running"]
        if running:  # a run that is killed or hangs writes nothing, and its time left passes
            state += [int(time.time() / RUNNING_SECONDS), *map(is_held, running)]
        return hashlib.sha256(repr(state).encode()).hexdigest()

    def page(self) -> bytes:
        """The page of the present state. Raises ValueError or OSError where the runs can no longer be read."""
        with self._lock:
            version = self.version()
            if version != self._version:
                runs = [reader.read() for reader in self._readers]
                options = Options(contact_sheet=self._contact_sheet, version=version)
                self._page = build_page(runs, options).encode("utf-8", "replace")
                self._version = version
            return self._page


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.lstat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


class Handler(BaseHTTPRequestHandler):
    """Answers with the page and its version."""

    server: "Server"

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        """Answers one request."""
        if not self.server.is_own_address(self.headers.get("Host", "")):  # of a page that some other site opened
            self._answer(403, "text/plain", b"this address is not the one that report.py serves")
            return
        try:
            if self.path == "/version":
                self._answer(200, "text/plain", self.server.pages.version().encode())
            elif self.path in ("/", "/page"):
                self._answer(200, "text/html", self.server.pages.page())
            else:
                self._answer(404, "text/plain", b"there is only the page /")
        except ConnectionError:
            raise  # see Server.handle_error
        except (OSError, ValueError) as error:
            self._answer(500, "text/plain", f"the runs cannot be read: {error}".encode())

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Requests are not logged."""


class Server(ThreadingHTTPServer):
    """Serves the page until it is stopped. Raises ValueError where the address cannot be used."""

    daemon_threads = True

    def __init__(self, pages: Pages, host: str, port: int):
        self.pages = pages
        self._host = host
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"--port {port}: is in use; name another one, or 0 for any that is free") from None
            raise ValueError(f"--host {host} --port {port}: cannot be served ({error.strerror})") from None
        except OverflowError:
            raise ValueError(f"--port {port}: must be from 0 to 65535") from None

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of a browser that has gone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{self._host}:{self.server_address[1]}/"

    def is_own_address(self, host: str) -> bool:
        """Whether a request names this server. One on the loopback interface is named so, whatever name a site has
        given to 127.0.0.1.
        """
        return self._host not in LOOPBACK or host.rpartition(":")[0] in LOOPBACK


def serve(folders: Sequence[Path], host: str, port: int, contact_sheet: bool = False) -> None:
    """Serves the page until Ctrl-C. Raises ValueError for folders that are no run's and for a port in use."""
    with Server(Pages(folders, contact_sheet), host, port) as server:
        log.info("%s shows %s; Ctrl-C ends it", server.address, ", ".join(map(str, folders)))
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("ended")
