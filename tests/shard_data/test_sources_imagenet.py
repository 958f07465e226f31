"""imagenet32, imagenet64: every pixel and label of the published layout; faults are named; memory is bounded."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import webdataset

from shard_data import DataError, ImageNet32, ImageNet64, convert
from shard_data.__main__ import main
from shard_data.source import Record
from shard_data.verify import verify

COUNT = 6
TRAIN = [f"train_data_batch_{i}.npz" for i in range(1, 11)]
NAMES = [*TRAIN, "val_data.npz"]


def content(name: str, size: int = 32) -> dict[str, np.ndarray]:
    rng, columns = np.random.default_rng(sum(name.encode())), 3 * size * size
    made = {"data": rng.integers(0, 256, (COUNT, columns), dtype=np.uint8), "labels": rng.integers(1, 1001, COUNT)}
    return made if name == "val_data.npz" else made | {"mean": rng.random(columns)}


def write(root: Path, names=NAMES, save=np.savez, size: int = 32, **changes: dict[str, np.ndarray | None]) -> Path:
    """The files; `changes` by name of a file without .npz: arrays to replace, None to remove."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        arrays = content(name, size) | changes.get(name.removesuffix(".npz"), {})
        save(root / name, **{key: array for key, array in arrays.items() if array is not None})
    return root


@pytest.mark.parametrize(
    ("save", "source", "folders"),
    [
        (np.savez, ImageNet32, ["Imagenet32_train_npz"]),
        (np.savez_compressed, ImageNet32, ["Imagenet32_train_npz"]),
        (np.savez, ImageNet64, ["Imagenet64_train_part1_npz", "Imagenet64_train_part2_npz"]),
    ],
)
def test_every_pixel_and_label(tmp_path, save, source, folders):
    root, size = tmp_path / "in", source.size
    for part, folder in enumerate(folders):  # as the published archives unpack
        write(root / folder, TRAIN[part :: len(folders)], save, size)
    write(root, ["val_data.npz"], save, size)
    manifest = convert(source(root), tmp_path / "out", shard_size=7, workers=2)
    assert verify(tmp_path / "out", decode=True) == []
    assert manifest["classes"] == [str(label) for label in range(1, 1001)]
    assert {split: of["count"] for split, of in manifest["splits"].items()} == {"train": 60, "val": 6}
    for split, names in (("train", TRAIN), ("val", ["val_data.npz"])):
        tars = [str(path) for path in sorted((tmp_path / "out").glob(f"{split}-*.tar"))]
        found = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
        rows = [row for name in names for row in content(name, size)["data"]]
        labels = [label for name in names for label in content(name, size)["labels"]]
        for sample, row, label in zip(found, rows, labels, strict=True):
            red, green, blue = (row[channel * size**2 :] for channel in range(3))
            pixels = [
                [(red[size * y + x], green[size * y + x], blue[size * y + x]) for x in range(size)] for y in range(size)
            ]
            assert np.array_equal(sample["npy"], np.array(pixels))
            assert manifest["classes"][sample["cls"]] == str(label)


def test_the_command_chooses_the_size(tmp_path, capsys):
    """A file of the other size is refused."""
    source = str(write(tmp_path / "in", size=64))
    for name, code in (("imagenet64", 0), ("imagenet32", 2)):
        assert main([name, "--source", source, "--out", str(tmp_path / name), "--workers", "1"]) == code
    assert "data is uint8 (6, 12288) instead of uint8 (N, 3072)" in capsys.readouterr().err


def test_missing_files_stop_with_a_list_and_partial_lists_them(tmp_path, capsys):
    source = write(tmp_path / "in", [name for name in NAMES if name not in (TRAIN[1], TRAIN[9], "val_data.npz")])
    words = ["imagenet32", "--source", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "train: 2 files, no such file: train_data_batch_2.npz, train_data_batch_10.npz" in error
    assert "val: 1 file, no such file: val_data.npz" in error
    assert main([*words, "--partial"]) == 0
    omitted = convert(ImageNet32(source), tmp_path / "api", partial=True)["omitted"]
    assert [(one["split"], one["count"]) for one in omitted] == [("train", 2), ("val", 1)]


@pytest.mark.parametrize(
    ("folder", "problem"), [("nowhere", "no such folder"), (".", "does not hold train_data_batch")]
)
def test_a_folder_without_the_files_is_named(tmp_path, folder, problem):
    with pytest.raises(DataError, match=f"{problem}.*Imagenet32_train_npz.zip"):
        ImageNet32(tmp_path / folder)


BAD = {
    "another size": ({"data": np.zeros((6, 192), np.uint8)}, r"data is uint8 \(6, 192\) instead of uint8 \(N, 3072\)"),
    "floats": ({"data": np.zeros((6, 3072))}, r"data is float64"),
    "no images": ({"data": None}, "holds no array 'data'"),
    "no labels": ({"labels": None}, "holds no array 'labels'"),
    "fewer labels": ({"labels": np.ones(5, np.int64)}, r"labels are int64 \(5,\) instead of integers \(6,\)"),
    "labels from 0": ({"labels": np.arange(6)}, "labels run from 0 to 5 instead of 1 to 1000"),
    "labels to 1001": ({"labels": np.full(6, 1001)}, "labels run from 1001"),
    "labels as text": ({"labels": np.array(["1"] * 6)}, "labels are <U1"),
    "a pickle": ({"labels": np.array([{}] * 6, object)}, "'labels' holds Python objects, which are not read"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_file_is_named_and_leaves_nothing(tmp_path, what, capsys):
    changes, message = BAD[what]
    source = write(tmp_path / "in", train_data_batch_3=changes)
    with pytest.raises(DataError, match=f"train_data_batch_3.npz: .*{message}"):
        convert(ImageNet32(source), tmp_path / "out", partial=True)
    assert main(["imagenet32", "--source", str(source), "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-300], "damaged"),
        (lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "damaged"),
        (lambda data: b"<html><title>Log in</title>", "a web page titled 'Log in'"),
        (lambda data: b"", "an empty file"),
    ],
    ids=["cut", "one bit", "web page", "empty"],
)
def test_a_file_with_other_bytes_is_named(tmp_path, save, spoil, message):
    path = write(tmp_path / "in", save=save) / "val_data.npz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=f"val_data.npz: .*{message}.*; unzip it again"):
        convert(ImageNet32(tmp_path / "in"), tmp_path / "out", partial=True)


@pytest.mark.parametrize(("save", "files_in_memory"), [(np.savez, 0), (np.savez_compressed, 1)])
def test_memory_holds_one_compressed_file_at_most(tmp_path, save, files_in_memory):
    """Eleven files of 18 MB: stored ones are mapped."""
    count = 6000
    save(tmp_path / NAMES[0], data=np.zeros((count, 3072), np.uint8), labels=np.full(count, 7))
    for name in NAMES[1:]:
        (tmp_path / name).hardlink_to(tmp_path / NAMES[0])
    source = ImageNet32(tmp_path)
    tracemalloc.start()
    source.description()
    for name in NAMES:
        assert source.load(Record("key", (name, 5))).label == 6
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3072 * count * files_in_memory + 10_000_000


def test_compressed_files_are_not_shuffled(tmp_path, capsys):
    for save, code in ((np.savez, 0), (np.savez_compressed, 2)):
        source = str(write(tmp_path / save.__name__, save=save))
        words = ["imagenet32", "--source", source, "--out", f"{source}-out", "--workers", "1"]
        assert main([*words, "--shuffle", "0"]) == code
    assert (
        "train_data_batch_1.npz: is compressed, so its images are read in order; omit --shuffle"
        in capsys.readouterr().err
    )
    assert main(words) == 0
