"""manifest.json: an edited one is refused, and a hostile one gives one line that says what to do, or a correct read."""

import contextlib
import copy
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.shards import TarShards
from shard_data import DataError, manifest
from shard_data.errors import Damaged
from tests.helpers.shard_sets import edit_manifest, fingerprint_of, random_samples, write_set

OLD_SET = Path(__file__).parents[1] / "old_runs" / "faces"
SHARD = ("splits", "train", "shards", 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), {"train": random_samples(9, attributes=2)}, [4])


@pytest.fixture(scope="module")
def content(whole) -> dict:
    return json.loads((whole / "manifest.json").read_text())


def parse(value: dict) -> manifest.Manifest:
    return manifest.parse(json.dumps(value | {"fingerprint": fingerprint_of(value)}).encode(), "here")


def put(value: dict, path: tuple, new: object) -> dict:
    """A copy with the value at this path replaced; an added key where the path's last part is new."""
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return value


def test_the_fingerprint_is_that_of_the_documented_format(content):
    assert manifest.fingerprint(content) == fingerprint_of(content)
    assert manifest.fingerprint(content | {"source": {"path": "elsewhere"}, "omitted": []}) == fingerprint_of(content)


def test_a_set_of_an_earlier_release_opens():
    assert manifest.load(OLD_SET)["fingerprint"].startswith("5094262e")
    assert len(TarShards(OLD_SET, "train", verify=True)) == 24


def drop_a_shard(value):
    dropped = value["splits"]["train"]["shards"].pop()
    value["splits"]["train"]["count"] -= dropped["count"]


EDITS = {
    "a shard dropped": drop_a_shard,
    "shards exchanged": lambda value: value["splits"]["train"]["shards"].reverse(),
    "a hash changed": lambda value: value["splits"]["train"]["shards"][0].update(sha256="0" * 64),
    "a class renamed": lambda value: value["classes"].__setitem__(0, "other"),
    "a key added": lambda value: value.update(later="more"),
    "another fingerprint": lambda value: value.update(fingerprint="0" * 64),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_manifest_edited_by_hand_is_refused_with_what_to_do(tmp_path, edit):
    root = write_set(tmp_path, {"train": random_samples(9, attributes=2)}, [4])
    edit_manifest(root, edit, sign=False)
    with pytest.raises(ValueError, match=r"manifest\.json: .*fingerprint.*edited.*make the shard set again") as caught:
        TarShards(root, "train")
    assert str(caught.value).isprintable()


HOSTILE = {
    "parent folder": ((*SHARD, "file"), "../x.tar", "file: .* match pattern"),
    "dots": ((*SHARD, "file"), "..", "file: .* match pattern"),
    "absolute path": ((*SHARD, "index"), "/x.index.npy", "index: .* match pattern"),
    "backslash": ((*SHARD, "file"), "a\\x.tar", "file: .* match pattern"),
    "line break": ((*SHARD, "file"), "x.tar\n", "file: .* match pattern"),
    "null": ((*SHARD, "file"), "x\0.tar", "file: .* match pattern"),
    "other kind of file": ((*SHARD, "file"), "sitecustomize.py", "file: .* match pattern"),
    "long name": ((*SHARD, "file"), "x" * 300 + ".tar", "file: .* match pattern"),
    "file twice": ((*SHARD, "file"), "train-000001.tar", r"names train-000001\.tar twice"),
    "index twice": ((*SHARD, "index"), "train-000001.index.npy", r"names train-000001\.index\.npy twice"),
    "not a hash": ((*SHARD, "sha256"), "../../x", "sha256: .* match pattern"),
    "negative size": ((*SHARD, "bytes"), -1, "bytes: .* greater than"),
    "too many samples": ((*SHARD, "count"), 2**30, "bytes are too few for 1073741824 samples"),
    "huge size": ((*SHARD, "bytes"), 2**80, "bytes: .* less than"),
    "float count": ((*SHARD, "count"), 4.0, "count: .* valid integer"),
    "true as count": ((*SHARD, "count"), True, "count: .* valid integer"),
    "text as count": (("splits", "train", "count"), "9", "count: .* valid integer"),
    "wrong total": (("splits", "train", "count"), 8, "the shards hold 9 samples, but count says 8"),
    "no split": (("splits",), {}, "splits: .* at least 1"),
    "split name": (("splits", "../x"), {"count": 1, "shards": []}, r"splits\.\.\./x.*match pattern"),
    "terminal codes in a split": (("splits", "\x1b[2J"), {"count": 1, "shards": []}, r"splits\.\[2J.*match pattern"),
    "terminal codes in a class": (("classes",), ["\x1b[2J"], r"classes\.0: .* match pattern"),
    "name of another folder": (("name",), "../../etc", "name: .* match pattern"),
    "terminal codes in the name": (("name",), "\x1b[2J", "name: .* match pattern"),
    "huge image": (("image", "height"), 2**20, "height: .* less than"),
    "list for an object": (("image",), [8, 8, 3], "image: "),
    "lone surrogate": (("transform", "x"), "\ud800", "surrogates not allowed"),
    "omissions": (("omitted",), [{"split": "train"}], "omitted.0.reason: Field required"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_manifests_are_refused_in_one_line(content, what):
    path, value, message = HOSTILE[what]
    hostile = put(content, path, value)
    text = json.dumps(hostile | {"fingerprint": "0" * 64}).encode()
    with pytest.raises(Damaged, match=message) as caught:
        manifest.parse(text, "here")
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith("here: ")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"<html>", b"NaN", b'"x"', b"[]", b"\x00"],
    ids=lambda text: repr(text[:6]),
)
def test_what_is_not_a_manifest_is_refused_in_one_line(text):
    with pytest.raises(DataError) as caught:
        manifest.parse(text, "here")
    assert str(caught.value).isprintable()


def test_numbers_that_json_does_not_have_are_refused(content):
    text = json.dumps(put(content, ("transform", "x"), float("nan")))
    for number in ("NaN", "Infinity", "1e999"):
        with pytest.raises(Damaged, match="Out of range float"):
            manifest.parse(text.replace("NaN", number).encode(), "here")


@pytest.mark.parametrize("kind", ["device", "pipe", "loop", "folder", "sparse"])
def test_what_is_no_file_is_refused_without_reading_it(tmp_path, kind):
    path = tmp_path / "manifest.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 2**40)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read \(.*\); look at the disk that holds it"):
        manifest.load(tmp_path)


def test_a_manifest_behind_a_symbolic_link_is_read(whole, tmp_path):
    """Data stores keep files under their hashes and link to them."""
    (tmp_path / "manifest.json").symlink_to(whole / "manifest.json")
    assert manifest.load(tmp_path) == manifest.load(whole)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def read(text: bytes) -> manifest.Manifest | None:
    """The manifest; None where it was refused in one printable line."""
    try:
        return manifest.parse(text, "here")
    except DataError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 1000
    return None


@given(data=st.data())
@settings(max_examples=200)
def test_any_value_in_any_place_is_refused_or_read_as_it_stands(content, data):
    path = data.draw(st.sampled_from([place for place in places(content) if place]))
    hostile = put(content, path, data.draw(JSON))
    with contextlib.suppress(ValueError):  # numbers and texts that have no JSON
        hostile["fingerprint"] = fingerprint_of(hostile)
    found = read(json.dumps(hostile).encode())
    if found is not None:
        assert found == hostile
        check_promises(found)


def check_promises(found: dict) -> None:
    """What the readers of a manifest rely on, stated on its own."""
    shards = [shard for split in found["splits"].values() for shard in split["shards"]]
    names = [shard[kind] for shard in shards for kind in ("file", "index")]
    assert len(set(names)) == len(names)
    assert all(Path(name).name == name and name not in (".", "..") and name.isprintable() for name in names)
    assert all(0 < shard["count"] <= shard["bytes"] // 1024 for shard in shards)
    assert all(split["count"] == sum(s["count"] for s in split["shards"]) > 0 for split in found["splits"].values())
    assert found["name"].isprintable()
    assert not {"/", "\\"} & set(found["name"])
    assert found["fingerprint"] == fingerprint_of(found)


@given(data=st.data())
@settings(max_examples=200)
def test_any_changed_byte_is_refused_or_changes_nothing(content, data):
    text = bytearray(json.dumps(content).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    del text[data.draw(st.integers(0, len(text))) if data.draw(st.booleans()) else len(text) :]
    found = read(bytes(text))
    ignored = {"source", "omitted"}
    if found is not None:
        assert {k: v for k, v in found.items() if k not in ignored} == {
            k: v for k, v in content.items() if k not in ignored
        }


@given(text=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=200)
def test_any_bytes_are_refused_in_one_line(text):
    assert read(text) is None
