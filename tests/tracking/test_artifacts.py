"""A model folder as an artifact of its run, with the manifest of the data as its input, on the stand-in server."""

import json
import shutil

import pytest
import torch

from pipeline.storage.checkpoint_folder import snapshot, write_folder
from pipeline.storage.metrics_file import MetricsFile
from pipeline.tracking import upload

RUN_ID = "0123456789abcdef" * 2


def write_model(folder, run_id=RUN_ID, fingerprint="f" * 64):
    """As export.py's, without the card."""
    facts = {"data_fingerprint": fingerprint, "source": {"kind": "run", "run_id": run_id}}
    write_folder(folder, snapshot({"model": {"weight": torch.arange(4.0)}}), 20, facts, score=None)
    return folder


@pytest.fixture
def run_dir(tmp_path):
    folder, data = tmp_path / "run", tmp_path / "my digits"
    for new in (folder, data):
        new.mkdir()
    (folder / "config.yaml").write_text(f"tracking: {{wandb_timeout: 30.0}}\ndata: {{root: '{data}'}}\n")
    (folder / "run_id").write_text(RUN_ID + "\n")
    (data / "manifest.json").write_text(json.dumps({"fingerprint": "f" * 64}))
    metrics = MetricsFile(folder / "metrics.jsonl", -1)
    metrics.add(10, {"train/loss": 1.0})
    metrics.close()
    return folder


def test_the_model_is_an_output_of_the_run_and_the_manifest_its_input(run_dir, server, tmp_path, capfd):
    model = write_model(tmp_path / "faces")
    assert upload.main([str(run_dir), "--model", str(model)]) == 0
    assert "sent the model faces, with the data my-digits as its input" in capfd.readouterr().err
    (run_id,) = server.runs
    data, sent = sorted(server.artifacts.values(), key=lambda artifact: artifact.type)
    assert (data.type, data.name, data.used_by, data.committed) == ("dataset", "my-digits", [run_id], True)
    assert data.files["manifest.json"] == (tmp_path / "my digits/manifest.json").read_bytes()
    assert (sent.type, sent.name, sent.run, sent.used_by, sent.committed) == ("model", "faces", run_id, [], True)
    for path in model.iterdir():
        assert sent.files[path.name] == path.read_bytes()
    assert json.loads(sent.metadata) == {"data_fingerprint": "f" * 64}
    assert json.loads(data.metadata) == {"fingerprint": "f" * 64}
    assert [row["_step"] for row in server.runs[run_id].history] == [10]


def test_what_does_not_belong_together_is_refused(run_dir, server, tmp_path, capfd):
    def error_of(*arguments):
        assert upload.main([str(run_dir), *map(str, arguments)]) == 2
        return capfd.readouterr().err

    model = write_model(tmp_path / "faces")
    assert "is no model folder: it has no model.safetensors" in error_of("--model", tmp_path)
    other = write_model(tmp_path / "other", run_id="9" * 32)
    assert f"was exported from run {'9' * 32}, and {run_dir} is run {RUN_ID}" in error_of("--model", other)
    altered = shutil.copytree(model, tmp_path / "altered")
    content = bytearray((altered / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (altered / "model.safetensors").write_bytes(content)
    assert "altered" in error_of("--model", altered)
    (tmp_path / "empty").mkdir()
    no_manifest = error_of("--model", model, "--data", tmp_path / "empty")
    assert "holds no manifest.json; name the shard set of the training with --data DIR" in no_manifest
    (tmp_path / "empty/manifest.json").write_text('{"fingerprint": "other"}')
    assert "is another shard set than that of the training" in error_of("--model", model, "--data", tmp_path / "empty")
    assert "--data names the data of a model; give --model as well" in error_of("--data", tmp_path)
    assert server.runs == {}
    assert server.artifacts == {}
