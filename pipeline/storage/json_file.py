"""JSON objects in small files."""

import json
from pathlib import Path
from typing import Any

from shard_data.files import read_bounded

MAX_BYTES = 2**20


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file; empty where the file is missing, too large, or holds anything else."""
    try:
        content = json.loads(read_bounded(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
