"""Where the data of a run come from, as their manifest says, and a sheet of their first pictures."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.reporting.pictures import data_address, to_webp
from pipeline.reporting.run_folder import Run, count, first_line
from pipeline.reporting.text import number, setting
from shard_data import manifest as manifests
from shard_data.errors import DataError
from shard_data.info import contact_sheet

NO_REAL_FACES = ("toy_faces", "mnist", "fashion_mnist", "kmnist", "cifar10")
"""Sets whose pictures are shown without the option --contact-sheet."""
MAX_TEXT = 300


@dataclass
class DataSet:
    """What a report shows of a shard set."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    sheet: str = ""
    """The address of the contact sheet; empty where it is not shown."""
    sheet_size: tuple[int, int] = (0, 0)
    fingerprint: str = ""
    notes: list[str] = field(default_factory=list)


def describe_data(run: Run, show_pictures: bool, max_bytes: int) -> DataSet:
    """The set that `data.root` names, if it is on this machine. `show_pictures`: also those of real faces."""
    data, root = DataSet(), run.settings.get("data.root")
    trained_on = run.facts.get("data_fingerprint")
    if isinstance(trained_on, str):
        data.rows.append(("fingerprint, of the newest checkpoint", trained_on[:MAX_TEXT]))
    if not isinstance(root, str):
        return data
    data.rows.insert(0, ("place", root[:MAX_TEXT]))
    if isinstance(source := run.settings.get("data.source"), str):
        data.rows.insert(1, ("made with", f"python -m shard_data {source}"[:MAX_TEXT]))
    if "://" in root:
        data.notes.append("The data are at an address; a report does not fetch them, so they are not described.")
        return data
    try:
        manifest = manifests.load(Path(root))
    except (DataError, OSError) as error:
        data.notes.append(f"The data set is not described: {first_line(str(error))}.")
        return data
    data.rows += describe_manifest(manifest)
    data.fingerprint = manifest["fingerprint"]
    if isinstance(trained_on, str) and manifest["fingerprint"] != trained_on:
        data.notes.append("The set that is there now is another one: its fingerprint is not that of the checkpoint.")
    if show_pictures or manifest["name"] in NO_REAL_FACES:
        add_sheet(data, Path(root), max_bytes)
    else:
        data.notes.append("The pictures of this set may show people; --contact-sheet shows the first ones.")
    return data


def describe_manifest(manifest: manifests.Manifest) -> list[tuple[str, str]]:
    """The facts of a manifest."""
    image, splits = manifest["image"], manifest["splits"]
    rows = [
        ("set", manifest["name"]),
        (
            "images",
            f"{image['height']} \N{MULTIPLICATION SIGN} {image['width']}, {count(image['channels'], 'channel')}",
        ),
        ("splits", ", ".join(f"{name} {number(split['count'])}" for name, split in splits.items())),
        ("fingerprint", manifest["fingerprint"]),
    ]
    if manifest["transform"]:
        rows.append(("changed before training", setting(manifest["transform"])[:MAX_TEXT]))
    if manifest["classes"]:
        rows.append(("classes", ", ".join(manifest["classes"])[:MAX_TEXT]))
    if manifest["attributes"]:
        rows.append(("attributes", ", ".join(manifest["attributes"])[:MAX_TEXT]))
    if isinstance(files := (manifest.get("source") or {}).get("files"), dict):
        rows.append(("source files", ", ".join(map(str, files))[:MAX_TEXT]))
    omitted = [f"{one['split']}: {number(one['count'])}, {one['reason']}" for one in manifest.get("omitted", [])[:5]]
    return rows + [("omitted", text[:MAX_TEXT]) for text in omitted]


def add_sheet(data: DataSet, root: Path, max_bytes: int) -> None:
    """The contact sheet, made smaller until it fits."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sheet.png"
            contact_sheet(root, path, columns=8, rows=2)
            content = path.read_bytes()
        for side in (1024, 512, 256):
            picture, data.sheet_size = to_webp(content, side)
            if len(picture) <= max_bytes:
                data.sheet = data_address(picture)
                return
    except (DataError, OSError, ValueError, KeyError) as error:
        data.notes.append(f"The contact sheet could not be made: {first_line(str(error))}.")
