"""Compares the programs of this folder with the model that they were made of. Needs torch only.

    python check.py

It runs encoder.pt2, decoder.pt2 and sampler.pt2 on the inputs in examples.bin, and compares the results with the
outputs there. Only run it on folders that you trust: torch.export.load reads pickled objects. Exit code 1: an output
differs.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent


def main():
    """Prints the largest error of each program."""
    description = json.loads((FOLDER / "programs.json").read_text())
    data, dtype = (FOLDER / "examples.bin").read_bytes(), getattr(torch, description["dtype"])
    for program in description["programs"].values():
        if hashlib.sha256((FOLDER / program["file"]).read_bytes()).hexdigest() != program["sha256"]:
            print(f"{program['file']}: its sha256 is not that of programs.json; it was not loaded")
            return 1
    failed = False
    for name, program in description["programs"].items():
        run = torch.export.load(FOLDER / program["file"]).module()
        errors = [error_of(run, read(example, data, dtype)) for example in description["examples"][name]]
        error = max(errors, key=lambda value: math.inf if math.isnan(value) else value)
        failed |= not error <= description["tolerance"]
        print(
            f"{program['file']}: largest error {error:.1e} of the largest value, at most {description['tolerance']:g}"
        )
    return int(failed)


def read(entry, data, dtype):
    """An entry of programs.json with its tensors."""
    if isinstance(entry, list):
        return [read(part, data, dtype) for part in entry]
    if "offset" not in entry:
        return {name: read(part, data, dtype) for name, part in entry.items()}
    count = math.prod(entry["shape"])
    values = torch.frombuffer(bytearray(data), dtype=dtype, count=count, offset=entry["offset"])
    return values.reshape(entry["shape"]).clone()


def error_of(run, example):
    """The largest error of a program's outputs, as a share of each one's largest value."""
    with torch.no_grad():
        found = run(*example["inputs"])
    found, expected = (value if isinstance(value, (list, tuple)) else [value] for value in (found, example["output"]))
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
