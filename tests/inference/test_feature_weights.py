"""The file of the Inception weights: found, fetched, verified, or refused in one line without running anything."""

import hashlib
import os

import pytest
import torch

from pipeline.inference import feature_weights
from pipeline.inference.feature_weights import find_weights, hub_folder, load_feature_network, read_weights
from tests.helpers.feature_networks import as_file, inception_state
from tests.helpers.hostile_pickles import hostile
from tests.helpers.shard_server import ShardServer, cut, fetch_quickly, refuse, send

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def content() -> bytes:
    """A file like the published one: with counters of batches, which the network does not have."""
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    return as_file(inception_state(1) | counters)


def publish(monkeypatch, content: bytes, address: str = "http://127.0.0.1:9/none.pth") -> None:
    """Makes this the published file, at this address."""
    digest = hashlib.sha256(content).hexdigest()
    file = feature_weights.INCEPTION._replace(address=address, size=len(content), sha256=digest)
    monkeypatch.setattr(feature_weights, "INCEPTION", file)


@pytest.fixture(autouse=True)
def _own_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    fetch_quickly(monkeypatch)


def test_the_network_has_the_weights_of_the_file(content, tmp_path, monkeypatch):
    publish(monkeypatch, content)
    path = tmp_path / "mine.pth"
    path.write_bytes(content)
    before = torch.get_rng_state()
    network = load_feature_network(path, CPU, torch.float64)
    expected = inception_state(1)
    assert network.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].double()) for name, tensor in network.state_dict().items())
    assert not network.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("number", [0, 1])
def test_the_file_of_other_programs_is_used(content, number, monkeypatch):
    """That of pytorch-fid, and that of torch-fidelity."""
    publish(monkeypatch, content)
    hub_folder().mkdir(parents=True)
    path = hub_folder() / feature_weights.INCEPTION.names[number]
    path.write_bytes(content)
    assert find_weights() == path


def test_a_missing_file_is_fetched_once(content, tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(content)
    with ShardServer(tmp_path) as server:
        publish(monkeypatch, content, f"{server.address}/weights.pth")
        path = find_weights()
        assert path.read_bytes() == content
        assert find_weights() == path
        assert server.requests["weights.pth"] == 1
    assert os.listdir(hub_folder()) == [feature_weights.INCEPTION.names[0]]


@pytest.mark.parametrize("fault", [send(b"x" * 100), refuse(404), cut], ids=["other content", "404", "cut off"])
def test_a_file_that_cannot_be_fetched_is_named_with_the_fix(content, tmp_path, monkeypatch, fault):
    (tmp_path / "weights.pth").write_bytes(content)
    with ShardServer(tmp_path) as server:
        server.faults["weights.pth"] = [fault] * 4
        publish(monkeypatch, content, f"{server.address}/weights.pth")
        with pytest.raises(ValueError, match="could not be fetched from http") as raised:
            find_weights()
    check_message(str(raised.value))
    assert os.listdir(hub_folder()) == []


def test_without_a_network_the_message_says_what_to_put_where(content, monkeypatch):
    publish(monkeypatch, content)
    with pytest.raises(ValueError, match="could not be fetched") as raised:
        load_feature_network(None, CPU, torch.float32)
    check_message(str(raised.value))


def check_message(message: str) -> None:
    file = feature_weights.INCEPTION
    assert "\n" not in message
    for part in (file.names[0], f"{file.size:,} bytes", file.sha256, str(hub_folder()), "--feature-weights FILE"):
        assert part in message


def test_a_cache_that_cannot_be_written_to(content, tmp_path, monkeypatch):
    publish(monkeypatch, content)
    (tmp_path / "torch").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="could not be fetched") as raised:
        find_weights()
    check_message(str(raised.value))


def test_another_file_is_refused(content, tmp_path, monkeypatch):
    publish(monkeypatch, content)
    path = tmp_path / "other.pth"
    for other, problem in (
        (content[:-1], f"has {len(content) - 1:,} bytes"),
        (content[:-1] + b"?", "has sha256"),
        (b"", "has 0 bytes"),
    ):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=problem) as raised:
            read_weights(path)
        message = str(raised.value)
        assert message.startswith(str(path))
        assert feature_weights.INCEPTION.sha256 in message
        assert "--feature-weights FILE" in message


def test_what_is_no_file_is_refused(content, tmp_path, monkeypatch):
    """A folder, a pipe, which would block, and a sparse file of a terabyte."""
    publish(monkeypatch, content)
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    for name in (".", "pipe", "huge", "missing"):
        with pytest.raises(ValueError, match="sha256"):
            read_weights(tmp_path / name)


def test_hostile_pickles_are_refused_unread(content, tmp_path, monkeypatch):
    publish(monkeypatch, content)
    path, marker = tmp_path / "hostile.pth", tmp_path / "marker"
    files = [pickle for pickle, _ in hostile(marker).values()]
    files.append(files[0].ljust(len(content), b"\0"))  # of the right size
    for forged in files:
        path.write_bytes(forged)
        with pytest.raises(ValueError, match=r"has (sha256 [0-9a-f]{64}|[0-9,]+ bytes), and the file of the"):
            read_weights(path)
    assert not marker.exists()


RUNNING = ("runs a command", "runs a command in the options", "runs a command in a dictionary", "a pickle")


@pytest.mark.parametrize("what", RUNNING)
def test_a_pickle_runs_nothing_even_if_its_hash_were_right(what, tmp_path, monkeypatch):
    path, marker = tmp_path / "hostile.pth", tmp_path / "marker"
    pickle = hostile(marker)[what][0]
    publish(monkeypatch, pickle)
    path.write_bytes(pickle)
    with pytest.raises(Exception, match="Weights only load failed|Unsupported"):
        read_weights(path)
    assert not marker.exists()


def test_the_published_file():
    assert feature_weights.INCEPTION.size == 95_628_359
    assert feature_weights.INCEPTION.sha256 == "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    assert all(feature_weights.INCEPTION.sha256[:8] in name for name in feature_weights.INCEPTION.names)
