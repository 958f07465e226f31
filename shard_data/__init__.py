"""Converts data sets to WebDataset tar shards with an index and a manifest. Imports neither torch nor pipeline.

`convert(ToyFaces(size=32), "data/toy_faces32", workers=2)` does what `python -m shard_data toy_faces` does.
"""

import importlib

_MODULES = {
    "AlreadyComplete": "errors",
    "BinarizedMnist": "sources.binarized_mnist",
    "CelebA": "sources.celeba",
    "Cifar10": "sources.cifar",
    "Cifar100": "sources.cifar",
    "DataError": "errors",
    "FashionMnist": "sources.mnist",
    "Folder": "sources.folder",
    "ImageNet32": "sources.imagenet",
    "ImageNet64": "sources.imagenet",
    "Incomplete": "errors",
    "Kmnist": "sources.mnist",
    "Mnist": "sources.mnist",
    "Npz": "sources.npz",
    "ToyFaces": "sources.toy_faces",
    "convert": "writer",
}

__all__ = list(_MODULES)


def __getattr__(name: str):
    """Import on first use: pipeline imports modules of this package and needs none of the sources."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
