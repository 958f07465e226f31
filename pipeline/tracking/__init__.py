"""Logging of a run: metrics.jsonl, W&B, and averages over an interval. Imports `storage` and below."""
