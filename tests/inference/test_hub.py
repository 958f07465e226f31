"""Push to and pull from the Hugging Face Hub, against a stand-in for it; each way in which it can refuse."""

import json
import logging
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants, snapshot_download

import pipeline
from pipeline import evaluate, sample
from pipeline.inference.export_run import push_folder
from pipeline.inference.hub import LIMITS, Repository, parse_repository, pull, push
from pipeline.inference.locations import find_model
from pipeline.inference.model_folder import content_of, write_model_folder
from pipeline.storage.checkpoint import Checkpoints
from tests.helpers.hub_server import TOKEN, HubServer, StoredRepository, use_hub
from tests.helpers.launching import ROOT
from tests.helpers.recipes import tiny_settings
from tests.helpers.shard_sets import random_samples, write_set
from tests.helpers.trained_runs import make_run

NAME = "alice/faces"
FACES = Repository(NAME)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    make_run(place / "run", tiny_settings("nowhere"))
    content = content_of(Checkpoints(place / "run/checkpoints").latest())
    write_model_folder(place / "model", content, "---\ntags: [vae]\n---\n# Card\n")
    (place / "model/notes.txt").write_text("for me")
    return place / "model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer() as server:
        use_hub(monkeypatch, server.address, tmp_path / "home")
        yield server


@pytest.fixture
def stored(hub, folder) -> StoredRepository:
    """A repository with the model folder in one commit."""
    hub.repositories[NAME] = StoredRepository()
    hub.repositories[NAME].commit(contents(folder))
    return hub.repositories[NAME]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name in LIMITS}


# ---------------------------------------------------------------------------------------------------- push and pull


def test_what_is_pushed_is_what_is_pulled(hub, folder):
    commit = push(folder, FACES)
    kept = hub.repositories[NAME]
    assert kept.refs["main"] == commit
    assert not kept.private
    assert kept.files("main")[1].keys() - {".gitattributes"} == contents(folder).keys()  # without notes.txt
    place, pulled = pull(FACES)
    assert (contents(place), pulled) == (contents(folder), commit)


def test_a_model_is_loaded_from_the_hub_and_the_revision_is_pinned(hub, stored, folder):
    old = stored.refs["main"]
    found = pipeline.load(f"hf-hub:{NAME}")
    assert found.place == f"hf-hub:{NAME}@{old}"
    assert torch.equal(found.sample(2, seed=1), pipeline.load(folder).sample(2, seed=1))
    stored.commit({"README.md": b"nothing else"})
    stored.refs["v1"] = old
    for revision in (old, "v1"):
        assert pipeline.load(f"hf-hub:{NAME}@{revision}").weights_sha256 == found.weights_sha256
    assert pipeline.load(found.place).place == found.place
    with pytest.raises(ValueError, match="holds no model of this project: no meta.json and no model.safetensors"):
        pipeline.load(f"hf-hub:{NAME}")


def test_the_tools_take_a_model_of_the_hub_and_write_into_the_current_folder(
    hub, stored, tmp_path, monkeypatch, make_runtime
):
    monkeypatch.chdir(tmp_path)
    shards = write_set(tmp_path / "set", {"test": random_samples(3, 16, 16)}, [3])
    make_runtime()
    assert sample.main([f"hf-hub:{NAME}@main", "--count", "1"]) == 0
    assert evaluate.main([f"hf-hub:{NAME}", "--data", str(shards), "--threads", "1"]) == 0
    (report,) = (tmp_path / "alice--faces/evaluations").iterdir()
    assert json.loads(report.read_text())["checkpoint"] == f"hf-hub:{NAME}@{stored.refs['main']}"
    assert [path.suffix for path in (tmp_path / "alice--faces/samples").iterdir()] == [".png"]
    assert evaluate.main([f"hf-hub:{NAME}", "--checkpoint", "best", "--data", str(shards), "--threads", "1"]) == 2


def test_only_the_files_of_a_model_folder_are_taken(hub, stored):
    stored.commit(stored.files("main")[1] | {"more/README.md": b"x", "evil.py": b"x", "pytorch_model.bin": b"x" * 99})
    place, _ = pull(FACES)
    assert {path.name for path in place.rglob("*")} == {"README.md", "config.yaml", "meta.json", "model.safetensors"}
    assert not [path for _, path, _ in hub.requests if "evil" in path or "bin" in path or "more" in path]


def test_a_second_push_replaces_and_deletes_the_picture(hub, folder, tmp_path):
    with_picture = shutil.copytree(folder, tmp_path / "model")
    (with_picture / "samples.png").write_bytes(b"a picture")
    push(with_picture, FACES)
    push(folder, FACES)
    before, after = (files.keys() for _, files in hub.repositories[NAME].commits[-2:])
    assert before - after == {"samples.png"}


def test_a_private_repository(hub, folder, monkeypatch):
    push(folder, FACES, private=True)
    assert hub.repositories[NAME].private
    assert pull(FACES)
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(ValueError, match="no such repository, or it is private .log in with `hf auth login`"):
        pull(FACES)


def test_a_public_repository_is_not_taken_for_a_private_one(hub, folder):
    push(folder, FACES)
    with pytest.raises(ValueError, match="is public already; make it private in its settings"):
        push(folder, FACES, private=True)
    assert len(hub.repositories[NAME].commits) == 2


def test_another_kind_of_model_is_not_overwritten(hub, folder):
    hub.repositories[NAME] = StoredRepository()
    hub.repositories[NAME].commit({"model.safetensors": b"a language model", "README.md": b"its card"})
    with pytest.raises(ValueError, match="holds another kind of model, which would be overwritten"):
        push(folder, FACES)
    assert len(hub.repositories[NAME].commits) == 1


def test_the_cache_is_used_offline_and_without_a_network(hub, stored, monkeypatch, caplog):
    place, commit = pull(FACES)
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(FACES) == (place, commit)
    assert "hf-hub:alice/faces: the copy in the cache is used, because HF_HUB_OFFLINE is set" in caplog.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use_hub(monkeypatch, nowhere(), constants.HF_HUB_CACHE.removesuffix("/hub"))
    assert pull(FACES) == (place, commit)
    assert "the copy in the cache is used, because the Hub cannot be reached" in caplog.text


def nowhere() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# ----------------------------------------------------------------------------------------------------------- refusals


def refusal(work) -> str:
    """The message, of one line, without the token."""
    with pytest.raises(ValueError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


def test_a_repository_or_revision_that_is_not_there(hub, stored):
    assert refusal(lambda: pull(Repository("alice/none"))) == (
        "hf-hub:alice/none: there is no such repository, or it is not visible to your token"
    )
    assert refusal(lambda: pull(Repository(NAME, "v9"))) == f"hf-hub:{NAME}@v9: there is no such revision"
    assert "there is no such revision" in refusal(lambda: pull(Repository(NAME, "0" * 40)))


def test_access_that_has_to_be_requested(hub, stored):
    stored.gated = True
    assert "access has to be requested on its page at the Hub" in refusal(lambda: pull(FACES))


def test_no_network_and_no_copy(hub, folder, monkeypatch, tmp_path):
    use_hub(monkeypatch, nowhere(), tmp_path / "home")
    assert "the Hub cannot be reached (" in refusal(lambda: pull(FACES))
    assert "there is no copy in the cache" in refusal(lambda: pull(FACES))
    assert "the Hub cannot be reached (" in refusal(lambda: push(folder, FACES))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(lambda: pull(FACES)) == f"hf-hub:{NAME}: HF_HUB_OFFLINE is set; there is no copy in the cache"


def test_no_token_or_a_wrong_one(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert refusal(lambda: push(folder, FACES)) == (
        f"hf-hub:{NAME}: no token; log in with `hf auth login`, or set HF_TOKEN, with a token that may write"
    )
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub refused the token (401)" in refusal(lambda: push(folder, FACES))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "the Hub refused the token (403)" in refusal(lambda: push(folder, Repository("somebody-else/faces")))
    assert hub.repositories == {}


def test_an_answer_that_is_an_error_or_no_answer_of_a_hub(hub, stored, folder, monkeypatch):
    hub.failing = 418
    assert "the Hub answered with an error (418 out of order)" in refusal(lambda: pull(FACES))
    assert "the Hub answered with an error (418 out of order)" in refusal(lambda: push(folder, FACES))


def test_a_file_over_the_limit_is_not_downloaded(hub, stored):
    for name, limit in LIMITS.items():
        if name in stored.files("main")[1]:
            hub.sizes = {name: limit + 1}
            assert f"{name} has {limit + 1} bytes; at most {limit} are taken" in refusal(lambda: pull(FACES))
    assert not [path for method, path, _ in hub.requests if method == "GET" and "resolve" in path]


def test_a_push_between_the_question_and_the_download_is_noticed(hub, stored, monkeypatch):
    def after_a_push(**options):
        stored.commit(stored.files("main")[1] | {"README.md": b"another"})
        return snapshot_download(**options)

    monkeypatch.setattr("pipeline.inference.hub.snapshot_download", after_a_push)
    assert refusal(lambda: pull(FACES)) == f"hf-hub:{NAME}: was changed while it was downloaded; try again"


def test_nothing_that_is_downloaded_is_trusted(hub, stored):
    files = dict(stored.files("main")[1])
    weights = files["model.safetensors"]
    stored.commit(files | {"model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])})
    assert "model.safetensors: sha256 differs from the one in meta.json" in refusal(
        lambda: find_model(f"hf-hub:{NAME}")
    )
    stored.commit(files | {"meta.json": b"{}"})
    assert "meta.json: not the facts of a checkpoint" in refusal(lambda: find_model(f"hf-hub:{NAME}"))


def test_a_push_that_fails_says_how_to_try_again(hub, folder, monkeypatch, tmp_path):
    use_hub(monkeypatch, nowhere(), tmp_path / "home")
    again = f"python -m pipeline.export {folder} --push {NAME}"
    with pytest.raises(ValueError, match=f"is complete; to push it again: {again}"):
        push_folder(folder, FACES, private=False)


def test_a_damaged_folder_is_not_pushed(hub, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="model.safetensors: 4 bytes instead of"):
        push_folder(copy, FACES, private=False)
    assert hub.requests == []


def test_the_token_is_neither_logged_nor_written(folder, tmp_path):
    """The command as a user runs it, with the library's debug log; only the Authorization header has the token."""
    with HubServer() as server:
        environment = server.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN, "HF_HUB_VERBOSITY": "debug"}
        command = [sys.executable, str(ROOT / "pipeline/export.py"), str(folder), "--push", NAME]
        ended = subprocess.run(command, env={"PATH": "", **environment}, capture_output=True, text=True, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        commit = server.repositories[NAME].refs["main"]
        assert f"pushed to {server.address}/{NAME}; load it as hf-hub:{NAME}@{commit}" in ended.stderr
        assert TOKEN not in ended.stdout + ended.stderr
        assert TOKEN.encode() not in b"".join(
            b"".join(files.values()) for _, files in server.repositories[NAME].commits
        )
    written = [path for place in (tmp_path, folder) for path in place.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_names_of_repositories():
    assert parse_repository("a/b") == Repository("a/b")
    assert parse_repository("a/b@refs/pr/1") == Repository("a/b", "refs/pr/1")
    assert str(parse_repository("a/b@v1.0")) == "hf-hub:a/b@v1.0"
