"""W&B can neither stop nor delay a run, and the key appears nowhere."""

import http.server
import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.tracking import wandb_connection, wandb_service
from pipeline.tracking.wandb_connection import choose_mode
from pipeline.tracking.wandb_service import describe, find_key
from tests.helpers.launching import is_alive
from tests.helpers.trackers import KEY, history, read_metrics, read_wandb, tracker

ROOT = Path(__file__).parents[2]


# --- keys and servers -------------------------------------------------------------------------------------------------


def test_auto_is_online_where_a_key_is_found(monkeypatch, tmp_path):
    assert choose_mode("auto") == ("offline", "no W&B key found: set WANDB_API_KEY or run `wandb login`")
    (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert find_key() == KEY
    assert choose_mode("auto")[0] == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode("auto")[0] == "offline"
    (tmp_path / "netrc").write_text(f"machine wandb.example.org login user password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert choose_mode("auto")[0] == "online"
    (tmp_path / "netrc").write_text("machine wandb.example.org what is this\n")
    assert choose_mode("auto")[0] == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode("auto")[0] == "online"
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert choose_mode("auto")[0] == mode
        assert choose_mode("online")[0] == "online"


def test_offline_is_logged_once_with_the_upload_command(tmp_path, caplog):
    with caplog.at_level(logging.INFO), tracker(tmp_path) as run:
        run.log(1, {"train/loss": 1.0})
    messages = [record.message for record in caplog.records if "W&B" in record.message]
    assert len(messages) == 1
    assert re.search("no W&B key found.*python -m pipeline.tracking.upload (.+)$", messages[0])[1] == str(tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.fixture
def refusing_server(monkeypatch):
    """A W&B server on this machine that refuses every key, as the real one does: HTTP 401 to each GraphQL request."""
    requests = []

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            requests.append(self.path)
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"errors":[{"message":"user is not logged in"}]}')

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield requests
    server.shutdown()
    server.server_close()


def assert_key_is_nowhere(folder, *texts):
    assert not any(KEY in text for text in texts)
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_refused_key_ends_a_fresh_start_with_online(tmp_path, refusing_server, caplog, capfd):
    with pytest.raises(ValueError, match="tracking.wandb=online, but W&B cannot be used: .*401.*wandb login --relogin"):
        tracker(tmp_path / "run", "online")
    assert "/graphql" in refusing_server
    out, err = capfd.readouterr()
    assert_key_is_nowhere(tmp_path / "run", caplog.text, out, err)


@pytest.mark.parametrize(("wanted", "start_step"), [("auto", 0), ("online", 5)])
def test_a_refused_key_otherwise_means_offline(tmp_path, refusing_server, caplog, capfd, wanted, start_step):
    with caplog.at_level(logging.INFO), tracker(tmp_path / "run", wanted, start_step) as run:
        run.log(6, {"train/loss": 1.0})
    assert "/graphql" in refusing_server
    assert re.search("W&B: offline .*401.*pipeline.tracking.upload", caplog.text)
    assert history(read_wandb(tmp_path / "run"))[6]["train/loss"] == 1.0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [6]
    out, err = capfd.readouterr()
    assert_key_is_nowhere(tmp_path / "run", caplog.text, out, err)


def test_a_server_out_of_reach_means_offline_or_an_error(tmp_path, monkeypatch, caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")  # nobody listens
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        with caplog.at_level(logging.INFO), tracker(tmp_path, "auto", wandb_timeout=1.0) as run:
            run.log(1, {"train/loss": 1.0})
        assert re.search("W&B: offline .*pipeline.tracking.upload", caplog.text)
        with pytest.raises(ValueError, match="W&B cannot be used"):
            tracker(tmp_path / "fresh", "online", wandb_timeout=1.0)


def test_online_without_a_key_does_not_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    with pytest.raises(ValueError, match="no key found: set WANDB_API_KEY or run `wandb login`"):
        tracker(tmp_path, "online")


def test_errors_do_not_show_the_key(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert describe(RuntimeError(f"bad\n key {KEY}!")) == "bad key ***!"
    assert describe(KeyError()) == "KeyError"


# --- faults -----------------------------------------------------------------------------------------------------------


def test_an_error_of_wandb_is_logged_once_and_the_run_continues(tmp_path, caplog):
    with tracker(tmp_path) as run:
        run.log(1, {"train/loss": 1.0})
        run.log(2, {"train/loss": 1.0}, {"reconstructions": "not a picture"})
        deadline = time.monotonic() + 10
        while "W&B is off" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        for step in range(3, 9):
            run.log(step, {"train/loss": 1.0})
        run.alert("a", "b")
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))
    assert len(re.findall("W&B is off", caplog.text)) == 1


def test_records_reach_the_offline_file_long_before_the_end(tmp_path):
    """So that a kill loses little of it; by default wandb buffers them for 15 seconds."""
    with tracker(tmp_path) as run:
        run.log(1, {"train/loss": 1.0})
        run.log(2, {"train/loss": 2.0})
        deadline = time.monotonic() + 10
        while not (found := history(read_wandb(tmp_path, closed=False))) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert found[1]["train/loss"] == 1.0


def test_metrics_are_written_if_wandb_does_not_work(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_connection, "init_run", lambda *args: (_ for _ in ()).throw(OSError("no room for wandb")))
    with tracker(tmp_path) as run:
        run.log(1, {"train/loss": 1.0})
    assert "W&B is off (no room for wandb)" in caplog.text
    assert len(read_metrics(tmp_path)) == 1


def test_the_service_is_killed_also_where_other_processes_end_meanwhile(tmp_path, monkeypatch):
    """Such as the workers that load data: their files in /proc vanish while these are read."""
    killed = []

    def kill(pid: int, signal_number: int) -> None:
        killed.append((pid, signal_number))
        raise ProcessLookupError

    for name, content in (("self/task/1/children", "11 12 13"), ("12/comm", "python\n"), ("13/comm", "wandb-core\n")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "self/task/2").mkdir()
    (tmp_path / "self/task/2/children").symlink_to("gone")
    monkeypatch.setattr(wandb_service, "PROC", tmp_path)
    monkeypatch.setattr(os, "kill", kill)
    wandb_service.kill_service()
    assert killed == [(13, signal.SIGKILL)]


SERVICE_PROCESS = """
import logging, os, signal, sys, time
from pathlib import Path
import wandb
from pipeline.tracking.tracker import Tracker, TrackingConfig

folder, signal_name, moment, timeout = sys.argv[1:]

def send_signal():
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    (service,) = [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("wandb-core")]
    os.kill(service, getattr(signal, signal_name))
    return service

logging.basicConfig(level=logging.WARNING, format="%(message)s")
config = TrackingConfig(wandb="offline", wandb_timeout=float(timeout))
if moment == "before the start":
    wandb.setup()
    service = send_signal()
with Tracker(config, folder, {}, is_main=True, start_step=0) as run:
    if moment == "while logging":
        service = send_signal()
    for step in range(1, 2001):
        run.log(step, {f"kl/{i}": 1.0 * step for i in range(20)})
    if moment == "before the end":
        time.sleep(1)  # the queue is empty now
        service = send_signal()
    print(service, time.time(), flush=True)
print(time.time())
"""


@pytest.mark.parametrize("moment", ["before the start", "while logging", "before the end"])
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSTOP"])
def test_a_dead_or_stopped_service_neither_stops_nor_delays_a_run(tmp_path, signal_name, moment):
    """The tracker finishes within twice the timeout, and the process exits, because the service is killed."""
    timeout = 2.0
    command = [sys.executable, "-c", SERVICE_PROCESS, str(tmp_path), signal_name, moment, str(timeout)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    exited = time.time()
    assert result.returncode == 0, result.stderr
    service, finishing, finished = result.stdout.split()
    assert float(finished) - float(finishing) < 2 * timeout + 1
    assert exited - float(finished) < 10
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 2001))
    assert result.stderr.count("W&B is off") == 1
    assert not is_alive(int(service))
