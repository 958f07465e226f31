"""Layers and distributions that models are built of. Imports `schema` and `distributed`."""
