"""Shard sets as batches: order, shards, preprocessing, loader. Imports `nn`, `storage`, `distributed` and below."""
