"""Metrics and sample grids of a model. Imports `data`, `models`, `tracking` and below."""
