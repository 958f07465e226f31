"""The work of `report.py`: reads the runs, with a progress bar where that takes long, and writes the page."""

import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from pipeline.reporting.build_page import Options, build_page
from pipeline.reporting.run_folder import RunReader
from pipeline.storage.atomic import atomic_file

log = logging.getLogger("pipeline")

BAR_DELAY = 1.0
"""Seconds of reading before a bar is shown."""


def write_report(folders: Sequence[Path], out: Path, contact_sheet: bool = False) -> None:
    """Writes the page, completely or not at all. Raises ValueError for folders that are no run's, and for a file that
    cannot be written.
    """
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file, for instance {out / 'report.html'}")
    readers = [RunReader(folder) for folder in folders]
    size = sum(path.stat().st_size for folder in folders if (path := folder / "metrics.jsonl").is_file())
    with tqdm(total=size, unit="B", unit_scale=True, delay=BAR_DELAY, desc="metrics", leave=False, disable=None) as bar:
        runs = [reader.read(bar.update) for reader in readers]
    content = build_page(runs, Options(contact_sheet=contact_sheet)).encode("utf-8", "replace")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        file.write(content)
    log.info("%s: %.2f MB, opens in any browser", out, len(content) / 1e6)
