"""Images in, shards out: WebDataset tars with an index beside each and one manifest. Imports neither torch nor pipeline."""

from shard_data.errors import AlreadyComplete, DataError
from shard_data.sources.mnist import Mnist
from shard_data.writer import convert

__all__ = ["AlreadyComplete", "DataError", "Mnist", "convert"]
