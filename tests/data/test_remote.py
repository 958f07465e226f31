"""Shard sets behind an address: fetched once per cache, verified, and read as from a folder."""

import multiprocessing
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.data.remote import check_address, default_cache, fetch_manifest, fetch_set, is_address
from pipeline.data.shards import TarShards, UnreadableShard
from tests.helpers.launching import train, train_alone
from tests.helpers.recipes import tiny_settings
from tests.helpers.remote_sets import FILES, fetch, names
from tests.helpers.run_folders import metrics
from tests.helpers.shard_server import ShardServer, answer, refuse, stall
from tests.helpers.shard_sets import random_samples, write_set

pytestmark = pytest.mark.usefixtures("quick_fetching")


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


def test_another_takes_over_from_a_process_that_is_killed(server, samples, tmp_path):
    """Its half file is not taken for a whole one, and its lock goes with it."""
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    start.set()
    server.faults["train-000002.tar"] = [stall]
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


@pytest.mark.slow
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
    server.faults["manifest.json"] = [refuse(404)]
    result = train_alone(recipe, "--run-dir", str(tmp_path / "run"), "--data", server.address, no_proxy="127.0.0.1")
    assert result.returncode == 2
    place = f"error: {server.address}/manifest.json"
    assert f"{place}: the server answers 404 Not Found with a web page" in result.stderr
    assert "data.root" in result.stderr
    assert "Traceback" not in result.stderr
