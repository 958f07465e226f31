"""The data sets that can be converted. Each module has a source class, `add_arguments` and `from_arguments`; its
docstring is the text of `--help`."""

from shard_data.sources import binarized_mnist, celeba, cifar, folder, imagenet, mnist, npz, toy_faces

SOURCES = {
    "toy_faces": toy_faces,
    "mnist": mnist,
    "binarized_mnist": binarized_mnist,
    "fashion_mnist": mnist,
    "kmnist": mnist,
    "cifar10": cifar,
    "cifar100": cifar,
    "celeba": celeba,
    "imagenet32": imagenet,
    "imagenet64": imagenet,
    "folder": folder,
    "npz": npz,
}
