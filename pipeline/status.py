"""Prints the state of a run as one word, for scripts: `python -m pipeline.status RUN`."""

import sys
from pathlib import Path

from pipeline.storage.status import read_status

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline.status RUN")
    print(read_status(Path(sys.argv[1])).state)
