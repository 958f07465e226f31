"""The data sets that can be converted: each module has one source class, `add_arguments` and `from_arguments`."""

from shard_data.sources import mnist, toy_faces

SOURCES = {"toy_faces": toy_faces, "mnist": mnist}
