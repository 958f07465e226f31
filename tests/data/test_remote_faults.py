"""Servers of shard sets that fail or lie, and caches with links: tried again or refused, and nothing half is kept."""

import io
import json
import os
import socket
import time

import numpy as np
import pytest

from pipeline.data.remote import FetchError, fetch_manifest, fetch_set
from pipeline.data.shards import TarShards, UnreadableShard
from shard_data import fetch as fetching
from shard_data import manifest
from tests.helpers.remote_sets import FILES, fetch, names
from tests.helpers.shard_server import (
    answer,
    cut,
    hang_up,
    redirect,
    refuse,
    send,
    stall,
)
from tests.helpers.shard_sets import edit_manifest, random_samples, rewrite_index, write_set

pytestmark = pytest.mark.usefixtures("quick_fetching")


# -------------------------------------------------------------------------------------------------------------- faults


PASSING = {"503": refuse(503), "429": refuse(429), "cut": cut, "hung up": hang_up}


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
    server.faults["train-000000.tar"] = [stall] * 4
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


def test_a_redirect_is_followed(server):
    server.faults["moved"] = [redirect("/sets/made/manifest.json")]
    server.faults["manifest.json"] = [redirect("/sets/made/moved")]
    assert json.loads(fetch_manifest(server.address))["name"] == "made"


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "/sets/made/manifest.json"])
def test_redirects_elsewhere_or_in_circles_are_refused(server, target):
    server.faults["manifest.json"] = [redirect(target)] * 20
    with pytest.raises(FetchError, match=r"/manifest\.json: the server answers 302"):
        fetch_manifest(server.address)
    assert server.requests["manifest.json"] <= 6


def test_the_body_of_a_redirect_is_not_read(server):
    sent = []

    def endless(handler, _content):
        redirect("/sets/made/manifest.json")(handler, b"")
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


# ------------------------------------------------------------------------------------------------- content that changes


def test_shards_that_changed_after_the_manifest_was_read_are_refused(server, root, tmp_path):
    before = fetch_manifest(server.address)
    write_set(root, {"train": random_samples(35, 8, 8, seed=9)}, [10])
    with pytest.raises(FetchError, match=r"the set was changed while it was fetched: run the command again"):
        fetch_set(server.address, before, ["train"], tmp_path / "cache")
    assert names(tmp_path / "cache") == set()
    shards = TarShards(fetch(server, tmp_path / "cache"), "train", verify=True)  # the command, run again
    np.testing.assert_array_equal(shards.images(range(35)), random_samples(35, 8, 8, seed=9).images)


def test_a_shard_that_changes_between_two_attempts_is_refused(server, tmp_path):
    server.faults["train-000001.tar"] = [cut, lambda handler, content: answer(handler, content[::-1])]
    with pytest.raises(FetchError, match=r"train-000001\.tar: .* arrived, with sha256"):
        fetch(server, tmp_path / "cache")
    assert "train-000001.tar" not in names(tmp_path / "cache")


def test_a_shard_that_changes_while_others_are_fetched_is_refused_and_the_others_are_kept(server, root, tmp_path):
    def change_the_next(handler, content):
        write_set(root, {"train": random_samples(35, 8, 8, seed=9)}, [10])
        answer(handler, content)

    server.faults["train-000001.index.npy"] = [change_the_next]
    with pytest.raises(FetchError, match=r"train-000002\.tar: .* arrived, with sha256"):
        fetch(server, tmp_path / "cache")
    assert names(tmp_path / "cache") == set(FILES[:4])


# ------------------------------------------------------------------------------------------------------ terminal codes


def test_terminal_codes_of_a_server_do_not_reach_a_message(server, root, tmp_path):
    for content in (b'{"format": "\x1b[2J"}', b'{"format": "webdataset-shards", "version": "\\u001b[2J"}', b"\x1b[2J"):
        server.faults["manifest.json"] = [send(content)]
        with pytest.raises(ValueError, match=r"manifest\.json: ") as caught:
            fetch_manifest(server.address)
        assert str(caught.value).isprintable()
    server.faults["manifest.json"] = [refuse(404, b"<title>\x1b[2J</title>"), redirect("gopher://\x1b[2J/")]
    for _ in range(2):
        with pytest.raises(FetchError) as caught:
            fetch_manifest(server.address)
        assert str(caught.value).isprintable()


def test_terminal_codes_in_a_key_do_not_reach_a_message(server, root, tmp_path):
    def change(index):
        index["key"][3], index["size"][3] = b"\x1b[2J\xff", 7
        return index

    rewrite_index(root, "train-000000", change)
    with pytest.raises(UnreadableShard, match=r"sample '\[2J.' at offset") as caught:
        TarShards(fetch(server, tmp_path / "cache"), "train").images([3])
    assert str(caught.value).isprintable()


# ----------------------------------------------------------------------------------------- symbolic links in the cache


LINKS = {
    "a file elsewhere": lambda link, outside: link.symlink_to(outside),
    "a device": lambda link, _: link.symlink_to("/dev/zero"),
    "itself": lambda link, _: link.symlink_to(link),
    "nothing": lambda link, outside: link.symlink_to(outside.with_name("missing")),
    "a pipe": lambda link, _: os.mkfifo(link),
}


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.index.npy", "manifest.json"])
@pytest.mark.parametrize("ending", ["", ".partial"])
@pytest.mark.parametrize("what", LINKS)
def test_links_in_the_cache_are_replaced_and_not_followed(server, samples, tmp_path, what, ending, name):
    outside = tmp_path / "outside"
    folder = fetch(server, tmp_path / "cache")
    outside.write_bytes((folder / name).read_bytes())  # right content, and still not of the cache
    content = outside.read_bytes()
    (folder / name).unlink()
    LINKS[what](folder / f"{name}{ending}", outside)
    assert fetch(server, tmp_path / "cache") == folder
    assert outside.read_bytes() == content
    assert not (tmp_path / "missing").exists()
    assert (folder / name).is_file()
    assert not (folder / name).is_symlink()
    np.testing.assert_array_equal(TarShards(folder, "train", verify=True).images(range(35)), samples.images)


def test_a_set_folder_or_lock_that_is_a_link_is_refused(server, tmp_path):
    folder = fetch(server, tmp_path / "cache")
    (folder / "train-000001.tar").unlink()
    lock, outside = folder / "train-000001.tar.lock", tmp_path / "outside"
    lock.unlink(missing_ok=True)
    lock.symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        fetch(server, tmp_path / "cache")
    folder.rename(outside)
    for target in (outside, folder, tmp_path / "missing"):
        folder.symlink_to(target)
        with pytest.raises(FetchError, match=r"is a symbolic link, which is refused; delete it"):
            fetch(server, tmp_path / "cache")
        folder.unlink()
    assert not (outside / "train-000001.tar").exists()


def test_a_cache_behind_a_link_is_used(server, tmp_path):
    """The user's own choice of a disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    assert len(TarShards(fetch(server, tmp_path / "cache"), "train", verify=True)) == 35
