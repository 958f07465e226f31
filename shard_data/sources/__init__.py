"""The data sets that can be converted: each module has one source class, `add_arguments` and `from_arguments`."""

from shard_data.sources import celeba, cifar, mnist, toy_faces

SOURCES = {"toy_faces": toy_faces, "mnist": mnist, "celeba": celeba, "cifar10": cifar, "cifar100": cifar}
