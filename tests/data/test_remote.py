"""Shard sets behind an address: fetched once, verified, and no harm from servers that fail or lie."""

import io
import json
import multiprocessing
import os
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.data.remote import FetchError, check_address, default_cache, fetch_manifest, fetch_set, is_address
from pipeline.data.shards import TarShards, UnreadableShard
from shard_data import fetch as fetching
from shard_data import manifest
from tests.helpers.launching import train, train_alone
from tests.helpers.recipes import tiny_settings
from tests.helpers.run_folders import metrics
from tests.helpers.shard_server import ShardServer, answer
from tests.helpers.shard_sets import edit_manifest, random_samples, write_set

FILES = [f"train-{n:06d}{end}" for n in range(4) for end in (".tar", ".index.npy")]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(fetching, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def samples():
    return random_samples(35, 8, 8)


@pytest.fixture
def root(tmp_path, samples) -> Path:
    return write_set(tmp_path / "origin", {"train": samples, "test": random_samples(3, 8, 8)}, [10])


@pytest.fixture
def server(root):
    with ShardServer(root) as server:
        yield server


def fetch(server: ShardServer, cache: Path, splits=("train",)) -> Path:
    return fetch_set(server.address, fetch_manifest(server.address), splits, cache)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.suffix != ".lock" and path.is_file()}


# ---------------------------------------------------------------------------------------------------------- whole sets


def test_a_fetched_set_is_the_set(server, samples, tmp_path):
    folder = fetch(server, tmp_path / "cache")
    shards = TarShards(folder, "train", verify=True, origin=server.address)
    np.testing.assert_array_equal(shards.images(range(35)), samples.images)
    assert names(tmp_path / "cache") == {*FILES, "manifest.json"}  # of the other split, nothing


def test_nothing_is_fetched_twice(server, tmp_path):
    first = fetch(server, tmp_path / "cache")
    assert fetch(server, tmp_path / "cache", ("train", "test")) == first
    assert server.requests == dict.fromkeys([*FILES, "test-000000.tar", "test-000000.index.npy"], 1) | {
        "manifest.json": 2
    }


def test_a_set_that_changed_at_its_address_is_another(server, root, tmp_path):
    first = fetch(server, tmp_path / "cache")
    write_set(root, {"train": random_samples(35, 8, 8, seed=9)}, [10])
    second = fetch(server, tmp_path / "cache")
    assert first != second
    assert TarShards(first, "train", verify=True).fingerprint != TarShards(second, "train", verify=True).fingerprint


def _fetch_here(address: str, cache: Path, start, results) -> None:
    start.wait()
    folder = fetch_set(address, fetch_manifest(address), ["train"], cache)
    results.put(TarShards(folder, "train", verify=True).images(range(35)).sum())


def test_many_processes_at_once_fetch_each_file_once(server, samples, tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    for name in FILES:
        server.faults[name] = [_slowly]
    processes = [
        context.Process(target=_fetch_here, args=(server.address, tmp_path / "cache", start, results)) for _ in range(5)
    ]
    for process in processes:
        process.start()
    start.set()
    assert [results.get(timeout=60) for _ in processes] == [samples.images.sum()] * 5
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {name: server.requests[name] for name in FILES} == dict.fromkeys(FILES, 1)


def _slowly(handler, content):
    time.sleep(0.05)
    answer(handler, content)


def _stall(handler, content):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:1000])
    time.sleep(30)


def test_another_takes_over_from_a_process_that_is_killed(server, samples, tmp_path):
    """Its half file is not taken for a whole one, and its lock goes with it."""
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    start.set()
    server.faults["train-000002.tar"] = [_stall]
    arguments = (server.address, tmp_path / "cache", start, results)
    victim = context.Process(target=_fetch_here, args=arguments)
    victim.start()
    _wait_until(lambda: server.requests["train-000002.tar"] == 1)
    heir = context.Process(target=_fetch_here, args=arguments)
    heir.start()
    _wait_until(lambda: all(server.requests[name] for name in FILES))
    victim.kill()
    assert results.get(timeout=60) == samples.images.sum()
    victim.join(60)
    heir.join(60)
    assert server.requests["train-000002.tar"] == 2
    assert names(tmp_path / "cache") == {*FILES, "manifest.json"}


def _wait_until(done) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -------------------------------------------------------------------------------------------------------------- faults


def _code(code):
    return lambda handler, _content: handler.send_error(code)


def _cut(handler, content):
    answer(handler, content[: len(content) // 2], length=len(content))
    handler.close_connection = True


def _hang_up(handler, _content):
    handler.connection.shutdown(socket.SHUT_RDWR)


PASSING = {"503": _code(503), "429": _code(429), "cut": _cut, "hung up": _hang_up}


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("name", ["manifest.json", "train-000001.tar", "train-000001.index.npy"])
def test_faults_that_pass_are_tried_again(server, samples, tmp_path, fault, name):
    server.faults[name] = [PASSING[fault]] * 3
    shards = TarShards(fetch(server, tmp_path / "cache"), "train", verify=True)
    np.testing.assert_array_equal(shards.images(range(35)), samples.images)
    assert server.requests[name] == 4


@pytest.mark.parametrize("fault", PASSING)
def test_tries_are_bounded_and_finished_files_are_kept(server, tmp_path, fault):
    server.faults["train-000002.tar"] = [PASSING[fault]] * 4
    with pytest.raises(FetchError, match=r"/train-000002\.tar: .*\(4 attempts\).* resumes where this one stopped"):
        fetch(server, tmp_path / "cache")
    kept = names(tmp_path / "cache")
    assert kept == set(FILES[:4])  # no manifest, and nothing half
    fetch(server, tmp_path / "cache")
    assert all(server.requests[name] == 1 for name in kept)


def test_a_server_that_falls_silent_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT", 0.1)
    server.faults["train-000000.tar"] = [_stall] * 4
    with pytest.raises(FetchError, match=r"train-000000\.tar: no (complete )?answer within 0\.1\d* s \(4 attempts\)"):
        fetch(server, tmp_path / "cache")


def test_a_server_that_trickles_is_left(server, tmp_path, monkeypatch):
    def trickle(handler, content):
        handler.send_response(200)
        handler.end_headers()
        for place in range(100):
            handler.wfile.write(content[place : place + 1])
            time.sleep(0.02)

    monkeypatch.setattr(fetching, "TIMEOUT", 0.1)
    monkeypatch.setattr(fetching, "SLOWEST", 2**20)
    server.faults["train-000000.tar"] = [trickle] * 4
    with pytest.raises(FetchError, match=r"no complete answer within 0\.1\d* s \(4 attempts\)"):
        fetch(server, tmp_path / "cache")


def test_a_set_that_is_not_there(server, tmp_path):
    with pytest.raises(FetchError, match=rf"{server.address}x/manifest\.json: the server answers 404 .*data\.root"):
        fetch_manifest(server.address + "x")
    (tmp_path / "origin/train-000003.tar").unlink()
    with pytest.raises(FetchError, match=rf"{server.address}/train-000003\.tar: the server answers 404"):
        fetch(server, tmp_path / "cache")
    assert server.requests["train-000003.tar"] == 1


def test_a_server_that_is_not_there(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/x"
        with pytest.raises(FetchError, match=rf"{address}/manifest\.json: Connection refused .* is the server up"):
            fetch_manifest(address)


def test_changed_bytes_are_refused(server, root, tmp_path):
    for name in ("train-000001.tar", "train-000001.index.npy"):
        path = root / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(
            FetchError, match=rf"{server.address}/{name}: .* arrived, with sha256 .* instead of .*copy the set"
        ):
            fetch(server, tmp_path / "cache")
        assert name not in names(tmp_path / "cache")
        path.write_bytes(whole)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("size", [-1, 1])
def test_a_shard_of_another_size_is_refused(server, tmp_path, size, announced):
    def other(handler, content):
        body = content[:-1] if size < 0 else content + b"x"
        answer(handler, body, -1 if announced else None)

    server.faults["train-000000.tar"] = [other] * 4
    with pytest.raises(FetchError, match=r"train-000000\.tar: (the server sends|the connection broke off|data that)"):
        fetch(server, tmp_path / "cache")


@pytest.mark.parametrize("name", ["manifest.json", "train-000000.index.npy", "train-000000.tar"])
def test_endless_bodies_are_cut_off(server, tmp_path, monkeypatch, name):
    sent = []

    def endless(handler, _content):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                sent.append(handler.wfile.write(bytes(2**16)))
        except OSError:
            pass

    monkeypatch.setattr(manifest, "MAX_BYTES", 2**20)
    server.faults[name] = [endless]
    with pytest.raises(FetchError, match=rf"{name}: the server sends more instead of"):
        fetch(server, tmp_path / "cache")
    assert sum(sent) < 2**25
    assert server.requests[name] == 1


# ------------------------------------------------------------------------------------------------------------ redirects


def _to(address):
    def redirect(handler, _content):
        handler.send_response(302)
        handler.send_header("Location", address)
        handler.end_headers()

    return redirect


def test_a_redirect_is_followed(server):
    server.faults["moved"] = [_to("/sets/made/manifest.json")]
    server.faults["manifest.json"] = [_to("/sets/made/moved")]
    assert json.loads(fetch_manifest(server.address))["name"] == "made"


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "/sets/made/manifest.json"])
def test_redirects_elsewhere_or_in_circles_are_refused(server, target):
    server.faults["manifest.json"] = [_to(target)] * 20
    with pytest.raises(FetchError, match=r"/manifest\.json: the server answers 302"):
        fetch_manifest(server.address)
    assert server.requests["manifest.json"] <= 6


def test_the_body_of_a_redirect_is_not_read(server):
    sent = []

    def endless(handler, _content):
        _to("/sets/made/manifest.json")(handler, b"")
        while True:
            sent.append(handler.wfile.write(bytes(2**16)))

    server.faults["manifest.json"] = [endless]
    assert json.loads(fetch_manifest(server.address))["name"] == "made"
    assert sum(sent) < 2**25


def test_no_redirect_leaves_https():
    request = fetching.urllib.request.Request("https://host/x")
    nothing = io.BytesIO()
    with pytest.raises(fetching.urllib.error.HTTPError, match="another protocol"):
        fetching._Redirects().redirect_request(request, nothing, 302, "Found", {}, "http://host/x")
    assert fetching._Redirects().redirect_request(request, nothing, 302, "Found", {}, "https://other/x").type == "https"


# ---------------------------------------------------------------------------------------------------- hostile manifests


def _first_shard(**changes):
    return lambda manifest: manifest["splits"]["train"]["shards"][0].update(changes)


HOSTILE = {
    "a path": (_first_shard(file="../outside.tar"), "file: .* match pattern"),
    "an absolute path": (_first_shard(index="/outside.index.npy"), "index: .* match pattern"),
    "another kind of file": (_first_shard(file="sitecustomize.py"), "file: .* match pattern"),
    "the manifest": (_first_shard(file="manifest.json"), "file: .* match pattern"),
    "a file twice": (_first_shard(file="train-000001.tar"), r"names train-000001\.tar twice"),
    "a huge shard": (_first_shard(bytes=2**60), r"1,073,741,824\.0 GiB are to be fetched .* data\.cache"),
    "another hash": (_first_shard(sha256="0" * 64), r"train-000000\.tar: .* arrived, with sha256"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_manifests_are_refused(server, root, tmp_path, what):
    change, message = HOSTILE[what]
    edit_manifest(root, change)
    with pytest.raises(ValueError, match=message):
        fetch(server, tmp_path / "cache")
    assert names(tmp_path) - names(root) == set()
    assert not list(tmp_path.glob("outside*"))


@pytest.mark.parametrize("content", [b"<html>log in</html>", b"", b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_manifest_is_refused(server, root, content):
    (root / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{server.address}/manifest\.json: "):
        fetch_manifest(server.address)


def test_an_unknown_split(server, tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'; it has: train, test"):
        fetch(server, tmp_path / "cache", ("dev",))


# ------------------------------------------------------------------------------------------------- address and cache


def test_which_roots_are_addresses():
    assert is_address("http://host/x")
    assert is_address("s3://bucket/x")
    assert not is_address("data/celeba64")
    assert check_address("https://host:8000/sets/x/") == "https://host:8000/sets/x"


@pytest.mark.parametrize("address", ["ftp://host/x", "file:///x", "s3://bucket/x", "http:///x", "http://user:secret@host/x",
                                     "http://host/x?token=secret", "http://host/x#y"])  # fmt: skip
def test_other_addresses_are_refused_without_telling_secrets(address):
    with pytest.raises(ValueError, match=r"data\.root: ") as caught:
        check_address(address)
    assert "secret" not in str(caught.value)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("NVAE_CACHE_DIR", str(tmp_path / "named"))
    assert default_cache() == tmp_path / "named"
    monkeypatch.delenv("NVAE_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache/nvae-pipeline"


def test_a_file_cut_short_in_the_cache_is_fetched_again(server, samples, tmp_path):
    folder = fetch(server, tmp_path / "cache")
    os.truncate(folder / "train-000001.tar", 100)
    np.testing.assert_array_equal(
        TarShards(fetch(server, tmp_path / "cache"), "train").images([12]), samples.images[[12]]
    )
    assert server.requests["train-000001.tar"] == 2
    assert server.requests["train-000002.tar"] == 1


def test_damage_in_the_cache_names_the_address(server, tmp_path):
    folder = fetch(server, tmp_path / "cache")
    content = bytearray((folder / "train-000001.tar").read_bytes())
    content[-2000] ^= 1
    (folder / "train-000001.tar").write_bytes(content)
    shards = TarShards(folder, "train", verify=True, origin=server.address)
    with pytest.raises(UnreadableShard, match=rf"Delete {folder}; it is fetched again from {server.address}"):
        shards.images([12])


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def tiny(tiny_set, tmp_path):
    """A recipe file, a server of its set, and the words that name the address."""
    settings = tiny_settings(tiny_set)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    with ShardServer(tiny_set) as server:
        yield path, server, ("--data", server.address, f"data.cache={tmp_path / 'cache'}")


def test_two_processes_train_from_an_address_as_from_the_folder(tiny, tmp_path):
    recipe, server, words = tiny
    for folder, more in (("local", ()), ("remote", words)):
        result = train(2, recipe, "--run-dir", str(tmp_path / folder), *more, "train.steps=2")
        assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "local") == metrics(tmp_path / "remote")
    assert set(server.requests.values()) == {1}
    assert re.search(rf"fetching \d+ files of {server.address} into ", result.stderr)


def test_a_set_that_cannot_be_fetched_gets_one_line_and_exit_code_2(tiny, tmp_path):
    recipe, server, _ = tiny
    server.faults["manifest.json"] = [_code(404)]
    result = train_alone(recipe, "--run-dir", str(tmp_path / "run"), "--data", server.address, no_proxy="127.0.0.1")
    assert result.returncode == 2
    place = f"error: {server.address}/manifest.json"
    assert f"{place}: the server answers 404 Not Found with a web page" in result.stderr
    assert "data.root" in result.stderr
    assert "Traceback" not in result.stderr
