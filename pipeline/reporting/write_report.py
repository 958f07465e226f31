"""The work of `report.py`: reads the runs, shows how far it is where that takes long, and writes the page."""

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.reporting.build_page import Options, build_page
from pipeline.reporting.run_folder import RunReader
from pipeline.storage.atomic import atomic_file
from shard_data.terminal import BYTES, Progress

log = logging.getLogger("pipeline")


def write_report(folders: Sequence[Path], out: Path, contact_sheet: bool = False) -> None:
    """Writes the page, completely or not at all. Raises ValueError for folders that are no run's, and for a file that
    cannot be written.
    """
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file, for instance {out / 'report.html'}")
    readers = [RunReader(folder) for folder in folders]
    size = sum(path.stat().st_size for folder in folders if (path := folder / "metrics.jsonl").is_file())
    with Progress("metrics", size, BYTES, write=log.info) as progress:
        runs = [reader.read(progress.update) for reader in readers]
    content = build_page(runs, Options(contact_sheet=contact_sheet)).encode("utf-8", "replace")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        file.write(content)
    log.info("%s: %.2f MB, opens in any browser", out, len(content) / 1e6)
