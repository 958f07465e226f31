"""report.py --serve: the newest page, only for this machine's own address."""

import http.client
import json
import os
import shutil
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from pipeline import report
from pipeline.reporting.serve import Pages, Server
from pipeline.storage.run_lock import RunLock

OLD_RUNS = Path(__file__).parents[1] / "old_runs"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(OLD_RUNS / "nvae", tmp_path / "run"))


@pytest.fixture
def server(run):
    with Server(Pages([run], contact_sheet=False), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server, path="/", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def add_record(run, step, **values):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")


def test_the_page_has_what_was_added_to_the_run(server, run):
    status, page = get(server)
    version = get(server, "/version")[1]
    assert status == 200
    assert version in page
    assert get(server)[1] == page
    add_record(run, 123_456, **{"train/loss": 1.25})
    assert get(server, "/version")[1] != version
    assert "123456" in get(server, "/page")[1]
    assert "123456" not in page


def test_new_pictures_and_evaluations_are_a_new_version(server, run):
    versions = [get(server, "/version")[1]]
    for name in ("samples/step_00000001.png", "evaluations/a.json"):
        (run / name).parent.mkdir()
        (run / name).write_text("{}")
        versions.append(get(server, "/version")[1])
    assert len(set(versions)) == 3


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example:80", ""])
def test_another_sites_name_for_this_machine_is_refused(server, host):
    assert get(server, host=host or None)[0] == (200 if not host else 403)


def test_only_the_page_is_served(server, run):
    for path in ("/metrics.jsonl", "/../etc/passwd", "//etc/passwd", "/page/..", "/?x"):
        assert get(server, path)[0] == 404


def test_a_port_in_use_and_one_that_is_none(server, run, capsys):
    port = server.server_address[1]
    assert report.main([str(run), "--serve", "--port", str(port)]) == 2
    assert f"--port {port}: is in use; name another one, or 0 for any that is free" in capsys.readouterr().err
    assert report.main([str(run), "--serve", "--port", "70000"]) == 2
    assert "--port 70000: must be from 0 to 65535" in capsys.readouterr().err


def test_a_folder_that_vanished_is_an_answer_and_not_the_end(server, run):
    os.rename(run, run.with_name("moved"))
    assert get(server)[0] == 200  # what is missing is named on the page
    assert "There is no metrics.jsonl" in get(server)[1]
    os.rename(run.with_name("moved"), run)
    assert "There is no metrics.jsonl" not in get(server)[1]


def test_a_run_that_is_killed_is_news_although_its_folder_did_not_change(server, run, monkeypatch):
    monkeypatch.setattr("pipeline.reporting.serve.RUNNING_SECONDS", 1e12)
    status = {"state": "running", "step": 4, "total_steps": 9, "attempt": 1, "time": time.time()}
    (run / "status.json").write_text(json.dumps(status))
    with RunLock(run):
        alive, page = get(server, "/version")[1], get(server)[1]
    assert ">running<" in page
    assert get(server, "/version")[1] != alive
    assert ">killed<" in get(server)[1]


@pytest.mark.parametrize(("state", "is_news"), [("running", True), ("finished", False)])
def test_time_that_passes_is_news_of_a_run_that_is_trained(run, monkeypatch, state, is_news):
    """Its estimates change, and its silence may mean that it hangs."""
    (run / "status.json").write_text(json.dumps({"state": state, "step": 4}))
    pages, now = Pages([run], contact_sheet=False), time.time()
    versions = []
    for later in (0, 61):
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        versions.append(pages.version())
    assert (versions[0] != versions[1]) is is_news


def test_a_browser_that_ends_the_connection_is_no_error(server, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(server, "shutdown_request", lambda request: ended.set())
    with socket.create_connection(server.server_address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        connection.sendall(b"GET /")
    assert ended.wait(20)
    assert capsys.readouterr().err == ""
