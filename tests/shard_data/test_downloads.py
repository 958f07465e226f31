"""--download against a server on loopback: what is right is kept, what is wrong is told, nothing is left half."""

import errno
import gzip
import hashlib
import importlib.util
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from shard_data import DataError
from shard_data import fetch as fetching
from shard_data.__main__ import main
from shard_data.downloads import FILES, Download, fetch
from tests.helpers.mnist_files import digits, idx
from tests.helpers.shard_server import ShardServer, fetch_quickly, redirect, refuse, send

QUOTA = b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    fetch_quickly(monkeypatch)


@pytest.fixture
def server(tmp_path_factory):
    with ShardServer(tmp_path_factory.mktemp("published")) as server:
        yield server


@pytest.fixture
def mnist(monkeypatch, server) -> dict[str, bytes]:
    """Small files of MNIST on the server, published with their md5."""
    made = {}
    for prefix in ("train", "t10k"):
        for kind, array in zip(("images-idx3", "labels-idx1"), digits(prefix), strict=True):
            made[f"{prefix}-{kind}-ubyte.gz"] = gzip.compress(idx(array), mtime=0)
    published = tuple(
        Download(name, hashlib.md5(data).hexdigest(), ("http://127.0.0.1:9/",)) for name, data in made.items()
    )
    monkeypatch.setitem(FILES, "mnist", published)
    for name, data in made.items():
        (server.folder / name).write_bytes(data)
    return made


def test_fetched_files_are_converted(mnist, server, tmp_path):
    words = ["--source", str(tmp_path / "in"), "--download", "--mirror", f"{server.address}/"]
    assert main(["mnist", *words, "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == mnist
    rows = np.load(tmp_path / "out" / "train-000000.index.npy")
    assert np.array_equal(rows["label"], digits("train")[1])


def test_what_is_there_is_not_fetched_again(mnist, server, tmp_path):
    fetch("mnist", tmp_path, server.address)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    fetch("mnist", tmp_path, server.address)
    assert server.requests == dict.fromkeys(mnist, 1) | {"t10k-labels-idx1-ubyte.gz": 2}


def test_a_file_that_is_not_as_published_is_not_overwritten(mnist, server, tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: is not as published"):
        fetch("mnist", tmp_path, server.address)
    assert (tmp_path / "train-images-idx3-ubyte.gz").read_bytes() == b"mine"


WRONG = {
    "quota page": (send(QUOTA), "a web page titled 'Google Drive - Quota exceeded' arrived"),
    "terminal codes": (send(b"<html><title>\x1b[2J</title>"), r"a web page titled '\\x1b\[2J' arrived"),
    "pointer": (send(b"version https://git-lfs.github.com/spec/v1\noid"), "a Git LFS pointer"),
    "nothing": (send(b""), "an empty file arrived"),
    "other content": (send(b"\x1f\x8b other"), "gzip data arrived, with md5 [0-9a-f]{32} instead of"),
    "not found": (
        refuse(404, b"<html><title>Gone</title>"),
        "the server answers 404 Not Found with a web page titled 'Gone'",
    ),
    "error": (refuse(500, b""), r"the server answers 500 Internal Server Error \(4 attempts\)"),
    "broken off": (send(b"\x1f\x8b half", length=100_000), "broke off after 7 of 100,000 bytes"),
    "elsewhere": (redirect("file:///etc/passwd"), "the server answers 302"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_arrives_instead_is_told_with_what_to_do_by_hand(mnist, server, tmp_path, case, capsys):
    fault, message = WRONG[case]
    server.faults["train-images-idx3-ubyte.gz"] = [fault] * 8
    with pytest.raises(DataError, match=message) as failure:
        fetch("mnist", tmp_path / "a folder", server.address)
    digest = hashlib.md5(mnist["train-images-idx3-ubyte.gz"]).hexdigest()
    for part in (digest, f"place it as '{tmp_path}/a folder/train-images-idx3-ubyte.gz'", "--mirror"):
        assert part in str(failure.value)
    assert list((tmp_path / "a folder").iterdir()) == []
    words = ["--source", str(tmp_path / "in"), "--download", "--mirror", server.address]
    assert main(["mnist", *words, "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mirror", ["http://127.0.0.1:9", "ftp://127.0.0.1/x", "file:///etc", "/etc", "nonsense"])
def test_addresses_that_cannot_work(mnist, tmp_path, mirror):
    with pytest.raises(DataError, match="Connection refused|not an http or https address"):
        fetch("mnist", tmp_path, mirror)


def test_the_second_address_is_tried_when_the_first_fails(mnist, server, tmp_path, monkeypatch):
    name = "train-images-idx3-ubyte.gz"
    digest = hashlib.md5(mnist[name]).hexdigest()
    addresses = (f"{server.address}/gone/{name}", f"{server.address}/{name}")
    monkeypatch.setitem(FILES, "mnist", (Download(name, digest, addresses),))
    fetch("mnist", tmp_path)
    assert server.requests == {name: 2}
    assert (tmp_path / name).read_bytes() == mnist[name]


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DataError, match=r"answer within 0\.2 s"):
        fetch("mnist", tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_place_that_cannot_be_written_is_named(mnist, server, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    words = ["--download", "--mirror", server.address, "--out", str(tmp_path / "out")]
    assert main(["mnist", "--source", str(tmp_path / "file"), *words]) == 2
    assert f"{tmp_path}/file: cannot be written" in capsys.readouterr().err

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["mnist", "--source", str(tmp_path / "in"), *words]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "in").iterdir()) == []


def test_a_mirror_without_download_is_a_mistake(mnist, tmp_path, capsys):
    words = ["mnist", "--source", str(tmp_path), "--mirror", "http://127.0.0.1:9", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "add --download" in capsys.readouterr().err


def test_the_table_knows_what_torchvision_knows():
    """Names and md5 as torchvision 0.28 states them; read from its source, as its import wants all of torch."""
    found = importlib.util.find_spec("torchvision")
    folder = Path(found.submodule_search_locations[0]) / "datasets"
    text = "".join((folder / name).read_text() for name in ("celeba.py", "cifar.py", "mnist.py"))
    for files in FILES.values():
        for file in files:
            assert f'"{file.md5}"' in text
            assert f'"{file.name}"' in text
    assert {name for name, files in FILES.items() if len({file.name for file in files}) == len(files)} == set(FILES)
