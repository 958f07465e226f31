"""cifar10 and cifar100: packed or unpacked, equal to an independent parse; what is missing or damaged is named."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from shard_data import Cifar10, Cifar100, DataError, convert
from shard_data.__main__ import main
from shard_data.errors import Incomplete
from shard_data.verify import verify

COUNT = 6
NAMES10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAMES100 = [f"class_{i:02d}" for i in range(100)]
BATCHES10 = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
BATCHES100 = {"train": ["train"], "test": ["test"]}
KINDS = {
    "cifar10": (Cifar10, "cifar-10-batches-py", "cifar-10-python.tar.gz", BATCHES10, "labels", 10),
    "cifar100": (Cifar100, "cifar-100-python", "cifar-100-python.tar.gz", BATCHES100, "fine_labels", 100),
}


def content(kind: str, batch: str) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(sum(batch.encode()))
    return rng.integers(0, 256, (COUNT, 3072), dtype=np.uint8), rng.integers(0, KINDS[kind][5], COUNT).tolist()


def files(kind: str, protocol: int = 2) -> dict[str, bytes]:
    batches, key = KINDS[kind][3], KINDS[kind][4]
    made = {}
    for batch in (name for split in batches.values() for name in split):
        images, labels = content(kind, batch)
        coarse = {} if kind == "cifar10" else {"coarse_labels": [0] * COUNT}
        about = {"batch_label": batch, "filenames": ["x.png"] * COUNT}
        made[batch] = pickle.dumps({"data": images, key: labels, **coarse, **about}, protocol)
    meta = {"label_names": NAMES10} if kind == "cifar10" else {"fine_label_names": NAMES100, "coarse_label_names": []}
    return made | {"batches.meta" if kind == "cifar10" else "meta": pickle.dumps(meta, protocol)}


def write(folder: Path, made: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return folder


def pack(path: Path, folder: str, made: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for info in extra:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        for name, data in made.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def laid_out(root: Path, kind: str, layout: str, made: dict[str, bytes]) -> Path:
    """The source folder (or file) that a user would name."""
    _, folder, archive, *_ = KINDS[kind]
    if layout in ("batches", "parent"):
        write(root / folder, made)
        return root / folder if layout == "batches" else root
    path = pack(root / archive, folder, made)
    return root if layout == "archive" else path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["batches", "parent", "archive", "archive itself"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_pixel_and_label(tmp_path, kind, layout, protocol):
    source = laid_out(tmp_path / "in", kind, layout, files(kind, protocol))
    manifest = convert(KINDS[kind][0](source), tmp_path / "out", shard_size=4)
    assert verify(tmp_path / "out", decode=True) == []
    assert manifest["classes"] == (NAMES10 if kind == "cifar10" else NAMES100)
    for split, batches in KINDS[kind][3].items():
        tars = [str(path) for path in sorted((tmp_path / "out").glob(f"{split}-*.tar"))]
        found = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
        images = np.concatenate([content(kind, batch)[0] for batch in batches])
        labels = [label for batch in batches for label in content(kind, batch)[1]]
        planes = np.stack([sample["npy"] for sample in found]).transpose(0, 3, 1, 2)
        assert np.array_equal(planes.reshape(-1, 3072), images)
        assert [sample["cls"] for sample in found] == labels


def test_workers_and_packing_do_not_show(tmp_path):
    prints = set()
    for layout in ("batches", "archive"):
        source = laid_out(tmp_path / layout, "cifar10", layout, files("cifar10"))
        for workers in (1, 2):
            out = tmp_path / f"{layout}{workers}"
            prints.add(convert(Cifar10(source), out, shard_size=7, workers=workers)["fingerprint"])
    assert len(prints) == 1


@pytest.mark.parametrize("layout", ["batches", "archive"])
def test_missing_batches_stop_with_a_list_and_partial_lists_them(tmp_path, layout, capsys):
    made = {name: data for name, data in files("cifar10").items() if name not in ("data_batch_2", "data_batch_5")}
    source = laid_out(tmp_path / "in", "cifar10", layout, made)
    words = ["cifar10", "--source", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(words) == 2
    assert "train: 2 files, no such file: data_batch_2, data_batch_5" in capsys.readouterr().err
    assert main([*words, "--partial"]) == 0
    assert convert(Cifar10(source), tmp_path / "api", partial=True)["omitted"] == [
        {"split": "train", "reason": "no such file", "count": 2, "names": ["data_batch_2", "data_batch_5"]}
    ]


def repickled(**changes):
    return lambda data: pickle.dumps({**pickle.loads(data), **changes}, 2)  # noqa: S301  our own


BAD = {
    "truncated": (lambda data: data[:-200], "truncated"),
    "empty": (lambda data: b"", "truncated.*it is an empty file"),
    "web page": (lambda data: b"<!DOCTYPE html><title>404</title>", "web page titled '404'"),
    "no data": (repickled(data=None), "no images"),
    "other size": (repickled(data=np.zeros((COUNT, 784), np.uint8)), "rows of 3072 bytes"),
    "fewer labels": (repickled(labels=[0] * 5), "5 labels for 6 images"),
    "label 10": (repickled(labels=[10] * 6), "no labels from 0 to 9"),
    "label -1": (repickled(labels=[-1] * 6), "no labels from 0 to 9"),
    "label text": (repickled(labels=["cat"] * 6), "no labels from 0 to 9"),
    "a list": (lambda data: pickle.dumps([1, 2], 2), "no dictionary"),
    "hostile": (lambda data: b"cos\nsystem\n(U\x04truetR.", "call of os.system|operation"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("layout", ["batches", "archive"])
def test_damaged_batches_are_named_and_leave_nothing(tmp_path, case, layout, capsys):
    made = files("cifar10")
    spoil, message = BAD[case]
    made["data_batch_3"] = spoil(made["data_batch_3"])
    source = laid_out(tmp_path / "in", "cifar10", layout, made)
    with pytest.raises(DataError, match=f"data_batch_3.*({message})"):
        convert(Cifar10(source), tmp_path / "out", partial=True)
    assert main(["cifar10", "--source", str(source), "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoil", [lambda data: data[:-300], lambda data: b"<html>quota", lambda data: b""])
def test_damaged_archives_are_named(tmp_path, spoil):
    path = pack(tmp_path / "in" / "cifar-10-python.tar.gz", "cifar-10-batches-py", files("cifar10"))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: (truncated|damaged)"):
        convert(Cifar10(tmp_path / "in"), tmp_path / "out")


def test_neither_folder_nor_archive(tmp_path):
    with pytest.raises(DataError, match="does not hold cifar-100-python/meta or cifar-100-python.tar.gz.*--download"):
        Cifar100(tmp_path)


def test_hostile_archives_write_nothing_and_their_members_are_not_taken(tmp_path):
    """Links, devices, names that lead outside, and a member that only looks like a batch."""
    link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("cifar-10-batches-py/data_batch_2")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../outside"
    device = tarfile.TarInfo("cifar-10-batches-py/data_batch_3")
    device.type = tarfile.CHRTYPE
    outside, absolute = tarfile.TarInfo("../../outside"), tarfile.TarInfo(str(tmp_path / "absolute"))
    outside.size = absolute.size = 4
    made = {
        name: data
        for name, data in files("cifar10").items()
        if name not in ("data_batch_1", "data_batch_2", "data_batch_3")
    }
    extra = (link, hard, device, outside, absolute)
    pack(tmp_path / "a" / "b" / "in" / "cifar-10-python.tar.gz", "cifar-10-batches-py", made, extra)
    with pytest.raises(Incomplete, match="data_batch_1, data_batch_2, data_batch_3"):
        convert(Cifar10(tmp_path / "a" / "b" / "in"), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "in", "cifar-10-python.tar.gz"]


@pytest.fixture
def real() -> Path:
    if "REAL_DATA_DIR" not in os.environ:
        pytest.skip("REAL_DATA_DIR is not set: the original CIFAR-10 batches are needed")
    return Path(os.environ["REAL_DATA_DIR"])


def test_every_pixel_and_label_of_the_real_batches(real, tmp_path):
    source = Cifar10(real / "cifar-10-batches-py")
    convert(source, tmp_path / "out", partial=True, workers=2)
    for split, batch in (("train", "data_batch_1"), ("test", "test_batch")):
        theirs = pickle.loads((real / "cifar-10-batches-py" / batch).read_bytes(), encoding="bytes")  # noqa: S301
        tars = b"".join(path.read_bytes()[:-1024] for path in sorted((tmp_path / "out").glob(f"{split}-*.tar")))
        ours = np.frombuffer(tars, np.uint8).reshape(10_000, 512 + 3584 + 1024)  # image (128 + 3072 + 384), label
        pixels = ours[:, 640 : 640 + 3072].reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).reshape(-1, 3072)
        assert np.array_equal(pixels, theirs[b"data"])
        assert (ours[:, 4608] - ord("0")).tolist() == theirs[b"labels"]


@pytest.mark.parametrize("name", ["data_batch_1.truncated", "cifar-10-python.truncated.tar.gz"])
def test_real_damaged_downloads_are_refused(real, tmp_path, name):
    data = (real / "hostile" / "bad_downloads" / name).read_bytes()
    if name.endswith("gz"):
        write(tmp_path / "in", {"cifar-10-python.tar.gz": data})
    else:
        write(tmp_path / "in", files("cifar10") | {"data_batch_1": data})
    with pytest.raises(DataError, match="truncated"):
        convert(Cifar10(tmp_path / "in"), tmp_path / "out", partial=True)
