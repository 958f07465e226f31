"""Checkpoints of torch.save, and files that only look like one, built byte by byte."""

import argparse
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def saved(content: object, **options) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def archive(*members: tuple[str, bytes], kind: int = STORED) -> bytes:
    """A zip archive of (name, content)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as made:
        for name, content in members:
            made.writestr(zipfile.ZipInfo(name), content, kind)
    return file.getvalue()


def with_pickle(content: bytes, **others: bytes) -> bytes:
    """An archive as torch.save writes it, around this pickle and a storage of 16 bytes."""
    names = {"byteorder": b"little", "version": b"3\n"} | others
    return archive(("x/data.pkl", content), ("x/data/0", bytes(16)), *((f"x/{name}", b) for name, b in names.items()))


class Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def dumped(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


def namespace(**options: object) -> bytes:
    return dumped({"state_dict": {}, "args": argparse.Namespace(**options)})


def tensor_pickle(size: int, stride: int = 1, count: int = 4) -> bytes:
    """{"w": a tensor of `size` elements} of storage 0, which is said to hold `count` numbers."""
    number = b"J%b"
    parts = [
        b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n",
        b"X\x01\0\0\x000X\x03\0\0\0cpu",
        number % struct.pack("<i", count) + b"tQK\0",
        number % struct.pack("<i", size) + b"\x85" + number % struct.pack("<i", stride) + b"\x85",
        b"\x89ccollections\nOrderedDict\n)RtRs.",
    ]
    return b"".join(parts)


def two_directories() -> bytes:
    """An archive whose zip64 locator points to another directory than the one in front of it."""
    content = saved({"w": torch.zeros(2)})
    locator = len(content) - 42
    return content[: locator + 8] + struct.pack("<Q", 0) + content[locator + 16 :]


def hostile(marker: Path) -> dict[str, tuple[bytes, str]]:
    """{what: (the file, what the message says)}. Where code ran, `marker` exists."""
    good = saved({"w": torch.full((2,), 1.5)})
    touch = Runs(os.system, f"touch {marker}")
    harmless, evil = dumped({}), dumped(touch)
    memo = b"\x80\x02}r\xff\xff\xff\xff" + b"X\x29\0\0\0" + b"a" * 41 + b"0."
    return {
        "runs a command": (with_pickle(dumped({"state_dict": touch})), "posix system"),
        "runs a command in the options": (with_pickle(namespace(dataset="mnist", seed=[touch])), "posix system"),
        "runs a command in a dictionary": (with_pickle(dumped(OrderedDict(a=Runs(eval, "1")))), "eval"),
        "allocates by a function that torch allows": (with_pickle(dumped(Runs(bytearray, 2**33))), "bytearray"),
        "global by another opcode": (with_pickle(pickle.dumps(touch, protocol=4)), "STACK_GLOBAL"),
        "before torch 1.6": (saved({"w": 1}, _use_new_zipfile_serialization=False), "since torch 1.6"),
        "a pickle": (evil, "since torch 1.6"),
        "a pickle of 67 bytes": (memo, "since torch 1.6"),
        "empty": (b"", "since torch 1.6"),
        "a text": (b"import os\n", "since torch 1.6"),
        "compressed": (archive(("x/data.pkl", harmless), ("x/data/0", bytes(2**27)), kind=DEFLATED), "compressed"),
        "a pickle that is too long": (with_pickle(b"\x80\x02" + b"}" * (2**23 + 1)), "at most 8388608"),
        "another zip": (archive(("a.txt", b"abc")), "not one data.pkl"),
        "two pickles": (archive(("x/data.pkl", harmless), ("y/data.pkl", evil)), "not one data.pkl"),
        "two pickles by case": (archive(("x/data.pkl", harmless), ("X/DATA.PKL", evil)), "not one data.pkl"),
        "odd names": (archive(("x/data.pkl", harmless), ("x/d\xe4ta/0", b"")), "odd characters"),
        "two directories": (two_directories(), "two directories"),
        "something in front": (good[:512] + good, "two directories"),
        "something in front of an archive": (b"PK\3\4" + with_pickle(harmless), "impossible size"),
        "something behind": (good + bytes(30), "truncated"),
        "truncated": (good[:-100], "truncated"),
        "changed": (good.replace(b"\0\0\xc0\x3f", b"\1\0\xc0\x3f", 1), "checksum"),
        "more elements than bytes": (with_pickle(tensor_pickle(2**30)), "resize"),
        "more of both": (with_pickle(tensor_pickle(2**30, count=2**30)), "resize"),
        "negative count": (with_pickle(tensor_pickle(4, count=-4)), "not a checkpoint that can be read"),
        "no pickle": (with_pickle(b"\x80\x02}"), "not a checkpoint that can be read: pickle exhausted"),
        "not a storage": (with_pickle(b"\x80\x02K\1Q."), "not a checkpoint that can be read"),
    }
