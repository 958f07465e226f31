"""What W&B receives, and that it can neither stop, delay nor betray a run."""

import http.server
import io
import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.tracking import tracker as tracking
from pipeline.tracking import wandb_run
from pipeline.tracking.tracker import Tracker, TrackingConfig
from pipeline.tracking.wandb_run import choose_mode, describe, find_key, panel_name

ROOT = Path(wandb_run.__file__).parents[2]
KEY = "local-0123456789abcdef0123456789abcdef01234567"[-40:]
CONFIG = {"optim": {"lr": 0.01}, "model": {"name": "nvae"}}
SCALARS = [
    *(f"train/{name}" for name in ["loss", "elbo", "bpd", "log_px", "kl", "beta", "lr", "grad_norm", "skipped_steps"]),
    *(
        f"{kind}/{group}"
        for kind in ("kl", "active_units")
        for group in ("8x8_group00", "8x8_group01", "16x16_group00")
    ),
    *(f"val/{name}" for name in ["elbo", "bpd", "nll", "bpd_nll"]),
    *(f"perf/{name}" for name in ["images_per_second", "data_wait", "step_ms", "gpu_memory_gib", "mfu"]),
    "samples_seen",
]
COST = ["attempt", "perf/wall_clock_s"]
"""What the tracker adds to each record of figures."""
IMAGES = ["samples/temperature_0.7", "samples/temperature_1.0", "reconstructions"]


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    """A machine without a W&B key, whatever this one has, and a fresh wandb afterwards."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def tracker(folder, wandb="auto", start_step=0, attempt=1, **settings):
    config = TrackingConfig(wandb=wandb, wandb_timeout=settings.pop("wandb_timeout", 10.0), **settings)
    return Tracker(config, folder, CONFIG, is_main=True, start_step=start_step, attempt=attempt)


def picture(value):
    return np.full((6, 8, 3), value, np.uint8)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- an independent reader of W&B's file ------------------------------------------------------------------------------


def log_chunks(content):
    """The records of a LevelDB log (blocks of 32 KiB; a chunk is whole, first, middle or last) behind W&B's 7 bytes."""
    assert content[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def read_wandb(folder, closed=True):
    """All records of the offline W&B files of a run folder, in order."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    if closed:
        wandb.teardown()  # as when Python exits: the service closes its files
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [Record.FromString(chunk) for path in files for chunk in log_chunks(path.read_bytes())]


def history(records):
    """Per step, everything that was logged: {step: {key: value}}."""
    steps = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {}
            for item in record.history.item:
                key, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                items.setdefault(key, {}).update({inner[0]: value}) if inner else items.update({key: value})
            steps.setdefault(items["step"], {}).update(items)
    return steps


# --- what is told -----------------------------------------------------------------------------------------------------


@pytest.fixture
def told(tmp_path):
    """A run of three steps with every key of the design, offline, read back."""
    folder = tmp_path / "my_run"
    with tracker(folder, tags=["a", "b"]) as run:
        for step in (10, 20, 30):
            run.log(step, {key: step + i / 100 for i, key in enumerate(SCALARS)})
            run.log(step, {}, {key: picture(step + i) for i, key in enumerate(IMAGES)})
        run.alert("Loss is not finite", "step 30 was skipped")
    return folder, read_wandb(folder)


def test_every_key_is_in_both_records(told):
    folder, records = told
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert all(line.keys() == {"step", "time", *SCALARS, *COST} for line in lines)
    steps = history(records)
    assert sorted(steps) == [10, 20, 30]
    for line in lines:
        logged = steps[line["step"]]
        assert {key: logged[key] for key in SCALARS + COST} == {key: line[key] for key in SCALARS + COST}
        assert {key: logged[panel_name(key)] for key in SCALARS + COST} == {key: line[key] for key in SCALARS + COST}
        assert logged["_step"] == line["step"]


def test_pictures_arrive_to_the_pixel(told):
    folder, records = told
    files = next(folder.glob("wandb/offline-run-*/files"))
    for step, logged in history(records).items():
        for i, key in enumerate(IMAGES):
            for name in (key, panel_name(key)):
                assert logged[name]["_type"] == "image-file"
                assert (np.asarray(Image.open(files / logged[name]["path"])) == picture(step + i)).all()


def test_page_sections_axes_and_summaries(told):
    metrics = {record.metric.name: record.metric for record in told[1] if record.WhichOneof("record_type") == "metric"}
    panels = {panel_name(key): key for key in [*SCALARS, *IMAGES] if key != "samples_seen"}
    assert {name.split("/")[0] for name in panels} == {
        "Objective",
        "Latent groups",
        "Samples",
        "Throughput",
        "Validation",
    }
    assert len(panels) == len(SCALARS) + len(IMAGES) - 1
    for panel, key in panels.items():
        assert metrics[panel].step_metric == metrics[key].step_metric == "step"
        assert (metrics[panel].options.hidden, metrics[key].options.hidden) == (False, True)
    assert metrics["samples_seen"].options.hidden
    assert metrics["val/elbo"].summary.max
    assert metrics["val/bpd"].summary.min
    assert metrics["perf/images_per_second"].summary.mean
    assert metrics["Validation/bpd"].summary.none


def test_settings_name_tags_and_alert_arrive(told):
    run = next(record.run for record in told[1] if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert (run.display_name, run.project, list(run.tags)) == ("my_run", "nvae-pipeline", ["a", "b"])
    alerts = [record.alert for record in told[1] if record.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.text, alert.level) for alert in alerts] == [
        ("Loss is not finite", "step 30 was skipped", "WARN")
    ]


def test_no_code_no_git_and_no_terminal(told):
    folder, records = told
    kinds = {record.WhichOneof("record_type") for record in records}
    assert not kinds & {"output", "output_raw"}
    assert not any(record.run.git.remote_url or record.run.git.commit for record in records)
    names = {path.name for path in folder.glob("wandb/*/files/**/*")}
    assert not any(re.search(r"\.(py|patch|diff)$|output\.log", name) for name in names)


def test_the_wandb_folder_lies_in_the_run_folder(told):
    assert sorted(os.listdir(told[0])) == ["metrics.jsonl", "wandb", "wandb_run_id"]


def test_panel_names():
    assert panel_name("train/loss") == "Objective/loss"
    assert panel_name("kl/8x8_group03") == "Latent groups/kl 8x8_group03"
    assert panel_name("active_units/8x8_group03") == "Latent groups/active units 8x8_group03"
    assert panel_name("samples/temperature_0.7") == "Samples/temperature_0.7"
    assert panel_name("reconstructions") == "Samples/reconstructions"
    assert panel_name("samples_seen") == "samples_seen"


# --- restarts and endings ---------------------------------------------------------------------------------------------


def test_one_run_over_restarts(tmp_path):
    with tracker(tmp_path) as run:
        for step in (1, 2, 3):
            run.log(step, {"train/loss": 1.0 * step})
    with tracker(tmp_path, start_step=2) as run:
        for step in (3, 4):
            run.log(step, {"train/loss": 10.0 * step})
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]
    ids = {record.run.run_id for record in read_wandb(tmp_path) if record.WhichOneof("record_type") == "run"}
    assert ids == {(tmp_path / "wandb_run_id").read_text().strip()}
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


def test_cost_is_summed_over_attempts_without_the_time_between(tmp_path, monkeypatch):
    """Attempt 1 tells steps 1-3 and is killed; attempt 2 starts an hour later from step 2."""
    seconds = iter([100.0, 110.0, 120.0, 135.5, 3700.0, 3701.0, 3702.0])
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    run = tracker(tmp_path, "disabled")
    for step in (1, 2, 3):
        run.log(step, {}, {"reconstructions": picture(0)})
        run.log(step, {"train/loss": 1.0})
        run.log(step, {"val/bpd": 1.0})
    with tracker(tmp_path, "disabled", start_step=2, attempt=2) as run:
        for step in (3, 4):
            run.log(step, {"train/loss": 1.0})
    cost = [(line["step"], line["attempt"], line["perf/wall_clock_s"]) for line in read_metrics(tmp_path)]
    assert cost == [(1, 1, 10.0), (2, 1, 20.0), (3, 2, 36.5), (4, 2, 37.5)]


def test_a_fresh_start_repeats_nothing(tmp_path):
    """A run that died before its first checkpoint starts again at step 0."""
    for _ in range(2):
        with tracker(tmp_path, "disabled") as run:
            for step in (0, 1):
                run.log(step, {"train/loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_id_of_a_sweep_and_of_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "sweep-7")
    assert wandb_run.run_id(tmp_path) == "sweep-7"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert wandb_run.run_id(tmp_path) == "sweep-7"
    (tmp_path / "wandb_run_id").write_text("../x\n")
    fresh = wandb_run.run_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", fresh)
    assert wandb_run.run_id(tmp_path) == fresh


def test_a_failed_run_is_marked_so(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), tracker(tmp_path):
        raise RuntimeError("out of memory")
    exits = [record.exit.exit_code for record in read_wandb(tmp_path) if record.WhichOneof("record_type") == "exit"]
    assert exits == [1]


def test_other_processes_leave_no_trace(tmp_path):
    with Tracker(TrackingConfig(), tmp_path / "run", CONFIG, is_main=False, start_step=0) as run:
        run.log(1, {"train/loss": 1.0}, {"reconstructions": picture(0)})
        run.alert("a", "b")
    assert not (tmp_path / "run").exists()


def test_disabled_does_not_even_import_wandb(tmp_path):
    code = (
        "import sys\n"
        "from pipeline.tracking.tracker import Tracker, TrackingConfig\n"
        "config = TrackingConfig(wandb='disabled')\n"
        "with Tracker(config, sys.argv[1], {}, is_main=True, start_step=0) as run:\n"
        "    run.log(1, {'train/loss': 1.0}); run.alert('a', 'b')\n"
        "print('wandb' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.strip() == "False", result.stderr
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]


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


def test_offline_is_said_once_with_the_line_to_upload(tmp_path, caplog):
    with caplog.at_level(logging.INFO), tracker(tmp_path) as run:
        run.log(1, {"train/loss": 1.0})
    said = [record.message for record in caplog.records if "W&B" in record.message]
    assert len(said) == 1
    folder = re.search(r"no W&B key found.*wandb sync (\S+)$", said[0])[1]
    assert list(Path(folder).glob("*/*.wandb"))


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


def test_a_refused_key_ends_a_fresh_start_that_asked_for_online(tmp_path, refusing_server, caplog, capfd):
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
    assert re.search("W&B: offline .*401.*wandb sync", caplog.text)
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
        assert re.search("W&B: offline .*wandb sync", caplog.text)
        with pytest.raises(ValueError, match="W&B cannot be used"):
            tracker(tmp_path / "fresh", "online", wandb_timeout=1.0)


def test_online_without_a_key_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    with pytest.raises(ValueError, match="no key found: set WANDB_API_KEY or run `wandb login`"):
        tracker(tmp_path, "online")


def test_errors_are_told_without_the_key(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert describe(RuntimeError(f"bad\n key {KEY}!")) == "bad key ***!"
    assert describe(KeyError()) == "KeyError"


# --- faults -----------------------------------------------------------------------------------------------------------


def test_an_error_of_wandb_is_said_once_and_the_run_goes_on(tmp_path, caplog):
    with tracker(tmp_path) as run:
        run.log(1, {"train/loss": 1.0})
        run.log(2, {"train/loss": 1.0}, {"reconstructions": "not a picture"})
        run._wandb._thread.join(10)
        for step in range(3, 9):
            run.log(step, {"train/loss": 1.0})
        run.alert("a", "b")
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))
    assert len(re.findall("W&B is off from here on", caplog.text)) == 1


def test_records_reach_the_offline_file_long_before_the_end(tmp_path):
    """So that a kill takes little from it; wandb's own buffer would hold them for 15 seconds or a block of 32 KiB."""
    with tracker(tmp_path) as run:
        run.log(1, {"train/loss": 1.0})
        run.log(2, {"train/loss": 2.0})
        deadline = time.monotonic() + 10
        while not (found := history(read_wandb(tmp_path, closed=False))) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert found[1]["train/loss"] == 1.0


def test_without_any_working_wandb_metrics_go_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_run, "init_run", lambda *args: (_ for _ in ()).throw(OSError("no room for wandb")))
    with tracker(tmp_path) as run:
        run.log(1, {"train/loss": 1.0})
    assert "W&B is off (no room for wandb)" in caplog.text
    assert len(read_metrics(tmp_path)) == 1


FAULTY_SERVICE = """
import logging, os, signal, sys, threading
from pathlib import Path
from pipeline.tracking.tracker import Tracker, TrackingConfig
from pipeline.tracking.wandb_run import choose_mode, describe, find_key, panel_name
logging.basicConfig(level=logging.WARNING, format="%(message)s")
config = TrackingConfig(wandb="offline", wandb_timeout=1.0)
with Tracker(config, sys.argv[1], {}, is_main=True, start_step=0) as run:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    service = [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("wandb-core")]
    os.kill(service[0], getattr(signal, sys.argv[2]))
    for step in range(1, 2001):
        run.log(step, {f"kl/{i}": 1.0 * step for i in range(20)})
print(service[0])
"""


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSTOP"])
def test_a_dead_or_frozen_service_neither_stops_nor_holds_a_run(tmp_path, signal_name):
    command = [sys.executable, "-c", FAULTY_SERVICE, str(tmp_path), signal_name]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 2001))
    assert result.stderr.count("W&B is off from here on") == 1
    assert not Path(f"/proc/{result.stdout.strip()}").exists()
