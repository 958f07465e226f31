"""Trackers for tests, and an independent reader of the files that wandb writes offline."""

import json
import struct

import numpy as np

from pipeline.tracking.tracker import Tracker, TrackingConfig

KEY = "local-0123456789abcdef0123456789abcdef01234567"[-40:]
CONFIG = {"optim": {"lr": 0.01}, "model": {"name": "nvae"}}


def tracker(folder, wandb="auto", start_step=0, attempt=1, **settings):
    config = TrackingConfig(wandb=wandb, wandb_timeout=settings.pop("wandb_timeout", 10.0), **settings)
    return Tracker(config, folder, CONFIG, is_main=True, start_step=start_step, attempt=attempt)


def picture(value):
    return np.full((6, 8, 3), value, np.uint8)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_chunks(content):
    """The records of a LevelDB log (blocks of 32 KiB; a chunk is whole, first, middle or last) behind W&B's 7 bytes."""
    assert content[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def read_wandb(folder, closed=True):
    """All records of the offline W&B files of a run folder, in order."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    if closed:
        wandb.teardown()  # as when Python exits: the service closes its files
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [Record.FromString(chunk) for path in files for chunk in log_chunks(path.read_bytes())]


def history(records):
    """Per step, everything that was logged: {step: {key: value}}."""
    steps = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {}
            for item in record.history.item:
                key, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                items.setdefault(key, {}).update({inner[0]: value}) if inner else items.update({key: value})
            steps.setdefault(items["step"], {}).update(items)
    return steps
