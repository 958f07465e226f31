"""Images in, shards out: WebDataset tars with an index beside each, one manifest. Imports neither torch nor pipeline.

`convert(ToyFaces(size=32), "data/toy_faces32", workers=2)` does what `python -m shard_data toy_faces` does.
"""

from shard_data.errors import AlreadyComplete, DataError
from shard_data.sources.mnist import Mnist
from shard_data.sources.toy_faces import ToyFaces
from shard_data.writer import convert

__all__ = ["AlreadyComplete", "DataError", "Mnist", "ToyFaces", "convert"]
