"""Small checkpoints, their comparison, altered and forged ones, and processes that may be killed."""

import hashlib
import json
import os

import torch

FACTS = {"epoch": 3, "config": {"optim": {"lr": 0.01}, "name": "größe"}, "samples_seen": 123456789012}


def small(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 2, 2, generator=generator)
    return {"model": {"weight": weight, "steps": torch.tensor(7)}, "ema": {"weight": weight * 2}}


def same_bits(a, b):
    def as_bytes(tensor):
        return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()

    return a.dtype == b.dtype and a.shape == b.shape and as_bytes(a) == as_bytes(b)


def assert_same(saved, loaded):
    assert saved.keys() == loaded.keys()
    for stem in saved:
        assert saved[stem].keys() == loaded[stem].keys()
        assert all(same_bits(saved[stem][name], loaded[stem][name]) for name in saved[stem])


def damage(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def in_child(work):
    """Exit status of a forked process that runs `work`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forge(folder, **changes):
    """Rewrite meta.json as an attacker would who knows its format: with a correct hash of itself."""
    content = json.loads((folder / "meta.json").read_text())
    del content["sha256"]
    content.update(changes)
    digest = hashlib.sha256((json.dumps(content, indent=1) + "\n").encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps({**content, "sha256": digest}, indent=1) + "\n")
