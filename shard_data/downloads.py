"""Published data sets: addresses, md5 and fetching. A failed download says what arrived instead."""

import argparse
import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shard_data.errors import DataError
from shard_data.fetch import Expected, FetchFailed
from shard_data.fetch import fetch as fetch_file
from shard_data.files import replacing
from shard_data.terminal import BYTES, Progress

FETCH_AGAIN = "replace it with an intact copy (--download fetches one)"


def not_found(folder: Path, files: str) -> DataError:
    """The error for a folder without the files of a published data set."""
    problem = f"does not hold {files}" if folder.is_dir() else "no such folder"
    return DataError(f"{folder}: {problem}; check --source, or add --download to fetch the files into it")


class Download(NamedTuple):
    """A file of a data set: its name, md5 and the addresses where it is published, best first."""

    name: str
    md5: str
    addresses: tuple[str, ...]
    limit: int = 2**31
    """Bytes that are accepted at most; the largest file, CelebA's images, has 1.4 GB."""


def _at(*folders: str, **md5: str) -> tuple[Download, ...]:
    return tuple(Download(name, digest, tuple(folder + name for folder in folders)) for name, digest in md5.items())


def _idx(folders: Sequence[str], digests: Sequence[str]) -> tuple[Download, ...]:
    names = [
        f"{part}-ubyte.gz"
        for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    ]
    return _at(*folders, **dict(zip(names, digests, strict=True)))


def _drive(name: str, md5: str, number: str) -> Download:
    address = f"https://drive.usercontent.google.com/download?id={number}&export=download&confirm=t"
    return Download(name, md5, (address,))


TORONTO = "https://www.cs.toronto.edu/~kriz/"
FILES: dict[str, tuple[Download, ...]] = {
    "celeba": (
        _drive("list_attr_celeba.txt", "75e246fa4810816ffd6ee81facbd244c", "0B7EVK8r0v71pblRyaVFSWGxPY0U"),
        _drive("list_eval_partition.txt", "d32c9cbf5e040fd4025c592c306e6668", "0B7EVK8r0v71pY0NSMzRuSXJEVkk"),
        _drive("identity_CelebA.txt", "32bd1bd63d3c78cd57e08160ec5ed1e2", "1_ee_0u7vcNLOfNLegJRHmolfH5ICW-XS"),
        _drive("img_align_celeba.zip", "00d2c5bc6d35e252742224ab0c1e8fcb", "0B7EVK8r0v71pZjFTYXZWM3FlRnM"),
    ),
    "cifar10": _at(TORONTO, **{"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}),
    "cifar100": _at(TORONTO, **{"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"}),
    "mnist": _idx(
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion_mnist": _idx(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "kmnist": _idx(
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        (
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
    ),
}


def add_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """--source, --download and --mirror of a data set that is published."""
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help=source)
    download = "first fetch the files that are not in --source yet, and check their md5"
    parser.add_argument("--download", action="store_true", help=download)
    mirror = "with --download: fetch every file NAME from ADDRESS/NAME, not from where it is published"
    parser.add_argument("--mirror", metavar="ADDRESS", help=mirror)


def from_arguments(dataset: str, arguments: argparse.Namespace) -> Path:
    """The folder of the originals. With --download, missing files are fetched into it first."""
    if arguments.download:
        try:
            fetch(dataset, arguments.source, arguments.mirror, progress=True)
        except OSError as error:
            place, reason = error.filename or arguments.source, error.strerror or error
            raise DataError(f"{place}: cannot be written ({reason}); fix that and run the same command again") from None
    elif arguments.mirror:
        raise DataError("--mirror is only used with --download; add --download to fetch")
    return arguments.source


def fetch(dataset: str, folder: Path, mirror: str | None = None, progress: bool = False) -> None:
    """Fetch the published files of a data set that are not in `folder` yet. Raises DataError that says what arrived."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES[dataset]:
        if mirror:
            file = file._replace(addresses=(f"{mirror.rstrip('/')}/{file.name}",))
        if not (folder / file.name).exists():
            _fetch(file, folder / file.name, progress)
        elif _md5(folder / file.name) != file.md5:
            raise DataError(
                f"{folder / file.name}: is not as published (its md5 is not {file.md5}); "
                "delete it to fetch it again, or omit --download to use it as it is"
            )


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _fetch(file: Download, path: Path, progress: bool) -> None:
    failures = []
    for address in file.addresses:
        failure = _try(address, file, path, progress)
        if failure is None:
            return
        failures.append(f"  {address}: {failure}")
    listing = "\n".join(failures)
    raise DataError(
        f"{path}: could not be fetched:\n{listing}\n"
        f"get the file another way (a browser, a colleague; md5 {file.md5}), place it as {shlex.quote(str(path))} "
        "and run the same command again, or name a mirror with --mirror"
    )


def _try(address: str, file: Download, path: Path, progress: bool) -> str | None:
    """Fetch one address. Returns the reason of a failure."""
    with Progress(file.name, None, BYTES, shown=progress) as bar:

        def show(count: int, total: int | None) -> None:
            bar.set_total(total)
            bar.update(count - bar.done)

        try:
            with replacing(path) as out:
                fetch_file(address, out, Expected(file.limit, algorithm="md5", digest=file.md5), show)
        except FetchFailed as error:
            return error.reason
    return None
