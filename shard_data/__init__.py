"""Images in, shards out: WebDataset tars with an index beside each, one manifest. Imports neither torch nor pipeline.

`convert(ToyFaces(size=32), "data/toy_faces32", workers=2)` does what `python -m shard_data toy_faces` does.
"""

from shard_data.errors import AlreadyComplete, DataError, Incomplete
from shard_data.sources.celeba import CelebA
from shard_data.sources.cifar import Cifar10, Cifar100
from shard_data.sources.folder import Folder
from shard_data.sources.mnist import FashionMnist, Kmnist, Mnist
from shard_data.sources.npz import Npz
from shard_data.sources.toy_faces import ToyFaces
from shard_data.writer import convert

__all__ = [
    "AlreadyComplete",
    "CelebA",
    "Cifar10",
    "Cifar100",
    "DataError",
    "FashionMnist",
    "Folder",
    "Incomplete",
    "Kmnist",
    "Mnist",
    "Npz",
    "ToyFaces",
    "convert",
]
