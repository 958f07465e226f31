"""Faults of the system while shards are read: retried, then an error that names them, never an unreadable sample."""

import errno
import hashlib
import os
import re
import resource
import sys

import numpy as np
import pytest

from pipeline.data import read_files
from pipeline.data.loader import build_eval_loader
from pipeline.data.preprocess import Preprocess
from pipeline.data.read_files import RETRY_PAUSES, OpenFile, ShortFile
from pipeline.data.shards import TarShards
from tests.helpers.launching import ROOT, TIMEOUT, run_command
from tests.helpers.recipes import write_tiny_recipe, write_tiny_set
from tests.helpers.shard_sets import random_samples, write_set

FAULTS = [errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EACCES]


@pytest.fixture
def at_once(monkeypatch):
    """Retries come without a pause."""
    monkeypatch.setattr(read_files, "RETRY_PAUSES", (0, 0, 0))


class Faulty:
    """A call of the system that fails with `fault` in the calls of these numbers. `fault` None: with a MemoryError."""

    def __init__(self, call, fault: int | None, failing: range):
        self.call, self.fault, self.failing, self.calls = call, fault, failing, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise MemoryError if self.fault is None else OSError(self.fault, os.strerror(self.fault))
        return self.call(*arguments, **options)


def break_call(monkeypatch, name: str, fault: int | None, failing: range) -> Faulty:
    call = Faulty(getattr(os, name), fault, failing)
    monkeypatch.setattr(os, name, call)
    return call


@pytest.mark.parametrize("fault", [*FAULTS, None])
@pytest.mark.parametrize("name", ["open", "preadv"])
def test_a_passing_fault_goes_unnoticed(small, at_once, monkeypatch, name, fault):
    """At any place of opening, hashing and reading three shards: the first one, and those of the retries."""
    root, samples = small
    for first in range(12):
        shards = TarShards(root, "train", verify=True)
        with monkeypatch.context() as context:
            call = break_call(context, name, fault, range(first, first + 3))
            np.testing.assert_array_equal(shards.images(range(23)), samples.images)
            assert shards.labels(range(23)).tolist() == samples.labels.tolist()
    assert call.calls >= 6


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("name", "file"), [("open", "train-000000.index.npy"), ("preadv", "train-000000.tar")])
def test_a_lasting_fault_is_an_error_that_names_it(small, at_once, monkeypatch, name, file, fault):
    """Also where unreadable samples are skipped. When it has passed, the same object reads all."""
    root, samples = small
    shards = TarShards(root, "train", verify=True)
    if name == "preadv":
        shards.labels(range(23))
    with monkeypatch.context() as context:
        break_call(context, name, fault, range(1000))
        hint = r"; raise the limit of open files \(ulimit -n\)" if fault in (errno.EMFILE, errno.ENFILE) else ""
        what = rf"\[Errno {fault}\] {os.strerror(fault)} \({errno.errorcode[fault]}\)"
        text = rf"{what}, 4 times in 0 s{hint}: '{root}/{file}'"
        for on_error in ("raise", "skip"):
            loader = build_eval_loader(shards, Preprocess(seed=1), 5, on_error=on_error)
            with pytest.raises(OSError, match=f"^{text}$"):
                next(iter(loader))
    np.testing.assert_array_equal(shards.images(range(23)), samples.images)


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_a_decoder_that_cannot_import_its_modules_makes_no_sample_unreadable(tmp_path, monkeypatch, encoding):
    samples = random_samples(3)
    shards = TarShards(write_set(tmp_path, {"train": samples}, [3], encoding), "train")
    monkeypatch.setattr(read_files, "RETRY_PAUSES", (0,))
    name = {"npy": "numpy.lib.format.read_magic", "png": "PIL.Image.open"}[encoding]
    with monkeypatch.context() as context:
        context.setattr(name, Faulty(None, errno.EMFILE, range(100)))
        with pytest.raises(OSError, match=r"EMFILE.*train-000000"):
            shards.images([0])
    np.testing.assert_array_equal(shards.images([2, 0]), samples.images[[2, 0]])


def test_retries_wait_for_some_seconds_in_all(small, monkeypatch):
    assert 5 <= sum(RETRY_PAUSES) <= 10
    pauses = []
    monkeypatch.setattr(read_files, "time", type("time", (), {"sleep": pauses.append}))
    shards = TarShards(small[0], "train")
    break_call(monkeypatch, "preadv", errno.EIO, range(1000))
    with pytest.raises(OSError, match="4 times in 7 s"):
        shards.images([0])
    assert pauses == list(RETRY_PAUSES)


def test_each_retry_is_logged(small, at_once, monkeypatch, caplog):
    caplog.set_level("WARNING", logger="pipeline")
    break_call(monkeypatch, "preadv", errno.EIO, range(2))
    TarShards(small[0], "train").images([0])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{small[0]}/train-000000.index.npy: Input/output error; tried again in 0 s"] * 2


def test_a_server_that_reads_in_pieces(tmp_path, monkeypatch):
    """Network file systems may give less than was wanted."""
    content = np.random.default_rng(0).bytes(10_000)
    path = tmp_path / "file"
    path.write_bytes(content)
    preadv = os.preadv

    def in_pieces(descriptor, buffers, offset):
        return preadv(descriptor, [memoryview(buffers[0])[:700]], offset)

    monkeypatch.setattr(os, "preadv", in_pieces)
    file = OpenFile(path)
    head, rest = np.empty(1000, np.uint8), np.empty(4000, np.uint8)
    file.read_all([[head, rest]], [2000], 5000)
    assert head.tobytes() + rest.tobytes() == content[2000:7000]
    assert file.sha256() == hashlib.sha256(content).hexdigest()
    with pytest.raises(ShortFile, match="the file has 10000 bytes"):
        file.read(9000, 1001)


def test_files_are_closed_with_their_objects(tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    before = len(os.listdir("/proc/self/fd"))
    files = [OpenFile(tmp_path / "file") for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    files.clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_shards_than_file_descriptors(tmp_path, at_once):
    """Open tars are closed where the limit is reached."""
    samples = random_samples(40, 2, 2)
    shards = TarShards(write_set(tmp_path, {"train": samples}, [1]), "train")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = sorted(set(range(soft)) - set(map(int, os.listdir("/proc/self/fd"))))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[10], hard))
    try:
        np.testing.assert_array_equal(shards.images(range(40)), samples.images)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --------------------------------------------------------------------------------------------------------- whole runs

LOW_LIMIT = """
import os, resource, sys
import numpy.ma  # NumPy imports it when it first needs it
from pipeline import train
from pipeline.data import read_files
from pipeline.training.trainer import Trainer
read_files.RETRY_PAUSES = (0.01, 0.01)
def fit(trainer, *arguments, fit=Trainer.fit):
    lowest_free = os.dup(0)
    os.close(lowest_free)
    limit = lowest_free + int(os.environ["FREE"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        return fit(trainer, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
Trainer.fit = fit
sys.exit(train.main())
"""


@pytest.mark.parametrize("free", [0, 2])
def test_a_run_without_file_descriptors_skips_no_sample(tmp_path, free):
    """With none at all it ends with an error. With fewer than there are shards it finishes."""
    recipe = write_tiny_recipe(tmp_path, write_tiny_set(tmp_path / "data"), train={"steps": 3})
    (tmp_path / "script.py").write_text(LOW_LIMIT)
    words = ["--config", str(recipe), "--run-dir", str(tmp_path / "run"), "data.on_error=skip", "samples.every=0"]
    words += ["validation.every=0", "checkpoint.every=0", "tracking.log_every=10"]
    variables = {"FREE": str(free), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = run_command(sys.executable, str(tmp_path / "script.py"), *words, timeout=TIMEOUT, **variables)
    assert not (tmp_path / "run" / "skipped_samples.jsonl").exists()
    fault = r"^error: .*train-00000\d\.\S+: Too many open files \(EMFILE\), 3 times in 0\.02 s; raise "
    if free:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode == 2
        assert re.search(fault, result.stderr, re.MULTILINE), result.stderr
        assert "Traceback" not in result.stderr
